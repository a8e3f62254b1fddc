//! Infers a latent ODE from irregular observations of periodic series, and interpolates and extrapolates them.
//!
//! `cargo run --release --example latent_ode` (minutes; `--smoke`: seconds).  "Latent ordinary differential equations for
//! irregularly-sampled time series" (arXiv 1907.03907), periodic toy data: sines of a frequency that changes along the series
//! around a level of their own, observed at half of the 100 irregular times of [0, 5], which an ODE-GRU reads backward.
//! Prints errors on held-out series, writes a picture and the figures as JSON beside it.  Exits with 1 when the mean squared
//! error at the times that are not observed is above 0.01, or in bf16 twice that of f32.

use std::f64::consts::TAU;
use std::process::ExitCode;
use std::time::Instant;

use candle_core::{DType, Device, Tensor};
use candle_diffeq::models::recurrent::LatentOde;
use candle_diffeq::tableau::{EULER, RK4};
use candle_diffeq::OdeOptions;
use candle_nn::VarMap;
use clap::Parser;
use rand::rngs::StdRng;
use rand::Rng;
use rand_distr::StandardNormal;
use serde_json::json;

use common::chart::{colour, picture, Curve, Mark, Panel, Scale, TRUTH};
use common::dtype::Dtype;
use common::fit::Fit;
use common::flags::Flags;
use common::random::{generator, normal};
use common::report::{self, Report};
use common::table::{sci, Table};
use common::{initial, progress, values, Result};

const FIT: Fit = Fit::new(2500, 4e-3).falling_to(0.02);
const BATCH: usize = 50;
/// Times of a series on [0, END], of which every second one is observed; as many more up to 2 END.
const TIMES: usize = 100;
const END: f64 = 5.0;
/// Features, state of the encoder, latent numbers, hidden units.
const SIZES: [usize; 4] = [1, 40, 10, 50];
/// The deviation of an observation in the loss.
const SIGMA: f64 = 0.1;
/// Iterations without the divergence, and over which it comes in.
const WITHOUT: f64 = 100.0;
const COMES_IN: f64 = 500.0;
/// What the error must be, and by how much more it may be in low precision.
const ERROR: f64 = 0.01;
const LOW: f64 = 2.0;

/// Infers a latent ODE from periodic series.
#[derive(Parser)]
struct Args {
    #[command(flatten)]
    flags: Flags,
    /// Updates in each precision [default: of the size].
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
    iters: Option<u32>,
}

/// Series at common times.
struct Data {
    /// Of [0, 2 END].
    times: Vec<f64>,
    /// `(series, times, 1)`.
    training: Tensor,
    test: Tensor,
}

impl Data {
    fn new(series: usize, seed: u64, device: &Device) -> Result<Self> {
        let mut rng = generator(seed);
        let mut part = |from: f64| {
            let mut times: Vec<f64> = (0..TIMES)
                .map(|_| from + END * rng.random::<f64>())
                .collect();
            times.sort_by(f64::total_cmp);
            times
        };
        let mut times = part(0.0);
        times[0] = 0.0;
        times.extend(part(END));
        let test = series / 5;
        let mut all = |n: usize| -> Result<Tensor> {
            let numbers: Vec<f32> = (0..n).flat_map(|_| sample(&times, &mut rng)).collect();
            Ok(Tensor::from_vec(numbers, (n, times.len(), 1), device)?)
        };
        let (training, test) = (all(series - test)?, all(test)?);
        Ok(Self {
            times,
            training,
            test,
        })
    }
}

/// sin φ + y₀, φ' between two frequencies along [0, 2 END].
fn sample(times: &[f64], rng: &mut StdRng) -> Vec<f32> {
    let mut frequency = || rng.random_range(0.4..0.8);
    let (first, last): (f64, f64) = (frequency(), frequency());
    let level = 1.0 + 0.1 * rng.sample::<f64, _>(StandardNormal);
    let value = |t: &f64| {
        let phase = TAU * (first * t + (last - first) * t * t / (4.0 * END));
        phase.sin() + level
    };
    let clean: Vec<f64> = times.iter().map(value).collect();
    clean
        .into_iter()
        .map(|x| (x + 0.01 * rng.random::<f64>()) as f32)
        .collect()
}

/// Every second time from `first` on, below `end`.
fn places(times: &[f64], first: usize, end: f64) -> Vec<u32> {
    let below = times.iter().filter(|t| **t <= end).count();
    (first as u32..below as u32).step_by(2).collect()
}

struct Outcome {
    dtype: Dtype,
    losses: Vec<f64>,
    /// Mean squares at observed times, at the others of [0, END], and beyond.
    seen: f64,
    between: f64,
    beyond: f64,
    /// `(series, times)` of the test.
    decoded: Tensor,
    seconds: f64,
}

fn main() -> ExitCode {
    let args = Args::parse();
    report::run("latent_ode", &args.flags, |device, report| {
        run(&args, device, report)
    })
}

fn at(x: &Tensor, places: &[u32]) -> Result<Tensor> {
    Ok(x.index_select(&Tensor::new(places, x.device())?, 1)?)
}

fn train(data: &Data, dtype: Dtype, (fit, seed): (&Fit, u64), device: &Device) -> Result<Outcome> {
    let clock = Instant::now();
    let vars = VarMap::new();
    let options = |method| OdeOptions {
        method,
        precision: Some(dtype.precision()),
        ..Default::default()
    };
    let model = LatentOde::new(&vars, "m", SIZES, SIGMA, DType::F32, device)?;
    let model = model.options(options(EULER), options(RK4));
    let mut rng = generator(seed);
    initial::layers(&vars, &mut rng)?;
    let observed = places(&data.times, 0, END);
    let times: Vec<f64> = observed.iter().map(|i| data.times[*i as usize]).collect();
    let rows = data.training.dim(0)?;
    let bar = progress(dtype.name(), fit.iterations)?;
    let losses = fit.run(&vars, &bar, |i| {
        let series: Vec<u32> = (0..BATCH)
            .map(|_| rng.random_range(0..rows as u32))
            .collect();
        let x = data
            .training
            .index_select(&Tensor::new(series, device)?, 0)?;
        let noise = normal(&mut rng, (BATCH, SIZES[2]), DType::F32, device)?;
        let elbo = model.elbo(&at(&x, &observed)?, &times, &noise)?;
        let beta = ((i as f64 - WITHOUT) / COMES_IN).clamp(0.0, 1.0) / times.len() as f64;
        Ok(elbo.loss(beta)?)
    })?;
    bar.finish_and_clear();
    let (z, _) = model.encode(&at(&data.test, &observed)?, &times)?;
    let decoded = model.decode(&z, &data.times)?.detach();
    let squares = (&decoded - &data.test)?.sqr()?;
    let mean = |places: &[u32]| -> Result<f64> {
        Ok(f64::from(
            at(&squares, places)?.mean_all()?.to_scalar::<f32>()?,
        ))
    };
    let beyond: Vec<u32> = (TIMES as u32..2 * TIMES as u32).collect();
    Ok(Outcome {
        dtype,
        losses,
        seen: mean(&observed)?,
        between: mean(&places(&data.times, 1, END))?,
        beyond: mean(&beyond)?,
        decoded: decoded.squeeze(2)?,
        seconds: clock.elapsed().as_secs_f64(),
    })
}

fn run(args: &Args, device: &Device, report: &mut Report) -> Result<()> {
    let size = args.flags.size();
    let mut fit = FIT.iterations(size.pick(3, FIT.iterations, 8000));
    if let Some(iterations) = args.iters {
        fit = fit.iterations(iterations as usize);
    }
    let data = Data::new(size.pick(60, 500, 1000), args.flags.seed, device)?;
    let mut all = vec![];
    for dtype in args.flags.precisions(&[Dtype::F32, Dtype::Bf16])? {
        all.push(train(&data, dtype, (&fit, args.flags.seed), device)?);
    }
    let mut table = Table::new(["precision", "MSE observed", "between", "beyond t = 5", "s"]);
    for o in &all {
        table.row([
            o.dtype.name().to_owned(),
            sci(o.seen),
            sci(o.between),
            sci(o.beyond),
            format!("{:.0}", o.seconds),
        ]);
    }
    print!("{table}");
    let of = |dtype: Dtype| all.iter().find(|o| o.dtype == dtype).map(|o| o.between);
    if let Some(mse) = of(Dtype::F32) {
        report.demand(mse <= ERROR, || {
            format!("f32: a held-out error of {mse:.1e}, not {ERROR}")
        });
    }
    if let Some((single, low)) = of(Dtype::F32).zip(of(Dtype::Bf16)) {
        report.demand(low <= LOW * single.max(0.5 * ERROR), || {
            format!("bf16: a held-out error of {low:.1e}, in f32 {single:.1e}")
        });
    }
    let json = |o: &Outcome| {
        json!({
            "precision": o.dtype.name(),
            "mse_observed": o.seen,
            "mse_between": o.between,
            "mse_beyond": o.beyond,
            "seconds": o.seconds,
        })
    };
    report.figure("updates", fit.iterations)?;
    report.figure("runs", all.iter().map(json).collect::<Vec<_>>())?;
    picture(&report.picture(""), (1300, 700), |area| {
        draw(&all, &data, area)
    })
}

/// Three test series, and the loss.
fn draw(all: &[Outcome], data: &Data, area: &common::chart::Area<'_>) -> Result<()> {
    let parts = area.split_evenly((2, 2));
    for (series, part) in parts.iter().take(3).enumerate() {
        let truth = values(&data.test.get(series)?)?;
        let line = |numbers: Vec<f64>| data.times.iter().copied().zip(numbers);
        let mut curves = vec![Curve::new("truth", TRUTH, line(truth.clone())).width(4)];
        for (i, o) in all.iter().enumerate() {
            let own = values(&o.decoded.get(series)?)?;
            curves.push(Curve::new(o.dtype.name(), colour(i), line(own)).width(2));
        }
        let seen = places(&data.times, 0, END).into_iter();
        let seen = seen.map(|i| (data.times[i as usize], truth[i as usize]));
        curves.push(Curve::new("observed", colour(3), seen).mark(Mark::Dots(2)));
        Panel {
            curves,
            ..Panel::new(format!("test series {}", series + 1), "t", "x")
        }
        .draw(part)?;
    }
    let curve = |(i, o): (usize, &Outcome)| {
        let shift = o.losses.iter().copied().fold(f64::MAX, f64::min) - 0.1;
        let at = o
            .losses
            .iter()
            .enumerate()
            .map(move |(k, l)| (k as f64, l - shift));
        Curve::new(o.dtype.name(), colour(i), at)
    };
    Panel {
        curves: all.iter().enumerate().map(curve).collect(),
        scales: [Scale::Linear, Scale::Decades],
        ..Panel::new("loss above its minimum, + 0.1", "update", "−ELBO")
    }
    .draw(&parts[3])
}
