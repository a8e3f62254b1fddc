//! A perceptron whose output is multiplied by the slope of a control path.

mod tiles;

use std::rc::Rc;

use candle_core::backprop::GradStore;
use candle_core::{Result, Tensor};
use candle_nn::{Linear, VarBuilder};

use super::linear::{affine, matmul, sum_of_rows, transposed_matmul};
use super::mlp::Affine;
use super::{add_gradient, Activation, Checked};
use crate::controlled::{product, ControlledField, ControlledPullback};
use crate::error::PathDefect;
use crate::field::{Cotangents, LateGradients, LatePullback, Offer};
use crate::path::ControlPath;
use crate::precision::at_least_f32;
use crate::time::Time;

/// The field of a neural CDE: F(z) = ρ(W_L σ(… σ(W_1 z + b_1) …) + b_L) as a matrix `(hidden, channels)`, row major.
///
/// z: `(rows, hidden)`.  ρ is tanh, which bounds the speed of the state; [`linear_output`](Self::linear_output) leaves
/// it out.  On the CPU in f32 and f64 (also where bf16 or f16 is rounding around it), the solver integrates it tile by
/// tile; along tracked observations, in [`Solution`](crate::Solution)s and on other devices it is a chain of candle's
/// operations with a pull-back written by hand.
///
/// See [`NeuralCde`](crate::cde::NeuralCde) for an example.
#[derive(Clone, Debug)]
pub struct CdeMlp {
    layers: Vec<Affine>,
    activation: Activation,
    /// ρ.
    output: Option<Activation>,
    channels: usize,
}

impl CdeMlp {
    /// Layers of these widths, features of z first and then hidden layers, and a last one of features times
    /// `channels`; names and initial values as those of [`Mlp::new`](super::Mlp::new).
    ///
    /// # Errors
    /// Those of the builder; no width, no channels, or a width that is 0.
    pub fn new(
        widths: &[usize],
        channels: usize,
        activation: Activation,
        vb: VarBuilder<'_>,
    ) -> Result<Self> {
        let Some(&hidden) = widths.first() else {
            candle_core::bail!("a CdeMlp needs the features of its state")
        };
        if widths.contains(&0) || channels == 0 {
            candle_core::bail!(
                "a CdeMlp of widths {widths:?} and {channels} channels: each must be at least 1"
            )
        }
        let widths: Vec<_> = widths.iter().copied().chain([hidden * channels]).collect();
        let layer = |(i, w): (usize, &[usize])| candle_nn::linear(w[0], w[1], vb.pp(i));
        let layers = widths.windows(2).enumerate().map(layer);
        Self::from_layers(&layers.collect::<Result<Vec<_>>>()?, channels, activation)
    }

    /// Layers that exist.
    ///
    /// # Errors
    /// [`Error::LayerTensor`](crate::Error::LayerTensor) if a weight is no matrix, a bias not of its outputs, or a
    /// tensor of another dtype or device than the others; if the layers do not follow on each other, or have no bias.
    pub fn from_layers(layers: &[Linear], channels: usize, activation: Activation) -> Result<Self> {
        let mut checked = Checked::new("CdeMlp::from_layers");
        let mut affine = Vec::with_capacity(layers.len());
        for (l, layer) in layers.iter().enumerate() {
            let weight = layer.weight();
            checked.weight(l, weight, 2, "a matrix (outputs, inputs)")?;
            let outputs = weight.dims()[0];
            let Some(bias) = layer.bias() else {
                candle_core::bail!(
                    "CdeMlp::from_layers, layer {l} has no bias: it needs one of [{outputs}]"
                )
            };
            checked.bias(l, bias, outputs)?;
            affine.push(Affine {
                weight: weight.clone(),
                bias: bias.clone(),
            });
        }
        let follows = |pair: &[Affine]| pair[0].outputs() == pair[1].inputs();
        let ends = affine.first().zip(affine.last());
        let fits = ends.is_some_and(|(first, last)| {
            channels > 0 && last.outputs() == first.inputs() * channels
        });
        if !fits || !affine.windows(2).all(follows) {
            let widths: Vec<_> = affine.iter().map(|l| (l.inputs(), l.outputs())).collect();
            candle_core::bail!(
                "layers of widths (in, out) {widths:?} do not map a state to matrices of {channels} channels"
            )
        }
        Ok(Self {
            layers: affine,
            activation,
            output: Some(Activation::Tanh),
            channels,
        })
    }

    /// The same field without tanh after the last layer.
    #[must_use]
    pub fn linear_output(mut self) -> Self {
        self.output = None;
        self
    }

    /// Features of the state.
    pub fn features(&self) -> usize {
        self.layers.first().map_or(0, Affine::inputs)
    }

    /// Channels of the paths that drive it.
    pub fn channels(&self) -> usize {
        self.channels
    }

    fn check(&self, z: &Tensor) -> Result<()> {
        let features = self.features();
        if z.rank() == 2 && z.dims()[1] == features {
            return Ok(());
        }
        let field = format!("a CdeMlp of {features} features");
        Err(super::wrong_state(
            field,
            format!("z (rows, {features})"),
            &[z],
        ))
    }

    /// The layers in the dtype of a state, with their history or without.
    fn like(&self, z: &Tensor, tracked: bool) -> Result<Vec<Affine>> {
        let plain = |x: &Tensor| match tracked {
            true => x.clone(),
            false => x.detach(),
        };
        let cast = |l: &Affine| {
            Ok(Affine {
                weight: plain(&l.weight).to_dtype(z.dtype())?,
                bias: plain(&l.bias).to_dtype(z.dtype())?,
            })
        };
        self.layers.iter().map(cast).collect()
    }

    /// F(z), flat; what every layer read, and what every layer put out before its activation.
    fn run(&self, layers: &[Affine], z: &Tensor) -> Result<(Tensor, Vec<Tensor>, Vec<Tensor>)> {
        let (mut inputs, mut outputs) = (vec![], vec![]);
        let mut x = z.clone();
        for (l, layer) in layers.iter().enumerate() {
            let out = affine(&x, &layer.weight, Some(&layer.bias))?;
            let next = match l + 1 == layers.len() {
                true => self.output.as_ref(),
                false => Some(&self.activation),
            };
            let next = match next {
                Some(activation) => activation.forward(&out)?,
                None => out.clone(),
            };
            inputs.push(std::mem::replace(&mut x, next));
            outputs.push(out);
        }
        Ok((x, inputs, outputs))
    }

    fn tensors(&self) -> impl Iterator<Item = &Tensor> {
        self.layers.iter().flat_map(|l| [&l.weight, &l.bias])
    }

    /// F(z) times a slope, F(z), and what the pull-back needs.
    fn linearised(&self, z: &Tensor, slope: &Tensor) -> Result<([Tensor; 2], Linearised)> {
        self.check(z)?;
        if slope.dims() != [z.dim(0)?, self.channels] {
            let (needs, channels) = (self.channels, slope.dims().last().copied().unwrap_or(0));
            return Err(crate::Error::from(PathDefect::Channels { needs, channels }).into());
        }
        let layers = self.like(z, false)?;
        let (flat, inputs, outputs) = self.run(&layers, &z.detach())?;
        let matrix = flat.reshape((z.dim(0)?, self.features(), self.channels))?;
        let k = product(&matrix, slope)?;
        let linear = Linearised {
            layers,
            inputs,
            outputs,
            slope: slope.detach(),
        };
        Ok(([k, matrix], linear))
    }

    /// The cotangents of what the layers put out before their activations, and that of z.
    fn pull(&self, linear: &Linearised, v: &Tensor) -> Result<(Vec<Tensor>, Tensor)> {
        // The cotangent of F: v_i X'_c.
        let seed = v.unsqueeze(2)?.broadcast_mul(&linear.slope.unsqueeze(1)?)?;
        let mut g = seed.reshape((v.dim(0)?, self.features() * self.channels))?;
        let mut seeds = Vec::with_capacity(linear.layers.len());
        for (l, layer) in linear.layers.iter().enumerate().rev() {
            let activation = match l + 1 == linear.layers.len() {
                true => self.output.as_ref(),
                false => Some(&self.activation),
            };
            if let Some(activation) = activation {
                g = activation.pull(&linear.outputs[l], &g)?;
            }
            let next = matmul(&g, &layer.weight)?;
            seeds.push(std::mem::replace(&mut g, next));
        }
        seeds.reverse();
        Ok((seeds, g))
    }

    /// The gradients of the parameters from what every layer read and these cotangents.
    fn gradients(&self, inputs: &[Tensor], seeds: &[Tensor]) -> Result<GradStore> {
        let mut params = GradStore::default();
        for (l, g) in seeds.iter().enumerate().rev() {
            let Affine { weight, bias } = &self.layers[l];
            if weight.track_op() {
                let grad = transposed_matmul(g, &inputs[l])?;
                add_gradient(&mut params, weight, grad)?;
            }
            if bias.track_op() {
                add_gradient(&mut params, bias, sum_of_rows(g)?)?;
            }
        }
        Ok(params)
    }
}

/// An evaluation: the layers without history, what every layer read and put out before its activation, and the slope.
struct Linearised {
    layers: Vec<Affine>,
    inputs: Vec<Tensor>,
    outputs: Vec<Tensor>,
    slope: Tensor,
}

impl ControlledField for CdeMlp {
    fn matrix(&self, _: &Time, z: &Tensor) -> Result<Tensor> {
        self.check(z)?;
        let (flat, ..) = self.run(&self.like(z, true)?, z)?;
        flat.reshape((z.dim(0)?, self.features(), self.channels))
    }

    fn vjp<'f>(
        &'f self,
        _: &Time,
        z: &Tensor,
        slope: &Tensor,
    ) -> Result<Option<(Tensor, ControlledPullback<'f>)>> {
        let ([k, matrix], linear) = self.linearised(z, slope)?;
        let pull = move |v: &Tensor| {
            let v = v.detach();
            // v_i F_ic, summed over i.
            let slope_bar = pulled_to_slope(&matrix, &v)?;
            let (seeds, y) = self.pull(&linear, &v)?;
            let params = self.gradients(&linear.inputs, &seeds)?;
            let t = None;
            Ok((Cotangents { y, t, params }, slope_bar))
        };
        Ok(Some((k, Box::new(pull))))
    }

    fn vjp_late<'f>(
        &'f self,
        _: &Time,
        z: &Tensor,
        slope: &Tensor,
    ) -> Result<Option<(Tensor, LatePullback<'f, Tensor>)>> {
        let ([k, _], linear) = self.linearised(z, slope)?;
        let pull = move |v: &Tensor| {
            let (seeds, y) = self.pull(&linear, &v.detach())?;
            // What is kept of the evaluation is what the layers read, and neither their outputs nor F(z).
            let inputs = linear.inputs.clone();
            let params = move || self.gradients(&inputs, &seeds);
            let params: LateGradients<'f> = Rc::new(params);
            Ok((y, params))
        };
        Ok(Some((k, Box::new(pull))))
    }

    fn parameters(&self) -> Option<Vec<Tensor>> {
        let tracked = self.tensors().filter(|p| p.track_op());
        Some(tracked.cloned().collect())
    }

    fn offer(&self, path: &ControlPath) -> Option<Offer> {
        self.along(path)
    }
}

/// Σ_i v_i F_ic of matrices F `(rows, hidden, channels)`, in f32 where they are narrower.
fn pulled_to_slope(matrix: &Tensor, v: &Tensor) -> Result<Tensor> {
    let dtype = matrix.dtype();
    let wide = at_least_f32(dtype);
    let v = v.to_dtype(wide)?.unsqueeze(2)?;
    let terms = matrix.to_dtype(wide)?.broadcast_mul(&v)?;
    terms.sum(1)?.to_dtype(dtype)
}
