//! What data-parallel training costs, measured on this machine and modelled up to 1024 ranks.
//!
//! `cargo run --release --features mpi --example scaling` (minutes; `--smoke`: seconds) starts itself again, alone and under
//! `mpirun`: a training step of W1, W2 and a classifier of MNIST in 1 process with 2 threads, 2 with 1 and 1 with 1, in turn;
//! the step against bytes of θ; sums over two ranks against bytes, to which α + β · bytes is fitted.  Exits with 1 if 2
//! processes with 1 thread take longer than 1.10 times what 1 process with 2 threads takes on W1 or W2.

mod job;
mod model;
#[path = "../ode_mnist/network.rs"]
#[allow(dead_code)]
mod network;
mod picture;

use std::process::{Command, ExitCode, Stdio};

use clap::Parser;
use serde_json::{json, Value};

use crate::job::{Job, Point, WORKLOADS};
use crate::model::{fit, Linear, Network, NETWORKS, RANKS};
use common::flags::Flags;
use common::report::{self, Report};
use common::table::Table;
use common::team::Together;
use common::threads::THREADS;
use common::{median, Result};

/// Two processes with one thread, in times of one process with two.
const BAR: f64 = 1.10;
/// What is called efficient.
const EFFICIENT: f64 = 0.9;

#[derive(Parser)]
struct Args {
    #[command(flatten)]
    flags: Flags,
    #[command(flatten)]
    together: Together,
    /// What a process that this example has started measures.
    #[arg(long, hide = true)]
    job: Option<Job>,
}

/// Processes and their threads.
#[derive(Clone, Copy)]
pub(crate) struct Layout {
    pub(crate) ranks: usize,
    pub(crate) threads: usize,
}

/// In the order in which they take their turn.
pub(crate) const LAYOUTS: [Layout; 3] = [
    Layout {
        ranks: 1,
        threads: 2,
    },
    Layout {
        ranks: 2,
        threads: 1,
    },
    Layout {
        ranks: 1,
        threads: 1,
    },
];

impl Layout {
    pub(crate) fn name(self) -> String {
        let (processes, threads) = match (self.ranks, self.threads) {
            (1, 1) => ("process", "thread"),
            (1, _) => ("process", "threads"),
            (_, 1) => ("processes", "thread"),
            _ => ("processes", "threads"),
        };
        format!("{} {processes} × {} {threads}", self.ranks, self.threads)
    }

    /// Measures in processes of its own.
    fn run(self, job: Job, flags: &Flags) -> Result<Vec<Point>> {
        let program = std::env::current_exe()?;
        let (mut command, cannot_run) = match self.ranks {
            1 => {
                let cannot_run = format!("{} cannot be run", program.display());
                (Command::new(program), cannot_run)
            }
            ranks => {
                let mut command = Command::new("mpirun");
                command.args([
                    "-n",
                    &ranks.to_string(),
                    "--oversubscribe",
                    "--allow-run-as-root",
                ]);
                command
                    .args(["--bind-to", "none"])
                    .arg(program)
                    .arg("--mpi");
                let cannot_run = "mpirun cannot be run; scripts/mpi.sh installs it";
                (command, cannot_run.to_owned())
            }
        };
        let size = flags.size().pick(&["--smoke"][..], &[], &["--full"]);
        let output = command
            .args(["--job", job.name()])
            .args(["--seed", &flags.seed.to_string()])
            .args(size)
            .env(THREADS, self.threads.to_string())
            .env("CANDLE_NUM_THREADS", self.threads.to_string())
            .stderr(Stdio::inherit())
            .output()
            .map_err(|e| format!("{cannot_run}: {e}"))?;
        let text = String::from_utf8(output.stdout)?;
        match text.lines().find_map(|line| line.strip_prefix(job::MARK)) {
            Some(line) if output.status.success() => Ok(serde_json::from_str(line)?),
            _ => Err(format!("{}, {}: it failed", self.name(), job.name()).into()),
        }
    }
}

/// What was measured.
pub(crate) struct Measured {
    /// A step of each workload in each layout, in milliseconds: one for each round.
    pub(crate) steps: Vec<Vec<Vec<f64>>>,
    /// A step against bytes of θ, in each layout.
    pub(crate) widths: Vec<Vec<Point>>,
    /// A sum over two ranks against bytes, in milliseconds.
    pub(crate) sums: Vec<Point>,
    /// What it is taken for.
    pub(crate) sum: Linear,
    /// A step against rows, of one thread.
    pub(crate) rows: Vec<Linear>,
    /// Bytes of θ, of each workload.
    pub(crate) bytes: Vec<f64>,
}

fn main() -> ExitCode {
    let args = Args::parse();
    if let Some(job) = args.job {
        return job::main(job, &args.flags, args.together.team());
    }
    report::run("scaling", &args.flags, |_, report| run(&args, report))
}

fn run(args: &Args, report: &mut Report) -> Result<()> {
    args.flags.cpu_only()?;
    args.flags.fixed_precisions("f32")?;
    let measured = measure(&args.flags)?;
    steps(&measured, report)?;
    sums(&measured, report)?;
    efficiencies(&measured, report)?;
    picture::draw(&report.picture(""), &measured)
}

fn measure(flags: &Flags) -> Result<Measured> {
    let rounds = flags.size().pick(1, 7, 15);
    let mut steps = vec![vec![vec![]; LAYOUTS.len()]; WORKLOADS.len()];
    let mut bytes = vec![];
    for _ in 0..rounds {
        for (l, layout) in LAYOUTS.iter().enumerate() {
            let points = layout.run(Job::Steps, flags)?;
            bytes = points.iter().map(|p| p.x).collect();
            points
                .iter()
                .enumerate()
                .for_each(|(w, p)| steps[w][l].push(p.y));
        }
    }
    let widths = LAYOUTS.iter().map(|layout| layout.run(Job::Widths, flags));
    let widths = widths.collect::<Result<_>>()?;
    let sums = LAYOUTS[1].run(Job::Sums, flags)?;
    let rows = LAYOUTS[2].run(Job::Rows, flags)?;
    let rows = rows.chunks(job::ROWS).map(fit).collect();
    Ok(Measured {
        sum: fit(&sums),
        steps,
        widths,
        sums,
        rows,
        bytes,
    })
}

fn least(times: &[f64]) -> f64 {
    times.iter().copied().fold(f64::INFINITY, f64::min)
}

fn steps(measured: &Measured, report: &mut Report) -> Result<()> {
    let layouts = LAYOUTS.iter().map(|l| format!("{}, ms", l.name()));
    let ends = ["2 × 1 / 1 × 2, medians", "least", "median of pairs"].map(str::to_owned);
    let mut table = Table::of(
        std::iter::once("training step: median (least)".to_owned())
            .chain(layouts)
            .chain(ends),
    );
    let mut figures = vec![];
    for (workload, of) in WORKLOADS.iter().zip(&measured.steps) {
        let shown = of
            .iter()
            .map(|t| format!("{:.1} ({:.1})", median(t.clone()), least(t)));
        let [one, two] = [&of[0], &of[1]];
        let medians = median(two.clone()) / median(one.clone());
        let leasts = least(two) / least(one);
        let pairs = median(two.iter().zip(one).map(|(a, b)| a / b).collect());
        let ratios = [medians, leasts, pairs];
        table.line(
            std::iter::once(workload.name.to_owned())
                .chain(shown)
                .chain(ratios.map(|r| format!("{r:.3}"))),
        );
        figures.push(json!({ "workload": workload.name, "milliseconds": of, "ratios": ratios }));
        if workload.must_hold {
            report.demand(medians <= BAR, || {
                format!("{}: {medians:.3} times, not {BAR}", workload.name)
            });
        }
    }
    println!("{table}");
    report.figure("steps", figures)?;
    let widths = measured.widths.iter().zip(LAYOUTS);
    let widths: Vec<Value> = widths
        .map(|(points, l)| json!({ "layout": l.name(), "step": points }))
        .collect();
    report.figure("widths", widths)
}

fn sums(measured: &Measured, report: &mut Report) -> Result<()> {
    let mut table = Table::new(["bytes", "sum over 2 ranks, ms", "α + β · bytes, ms"]);
    for Point { x, y } in &measured.sums {
        table.row([
            format!("{x:.0}"),
            format!("{y:.4}"),
            format!("{:.4}", measured.sum.at(*x)),
        ]);
    }
    let Linear { start, slope } = measured.sum;
    println!(
        "{table}\nα = {:.1} µs, β = {:.2} ns for a byte\n",
        1e3 * start,
        1e6 * slope
    );
    report.figure("sums", &measured.sums)?;
    report.figure("alpha_ms", start)?;
    report.figure("beta_ms", slope)
}

fn efficiencies(measured: &Measured, report: &mut Report) -> Result<()> {
    let ranks = RANKS.map(|n| format!("{n} ranks"));
    let head = ["rows of a rank for 90 %", "bytes of θ", "network"].map(str::to_owned);
    let mut table = Table::of(head.into_iter().chain(ranks));
    let mut figures = vec![];
    for (w, workload) in WORKLOADS.iter().enumerate() {
        for network in networks(measured.sum) {
            let needed =
                RANKS.map(|n| network.rows(n, measured.bytes[w], measured.rows[w], EFFICIENT));
            table.line(
                [
                    workload.name.to_owned(),
                    format!("{:.0}", measured.bytes[w]),
                    network.name.to_owned(),
                ]
                .into_iter()
                .chain(needed.map(|rows| format!("{rows:.0}"))),
            );
            figures.push(
                json!({ "workload": workload.name, "network": network.name, "rows": needed }),
            );
        }
    }
    println!("{table}");
    report.figure("rows_for_90_percent", figures)?;
    report.figure("bytes", &measured.bytes)?;
    let rows: Vec<_> = measured.rows.iter().map(|l| [l.start, l.slope]).collect();
    report.figure("step_by_rows_ms", rows)
}

/// What is measured here, and those that are assumed.
pub(crate) fn networks(measured: Linear) -> Vec<Network> {
    let here = Network {
        name: "measured here",
        alpha: measured.start,
        beta: measured.slope,
    };
    std::iter::once(here).chain(NETWORKS).collect()
}
