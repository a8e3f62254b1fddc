//! The steps of a backward solve, from one stop to the next, and what they add to θ̄.

mod attempt;

use candle_core::Tensor;

use super::augmented::Augmented;
use super::drift;
use super::instants::Instants;
use super::measure::Measure;
use super::quadrature::gauss;
use super::stages::{Evaluated, Stages};
use super::stops::cut;
use crate::accumulator::Accumulator;
use crate::adaptive::{Adaptive, Attempt, Control, Halt, Measured, Pace, Verdict};
use crate::error::{ContinuousDefect, Error, Result};
use crate::gradient::{Continuous, Kind};
use crate::ops;
use crate::schedule::{Output, Schedule, Step, Steps};
use crate::stats::{BackwardStats, Stats, StopReason};
use crate::step::Scheme;
use crate::time::{Time, TimeGrid};
use attempt::Tried;

/// A backward solve under way.
pub(super) struct March<'m, 'a> {
    augmented: &'m Augmented<'a>,
    continuous: &'m Continuous,
    scheme: Scheme,
    /// Of adaptive steps: how, but for the times at which they must end, and how their errors are measured.
    adaptive: Option<(Adaptive, Measure<'m>)>,
    /// Times at which the field jumps, and at which a step must end or, if they are given, ends.
    jumps: Instants,
    ends: Instants,
    t: f64,
    /// y and λ, or λ alone, in state precision.
    x: Vec<Tensor>,
    theta: Accumulator,
    /// t̄ as an integral, where it is part of the error.
    time: f64,
    /// The first stage of the next step, where it is known.
    first: Option<Evaluated<'a>>,
    /// The length of the next adaptive step.
    h: Option<f64>,
    /// Where the last step began.
    last_start: Option<f64>,
    /// Whether steps led here from where y last started anew.
    stepped: bool,
    counts: BackwardStats,
}

impl<'m, 'a> March<'m, 'a> {
    /// From the last time, where nothing has come in yet; `largest` is the size of the cotangents.
    pub(super) fn new(
        augmented: &'m Augmented<'a>,
        continuous: &'m Continuous,
        largest: f64,
    ) -> Result<Self> {
        let problem = augmented.problem;
        let roles = augmented.roles();
        let adaptive = match &continuous.steps {
            // One time has no step.
            Steps::Adaptive(adaptive) if problem.grid.points().len() > 1 => Some(adaptive),
            _ => None,
        };
        let dense = adaptive.is_some() || continuous.kind == Kind::Quadrature;
        let zeros = |shape| Tensor::zeros(shape, problem.state(), problem.device());
        let x = problem.packing.shapes().iter().cycle().take(roles.len());
        let points = problem.grid.points();
        let mut jumps = augmented.jumps();
        jumps.extend(&continuous.jumps);
        jumps.extend(adaptive.iter().flat_map(|adaptive| &adaptive.jump_t));
        let ends = match &continuous.steps {
            Steps::Adaptive(adaptive) => adaptive.step_t.clone(),
            Steps::At(times) => times.clone(),
            _ => vec![],
        };
        let measured = |adaptive: &Adaptive| -> Result<_> {
            let measure = Measure::new(augmented, continuous, adaptive, &roles, largest)?;
            let adaptive = Adaptive {
                step_t: vec![],
                jump_t: vec![],
                ..adaptive.clone()
            };
            Ok((adaptive, measure))
        };
        Ok(Self {
            adaptive: adaptive.map(measured).transpose()?,
            augmented,
            continuous,
            scheme: Scheme::new(
                &continuous.method,
                dense,
                roles.clone(),
                problem.device().clone(),
            ),
            jumps: Instants::new(jumps),
            ends: Instants::new(ends),
            t: points[points.len() - 1],
            x: x.map(zeros).collect::<candle_core::Result<_>>()?,
            theta: Accumulator::new(augmented.theta, problem.state())?,
            time: 0.0,
            first: None,
            h: None,
            last_start: None,
            stepped: false,
            counts: BackwardStats::default(),
        })
    }

    pub(super) fn continuous(&self) -> &Continuous {
        self.continuous
    }

    /// λ.
    pub(super) fn adjoint(&self) -> &[Tensor] {
        let leaves = self.augmented.problem.packing.shapes().len();
        &self.x[self.x.len() - leaves..]
    }

    /// Steps so far.
    pub(super) fn steps(&self) -> usize {
        self.counts.steps
    }

    /// Where the last step began.
    pub(super) fn last_start(&self) -> Option<f64> {
        self.last_start
    }

    /// The solve is at an output: y starts anew from the kept state, and its cotangent is added to λ.
    pub(super) fn meet(&mut self, y: Vec<Tensor>, given: &[Tensor]) -> Result<()> {
        let state = self.scheme.roles[0].state();
        let sum = |(adj, given): (&Tensor, &Tensor)| {
            ops::combine(&[(1.0, adj), (1.0, given)], 1.0, state)
        };
        let adj = self.adjoint().iter().zip(given).map(sum);
        let adj = adj.collect::<Result<Vec<_>>>()?;
        self.x = match self.augmented.carries_y() {
            true => y.into_iter().chain(adj).collect(),
            false => adj,
        };
        self.first = None;
        self.stepped = false;
        Ok(())
    }

    /// Looks at how far the y that was solved back to here is from the kept one.
    pub(super) fn compare(&mut self, kept: &[Tensor]) -> Result<()> {
        if self.augmented.carries_y() && self.stepped {
            let drift = drift(&self.x, kept)?;
            self.counts.drift = self.counts.drift.max(drift);
        }
        Ok(())
    }

    /// Solves back to a time.  Where λ is zero nothing is to be done.
    pub(super) fn to(&mut self, end: f64) -> Result<()> {
        let sizes = self.adjoint().iter().map(ops::magnitude);
        let size = sizes.sum::<Result<f64>>()?;
        let from = std::mem::replace(&mut self.t, end);
        self.stepped = size != 0.0;
        if !self.stepped {
            return Ok(());
        }
        self.augmented.begin_at(from);
        match &self.continuous.steps {
            Steps::Adaptive(_) => self.adaptive([from, end]),
            steps => self.fixed(steps, [from, end]),
        }
    }

    /// The step, evaluated on its own side of jumps.
    pub(super) fn between(&self, step: Step) -> Step {
        step.between_jumps([step.t, step.end].map(|t| self.jumps.has(t)))
    }

    /// The first jump on the way from one time to another, or this other one.
    pub(super) fn until_jump(&self, t: f64, towards: f64) -> f64 {
        self.jumps.until(t, towards)
    }

    /// λ_0 and θ̄.
    pub(super) fn finish(self) -> Result<(Vec<Tensor>, Vec<Tensor>)> {
        self.check_precision()?;
        let adj = self.adjoint().to_vec();
        let theta = self.theta.finish()?;
        for grad in &theta {
            if !ops::magnitude(grad)?.is_finite() {
                return Err(Error::NonFiniteParameterGradient);
            }
        }
        Ok((adj, theta))
    }

    /// That more than a tenth of the steps were limited by the compute precision, where this is to be an error.
    fn check_precision(&self) -> Result<()> {
        let Some((adaptive, _)) = &self.adaptive else {
            return Ok(());
        };
        let counts = &self.counts;
        let (limited, factor) = (counts.limited, counts.tolerance_factor);
        match adaptive.limited_is_error && 10 * limited > counts.steps {
            true => {
                let reason = StopReason::PrecisionLimited { limited, factor };
                Err(self.stopped_by(reason, self.t))
            }
            false => Ok(()),
        }
    }

    pub(super) fn count(&self, stats: &mut Stats) {
        stats.recomputed += self.counts.evaluations;
        stats.backward = self.counts.clone();
    }

    fn note(&mut self, step: &Step, accepted: bool) {
        let keeps = self.augmented.problem.recorder.traces();
        self.counts.note([step.t, step.end], accepted, keeps);
    }

    /// Fixed steps.
    fn fixed(&mut self, steps: &Steps, ends: [f64; 2]) -> Result<()> {
        let points = self.augmented.problem.grid.points();
        let schedule = Schedule::new(
            &TimeGrid::new(ends.to_vec())?,
            &cut(steps, ends, points, &self.ends),
            Output::Final,
            self.jumps.within(ends),
        )?;
        for n in 0..schedule.len() {
            let step = Step {
                dense: self.continuous.kind == Kind::Quadrature,
                ..self.between(schedule.step(n))
            };
            let mut stages = Stages::default();
            let wanted = self.scheme.active(&step).to_vec();
            self.evaluate(step, &mut stages, &wanted)?;
            let x = self.scheme.update(step.h, &self.x, &stages.ks)?;
            self.note(&step, true);
            self.take(step, x, &stages)?;
            for y in &self.x {
                if !ops::magnitude(y)?.is_finite() {
                    let (step, t) = (step.index, step.end);
                    return Err(Error::NonFiniteGradient { step, t });
                }
            }
        }
        Ok(())
    }

    /// Adaptive steps.
    fn adaptive(&mut self, ends: [f64; 2]) -> Result<()> {
        let Some((adaptive, _)) = &self.adaptive else {
            return Err(Error::NothingKept);
        };
        let adaptive = &Adaptive {
            step_t: self.ends.within(ends).to_vec(),
            ..adaptive.clone()
        };
        let grid = TimeGrid::new(ends.to_vec())?;
        let jumps = self.jumps.within(ends);
        let control = Control::new(adaptive, &self.continuous.method, &grid, jumps)?;
        let mut floor = self.start_anew(&control, ends[0], self.h)?;
        let h = match self.h.or(adaptive.first_step) {
            Some(h) => h,
            None => self.first_length(&control)?,
        };
        let mut pace = Pace::new(&control, h);
        pace.accepted = self.counts.steps;
        pace.rejected = self.counts.rejected;
        while !pace.is_done(&control) {
            let attempt = pace.attempt(&control);
            let attempt = attempt.map_err(|halt| self.stopped(halt, &control, &pace))?;
            let step = self.step(&attempt);
            let tried = self.attempt(&control, step, &floor)?;
            let [r, plain] = tried.norms;
            let measured = Measured {
                r,
                plain,
                stiffness: None,
            };
            let verdict = pace.judge(&control, &attempt, measured);
            tracing::debug!(
                t = attempt.t,
                h = attempt.h,
                r,
                ?verdict,
                "backward attempt"
            );
            let verdict = verdict.map_err(|halt| self.stopped(halt, &control, &pace))?;
            self.note(&step, verdict == Verdict::Accepted);
            if verdict == Verdict::Rejected {
                continue;
            }
            self.accept(step, tried)?;
            if !pace.is_done(&control) {
                floor = match self.first.is_some() && !control.jumps_at(&attempt) {
                    true => self.floor()?,
                    false => self.start_anew(&control, step.end, Some(pace.h))?,
                };
            }
        }
        self.h = Some(pace.h);
        self.counts.forced += pace.forced;
        self.counts.limited += pace.limited;
        self.counts.tolerance_factor = self.counts.tolerance_factor.max(pace.factor);
        Ok(())
    }

    fn step(&self, attempt: &Attempt) -> Step {
        let Attempt { t, h, end, .. } = *attempt;
        self.between(Step::free(self.counts.steps, t, h, end))
    }

    /// A step that was accepted: what it adds, and where it leads to.
    fn accept(&mut self, step: Step, mut tried: Tried<'a>) -> Result<()> {
        if self.continuous.kind == Kind::Quadrature {
            // The interpolant may read a stage that the attempt could do without.
            let all = vec![true; self.scheme.tableau.stages()];
            self.evaluate(step, &mut tried.stages, &all)?;
        }
        let b = self.scheme.tableau.b();
        self.time += tried.stages.time_change(step.h, b)?;
        self.take(step, tried.x, &tried.stages)?;
        let is_whole = tried.stages.ks.len() == self.scheme.tableau.stages();
        self.first = match is_whole {
            true => tried.stages.last(),
            false => None,
        };
        Ok(())
    }

    /// Adds to θ̄ what the stages of a step give, and goes to its end.
    fn take(&mut self, step: Step, x: Vec<Tensor>, stages: &Stages<'a>) -> Result<()> {
        let b = self.scheme.tableau.b();
        match self.continuous.kind {
            Kind::Quadrature => self.integrate(step, stages)?,
            _ => stages.add_to(&mut self.theta, self.augmented, step.h, b)?,
        }
        self.x = x;
        self.last_start = Some(step.t);
        self.augmented.passed(step.end);
        Ok(())
    }

    /// ∫ (∂f/∂θ)ᵀ λ dt over a step by a Gauss rule.
    fn integrate(&mut self, step: Step, stages: &Stages<'a>) -> Result<()> {
        for (x, w) in gauss(self.continuous.points) {
            let adj = self.scheme.interpolated((&step, x), &self.x, &stages.ks)?;
            let (state, device) = (self.scheme.roles[0].state, &self.scheme.device);
            let time = step.within(Time::new(step.at(x), state, device));
            let stage = self.augmented.at_point(&time, &adj)?;
            let weight = -step.h * w * stage.unscale;
            stage.add_to(&mut self.theta, self.augmented, weight)?;
            self.counts.points += 1;
        }
        Ok(())
    }

    /// Evaluates those of the next stages that are wanted.
    fn evaluate(&mut self, step: Step, stages: &mut Stages<'a>, wanted: &[bool]) -> Result<()> {
        let Stages { ks, parts } = stages;
        let before = ks.len();
        let see = |_: usize, _: &[Tensor]| Ok(());
        self.scheme
            .evaluate(self.augmented, step, &self.x, ks, wanted, see)?;
        let mut found = self.augmented.take_stages().into_iter();
        for k in &ks[before.min(ks.len())..] {
            parts.push(k.as_ref().and_then(|_| found.next()));
            self.counts.evaluations += usize::from(k.is_some());
        }
        Ok(())
    }

    /// Numbers that are not finite are those of gradients, whatever takes the steps.
    fn stopped(&self, halt: Halt, control: &Control, pace: &Pace) -> Error {
        match halt {
            Halt::NonFinite => Error::NonFiniteGradient {
                step: self.counts.steps,
                t: pace.t,
            },
            halt => self.stopped_by(halt.reason(control), pace.t),
        }
    }

    fn stopped_by(&self, reason: StopReason, t: f64) -> Error {
        let (accepted, rejected) = (self.counts.steps, self.counts.rejected);
        let defect = ContinuousDefect::Stopped {
            reason,
            t,
            accepted,
            rejected,
        };
        defect.into()
    }
}
