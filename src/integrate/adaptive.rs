//! The forward loop of adaptive steps, one length for the whole batch.

use std::sync::Arc;

use candle_core::Tensor;

use super::estimate::{Estimate, Floor};
use super::Forward;
use crate::adaptive::{Attempt, Control, Halt, Pace, Verdict};
use crate::error::{Error, Result, StopReason, Stopped};
use crate::field::Field;
use crate::ops;
use crate::problem::Problem;
use crate::schedule::{Node, Output, Recorded, Schedule, Step};
use crate::state::Packing;
use crate::stats::Stats;
use crate::step::Increments;
use crate::trajectory::{Checkpoint, Trajectory};

/// One pass from the start to the end.
pub(super) fn pass(
    problem: &Problem,
    control: &Control,
    field: &Field<'_>,
    y0: Vec<Tensor>,
    keep: &dyn Fn() -> bool,
    stats: &mut Stats,
) -> Result<Forward> {
    for (leaf, y) in y0.iter().enumerate() {
        if !ops::magnitude(y)?.is_finite() {
            return Err(Error::NonFiniteState { leaf });
        }
    }
    let mut pass = Pass::begin(problem, control, field, y0, keep())?;
    let run = pass.run(keep);
    stats.evaluations += pass.evaluations;
    pass.pace.count(stats);
    stats.step_times.extend(pass.record.times());
    run?;
    pass.trajectory.record(stats);
    let packed = Tensor::stack(&pass.outputs, 0)?;
    let schedule = Arc::new(Schedule::Recorded(pass.record));
    Ok(Forward::by_steps(packed, pass.trajectory, schedule))
}

/// A solve under way.
struct Pass<'a> {
    problem: &'a Problem,
    control: &'a Control,
    field: &'a Field<'a>,
    estimate: Estimate,
    pace: Pace,
    y: Vec<Tensor>,
    /// The first velocity of the next attempt.
    k: Vec<Tensor>,
    floor: Floor,
    /// Whether the field jumps at the start of the next attempt.
    jumps: bool,
    record: Recorded,
    trajectory: Trajectory,
    /// Whether it is known that the trajectory is wanted, or that it is not.
    known: bool,
    outputs: Vec<Tensor>,
    /// The user's time that is met next.
    next: usize,
    evaluations: usize,
}

/// An attempt that was made: its solution, its stages, and its error.
struct Tried {
    y: Vec<Tensor>,
    ks: Increments,
    error: Vec<Tensor>,
    /// Relative to the tolerance, with the noise floor and without.
    norms: [f64; 2],
}

impl<'a> Pass<'a> {
    fn begin(
        problem: &'a Problem,
        control: &'a Control,
        field: &'a Field<'a>,
        y: Vec<Tensor>,
        known: bool,
    ) -> Result<Self> {
        let checkpoint = match known {
            true => problem.checkpoint,
            false => Checkpoint::Nothing,
        };
        let mut pass = Self {
            problem,
            control,
            field,
            estimate: Estimate::new(problem, control)?,
            pace: Pace::new(control, 0.0),
            k: vec![],
            floor: None,
            jumps: false,
            record: Recorded::from(control.start, true),
            trajectory: Trajectory::online(checkpoint, problem.scheme.roles.clone(), &y)?,
            known,
            outputs: vec![],
            next: 0,
            evaluations: 0,
            y,
        };
        pass.returns_node(control.start)?;
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

    /// Marks the node at t, where the solve is, if it is one of the user's times; returns the state where it is
    /// wanted.
    fn returns_node(&mut self, t: f64) -> Result<()> {
        let points = self.problem.grid.points();
        if points.get(self.next) != Some(&t) {
            return Ok(());
        }
        let number = match self.problem.output {
            Output::Final => (self.next + 1 == points.len()).then_some(0),
            _ => Some(self.next),
        };
        self.record.mark(self.next, number)?;
        self.next += 1;
        match number {
            Some(_) => self.returns(&self.y.clone()),
            None => Ok(()),
        }
    }

    fn returns(&mut self, y: &[Tensor]) -> Result<()> {
        self.outputs.push(Packing::pack(y, self.problem.state())?);
        Ok(())
    }

    /// A step of length h from where the solve is.
    fn step(&self, h: f64, end: f64, jumps_at_end: bool) -> Step {
        let t = self.pace.t;
        let step = Step {
            index: self.record.len(),
            t,
            h,
            end,
            limits: [t, end],
            nodes: [Node::Constant; 2],
            dense: false,
        };
        step.between_jumps([self.jumps, jumps_at_end])
    }

    /// Evaluates the first velocity, for attempts of about this length.
    fn start_anew(&mut self, h: f64) -> Result<()> {
        let h = self.control.direction * h;
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
        self.floor = self.estimate.floor(&self.y, &self.k)?;
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
        let h = self
            .estimate
            .first_length(control, &self.y, &self.k, probe)?;
        self.evaluations += 1;
        Ok(h)
    }

    fn run(&mut self, keep: &dyn Fn() -> bool) -> Result<()> {
        let control = self.control;
        let mut last = None;
        while !self.pace.is_done(control) {
            let attempt = match self.pace.attempt(control) {
                Ok(attempt) => attempt,
                Err(failure) => return Err(self.failed(failure, last.as_ref())),
            };
            let step = self.step(attempt.h, attempt.end, control.jumps_at(&attempt));
            let tried = self.attempt(step)?;
            if !self.known && keep() {
                let roles = self.problem.scheme.roles.clone();
                self.trajectory = Trajectory::online(self.problem.checkpoint, roles, &self.y)?;
            }
            self.known = true;
            let [r, plain] = tried.norms;
            let verdict = self.pace.judge(control, &attempt, r, plain);
            tracing::debug!(t = attempt.t, h = attempt.h, r, plain, ?verdict, "attempt");
            match verdict {
                Ok(Verdict::Accepted) => self.accept(step, &attempt, tried)?,
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
        let ends = [self.y.as_slice(), &y];
        let norms = self.estimate.norms(&error, ends, &self.floor, step.h)?;
        Ok(Tried {
            y,
            ks,
            error,
            norms,
        })
    }

    fn accept(&mut self, step: Step, attempt: &Attempt, tried: Tried) -> Result<()> {
        let (problem, control) = (self.problem, self.control);
        let (scheme, points) = (&problem.scheme, problem.grid.points());
        let Tried { y, mut ks, .. } = tried;
        self.trajectory.offer(step.index, &self.y)?;
        self.record.push(attempt.t, attempt.h, attempt.end)?;
        let is_done = self.pace.is_done(control);
        let passed = |t: f64| (attempt.end - t) * control.direction > 0.0;
        let from = self.next;
        self.next += points[from..].iter().take_while(|&&t| passed(t)).count();
        let inside = match problem.output {
            Output::Final => from..from,
            _ => from..self.next,
        };
        if control.appended && (!inside.is_empty() || !is_done) {
            let all = vec![true; scheme.tableau.stages()];
            scheme.evaluate(self.field, step, &self.y, &mut ks, &all, |_, _| Ok(()))?;
            self.evaluations += 1;
        }
        for i in inside {
            let x = (points[i] - attempt.t) / attempt.h;
            self.record.save(x, i)?;
            let y = scheme.interpolated((&step, x), &self.y, &ks)?;
            self.returns(&y)?;
        }
        self.y = y;
        self.returns_node(attempt.end)?;
        self.jumps = control.jumps_at(attempt);
        if is_done {
            return Ok(());
        }
        if self.jumps {
            self.record.break_here();
            return self.start_anew(attempt.h.abs());
        }
        self.k = ks.pop().flatten().unwrap_or_default();
        self.floor = self.estimate.floor(&self.y, &self.k)?;
        Ok(())
    }

    fn failed(&self, failure: Halt, last: Option<&(Attempt, Tried)>) -> Error {
        let max_steps = self.control.options.max_steps;
        let reason = match failure {
            Halt::Attempts => StopReason::Attempts { max_steps },
            Halt::Underflow => StopReason::Underflow,
            Halt::NonFinite => StopReason::NonFinite,
        };
        self.stopped(reason, last)
    }

    fn stopped(&self, reason: StopReason, last: Option<&(Attempt, Tried)>) -> Error {
        let worst = last.and_then(|(_, tried)| {
            let ends = [self.y.as_slice(), &tried.y];
            self.estimate.worst(&tried.error, ends).ok().flatten()
        });
        let computed = Tensor::stack(&self.outputs, 0).map_err(Error::from);
        let states = computed.and_then(|states| self.problem.packing.unpack(&states));
        Error::Stopped(Box::new(Stopped {
            reason,
            t: self.pace.t,
            h: last.map_or(0.0, |(attempt, _)| attempt.h),
            error: last.map_or(0.0, |(_, tried)| tried.norms[0]),
            worst,
            accepted: self.pace.accepted,
            rejected: self.pace.rejected,
            outputs: self.outputs.len(),
            states: states.unwrap_or_default(),
        }))
    }
}
