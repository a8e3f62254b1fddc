//! The vector field f of y' = f(t, y), and its pull-back.

pub(crate) mod autograd;
mod bound;
pub(crate) mod check;
pub(crate) mod parts;
pub(crate) mod pullback;

use std::any::Any;
use std::rc::Rc;
use std::sync::Arc;

use candle_core::backprop::GradStore;
use candle_core::{Module, Tensor};

use crate::state::State;
use crate::time::Time;
pub(crate) use bound::{Bound, Free, Leaves};

/// A field over the leaves of a state.
pub(crate) type Field<'f> = dyn VectorField<Vec<Tensor>> + 'f;

/// The right-hand side f(t, y) of the differential equation.
///
/// Every closure `Fn(&Time, &S) -> candle_core::Result<S>` is one; candle modules enter by
/// [`autonomous`].  y arrives in compute dtype; the velocity must have its shapes, dtypes and
/// device.  f must be deterministic: the backward pass evaluates it again.  `Result` is candle's
/// throughout, so that model code needs no conversion; this crate's errors pass through it.
///
/// A field that brings its own pull-back implements [`vjp`](Self::vjp) **and**
/// [`parameters`](Self::parameters), which lists exactly the tensors for which `vjp` returns gradients.
///
/// ```
/// use candle_core::{DType, Device, Tensor, Var};
/// use candle_diffeq::fields::{Cotangents, Pullback};
/// use candle_diffeq::{odeint, OdeOptions, Time, VectorField};
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
#[diagnostic::on_unimplemented(
    message = "`{Self}` is not a vector field over a state `{S}`",
    label = "not a vector field",
    note = "wrap a candle module: `fields::autonomous(module)`",
    note = "give the types of a closure's arguments: `move |t: &Time, y: &Tensor| …`",
    note = "a field that is kept in candle's graph owns what it reads: clone tensors and models into the closure"
)]
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
    /// [`UntrackedVelocity`](crate::Error::UntrackedVelocity) when the velocity changes with y although
    /// candle sees no path between them.
    fn vjp<'f>(&'f self, t: &Time, y: &S) -> candle_core::Result<(S, Pullback<'f, S>)> {
        autograd::vjp(self, t, y)
    }

    /// As [`vjp`](Self::vjp) but for time, with gradients of the parameters formed later or never, of a field whose
    /// pull-back can do this; otherwise `None`, before anything is evaluated.
    #[doc(hidden)]
    fn vjp_late<'f>(
        &'f self,
        _t: &Time,
        _y: &S,
    ) -> candle_core::Result<Option<(S, LatePullback<'f, S>)>> {
        Ok(None)
    }

    /// Whether the pull-back is that of candle's graph of a velocity, so that
    /// [`ActivationCache`](crate::options::ActivationCache) can keep the graphs of evaluations for the backward pass.
    /// True of closures and of candle's modules.  The default is false, because a field may have its own
    /// [`vjp`](Self::vjp); a field that has none, and lists no [`parameters`](Self::parameters), may return true, at all
    /// times.
    fn is_traced(&self) -> bool {
        false
    }

    /// f(t, y) with a pull-back that lives as long as the solution and the bytes that it holds, of a field whose
    /// evaluations can be kept; otherwise `None`, before anything is evaluated.
    #[doc(hidden)]
    fn vjp_kept(&self, _t: &Time, _y: &S) -> candle_core::Result<Option<KeptVjp>> {
        Ok(None)
    }

    /// The parameters that [`vjp`](Self::vjp) returns gradients of, for fields that bring their
    /// own; `None` (the default) lets the solver find the variables in candle's graph, over all
    /// evaluations.  To be implemented together with `vjp`: without it the solver asks candle for paths
    /// from the velocity to the state, and a gradient of a tensor that is not listed is an error.
    fn parameters(&self) -> Option<Vec<Tensor>> {
        None
    }

    /// Times at which the field jumps: every step ends there, and its stages read the field on their own side.
    /// Default: none.
    fn jumps(&self) -> Vec<f64> {
        vec![]
    }

    /// What the field offers to the solver beside evaluations, if it is one of [`nn`](crate::nn).
    #[doc(hidden)]
    fn offer(&self) -> Option<Offer> {
        None
    }

    /// Whether what it returns is a velocity, of the state's shape; a diffusion is none.
    #[doc(hidden)]
    fn returns_velocity(&self) -> bool {
        true
    }

    /// The parts of an equation that are evaluated one by one, if it has several: drift, diffusion, ….
    #[doc(hidden)]
    fn parts(&self) -> Vec<&dyn VectorField<Vec<Tensor>>> {
        vec![]
    }

    /// Evaluations of the field's own on a device.
    #[doc(hidden)]
    #[cfg(feature = "cuda")]
    fn on_device(&self) -> Option<&dyn OnDevice> {
        None
    }

    /// Whether the derivative with respect to this tensor of the state is declared to be zero, so that nothing
    /// is to be verified.
    #[doc(hidden)]
    fn is_constant_in(&self, _leaf: usize) -> bool {
        false
    }
}

/// What a field of this crate offers to the solver; others cannot make one.
pub struct Offer(pub(crate) Box<dyn Any + Send + Sync>);

/// A field that evaluates itself on a device, in fewer launches than its operations take.
#[doc(hidden)]
#[cfg(feature = "cuda")]
pub trait OnDevice {
    /// Whether it does so at this state.
    fn takes(&self, y: &[Tensor]) -> bool;

    /// f(t, y), without history.
    fn velocity(&self, t: &Time, y: &[Tensor]) -> candle_core::Result<Vec<Tensor>>;

    /// The same with its pull-back.
    #[allow(clippy::type_complexity)]
    fn vjp<'f>(
        &'f self,
        t: &Time,
        y: &[Tensor],
    ) -> candle_core::Result<(Vec<Tensor>, Pullback<'f, Vec<Tensor>>)>;

    /// The same with a pull-back that is kept.
    fn vjp_kept(&self, t: &Time, y: &[Tensor]) -> candle_core::Result<KeptVjp>;
}

/// A field that may outlive the call and cross threads, as candle's graph asks.
pub(crate) type SharedField = Arc<dyn VectorField<Vec<Tensor>> + Send + Sync>;

/// A field that stays where it was built.
pub(crate) type OwnedField = Box<dyn VectorField<Vec<Tensor>>>;

/// v ↦ vᵀ∂f at one evaluation; v and the cotangent of y in the dtypes of y.
pub type Pullback<'f, S> = Box<dyn Fn(&S) -> candle_core::Result<Cotangents<S>> + 'f>;

/// The same over the leaves of the state, of an evaluation that is kept.
pub(crate) type KeptPullback =
    Box<dyn Fn(&Vec<Tensor>) -> candle_core::Result<Cotangents<Vec<Tensor>>> + Send + Sync>;

/// The leaves of a velocity with their pull-back, and the bytes that this holds.
pub(crate) type KeptVjp = (Vec<Tensor>, KeptPullback, usize);

/// A pull-back over one tensor as one over the leaves of the state.
pub(crate) fn over_leaves(
    pull: impl Fn(&Tensor) -> candle_core::Result<Cotangents<Tensor>>,
) -> impl Fn(&Vec<Tensor>) -> candle_core::Result<Cotangents<Vec<Tensor>>> {
    move |v| match v.as_slice() {
        [v] => {
            let Cotangents { y, t, params } = pull(v)?;
            let y = vec![y];
            Ok(Cotangents { y, t, params })
        }
        _ => candle_core::bail!("a cotangent of {} tensors for a state of one", v.len()),
    }
}

/// v ↦ vᵀ∂f/∂y, with vᵀ∂f/∂θ on request.
pub(crate) type LatePullback<'f, S> =
    Box<dyn Fn(&S) -> candle_core::Result<(S, LateGradients<'f>)> + 'f>;

/// vᵀ∂f/∂θ by parameter, formed when it is called.
pub(crate) type LateGradients<'f> = Rc<dyn Fn() -> candle_core::Result<GradStore> + 'f>;

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

    fn is_traced(&self) -> bool {
        true
    }
}

/// A candle module as a field without time; see [`autonomous`].
#[derive(Clone, Debug)]
pub struct Autonomous<M>(M);

/// The field f(t, y) = m(y) of a candle module.
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_diffeq::fields::autonomous;
/// use candle_diffeq::{odeint, OdeOptions};
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

    fn is_traced(&self) -> bool {
        true
    }
}

/// A field that is declared not to depend on the state; see [`constant`].
#[derive(Clone, Debug)]
pub struct Constant<F>(F);

/// Declares that f does not depend on the state, whatever it computes from: the solver then does not
/// look for a path from the velocity to y in candle's graph, nor compares with differences.  Parameters
/// and time that f reads receive their gradients as always.
///
/// A velocity that is zero, or a table of times, needs no declaration.  This is for a field that does
/// change with y and whose derivative is meant to be zero, a `detach()` for example.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_diffeq::fields::constant;
/// use candle_diffeq::{odeint, OdeOptions, Time};
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

    fn is_traced(&self) -> bool {
        true
    }

    fn is_constant_in(&self, _: usize) -> bool {
        true
    }
}

impl<S, A, F> FieldWithArgs<S, A> for Constant<F>
where
    S: State,
    A: State,
    F: Fn(&Time, &S, &A) -> candle_core::Result<S>,
{
    fn velocity(&self, t: &Time, y: &S, args: &A) -> candle_core::Result<S> {
        (self.0)(t, y, args)
    }

    fn is_traced(&self) -> bool {
        true
    }

    fn is_constant_in(&self, _: usize) -> bool {
        true
    }
}

/// A field f(t, y, a) with arguments: what it reads beside time, state and parameters, such as the
/// output of an encoder, a condition, or a number of a class.
///
/// Every closure `Fn(&Time, &S, &A) -> candle_core::Result<S>` is one.  A is any [`State`].  Arguments are
/// constant over the solve, and differentiated as parameters are: the solve cuts them off their own
/// history, sums their gradients in state dtype over all evaluations, and hands them to candle once.  A
/// closure that captures the tensor instead takes candle back through the whole encoder at every stage.
/// Floating-point tensors arrive in compute dtype, integers as they are: give numbers of classes as integers, for
/// bf16 rounds 257 to 256.
///
/// See [`odeint_with`](crate::odeint_with), [`solution_with`](crate::solution_with) and
/// [`NeuralOde::with_args`](crate::NeuralOde::with_args).
#[diagnostic::on_unimplemented(
    message = "`{Self}` is not a vector field over a state `{S}` with arguments `{A}`",
    label = "not a vector field with arguments",
    note = "give the types of a closure's arguments: `move |t: &Time, y: &Tensor, args: &Tensor| …`"
)]
pub trait FieldWithArgs<S: State, A: State> {
    /// f(t, y, a).
    ///
    /// # Errors
    /// Whatever the model's operations return.
    fn velocity(&self, t: &Time, y: &S, args: &A) -> candle_core::Result<S>;

    /// f(t, y, a) and v ↦ vᵀ∂f, as [`VectorField::vjp`]; gradients of the arguments' tensors are inserted
    /// among those of the parameters.  By default candle's autograd over this one evaluation.
    ///
    /// # Errors
    /// As [`VectorField::vjp`].
    fn vjp<'f>(&'f self, t: &Time, y: &S, args: &A) -> candle_core::Result<(S, Pullback<'f, S>)> {
        let bound = Bound {
            field: self,
            args: args.clone(),
        };
        autograd::vjp(&bound, t, y)
    }

    /// As [`VectorField::vjp_late`].
    #[doc(hidden)]
    fn vjp_late<'f>(
        &'f self,
        _t: &Time,
        _y: &S,
        _args: &A,
    ) -> candle_core::Result<Option<(S, LatePullback<'f, S>)>> {
        Ok(None)
    }

    /// As [`VectorField::is_traced`].
    fn is_traced(&self) -> bool {
        false
    }

    /// As [`VectorField::vjp_kept`].
    #[doc(hidden)]
    fn vjp_kept(&self, _t: &Time, _y: &S, _args: &A) -> candle_core::Result<Option<KeptVjp>> {
        Ok(None)
    }

    /// As [`VectorField::parameters`]; arguments need not be listed.
    fn parameters(&self) -> Option<Vec<Tensor>> {
        None
    }

    /// Times at which the field jumps: every step ends there, and its stages read the field on their own side.
    /// Default: none.
    fn jumps(&self) -> Vec<f64> {
        vec![]
    }

    /// As [`VectorField::offer`].
    #[doc(hidden)]
    fn offer(&self) -> Option<Offer> {
        None
    }

    /// The same with these arguments.
    #[doc(hidden)]
    fn offer_given(&self, _args: &A) -> Option<Offer> {
        self.offer()
    }

    /// Evaluations of the field's own on a device.
    #[doc(hidden)]
    #[cfg(feature = "cuda")]
    fn on_device(&self) -> Option<&dyn OnDevice> {
        None
    }

    /// As [`VectorField::is_constant_in`].
    #[doc(hidden)]
    fn is_constant_in(&self, _leaf: usize) -> bool {
        false
    }
}

impl<S, A, F> FieldWithArgs<S, A> for F
where
    S: State,
    A: State,
    F: Fn(&Time, &S, &A) -> candle_core::Result<S>,
{
    fn velocity(&self, t: &Time, y: &S, args: &A) -> candle_core::Result<S> {
        self(t, y, args)
    }

    fn is_traced(&self) -> bool {
        true
    }
}
