//! One lane of a tile: the row that it integrates, the time that the row has reached, and what the lane does next.

use candle_core::Tensor;

use super::events::RowEvents;
use super::norms::{Attempted, Norms};
use super::RowSolve;
use crate::adaptive::{Attempt, Control, Halt, Measured, Pace, Verdict};
use crate::error::{Error, Result, StopReason, Stopped, Worst};
use crate::problem::Problem;
use crate::rows::trajectory::TileTrajectory;
use crate::schedule::{Output, Recorded, Step};
use crate::simd::Element;
use crate::state::RowLayout;

/// What a lane does with its next evaluation.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Phase {
    /// Its first velocity, for attempts of a length that is given or still to be found.
    Start(Option<f64>),
    /// A velocity after an explicit Euler step of a length, beside the norm of the first velocity.
    Probe(f64, f64),
    /// It waits for the next attempt of the tile.
    Ready,
    /// It takes part in the attempt under way.
    Attempts(Attempt),
}

/// A row that a lane holds.
pub(super) struct Lane<T> {
    pub(super) row: usize,
    /// The sign of time: 1 where it increases, −1 where it decreases.
    direction: f64,
    pub(super) phase: Phase,
    pub(super) pace: Pace,
    pub(super) record: Recorded,
    pub(super) trajectory: TileTrajectory<T>,
    /// Whether the field jumps where the row is.
    pub(super) jumps: bool,
    /// The user's time that is met next.
    pub(super) next: usize,
    pub(super) evaluations: usize,
    /// States returned so far.
    pub(super) returned: usize,
    /// The last attempt, if it was rejected, and its error.
    pub(super) last: Option<(Attempt, f64)>,
    pub(super) events: RowEvents,
}

impl<T: Element> Lane<T> {
    /// At the start of a row, whose steps are kept or only counted.
    pub(super) fn new(
        control: &Control,
        row: usize,
        trajectory: TileTrajectory<T>,
        keeps_steps: bool,
    ) -> Self {
        let mut record = Recorded::from(control.start, true);
        if !keeps_steps {
            record = record.counting();
        }
        if control.starts_at_jump {
            record.break_here();
        }
        Self {
            row,
            direction: control.direction,
            phase: Phase::Start(control.options.first_step),
            pace: Pace::new(control, control.options.first_step.unwrap_or(0.0)),
            record,
            trajectory,
            jumps: control.starts_at_jump,
            next: 0,
            evaluations: 0,
            returned: 0,
            last: None,
            events: RowEvents::default(),
        }
    }

    /// Bytes of what is kept of its steps and states, where steps carry so many numbers.
    pub(super) fn held(&self, numbers: usize) -> u64 {
        self.record.held() + self.trajectory.held(numbers)
    }

    /// A step of length h from where the row is.
    pub(super) fn step(&self, h: f64, end: f64, jumps_at_end: bool) -> Step {
        let step = Step::free(self.record.len(), self.pace.t, h, end);
        step.between_jumps([self.jumps, jumps_at_end])
    }

    /// Where a lane waits: a step of length zero, whose sign is the direction of time.
    pub(super) fn standing(&self) -> Step {
        self.step(0.0f64.copysign(self.direction), self.pace.t, false)
    }

    /// Marks the node at t, where the row is, if it is one of the user's times; the number of the state that is to
    /// be returned there.
    pub(super) fn node(&mut self, problem: &Problem, t: f64) -> Result<Option<usize>> {
        let points = problem.grid.points();
        if points.get(self.next) != Some(&t) {
            return Ok(None);
        }
        let number = match problem.output {
            Output::Final => (self.next + 1 == points.len()).then_some(0),
            // The nodes of rows are not returned.
            Output::All | Output::Steps => Some(self.next),
        };
        self.record.mark(self.next)?;
        number.map_or(Ok(()), |number| self.record.ret(number))?;
        self.next += 1;
        self.returned += usize::from(number.is_some());
        Ok(number)
    }

    /// The next attempt: the one that the pace gives, or a step that is taken again.
    pub(super) fn attempt(&self, control: &Control) -> std::result::Result<Attempt, Halt> {
        match &self.events.again {
            Some(again) => Ok(again.attempt),
            None => self.pace.attempt(control),
        }
    }

    /// Judges an attempt by its error; a step that is taken again has been accepted.
    pub(super) fn judge(
        &mut self,
        control: &Control,
        attempt: &Attempt,
        measured: Measured,
        has_events: bool,
    ) -> std::result::Result<Verdict, Halt> {
        if self.events.again.is_some() {
            return Ok(Verdict::Accepted);
        }
        self.events.before = has_events.then(|| self.pace.clone());
        self.pace.judge(control, attempt, measured)
    }

    /// The user's times that an attempt has passed before its end, whose states are to be returned.
    pub(super) fn passed(
        &mut self,
        problem: &Problem,
        direction: f64,
        end: f64,
    ) -> std::ops::Range<usize> {
        let (points, from) = (problem.grid.points(), self.next);
        let passed = |t: f64| (end - t) * direction > 0.0;
        self.next += points[from..].iter().take_while(|&&t| passed(t)).count();
        match problem.output {
            Output::Final => from..from,
            Output::All | Output::Steps => from..self.next,
        }
    }

    /// The same of a row that ends at this time: if it is one of the user's, it is among them.
    pub(super) fn reached(
        &mut self,
        problem: &Problem,
        direction: f64,
        end: f64,
    ) -> std::ops::Range<usize> {
        let passed = self.passed(problem, direction, end);
        let meets = problem.grid.points().get(self.next) == Some(&end);
        self.next += usize::from(meets);
        passed.start..passed.end + usize::from(meets)
    }

    /// What is left of a row that has reached the end, or stopped.
    pub(super) fn finish(self, stopped: Option<StopReason>) -> RowSolve<T> {
        RowSolve {
            steps: self.record,
            trajectory: self.trajectory,
            pace: self.pace,
            evaluations: self.evaluations,
            stopped,
            found: self.events.found,
        }
    }

    /// The error of a row that has stopped, of which these states were computed, `[output][feature]`.
    pub(super) fn error(
        &self,
        problem: &Problem,
        layout: &RowLayout,
        reason: StopReason,
        worst: Option<Worst>,
        states: &[T],
    ) -> Error {
        let (h, error) = self
            .last
            .map_or((0.0, 0.0), |(attempt, error)| (attempt.h, error));
        let states = states_of_row(problem, layout, &states[..self.returned * layout.dim()]);
        Error::Stopped(Box::new(Stopped {
            reason,
            t: self.pace.t,
            h,
            error,
            worst: worst.or(Some(Worst {
                leaf: 0,
                row: self.row,
                index: 0,
            })),
            accepted: self.pace.accepted,
            rejected: self.pace.rejected,
            outputs: self.returned,
            states: states.unwrap_or_default(),
        }))
    }

    /// Where the error of the last attempt was largest, if it was rejected.
    pub(super) fn worst(
        &self,
        norms: &Norms<'_>,
        lane: usize,
        attempt: Attempted<'_, T>,
    ) -> Option<Worst> {
        let _ = self.last?;
        norms.worst((lane, self.row), attempt)
    }
}

/// States of one row, `(outputs, 1, …)` for each leaf.
fn states_of_row<T: Element>(
    problem: &Problem,
    layout: &RowLayout,
    states: &[T],
) -> Result<Vec<Tensor>> {
    let dim = layout.dim();
    let outputs = states.len() / dim.max(1);
    if outputs == 0 {
        return Ok(vec![]);
    }
    let all = Tensor::from_slice(states, (outputs, 1, dim), problem.device())?;
    let mut at = 0;
    let leaf = |&features: &usize| {
        let leaf = all.narrow(2, at, features)?.contiguous()?;
        at += features;
        Ok(leaf)
    };
    layout.features.iter().map(leaf).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::adaptive::Adaptive;
    use crate::rows::trajectory::TileStore;
    use crate::tableau::DOPRI5;
    use crate::time::TimeGrid;
    use crate::trajectory::Checkpoint;
    use candle_core::DType;

    #[test]
    fn a_lane_that_waits_behind_a_jump_is_evaluated_behind_it() {
        for (times, sign) in [([1.0, 2.0], 1.0), ([1.0, 0.0], -1.0)] {
            let grid = TimeGrid::new(times.to_vec()).unwrap();
            let control = Control::new(&Adaptive::new(1e-3, 1e-3), &DOPRI5, &grid, &[]).unwrap();
            let store = TileStore::new(DType::F64, 1, 1);
            let kept = TileTrajectory::online(Checkpoint::All, store, &[0.0]).unwrap();
            let mut lane = Lane::new(&control, 0, kept, true);
            assert_eq!(lane.standing().at(0.0), 1.0);
            lane.jumps = true;
            let behind = (lane.standing().at(0.0) - 1.0) * sign;
            assert!(behind > 0.0 && behind <= 16.0 * f64::EPSILON);
            // So does one whose field jumps where it begins.
            let jumps = [1.0];
            let control = Control::new(&Adaptive::new(1e-3, 1e-3), &DOPRI5, &grid, &jumps).unwrap();
            let store = TileStore::new(DType::F64, 1, 1);
            let kept = TileTrajectory::online(Checkpoint::All, store, &[0.0]).unwrap();
            let beginning = Lane::new(&control, 0, kept, true);
            assert_eq!(beginning.standing().at(0.0), lane.standing().at(0.0));
        }
    }
}
