//! Neural differential equations in mixed precision on [candle](candle_core).
//!
//! A neural ODE y' = f_θ(t, y) calls one network thousands of times.  Here the network runs in
//! bf16 or f16, and everything that is summed over its calls is f32: the state, the adjoint, the
//! gradients.  Gradients are exact for the steps that were run, take no tape over steps, and reach
//! the user's variables through candle's own `loss.backward()`.
//!
//! * [`odeint`]: a closure, solved; [`solve`]: the same without a graph; [`predict`]: without gradients.
//! * [`NeuralOde`]: a model built from a `VarBuilder`, in any [`Precision`], with f32 master weights.
//! * [`FieldWithArgs`]: fields with arguments, such as the output of an encoder.
//! * [`check_field`]: a field's pull-back compared with differences, which every model is once.
//! * [`nn`]: layers and fields; perceptrons, their flows and convolutions are integrated tile by tile on
//!   the CPU, several times faster.
//! * [`mmd()`], and `datasets` behind a feature: to judge continuous flows by, and to train them on.
//! * [`OdeOptions`]: method ([`Tableau`]), steps, checkpoints, scaling, statistics.
//!
//! # Theory
//!
//! With an explicit tableau (a, b, c), step h, and Q rounding to compute precision, forward is
//!
//! Y_i = Q(y_n + h Σ_j a_ij k_j),  k_i = f(t_n + c_i h, Y_i),  y_{n+1} = y_n + h Σ_i b_i k_i,
//!
//! every sum in state precision.  Backward is the exact discrete adjoint of these steps, rounding
//! treated as the identity; for n = N−1 … 0, the stages recomputed from the kept ŷ_n,
//!
//! v_i = b_i λ + h Σ_{j>i} a_ji w_j,  w_i = (∂f/∂y)ᵀ v_i,  θ̄ += h (∂f/∂θ)ᵀ v_i,
//! λ ← λ + h Σ_i w_i + ȳ_n.
//!
//! Only f and its pull-back run in compute precision, so a rounding u of f moves solution and
//! gradients by O(u), however many steps there are.  In f16 the pull-back is fed S·v_i with a power
//! of two S that follows max|λ|, and its results are divided by S in state precision.
//!
//! # Layout
//!
//! Data flows one way, and a module uses only those before it in this list.  `error`; `ops` (fused
//! tensor operations), `precision` (dtype roles, the only place that rounds), `tableau`, `time`,
//! `state`, `field` and `autograd` (f and its default pull-back), `piecewise` (one field after the
//! other in time), `stats`, `watch` (for NaN); `step` (one step and its linearisation), `pullback`
//! (checks of the form of what one returns), `trajectory` (what is kept), `scaler`, `problem` (what both
//! passes know), `replay` (steps one after the other, also as CUDA graphs), `integrate` (the forward loop),
//! `accumulator` and `adjoint` (the backward sweep), `arguments` and `parameters` (θ), `check` (pull-backs
//! against differences), `odeint` and `neural_ode` (public entries; the node in candle's graph).
//! With the feature `cuda`, `ops` has kernels for NVIDIA GPUs and `nn` whole solves in one launch.
//! Beside the loops over whole batches stand `simd` (kernels), `rows` (both passes over one tile of
//! rows after the other) and [`nn`] (fields that can be integrated so).
//!
//! # Limits
//!
//! Fixed steps.  Second derivatives are not supported: returned gradients are detached, and differentiating
//! them silently yields none; only a cotangent that is itself tracked is an error.  A field must be
//! deterministic: dropout inside it is an error ([`Error::NotDeterministic`]).  Gradients with respect to
//! time see what a field computes from [`Time::tensor`], not from [`Time::value`].
#![deny(missing_docs)]

mod accumulator;
mod adjoint;
mod arguments;
mod autograd;
mod check;
#[cfg(feature = "datasets")]
pub mod datasets;
mod error;
mod field;
mod integrate;
mod link;
mod loss;
mod memory;
mod mmd;
mod neural_ode;
pub mod nn;
mod node;
mod odeint;
mod ops;
mod parameters;
mod passes;
mod piecewise;
mod precision;
mod problem;
mod pullback;
mod replay;
mod rows;
mod scaler;
mod simd;
mod solution;
mod state;
mod stats;
mod step;
mod tableau;
mod time;
mod trajectory;
mod watch;

pub use check::{check_field, FieldCheck};
pub use error::{Error, Result};
pub use field::{
    autonomous, constant, Autonomous, Constant, Cotangents, FieldWithArgs, Pullback, VectorField,
};
pub use loss::RowLoss;
pub use memory::MemoryNeed;
pub use mmd::mmd;
pub use neural_ode::{Given, NeuralOde};
pub use odeint::{odeint, odeint_with, predict, solve, solve_with};
#[doc(hidden)]
pub use ops::internals;
pub use piecewise::PiecewiseConstant;
pub use precision::{Arithmetic, Precision};
pub use problem::{ActivationCache, OdeOptions, Output};
pub use pullback::{Argument, PullbackDefect};
pub use scaler::{DynamicScaling, LossScaler, OnOverflow, Scaling, Stepped};
pub use solution::{Gradients, Solution};
pub use state::State;
pub use stats::{NotReplayed, Recorder, Stats};
pub use tableau::{
    Tableau, TableauDefect, BOSH3, DOPRI5, DOPRI8, EULER, FEHLBERG45, HEUN, MIDPOINT, RALSTON, RK3,
    RK4, RK4_38, SSP_RK3, TSIT5,
};
pub use time::{Steps, Time, TimeGrid, Times};
pub use trajectory::Checkpoint;

/// The README's example, run as a test.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
