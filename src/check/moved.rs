//! Evaluations of a field with one parameter at another value.

use candle_core::{Tensor, Var};

use crate::field::OwnedField;
use crate::step::Field;
use crate::time::Time;

/// Evaluates a field with one parameter at another value.
pub(crate) trait Mover {
    /// The velocity, or `None` where this parameter cannot be moved.
    fn velocity(
        &self,
        parameter: &Tensor,
        value: &Tensor,
        t: &Time,
        y: &[Tensor],
    ) -> candle_core::Result<Option<Vec<Tensor>>>;
}

/// Parameters stay where they are.
pub(crate) struct Unmoved;

impl Mover for Unmoved {
    fn velocity(
        &self,
        _: &Tensor,
        _: &Tensor,
        _: &Time,
        _: &[Tensor],
    ) -> candle_core::Result<Option<Vec<Tensor>>> {
        Ok(None)
    }
}

/// Variables are written, and restored.
pub(crate) struct Written<'a> {
    pub(crate) field: &'a Field<'a>,
}

impl Mover for Written<'_> {
    fn velocity(
        &self,
        parameter: &Tensor,
        value: &Tensor,
        t: &Time,
        y: &[Tensor],
    ) -> candle_core::Result<Option<Vec<Tensor>>> {
        if !parameter.is_variable() || !parameter.is_contiguous() {
            return Ok(None);
        }
        let restored = Restored {
            var: Var::from_tensor(parameter)?,
            before: parameter.detach().copy()?,
        };
        restored.var.set(value)?;
        let k = self.field.velocity(t, &y.to_vec()).map(Some);
        drop(restored);
        k
    }
}

/// Writes back what a variable held.
struct Restored {
    var: Var,
    before: Tensor,
}

impl Drop for Restored {
    fn drop(&mut self) {
        // It was written a moment ago, by the same call, with a tensor of the same shape and dtype.
        let _ = self.var.set(&self.before);
    }
}

/// Of a closure's parameters, those that the check may write without being asked: copies of our own, and the
/// filters of convolutions over one dimension, of which candle's gradient is wrong on the CPU.
pub(crate) struct Private<'a> {
    pub(crate) field: &'a Field<'a>,
    /// Copies that nobody else reads.
    pub(crate) own: &'a [Tensor],
}

impl Mover for Private<'_> {
    fn velocity(
        &self,
        parameter: &Tensor,
        value: &Tensor,
        t: &Time,
        y: &[Tensor],
    ) -> candle_core::Result<Option<Vec<Tensor>>> {
        let own = self.own.iter().any(|p| p.id() == parameter.id());
        // Solves that run side by side on a pool's threads may share variables.
        let filter = parameter.rank() == 3 && rayon::current_thread_index().is_none();
        match own || filter {
            true => Written { field: self.field }.velocity(parameter, value, t, y),
            false => Ok(None),
        }
    }
}

/// A model is built anew over other values of its parameters.
pub(crate) struct Rebuilt<'a> {
    pub(crate) parameters: &'a [Tensor],
    pub(crate) build: &'a dyn Fn(&[Tensor]) -> candle_core::Result<OwnedField>,
}

impl Mover for Rebuilt<'_> {
    fn velocity(
        &self,
        parameter: &Tensor,
        value: &Tensor,
        t: &Time,
        y: &[Tensor],
    ) -> candle_core::Result<Option<Vec<Tensor>>> {
        let moved = self
            .parameters
            .iter()
            .map(|p| match p.id() == parameter.id() {
                true => value.clone(),
                false => p.detach(),
            });
        let field = (self.build)(&moved.collect::<Vec<_>>())?;
        field.velocity(t, &y.to_vec()).map(Some)
    }
}
