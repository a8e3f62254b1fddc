//! Continuous adjoints, held against the gradients of exact flows.

use candle_diffeq::continuous::AdjointSolve;
use candle_diffeq::Gradient;

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

/// Problems whose flow contracts so fast that y cannot be solved backward between two outputs: a backsolve is wrong by
/// more than the bar there, whatever its tolerance.
pub(crate) const UNSTABLE: [&str; 0] = [];

impl Way {
    /// Whether the bar cannot be met on a problem, and is not to be.
    pub(crate) fn is_unstable_on(&self, problem: &str) -> bool {
        self.name == "backsolve" && UNSTABLE.contains(&problem)
    }

    /// A flow with its gradients in this way.
    pub(crate) fn flow(&self, oracle: &Oracle, pair: &Pair) -> Result<Flow> {
        flow_by(oracle, pair, &(self.gradient)(AdjointSolve::new()))
    }
}
