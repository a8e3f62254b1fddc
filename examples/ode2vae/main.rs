//! Learns how a three turns, from the first of its frames: latent dynamics of second order with random weights.
//!
//! `cargo run --release --example ode2vae -- --data DIR` (minutes; `--smoke`: seconds).  "ODE²VAE" (arXiv 1905.10994) at a
//! reduced size: sixteen frames of a rotating three in 14 × 14 pixels, perceptrons in place of convolutions, the weights of
//! the dynamics drawn once a solve.  DIR holds MNIST's test set, `t10k-images-idx3-ubyte` and its labels, gzipped or not;
//! without it, threes are drawn of arcs.  Prints errors on held-out sequences, writes a picture and the figures as JSON beside it.
//! Exits with 1 when the error is above six tenths of that of the mean sequence, or in bf16 a tenth above that of f32.

mod data;
mod model;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use candle_core::{Device, Tensor};
use candle_nn::VarMap;
use clap::Parser;
use rand::Rng;
use serde_json::json;

use crate::data::{Data, FRAMES, SIDE};
use crate::model::Model;
use common::chart::{colour, picture, Area, Curve, Heat, Panel, Scale};
use common::dtype::Dtype;
use common::fit::Fit;
use common::flags::Flags;
use common::random::generator;
use common::report::{self, Report};
use common::table::Table;
use common::{initial, progress, values, Result};

const FIT: Fit = Fit::new(1200, 3e-3).falling_to(0.05);
const BATCH: usize = 40;
/// Weights of the divergences at first and at last, between which the third quarter of the updates leads.  A pixel is the mean
/// of four published ones, so a quarter weighs divergences and likelihood as published.
const DIVERGENCES: [f64; 2] = [0.01, 0.25];
/// The error over that of the mean sequence, and how much more it may be in low precision.
const SHARE: f64 = 0.6;
const LOW: f64 = 1.1;

/// Learns how a three turns.
#[derive(Parser)]
struct Args {
    #[command(flatten)]
    flags: Flags,
    /// The folder of MNIST's test set; without it threes are drawn of arcs.
    #[arg(long, value_name = "DIR")]
    data: Option<PathBuf>,
    /// Updates in each precision [default: of the size].
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
    iters: Option<u32>,
}

struct Outcome {
    dtype: Dtype,
    losses: Vec<f64>,
    /// Mean squared errors of held-out pixels: of all frames, and of the mean sequence.
    mse: f64,
    mean: f64,
    /// `(sequences, FRAMES, PIXELS)` of the test.
    frames: Tensor,
    seconds: f64,
}

fn main() -> ExitCode {
    let args = Args::parse();
    report::run("ode2vae", &args.flags, |device, report| {
        run(&args, device, report)
    })
}

fn train(data: &Data, dtype: Dtype, (fit, seed): (&Fit, u64), device: &Device) -> Result<Outcome> {
    let clock = Instant::now();
    let vars = VarMap::new();
    let model = Model::new(&vars, dtype, device)?;
    let mut rng = generator(seed);
    initial::layers(&vars, &mut rng)?;
    let sequences = data.training.dim(0)?;
    let bar = progress(dtype.name(), fit.iterations)?;
    let losses = fit.run(&vars, &bar, |i| {
        let rows: Vec<u32> = (0..BATCH)
            .map(|_| rng.random_range(0..sequences as u32))
            .collect();
        let frames = data.training.index_select(&Tensor::new(rows, device)?, 0)?;
        let bound = model.bound(&frames, &mut rng)?;
        let third_quarter = (4.0 * i as f64 / fit.iterations as f64 - 2.0).clamp(0.0, 1.0);
        let [first, last] = DIVERGENCES;
        let beta = first + (last - first) * third_quarter;
        let rest = (bound.divergence + (bound.weights / sequences as f64)?)?;
        Ok(((rest * beta)? - bound.likelihood)?)
    })?;
    bar.finish_and_clear();
    let first = data.test.narrow(1, 0, 1)?.squeeze(1)?.contiguous()?;
    let frames = model.frames(&first)?.detach();
    let square =
        |x: Tensor| -> Result<f64> { Ok(f64::from(x.sqr()?.mean_all()?.to_scalar::<f32>()?)) };
    let mean = data.training.mean_keepdim(0)?;
    Ok(Outcome {
        dtype,
        losses,
        mse: square((&frames - &data.test)?)?,
        mean: square(data.test.broadcast_sub(&mean)?)?,
        frames,
        seconds: clock.elapsed().as_secs_f64(),
    })
}

fn run(args: &Args, device: &Device, report: &mut Report) -> Result<()> {
    let (size, seed) = (args.flags.size(), args.flags.seed);
    let precisions = args.flags.precisions(&[Dtype::F32, Dtype::Bf16])?;
    let mut fit = FIT.iterations(size.pick(3, FIT.iterations, 10_000));
    if let Some(iterations) = args.iters {
        fit = fit.iterations(iterations as usize);
    }
    let sequences = size.pick(60, 1010, 1010);
    let data = match &args.data {
        Some(folder) => Data::read(folder, sequences, device)?,
        None => {
            eprintln!("NOT MNIST: these threes are drawn of arcs.  --data DIR reads MNIST's.\n");
            Data::drawn(sequences, &mut generator(seed), device)?
        }
    };
    println!(
        "{}, {} to train on and {} to test",
        data.name,
        data.training.dim(0)?,
        data.test.dim(0)?
    );
    let mut all = vec![];
    for dtype in precisions {
        all.push(train(&data, dtype, (&fit, seed), device)?);
    }
    let mut table = Table::new([
        "precision",
        "test MSE",
        "of the mean sequence",
        "loss, first",
        "last",
        "s",
    ]);
    for o in &all {
        let name = o.dtype.name();
        let last = &o.losses[o.losses.len().saturating_sub(20)..];
        table.row([
            name.to_owned(),
            format!("{:.4}", o.mse),
            format!("{:.4}", o.mean),
            format!("{:.0}", o.losses[0]),
            format!("{:.0}", common::mean(last)),
            format!("{:.0}", o.seconds),
        ]);
        report.demand(o.mse <= SHARE * o.mean, || {
            format!(
                "{name}: an error of {:.4}, that of the mean sequence is {:.4}",
                o.mse, o.mean
            )
        });
    }
    print!("{table}");
    let of = |dtype: Dtype| all.iter().find(|o| o.dtype == dtype).map(|o| o.mse);
    if let Some((single, low)) = of(Dtype::F32).zip(of(Dtype::Bf16)) {
        report.demand(low <= LOW * single, || {
            format!("bf16: an error of {low:.4}, in f32 {single:.4}")
        });
    }
    let json = |o: &Outcome| {
        json!({
            "precision": o.dtype.name(),
            "test_mse": o.mse,
            "mse_of_the_mean": o.mean,
            "seconds": o.seconds,
        })
    };
    report.figure("data", data.name)?;
    report.figure("updates", fit.iterations)?;
    report.figure("runs", all.iter().map(json).collect::<Vec<_>>())?;
    picture(&report.picture(""), (1250, 700), |area| {
        let (above, below) = area.split_vertically(400);
        strips(&all[0], &data, &above)?;
        losses(&all).draw(&below)
    })
}

/// Frames of two test sequences: above what they are, below what is made of the first.
fn strips(o: &Outcome, data: &Data, area: &Area<'_>) -> Result<()> {
    let (width, gap) = (FRAMES * SIDE, 2);
    let height = 4 * SIDE + 3 * gap;
    let mut pixels = vec![vec![1.0; width]; height];
    for sequence in 0..2 {
        for (k, source) in [&data.test, &o.frames].into_iter().enumerate() {
            let all = values(&source.get(sequence)?)?;
            // Heat maps are drawn from the bottom.
            let top = height - (2 * sequence + k) * (SIDE + gap);
            for (p, value) in all.iter().enumerate() {
                let (frame, y, x) = (p / (SIDE * SIDE), p / SIDE % SIDE, p % SIDE);
                pixels[top - 1 - y][frame * SIDE + x] = *value;
            }
        }
    }
    Panel {
        heat: Some(Heat {
            x: 0.0..FRAMES as f64,
            y: 0.0..4.0,
            values: pixels,
            name: String::new(),
            limits: Some(0.0..1.0),
            numbers: false,
        }),
        ..Panel::new(
            format!(
                "two test sequences, and what is made of their first frames ({})",
                o.dtype.name()
            ),
            "frame",
            "",
        )
    }
    .draw(area)
}

fn losses(all: &[Outcome]) -> Panel {
    let curve = |(i, o): (usize, &Outcome)| {
        let at = o.losses.iter().enumerate().map(|(k, l)| (k as f64, *l));
        Curve::new(o.dtype.name(), colour(i), at)
    };
    Panel {
        curves: all.iter().enumerate().map(curve).collect(),
        scales: [Scale::Linear, Scale::Decades],
        ..Panel::new("loss of a sequence", "update", "−ELBO")
    }
}
