//! A scale of the loss against underflow and overflow, for the layers around a solve.

use std::collections::HashSet;

use candle_core::backprop::GradStore;
use candle_core::{DType, Tensor, Var};
use candle_nn::Optimizer;

use crate::error::{Error, Result};
use crate::ops;
use crate::precision::at_least_f32;
use crate::scaler::LIMIT;

/// Whether all elements of a tensor are finite, in the dtype that it has.
pub(crate) fn is_finite(x: &Tensor) -> Result<bool> {
    let finite = match x.dtype() {
        DType::F64 => ops::magnitude(x)?.is_finite(),
        _ => ops::magnitude(&x.to_dtype(DType::F32)?)?.is_finite(),
    };
    Ok(finite)
}

/// What became of a training step; see [`LossScaler::backward_step`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stepped {
    /// Gradients were finite and the optimiser took its step.
    Taken,
    /// Gradients overflowed: nothing was updated, the scale fell.
    Skipped,
}

/// Scales the loss, for the f16 layers before and after a solve.
///
/// The solve's own adjoint is rescaled inside, so both compose: what reaches the solve is S times
/// larger, and so is what it returns.  With [`OnOverflow::SkipUpdate`](crate::scaling::OnOverflow::SkipUpdate) an overflow inside the solve
/// makes this scaler skip the step.  The rule is that of Micikevicius et al., "Mixed Precision
/// Training", arXiv 1710.03740.
///
/// ```
/// use candle_core::{DType, Device, Tensor, Var};
/// use candle_diffeq::scaling::{LossScaler, Stepped};
/// use candle_nn::{Optimizer, SGD};
/// let w = Var::new(&[2f32, 3.0], &Device::Cpu)?;
/// let mut sgd = SGD::new(vec![w.clone()], 0.5)?;
/// let mut scaler = LossScaler::default();
/// let loss = w.as_tensor().sqr()?.sum_all()?;
/// assert_eq!(scaler.backward_step(&loss, &[w.clone()], &mut sgd)?, Stepped::Taken);
/// assert_eq!(w.as_tensor().to_vec1::<f32>()?, [0.0, 0.0]);
///
/// // Another start, and more patience.
/// let scaler = LossScaler::new(1024.0)?.growth_interval(5000);
/// assert_eq!((scaler.scale, scaler.growth_interval), (1024.0, 5000));
/// # Ok::<(), candle_diffeq::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct LossScaler {
    /// The factor on the loss.  Default 65536.
    pub scale: f64,
    /// Steps without overflow after which the scale doubles.  Default 2000.
    pub growth_interval: usize,
    clean: usize,
}

impl Default for LossScaler {
    fn default() -> Self {
        Self {
            scale: 65536.0,
            growth_interval: 2000,
            clean: 0,
        }
    }
}

impl LossScaler {
    /// A scaler that starts with this factor and doubles it after 2000 steps without overflow.
    ///
    /// # Errors
    /// [`Error::InvalidScaling`] unless the scale is positive and finite.
    pub fn new(scale: f64) -> Result<Self> {
        if scale > 0.0 && scale.is_finite() {
            return Ok(Self {
                scale,
                ..Self::default()
            });
        }
        Err(Error::InvalidScaling {
            what: "scale",
            value: scale,
            range: "positive and finite",
        })
    }

    /// Sets the number of steps without overflow after which the scale doubles.
    #[must_use]
    pub fn growth_interval(mut self, steps: usize) -> Self {
        self.growth_interval = steps;
        self
    }

    /// scale · loss, to call `backward` on.
    ///
    /// # Errors
    /// Those of candle's product.
    pub fn scaled(&self, loss: &Tensor) -> Result<Tensor> {
        Ok((loss * self.scale)?)
    }

    /// Divides the gradients of `vars` by the scale, and tells whether all are finite.  Those of f16 and
    /// bf16 variables are f32 from here on: in f16 what the scale has saved would be lost again.
    ///
    /// # Errors
    /// Those of candle's operations.
    pub fn unscale(&self, grads: &mut GradStore, vars: &[Var]) -> Result<bool> {
        let mut finite = true;
        // A variable may have several names, and its gradient is one.
        let mut seen = HashSet::new();
        for var in vars.iter().filter(|var| seen.insert(var.id())) {
            let Some(grad) = grads.remove(var) else {
                continue;
            };
            let grad = grad.to_dtype(at_least_f32(grad.dtype()))?;
            let grad = (grad.detach() / self.scale)?;
            finite &= ops::magnitude(&grad)?.is_finite();
            grads.insert(var, grad);
        }
        Ok(finite)
    }

    /// Adapts the scale to the outcome of a step: halved after an overflow, doubled after
    /// `growth_interval` finite steps.
    pub fn update(&mut self, finite: bool) {
        if !finite {
            // Whatever a caller has set it to.
            let (least, most) = (f32::MIN_POSITIVE.into(), 2f64.powi(LIMIT));
            self.scale = (self.scale * 0.5).max(least).min(most);
            self.clean = 0;
            return;
        }
        self.clean += 1;
        if self.clean >= self.growth_interval {
            self.scale = (self.scale * 2.0).min(2f64.powi(LIMIT));
            self.clean = 0;
        }
    }

    /// The whole step: backward through the scaled loss, unscale, and let the optimiser step
    /// unless a gradient of `vars` (those that it trains) overflowed.
    ///
    /// candle's optimisers step in the dtype of a variable, and are given its gradient in it.  Give
    /// f16 models variables of f32 that are cast where they are read: then nothing is lost.
    ///
    /// # Errors
    /// Those of the backward pass and of the optimiser.
    pub fn backward_step(
        &mut self,
        loss: &Tensor,
        vars: &[Var],
        optimiser: &mut impl Optimizer,
    ) -> Result<Stepped> {
        let mut grads = self.scaled(loss)?.backward()?;
        let mut finite = self.unscale(&mut grads, vars)?;
        for var in vars {
            if let Some(grad) = grads.remove(var) {
                // What f32 holds may be infinite in the dtype of the variable.
                let grad = grad.to_dtype(var.dtype())?;
                finite = finite && is_finite(&grad)?;
                grads.insert(var, grad);
            }
        }
        self.update(finite);
        if !finite {
            return Ok(Stepped::Skipped);
        }
        optimiser.step(&grads)?;
        Ok(Stepped::Taken)
    }
}
