//! A candle model as a vector field, in any precision, with f32 master weights.
//!
//! The model's constructor is called on a `VarBuilder` of ours: once to record which names it asks
//! for, and at every solve to build it over private copies of these variables, rounded to compute
//! precision.  The user's variables are read once a solve and never written.  If a field of this crate is
//! integrated tile by tile in the precision of the variables, the solve packs the weights directly from
//! the user's variables, and builds no model.

mod display;
mod events;
mod model;
mod run;

use std::collections::HashMap;
use std::marker::PhantomData;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use candle_core::{DType, Device, Module, Tensor, TensorId, Var};
use candle_nn::{VarBuilder, VarMap};

use crate::error::Result;
use crate::field::{Bound, FieldWithArgs, Free, Leaves, OwnedField, SharedField, VectorField};
use crate::loss::RowLoss;
use crate::node::{in_graph, node};
use crate::offer::Offered;
use crate::precision::{Precision, Rounding};
use crate::problem::{OdeOptions, Problem};
use crate::solution::Solution;
use crate::state::State;
use crate::tableau::Tableau;
use crate::time::Times;
use model::{Factory, OfModule, Recording, Undo};
pub(crate) use run::Solve;

/// A neural ODE y' = f_θ(t, y): a model constructor, its variables, and how to solve.
///
/// θ is exactly the names that the constructor asks for under its prefix.  Several of them, and
/// any other layers, may share one `VarMap`.
///
/// The constructor is called several times: once when the `NeuralOde` is created, which creates the variables; up to
/// twice in every solve; once in its backward pass; and for each parameter that is checked against differences
/// ([`OdeOptions::check`]).  It must build the same model each time, from nothing but the `VarBuilder`.  The
/// model itself never crosses threads, so it may be candle's `Sequential` or hold boxed modules.  Create the
/// optimiser after the `NeuralOde`, because `vars` does not hold the model's variables before.
///
/// `S` is the state and `A` the arguments: the type of a model of one tensor is `NeuralOde`, that of a flow
/// `NeuralOde<(Tensor, Tensor)>`, and that of a model with an argument `NeuralOde<Tensor, Tensor>`.
///
/// ```
/// use candle_core::{Device, IndexOp, Tensor};
/// use candle_diffeq::{NeuralOde, Precision};
/// use candle_diffeq::tableau::RK4;
/// use candle_nn::{linear, Activation, AdamW, Module, Optimizer, ParamsAdamW, Sequential, VarMap};
///
/// let (vars, device) = (VarMap::new(), Device::Cpu);
/// let ode = NeuralOde::new(&vars, "ode", &device, |vb| {
///     let (l1, l2) = (linear(2, 16, vb.pp("l1"))?, linear(16, 2, vb.pp("l2"))?);
///     Ok(candle_nn::func(move |y| l2.forward(&l1.forward(y)?.tanh()?)))
/// })?
/// .method(RK4)
/// .precision(Precision::bf16());                        // f32 master weights stay in `vars`
///
/// let mut optimiser = AdamW::new(vars.all_vars(), ParamsAdamW::default())?;
/// let y0 = Tensor::randn(0f32, 1.0, (32, 2), &device)?;
/// let ys = ode.solve(&y0, &[0.0, 0.5, 1.0])?;           // (3, 32, 2), f32
/// let loss = ys.i(2)?.sqr()?.mean_all()?;
/// optimiser.backward_step(&loss)?;
/// # Ok::<(), candle_diffeq::Error>(())
/// ```
pub struct NeuralOde<S = Tensor, A = ()> {
    vars: VarMap,
    names: Vec<String>,
    device: Device,
    factory: Arc<Factory>,
    packable: Option<Packable>,
    options: OdeOptions,
    /// Parameters that stand still.
    frozen: Vec<String>,
    /// A number that identifies this model among all models of the process.
    identity: u64,
    /// How many more times the field is to be compared with differences, for each kind of input.
    checks: Mutex<HashMap<u64, usize>>,
    /// Evaluations of the last forward pass, 0 before the first.
    last: AtomicUsize,
    state: PhantomData<fn() -> (S, A)>,
}

/// Models of this process so far.
static MODELS: AtomicU64 = AtomicU64::new(1);

impl NeuralOde<Tensor> {
    /// A model without time, any candle `Module`.  Variables that `vars` does not hold yet are
    /// created in it, in f32.
    ///
    /// ```
    /// use candle_core::{DType, Device, Module, Tensor};
    /// use candle_diffeq::NeuralOde;
    /// use candle_nn::{linear, seq, Activation, VarMap};
    /// let (vars, device) = (VarMap::new(), Device::Cpu);
    /// let ode = NeuralOde::new(&vars, "f", &device, |vb| {
    ///     let hidden = seq().add(linear(2, 16, vb.pp(0))?).add(Activation::Silu);
    ///     Ok(hidden.add(linear(16, 2, vb.pp(1))?))
    /// })?;
    /// // A boxed module is called by a closure.
    /// let boxed = NeuralOde::new(&vars, "g", &device, |vb| {
    ///     let model: Box<dyn Module> = Box::new(linear(2, 2, vb)?);
    ///     Ok(move |y: &Tensor| model.forward(y))
    /// })?;
    /// let y0 = Tensor::ones((4, 2), DType::F32, &device)?;
    /// let y = boxed.solve(&ode.solve(&y0, &[0.0, 1.0])?.get(1)?, &[0.0, 1.0])?;
    /// assert_eq!(y.dims(), [2, 4, 2]);
    /// # Ok::<(), candle_diffeq::Error>(())
    /// ```
    ///
    /// # Errors
    /// Those of the constructor; the variables that it had created are removed again.
    pub fn new<M, B>(vars: &VarMap, prefix: &str, device: &Device, build: B) -> Result<Self>
    where
        M: Module + 'static,
        B: Fn(VarBuilder<'_>) -> candle_core::Result<M> + Send + Sync + 'static,
    {
        Self::from_field(vars, prefix, DType::F32, device, move |vb| {
            build(vb).map(OfModule)
        })
    }
}

impl<S: State + 'static> NeuralOde<S> {
    /// A model of time and state: the constructor returns a closure `|t: &Time, y: &S| …` or any
    /// other [`VectorField`].  Variables are created in `dtype` (f64 for studies).
    ///
    /// ```
    /// use candle_core::{DType, Device, Module, Tensor};
    /// use candle_diffeq::{NeuralOde, Time};
    /// let vars = candle_nn::VarMap::new();
    /// let ode = NeuralOde::from_field(&vars, "ode", DType::F32, &Device::Cpu, |vb| {
    ///     let l = candle_nn::linear(3, 2, vb)?;
    ///     Ok(move |t: &Time, y: &Tensor| {
    ///         let t = t.tensor()?.to_dtype(y.dtype())?.broadcast_as((y.dim(0)?, 1))?;
    ///         l.forward(&Tensor::cat(&[y, &t], 1)?)
    ///     })
    /// })?;
    /// let ys = ode.solve(&Tensor::ones((4, 2), DType::F32, &Device::Cpu)?, &[0.0, 1.0])?;
    /// assert_eq!(ys.dims(), [2, 4, 2]);
    /// # Ok::<(), candle_diffeq::Error>(())
    /// ```
    ///
    /// # Errors
    /// Those of the constructor; the variables that it had created are removed again.
    pub fn from_field<F, B>(
        vars: &VarMap,
        prefix: &str,
        dtype: DType,
        device: &Device,
        build: B,
    ) -> Result<Self>
    where
        F: VectorField<S> + 'static,
        B: Fn(VarBuilder<'_>) -> candle_core::Result<F> + Send + Sync + 'static,
    {
        Self::with_args(vars, prefix, dtype, device, move |vb| build(vb).map(Free))
    }

    /// The states at `times`, differentiable in y0, every parameter and, if a tracked tensor,
    /// `times`; arguments, result and errors as [`odeint`](crate::odeint).
    ///
    /// # Errors
    /// As `odeint`, and those of parameters: dtype, device, or read without the constructor having
    /// asked for them.
    pub fn solve<T: Times + ?Sized>(&self, y0: &S, times: &T) -> Result<S> {
        self.given(&()).solve(y0, times)
    }

    /// A loss of the states at `times`, a scalar of state dtype, differentiable as [`solve`](Self::solve)
    /// is: what `loss.of(&ode.solve(y0, times)?)` is, to rounding.
    ///
    /// If the field is integrated tile by tile, each tile runs its backward pass directly after its forward pass:
    /// its last evaluations, up to 12 MiB per thread, are still in cache and are not repeated, which saves a
    /// tenth of the time or more.  No states are returned, and gradients are always computed, even if nobody asks
    /// for them.  Two separate passes are used with a fixed scale in f16, with a store precision below that of the
    /// state, and with a target that itself needs a gradient.
    ///
    /// ```
    /// use candle_core::{DType, Device, Tensor};
    /// use candle_diffeq::NeuralOde;
    /// use candle_diffeq::nn::{Activation, Mlp, RowLoss};
    /// let vars = candle_nn::VarMap::new();
    /// let ode = NeuralOde::new(&vars, "f", &Device::Cpu, |vb| {
    ///     Mlp::new(&[2, 16, 2], Activation::Tanh, vb)
    /// })?;
    /// let y0 = Tensor::ones((8, 2), DType::F32, &Device::Cpu)?;
    /// let target = Tensor::zeros((2, 8, 2), DType::F32, &Device::Cpu)?;
    /// let loss = ode.loss(&y0, &[0.0, 1.0], &RowLoss::MeanSquaredError(target))?;
    /// let grads = loss.backward()?;
    /// assert_eq!(vars.all_vars().iter().filter(|v| grads.get(v).is_some()).count(), 4);
    /// # Ok::<(), candle_diffeq::Error>(())
    /// ```
    ///
    /// # Errors
    /// As [`solve`](Self::solve), [`Error::Loss`](crate::Error::Loss).
    pub fn loss<T: Times + ?Sized>(&self, y0: &S, times: &T, loss: &RowLoss) -> Result<Tensor> {
        self.given(&()).loss(y0, times, loss)
    }

    /// The same as [`solve`](Self::solve) without a graph; gradients are computed by [`Solution::vjp`].  The data
    /// that they need is kept; use [`predict`](Self::predict) if no gradients are wanted.
    ///
    /// # Errors
    /// As [`solve`](Self::solve).
    pub fn solution<T: Times + ?Sized>(&self, y0: &S, times: &T) -> Result<Solution<'static, S>> {
        self.given(&()).solution(y0, times)
    }

    /// The states at `times` for a model that is used and not trained: without gradients, and nothing is
    /// kept, so that memory does not grow with the steps.
    ///
    /// # Errors
    /// As [`solve`](Self::solve).
    pub fn predict<T: Times + ?Sized>(&self, y0: &S, times: &T) -> Result<S> {
        self.given(&()).predict(y0, times)
    }
}

impl<S: State + 'static, A: State + 'static> NeuralOde<S, A> {
    /// A model of time, state and arguments: the constructor returns a closure
    /// `|t: &Time, y: &S, args: &A| …` or any other [`FieldWithArgs`].  Its solves begin with
    /// [`given`](Self::given).
    ///
    /// ```
    /// use candle_core::{DType, Device, Module, Tensor, D};
    /// use candle_diffeq::{NeuralOde, Time};
    /// let (vars, device) = (candle_nn::VarMap::new(), Device::Cpu);
    /// let vb = candle_nn::VarBuilder::from_varmap(&vars, DType::F32, &device);
    /// let encoder = candle_nn::linear(5, 3, vb.pp("encoder"))?;
    /// let ode = NeuralOde::with_args(&vars, "f", DType::F32, &device, |vb| {
    ///     let l = candle_nn::linear(2 + 3, 2, vb)?;
    ///     Ok(move |_: &Time, y: &Tensor, context: &Tensor| {
    ///         l.forward(&Tensor::cat(&[y, context], D::Minus1)?)?.tanh()
    ///     })
    /// })?;
    /// let context = encoder.forward(&Tensor::ones((8, 5), DType::F32, &device)?)?;
    /// let ys = ode.given(&context).solve(&Tensor::zeros((8, 2), DType::F32, &device)?, &[0.0, 1.0])?;
    /// let grads = ys.get(1)?.sum_all()?.backward()?;                     // one pass through the encoder
    /// assert_eq!(vars.all_vars().iter().filter(|v| grads.get(v).is_some()).count(), 4);
    /// # Ok::<(), candle_diffeq::Error>(())
    /// ```
    ///
    /// # Errors
    /// Those of the constructor; the variables that it had created are removed again.
    pub fn with_args<F, B>(
        vars: &VarMap,
        prefix: &str,
        dtype: DType,
        device: &Device,
        build: B,
    ) -> Result<Self>
    where
        F: FieldWithArgs<S, A> + 'static,
        B: Fn(VarBuilder<'_>) -> candle_core::Result<F> + Send + Sync + 'static,
    {
        let factory = move |vb: VarBuilder<'_>, args: Option<Vec<Tensor>>| {
            let field = Box::new(build(vb)?);
            let Some(args) = args else { return Ok(None) };
            let bound = Box::new(Bound {
                field,
                args: A::from_leaves(args.clone())?,
            });
            let field: OwnedField = Box::new(Leaves::<Box<_>, S>::with_args(bound, &args));
            Ok(Some(field))
        };
        Self::from_factory(vars, prefix, dtype, device, factory)
    }

    /// A model that a factory builds, given its arguments or none.
    pub(crate) fn from_factory(
        vars: &VarMap,
        prefix: &str,
        dtype: DType,
        device: &Device,
        build: impl Fn(VarBuilder<'_>, Option<Vec<Tensor>>) -> candle_core::Result<Option<OwnedField>>
            + Send
            + Sync
            + 'static,
    ) -> Result<Self> {
        let prefix = prefix.to_owned();
        let factory = move |vb: VarBuilder<'_>, args: Option<Vec<Tensor>>| {
            let vb = if prefix.is_empty() {
                vb
            } else {
                vb.pp(&prefix)
            };
            build(vb, args)
        };
        let mut asked = Undo {
            vars: vars.clone(),
            asked: Arc::default(),
        };
        let recording = Recording {
            vars: vars.clone(),
            asked: Arc::clone(&asked.asked),
        };
        let vb = VarBuilder::from_backend(Box::new(recording), dtype, device.clone());
        // Only a field without arguments can be looked at before there are some.
        let none = A::from_leaves(vec![]).is_ok().then(Vec::new);
        let field = factory(vb, none)?;
        let mut ode = Self {
            vars: vars.clone(),
            names: asked.keep(),
            device: device.clone(),
            factory: Arc::new(factory),
            packable: None,
            options: OdeOptions::default(),
            frozen: vec![],
            identity: MODELS.fetch_add(1, Ordering::Relaxed),
            checks: Mutex::default(),
            last: AtomicUsize::new(0),
            state: PhantomData,
        };
        let ids: Vec<_> = ode.masters()?.iter().map(|var| var.id()).collect();
        let offered = Offered::from(field.and_then(|field| field.offer()));
        let as_they_are = |offered: &Offered| {
            // What a constructor computes from variables must be computed anew for each solve.
            let all = |weights: Vec<Tensor>| weights.iter().all(|w| ids.contains(&w.id()));
            offered.weights().is_some_and(all)
        };
        let field = offered.filter(as_they_are).map(|offered| offered.shared);
        ode.packable = field.map(|field| Packable { field, ids });
        Ok(ode)
    }

    /// Sets the method.
    #[must_use]
    pub fn method(mut self, method: Tableau) -> Self {
        self.options.method = method;
        self
    }

    /// Sets the dtype roles.
    #[must_use]
    pub fn precision(mut self, precision: Precision) -> Self {
        self.options.precision = Some(precision);
        self
    }

    /// The same with the options that `adjust` makes of its own.
    pub(crate) fn adjusted(mut self, adjust: impl FnOnce(OdeOptions) -> OdeOptions) -> Self {
        self.options = adjust(self.options);
        self
    }

    /// All options at once; they replace a method and a precision set before.
    #[must_use]
    pub fn options(mut self, options: OdeOptions) -> Self {
        self.options = options;
        self
    }

    /// Freezes the parameters with these names, which are names that [`parameters`](Self::parameters) lists: the
    /// model reads them as constants, and they receive no gradient.
    ///
    /// # Errors
    /// candle's, of a name that the constructor did not ask for.
    pub fn freeze(mut self, names: &[&str]) -> Result<Self> {
        for name in names {
            if !self.names.iter().any(|n| n == name) {
                let path = (*name).to_owned();
                return Err(candle_core::Error::CannotFindTensor { path }.into());
            }
            self.frozen.push((*name).to_owned());
        }
        if !names.is_empty() {
            self.packable = None;
        }
        Ok(self)
    }

    /// Names of the parameters in the `VarMap`, in the order in which the constructor asks.
    pub fn parameters(&self) -> &[String] {
        &self.names
    }

    /// The model with the arguments of a solve, tracked or not; see [`FieldWithArgs`].
    pub fn given<'a>(&'a self, args: &'a A) -> Given<'a, S, A> {
        Given { ode: self, args }
    }

    /// How often the field is still to be compared with differences where it is given tensors of this kind.
    fn checks_left(&self, kind: u64) -> usize {
        let checks = self.checks.lock().unwrap_or_else(PoisonError::into_inner);
        checks.get(&kind).copied().unwrap_or(3)
    }

    /// The field that reads the user's variables directly, if a solve may use it: on the CPU, if the variables
    /// are still those that the field was built from and need neither rounding nor a cast.
    fn packable(&self, problem: &Problem, masters: &[Var]) -> Option<SharedField> {
        let Packable { field, ids } = self.packable.as_ref()?;
        let same = masters.iter().map(|var| var.id()).eq(ids.iter().copied());
        let Rounding { to, held } = problem.theta;
        let as_they_are = to == held && masters.iter().all(|var| var.dtype() == held);
        // A continuous adjoint evaluates the field again, over parameters of its own.
        let same = same && problem.continuous.is_none();
        (same && as_they_are && problem.device().is_cpu()).then(|| Arc::clone(field))
    }

    /// The user's variables, in the order of their names.
    fn masters(&self) -> Result<Vec<Var>> {
        let data = self
            .vars
            .data()
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let of = |name: &String| match data.get(name) {
            Some(var) => Ok(var.clone()),
            None => Err(candle_core::Error::CannotFindTensor { path: name.clone() }.into()),
        };
        self.names.iter().map(of).collect()
    }
}

/// A model with the arguments of its solves; see [`NeuralOde::given`].
#[derive(Debug)]
pub struct Given<'a, S = Tensor, A = ()> {
    ode: &'a NeuralOde<S, A>,
    args: &'a A,
}

impl<S: State + 'static, A: State + 'static> Given<'_, S, A> {
    /// As [`NeuralOde::solve`]; differentiable in the arguments, too.
    ///
    /// # Errors
    /// As [`NeuralOde::solve`], and [`Error::ArgsPrecisionCount`](crate::Error::ArgsPrecisionCount).
    pub fn solve<T: Times + ?Sized>(&self, y0: &S, times: &T) -> Result<S> {
        let solve = self.ode.run((y0, self.args), times, None, true, None)?;
        solve.in_graph()
    }

    /// As [`NeuralOde::loss`]; differentiable in the arguments, too.
    ///
    /// # Errors
    /// As [`NeuralOde::loss`], and [`Error::ArgsPrecisionCount`](crate::Error::ArgsPrecisionCount).
    pub fn loss<T: Times + ?Sized>(&self, y0: &S, times: &T, loss: &RowLoss) -> Result<Tensor> {
        let Solve {
            problem,
            source,
            theta,
            forward,
            y0,
            ..
        } = self
            .ode
            .run((y0, self.args), times, Some(loss), true, None)?;
        if forward.is_loss {
            return in_graph(Arc::new(problem), source, theta, forward, &y0);
        }
        loss.of(&node::<S>(problem, source, theta, forward, &y0)?)
    }

    /// As [`NeuralOde::solution`]; gradients of all arguments, tracked or not, are among
    /// [`Gradients::params`](crate::Gradients::params), under the tensors that were given.
    ///
    /// # Errors
    /// As [`NeuralOde::solution`], and [`Error::ArgsPrecisionCount`](crate::Error::ArgsPrecisionCount).
    pub fn solution<T: Times + ?Sized>(&self, y0: &S, times: &T) -> Result<Solution<'static, S>> {
        let solve = self.ode.run((y0, self.args), times, None, false, None)?;
        Solution::new(solve.problem, solve.field, solve.theta, solve.forward)
    }

    /// As [`NeuralOde::predict`].
    ///
    /// # Errors
    /// As [`NeuralOde::predict`], and [`Error::ArgsPrecisionCount`](crate::Error::ArgsPrecisionCount).
    pub fn predict<T: Times + ?Sized>(&self, y0: &S, times: &T) -> Result<S> {
        self.ode.predict_given(y0, self.args, times, None)
    }
}

impl<S, A> std::fmt::Debug for NeuralOde<S, A> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("NeuralOde")
            .field("parameters", &self.names)
            .field("options", &self.options)
            .finish_non_exhaustive()
    }
}

/// A field whose weights are the user's variables.  A solve tile by tile packs them when it begins, so
/// that writing to them later changes nothing.
struct Packable {
    field: SharedField,
    /// The variables, in the order of their names: a `VarMap` may be given others.
    ids: Vec<TensorId>,
}
