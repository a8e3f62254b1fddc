//! A solve without a graph, whose gradients are computed on request.

use std::sync::{Arc, OnceLock};

use candle_core::backprop::GradStore;
use candle_core::Tensor;

use crate::error::{Error, Result};
use crate::field::{Field, VectorField};
use crate::integrate::Forward;
use crate::parameters::{Observed, Theta};
use crate::passes::adjoint;
use crate::problem::{Plan, Problem};
use crate::reverse::{Backward, Reversible};
use crate::schedule::Output;
use crate::state::State;
use crate::time::Time;

/// A solve without a graph: the states, and what its backward pass needs.
pub struct Solution<'f, S> {
    problem: Problem,
    field: Box<Field<'f>>,
    theta: Theta,
    back: Arc<dyn Reversible>,
    states: S,
    /// Set once the connection between state and velocity has been looked at.
    is_checked: OnceLock<()>,
}

impl<'f, S: State> Solution<'f, S> {
    pub(crate) fn new(
        problem: Problem,
        field: Box<Field<'f>>,
        theta: Theta,
        forward: Forward,
    ) -> Result<Self> {
        let states = forward
            .packed
            .reshape(problem.returned(forward.packed.dim(0)?))?;
        Ok(Self {
            states: S::from_leaves(problem.packing.split(&states)?)?,
            problem,
            field,
            theta,
            back: forward.back,
            is_checked: OnceLock::new(),
        })
    }

    /// The states at the output times, `(times, …)` or `(…)`, in state dtype, without history.
    pub fn states(&self) -> &S {
        &self.states
    }

    /// The times of the states: those of the grid, the last of them, or the start and the end of every step, as
    /// [`OdeOptions::output`](crate::OdeOptions::output) asks for.
    pub fn times(&self) -> Vec<f64> {
        let points = self.problem.grid.points();
        match (self.problem.output, &self.problem.plan) {
            (Output::All, _) => points.to_vec(),
            (Output::Final, _) => points[points.len() - 1..].to_vec(),
            (Output::Steps, Plan::Known(schedule)) => schedule.times(),
            (Output::Steps, Plan::Adaptive(_)) => self.back.step_times(),
        }
    }

    /// Makes sure, at the end of the last step, that candle sees how the velocity depends on the state.
    fn check_connected(&self) -> Result<()> {
        let problem = &self.problem;
        if !self.field.is_traced() || self.field.parameters().is_some() || problem.is_empty() {
            return Ok(());
        }
        let times = self.back.step_times();
        let [.., start, end] = times[..] else {
            return Ok(());
        };
        let states = self.states.leaves();
        let y = states.iter().zip(&problem.scheme.roles).map(|(y, roles)| {
            let last = match problem.output {
                Output::Final => y.clone(),
                Output::All | Output::Steps => y.get(y.dim(0)? - 1)?,
            };
            roles.compute.round(&last)
        });
        let y = y.collect::<Result<Vec<_>>>()?;
        let step = times.len() - 2;
        let t = Time::new(end, problem.state(), problem.device()).within(step, [start, end]);
        let observed = Observed::closure(&*self.field, true).solving(problem, 0, false);
        observed.velocity(&t, &y)?;
        Ok(())
    }

    /// Gradients of L where `cotangent` = ∂L/∂[`states`](Self::states), of their shapes.
    ///
    /// # Errors
    /// [`Error::TrackedCotangent`], [`Error::CotangentShape`], [`Error::DeviceMismatch`], [`Error::UntrackedVelocity`],
    /// [`Error::NothingKept`], those of the field, and those of an overflow: here the policy is the
    /// caller's, so they are always returned.
    pub fn vjp(&self, cotangent: &S) -> Result<Gradients<S>> {
        let Self { problem, theta, .. } = self;
        let (leaves, states) = (cotangent.leaves(), self.states.leaves());
        if leaves.len() != states.len() {
            return Err(Error::LeafCount {
                expected: states.len(),
                got: leaves.len(),
            });
        }
        for (leaf, (v, y)) in leaves.iter().zip(&states).enumerate() {
            if v.shape() != y.shape() {
                return Err(Error::CotangentShape {
                    expected: y.shape().clone(),
                    got: v.shape().clone(),
                });
            }
            if !v.device().same_device(y.device()) {
                return Err(Error::DeviceMismatch {
                    what: format!("cotangent {leaf}"),
                    expected: y.device().location(),
                    got: v.device().location(),
                });
            }
        }
        let rows = leaves.iter().map(|v| {
            v.reshape((self.times().len(), ()))?
                .to_dtype(problem.state())
        });
        let packed = Tensor::cat(&rows.collect::<candle_core::Result<Vec<_>>>()?, 1)?;
        let back = Backward {
            problem,
            field: &*self.field,
            theta: &theta.leaves,
            cotangent: &packed,
            differentiate_time: problem.grid.is_tracked(),
        };
        let adjoint = adjoint(&*self.back, theta, &back)?;
        if self.is_checked.get().is_none() {
            self.check_connected()?;
            self.is_checked.get_or_init(|| ());
        }
        let mut params = GradStore::default();
        for (master, grad) in theta.masters.iter().zip(adjoint.theta) {
            // A tensor may be given twice.
            let sum = match params.remove(master) {
                Some(before) => (before + grad)?,
                None => grad,
            };
            params.insert(master, sum);
        }
        let times = match problem.grid.tensor().filter(|t| t.track_op()) {
            Some(t) => Some(Tensor::new(adjoint.times, t.device())?.to_dtype(t.dtype())?),
            None => None,
        };
        Ok(Gradients {
            y0: S::from_leaves(adjoint.y0)?,
            params,
            times,
        })
    }
}

/// Gradients of a loss through a solve, without history.
#[derive(Debug)]
pub struct Gradients<S> {
    /// ∂L/∂y0, in state dtype.
    pub y0: S,
    /// ∂L/∂θ in state dtype, by the user's variable; those that no evaluation read have none.
    pub params: GradStore,
    /// ∂L/∂t_i in the grid's dtype, for grids that were given as a tensor that candle tracks.
    pub times: Option<Tensor>,
}
