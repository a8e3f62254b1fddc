//! Gradients over the wire: flattened, joined to buckets of a few megabytes in a fixed order, summed over ranks.

use candle_core::{DType, Tensor};

use super::Group;
use crate::error::Result;

/// The numbers in which gradients travel.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Wire {
    /// f32, and f64 for gradients of f64 variables.
    #[default]
    F32,
    /// bf16, in half of the bytes.  What a rank contributes, (n_r / n) θ̄_r, is rounded once, and so is the sum, which is
    /// formed in f32.  With u = 2⁻⁸ the error of an element is at most
    /// u Σ_r |(n_r / n) θ̄_r| + u |θ̄|, up to terms of u²: two unit roundoffs where ranks agree in sign, and more, relative to
    /// a mean, where contributions cancel.  The bound does not hold below 2⁻¹²⁶, where bf16 has fewer digits, and a
    /// contribution beyond 3.39e38 becomes infinite.  Gradients of f64 variables travel in f64.  NCCL sums in bf16 along its
    /// ring, which adds one rounding for each rank.
    Bf16,
}

fn bytes_of(x: &Tensor) -> usize {
    x.elem_count() * x.dtype().size_in_bytes()
}

/// Σ over ranks of flat tensors of f32 and f64, in their order, `bytes` in one message where several fit.
pub(super) fn sum(
    group: &dyn Group,
    parts: &[Tensor],
    bytes: usize,
    wire: Wire,
) -> Result<Vec<Tensor>> {
    let mut sums = Vec::with_capacity(parts.len());
    let mut rest = parts;
    while let Some(first) = rest.first() {
        let mut size = bytes_of(first);
        let joins = |x: &&Tensor| {
            size += bytes_of(x);
            let alike = x.dtype() == first.dtype() && x.device().same_device(first.device());
            alike && size <= bytes
        };
        let count = 1 + rest[1..].iter().take_while(joins).count();
        let (bucket, after) = rest.split_at(count);
        let joined = match bucket {
            [one] => one.clone(),
            several => Tensor::cat(several, 0)?,
        };
        let joined = over_the_wire(group, &joined, wire)?;
        let mut start = 0;
        for part in bucket {
            let length = part.elem_count();
            sums.push(joined.narrow(0, start, length)?);
            start += length;
        }
        rest = after;
    }
    Ok(sums)
}

fn over_the_wire(group: &dyn Group, x: &Tensor, wire: Wire) -> Result<Tensor> {
    match wire {
        Wire::Bf16 if x.dtype() == DType::F32 && group.size() > 1 => {
            let sum = group.sum(&x.to_dtype(DType::BF16)?)?;
            Ok(sum.to_dtype(DType::F32)?)
        }
        _ => group.sum(x),
    }
}
