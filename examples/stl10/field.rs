//! The field of the network: a convolution there and back, with its pull-back written by hand.

use candle_core::backprop::GradStore;
use candle_core::{DType, Result, Tensor};
use candle_diffeq::{
    fields::{Cotangents, Pullback},
    Time, VectorField,
};
use candle_nn::{Init, VarBuilder};

/// Whether a perturbation shrinks or grows along the solution.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Sign {
    Stable,
    Unstable,
}

/// f(y) = ∓ Kᵀ norm(relu(K y + b)) with 3 × 3 filters K, their transpose Kᵀ, and an instance norm.
///
/// relu is monotone, so that without the norm the Jacobian −Kᵀ D K is symmetric and has no positive
/// eigenvalue (Ruthotto & Haber, 2020); the norm scales every channel and takes out its mean.
pub(crate) struct ThereAndBack {
    /// `(channels, channels, 3, 3)`.
    weight: Tensor,
    bias: Tensor,
    sign: f64,
}

const EPSILON: f64 = 1e-5;

/// What an evaluation computed on the way.
struct Evaluation {
    velocity: Tensor,
    /// The patches of y.
    input: Tensor,
    /// relu(K y + b), `(batch, channels, pixels)`.
    rectified: Tensor,
    /// The same, normed, and 1 / its deviation, `(batch, channels, 1)`.
    normal: Tensor,
    scale: Tensor,
}

impl ThereAndBack {
    /// Variables `weight` and `bias`.
    pub(crate) fn new(channels: usize, sign: Sign, vb: VarBuilder<'_>) -> Result<Self> {
        let shape = (channels, channels, 3, 3);
        Ok(Self {
            weight: vb.get_with_hints(shape, "weight", Init::Const(0.0))?,
            bias: vb.get_with_hints(channels, "bias", Init::Const(0.0))?,
            sign: match sign {
                Sign::Stable => -1.0,
                Sign::Unstable => 1.0,
            },
        })
    }

    /// K on patches.
    fn there(&self, patches: &Tensor) -> Result<Tensor> {
        self.weight.flatten_from(1)?.broadcast_matmul(patches)
    }

    /// Kᵀ on patches: filters turned round, inputs and outputs exchanged.
    fn back(&self, patches: &Tensor) -> Result<Tensor> {
        let turned = self.weight.transpose(0, 1)?.contiguous()?.flip(&[2, 3])?;
        turned.flatten_from(1)?.broadcast_matmul(patches)
    }

    fn evaluate(&self, y: &Tensor) -> Result<Evaluation> {
        let input = patches(y)?;
        let bias = self.bias.reshape(((), 1))?;
        let rectified = self.there(&input)?.broadcast_add(&bias)?.relu()?;
        // Low precision is normed in f32.
        let wide = rectified.to_dtype(wider(y.dtype()))?;
        let centred = wide.broadcast_sub(&wide.mean_keepdim(2)?)?;
        let scale = (centred.sqr()?.mean_keepdim(2)? + EPSILON)?
            .sqrt()?
            .recip()?;
        let normal = centred.broadcast_mul(&scale)?.to_dtype(y.dtype())?;
        let velocity = self.back(&patches(&normal.reshape(y.shape())?)?)?;
        Ok(Evaluation {
            velocity: (velocity * self.sign)?.reshape(y.shape())?,
            input,
            rectified,
            normal,
            scale,
        })
    }

    fn detach(&self) -> Self {
        Self {
            weight: self.weight.detach(),
            bias: self.bias.detach(),
            sign: self.sign,
        }
    }

    /// Cotangents of y, K and b, in that order; `self` is detached.
    fn pull(&self, at: &Evaluation, v: &Tensor) -> Result<[Tensor; 3]> {
        let shape = v.shape();
        let v = patches(&(v * self.sign)?)?;
        let g = self.there(&v)?.to_dtype(at.scale.dtype())?;
        let normal = at.normal.to_dtype(at.scale.dtype())?;
        let along = normal.broadcast_mul(&(&g * &normal)?.mean_keepdim(2)?)?;
        let g = (g.broadcast_sub(&g.mean_keepdim(2)?)? - along)?.broadcast_mul(&at.scale)?;
        let positive = at.rectified.gt(0.0)?.to_dtype(v.dtype())?;
        let g = (g.to_dtype(v.dtype())? * positive)?;
        // K occurs twice.
        let of = |patches: &Tensor, g: &Tensor| g.matmul(&patches.t()?)?.sum(0);
        let weight = (of(&at.input, &g)? + of(&v, &at.normal)?)?;
        Ok([
            self.back(&patches(&g.reshape(shape)?)?)?.reshape(shape)?,
            weight.reshape(self.weight.shape())?,
            g.sum((0, 2))?,
        ])
    }
}

fn wider(dtype: DType) -> DType {
    match dtype {
        DType::F64 => DType::F64,
        _ => DType::F32,
    }
}

/// What 3 × 3 filters read, zeros beyond the border: `(batch, channels, height, width)` to `(batch,
/// channels × 9, pixels)`.
fn patches(x: &Tensor) -> Result<Tensor> {
    let (batch, channels, height, width) = x.dims4()?;
    let x = x.pad_with_zeros(2, 1, 1)?.pad_with_zeros(3, 1, 1)?;
    let tap = |n: usize| x.narrow(2, n / 3, height)?.narrow(3, n % 3, width);
    let taps = (0..9).map(tap).collect::<Result<Vec<_>>>()?;
    Tensor::stack(&taps, 2)?.reshape((batch, channels * 9, height * width))
}

impl VectorField for ThereAndBack {
    fn velocity(&self, _: &Time, y: &Tensor) -> Result<Tensor> {
        Ok(self.evaluate(y)?.velocity)
    }

    fn vjp<'f>(&'f self, _: &Time, y: &Tensor) -> Result<(Tensor, Pullback<'f, Tensor>)> {
        let plain = self.detach();
        let at = plain.evaluate(&y.detach())?;
        let velocity = at.velocity.clone();
        let pull = move |v: &Tensor| {
            let [of_y, of_weight, of_bias] = plain.pull(&at, v)?;
            let mut params = GradStore::default();
            params.insert(&self.weight, of_weight);
            params.insert(&self.bias, of_bias);
            Ok(Cotangents {
                y: of_y,
                t: None,
                params,
            })
        };
        Ok((velocity, Box::new(pull)))
    }

    fn parameters(&self) -> Option<Vec<Tensor>> {
        Some(vec![self.weight.clone(), self.bias.clone()])
    }
}
