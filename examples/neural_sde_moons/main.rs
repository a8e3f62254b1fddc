//! Two moons pulled apart by a neural SDE: a drift and a diffusion that are perceptrons, and a linear layer after them.
//!
//! `cargo run --release --example neural_sde_moons` (`--smoke`: seconds).  torchdyn's tutorial on neural
//! SDEs: 2-64-2 with tanh for both, diagonal noise in the sense of Itô, Euler–Maruyama on [0, 0.1], Adam at 1e-2.  Every
//! iteration draws new noise.  What is drawn and counted is a solve with noise of its own, and the mean over many.  Exits
//! with 1 when less than 95 % of the points are right on the mean of the samples.

use std::cell::Cell;
use std::process::ExitCode;

use candle_core::{DType, Device, Tensor};
use candle_diffeq::datasets::Labelled;
use candle_diffeq::nn::{Activation, Mlp};
use candle_diffeq::options::Steps;
use candle_diffeq::sde::{ito, NeuralSde, Noise, OfField, SdeOptions};
use candle_nn::VarMap;
use clap::Parser;
use serde_json::json;

use common::chart::{picture, Panel};
use common::classes::Sample;
use common::classifier::{Classifier, Flow, Trained};
use common::dtype::Dtype;
use common::fit::Fit;
use common::flags::Flags;
use common::plane::{dots, Window};
use common::report::{self, Report};
use common::table::{sci, Table};
use common::{progress, Result};

const MOONS: Labelled = Labelled::Moons { noise: 0.1 };
const FIT: Fit = Fit::new(250, 1e-2);
const HIDDEN: usize = 64;
/// The end of a solve.
const END: f64 = 0.1;
const RIGHT: f64 = 0.95;
/// Samples of a mean.
const SAMPLES: usize = 16;

/// Trains a neural SDE on two moons.
#[derive(Parser)]
struct Args {
    #[command(flatten)]
    flags: Flags,
    /// Steps on [0, 0.1] [default: of the size].
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
    steps: Option<u32>,
}

/// A trained model of one precision, and how many points are right on the mean of samples.
struct Run {
    dtype: Dtype,
    trained: Trained,
    mean: f64,
}

fn main() -> ExitCode {
    let args = Args::parse();
    report::run("neural_sde_moons", &args.flags, |device, report| {
        run(&args, device, report)
    })
}

/// A neural SDE as a flow over [0, 1], which stands for [0, END]; every solve draws noise of its own.
fn flow(vars: &VarMap, (dtype, steps): (Dtype, usize), seed: u64, device: &Device) -> Result<Flow> {
    let sde = NeuralSde::new(vars, "sde", DType::F32, device, |vb| {
        let widths = [2, HIDDEN, 2];
        let drift = Mlp::new(&widths, Activation::Tanh, vb.pp("drift"))?;
        let diffusion = Mlp::new(&widths, Activation::Tanh, vb.pp("diffusion"))?;
        Ok(ito(drift, OfField(diffusion)))
    })?
    .options(SdeOptions {
        precision: Some(dtype.precision()),
        steps: Steps::Size(END / steps as f64),
        ..Default::default()
    });
    let solves = Cell::new(seed << 32);
    Ok(Box::new(move |x: &Tensor, times: &[f64]| {
        let times: Vec<f64> = times.iter().map(|t| END * t).collect();
        let noise = Noise::seeded(solves.get());
        solves.set(solves.get() + 1);
        Ok(sde.solve(x, times.as_slice(), &noise)?)
    }))
}

/// The share of class 1 in the mean of samples.
fn share(trained: &Trained, x: &Tensor) -> Result<Tensor> {
    let mut sum = Tensor::zeros((x.dim(0)?, 1), DType::F32, x.device())?;
    for _ in 0..SAMPLES {
        let logits = trained.classifier.logits(x)?.detach();
        let share = candle_nn::ops::softmax(&logits, 1)?.narrow(1, 1, 1)?;
        sum = (sum + share)?;
    }
    Ok((sum / SAMPLES as f64)?)
}

fn run(args: &Args, device: &Device, report: &mut Report) -> Result<()> {
    let (size, seed) = (args.flags.size(), args.flags.seed);
    let [points, iterations, steps] =
        size.pick([64, 3, 5], [256, FIT.iterations, 20], [4096, 2000, 100]);
    let steps = args.steps.map_or(steps, |n| n as usize);
    let (x, classes) = MOONS.sample(points, seed, device)?;
    let sample = Sample { x, classes };
    let fit = FIT.iterations(iterations);
    let mut runs = vec![];
    for dtype in args.flags.precisions(&[Dtype::F32, Dtype::Bf16])? {
        let bar = progress(dtype.name(), iterations)?;
        let vars = VarMap::new();
        let flow = flow(&vars, (dtype, steps), seed, device)?;
        let name = format!("neural SDE, {}", dtype.name());
        let classifier = Classifier::new(name, (vars, flow), Some((2, 2)), (seed, device))?;
        let trained = classifier.train(&sample, &fit, &bar)?;
        bar.finish_and_clear();
        let taken = share(&trained, &sample.x)?.gt(0.5f32)?.squeeze(1)?;
        let right = taken.to_dtype(DType::U32)?.eq(&sample.classes)?;
        let mean = right.to_dtype(DType::F64)?.mean_all()?.to_scalar()?;
        runs.push(Run {
            dtype,
            trained,
            mean,
        });
    }
    let mut table = Table::new([
        "precision",
        "loss, first",
        "last",
        "right, one sample",
        "mean of 16",
        "s",
    ]);
    for Run {
        dtype,
        trained,
        mean,
    } in &runs
    {
        table.row([
            dtype.name().to_owned(),
            sci(trained.losses[0]),
            sci(trained.last()),
            format!("{:.1} %", 100.0 * trained.accuracy),
            format!("{:.1} %", 100.0 * mean),
            format!("{:.0}", trained.seconds),
        ]);
        report.demand(*mean >= RIGHT, || {
            format!("{}: {mean:.3} right, not {RIGHT}", dtype.name())
        });
    }
    print!("{table}");
    draw(&runs, &sample, device, report)?;
    report.figure("points", points)?;
    report.figure("steps", steps)?;
    let figures = |run: &Run| {
        let mut figures = run.trained.figures();
        figures["precision"] = json!(run.dtype.name());
        figures["accuracy_of_mean"] = json!(run.mean);
        figures
    };
    report.figure("runs", runs.iter().map(figures).collect::<Vec<_>>())
}

/// Of the first precision: paths of one sample, and the regions of one sample and of the mean of many.
fn draw(runs: &[Run], sample: &Sample, device: &Device, report: &mut Report) -> Result<()> {
    let Some(Run { trained, mean, .. }) = runs.first() else {
        return Ok(());
    };
    let window = Window::around(&sample.x)?;
    let classes = sample.numbers()?;
    let most = 256.min(classes.len());
    let shown = sample.x.narrow(0, 0, most)?;
    picture(&report.picture(""), (1600, 420), |area| {
        let (left, right) = area.split_horizontally(1200);
        trained.draw(sample, 60, &left)?;
        let heat = window.heat(40, (DType::F32, device), |x| share(trained, x), "class 1")?;
        Panel {
            heat: Some(heat),
            curves: dots(&shown, &classes[..most], false)?,
            ranges: window.ranges(),
            ..Panel::new(
                format!("mean of {SAMPLES} samples: {:.1} % right", 100.0 * mean),
                "x₁",
                "x₂",
            )
        }
        .draw(&right)
    })
}
