//! What can be wrong with a continuous adjoint.

use super::{Error, Result};
use crate::stats::StopReason;

/// Backward solves that cannot be made, and how one ended.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum ContinuousDefect {
    /// What cannot be had together with a continuous adjoint, or with one of this kind.
    #[error("a continuous adjoint does not go with {what}: take {take}")]
    Unavailable {
        /// What was asked for.
        what: &'static str,
        /// What can be had in its place.
        take: &'static str,
    },
    /// Points of a Gauss rule.
    #[error("a Gauss rule of {points} points was asked for: 1 to 16 are available")]
    Points {
        /// How many were asked for.
        points: usize,
    },
    /// A time at which a backward step is to end, outside of the interval of the solve.
    #[error("a backward step cannot end at t = {t:?}, outside of the interval of the solve")]
    Outside {
        /// The time.
        t: f64,
    },
    /// The backward solve did not reach its end.
    #[error("the backward solve stopped at t = {t:?} after {accepted} steps and {rejected} rejected attempts: {reason}; a Backsolve of a dissipative equation is unstable, Interpolated and Discrete are not")]
    Stopped {
        /// Why.
        reason: StopReason,
        /// Where.
        t: f64,
        /// Steps so far.
        accepted: usize,
        /// Attempts that were rejected.
        rejected: usize,
    },
}

impl ContinuousDefect {
    /// The error of asking for what cannot be had.
    pub(crate) fn unavailable<R>(what: &'static str, take: &'static str) -> Result<R> {
        Err(Self::Unavailable { what, take }.into())
    }
}

impl From<ContinuousDefect> for Error {
    fn from(defect: ContinuousDefect) -> Self {
        Self::Continuous(defect)
    }
}
