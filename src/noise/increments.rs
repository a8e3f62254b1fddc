//! Increments that the user gives, for example from a study, from common random numbers, or from a path that was
//! measured.

use candle_core::Tensor;

use crate::error::{Error, Result, SdeDefect};

/// Increments ΔW of every step, and the integrals U = ∫ (W(s) − W(t)) ds over the step if a method needs them.
///
/// Both are tensors of shape (steps, rows, channels).  With diagonal noise, the state may have several dimensions in
/// place of channels, and so have the increments.  Increments that candle tracks receive gradients.
#[derive(Clone, Debug)]
pub struct Increments {
    w: Tensor,
    u: Option<Tensor>,
}

impl Increments {
    /// Increments without integrals.
    pub fn new(w: Tensor) -> Self {
        Self { w, u: None }
    }

    /// With the integrals of W above its value at the start of each step.
    ///
    /// # Errors
    /// [`SdeDefect::Mismatch`] unless they have the shape of the increments.
    pub fn with_integrals(self, u: Tensor) -> Result<Self> {
        match u.shape() == self.w.shape() {
            true => Ok(Self { u: Some(u), ..self }),
            false => Err(Error::Sde(SdeDefect::Mismatch {
                what: "the shape of the integrals of increments",
                expected: format!("{:?}", self.w.shape()),
                got: format!("{:?}", u.shape()),
            })),
        }
    }

    /// ΔW.
    pub fn w(&self) -> &Tensor {
        &self.w
    }

    /// U, if it was given.
    pub fn u(&self) -> Option<&Tensor> {
        self.u.as_ref()
    }

    /// The increments of the same path over steps that are k times as long; h is the length of the given steps.  Two
    /// neighbours of lengths h_a and h_b have ΔW = ΔW_a + ΔW_b and U = U_a + U_b + h_b ΔW_a together.
    ///
    /// # Errors
    /// [`SdeDefect::Mismatch`] unless k divides the number of steps.
    pub fn coarsened(&self, k: usize, h: f64) -> Result<Self> {
        let steps = self.w.dims().first().copied().unwrap_or(0);
        if k == 0 || !steps.is_multiple_of(k) {
            return Err(Error::Sde(SdeDefect::Mismatch {
                what: "steps that are joined",
                expected: format!("a divisor of {steps}"),
                got: k.to_string(),
            }));
        }
        let groups = |x: &Tensor| x.reshape([&[steps / k, k], &x.dims()[1..]].concat());
        let w = groups(&self.w)?;
        let joined = Self::new(w.sum(1)?);
        match &self.u {
            None => Ok(joined),
            Some(u) => {
                // Step j of a group stands for k − 1 − j steps after it.
                let after: Vec<_> = (0..k).map(|j| h * (k - 1 - j) as f64).collect();
                let ones = vec![1; w.rank() - 2];
                let after =
                    Tensor::new(after, w.device())?.reshape([&[1, k], &ones[..]].concat())?;
                let above = w.broadcast_mul(&after.to_dtype(w.dtype())?)?.sum(1)?;
                joined.with_integrals((groups(u)?.sum(1)? + above)?)
            }
        }
    }

    /// Whether they are those of so many steps, rows and channels.
    pub(crate) fn check(&self, steps: usize, rows: usize, channels: usize) -> Result<()> {
        let dims = self.w.dims();
        let fits = dims.len() >= 2
            && dims[..2] == [steps, rows]
            && dims[2..].iter().product::<usize>() == channels;
        match fits {
            true => Ok(()),
            false => Err(Error::Sde(SdeDefect::Increments {
                steps,
                rows,
                channels,
                got: self.w.shape().clone(),
            })),
        }
    }
}
