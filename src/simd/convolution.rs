//! Convolutions of tiles of images: `[channel][row][column][B]`, the B images in the lanes of V
//! vectors.
//!
//! A filter of odd size reads zeros beyond the border.  In a tile, the taps of neighbouring pixels
//! are neighbouring vectors, so a product is R output channels by Q vectors of a row, and every
//! vector that is loaded serves R outputs.  At the border the taps that would read zeros are left
//! out.  The adjoint is a convolution with the channels exchanged and the filters rotated by half a turn.

use std::ops::Range;

use pulp::Simd;

use super::packed::Packed;
use super::product::{block, has_block, has_many_registers};
use super::{Element, Kernel};

/// Size of an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Image {
    pub(crate) height: usize,
    pub(crate) width: usize,
}

impl Image {
    /// Pixels of a channel.
    pub(crate) fn pixels(self) -> usize {
        self.height * self.width
    }

    /// Which of `size` taps down read rows of the image from output row `row`.
    #[inline(always)]
    fn taps(self, size: usize, row: usize) -> Range<usize> {
        inside(size, row, self.height)
    }
}

/// Which of `size` taps around `at` lie in `0..length`.
#[inline(always)]
fn inside(size: usize, at: usize, length: usize) -> Range<usize> {
    let reach = size / 2;
    reach.saturating_sub(at)..size.min(length + reach - at)
}

/// Filters `[output][input][size][size]`, packed for [`Convolution`].
pub(crate) fn filters<T: Element, S: Simd>(
    [outputs, inputs, size]: [usize; 3],
    weights: &[T],
) -> Packed<T> {
    let columns = inputs * size * size;
    Packed::new::<S>(outputs, columns, |o, column| weights[o * columns + column])
}

/// The filters of the adjoint: outputs and inputs exchanged, both axes reversed.
pub(crate) fn adjoint_filters<T: Element, S: Simd>(
    [outputs, inputs, size]: [usize; 3],
    weights: &[T],
) -> Packed<T> {
    let taps = size * size;
    Packed::new::<S>(inputs, outputs * taps, |i, column| {
        let (o, tap) = (column / taps, column % taps);
        weights[(o * inputs + i) * taps + taps - 1 - tap]
    })
}

/// One row of `out = w ∗ x + start`, start by output (a bias) or zero.
pub(crate) struct Convolution<'a, T: Element, S: Simd, const V: usize> {
    pub(crate) filters: &'a Packed<T>,
    pub(crate) size: usize,
    pub(crate) image: Image,
    /// One for each output, or none.
    pub(crate) start: &'a [T],
    pub(crate) row: usize,
    pub(crate) x: &'a [T::Vector<S>],
    pub(crate) out: &'a mut [T::Vector<S>],
}

impl<T: Element, S: Simd, const V: usize> Kernel<S> for Convolution<'_, T, S, V> {
    type Output = ();

    #[inline(always)]
    fn run(mut self, s: S) {
        match self.size {
            // The size as a constant, so that the taps of a row are unrolled.
            3 if const { T::WIDE } => self.all_outputs(s, 3),
            size => self.all_outputs(s, size),
        }
    }
}

impl<T: Element, S: Simd, const V: usize> Convolution<'_, T, S, V> {
    #[inline(always)]
    fn all_outputs(&mut self, s: S, size: usize) {
        let Packed {
            rows,
            columns,
            data,
        } = self.filters;
        let (mut first, mut at) = (0, 0);
        while first < *rows {
            let height = block::<T, S>(*rows, first);
            let weights = &data[at..at + height * columns];
            match height {
                8 if const { has_block::<T, S, 8>() } => {
                    self.line::<8, 2>(s, size, first, weights);
                }
                6 if const { has_block::<T, S, 6>() } => {
                    self.line::<6, 2>(s, size, first, weights);
                }
                4 if const { has_block::<T, S, 4>() } => {
                    self.line::<4, 2>(s, size, first, weights);
                }
                2 if const { has_block::<T, S, 2>() } => {
                    self.line::<2, 4>(s, size, first, weights);
                }
                _ => self.line::<1, 8>(s, size, first, weights),
            }
            first += height;
            at += height * columns;
        }
    }

    /// R outputs from `first` on: Q vectors at once where all their taps are inside, else a pixel.
    #[inline(always)]
    fn line<const R: usize, const Q: usize>(
        &mut self,
        s: S,
        size: usize,
        first: usize,
        weights: &[T],
    ) {
        let width = self.image.width;
        let (reach, length) = (size / 2 * V, width * V);
        let weights = weights.as_chunks::<R>().0;
        let mut at = 0;
        while at < length {
            if at >= reach && at + Q + reach <= length {
                self.block::<R, Q>(s, size, first, weights, at, 0..size);
                at += Q;
            } else {
                let taps = inside(size, at / V, width);
                self.block::<R, V>(s, size, first, weights, at, taps);
                at += V;
            }
        }
    }

    /// R outputs from `first` on of the Q vectors from `at` on, with these taps across.
    #[inline(always)]
    fn block<const R: usize, const Q: usize>(
        &mut self,
        s: S,
        size: usize,
        first: usize,
        weights: &[[T; R]],
        at: usize,
        across: Range<usize>,
    ) {
        let (length, reach) = (self.image.width * V, size / 2);
        let down = self.image.taps(size, self.row);
        let mut sums = [[T::zeros::<S>(); Q]; R];
        if let Some(start) = self.start.get(first..).and_then(<[T]>::first_chunk::<R>) {
            for r in 0..R {
                sums[r] = [T::splat(s, start[r]); Q];
            }
        }
        let plane = self.image.pixels() * V;
        let n = across.len();
        let from = (self.row + down.start - reach) * length + at + across.start * V - reach * V;
        for (x, weights) in self
            .x
            .chunks_exact(plane)
            .zip(weights.chunks_exact(size * size))
        {
            let mut from = from;
            for ky in down.clone() {
                let pixels = &x[from..][..Q + (n - 1) * V];
                let weights = &weights[ky * size + across.start..][..n];
                for kx in 0..n {
                    let pixels = &pixels[kx * V..][..Q];
                    for r in 0..R {
                        let w = T::splat(s, weights[kx][r]);
                        for q in 0..Q {
                            sums[r][q] = T::mul_add(s, w, pixels[q], sums[r][q]);
                        }
                    }
                }
                from += length;
            }
        }
        let at = self.row * length + at;
        for (r, sums) in sums.iter().enumerate() {
            self.out[(first + r) * plane + at..][..Q].copy_from_slice(sums);
        }
    }
}

/// Bytes of cotangents that a band of rows may have, to stay in the first cache.
const BAND: usize = 32 << 10;

/// `dw[output][input][tap] += Σ g[output] x[input]` over all pixels, and `db[output] += Σ
/// g[output]`, both by lane.
pub(crate) struct Correlation<'a, T: Element, S: Simd, const V: usize> {
    pub(crate) size: usize,
    pub(crate) image: Image,
    pub(crate) inputs: usize,
    pub(crate) outputs: usize,
    pub(crate) x: &'a [T::Vector<S>],
    pub(crate) g: &'a [T::Vector<S>],
    /// In the order of [`filter_totals`].
    pub(crate) filters: &'a mut [T::Vector<S>],
    pub(crate) biases: &'a mut [T::Vector<S>],
}

impl<T: Element, S: Simd, const V: usize> Kernel<S> for Correlation<'_, T, S, V> {
    type Output = ();

    #[inline(always)]
    fn run(mut self, s: S) {
        let height = self.image.height;
        let line = self.image.width * V * size_of::<T::Vector<S>>();
        let band = (BAND / (tallest::<S>() * line)).max(1);
        let mut top = 0;
        while top < height {
            let rows = top..height.min(top + band);
            self.band(s, rows);
            top += band;
        }
    }
}

impl<T: Element, S: Simd, const V: usize> Correlation<'_, T, S, V> {
    /// What some rows of g add.
    #[inline(always)]
    fn band(&mut self, s: S, rows: Range<usize>) {
        let columns = self.inputs * self.size;
        let mut output = 0;
        while output < self.outputs {
            let height = height::<T, S>(self.outputs - output);
            self.add_biases(s, output..output + height, &rows);
            let mut column = 0;
            while column < columns {
                let width = width(columns - column);
                for ky in 0..self.size {
                    let at = [output, column, ky];
                    match (height, width) {
                        (8, 3) if const { correlates::<T, S, 8>() } => {
                            self.block::<8, 3>(s, at, &rows);
                        }
                        (8, _) if const { correlates::<T, S, 8>() } => {
                            self.block::<8, 1>(s, at, &rows);
                        }
                        (4, 3) if const { correlates::<T, S, 4>() } => {
                            self.block::<4, 3>(s, at, &rows);
                        }
                        (4, _) if const { correlates::<T, S, 4>() } => {
                            self.block::<4, 1>(s, at, &rows);
                        }
                        (2, 3) if const { correlates::<T, S, 2>() } => {
                            self.block::<2, 3>(s, at, &rows);
                        }
                        (2, _) if const { correlates::<T, S, 2>() } => {
                            self.block::<2, 1>(s, at, &rows);
                        }
                        (_, 3) => self.block::<1, 3>(s, at, &rows),
                        _ => self.block::<1, 1>(s, at, &rows),
                    }
                }
                column += width;
            }
            output += height;
        }
    }

    #[inline(always)]
    fn add_biases(&mut self, s: S, outputs: Range<usize>, rows: &Range<usize>) {
        let (plane, length) = (self.image.pixels() * V, self.image.width * V);
        for output in outputs {
            let mut sums = [T::zeros::<S>(); 4];
            let g = &self.g[output * plane..][rows.start * length..rows.end * length];
            let (fours, ones) = g.as_chunks::<4>();
            for g in fours {
                for i in 0..4 {
                    sums[i] = T::plus(s, sums[i], g[i]);
                }
            }
            for g in ones {
                sums[0] = T::plus(s, sums[0], *g);
            }
            for sum in sums {
                self.biases[output] = T::plus(s, self.biases[output], sum);
            }
        }
    }

    /// R outputs by C columns, a column being an input and a tap across.
    #[inline(always)]
    fn block<const R: usize, const C: usize>(
        &mut self,
        s: S,
        [output, column, ky]: [usize; 3],
        rows: &Range<usize>,
    ) {
        let (size, image) = (self.size, self.image);
        let (plane, length, reach) = (image.pixels() * V, image.width * V, size / 2);
        let mut sums = [[T::zeros::<S>(); C]; R];
        for row in rows.clone() {
            if !image.taps(size, row).contains(&ky) {
                continue;
            }
            let mut gs = [&self.g[..0]; R];
            for (r, g) in gs.iter_mut().enumerate() {
                *g = &self.g[(output + r) * plane + row * length..][..length];
            }
            let mut xs = [&self.x[..0]; C];
            let mut taps = [0; C];
            for c in 0..C {
                let input = (column + c) / size;
                xs[c] = &self.x[input * plane + (row + ky - reach) * length..][..length];
                taps[c] = (column + c) % size * V;
            }
            add_line::<T, S, R, C>(s, reach * V, taps, gs, xs, &mut sums);
        }
        let at = place(self.inputs * size, size, [output, column, ky], [R, C]);
        let filters = &mut self.filters[at..][..R * C];
        for r in 0..R {
            for c in 0..C {
                filters[r * C + c] = T::plus(s, filters[r * C + c], sums[r][c]);
            }
        }
    }
}

/// Outputs of the largest block: three accumulators for each must leave registers free.
const fn tallest<S: Simd>() -> usize {
    if has_many_registers::<S>() {
        8
    } else {
        4
    }
}

/// Whether there is code for blocks of R outputs.
const fn correlates<T: Element, S: Simd, const R: usize>() -> bool {
    let most = tallest::<S>();
    R == most || R == 1 || R < most && T::WIDE
}

/// Outputs of a block where `left` are left: 8, 4, 2 or 1.
fn height<T: Element, S: Simd>(left: usize) -> usize {
    match left {
        8.. if const { correlates::<T, S, 8>() } => 8,
        4.. if const { correlates::<T, S, 4>() } => 4,
        2.. if const { correlates::<T, S, 2>() } => 2,
        _ => 1,
    }
}

/// Columns of a block where `left` are left.
fn width(left: usize) -> usize {
    if left >= 3 {
        3
    } else {
        1
    }
}

/// Where the sums of a block of so many outputs and columns begin, of filters with so many columns.
fn place(
    columns: usize,
    size: usize,
    [output, column, ky]: [usize; 3],
    [height, width]: [usize; 2],
) -> usize {
    (output * columns + height * column) * size + ky * height * width
}

/// The sums of [`Correlation`] over all lanes, `[output][input][size][size]`.
#[inline(always)]
pub(crate) fn filter_totals<T: Element, S: Simd>(
    s: S,
    [outputs, inputs, size]: [usize; 3],
    sums: &[T::Vector<S>],
) -> Vec<T> {
    let columns = inputs * size;
    let mut totals = vec![T::default(); outputs * columns * size];
    let mut output = 0;
    while output < outputs {
        let height = height::<T, S>(outputs - output);
        let mut column = 0;
        while column < columns {
            let width = width(columns - column);
            for ky in 0..size {
                let at = place(columns, size, [output, column, ky], [height, width]);
                for r in 0..height {
                    for c in 0..width {
                        let (input, kx) = ((column + c) / size, (column + c) % size);
                        let to = (((output + r) * inputs + input) * size + ky) * size + kx;
                        totals[to] = T::total(s, sums[at + r * width + c]);
                    }
                }
            }
            column += width;
        }
        output += height;
    }
    totals
}

/// `sums[r][c] += Σ gs[r][p] xs[c][p + taps[c] − reach]` over a row.
#[inline(always)]
fn add_line<T: Element, S: Simd, const R: usize, const C: usize>(
    s: S,
    reach: usize,
    taps: [usize; C],
    gs: [&[T::Vector<S>]; R],
    xs: [&[T::Vector<S>]; C],
    sums: &mut [[T::Vector<S>; C]; R],
) {
    let length = xs[0].len();
    let (left, right) = (
        reach.min(length),
        length.saturating_sub(reach).max(reach.min(length)),
    );
    let n = right - left;
    let mut inner_gs = gs;
    for r in 0..R {
        inner_gs[r] = &gs[r][left..][..n];
    }
    let mut inner_xs = xs;
    for c in 0..C {
        inner_xs[c] = if n > 0 { &xs[c][taps[c]..][..n] } else { &[] };
    }
    for p in 0..n {
        let mut x = [T::zeros::<S>(); C];
        for c in 0..C {
            x[c] = inner_xs[c][p];
        }
        for r in 0..R {
            let g = inner_gs[r][p];
            for c in 0..C {
                sums[r][c] = T::mul_add(s, g, x[c], sums[r][c]);
            }
        }
    }
    let mut p = 0;
    while p < length {
        if p == left {
            p = right;
            if p == length {
                break;
            }
        }
        for c in 0..C {
            let at = p + taps[c];
            if at >= reach && at - reach < length {
                let x = xs[c][at - reach];
                for r in 0..R {
                    sums[r][c] = T::mul_add(s, gs[r][p], x, sums[r][c]);
                }
            }
        }
        p += 1;
    }
}
