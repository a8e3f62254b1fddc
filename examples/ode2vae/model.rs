//! Latent dynamics of second order with weights that are drawn once a solve.
//!
//! z = (v, s), v' = f(v, s), s' = v, (ln q)' = −tr ∂f/∂v with f = W₂ tanh(W₁ (v, s) + b₁) + b₂.

use candle_core::{DType, Device, Module, Result as CandleResult, Tensor, D};
use candle_diffeq::nn::{cost_precision, Activation, Perceptron};
use candle_diffeq::tableau::RK4;
use candle_diffeq::{NeuralOde, OdeOptions, Time};
use candle_nn::{VarBuilder, VarMap};
use rand::rngs::StdRng;

use crate::data::{FRAMES, PIXELS};
use common::dtype::Dtype;
use common::random::normal;
use common::Result;

/// Numbers of s, of hidden layers, and the published time between frames.  Four times as long, the second order lets s grow
/// by the square of it: the decoder saw the time, and not the digit.
pub(crate) const LATENT: usize = 8;
const WIDTH: usize = 50;
const HIDDEN: usize = 256;
const STEP: f64 = 0.1;

/// W₁, b₁, W₂, b₂.
type Weights = [Tensor; 4];
type State = (Tensor, Tensor);

pub(crate) struct Model {
    encoder: Perceptron,
    decoder: Perceptron,
    flow: NeuralOde<State, Weights>,
    /// Mean and logarithm of the deviation of every weight.
    means: Weights,
    logarithms: Weights,
}

/// The parts of a bound of the evidence: means over sequences, and of the weights.
pub(crate) struct Bound {
    pub(crate) likelihood: Tensor,
    pub(crate) divergence: Tensor,
    pub(crate) weights: Tensor,
}

impl Model {
    pub(crate) fn new(vars: &VarMap, dtype: Dtype, device: &Device) -> Result<Self> {
        let vb = VarBuilder::from_varmap(vars, DType::F32, device);
        let shapes: [&[usize]; 4] = [&[WIDTH, 2 * LATENT], &[WIDTH], &[LATENT, WIDTH], &[LATENT]];
        let get = |kind: &str, init: f64| -> CandleResult<Weights> {
            let one = |i: usize| {
                let init = candle_nn::Init::Const(init);
                vb.get_with_hints(shapes[i], &format!("f.{i}.{kind}"), init)
            };
            Ok([one(0)?, one(1)?, one(2)?, one(3)?])
        };
        let flow = NeuralOde::with_args(vars, "unused", DType::F32, device, |_| {
            Ok(|_: &Time, y: &State, weights: &Weights| velocity(y, weights))
        })?;
        Ok(Self {
            encoder: Perceptron::new(
                &[PIXELS, HIDDEN, 4 * LATENT],
                Activation::Relu,
                vb.pp("encoder"),
            )?,
            decoder: Perceptron::new(
                &[LATENT, HIDDEN, PIXELS],
                Activation::Relu,
                vb.pp("decoder"),
            )?,
            flow: flow.options(OdeOptions {
                method: RK4,
                leaf_precision: cost_precision(dtype.precision()),
                ..Default::default()
            }),
            means: get("weight", 0.0)?,
            logarithms: get("log_deviation", -4.0)?,
        })
    }

    /// Logits of all frames `(sequences, FRAMES, PIXELS)` from the first `(sequences, PIXELS)`, and the bound's divergence.
    fn unrolled(&self, first: &Tensor, rng: Option<&mut StdRng>) -> Result<(Tensor, Tensor)> {
        let (rows, device) = (first.dim(0)?, first.device().clone());
        let code = self.encoder.forward(first)?;
        let mean = code.narrow(1, 0, 2 * LATENT)?;
        // Deviations begin below the means, which would not be seen among the noise otherwise.
        let logarithm = (code.narrow(1, 2 * LATENT, 2 * LATENT)? - 3.0)?;
        let mut weights = self.means.clone();
        let mut z = mean.contiguous()?;
        let mut noise = z.zeros_like()?;
        if let Some(rng) = rng {
            noise = normal(rng, z.shape(), DType::F32, &device)?;
            z = (z + (logarithm.exp()? * &noise)?)?;
            for (w, logarithm) in weights.iter_mut().zip(&self.logarithms) {
                let noise = normal(rng, w.shape(), DType::F32, &device)?;
                *w = (&*w + (logarithm.exp()? * noise)?)?;
            }
        }
        // ln q(z₀) of the encoder's normal distribution.
        let two_pi = std::f64::consts::TAU.ln();
        let density = ((noise.sqr()? + (logarithm * 2.0)?)? + two_pi)?;
        let density = (density.sum_keepdim(D::Minus1)? * -0.5)?;
        let times: Vec<f64> = (0..FRAMES).map(|i| STEP * i as f64).collect();
        let (zs, densities) = self.flow.given(&weights).solve(&(z, density), &times)?;
        let prior = ((zs.sqr()? + two_pi)?.sum_keepdim(D::Minus1)? * -0.5)?;
        let divergence = (densities - prior)?.sum(0)?.mean_all()?;
        let places = zs.narrow(D::Minus1, LATENT, LATENT)?.contiguous()?;
        let logits = self
            .decoder
            .forward(&places)?
            .reshape((FRAMES, rows, PIXELS))?;
        Ok((logits.transpose(0, 1)?.contiguous()?, divergence))
    }

    /// Frames between 0 and 1 from the first ones, without noise.
    pub(crate) fn frames(&self, first: &Tensor) -> Result<Tensor> {
        let (logits, _) = self.unrolled(first, None)?;
        Ok(candle_nn::ops::sigmoid(&logits)?)
    }

    /// The bound's parts of sequences `(sequences, FRAMES, PIXELS)`.
    pub(crate) fn bound(&self, frames: &Tensor, rng: &mut StdRng) -> Result<Bound> {
        let first = frames.narrow(1, 0, 1)?.squeeze(1)?.contiguous()?;
        let (logits, divergence) = self.unrolled(&first, Some(rng))?;
        // x l − ln(1 + e^l).
        let each = ((frames * &logits)? - Activation::Softplus.forward(&logits)?)?;
        let likelihood = each.sum((1, 2))?.mean_all()?;
        let mut weights = Tensor::zeros((), DType::F32, frames.device())?;
        for (mean, logarithm) in self.means.iter().zip(&self.logarithms) {
            let squares = ((logarithm * 2.0)?.exp()? + mean.sqr()?)?;
            let each = (((squares - 1.0)? * 0.5)? - logarithm)?;
            weights = (weights + each.sum_all()?)?;
        }
        Ok(Bound {
            likelihood,
            divergence,
            weights,
        })
    }
}

/// (v', s') and (ln q)'.
fn velocity((z, density): &State, [w1, b1, w2, b2]: &Weights) -> CandleResult<State> {
    let hidden = z.matmul(&w1.t()?)?.broadcast_add(b1)?.tanh()?;
    let force = hidden.matmul(&w2.t()?)?.broadcast_add(b2)?;
    // ∂f_i/∂v_i = Σ_j W₂[i, j] (1 − tanh²)_j W₁[j, i].
    let diagonal = (w2.t()? * w1.narrow(1, 0, LATENT)?)?.sum_keepdim(1)?;
    let trace = (1.0 - hidden.sqr()?)?.matmul(&diagonal)?;
    let speed = z.narrow(1, 0, LATENT)?;
    let k = Tensor::cat(&[force, speed], 1)?;
    Ok((k, trace.neg()?.to_dtype(density.dtype())?))
}
