//! A controller of a pendulum, trained through three solvers of different cost.
//!
//! q' = v, v' = −g sin q − b v + u, u a perceptron of (q, v) between −U and U; the cost is the mean of |(q, v)| over [0, 2].

use std::time::Instant;

use candle_core::{DType, Device, Module, Result as CandleResult, Tensor, D};
use candle_diffeq::models::hypersolver::Hypersolver;
use candle_diffeq::nn::{Activation, Linear, Perceptron};
use candle_diffeq::options::Steps;
use candle_diffeq::tableau::{Tableau, EULER, RK4};
use candle_diffeq::{predict, NeuralOde, OdeOptions, Time, VectorField};
use candle_nn::{VarBuilder, VarMap};
use rand::rngs::StdRng;
use rand::Rng;
use serde_json::json;

use common::chart::{colour, Area, Curve, Panel};
use common::dtype::Dtype;
use common::fit::Fit;
use common::flags::Flags;
use common::random::generator;
use common::report::Report;
use common::table::{sci, Table};
use common::{initial, mean, progress, Result};

const GRAVITY: f64 = 9.81;
const FRICTION: f64 = 0.1;
/// The largest torque.
const TORQUE: f64 = 20.0;
const END: f64 = 2.0;
const STEP: f64 = 0.1;
const CONTROL: Fit = Fit::new(200, 1e-2).falling_to(0.1);
const CORRECTION: Fit = Fit::new(2000, 3e-3).falling_to(0.02);
const BATCH: usize = 128;

/// The pendulum under a torque `(rows, 1)`.
fn pendulum(x: &Tensor, u: &Tensor) -> CandleResult<Tensor> {
    let (q, v) = (x.narrow(1, 0, 1)?, x.narrow(1, 1, 1)?);
    let own = ((q.sin()? * -GRAVITY)? - (&v * FRICTION)?)?;
    Tensor::cat(&[v, (own + u)?], 1)
}

fn controller(vb: VarBuilder<'_>) -> CandleResult<Perceptron> {
    Perceptron::new(&[2, 32, 1], Activation::Tanh, vb)
}

/// u between −U and U, without a corner.
fn torque(net: &Perceptron, x: &Tensor) -> CandleResult<Tensor> {
    net.forward(x)?.tanh()? * TORQUE
}

fn points(n: usize, side: f64, rng: &mut StdRng, device: &Device) -> Result<Tensor> {
    let x: Vec<f32> = (0..2 * n)
        .map(|_| rng.random_range(-side..side) as f32)
        .collect();
    Ok(Tensor::from_vec(x, (n, 2), device)?)
}

/// The network of the correction, which learns the residual of one step of Euler's method under constant torques.
struct Correction {
    layers: Perceptron,
}

/// Numbers of about one: of q enter sine and cosine.
fn features(x: &Tensor, k: &Tensor) -> CandleResult<Tensor> {
    let q = x.narrow(1, 0, 1)?;
    let rest = (Tensor::cat(&[&x.narrow(1, 1, 1)?, &k.narrow(1, 1, 1)?], 1)? * 0.1)?;
    Tensor::cat(&[q.sin()?, q.cos()?, rest], 1)
}

impl Correction {
    fn learnt((fit, seed): (&Fit, u64), device: &Device) -> Result<(Self, f64)> {
        let vars = VarMap::new();
        let vb = VarBuilder::from_varmap(&vars, DType::F32, device);
        let layers = Perceptron::new(&[4, 32, 32, 2], Activation::Tanh, vb)?;
        let mut rng = generator(seed);
        initial::layers(&vars, &mut rng)?;
        let fine = OdeOptions {
            steps: Steps::PerInterval(8),
            ..Default::default()
        };
        let bar = progress("correction", fit.iterations)?;
        let losses = fit.run(&vars, &bar, |_| {
            let x = points(BATCH, 1.5 * std::f64::consts::PI, &mut rng, device)?;
            let u: Vec<f32> = (0..BATCH)
                .map(|_| rng.random_range(-TORQUE..TORQUE) as f32)
                .collect();
            let u = Tensor::from_vec(u, (BATCH, 1), device)?;
            let k = pendulum(&x, &u)?;
            let field = |_: &Time, x: &Tensor| pendulum(x, &u);
            let exact = predict(&field, &x, &[0.0, STEP], &fine)?.get(1)?;
            let residual = ((exact - &x)? - (&k * STEP)?)?;
            let residual = (residual / (STEP * STEP))?;
            let learnt = (layers.forward(&features(&x, &k)?)? * 10.0)?;
            Ok(((learnt - &residual)?.sqr()?.mean_all()? / residual.sqr()?.mean_all()?)?)
        })?;
        bar.finish_and_clear();
        let last = mean(&losses[losses.len().saturating_sub(50)..]);
        // The correction stands still while the controller learns.
        let plain = |i: usize| -> Result<Linear> {
            let data = vars.data().lock().map_err(|_| "the variables are locked")?;
            let get = |part: &str| {
                data.get(&format!("{i}.{part}"))
                    .map(|v| v.as_tensor().detach())
            };
            let weight = get("weight").ok_or("no weight")?;
            Ok(Linear::from(candle_nn::Linear::new(weight, get("bias"))))
        };
        let layers =
            Perceptron::from_layers(vec![plain(0)?, plain(1)?, plain(2)?], Activation::Tanh)?;
        Ok((Self { layers }, last))
    }
}

#[derive(Clone, Copy, PartialEq)]
enum Kind {
    Euler,
    Hyper,
    Rk4,
}

impl Kind {
    fn name(self) -> &'static str {
        match self {
            Self::Euler => "Euler",
            Self::Hyper => "hyper Euler",
            Self::Rk4 => "RK4",
        }
    }
}

/// A controller that was trained through a solver.
pub(crate) struct Trained {
    kind: Kind,
    dtype: Dtype,
    losses: Vec<f64>,
    /// The cost of test starts, by that solver and exactly.
    believed: f64,
    exact: f64,
    milliseconds: f64,
}

fn model<F: VectorField + 'static>(
    vars: &VarMap,
    (method, dtype): (Tableau, Dtype),
    device: &Device,
    field: impl Fn(Perceptron) -> F + Send + Sync + 'static,
) -> Result<NeuralOde> {
    let ode = NeuralOde::from_field(vars, "u", DType::F32, device, move |vb| {
        Ok(field(controller(vb)?))
    })?;
    Ok(ode.options(OdeOptions {
        method,
        precision: Some(dtype.precision()),
        ..Default::default()
    }))
}

fn closed(net: &Perceptron, x: &Tensor) -> CandleResult<Tensor> {
    pendulum(x, &torque(net, x)?)
}

fn train(
    (kind, dtype): (Kind, Dtype),
    layers: &Perceptron,
    (fit, seed): (&Fit, u64),
    device: &Device,
) -> Result<Trained> {
    let vars = VarMap::new();
    let plain = |net: Perceptron| move |_: &Time, x: &Tensor| closed(&net, x);
    let ode = match kind {
        Kind::Euler => model(&vars, (EULER, dtype), device, plain)?,
        Kind::Rk4 => model(&vars, (RK4, dtype), device, plain)?,
        Kind::Hyper => {
            let layers = layers.clone();
            model(&vars, (EULER, dtype), device, move |net: Perceptron| {
                let layers = layers.clone();
                let field = move |_: &Time, x: &Tensor| closed(&net, x);
                let correction = move |_: &Time, x: &Tensor, k: &Tensor| {
                    layers.forward(&features(x, k)?)? * 10.0
                };
                Hypersolver::new(field, EULER, correction)
            })?
        }
    };
    let mut rng = generator(seed);
    initial::layers(&vars, &mut rng)?;
    let times: Vec<f64> = (0..=(END / STEP).round() as usize)
        .map(|i| i as f64 * STEP)
        .collect();
    let cost = |xs: &Tensor| -> CandleResult<Tensor> {
        (xs.sqr()?.sum(D::Minus1)? + 1e-6)?.sqrt()?.mean_all()
    };
    let pi = std::f64::consts::PI;
    let test = points(512, pi, &mut rng, device)?;
    let bar = progress(kind.name(), fit.iterations)?;
    let clock = Instant::now();
    let losses = fit.run(&vars, &bar, |_| {
        let x0 = points(BATCH, pi, &mut rng, device)?;
        Ok(cost(&ode.solve(&x0, &times)?)?)
    })?;
    let milliseconds = 1e3 * clock.elapsed().as_secs_f64() / fit.iterations as f64;
    bar.finish_and_clear();
    let believed = f64::from(cost(&ode.predict(&test, &times)?)?.to_scalar::<f32>()?);
    let exact = model(&vars, (RK4, Dtype::F32), device, plain)?.options(OdeOptions {
        steps: Steps::PerInterval(10),
        ..Default::default()
    });
    let exact = f64::from(cost(&exact.predict(&test, &times)?)?.to_scalar::<f32>()?);
    Ok(Trained {
        kind,
        dtype,
        losses,
        believed,
        exact,
        milliseconds,
    })
}

pub(crate) fn run(flags: &Flags, device: &Device, report: &mut Report) -> Result<Vec<Trained>> {
    let size = flags.size();
    let fit = CORRECTION.iterations(size.pick(20, CORRECTION.iterations, 10_000));
    let (correction, left) = Correction::learnt((&fit, flags.seed), device)?;
    println!(
        "the correction leaves {} of the squared residual",
        sci(left)
    );
    let fit = CONTROL.iterations(size.pick(3, CONTROL.iterations, 500));
    let mut all = vec![];
    let dtypes = flags.precisions(&[Dtype::F32])?;
    for &dtype in &dtypes {
        for kind in [Kind::Euler, Kind::Hyper, Kind::Rk4] {
            let fit = (&fit, flags.seed);
            all.push(train((kind, dtype), &correction.layers, fit, device)?);
        }
    }
    let mut table = Table::new([
        "trained through",
        "precision",
        "cost, first",
        "by this solver",
        "exactly",
        "ms/update",
    ]);
    for o in &all {
        table.row([
            o.kind.name().to_owned(),
            o.dtype.name().to_owned(),
            format!("{:.3}", o.losses[0]),
            format!("{:.3}", o.believed),
            format!("{:.3}", o.exact),
            format!("{:.1}", o.milliseconds),
        ]);
    }
    print!("{table}");
    for dtype in dtypes {
        let off = |kind: Kind| {
            let own = all.iter().find(|o| o.kind == kind && o.dtype == dtype);
            own.map_or(f64::NAN, |o| (o.believed - o.exact).abs())
        };
        let (hyper, euler) = (off(Kind::Hyper), off(Kind::Euler));
        report.demand(hyper < euler, || {
            let dtype = dtype.name();
            format!("{dtype}: the hypersolver's cost is {hyper:.3} from the exact one, Euler's {euler:.3}")
        });
    }
    let json = |o: &Trained| {
        json!({
            "solver": o.kind.name(),
            "precision": o.dtype.name(),
            "cost_by_it": o.believed,
            "cost": o.exact,
            "milliseconds": o.milliseconds,
        })
    };
    report.figure("solvers", all.iter().map(json).collect::<Vec<_>>())?;
    Ok(all)
}

/// The losses.
pub(crate) fn draw(all: &[Trained], part: &Area<'_>) -> Result<()> {
    let curve = |(i, o): (usize, &Trained)| {
        let at = o.losses.iter().enumerate().map(|(k, l)| (k as f64, *l));
        let name = match o.dtype {
            Dtype::F32 => o.kind.name().to_owned(),
            other => format!("{}, {}", o.kind.name(), other.name()),
        };
        Curve::new(name, colour(i), at)
    };
    Panel {
        curves: all.iter().enumerate().map(curve).collect(),
        ..Panel::new("cost of a pendulum, by the solver", "update", "mean |x|")
    }
    .draw(part)
}
