//! What mixed precision costs: relative errors against the same scheme in f64, as the number of
//! steps grows.
//!
//! `cargo run --release --example precision` (about a minute; `--smoke` a few seconds)

mod studies;

use std::process::ExitCode;

use candle_core::DType;
use candle_diffeq::Precision;
use clap::Parser;

use common::flags::{Flags, Size};
use common::problem::Errors;
use common::report::{self, Report};
use common::table::{sci, Table};
use common::{progress, Result};

/// Errors of f16 and bf16 solves against f64.
#[derive(Parser)]
struct Args {
    #[command(flatten)]
    flags: Flags,
}

fn main() -> ExitCode {
    let args = Args::parse();
    report::run("precision", &args.flags, |_, report| {
        args.flags.cpu_only()?;
        args.flags.fixed_precisions("f16 and bf16")?;
        args.flags.nothing_random()?;
        let size = args.flags.size();
        model_equation(size.pick(7, 13, 13), report)?;
        stagnation(size, report)?;
        polynomial(report)?;
        let (waste, stats) = studies::scaler_waste()?;
        println!(
            "\nscaler on a smooth solve of 128 steps: {waste:.3} pull-backs per stage, {} retries",
            stats.retries
        );
        report.figure("pull_backs_per_stage", waste)
    })
}

/// The four precisions of the tables.
fn precisions() -> [(&'static str, Precision); 4] {
    [
        ("f16", Precision::f16()),
        ("bf16", Precision::bf16()),
        ("f16, store f16", Precision::f16().store(DType::F16)),
        ("bf16, store bf16", Precision::bf16().store(DType::BF16)),
    ]
}

/// Rows of one study: precision, steps, errors.
type Rows = Vec<(&'static str, usize, Errors)>;

fn print(title: &str, name: &str, rows: &Rows, report: &mut Report) -> Result<()> {
    let mut table = Table::new(["precision", "steps", "y(T)", "∂L/∂y0", "∂L/∂θ"]);
    for (precision, steps, e) in rows {
        let [state, y0, theta] = e.all().map(sci);
        table.row([precision.to_string(), steps.to_string(), state, y0, theta]);
    }
    println!("{title}\n\n{table}");
    let figures: Vec<_> = rows.iter().map(|(p, n, e)| (p, n, e.all())).collect();
    report.figure(name, figures)
}

fn model_equation(last: u32, report: &mut Report) -> Result<()> {
    let mut rows = vec![];
    let bar = progress("linear", precisions().len() * (last as usize - 4))?;
    for (name, precision) in precisions() {
        for exponent in 5..=last {
            let errors = studies::model_equation(precision, 1 << exponent)?;
            rows.push((name, 1 << exponent, errors));
            bar.inc(1);
        }
    }
    bar.finish_and_clear();
    let title = "y' = −5y as a 10 × 10 matrix, rk4: relative errors";
    print(title, "model_equation", &rows, report)
}

fn stagnation(size: Size, report: &mut Report) -> Result<()> {
    let steps: &[usize] = size.pick(&[50], &[50, 200, 2000], &[50, 200, 2000]);
    let mut rows = vec![];
    for &n in steps {
        for (name, precision) in precisions() {
            rows.push((name, n, studies::stagnation(precision, n)?.0));
        }
        rows.push(("bf16 tape", n, studies::naive(DType::BF16, n)?));
    }
    let title = "MLP 2-64-64-2, Euler on [0, 1]: relative errors";
    print(title, "mlp", &rows, report)
}

fn polynomial(report: &mut Report) -> Result<()> {
    let mut table = Table::new(["precision", "∂L/∂y0", "∂a", "∂b", "∂c"]);
    let mut figures = vec![];
    for (name, precision) in [("f32", Precision::f32())].into_iter().chain(precisions()) {
        let errors = studies::polynomial(precision)?;
        let [y0, a, b, c] = errors.map(sci);
        table.row([name.to_owned(), y0, a, b, c]);
        figures.push((name, errors));
    }
    print!("y' = −(at² + bt + c) y, 399 steps: relative errors\n\n{table}");
    report.figure("polynomial", figures)
}
