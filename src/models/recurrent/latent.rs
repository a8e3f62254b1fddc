//! Series as solutions of a latent ODE, whose start is inferred by running backward in time.

use std::f64::consts::TAU;

use candle_core::{DType, Device, Module, Result, Tensor, D};
use candle_nn::{VarBuilder, VarMap};

use super::{speed_in_state_precision, GruCell, OdeRnn};
use crate::neural_ode::NeuralOde;
use crate::nn::{Activation, Linear, Mlp, Perceptron, RowSpeed};
use crate::options::Output;
use crate::problem::OdeOptions;
use crate::tableau::EULER;

/// z(t₀) ~ N(m, s²) with (m, s) from an ODE-GRU that reads the series backward in time, z' = f(z), x(t) ~ N(W z(t) + b, σ²).
///
/// Rows share their times.  The noise of z(t₀) is drawn by the caller.
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_diffeq::models::recurrent::LatentOde;
/// let (vars, device) = (candle_nn::VarMap::new(), Device::Cpu);
/// let model = LatentOde::new(&vars, "m", [1, 16, 4, 32], 0.01, DType::F32, &device)?;
/// let (x, times) = (Tensor::ones((8, 5, 1), DType::F32, &device)?, [0.0, 0.3, 0.4, 0.9, 1.0]);
/// let noise = Tensor::randn(0f32, 1.0, (8, 4), &device)?;
/// let elbo = model.elbo(&x, &times, &noise)?;
/// elbo.loss(1.0)?.backward()?;
/// let (mean, _) = model.encode(&x, &times)?;
/// assert_eq!(model.decode(&mean, &[0.0, 1.0, 2.0])?.dims(), [8, 3, 1]);
/// # Ok::<(), candle_diffeq::Error>(())
/// ```
#[derive(Debug)]
pub struct LatentOde {
    encoder: OdeRnn<GruCell>,
    head: Perceptron,
    flow: NeuralOde<Tensor>,
    readout: Linear,
    sigma: f64,
}

/// The two parts of a bound of the evidence, a number for each row: ln p(x) ≥ n · `likelihood` − `divergence` in the mean over
/// z, for n numbers x of a row (times · features).  So [`loss`](Self::loss) with β = 1/n is the bound, divided by −n.
#[derive(Clone, Debug)]
pub struct Elbo {
    /// ln p(x | z), the mean over times and features.
    pub likelihood: Tensor,
    /// KL(N(m, s²) ‖ N(0, 1)).
    pub divergence: Tensor,
}

impl Elbo {
    /// −likelihood + β divergence, the mean over rows.
    ///
    /// # Errors
    /// Those of candle's operations.
    pub fn loss(&self, beta: f64) -> Result<Tensor> {
        ((&self.divergence * beta)? - &self.likelihood)?.mean_all()
    }
}

impl LatentOde {
    /// A model of the sizes `[features, recurrent, latent, width]`: the features of x, of the encoder's state and of z, and
    /// the units of each hidden layer.  `sigma` is the deviation σ of observations.
    ///
    /// # Errors
    /// Those of the constructors of its parts, and a σ that is not above 0.
    pub fn new(
        vars: &VarMap,
        prefix: &str,
        [features, recurrent, latent, width]: [usize; 4],
        sigma: f64,
        dtype: DType,
        device: &Device,
    ) -> crate::error::Result<Self> {
        if !(sigma > 0.0 && sigma.is_finite()) {
            let message = format!("LatentOde needs a finite sigma above 0, got {sigma}");
            return Err(candle_core::Error::Msg(message).into());
        }
        let vb = VarBuilder::from_varmap(vars, dtype, device).pp(prefix);
        let name = |part: &str| format!("{prefix}.{part}");
        let back = NeuralOde::from_field(vars, &name("back"), dtype, device, move |vb| {
            let widths = [recurrent, width, recurrent];
            Ok(RowSpeed::new(Mlp::new(&widths, Activation::Tanh, vb)?))
        })?;
        let back = back.options(OdeOptions {
            method: EULER,
            ..OdeOptions::default()
        });
        let flow = NeuralOde::from_field(vars, &name("flow"), dtype, device, move |vb| {
            Mlp::new(&[latent, width, width, latent], Activation::Tanh, vb)
        })?;
        let widths = [recurrent, width, 2 * latent];
        Ok(Self {
            encoder: OdeRnn::new(back, GruCell::new(features, recurrent, vb.pp("cell"))?),
            head: Perceptron::new(&widths, Activation::Tanh, vb.pp("head"))?,
            flow,
            readout: Linear::new(latent, features, vb.pp("readout"))?,
            sigma,
        })
    }

    /// How the encoder is solved over a gap, on \[0, 1\] (by default in one step of Euler's method), and the latent ODE,
    /// whose states at all times are always returned.
    #[must_use]
    pub fn options(self, encoder: OdeOptions, latent: OdeOptions) -> Self {
        let Self { encoder: rnn, .. } = self;
        Self {
            encoder: OdeRnn {
                flow: rnn.flow.options(speed_in_state_precision(encoder)),
                ..rnn
            },
            flow: self.flow.options(OdeOptions {
                output: Output::All,
                ..latent
            }),
            head: self.head,
            readout: self.readout,
            sigma: self.sigma,
        }
    }

    /// m and s of z(t₀), `(rows, latent)` each, of a series x `(rows, times, features)` at rising times.
    ///
    /// # Errors
    /// If there is not one time for each observation, or times fall; of the solves, and of candle's operations.
    pub fn encode(&self, x: &Tensor, times: &[f64]) -> Result<(Tensor, Tensor)> {
        let (rows, count, _) = x.dims3()?;
        if count != times.len() || count == 0 {
            candle_core::bail!(
                "a series needs at least one observation and a time for each, got {count} observations and {} times",
                times.len()
            )
        }
        let last = Tensor::arange_step(count as i64 - 1, -1, -1, x.device())?;
        let backward = x.index_select(&last.to_dtype(DType::U32)?, 1)?;
        let mut gaps = vec![0.0];
        gaps.extend(times.windows(2).rev().map(|pair| pair[1] - pair[0]));
        let gaps = Tensor::new(gaps.as_slice(), x.device())?.to_dtype(x.dtype())?;
        let gaps = gaps
            .unsqueeze(0)?
            .broadcast_as((rows, count))?
            .contiguous()?;
        let hs = self.encoder.forward(&backward, &gaps, None)?;
        let h = hs.narrow(1, count - 1, 1)?.squeeze(1)?.contiguous()?;
        let both = self.head.forward(&h)?;
        let latent = self.head.outputs() / 2;
        let deviation = both.narrow(1, latent, latent)?.contiguous()?;
        let deviation = Activation::Softplus.forward(&deviation)?;
        // Never quite zero, whose logarithm is infinite.
        Ok((
            both.narrow(1, 0, latent)?.contiguous()?,
            (deviation + 1e-4)?,
        ))
    }

    /// The series from z at the first of these times, `(rows, times, features)`.
    ///
    /// # Errors
    /// Those of the solve, and of candle's operations.
    pub fn decode(&self, z: &Tensor, times: &[f64]) -> Result<Tensor> {
        let zs = self.flow.solve(z, times)?.to_dtype(z.dtype())?;
        self.readout.forward(&zs)?.transpose(0, 1)?.contiguous()
    }

    /// The bound of the evidence of x at these times, with z(t₀) = m + s ∘ `noise`, `(rows, latent)`.
    ///
    /// # Errors
    /// As [`encode`](Self::encode).
    pub fn elbo(&self, x: &Tensor, times: &[f64], noise: &Tensor) -> Result<Elbo> {
        let (mean, deviation) = self.encode(x, times)?;
        let z = (&mean + (&deviation * noise)?)?;
        let error = ((self.decode(&z, times)? - x)? / self.sigma)?;
        let constant = (TAU * self.sigma * self.sigma).ln();
        let likelihood = (error.sqr()?.flatten_from(1)?.mean(D::Minus1)? + constant)? * -0.5;
        let squares = (mean.sqr()? + deviation.sqr()?)?;
        let divergence = ((squares - 1.0)? * 0.5)? - deviation.log()?;
        Ok(Elbo {
            likelihood: likelihood?,
            divergence: divergence?.sum(D::Minus1)?,
        })
    }
}
