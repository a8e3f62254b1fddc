//! A perceptron with its derivatives as values: a map from one number of features to another.

use candle_core::backprop::GradStore;
use candle_core::{Module, Result, Tensor, D};
use candle_nn::VarBuilder;

use super::linear::{affine, matmul, sum_of_rows, transposed_matmul};
use super::{add_gradient, wrong_state, Activation, Checked, Linear, Mlp};
use crate::field::{Cotangents, Pullback, VectorField};
use crate::time::Time;

/// N(x) = W_L σ(… σ(W_1 x + b_1) …) + b_L from d to k features, with its derivatives as values.
///
/// x: `(…, d)`; every row is mapped on its own.  With J = ∂N/∂x there are, beside [`forward`](Module::forward),
///
/// * [`jvp`](Self::jvp): N and J v,
/// * [`pull`](Self::pull): N and Jᵀ w,
/// * [`pull_jvp`](Self::pull_jvp): Jᵀ w and its derivative along (v, ẇ).
///
/// All of them are written in ordinary operations, so candle can differentiate the results once more (it has no
/// second derivatives of its own).  With k = 1 and w = 1, `pull` is the gradient of N, and `pull_jvp` with ẇ = 0 is
/// the product of its Hessian with v.
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_diffeq::nn::{Activation, Perceptron};
/// use candle_nn::{VarBuilder, VarMap};
/// let vars = VarMap::new();
/// let vb = VarBuilder::from_varmap(&vars, DType::F64, &Device::Cpu);
/// let net = Perceptron::new(&[3, 16, 2], Activation::Tanh, vb)?;      // 0.weight, 0.bias, 1.weight, 1.bias
/// let x = Tensor::new(&[[0.1, -0.4, 0.7]], &Device::Cpu)?;
/// let (v, w) = (x.ones_like()?, Tensor::new(&[[1.0, -2.0]], &Device::Cpu)?);
/// let (_, jv) = net.jvp(&x, &v)?;
/// let (_, jw) = net.pull(&x, &w)?;
/// let [left, right] = [(jv * w)?, (jw * v)?].map(|x| x.sum_all()?.to_scalar::<f64>());
/// assert!((left? - right?).abs() < 1e-13);                             // wᵀ(J v) = (Jᵀw)ᵀ v
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Perceptron {
    pub(super) layers: Vec<Linear>,
    pub(super) activation: Activation,
    /// The first hidden layer that may be skipped by its input, if any may.
    pub(super) residual: Option<usize>,
}

/// One evaluation, with what its derivatives read; `(row, feature)` each.
pub(super) struct Pass {
    /// What every layer read.
    pub(super) inputs: Vec<Tensor>,
    /// What leaves the products of the hidden layers, its activation, and the slope of that.
    pub(super) hidden: Vec<[Tensor; 3]>,
    pub(super) output: Tensor,
}

/// A tangent, pushed forward.
pub(super) struct Pushed {
    /// ȧ that every layer reads.
    pub(super) inputs: Vec<Tensor>,
    /// ż of the hidden layers.
    pub(super) hidden: Vec<Tensor>,
    pub(super) output: Tensor,
}

/// A cotangent, pulled back.
pub(super) struct Pulled {
    /// g = ∂/∂a of the hidden layers' values.
    pub(super) values: Vec<Tensor>,
    /// δ = ∂/∂z of every layer.
    pub(super) products: Vec<Tensor>,
    /// Of the input.
    pub(super) input: Tensor,
}

impl Perceptron {
    /// Layers of these widths, first d to last k, named `0`, `1`, … with `weight` and `bias`, and initialised as
    /// [`candle_nn::linear()`] does.
    ///
    /// # Errors
    /// Those of the builder; fewer than two widths, or one that is 0.
    pub fn new(widths: &[usize], activation: Activation, vb: VarBuilder<'_>) -> Result<Self> {
        check_widths(widths)?;
        let layer = |(i, w): (usize, &[usize])| Linear::new(w[0], w[1], vb.pp(i));
        let layers = widths.windows(2).enumerate().map(layer);
        Self::from_layers(layers.collect::<Result<_>>()?, activation)
    }

    /// Layers that exist, with biases or without.
    ///
    /// # Errors
    /// [`Error::LayerTensor`](crate::Error::LayerTensor) if a weight is no matrix, a bias not of its outputs, or a tensor
    /// of another dtype or device than the others; if there is no layer, or the layers do not follow on each other.
    pub fn from_layers(layers: Vec<Linear>, activation: Activation) -> Result<Self> {
        let mut checked = Checked::new("nn::Perceptron");
        for (l, layer) in layers.iter().enumerate() {
            let weight = &layer.weight;
            checked.weight(l, weight, 2, "a matrix (outputs, inputs)")?;
            let outputs = weight.dims()[0];
            if let Some(bias) = &layer.bias {
                checked.bias(l, bias, outputs)?;
            }
        }
        let widths = |l: &Linear| (l.weight.dims()[1], l.weight.dims()[0]);
        let follows = |pair: &[Linear]| widths(&pair[0]).1 == widths(&pair[1]).0;
        if layers.is_empty() || !layers.windows(2).all(follows) {
            let widths: Vec<_> = layers.iter().map(widths).collect();
            candle_core::bail!(
                "layers of widths (in, out) {widths:?} are no Perceptron: there must be one, and each must read what the one \
                 before it puts out"
            )
        }
        Ok(Self {
            layers,
            activation,
            residual: None,
        })
    }

    /// Adds to the output of every hidden layer its input, if both have the same width: h ↦ h + σ(W h + b).
    #[must_use]
    pub fn residual(mut self) -> Self {
        self.residual = Some(0);
        self
    }

    /// d.
    pub fn inputs(&self) -> usize {
        self.layers[0].weight.dims()[1]
    }

    /// k.
    pub fn outputs(&self) -> usize {
        self.layers[self.layers.len() - 1].weight.dims()[0]
    }

    /// N(x) and J v, v like x.
    ///
    /// # Errors
    /// [`Error::FieldState`](crate::Error::FieldState) if x or v has not d features; those of candle's operations.
    pub fn jvp(&self, x: &Tensor, v: &Tensor) -> Result<(Tensor, Tensor)> {
        let net = self.like(x)?;
        let pass = net.pass(&self.rows_of(x)?)?;
        let pushed = net.push(&pass, &self.rows_of(v)?)?;
        Ok((
            self.shaped(&pass.output, x)?,
            self.shaped(&pushed.output, x)?,
        ))
    }

    /// N(x) and Jᵀ w, w `(…, k)`.
    ///
    /// # Errors
    /// [`Error::FieldState`](crate::Error::FieldState) if x has not d features or w not k; those of candle's operations.
    pub fn pull(&self, x: &Tensor, w: &Tensor) -> Result<(Tensor, Tensor)> {
        let net = self.like(x)?;
        let pass = net.pass(&self.rows_of(x)?)?;
        let pulled = net.pull_back(&pass, &self.rows_of_outputs(w)?)?;
        Ok((
            self.shaped(&pass.output, x)?,
            pulled.input.reshape(x.shape())?,
        ))
    }

    /// Jᵀ w and its derivative along (v, ẇ), v like x, w and ẇ `(…, k)`:
    ///
    /// d/dε J(x + ε v)ᵀ (w + ε ẇ) at ε = 0.
    ///
    /// # Errors
    /// As [`pull`](Self::pull).
    pub fn pull_jvp(
        &self,
        x: &Tensor,
        w: &Tensor,
        v: &Tensor,
        w_dot: &Tensor,
    ) -> Result<(Tensor, Tensor)> {
        let net = self.like(x)?;
        let pass = net.pass(&self.rows_of(x)?)?;
        let pushed = net.push(&pass, &self.rows_of(v)?)?;
        let pulled = net.pull_back(&pass, &self.rows_of_outputs(w)?)?;
        let bent = net.bend(&pass, &pushed, &pulled, &self.rows_of_outputs(w_dot)?)?;
        Ok((
            pulled.input.reshape(x.shape())?,
            bent.input.reshape(x.shape())?,
        ))
    }

    /// The same with weights in the dtype of x.
    pub(super) fn like(&self, x: &Tensor) -> Result<Self> {
        let cast = |l: &Linear| {
            let bias = l.bias.as_ref().map(|b| b.to_dtype(x.dtype()));
            Ok(Linear {
                weight: l.weight.to_dtype(x.dtype())?,
                bias: bias.transpose()?,
            })
        };
        Ok(Self {
            layers: self.layers.iter().map(cast).collect::<Result<_>>()?,
            ..*self
        })
    }

    /// The same without history.
    pub(super) fn detached(&self) -> Self {
        let plain = |l: &Linear| Linear {
            weight: l.weight.detach(),
            bias: l.bias.as_ref().map(Tensor::detach),
        };
        Self {
            layers: self.layers.iter().map(plain).collect(),
            ..*self
        }
    }

    pub(super) fn tensors(&self) -> impl Iterator<Item = &Tensor> {
        self.layers
            .iter()
            .flat_map(|l| std::iter::once(&l.weight).chain(&l.bias))
    }

    /// x as `(row, feature)`.
    fn rows_of(&self, x: &Tensor) -> Result<Tensor> {
        self.rows(x, self.inputs(), "x")
    }

    /// w as `(row, output)`.
    fn rows_of_outputs(&self, w: &Tensor) -> Result<Tensor> {
        self.rows(w, self.outputs(), "a cotangent")
    }

    fn rows(&self, x: &Tensor, features: usize, what: &str) -> Result<Tensor> {
        if x.dims().last() == Some(&features) {
            return x.reshape(((), features));
        }
        let net = format!("a Perceptron {} → {}", self.inputs(), self.outputs());
        Err(wrong_state(net, format!("{what} (…, {features})"), &[x]))
    }

    /// A result of rows as it belongs to x.
    fn shaped(&self, rows: &Tensor, x: &Tensor) -> Result<Tensor> {
        let mut shape = x.dims().to_vec();
        shape[x.rank() - 1] = self.outputs();
        rows.reshape(shape)
    }

    /// Whether hidden layer l is skipped by its input.
    pub(super) fn skips(&self, l: usize) -> bool {
        let weight = &self.layers[l].weight;
        self.residual.is_some_and(|first| l >= first) && weight.dims()[0] == weight.dims()[1]
    }

    /// The value of rows, and what derivatives read.
    pub(super) fn pass(&self, x: &Tensor) -> Result<Pass> {
        let (mut inputs, mut hidden) = (vec![], vec![]);
        let last = self.layers.len() - 1;
        let mut x = x.clone();
        for (l, layer) in self.layers.iter().enumerate() {
            let z = affine(&x, &layer.weight, layer.bias.as_ref())?;
            if l == last {
                inputs.push(x);
                let output = z;
                return Ok(Pass {
                    inputs,
                    hidden,
                    output,
                });
            }
            let value = self.activation.forward(&z)?;
            let slope = self.activation.slope(&z, &value)?;
            let next = match self.skips(l) {
                true => (&value + &x)?,
                false => value.clone(),
            };
            inputs.push(std::mem::replace(&mut x, next));
            hidden.push([z, value, slope]);
        }
        candle_core::bail!("a Perceptron without layers")
    }

    /// ż_l = W_l ȧ_{l−1}, ȧ_l = σ' ∘ ż_l.
    pub(super) fn push(&self, pass: &Pass, v: &Tensor) -> Result<Pushed> {
        self.push_with(pass, v, None)
    }

    /// The same with a tangent of the first layer's bias.
    pub(super) fn push_with(
        &self,
        pass: &Pass,
        v: &Tensor,
        bias: Option<&Tensor>,
    ) -> Result<Pushed> {
        let (mut inputs, mut hidden) = (vec![], vec![]);
        let mut v = v.clone();
        for (l, layer) in self.layers.iter().enumerate() {
            let mut ahead = v.matmul(&layer.weight.t()?)?;
            if let Some(bias) = bias.filter(|_| l == 0) {
                ahead = ahead.broadcast_add(bias)?;
            }
            let next = match pass.hidden.get(l) {
                None => ahead.clone(),
                Some([_, _, slope]) => {
                    let next = (slope * &ahead)?;
                    hidden.push(ahead);
                    match self.skips(l) {
                        true => (next + &v)?,
                        false => next,
                    }
                }
            };
            inputs.push(std::mem::replace(&mut v, next));
        }
        Ok(Pushed {
            inputs,
            hidden,
            output: v,
        })
    }

    /// δ_l = σ' ∘ g_l, g_{l−1} = W_lᵀ δ_l, from δ_L = w.
    pub(super) fn pull_back(&self, pass: &Pass, w: &Tensor) -> Result<Pulled> {
        let each = |l: usize, g: &Tensor| match pass.hidden.get(l) {
            Some([_, _, slope]) => slope * g,
            None => Ok(g.clone()),
        };
        self.backwards(w, each)
    }

    /// The derivative of [`pull_back`](Self::pull_back) along a tangent and ẇ:
    /// δ̇_l = σ' ∘ ġ_l + σ'' ∘ ż_l ∘ g_l, ġ_{l−1} = W_lᵀ δ̇_l.
    pub(super) fn bend(
        &self,
        pass: &Pass,
        pushed: &Pushed,
        pulled: &Pulled,
        w_dot: &Tensor,
    ) -> Result<Pulled> {
        let each = |l: usize, g_dot: &Tensor| match pass.hidden.get(l) {
            Some([z, value, slope]) => {
                let curvature = self.activation.curvature(z, value, slope)?;
                let bent = ((curvature * &pushed.hidden[l])? * &pulled.values[l])?;
                (slope * g_dot)? + bent
            }
            None => Ok(g_dot.clone()),
        };
        self.backwards(w_dot, each)
    }

    /// From the last layer to the first; `each` makes of g_l what passes the layer's activation.
    fn backwards(
        &self,
        w: &Tensor,
        each: impl Fn(usize, &Tensor) -> Result<Tensor>,
    ) -> Result<Pulled> {
        let (mut values, mut products) = (vec![], vec![]);
        let last = self.layers.len() - 1;
        let mut g = w.clone();
        for (l, layer) in self.layers.iter().enumerate().rev() {
            let product = each(l, &g)?;
            let next = product.matmul(&layer.weight)?;
            let next = match l < last && self.skips(l) {
                true => (next + &g)?,
                false => next,
            };
            products.push(product);
            if l < last {
                values.push(g);
            }
            g = next;
        }
        values.reverse();
        products.reverse();
        Ok(Pulled {
            values,
            products,
            input: g,
        })
    }
}

impl Module for Perceptron {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let pass = self.like(x)?.pass(&self.rows_of(x)?)?;
        self.shaped(&pass.output, x)
    }
}

/// The field y' = N(y), where k = d; with k < d the last derivative of a [`HigherOrder`](super::HigherOrder) equation.
impl VectorField<Tensor> for Perceptron {
    fn velocity(&self, _: &Time, y: &Tensor) -> Result<Tensor> {
        self.forward(y)
    }

    fn vjp<'f>(&'f self, _: &Time, y: &Tensor) -> Result<(Tensor, Pullback<'f, Tensor>)> {
        let net = self.detached().like(y)?;
        let pass = net.pass(&self.rows_of(&y.detach())?)?;
        let (k, shape) = (self.shaped(&pass.output, y)?, y.shape().clone());
        let pull = move |v: &Tensor| {
            let mut params = GradStore::default();
            let mut g = v.reshape(((), self.outputs()))?;
            for (l, layer) in net.layers.iter().enumerate().rev() {
                let mut skipped = None;
                if let Some([_, _, slope]) = pass.hidden.get(l) {
                    skipped = net.skips(l).then(|| g.clone());
                    g = (slope * g)?;
                }
                let own = &self.layers[l];
                if own.weight.track_op() {
                    let gradient = transposed_matmul(&g, &pass.inputs[l])?;
                    add_gradient(&mut params, &own.weight, gradient)?;
                }
                if let Some(bias) = own.bias.as_ref().filter(|b| b.track_op()) {
                    add_gradient(&mut params, bias, sum_of_rows(&g)?)?;
                }
                g = matmul(&g, &layer.weight)?;
                if let Some(skipped) = skipped {
                    g = (g + skipped)?;
                }
            }
            Ok(Cotangents {
                y: g.reshape(&shape)?,
                t: None,
                params,
            })
        };
        Ok((k, Box::new(pull)))
    }

    fn parameters(&self) -> Option<Vec<Tensor>> {
        let tracked = self.tensors().filter(|p| p.track_op());
        Some(tracked.cloned().collect())
    }
}

impl Mlp {
    /// Jᵀ w, J = ∂f/∂y at time t, as a value that candle differentiates: y and w `(…, features)`.
    ///
    /// # Errors
    /// [`Error::FieldState`](crate::Error::FieldState) if y or w has not the features of the field; those of candle's operations.
    pub fn pull(&self, t: &Time, y: &Tensor, w: &Tensor) -> Result<Tensor> {
        Ok(self.perceptron(t)?.pull(y, w)?.1)
    }

    /// Jᵀ w and its derivative along (v, ẇ) at time t; see [`Perceptron::pull_jvp`].
    ///
    /// # Errors
    /// As [`pull`](Self::pull).
    pub fn pull_jvp(
        &self,
        t: &Time,
        y: &Tensor,
        w: &Tensor,
        v: &Tensor,
        w_dot: &Tensor,
    ) -> Result<(Tensor, Tensor)> {
        self.perceptron(t)?.pull_jvp(y, w, v, w_dot)
    }

    /// The network at time t.
    fn perceptron(&self, t: &Time) -> Result<Perceptron> {
        let layer = |l: &super::mlp::Affine| Linear {
            weight: l.weight.clone(),
            bias: Some(l.bias.clone()),
        };
        Ok(Perceptron {
            layers: self.at(t)?.layers.iter().map(layer).collect(),
            activation: self.activation,
            // A layer that reads time is not skipped.
            residual: self.residual.then_some(usize::from(self.time)),
        })
    }
}

/// That there are layers, and none without width.
pub(super) fn check_widths(widths: &[usize]) -> Result<()> {
    if widths.len() < 2 || widths.contains(&0) {
        candle_core::bail!("a network of widths {widths:?} cannot be built: at least two are needed, and each must be at least 1")
    }
    Ok(())
}

/// Parts of the last dimension, each as long as `len`, contiguous.
pub(super) fn part(x: &Tensor, from: usize, len: usize) -> Result<Tensor> {
    x.narrow(D::Minus1, from, len)?.contiguous()
}
