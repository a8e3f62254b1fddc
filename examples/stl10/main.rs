//! Classifies STL-10 with three convolutional neural ODEs whose weights are piecewise constant in
//! time, in f32 and bf16.
//!
//! `cargo run --release --example stl10 -- --data DIR` (minutes; `--smoke`: seconds; `--full`: the
//! published size, for a GPU).  DIR holds the official binary files; without them it says so, and
//! trains on a drawn stand-in of the same shapes.  Prints losses, accuracies, time and memory; draws
//! losses, and what becomes of a perturbation with both signs of the field.

mod data;
mod field;
mod network;
mod picture;
mod training;

use std::path::PathBuf;
use std::process::ExitCode;

use candle_core::Device;
use clap::Parser;
use serde_json::json;

use crate::data::Data;
use crate::field::Sign;
use crate::network::Filters;
use crate::training::{train, Outcome, Setting};
use common::dtype::Dtype;
use common::flags::{Flags, Size};
use common::random::generator;
use common::report::{self, Report};
use common::table::Table;
use common::{progress, Result};

/// How far the last loss in low precision may be above that in f32.
const LOW: f64 = 1.25;
/// How far a perturbation may have grown with the stable sign.
const STABLE: f64 = 1.0;

const SMALL: Setting = Setting {
    width: 8,
    side: 24,
    batch: 16,
    epochs: 5,
    rate: 0.1,
    filters: Filters::ByWidth(0.5),
    clip: 1.0,
    counts: [320, 80, 80],
};
const SMOKE: Setting = Setting {
    width: 4,
    side: 16,
    batch: 8,
    epochs: 1,
    counts: [32, 8, 16],
    ..SMALL
};
/// Not clipped.
const PUBLISHED: Setting = Setting {
    width: 128,
    side: 128,
    batch: 16,
    epochs: 160,
    rate: 0.05,
    filters: Filters::Constant(0.1),
    clip: f64::INFINITY,
    counts: [4000, 1000, 8000],
};

/// Classifies STL-10.
#[derive(Parser)]
struct Args {
    #[command(flatten)]
    flags: Flags,
    /// The folder of train_X.bin, train_y.bin, test_X.bin and test_y.bin.
    #[arg(long, value_name = "DIR")]
    data: Option<PathBuf>,
    /// Epochs [default: of the size].
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
    epochs: Option<u32>,
    /// Trains with the other sign of the field.
    #[arg(long)]
    unstable: bool,
}

fn main() -> ExitCode {
    let args = Args::parse();
    report::run("stl10", &args.flags, |device, report| {
        run(&args, device, report)
    })
}

fn run(args: &Args, device: &Device, report: &mut Report) -> Result<()> {
    let flags = &args.flags;
    let mut setting = flags.size().pick(SMOKE, SMALL, PUBLISHED);
    if let Some(epochs) = args.epochs {
        setting.epochs = epochs as usize;
    }
    let sign = match args.unstable {
        true => Sign::Unstable,
        false => Sign::Stable,
    };
    let data = load(args, &setting)?;
    let mut outcomes = vec![];
    let can_be = [Dtype::F32, Dtype::Bf16, Dtype::F16];
    for dtype in flags.precisions_among(&can_be[..2], &can_be)? {
        let bar = progress(dtype.name(), 0)?;
        outcomes.push(train(
            &data, dtype, sign, &setting, flags.seed, device, &bar,
        )?);
        bar.finish_and_clear();
    }
    print(&data, &setting, &outcomes);
    picture::draw(&report.picture(""), &data, &outcomes)?;
    report.figure("data", &data.name)?;
    report.figure("setting", format!("{setting:?}, {sign:?}"))?;
    report.figure("runs", outcomes.iter().map(figures).collect::<Vec<_>>())?;
    demands(&outcomes, report);
    Ok(())
}

/// The files, or the stand-in.
fn load(args: &Args, setting: &Setting) -> Result<Data> {
    const WHERE: &str =
        "Unpack https://ai.stanford.edu/~acoates/stl10/stl10_binary.tar.gz and say \
                         where: --data DIR";
    let mut rng = generator(args.flags.seed);
    match (&args.data, args.flags.size()) {
        (Some(dir), _) => Data::read(dir, setting.counts, &mut rng),
        (None, Size::Full) => {
            Err(format!("the published size is for STL-10 alone.  {WHERE}").into())
        }
        (None, _) => {
            eprintln!("NOT STL-10: what follows is of drawn stripes.  {WHERE}\n");
            Ok(Data::stand_in(setting.counts, &mut rng))
        }
    }
}

fn print(data: &Data, setting: &Setting, outcomes: &[Outcome]) {
    let line = |what: &str, data: &str, setting: &Setting, parameters: usize| {
        let Setting {
            width,
            side,
            batch,
            epochs,
            ..
        } = setting;
        println!(
            "{what}: {data}, of {side} x {side} pixels; {width} channels, {parameters} parameters; \
             {epochs} epochs in batches of {batch}"
        );
    };
    let parameters = outcomes.first().map_or(0, |o| o.parameters);
    line("here", &data.name, setting, parameters);
    let all = "STL-10, 4000 + 1000 images";
    line("published", all, &PUBLISHED, 12_565_002);
    println!();
    let mut table = Table::new([
        "precision",
        "loss, first 10",
        "last 10",
        "validation",
        "test",
        "ms forward",
        "backward",
        "states kept, MB",
        "perturbation, −",
        "+",
    ]);
    for o in outcomes {
        let at_end = |growth: &[(f64, f64)]| growth.last().map_or(f64::NAN, |g| g.1);
        table.row([
            o.dtype.name().to_owned(),
            format!("{:.3}", o.first()),
            format!("{:.3}", o.last()),
            format!("{:.1} %", 100.0 * o.validation),
            format!("{:.1} %", 100.0 * o.test),
            format!("{:.0}", o.forward),
            format!("{:.0}", o.backward),
            format!("{:.2}", o.stats.bytes_kept as f64 / 1e6),
            format!("{:.2}", at_end(&o.perturbations.stable)),
            format!("{:.2}", at_end(&o.perturbations.unstable)),
        ]);
    }
    print!("{table}");
}

fn figures(o: &Outcome) -> serde_json::Value {
    json!({
        "precision": o.dtype.name(),
        "loss_first": o.first(),
        "loss_last": o.last(),
        "validation": o.validation,
        "test": o.test,
        "parameters": o.parameters,
        "forward_ms": o.forward,
        "backward_ms": o.backward,
        "bytes_kept": o.stats.bytes_kept,
        "evaluations": o.stats.evaluations,
        "retries": o.stats.retries,
        "perturbation_stable": o.perturbations.stable,
        "perturbation_unstable": o.perturbations.unstable,
        "perturbation_stable_in_few_steps": o.perturbations.coarse,
        "perturbation_learnt": o.perturbations.learnt,
    })
}

fn demands(outcomes: &[Outcome], report: &mut Report) {
    let f32 = outcomes.iter().find(|o| o.dtype == Dtype::F32);
    for o in outcomes {
        let (name, first, last) = (o.dtype.name(), o.first(), o.last());
        report.demand(last < first, || {
            format!("{name}: the loss went from {first:.3} to {last:.3}")
        });
        if let Some(f32) = f32 {
            report.demand(last <= LOW * f32.last(), || {
                format!("{name}: a loss of {last:.3}, in f32 {:.3}", f32.last())
            });
        }
        let stable = &o.perturbations.stable;
        let largest = stable.iter().map(|g| g.1).fold(0.0, f64::max);
        report.demand(largest <= STABLE, || {
            format!("{name}: a perturbation grew to {largest:.2} with the stable sign")
        });
    }
}
