//! What a pull-back returns, checked against what it was asked for: a field's own may be wrong.

use candle_core::backprop::GradStore;
use candle_core::{DType, Shape, Tensor};

use crate::error::{Argument, Error, PullbackDefect, Result};
use crate::field::{Cotangents, Field};

/// As many tensors, of the same shapes, dtypes and device.
pub(crate) fn alike(y: &[Tensor], k: &[Tensor]) -> Result<()> {
    if y.len() != k.len() {
        return Err(Error::LeafCount {
            expected: y.len(),
            got: k.len(),
        });
    }
    for (leaf, (y, k)) in y.iter().zip(k).enumerate() {
        if y.shape() != k.shape() {
            return Err(Error::ShapeChanged {
                leaf,
                expected: y.shape().clone(),
                got: k.shape().clone(),
            });
        }
        if y.dtype() != k.dtype() {
            return Err(Error::DtypeChanged {
                leaf,
                expected: y.dtype(),
                got: k.dtype(),
            });
        }
        if !y.device().same_device(k.device()) {
            return Err(Error::DeviceMismatch {
                what: format!("what the field returned for state tensor {leaf}"),
                expected: y.device().location(),
                got: k.device().location(),
            });
        }
    }
    Ok(())
}

type Found = std::result::Result<(), PullbackDefect>;

/// Cotangents of the state are like the seed v, that of time is one number, and those of parameters
/// have their shapes; all lie where these do.
pub(crate) fn check(v: &[Tensor], theta: &[Tensor], pulled: &Cotangents<Vec<Tensor>>) -> Found {
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
    check_parameters(theta, &pulled.params)
}

/// Cotangents of parameters have their shapes and lie where these do.
pub(crate) fn check_parameters(theta: &[Tensor], params: &GradStore) -> Found {
    for (index, p) in theta.iter().enumerate() {
        let Some(grad) = params.get(p) else {
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
pub(crate) fn check_rest(field: &Field<'_>, params: &GradStore) -> Found {
    match params.get_ids().count() {
        0 => Ok(()),
        _ if field.parameters().is_none() => Ok(()),
        count => Err(PullbackDefect::Unlisted { count }),
    }
}

fn same_place(of: Argument, x: &Tensor, cotangent: &Tensor) -> Found {
    if x.shape() != cotangent.shape() {
        let (expected, got) = (x.shape().clone(), cotangent.shape().clone());
        return Err(PullbackDefect::Shape { of, expected, got });
    }
    same_device(of, x, cotangent)
}

fn same_device(of: Argument, x: &Tensor, cotangent: &Tensor) -> Found {
    if x.device().same_device(cotangent.device()) {
        return Ok(());
    }
    let (expected, got) = (x.device().location(), cotangent.device().location());
    Err(PullbackDefect::Device { of, expected, got })
}

fn floating(of: Argument, expected: DType, cotangent: &Tensor) -> Found {
    match cotangent.dtype() {
        DType::F16 | DType::BF16 | DType::F32 | DType::F64 => Ok(()),
        _ => Err(dtype(of, expected, cotangent)),
    }
}

fn dtype(of: Argument, expected: DType, cotangent: &Tensor) -> PullbackDefect {
    let got = cotangent.dtype();
    PullbackDefect::Dtype { of, expected, got }
}
