//! Rows of very different speeds in one batch: steps of their own against steps of the whole batch.
//!
//! `cargo run --release --example stiff_rows` (`--smoke`: seconds).  Exits with 1 when rows of their
//! own do not save evaluations at every tolerance, or when their error is out of proportion to it.

mod picture;
mod problem;

use std::process::ExitCode;
use std::time::Instant;

use candle_core::Var;
use candle_diffeq::metrics::Recorder;
use candle_diffeq::options::{Adaptive, Norm, Output, StepControl, Steps};
use candle_diffeq::tableau::DOPRI5;
use candle_diffeq::OdeOptions;
use clap::Parser;
use serde_json::json;

use crate::problem::Problem;
use common::dtype::Dtype;
use common::flags::Flags;
use common::random::generator;
use common::report::{self, Report};
use common::table::{sci, Table};
use common::{mean, median, progress, values, Result};

const TIMES: [f64; 2] = [0.0, 1.0];
/// atol = rtol / 100.
const ATOL: f64 = 1e-2;
/// The tolerance whose rows are drawn.
const DRAWN: f64 = 1e-5;
/// How much worse than the tolerance a row may be after a hundred radians.
const PROPORTION: f64 = 1e3;

/// Steps by row against steps of the batch.
#[derive(Parser)]
struct Args {
    #[command(flatten)]
    flags: Flags,
}

/// Whose steps, and of which norm.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Control {
    Rows,
    Batch,
    WorstRow,
}

impl Control {
    const ALL: [Self; 3] = [Self::Rows, Self::WorstRow, Self::Batch];

    fn name(self) -> &'static str {
        match self {
            Self::Rows => "rows",
            Self::WorstRow => "batch, worst row",
            Self::Batch => "batch, mean",
        }
    }

    fn apply(self, adaptive: Adaptive) -> Adaptive {
        match self {
            Self::Rows => adaptive.control(StepControl::Rows),
            Self::Batch => adaptive.control(StepControl::Batch),
            Self::WorstRow => adaptive.control(StepControl::Batch).norm(Norm::WorstRow),
        }
    }
}

/// One solve.
struct Run {
    dtype: Dtype,
    control: Control,
    rtol: f64,
    /// Accepted steps of every row.
    steps: Vec<usize>,
    /// In the mean over the rows.
    evaluations: f64,
    /// Milliseconds, forward alone, and forward and backward.
    ms: [f64; 2],
    /// Relative, of every row at the end.
    errors: Vec<f64>,
}

impl Run {
    fn worst(&self) -> f64 {
        self.errors.iter().copied().fold(0.0, f64::max)
    }
}

fn main() -> ExitCode {
    let args = Args::parse();
    report::run("stiff_rows", &args.flags, |_, report| run(&args, report))
}

fn run(args: &Args, report: &mut Report) -> Result<()> {
    args.flags.cpu_only()?;
    let size = args.flags.size();
    let problem = problem::problem(&mut generator(args.flags.seed), size.pick(64, 1024, 1024))?;
    let tolerances = size.pick(
        &[1e-3, DRAWN][..],
        &[1e-3, 1e-4, DRAWN, 1e-6][..],
        &[1e-3, 1e-4, DRAWN, 1e-6][..],
    );
    let dtypes = args.flags.precisions_among(&[Dtype::F32], &Dtype::ALL)?;
    let repeats = size.pick(1, 5, 15);
    let exact = exact(&problem)?;
    let bar = progress(
        "solves",
        dtypes.len() * tolerances.len() * Control::ALL.len(),
    )?;
    let mut all = vec![];
    for &dtype in &dtypes {
        for &rtol in tolerances {
            for control in Control::ALL {
                all.push(solve(&problem, (dtype, control, rtol), repeats, &exact)?);
                bar.inc(1);
            }
        }
    }
    bar.finish_and_clear();
    print(&all);
    for (i, &dtype) in dtypes.iter().enumerate() {
        let part = if i == 0 { "" } else { dtype.name() };
        let of: Vec<&Run> = all.iter().filter(|run| run.dtype == dtype).collect();
        picture::draw(&report.picture(part), &problem.speeds, &of)?;
    }
    report.figure("rows", problem.speeds.len())?;
    report.figure("runs", all.iter().map(json).collect::<Vec<_>>())?;
    demands(&all, report);
    Ok(())
}

fn options(adaptive: Adaptive, recorder: &Recorder) -> OdeOptions {
    OdeOptions {
        method: DOPRI5,
        steps: Steps::Adaptive(adaptive),
        output: Output::Final,
        recorder: Some(recorder.clone()),
        ..Default::default()
    }
}

/// x at the end of every row, one after the other, in f64 at 1e-11.
fn exact(problem: &Problem) -> Result<Vec<f64>> {
    let adaptive = Control::Rows.apply(Adaptive::new(1e-11, 1e-13));
    let model = problem.model(Dtype::F64, options(adaptive, &Recorder::default()))?;
    let y = model.ode.predict(&model.y0, &TIMES)?;
    Ok(values(&y.narrow(1, 0, 2)?)?)
}

fn solve(
    problem: &Problem,
    (dtype, control, rtol): (Dtype, Control, f64),
    repeats: usize,
    exact: &[f64],
) -> Result<Run> {
    let recorder = Recorder::tracing();
    let adaptive = control.apply(Adaptive::new(rtol, ATOL * rtol));
    let model = problem.model(dtype, options(adaptive, &recorder))?;
    let y = model.ode.predict(&model.y0, &TIMES)?;
    let stats = recorder.take();
    let rows = problem.speeds.len();
    let (steps, evaluations) = match control {
        Control::Rows => (
            stats.rows.iter().map(|row| row.accepted).collect(),
            stats.row_evaluations as f64 / rows as f64,
        ),
        Control::Batch | Control::WorstRow => (vec![stats.steps; rows], stats.evaluations as f64),
    };
    let ours = values(&y.narrow(1, 0, 2)?)?;
    let error = |(ours, exact): (&[f64], &[f64])| common::relative(ours, exact);
    let errors = ours.chunks(2).zip(exact.chunks(2)).map(error).collect();
    let y0 = Var::from_tensor(&model.y0)?;
    let mut ms = [vec![], vec![]];
    for _ in 0..repeats {
        let clock = Instant::now();
        model.ode.predict(&model.y0, &TIMES)?;
        ms[0].push(1e3 * clock.elapsed().as_secs_f64());
        let clock = Instant::now();
        let y = model.ode.solve(y0.as_tensor(), &TIMES)?;
        y.sqr()?.mean_all()?.backward()?;
        ms[1].push(1e3 * clock.elapsed().as_secs_f64());
    }
    Ok(Run {
        dtype,
        control,
        rtol,
        steps,
        evaluations,
        ms: ms.map(median),
        errors,
    })
}

fn print(all: &[Run]) {
    let mut table = Table::new([
        "control",
        "f",
        "rtol",
        "steps, least",
        "mean",
        "most",
        "evaluations by row",
        "ms forward",
        "and backward",
        "error, median",
        "worst row",
    ]);
    for run in all {
        let steps: Vec<f64> = run.steps.iter().map(|n| *n as f64).collect();
        let least = run.steps.iter().min().copied().unwrap_or_default();
        let most = run.steps.iter().max().copied().unwrap_or_default();
        table.row([
            run.control.name().to_owned(),
            run.dtype.name().to_owned(),
            format!("{:.0e}", run.rtol),
            least.to_string(),
            format!("{:.1}", mean(&steps)),
            most.to_string(),
            format!("{:.0}", run.evaluations),
            format!("{:.1}", run.ms[0]),
            format!("{:.1}", run.ms[1]),
            sci(median(run.errors.clone())),
            sci(run.worst()),
        ]);
    }
    print!("{table}");
}

fn json(run: &Run) -> serde_json::Value {
    json!({
        "control": run.control.name(),
        "f": run.dtype.name(),
        "rtol": run.rtol,
        "steps": {
            "least": run.steps.iter().min(),
            "mean": mean(&run.steps.iter().map(|n| *n as f64).collect::<Vec<_>>()),
            "most": run.steps.iter().max(),
        },
        "evaluations_by_row": run.evaluations,
        "forward_ms": run.ms[0],
        "forward_and_backward_ms": run.ms[1],
        "error_median": median(run.errors.clone()),
        "error_worst": run.worst(),
    })
}

fn demands(all: &[Run], report: &mut Report) {
    for runs in all.chunks(Control::ALL.len()) {
        let [rows, worst_row, _] = runs else { continue };
        let name = format!("{}, rtol {:.0e}", rows.dtype.name(), rows.rtol);
        let saved = worst_row.evaluations / rows.evaluations;
        report.demand(saved >= 2.0, || {
            format!("{name}: rows save a factor of {saved:.1} only")
        });
        let most = PROPORTION * rows.rtol.max(rows.dtype.roundoff());
        report.demand(rows.worst() <= most, || {
            format!("{name}: a row is off by {:.1e}", rows.worst())
        });
    }
}
