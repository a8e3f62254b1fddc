//! The map x ↦ −x on a line, which no flow of the line can be: trajectories would have to cross.  A field that sees the
//! data can.
//!
//! `cargo run --release --example crossing_trajectories` (a minute; `--smoke`: seconds).  torchdyn's tutorial 03: 100 points
//! in [−1, 1], fields of 64 tanh units, Adam at 1e-2, 500 iterations (200 with data control).  Prints a table, writes a
//! picture and the figures as JSON beside it.  Exits with 1 when one of the first three fields succeeds, or the last fails.

use std::process::ExitCode;

use candle_core::{DType, Device, Tensor};
use candle_diffeq::nn::energy::{Energy, GradientFlow};
use candle_diffeq::nn::{Activation, ConditionalMlp, EnergyMlp, Mlp};
use candle_diffeq::{NeuralOde, VectorField};
use candle_nn::{VarBuilder, VarMap};
use clap::Parser;
use serde_json::json;

use common::chart::{colour, picture, Curve, Mark, Panel, TRUTH};
use common::classifier::{options, Flow};
use common::dtype::Dtype;
use common::fit::Fit;
use common::flags::Flags;
use common::random::generator;
use common::report::{self, Report};
use common::table::{sci, Table};
use common::{initial, progress, values, Result};

const POINTS: usize = 100;
const FIT: Fit = Fit::new(500, 1e-2);
const CONTROLLED: usize = 200;
/// Of [0, 1].
const STEPS: usize = 10;
/// A map that keeps the order of points, as a flow of a line does, has at least the error of the zero map, mean x².
const FAILS: f64 = 0.33;
const SUCCEEDS: f64 = 0.01;

/// Trains four fields on x ↦ −x.
#[derive(Parser)]
struct Args {
    #[command(flatten)]
    flags: Flags,
}

/// The fields.
#[derive(Clone, Copy, PartialEq)]
enum Kind {
    Invariant,
    Variant,
    Gradient,
    Controlled,
}

const KINDS: [Kind; 4] = [
    Kind::Invariant,
    Kind::Variant,
    Kind::Gradient,
    Kind::Controlled,
];

impl Kind {
    fn name(self) -> &'static str {
        match self {
            Self::Invariant => "f(z)",
            Self::Variant => "f(t, z)",
            Self::Gradient => "−∇E(z)",
            Self::Controlled => "f(z, x)",
        }
    }

    fn flow(self, vars: &VarMap, dtype: Dtype, device: &Device) -> Result<Flow> {
        let tanh = Activation::Tanh;
        match self {
            Self::Invariant => flow(vars, dtype, device, move |vb| {
                Mlp::new(&[1, 64, 1], tanh, vb)
            }),
            Self::Variant => flow(vars, dtype, device, move |vb| {
                Mlp::with_time(&[1, 64, 1], tanh, vb)
            }),
            Self::Gradient => flow(vars, dtype, device, move |vb| {
                let energy = EnergyMlp::new(&[1, 64, 1], tanh, Energy::Output, vb)?;
                Ok(GradientFlow::new(energy))
            }),
            Self::Controlled => {
                let ode = NeuralOde::with_args(vars, "f", DType::F32, device, move |vb| {
                    ConditionalMlp::new(&[1, 64, 1], 1, tanh, vb)
                })?;
                let ode = ode.options(options(dtype, STEPS));
                Ok(Box::new(move |x: &Tensor, times: &[f64]| {
                    Ok(ode.given(x).solve(x, times)?)
                }))
            }
        }
    }
}

fn flow<F: VectorField + 'static>(
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

/// What a field came to.
struct Outcome {
    kind: Kind,
    dtype: Dtype,
    mse: f64,
    first: f64,
    flow: Flow,
}

fn main() -> ExitCode {
    let args = Args::parse();
    report::run("crossing_trajectories", &args.flags, |device, report| {
        run(&args, device, report)
    })
}

fn run(args: &Args, device: &Device, report: &mut Report) -> Result<()> {
    let (size, seed) = (args.flags.size(), args.flags.seed);
    let at = |i: usize| -1.0 + 2.0 * i as f32 / (POINTS - 1) as f32;
    let x: Vec<f32> = (0..POINTS).map(at).collect();
    let x = Tensor::from_vec(x, (POINTS, 1), device)?;
    let target = x.neg()?;
    let mut all = vec![];
    for dtype in args.flags.precisions(&[Dtype::F32, Dtype::Bf16])? {
        for kind in KINDS {
            let iterations = match kind {
                Kind::Controlled => CONTROLLED,
                _ => FIT.iterations,
            };
            let fit = FIT.iterations(size.pick(5, iterations, iterations));
            let vars = VarMap::new();
            let flow = kind.flow(&vars, dtype, device)?;
            initial::layers(&vars, &mut generator(seed))?;
            let error = || -> Result<Tensor> {
                Ok((flow(&x, &[0.0, 1.0])?.get(1)? - &target)?
                    .sqr()?
                    .mean_all()?)
            };
            let bar = progress(kind.name(), fit.iterations)?;
            let losses = fit.run(&vars, &bar, |_| error())?;
            bar.finish_and_clear();
            let mse = f64::from(error()?.to_scalar::<f32>()?);
            let first = losses[0];
            all.push(Outcome {
                kind,
                dtype,
                mse,
                first,
                flow,
            });
        }
    }
    let mut table = Table::new(["field", "precision", "MSE, first", "last"]);
    for o in &all {
        let (name, dtype) = (o.kind.name(), o.dtype.name());
        table.row([name.to_owned(), dtype.to_owned(), sci(o.first), sci(o.mse)]);
        let as_it_must = match o.kind {
            Kind::Controlled => o.mse <= SUCCEEDS,
            _ => o.mse >= FAILS,
        };
        report.demand(as_it_must, || {
            format!("{name}, {dtype}: an MSE of {:.3e}", o.mse)
        });
    }
    print!("{table}");
    picture(&report.picture(""), (1600, 430), |area| {
        for (o, part) in all.iter().zip(&area.split_evenly((1, KINDS.len()))) {
            panel(o, &x)?.draw(part)?;
        }
        Ok(())
    })?;
    let json = |o: &Outcome| {
        json!({
            "field": o.kind.name(),
            "precision": o.dtype.name(),
            "mse_first": o.first,
            "mse": o.mse,
        })
    };
    report.figure("runs", all.iter().map(json).collect::<Vec<_>>())
}

/// Some trajectories over depth, and where they should end.
fn panel(o: &Outcome, x: &Tensor) -> Result<Panel> {
    let times: Vec<f64> = (0..=40).map(|i| f64::from(i) / 40.0).collect();
    let states = (o.flow)(x, &times)?;
    let (all, rows) = (values(&states)?, x.dim(0)?);
    let path = |row: usize| {
        let at = |(i, t): (usize, &f64)| (*t, all[i * rows + row]);
        let side = usize::from(2 * row >= rows);
        Curve::new(
            "",
            colour(side),
            times.iter().enumerate().map(at).collect::<Vec<_>>(),
        )
    };
    let mut curves: Vec<_> = (0..rows).step_by(4).map(path).collect();
    let wanted = values(x)?.into_iter().step_by(4).map(|x| (1.0, -x));
    curves.push(Curve::new("", TRUTH, wanted.collect::<Vec<_>>()).mark(Mark::Dots(4)));
    Ok(Panel {
        curves,
        ..Panel::new(
            format!("{}: MSE {:.1e}", o.kind.name(), o.mse),
            "depth",
            "z",
        )
    })
}
