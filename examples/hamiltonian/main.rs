//! Learns the energy of a spring, of a pendulum and of two bodies from points of trajectories, and rolls it out: a
//! Hamiltonian network beside a perceptron that learns the velocity.
//!
//! `cargo run --release --example hamiltonian` (minutes; `--smoke`: seconds).  torchdyn's tutorial 06, with data and
//! training of "Hamiltonian Neural Networks" (arXiv 1906.01563).  Prints a table, writes a picture and the figures as
//! JSON beside it.  Exits with 1 when the energy of the Hamiltonian network drifts as that of the perceptron does.

mod picture;
mod system;
mod training;

use std::process::ExitCode;

use candle_core::Device;
use clap::Parser;
use serde_json::json;

use crate::system::{Data, Task, TASKS};
use crate::training::{train, Kind, Outcome};
use common::dtype::Dtype;
use common::fit::Fit;
use common::flags::Flags;
use common::report::{self, Report};
use common::table::{sci, Table};
use common::{mean, progress, Result};

/// Trains Hamiltonian networks and perceptrons on three systems.
#[derive(Parser)]
struct Args {
    #[command(flatten)]
    flags: Flags,
    /// Iterations of each model [default: of the size].
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
    iters: Option<u32>,
    /// One of the systems alone, by its name.
    #[arg(long)]
    system: Option<String>,
}

fn main() -> ExitCode {
    let args = Args::parse();
    report::run("hamiltonian", &args.flags, |device, report| {
        run(&args, device, report)
    })
}

fn run(args: &Args, device: &Device, report: &mut Report) -> Result<()> {
    let size = args.flags.size();
    let mut fit = Fit::new(size.pick(10, 2000, 2000), 1e-3).weight_decay(1e-4);
    if let Some(iterations) = args.iters {
        fit = fit.iterations(iterations as usize);
    }
    // A second precision doubles the time: ask for it with --precision.
    let both: &[Dtype] = &[Dtype::F32, Dtype::Bf16];
    let precisions = size.pick(both, &both[..1], both);
    let mut outcomes = vec![];
    let wanted = |task: &&Task| args.system.as_ref().is_none_or(|name| name == task.name);
    for task in TASKS.iter().filter(wanted) {
        for seed in (0..size.pick(1, task.trainings, task.trainings)).map(|i| args.flags.seed + i) {
            let data = Data::new(task, seed, device)?;
            for dtype in args.flags.precisions(precisions)? {
                for kind in [Kind::Hamiltonian, Kind::Perceptron] {
                    let bar = progress(task.name, fit.iterations)?;
                    outcomes.push(train(&data, kind, (dtype, &fit), seed, &bar)?);
                    bar.finish_and_clear();
                }
            }
        }
    }
    if outcomes.is_empty() {
        let names = TASKS.map(|task| task.name).join(", ");
        return Err(format!("--system is one of: {names}").into());
    }
    print(&outcomes);
    picture::draw(&report.picture(""), &outcomes, device)?;
    report.figure("iterations", fit.iterations)?;
    report.figure("runs", outcomes.iter().map(json).collect::<Vec<_>>())?;
    demands(&outcomes, report);
    Ok(())
}

fn print(outcomes: &[Outcome]) {
    let mut table = Table::new([
        "system",
        "seed",
        "model",
        "precision",
        "train MSE",
        "test MSE",
        "energy MSE",
        "state MSE",
        "s",
    ]);
    for o in outcomes {
        table.row([
            o.task.name.to_owned(),
            o.seed.to_string(),
            o.kind.name().to_owned(),
            o.dtype.name().to_owned(),
            sci(o.train),
            sci(o.test),
            sci(o.energy),
            sci(o.state),
            format!("{:.0}", o.seconds),
        ]);
    }
    print!("{table}");
}

fn json(o: &Outcome) -> serde_json::Value {
    json!({
        "system": o.task.name,
        "seed": o.seed,
        "model": o.kind.name(),
        "precision": o.dtype.name(),
        "train_mse": o.train,
        "test_mse": o.test,
        "energy_mse": report::any(o.energy),
        "state_mse": report::any(o.state),
        "seconds": o.seconds,
    })
}

/// Where the perceptron's energy is off more, by the factor that is asked for, in the mean of the trainings.  NaN of the
/// Hamiltonian network misses.
fn demands(outcomes: &[Outcome], report: &mut Report) {
    let mut seen = vec![];
    for o in outcomes {
        let (task, dtype) = (o.task, o.dtype.name());
        if seen.contains(&(task.name, dtype)) {
            continue;
        }
        seen.push((task.name, dtype));
        let of = |kind| {
            let same =
                |p: &&Outcome| p.task.name == task.name && p.dtype == o.dtype && p.kind == kind;
            let energies: Vec<_> = outcomes.iter().filter(same).map(|p| p.energy).collect();
            mean(&energies)
        };
        let (ours, other) = (of(Kind::Hamiltonian), of(Kind::Perceptron));
        let (factor, ratio) = (task.factor, other / ours);
        let holds = ours * factor <= other || other.is_nan();
        report.demand(holds && ours.is_finite(), || {
            let name = task.name;
            format!("{name}, {dtype}: the energy error is {ratio:.1} times below the perceptron's, not {factor}")
        });
    }
}
