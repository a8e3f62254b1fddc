//! The vector field f of y' = f(t, y), and its pull-back.

use std::any::Any;

use candle_core::backprop::GradStore;
use candle_core::{Module, Tensor};

use crate::autograd;
#[cfg(feature = "cuda")]
use crate::nn;
use crate::state::State;
use crate::time::Time;

/// The right-hand side f(t, y) of the differential equation.
///
/// Every closure `Fn(&Time, &S) -> candle_core::Result<S>` is one; candle modules enter by
/// [`autonomous`].  y arrives in compute dtype; the velocity must have its shapes, dtypes and
/// device.  f must be deterministic: the backward pass evaluates it again.  `Result` is candle's
/// throughout, so that model code needs no conversion; this crate's errors pass through it.
///
/// A field that brings its own pull-back implements [`vjp`](Self::vjp) **and**
/// [`parameters`](Self::parameters): what the one inserts gradients of, the other lists.
///
/// ```
/// use candle_core::{DType, Device, Tensor, Var};
/// use candle_diffeq::{odeint, Cotangents, OdeOptions, Pullback, Time, VectorField};
///
/// /// y' = w y with its pull-back written by hand.
/// struct Growth {
///     w: Tensor,
/// }
/// impl VectorField for Growth {
///     fn velocity(&self, _: &Time, y: &Tensor) -> candle_core::Result<Tensor> {
///         y.broadcast_mul(&self.w.detach().to_dtype(y.dtype())?)
///     }
///     fn vjp(&self, t: &Time, y: &Tensor) -> candle_core::Result<(Tensor, Pullback<'_, Tensor>)> {
///         let (k, y) = (self.velocity(t, y)?, y.clone());
///         let pull = move |v: &Tensor| {
///             // vᵀ∂f/∂y = w v, in the dtype of v.
///             let w = self.w.detach().to_dtype(v.dtype())?;
///             let mut cotangents = Cotangents::of_state(v.broadcast_mul(&w)?);
///             // vᵀ∂f/∂w = Σ v y, of w's shape, under the tensor that `parameters` lists.
///             let product = (v.to_dtype(DType::F32)? * y.to_dtype(DType::F32)?)?;
///             cotangents.params.insert(&self.w, product.sum_all()?);
///             Ok(cotangents)
///         };
///         Ok((k, Box::new(pull)))
///     }
///     fn parameters(&self) -> Option<Vec<Tensor>> {
///         Some(vec![self.w.clone()])
///     }
/// }
///
/// let w = Var::new(0.5f32, &Device::Cpu)?;
/// let y0 = Tensor::ones(3, DType::F32, &Device::Cpu)?;
/// let field = Growth { w: w.as_tensor().clone() };
/// let ys = odeint(field, &y0, &[0.0, 1.0], &OdeOptions::default())?;
/// let grads = ys.get(1)?.sum_all()?.backward()?;
/// let grad = grads.get(&w).unwrap().to_scalar::<f32>()?;        // 3 e^w to order four
/// assert!((grad - 3.0 * 0.5f32.exp()).abs() < 0.02);
/// # Ok::<(), candle_diffeq::Error>(())
/// ```
pub trait VectorField<S: State = Tensor> {
    /// f(t, y).
    ///
    /// # Errors
    /// Whatever the model's operations return.
    fn velocity(&self, t: &Time, y: &S) -> candle_core::Result<S>;

    /// f(t, y) together with v ↦ vᵀ∂f, as `jax.vjp`.  The velocity carries no history.  The
    /// pull-back may be called several times.
    ///
    /// By default candle's autograd over this one evaluation.
    ///
    /// # Errors
    /// As [`velocity`](Self::velocity), and
    /// [`UntrackedVelocity`](crate::Error::UntrackedVelocity) when candle sees no path from the
    /// velocity to y or to a variable.
    fn vjp<'f>(&'f self, t: &Time, y: &S) -> candle_core::Result<(S, Pullback<'f, S>)> {
        autograd::vjp(self, t, y)
    }

    /// The parameters that [`vjp`](Self::vjp) returns gradients of, for fields that bring their
    /// own; `None` (the default) lets the solver find the variables in candle's graph, over all
    /// evaluations.  To be implemented together with `vjp`: without it a velocity that candle cannot
    /// trace is an error, and a gradient of a tensor that is not listed is one too.
    fn parameters(&self) -> Option<Vec<Tensor>> {
        None
    }

    /// The field itself, where it is one of [`nn`](crate::nn), which the solver may integrate in its
    /// own way.
    #[doc(hidden)]
    fn known(&self) -> Option<&dyn Any> {
        None
    }
}

/// v ↦ vᵀ∂f at one evaluation; v and the cotangent of y in the dtypes of y.
pub type Pullback<'f, S> = Box<dyn Fn(&S) -> candle_core::Result<Cotangents<S>> + 'f>;

/// What a pull-back returns: vᵀ∂f/∂y, vᵀ∂f/∂t and vᵀ∂f/∂θ.
#[derive(Debug)]
pub struct Cotangents<S> {
    /// vᵀ∂f/∂y, of y's shapes and dtypes; a tensor that f does not read is zero.
    pub y: S,
    /// vᵀ∂f/∂t, 0-d, of any float dtype, or `None` where f does not read [`Time::tensor`].
    pub t: Option<Tensor>,
    /// vᵀ∂f/∂θ by parameter, of its shape and on its device, in f16, bf16, f32 or f64, whichever
    /// the parameter has: it is summed in state dtype.  Parameters that f did not read may be
    /// missing.
    pub params: GradStore,
}

impl<S> Cotangents<S> {
    /// Of a field without parameters and without time.
    pub fn of_state(y: S) -> Self {
        Self {
            y,
            t: None,
            params: GradStore::default(),
        }
    }
}

impl<S, F> VectorField<S> for F
where
    S: State,
    F: Fn(&Time, &S) -> candle_core::Result<S>,
{
    fn velocity(&self, t: &Time, y: &S) -> candle_core::Result<S> {
        self(t, y)
    }
}

/// A candle module as a field without time; see [`autonomous`].
#[derive(Clone, Debug)]
pub struct Autonomous<M>(M);

/// The field f(t, y) = m(y) of a candle module.
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_diffeq::{autonomous, odeint, OdeOptions};
/// let vars = candle_nn::VarMap::new();
/// let vb = candle_nn::VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
/// let y0 = Tensor::ones((3, 2), DType::F32, &Device::Cpu)?;
/// let ys = odeint(autonomous(candle_nn::linear(2, 2, vb)?), &y0, &[0.0, 1.0], &OdeOptions::default())?;
/// assert_eq!(ys.dims(), [2, 3, 2]);
/// # Ok::<(), candle_diffeq::Error>(())
/// ```
pub fn autonomous<M: Module>(module: M) -> Autonomous<M> {
    Autonomous(module)
}

impl<M: Module> VectorField<Tensor> for Autonomous<M> {
    fn velocity(&self, _: &Time, y: &Tensor) -> candle_core::Result<Tensor> {
        self.0.forward(y)
    }
}

/// A field that is declared to depend on nothing but time; see [`constant`].
#[derive(Clone, Debug)]
pub struct Constant<F>(F);

/// Declares that f depends on no state and no parameter, so that these derivatives are zero:
/// without this, a velocity that candle cannot trace back is an error.  Time gradients see what is
/// computed from [`Time::tensor`], as always.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_diffeq::{constant, odeint, OdeOptions, Time};
/// let y0 = Tensor::new(&[1f64], &Device::Cpu)?;
/// let f = constant(|t: &Time, y: &Tensor| y.ones_like()? * (2.0 * t.value()));
/// let y = odeint(f, &y0, &[0.0, 3.0], &OdeOptions::default())?;      // y = 1 + t²
/// assert!((y.get(1)?.to_vec1::<f64>()?[0] - 10.0).abs() < 1e-14);
/// # Ok::<(), candle_diffeq::Error>(())
/// ```
pub fn constant<F>(f: F) -> Constant<F> {
    Constant(f)
}

impl<S, F> VectorField<S> for Constant<F>
where
    S: State,
    F: Fn(&Time, &S) -> candle_core::Result<S>,
{
    fn velocity(&self, t: &Time, y: &S) -> candle_core::Result<S> {
        (self.0)(t, y)
    }

    fn vjp<'f>(&'f self, t: &Time, y: &S) -> candle_core::Result<(S, Pullback<'f, S>)> {
        autograd::vjp_of_constant(self, t, y)
    }

    fn parameters(&self) -> Option<Vec<Tensor>> {
        Some(vec![])
    }
}

/// A field over any state, owned or borrowed, seen by the solver as a field over its leaves.
pub(crate) struct Leaves<P, S> {
    field: P,
    state: std::marker::PhantomData<fn() -> S>,
}

impl<P, S> Leaves<P, S> {
    pub(crate) fn new(field: P) -> Self {
        Self {
            field,
            state: std::marker::PhantomData,
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
        if let Some(mlp) = self.known().and_then(|known| nn::cuda::layered(known, y)) {
            return Ok(vec![nn::cuda::velocity(mlp, t, &y[0])?]);
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
        if let Some(mlp) = self.known().and_then(|known| nn::cuda::layered(known, y)) {
            let (k, pull) = nn::cuda::vjp(mlp, t, &y[0])?;
            return Ok((vec![k], pull));
        }
        let (k, pull) = self.field.vjp(t, &S::from_leaves(y.clone())?)?;
        let pull = move |v: &Vec<Tensor>| {
            let Cotangents { y, t, params } = pull(&S::from_leaves(v.clone())?)?;
            Ok(Cotangents {
                y: y.leaves(),
                t,
                params,
            })
        };
        Ok((k.leaves(), Box::new(pull)))
    }

    fn parameters(&self) -> Option<Vec<Tensor>> {
        self.field.parameters()
    }

    fn known(&self) -> Option<&dyn Any> {
        self.field.known()
    }
}
