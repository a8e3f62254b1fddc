//! Weights packed in blocks of rows, `[block][input][row]`, as [`Layer`](super::product::Layer) reads them.

use pulp::Simd;

use super::product::{block, has_block};
use super::transpose::transposed;
use super::{enter, scalars, Element, Kernel};

/// A matrix packed for [`Layer`](super::product::Layer).
#[derive(Debug, Clone)]
pub(crate) struct Packed<T> {
    pub(super) rows: usize,
    pub(super) columns: usize,
    pub(super) data: Vec<T>,
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
                8 if const { has_block::<T, S, 8>() } => {
                    enter(s, TransposeRows::<T, 8> { matrix, block });
                }
                6 if const { has_block::<T, S, 6>() } => {
                    enter(s, TransposeRows::<T, 6> { matrix, block });
                }
                4 if const { has_block::<T, S, 4>() } => {
                    enter(s, TransposeRows::<T, 4> { matrix, block });
                }
                2 if const { has_block::<T, S, 2>() } => {
                    enter(s, TransposeRows::<T, 2> { matrix, block });
                }
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
                6 => take::<T, 6>(all, matrix, block),
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
            let height = block::<T, S>(rows, first);
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
