//! Both passes of a solve, whichever way it is solved: step by step, tile by tile, or in one launch.

use candle_core::Tensor;

use crate::adaptive::StepControl;
use crate::backsolve;
use crate::error::{AdaptiveDefect, ContinuousDefect, Error, Result};
use crate::field::Field;
use crate::integrate::observe::{Observer, Unobserved};
use crate::integrate::{integrate, Forward};
use crate::offer::Offered;
use crate::ops;
use crate::parameters::Theta;
use crate::problem::{Plan, Problem};
use crate::reverse::{Adjoint, Backward, Reversible};
use crate::rows::{RowGrade, Solved};
use crate::stats::Stats;
use crate::trajectory::Checkpoint;

/// The forward pass from y0, joined, on a copy: the user's own may be written before backward.  A
/// loss is formed where the field is integrated tile by tile.  What a backward pass needs is kept where
/// `keep` says so.
pub(crate) fn run(
    problem: &Problem,
    field: &Field<'_>,
    y0: &Tensor,
    loss: Option<&dyn RowGrade>,
    keep: &dyn Fn() -> bool,
) -> Result<Forward> {
    backsolve::check(problem)?;
    let Some(continuous) = &problem.continuous else {
        return steps(problem, field, y0, loss, keep);
    };
    let forward = match continuous.reads_states() {
        true => steps(problem, field, y0, None, keep)?,
        false => steps(&problem.keeping_nothing(), field, y0, None, keep)?,
    };
    backsolve::over(problem, forward, y0, keep())
}

/// The same, with the discrete adjoint as its backward pass.
fn steps(
    problem: &Problem,
    field: &Field<'_>,
    y0: &Tensor,
    loss: Option<&dyn RowGrade>,
    keep: &dyn Fn() -> bool,
) -> Result<Forward> {
    counted(problem, |stats| {
        let y0 = &problem.start(y0)?;
        let offered = Offered::from(field.offer());
        if let Some(offered) = &offered {
            let solved = match keep() {
                true => advance_tiles(problem, offered, y0, loss, stats)?,
                false => advance_tiles(&problem.keeping_nothing(), offered, y0, loss, stats)?,
            };
            if let Some(forward) = solved {
                return Ok(forward);
            }
        }
        refuse_rows(problem, || {
            let continuous = problem.continuous.as_ref();
            if continuous.is_some_and(|continuous| continuous.reads_states()) {
                let what =
                    "forward steps by row with a gradient that reads y from the forward pass";
                let take = "StepControl::Batch, Gradient::Backsolve or Gradient::Discrete";
                return ContinuousDefect::Unavailable { what, take }.into();
            }
            let rows = offered.and_then(|offered| offered.rows);
            let row_wise = rows.is_some_and(|rows| rows.may_part());
            Error::Adaptive(AdaptiveDefect::NoRows { row_wise })
        })?;
        let y0 = problem.packing.split(&y0.detach().force_contiguous()?)?;
        integrate(problem, field, y0, keep, &mut Unobserved, stats)
    })
}

/// An error if every row was to have steps of its own, which a solve over the whole batch does not give.
fn refuse_rows(problem: &Problem, error: impl FnOnce() -> Error) -> Result<()> {
    if let Plan::Adaptive(control) = &problem.plan {
        // Without a row there is no step, of rows or of the batch.
        let by_row = control.options.control == Some(StepControl::Rows);
        if by_row && !problem.is_empty() {
            return Err(error());
        }
    }
    Ok(())
}

/// The same step by step, where every step is looked at.
pub(crate) fn run_observed(
    problem: &Problem,
    field: &Field<'_>,
    y0: &Tensor,
    keep: &dyn Fn() -> bool,
    observer: &mut dyn Observer,
) -> Result<Forward> {
    if problem.continuous.is_some() {
        let what = "events or solutions between steps";
        return ContinuousDefect::unavailable(what, "Gradient::Discrete");
    }
    refuse_rows(problem, || Error::Adaptive(AdaptiveDefect::RowsObserved))?;
    counted(problem, |stats| {
        let y0 = problem.packing.split(&y0.detach().force_contiguous()?)?;
        integrate(problem, field, y0, keep, observer, stats)
    })
}

/// The same where the field is integrated tile by tile, otherwise nothing.
pub(crate) fn run_tiles(
    problem: &Problem,
    field: &Field<'_>,
    y0: &Tensor,
    loss: Option<&dyn RowGrade>,
) -> Result<Option<Forward>> {
    counted(problem, |stats| match Offered::from(field.offer()) {
        Some(offered) => advance_tiles(problem, &offered, &problem.start(y0)?, loss, stats),
        None => Ok(None),
    })
}

/// A pass, whose statistics go to the recorder, failed or not.
fn counted<R>(problem: &Problem, pass: impl FnOnce(&mut Stats) -> Result<R>) -> Result<R> {
    let mut stats = Stats::default();
    let before = ops::host_reads();
    let result = pass(&mut stats);
    stats.host_reads = ops::host_reads() - before;
    problem.recorder.add(&stats);
    result
}

/// Tile by tile, or in one launch, where what the field offers allows it.
fn advance_tiles(
    problem: &Problem,
    offered: &Offered,
    y0: &Tensor,
    loss: Option<&dyn RowGrade>,
    stats: &mut Stats,
) -> Result<Option<Forward>> {
    let packed = y0.detach().flatten_all()?;
    #[cfg(feature = "cuda")]
    if problem.device().is_cuda() {
        // One launch sums without compensation.
        let launch = offered.launch.as_ref();
        let solved = match launch.filter(|_| !problem.scheme.compensated) {
            Some(launch) => launch.solve(problem, &packed, stats)?,
            None => None,
        };
        return Ok(solved.map(of_rows));
    }
    if let Some(rows) = &offered.driven {
        return Ok(rows.solve(problem, &packed, stats)?.map(of_rows));
    }
    let Some(rows) = &offered.rows else {
        return Ok(None);
    };
    if loss.is_some() && problem.checkpoint != Checkpoint::Nothing {
        match rows.solve(problem, &packed, loss, stats) {
            Ok(Some(solved)) => {
                return Ok(Some(Forward {
                    is_loss: true,
                    ..of_rows(solved)
                }))
            }
            Ok(None) => {}
            // To be met again where the user expects it: in the backward pass.
            Err(error) if error.is_overflow() => {}
            Err(error) => return Err(error),
        }
    }
    let solved = rows.solve(problem, &packed, None, stats)?;
    Ok(solved.map(of_rows))
}

/// States, or a loss, of a solve that went over all steps tile by tile or in one launch.
fn of_rows(solved: Solved) -> Forward {
    Forward {
        packed: solved.packed,
        back: solved.back,
        is_loss: false,
        found: solved.found,
    }
}

/// The backward pass of a solve, by the way that it was solved.
pub(crate) fn adjoint(
    solved: &dyn Reversible,
    theta: &Theta,
    back: &Backward<'_>,
) -> Result<Adjoint> {
    counted(back.problem, |stats| {
        if back.cotangent.track_op() {
            return Err(Error::TrackedCotangent);
        }
        if !solved.can_rewind() {
            return Err(Error::NothingKept);
        }
        theta.check_unchanged()?;
        // Sweeps and kernels on a device look for themselves, so that nothing waits for the device.
        let looks = back.cotangent.device().is_cpu() && !solved.ignores_cotangents();
        if looks && !ops::magnitude(back.cotangent)?.is_finite() {
            return Err(Error::NonFiniteCotangent);
        }
        let adjoint = solved.pull_back(back, stats)?;
        Ok(Adjoint {
            y0: back.problem.summed(adjoint.y0)?,
            ..adjoint
        })
    })
}
