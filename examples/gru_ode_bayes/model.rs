//! GRU-ODE-Bayes, and a gated recurrent unit that is told how much time has passed.

use candle_core::{DType, Device, Module, Tensor, D};
use candle_diffeq::models::recurrent::{Cell, GruCell, GruOdeBayes, Normal, Sporadic};
use candle_diffeq::nn::{Activation, Perceptron};
use candle_diffeq::options::{Output, Steps};
use candle_diffeq::tableau::RK4;
use candle_diffeq::OdeOptions;
use candle_nn::{VarBuilder, VarMap};

use crate::data::VARIABLES;
use common::dtype::Dtype;
use common::Result;

const HIDDEN: usize = 50;
const WIDTH: usize = 25;
/// Steps of RK4 over a gap.
const STEPS: usize = 4;
/// Weight of the divergence after an observation.
const LAMBDA: f64 = 1e-4;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    OdeBayes(Dtype),
    Plain,
}

impl Kind {
    pub(crate) fn name(self) -> String {
        match self {
            Self::OdeBayes(dtype) => format!("GRU-ODE-Bayes, {}", dtype.name()),
            Self::Plain => "GRU, f32".to_owned(),
        }
    }
}

pub(crate) enum Model {
    OdeBayes(Box<GruOdeBayes>),
    Plain { cell: GruCell, readout: Perceptron },
}

impl Model {
    pub(crate) fn new(kind: Kind, vars: &VarMap, device: &Device) -> Result<Self> {
        let vb = VarBuilder::from_varmap(vars, DType::F32, device);
        Ok(match kind {
            Kind::OdeBayes(dtype) => {
                let sizes = [VARIABLES, HIDDEN, WIDTH];
                let model = GruOdeBayes::new(vars, "m", sizes, DType::F32, device)?;
                Self::OdeBayes(Box::new(model.options(OdeOptions {
                    method: RK4,
                    steps: Steps::PerInterval(STEPS),
                    output: Output::Final,
                    precision: Some(dtype.precision()),
                    ..Default::default()
                })))
            }
            Kind::Plain => Self::Plain {
                cell: GruCell::new(2 * VARIABLES + 1, HIDDEN, vb.pp("cell"))?,
                readout: Perceptron::new(
                    &[HIDDEN + 1, WIDTH, 2 * VARIABLES],
                    Activation::Relu,
                    vb.pp("readout"),
                )?,
            },
        })
    }

    /// What is trained.
    pub(crate) fn loss(&self, seen: &Sporadic) -> Result<Tensor> {
        match self {
            Self::OdeBayes(model) => Ok(model.forward(seen)?.loss(seen, LAMBDA)?),
            Self::Plain { .. } => {
                let all = self.before(seen)?.negative_log_likelihood(&seen.values)?;
                Ok(((all * &seen.mask)?.sum_all()? / seen.mask.sum_all()?)?)
            }
        }
    }

    /// The distribution of every observation before it is made.
    pub(crate) fn before(&self, seen: &Sporadic) -> Result<Normal> {
        let (cell, readout) = match self {
            Self::OdeBayes(model) => return Ok(model.forward(seen)?.before),
            Self::Plain { cell, readout } => (cell, readout),
        };
        let (rows, times, _) = seen.values.dims3()?;
        let mut hidden = cell.start(rows, DType::F32, seen.values.device())?;
        let mut since = Tensor::zeros((rows, 1), DType::F32, seen.values.device())?;
        let mut all = vec![];
        for i in 0..times {
            let at = |x: &Tensor| x.narrow(1, i, 1)?.squeeze(1);
            since = (since + seen.gaps.narrow(1, i, 1)?)?;
            all.push(readout.forward(&Tensor::cat(&[&hidden.h, &since], 1)?)?);
            let (x, mask) = (at(&seen.values)?, at(&seen.mask)?);
            let new = cell.update(&Tensor::cat(&[&x, &mask, &since], 1)?, &hidden)?;
            // Where nothing was observed the state stays, and the time since goes on.
            let seen = mask.max_keepdim(D::Minus1)?;
            hidden.h = (&hidden.h + (new.h - &hidden.h)?.broadcast_mul(&seen)?)?;
            since = (&since * (1.0 - seen)?)?;
        }
        let all = Tensor::stack(&all, 1)?;
        Ok(Normal {
            mean: all.narrow(2, 0, VARIABLES)?,
            log_variance: all.narrow(2, VARIABLES, VARIABLES)?,
        })
    }
}
