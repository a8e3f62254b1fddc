//! Neural differential equations in mixed precision on [candle](candle_core).
//!
//! Evaluate the velocity in bf16 or f16; keep state, adjoint and gradients in f32; differentiate
//! the steps that were run, exactly.
#![deny(missing_docs)]

mod accumulator;
mod adjoint;
mod autograd;
mod error;
mod field;
mod integrate;
mod neural_ode;
mod odeint;
mod ops;
mod parameters;
mod precision;
mod problem;
mod scaler;
mod state;
mod stats;
mod step;
mod tableau;
mod time;
mod trajectory;
mod watch;

pub use error::{Error, Result};
pub use field::{autonomous, constant, Autonomous, Constant, Cotangents, Pullback, VectorField};
pub use neural_ode::NeuralOde;
pub use odeint::{odeint, solve, Gradients, Solution};
pub use precision::{Arithmetic, Precision};
pub use problem::{OdeOptions, Output};
pub use scaler::{DynamicScaling, LossScaler, OnOverflow, Scaling, Stepped};
pub use state::State;
pub use stats::{Recorder, Stats};
pub use tableau::{
    Tableau, TableauDefect, BOSH3, DOPRI5, DOPRI8, EULER, FEHLBERG45, HEUN, MIDPOINT, RALSTON, RK3,
    RK4, RK4_38, SSP_RK3, TSIT5,
};
pub use time::{Steps, Time, TimeGrid, Times};
pub use trajectory::Checkpoint;
