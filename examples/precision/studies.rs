//! Studies of rounding: how far a solve in low precision is from the same scheme in f64, as the
//! number of steps grows.  Shared by the example `precision`, which prints them, and the test of
//! that name, which holds them to their bounds.

use candle_core::{DType, Device, Result, Tensor, Var};
use candle_diffeq::metrics::Stats;
use candle_diffeq::options::Steps;
use candle_diffeq::tableau::{Tableau, EULER, RK4};
use candle_diffeq::{NeuralOde, OdeOptions, Precision, Time};
use candle_nn::VarMap;

use common::model_equation;
use common::problem::{self, Errors, Problem};

fn options(method: Tableau, precision: Precision) -> OdeOptions {
    OdeOptions {
        method,
        precision: Some(precision),
        ..Default::default()
    }
}

/// Errors against the same scheme in f64, and the counts.
fn errors(
    problem: &Problem,
    method: &Tableau,
    precision: Precision,
    steps: usize,
) -> candle_diffeq::Result<(Errors, Stats)> {
    let run = |precision| problem.solve(options(method.clone(), precision), steps);
    let low = run(precision)?;
    Ok((low.errors(&run(Precision::f64())?), low.stats))
}

/// rampde's model equation, by RK4.
pub(crate) fn model_equation(precision: Precision, steps: usize) -> candle_diffeq::Result<Errors> {
    let problem = model_equation::model_equation(model_equation::Y0)?;
    Ok(errors(&problem, &RK4, precision, steps)?.0)
}

/// y' = −(a t² + b t + c) y with a = 8, b = −10, c = 2⁻¹⁶, y0 = 65504/180, T = 2.65, 399 steps of
/// RK4, L = y(T)²/2: the adjoint starts at 1e-4 and f16 underflows unless it is scaled.  Relative
/// errors of ∂L/∂y0, ∂a, ∂b, ∂c against the closed form.
pub(crate) fn polynomial(precision: Precision) -> candle_diffeq::Result<[f64; 4]> {
    let device = Device::Cpu;
    let vars = VarMap::new();
    let ode = NeuralOde::from_field(&vars, "", DType::F32, &device, |vb| {
        let [a, b, c] = [vb.get((), "a")?, vb.get((), "b")?, vb.get((), "c")?];
        Ok(move |t: &Time, y: &Tensor| {
            let t = t.tensor()?;
            let [a, b, c] = [&a, &b, &c].map(|p| p.to_dtype(t.dtype()));
            // Formed in state precision, cast once.
            let rate = (((a? * t.sqr()?)? + (b? * &t)?)? + c?)?.neg()?;
            y.broadcast_mul(&rate.to_dtype(y.dtype())?)
        })
    })?;
    let (a, b, c, end) = (8f64, -10f64, 2f64.powi(-16), 2.65f64);
    for (name, value) in [("a", a), ("b", b), ("c", c)] {
        vars.clone()
            .set_one(name, Tensor::new(value as f32, &device)?)?;
    }
    let start = (65504.0f64 / 180.0) as f32;
    let y0 = Var::new(&[start], &device)?;
    let loss = |y: &Tensor| y.sqr()?.sum_all()? * 0.5;
    let given = (&vars, y0.as_tensor(), &y0);
    let options = OdeOptions {
        steps: Steps::PerInterval(399),
        ..options(RK4, precision)
    };
    let got = problem::solve(ode, given, &[0.0, end], options, (Tensor::clone, loss))?;
    let growth = (-a * end.powi(3) / 3.0 - b * end.powi(2) / 2.0 - c * end).exp();
    let y = f64::from(start) * growth;
    let exact = [
        y * growth,
        -y * y * end.powi(3) / 3.0,
        -y * y * end.powi(2) / 2.0,
        -y * y * end,
    ];
    let got = [got.y0[0], got.theta[0], got.theta[1], got.theta[2]];
    Ok(std::array::from_fn(|i| {
        ((got[i] - exact[i]) / exact[i]).abs()
    }))
}

/// An MLP 2-64-64-2 with tanh, batch 64, on [0, 1], L = |y(1)|²/2; weights and y0 exact in bf16.
fn mlp() -> Result<Problem> {
    let mut lcg = Lcg(7);
    let mut exact = |shape: &[usize], scale: f64| {
        let wide = (lcg.tensor(shape)? * scale)?;
        wide.to_dtype(DType::BF16)?.to_dtype(DType::F64)
    };
    let weights = vec![
        exact(&[64, 2], 0.7)?,
        exact(&[64], 0.7)?,
        exact(&[64, 64], 0.125)?,
        exact(&[64], 0.125)?,
        exact(&[2, 64], 0.125)?,
        exact(&[2], 0.125)?,
    ];
    Ok(Problem {
        field: |w, _, y| {
            let layer = |x: &Tensor, i: usize| x.matmul(&w[i].t()?)?.broadcast_add(&w[i + 1]);
            layer(&layer(&layer(y, 0)?.tanh()?, 2)?.tanh()?, 4)
        },
        weights,
        y0: exact(&[64, 2], 2.0)?,
        end: 1.0,
        loss: |y| y.sqr()?.sum_all()? * 0.5,
    })
}

/// Errors of many short steps, which a low-precision state cannot take at all: Euler on an MLP.
/// Also the counts.
pub(crate) fn stagnation(
    precision: Precision,
    steps: usize,
) -> candle_diffeq::Result<(Errors, Stats)> {
    errors(&mlp()?, &EULER, precision, steps)
}

/// The same solve on a low-precision tape: state, sums and weight gradients in `dtype`.
pub(crate) fn naive(dtype: DType, steps: usize) -> candle_diffeq::Result<Errors> {
    let problem = mlp()?;
    let run = |dtype| problem.tape(&EULER, (dtype, dtype), steps);
    Ok(run(dtype)?.errors(&run(DType::F64)?))
}

/// Pull-backs per stage of a smooth solve of 128 steps: what the scaler wastes.
pub(crate) fn scaler_waste() -> candle_diffeq::Result<(f64, Stats)> {
    let problem = Problem {
        loss: |y| y.sqr()?.mean_all(),
        ..mlp()?
    };
    let stats = problem.solve(options(RK4, Precision::f16()), 128)?.stats;
    Ok((stats.vjps as f64 / (4.0 * 128.0), stats))
}

/// A small generator, so that the studies need no data and no seed of a library's.
struct Lcg(u64);

impl Lcg {
    /// Uniform in (−1, 1).
    fn next(&mut self) -> f64 {
        self.0 = self
            .0
            .wrapping_mul(6364136223846793005)
            .wrapping_add(1442695040888963407);
        (self.0 >> 11) as f64 / (1u64 << 52) as f64 - 1.0
    }

    fn tensor(&mut self, shape: &[usize]) -> Result<Tensor> {
        let n = shape.iter().product();
        let data = (0..n).map(|_| self.next()).collect::<Vec<_>>();
        Tensor::from_vec(data, shape, &Device::Cpu)
    }
}
