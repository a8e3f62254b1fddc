//! One way to solve a problem, and what it takes.

use std::time::Instant;

use candle_core::{DType, Device, Tensor, Var};
use candle_diffeq::metrics::Recorder;
use candle_diffeq::options::ActivationCache;
use candle_diffeq::{OdeOptions, Precision};
use candle_nn::VarMap;
use serde_json::{json, Value};

use crate::fields::{Ode, Whose};
use crate::pool::Pool;
use crate::workload::{Initial, Workload};
use common::{median, random, Result};

/// A problem on a device in a precision, ready to be solved.
pub(crate) struct Pass<'a> {
    workload: &'a Workload,
    ode: Ode,
    pub(crate) vars: VarMap,
    pub(crate) y0: Initial,
    target: Option<Tensor>,
    recorder: Recorder,
    device: Device,
}

/// How a problem is solved.
#[derive(Clone, Copy, PartialEq)]
pub(crate) struct Way {
    pub(crate) name: &'static str,
    pub(crate) fusion: bool,
    pub(crate) graphs: bool,
    /// Whether evaluations are kept, and with them states in state precision.
    pub(crate) keeps: bool,
}

/// As it is by default, and what else there is.
pub(crate) const OURS: Way = Way {
    name: "ours",
    fusion: true,
    graphs: false,
    keeps: false,
};
pub(crate) const UNFUSED: Way = Way {
    name: "ours unfused",
    fusion: false,
    ..OURS
};
pub(crate) const GRAPHS: Way = Way {
    name: "ours graphs",
    graphs: true,
    ..OURS
};
pub(crate) const KEPT: Way = Way {
    name: "ours kept",
    keeps: true,
    ..OURS
};

/// How long a figure may take.
#[derive(Clone, Copy)]
pub(crate) struct Patience {
    /// Of timed runs together, once there are three of them.
    pub(crate) seconds: f64,
    /// Timed runs at most.
    pub(crate) repeats: usize,
}

impl<'a> Pass<'a> {
    /// The log-density of a flow is summed in state precision; the trajectory is kept in compute
    /// precision, unless evaluations are kept.
    pub(crate) fn new(workload: &'a Workload, precision: Precision, way: Way) -> Result<Self> {
        let (vars, recorder) = (VarMap::new(), Recorder::default());
        workload.fill(&vars, precision.state)?;
        let precision = match way.keeps {
            true => precision,
            false => precision.store(precision.compute),
        };
        let options = OdeOptions {
            precision: Some(precision),
            leaf_precision: match workload.is_density() {
                true => vec![precision, Precision::new(precision.state, precision.state)],
                false => vec![],
            },
            fusion: way.fusion,
            graphs: way.graphs,
            activation_cache: match way.keeps {
                true => ActivationCache::ALL,
                false => ActivationCache::NONE,
            },
            recorder: Some(recorder.clone()),
            ..workload.options(None)
        };
        let y0 = workload.y0(precision.state)?;
        Ok(Self {
            ode: workload.ode(&vars, precision.state, Whose::Ours, options)?,
            target: workload.target(precision.state)?,
            device: y0.var.device().clone(),
            workload,
            vars,
            y0,
            recorder,
        })
    }

    pub(crate) fn loss(&self) -> Result<Tensor> {
        let y = self.ode.solve(&self.y0.leaves, &self.workload.times)?;
        Ok(self.workload.loss(&y, self.target.as_ref())?)
    }

    /// Whether it is a perceptron that a GPU solves in one launch, unless told otherwise.
    pub(crate) fn goes_in_one_launch(&self) -> Result<bool> {
        let vars = self.vars.data().lock();
        let vars = vars.map_err(|_| "the variables are poisoned")?;
        let narrow = |var: &Var| var.rank() <= 2 && var.dims().iter().all(|&n| n <= 128);
        Ok(!self.workload.is_density() && vars.values().all(narrow))
    }

    /// Whether a solve keeps an evaluation at all: most fields keep none on a GPU.
    pub(crate) fn keeps_evaluations(&self) -> Result<bool> {
        self.loss()?;
        Ok(self.recorder.take().activation_bytes > 0)
    }

    /// Errors, memory, milliseconds and waits of the host, for a line of JSON.
    pub(crate) fn measure(&self, patience: Patience) -> Result<Value> {
        let loss = self.loss()?;
        let [loss, weights, y0] =
            self.workload
                .errors(&loss, &self.vars, &self.y0.var, &loss.backward()?)?;
        if !(loss + weights + y0).is_finite() {
            return Err("a loss or gradient is not finite".into());
        }
        let forward = self.timed(patience, || self.loss().map(drop))?;
        let both = self.timed(patience, || {
            self.loss()?.backward()?;
            Ok(())
        })?;
        self.recorder.take();
        let loss_again = self.loss()?;
        let forward_stats = self.recorder.take();
        loss_again.backward()?;
        let stats = self.recorder.take();
        Ok(json!({
            "fwd_ms": median(forward.clone()), "fwd_range": range(&forward),
            "fwdbwd_ms": median(both.clone()), "fwdbwd_range": range(&both), "repeats": both.len(),
            "peak_mb": self.peak()?,
            "err_loss": loss, "err_grad_w": weights, "err_grad_y0": y0,
            "steps": forward_stats.steps, "rejected": forward_stats.rejected,
            "row_evaluations": forward_stats.row_evaluations, "block_evaluations": forward_stats.tile_evaluations,
            "reads_fwd": forward_stats.host_reads, "reads_bwd": stats.host_reads, "retries": stats.retries,
            "recomputed": stats.recomputed,
            "activation_bytes": forward_stats.activation_bytes, "replayed": stats.replayed, "not_replayed": stats.not_replayed.map(|why| why.to_string()),
        }))
    }

    /// Megabytes (2²⁰) that both passes take at most beside weights, y0 and target; of a GPU.
    fn peak(&self) -> Result<Option<f64>> {
        let Some(pool) = Pool::of(&self.device)? else {
            return Ok(None);
        };
        self.device.synchronize()?;
        let before = pool.bytes()?.used;
        pool.forget_peak()?;
        let gradients = self.loss()?.backward()?;
        self.device.synchronize()?;
        let peak = pool.bytes()?.peak;
        drop(gradients);
        Ok(Some(
            peak.saturating_sub(before) as f64 / f64::from(1 << 20),
        ))
    }

    fn timed(&self, patience: Patience, run: impl FnMut() -> Result<()>) -> Result<Vec<f64>> {
        timed(&self.device, patience, run)
    }
}

/// Milliseconds of repeated runs after two that are not counted, the device idle at both ends.
pub(crate) fn timed(
    device: &Device,
    patience: Patience,
    mut run: impl FnMut() -> Result<()>,
) -> Result<Vec<f64>> {
    let mut times = vec![];
    for warm_up in [true, true, false] {
        let begin = Instant::now();
        while times.len() < patience.repeats {
            device.synchronize()?;
            let start = Instant::now();
            run()?;
            device.synchronize()?;
            if warm_up {
                break;
            }
            times.push(start.elapsed().as_secs_f64() * 1e3);
            if times.len() >= 3 && begin.elapsed().as_secs_f64() > patience.seconds {
                break;
            }
        }
    }
    Ok(times)
}

/// The least and the most.
fn range(times: &[f64]) -> [f64; 2] {
    let least = times.iter().copied().fold(f64::INFINITY, f64::min);
    [least, times.iter().copied().fold(0.0, f64::max)]
}

/// 10¹² operations a second of the products of a perceptron of such widths, alone.
pub(crate) fn products(
    device: &Device,
    dtype: DType,
    rows: usize,
    widths: &[usize],
    patience: Patience,
) -> Result<f64> {
    let mut rng = random::generator(12);
    // One block of numbers again and again, where it is smaller than the matrix.
    let mut normal = |n: usize, m: usize| {
        let block = random::normal(&mut rng, (n.min(1024), m.min(1024)), dtype, device)?;
        block.repeat((n.div_ceil(1024), m.div_ceil(1024)))
    };
    let pairs = widths.windows(2);
    let pairs = pairs.map(|pair| Ok((normal(rows, pair[0])?, normal(pair[1], pair[0])?)));
    let pairs = pairs.collect::<candle_core::Result<Vec<_>>>()?;
    let operations: usize = widths.windows(2).map(|p| 2 * rows * p[0] * p[1]).sum();
    // Enough of them that the launches do not show.
    let rounds = 10;
    let times = timed(device, patience, || {
        for _ in 0..rounds {
            for (a, w) in &pairs {
                a.matmul(&w.t()?)?;
            }
        }
        Ok(())
    })?;
    Ok((rounds * operations) as f64 / median(times) / 1e9)
}
