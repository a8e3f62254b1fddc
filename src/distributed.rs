//! Data-parallel training: several processes, on one machine or on many, train one model.
//!
//! Every process, called a rank, holds the same variables and takes its own rows of each batch.  The gradient that its
//! optimiser gets is that of the mean over the rows of all ranks:
//!
//! θ̄ = Σ_r (n_r / n) θ̄_r,  n = Σ_r n_r,
//!
//! where θ̄_r is the gradient of the mean over the n_r rows of rank r.  So a rank may have fewer rows than others, or
//! none, and training differs from that of one process with the whole batch only by rounding.
//!
//! * [`Group`]: what a group of processes can do together.  [`Alone`] is a group of one; `MpiGroup` (feature `mpi`) is
//!   for any cluster, `NcclGroup` (feature `nccl`) for GPUs, on which it has not run yet.
//! * [`Replicas`]: the variables of one model on all ranks: they start with the same values, gradients are averaged,
//!   and overflow, clipping and checkpoints are decided once for all ranks.
//! * [`Shards`]: which rows of a data set a rank takes; [`share`]: which rows of one batch.
//! * [`mean`], [`total`]: losses and statistics of the whole group.
//! * [`told`]: tells the other ranks about an error of this rank.
//!
//! ```
//! use candle_core::{DType, Device, Tensor};
//! use candle_diffeq::distributed::{share, Alone, Group, Replicas};
//! use candle_nn::{linear, Module, Optimizer, VarBuilder, VarMap, SGD};
//!
//! // Under mpirun, with the feature `mpi`: let group = MpiGroup::start()?;
//! let group = Alone;
//! let (vars, device) = (VarMap::new(), Device::Cpu);
//! let model = linear(2, 1, VarBuilder::from_varmap(&vars, DType::F32, &device))?;
//! let replicas = Replicas::new(&group, &vars)?;
//! let mut optimiser = SGD::new(replicas.variables(), 0.1)?;
//! let batch = Tensor::ones((7, 2), DType::F32, &device)?; // the same on all ranks
//! let mine = share(&group, 7);
//! let x = batch.narrow(0, mine.start, mine.len())?;
//! let loss = model.forward(&x)?.sqr()?.mean_all()?;
//! replicas.backward_step(&loss, mine.len(), &mut optimiser)?;
//! # Ok::<(), candle_diffeq::Error>(())
//! ```
//!
//! `docs/distributed.md` says how programs are started on several hosts, and how they scale.

mod buckets;
mod group;
#[cfg(any(feature = "mpi", test))]
mod message;
#[cfg(feature = "mpi")]
mod mpi;
#[cfg(feature = "nccl")]
mod nccl;
mod replicas;
mod shards;
mod totals;

pub use buckets::Wire;
pub use group::{told, Alone, Group};
#[cfg(feature = "mpi")]
pub use mpi::{MpiGroup, Patience};
#[cfg(feature = "nccl")]
pub use nccl::NcclGroup;
pub use replicas::Replicas;
pub use shards::{share, Shards};
pub use totals::{mean, total};
