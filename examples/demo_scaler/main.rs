//! Gradients in f16 with and without dynamic adjoint scaling, where the adjoint underflows and where
//! it overflows, against f64 on the same grid.
//!
//! `cargo run --release --example demo_scaler` (seconds; `--smoke` demands nothing).  Exits with 1 when a
//! gradient is right without scaling in every part, or wrong by more than 1 % with it.

mod cases;
mod picture;

use std::process::ExitCode;

use candle_core::Device;
use candle_diffeq::metrics::Recorder;
use candle_diffeq::scaling::Scaling;
use candle_diffeq::tableau::RK4;
use candle_diffeq::{Error, OdeOptions};
use clap::Parser;
use serde_json::json;

use crate::cases::{cases, Case};
use common::dtype::Dtype;
use common::flags::Flags;
use common::problem::{Errors, Gradients};
use common::random::generator;
use common::report::{self, any, Report};
use common::table::{sci, Table};
use common::{progress, Result};

/// A gradient with a larger relative error is lost.
const LOST: f64 = 0.5;
/// The largest error with scaling.
const GOOD: f64 = 0.01;

/// f16 gradients, scaled and unscaled.
#[derive(Parser)]
struct Args {
    #[command(flatten)]
    flags: Flags,
}

/// What a case came to.
struct Outcome {
    case: Case,
    unscaled: Errors,
    scaled: Errors,
    retries: usize,
    /// (t, S) where S changed, backward in time.
    scales: Vec<(f64, f64)>,
}

fn main() -> ExitCode {
    let args = Args::parse();
    report::run("demo_scaler", &args.flags, |device, report| {
        run(&args, device, report)
    })
}

fn run(args: &Args, device: &Device, report: &mut Report) -> Result<()> {
    args.flags.fixed_precisions("f16, beside f64")?;
    let cases = cases(&mut generator(args.flags.seed))?;
    let (mut outcomes, bar) = (vec![], progress("cases", cases.len())?);
    for case in cases {
        outcomes.push(outcome(case, device)?);
        bar.inc(1);
    }
    bar.finish_and_clear();
    print(&outcomes);
    picture::draw(&report.picture(""), &outcomes)?;
    report.figure("cases", outcomes.iter().map(json).collect::<Vec<_>>())?;
    demands(&outcomes, report);
    Ok(())
}

fn outcome(case: Case, device: &Device) -> Result<Outcome> {
    let problem = case.problem.clone().on(device)?;
    let recorder = Recorder::tracing();
    let solve = |dtype: Dtype, scaling| {
        let options = OdeOptions {
            method: RK4,
            precision: Some(dtype.precision()),
            scaling,
            recorder: Some(recorder.clone()),
            ..Default::default()
        };
        problem.solve(options, case.steps)
    };
    let reference = solve(Dtype::F64, Scaling::Off)?;
    let unscaled = lost_if_infinite(solve(Dtype::F16, Scaling::Off), &reference)?;
    let scaled = solve(Dtype::F16, Scaling::Auto)?;
    Ok(Outcome {
        case,
        unscaled,
        scaled: scaled.errors(&reference),
        retries: scaled.stats.retries,
        scales: scaled.stats.scales,
    })
}

/// An overflow is an error of the library's; its gradients are infinitely wrong.
fn lost_if_infinite(
    gradients: candle_diffeq::Result<Gradients>,
    reference: &Gradients,
) -> Result<Errors> {
    match gradients {
        Ok(gradients) => Ok(gradients.errors(reference)),
        Err(Error::NonFiniteGradient { .. } | Error::NonFiniteParameterGradient) => Ok(Errors {
            state: 0.0,
            y0: f64::INFINITY,
            theta: f64::INFINITY,
        }),
        Err(error) => Err(error.into()),
    }
}

fn print(outcomes: &[Outcome]) {
    let mut table = Table::new([
        "relative errors in f16",
        "unscaled ∂L/∂y0",
        "∂L/∂A",
        "scaled ∂L/∂y0",
        "∂L/∂A",
        "S from",
        "to",
        "retries",
    ]);
    for o in outcomes {
        let scales = o.scales.iter().map(|s| s.1);
        let (low, high) = scales.fold((f64::INFINITY, 0.0), |(low, high), s| {
            (f64::min(low, s), f64::max(high, s))
        });
        table.row([
            o.case.name.to_owned(),
            sci(o.unscaled.y0),
            sci(o.unscaled.theta),
            sci(o.scaled.y0),
            sci(o.scaled.theta),
            format!("2^{}", low.log2()),
            format!("2^{}", high.log2()),
            o.retries.to_string(),
        ]);
    }
    print!("{table}");
}

fn json(o: &Outcome) -> serde_json::Value {
    json!({
        "case": o.case.name,
        "steps": o.case.steps,
        "unscaled": [any(o.unscaled.y0), any(o.unscaled.theta)],
        "scaled": [o.scaled.y0, o.scaled.theta],
        "solution": o.scaled.state,
        "scales": o.scales,
        "retries": o.retries,
    })
}

fn demands(outcomes: &[Outcome], report: &mut Report) {
    for o in outcomes {
        let (name, unscaled, scaled) = (o.case.name, &o.unscaled, &o.scaled);
        report.demand(unscaled.y0.max(unscaled.theta) > LOST, || {
            format!("{name}: nothing is lost without scaling")
        });
        report.demand(scaled.y0.max(scaled.theta) <= GOOD, || {
            let (y0, a) = (scaled.y0, scaled.theta);
            format!("{name}: scaled gradients are off by {y0:.1e} and {a:.1e}")
        });
    }
}
