//! A perceptron of any depth as a vector field.

pub(super) mod tiles;

use std::rc::Rc;

use candle_core::backprop::GradStore;
use candle_core::{Module, Result, Shape, Tensor};
use candle_nn::{Linear, VarBuilder};

use super::linear::{affine, matmul, sum_of_rows, transposed_matmul};
use super::Activation;
use super::{add_gradient, coefficients, wrong_state, Checked};
#[cfg(feature = "cuda")]
use crate::field::OnDevice;
use crate::field::{
    over_leaves, Cotangents, KeptVjp, LateGradients, LatePullback, Offer, Pullback, VectorField,
};
use crate::memory::held;
use crate::offer::Offered;
use crate::time::Time;

/// f(t, y) = W_L σ(… σ(W_1 [y, t] + b_1) …) + b_L, with `[out, in]` weights.
///
/// y: `(…, features)`; every row is mapped on its own.  On the CPU in f32 (also where bf16 or f16
/// is rounding around it) and f64, the solver integrates it tile by tile; anywhere else it is a
/// chain of candle's operations with a pull-back written by hand.
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_diffeq::nn::{Activation, Mlp};
/// use candle_diffeq::NeuralOde;
/// let vars = candle_nn::VarMap::new();
/// let ode = NeuralOde::new(&vars, "f", &Device::Cpu, |vb| {
///     Mlp::new(&[2, 64, 64, 2], Activation::Tanh, vb)          // f.0.weight, f.0.bias, …
/// })?;
/// let ys = ode.solve(&Tensor::ones((8, 2), DType::F32, &Device::Cpu)?, &[0.0, 0.5, 1.0])?;
/// assert_eq!(ys.dims(), [3, 8, 2]);
/// # Ok::<(), candle_diffeq::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Mlp {
    pub(super) layers: Vec<Affine>,
    pub(super) activation: Activation,
    pub(super) time: bool,
    pub(super) residual: bool,
}

#[derive(Clone, Debug)]
pub(super) struct Affine {
    pub(super) weight: Tensor,
    pub(super) bias: Tensor,
}

impl Affine {
    pub(super) fn inputs(&self) -> usize {
        self.weight.dims()[1]
    }

    pub(super) fn outputs(&self) -> usize {
        self.weight.dims()[0]
    }

    fn widths(&self) -> (usize, usize) {
        (self.inputs(), self.outputs())
    }
}

impl Mlp {
    /// Layers of these widths, first features to last, named `0`, `1`, … with `weight` and `bias`,
    /// and initialised, as [`candle_nn::linear()`] does.
    ///
    /// # Errors
    /// Those of the builder; fewer than two widths, or one that is 0.
    pub fn new(widths: &[usize], activation: Activation, vb: VarBuilder<'_>) -> Result<Self> {
        Self::build(widths, activation, false, vb)
    }

    /// Like [`new`](Self::new), with time as one more input of the first layer, after the features: its weight is
    /// `(widths[1], widths[0] + 1)`.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn with_time(widths: &[usize], activation: Activation, vb: VarBuilder<'_>) -> Result<Self> {
        Self::build(widths, activation, true, vb)
    }

    /// Layers that exist; whether the first reads time as its last input.
    ///
    /// # Errors
    /// [`Error::LayerTensor`](crate::Error::LayerTensor)
    /// if a weight is no matrix, a bias not of its outputs, or a tensor of another
    /// dtype or device than the others; if the layers do not follow on each other, or have no bias.
    pub fn from_layers(layers: &[Linear], activation: Activation, time: bool) -> Result<Self> {
        let mlp = Self::of_any("Mlp::from_layers", layers, activation, time)?;
        if mlp.reads() != mlp.features() {
            let widths: Vec<_> = mlp.layers.iter().map(Affine::widths).collect();
            candle_core::bail!(
                "layers of widths (in, out) {widths:?} do not map a state to its velocity"
            )
        }
        Ok(mlp)
    }

    /// Layers that follow on each other; the first may read more than the last returns.
    pub(super) fn of_any(
        name: &'static str,
        layers: &[Linear],
        activation: Activation,
        time: bool,
    ) -> Result<Self> {
        let mut checked = Checked::new(name);
        for (l, layer) in layers.iter().enumerate() {
            let (weight, bias) = (layer.weight(), layer.bias());
            checked.weight(l, weight, 2, "a matrix (outputs, inputs)")?;
            let outputs = weight.dims()[0];
            let Some(bias) = bias else {
                candle_core::bail!("{name}, layer {l} has no bias: it needs one of [{outputs}]")
            };
            checked.bias(l, bias, outputs)?;
        }
        let affine = |layer: &Linear| {
            let (weight, bias) = (layer.weight().clone(), layer.bias()?.clone());
            Some(Affine { weight, bias })
        };
        let layers: Vec<_> = layers.iter().filter_map(affine).collect();
        let follows = |pair: &[Affine]| pair[0].outputs() == pair[1].inputs();
        let Some(first) = layers.first() else {
            candle_core::bail!("{name} needs a layer")
        };
        if !layers.windows(2).all(follows) || first.inputs() < usize::from(time) {
            let widths: Vec<_> = layers.iter().map(Affine::widths).collect();
            candle_core::bail!(
                "{name}: layers of widths (in, out) {widths:?} do not follow on each other"
            )
        }
        Ok(Self {
            layers,
            activation,
            time,
            residual: false,
        })
    }

    fn build(
        widths: &[usize],
        activation: Activation,
        time: bool,
        vb: VarBuilder<'_>,
    ) -> Result<Self> {
        if widths.contains(&0) {
            candle_core::bail!("an Mlp of widths {widths:?}: each must be at least 1")
        }
        let layer = |(i, w): (usize, &[usize])| {
            let inputs = w[0] + usize::from(time && i == 0);
            candle_nn::linear(inputs, w[1], vb.pp(i))
        };
        let layers = widths.windows(2).enumerate().map(layer);
        Self::from_layers(&layers.collect::<Result<Vec<_>>>()?, activation, time)
    }

    /// Adds its input to what every hidden layer that keeps the width puts out: h ↦ h + σ(W h + b).
    #[must_use]
    pub fn residual(mut self) -> Self {
        self.residual = true;
        self
    }

    /// Features of the state.
    pub fn features(&self) -> usize {
        self.layers.last().map_or(0, Affine::outputs)
    }

    /// What the first layer reads beside time: the features of the state, unless it was made by
    /// [`of_any`](Self::of_any).
    fn reads(&self) -> usize {
        let inputs = self.layers.first().map_or(0, Affine::inputs);
        inputs.saturating_sub(usize::from(self.time))
    }

    /// Whether hidden layer l is skipped by its input.
    pub(super) fn skips(&self, l: usize) -> bool {
        let Affine { weight, .. } = &self.layers[l];
        let reads_time = self.time && l == 0;
        self.residual && !reads_time && weight.dims()[0] == weight.dims()[1]
    }

    /// Whether y is a state of this field.
    pub(super) fn check(&self, y: &Tensor) -> Result<()> {
        let features = self.features();
        if y.dims().last() == Some(&features) {
            return Ok(());
        }
        let field = format!("an Mlp of {features} features");
        Err(wrong_state(field, format!("y (…, {features})"), &[y]))
    }

    /// The perceptron that the field is at time t: its first layer reads the state alone, and adds
    /// w t + b, w the column that belongs to time, formed in the precision of t and rounded once.
    pub(super) fn at(&self, t: &Time) -> Result<Self> {
        let mut at = self.of_state()?;
        if let (true, Some(first)) = (self.time, at.layers.first_mut()) {
            let (t, own) = (t.tensor()?, &self.layers[0].weight);
            let wide = coefficients(&t, first.bias.dtype());
            let of_time = own.narrow(1, self.reads(), 1)?.squeeze(1)?;
            let of_time = of_time.to_dtype(wide)?.broadcast_mul(&t.to_dtype(wide)?)?;
            let bias = (of_time + first.bias.to_dtype(wide)?)?;
            first.bias = bias.to_dtype(first.bias.dtype())?;
        }
        Ok(at)
    }

    /// The same with the weights by which the first layer multiplies the state alone; the bias is left as it is.
    pub(super) fn of_state(&self) -> Result<Self> {
        let mut of_state = self.clone();
        if let (true, Some(first)) = (self.time, of_state.layers.first_mut()) {
            first.weight = first.weight.narrow(1, 0, self.reads())?.contiguous()?;
        }
        Ok(of_state)
    }

    /// A copy of t, which outlives an evaluation, where the field reads it.
    pub(super) fn time_of(&self, t: &Time) -> Result<Option<Tensor>> {
        match self.time {
            true => Ok(Some(t.tensor()?.detach().copy()?)),
            false => Ok(None),
        }
    }

    /// Of the field [`at`](Self::at) a time: the velocity, what every layer read, and z of every
    /// hidden one.
    pub(super) fn run(&self, y: &Tensor) -> Result<(Tensor, Vec<Tensor>, Vec<Tensor>)> {
        let (mut inputs, mut hidden) = (vec![], vec![]);
        // The column that belongs to time is not in the first weight any more.
        let width = self.layers.first().map_or(0, Affine::inputs);
        let mut x = y.reshape(((), width))?;
        for (l, layer) in self.layers.iter().enumerate() {
            let z = affine(&x, &layer.weight, Some(&layer.bias))?;
            let read = x;
            x = if l + 1 == self.layers.len() {
                z
            } else {
                let value = self.activation.forward(&z)?;
                hidden.push(z);
                match self.skips(l) {
                    true => (value + &read)?,
                    false => value,
                }
            };
            inputs.push(read);
        }
        let mut shape = y.dims().to_vec();
        if let Some(last) = shape.last_mut() {
            *last = self.features();
        }
        Ok((x.reshape(shape)?, inputs, hidden))
    }

    /// Adds the gradients of layer l: those of its bias, the sums over the rows of the cotangent of its
    /// z, and of its weight but for the column of time, both formed where they are asked for.  Returns
    /// the cotangent of time where the layer reads it.
    pub(super) fn add_gradients(
        &self,
        l: usize,
        bias_bar: impl FnOnce() -> Result<Tensor>,
        weight_bar: impl FnOnce() -> Result<Tensor>,
        t: Option<&Tensor>,
        params: &mut GradStore,
    ) -> Result<Option<Tensor>> {
        let Affine { weight, bias } = &self.layers[l];
        let Some(t) = t.filter(|_| l == 0) else {
            if weight.track_op() {
                add_gradient(params, weight, weight_bar()?)?;
            }
            if bias.track_op() {
                add_gradient(params, bias, bias_bar()?)?;
            }
            return Ok(None);
        };
        // All that belongs to time follows from the sums over the rows.
        let wide = coefficients(t, weight.dtype());
        let sums = bias_bar()?.to_dtype(wide)?;
        if weight.track_op() {
            let column = sums.broadcast_mul(&t.to_dtype(wide)?)?.unsqueeze(1)?;
            let gradient = Tensor::cat(&[&weight_bar()?.to_dtype(wide)?, &column], 1)?;
            add_gradient(params, weight, gradient)?;
        }
        let w = weight.detach().narrow(1, self.reads(), 1)?.squeeze(1)?;
        let of_time = (w.to_dtype(wide)? * &sums)?.sum_all()?;
        if bias.track_op() {
            add_gradient(params, bias, sums)?;
        }
        Ok(Some(of_time))
    }

    /// One evaluation, and what its pull-back needs.
    fn linearised(&self, t: &Time, y: &Tensor) -> Result<(Tensor, Linearised)> {
        let (at, t) = (self.detached().at(t)?.detached(), self.time_of(t)?);
        let at = at.like(y)?;
        let (k, inputs, hidden) = at.run(&y.detach())?;
        let linear = Linearised {
            at: Some(at),
            t,
            inputs,
            hidden,
            shape: y.shape().clone(),
        };
        Ok((k, linear))
    }

    /// The gradients of the parameters from what every layer read and the cotangents of z by layer, and the cotangent
    /// of time.
    fn gradients(
        &self,
        inputs: &[Tensor],
        seeds: &[Tensor],
        t: Option<&Tensor>,
    ) -> Result<(GradStore, Option<Tensor>)> {
        let (mut params, mut of_time) = (GradStore::default(), None);
        for (l, g) in seeds.iter().enumerate().rev() {
            let weight_bar = || transposed_matmul(g, &inputs[l]);
            let sums = || sum_of_rows(g);
            of_time = self.add_gradients(l, sums, weight_bar, t, &mut params)?;
        }
        Ok((params, of_time))
    }

    /// The value at inputs that were checked, and its pull-back.
    pub(super) fn vjp_of_any<'f>(
        &'f self,
        t: &Time,
        y: &Tensor,
    ) -> Result<(Tensor, Pullback<'f, Tensor>)> {
        let (k, linear) = self.linearised(t, y)?;
        Ok((k, Box::new(move |v: &Tensor| linear.cotangents(self, v))))
    }

    /// The value at inputs that were checked.
    pub(super) fn value_of_any(&self, t: &Time, y: &Tensor) -> Result<Tensor> {
        Ok(self.at(t)?.like(y)?.run(y)?.0)
    }

    pub(super) fn tensors(&self) -> impl Iterator<Item = &Tensor> {
        self.layers.iter().flat_map(|l| [&l.weight, &l.bias])
    }

    /// The same with weights in the dtype of a state: parameters may have a precision of their own.
    pub(super) fn like(&self, y: &Tensor) -> Result<Self> {
        let cast = |l: &Affine| {
            Ok(Affine {
                weight: l.weight.to_dtype(y.dtype())?,
                bias: l.bias.to_dtype(y.dtype())?,
            })
        };
        Ok(Self {
            layers: self.layers.iter().map(cast).collect::<Result<_>>()?,
            ..*self
        })
    }

    /// The same without history.
    pub(super) fn detached(&self) -> Self {
        let plain = |l: &Affine| Affine {
            weight: l.weight.detach(),
            bias: l.bias.detach(),
        };
        Self {
            layers: self.layers.iter().map(plain).collect(),
            ..*self
        }
    }
}

/// An evaluation: the perceptron at its time (if it is not formed again), what every layer read, and z of every hidden
/// one.
struct Linearised {
    at: Option<Mlp>,
    t: Option<Tensor>,
    inputs: Vec<Tensor>,
    hidden: Vec<Tensor>,
    shape: Shape,
}

impl Linearised {
    /// The same, with less memory: the pull-back forms the weights again.
    fn without_weights(self) -> Self {
        Self { at: None, ..self }
    }

    /// The cotangents of z by layer, and that of y.
    fn pull(&self, field: &Mlp, v: &Tensor) -> Result<(Vec<Tensor>, Tensor)> {
        let formed;
        let at = match &self.at {
            Some(at) => at,
            None => {
                formed = field.detached().of_state()?.like(v)?;
                &formed
            }
        };
        let mut seeds = Vec::with_capacity(at.layers.len());
        let mut g = v.reshape(((), at.features()))?;
        for (l, layer) in at.layers.iter().enumerate().rev() {
            let mut skipped = None;
            if let Some(z) = self.hidden.get(l) {
                skipped = at.skips(l).then(|| g.clone());
                g = at.activation.pull(z, &g)?;
            }
            let mut next = matmul(&g, &layer.weight)?;
            if let Some(skipped) = skipped {
                next = (next + skipped)?;
            }
            seeds.push(std::mem::replace(&mut g, next));
        }
        seeds.reverse();
        Ok((seeds, g.reshape(&self.shape)?))
    }

    /// vᵀ∂f of the field that was evaluated.
    fn cotangents(&self, field: &Mlp, v: &Tensor) -> Result<Cotangents<Tensor>> {
        let (seeds, y) = self.pull(field, v)?;
        let (params, t) = field.gradients(&self.inputs, &seeds, self.t.as_ref())?;
        Ok(Cotangents { y, t, params })
    }

    /// Bytes that it holds, but for those of the weights.
    fn bytes(&self) -> usize {
        held(self.t.iter().chain(&self.inputs).chain(&self.hidden), [])
    }
}

impl Module for Mlp {
    fn forward(&self, y: &Tensor) -> Result<Tensor> {
        if self.time {
            candle_core::bail!(
                "an Mlp with time is a vector field, not a module of the state alone"
            )
        }
        self.check(y)?;
        Ok(self.run(y)?.0)
    }
}

impl VectorField<Tensor> for Mlp {
    fn velocity(&self, t: &Time, y: &Tensor) -> Result<Tensor> {
        self.check(y)?;
        self.value_of_any(t, y)
    }

    fn vjp<'f>(&'f self, t: &Time, y: &Tensor) -> Result<(Tensor, Pullback<'f, Tensor>)> {
        self.check(y)?;
        self.vjp_of_any(t, y)
    }

    fn vjp_kept(&self, t: &Time, y: &Tensor) -> Result<Option<KeptVjp>> {
        self.check(y)?;
        let (k, linear) = self.linearised(t, y)?;
        let (linear, field) = (linear.without_weights(), self.clone());
        let bytes = linear.bytes();
        let pull = over_leaves(move |v: &Tensor| linear.cotangents(&field, v));
        Ok(Some((vec![k], Box::new(pull), bytes)))
    }

    fn vjp_late<'f>(
        &'f self,
        t: &Time,
        y: &Tensor,
    ) -> Result<Option<(Tensor, LatePullback<'f, Tensor>)>> {
        self.check(y)?;
        let (k, linear) = self.linearised(t, y)?;
        let pull = move |v: &Tensor| {
            let (seeds, y) = linear.pull(self, v)?;
            // What is kept of the evaluation is what the layers read, and neither z nor the weights.
            let (inputs, t) = (linear.inputs.clone(), linear.t.clone());
            let params = move || Ok(self.gradients(&inputs, &seeds, t.as_ref())?.0);
            let params: LateGradients<'f> = Rc::new(params);
            Ok((y, params))
        };
        Ok(Some((k, Box::new(pull))))
    }

    fn parameters(&self) -> Option<Vec<Tensor>> {
        let tracked = self.tensors().filter(|p| p.track_op());
        Some(tracked.cloned().collect())
    }

    fn offer(&self) -> Option<Offer> {
        let offered = Offered::of::<Tensor, _>(self, true).few(tiles::FewRows(self.clone()));
        #[cfg(feature = "cuda")]
        let offered = offered.launched(self.clone());
        Some(offered.into())
    }

    #[cfg(feature = "cuda")]
    fn on_device(&self) -> Option<&dyn OnDevice> {
        Some(self)
    }
}
