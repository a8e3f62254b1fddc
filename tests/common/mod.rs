//! What the tests share: comparisons in f64, a small network with a time input, and the reference
//! that every gradient is held against: the method unrolled in candle's own autograd.
#![allow(dead_code)] // each test binary uses a part of it

#[path = "../../src/every_core.rs"]
mod every_core;

use candle_core::backprop::GradStore;
use candle_core::{DType, Device, Module, Result, Tensor, Var};
use candle_diffeq::options::Steps;
use candle_diffeq::tableau::Tableau;
use candle_diffeq::{NeuralOde, OdeOptions, Time};
use candle_nn::{linear, Linear, VarBuilder, VarMap};

/// Unit roundoffs.
pub(crate) const U_F64: f64 = 1.0 / (1u64 << 53) as f64;
pub(crate) const U_F32: f64 = 1.0 / (1u64 << 24) as f64;
pub(crate) const U_F16: f64 = 1.0 / 2048.0;
pub(crate) const U_BF16: f64 = 1.0 / 256.0;

/// All elements, in f64.
pub(crate) fn values(x: &Tensor) -> Vec<f64> {
    let x = x.to_dtype(DType::F64).and_then(|x| x.flatten_all());
    x.and_then(|x| x.to_vec1()).unwrap()
}

/// All elements' bits; f16 and f32 are in f64 without loss.
pub(crate) fn bits(x: &Tensor) -> Vec<u64> {
    values(x).into_iter().map(f64::to_bits).collect()
}

/// max |x − exact| / max |exact|, and the absolute error where `exact` is zero.
pub(crate) fn relative(x: &Tensor, exact: &Tensor) -> f64 {
    assert_eq!(x.dims(), exact.dims());
    let (x, exact) = (values(x), values(exact));
    let error = worst(x.iter().zip(&exact).map(|(x, e)| x - e));
    match worst(exact) {
        0.0 => error,
        size => error / size,
    }
}

/// max |x|, NaN if any is: `f64::max` would drop it.
pub(crate) fn worst(x: impl IntoIterator<Item = f64>) -> f64 {
    let max = |m: f64, x: f64| {
        if m.is_nan() || x.abs() <= m {
            m
        } else {
            x.abs()
        }
    };
    x.into_iter().fold(0.0, max)
}

/// Numbers in (−size, size) that look random and are the same everywhere.
pub(crate) fn scattered(shape: &[usize], size: f64, seed: usize) -> Tensor {
    let n: usize = shape.iter().product();
    let at = |i: usize| size * (12.9898 * (i + 1) as f64 + 4.1414 * seed as f64).sin();
    Tensor::from_vec((0..n).map(at).collect(), shape, &Device::Cpu).unwrap()
}

/// A variable of such numbers.
pub(crate) fn var(shape: &[usize], size: f64, seed: usize) -> Var {
    Var::from_tensor(&scattered(shape, size, seed)).unwrap()
}

/// Gives every variable of a map scattered values.
pub(crate) fn scatter(vars: &VarMap) {
    let data = vars.data().lock().unwrap();
    let mut names: Vec<_> = data.keys().collect();
    names.sort();
    for (seed, name) in names.into_iter().enumerate() {
        let var = &data[name];
        let x = scattered(var.dims(), 0.8, seed).to_dtype(var.dtype());
        var.set(&x.unwrap()).unwrap();
    }
}

/// Gives every variable of a map scattered values of a size that keeps the layers' outputs near one.
pub(crate) fn fill(vars: &VarMap) {
    for (seed, (_, var)) in all(vars).into_iter().enumerate() {
        let size = 1.2 / (var.dims()[var.rank() - 1] as f64).sqrt().min(4.0);
        // The values of f32, so that both dtypes see the same.
        let x = scattered(var.dims(), size, seed).to_dtype(DType::F32);
        let x = x.and_then(|x| x.to_dtype(var.dtype()));
        var.set(&x.unwrap()).unwrap();
    }
}

/// A step of gradient descent on Σ y².
pub(crate) fn descend(vars: &VarMap, ys: &Tensor) {
    let grads = ys.sqr().unwrap().sum_all().unwrap().backward().unwrap();
    for var in vars.all_vars() {
        let step = (grads.get(&var).unwrap() * 1e-3).unwrap();
        var.set(&(var.as_tensor() - step).unwrap()).unwrap();
    }
}

/// A variable of a map, by name.
pub(crate) fn named(vars: &VarMap, name: &str) -> Var {
    vars.data().lock().unwrap()[name].clone()
}

/// The names and variables of a map, sorted.
pub(crate) fn all(vars: &VarMap) -> Vec<(String, Var)> {
    let data = vars.data().lock().unwrap();
    let mut all: Vec<_> = data.iter().map(|(n, v)| (n.clone(), v.clone())).collect();
    all.sort_by(|a, b| a.0.cmp(&b.0));
    all
}

/// f(t, y) = W2 tanh(W1 y + b1 + u cos 2t) + b2, from (batch, 2) to (batch, 2), any dtype.
pub(crate) struct Net {
    first: Linear,
    drive: Tensor,
    second: Linear,
}

impl Net {
    pub(crate) fn new(vb: VarBuilder<'_>) -> Result<Self> {
        Ok(Self {
            first: linear(2, 5, vb.pp("first"))?,
            drive: vb.get(5, "drive")?,
            second: linear(5, 2, vb.pp("second"))?,
        })
    }

    pub(crate) fn rhs(&self, t: &Tensor, y: &Tensor) -> Result<Tensor> {
        let cos = (t * 2.0)?.cos()?.to_dtype(y.dtype())?;
        let drive = self.drive.broadcast_mul(&cos)?;
        let hidden = self.first.forward(y)?.broadcast_add(&drive)?.tanh()?;
        self.second.forward(&hidden)
    }
}

/// A `Net` under `prefix` as a neural ODE, and the same net over the map's own variables.
pub(crate) fn net(
    vars: &VarMap,
    prefix: &str,
    dtype: DType,
    options: OdeOptions,
) -> (NeuralOde, Net) {
    let build = |vb: VarBuilder<'_>| {
        let net = Net::new(vb)?;
        Ok(move |t: &Time, y: &Tensor| net.rhs(&t.tensor()?, y))
    };
    let ode = NeuralOde::from_field(vars, prefix, dtype, &Device::Cpu, build).unwrap();
    scatter(vars);
    let vb = VarBuilder::from_varmap(vars, dtype, &Device::Cpu).pp(prefix);
    (ode.options(options), Net::new(vb).unwrap())
}

/// Whether fields of `nn` are solved tile by tile: whether there is a vector unit, and it may be used.
pub(crate) fn has_tiles() -> bool {
    #[cfg(target_arch = "x86_64")]
    let unit = std::is_x86_feature_detected!("avx2") && std::is_x86_feature_detected!("fma");
    #[cfg(not(target_arch = "x86_64"))]
    let unit = cfg!(target_arch = "aarch64");
    unit && std::env::var_os("CANDLE_DIFFEQ_SIMD").is_none_or(|word| word != "none")
}

/// Options of a method with m steps an interval.
pub(crate) fn method(method: &Tableau, steps: usize) -> OdeOptions {
    OdeOptions {
        method: method.clone(),
        steps: Steps::PerInterval(steps),
        ..Default::default()
    }
}

/// The method as textbooks write it, step by step in candle's graph, with t and h as tensors:
/// leaves `(times, …)`.  Keep below a thousand stages, candle's tape recurses.
pub(crate) fn unrolled(
    tableau: &Tableau,
    steps: usize,
    field: impl Fn(&Tensor, &[Tensor]) -> Result<Vec<Tensor>>,
    y0: &[Tensor],
    times: &Tensor,
) -> Result<Vec<Tensor>> {
    let mut y = y0.to_vec();
    let mut outputs = vec![y.clone()];
    for n in 0..times.dim(0)? - 1 {
        let (t0, t1) = (times.get(n)?, times.get(n + 1)?);
        let h = ((&t1 - &t0)? / steps as f64)?;
        for j in 0..steps {
            let t = (&t0 + (&h * j as f64)?)?;
            y = unrolled_step(tableau, &field, &t, &h, &y)?;
        }
        outputs.push(y.clone());
    }
    let leaf = |i: usize| {
        let leaf: Vec<_> = outputs.iter().map(|y| &y[i]).collect();
        Tensor::stack(&leaf, 0)
    };
    (0..y0.len()).map(leaf).collect()
}

fn unrolled_step(
    tableau: &Tableau,
    field: &impl Fn(&Tensor, &[Tensor]) -> Result<Vec<Tensor>>,
    t: &Tensor,
    h: &Tensor,
    y: &[Tensor],
) -> Result<Vec<Tensor>> {
    let sum = |weights: &[f64], ks: &[Vec<Tensor>]| {
        let leaf = |i: usize| {
            let mut sum = y[i].clone();
            for (w, k) in weights.iter().zip(ks) {
                sum = (sum + k[i].broadcast_mul(&(h * *w)?)?)?;
            }
            Ok(sum)
        };
        (0..y.len()).map(leaf).collect::<Result<Vec<_>>>()
    };
    let mut ks: Vec<Vec<Tensor>> = vec![];
    for i in 0..tableau.stages() {
        let t = (t + (h * tableau.c()[i])?)?;
        ks.push(field(&t, &sum(tableau.a(i), &ks)?)?);
    }
    sum(tableau.b(), &ks)
}

/// The largest relative error of the gradients of `of`; a variable has an entry in both or in none.
pub(crate) fn error_of(got: &GradStore, exact: &GradStore, of: &[(String, Var)]) -> f64 {
    let error = |(name, var): &(String, Var)| match (got.get(var), exact.get(var)) {
        (Some(got), Some(exact)) => {
            assert_eq!(got.dtype(), var.dtype());
            relative(got, exact)
        }
        (None, None) => 0.0,
        (got, _) => panic!(
            "{name}: only {} has an entry",
            if got.is_some() { "ours" } else { "autograd" }
        ),
    };
    worst(of.iter().map(error))
}
