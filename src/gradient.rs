//! How the gradients of a solve are computed: from the steps that were taken, or by continuous adjoints.
//!
//! With λ(t) = ∂L/∂y(t), a continuous adjoint solves, from the last output back to t_0,
//!
//! λ' = −(∂f/∂y)ᵀ λ,  θ̄' = −(∂f/∂θ)ᵀ λ,
//!
//! and adds the cotangent ȳ_i to λ at every output time t_i (L. S. Pontryagin and others; R. T. Q. Chen and others, "Neural
//! ordinary differential equations", NeurIPS 2018).  The three kinds differ in where y(t) comes from and in how the
//! integral θ̄ is formed.

use std::fmt;
use std::sync::Arc;

use candle_core::{DType, Device, Shape, Tensor};

use crate::adaptive::{Adaptive, Control, OnFailure, StepControl};
use crate::error::{ContinuousDefect, Result};
use crate::schedule::{Output, Schedule, Steps};
use crate::tableau::Tableau;
use crate::time::TimeGrid;

/// How the gradients of a solve are computed; an option of every solve,
/// [`OdeOptions::gradient`](crate::OdeOptions::gradient).
///
/// Let L be the loss, λ(t) = ∂L/∂y(t) its adjoint, and θ̄ = ∂L/∂θ its gradient with respect to the parameters.  A
/// continuous adjoint is a numerical solution of the adjoint equation
///
/// λ' = −(∂f/∂y)ᵀ λ,  θ̄' = −(∂f/∂θ)ᵀ λ,
///
/// backward in time, from λ = 0 and θ̄ = 0 behind the last output to t_0.  At each output time t_i, the cotangent ∂L/∂y(t_i)
/// of this output is added to λ (R. T. Q. Chen and others, "Neural ordinary differential equations", NeurIPS 2018).
///
/// | | y(t) in the backward pass | θ̄ | memory |
/// |---|---|---|---|
/// | `Discrete` | states that were kept | the exact sum over the steps that were taken | states by [`Checkpoint`](crate::options::Checkpoint) |
/// | `Backsolve` | solved backward with λ | a sum over the stages of backward steps | the outputs, and the stages of one attempt (of perceptrons with the activations of their layers) |
/// | `Interpolated` | the interpolant of the forward steps | a sum over the stages of backward steps | states by `Checkpoint`, the stages of one attempt and of the forward steps that it reaches into |
/// | `Quadrature` | the interpolant of the forward steps | Gauss quadrature along λ | as `Interpolated` |
///
/// `Discrete` is exact for the solution that was computed, and as a rule takes the fewest pull-backs.  The others are
/// approximations of the gradient of the exact solution, up to the tolerance of their backward solve.  `Interpolated` and
/// `Quadrature` are also limited by the interpolant of the forward method: that of
/// [`FEHLBERG45`](crate::tableau::FEHLBERG45) and of [`DOPRI8`](crate::tableau::DOPRI8) is less accurate than their steps,
/// and no error estimate sees this.  The page `docs/continuous.md` of the repository says when to use which, with measured
/// memory, time and error.
///
/// The field must be a function of (t, y): a backward step has a number, and ends, of its own, and a negative length
/// where the forward steps have a positive one.  A field may look up a quantity that jumps by
/// [`Time::interval`](crate::Time::interval), if the times of its jumps are declared
/// ([`VectorField::jumps`](crate::VectorField::jumps) or [`Adaptive::jump_t`]): the interval does not go beyond a jump.
///
/// ```
/// use candle_core::{Device, Var};
/// use candle_diffeq::{odeint, OdeOptions, Time};
/// use candle_diffeq::options::{Adaptive, AdjointSolve, Gradient, Output, Steps};
/// use candle_diffeq::tableau::DOPRI5;
/// let options = OdeOptions {
///     method: DOPRI5,
///     steps: Steps::Adaptive(Adaptive::new(1e-8, 1e-10)),
///     output: Output::Final,
///     gradient: Gradient::Backsolve(AdjointSolve::new()),
///     ..Default::default()
/// };
/// let y0 = Var::new(&[0.5f64], &Device::Cpu)?;
/// // Logistic growth, of which dy(1)/dy0 = e / (1 + (e − 1) y0)².
/// let f = |_: &Time, y: &candle_core::Tensor| y - y.sqr()?;
/// let grads = odeint(f, y0.as_tensor(), &[0.0, 1.0], &options)?.sum_all()?.backward()?;
/// let grad = grads.get(&y0).unwrap().to_vec1::<f64>()?[0];
/// let e = 1f64.exp();
/// assert!((grad - e / (1.0 + (e - 1.0) * 0.5).powi(2)).abs() < 1e-7);
/// # Ok::<(), candle_diffeq::Error>(())
/// ```
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub enum Gradient {
    /// The exact gradient of the steps that were taken (discretise, then optimise).
    #[default]
    Discrete,
    /// y and λ are solved backward together, from output to output; y starts anew from the kept output each time.
    /// Memory does not depend on the number of steps.  Solving y backward is unstable where the equation is
    /// dissipative: the error grows like e^{|μ| T}, where μ < 0 is its fastest rate, and the gradient may be wrong by
    /// any amount without an error.  [`BackwardStats::drift`](crate::metrics::BackwardStats::drift) shows it.
    Backsolve(AdjointSolve),
    /// λ alone is solved backward; y(t) is interpolated in the forward steps, whose stages are computed again from the
    /// states that were kept.  Steps tile by tile are not available.
    Interpolated(AdjointSolve),
    /// As `Interpolated`, but θ̄ is integrated by a Gauss rule in every backward step, at states of the interpolants of y
    /// and λ.  θ̄ has no error estimate: a norm that reads it is an error
    /// ([`ContinuousDefect::Unavailable`](crate::error::ContinuousDefect::Unavailable)).
    Quadrature(AdjointSolve),
}

/// The backward solve of a continuous adjoint.  By default the method and the steps are those of the forward pass, its
/// tolerances included, and the error is measured by the seminorm.
///
/// ```
/// use candle_diffeq::options::{Adaptive, AdjointNorm, AdjointSolve, AdjointTolerance, Controller, Steps};
/// use candle_diffeq::tableau::DOPRI5;
/// // What torchdiffeq's odeint_adjoint does.
/// let adaptive = Adaptive::new(1e-5, 1e-8).controller(Controller::I);
/// let solve = AdjointSolve::new()
///     .method(DOPRI5)
///     .steps(Steps::Adaptive(adaptive))
///     .norm(AdjointNorm::Largest)
///     .tolerance(AdjointTolerance::Absolute);
/// # let _ = solve;
/// ```
#[derive(Clone, Debug, Default)]
pub struct AdjointSolve {
    method: Option<Tableau>,
    steps: Option<Steps>,
    norm: AdjointNorm,
    tolerance: AdjointTolerance,
    points: Option<usize>,
}

impl AdjointSolve {
    /// All defaults.
    pub fn new() -> Self {
        Self::default()
    }

    /// The method of the backward solve.  Default: that of the forward pass.
    #[must_use]
    pub fn method(self, method: Tableau) -> Self {
        Self {
            method: Some(method),
            ..self
        }
    }

    /// The steps of the backward solve: adaptive with their own tolerances and controller, or fixed.  Default: those of
    /// the forward pass; of adaptive ones everything but the first step and steps by row.  Every output time ends a
    /// step, and so does every time in the forward steps' `jump_t`; the step length is carried on beyond it.
    /// `Steps::Adaptive` counts attempts over the whole backward pass.
    #[must_use]
    pub fn steps(self, steps: Steps) -> Self {
        Self {
            steps: Some(steps),
            ..self
        }
    }

    /// How the error of adaptive backward steps is measured.  Default: [`AdjointNorm::Seminorm`].  With
    /// [`Gradient::Quadrature`] only norms of the state.  Fixed steps have no error, and read neither norm nor tolerance.
    #[must_use]
    pub fn norm(self, norm: AdjointNorm) -> Self {
        Self { norm, ..self }
    }

    /// What the absolute tolerance of λ is relative to.  Default: [`AdjointTolerance::Relative`].
    #[must_use]
    pub fn tolerance(self, tolerance: AdjointTolerance) -> Self {
        Self { tolerance, ..self }
    }

    /// Points of the Gauss rule of [`Gradient::Quadrature`] in each backward step, 1 to 16; the other kinds have none.
    /// Default: half the order of the method, rounded up.  (A Gauss rule of n points has order 2n.)
    #[must_use]
    pub fn points(self, points: usize) -> Self {
        Self {
            points: Some(points),
            ..self
        }
    }

    /// Whether any of it is not the default.
    fn is_own(&self) -> bool {
        let Self {
            method,
            steps,
            norm,
            tolerance,
            points,
        } = self;
        let of_steps = method.is_some() || steps.is_some() || points.is_some();
        let of_errors =
            !matches!(norm, AdjointNorm::Seminorm) || *tolerance != AdjointTolerance::default();
        of_steps || of_errors
    }
}

/// What the absolute tolerance atol of λ, and of θ̄ where it is part of the error, is relative to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum AdjointTolerance {
    /// atol times the largest cotangent, max |ȳ|: the size of λ is that of the loss, so that a loss multiplied by a
    /// number takes the same steps, and its gradient is multiplied by this number.
    #[default]
    Relative,
    /// atol itself, as in torchdiffeq: a loss that is multiplied by 10⁻³ takes fewer steps, and its gradient is less
    /// accurate.
    Absolute,
}

/// How the errors of a backward step become one number r; a step is accepted if r ≤ 1.
///
/// An error e of a number x is divided by its tolerance atol + rtol max(|x_n|, |x_{n+1}|).  The state of a backsolve is y,
/// λ, θ̄ and t̄; the other kinds have no y.
#[derive(Clone, Default)]
#[non_exhaustive]
pub enum AdjointNorm {
    /// The largest RMS of a tensor of y or λ; θ̄ and t̄ are left out (P. Kidger, R. T. Q. Chen, T. Lyons, "Hey, that's not an
    /// ODE: faster ODE adjoints via seminorms", ICML 2021).  They are integrals, whose errors change nothing else.  With
    /// [`Norm::WorstRow`](crate::options::Norm::WorstRow) the RMS of each row.
    #[default]
    Seminorm,
    /// The largest RMS of any tensor: also of each parameter's gradient and, where gradients of the times are wanted,
    /// of t̄.  It is torchdiffeq's default.
    Largest,
    /// One RMS over all numbers of y, λ, θ̄ and t̄, as in the first versions of torchdiffeq.
    Rms,
    /// The user's own.
    Own(OwnNorm),
}

/// A norm of one's own for [`AdjointNorm::Own`].
///
/// ```
/// use candle_diffeq::options::{AdjointNorm, ErrorRatios, OwnNorm};
/// // λ alone decides.
/// let norm = OwnNorm::of_state(|ratios: &ErrorRatios| {
///     let squares = ratios.adjoint[0].sqr()?.mean_all()?;
///     Ok(squares.to_dtype(candle_core::DType::F64)?.to_scalar::<f64>()?.sqrt())
/// });
/// # let _ = AdjointNorm::Own(norm);
/// ```
#[derive(Clone)]
pub struct OwnNorm {
    norm: Arc<NormFunction>,
    all: bool,
}

type NormFunction = dyn Fn(&ErrorRatios) -> candle_core::Result<f64> + Send + Sync;

impl OwnNorm {
    /// A norm of y and λ; [`ErrorRatios::params`] is empty, and θ̄ costs no error estimate.
    pub fn of_state<F>(norm: F) -> Self
    where
        F: Fn(&ErrorRatios) -> candle_core::Result<f64> + Send + Sync + 'static,
    {
        Self {
            norm: Arc::new(norm),
            all: false,
        }
    }

    /// A norm of y, λ, θ̄ and t̄.
    pub fn of_all<F>(norm: F) -> Self
    where
        F: Fn(&ErrorRatios) -> candle_core::Result<f64> + Send + Sync + 'static,
    {
        Self {
            all: true,
            ..Self::of_state(norm)
        }
    }

    pub(crate) fn of(&self, ratios: &ErrorRatios) -> Result<f64> {
        let r = (self.norm)(ratios)?;
        Ok(if r.is_nan() { f64::INFINITY } else { r })
    }
}

/// The errors of a backward step, each divided by its tolerance.  Every tensor is in state dtype and has the shape of what
/// it belongs to.  An error of zero is 0, whatever its tolerance.
///
/// A norm is used for two other purposes.  To choose the length of the first step, it is given the state and its velocity
/// at the last time in the place of errors.  If there is a [noise floor](Adaptive::noise_floor), it is called twice for
/// every step: for errors relative to the tolerance with the floor, and relative to the tolerance without it.
#[derive(Clone, Debug, Default)]
pub struct ErrorRatios {
    /// Of y by tensor; empty where y is interpolated.
    pub y: Vec<Tensor>,
    /// Of λ by tensor of the state.
    pub adjoint: Vec<Tensor>,
    /// Of θ̄ by parameter.
    pub params: Vec<Tensor>,
    /// Of t̄, where gradients of the times are wanted.
    pub time: Option<Tensor>,
}

impl AdjointNorm {
    /// Whether θ̄ and t̄ are part of the error.
    pub(crate) fn reads_sums(&self) -> bool {
        match self {
            Self::Seminorm => false,
            Self::Largest | Self::Rms => true,
            Self::Own(own) => own.all,
        }
    }
}

impl fmt::Debug for AdjointNorm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Seminorm => "Seminorm",
            Self::Largest => "Largest",
            Self::Rms => "Rms",
            Self::Own(_) => "Own(…)",
        })
    }
}

/// Where a continuous adjoint has y(t) from, and how it forms θ̄.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Backsolve,
    Interpolated,
    Quadrature,
}

/// A continuous adjoint, resolved: nothing is left to default, and validated.
#[derive(Clone, Debug)]
pub(crate) struct Continuous {
    pub(crate) kind: Kind,
    pub(crate) method: Tableau,
    pub(crate) steps: Steps,
    pub(crate) norm: AdjointNorm,
    pub(crate) tolerance: AdjointTolerance,
    /// Points of the Gauss rule.
    pub(crate) points: usize,
    /// The user's times at which the field jumps in the forward pass.
    pub(crate) jumps: Vec<f64>,
    /// Whether an option of the backward solve was set to anything but its default.
    pub(crate) is_own: bool,
}

impl Continuous {
    /// Of a solve by this method and these steps; nothing where its gradient is discrete.
    pub(crate) fn new(
        gradient: &Gradient,
        method: &Tableau,
        steps: &Steps,
        grid: &TimeGrid,
    ) -> Result<Option<Self>> {
        let (kind, solve) = match gradient {
            Gradient::Discrete => return Ok(None),
            Gradient::Backsolve(solve) => (Kind::Backsolve, solve),
            Gradient::Interpolated(solve) => (Kind::Interpolated, solve),
            Gradient::Quadrature(solve) => (Kind::Quadrature, solve),
        };
        let method = solve.method.as_ref().unwrap_or(method).clone();
        let points = solve.points.unwrap_or(method.order().div_ceil(2));
        if !(1..=MOST_POINTS).contains(&points) {
            return Err(ContinuousDefect::Points { points }.into());
        }
        if kind == Kind::Quadrature && solve.norm.reads_sums() {
            let take = "AdjointNorm::Seminorm, OwnNorm::of_state or Gradient::Interpolated";
            return ContinuousDefect::unavailable("a norm of θ̄ and a Gauss rule", take);
        }
        let mut jumps = vec![];
        if let Steps::Adaptive(adaptive) = steps {
            if kind == Kind::Backsolve && adaptive.on_failure == OnFailure::Nan {
                let take = "OnFailure::Error or Gradient::Discrete";
                return ContinuousDefect::unavailable("rows that are NaN (OnFailure::Nan)", take);
            }
            jumps.extend(&adaptive.jump_t);
        }
        let steps = match &solve.steps {
            Some(own) => own.clone(),
            None => inherited(steps),
        };
        let continuous = Self {
            kind,
            method,
            steps,
            norm: solve.norm.clone(),
            tolerance: solve.tolerance,
            points,
            jumps,
            is_own: solve.is_own(),
        };
        continuous.check(grid)?;
        Ok(Some(continuous))
    }

    /// The tolerances of adaptive backward steps, for a state of these shapes, are wrong before the forward pass, too.
    pub(crate) fn check_tolerances(
        &self,
        grid: &TimeGrid,
        shapes: &[Shape],
        (state, device): (DType, &Device),
    ) -> Result<()> {
        match (&self.steps, backward(grid)?) {
            (Steps::Adaptive(adaptive), Some(back)) => {
                let control = Control::new(adaptive, &self.method, &back, &[])?;
                control.tolerances(shapes, state, device).map(|_| ())
            }
            _ => Ok(()),
        }
    }

    /// What would be wrong in the backward solve is wrong before the forward pass.
    fn check(&self, grid: &TimeGrid) -> Result<()> {
        let Some(back) = backward(grid)? else {
            return Ok(());
        };
        let [last, first] = [back.points()[0], back.points()[1]];
        match &self.steps {
            Steps::Adaptive(adaptive) if adaptive.control == Some(StepControl::Rows) => {
                let take = "StepControl::Batch in AdjointSolve::steps";
                ContinuousDefect::unavailable("backward steps by row", take)
            }
            Steps::Adaptive(adaptive) => {
                Control::new(adaptive, &self.method, &back, &[]).map(|_| ())
            }
            Steps::At(times) => {
                let outside = |t: &f64| !(t.is_finite() && (t - first) * (t - last) <= 0.0);
                match times.iter().copied().find(outside) {
                    Some(t) => Err(ContinuousDefect::Outside { t }.into()),
                    None => Ok(()),
                }
            }
            steps => Schedule::new(&back, steps, Output::Final, &[]).map(|_| ()),
        }
    }

    /// Whether the error of a backward step is measured, and θ̄ and t̄ are part of it.
    pub(crate) fn reads_sums(&self) -> bool {
        matches!(self.steps, Steps::Adaptive(_)) && self.norm.reads_sums()
    }

    /// Whether the backward pass reads the states of the forward steps.
    pub(crate) fn reads_states(&self) -> bool {
        self.kind != Kind::Backsolve
    }
}

/// From the last time to the first, where there are two.
fn backward(grid: &TimeGrid) -> Result<Option<TimeGrid>> {
    match grid.points() {
        [first, .., last] => TimeGrid::new(vec![*last, *first]).map(Some),
        _ => Ok(None),
    }
}

/// Points of the largest Gauss rule.
const MOST_POINTS: usize = 16;

/// The steps of a forward pass as those of its backward solve.
fn inherited(steps: &Steps) -> Steps {
    match steps {
        Steps::Adaptive(adaptive) => Steps::Adaptive(Adaptive {
            first_step: None,
            control: None,
            ..adaptive.clone()
        }),
        steps => steps.clone(),
    }
}
