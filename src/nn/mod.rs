//! Vector fields with pull-backs written by hand: ordinary candle modules, built from a
//! `VarBuilder` with the names and shapes of `candle_nn`, that the solver integrates tile by tile on
//! the CPU.

mod activation;
mod conv;
mod mlp;

pub use activation::Activation;
pub use conv::ConvField;
pub use mlp::Mlp;
