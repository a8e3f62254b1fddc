//! Tells the parity of streams of bits that are given as events: recurrent models whose states flow between them beside others.
//!
//! `cargo run --release --example ode_lstm_xor` (minutes; `--smoke`: seconds).  "Learning long-term dependencies in
//! irregularly-sampled time series" (arXiv 2006.04418): a stream of bits becomes a list of runs, each a bit and how long it
//! lasts; the sought class is the exclusive or of all bits.  In ODE-RNN and ODE-LSTM the length of a run is the time over
//! which the state flows after the bit; the LSTM is told it as a number.  Unlike there, the parity is a target after every
//! run and not after the last alone, and the streams begin with two bits and become longer as they are learnt.  Prints
//! accuracies, writes a picture and the figures as JSON beside it.  Exits with 1 when a model that flows does not learn it,
//! or in bf16 less than in f32.

mod model;
mod streams;
mod training;

use std::process::ExitCode;

use candle_core::Device;
use clap::Parser;
use serde_json::json;

use crate::model::Kind;
use crate::training::{train, Outcome, Plan};
use common::chart::{colour, picture, Curve, Mark, Panel, SeriesLabelPosition};
use common::dtype::Dtype;
use common::flags::Flags;
use common::report::{self, Report};
use common::table::Table;
use common::{mean, Result};

/// The share of test streams whose parity must be right, in the mean over the seeds, and how much less in low precision.
const RIGHT: f64 = 0.99;
const LOW: f64 = 0.01;
/// Most updates of a model.
const UPDATES: usize = 4000;

/// Tells the parity of streams of bits.
#[derive(Parser)]
struct Args {
    #[command(flatten)]
    flags: Flags,
    /// Bits of the longest streams to train with.
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..65))]
    bits: u32,
    /// Most updates of each model [default: of the size].
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
    iters: Option<u32>,
    /// Trainings of each model [default: one, or five with --full].
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..))]
    seeds: Option<u64>,
}

fn main() -> ExitCode {
    let args = Args::parse();
    report::run("ode_lstm_xor", &args.flags, |device, report| {
        run(&args, device, report)
    })
}

fn run(args: &Args, device: &Device, report: &mut Report) -> Result<()> {
    let size = args.flags.size();
    let updates = size.pick(3, UPDATES, UPDATES);
    let plan = Plan {
        bits: args.bits as usize,
        updates: args.iters.map_or(updates, |n| n as usize),
    };
    let precisions = args.flags.precisions(&[Dtype::F32, Dtype::Bf16])?;
    let flowing = [Kind::OdeLstm, Kind::OdeRnn];
    let kinds = flowing
        .iter()
        .flat_map(|of| precisions.iter().map(|d| of(*d)));
    let kinds: Vec<_> = kinds.chain([Kind::Lstm]).collect();
    let seeds = args.seeds.unwrap_or(size.pick(1, 1, 5));
    let mut outcomes = vec![];
    for &kind in &kinds {
        for seed in (0..seeds).map(|i| args.flags.seed + i) {
            outcomes.push(train(kind, seed, plan, device)?);
        }
    }
    print(&outcomes, &kinds, plan.bits);
    draw(report, &outcomes, &kinds, plan.bits)?;
    report.figure("bits", plan.bits)?;
    report.figure("runs", outcomes.iter().map(figures).collect::<Vec<_>>())?;
    for of in flowing {
        let right = |dtype: Dtype| {
            let all = shares(&outcomes, of(dtype), plan.bits);
            (!all.is_empty()).then(|| mean(&all))
        };
        let single = right(Dtype::F32);
        let allowed = [
            (Dtype::F32, RIGHT),
            (Dtype::Bf16, single.unwrap_or(RIGHT) - LOW),
        ];
        for (dtype, least) in allowed {
            let Some(share) = right(dtype) else { continue };
            report.demand(share >= least, || {
                let name = of(dtype).name();
                format!("{name}: {share:.3} of the streams are right, not {least:.3}")
            });
        }
    }
    Ok(())
}

fn of(outcomes: &[Outcome], kind: Kind) -> impl Iterator<Item = &Outcome> {
    outcomes.iter().filter(move |o| o.kind == kind)
}

/// The shares of streams of so many bits that are right, by seed.
fn shares(outcomes: &[Outcome], kind: Kind, bits: usize) -> Vec<f64> {
    of(outcomes, kind).map(|o| o.right(bits)).collect()
}

fn print(outcomes: &[Outcome], kinds: &[Kind], bits: usize) {
    let [right, longer] = [bits, 2 * bits].map(|n| format!("right, {n} bits"));
    let mut table = Table::new(["model", &right, "least", &longer, "least", "updates", "s"]);
    for &kind in kinds {
        let percent = |share: f64| format!("{:.1} %", 100.0 * share);
        let least = |all: &[f64]| all.iter().copied().fold(f64::INFINITY, f64::min);
        let [once, twice] = [bits, 2 * bits].map(|n| shares(outcomes, kind, n));
        let updates: Vec<_> = of(outcomes, kind).map(|o| o.course.len() as f64).collect();
        let seconds: Vec<_> = of(outcomes, kind).map(|o| o.seconds).collect();
        table.row([
            kind.name(),
            percent(mean(&once)),
            percent(least(&once)),
            percent(mean(&twice)),
            percent(least(&twice)),
            format!("{:.0}", mean(&updates)),
            format!("{:.0}", mean(&seconds)),
        ]);
    }
    print!("{table}");
}

fn figures(o: &Outcome) -> serde_json::Value {
    let tests = o.tests.iter();
    let tests = tests.map(|(bits, right)| json!({ "bits": bits, "right": right }));
    json!({
        "model": o.kind.name(),
        "seed": o.seed,
        "tests": tests.collect::<Vec<_>>(),
        "updates": o.course.len(),
        "seconds": o.seconds,
    })
}

/// How the streams of the first seed become longer, and the tests of all seeds, the models side by side.
fn draw(report: &mut Report, outcomes: &[Outcome], kinds: &[Kind], bits: usize) -> Result<()> {
    picture(&report.picture(""), (1100, 420), |area| {
        let (left, right) = area.split_horizontally(550);
        let (mut courses, mut tests) = (vec![], vec![]);
        for (i, &kind) in kinds.iter().enumerate() {
            let course = of(outcomes, kind).take(1).flat_map(|o| o.course.iter());
            let longest = course.enumerate().map(|(k, (n, _))| (k as f64, *n as f64));
            courses.push(Curve::new(kind.name(), colour(i), longest).width(2));
            let aside = 0.03 * bits as f64 * (i as f64 - 0.5 * (kinds.len() - 1) as f64);
            let shares = of(outcomes, kind).flat_map(|o| o.tests.iter());
            let dots = shares.map(|(n, right)| (*n as f64 + aside, 100.0 * right));
            tests.push(Curve::new(kind.name(), colour(i), dots).mark(Mark::Dots(4)));
        }
        Panel {
            curves: courses,
            legend: SeriesLabelPosition::LowerRight,
            ..Panel::new("streams while training", "update", "bits")
        }
        .draw(&left)?;
        Panel {
            curves: tests,
            ranges: [None, Some(40.0..102.0)],
            legend: SeriesLabelPosition::LowerLeft,
            ..Panel::new(
                format!("tests after training with {bits} bits, every seed"),
                "bits",
                "% right",
            )
        }
        .draw(&right)
    })
}
