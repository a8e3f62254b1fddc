//! Tolerances: numbers, by tensor of the state, or by element.

use candle_core::{DType, Device, Shape, Tensor};

use crate::error::{AdaptiveDefect, Error, Result};

/// A relative or an absolute tolerance.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum Tolerance {
    /// For all elements.
    All(f64),
    /// One for each tensor of the state.
    ByLeaf(Vec<f64>),
    /// One tensor for each tensor of the state, which broadcasts to it.
    ByElement(Vec<Tensor>),
}

impl From<f64> for Tolerance {
    fn from(tolerance: f64) -> Self {
        Self::All(tolerance)
    }
}

impl From<Vec<f64>> for Tolerance {
    fn from(tolerances: Vec<f64>) -> Self {
        Self::ByLeaf(tolerances)
    }
}

impl<const N: usize> From<[f64; N]> for Tolerance {
    fn from(tolerances: [f64; N]) -> Self {
        Self::ByLeaf(tolerances.into())
    }
}

impl From<Tensor> for Tolerance {
    fn from(tolerance: Tensor) -> Self {
        Self::ByElement(vec![tolerance])
    }
}

impl From<Vec<Tensor>> for Tolerance {
    fn from(tolerances: Vec<Tensor>) -> Self {
        Self::ByElement(tolerances)
    }
}

/// A tolerance of one tensor of the state.
#[derive(Clone, Debug)]
pub(crate) enum OfLeaf {
    Number(f64),
    /// Of the tensor's shape.
    Elements(Tensor),
}

impl Tolerance {
    /// The least number of it.
    pub(crate) fn least(&self) -> Result<f64> {
        let least = |all: &[f64]| all.iter().copied().fold(f64::INFINITY, f64::min);
        Ok(match self {
            Self::All(value) => *value,
            Self::ByLeaf(values) => least(values),
            Self::ByElement(tensors) => {
                let of = |x: &Tensor| {
                    let numbers = x.detach().to_dtype(DType::F64)?.flatten_all()?.to_vec1()?;
                    Ok::<_, Error>(least(&numbers))
                };
                let each = tensors.iter().map(of).collect::<Result<Vec<_>>>()?;
                least(&each)
            }
        })
    }

    /// By tensor of a state of these shapes.
    pub(crate) fn by_leaf(
        &self,
        which: &'static str,
        shapes: &[Shape],
        state: DType,
        device: &Device,
    ) -> Result<Vec<OfLeaf>> {
        let count = |got: usize| match got == shapes.len() {
            true => Ok(()),
            false => Err(Error::Adaptive(AdaptiveDefect::ToleranceCount {
                which,
                leaves: shapes.len(),
                got,
            })),
        };
        let valid = |value: f64| match value >= 0.0 && value.is_finite() {
            true => Ok(()),
            false => Err(Error::Adaptive(AdaptiveDefect::Tolerance { which, value })),
        };
        match self {
            Self::All(value) => {
                valid(*value)?;
                Ok(shapes.iter().map(|_| OfLeaf::Number(*value)).collect())
            }
            Self::ByLeaf(values) => {
                count(values.len())?;
                values.iter().try_for_each(|value| valid(*value))?;
                Ok(values.iter().copied().map(OfLeaf::Number).collect())
            }
            Self::ByElement(tensors) => {
                count(tensors.len())?;
                let leaf = |(x, shape): (&Tensor, &Shape)| {
                    let numbers = x.detach().to_dtype(DType::F64)?.flatten_all()?.to_vec1()?;
                    numbers.into_iter().try_for_each(valid)?;
                    let x = x.detach().to_device(device)?.to_dtype(state)?;
                    Ok(OfLeaf::Elements(x.broadcast_as(shape)?.contiguous()?))
                };
                tensors.iter().zip(shapes).map(leaf).collect()
            }
        }
    }
}

impl OfLeaf {
    /// Whether it is nowhere above zero.
    pub(crate) fn is_zero(&self) -> Result<bool> {
        Ok(match self {
            Self::Number(value) => *value == 0.0,
            Self::Elements(x) if x.elem_count() == 0 => false,
            Self::Elements(x) => {
                x.flatten_all()?
                    .max(0)?
                    .to_dtype(DType::F64)?
                    .to_scalar::<f64>()?
                    == 0.0
            }
        })
    }
}

/// An error relative to its tolerance: an error of zero needs none, and one that is NaN is larger than all.
pub(crate) fn ratio(error: f64, tolerance: f64) -> f64 {
    match error.abs() / tolerance {
        _ if error == 0.0 => 0.0,
        ratio if ratio.is_nan() => f64::INFINITY,
        ratio => ratio,
    }
}
