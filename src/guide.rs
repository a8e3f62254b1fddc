#![doc = include_str!("../docs/guide/index.md")]

/// Solving an equation, and differentiating through it.
#[doc = include_str!("../docs/guide/first_solve.md")]
pub mod first_solve {}
/// Models and closures as fields.
#[doc = include_str!("../docs/guide/own_field.md")]
pub mod own_field {}
/// What runs in bf16 or f16, and what does not.
#[doc = include_str!("../docs/guide/precision.md")]
pub mod precision {}
/// What the backward pass keeps.
#[doc = include_str!("../docs/guide/memory.md")]
pub mod memory {}
/// Tolerances, outputs, events.
#[doc = include_str!("../docs/guide/adaptive_steps.md")]
pub mod adaptive_steps {}
/// Which model of the literature is which type.
#[doc = include_str!("../docs/guide/models.md")]
pub mod models {}
/// Equations that are driven by data or by noise.
#[doc = include_str!("../docs/guide/data_and_noise.md")]
pub mod data_and_noise {}
/// Loops, files, threads, processes.
#[doc = include_str!("../docs/guide/training.md")]
pub mod training {}
/// NVIDIA GPUs.
#[doc = include_str!("../docs/guide/cuda.md")]
pub mod cuda {}
/// Names of torchdyn, function by function.
#[doc = include_str!("../docs/guide/from_torchdyn.md")]
pub mod from_torchdyn {}
