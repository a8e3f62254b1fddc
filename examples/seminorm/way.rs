//! Ways to the gradient that are compared.

use candle_diffeq::metrics::{BackwardAttempt, Recorder, Stats};
use candle_diffeq::options::{
    Adaptive, AdjointNorm, AdjointSolve, AdjointTolerance, Controller, Gradient, Output,
    StepControl, Steps,
};
use candle_diffeq::tableau::DOPRI5;
use candle_diffeq::OdeOptions;

/// A way to the gradient.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Way {
    /// A backsolve whose error takes in every tensor, by absolute tolerances: torchdiffeq's default.
    Default,
    /// A backsolve with the seminorm, by absolute tolerances: torchdiffeq's `seminorm`.
    Seminorm,
    /// A backsolve with the seminorm and a tolerance relative to the size of the loss: our default.
    Relative,
    Interpolated,
    Quadrature,
    Discrete,
}

impl Way {
    pub(crate) const ALL: [Self; 6] = [
        Self::Default,
        Self::Seminorm,
        Self::Relative,
        Self::Interpolated,
        Self::Quadrature,
        Self::Discrete,
    ];

    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Default => "backsolve, default norm",
            Self::Seminorm => "backsolve, seminorm",
            Self::Relative => "backsolve, seminorm, relative",
            Self::Interpolated => "interpolated",
            Self::Quadrature => "quadrature",
            Self::Discrete => "discrete",
        }
    }

    pub(crate) fn gradient(self) -> Gradient {
        let absolute = AdjointSolve::new().tolerance(AdjointTolerance::Absolute);
        match self {
            Self::Default => Gradient::Backsolve(absolute.norm(AdjointNorm::Largest)),
            Self::Seminorm => Gradient::Backsolve(absolute),
            Self::Relative => Gradient::Backsolve(AdjointSolve::new()),
            Self::Interpolated => Gradient::Interpolated(AdjointSolve::new()),
            Self::Quadrature => Gradient::Quadrature(AdjointSolve::new()),
            Self::Discrete => Gradient::Discrete,
        }
    }

    /// dopri5 with common steps of the batch, in all ways.
    pub(crate) fn options(self, tolerance: Pair, recorder: &Recorder) -> OdeOptions {
        OdeOptions {
            method: DOPRI5,
            steps: Steps::Adaptive(tolerance.adaptive()),
            output: Output::Final,
            gradient: self.gradient(),
            recorder: Some(recorder.clone()),
            ..Default::default()
        }
    }
}

/// A relative and an absolute tolerance, as torchdiffeq would be told them.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Pair(pub(crate) f64, pub(crate) f64);

/// Our error estimate of dopri5 is 3/2 of torchdiffeq's, stage by stage: tolerances that are larger by this factor take
/// the same steps.
pub(crate) const ESTIMATE: f64 = 1.5;

impl Pair {
    fn adaptive(self) -> Adaptive {
        // torchdiffeq's controller.
        let controller = Controller {
            i: 1.0,
            ..Controller::I
        };
        let adaptive = Adaptive::new(ESTIMATE * self.0, ESTIMATE * self.1);
        adaptive.controller(controller).control(StepControl::Batch)
    }

    pub(crate) fn name(self) -> String {
        format!("{:e}, {:e}", self.0, self.1)
    }
}

/// What one gradient took.
#[derive(Clone, Debug, Default)]
pub(crate) struct Cost {
    pub(crate) forward: usize,
    /// Evaluations backward: of a discrete adjoint, its pull-backs.
    pub(crate) backward: usize,
    pub(crate) accepted: usize,
    pub(crate) rejected: usize,
    pub(crate) attempts: Vec<BackwardAttempt>,
    pub(crate) milliseconds: f64,
}

impl Cost {
    pub(crate) fn new(way: Way, stats: Stats, milliseconds: f64) -> Self {
        let (backward, accepted) = match way {
            Way::Discrete => (stats.vjps, stats.steps),
            _ => (stats.backward.evaluations, stats.backward.steps),
        };
        Self {
            forward: stats.evaluations,
            backward,
            accepted,
            rejected: stats.backward.rejected,
            attempts: stats.backward.attempts,
            milliseconds,
        }
    }
}
