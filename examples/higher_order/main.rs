//! Two spirals, parted by equations of the second and of the tenth order, whose further derivatives are the room to move in.
//!
//! `cargo run --release --example higher_order` (minutes; `--smoke`: seconds).  torchdyn's tutorial of higher orders: order
//! 2 with two zeros and a field 4-64-2, order 10 with eighteen and 20-128-2, a linear layer after the flow, Adam at 1e-2.
//! Prints a table, writes a picture and the figures as JSON beside it.  Exits with 1 when the spirals are not parted.

use std::process::ExitCode;

use candle_core::{DType, Device, Tensor};
use candle_diffeq::datasets::Labelled;
use candle_diffeq::nn::{Activation, Augmenter, HigherOrder, Perceptron};
use candle_diffeq::NeuralOde;
use candle_nn::{Module, VarMap};
use clap::Parser;

use common::chart::picture;
use common::classes::Sample;
use common::classifier::{options, tell, Classifier, Flow};
use common::dtype::Dtype;
use common::fit::Fit;
use common::flags::Flags;
use common::report::{self, Report};
use common::{progress, Result};

const SPIRALS: Labelled = Labelled::Spirals {
    turns: 1.0,
    noise: 0.02,
};
/// Order, hidden units, iterations by default.
const ORDERS: [(usize, usize, usize); 2] = [(2, 64, 600), (10, 128, 300)];
const FIT: Fit = Fit::new(600, 1e-2).falling_to(0.1);
/// Of [0, 1].
const STEPS: usize = 4;
/// The share of points whose class must be right.
const RIGHT: f64 = 0.95;

/// Trains equations of higher order on two spirals.
#[derive(Parser)]
struct Args {
    #[command(flatten)]
    flags: Flags,
}

fn model(
    order: usize,
    hidden: usize,
    dtype: Dtype,
    (seed, device): (u64, &Device),
) -> Result<Classifier> {
    let (vars, d) = (VarMap::new(), 2 * order);
    let ode = NeuralOde::from_field(&vars, "f", DType::F32, device, move |vb| {
        HigherOrder::new(
            Perceptron::new(&[d, hidden, 2], Activation::Tanh, vb)?,
            order,
        )
    })?
    .options(options(dtype, STEPS));
    let augmenter = Augmenter::zeros(d - 2);
    let flow: Flow =
        Box::new(move |x: &Tensor, times: &[f64]| Ok(ode.solve(&augmenter.forward(x)?, times)?));
    let name = format!("order {order}");
    Classifier::new(name, (vars, flow), Some((d, 2)), (seed, device))
}

fn main() -> ExitCode {
    let args = Args::parse();
    report::run("higher_order", &args.flags, |device, report| {
        run(&args, device, report)
    })
}

fn run(args: &Args, device: &Device, report: &mut Report) -> Result<()> {
    let (size, seed) = (args.flags.size(), args.flags.seed);
    let points = size.pick(64, 512, 2048);
    let (x, classes) = SPIRALS.sample(points, seed, device)?;
    let sample = Sample { x, classes };
    let mut all = vec![];
    for dtype in args.flags.precisions(&[Dtype::F32, Dtype::Bf16])? {
        for (order, hidden, iterations) in ORDERS {
            let fit = FIT.iterations(size.pick(3, iterations, 1200));
            let bar = progress(&format!("{order}"), fit.iterations)?;
            let classifier = model(order, hidden, dtype, (seed, device))?;
            all.push((dtype, classifier.train(&sample, &fit, &bar)?));
            bar.finish_and_clear();
        }
    }
    tell(&all, RIGHT, report)?;
    picture(
        &report.picture(""),
        (1200, 320 * ORDERS.len() as u32),
        |area| {
            let rows = area.split_evenly((ORDERS.len(), 1));
            let mut each = all.iter().zip(&rows);
            each.try_for_each(|((_, o), row)| o.draw(&sample, 40, row))
        },
    )?;
    report.figure("points", points)
}
