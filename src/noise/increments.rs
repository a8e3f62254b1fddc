//! Increments that the user gives, for example from a study, from common random numbers, or from a path that was
//! measured.

use candle_core::{DType, Device, Tensor};

use crate::error::{Error, Result, SdeDefect};

/// Increments ΔW of every step, and the integrals U = ∫ (W(s) − W(t)) ds over the step if a method needs them.
///
/// Both are tensors of shape (steps, rows, channels).  With diagonal noise, the state may have several dimensions in
/// place of channels, and so have the increments.  Increments that candle tracks receive gradients.  A solve with gradients
/// reads copies: its gradients are at the increments that it was given, whatever is written to a variable afterwards.
#[derive(Clone, Debug)]
pub struct Increments {
    w: Tensor,
    u: Option<Tensor>,
    /// What a solve reads in place of the two.
    copies: Option<(Tensor, Option<Tensor>)>,
}

impl Increments {
    /// Increments without integrals.
    pub fn new(w: Tensor) -> Self {
        Self {
            w,
            u: None,
            copies: None,
        }
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

    /// The same, of which a solve reads copies.
    pub(crate) fn copied(self) -> Result<Self> {
        // Of a view alone, not of all that it is a part of.
        let copy = |x: &Tensor| x.detach().force_contiguous();
        let copies = (copy(&self.w)?, self.u.as_ref().map(copy).transpose()?);
        Ok(Self {
            copies: Some(copies),
            ..self
        })
    }

    /// ΔW and U as a solve reads them.
    pub(crate) fn read(&self) -> (&Tensor, Option<&Tensor>) {
        match &self.copies {
            Some((w, u)) => (w, u.as_ref()),
            None => (&self.w, self.u.as_ref()),
        }
    }

    /// The same in a dtype on a device, differentiable.
    pub(crate) fn converted(&self, dtype: DType, device: &Device) -> Result<Self> {
        let convert = |x: &Tensor| x.to_dtype(dtype)?.to_device(device);
        Ok(Self {
            w: convert(&self.w)?,
            u: self.u.as_ref().map(convert).transpose()?,
            copies: None,
        })
    }

    /// The increments of the same path over steps that are k times as long; h is the length of the given steps.  Two
    /// neighbours of lengths h_a and h_b have ΔW = ΔW_a + ΔW_b and U = U_a + U_b + h_b ΔW_a together.
    ///
    /// # Errors
    /// [`SdeDefect::Mismatch`] unless k divides the number of steps, and the increments have steps and rows.
    pub fn coarsened(&self, k: usize, h: f64) -> Result<Self> {
        let &[steps, _, ..] = self.w.dims() else {
            return Err(Error::Sde(SdeDefect::Mismatch {
                what: "the shape of increments",
                expected: "(steps, rows, channels)".to_owned(),
                got: format!("{:?}", self.w.shape()),
            }));
        };
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
