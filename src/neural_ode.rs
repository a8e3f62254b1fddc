//! A candle model as a vector field, in any precision, with f32 master weights.
//!
//! The model's constructor is called on a `VarBuilder` of ours: once to record which names it asks
//! for, and at every solve to build it over private copies of these variables, rounded to compute
//! precision.  The user's variables are read once a solve and never written.  A field of ours that is
//! integrated tile by tile in the variables' own precision packs them from where they are: no model is
//! built for the solve.

use std::any::Any;
use std::collections::HashMap;
use std::marker::PhantomData;
use std::sync::{Arc, Mutex, PoisonError};

use candle_core::{DType, Device, Module, Shape, Tensor, TensorId, Var};
use candle_nn::var_builder::SimpleBackend;
use candle_nn::{Init, VarBuilder, VarMap};

use crate::autograd;
use crate::error::{Error, Result};
use crate::field::{Leaves, Pullback, VectorField};
use crate::integrate::Forward;
use crate::loss::RowLoss;
use crate::nn;
use crate::odeint::{in_graph, node, run, run_tiles, SharedField, Solution};
use crate::parameters::{self, Observed, Theta};
use crate::precision::{Precision, Rounding};
use crate::problem::{OdeOptions, Problem};
use crate::state::{Packing, State};
use crate::tableau::Tableau;
use crate::time::{Time, Times};

type Factory = dyn Fn(VarBuilder<'_>) -> candle_core::Result<SharedField> + Send + Sync;

/// A neural ODE y' = f_θ(t, y): a model constructor, its variables, and how to solve.
///
/// θ is exactly the names that the constructor asks for under its prefix.  Several of them, and
/// any other layers, may share one `VarMap`.
///
/// The constructor is called several times: here once, which creates the variables, and up to twice
/// at every solve.  It must build the same model each time, from nothing but the `VarBuilder`.  Build
/// the optimiser after the `NeuralOde`: before, `vars` does not hold its variables yet.
///
/// ```
/// use candle_core::{Device, IndexOp, Tensor};
/// use candle_diffeq::{NeuralOde, Precision, RK4};
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
pub struct NeuralOde<S = Tensor> {
    vars: VarMap,
    names: Vec<String>,
    device: Device,
    factory: Box<Factory>,
    packable: Option<Packable>,
    options: OdeOptions,
    state: PhantomData<fn() -> S>,
}

impl NeuralOde<Tensor> {
    /// A model without time, any candle `Module`.  Variables that `vars` does not hold yet are
    /// created in it, in f32.
    ///
    /// # Errors
    /// Of the constructor; the variables that it had created are removed again.
    pub fn new<M, B>(vars: &VarMap, prefix: &str, device: &Device, build: B) -> Result<Self>
    where
        M: Module + Send + Sync + 'static,
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
    /// Of the constructor; the variables that it had created are removed again.
    pub fn from_field<F, B>(
        vars: &VarMap,
        prefix: &str,
        dtype: DType,
        device: &Device,
        build: B,
    ) -> Result<Self>
    where
        F: VectorField<S> + Send + Sync + 'static,
        B: Fn(VarBuilder<'_>) -> candle_core::Result<F> + Send + Sync + 'static,
    {
        let prefix = prefix.to_owned();
        let factory = move |vb: VarBuilder<'_>| -> candle_core::Result<SharedField> {
            let vb = if prefix.is_empty() {
                vb
            } else {
                vb.pp(&prefix)
            };
            let field: SharedField = Arc::new(Leaves::<Box<F>, S>::new(Box::new(build(vb)?)));
            Ok(field)
        };
        let asked = Arc::new(Mutex::new(Asked::default()));
        let recording = Recording {
            vars: vars.clone(),
            asked: asked.clone(),
        };
        let built = factory(VarBuilder::from_backend(
            Box::new(recording),
            dtype,
            device.clone(),
        ));
        let asked = std::mem::take(&mut *asked.lock().unwrap_or_else(PoisonError::into_inner));
        let field = match built {
            Ok(field) => field,
            Err(error) => {
                let mut data = vars.data().lock().unwrap_or_else(PoisonError::into_inner);
                data.retain(|name, _| !asked.created.contains(name));
                return Err(error.into());
            }
        };
        let mut ode = Self {
            vars: vars.clone(),
            names: asked.names,
            device: device.clone(),
            factory: Box::new(factory),
            packable: None,
            options: OdeOptions::default(),
            state: PhantomData,
        };
        let ids: Vec<_> = ode.masters()?.iter().map(|var| var.id()).collect();
        let packable = field.known().and_then(nn::rows_of).is_some_and(|rows| {
            // What a constructor computes from variables must be computed anew for each solve.
            let weights = rows.weights();
            weights.iter().all(|weight| ids.contains(&weight.id()))
        });
        ode.packable = packable.then_some(Packable { field, ids });
        Ok(ode)
    }

    /// Another method.
    pub fn method(mut self, method: Tableau) -> Self {
        self.options.method = method;
        self
    }

    /// Other dtype roles.
    pub fn precision(mut self, precision: Precision) -> Self {
        self.options.precision = Some(precision);
        self
    }

    /// All options at once; they replace a method and a precision set before.
    pub fn options(mut self, options: OdeOptions) -> Self {
        self.options = options;
        self
    }

    /// Names of the parameters in the `VarMap`, in the order in which the constructor asks.
    pub fn parameters(&self) -> &[String] {
        &self.names
    }

    /// The states at `times`, differentiable in y0, every parameter and, if a tracked tensor,
    /// `times`; arguments, result and errors as [`odeint`](crate::odeint).
    ///
    /// # Errors
    /// As `odeint`, and those of parameters: dtype, device, or read without the constructor having
    /// asked for them.
    pub fn solve<T: Times + ?Sized>(&self, y0: &S, times: &T) -> Result<S> {
        let (problem, field, theta, forward, y0) = self.run(y0, times, None)?;
        node(problem, field, theta, forward, &y0)
    }

    /// A loss of the states at `times`, a scalar of state dtype, differentiable as [`solve`](Self::solve)
    /// is: what `loss.of(&ode.solve(y0, times)?)` is, to rounding.
    ///
    /// Where the field is integrated tile by tile, a tile goes forward and backward at once: its
    /// last evaluations are still in cache and need not be repeated, for up to 12 MiB a thread, which saves a
    /// tenth of the time or more.  No states are returned, and gradients are formed whether they are asked for or
    /// not.  A fixed scale with f16, a store precision below the state's and a target that has a gradient of
    /// its own are left to two passes.
    ///
    /// ```
    /// use candle_core::{DType, Device, Tensor};
    /// use candle_diffeq::nn::{Activation, Mlp};
    /// use candle_diffeq::{NeuralOde, RowLoss};
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
    /// As [`solve`](Self::solve), [`Error::LossState`] and [`Error::LossOutput`].
    pub fn loss<T: Times + ?Sized>(&self, y0: &S, times: &T, loss: &RowLoss) -> Result<Tensor> {
        let (problem, field, theta, forward, y0) = self.run(y0, times, Some(loss))?;
        if forward.is_loss {
            return in_graph(Arc::new(problem), field, theta, forward, &y0);
        }
        loss.of(&node::<S>(problem, field, theta, forward, &y0)?)
    }

    /// The same as [`solve`](Self::solve) without a graph; gradients by [`Solution::vjp`].
    ///
    /// # Errors
    /// As [`solve`](Self::solve).
    pub fn solution<T: Times + ?Sized>(&self, y0: &S, times: &T) -> Result<Solution<'static, S>> {
        let (problem, field, theta, forward, _) = self.run(y0, times, None)?;
        let field = Leaves::<SharedField, Vec<Tensor>>::new(field);
        Solution::new(problem, Box::new(field), theta, forward)
    }

    fn run<T: Times + ?Sized>(
        &self,
        y0: &S,
        times: &T,
        loss: Option<&RowLoss>,
    ) -> Result<(Problem, SharedField, Theta, Forward, Tensor)> {
        let y0 = y0.leaves();
        let problem = Problem::new(&y0, times.to_grid()?, &self.options)?;
        if let Some(loss) = loss {
            loss.check(&problem)?;
        }
        let masters = self.masters()?;
        let all = masters.iter().map(|var| var.as_tensor());
        parameters::check(all, |i| self.names[i].clone(), problem.device())?;
        let y0 = Packing::join(&y0, problem.state())?;
        if let Some(field) = self.packable(&problem, &masters) {
            if let Some(forward) = run_tiles(&problem, &*field, &y0, loss)? {
                let theta = Observed::closure(&*field, true).into_parameters();
                let theta = Theta::copied(theta.clone(), theta);
                return Ok((problem, field, theta, forward, y0));
            }
        }
        let mut leaves = Vec::with_capacity(masters.len());
        let mut origin = HashMap::<TensorId, Tensor>::new();
        for (name, master) in self.names.iter().zip(masters) {
            let leaf = Var::from_tensor(&problem.theta.round(&master)?)?.into_inner();
            origin.insert(leaf.id(), master.into_inner());
            leaves.push((name, leaf));
        }
        let build = |of: fn(&Tensor) -> Tensor| {
            let named = leaves
                .iter()
                .map(|(name, leaf)| ((*name).clone(), of(leaf)));
            let dtype = problem.theta.held;
            (self.factory)(VarBuilder::from_tensors(
                named.collect(),
                dtype,
                &self.device,
            ))
        };
        let field = build(Tensor::clone)?;
        let plain;
        let observed = if field.known().is_some() {
            // It lists its parameters, and is hardly ever evaluated as tensors.
            Observed::closure(&*field, true)
        } else {
            plain = build(Tensor::detach)?;
            Observed::twins(&*field, &*plain, origin.keys().copied().collect())
        };
        if let Some(listed) = observed.parameters() {
            with_masters(listed, &origin)?;
        }
        let forward = run(&problem, &observed, &y0, loss)?;
        let read = match problem.is_empty() {
            // Nothing was read: all of them have zero gradients.
            true => leaves.into_iter().map(|(_, leaf)| leaf).collect(),
            false => observed.into_parameters(),
        };
        let (leaves, masters) = with_masters(read, &origin)?;
        Ok((problem, field, Theta::copied(leaves, masters), forward, y0))
    }

    /// The field over the user's variables themselves, where a solve may read them: on the CPU, where
    /// they still are what it was built over, and are neither to be rounded nor cast.
    fn packable(&self, problem: &Problem, masters: &[Var]) -> Option<SharedField> {
        let Packable { field, ids } = self.packable.as_ref()?;
        let same = masters.iter().map(|var| var.id()).eq(ids.iter().copied());
        let Rounding { to, held } = problem.theta;
        let as_they_are = to == held && masters.iter().all(|var| var.dtype() == held);
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

/// The tensors that the field reads, and the user's variables behind them.
fn with_masters(
    leaves: Vec<Tensor>,
    origin: &HashMap<TensorId, Tensor>,
) -> Result<(Vec<Tensor>, Vec<Tensor>)> {
    let of = |(index, leaf): (usize, &Tensor)| match origin.get(&leaf.id()) {
        Some(master) => Ok(master.clone()),
        None => Err(Error::UnknownParameter { index }),
    };
    let masters = leaves.iter().enumerate().map(of).collect::<Result<_>>()?;
    Ok((leaves, masters))
}

impl<S> std::fmt::Debug for NeuralOde<S> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("NeuralOde")
            .field("parameters", &self.names)
            .field("options", &self.options)
            .finish_non_exhaustive()
    }
}

/// A module as a field: as [`Autonomous`](crate::Autonomous), but for our own, which bring their
/// pull-backs.
struct OfModule<M>(M);

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

    fn parameters(&self) -> Option<Vec<Tensor>> {
        self.ours()?.parameters()
    }

    fn known(&self) -> Option<&dyn Any> {
        self.ours()?.known()
    }
}

/// A field whose weights are the user's variables.  A solve tile by tile packs them when it begins, so
/// that writing to them later changes nothing.
struct Packable {
    field: SharedField,
    /// The variables, in the order of their names: a `VarMap` may be given others.
    ids: Vec<TensorId>,
}

/// A `VarMap` that notes the names it is asked for.
struct Recording {
    vars: VarMap,
    asked: Arc<Mutex<Asked>>,
}

/// What a constructor asked for.
#[derive(Default)]
struct Asked {
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
