//! Products of matrices as candle holds them, row by row of the batch.
//!
//! The columns of the product lie in the lanes: a panel of b, some vectors wide, is copied once, and
//! every block of rows of the product is a block of accumulators, one row of a in a register each.
//! Nothing of a is copied, whether it is transposed or not.

use pulp::{Arch, Simd, WithSimd};

use super::pieces::{by_piece, share};
use super::product::{block, has_block};
use super::transpose::transposed;
use super::{enter, scalars, scalars_mut, unit, vectors, Element, Kernel};
use crate::error::Result;

/// A matrix by rows, or the transpose of one.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Matrix<'a, T> {
    data: &'a [T],
    rows: usize,
    columns: usize,
    transposed: bool,
}

impl<'a, T: Element> Matrix<'a, T> {
    /// The rows in `data`, one after the other.
    pub(crate) fn new(data: &'a [T], rows: usize, columns: usize) -> Self {
        Self {
            data,
            rows,
            columns,
            transposed: false,
        }
    }

    pub(crate) fn rows(&self) -> usize {
        self.rows
    }

    pub(crate) fn columns(&self) -> usize {
        self.columns
    }

    pub(crate) fn t(self) -> Self {
        Self {
            rows: self.columns,
            columns: self.rows,
            transposed: !self.transposed,
            ..self
        }
    }

    /// Elements from one row in memory to the next.
    fn stride(&self) -> usize {
        match self.transposed {
            true => self.rows,
            false => self.columns,
        }
    }
}

/// Products of numbers that one thread does as fast as several: some tens of microseconds of work.
const ALONE: usize = 1 << 22;

/// `a b + start`, by rows; `start` is a row that is added to all, or empty.
pub(crate) fn product<T: Element>(
    a: Matrix<'_, T>,
    b: Matrix<'_, T>,
    start: &[T],
) -> Result<Vec<T>> {
    let unit = unit()?;
    let mut out = vec![T::default(); a.rows * b.columns];
    if out.is_empty() {
        return Ok(out);
    }
    // Whole blocks of rows, which are worth a copy of b.
    let of_a_row = (a.columns * b.columns).max(1);
    let rows = share(a.rows.saturating_mul(of_a_row), ALONE) / of_a_row;
    by_piece(
        &mut out,
        rows.max(16).next_multiple_of(8) * b.columns,
        &|at, out| {
            let first = at / b.columns;
            unit.dispatch(RowBlock {
                a,
                b,
                start,
                first,
                out,
            });
        },
    );
    Ok(out)
}

/// `out = a b + start` on this thread, with `start` as for [`product`].
pub(crate) fn product_of_rows<T: Element>(
    unit: Arch,
    a: Matrix<'_, T>,
    b: Matrix<'_, T>,
    start: &[T],
    out: &mut [T],
) {
    unit.dispatch(RowBlock {
        a,
        b,
        start,
        first: 0,
        out,
    });
}

/// Σ over the rows.
pub(crate) fn column_sums<T: Element>(unit: Arch, x: &[T], columns: usize) -> Vec<T> {
    let mut total = vec![T::default(); columns];
    if columns > 0 {
        let total = &mut total;
        unit.dispatch(ColumnSums { x, columns, total });
    }
    total
}

struct ColumnSums<'a, T> {
    x: &'a [T],
    columns: usize,
    total: &'a mut [T],
}

impl<T: Element> WithSimd for ColumnSums<'_, T> {
    type Output = ();

    /// In plain loops, which the compiler turns into vectors of the unit.
    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        let mut sums = vec![T::default(); self.columns];
        // In blocks: a running sum over a large batch would lose digits.
        for block in self.x.chunks(BLOCK * self.columns) {
            sums.fill(T::default());
            for row in block.chunks_exact(self.columns) {
                for (sum, x) in sums.iter_mut().zip(row) {
                    *sum += *x;
                }
            }
            for (total, sum) in self.total.iter_mut().zip(&sums) {
                *total += *sum;
            }
        }
    }
}

/// Terms of a sum before it is added to the total.
const BLOCK: usize = 256;

/// Columns of a that are read at a time.
const AHEAD: usize = 8;

/// Some rows of a product, from the first on; what `out` holds before does not matter.
pub(super) struct RowBlock<'a, T> {
    pub(super) a: Matrix<'a, T>,
    pub(super) b: Matrix<'a, T>,
    pub(super) start: &'a [T],
    pub(super) first: usize,
    pub(super) out: &'a mut [T],
}

impl<T: Element> WithSimd for RowBlock<'_, T> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, s: S) {
        // Two vectors where they are filled; code for them exists where a vector has lanes.
        match self.b.columns > T::lanes::<S>() {
            true if const { size_of::<T::Vector<S>>() > size_of::<T>() } => {
                self.panels::<S, 2>(s);
            }
            _ => self.panels::<S, 1>(s),
        }
    }
}

impl<T: Element> RowBlock<'_, T> {
    #[inline(always)]
    fn panels<S: Simd, const V: usize>(self, s: S) {
        let (inner, columns) = (self.a.columns, self.b.columns);
        debug_assert!(self.start.is_empty() || self.start.len() == columns);
        if self.out.is_empty() {
            return;
        }
        let width = V * T::lanes::<S>();
        let mut panel = vectors::<T, S>(V * inner.min(BLOCK));
        if inner == 0 {
            for out in self.out.chunks_exact_mut(columns) {
                match self.start {
                    [] => out.fill(T::default()),
                    start => out.copy_from_slice(start),
                }
            }
        }
        for column in (0..columns).step_by(width) {
            for depth in (0..inner).step_by(BLOCK) {
                let n = BLOCK.min(inner - depth);
                let width = width.min(columns - column);
                pack::<T, S, V>(s, &self.b, (depth, column), width, &mut panel[..V * n]);
                let panel = Panel::<T, S, V> {
                    a: self.a,
                    first: self.first,
                    depth,
                    panel: &panel[..V * n],
                    start: self.start.get(column..).unwrap_or_default(),
                    column,
                    columns,
                    out: self.out,
                };
                enter(s, panel);
            }
        }
    }
}

/// Rows from `depth` on of some columns of b, padded with whatever there is to whole vectors.
#[inline(always)]
fn pack<T: Element, S: Simd, const V: usize>(
    s: S,
    b: &Matrix<'_, T>,
    (depth, column): (usize, usize),
    width: usize,
    panel: &mut [T::Vector<S>],
) {
    let (stride, lanes) = (b.stride(), T::lanes::<S>());
    if b.transposed {
        // Square by square.
        let rows = panel.len() / V;
        for first in (0..rows).step_by(lanes) {
            let count = lanes.min(rows - first);
            for v in 0..V {
                let columns = width.saturating_sub(v * lanes).min(lanes);
                if columns == 0 {
                    continue;
                }
                let from = &b.data[(column + v * lanes) * stride + depth + first..];
                let square = transposed::<T, S>(s, from, stride, (columns, count));
                for (k, row) in square[..count].iter().enumerate() {
                    panel[(first + k) * V + v] = *row;
                }
            }
        }
        return;
    }
    for (k, row) in panel.as_chunks_mut::<V>().0.iter_mut().enumerate() {
        let from = &b.data[(depth + k) * stride + column..][..width];
        if width == V * lanes {
            // Vector by vector: a copy of any length is a call.
            let from: &[T::Vector<S>] = bytemuck::cast_slice(from);
            row.copy_from_slice(&from[..V]);
        } else {
            scalars_mut::<T, S>(row)[..width].copy_from_slice(from);
        }
    }
}

/// `out += a b` of a panel of b and the part of a that is multiplied with it; the first panel of some columns writes
/// `start + a b`.
struct Panel<'a, T: Element, S: Simd, const V: usize> {
    a: Matrix<'a, T>,
    /// The row of a that belongs to the first one of `out`.
    first: usize,
    /// The column of a, and row of b, that the panel starts with.
    depth: usize,
    panel: &'a [T::Vector<S>],
    /// From the first column on, or empty.
    start: &'a [T],
    column: usize,
    columns: usize,
    out: &'a mut [T],
}

impl<T: Element, S: Simd, const V: usize> Kernel<S> for Panel<'_, T, S, V> {
    type Output = ();

    #[inline(always)]
    fn run(mut self, s: S) {
        let rows = self.out.len() / self.columns;
        let mut row = 0;
        while row < rows {
            let height = block::<T, S>(rows, row);
            match height {
                8 if const { has_block::<T, S, 8>() } => self.rows::<8>(s, row),
                6 if const { has_block::<T, S, 6>() } => self.rows::<6>(s, row),
                4 if const { has_block::<T, S, 4>() } => self.rows::<4>(s, row),
                2 if const { has_block::<T, S, 2>() } => self.rows::<2>(s, row),
                _ => self.rows::<1>(s, row),
            }
            row += height;
        }
    }
}

impl<T: Element, S: Simd, const V: usize> Panel<'_, T, S, V> {
    /// R rows of the product.
    #[inline(always)]
    fn rows<const R: usize>(&mut self, s: S, row: usize) {
        match self.a.transposed {
            true => self.add(s, row, self.sums_of_columns::<R>(s, row)),
            false => self.add(s, row, self.sums_of_rows::<R>(s, row)),
        }
    }

    /// Adds sums to what belongs to them, or to the start in the first panel of their columns.  Indices that the compiler knows: a reference into the sums
    /// would keep them out of registers.
    #[inline(always)]
    fn add<const R: usize>(&mut self, s: S, row: usize, sums: [[T::Vector<S>; V]; R]) {
        let (columns, from) = (self.columns, self.column);
        let width = (V * T::lanes::<S>()).min(columns - from);
        let start = self.start.get(..width);
        let rows = &mut self.out[row * columns + from..];
        if width == V * T::lanes::<S>() {
            let start: Option<&[T::Vector<S>]> = start.map(bytemuck::cast_slice);
            let mut first = [T::zeros::<S>(); V];
            if let Some(start) = start {
                first.copy_from_slice(&start[..V]);
            }
            for r in 0..R {
                let out = &mut rows[r * columns..][..V * T::lanes::<S>()];
                let out: &mut [T::Vector<S>] = bytemuck::cast_slice_mut(out);
                for v in 0..V {
                    let before = if self.depth == 0 { first[v] } else { out[v] };
                    out[v] = T::plus(s, before, sums[r][v]);
                }
            }
            return;
        }
        for r in 0..R {
            let out = &mut rows[r * columns..][..width];
            match (self.depth, start) {
                (0, Some(start)) => out.copy_from_slice(start),
                (0, None) => out.fill(T::default()),
                _ => {}
            }
            let sums = sums[r];
            for (out, sum) in out.iter_mut().zip(scalars::<T, S>(&sums)) {
                *out += *sum;
            }
        }
    }

    /// With rows of a in memory, of which some columns at a time are read ahead.
    #[inline(always)]
    fn sums_of_rows<const R: usize>(&self, s: S, row: usize) -> [[T::Vector<S>; V]; R] {
        let stride = self.a.stride();
        let a = &self.a.data[(self.first + row) * stride + self.depth..];
        let panel = self.panel.as_chunks::<V>().0;
        let (ahead, rest) = panel.as_chunks::<AHEAD>();
        // References, not copies: numbers that are copied into registers are spread from there by shuffles, for which
        // there are fewer ports than for loads.
        let mut rows: [&[[T; AHEAD]]; R] = [&[]; R];
        let mut last: [&[T]; R] = [&[]; R];
        for r in 0..R {
            (rows[r], last[r]) = a[r * stride..][..panel.len()].as_chunks();
        }
        let (mut sums, none) = ([[T::zeros::<S>(); V]; R], [T::default(); AHEAD]);
        for (i, b) in ahead.iter().enumerate() {
            let mut x = [&none; R];
            for r in 0..R {
                x[r] = &rows[r][i];
            }
            for k in 0..AHEAD {
                for r in 0..R {
                    let x = T::splat(s, x[r][k]);
                    for v in 0..V {
                        sums[r][v] = T::mul_add(s, x, b[k][v], sums[r][v]);
                    }
                }
            }
        }
        for (k, b) in rest.iter().enumerate() {
            for (r, sums) in sums.iter_mut().enumerate() {
                let x = T::splat(s, last[r][k]);
                for v in 0..V {
                    sums[v] = T::mul_add(s, x, b[v], sums[v]);
                }
            }
        }
        sums
    }

    /// With columns of a in memory.
    #[inline(always)]
    fn sums_of_columns<const R: usize>(&self, s: S, row: usize) -> [[T::Vector<S>; V]; R] {
        let stride = self.a.stride();
        let a = &self.a.data[self.depth * stride + self.first + row..];
        let mut sums = [[T::zeros::<S>(); V]; R];
        for (a, b) in a.chunks(stride).zip(self.panel.as_chunks::<V>().0) {
            // Every row of memory holds all R; a check that could fail would keep the sums in memory.
            let Some(a) = a.first_chunk::<R>() else { break };
            for r in 0..R {
                let x = T::splat(s, a[r]);
                for v in 0..V {
                    sums[r][v] = T::mul_add(s, x, b[v], sums[r][v]);
                }
            }
        }
        sums
    }
}
