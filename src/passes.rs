//! Both passes of a solve, whichever way it is solved: step by step, tile by tile, or in one launch.

use candle_core::Tensor;

use crate::adjoint::{Adjoint, Sweep};
use crate::error::{Error, Result};
use crate::field::Field;
use crate::integrate::{integrate, Forward, Kept};
use crate::loss::RowLoss;
use crate::nn;
use crate::ops;
use crate::parameters::Theta;
use crate::problem::{Output, Problem};
use crate::stats::Stats;
use crate::trajectory::Checkpoint;
use crate::watch::Watch;

/// The forward pass from y0, joined, on a copy: the user's own may be written before backward.  A
/// loss is formed where the field is integrated tile by tile.  What a backward pass needs is kept where
/// `keep` says so.
pub(crate) fn run(
    problem: &Problem,
    field: &Field<'_>,
    y0: &Tensor,
    loss: Option<&RowLoss>,
    keep: &dyn Fn() -> bool,
) -> Result<Forward> {
    counted(problem, |stats| {
        let tiles = match field.known().is_some() && !keep() {
            true => advance_tiles(&problem.keeping_nothing(), field, y0, loss, stats)?,
            false => advance_tiles(problem, field, y0, loss, stats)?,
        };
        if let Some(forward) = tiles {
            return Ok(forward);
        }
        let y0 = problem.packing.split(&y0.detach().force_contiguous()?)?;
        integrate(problem, field, y0, keep, stats)
    })
}

/// The same where the field is integrated tile by tile, otherwise nothing.
pub(crate) fn run_tiles(
    problem: &Problem,
    field: &Field<'_>,
    y0: &Tensor,
    loss: Option<&RowLoss>,
) -> Result<Option<Forward>> {
    counted(problem, |stats| {
        advance_tiles(problem, field, y0, loss, stats)
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

/// Tile by tile, or in one launch, where the field allows it.
fn advance_tiles(
    problem: &Problem,
    field: &Field<'_>,
    y0: &Tensor,
    loss: Option<&RowLoss>,
    stats: &mut Stats,
) -> Result<Option<Forward>> {
    let Some(known) = field.known() else {
        return Ok(None);
    };
    let packed = y0.detach().flatten_all()?;
    #[cfg(feature = "cuda")]
    if problem.device().is_cuda() {
        let solved = nn::cuda::solve(known, problem, &packed, stats)?;
        return Ok(solved.map(Forward::of_rows));
    }
    let Some(rows) = nn::rows_of(known) else {
        return Ok(None);
    };
    if loss.is_some() && problem.checkpoint != Checkpoint::Nothing {
        match rows.solve(problem, &packed, loss, stats) {
            Ok(Some(solved)) => return Ok(Some(Forward::graded(solved))),
            Ok(None) => {}
            // To be met again where the user expects it: in the backward pass.
            Err(error) if error.is_overflow() => {}
            Err(error) => return Err(error),
        }
    }
    let solved = rows.solve(problem, &packed, None, stats)?;
    Ok(solved.map(Forward::of_rows))
}

/// The backward pass of a solve.  `cotangent`: `(outputs, elements)`.
pub(crate) fn adjoint(
    problem: &Problem,
    field: &Field<'_>,
    theta: &Theta,
    kept: &Kept,
    cotangent: &Tensor,
    differentiate_time: bool,
) -> Result<Adjoint> {
    counted(problem, |stats| {
        pull_back(
            problem,
            field,
            theta,
            kept,
            cotangent,
            differentiate_time,
            stats,
        )
    })
}

/// Tile by tile or step by step, as the forward pass went.
#[allow(clippy::too_many_arguments)]
fn pull_back(
    problem: &Problem,
    field: &Field<'_>,
    theta: &Theta,
    kept: &Kept,
    cotangent: &Tensor,
    differentiate_time: bool,
    stats: &mut Stats,
) -> Result<Adjoint> {
    if cotangent.track_op() {
        return Err(Error::TrackedCotangent);
    }
    if !kept.can_rewind() {
        return Err(Error::NothingKept);
    }
    theta.check_unchanged()?;
    let mut watch = Watch::default();
    // Kernels that go back over all steps look for themselves.
    if matches!(kept, Kept::Steps(_)) || cotangent.device().is_cpu() {
        watch.see(std::slice::from_ref(cotangent), || {
            Error::NonFiniteCotangent
        })?;
    }
    let trajectory = match kept {
        Kept::Steps(trajectory) => trajectory,
        Kept::Rows(trajectory) => {
            return trajectory.backward(problem, cotangent, &theta.leaves, stats);
        }
    };
    let sweep = Sweep {
        scheme: &problem.scheme,
        plan: &problem.plan,
        trajectory,
        field,
        theta: &theta.leaves,
        scaler: problem.scaler,
        differentiate_time,
        #[cfg(feature = "cuda")]
        graphs: problem.graphs,
    };
    let row = |i| problem.packing.unpack(&cotangent.get(i)?);
    let earlier = |i| match problem.output {
        Output::All => row(i).map(Some),
        Output::Final => Ok(None),
    };
    let last = row(problem.outputs() - 1)?;
    sweep.run(last, earlier, watch, stats)
}
