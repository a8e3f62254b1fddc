//! Predicts a stochastic Brusselator from sporadic observations: GRU-ODE-Bayes beside a gated recurrent unit.
//!
//! `cargo run --release --example gru_ode_bayes` (minutes; `--smoke`: seconds).  "GRU-ODE-Bayes" (arXiv 1905.12374): 1000
//! series (see LICENCE.md) of two variables on [0, 50], 20 to 29 observations each; the first three after t = 35 are to be
//! predicted from those before it.  Errors are in units of the variance.  Prints a table, writes a picture and the figures as
//! JSON beside it.  Exits with 1 when the mean squared error of GRU-ODE-Bayes is above 0.05 of the variance, or in bf16 a tenth
//! above that of f32.

mod data;
mod model;

use std::process::ExitCode;
use std::time::Instant;

use candle_core::{Device, Tensor};
use candle_diffeq::models::recurrent::Sporadic;
use candle_nn::VarMap;
use clap::Parser;
use rand::seq::SliceRandom;
use serde_json::json;

use crate::data::{Data, VARIABLES};
use crate::model::{Kind, Model};
use common::chart::{colour, picture, Curve, Mark, Panel, TRUTH};
use common::dtype::Dtype;
use common::fit::Fit;
use common::flags::Flags;
use common::random::generator;
use common::report::{self, Report};
use common::table::Table;
use common::{initial, progress, values, Result};

const FIT: Fit = Fit::new(240, 5e-3).falling_to(0.05).weight_decay(5e-4);
const BATCH: usize = 100;
/// What the error must be at most, in units of the variance (the plain recurrent unit's is above 1), and by how much more it
/// may be in low precision.
const ERROR: f64 = 0.05;
const LOW: f64 = 1.1;

/// Predicts sporadic observations.
#[derive(Parser)]
struct Args {
    #[command(flatten)]
    flags: Flags,
    /// Updates of each model [default: of the size].
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
    iters: Option<u32>,
}

struct Outcome {
    kind: Kind,
    losses: Vec<f64>,
    /// Of the test, in units of the variance: of every observation from those before it, and of those after t = 35.
    next: f64,
    mse: f64,
    /// −ln p of the latter.
    nll: f64,
    /// Mean and deviation of the first variable of the shown series, at a grid of times.
    band: Vec<(f64, f64, f64)>,
    seconds: f64,
}

fn main() -> ExitCode {
    let args = Args::parse();
    report::run("gru_ode_bayes", &args.flags, |device, report| {
        run(&args, device, report)
    })
}

fn train(data: &Data, kind: Kind, (fit, seed): (&Fit, u64), device: &Device) -> Result<Outcome> {
    let clock = Instant::now();
    let vars = VarMap::new();
    let model = Model::new(kind, &vars, device)?;
    let mut rng = generator(seed);
    initial::layers(&vars, &mut rng)?;
    let bar = progress(&kind.name(), fit.iterations)?;
    let mut left: Vec<u32> = vec![];
    let losses = fit.run(&vars, &bar, |_| {
        if left.len() < BATCH {
            left.clone_from(&data.training);
            left.shuffle(&mut rng);
        }
        let batch = left.split_off(left.len() - BATCH);
        model.loss(&data.batch(&batch)?)
    })?;
    bar.finish_and_clear();
    let (seen, truth, asked) = data.test()?;
    let predicted = model.before(&seen)?;
    let mean = |x: Tensor, of: &Tensor| -> Result<f64> {
        let sum = (x * of)?.sum_all()?.to_scalar::<f32>()?;
        Ok(f64::from(sum / of.sum_all()?.to_scalar::<f32>()?))
    };
    let mse = mean((&predicted.mean - &truth)?.sqr()?, &asked)?;
    let nll = mean(predicted.negative_log_likelihood(&truth)?, &asked)?;
    let whole = data.whole()?;
    let each = (model.before(&whole)?.mean - &whole.values)?.sqr()?;
    let next = mean(each, &whole.mask)?;
    Ok(Outcome {
        kind,
        losses,
        next,
        mse,
        nll,
        band: band(data, &model, device)?,
        seconds: clock.elapsed().as_secs_f64(),
    })
}

/// Predictions at a grid of times from the observations of a series before each of them.
fn band(data: &Data, model: &Model, device: &Device) -> Result<Vec<(f64, f64, f64)>> {
    let series = &data.plain[data.shown() as usize];
    let mut events: Vec<_> = series.clone();
    events.extend((1..=100).map(|i| (0.5 * i as f32 + 0.01, [0.0; VARIABLES], [0.0; VARIABLES])));
    events.sort_by(|a, b| a.0.total_cmp(&b.0));
    let (mut before, mut gaps, mut x, mut mask) = (0.0, vec![], vec![], vec![]);
    for (t, value, seen) in &events {
        gaps.push(t - before);
        before = *t;
        x.extend(value);
        mask.extend(seen);
    }
    let n = events.len();
    let of = |numbers: Vec<f32>, shape: &[usize]| Tensor::from_vec(numbers, shape, device);
    let seen = Sporadic {
        values: of(x, &[1, n, VARIABLES])?,
        mask: of(mask, &[1, n, VARIABLES])?,
        gaps: of(gaps, &[1, n])?,
    };
    let predicted = model.before(&seen)?;
    let (means, logs) = (values(&predicted.mean)?, values(&predicted.log_variance)?);
    let at = |i: usize| {
        let (t, k) = (f64::from(events[i].0), i * VARIABLES);
        (t, means[k], (0.5 * logs[k]).exp())
    };
    Ok((0..n).map(at).collect())
}

fn run(args: &Args, device: &Device, report: &mut Report) -> Result<()> {
    let size = args.flags.size();
    let mut fit = FIT.iterations(size.pick(2, FIT.iterations, 1600));
    if let Some(iterations) = args.iters {
        fit = fit.iterations(iterations as usize);
    }
    let data = Data::read(args.flags.seed, device)?;
    let precisions = args.flags.precisions(&[Dtype::F32, Dtype::Bf16])?;
    let kinds = precisions
        .into_iter()
        .map(Kind::OdeBayes)
        .chain([Kind::Plain]);
    let mut all = vec![];
    for kind in kinds {
        all.push(train(&data, kind, (&fit, args.flags.seed), device)?);
    }
    let mut table = Table::new([
        "model",
        "MSE of the next",
        "of those after t = 35",
        "−ln p of these",
        "last loss",
        "s",
    ]);
    for o in &all {
        let last = &o.losses[o.losses.len().saturating_sub(8)..];
        table.row([
            o.kind.name(),
            format!("{:.3}", o.next),
            format!("{:.3}", o.mse),
            format!("{:.3}", o.nll),
            format!("{:.3}", common::mean(last)),
            format!("{:.0}", o.seconds),
        ]);
    }
    print!("{table}");
    demands(&all, report);
    let json = |o: &Outcome| {
        json!({
            "model": o.kind.name(),
            "mse_of_the_next_over_variance": o.next,
            "mse_over_variance": o.mse,
            "nll": o.nll,
            "seconds": o.seconds,
        })
    };
    report.figure("updates", fit.iterations)?;
    report.figure("runs", all.iter().map(json).collect::<Vec<_>>())?;
    picture(&report.picture(""), (1200, 760), |area| {
        let (above, below) = area.split_vertically(380);
        losses(&all).draw(&above)?;
        shown(&all, &data).draw(&below)
    })
}

fn demands(all: &[Outcome], report: &mut Report) {
    let of = |kind: Kind| all.iter().find(|o| o.kind == kind).map(|o| o.mse);
    for o in all.iter().filter(|o| o.kind != Kind::Plain) {
        report.demand(o.mse <= ERROR, || {
            let (name, mse) = (o.kind.name(), o.mse);
            format!("{name}: a mean squared error of {mse:.3}, not {ERROR}")
        });
    }
    let single = of(Kind::OdeBayes(Dtype::F32));
    if let Some((single, low)) = single.zip(of(Kind::OdeBayes(Dtype::Bf16))) {
        report.demand(low <= LOW * single, || {
            format!("bf16: a mean squared error of {low:.3}, in f32 {single:.3}")
        });
    }
}

fn losses(all: &[Outcome]) -> Panel {
    let curve = |(i, o): (usize, &Outcome)| {
        let at = o.losses.iter().enumerate().map(|(k, l)| (k as f64, *l));
        Curve::new(o.kind.name(), colour(i), at)
    };
    Panel {
        curves: all.iter().enumerate().map(curve).collect(),
        ..Panel::new("loss of an observed variable", "update", "−ln p")
    }
}

fn shown(all: &[Outcome], data: &Data) -> Panel {
    let series = &data.plain[data.shown() as usize];
    let seen = series.iter().filter(|(_, _, mask)| mask[0] > 0.0);
    let seen: Vec<_> = seen
        .map(|(t, x, _)| (f64::from(*t), f64::from(x[0])))
        .collect();
    let mut curves = vec![Curve::new("observed", TRUTH, seen).mark(Mark::Dots(5))];
    let models = all.iter().enumerate();
    let models =
        models.filter(|(_, o)| !matches!(o.kind, Kind::OdeBayes(Dtype::Bf16 | Dtype::F16)));
    for (i, o) in models {
        let line = |k: f64| o.band.iter().map(move |(t, m, s)| (*t, m + k * s));
        curves.push(Curve::new(o.kind.name(), colour(i), line(0.0)).width(2));
        curves.push(Curve::new("", colour(i), line(-1.0)).mark(Mark::Dashed));
        curves.push(Curve::new("", colour(i), line(1.0)).mark(Mark::Dashed));
    }
    Panel {
        curves,
        ..Panel::new(
            "a test series: first variable, mean and deviation before each time",
            "t",
            "x / deviation",
        )
    }
}
