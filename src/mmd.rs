//! The maximum mean discrepancy: how different the distributions of two samples are.

use candle_core::{DType, Tensor};

use crate::error::{Error, Result};

/// Rows whose kernel values are in memory at a time.
const BLOCK: usize = 1024;

/// Unbiased estimate of the squared maximum mean discrepancy of two samples, kernel
/// k(x, y) = exp(−‖x − y‖²/2σ²), σ = `bandwidth`:
///
/// Σ_{i≠j} k(x_i, x_j) / n(n−1) + Σ_{i≠j} k(y_i, y_j) / m(m−1) − 2 Σ_{ij} k(x_i, y_j) / nm.
///
/// x: `(n, features)`, y: `(m, features)`, any float dtype; computed in f64, in blocks of rows.  Its mean is zero if
/// both samples have the same distribution, so it can be negative.  Gretton et al., "A Kernel Two-Sample Test", JMLR
/// 13 (2012), lemma 6.  Studies of flows take σ² = ½.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_diffeq::metrics::mmd;
/// let x = Tensor::randn(0f32, 1.0, (500, 2), &Device::Cpu)?;
/// let y = Tensor::randn(0f32, 1.0, (400, 2), &Device::Cpu)?;
/// let sigma = 0.5f64.sqrt();
/// assert!(mmd(&x, &y, sigma)?.abs() < 0.02);
/// assert!(mmd(&x, &(&y + 1.0)?, sigma)? > 0.05);
/// # Ok::<(), candle_diffeq::Error>(())
/// ```
///
/// # Errors
/// [`Samples`](Error::Samples) if a sample has fewer than two rows, or their features differ;
/// [`Bandwidth`](Error::Bandwidth).  Of samples that are not finite it is NaN.
pub fn mmd(x: &Tensor, y: &Tensor, bandwidth: f64) -> Result<f64> {
    let (&[n, features], &[m, same]) = (x.dims(), y.dims()) else {
        return Err(samples(x, y));
    };
    if n < 2 || m < 2 || features != same {
        return Err(samples(x, y));
    }
    // The kernel divides by the square.
    if !(bandwidth > 0.0 && (bandwidth * bandwidth).is_normal()) {
        return Err(Error::Bandwidth { bandwidth });
    }
    let plain = |s: &Tensor| s.detach().to_dtype(DType::F64);
    let (x, y) = (plain(x)?, plain(y)?);
    // Below, a maximum with zero would take NaN for a distance of zero.
    for sample in [&x, &y] {
        if !(sample * 0.0)?.sum_all()?.to_scalar::<f64>()?.is_finite() {
            return Ok(f64::NAN);
        }
    }
    let c = -0.5 / (bandwidth * bandwidth);
    let (n, m) = (n as f64, m as f64);
    // Around zero: differences of the squares of large numbers have no digits.  A few rows that
    // are far away do not move the medians.
    let (of_x, of_y) = (medians(&x)?, medians(&y)?);
    let within = |s: Tensor, n: f64| Ok::<_, Error>(kernel_sum(&s, &s, c, true)? / (n * (n - 1.0)));
    let within_y = within(y.broadcast_sub(&of_y)?, m)?;
    let (x, y) = (x.broadcast_sub(&of_x)?, y.broadcast_sub(&of_x)?);
    let between = kernel_sum(&x, &y, c, false)? / (n * m);
    Ok(within(x, n)? + within_y - 2.0 * between)
}

fn samples(x: &Tensor, y: &Tensor) -> Error {
    Error::Samples {
        x: x.shape().clone(),
        y: y.shape().clone(),
    }
}

/// The median of every feature, `(1, features)`.
fn medians(x: &Tensor) -> Result<Tensor> {
    let (rows, features) = x.dims2()?;
    let mut columns = x.t()?.to_vec2::<f64>()?;
    let middle = columns.iter_mut().map(|column| {
        let (_, median, _) = column.select_nth_unstable_by(rows / 2, f64::total_cmp);
        *median
    });
    let middle: Vec<f64> = middle.collect();
    Ok(Tensor::from_vec(middle, (1, features), x.device())?)
}

/// Σ_ij exp(c ‖x_i − y_j‖²), or the sum without i = j.
fn kernel_sum(x: &Tensor, y: &Tensor, c: f64, others: bool) -> Result<f64> {
    let (yt, y_norms) = (y.t()?, y.sqr()?.sum(1)?.unsqueeze(0)?);
    let mut total = 0.0;
    for from in (0..x.dim(0)?).step_by(BLOCK) {
        let rows = x.narrow(0, from, BLOCK.min(x.dim(0)? - from))?;
        let norms = rows.sqr()?.sum_keepdim(1)?.broadcast_add(&y_norms)?;
        let distances = (norms - (rows.matmul(&yt)? * 2.0)?)?;
        // Of points so far away that their squares overflow nothing is left.
        let is_known = distances.eq(&distances)?;
        let far = (distances.ones_like()? * f64::INFINITY)?;
        let distances = is_known.where_cond(&distances, &far)?;
        // Below zero by rounding only, where the points are the same.
        let mut kernel = (distances.relu()? * c)?.exp()?;
        if others {
            let end = (from + rows.dim(0)?) as u32;
            let own = Tensor::arange(from as u32, end, x.device())?.unsqueeze(1)?;
            let all = Tensor::arange(0, y.dim(0)? as u32, y.device())?.unsqueeze(0)?;
            let is_other = own.broadcast_ne(&all)?;
            kernel = (kernel * is_other.to_dtype(DType::F64)?)?;
        }
        total += kernel.sum_all()?.to_scalar::<f64>()?;
    }
    Ok(total)
}
