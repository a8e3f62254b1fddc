//! What can be wrong with a continuous adjoint.

use super::Error;
use crate::stats::StopReason;

/// Backward solves that cannot be made, and how one ended.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum ContinuousDefect {
    /// What a continuous adjoint does not have.
    #[error("a continuous adjoint has no {what}: take Gradient::Discrete")]
    Unavailable {
        /// What was asked for.
        what: &'static str,
    },
    /// Points of a Gauss rule.
    #[error("a Gauss rule of {points} points: 1 to 16 can be had")]
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

impl From<ContinuousDefect> for Error {
    fn from(defect: ContinuousDefect) -> Self {
        Self::Continuous(defect)
    }
}
