//! Tells speakers apart by a neural controlled differential equation along their speech.
//!
//! `cargo run --release --example neural_cde` (minutes; `--smoke`: seconds).  Japanese Vowels: 270 utterances of nine
//! speakers to train on and 370 to test, 12 coefficients in 7 to 29 frames (see LICENCE.md).  A path through the frames
//! of an utterance, with time as a channel, drives 32 features; a perceptron 32-40-40-40-416 gives F.  Three seeds in f32
//! and in bf16.  `--path linear` takes straight lines, `--path log-signature` one step for four frames (a neural rough
//! differential equation).  Prints accuracy, evaluations and time; draws confusions and progress.

mod data;
mod picture;
mod training;

use std::process::ExitCode;

use candle_core::Device;
use clap::Parser;
use serde_json::json;

use crate::data::{Data, Kind};
use crate::training::{train, Outcome, Setting, BATCH};
use common::dtype::Dtype;
use common::flags::Flags;
use common::report::{self, Report};
use common::table::Table;
use common::{mean, progress, Result};

/// What the mean accuracy must be, also with a quarter of the evaluations, and how far below that of f32 it may be in
/// low precision.
const ACCURACY: f64 = 0.96;
const FEWER: f64 = 0.9;
const LOW: f64 = 0.01;

/// What torchcde 0.2.5 with torchdiffeq 0.2.5 has on these data, in f32, one seed, 75 updates of 90 utterances, by
/// dopri5 at (1e-3, 1e-6) on the linear path and a readout of the last state: norm of the backward solve, test accuracy,
/// evaluations forward and backward.
const TORCHCDE: [(&str, f64, f64, f64); 2] = [
    ("torchcde", 0.946, 210.0, 505.0),
    ("torchcde, seminorm", 0.938, 211.0, 244.0),
];

/// Tells speakers apart.
#[derive(Parser)]
struct Args {
    #[command(flatten)]
    flags: Flags,
    /// The path through the frames of an utterance.
    #[arg(long = "path", value_enum, default_value_t = Kind::Hermite)]
    kind: Kind,
    /// Passes over the training data [default: 40, and 1 with --smoke].
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
    epochs: Option<u32>,
    /// Runs in each precision [default: 3, and 1 with --smoke].
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..))]
    seeds: Option<u64>,
    /// Deviation of the noise on training data, in units of theirs.
    #[arg(long, default_value_t = 0.3)]
    noise: f64,
    /// The first learning rate.
    #[arg(long, default_value_t = 4e-3)]
    rate: f64,
}

fn main() -> ExitCode {
    let args = Args::parse();
    report::run("neural_cde", &args.flags, |device, report| {
        run(&args, device, report)
    })
}

fn run(args: &Args, device: &Device, report: &mut Report) -> Result<()> {
    let size = args.flags.size();
    let setting = Setting {
        kind: args.kind,
        epochs: args.epochs.unwrap_or(size.pick(1, 40, 40)) as usize,
        rate: args.rate,
        noise: args.noise,
    };
    let seeds = args.seeds.unwrap_or(size.pick(1, 3, 3));
    let data = Data::read()?;
    let updates = setting.epochs * data.training.len() / BATCH;
    let mut outcomes = vec![];
    for dtype in args.flags.precisions(&[Dtype::F32, Dtype::Bf16])? {
        for seed in (0..seeds).map(|i| args.flags.seed + i) {
            let bar = progress(dtype.name(), updates)?;
            outcomes.push(train(&data, &setting, dtype, seed, device, &bar)?);
            bar.finish_and_clear();
        }
    }
    print(&outcomes);
    picture::draw(&report.picture(""), &outcomes)?;
    report.figure("updates", updates)?;
    report.figure("runs", outcomes.iter().map(figures).collect::<Vec<_>>())?;
    let single = accuracy_in(&outcomes, Dtype::F32);
    let least = match args.kind {
        Kind::LogSignature => FEWER,
        _ => ACCURACY,
    };
    report.demand(single.is_none_or(|a| a >= least), || {
        format!("f32: a mean accuracy below {:.0} %", 100.0 * least)
    });
    let low = accuracy_in(&outcomes, Dtype::Bf16);
    if let Some((single, low)) = single.zip(low) {
        report.demand(low >= single - LOW, || {
            format!("bf16: {:.1} points below f32", 100.0 * (single - low))
        });
    }
    Ok(())
}

/// Mean over the seeds.
fn accuracy_in(outcomes: &[Outcome], dtype: Dtype) -> Option<f64> {
    let of = outcomes.iter().filter(|o| o.dtype == dtype);
    let all: Vec<f64> = of.map(Outcome::accuracy).collect();
    (!all.is_empty()).then(|| mean(&all))
}

fn print(outcomes: &[Outcome]) {
    let mut table = Table::new([
        "precision",
        "seed",
        "test accuracy",
        "training",
        "NFE forward",
        "backward",
        "ms/update",
        "bytes kept",
    ]);
    for o in outcomes {
        table.row([
            o.dtype.name().to_owned(),
            o.seed.to_string(),
            format!("{:.1} %", 100.0 * o.accuracy()),
            format!("{:.1} %", 100.0 * o.training),
            format!("{:.0}", o.evaluations),
            format!("{:.0}", o.backward),
            format!("{:.0}", o.milliseconds),
            o.stats.bytes_kept.to_string(),
        ]);
    }
    for (name, accuracy, forward, backward) in TORCHCDE {
        table.row([
            format!("f32, {name}"),
            "0".to_owned(),
            format!("{:.1} %", 100.0 * accuracy),
            "100.0 %".to_owned(),
            format!("{forward:.0}"),
            format!("{backward:.0}"),
            "-".to_owned(),
            "-".to_owned(),
        ]);
    }
    print!("{table}");
    for dtype in [Dtype::F32, Dtype::Bf16, Dtype::F16] {
        if let Some(accuracy) = accuracy_in(outcomes, dtype) {
            println!(
                "{}: mean test accuracy {:.2} %",
                dtype.name(),
                100.0 * accuracy
            );
        }
    }
}

fn figures(o: &Outcome) -> serde_json::Value {
    json!({
        "precision": o.dtype.name(),
        "seed": o.seed,
        "test_accuracy": o.accuracy(),
        "training_accuracy": o.training,
        "evaluations_forward": o.evaluations,
        "evaluations_backward": o.backward,
        "milliseconds": o.milliseconds,
        "parameters": o.parameters,
        "bytes_kept": o.stats.bytes_kept,
        "evaluations": o.stats.evaluations,
        "recomputed": o.stats.recomputed,
    })
}
