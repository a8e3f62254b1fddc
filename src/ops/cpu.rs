//! The operations as fused loops over blocks that stay in L1: each operand is read once, each
//! result written once, on the vector unit and, where there is enough to do, on all threads.

mod numbers;

use candle_core::{CpuStorage, DType, InplaceOp2, Layout, Storage, StorageRef, Tensor};
use half::{bf16, f16};
use pulp::{Simd, WithSimd};

use crate::error::{Error, Result};
use crate::precision::Rounding;
use crate::simd::pieces::{by_piece, by_pieces_of_two, share};
use crate::simd::two_sum::two_sum;
use crate::simd::unit;
use numbers::{Held, Real, Slice};

/// Elements per block: 4 KiB of f32 accumulators beside one operand's block.
const BLOCK: usize = 1024;

/// Elements that are not worth a second thread (`cargo bench --bench ops`).
const ALONE: usize = 1 << 17;

/// The operands' storages, locked for reading.
struct Operands<'a>(Vec<(StorageRef<'a>, &'a Layout)>);

impl<'a> Operands<'a> {
    fn new(tensors: &'a [Tensor]) -> Self {
        Self(tensors.iter().map(Tensor::storage_and_layout).collect())
    }

    fn slices(&self) -> candle_core::Result<Vec<Slice<'_>>> {
        self.0
            .iter()
            .map(|(storage, layout)| match &**storage {
                Storage::Cpu(storage) => Slice::new(storage, layout),
                _ => candle_core::bail!("a fused CPU operation was given a device tensor"),
            })
            .collect()
    }
}

/// A contiguous run of a result.
enum Out<'a> {
    F16(&'a mut [f16]),
    Bf16(&'a mut [bf16]),
    F32(&'a mut [f32]),
    F64(&'a mut [f64]),
}

impl Out<'_> {
    fn len(&self) -> usize {
        match self {
            Self::F16(x) => x.len(),
            Self::Bf16(x) => x.len(),
            Self::F32(x) => x.len(),
            Self::F64(x) => x.len(),
        }
    }

    /// Sums, rounded to the dtype `to`, from `at` on.
    #[inline(always)]
    fn put<A: Real>(&mut self, at: usize, sums: &[A], to: DType) {
        let n = sums.len();
        match self {
            Self::F16(x) => Held::put(&mut x[at..][..n], sums, to),
            Self::Bf16(x) => Held::put(&mut x[at..][..n], sums, to),
            Self::F32(x) => Held::put(&mut x[at..][..n], sums, to),
            Self::F64(x) => Held::put(&mut x[at..][..n], sums, to),
        }
    }
}

/// `out = round(scale · Σ c_j x_j)`, of one piece.
struct BlockSum<'a, A> {
    terms: &'a [(A, Slice<'a>)],
    scale: A,
    to: DType,
    /// Where in the operands the piece starts.
    at: usize,
    out: Out<'a>,
}

impl<A: Real> WithSimd for BlockSum<'_, A> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(mut self, _: S) {
        let mut block = [A::ZERO; BLOCK];
        for at in (0..self.out.len()).step_by(BLOCK) {
            let sums = &mut block[..BLOCK.min(self.out.len() - at)];
            sums.fill(A::ZERO);
            for &(c, x) in self.terms {
                A::axpy(sums, c, x.part(self.at + at, sums.len()));
            }
            A::scale(sums, self.scale);
            self.out.put(at, sums, self.to);
        }
    }
}

fn sum<A: Real>(
    terms: &[(f64, Slice<'_>)],
    scale: f64,
    out: Rounding,
    like: &Tensor,
) -> Result<Tensor> {
    let terms: Vec<_> = terms.iter().map(|&(c, x)| (A::of(c), x)).collect();
    let unit = unit()?;
    let piece = |at: usize, piece: Out<'_>| {
        unit.dispatch(BlockSum {
            terms: &terms,
            scale: A::of(scale),
            to: out.to,
            at,
            out: piece,
        });
    };
    match out.held {
        DType::F16 => filled(like, &|at, out| piece(at, Out::F16(out))),
        DType::BF16 => filled(like, &|at, out| piece(at, Out::Bf16(out))),
        DType::F32 => filled(like, &|at, out| piece(at, Out::F32(out))),
        DType::F64 => filled(like, &|at, out| piece(at, Out::F64(out))),
        dtype => Err(Error::UnsupportedState { leaf: 0, dtype }),
    }
}

/// A tensor of the shape of another.  `fill` is given where a piece begins, and the piece.
fn filled<H: Held>(like: &Tensor, fill: &(dyn Fn(usize, &mut [H]) + Sync)) -> Result<Tensor> {
    let mut out = vec![H::zero(); like.elem_count()];
    let size = share(out.len(), ALONE);
    by_piece(&mut out, size, fill);
    Ok(Tensor::from_vec(out, like.shape(), like.device())?)
}

pub(super) fn combine(terms: &[(f64, &Tensor)], scale: f64, out: Rounding) -> Result<Tensor> {
    let tensors = terms
        .iter()
        .map(|(_, x)| x.contiguous())
        .collect::<candle_core::Result<Vec<_>>>()?;
    let operands = Operands::new(&tensors);
    let slices = operands.slices()?;
    let like = terms[0].1;
    if slices.iter().any(|x| x.len() != like.elem_count()) {
        return Err(candle_core::Error::Msg("a sum of tensors of different sizes".into()).into());
    }
    let pairs: Vec<_> = terms.iter().map(|&(c, _)| c).zip(slices).collect();
    let wide = |(c, x): &(f64, Slice<'_>)| matches!(x, Slice::F64(_)) || !is_single(*c);
    if pairs.iter().any(wide) {
        sum::<f64>(&pairs, scale, out, like)
    } else {
        sum::<f32>(&pairs, scale, out, like)
    }
}

/// `sum + Σ c_j x_j` of one piece, and what rounding has taken from it.
struct CompensatedSum<'a, A> {
    sum: Slice<'a>,
    terms: &'a [(A, Slice<'a>)],
    /// Where in the operands the piece starts.
    at: usize,
    out: [&'a mut [A]; 2],
}

impl<A: Real> WithSimd for CompensatedSum<'_, A> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        let [sums, lost] = self.out;
        let blocks = sums.chunks_mut(BLOCK).zip(lost.chunks_mut(BLOCK));
        for (i, (sums, lost)) in blocks.enumerate() {
            let (at, n) = (self.at + i * BLOCK, sums.len());
            A::axpy(sums, A::of(1.0), self.sum.part(at, n));
            for &(c, x) in self.terms {
                A::axpy(lost, c, x.part(at, n));
            }
            for (sum, lost) in sums.iter_mut().zip(lost) {
                [*sum, *lost] = two_sum(*sum, *lost);
            }
        }
    }
}

pub(super) fn add_compensated(
    [sum, lost]: [&Tensor; 2],
    terms: &[(f64, &Tensor)],
) -> Result<[Tensor; 2]> {
    let all: Vec<_> = std::iter::once((1.0, lost))
        .chain(terms.iter().copied())
        .collect();
    match sum.dtype() {
        DType::F64 => added::<f64>(sum, &all),
        DType::F32 => {
            let wide = |(c, x): &(f64, &Tensor)| x.dtype() == DType::F64 || !is_single(*c);
            if all.iter().any(wide) {
                let all = combine(&all, 1.0, Rounding::cast(DType::F32))?;
                return added::<f32>(sum, &[(1.0, &all)]);
            }
            added::<f32>(sum, &all)
        }
        dtype => Err(Error::UnsupportedState { leaf: 0, dtype }),
    }
}

/// `sum + Σ c_j x_j` and what rounding has taken from it, in the dtype of both.
fn added<A: Real>(sum: &Tensor, terms: &[(f64, &Tensor)]) -> Result<[Tensor; 2]> {
    let tensors = std::iter::once(sum).chain(terms.iter().map(|(_, x)| *x));
    let tensors = tensors
        .map(Tensor::contiguous)
        .collect::<candle_core::Result<Vec<_>>>()?;
    let operands = Operands::new(&tensors);
    let slices = operands.slices()?;
    let n = sum.elem_count();
    if slices.iter().any(|x| x.len() != n) {
        return Err(candle_core::Error::Msg("a sum of tensors of different sizes".into()).into());
    }
    let coefficients = terms.iter().map(|&(c, _)| A::of(c));
    let terms: Vec<_> = coefficients.zip(slices[1..].iter().copied()).collect();
    let unit = unit()?;
    let (mut sums, mut lost) = (vec![A::ZERO; n], vec![A::ZERO; n]);
    by_pieces_of_two([&mut sums, &mut lost], share(n, ALONE), &|at, out| {
        unit.dispatch(CompensatedSum {
            sum: slices[0],
            terms: &terms,
            at,
            out,
        });
    });
    let tensor = |numbers: Vec<A>| Tensor::from_vec(numbers, sum.shape(), sum.device());
    Ok([tensor(sums)?, tensor(lost)?])
}

/// Whether f32 holds a coefficient to its precision: not those of steps of 1e-39.
fn is_single(c: f64) -> bool {
    c == 0.0 || (f64::from(f32::MIN_POSITIVE)..=f64::from(f32::MAX)).contains(&c.abs())
}

/// `acc += c · x` with a coefficient that f32 does not hold.
fn add_wide(acc: &mut [f32], c: f64, x: Slice<'_>) {
    for (i, acc) in acc.chunks_mut(BLOCK).enumerate() {
        let mut wide = [0f64; BLOCK];
        let sums = &mut wide[..acc.len()];
        for (sum, acc) in sums.iter_mut().zip(&*acc) {
            *sum = f64::from(*acc);
        }
        f64::axpy(sums, c, x.part(i * BLOCK, acc.len()));
        for (acc, sum) in acc.iter_mut().zip(sums) {
            *acc = *sum as f32;
        }
    }
}

/// `acc += c · x`.
struct Axpy(f64);

impl Axpy {
    fn run<A: Real>(&self, acc: &mut [A], x: Slice<'_>) -> Result<()> {
        let unit = unit()?;
        let size = share(acc.len(), ALONE);
        by_piece(acc, size, &|at, acc| {
            unit.dispatch(AddScaled {
                c: A::of(self.0),
                x: x.part(at, acc.len()),
                acc,
            });
        });
        Ok(())
    }
}

/// `acc += c · x`, of one piece.
struct AddScaled<'a, A> {
    c: A,
    x: Slice<'a>,
    acc: &'a mut [A],
}

impl<A: Real> WithSimd for AddScaled<'_, A> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        for (i, acc) in self.acc.chunks_mut(BLOCK).enumerate() {
            let x = self.x.part(i * BLOCK, acc.len());
            A::axpy(acc, self.c, x);
        }
    }
}

impl InplaceOp2 for Axpy {
    fn name(&self) -> &'static str {
        "accumulate"
    }

    fn cpu_fwd(
        &self,
        acc: &mut CpuStorage,
        acc_layout: &Layout,
        x: &CpuStorage,
        x_layout: &Layout,
    ) -> candle_core::Result<()> {
        let x = Slice::new(x, x_layout)?;
        let Some((start, end)) = acc_layout.contiguous_offsets() else {
            candle_core::bail!("an accumulator must be contiguous")
        };
        if end - start != x.len() {
            candle_core::bail!(
                "an accumulator of {} elements, {} added",
                end - start,
                x.len()
            )
        }
        match acc {
            CpuStorage::F32(acc) if !is_single(self.0) => add_wide(&mut acc[start..end], self.0, x),
            CpuStorage::F32(acc) => self.run(&mut acc[start..end], x)?,
            CpuStorage::F64(acc) => self.run(&mut acc[start..end], x)?,
            _ => candle_core::bail!("an accumulator must be f32 or f64"),
        }
        Ok(())
    }
}

pub(super) fn accumulate(acc: &mut Tensor, c: f64, x: &Tensor) -> Result<()> {
    Ok(acc.inplace_op2(&x.contiguous()?, &Axpy(c))?)
}

pub(super) fn magnitude(x: &Tensor) -> Result<f64> {
    let tensors = [x.contiguous()?];
    let operands = Operands::new(&tensors);
    let x = operands.slices()?[0];
    let (unit, size) = (unit()?, share(x.len(), ALONE));
    let mut largest = vec![0u64; x.len().div_ceil(size)];
    by_piece(&mut largest, 1, &|i, of_piece| {
        let at = i * size;
        let part = x.part(at, size.min(x.len() - at));
        of_piece.fill_with(|| unit.dispatch(Largest(part)));
    });
    let bits = largest.into_iter().max().unwrap_or(0);
    Ok(match x {
        Slice::F16(_) => f16::from_bits(bits as u16).into(),
        Slice::Bf16(_) => bf16::from_bits(bits as u16).into(),
        Slice::F32(_) => f32::from_bits(bits as u32).into(),
        Slice::F64(_) => f64::from_bits(bits),
    })
}

/// The bits of max|x|.  Without the sign, IEEE numbers are ordered as integers, infinity above all
/// and NaN above it.
struct Largest<'a>(Slice<'a>);

impl WithSimd for Largest<'_> {
    type Output = u64;

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) -> u64 {
        match self.0 {
            Slice::F16(x) => x
                .iter()
                .fold(0, |m, x| (x.to_bits() & 0x7fff).max(m))
                .into(),
            Slice::Bf16(x) => x
                .iter()
                .fold(0, |m, x| (x.to_bits() & 0x7fff).max(m))
                .into(),
            Slice::F32(x) => {
                let bits = |m: u32, x: &f32| (x.to_bits() & (u32::MAX >> 1)).max(m);
                x.iter().fold(0, bits).into()
            }
            Slice::F64(x) => {
                let bits = |m: u64, x: &f64| (x.to_bits() & (u64::MAX >> 1)).max(m);
                x.iter().fold(0, bits)
            }
        }
    }
}

pub(super) fn dot(x: &Tensor, y: &Tensor) -> Result<Tensor> {
    let tensors = [x.contiguous()?, y.contiguous()?];
    let operands = Operands::new(&tensors);
    let slices = operands.slices()?;
    let (mut a, mut b) = ([0f64; BLOCK], [0f64; BLOCK]);
    let n = x.elem_count();
    let mut total = 0.0;
    for at in (0..n).step_by(BLOCK) {
        let len = BLOCK.min(n - at);
        for (block, slice) in [(&mut a, slices[0]), (&mut b, slices[1])] {
            block[..len].fill(0.0);
            f64::axpy(&mut block[..len], 1.0, slice.part(at, len));
        }
        total += a[..len]
            .iter()
            .zip(&b[..len])
            .map(|(a, b)| a * b)
            .sum::<f64>();
    }
    Ok(Tensor::new(total, x.device())?.to_dtype(x.dtype())?)
}

#[cfg(test)]
mod tests {
    use super::numbers::{round_bf16, round_f16};
    use super::*;

    #[test]
    fn rounding_in_f32_equals_a_cast_and_back() {
        // Every exponent and sign, mantissas around each tie, and the extremes.
        let step = 0x0000_0fff;
        for bits in (0..=u32::MAX).step_by(step).chain([
            0x7f80_0000,
            0xff80_0000,
            0x4780_0000,
            0x477f_efff,
            0x477f_f000,
            0x3380_0000,
            0x3300_0000,
            0x3300_0001,
            0x8000_0000,
        ]) {
            let x = f32::from_bits(bits);
            if x.is_nan() {
                assert!(round_f16(x).is_nan() && round_bf16(x).is_nan());
                continue;
            }
            assert_eq!(
                round_f16(x).to_bits(),
                f16::from_f32(x).to_f32().to_bits(),
                "f16 {x:e}"
            );
            assert_eq!(
                round_bf16(x).to_bits(),
                bf16::from_f32(x).to_f32().to_bits(),
                "bf16 {x:e}"
            );
        }
    }
}
