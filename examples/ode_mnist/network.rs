//! The classifier: a stem that halves the image twice, the neural ODE, a head.

use candle_core::{DType, Device, Module, Result, Tensor, D};
use candle_diffeq::fields::autonomous;
use candle_diffeq::metrics::Recorder;
use candle_diffeq::nn::{Activation, ConvField};
use candle_diffeq::options::{Adaptive, Checkpoint, Output, Steps};
use candle_diffeq::tableau::{DOPRI5, RK4};
use candle_diffeq::{NeuralOde, OdeOptions};
use candle_nn::{group_norm, linear, GroupNorm, Linear, VarBuilder, VarMap};
use rand::rngs::StdRng;

use common::conv::Conv;
use common::dtype::Dtype;
use common::initial;
use common::mnist::CLASSES;

/// Which vector field.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Field {
    /// conv-ReLU-conv, integrated tile by tile on the CPU.
    Plain,
    /// norm-ReLU-conv-norm-ReLU-conv-norm, as published.
    Normed,
}

const EPSILON: f64 = 1e-5;

/// What the network is made of.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Layout {
    /// Size, stride and padding of the stem's convolutions, with a norm and ReLU between them.
    pub(crate) stem: &'static [[usize; 3]],
    pub(crate) channels: usize,
    /// Of channels that are normed together.
    pub(crate) groups: usize,
    pub(crate) field: Field,
    /// Of the solver.
    pub(crate) steps: usize,
    /// Of adaptive steps, relative and absolute, which are taken instead.
    pub(crate) tolerance: Option<f64>,
}

impl Layout {
    fn norm(&self, vb: VarBuilder<'_>) -> Result<GroupNorm> {
        group_norm(self.groups, self.channels, EPSILON, vb)
    }
}

/// `(n, 1, 28, 28)` to `(n, channels, …)`.
struct Stem {
    first: Conv,
    rest: Vec<(GroupNorm, Conv)>,
}

impl Stem {
    fn new(layout: &Layout, vb: VarBuilder<'_>) -> Result<Self> {
        let conv = |(i, &[size, stride, padding]): (usize, &[usize; 3])| {
            let inputs = if i == 0 { 1 } else { layout.channels };
            Conv::new([inputs, layout.channels, size], stride, padding, vb.pp(i))
        };
        let mut convs = layout.stem.iter().enumerate().map(conv);
        let Some(first) = convs.next() else {
            candle_core::bail!("a stem needs a convolution")
        };
        let normed = |(i, conv)| Ok((layout.norm(vb.pp(format!("norm{i}")))?, conv?));
        Ok(Self {
            first: first?,
            rest: convs.enumerate().map(normed).collect::<Result<_>>()?,
        })
    }
}

impl Module for Stem {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let mut x = self.first.forward(x)?;
        for (norm, conv) in &self.rest {
            x = conv.forward(&norm.forward(&x)?.relu()?)?;
        }
        Ok(x)
    }
}

/// The published field.
fn normed(layout: &Layout, vb: VarBuilder<'_>) -> Result<impl Module + Send + Sync> {
    let norm = |name: &str| layout.norm(vb.pp(name));
    let (first, second, third) = (norm("norm0")?, norm("norm1")?, norm("norm2")?);
    let channels = layout.channels;
    let conv = |name: &str| Conv::new([channels, channels, 3], 1, 1, vb.pp(name));
    let (inner, outer) = (conv("0")?, conv("1")?);
    Ok(candle_nn::func(move |y| {
        let y = inner.forward(&first.forward(y)?.relu()?)?;
        third.forward(&outer.forward(&second.forward(&y)?.relu()?)?)
    }))
}

/// The whole network over one set of f32 weights.
pub(crate) struct Network {
    vars: VarMap,
    stem: Stem,
    training: NeuralOde,
    testing: NeuralOde,
    norm: GroupNorm,
    head: Linear,
}

impl Network {
    /// Only the neural ODE computes in `dtype`; the layers around it in f32.
    pub(crate) fn new(
        layout: Layout,
        dtype: Dtype,
        device: &Device,
        recorder: &Recorder,
        rng: &mut StdRng,
    ) -> common::Result<Self> {
        let vars = VarMap::new();
        let ode = || match layout.field {
            Field::Plain => NeuralOde::new(&vars, "ode", device, move |vb| {
                ConvField::new(&[layout.channels; 3], 3, Activation::Relu, vb)
            }),
            Field::Normed => NeuralOde::from_field(&vars, "ode", DType::F32, device, move |vb| {
                normed(&layout, vb).map(autonomous)
            }),
        };
        let (method, steps) = match layout.tolerance {
            None => (RK4, Steps::PerInterval(layout.steps)),
            Some(tol) => (DOPRI5, Steps::Adaptive(Adaptive::new(tol, tol))),
        };
        let options = OdeOptions {
            method,
            precision: Some(dtype.precision()),
            steps,
            output: Output::Final,
            recorder: Some(recorder.clone()),
            ..Default::default()
        };
        let training = ode()?.options(options.clone());
        let testing = ode()?.options(OdeOptions {
            checkpoint: Checkpoint::Nothing,
            recorder: None,
            ..options
        });
        let vb = VarBuilder::from_varmap(&vars, DType::F32, device);
        let network = Self {
            stem: Stem::new(&layout, vb.pp("stem"))?,
            norm: layout.norm(vb.pp("norm"))?,
            head: linear(layout.channels, CLASSES, vb.pp("head"))?,
            vars,
            training,
            testing,
        };
        initial::normal(&network.vars, rng, initial::he)?;
        Ok(network)
    }

    pub(crate) fn map(&self) -> &VarMap {
        &self.vars
    }

    pub(crate) fn parameters(&self) -> usize {
        self.vars
            .all_vars()
            .iter()
            .map(|var| var.elem_count())
            .sum()
    }

    /// Logits `(n, 10)` of images.
    pub(crate) fn train(&self, images: &Tensor) -> candle_diffeq::Result<Tensor> {
        self.logits(&self.training, images)
    }

    /// The same, with nothing kept for a backward pass.
    pub(crate) fn test(&self, images: &Tensor) -> candle_diffeq::Result<Tensor> {
        self.logits(&self.testing, images)
    }

    fn logits(&self, ode: &NeuralOde, images: &Tensor) -> candle_diffeq::Result<Tensor> {
        let y = ode.solve(&self.stem.forward(images)?, &[0.0, 1.0])?;
        let y = self.norm.forward(&y)?.relu()?.flatten_from(2)?;
        Ok(self.head.forward(&y.mean(D::Minus1)?)?)
    }
}
