//! Dropout that is the same at every evaluation of a solve.

use candle_core::{DType, Device, Result, Shape, Tensor};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

/// A mask of dropout, a tensor of this shape and dtype by which activations are multiplied: each element is 0 with this
/// probability and otherwise 1/(1 − probability), so that its mean is 1 (N. Srivastava and others, "Dropout: a simple way to
/// prevent neural networks from overfitting", JMLR 15, 2014).  It is the same for the same seed on every device.
///
/// Noise that is drawn anew at every evaluation is no vector field.  A mask that is drawn once, and that the solve is
/// given as an argument ([`NeuralOde::with_args`](crate::NeuralOde::with_args)), leaves the field a field, and
/// gradients exact.
///
/// ```
/// use candle_core::{DType, Device};
/// use candle_diffeq::nn::dropout_mask;
/// let mask = dropout_mask((100, 100), 0.9, 0, DType::F64, &Device::Cpu)?;
/// let mean = mask.mean_all()?.to_scalar::<f64>()?;
/// assert!((mean - 1.0).abs() < 4.0 * 0.03);                  // deviation √(0.9/0.1)/100
/// # Ok::<(), candle_core::Error>(())
/// ```
///
/// # Errors
/// If the probability is not at least 0 and below 1.
pub fn dropout_mask(
    shape: impl Into<Shape>,
    probability: f64,
    seed: u64,
    dtype: DType,
    device: &Device,
) -> Result<Tensor> {
    if !(0.0..1.0).contains(&probability) {
        candle_core::bail!("dropout with a probability of {probability}: it must be in [0, 1)")
    }
    let (shape, mut rng) = (shape.into(), StdRng::seed_from_u64(seed));
    let kept = 1.0 / (1.0 - probability);
    let draw = |_| match rng.random::<f64>() < probability {
        true => 0.0,
        false => kept,
    };
    let numbers: Vec<f64> = (0..shape.elem_count()).map(draw).collect();
    let mask = Tensor::from_vec(numbers, shape, &Device::Cpu)?;
    mask.to_dtype(dtype)?.to_device(device)
}
