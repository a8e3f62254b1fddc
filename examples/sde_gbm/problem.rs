//! Two equations with known solutions, and their errors over given increments.

use candle_core::{DType, Device, Tensor};
use candle_diffeq::options::Output;
use candle_diffeq::sde::{
    ito, predict, stratonovich, Calculus, Increments, Noise, NoiseType, Sde, SdeMethod, SdeOptions,
    MILSTEIN_ITO, MILSTEIN_STRATONOVICH,
};
use candle_diffeq::Time;

use common::Result;

/// dY = A Y dt + B Y dW.
const A: f64 = 0.5;
const B: f64 = 0.6;
/// dY = −RATE Y dt + (1 + t) dW: the noise reads time, so that methods differ.
const RATE: f64 = 2.0;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Problem {
    Gbm,
    Ou,
}

type Part = Box<dyn Fn(&Time, &Tensor) -> candle_core::Result<Tensor>>;

fn grid(n: usize) -> Vec<f64> {
    (0..=n).map(|i| i as f64 / n as f64).collect()
}

/// Parts of the smallest steps that have increments of their own, of which those of steps are sums: the exact
/// Ornstein-Uhlenbeck solution is an integral over them.
const FINER: usize = 8;

pub(crate) fn path(
    seed: u64,
    finest: usize,
    paths: usize,
    dtype: DType,
    device: &Device,
) -> Result<Increments> {
    let all = Noise::seeded(seed);
    Ok(all.increments(&grid(finest * FINER), (paths, 1), dtype, device)?)
}

impl Problem {
    pub(crate) const ALL: [Self; 2] = [Self::Gbm, Self::Ou];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Gbm => "GBM",
            Self::Ou => "OU",
        }
    }

    pub(crate) fn noise(self) -> (NoiseType, bool) {
        (NoiseType::Diagonal, self == Self::Ou)
    }

    pub(crate) fn is_solved_by(self, method: SdeMethod) -> bool {
        let (noise, additive) = self.noise();
        let with_term = [MILSTEIN_ITO, MILSTEIN_STRATONOVICH].contains(&method);
        method.strong_order(noise, additive).is_some() && !(with_term && additive)
    }

    fn equation(self, calculus: Calculus) -> Sde<Part, Part, Part> {
        let (drift, diffusion, term): (Part, Part, Part) = match self {
            Self::Gbm => (
                Box::new(|_, y| y * A),
                Box::new(|_, y| y * B),
                Box::new(|_, y| y * (B * B)),
            ),
            Self::Ou => (
                Box::new(|_, y| y * -RATE),
                Box::new(|t, y| y.ones_like()?.broadcast_mul(&(t.tensor()? + 1.0)?)),
                Box::new(|_, y| y.zeros_like()),
            ),
        };
        let sde = match calculus {
            Calculus::Ito => ito(drift, diffusion),
            Calculus::Stratonovich => stratonovich(drift, diffusion),
        }
        .milstein_term(term);
        match self {
            Self::Gbm => sde,
            Self::Ou => sde.additive(),
        }
    }

    /// Y(1) by n steps of a method, from Y(0) = 1.
    pub(crate) fn solve(self, method: SdeMethod, path: &Increments, n: usize) -> Result<Tensor> {
        let (steps, paths, _) = path.w().dims3()?;
        let options = SdeOptions {
            method,
            output: Output::Final,
            ..Default::default()
        };
        let noise = path.coarsened(steps / n, 1.0 / steps as f64)?.into();
        let y0 = Tensor::ones((paths, 1), path.w().dtype(), path.w().device())?;
        let sde = self.equation(method.calculus());
        Ok(predict(&sde, &y0, &grid(n), &noise, &options)?)
    }

    /// Y(1) of the same paths.
    pub(crate) fn exact(self, path: &Increments, method: SdeMethod) -> Result<Tensor> {
        match self {
            Self::Gbm => {
                let drift = match method.calculus() {
                    Calculus::Ito => A - 0.5 * B * B,
                    Calculus::Stratonovich => A,
                };
                Ok(((path.w().sum(0)? * B)? + drift)?.exp()?)
            }
            Self::Ou => {
                // e^{−r} + ∫ e^{−r(1 − s)} (1 + s) dW: on each of the finest steps the integrand is a line, whose
                // integral is its value at the end times ΔW minus its slope times U, to second order.
                let steps = path.w().dim(0)?;
                let h = 1.0 / steps as f64;
                let g = |s: f64| (-RATE * (1.0 - s)).exp() * (1.0 + s);
                let column = |f: &dyn Fn(usize) -> f64| -> Result<Tensor> {
                    let x: Vec<_> = (0..steps).map(f).collect();
                    Ok(Tensor::new(x, path.w().device())?.reshape((steps, 1, 1))?)
                };
                let ends = column(&|i| g((i + 1) as f64 * h))?;
                let slopes = column(&|i| (g((i + 1) as f64 * h) - g(i as f64 * h)) / h)?;
                let u = path.u().ok_or("no integrals")?;
                let sum = path.w().broadcast_mul(&ends)?.sum(0)?;
                let sum = (sum - u.broadcast_mul(&slopes)?.sum(0)?)?;
                Ok((sum + (-RATE).exp())?)
            }
        }
    }
}

pub(crate) fn root_mean_square(y: &Tensor, exact: &Tensor) -> Result<f64> {
    Ok((y - exact)?.sqr()?.mean_all()?.to_scalar::<f64>()?.sqrt())
}

/// The mean of Y² − Y²_exact, and its standard deviation.
pub(crate) fn second_moment(y: &Tensor, exact: &Tensor) -> Result<(f64, f64)> {
    let difference = (y.sqr()? - exact.sqr()?)?;
    let mean = difference.mean_all()?.to_scalar::<f64>()?;
    let square = difference.sqr()?.mean_all()?.to_scalar::<f64>()?;
    let paths = difference.elem_count() as f64;
    Ok((mean, ((square - mean * mean) / paths).sqrt()))
}
