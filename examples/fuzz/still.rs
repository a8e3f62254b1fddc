//! Rows that stand still at a point from which everything else runs away, over times in which it leaves
//! every range: what is beside the rows in a tile must not show.
//!
//! f(y) = g σ(y − p) with σ(0) = 0, in numbers without rounding: f(p) = 0 to the bit.  A cotangent is
//! multiplied by R(hgσ'(0)) in every step.

use candle_core::{DType, Device, Tensor, Var};
use candle_diffeq::nn::{Activation, Cnf, ConvField, Mlp};
use candle_diffeq::options::{Checkpoint, Steps};
use candle_diffeq::tableau::EULER;
use candle_diffeq::{odeint, OdeOptions, Result};
use candle_nn::{Conv2d, Conv2dConfig, Linear};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use crate::check::{caught, Failure, Kind};

#[derive(Clone, Copy, Debug)]
enum Which {
    Linear,
    Mlp,
    Cnf,
    Conv,
}

#[derive(Clone, Debug)]
struct Still {
    which: Which,
    rows: usize,
    features: usize,
    activation: Activation,
    fusion: bool,
    steps: usize,
    checkpoint: Checkpoint,
    /// Where the rows stand.
    point: f64,
}

/// The case of a seed.
pub(crate) fn run(seed: u64) -> std::result::Result<(), Failure> {
    let rng = &mut StdRng::seed_from_u64(seed);
    let still = Still {
        which: [Which::Linear, Which::Mlp, Which::Cnf, Which::Conv][rng.random_range(0..4)],
        rows: rng.random_range(1..=70),
        features: rng.random_range(1..=20),
        activation: [Activation::Silu, Activation::Gelu][rng.random_range(0..2)],
        fusion: rng.random_range(0..4) > 0,
        steps: rng.random_range(50..300),
        checkpoint: [Checkpoint::All, Checkpoint::Every(7), Checkpoint::States(9)]
            [rng.random_range(0..3)],
        point: [-0.5, 1.0, 2.0][rng.random_range(0..3)],
    };
    let text = match caught(|| held(&still)) {
        Ok(Ok(None)) => return Ok(()),
        Ok(Ok(Some(wrong))) => wrong,
        Ok(Err(error)) => format!("error: {error}"),
        Err(panic) => panic.text,
    };
    Err(Failure {
        kind: Kind::Still,
        text: format!("{text}, of rows that stand still: {still:?}"),
    })
}

/// The same number n times on a diagonal.
fn diagonal(x: f64, n: usize) -> candle_core::Result<Tensor> {
    Tensor::eye(n, DType::F32, &Device::Cpu)? * x
}

fn full(x: f64, shape: &[usize]) -> candle_core::Result<Tensor> {
    Tensor::full(x as f32, shape, &Device::Cpu)
}

/// What is wrong.
fn held(still: &Still) -> Result<Option<String>> {
    let Still { rows, features, .. } = *still;
    // A step of Euler's method multiplies a perturbation by two or more, e^88 is all that f32 holds: it is
    // reached within 130 steps.  The cotangent is as small as it becomes large.
    let options = OdeOptions {
        method: EULER,
        steps: Steps::PerInterval(still.steps),
        fusion: still.fusion,
        checkpoint: still.checkpoint,
        ..Default::default()
    };
    let linear = matches!(still.which, Which::Linear | Which::Conv);
    let gain = if linear { 1.0 } else { 2.0 };
    let layer = |weight: f64, bias: f64| {
        let (weight, bias) = (diagonal(weight, features)?, full(bias, &[features])?);
        Ok::<_, candle_core::Error>(Linear::new(weight, Some(bias)))
    };
    let hidden = || [layer(1.0, -still.point), layer(gain, 0.0)];
    let mlp = || {
        let layers = match linear {
            true => vec![layer(gain, -gain * still.point)?],
            false => hidden().into_iter().collect::<candle_core::Result<_>>()?,
        };
        Mlp::from_layers(&layers, still.activation, false)
    };
    let shape: &[usize] = match still.which {
        Which::Conv => &[rows, features, 2, 3],
        _ => &[rows, features],
    };
    let y0 = Var::from_tensor(&full(still.point, shape)?)?;
    // h g σ'(0) = 1.
    let times = [0.0, still.steps as f64];
    let z = match still.which {
        Which::Linear | Which::Mlp => odeint(mlp()?, y0.as_tensor(), &times, &options)?,
        Which::Cnf => {
            let l0 = full(0.0, &[rows, 1])?;
            let state = (y0.as_tensor().clone(), l0);
            let (z, l) = odeint(Cnf::new(mlp()?)?, &state, &times, &options)?;
            // l' = −features, to a few roundoffs in every step.
            let exact = -((features * still.steps) as f64);
            let near = |l: &f32| ((f64::from(*l) - exact) / exact).abs() <= 1e-4;
            if !l.get(1)?.flatten_all()?.to_vec1::<f32>()?.iter().all(near) {
                return Ok(Some(format!("the log-density is not {exact}")));
            }
            z
        }
        Which::Conv => {
            let filters = diagonal(gain, features)?.reshape((features, features, 1, 1))?;
            let bias = full(-gain * still.point, &[features])?;
            let layer = Conv2d::new(filters, Some(bias), Conv2dConfig::default());
            let field = ConvField::from_layers(&[layer], still.activation)?;
            odeint(field, y0.as_tensor(), &times, &options)?
        }
    };
    let numbers = z.flatten_all()?.to_vec1::<f32>()?;
    if let Some(y) = numbers.iter().find(|y| f64::from(**y) != still.point) {
        return Ok(Some(format!("a row at {} moved to {y}", still.point)));
    }
    // Every step doubles the cotangent, exactly.
    let v = 2f64.powi(-(still.steps.min(100) as i32));
    if still.steps > 200 {
        return Ok(None);
    }
    let grads = (z.get(1)?.sum_all()? * v)?.backward()?;
    let exact = v * 2f64.powi(still.steps as i32);
    let Some(gradient) = grads.get(&y0) else {
        return Ok(Some("no gradient".to_owned()));
    };
    let gradient = gradient.flatten_all()?.to_vec1::<f32>()?;
    let near = |g: &&f32| ((f64::from(**g) - exact) / exact).abs() <= 1e-5;
    match gradient.iter().find(|g| !near(g)) {
        Some(g) => Ok(Some(format!("a gradient is {g:e} instead of {exact:e}"))),
        None => Ok(None),
    }
}
