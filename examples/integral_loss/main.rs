//! Learns a field whose solutions keep to a circle, from a loss that is an integral along them.
//!
//! `cargo run --release --example integral_loss` (minutes; `--smoke`: seconds).  torchdyn's tutorial 05: starts around
//! (1, 0), the track γ(s) = (cos 2πs, sin 2πs), the loss ∫ |x − γ|² ds over [0, 1] as one more tensor of the state, a
//! perceptron 2-32-32-2; then solves to s = 5.  It is trained by the discrete adjoint in every precision, and in f32 also by
//! the three continuous ones, whose first gradients are compared with one of finer steps in f64.  Prints a table, writes a
//! picture and the figures as JSON beside it.  Exits with 1 when the track is left within training's time, or when the radius
//! is lost beyond it.

use std::process::ExitCode;
use std::time::Instant;

use candle_core::{DType, Device, Tensor, D};
use candle_diffeq::nn::{cost_precision, Activation, Mlp, WithIntegral};
use candle_diffeq::options::{AdjointSolve, Gradient, Output, Steps};
use candle_diffeq::tableau::RK4;
use candle_diffeq::{NeuralOde, OdeOptions, Precision, Time};
use candle_nn::VarMap;
use clap::Parser;
use serde_json::json;

use common::chart::{colour, picture, Curve, Panel, TRUTH};
use common::dtype::Dtype;
use common::fit::Fit;
use common::flags::Flags;
use common::plane::Window;
use common::random::{generator, normal};
use common::report::{self, Report};
use common::table::{sci, Table};
use common::{initial, progress, relative, values, Result};

const STARTS: usize = 100;
const SPREAD: f64 = 0.1;
const FIT: Fit = Fit::new(800, 1e-2).falling_to(0.05);
const STEPS: usize = 20;
/// Where extrapolation ends.
const LONG: f64 = 5.0;
/// The root mean square distance from the track on [0, 1], and of |x| from 1 at the end, that are allowed.
const TRACK: f64 = 0.15;
const RADIUS: f64 = 0.3;

/// Learns to keep to a circle.
#[derive(Parser)]
struct Args {
    #[command(flatten)]
    flags: Flags,
}

type Costly = NeuralOde<(Tensor, Tensor)>;

/// How gradients are computed.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Way {
    Discrete,
    Backsolve,
    Interpolated,
    Quadrature,
}

impl Way {
    const ALL: [Self; 4] = [
        Self::Discrete,
        Self::Backsolve,
        Self::Interpolated,
        Self::Quadrature,
    ];

    fn name(self) -> &'static str {
        match self {
            Self::Discrete => "discrete",
            Self::Backsolve => "backsolve",
            Self::Interpolated => "interpolated",
            Self::Quadrature => "quadrature",
        }
    }

    fn gradient(self) -> Gradient {
        let solve = AdjointSolve::new();
        match self {
            Self::Discrete => Gradient::Discrete,
            Self::Backsolve => Gradient::Backsolve(solve),
            Self::Interpolated => Gradient::Interpolated(solve),
            Self::Quadrature => Gradient::Quadrature(solve),
        }
    }
}

struct Outcome {
    dtype: Dtype,
    way: Way,
    /// Relative error of the first gradient, in the Euclidean norm.
    error: f64,
    /// Of the forward and the backward pass of an update, and what the optimiser does.
    milliseconds: f64,
    losses: Vec<f64>,
    /// Root mean squares: from the track over [0, 1], and of |x| − 1 at s = 5.
    track: f64,
    radius: f64,
    /// `(times, rows, 2)`.
    states: Tensor,
    ode: Costly,
}

/// |x − γ(s)|², formed from s in state precision.
fn cost(t: &Time, x: &Tensor) -> candle_core::Result<Tensor> {
    let angle = (t.tensor()? * std::f64::consts::TAU)?;
    let track = Tensor::stack(&[angle.cos()?, angle.sin()?], 0)?.to_dtype(x.dtype())?;
    x.broadcast_sub(&track.unsqueeze(0)?)?
        .sqr()?
        .sum_keepdim(D::Minus1)
}

fn model(
    precision: Precision,
    (way, steps): (Way, usize),
    vars: &VarMap,
    device: &Device,
) -> Result<Costly> {
    let ode = NeuralOde::from_field(vars, "f", DType::F32, device, |vb| {
        Ok(WithIntegral::new(
            Mlp::new(&[2, 32, 32, 2], Activation::Tanh, vb)?,
            cost,
        ))
    })?;
    Ok(ode.options(OdeOptions {
        method: RK4,
        steps: Steps::Size(1.0 / steps as f64),
        leaf_precision: cost_precision(precision),
        gradient: way.gradient(),
        output: Output::All,
        ..Default::default()
    }))
}

/// The mean of ∫ |x − γ|² ds over [0, 1].
fn loss(ode: &Costly, start: &(Tensor, Tensor)) -> Result<Tensor> {
    let (_, costs) = ode.solve(start, &[0.0, 1.0])?;
    Ok(costs.get(1)?.mean_all()?)
}

/// The relative error of the gradient of all weights, in the Euclidean norm, against ten times as many steps in f64.
fn error_of_gradient(
    ode: &Costly,
    start: &(Tensor, Tensor),
    vars: &VarMap,
    device: &Device,
) -> Result<f64> {
    let all = |ode: &Costly| -> Result<Vec<f64>> {
        let grads = loss(ode, start)?.to_dtype(DType::F64)?.backward()?;
        let mut flat = vec![];
        for var in vars.all_vars() {
            flat.extend(values(grads.get(&var).ok_or("a weight has no gradient")?)?);
        }
        Ok(flat)
    };
    let exact = model(Precision::f64(), (Way::Discrete, 10 * STEPS), vars, device)?;
    Ok(relative(&all(ode)?, &all(&exact)?))
}

fn train((dtype, way): (Dtype, Way), (fit, seed): (&Fit, u64), device: &Device) -> Result<Outcome> {
    let vars = VarMap::new();
    let ode = model(dtype.precision(), (way, STEPS), &vars, device)?;
    let mut rng = generator(seed);
    initial::layers(&vars, &mut rng)?;
    let noise = (normal(&mut rng, (STARTS, 2), DType::F32, device)? * SPREAD)?;
    let x0 = noise.broadcast_add(&Tensor::new(&[[1f32, 0.0]], device)?)?;
    let none = Tensor::zeros((STARTS, 1), DType::F32, device)?;
    let start = (x0, none);
    let error = error_of_gradient(&ode, &start, &vars, device)?;
    let bar = progress(way.name(), fit.iterations)?;
    let clock = Instant::now();
    let losses = fit.run(&vars, &bar, |_| loss(&ode, &start))?;
    let milliseconds = 1e3 * clock.elapsed().as_secs_f64() / fit.iterations as f64;
    bar.finish_and_clear();
    let times: Vec<f64> = (0..=100).map(|i| LONG * f64::from(i) / 100.0).collect();
    let (states, costs) = ode.predict(&start, &times)?;
    let within = costs.get(20)?.mean_all()?.to_scalar::<f32>()?;
    let radii = values(&states.get(100)?.sqr()?.sum(1)?.sqrt()?)?;
    let squares: Vec<f64> = radii.iter().map(|r| (r - 1.0).powi(2)).collect();
    Ok(Outcome {
        dtype,
        way,
        error,
        milliseconds,
        losses,
        track: f64::from(within).sqrt(),
        radius: common::mean(&squares).sqrt(),
        states,
        ode,
    })
}

fn main() -> ExitCode {
    let args = Args::parse();
    report::run("integral_loss", &args.flags, |device, report| {
        run(&args, device, report)
    })
}

fn run(args: &Args, device: &Device, report: &mut Report) -> Result<()> {
    let fit = FIT.iterations(args.flags.size().pick(5, FIT.iterations, 5000));
    let mut all = vec![];
    for dtype in args.flags.precisions(&[Dtype::F32, Dtype::Bf16])? {
        for way in Way::ALL {
            if way == Way::Discrete || dtype == Dtype::F32 {
                all.push(train((dtype, way), (&fit, args.flags.seed), device)?);
            }
        }
    }
    let mut table = Table::new([
        "precision",
        "gradient",
        "error of the first gradient",
        "ms/update",
        "loss, first",
        "last",
        "distance from the track up to s = 1",
        "distance of |x| from 1 at s = 5",
    ]);
    for o in &all {
        let name = format!("{}, {}", o.dtype.name(), o.way.name());
        table.row([
            o.dtype.name().to_owned(),
            o.way.name().to_owned(),
            sci(o.error),
            format!("{:.1}", o.milliseconds),
            sci(o.losses[0]),
            sci(o.losses[o.losses.len() - 1]),
            format!("{:.3}", o.track),
            format!("{:.3}", o.radius),
        ]);
        report.demand(o.track <= TRACK, || {
            format!("{name}: {:.3} from the track", o.track)
        });
        report.demand(o.radius <= RADIUS, || {
            format!("{name}: |x| is {:.3} from 1 at s = {LONG}", o.radius)
        });
    }
    print!("{table}");
    picture(&report.picture(""), (1260, 430), |area| {
        draw(&all[0], device, area)
    })?;
    let json = |o: &Outcome| {
        json!({
            "precision": o.dtype.name(),
            "gradient": o.way.name(),
            "error_of_the_first_gradient": o.error,
            "milliseconds": o.milliseconds,
            "loss_first": o.losses[0],
            "loss_last": o.losses[o.losses.len() - 1],
            "from_track": o.track,
            "radius_error_at_the_end": o.radius,
        })
    };
    report.figure("runs", all.iter().map(json).collect::<Vec<_>>())
}

/// Solutions over depth, in the plane with the learnt field, and the loss.
fn draw(o: &Outcome, device: &Device, area: &common::chart::Area<'_>) -> Result<()> {
    let parts = area.split_evenly((1, 3));
    let (all, count) = (values(&o.states)?, o.states.dim(0)?);
    let at = |i: usize, row: usize, c: usize| all[(i * STARTS + row) * 2 + c];
    let time = |i: usize| LONG * i as f64 / (count - 1) as f64;
    let mut over_time = vec![];
    let mut plane = vec![];
    for row in (0..STARTS).step_by(10) {
        for c in 0..2 {
            over_time.push(Curve::new(
                "",
                colour(c),
                (0..count).map(|i| (time(i), at(i, row, c))),
            ));
        }
        plane.push(Curve::new(
            "",
            colour(0),
            (0..count).map(|i| (at(i, row, 0), at(i, row, 1))),
        ));
    }
    let circle = (0..=100).map(|i| {
        let angle = std::f64::consts::TAU * f64::from(i) / 100.0;
        (angle.cos(), angle.sin())
    });
    plane.push(Curve::new("γ", TRUTH, circle.collect::<Vec<_>>()).width(3));
    Panel {
        curves: over_time,
        ..Panel::new("solutions; the loss ends at s = 1", "s", "x")
    }
    .draw(&parts[0])?;
    let window = Window::square(1.6);
    let field = |x: &Tensor| -> Result<Tensor> {
        // One short step is x + h f(x).
        let none = Tensor::zeros((x.dim(0)?, 1), DType::F32, device)?;
        let (xs, _) = o.ode.predict(&(x.clone(), none), &[0.0, 1e-3])?;
        Ok(((xs.get(1)? - x)? * 1e3)?)
    };
    let arrows = window.arrows(16, (DType::F32, device), field, TRUTH)?;
    Panel {
        curves: plane,
        arrows: vec![arrows],
        ranges: window.ranges(),
        ..Panel::new("the learnt field", "x₁", "x₂")
    }
    .draw(&parts[1])?;
    let losses = o.losses.iter().enumerate().map(|(i, l)| (i as f64, *l));
    Panel {
        curves: vec![Curve::new("", colour(0), losses)],
        scales: [common::chart::Scale::Linear, common::chart::Scale::Decades],
        ..Panel::new("∫ |x − γ|² ds", "iteration", "loss")
    }
    .draw(&parts[2])
}
