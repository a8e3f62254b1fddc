//! What the ways to a gradient cost: memory over the number of steps, and time and error over the tolerance.
//!
//! `cargo run --release --example adjoints` (minutes; `--smoke`: seconds; `--full`: a million steps).  A field
//! y' = tanh(y W) of 16 features in 64 rows.  Memory: Euler's method in 10³, 10⁴, … steps, each figure from a process of
//! its own, as the most that it held beyond what it held before the solve.  Error: dopri5 at four tolerances, against a
//! gradient in f64 at 10⁻¹².  The tables and the picture are those of docs/continuous.md.

use std::process::{Command, ExitCode};
use std::time::Instant;

use candle_core::{DType, Device, Tensor, Var};
use candle_diffeq::metrics::{Recorder, Stats};
use candle_diffeq::options::{Adaptive, AdjointSolve, Checkpoint, Gradient, Output, Steps};
use candle_diffeq::tableau::{DOPRI5, EULER};
use candle_diffeq::{odeint, OdeOptions, Precision, Time};
use clap::{Parser, ValueEnum};
use serde::{Deserialize, Serialize};
use serde_json::json;

use common::chart::{self, colour, Curve, Mark, Panel, Scale, SeriesLabelPosition};
use common::flags::Flags;
use common::random::{generator, normal};
use common::report::{self, Report};
use common::table::Table;
use common::{memory, relative, values, Result};

const ROWS: usize = 64;
const FEATURES: usize = 16;
/// States of a budget.
const BUDGET: usize = 100;
/// By how much memory may grow from the fewest steps to the most where it does not depend on them.
const GROWTH: f64 = MEBIBYTE;
const MEBIBYTE: f64 = 1024.0 * 1024.0;
/// The least that is drawn on a logarithmic axis.
const LEAST: f64 = 0.01;

#[derive(Parser)]
struct Args {
    #[command(flatten)]
    flags: Flags,
    /// Measures one cell and prints it as JSON: what the example calls itself with.
    #[arg(long, hide = true)]
    cell: Option<Way>,
    /// Steps of the cell.
    #[arg(long, hide = true, default_value_t = 1000)]
    steps: usize,
}

/// A way to the gradient.
#[derive(Clone, Copy, Debug, PartialEq, ValueEnum)]
enum Way {
    Discrete,
    DiscreteBudget,
    Backsolve,
    Interpolated,
    InterpolatedBudget,
    Quadrature,
}

impl Way {
    const ALL: [Self; 6] = [
        Self::Discrete,
        Self::DiscreteBudget,
        Self::Backsolve,
        Self::Interpolated,
        Self::InterpolatedBudget,
        Self::Quadrature,
    ];

    fn name(self) -> &'static str {
        match self {
            Self::Discrete => "discrete",
            Self::DiscreteBudget => "discrete, 100 states",
            Self::Backsolve => "backsolve",
            Self::Interpolated => "interpolated",
            Self::InterpolatedBudget => "interpolated, 100 states",
            Self::Quadrature => "quadrature",
        }
    }

    fn options(self, options: OdeOptions) -> OdeOptions {
        let solve = AdjointSolve::new();
        let gradient = match self {
            Self::Discrete | Self::DiscreteBudget => Gradient::Discrete,
            Self::Backsolve => Gradient::Backsolve(solve),
            Self::Interpolated | Self::InterpolatedBudget => Gradient::Interpolated(solve),
            Self::Quadrature => Gradient::Quadrature(solve),
        };
        let checkpoint = match self {
            Self::DiscreteBudget | Self::InterpolatedBudget => Checkpoint::States(BUDGET),
            _ => Checkpoint::All,
        };
        OdeOptions {
            gradient,
            checkpoint,
            output: Output::Final,
            ..options
        }
    }
}

/// What a gradient took.
struct Cost {
    grad: Vec<f64>,
    seconds: f64,
    stats: Stats,
}

/// The gradient of W of the mean square at time 3.
fn gradient((way, seed): (Way, u64), options: OdeOptions, dtype: DType) -> Result<Cost> {
    let (device, mut rng) = (Device::Cpu, generator(seed));
    let scale = 1.5 / (FEATURES as f64).sqrt();
    let w = (normal(&mut rng, (FEATURES, FEATURES), dtype, &device)? * scale)?;
    let w = Var::from_tensor(&w)?;
    let y0 = normal(&mut rng, (ROWS, FEATURES), dtype, &device)?;
    let recorder = Recorder::default();
    let options = way.options(OdeOptions {
        recorder: Some(recorder.clone()),
        ..options
    });
    let run = || -> Result<_> {
        let read = w.as_tensor().clone();
        let f = move |_: &Time, y: &Tensor| y.matmul(&read)?.tanh();
        let clock = Instant::now();
        let y = odeint(f, &y0, &[0.0, 3.0], &options)?;
        let grads = y.sqr()?.mean_all()?.backward()?;
        Ok((grads, clock.elapsed().as_secs_f64()))
    };
    let (grads, seconds) = run()?;
    let grad = grads.get(&w).ok_or("no gradient")?;
    Ok(Cost {
        grad: values(grad)?,
        seconds,
        stats: recorder.take(),
    })
}

/// One figure of the table of memory.
#[derive(Clone, Copy, Debug, Deserialize, Serialize)]
struct Cell {
    bytes: f64,
    seconds: f64,
}

fn measure(of: (Way, u64), steps: usize) -> Result<Cell> {
    let options = |steps| OdeOptions {
        method: EULER,
        steps: Steps::PerInterval(steps),
        ..Default::default()
    };
    // Whatever is made once is made now.
    gradient(of, options(10), DType::F32)?;
    let unknown = "this system does not tell how much memory a process holds";
    let before = memory::resident().ok_or(unknown)?;
    let cost = gradient(of, options(steps), DType::F32)?;
    let after = memory::peak().ok_or(unknown)?;
    Ok(Cell {
        bytes: after.saturating_sub(before) as f64,
        seconds: cost.seconds,
    })
}

fn main() -> ExitCode {
    let args = Args::parse();
    if let Some(way) = args.cell {
        let cell = measure((way, args.flags.seed), args.steps);
        return match cell.and_then(|cell| Ok(serde_json::to_string(&cell)?)) {
            Ok(cell) => {
                println!("{cell}");
                ExitCode::SUCCESS
            }
            Err(error) => {
                eprintln!("error: {error}");
                ExitCode::FAILURE
            }
        };
    }
    report::run("adjoints", &args.flags, |_, report| run(&args, report))
}

fn run(args: &Args, report: &mut Report) -> Result<()> {
    let flags = &args.flags;
    flags.cpu_only()?;
    flags.fixed_precisions("f32")?;
    let panels = [
        memory_of_steps(flags, report)?,
        errors_of_tolerances(flags, report)?,
    ];
    chart::picture(&report.picture(""), (900, 420), |area| {
        let areas = area.split_evenly((1, 2));
        areas
            .iter()
            .zip(&panels)
            .try_for_each(|(area, panel)| panel.draw(area))
    })
}

/// A curve of a way, with a colour of its own.
fn curve(way: Way, points: impl IntoIterator<Item = (f64, f64)>) -> Curve {
    let number = Way::ALL.iter().position(|w| *w == way).unwrap_or(0);
    // Some lie on each other.
    let width = 1 + (Way::ALL.len() - number) as u32;
    let curve = Curve::new(way.name(), colour(number), points);
    curve.mark(Mark::DottedLine).width(width)
}

/// Memory of forward and backward pass over the number of steps.
fn memory_of_steps(flags: &Flags, report: &mut Report) -> Result<Panel> {
    let [least, most] = flags.size().pick([2, 3], [3, 5], [3, 6]);
    let steps: Vec<usize> = (least..=most).map(|p| 10usize.pow(p)).collect();
    let mut curves = vec![];
    let mut table = Table::of(
        std::iter::once("gradient".to_owned()).chain(steps.iter().map(|n| format!("{n} steps"))),
    );
    for way in Way::ALL {
        let cells = steps.iter().map(|&n| in_a_process((way, flags.seed), n));
        let cells = cells.collect::<Result<Vec<_>>>()?;
        let text = |c: &Cell| format!("{:.1} MiB, {:.2} s", c.bytes / MEBIBYTE, c.seconds);
        table.line(std::iter::once(way.name().to_owned()).chain(cells.iter().map(text)));
        report.figure(&format!("memory, {}", way.name()), &cells)?;
        let point = |(n, c): (&usize, &Cell)| (*n as f64, (c.bytes / MEBIBYTE).max(LEAST));
        curves.push(curve(way, steps.iter().zip(&cells).map(point)));
        if let (Way::Backsolve, [first, .., last]) = (way, cells.as_slice()) {
            report.demand(last.bytes - first.bytes <= GROWTH, || {
                "the memory of a backsolve grows with the steps".to_owned()
            });
        }
    }
    println!("memory of forward and backward pass, and their time\n{table}");
    Ok(Panel {
        scales: [Scale::Decades; 2],
        curves,
        legend: SeriesLabelPosition::UpperLeft,
        ..Panel::new("memory", "steps", "MiB, 0.01 for less")
    })
}

/// Errors of gradients by adaptive steps over the tolerance.
fn errors_of_tolerances(flags: &Flags, report: &mut Report) -> Result<Panel> {
    let (size, seed) = (flags.size(), flags.seed);
    let exact = gradient((Way::Discrete, seed), adaptive(1e-12, true), DType::F64)?;
    let mut table = Table::new(["rtol", "gradient", "forward", "backward", "ms", "error"]);
    let tolerances = size.pick(
        &[1e-3, 1e-4][..],
        &[1e-3, 1e-4, 1e-5, 1e-6],
        &[1e-3, 1e-4, 1e-5, 1e-6],
    );
    let ways = [
        Way::Discrete,
        Way::Backsolve,
        Way::Interpolated,
        Way::Quadrature,
    ];
    let mut figures = vec![];
    let mut points = ways.map(|_| vec![]);
    for &tol in tolerances {
        for (way, points) in ways.into_iter().zip(&mut points) {
            // The first solve also checks the field.
            gradient((way, seed), adaptive(tol, false), DType::F32)?;
            let cost = gradient((way, seed), adaptive(tol, false), DType::F32)?;
            let error = relative(&cost.grad, &exact.grad);
            points.push((tol, error));
            let backward = match way {
                Way::Discrete => cost.stats.vjps,
                _ => cost.stats.backward.evaluations,
            };
            table.row([
                format!("{tol:e}"),
                way.name().to_owned(),
                cost.stats.evaluations.to_string(),
                backward.to_string(),
                format!("{:.1}", 1e3 * cost.seconds),
                format!("{error:.1e}"),
            ]);
            figures.push(
                json!({"rtol": tol, "way": way.name(), "forward": cost.stats.evaluations,
                "backward": backward, "seconds": cost.seconds, "error": error}),
            );
        }
    }
    println!("\nerrors against a converged gradient\n{table}");
    report.figure("errors", figures)?;
    let curves = ways
        .into_iter()
        .zip(points)
        .map(|(way, points)| curve(way, points));
    Ok(Panel {
        scales: [Scale::Decades; 2],
        curves: curves.collect(),
        legend: SeriesLabelPosition::UpperLeft,
        ..Panel::new(
            "error against a converged gradient",
            "rtol",
            "relative error",
        )
    })
}

/// dopri5, atol a thousandth of rtol.
fn adaptive(rtol: f64, double: bool) -> OdeOptions {
    OdeOptions {
        method: DOPRI5,
        steps: Steps::Adaptive(Adaptive::new(rtol, 1e-3 * rtol)),
        precision: double.then(Precision::f64),
        ..Default::default()
    }
}

fn in_a_process((way, seed): (Way, u64), steps: usize) -> Result<Cell> {
    let name = way.to_possible_value().ok_or("a way without a name")?;
    let output = Command::new(std::env::current_exe()?)
        .args(["--cell", name.get_name(), "--steps", &steps.to_string()])
        .args(["--seed", &seed.to_string()])
        .output()?;
    if !output.status.success() {
        return Err(String::from_utf8_lossy(&output.stderr).into_owned().into());
    }
    Ok(serde_json::from_slice(&output.stdout)?)
}
