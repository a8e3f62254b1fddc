//! The operations as kernels of our own on NVIDIA GPUs, one launch each; the contract is that of
//! [`super::chain`].
//!
//! A candle device has one stream and all its tensors are used on it, so launches are ordered as
//! they are made, and memory that is freed is reused by later ones only.
#![allow(unsafe_code)]

mod clock;
pub(crate) mod csr;
mod graph;
mod launch;
mod layer;
pub(crate) mod mlp;
mod sums;
mod sweep;

#[cfg(test)]
mod tests;

pub(crate) use clock::Clock;
pub(crate) use graph::{capture, keep_uploads, obstacle, Captured, Graph};
pub(super) use launch::magnitude;
pub(crate) use launch::Looks;
pub(crate) use layer::{activate, pull, SlopeFrom, NO_ACTIVATION};
pub(crate) use sums::{accumulate_all, add_compensated, combine, dot, stage, update};
pub(crate) use sweep::{Finding, Stop, SweepState};
