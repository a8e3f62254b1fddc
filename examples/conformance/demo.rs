//! Adjoints that underflow in f16, with and without the adjoint scaler.

use candle_core::{DType, Tensor, Var};
use candle_diffeq::metrics::{Recorder, Stats};
use candle_diffeq::scaling::Scaling;
use candle_diffeq::tableau::RK4;
use candle_diffeq::{OdeOptions, Precision};

use crate::discrete::{model, named};
use crate::fields::{single, Affine, Field, Weights};
use crate::oracle::{Named, Oracle, Result};
use crate::outcome::{error, parts, worse};

/// What is asked of a file.
pub(crate) struct Bar {
    /// Start of the problem's name.
    problem: &'static str,
    /// Largest relative error of a gradient with scaling.
    pub(crate) scaled: f64,
    /// Whether a gradient is to be lost without.
    pub(crate) underflows: bool,
}

/// The first that matches a problem counts.
const BARS: [Bar; 5] = [
    Bar {
        problem: "contracting_lam32",
        scaled: 5e-3,
        underflows: true,
    },
    Bar {
        problem: "mlp_cotangent_2e-24",
        scaled: 1e-2,
        underflows: true,
    },
    Bar {
        problem: "mlp_cotangent_2e-40",
        scaled: 1e-2,
        underflows: true,
    },
    Bar {
        problem: "polynomial_damped",
        scaled: 1e-2,
        underflows: true,
    },
    // The others are reported only: where f16 is rounded f32, a gradient of θ does not underflow.
    Bar {
        problem: "",
        scaled: 1e-2,
        underflows: false,
    },
];

/// A gradient with a larger relative error is lost.
pub(crate) const LOST: f64 = 0.5;

/// One backward pass: relative errors of the gradients, and what it took.
pub(crate) struct Run {
    pub(crate) y0: f64,
    pub(crate) weights: f64,
    pub(crate) vjps_per_stage: f64,
    pub(crate) stats: Stats,
}

impl Run {
    /// The larger error.
    pub(crate) fn worst(&self) -> f64 {
        worse(self.y0, self.weights)
    }
}

/// The bar of a file.
pub(crate) fn bar(oracle: &Oracle) -> &'static Bar {
    let problem = oracle.problem().unwrap_or_default();
    let bar = BARS.iter().find(|bar| problem.starts_with(bar.problem));
    bar.unwrap_or(&BARS[BARS.len() - 1])
}

/// Solves with rk4 in f16 and pulls the cotangent of the file back.
pub(crate) fn run(oracle: &Oracle, scaling: Scaling) -> Result<Run> {
    let recorder = Recorder::default();
    let options = OdeOptions {
        method: RK4,
        precision: Some(Precision::f16()),
        scaling,
        recorder: Some(recorder.clone()),
        ..Default::default()
    };
    let (ode, vars) = model(oracle, DType::F32, problem(oracle)?)?;
    let state = |name: &str| -> Result<Vec<Tensor>> {
        Ok(vec![oracle.tensor(name)?.to_dtype(DType::F32)?])
    };
    let times = oracle.tensor("t")?.to_vec1::<f64>()?;
    let solution = ode.options(options).solution(&state("y0")?, &times)?;
    let grads = solution.vjp(&state("cotangent")?)?;

    let grad = |(name, var): (String, Var)| match grads.params.get(&var) {
        Some(grad) => Ok((name, grad.clone())),
        None => Ok((name, var.zeros_like()?)),
    };
    let weights = named(&vars)
        .into_iter()
        .map(grad)
        .collect::<Result<Named>>()?;
    let y0 = parts(grads.y0.into_iter().map(|y| ("y0".to_owned(), y)).collect())?;
    let stats = recorder.take();
    Ok(Run {
        y0: error(&y0, &parts(oracle.parts("grad.y0")?)?),
        weights: error(&parts(weights)?, &parts(oracle.under("grad.w."))?),
        vjps_per_stage: stats.vjps as f64 / (stats.steps * RK4.stages()) as f64,
        stats,
    })
}

type Build = Box<dyn Fn(&Weights<'_>) -> candle_core::Result<Field> + Send + Sync>;

fn problem(oracle: &Oracle) -> Result<Build> {
    let name = oracle.problem().unwrap_or_default();
    let unknown = || oracle.failed(format_args!("unknown problem `{name}`"));
    if name.starts_with("mlp_cotangent") {
        return Ok(Box::new(mlp));
    }
    if name.starts_with("polynomial_damped") {
        return Ok(Box::new(polynomial));
    }
    let rate = name
        .strip_prefix("contracting_lam")
        .and_then(|rest| rest.split('_').next());
    let rate: f64 = rate
        .and_then(|rate| rate.parse().ok())
        .ok_or_else(unknown)?;
    Ok(Box::new(move |weights| contracting(weights, rate)))
}

/// f = l3(tanh(l2(tanh(l1(y))))).
fn mlp(weights: &Weights<'_>) -> candle_core::Result<Field> {
    let (l1, l2) = (Affine::new(weights, "l1")?, Affine::new(weights, "l2")?);
    let l3 = Affine::new(weights, "l3")?;
    Ok(single(move |_, y| {
        let hidden = l2.forward(&l1.forward(y)?.tanh()?)?.tanh()?;
        l3.forward(&hidden)
    }))
}

/// f = −λy + l2(tanh(l1(y))).
fn contracting(weights: &Weights<'_>, rate: f64) -> candle_core::Result<Field> {
    let (l1, l2) = (Affine::new(weights, "l1")?, Affine::new(weights, "l2")?);
    Ok(single(move |_, y| {
        l2.forward(&l1.forward(y)?.tanh()?)? - (y * rate)?
    }))
}

/// f = −(at² + bt + c) y, the coefficient formed in state precision and rounded once.
fn polynomial(weights: &Weights<'_>) -> candle_core::Result<Field> {
    let get = |name| weights.get(name);
    let (a, b, c) = (get("a")?, get("b")?, get("c")?);
    Ok(single(move |t, y| {
        let t = t.tensor()?;
        let wide = |x: &Tensor| x.to_dtype(t.dtype());
        let slope = (wide(&a)?.broadcast_mul(&t)? + wide(&b)?)?;
        let rate = (slope.broadcast_mul(&t)? + wide(&c)?)?;
        y.broadcast_mul(&rate.to_dtype(y.dtype())?.neg()?)
    }))
}
