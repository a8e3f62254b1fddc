//! The initial value problem, validated: everything that both passes need to know, and no field.

mod samples;

use std::sync::Arc;

use candle_core::{DType, Device, Tensor};

use crate::adaptive::{Control, StepControl};
use crate::crossing::RowCrossing;
use crate::driven::Driven;
use crate::error::{AdaptiveDefect, Error, Result};
use crate::field::check::FieldCheck;
use crate::gradient::{Continuous, Gradient};
use crate::precision::{Precision, Roles, Rounding};
use crate::scaler::{OnOverflow, Scaler, Scaling};
use crate::schedule::{Output, Schedule, Steps};
use crate::simd;
use crate::state::Packing;
use crate::stats::Recorder;
use crate::step::Scheme;
use crate::tableau::{Tableau, RK4};
use crate::time::TimeGrid;
use crate::trajectory::Checkpoint;

/// What a solve keeps from its evaluations, in addition to the states, so that the backward pass need not repeat them.
/// It needs much memory, and saves up to a fifth of both passes' time tile by tile, up to two fifths on the general path.
///
/// If the bytes are not enough for everything, the last steps have priority over the first.  Tile by tile, for an
/// [`nn::Mlp`](crate::nn::Mlp), the stages come first, then the hidden layers that save the most work per byte.
///
/// On the general path, on the CPU and on CUDA, this needs fixed steps, and whole steps are kept.  Of closures, of candle's
/// modules, and of fields whose [`is_traced`](crate::VectorField::is_traced) is true, candle's graphs are kept.  Of
/// [`nn::Mlp`](crate::nn::Mlp) and, on the CPU, of [`nn::graph::GcnField`](crate::nn::graph::GcnField), the tensors are kept
/// that their pull-backs read.  The bytes are counted as those of the numbers in these tensors, without the parameters, and
/// 384 more for each tensor.  What candle's operations hold beside these tensors is not known, and is not counted.  On CUDA,
/// steps that are kept are launched operation by operation, also with [`graphs`](OdeOptions::graphs).  A small `nn::Mlp`
/// that is solved in one launch keeps nothing.
///
/// Nothing is kept in two cases.  The first is a store precision that is lower than the state precision: the backward pass
/// then linearises at the stored states, which are not those of the evaluations.  The second is the general path with noise,
/// with adaptive steps, or with a continuous adjoint.  [`NeuralOde::loss`](crate::NeuralOde::loss) has its own plan.
///
/// ```
/// use candle_diffeq::OdeOptions;
/// use candle_diffeq::options::ActivationCache;
/// let options = OdeOptions {
///     activation_cache: ActivationCache::within(64 << 20).in_bf16(),
///     ..Default::default()
/// };
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ActivationCache {
    pub(crate) bytes: usize,
    pub(crate) low: bool,
}

impl ActivationCache {
    /// Nothing: the backward pass evaluates every stage again.
    pub const NONE: Self = Self::within(0);
    /// Everything.  If the machine does not have enough memory for it, the solve fails before its first step, on the
    /// general path after it ([`Error::OutOfMemory`]).  On CUDA nothing is checked in advance: the solve fails with
    /// candle's error when the driver refuses an allocation.
    pub const ALL: Self = Self::within(usize::MAX);

    /// As much as fits into this number of bytes, for the whole batch.
    pub const fn within(bytes: usize) -> Self {
        Self { bytes, low: false }
    }

    /// Keeps them in bf16, which is half the bytes of f32.  The forward pass does not change; gradients are computed
    /// at values with a relative rounding error of up to 2⁻⁸.  On the general path it has no effect.
    #[must_use]
    pub const fn in_bf16(self) -> Self {
        Self { low: true, ..self }
    }
}

/// Options of a solve.
///
/// ```
/// use candle_diffeq::{OdeOptions, Precision};
/// use candle_diffeq::options::{Checkpoint, Steps};
/// use candle_diffeq::tableau::DOPRI5;
/// let options = OdeOptions {
///     method: DOPRI5,
///     precision: Some(Precision::bf16()),
///     steps: Steps::Size(0.05),
///     checkpoint: Checkpoint::States(20),
///     ..Default::default()
/// };
/// ```
#[derive(Clone, Debug)]
pub struct OdeOptions {
    /// The method.  Default: [`RK4`], the classic method of order 4 (torchdiffeq's `rk4` is
    /// [`RK4_38`](crate::tableau::RK4_38)).
    pub method: Tableau,
    /// Dtype roles.  Default: all in the dtype of y0, the widest if its tensors differ, with sums in
    /// f32 at least.
    pub precision: Option<Precision>,
    /// Dtype roles for each tensor of the state (in names and in error messages, a tensor of the state is a "leaf" or a
    /// "state tensor"), if they are not all the same; empty, or one for each tensor.  The
    /// state dtype must be the same for all.  Parameters follow `precision` or, without it, the tensor with the
    /// narrowest compute dtype, the first of several.
    ///
    /// ```
    /// use candle_core::{DType, Device, Module, Tensor};
    /// use candle_diffeq::{NeuralOde, OdeOptions, Precision, Time};
    /// use candle_nn::Init;
    /// // A continuous flow: z and the network in bf16, the log-density summed and read in f32.
    /// let vars = candle_nn::VarMap::new();
    /// let flow = NeuralOde::from_field(&vars, "flow", DType::F32, &Device::Cpu, |vb| {
    ///     let rates = vb.get_with_hints(2, "rates", Init::Const(0.5))?;
    ///     Ok(move |_: &Time, (z, logp): &(Tensor, Tensor)| {
    ///         let trace = rates.to_dtype(logp.dtype())?.sum_all()?.neg()?;
    ///         Ok((z.broadcast_mul(&rates)?, trace.broadcast_as(logp.shape())?))
    ///     })
    /// })?
    /// .options(OdeOptions {
    ///     leaf_precision: vec![Precision::bf16(), Precision::f32()],
    ///     ..Default::default()
    /// });
    /// let z = Tensor::ones((8, 2), DType::F32, &Device::Cpu)?;
    /// let logp = Tensor::zeros(8, DType::F32, &Device::Cpu)?;
    /// let (zs, logps) = flow.solve(&(z, logp), &[0.0, 0.5, 1.0])?;
    /// assert_eq!((zs.dims(), logps.dims()), (&[3, 8, 2][..], &[3, 8][..]));
    /// # Ok::<(), candle_diffeq::Error>(())
    /// ```
    pub leaf_precision: Vec<Precision>,
    /// How output intervals are cut into steps.  Default: one step for each interval.
    pub steps: Steps,
    /// Which states are returned.  Default: all.
    pub output: Output,
    /// How gradients are computed: exactly for the steps that were taken, or by a continuous adjoint.  Default:
    /// [`Gradient::Discrete`].
    pub gradient: Gradient,
    /// What is kept for the backward pass.  Default: every state.
    pub checkpoint: Checkpoint,
    /// What is kept from evaluations, in addition to the states.  Default: nothing.
    pub activation_cache: ActivationCache,
    /// Whether fields whose rows are independent, such as [`nn::Mlp`](crate::nn::Mlp), are integrated tile by tile on
    /// the CPU, and small perceptrons in one launch on CUDA.  Default: yes.  With fixed steps, results agree up to
    /// rounding.
    pub fusion: bool,
    /// Whether a step on CUDA is captured as a graph, and later steps are launched as this graph, forward and
    /// backward, with the same bits.  Default: no.
    ///
    /// This works with fixed steps if every output lies at the end of a step.  It has no effect with adaptive steps, with
    /// [`Steps::At`] if an output lies inside a step, for stochastic equations, with [`Gradient::Interpolated`] or
    /// [`Gradient::Quadrature`], on other devices, and if the whole solve is one launch.  Then
    /// [`Stats::replayed`](crate::metrics::Stats::replayed) is 0 and
    /// [`Stats::not_replayed`](crate::metrics::Stats::not_replayed) is `None`.
    ///
    /// The field's own code runs in the first steps of a pass only, so it must do the same in every step: read time
    /// by [`Time::tensor`](crate::Time::tensor), and keep nothing from an evaluation.  If a step cannot be captured,
    /// steps are launched operation by operation: [`Stats::replayed`](crate::metrics::Stats::replayed) counts the
    /// steps that were launched as graphs, and [`Stats::not_replayed`](crate::metrics::Stats::not_replayed) says why
    /// others were not.
    pub graphs: bool,
    /// Scaling of the adjoint.  Default: dynamic in f16, otherwise none.
    pub scaling: Scaling,
    /// What happens when gradients overflow.  Default: an error.
    pub on_overflow: OnOverflow,
    /// Dtype roles for each tensor of the arguments; only their compute dtype is used.  Empty, or one for each
    /// tensor.  Default: the compute dtype of parameters.
    pub args_precision: Vec<Precision>,
    /// When the pull-back of the field is compared with differences.  Default: once.
    pub check: FieldCheck,
    /// Where statistics go.  Default: nowhere.
    pub recorder: Option<Recorder>,
}

impl Default for OdeOptions {
    fn default() -> Self {
        Self {
            method: RK4,
            precision: None,
            leaf_precision: vec![],
            steps: Steps::default(),
            output: Output::default(),
            gradient: Gradient::Discrete,
            checkpoint: Checkpoint::default(),
            activation_cache: ActivationCache::NONE,
            fusion: true,
            graphs: false,
            scaling: Scaling::default(),
            on_overflow: OnOverflow::default(),
            args_precision: vec![],
            check: FieldCheck::default(),
            recorder: None,
        }
    }
}

/// An initial value problem without its field.
#[derive(Clone, Debug)]
pub(crate) struct Problem {
    pub(crate) scheme: Scheme,
    /// What takes the steps instead, if they are driven by noise.
    pub(crate) driven: Option<Arc<Driven>>,
    pub(crate) plan: Plan,
    pub(crate) grid: TimeGrid,
    pub(crate) packing: Packing,
    /// The packing of y0, and how many solutions of it the state consists of.
    pub(crate) given: Packing,
    pub(crate) samples: usize,
    pub(crate) output: Output,
    /// Events of rows, whose states are returned behind those of the times.
    pub(crate) crossings: Arc<[RowCrossing]>,
    /// The continuous adjoint that is its gradient, unless this is the discrete one.
    pub(crate) continuous: Option<Arc<Continuous>>,
    pub(crate) checkpoint: Checkpoint,
    pub(crate) activation_cache: ActivationCache,
    pub(crate) fusion: bool,
    pub(crate) graphs: bool,
    /// Whether no step can begin and end at one number of the state dtype.
    pub(crate) resolved: bool,
    pub(crate) scaler: Scaler,
    pub(crate) on_overflow: OnOverflow,
    pub(crate) recorder: Recorder,
    /// Rounding of parameters to compute precision.
    pub(crate) theta: Rounding,
}

impl Problem {
    /// Validates everything that does not need an evaluation of the field.
    pub(crate) fn new(y0: &[Tensor], grid: TimeGrid, options: &OdeOptions) -> Result<Self> {
        // A unit that is misspelt is met before the first step, whatever the field computes with.
        simd::unit()?;
        let Some(first) = y0.first() else {
            return Err(Error::EmptyState);
        };
        let device = first.device().clone();
        for (leaf, y) in y0.iter().enumerate() {
            check_leaf(leaf, y, &device)?;
        }

        let plan = Plan::new(&grid, options, &[])?;
        let common = options.common_precision(y0);
        let common = common.unwrap_or_else(|| Precision::of(first.dtype()));
        let theta = common.roles(&device)?.compute;
        let mut each = options.leaf_precision.iter();
        let compensated = common.compensated || each.any(|p| p.compensated);
        let roles = match options.leaf_precision.as_slice() {
            [] => y0
                .iter()
                .map(|_| common.roles(&device))
                .collect::<Result<Vec<_>>>()?,
            each if each.len() == y0.len() => each
                .iter()
                .map(|p| p.roles(&device))
                .collect::<Result<Vec<_>>>()?,
            each => {
                return Err(Error::PrecisionCount {
                    leaves: y0.len(),
                    given: each.len(),
                })
            }
        };
        if let Some(other) = roles.iter().find(|r| r.state != common.state) {
            return Err(Error::MixedState {
                first: common.state,
                other: other.state,
            });
        }
        let packing = Packing::new(y0);
        let dense = plan.is_dense();
        let resolved = plan.is_resolved_in(common.state);
        let continuous =
            Continuous::new(&options.gradient, &options.method, &options.steps, &grid)?;
        if let Some(continuous) = &continuous {
            let place = (common.state, &device);
            continuous.check_tolerances(&grid, packing.shapes(), place)?;
        }
        let as_tensors = continuous.as_ref().is_some_and(Continuous::reads_states);
        // Tiles have rows.
        let tiles = packing.len() > 0 && plan.is_moderate_in(common.state) && !as_tensors;
        Ok(Self {
            scaler: Scaler::new(options.scaling, roles.iter().any(Roles::needs_scaling))?,
            scheme: Scheme::new(&options.method, dense, roles, device).compensating(compensated),
            driven: None,
            plan,
            grid,
            given: packing.clone(),
            samples: 1,
            packing,
            output: options.output,
            crossings: Arc::default(),
            continuous: continuous.map(Arc::new),
            checkpoint: options.checkpoint,
            activation_cache: match options.checkpoint {
                Checkpoint::Nothing => ActivationCache::NONE,
                _ => options.activation_cache,
            },
            fusion: options.fusion && tiles,
            graphs: options.graphs && tiles && resolved && !dense,
            resolved,
            on_overflow: options.on_overflow,
            recorder: options.recorder.clone().unwrap_or_default(),
            theta,
        })
    }

    /// The same problem of a field that jumps at these times.
    pub(crate) fn meeting(self, jumps: &[f64], options: &OdeOptions) -> Result<Self> {
        if jumps.is_empty() {
            return Ok(self);
        }
        // A part of a step that is cut may be too short.
        let plan = Plan::new(&self.grid, options, jumps)?;
        let state = self.state();
        let (resolved, moderate) = (plan.is_resolved_in(state), plan.is_moderate_in(state));
        Ok(Self {
            fusion: self.fusion && moderate,
            graphs: self.graphs && moderate && resolved && !plan.is_dense(),
            resolved,
            plan,
            ..self
        })
    }

    /// Number of evaluations in a step that no output is inside of.
    pub(crate) fn evaluations(&self) -> usize {
        match &self.driven {
            Some(driven) => driven.table().evaluations.len(),
            None => self.scheme.evaluations(),
        }
    }

    /// The same solve, of which nothing is kept.
    pub(crate) fn keeping_nothing(&self) -> Self {
        Self {
            continuous: None,
            checkpoint: Checkpoint::Nothing,
            activation_cache: ActivationCache::NONE,
            ..self.clone()
        }
    }

    /// How many states a step carries: y, and what a method needs beside it.
    pub(crate) fn carried(&self) -> usize {
        match &self.driven {
            Some(driven) => driven.table().next.len(),
            None => self.scheme.carried(),
        }
    }

    /// How many of them are kept where states are kept to linearise at only.
    pub(crate) fn copied(&self) -> usize {
        match &self.driven {
            Some(_) => self.carried(),
            None => 1,
        }
    }

    /// Whether states are kept as they are, so that evaluations of both passes are the same.
    pub(crate) fn stores_state(&self) -> bool {
        let mut roles = self.scheme.roles.iter();
        roles.all(|roles| roles.store.to == roles.state)
    }

    /// Whether no tensor of the state has an element: an empty batch.
    pub(crate) fn is_empty(&self) -> bool {
        self.packing.len() == 0
    }

    /// Dtype of every sum.
    pub(crate) fn state(&self) -> DType {
        self.scheme.roles[0].state
    }

    pub(crate) fn device(&self) -> &Device {
        &self.scheme.device
    }

    /// The shape of so many returned states, joined.
    pub(crate) fn returned(&self, outputs: usize) -> Vec<usize> {
        let state = self.packing.joined();
        match self.output {
            Output::All | Output::Steps => [vec![outputs], state].concat(),
            Output::Final => state,
        }
    }

    /// Number of states that are returned of the first events of rows.
    pub(crate) fn of_crossings(&self, events: usize) -> usize {
        let most = self.crossings[..events].iter().map(|event| event.most);
        most.fold(0, usize::saturating_add)
    }

    /// Number of states returned, as far as it is known before the solve: of adaptive steps none is.
    pub(crate) fn outputs(&self) -> usize {
        match self.output {
            Output::All => {
                let of_events = self.of_crossings(self.crossings.len());
                self.grid.points().len().saturating_add(of_events)
            }
            Output::Final => 1,
            Output::Steps => self.plan.known().map_or(0, |steps| steps.len() + 1),
        }
    }
}

/// The steps of a solve before it begins.
#[derive(Clone, Debug)]
pub(crate) enum Plan {
    Known(Arc<Schedule>),
    Adaptive(Arc<Control>),
}

impl Plan {
    fn new(grid: &TimeGrid, options: &OdeOptions, jumps: &[f64]) -> Result<Self> {
        Ok(match &options.steps {
            // A single time has no step.
            Steps::Adaptive(_) if grid.points().len() == 1 => {
                let none = Schedule::new(grid, &Steps::default(), options.output, &[])?;
                Self::Known(Arc::new(none))
            }
            Steps::Adaptive(adaptive) => {
                let by_row = adaptive.control == Some(StepControl::Rows);
                if options.output == Output::Steps && by_row {
                    return Err(Error::Adaptive(AdaptiveDefect::StepsOfRows));
                }
                let control = Control::new(adaptive, &options.method, grid, jumps)?;
                Self::Adaptive(Arc::new(control))
            }
            steps => {
                let schedule = Schedule::new(grid, steps, options.output, jumps)?;
                Self::Known(Arc::new(schedule))
            }
        })
    }

    /// The steps, if they are known.
    pub(crate) fn known(&self) -> Option<&Arc<Schedule>> {
        match self {
            Self::Known(schedule) => Some(schedule),
            Self::Adaptive(_) => None,
        }
    }

    /// Whether no step can begin and end at one number of this dtype, as far as steps are known.
    fn is_resolved_in(&self, state: DType) -> bool {
        self.known().is_none_or(|s| s.is_resolved_in(state))
    }

    /// Whether the lengths of steps, by which tiles multiply in the state dtype, are far from the ends of its range.
    fn is_moderate_in(&self, state: DType) -> bool {
        state == DType::F64 || self.known().is_none_or(|s| s.is_moderate(100))
    }

    /// Whether states may be returned inside steps.
    pub(crate) fn is_dense(&self) -> bool {
        self.known().is_none_or(|schedule| schedule.is_dense())
    }
}

/// The one whose compute dtype is the narrowest, the first of several.
fn narrowest(each: &[Precision]) -> Option<Precision> {
    each.iter()
        .min_by_key(|p| p.compute.size_in_bytes())
        .copied()
}

impl OdeOptions {
    /// The precision of a solve from y0 but for that of single tensors: the one that was set, or that of the widest
    /// tensor.
    pub(crate) fn common_precision(&self, y0: &[Tensor]) -> Option<Precision> {
        let bytes = |p: &Precision| (p.state.size_in_bytes(), p.compute.size_in_bytes());
        let of_state = || {
            let each = y0.iter().map(|y| Precision::of(y.dtype()));
            each.reduce(|a, b| if bytes(&b) > bytes(&a) { b } else { a })
        };
        self.precision
            .or_else(|| narrowest(&self.leaf_precision))
            .or_else(of_state)
    }
}

fn check_leaf(leaf: usize, y: &Tensor, device: &Device) -> Result<()> {
    if !matches!(
        y.dtype(),
        DType::F16 | DType::BF16 | DType::F32 | DType::F64
    ) {
        return Err(Error::UnsupportedState {
            leaf,
            dtype: y.dtype(),
        });
    }
    if !y.device().same_device(device) {
        return Err(Error::DeviceMismatch {
            what: format!("state tensor {leaf}"),
            expected: device.location(),
            got: y.device().location(),
        });
    }
    Ok(())
}
