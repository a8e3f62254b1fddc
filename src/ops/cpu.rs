//! The operations as fused loops over blocks that stay in L1: each operand is read once, each
//! result written once.

use candle_core::{CpuStorage, DType, InplaceOp2, Layout, Storage, StorageRef, Tensor};
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

use crate::error::{Error, Result};
use crate::precision::Rounding;

/// Elements per block: 4 KiB of f32 accumulators beside one operand's block.
const BLOCK: usize = 1024;

/// A contiguous run of one operand.
#[derive(Clone, Copy)]
enum Slice<'a> {
    F16(&'a [f16]),
    Bf16(&'a [bf16]),
    F32(&'a [f32]),
    F64(&'a [f64]),
}

impl<'a> Slice<'a> {
    fn new(storage: &'a CpuStorage, layout: &Layout) -> candle_core::Result<Self> {
        let Some((start, end)) = layout.contiguous_offsets() else {
            candle_core::bail!("a fused operation needs a contiguous operand")
        };
        match storage {
            CpuStorage::F16(x) => Ok(Self::F16(&x[start..end])),
            CpuStorage::BF16(x) => Ok(Self::Bf16(&x[start..end])),
            CpuStorage::F32(x) => Ok(Self::F32(&x[start..end])),
            CpuStorage::F64(x) => Ok(Self::F64(&x[start..end])),
            _ => candle_core::bail!("a fused operation needs a floating-point operand"),
        }
    }

    fn len(&self) -> usize {
        match self {
            Self::F16(x) => x.len(),
            Self::Bf16(x) => x.len(),
            Self::F32(x) => x.len(),
            Self::F64(x) => x.len(),
        }
    }
}

/// f32 or f64, in which sums are formed.
trait Real: candle_core::WithDType + Copy + std::ops::AddAssign + std::ops::Mul<Output = Self> {
    const ZERO: Self;
    fn of(x: f64) -> Self;
    fn single(self) -> f32;
    /// `acc += c · x[at..]`.
    fn axpy(acc: &mut [Self], c: Self, x: Slice<'_>, at: usize);
}

fn add<A: Real>(acc: &mut [A], c: A, x: impl Iterator<Item = A>) {
    for (a, x) in acc.iter_mut().zip(x) {
        *a += c * x;
    }
}

impl Real for f32 {
    const ZERO: Self = 0.0;
    fn of(x: f64) -> Self {
        x as f32
    }
    fn single(self) -> f32 {
        self
    }
    fn axpy(acc: &mut [f32], c: f32, x: Slice<'_>, at: usize) {
        let n = acc.len();
        match x {
            Slice::F32(x) => add(acc, c, x[at..at + n].iter().copied()),
            Slice::Bf16(x) => add(acc, c, x[at..at + n].iter().map(|x| x.to_f32())),
            Slice::F16(x) => {
                let mut wide = [0f32; BLOCK];
                x[at..at + n].convert_to_f32_slice(&mut wide[..n]);
                add(acc, c, wide[..n].iter().copied());
            }
            Slice::F64(x) => add(acc, c, x[at..at + n].iter().map(|&x| x as f32)),
        }
    }
}

impl Real for f64 {
    const ZERO: Self = 0.0;
    fn of(x: f64) -> Self {
        x
    }
    fn single(self) -> f32 {
        self as f32
    }
    fn axpy(acc: &mut [f64], c: f64, x: Slice<'_>, at: usize) {
        let n = acc.len();
        match x {
            Slice::F64(x) => add(acc, c, x[at..at + n].iter().copied()),
            Slice::F32(x) => add(acc, c, x[at..at + n].iter().map(|&x| x.into())),
            Slice::Bf16(x) => add(acc, c, x[at..at + n].iter().map(|x| x.to_f64())),
            Slice::F16(x) => add(acc, c, x[at..at + n].iter().map(|x| x.to_f64())),
        }
    }
}

/// Rounds to bf16, to nearest even, keeping f32.
fn round_bf16(x: f32) -> f32 {
    let bits = x.to_bits();
    let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) & 0xffff_0000;
    // An infinity passes through; a NaN must not be carried into one.
    f32::from_bits(if x.is_nan() { bits } else { rounded })
}

/// Rounds to f16, to nearest even, with its subnormals and its overflow at 65520, keeping f32.
fn round_f16(x: f32) -> f32 {
    // Below 2^-14 the spacing is 2^-24, which is the spacing of f32 at 0.75.
    let subnormal = ((x.abs() + 0.75) - 0.75).copysign(x);
    let bits = x.to_bits();
    let normal = f32::from_bits(bits.wrapping_add(0xfff + ((bits >> 13) & 1)) & 0xffff_e000);
    let overflow = f32::INFINITY.copysign(x);
    let rounded = if x.abs() < 6.103_515_6e-5 {
        subnormal
    } else {
        normal
    };
    let rounded = if x.abs() >= 65520.0 {
        overflow
    } else {
        rounded
    };
    if x.is_nan() {
        x
    } else {
        rounded
    }
}

/// Where a block of sums goes.
enum Sink {
    F16(Vec<f16>),
    Bf16(Vec<bf16>),
    F32(Vec<f32>),
    F64(Vec<f64>),
}

impl Sink {
    fn new(dtype: DType, n: usize) -> Result<Self> {
        Ok(match dtype {
            DType::F16 => Self::F16(Vec::with_capacity(n)),
            DType::BF16 => Self::Bf16(Vec::with_capacity(n)),
            DType::F32 => Self::F32(Vec::with_capacity(n)),
            DType::F64 => Self::F64(Vec::with_capacity(n)),
            dtype => return Err(Error::UnsupportedState { leaf: 0, dtype }),
        })
    }

    fn push<A: Real>(&mut self, sums: &[A], to: DType) {
        match self {
            Self::F16(out) => {
                let at = out.len();
                let mut single = [0f32; BLOCK];
                for (s, a) in single.iter_mut().zip(sums) {
                    *s = a.single();
                }
                out.resize(at + sums.len(), f16::ZERO);
                out[at..].convert_from_f32_slice(&single[..sums.len()]);
            }
            Self::Bf16(out) => out.extend(sums.iter().map(|a| bf16::from_f32(a.single()))),
            Self::F32(out) => match to {
                DType::F16 => out.extend(sums.iter().map(|a| round_f16(a.single()))),
                DType::BF16 => out.extend(sums.iter().map(|a| round_bf16(a.single()))),
                _ => out.extend(sums.iter().map(|a| a.single())),
            },
            Self::F64(out) => out.extend(sums.iter().map(|a| a.to_f64())),
        }
    }

    fn into_tensor(self, like: &Tensor) -> Result<Tensor> {
        let (shape, device) = (like.shape(), like.device());
        Ok(match self {
            Self::F16(out) => Tensor::from_vec(out, shape, device)?,
            Self::Bf16(out) => Tensor::from_vec(out, shape, device)?,
            Self::F32(out) => Tensor::from_vec(out, shape, device)?,
            Self::F64(out) => Tensor::from_vec(out, shape, device)?,
        })
    }
}

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

fn sum<A: Real>(
    terms: &[(f64, Slice<'_>)],
    scale: f64,
    out: Rounding,
    like: &Tensor,
) -> Result<Tensor> {
    let n = like.elem_count();
    let mut sink = Sink::new(out.held, n)?;
    let mut block = [A::ZERO; BLOCK];
    for at in (0..n).step_by(BLOCK) {
        let sums = &mut block[..BLOCK.min(n - at)];
        sums.fill(A::ZERO);
        for &(c, x) in terms {
            A::axpy(sums, A::of(c), x, at);
        }
        if scale != 1.0 {
            let scale = A::of(scale);
            sums.iter_mut().for_each(|a| *a = scale * *a);
        }
        sink.push(sums, out.to);
    }
    sink.into_tensor(like)
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
    if pairs.iter().any(|(_, x)| matches!(x, Slice::F64(_))) {
        sum::<f64>(&pairs, scale, out, like)
    } else {
        sum::<f32>(&pairs, scale, out, like)
    }
}

/// `acc += c · x`.
struct Axpy(f64);

impl Axpy {
    fn run<A: Real>(&self, acc: &mut [A], x: Slice<'_>) {
        for (i, acc) in acc.chunks_mut(BLOCK).enumerate() {
            A::axpy(acc, A::of(self.0), x, i * BLOCK);
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
            CpuStorage::F32(acc) => self.run(&mut acc[start..end], x),
            CpuStorage::F64(acc) => self.run(&mut acc[start..end], x),
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
    // Without the sign, IEEE numbers are ordered as integers, infinity above all and NaN above it.
    Ok(match operands.slices()?[0] {
        Slice::F32(x) => {
            let bits = x.iter().fold(0, |m, x| (x.to_bits() & 0x7fff_ffff).max(m));
            f32::from_bits(bits).into()
        }
        Slice::F64(x) => f64::from_bits(
            x.iter()
                .fold(0, |m, x| (x.to_bits() & (u64::MAX >> 1)).max(m)),
        ),
        Slice::F16(x) => {
            f16::from_bits(x.iter().fold(0, |m, x| (x.to_bits() & 0x7fff).max(m))).into()
        }
        Slice::Bf16(x) => {
            bf16::from_bits(x.iter().fold(0, |m, x| (x.to_bits() & 0x7fff).max(m))).into()
        }
    })
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
            f64::axpy(&mut block[..len], 1.0, slice, at);
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
