//! A neural ODE that carries one point to another, and whose gradient is checked.
//!
//! `cargo run --release --example scratch_regression` (a minute; `--smoke`: seconds).  The task of
//! NeuroDiffEqLab's notebook 1: from (0, 0) to (1, 1) in 100 steps of RK4, by a network with a layer
//! norm.  The notebook's own adjoint is not the gradient of its loss; this one is, which is printed.
//! Writes the loss curves, trajectories and the field that was learnt.

mod check;
mod network;
mod picture;
mod training;

use std::process::ExitCode;

use candle_core::Device;
use clap::Parser;
use serde_json::json;

use crate::check::Check;
use crate::training::{train, Outcome};
use common::dtype::Dtype;
use common::flags::Flags;
use common::report::{self, Report};
use common::table::{sci, Table};
use common::{progress, Result};

/// The notebook's schedule.
const EPOCHS: u32 = 2000;
/// What the loss must be below, and when.
const LOSS: f64 = 1e-3;
const BY: usize = 100;
/// What a gradient in f64 may be off by: against the tape, and against differences.
const EXACT: f64 = 1e-11;
const DIFFERENCES: f64 = 1e-5;

/// Carries (0, 0) to (1, 1).
#[derive(Parser)]
struct Args {
    #[command(flatten)]
    flags: Flags,
    /// At most; training stops when the best loss is 150 epochs old [default: 2000, and 5 with --smoke].
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
    epochs: Option<u32>,
}

fn main() -> ExitCode {
    let args = Args::parse();
    report::run("scratch_regression", &args.flags, |device, report| {
        run(&args, device, report)
    })
}

fn run(args: &Args, device: &Device, report: &mut Report) -> Result<()> {
    let Args { flags, epochs } = args;
    let epochs = epochs.unwrap_or(flags.size().pick(5, EPOCHS, EPOCHS)) as usize;
    let mut outcomes = vec![];
    for dtype in flags.precisions_among(&[Dtype::F32, Dtype::Bf16, Dtype::F16], &Dtype::ALL)? {
        let bar = progress(dtype.name(), epochs)?;
        outcomes.push(train(dtype, epochs, flags.seed, device, &bar)?);
        bar.finish_and_clear();
    }
    print(&outcomes);
    let mut checks = vec![];
    if let Some(first) = outcomes.first() {
        checks = check::run(&first.early, flags.seed)?;
        print_checks(&checks);
    }
    picture::draw(&report.picture(""), &outcomes)?;
    report.figure("runs", outcomes.iter().map(figures).collect::<Vec<_>>())?;
    let checked = |c: &Check| json!({ "gradient": c.name, "error": c.error });
    report.figure("checks", checks.iter().map(checked).collect::<Vec<_>>())?;
    demands(&outcomes, &checks, report);
    Ok(())
}

fn print(outcomes: &[Outcome]) {
    let mut table = Table::new([
        "precision",
        "loss, epoch 0",
        "epoch 100",
        "best",
        "at epoch",
        "epochs",
        "ms/epoch",
    ]);
    for o in outcomes {
        table.row([
            o.dtype.name().to_owned(),
            sci(o.losses[0]),
            o.at(BY).map_or("-".to_owned(), sci),
            sci(o.best()),
            o.best_epoch.to_string(),
            o.losses.len().to_string(),
            format!("{:.1}", o.milliseconds),
        ]);
    }
    println!("{table}");
}

fn print_checks(checks: &[Check]) {
    let mut table = Table::new(["gradient, early in training", "relative error"]);
    for check in checks {
        table.row([check.name.clone(), sci(check.error)]);
    }
    print!("{table}");
}

fn figures(o: &Outcome) -> serde_json::Value {
    json!({
        "precision": o.dtype.name(),
        "loss_first": o.losses[0],
        "loss_best": o.best(),
        "epoch_best": o.best_epoch,
        "epochs": o.losses.len(),
        "milliseconds": o.milliseconds,
    })
}

fn demands(outcomes: &[Outcome], checks: &[Check], report: &mut Report) {
    for o in outcomes {
        let name = o.dtype.name();
        let loss = o.at(BY).unwrap_or(f64::NAN);
        report.demand(loss < LOSS, || {
            format!("{name}: a loss of {loss:.1e} in epoch {BY}, not below {LOSS:.0e}")
        });
    }
    for check in checks {
        report.demand(check.error <= check.limit, || {
            format!("{}: off by {:.1e}", check.name, check.error)
        });
    }
}
