//! Classifies MNIST with a convolutional neural ODE, in f32 and bf16.
//!
//! `cargo run --release --example ode_mnist -- --data DIR` (minutes; `--smoke`: seconds; `--full`:
//! the published size).  Trains on the files that it finds in DIR: on the full set, or on 9000 of the
//! test images with 1000 held out.  `--adaptive TOL` takes adaptive steps of DOPRI5 instead of fixed ones of
//! RK4, each image its own, and writes `ode_mnist_adaptive`.  `mpirun -n N … --mpi` shares every batch among N
//! processes.  Prints accuracy, evaluations, time and memory; draws confusions
//! and progress.

mod network;
mod picture;
mod training;

use std::path::PathBuf;
use std::process::ExitCode;

use candle_core::Device;
use clap::Parser;
use serde_json::json;

use crate::network::{Field, Layout};
use crate::training::{train, Outcome, Setting};
use common::dtype::Dtype;
use common::flags::{Flags, Size};
use common::mnist::Data;
use common::random::generator;
use common::report::{self, Report};
use common::table::Table;
use common::team::{Team, Together};
use common::{memory, progress, Result};

/// What the accuracy must be in f32, and how far below it may be in low precision.
const ACCURACY: f64 = 0.96;
const LOW: f64 = 0.005;

/// One in so many of the test images is held out, where there are no others to train on.
const HELD: usize = 10;

/// The published stem has another convolution, of the whole image.
const SMALL: Setting = Setting {
    layout: Layout {
        stem: &[[4, 2, 1], [4, 2, 1]],
        channels: 32,
        groups: 8,
        field: Field::Plain,
        steps: 4,
        tolerance: None,
    },
    batch: 64,
    epochs: 8,
    rate: 0.1,
    shift: 1,
};
/// rampde's: its learning rate drops by 10 at three epochs, ours falls along a cosine.
const PUBLISHED: Setting = Setting {
    layout: Layout {
        stem: &[[3, 1, 0], [4, 2, 1], [4, 2, 1]],
        channels: 64,
        groups: 32,
        field: Field::Normed,
        steps: 31,
        tolerance: None,
    },
    batch: 128,
    epochs: 160,
    rate: 0.1,
    shift: 4,
};

/// Classifies MNIST.
#[derive(Parser)]
struct Args {
    #[command(flatten)]
    flags: Flags,
    #[command(flatten)]
    together: Together,
    /// The folder of MNIST's four files, or of the two of the test set, gzipped or not.
    #[arg(long, value_name = "DIR", default_value = "data/mnist")]
    data: PathBuf,
    /// Epochs [default: of the size].
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
    epochs: Option<u32>,
    /// Adaptive steps of DOPRI5 with this relative and absolute tolerance.
    #[arg(long, value_name = "TOL")]
    adaptive: Option<f64>,
}

fn main() -> ExitCode {
    let args = Args::parse();
    let name = match args.adaptive {
        Some(_) => "ode_mnist_adaptive",
        None => "ode_mnist",
    };
    let team = args.together.team();
    report::run_together(name, &args.flags, team, |team, device, report| {
        run(&args, team, device, report)
    })
}

fn run(args: &Args, team: &Team, device: &Device, report: &mut Report) -> Result<()> {
    let flags = &args.flags;
    let smallest = Setting {
        layout: Layout {
            channels: 8,
            steps: 2,
            ..SMALL.layout
        },
        epochs: 1,
        ..SMALL
    };
    let mut setting = flags.size().pick(smallest, SMALL, PUBLISHED);
    if let Some(epochs) = args.epochs {
        setting.epochs = epochs as usize;
    }
    setting.layout.tolerance = args.adaptive;
    let mut rng = generator(flags.seed);
    let smoke = flags.size() == Size::Smoke;
    let data = Data::read_or_draw(&args.data, HELD, smoke, &mut rng)?;
    let mut outcomes = vec![];
    let can_be = [Dtype::F32, Dtype::Bf16, Dtype::F16];
    for dtype in flags.precisions_among(&can_be[..2], &can_be)? {
        let bar = progress(dtype.name(), 0)?;
        let group = team.group();
        outcomes.push(train(
            group, &data, dtype, &setting, flags.seed, device, &bar,
        )?);
        bar.finish_and_clear();
    }
    if !team.leads() {
        return Ok(());
    }
    print(&data, &setting, &outcomes);
    picture::draw(&report.picture(""), &data, &outcomes)?;
    report.figure("data", &data.name)?;
    report.figure("setting", format!("{setting:?}"))?;
    report.figure("runs", outcomes.iter().map(figures).collect::<Vec<_>>())?;
    demands(&outcomes, report);
    Ok(())
}

fn print(data: &Data, setting: &Setting, outcomes: &[Outcome]) {
    let line = |what: &str, data: &str, setting: &Setting| {
        let Setting {
            layout,
            batch,
            epochs,
            shift,
            ..
        } = setting;
        let Layout {
            stem,
            channels,
            field,
            steps,
            tolerance,
            ..
        } = layout;
        let steps = match tolerance {
            Some(tol) => format!("adaptive steps at {tol:e}"),
            None => format!("{steps} steps"),
        };
        let convs = stem.len();
        println!(
            "{what}: {data}, moved by {shift} pixels at most; {convs} convolutions, {channels} channels, \
             {field:?} field, {steps}; {epochs} epochs in batches of {batch}"
        );
    };
    line("here", &data.name, setting);
    line("published", "MNIST, 60000 and 10000 images", &PUBLISHED);
    println!();
    let mut table = Table::new([
        "precision",
        "accuracy",
        "train loss",
        "NFE forward",
        "NFE backward",
        "ms/iteration",
        "seconds",
        "states kept, MB",
    ]);
    for o in outcomes {
        let passes = (o.iterations * o.ranks) as f64;
        let each = |count: usize| format!("{:.0}", count as f64 / passes);
        table.row([
            o.dtype.name().to_owned(),
            format!("{:.2} %", 100.0 * o.accuracy()),
            format!("{:.4}", o.loss()),
            each(o.stats.evaluations),
            each(o.stats.recomputed + o.stats.vjps),
            format!("{:.0}", o.milliseconds),
            format!("{:.0}", o.seconds),
            format!("{:.1}", o.stats.bytes_kept as f64 / 1e6),
        ]);
    }
    print!("{table}");
    for o in outcomes
        .iter()
        .filter(|_| setting.layout.tolerance.is_some())
    {
        let by_epoch = o.epochs.iter().map(|e| format!("{:.1}", e.evaluations));
        let by_epoch = by_epoch.collect::<Vec<_>>().join(", ");
        println!(
            "evaluations by image and epoch, {}: {by_epoch}",
            o.dtype.name()
        );
    }
    if let (Some(first), Some(peak)) = (outcomes.first(), memory::peak()) {
        let megabytes = peak as f64 / 1e6;
        println!(
            "\n{} parameters; {megabytes:.0} MB held by the process at most",
            first.parameters
        );
    }
}

fn figures(o: &Outcome) -> serde_json::Value {
    json!({
        "precision": o.dtype.name(),
        "accuracy": o.epochs.iter().map(|e| e.accuracy).collect::<Vec<_>>(),
        "loss": o.epochs.iter().map(|e| e.loss).collect::<Vec<_>>(),
        "evaluations_by_image": o.epochs.iter().map(|e| e.evaluations).collect::<Vec<_>>(),
        "parameters": o.parameters,
        "iterations": o.iterations,
        "ranks": o.ranks,
        "evaluations": o.stats.evaluations,
        "recomputed": o.stats.recomputed,
        "vjps": o.stats.vjps,
        "retries": o.stats.retries,
        "milliseconds": o.milliseconds,
        "seconds": o.seconds,
        "bytes_kept": o.stats.bytes_kept,
    })
}

fn demands(outcomes: &[Outcome], report: &mut Report) {
    let f32 = outcomes.iter().find(|o| o.dtype == Dtype::F32);
    let f32 = f32.map_or(ACCURACY, Outcome::accuracy);
    report.demand(f32 >= ACCURACY, || {
        format!("f32: an accuracy of {:.2} %", 100.0 * f32)
    });
    for o in outcomes {
        let (name, accuracy) = (o.dtype.name(), o.accuracy());
        report.demand(accuracy >= f32 - LOW, || {
            format!(
                "{name}: {:.2} %, f32 has {:.2} %",
                100.0 * accuracy,
                100.0 * f32
            )
        });
    }
}
