//! Fields of ours on NVIDIA GPUs: whole solves in one launch each way where the network fits onto a
//! multiprocessor, and otherwise layers in few launches.

mod by_row;

use std::sync::Arc;

use candle_core::backprop::GradStore;
use candle_core::cuda_backend::cudarc::driver::CudaSlice;
use candle_core::{DType, Shape, Tensor, TensorId};

use super::mlp::Mlp;
use super::Activation;
use crate::accumulator::gradient_of;
use crate::adaptive::StepControl;
use crate::error::{Error, Result};
use crate::field::{over_leaves, Cotangents, KeptVjp, OnDevice, Pullback};
use crate::memory::held;
use crate::offer::Launch;
use crate::ops::cuda::mlp::{
    LayerOf, NetBackward, NetFailure, NetForward, NetStep, SmallNet, StepsOf,
};
use crate::ops::cuda::{activate, pull, SlopeFrom, NO_ACTIVATION};
use crate::problem::{Plan, Problem};
use crate::reverse::{Adjoint, Backward, Reversible};
use crate::rows::Solved;
use crate::schedule::{Output, Schedule};
use crate::stats::Stats;
use crate::time::Time;
use crate::trajectory::Checkpoint;

// Kernels number activations as `Activation` does, and what is none of them comes after all.
const _: () = assert!(NO_ACTIVATION == Activation::ALL.len() as i32);

/// Features of the widest layer of a network that is solved in one launch.
const WIDEST: usize = 128;

impl Launch for Mlp {
    fn solve(&self, problem: &Problem, y0: &Tensor, stats: &mut Stats) -> Result<Option<Solved>> {
        if !suits(self, problem) {
            return Ok(None);
        }
        match &problem.plan {
            Plan::Known(schedule) => solve(self, (problem, schedule), y0, stats),
            Plan::Adaptive(control) => by_row::solve(self, (problem, control), y0, stats),
        }
    }
}

/// The network on a multiprocessor; `None` if it does not fit.
fn small(mlp: &Mlp, problem: &Problem, steps: StepsOf) -> Result<Option<SmallNet>> {
    let layers: Vec<_> = mlp
        .layers
        .iter()
        .enumerate()
        .map(|(l, layer)| LayerOf {
            weight: &layer.weight,
            bias: &layer.bias,
            skips: l + 1 < mlp.layers.len() && skips(mlp, l),
        })
        .collect();
    let keeps_slopes = mlp.activation.keeps_slope() || layers.iter().any(|l| l.skips);
    SmallNet::new(
        &layers,
        mlp.features(),
        mlp.time,
        mlp.activation as i32,
        keeps_slopes,
        (&problem.scheme.tableau, steps),
    )
}

/// Solves a problem with steps that are known; `None` if the network does not fit.
fn solve(
    mlp: &Mlp,
    (problem, schedule): (&Problem, &Arc<Schedule>),
    y0: &Tensor,
    stats: &mut Stats,
) -> Result<Option<Solved>> {
    let Some(net) = small(mlp, problem, StepsOf::Batch)? else {
        return Ok(None);
    };
    let steps = net.upload(&in_order(schedule))?;
    let roles = problem.scheme.roles[0];
    let (packed, kept, told) = net.forward(&NetForward {
        y0,
        steps: &steps,
        count: schedule.len(),
        outputs: problem.outputs(),
        returns_first: schedule.at_node(0).is_some(),
        keeps: problem.checkpoint == Checkpoint::All,
        compute: roles.compute.to,
        store: roles.store.to,
        scaler: &problem.scaler,
    })?;
    if let Some(failure) = told.failure {
        return Err(forward_error(failure, problem, schedule));
    }
    stats.steps += schedule.len();
    stats.evaluations += schedule.len() * problem.scheme.evaluations();
    if let Some(kept) = &kept {
        let bytes = kept.elem_count() * kept.dtype().size_in_bytes();
        stats.kept(schedule.len(), bytes);
    }
    let weights = mlp.tensors().map(Tensor::id).collect();
    let trajectory = LaunchedSolve {
        keeps: problem.checkpoint == Checkpoint::All,
        net,
        steps,
        kept,
        weights,
        schedule: Arc::clone(schedule),
    };
    let back = Arc::new(trajectory);
    let found = vec![];
    Ok(Some(Solved {
        packed,
        back,
        found,
    }))
}

/// Whether hidden layer l adds its input to its output.
fn skips(mlp: &Mlp, l: usize) -> bool {
    let reads_time = mlp.time && l == 0;
    mlp.residual && !reads_time && mlp.layers[l].inputs() == mlp.layers[l].outputs()
}

/// Whether the kernels know such a problem.
fn suits(mlp: &Mlp, problem: &Problem) -> bool {
    let [roles] = problem.scheme.roles.as_slice() else {
        return false;
    };
    let [shape] = problem.packing.shapes() else {
        return false;
    };
    let low = |dtype| matches!(dtype, DType::F16 | DType::BF16 | DType::F32);
    let widths = mlp.layers.iter().flat_map(|l| [l.inputs(), l.outputs()]);
    problem.fusion
        && problem.device().is_cuda()
        && !problem.grid.is_tracked()
        && problem.crossings.is_empty()
        && match &problem.plan {
            Plan::Known(schedule) => !schedule.is_dense() && schedule.len() <= MOST_STEPS,
            Plan::Adaptive(control) => {
                control.options.control != Some(StepControl::Batch)
                    && problem.output != Output::Steps
            }
        }
        && (problem.resolved || !mlp.time)
        && matches!(problem.checkpoint, Checkpoint::All | Checkpoint::Nothing)
        && roles.state == DType::F32
        && low(roles.compute.to)
        && low(roles.store.to)
        && shape.dims().last() == Some(&mlp.features())
        && widths.into_iter().all(|width| width <= WIDEST)
}

/// Steps that kernels are given a list of.
const MOST_STEPS: usize = 1 << 24;

/// The steps, with the outputs at their ends.
fn in_order(schedule: &Schedule) -> Vec<NetStep> {
    let number = |output: Option<usize>| output.map_or(-1, |output| output as i32);
    let step = |n| {
        let step = schedule.step(n);
        NetStep {
            t: step.t,
            h: step.h,
            limits: step.limits,
            output: number(schedule.at_node(n + 1)),
            given: number(schedule.at_node(n)),
        }
    };
    (0..schedule.len()).map(step).collect()
}

fn forward_error(failure: NetFailure, problem: &Problem, schedule: &Schedule) -> Error {
    match failure {
        NetFailure::Velocity { step, stage } => Error::NonFiniteVelocity {
            step,
            stage,
            t: schedule.step(step).at(problem.scheme.tableau.c()[stage]),
        },
        NetFailure::Solution { step } => {
            let at = schedule.step(step);
            Error::NonFiniteSolution { step, t: at.end }
        }
        _ => Error::NonFiniteState { leaf: 0 },
    }
}

fn backward_error(failure: NetFailure, schedule: &Schedule) -> Error {
    let step = |steps: usize| schedule.step(schedule.len() - steps);
    match failure {
        NetFailure::Gradient { steps } => Error::NonFiniteGradient {
            step: step(steps).index,
            t: step(steps).t,
        },
        NetFailure::Exhausted {
            steps,
            exponent,
            attempts,
        } => Error::ScaleExhausted {
            step: step(steps).index,
            t: step(steps).t,
            scale: 2f64.powi(exponent),
            attempts,
        },
        NetFailure::Parameters => Error::NonFiniteParameterGradient,
        _ => Error::NonFiniteCotangent,
    }
}

/// What a solve in one launch keeps.
struct LaunchedSolve {
    net: SmallNet,
    steps: CudaSlice<NetStep>,
    /// Whether a backward pass is wanted at all.
    keeps: bool,
    kept: Option<Tensor>,
    weights: Vec<TensorId>,
    schedule: Arc<Schedule>,
}

impl Reversible for LaunchedSolve {
    fn can_rewind(&self) -> bool {
        self.keeps
    }

    fn pull_back(&self, back: &Backward<'_>, stats: &mut Stats) -> Result<Adjoint> {
        let Backward { problem, theta, .. } = *back;
        let steps = self.schedule.len();
        let (y0, gradients, told) = self.net.backward(&NetBackward {
            cotangent: &back.cotangent.to_dtype(DType::F32)?,
            kept: self.kept.as_ref(),
            steps: &self.steps,
            count: steps,
            compute: problem.scheme.roles[0].compute.to,
            scaler: &problem.scaler,
        })?;
        let evaluations = steps * problem.scheme.evaluations();
        stats.recomputed += evaluations * if self.net.fit().keeps_all { 1 } else { 2 };
        stats.vjps += evaluations + told.retries;
        stats.retries += told.retries;
        if problem.scaler.is_on() && told.exponents.0 <= told.exponents.1 {
            let (smallest, largest) = told.exponents;
            stats.used_scale(2f64.powi(smallest));
            stats.used_scale(2f64.powi(largest));
        }
        if let Some(failure) = told.failure {
            return Err(backward_error(failure, &self.schedule));
        }
        let of = |p: &Tensor| gradient_of(p, &self.weights, &gradients, DType::F32);
        Ok(Adjoint {
            y0: problem.packing.unpack(&y0)?,
            theta: theta.iter().map(of).collect::<Result<_>>()?,
            times: vec![],
        })
    }
}

impl OnDevice for Mlp {
    fn takes(&self, y: &[Tensor]) -> bool {
        let ([y], Some(first)) = (y, self.layers.first()) else {
            return false;
        };
        let plain = y.device().is_cuda() && y.dtype() == first.weight.dtype() && y.elem_count() > 0;
        plain && y.dims().last() == Some(&self.features())
    }

    fn velocity(&self, t: &Time, y: &[Tensor]) -> candle_core::Result<Vec<Tensor>> {
        Ok(vec![velocity(self, t, &y[0])?])
    }

    fn vjp<'f>(
        &'f self,
        t: &Time,
        y: &[Tensor],
    ) -> candle_core::Result<(Vec<Tensor>, Pullback<'f, Vec<Tensor>>)> {
        let (k, layers) = LinearisedLayers::of(self, t, &y[0])?;
        let pull = over_leaves(move |v: &Tensor| layers.pull(self, v));
        Ok((vec![k], Box::new(pull)))
    }

    fn vjp_kept(&self, t: &Time, y: &[Tensor]) -> candle_core::Result<KeptVjp> {
        let (k, layers) = LinearisedLayers::of(self, t, &y[0])?;
        let (layers, field) = (layers.without_weights(), self.clone());
        let bytes = layers.bytes();
        let pull = over_leaves(move |v: &Tensor| layers.pull(&field, v));
        Ok((vec![k], Box::new(pull), bytes))
    }
}

/// What each layer read, and the slopes of the hidden ones but for those that follow from what the next layer read.
type KeptLayers = (Vec<Tensor>, Vec<Option<Tensor>>);

impl Mlp {
    /// Whether the pull-back computes the slope of hidden layer l from its value, so that it need not be kept.  Not in bf16
    /// and f16, where the value has lost digits, and not with a residual connection, whose value is not kept by itself.
    fn slope_follows(&self, l: usize) -> bool {
        let wide = matches!(self.layers[l].weight.dtype(), DType::F32 | DType::F64);
        wide && !self.activation.keeps_slope() && !skips(self, l)
    }

    /// f(t, y), two launches to a layer beside its product: bias and activation are one.
    /// Of a field [`at`](Self::at) a time.
    fn in_layers(&self, y: &Tensor, keeps: bool) -> Result<(Tensor, KeptLayers)> {
        let (mut inputs, mut slopes) = (vec![], vec![]);
        let mut x = y.detach().reshape(((), self.features()))?;
        for (l, layer) in self.layers.iter().enumerate() {
            let read = x;
            let z = read.matmul(&layer.weight.t()?)?;
            if l + 1 < self.layers.len() {
                let keeps = keeps && !self.slope_follows(l);
                let (value, slope) = activate(&z, &layer.bias, self.activation as i32, keeps)?;
                slopes.push(slope);
                x = if skips(self, l) {
                    (value + &read)?
                } else {
                    value
                };
            } else {
                (x, _) = activate(&z, &layer.bias, NO_ACTIVATION, false)?;
            }
            inputs.push(read);
        }
        Ok((x.reshape(y.shape())?, (inputs, slopes)))
    }
}

/// f(t, y).
fn velocity(mlp: &Mlp, t: &Time, y: &Tensor) -> Result<Tensor> {
    Ok(mlp.detached().at(t)?.detached().in_layers(y, false)?.0)
}

/// An evaluation layer by layer: the field at its time (if it is not formed again), that time if the field reads it, and
/// what the layers keep.
struct LinearisedLayers {
    at: Option<Mlp>,
    t: Option<Tensor>,
    inputs: Vec<Tensor>,
    slopes: Vec<Option<Tensor>>,
    shape: Shape,
}

impl LinearisedLayers {
    fn of(mlp: &Mlp, t: &Time, y: &Tensor) -> Result<(Tensor, Self)> {
        let (at, t) = (mlp.detached().at(t)?.detached(), mlp.time_of(t)?);
        let (k, (inputs, slopes)) = at.in_layers(y, true)?;
        let layers = Self {
            at: Some(at),
            t,
            inputs,
            slopes,
            shape: y.shape().clone(),
        };
        Ok((k, layers))
    }

    /// The same, with less memory: the pull-back forms the weights again.
    fn without_weights(self) -> Self {
        Self { at: None, ..self }
    }

    /// vᵀ∂f of the field; bias gradients are summed over the batch in f32.
    fn pull(&self, mlp: &Mlp, v: &Tensor) -> candle_core::Result<Cotangents<Tensor>> {
        let formed;
        let at = match &self.at {
            Some(at) => at,
            None => {
                formed = mlp.detached().of_state()?;
                &formed
            }
        };
        let inputs = &self.inputs;
        let (mut params, mut of_time) = (GradStore::default(), None);
        let mut g = v.reshape(((), mlp.features()))?;
        for (l, layer) in at.layers.iter().enumerate().rev() {
            let skipped = (l + 1 < at.layers.len() && skips(at, l)).then(|| g.clone());
            let slope = self.slopes.get(l).map(|slope| match slope {
                Some(slope) => SlopeFrom::Given(slope),
                None => SlopeFrom::OfValue(&inputs[l + 1], at.activation as i32),
            });
            let sums;
            (g, sums) = pull(&g, slope)?;
            let weight_bar = || g.t()?.matmul(&inputs[l]);
            let sums = || Ok(sums);
            of_time = mlp.add_gradients(l, sums, weight_bar, self.t.as_ref(), &mut params)?;
            g = g.matmul(&layer.weight)?;
            if let Some(skipped) = skipped {
                g = (g + skipped)?;
            }
        }
        Ok(Cotangents {
            y: g.reshape(&self.shape)?,
            t: of_time,
            params,
        })
    }

    /// Bytes that it holds, but for those of the weights.
    fn bytes(&self) -> usize {
        let own = self.t.iter().chain(&self.inputs);
        held(own.chain(self.slopes.iter().flatten()), [])
    }
}
