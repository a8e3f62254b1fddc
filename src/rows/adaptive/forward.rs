//! The forward pass of a group of rows, which are integrated in the lanes of one tile.

use std::cmp::Reverse;
use std::ops::Range;

use super::inside::{put, take, LaneOutputs};
use super::lane::{Lane, Phase};
use super::norms::{Norms, Tolerances};
use super::{RowSolve, SolvedGroup};
use crate::adaptive::{Attempt, Control, Pace};
use crate::error::{Error, Result, StopReason};
use crate::memory::{zeros, Growth};
use crate::rows::lanes::LaneSteps;
use crate::rows::stepper::Stepper;
use crate::rows::tile::{Instant, Tiled};
use crate::rows::trajectory::{TileStore, TileTrajectory};
use crate::rows::{Failure, TilePlan};
use crate::schedule::Step;
use crate::simd::{aligned, Aligned, Element};

/// What every group's forward pass reads.
#[derive(Clone, Copy)]
pub(super) struct IntegrateRows<'a, T: Element> {
    pub(super) field: &'a dyn Tiled<T>,
    pub(super) plan: &'a TilePlan<'a>,
    pub(super) control: &'a Control,
    pub(super) tolerances: &'a Tolerances,
    pub(super) y0: &'a [T],
    /// Whether velocities depend on time.
    pub(super) reads_time: bool,
    /// Whether tiles read the times of the lanes.
    pub(super) reads_clock: bool,
    /// Whether steps end behind crossings, since the interpolant is less accurate.
    pub(super) refines: bool,
    /// Bytes that are kept of the states of all rows.
    pub(super) growth: &'a Growth,
}

impl<T: Element> IntegrateRows<'_, T> {
    /// Solves the rows of one group.
    pub(super) fn group(&self, rows: Range<usize>) -> std::result::Result<SolvedGroup<T>, Failure> {
        let anywhere = |error| Failure { at: (0, 0), error };
        let mut group = Group::new(*self, rows).map_err(anywhere)?;
        while group.lanes.iter().any(Option::is_some) || !group.waiting.is_empty() {
            group.round().map_err(anywhere)?;
        }
        group.finish()
    }
}

/// A row that has begun and waits for a lane, with its first velocity.
pub(super) struct Waiting<T> {
    pub(super) lane: Lane<T>,
    k: Vec<T>,
}

/// The rows of a group under way.
pub(super) struct Group<'a, T: Element> {
    pub(super) pass: IntegrateRows<'a, T>,
    pub(super) stepper: Stepper<'a, T>,
    pub(super) norms: Norms<'a>,
    pub(super) rows: Range<usize>,
    /// The rows that no lane has taken yet, the one with the shortest first step last: lanes take it first.
    pub(super) waiting: Vec<Waiting<T>>,
    pub(super) lanes: Vec<Option<Lane<T>>>,
    /// Steps of the lanes; without an attempt under way, of length zero.
    pub(super) steps: Vec<Step>,
    pub(super) y: Aligned<T>,
    pub(super) after: Aligned<T>,
    /// The error, and the differences of stages.
    pub(super) measures: [Aligned<T>; 3],
    pub(super) slot: Aligned<T>,
    /// Of outputs inside the steps.
    pub(super) inside: LaneOutputs<T>,
    /// The numbers of one row.
    pub(super) row: Vec<T>,
    pub(super) solves: Vec<Option<RowSolve<T>>>,
    /// Steps that a row is expected to take: as many as the last one that has ended.
    pub(super) expected: usize,
    /// `[row][output][feature]`.
    pub(super) states: Vec<T>,
    pub(super) failure: Option<Failure>,
    pub(super) calls: usize,
}

impl<'a, T: Element> Group<'a, T> {
    fn new(pass: IntegrateRows<'a, T>, rows: Range<usize>) -> Result<Self> {
        let IntegrateRows { plan, control, .. } = pass;
        let mut stepper = Stepper::estimating(pass.field, plan, Some(control));
        stepper.clock.is_read = pass.reads_clock;
        let (size, batch) = (stepper.size, stepper.batch);
        let numbers = plan.problem.outputs().saturating_mul(plan.layout.dim());
        let mut group = Self {
            norms: Norms::new(pass.tolerances, plan.layout, batch),
            waiting: vec![],
            lanes: (0..batch).map(|_| None).collect(),
            steps: vec![],
            y: aligned(stepper.carried),
            after: aligned(stepper.carried),
            measures: std::array::from_fn(|_| aligned(size)),
            slot: stepper.slot(),
            inside: LaneOutputs::new(&stepper),
            row: vec![T::default(); stepper.carried / batch],
            solves: rows.clone().map(|_| None).collect(),
            expected: 8,
            states: zeros("returned states", numbers.saturating_mul(rows.len()))?,
            failure: None,
            calls: 0,
            pass,
            stepper,
            rows,
        };
        group.begin_rows()?;
        Ok(group)
    }

    pub(super) fn batch(&self) -> usize {
        self.lanes.len()
    }

    /// Puts a row's y0 into a lane.
    fn load(&mut self, lane: usize, row: usize) {
        let (layout, batch) = (self.pass.plan.layout, self.batch());
        let leaves = layout.features.iter().enumerate();
        let leaves = leaves.map(|(leaf, &n)| &self.pass.y0[layout.offset(leaf, row)..][..n]);
        put(leaves, batch, lane, &mut self.y);
        // Rounding has taken nothing from it yet.
        let lost = self.y[self.stepper.size..].iter_mut().skip(lane);
        lost.step_by(batch).for_each(|lost| *lost = T::default());
        self.norms.hold(lane, row);
        self.stepper.clock.rows_mut()[lane] = row;
    }

    /// Finds the first velocity and the first step length of every row, tile by tile.  Rows with short steps are
    /// taken first, because they have the most steps: then the lanes end at about the same time.
    fn begin_rows(&mut self) -> Result<()> {
        let (batch, size) = (self.batch(), self.stepper.size);
        let (mut waiting, mut first) = (vec![], self.rows.start);
        while first < self.rows.end {
            for at in 0..batch {
                // A lane without a row is a copy of the last one.
                let row = (first + at).min(self.rows.end - 1);
                self.load(at, row);
                if first + at == row {
                    self.lanes[at] = Some(self.row_at(at, row)?);
                }
            }
            let standing = self.lanes.iter().flatten().next().map(Lane::standing);
            self.steps = standing.map_or(vec![], |step| vec![step; batch]);
            self.stepper.begin(LaneSteps::Each(&self.steps));
            while self.busy().0 {
                self.stage(1, true)?;
            }
            for at in 0..batch {
                if let Some(lane) = self.lanes[at].take() {
                    let k = self.numbers(&self.stepper.ks[..size], at);
                    waiting.push(Waiting { lane, k });
                }
            }
            first += batch;
        }
        waiting.retain(|row| self.rows.contains(&row.lane.row));
        // Lengths are positive, so that they are in the order of their bits.
        waiting.sort_by_cached_key(|row| Reverse((row.lane.pace.h.to_bits(), row.lane.row)));
        self.waiting = waiting;
        for at in 0..batch {
            self.refill(at);
        }
        Ok(())
    }

    /// A row at its start, whose state is in this lane.
    fn row_at(&mut self, at: usize, row: usize) -> Result<Lane<T>> {
        let plan = self.pass.plan;
        let dim = plan.layout.dim();
        let store = TileStore::new(
            plan.problem.scheme.roles[0].store.to,
            plan.problem.packing.len(),
            dim,
        );
        let y = self.numbers(&self.y, at);
        let trajectory = TileTrajectory::online(plan.problem.checkpoint, store, &y)?;
        // Without a way back, only a trace and the search for events read the steps of rows.
        let problem = plan.problem;
        let keeps_steps = trajectory.can_rewind() || problem.recorder.traces() || self.has_events();
        let mut lane = Lane::new(self.pass.control, row, trajectory, keeps_steps);
        if let Some(output) = lane.node(plan.problem, self.pass.control.start)? {
            self.returned(row, output).copy_from_slice(&y[..dim]);
        }
        Ok(lane)
    }

    /// Lets a lane take the next row, if there is one.
    pub(super) fn refill(&mut self, at: usize) {
        self.lanes[at] = None;
        if let Some(Waiting { lane, k }) = self.waiting.pop() {
            self.load(at, lane.row);
            let (batch, size) = (self.batch(), self.stepper.size);
            let first = &mut self.stepper.ks[..size];
            put(std::iter::once(&*k), batch, at, first);
            self.lanes[at] = Some(lane);
        }
    }

    /// The numbers of one lane.
    pub(super) fn numbers(&self, tile: &[T], lane: usize) -> Vec<T> {
        let mut row = vec![T::default(); tile.len() / self.batch()];
        take(tile, self.batch(), lane, &mut row);
        row
    }

    /// Where an output of a row is, among the states.
    pub(super) fn place(&self, row: usize, output: usize) -> Range<usize> {
        let dim = self.pass.plan.layout.dim();
        let at = (row - self.rows.start) * self.pass.plan.problem.outputs() + output;
        at * dim..(at + 1) * dim
    }

    /// Where an output of a row is returned.
    pub(super) fn returned(&mut self, row: usize, output: usize) -> &mut [T] {
        let place = self.place(row, output);
        &mut self.states[place]
    }

    /// One attempt of all lanes that are ready; the others begin meanwhile.
    fn round(&mut self) -> Result<()> {
        let control = self.pass.control;
        self.plan_attempts()?;
        let stages = self.stepper.count() - usize::from(control.appended);
        self.stepper.begin(LaneSteps::Each(&self.steps));
        let mut whole = true;
        for i in 1..stages.max(2) {
            let (begins, attempts) = self.busy();
            // Where the method has one stage, the last one is evaluated for those who begin.
            if !(begins || attempts && i < stages) {
                whole = attempts;
                break;
            }
            self.stage(i, begins)?;
        }
        if whole && self.busy().1 {
            self.stepper
                .finish(&self.y, &mut self.after, &mut self.measures);
            self.judge(stages - 1)?;
        }
        Ok(())
    }

    /// Whether any lane begins, and whether any attempts a step.
    fn busy(&self) -> (bool, bool) {
        let lanes = || self.lanes.iter().flatten();
        (
            lanes().any(|lane| matches!(lane.phase, Phase::Start(_) | Phase::Probe(..))),
            lanes().any(|lane| matches!(lane.phase, Phase::Attempts(_))),
        )
    }

    /// The next attempt of every lane that is ready.
    fn plan_attempts(&mut self) -> Result<()> {
        let control = self.pass.control;
        // Where a row that fails ends the solve, lanes with later rows are empty, and rows before it may wait.
        for at in 0..self.batch() {
            if self.lanes[at].is_none() {
                self.refill(at);
            }
        }
        for at in 0..self.batch() {
            // A row that cannot go on leaves its place to the next one, which begins.
            let planned = match &mut self.lanes[at] {
                Some(lane) if lane.phase == Phase::Ready => lane.attempt(control),
                Some(lane) => {
                    self.steps[at] = lane.standing();
                    continue;
                }
                None => {
                    self.steps[at].h = 0.0;
                    continue;
                }
            };
            let stopped = match planned {
                Ok(attempt) => self.attempt(at, attempt),
                Err(failure) => Some((failure.reason(control), None)),
            };
            if let Some((reason, error)) = stopped {
                self.stop_by(at, reason, error)?;
                match &self.lanes[at] {
                    Some(lane) => self.steps[at] = lane.standing(),
                    None => self.steps[at].h = 0.0,
                }
            }
        }
        Ok(())
    }

    /// A lane takes part in the next attempt of the tile, unless time would stand still for a field that reads it.
    fn attempt(&mut self, at: usize, attempt: Attempt) -> Option<(StopReason, Option<Error>)> {
        let lane = self.lanes[at].as_mut()?;
        let step = lane.step(attempt.h, attempt.end, self.pass.control.jumps_at(&attempt));
        let dtype = self.pass.plan.problem.state();
        if self.pass.reads_time && step.stands_still_in(dtype) {
            let error = Error::TimeUnresolved {
                step: step.index,
                t: step.t,
                end: step.end,
                dtype,
            };
            return Some((StopReason::Underflow, Some(error)));
        }
        self.steps[at] = step;
        lane.phase = Phase::Attempts(attempt);
        None
    }

    /// Stage i of the attempts; lanes that begin use the evaluation for themselves.
    fn stage(&mut self, i: usize, begins: bool) -> Result<()> {
        let (batch, direction) = (self.batch(), self.pass.control.direction);
        let size = self.stepper.size;
        self.calls += 1;
        self.stepper.sum_stage(i, &self.y, &mut self.slot);
        if begins {
            let stage = &mut self.slot[..size];
            let y = &self.y[..size];
            let k = &self.stepper.ks[..size];
            for (at, lane) in self.lanes.iter().enumerate() {
                let h = match lane.as_ref().map(|lane| lane.phase) {
                    Some(Phase::Start(_)) => None,
                    Some(Phase::Probe(length, _)) => Some(T::of(direction * length)),
                    _ => continue,
                };
                for i in (at..y.len()).step_by(batch) {
                    stage[i] = h.map_or(y[i], |h| y[i].plus_product(h, k[i]));
                }
            }
        }
        self.stepper.round(&mut self.slot[..size]);
        self.stepper.tell(LaneSteps::Each(&self.steps), i);
        if begins {
            // On the side of a jump that lies ahead.
            let end = self.pass.plan.problem.grid.points().last().copied();
            for (at, lane) in self.lanes.iter().enumerate() {
                let Some(lane) = lane else { continue };
                let t = match lane.phase {
                    Phase::Start(_) => lane.standing().at(0.0),
                    Phase::Probe(length, _) => lane.pace.t + direction * length,
                    _ => continue,
                };
                let step = [lane.pace.t, end.unwrap_or(lane.pace.t)];
                self.stepper.clock.set(at, Instant { t, step });
            }
        }
        // A lane that begins takes the velocity for itself.
        self.stepper.evaluate_now(i, begins, &mut self.slot);
        match begins {
            true => self.begin(i),
            false => Ok(()),
        }
    }

    /// What the velocity of stage i is to lanes that begin.
    fn begin(&mut self, i: usize) -> Result<()> {
        let (batch, size, control) = (self.batch(), self.stepper.size, self.pass.control);
        for at in 0..batch {
            let y = &self.y[..size];
            let (k, rest) = self.stepper.ks.split_at_mut(size);
            let new = &rest[(i - 1) * size..][..size];
            let Some(lane) = &mut self.lanes[at] else {
                continue;
            };
            match lane.phase {
                Phase::Start(length) => {
                    lane.evaluations += 1;
                    let mut finite = true;
                    for i in (at..y.len()).step_by(batch) {
                        k[i] = new[i];
                        finite &= new[i].wide().is_finite();
                    }
                    lane.phase = match length {
                        Some(_) => Phase::Ready,
                        None => {
                            let (length, d1) = self.norms.probe(control, at, y, k);
                            Phase::Probe(length, d1)
                        }
                    };
                    if !finite {
                        self.stop(at, StopReason::NonFinite)?;
                    }
                }
                Phase::Probe(length, d1) => {
                    lane.evaluations += 1;
                    let found = (length, d1);
                    let h = self.norms.first_length(control, at, (y, k, new), found);
                    lane.pace = Pace::new(control, h);
                    lane.phase = Phase::Ready;
                }
                _ => {}
            }
        }
        Ok(())
    }

    fn finish(self) -> std::result::Result<SolvedGroup<T>, Failure> {
        match self.failure {
            Some(failure) => Err(failure),
            None => Ok(SolvedGroup {
                rows: self.rows,
                solves: self.solves.into_iter().flatten().collect(),
                states: self.states,
                calls: self.calls,
            }),
        }
    }
}
