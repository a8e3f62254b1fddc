//! A stack of convolutions as a vector field.

mod normed;
mod tiles;

use candle_core::backprop::GradStore;
use candle_core::{Module, Result, Tensor, D};
use candle_nn::{Conv2d, Conv2dConfig, Init, VarBuilder};

use super::Activation;
use super::{add_gradient, wrong_state, Checked};
use crate::field::{Cotangents, Offer, Pullback, VectorField};
use crate::offer::Offered;
use crate::precision::at_least_f32;
use crate::time::Time;

/// f(t, y) = w_L ∗ σ(… σ(w_1 ∗ y + b_1) …) + b_L, with `[out, in, k, k]` filters, k odd, of stride 1
/// over images that are zero beyond their border; optionally with a group norm before each σ.
///
/// y: `(batch, channels, height, width)`; every image is mapped on its own, to one of its shape.  On
/// the CPU in f32 (also where bf16 or f16 is rounding around it) and f64, the solver integrates it
/// tile by tile; anywhere else it is a chain of candle's operations with a pull-back written by
/// hand.
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_diffeq::nn::{Activation, ConvField};
/// use candle_diffeq::NeuralOde;
/// let vars = candle_nn::VarMap::new();
/// let ode = NeuralOde::new(&vars, "f", &Device::Cpu, |vb| {
///     ConvField::new(&[3, 8, 3], 3, Activation::Relu, vb)      // f.0.weight, f.0.bias, …
/// })?;
/// let ys = ode.solve(&Tensor::ones((2, 3, 9, 9), DType::F32, &Device::Cpu)?, &[0.0, 1.0])?;
/// assert_eq!(ys.dims(), [2, 2, 3, 9, 9]);
/// # Ok::<(), candle_diffeq::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct ConvField {
    layers: Vec<Filter>,
    activation: Activation,
}

#[derive(Clone, Debug)]
struct Filter {
    /// `(out, in, size, size)`.
    weight: Tensor,
    bias: Tensor,
    /// Of a hidden layer that has one.
    norm: Option<GroupNorm>,
}

/// Group norm: over the channels of a group and all pixels.
#[derive(Clone, Debug)]
struct GroupNorm {
    groups: usize,
    weight: Tensor,
    bias: Tensor,
}

/// What a normed layer computed on the way.
struct Normed {
    /// (z − mean) / deviation, of z's shape.
    normal: Tensor,
    /// 1 / deviation, `(batch, groups, 1)`.
    scale: Tensor,
}

/// What an evaluation computed on the way.
struct ConvEvaluation {
    velocity: Tensor,
    /// What every layer read.
    inputs: Vec<Tensor>,
    /// What every activation read.
    hidden: Vec<Tensor>,
    normed: Vec<Option<Normed>>,
}

const EPSILON: f64 = 1e-5;

impl Filter {
    /// Outputs, inputs and size.
    fn shape(&self) -> [usize; 3] {
        let dims = self.weight.dims();
        [dims[0], dims[1], dims[2]]
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let x = convolve(x, &self.weight)?;
        // candle sums the gradient of a broadcast in its dtype.
        let bias = self.bias.to_dtype(at_least_f32(x.dtype()))?;
        let bias = by_channel(&bias)?.broadcast_as(x.shape())?;
        let bias = bias.to_dtype(x.dtype())?;
        x + bias
    }

    fn tensors(&self) -> Vec<&Tensor> {
        let norm = self.norm.iter().flat_map(|n| [&n.weight, &n.bias]);
        [&self.weight, &self.bias].into_iter().chain(norm).collect()
    }

    /// The same of other tensors.
    fn map(&self, of: impl Fn(&Tensor) -> Result<Tensor>) -> Result<Self> {
        let norm = |norm: &GroupNorm| {
            Ok::<_, candle_core::Error>(GroupNorm {
                groups: norm.groups,
                weight: of(&norm.weight)?,
                bias: of(&norm.bias)?,
            })
        };
        Ok(Self {
            weight: of(&self.weight)?,
            bias: of(&self.bias)?,
            norm: self.norm.as_ref().map(norm).transpose()?,
        })
    }
}

fn convolve(x: &Tensor, weight: &Tensor) -> Result<Tensor> {
    x.conv2d(weight, weight.dim(D::Minus1)? / 2, 1, 1, 1)
}

/// `(channels)` as `(channels, 1, 1)`.
fn by_channel(x: &Tensor) -> Result<Tensor> {
    x.reshape(((), 1, 1))
}

/// Σ over images and pixels, of low precision in f32.
fn channel_sums(x: &Tensor) -> Result<Tensor> {
    x.to_dtype(at_least_f32(x.dtype()))?.sum((0, 2, 3))
}

impl GroupNorm {
    /// `(batch, group, its numbers)`, also of no image.
    fn grouped(&self, x: &Tensor) -> Result<Tensor> {
        let (batch, channels, height, width) = x.dims4()?;
        x.reshape((batch, self.groups, channels / self.groups * height * width))
    }

    /// γ n + β, and n.
    fn forward(&self, z: &Tensor) -> Result<(Tensor, Normed)> {
        // As candle_nn does: low precision is normed in f32.
        let inner = at_least_f32(z.dtype());
        let grouped = self.grouped(&z.to_dtype(inner)?)?;
        let centred = grouped.broadcast_sub(&grouped.mean_keepdim(2)?)?;
        let variance = centred.sqr()?.mean_keepdim(2)?;
        let scale = (variance + EPSILON)?.sqrt()?.recip()?;
        let normal = centred.broadcast_mul(&scale)?.reshape(z.shape())?;
        let normal = normal.to_dtype(z.dtype())?;
        let y = normal.broadcast_mul(&by_channel(&self.weight)?)?;
        let y = y.broadcast_add(&by_channel(&self.bias)?)?;
        Ok((y, Normed { normal, scale }))
    }

    /// The cotangent of z of that of y.
    fn pull(&self, normed: &Normed, g: &Tensor) -> Result<Tensor> {
        let inner = normed.scale.dtype();
        let grouped = |x: &Tensor| self.grouped(&x.to_dtype(inner)?);
        let n = grouped(&normed.normal)?;
        let g_n = grouped(&g.broadcast_mul(&by_channel(&self.weight)?)?)?;
        let along = n.broadcast_mul(&(&g_n * &n)?.mean_keepdim(2)?)?;
        let rest = (g_n.broadcast_sub(&g_n.mean_keepdim(2)?)? - along)?;
        let pulled = rest.broadcast_mul(&normed.scale)?.reshape(g.shape())?;
        pulled.to_dtype(g.dtype())
    }
}

impl ConvField {
    /// Layers of these channels, first to last, with filters of `size` × `size`, named `0`, `1`, …
    /// with `weight` `(out, in, size, size)` and `bias` `(out)`, and initialised, as
    /// [`candle_nn::conv2d`] does.
    ///
    /// # Errors
    /// Those of the builder; fewer than two channel counts or one that is 0, a first that is not the last, an even size.
    pub fn new(
        channels: &[usize],
        size: usize,
        activation: Activation,
        vb: VarBuilder<'_>,
    ) -> Result<Self> {
        if channels.contains(&0) || size == 0 {
            candle_core::bail!(
                "a ConvField of channels {channels:?}, filters of {size}: each must be at least 1"
            )
        }
        let config = Conv2dConfig {
            padding: size / 2,
            ..Default::default()
        };
        let layer =
            |(i, c): (usize, &[usize])| candle_nn::conv2d(c[0], c[1], size, config, vb.pp(i));
        let layers = channels.windows(2).enumerate().map(layer);
        Self::from_layers(&layers.collect::<Result<Vec<_>>>()?, activation)
    }

    /// Like [`new`](Self::new), with a group norm after each hidden convolution, before the activation, named
    /// `0.norm`, `1.norm`, … with `weight` and `bias` `(out)`, as [`candle_nn::group_norm()`] has them; its ε is
    /// 10⁻⁵.
    ///
    /// # Errors
    /// As [`new`](Self::new); channels that `groups` do not divide.
    pub fn with_group_norm(
        channels: &[usize],
        size: usize,
        groups: usize,
        activation: Activation,
        vb: VarBuilder<'_>,
    ) -> Result<Self> {
        let mut field = Self::new(channels, size, activation, vb.clone())?;
        let hidden = field.layers.len() - 1;
        for (l, layer) in field.layers[..hidden].iter_mut().enumerate() {
            let [channels, ..] = layer.shape();
            if groups == 0 || channels % groups != 0 {
                candle_core::bail!(
                    "the {channels} channels of layer {l} cannot be put in {groups} groups: their number must be a multiple of that of the groups"
                )
            }
            let vb = vb.pp(l).pp("norm");
            layer.norm = Some(GroupNorm {
                groups,
                weight: vb.get_with_hints(channels, "weight", Init::Const(1.0))?,
                bias: vb.get_with_hints(channels, "bias", Init::Const(0.0))?,
            });
        }
        Ok(field)
    }

    /// Layers that exist.
    ///
    /// # Errors
    /// [`Error::LayerTensor`](crate::Error::LayerTensor)
    /// if a bias is not of its outputs, or a tensor of another dtype or device
    /// than the others.  If the layers do not follow on each other, have no bias, or do not keep the image's size:
    /// filters must be square and odd, of stride, dilation and groups 1, with padding of half
    /// their size.
    pub fn from_layers(layers: &[Conv2d], activation: Activation) -> Result<Self> {
        let mut checked = Checked::new("ConvField::from_layers");
        for (l, layer) in layers.iter().enumerate() {
            let (weight, bias) = (layer.weight(), layer.bias());
            checked.weight(l, weight, 4, "filters (outputs, inputs, size, size)")?;
            let outputs = weight.dims()[0];
            if let Some(bias) = bias {
                checked.bias(l, bias, outputs)?;
            }
        }
        let layers = layers.iter().map(filter).collect::<Result<Vec<_>>>()?;
        let (Some(first), Some(last)) = (layers.first(), layers.last()) else {
            candle_core::bail!("a ConvField needs a layer")
        };
        let follows = |pair: &[Filter]| pair[0].shape()[0] == pair[1].shape()[1];
        if !layers.windows(2).all(follows) || first.shape()[1] != last.shape()[0] {
            let channels: Vec<_> = layers
                .iter()
                .map(|l| (l.shape()[1], l.shape()[0]))
                .collect();
            candle_core::bail!(
                "layers of channels (in, out) {channels:?} do not map a state to its velocity"
            )
        }
        Ok(Self { layers, activation })
    }

    /// Channels of the state.
    pub fn channels(&self) -> usize {
        self.layers.last().map_or(0, |l| l.shape()[0])
    }

    fn check(&self, y: &Tensor) -> Result<()> {
        let channels = self.channels();
        match y.dims() {
            &[_, of, height, width] if of == channels && height * width > 0 => Ok(()),
            _ => Err(wrong_state(
                format!("a ConvField of {channels} channels"),
                format!("y (batch, {channels}, height, width)"),
                &[y],
            )),
        }
    }

    fn run(&self, y: Tensor) -> Result<ConvEvaluation> {
        self.check(&y)?;
        let (mut x, mut inputs, mut hidden, mut normed) = (y, vec![], vec![], vec![]);
        for (l, layer) in self.layers.iter().enumerate() {
            let mut z = layer.forward(&x)?;
            inputs.push(x);
            if l + 1 == self.layers.len() {
                x = z;
                break;
            }
            normed.push(match &layer.norm {
                Some(norm) => {
                    let normal;
                    (z, normal) = norm.forward(&z)?;
                    Some(normal)
                }
                None => None,
            });
            x = self.activation.forward(&z)?;
            hidden.push(z);
        }
        Ok(ConvEvaluation {
            velocity: x,
            inputs,
            hidden,
            normed,
        })
    }

    /// vᵀ∂f/∂y, and the gradients of the parameters into `params`, as those of the layers `of`.
    fn pull(
        &self,
        of: &[Filter],
        at: &ConvEvaluation,
        v: &Tensor,
        params: &mut GradStore,
    ) -> Result<Tensor> {
        let mut g = v.contiguous()?;
        for (l, (layer, of)) in self.layers.iter().zip(of).enumerate().rev() {
            if let Some(z) = at.hidden.get(l) {
                g = self.activation.pull(z, &g)?;
            }
            let mut found = |p: &Tensor, grad: &dyn Fn() -> Result<Tensor>| {
                // A layer that is frozen has no gradient.
                if p.track_op() {
                    add_gradient(params, p, grad()?)?;
                }
                Ok::<_, candle_core::Error>(())
            };
            if let (Some(norm), Some(of), Some(Some(normed))) =
                (&layer.norm, &of.norm, at.normed.get(l))
            {
                found(&of.weight, &|| channel_sums(&(&g * &normed.normal)?))?;
                found(&of.bias, &|| channel_sums(&g))?;
                g = norm.pull(normed, &g)?.detach();
            }
            found(&of.weight, &|| weight_gradient(&at.inputs[l], &g, layer))?;
            found(&of.bias, &|| channel_sums(&g))?;
            let adjoint = layer.weight.transpose(0, 1)?.contiguous()?;
            g = convolve(&g, &adjoint.flip(&[2, 3])?)?;
        }
        Ok(g)
    }

    /// The same of other tensors: parameters may have a precision of their own.
    fn map(&self, of: impl Fn(&Tensor) -> Result<Tensor>) -> Result<Self> {
        let layers = self.layers.iter().map(|layer| layer.map(&of));
        Ok(Self {
            layers: layers.collect::<Result<_>>()?,
            ..*self
        })
    }

    fn tensors(&self) -> impl Iterator<Item = &Tensor> {
        self.layers.iter().flat_map(Filter::tensors)
    }
}

fn filter(layer: &Conv2d) -> Result<Filter> {
    let (Some(bias), config, dims) = (layer.bias(), layer.config(), layer.weight().dims()) else {
        candle_core::bail!("every layer of a ConvField needs a bias")
    };
    let keeps_size =
        matches!(dims, [_, _, k, l] if k == l && k % 2 == 1 && config.padding == k / 2);
    if !keeps_size || [config.stride, config.dilation, config.groups] != [1; 3] {
        candle_core::bail!(
            "filters {dims:?} with {config:?} do not keep the size of an image: a ConvField needs square filters of odd size k, padding (k - 1)/2, and a stride, dilation and groups of 1"
        )
    }
    Ok(Filter {
        weight: layer.weight().clone(),
        bias: bias.clone(),
        norm: None,
    })
}

/// Σ over images and pixels of g by the pixels that the tap read.
fn weight_gradient(x: &Tensor, g: &Tensor, layer: &Filter) -> Result<Tensor> {
    let padding = layer.shape()[2] / 2;
    let (x, g) = (
        x.transpose(0, 1)?.contiguous()?,
        g.transpose(0, 1)?.contiguous()?,
    );
    x.conv2d(&g, padding, 1, 1, 1)?
        .transpose(0, 1)?
        .contiguous()
}

impl Module for ConvField {
    fn forward(&self, y: &Tensor) -> Result<Tensor> {
        Ok(self.run(y.clone())?.velocity)
    }
}

impl VectorField<Tensor> for ConvField {
    fn velocity(&self, _: &Time, y: &Tensor) -> Result<Tensor> {
        self.map(|p| p.to_dtype(y.dtype()))?.forward(y)
    }

    fn vjp<'f>(&'f self, _: &Time, y: &Tensor) -> Result<(Tensor, Pullback<'f, Tensor>)> {
        let plain = self.map(|p| p.detach().to_dtype(y.dtype()))?;
        let at = plain.run(y.detach())?;
        let velocity = at.velocity.clone();
        let pull = move |v: &Tensor| {
            let mut params = GradStore::default();
            let y = plain.pull(&self.layers, &at, v, &mut params)?;
            Ok(Cotangents { y, t: None, params })
        };
        Ok((velocity, Box::new(pull)))
    }

    fn parameters(&self) -> Option<Vec<Tensor>> {
        let tracked = self.tensors().filter(|p| p.track_op());
        Some(tracked.cloned().collect())
    }

    fn offer(&self) -> Option<Offer> {
        Some(Offered::of::<Tensor, _>(self, true).into())
    }
}
