//! Times solves of perceptrons on a GPU, forward and forward + backward, in one launch each way where
//! the network is small enough and step by step, and compares gradients with those in f64.
//!
//! `cargo run --release --features cuda --example gpu -- [--json FILE] [--smoke]`
//!
//! Milliseconds are medians of repeated runs after two that are not counted, the device synchronised
//! before the clock starts and before it stops; megabytes are what one run takes at most, as seen
//! between its passes.

#[path = "../common/mod.rs"]
mod common;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use candle_core::{DType, Device, Tensor, Var};
use candle_diffeq::nn::{Activation, Mlp};
use candle_diffeq::{NeuralOde, OdeOptions, Output, Precision, Recorder};
use candle_nn::VarMap;
use clap::Parser;
use serde_json::{json, Value};

use crate::common::environment::Environment;
use crate::common::table::{sci, Table};
use crate::common::{median, Result};

/// Times solves on a GPU.
#[derive(Parser)]
struct Args {
    /// Where the figures go.
    #[arg(long)]
    json: Option<PathBuf>,
    /// Small and once.
    #[arg(long)]
    smoke: bool,
}

/// A network, a batch, and a number of rk4 steps.
struct Cell {
    name: &'static str,
    widths: &'static [usize],
    batch: usize,
    steps: usize,
    repeats: usize,
}

const CELLS: [Cell; 4] = [
    Cell {
        name: "2-64-64-2, 512 rows",
        widths: &[2, 64, 64, 2],
        batch: 512,
        steps: 100,
        repeats: 9,
    },
    Cell {
        name: "2-64-64-2, 65536 rows",
        widths: &[2, 64, 64, 2],
        batch: 65_536,
        steps: 100,
        repeats: 5,
    },
    Cell {
        name: "64-512-512-64, 1024 rows",
        widths: &[64, 512, 512, 64],
        batch: 1024,
        steps: 40,
        repeats: 5,
    },
    Cell {
        name: "512-2048-2048-512, 4096 rows",
        widths: &[512, 2048, 2048, 512],
        batch: 4096,
        steps: 40,
        repeats: 3,
    },
];

const SMOKE: [Cell; 2] = [
    Cell {
        name: "2-8-2, 40 rows",
        widths: &[2, 8, 2],
        batch: 40,
        steps: 2,
        repeats: 1,
    },
    Cell {
        name: "3-130-3, 5 rows",
        widths: &[3, 130, 3],
        batch: 5,
        steps: 2,
        repeats: 1,
    },
];

fn main() -> ExitCode {
    match run(&Args::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: &Args) -> Result<()> {
    let device = Device::new_cuda(0).map_err(|e| format!("no GPU can be used: {e}"))?;
    let environment = Environment::of(&device);
    println!("{environment}");
    let cells: &[Cell] = if args.smoke { &SMOKE } else { &CELLS };
    let mut table = Table::new([
        "network",
        "precision",
        "how",
        "forward ms",
        "+ backward ms",
        "MB",
        "error of θ̄",
        "reads",
    ]);
    let mut figures = vec![];
    for cell in cells {
        let exact = Run::new(cell, Precision::f64(), false, &device)?
            .gradients()?
            .0;
        for (name, precision) in [
            ("f32", Precision::f32()),
            ("bf16, store bf16", Precision::bf16().store(DType::BF16)),
            ("f16, store f16", Precision::f16().store(DType::F16)),
        ] {
            for (how, fusion) in [("one launch", true), ("step by step", false)] {
                if fusion && cell.widths.iter().any(|&w| w > 128) {
                    continue;
                }
                let figure = Run::new(cell, precision, fusion, &device)?.measure(cell, &exact)?;
                table.row([
                    cell.name.to_owned(),
                    name.to_owned(),
                    how.to_owned(),
                    format!("{:.2}", figure.forward),
                    format!("{:.2}", figure.both),
                    format!("{:.0}", figure.megabytes),
                    sci(figure.error),
                    format!("{}", figure.reads),
                ]);
                figures.push(figure.json(cell, name, how));
            }
        }
    }
    println!("{table}");
    if let Some(path) = &args.json {
        let report = json!({ "environment": environment, "cells": figures });
        std::fs::write(path, serde_json::to_string_pretty(&report)?)?;
    }
    Ok(())
}

/// One way to solve a cell.
struct Run {
    ode: NeuralOde,
    vars: VarMap,
    y0: Var,
    times: Vec<f64>,
    recorder: Recorder,
}

/// What it takes.
struct Figure {
    forward: f64,
    both: f64,
    megabytes: f64,
    error: f64,
    reads: usize,
}

impl Figure {
    fn json(&self, cell: &Cell, precision: &str, how: &str) -> Value {
        json!({
            "network": cell.name, "steps": cell.steps, "precision": precision, "how": how,
            "forward_ms": self.forward, "forward_and_backward_ms": self.both, "megabytes": self.megabytes,
            "gradient_error": self.error, "host_reads": self.reads,
        })
    }
}

/// Numbers of size one, the same in every run.
fn scattered(shape: &[usize], device: &Device) -> candle_core::Result<Tensor> {
    let n: usize = shape.iter().product();
    let numbers: Vec<_> = (0..n)
        .map(|i| (i as f64 * 1.618_033_988_7 + 0.4).sin() as f32)
        .collect();
    Tensor::from_vec(numbers, shape, device)
}

impl Run {
    fn new(cell: &Cell, precision: Precision, fusion: bool, device: &Device) -> Result<Self> {
        let (vars, recorder) = (VarMap::new(), Recorder::default());
        for (l, pair) in cell.widths.windows(2).enumerate() {
            let size = (pair[0] as f64).sqrt().recip();
            for (name, shape) in [("weight", &[pair[1], pair[0]][..]), ("bias", &[pair[1]])] {
                let value = (scattered(shape, device)? * size)?.to_dtype(precision.state)?;
                let mut data = vars
                    .data()
                    .lock()
                    .map_err(|_| "a poisoned map of variables")?;
                data.insert(format!("f.{l}.{name}"), Var::from_tensor(&value)?);
            }
        }
        let widths = cell.widths;
        let field = move |vb: candle_nn::VarBuilder<'_>| Mlp::new(widths, Activation::Tanh, vb);
        let options = OdeOptions {
            precision: Some(precision),
            output: Output::Final,
            fusion,
            recorder: Some(recorder.clone()),
            ..Default::default()
        };
        let y0 = scattered(&[cell.batch, cell.widths[0]], device)?.to_dtype(precision.state)?;
        Ok(Self {
            ode: NeuralOde::new(&vars, "f", device, field)?.options(options),
            vars,
            y0: Var::from_tensor(&y0)?,
            times: (0..=cell.steps)
                .map(|n| n as f64 / cell.steps as f64)
                .collect(),
            recorder,
        })
    }

    /// θ̄ as one vector, and megabytes taken when both passes were done.
    fn gradients(&self) -> Result<(Tensor, f64)> {
        let before = free_megabytes();
        let states: Tensor = self.ode.solve(self.y0.as_tensor(), &self.times)?;
        let grads = states.sqr()?.mean_all()?.backward()?;
        let taken = before - free_megabytes();
        let data = self
            .vars
            .data()
            .lock()
            .map_err(|_| "a poisoned map of variables")?;
        let mut named: Vec<_> = data.iter().collect();
        named.sort_by_key(|(name, _)| name.as_str().to_owned());
        let flat = named
            .iter()
            .filter_map(|(_, var)| grads.get(var))
            .map(|g| g.flatten_all()?.to_dtype(DType::F64));
        let flat = flat.collect::<candle_core::Result<Vec<_>>>()?;
        Ok((Tensor::cat(&flat, 0)?, taken))
    }

    fn measure(&self, cell: &Cell, exact: &Tensor) -> Result<Figure> {
        let device = self.y0.device().clone();
        let (gradients, megabytes) = self.gradients()?;
        let norm = |x: &Tensor| x.sqr()?.sum_all()?.to_scalar::<f64>();
        let error = (norm(&(&gradients - exact)?)? / norm(exact)?).sqrt();
        if !error.is_finite() {
            return Err(format!("{}: gradients are not finite", cell.name).into());
        }
        let forward = timed(&device, cell.repeats, || {
            self.ode.solution(self.y0.as_tensor(), &self.times)?;
            Ok(())
        })?;
        let both = timed(&device, cell.repeats, || {
            let states: Tensor = self.ode.solve(self.y0.as_tensor(), &self.times)?;
            states.sqr()?.mean_all()?.backward()?;
            Ok(())
        })?;
        self.recorder.take();
        self.gradients()?;
        Ok(Figure {
            forward,
            both,
            megabytes,
            error,
            reads: self.recorder.take().host_reads,
        })
    }
}

/// The median of so many runs, in milliseconds.
fn timed(device: &Device, repeats: usize, mut run: impl FnMut() -> Result<()>) -> Result<f64> {
    let mut times = vec![];
    for i in 0..repeats + 2 {
        device.synchronize()?;
        let start = Instant::now();
        run()?;
        device.synchronize()?;
        if i >= 2 {
            times.push(start.elapsed().as_secs_f64() * 1e3);
        }
    }
    Ok(median(times))
}

/// Megabytes of the card that nobody has; NaN where that cannot be known.
fn free_megabytes() -> f64 {
    #[cfg(feature = "cuda")]
    if let Ok((free, _)) = candle_core::cuda_backend::cudarc::driver::result::mem_get_info() {
        return free as f64 / 1e6;
    }
    f64::NAN
}
