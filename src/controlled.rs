//! Fields of controlled differential equations, z' = F(t, z) X'(t).

use candle_core::Tensor;

use crate::error::PathDefect;
use crate::field::{autograd, Bound, Cotangents, FieldWithArgs, LatePullback, Offer, Pullback};
use crate::path::ControlPath;
use crate::precision::at_least_f32;
use crate::time::Time;

/// The matrix field F of a controlled differential equation z' = F(t, z) X'(t).
///
/// Every closure `Fn(&Time, &Tensor) -> candle_core::Result<Tensor>` is one that returns `(rows, hidden, channels)`
/// for z of `(rows, hidden)`.  z arrives in compute dtype, and F must have it.  [`nn::CdeMlp`](crate::nn::CdeMlp) is
/// one with a pull-back written by hand.
#[diagnostic::on_unimplemented(
    message = "`{Self}` is not the field of a controlled differential equation",
    label = "not a controlled field",
    note = "give the types of a closure's arguments: `move |t: &Time, z: &Tensor| …`, which returns (rows, hidden, channels)"
)]
pub trait ControlledField {
    /// F(t, z), `(rows, hidden, channels)`.
    ///
    /// # Errors
    /// Whatever the model's operations return.
    fn matrix(&self, t: &Time, z: &Tensor) -> candle_core::Result<Tensor>;

    /// F(t, z) times a slope `(rows, channels)`, of the dtype of z, with the pull-back to z, to the slope and to the
    /// parameters, for fields that bring their own; `None` (the default) leaves both to candle's autograd over
    /// [`matrix`](Self::matrix).  To be implemented together with [`parameters`](Self::parameters).
    ///
    /// # Errors
    /// As [`matrix`](Self::matrix).
    fn vjp<'f>(
        &'f self,
        t: &Time,
        z: &Tensor,
        slope: &Tensor,
    ) -> candle_core::Result<Option<(Tensor, ControlledPullback<'f>)>> {
        let _ = (t, z, slope);
        Ok(None)
    }

    /// As [`VectorField::vjp_late`](crate::VectorField::vjp_late), for a slope that is constant, of a field that does not
    /// read time.
    #[doc(hidden)]
    fn vjp_late<'f>(
        &'f self,
        _t: &Time,
        _z: &Tensor,
        _slope: &Tensor,
    ) -> candle_core::Result<Option<(Tensor, LatePullback<'f, Tensor>)>> {
        Ok(None)
    }

    /// As [`VectorField::parameters`](crate::VectorField::parameters).
    fn parameters(&self) -> Option<Vec<Tensor>> {
        None
    }

    /// What the field offers to the solver beside evaluations on a path, if it is one of [`nn`](crate::nn).
    #[doc(hidden)]
    fn offer(&self, path: &ControlPath) -> Option<Offer> {
        let _ = path;
        None
    }
}

/// v ↦ vᵀ∂(F X'), as [`Pullback`], and the cotangent of the slope X', `(rows, channels)`.
pub type ControlledPullback<'f> =
    Box<dyn Fn(&Tensor) -> candle_core::Result<(Cotangents<Tensor>, Tensor)> + 'f>;

impl<F> ControlledField for F
where
    F: Fn(&Time, &Tensor) -> candle_core::Result<Tensor>,
{
    fn matrix(&self, t: &Time, z: &Tensor) -> candle_core::Result<Tensor> {
        self(t, z)
    }
}

/// A controlled field as a vector field whose argument is the path.
pub(crate) struct Driven<F>(pub(crate) F);

impl<F: ControlledField> Driven<F> {
    /// The slope of the path, in the dtype of the state, which is checked.
    fn slope(&self, t: &Time, z: &Tensor, path: &ControlPath) -> candle_core::Result<Tensor> {
        if z.rank() != 2 || z.dims()[0] != path.rows() {
            let (rows, got) = (path.rows(), z.shape().clone());
            return Err(crate::Error::from(PathDefect::State { rows, got }).into());
        }
        path.slope(t)?.to_dtype(z.dtype())
    }
}

impl<F: ControlledField> FieldWithArgs<Tensor, ControlPath> for Driven<F> {
    fn velocity(&self, t: &Time, z: &Tensor, path: &ControlPath) -> candle_core::Result<Tensor> {
        let slope = self.slope(t, z, path)?;
        let matrix = self.0.matrix(t, z)?;
        let needs = [z.dims()[0], z.dims()[1], path.channels()];
        if matrix.dims() != needs {
            let got = matrix.shape().clone();
            return Err(crate::Error::from(PathDefect::Matrix { needs, got }).into());
        }
        product(&matrix, &slope)
    }

    fn vjp<'f>(
        &'f self,
        t: &Time,
        z: &Tensor,
        path: &ControlPath,
    ) -> candle_core::Result<(Tensor, Pullback<'f, Tensor>)> {
        let slope = self.slope(t, z, path)?;
        if !slope.track_op() {
            // Nobody asks for the cotangent of the slope.
            if let Some((k, pull)) = self.0.vjp_late(t, z, &slope)? {
                let pull = move |v: &Tensor| {
                    let (y, params) = pull(v)?;
                    let (t, params) = (None, params()?);
                    Ok(Cotangents { y, t, params })
                };
                return Ok((k, Box::new(pull)));
            }
        }
        let Some((k, pull)) = self.0.vjp(t, z, &slope.detach())? else {
            let args = path.clone();
            return autograd::vjp(&Bound { field: self, args }, t, z);
        };
        let of_time = t.leaf().cloned();
        let pull = move |v: &Tensor| {
            let (mut pulled, slope_bar) = pull(v)?;
            if !slope.track_op() {
                return Ok(pulled);
            }
            // On to the coefficients of the path, and to time.
            let mut grads = (&slope * slope_bar.detach())?.sum_all()?.backward()?;
            for leaf in autograd::variables(std::slice::from_ref(&slope)) {
                let Some(grad) = grads.remove(&leaf) else {
                    continue;
                };
                match of_time.as_ref().is_some_and(|t| t.id() == leaf.id()) {
                    false => {
                        pulled.params.insert(&leaf, grad.detach());
                    }
                    true => {
                        let grad = grad.detach();
                        pulled.t = Some(match pulled.t.take() {
                            Some(t) => (t.to_dtype(grad.dtype())? + grad)?,
                            None => grad,
                        });
                    }
                }
            }
            Ok(pulled)
        };
        Ok((k, Box::new(pull)))
    }

    fn vjp_late<'f>(
        &'f self,
        t: &Time,
        z: &Tensor,
        path: &ControlPath,
    ) -> candle_core::Result<Option<(Tensor, LatePullback<'f, Tensor>)>> {
        let slope = self.slope(t, z, path)?;
        match slope.track_op() {
            true => Ok(None),
            false => self.0.vjp_late(t, z, &slope),
        }
    }

    fn parameters(&self) -> Option<Vec<Tensor>> {
        self.0.parameters()
    }

    fn offer_given(&self, path: &ControlPath) -> Option<Offer> {
        self.0.offer(path)
    }
}

/// `(rows, hidden, channels)` times `(rows, channels)`; summed in f32 where the tensors are narrower.
pub(crate) fn product(matrix: &Tensor, slope: &Tensor) -> candle_core::Result<Tensor> {
    let dtype = matrix.dtype();
    let wide = at_least_f32(dtype);
    let slope = slope.to_dtype(wide)?.unsqueeze(1)?;
    let terms = matrix.to_dtype(wide)?.broadcast_mul(&slope)?;
    terms.sum(2)?.to_dtype(dtype)
}
