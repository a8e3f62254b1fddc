//! Activations and their slopes, of tensors and of tiles.

use candle_core::{Result, Tensor};
use pulp::Simd;

use super::elementwise;
use crate::simd::{Element, Kernel};

/// An elementwise activation.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_diffeq::nn::Activation;
/// let x = Tensor::new(&[-1f32, 0.0, 2.0], &Device::Cpu)?;
/// assert_eq!(Activation::Relu.forward(&x)?.to_vec1::<f32>()?, [0.0, 0.0, 2.0]);
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Activation {
    /// tanh x.
    #[default]
    Tanh,
    /// 1 / (1 + exp(−x)).
    Sigmoid,
    /// ln(1 + exp x).
    Softplus,
    /// max(x, 0).
    Relu,
    /// x · sigmoid x, also called swish.
    Silu,
    /// x Φ(x), Φ the normal distribution function (`gelu_erf` of candle).
    Gelu,
    /// sin x.
    Sin,
}

impl Activation {
    /// All of them.
    pub const ALL: [Self; 7] = [
        Self::Tanh,
        Self::Sigmoid,
        Self::Softplus,
        Self::Relu,
        Self::Silu,
        Self::Gelu,
        Self::Sin,
    ];

    /// σ(x), differentiable by candle.  On the CPU in f32 and f64 one pass on the vector unit and
    /// all threads, worth using in place of candle's in any model; elsewhere candle's operations.
    ///
    /// # Errors
    /// Of candle's operations.
    pub fn forward(self, x: &Tensor) -> Result<Tensor> {
        match elementwise::is_for(x) {
            true => elementwise::value(self, x),
            false => self.composed(x),
        }
    }

    /// σ(x) in candle's operations.
    fn composed(self, x: &Tensor) -> Result<Tensor> {
        match self {
            Self::Tanh => x.tanh(),
            Self::Sigmoid => sigmoid(x),
            Self::Softplus => x.relu()? + (x.abs()?.neg()?.exp()? + 1.0)?.log()?,
            Self::Relu => x.relu(),
            Self::Silu => x * sigmoid(x)?,
            Self::Gelu => x * normal(x)?,
            Self::Sin => x.sin(),
        }
    }

    /// σ'(z) g.
    pub(super) fn pull(self, z: &Tensor, g: &Tensor) -> Result<Tensor> {
        if elementwise::is_for(z) && g.dtype() == z.dtype() {
            return elementwise::pull(self, z, g);
        }
        g * self.slope(z, &self.composed(z)?)?
    }

    /// σ'(z), of `value` = σ(z).
    fn slope(self, z: &Tensor, value: &Tensor) -> Result<Tensor> {
        const ROOT_OF_TAU: f64 = 2.506_628_274_631_000_5;
        match self {
            Self::Tanh => 1.0 - value.sqr()?,
            Self::Sigmoid => value * (1.0 - value)?,
            Self::Softplus => sigmoid(z),
            Self::Relu => z.gt(0.0)?.to_dtype(z.dtype()),
            Self::Silu => {
                let s = sigmoid(z)?;
                &s * (((1.0 - &s)? * z)? + 1.0)?
            }
            Self::Gelu => {
                let normal = normal(z)?;
                let density = ((z.sqr()? * -0.5)?.exp()? / ROOT_OF_TAU)?;
                normal + (z * density)?
            }
            Self::Sin => z.cos(),
        }
    }

    /// Whether the slope must be kept beside the value.
    pub(super) fn keeps_slope(self) -> bool {
        !matches!(self, Self::Tanh | Self::Sigmoid | Self::Relu)
    }
}

/// z becomes σ(z); `slope` becomes σ'(z) where it must be kept.
pub(super) struct Apply<'a, T: Element, S: Simd> {
    pub(super) activation: Activation,
    pub(super) z: &'a mut [T::Vector<S>],
    pub(super) slope: &'a mut [T::Vector<S>],
}

impl<T: Element, S: Simd> Kernel<S> for Apply<'_, T, S> {
    type Output = ();

    // Loops, not closures: a closure is not compiled for the vector unit.
    #[inline(always)]
    fn run(self, s: S) {
        let Self { z, slope, .. } = self;
        let both = z.iter_mut().zip(slope);
        match self.activation {
            Activation::Tanh => {
                for z in z {
                    *z = T::tanh(s, *z);
                }
            }
            Activation::Sigmoid => {
                for z in z {
                    *z = T::sigmoid(s, *z);
                }
            }
            Activation::Relu => {
                for z in z {
                    *z = T::where_positive(s, *z, *z);
                }
            }
            Activation::Softplus => {
                for (z, d) in both {
                    [*z, *d] = T::softplus(s, *z);
                }
            }
            Activation::Sin => {
                for (z, d) in both {
                    [*z, *d] = T::sin_cos(s, *z);
                }
            }
            Activation::Silu => {
                for (z, d) in both {
                    let sigmoid = T::sigmoid(s, *z);
                    let value = T::times(s, *z, sigmoid);
                    // σ + zσ(1 − σ)
                    let rest = T::minus(s, value, T::times(s, value, sigmoid));
                    *d = T::plus(s, sigmoid, rest);
                    *z = value;
                }
            }
            Activation::Gelu => {
                for (z, d) in both {
                    let [normal, density] = T::normal(s, *z);
                    *d = T::mul_add(s, *z, density, normal);
                    *z = T::times(s, *z, normal);
                }
            }
        }
    }
}

/// g becomes σ'(z) g, for activations whose slope follows from the value.
pub(super) struct Pull<'a, T: Element, S: Simd> {
    pub(super) activation: Activation,
    pub(super) value: &'a [T::Vector<S>],
    pub(super) g: &'a mut [T::Vector<S>],
}

impl<T: Element, S: Simd> Kernel<S> for Pull<'_, T, S> {
    type Output = ();

    #[inline(always)]
    fn run(self, s: S) {
        let one = T::splat(s, T::of(1.0));
        let both = self.g.iter_mut().zip(self.value);
        match self.activation {
            Activation::Tanh => {
                for (g, h) in both {
                    *g = T::times(s, *g, T::minus(s, one, T::times(s, *h, *h)));
                }
            }
            Activation::Sigmoid => {
                for (g, h) in both {
                    *g = T::times(s, *g, T::times(s, *h, T::minus(s, one, *h)));
                }
            }
            Activation::Relu => {
                for (g, h) in both {
                    *g = T::where_positive(s, *h, *g);
                }
            }
            Activation::Softplus | Activation::Silu | Activation::Gelu | Activation::Sin => {}
        }
    }
}

/// Φ(x).  candle's `gelu_erf` is x Φ(x) too, but its gradient is right to eight digits only.
fn normal(x: &Tensor) -> Result<Tensor> {
    ((x * std::f64::consts::FRAC_1_SQRT_2)?.erf()? + 1.0)? * 0.5
}

fn sigmoid(x: &Tensor) -> Result<Tensor> {
    (x.neg()?.exp()? + 1.0)?.recip()
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device, Var};

    use super::*;

    /// max |x − y|.
    fn distance(x: &Tensor, y: &Tensor) -> f64 {
        let max = (x - y).and_then(|d| d.abs()?.max_all()?.to_dtype(DType::F64)?.to_scalar());
        max.unwrap()
    }

    #[test]
    fn fused_activations_and_their_gradients_are_those_of_candle() {
        for n in [1, 17, 1024, 40_001] {
            for (dtype, bound) in [(DType::F64, 1e-14), (DType::F32, 2e-6)] {
                let x = Tensor::randn(0f64, 3.0, n, &Device::Cpu).unwrap();
                let x = Var::from_tensor(&x.to_dtype(dtype).unwrap()).unwrap();
                let g = Tensor::randn(0f64, 1.0, n, &Device::Cpu).unwrap();
                let g = g.to_dtype(dtype).unwrap();
                for activation in Activation::ALL {
                    let [got, expected] = [
                        activation.forward(x.as_tensor()).unwrap(),
                        activation.composed(x.as_tensor()).unwrap(),
                    ];
                    assert!(distance(&got, &expected) <= 8.0 * bound, "{activation:?}");
                    let gradient = |y: Tensor| {
                        let grads = (y * &g).and_then(|y| y.sum_all()?.backward()).unwrap();
                        grads.get(&x).unwrap().clone()
                    };
                    let error = distance(&gradient(got), &gradient(expected));
                    assert!(error <= 8.0 * bound, "{activation:?} {error:e}");
                }
            }
        }
    }

    #[test]
    fn strided_and_low_precision_tensors_have_activations_too() {
        let x = Tensor::randn(0f32, 1.0, (6, 5), &Device::Cpu).unwrap();
        let turned = x.t().unwrap();
        let expected = turned.contiguous().unwrap().tanh().unwrap();
        let got = Activation::Tanh.forward(&turned).unwrap();
        assert!(distance(&got, &expected) <= 1e-6);
        let low = Activation::Silu.forward(&x.to_dtype(DType::BF16).unwrap());
        assert_eq!(low.unwrap().dtype(), DType::BF16);
    }
}
