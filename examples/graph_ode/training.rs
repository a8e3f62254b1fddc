//! One model from one seed.

use std::time::Instant;

use candle_core::{DType, Device, Tensor, D};
use candle_nn::loss::cross_entropy;
use indicatif::ProgressBar;

use crate::data::{Data, Part};
use crate::model::{Kind, Model};
use common::fit::Fit;
use common::Result;

/// Weight decay, as a term of the loss.
const DECAY: f64 = 5e-4;
/// Updates between evaluations.
const EVERY: usize = 25;

/// What a run came to.
pub(crate) struct Outcome {
    pub(crate) kind: Kind,
    pub(crate) seed: u64,
    /// Updates, and the shares of papers of the validation and of the test set that are right after them.
    pub(crate) curve: Vec<(usize, [f64; 2])>,
    pub(crate) loss: f64,
    pub(crate) seconds: f64,
}

impl Outcome {
    /// On the test set, where the validation set is best.
    pub(crate) fn accuracy(&self) -> f64 {
        let mut best = (f64::NEG_INFINITY, f64::NAN);
        for (_, [validation, test]) in &self.curve {
            if *validation > best.0 {
                best = (*validation, *test);
            }
        }
        best.1
    }

    /// At the end.
    pub(crate) fn last(&self) -> f64 {
        self.curve.last().map_or(f64::NAN, |(_, [_, test])| *test)
    }
}

fn right(logits: &Tensor, part: &Part) -> Result<f64> {
    let own = logits.index_select(&part.papers, 0)?;
    let right = own.argmax(D::Minus1)?.eq(&part.classes)?;
    Ok(right.to_dtype(DType::F64)?.mean_all()?.to_scalar()?)
}

pub(crate) fn train(
    data: &Data,
    kind: Kind,
    (seed, fit): (u64, &Fit),
    device: &Device,
    bar: &ProgressBar,
) -> Result<Outcome> {
    let clock = Instant::now();
    let model = Model::new(data, kind, seed, device)?;
    let mut curve = vec![];
    let mut look = |updates: usize| -> Result<()> {
        let logits = model.logits(data, None)?.detach();
        let of = |part| right(&logits, part);
        curve.push((updates, [of(&data.validation)?, of(&data.test)?]));
        Ok(())
    };
    let losses = fit.run(&model.vars, bar, |i| {
        if i > 0 && i % EVERY == 0 {
            look(i)?;
        }
        let draw = (seed * fit.iterations as u64 + i as u64) * 2 + 1;
        let logits = model.logits(data, Some(draw))?;
        let own = logits.index_select(&data.train.papers, 0)?;
        let loss = cross_entropy(&own, &data.train.classes)?;
        Ok((loss + (model.half_squares()? * DECAY)?)?)
    })?;
    look(fit.iterations)?;
    Ok(Outcome {
        kind,
        seed,
        curve,
        loss: losses[losses.len() - 1],
        seconds: clock.elapsed().as_secs_f64(),
    })
}
