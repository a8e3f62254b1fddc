//! A training loop: Adam on a loss, the rate falling as asked.

use candle_core::{DType, Tensor};
use candle_nn::{AdamW, Optimizer, ParamsAdamW, VarMap};
use indicatif::ProgressBar;

use super::Result;

/// How a model is trained.
#[derive(Clone, Copy, Debug)]
pub struct Fit {
    pub iterations: usize,
    pub rate: f64,
    /// What the rate is multiplied with at the end; it falls geometrically over the last half.
    pub falls_to: f64,
    pub weight_decay: f64,
}

impl Fit {
    /// At a constant rate, without weight decay.
    pub const fn new(iterations: usize, rate: f64) -> Self {
        Self {
            iterations,
            rate,
            falls_to: 1.0,
            weight_decay: 0.0,
        }
    }

    /// The same with other numbers of iterations.
    pub const fn iterations(self, iterations: usize) -> Self {
        Self { iterations, ..self }
    }

    pub const fn falling_to(self, falls_to: f64) -> Self {
        Self { falls_to, ..self }
    }

    pub const fn weight_decay(self, weight_decay: f64) -> Self {
        Self {
            weight_decay,
            ..self
        }
    }

    /// Minimises the loss of each iteration; returns them all.
    pub fn run(
        &self,
        vars: &VarMap,
        bar: &ProgressBar,
        mut loss: impl FnMut(usize) -> Result<Tensor>,
    ) -> Result<Vec<f64>> {
        let adam = ParamsAdamW {
            lr: self.rate,
            weight_decay: self.weight_decay,
            ..Default::default()
        };
        let mut optimiser = AdamW::new(vars.all_vars(), adam)?;
        let mut losses = Vec::with_capacity(self.iterations);
        for i in 0..self.iterations {
            let second_half = (2.0 * i as f64 / self.iterations as f64 - 1.0).max(0.0);
            optimiser.set_learning_rate(self.rate * self.falls_to.powf(second_half));
            let loss = loss(i)?;
            optimiser.backward_step(&loss)?;
            let loss = loss.to_dtype(DType::F64)?.to_scalar::<f64>()?;
            losses.push(loss);
            bar.set_message(format!("loss {loss:.2e}"));
            bar.inc(1);
        }
        Ok(losses)
    }
}
