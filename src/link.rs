//! The parameters of a solve in candle's graph.
//!
//! An op of candle takes three tensors at most, so θ hangs on a chain of ops, each of which takes two
//! parameters and gives a token, a tensor of one element, to the next:
//!
//! token_0 → link(θ_1, θ_2) → link(θ_3, θ_4) → … → solve(y0, token, t).
//!
//! Backward, the solve leaves θ̄ with the chain and each link hands its own parameters' gradients on.
//! No parameter is copied, as it would be to bring all of them into one tensor.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, ThreadId};

use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CudaStorage, CustomOp3, DType, Device, Layout, Shape, Tensor};

use crate::error::Result;

/// θ̄ on its way from a solve to its parameters' links: of every thread that goes backward, for it
/// does so in one go.
#[derive(Clone, Debug, Default)]
pub(crate) struct Handover(Arc<Mutex<Vec<Left>>>);

/// What a thread has left.
#[derive(Debug)]
struct Left {
    thread: ThreadId,
    gradients: Vec<Option<Tensor>>,
}

impl Handover {
    /// Leaves the gradients, in the order of the chain.
    pub(crate) fn leave(&self, gradients: Vec<Tensor>) {
        let left = Left {
            thread: thread::current().id(),
            gradients: gradients.into_iter().map(Some).collect(),
        };
        let mut all = self.all();
        // What a pass that failed has left behind.
        all.retain(|other| other.thread != left.thread);
        all.push(left);
    }

    /// Takes one of them.
    fn take(&self, index: usize) -> Option<Tensor> {
        let (mut all, thread) = (self.all(), thread::current().id());
        let at = all.iter().position(|left| left.thread == thread)?;
        let gradients = &mut all[at].gradients;
        let gradient = gradients.get_mut(index).and_then(Option::take);
        if gradients.iter().all(Option::is_none) {
            all.swap_remove(at);
        }
        gradient
    }

    fn all(&self) -> MutexGuard<'_, Vec<Left>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The token at the end of the chain of these parameters, and where their gradients are to be left.
pub(crate) fn chain(
    parameters: &[Tensor],
    dtype: DType,
    device: &Device,
) -> Result<(Tensor, Handover)> {
    let handover = Handover::default();
    let mut token = Tensor::zeros(1, dtype, device)?;
    for (number, pair) in parameters.chunks(2).enumerate() {
        let link = Link {
            first: 2 * number,
            handover: handover.clone(),
        };
        let nothing = token.detach();
        let second = pair.get(1).unwrap_or(&nothing);
        token = token.apply_op3(&pair[0], second, link)?;
    }
    Ok((token, handover))
}

/// Two parameters of the chain, or the last one and nothing.
struct Link {
    /// Number of the first.
    first: usize,
    handover: Handover,
}

impl Link {
    /// The gradient of a parameter; `None` of nothing.
    fn gradient(&self, number: usize, of: &Tensor) -> candle_core::Result<Option<Tensor>> {
        if !of.track_op() {
            return Ok(None);
        }
        match self.handover.take(number) {
            Some(gradient) => gradient.to_dtype(of.dtype()).map(Some),
            None => candle_core::bail!("a parameter of a solve was asked for its gradient twice"),
        }
    }
}

impl CustomOp3 for Link {
    fn name(&self) -> &'static str {
        "odeint-parameters"
    }

    fn cpu_fwd(
        &self,
        token: &CpuStorage,
        layout: &Layout,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        Ok((token.try_clone(layout)?, layout.shape().clone()))
    }

    fn cuda_fwd(
        &self,
        token: &CudaStorage,
        layout: &Layout,
        _: &CudaStorage,
        _: &Layout,
        _: &CudaStorage,
        _: &Layout,
    ) -> candle_core::Result<(CudaStorage, Shape)> {
        Ok((token.try_clone(layout)?, layout.shape().clone()))
    }

    fn bwd(
        &self,
        token: &Tensor,
        one: &Tensor,
        two: &Tensor,
        _: &Tensor,
        gradient: &Tensor,
    ) -> candle_core::Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        Ok((
            token.track_op().then(|| gradient.clone()),
            self.gradient(self.first, one)?,
            self.gradient(self.first + 1, two)?,
        ))
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Var;

    use super::*;

    /// What three parameters are handed where a solve leaves c, 2c and 3c.
    fn pulled(token: &Tensor, handover: &Handover, parameters: &[Var], c: f32) -> Vec<f32> {
        let leave = |c: f32| Tensor::new(c, &Device::Cpu).unwrap();
        handover.leave(vec![leave(c), leave(2.0 * c), leave(3.0 * c)]);
        let grads = token.sum_all().unwrap().backward().unwrap();
        let of = |p: &Var| grads.get(p).unwrap().to_scalar().unwrap();
        parameters.iter().map(of).collect()
    }

    #[test]
    fn every_parameter_is_handed_its_own_gradient_in_every_thread() {
        let parameters = [0f32, 1.0, 2.0].map(|x| Var::new(x, &Device::Cpu).unwrap());
        let tensors: Vec<_> = parameters.iter().map(|p| p.as_tensor().clone()).collect();
        let (token, handover) = chain(&tensors, DType::F32, &Device::Cpu).unwrap();
        thread::scope(|scope| {
            for c in 1..5 {
                let (token, handover, parameters) = (&token, &handover, &parameters);
                scope.spawn(move || {
                    for i in 0..200 {
                        let c = (1000 * c + i) as f32;
                        let handed = pulled(token, handover, parameters, c);
                        assert_eq!(handed, [c, 2.0 * c, 3.0 * c]);
                    }
                });
            }
        });
        assert!(handover.all().is_empty());
    }

    #[test]
    fn a_gradient_that_nobody_left_is_an_error() {
        let parameter = Var::new(1f32, &Device::Cpu).unwrap();
        let tensors = [parameter.as_tensor().clone()];
        let (token, _) = chain(&tensors, DType::F32, &Device::Cpu).unwrap();
        assert!(token.sum_all().unwrap().backward().is_err());
    }
}
