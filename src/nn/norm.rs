//! Normalisations over the last dimension, and softmax, with pull-backs.
//!
//! The layers of `candle_nn` call fused kernels that record no backward operation.  So their input and their weights
//! get no gradient from a loss, and if the loss also depends on the input in another way, nobody notices.  The
//! functions of this module compute the same by operations for which candle has a backward operation.

use candle_core::shape::Dim;
use candle_core::{Module, Result, Tensor, D};
use candle_nn::{LayerNormConfig, VarBuilder};

use super::{wrong_state, Checked};
use crate::precision::at_least_f32;

/// y = γ (x − mean) / √(variance + ε) + β over the last dimension; without `remove_mean`, the mean
/// stays and the variance is the mean square.
///
/// x: `(…, size)`, γ and β: `(size)`.  Takes the place of [`candle_nn::LayerNorm`] in any model: the
/// same names, shapes and initial values.  In f16 and bf16 all is computed in f32, and rounded once.
///
/// ```
/// use candle_core::{DType, Device, Module, Tensor};
/// use candle_diffeq::nn::layer_norm;
/// let vars = candle_nn::VarMap::new();
/// let vb = candle_nn::VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
/// let norm = layer_norm(4, 1e-5, vb)?;                               // weight, bias
/// let x = Tensor::randn(0f32, 1.0, (8, 4), &Device::Cpu)?;
/// let grads = norm.forward(&x)?.sqr()?.sum_all()?.backward()?;
/// assert!(grads.get(norm.weight()).is_some());
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct LayerNorm {
    weight: Tensor,
    bias: Option<Tensor>,
    remove_mean: bool,
    eps: f64,
}

impl LayerNorm {
    /// The norm with these γ, β and ε.
    pub fn new(weight: Tensor, bias: Tensor, eps: f64) -> Self {
        Self {
            bias: Some(bias),
            ..Self::new_no_bias(weight, eps)
        }
    }

    /// The norm with these γ and ε, without β.
    pub fn new_no_bias(weight: Tensor, eps: f64) -> Self {
        Self {
            weight,
            bias: None,
            remove_mean: true,
            eps,
        }
    }

    /// The norm with these γ and ε, without β and without removing the mean.
    pub fn rms_norm(weight: Tensor, eps: f64) -> Self {
        Self {
            remove_mean: false,
            ..Self::new_no_bias(weight, eps)
        }
    }

    /// γ.
    pub fn weight(&self) -> &Tensor {
        &self.weight
    }

    /// β.
    pub fn bias(&self) -> Option<&Tensor> {
        self.bias.as_ref()
    }

    /// ε.
    pub fn eps(&self) -> f64 {
        self.eps
    }

    /// Whether the mean is removed.
    pub fn remove_mean(&self) -> bool {
        self.remove_mean
    }

    fn check(&self, x: &Tensor) -> Result<()> {
        let (weight, mut checked) = (&self.weight, Checked::new("a norm"));
        checked.weight(0, weight, 1, "a vector, a number for each feature")?;
        let size = weight.elem_count();
        if let Some(bias) = &self.bias {
            checked.see((0, "bias"), bias, bias.dims() == [size], &|| {
                format!("[{size}], as the weight")
            })?;
        }
        if x.dims().last() != Some(&size) {
            let norm = format!("a norm of {size} features");
            return Err(wrong_state(norm, format!("x (…, {size})"), &[x]));
        }
        Ok(())
    }
}

impl From<candle_nn::LayerNorm> for LayerNorm {
    fn from(norm: candle_nn::LayerNorm) -> Self {
        Self {
            weight: norm.weight().clone(),
            bias: norm.bias().cloned(),
            remove_mean: norm.remove_mean(),
            eps: norm.eps(),
        }
    }
}

impl Module for LayerNorm {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.check(x)?;
        let wide = at_least_f32(x.dtype());
        let mut y = x.to_dtype(wide)?;
        if self.remove_mean {
            y = y.broadcast_sub(&y.mean_keepdim(D::Minus1)?)?;
        }
        let variance = y.sqr()?.mean_keepdim(D::Minus1)?;
        y = y.broadcast_div(&(variance + self.eps)?.sqrt()?)?;
        y = y.broadcast_mul(&self.weight.to_dtype(wide)?)?;
        if let Some(bias) = &self.bias {
            y = y.broadcast_add(&bias.to_dtype(wide)?)?;
        }
        y.to_dtype(x.dtype())
    }
}

/// `weight` (ones at first) and, unless the config says `affine: false`, `bias` (zeros) of a builder, as
/// [`candle_nn::layer_norm()`]; the config may be ε alone.
///
/// # Errors
/// Those of the builder.
pub fn layer_norm<C: Into<LayerNormConfig>>(
    size: usize,
    config: C,
    vb: VarBuilder<'_>,
) -> Result<LayerNorm> {
    candle_nn::layer_norm(size, config, vb).map(LayerNorm::from)
}

/// The same without bias, as [`candle_nn::layer_norm_no_bias`].
///
/// # Errors
/// Those of the builder.
pub fn layer_norm_no_bias(size: usize, eps: f64, vb: VarBuilder<'_>) -> Result<LayerNorm> {
    candle_nn::layer_norm_no_bias(size, eps, vb).map(LayerNorm::from)
}

/// y = γ x / √(mean x² + ε) over the last dimension, in place of [`candle_nn::RmsNorm`]; see
/// [`LayerNorm`].
#[derive(Clone, Debug)]
pub struct RmsNorm(LayerNorm);

impl RmsNorm {
    /// The norm with these γ and ε.
    pub fn new(weight: Tensor, eps: f64) -> Self {
        Self(LayerNorm::rms_norm(weight, eps))
    }

    /// The norm that it is.
    pub fn into_inner(self) -> LayerNorm {
        self.0
    }

    /// γ.
    pub fn weight(&self) -> &Tensor {
        self.0.weight()
    }

    /// ε.
    pub fn eps(&self) -> f64 {
        self.0.eps()
    }
}

impl From<candle_nn::RmsNorm> for RmsNorm {
    fn from(norm: candle_nn::RmsNorm) -> Self {
        Self(norm.into_inner().into())
    }
}

impl Module for RmsNorm {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.0.forward(x)
    }
}

/// `weight` of a builder, ones at first, as [`candle_nn::rms_norm()`].
///
/// # Errors
/// Those of the builder.
pub fn rms_norm(size: usize, eps: f64, vb: VarBuilder<'_>) -> Result<RmsNorm> {
    candle_nn::rms_norm(size, eps, vb).map(RmsNorm::from)
}

/// exp x / Σ exp x over a dimension, of x's dtype; in f16 and bf16 computed in f32, and rounded once.
///
/// In place of [`candle_nn::ops::softmax_last_dim`], whose gradient is lost, and of
/// [`candle_nn::ops::softmax`].
///
/// ```
/// use candle_core::{Device, Tensor, D};
/// use candle_diffeq::nn::softmax;
/// let x = Tensor::new(&[[0f32, 0.0], [0.0, 3f32.ln()]], &Device::Cpu)?;
/// let y = softmax(&x, D::Minus1)?.to_vec2::<f32>()?;
/// assert!((y[1][1] - 0.75).abs() < 1e-6);
/// # Ok::<(), candle_core::Error>(())
/// ```
///
/// # Errors
/// If x has no such dimension; those of candle's operations.
pub fn softmax<S: Dim>(x: &Tensor, dim: S) -> Result<Tensor> {
    let dim = dim.to_index(x.shape(), "softmax")?;
    if x.elem_count() == 0 {
        return Ok(x.clone());
    }
    let y = x.to_dtype(at_least_f32(x.dtype()))?;
    // A shift, which changes nothing but the range of exp.
    let shift = y.detach().max_keepdim(dim)?;
    let powers = y.broadcast_sub(&shift)?.exp()?;
    let y = powers.broadcast_div(&powers.sum_keepdim(dim)?)?;
    y.to_dtype(x.dtype())
}

/// [`softmax`] over the last dimension, in place of [`candle_nn::ops::softmax_last_dim`].
///
/// # Errors
/// As [`softmax`].
pub fn softmax_last_dim(x: &Tensor) -> Result<Tensor> {
    softmax(x, D::Minus1)
}
