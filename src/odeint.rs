//! The public entries: a solve that is one node of candle's graph, and a solve without a graph.

use std::any::TypeId;
use std::sync::Arc;

use candle_core::Tensor;

use crate::arguments::{options_with, Args};
use crate::error::Result;
use crate::field::check::{self, FieldCheck, Subject};
use crate::field::{Bound, Field, FieldWithArgs, Leaves, SharedField, VectorField};
use crate::integrate::Forward;
use crate::node::{node, Source};
use crate::parameters::{Observed, Theta};
use crate::passes::run;
use crate::problem::{OdeOptions, Problem};
use crate::solution::Solution;
use crate::state::{Packing, State};
use crate::time::{TimeGrid, Times};

/// Solves y' = f(t, y) from y0 and returns the states at `times`, differentiable with
/// `loss.backward()`.
///
/// * `field`: a closure `|t: &Time, y: &S| …`, [`autonomous`](crate::fields::autonomous)`(module)`, or any
///   [`VectorField`].  Variables that it captures receive gradients; they keep their own dtype, so for a low compute
///   precision use [`NeuralOde`](crate::NeuralOde), which casts them once per solve.
/// * `y0`: a [`State`](crate::State): a tensor, or several, of any shapes.  It receives a gradient if candle tracks it.
/// * `times`: t_0 … t_N, strictly monotone, y(t_0) = y0.  A tracked 1-D tensor receives gradients.
///
/// Returns a state whose tensors have the shape `(times, …)`, `(…)` with [`Output::Final`](crate::options::Output::Final), or
/// `(steps + 1, …)` with [`Output::Steps`](crate::options::Output::Steps), in **state** dtype, which is the widest of
/// y0's tensors unless the options say otherwise (f32 for f16 and bf16).
///
/// The gradients are exact for the steps that were run (see [the theory](crate)).  They are detached: second
/// derivatives are not supported, and a `backward()` on what was computed from them finds no gradient.
///
/// # Errors
/// Before any step: errors of the grid, the state and the options.  During the solve: a velocity that is not finite,
/// that candle does not track, or that has another shape, dtype or device than the state.  See
/// [`Error`](crate::Error).
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

/// Solves y' = f(t, y, a) with arguments a, like [`odeint`]; see [`FieldWithArgs`].
///
/// * `field`: a closure `|t: &Time, y: &S, args: &A| …`, or any [`FieldWithArgs`].
/// * `args`: any [`State`], on the device of y0.  Tensors that candle tracks receive gradients, and what computed
///   them is differentiated once for the whole solve.  Integers are passed on as they are.
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
/// As [`odeint`], and [`Error::ArgsPrecisionCount`](crate::Error::ArgsPrecisionCount).
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
    let options = &options_with(args, options);
    let bind = |leaves: Vec<Tensor>| {
        let bound = Bound {
            field: Box::new(field),
            args: A::from_leaves(leaves.clone())?,
        };
        let field = Leaves::<Box<_>, S>::with_args(Box::new(bound), &leaves);
        let field: SharedField = Arc::new(field);
        Ok(field)
    };
    let start = (y0.leaves(), args.leaves(), times.to_grid()?);
    closure_in_graph(start, options, TypeId::of::<F>(), bind)
}

/// A solve of a closure of some `kind` that becomes part of candle's graph, from y0, arguments and times.
fn closure_in_graph<S: State>(
    start: (Vec<Tensor>, Vec<Tensor>, TimeGrid),
    options: &OdeOptions,
    kind: TypeId,
    bind: impl FnOnce(Vec<Tensor>) -> Result<SharedField>,
) -> Result<S> {
    in_graph_by(start, options, kind, bind, |problem, field, y0, keep| {
        run(problem, field, y0, None, keep)
    })
}

/// The same by a forward pass from y0, joined.
pub(crate) fn in_graph_by<S: State>(
    start: (Vec<Tensor>, Vec<Tensor>, TimeGrid),
    options: &OdeOptions,
    kind: TypeId,
    bind: impl FnOnce(Vec<Tensor>) -> Result<SharedField>,
    solve: impl FnOnce(&Problem, &Field<'_>, &Tensor, &dyn Fn() -> bool) -> Result<Forward>,
) -> Result<S> {
    let InGraph {
        problem,
        field,
        theta,
        forward,
        joined,
    } = solved_in_graph(start, options, kind, bind, solve)?;
    node(problem, Source::Shared(field), theta, forward, &joined)
}

/// A solve of a closure that is to become part of candle's graph: the forward pass, and what the graph needs.
pub(crate) struct InGraph {
    pub(crate) problem: Problem,
    pub(crate) field: SharedField,
    pub(crate) theta: Theta,
    pub(crate) forward: Forward,
    /// y0, joined.
    pub(crate) joined: Tensor,
}

/// The forward pass of such a solve, its field checked.
pub(crate) fn solved_in_graph(
    (y0, args, grid): (Vec<Tensor>, Vec<Tensor>, TimeGrid),
    options: &OdeOptions,
    kind: TypeId,
    bind: impl FnOnce(Vec<Tensor>) -> Result<SharedField>,
    solve: impl FnOnce(&Problem, &Field<'_>, &Tensor, &dyn Fn() -> bool) -> Result<Forward>,
) -> Result<InGraph> {
    let problem = Problem::new(&y0, grid, options)?;
    let args = Args::new(args, &problem, options, false)?;
    let field = bind(args.leaves.clone())?;
    let problem = problem.meeting(&field.jumps(), options)?;
    let joined = Packing::join(&y0, problem.state())?;
    let checks = options.check != FieldCheck::Never && field.offer().is_none();
    let identity = check::pattern(check::key(kind, (0, false), &[&y0, &args.leaves]), &[]);
    let observed = Observed::closure(&*field, true).solving(&problem, identity, checks);
    let tracked = joined.track_op() || problem.grid.is_tracked() || args.is_tracked();
    let keep = || tracked || observed.reads_variables();
    let forward = solve(&problem, &observed, &joined, &keep)?;
    if checks && keep() && !problem.is_empty() {
        // Of an argument that candle does not connect with the velocity the gradient is looked at, too.
        let mut read = observed.parameters_so_far();
        for argument in args.variables() {
            if !read.iter().any(|p| p.id() == argument.id()) {
                read.push(argument);
            }
        }
        let graph = (observed.nodes(), problem.grid.is_tracked());
        let key = check::key(kind, graph, &[&y0, &args.leaves, &read]);
        if options.check == FieldCheck::Always || !check::is_checked(key) {
            // The user's variables are never written, only the copies of arguments.
            let mover = check::Written {
                field: &*field,
                only: Some(&args.leaves),
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
                strict: false,
            };
            subject.check_all(&observed.points(), problem.state(), problem.device())?;
            check::note_checked(key);
        }
    }
    observed.settle();
    let theta = Theta::captured(observed.into_parameters(), &args, problem.device())?;
    Ok(InGraph {
        problem,
        field,
        theta,
        forward,
        joined,
    })
}

/// Solves without candle's graph: the field may be borrowed and need not cross threads, and gradients are computed on
/// request.
///
/// Arguments and errors are those of [`odeint`].
///
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_diffeq::{solution, OdeOptions, Time};
/// let rate = Tensor::new(0.5f64, &Device::Cpu)?;
/// let field = |_: &Time, y: &Tensor| y.broadcast_mul(&rate);           // borrows `rate`
/// let y0 = Tensor::new(&[1f64], &Device::Cpu)?;
/// let solved = solution(&field, &y0, &[0.0, 1.0], &OdeOptions::default())?;
/// let cotangent = Tensor::new(&[[0f64], [1.0]], &Device::Cpu)?;        // L = y(1)
/// let growth = solved.vjp(&cotangent)?.y0.to_vec1::<f64>()?[0];
/// assert!((growth - 0.5f64.exp()).abs() < 3e-4);
/// # Ok::<(), candle_diffeq::Error>(())
/// ```
pub fn solution<'f, S, F, T>(
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

/// Solves like [`solution`], for a field with arguments.  Gradients with respect to all arguments, tracked or not,
/// are among [`Gradients::params`](crate::Gradients::params), under the tensors that were given.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_diffeq::{solution_with, OdeOptions, Time};
/// let field = |_: &Time, y: &Tensor, rate: &Tensor| y.broadcast_mul(rate);
/// let (y0, rate) = (Tensor::new(&[1f64], &Device::Cpu)?, Tensor::new(0.5f64, &Device::Cpu)?);
/// let solved = solution_with(&field, &y0, &rate, &[0.0, 1.0], &OdeOptions::default())?;
/// let cotangent = Tensor::new(&[[0f64], [1.0]], &Device::Cpu)?;
/// let grads = solved.vjp(&cotangent)?;
/// let grad = grads.params.get(&rate).unwrap().to_scalar::<f64>()?;       // y = e^rate
/// assert!((grad - 0.5f64.exp()).abs() < 4e-3);                            // to order three
/// # Ok::<(), candle_diffeq::Error>(())
/// ```
///
/// # Errors
/// As [`solution`], and [`Error::ArgsPrecisionCount`](crate::Error::ArgsPrecisionCount).
pub fn solution_with<'f, S, A, F, T>(
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
    let options = &options_with(args, options);
    let bind = |leaves: Vec<Tensor>| -> Result<Box<Field<'f>>> {
        let args = A::from_leaves(leaves.clone())?;
        let bound = Box::new(Bound { field, args });
        Ok(Box::new(Leaves::<Box<_>, S>::with_args(bound, &leaves)))
    };
    let start = (y0.leaves(), args.leaves(), times.to_grid()?);
    without_graph(start, options, bind)
}

/// A solve without a graph, from y0, arguments and times.
fn without_graph<'f, S: State>(
    start: (Vec<Tensor>, Vec<Tensor>, TimeGrid),
    options: &OdeOptions,
    bind: impl FnOnce(Vec<Tensor>) -> Result<Box<Field<'f>>>,
) -> Result<Solution<'f, S>> {
    without_graph_by(start, options, bind, Ok, vec![])
}

/// The same of a problem that may be driven, by increments that are given.
pub(crate) fn without_graph_by<'f, S: State>(
    (y0, args, grid): (Vec<Tensor>, Vec<Tensor>, TimeGrid),
    options: &OdeOptions,
    bind: impl FnOnce(Vec<Tensor>) -> Result<Box<Field<'f>>>,
    driven: impl FnOnce(Problem) -> Result<Problem>,
    increments: Vec<Tensor>,
) -> Result<Solution<'f, S>> {
    let problem = Problem::new(&y0, grid, options)?;
    let args = Args::new(args, &problem, options, true)?;
    let field = bind(args.leaves.clone())?;
    let problem = driven(problem.meeting(&field.jumps(), options)?)?;
    let y0 = Packing::join(&y0, problem.state())?;
    let observed = Observed::closure(&*field, false);
    let forward = run(&problem, &observed, &y0, None, &|| true)?;
    let theta = Theta::captured(observed.into_parameters(), &args, problem.device())?;
    Solution::new(problem, field, theta.with_increments(increments), forward)
}

/// The states at `times` without gradients: nothing is kept, so that memory does not grow with the steps.
///
/// Arguments, result and errors are those of [`solution`].  [`NeuralOde::predict`](crate::NeuralOde::predict) does
/// the same for a model.
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_diffeq::{predict, OdeOptions, Time};
/// use candle_diffeq::options::{Output, Steps};
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
/// As [`solution`].
pub fn predict<S, F, T>(field: &F, y0: &S, times: &T, options: &OdeOptions) -> Result<S>
where
    S: State,
    F: VectorField<S>,
    T: Times + ?Sized,
{
    let y0 = y0.leaves();
    let problem = Problem::new(&y0, times.to_grid()?, options)?.keeping_nothing();
    let field = Leaves::<&F, S>::new(field);
    let problem = problem.meeting(&field.jumps(), options)?;
    let y0 = Packing::join(&y0, problem.state())?;
    states(&problem, run(&problem, &field, &y0, None, &|| false)?)
}

/// The returned states, without history.
pub(crate) fn states<S: State>(problem: &Problem, forward: Forward) -> Result<S> {
    let states = forward
        .packed
        .reshape(problem.returned(forward.packed.dim(0)?))?
        .detach();
    S::from_leaves(problem.packing.split(&states)?)
}
