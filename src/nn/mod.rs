//! Vector fields that are ordinary candle modules, built from a `VarBuilder` with the names and
//! shapes of `candle_nn`.
//!
//! [`Mlp`], [`Cnf`] and [`ConvField`] have pull-backs written by hand, and the solver integrates them
//! tile by tile on the CPU.  [`HyperCnf`], [`Hutchinson`] and [`OtFlow`] carry a log-density beside
//! the state, as `Cnf` does, and run in candle's operations.

mod activation;
mod cnf;
mod conv;
#[cfg(feature = "cuda")]
pub(crate) mod cuda;
mod elementwise;
mod hutchinson;
mod hyper;
mod linear;
mod mlp;
mod ot_flow;
mod spread;
mod weights;

pub use activation::Activation;
pub use cnf::Cnf;
pub use conv::ConvField;
pub use hutchinson::{Hutchinson, Jvp, Probe};
pub use hyper::HyperCnf;
pub use linear::Linear;
pub use mlp::Mlp;
pub use ot_flow::OtFlow;

use std::any::Any;
use std::sync::Arc;

use candle_core::backprop::GradStore;
use candle_core::Tensor;

use crate::field::{Leaves, VectorField};
use crate::odeint::SharedField;
use crate::rows::Rows;
use crate::state::State;

/// A field of ours as one that can be integrated tile by tile.
pub(crate) fn rows_of(field: &dyn Any) -> Option<Rows<'_>> {
    let mlp = field.downcast_ref::<Mlp>().map(Rows::new);
    let conv = field.downcast_ref::<ConvField>();
    let conv = conv.filter(|conv| conv.has_tiles()).map(Rows::new);
    let cnf = field.downcast_ref::<Cnf>();
    let cnf = cnf.filter(|cnf| cnf.has_tiles()).map(Rows::new);
    mlp.or(conv).or(cnf)
}

/// A field of ours as one that other threads may use.
pub(crate) fn shared(field: &dyn Any) -> Option<SharedField> {
    fn share<S: State, F: VectorField<S> + Clone + Send + Sync + 'static>(field: &F) -> SharedField
    where
        S: 'static,
    {
        Arc::new(Leaves::<Box<F>, S>::new(Box::new(field.clone())))
    }
    let mlp = field.downcast_ref::<Mlp>().map(share::<Tensor, _>);
    let conv = field.downcast_ref::<ConvField>().map(share::<Tensor, _>);
    let cnf = field.downcast_ref::<Cnf>();
    mlp.or(conv).or(cnf.map(share::<(Tensor, Tensor), _>))
}

/// The vector field that a module of ours is.
pub(crate) fn field_of(module: &dyn Any) -> Option<&dyn VectorField<Tensor>> {
    let mlp = module.downcast_ref::<Mlp>();
    let conv = module.downcast_ref::<ConvField>();
    mlp.map(|mlp| mlp as &dyn VectorField<Tensor>)
        .or(conv.map(|conv| conv as &dyn VectorField<Tensor>))
}

/// Adds to the gradient of a parameter, which layers may share.
fn add_gradient(params: &mut GradStore, p: &Tensor, gradient: Tensor) -> candle_core::Result<()> {
    let sum = match params.remove(p) {
        Some(before) => (before + gradient)?,
        None => gradient,
    };
    params.insert(p, sum);
    Ok(())
}
