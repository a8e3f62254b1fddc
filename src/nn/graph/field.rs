//! Graph convolutions as a vector field.

use std::sync::{Arc, OnceLock};

use candle_core::backprop::GradStore;
use candle_core::{CpuStorage, CustomOp1, CustomOp2, DType, Layout, Module, Result, Shape, Tensor};
use candle_nn::VarBuilder;

use super::fused::{Evaluation, Stack};
use super::{Csr, Gcn};
use crate::field::{autograd, over_leaves, Cotangents, KeptVjp, Pullback, VectorField};
use crate::nn::elementwise::{is_for, numbers};
use crate::nn::{add_gradient, wrong_state, Activation, Checked};
use crate::time::Time;

/// h' = A σ(… A σ(A h W_1ᵀ + b_1) …) W_Lᵀ + b_L, a graph neural ODE ("Graph Neural Ordinary Differential Equations", arXiv
/// 1911.07532): [`Gcn`] layers with an activation between them.
///
/// h: `(nodes, features)`.  The pull-back is written by hand.  On the CPU in f32 and f64 each layer is one pass over the nodes
/// on all threads, whose memory is used again by the next evaluation; elsewhere it is a chain of candle's operations.
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_diffeq::nn::graph::{Csr, GcnField};
/// use candle_diffeq::nn::Activation;
/// use candle_diffeq::NeuralOde;
/// let (vars, device) = (candle_nn::VarMap::new(), Device::Cpu);
/// let ring = Csr::normalised_adjacency(5, &[[0, 1], [1, 2], [2, 3], [3, 4], [4, 0]], DType::F32, &device)?;
/// let ode = NeuralOde::from_field(&vars, "f", DType::F32, &device, move |vb| {
///     GcnField::new(&[8, 16, 8], Activation::Softplus, &ring, vb)       // f.0.weight, f.0.bias, …
/// })?;
/// let ys = ode.solve(&Tensor::ones((5, 8), DType::F32, &device)?, &[0.0, 0.5, 1.0])?;
/// assert_eq!(ys.dims(), [3, 5, 8]);
/// # Ok::<(), candle_diffeq::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct GcnField {
    layers: Vec<Gcn>,
    activation: Activation,
}

impl GcnField {
    /// Layers of these widths over one graph, first features to last, named `0`, `1`, … with `weight` and `bias`, and
    /// initialised as [`candle_nn::linear()`] does.
    ///
    /// # Errors
    /// Those of the builder, and of [`from_layers`](Self::from_layers).
    pub fn new(
        widths: &[usize],
        activation: Activation,
        graph: &Csr,
        vb: VarBuilder<'_>,
    ) -> Result<Self> {
        let layer = |(i, w): (usize, &[usize])| Gcn::new(w[0], w[1], graph, vb.pp(i));
        let layers = widths.windows(2).enumerate().map(layer);
        Self::from_layers(layers.collect::<Result<_>>()?, activation)
    }

    /// Layers that exist.
    ///
    /// # Errors
    /// If there is none, they do not follow on each other or do not map a state to its velocity, their tensors do not have
    /// one dtype on one device, or a graph is not over as many nodes as it reads.
    pub fn from_layers(layers: Vec<Gcn>, activation: Activation) -> Result<Self> {
        let mut checked = Checked::new("GcnField::from_layers");
        for (l, layer) in layers.iter().enumerate() {
            checked.weight(l, &layer.linear.weight, 2, "a matrix (outputs, inputs)")?;
            checked.bias(l, &layer.bias, layer.widths().1)?;
        }
        let widths: Vec<_> = layers.iter().map(Gcn::widths).collect();
        let follows = widths.windows(2).all(|pair| pair[0].1 == pair[1].0);
        let closed = match (widths.first(), widths.last()) {
            (Some(first), Some(last)) => first.0 == last.1,
            _ => false,
        };
        let nodes = |layer: &Gcn| layer.graph.dims();
        let square = layers.iter().all(|l| nodes(l) == nodes(&layers[0]))
            && layers.iter().all(|l| nodes(l).0 == nodes(l).1);
        let none = widths.iter().any(|(inputs, outputs)| inputs * outputs == 0);
        if !(follows && closed && square) || none {
            let graphs: Vec<_> = layers.iter().map(nodes).collect();
            candle_core::bail!(
                "graph convolutions of widths (in, out) {widths:?} over matrices {graphs:?} do not map a state to its velocity"
            )
        }
        Ok(Self { layers, activation })
    }

    /// Features of a node.
    pub fn features(&self) -> usize {
        self.layers[0].widths().0
    }

    /// Whether y is a state of this field.
    fn check(&self, y: &Tensor) -> Result<()> {
        let (nodes, features) = (self.layers[0].graph.dims().0, self.features());
        if y.dims() == [nodes, features] {
            return Ok(());
        }
        let field = format!("a GcnField of {nodes} nodes and {features} features");
        Err(wrong_state(field, format!("y ({nodes}, {features})"), &[y]))
    }

    /// Whether the values of a graph want gradients, which the pull-back by hand has not.
    fn learns_graphs(&self) -> bool {
        self.layers.iter().any(|l| l.graph.values().track_op())
    }

    /// In candle's operations.
    fn composed(&self, y: &Tensor) -> Result<Tensor> {
        let mut h = y.clone();
        for (l, layer) in self.layers.iter().enumerate() {
            if l > 0 {
                h = self.activation.forward(&h)?;
            }
            h = layer.like(&h)?.forward(&h)?;
        }
        Ok(h)
    }

    /// The weights in the dtype of y.
    fn stack(&self, dtype: DType) -> Result<AnyStack> {
        let (layers, activation) = (&self.layers, self.activation);
        Ok(match dtype {
            DType::F64 => AnyStack::Double(Arc::new(Stack::new(layers, activation)?)),
            _ => AnyStack::Single(Arc::new(Stack::new(layers, activation)?)),
        })
    }

    /// Whether the passes by hand are for y.
    fn is_fused(&self, y: &Tensor) -> bool {
        is_for(y) && !self.learns_graphs() && y.elem_count() > 0
    }
}

/// Over numbers of either precision.
#[derive(Clone)]
enum AnyStack {
    Single(Arc<Stack<f32>>),
    Double(Arc<Stack<f64>>),
}

/// What an evaluation over numbers of either precision keeps for its pull-back.
enum AnyEvaluation {
    Single(Evaluation<f32>),
    Double(Evaluation<f64>),
}

impl AnyStack {
    fn velocity(&self, y: &CpuStorage, at: &Layout) -> Result<CpuStorage> {
        Ok(match (self, y) {
            (Self::Single(stack), CpuStorage::F32(y)) => {
                CpuStorage::F32(stack.velocity(numbers(y, at)?)?)
            }
            (Self::Double(stack), CpuStorage::F64(y)) => {
                CpuStorage::F64(stack.velocity(numbers(y, at)?)?)
            }
            _ => candle_core::bail!("graph convolutions of a state of another dtype"),
        })
    }

    fn evaluate(&self, y: &CpuStorage, at: &Layout) -> Result<(CpuStorage, AnyEvaluation)> {
        Ok(match (self, y) {
            (Self::Single(stack), CpuStorage::F32(y)) => {
                let (k, kept) = stack.evaluate(numbers(y, at)?)?;
                (CpuStorage::F32(k), AnyEvaluation::Single(kept))
            }
            (Self::Double(stack), CpuStorage::F64(y)) => {
                let (k, kept) = stack.evaluate(numbers(y, at)?)?;
                (CpuStorage::F64(k), AnyEvaluation::Double(kept))
            }
            _ => candle_core::bail!("graph convolutions of a state of another dtype"),
        })
    }

    fn evaluate_tensor(&self, y: &Tensor) -> Result<(Tensor, AnyEvaluation)> {
        let y = y.detach().contiguous()?;
        Ok(match self {
            Self::Single(stack) => {
                let (k, kept) = stack.evaluate_tensor(&y)?;
                (k, AnyEvaluation::Single(kept))
            }
            Self::Double(stack) => {
                let (k, kept) = stack.evaluate_tensor(&y)?;
                (k, AnyEvaluation::Double(kept))
            }
        })
    }
}

impl AnyEvaluation {
    /// vᵀ ∂f/∂y, and the gradients of the layers.
    fn pull(&self, v: &Tensor) -> Result<Found> {
        let v = v.contiguous()?;
        match self {
            Self::Single(kept) => kept.pull(&v),
            Self::Double(kept) => kept.pull(&v),
        }
    }

    /// What it holds.
    fn bytes(&self) -> usize {
        match self {
            Self::Single(kept) => kept.bytes(),
            Self::Double(kept) => kept.bytes(),
        }
    }
}

/// One evaluation, differentiable in y.
struct Evaluate {
    stack: AnyStack,
    /// Whether a pull-back by candle is likely.  Solvers evaluate at states that are not tracked, and have pull-backs of
    /// their own: what is kept for candle then would only be written.
    keeps: bool,
    /// What it has kept, once it has been made.
    kept: OnceLock<AnyEvaluation>,
}

impl Evaluate {
    fn new(stack: AnyStack, keeps: bool) -> Self {
        Self {
            stack,
            keeps,
            kept: OnceLock::new(),
        }
    }

    fn velocity(&self, y: &CpuStorage, at: &Layout) -> Result<(CpuStorage, Shape)> {
        let k = if self.keeps {
            let (k, kept) = self.stack.evaluate(y, at)?;
            // An operation is applied once; of a second time, the first one's is as good.
            let _ = self.kept.set(kept);
            k
        } else {
            self.stack.velocity(y, at)?
        };
        Ok((k, at.shape().clone()))
    }

    /// At y, where it is evaluated again if nothing was kept.
    fn pull(&self, y: &Tensor, v: &Tensor) -> Result<Found> {
        match self.kept.get() {
            Some(kept) => kept.pull(v),
            None => self.stack.evaluate_tensor(y)?.1.pull(v),
        }
    }
}

impl CustomOp1 for Evaluate {
    fn name(&self) -> &'static str {
        "graph convolutions"
    }

    fn cpu_fwd(&self, y: &CpuStorage, at: &Layout) -> Result<(CpuStorage, Shape)> {
        self.velocity(y, at)
    }

    fn bwd(&self, y: &Tensor, _: &Tensor, v: &Tensor) -> Result<Option<Tensor>> {
        Ok(Some(self.pull(y, v)?.state))
    }
}

/// The same, also differentiable in the weights and biases, one after the other in one vector.
struct EvaluateAll(Evaluate);

impl CustomOp2 for EvaluateAll {
    fn name(&self) -> &'static str {
        "graph convolutions"
    }

    fn cpu_fwd(
        &self,
        y: &CpuStorage,
        at: &Layout,
        _: &CpuStorage,
        _: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        self.0.velocity(y, at)
    }

    fn bwd(
        &self,
        y: &Tensor,
        _: &Tensor,
        _: &Tensor,
        v: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let found = self.0.pull(y, v)?;
        let flat = found.layers.iter().flatten().map(Tensor::flatten_all);
        let flat = Tensor::cat(&flat.collect::<Result<Vec<_>>>()?, 0)?;
        Ok((Some(found.state), Some(flat)))
    }
}

impl VectorField<Tensor> for GcnField {
    fn velocity(&self, _: &Time, y: &Tensor) -> Result<Tensor> {
        self.check(y)?;
        if !self.is_fused(y) {
            return self.composed(y);
        }
        let keeps = y.track_op();
        let (y, op) = (
            y.contiguous()?,
            Evaluate::new(self.stack(y.dtype())?, keeps),
        );
        let tensors = || self.layers.iter().flat_map(Gcn::tensors);
        if tensors().all(|p| !p.track_op()) {
            return y.apply_op1(op);
        }
        let flat = tensors().map(|p| p.flatten_all()?.to_dtype(y.dtype()));
        let flat = Tensor::cat(&flat.collect::<Result<Vec<_>>>()?, 0)?;
        y.apply_op2(&flat, EvaluateAll(op))
    }

    fn vjp<'f>(&'f self, t: &Time, y: &Tensor) -> Result<(Tensor, Pullback<'f, Tensor>)> {
        self.check(y)?;
        if !self.is_fused(y) {
            return autograd::vjp(self, t, y);
        }
        let (k, kept) = self.stack(y.dtype())?.evaluate_tensor(y)?;
        Ok((k, Box::new(move |v: &Tensor| self.found(kept.pull(v)?))))
    }

    fn vjp_kept(&self, _: &Time, y: &Tensor) -> Result<Option<KeptVjp>> {
        self.check(y)?;
        if !self.is_fused(y) {
            return Ok(None);
        }
        let (k, kept) = self.stack(y.dtype())?.evaluate_tensor(y)?;
        let (bytes, field) = (kept.bytes(), self.clone());
        let pull = over_leaves(move |v: &Tensor| field.found(kept.pull(v)?));
        Ok(Some((vec![k], Box::new(pull), bytes)))
    }

    fn parameters(&self) -> Option<Vec<Tensor>> {
        if self.learns_graphs() {
            return None;
        }
        let all = self.layers.iter().flat_map(Gcn::tensors);
        Some(all.filter(|p| p.track_op()).cloned().collect())
    }
}

/// What a pull-back leaves: the cotangent of the state, and of the weight and the bias of each layer.
pub(super) struct Found {
    pub(super) state: Tensor,
    pub(super) layers: Vec<[Tensor; 2]>,
}

impl GcnField {
    fn found(&self, found: Found) -> Result<Cotangents<Tensor>> {
        let mut params = GradStore::default();
        for (layer, gradients) in self.layers.iter().zip(found.layers) {
            for (p, gradient) in layer.tensors().zip(gradients) {
                if p.track_op() {
                    add_gradient(&mut params, p, gradient)?;
                }
            }
        }
        Ok(Cotangents {
            y: found.state,
            t: None,
            params,
        })
    }
}
