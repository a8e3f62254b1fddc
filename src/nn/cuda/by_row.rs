//! Adaptive steps of every row, a launch for each pass.

use std::sync::Arc;

use candle_core::{DType, Tensor, TensorId};

use super::small;
use crate::accumulator::gradient_of;
use crate::adaptive::{Control, OnFailure};
use crate::error::{Error, Result, StopReason, Stopped, Worst};
use crate::nn::mlp::Mlp;
use crate::ops::cuda::mlp::{
    ControlOf, DeviceControl, NetFailure, Reason, RowReport, RowsBackward, RowsForward, RowsKept,
    RowsTold, SmallNet, StepsOf,
};
use crate::problem::Problem;
use crate::reverse::{Adjoint, Backward, Reversible};
use crate::rows::Solved;
use crate::schedule::Output;
use crate::stats::{RowStats, Stats};
use crate::trajectory::Checkpoint;

/// Solves a problem that the kernels know; `None` if the network or the method does not fit.
pub(super) fn solve(
    mlp: &Mlp,
    (problem, control): (&Problem, &Arc<Control>),
    y0: &Tensor,
    stats: &mut Stats,
) -> Result<Option<Solved>> {
    let Some(net) = small(mlp, problem, StepsOf::Row)? else {
        return Ok(None);
    };
    let Some(on_device) = in_numbers(problem, control, y0)? else {
        return Ok(None);
    };
    let roles = problem.scheme.roles[0];
    let keeps = problem.checkpoint == Checkpoint::All;
    let traces = problem.recorder.traces();
    let (packed, kept, told) = net.forward_by_row(&RowsForward {
        y0,
        control: &on_device,
        outputs: problem.outputs(),
        most_steps: control.options.max_steps,
        fails: control.options.on_failure == OnFailure::Error,
        records: keeps || traces,
        keeps,
        compute: roles.compute.to,
        store: roles.store.to,
        scaler: &problem.scaler,
    })?;
    if told.failure.is_some() {
        return Err(Error::NonFiniteState { leaf: 0 });
    }
    count(&told, stats);
    if let (Some(row), OnFailure::Error) = (told.failed, control.options.on_failure) {
        let report = net.row(&kept, row)?;
        return Err(stopped(problem, control, (row, &report), &packed));
    }
    if keeps {
        let bytes = mlp.features() * roles.store.to.size_in_bytes();
        stats.kept(told.steps, told.recorded * bytes);
    }
    if traces {
        for (report, times) in net.rows(&kept)? {
            stats.rows.push(RowStats {
                accepted: report.accepted as usize,
                rejected: report.rejected as usize,
                evaluations: report.evaluations as usize,
                limited: report.limited as usize,
                stopped: reason(control, &report),
                times,
            });
        }
    }
    let back = Arc::new(LaunchedRows {
        net,
        control: on_device,
        kept: keeps.then_some(kept),
        weights: mlp.tensors().map(Tensor::id).collect(),
    });
    Ok(Some(Solved {
        packed,
        back,
        found: vec![],
    }))
}

/// What steps are controlled by, as kernels read it.
fn in_numbers(problem: &Problem, control: &Control, y0: &Tensor) -> Result<Option<DeviceControl>> {
    let (shapes, compute) = (problem.packing.shapes(), problem.scheme.roles[0].compute);
    let [rtol, atol] = control.tolerances(shapes, problem.state(), problem.device())?;
    let (Some(rtol), Some(atol)) = (rtol.into_iter().next(), atol.into_iter().next()) else {
        return Ok(None);
    };
    let of = ControlOf {
        control,
        tableau: &problem.scheme.tableau,
        points: problem.grid.points(),
        tolerances: [rtol, atol],
        roundings: control.roundings(&[compute.roundoff()])?,
        returns_all: problem.output == Output::All,
    };
    DeviceControl::new(of, y0)
}

/// Notes what the rows did.
fn count(told: &RowsTold, stats: &mut Stats) {
    stats.steps += told.steps;
    stats.rejected += told.rejected;
    stats.forced += told.forced;
    stats.limited += told.limited;
    stats.evaluations += told.evaluations;
    stats.row_evaluations += told.row_evaluations;
    stats.tile_evaluations += told.tile_evaluations;
    stats.tolerance_factor = stats.tolerance_factor.max(told.factor);
    stats.first_step = told.first.or(stats.first_step);
    for h in told.range.into_iter().flat_map(|(a, b)| [a, b]) {
        stats.used_step(h);
    }
}

fn reason(control: &Control, report: &RowReport) -> Option<StopReason> {
    Some(match report.reason()? {
        Reason::Attempts => StopReason::Attempts {
            max_steps: control.options.max_steps,
        },
        Reason::Underflow | Reason::TimeStandsStill => StopReason::Underflow,
        Reason::NonFinite => StopReason::NonFinite,
        Reason::Limited => StopReason::PrecisionLimited {
            limited: report.limited as usize,
            factor: report.factor,
        },
    })
}

/// The error of the first row that has stopped, with the states that it has returned.
fn stopped(
    problem: &Problem,
    control: &Control,
    (row, report): (usize, &RowReport),
    packed: &Tensor,
) -> Error {
    if report.reason() == Some(Reason::TimeStandsStill) {
        return Error::TimeUnresolved {
            step: report.accepted as usize,
            t: report.t,
            end: report.t + report.h,
            dtype: problem.state(),
        };
    }
    let reason = reason(control, report).unwrap_or(StopReason::NonFinite);
    if reason == StopReason::NonFinite && report.has_not_begun() {
        return Error::NonFiniteVelocity {
            step: 0,
            stage: 0,
            t: control.start,
        };
    }
    let returned = usize::try_from(report.returned).unwrap_or(0);
    let features = problem.packing.shapes()[0].dims().last().copied();
    let states = || -> candle_core::Result<Vec<Tensor>> {
        if returned == 0 {
            return Ok(vec![]);
        }
        let of_rows = packed.reshape((packed.dim(0)?, (), features.unwrap_or(1)))?;
        let of_row = of_rows.narrow(1, row, 1)?.narrow(0, 0, returned)?;
        Ok(vec![of_row.contiguous()?])
    };
    Error::Stopped(Box::new(Stopped {
        reason,
        t: report.t,
        h: report.h,
        error: report.error,
        worst: Some(Worst {
            leaf: 0,
            row,
            index: report.worst().unwrap_or(0),
        }),
        accepted: report.accepted as usize,
        rejected: report.rejected as usize,
        outputs: returned,
        states: states().unwrap_or_default(),
    }))
}

/// What a solve in one launch keeps.
struct LaunchedRows {
    net: SmallNet,
    control: DeviceControl,
    /// If a backward pass is wanted.
    kept: Option<RowsKept>,
    weights: Vec<TensorId>,
}

impl Reversible for LaunchedRows {
    fn can_rewind(&self) -> bool {
        self.kept.is_some()
    }

    fn pull_back(&self, back: &Backward<'_>, stats: &mut Stats) -> Result<Adjoint> {
        let Backward { problem, theta, .. } = *back;
        let kept = self.kept.as_ref().ok_or(Error::NothingKept)?;
        let (y0, gradients, told) = self.net.backward_by_row(&RowsBackward {
            cotangent: &back.cotangent.to_dtype(DType::F32)?,
            control: &self.control,
            kept,
            compute: problem.scheme.roles[0].compute.to,
            scaler: &problem.scaler,
        })?;
        stats.recomputed += told.recomputed;
        stats.vjps += told.pulls + told.retries;
        stats.retries += told.retries;
        if problem.scaler.is_on() && told.exponents.0 <= told.exponents.1 {
            let (smallest, largest) = told.exponents;
            stats.used_scale(2f64.powi(smallest));
            stats.used_scale(2f64.powi(largest));
        }
        if let Some(failure) = told.failure {
            return Err(self.failed(kept, failure)?);
        }
        let of = |p: &Tensor| gradient_of(p, &self.weights, &gradients, DType::F32);
        Ok(Adjoint {
            y0: problem.packing.unpack(&y0)?,
            theta: theta.iter().map(of).collect::<Result<_>>()?,
            times: vec![],
        })
    }
}

impl LaunchedRows {
    /// The error of a backward pass, whose numbers count rows from one.
    fn failed(&self, kept: &RowsKept, failure: NetFailure) -> Result<Error> {
        Ok(match failure {
            NetFailure::Gradient { steps: row } => {
                let report = self.net.row(kept, row - 1)?;
                Error::NonFiniteGradient {
                    step: report.bad_step as usize,
                    t: report.bad_t,
                }
            }
            NetFailure::Exhausted {
                steps: row,
                exponent,
                attempts,
            } => {
                let report = self.net.row(kept, row - 1)?;
                Error::ScaleExhausted {
                    step: report.bad_step as usize,
                    t: report.bad_t,
                    scale: 2f64.powi(exponent),
                    attempts,
                }
            }
            NetFailure::Parameters => Error::NonFiniteParameterGradient,
            _ => Error::NonFiniteCotangent,
        })
    }
}
