//! Evaluations of a field with one parameter at another value.

use candle_core::{Tensor, Var};

use crate::field::{Field, OwnedField};
use crate::time::Time;

/// Evaluates a field with one parameter at another value.
pub(crate) trait Mover {
    /// Whether this parameter can be moved.
    fn moves(&self, parameter: &Tensor) -> bool;

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
    fn moves(&self, _: &Tensor) -> bool {
        false
    }

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
    fn moves(&self, parameter: &Tensor) -> bool {
        parameter.is_variable() && parameter.is_contiguous()
    }

    fn velocity(
        &self,
        parameter: &Tensor,
        value: &Tensor,
        t: &Time,
        y: &[Tensor],
    ) -> candle_core::Result<Option<Vec<Tensor>>> {
        if !self.moves(parameter) {
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

/// Of what a closure reads, only copies of our own are moved: the user's variables are never written.
pub(crate) struct OwnCopies<'a> {
    pub(crate) field: &'a Field<'a>,
    pub(crate) own: &'a [Tensor],
}

impl Mover for OwnCopies<'_> {
    fn moves(&self, parameter: &Tensor) -> bool {
        self.own.iter().any(|p| p.id() == parameter.id())
    }

    fn velocity(
        &self,
        parameter: &Tensor,
        value: &Tensor,
        t: &Time,
        y: &[Tensor],
    ) -> candle_core::Result<Option<Vec<Tensor>>> {
        match self.moves(parameter) {
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
    fn moves(&self, _: &Tensor) -> bool {
        true
    }

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
