//! The forward pass of the rows of a group, through the lanes of one tile.

use std::ops::Range;

use pulp::Simd;

use super::lane::{reason, Lane, Phase};
use super::norms::{Attempted, Norms, Tolerances};
use super::{RowSolve, SolvedGroup};
use crate::adaptive::{Attempt, Control, OnFailure, Verdict};
use crate::error::{Error, Result, StopReason};
use crate::memory::zeros;
use crate::rows::lanes::LaneSteps;
use crate::rows::stepper::Stepper;
use crate::rows::tile::Tiled;
use crate::rows::trajectory::{TileStore, TileTrajectory};
use crate::rows::{Failure, TilePlan};
use crate::schedule::Step;
use crate::simd::{enter, scalars, scalars_mut, vectors, Element, Kernel, Vectors};

/// What every group's forward pass reads.
#[derive(Clone, Copy)]
pub(super) struct Integrate<'a, T: Element, S: Simd> {
    pub(super) field: &'a dyn Tiled<T, S>,
    pub(super) plan: &'a TilePlan<'a>,
    pub(super) control: &'a Control,
    pub(super) tolerances: &'a Tolerances,
    pub(super) y0: &'a [T],
}

impl<T: Element, S: Simd> Integrate<'_, T, S> {
    /// Solves the rows of one group.
    #[inline(never)]
    pub(super) fn group(
        &self,
        s: S,
        rows: Range<usize>,
    ) -> std::result::Result<SolvedGroup<T>, Failure> {
        let anywhere = |error| Failure { at: (0, 0), error };
        let group = OneGroup { pass: *self, rows };
        enter(s, group).map_err(anywhere)?
    }
}

/// [`Integrate::group`], in code for the vector unit.
struct OneGroup<'a, T: Element, S: Simd> {
    pass: Integrate<'a, T, S>,
    rows: Range<usize>,
}

impl<T: Element, S: Simd> Kernel<S> for OneGroup<'_, T, S> {
    type Output = Result<std::result::Result<SolvedGroup<T>, Failure>>;

    #[inline(always)]
    fn run(self, s: S) -> Self::Output {
        let mut group = Group::new(s, self.pass, self.rows)?;
        while group.lanes.iter().any(Option::is_some) {
            group.round()?;
        }
        Ok(group.finish())
    }
}

/// The rows of a group under way.
struct Group<'a, T: Element, S: Simd> {
    pass: Integrate<'a, T, S>,
    stepper: Stepper<'a, T, S>,
    norms: Norms<'a>,
    rows: Range<usize>,
    /// The next row that a lane takes.
    next: usize,
    lanes: Vec<Option<Lane<T>>>,
    /// Steps of the lanes; without an attempt under way, of length zero.
    steps: Vec<Step>,
    y: Vectors<T, S>,
    after: Vectors<T, S>,
    error: Vectors<T, S>,
    slot: Vectors<T, S>,
    solves: Vec<Option<RowSolve<T>>>,
    /// `[row][output][feature]`.
    states: Vec<T>,
    failure: Option<Failure>,
    calls: usize,
}

impl<'a, T: Element, S: Simd> Group<'a, T, S> {
    fn new(s: S, pass: Integrate<'a, T, S>, rows: Range<usize>) -> Result<Self> {
        let Integrate { plan, control, .. } = pass;
        let stepper = Stepper::estimating(s, pass.field, plan, &control.estimate);
        let (size, batch) = (stepper.size, stepper.width * T::lanes::<S>());
        let numbers = plan.problem.outputs().saturating_mul(plan.layout.dim());
        let mut group = Self {
            norms: Norms::new(pass.tolerances, plan.layout, batch),
            next: rows.start,
            lanes: (0..batch).map(|_| None).collect(),
            steps: vec![],
            y: vectors::<T, S>(size),
            after: vectors::<T, S>(size),
            error: vectors::<T, S>(size),
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

    fn batch(&self) -> usize {
        self.lanes.len()
    }

    /// Puts a row's y0 into a lane.
    fn load(&mut self, lane: usize, row: usize) {
        let (layout, batch) = (self.pass.plan.layout, self.batch());
        let y = scalars_mut::<T, S>(&mut self.y);
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
    fn refill(&mut self, lane: usize) -> Result<()> {
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
    fn numbers(&self, tile: &[T::Vector<S>], lane: usize) -> Vec<T> {
        let numbers = scalars::<T, S>(tile).iter().skip(lane);
        numbers.step_by(self.batch()).copied().collect()
    }

    /// Where an output of a row is returned.
    fn returned(&mut self, row: usize, output: usize) -> &mut [T] {
        let dim = self.pass.plan.layout.dim();
        let at = (row - self.rows.start) * self.pass.plan.problem.outputs() + output;
        &mut self.states[at * dim..][..dim]
    }

    /// One attempt of all lanes that are ready; the others begin meanwhile.
    #[inline(always)]
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
    #[inline(always)]
    fn plan_attempts(&mut self) -> Result<()> {
        let control = self.pass.control;
        for at in 0..self.batch() {
            // A row that cannot go on leaves its place to the next one, which begins.
            let planned = match &mut self.lanes[at] {
                Some(lane) if lane.phase == Phase::Ready => lane.pace.attempt(control),
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
                    self.stop(at, reason(control, failure))?;
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
    #[inline(always)]
    fn stage(&mut self, i: usize, begins: bool) -> Result<()> {
        let (batch, direction) = (self.batch(), self.pass.control.direction);
        let size = self.stepper.size;
        self.calls += 1;
        self.stepper.sum_stage(i, &self.y, &mut self.slot);
        if begins {
            let stage = scalars_mut::<T, S>(&mut self.slot[..size]);
            let y = scalars::<T, S>(&self.y);
            let k = scalars::<T, S>(&self.stepper.ks[..size]);
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
            for (lane, time) in self.lanes.iter().zip(self.stepper.clock.times_mut()) {
                let Some(lane) = lane else { continue };
                match lane.phase {
                    Phase::Start(_) => *time = T::of(lane.standing().at(0.0)),
                    Phase::Probe(length, _) => *time = T::of(lane.pace.t + direction * length),
                    _ => {}
                }
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
            let y = scalars::<T, S>(&self.y);
            let (k, rest) = self.stepper.ks.split_at_mut(size);
            let k = scalars_mut::<T, S>(k);
            let new = scalars::<T, S>(&rest[(i - 1) * size..][..size]);
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
                    lane.pace = crate::adaptive::Pace::new(control, h);
                    lane.phase = Phase::Ready;
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// The attempts of all lanes, as tiles.
    fn attempted(&self) -> Attempted<'_, T> {
        Attempted {
            y: scalars::<T, S>(&self.y),
            next: scalars::<T, S>(&self.after),
            k: scalars::<T, S>(&self.stepper.ks[..self.stepper.size]),
            error: scalars::<T, S>(&self.error),
            lengths: self.stepper.lengths(),
        }
    }

    /// Decides about the attempts, of so many evaluations each.
    #[inline(always)]
    fn judge(&mut self, evaluations: usize) -> Result<()> {
        let control = self.pass.control;
        let attempted = Attempted {
            y: scalars::<T, S>(&self.y),
            next: scalars::<T, S>(&self.after),
            k: scalars::<T, S>(&self.stepper.ks[..self.stepper.size]),
            error: scalars::<T, S>(&self.error),
            lengths: self.stepper.lengths(),
        };
        self.norms.measure(attempted);
        let mut accepted = Vec::with_capacity(self.batch());
        let mut needs_last = false;
        for at in 0..self.batch() {
            let (r, plain) = (self.norms.r[at], self.norms.plain[at]);
            let Some(lane) = &mut self.lanes[at] else {
                continue;
            };
            let Phase::Attempts(attempt) = lane.phase else {
                continue;
            };
            lane.evaluations += evaluations;
            lane.phase = Phase::Ready;
            match lane.pace.judge(control, &attempt, r, plain) {
                Ok(Verdict::Accepted) => {
                    lane.last = None;
                    let direction = control.direction;
                    let inside = lane.passed(self.pass.plan.problem, direction, attempt.end);
                    let is_done = lane.pace.is_done(control);
                    if control.appended && (!inside.is_empty() || !is_done) {
                        lane.evaluations += 1;
                        needs_last = true;
                    }
                    accepted.push((at, attempt, inside));
                }
                Ok(Verdict::Rejected) => lane.last = Some((attempt, r)),
                Err(failure) => {
                    lane.last = Some((attempt, r));
                    self.stop(at, reason(control, failure))?;
                }
            }
        }
        if needs_last {
            self.evaluate_last();
        }
        for (at, attempt, inside) in &accepted {
            self.record(*at, attempt, inside.clone())?;
        }
        self.go_on(&accepted)
    }

    /// The stage f(t_{n+1}, y_{n+1}) that was appended to the method.
    #[inline(always)]
    fn evaluate_last(&mut self) {
        let last = self.stepper.count() - 1;
        self.calls += 1;
        self.stepper.stage(last, &self.y, &mut self.slot);
        self.stepper
            .evaluate(LaneSteps::Each(&self.steps), last, &mut self.slot);
    }

    /// Keeps and returns what is wanted of an accepted attempt.
    fn record(&mut self, at: usize, attempt: &Attempt, inside: Range<usize>) -> Result<()> {
        let problem = self.pass.plan.problem;
        let y = self.numbers(&self.y, at);
        let Some(lane) = &mut self.lanes[at] else {
            return Ok(());
        };
        let row = lane.row;
        lane.trajectory.keep_numbers(lane.record.len(), &y)?;
        lane.record.push(attempt.t, attempt.h, attempt.end)?;
        let fraction = |i: usize| (problem.grid.points()[i] - attempt.t) / attempt.h;
        for i in inside.clone() {
            lane.record.save(fraction(i), i, Some(i))?;
            lane.returned += 1;
        }
        for i in inside {
            let state = self.interpolated(at, attempt.h, fraction(i), &y);
            self.returned(row, i).copy_from_slice(&state);
        }
        Ok(())
    }

    /// The state at a fraction x of a lane's step of length h.
    fn interpolated(&self, at: usize, h: f64, x: f64, y: &[T]) -> Vec<T> {
        let mut state = y.to_vec();
        let (batch, size) = (self.batch(), self.stepper.size);
        for (i, b) in self.stepper.interpolant(x).into_iter().enumerate() {
            if b == 0.0 {
                continue;
            }
            let c = T::of(h * b);
            let k = scalars::<T, S>(&self.stepper.ks[i * size..][..size]);
            let k = k.iter().skip(at).step_by(batch);
            for (y, k) in state.iter_mut().zip(k) {
                *y = y.plus_product(c, *k);
            }
        }
        state
    }

    /// Moves the lanes whose attempts were accepted.
    #[inline(always)]
    fn go_on(&mut self, accepted: &[(usize, Attempt, Range<usize>)]) -> Result<()> {
        let (batch, size, control) = (self.batch(), self.stepper.size, self.pass.control);
        let mut mask = vec![false; batch];
        for (at, ..) in accepted {
            mask[*at] = true;
        }
        let last = (self.stepper.count() - 1) * size;
        let (k, rest) = self.stepper.ks.split_at_mut(size);
        let new = &rest[last - size..][..size];
        for (to, from) in [(&mut *self.y, &*self.after), (k, new)] {
            select::<T>(&mask, scalars_mut::<T, S>(to), scalars::<T, S>(from));
        }
        for (at, attempt, _) in accepted {
            let at = *at;
            let y = self.numbers(&self.y, at);
            let problem = self.pass.plan.problem;
            let Some(lane) = &mut self.lanes[at] else {
                continue;
            };
            let row = lane.row;
            let node = lane.node(problem, attempt.end)?;
            lane.jumps = control.jumps_at(attempt);
            let is_done = lane.pace.is_done(control);
            if lane.jumps && !is_done {
                lane.record.break_here();
                lane.phase = Phase::Start(Some(attempt.h.abs()));
            }
            let limit = lane.pace.precision_limit(control).filter(|_| is_done);
            if let Some(output) = node {
                self.returned(row, output).copy_from_slice(&y);
            }
            if let Some(reason) = limit {
                self.stop(at, reason)?;
            } else if is_done {
                self.complete(at, None)?;
            }
        }
        Ok(())
    }

    /// A lane's row has ended: the next one takes its place.
    fn complete(&mut self, at: usize, stopped: Option<StopReason>) -> Result<()> {
        if let Some(lane) = self.lanes[at].take() {
            let place = lane.row - self.rows.start;
            self.solves[place] = Some(lane.finish(stopped));
        }
        self.refill(at)
    }

    /// A lane's row cannot go on.
    fn stop(&mut self, at: usize, reason: StopReason) -> Result<()> {
        let (plan, control) = (self.pass.plan, self.pass.control);
        let Some(lane) = &self.lanes[at] else {
            return Ok(());
        };
        let dim = plan.layout.dim() * plan.problem.outputs();
        let states = (lane.row - self.rows.start) * dim..(lane.row + 1 - self.rows.start) * dim;
        if control.options.on_failure == OnFailure::Error {
            let row = lane.row;
            let worst = lane.worst(&self.norms, at, self.attempted());
            let states = &self.states[states];
            let error = match reason {
                StopReason::NonFinite if lane.record.len() == 0 && lane.last.is_none() => {
                    Error::NonFiniteVelocity {
                        step: 0,
                        stage: 0,
                        t: control.start,
                    }
                }
                _ => lane.error(plan.problem, plan.layout, reason, worst, states),
            };
            // Those before it go on: one of them may stop too, and is the first.
            self.failure = Some(Failure {
                at: (row, 0),
                error,
            });
            self.rows.end = row;
            for lane in &mut self.lanes {
                lane.take_if(|lane| lane.row >= row);
            }
            return Ok(());
        }
        let done = lane.returned * plan.layout.dim();
        self.states[states][done..].fill(T::of(f64::NAN));
        self.complete(at, Some(reason))
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

/// Takes over the lanes that are marked.
#[inline(always)]
fn select<T: Element>(mask: &[bool], to: &mut [T], from: &[T]) {
    if mask.iter().all(|taken| *taken) {
        return to.copy_from_slice(from);
    }
    let batch = mask.len();
    for (to, from) in to.chunks_exact_mut(batch).zip(from.chunks_exact(batch)) {
        for ((to, from), taken) in to.iter_mut().zip(from).zip(mask) {
            *to = if *taken { *from } else { *to };
        }
    }
}
