//! rampde's model equation y' = Ay: relative errors of y(T), ∂L/∂y0 and ∂L/∂A against matrix
//! exponentials in f64, as the number of steps grows.
//!
//! `cargo run --release --example modeleq_demo` (`--smoke`: seconds).  Beside ours stand rampde's own
//! figures, and candle's tape with low-precision copies of the weights, as autocast has them.  Exits
//! with 1 when ours are above rampde's in geometric mean over the numbers of steps and above the error
//! of the scheme in f64, or grow with their number, or when the tape does not collapse.

mod picture;
mod rampde;

use std::process::ExitCode;

use candle_core::{DType, Device};
use candle_diffeq::tableau::{Tableau, EULER, RK4};
use candle_diffeq::OdeOptions;
use clap::Parser;
use rand::Rng;
use rand_distr::StandardNormal;
use serde_json::json;

use common::dtype::Dtype;
use common::flags::Flags;
use common::model_equation::{exact, model_equation, Y0};
use common::problem::{Gradients, Problem};
use common::random::generator;
use common::report::{self, Report};
use common::table::{sci, Table};
use common::{geometric_mean, progress, Result};

/// What errors are of.
const QUANTITIES: [&str; 3] = ["y(T)", "∂L/∂y0", "∂L/∂A"];
/// The error of a weight gradient that has collapsed.
const COLLAPSED: f64 = 0.5;
/// How much of the scheme's own error may be added to it: below that no precision gets but by chance.
const ITS_OWN: f64 = 1.002;
/// How much larger the error may be after many steps than after few.
const GROWTH: f64 = 2.0;

/// Errors of the model equation, ours, rampde's and of a low-precision tape.
#[derive(Parser)]
struct Args {
    /// With --seed 0 the initial value is rampde's.
    #[command(flatten)]
    flags: Flags,
}

/// Whose errors.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Whose {
    Ours,
    /// Ours, with the trajectory stored in compute precision.
    OursStoredLow,
    Rampde,
    Tape,
}

impl Whose {
    const ALL: [Self; 4] = [Self::Ours, Self::OursStoredLow, Self::Rampde, Self::Tape];

    fn name(self) -> &'static str {
        match self {
            Self::Ours => "ours",
            Self::OursStoredLow => "ours, stored low",
            Self::Rampde => "rampde's figures",
            Self::Tape => "tape",
        }
    }
}

/// Errors over the number of steps.
struct Series {
    whose: Whose,
    method: Tableau,
    dtype: Dtype,
    errors: Vec<(usize, [f64; 3])>,
}

impl Series {
    /// Over all numbers of steps.
    fn means(&self) -> [f64; 3] {
        let of = |q: usize| self.errors.iter().map(|e| e.1[q]).collect::<Vec<_>>();
        [0, 1, 2].map(|q| geometric_mean(&of(q)))
    }
}

fn main() -> ExitCode {
    let args = Args::parse();
    report::run("modeleq_demo", &args.flags, |device, report| {
        run(&args, device, report)
    })
}

fn run(args: &Args, device: &Device, report: &mut Report) -> Result<()> {
    let mut rng = generator(args.flags.seed);
    let y0 = match args.flags.seed {
        0 => Y0,
        _ => std::array::from_fn(|_| rng.sample(StandardNormal)),
    };
    let problem = model_equation(y0)?;
    let exact = exact(&problem)?;
    let problem = problem.on(device)?;
    let last = args.flags.size().pick(7, 13, 13);
    let steps: Vec<usize> = (5..=last).map(|k| 1 << k).collect();
    let mut dtypes = args.flags.precisions_among(&Dtype::ALL, &Dtype::ALL)?;
    // The scheme's own error, which nothing can be below.
    if !dtypes.contains(&Dtype::F64) {
        dtypes.insert(0, Dtype::F64);
    }

    let mut all = vec![];
    let bar = progress("solves", 2 * dtypes.len() * Whose::ALL.len())?;
    for method in [EULER, RK4] {
        for &dtype in &dtypes {
            for whose in Whose::ALL {
                bar.set_message(format!("{} {}", method.name(), dtype.name()));
                let errors = errors(whose, &method, dtype, (&problem, &exact), &steps)?;
                let method = method.clone();
                if !errors.is_empty() {
                    all.push(Series {
                        whose,
                        method,
                        dtype,
                        errors,
                    });
                }
                bar.inc(1);
            }
        }
    }
    bar.finish_and_clear();
    print(&all);
    picture::draw(&report.picture(""), &all)?;
    report.figure("series", all.iter().map(json).collect::<Vec<_>>())?;
    demands(&all, args.flags.seed, report);
    Ok(())
}

/// Errors of one series; none where there is nothing to compare, in f32 and f64.
fn errors(
    whose: Whose,
    method: &Tableau,
    dtype: Dtype,
    (problem, exact): (&Problem, &Gradients),
    steps: &[usize],
) -> Result<Vec<(usize, [f64; 3])>> {
    let is_low = matches!(dtype, Dtype::Bf16 | Dtype::F16);
    let precision = dtype.precision();
    let solve = |store: DType, n: usize| {
        let options = OdeOptions {
            method: method.clone(),
            precision: Some(precision.store(store)),
            ..Default::default()
        };
        problem.solve(options, n)
    };
    let mut errors = vec![];
    for &n in steps {
        let outcome = match whose {
            Whose::Ours => solve(precision.state, n)?,
            _ if !is_low => return Ok(vec![]),
            Whose::OursStoredLow => solve(precision.compute, n)?,
            Whose::Tape => problem.tape(method, (precision.state, precision.compute), n)?,
            Whose::Rampde => {
                let mut figures = rampde::errors(method.name(), dtype)?;
                figures.retain(|(n, _)| steps.contains(n));
                return Ok(figures);
            }
        };
        errors.push((n, outcome.errors(exact).all()));
    }
    Ok(errors)
}

fn print(all: &[Series]) {
    let mut table = Table::new([
        "geometric mean over N",
        "method",
        "f",
        "y(T)",
        "∂L/∂y0",
        "∂L/∂A",
        "∂L/∂A, fewest steps",
        "most steps",
    ]);
    for series in all {
        let [y, y0, a] = series.means().map(sci);
        let ends = [series.errors.first(), series.errors.last()];
        let [few, many] = ends.map(|e| e.map_or(String::new(), |e| sci(e.1[2])));
        table.row([
            series.whose.name().to_owned(),
            series.method.name().to_owned(),
            series.dtype.name().to_owned(),
            y,
            y0,
            a,
            few,
            many,
        ]);
    }
    print!("{table}");
}

fn json(series: &Series) -> serde_json::Value {
    json!({
        "whose": series.whose.name(),
        "method": series.method.name(),
        "f": series.dtype.name(),
        "quantities": QUANTITIES,
        "errors": series.errors,
        "geometric_means": series.means(),
    })
}

fn demands(all: &[Series], seed: u64, report: &mut Report) {
    for series in all {
        let of = |whose, other: &Series| {
            other.whose == whose && other.method == series.method && other.dtype == series.dtype
        };
        let title = format!("{}, {}", series.method.name(), series.dtype.name());
        let (Some(few), Some(many)) = (series.errors.first(), series.errors.last()) else {
            continue;
        };
        if series.whose == Whose::Tape {
            report.demand(many.1[2] >= COLLAPSED, || {
                format!("{title}: the tape's ∂L/∂A holds, {:.1e}", many.1[2])
            });
        }
        let scheme = all
            .iter()
            .find(|o| o.method == series.method && o.dtype == Dtype::F64);
        let scheme = scheme.map_or([0.0; 3], Series::means);
        let rampde = all.iter().find(|other| of(Whose::Rampde, other));
        if let (Whose::Ours, Some(rampde)) = (series.whose, rampde) {
            for (q, name) in QUANTITIES.iter().enumerate() {
                let (ours, theirs) = (series.means()[q], rampde.means()[q]);
                // rampde's figures are of one initial value.
                let other = seed != 0;
                report.demand(other || ours <= theirs.max(ITS_OWN * scheme[q]), || {
                    format!("{title}: {name} {ours:.2e} is above rampde's {theirs:.2e}")
                });
                report.demand(many.1[q] <= GROWTH * few.1[q], || {
                    format!(
                        "{title}: {name} grows from {:.1e} to {:.1e}",
                        few.1[q], many.1[q]
                    )
                });
            }
        }
    }
}
