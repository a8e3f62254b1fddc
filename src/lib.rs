//! Neural differential equations in mixed precision on [candle](candle_core).
//!
//! A neural ODE y' = f_θ(t, y) calls one network thousands of times.  Here the network runs in
//! bf16 or f16, and everything that is summed over its calls is f32: the state, the adjoint, the
//! gradients.  Gradients are exact for the steps that were run, need no autograd tape over steps, and reach the
//! user's variables through candle's own `loss.backward()`.
//!
//! * [`odeint`]: solves a closure as part of candle's graph; [`solution`]: without that graph, with gradients on
//!   request; [`predict`]: without gradients.
//! * [`NeuralOde`]: a model built from a `VarBuilder`, in any [`Precision`], with f32 master weights.
//! * [`FieldWithArgs`](fields::FieldWithArgs): fields with arguments, such as the output of an encoder.
//! * [`check_field`]: compares a field's pull-back (vector-Jacobian product) with finite differences.  The
//!   first solves of a model do the same.
//! * [`nn`]: layers and fields; perceptrons, continuous flows of perceptrons, and convolutions are integrated tile by
//!   tile on the CPU, several times faster than through candle's operations.
//! * [`nn::energy`]: fields made of the gradient of a potential, such as Hamiltonian and Lagrangian networks, although candle
//!   has no second derivatives.
//! * [`Gradient`]: gradients by continuous adjoints instead, with the seminorm, for comparison and where memory is short.
//! * [`events`]: times at which a function of time and state crosses zero, and systems whose state jumps there.
//!   [`dense`]: solutions that are evaluated at any time later.
//! * [`cde`]: neural controlled differential equations, which are driven by data along a [`path`](mod@path).
//! * [`sde`]: stochastic differential equations, by methods from Euler–Maruyama to SRI2; [`noise`]: their increments,
//!   which are functions of a seed.
//! * [`mmd`](metrics::mmd()): a measure of the quality of continuous flows.  `datasets` (behind a feature): densities, points
//!   with classes, and systems of physics to learn from.
//! * [`distributed`]: data-parallel training, on one machine or many.
//! * [`OdeOptions`]: the method ([`Tableau`]), fixed or [adaptive](control::Adaptive) steps, checkpoints, scaling,
//!   and statistics.
//!
//! # Theory
//!
//! Let (a, b, c) be an explicit tableau, h the step length, and Q the rounding to compute precision.  The forward
//! pass is
//!
//! Y_i = Q(y_n + h Σ_j a_ij k_j),  k_i = f(t_n + c_i h, Y_i),  y_{n+1} = y_n + h Σ_i b_i k_i,
//!
//! where every sum is in state precision.  The backward pass is the exact discrete adjoint of these steps, in which
//! rounding is treated as the identity.  For n = N−1 … 0, with the stages recomputed from ŷ_n, which is
//! y_n in the precision in which it was kept, and with the cotangent ȳ_n of the output at t_n,
//!
//! v_i = b_i λ + h Σ_{j>i} a_ji w_j,  w_i = (∂f/∂y)ᵀ v_i,  θ̄ += h (∂f/∂θ)ᵀ v_i,
//! λ ← λ + h Σ_i w_i + ȳ_n.
//!
//! An output inside a step, at a fraction x of it, is y_n + h Σ_i b_i(x) k_i with the method's interpolant b(x), and its
//! cotangent enters λ_n once and v_i with weight b_i(x).  Adaptive steps are those that were accepted, with their
//! lengths as constants.
//!
//! Only f and its pull-back run in compute precision.  So if f is evaluated with a rounding error u, the solution
//! and the gradients change by O(u), for any number of steps.  In f16 the input of the pull-back is S·v_i, where S is
//! a power of two that is chosen from max|λ|, and the results of the pull-back are divided by S in state precision.
//!
//! # Layout
//!
//! Dependencies go in one direction: a module uses only modules before it in this list.  A test reads the list and
//! checks every module against it, except unit tests.
//!
//! * `stats`, `error`: what a solve has done, and what can go wrong.
//! * `tableau`: coefficients of methods, and their interpolants.
//! * `state`, `memory`, `time`: the state and its rows; the memory that a solve needs; the time grid, and the time at
//!   which a field is evaluated.
//! * `intervals`, `path`: which interval between breaks a stage lies in; control paths through observations.
//! * `adaptive`: tolerances and step-size controllers, and the decision about each adaptive step, computed from
//!   numbers only.
//! * `schedule`: the steps of a solve as data, and which states it returns.
//! * `gradient`: how gradients are computed, as options.
//! * `precision`: dtype roles, and rounding.
//! * `crossing`: where a scalar function of time crosses zero inside a step.
//! * `field`: f, its default pull-back, and the check of a pull-back against differences.
//! * `controlled`: matrix fields that the slope of a control path is multiplied by.
//! * `scaler`: scales of the adjoint.
//! * `simd`, `ops`: kernels for vector units; fused operations on tensors, which round.
//! * `noise`: increments of Brownian motion as functions of a seed and their place.
//! * `watch`, `loss_scaler`: detection of NaN and infinity; a scale of the loss around a solve.
//! * `step`, `driven`, `replay`, `trajectory`: one step and its linearisation, also of an equation that is driven by
//!   noise; the sequence of forward steps; which states are kept for the backward pass.
//! * `problem`, `arguments`: what the forward and the backward pass both need; the arguments of a field.
//! * `reverse`: the common interface by which every kind of forward pass hands its results to its backward pass.
//! * `accumulator`, `adjoint`: sums of gradients, the backward sweep.
//! * `rows`, `loss`: the forward and the backward pass, tile by tile; losses that are means over rows.
//! * `offer`: how fields of this crate tell the solver that they can be solved tile by tile or in one GPU launch.
//! * `integrate`, `link`, `parameters`: the forward loop; how gradients of θ reach candle; the parameters θ.
//! * `backsolve`: continuous adjoints, which are solved backward in time.
//! * `nn`: layers, and fields that can be integrated tile by tile.
//! * `passes`, `node`, `solution`: the choice of a solver for both passes; a solve as a node of candle's graph; a
//!   solve without this graph.
//! * `odeint`, `events`, `dense`, `piecewise`, `neural_ode`, `cde`: the public entry points, and fields that are
//!   piecewise constant in time.
//! * `sde`: the public entry points of stochastic differential equations.
//! * `datasets`, `mmd`: training data for continuous flows, and a measure of their quality.
//! * `distributed`: several processes that train one model.
//!
//! # Limits
//!
//! Only explicit methods are available, with fixed or adaptive steps; stochastic equations have fixed ones.  Second
//! derivatives are not supported: returned gradients are detached, so differentiating them gives no gradient and no error.  An error is returned only if the
//! incoming cotangent is itself tracked by candle.  A field must be
//! deterministic: dropout inside it is an error ([`Error::NotDeterministic`]).  Gradients with respect to time
//! include what a field computes from [`Time::tensor`], but not what it computes from [`Time::value`].
#![deny(missing_docs)]

mod accumulator;
mod adaptive;
mod adjoint;
mod arguments;
mod backsolve;
pub mod cde;
mod controlled;
mod crossing;
#[cfg(feature = "datasets")]
pub mod datasets;
pub mod dense;
pub mod distributed;
mod driven;
pub mod error;
pub mod events;
mod field;
mod gradient;
mod integrate;
mod intervals;
mod link;
mod loss;
mod loss_scaler;
mod memory;
mod mmd;
mod neural_ode;
pub mod nn;
mod node;
pub mod noise;
mod odeint;
mod offer;
mod ops;
mod parameters;
mod passes;
pub mod path;
mod piecewise;
mod precision;
mod problem;
mod replay;
mod reverse;
mod rows;
mod scaler;
mod schedule;
pub mod sde;
mod simd;
mod solution;
mod state;
mod stats;
mod step;
pub mod tableau;
mod time;
mod trajectory;
mod watch;

pub use error::{Error, Result};
pub use field::check::{check_field, FieldCheck};
pub use field::VectorField;
pub use gradient::Gradient;
pub use loss::RowLoss;
pub use neural_ode::NeuralOde;
pub use odeint::{odeint, odeint_with, predict, solution, solution_with};
#[doc(hidden)]
pub use ops::internals;
pub use precision::{Arithmetic, Precision};
pub use problem::{ActivationCache, OdeOptions};
pub use schedule::{Output, Steps};
pub use solution::{Gradients, Solution};
pub use state::State;
pub use stats::{Recorder, RowStats, Stats};
pub use tableau::{Tableau, DOPRI5, RK4};
pub use time::{Time, TimeGrid, Times};
pub use trajectory::Checkpoint;

/// What fields are made of and made from: modules and constants as fields, pieces in time, fields with
/// arguments, and what a pull-back of one's own returns.
pub mod fields {
    pub use crate::field::{
        autonomous, constant, Autonomous, Constant, Cotangents, FieldWithArgs, Pullback,
    };
    pub use crate::neural_ode::Given;
    pub use crate::piecewise::PiecewiseConstant;
}

/// Scales that keep cotangents within the range of f16: inside a solve, and around one.
pub mod scaling {
    pub use crate::loss_scaler::{LossScaler, Stepped};
    pub use crate::scaler::{DynamicScaling, OnOverflow, Scaling};
}

/// What adaptive steps are controlled by: tolerances, controllers, norms.
pub mod control {
    pub use crate::adaptive::{Adaptive, Controller, Norm, OnFailure, StepControl, Tolerance};
}

/// Continuous adjoints, another way to the gradients of a solve ([`Gradient`](crate::Gradient)): their backward solve, its
/// norms, and
/// what it has done.
pub mod continuous {
    pub use crate::gradient::{AdjointNorm, AdjointSolve, AdjointTolerance, ErrorRatios, OwnNorm};
    pub use crate::stats::{BackwardAttempt, BackwardStats};
}

/// To judge continuous flows by.
pub mod metrics {
    pub use crate::mmd::mmd;
}

/// The README's example, run as a test.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;

/// The program of docs/continuous.md, run as a test.
#[cfg(doctest)]
#[doc = include_str!("../docs/continuous.md")]
struct ContinuousAdjoints;

/// The program of docs/distributed.md, compiled as a test.
#[cfg(all(doctest, feature = "mpi"))]
#[doc = include_str!("../docs/distributed.md")]
struct Distributed;
