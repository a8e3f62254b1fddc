//! A candle model as a stochastic differential equation, in any precision, with f32 master weights.

use std::sync::{Arc, Mutex, PoisonError};

use candle_core::{DType, Device, Tensor};
use candle_nn::{VarBuilder, VarMap};

use super::{equation, Diffusion, Sde, SdeOptions};
use crate::driven::{Drive, Equation};
use crate::error::{Error, Result};
use crate::field::parts::Parts;
use crate::field::{OwnedField, VectorField};
use crate::neural_ode::NeuralOde;
use crate::noise::Noise;
use crate::solution::Solution;
use crate::state::State;
use crate::time::Times;

/// A neural SDE: a constructor of its equation, its variables, and how to solve.
///
/// As with [`NeuralOde`], θ is exactly the names that the constructor asks for under its prefix; the constructor is called
/// several times and must build the same equation each time; create the optimiser after the model.
///
/// ```
/// use candle_core::{DType, Device, Module, Tensor};
/// use candle_diffeq::{Precision, Time};
/// use candle_diffeq::options::Steps;
/// use candle_diffeq::sde::{ito, NeuralSde, Noise, SdeOptions};
/// use candle_nn::Init;
/// let (vars, device) = (candle_nn::VarMap::new(), Device::Cpu);
/// let sde = NeuralSde::new(&vars, "sde", DType::F32, &device, |vb| {
///     let drift = candle_nn::linear(2, 2, vb.pp("drift"))?;
///     let spread = vb.get_with_hints(2, "spread", Init::Const(0.1))?;
///     Ok(ito(
///         move |_: &Time, y: &Tensor| drift.forward(y)?.tanh(),
///         move |_: &Time, y: &Tensor| spread.broadcast_as(y.shape()),
///     )
///     .additive())
/// })?
/// .options(SdeOptions {
///     precision: Some(Precision::bf16()),
///     steps: Steps::PerInterval(20),
///     ..Default::default()
/// });
/// let y0 = Tensor::zeros((16, 2), DType::F32, &device)?;
/// let ys = sde.solve(&y0, &[0.0, 0.5, 1.0], &Noise::seeded(1))?;        // (3, 16, 2), f32
/// let grads = ys.sqr()?.mean_all()?.backward()?;
/// assert_eq!(vars.all_vars().iter().filter(|v| grads.get(v).is_some()).count(), 3);
/// # Ok::<(), candle_diffeq::Error>(())
/// ```
pub struct NeuralSde<S = Tensor> {
    model: NeuralOde<S>,
    equation: Equation,
    options: SdeOptions,
}

impl<S: State + 'static> NeuralSde<S> {
    /// The model that a constructor builds: it returns [`ito`](super::ito)`(drift, diffusion)` or
    /// [`stratonovich`](super::stratonovich)`(drift, diffusion)` with the noise declared.  Variables that `vars` does not
    /// hold yet are created in it, in `dtype`.
    ///
    /// # Errors
    /// Those of the constructor; the variables that it had created are removed again.
    pub fn new<F, G, M, B>(
        vars: &VarMap,
        prefix: &str,
        dtype: DType,
        device: &Device,
        build: B,
    ) -> Result<Self>
    where
        F: VectorField<S> + 'static,
        G: Diffusion<S> + 'static,
        M: VectorField<S> + 'static,
        B: Fn(VarBuilder<'_>) -> candle_core::Result<Sde<F, G, M>> + Send + Sync + 'static,
    {
        let declared: Arc<Mutex<Option<Equation>>> = Arc::default();
        let seen = Arc::clone(&declared);
        let factory = move |vb: VarBuilder<'_>, _: Option<Vec<Tensor>>| {
            let sde = build(vb)?;
            *seen.lock().unwrap_or_else(PoisonError::into_inner) = Some(sde.equation);
            let field: OwnedField = Box::new(Parts::new(equation::owned::<S, F, G, M>(sde)));
            Ok(Some(field))
        };
        let model = NeuralOde::from_factory(vars, prefix, dtype, device, factory)?;
        let equation = *declared.lock().unwrap_or_else(PoisonError::into_inner);
        let options = SdeOptions::default();
        Ok(Self {
            model: model.options(options.ode()),
            // The constructor has been called.
            equation: equation.ok_or(Error::NothingKept)?,
            options,
        })
    }

    /// All options at once.
    #[must_use]
    pub fn options(self, options: SdeOptions) -> Self {
        Self {
            model: self.model.options(options.ode()),
            options,
            ..self
        }
    }

    /// Freezes parameters, as [`NeuralOde::freeze`].
    ///
    /// # Errors
    /// As [`NeuralOde::freeze`].
    pub fn freeze(self, names: &[&str]) -> Result<Self> {
        Ok(Self {
            model: self.model.freeze(names)?,
            ..self
        })
    }

    /// Names of the parameters in the `VarMap`, in the order in which the constructor asks.
    pub fn parameters(&self) -> &[String] {
        self.model.parameters()
    }

    fn drive(&self, noise: &Noise) -> Drive {
        Drive {
            method: self.options.method,
            equation: self.equation,
            noise: noise.clone(),
            samples: self.options.samples,
        }
    }

    /// The states at `times`, differentiable in y0, every parameter and given increments; arguments, result and errors as
    /// [`sdeint`](super::sdeint).
    ///
    /// # Errors
    /// As [`sdeint`](super::sdeint), and those of parameters.
    pub fn solve<T: Times + ?Sized>(&self, y0: &S, times: &T, noise: &Noise) -> Result<S> {
        let drive = self.drive(noise).kept()?;
        let solve = self.model.run((y0, &()), times, None, true, Some(&drive))?;
        solve.in_graph()
    }

    /// Solves without candle's graph; gradients are computed by [`Solution::vjp`].
    ///
    /// # Errors
    /// As [`solve`](Self::solve).
    pub fn solution<T: Times + ?Sized>(
        &self,
        y0: &S,
        times: &T,
        noise: &Noise,
    ) -> Result<Solution<'static, S>> {
        let drive = self.drive(noise).kept()?;
        let solve = self
            .model
            .run((y0, &()), times, None, false, Some(&drive))?;
        Solution::new(solve.problem, solve.field, solve.theta, solve.forward)
    }

    /// The states at `times` for a model that is used and not trained: nothing is kept.
    ///
    /// # Errors
    /// As [`solve`](Self::solve).
    pub fn predict<T: Times + ?Sized>(&self, y0: &S, times: &T, noise: &Noise) -> Result<S> {
        let drive = self.drive(noise);
        self.model.predict_given(y0, &(), times, Some(&drive))
    }
}

impl<S> std::fmt::Debug for NeuralSde<S> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("NeuralSde")
            .field("equation", &self.equation)
            .field("options", &self.options)
            .finish_non_exhaustive()
    }
}
