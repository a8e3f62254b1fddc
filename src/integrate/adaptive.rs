//! The forward loop of adaptive steps, with one step length for the whole batch.

use candle_core::Tensor;

use super::estimate::{Estimate, Measures, RoundedStages};
use super::kept::{Kept, Last};
use super::observe::{InStep, Observer};
use super::Forward;
use crate::adaptive::{Attempt, Control, Halt, Measured, Pace, Verdict};
use crate::crossing::{behind, behind_which, is_inner};
use crate::error::{Error, Result, StopReason};
use crate::field::Field;
use crate::ops;
use crate::problem::Problem;
use crate::schedule::{Output, Step};
use crate::stats::Stats;
use crate::step::Increments;

/// One pass from the start to the end.
pub(super) fn pass<'a>(
    problem: &'a Problem,
    control: &'a Control,
    field: &'a Field<'_>,
    y0: Vec<Tensor>,
    keep: &dyn Fn() -> bool,
    observer: &mut dyn Observer,
    stats: &mut Stats,
) -> Result<Forward> {
    let mut pass = AdaptivePass::begin(problem, control, field, y0, keep)?;
    pass.refines = observer.looks() && !problem.scheme.tableau.interpolates_well();
    observer.begin();
    let run = pass.run(keep, observer);
    stats.evaluations += pass.evaluations;
    pass.kept.count(&pass.pace, stats);
    run?;
    pass.kept.forward(None, stats)
}

/// A solve under way.
struct AdaptivePass<'a> {
    problem: &'a Problem,
    control: &'a Control,
    field: &'a Field<'a>,
    estimate: Estimate,
    pace: Pace,
    y: Vec<Tensor>,
    /// The first velocity of the next attempt.
    k: Vec<Tensor>,
    rounded: RoundedStages,
    /// Whether the field jumps at the start of the next attempt.
    jumps: bool,
    kept: Kept<'a>,
    evaluations: usize,
    /// The fraction of the last step at which the observer has ended the solve.
    ends_at: Option<f64>,
    /// Whether steps end behind what the observer finds, since the interpolant is less accurate.
    refines: bool,
}

/// An attempt that was made: its solution, its stages, and its error.
struct Tried {
    y: Vec<Tensor>,
    ks: Increments,
    error: Vec<Tensor>,
    measured: Measured,
}

/// A step as it is taken: what was tried, and where inside of it states are returned, with the user's time, if it is
/// one.
struct AcceptedStep {
    step: Step,
    tried: Tried,
    inside: Vec<(f64, Option<usize>)>,
}

impl<'a> AdaptivePass<'a> {
    fn begin(
        problem: &'a Problem,
        control: &'a Control,
        field: &'a Field<'a>,
        y: Vec<Tensor>,
        keep: &dyn Fn() -> bool,
    ) -> Result<Self> {
        let (y, roles) = (problem.scheme.begin(y)?, problem.scheme.roles.clone());
        let mut pass = Self {
            problem,
            control,
            field,
            kept: Kept::from((problem, control), (&y, roles), true, keep)?,
            estimate: Estimate::new(problem, control, field)?,
            pace: Pace::new(control, 0.0),
            k: vec![],
            rounded: vec![],
            jumps: control.starts_at_jump,
            evaluations: 0,
            ends_at: None,
            refines: false,
            y,
        };
        if pass.jumps {
            pass.kept.record.break_here();
        }
        let h = match control.options.first_step {
            Some(h) => {
                pass.start_anew(h)?;
                h
            }
            None => pass.first_length()?,
        };
        pass.pace = Pace::new(control, h);
        Ok(pass)
    }

    /// A step of length h from where the solve is.
    fn step(&self, h: f64, end: f64, jumps_at_end: bool) -> Step {
        let step = Step::free(self.kept.record.len(), self.pace.t, h, end);
        step.between_jumps([self.jumps, jumps_at_end])
    }

    /// Evaluates the first velocity, for attempts of about this length.
    fn start_anew(&mut self, h: f64) -> Result<()> {
        // No attempt goes on beyond what the field is told here.
        let h = self.control.direction * h.min(self.control.room(self.pace.t));
        let step = self.step(h, self.pace.t + h, false);
        let mut ks = vec![];
        self.problem
            .scheme
            .evaluate(self.field, step, &self.y, &mut ks, &[true], |_, _| Ok(()))?;
        self.evaluations += 1;
        self.k = ks.pop().flatten().unwrap_or_default();
        for k in &self.k {
            if !ops::magnitude(k)?.is_finite() {
                return Err(Error::NonFiniteVelocity {
                    step: step.index,
                    stage: 0,
                    t: step.t,
                });
            }
        }
        self.rounded = self.estimate.rounded(&self.y, &self.k)?;
        Ok(())
    }

    fn first_length(&mut self) -> Result<f64> {
        let control = self.control;
        self.start_anew((control.targets[0].t - control.start).abs())?;
        let probe = |h: f64| {
            let step = self.step(h, control.start + h, false);
            let scheme = &self.problem.scheme;
            scheme.after_euler(self.field, step, &self.y, &self.k)
        };
        let y = &self.y[..self.problem.scheme.roles.len()];
        let h = self.estimate.first_length(control, y, &self.k, probe)?;
        self.evaluations += 1;
        Ok(h)
    }

    fn run(&mut self, keep: &dyn Fn() -> bool, observer: &mut dyn Observer) -> Result<()> {
        let control = self.control;
        let mut last = None;
        while self.ends_at.is_none() && !self.pace.is_done(control) {
            let attempt = match self.pace.attempt(control) {
                Ok(attempt) => attempt,
                Err(failure) => return Err(self.failed(failure, last.as_ref())),
            };
            let step = self.step(attempt.h, attempt.end, control.jumps_at(&attempt));
            let tried = self.attempt(step)?;
            self.kept.settle(control, &self.y, keep)?;
            let measured = tried.measured;
            let verdict = self.pace.judge(control, &attempt, measured);
            let Measured {
                r,
                plain,
                stiffness,
            } = measured;
            tracing::debug!(
                t = attempt.t,
                h = attempt.h,
                r,
                plain,
                stiffness,
                ?verdict,
                "attempt"
            );
            match verdict {
                Ok(Verdict::Accepted) => {
                    last = None;
                    self.accept(step, &attempt, tried, observer)?;
                    if let Some(reason) = self.kept.outgrown(&self.y, observer.bytes())? {
                        return Err(self.stopped(reason, None));
                    }
                }
                Ok(Verdict::Rejected) => last = Some((attempt, tried)),
                Err(failure) => return Err(self.failed(failure, Some(&(attempt, tried)))),
            }
        }
        match self.pace.precision_limit(control) {
            Some(reason) => Err(self.stopped(reason, last.as_ref())),
            None => Ok(()),
        }
    }

    /// All stages but one that was appended, the solution, and its error.
    fn attempt(&mut self, step: Step) -> Result<Tried> {
        let scheme = &self.problem.scheme;
        let mut ks = vec![Some(self.k.clone())];
        let stages = scheme.tableau.stages() - usize::from(self.control.appended);
        let wanted = vec![true; stages];
        scheme.evaluate(self.field, step, &self.y, &mut ks, &wanted, |_, _| Ok(()))?;
        self.evaluations += stages - 1;
        let y = scheme.update(step.h, &self.y, &ks)?;
        let error = scheme.weighted(step.h, &self.control.estimate, &ks)?;
        let apart = match &self.control.stability {
            Some(stability) => Some([
                scheme.weighted(step.h, &stability.velocities, &ks)?,
                scheme.weighted(step.h, &stability.states, &ks)?,
            ]),
            None => None,
        };
        let measures = Measures {
            h: step.h,
            error: &error,
            y: [&self.y, &y],
            apart: apart
                .as_ref()
                .map(|apart| apart.each_ref().map(Vec::as_slice)),
        };
        let measured = self.estimate.measured(&measures, &self.rounded)?;
        Ok(Tried {
            y,
            ks,
            error,
            measured,
        })
    }

    fn accept(
        &mut self,
        step: Step,
        attempt: &Attempt,
        tried: Tried,
        observer: &mut dyn Observer,
    ) -> Result<()> {
        let (problem, control) = (self.problem, self.control);
        let is_done = self.pace.is_done(control);
        let mut taken = self.finished(step, tried, observer.looks() || !is_done)?;
        if observer.looks() {
            let behind = self.observed(&mut taken, observer)?;
            if let Some(x) = behind.filter(|x| is_inner(*x)) {
                taken = self.polished(taken, x, observer)?;
            }
        }
        let is_cut = taken.step.end != step.end;
        let step = taken.step;
        if is_cut {
            self.pace.cut(attempt, step.end);
        }
        let is_done = self.pace.is_done(control);
        self.kept.trajectory.offer(step.index, &self.y)?;
        self.kept.record.push(step.t, step.h, step.end)?;
        self.jumps = !is_cut && control.jumps_at(attempt);
        if self.jumps {
            self.kept.record.break_here();
        }
        for (x, given) in &taken.inside {
            self.kept.record.save(*x, self.kept.outputs.len(), *given)?;
            let y = problem
                .scheme
                .interpolated((&step, *x), &self.y, &taken.tried.ks)?;
            self.kept.returns(&y)?;
            self.kept.next += usize::from(given.is_some());
        }
        if self.ends_at.is_some_and(|x| x < 1.0) {
            return Ok(());
        }
        let passed = |t: &&f64| (step.end - **t) * control.direction > 0.0;
        let points = &problem.grid.points()[self.kept.next..];
        self.kept.next += points.iter().take_while(passed).count();
        let Tried { y, mut ks, .. } = taken.tried;
        self.y = y;
        self.kept.returns_node(step.end, &self.y)?;
        if is_done || self.ends_at.is_some() {
            return Ok(());
        }
        if self.jumps {
            return self.start_anew(attempt.h.abs());
        }
        self.k = ks.pop().flatten().unwrap_or_default();
        self.rounded = self.estimate.rounded(&self.y, &self.k)?;
        Ok(())
    }

    /// A step that was tried, with the outputs inside of it and, if these or others need it, its last stage.
    fn finished(&mut self, step: Step, mut tried: Tried, needed: bool) -> Result<AcceptedStep> {
        let points = &self.problem.grid.points()[self.kept.next..];
        let passed = |t: &&f64| (step.end - **t) * self.control.direction > 0.0;
        let met = points.iter().take_while(passed).enumerate();
        let inside: Vec<_> = match self.problem.output {
            Output::Final | Output::Steps => vec![],
            Output::All => met
                .map(|(i, t)| ((t - step.t) / step.h, Some(self.kept.next + i)))
                .collect(),
        };
        if self.control.appended && (needed || !inside.is_empty()) {
            let scheme = &self.problem.scheme;
            let all = vec![true; scheme.tableau.stages()];
            let ks = &mut tried.ks;
            let before = ks.len();
            scheme.evaluate(self.field, step, &self.y, ks, &all, |_, _| Ok(()))?;
            self.evaluations += all.len() - before;
        }
        Ok(AcceptedStep {
            step,
            tried,
            inside,
        })
    }

    /// Adds what the observer wants of a step; the place behind which the step is to end, if there is one.
    fn observed(
        &mut self,
        taken: &mut AcceptedStep,
        observer: &mut dyn Observer,
    ) -> Result<Option<f64>> {
        let within = InStep {
            scheme: &self.problem.scheme,
            step: &taken.step,
            y: &self.y[..self.problem.scheme.roles.len()],
            ks: &taken.tried.ks,
        };
        let others: Vec<f64> = taken.inside.iter().map(|(x, _)| *x).collect();
        let wanted = observer.accepted(&within, self.kept.outputs.len(), &others)?;
        let last = wanted.at.last().filter(|(_, ends)| *ends).map(|(x, _)| *x);
        self.ends_at = last;
        let (points, direction) = (self.problem.grid.points(), self.control.direction);
        // A time at which the solve ends is reached, however its fraction of the step is rounded.
        let is_reached = |x: f64, given: Option<usize>| {
            last.is_none_or(|last| {
                let beyond = |i: usize| (points[i] - within.time(last)) * direction > 0.0;
                x <= last || given.is_some_and(|i| !beyond(i))
            })
        };
        let inside = &mut taken.inside;
        inside.retain(|(x, given)| is_reached(*x, *given));
        inside.extend(wanted.at.iter().map(|(x, _)| (*x, None)));
        // At one time what the observer wants comes first, as it has counted.
        inside.sort_by(|a, b| {
            let is_given = [a, b].map(|(_, given)| given.is_some());
            a.0.total_cmp(&b.0).then(is_given[0].cmp(&is_given[1]))
        });
        Ok(behind_which(&wanted.at, self.refines))
    }

    /// The same step, but little longer than to a place that the observer has found.
    fn polished(
        &mut self,
        taken: AcceptedStep,
        x: f64,
        observer: &mut dyn Observer,
    ) -> Result<AcceptedStep> {
        let Step { t, h, .. } = taken.step;
        let end = behind(t, h, x);
        let shorter = Step {
            h: end - t,
            end,
            limits: [taken.step.limits[0], end],
            ..taken.step
        };
        let tried = self.attempt(shorter)?;
        let mut again = self.finished(shorter, tried, true)?;
        observer.retract();
        if self.observed(&mut again, observer)?.is_some() {
            return Ok(again);
        }
        // It has lost the end; the longer step has not.
        observer.retract();
        let mut taken = self.finished(taken.step, taken.tried, true)?;
        self.observed(&mut taken, observer)?;
        Ok(taken)
    }

    fn failed(&self, failure: Halt, last: Option<&(Attempt, Tried)>) -> Error {
        self.stopped(failure.reason(self.control), last)
    }

    fn stopped(&self, reason: StopReason, last: Option<&(Attempt, Tried)>) -> Error {
        let last = last.map(|(attempt, tried)| {
            let ends = [self.y.as_slice(), &tried.y];
            Last {
                h: attempt.h,
                error: tried.measured.r,
                worst: self.estimate.worst(&tried.error, ends).ok().flatten(),
            }
        });
        self.kept
            .stopped(reason, &self.pace, last.unwrap_or_default())
    }
}
