//! Tells spirals that turn to the left from those that turn to the right, of which up to 70 % was not seen.
//!
//! `cargo run --release --example cde_spirals` (`--smoke`: seconds).  The setting of torchcde's example,
//! at irregular times: 128 series of 100 points, 8 features driven by a Hermite path through what was seen, F a
//! perceptron 8-128-24; 0, 30, 50 and 70 % of the coordinates are missing, each by itself.  Prints accuracies on other
//! series; draws paths and progress.  Exits with 1 when an accuracy is below 97 %.

mod picture;
mod spirals;

use std::process::ExitCode;

use candle_core::Device;
use clap::Parser;
use serde_json::json;

use crate::spirals::{paths, spirals, times, CHANNELS};
use common::dtype::Dtype;
use common::flags::Flags;
use common::path_classifier::{train, Labelled, Outcome, Setting};
use common::random::generator;
use common::report::{self, Report};
use common::table::{sci, Table};
use common::{progress, Result};

/// Shares of missing coordinates, and what the accuracy must be.
const MISSING: [f64; 4] = [0.0, 0.3, 0.5, 0.7];
const ACCURACY: f64 = 0.97;
const SERIES: usize = 128;

/// Tells left from right.
#[derive(Parser)]
struct Args {
    #[command(flatten)]
    flags: Flags,
    /// Passes over the training data [default: 30, and 1 with --smoke].
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
    epochs: Option<u32>,
}

/// A training run.
pub(crate) struct Run {
    pub(crate) dtype: Dtype,
    pub(crate) missing: f64,
    pub(crate) times: Vec<f64>,
    pub(crate) training: Labelled,
    pub(crate) outcome: Outcome,
}

fn main() -> ExitCode {
    let args = Args::parse();
    report::run("cde_spirals", &args.flags, |device, report| {
        run(&args, device, report)
    })
}

fn run(args: &Args, device: &Device, report: &mut Report) -> Result<()> {
    let epochs = args.epochs.unwrap_or(args.flags.size().pick(1, 30, 30));
    let setting = Setting {
        hidden: 8,
        width: 128,
        epochs: epochs as usize,
        batch: 32,
        rate: 3e-3,
    };
    let mut runs = vec![];
    for dtype in args.flags.precisions(&[Dtype::F32, Dtype::Bf16])? {
        for missing in MISSING {
            let bar = progress(dtype.name(), setting.updates(SERIES))?;
            let mut rng = generator(args.flags.seed);
            let times = times(&mut rng);
            let training = spirals(SERIES, &times, missing, &mut rng)?;
            let test = spirals(SERIES, &times, missing, &mut rng)?;
            let outcome = train(
                &setting,
                [&training, &test],
                (&|seen| paths(&times, seen), CHANNELS),
                (dtype, args.flags.seed),
                device,
                &bar,
            )?;
            bar.finish_and_clear();
            runs.push(Run {
                dtype,
                missing,
                times,
                training,
                outcome,
            });
        }
    }
    print(&runs);
    picture::draw(&report.picture(""), &runs)?;
    report.figure("epochs", setting.epochs)?;
    report.figure("runs", runs.iter().map(figures).collect::<Vec<_>>())?;
    for run in &runs {
        let (right, missing) = (run.outcome.accuracy(), 100.0 * run.missing);
        report.demand(right >= ACCURACY, || {
            let name = run.dtype.name();
            format!("{name}, {missing:.0} % missing: {right:.3} right, not {ACCURACY}")
        });
    }
    Ok(())
}

fn print(runs: &[Run]) {
    let mut table = Table::new([
        "precision",
        "missing",
        "test accuracy",
        "last loss",
        "NFE forward",
        "ms/update",
    ]);
    for Run {
        dtype,
        missing,
        outcome,
        ..
    } in runs
    {
        table.row([
            dtype.name().to_owned(),
            format!("{:.0} %", 100.0 * missing),
            format!("{:.1} %", 100.0 * outcome.accuracy()),
            sci(outcome.loss()),
            format!("{:.0}", outcome.evaluations),
            format!("{:.0}", outcome.milliseconds),
        ]);
    }
    print!("{table}");
}

fn figures(run: &Run) -> serde_json::Value {
    json!({
        "precision": run.dtype.name(),
        "missing": run.missing,
        "test_accuracy": run.outcome.accuracy(),
        "last_loss": run.outcome.loss(),
        "evaluations_forward": run.outcome.evaluations,
        "milliseconds": run.outcome.milliseconds,
    })
}
