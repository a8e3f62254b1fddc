//! Roundoff of the solution and the gradients of a continuous flow, as the number of steps grows:
//! relative errors against f64 on the same grid.
//!
//! `cargo run --release --example roundoff` (`--smoke`: seconds).  Exits with 1 when an error of ours in
//! bf16, in f16, or in f32 with compensated sums after the most steps is more than twice that after the
//! fewest.  In plain f32 and in f64 the errors of the state's sums add up, and nothing is demanded.

mod flow;
mod picture;

use std::process::ExitCode;

use candle_core::Device;
use candle_diffeq::scaling::Scaling;
use candle_diffeq::tableau::{Tableau, EULER, RK4};
use candle_diffeq::{Error, OdeOptions, Precision};
use clap::Parser;
use serde_json::json;

use common::dtype::Dtype;
use common::flags::Flags;
use common::problem::{Gradients, Problem};
use common::random::generator;
use common::report::{self, Report};
use common::table::{sci, Table};
use common::{progress, relative, values, Result};

/// What errors are of.
const QUANTITIES: [&str; 4] = ["y(1)", "∂L/∂y0", "∂L/∂θ", "worst of ∂L/∂θ"];
/// How much larger an error may be after the most steps than after the fewest.
const GROWTH: f64 = 2.0;

/// Roundoff over the number of steps.
#[derive(Parser)]
struct Args {
    #[command(flatten)]
    flags: Flags,
    /// Of the flow: at 16 points move by about their own size.
    #[arg(long, default_value_t = 1.0)]
    strength: f64,
}

/// How gradients are kept in range, and whose they are.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Kind {
    /// Ours; dynamic adjoint scaling in f16, otherwise none.
    Scaled,
    /// Ours, with compensated sums of the state.
    Compensated,
    /// Ours, in f16 without scaling.
    Unscaled,
    /// Ours, in f16 under the largest constant scale that does not overflow.
    Constant,
    /// Candle's tape, with copies of the weights in compute precision.
    Tape,
}

impl Kind {
    fn of(dtype: Dtype) -> &'static [Self] {
        match dtype {
            Dtype::F16 => &[Self::Scaled, Self::Unscaled, Self::Constant, Self::Tape],
            Dtype::Bf16 => &[Self::Scaled, Self::Tape],
            Dtype::F32 => &[Self::Scaled, Self::Compensated],
            Dtype::F64 => &[Self::Scaled],
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Scaled => "ours",
            Self::Compensated => "ours, compensated",
            Self::Unscaled => "ours, unscaled",
            Self::Constant => "ours, constant scale",
            Self::Tape => "tape",
        }
    }
}

/// Errors over the number of steps.
struct Series {
    method: Tableau,
    dtype: Dtype,
    kind: Kind,
    errors: Vec<(usize, [f64; 4])>,
}

fn main() -> ExitCode {
    let args = Args::parse();
    report::run("roundoff", &args.flags, |device, report| {
        run(&args, device, report)
    })
}

fn run(args: &Args, device: &Device, report: &mut Report) -> Result<()> {
    let problem = flow::flow(&mut generator(args.flags.seed), args.strength)?.on(device)?;
    let last = args.flags.size().pick(7, 12, 12);
    let steps: Vec<usize> = (6..=last).map(|k| 1 << k).collect();
    let dtypes = [Dtype::F32, Dtype::Bf16, Dtype::F16];
    let dtypes = args.flags.precisions_among(&dtypes, &Dtype::ALL)?;
    let kinds = || {
        dtypes
            .iter()
            .flat_map(|d| Kind::of(*d).iter().map(|k| (*d, *k)))
    };
    // The work is that of all steps.
    let work = 2 * steps.iter().sum::<usize>() * (1 + kinds().count());
    let (mut all, bar) = (vec![], progress("steps", work)?);
    for method in [EULER, RK4] {
        let mut series: Vec<Series> = kinds()
            .map(|(dtype, kind)| Series {
                method: method.clone(),
                dtype,
                kind,
                errors: vec![],
            })
            .collect();
        for &n in &steps {
            let reference = ours(&problem, &method, Precision::f64(), Scaling::Off, n)?;
            bar.inc(n as u64);
            for one in &mut series {
                let gradients = solve(&problem, one, n)?;
                one.errors
                    .push((n, errors(&problem, &gradients, &reference)));
                bar.inc(n as u64);
            }
        }
        all.extend(series);
    }
    bar.finish_and_clear();
    let exact = ours(&problem, &RK4, Precision::f64(), Scaling::Off, steps[0])?;
    let moved = relative(&exact.state, &values(&problem.y0)?);
    println!("the flow moves the points by {moved:.2} of their size\n");
    report.figure("moved", moved)?;
    print(&all);
    picture::draw(&report.picture(""), &all)?;
    report.figure("series", all.iter().map(json).collect::<Vec<_>>())?;
    demands(&all, report);
    Ok(())
}

fn solve(problem: &Problem, series: &Series, steps: usize) -> Result<Gradients> {
    let (method, precision) = (&series.method, series.dtype.precision());
    Ok(match series.kind {
        Kind::Scaled => ours(problem, method, precision, Scaling::Auto, steps)?,
        Kind::Compensated => {
            let precision = precision.compensated();
            ours(problem, method, precision, Scaling::Auto, steps)?
        }
        Kind::Unscaled => ours(problem, method, precision, Scaling::Off, steps)?,
        Kind::Tape => problem.tape(method, (precision.state, precision.compute), steps)?,
        Kind::Constant => {
            // A loss scaler's search: from 2¹⁶ down.
            for exponent in (-4..=16).rev() {
                let scaling = Scaling::Fixed(2f64.powi(exponent));
                match ours(problem, method, precision, scaling, steps) {
                    Err(Error::NonFiniteGradient { .. } | Error::NonFiniteParameterGradient) => {}
                    other => return Ok(other?),
                }
            }
            return Err("gradients overflow under every scale".into());
        }
    })
}

fn ours(
    problem: &Problem,
    method: &Tableau,
    precision: Precision,
    scaling: Scaling,
    steps: usize,
) -> candle_diffeq::Result<Gradients> {
    let options = OdeOptions {
        method: method.clone(),
        precision: Some(precision),
        scaling,
        ..Default::default()
    };
    problem.solve(options, steps)
}

fn errors(problem: &Problem, gradients: &Gradients, reference: &Gradients) -> [f64; 4] {
    let [state, y0, theta] = gradients.errors(reference).all();
    let (mut worst, mut start) = (0.0, 0);
    for weight in &problem.weights {
        let end = start + weight.elem_count();
        let of = |theta: &[f64]| {
            theta
                .get(start..end)
                .map(<[f64]>::to_vec)
                .unwrap_or_default()
        };
        worst = f64::max(
            worst,
            relative(&of(&gradients.theta), &of(&reference.theta)),
        );
        start = end;
    }
    [state, y0, theta, worst]
}

fn print(all: &[Series]) {
    let mut table = Table::new([
        "errors, fewest → most steps",
        "method",
        "f",
        "y(1)",
        "∂L/∂y0",
        "∂L/∂θ",
        "worst of ∂L/∂θ",
    ]);
    for series in all {
        let cell = |q: usize| match (series.errors.first(), series.errors.last()) {
            (Some(few), Some(many)) => format!("{} → {}", sci(few.1[q]), sci(many.1[q])),
            _ => String::new(),
        };
        table.row([
            series.kind.name().to_owned(),
            series.method.name().to_owned(),
            series.dtype.name().to_owned(),
            cell(0),
            cell(1),
            cell(2),
            cell(3),
        ]);
    }
    print!("{table}");
}

fn json(series: &Series) -> serde_json::Value {
    json!({
        "whose": series.kind.name(),
        "method": series.method.name(),
        "f": series.dtype.name(),
        "quantities": QUANTITIES,
        "errors": series.errors,
    })
}

/// Of low precisions, and of compensated sums: without them, in f32 the state rounds as f does, and its errors add up.
fn demands(all: &[Series], report: &mut Report) {
    let flat = |s: &&Series| match s.dtype {
        Dtype::Bf16 | Dtype::F16 => s.kind != Kind::Tape,
        Dtype::F32 | Dtype::F64 => s.kind == Kind::Compensated,
    };
    for series in all.iter().filter(flat) {
        let (Some(few), Some(many)) = (series.errors.first(), series.errors.last()) else {
            continue;
        };
        for (q, name) in QUANTITIES.iter().enumerate() {
            report.demand(many.1[q] <= GROWTH * few.1[q], || {
                format!(
                    "{}, {}, {}: {name} grows from {:.1e} to {:.1e}",
                    series.kind.name(),
                    series.method.name(),
                    series.dtype.name(),
                    few.1[q],
                    many.1[q]
                )
            });
        }
    }
}
