//! Predictions of sporadic observations, each corrected where it is made.

use std::f64::consts::TAU;

use candle_core::{DType, Device, Module, Result, Tensor, D};
use candle_nn::{Init, VarBuilder, VarMap};

use super::{speed_in_state_precision, zero_unless_seen, Cell, Gaps, GruCell, Hidden};
use crate::neural_ode::NeuralOde;
use crate::nn::{Activation, GruField, Perceptron, RowSpeed};
use crate::problem::OdeOptions;

/// Observations of some of the variables at times of every row.
#[derive(Clone, Debug)]
pub struct Sporadic {
    /// `(rows, times, variables)`; what is not observed is anything, also NaN.
    pub values: Tensor,
    /// 1 where a variable was observed, 0 elsewhere, of the same shape.
    pub mask: Tensor,
    /// Time since the observation before, `(rows, times)`; 0 behind the last one of a row.
    pub gaps: Tensor,
}

/// Normal distributions of variables.
#[derive(Clone, Debug)]
pub struct Normal {
    /// `(rows, times, variables)`.
    pub mean: Tensor,
    /// ln σ², of the same shape.
    pub log_variance: Tensor,
}

/// What a model says of every observation.
#[derive(Clone, Debug)]
pub struct Predictions {
    /// Before it is made.
    pub before: Normal,
    /// After it.
    pub after: Normal,
}

/// GRU-ODE-Bayes: h follows a [`GruField`] between observations, a perceptron of h gives a normal distribution of every
/// variable, and a gated unit corrects h at an observation.
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_diffeq::models::recurrent::{GruOdeBayes, Sporadic};
/// use candle_diffeq::OdeOptions;
/// let (vars, device) = (candle_nn::VarMap::new(), Device::Cpu);
/// let model = GruOdeBayes::new(&vars, "m", [2, 16, 8], DType::F32, &device)?.options(OdeOptions::default());
/// let seen = Sporadic {
///     values: Tensor::ones((4, 3, 2), DType::F32, &device)?,
///     mask: Tensor::ones((4, 3, 2), DType::F32, &device)?,
///     gaps: Tensor::ones((4, 3), DType::F32, &device)?,
/// };
/// let predictions = model.forward(&seen)?;
/// predictions.loss(&seen, 1e-4)?.backward()?;
/// assert_eq!(predictions.before.mean.dims(), [4, 3, 2]);
/// # Ok::<(), candle_diffeq::Error>(())
/// ```
#[derive(Debug)]
pub struct GruOdeBayes {
    flow: NeuralOde<(Tensor, Tensor)>,
    /// h at first, before the hyperbolic tangent.
    start: Tensor,
    readout: Perceptron,
    /// Of (x, mean, ln σ², error) of every variable.
    prepare: [Tensor; 2],
    cell: GruCell,
    variables: usize,
}

/// The deviation of an observation that has been made.
const OBSERVED: f64 = 0.01;

impl GruOdeBayes {
    /// A model of so many `[variables, hidden, width]`: the numbers of h, and of the layers between h and each
    /// variable.
    ///
    /// # Errors
    /// Those of the constructors of its parts.
    pub fn new(
        vars: &VarMap,
        prefix: &str,
        [variables, hidden, width]: [usize; 3],
        dtype: DType,
        device: &Device,
    ) -> crate::error::Result<Self> {
        let vb = VarBuilder::from_varmap(vars, dtype, device).pp(prefix);
        let flow =
            NeuralOde::from_field(vars, &format!("{prefix}.flow"), dtype, device, move |vb| {
                Ok(RowSpeed::new(GruField::new(hidden, vb)?))
            })?;
        let widths = [hidden, width, 2 * variables];
        let stdev = (2.0 / (4.0 + width as f64)).sqrt();
        let weights = Init::Randn { mean: 0.0, stdev };
        Ok(Self {
            flow,
            start: vb.get_with_hints(hidden, "start", Init::Const(0.0))?,
            readout: Perceptron::new(&widths, Activation::Relu, vb.pp("readout"))?,
            prepare: [
                vb.get_with_hints((variables, 4, width), "prepare.weight", weights)?,
                vb.get_with_hints((variables, 1, width), "prepare.bias", Init::Const(0.1))?,
            ],
            cell: GruCell::new(width * variables, hidden, vb.pp("cell"))?,
            variables,
        })
    }

    /// How the field between observations is solved, on \[0, 1\] for every gap.
    #[must_use]
    pub fn options(self, options: OdeOptions) -> Self {
        Self {
            flow: self.flow.options(speed_in_state_precision(options)),
            ..self
        }
    }

    /// The distributions before and after every observation.
    ///
    /// # Errors
    /// If the shapes do not belong together, a gap is negative or not finite; of the solves, and of candle's operations.
    pub fn forward(&self, seen: &Sporadic) -> Result<Predictions> {
        let (rows, times, variables) = seen.values.dims3()?;
        if variables != self.variables
            || seen.mask.dims() != seen.values.dims()
            || seen.gaps.dims() != [rows, times]
        {
            candle_core::bail!(
                "a GruOdeBayes model of {} variables got values {:?}, a mask {:?} and gaps {:?}",
                self.variables,
                seen.values.dims(),
                seen.mask.dims(),
                seen.gaps.dims()
            )
        }
        let gaps = Gaps::new(&seen.gaps)?;
        let values = zero_unless_seen(&seen.values, &seen.mask)?;
        let start = Activation::Tanh.forward(&self.start)?;
        let mut h = start
            .unsqueeze(0)?
            .broadcast_as((rows, start.dim(0)?))?
            .contiguous()?;
        let (mut before, mut after) = (vec![], vec![]);
        for i in 0..times {
            h = gaps.flow(&self.flow, &h, i)?;
            let predicted = self.readout.forward(&h)?;
            let at = |x: &Tensor| x.narrow(1, i, 1)?.squeeze(1);
            h = self.observed(&h, &predicted, [at(&values)?, at(&seen.mask)?])?;
            after.push(self.readout.forward(&h)?);
            before.push(predicted);
        }
        let normal = |all: Vec<Tensor>| {
            let all = Tensor::stack(&all, 1)?;
            Ok::<_, candle_core::Error>(Normal {
                mean: all.narrow(2, 0, variables)?,
                log_variance: all.narrow(2, variables, variables)?,
            })
        };
        Ok(Predictions {
            before: normal(before)?,
            after: normal(after)?,
        })
    }

    /// h after an observation; rows without any keep theirs.
    fn observed(&self, h: &Tensor, predicted: &Tensor, [x, mask]: [Tensor; 2]) -> Result<Tensor> {
        let mean = predicted.narrow(1, 0, self.variables)?;
        let log_variance = predicted.narrow(1, self.variables, self.variables)?;
        // Of what was not seen nothing may overflow: zero times infinity is no number.
        let seen_variance = zero_unless_seen(&log_variance, &mask)?;
        let error = ((&x - &mean)? * (seen_variance * -0.5)?.exp()?)?;
        // (variables, rows, 4) times (variables, 4, width).
        let four = Tensor::stack(&[x, mean, log_variance, error], 2)?;
        let [weight, bias] = &self.prepare;
        let features = four.transpose(0, 1)?.contiguous()?.matmul(weight)?;
        let features = features.broadcast_add(bias)?.relu()?;
        let features = features
            .transpose(0, 1)?
            .broadcast_mul(&mask.unsqueeze(2)?)?;
        let features = features.contiguous()?.flatten_from(1)?;
        let old = Hidden {
            h: h.clone(),
            still: None,
        };
        let new = self.cell.update(&features, &old)?;
        let count = mask.ne(0.0)?.to_dtype(DType::F32)?.sum_keepdim(D::Minus1)?;
        let seen = count.ne(0.0)?;
        Ok(new.where_seen(&seen, &old)?.h)
    }
}

impl Normal {
    /// Zeros where nothing was observed, so that nothing overflows there.
    fn where_seen(&self, mask: &Tensor) -> Result<Self> {
        Ok(Self {
            mean: zero_unless_seen(&self.mean, mask)?,
            log_variance: zero_unless_seen(&self.log_variance, mask)?,
        })
    }

    /// −ln p(x) of every number, for x of the shape of `mean`, `(rows, times, variables)`; the result has this shape.
    ///
    /// # Errors
    /// Those of candle's operations.
    pub fn negative_log_likelihood(&self, x: &Tensor) -> Result<Tensor> {
        let error = ((x - &self.mean)? * (&self.log_variance * -0.5)?.exp()?)?;
        ((error.sqr()? + &self.log_variance)? + TAU.ln())? * 0.5
    }

    /// KL(N(mean, σ²) ‖ N(x, s²)) of every number, for x of the shape of `mean`, `(rows, times, variables)`; the result has
    /// this shape.
    ///
    /// # Errors
    /// Those of candle's operations.
    pub fn divergence_from(&self, x: &Tensor, s: f64) -> Result<Tensor> {
        let square = (self.log_variance.exp()? + (&self.mean - x)?.sqr()?)?;
        let logarithms = ((&self.log_variance * -0.5)? + s.ln())?;
        (logarithms + (square * (0.5 / (s * s)))?)? - 0.5
    }
}

impl Predictions {
    /// The loss of GRU-ODE-Bayes, a tensor of shape `()`: (Σ −ln p(x) + λ Σ KL) / n over the n numbers x that were observed.
    /// Here p is the distribution before the observation, and KL is the divergence of the distribution after it from
    /// N(x, 0.01²).  It is 0 if nothing was observed (E. De Brouwer and others, "GRU-ODE-Bayes", NeurIPS 2019).
    ///
    /// # Errors
    /// Those of candle's operations.
    pub fn loss(&self, seen: &Sporadic, lambda: f64) -> Result<Tensor> {
        let values = zero_unless_seen(&seen.values, &seen.mask)?;
        let [before, after] = [&self.before, &self.after].map(|of| of.where_seen(&seen.mask));
        let before = before?.negative_log_likelihood(&values)?;
        let after = after?.divergence_from(&values, OBSERVED)?;
        let all = ((before + (after * lambda)?)? * &seen.mask)?.sum_all()?;
        // Where nothing was observed there is no loss.
        let count = seen.mask.sum_all()?;
        let none = count.eq(0.0)?.to_dtype(count.dtype())?;
        all / (count + none)?
    }
}
