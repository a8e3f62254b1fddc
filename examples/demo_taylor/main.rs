//! Taylor test of the gradients: with g = ∂L along a direction d,
//!
//! E₀(h) = |L(x + hd) − L(x)| falls with slope 1,  E₁(h) = |L(x + hd) − L(x) − h g·d| with slope 2,
//!
//! for x the initial value, and x the weights, until rounding is all that is left.
//!
//! `cargo run --release --example demo_taylor` (`--smoke`: seconds).  Exits with 1 when a slope is
//! another, or is seen over too few points.

mod picture;
mod problems;
mod taylor;

use std::process::ExitCode;

use candle_core::Device;
use candle_diffeq::{OdeOptions, Precision};
use clap::Parser;
use serde_json::json;

use crate::problems::{problems, Named};
use crate::taylor::{remainders, Direction, Fit, Remainders, Towards, LINEAR};
use common::dtype::Dtype;
use common::flags::Flags;
use common::problem::Problem;
use common::random::generator;
use common::report::{self, any, Report};
use common::table::{sci, Table};
use common::{progress, Result};

/// Slopes may be off by this much: E₀ by the part of E₁ that it may hold.
const TOLERANCE: [f64; 2] = [LINEAR, 0.2];
/// Points that a slope must be seen over.
const POINTS: usize = 6;

/// Taylor test of the gradients, in y0 and in the weights.
#[derive(Parser)]
struct Args {
    #[command(flatten)]
    flags: Flags,
}

/// One test and what it came to.
struct Test {
    problem: &'static str,
    steps: usize,
    towards: Towards,
    dtype: Dtype,
    remainders: Remainders,
    fits: [Fit; 2],
}

fn main() -> ExitCode {
    let args = Args::parse();
    report::run("demo_taylor", &args.flags, |device, report| {
        run(&args, device, report)
    })
}

fn run(args: &Args, device: &Device, report: &mut Report) -> Result<()> {
    let dtypes = args.flags.precisions_among(&Dtype::ALL, &Dtype::ALL)?;
    let steps: &[usize] = args.flags.size().pick(&[7], &[7, 511], &[7, 511]);
    let problems = problems(&mut generator(args.flags.seed))?;
    let count = problems.len() * steps.len() * Towards::ALL.len() * dtypes.len();
    let (mut tests, bar) = (vec![], progress("tests", count)?);
    for Named { name, problem } in problems {
        let problem = problem.on(device)?;
        for &steps in steps {
            for towards in Towards::ALL {
                let direction = direction(&problem, towards, steps, args.flags.seed)?;
                for &dtype in &dtypes {
                    let remainders = remainders(&problem, &direction, dtype, steps)?;
                    tests.push(Test {
                        problem: name,
                        steps,
                        towards,
                        dtype,
                        fits: [0, 1].map(|order| remainders.fit(order)),
                        remainders,
                    });
                    bar.inc(1);
                }
            }
        }
    }
    bar.finish_and_clear();
    print(&tests);
    picture::draw(&report.picture(""), &tests)?;
    report.figure("tests", tests.iter().map(json).collect::<Vec<_>>())?;
    demands(&tests, report);
    Ok(())
}

/// The same in every precision.
fn direction(problem: &Problem, towards: Towards, steps: usize, seed: u64) -> Result<Direction> {
    let options = OdeOptions {
        precision: Some(Precision::f64()),
        ..Default::default()
    };
    let gradients = problem.solve(options, steps)?;
    Ok(towards.draw(problem, &gradients, &mut generator(seed))?)
}

fn print(tests: &[Test]) {
    let mut table = Table::new([
        "problem",
        "steps",
        "towards",
        "precision",
        "slope of E₀",
        "of E₁",
        "points",
        "rounding in E₁",
    ]);
    for test in tests {
        let [first, second] = &test.fits;
        table.row([
            test.problem.to_owned(),
            test.steps.to_string(),
            test.towards.name().to_owned(),
            test.dtype.name().to_owned(),
            format!("{:.3}", first.slope),
            format!("{:.3}", second.slope),
            second.points.to_string(),
            sci(second.floor),
        ]);
    }
    print!("{table}");
}

fn json(test: &Test) -> serde_json::Value {
    json!({
        "problem": test.problem,
        "steps": test.steps,
        "towards": test.towards.name(),
        "precision": test.dtype.name(),
        "slopes": test.fits.each_ref().map(|fit| any(fit.slope)),
        "points": test.fits.each_ref().map(|fit| fit.points),
        "floor": test.fits[1].floor,
    })
}

fn demands(tests: &[Test], report: &mut Report) {
    for test in tests {
        for (order, fit) in test.fits.iter().enumerate() {
            let expected = (order + 1) as f64;
            let holds = (fit.slope - expected).abs() <= TOLERANCE[order] && fit.points >= POINTS;
            report.demand(holds, || {
                format!(
                    "{}, {} steps, {}, {}: slope {:.3} instead of {expected} over {} points",
                    test.problem,
                    test.steps,
                    test.towards.name(),
                    test.dtype.name(),
                    fit.slope,
                    fit.points
                )
            });
        }
    }
}
