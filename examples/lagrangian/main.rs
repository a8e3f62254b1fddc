//! Learns a Lagrangian from accelerations, and rolls it out: a mass on a spring, and a double pendulum.
//!
//! `cargo run --release --example lagrangian` (minutes; `--smoke`: seconds).  torchdyn's tutorial of Lagrangian networks:
//! q̈ = −q at random points, L a softplus perceptron 2-128-128-1; and the double pendulum of "Lagrangian Neural Networks"
//! (arXiv 2003.04630), 4-128-128-1, along one trajectory.  Prints a table, writes a picture and the figures as JSON
//! beside it.  Exits with 1 when the energy of the spring is off by more than a hundredth.

use std::process::ExitCode;
use std::time::Instant;

use candle_core::{DType, Device, Tensor};
use candle_diffeq::datasets::System;
use candle_diffeq::nn::energy::{Energy, Lagrangian};
use candle_diffeq::nn::{Activation, EnergyMlp};
use candle_diffeq::options::{Output, Steps, TimeGrid};
use candle_diffeq::tableau::{DOPRI5, EULER, RK4};
use candle_diffeq::{predict, NeuralOde, OdeOptions, Time, VectorField};
use candle_nn::VarMap;
use clap::Parser;
use rand::rngs::StdRng;
use rand::Rng;
use serde_json::json;

use common::chart::{colour, picture, Curve, Panel, TRUTH};
use common::dtype::Dtype;
use common::fit::Fit;
use common::flags::Flags;
use common::random::generator;
use common::report::{self, Report};
use common::table::{sci, Table};
use common::{initial, mean, progress, values, Result};

/// Largest energy error of a roll-out of the spring, of the energy at its start.
const ENERGY: f64 = 0.01;
const HIDDEN: usize = 128;
/// What is added to L: ½ m |q̇|².  At its initial weights a network has hardly a mass.
const MASS: f64 = 1.0;

/// A system, what it is learnt from, and how long it is rolled out.
struct Task {
    name: &'static str,
    system: System,
    start: &'static [f64],
    end: f64,
    batch: usize,
    fit: Fit,
}

/// The initial velocity of a spring with m = k = 1 is its momentum.
const TASKS: [Task; 2] = [
    Task {
        name: "mass–spring",
        system: System::MassSpring {
            mass: 1.0,
            stiffness: 1.0,
        },
        start: &[1.0, 0.0],
        end: 20.0,
        batch: 64,
        fit: Fit::new(7680, 1e-3).falling_to(1e-2),
    },
    Task {
        name: "double pendulum",
        system: System::DoublePendulum { gravity: 9.8 },
        // 3π/7 and 3π/4.
        start: &[1.346_396_851_538_483, 2.356_194_490_192_345, 0.0, 0.0],
        end: 10.0,
        batch: 64,
        fit: Fit::new(8000, 1e-3).falling_to(1e-2),
    },
];

/// Trains Lagrangian networks.
#[derive(Parser)]
struct Args {
    #[command(flatten)]
    flags: Flags,
}

/// States with their velocities, `(rows, features)` in f32, and an exact roll-out.
struct Data {
    x: Tensor,
    k: Tensor,
    times: TimeGrid,
    truth: Tensor,
}

/// States of a double pendulum with angles from −π to π, in which the system is periodic and the network is not.
fn wrapped(system: System, x: &Tensor) -> Result<Tensor> {
    let System::DoublePendulum { .. } = system else {
        return Ok(x.clone());
    };
    let (q, v) = (x.narrow(1, 0, 2)?, x.narrow(1, 2, 2)?);
    let turns = (&q / std::f64::consts::TAU)?.round()?;
    Ok(Tensor::cat(
        &[(q - (turns * std::f64::consts::TAU)?)?, v],
        1,
    )?)
}

/// PyTorch's for the spring, and for the double pendulum what its authors found best: biases zero, and deviations that give
/// the last layer large weights.
fn draw_weights(system: System, vars: &VarMap, rng: &mut StdRng) -> Result<()> {
    let System::DoublePendulum { .. } = system else {
        return initial::layers(vars, rng);
    };
    let width = HIDDEN as f64;
    initial::normal(vars, rng, |name, _| {
        Some(match name {
            "l.0.weight" => 2.2 / width.sqrt(),
            "l.1.weight" => 0.58 / width.sqrt(),
            "l.2.weight" => width.sqrt(),
            _ => 0.0,
        })
    })
}

/// The states of a roll-out at these times, `(times, 1, features)`, angles wrapped at each of them.
fn rolled_out(
    (ode, system): (&NeuralOde, System),
    start: &Tensor,
    times: &TimeGrid,
) -> Result<Tensor> {
    let mut states = vec![start.clone()];
    for ends in times.points().windows(2) {
        let x = wrapped(system, &states[states.len() - 1])?;
        states.push(ode.predict(&x, &[0.0, ends[1] - ends[0]])?.get(1)?);
    }
    Ok(Tensor::stack(&states, 0)?)
}

impl Data {
    fn new(task: &Task, rng: &mut StdRng) -> Result<Self> {
        let features = task.system.features();
        let times = TimeGrid::linspace(0.0, task.end, (10.0 * task.end) as usize + 1)?;
        let start = Tensor::from_slice(task.start, (1, features), &Device::Cpu)?;
        let options = OdeOptions {
            method: DOPRI5,
            steps: Steps::PerInterval(20),
            ..Default::default()
        };
        let truth = predict(&task.system, &start, &times, &options)?;
        let x = match features {
            // torchdyn's: 2¹⁴ points, normal.
            2 => common::random::normal(rng, (1 << 14, 2), DType::F64, &Device::Cpu)?,
            // The authors': one trajectory, 1500 seconds; here every fifth of a second of 300.
            _ => {
                let long = TimeGrid::linspace(0.0, 300.0, 1501)?;
                let options = OdeOptions {
                    steps: Steps::PerInterval(10),
                    ..options
                };
                predict(&task.system, &start, &long, &options)?.squeeze(1)?
            }
        };
        let k = task
            .system
            .velocity(&Time::new(0.0, DType::F64, &Device::Cpu), &x)?;
        let x = wrapped(task.system, &x)?;
        Ok(Self {
            x: x.to_dtype(DType::F32)?,
            k: k.to_dtype(DType::F32)?,
            times,
            truth,
        })
    }
}

/// What a run came to.
struct Outcome {
    name: &'static str,
    dtype: Dtype,
    loss: [f64; 2],
    /// Largest energy error along the roll-out over the range of the potential energy, or over the energy at its start.
    energy: f64,
    times: Vec<f64>,
    truth: Tensor,
    rolled: Tensor,
    along: [Vec<f64>; 2],
    seconds: f64,
}

fn train(task: &Task, dtype: Dtype, (fit, seed): (&Fit, u64), device: &Device) -> Result<Outcome> {
    let clock = Instant::now();
    let mut rng = generator(seed);
    let data = Data::new(task, &mut rng)?;
    let (vars, features) = (VarMap::new(), task.system.features());
    let options = OdeOptions {
        precision: Some(dtype.precision()),
        ..Default::default()
    };
    let ode = NeuralOde::from_field(&vars, "l", DType::F32, device, move |vb| {
        let widths = [features, HIDDEN, HIDDEN, 1];
        let l = EnergyMlp::new(&widths, Activation::Softplus, Energy::Output, vb)?;
        Ok(Lagrangian::with_mass(l, MASS))
    })?
    .options(OdeOptions {
        method: EULER,
        output: Output::Final,
        ..options.clone()
    });
    draw_weights(task.system, &vars, &mut rng)?;
    let (x, k) = (data.x.to_device(device)?, data.k.to_device(device)?);
    let rows = x.dim(0)?;
    let bar = progress(task.name, fit.iterations)?;
    let losses = fit.run(&vars, &bar, |_| {
        let pick: Vec<u32> = (0..task.batch)
            .map(|_| rng.random_range(0..rows as u32))
            .collect();
        let pick = Tensor::from_vec(pick, task.batch, device)?;
        let (x, k) = (x.index_select(&pick, 0)?, k.index_select(&pick, 0)?);
        // One step of Euler's method of length one is x + f(x).
        let velocity = (ode.solve(&x, &[0.0, 1.0])? - &x)?;
        Ok((velocity - k)?.sqr()?.mean_all()?)
    })?;
    bar.finish_and_clear();
    let ode = ode.options(OdeOptions {
        method: RK4,
        steps: Steps::PerInterval(4),
        ..options
    });
    let start = data.truth.get(0)?.to_dtype(DType::F32)?.to_device(device)?;
    let rolled = rolled_out((&ode, task.system), &start, &data.times)?;
    let rolled = rolled.to_device(&Device::Cpu)?.to_dtype(DType::F64)?;
    let energy = |x: &Tensor| -> Result<Vec<f64>> {
        Ok(values(
            &task.system.energy(x)?.ok_or("a system without energy")?,
        )?)
    };
    let along = [energy(&data.truth)?, energy(&rolled)?];
    // Of the spring its energy; of the double pendulum the range of its potential energy, 2 (2 + 1) g.
    let scale = match task.system {
        System::DoublePendulum { gravity } => 6.0 * gravity,
        _ => along[0][0].abs(),
    };
    let off = along[1].iter().map(|e| (e - along[0][0]).abs());
    let window = 100.min(losses.len());
    Ok(Outcome {
        name: task.name,
        dtype,
        loss: [
            mean(&losses[..window]),
            mean(&losses[losses.len() - window..]),
        ],
        energy: off.fold(0.0, f64::max) / scale,
        times: data.times.points().to_vec(),
        truth: data.truth,
        rolled,
        along,
        seconds: clock.elapsed().as_secs_f64(),
    })
}

fn main() -> ExitCode {
    let args = Args::parse();
    report::run("lagrangian", &args.flags, |device, report| {
        run(&args, device, report)
    })
}

fn run(args: &Args, device: &Device, report: &mut Report) -> Result<()> {
    let size = args.flags.size();
    let mut all = vec![];
    for task in &TASKS {
        let full = task.fit.iterations(10 * task.fit.iterations);
        let fit = size.pick(task.fit.iterations(5), task.fit, full);
        for dtype in args.flags.precisions(&[Dtype::F32, Dtype::Bf16])? {
            all.push(train(task, dtype, (&fit, args.flags.seed), device)?);
        }
    }
    let mut table = Table::new([
        "system",
        "precision",
        "MSE, first",
        "last",
        "energy error",
        "s",
    ]);
    for o in &all {
        table.row([
            o.name.to_owned(),
            o.dtype.name().to_owned(),
            sci(o.loss[0]),
            sci(o.loss[1]),
            format!("{:.2} %", 100.0 * o.energy),
            format!("{:.0}", o.seconds),
        ]);
        // In bf16 the velocity itself is rounded to 8 bits.
        let held = o.name == TASKS[0].name && o.dtype == Dtype::F32;
        report.demand(!held || o.energy <= ENERGY, || {
            format!("{}: the energy is off by {:.2} %", o.name, 100.0 * o.energy)
        });
    }
    print!("{table}");
    draw(&all, report)?;
    let json = |o: &Outcome| {
        json!({
            "system": o.name,
            "precision": o.dtype.name(),
            "mse_first": o.loss[0],
            "mse_last": o.loss[1],
            "energy_error": report::any(o.energy),
            "seconds": o.seconds,
        })
    };
    report.figure("runs", all.iter().map(json).collect::<Vec<_>>())
}

/// For each system the first coordinate over time, and the energy.
fn draw(all: &[Outcome], report: &mut Report) -> Result<()> {
    let path = report.picture("");
    picture(&path, (1300, 400 * TASKS.len() as u32), |area| {
        for (task, row) in TASKS.iter().zip(&area.split_evenly((TASKS.len(), 1))) {
            let own: Vec<_> = all.iter().filter(|o| o.name == task.name).collect();
            let (left, right) = row.split_horizontally(650);
            let Some(first) = own.first() else { continue };
            let line =
                |times: &[f64], y: Vec<f64>| times.iter().copied().zip(y).collect::<Vec<_>>();
            let coordinate = |x: &Tensor| values(&x.narrow(2, 0, 1)?);
            let truth = line(&first.times, coordinate(&first.truth)?);
            let mut states = vec![Curve::new("truth", TRUTH, truth).width(4)];
            let truth = line(&first.times, first.along[0].clone());
            let mut energies = vec![Curve::new("truth", TRUTH, truth).width(4)];
            for (i, o) in own.iter().enumerate() {
                let name = o.dtype.name();
                states.push(Curve::new(
                    name,
                    colour(i),
                    line(&o.times, coordinate(&o.rolled)?),
                ));
                energies.push(Curve::new(
                    name,
                    colour(i),
                    line(&o.times, o.along[1].clone()),
                ));
            }
            Panel {
                curves: states,
                ..Panel::new(format!("{}: a roll-out", task.name), "t", "q₁")
            }
            .draw(&left)?;
            Panel {
                curves: energies,
                ..Panel::new(format!("{}: energy along it", task.name), "t", "energy")
            }
            .draw(&right)?;
        }
        Ok(())
    })
}
