//! Images with channels of zeros beside them, a flow of convolutions, and a layer that reads its end.

use candle_core::{DType, Device, Module, Result as CandleResult, Tensor};
use candle_diffeq::nn::{Activation, Basis, ConvField, Galerkin, Linear};
use candle_diffeq::options::{Output, Steps};
use candle_diffeq::tableau::RK4;
use candle_diffeq::{odeint, OdeOptions, Time};
use candle_nn::{Conv2d, Conv2dConfig, VarBuilder, VarMap};

use common::dtype::Dtype;
use common::mnist::{CLASSES, SIDE};
use common::random::generator;
use common::{initial, Result};

/// The image and five channels of zeros.
pub(crate) const CHANNELS: usize = 6;
const PIXELS: usize = SIDE * SIDE;
/// Size of a filter, and its numbers and those of its bias.
const SIZE: usize = 3;
const FILTER: usize = CHANNELS * CHANNELS * SIZE * SIZE;
/// Steps of RK4 over [0, 1].
pub(crate) const STEPS: usize = 2;
/// Cosines and sines in which the first filter is expanded, of orders 0, 1, ….
const ORDERS: usize = 4;

/// How the flow depends on depth, and what it learns from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// The same field at all depths.
    Plain,
    /// A first filter that is a function of depth.
    Galerkin,
    /// The same, trained by the integral of the loss over depth.
    Integral,
}

impl Kind {
    pub(crate) const ALL: [Self; 3] = [Self::Plain, Self::Galerkin, Self::Integral];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Plain => "conv",
            Self::Galerkin => "Galerkin conv",
            Self::Integral => "integral loss",
        }
    }
}

/// The first filter.
enum First {
    Plain(Conv2d),
    OfDepth(Galerkin),
}

pub(crate) struct Model {
    pub(crate) vars: VarMap,
    first: First,
    rest: [Conv2d; 2],
    /// Weights of the channels, and a layer that reads their sum.
    mix: Linear,
    readout: Linear,
    options: OdeOptions,
}

impl Model {
    pub(crate) fn new(kind: Kind, dtype: Dtype, seed: u64, device: &Device) -> Result<Self> {
        let vars = VarMap::new();
        let vb = VarBuilder::from_varmap(&vars, DType::F32, device);
        let filter = |l: usize| {
            let vb = vb.pp("f").pp(l);
            candle_nn::conv2d(CHANNELS, CHANNELS, SIZE, config(), vb)
        };
        let first = match kind {
            Kind::Plain => First::Plain(filter(0)?),
            Kind::Galerkin | Kind::Integral => {
                let (numbers, basis) = (FILTER + CHANNELS, Basis::fourier(ORDERS));
                First::OfDepth(Galerkin::new(numbers, basis, 1.0, vb.pp("f").pp(0))?)
            }
        };
        let rest = [filter(1)?, filter(2)?];
        let mix = Linear::new(CHANNELS, 1, vb.pp("mix"))?;
        let readout = Linear::new(PIXELS, CLASSES, vb.pp("readout"))?;
        draw(&vars, seed)?;
        Ok(Self {
            vars,
            first,
            rest,
            mix,
            readout,
            options: OdeOptions {
                method: RK4,
                steps: Steps::PerInterval(1),
                output: Output::Final,
                precision: Some(dtype.precision()),
                ..Default::default()
            },
        })
    }

    pub(crate) fn parameters(&self) -> usize {
        self.vars.all_vars().iter().map(|v| v.elem_count()).sum()
    }

    /// Logits after each step, the first of them at depth 0, of images `(n, 1, 28, 28)`.
    pub(crate) fn logits(&self, images: &Tensor) -> Result<Vec<Tensor>> {
        let rows = images.dim(0)?;
        let zeros = (rows, CHANNELS - 1, SIDE, SIDE);
        let zeros = Tensor::zeros(zeros, images.dtype(), images.device())?;
        let mut z = Tensor::cat(&[images, &zeros], 1)?;
        let mut all = vec![self.read(&z)?];
        for n in 0..STEPS {
            let ends = [n, n + 1].map(|n| n as f64 / STEPS as f64);
            let field = self.field(0.5 * (ends[0] + ends[1]))?;
            z = odeint(field, &z, &ends, &self.options)?;
            all.push(self.read(&z)?);
        }
        Ok(all)
    }

    /// Three convolutions that keep the size of the image, the first one as it is at this depth.
    fn field(&self, depth: f64) -> CandleResult<ConvField> {
        let first = match &self.first {
            First::Plain(filter) => filter.clone(),
            First::OfDepth(numbers) => {
                let device = self.readout.weight().device();
                let numbers = numbers.at(&Time::new(depth, DType::F32, device))?;
                let weight = numbers.narrow(0, 0, FILTER)?;
                let weight = weight.reshape((CHANNELS, CHANNELS, SIZE, SIZE))?;
                Conv2d::new(weight, Some(numbers.narrow(0, FILTER, CHANNELS)?), config())
            }
        };
        let [second, third] = self.rest.clone();
        ConvField::from_layers(&[first, second, third], Activation::Tanh)
    }

    fn read(&self, z: &Tensor) -> CandleResult<Tensor> {
        let rows = z.dim(0)?;
        let by_pixel = z.flatten_from(2)?.transpose(1, 2)?.contiguous()?;
        let image = self.mix.forward(&by_pixel)?.reshape((rows, PIXELS))?;
        self.readout.forward(&image)
    }
}

fn config() -> Conv2dConfig {
    Conv2dConfig {
        padding: SIZE / 2,
        ..Default::default()
    }
}

/// Layers as PyTorch's; coefficients so that a filter has about the size of one.
fn draw(vars: &VarMap, seed: u64) -> Result<()> {
    let mut rng = generator(seed);
    initial::layers(vars, &mut rng)?;
    let deviation = 1.0 / ((3 * CHANNELS * SIZE * SIZE * 2 * ORDERS) as f64).sqrt();
    initial::normal(vars, &mut rng, |name, _| {
        name.ends_with("coeffs").then_some(deviation)
    })
}
