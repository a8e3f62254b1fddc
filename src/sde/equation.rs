//! An equation: its parts, and what is said of them.

use std::marker::PhantomData;
use std::ops::Deref;
use std::sync::atomic::{AtomicBool, Ordering};

use candle_core::Tensor;

use super::SdeOptions;
use crate::driven::{Calculus, Drive, Equation, NoiseType};
use crate::field::{autograd, Cotangents, Leaves, Offer, Pullback, VectorField};
use crate::noise::Noise;
use crate::state::State;
use crate::time::Time;

/// A stochastic differential equation dY = f dt + g dW; see [`ito`] and [`stratonovich`].
#[derive(Clone, Debug)]
pub struct Sde<F, G, M = Without> {
    drift: F,
    diffusion: G,
    milstein_term: M,
    pub(super) equation: Equation,
}

/// An equation in the sense of Itô, with diagonal noise unless another kind is declared.
///
/// * `drift`: f, a closure `|t: &Time, y: &S| …` or any [`VectorField`].
/// * `diffusion`: g, a closure or any [`Diffusion`]; a [`VectorField`] by [`OfField`].
///
/// ```
/// use candle_core::Tensor;
/// use candle_diffeq::sde::ito;
/// use candle_diffeq::Time;
/// let gbm = ito(|_: &Time, y: &Tensor| y * 0.05, |_: &Time, y: &Tensor| y * 0.2);
/// # let _ = gbm;
/// ```
pub fn ito<F, G>(drift: F, diffusion: G) -> Sde<F, G> {
    Sde::new(drift, diffusion, Calculus::Ito)
}

/// An equation in the sense of Stratonovich; otherwise like [`ito`].
pub fn stratonovich<F, G>(drift: F, diffusion: G) -> Sde<F, G> {
    Sde::new(drift, diffusion, Calculus::Stratonovich)
}

impl<F, G> Sde<F, G> {
    fn new(drift: F, diffusion: G, calculus: Calculus) -> Self {
        Self {
            drift,
            diffusion,
            milstein_term: Without,
            equation: Equation {
                calculus,
                noise: NoiseType::Diagonal,
                additive: false,
                milstein_term: false,
            },
        }
    }

    /// Adds the Milstein term g ∂g/∂y to the equation.  The methods [`MILSTEIN_ITO`](super::MILSTEIN_ITO) and
    /// [`MILSTEIN_STRATONOVICH`](super::MILSTEIN_STRATONOVICH) evaluate it in addition to drift and diffusion.  It has the
    /// shape of the state; for scalar noise, its component i is Σ_j g_j ∂g_i/∂y_j.  If it is computed by candle's operations,
    /// it is differentiated like drift and diffusion.
    ///
    /// ```
    /// use candle_core::{DType, Device, Tensor};
    /// use candle_diffeq::sde::{ito, predict, Noise, SdeOptions, MILSTEIN_ITO};
    /// use candle_diffeq::Time;
    /// let gbm = ito(|_: &Time, y: &Tensor| y * 0.05, |_: &Time, y: &Tensor| y * 0.2)
    ///     .milstein_term(|_: &Time, y: &Tensor| y * 0.04);
    /// let options = SdeOptions { method: MILSTEIN_ITO, ..Default::default() };
    /// let y0 = Tensor::ones((8, 1), DType::F32, &Device::Cpu)?;
    /// let ys = predict(&gbm, &y0, &[0.0, 0.1], &Noise::seeded(1), &options)?;
    /// assert_eq!(ys.dims(), [2, 8, 1]);
    /// # Ok::<(), candle_diffeq::Error>(())
    /// ```
    pub fn milstein_term<M>(self, term: M) -> Sde<F, G, M> {
        Sde {
            drift: self.drift,
            diffusion: self.diffusion,
            milstein_term: term,
            equation: Equation {
                milstein_term: true,
                ..self.equation
            },
        }
    }
}

impl<F, G, M> Sde<F, G, M> {
    /// Scalar noise: one Brownian motion drives all components of a row, and g has the state's shape.
    #[must_use]
    pub fn scalar(self) -> Self {
        self.with(NoiseType::Scalar)
    }

    /// General noise: a row is driven by this many Brownian motions, and g is of shape (…state, channels).
    #[must_use]
    pub fn general(self, channels: usize) -> Self {
        self.with(NoiseType::General { channels })
    }

    /// Declares that g does not read the state.  If it does, the backward pass returns an error, but
    /// [`predict`](super::predict) does not notice it.  Both calculi then have the same solution, and methods of both solve
    /// it, whichever kind the noise is.  Only [`MILSTEIN_ITO`](super::MILSTEIN_ITO) and
    /// [`MILSTEIN_STRATONOVICH`](super::MILSTEIN_STRATONOVICH) still need a [`milstein_term`](Self::milstein_term) (which is
    /// zero), and noise that is diagonal or scalar.
    #[must_use]
    pub fn additive(mut self) -> Self {
        self.equation.additive = true;
        self
    }

    fn with(mut self, noise: NoiseType) -> Self {
        self.equation.noise = noise;
        self
    }

    pub(super) fn drive(&self, noise: &Noise, options: &SdeOptions) -> Drive {
        Drive {
            method: options.method,
            equation: self.equation,
            noise: noise.clone(),
            samples: options.samples,
        }
    }
}

/// The diffusion g(t, y) of an equation: a closure `|t: &Time, y: &S| …` that returns one or several tensors, for the
/// first tensors of the state, in order.  State tensors for which it returns nothing have no noise.
pub trait Diffusion<S: State> {
    /// g(t, y), its tensors.
    ///
    /// # Errors
    /// Whatever the model's operations return.
    fn tensors(&self, t: &Time, y: &S) -> candle_core::Result<Vec<Tensor>>;

    /// The same with its pull-back, from tensors like g; by default candle's autograd over this one evaluation.
    ///
    /// # Errors
    /// As [`tensors`](Self::tensors).
    #[allow(clippy::type_complexity)]
    fn vjp<'f>(
        &'f self,
        t: &Time,
        y: &S,
    ) -> candle_core::Result<(Vec<Tensor>, Pullback<'f, Vec<Tensor>>)> {
        let leaves = OfDiffusion::<&Self, S>::new(self);
        autograd::vjp(&leaves, t, &y.leaves())
    }

    /// As [`vjp`](Self::vjp), after an earlier evaluation has shown that g does not depend on the state in a way that
    /// candle's graph does not contain.
    #[doc(hidden)]
    #[allow(clippy::type_complexity)]
    fn vjp_of_constant<'f>(
        &'f self,
        t: &Time,
        y: &S,
    ) -> candle_core::Result<(Vec<Tensor>, Pullback<'f, Vec<Tensor>>)> {
        self.vjp(t, y)
    }

    /// As [`VectorField::parameters`].
    fn parameters(&self) -> Option<Vec<Tensor>> {
        None
    }

    /// As [`VectorField::jumps`].
    fn jumps(&self) -> Vec<f64> {
        vec![]
    }

    /// As [`VectorField::offer`].
    #[doc(hidden)]
    fn offer(&self) -> Option<Offer> {
        None
    }
}

impl<S, D, F> Diffusion<S> for F
where
    S: State,
    D: State,
    F: Fn(&Time, &S) -> candle_core::Result<D>,
{
    fn tensors(&self, t: &Time, y: &S) -> candle_core::Result<Vec<Tensor>> {
        Ok(self(t, y)?.leaves())
    }

    fn vjp_of_constant<'f>(
        &'f self,
        t: &Time,
        y: &S,
    ) -> candle_core::Result<(Vec<Tensor>, Pullback<'f, Vec<Tensor>>)> {
        let leaves = OfDiffusion::<&Self, S> {
            is_constant: true,
            ..OfDiffusion::new(self)
        };
        autograd::vjp(&leaves, t, &y.leaves())
    }
}

/// A vector field as the diffusion of an equation, with its own pull-back, such as an [`nn::Mlp`](crate::nn::Mlp).
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_diffeq::nn::{Activation, Mlp};
/// use candle_diffeq::sde::{stratonovich, NeuralSde, Noise, OfField, SdeOptions, HEUN};
/// let vars = candle_nn::VarMap::new();
/// let sde = NeuralSde::new(&vars, "sde", DType::F32, &Device::Cpu, |vb| {
///     let drift = Mlp::new(&[2, 16, 2], Activation::Tanh, vb.pp("f"))?;
///     let diffusion = Mlp::new(&[2, 16, 2], Activation::Tanh, vb.pp("g"))?;
///     Ok(stratonovich(drift, OfField(diffusion)))
/// })?
/// .options(SdeOptions { method: HEUN, ..Default::default() });
/// let y0 = Tensor::ones((4, 2), DType::F32, &Device::Cpu)?;
/// let ys = sde.solve(&y0, &[0.0, 0.1], &Noise::seeded(1))?;
/// assert_eq!(ys.dims(), [2, 4, 2]);
/// # Ok::<(), candle_diffeq::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct OfField<F>(pub F);

impl<S: State + 'static, F: VectorField<S>> Diffusion<S> for OfField<F> {
    fn tensors(&self, t: &Time, y: &S) -> candle_core::Result<Vec<Tensor>> {
        Ok(self.0.velocity(t, y)?.leaves())
    }

    fn vjp<'f>(
        &'f self,
        t: &Time,
        y: &S,
    ) -> candle_core::Result<(Vec<Tensor>, Pullback<'f, Vec<Tensor>>)> {
        let (g, pull) = self.0.vjp(t, y)?;
        let pull = move |v: &Vec<Tensor>| {
            let Cotangents { y, t, params } = pull(&S::from_leaves(v.clone())?)?;
            Ok(Cotangents {
                y: y.leaves(),
                t,
                params,
            })
        };
        Ok((g.leaves(), Box::new(pull)))
    }

    fn parameters(&self) -> Option<Vec<Tensor>> {
        self.0.parameters()
    }

    fn jumps(&self) -> Vec<f64> {
        self.0.jumps()
    }

    fn offer(&self) -> Option<Offer> {
        self.0.offer()
    }
}

/// The part that an equation does not have.
#[derive(Clone, Copy, Debug)]
pub struct Without;

impl<S: State> VectorField<S> for Without {
    fn velocity(&self, _: &Time, _: &S) -> candle_core::Result<S> {
        candle_core::bail!("the equation has no such part")
    }
}

/// A diffusion as a field over lists of tensors, whose values need not be like the state.
struct OfDiffusion<P, S> {
    diffusion: P,
    /// Whether the noise is declared additive, and whether an evaluation has been pulled back, by which the declaration
    /// was held against the values.
    additive: bool,
    verified: AtomicBool,
    /// Whether nothing is to be verified.
    is_constant: bool,
    state: PhantomData<fn() -> S>,
}

impl<P, S> OfDiffusion<P, S> {
    fn new(diffusion: P) -> Self {
        Self {
            diffusion,
            additive: false,
            verified: AtomicBool::new(false),
            is_constant: false,
            state: PhantomData,
        }
    }

    /// Of an equation that declares its noise.
    fn of(diffusion: P, equation: &Equation) -> Self {
        Self {
            additive: equation.additive,
            ..Self::new(diffusion)
        }
    }
}

impl<P, S> VectorField<Vec<Tensor>> for OfDiffusion<P, S>
where
    S: State,
    P: Deref<Target: Diffusion<S>>,
{
    fn velocity(&self, t: &Time, y: &Vec<Tensor>) -> candle_core::Result<Vec<Tensor>> {
        self.diffusion.tensors(t, &S::from_leaves(y.clone())?)
    }

    fn vjp<'f>(
        &'f self,
        t: &Time,
        y: &Vec<Tensor>,
    ) -> candle_core::Result<(Vec<Tensor>, Pullback<'f, Vec<Tensor>>)> {
        let y = S::from_leaves(y.clone())?;
        // A comparison with values at other states at every step would cost more than the step.
        if self.additive && self.verified.load(Ordering::Relaxed) {
            return self.diffusion.vjp_of_constant(t, &y);
        }
        let result = self.diffusion.vjp(t, &y)?;
        self.verified.store(true, Ordering::Relaxed);
        Ok(result)
    }

    fn returns_velocity(&self) -> bool {
        false
    }

    fn is_constant_in(&self, _: usize) -> bool {
        self.is_constant
    }

    fn parameters(&self) -> Option<Vec<Tensor>> {
        self.diffusion.parameters()
    }

    fn jumps(&self) -> Vec<f64> {
        self.diffusion.jumps()
    }

    fn offer(&self) -> Option<Offer> {
        self.diffusion.offer()
    }
}

/// A part that may cross threads, and one that need not.
pub(super) type SharedPart = Box<dyn VectorField<Vec<Tensor>> + Send + Sync>;
pub(super) type OwnedPart<'f> = Box<dyn VectorField<Vec<Tensor>> + 'f>;

/// The parts of an equation, in the order of [`Part`](crate::driven::Part).
pub(super) fn shared<S, F, G, M>(sde: Sde<F, G, M>) -> Vec<SharedPart>
where
    S: State + 'static,
    F: VectorField<S> + Send + Sync + 'static,
    G: Diffusion<S> + Send + Sync + 'static,
    M: VectorField<S> + Send + Sync + 'static,
{
    let mut parts: Vec<SharedPart> = vec![
        Box::new(Leaves::<Box<F>, S>::new(Box::new(sde.drift))),
        Box::new(OfDiffusion::<Box<G>, S>::of(
            Box::new(sde.diffusion),
            &sde.equation,
        )),
    ];
    if sde.equation.milstein_term {
        parts.push(Box::new(Leaves::<Box<M>, S>::new(Box::new(
            sde.milstein_term,
        ))));
    }
    parts
}

/// The same of an equation that stays where it is.
pub(super) fn owned<S, F, G, M>(sde: Sde<F, G, M>) -> Vec<OwnedPart<'static>>
where
    S: State + 'static,
    F: VectorField<S> + 'static,
    G: Diffusion<S> + 'static,
    M: VectorField<S> + 'static,
{
    let mut parts: Vec<OwnedPart<'static>> = vec![
        Box::new(Leaves::<Box<F>, S>::new(Box::new(sde.drift))),
        Box::new(OfDiffusion::<Box<G>, S>::of(
            Box::new(sde.diffusion),
            &sde.equation,
        )),
    ];
    if sde.equation.milstein_term {
        parts.push(Box::new(Leaves::<Box<M>, S>::new(Box::new(
            sde.milstein_term,
        ))));
    }
    parts
}

/// The same of a borrowed one.
pub(super) fn borrowed<'f, S, F, G, M>(sde: &'f Sde<F, G, M>) -> Vec<OwnedPart<'f>>
where
    S: State + 'f,
    F: VectorField<S> + 'f,
    G: Diffusion<S> + 'f,
    M: VectorField<S> + 'f,
{
    let mut parts: Vec<OwnedPart<'f>> = vec![
        Box::new(Leaves::<&'f F, S>::new(&sde.drift)),
        Box::new(OfDiffusion::<&'f G, S>::of(&sde.diffusion, &sde.equation)),
    ];
    if sde.equation.milstein_term {
        parts.push(Box::new(Leaves::<&'f M, S>::new(&sde.milstein_term)));
    }
    parts
}
