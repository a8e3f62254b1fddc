//! Learns the errors of Euler's method and of the midpoint rule on the Lorenz system, and adds them to their steps.
//!
//! `cargo run --release --example hypersolver` (a minute or two; `--smoke`: seconds).  torchdyn's tutorial m2a ("Hypersolvers",
//! arXiv 2007.09601): exact solutions from starts around 15, residuals of steps of a fixed length, a perceptron of state
//! and velocity fitted to them, and solves from other starts.  Prints errors and times, writes a picture and the figures as
//! JSON beside it.  Exits with 1 when a correction does not make a method at least four times as accurate.

use std::process::ExitCode;
use std::time::Instant;

use candle_core::{DType, Device, Module, Tensor, D};
use candle_diffeq::datasets::System;
use candle_diffeq::models::hypersolver::{residuals, Hypersolver};
use candle_diffeq::nn::{Activation, Perceptron};
use candle_diffeq::options::{Steps, TimeGrid};
use candle_diffeq::tableau::{Tableau, EULER, MIDPOINT, RK4};
use candle_diffeq::{predict, OdeOptions, Time};
use candle_nn::{VarBuilder, VarMap};
use clap::Parser;
use serde_json::json;

use common::chart::{colour, picture, Curve, Mark, Panel, Scale};
use common::dtype::Dtype;
use common::fit::Fit;
use common::flags::Flags;
use common::random::{generator, normal};
use common::report::{self, Report};
use common::table::{sci, Table};
use common::{initial, median, progress, values, Result};

/// Length of a step, the end of training data, and of the comparison.
const STEP: f64 = 0.02;
const END: f64 = 5.0;
const COMPARED: f64 = 1.0;
/// Steps of RK4 in one, for exact solutions.
const INSIDE: usize = 20;
const FIT: Fit = Fit::new(3000, 3e-3).falling_to(0.01);
const BATCH: usize = 512;
const WIDTH: usize = 64;
/// By how much smaller the error must be.
const FACTOR: f64 = 4.0;

/// Learns the errors of two methods.
#[derive(Parser)]
struct Args {
    #[command(flatten)]
    flags: Flags,
}

/// Mean and deviation of every feature.
struct Moments {
    mean: Tensor,
    deviation: Tensor,
}

impl Moments {
    /// Of rows `(rows, features)`.
    fn of(x: &Tensor) -> Result<Self> {
        Ok(Self {
            mean: x.mean_keepdim(0)?,
            deviation: x.var_keepdim(0)?.sqrt()?,
        })
    }

    fn plain(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        let cast = |of: &Tensor| of.to_dtype(x.dtype());
        x.broadcast_sub(&cast(&self.mean)?)?
            .broadcast_div(&cast(&self.deviation)?)
    }
}

/// g(y, k), whose inputs and output are of deviation one.
struct Correction {
    net: Perceptron,
    inputs: Moments,
    /// What the output is multiplied by.
    size: Tensor,
}

impl Correction {
    fn at(&self, y: &Tensor, k: &Tensor) -> candle_core::Result<Tensor> {
        let x = self.inputs.plain(&Tensor::cat(&[y, k], D::Minus1)?)?;
        // The network in f32 at least: it is small, and its result is multiplied by h^p.
        let size = self.size.to_dtype(y.dtype())?;
        let g = self.net.forward(&x.to_dtype(DType::F32)?)?;
        g.to_dtype(y.dtype())?.broadcast_mul(&size)
    }
}

/// A method, and its error at every output.
struct Line {
    name: String,
    dtype: Dtype,
    errors: Vec<f64>,
    evaluations: usize,
    seconds: f64,
}

impl Line {
    fn last(&self) -> f64 {
        self.errors[self.errors.len() - 1]
    }
}

fn main() -> ExitCode {
    let args = Args::parse();
    report::run("hypersolver", &args.flags, |device, report| {
        run(&args, device, report)
    })
}

fn options(method: Tableau, steps: usize, dtype: Dtype) -> OdeOptions {
    OdeOptions {
        method,
        steps: Steps::PerInterval(steps),
        precision: Some(dtype.precision()),
        ..Default::default()
    }
}

/// Starts around 15, after a time in which they reach the attractor.
fn starts(n: usize, seed: u64, device: &Device) -> Result<Tensor> {
    let y = (normal(&mut generator(seed), (n, 3), DType::F64, device)? + 15.0)?;
    Ok(predict(
        &System::LORENZ,
        &y,
        &[0.0, 1.0],
        &options(RK4, 400, Dtype::F64),
    )?
    .get(1)?)
}

fn exact(starts: &Tensor, end: f64) -> Result<(TimeGrid, Tensor)> {
    let times = TimeGrid::linspace(0.0, end, (end / STEP).round() as usize + 1)?;
    let states = predict(
        &System::LORENZ,
        starts,
        &times,
        &options(RK4, INSIDE, Dtype::F64),
    )?;
    Ok((times, states))
}

/// Fits a correction to a method; the mean squared error, 1 of no correction, first and last.
fn fitted(
    method: &Tableau,
    (times, states): (&TimeGrid, &Tensor),
    (fit, seed): (&Fit, u64),
) -> Result<(Correction, [f64; 2])> {
    let data = residuals(&System::LORENZ, method, times, states)?;
    let flat = |x: &Tensor| x.flatten(0, 1);
    let x = Tensor::cat(&[flat(&data.states)?, flat(&data.velocities)?], 1)?;
    let r = flat(&data.residuals)?;
    let inputs = Moments::of(&x)?;
    let size = r.sqr()?.mean_keepdim(0)?.sqrt()?;
    let single = |x: Tensor| x.to_dtype(DType::F32);
    let (x, r) = (single(inputs.plain(&x)?)?, single(r.broadcast_div(&size)?)?);
    let vars = VarMap::new();
    let vb = VarBuilder::from_varmap(&vars, DType::F32, x.device());
    let net = Perceptron::new(&[6, WIDTH, WIDTH, 3], Activation::Softplus, vb)?;
    let mut rng = generator(seed + 1);
    initial::layers(&vars, &mut rng)?;
    let rows = x.dim(0)?;
    let bar = progress(method.name(), fit.iterations)?;
    let losses = fit.run(&vars, &bar, |_| {
        use rand::Rng;
        let numbers: Vec<u32> = (0..BATCH)
            .map(|_| rng.random_range(0..rows as u32))
            .collect();
        let numbers = Tensor::new(numbers.as_slice(), x.device())?;
        let error = (net.forward(&x.index_select(&numbers, 0)?)? - r.index_select(&numbers, 0)?)?;
        Ok(error.sqr()?.mean_all()?)
    })?;
    bar.finish_and_clear();
    let last = &losses[losses.len().saturating_sub(100)..];
    let ends = [losses[0], common::mean(last)];
    Ok((Correction { net, inputs, size }, ends))
}

/// |y − exact| over |exact| in the mean over rows, by output.
fn errors(states: &Tensor, exact: &Tensor) -> Result<Vec<f64>> {
    let norm = |x: &Tensor| x.sqr()?.sum(D::Minus1)?.sqrt();
    let apart = (states.to_dtype(DType::F64)? - exact)?;
    Ok(values(&(norm(&apart)? / norm(exact)?)?.mean(1)?)?)
}

fn run(args: &Args, device: &Device, report: &mut Report) -> Result<()> {
    let (size, seed) = (args.flags.size(), args.flags.seed);
    let fit = FIT.iterations(size.pick(20, FIT.iterations, 30_000));
    let (times, states) = exact(&starts(size.pick(8, 64, 512), seed, device)?, END)?;
    let others = starts(size.pick(8, 64, 512), seed + 1000, device)?;
    let (grid, truth) = exact(&others, COMPARED)?;
    let mut corrections = vec![];
    for method in [EULER, MIDPOINT] {
        let (correction, losses) = fitted(&method, (&times, &states), (&fit, seed))?;
        println!(
            "{}: mean squared residual 1, not learnt of it {}",
            method.name(),
            sci(losses[1])
        );
        report.figure(&format!("{}_residual_left", method.name()), losses[1])?;
        corrections.push((method, correction));
    }
    let mut lines = vec![];
    for dtype in args
        .flags
        .precisions_among(&[Dtype::F32, Dtype::Bf16], &Dtype::ALL)?
    {
        let y0 = others.to_dtype(dtype.state())?;
        let mut line =
            |name: String, evaluations, run: &dyn Fn() -> candle_diffeq::Result<Tensor>| {
                let mut seconds = vec![];
                let states = loop {
                    let clock = Instant::now();
                    let states = run()?;
                    seconds.push(clock.elapsed().as_secs_f64());
                    if seconds.len() == 5 {
                        break states;
                    }
                };
                let seconds = median(seconds);
                let errors = errors(&states, &truth)?;
                lines.push(Line {
                    name,
                    dtype,
                    errors,
                    evaluations,
                    seconds,
                });
                Ok::<_, Box<dyn std::error::Error>>(())
            };
        for method in [EULER, MIDPOINT, RK4] {
            let options = options(method.clone(), 1, dtype);
            let own = || predict(&System::LORENZ, &y0, &grid, &options);
            line(method.name().to_owned(), method.stages(), &own)?;
        }
        for (method, correction) in &corrections {
            let options = options(EULER, 1, dtype);
            let g = |_: &Time, y: &Tensor, k: &Tensor| correction.at(y, k);
            let hyper = Hypersolver::new(System::LORENZ, method.clone(), g);
            let own = || predict(&hyper, &y0, &grid, &options);
            line(format!("hyper {}", method.name()), method.stages(), &own)?;
        }
    }
    print(&lines);
    draw(report, &lines, grid.points())?;
    let json = |l: &Line| {
        json!({
            "method": l.name,
            "precision": l.dtype.name(),
            "error_first_step": l.errors[1],
            "error": l.last(),
            "seconds": l.seconds,
        })
    };
    report.figure("lines", lines.iter().map(json).collect::<Vec<_>>())?;
    let of = |name: &str| {
        lines
            .iter()
            .find(|l| l.dtype == Dtype::F32 && l.name == name)
    };
    for name in ["euler", "midpoint"] {
        if let Some((plain, hyper)) = of(name).zip(of(&format!("hyper {name}"))) {
            let factor = plain.last() / hyper.last();
            report.demand(factor >= FACTOR, || {
                format!("{name}: the correction makes its error {factor:.1} times smaller, not {FACTOR}")
            });
        }
    }
    Ok(())
}

fn print(lines: &[Line]) {
    let mut table = Table::new([
        "method",
        "precision",
        "evaluations a step",
        "error of a step",
        "at t = 1",
        "ms",
    ]);
    for l in lines {
        table.row([
            l.name.clone(),
            l.dtype.name().to_owned(),
            l.evaluations.to_string(),
            sci(l.errors[1]),
            sci(l.last()),
            format!("{:.1}", 1e3 * l.seconds),
        ]);
    }
    print!("{table}");
}

fn draw(report: &mut Report, lines: &[Line], times: &[f64]) -> Result<()> {
    let mut precisions: Vec<_> = lines.iter().map(|l| l.dtype).collect();
    precisions.dedup();
    picture(
        &report.picture(""),
        (620 * precisions.len() as u32, 420),
        |area| {
            let parts = area.split_evenly((1, precisions.len()));
            for (dtype, part) in precisions.iter().zip(&parts) {
                let own = lines.iter().filter(|l| l.dtype == *dtype);
                let curve = |(i, l): (usize, &Line)| {
                    let at = times
                        .iter()
                        .copied()
                        .zip(l.errors.iter().map(|e| e.max(1e-9)));
                    let at: Vec<_> = at.skip(1).collect();
                    let mark = match l.name.starts_with("hyper") {
                        true => Mark::Line,
                        false => Mark::Dashed,
                    };
                    Curve::new(l.name.clone(), colour(i), at)
                        .mark(mark)
                        .width(2)
                };
                Panel {
                    curves: own.enumerate().map(curve).collect(),
                    scales: [Scale::Linear, Scale::Decades],
                    legend: common::chart::SeriesLabelPosition::LowerRight,
                    ..Panel::new(
                        format!("relative error, {}, h = {STEP}", dtype.name()),
                        "t",
                        "error",
                    )
                }
                .draw(part)?;
            }
            Ok(())
        },
    )
}
