//! Products of matrices as candle holds them, row by row of the batch.
//!
//! The columns of the product lie in the lanes: a panel of b, some vectors wide, is copied once, and
//! every block of rows of the product is a block of accumulators, one row of a in a register each.
//! Nothing of a is copied, whether it is transposed or not.

use pulp::{Arch, Simd, WithSimd};

use super::pieces::by_piece;
use super::product::{block, has_block};
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

/// Products of numbers in a piece that one thread takes, which are half a hundred microseconds of work.
const PIECE: usize = 1 << 22;

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
    // Whole blocks of rows, as many as are worth a thread, and a copy of b.
    let rows = (PIECE / (a.columns * b.columns).max(1)).max(16);
    by_piece(
        &mut out,
        rows.next_multiple_of(8) * b.columns,
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
pub(crate) fn column_sums<T: Element>(x: &[T], columns: usize) -> Vec<T> {
    let mut total = vec![T::default(); columns];
    if columns == 0 {
        return total;
    }
    // In blocks: a running sum over a large batch would lose digits.
    for block in x.chunks(BLOCK * columns) {
        let mut sums = vec![T::default(); columns];
        for row in block.chunks_exact(columns) {
            for (sum, x) in sums.iter_mut().zip(row) {
                *sum += *x;
            }
        }
        for (total, sum) in total.iter_mut().zip(sums) {
            *total += sum;
        }
    }
    total
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
                pack::<T, S, V>(&self.b, depth, column, width, &mut panel[..V * n]);
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
    b: &Matrix<'_, T>,
    depth: usize,
    column: usize,
    width: usize,
    panel: &mut [T::Vector<S>],
) {
    let stride = b.stride();
    let size = V * T::lanes::<S>();
    let rows = scalars_mut::<T, S>(panel).chunks_exact_mut(size);
    for (k, row) in rows.enumerate() {
        if b.transposed {
            let from = &b.data[column * stride + depth + k..];
            for (to, from) in row[..width].iter_mut().zip(from.iter().step_by(stride)) {
                *to = *from;
            }
        } else {
            let from = &b.data[(depth + k) * stride + column..];
            row[..width].copy_from_slice(&from[..width]);
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
        let width = (V * T::lanes::<S>()).min(self.columns - self.column);
        for r in 0..R {
            let at = (row + r) * self.columns + self.column;
            let out = &mut self.out[at..][..width];
            let start = self.start.get(..width);
            if width == V * T::lanes::<S>() {
                let start: Option<&[T::Vector<S>]> = start.map(bytemuck::cast_slice);
                let out: &mut [T::Vector<S>] = bytemuck::cast_slice_mut(out);
                for v in 0..V {
                    let before = match (self.depth, start) {
                        (0, Some(start)) => start[v],
                        (0, None) => T::zeros::<S>(),
                        _ => out[v],
                    };
                    out[v] = T::plus(s, before, sums[r][v]);
                }
            } else {
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
    }

    /// With rows of a in memory, of which some columns at a time are read ahead.
    #[inline(always)]
    fn sums_of_rows<const R: usize>(&self, s: S, row: usize) -> [[T::Vector<S>; V]; R] {
        let stride = self.a.stride();
        let a = &self.a.data[(self.first + row) * stride + self.depth..];
        let (panel, rest) = self.panel.as_chunks::<V>().0.as_chunks::<AHEAD>();
        let mut sums = [[T::zeros::<S>(); V]; R];
        for (i, b) in panel.iter().enumerate() {
            let mut x = [[T::default(); AHEAD]; R];
            for (r, x) in x.iter_mut().enumerate() {
                let a = a.get(r * stride + i * AHEAD..);
                *x = match a.and_then(<[T]>::first_chunk) {
                    Some(a) => *a,
                    None => [T::default(); AHEAD],
                };
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
                let x = a.get(r * stride + panel.len() * AHEAD + k);
                let x = T::splat(s, x.copied().unwrap_or_default());
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
