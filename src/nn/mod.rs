//! Fields and layers, built from a `VarBuilder` with the names and shapes of `candle_nn`.
//!
//! [`Mlp`], [`Cnf`] and [`ConvField`] have pull-backs written by hand, and the solver integrates them
//! tile by tile on the CPU.  [`OtFlow`], [`Hutchinson`] of an `Mlp` and [`HyperCnf`] (with fixed steps) are integrated tile by
//! tile, too; they carry a log-density beside the state, as `Cnf` does.
//!
//! [`EnergyMlp`] is a potential, and [`energy`] has the fields that are built from its gradient: Hamiltonian and
//! Lagrangian systems, flows along a gradient, and flows orthogonal to it.  [`energy::Hamiltonian`] and
//! [`energy::GradientFlow`] of an `EnergyMlp` that has hidden layers, none of them residual, are integrated tile by
//! tile, too.  [`Perceptron`] is a network with its derivatives as values.
//!
//! [`HigherOrder`] gives fields of second and higher order.  [`DataControl`] and [`depth_cat`] give fields that read
//! their data or time, and the weights of a [`GalerkinLinear`] depend on time.  [`Augmenter`] gives the state more
//! dimensions, and [`WithIntegral`] integrates a cost along the solution.
//!
//! [`graph`] has layers over the nodes of a graph, and [`GruField`] is a gated recurrent unit in continuous time.
//!
//! [`CdeMlp`] is the field of a [neural CDE](crate::cde), integrated tile by tile, too.  [`ConstantField`], which
//! is also integrated tile by tile, can be the diffusion of additive noise.
//!
//! [`RowSpeed`] and [`Relaxation`] are built around another field, and are integrated tile by tile if that field is.
//!
//! [`Linear`], [`Activation`], [`Conv1d`], [`LayerNorm`], [`RmsNorm`] and [`softmax`] are layers for any model.  Use
//! them in place of candle's layers, some of which have no pull-back, a wrong one, or a slow one.
//! `docs/candle-layers.md` lists which of candle's layers have no pull-back or a wrong one.
//!
//! [`RowLoss`] is a loss that is a mean over rows.  A solve can compute it together with its gradients
//! ([`NeuralOde::loss`](crate::NeuralOde::loss)).

mod activation;
mod augmenter;
mod cde_mlp;
mod cnf;
mod conditional;
mod constant_field;
mod conv;
mod conv1d;
#[cfg(feature = "cuda")]
pub(crate) mod cuda;
mod curves;
mod depth;
mod dropout;
mod elementwise;
pub mod energy;
mod galerkin;
pub mod graph;
mod gru;
mod higher_order;
mod hutchinson;
mod hyper;
mod integral;
mod linear;
mod mlp;
mod norm;
mod ot_flow;
mod perceptron;
mod relaxation;
mod row_speed;
mod spread;
mod tangents;
mod weights;

pub use activation::Activation;
pub use augmenter::{Augmenter, Zeros};
pub use cde_mlp::CdeMlp;
pub use cnf::Cnf;
pub use conditional::ConditionalMlp;
pub use constant_field::ConstantField;
pub use conv::ConvField;
pub use conv1d::{conv1d, conv1d_no_bias, Conv1d};
pub use depth::{depth_cat, DataControl};
pub use dropout::dropout_mask;
pub use energy::mlp::EnergyMlp;
pub use galerkin::{Basis, Galerkin, GalerkinLinear};
pub use gru::GruField;
pub use higher_order::HigherOrder;
pub use hutchinson::{Hutchinson, Jvp, Probe};
pub use hyper::HyperCnf;
pub use integral::{cost_precision, WithIntegral};
pub use linear::Linear;
pub use mlp::Mlp;
pub use norm::{
    layer_norm, layer_norm_no_bias, rms_norm, softmax, softmax_last_dim, LayerNorm, RmsNorm,
};
pub use ot_flow::OtFlow;
pub use perceptron::Perceptron;
pub use relaxation::Relaxation;
pub use row_speed::{RowSpeed, WithSpeed};

pub use crate::loss::RowLoss;

use std::any::Any;

use candle_core::backprop::GradStore;
use candle_core::{DType, Tensor};

use crate::error::Error;
use crate::field::VectorField;

/// The vector field that a module of ours is: candle's trait of modules cannot say so itself.
pub(crate) fn field_of(module: &dyn Any) -> Option<&dyn VectorField<Tensor>> {
    let mlp = module.downcast_ref::<Mlp>();
    let conv = module.downcast_ref::<ConvField>();
    mlp.map(|mlp| mlp as &dyn VectorField<Tensor>)
        .or(conv.map(|conv| conv as &dyn VectorField<Tensor>))
}

/// That a field was given a state of other shapes than it `needs`.
fn wrong_state(field: String, needs: String, got: &[&Tensor]) -> candle_core::Error {
    let got = got.iter().map(|y| y.shape().clone()).collect();
    Error::FieldState { field, needs, got }.into()
}

/// The dtype in which coefficients of time are formed, before they are rounded to that of the field:
/// of both the wider one, f32 at least.
fn coefficients(t: &Tensor, field: DType) -> DType {
    match [t.dtype(), field].contains(&DType::F64) {
        true => DType::F64,
        false => DType::F32,
    }
}

/// The tensors of layers that exist, checked: as many dimensions as they need, and one dtype on one
/// device for all.
struct Checked<'a> {
    /// The constructor that was given them.
    by: &'static str,
    /// The first tensor.
    first: Option<&'a Tensor>,
}

impl<'a> Checked<'a> {
    fn new(by: &'static str) -> Self {
        Self { by, first: None }
    }

    /// The weight of layer l, expected to be of this rank, described as `expected`.
    fn weight(
        &mut self,
        l: usize,
        x: &'a Tensor,
        rank: usize,
        expected: &'static str,
    ) -> candle_core::Result<()> {
        self.see((l, "weight"), x, x.rank() == rank, &|| expected.into())
    }

    /// The bias of layer l, of so many outputs.
    fn bias(&mut self, l: usize, x: &'a Tensor, outputs: usize) -> candle_core::Result<()> {
        let fits = x.dims() == [outputs];
        self.see((l, "bias"), x, fits, &|| {
            format!("[{outputs}], a number for each output")
        })
    }

    /// Tensor `what` of layer l, which fits or is expected to be what `expected` says.
    fn see(
        &mut self,
        (l, what): (usize, &'static str),
        x: &'a Tensor,
        fits: bool,
        expected: &dyn Fn() -> String,
    ) -> candle_core::Result<()> {
        let wrong = |expected: String, got: String| {
            let layer = format!("{}, layer {l}", self.by);
            Error::LayerTensor {
                layer,
                tensor: what,
                expected,
                got,
            }
        };
        if !fits {
            return Err(wrong(expected(), format!("{:?}", x.dims())).into());
        }
        let Some(first) = self.first else {
            if !x.dtype().is_float() {
                return Err(wrong("of a float dtype".into(), format!("{:?}", x.dtype())).into());
            }
            self.first = Some(x);
            return Ok(());
        };
        let place = |x: &Tensor| format!("{:?} on {:?}", x.dtype(), x.device().location());
        if x.dtype() != first.dtype() || !x.device().same_device(first.device()) {
            let expected = format!("{}, as the first layer's weight", place(first));
            return Err(wrong(expected, place(x)).into());
        }
        Ok(())
    }
}

/// Adds to the gradient of a parameter, which layers may share.
fn add_gradient(params: &mut GradStore, p: &Tensor, gradient: Tensor) -> candle_core::Result<()> {
    let sum = match params.remove(p) {
        // Where one is wider, it is f32.
        Some(before) if before.dtype() != gradient.dtype() => {
            (before.to_dtype(DType::F32)? + gradient.to_dtype(DType::F32)?)?
        }
        Some(before) => (before + gradient)?,
        None => gradient,
    };
    params.insert(p, sum);
    Ok(())
}
