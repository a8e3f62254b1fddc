//! Initial weights from a seed: candle draws its own from a generator that has none.

use candle_core::{Shape, Tensor, Var};
use candle_nn::VarMap;
use rand::rngs::StdRng;
use rand::Rng;
use rand_distr::StandardNormal;

use super::{random, Result};

/// Draws the variables of a map, by name in order, from normal distributions of mean zero and the
/// deviation that `of(name, shape)` gives; one of `None` stays as it is.
pub fn normal(
    vars: &VarMap,
    rng: &mut StdRng,
    of: impl Fn(&str, &Shape) -> Option<f64>,
) -> Result<()> {
    let data = vars.data().lock().map_err(|_| "the variables are locked")?;
    let mut named: Vec<_> = data.iter().collect();
    named.sort_by_key(|(name, _)| name.as_str());
    for (name, var) in named {
        let Some(deviation) = of(name, var.shape()) else {
            continue;
        };
        let draws = (0..var.elem_count()).map(|_| deviation * rng.sample::<f64, _>(StandardNormal));
        let draws = Tensor::from_vec(draws.collect::<Vec<_>>(), var.shape(), var.device())?;
        var.set(&draws.to_dtype(var.dtype())?)?;
    }
    Ok(())
}

/// Inputs and outputs of a weight `(out, in, …)`, each with the pixels of a filter.
pub fn fans(shape: &Shape) -> (f64, f64) {
    let dims = shape.dims();
    let size = |i: usize| dims.get(i).copied().unwrap_or(1) as f64;
    let pixels = dims.iter().skip(2).product::<usize>() as f64;
    (size(1) * pixels, size(0) * pixels)
}

/// √(2 / inputs) for weights, for networks with rectifiers (He et al., 2015); the rest as `or_zero`.
pub fn he(name: &str, shape: &Shape) -> Option<f64> {
    or_zero(name, shape, (2.0 / fans(shape).0).sqrt())
}

/// √(2 / (inputs + outputs)) for weights (Glorot & Bengio, 2010); the rest as `or_zero`.
pub fn xavier(name: &str, shape: &Shape) -> Option<f64> {
    let (inputs, outputs) = fans(shape);
    or_zero(name, shape, (2.0 / (inputs + outputs)).sqrt())
}

/// Biases are zero; the weights of a norm, one for each feature, stay.
fn or_zero(name: &str, shape: &Shape, weight: f64) -> Option<f64> {
    match (name.ends_with("bias"), shape.rank()) {
        (true, _) => Some(0.0),
        (false, 0 | 1) => None,
        _ => Some(weight),
    }
}

/// Values uniform in ±1/√inputs for layers `NAME.weight` and their `NAME.bias`, as PyTorch's linear
/// layers have; other variables stay as they are.
pub fn layers(vars: &VarMap, rng: &mut StdRng) -> Result<()> {
    let data = vars.data().lock().map_err(|_| "the variables are locked")?;
    let mut names: Vec<_> = data.keys().filter(|n| n.ends_with(".weight")).collect();
    names.sort();
    for name in names {
        let bound = 1.0 / fans(data[name].shape()).0.sqrt();
        let bias = name.replace(".weight", ".bias");
        for var in [data.get(name), data.get(&bias)].into_iter().flatten() {
            uniform(var, rng, bound)?;
        }
    }
    Ok(())
}

/// Values of a variable, uniform in ±`bound`.
pub fn uniform(var: &Var, rng: &mut StdRng, bound: f64) -> Result<()> {
    let x = random::uniform(rng, var.shape(), var.dtype(), var.device())?;
    Ok(var.set(&(((x * 2.0)? - 1.0)? * bound)?)?)
}

/// Weights with orthonormal rows, or columns where there are fewer of them (Saxe et al., 2014), drawn by name in order;
/// biases zero.
pub fn orthogonal(vars: &VarMap, rng: &mut StdRng) -> Result<()> {
    let data = vars.data().lock().map_err(|_| "the variables are locked")?;
    let mut named: Vec<_> = data.iter().collect();
    named.sort_by_key(|(name, _)| name.as_str());
    for (_, var) in named {
        let numbers = match *var.dims() {
            [outputs, inputs] => {
                let (many, few) = (outputs.max(inputs), outputs.min(inputs));
                let basis = orthonormal(few, many, rng);
                let at = |k: usize| {
                    let (i, j) = (k / inputs, k % inputs);
                    match outputs <= inputs {
                        true => basis[i][j],
                        false => basis[j][i],
                    }
                };
                (0..outputs * inputs).map(at).collect()
            }
            _ => vec![0.0; var.elem_count()],
        };
        let numbers = Tensor::from_vec(numbers, var.shape(), var.device())?;
        var.set(&numbers.to_dtype(var.dtype())?)?;
    }
    Ok(())
}

/// So many orthonormal vectors, by Gram and Schmidt.
fn orthonormal(few: usize, many: usize, rng: &mut StdRng) -> Vec<Vec<f64>> {
    let mut basis: Vec<Vec<f64>> = vec![];
    while basis.len() < few {
        let mut v: Vec<f64> = (0..many).map(|_| rng.sample(StandardNormal)).collect();
        // Twice, so that rounding leaves nothing.
        for u in basis.iter().chain(&basis) {
            let product: f64 = u.iter().zip(&v).map(|(a, b)| a * b).sum();
            v.iter_mut().zip(u).for_each(|(x, u)| *x -= product * u);
        }
        let length = v.iter().map(|x| x * x).sum::<f64>().sqrt();
        basis.push(v.into_iter().map(|x| x / length).collect());
    }
    basis
}
