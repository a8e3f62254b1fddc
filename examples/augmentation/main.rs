//! Two concentric spheres, which no flow in their own space can part: with zeros, with learnt features, and as an equation
//! of second order.
//!
//! `cargo run --release --example augmentation` (minutes; `--smoke`: seconds).  torchdyn's tutorial 04: spheres in three
//! dimensions, fields of one hidden layer of 80, a linear layer after the flow, Adam at 1e-2, 300 iterations.  Prints a
//! table, writes a picture and the figures as JSON beside it.  Exits with 1 when an augmented flow does not part them, or
//! does no better than the flow without.

use std::process::ExitCode;

use candle_core::{Device, Tensor};
use candle_diffeq::datasets::Labelled;
use candle_diffeq::nn::{Activation, Augmenter, HigherOrder, Linear, Mlp, Perceptron};
use candle_diffeq::{NeuralOde, VectorField};
use candle_nn::{Module, VarBuilder, VarMap};
use clap::Parser;

use common::chart::{colour, picture, Curve, Panel, Scale};
use common::classes::Sample;
use common::classifier::{options, Classifier, Flow, Trained};
use common::dtype::Dtype;
use common::fit::Fit;
use common::flags::Flags;
use common::plane::dots;
use common::report::{self, Report};
use common::table::{sci, Table};
use common::{progress, Result};

const SPHERES: Labelled = Labelled::Spheres {
    features: 3,
    radii: [0.5, 1.0],
    noise: 0.05,
};
const FIT: Fit = Fit::new(300, 1e-2);
/// Of [0, 1].
const STEPS: usize = 4;
const HIDDEN: usize = 80;
/// The share of points whose class must be right with augmentation.
const RIGHT: f64 = 0.99;

/// Trains flows with augmentation and without on two spheres.
#[derive(Parser)]
struct Args {
    #[command(flatten)]
    flags: Flags,
    /// Points [default: of the size].
    #[arg(long, value_parser = clap::value_parser!(u32).range(2..))]
    points: Option<u32>,
}

/// What is done before the flow.
#[derive(Clone, Copy, PartialEq)]
enum Kind {
    None,
    Zeros,
    Learnt,
    SecondOrder,
}

const KINDS: [Kind; 4] = [Kind::None, Kind::Zeros, Kind::Learnt, Kind::SecondOrder];

impl Kind {
    fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Zeros => "5 zeros",
            Self::Learnt => "5 learnt",
            Self::SecondOrder => "second order",
        }
    }

    /// Features of the flow.
    fn features(self) -> usize {
        match self {
            Self::None => 3,
            Self::Zeros | Self::Learnt => 8,
            Self::SecondOrder => 6,
        }
    }

    fn classifier(self, dtype: Dtype, seed: u64, device: &Device) -> Result<Classifier> {
        let vars = VarMap::new();
        let d = self.features();
        let before: Box<dyn Module> = match self {
            Self::None => Box::new(candle_nn::func(|x| Ok(x.clone()))),
            Self::Zeros => Box::new(Augmenter::zeros(5)),
            Self::SecondOrder => Box::new(Augmenter::zeros(3)),
            Self::Learnt => {
                let vb = VarBuilder::from_varmap(&vars, candle_core::DType::F32, device);
                Box::new(Augmenter::learned(Linear::new(3, 5, vb.pp("more"))?))
            }
        };
        let flow = match self {
            Self::SecondOrder => flow(&vars, before, (dtype, device), move |vb| {
                let last = Perceptron::new(&[d, HIDDEN, 3], Activation::Tanh, vb)?;
                HigherOrder::new(last, 2)
            })?,
            _ => flow(&vars, before, (dtype, device), move |vb| {
                Mlp::new(&[d, HIDDEN, d], Activation::Tanh, vb)
            })?,
        };
        let name = format!("{}, {}", self.name(), dtype.name());
        Classifier::new(name, (vars, flow), Some((d, 2)), (seed, device))
    }
}

/// The neural ODE of a field after what comes before it.
fn flow<F: VectorField + 'static>(
    vars: &VarMap,
    before: Box<dyn Module>,
    (dtype, device): (Dtype, &Device),
    build: impl Fn(VarBuilder<'_>) -> candle_core::Result<F> + Send + Sync + 'static,
) -> Result<Flow> {
    let ode = NeuralOde::from_field(vars, "f", candle_core::DType::F32, device, build)?;
    let ode = ode.options(options(dtype, STEPS));
    Ok(Box::new(move |x: &Tensor, times: &[f64]| {
        Ok(ode.solve(&before.forward(x)?, times)?)
    }))
}

fn main() -> ExitCode {
    let args = Args::parse();
    report::run("augmentation", &args.flags, |device, report| {
        run(&args, device, report)
    })
}

fn run(args: &Args, device: &Device, report: &mut Report) -> Result<()> {
    let (size, seed) = (args.flags.size(), args.flags.seed);
    let points = args
        .points
        .map_or(size.pick(128, 2048, 8192), |n| n as usize);
    let (x, classes) = SPHERES.sample(points, seed, device)?;
    let sample = Sample { x, classes };
    let fit = FIT.iterations(size.pick(5, FIT.iterations, FIT.iterations));
    let mut all = vec![];
    for dtype in args.flags.precisions(&[Dtype::F32, Dtype::Bf16])? {
        for kind in KINDS {
            let bar = progress(kind.name(), fit.iterations)?;
            let classifier = kind.classifier(dtype, seed, device)?;
            all.push((kind, dtype, classifier.train(&sample, &fit, &bar)?));
            bar.finish_and_clear();
        }
    }
    let mut table = Table::new([
        "augmentation, precision",
        "loss, first",
        "last",
        "right",
        "s",
    ]);
    for (kind, dtype, o) in &all {
        table.row([
            o.classifier.name.clone(),
            sci(o.losses[0]),
            sci(o.last()),
            format!("{:.2} %", 100.0 * o.accuracy),
            format!("{:.0}", o.seconds),
        ]);
        let plain = all.iter().find(|(k, d, _)| *k == Kind::None && d == dtype);
        let better = plain.is_some_and(|(.., p)| o.last() < p.last());
        report.demand(
            *kind == Kind::None || (o.accuracy >= RIGHT && better),
            || {
                format!(
                    "{}: {:.4} right, not {RIGHT}, or no better than none",
                    o.classifier.name, o.accuracy
                )
            },
        );
    }
    print!("{table}");
    draw(&all, &sample, report)?;
    report.figure("iterations", fit.iterations)?;
    report.figure("points", points)?;
    report.figure(
        "runs",
        all.iter().map(|(.., o)| o.figures()).collect::<Vec<_>>(),
    )
}

/// The logits of each flow in the first precision, and all losses.
fn draw(all: &[(Kind, Dtype, Trained)], sample: &Sample, report: &mut Report) -> Result<()> {
    let shown = 512.min(sample.x.dim(0)?);
    let (x, classes) = (sample.x.narrow(0, 0, shown)?, sample.numbers()?);
    picture(&report.picture(""), (1500, 820), |area| {
        let (top, bottom) = area.split_vertically(420);
        for ((kind, _, o), part) in all.iter().zip(&top.split_evenly((1, 4))) {
            let logits = o.classifier.logits(&x)?.detach();
            let title = format!("{}: {:.1} % right", kind.name(), 100.0 * o.accuracy);
            Panel {
                curves: dots(&logits, &classes[..shown], false)?,
                ..Panel::new(title, "logit of the inner", "of the outer")
            }
            .draw(part)?;
        }
        let curve = |(i, (.., o)): (usize, &(Kind, Dtype, Trained))| {
            let points = o.losses.iter().enumerate().map(|(i, l)| (i as f64, *l));
            Curve::new(
                o.classifier.name.clone(),
                colour(i),
                points.collect::<Vec<_>>(),
            )
        };
        Panel {
            scales: [Scale::Linear, Scale::Decades],
            curves: all.iter().enumerate().map(curve).collect(),
            ..Panel::new("cross entropy", "iteration", "loss")
        }
        .draw(&bottom)
    })
}
