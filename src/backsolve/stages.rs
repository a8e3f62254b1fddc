//! The stages of a backward step, and what they give of θ̄ and t̄.

use candle_core::{DType, Tensor};

use super::augmented::Augmented;
use crate::accumulator::Accumulator;
use crate::error::{Error, PullbackDefect, Result};
use crate::field::{pullback, LateGradients};
use crate::ops;
use crate::precision::Rounding;
use crate::step::Increments;

/// A velocity of what is solved, and the parts of θ̄' and t̄' that came with it.
pub(super) type Evaluated<'a> = (Vec<Tensor>, Stage<'a>);

/// (∂f/∂θ)ᵀ λ and (∂f/∂t)ᵀ λ of one evaluation, still multiplied by S.
#[derive(Clone)]
pub(super) struct Stage<'a> {
    pub(super) theta: Theta<'a>,
    pub(super) t: Option<Tensor>,
    /// 1 / S.
    pub(super) unscale: f64,
    /// Where it was evaluated.
    pub(super) at: Place,
}

/// (∂f/∂θ)ᵀ λ by parameter, or how it is formed.
#[derive(Clone)]
pub(super) enum Theta<'a> {
    Known(Vec<Option<Tensor>>),
    Later(LateGradients<'a>),
}

/// A stage of a step.
#[derive(Clone, Copy)]
pub(super) struct Place {
    pub(super) step: usize,
    pub(super) stage: usize,
    pub(super) t: f64,
}

/// The stages of an attempt; `None` where one was not evaluated.
#[derive(Default)]
pub(super) struct Stages<'a> {
    pub(super) ks: Increments,
    pub(super) parts: Vec<Option<Stage<'a>>>,
}

impl<'a> Stages<'a> {
    /// Of a step whose first stage is known, if it is.
    pub(super) fn after(first: Option<&Evaluated<'a>>) -> Self {
        match first {
            Some((k, stage)) => Self {
                ks: vec![Some(k.clone())],
                parts: vec![Some(stage.clone())],
            },
            None => Self::default(),
        }
    }

    /// The only stage.
    pub(super) fn first(self) -> Option<Evaluated<'a>> {
        let (k, stage) = self.ks.into_iter().zip(self.parts).next()?;
        k.zip(stage)
    }

    /// The last stage of all of them.
    pub(super) fn last(mut self) -> Option<Evaluated<'a>> {
        self.ks.pop().flatten().zip(self.parts.pop().flatten())
    }

    /// The stages that have a weight, with −h c_i / S.
    fn weighted<'s>(
        &'s self,
        h: f64,
        weights: &'s [f64],
    ) -> impl Iterator<Item = (f64, &'s Stage<'a>)> {
        let parts = self.parts.iter().zip(weights).filter(|(_, c)| **c != 0.0);
        parts.filter_map(move |(stage, c)| {
            let stage = stage.as_ref()?;
            Some((-h * c * stage.unscale, stage))
        })
    }

    /// −h Σ c_i (∂f/∂θ)ᵀ λ_i of parameter number i, which is `like` this one.
    pub(super) fn change(
        &self,
        h: f64,
        weights: &[f64],
        i: usize,
        like: &Tensor,
        state: Rounding,
    ) -> Result<Tensor> {
        let terms = self.weighted(h, weights);
        let terms = terms.filter_map(|(c, stage)| Some((c, stage.known(i)?)));
        let terms: Vec<_> = terms.collect();
        match terms.as_slice() {
            [] => Ok(like.zeros_like()?),
            terms => ops::combine(terms, 1.0, state),
        }
    }

    /// −h Σ c_i (∂f/∂t)ᵀ λ_i.
    pub(super) fn time_change(&self, h: f64, weights: &[f64]) -> Result<f64> {
        let terms = self.weighted(h, weights);
        let terms = terms.filter_map(|(c, stage)| Some((c, stage.t.as_ref()?)));
        terms.map(|(c, t)| Ok(c * number(t)?)).sum()
    }

    /// θ̄ −= h Σ c_i (∂f/∂θ)ᵀ λ_i, in state precision.  What is not known is formed here.
    pub(super) fn add_to(
        &self,
        theta: &mut Accumulator,
        augmented: &Augmented<'_>,
        h: f64,
        weights: &[f64],
    ) -> Result<()> {
        for (c, stage) in self.weighted(h, weights) {
            stage.add_to(theta, augmented, c)?;
        }
        Ok(())
    }
}

impl Stage<'_> {
    /// (∂f/∂θ)ᵀ λ of parameter number i, where it is known and not zero.
    pub(super) fn known(&self, i: usize) -> Option<&Tensor> {
        match &self.theta {
            Theta::Known(grads) => grads[i].as_ref(),
            Theta::Later(_) => None,
        }
    }

    /// (∂f/∂θ)ᵀ λ by parameter.
    fn theta(&self, augmented: &Augmented<'_>) -> Result<Vec<Option<Tensor>>> {
        match &self.theta {
            Theta::Known(grads) => Ok(grads.clone()),
            Theta::Later(form) => {
                let invalid = |defect| self.at.invalid(defect);
                let mut params = form()?;
                pullback::check_parameters(augmented.theta, &params).map_err(invalid)?;
                let grads = augmented.theta.iter().map(|p| params.remove(p));
                let grads = grads.map(|grad| grad.map(|grad| grad.detach())).collect();
                pullback::check_rest(augmented.field, &params).map_err(invalid)?;
                Ok(grads)
            }
        }
    }

    /// θ̄ += c S (∂f/∂θ)ᵀ λ.
    pub(super) fn add_to(
        &self,
        theta: &mut Accumulator,
        augmented: &Augmented<'_>,
        c: f64,
    ) -> Result<()> {
        for (i, grad) in self.theta(augmented)?.iter().enumerate() {
            if let Some(grad) = grad {
                theta.add(i, c, grad)?;
            }
        }
        Ok(())
    }

    /// −(∂f/∂t)ᵀ λ.
    pub(super) fn slope_of_time(&self) -> Result<f64> {
        match &self.t {
            Some(t) => Ok(-self.unscale * number(t)?),
            None => Ok(0.0),
        }
    }
}

impl Place {
    pub(super) fn invalid(self, defect: PullbackDefect) -> Error {
        let Self { step, stage, t } = self;
        Error::InvalidPullback {
            step,
            stage,
            t,
            defect,
        }
    }
}

fn number(x: &Tensor) -> Result<f64> {
    ops::note_host_read(x.device());
    Ok(x.reshape(())?.to_dtype(DType::F64)?.to_scalar()?)
}
