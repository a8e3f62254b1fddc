//! Training of a classifier, and how well it does.

use candle_core::{DType, Tensor, D};
use candle_nn::loss::cross_entropy;
use candle_nn::VarMap;
use indicatif::ProgressBar;

use super::fit::Fit;
use super::Result;

/// Points and their classes.
pub struct Sample {
    /// `(rows, features)`.
    pub x: Tensor,
    /// `(rows)`, u32.
    pub classes: Tensor,
}

impl Sample {
    /// The classes as numbers.
    pub fn numbers(&self) -> Result<Vec<u32>> {
        Ok(self.classes.to_vec1()?)
    }

    /// The share of rows whose largest logit is that of their class.
    pub fn accuracy(&self, logits: &Tensor) -> Result<f64> {
        let right = logits.argmax(D::Minus1)?.eq(&self.classes)?;
        Ok(right.to_dtype(DType::F64)?.mean_all()?.to_scalar()?)
    }

    /// Trains on the whole sample by cross entropy.
    pub fn fit(
        &self,
        (fit, vars): (&Fit, &VarMap),
        bar: &ProgressBar,
        logits: impl Fn(&Tensor) -> Result<Tensor>,
    ) -> Result<Vec<f64>> {
        fit.run(vars, bar, |_| {
            Ok(cross_entropy(&logits(&self.x)?, &self.classes)?)
        })
    }
}
