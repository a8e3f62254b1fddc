//! The watch for NaN and infinity: at once where reading a tensor costs nothing, otherwise once at
//! the end of a sweep, so that no step loop waits for a device.

use candle_core::Tensor;

use crate::error::{Error, Result};
use crate::ops;

/// Tensors that were seen but not yet read, each with the error that it means.
#[derive(Default)]
pub(crate) struct Watch {
    pending: Vec<(Tensor, Error)>,
}

impl Watch {
    /// Looks at every tensor of `xs`; the first non-finite one is the error, now or in `finish`.
    pub(crate) fn see(&mut self, xs: &[Tensor], error: impl Fn() -> Error) -> Result<()> {
        for x in xs {
            if !x.device().is_cpu() {
                self.pending.push((ops::poison(x)?, error()));
            } else if !ops::magnitude(x)?.is_finite() {
                return Err(error());
            }
        }
        Ok(())
    }

    /// Reads what is pending, in one transfer.
    pub(crate) fn finish(self) -> Result<()> {
        if self.pending.is_empty() {
            return Ok(());
        }
        let (flags, errors): (Vec<_>, Vec<_>) = self.pending.into_iter().unzip();
        let flags = Tensor::stack(&flags, 0)?.to_vec1::<f32>()?;
        match flags.iter().zip(errors).find(|(flag, _)| **flag != 0.0) {
            Some((_, error)) => Err(error),
            None => Ok(()),
        }
    }
}
