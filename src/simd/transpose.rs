//! Transposition of squares of numbers: the only kernel that must know the vector unit.

use pulp::Simd;

use super::{scalars, scalars_mut, Element};

/// Lanes of the widest vector there is.
const MOST_LANES: usize = 16;

/// A square of numbers, `[row][column]` at such a stride, transposed: a column to a vector.  Where there are
/// fewer rows or columns than lanes, the rest is zero.
#[inline(always)]
pub(super) fn transposed<T: Element, S: Simd>(
    s: S,
    from: &[T],
    stride: usize,
    (rows, columns): (usize, usize),
) -> [T::Vector<S>; MOST_LANES] {
    let lanes = T::lanes::<S>();
    let (mut square, mut transposed) =
        ([T::zeros::<S>(); MOST_LANES], [T::zeros::<S>(); MOST_LANES]);
    debug_assert!(rows.max(columns) <= lanes && lanes <= MOST_LANES);
    for r in 0..rows {
        let row = &from[r * stride..];
        let to = scalars_mut::<T, S>(std::slice::from_mut(&mut square[r]));
        // Of a length that the compiler knows, where it can be.
        if columns == lanes {
            to.copy_from_slice(&row[..lanes]);
        } else {
            to[..columns].copy_from_slice(&row[..columns]);
        }
    }
    T::transpose(s, &square, 1, &mut transposed, 1);
    transposed
}

/// Number by number; for units without a kernel of their own.
#[inline(always)]
fn one_by_one<T: Element, S: Simd>(
    from: &[T::Vector<S>],
    from_stride: usize,
    to: &mut [T::Vector<S>],
    to_stride: usize,
) {
    let lanes = T::lanes::<S>();
    for row in 0..lanes {
        for column in 0..lanes {
            scalars_mut::<T, S>(std::slice::from_mut(&mut to[column * to_stride]))[row] =
                scalars::<T, S>(std::slice::from_ref(&from[row * from_stride]))[column];
        }
    }
}

#[inline(always)]
pub(super) fn transpose_f64<S: Simd>(
    _: S,
    from: &[S::f64s],
    from_stride: usize,
    to: &mut [S::f64s],
    to_stride: usize,
) {
    one_by_one::<f64, S>(from, from_stride, to, to_stride);
}

#[inline(always)]
pub(super) fn transpose_f32<S: Simd>(
    s: S,
    from: &[S::f32s],
    from_stride: usize,
    to: &mut [S::f32s],
    to_stride: usize,
) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::any::Any;
        if let Some(s) = (&s as &dyn Any).downcast_ref::<pulp::x86::V4>() {
            let (from, to) = (bytemuck::cast_slice(from), bytemuck::cast_slice_mut(to));
            return x86::sixteen(*s, from, from_stride, to, to_stride);
        }
        if let Some(s) = (&s as &dyn Any).downcast_ref::<pulp::x86::V3>() {
            let (from, to) = (bytemuck::cast_slice(from), bytemuck::cast_slice_mut(to));
            return x86::eight(*s, from, from_stride, to, to_stride);
        }
    }
    let _ = s;
    one_by_one::<f32, S>(from, from_stride, to, to_stride);
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use pulp::bytemuck::cast;
    use pulp::x86::{V3, V4};
    use pulp::{f32x16, f32x4, f32x8};
    use std::arch::x86_64::{__m128, __m256};

    /// A quarter of a vector.
    #[inline(always)]
    fn four(from: &[[f32x4; 4]], at: usize, quarter: usize) -> __m128 {
        cast(from[at][quarter])
    }

    /// 16 × 16: quarters of four rows are read into a vector, whose four by four are interleaved in ones
    /// and in twos.
    #[inline(always)]
    pub(super) fn sixteen(
        s: V4,
        from: &[f32x16],
        from_stride: usize,
        to: &mut [f32x16],
        to_stride: usize,
    ) {
        let f = s.avx512f;
        let from: &[[f32x4; 4]] = pulp::bytemuck::cast_slice(from);
        for quarter in 0..4 {
            // A loop and a function that is inlined: a closure is not compiled for the vector unit.
            let mut r = [f._mm512_setzero_ps(); 4];
            for (i, r) in r.iter_mut().enumerate() {
                *r = f._mm512_castps128_ps512(four(from, i * from_stride, quarter));
                *r = f._mm512_insertf32x4::<1>(*r, four(from, (i + 4) * from_stride, quarter));
                *r = f._mm512_insertf32x4::<2>(*r, four(from, (i + 8) * from_stride, quarter));
                *r = f._mm512_insertf32x4::<3>(*r, four(from, (i + 12) * from_stride, quarter));
            }
            let a = f._mm512_castps_pd(f._mm512_unpacklo_ps(r[0], r[1]));
            let b = f._mm512_castps_pd(f._mm512_unpackhi_ps(r[0], r[1]));
            let c = f._mm512_castps_pd(f._mm512_unpacklo_ps(r[2], r[3]));
            let d = f._mm512_castps_pd(f._mm512_unpackhi_ps(r[2], r[3]));
            let columns = [
                f._mm512_unpacklo_pd(a, c),
                f._mm512_unpackhi_pd(a, c),
                f._mm512_unpacklo_pd(b, d),
                f._mm512_unpackhi_pd(b, d),
            ];
            for (i, column) in columns.into_iter().enumerate() {
                to[(4 * quarter + i) * to_stride] = cast(column);
            }
        }
    }

    /// 8 × 8: pairs of rows are interleaved in ones, in twos, in fours.
    #[inline(always)]
    pub(super) fn eight(
        s: V3,
        from: &[f32x8],
        from_stride: usize,
        to: &mut [f32x8],
        to_stride: usize,
    ) {
        let f = s.avx;
        let mut r: [__m256; 8] = [cast(from[0]); 8];
        for i in 1..8 {
            r[i] = cast(from[i * from_stride]);
        }
        let mut t = r;
        for i in 0..4 {
            t[2 * i] = f._mm256_unpacklo_ps(r[2 * i], r[2 * i + 1]);
            t[2 * i + 1] = f._mm256_unpackhi_ps(r[2 * i], r[2 * i + 1]);
        }
        for i in 0..2 {
            let (a, b) = (
                f._mm256_castps_pd(t[4 * i]),
                f._mm256_castps_pd(t[4 * i + 2]),
            );
            let (c, d) = (
                f._mm256_castps_pd(t[4 * i + 1]),
                f._mm256_castps_pd(t[4 * i + 3]),
            );
            r[4 * i] = f._mm256_castpd_ps(f._mm256_unpacklo_pd(a, b));
            r[4 * i + 1] = f._mm256_castpd_ps(f._mm256_unpackhi_pd(a, b));
            r[4 * i + 2] = f._mm256_castpd_ps(f._mm256_unpacklo_pd(c, d));
            r[4 * i + 3] = f._mm256_castpd_ps(f._mm256_unpackhi_pd(c, d));
        }
        for j in 0..4 {
            to[j * to_stride] = cast(f._mm256_permute2f128_ps::<0x20>(r[j], r[j + 4]));
            to[(j + 4) * to_stride] = cast(f._mm256_permute2f128_ps::<0x31>(r[j], r[j + 4]));
        }
    }
}
