//! The errors of this crate: one variant for each kind of failure, with the numbers that say where it happened.

mod adaptive;
mod continuous;
mod crossing;
mod defects;
mod event;
mod group;
mod loss;
mod need;
mod path;
mod potential;
mod sde;

use candle_core::{DType, DeviceLocation, Shape};

pub use adaptive::{AdaptiveDefect, Stopped, Worst};
pub use continuous::ContinuousDefect;
use defects::listed;
pub use defects::{Argument, PullbackDefect, TableauDefect};
pub use event::EventDefect;
pub use group::GroupDefect;
pub use loss::LossDefect;
pub(crate) use need::Bytes;
pub use need::MemoryNeed;
pub use path::PathDefect;
pub use potential::PotentialDefect;
pub use sde::SdeDefect;

pub use crate::stats::{NotReplayed, StopReason};

/// Result of everything in this crate that can fail.
pub type Result<T> = std::result::Result<T, Error>;

/// Every failure of a solve or of its backward pass.
///
/// Inside `loss.backward()` the error travels through candle; [`Error::from_candle`] finds it
/// again, and `?` in a function that returns [`Result`] restores it by itself.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The environment variable `CANDLE_DIFFEQ_SIMD` names no vector unit.  It is read once, when a
    /// process first computes on the CPU.
    #[error("the environment variable CANDLE_DIFFEQ_SIMD is {given:?}: set it to avx512, avx2 or none, or leave it unset")]
    UnknownVectorUnit {
        /// Its value.
        given: String,
    },
    /// There are no times.
    #[error("no times were given: at least the first time, at which the state is y0, is needed")]
    EmptyGrid,
    /// A tensor of times is not one-dimensional.
    #[error("times must be a 1-D tensor, got shape {shape:?}: flatten it (flatten_all)")]
    GridShape {
        /// Shape that was given.
        shape: Shape,
    },
    /// A tensor of times is neither f32 nor f64; lower precisions do not tell neighbouring times apart.
    #[error("times must be an f32 or f64 tensor, got {dtype:?}: convert them (to_dtype)")]
    GridDtype {
        /// Dtype that was given.
        dtype: DType,
    },
    /// Times repeat, or change direction.
    #[error("times must be strictly monotone: t[{index}] = {t0} is followed by {t1}: sort them, and remove times that are equal")]
    GridNotMonotone {
        /// Index of `t0`.
        index: usize,
        /// Time before.
        t0: f64,
        /// Time after.
        t1: f64,
    },
    /// A tensor has more elements than a GPU kernel counts.
    #[error("a tensor has {elements} elements, and kernels on CUDA take 2^31 − 1 at most: solve the batch in parts, or return fewer states (Output::Final)")]
    TooLarge {
        /// Elements of the tensor.
        elements: usize,
    },
    /// A time is NaN or infinite.
    #[error("time t[{index}] = {t:?} is not finite")]
    NonFiniteTime {
        /// Index in the grid.
        index: usize,
        /// The value.
        t: f64,
    },
    /// A field that is piecewise constant in time needs one field for each interval.
    #[error("{fields} fields were given for {intervals} intervals of time: give one field for each interval, and at least one")]
    FieldCount {
        /// Fields that were given.
        fields: usize,
        /// Intervals of the grid.
        intervals: usize,
    },
    /// [`Steps::PerInterval`](crate::options::Steps::PerInterval)`(0)`.
    #[error("Steps::PerInterval(0): an interval between two times needs at least one step")]
    NoSteps,
    /// Two neighbouring times, or the ends of a step of [`Steps::At`](crate::options::Steps::At), or the ends of a
    /// solve in adaptive steps, whose difference overflows.
    #[error("the interval from t[{index}] = {t0:e} to {t1:e} is longer than f64 can hold: measure time in a larger unit")]
    IntervalOverflow {
        /// Index of `t0`; with `Steps::At`, among the ends of steps.
        index: usize,
        /// Time before.
        t0: f64,
        /// Time after.
        t1: f64,
    },
    /// More steps than can be counted, 2^53.
    #[error("Steps::{steps} asks for {count:e} steps up to the end of interval {interval}; fewer than 2^53 can be counted")]
    TooManySteps {
        /// The option.
        steps: String,
        /// Interval in which the count passes the limit.
        interval: usize,
        /// Steps of this interval and those before it.
        count: f64,
    },
    /// A step size is not a positive finite number.
    #[error("step size {step_size} is not a positive finite number")]
    InvalidStepSize {
        /// The value.
        step_size: f64,
    },
    /// Times of [`Steps::At`](crate::options::Steps::At) that are not in order between the first and the last time.
    #[error("a step from t = {t0:?} to {t1:?}: the times of Steps::At must be in order between the first time {first:?} and the last {last:?}")]
    StepTimes {
        /// Time at its start.
        t0: f64,
        /// Time at its end.
        t1: f64,
        /// The first time of the solve.
        first: f64,
        /// The last one.
        last: f64,
    },
    /// Adaptive steps cannot be taken as asked for.
    #[error("adaptive steps: {0}")]
    Adaptive(AdaptiveDefect),
    /// An adaptive solve did not reach its end.
    #[error("{0}")]
    Stopped(Box<Stopped>),
    /// An event cannot be found or differentiated.
    #[error("{0}")]
    Event(EventDefect),
    /// A stochastic differential equation cannot be solved as asked for.
    #[error("{0}")]
    Sde(SdeDefect),
    /// A continuous adjoint cannot be had as asked for, or did not reach its end.
    #[error("{0}")]
    Continuous(ContinuousDefect),
    /// A step so small that the time does not change in f64.
    #[error("step {step} at t = {t:?} is so short that the time does not change in f64: take longer steps, or let the times begin nearer to zero")]
    StepUnderflow {
        /// Index of the step.
        step: usize,
        /// Time at its start.
        t: f64,
    },
    /// A step that begins and ends at one number of the state dtype, in which the field reads time.
    #[error("step {step} from t = {t:?} to {end:?} begins and ends at one number of {dtype:?}, in which the field reads time (Time::tensor): take larger steps (Adaptive::first_step sets the first one), begin the times nearer to zero, or solve with an f64 state")]
    TimeUnresolved {
        /// Index of the step.
        step: usize,
        /// Time at its start.
        t: f64,
        /// Time at its end.
        end: f64,
        /// The state dtype.
        dtype: DType,
    },
    /// The state has no tensor.
    #[error("the state has no tensor: at least one is needed")]
    EmptyState,
    /// A state tensor is not of a floating-point dtype that can be integrated.
    #[error("state tensor {leaf} is {dtype:?}; f16, bf16, f32 and f64 can be integrated")]
    UnsupportedState {
        /// Index of the tensor in the state.
        leaf: usize,
        /// Its dtype.
        dtype: DType,
    },
    /// y0 holds NaN or infinity.
    #[error("state tensor {leaf} of y0 holds NaN or infinity")]
    NonFiniteState {
        /// Index of the tensor in the state.
        leaf: usize,
    },
    /// These dtypes cannot play these roles together.
    #[error("unsupported precision: state {state:?}, compute {compute:?}, store {store:?} (state is f32 or f64, and neither compute nor store is wider)")]
    UnsupportedPrecision {
        /// Dtype of sums.
        state: DType,
        /// Dtype in which the velocity is evaluated.
        compute: DType,
        /// Dtype of the kept trajectory.
        store: DType,
    },
    /// Per-tensor precisions do not fit the state.
    #[error("{given} precisions were given for a state of {leaves} tensors: OdeOptions::leaf_precision needs none, or one for each tensor")]
    PrecisionCount {
        /// Tensors in the state.
        leaves: usize,
        /// Precisions in the options.
        given: usize,
    },
    /// The state dtype differs between tensors of one state.
    #[error(
        "all tensors of a state are summed in one dtype, but {first:?} and {other:?} were asked for"
    )]
    MixedState {
        /// State dtype of the solve.
        first: DType,
        /// State dtype asked for one tensor.
        other: DType,
    },
    /// A tensor lies on another device than y0.
    #[error(
        "{what} is on {got:?}, the state on {expected:?}: move both to one device (to_device)"
    )]
    DeviceMismatch {
        /// The tensor: a parameter's name, or a part of the state.
        what: String,
        /// Device of y0.
        expected: DeviceLocation,
        /// Device found.
        got: DeviceLocation,
    },
    /// The field returned another number of tensors than the state has.
    #[error("the field returned {got} tensors, the state has {expected}")]
    LeafCount {
        /// Tensors in the state.
        expected: usize,
        /// Tensors in the velocity.
        got: usize,
    },
    /// The velocity does not have the state's shape.
    #[error("the field returned shape {got:?} for state tensor {leaf} of shape {expected:?}")]
    ShapeChanged {
        /// Index of the tensor in the state.
        leaf: usize,
        /// Shape of the state.
        expected: Shape,
        /// Shape of the velocity.
        got: Shape,
    },
    /// The velocity does not have the dtype that the field was given.
    #[error("the field returned {got:?} for state tensor {leaf}, but was given {expected:?}")]
    DtypeChanged {
        /// Index of the tensor in the state.
        leaf: usize,
        /// Dtype that the field was given.
        expected: DType,
        /// Dtype that it returned.
        got: DType,
    },
    /// What a field's own pull-back returned does not fit the state, time or the parameters.
    #[error("the pull-back (not the velocity) at step {step}, stage {stage}, t = {t:?}: {defect}")]
    InvalidPullback {
        /// Index of the step.
        step: usize,
        /// Index of the stage.
        stage: usize,
        /// Time of the stage.
        t: f64,
        /// What is wrong with it.
        defect: PullbackDefect,
    },
    /// The velocity holds NaN or infinity.
    #[error("the velocity is not finite at step {step}, stage {stage}, t = {t:?}: examine the field at this time; if the state grows too far, take shorter steps; if numbers leave the range of f16, compute in bf16 or f32")]
    NonFiniteVelocity {
        /// Index of the step.
        step: usize,
        /// Index of the stage.
        stage: usize,
        /// Time of the stage.
        t: f64,
    },
    /// The state overflowed although the velocities were finite.
    #[error("the state is not finite after step {step}, t = {t:?}, although the velocities were: take shorter steps, and examine whether the exact solution grows without bound")]
    NonFiniteSolution {
        /// Index of the step.
        step: usize,
        /// Time at its end.
        t: f64,
    },
    /// A field or layer of [`nn`](crate::nn) was given tensors of other shapes than it has.
    #[error("{field} needs {needs}, got {}", listed(got))]
    FieldState {
        /// The field or layer, with its widths.
        field: String,
        /// The shapes that it needs.
        needs: String,
        /// Shapes that were given.
        got: Vec<Shape>,
    },
    /// A layer that exists does not fit where it is to stand.
    #[error("{layer}: {tensor} is {got}, expected {expected}")]
    LayerTensor {
        /// The layer.
        layer: String,
        /// Which of its tensors.
        tensor: &'static str,
        /// What would do.
        expected: String,
        /// What it is.
        got: String,
    },
    /// The velocity changes with the state although candle sees no path between them.
    #[error("the velocity at t = {t:?} changes with the state, but candle's graph does not connect them (detach(), or backward() inside the field?): implement VectorField::vjp together with VectorField::parameters; where the derivative is meant to be zero, declare the field with fields::constant(..)")]
    UntrackedVelocity {
        /// Time of the evaluation.
        t: f64,
    },
    /// The pull-back of a field contradicts differences of it; see
    /// [`check_field`](crate::fields::check_field).
    #[error("the gradient of the field with respect to {of} at t = {t:?} is wrong: along a random direction candle's backward gives {pullback:.6e}, differences of the field give {differences:.6e}. Some layers of candle have no backward operation (candle_nn's LayerNorm, RmsNorm, softmax_last_dim) or a wrong one (conv1d): use nn::LayerNorm, nn::RmsNorm, nn::softmax, nn::Conv1d of candle_diffeq (docs/candle-layers.md lists all); a detach() or backward() inside the field does it, too. Declare a parameter that is meant to stand still by NeuralOde::freeze. OdeOptions::check turns this check off")]
    WrongPullback {
        /// The state tensor, the parameter by its name, or time.
        of: String,
        /// Time of the evaluation.
        t: f64,
        /// The derivative as the pull-back has it, per unit of distance.
        pullback: f64,
        /// The same by central differences.
        differences: f64,
    },
    /// Two evaluations of a field at the same point differ.
    #[error("two evaluations of the field at the same point, t = {t:?}, differ in state tensor {leaf}: the backward pass would linearise another field than was solved. Switch off dropout and other random draws inside the field; a constructor of a NeuralOde is called several times and must build the same model each time: draw fixed numbers outside it, or seed them")]
    NotDeterministic {
        /// Index of the tensor in the state.
        leaf: usize,
        /// Time of the evaluations.
        t: f64,
    },
    /// Precisions of arguments do not fit the arguments.
    #[error("{given} precisions were given for {args} tensors of arguments (OdeOptions::args_precision: none, or one for each)")]
    ArgsPrecisionCount {
        /// Tensors among the arguments.
        args: usize,
        /// Precisions in the options.
        given: usize,
    },
    /// A parameter is not of a floating-point dtype.
    #[error("parameter {name} is {dtype:?}; only floating-point parameters can be trained")]
    ParameterDtype {
        /// Name, or position when it has none.
        name: String,
        /// Its dtype.
        dtype: DType,
    },
    /// Parameters have different dtypes.
    #[error("parameter {name} is {got:?}, others are {expected:?}: one dtype for all")]
    MixedParameters {
        /// Name, or position when it has none.
        name: String,
        /// Dtype of the first parameter.
        expected: DType,
        /// Dtype of this one.
        got: DType,
    },
    /// A parameter that a closure reads was changed between forward and backward.
    #[error("a parameter was written between the solve and its backward pass: call backward before the optimiser's step")]
    ParametersChanged,
    /// The field kept a tensor of a step that was captured as a CUDA graph, which has memory of its own:
    /// see [`OdeOptions::graphs`](crate::OdeOptions::graphs).
    #[error("the field keeps a tensor that it made in a step captured as a CUDA graph, which has no memory outside it: build the field anew, and solve without OdeOptions::graphs")]
    KeptInGraph,
    /// The field reads a variable that the constructor of its model did not ask for.
    #[error("the velocity at t = {t:?} reads a variable that the constructor of the NeuralOde did not get from its VarBuilder, so that it would get no gradient: get the variable from the VarBuilder inside the constructor, or pass it as an argument (NeuralOde::with_args)")]
    ForeignParameter {
        /// Time of the evaluation.
        t: f64,
    },
    /// A field's own list of parameters holds a tensor that the constructor of its model did not get from the
    /// `VarBuilder`: its gradient would reach no variable.
    #[error("parameter {index} of VectorField::parameters is no tensor that the constructor of the NeuralOde got from its VarBuilder: list those tensors themselves, not what was computed from them")]
    UnknownParameter {
        /// Position in the list.
        index: usize,
    },
    /// Gradients were asked of a solution that kept nothing.
    #[error("the solve kept nothing for a backward pass (Checkpoint::Nothing): set the option checkpoint to another plan, such as Checkpoint::All")]
    NothingKept,
    /// The cotangent carries a graph: second derivatives are not supported.
    #[error("the cotangent is tracked by candle: second derivatives are not supported, detach it")]
    TrackedCotangent,
    /// The cotangent does not have the shape of the solution.
    #[error("the cotangent has shape {got:?}, the solution {expected:?}")]
    CotangentShape {
        /// Shape of the solution.
        expected: Shape,
        /// Shape of the cotangent.
        got: Shape,
    },
    /// A loss by row that does not fit the states of the solve.
    #[error(transparent)]
    Loss(#[from] LossDefect),
    /// The cotangent that arrives from the loss holds NaN or infinity.
    #[error("the gradient that arrives from the loss holds NaN or infinity: examine the loss and the layers behind the solve; if they overflow in f16, scale the loss by a LossScaler and set OnOverflow::SkipUpdate")]
    NonFiniteCotangent,
    /// The adjoint or a time gradient overflowed (no scaler at work).
    #[error("gradients became non-finite in the backward pass at step {step}, t = {t:?}: leave OdeOptions::scaling at Scaling::Auto, take shorter steps, or set OnOverflow::SkipUpdate to skip such updates")]
    NonFiniteGradient {
        /// Index of the step.
        step: usize,
        /// Time at its start.
        t: f64,
    },
    /// A parameter gradient overflowed.  It is a sum over all steps that is looked at once, after
    /// the sweep, so no step is named.
    #[error("the gradient of a parameter became non-finite in the backward pass: make the loss smaller (a mean instead of a sum), or set OnOverflow::SkipUpdate to skip such updates")]
    NonFiniteParameterGradient,
    /// Lowering the adjoint scale did not cure an overflow.
    #[error("the adjoint overflows at step {step}, t = {t:?}, even scaled by {scale:e} ({attempts} attempts): compute in bf16 or f32, or set OnOverflow::SkipUpdate to skip such updates")]
    ScaleExhausted {
        /// Index of the step.
        step: usize,
        /// Time at its start.
        t: f64,
        /// Last scale tried.
        scale: f64,
        /// Number of attempts.
        attempts: usize,
    },
    /// A scaling option is out of range.
    #[error("{what} = {value} is out of range: it must be {range}")]
    InvalidScaling {
        /// The option.
        what: &'static str,
        /// Its value.
        value: f64,
        /// The values that are possible, in words.
        range: &'static str,
    },
    /// A checkpoint plan that could not keep one state.
    #[error("Checkpoint::{option}({given}) cannot keep one state: at least {needed} is needed")]
    InvalidCheckpoint {
        /// The plan: `Every`, `States` or `Bytes`.
        option: &'static str,
        /// Its number.
        given: usize,
        /// The least number that will do: 1, or the bytes of one state.
        needed: usize,
    },
    /// A solve would hold more memory than there is: on Linux the least of the limit of addresses (`ulimit -v`), of what is
    /// free of memory and swap, and of what the control groups leave of both.  Each process estimates this alone.
    #[error("the solve needs {need} of memory, and {} can be had: keep fewer states (Checkpoint::Every, States or Bytes) or evaluations (ActivationCache::within), return fewer (Output::Final), or take fewer steps", Bytes((*available).into()))]
    OutOfMemory {
        /// What the solve would hold, by what for.
        need: MemoryNeed,
        /// Bytes that are available.
        available: u64,
    },
    /// Memory that was asked for is not available.
    #[error("{} of memory for {what} are not available", Bytes(*bytes))]
    AllocationFailed {
        /// What for.
        what: &'static str,
        /// Bytes that were asked for.
        bytes: u128,
    },
    /// A tableau is not an explicit Runge-Kutta method of its stated order.
    #[error("tableau {name}: {defect}")]
    InvalidTableau {
        /// Its name.
        name: String,
        /// What is wrong with it.
        defect: TableauDefect,
    },
    /// Two samples that [`mmd`](crate::metrics::mmd()) cannot compare.
    #[error(
        "two samples of at least two points with the same features are needed, got {x:?} and {y:?}"
    )]
    Samples {
        /// Shape of the first.
        x: Shape,
        /// Shape of the second.
        y: Shape,
    },
    /// The bandwidth of a kernel is not a positive number, or its square is none.
    #[error("a kernel needs a positive, finite bandwidth whose square is a number of f64 too, got {bandwidth:e}")]
    Bandwidth {
        /// What was given.
        bandwidth: f64,
    },
    /// A potential that no field can be made of, or that has no acceleration.
    #[error(transparent)]
    Potential(#[from] PotentialDefect),
    /// A control path, or a field that is driven by one.
    #[error(transparent)]
    Path(#[from] PathDefect),
    /// The processes that train together could not go on.
    #[error(transparent)]
    Group(#[from] GroupDefect),
    /// An error of candle's.
    #[error(transparent)]
    Candle(candle_core::Error),
}
