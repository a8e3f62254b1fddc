//! Layers over the nodes of a graph, and the sparse matrices that join them.
//!
//! A row of a state is a node here, and nodes read their neighbours: a field of [`Gcn`] layers is a *graph neural ODE*
//! ("Graph Neural Ordinary Differential Equations", arXiv 1911.07532).  [`GcnField`] is one with a pull-back written by hand.
//! Dropout inside such a field must be the same at
//! every evaluation of a solve: [`dropout_mask`](super::dropout_mask) draws a mask once, and the solve is given it as an
//! argument.
//!
//! ```
//! use candle_core::{DType, Device, Module, Tensor};
//! use candle_diffeq::nn::graph::{Csr, Gcn};
//! use candle_diffeq::nn::{dropout_mask, Activation};
//! use candle_diffeq::{NeuralOde, Time};
//! let (vars, device) = (candle_nn::VarMap::new(), Device::Cpu);
//! let ring = Csr::normalised_adjacency(5, &[[0, 1], [1, 2], [2, 3], [3, 4], [4, 0]], DType::F32, &device)?;
//! let ode = NeuralOde::with_args(&vars, "f", DType::F32, &device, move |vb| {
//!     let layers = [Gcn::new(8, 8, &ring, vb.pp(0))?, Gcn::new(8, 8, &ring, vb.pp(1))?];
//!     Ok(move |_: &Time, y: &Tensor, mask: &Tensor| {
//!         layers[1].forward(&(Activation::Softplus.forward(&layers[0].forward(y)?)? * mask)?)
//!     })
//! })?;
//! let mask = dropout_mask((5, 8), 0.5, 0, DType::F32, &device)?;
//! let ys = ode.given(&mask).solve(&Tensor::ones((5, 8), DType::F32, &device)?, &[0.0, 0.5, 1.0])?;
//! assert_eq!(ys.dims(), [3, 5, 8]);
//! # Ok::<(), candle_diffeq::Error>(())
//! ```

mod csr;
#[cfg(feature = "cuda")]
mod device;
mod field;
mod fused;
mod gcn;
mod pattern;
mod pool;
mod product;

pub use csr::Csr;
pub use field::GcnField;
pub use gcn::Gcn;
