//! Observers, which are called after every accepted step and before the next step.

use candle_core::Tensor;

use crate::error::Result;
use crate::precision::unit_roundoff;
use crate::schedule::Step;
use crate::step::{Increments, Scheme};

/// The solution inside a step that was accepted.
pub(crate) struct InStep<'a> {
    pub(super) scheme: &'a Scheme,
    pub(super) step: &'a Step,
    pub(super) y: &'a [Tensor],
    pub(super) ks: &'a Increments,
}

impl InStep<'_> {
    /// y_n and the stages.
    pub(crate) fn parts(&self) -> (Vec<Tensor>, Increments) {
        (self.y.to_vec(), self.ks.clone())
    }

    /// The step.
    pub(crate) fn step(&self) -> &Step {
        self.step
    }

    /// The unit roundoff of the state.
    pub(crate) fn roundoff(&self) -> f64 {
        self.y.first().map_or(0.0, |y| unit_roundoff(y.dtype()))
    }

    /// The time at a fraction x of the step.
    pub(crate) fn time(&self, x: f64) -> f64 {
        match x {
            1.0 => self.step.end,
            _ => self.step.t + x * self.step.h,
        }
    }

    /// The interpolated state there.
    pub(crate) fn state(&self, x: f64) -> Result<Vec<Tensor>> {
        match x {
            0.0 => Ok(self.y.to_vec()),
            _ => self.scheme.interpolated((self.step, x), self.y, self.ks),
        }
    }

    /// Its derivative with respect to time.
    pub(crate) fn slope(&self, x: f64) -> Result<Vec<Tensor>> {
        let slopes = self.scheme.tableau.slopes_at(x);
        self.scheme.weighted(1.0, &slopes, self.ks)
    }
}

/// What an observer wants of a step.
#[derive(Default)]
pub(crate) struct Wanted {
    /// Fractions of the step at which the state is to be returned, ascending, and whether the solve ends there.
    pub(crate) at: Vec<(f64, bool)>,
}

/// Sees every accepted step.
pub(crate) trait Observer {
    /// Whether it looks at all.
    fn looks(&self) -> bool {
        true
    }

    /// A pass begins.
    fn begin(&mut self);

    /// How many bytes it keeps.
    fn bytes(&self) -> u64 {
        0
    }

    /// A step was accepted.  So many states were returned before it, and the others that are returned inside of it lie
    /// at these fractions; at one fraction, what the observer wants is returned before them.
    fn accepted(&mut self, inside: &InStep<'_>, returned: usize, others: &[f64]) -> Result<Wanted>;

    /// The last step that was accepted is taken otherwise.
    fn retract(&mut self);
}

/// Nobody looks.
pub(crate) struct Unobserved;

impl Observer for Unobserved {
    fn looks(&self) -> bool {
        false
    }

    fn begin(&mut self) {}

    fn retract(&mut self) {}

    fn accepted(&mut self, _: &InStep<'_>, _: usize, _: &[f64]) -> Result<Wanted> {
        Ok(Wanted::default())
    }
}
