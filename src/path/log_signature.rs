//! Increments and Lévy areas of piecewise linear paths.

use candle_core::{Result, Tensor};

use super::unstacked;

/// Polynomials `(rows, 2, channels)` over windows of observations `(rows, length, c)`, which begin and end at
/// `cuts`, at times `knots`: increments, then areas A_ij, i < j, in the order (0, 1), (0, 2), ….  The areas begin at 0.
/// All windows but the last have one length.
///
/// Over a window of points x_0 … x_n, ∫ (X_i − x_0i) dX_j = Σ_k (x_k − x_0)_i (x_{k+1} − x_k)_j + ½ (Δ_k)_i (Δ_k)_j, of
/// which the symmetric part drops out of A.
pub(super) fn pieces(xs: &Tensor, cuts: &[usize], knots: &[f64]) -> Result<Vec<Tensor>> {
    let channels = xs.dim(2)?;
    let above =
        (0..channels).flat_map(|i| (i + 1..channels).map(move |j| (i * channels + j) as u32));
    let above: Vec<u32> = above.collect();
    let rises = rises(xs, cuts, &above)?;
    let (windows, rows, _) = rises.dims3()?;
    let lengths: Vec<f64> = knots.windows(2).map(|knots| knots[1] - knots[0]).collect();
    let lengths = Tensor::from_vec(lengths, (windows, 1, 1), xs.device())?;
    let slopes = rises.broadcast_div(&lengths.to_dtype(xs.dtype())?)?;
    let mut first = xs.narrow(1, 0, 1)?.transpose(0, 1)?;
    if !above.is_empty() {
        let zeros = Tensor::zeros((1, rows, above.len()), xs.dtype(), xs.device())?;
        first = Tensor::cat(&[&first, &zeros], 2)?;
    }
    let before = Tensor::cat(&[&first, &rises], 0)?.narrow(0, 0, windows)?;
    unstacked(&Tensor::stack(&[&sums_so_far(before)?, &slopes], 2)?)
}

/// Σ_{j ≤ i} x_j along the first dimension, by doubling: a sum one after the other is a graph as deep as it is long.
fn sums_so_far(x: Tensor) -> Result<Tensor> {
    let count = x.dim(0)?;
    let (mut sums, mut reach) = (x, 1);
    while reach < count {
        let further = sums.narrow(0, 0, count - reach)?;
        sums = (&sums + further.pad_with_zeros(0, reach, 0)?)?;
        reach *= 2;
    }
    Ok(sums)
}

/// What the path rises in every window, `(windows, rows, channels)`; `above` are the places of areas in a matrix.
fn rises(xs: &Tensor, cuts: &[usize], above: &[u32]) -> Result<Tensor> {
    let (rows, length, channels) = xs.dims3()?;
    let (windows, window) = (cuts.len() - 1, cuts[1] - cuts[0]);
    // A last window that is shorter is filled up with its last point, which changes neither its rise nor its areas.
    let missing = windows * window + 1 - length;
    let last = xs.narrow(1, length - 1, 1)?;
    let points = match missing {
        0 => xs.clone(),
        _ => Tensor::cat(&[xs, &last.expand((rows, missing, channels))?], 1)?,
    };
    let of_windows = |from: usize| {
        let points = points.narrow(1, from, windows * window)?.contiguous()?;
        points.reshape((rows * windows, window, channels))
    };
    let before = of_windows(0)?;
    let deltas = (of_windows(1)? - &before)?;
    let mut rise = deltas.sum(1)?;
    if !above.is_empty() {
        let away = before.broadcast_sub(&before.narrow(1, 0, 1)?)?;
        let product = away.transpose(1, 2)?.contiguous()?.matmul(&deltas)?;
        let area = ((&product - product.transpose(1, 2)?)? * 0.5)?;
        let area = area.reshape((rows * windows, channels * channels))?;
        let area = area.index_select(&Tensor::new(above, xs.device())?, 1)?;
        rise = Tensor::cat(&[rise, area], 1)?;
    }
    let rise = rise.reshape((rows, windows, channels + above.len()))?;
    rise.transpose(0, 1)?.contiguous()
}
