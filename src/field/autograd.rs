//! The default pull-back: candle's reverse mode over one evaluation of the field.
//!
//! No tape ever spans more than one stage, so neither stack nor graph grows with the number of
//! steps.

use std::collections::HashMap;

use candle_core::backend::{BackendDevice, BackendStorage};
use candle_core::backprop::GradStore;
use candle_core::{CpuStorage, CudaStorage, CustomOp1, DType, Layout, Shape, Tensor, Var};

use crate::error::Error;
use crate::field::{check, Cotangents, KeptVjp, Leaves, Pullback, VectorField};
use crate::memory::held;
use crate::state::State;
use crate::time::Time;

/// A scalar whose gradient with respect to its argument is a given cotangent.
///
/// candle seeds `backward` with ones; this feeds any seed exactly, where ⟨k, v⟩ would take a
/// product and a sum in low precision.
struct Seeded(Tensor);

impl CustomOp1 for Seeded {
    fn name(&self) -> &'static str {
        "seed"
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        Ok((CpuStorage::F32(vec![0.0]), Shape::from(())))
    }

    fn cuda_fwd(&self, k: &CudaStorage, _: &Layout) -> candle_core::Result<(CudaStorage, Shape)> {
        let shape = Shape::from(());
        Ok((k.device().zeros_impl(&shape, DType::F32)?, shape))
    }

    fn bwd(&self, _: &Tensor, _: &Tensor, _: &Tensor) -> candle_core::Result<Option<Tensor>> {
        Ok(Some(self.0.clone()))
    }
}

/// Σ seeds, whose backward pass is vᵀ∂k.
fn seeded(k: &[Tensor], v: &[Tensor]) -> candle_core::Result<Option<Tensor>> {
    let mut sum = None;
    for (k, v) in k.iter().zip(v).filter(|(k, _)| k.track_op()) {
        let seed = k.apply_op1(Seeded(v.detach()))?;
        sum = Some(match sum {
            None => seed,
            Some(sum) => (sum + seed)?,
        });
    }
    Ok(sum)
}

/// f(t, y) and its pull-back.  A velocity that candle can trace to nothing has no derivative; that it
/// changes with y all the same is an error.
pub(crate) fn vjp<'f, S: State, F: VectorField<S> + ?Sized>(
    field: &F,
    t: &Time,
    y: &S,
) -> candle_core::Result<(S, Pullback<'f, S>)> {
    let traced = trace(field, t, y)?;
    if !traced.k.iter().any(Tensor::track_op) {
        let leaves = Leaves::<&F, S>::new(field);
        let y = y.leaves();
        let read = (0..y.len()).filter(|&leaf| !field.is_constant_in(leaf));
        let pairs: Vec<_> = read
            .flat_map(|leaf| (0..traced.k.len()).map(move |k| (k, leaf)))
            .collect();
        if !pairs.is_empty() && check::depends_on(&leaves, t, &y, &pairs, 0.0)? == Some(true) {
            return Err(Error::UntrackedVelocity { t: t.peek() }.into());
        }
    }
    traced.pullback(field.parameters())
}

/// A velocity that was computed from these leaves, with its graph.
pub(crate) fn kept(leaves: Vec<Tensor>, t: &Time, k: &[Tensor]) -> candle_core::Result<KeptVjp> {
    let bytes = graph_bytes(&leaves, k);
    let traced = Traced {
        leaves,
        time: t.leaf().cloned(),
        k: k.to_vec(),
    };
    let velocity = k.iter().map(Tensor::detach).collect();
    let pull = move |v: &Vec<Tensor>| traced.pull(v);
    Ok((velocity, Box::new(pull), bytes))
}

/// Bytes of what a graph from these leaves to k holds for itself, without those of parameters.  What operations hold that
/// candle does not trace is not known.
fn graph_bytes(leaves: &[Tensor], k: &[Tensor]) -> usize {
    let nodes = k.iter().flat_map(Tensor::sorted_nodes).chain(leaves);
    let nodes: HashMap<_, _> = nodes.map(|node| (node.id(), node)).collect();
    let is_leaf = |node: &Tensor| leaves.iter().any(|leaf| leaf.id() == node.id());
    let parameters = nodes
        .values()
        .filter(|node| node.is_variable() && !is_leaf(node));
    held(nodes.values().copied(), parameters.copied())
}

/// One evaluation on leaves of our own.
struct Traced {
    leaves: Vec<Tensor>,
    time: Option<Tensor>,
    k: Vec<Tensor>,
}

/// Copies from which candle traces a velocity.
pub(crate) fn copies(y: &[Tensor]) -> candle_core::Result<Vec<Tensor>> {
    let copy = |y: &Tensor| Ok(Var::from_tensor(&y.detach())?.into_inner());
    y.iter().map(copy).collect()
}

fn trace<S: State, F: VectorField<S> + ?Sized>(
    field: &F,
    t: &Time,
    y: &S,
) -> candle_core::Result<Traced> {
    let leaves = copies(&y.leaves())?;
    let k = field.velocity(t, &S::from_leaves(leaves.clone())?)?;
    Ok(Traced {
        leaves,
        time: t.leaf().cloned(),
        k: k.leaves(),
    })
}

impl Traced {
    /// `listed`: the parameters that the field says it has.
    fn pullback<'f, S: State>(
        self,
        listed: Option<Vec<Tensor>>,
    ) -> candle_core::Result<(S, Pullback<'f, S>)> {
        let velocity = S::from_leaves(self.k.iter().map(Tensor::detach).collect())?;
        let pull = move |v: &S| self.pull_listed(v, listed.as_deref());
        Ok((velocity, Box::new(pull)))
    }

    /// The same without gradients of constants, which candle also stores if it has met them.
    fn pull_listed<S: State>(
        &self,
        v: &S,
        listed: Option<&[Tensor]>,
    ) -> candle_core::Result<Cotangents<S>> {
        let mut pulled = self.pull(v)?;
        if let Some(listed) = listed {
            let mut params = GradStore::default();
            for p in listed {
                if let Some(grad) = pulled.params.remove(p) {
                    params.insert(p, grad);
                }
            }
            pulled.params = params;
        }
        Ok(pulled)
    }

    /// vᵀ∂f.
    fn pull<S: State>(&self, v: &S) -> candle_core::Result<Cotangents<S>> {
        let mut grads = match seeded(&self.k, &v.leaves())? {
            Some(root) => {
                let mut grads = root.backward()?;
                grads.remove(&root);
                grads
            }
            None => Default::default(),
        };
        // Detach: gradients that candle returns keep their history, and fed into the next
        // pull-back they would be differentiated again (ȳ0 right, θ̄ silently wrong).
        let y = self.leaves.iter().map(|leaf| match grads.remove(leaf) {
            Some(w) => Ok(w.detach()),
            None => leaf.detach().zeros_like(),
        });
        let y = S::from_leaves(y.collect::<candle_core::Result<_>>()?)?;
        let t = self.time.as_ref().and_then(|t| grads.remove(t));
        Ok(Cotangents {
            y,
            t: t.map(|t| t.detach()),
            params: grads,
        })
    }
}

/// An error if candle cannot trace a velocity, computed from a state that it traces, to any of the parameters that its field
/// lists: a wrapper that differentiates by candle's graph, and not by the field's own pull-back, would lose their gradients.
/// Of a field of pieces in time not every piece has parameters.
pub(crate) fn check_traced<F: VectorField<Tensor> + ?Sized>(
    wrapper: &str,
    field: &F,
    y: &Tensor,
    k: &Tensor,
) -> candle_core::Result<()> {
    let mut listed = field.parameters().unwrap_or_default();
    listed.retain(Tensor::is_variable);
    if !y.track_op() || listed.is_empty() || !field.jumps().is_empty() {
        return Ok(());
    }
    let read = variables(std::slice::from_ref(k));
    let is_read = |p: &Tensor| read.iter().any(|variable| variable.id() == p.id());
    if listed.iter().any(is_read) {
        return Ok(());
    }
    candle_core::bail!(
        "{wrapper} differentiates the velocity of its field by candle's graph, which leads to none of the {} parameters that \
         the field lists: compute it from the parameters themselves, not from detached copies, and list none that wants no \
         gradient",
        listed.len()
    )
}

/// The variables that a result depends on.
pub(crate) fn variables(results: &[Tensor]) -> Vec<Tensor> {
    let nodes = results.iter().flat_map(Tensor::sorted_nodes);
    nodes.filter(|n| n.is_variable()).cloned().collect()
}
