//! What can be wrong with a loss by row.

/// Losses that do not fit the states of a solve.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum LossDefect {
    /// A [`RowLoss`](crate::nn::RowLoss) of states that it is no loss of.
    #[error("{loss} is no loss of states of shapes {shapes:?}: it needs {needs}")]
    States {
        /// The loss.
        loss: String,
        /// The states that it needs.
        needs: &'static str,
        /// Shapes of the returned states.
        shapes: Vec<Vec<usize>>,
    },
    /// A class that the states have no column for.
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
    /// A [`RowLoss`](crate::nn::RowLoss) of the last state, of a solve that returns all.
    #[error("{loss} is not a loss of all states that are returned: it needs Output::Final")]
    Output {
        /// The loss.
        loss: String,
    },
}
