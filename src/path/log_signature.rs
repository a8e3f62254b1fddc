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
    let mut value = xs.narrow(1, 0, 1)?.squeeze(1)?;
    if !above.is_empty() {
        let zeros = Tensor::zeros((xs.dim(0)?, above.len()), xs.dtype(), xs.device())?;
        value = Tensor::cat(&[&value, &zeros], 1)?;
    }
    let mut pieces = Vec::with_capacity(cuts.len() - 1);
    for (rise, knots) in unstacked(&rises(xs, cuts, &above)?)?
        .iter()
        .zip(knots.windows(2))
    {
        let slope = (rise / (knots[1] - knots[0]))?;
        pieces.push(Tensor::stack(&[&value, &slope], 1)?);
        value = (value + rise)?;
    }
    Ok(pieces)
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
