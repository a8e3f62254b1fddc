//! Long series in few steps: a neural rough differential equation sees a window of points by its log-signature.
//!
//! `cargo run --release --example neural_rde` (a minute or two; `--smoke`: seconds).  256 series of 513 points of
//! dX = (−X ± 2 J X) dt + dW in the plane, which turn to the left or to the right, and nothing else tells them apart.  One
//! step of the midpoint rule takes a window of 1 to 128 points: by its end points alone (depth 1), or by the area between
//! the path and its chord too (depth 2).  Prints accuracy and evaluations; draws a window and accuracies.  Exits with 1 when
//! depth 2 does not tell them apart in four steps, or depth 1 does.

mod data;
mod picture;

use std::process::ExitCode;

use candle_core::Device;
use clap::Parser;
use serde_json::json;

use crate::data::{paths, series, Depth};
use common::dtype::Dtype;
use common::flags::Flags;
use common::path_classifier::{train, Outcome, Setting};
use common::random::generator;
use common::report::{self, Report};
use common::table::{sci, Table};
use common::{progress, Result};

/// Points of a window; the longest leaves four steps.
const WINDOWS: [usize; 4] = [1, 8, 32, 128];
const LONGEST: usize = 128;
/// What depth 2 must reach with every window, and what depth 1 cannot reach with the longest.
const RIGHT: f64 = 0.95;
const BLIND: f64 = 0.75;

/// Tells the senses of turning apart.
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
    pub(crate) window: usize,
    pub(crate) depth: Depth,
    pub(crate) outcome: Outcome,
}

fn main() -> ExitCode {
    let args = Args::parse();
    report::run("neural_rde", &args.flags, |device, report| {
        run(&args, device, report)
    })
}

fn run(args: &Args, device: &Device, report: &mut Report) -> Result<()> {
    let (size, seed) = (args.flags.size(), args.flags.seed);
    let count = size.pick(32, 256, 1024);
    let epochs = args.epochs.unwrap_or(size.pick(1, 30, 30));
    let setting = Setting {
        hidden: 8,
        width: 32,
        epochs: epochs as usize,
        batch: 32,
        rate: 5e-3,
    };
    let mut rng = generator(seed);
    let training = series(count, &mut rng, 2 * seed)?;
    let test = series(count, &mut rng, 2 * seed + 1)?;
    let mut runs = vec![];
    for dtype in args.flags.precisions(&[Dtype::F32, Dtype::Bf16])? {
        for depth in [Depth::One, Depth::Two] {
            // Of one point at a time there is no area.
            for window in WINDOWS
                .into_iter()
                .filter(|w| *w > 1 || depth == Depth::One)
            {
                let bar = progress(dtype.name(), setting.updates(count))?;
                let outcome = train(
                    &setting,
                    [&training, &test],
                    (&|values| paths(values, window, depth), depth.channels()),
                    (dtype, seed),
                    device,
                    &bar,
                )?;
                bar.finish_and_clear();
                runs.push(Run {
                    dtype,
                    window,
                    depth,
                    outcome,
                });
            }
        }
    }
    print(&runs);
    picture::draw(&report.picture(""), &runs, &test)?;
    report.figure("series", count)?;
    report.figure("epochs", setting.epochs)?;
    report.figure("runs", runs.iter().map(figures).collect::<Vec<_>>())?;
    for run in &runs {
        let right = run.outcome.accuracy();
        let holds = match run.depth {
            Depth::Two => right >= RIGHT,
            Depth::One => run.window != LONGEST || right <= BLIND,
        };
        report.demand(holds, || {
            let (name, depth) = (run.dtype.name(), run.depth.number());
            format!(
                "{name}, depth {depth}, window {}: {right:.3} right",
                run.window
            )
        });
    }
    Ok(())
}

fn print(runs: &[Run]) {
    let mut table = Table::new([
        "precision",
        "depth",
        "window",
        "NFE forward",
        "test accuracy",
        "last loss",
        "ms/update",
    ]);
    for run in runs {
        table.row([
            run.dtype.name().to_owned(),
            run.depth.number().to_string(),
            run.window.to_string(),
            format!("{:.0}", run.outcome.evaluations),
            format!("{:.1} %", 100.0 * run.outcome.accuracy()),
            sci(run.outcome.loss()),
            format!("{:.1}", run.outcome.milliseconds),
        ]);
    }
    print!("{table}");
}

fn figures(run: &Run) -> serde_json::Value {
    json!({
        "precision": run.dtype.name(),
        "depth": run.depth.number(),
        "window": run.window,
        "evaluations_forward": run.outcome.evaluations,
        "test_accuracy": run.outcome.accuracy(),
        "last_loss": run.outcome.loss(),
        "milliseconds": run.outcome.milliseconds,
    })
}
