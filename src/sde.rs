//! Stochastic differential equations dY = f(t, Y) dt + g(t, Y) dW.
//!
//! An equation is built from two closures or fields, by [`ito`]`(drift, diffusion)` or [`stratonovich`]`(drift,
//! diffusion)`.  It says which noise it has: diagonal (the default), [`Sde::scalar`] or [`Sde::general`].  Each of
//! these may also be declared additive by [`Sde::additive`].  [`sdeint`] solves it as part of candle's graph,
//! [`solution`] with gradients on request, [`predict`] without gradients.  [`NeuralSde`] is a model built from a
//! `VarBuilder`.  Increments come from [`Noise`].
//!
//! | method | calculus | noise | strong order (in brackets: for general noise) | evaluations of f, g in a step |
//! |---|---|---|---|---|
//! | [`EULER_MARUYAMA`] | Itô | any | ½, 1 for additive noise (½) | 1, 1 |
//! | [`MILSTEIN_FREE_ITO`] | Itô | diagonal, scalar, additive | 1 | 1, 2 |
//! | [`MILSTEIN_FREE_STRATONOVICH`] | Stratonovich | diagonal, scalar, additive | ½, 1 if g is linear or additive | 1, 2 |
//! | [`MILSTEIN_ITO`], [`MILSTEIN_STRATONOVICH`] | Itô, Stratonovich | diagonal, scalar; with [`Sde::milstein_term`] | 1 | 1, 1 |
//! | [`EULER_HEUN`] | Stratonovich | any | 1 (½) | 1, 2 |
//! | [`HEUN`], [`MIDPOINT`] | Stratonovich | any | 1 (½) | 2, 2 |
//! | [`REVERSIBLE_HEUN`] | Stratonovich | any | 1 for additive noise; ½ is proved and 1 measured for diagonal and scalar noise (½) | 2, 2 |
//! | [`SRA1`] | both | additive | 1.5 | 2, 2 |
//! | [`SRI2`] | Itô | diagonal, scalar, additive | 1.5 | 3, 4 |
//!
//! "Additive" is said of any noise that is declared so by [`Sde::additive`], also of general noise, for which the order is
//! that of additive noise.  The evaluations are those of a step of fixed length; an adaptive step evaluates more.
//!
//! If a method does not fit the calculus or the noise of the equation, the solve returns an error
//! ([`SdeDefect`](crate::error::SdeDefect)).  An equation with additive noise fits both calculi.
//!
//! **Adaptive steps** ([`Steps::Adaptive`](crate::options::Steps::Adaptive)) are available for [`HEUN`] with additive
//! noise (for which Itô's and Stratonovich's sense agree).  In Stratonovich's sense they are also available with
//! scalar noise, and with diagonal noise whose diffusion of each component reads no other component that has noise.
//! In these cases the solution is a continuous function of the path W (H. Doss, Ann. Inst. Henri Poincaré 13, 1977;
//! H. Sussmann, Ann. Probab. 6, 1978), so that every choice of steps has the same limit, also a choice that depends
//! on W.  Otherwise this is not so (J. Gaines, T. Lyons, SIAM J. Appl. Math. 57, 1997), and adaptive steps are an
//! error that says so.  Whether diagonal noise is of this kind is tested once, before the first step, near y0 and at
//! the first and the last time, usually by 4 + 8 ⌈log₂ d⌉ evaluations for d components.  A perceptron reads all
//! components, so it is refused.  (A diffusion that reads other components only far from y0, or only at other times,
//! is not noticed.)  W comes from a [`BrownianTree`]; it does not change when an attempt is rejected and repeated.
//! The error of a step is estimated by the sum of two terms of order h^{3/2}: one for the interaction of drift, noise
//! and time, and the difference from a method of order three.  If rtol is reduced, the error at a fixed time falls
//! like rtol^{2/3}.
//!
//! **Gradients** with respect to y0, to every variable that the equation reads, and to increments that candle tracks
//! are by default exact for the steps that were run and for the given increments.  No noise is stored; the backward pass
//! computes it again from the seed.  All plans of [`Checkpoint`](crate::options::Checkpoint) can be used.
//! [`SdeOptions::gradient`] chooses the stochastic adjoint instead.
//!
//! **Speed.**  On the CPU, an equation is integrated tile by tile if its steps are fixed and of a moderate length
//! (2^±24), its noise is diagonal or scalar and not given, its state is one tensor `(rows, features)`, and all of its parts
//! are fields of [`nn`](crate::nn) that are integrated tile by tile, such as [`Mlp`](crate::nn::Mlp),
//! [`ConstantField`](crate::nn::ConstantField), or a [`Relaxation`](crate::nn::Relaxation) around one of these (a
//! diffusion is wrapped in [`OfField`]).  All other equations are solved by candle's operations.  The increments have the
//! same bits in both cases.
//!
//! **Precision.** f and g are evaluated and pulled back in compute precision.  ΔW, its products with g and with λ,
//! and every sum are in state precision.
//!
//! **Shapes.**  The first dimension of every tensor of the state is that of rows, which have independent noise.  The
//! diffusion returns tensors for the first tensors of the state, in order.  State tensors for which it returns
//! nothing have no noise.  In this way a running cost, such as the KL divergence of a latent SDE, is integrated
//! beside the state.
//!
//! ```
//! use candle_core::{DType, Device, Tensor, Var};
//! use candle_diffeq::Time;
//! use candle_diffeq::options::{Output, Steps};
//! use candle_diffeq::sde::{ito, sdeint, Noise, SdeOptions, SRI2};
//! // Geometric Brownian motion: E[Y(1)] = e^μ.
//! let (mu, sigma) = (Var::new(0.5f32, &Device::Cpu)?, Var::new(0.2f32, &Device::Cpu)?);
//! let (m, s) = (mu.as_tensor().clone(), sigma.as_tensor().clone());
//! let gbm = ito(
//!     move |_: &Time, y: &Tensor| y.broadcast_mul(&m),
//!     move |_: &Time, y: &Tensor| y.broadcast_mul(&s),
//! );
//! let options = SdeOptions {
//!     method: SRI2,
//!     steps: Steps::PerInterval(50),
//!     output: Output::Final,
//!     ..Default::default()
//! };
//! let y0 = Tensor::ones((4000, 1), DType::F32, &Device::Cpu)?;
//! let y = sdeint(gbm, &y0, &[0.0, 1.0], &Noise::seeded(7), &options)?;
//! let mean = y.mean_all()?;
//! let grads = mean.backward()?;
//! assert!((mean.to_scalar::<f32>()? - 0.5f32.exp()).abs() < 0.03);
//! assert!((grads.get(&mu).unwrap().to_scalar::<f32>()? - 0.5f32.exp()).abs() < 0.03);
//! # Ok::<(), candle_diffeq::Error>(())
//! ```

mod equation;
mod model;
mod options;

use std::any::TypeId;
use std::sync::Arc;

use candle_core::Tensor;

use crate::error::Result;
use crate::field::parts::Parts;
use crate::field::{Field, SharedField, VectorField};
use crate::gradient::Gradient;
use crate::node::{node, Source};
use crate::odeint::{solved_in_graph, states, without_graph_by, InGraph};
use crate::passes::run;
use crate::problem::Problem;
use crate::solution::Solution;
use crate::state::{Packing, State};
use crate::time::Times;

pub use crate::driven::methods::*;
pub use crate::driven::{Calculus, NoiseType, SdeMethod};
pub use crate::noise::{philox4x32, BrownianTree, Increments, Noise};
pub use equation::{ito, stratonovich, Diffusion, OfField, Sde, Without};
pub use model::NeuralSde;
pub use options::SdeOptions;

/// Solves dY = f dt + g dW from y0 and returns the states at `times`, differentiable with `loss.backward()`.
///
/// * `sde`: the equation, which owns what it reads.  Variables that its closures capture receive gradients.
/// * `y0`: a tensor, or several, of shapes `(rows, …)`.  It receives a gradient if candle tracks it.
/// * `times`: t_0 < … < t_N, as numbers.
/// * `noise`: where the increments come from; the same noise gives the same solution to the bit.
///
/// Returns a state whose tensors are in state dtype, as [`odeint`](crate::odeint) does: of shape `(times, …)` for `Output::All`, `(…)`
/// for `Output::Final`, and `(steps + 1, …)` for `Output::Steps`.
///
/// ```
/// use candle_core::{DType, Device, Tensor, Var};
/// use candle_diffeq::Time;
/// use candle_diffeq::options::Steps;
/// use candle_diffeq::sde::{sdeint, stratonovich, Increments, SdeOptions, HEUN};
/// // Increments of one's own, with a gradient: y' = y ∘ dW is exp(W) in the sense of Stratonovich.
/// let w = Var::new(&[[[0.1f64]], [[-0.3]]], &Device::Cpu)?;           // (steps, rows, channels)
/// let sde = stratonovich(|_: &Time, y: &Tensor| y.zeros_like(), |_: &Time, y: &Tensor| Ok(y.clone()));
/// let options = SdeOptions { method: HEUN, steps: Steps::PerInterval(2), ..Default::default() };
/// let y0 = Tensor::ones((1, 1), DType::F64, &Device::Cpu)?;
/// let noise = Increments::new(w.as_tensor().clone()).into();
/// let y = sdeint(sde, &y0, &[0.0, 1.0], &noise, &options)?.get(1)?.sum_all()?;
/// let grad = y.backward()?.get(&w).unwrap().flatten_all()?.to_vec1::<f64>()?;
/// assert!((y.to_scalar::<f64>()? - (-0.2f64).exp()).abs() < 0.01);
/// assert!((grad[0] - (-0.2f64).exp()).abs() < 0.05);
/// # Ok::<(), candle_diffeq::Error>(())
/// ```
///
/// # Errors
/// [`Error::Sde`](crate::Error::Sde) before any step if equation, method, noise and state do not fit together; and
/// the errors of [`odeint`](crate::odeint).
pub fn sdeint<S, F, G, M, T>(
    sde: Sde<F, G, M>,
    y0: &S,
    times: &T,
    noise: &Noise,
    options: &SdeOptions,
) -> Result<S>
where
    S: State + 'static,
    F: VectorField<S> + Send + Sync + 'static,
    G: Diffusion<S> + Send + Sync + 'static,
    M: VectorField<S> + Send + Sync + 'static,
    T: Times + ?Sized,
{
    let drive = sde.drive(noise, options).kept()?;
    let increments = drive.masters(false);
    let bind = |_| {
        let field: SharedField = Arc::new(Parts::new(equation::shared::<S, F, G, M>(sde)));
        Ok(field)
    };
    let start = (y0.leaves(), vec![], times.to_grid()?);
    let solve = |problem: &Problem, field: &Field<'_>, y0: &Tensor, keep: &dyn Fn() -> bool| {
        let problem = problem.clone().driven_by(drive.clone())?;
        run(&problem, field, y0, None, &|| {
            keep() || !increments.is_empty()
        })
    };
    let kind = TypeId::of::<(F, G, M)>();
    let InGraph {
        problem,
        field,
        theta,
        forward,
        joined,
    } = solved_in_graph(start, &options.ode(), kind, bind, solve)?;
    let theta = theta.with_increments(increments.clone());
    let problem = problem.driven_by(drive.clone())?;
    node(problem, Source::Shared(field), theta, forward, &joined)
}

/// Solves like [`sdeint`], but without candle's graph.  The equation may be borrowed and need not cross threads, and
/// gradients are computed on request.  Gradients with respect to given increments are in
/// [`Gradients::params`](crate::Gradients::params), under the tensors that were given; with
/// [`Gradient::Backsolve`] they have none.
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_diffeq::Time;
/// use candle_diffeq::options::Steps;
/// use candle_diffeq::sde::{ito, solution, Noise, SdeOptions};
/// let sde = ito(|_: &Time, y: &Tensor| y.neg(), |_: &Time, y: &Tensor| y * 0.1);
/// let options = SdeOptions { steps: Steps::PerInterval(10), ..Default::default() };
/// let y0 = Tensor::ones((3, 2), DType::F64, &Device::Cpu)?;
/// let solved = solution(&sde, &y0, &[0.0, 1.0], &Noise::seeded(1), &options)?;
/// // The equation is linear: y(1) is its derivative with respect to y0, times y0 = 1.
/// let cotangent = Tensor::stack(&[y0.zeros_like()?, y0.ones_like()?], 0)?;
/// let difference = (solved.vjp(&cotangent)?.y0 - solved.states().get(1)?)?.abs()?.max_all()?;
/// assert!(difference.to_scalar::<f64>()? < 1e-14);
/// # Ok::<(), candle_diffeq::Error>(())
/// ```
///
/// # Errors
/// As [`sdeint`].
pub fn solution<'f, S, F, G, M, T>(
    sde: &'f Sde<F, G, M>,
    y0: &S,
    times: &T,
    noise: &Noise,
    options: &SdeOptions,
) -> Result<Solution<'f, S>>
where
    S: State + 'f,
    F: VectorField<S> + 'f,
    G: Diffusion<S> + 'f,
    M: VectorField<S> + 'f,
    T: Times + ?Sized,
{
    let drive = sde.drive(noise, options).kept()?;
    let increments = drive.masters(matches!(options.gradient, Gradient::Discrete));
    let bind = |_| -> Result<Box<Field<'f>>> {
        Ok(Box::new(Parts::new(equation::borrowed::<S, F, G, M>(sde))))
    };
    let start = (y0.leaves(), vec![], times.to_grid()?);
    let driven = |problem: Problem| problem.driven_by(drive);
    without_graph_by(start, &options.ode(), bind, driven, increments)
}

/// The states at `times` without gradients: nothing is kept, so that memory does not grow with the steps.
///
/// With adaptive steps:
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_diffeq::Time;
/// use candle_diffeq::options::{Adaptive, Steps};
/// use candle_diffeq::sde::{predict, stratonovich, BrownianTree, SdeOptions, HEUN};
/// // dY = −Y dt + ½ Y ∘ dW, whose solution is Y(0) exp(−t + ½W).
/// let sde = stratonovich(|_: &Time, y: &Tensor| y.neg(), |_: &Time, y: &Tensor| y * 0.5);
/// let options = SdeOptions {
///     method: HEUN,
///     steps: Steps::Adaptive(Adaptive::new(1e-4, 1e-5)),
///     ..Default::default()
/// };
/// let noise = BrownianTree::new(7, 24)?.into();
/// let y = predict(&sde, &Tensor::ones((3, 1), DType::F64, &Device::Cpu)?, &[0.0, 1.0], &noise, &options)?;
/// let w = noise.increments(&[0.0, 1.0], (3, 1), DType::F64, &Device::Cpu)?.w().get(0)?;
/// let exact = ((w * 0.5)? - 1.0)?.exp()?;
/// let error = (y.get(1)? - exact)?.abs()?.max_all()?;
/// assert!(error.to_scalar::<f64>()? < 5e-3);
/// # Ok::<(), candle_diffeq::Error>(())
/// ```
///
/// With fixed steps:
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_diffeq::Time;
/// use candle_diffeq::options::{Output, Steps};
/// use candle_diffeq::sde::{ito, predict, Noise, SdeOptions, SRA1};
/// // Ornstein–Uhlenbeck: in the long run the variance is σ²/2θ = ½.
/// let ou = ito(|_: &Time, y: &Tensor| y.neg(), |_: &Time, y: &Tensor| y.ones_like()).additive();
/// let options = SdeOptions {
///     method: SRA1,
///     steps: Steps::PerInterval(200),
///     output: Output::Final,
///     ..Default::default()
/// };
/// let y0 = Tensor::zeros((5000, 1), DType::F32, &Device::Cpu)?;
/// let y = predict(&ou, &y0, &[0.0, 10.0], &Noise::seeded(3), &options)?;
/// assert!((y.sqr()?.mean_all()?.to_scalar::<f32>()? - 0.5).abs() < 0.05);
/// # Ok::<(), candle_diffeq::Error>(())
/// ```
///
/// # Errors
/// As [`sdeint`].
pub fn predict<S, F, G, M, T>(
    sde: &Sde<F, G, M>,
    y0: &S,
    times: &T,
    noise: &Noise,
    options: &SdeOptions,
) -> Result<S>
where
    S: State,
    F: VectorField<S>,
    G: Diffusion<S>,
    M: VectorField<S>,
    T: Times + ?Sized,
{
    let (y0, ode) = (y0.leaves(), options.ode());
    let problem = Problem::new(&y0, times.to_grid()?, &ode)?.keeping_nothing();
    let field = Parts::new(equation::borrowed::<S, F, G, M>(sde));
    let problem = problem.meeting(&field.jumps(), &ode)?;
    let problem = problem.driven_by(sde.drive(noise, options))?;
    let y0 = Packing::join(&y0, problem.state())?;
    states(&problem, run(&problem, &field, &y0, None, &|| false)?)
}
