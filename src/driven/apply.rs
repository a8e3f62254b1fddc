//! Products of the diffusion with noise, and their transposes, in state precision.

use candle_core::{Tensor, D};

use super::{Driven, NoiseType, Part};
use crate::error::{Error, Result, SdeDefect};
use crate::ops;
use crate::schedule::Step;

impl Driven {
    /// Where the noise is declared additive, the diffusion has no derivative with respect to the state.
    pub(crate) fn must_be_additive(
        &self,
        part: Part,
        step: &Step,
        has_derivative: impl FnOnce() -> Result<bool>,
    ) -> Result<()> {
        let declared = self.drive.equation.additive && part == Part::Diffusion;
        match declared && has_derivative()? {
            true => Err(Error::Sde(SdeDefect::NotAdditive {
                step: step.index,
                t: step.t,
            })),
            false => Ok(()),
        }
    }

    /// An evaluation times a weight.
    pub(crate) fn product(&self, part: Part, value: &Tensor, weight: &Tensor) -> Result<Tensor> {
        let value = value.to_dtype(self.state())?;
        Ok(match (part, self.drive.equation.noise) {
            (Part::Diffusion, NoiseType::General { .. }) => {
                value.broadcast_mul(weight)?.sum(D::Minus1)?
            }
            _ => value.broadcast_mul(weight)?,
        })
    }

    /// An evaluation times one in every channel.
    pub(super) fn contracted(&self, part: Part, value: &Tensor) -> Result<Tensor> {
        Ok(match (part, self.drive.equation.noise) {
            (Part::Diffusion, NoiseType::General { .. }) => {
                value.to_dtype(self.state())?.sum(D::Minus1)?
            }
            _ => value.clone(),
        })
    }

    /// The cotangent of an evaluation from that of its product with a weight, or with one.
    pub(crate) fn product_back(
        &self,
        part: Part,
        cotangent: &Tensor,
        weight: Option<&Tensor>,
    ) -> Result<Tensor> {
        let s = cotangent.to_dtype(self.state())?;
        let s = match (part, self.drive.equation.noise) {
            (Part::Diffusion, NoiseType::General { channels }) => {
                let shape = [s.dims(), &[channels]].concat();
                s.unsqueeze(D::Minus1)?.broadcast_as(shape)?
            }
            _ => s,
        };
        Ok(match weight {
            Some(weight) => s.broadcast_mul(weight)?,
            None => s.contiguous()?,
        })
    }

    /// The cotangent of a weight, `(rows, channels)`, from that of its product with an evaluation.
    pub(crate) fn weight_back(
        &self,
        part: Part,
        cotangent: &Tensor,
        value: &Tensor,
    ) -> Result<Tensor> {
        let s = cotangent.to_dtype(self.state())?;
        let value = value.to_dtype(self.state())?;
        let rows = s.dim(0)?;
        Ok(match (part, self.drive.equation.noise) {
            (Part::Diffusion, NoiseType::General { channels }) => {
                let product = value.broadcast_mul(&s.unsqueeze(D::Minus1)?)?;
                product.reshape((rows, (), channels))?.sum(1)?
            }
            (_, NoiseType::Scalar) => (s * value)?.reshape((rows, ()))?.sum_keepdim(1)?,
            _ => (s * value)?.reshape((rows, ()))?,
        })
    }
}

/// Whether any number is not zero.
pub(crate) fn is_any(tensors: &[Tensor]) -> Result<bool> {
    for x in tensors {
        if ops::magnitude(x)? != 0.0 {
            return Ok(true);
        }
    }
    Ok(false)
}
