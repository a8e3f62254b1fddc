//! Learns two densities by optimal transport (OT-Flow), in f32, bf16, and f16 without and with adjoint
//! scaling.
//!
//! `cargo run --release --example otflow` (minutes; `--smoke`: seconds; `--full`: the published size).
//! Prints loss, likelihood, transport cost, violation of the Hamilton–Jacobi–Bellman equation,
//! discrepancies, and how far the map is from its inverse; draws densities, samples and paths.  Exits
//! with 1 when scaled f16 does not come within 2 % of the loss of f32, or a map is not inverted.

mod picture;
mod problem;
mod training;

use std::process::ExitCode;

use candle_core::Device;
use clap::Parser;
use serde_json::json;

use crate::problem::Problem;
use crate::training::{train, Outcome};
use common::dtype::Dtype;
use common::flags::Flags;
use common::mode::Mode;
use common::report::{self, Report};
use common::table::{sci, Table};
use common::{jobs, progress, Result};

/// How far scaled f16 may end from f32.
const CLOSE: f64 = 0.02;
/// How far from its inverse a map may be, in f32.
const INVERSE: f64 = 1e-5;

/// Learns densities by optimal transport.
#[derive(Parser)]
struct Args {
    #[command(flatten)]
    flags: Flags,
    /// Iterations of each run [default: of the size].
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
    iters: Option<u32>,
}

fn main() -> ExitCode {
    let args = Args::parse();
    report::run("otflow", &args.flags, |device, report| {
        run(&args, device, report)
    })
}

fn run(args: &Args, device: &Device, report: &mut Report) -> Result<()> {
    let size = args.flags.size();
    let problems = [Problem::PLANE, Problem::EIGHT].map(|published| {
        let problem = size.pick(published.smoke(), published.small(), published);
        let iterations = args.iters.map_or(problem.iterations, |n| n as usize);
        Problem {
            iterations,
            ..problem
        }
    });
    let all = [Dtype::F32, Dtype::Bf16, Dtype::F16];
    let modes = Mode::of(&args.flags.precisions_among(&all, &all)?);
    let runs = problems
        .iter()
        .flat_map(|p| modes.iter().map(move |m| (*p, *m)));
    let runs: Vec<_> = runs.collect();
    let bar = progress("train", runs.iter().map(|(p, _)| p.iterations).sum())?;
    let outcomes = jobs::run(device, &runs, |(problem, mode)| {
        train(*problem, *mode, args.flags.seed, device, &bar)
    })?;
    bar.finish_and_clear();
    let by_problem: Vec<&[Outcome]> = outcomes.chunks(modes.len()).collect();
    for of in &by_problem {
        print(of);
    }
    // Of the precision that comes last: scaled f16, unless others were asked for.
    let last: Vec<_> = by_problem.iter().filter_map(|of| of.last()).collect();
    picture::maps(&report.picture(""), &last, args.flags.seed)?;
    picture::costs(&report.picture("loss"), &by_problem)?;
    report.figure("runs", outcomes.iter().map(json).collect::<Vec<_>>())?;
    demands(&by_problem, report);
    Ok(())
}

fn print(outcomes: &[Outcome]) {
    let Some(first) = outcomes.first() else {
        return;
    };
    let p = &first.problem;
    println!(
        "{}: m = {}, {} iterations of {} points, {} steps; judged with {} steps",
        p.name, p.width, p.iterations, p.batch, p.steps, p.judged_steps
    );
    let mut table = Table::new([
        "precision",
        "loss",
        "NLL",
        "L",
        "HJB",
        "10³ MMD², data",
        "noise",
        "inverse, f32",
        "own",
        "ms forward",
        "backward",
        "redone",
    ]);
    for o in outcomes {
        table.row([
            o.mode.name.to_owned(),
            format!("{:.3}", o.costs.loss(p)),
            format!("{:.3}", o.costs.nll),
            format!("{:.3}", o.costs.transport),
            format!("{:.4}", o.costs.residual),
            format!("{:.2}", 1e3 * o.mmd),
            format!("{:.2}", 1e3 * o.mmd_noise),
            sci(o.inverse[0]),
            sci(o.inverse[1]),
            format!("{:.1}", o.forward),
            format!("{:.1}", o.backward),
            o.stats.retries.to_string(),
        ]);
    }
    println!("{table}");
}

fn json(o: &Outcome) -> serde_json::Value {
    let p = &o.problem;
    json!({
        "problem": p.name,
        "precision": o.mode.name,
        "width": p.width,
        "iterations": p.iterations,
        "batch": p.batch,
        "steps": p.steps,
        "judged_steps": p.judged_steps,
        "loss": o.costs.loss(p),
        "nll": o.costs.nll,
        "transport": o.costs.transport,
        "hjb": o.costs.residual,
        "mmd": o.mmd,
        "mmd_noise": o.mmd_noise,
        "inverse_f32": o.inverse[0],
        "inverse_own": o.inverse[1],
        "forward_ms": o.forward,
        "backward_ms": o.backward,
        "bytes_kept": o.stats.bytes_kept,
        "vjps": o.stats.vjps,
        "retries": o.stats.retries,
    })
}

/// Scaled f16 must learn as well as f32, and maps must have inverses.  NaN misses.
fn demands(by_problem: &[&[Outcome]], report: &mut Report) {
    for o in by_problem.iter().copied().flatten() {
        report.demand(o.inverse[0] <= INVERSE, || {
            let (problem, mode, error) = (o.problem.name, o.mode.name, o.inverse[0]);
            format!("{problem}, {mode}: the inverse misses by {error:.1e}")
        });
    }
    for of in by_problem {
        let exact = of.iter().find(|o| o.mode.dtype == Dtype::F32);
        let scaled = of.iter().find(|o| o.mode.is_scaled_f16());
        let (Some(exact), Some(scaled)) = (exact, scaled) else {
            continue;
        };
        let [exact, scaled] = [exact, scaled].map(|o| o.costs.loss(&o.problem));
        let apart = (scaled - exact).abs() / exact.abs();
        report.demand(apart <= CLOSE, || {
            let name = of[0].problem.name;
            format!("{name}: the loss of scaled f16 is {apart:.3} from that of f32")
        });
    }
}
