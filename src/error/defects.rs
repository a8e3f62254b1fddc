//! What is wrong with a tableau, or with what a pull-back returned.

use candle_core::{DType, DeviceLocation, Shape};

/// What is wrong with a tableau.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum TableauDefect {
    /// No stage at all.
    #[error("it has no stage")]
    NoStages,
    /// A vector does not have one entry for each stage.
    #[error("{what} has {got} entries for {stages} stages")]
    Length {
        /// `a`, `c`, `embedded`, `interpolant` or `weights`.  An interpolant may also have one entry more than stages.
        what: &'static str,
        /// Stages, by the length of b.
        stages: usize,
        /// Entries given.
        got: usize,
    },
    /// Row i of an explicit method has i entries.
    #[error("row {row} of a has {got} entries; an explicit method has {row} there")]
    RowLength {
        /// Row, counted from 0.
        row: usize,
        /// Entries given.
        got: usize,
    },
    /// A coefficient is NaN or infinite.
    #[error("a coefficient of {what} is not finite")]
    NonFinite {
        /// `a`, `b`, `c`, `embedded` or `interpolant`.
        what: &'static str,
    },
    /// c_i is not the sum of row i.
    #[error("row {row} of a sums to {sum}, but c is {c}")]
    RowSum {
        /// Row, counted from 0.
        row: usize,
        /// Its sum.
        sum: f64,
        /// The abscissa given.
        c: f64,
    },
    /// The interpolant does not end at the solution.
    #[error(
        "the interpolant of stage {stage} is {sum} at the end of the step, where its weight is {b}"
    )]
    InterpolantEnd {
        /// Stage, counted from 0.
        stage: usize,
        /// The sum of its coefficients.
        sum: f64,
        /// The stage's weight.
        b: f64,
    },
    /// Order conditions are checked for orders 1 to 8.
    #[error("order {order} cannot be checked, only 1 to 8")]
    OrderUnsupported {
        /// Order that was stated.
        order: usize,
    },
    /// An order condition does not hold.
    #[error(
        "the order condition of tree {tree} (order {order}) on {what} is missed by {residual:e}"
    )]
    OrderCondition {
        /// The weights: `b`, `embedded`, or `weights` in an error of
        /// [`Tableau::check_weights`](crate::tableau::Tableau::check_weights).
        what: &'static str,
        /// Vertices of the tree.
        order: usize,
        /// The tree, each vertex as a pair of brackets around its children.
        tree: String,
        /// Σ b_i Φ_i − 1/γ.
        residual: f64,
    },
}

/// What is wrong with the cotangents that a pull-back returned.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum PullbackDefect {
    /// Not one cotangent for each tensor of the state.
    #[error("it returned cotangents of {got} state tensors, the state has {expected}")]
    LeafCount {
        /// Tensors in the state.
        expected: usize,
        /// Cotangents returned.
        got: usize,
    },
    /// A cotangent does not have the shape of what it belongs to.
    #[error("the cotangent of {of} has shape {got:?} instead of {expected:?}")]
    Shape {
        /// What it belongs to.
        of: Argument,
        /// Shape of that.
        expected: Shape,
        /// Shape of the cotangent.
        got: Shape,
    },
    /// A cotangent of the state does not have the dtype that the pull-back was given, or one of time or
    /// of a parameter is not floating-point.
    #[error("the cotangent of {of} is {got:?} instead of {expected:?}")]
    Dtype {
        /// What it belongs to.
        of: Argument,
        /// Dtype of that.
        expected: DType,
        /// Dtype of the cotangent.
        got: DType,
    },
    /// A cotangent lies on another device than what it belongs to.
    #[error("the cotangent of {of} is on {got:?} instead of {expected:?}")]
    Device {
        /// What it belongs to.
        of: Argument,
        /// Device of that.
        expected: DeviceLocation,
        /// Device of the cotangent.
        got: DeviceLocation,
    },
    /// Gradients of tensors that the field's own list does not hold; they would be lost.
    #[error("it inserted gradients of {count} tensors that VectorField::parameters does not list")]
    Unlisted {
        /// Number of such tensors.
        count: usize,
    },
}

/// What f depends on, and has a cotangent of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Argument {
    /// A tensor of the state.
    State(usize),
    /// Time.
    Time,
    /// A parameter, by its position in [`VectorField::parameters`](crate::VectorField::parameters),
    /// or in the order in which the solve met them.
    Parameter(usize),
}

impl std::fmt::Display for Argument {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::State(leaf) => write!(f, "state tensor {leaf}"),
            Self::Time => write!(f, "time"),
            Self::Parameter(index) => write!(f, "parameter {index}"),
        }
    }
}

/// Shapes, with words between them.
pub(super) fn listed(shapes: &[Shape]) -> String {
    let shapes: Vec<_> = shapes.iter().map(|shape| format!("{shape:?}")).collect();
    shapes.join(" and ")
}
