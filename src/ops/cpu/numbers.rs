//! Numbers of every float dtype, and the two that sums are formed in.

use candle_core::{CpuStorage, DType, Layout, WithDType};
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

use super::BLOCK;

/// A contiguous run of one operand.
#[derive(Clone, Copy)]
pub(super) enum Slice<'a> {
    F16(&'a [f16]),
    Bf16(&'a [bf16]),
    F32(&'a [f32]),
    F64(&'a [f64]),
}

impl<'a> Slice<'a> {
    pub(super) fn new(storage: &'a CpuStorage, layout: &Layout) -> candle_core::Result<Self> {
        let Some((start, end)) = layout.contiguous_offsets() else {
            candle_core::bail!("a fused operation needs a contiguous operand")
        };
        // The offset of an empty part may lie behind the end.
        let (start, end) = if start == end { (0, 0) } else { (start, end) };
        match storage {
            CpuStorage::F16(x) => Ok(Self::F16(&x[start..end])),
            CpuStorage::BF16(x) => Ok(Self::Bf16(&x[start..end])),
            CpuStorage::F32(x) => Ok(Self::F32(&x[start..end])),
            CpuStorage::F64(x) => Ok(Self::F64(&x[start..end])),
            _ => candle_core::bail!("a fused operation needs a floating-point operand"),
        }
    }

    /// The elements from `at` on, n of them.
    pub(super) fn part(self, at: usize, n: usize) -> Self {
        match self {
            Self::F16(x) => Self::F16(&x[at..at + n]),
            Self::Bf16(x) => Self::Bf16(&x[at..at + n]),
            Self::F32(x) => Self::F32(&x[at..at + n]),
            Self::F64(x) => Self::F64(&x[at..at + n]),
        }
    }

    pub(super) fn len(&self) -> usize {
        match self {
            Self::F16(x) => x.len(),
            Self::Bf16(x) => x.len(),
            Self::F32(x) => x.len(),
            Self::F64(x) => x.len(),
        }
    }
}

/// f32 or f64, in which sums are formed.
pub(super) trait Real: WithDType + Copy + Send + Sync {
    const ZERO: Self;
    fn of(x: f64) -> Self;
    fn single(self) -> f32;
    /// `acc += c · x`, of one length.
    fn axpy(acc: &mut [Self], c: Self, x: Slice<'_>);
    /// `x ← c · x`.
    fn scale(x: &mut [Self], c: Self);
}

impl Real for f32 {
    const ZERO: Self = 0.0;
    fn of(x: f64) -> Self {
        x as f32
    }
    fn single(self) -> f32 {
        self
    }
    #[inline(always)]
    fn axpy(acc: &mut [f32], c: f32, x: Slice<'_>) {
        match x {
            Slice::F32(x) => {
                for (a, x) in acc.iter_mut().zip(x) {
                    *a += c * x;
                }
            }
            Slice::Bf16(x) => {
                for (a, x) in acc.iter_mut().zip(x) {
                    *a += c * widened(*x);
                }
            }
            Slice::F16(x) => {
                let mut wide = [0f32; BLOCK];
                x.convert_to_f32_slice(&mut wide[..x.len()]);
                for (a, x) in acc.iter_mut().zip(&wide) {
                    *a += c * x;
                }
            }
            Slice::F64(x) => {
                for (a, x) in acc.iter_mut().zip(x) {
                    *a += c * *x as f32;
                }
            }
        }
    }
    #[inline(always)]
    fn scale(x: &mut [f32], c: f32) {
        for x in x {
            *x *= c;
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
    #[inline(always)]
    fn axpy(acc: &mut [f64], c: f64, x: Slice<'_>) {
        match x {
            Slice::F64(x) => {
                for (a, x) in acc.iter_mut().zip(x) {
                    *a += c * x;
                }
            }
            Slice::F32(x) => {
                for (a, x) in acc.iter_mut().zip(x) {
                    *a += c * f64::from(*x);
                }
            }
            Slice::Bf16(x) => {
                for (a, x) in acc.iter_mut().zip(x) {
                    *a += c * f64::from(widened(*x));
                }
            }
            Slice::F16(x) => {
                let mut wide = [0f32; BLOCK];
                x.convert_to_f32_slice(&mut wide[..x.len()]);
                for (a, x) in acc.iter_mut().zip(&wide) {
                    *a += c * f64::from(*x);
                }
            }
        }
    }
    #[inline(always)]
    fn scale(x: &mut [f64], c: f64) {
        for x in x {
            *x *= c;
        }
    }
}

#[inline(always)]
pub(super) fn widened(x: bf16) -> f32 {
    f32::from_bits(u32::from(x.to_bits()) << 16)
}

/// Rounds to bf16, to nearest even, keeping f32.
#[inline(always)]
pub(super) fn round_bf16(x: f32) -> f32 {
    let bits = x.to_bits();
    let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) & 0xffff_0000;
    // An infinity passes through; a NaN must not be carried into one.
    f32::from_bits(if x.is_nan() { bits } else { rounded })
}

/// Rounds to f16, to nearest even, with its subnormals and its overflow at 65520, keeping f32.
#[inline(always)]
pub(super) fn round_f16(x: f32) -> f32 {
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

/// What a result is held in.
pub(super) trait Held: WithDType + Send + Sync {
    /// Sums, rounded to the dtype `to`, of the same length.
    fn put<A: Real>(out: &mut [Self], sums: &[A], to: DType);
}

impl Held for f16 {
    #[inline(always)]
    fn put<A: Real>(out: &mut [f16], sums: &[A], _: DType) {
        let mut single = [0f32; BLOCK];
        for (s, a) in single.iter_mut().zip(sums) {
            *s = a.single();
        }
        out.convert_from_f32_slice(&single[..sums.len()]);
    }
}

impl Held for bf16 {
    #[inline(always)]
    fn put<A: Real>(out: &mut [bf16], sums: &[A], _: DType) {
        for (out, a) in out.iter_mut().zip(sums) {
            *out = bf16::from_bits((round_bf16(a.single()).to_bits() >> 16) as u16);
        }
    }
}

impl Held for f32 {
    #[inline(always)]
    fn put<A: Real>(out: &mut [f32], sums: &[A], to: DType) {
        let both = out.iter_mut().zip(sums);
        match to {
            DType::F16 => both.for_each(|(out, a)| *out = round_f16(a.single())),
            DType::BF16 => both.for_each(|(out, a)| *out = round_bf16(a.single())),
            _ => both.for_each(|(out, a)| *out = a.single()),
        }
    }
}

impl Held for f64 {
    #[inline(always)]
    fn put<A: Real>(out: &mut [f64], sums: &[A], _: DType) {
        for (out, a) in out.iter_mut().zip(sums) {
            *out = a.to_f64();
        }
    }
}
