//! The task, and the network that is its vector field.

use candle_core::{DType, Device, Result, Tensor, D};
use candle_diffeq::options::{Output, Steps};
use candle_diffeq::tableau::RK4;
use candle_diffeq::{NeuralOde, OdeOptions, Precision};
use candle_nn::{linear, Module, VarBuilder, VarMap};
use rand::rngs::StdRng;

use common::{initial, values};

const HIDDEN: usize = 64;
const EPSILON: f64 = 1e-8;
/// The origin, and a little off it: there the norm divides by √ε, and errors grow by 10⁴ in every
/// step, so that the gradient overflows.  The notebook adds noise of this size in each step.
pub(crate) const START: [f64; 2] = [1e-4, -1e-4];
pub(crate) const TARGET: [f64; 2] = [1.0, 1.0];
pub(crate) const STEPS: usize = 100;
/// What leads away from the start goes so far.
const AWAY: f64 = 0.1;

/// f(y) = W₂ tanh(norm(W₁ y + b₁)) + b₂.
pub(crate) fn network(vb: VarBuilder<'_>) -> Result<impl Module + Send + Sync> {
    let (l1, l2) = (
        linear(2, HIDDEN, vb.pp("l1"))?,
        linear(HIDDEN, 2, vb.pp("l2"))?,
    );
    Ok(candle_nn::func(move |y| {
        l2.forward(&normalised(&l1.forward(y)?)?.tanh()?)
    }))
}

/// (z − mean) / √(variance + ε) over the features.  In low precision ε is nothing: f32 at least.
fn normalised(z: &Tensor) -> Result<Tensor> {
    let inner = match z.dtype() {
        DType::F64 => DType::F64,
        _ => DType::F32,
    };
    let x = z.to_dtype(inner)?;
    let centred = x.broadcast_sub(&x.mean_keepdim(D::Minus1)?)?;
    let variance = centred.sqr()?.mean_keepdim(D::Minus1)?;
    let normal = centred.broadcast_div(&(variance + EPSILON)?.sqrt()?)?;
    normal.to_dtype(z.dtype())
}

/// The neural ODE, in `STEPS` steps of RK4 from time to time.
pub(crate) fn ode(vars: &VarMap, precision: Precision, device: &Device) -> Result<NeuralOde> {
    let build = |vb: VarBuilder<'_>| network(vb).map(candle_diffeq::fields::autonomous);
    let ode = NeuralOde::from_field(vars, "ode", precision.state, device, build)?;
    Ok(ode.options(OdeOptions {
        method: RK4,
        precision: Some(precision),
        steps: Steps::PerInterval(STEPS),
        output: Output::Final,
        ..Default::default()
    }))
}

/// Draws weights whose field leads away from the start.  One that leads back into it, one draw in
/// seven, keeps the state where the norm is singular, and its first gradient may be 10³³.
pub(crate) fn draw(vars: &VarMap, ode: &NeuralOde, rng: &mut StdRng) -> common::Result<()> {
    const TRIES: usize = 100;
    for _ in 0..TRIES {
        initial::normal(vars, rng, initial::xavier)?;
        let all = vars.all_vars();
        let Some(var) = all.first() else { break };
        let start = point(START, var.dtype(), var.device())?;
        let path = (ode.solve(&start, &[0.0, 1.0])? - start)?;
        if values(&path)?.iter().any(|x| x.abs() > AWAY) {
            return Ok(());
        }
    }
    Err(format!("no field of {TRIES} leads away from the start").into())
}

/// One point as a batch.
pub(crate) fn point(at: [f64; 2], dtype: DType, device: &Device) -> Result<Tensor> {
    Tensor::new(&[at], device)?.to_dtype(dtype)
}

/// ½ ‖y − target‖².
pub(crate) fn loss(y: &Tensor) -> Result<Tensor> {
    let target = point(TARGET, y.dtype(), y.device())?;
    (y - target)?.sqr()?.sum_all()? * 0.5
}
