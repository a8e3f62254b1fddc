//! Learns y' = y³A from its trajectory, in f32, bf16 and f16.
//!
//! `cargo run --release --example ode_demo` (a minute; `--smoke`: seconds; `--full`: the published
//! size).  Prints a table, writes a picture and the figures of the table as JSON beside it.  Exits
//! with 1 when a precision has not learnt, or a low one has learnt less than f32.

mod picture;
mod spiral;
mod training;

use std::process::ExitCode;

use candle_core::Device;
use clap::Parser;
use serde_json::json;

use crate::spiral::{Spiral, Trajectory};
use crate::training::{train, Outcome, Setting};
use common::dtype::Dtype;
use common::flags::Flags;
use common::report::{self, Report};
use common::table::{sci, Table};
use common::{progress, Result};

/// How much lower the loss must end than it began.
const LEARNT: f64 = 10.0;
/// How much higher than in f32 it may end in low precision.
const LOW: f64 = 1.5;

/// Trains a neural ODE on a spiral in several precisions.
#[derive(Parser)]
struct Args {
    #[command(flatten)]
    flags: Flags,
    /// Iterations in each precision [default: of the size].
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
    iters: Option<u32>,
}

fn main() -> ExitCode {
    let args = Args::parse();
    report::run("ode_demo", &args.flags, |device, report| {
        run(&args, device, report)
    })
}

fn run(args: &Args, device: &Device, report: &mut Report) -> Result<()> {
    let size = args.flags.size();
    let (small, published) = (Setting::SMALL, Setting::PUBLISHED);
    let mut setting = size.pick(small.for_iterations(30), small, published);
    if let Some(iterations) = args.iters {
        setting = setting.for_iterations(iterations as usize);
    }
    let data = Trajectory::new(size.pick(&Spiral::SMALL, &Spiral::SMALL, &Spiral::PUBLISHED))?;
    let mut outcomes = vec![];
    for dtype in args
        .flags
        .precisions(&[Dtype::F32, Dtype::Bf16, Dtype::F16])?
    {
        let bar = progress(dtype.name(), setting.iterations)?;
        outcomes.push(train(
            &data,
            dtype,
            &setting,
            args.flags.seed,
            device,
            &bar,
        )?);
        bar.finish_and_clear();
    }
    print(&outcomes);
    picture::draw(&report.picture(""), &data, &outcomes)?;
    report.figure("iterations", setting.iterations)?;
    report.figure("runs", outcomes.iter().map(json).collect::<Vec<_>>())?;
    demands(&outcomes, report);
    Ok(())
}

fn print(outcomes: &[Outcome]) {
    let mut table = Table::new([
        "precision",
        "loss, first",
        "last",
        "trajectory L1",
        "field error",
        "ms forward",
        "backward",
        "bytes kept",
        "retries",
    ]);
    for o in outcomes {
        table.row([
            o.dtype.name().to_owned(),
            sci(o.first()),
            sci(o.last()),
            format!("{:.4}", o.trajectory_error),
            format!("{:.2} %", 100.0 * o.field_error),
            format!("{:.2}", o.forward),
            format!("{:.2}", o.backward),
            o.stats.bytes_kept.to_string(),
            o.stats.retries.to_string(),
        ]);
    }
    print!("{table}");
}

fn json(o: &Outcome) -> serde_json::Value {
    json!({
        "precision": o.dtype.name(),
        "loss_first": o.first(),
        "loss_last": o.last(),
        "trajectory_l1": o.trajectory_error,
        "field_error": o.field_error,
        "forward_ms": o.forward,
        "backward_ms": o.backward,
        "bytes_kept": o.stats.bytes_kept,
        "vjps": o.stats.vjps,
        "retries": o.stats.retries,
    })
}

/// Every precision must learn, and low ones as well as f32.  NaN misses.
fn demands(outcomes: &[Outcome], report: &mut Report) {
    let f32 = outcomes.iter().find(|o| o.dtype == Dtype::F32);
    for o in outcomes {
        let (name, gain) = (o.dtype.name(), o.first() / o.last());
        report.demand(gain >= LEARNT, || {
            format!("{name}: the loss fell by {gain:.1} only")
        });
        if let Some(f32) = f32 {
            let ratio = o.last() / f32.last();
            report.demand(ratio <= LOW, || {
                format!("{name}: the loss is {ratio:.2} times that of f32")
            });
        }
    }
}
