//! The interface between the two passes: what every forward pass hands to its backward pass, whichever solver was
//! used.

use std::sync::Arc;

use candle_core::Tensor;

use crate::error::Result;
use crate::field::Field;
use crate::problem::Problem;
use crate::schedule::Schedule;
use crate::stats::Stats;
use crate::trajectory::Trajectory;

/// A finished solve that has a backward pass.  It knows the steps that were taken; no pass back asks for those that
/// were planned.
pub(crate) trait Reversible: Send + Sync {
    /// Whether what a backward pass needs was kept.
    fn can_rewind(&self) -> bool;

    /// Whether the backward pass evaluates the field as tensors.
    fn reads_field(&self) -> bool {
        false
    }

    /// The same solve with states returned at these places instead, each a step and a fraction of it; `None` where
    /// that cannot be.
    fn returning(&self, _places: &[(usize, f64)]) -> Option<Arc<dyn Reversible>> {
        None
    }

    /// The times between which steps were taken, where all rows have the same.
    fn step_times(&self) -> Vec<f64> {
        vec![]
    }

    /// The steps that were taken over the whole batch, and what was kept of them, for another kind of backward pass.
    fn taken_steps(&self) -> Option<(&Trajectory, &Schedule)> {
        None
    }

    /// Whether some cotangents are ignored, so that the pass itself looks at those that are not.
    fn ignores_cotangents(&self) -> bool {
        false
    }

    /// Pulls the cotangent of the returned states back.
    fn pull_back(&self, back: &Backward<'_>, stats: &mut Stats) -> Result<Adjoint>;
}

/// What a backward pass is given.
pub(crate) struct Backward<'a> {
    pub(crate) problem: &'a Problem,
    pub(crate) field: &'a Field<'a>,
    /// The tensors that the field reads as parameters.
    pub(crate) theta: &'a [Tensor],
    /// Of the returned states, `(outputs, elements)`, or of a loss of them.
    pub(crate) cotangent: &'a Tensor,
    pub(crate) differentiate_time: bool,
}

/// Gradients in state precision, without history.
pub(crate) struct Adjoint {
    /// λ_0.
    pub(crate) y0: Vec<Tensor>,
    /// θ̄, by parameter.
    pub(crate) theta: Vec<Tensor>,
    /// t̄, by the user's times; empty unless asked for.
    pub(crate) times: Vec<f64>,
}
