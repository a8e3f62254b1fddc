//! Evaluations of a field with one parameter at another value.

use candle_core::{Tensor, Var};

use crate::field::{Field, OwnedField};
use crate::time::Time;

/// Evaluates a field with one parameter at another value.
pub(crate) trait Mover {
    /// Whether this parameter can be moved.
    fn moves(&self, parameter: &Tensor) -> bool;

    /// The velocity with a parameter that can be moved at this value.
    fn velocity(
        &self,
        parameter: &Tensor,
        value: &Tensor,
        t: &Time,
        y: &[Tensor],
    ) -> candle_core::Result<Vec<Tensor>>;
}

/// Variables are written, and restored: of those that the field reads these, or all of them.
pub(crate) struct Written<'a> {
    pub(crate) field: &'a Field<'a>,
    pub(crate) only: Option<&'a [Tensor]>,
}

impl Mover for Written<'_> {
    fn moves(&self, parameter: &Tensor) -> bool {
        let listed = |these: &[Tensor]| these.iter().any(|p| p.id() == parameter.id());
        parameter.is_variable() && parameter.is_contiguous() && self.only.is_none_or(listed)
    }

    fn velocity(
        &self,
        parameter: &Tensor,
        value: &Tensor,
        t: &Time,
        y: &[Tensor],
    ) -> candle_core::Result<Vec<Tensor>> {
        let restored = Restored {
            var: Var::from_tensor(parameter)?,
            before: parameter.detach().copy()?,
        };
        restored.var.set(value)?;
        let k = self.field.velocity(t, &y.to_vec());
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
    ) -> candle_core::Result<Vec<Tensor>> {
        let moved = self
            .parameters
            .iter()
            .map(|p| match p.id() == parameter.id() {
                true => value.clone(),
                false => p.detach(),
            });
        let field = (self.build)(&moved.collect::<Vec<_>>())?;
        field.velocity(t, &y.to_vec())
    }
}
