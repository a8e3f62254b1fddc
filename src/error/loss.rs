//! Errors of losses by row.

/// Losses that do not fit the states of a solve.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum LossDefect {
    /// A [`RowLoss`](crate::nn::RowLoss) that cannot be computed from the returned states.
    #[error("{loss} is no loss of states of shapes {shapes:?}: it needs {needs}")]
    States {
        /// The loss.
        loss: String,
        /// The states that it needs.
        needs: &'static str,
        /// Shapes of the returned states.
        shapes: Vec<Vec<usize>>,
    },
    /// A class for which the states have no column.
    #[error(
        "row {row} is of class {class}, but states have {classes} classes: numbers below that"
    )]
    NoSuchClass {
        /// Index of the row.
        row: usize,
        /// Its class.
        class: u32,
        /// Classes of the state.
        classes: usize,
    },
    /// A [`RowLoss`](crate::nn::RowLoss) that is computed from the last state only, in a solve that returns all states.
    #[error("{loss} is not a loss of all states that are returned: it needs Output::Final")]
    Output {
        /// The loss.
        loss: String,
    },
}
