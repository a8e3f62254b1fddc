//! What steps that are replayed as CUDA graphs have in common.

use std::sync::atomic::{AtomicBool, Ordering};

use candle_core::DType;

use super::Scheme;
use crate::error::Result;
use crate::ops::cuda::Clock;
use crate::schedule::Step;
use crate::time::Time;

/// What steps that are replayed have in common.
#[derive(Debug)]
pub(crate) struct Fixture {
    pub(crate) clock: Clock,
    value_read: AtomicBool,
}

impl Fixture {
    /// For the steps of a scheme.
    pub(crate) fn new(scheme: &Scheme) -> Result<Self> {
        let (dtype, stages): (DType, _) = (scheme.roles[0].state, scheme.tableau.stages());
        Ok(Self {
            clock: Clock::new(&scheme.device, dtype, stages)?,
            value_read: AtomicBool::new(false),
        })
    }

    /// Notes whether a field read the value of its time.
    pub(crate) fn note(&self, time: &Time) {
        self.value_read.fetch_or(time.was_read(), Ordering::Relaxed);
    }

    /// Whether any did.
    pub(crate) fn value_was_read(&self) -> bool {
        self.value_read.load(Ordering::Relaxed)
    }

    /// Shows a step, and the number of its first look.
    pub(crate) fn show(&self, scheme: &Scheme, step: Step, look: u32) -> Result<()> {
        let dtype = scheme.roles[0].state;
        let times = scheme
            .tableau
            .c()
            .iter()
            .map(|&c| step.shown(step.at(c), dtype));
        let times: Vec<_> = times.collect();
        self.clock.tick(step.h, &times, look, step.index)
    }
}
