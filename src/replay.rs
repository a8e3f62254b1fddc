//! Steps forward, one after the other: launched operation by operation or, on CUDA and where that is asked
//! for, captured once and replayed.

#[cfg(feature = "cuda")]
mod device;

use candle_core::Tensor;

use crate::error::Result;
use crate::field::Field;
use crate::schedule::Step;
use crate::stats::Stats;
use crate::step::{Scheme, Taken};
use crate::watch::Watch;

#[cfg(feature = "cuda")]
pub(crate) use device::{overwrite, refusal};

/// Takes the steps of a pass.
pub(crate) struct StepSequence<'a> {
    scheme: &'a Scheme,
    copies: bool,
    #[cfg(feature = "cuda")]
    replay: device::StepReplay,
}

impl<'a> StepSequence<'a> {
    /// For a solve of so many steps; `copies` in store precision are wanted or not, and `graphs`.
    pub(crate) fn new(scheme: &'a Scheme, copies: bool, graphs: bool, steps: usize) -> Self {
        let _ = (graphs, steps);
        Self {
            scheme,
            copies,
            #[cfg(feature = "cuda")]
            replay: device::StepReplay::new(scheme, graphs, steps),
        }
    }

    /// y_{n+1} and, if copies are wanted and come with it, ŷ_{n+1}.  Unless y_{n+1} is `kept`, it is only
    /// there until the next step.
    pub(crate) fn advance(
        &mut self,
        field: &Field<'_>,
        step: Step,
        y: &[Tensor],
        kept: bool,
        watch: &mut Watch,
        stats: &mut Stats,
    ) -> Result<Taken> {
        let (scheme, copies) = (self.scheme, self.copies);
        #[cfg(feature = "cuda")]
        {
            let at = device::StepAt { field, step, y };
            if let Some(next) = self
                .replay
                .advance(scheme, copies, &at, kept, watch, stats)?
            {
                return Ok(next);
            }
        }
        let _ = (kept, stats);
        scheme.advance_and_store(field, step, y, copies, watch)
    }
}
