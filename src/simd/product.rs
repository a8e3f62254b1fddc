//! Products of weights with tiles.
//!
//! A tile holds B batch rows of some features: `[feature][B]`, the B rows in the lanes of V vectors.
//! A layer x ↦ W x + b is then a small product whose every operand is read in order: W is packed
//! once in blocks of rows, `[block][input][row]`, and each row of a block is an accumulator of V
//! vectors.  Its adjoint is the same with Wᵀ.  Gradients dW = Σ g xᵀ are collected over a window of
//! evaluations, so that they cost one pass over dW for many.

use std::ops::Range;

use pulp::Simd;

use super::packed::Packed;
use super::transpose::transposed;
use super::{enter, scalars, Element, Kernel};

/// Rows of the largest block: two vectors of accumulators for each must leave registers free.  Two multiply-adds a cycle,
/// each of which takes four, need eight accumulators; with no more than these, every delay is lost.
const fn largest_block<T: Element, S: Simd>() -> usize {
    match (has_many_registers::<S>(), T::WIDE) {
        (true, _) => 8,
        (false, true) => 6,
        (false, false) => 4,
    }
}

/// Whether there are 32 vector registers, and not 16.
pub(super) const fn has_many_registers<S: Simd>() -> bool {
    S::REGISTER_COUNT >= 32
}

/// Whether there is code for blocks of R rows: of f64, which is for studies, for the largest and for single rows only.
pub(super) const fn has_block<T: Element, S: Simd, const R: usize>() -> bool {
    let most = largest_block::<T, S>();
    R == most || R == 1 || R < most && R.is_power_of_two() && T::WIDE
}

/// Rows of the block that begins at row `first` of so many, 8 or 6, 4, 2 or 1, and how many such blocks follow on each
/// other.  Blocks of one or two rows, whose sums are in parts, have the same rows on every unit, so that these have the
/// same bits: in f32 the rows behind the last multiple of four.
fn blocks<T: Element, S: Simd>(rows: usize, first: usize) -> (usize, usize) {
    let left = rows - first;
    let whole = (rows / 4 * 4).saturating_sub(first);
    match left {
        8.. if const { has_block::<T, S, 8>() } => (8, left / 8),
        // Of what is left before that multiple, 4 or 8 are blocks of four.
        6.. if const { has_block::<T, S, 6>() } && whole >= 6 && whole != 8 => {
            (6, whole / 6 - usize::from(whole % 6 == 2))
        }
        4.. if const { has_block::<T, S, 4>() } => (4, left / 4),
        2.. if const { has_block::<T, S, 2>() } => (2, left / 2),
        _ => (1, left),
    }
}

/// Rows of the block that begins at row `first` of so many.
pub(super) fn block<T: Element, S: Simd>(rows: usize, first: usize) -> usize {
    blocks::<T, S>(rows, first).0
}

/// `to[column][row] = from[row][column]`; the rows of `from` are whole vectors.
pub(crate) struct Transpose<'a, T: Element, S: Simd> {
    pub(crate) rows: usize,
    pub(crate) columns: usize,
    pub(crate) from: &'a [T::Vector<S>],
    pub(crate) to: &'a mut [T],
}

impl<T: Element, S: Simd> Kernel<S> for Transpose<'_, T, S> {
    type Output = ();

    #[inline(always)]
    fn run(self, s: S) {
        let lanes = T::lanes::<S>();
        let stride = padded::<T, S>(self.columns);
        let from = scalars::<T, S>(self.from);
        for column in (0..self.columns).step_by(lanes) {
            let columns = lanes.min(self.columns - column);
            for row in (0..self.rows).step_by(lanes) {
                let rows = lanes.min(self.rows - row);
                let transposed =
                    transposed::<T, S>(s, &from[row * stride + column..], stride, (rows, lanes));
                for (c, transposed) in transposed[..columns].iter().enumerate() {
                    let transposed = scalars::<T, S>(std::slice::from_ref(transposed));
                    let to = &mut self.to[(column + c) * self.rows + row..];
                    // Of a length that the compiler knows, where it can be.
                    if rows == lanes {
                        to[..lanes].copy_from_slice(transposed);
                    } else {
                        to[..rows].copy_from_slice(&transposed[..rows]);
                    }
                }
            }
        }
    }
}

/// How the sums of a product are stored.
pub(crate) trait Epilogue<T: Element, S: Simd> {
    /// Of R rows, the first of which begins at the vector `at` of the product.
    fn store<const R: usize, const V: usize>(
        &self,
        s: S,
        at: usize,
        sums: [[T::Vector<S>; V]; R],
        out: &mut [[T::Vector<S>; V]; R],
    );
}

/// As they are.
struct AsIs;

impl<T: Element, S: Simd> Epilogue<T, S> for AsIs {
    #[inline(always)]
    fn store<const R: usize, const V: usize>(
        &self,
        _: S,
        _: usize,
        sums: [[T::Vector<S>; V]; R],
        out: &mut [[T::Vector<S>; V]; R],
    ) {
        *out = sums;
    }
}

/// tanh of them.
pub(crate) struct Tanh;

impl<T: Element, S: Simd> Epilogue<T, S> for Tanh {
    #[inline(always)]
    fn store<const R: usize, const V: usize>(
        &self,
        s: S,
        _: usize,
        sums: [[T::Vector<S>; V]; R],
        out: &mut [[T::Vector<S>; V]; R],
    ) {
        *out = sums;
        // Over memory: a loop over the sums is unrolled, and spills them.
        for x in out.as_flattened_mut() {
            *x = T::tanh(s, *x);
        }
    }
}

/// `out = W x + start`, start by row (a bias) or zero.
pub(crate) struct Layer<'a, T: Element, S: Simd, const V: usize> {
    pub(crate) weights: &'a Packed<T>,
    /// One for each row, or none.
    pub(crate) start: &'a [T],
    pub(crate) x: &'a [T::Vector<S>],
    pub(crate) out: &'a mut [T::Vector<S>],
}

/// A product whose sums are stored as `epilogue` says.
pub(crate) struct WithEpilogue<'a, T: Element, S: Simd, const V: usize, E> {
    pub(crate) product: Layer<'a, T, S, V>,
    pub(crate) epilogue: E,
}

impl<T: Element, S: Simd, const V: usize> Layer<'_, T, S, V> {
    /// The products with some of the columns, in blocks of R of these rows, `weights` theirs; each sum in U
    /// parts, so that the products of a small block need not wait for each other.  U is the same on every unit, so that
    /// rows have the same bits on all.
    #[inline(always)]
    fn blocks<const R: usize, const U: usize>(
        &mut self,
        s: S,
        epilogue: &impl Epilogue<T, S>,
        rows: Range<usize>,
        weights: &[T],
        columns: Range<usize>,
    ) {
        let (all, first, blocks) = (self.weights.columns, rows.start, rows.len() / R);
        let far = size_of_val(self.weights.data.as_slice()) > FAR;
        let inputs = &self.x.as_chunks::<V>().0[columns.clone()];
        let starts = self.start.get(first..).unwrap_or(&[]).as_chunks::<R>().0;
        let outs = self.out[first * V..].as_chunks_mut::<V>().0;
        let outs = outs.as_chunks_mut::<R>().0;
        let weights = weights.as_chunks::<R>().0;
        for (b, out) in outs[..blocks].iter_mut().enumerate() {
            let mut sums = [[[T::zeros::<S>(); V]; R]; U];
            if columns.start > 0 {
                sums[0] = *out;
            } else if !starts.is_empty() {
                for r in 0..R {
                    sums[0][r] = [T::splat(s, starts[b][r]); V];
                }
            }
            let weights = &weights[b * all + columns.start..][..inputs.len()];
            let ((weights, last_weights), (inputs, last_inputs)) =
                (weights.as_chunks::<U>(), inputs.as_chunks::<U>());
            for (weights, inputs) in weights.iter().zip(inputs) {
                if far {
                    // Of the block after this one, while this one is used.
                    prefetch(s, weights.as_ptr().wrapping_add(all));
                }
                for u in 0..U {
                    add_product(s, &weights[u], &inputs[u], &mut sums[u]);
                }
            }
            for (weights, x) in last_weights.iter().zip(last_inputs) {
                add_product(s, weights, x, &mut sums[0]);
            }
            let [mut sum, rest @ ..] = sums.as_slice() else {
                continue;
            };
            for part in rest {
                for r in 0..R {
                    for v in 0..V {
                        sum[r][v] = T::plus(s, sum[r][v], part[r][v]);
                    }
                }
            }
            if columns.end == all {
                epilogue.store(s, (first + b * R) * V, sum, out);
            } else {
                *out = sum;
            }
        }
    }

    /// The products with all columns, of which those are read together whose x stay in the first cache.
    #[inline(always)]
    fn all(&mut self, s: S, epilogue: &impl Epilogue<T, S>) {
        let columns = self.weights.columns;
        let most = (NEAR / (V * size_of::<T::Vector<S>>())).max(1);
        let most = columns.div_ceil(columns.div_ceil(most).max(1)).max(1);
        for from in (0..columns.max(1)).step_by(most) {
            self.part(s, epilogue, from..columns.min(from + most));
        }
    }

    /// The products with some of the columns, in all rows.
    #[inline(always)]
    fn part(&mut self, s: S, epilogue: &impl Epilogue<T, S>, columns: Range<usize>) {
        let Packed {
            rows,
            columns: all,
            data,
        } = self.weights;
        let mut first = 0;
        while first < *rows {
            let (height, count) = blocks::<T, S>(*rows, first);
            let last = first + count * height;
            let weights = &data[first * all..last * all];
            let (rows, mut columns) = (first..last, columns.clone());
            // Sums in parts go over all columns at once: their bits do not depend on what the cache holds.
            if height <= 2 {
                if columns.end < *all {
                    break;
                }
                columns.start = 0;
            }
            match height {
                8 if const { has_block::<T, S, 8>() } => {
                    self.blocks::<8, 1>(s, epilogue, rows, weights, columns);
                }
                6 if const { has_block::<T, S, 6>() } => {
                    self.blocks::<6, 1>(s, epilogue, rows, weights, columns);
                }
                4 if const { has_block::<T, S, 4>() } => {
                    self.blocks::<4, 1>(s, epilogue, rows, weights, columns);
                }
                2 if const { has_block::<T, S, 2>() } => {
                    self.blocks::<2, 4>(s, epilogue, rows, weights, columns);
                }
                _ => self.blocks::<1, 4>(s, epilogue, rows, weights, columns),
            }
            first = last;
        }
    }
}

/// Asks for what is at `place`, which need not exist, to come into the second cache.
#[inline(always)]
fn prefetch<S: Simd, X>(s: S, place: *const X) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::any::Any;
        use std::arch::x86_64::_MM_HINT_T1;
        let s: &dyn Any = &s;
        if let Some(s) = s.downcast_ref::<pulp::x86::V4>() {
            s.sse._mm_prefetch::<_MM_HINT_T1>(place.cast());
        } else if let Some(s) = s.downcast_ref::<pulp::x86::V3>() {
            s.sse._mm_prefetch::<_MM_HINT_T1>(place.cast());
        }
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = (s, place);
}

/// Bytes of weights beyond which they are asked for: what is less stays in the first cache.
pub(super) const FAR: usize = 32 << 10;

/// Bytes of x that stay in the first cache while all rows pass by.
pub(super) const NEAR: usize = 32 << 10;

/// `sums += w x`, of R rows and one input.
#[inline(always)]
pub(super) fn add_product<T: Element, S: Simd, const R: usize, const V: usize>(
    s: S,
    weights: &[T; R],
    x: &[T::Vector<S>; V],
    sums: &mut [[T::Vector<S>; V]; R],
) {
    for r in 0..R {
        let w = T::splat(s, weights[r]);
        for v in 0..V {
            sums[r][v] = T::mul_add(s, w, x[v], sums[r][v]);
        }
    }
}

impl<T: Element, S: Simd, const V: usize> Kernel<S> for Layer<'_, T, S, V> {
    type Output = ();

    #[inline(always)]
    fn run(mut self, s: S) {
        self.all(s, &AsIs);
    }
}

impl<T: Element, S: Simd, const V: usize, E: Epilogue<T, S>> Kernel<S>
    for WithEpilogue<'_, T, S, V, E>
{
    type Output = ();

    #[inline(always)]
    fn run(self, s: S) {
        let Self {
            mut product,
            epilogue,
        } = self;
        if const { T::WIDE } {
            return product.all(s, &epilogue);
        }
        // Of f64 there is code for one product only, and the epilogue comes after it.
        let Layer {
            weights,
            start,
            x,
            out,
        } = product;
        let product = Layer::<T, S, V> {
            weights,
            start,
            x,
            out: &mut *out,
        };
        enter(s, product);
        let rows = out.as_chunks_mut::<V>().0.as_chunks_mut::<1>().0;
        for (row, out) in rows[..weights.rows].iter_mut().enumerate() {
            epilogue.store(s, row * V, *out, out);
        }
    }
}

/// A matrix packed for products with tiles.
pub(crate) trait Product<T: Element>: Send + Sync {
    /// `out = W x + start`, start by output or empty.
    #[inline(always)]
    fn product<S: Simd, const V: usize>(
        &self,
        s: S,
        start: &[T],
        x: &[T::Vector<S>],
        out: &mut [T::Vector<S>],
    ) {
        self.product_with::<S, V>(s, start, x, out, AsIs);
    }

    /// The same, stored as an epilogue says.
    fn product_with<S: Simd, const V: usize>(
        &self,
        s: S,
        start: &[T],
        x: &[T::Vector<S>],
        out: &mut [T::Vector<S>],
        epilogue: impl Epilogue<T, S>,
    );
}

impl<T: Element> Product<T> for Packed<T> {
    #[inline(always)]
    fn product<S: Simd, const V: usize>(
        &self,
        s: S,
        start: &[T],
        x: &[T::Vector<S>],
        out: &mut [T::Vector<S>],
    ) {
        let weights = self;
        let product = Layer::<T, S, V> {
            weights,
            start,
            x,
            out,
        };
        enter(s, product);
    }

    #[inline(always)]
    fn product_with<S: Simd, const V: usize>(
        &self,
        s: S,
        start: &[T],
        x: &[T::Vector<S>],
        out: &mut [T::Vector<S>],
        epilogue: impl Epilogue<T, S>,
    ) {
        let weights = self;
        let product = Layer::<T, S, V> {
            weights,
            start,
            x,
            out,
        };
        enter(s, WithEpilogue { product, epilogue });
    }
}

/// Vectors that hold n features.
pub(crate) fn padded<T: Element, S: Simd>(features: usize) -> usize {
    features.next_multiple_of(T::lanes::<S>())
}
