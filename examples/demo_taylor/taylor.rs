//! The remainders of Taylor's formula, and the slopes with which they fall.

use candle_core::{DType, Device, Tensor};
use candle_diffeq::tableau::RK4;
use candle_diffeq::OdeOptions;
use rand::rngs::StdRng;

use common::dtype::Dtype;
use common::problem::{relative, values, Gradients, Problem};
use common::random::normal;

type Result<T, E = candle_core::Error> = std::result::Result<T, E>;

/// h = 2 · 0.85ⁱ.
const LARGEST: f64 = 2.0;
const RATIO: f64 = 0.85;
const COUNT: usize = 48;
/// The last points show what rounding leaves; a slope is fitted where a remainder is this much
/// larger.
const LAST: usize = 10;
const ABOVE: f64 = 8.0;
/// E₀ is linear where E₁ is a smaller part of it than this.
pub(crate) const LINEAR: f64 = 0.15;
/// E₁ is quadratic where it is a smaller part of E₀ than this,
const QUADRATIC: f64 = 0.33;
/// and a larger one than this many unit roundoffs of f: by some of them the gradient is off.
const ROUNDOFFS: f64 = 16.0;
/// A move along rounded weights counts where it is that close to the move that was meant.
const FAITHFUL: f64 = 0.5;

/// What is moved.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Towards {
    InitialValue,
    Weights,
}

impl Towards {
    pub(crate) const ALL: [Self; 2] = [Self::InitialValue, Self::Weights];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::InitialValue => "y0",
            Self::Weights => "weights",
        }
    }

    /// Halfway between the gradient and a random direction, so that L changes along it; of length 1
    /// in the weights, or in a row of y0 on average.
    pub(crate) fn draw(
        self,
        problem: &Problem,
        gradients: &Gradients,
        rng: &mut StdRng,
    ) -> Result<Direction> {
        let mut like = |x: &Tensor| normal(rng, x.shape(), x.dtype(), x.device());
        let mut random = Direction {
            y0: like(&problem.y0)?,
            weights: problem.weights.iter().map(like).collect::<Result<_>>()?,
        };
        let mut gradient = Direction::from_gradients(problem, gradients)?;
        for direction in [&mut random, &mut gradient] {
            match self {
                Self::InitialValue => direction.weights = zeros(&problem.weights)?,
                Self::Weights => direction.y0 = problem.y0.zeros_like()?,
            }
            *direction = direction.times(1.0 / direction.length()?)?;
        }
        let both = random.plus(&gradient)?;
        let length = match self {
            Self::InitialValue => (problem.y0.dim(0)? as f64).sqrt(),
            Self::Weights => 1.0,
        };
        both.times(length / both.length()?)
    }
}

fn zeros(like: &[Tensor]) -> Result<Vec<Tensor>> {
    like.iter().map(Tensor::zeros_like).collect()
}

/// A direction in y0 and in the weights.
pub(crate) struct Direction {
    y0: Tensor,
    weights: Vec<Tensor>,
}

impl Direction {
    fn from_gradients(problem: &Problem, gradients: &Gradients) -> Result<Self> {
        let like = |values: &[f64], x: &Tensor| {
            Tensor::from_slice(values, x.shape(), &Device::Cpu)?.to_device(x.device())
        };
        let (mut weights, mut start) = (vec![], 0);
        for weight in &problem.weights {
            let end = start + weight.elem_count();
            weights.push(like(&gradients.theta[start..end], weight)?);
            start = end;
        }
        Ok(Self {
            y0: like(&gradients.y0, &problem.y0)?,
            weights,
        })
    }

    fn map(&self, f: impl Fn(&Tensor) -> Result<Tensor>) -> Result<Self> {
        Ok(Self {
            y0: f(&self.y0)?,
            weights: self.weights.iter().map(f).collect::<Result<_>>()?,
        })
    }

    fn times(&self, factor: f64) -> Result<Self> {
        self.map(|x| x * factor)
    }

    fn plus(&self, other: &Self) -> Result<Self> {
        let weights = self.weights.iter().zip(&other.weights);
        Ok(Self {
            y0: (&self.y0 + &other.y0)?,
            weights: weights.map(|(a, b)| a + b).collect::<Result<_>>()?,
        })
    }

    /// All components, those of the weights last.
    fn flat(&self) -> Result<Vec<f64>> {
        let parts = std::iter::once(&self.y0).chain(&self.weights).map(values);
        Ok(parts.collect::<Result<Vec<_>>>()?.concat())
    }

    fn length(&self) -> Result<f64> {
        Ok(self.flat()?.iter().map(|x| x * x).sum::<f64>().sqrt())
    }

    /// Its product with gradients.
    fn dot(&self, gradients: &Gradients) -> Result<f64> {
        let gradients = gradients.y0.iter().chain(&gradients.theta);
        Ok(self.flat()?.iter().zip(gradients).map(|(a, b)| a * b).sum())
    }

    /// The problem, moved by h and its weights rounded to `dtype`, and the move that this is: a
    /// function of rounded weights is a staircase, on which only moves from stair to stair count.
    fn moved(&self, problem: &Problem, h: f64, dtype: DType) -> Result<(Problem, Self)> {
        let round = |x: &Tensor| x.to_dtype(dtype)?.to_dtype(DType::F64);
        let weights = problem.weights.iter().zip(&self.weights);
        let weights = weights.map(|(x, d)| round(&(x + (d * h)?)?));
        let moved = Problem {
            y0: (&problem.y0 + (&self.y0 * h)?)?,
            weights: weights.collect::<Result<_>>()?,
            ..problem.clone()
        };
        let change = moved.weights.iter().zip(&problem.weights);
        let change = Self {
            y0: (&self.y0 * h)?,
            weights: change.map(|(x, y)| x - round(y)?).collect::<Result<_>>()?,
        };
        Ok((moved, change))
    }
}

/// E₀ and E₁ at one h.
pub(crate) struct Point {
    pub(crate) h: f64,
    pub(crate) remainders: [f64; 2],
    /// Whether the move was the one that was meant.
    faithful: bool,
}

/// All points of a test, from the largest h on.
pub(crate) struct Remainders {
    pub(crate) points: Vec<Point>,
    /// Of f.
    roundoff: f64,
}

/// The slope of one of them over the points above rounding.
pub(crate) struct Fit {
    pub(crate) slope: f64,
    pub(crate) points: usize,
    pub(crate) floor: f64,
}

/// Solves along the direction.
pub(crate) fn remainders(
    problem: &Problem,
    direction: &Direction,
    dtype: Dtype,
    steps: usize,
) -> Result<Remainders, candle_diffeq::Error> {
    let options = OdeOptions {
        method: RK4,
        precision: Some(dtype.precision()),
        ..Default::default()
    };
    let gradients = problem.solve(options.clone(), steps)?;
    let start = problem.value(options.clone(), steps)?;
    let at = |i| {
        let h = LARGEST * RATIO.powi(i);
        let (moved, by) = direction.moved(problem, h, dtype.precision().compute)?;
        let change = moved.value(options.clone(), steps)? - start;
        let meant = direction.times(h)?.flat()?;
        Ok(Point {
            h,
            remainders: [change.abs(), (change - by.dot(&gradients)?).abs()],
            faithful: relative(&by.flat()?, &meant) < FAITHFUL,
        })
    };
    let points = (0..COUNT as i32).map(at);
    Ok(Remainders {
        points: points.collect::<Result<_, candle_diffeq::Error>>()?,
        roundoff: dtype.roundoff(),
    })
}

impl Remainders {
    /// By least squares of log E against log h, over the points above rounding.
    pub(crate) fn fit(&self, order: usize) -> Fit {
        let last = self.points.iter().rev().take(LAST);
        let floor = last.map(|p| p.remainders[1]).fold(0.0, f64::max);
        let seen = |p: &&Point| {
            let [e0, e1] = p.remainders;
            let part = match order {
                0 => e1 < LINEAR * e0,
                _ => e1 < QUADRATIC * e0 && e1 > ROUNDOFFS * self.roundoff * e0,
            };
            p.faithful && part && p.remainders[order] > ABOVE * floor
        };
        let seen = self.points.iter().filter(seen);
        let logs: Vec<_> = seen.map(|p| (p.h.ln(), p.remainders[order].ln())).collect();
        let n = logs.len() as f64;
        let mean = |f: fn(&(f64, f64)) -> f64| logs.iter().map(f).sum::<f64>() / n;
        let (x, y) = (mean(|p| p.0), mean(|p| p.1));
        let (top, bottom) = logs.iter().fold((0.0, 0.0), |(top, bottom), p| {
            (top + (p.0 - x) * (p.1 - y), bottom + (p.0 - x).powi(2))
        });
        Fit {
            slope: top / bottom,
            points: logs.len(),
            floor,
        }
    }
}
