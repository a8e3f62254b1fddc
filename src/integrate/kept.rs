//! What a pass of adaptive steps keeps as it goes on: its steps, the states that it returns, and its trajectory.

use std::sync::Arc;

use candle_core::Tensor;

use super::{need, Forward};
use crate::adaptive::{Control, Pace};
use crate::driven::Driven;
use crate::error::{Error, Result, StopReason, Stopped, Worst};
use crate::memory::{Growth, TENSOR};
use crate::ops;
use crate::precision::Roles;
use crate::problem::Problem;
use crate::schedule::{Output, Recorded, Schedule};
use crate::state::Packing;
use crate::stats::Stats;
use crate::trajectory::{Checkpoint, Trajectory};

/// What is kept.
pub(super) struct Kept<'a> {
    problem: &'a Problem,
    /// Of everything that a step carries.
    roles: Vec<Roles>,
    pub(super) record: Recorded,
    pub(super) trajectory: Trajectory,
    /// Whether it is known that the trajectory is wanted, or that it is not.
    known: bool,
    pub(super) outputs: Vec<Tensor>,
    /// The user's time that is met next.
    pub(super) next: usize,
    /// What is held of states and outputs.
    growth: Growth,
}

/// The last attempt, for the error of a solve that stops.
#[derive(Default)]
pub(super) struct Last {
    pub(super) h: f64,
    pub(super) error: f64,
    pub(super) worst: Option<Worst>,
}

impl<'a> Kept<'a> {
    /// At the start, with a finite state; `joins` where a step hands its last evaluation on to the next.
    pub(super) fn from(
        (problem, control): (&'a Problem, &Control),
        (y, roles): (&Vec<Tensor>, Vec<Roles>),
        joins: bool,
        keep: &dyn Fn() -> bool,
    ) -> Result<Self> {
        for (leaf, y) in y.iter().enumerate() {
            if !ops::magnitude(y)?.is_finite() {
                return Err(Error::NonFiniteState { leaf });
            }
        }
        let known = keep();
        let plan = match known {
            true => problem.checkpoint,
            false => Checkpoint::Nothing,
        };
        need(problem, control.least_steps(), plan).check()?;
        let mut kept = Self {
            problem,
            record: Recorded::from(control.start, joins),
            trajectory: Trajectory::online(plan, roles.clone(), y)?,
            roles,
            known,
            outputs: vec![],
            next: 0,
            growth: Growth::default(),
        };
        kept.returns_node(control.start, y)?;
        Ok(kept)
    }

    /// After the first attempt from y: whether the trajectory is wanted.
    pub(super) fn settle(
        &mut self,
        control: &Control,
        y: &Vec<Tensor>,
        keep: &dyn Fn() -> bool,
    ) -> Result<()> {
        if !self.known && keep() {
            let plan = self.problem.checkpoint;
            need(self.problem, control.least_steps(), plan).check()?;
            self.trajectory = Trajectory::online(plan, self.roles.clone(), y)?;
        }
        self.known = true;
        Ok(())
    }

    /// Marks the node at t, where the solve is, if it is one of the user's times; returns the state where it is
    /// wanted.
    pub(super) fn returns_node(&mut self, t: f64, y: &[Tensor]) -> Result<()> {
        let points = self.problem.grid.points();
        let is_given = points.get(self.next) == Some(&t);
        let is_wanted = match self.problem.output {
            Output::Final => is_given && self.next + 1 == points.len(),
            Output::All => is_given,
            Output::Steps => true,
        };
        if is_given {
            self.record.mark(self.next)?;
            self.next += 1;
        }
        if is_wanted {
            self.record.ret(self.outputs.len())?;
            self.returns(y)?;
        }
        Ok(())
    }

    /// Returns y, of what a step carries.
    pub(super) fn returns(&mut self, y: &[Tensor]) -> Result<()> {
        let y = &y[..self.problem.scheme.roles.len()];
        self.outputs.push(Packing::pack(y, self.problem.state())?);
        Ok(())
    }

    /// Compares what is held, and what the pass still needs to hand over, with the memory that there is; `others` are
    /// bytes that somebody else holds.  The reason to stop, if it does not suffice.
    pub(super) fn outgrown(&mut self, y: &Vec<Tensor>, others: u64) -> Result<Option<StopReason>> {
        let of = |numbers: usize, tensors: usize| {
            let numbers = match self.problem.device().is_cpu() {
                true => numbers * self.problem.state().size_in_bytes(),
                false => 0,
            };
            numbers as u64 + tensors as u64 * TENSOR as u64
        };
        let (elements, leaves) = (self.problem.packing.len(), self.problem.scheme.roles.len());
        let outputs = self.outputs.len() as u64 * of(elements, 1);
        let states = match self.trajectory.keeps_copies() {
            true => self.problem.copied(),
            false => self.problem.carried(),
        };
        let kept = self.trajectory.kept_states() as u64 * of(states * elements, states * leaves);
        let held = outputs + kept + others;
        // Outputs are joined at the end, which takes their memory once more.
        let Some([need, available]) = self.growth.reaches(held, outputs) else {
            return Ok(None);
        };
        // What was computed is handed over; what was kept for a backward pass is of no use now.
        self.trajectory = Trajectory::online(Checkpoint::Nothing, self.roles.clone(), y)?;
        Ok(Some(StopReason::Memory { need, available }))
    }

    /// Notes what was done.
    pub(super) fn count(&self, pace: &Pace, stats: &mut Stats) {
        pace.count(stats);
        stats.step_times.extend(self.record.times());
    }

    /// What the pass hands on.
    pub(super) fn forward(self, driven: Option<Arc<Driven>>, stats: &mut Stats) -> Result<Forward> {
        self.trajectory.record(stats);
        let packed = Tensor::stack(&self.outputs, 0)?;
        let schedule = Arc::new(Schedule::Recorded(self.record));
        Ok(Forward::by_steps_of(
            driven,
            packed,
            self.trajectory,
            None,
            schedule,
        ))
    }

    /// The error of a solve that does not go on, with the states that it has computed.
    pub(super) fn stopped(&self, reason: StopReason, pace: &Pace, last: Last) -> Error {
        let computed = Tensor::stack(&self.outputs, 0).map_err(Error::from);
        let states = computed.and_then(|states| self.problem.packing.unpack(&states));
        Error::Stopped(Box::new(Stopped {
            reason,
            t: pace.t,
            h: last.h,
            error: last.error,
            worst: last.worst,
            accepted: pace.accepted,
            rejected: pace.rejected,
            outputs: self.outputs.len(),
            states: states.unwrap_or_default(),
        }))
    }
}
