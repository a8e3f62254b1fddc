//! The parameters of a solve in candle's graph.
//!
//! An op of candle takes three tensors at most, so θ hangs on a tree of ops, each of which takes three
//! parameters or tokens and gives a token, a tensor of one element; the root's goes into the solve:
//!
//! link(θ_4, θ_5, link(θ_1, θ_2, θ_3)) → solve(y0, token, t), of five of them.
//!
//! Backward, the solve leaves θ̄ with the tree and each link hands its own parameters' gradients on.
//! No parameter is copied, as it would be to bring all of them into one tensor.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, ThreadId};

use candle_core::backend::BackendStorage;
use candle_core::{
    CpuStorage, CudaStorage, CustomOp3, DType, Device, Layout, Shape, Storage, Tensor,
};

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
    /// Leaves the gradients, in the order of the parameters; `None` of one that nobody will ask for.
    pub(crate) fn leave(&self, gradients: Vec<Option<Tensor>>) {
        let left = Left {
            thread: thread::current().id(),
            gradients,
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

/// The token at the root of the tree of these parameters, and where their gradients are to be left.
pub(crate) fn tree(
    parameters: &[Tensor],
    dtype: DType,
    device: &Device,
) -> Result<(Tensor, Handover)> {
    let handover = Handover::default();
    let token = Tensor::zeros(1, dtype, device)?;
    let link = |branches: &[(Tensor, Option<usize>)]| -> Result<_> {
        let branch = |i: usize| branches.get(i).map_or(&token, |(branch, _)| branch);
        let numbers = |i: usize| branches.get(i).and_then(|(_, number)| *number);
        let link = Link {
            token: token.clone(),
            parameters: [0, 1, 2].map(numbers),
            handover: handover.clone(),
        };
        let joined = branch(0).apply_op3(branch(1), branch(2), link)?;
        Ok((joined, None))
    };
    // Those that wait longest are linked next, so that the tree is low and no link but one has room.
    let numbered = parameters.iter().cloned().zip((0..).map(Some));
    let mut waiting: VecDeque<_> = numbered.collect();
    while waiting.len() > 1 || waiting.iter().any(|(_, number)| number.is_some()) {
        let next = waiting.len().min(3);
        let branches = waiting.drain(..next).collect::<Vec<_>>();
        waiting.push_back(link(&branches)?);
    }
    let root = waiting.pop_front().map(|(root, _)| root);
    Ok((root.unwrap_or(token), handover))
}

/// A tensor that is there already, as an op on the CPU returns it.
pub(crate) fn on_cpu(x: &Tensor) -> candle_core::Result<(CpuStorage, Shape)> {
    let (storage, layout) = x.storage_and_layout();
    match &*storage {
        Storage::Cpu(x) => Ok((x.try_clone(layout)?, layout.shape().clone())),
        _ => candle_core::bail!("what a solve hands over is not on the CPU"),
    }
}

/// The same on CUDA.
pub(crate) fn on_cuda(x: &Tensor) -> candle_core::Result<(CudaStorage, Shape)> {
    let (storage, layout) = x.storage_and_layout();
    match &*storage {
        Storage::Cuda(x) => Ok((x.try_clone(layout)?, layout.shape().clone())),
        _ => candle_core::bail!("what a solve hands over is not on CUDA"),
    }
}

/// Up to three parameters, tokens or nothing.
struct Link {
    token: Tensor,
    /// Numbers of those that are parameters.
    parameters: [Option<usize>; 3],
    handover: Handover,
}

impl Link {
    /// The gradient of a branch; `None` where it has none.
    fn gradient(&self, branch: usize, of: &Tensor) -> candle_core::Result<Option<Tensor>> {
        if !of.track_op() {
            return Ok(None);
        }
        let Some(number) = self.parameters[branch] else {
            return Ok(Some(self.token.clone()));
        };
        match self.handover.take(number) {
            Some(gradient) => gradient.to_dtype(of.dtype()).map(Some),
            None => candle_core::bail!("no gradient was left for a parameter of a solve"),
        }
    }
}

impl CustomOp3 for Link {
    fn name(&self) -> &'static str {
        "odeint-parameters"
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
        on_cpu(&self.token)
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
        on_cuda(&self.token)
    }

    fn bwd(
        &self,
        one: &Tensor,
        two: &Tensor,
        three: &Tensor,
        _: &Tensor,
        _: &Tensor,
    ) -> candle_core::Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        Ok((
            self.gradient(0, one)?,
            self.gradient(1, two)?,
            self.gradient(2, three)?,
        ))
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Var;

    use super::*;

    /// What parameters are handed where a solve leaves c, 2c, 3c, ….
    fn pulled(token: &Tensor, handover: &Handover, parameters: &[Var], c: f32) -> Vec<f32> {
        let leave = |n: usize| Some(Tensor::new(n as f32 * c, &Device::Cpu).unwrap());
        handover.leave((1..=parameters.len()).map(leave).collect());
        let grads = token.sum_all().unwrap().backward().unwrap();
        let of = |p: &Var| grads.get(p).unwrap().to_scalar().unwrap();
        parameters.iter().map(of).collect()
    }

    #[test]
    fn every_parameter_is_handed_its_own_gradient_in_every_thread() {
        for count in [1, 2, 3, 4, 9, 10, 29] {
            let variable = |n: usize| Var::new(n as f32, &Device::Cpu).unwrap();
            let parameters: Vec<_> = (0..count).map(variable).collect();
            let tensors: Vec<_> = parameters.iter().map(|p| p.as_tensor().clone()).collect();
            let (token, handover) = tree(&tensors, DType::F32, &Device::Cpu).unwrap();
            thread::scope(|scope| {
                for c in 1..4 {
                    let (token, handover, parameters) = (&token, &handover, &parameters);
                    scope.spawn(move || {
                        for i in 0..50 {
                            let c = (1000 * c + i) as f32;
                            let expected: Vec<_> = (1..=count).map(|n| n as f32 * c).collect();
                            assert_eq!(pulled(token, handover, parameters, c), expected);
                        }
                    });
                }
            });
            assert!(handover.all().is_empty());
        }
    }

    #[test]
    fn the_tree_has_no_more_links_than_it_needs() {
        for count in 2..30 {
            let variable = |n: usize| Var::new(n as f32, &Device::Cpu).unwrap().into_inner();
            let parameters: Vec<_> = (0..count).map(variable).collect();
            let (token, _) = tree(&parameters, DType::F32, &Device::Cpu).unwrap();
            let nodes = token.sorted_nodes();
            let links = nodes.iter().filter(|node| !node.is_variable()).count();
            assert_eq!(links, (count - 1).div_ceil(2), "{count} parameters");
        }
    }

    #[test]
    fn without_parameters_there_is_nothing_to_track() {
        let (token, _) = tree(&[], DType::F32, &Device::Cpu).unwrap();
        assert!(!token.track_op());
    }

    #[test]
    fn a_gradient_that_nobody_left_is_an_error() {
        let parameter = Var::new(1f32, &Device::Cpu).unwrap();
        let tensors = [parameter.as_tensor().clone()];
        let (token, _) = tree(&tensors, DType::F32, &Device::Cpu).unwrap();
        assert!(token.sum_all().unwrap().backward().is_err());
    }
}
