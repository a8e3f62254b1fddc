//! The steps of a backward solve, from one stop to the next, and what they add to θ̄.

use candle_core::Tensor;

use super::augmented::{Augmented, Stage};
use super::measure::{Floor, Measure};
use super::quadrature::gauss;
use super::stages::{Evaluated, Stages};
use super::stops::cut;
use crate::accumulator::Accumulator;
use crate::adaptive::{Adaptive, Attempt, Control, Halt, Pace, Verdict};
use crate::error::{ContinuousDefect, Error, Result};
use crate::gradient::{Continuous, Kind};
use crate::ops;
use crate::schedule::{Output, Schedule, Step, Steps};
use crate::stats::{BackwardStats, Stats};
use crate::step::Scheme;
use crate::time::{coincide, Time, TimeGrid};

/// A backward solve under way.
pub(super) struct March<'a> {
    augmented: &'a Augmented<'a>,
    continuous: &'a Continuous,
    scheme: Scheme,
    /// Of adaptive steps.
    measure: Option<Measure<'a>>,
    jumps: Vec<f64>,
    t: f64,
    /// y and λ, or λ alone, in state precision.
    x: Vec<Tensor>,
    theta: Accumulator,
    /// t̄ as an integral, where it is part of the error.
    time: f64,
    /// The first stage of the next step, where it is known.
    first: Option<Evaluated>,
    /// The length of the next adaptive step.
    h: Option<f64>,
    /// Where the last step began.
    last_start: Option<f64>,
    counts: BackwardStats,
}

/// An attempt that was made: what it leads to, and its error with the noise floor and without.
struct Tried {
    x: Vec<Tensor>,
    stages: Stages,
    norms: [f64; 2],
}

impl<'a> March<'a> {
    /// From the last time, where nothing has come in yet; `largest` is the size of the cotangents.
    pub(super) fn new(
        augmented: &'a Augmented<'a>,
        continuous: &'a Continuous,
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
        jumps.extend(adaptive.iter().flat_map(|adaptive| &adaptive.jump_t));
        let measure = |adaptive: &&'a Adaptive| {
            Measure::new(augmented, continuous, adaptive, &roles, largest)
        };
        Ok(Self {
            measure: adaptive.as_ref().map(measure).transpose()?,
            augmented,
            continuous,
            scheme: Scheme::new(
                &continuous.method,
                dense,
                roles.clone(),
                problem.device().clone(),
            ),
            jumps,
            t: points[points.len() - 1],
            x: x.map(zeros).collect::<candle_core::Result<_>>()?,
            theta: Accumulator::new(augmented.theta, problem.state())?,
            time: 0.0,
            first: None,
            h: None,
            last_start: None,
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
        Ok(())
    }

    /// Solves back to a time.  Where λ is zero nothing is to be done.
    pub(super) fn to(&mut self, end: f64) -> Result<()> {
        let sizes = self.adjoint().iter().map(ops::magnitude);
        let size = sizes.sum::<Result<f64>>()?;
        let from = std::mem::replace(&mut self.t, end);
        if size == 0.0 {
            return Ok(());
        }
        match &self.continuous.steps {
            Steps::Adaptive(adaptive) => self.adaptive(adaptive, [from, end]),
            steps => self.fixed(steps, [from, end]),
        }
    }

    /// The step, evaluated on its own side of jumps.
    pub(super) fn between(&self, step: Step) -> Step {
        let jumps = |t: f64| self.jumps.iter().any(|jump| coincide(*jump, t));
        step.between_jumps([jumps(step.t), jumps(step.end)])
    }

    /// λ_0 and θ̄.
    pub(super) fn finish(self) -> Result<(Vec<Tensor>, Vec<Tensor>)> {
        let adj = self.adjoint().to_vec();
        let theta = self.theta.finish()?;
        for grad in &theta {
            if !ops::magnitude(grad)?.is_finite() {
                return Err(Error::NonFiniteParameterGradient);
            }
        }
        Ok((adj, theta))
    }

    pub(super) fn count(&mut self, stats: &mut Stats) {
        stats.recomputed += self.counts.evaluations;
        stats.backward = std::mem::take(&mut self.counts);
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
            &cut(steps, ends, points),
            Output::Final,
            &self.jumps,
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
    fn adaptive(&mut self, adaptive: &Adaptive, ends: [f64; 2]) -> Result<()> {
        let grid = TimeGrid::new(ends.to_vec())?;
        let control = Control::new(adaptive, &self.continuous.method, &grid, &self.jumps)?;
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
            let verdict = pace.judge(&control, &attempt, r, plain);
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
        Ok(())
    }

    fn step(&self, attempt: &Attempt) -> Step {
        let Attempt { t, h, end, .. } = *attempt;
        self.between(Step::free(self.counts.steps, t, h, end))
    }

    /// Evaluates the first stage of steps of about this length.
    fn start_anew(&mut self, control: &Control, t: f64, h: Option<f64>) -> Result<Floor> {
        let h = control.direction * h.unwrap_or_else(|| control.longest());
        let step = self.between(Step::free(self.counts.steps, t, h, t + h));
        let mut stages = Stages::default();
        self.evaluate(step, &mut stages, &[true])?;
        self.first = stages.first();
        self.floor()
    }

    fn floor(&self) -> Result<Floor> {
        match (&self.measure, &self.first) {
            (Some(measure), Some((k, _))) => measure.floor(&self.x, k),
            _ => Ok(None),
        }
    }

    /// The length of the first attempt.
    fn first_length(&mut self, control: &Control) -> Result<f64> {
        let (Some(measure), Some((k, stage))) = (&self.measure, &self.first) else {
            return Ok(control.longest());
        };
        let all = measure.reads_sums();
        let extended = |x: &[Tensor], sums: Option<&Stage>| match all {
            true => self.extended(x, sums),
            false => Ok(x.to_vec()),
        };
        let y = extended(&self.x, None)?;
        let first = extended(k, Some(stage))?;
        let probe = |h: f64| {
            let step = self.between(Step::free(0, control.start, h, control.start + h));
            let further = self.scheme.after_euler(self.augmented, step, &self.x, k)?;
            let stage = self.augmented.take_stages().pop();
            extended(&further, stage.as_ref())
        };
        let h = measure.first_length(control, &y, &first, probe)?;
        self.counts.evaluations += 1;
        Ok(h)
    }

    /// Velocities, or zeros of a state, with those of θ̄ and t̄ behind them.
    fn extended(&self, x: &[Tensor], stage: Option<&Stage>) -> Result<Vec<Tensor>> {
        let mut all = x.to_vec();
        let state = self.scheme.roles[0].state();
        for (i, p) in self.augmented.theta.iter().enumerate() {
            all.push(
                match stage.and_then(|s| Some((s.unscale, s.theta[i].as_ref()?))) {
                    Some((unscale, grad)) => ops::combine(&[(-unscale, grad)], 1.0, state)?,
                    None => Tensor::zeros(p.shape(), state.to, p.device())?,
                },
            );
        }
        if self.augmented.reads_time() {
            let t = stage.map_or(Ok(0.0), Stage::slope_of_time)?;
            all.push(self.number(t)?);
        }
        Ok(all)
    }

    /// All stages but one that was appended, what they lead to, and its error.
    fn attempt(&mut self, control: &Control, step: Step, floor: &Floor) -> Result<Tried> {
        let mut stages = Stages::after(self.first.as_ref());
        let count = self.scheme.tableau.stages() - usize::from(control.appended);
        self.evaluate(step, &mut stages, &vec![true; count])?;
        let x = self.scheme.update(step.h, &self.x, &stages.ks)?;
        let mut error = self
            .scheme
            .weighted(step.h, &control.estimate, &stages.ks)?;
        let mut ends = [self.x.clone(), x.clone()];
        let Some(measure) = &self.measure else {
            return Err(Error::NothingKept);
        };
        if measure.reads_sums() {
            let state = self.scheme.roles[0].state();
            let before = self.theta.so_far()?.to_vec();
            for (i, before) in before.into_iter().enumerate() {
                let change = |weights: &[f64]| stages.change(step.h, weights, i, &before, state);
                error.push(change(&control.estimate)?);
                let change = change(self.scheme.tableau.b())?;
                ends[1].push((&before + change)?);
                ends[0].push(before);
            }
            if self.augmented.reads_time() {
                error.push(self.number(stages.time_change(step.h, &control.estimate)?)?);
                let change = stages.time_change(step.h, self.scheme.tableau.b())?;
                ends[0].push(self.number(self.time)?);
                ends[1].push(self.number(self.time + change)?);
            }
        }
        let norms = measure.norms(&error, [&ends[0], &ends[1]], floor, step.h)?;
        Ok(Tried { x, stages, norms })
    }

    /// A step that was accepted: what it adds, and where it leads to.
    fn accept(&mut self, step: Step, mut tried: Tried) -> Result<()> {
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
    fn take(&mut self, step: Step, x: Vec<Tensor>, stages: &Stages) -> Result<()> {
        match self.continuous.kind {
            Kind::Quadrature => self.integrate(step, stages)?,
            _ => stages.add_to(&mut self.theta, step.h, self.scheme.tableau.b())?,
        }
        self.x = x;
        self.last_start = Some(step.t);
        self.augmented.passed(step.end);
        Ok(())
    }

    /// ∫ (∂f/∂θ)ᵀ λ dt over a step by a Gauss rule.
    fn integrate(&mut self, step: Step, stages: &Stages) -> Result<()> {
        for (x, w) in gauss(self.continuous.points) {
            let adj = self.scheme.interpolated((&step, x), &self.x, &stages.ks)?;
            let (state, device) = (self.scheme.roles[0].state, &self.scheme.device);
            let time = step.within(Time::new(step.at(x), state, device));
            let stage = self.augmented.at_point(&time, &adj)?;
            stage.add_to(&mut self.theta, -step.h * w * stage.unscale)?;
            self.counts.points += 1;
        }
        Ok(())
    }

    /// Evaluates those of the next stages that are wanted.
    fn evaluate(&mut self, step: Step, stages: &mut Stages, wanted: &[bool]) -> Result<()> {
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

    /// A number in state precision on the device.
    fn number(&self, x: f64) -> Result<Tensor> {
        let (state, device) = (self.scheme.roles[0].state, &self.scheme.device);
        Ok(Tensor::new(x, device)?.to_dtype(state)?)
    }

    fn stopped(&self, halt: Halt, control: &Control, pace: &Pace) -> Error {
        let (accepted, rejected) = (self.counts.steps, self.counts.rejected);
        let defect = ContinuousDefect::Stopped {
            reason: halt.reason(control),
            t: pace.t,
            accepted,
            rejected,
        };
        defect.into()
    }
}
