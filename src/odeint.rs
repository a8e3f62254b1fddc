//! The public entries: a solve that is one node of candle's graph, and a solve without a graph.

use std::any::TypeId;
use std::sync::{Arc, Mutex, PoisonError};

use candle_core::backprop::GradStore;
use candle_core::{CpuStorage, CudaStorage, CustomOp3, DType, Layout, Shape, Tensor};

use crate::adjoint::{Adjoint, Sweep};
use crate::arguments::Args;
use crate::check::{self, FieldCheck, Subject};
use crate::error::{Error, Result};
use crate::field::{Bound, FieldWithArgs, Leaves, VectorField};
use crate::integrate::{integrate, Forward, Kept};
use crate::link::{self, Handover};
use crate::loss::RowLoss;
use crate::nn;
use crate::ops;
use crate::parameters::{Observed, Theta};
use crate::problem::{OdeOptions, Output, Problem};
use crate::scaler::OnOverflow;
use crate::state::{Packing, State};
use crate::stats::Stats;
use crate::step::Field;
use crate::time::{Time, TimeGrid, Times};
use crate::trajectory::Checkpoint;
use crate::watch::Watch;

/// A field that may outlive the call and cross threads, as candle's graph asks.
pub(crate) type SharedField = Arc<dyn VectorField<Vec<Tensor>> + Send + Sync>;

/// A field that stays where it was built.
pub(crate) type OwnedField = Box<dyn VectorField<Vec<Tensor>>>;

/// Solves y' = f(t, y) from y0 and returns the states at `times`, differentiable with
/// `loss.backward()`.
///
/// * `field`: a closure `|t: &Time, y: &S| …`, [`autonomous`](crate::autonomous)`(module)`, or any
///   [`VectorField`].  Variables that it captures receive gradients; they keep their own dtype, so
///   for a low compute precision use [`NeuralOde`](crate::NeuralOde), which casts them once a solve.
/// * `y0`: leaves of any shapes.  It receives a gradient if candle tracks it.
/// * `times`: t_0 … t_N, strictly monotone, y(t_0) = y0.  A tracked 1-D tensor receives gradients.
///
/// Returns leaves of shape `(times, …)`, or `(…)` with [`Output::Final`], in **state** dtype, which
/// is the widest of y0's leaves unless the options say otherwise (f32 for f16 and bf16).
///
/// The gradients are exact for the steps that were run (see [the theory](crate)).  They carry no
/// history: second derivatives are not supported, and a `backward()` on what was computed from them
/// finds no gradient.
///
/// # Errors
/// Before any step: of the grid, the state, the options.  During the solve: a velocity that is
/// non-finite, untracked, or not of the state's shape, dtype or device.  See [`Error`].
///
/// ```
/// use candle_core::{Device, IndexOp, Var};
/// use candle_diffeq::{odeint, OdeOptions, Time};
/// let y0 = Var::new(&[1f64, 2.0], &Device::Cpu)?;
/// let decay = |_: &Time, y: &candle_core::Tensor| y.neg();
/// let ys = odeint(decay, y0.as_tensor(), &[0.0, 0.5, 1.0], &OdeOptions::default())?;
/// let grads = ys.i(2)?.sum_all()?.backward()?;
/// let one_step = 1.0 - 0.5 + 0.125 - 0.125 / 6.0 + 0.0625 / 24.0;      // exp(−½) to order four
/// let grad = grads.get(&y0).unwrap().to_vec1::<f64>()?;
/// assert!((grad[0] - one_step * one_step).abs() < 1e-15);
/// # Ok::<(), candle_diffeq::Error>(())
/// ```
pub fn odeint<S, F, T>(field: F, y0: &S, times: &T, options: &OdeOptions) -> Result<S>
where
    S: State + 'static,
    F: VectorField<S> + Send + Sync + 'static,
    T: Times + ?Sized,
{
    let bind = |_| {
        let field: SharedField = Arc::new(Leaves::<Box<F>, S>::new(Box::new(field)));
        Ok(field)
    };
    let start = (y0.leaves(), vec![], times.to_grid()?);
    closure_in_graph(start, options, TypeId::of::<F>(), bind)
}

/// The same for a field f(t, y, a) with arguments; see [`FieldWithArgs`].
///
/// * `field`: a closure `|t: &Time, y: &S, args: &A| …`, or any [`FieldWithArgs`].
/// * `args`: any [`State`], on the device of y0.  Tensors that candle tracks receive gradients, one pass
///   through their history for the whole solve; integers are handed on as they are.
///
/// ```
/// use candle_core::{DType, Device, Module, Tensor, D};
/// use candle_diffeq::{odeint_with, OdeOptions, Time};
/// let vars = candle_nn::VarMap::new();
/// let vb = candle_nn::VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
/// let (encoder, field) = (candle_nn::linear(5, 2, vb.pp("encoder"))?, candle_nn::linear(4, 2, vb.pp("f"))?);
/// let context = encoder.forward(&Tensor::ones((8, 5), DType::F32, &Device::Cpu)?)?;
/// let f = move |_: &Time, y: &Tensor, context: &Tensor| {
///     field.forward(&Tensor::cat(&[y, context], D::Minus1)?)?.tanh()
/// };
/// let y0 = Tensor::zeros((8, 2), DType::F32, &Device::Cpu)?;
/// let ys = odeint_with(f, &y0, &context, &[0.0, 1.0], &OdeOptions::default())?;
/// let grads = ys.get(1)?.sum_all()?.backward()?;
/// assert_eq!(vars.all_vars().iter().filter(|v| grads.get(v).is_some()).count(), 4);
/// # Ok::<(), candle_diffeq::Error>(())
/// ```
///
/// # Errors
/// As [`odeint`], and [`Error::ArgsPrecisionCount`].
pub fn odeint_with<S, A, F, T>(
    field: F,
    y0: &S,
    args: &A,
    times: &T,
    options: &OdeOptions,
) -> Result<S>
where
    S: State + 'static,
    A: State + Send + Sync + 'static,
    F: FieldWithArgs<S, A> + Send + Sync + 'static,
    T: Times + ?Sized,
{
    let bind = |leaves| {
        let bound = Bound {
            field: Box::new(field),
            args: A::from_leaves(leaves)?,
        };
        let field: SharedField = Arc::new(Leaves::<Box<_>, S>::new(Box::new(bound)));
        Ok(field)
    };
    let start = (y0.leaves(), args.leaves(), times.to_grid()?);
    closure_in_graph(start, options, TypeId::of::<F>(), bind)
}

/// A solve of a closure of some `kind` that becomes part of candle's graph, from y0, arguments and times.
fn closure_in_graph<S: State>(
    (y0, args, grid): (Vec<Tensor>, Vec<Tensor>, TimeGrid),
    options: &OdeOptions,
    kind: TypeId,
    bind: impl FnOnce(Vec<Tensor>) -> Result<SharedField>,
) -> Result<S> {
    let problem = Problem::new(&y0, grid, options)?;
    let args = Args::new(args, &problem, options, false)?;
    let field = bind(args.leaves.clone())?;
    let joined = Packing::join(&y0, problem.state())?;
    let checks = options.check != FieldCheck::Never && field.known().is_none();
    let observed = Observed::closure(&*field, true).solving(&problem, checks);
    let tracked = joined.track_op() || problem.grid.is_tracked() || args.is_tracked();
    let keep = || tracked || observed.reads_variables();
    let forward = run(&problem, &observed, &joined, None, &keep)?;
    if checks && keep() && !problem.is_empty() {
        let read = observed.parameters_so_far();
        let key = check::key(kind, &[&y0, &args.leaves, &read]);
        if options.check == FieldCheck::Always || !check::is_checked(key) {
            let mover = check::Private {
                field: &*field,
                own: &args.leaves,
            };
            let named = |(i, p): (usize, Tensor)| check::Parameter {
                name: args
                    .name(&p)
                    .unwrap_or_else(|| format!("variable {i} that the closure reads")),
                tensor: p,
            };
            let subject = Subject {
                field: &*field,
                twin: &*field,
                parameters: read.into_iter().enumerate().map(named).collect(),
                mover: &mover,
                reads_time: problem.grid.is_tracked(),
                reach: observed.reach(),
            };
            subject.check_all(&observed.points(), problem.state(), problem.device())?;
            check::note_checked(key);
        }
    }
    let theta = Theta::captured(observed.into_parameters(), &args, problem.device())?;
    node(problem, Source::Shared(field), theta, forward, &joined)
}

/// Solves without candle's graph: the field may be borrowed and need not cross threads, and
/// gradients are asked for explicitly.
///
/// Arguments and errors as [`odeint`].
///
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_diffeq::{solve, OdeOptions, Time};
/// let rate = Tensor::new(0.5f64, &Device::Cpu)?;
/// let field = |_: &Time, y: &Tensor| y.broadcast_mul(&rate);           // borrows `rate`
/// let y0 = Tensor::new(&[1f64], &Device::Cpu)?;
/// let solution = solve(&field, &y0, &[0.0, 1.0], &OdeOptions::default())?;
/// let cotangent = Tensor::new(&[[0f64], [1.0]], &Device::Cpu)?;        // L = y(1)
/// let growth = solution.vjp(&cotangent)?.y0.to_vec1::<f64>()?[0];
/// assert!((growth - 0.5f64.exp()).abs() < 3e-4);
/// # Ok::<(), candle_diffeq::Error>(())
/// ```
pub fn solve<'f, S, F, T>(
    field: &'f F,
    y0: &S,
    times: &T,
    options: &OdeOptions,
) -> Result<Solution<'f, S>>
where
    S: State + 'f,
    F: VectorField<S> + 'f,
    T: Times + ?Sized,
{
    let bind = |_| -> Result<Box<Field<'f>>> { Ok(Box::new(Leaves::<&'f F, S>::new(field))) };
    let start = (y0.leaves(), vec![], times.to_grid()?);
    without_graph(start, options, bind)
}

/// The same for a field with arguments; gradients of all of them, tracked or not, are among
/// [`Gradients::params`], under the tensors that were given.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_diffeq::{solve_with, OdeOptions, Time};
/// let field = |_: &Time, y: &Tensor, rate: &Tensor| y.broadcast_mul(rate);
/// let (y0, rate) = (Tensor::new(&[1f64], &Device::Cpu)?, Tensor::new(0.5f64, &Device::Cpu)?);
/// let solution = solve_with(&field, &y0, &rate, &[0.0, 1.0], &OdeOptions::default())?;
/// let cotangent = Tensor::new(&[[0f64], [1.0]], &Device::Cpu)?;
/// let grads = solution.vjp(&cotangent)?;
/// let grad = grads.params.get(&rate).unwrap().to_scalar::<f64>()?;       // y = e^rate
/// assert!((grad - 0.5f64.exp()).abs() < 2e-3);
/// # Ok::<(), candle_diffeq::Error>(())
/// ```
///
/// # Errors
/// As [`solve`], and [`Error::ArgsPrecisionCount`].
pub fn solve_with<'f, S, A, F, T>(
    field: &'f F,
    y0: &S,
    args: &A,
    times: &T,
    options: &OdeOptions,
) -> Result<Solution<'f, S>>
where
    S: State + 'f,
    A: State + 'f,
    F: FieldWithArgs<S, A> + 'f,
    T: Times + ?Sized,
{
    let bind = |leaves| -> Result<Box<Field<'f>>> {
        let args = A::from_leaves(leaves)?;
        let bound = Box::new(Bound { field, args });
        Ok(Box::new(Leaves::<Box<_>, S>::new(bound)))
    };
    let start = (y0.leaves(), args.leaves(), times.to_grid()?);
    without_graph(start, options, bind)
}

/// A solve without a graph, from y0, arguments and times.
fn without_graph<'f, S: State>(
    (y0, args, grid): (Vec<Tensor>, Vec<Tensor>, TimeGrid),
    options: &OdeOptions,
    bind: impl FnOnce(Vec<Tensor>) -> Result<Box<Field<'f>>>,
) -> Result<Solution<'f, S>> {
    let problem = Problem::new(&y0, grid, options)?;
    let args = Args::new(args, &problem, options, true)?;
    let field = bind(args.leaves.clone())?;
    let y0 = Packing::join(&y0, problem.state())?;
    let observed = Observed::closure(&*field, false);
    let forward = run(&problem, &observed, &y0, None, &|| true)?;
    let theta = Theta::captured(observed.into_parameters(), &args, problem.device())?;
    Solution::new(problem, field, theta, forward)
}

/// The states at `times` without gradients: nothing is kept, so that memory does not grow with the steps.
///
/// Arguments, result and errors as [`solve`].  [`NeuralOde::predict`](crate::NeuralOde::predict) is the
/// same for a model.
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_diffeq::{predict, OdeOptions, Output, Steps, Time};
/// let options = OdeOptions {
///     steps: Steps::PerInterval(1000),
///     output: Output::Final,
///     ..Default::default()
/// };
/// let y0 = Tensor::ones((4, 2), DType::F32, &Device::Cpu)?;
/// let y = predict(&|_: &Time, y: &Tensor| y.neg(), &y0, &[0.0, 1.0], &options)?;
/// assert!((y.get(0)?.get(0)?.to_scalar::<f32>()? - (-1f32).exp()).abs() < 1e-6);
/// # Ok::<(), candle_diffeq::Error>(())
/// ```
///
/// # Errors
/// As [`solve`].
pub fn predict<S, F, T>(field: &F, y0: &S, times: &T, options: &OdeOptions) -> Result<S>
where
    S: State,
    F: VectorField<S>,
    T: Times + ?Sized,
{
    let y0 = y0.leaves();
    let problem = Problem::new(&y0, times.to_grid()?, options)?.keeping_nothing();
    let field = Leaves::<&F, S>::new(field);
    let y0 = Packing::join(&y0, problem.state())?;
    states(&problem, run(&problem, &field, &y0, None, &|| false)?)
}

/// The returned states, without history.
pub(crate) fn states<S: State>(problem: &Problem, forward: Forward) -> Result<S> {
    let states = forward.packed.reshape(problem.returned())?.detach();
    S::from_leaves(problem.packing.split(&states)?)
}

/// The forward pass from y0, joined, on a copy: the user's own may be written before backward.  A
/// loss is formed where the field is integrated tile by tile.  What a backward pass needs is kept where
/// `keep` says so.
pub(crate) fn run(
    problem: &Problem,
    field: &Field<'_>,
    y0: &Tensor,
    loss: Option<&RowLoss>,
    keep: &dyn Fn() -> bool,
) -> Result<Forward> {
    counted(problem, |stats| {
        let tiles = match field.known().is_some() && !keep() {
            true => advance_tiles(&problem.keeping_nothing(), field, y0, loss, stats)?,
            false => advance_tiles(problem, field, y0, loss, stats)?,
        };
        if let Some(forward) = tiles {
            return Ok(forward);
        }
        let y0 = problem.packing.split(&y0.detach().force_contiguous()?)?;
        integrate(problem, field, y0, keep, stats)
    })
}

/// The same where the field is integrated tile by tile, otherwise nothing.
pub(crate) fn run_tiles(
    problem: &Problem,
    field: &Field<'_>,
    y0: &Tensor,
    loss: Option<&RowLoss>,
) -> Result<Option<Forward>> {
    counted(problem, |stats| {
        advance_tiles(problem, field, y0, loss, stats)
    })
}

/// A pass, whose statistics go to the recorder, failed or not.
fn counted<R>(problem: &Problem, pass: impl FnOnce(&mut Stats) -> Result<R>) -> Result<R> {
    let mut stats = Stats::default();
    let before = ops::host_reads();
    let result = pass(&mut stats);
    stats.host_reads = ops::host_reads() - before;
    problem.recorder.add(&stats);
    result
}

/// Tile by tile, or in one launch, where the field allows it.
fn advance_tiles(
    problem: &Problem,
    field: &Field<'_>,
    y0: &Tensor,
    loss: Option<&RowLoss>,
    stats: &mut Stats,
) -> Result<Option<Forward>> {
    let Some(known) = field.known() else {
        return Ok(None);
    };
    let packed = y0.detach().flatten_all()?;
    #[cfg(feature = "cuda")]
    if problem.device().is_cuda() {
        let solved = nn::cuda::solve(known, problem, &packed, stats)?;
        return Ok(solved.map(Forward::of_rows));
    }
    let Some(rows) = nn::rows_of(known) else {
        return Ok(None);
    };
    if loss.is_some() && problem.checkpoint != Checkpoint::Nothing {
        match rows.solve(problem, &packed, loss, stats) {
            Ok(Some(solved)) => return Ok(Some(Forward::graded(solved))),
            Ok(None) => {}
            // To be met again where the user expects it: in the backward pass.
            Err(error) if error.is_overflow() => {}
            Err(error) => return Err(error),
        }
    }
    let solved = rows.solve(problem, &packed, None, stats)?;
    Ok(solved.map(Forward::of_rows))
}

/// Where a backward pass takes the field from: it may run in another thread than the forward pass.
pub(crate) enum Source {
    /// The field that was solved.
    Shared(SharedField),
    /// A model that is built anew over the same tensors, so that no model has to be sent to a thread.
    Built(Arc<dyn Fn() -> candle_core::Result<OwnedField> + Send + Sync>),
}

/// The backward pass of a solve.  `cotangent`: `(outputs, elements)`.
fn adjoint(
    problem: &Problem,
    source: &Source,
    theta: &Theta,
    kept: &Kept,
    cotangent: &Tensor,
    differentiate_time: bool,
) -> Result<Adjoint> {
    let built;
    let field = match (source, kept) {
        (Source::Shared(field), _) => &**field as &Field<'_>,
        // Tiles have packed what they need.
        (Source::Built(_), Kept::Rows(_)) => &Unread,
        (Source::Built(build), Kept::Steps(_)) => {
            built = build()?;
            &*built
        }
    };
    adjoint_of(problem, field, theta, kept, cotangent, differentiate_time)
}

/// A field that nobody evaluates.
struct Unread;

impl VectorField<Vec<Tensor>> for Unread {
    fn velocity(&self, _: &Time, _: &Vec<Tensor>) -> candle_core::Result<Vec<Tensor>> {
        Err(Error::NothingKept.into())
    }
}

/// The same with the field at hand.
fn adjoint_of(
    problem: &Problem,
    field: &Field<'_>,
    theta: &Theta,
    kept: &Kept,
    cotangent: &Tensor,
    differentiate_time: bool,
) -> Result<Adjoint> {
    counted(problem, |stats| {
        pull_back(
            problem,
            field,
            theta,
            kept,
            cotangent,
            differentiate_time,
            stats,
        )
    })
}

/// Tile by tile or step by step, as the forward pass went.
#[allow(clippy::too_many_arguments)]
fn pull_back(
    problem: &Problem,
    field: &Field<'_>,
    theta: &Theta,
    kept: &Kept,
    cotangent: &Tensor,
    differentiate_time: bool,
    stats: &mut Stats,
) -> Result<Adjoint> {
    if cotangent.track_op() {
        return Err(Error::TrackedCotangent);
    }
    if !kept.can_rewind() {
        return Err(Error::NothingKept);
    }
    theta.check_unchanged()?;
    let mut watch = Watch::default();
    // Kernels that go back over all steps look for themselves.
    if matches!(kept, Kept::Steps(_)) || cotangent.device().is_cpu() {
        watch.see(std::slice::from_ref(cotangent), || {
            Error::NonFiniteCotangent
        })?;
    }
    let trajectory = match kept {
        Kept::Steps(trajectory) => trajectory,
        Kept::Rows(trajectory) => {
            return trajectory.backward(problem, cotangent, &theta.leaves, stats);
        }
    };
    let sweep = Sweep {
        scheme: &problem.scheme,
        plan: &problem.plan,
        trajectory,
        field,
        theta: &theta.leaves,
        scaler: problem.scaler,
        differentiate_time,
        #[cfg(feature = "cuda")]
        graphs: problem.graphs,
    };
    let row = |i| problem.packing.unpack(&cotangent.get(i)?);
    let earlier = |i| match problem.output {
        Output::All => row(i).map(Some),
        Output::Final => Ok(None),
    };
    let last = row(problem.outputs() - 1)?;
    sweep.run(last, earlier, watch, stats)
}

/// Makes the solve one node of candle's graph, or a plain tensor where nothing is tracked.  A solve
/// that kept nothing is a node too: its backward pass is an error, not a gradient left out.
pub(crate) fn node<S: State>(
    problem: Problem,
    source: Source,
    theta: Theta,
    forward: Forward,
    y0: &Tensor,
) -> Result<S> {
    let problem = Arc::new(problem);
    let states = in_graph(Arc::clone(&problem), source, theta, forward, y0)?;
    S::from_leaves(problem.packing.split(&states)?)
}

/// The same as candle holds it: the states, joined, or the loss.
pub(crate) fn in_graph(
    problem: Arc<Problem>,
    source: Source,
    theta: Theta,
    forward: Forward,
    y0: &Tensor,
) -> Result<Tensor> {
    let Forward { packed, kept, .. } = forward;
    let result = match forward.is_loss {
        true => packed.reshape(())?,
        false => packed.reshape(problem.returned())?,
    };
    let of_theta = theta.masters.iter().any(Tensor::track_op);
    let tracked = y0.track_op() || problem.grid.is_tracked() || of_theta;
    if !tracked {
        return Ok(result);
    }
    let (token, handover) = link::tree(&theta.masters, problem.state(), problem.device())?;
    let times = match problem.grid.tensor() {
        // A graph lives on one device; candle carries the gradient back.
        Some(times) if times.track_op() => times.to_device(problem.device())?,
        _ => token.detach(),
    };
    let node = Node {
        problem,
        source,
        theta,
        handover,
        kept,
        shape: packed.shape().clone(),
        result: Mutex::new(Some(result)),
    };
    Ok(y0.apply_op3(&token, &times, node)?)
}

/// The solve as a custom op of y0, joined, the token of θ, and t.
struct Node {
    problem: Arc<Problem>,
    source: Source,
    theta: Theta,
    handover: Handover,
    kept: Kept,
    /// The shape of the result as passes see it, packed.
    shape: Shape,
    /// The result, computed before the op is applied, until candle has taken it.
    result: Mutex<Option<Tensor>>,
}

impl Node {
    fn result(&self) -> candle_core::Result<Tensor> {
        let mut result = self.result.lock().unwrap_or_else(PoisonError::into_inner);
        match result.take() {
            Some(result) => result.contiguous(),
            None => candle_core::bail!("the result of a solve was taken twice"),
        }
    }

    /// Gradients of y0, joined, of θ and of t.
    fn gradients(
        &self,
        cotangent: &Tensor,
        times: bool,
    ) -> Result<(Tensor, Vec<Tensor>, Vec<f64>)> {
        let Self { problem, theta, .. } = self;
        let cotangent = &cotangent.reshape(&self.shape)?;
        let adjoint = adjoint(problem, &self.source, theta, &self.kept, cotangent, times);
        match adjoint {
            Ok(adjoint) => {
                let y0 = Packing::join(&adjoint.y0, problem.state())?;
                Ok((y0, adjoint.theta, adjoint.times))
            }
            Err(error) if error.is_overflow() && problem.on_overflow == OnOverflow::SkipUpdate => {
                let nan = |shape: &Shape| nan(shape, problem.state(), cotangent);
                let parameters = theta.leaves.iter().map(|p| nan(p.shape()));
                let times = problem.grid.points().iter().map(|_| f64::NAN).collect();
                let y0 = nan(&Shape::from(problem.packing.joined()))?;
                Ok((y0, parameters.collect::<Result<_>>()?, times))
            }
            Err(error) => Err(error),
        }
    }
}

/// NaN on purpose: gradients of a solve whose backward pass overflowed.
fn nan(shape: &Shape, dtype: DType, like: &Tensor) -> Result<Tensor> {
    Ok(Tensor::full(f32::NAN, shape, like.device())?.to_dtype(dtype)?)
}

impl CustomOp3 for Node {
    fn name(&self) -> &'static str {
        "odeint"
    }

    fn cpu_fwd(
        &self,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        link::on_cpu(&self.result()?)
    }

    fn cuda_fwd(
        &self,
        _: &CudaStorage,
        _: &Layout,
        _: &CudaStorage,
        _: &Layout,
        _: &CudaStorage,
        _: &Layout,
    ) -> candle_core::Result<(CudaStorage, Shape)> {
        link::on_cuda(&self.result()?)
    }

    fn bwd(
        &self,
        y0: &Tensor,
        token: &Tensor,
        times: &Tensor,
        _: &Tensor,
        cotangent: &Tensor,
    ) -> candle_core::Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let (y0_grad, theta_grads, time_grad) = self.gradients(cotangent, times.track_op())?;
        // candle expects a gradient for what it tracks, and stores one for whatever it is given.
        let y0_grad = y0.track_op().then_some(y0_grad);
        let token_grad = token.track_op().then(|| {
            let masters = self.theta.masters.iter().zip(theta_grads);
            let tracked = masters.map(|(p, grad)| p.track_op().then_some(grad));
            self.handover.leave(tracked.collect());
            token.detach()
        });
        let time_grad = match times.track_op() {
            true => {
                let n = time_grad.len();
                let grad = Tensor::from_vec(time_grad, n, times.device())?;
                Some(grad.to_dtype(times.dtype())?)
            }
            false => None,
        };
        Ok((y0_grad, token_grad, time_grad))
    }
}

/// A solve without a graph: the states, and what its backward pass needs.
pub struct Solution<'f, S> {
    problem: Problem,
    field: Box<Field<'f>>,
    theta: Theta,
    kept: Kept,
    states: S,
}

impl<'f, S: State> Solution<'f, S> {
    pub(crate) fn new(
        problem: Problem,
        field: Box<Field<'f>>,
        theta: Theta,
        forward: Forward,
    ) -> Result<Self> {
        let states = forward.packed.reshape(problem.returned())?;
        Ok(Self {
            states: S::from_leaves(problem.packing.split(&states)?)?,
            problem,
            field,
            theta,
            kept: forward.kept,
        })
    }

    /// The states at the output times, `(times, …)` or `(…)`, in state dtype, without history.
    pub fn states(&self) -> &S {
        &self.states
    }

    /// Gradients of L where `cotangent` = ∂L/∂[`states`](Self::states), of their shapes.
    ///
    /// # Errors
    /// [`Error::TrackedCotangent`], [`Error::CotangentShape`], [`Error::DeviceMismatch`],
    /// [`Error::NothingKept`], those of the field, and those of an overflow: here the policy is the
    /// caller's, so they are always returned.
    pub fn vjp(&self, cotangent: &S) -> Result<Gradients<S>> {
        let Self { problem, theta, .. } = self;
        let (leaves, states) = (cotangent.leaves(), self.states.leaves());
        if leaves.len() != states.len() {
            return Err(Error::LeafCount {
                expected: states.len(),
                got: leaves.len(),
            });
        }
        for (leaf, (v, y)) in leaves.iter().zip(&states).enumerate() {
            if v.shape() != y.shape() {
                return Err(Error::CotangentShape {
                    expected: y.shape().clone(),
                    got: v.shape().clone(),
                });
            }
            if !v.device().same_device(y.device()) {
                return Err(Error::DeviceMismatch {
                    what: format!("cotangent {leaf}"),
                    expected: y.device().location(),
                    got: v.device().location(),
                });
            }
        }
        let rows = leaves.iter().map(|v| {
            v.reshape((problem.outputs(), ()))?
                .to_dtype(problem.state())
        });
        let packed = Tensor::cat(&rows.collect::<candle_core::Result<Vec<_>>>()?, 1)?;
        let adjoint = adjoint_of(
            problem,
            &*self.field,
            theta,
            &self.kept,
            &packed,
            problem.grid.is_tracked(),
        )?;
        let mut params = GradStore::default();
        for (master, grad) in theta.masters.iter().zip(adjoint.theta) {
            params.insert(master, grad);
        }
        let times = match problem.grid.tensor().filter(|t| t.track_op()) {
            Some(t) => Some(Tensor::new(adjoint.times, t.device())?.to_dtype(t.dtype())?),
            None => None,
        };
        Ok(Gradients {
            y0: S::from_leaves(adjoint.y0)?,
            params,
            times,
        })
    }
}

/// Gradients of a loss through a solve, without history.
#[derive(Debug)]
pub struct Gradients<S> {
    /// ∂L/∂y0, in state dtype.
    pub y0: S,
    /// ∂L/∂θ in state dtype, by the user's variable; those that no evaluation read have none.
    pub params: GradStore,
    /// ∂L/∂t_i in the grid's dtype, for grids that were given as a tensor that candle tracks.
    pub times: Option<Tensor>,
}
