//! Learns an acrobot with torques: a symplectic ODE network beside a perceptron.
//!
//! `cargo run --release --example symplectic_ode_net` (minutes; `--smoke`: seconds).  "Symplectic ODE-Net" (ICLR 2020) on the
//! data of FasterNeuralDiffEq: trajectories of 32 points, 0.05 apart, under constant torques, as windows of 8 points of
//! (cos θ, sin θ, θ', u).  Networks of the inverse mass matrix, the potential and the input; solved by RK4, trained by the
//! mean squared error of windows.  Prints a table, writes a picture and the figures as JSON beside it.  Exits with 1 when the
//! error on test windows is not below that of the perceptron.

#[path = "../conformance/zoo/symplectic.rs"]
mod symplectic;

use std::process::ExitCode;
use std::time::Instant;

use candle_core::{DType, Device, Tensor};
use candle_diffeq::datasets::System;
use candle_diffeq::nn::{Activation, Perceptron};
use candle_diffeq::options::{Steps, TimeGrid};
use candle_diffeq::tableau::RK4;
use candle_diffeq::{predict, NeuralOde, OdeOptions, Time};
use candle_nn::VarMap;
use clap::Parser;
use rand::rngs::StdRng;
use rand::Rng;
use serde_json::json;

use crate::symplectic::Symplectic;
use common::chart::{colour, picture, Curve, Panel, Scale, TRUTH};
use common::dtype::Dtype;
use common::fit::Fit;
use common::flags::Flags;
use common::random::generator;
use common::report::{self, Report};
use common::table::{sci, Table};
use common::{initial, mean, progress, values, Result};

const FIT: Fit = Fit::new(600, 2e-3).falling_to(0.02);
const BATCH: usize = 64;
/// Points of a trajectory and of a window, and their distance.
const POINTS: usize = 32;
const WINDOW: usize = 8;
const STEP: f64 = 0.05;
const WIDTH: usize = 48;
/// Numbers of a row: two cosines, two sines, two speeds, two torques.
const ROW: usize = 8;
const TORQUES: [[f64; 2]; 9] = [
    [0.0, 0.0],
    [0.0, 1.0],
    [0.0, -1.0],
    [0.0, 2.0],
    [0.0, -2.0],
    [1.0, 0.0],
    [-1.0, 0.0],
    [2.0, 0.0],
    [-2.0, 0.0],
];
const ACROBOT: System = System::Acrobot { gravity: 9.8 };

/// Learns an acrobot.
#[derive(Parser)]
struct Args {
    #[command(flatten)]
    flags: Flags,
}

#[derive(Clone, Copy, PartialEq)]
enum Kind {
    Symplectic,
    Perceptron,
}

impl Kind {
    fn name(self) -> &'static str {
        match self {
            Self::Symplectic => "SymODEN",
            Self::Perceptron => "perceptron",
        }
    }

    fn model(self, vars: &VarMap, device: &Device) -> candle_diffeq::Result<NeuralOde> {
        let tanh = Activation::Tanh;
        match self {
            Self::Symplectic => NeuralOde::from_field(vars, "f", DType::F32, device, move |vb| {
                let net = |outputs: usize, name: &str| {
                    Perceptron::new(&[4, WIDTH, WIDTH, outputs], tanh, vb.pp(name))
                };
                Ok(
                    Symplectic::new([net(3, "mass")?, net(1, "potential")?, net(4, "input")?])
                        .field(),
                )
            }),
            Self::Perceptron => NeuralOde::from_field(vars, "f", DType::F32, device, move |vb| {
                let net = Perceptron::new(&[ROW, 2 * WIDTH, 2 * WIDTH, ROW - 2], tanh, vb)?;
                Ok(move |_: &Time, y: &Tensor| {
                    use candle_nn::Module;
                    let still = y.narrow(1, 6, 2)?.zeros_like()?;
                    Tensor::cat(&[net.forward(y)?, still], 1)
                })
            }),
        }
    }
}

/// Trajectories `(points, trajectories, ROW)` in f32, those of the test last.
struct Data {
    states: Tensor,
    trajectories: usize,
    test: usize,
}

/// (cos θ, sin θ, θ', u) of (θ, θ', u), `(…, 6)`.
fn embedded(x: &Tensor) -> Result<Tensor> {
    let rest = x.narrow(2, 2, 4)?;
    let angles = x.narrow(2, 0, 2)?;
    Ok(Tensor::cat(&[angles.cos()?, angles.sin()?, rest], 2)?)
}

impl Data {
    fn new(trajectories: usize, rng: &mut StdRng, device: &Device) -> Result<Self> {
        let pi = std::f64::consts::PI;
        let row = |_| {
            let u = TORQUES[rng.random_range(0..TORQUES.len())];
            let mut x: Vec<f64> = (0..4).map(|_| rng.random_range(-pi..pi)).collect();
            x.extend(u);
            x
        };
        let starts: Vec<f64> = (0..4 * trajectories).flat_map(row).collect();
        let starts = Tensor::from_vec(starts, (4 * trajectories, 6), &Device::Cpu)?;
        let times = TimeGrid::linspace(0.0, STEP * POINTS as f64, POINTS + 1)?;
        let options = OdeOptions {
            steps: Steps::PerInterval(20),
            ..Default::default()
        };
        // The first point kept is one step after the start.
        let all = predict(&ACROBOT, &starts, &times, &options)?.narrow(0, 1, POINTS)?;
        // Those that do not turn too fast.
        let speeds = all.narrow(2, 2, 2)?.abs()?.max(0)?.to_vec2::<f64>()?;
        let slow =
            |s: &Vec<f64>| s[0] < 4.0 * std::f64::consts::PI && s[1] < 9.0 * std::f64::consts::PI;
        let kept = (0..4 * trajectories as u32).filter(|i| slow(&speeds[*i as usize]));
        let kept: Vec<u32> = kept.take(trajectories).collect();
        let kept = Tensor::new(kept, &Device::Cpu)?;
        let states = embedded(&all.index_select(&kept, 1)?)?.to_dtype(DType::F32)?;
        let trajectories = states.dim(1)?;
        Ok(Self {
            states: states.to_device(device)?,
            trajectories,
            test: trajectories / 6,
        })
    }

    /// Windows `(WINDOW, rows, ROW)` that begin at these (point, trajectory).
    fn windows(&self, at: &[(usize, usize)]) -> Result<Tensor> {
        let flat = self.states.reshape((POINTS * self.trajectories, ROW))?;
        let point = |k: usize| {
            at.iter()
                .map(move |(i, j)| ((i + k) * self.trajectories + j) as u32)
        };
        let places: Vec<u32> = (0..WINDOW).flat_map(point).collect();
        let places = Tensor::new(places, flat.device())?;
        Ok(flat
            .index_select(&places, 0)?
            .reshape((WINDOW, at.len(), ROW))?)
    }
}

struct Outcome {
    kind: Kind,
    dtype: Dtype,
    losses: Vec<f64>,
    test: f64,
    /// Mean squares over whole test trajectories.
    whole: f64,
    /// `(points, trajectories, ROW)` of the test.
    rolled: Tensor,
    seconds: f64,
}

fn main() -> ExitCode {
    let args = Args::parse();
    report::run("symplectic_ode_net", &args.flags, |device, report| {
        run(&args, device, report)
    })
}

fn times(points: usize) -> Vec<f64> {
    (0..points).map(|i| STEP * i as f64).collect()
}

fn train(
    data: &Data,
    kind: Kind,
    dtype: Dtype,
    (fit, seed): (&Fit, u64),
    device: &Device,
) -> Result<Outcome> {
    let clock = Instant::now();
    let vars = VarMap::new();
    let ode = kind.model(&vars, device)?.options(OdeOptions {
        method: RK4,
        precision: Some(dtype.precision()),
        ..Default::default()
    });
    let mut rng = generator(seed);
    initial::layers(&vars, &mut rng)?;
    let error = |windows: &Tensor| -> Result<Tensor> {
        let y0 = windows.get(0)?.contiguous()?;
        Ok((ode.solve(&y0, &times(WINDOW))? - windows)?
            .sqr()?
            .mean_all()?)
    };
    let (trained, starts) = (data.trajectories - data.test, POINTS - WINDOW);
    let bar = progress(kind.name(), fit.iterations)?;
    let losses = fit.run(&vars, &bar, |_| {
        let one = |_| (rng.random_range(0..starts), rng.random_range(0..trained));
        let at: Vec<_> = (0..BATCH).map(one).collect();
        error(&data.windows(&at)?)
    })?;
    bar.finish_and_clear();
    let at = (trained..data.trajectories).flat_map(|j| [0, 8, 16, 24].map(|i| (i, j)));
    let test = error(&data.windows(&at.collect::<Vec<_>>())?)?;
    let truth = data.states.narrow(1, trained, data.test)?;
    let rolled = ode.predict(&truth.get(0)?.contiguous()?, &times(POINTS))?;
    let whole = (&rolled - &truth)?.sqr()?.mean_all()?;
    Ok(Outcome {
        kind,
        dtype,
        losses,
        test: f64::from(test.to_scalar::<f32>()?),
        whole: f64::from(whole.to_scalar::<f32>()?),
        rolled,
        seconds: clock.elapsed().as_secs_f64(),
    })
}

fn run(args: &Args, device: &Device, report: &mut Report) -> Result<()> {
    let (size, seed) = (args.flags.size(), args.flags.seed);
    let fit = FIT.iterations(size.pick(3, FIT.iterations, 6000));
    let data = Data::new(size.pick(24, 240, 1152), &mut generator(seed), device)?;
    let mut all = vec![];
    for dtype in args.flags.precisions(&[Dtype::F32, Dtype::Bf16])? {
        for kind in [Kind::Symplectic, Kind::Perceptron] {
            all.push(train(&data, kind, dtype, (&fit, seed), device)?);
        }
    }
    let mut table = Table::new([
        "model",
        "precision",
        "MSE of windows, training",
        "test",
        "of whole trajectories",
        "s",
    ]);
    for o in &all {
        let last = &o.losses[o.losses.len().saturating_sub(50)..];
        table.row([
            o.kind.name().to_owned(),
            o.dtype.name().to_owned(),
            sci(mean(last)),
            sci(o.test),
            sci(o.whole),
            format!("{:.0}", o.seconds),
        ]);
    }
    print!("{table}");
    for o in all.iter().filter(|o| o.kind == Kind::Symplectic) {
        let same = |p: &&Outcome| p.kind == Kind::Perceptron && p.dtype == o.dtype;
        if let Some(other) = all.iter().find(same) {
            report.demand(o.test < other.test, || {
                let name = o.dtype.name();
                format!(
                    "{name}: a test error of {:.1e}, the perceptron's is {:.1e}",
                    o.test, other.test
                )
            });
        }
    }
    let json = |o: &Outcome| {
        json!({
            "model": o.kind.name(),
            "precision": o.dtype.name(),
            "test_mse": o.test,
            "trajectory_mse": report::any(o.whole),
            "seconds": o.seconds,
        })
    };
    report.figure("runs", all.iter().map(json).collect::<Vec<_>>())?;
    let first = all[0].dtype;
    let own: Vec<_> = all.iter().filter(|o| o.dtype == first).collect();
    picture(&report.picture(""), (1400, 420), |area| {
        draw(&own, &data, area)
    })
}

/// Two coordinates of a test trajectory, and the losses.
fn draw(own: &[&Outcome], data: &Data, area: &common::chart::Area<'_>) -> Result<()> {
    let parts = area.split_evenly((1, 3));
    let trained = data.trajectories - data.test;
    let column = |states: &Tensor, row: usize, c: usize| -> Result<Vec<(f64, f64)>> {
        let all = values(&states.narrow(1, row, 1)?.narrow(2, c, 1)?)?;
        Ok(times(POINTS).into_iter().zip(all).collect())
    };
    for ((c, title), part) in [(2, "sin θ₁"), (5, "θ₂'")].into_iter().zip(&parts) {
        let mut curves =
            vec![Curve::new("truth", TRUTH, column(&data.states, trained, c)?).width(4)];
        for (i, o) in own.iter().enumerate() {
            curves.push(Curve::new(o.kind.name(), colour(i), column(&o.rolled, 0, c)?).width(2));
        }
        Panel {
            curves,
            ..Panel::new(format!("a test trajectory: {title}"), "t", title)
        }
        .draw(part)?;
    }
    let curve = |(i, o): (usize, &&Outcome)| {
        let at = o.losses.iter().enumerate().map(|(k, l)| (k as f64, *l));
        Curve::new(o.kind.name(), colour(i), at)
    };
    Panel {
        curves: own.iter().enumerate().map(curve).collect(),
        scales: [Scale::Linear, Scale::Decades],
        ..Panel::new("mean squared error of windows", "update", "MSE")
    }
    .draw(&parts[2])
}
