//! How good low precision has to be: the errors of two recipes on the same 13 problems.
//!
//! Columns: relative errors in the 2-norm of whole quantities, gradients of all weights as one
//! vector.  A recipe is judged by the geometric mean of each column over the problems.

use candle_diffeq::tableau::{Tableau, RK4};
use candle_diffeq::Precision;

use crate::discrete::{exact, solved};
use crate::oracle::{Oracle, Result};

/// The method of the comparison.
pub(crate) const METHOD: Tableau = RK4;

/// A low compute precision, and what others reach with it.
pub(crate) struct Recipe {
    pub(crate) precision: Precision,
    /// Geometric means with sums, states and cotangents in f32, and only f in low precision.
    pub(crate) f32acc: [f64; 6],
    /// Geometric means of the recipe of rampde, which keeps states and cotangents low.
    pub(crate) rampde: [f64; 6],
}

// The rows `f32acc` and `rampde` were measured with PyTorch 2.15 on a CPU, by a model of each recipe
// (bit-identical to rampde 0.1.0.post1 where that runs), on the same files, rk4, f16 with a dynamic
// adjoint scale; geometric means over the 13 problems.

/// bf16.
pub(crate) const BF16: Recipe = Recipe {
    precision: Precision::bf16(),
    f32acc: [9.172e-4, 1.387e-3, 6.270e-4, 2.489e-3, 1.816e-3, 4.561e-3],
    rampde: [2.469e-3, 3.105e-3, 8.614e-4, 4.081e-3, 4.663e-3, 7.538e-3],
};

/// f16.
pub(crate) const F16: Recipe = Recipe {
    precision: Precision::f16(),
    f32acc: [1.095e-4, 1.612e-4, 5.247e-5, 3.292e-4, 4.377e-4, 6.496e-4],
    rampde: [3.168e-4, 3.873e-4, 2.679e-4, 6.157e-4, 5.558e-4, 1.219e-3],
};

impl Recipe {
    /// The largest geometric mean allowed: twice `f32acc`, and never above `rampde`.
    pub(crate) fn bars(&self) -> [f64; 6] {
        std::array::from_fn(|i| (2.0 * self.f32acc[i]).min(self.rampde[i]))
    }
}

/// Errors of one problem, solved from inputs in f32.
pub(crate) fn errors(oracle: &Oracle, recipe: &Recipe) -> Result<[f64; 6]> {
    let solved = solved(oracle, &METHOD, recipe.precision).map_err(|e| oracle.failed(e))?;
    Ok(solved.errors(&exact(oracle, &METHOD)?))
}

/// Column by column.  An error below the roundoff of f32, the state's dtype, is luck and counts as
/// that roundoff: a single zero would make the mean zero.
pub(crate) fn geometric_mean(rows: &[[f64; 6]]) -> [f64; 6] {
    let floor = f64::from(f32::EPSILON) / 2.0;
    // Not by `f64::max`, which drops NaN.
    let log = |e: f64| if e < floor { floor.ln() } else { e.ln() };
    std::array::from_fn(|i| {
        let sum: f64 = rows.iter().map(|row| log(row[i])).sum();
        (sum / rows.len() as f64).exp()
    })
}

/// Column by column.
pub(crate) fn largest(rows: &[[f64; 6]]) -> [f64; 6] {
    std::array::from_fn(|i| {
        let column = rows.iter().map(|row| row[i]);
        column.max_by(f64::total_cmp).unwrap_or(f64::NAN)
    })
}
