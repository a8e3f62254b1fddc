//! Learns a conservative system from velocities: a flow that keeps a learnt energy beside a perceptron.
//!
//! `cargo run --release --example stable_flow` (a minute; `--smoke`: seconds).  torchdyn's tutorial m4f ("Stable Neural Flows",
//! arXiv 2003.08063): x' = v, v' = π (cos(πx − π/2) − x), x' = ½ (M − Mᵀ) ∇E with perceptrons M and E, fitted at points of a
//! square.  Prints a table, writes a picture and the figures as JSON beside it.  Exits with 1 when solutions of the stable
//! flow lose the energy that it has learnt, or more of the true one than those of the perceptron.

use std::f64::consts::PI;
use std::process::ExitCode;
use std::time::Instant;

use candle_core::{DType, Device, Tensor, D};
use candle_diffeq::nn::energy::{Energy, Potential, Skew};
use candle_diffeq::nn::{Activation, EnergyMlp, Mlp, Perceptron};
use candle_diffeq::options::{Output, Steps};
use candle_diffeq::tableau::{EULER, RK4};
use candle_diffeq::{predict, NeuralOde, OdeOptions, Time};
use candle_nn::{VarBuilder, VarMap};
use clap::Parser;
use serde_json::json;

use common::chart::{colour, picture, Curve, Panel, TRUTH};
use common::dtype::Dtype;
use common::fit::Fit;
use common::flags::Flags;
use common::plane::{paths, Window};
use common::random::{generator, uniform};
use common::report::{self, Report};
use common::table::{sci, Table};
use common::{initial, progress, values, Result};

const FIT: Fit = Fit::new(4000, 3e-3).falling_to(0.01);
const POINTS: usize = 256;
/// Half the side of the square.
const SIDE: f64 = 2.0;
const WIDTH: usize = 64;
const STARTS: usize = 8;
const END: f64 = 60.0;
/// The largest change of the learnt energy along solutions in f32, in units of its range.
const KEPT: f64 = 1e-2;

/// Learns a conservative system.
#[derive(Parser)]
struct Args {
    #[command(flatten)]
    flags: Flags,
}

/// (v, π (sin πx − x)).
fn truth(_: &Time, x: &Tensor) -> candle_core::Result<Tensor> {
    let (q, v) = (x.narrow(D::Minus1, 0, 1)?, x.narrow(D::Minus1, 1, 1)?);
    let force = (((&q * PI)?.sin()? - q)? * PI)?;
    Tensor::cat(&[v, force], D::Minus1)
}

/// ½ v² + cos πx + ½ π x².
fn energy(x: &Tensor) -> Result<Tensor> {
    let (q, v) = (x.narrow(D::Minus1, 0, 1)?, x.narrow(D::Minus1, 1, 1)?);
    let potential = ((&q * PI)?.cos()? + (q.sqr()? * (0.5 * PI))?)?;
    Ok(((v.sqr()? * 0.5)? + potential)?)
}

#[derive(Clone, Copy, PartialEq)]
enum Kind {
    Stable,
    Perceptron,
}

fn energy_net(vb: VarBuilder<'_>) -> candle_core::Result<EnergyMlp> {
    EnergyMlp::new(&[2, WIDTH, WIDTH, 1], Activation::Tanh, Energy::Output, vb)
}

impl Kind {
    fn name(self) -> &'static str {
        match self {
            Self::Stable => "½(M − Mᵀ)∇E",
            Self::Perceptron => "perceptron",
        }
    }

    fn model(self, vars: &VarMap, device: &Device) -> candle_diffeq::Result<NeuralOde> {
        match self {
            Self::Stable => NeuralOde::from_field(vars, "f", DType::F32, device, |vb| {
                let m = Perceptron::new(&[2, WIDTH, 4], Activation::Tanh, vb.pp("m"))?;
                Skew::new(energy_net(vb.pp("e"))?, m)
            }),
            Self::Perceptron => NeuralOde::from_field(vars, "f", DType::F32, device, |vb| {
                Mlp::new(&[2, WIDTH, WIDTH, 2], Activation::Tanh, vb)
            }),
        }
    }
}

struct Outcome {
    kind: Kind,
    dtype: Dtype,
    /// Mean squared error of the velocity, in units of its mean square.
    error: f64,
    /// Root mean square of what the true energy is less, or more, in the last tenth of the time than in the first.
    lost: f64,
    /// The largest change of the learnt energy, in units of its range.
    own: Option<f64>,
    /// `(times, rows, 2)`.
    states: Tensor,
    energies: Vec<f64>,
    seconds: f64,
}

fn main() -> ExitCode {
    let args = Args::parse();
    report::run("stable_flow", &args.flags, |device, report| {
        run(&args, device, report)
    })
}

fn times() -> Vec<f64> {
    (0..=1200).map(|i| END * f64::from(i) / 1200.0).collect()
}

/// Starts between the wells and the rim.
fn starts(device: &Device) -> Result<Tensor> {
    let at = |i: usize| [0.2 + 1.2 * i as f32 / STARTS as f32, 0.0];
    let all: Vec<f32> = (0..STARTS).flat_map(at).collect();
    Ok(Tensor::from_vec(all, (STARTS, 2), device)?)
}

fn train(kind: Kind, dtype: Dtype, (fit, seed): (&Fit, u64), device: &Device) -> Result<Outcome> {
    let clock = Instant::now();
    let vars = VarMap::new();
    let options = OdeOptions {
        precision: Some(dtype.precision()),
        ..Default::default()
    };
    // One step of Euler's method of length one is x + f(x): the velocity in the precision of solves.
    let ode = kind.model(&vars, device)?.options(OdeOptions {
        method: EULER,
        output: Output::Final,
        ..options.clone()
    });
    let mut rng = generator(seed);
    initial::layers(&vars, &mut rng)?;
    let t = Time::new(0.0, DType::F32, device);
    let mut error = |n: usize| -> Result<Tensor> {
        let x = ((uniform(&mut rng, (n, 2), DType::F32, device)? * (2.0 * SIDE))? - SIDE)?;
        let exact = truth(&t, &x)?;
        let apart = ((ode.solve(&x, &[0.0, 1.0])? - &x)? - &exact)?;
        Ok((apart.sqr()?.mean_all()? / exact.sqr()?.mean_all()?)?)
    };
    let bar = progress(kind.name(), fit.iterations)?;
    fit.run(&vars, &bar, |_| error(POINTS))?;
    bar.finish_and_clear();
    let error = f64::from(error(4096)?.to_scalar::<f32>()?);
    let ode = ode.options(OdeOptions {
        method: RK4,
        steps: Steps::PerInterval(2),
        ..options
    });
    let states = ode.predict(&starts(device)?, &times())?;
    let along = energy(&states.to_dtype(DType::F64)?)?;
    // Within a turn the energy of a flow that is nearly the true one goes up and down.
    let tenth = along.dim(0)? / 10;
    let first = along.narrow(0, 0, tenth)?.mean(0)?;
    let change = (along.narrow(0, 9 * tenth, tenth)?.mean(0)? - first)?;
    let own = match kind {
        Kind::Stable => Some(kept(&vars, &states, device)?),
        Kind::Perceptron => None,
    };
    Ok(Outcome {
        kind,
        dtype,
        error,
        lost: change.sqr()?.mean_all()?.to_scalar::<f64>()?.sqrt(),
        own,
        energies: values(&along.narrow(1, STARTS - 1, 1)?)?,
        states,
        seconds: clock.elapsed().as_secs_f64(),
    })
}

/// The largest change of E along solutions, over its range in the square.
fn kept(vars: &VarMap, states: &Tensor, device: &Device) -> Result<f64> {
    let net = energy_net(VarBuilder::from_varmap(vars, DType::F32, device).pp("f.e"))?;
    let t = Time::new(0.0, DType::F32, device);
    let (count, rows, _) = states.dims3()?;
    let of = |x: &Tensor| -> Result<Tensor> { Ok(net.gradient(&t, x)?.0) };
    let along = of(&states.flatten(0, 1)?)?.reshape((count, rows))?;
    let change = along.broadcast_sub(&along.narrow(0, 0, 1)?)?.abs()?;
    let square = uniform(&mut generator(1), (1000, 2), DType::F32, device)?;
    let square = values(&of(&((square * (2.0 * SIDE))? - SIDE)?)?)?;
    let (low, high) = square
        .iter()
        .fold((f64::MAX, f64::MIN), |(a, b), x| (a.min(*x), b.max(*x)));
    let change: f64 = values(&change)?.into_iter().fold(0.0, f64::max);
    Ok(change / (high - low))
}

fn run(args: &Args, device: &Device, report: &mut Report) -> Result<()> {
    let fit = FIT.iterations(args.flags.size().pick(5, FIT.iterations, 6000));
    let mut all = vec![];
    for dtype in args.flags.precisions(&[Dtype::F32, Dtype::Bf16])? {
        for kind in [Kind::Stable, Kind::Perceptron] {
            all.push(train(kind, dtype, (&fit, args.flags.seed), device)?);
        }
    }
    let mut table = Table::new([
        "field",
        "precision",
        "error of velocity",
        "true energy, drift",
        "learnt energy, change",
        "s",
    ]);
    for o in &all {
        table.row([
            o.kind.name().to_owned(),
            o.dtype.name().to_owned(),
            sci(o.error),
            sci(o.lost),
            o.own.map_or_else(|| "-".to_owned(), sci),
            format!("{:.0}", o.seconds),
        ]);
    }
    print!("{table}");
    for dtype in [Dtype::F32, Dtype::Bf16] {
        let of = |kind: Kind| all.iter().find(|o| o.kind == kind && o.dtype == dtype);
        let Some((stable, plain)) = of(Kind::Stable).zip(of(Kind::Perceptron)) else {
            continue;
        };
        let name = dtype.name();
        report.demand(stable.lost <= plain.lost || !plain.lost.is_finite(), || {
            format!("{name}: the energy of the stable flow drifts by {:.1e}, of the perceptron by {:.1e}", stable.lost, plain.lost)
        });
        let own = stable.own.unwrap_or(f64::NAN);
        report.demand(dtype != Dtype::F32 || own <= KEPT, || {
            format!("{name}: the learnt energy changes by {own:.1e} of its range")
        });
    }
    let json = |o: &Outcome| {
        json!({
            "field": o.kind.name(),
            "precision": o.dtype.name(),
            "velocity_error": o.error,
            "energy_drift": report::any(o.lost),
            "seconds": o.seconds,
        })
    };
    report.figure("runs", all.iter().map(json).collect::<Vec<_>>())?;
    let options = OdeOptions {
        steps: Steps::PerInterval(4),
        ..Default::default()
    };
    let exact = predict(&truth, &starts(device)?, &times(), &options)?;
    let single = all[0].dtype;
    let own: Vec<_> = all.iter().filter(|o| o.dtype == single).collect();
    picture(&report.picture(""), (1500, 440), |area| {
        draw(&own, &exact, device, area)
    })
}

fn draw(
    own: &[&Outcome],
    exact: &Tensor,
    device: &Device,
    area: &common::chart::Area<'_>,
) -> Result<()> {
    let parts = area.split_evenly((1, 3));
    let window = Window::square(SIDE);
    let classes: Vec<u32> = vec![0; STARTS];
    let t = Time::new(0.0, DType::F32, device);
    for (o, part) in own.iter().zip(&parts) {
        let mut curves = paths(exact, &classes)?;
        curves
            .iter_mut()
            .for_each(|c| (c.colour, c.width) = (TRUTH, 4));
        curves.extend(paths(&o.states, &classes)?);
        let arrows = window.arrows(15, (DType::F32, device), |x| Ok(truth(&t, x)?), TRUTH)?;
        Panel {
            curves,
            arrows: vec![arrows],
            ranges: window.ranges(),
            ..Panel::new(
                format!("{}: solutions to t = {END}", o.kind.name()),
                "x",
                "v",
            )
        }
        .draw(part)?;
    }
    let curve = |(i, o): (usize, &&Outcome)| {
        let at = times().into_iter().zip(o.energies.iter().copied());
        Curve::new(o.kind.name(), colour(i), at).width(2)
    };
    Panel {
        curves: own.iter().enumerate().map(curve).collect(),
        ..Panel::new("true energy of the outermost", "t", "energy")
    }
    .draw(&parts[2])
}
