//! What is learnt: a density in the plane, and one of eight features.

use candle_core::{Device, Result, Tensor};
use candle_diffeq::datasets::Density;

/// Weights of the costs in the loss.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Weights {
    pub(crate) transport: f64,
    pub(crate) likelihood: f64,
    pub(crate) residual: f64,
}

/// A density, the potential that is to learn it, and how.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Problem {
    pub(crate) name: &'static str,
    /// Independent pairs of features, mixed by a reflection where there are several.
    pub(crate) pairs: &'static [Density],
    pub(crate) width: usize,
    pub(crate) rank: usize,
    pub(crate) weights: Weights,
    pub(crate) iterations: usize,
    pub(crate) batch: usize,
    /// Iterations on one batch.
    pub(crate) reuse: usize,
    /// Steps of RK4 in training, and where it is judged.
    pub(crate) steps: usize,
    pub(crate) judged_steps: usize,
    pub(crate) learning_rate: f64,
    /// Times that it is halved.
    pub(crate) halvings: usize,
    /// Points that costs are judged by, and for each sample of the discrepancy.
    pub(crate) points: usize,
    pub(crate) sample: usize,
}

impl Problem {
    /// The one in the plane, as published.
    pub(crate) const PLANE: Self = Self {
        name: "plane",
        pairs: &[Density::EightGaussians],
        width: 32,
        rank: 2,
        weights: Weights {
            transport: 1.0,
            likelihood: 30.0,
            residual: 1.0,
        },
        iterations: 5000,
        batch: 4096,
        reuse: 25,
        steps: 7,
        judged_steps: 11,
        learning_rate: 1e-2,
        halvings: 9,
        points: 4096,
        sample: 2048,
    };

    /// The one of eight features.
    pub(crate) const EIGHT: Self = Self {
        name: "d = 8",
        pairs: &[
            Density::Moons,
            Density::EightGaussians,
            Density::Pinwheel,
            Density::Circles,
        ],
        width: 128,
        rank: 8,
        weights: Weights {
            transport: 1.0,
            likelihood: 500.0,
            residual: 5.0,
        },
        steps: 9,
        judged_steps: 21,
        ..Self::PLANE
    };

    /// What fits into minutes.
    pub(crate) fn small(self) -> Self {
        Self {
            width: self.width.min(48),
            iterations: 1500,
            batch: 256,
            reuse: 1,
            halvings: 4,
            ..self
        }
    }

    /// What fits into a second.
    pub(crate) fn smoke(self) -> Self {
        Self {
            width: 8,
            iterations: 3,
            batch: 32,
            points: 64,
            sample: 64,
            ..self
        }
    }

    pub(crate) fn features(&self) -> usize {
        2 * self.pairs.len()
    }

    /// Points, (n, features), f32.
    pub(crate) fn sample(&self, n: usize, seed: u64, device: &Device) -> Result<Tensor> {
        let seeds = (0..).map(|i| seed.wrapping_mul(16) + i);
        let of = |(density, seed): (&Density, u64)| density.sample(n, seed, device);
        let pairs: Result<Vec<_>> = self.pairs.iter().zip(seeds).map(of).collect();
        self.mix(&Tensor::cat(&pairs?, 1)?)
    }

    /// I − 2vvᵀ/‖v‖² with v = (1, 2, …) applied to every row, its own inverse; nothing for one pair.
    pub(crate) fn mix(&self, x: &Tensor) -> Result<Tensor> {
        if self.pairs.len() == 1 {
            return Ok(x.clone());
        }
        let v = Tensor::arange(1f32, self.features() as f32 + 1.0, x.device())?;
        let squares = v.sqr()?.sum_all()?.to_scalar::<f32>()?;
        let along = x.matmul(&v.unsqueeze(1)?)?.matmul(&v.unsqueeze(0)?)?;
        x - (along * (2.0 / f64::from(squares)))?
    }
}
