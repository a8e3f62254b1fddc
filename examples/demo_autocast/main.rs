//! Why a low-precision tape fails: z' = Az, A = diag(−½, −3/2), Euler on [0, 2].
//!
//! A tape sums the gradient of the weights' low-precision copy over all N steps, in low precision:
//! θ̄ ← fl(θ̄ + fl(h λ zᵀ)).  Terms shrink as 1/N, the sum does not, and below half an ulp of it they
//! are lost.  That this is all there is to it shows a recursion by hand: it gives the tape's
//! gradient, and a good one as soon as θ̄ alone is f32.
//!
//! `cargo run --release --example demo_autocast` (`--smoke`: seconds).  Exits with 1 when the tape
//! holds, the recursion is not the tape, or ours grows with N.

mod picture;
mod recursion;

use std::process::ExitCode;

use candle_core::{DType, Device, Tensor};
use candle_diffeq::{tableau::EULER, OdeOptions};
use clap::Parser;
use serde_json::json;

use crate::recursion::{weight_gradient, Sum};
use common::dtype::Dtype;
use common::flags::Flags;
use common::problem::{relative, Problem};
use common::report::{self, Report};
use common::table::{sci, Table};
use common::{progress, Result};

/// How much worse than ours the tape must be in the end.
const WORSE: f64 = 100.0;
/// How much larger our error may be after many steps than after few.
const GROWTH: f64 = 2.0;

/// Weight gradients summed in low precision, and in f32.
#[derive(Parser)]
struct Args {
    #[command(flatten)]
    flags: Flags,
}

/// Relative errors of ∂L/∂A, against the same scheme in f64, at one number of steps.
struct Row {
    dtype: Dtype,
    steps: usize,
    tape: f64,
    /// By hand, with θ̄ in low precision.
    low_sum: f64,
    /// By hand, with θ̄ in f32.
    wide_sum: f64,
    ours: f64,
    /// Between the tape and the recursion.
    difference: f64,
}

fn main() -> ExitCode {
    let args = Args::parse();
    report::run("demo_autocast", &args.flags, |device, report| {
        run(&args, device, report)
    })
}

fn problem() -> candle_core::Result<Problem> {
    Ok(Problem {
        field: |w, _, z| z.matmul(&w[0].t()?),
        weights: vec![Tensor::new(&[[-0.5, 0.0], [0.0, -1.5f64]], &Device::Cpu)?],
        y0: Tensor::ones((1, 2), DType::F64, &Device::Cpu)?,
        end: 2.0,
        loss: Tensor::sum_all,
    })
}

fn run(args: &Args, device: &Device, report: &mut Report) -> Result<()> {
    args.flags.nothing_random()?;
    let problem = problem()?;
    let last = args.flags.size().pick(8, 13, 13);
    let steps: Vec<usize> = (5..=last).map(|k| 1 << k).collect();
    let dtypes = [Dtype::Bf16, Dtype::F16];
    let dtypes = args.flags.precisions_among(&dtypes, &dtypes)?;
    let (mut rows, bar) = (vec![], progress("solves", dtypes.len() * steps.len())?);
    for &dtype in &dtypes {
        for &n in &steps {
            rows.push(row(&problem, device, dtype, n)?);
            bar.inc(1);
        }
    }
    bar.finish_and_clear();
    print(&rows);
    picture::draw(&report.picture(""), &rows)?;
    report.figure("rows", rows.iter().map(json).collect::<Vec<_>>())?;
    for &dtype in &dtypes {
        demands(dtype, &rows, report);
    }
    Ok(())
}

fn row(problem: &Problem, device: &Device, dtype: Dtype, steps: usize) -> Result<Row> {
    let solve = |dtype: Dtype| {
        let options = OdeOptions {
            method: EULER,
            precision: Some(dtype.precision()),
            ..Default::default()
        };
        problem.clone().on(device)?.solve(options, steps)
    };
    let reference = solve(Dtype::F64)?.theta;
    let precision = dtype.precision();
    let tape = problem.tape(&EULER, (precision.state, precision.compute), steps)?;
    let by_hand = |sum| weight_gradient(problem, precision.compute, steps, sum);
    let low = by_hand(Sum::Low)?;
    Ok(Row {
        dtype,
        steps,
        tape: relative(&tape.theta, &reference),
        low_sum: relative(&low, &reference),
        wide_sum: relative(&by_hand(Sum::Wide)?, &reference),
        ours: relative(&solve(dtype)?.theta, &reference),
        difference: relative(&low, &tape.theta),
    })
}

fn print(rows: &[Row]) {
    let mut table = Table::new([
        "∂L/∂A, relative error",
        "steps",
        "tape",
        "by hand, θ̄ low",
        "by hand, θ̄ f32",
        "ours",
    ]);
    for row in rows {
        table.row([
            row.dtype.name().to_owned(),
            row.steps.to_string(),
            sci(row.tape),
            sci(row.low_sum),
            sci(row.wide_sum),
            sci(row.ours),
        ]);
    }
    print!("{table}");
}

fn json(row: &Row) -> serde_json::Value {
    json!({
        "f": row.dtype.name(),
        "steps": row.steps,
        "tape": row.tape,
        "by_hand_low": row.low_sum,
        "by_hand_f32": row.wide_sum,
        "ours": row.ours,
        "by_hand_low_to_tape": row.difference,
    })
}

fn demands(dtype: Dtype, rows: &[Row], report: &mut Report) {
    let rows: Vec<_> = rows.iter().filter(|row| row.dtype == dtype).collect();
    let (Some(few), Some(many)) = (rows.first(), rows.last()) else {
        return;
    };
    let name = dtype.name();
    report.demand(many.tape >= WORSE * many.ours, || {
        format!("{name}: the tape holds, {:.1e}", many.tape)
    });
    report.demand(many.ours <= GROWTH * few.ours, || {
        format!(
            "{name}: ours grows from {:.1e} to {:.1e}",
            few.ours, many.ours
        )
    });
    for row in rows {
        report.demand(row.difference == 0.0, || {
            let (n, difference) = (row.steps, row.difference);
            format!("{name}, {n} steps: the recursion is {difference:.1e} from the tape")
        });
    }
}
