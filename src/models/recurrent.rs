//! Hidden states that follow an ODE between observations and jump at them.
//!
//! * [`OdeRnn`]: a recurrent [`Cell`] at the observations and a neural ODE between them: ODE-RNN and ODE-GRU
//!   ("Latent ordinary differential equations for irregularly-sampled time series", arXiv 1907.03907), ODE-LSTM
//!   ("Learning long-term dependencies in irregularly-sampled time series", arXiv 2006.04418).
//! * [`GruOdeBayes`]: the same with a probabilistic prediction of every observation before it is made ("GRU-ODE-Bayes",
//!   arXiv 1905.12374).
//! * [`LatentOde`]: an encoder that runs backward in time, and a neural ODE of what it finds, trained by a bound of the
//!   evidence (arXiv 1907.03907).
//!
//! Rows have times of their own: a gap Δ is a solve on [0, 1] at the speed Δ of each row ([`RowSpeed`](crate::nn::RowSpeed)),
//! so that all rows of a batch make a step together, and a field that is integrated tile by tile still is.

mod bayes;
mod cell;
mod latent;

pub use bayes::{GruOdeBayes, Normal, Predictions, Sporadic};
pub use cell::{Cell, GruCell, Hidden, LstmCell, RnnCell};
pub use latent::{Elbo, LatentOde};

use candle_core::{DType, Result, Tensor};

use crate::neural_ode::NeuralOde;
use crate::precision::{at_least_f32, Precision};
use crate::problem::OdeOptions;

/// Whether a gap of time lies before its observation or behind it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Order {
    /// Flow over the gap, then observe: the gap is the time since the last observation.
    #[default]
    FlowFirst,
    /// Observe, then flow over the gap: the gap is how long the observation lasts.
    CellFirst,
}

/// A recurrent cell at observations, and a neural ODE of h between them.
///
/// The neural ODE is that of a [`RowSpeed`](crate::nn::RowSpeed): its state is (h, ln Δ).
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_diffeq::nn::{Activation, Mlp, RowSpeed};
/// use candle_diffeq::models::recurrent::{GruCell, OdeRnn};
/// use candle_diffeq::NeuralOde;
/// use candle_nn::{VarBuilder, VarMap};
/// let (vars, device) = (VarMap::new(), Device::Cpu);
/// let vb = VarBuilder::from_varmap(&vars, DType::F32, &device);
/// let flow = NeuralOde::from_field(&vars, "flow", DType::F32, &device, |vb| {
///     Ok(RowSpeed::new(Mlp::new(&[16, 32, 16], Activation::Tanh, vb)?))
/// })?;
/// let model = OdeRnn::new(flow, GruCell::new(2, 16, vb.pp("cell"))?);
/// let x = Tensor::ones((8, 5, 2), DType::F32, &device)?;            // five observations of eight rows
/// let gaps = Tensor::rand(0f32, 1.0, (8, 5), &device)?;
/// let hs = model.forward(&x, &gaps, None)?;
/// assert_eq!(hs.dims(), [8, 5, 16]);
/// # Ok::<(), candle_diffeq::Error>(())
/// ```
#[derive(Debug)]
pub struct OdeRnn<C> {
    flow: NeuralOde<(Tensor, Tensor)>,
    cell: C,
    order: Order,
}

impl<C: Cell> OdeRnn<C> {
    /// A model that consists of a neural ODE over (h, ln Δ) and a cell.
    ///
    /// Where the neural ODE has one precision for all tensors, ln Δ is read in its state precision: rounded to bf16, it would
    /// change all gaps by up to a hundredth.  A lower precision in which states are stored still rounds it for the gradient.
    pub fn new(flow: NeuralOde<(Tensor, Tensor)>, cell: C) -> Self {
        Self {
            flow: flow.adjusted(speed_in_state_precision),
            cell,
            order: Order::default(),
        }
    }

    /// With gaps before observations, the default, or behind them.
    #[must_use]
    pub fn order(self, order: Order) -> Self {
        Self { order, ..self }
    }

    /// The hidden states, `(rows, times, hidden)`: with [`Order::FlowFirst`] h after each observation, with
    /// [`Order::CellFirst`] h after the gap that follows it.
    ///
    /// x: `(rows, times, features)`; gaps: `(rows, times)`, none of them negative; `seen`: `(rows, times)`, 1 where there is
    /// an observation and 0 where there is none, or all of them.  Where there is none, the state of that row stays as it is,
    /// and x may be anything, also NaN.
    /// Observations begin from h = 0.  A gap of 0 is no step, and has no gradient.
    ///
    /// # Errors
    /// If the shapes do not belong together, a gap is negative or not finite; of the solves, and of candle's operations.
    pub fn forward(&self, x: &Tensor, gaps: &Tensor, seen: Option<&Tensor>) -> Result<Tensor> {
        let (rows, times, _) = x.dims3()?;
        for part in [Some(gaps), seen].into_iter().flatten() {
            if part.dims() != [rows, times] {
                candle_core::bail!(
                    "{times} observations of {rows} rows need gaps and masks ({rows}, {times}), got {:?}",
                    part.dims()
                )
            }
        }
        let gaps = Gaps::new(gaps)?;
        let x = match seen {
            Some(seen) => &zero_unless_seen(x, &seen.unsqueeze(2)?)?,
            None => x,
        };
        let mut hidden = self.cell.start(rows, x.dtype(), x.device())?;
        let mut all = Vec::with_capacity(times);
        for i in 0..times {
            if self.order == Order::FlowFirst {
                hidden.h = gaps.flow(&self.flow, &hidden.h, i)?;
            }
            let x = x.narrow(1, i, 1)?.squeeze(1)?.contiguous()?;
            let next = self.cell.update(&x, &hidden)?;
            hidden = match seen {
                Some(seen) => next.where_seen(&seen.narrow(1, i, 1)?, &hidden)?,
                None => next,
            };
            if self.order == Order::CellFirst {
                hidden.h = gaps.flow(&self.flow, &hidden.h, i)?;
            }
            all.push(hidden.h.clone());
        }
        Tensor::stack(&all, 1)
    }
}

/// The same options with ln Δ, the second tensor of the state, in state precision, unless they say the precision of each.
fn speed_in_state_precision(options: OdeOptions) -> OdeOptions {
    match options.precision {
        Some(p) if options.leaf_precision.is_empty() => OdeOptions {
            leaf_precision: vec![
                p,
                Precision {
                    compute: p.state,
                    ..p
                },
            ],
            ..options
        },
        _ => options,
    }
}

/// x where `seen`, of its shape or with ones in it, is not 0, and 0 elsewhere, whatever x is there.
fn zero_unless_seen(x: &Tensor, seen: &Tensor) -> Result<Tensor> {
    if x.elem_count() == 0 {
        return Ok(x.clone());
    }
    let seen = seen.ne(0.0)?.broadcast_as(x.shape())?;
    seen.where_cond(x, &x.zeros_like()?)
}

/// Gaps of time of every row.
struct Gaps {
    /// ln Δ, `(rows, times)`, f32 or f64.
    logarithms: Tensor,
    /// Whether some row moves.
    moves: Vec<bool>,
}

/// A gap that no state notices, in place of 0: it has a logarithm.
const LEAST: f64 = 1e-30;

impl Gaps {
    fn new(gaps: &Tensor) -> Result<Self> {
        let (rows, times) = gaps.dims2()?;
        let all: Vec<f64> = gaps
            .detach()
            .to_dtype(DType::F64)?
            .flatten_all()?
            .to_vec1()?;
        if let Some(bad) = all.iter().find(|gap| !(gap.is_finite() && **gap >= 0.0)) {
            candle_core::bail!("a gap of time is {bad}: gaps must be finite and not negative")
        }
        let moves = (0..times).map(|i| (0..rows).any(|row| all[row * times + i] > 0.0));
        let gaps = match gaps.dtype() {
            DType::F64 => gaps.clone(),
            _ => gaps.to_dtype(DType::F32)?,
        };
        let least = Tensor::full(LEAST, gaps.shape(), gaps.device())?.to_dtype(gaps.dtype())?;
        Ok(Self {
            logarithms: gaps.maximum(&least)?.log()?,
            moves: moves.collect(),
        })
    }

    /// h after gap i.
    fn flow(&self, ode: &NeuralOde<(Tensor, Tensor)>, h: &Tensor, i: usize) -> Result<Tensor> {
        if !self.moves[i] {
            return Ok(h.clone());
        }
        // In f32 at least: a logarithm that is rounded to bf16 is another gap.
        let wide = at_least_f32(h.dtype());
        let speed = self.logarithms.narrow(1, i, 1)?.to_dtype(wide)?;
        let (hs, _) = ode.solve(&(h.to_dtype(wide)?, speed), &[0.0, 1.0])?;
        let last = match hs.rank() > h.rank() {
            true => hs.get(hs.dim(0)? - 1)?,
            false => hs,
        };
        // A solve may have another dtype of its sums.
        last.to_dtype(h.dtype())
    }
}
