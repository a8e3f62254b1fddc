//! Times one workload file, forward and forward + backward through candle's graph, and compares
//! its loss and gradients with the file's reference.
//!
//! `cargo run --release --example workloads -- FILE [--precision bf16] [--checkpoint every:10]`
//! (seconds) prints one line of JSON.  A file that has tolerances is solved by adaptive steps: `accepted` and `rejected`
//! count them, `limited` those that the noise floor let pass, `nfe_fwd` evaluations and `nfe_bwd` pull-backs, `nfe_row` the
//! evaluations that a row has of its own where each has its own steps, the mean of all rows, `err_y` is the error of the
//! states.  Of other files `nfe_bwd` counts evaluations that the backward pass repeats.

mod fields;
mod models;
mod peak;
mod processor;
mod workload;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use candle_core::{DType, Device, Tensor};
use candle_diffeq::metrics::{Recorder, Stats};
use candle_diffeq::options::{ActivationCache, Checkpoint, StepControl};
use candle_diffeq::OdeOptions;
use candle_nn::VarMap;
use clap::Parser;
use serde_json::json;

use crate::fields::Whose;
use crate::workload::Workload;
use common::dtype::Dtype;
use common::{median, memory, use_every_core, Result};

/// Times a workload and checks its gradients.
#[derive(Parser)]
struct Args {
    /// A .safetensors file: weights, y0, times, target, reference loss and gradients.
    file: PathBuf,
    /// Compute precision.
    #[arg(long, default_value = "f32")]
    precision: Dtype,
    /// Sums the state with compensation.
    #[arg(long)]
    compensated: bool,
    /// What the forward pass keeps: all, every:K, states:B or bytes:N.
    #[arg(long, default_value = "all", value_parser = checkpoint)]
    checkpoint: Checkpoint,
    /// Megabytes of evaluations that the forward pass may keep.
    #[arg(long, default_value_t = 0)]
    activations: usize,
    /// Keeps them in bf16.
    #[arg(long)]
    activations_bf16: bool,
    /// Forms the loss inside the solve, where it is a mean of squares.
    #[arg(long)]
    row_loss: bool,
    /// Whose field, and how.
    #[arg(long, value_enum, default_value_t = Whose::Ours)]
    field: Whose,
    /// What controls adaptive steps, where the library is not left to choose.
    #[arg(long, value_enum)]
    control: Option<Control>,
    /// Says which share of the machine's multiply-adds it does, of a perceptron: each repetition is
    /// followed by a measurement of what there is.
    #[arg(long)]
    share: bool,
    /// Timed repetitions after one that is not.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    repeats: u32,
}

/// What adaptive steps are controlled for.
#[derive(Clone, Copy, Debug, clap::ValueEnum)]
enum Control {
    /// Every row by itself.
    Rows,
    /// One step for the batch.
    Batch,
}

impl From<Control> for StepControl {
    fn from(control: Control) -> Self {
        match control {
            Control::Rows => Self::Rows,
            Control::Batch => Self::Batch,
        }
    }
}

fn main() -> ExitCode {
    use_every_core();
    let args = Args::parse();
    match run(&args) {
        Ok(line) => {
            println!("{line}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Forms the loss of a solve in tiles on one thread, unless CANDLE_NUM_THREADS says otherwise.
///
/// candle's own threads wait for the next operation in a loop, on the cores that the threads of a solve need by then.
fn leave_cores_to_solves() {
    const CANDLES: &str = "CANDLE_NUM_THREADS";
    if std::env::var_os(CANDLES).is_none() {
        std::env::set_var(CANDLES, "1");
    }
}

fn checkpoint(text: &str) -> std::result::Result<Checkpoint, String> {
    let (plan, count) = match text.split_once(':') {
        Some((plan, count)) => (plan, count.parse().ok()),
        None => (text, None),
    };
    match (plan, count) {
        ("all", None) => Ok(Checkpoint::All),
        ("every", Some(k)) => Ok(Checkpoint::Every(k)),
        ("states", Some(b)) => Ok(Checkpoint::States(b)),
        ("bytes", Some(n)) => Ok(Checkpoint::Bytes(n)),
        _ => Err("expected all, every:K, states:B or bytes:N".to_owned()),
    }
}

/// The JSON line.
fn run(args: &Args) -> Result<serde_json::Value> {
    let workload = Workload::read(&args.file, &Device::Cpu)?;
    let control = args.control.map(StepControl::from);
    if args.field == Whose::Ours && workload.is_in_tiles(control) {
        leave_cores_to_solves();
    }
    let vars = VarMap::new();
    let state = args.precision.state();
    workload.fill(&vars, state)?;
    let recorder = Recorder::default();
    let options = OdeOptions {
        precision: Some(match args.compensated {
            true => args.precision.precision().compensated(),
            false => args.precision.precision(),
        }),
        checkpoint: args.checkpoint,
        activation_cache: match ActivationCache::within(args.activations << 20) {
            kept if args.activations_bf16 => kept.in_bf16(),
            kept => kept,
        },
        recorder: Some(recorder.clone()),
        ..workload.options(control)
    };
    let ode = workload.ode(&vars, state, args.field, options)?;
    let y0 = workload.y0(state)?;
    let target = workload.target(state)?;
    if args.row_loss && !workload.is_of_the_end() {
        return Err("--row-loss forms a loss of the last state alone".into());
    }
    let solve = || -> Result<Tensor> {
        if let (true, Some(target)) = (args.row_loss, &target) {
            return Ok(ode.mean_square(&y0.leaves, &workload.times, target)?);
        }
        let y = ode.solve(&y0.leaves, &workload.times)?;
        Ok(workload.loss(&y, target.as_ref())?)
    };

    let before = memory::resident();
    let grads = solve()?.backward()?;
    let stats = recorder.take();
    let errors = workload.errors(&solve()?, &vars, &y0.var, &grads)?;
    let state_error = match workload.is_adaptive() {
        true => workload.state_error(&ode.solve(&y0.leaves, &workload.times)?)?,
        false => None,
    };
    let (mut forward, mut both, mut peaks) = (vec![], vec![], vec![]);
    let mut processor = f64::INFINITY;
    for _ in 0..args.repeats {
        let clock = Instant::now();
        solve()?.detach().to_dtype(DType::F64)?.to_scalar::<f64>()?;
        forward.push(milliseconds(clock));
        // Reading it takes as long as a small solve and leaves caches cold: outside of the clock, and only where it is
        // compared with that of peers.
        let compared = workload.is_adaptive() || workload.is_driven() || workload.is_model();
        let before = compared.then(processor::milliseconds).flatten();
        let clock = Instant::now();
        solve()?.backward()?;
        both.push(milliseconds(clock));
        let took = before.and_then(|a| Some(processor::milliseconds()? - a));
        processor = processor.min(took.unwrap_or(f64::NAN));
        if args.share {
            peaks.push(peak::rate());
        }
    }
    let growth = memory::peak()
        .zip(before)
        .map(|(peak, before)| (peak.saturating_sub(before)) as f64 / f64::from(1 << 20));
    let times = [median(forward), median(both)];
    let mut line = line(args, &workload, &stats, &times, growth, errors);
    line["err_y"] = json!(state_error);
    // Where every row has steps of its own: evaluations of its own, the mean of the rows.
    let rows = y0.var.dim(0)?;
    line["nfe_row"] = match stats.row_evaluations {
        0 => json!(null),
        of_rows => json!(of_rows as f64 / rows as f64),
    };
    line["fwdbwd_cpu_ms"] = json!(processor);
    if let (true, Some(products)) = (args.share, workload.products()) {
        // Evaluation, pull-back and gradient, and what is evaluated again.
        let passes = 3 * stats.evaluations + stats.recomputed;
        let rate = products * passes as f64 / (times[1] * 1e-3);
        let peak = median(peaks);
        line["share"] = json!(rate / peak);
        line["peak_gflops"] = json!(2e-9 * peak);
    }
    Ok(line)
}

fn milliseconds(clock: Instant) -> f64 {
    clock.elapsed().as_secs_f64() * 1e3
}

fn line(
    args: &Args,
    workload: &Workload,
    stats: &Stats,
    [forward, both]: &[f64; 2],
    growth: Option<f64>,
    [loss, weights, y0]: [f64; 3],
) -> serde_json::Value {
    json!({
        "workload": workload.name,
        "field": format!("{:?}", args.field).to_lowercase(),
        "precision": args.precision.name(),
        "compensated": args.compensated,
        "checkpoint": format!("{:?}", args.checkpoint),
        "threads": std::env::var("RAYON_NUM_THREADS").ok(),
        "fwd_ms": forward,
        "fwdbwd_ms": both,
        "rss_mb": growth,
        "states_kept": stats.states_kept,
        "bytes_kept": stats.bytes_kept,
        "activation_bytes": stats.activation_bytes,
        "row_loss": args.row_loss,
        "nfe_fwd": stats.evaluations,
        "nfe_bwd": match workload.is_adaptive() {
            true => stats.vjps,
            false => stats.recomputed,
        },
        "accepted": stats.steps,
        "rejected": stats.rejected,
        "limited": stats.limited,
        "tolerance_factor": stats.tolerance_factor,
        "recomputed": stats.recomputed,
        "vjps": stats.vjps,
        "retries": stats.retries,
        "err_loss": loss,
        "err_grad_w": weights,
        "err_grad_y0": y0,
    })
}
