//! Random numbers from a seed, the same on every device.

use candle_core::{DType, Device, Result, Shape, Tensor};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use rand_distr::StandardNormal;

/// The generator of a seed.
pub fn generator(seed: u64) -> StdRng {
    StdRng::seed_from_u64(seed)
}

/// Standard normal.
pub fn normal(
    rng: &mut StdRng,
    shape: impl Into<Shape>,
    dtype: DType,
    device: &Device,
) -> Result<Tensor> {
    let shape = shape.into();
    let draws = (0..shape.elem_count()).map(|_| rng.sample(StandardNormal));
    let draws: Vec<f64> = draws.collect();
    Tensor::from_vec(draws, shape, &Device::Cpu)?
        .to_dtype(dtype)?
        .to_device(device)
}

/// Uniform in [0, 1).
pub fn uniform(
    rng: &mut StdRng,
    shape: impl Into<Shape>,
    dtype: DType,
    device: &Device,
) -> Result<Tensor> {
    let shape = shape.into();
    let draws: Vec<f64> = (0..shape.elem_count()).map(|_| rng.random()).collect();
    Tensor::from_vec(draws, shape, &Device::Cpu)?
        .to_dtype(dtype)?
        .to_device(device)
}
