//! The forward pass of a group of rows, which are integrated in the lanes of one tile.

use std::ops::Range;

use super::lane::{Lane, Phase};
use super::norms::{Norms, Tolerances};
use super::{RowSolve, SolvedGroup};
use crate::adaptive::{Control, Pace};
use crate::error::{Result, StopReason};
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
        while group.lanes.iter().any(Option::is_some) {
            group.round().map_err(anywhere)?;
        }
        group.finish()
    }
}

/// The rows of a group under way.
pub(super) struct Group<'a, T: Element> {
    pub(super) pass: IntegrateRows<'a, T>,
    pub(super) stepper: Stepper<'a, T>,
    pub(super) norms: Norms<'a>,
    pub(super) rows: Range<usize>,
    /// The next row that a lane takes.
    next: usize,
    pub(super) lanes: Vec<Option<Lane<T>>>,
    /// Steps of the lanes; without an attempt under way, of length zero.
    pub(super) steps: Vec<Step>,
    pub(super) y: Aligned<T>,
    pub(super) after: Aligned<T>,
    pub(super) error: Aligned<T>,
    pub(super) slot: Aligned<T>,
    pub(super) solves: Vec<Option<RowSolve<T>>>,
    /// `[row][output][feature]`.
    pub(super) states: Vec<T>,
    pub(super) failure: Option<Failure>,
    pub(super) calls: usize,
}

impl<'a, T: Element> Group<'a, T> {
    fn new(pass: IntegrateRows<'a, T>, rows: Range<usize>) -> Result<Self> {
        let IntegrateRows { plan, control, .. } = pass;
        let stepper = Stepper::estimating(pass.field, plan, &control.estimate);
        let (size, batch) = (stepper.size, stepper.batch);
        let numbers = plan.problem.outputs().saturating_mul(plan.layout.dim());
        let mut group = Self {
            norms: Norms::new(pass.tolerances, plan.layout, batch),
            next: rows.start,
            lanes: (0..batch).map(|_| None).collect(),
            steps: vec![],
            y: aligned(size),
            after: aligned(size),
            error: aligned(size),
            slot: stepper.slot(),
            solves: rows.clone().map(|_| None).collect(),
            states: zeros("returned states", numbers.saturating_mul(rows.len()))?,
            failure: None,
            calls: 0,
            pass,
            stepper,
            rows,
        };
        for lane in 0..batch {
            // A lane without a row is a copy of the last one.
            group.load(lane, group.next.min(group.rows.end - 1));
            group.refill(lane)?;
        }
        let standing = group.lanes.iter().flatten().next().map(Lane::standing);
        group
            .steps
            .extend(standing.map(|step| vec![step; batch]).unwrap_or_default());
        Ok(group)
    }

    pub(super) fn batch(&self) -> usize {
        self.lanes.len()
    }

    /// Puts a row's y0 into a lane.
    fn load(&mut self, lane: usize, row: usize) {
        let (layout, batch) = (self.pass.plan.layout, self.batch());
        let y = &mut self.y;
        let mut at = lane;
        for (leaf, &features) in layout.features.iter().enumerate() {
            for x in &self.pass.y0[layout.offset(leaf, row)..][..features] {
                y[at] = *x;
                at += batch;
            }
        }
        self.norms.hold(lane, row);
        self.stepper.clock.rows_mut()[lane] = row;
    }

    /// Lets a lane take the next row, if there is one.
    pub(super) fn refill(&mut self, lane: usize) -> Result<()> {
        self.lanes[lane] = None;
        if self.next >= self.rows.end {
            return Ok(());
        }
        let (row, plan) = (self.next, self.pass.plan);
        self.next += 1;
        self.load(lane, row);
        let store = TileStore::new(
            plan.problem.scheme.roles[0].store.to,
            plan.problem.packing.len(),
        );
        let y = self.numbers(&self.y, lane);
        let trajectory = TileTrajectory::online(plan.problem.checkpoint, store, &y)?;
        let mut taken = Lane::new(self.pass.control, row, trajectory);
        if let Some(output) = taken.node(plan.problem, self.pass.control.start)? {
            self.returned(row, output).copy_from_slice(&y);
        }
        self.lanes[lane] = Some(taken);
        Ok(())
    }

    /// The numbers of one lane.
    pub(super) fn numbers(&self, tile: &[T], lane: usize) -> Vec<T> {
        let numbers = tile.iter().skip(lane);
        numbers.step_by(self.batch()).copied().collect()
    }

    /// Where an output of a row is returned.
    pub(super) fn returned(&mut self, row: usize, output: usize) -> &mut [T] {
        let dim = self.pass.plan.layout.dim();
        let at = (row - self.rows.start) * self.pass.plan.problem.outputs() + output;
        &mut self.states[at * dim..][..dim]
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
                .finish(&self.y, &mut self.after, &mut self.error);
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
            match planned {
                Ok(attempt) => {
                    if let Some(lane) = &mut self.lanes[at] {
                        let jumps = control.jumps_at(&attempt);
                        self.steps[at] = lane.step(attempt.h, attempt.end, jumps);
                        lane.phase = Phase::Attempts(attempt);
                    }
                }
                Err(failure) => {
                    self.stop(at, failure.reason(control))?;
                    match &self.lanes[at] {
                        Some(lane) => self.steps[at] = lane.standing(),
                        None => self.steps[at].h = 0.0,
                    }
                }
            }
        }
        Ok(())
    }

    /// Stage i of the attempts; lanes that begin use the evaluation for themselves.
    fn stage(&mut self, i: usize, begins: bool) -> Result<()> {
        let (batch, direction) = (self.batch(), self.pass.control.direction);
        let size = self.stepper.size;
        self.calls += 1;
        self.stepper.sum_stage(i, &self.y, &mut self.slot);
        if begins {
            let stage = &mut self.slot[..size];
            let y = &self.y;
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
        self.stepper.evaluate_now(i, &mut self.slot);
        match begins {
            true => self.begin(i),
            false => Ok(()),
        }
    }

    /// What the velocity of stage i is to lanes that begin.
    fn begin(&mut self, i: usize) -> Result<()> {
        let (batch, size, control) = (self.batch(), self.stepper.size, self.pass.control);
        for at in 0..batch {
            let y = &self.y;
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
