//! Models and solvers that are made of several solves.
//!
//! * [`recurrent`]: hidden states that follow an ODE between observations: ODE-RNN, ODE-LSTM, GRU-ODE-Bayes, latent ODE.
//! * [`shooting`]: all intervals of a solve at once: parareal, Newton's multiple shooting.
//! * [`hypersolver`]: methods with a learnt correction of each step.

pub mod hypersolver;
pub mod recurrent;
pub mod shooting;
