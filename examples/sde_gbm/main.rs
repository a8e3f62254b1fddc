//! Strong and weak orders of every method for stochastic differential equations, on geometric Brownian motion
//! dY = a Y dt + b Y dW and on an Ornstein-Uhlenbeck process, whose solutions are known.
//!
//! `cargo run --release --example sde_gbm` (a minute; `--smoke`: seconds).  Exits with 1 when an observed strong order is
//! more than 0.1 below the method's, or the weak order of Euler-Maruyama is not one.

mod picture;
mod problem;

use std::process::ExitCode;
use std::time::Instant;

use candle_core::{DType, Device};
use candle_diffeq::sde::{SdeMethod, ALL, EULER_MARUYAMA, SRA1};
use clap::Parser;
use serde_json::json;

use crate::problem::Problem;
use common::flags::Flags;
use common::report::{self, Report};
use common::table::{sci, Table};
use common::{progress, Result};

/// Orders of convergence.
#[derive(Parser)]
struct Args {
    #[command(flatten)]
    flags: Flags,
}

/// Errors of one method over the numbers of steps.
struct Run {
    problem: Problem,
    method: SdeMethod,
    steps: Vec<usize>,
    /// Root mean square over the paths of the error at the end.
    strong: Vec<f64>,
    /// |E[Y²] − its exact value| with the exact path as control variate, and its sampling error.
    weak: Vec<(f64, f64)>,
    /// Microseconds for a step of one path, at most steps.
    microseconds: f64,
}

impl Run {
    fn name(&self) -> &'static str {
        self.method.name()
    }

    /// The slope of ln(error) over ln(h) by least squares.
    fn strong_order(&self) -> f64 {
        slope(&self.steps, &self.strong)
    }

    /// The same of the weak error, where it is known to a tenth.
    fn weak_order(&self) -> Option<f64> {
        let known = self.steps.iter().zip(&self.weak);
        let known = known.filter(|(_, (error, deviation))| error.abs() > 10.0 * deviation);
        let (steps, errors): (Vec<_>, Vec<_>) = known.map(|(n, (e, _))| (*n, e.abs())).unzip();
        (steps.len() >= 3).then(|| slope(&steps, &errors))
    }

    fn expected(&self) -> Option<f64> {
        let (noise, additive) = self.problem.noise();
        self.method.strong_order(noise, additive)
    }
}

fn slope(steps: &[usize], errors: &[f64]) -> f64 {
    let points = steps.iter().zip(errors);
    let points: Vec<_> = points.map(|(n, e)| (-(*n as f64).ln(), e.ln())).collect();
    let mean =
        |of: fn(&(f64, f64)) -> f64| points.iter().map(of).sum::<f64>() / points.len() as f64;
    let (x, y) = (mean(|p| p.0), mean(|p| p.1));
    let covariance: f64 = points.iter().map(|p| (p.0 - x) * (p.1 - y)).sum();
    covariance / points.iter().map(|p| (p.0 - x).powi(2)).sum::<f64>()
}

fn main() -> ExitCode {
    let args = Args::parse();
    report::run("sde_gbm", &args.flags, |device, report| {
        run(&args, device, report)
    })
}

fn run(args: &Args, device: &Device, report: &mut Report) -> Result<()> {
    args.flags.fixed_precisions("f64")?;
    let size = args.flags.size();
    let paths = size.pick(256, 20_000, 100_000);
    let steps = size.pick(
        vec![4, 8, 16],
        vec![4, 8, 16, 32, 64],
        vec![4, 8, 16, 32, 64, 128],
    );
    let of_problem = |problem: Problem| {
        let methods = ALL.into_iter().filter(move |m| problem.is_solved_by(*m));
        methods.map(move |m| (problem, m))
    };
    let pairs: Vec<_> = Problem::ALL.into_iter().flat_map(of_problem).collect();
    let bar = progress("runs", pairs.len() * steps.len())?;
    let finest = steps[steps.len() - 1];
    let path = problem::path(args.flags.seed, finest, paths, DType::F64, device)?;
    let mut runs = vec![];
    for (problem, method) in pairs {
        let exact = problem.exact(&path, method)?;
        let mut run = Run {
            problem,
            method,
            steps: steps.clone(),
            strong: vec![],
            weak: vec![],
            microseconds: 0.0,
        };
        for &n in &steps {
            let clock = Instant::now();
            let y = problem.solve(method, &path, n)?;
            run.microseconds = 1e6 * clock.elapsed().as_secs_f64() / (n * paths) as f64;
            run.strong.push(problem::root_mean_square(&y, &exact)?);
            run.weak.push(problem::second_moment(&y, &exact)?);
            bar.inc(1);
        }
        runs.push(run);
    }
    bar.finish_and_clear();
    print(&runs);
    picture::draw(&report.picture(""), &runs)?;
    report.figure("paths", paths)?;
    report.figure("runs", runs.iter().map(json).collect::<Vec<_>>())?;
    demands(&runs, report);
    Ok(())
}

fn print(runs: &[Run]) {
    let mut table = Table::new([
        "problem",
        "method",
        "order",
        "observed",
        "weak",
        "error 4 steps",
        "most steps",
        "us/step",
    ]);
    for run in runs {
        table.row([
            run.problem.name().to_owned(),
            run.name().to_owned(),
            run.expected()
                .map_or_else(String::new, |order| format!("{order}")),
            format!("{:.2}", run.strong_order()),
            run.weak_order()
                .map_or_else(|| "-".to_owned(), |order| format!("{order:.2}")),
            sci(run.strong[0]),
            sci(run.strong[run.strong.len() - 1]),
            format!("{:.3}", run.microseconds),
        ]);
    }
    println!("{table}");
}

fn json(run: &Run) -> serde_json::Value {
    json!({
        "problem": run.problem.name(),
        "method": run.name(),
        "steps": run.steps,
        "strong_errors": run.strong,
        "strong_order": run.strong_order(),
        "weak_errors": run.weak.iter().map(|(e, _)| e).collect::<Vec<_>>(),
        "weak_deviations": run.weak.iter().map(|(_, d)| d).collect::<Vec<_>>(),
        "microseconds_a_step_and_path": run.microseconds,
    })
}

fn demands(runs: &[Run], report: &mut Report) {
    for run in runs {
        let (observed, expected) = (run.strong_order(), run.expected().unwrap_or(f64::NAN));
        report.demand(observed >= expected - 0.1, || {
            format!(
                "{} on {}: strong order {observed:.2} for {expected}",
                run.name(),
                run.problem.name()
            )
        });
        if run.method == EULER_MARUYAMA && run.problem == Problem::Gbm {
            let order = run.weak_order();
            report.demand(order.is_some_and(|o| (o - 1.0).abs() <= 0.15), || {
                format!("Euler-Maruyama: weak order {order:?}")
            });
        }
    }
    let additive = runs.iter().filter(|run| run.method == SRA1);
    report.demand(additive.count() == 1, || "SRA1 was not run".to_owned());
}
