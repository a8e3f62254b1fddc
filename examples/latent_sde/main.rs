//! A latent SDE in one dimension: the posterior of a path given twenty noisy points, as a stochastic differential equation
//! whose drift is a network, under an Ornstein-Uhlenbeck prior.  The KL divergence of the two path measures is a second
//! tensor of the state, without noise.
//!
//! `cargo run --release --example latent_sde` (two minutes; `--smoke`: seconds).  After Li, Wong, Chen, Duvenaud, "Scalable
//! gradients for stochastic differential equations" (2020), §7.1.  Exits with 1 when the posterior misses the points.

mod model;
mod picture;

use std::process::ExitCode;
use std::time::Instant;

use candle_core::Device;
use clap::Parser;
use serde_json::json;

use crate::model::{Data, Latent, Losses};
use common::dtype::Dtype;
use common::flags::{Flags, Size};
use common::progress;
use common::report::{self, Report};
use common::table::Table;
use common::Result;

/// A path given points.
#[derive(Parser)]
struct Args {
    #[command(flatten)]
    flags: Flags,
}

/// How much is trained.
struct Plan {
    batch: usize,
    hidden: usize,
    updates: usize,
    /// Updates over which the KL divergence comes to count in full.
    annealed: usize,
    samples: usize,
}

impl Plan {
    fn of(size: Size) -> Self {
        let [batch, hidden, updates, annealed, samples] = size.pick(
            [16, 16, 5, 2, 50],
            [128, 64, 400, 50, 1000],
            [512, 200, 5000, 100, 1024],
        );
        Self {
            batch,
            hidden,
            updates,
            annealed,
            samples,
        }
    }
}

/// A trained model of one precision.
pub(crate) struct Run {
    dtype: Dtype,
    losses: Vec<Losses>,
    seconds: f64,
    /// Times, and the 5, 25, 50, 75 and 95 % of samples at each of them.
    pub(crate) times: Vec<f64>,
    pub(crate) posterior: Vec<[f64; 5]>,
    pub(crate) prior: Vec<[f64; 5]>,
    pub(crate) samples: Vec<Vec<f64>>,
    /// Root mean square distance of the posterior's mean from the points.
    distance: f64,
}

fn main() -> ExitCode {
    let args = Args::parse();
    report::run("latent_sde", &args.flags, |device, report| {
        run(&args, device, report)
    })
}

fn run(args: &Args, device: &Device, report: &mut Report) -> Result<()> {
    let plan = Plan::of(args.flags.size());
    let data = Data::new(args.flags.seed);
    let dtypes = args
        .flags
        .precisions_among(&[Dtype::F32, Dtype::Bf16], &Dtype::ALL)?;
    let bar = progress("train", dtypes.len() * plan.updates)?;
    let mut runs = vec![];
    for dtype in dtypes {
        let mut latent = Latent::new(dtype, plan.hidden, args.flags.seed, device)?;
        let clock = Instant::now();
        let mut losses = vec![];
        for update in 0..plan.updates {
            let weight = (update as f64 / plan.annealed as f64).min(1.0);
            let loss = latent.update(&data, plan.batch, update as u64, weight)?;
            bar.set_message(format!("{} {:.1}", dtype.name(), loss.total()));
            losses.push(loss);
            bar.inc(1);
        }
        let seconds = clock.elapsed().as_secs_f64();
        let (times, posterior, samples) = latent.bands(plan.samples, args.flags.seed)?;
        let prior = latent.prior_bands(&times, plan.samples, args.flags.seed)?;
        runs.push(Run {
            dtype,
            seconds,
            distance: latent.distance(&data, plan.samples)?,
            losses,
            times,
            posterior,
            prior,
            samples,
        });
    }
    bar.finish_and_clear();
    print(&runs, &plan);
    for (i, run) in runs.iter().enumerate() {
        let part = if i == 0 { "" } else { run.dtype.name() };
        picture::draw(&report.picture(part), &data, run)?;
    }
    report.figure("runs", runs.iter().map(json).collect::<Vec<_>>())?;
    for run in &runs {
        report.demand(run.distance < 0.1, || {
            format!("{}: {:.3} from the points", run.dtype.name(), run.distance)
        });
    }
    Ok(())
}

fn print(runs: &[Run], plan: &Plan) {
    let mut table = Table::new([
        "precision",
        "update",
        "-log p",
        "KL of y0",
        "KL of path",
        "s",
    ]);
    for run in runs {
        for share in [0, 1, 2, 3, 4] {
            let at = (share * plan.updates / 4).min(plan.updates - 1);
            let loss = &run.losses[at];
            table.row([
                run.dtype.name().to_owned(),
                at.to_string(),
                format!("{:.2}", loss.points),
                format!("{:.3}", loss.start),
                format!("{:.3}", loss.path),
                format!("{:.1}", run.seconds * (at + 1) as f64 / plan.updates as f64),
            ]);
        }
    }
    println!("{table}");
    for run in runs {
        let (name, distance) = (run.dtype.name(), run.distance);
        println!("{name}: the mean of the posterior is {distance:.3} from the points (rms)");
    }
}

fn json(run: &Run) -> serde_json::Value {
    let of = |figure: fn(&Losses) -> f64| run.losses.iter().map(figure).collect::<Vec<_>>();
    json!({
        "precision": run.dtype.name(),
        "seconds": run.seconds,
        "distance": run.distance,
        "points": of(|loss| loss.points),
        "kl_start": of(|loss| loss.start),
        "kl_path": of(|loss| loss.path),
    })
}
