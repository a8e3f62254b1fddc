//! Neural controlled differential equations: z' = F(z) X'(t), z(t_0) = ζ(X(t_0)).
//!
//! The state of a neural CDE is driven by data: X is a [path](ControlPath) through observations, which may be
//! irregular and partly missing.  P. Kidger, J. Morrill, J. Foster, T. Lyons, "Neural controlled differential equations for irregular
//! time series" (NeurIPS 2020).
//!
//! For a given path, a CDE is an ordinary differential equation in z, and everything that the crate does with
//! ordinary differential equations works here, too: methods, fixed and adaptive steps, precisions, checkpoints,
//! statistics, gradients that are exact for the steps that were run.  Gradients reach the observations if candle
//! tracks them.
//!
//! * Steps: with [`ControlPath::knots`] as times, there is one step for each interval of the path, or n steps with
//!   [`Steps::PerInterval`](crate::options::Steps::PerInterval); [`Output::Final`](crate::options::Output::Final)
//!   returns only the last state.  Other times are possible: steps are cut where the slope of the path jumps.
//! * Precision: the slope is formed in the dtype of the observations, f32 at least.  Where it meets F, it is converted to
//!   the dtype in which F is given z.  This is the compute dtype, with one exception: if f16 or bf16 are emulated by rounded
//!   f32 ([`Arithmetic::Rounded`](crate::options::Arithmetic::Rounded), on the CPU the default), the slope stays in f32.  The
//!   product F X' is summed in f32 at least and rounded to compute precision in any case.

use std::sync::Arc;

use candle_core::{DType, Device, Module, Tensor};
use candle_nn::{VarBuilder, VarMap};

pub use crate::controlled::{ControlledField, ControlledPullback};
pub use crate::path::{ControlPath, Observations};

use crate::controlled::Driven;
use crate::error::{Error, PathDefect, Result};
use crate::neural_ode::NeuralOde;
use crate::odeint::odeint_with;
use crate::precision::Precision;
use crate::problem::OdeOptions;
use crate::solution::Solution;
use crate::tableau::Tableau;
use crate::time::Times;

/// Solves z' = F(t, z) X'(t) from z0 along a path and returns the states at `times`, differentiable with
/// `loss.backward()`.
///
/// * `field`: a closure `|t: &Time, z: &Tensor| …` that returns `(rows, hidden, channels)`, or any [`ControlledField`].
/// * `z0`: `(rows, hidden)`, with the rows of the path.
/// * `path`: built from [`Observations`], which receive gradients if candle tracks them.
/// * `times`: within the knots of the path, in either direction.
///
/// Options and result are those of [`odeint`](crate::odeint()).
///
/// ```
/// use candle_core::{Device, IndexOp, Tensor, Var};
/// use candle_diffeq::{OdeOptions, Time};
/// use candle_diffeq::cde::{cdeint, Observations};
/// // z' = z X', so that z = z_0 exp(X − X_0), whatever way the path takes.
/// let xs = Var::from_tensor(&Tensor::new(&[[[0f64], [2.0], [1.0]]], &Device::Cpu)?)?;
/// let path = Observations::at(&[0.0, 0.3, 1.0], &xs)?.hermite()?;
/// let steps = candle_diffeq::options::Steps::PerInterval(100);
/// let options = OdeOptions { steps, ..Default::default() };
/// let z0 = Tensor::new(&[[1f64]], &Device::Cpu)?;
/// let zs = cdeint(|_: &Time, z: &Tensor| z.unsqueeze(2), &z0, &path, path.knots(), &options)?;
/// let end = zs.i((2, 0, 0))?;
/// assert!((end.to_scalar::<f64>()? - 1f64.exp()).abs() < 1e-5);
/// let grads = end.backward()?;
/// let grad = grads.get(&xs).unwrap().flatten_all()?.to_vec1::<f64>()?;
/// assert!((grad[0] + 1f64.exp()).abs() < 1e-4 && grad[1].abs() < 1e-4 && (grad[2] - 1f64.exp()).abs() < 1e-4);
/// # Ok::<(), candle_diffeq::Error>(())
/// ```
///
/// # Errors
/// [`PathDefect::State`], [`PathDefect::Matrix`], [`PathDefect::Channels`], [`PathDefect::Outside`], and those of
/// [`odeint`](crate::odeint()).
pub fn cdeint<F, T>(
    field: F,
    z0: &Tensor,
    path: &ControlPath,
    times: &T,
    options: &OdeOptions,
) -> Result<Tensor>
where
    F: ControlledField + Send + Sync + 'static,
    T: Times + ?Sized,
{
    odeint_with(Driven(field), z0, path, times, options)
}

/// A neural CDE: constructors of ζ and F, their variables, and how to solve.
///
/// ζ maps X(t_0), `(rows, channels)`, to z(t_0), `(rows, hidden)`; it is any candle module, evaluated once in the
/// dtype of its variables.  F is any [`ControlledField`], evaluated in compute precision.  The constructors are
/// called like those of [`NeuralOde`], under the prefixes `<prefix>.initial` and `<prefix>.field`.
///
/// ```
/// use candle_core::{DType, Device, IndexOp, Tensor};
/// use candle_diffeq::{OdeOptions, Precision};
/// use candle_diffeq::cde::{NeuralCde, Observations};
/// use candle_diffeq::nn::{Activation, CdeMlp};
/// use candle_diffeq::options::Output;
/// let (vars, device, channels, hidden) = (candle_nn::VarMap::new(), Device::Cpu, 3, 8);
/// let cde = NeuralCde::new(
///     &vars, "cde", DType::F32, &device,
///     move |vb| candle_nn::linear(channels, hidden, vb),
///     move |vb| CdeMlp::new(&[hidden, 32], channels, Activation::Relu, vb),
/// )?
/// .options(OdeOptions { output: Output::Final, ..Default::default() })
/// .precision(Precision::bf16());
/// let xs = Tensor::randn(0f32, 1.0, (4, 10, channels - 1), &device)?;
/// let path = Observations::new(&xs)?.with_time()?.hermite()?;
/// let z = cde.solve(&path, path.knots())?;                          // (4, 8): z at the last time
/// let grads = z.sqr()?.mean_all()?.backward()?;
/// assert_eq!(vars.all_vars().iter().filter(|v| grads.get(v).is_some()).count(), 6);
/// # Ok::<(), candle_diffeq::Error>(())
/// ```
pub struct NeuralCde {
    field: NeuralOde<Tensor, ControlPath>,
    initial: Arc<Initial>,
    vars: VarMap,
    dtype: DType,
    device: Device,
}

/// Builds ζ.
type Initial = dyn Fn(VarBuilder<'_>) -> candle_core::Result<Box<dyn Module>> + Send + Sync;

impl NeuralCde {
    /// A model of `initial`, which builds ζ, and `field`, which builds F.  Variables that `vars` does not hold yet
    /// are created in it, in `dtype`.
    ///
    /// # Errors
    /// Those of the constructors.
    pub fn new<F, B, M, I>(
        vars: &VarMap,
        prefix: &str,
        dtype: DType,
        device: &Device,
        initial: I,
        field: B,
    ) -> Result<Self>
    where
        F: ControlledField + 'static,
        B: Fn(VarBuilder<'_>) -> candle_core::Result<F> + Send + Sync + 'static,
        M: Module + 'static,
        I: Fn(VarBuilder<'_>) -> candle_core::Result<M> + Send + Sync + 'static,
    {
        let under = |part: &str| match prefix {
            "" => part.to_owned(),
            _ => format!("{prefix}.{part}"),
        };
        let name = under("initial");
        let initial = move |vb: VarBuilder<'_>| {
            let module: Box<dyn Module> = Box::new(initial(vb.pp(&name))?);
            Ok(module)
        };
        let build = move |vb: VarBuilder<'_>| field(vb).map(Driven);
        let cde = Self {
            field: NeuralOde::with_args(vars, &under("field"), dtype, device, build)?,
            initial: Arc::new(initial),
            vars: vars.clone(),
            dtype,
            device: device.clone(),
        };
        // So that the optimiser finds the variables.
        cde.initial()?;
        Ok(cde)
    }

    /// Sets the method.
    #[must_use]
    pub fn method(self, method: Tableau) -> Self {
        Self {
            field: self.field.method(method),
            ..self
        }
    }

    /// Sets the dtype roles.
    #[must_use]
    pub fn precision(self, precision: Precision) -> Self {
        Self {
            field: self.field.precision(precision),
            ..self
        }
    }

    /// All options at once; they replace a method and a precision set before.
    #[must_use]
    pub fn options(self, options: OdeOptions) -> Self {
        Self {
            field: self.field.options(options),
            ..self
        }
    }

    /// Names of F's parameters in the `VarMap`.
    pub fn parameters(&self) -> &[String] {
        self.field.parameters()
    }

    /// ζ(X(t)), `(rows, hidden)`, differentiable.
    ///
    /// # Errors
    /// Those of ζ, [`PathDefect::Outside`] and [`PathDefect::Initial`].
    pub fn initial_state(&self, path: &ControlPath, t: f64) -> Result<Tensor> {
        let x = path.evaluate(t)?.to_dtype(self.dtype)?;
        let z0 = self.initial()?.forward(&x)?;
        if z0.rank() != 2 || z0.dims()[0] != path.rows() {
            let (rows, got) = (path.rows(), z0.shape().clone());
            return Err(PathDefect::Initial { rows, got }.into());
        }
        Ok(z0)
    }

    /// The states at `times`.  At the first time, z = ζ(X).  The states are differentiable with respect to every
    /// parameter, to tracked observations, and to `times` if these are a tracked tensor.  Gradients with respect to
    /// t_0 do not include that ζ(X(t_0)) depends on t_0.
    ///
    /// # Errors
    /// As [`cdeint`], and [`initial_state`](Self::initial_state).
    pub fn solve<T: Times + ?Sized>(&self, path: &ControlPath, times: &T) -> Result<Tensor> {
        self.solve_from(&self.start(path, times)?, path, times)
    }

    /// The same as [`solve`](Self::solve), but from a state z(t_0) that is given.
    ///
    /// # Errors
    /// As [`cdeint`].
    pub fn solve_from<T: Times + ?Sized>(
        &self,
        z0: &Tensor,
        path: &ControlPath,
        times: &T,
    ) -> Result<Tensor> {
        self.field.given(path).solve(z0, times)
    }

    /// The same as [`solve`](Self::solve) without a graph; gradients with respect to z(t_0) and F are computed by
    /// [`Solution::vjp`].
    ///
    /// # Errors
    /// As [`solve`](Self::solve).
    pub fn solution<T: Times + ?Sized>(
        &self,
        path: &ControlPath,
        times: &T,
    ) -> Result<Solution<'static, Tensor>> {
        let z0 = self.start(path, times)?.detach();
        self.field.given(path).solution(&z0, times)
    }

    /// The states at `times` without gradients; nothing is kept for a backward pass.
    ///
    /// # Errors
    /// As [`solve`](Self::solve).
    pub fn predict<T: Times + ?Sized>(&self, path: &ControlPath, times: &T) -> Result<Tensor> {
        let z0 = self.start(path, times)?.detach();
        self.field.given(path).predict(&z0, times)
    }

    fn start<T: Times + ?Sized>(&self, path: &ControlPath, times: &T) -> Result<Tensor> {
        let grid = times.to_grid()?;
        let t0 = grid.points().first().ok_or(Error::EmptyGrid)?;
        self.initial_state(path, *t0)
    }

    /// ζ over the variables as they are now.
    fn initial(&self) -> candle_core::Result<Box<dyn Module>> {
        (self.initial)(VarBuilder::from_varmap(
            &self.vars,
            self.dtype,
            &self.device,
        ))
    }
}

impl std::fmt::Debug for NeuralCde {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("NeuralCde")
            .field("field", &self.field)
            .finish_non_exhaustive()
    }
}
