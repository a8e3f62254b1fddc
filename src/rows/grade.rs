//! What tiles need to know of a loss that is a mean over rows.

use crate::error::Result;
use crate::problem::Problem;
use crate::state::RowLayout;

/// Some rows of one returned state, leaf after leaf.
pub(crate) struct RowsOf<'a, T> {
    /// Which of the outputs, and of how many.
    pub(crate) output: (usize, usize),
    /// The first row.
    pub(crate) first: usize,
    /// The rows of the first leaf, and of the second where there is one.
    pub(crate) y: &'a [T],
}

/// A loss over numbers of T.
pub(crate) trait Grade<T>: Sync {
    /// The part of the mean that is of these rows, and its derivative in place of a copy of them.
    fn grade(&self, layout: &RowLayout, of: &RowsOf<'_, T>, cotangent: &mut [T]) -> f64;
}

/// A loss that may be formed while a tile is at hand; `None` where tiles do not have it.
pub(crate) trait RowGrade {
    /// In f32.
    fn single(&self, problem: &Problem, layout: &RowLayout) -> Result<Option<Box<dyn Grade<f32>>>>;

    /// In f64.
    fn double(&self, problem: &Problem, layout: &RowLayout) -> Result<Option<Box<dyn Grade<f64>>>>;
}
