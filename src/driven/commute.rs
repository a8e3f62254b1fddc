//! Whether diagonal noise commutes: the diffusion of a component reads no other component that has noise.
//!
//! The columns g_i e_i and g_j e_j of diagonal noise commute if g_i reads y_i only.  Otherwise the solution depends on
//! the Lévy areas of the path, as under general noise, and steps that are chosen by the noise change the limit.

use candle_core::{DType, Device, Tensor};

use super::{Driven, Evaluated, NoiseType, Part};
use crate::error::{Error, Result, SdeDefect};
use crate::field::Field;
use crate::schedule::Step;

impl Driven {
    /// Refuses diagonal noise whose diffusion of one component changes with another component that has noise.  `start` are
    /// the evaluations at y; returns how many more were made.
    ///
    /// A component has noise if its diffusion is not zero at y, or where all components are moved: at y it may be zero by
    /// chance, such as that of a state that begins at zero.  A diffusion that is zero at the start for every state passes.
    ///
    /// With d components, log₂ d pairs of states are enough: the bits of an index say in which of them the component is
    /// moved, and the indices of two components differ in a bit.
    pub(crate) fn check_commuting(
        &self,
        field: &Field<'_>,
        step: Step,
        y: &[Tensor],
        start: &[Evaluated<()>],
    ) -> Result<usize> {
        let equation = self.drive.equation;
        if equation.additive || equation.noise != NoiseType::Diagonal {
            return Ok(0);
        }
        let Some(values) = diffusion(start) else {
            return Ok(0);
        };
        let widths: Vec<usize> = values.iter().map(width).collect();
        let components: usize = widths.iter().sum();
        let by = |y: &Tensor| (y.abs()? + 1.0)? * 0.25;
        let elsewhere = y.iter().map(|y| y + by(y)?);
        let elsewhere = elsewhere.collect::<candle_core::Result<Vec<_>>>()?;
        let there = self.start(field, step, &elsewhere)?;
        let mut evaluations = there.len();
        let noisy = values.iter().zip(diffusion(&there).unwrap_or_default());
        let noisy = noisy.map(|(here, there)| (here.ne(0.0)? + there.ne(0.0)?)?.ne(0u8));
        let noisy = noisy.collect::<candle_core::Result<Vec<_>>>()?;
        for bit in 0..components.next_power_of_two().trailing_zeros() {
            for side in [0, 1] {
                let is_moved = |index: usize| (index >> bit) & 1 == side;
                let mut moved = y.to_vec();
                let mut others = vec![];
                let mut first = 0;
                for ((y, noisy), width) in moved.iter_mut().zip(&noisy).zip(&widths) {
                    let mask = mask(y, first..first + width, is_moved)?;
                    let noisy = noisy.to_dtype(y.dtype())?;
                    others.push((1.0 - &mask)?);
                    *y = (&*y + (by(y)? * noisy.broadcast_mul(&mask)?)?)?;
                    first += width;
                }
                let again = self.start(field, step, &moved)?;
                evaluations += again.len();
                let now = diffusion(&again).unwrap_or_default();
                for (leaf, ((then, now), others)) in values.iter().zip(now).zip(&others).enumerate()
                {
                    // Selected, not multiplied: what was moved may have left the domain of its own diffusion.
                    let change = (now - then)?.abs()?.to_dtype(DType::F64)?;
                    let others = others.ne(0.0)?.broadcast_as(change.shape())?;
                    let change = others.where_cond(&change, &change.zeros_like()?)?;
                    let change = change.sum_all()?.to_scalar::<f64>()?;
                    if change > 0.0 || change.is_nan() {
                        return Err(Error::Sde(SdeDefect::AdaptiveCoupled { leaf }));
                    }
                }
            }
        }
        Ok(evaluations)
    }
}

/// The first values of the diffusion.
fn diffusion(evaluated: &[Evaluated<()>]) -> Option<&[Tensor]> {
    let of = evaluated.iter().find(|e| e.part == Part::Diffusion);
    of.map(|e| e.value.as_slice())
}

/// Components of a row.
fn width(g: &Tensor) -> usize {
    g.dims().iter().skip(1).product()
}

/// One where a component, by its index among all, `is_moved`, otherwise zero: (1, …), like a row of y.
fn mask(
    y: &Tensor,
    indices: std::ops::Range<usize>,
    is_moved: impl Fn(usize) -> bool,
) -> Result<Tensor> {
    let numbers: Vec<f32> = indices.map(|i| f32::from(u8::from(is_moved(i)))).collect();
    let shape = [&[1], &y.dims()[1..]].concat();
    let mask = Tensor::from_vec(numbers, shape, &Device::Cpu)?;
    Ok(mask.to_device(y.device())?.to_dtype(y.dtype())?)
}
