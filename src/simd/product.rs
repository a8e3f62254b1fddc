//! Products of weights with tiles.
//!
//! A tile holds B batch rows of some features: `[feature][B]`, the B rows in the lanes of V vectors.
//! A layer x ↦ W x + b is then a small product whose every operand is read in order: W is packed
//! once in blocks of rows, `[block][input][row]`, and each row of a block is an accumulator of V
//! vectors.  Its adjoint is the same with Wᵀ.  Gradients dW = Σ g xᵀ are collected over a window of
//! evaluations, so that they cost one pass over dW for many.

use std::ops::Range;

use pulp::Simd;

use super::transpose::transposed;
use super::{enter, scalars, scalars_mut, Element, Kernel};

/// A matrix packed for [`Layer`].
#[derive(Debug, Clone)]
pub(crate) struct Packed<T> {
    pub(super) rows: usize,
    pub(super) columns: usize,
    pub(super) data: Vec<T>,
}

/// Rows that a block has where `left` are left: 8, 4, 2 or 1.
pub(super) fn block(left: usize, most: usize) -> usize {
    [8, 4, 2]
        .into_iter()
        .find(|&b| b <= most && b <= left)
        .unwrap_or(1)
}

/// Rows of the largest block: two vectors of accumulators for each must leave registers free.
pub(crate) fn largest_block<S: Simd>() -> usize {
    if S::REGISTER_COUNT >= 32 {
        8
    } else {
        4
    }
}

impl<T: Element> Packed<T> {
    /// Packs the `rows` × `columns` matrix of elements `at(row, column)`.
    pub(crate) fn new<S: Simd>(
        rows: usize,
        columns: usize,
        at: impl Fn(usize, usize) -> T,
    ) -> Self {
        Self::by_block::<S>(rows, columns, |first, height, block| {
            for (column, block) in block.chunks_exact_mut(height).enumerate() {
                for (row, x) in (first..).zip(block) {
                    *x = at(row, column);
                }
            }
        })
    }

    /// Packs a matrix, `[row][column]`.
    pub(crate) fn of_rows<S: Simd>(s: S, rows: usize, columns: usize, matrix: &[T]) -> Self {
        Self::by_block::<S>(rows, columns, |first, height, block| {
            let matrix = &matrix[first * columns..];
            match height {
                8 => enter(s, TransposeRows::<T, 8> { matrix, block }),
                4 => enter(s, TransposeRows::<T, 4> { matrix, block }),
                2 => enter(s, TransposeRows::<T, 2> { matrix, block }),
                _ => block.copy_from_slice(&matrix[..columns]),
            }
        })
    }

    /// Packs the first `rows` rows of a matrix given as `[column][row]`, of so many rows in all.
    pub(crate) fn of_columns<S: Simd>(rows: usize, all: usize, matrix: &[T]) -> Self {
        fn take<T: Copy, const R: usize>(all: usize, matrix: &[T], block: &mut [T]) {
            let columns = matrix.chunks(all).filter_map(<[T]>::first_chunk::<R>);
            for (to, from) in block.as_chunks_mut::<R>().0.iter_mut().zip(columns) {
                *to = *from;
            }
        }
        let columns = matrix.len().checked_div(all).unwrap_or(0);
        Self::by_block::<S>(rows, columns, |first, height, block| {
            let matrix = &matrix[first..];
            match height {
                8 => take::<T, 8>(all, matrix, block),
                4 => take::<T, 4>(all, matrix, block),
                2 => take::<T, 2>(all, matrix, block),
                _ => take::<T, 1>(all, matrix, block),
            }
        })
    }

    /// Packs a matrix block by block: first row, height, and the place of it.
    fn by_block<S: Simd>(
        rows: usize,
        columns: usize,
        mut fill: impl FnMut(usize, usize, &mut [T]),
    ) -> Self {
        let mut data = vec![T::default(); rows * columns];
        let (mut first, mut rest) = (0, data.as_mut_slice());
        while first < rows && columns > 0 {
            let height = block(rows - first, largest_block::<S>());
            let place;
            (place, rest) = rest.split_at_mut(height * columns);
            fill(first, height, place);
            first += height;
        }
        Self {
            rows,
            columns,
            data,
        }
    }
}

/// `block[column][row] = matrix[row][column]`, of R rows.
struct TransposeRows<'a, T, const R: usize> {
    matrix: &'a [T],
    block: &'a mut [T],
}

impl<T: Element, S: Simd, const R: usize> Kernel<S> for TransposeRows<'_, T, R> {
    type Output = ();

    #[inline(always)]
    fn run(self, s: S) {
        let block = self.block.as_chunks_mut::<R>().0;
        let (columns, lanes) = (block.len(), T::lanes::<S>());
        if R > lanes {
            for (column, to) in block.iter_mut().enumerate() {
                for (r, to) in to.iter_mut().enumerate() {
                    *to = self.matrix[r * columns + column];
                }
            }
            return;
        }
        for (i, block) in block.chunks_mut(lanes).enumerate() {
            let from = &self.matrix[i * lanes..];
            let transposed = transposed::<T, S>(s, from, columns, (R, block.len()));
            for (to, column) in block.iter_mut().zip(&transposed) {
                let column = scalars::<T, S>(std::slice::from_ref(column));
                if let Some(column) = column.first_chunk::<R>() {
                    *to = *column;
                }
            }
        }
    }
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
    /// parts, so that the products of a small block need not wait for each other.
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
            let height = block(rows - first, largest_block::<S>());
            let last = first + (rows - first) / height * height;
            let weights = &data[first * all..last * all];
            match height {
                8 => self.blocks::<8, 1>(s, epilogue, first..last, weights, columns.clone()),
                4 => self.blocks::<4, 1>(s, epilogue, first..last, weights, columns.clone()),
                2 => self.blocks::<2, 4>(s, epilogue, first..last, weights, columns.clone()),
                _ => self.blocks::<1, 4>(s, epilogue, first..last, weights, columns.clone()),
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
fn add_product<T: Element, S: Simd, const R: usize, const V: usize>(
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
    fn run(self, s: S) {
        let plain = WithEpilogue {
            product: self,
            epilogue: AsIs,
        };
        plain.run(s);
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
        let columns = product.weights.columns;
        let most = (NEAR / (V * size_of::<T::Vector<S>>())).max(1);
        let most = columns.div_ceil(columns.div_ceil(most).max(1)).max(1);
        for from in (0..columns.max(1)).step_by(most) {
            product.part(s, &epilogue, from..columns.min(from + most));
        }
    }
}

/// The x and g of one evaluation in a window: tiles `[feature][B]`.
#[derive(Clone, Copy)]
pub(crate) struct Pair<'a, X> {
    pub(crate) x: &'a [X],
    pub(crate) g: &'a [X],
}

/// Vectors that hold n features.
pub(crate) fn padded<T: Element, S: Simd>(features: usize) -> usize {
    features.next_multiple_of(T::lanes::<S>())
}

/// `dWᵀ[input][output] += Σ x[input] g[output]`, the outputs in the lanes, from transposed g.
pub(crate) struct Outer<'a, T: Element, S: Simd, const V: usize> {
    pub(crate) inputs: usize,
    /// A multiple of the lanes.  g has so many features, those beyond the layer's anything finite.
    pub(crate) outputs: usize,
    pub(crate) window: &'a [Pair<'a, T::Vector<S>>],
    /// [`outer_room`]: g of the window in two vectors of outputs, `[evaluation][B][2]`.
    pub(crate) transposed: &'a mut [T::Vector<S>],
    /// `[input][output]`.
    pub(crate) sums: &'a mut [T::Vector<S>],
}

/// Vectors that [`Outer`] needs for a window of so many pairs.
pub(crate) fn outer_room<T: Element, S: Simd, const V: usize>(pairs: usize) -> usize {
    pairs * V * T::lanes::<S>() * 2
}

/// One number of each row.
#[inline(always)]
fn column<T: Copy + Default, const R: usize>(rows: &[&[T]; R], at: usize) -> [T; R] {
    let mut column = [T::default(); R];
    for r in 0..R {
        column[r] = rows[r][at];
    }
    column
}

impl<T: Element, S: Simd, const V: usize> Kernel<S> for Outer<'_, T, S, V> {
    type Output = ();

    #[inline(always)]
    fn run(mut self, s: S) {
        let across = self.outputs / T::lanes::<S>();
        for output in (0..across).step_by(2) {
            if output + 2 <= across {
                self.strip::<2>(s, output);
            } else {
                self.strip::<1>(s, output);
            }
        }
    }
}

impl<T: Element, S: Simd, const V: usize> Outer<'_, T, S, V> {
    /// All inputs by W vectors of outputs.
    #[inline(always)]
    fn strip<const W: usize>(&mut self, s: S, output: usize) {
        let lanes = T::lanes::<S>();
        let size = V * lanes * W;
        for (pair, transposed) in self
            .window
            .iter()
            .zip(self.transposed.chunks_exact_mut(size))
        {
            for w in 0..W {
                for v in 0..V {
                    let from = &pair.g[(output + w) * lanes * V + v..];
                    T::transpose(s, from, V, &mut transposed[v * lanes * W + w..], W);
                }
            }
        }
        let mut input = 0;
        while input < self.inputs {
            let height = block(self.inputs - input, largest_block::<S>());
            match height {
                8 => self.block::<8, W>(s, input, output),
                4 => self.block::<4, W>(s, input, output),
                2 => self.block::<2, W>(s, input, output),
                _ => self.block::<1, W>(s, input, output),
            }
            input += height;
        }
    }

    /// R inputs by W vectors of outputs.
    #[inline(always)]
    fn block<const R: usize, const W: usize>(&mut self, s: S, input: usize, output: usize) {
        let (across, rows) = (self.outputs / T::lanes::<S>(), V * T::lanes::<S>());
        let transposed = self.transposed.as_chunks::<W>().0.chunks_exact(rows);
        let mut sums = [[T::zeros::<S>(); W]; R];
        for (pair, transposed) in self.window.iter().zip(transposed) {
            let x = scalars::<T, S>(&pair.x[input * V..(input + R) * V]);
            let mut each: [&[T]; R] = [&x[..rows]; R];
            for r in 1..R {
                each[r] = &x[r * rows..][..rows];
            }
            // By twos: a turn of the loop that is shorter does not keep the multipliers fed.
            let (twos, last) = transposed.as_chunks::<2>();
            for (b, g) in twos.iter().enumerate() {
                add_product(s, &column(&each, 2 * b), &g[0], &mut sums);
                add_product(s, &column(&each, 2 * b + 1), &g[1], &mut sums);
            }
            if let [g] = last {
                add_product(s, &column(&each, rows - 1), g, &mut sums);
            }
        }
        for (r, sums) in sums.iter().enumerate() {
            let out = &mut self.sums[(input + r) * across + output..][..W];
            for (out, sum) in out.iter_mut().zip(sums) {
                *out = T::plus(s, *out, *sum);
            }
        }
    }
}

/// `dW[output][input] += Σ g[output] x[input]` by lane, the batch in the lanes: for layers that are too
/// thin for [`Outer`].
pub(crate) struct Dot<'a, T: Element, S: Simd, const V: usize> {
    pub(crate) inputs: usize,
    pub(crate) outputs: usize,
    pub(crate) window: &'a [Pair<'a, T::Vector<S>>],
    /// `[output][input]`.
    pub(crate) sums: &'a mut [T::Vector<S>],
}

impl<T: Element, S: Simd, const V: usize> Kernel<S> for Dot<'_, T, S, V> {
    type Output = ();

    #[inline(always)]
    fn run(mut self, s: S) {
        let mut output = 0;
        while output < self.outputs {
            let height = block(self.outputs - output, 8);
            let mut input = 0;
            while input < self.inputs {
                // Sixteen accumulators at most: eight by two, or two by eight.
                let width = block(self.inputs - input, if height > 2 { 2 } else { 8 });
                match (height, width) {
                    (8, 2) => self.block::<8, 2>(s, output, input),
                    (8, _) => self.block::<8, 1>(s, output, input),
                    (4, 2) => self.block::<4, 2>(s, output, input),
                    (4, _) => self.block::<4, 1>(s, output, input),
                    (2, 8) => self.block::<2, 8>(s, output, input),
                    (2, 4) => self.block::<2, 4>(s, output, input),
                    (2, 2) => self.block::<2, 2>(s, output, input),
                    (2, _) => self.block::<2, 1>(s, output, input),
                    (_, 8) => self.block::<1, 8>(s, output, input),
                    (_, 4) => self.block::<1, 4>(s, output, input),
                    (_, 2) => self.block::<1, 2>(s, output, input),
                    _ => self.block::<1, 1>(s, output, input),
                }
                input += width;
            }
            output += height;
        }
    }
}

impl<T: Element, S: Simd, const V: usize> Dot<'_, T, S, V> {
    /// R outputs by C inputs.
    #[inline(always)]
    fn block<const R: usize, const C: usize>(&mut self, s: S, output: usize, input: usize) {
        let mut sums = [[T::zeros::<S>(); C]; R];
        for pair in self.window {
            let x = &pair.x[input * V..][..C * V];
            let g = &pair.g[output * V..][..R * V];
            for v in 0..V {
                for r in 0..R {
                    for c in 0..C {
                        let product = (g[r * V + v], x[c * V + v]);
                        sums[r][c] = T::mul_add(s, product.0, product.1, sums[r][c]);
                    }
                }
            }
        }
        for (r, sums) in sums.iter().enumerate() {
            let out = &mut self.sums[(output + r) * self.inputs + input..][..C];
            for (out, sum) in out.iter_mut().zip(sums) {
                *out = T::plus(s, *out, *sum);
            }
        }
    }
}

/// `sums[output] += Σ g[output]`, by lane.
#[inline(always)]
pub(crate) fn add_rows<T: Element, S: Simd, const V: usize>(
    s: S,
    window: &[Pair<'_, T::Vector<S>>],
    sums: &mut [T::Vector<S>],
) {
    let (fours, rest) = sums.as_chunks_mut::<4>();
    let first = 4 * fours.len();
    for (i, sums) in fours.iter_mut().enumerate() {
        add_some::<T, S, V, 4>(s, 4 * i, window, sums);
    }
    for (i, sum) in (first..).zip(rest) {
        add_some::<T, S, V, 1>(s, i, window, std::array::from_mut(sum));
    }
}

/// [`add_rows`] of R outputs.
#[inline(always)]
fn add_some<T: Element, S: Simd, const V: usize, const R: usize>(
    s: S,
    output: usize,
    window: &[Pair<'_, T::Vector<S>>],
    sums: &mut [T::Vector<S>; R],
) {
    let mut parts = [T::zeros::<S>(); R];
    for pair in window {
        let g = pair.g[output * V..][..R * V].as_chunks::<V>().0;
        for r in 0..R {
            for g in g[r] {
                parts[r] = T::plus(s, parts[r], g);
            }
        }
    }
    for r in 0..R {
        sums[r] = T::plus(s, sums[r], parts[r]);
    }
}

/// What the lanes of a tile hold that no row is left for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Idle {
    /// Copies of the last row: of states, so that a lane without a row does what a row does.
    Copies,
    /// Zeros: of cotangents, so that it adds nothing to a sum.
    Zeros,
}

/// Rows `[row][feature]` of a batch into a tile `[feature][B]`.
pub(crate) fn load<T: Element, S: Simd>(
    rows: &[T],
    features: usize,
    batch: usize,
    idle: Idle,
    tile: &mut [T::Vector<S>],
) {
    spread(rows, features, batch, idle, scalars_mut::<T, S>(tile));
}

/// [`load`], which needs no vectors.
fn spread<T: Element>(rows: &[T], features: usize, batch: usize, idle: Idle, tile: &mut [T]) {
    for (b, row) in rows.chunks_exact(features).enumerate() {
        for (i, &x) in row.iter().enumerate() {
            tile[i * batch + b] = x;
        }
    }
    let used = rows.len() / features;
    for feature in tile.chunks_exact_mut(batch) {
        let last = match idle {
            Idle::Copies => used.checked_sub(1).map(|last| feature[last]),
            Idle::Zeros => None,
        };
        feature[used..].fill(last.unwrap_or_default());
    }
}

/// The inverse of [`load`].
pub(crate) fn store<T: Element, S: Simd>(
    tile: &[T::Vector<S>],
    features: usize,
    batch: usize,
    rows: &mut [T],
) {
    gather(scalars::<T, S>(tile), features, batch, rows);
}

/// [`store`], which needs none either.
fn gather<T: Element>(tile: &[T], features: usize, batch: usize, rows: &mut [T]) {
    for (b, row) in rows.chunks_exact_mut(features).enumerate() {
        for (i, x) in row.iter_mut().enumerate() {
            *x = tile[i * batch + b];
        }
    }
}
