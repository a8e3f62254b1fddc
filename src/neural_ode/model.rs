//! The model of a neural ODE: its constructor, and the variables that this asks for.

use std::sync::{Arc, Mutex, PoisonError};

use candle_core::{DType, Device, Module, Shape, Tensor};
use candle_nn::var_builder::SimpleBackend;
use candle_nn::{Init, VarBuilder, VarMap};

#[cfg(feature = "cuda")]
use crate::field::OnDevice;
use crate::field::{autograd, KeptVjp, LatePullback, Offer, OwnedField, Pullback, VectorField};
use crate::nn;
use crate::time::Time;

/// Builds the model, and hands it its arguments; without them it is only built.
pub(super) type Factory = dyn Fn(VarBuilder<'_>, Option<Vec<Tensor>>) -> candle_core::Result<Option<OwnedField>>
    + Send
    + Sync;

/// Builds the model over given values of its parameters and arguments, in any thread.
pub(super) struct Builder {
    pub(super) factory: Arc<Factory>,
    pub(super) names: Vec<String>,
    pub(super) dtype: DType,
    pub(super) device: Device,
}

impl Builder {
    pub(super) fn build(
        &self,
        parameters: &[Tensor],
        args: &[Tensor],
    ) -> candle_core::Result<OwnedField> {
        let named = self.names.iter().cloned().zip(parameters.iter().cloned());
        let vb = VarBuilder::from_tensors(named.collect(), self.dtype, &self.device);
        match (self.factory)(vb, Some(args.to_vec()))? {
            Some(field) => Ok(field),
            None => candle_core::bail!("a model was built without its arguments"),
        }
    }
}

/// A module as a field: as [`Autonomous`](crate::fields::Autonomous), but for our own, which bring their
/// pull-backs.
pub(super) struct OfModule<M>(pub(super) M);

impl<M: Module + 'static> OfModule<M> {
    fn ours(&self) -> Option<&dyn VectorField<Tensor>> {
        nn::field_of(&self.0)
    }
}

impl<M: Module + 'static> VectorField<Tensor> for OfModule<M> {
    fn velocity(&self, t: &Time, y: &Tensor) -> candle_core::Result<Tensor> {
        match self.ours() {
            Some(field) => field.velocity(t, y),
            None => self.0.forward(y),
        }
    }

    fn vjp<'f>(
        &'f self,
        t: &Time,
        y: &Tensor,
    ) -> candle_core::Result<(Tensor, Pullback<'f, Tensor>)> {
        match self.ours() {
            Some(field) => field.vjp(t, y),
            None => autograd::vjp(self, t, y),
        }
    }

    fn vjp_late<'f>(
        &'f self,
        t: &Time,
        y: &Tensor,
    ) -> candle_core::Result<Option<(Tensor, LatePullback<'f, Tensor>)>> {
        match self.ours() {
            Some(field) => field.vjp_late(t, y),
            None => Ok(None),
        }
    }

    fn vjp_kept(&self, t: &Time, y: &Tensor) -> candle_core::Result<Option<KeptVjp>> {
        match self.ours() {
            Some(field) => field.vjp_kept(t, y),
            None => Ok(None),
        }
    }

    fn is_traced(&self) -> bool {
        self.ours().is_none_or(|field| field.is_traced())
    }

    fn parameters(&self) -> Option<Vec<Tensor>> {
        self.ours()?.parameters()
    }

    fn offer(&self) -> Option<Offer> {
        self.ours()?.offer()
    }

    #[cfg(feature = "cuda")]
    fn on_device(&self) -> Option<&dyn OnDevice> {
        self.ours()?.on_device()
    }

    fn jumps(&self) -> Vec<f64> {
        self.ours().map_or_else(Vec::new, |field| field.jumps())
    }
}

/// Removes the variables that a constructor has created, unless it succeeds: not if it fails, and not if it
/// panics.
pub(super) struct Undo {
    pub(super) vars: VarMap,
    pub(super) asked: Arc<Mutex<Asked>>,
}

impl Undo {
    /// It succeeded: the names that it asked for.
    pub(super) fn keep(&mut self) -> Vec<String> {
        let mut asked = self.asked.lock().unwrap_or_else(PoisonError::into_inner);
        std::mem::take(&mut *asked).names
    }
}

impl Drop for Undo {
    fn drop(&mut self) {
        let asked = self.asked.lock().unwrap_or_else(PoisonError::into_inner);
        if asked.created.is_empty() {
            return;
        }
        let mut data = self
            .vars
            .data()
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        data.retain(|name, _| !asked.created.contains(name));
    }
}

/// A `VarMap` that notes the names it is asked for.
pub(super) struct Recording {
    pub(super) vars: VarMap,
    pub(super) asked: Arc<Mutex<Asked>>,
}

/// What a constructor asked for.
#[derive(Default)]
pub(super) struct Asked {
    /// Every name once, in order.
    names: Vec<String>,
    /// Those that were not there before.
    created: Vec<String>,
}

impl Recording {
    fn note(&self, name: &str, created: bool) {
        let mut asked = self.asked.lock().unwrap_or_else(PoisonError::into_inner);
        if !asked.names.iter().any(|n| n == name) {
            asked.names.push(name.to_owned());
        }
        if created {
            asked.created.push(name.to_owned());
        }
    }
}

impl SimpleBackend for Recording {
    fn get(
        &self,
        shape: Shape,
        name: &str,
        init: Init,
        dtype: DType,
        device: &Device,
    ) -> candle_core::Result<Tensor> {
        let created = !self.vars.contains_tensor(name);
        let tensor = SimpleBackend::get(&self.vars, shape, name, init, dtype, device)?;
        self.note(name, created);
        Ok(tensor)
    }

    fn get_unchecked(
        &self,
        name: &str,
        dtype: DType,
        device: &Device,
    ) -> candle_core::Result<Tensor> {
        let tensor = SimpleBackend::get_unchecked(&self.vars, name, dtype, device)?;
        self.note(name, false);
        Ok(tensor)
    }

    fn contains_tensor(&self, name: &str) -> bool {
        self.vars.contains_tensor(name)
    }
}
