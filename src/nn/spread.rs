//! One row for a whole batch.

use candle_core::{Result, Tensor};

/// `row`, `(n)`, for each of so many rows, `(rows, n)`, as a product with a column of ones.
///
/// candle pulls a broadcast back by a scalar sum in compute dtype, and a product by a product: an
/// order of magnitude faster, and summed in f32 where the dtype is narrower.
pub(super) fn spread(row: &Tensor, rows: usize) -> Result<Tensor> {
    let ones = Tensor::ones((rows, 1), row.dtype(), row.device())?;
    ones.matmul(&row.reshape((1, ()))?)
}

/// Σ over the features of every row, `(rows, 1)`, likewise.
pub(super) fn row_sums(x: &Tensor) -> Result<Tensor> {
    x.matmul(&Tensor::ones((x.dim(1)?, 1), x.dtype(), x.device())?)
}
