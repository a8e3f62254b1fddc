//! How many steps of all rows there is room for.

use std::sync::atomic::{AtomicUsize, Ordering};

use candle_core::cuda_backend::WrapErr;

use super::super::SmallNet;
use super::{NetRecorded, RowsForward, RowsKept};
use crate::error::{Error, Result};

/// Steps that the last solve took on average for a row, and a quarter more.  It decides about the room of the next one,
/// and nothing else.
static STEPS_OF_A_ROW: AtomicUsize = AtomicUsize::new(32);

/// Steps that there is room for in any case.
const LEAST_ROOM: usize = 1 << 14;

/// Steps that can be told apart: each names the one before by a number of 32 bits.
const MOST_ROOM: usize = u32::MAX as usize;

/// A solve took so many steps on average for a row.
pub(super) fn note(mean: usize) {
    STEPS_OF_A_ROW.store(mean + mean.div_ceil(4), Ordering::Relaxed);
}

/// An error for more steps than can be told apart.
pub(super) fn check(room: usize) -> Result<()> {
    match room > MOST_ROOM {
        true => Err(Error::TooLarge { elements: room }),
        false => Ok(()),
    }
}

impl SmallNet {
    /// The same in memory of its own size, where much more was asked for: it is held until the backward pass.
    pub(super) fn without_spare_room(
        &self,
        kept: RowsKept,
        room: usize,
        recorded: usize,
    ) -> Result<RowsKept> {
        let recorded = recorded.max(1);
        if room / 2 < recorded.max(LEAST_ROOM) {
            return Ok(kept);
        }
        let steps = match &kept.steps {
            Some(steps) => {
                // SAFETY: all of it is written by the copy.
                let mut own = unsafe { self.device.alloc::<NetRecorded>(recorded) }?;
                self.device
                    .memcpy_dtod(&steps.slice(..recorded), &mut own)?;
                Some(own)
            }
            None => None,
        };
        let states = match &kept.kept {
            Some(states) => Some(states.narrow(0, 0, recorded)?.force_contiguous()?),
            None => None,
        };
        Ok(RowsKept {
            steps,
            kept: states,
            ..kept
        })
    }

    /// Steps that there is room for in a first launch.
    pub(super) fn room(&self, pass: &RowsForward<'_>, rows: usize) -> Result<usize> {
        if !pass.records {
            return Ok(0);
        }
        let mean = STEPS_OF_A_ROW.load(Ordering::Relaxed).min(pass.most_steps);
        let wanted = rows.saturating_mul(mean).max(LEAST_ROOM);
        let state = if pass.keeps {
            self.net.dim as usize * pass.store.size_in_bytes()
        } else {
            0
        };
        let (free, _) = self.device.cuda_stream().context().mem_get_info().w()?;
        let bytes = size_of::<NetRecorded>() + state;
        Ok(wanted.min(free / 4 / bytes).clamp(1, MOST_ROOM))
    }
}
