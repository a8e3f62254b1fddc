//! The forward loop of adaptive steps that are driven by noise, with one step length for the whole batch.
//!
//! The noise is a path that is a function of time: an attempt that is rejected and tried again is driven by the same path,
//! so that rejections do not change the law of what the solution is driven by.

use std::sync::Arc;

use candle_core::Tensor;

use super::estimate::{Estimate, Measures, RoundedStages};
use super::kept::{Kept, Last};
use super::Forward;
use crate::adaptive::{Attempt, Control, Measured, Pace, Rounding, Verdict};
use crate::driven::{Attempted, Driven, Evaluated, NoiseType, Part};
use crate::error::{Error, Result, SdeDefect, StopReason};
use crate::field::Field;
use crate::ops;
use crate::ops::ratio::row_rms;
use crate::problem::Problem;
use crate::schedule::Step;
use crate::stats::Stats;
use crate::time::coincide;

/// The first attempt is the interval divided by this number, unless the user says otherwise, a jump or the longest step is
/// shorter, or the noise does not resolve it.
const FIRST: f64 = 100.0;

/// One pass from the start to the end.
pub(super) fn pass(
    (problem, control): (&Problem, &Control),
    driven: &Arc<Driven>,
    field: &Field<'_>,
    y0: Vec<Tensor>,
    keep: &dyn Fn() -> bool,
    stats: &mut Stats,
) -> Result<Forward> {
    let y = driven.begin(y0);
    let of = (problem, control);
    let finest = driven.drive.noise.finest(driven.span);
    let points = problem.grid.points();
    if let Some(w) = points.windows(2).find(|w| coincide(w[0], w[1])) {
        let (t, h) = (w[0], w[1] - w[0]);
        return Err(Error::Sde(SdeDefect::TreeTooCoarse { t, h, finest }));
    }
    let [start, end] = driven.span;
    let hundredth = (end - start) / FIRST;
    let first = hundredth.min(control.longest()).max(finest);
    let mut pass = DrivenPass {
        kept: Kept::from(of, (&y, driven.carried_roles()), false, keep)?,
        estimate: Estimate::new(problem, control, field)?,
        pace: Pace::new(control, control.options.first_step.unwrap_or(first)),
        control,
        driven,
        field,
        y,
        start: vec![],
        rounding: vec![],
        jumps: control.starts_at_jump,
        evaluations: 0,
    };
    if pass.jumps {
        pass.kept.record.break_here();
    }
    let run = pass.run(keep);
    stats.evaluations += pass.evaluations;
    pass.kept.count(&pass.pace, stats);
    run?;
    pass.kept.forward(Some(Arc::clone(driven)), stats)
}

/// A solve under way.
struct DrivenPass<'a> {
    control: &'a Control,
    driven: &'a Driven,
    field: &'a Field<'a>,
    kept: Kept<'a>,
    estimate: Estimate,
    pace: Pace,
    /// Everything that a step carries.
    y: Vec<Tensor>,
    /// The evaluations that the next attempt begins with; empty before the first from y.
    start: Vec<Evaluated<()>>,
    /// Of attempts from y, by tensor; without a noise floor, nothing.
    rounding: Vec<RoundingTerms>,
    /// Whether the field jumps at the start of the next attempt.
    jumps: bool,
    evaluations: usize,
}

/// An upper bound of what rounding makes of a stage of one tensor, by row: α + h β + √h γ.
struct RoundingTerms {
    alpha: Tensor,
    beta: Tensor,
    /// Where the tensor has noise.
    gamma: Option<Tensor>,
}

/// `(rows, …)`: the first dimension of a state that is driven by noise is that of rows, also of a vector.
fn rows_of(x: &Tensor) -> Result<Tensor> {
    Ok(match x.rank() {
        1 => x.unsqueeze(1)?,
        _ => x.clone(),
    })
}

/// The error of an attempt, and the state at both its ends, by row.
fn by_row(error: &[Tensor], [y, next]: [&[Tensor]; 2]) -> Result<[Vec<Tensor>; 3]> {
    let all = |x: &[Tensor]| x.iter().map(rows_of).collect::<Result<_>>();
    Ok([all(error)?, all(y)?, all(next)?])
}

impl DrivenPass<'_> {
    fn run(&mut self, keep: &dyn Fn() -> bool) -> Result<()> {
        let control = self.control;
        let mut last: Option<(Attempt, Attempted, f64)> = None;
        while !self.pace.is_done(control) {
            let attempt = match self.pace.attempt(control) {
                Ok(attempt) => attempt,
                Err(halt) => return Err(self.stopped(halt.reason(control), last)),
            };
            let step = Step::free(self.kept.record.len(), attempt.t, attempt.h, attempt.end)
                .between_jumps([self.jumps, control.jumps_at(&attempt)]);
            if self.start.is_empty() {
                self.begin(step)?;
            }
            let tried = self.attempt(step)?;
            self.kept.settle(control, &self.y, keep)?;
            let leaves = self.driven.leaves();
            let ends = [&self.y[..leaves], &tried.next[..leaves]];
            let [error, y, next] = by_row(&tried.error, ends)?;
            let measures = Measures {
                h: step.h,
                error: &error,
                y: [&y, &next],
                apart: None,
            };
            let measured = self.estimate.measured(&measures, &self.rounded(step.h)?)?;
            let verdict = self.pace.judge(control, &attempt, measured);
            let Measured { r, plain, .. } = measured;
            tracing::debug!(t = attempt.t, h = attempt.h, r, plain, ?verdict, "attempt");
            match verdict {
                Ok(Verdict::Accepted) => {
                    last = None;
                    self.accept(step, &attempt, tried)?;
                    if let Some(reason) = self.kept.outgrown(&self.y, 0)? {
                        return Err(self.stopped(reason, None));
                    }
                }
                Ok(Verdict::Rejected) => last = Some((attempt, tried, r)),
                Err(halt) => {
                    let last = Some((attempt, tried, r));
                    return Err(self.stopped(halt.reason(control), last));
                }
            }
        }
        match self.pace.precision_limit(control) {
            Some(reason) => Err(self.stopped(reason, last)),
            None => Ok(()),
        }
    }

    /// The evaluations at the start of attempts from here.
    fn begin(&mut self, step: Step) -> Result<()> {
        self.start = self.driven.start(self.field, step, &self.y)?;
        self.evaluations += self.start.len();
        for (stage, evaluated) in self.start.iter().enumerate() {
            for value in &evaluated.value {
                if !ops::magnitude(value)?.is_finite() {
                    return Err(Error::NonFiniteVelocity {
                        step: step.index,
                        stage,
                        t: step.t,
                    });
                }
            }
        }
        if step.index == 0 {
            let last = self.last(step);
            let (field, y, start) = (self.field, &self.y, &self.start);
            self.evaluations += self.driven.check_commuting(field, [step, last], y, start)?;
        }
        self.rounding = self.rounding_terms()?;
        Ok(())
    }

    /// A step of the length of the first at the end of the solve, or one from the last jump if that is shorter.
    fn last(&self, first: Step) -> Step {
        let Some((end, before)) = self.control.targets.split_last() else {
            return first;
        };
        let jump = before.iter().rev().find(|target| target.jumps);
        let start = end.t - first.h;
        let (start, jumps) = match jump {
            Some(jump) if jump.t >= start => (jump.t, true),
            _ => (start, false),
        };
        Step::free(first.index, start, end.t - start, end.t).between_jumps([jumps, end.jumps])
    }

    fn attempt(&mut self, step: Step) -> Result<Attempted> {
        let table = self.driven.table();
        let embedded = table.embedded.map_or(0, |e| e.evaluations.len());
        self.evaluations += table.evaluations.len() + embedded - self.start.len();
        self.driven.attempt(self.field, step, &self.y, &self.start)
    }

    fn accept(&mut self, step: Step, attempt: &Attempt, tried: Attempted) -> Result<()> {
        self.kept.trajectory.offer(step.index, &self.y)?;
        self.kept.record.push(step.t, step.h, step.end)?;
        self.y = tried.next;
        self.kept.returns_node(step.end, &self.y)?;
        self.start.clear();
        self.jumps = self.control.jumps_at(attempt);
        if self.jumps {
            self.kept.record.break_here();
        }
        Ok(())
    }

    /// What rounding can make of stages of attempts from here: as for an ordinary equation, with the diffusion at the start
    /// times √h, the size of an increment.
    fn rounding_terms(&self) -> Result<Vec<RoundingTerms>> {
        let precisions = self.driven.roles.iter().map(|r| r.compute.roundoff());
        let roundings = self.control.roundings(&precisions.collect::<Vec<_>>())?;
        if roundings.iter().all(|of| of.weight == 0.0) {
            return Ok(vec![]);
        }
        let value = |part, leaf: usize| {
            let mut of = self.start.iter().filter(|e| e.part == part);
            of.next().and_then(|e| e.value.get(leaf))
        };
        let channels = match self.driven.drive.equation.noise {
            NoiseType::General { channels } => channels as f64,
            _ => 1.0,
        };
        let of_leaf = |(leaf, of): (usize, &Rounding)| -> Result<RoundingTerms> {
            let (u, least) = (of.roundoff, of.least);
            let times = |c: f64, x: Option<&Tensor>| -> Result<Option<Tensor>> {
                x.map(|x| Ok((row_rms(&rows_of(x)?, least)? * c)?))
                    .transpose()
            };
            let alpha = (row_rms(&rows_of(&self.y[leaf])?, 0.0)? * u)?;
            let beta = times(u, value(Part::Drift, leaf))?;
            Ok(RoundingTerms {
                beta: match beta {
                    Some(beta) => beta,
                    None => alpha.zeros_like()?,
                },
                alpha,
                gamma: times(u * channels.sqrt(), value(Part::Diffusion, leaf))?,
            })
        };
        roundings.iter().enumerate().map(of_leaf).collect()
    }

    /// The same for one length.
    fn rounded(&self, h: f64) -> Result<RoundedStages> {
        let of_leaf = |terms: &RoundingTerms| -> Result<(Tensor, Tensor)> {
            let alpha = match &terms.gamma {
                Some(gamma) => (&terms.alpha + (gamma * h.sqrt())?)?,
                None => terms.alpha.clone(),
            };
            Ok((alpha, terms.beta.clone()))
        };
        self.rounding.iter().map(of_leaf).collect()
    }

    fn stopped(&self, reason: StopReason, last: Option<(Attempt, Attempted, f64)>) -> Error {
        let last = last.map(|(attempt, tried, error)| {
            let leaves = self.driven.leaves();
            let ends = [&self.y[..leaves], &tried.next[..leaves]];
            let worst = by_row(&tried.error, ends)
                .and_then(|[error, y, next]| self.estimate.worst(&error, [&y, &next]));
            Last {
                h: attempt.h,
                error,
                worst: worst.ok().flatten(),
            }
        });
        self.kept
            .stopped(reason, &self.pace, last.unwrap_or_default())
    }
}
