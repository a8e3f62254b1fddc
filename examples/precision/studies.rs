//! Studies of rounding: how far a solve in low precision is from the same scheme in f64, as the
//! number of steps grows.  Shared by the example `precision`, which prints them, and the test of
//! that name, which holds them to their bounds.

use candle_core::{DType, Device, Result, Tensor, Var};
use candle_diffeq::{
    Checkpoint, NeuralOde, OdeOptions, Output, Precision, Recorder, Stats, Steps, Tableau, Time,
    EULER, RK4,
};
use candle_nn::VarMap;

/// Relative errors of the final state, ∂L/∂y0 and ∂L/∂θ.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Errors {
    pub(crate) state: f64,
    pub(crate) y0: f64,
    pub(crate) theta: f64,
}

/// What a solve and its backward pass gave, in f64.
struct Outcome {
    state: Vec<f64>,
    y0: Vec<f64>,
    theta: Vec<f64>,
    stats: Stats,
}

/// ‖a − b‖ / ‖b‖.
pub(crate) fn relative(a: &[f64], b: &[f64]) -> f64 {
    let norm = |x: &mut dyn Iterator<Item = f64>| x.map(|x| x * x).sum::<f64>().sqrt();
    norm(&mut a.iter().zip(b).map(|(a, b)| a - b)) / norm(&mut b.iter().copied())
}

pub(crate) fn values(x: &Tensor) -> Result<Vec<f64>> {
    x.to_dtype(DType::F64)?.flatten_all()?.to_vec1()
}

fn errors(of: &Outcome, reference: &Outcome) -> Errors {
    Errors {
        state: relative(&of.state, &reference.state),
        y0: relative(&of.y0, &reference.y0),
        theta: relative(&of.theta, &reference.theta),
    }
}

/// Solves, forms the loss, and pulls it back through candle's graph.
fn train_once(
    ode: NeuralOde,
    vars: &VarMap,
    y0: &Var,
    times: &[f64],
    mut options: OdeOptions,
    loss: impl Fn(&Tensor) -> Result<Tensor>,
) -> candle_diffeq::Result<Outcome> {
    let recorder = Recorder::default();
    options.recorder = Some(recorder.clone());
    options.output = Output::Final;
    let ode = ode.options(options);
    let y = ode.solve(y0.as_tensor(), times)?;
    let grads = loss(&y)?.backward()?;
    let data = vars
        .data()
        .lock()
        .map_err(|_| candle_core::Error::UnwrapNone)?;
    let mut theta = vec![];
    for name in ode.parameters() {
        if let Some(grad) = data.get(name).and_then(|var| grads.get(var)) {
            theta.extend(values(grad)?);
        }
    }
    Ok(Outcome {
        state: values(&y)?,
        y0: grads.get(y0).map(values).transpose()?.unwrap_or_default(),
        theta,
        stats: recorder.take(),
    })
}

fn options(method: Tableau, precision: Precision, steps: usize) -> OdeOptions {
    OdeOptions {
        method,
        precision: Some(precision),
        steps: Steps::PerInterval(steps),
        checkpoint: Checkpoint::All,
        ..Default::default()
    }
}

/// y' = −5 y as a full matrix, D = 10, T = 1, L = Σ y(T): rampde's model equation.
pub(crate) fn model_equation(precision: Precision, steps: usize) -> candle_diffeq::Result<Errors> {
    let run = |precision: Precision| {
        let device = Device::Cpu;
        let vars = VarMap::new();
        let matrix = (Tensor::eye(10, precision.state, &device)? * -5.0)?;
        let ode = NeuralOde::from_field(&vars, "", precision.state, &device, |vb| {
            let a = vb.get((10, 10), "a")?;
            Ok(move |_: &Time, y: &Tensor| y.matmul(&a.t()?))
        })?;
        vars.clone().set_one("a", &matrix)?;
        // Ten fixed values of the size of a normal sample, exact in f32.
        let start = [
            0.3359375f32,
            0.12890625,
            0.234375,
            0.23046875,
            -1.125,
            -0.1865,
            2.207,
            -0.638,
            0.462,
            0.267,
        ];
        let y0 = Tensor::new(&[start], &device)?.to_dtype(precision.state)?;
        let y0 = Var::from_tensor(&y0)?;
        let options = options(RK4, precision, steps);
        train_once(ode, &vars, &y0, &[0.0, 1.0], options, |y| y.sum_all())
    };
    Ok(errors(&run(precision)?, &run(Precision::f64())?))
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
    let options = options(RK4, precision, 399);
    let got = train_once(ode, &vars, &y0, &[0.0, end], options, |y| {
        y.sqr()?.sum_all()? * 0.5
    })?;
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

/// Weights and y0 of an MLP 2-64-64-2 with tanh, all exact in bf16.
pub(crate) fn mlp(dtype: DType) -> Result<(VarMap, Tensor)> {
    let device = Device::Cpu;
    let vars = VarMap::new();
    let mut lcg = Lcg(7);
    for (name, shape, scale) in [
        ("l1.weight", &[64, 2][..], 0.7),
        ("l1.bias", &[64], 0.7),
        ("l2.weight", &[64, 64], 0.125),
        ("l2.bias", &[64], 0.125),
        ("l3.weight", &[2, 64], 0.125),
        ("l3.bias", &[2], 0.125),
    ] {
        let value = (lcg.tensor(shape)? * scale)?
            .to_dtype(DType::BF16)?
            .to_dtype(dtype)?;
        let vb = candle_nn::VarBuilder::from_varmap(&vars, dtype, &device);
        vb.get(shape, name)?;
        vars.clone().set_one(name, value)?;
    }
    let y0 = (lcg.tensor(&[64, 2])? * 2.0)?
        .to_dtype(DType::BF16)?
        .to_dtype(dtype)?;
    Ok((vars, y0))
}

/// The field over [`mlp`]'s weights.
pub(crate) fn mlp_ode(vars: &VarMap, dtype: DType) -> candle_diffeq::Result<NeuralOde> {
    NeuralOde::from_field(vars, "", dtype, &Device::Cpu, |vb| {
        let layer = |name, i, o| candle_nn::linear(i, o, vb.pp(name));
        let [l1, l2, l3] = [
            layer("l1", 2, 64)?,
            layer("l2", 64, 64)?,
            layer("l3", 64, 2)?,
        ];
        use candle_core::Module;
        Ok(move |_: &Time, y: &Tensor| {
            let h = l1.forward(y)?.tanh()?;
            l3.forward(&l2.forward(&h)?.tanh()?)
        })
    })
}

/// Errors of many short steps, which a low-precision state cannot take at all: MLP 2-64-64-2,
/// batch 64, Euler on [0, 1], L = |y(1)|²/2.  Also the counts.
pub(crate) fn stagnation(
    precision: Precision,
    steps: usize,
) -> candle_diffeq::Result<(Errors, Stats)> {
    let run = |precision: Precision, method: Tableau| {
        let (vars, y0) = mlp(precision.state)?;
        let y0 = Var::from_tensor(&y0)?;
        let ode = mlp_ode(&vars, precision.state)?;
        let options = options(method, precision, steps);
        train_once(ode, &vars, &y0, &[0.0, 1.0], options, |y| {
            y.sqr()?.sum_all()? * 0.5
        })
    };
    let low = run(precision, EULER)?;
    let errors = errors(&low, &run(Precision::f64(), EULER)?);
    Ok((errors, low.stats))
}

/// The same solve on a low-precision tape: state, sums and weight gradients in `dtype`.
pub(crate) fn naive(dtype: DType, steps: usize) -> candle_diffeq::Result<Errors> {
    let run = |dtype: DType| {
        let (vars, y0) = mlp(dtype)?;
        let y0 = Var::from_tensor(&y0)?;
        let vb = candle_nn::VarBuilder::from_varmap(&vars, dtype, &Device::Cpu);
        let [w1, b1, w2, b2, w3, b3] = [
            vb.get((64, 2), "l1.weight")?,
            vb.get(64, "l1.bias")?,
            vb.get((64, 64), "l2.weight")?,
            vb.get(64, "l2.bias")?,
            vb.get((2, 64), "l3.weight")?,
            vb.get(2, "l3.bias")?,
        ];
        let layer = |x: &Tensor, w: &Tensor, b: &Tensor| x.matmul(&w.t()?)?.broadcast_add(b);
        let mut y = y0.as_tensor().clone();
        for _ in 0..steps {
            let h = layer(&y, &w1, &b1)?.tanh()?;
            let k = layer(&layer(&h, &w2, &b2)?.tanh()?, &w3, &b3)?;
            y = (y + (k / steps as f64)?)?;
        }
        let grads = (y.to_dtype(DType::F64)?.sqr()?.sum_all()? * 0.5)?.backward()?;
        let mut theta = vec![];
        for w in [&w1, &b1, &w2, &b2, &w3, &b3] {
            theta.extend(grads.get(w).map(values).transpose()?.unwrap_or_default());
        }
        Ok::<_, candle_diffeq::Error>(Outcome {
            state: values(&y)?,
            y0: grads.get(&y0).map(values).transpose()?.unwrap_or_default(),
            theta,
            stats: Stats::default(),
        })
    };
    Ok(errors(&run(dtype)?, &run(DType::F64)?))
}

/// Pull-backs per stage of a smooth solve of 128 steps: what the scaler wastes.
pub(crate) fn scaler_waste() -> candle_diffeq::Result<(f64, Stats)> {
    let (vars, y0) = mlp(DType::F32)?;
    let y0 = Var::from_tensor(&y0)?;
    let ode = mlp_ode(&vars, DType::F32)?;
    let options = options(RK4, Precision::f16(), 128);
    let stats = train_once(ode, &vars, &y0, &[0.0, 1.0], options, |y| {
        y.sqr()?.mean_all()
    })?
    .stats;
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
