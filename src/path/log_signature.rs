//! Increments and Lévy areas of piecewise linear paths.

use candle_core::{Result, Tensor};

/// Polynomials `(rows, 2, channels)` over windows of observations `(rows, length, c)`, which begin and end at
/// `cuts`, at times `knots`: increments, then areas A_ij, i < j, in the order (0, 1), (0, 2), ….  The areas begin at 0.
///
/// Over a window of points x_0 … x_n, ∫ (X_i − x_0i) dX_j = Σ_k (x_k − x_0)_i (x_{k+1} − x_k)_j + ½ (Δ_k)_i (Δ_k)_j, of
/// which the symmetric part drops out of A.
pub(super) fn pieces(xs: &Tensor, cuts: &[usize], knots: &[f64]) -> Result<Vec<Tensor>> {
    let (rows, _, channels) = xs.dims3()?;
    let above =
        (0..channels).flat_map(|i| (i + 1..channels).map(move |j| (i * channels + j) as u32));
    let above: Vec<u32> = above.collect();
    let above = (!above.is_empty())
        .then(|| Tensor::new(above, xs.device()))
        .transpose()?;
    let start = xs.narrow(1, 0, 1)?.squeeze(1)?;
    let mut value = match &above {
        Some(above) => {
            let zeros = Tensor::zeros((rows, above.dim(0)?), xs.dtype(), xs.device())?;
            Tensor::cat(&[&start, &zeros], 1)?
        }
        None => start,
    };
    let mut pieces = Vec::with_capacity(cuts.len() - 1);
    for (cuts, knots) in cuts.windows(2).zip(knots.windows(2)) {
        let points = xs.narrow(1, cuts[0], cuts[1] - cuts[0] + 1)?;
        let steps = cuts[1] - cuts[0];
        let first = points.narrow(1, 0, 1)?;
        let before = points.narrow(1, 0, steps)?;
        let deltas = (points.narrow(1, 1, steps)? - &before)?;
        let increment = deltas.sum(1)?;
        let rise = match &above {
            Some(above) => {
                let away = before.broadcast_sub(&first)?;
                let product = away
                    .transpose(1, 2)?
                    .contiguous()?
                    .matmul(&deltas.contiguous()?)?;
                let area = ((&product - product.transpose(1, 2)?)? * 0.5)?;
                let area = area.reshape((rows, channels * channels))?;
                Tensor::cat(&[increment, area.index_select(above, 1)?], 1)?
            }
            None => increment,
        };
        let slope = (&rise / (knots[1] - knots[0]))?;
        pieces.push(Tensor::stack(&[&value, &slope], 1)?);
        value = (value + rise)?;
    }
    Ok(pieces)
}
