//! The operations as chains of candle's own: they run wherever candle runs, and are the reference
//! for the fused ones.

use candle_core::{DType, Tensor};

use crate::error::Result;
use crate::precision::Rounding;

pub(super) fn combine(terms: &[(f64, &Tensor)], scale: f64, out: Rounding) -> Result<Tensor> {
    let wide = terms.iter().any(|(_, x)| x.dtype() == DType::F64);
    let dtype = if wide { DType::F64 } else { DType::F32 };
    let alone = terms.len() == 1;
    let mut terms = terms.iter().map(|&(c, x)| {
        let x = x.detach().to_dtype(dtype)?;
        if c == 1.0 {
            Ok(x)
        } else {
            x * c
        }
    });
    let Some(first) = terms.next() else {
        return Err(candle_core::Error::Msg("a sum of no terms".into()).into());
    };
    let sum = terms.try_fold(first?, |sum, term| sum + term?)?;
    let sum = if scale == 1.0 { sum } else { (sum * scale)? };
    let sum = if out.to == out.held {
        sum
    } else {
        sum.to_dtype(out.to)?
    };
    let result = sum.to_dtype(out.held)?.contiguous()?;
    // A lone term may have come through untouched; the result is the caller's own.
    Ok(if alone { result.copy()? } else { result })
}

pub(super) fn add_compensated(
    [sum, lost]: [&Tensor; 2],
    terms: &[(f64, &Tensor)],
) -> Result<[Tensor; 2]> {
    let all: Vec<_> = std::iter::once((1.0, lost))
        .chain(terms.iter().copied())
        .collect();
    let added = combine(&all, 1.0, Rounding::cast(sum.dtype()))?;
    let before = sum.detach();
    let sum = (&before + &added)?;
    let of_added = (&sum - &before)?;
    let of_before = (&sum - &of_added)?;
    let lost = ((before - of_before)? + (added - of_added)?)?;
    Ok([sum, lost])
}

pub(super) fn accumulate(acc: &mut Tensor, c: f64, x: &Tensor) -> Result<()> {
    let x = x.detach().to_dtype(acc.dtype())?;
    *acc = (&*acc + (x * c)?)?;
    Ok(())
}

pub(super) fn magnitude(x: &Tensor) -> Result<f64> {
    let x = x.detach().flatten_all()?.to_dtype(DType::F64)?;
    // A maximum may skip NaN; x·0 does not.
    super::note_host_read(x.device());
    let both = Tensor::stack(&[x.abs()?.max(0)?, (x * 0.0)?.sum(0)?], 0)?.to_vec1::<f64>()?;
    Ok(if both[1] == 0.0 { both[0] } else { f64::NAN })
}

pub(super) fn dot(x: &Tensor, y: &Tensor) -> Result<Tensor> {
    let y = y.detach().to_dtype(x.dtype())?;
    Ok((x.detach() * y)?.sum_all()?)
}
