//! The check for NaN and infinity.  If reading a tensor costs nothing, it is checked at once.  On CUDA the results of
//! all checks are read once, at the end of a sweep.  On other devices they are read in blocks, so that a loop over
//! steps hardly ever waits for one.

use candle_core::Tensor;

use crate::error::{Error, Result};
use crate::ops;
#[cfg(feature = "cuda")]
use crate::ops::cuda::{Clock, Looks, SweepState};

/// Looks that are kept before they are read: few enough to cost nothing, many enough that waiting
/// for them does not either.
const BLOCK: usize = 1024;

/// Tensors that were seen but not yet read, each with the error that it means.
#[derive(Default)]
pub(crate) struct Watch {
    pending: Vec<(Tensor, Error)>,
    /// Looks taken by kernels, and what each means.
    #[cfg(feature = "cuda")]
    looks: Option<(Looks, Vec<Error>)>,
}

impl Watch {
    /// Looks at every tensor of `xs`; the first non-finite one is the error, now or in `finish`.
    pub(crate) fn see(&mut self, xs: &[Tensor], error: impl Fn() -> Error) -> Result<()> {
        #[cfg(feature = "cuda")]
        if let Some(x) = xs.first().filter(|x| x.device().is_cuda()) {
            return self.look(x, error(), |looks| looks.see(xs));
        }
        for x in xs {
            if !x.device().is_cpu() {
                self.push(ops::poison(x)?, error())?;
            } else if !ops::magnitude(x)?.is_finite() {
                return Err(error());
            }
        }
        Ok(())
    }

    /// A look that a kernel takes on its way through tensors like x.
    #[cfg(feature = "cuda")]
    pub(crate) fn look<R>(
        &mut self,
        x: &Tensor,
        error: Error,
        take: impl FnOnce(&mut Looks) -> Result<R>,
    ) -> Result<R> {
        let (looks, errors) = self.looks(x)?;
        if !looks.is_replayed() {
            errors.push(error);
        }
        take(looks)
    }

    #[cfg(feature = "cuda")]
    fn looks(&mut self, x: &Tensor) -> Result<&mut (Looks, Vec<Error>)> {
        match &mut self.looks {
            Some(looks) => Ok(looks),
            none => Ok(none.insert((Looks::new(x)?, vec![]))),
        }
    }

    /// The number of the next look at tensors like x.
    #[cfg(feature = "cuda")]
    pub(crate) fn taken(&mut self, x: &Tensor) -> Result<u32> {
        Ok(self.looks(x)?.0.taken())
    }

    /// Runs a step that is replayed later: its looks count from what the clock shows, and are taken when
    /// [`replayed`](Self::replayed) says so.  Returns how many there are, too.
    #[cfg(feature = "cuda")]
    pub(crate) fn in_replay<R>(
        &mut self,
        x: &Tensor,
        clock: &Clock,
        step: impl FnOnce(&mut Self) -> Result<R>,
    ) -> Result<(R, usize)> {
        self.looks(x)?.0.begin_replayed(clock);
        let result = step(self);
        let looks = self.looks(x)?.0.end_replayed();
        Ok((result?, looks))
    }

    /// The looks of a step have been taken by a replay, with these meanings.
    #[cfg(feature = "cuda")]
    pub(crate) fn replayed(&mut self, x: &Tensor, meanings: Vec<Error>) -> Result<()> {
        let (looks, errors) = self.looks(x)?;
        looks.skip(meanings.len());
        errors.extend(meanings);
        Ok(())
    }

    /// Leaves what looks found to a sweep, which reads it with what it found itself.
    #[cfg(feature = "cuda")]
    pub(crate) fn leave_to(&self, sweep: &SweepState) -> Result<()> {
        match &self.looks {
            Some((looks, _)) => sweep.gather(looks),
            None => Ok(()),
        }
    }

    /// What a look meant.
    #[cfg(feature = "cuda")]
    pub(crate) fn meaning(self, look: usize) -> Option<Error> {
        let (_, mut errors) = self.looks?;
        (look < errors.len()).then(|| errors.swap_remove(look))
    }

    /// Keeps a flag, and reads all once they fill a block.
    fn push(&mut self, flag: Tensor, error: Error) -> Result<()> {
        self.pending.push((flag, error));
        match self.pending.len() {
            BLOCK.. => self.read(),
            _ => Ok(()),
        }
    }

    /// Reads what is pending.
    pub(crate) fn finish(mut self) -> Result<()> {
        #[cfg(feature = "cuda")]
        if let Some((looks, mut errors)) = self.looks.take() {
            if let Some(first) = looks.read()? {
                return Err(errors.swap_remove(first));
            }
        }
        self.read()
    }

    /// Reads what is pending, in one transfer.
    fn read(&mut self) -> Result<()> {
        if self.pending.is_empty() {
            return Ok(());
        }
        let (flags, errors): (Vec<_>, Vec<_>) = self.pending.drain(..).unzip();
        ops::note_host_read(flags[0].device());
        let flags = Tensor::stack(&flags, 0)?.to_vec1::<f32>()?;
        match flags.iter().zip(errors).find(|(flag, _)| **flag != 0.0) {
            Some((_, error)) => Err(error),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    #[test]
    fn flags_are_read_in_blocks_and_the_first_bad_one_is_the_error() {
        let flag = |bad: bool| {
            let x = if bad { f32::NAN } else { 0.0 };
            Tensor::new(x, &Device::Cpu).unwrap()
        };
        for bad in [0, 5, BLOCK - 1, BLOCK, 3 * BLOCK + 7] {
            let mut watch = Watch::default();
            let run = |watch: &mut Watch| {
                for leaf in 0..3 * BLOCK + 20 {
                    let error = Error::NonFiniteState { leaf };
                    watch.push(flag(leaf == bad || leaf == bad + 3), error)?;
                    assert!(watch.pending.len() < BLOCK);
                }
                std::mem::take(watch).finish()
            };
            let found = run(&mut watch).unwrap_err();
            assert!(matches!(found, Error::NonFiniteState { leaf } if leaf == bad));
        }
    }
}
