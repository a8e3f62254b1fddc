//! A latent SDE of a stochastic Lorenz attractor: an encoder reads noisy series from the last point to the first, and gives
//! the law of a latent path of four coordinates; its prior, without the encoder, is a model of the attractor.
//!
//! `cargo run --release --example latent_sde_lorenz` (minutes; `--smoke`: seconds).  A short form of the experiment of Li,
//! Wong, Chen, Duvenaud, "Scalable gradients for stochastic differential equations" (2020), §7.2: fewer series, times,
//! units and updates, and a wider likelihood.  Exits with 1 when samples given a series do not follow it.

mod data;
mod model;
mod networks;
mod picture;

use std::process::ExitCode;
use std::time::Instant;

use candle_core::Device;
use clap::Parser;
use rand::Rng;
use serde_json::json;

use crate::data::Data;
use crate::model::{by_row, Latent, Losses, Paths};
use common::dtype::Dtype;
use common::flags::{Flags, Size};
use common::random::generator;
use common::report::{self, Report};
use common::table::Table;
use common::{mean, progress, Result};

/// Root mean square distance of a series that was not trained on from the mean of its samples, in deviations of the data,
/// at most.
const NEAR: f64 = 0.35;
/// The last series of the data, by which that is measured, and samples of each.
const HELD: usize = 8;
const SAMPLES: usize = 16;

/// A latent model of an attractor.
#[derive(Parser)]
struct Args {
    #[command(flatten)]
    flags: Flags,
    /// Updates [default: of the size].
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
    updates: Option<u32>,
}

/// How much is trained.
struct Plan {
    /// To train on; as many as [`HELD`] follow them in the data.
    series: usize,
    length: usize,
    hidden: usize,
    batch: usize,
    updates: usize,
    /// Updates over which the KL divergences come to count in full.
    annealed: usize,
}

impl Plan {
    fn of(size: Size) -> Self {
        let [series, length, hidden, batch, updates, annealed] = size.pick(
            [16, 9, 16, 8, 2, 1],
            [256, 41, 32, 32, 400, 200],
            [1024, 100, 128, 1024, 5000, 1000],
        );
        Self {
            series,
            length,
            hidden,
            batch,
            updates,
            annealed,
        }
    }
}

/// A trained model of one precision.
pub(crate) struct Run {
    pub(crate) dtype: Dtype,
    pub(crate) losses: Vec<Losses>,
    seconds: f64,
    /// Of the series that are held out.
    distance: f64,
    /// Samples given the first of these, and of the prior.
    pub(crate) samples: Paths,
    pub(crate) dreams: Paths,
}

fn main() -> ExitCode {
    let args = Args::parse();
    report::run("latent_sde_lorenz", &args.flags, |device, report| {
        run(&args, device, report)
    })
}

fn run(args: &Args, device: &Device, report: &mut Report) -> Result<()> {
    let (seed, mut plan) = (args.flags.seed, Plan::of(args.flags.size()));
    if let Some(updates) = args.updates {
        plan.updates = updates as usize;
    }
    let data = Data::new(plan.series + HELD, plan.length, seed)?;
    let mut runs = vec![];
    for dtype in args
        .flags
        .precisions_among(&[Dtype::F32, Dtype::Bf16], &Dtype::ALL)?
    {
        let bar = progress(dtype.name(), plan.updates)?;
        let mut latent = Latent::new(dtype, plan.hidden, seed, device)?;
        let (mut rng, clock) = (generator(seed), Instant::now());
        let mut losses = vec![];
        for update in 0..plan.updates {
            let any = || rng.random_range(0..plan.series as u32);
            let chosen: Vec<u32> = std::iter::repeat_with(any).take(plan.batch).collect();
            let weight = ((update + 1) as f64 / plan.annealed as f64).min(1.0);
            let fresh = seed << 32 | (update as u64 + 1);
            let loss = latent.update(&data, &chosen, update, (fresh, weight))?;
            bar.set_message(format!("-log p {:.0}, KL {:.0}", loss.points, loss.path));
            losses.push(loss);
            bar.inc(1);
        }
        bar.finish_and_clear();
        runs.push(Run {
            dtype,
            losses,
            seconds: clock.elapsed().as_secs_f64(),
            distance: distance(&latent, &data, plan.series, seed)?,
            samples: latent.samples(&data, plan.series, SAMPLES, seed + 5)?,
            dreams: latent.dreams(&data.times, SAMPLES, seed + 6)?,
        });
    }
    print(&runs, &plan);
    for (i, run) in runs.iter().enumerate() {
        let part = if i == 0 { "" } else { run.dtype.name() };
        picture::draw(&report.picture(part), (&data, plan.series), run)?;
    }
    report.figure("runs", runs.iter().map(json).collect::<Vec<_>>())?;
    for run in &runs {
        report.demand(run.distance <= NEAR, || {
            let name = run.dtype.name();
            format!(
                "{name}: samples are {:.2} from their series, not {NEAR}",
                run.distance
            )
        });
    }
    Ok(())
}

/// Root mean square distance of the series from this one on from the means of their samples.
fn distance(latent: &Latent, data: &Data, first: usize, seed: u64) -> Result<f64> {
    let truth = by_row(&data.values)?;
    let mut squares = vec![];
    for (series, truth) in truth.iter().enumerate().skip(first) {
        let samples = latent.samples(data, series, SAMPLES, seed + 100 + series as u64)?;
        for (time, truth) in truth.iter().enumerate() {
            for (i, x) in truth.iter().enumerate() {
                let all: Vec<f64> = samples.iter().map(|path| path[time][i]).collect();
                squares.push((mean(&all) - x).powi(2));
            }
        }
    }
    Ok(mean(&squares).sqrt())
}

fn print(runs: &[Run], plan: &Plan) {
    let mut table = Table::new([
        "precision",
        "update",
        "-log p",
        "KL of z0",
        "KL of path",
        "distance",
        "s",
    ]);
    for run in runs {
        for share in [0, 1, 2, 4] {
            let at = (share * plan.updates / 4).min(plan.updates - 1);
            let loss = &run.losses[at];
            let at_end = at + 1 == plan.updates;
            table.row([
                run.dtype.name().to_owned(),
                at.to_string(),
                format!("{:.1}", loss.points),
                format!("{:.2}", loss.start),
                format!("{:.2}", loss.path),
                if at_end {
                    format!("{:.3}", run.distance)
                } else {
                    String::new()
                },
                if at_end {
                    format!("{:.0}", run.seconds)
                } else {
                    String::new()
                },
            ]);
        }
    }
    print!("{table}");
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
