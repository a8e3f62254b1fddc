//! Adaptive steps in four precisions: evaluations and errors over the tolerance, with the noise floor and without.
//!
//! `cargo run --release --example adaptive_precision` (a minute; `--smoke`: seconds).  Exits with 1 when low
//! precision costs more evaluations or gains less with the floor than it should, or when f64 is changed by it.

mod picture;
mod problem;

use std::process::ExitCode;

use candle_core::Device;
use candle_diffeq::metrics::Recorder;
use candle_diffeq::options::{Adaptive, Output, StepControl, Steps};
use candle_diffeq::tableau::{Tableau, BOSH3, DOPRI5};
use candle_diffeq::{Error, OdeOptions};
use clap::Parser;
use serde_json::{json, Map, Value};

use crate::problem::Problem;
use common::dtype::Dtype;
use common::flags::Flags;
use common::random::generator;
use common::report::{self, Report};
use common::table::{sci, Table};
use common::{geometric_mean, progress, relative, values, Result};

const DTYPES: [Dtype; 4] = [Dtype::F64, Dtype::F32, Dtype::F16, Dtype::Bf16];
/// atol = rtol / 100.
const ATOL: f64 = 1e-2;
/// The most attempts of a solve.
const ATTEMPTS: usize = 4000;
/// Of low precision with the floor: evaluations at the smallest tolerance over those at 1e-3.
const MOST: f64 = 3.0;
/// The same without: a solve that this example would show nothing with.
const LEAST: f64 = 20.0;

/// The error at the smallest tolerance with the floor, over the unit roundoff.
const ROUNDOFFS: f64 = 5.0;

/// Evaluations and errors of adaptive steps over the tolerance.
#[derive(Parser)]
struct Args {
    #[command(flatten)]
    flags: Flags,
}

/// Solves over the tolerance.
struct Series {
    problem: &'static str,
    method: Tableau,
    dtype: Dtype,
    floor: bool,
    runs: Vec<Run>,
}

/// Solves from all starts: counts in the mean, and the geometric mean of errors.
struct Run {
    rtol: f64,
    evaluations: usize,
    accepted: usize,
    rejected: usize,
    limited: usize,
    /// At the end against f64 at 1e-11; None where attempts of a solve were used up.
    error: Option<f64>,
}

fn main() -> ExitCode {
    let args = Args::parse();
    report::run("adaptive_precision", &args.flags, |device, report| {
        run(&args, device, report)
    })
}

fn run(args: &Args, device: &Device, report: &mut Report) -> Result<()> {
    let size = args.flags.size();
    let tolerances: Vec<f64> = match size.pick(true, false, false) {
        true => vec![1e-2, 1e-3, 1e-4],
        false => (2..=8).map(|k| 10f64.powi(-k)).collect(),
    };
    let attempts = size.pick(300, ATTEMPTS, ATTEMPTS);
    let dtypes = args.flags.precisions_among(&DTYPES, &Dtype::ALL)?;
    let problems = [
        problem::perceptron(&mut generator(args.flags.seed))?,
        problem::van_der_pol()?,
    ];
    let bar = progress("solves", 8 * dtypes.len() * tolerances.len())?;
    let mut all = vec![];
    for problem in &problems {
        let reference = exact(problem, device)?;
        for method in [DOPRI5, BOSH3] {
            for &dtype in &dtypes {
                for floor in [true, false] {
                    let mut runs = vec![];
                    for &rtol in &tolerances {
                        let adaptive = Adaptive::new(rtol, ATOL * rtol)
                            .noise_floor(floor)
                            .max_steps(attempts);
                        let given = (rtol, adaptive);
                        runs.push(solve(problem, &method, dtype, given, &reference, device)?);
                        bar.inc(1);
                    }
                    all.push(Series {
                        problem: problem.name,
                        method: method.clone(),
                        dtype,
                        floor,
                        runs,
                    });
                }
            }
        }
    }
    bar.finish_and_clear();
    print(&all, &tolerances);
    let names = problems.each_ref().map(|problem| problem.name);
    for (part, method) in [("", DOPRI5), ("bosh3", BOSH3)] {
        picture::draw(&report.picture(part), &all, names, &method, attempts)?;
    }
    report.figure("attempts", attempts)?;
    report.figure("series", all.iter().map(json).collect::<Vec<_>>())?;
    demands(&all, report);
    Ok(())
}

fn options(method: &Tableau, adaptive: Adaptive, recorder: &Recorder) -> OdeOptions {
    OdeOptions {
        method: method.clone(),
        steps: Steps::Adaptive(adaptive.control(StepControl::Batch)),
        output: Output::Final,
        recorder: Some(recorder.clone()),
        ..Default::default()
    }
}

/// y(T) in f64 at 1e-11 from every start.
fn exact(problem: &Problem, device: &Device) -> Result<Vec<Vec<f64>>> {
    let adaptive = Adaptive::new(1e-11, ATOL * 1e-11);
    let options = options(&DOPRI5, adaptive, &Recorder::default());
    let from = |y0| {
        Ok(values(&problem.solve(
            y0,
            Dtype::F64,
            options.clone(),
            device,
        )?)?)
    };
    problem.starts.iter().map(from).collect()
}

fn solve(
    problem: &Problem,
    method: &Tableau,
    dtype: Dtype,
    (rtol, adaptive): (f64, Adaptive),
    reference: &[Vec<f64>],
    device: &Device,
) -> Result<Run> {
    let recorder = Recorder::default();
    let options = options(method, adaptive, &recorder);
    let mut errors = vec![];
    for (y0, reference) in problem.starts.iter().zip(reference) {
        match problem.solve(y0, dtype, options.clone(), device) {
            Ok(y) => errors.push(relative(&values(&y)?, reference)),
            Err(Error::Stopped(_)) => {}
            Err(error) => return Err(error.into()),
        }
    }
    let (stats, starts) = (recorder.take(), problem.starts.len());
    Ok(Run {
        rtol,
        evaluations: stats.evaluations / starts,
        accepted: stats.steps / starts,
        rejected: stats.rejected / starts,
        limited: stats.limited / starts,
        error: (errors.len() == starts).then(|| geometric_mean(&errors)),
    })
}

fn print(all: &[Series], tolerances: &[f64]) {
    println!("evaluations / rejected / error at the end; !: stopped\n");
    let head = ["problem", "method", "f", "floor"].map(str::to_owned);
    let mut table = Table::of(
        head.into_iter()
            .chain(tolerances.iter().map(|t| format!("{t:.0e}"))),
    );
    for series in all {
        let first = [
            series.problem.to_owned(),
            series.method.name().to_owned(),
            series.dtype.name().to_owned(),
            if series.floor { "yes" } else { "no" }.to_owned(),
        ];
        let cell = |run: &Run| {
            let error = run.error.map_or_else(|| "!".to_owned(), sci);
            format!("{} / {} / {error}", run.evaluations, run.rejected)
        };
        table.line(first.into_iter().chain(series.runs.iter().map(cell)));
    }
    print!("{table}");
}

fn json(series: &Series) -> Value {
    let run = |run: &Run| {
        let mut figures = Map::new();
        let numbers = [
            ("evaluations", run.evaluations),
            ("accepted", run.accepted),
            ("rejected", run.rejected),
            ("limited", run.limited),
        ];
        figures.insert("rtol".to_owned(), json!(run.rtol));
        for (name, number) in numbers {
            figures.insert(name.to_owned(), json!(number));
        }
        match run.error {
            Some(error) => figures.insert("error".to_owned(), json!(error)),
            None => figures.insert("stopped".to_owned(), json!(true)),
        };
        Value::Object(figures)
    };
    json!({
        "problem": series.problem,
        "method": series.method.name(),
        "f": series.dtype.name(),
        "floor": series.floor,
        "runs": series.runs.iter().map(run).collect::<Vec<_>>(),
    })
}

fn demands(all: &[Series], report: &mut Report) {
    for pair in all.chunks(2) {
        let [with, without] = pair else { continue };
        let name = format!(
            "{}, {}, {}",
            with.problem,
            with.method.name(),
            with.dtype.name()
        );
        let at = |series: &Series, rtol: f64| {
            let close = |run: &&Run| (run.rtol / rtol - 1.0).abs() < 1e-6;
            let run = series.runs.iter().find(close)?;
            Some((run.evaluations as f64, run.error.unwrap_or(f64::NAN)))
        };
        let ends = |series| Some((at(series, 1e-3)?, at(series, 1e-8)?));
        let (Some((loose, tight)), Some((_, bare))) = (ends(with), ends(without)) else {
            continue;
        };
        match with.dtype {
            Dtype::F64 => {
                let counts = |s: &Series| s.runs.iter().map(|r| r.evaluations).collect::<Vec<_>>();
                let (ours, theirs) = (counts(with), counts(without));
                report.demand(ours == theirs, || format!("{name}: the floor changes it"));
            }
            Dtype::F32 => {}
            Dtype::Bf16 | Dtype::F16 => {
                let ratio = tight.0 / loose.0;
                report.demand(ratio <= MOST, || {
                    format!("{name}: {ratio:.1} times the evaluations at 1e-8")
                });
                let bare = bare.0 / loose.0;
                report.demand(bare >= LEAST, || {
                    format!("{name}: only {bare:.1} times the evaluations without the floor")
                });
                let most = ROUNDOFFS * with.dtype.roundoff();
                report.demand(tight.1 <= most, || {
                    format!("{name}: an error of {:.1e} at 1e-8", tight.1)
                });
            }
        }
    }
}
