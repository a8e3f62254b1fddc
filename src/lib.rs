//! Neural differential equations in mixed precision on [candle](candle_core).
//!
//! A neural ODE y' = f_θ(t, y) calls one network thousands of times.  Here the network runs in bf16 or f16.  The state,
//! the adjoint and the gradients are sums over all calls of the network; they are f32 or f64.  Gradients are the exact
//! derivatives of the steps that the solver has taken, with one exception: the derivative of a rounding counts as 1.
//! No autograd tape records the steps.  The gradients reach the user's variables through candle's own
//! `loss.backward()`.
//!
//! The [guide] explains the crate chapter by chapter.
//!
//! * [`odeint`] solves y' = f(t, y) for a closure f, as part of candle's graph.  [`solution`] solves without that
//!   graph, and gives gradients on request.  [`predict`] solves without gradients.
//! * [`NeuralOde`]: a model built from a `VarBuilder`, in any [`Precision`], with f32 master weights.
//! * [`FieldWithArgs`](fields::FieldWithArgs): fields with arguments, such as the output of an encoder.
//! * [`check_field`](fields::check_field): compares a field's pull-back (vector-Jacobian product) with finite
//!   differences.  The first solves of a model do the same.
//! * [`nn`]: layers and fields.  On the CPU, some of the fields are integrated in tiles (groups of rows of the batch),
//!   several times faster than through candle's operations.  Among them are perceptrons, continuous flows (also those
//!   of OT-Flow, and with weights that depend on time), gradients ∇Φ of a potential Φ that is a perceptron,
//!   convolutions, and perceptrons as fields of a CDE.
//! * [`nn::energy`]: fields that are built from the gradient of a potential, such as Hamiltonian and Lagrangian
//!   networks.  They can be trained, although candle has no second derivatives: these are written by hand.
//! * [`options::Gradient`]: continuous adjoints in place of the exact gradients, for comparison or if memory is short.
//!   By default, the norm of their errors leaves out the gradients of the parameters and of the times (the seminorm).
//! * [`events`]: times at which a function of time and state crosses zero, and systems whose state jumps there.
//!   [`dense`]: solutions that can be evaluated, after the solve, at any time t of their interval.
//! * [`cde`]: neural controlled differential equations, which are driven by data along a [path](cde::ControlPath).
//! * [`sde`]: stochastic differential equations, by methods from Euler–Maruyama to SRI2.  The equations are driven by
//!   [increments](sde::Noise) of Brownian motion, computed from a seed.
//! * [`models::recurrent`]: hidden states that follow an ODE between observations: ODE-RNN, GRU-ODE-Bayes, latent ODE.
//!   [`nn::graph`]: graph neural ODEs.
//! * [`models::shooting`]: parareal and Newton's multiple shooting.  [`models::hypersolver`]: methods with a learnt
//!   correction.
//! * [`mmd`](metrics::mmd()): a measure of the quality of continuous flows.  `datasets` (only with the feature
//!   `datasets`): densities, points with classes, and systems of physics to learn from.
//! * [`distributed`]: data-parallel training, on one machine or many.
//! * [`OdeOptions`]: the method ([`Tableau`](tableau::Tableau)), fixed or adaptive steps and what is kept
//!   ([`options`]), [scaling](mod@scaling), and [statistics](metrics::Recorder).
//!
//! # Theory
//!
//! Let (a, b, c) be an explicit tableau, h the step length, and Q the rounding to the compute precision, in which f is
//! evaluated.  The state precision is that of y, of λ and of all sums.  The forward pass is
//!
//! Y_i = Q(y_n + h Σ_j a_ij k_j),  k_i = f(t_n + c_i h, Y_i),  y_{n+1} = y_n + h Σ_i b_i k_i,
//!
//! where every sum is in state precision.  The backward pass is the exact discrete adjoint of these steps, except that
//! Q is differentiated as the identity.  Let ȳ_n be the cotangent of the output at t_n (zero if there is none), and ŷ_n
//! the kept copy of y_n.  The adjoint λ of y starts as ȳ_N, and the gradient θ̄ of the parameters as zero.  For n =
//! N−1, …, 0 the stages are recomputed from ŷ_n.  Then, for each stage i from the last to the first, the cotangents v_i
//! of the velocity k_i (without the factor h) and w_i of the stage state Y_i are computed, and θ̄ is updated:
//!
//! v_i = b_i λ + h Σ_{j>i} a_ji w_j,  w_i = (∂f/∂y)ᵀ v_i,  θ̄ ← θ̄ + h (∂f/∂θ)ᵀ v_i;
//! then λ ← λ + h Σ_i w_i + ȳ_n.
//!
//! An output inside a step, at a fraction x of it, is y_n + h Σ_i b_i(x) k_i with the method's interpolant b(x).  Its
//! cotangent ȳ is added to the new λ, and b_i(x) ȳ is added to v_i.  With adaptive steps, the backward pass uses the
//! accepted steps and treats their lengths as constants.
//!
//! Only f and its pull-back run in compute precision.  So if f is evaluated with a rounding error u, the solution and
//! the gradients change by at most C u, where C depends on f and on the interval, but not on the number of steps.
//! The rounding of the sums, in state precision, is added to this, and grows with the number of steps unless the sums
//! are [compensated](Precision::compensated).  In f16 the input of the pull-back is S·v_i, where
//! S is a power of two that is chosen from max|λ|.  The results of the pull-back are converted to state precision and
//! then divided by S.
//!
//! # Layout
//!
//! Dependencies go in one direction: a module uses only modules before it in this list.  A test checks this.  It does
//! not check the imports of unit tests.
//!
//! * `stats`, `error`: what a solve has done, and what can go wrong.
//! * `tableau`: coefficients of methods, and their interpolants.
//! * `state`, `memory`, `time`: the state and its rows; the memory that a solve needs; the time grid, and the time at
//!   which a field is evaluated.
//! * `intervals`, `path`: in which interval between two jump times a stage lies; control paths through observations.
//! * `adaptive`: tolerances and step-size controllers, and the decision about each adaptive step, which is computed
//!   from plain numbers and no tensors.
//! * `schedule`: the list of the steps of a solve, and which states the solve returns.
//! * `gradient`: the options that say how gradients are computed.
//! * `precision`: the dtypes of the state, of evaluations and of kept states; rounding.
//! * `crossing`: where a scalar function of time crosses zero inside a step.
//! * `field`: f, its default pull-back, and the check of a pull-back against differences.
//! * `controlled`: fields F(z) that return a matrix, which is multiplied by the slope of a control path.
//! * `scaler`: scales of the adjoint.
//! * `simd`, `ops`: kernels for vector units; fused operations on tensors, which also round their results.
//! * `noise`: increments of Brownian motion, computed from a seed, the step, the row and the channel.
//! * `watch`, `loss_scaler`: detection of NaN and infinity; a scale for the loss, for f16 layers before and after a
//!   solve.
//! * `step`: one step and its linearisation.
//! * `driven`: one step of an equation with noise, and its linearisation.
//! * `replay`, `trajectory`, `linearized`: the sequence of forward steps; which states and which evaluations are kept
//!   for the backward pass.
//! * `problem`, `arguments`: what the forward and the backward pass both need; the arguments of a field.
//! * `reverse`: the common interface by which every kind of forward pass hands its results to its backward pass.
//! * `accumulator`, `adjoint`: sums of gradients, the backward sweep.
//! * `rows`, `loss`: the forward and the backward pass, tile by tile; losses that are means over rows.
//! * `offer`: how fields of this crate tell the solver that they can be solved tile by tile or in one GPU launch.
//! * `integrate`, `link`, `parameters`: the forward loop; how gradients of θ reach candle; the parameters θ.
//! * `backsolve`: continuous adjoints, which are solved backward in time, and the stochastic adjoint.
//! * `nn`: layers, and fields that can be integrated tile by tile.
//! * `passes`, `node`, `solution`: the choice of a solver for both passes; a solve as a node of candle's graph; a
//!   solve without this graph.
//! * `odeint`, `events`, `dense`: public entry points: solving, events, dense output.
//! * `piecewise`: fields that are piecewise constant in time.
//! * `neural_ode`, `cde`: public entry points: models, and equations that are driven by data.
//! * `sde`: the public entry points of stochastic differential equations.
//! * `models`: models and solvers that are made of several solves: recurrent and latent models, shooting, hypersolvers.
//! * `datasets`, `mmd`: densities, points with classes and systems of physics to learn from; a measure of the quality
//!   of continuous flows.
//! * `distributed`: several processes that train one model.
//! * `guide`: chapters of documentation.
//!
//! # Limits
//!
//! Only explicit methods are available, with fixed or adaptive steps.  Stochastic equations can have adaptive steps if
//! their noise is additive.  In the sense of Stratonovich they can also have them if their noise is scalar, or if it is
//! diagonal and the diffusion of each component depends on no other component that has noise.  Second derivatives are
//! not supported: returned gradients are detached, so differentiating them gives no gradient and no error.  There is an
//! error in one case only: if the gradient that the solve receives in `backward` is itself tracked by candle's graph.
//! A field must be deterministic: dropout inside it is an error ([`Error::NotDeterministic`]).  Gradients with respect
//! to time include what a field computes from [`Time::tensor`], but not what it computes from [`Time::value`].
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
#[cfg(any(doc, doctest))]
pub mod guide;
mod integrate;
mod intervals;
mod linearized;
mod link;
mod loss;
mod loss_scaler;
mod memory;
mod mmd;
pub mod models;
mod neural_ode;
pub mod nn;
mod node;
mod noise;
mod odeint;
mod offer;
mod ops;
mod parameters;
mod passes;
mod path;
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
pub use field::VectorField;
pub use neural_ode::NeuralOde;
pub use odeint::{odeint, odeint_with, predict, solution, solution_with};
#[doc(hidden)]
pub use ops::internals;
pub use precision::Precision;
pub use problem::OdeOptions;
pub use solution::{Gradients, Solution};
pub use state::State;
pub use time::Time;

/// What fields are built from: modules and constants as fields, pieces in time, fields with arguments, what a user's
/// own pull-back returns, and the check of a pull-back.
pub mod fields {
    pub use crate::field::check::{check_field, FieldCheck};
    pub use crate::field::{
        autonomous, constant, Autonomous, Constant, Cotangents, FieldWithArgs, Pullback,
    };
    pub use crate::neural_ode::Given;
    pub use crate::piecewise::PiecewiseConstant;
}

/// Values of the options of a solve: its times, its steps (fixed or controlled by tolerances), the states that it
/// returns, and what it keeps for the backward pass.
pub mod options {
    pub use crate::adaptive::{Adaptive, Controller, Norm, OnFailure, StepControl, Tolerance};
    pub use crate::gradient::{
        AdjointNorm, AdjointSolve, AdjointTolerance, ErrorRatios, Gradient, OwnNorm,
    };
    pub use crate::precision::Arithmetic;
    pub use crate::problem::ActivationCache;
    pub use crate::schedule::{Output, Steps};
    pub use crate::time::{TimeGrid, Times};
    pub use crate::trajectory::Checkpoint;
}

/// Scales that keep cotangents within the range of f16, inside a solve and in the layers around a solve.
pub mod scaling {
    pub use crate::loss_scaler::{LossScaler, Stepped};
    pub use crate::scaler::{DynamicScaling, OnOverflow, Scaling};
}

/// Measures: what a solve has done, and how good a continuous flow is.
pub mod metrics {
    pub use crate::mmd::mmd;
    pub use crate::stats::{BackwardAttempt, BackwardStats, Recorder, RowStats, Stats};
}

#[cfg(test)]
mod every_core;

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
