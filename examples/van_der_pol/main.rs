//! Learns the Van der Pol oscillator from windows of one trajectory.
//!
//! `cargo run --release --example van_der_pol` (a minute; `--smoke`: seconds).  The setting of
//! NeuroDiffEqLab's notebook 2: μ = 1, a perceptron 2-50-50-2, 20 windows of 10 times, Adam at 1e-3,
//! 2000 iterations.  Prints the errors, draws trajectories, stream lines and a map of errors.

mod model;
mod oscillator;
mod picture;
mod stream;
mod training;

use std::process::ExitCode;

use candle_core::Device;
use clap::Parser;
use serde_json::json;

use crate::oscillator::Trajectory;
use crate::training::{train, Outcome};
use common::dtype::Dtype;
use common::flags::Flags;
use common::report::{self, Report};
use common::table::{sci, Table};
use common::{progress, Result};

const ITERATIONS: u32 = 2000;
/// What the best test error must be below in f32.
const BEST: f64 = 1e-3;

/// Learns the Van der Pol oscillator.
#[derive(Parser)]
struct Args {
    #[command(flatten)]
    flags: Flags,
    /// In each precision [default: 2000, and 40 with --smoke].
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
    iters: Option<u32>,
}

fn main() -> ExitCode {
    let args = Args::parse();
    report::run("van_der_pol", &args.flags, |device, report| {
        run(&args, device, report)
    })
}

fn run(args: &Args, device: &Device, report: &mut Report) -> Result<()> {
    let Args { flags, iters } = args;
    let iterations = iters.unwrap_or(flags.size().pick(40, ITERATIONS, ITERATIONS)) as usize;
    let data = Trajectory::new()?;
    let mut outcomes = vec![];
    for dtype in flags.precisions(&[Dtype::F32, Dtype::Bf16, Dtype::F16])? {
        let bar = progress(dtype.name(), iterations)?;
        outcomes.push(train(&data, dtype, iterations, flags.seed, device, &bar)?);
        bar.finish_and_clear();
    }
    print(&outcomes);
    picture::draw_training(&report.picture(""), &data, &outcomes)?;
    if let Some(first) = outcomes.first() {
        picture::draw_field(&report.picture("field"), first)?;
    }
    report.figure("iterations", iterations)?;
    report.figure("runs", outcomes.iter().map(figures).collect::<Vec<_>>())?;
    for o in outcomes.iter().filter(|o| o.dtype == Dtype::F32) {
        let best = o.best().1;
        report.demand(best <= BEST, || {
            format!("f32: a best test error of {best:.1e}, not {BEST:.0e} or less")
        });
    }
    Ok(())
}

fn print(outcomes: &[Outcome]) {
    let mut table = Table::new([
        "precision",
        "train MSE, last 50",
        "test MSE, best",
        "at iteration",
        "median of 2nd half",
        "field error",
        "ms/iteration",
        "bytes kept",
    ]);
    for o in outcomes {
        let (iteration, best) = o.best();
        table.row([
            o.dtype.name().to_owned(),
            sci(o.last()),
            sci(best),
            iteration.to_string(),
            sci(o.later()),
            format!("{:.1} %", 100.0 * o.field_error),
            format!("{:.2}", o.milliseconds),
            o.stats.bytes_kept.to_string(),
        ]);
    }
    print!("{table}");
}

fn figures(o: &Outcome) -> serde_json::Value {
    let (iteration, best) = o.best();
    json!({
        "precision": o.dtype.name(),
        "train_mse_last": o.last(),
        "test_mse_best": best,
        "iteration_best": iteration,
        "test_mse_median_of_second_half": o.later(),
        "field_error": o.field_error,
        "milliseconds": o.milliseconds,
        "bytes_kept": o.stats.bytes_kept,
        "evaluations": o.stats.evaluations,
        "retries": o.stats.retries,
    })
}
