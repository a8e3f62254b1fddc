//! What a solve and its backward pass gave, and how far that is from another outcome.

use candle_core::{DType, Tensor};

use crate::oracle::{Named, Result};

/// The quantities of an [`Outcome`]: states at all times, states at the last, L, and its gradients.
pub(crate) const QUANTITIES: [&str; 6] = ["traj", "final", "loss", "grad_y0", "grad_w", "grad_t"];

/// A quantity: the values of its parts (tensors of the state, or weights), by name.
pub(crate) type Parts = Vec<(String, Vec<f64>)>;

/// All of [`QUANTITIES`].
pub(crate) struct Outcome(pub(crate) [Parts; 6]);

/// The values of tensors.
pub(crate) fn parts(named: Named) -> Result<Parts> {
    let values = |x: &Tensor| x.to_dtype(DType::F64)?.flatten_all()?.to_vec1();
    let part = |(name, x): (String, Tensor)| Ok((name, values(&x)?));
    named.into_iter().map(part).collect()
}

impl Outcome {
    /// Relative errors of whole quantities.
    pub(crate) fn errors(&self, exact: &Self) -> [f64; 6] {
        std::array::from_fn(|i| error(&self.0[i], &exact.0[i]))
    }

    /// Relative errors of the worst part of each quantity, and the name of that part.
    pub(crate) fn worst_parts(&self, exact: &Self) -> [(f64, String); 6] {
        std::array::from_fn(|i| {
            let (ours, exact) = (&self.0[i], &exact.0[i]);
            if ours.len() != exact.len() {
                return (
                    f64::INFINITY,
                    format!("{} parts for {}", ours.len(), exact.len()),
                );
            }
            let error = |i: usize| (relative(&ours[i].1, &exact[i].1), ours[i].0.clone());
            let errors = (0..ours.len()).map(error);
            errors
                .max_by(|a, b| a.0.total_cmp(&b.0))
                .unwrap_or_default()
        })
    }
}

/// Relative error of a whole quantity: one norm over all parts.
pub(crate) fn error(parts: &Parts, exact: &Parts) -> f64 {
    let whole = |parts: &Parts| {
        parts
            .iter()
            .flat_map(|(_, x)| x.clone())
            .collect::<Vec<_>>()
    };
    relative(&whole(parts), &whole(exact))
}

/// ‖x − exact‖ / ‖exact‖, and ‖x‖ where `exact` is zero.  A NaN is positive, so that
/// `f64::total_cmp` ranks it above every number.
fn relative(x: &[f64], exact: &[f64]) -> f64 {
    if x.len() != exact.len() {
        return f64::INFINITY;
    }
    let norm = |x: &mut dyn Iterator<Item = f64>| x.map(|x| x * x).sum::<f64>().sqrt();
    let error = norm(&mut x.iter().zip(exact).map(|(x, exact)| x - exact));
    match norm(&mut exact.iter().copied()) {
        0.0 => error.abs(),
        size => (error / size).abs(),
    }
}

/// The larger error.
pub(crate) fn worse(a: f64, b: f64) -> f64 {
    if a.total_cmp(&b).is_ge() {
        a
    } else {
        b
    }
}
