//! Products of weights with single rows, the features of a row in the lanes.
//!
//! A tile of V rows holds for each of them whole vectors of features: `[vector][V][lane]`, where feature i is lane i mod L of
//! vector i / L.  So a product with a row needs one multiply-add for L outputs and an input, however few rows there are,
//! while rows in the lanes would leave lanes idle.  Outputs sum their terms in the order of [`Layer`](super::product::Layer),
//! so that a row has the same bits with both.

use pulp::Simd;

use super::outer::Pair;
use super::product::{add_product, has_many_registers, Epilogue, Product};
use super::{aligned, enter, scalars, scalars_mut, Aligned, Element, Kernel};

/// A matrix packed for [`MatVec`]: blocks of vectors of outputs, `[block][input][vector]`.
pub(crate) struct Across<T> {
    /// Outputs.
    rows: usize,
    /// Where each input lies: its vector, and its lane.
    places: Vec<[u32; 2]>,
    data: Aligned<T>,
}

/// Columns that are packed at a time.
const AHEAD: usize = 16;

/// Vectors of outputs in the block that begins at vector `first` of so many.  The last vector is a block of its own where
/// some of its outputs sum in parts.
fn block(vectors: usize, first: usize, ends_in_parts: bool) -> usize {
    match vectors - first - usize::from(ends_in_parts) {
        8.. => 8,
        4.. => 4,
        2.. => 2,
        _ => 1,
    }
}

impl<T: Element> Across<T> {
    /// Packs the matrix of elements `at(row, column)`; the column c lies at `places[c]`.
    pub(crate) fn new<S: Simd>(
        rows: usize,
        places: Vec<[u32; 2]>,
        at: impl Fn(usize, usize) -> T,
    ) -> Self {
        let lanes = T::lanes::<S>();
        let vectors = rows.div_ceil(lanes);
        let mut data = aligned(vectors * places.len() * lanes);
        let (mut first, mut rest) = (0, &mut data[..]);
        while first < vectors && !places.is_empty() {
            let height = block(vectors, first, !rows.is_multiple_of(4));
            let place;
            (place, rest) = rest.split_at_mut(height * places.len() * lanes);
            // Some columns at a time: the numbers of a row that follow on each other are in one line of the cache.
            for (i, place) in place.chunks_mut(AHEAD * height * lanes).enumerate() {
                for (r, row) in (first * lanes..rows).take(height * lanes).enumerate() {
                    let numbers = place[r..].iter_mut().step_by(height * lanes);
                    for (column, x) in (i * AHEAD..).zip(numbers) {
                        *x = at(row, column);
                    }
                }
            }
            first += height;
        }
        Self { rows, places, data }
    }

    /// Where each input lies: its vector, and its lane.
    pub(crate) fn places(&self) -> &[[u32; 2]] {
        &self.places
    }

    /// Vectors of the outputs of a row.
    fn vectors<S: Simd>(&self) -> usize {
        self.rows.div_ceil(T::lanes::<S>())
    }
}

/// `out = W x + start`, start by output (a bias, in whole vectors) or zero, stored as `epilogue` says.
struct MatVec<'a, T: Element, S: Simd, const V: usize, E> {
    weights: &'a Across<T>,
    start: &'a [T],
    x: &'a [T::Vector<S>],
    out: &'a mut [T::Vector<S>],
    epilogue: E,
}

impl<T: Element, S: Simd, const V: usize, E: Epilogue<T, S>> Kernel<S> for MatVec<'_, T, S, V, E> {
    type Output = ();

    #[inline(always)]
    fn run(mut self, s: S) {
        let vectors = self.weights.vectors::<S>();
        let columns = self.weights.places.len();
        let ends_in_parts = !self.weights.rows.is_multiple_of(4);
        let mut rest = T::vectors::<S>(&self.weights.data);
        let mut first = 0;
        while first < vectors {
            let height = block(vectors, first, ends_in_parts);
            let weights;
            (weights, rest) = rest.split_at(height * columns);
            match height {
                // Accumulators for twice eight vectors are in registers only where there are many.
                8 if V == 1 || has_many_registers::<S>() => {
                    self.block::<8, 8>(s, weights, first, 0)
                }
                8 => {
                    self.block::<8, 4>(s, weights, first, 0);
                    self.block::<8, 4>(s, weights, first, 4);
                }
                4 => self.block::<4, 4>(s, weights, first, 0),
                2 => self.block::<2, 2>(s, weights, first, 0),
                _ if first + 1 == vectors && ends_in_parts => {
                    self.last(s, weights, first);
                }
                _ => self.block::<1, 1>(s, weights, first, 0),
            }
            first += height;
        }
    }
}

impl<T: Element, S: Simd, const V: usize, E: Epilogue<T, S>> MatVec<'_, T, S, V, E> {
    /// What the sums of R vectors begin with.
    #[inline(always)]
    fn start<const R: usize>(&self, first: usize) -> [[T::Vector<S>; V]; R] {
        let mut sums = [[T::zeros::<S>(); V]; R];
        if !self.start.is_empty() {
            let start = &T::vectors::<S>(self.start)[first..first + R];
            for r in 0..R {
                sums[r] = [start[r]; V];
            }
        }
        sums
    }

    /// The numbers of an input, of all rows: those of row v are v vectors behind the first.  One slice of a length that
    /// the compiler knows: a check in the loops that could fail would keep sums out of registers.
    #[inline(always)]
    fn input(x: &[T], [vector, lane]: [u32; 2]) -> [T; V] {
        let lanes = T::lanes::<S>();
        let x = &x[vector as usize * V * lanes + lane as usize..][..(V - 1) * lanes + 1];
        let mut each = [T::default(); V];
        for v in 0..V {
            each[v] = x[v * lanes];
        }
        each
    }

    /// R vectors of a block of H, from the vector `from` of the block on.
    #[inline(always)]
    fn block<const H: usize, const R: usize>(
        &mut self,
        s: S,
        weights: &[T::Vector<S>],
        first: usize,
        from: usize,
    ) {
        let x = scalars::<T, S>(self.x);
        let mut sums = self.start::<R>(first + from);
        for (weights, place) in weights.as_chunks::<H>().0.iter().zip(&self.weights.places) {
            let x = Self::input(x, *place);
            for v in 0..V {
                let x = T::splat(s, x[v]);
                for r in 0..R {
                    sums[r][v] = T::mul_add(s, weights[from + r], x, sums[r][v]);
                }
            }
        }
        self.store(s, first + from, sums);
    }

    /// The last vector, whose outputs behind the last multiple of four sum in four parts.
    #[inline(always)]
    fn last(&mut self, s: S, weights: &[T::Vector<S>], first: usize) {
        let lanes = T::lanes::<S>();
        let x = scalars::<T, S>(self.x);
        let mut chain = self.start::<1>(first);
        let mut parts = [[T::zeros::<S>(); V]; 4];
        parts[0] = chain[0];
        let (weights, last_weights) = weights.as_chunks::<4>();
        let (places, last_places) = self.weights.places.as_chunks::<4>();
        for (weights, places) in weights.iter().zip(places) {
            for u in 0..4 {
                let x = Self::input(x, places[u]);
                for v in 0..V {
                    let x = T::splat(s, x[v]);
                    chain[0][v] = T::mul_add(s, weights[u], x, chain[0][v]);
                    parts[u][v] = T::mul_add(s, weights[u], x, parts[u][v]);
                }
            }
        }
        for (weights, place) in last_weights.iter().zip(last_places) {
            let x = Self::input(x, *place);
            for v in 0..V {
                let x = T::splat(s, x[v]);
                chain[0][v] = T::mul_add(s, *weights, x, chain[0][v]);
                parts[0][v] = T::mul_add(s, *weights, x, parts[0][v]);
            }
        }
        let whole = self.weights.rows / 4 * 4 - first * lanes;
        for v in 0..V {
            let mut sum = parts[0][v];
            for part in &parts[1..] {
                sum = T::plus(s, sum, part[v]);
            }
            let sum = std::slice::from_mut(&mut sum);
            let one = std::slice::from_ref(&chain[0][v]);
            scalars_mut::<T, S>(sum)[..whole].copy_from_slice(&scalars::<T, S>(one)[..whole]);
            chain[0][v] = sum[0];
        }
        self.store(s, first, chain);
    }

    #[inline(always)]
    fn store<const R: usize>(&mut self, s: S, first: usize, sums: [[T::Vector<S>; V]; R]) {
        let out = self.out[first * V..].as_chunks_mut::<V>().0;
        if let Some(out) = out.first_chunk_mut::<R>() {
            self.epilogue.store(s, first * V, sums, out);
        }
    }
}

/// `dW[output][input] += Σ g[output] x[input]`, the inputs in the lanes, over a window of evaluations of V rows each.
pub(crate) struct OuterOfRows<'a, T: Element, S: Simd, const V: usize> {
    pub(crate) outputs: usize,
    /// Vectors of inputs.
    pub(crate) across: usize,
    pub(crate) window: &'a [Pair<'a, T::Vector<S>>],
    /// `[output][vector]`.
    pub(crate) sums: &'a mut [T::Vector<S>],
}

impl<T: Element, S: Simd, const V: usize> Kernel<S> for OuterOfRows<'_, T, S, V> {
    type Output = ();

    #[inline(always)]
    fn run(mut self, s: S) {
        let whole = self.outputs / 4 * 4;
        for output in (0..whole).step_by(4) {
            self.rows::<4>(s, output);
        }
        for output in whole..self.outputs {
            self.rows::<1>(s, output);
        }
    }
}

impl<T: Element, S: Simd, const V: usize> OuterOfRows<'_, T, S, V> {
    /// R outputs, which lie in one vector, and all inputs.
    #[inline(always)]
    fn rows<const R: usize>(&mut self, s: S, output: usize) {
        let pairs = self.across / 2 * 2;
        for vector in (0..pairs).step_by(2) {
            self.block::<R, 2>(s, output, vector);
        }
        for vector in pairs..self.across {
            self.block::<R, 1>(s, output, vector);
        }
    }

    #[inline(always)]
    fn block<const R: usize, const W: usize>(&mut self, s: S, output: usize, vector: usize) {
        let lanes = T::lanes::<S>();
        let from = output / lanes * V * lanes + output % lanes;
        let mut sums = [[T::zeros::<S>(); W]; R];
        for pair in self.window {
            let g = scalars::<T, S>(pair.g);
            for v in 0..V {
                let Some(g) = g[from + v * lanes..].first_chunk::<R>() else {
                    continue;
                };
                let mut x = [T::zeros::<S>(); W];
                for (w, x) in x.iter_mut().enumerate() {
                    *x = pair.x[(vector + w) * V + v];
                }
                add_product(s, g, &x, &mut sums);
            }
        }
        for (r, sums) in sums.iter().enumerate() {
            let out = &mut self.sums[(output + r) * self.across + vector..][..W];
            for (out, sum) in out.iter_mut().zip(sums) {
                *out = T::plus(s, *out, *sum);
            }
        }
    }
}

impl<T: Element> Product<T> for Across<T> {
    #[inline(always)]
    fn product_with<S: Simd, const V: usize>(
        &self,
        s: S,
        start: &[T],
        x: &[T::Vector<S>],
        out: &mut [T::Vector<S>],
        epilogue: impl Epilogue<T, S>,
    ) {
        let product = MatVec::<T, S, V, _> {
            weights: self,
            start,
            x,
            out,
            epilogue,
        };
        enter(s, product);
    }
}
