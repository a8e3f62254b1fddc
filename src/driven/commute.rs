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
    /// A state beside y, of which every number is larger than that of y, or smaller where the diffusion is not finite
    /// otherwise, or the same; the diffusion there, and how many evaluations that took.
    fn beside(
        &self,
        field: &Field<'_>,
        step: Step,
        y: &[Tensor],
    ) -> Result<(Vec<Tensor>, Vec<Tensor>, usize)> {
        let moved = |side: f64| {
            let each = y.iter().map(|y| y + (by(y)? * side)?);
            each.collect::<candle_core::Result<Vec<_>>>()
        };
        let (mut base, mut evaluations) = (moved(1.0)?, 0);
        let mut others = [-1.0, 0.0].into_iter();
        loop {
            let evaluated = self.start(field, step, &base)?;
            evaluations += evaluated.len();
            let values = diffusion(&evaluated).unwrap_or_default().to_vec();
            let kept = values.iter().map(finite_mask);
            let kept = kept.collect::<candle_core::Result<Vec<_>>>()?;
            let mut is_lost = false;
            for kept in &kept {
                is_lost |= kept.min_all()?.to_scalar::<u8>()? == 0;
            }
            let Some(side) = others.next().filter(|_| is_lost) else {
                return Ok((base, values, evaluations));
            };
            for ((base, other), kept) in base.iter_mut().zip(moved(side)?).zip(kept) {
                *base = kept.where_cond(base, &other)?;
            }
        }
    }

    /// Refuses diagonal noise whose diffusion of one component changes with another component that has noise.  `steps` are
    /// the first and the last step, `start` are the evaluations at y in the first; returns how many more were made.
    ///
    /// Components are moved from a state that is not y, at both times, because the diffusion may be zero at y or at the start
    /// by chance, such as that of a state that begins at zero; each is moved by a length of its own, so that changes do not
    /// cancel.  A component has noise if its diffusion is not zero at y or at that state.  The test is local: it does not see
    /// a diffusion that reads other components only far from y.
    ///
    /// With d components, log₂ d pairs of states are enough: the bits of an index say in which of them the component is
    /// moved, and the indices of two components differ in a bit.
    pub(crate) fn check_commuting(
        &self,
        field: &Field<'_>,
        steps: [Step; 2],
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
        let (base, values_there, mut evaluations) = self.beside(field, steps[0], y)?;
        let at_end = self.start(field, steps[1], &base)?;
        evaluations += at_end.len();
        let at_end = diffusion(&at_end).unwrap_or_default().to_vec();
        let there = [values_there, at_end];
        let mut noisy = vec![];
        for (leaf, here) in values.iter().enumerate() {
            let mut any = here.ne(0.0)?;
            for there in &there {
                any = (any + there[leaf].ne(0.0)?)?;
            }
            noisy.push(any.ne(0u8)?);
        }
        let bits = 0..components.next_power_of_two().trailing_zeros();
        let halves: Vec<_> = bits.flat_map(|bit| [(bit, 0), (bit, 1)]).collect();
        let all = steps.into_iter().zip(&there);
        for ((step, values), &(bit, side)) in
            all.flat_map(|at| halves.iter().map(move |half| (at, half)))
        {
            let is_moved = |index: usize| (index >> bit) & 1 == side;
            let (mut moved, mut others, mut first) = (base.clone(), vec![], 0);
            for ((y, noisy), width) in moved.iter_mut().zip(&noisy).zip(&widths) {
                let lengths = lengths(y, first..first + width, is_moved)?;
                others.push(lengths.eq(0.0)?);
                let noisy = noisy.to_dtype(y.dtype())?;
                *y = (&*y + (by(y)? * noisy.broadcast_mul(&lengths)?)?)?;
                first += width;
            }
            let again = self.start(field, step, &moved)?;
            evaluations += again.len();
            let now = diffusion(&again).unwrap_or_default();
            for (leaf, ((then, now), others)) in values.iter().zip(now).zip(&others).enumerate() {
                if changes(then, now, others)? {
                    return Err(Error::Sde(SdeDefect::AdaptiveCoupled { leaf }));
                }
            }
        }
        Ok(evaluations)
    }
}

/// Whether any of these numbers has changed that was finite and is among the `others`, `(1, …)`, which were not moved.
fn changes(then: &Tensor, now: &Tensor, others: &Tensor) -> Result<bool> {
    // Selected, not multiplied: what was moved may have left the domain of its own diffusion.
    let change = (now - then)?.abs()?.to_dtype(DType::F64)?;
    let others = (others.broadcast_as(change.shape())? * finite_mask(then)?)?;
    let change = others.where_cond(&change, &change.zeros_like()?)?;
    let change = change.sum_all()?.to_scalar::<f64>()?;
    Ok(change > 0.0 || change.is_nan())
}

/// A quarter of the size of every number.
fn by(y: &Tensor) -> candle_core::Result<Tensor> {
    (y.abs()? + 1.0)? * 0.25
}

/// One where a number is finite, otherwise zero.
fn finite_mask(x: &Tensor) -> candle_core::Result<Tensor> {
    (x * 0.0)?.eq(0.0)
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

/// How far a component is moved, by its index among all, in units of its size: between one and two where it `is_moved`,
/// otherwise zero; (1, …), like a row of y.
fn lengths(
    y: &Tensor,
    indices: std::ops::Range<usize>,
    is_moved: impl Fn(usize) -> bool,
) -> Result<Tensor> {
    const GOLDEN: f64 = 0.618_033_988_749_894_9;
    let length = |i: usize| match is_moved(i) {
        true => 1.0 + (i as f64 * GOLDEN).fract(),
        false => 0.0,
    };
    let numbers: Vec<f64> = indices.map(length).collect();
    let shape = [&[1], &y.dims()[1..]].concat();
    let lengths = Tensor::from_vec(numbers, shape, &Device::Cpu)?;
    Ok(lengths.to_dtype(y.dtype())?.to_device(y.device())?)
}
