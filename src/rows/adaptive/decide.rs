//! What becomes of the attempts of a tile: lanes go on, try again, or leave their place to the next row.

use std::ops::Range;

use super::events::Met;
use super::forward::Group;
use super::inside::take;
use super::lane::Phase;
use super::norms::Attempted;
use crate::adaptive::{Attempt, OnFailure, Verdict};
use crate::error::{Error, Result, StopReason};
use crate::memory::refusal;
use crate::rows::lanes::LaneSteps;
use crate::rows::stepper::Stepper;
use crate::rows::Failure;
use crate::schedule::Output;
use crate::simd::{Aligned, Element};

/// An attempt of a lane that was accepted.
pub(super) struct Taken {
    pub(super) at: usize,
    pub(super) attempt: Attempt,
    /// The user's times inside of it.
    pub(super) inside: Range<usize>,
    /// The events in it, of rows that have any.
    met: Option<Met>,
}

impl Taken {
    /// The fraction of the step at which a time lies.
    pub(super) fn fraction(&self, t: f64) -> f64 {
        (t - self.attempt.t) / self.attempt.h
    }
}

impl<T: Element> Group<'_, T> {
    /// Decides about the attempts, of so many evaluations each.
    pub(super) fn judge(&mut self, evaluations: usize) -> Result<()> {
        let control = self.pass.control;
        let Self {
            stepper,
            y,
            after,
            measures,
            norms,
            ..
        } = self;
        let attempt = attempted(stepper, [&*y, &*after], measures);
        stepper.on.measure(norms, attempt);
        let mut accepted = Vec::with_capacity(self.batch());
        let (mut needs_last, has_events) = (false, self.has_events());
        for at in 0..self.batch() {
            let measured = self.norms.of(at);
            let Some(lane) = &mut self.lanes[at] else {
                continue;
            };
            let Phase::Attempts(attempt) = lane.phase else {
                continue;
            };
            lane.evaluations += evaluations;
            lane.phase = Phase::Ready;
            match lane.judge(control, &attempt, measured, has_events) {
                Ok(Verdict::Accepted) => {
                    lane.last = None;
                    let problem = self.pass.plan.problem;
                    let inside = match has_events {
                        // Where the step ends is still to be seen.
                        true => 0..0,
                        false => lane.passed(problem, control.direction, attempt.end),
                    };
                    let is_done = lane.pace.is_done(control);
                    if control.appended && (has_events || !inside.is_empty() || !is_done) {
                        lane.evaluations += 1;
                        needs_last = true;
                    }
                    accepted.push(Taken {
                        at,
                        attempt,
                        inside,
                        met: None,
                    });
                }
                Ok(Verdict::Rejected) => lane.last = Some((attempt, measured.r)),
                Err(failure) => {
                    lane.last = Some((attempt, measured.r));
                    self.stop(at, failure.reason(control))?;
                }
            }
        }
        if needs_last {
            self.evaluate_last();
        }
        if has_events {
            accepted = self.met(accepted)?;
        }
        for taken in &accepted {
            self.record(taken)?;
        }
        self.return_inside(&accepted);
        self.go_on(&accepted)
    }

    /// The stage f(t_{n+1}, y_{n+1}) that was appended to the method.
    fn evaluate_last(&mut self) {
        let last = self.stepper.count() - 1;
        self.calls += 1;
        self.stepper.stage(last, &self.y, &mut self.slot);
        self.stepper
            .evaluate(LaneSteps::Each(&self.steps), last, &mut self.slot);
    }

    /// The steps of these that are taken as they are, with the events in them.
    fn met(&mut self, accepted: Vec<Taken>) -> Result<Vec<Taken>> {
        let (problem, direction) = (self.pass.plan.problem, self.pass.control.direction);
        let mut taken = Vec::with_capacity(accepted.len());
        for step in accepted {
            let Taken { at, attempt, .. } = step;
            let Some(met) = self.meet(at, &attempt)? else {
                continue;
            };
            let Some(lane) = &mut self.lanes[at] else {
                continue;
            };
            let inside = match met.end().filter(|x| *x < 1.0) {
                Some(x) => lane.reached(problem, direction, attempt.t + x * attempt.h),
                None => lane.passed(problem, direction, attempt.end),
            };
            let met = Some(met);
            taken.push(Taken {
                inside,
                met,
                ..step
            });
        }
        Ok(taken)
    }

    /// Keeps and returns what is wanted of an accepted attempt.
    fn record(&mut self, taken: &Taken) -> Result<()> {
        let Taken {
            at,
            attempt,
            inside,
            met,
        } = taken;
        let at = *at;
        let problem = self.pass.plan.problem;
        take(&self.y, self.lanes.len(), at, &mut self.row);
        let y = &self.row;
        let Some(lane) = &mut self.lanes[at] else {
            return Ok(());
        };
        let before = lane.held(y.len());
        if lane.record.len() == 0 {
            lane.record.reserve(self.expected);
            lane.trajectory.reserve(self.expected);
        }
        if let Err(error) = lane.trajectory.keep(lane.record.len(), y) {
            return Err(self.refused(at, error));
        }
        if let Err(error) = lane.record.push(attempt.t, attempt.h, attempt.end) {
            return Err(self.refused(at, error));
        }
        for i in inside.clone() {
            let x = taken.fraction(problem.grid.points()[i]);
            lane.record.save(x, i, Some(i))?;
            lane.returned += 1;
        }
        let after = lane.held(y.len());
        if let Some([need, available]) = self.pass.growth.grows(before, after) {
            return Err(self.out_of_memory(at, StopReason::Memory { need, available }));
        }
        match met {
            Some(met) => {
                let y = self.row[..self.pass.plan.layout.dim()].to_vec();
                self.return_crossings(at, attempt, met, &y)
            }
            None => Ok(()),
        }
    }

    /// The same where memory was refused that the row had been told there is: other threads may have been told, too.
    fn refused(&self, at: usize, error: Error) -> Error {
        match refusal(error) {
            Ok([need, available]) => self.out_of_memory(at, StopReason::Memory { need, available }),
            Err(error) => error,
        }
    }

    /// The error of a row in whose step the memory ends, whatever is to become of rows that fail.
    fn out_of_memory(&self, at: usize, reason: StopReason) -> Error {
        let plan = self.pass.plan;
        let Some(lane) = &self.lanes[at] else {
            return Error::NothingKept;
        };
        let dim = plan.layout.dim() * plan.problem.outputs();
        let states = &self.states[(lane.row - self.rows.start) * dim..][..dim];
        lane.error(plan.problem, plan.layout, reason, None, states)
    }

    /// The state at a fraction x of a lane's step of length h.
    pub(super) fn interpolated(&self, at: usize, h: f64, x: f64, y: &[T]) -> Vec<T> {
        let mut state = y.to_vec();
        let (batch, size) = (self.batch(), self.stepper.size);
        for (i, b) in self.stepper.interpolant(x).into_iter().enumerate() {
            if b == 0.0 {
                continue;
            }
            let c = T::of(h * b);
            let k = &self.stepper.ks[i * size..][..size];
            let k = k.iter().skip(at).step_by(batch);
            for (y, k) in state.iter_mut().zip(k) {
                *y = y.plus_product(c, *k);
            }
        }
        state
    }

    /// Moves the lanes whose attempts were accepted.
    fn go_on(&mut self, accepted: &[Taken]) -> Result<()> {
        let (batch, size, control) = (self.batch(), self.stepper.size, self.pass.control);
        let mut mask = vec![false; batch];
        for taken in accepted {
            mask[taken.at] = true;
        }
        let last = (self.stepper.count() - 1) * size;
        let (k, rest) = self.stepper.ks.split_at_mut(size);
        let new = &rest[last - size..][..size];
        for (to, from) in [(&mut *self.y, &*self.after), (k, new)] {
            self.stepper.on.select(&mask, to, from);
        }
        for taken in accepted {
            let Taken { at, attempt, .. } = taken;
            let at = *at;
            let end = taken.met.as_ref().and_then(Met::end);
            let problem = self.pass.plan.problem;
            let Some(lane) = &mut self.lanes[at] else {
                continue;
            };
            let row = lane.row;
            let node = match end.is_some_and(|x| x < 1.0) {
                true => None,
                false => lane.node(problem, attempt.end)?,
            };
            lane.jumps = control.jumps_at(attempt);
            let is_done = end.is_some() || lane.pace.is_done(control);
            if lane.jumps {
                lane.record.break_here();
                if !is_done {
                    lane.phase = Phase::Start(Some(attempt.h.abs()));
                }
            }
            let limit = lane.pace.precision_limit(control).filter(|_| is_done);
            if let Some(output) = node {
                let place = self.place(row, output);
                take(&self.y, batch, at, &mut self.states[place]);
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
            let (row, place) = (lane.row, lane.row - self.rows.start);
            if self.has_events() && stopped.is_none() {
                let reached: Vec<_> = lane.record.numbers().collect();
                self.void(row, &reached);
            }
            self.expected = lane.record.len();
            self.solves[place] = Some(lane.finish(stopped));
        }
        self.refill(at);
        Ok(())
    }

    /// A lane's row cannot go on.
    pub(super) fn stop(&mut self, at: usize, reason: StopReason) -> Result<()> {
        self.stop_by(at, reason, None)
    }

    /// The same by an error of its own, where rows that stop are errors.
    pub(super) fn stop_by(
        &mut self,
        at: usize,
        reason: StopReason,
        error: Option<Error>,
    ) -> Result<()> {
        let (plan, control) = (self.pass.plan, self.pass.control);
        let Some(lane) = &self.lanes[at] else {
            return Ok(());
        };
        let dim = plan.layout.dim() * plan.problem.outputs();
        let states = (lane.row - self.rows.start) * dim..(lane.row + 1 - self.rows.start) * dim;
        if control.options.on_failure == OnFailure::Error {
            let row = lane.row;
            let worst = lane.worst(
                &self.norms,
                at,
                attempted(&self.stepper, [&*self.y, &*self.after], &self.measures),
            );
            let states = &self.states[states];
            let error = match (error, reason) {
                (Some(error), _) => error,
                (None, StopReason::NonFinite) if lane.record.len() == 0 && lane.last.is_none() => {
                    Error::NonFiniteVelocity {
                        step: 0,
                        stage: 0,
                        t: control.start,
                    }
                }
                (None, _) => lane.error(plan.problem, plan.layout, reason, worst, states),
            };
            // Those before it go on: one of them may stop too, and is the first.  What ends the whole pass, such as a
            // lack of memory, is before all of them.
            self.failure = Some(Failure {
                at: (row, 1),
                error,
            });
            self.rows.end = row;
            self.waiting.retain(|waiting| waiting.lane.row < row);
            for lane in &mut self.lanes {
                lane.take_if(|lane| lane.row >= row);
            }
            return Ok(());
        }
        let kept = match reason {
            // No step of such a row counts.
            StopReason::PrecisionLimited { .. } => usize::from(plan.problem.output == Output::All),
            _ => lane.returned,
        };
        let done = kept * plan.layout.dim();
        if let Some(lane) = &mut self.lanes[at] {
            lane.events.found.clear();
        }
        self.states[states][done..].fill(T::of(f64::NAN));
        self.complete(at, Some(reason))
    }
}

/// An attempt of all lanes, from tiles of y_n and y_{n+1} and what it is measured by.
fn attempted<'t, T: Element>(
    stepper: &'t Stepper<'_, T>,
    [y, next]: [&'t [T]; 2],
    [error, moved, distance]: &'t [Aligned<T>; 3],
) -> Attempted<'t, T> {
    Attempted {
        y,
        next,
        k: (&stepper.ks[..stepper.size]),
        error,
        apart: [moved, distance],
        lengths: stepper.lengths(),
    }
}
