//! Continuous adjoints, held against the gradients of exact flows.
//!
//! All problems have outputs so near to each other that y can be solved backward between two of them.  Where it cannot,
//! a backsolve is wrong by any amount: `tests/continuous.rs` shows it with x' = −40 (x − c) on [0, 1].

use candle_diffeq::options::{AdjointSolve, Gradient};

use crate::adaptive::{flow_by, Flow, Pair};
use crate::oracle::{Oracle, Result};

/// A way to the gradient by a continuous adjoint.
pub(crate) struct Way {
    pub(crate) name: &'static str,
    gradient: fn(AdjointSolve) -> Gradient,
}

/// All of them.
pub(crate) const WAYS: [Way; 3] = [
    Way {
        name: "backsolve",
        gradient: Gradient::Backsolve,
    },
    Way {
        name: "interpolated",
        gradient: Gradient::Interpolated,
    },
    Way {
        name: "quadrature",
        gradient: Gradient::Quadrature,
    },
];

/// The largest relative error of a gradient at a tolerance of 1e-10.
pub(crate) const BAR: f64 = 1e-6;

/// Whether a file holds the gradients of its flow.
pub(crate) fn has_gradients(oracle: &Oracle) -> bool {
    oracle.tensor("grad.y0").is_ok()
}

impl Way {
    /// A flow with its gradients in this way.
    pub(crate) fn flow(&self, oracle: &Oracle, pair: &Pair) -> Result<Flow> {
        flow_by(oracle, pair, &(self.gradient)(AdjointSolve::new()))
    }
}
