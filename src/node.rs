//! A solve as one node of candle's graph.

use std::sync::{Arc, Mutex, PoisonError};

use candle_core::{CpuStorage, CudaStorage, CustomOp3, DType, Layout, Shape, Tensor};

use crate::error::{Error, Result};
use crate::field::{Field, OwnedField, SharedField, VectorField};
use crate::integrate::Forward;
use crate::link::{self, Handover};
use crate::parameters::Theta;
use crate::passes;
use crate::problem::Problem;
use crate::reverse::{Adjoint, Backward, Reversible};
use crate::scaler::OnOverflow;
use crate::state::{Packing, State};
use crate::time::Time;

/// Where a backward pass takes the field from: it may run in another thread than the forward pass.
pub(crate) enum Source {
    /// The field that was solved.
    Shared(SharedField),
    /// A model that is built anew over the same tensors, so that no model has to be sent to a thread.
    Built(Arc<dyn Fn() -> candle_core::Result<OwnedField> + Send + Sync>),
}

/// A field that nobody evaluates.
struct Unread;

impl VectorField<Vec<Tensor>> for Unread {
    fn velocity(&self, _: &Time, _: &Vec<Tensor>) -> candle_core::Result<Vec<Tensor>> {
        Err(Error::NothingKept.into())
    }
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
    let Forward { packed, back, .. } = forward;
    let result = match forward.is_loss {
        true => packed.reshape(())?,
        false => packed.reshape(problem.returned(packed.dim(0)?))?,
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
    let node = SolveNode {
        problem,
        source,
        theta,
        handover,
        back,
        shape: packed.shape().clone(),
        result: Mutex::new(Some(result)),
    };
    Ok(y0.apply_op3(&token, &times, node)?)
}

/// The solve as a custom op of y0, joined, the token of θ, and t.
struct SolveNode {
    problem: Arc<Problem>,
    source: Source,
    theta: Theta,
    handover: Handover,
    back: Arc<dyn Reversible>,
    /// The shape of the result as passes see it, packed.
    shape: Shape,
    /// The result, computed before the op is applied, until candle has taken it.
    result: Mutex<Option<Tensor>>,
}

impl SolveNode {
    fn result(&self) -> candle_core::Result<Tensor> {
        let mut result = self.result.lock().unwrap_or_else(PoisonError::into_inner);
        match result.take() {
            // Its storage is handed over from the first element on.
            Some(result) if result.layout().start_offset() > 0 => result.force_contiguous(),
            Some(result) => result.contiguous(),
            None => candle_core::bail!("the result of a solve was taken twice"),
        }
    }

    /// The backward pass, with the field from where it comes.
    fn adjoint(&self, cotangent: &Tensor, differentiate_time: bool) -> Result<Adjoint> {
        let built;
        let field = match &self.source {
            Source::Shared(field) => &**field as &Field<'_>,
            Source::Built(build) if self.back.reads_field() => {
                built = build()?;
                &*built
            }
            Source::Built(_) => &Unread,
        };
        let back = Backward {
            problem: &self.problem,
            field,
            theta: &self.theta.leaves,
            cotangent,
            differentiate_time,
        };
        passes::adjoint(&*self.back, &self.theta, &back)
    }

    /// Gradients of y0, joined, of θ and of t.
    fn gradients(
        &self,
        cotangent: &Tensor,
        times: bool,
    ) -> Result<(Tensor, Vec<Tensor>, Vec<f64>)> {
        let Self { problem, theta, .. } = self;
        match self.adjoint(&cotangent.reshape(&self.shape)?, times) {
            Ok(adjoint) => {
                let y0 = Packing::join(&adjoint.y0, problem.state())?;
                Ok((y0, adjoint.theta, adjoint.times))
            }
            Err(error) if error.is_overflow() && problem.on_overflow == OnOverflow::SkipUpdate => {
                let nan = |shape: &Shape| nan(shape, problem.state(), cotangent);
                let parameters = theta.leaves.iter().map(|p| nan(p.shape()));
                let times = problem.grid.points().iter().map(|_| f64::NAN).collect();
                let y0 = nan(&Shape::from(problem.given.joined()))?;
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

impl CustomOp3 for SolveNode {
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
