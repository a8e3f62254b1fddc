//! The shortest way to a trained flow: a vector field, a neural ODE of it, and two moons that it pulls apart.
//!
//! `cargo run --release --example quickstart` (seconds).  torchdyn's tutorial 00: a perceptron 2-64-2, the cross entropy of
//! the state at depth 1, Adam at 1e-2, 300 iterations on 520 points.  Prints a table, writes a picture and the figures
//! as JSON beside it.  Exits with 1 when the moons are not separated.

use std::process::ExitCode;

use candle_core::{Device, Tensor};
use candle_diffeq::datasets::Labelled;
use candle_diffeq::nn::{Activation, Mlp};
use candle_diffeq::NeuralOde;
use candle_nn::VarMap;
use clap::Parser;
use serde_json::json;

use common::chart::picture;
use common::classes::Sample;
use common::classifier::{options, Classifier, Trained};
use common::dtype::Dtype;
use common::fit::Fit;
use common::flags::Flags;
use common::report::{self, Report};
use common::table::{sci, Table};
use common::{progress, Result};

const MOONS: Labelled = Labelled::Moons { noise: 0.1 };
const POINTS: usize = 520;
const FIT: Fit = Fit::new(300, 1e-2);
/// Of [0, 1].
const STEPS: usize = 10;
/// The share of points whose class must be right.
const RIGHT: f64 = 0.99;

/// Trains a neural ODE on two moons.
#[derive(Parser)]
struct Args {
    #[command(flatten)]
    flags: Flags,
}

fn main() -> ExitCode {
    let args = Args::parse();
    report::run("quickstart", &args.flags, |device, report| {
        run(&args, device, report)
    })
}

/// A vector field, and the neural ODE of it.
fn model(dtype: Dtype, seed: u64, device: &Device) -> Result<Classifier> {
    let vars = VarMap::new();
    let ode = NeuralOde::new(&vars, "f", device, |vb| {
        Mlp::new(&[2, 64, 2], Activation::Tanh, vb)
    })?
    .options(options(dtype, STEPS));
    println!("{ode}");
    let flow = Box::new(move |x: &Tensor, times: &[f64]| Ok(ode.solve(x, times)?));
    Classifier::new(dtype.name(), (vars, flow), None, (seed, device))
}

fn run(args: &Args, device: &Device, report: &mut Report) -> Result<()> {
    let (size, seed) = (args.flags.size(), args.flags.seed);
    let (x, classes) = MOONS.sample(POINTS, seed, device)?;
    let sample = Sample { x, classes };
    let fit = FIT.iterations(size.pick(5, FIT.iterations, FIT.iterations));
    let mut all = vec![];
    for dtype in args
        .flags
        .precisions_among(&[Dtype::F32, Dtype::Bf16], &Dtype::ALL)?
    {
        let bar = progress(dtype.name(), fit.iterations)?;
        all.push(model(dtype, seed, device)?.train(&sample, &fit, &bar)?);
        bar.finish_and_clear();
    }
    println!();
    let mut table = Table::new(["precision", "loss, first", "last", "right", "s"]);
    for o in &all {
        table.row([
            o.classifier.name.clone(),
            sci(o.losses[0]),
            sci(o.last()),
            format!("{:.1} %", 100.0 * o.accuracy),
            format!("{:.1}", o.seconds),
        ]);
        report.demand(o.accuracy >= RIGHT, || {
            let (name, share) = (&o.classifier.name, o.accuracy);
            format!("{name}: {share:.3} of the points are right, not {RIGHT}")
        });
    }
    print!("{table}");
    picture(
        &report.picture(""),
        (1200, 320 * all.len() as u32),
        |area| {
            let rows = area.split_evenly((all.len(), 1));
            let mut each = all.iter().zip(&rows);
            each.try_for_each(|(o, row)| o.draw(&sample, 40, row))
        },
    )?;
    report.figure("iterations", fit.iterations)?;
    report.figure("runs", all.iter().map(json).collect::<Vec<_>>())
}

fn json(o: &Trained) -> serde_json::Value {
    json!({
        "precision": o.classifier.name,
        "loss_first": o.losses[0],
        "loss_last": o.last(),
        "accuracy": o.accuracy,
        "seconds": o.seconds,
    })
}
