//! What a pull-back returns, checked against what it was asked for: a field's own may be wrong.

use candle_core::backprop::GradStore;
use candle_core::{DType, DeviceLocation, Shape, Tensor};

use crate::field::Cotangents;
use crate::step::Field;

/// What is wrong with the cotangents that a pull-back returned.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum PullbackDefect {
    /// Not one cotangent for each tensor of the state.
    #[error("it returned cotangents of {got} state tensors, the state has {expected}")]
    LeafCount {
        /// Tensors in the state.
        expected: usize,
        /// Cotangents returned.
        got: usize,
    },
    /// A cotangent has not the shape of what it belongs to.
    #[error("the cotangent of {of} has shape {got:?} instead of {expected:?}")]
    Shape {
        /// What it belongs to.
        of: Argument,
        /// Shape of that.
        expected: Shape,
        /// Shape of the cotangent.
        got: Shape,
    },
    /// A cotangent of the state has not the dtype that the pull-back was given, or one of time or
    /// of a parameter is not floating-point.
    #[error("the cotangent of {of} is {got:?} instead of {expected:?}")]
    Dtype {
        /// What it belongs to.
        of: Argument,
        /// Dtype of that.
        expected: DType,
        /// Dtype of the cotangent.
        got: DType,
    },
    /// A cotangent lies on another device than what it belongs to.
    #[error("the cotangent of {of} is on {got:?} instead of {expected:?}")]
    Device {
        /// What it belongs to.
        of: Argument,
        /// Device of that.
        expected: DeviceLocation,
        /// Device of the cotangent.
        got: DeviceLocation,
    },
    /// Gradients of tensors that the field's own list does not hold; they would be lost.
    #[error("it inserted gradients of {count} tensors that VectorField::parameters does not list")]
    Unlisted {
        /// Number of such tensors.
        count: usize,
    },
}

/// What f depends on, and has a cotangent of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Argument {
    /// A tensor of the state.
    State(usize),
    /// Time.
    Time,
    /// A parameter, by its position in [`VectorField::parameters`](crate::VectorField::parameters),
    /// or in the order in which the solve met them.
    Parameter(usize),
}

impl std::fmt::Display for Argument {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::State(leaf) => write!(f, "state tensor {leaf}"),
            Self::Time => write!(f, "time"),
            Self::Parameter(index) => write!(f, "parameter {index}"),
        }
    }
}

type Checked = std::result::Result<(), PullbackDefect>;

/// Cotangents of the state are like the seed v, that of time is one number, and those of parameters
/// have their shapes; all lie where these do.
pub(crate) fn check(v: &[Tensor], theta: &[Tensor], pulled: &Cotangents<Vec<Tensor>>) -> Checked {
    if pulled.y.len() != v.len() {
        let (expected, got) = (v.len(), pulled.y.len());
        return Err(PullbackDefect::LeafCount { expected, got });
    }
    for (leaf, (v, w)) in v.iter().zip(&pulled.y).enumerate() {
        let of = Argument::State(leaf);
        same_place(of, v, w)?;
        if w.dtype() != v.dtype() {
            return Err(dtype(of, v.dtype(), w));
        }
    }
    if let (Some(t), Some(v)) = (&pulled.t, v.first()) {
        let (of, expected) = (Argument::Time, Shape::from(()));
        if t.elem_count() != 1 {
            let got = t.shape().clone();
            return Err(PullbackDefect::Shape { of, expected, got });
        }
        same_device(of, v, t)?;
        floating(of, DType::F32, t)?;
    }
    for (index, p) in theta.iter().enumerate() {
        let Some(grad) = pulled.params.get(p) else {
            continue;
        };
        let of = Argument::Parameter(index);
        same_place(of, p, grad)?;
        floating(of, p.dtype(), grad)?;
    }
    Ok(())
}

/// Where the field lists its parameters, gradients of no other tensor are left once theirs have been
/// taken out.  Where it does not, candle may have left those of constants.
pub(crate) fn check_rest(field: &Field<'_>, params: &GradStore) -> Checked {
    match params.get_ids().count() {
        0 => Ok(()),
        _ if field.parameters().is_none() => Ok(()),
        count => Err(PullbackDefect::Unlisted { count }),
    }
}

fn same_place(of: Argument, x: &Tensor, cotangent: &Tensor) -> Checked {
    if x.shape() != cotangent.shape() {
        let (expected, got) = (x.shape().clone(), cotangent.shape().clone());
        return Err(PullbackDefect::Shape { of, expected, got });
    }
    same_device(of, x, cotangent)
}

fn same_device(of: Argument, x: &Tensor, cotangent: &Tensor) -> Checked {
    if x.device().same_device(cotangent.device()) {
        return Ok(());
    }
    let (expected, got) = (x.device().location(), cotangent.device().location());
    Err(PullbackDefect::Device { of, expected, got })
}

fn floating(of: Argument, expected: DType, cotangent: &Tensor) -> Checked {
    match cotangent.dtype() {
        DType::F16 | DType::BF16 | DType::F32 | DType::F64 => Ok(()),
        _ => Err(dtype(of, expected, cotangent)),
    }
}

fn dtype(of: Argument, expected: DType, cotangent: &Tensor) -> PullbackDefect {
    let got = cotangent.dtype();
    PullbackDefect::Dtype { of, expected, got }
}
