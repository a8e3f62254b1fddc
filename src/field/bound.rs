//! Fields as the solver holds them: with their arguments bound, over lists of tensors.

use std::rc::Rc;

use candle_core::Tensor;

#[cfg(feature = "cuda")]
use super::OnDevice;
use super::{
    Cotangents, FieldWithArgs, KeptPullback, KeptVjp, LateGradients, LatePullback, Offer, Pullback,
    VectorField,
};
use crate::state::State;
use crate::time::Time;

/// A field without arguments among those that have some.
pub(crate) struct Free<F>(pub(crate) F);

impl<S: State, F: VectorField<S>> FieldWithArgs<S, ()> for Free<F> {
    fn velocity(&self, t: &Time, y: &S, (): &()) -> candle_core::Result<S> {
        self.0.velocity(t, y)
    }

    fn vjp<'f>(&'f self, t: &Time, y: &S, (): &()) -> candle_core::Result<(S, Pullback<'f, S>)> {
        self.0.vjp(t, y)
    }

    fn vjp_late<'f>(
        &'f self,
        t: &Time,
        y: &S,
        (): &(),
    ) -> candle_core::Result<Option<(S, LatePullback<'f, S>)>> {
        self.0.vjp_late(t, y)
    }

    fn is_traced(&self) -> bool {
        self.0.is_traced()
    }

    fn vjp_kept(&self, t: &Time, y: &S, (): &()) -> candle_core::Result<Option<KeptVjp>> {
        self.0.vjp_kept(t, y)
    }

    fn parameters(&self) -> Option<Vec<Tensor>> {
        self.0.parameters()
    }

    fn offer(&self) -> Option<Offer> {
        self.0.offer()
    }

    #[cfg(feature = "cuda")]
    fn on_device(&self) -> Option<&dyn OnDevice> {
        self.0.on_device()
    }

    fn jumps(&self) -> Vec<f64> {
        self.0.jumps()
    }

    fn is_constant_in(&self, leaf: usize) -> bool {
        self.0.is_constant_in(leaf)
    }
}

/// A field with the arguments of one solve.
pub(crate) struct Bound<P, A> {
    pub(crate) field: P,
    pub(crate) args: A,
}

impl<S, A, P> VectorField<S> for Bound<P, A>
where
    S: State,
    A: State,
    P: std::ops::Deref<Target: FieldWithArgs<S, A>>,
{
    fn velocity(&self, t: &Time, y: &S) -> candle_core::Result<S> {
        self.field.velocity(t, y, &self.args)
    }

    fn vjp<'f>(&'f self, t: &Time, y: &S) -> candle_core::Result<(S, Pullback<'f, S>)> {
        self.field.vjp(t, y, &self.args)
    }

    fn vjp_late<'f>(
        &'f self,
        t: &Time,
        y: &S,
    ) -> candle_core::Result<Option<(S, LatePullback<'f, S>)>> {
        self.field.vjp_late(t, y, &self.args)
    }

    fn is_traced(&self) -> bool {
        self.field.is_traced()
    }

    fn vjp_kept(&self, t: &Time, y: &S) -> candle_core::Result<Option<KeptVjp>> {
        self.field.vjp_kept(t, y, &self.args)
    }

    fn parameters(&self) -> Option<Vec<Tensor>> {
        let mut listed = self.field.parameters()?;
        listed.extend(self.args.leaves().into_iter().filter(Tensor::is_variable));
        Some(listed)
    }

    fn offer(&self) -> Option<Offer> {
        self.field.offer_given(&self.args)
    }

    #[cfg(feature = "cuda")]
    fn on_device(&self) -> Option<&dyn OnDevice> {
        self.field.on_device()
    }

    fn jumps(&self) -> Vec<f64> {
        let mut jumps = self.field.jumps();
        jumps.extend(self.args.jumps());
        jumps
    }

    fn is_constant_in(&self, leaf: usize) -> bool {
        self.field.is_constant_in(leaf)
    }
}

/// A field over any state, owned or borrowed, seen by the solver as a field over its leaves.
pub(crate) struct Leaves<P, S> {
    field: P,
    /// Arguments of which nobody asks the gradient.
    constants: Vec<Tensor>,
    state: std::marker::PhantomData<fn() -> S>,
}

impl<P, S> Leaves<P, S> {
    pub(crate) fn new(field: P) -> Self {
        Self {
            field,
            constants: vec![],
            state: std::marker::PhantomData,
        }
    }

    /// A field with these arguments: gradients of those that are no variables are left out.
    pub(crate) fn with_args(field: P, args: &[Tensor]) -> Self {
        let constants = args.iter().filter(|a| !a.is_variable());
        Self {
            constants: constants.cloned().collect(),
            ..Self::new(field)
        }
    }
}

impl<S, P> VectorField<Vec<Tensor>> for Leaves<P, S>
where
    S: State,
    P: std::ops::Deref<Target: VectorField<S>>,
{
    fn velocity(&self, t: &Time, y: &Vec<Tensor>) -> candle_core::Result<Vec<Tensor>> {
        #[cfg(feature = "cuda")]
        if let Some(field) = self.on_device().filter(|field| field.takes(y)) {
            return field.velocity(t, y);
        }
        let y = S::from_leaves(y.clone())?;
        Ok(self.field.velocity(t, &y)?.leaves())
    }

    fn vjp<'f>(
        &'f self,
        t: &Time,
        y: &Vec<Tensor>,
    ) -> candle_core::Result<(Vec<Tensor>, Pullback<'f, Vec<Tensor>>)> {
        #[cfg(feature = "cuda")]
        if let Some(field) = self.on_device().filter(|field| field.takes(y)) {
            return field.vjp(t, y);
        }
        let (k, pull) = self.field.vjp(t, &S::from_leaves(y.clone())?)?;
        let pull = move |v: &Vec<Tensor>| {
            let pulled = pull(&S::from_leaves(v.clone())?)?;
            let Cotangents { y, t, params } = without(&self.constants, pulled);
            let y = y.leaves();
            Ok(Cotangents { y, t, params })
        };
        Ok((k.leaves(), Box::new(pull)))
    }

    fn vjp_late<'f>(
        &'f self,
        t: &Time,
        y: &Vec<Tensor>,
    ) -> candle_core::Result<Option<(Vec<Tensor>, LatePullback<'f, Vec<Tensor>>)>> {
        #[cfg(feature = "cuda")]
        if self.on_device().is_some_and(|field| field.takes(y)) {
            return Ok(None);
        }
        let Some((k, pull)) = self.field.vjp_late(t, &S::from_leaves(y.clone())?)? else {
            return Ok(None);
        };
        let pull = move |v: &Vec<Tensor>| {
            let (y, later) = pull(&S::from_leaves(v.clone())?)?;
            let params = move || {
                let mut params = later()?;
                for argument in &self.constants {
                    params.remove(argument);
                }
                Ok(params)
            };
            let params: LateGradients<'f> = Rc::new(params);
            Ok((y.leaves(), params))
        };
        Ok(Some((k.leaves(), Box::new(pull))))
    }

    fn is_traced(&self) -> bool {
        self.field.is_traced()
    }

    fn vjp_kept(&self, t: &Time, y: &Vec<Tensor>) -> candle_core::Result<Option<KeptVjp>> {
        #[cfg(feature = "cuda")]
        if let Some(field) = self.on_device().filter(|field| field.takes(y)) {
            return field.vjp_kept(t, y).map(Some);
        }
        let kept = self.field.vjp_kept(t, &S::from_leaves(y.clone())?)?;
        let constants = self.constants.clone();
        Ok(kept.map(|(k, pull, bytes)| {
            let pull = move |v: &Vec<Tensor>| Ok(without(&constants, pull(v)?));
            (k, Box::new(pull) as KeptPullback, bytes)
        }))
    }

    fn parameters(&self) -> Option<Vec<Tensor>> {
        self.field.parameters()
    }

    fn offer(&self) -> Option<Offer> {
        self.field.offer()
    }

    #[cfg(feature = "cuda")]
    fn on_device(&self) -> Option<&dyn OnDevice> {
        self.field.on_device()
    }

    fn jumps(&self) -> Vec<f64> {
        self.field.jumps()
    }

    fn returns_velocity(&self) -> bool {
        self.field.returns_velocity()
    }

    fn is_constant_in(&self, leaf: usize) -> bool {
        self.field.is_constant_in(leaf)
    }
}

/// The same without gradients of constant arguments.
fn without<S>(constants: &[Tensor], mut pulled: Cotangents<S>) -> Cotangents<S> {
    for argument in constants {
        pulled.params.remove(argument);
    }
    pulled
}
