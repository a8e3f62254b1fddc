//! Six ways to make a flow depend on depth and on data, all on two moons.
//!
//! `cargo run --release --example cookbook` (minutes; `--smoke`: seconds).  torchdyn's tutorial 01, Adam at 5e-3, 600
//! iterations on 512 points, the cross entropy of the state at depth 1:
//!
//! * depth-invariant: 2-64-2;
//! * depth-variant: time as one more input of both layers, 3-64, 65-2;
//! * Galerkin: the first layer's weights in a Fourier basis of 5 orders, 2-32-2;
//! * data-controlled: the field sees the data, 4-64-2;
//! * stacked: five data-controlled fields 4-4-2 one after the other;
//! * stacked with jumps: a linear layer 2-2 after each of them.
//!
//! Prints a table, writes a picture and the figures as JSON beside it.  Exits with 1 when a flow does not part the moons.

use std::process::ExitCode;

use candle_core::{DType, Device, Tensor};
use candle_diffeq::datasets::Labelled;
use candle_diffeq::nn::{
    depth_cat, Activation, Basis, ConditionalMlp, GalerkinLinear, Linear, Mlp,
};
use candle_diffeq::{NeuralOde, Time, VectorField};
use candle_nn::{Module, VarBuilder, VarMap};
use clap::Parser;

use common::chart::picture;
use common::classes::Sample;
use common::classifier::{options, tell, Classifier, Flow};
use common::dtype::Dtype;
use common::fit::Fit;
use common::flags::Flags;
use common::random::generator;
use common::report::{self, Report};
use common::{initial, progress, Result};

const MOONS: Labelled = Labelled::Moons { noise: 0.1 };
const POINTS: usize = 512;
const FIT: Fit = Fit::new(600, 5e-3);
/// Of [0, 1].
const STEPS: usize = 10;
const PIECES: usize = 5;
/// The share of points whose class must be right.
const RIGHT: f64 = 0.95;

/// Trains six flows on two moons.
#[derive(Parser)]
struct Args {
    #[command(flatten)]
    flags: Flags,
}

#[derive(Clone, Copy, PartialEq)]
enum Kind {
    Invariant,
    Variant,
    Galerkin,
    Controlled,
    Stacked,
    Jumps,
}

const KINDS: [Kind; 6] = [
    Kind::Invariant,
    Kind::Variant,
    Kind::Galerkin,
    Kind::Controlled,
    Kind::Stacked,
    Kind::Jumps,
];

impl Kind {
    fn name(self) -> &'static str {
        match self {
            Self::Invariant => "depth-invariant",
            Self::Variant => "depth-variant",
            Self::Galerkin => "Galerkin",
            Self::Controlled => "data-controlled",
            Self::Stacked => "stacked",
            Self::Jumps => "stacked, jumps",
        }
    }

    fn flow(self, vars: &VarMap, dtype: Dtype, (seed, device): (u64, &Device)) -> Result<Flow> {
        match self {
            Self::Invariant => of_field(vars, dtype, device, |vb| {
                Mlp::new(&[2, 64, 2], Activation::Tanh, vb)
            }),
            Self::Variant => of_field(vars, dtype, device, |vb| {
                let (l1, l2) = (
                    Linear::new(3, 64, vb.pp("l1"))?,
                    Linear::new(65, 2, vb.pp("l2"))?,
                );
                Ok(move |t: &Time, z: &Tensor| {
                    let hidden = Activation::Tanh.forward(&l1.forward(&depth_cat(t, z, 1)?)?)?;
                    l2.forward(&depth_cat(t, &hidden, 1)?)
                })
            }),
            Self::Galerkin => {
                let flow = of_field(vars, dtype, device, |vb| {
                    let first = GalerkinLinear::new(2, 32, Basis::fourier(5), vb.pp("l1"))?;
                    let last = Linear::new(32, 2, vb.pp("l2"))?;
                    Ok(move |t: &Time, z: &Tensor| {
                        last.forward(&Activation::Tanh.forward(&first.forward(t, z)?)?)
                    })
                })?;
                // As large as the library draws them, from the seed.
                initial::normal(vars, &mut generator(seed), |name, shape| {
                    let functions = shape.dims()[0] as f64;
                    name.ends_with("coeffs")
                        .then(|| 1.0 / (2.0 * functions).sqrt())
                })?;
                Ok(flow)
            }
            Self::Controlled => controlled(vars, (1, 64), false, (dtype, device)),
            Self::Stacked => controlled(vars, (PIECES, 4), false, (dtype, device)),
            Self::Jumps => controlled(vars, (PIECES, 4), true, (dtype, device)),
        }
    }
}

fn of_field<F: VectorField + 'static>(
    vars: &VarMap,
    dtype: Dtype,
    device: &Device,
    build: impl Fn(VarBuilder<'_>) -> candle_core::Result<F> + Send + Sync + 'static,
) -> Result<Flow> {
    let ode = NeuralOde::from_field(vars, "f", DType::F32, device, build)?;
    let ode = ode.options(options(dtype, STEPS));
    Ok(Box::new(move |x: &Tensor, times: &[f64]| {
        Ok(ode.solve(x, times)?)
    }))
}

/// Data-controlled fields of so many hidden units one after the other, each with an equal share of the depth, perhaps with a
/// linear layer after each.
fn controlled(
    vars: &VarMap,
    (pieces, hidden): (usize, usize),
    jumps: bool,
    (dtype, device): (Dtype, &Device),
) -> Result<Flow> {
    let mut odes = vec![];
    for i in 0..pieces {
        let ode = NeuralOde::with_args(vars, &format!("f.{i}"), DType::F32, device, move |vb| {
            ConditionalMlp::new(&[2, hidden, 2], 2, Activation::Tanh, vb)
        })?;
        let vb = VarBuilder::from_varmap(vars, DType::F32, device).pp(format!("jump.{i}"));
        let jump = jumps.then(|| Linear::new(2, 2, vb)).transpose()?;
        odes.push((ode.options(options(dtype, STEPS)), jump));
    }
    Ok(Box::new(move |x: &Tensor, times: &[f64]| {
        let mut z = x.clone();
        let mut all: Vec<Option<Tensor>> = vec![None; times.len()];
        for (i, (ode, jump)) in odes.iter().enumerate() {
            let share = 1.0 / pieces as f64;
            let (from, to) = (i as f64 * share, (i + 1) as f64 * share);
            // The times of this piece, the ends among them.
            let inside = |t: &&f64| **t > from + 1e-9 && **t < to - 1e-9;
            let mut grid = vec![from];
            grid.extend(times.iter().filter(inside));
            grid.push(to);
            let states = ode.given(x).solve(&z, &grid)?;
            for (t, slot) in times.iter().zip(&mut all) {
                if let Some(at) = grid.iter().position(|g| (g - t).abs() <= 1e-9) {
                    *slot = Some(states.get(at)?);
                }
            }
            z = states.get(grid.len() - 1)?;
            if let Some(jump) = jump {
                z = jump.forward(&z)?;
            }
        }
        // The last state is behind the last jump.
        if let Some(last) = all.last_mut() {
            *last = Some(z);
        }
        let all = all.into_iter().map(|z| z.ok_or("a time outside of [0, 1]"));
        let all = all.collect::<std::result::Result<Vec<_>, _>>()?;
        Ok(Tensor::stack(&all, 0)?)
    }))
}

fn main() -> ExitCode {
    let args = Args::parse();
    report::run("cookbook", &args.flags, |device, report| {
        run(&args, device, report)
    })
}

fn run(args: &Args, device: &Device, report: &mut Report) -> Result<()> {
    let (size, seed) = (args.flags.size(), args.flags.seed);
    let (x, classes) = MOONS.sample(POINTS, seed, device)?;
    let sample = Sample { x, classes };
    let fit = FIT.iterations(size.pick(3, FIT.iterations, 2 * FIT.iterations));
    let mut all = vec![];
    for dtype in args.flags.precisions(&[Dtype::F32, Dtype::Bf16])? {
        for kind in KINDS {
            let vars = VarMap::new();
            let flow = kind.flow(&vars, dtype, (seed, device))?;
            let classifier = Classifier::new(kind.name(), (vars, flow), None, (seed, device))?;
            let bar = progress(kind.name(), fit.iterations)?;
            all.push((dtype, classifier.train(&sample, &fit, &bar)?));
            bar.finish_and_clear();
        }
    }
    tell(&all, RIGHT, report)?;
    // The flows of the first precision.
    let (varied, stacked) = all[..KINDS.len()].split_at(KINDS.len() / 2);
    for (part, own) in [("", varied), ("pieces", stacked)] {
        picture(
            &report.picture(part),
            (1200, 300 * own.len() as u32),
            |area| {
                let rows = area.split_evenly((own.len(), 1));
                let mut each = own.iter().zip(&rows);
                each.try_for_each(|((_, o), row)| o.draw(&sample, 30, row))
            },
        )?;
    }
    report.figure("iterations", fit.iterations)
}
