//! What a solve costs as its steps, its batch and its width grow.
//!
//! `cargo run --release --example cost` (two minutes; `--smoke`: seconds).  A tanh network d-w-w-d with
//! RK4, forward and backward, on the CPU: microseconds for a step, for a row of the batch in a step, and
//! for a product of numbers.  `--full` goes to 10⁵ steps
//! (minutes), `--sweep steps` does only that.

use std::process::ExitCode;
use std::time::Instant;

use candle_core::{DType, Device, Var};
use candle_diffeq::nn::{Activation, Mlp};
use candle_diffeq::options::Output;
use candle_diffeq::{NeuralOde, OdeOptions};
use candle_nn::VarMap;
use clap::Parser;
use serde_json::json;

use common::chart::{self, colour, Curve, Mark, Panel, Scale};
use common::dtype::Dtype;
use common::flags::Flags;
use common::random::{generator, normal};
use common::report::{self, Report};
use common::table::Table;
use common::{initial, median, Result};

/// Times solves of growing size.
#[derive(Parser)]
struct Args {
    #[command(flatten)]
    flags: Flags,
    /// Only what grows so; everything by default.
    #[arg(long, value_parser = ["steps", "batch", "width"])]
    sweep: Option<String>,
}

/// One solve.
#[derive(Clone, Copy)]
struct Solve {
    steps: usize,
    batch: usize,
    width: usize,
}

/// Features of the state.
const FEATURES: usize = 2;

const BASE: Solve = Solve {
    steps: 100,
    batch: 512,
    width: 64,
};

impl Solve {
    /// Products of numbers in a step, forward and backward: 4 stages, each evaluated twice, pulled back
    /// and collected.
    fn products(self) -> f64 {
        let layers = 2 * FEATURES * self.width + self.width * self.width;
        (4 * 4 * layers * self.batch) as f64
    }

    /// The solve, forward and backward, ready to be run.
    fn prepared(self, dtype: Dtype, seed: u64, device: &Device) -> Result<Run> {
        let (vars, mut rng) = (VarMap::new(), generator(seed));
        let ode = NeuralOde::from_field(&vars, "f", dtype.state(), device, move |vb| {
            Mlp::new(
                &[FEATURES, self.width, self.width, FEATURES],
                Activation::Tanh,
                vb,
            )
        })?;
        let ode = ode.options(OdeOptions {
            precision: Some(dtype.precision()),
            output: Output::Final,
            ..Default::default()
        });
        initial::layers(&vars, &mut rng)?;
        let y0 = normal(&mut rng, (self.batch, FEATURES), dtype.state(), device)?;
        let y0 = Var::from_tensor(&(y0 * 0.5)?)?;
        let times: Vec<_> = (0..=self.steps)
            .map(|n| n as f64 / self.steps as f64)
            .collect();
        Ok(Box::new(move || {
            let loss = ode.solve(y0.as_tensor(), &times)?.sqr()?.mean_all()?;
            loss.backward()?;
            loss.to_dtype(DType::F64)?.to_scalar::<f64>()?;
            Ok(())
        }))
    }
}

/// One run of a solve.
type Run = Box<dyn Fn() -> Result<()>>;

/// Seconds that a measurement takes about, of as many runs as that needs.
const SPAN: f64 = 0.1;

/// Microseconds of a step for each solve: medians of rounds in which all take their turn, so that what
/// else the machine does meets all of them.
fn microseconds(
    solves: &[(Dtype, Solve)],
    rounds: usize,
    (seed, device): (u64, &Device),
) -> Result<Vec<f64>> {
    let seconds = |run: &Run, times: usize| -> Result<f64> {
        let clock = Instant::now();
        (0..times).try_for_each(|_| run())?;
        Ok(clock.elapsed().as_secs_f64() / times as f64)
    };
    let mut runs = vec![];
    for (dtype, solve) in solves {
        let run = solve.prepared(*dtype, seed, device)?;
        run()?;
        let alone = seconds(&run, 1)?;
        runs.push((run, alone, vec![]));
    }
    for _ in 0..rounds {
        for (run, alone, measured) in &mut runs {
            if *alone < SPAN {
                // What a larger one has left in caches and heap is not its cost.
                run()?;
            }
            let times = (SPAN / *alone).clamp(1.0, 1000.0) as usize;
            measured.push(seconds(run, times)?);
        }
    }
    let per_step = |((_, solve), (_, _, measured)): (&(Dtype, Solve), (_, _, Vec<f64>))| {
        1e6 * median(measured) / solve.steps as f64
    };
    Ok(solves.iter().zip(runs).map(per_step).collect())
}

/// One quantity that grows.
struct Sweep {
    name: &'static str,
    title: &'static str,
    unit: &'static str,
    sizes: Vec<usize>,
    solve: fn(usize) -> Solve,
    /// Of the sizes.
    scale: Scale,
    /// What a step's microseconds are divided by.
    per: fn(Solve) -> f64,
}

fn sweeps(flags: &Flags) -> [Sweep; 3] {
    let size = flags.size();
    let powers = |from: u32, to: u32, base: usize| (from..=to).map(|e| base.pow(e)).collect();
    [
        Sweep {
            name: "steps",
            title: "Steps: batch 512, width 64",
            unit: "µs / step",
            sizes: size.pick(powers(1, 2, 10), powers(2, 4, 10), powers(2, 5, 10)),
            solve: |steps| Solve { steps, ..BASE },
            scale: Scale::Decades,
            per: |_| 1.0,
        },
        Sweep {
            name: "batch",
            title: "Batch: 100 steps, width 64",
            unit: "µs / step and row",
            sizes: size.pick(powers(3, 5, 2), powers(3, 13, 2), powers(3, 15, 2)),
            solve: |batch| Solve { batch, ..BASE },
            scale: Scale::Doublings,
            per: |solve| solve.batch as f64,
        },
        Sweep {
            name: "width",
            title: "Width: 100 steps, batch 512",
            unit: "ns / 1000 products",
            sizes: size.pick(powers(3, 5, 2), powers(3, 9, 2), powers(3, 10, 2)),
            solve: |width| Solve { width, ..BASE },
            scale: Scale::Doublings,
            per: |solve| solve.products() * 1e-6,
        },
    ]
}

fn main() -> ExitCode {
    let args = Args::parse();
    report::run("cost", &args.flags, |device, report| {
        run(&args, device, report)
    })
}

fn run(args: &Args, device: &Device, report: &mut Report) -> Result<()> {
    let flags = &args.flags;
    let mut panels = vec![];
    let wanted = |sweep: &Sweep| args.sweep.as_ref().is_none_or(|name| name == sweep.name);
    for sweep in sweeps(flags).into_iter().filter(wanted) {
        let (mut curves, mut most) = (vec![], 0.0f64);
        let dtypes = flags.precisions_among(&[Dtype::F32, Dtype::Bf16], &Dtype::ALL)?;
        let solves: Vec<_> = dtypes
            .iter()
            .flat_map(|&dtype| sweep.sizes.iter().map(move |&size| (dtype, size)))
            .map(|(dtype, size)| (dtype, (sweep.solve)(size)))
            .collect();
        let costs = microseconds(&solves, flags.size().pick(3, 7, 3), (flags.seed, device))?;
        for (i, (dtype, costs)) in dtypes
            .into_iter()
            .zip(costs.chunks(sweep.sizes.len()))
            .enumerate()
        {
            let of = |(&size, &us): (&usize, &f64)| {
                (size as f64, us / (sweep.per)((sweep.solve)(size)), us)
            };
            let points: Vec<_> = sweep.sizes.iter().zip(costs).map(of).collect();
            print(&sweep, dtype, &points);
            let figures: Vec<_> = points
                .iter()
                .map(|(n, cost, us)| json!([n, cost, us]))
                .collect();
            report.figure(&format!("{} {}", sweep.name, dtype.name()), figures)?;
            most = points.iter().map(|p| p.1).fold(most, f64::max);
            let line = points.iter().map(|(n, cost, _)| (*n, *cost));
            curves.push(Curve::new(dtype.name(), colour(i), line).mark(Mark::DottedLine));
        }
        panels.push(Panel {
            scales: [sweep.scale, Scale::Linear],
            // From zero: costs are compared by their ratios.
            ranges: [None, Some(0.0..1.15 * most)],
            curves,
            ..Panel::new(sweep.title, sweep.name, sweep.unit)
        });
    }
    draw(&report.picture(""), panels)
}

fn print(sweep: &Sweep, dtype: Dtype, points: &[(f64, f64, f64)]) {
    let mut table = Table::new([sweep.name, "µs / step", sweep.unit]);
    for (n, cost, us) in points {
        table.row([n.to_string(), format!("{us:.1}"), format!("{cost:.3}")]);
    }
    println!("{}, {}\n\n{table}", sweep.title, dtype.name());
}

fn draw(path: &std::path::Path, panels: Vec<Panel>) -> Result<()> {
    let columns = panels.len();
    chart::picture(path, (420 * columns as u32, 420), |area| {
        let mut areas = area.split_evenly((1, columns)).into_iter().zip(panels);
        areas.try_for_each(|(area, panel)| panel.draw(&area))
    })
}
