//! Stochastic gradient descent with momentum, which candle does not have.

use candle_core::backprop::GradStore;
use candle_core::{Result, Tensor, Var};
use candle_nn::Optimizer;

/// As PyTorch's: v ← m v + ∇L + d θ, θ ← θ − r v.
#[derive(Clone, Copy, Debug)]
pub struct Config {
    pub rate: f64,
    pub momentum: f64,
    /// Weight decay.
    pub decay: f64,
}

pub struct Momentum {
    /// Variables and their v, from their first gradient on.
    vars: Vec<(Var, Option<Tensor>)>,
    config: Config,
}

impl Optimizer for Momentum {
    type Config = Config;

    fn new(vars: Vec<Var>, config: Config) -> Result<Self> {
        let vars = vars.into_iter().map(|var| (var, None)).collect();
        Ok(Self { vars, config })
    }

    fn step(&mut self, grads: &GradStore) -> Result<()> {
        let Config {
            rate,
            momentum,
            decay,
        } = self.config;
        for (var, v) in &mut self.vars {
            let Some(grad) = grads.get(var) else { continue };
            let theta = var.as_detached_tensor();
            let mut next = (grad.detach() + (&theta * decay)?)?;
            if let Some(v) = v.take() {
                next = (next + (v * momentum)?)?;
            }
            var.set(&(theta - (&next * rate)?)?)?;
            *v = Some(next);
        }
        Ok(())
    }

    fn learning_rate(&self) -> f64 {
        self.config.rate
    }

    fn set_learning_rate(&mut self, rate: f64) {
        self.config.rate = rate;
    }
}

/// The rate r after a share of the training, from 0 to 1: half a cosine from r to `last`.
pub fn cosine(rate: f64, last: f64, share: f64) -> f64 {
    last + 0.5 * (rate - last) * (1.0 + (std::f64::consts::PI * share).cos())
}
