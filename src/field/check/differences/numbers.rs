//! Tensors as numbers of f64, and back.

use candle_core::{DType, Device, Tensor};
use rand::rngs::StdRng;
use rand::Rng;
use rand_distr::StandardNormal;

use crate::error::Result;

/// All elements in f64.
pub(crate) fn numbers(tensors: &[Tensor]) -> candle_core::Result<Vec<f64>> {
    let mut all = vec![];
    for x in tensors {
        let x = x.detach().flatten_all()?.to_dtype(DType::F64)?;
        all.extend(x.to_vec1::<f64>()?);
    }
    Ok(all)
}

/// These numbers in a tensor like another.
pub(crate) fn like(x: &[f64], other: &Tensor) -> Result<Tensor> {
    let x = Tensor::from_vec(x.to_vec(), other.shape(), &Device::Cpu)?;
    Ok(x.to_dtype(other.dtype())?.to_device(other.device())?)
}

/// The first tensor in which two evaluations differ by a bit; NaN equals NaN.
pub(crate) fn differing(a: &[Tensor], b: &[Tensor]) -> Result<Option<usize>> {
    for (leaf, (a, b)) in a.iter().zip(b).enumerate() {
        let (a, b) = (
            numbers(std::slice::from_ref(a))?,
            numbers(std::slice::from_ref(b))?,
        );
        let same = |(a, b): (&f64, &f64)| a == b || a.is_nan() && b.is_nan();
        if a.len() != b.len() || !a.iter().zip(&b).all(same) {
            return Ok(Some(leaf));
        }
    }
    Ok(None)
}

/// A cotangent by chance.  Of ±1 alone, sums that are constant, those of a softmax for one, would cancel in
/// half of all.
pub(crate) fn cotangent_of(rng: &mut StdRng, n: usize) -> Vec<f64> {
    (0..n).map(|_| rng.sample(StandardNormal)).collect()
}

pub(crate) fn norm(x: impl Iterator<Item = f64>) -> f64 {
    x.map(|x| x * x).sum::<f64>().sqrt()
}
