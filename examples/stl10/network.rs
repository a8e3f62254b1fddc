//! The network: a stem and three neural ODEs, each with twice the channels of the last.

use candle_core::{DType, Device, Module, Result, Tensor, Var, D};
use candle_diffeq::fields::PiecewiseConstant;
use candle_diffeq::metrics::Recorder;
use candle_diffeq::options::{Checkpoint, Output, TimeGrid};
use candle_diffeq::tableau::RK4;
use candle_diffeq::{NeuralOde, OdeOptions, Precision};
use candle_nn::{group_norm, linear, GroupNorm, Linear, VarBuilder, VarMap};
use rand::rngs::StdRng;

use crate::data::CLASSES;
use crate::field::{Sign, ThereAndBack};
use common::conv::Conv;
use common::{initial, random};

pub(crate) const BLOCKS: usize = 3;
/// Intervals of constant weights on [0, 1]; a step of RK4 each.
const INTERVALS: usize = 4;
const EPSILON: f64 = 1e-5;

/// Deviation of a block's initial filters.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Filters {
    /// The same for every width, as published.  With 0.1, h times the eigenvalues of −Kᵀ…K is outside
    /// of RK4's region of stability from 16 channels on: gradients of norm 500, and nothing learnt at
    /// the size of the default.
    Constant(f64),
    /// Over √(9 channels), what a filter reads.
    ByWidth(f64),
}

impl Filters {
    fn deviation(self, channels: usize) -> f64 {
        match self {
            Self::Constant(deviation) => deviation,
            Self::ByWidth(factor) => factor / (9.0 * channels as f64).sqrt(),
        }
    }
}

fn times() -> candle_diffeq::Result<TimeGrid> {
    TimeGrid::linspace(0.0, 1.0, INTERVALS + 1)
}

/// A block's equation, over variables `block{i}.{interval}.…`.
fn block(
    vars: &VarMap,
    i: usize,
    channels: usize,
    sign: Sign,
    device: &Device,
) -> candle_diffeq::Result<NeuralOde> {
    let times = times()?;
    NeuralOde::from_field(vars, &format!("block{i}"), DType::F32, device, move |vb| {
        PiecewiseConstant::build(&times, |interval| {
            ThereAndBack::new(channels, sign, vb.pp(interval))
        })
    })
}

/// relu(norm(w ∗ x + b)), each channel of each image normed by itself.
struct Entry {
    conv: Conv,
    norm: GroupNorm,
}

impl Entry {
    fn new(inputs: usize, outputs: usize, size: usize, vb: VarBuilder<'_>) -> Result<Self> {
        Ok(Self {
            conv: Conv::new([inputs, outputs, size], 1, size / 2, vb.pp("conv"))?,
            norm: group_norm(outputs, outputs, EPSILON, vb.pp("norm"))?,
        })
    }
}

impl Module for Entry {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.norm.forward(&self.conv.forward(x)?)?.relu()
    }
}

/// The whole network over one set of f32 weights.
pub(crate) struct Network {
    vars: VarMap,
    device: Device,
    width: usize,
    entries: Vec<Entry>,
    training: Vec<NeuralOde>,
    testing: Vec<NeuralOde>,
    head: Linear,
}

impl Network {
    /// Only the neural ODEs compute in `precision`'s low dtype; the layers around them in f32.
    pub(crate) fn new(
        (width, filters): (usize, Filters),
        sign: Sign,
        precision: Precision,
        device: &Device,
        recorder: &Recorder,
        rng: &mut StdRng,
    ) -> common::Result<Self> {
        let vars = VarMap::new();
        let training = OdeOptions {
            method: RK4,
            precision: Some(precision),
            output: Output::Final,
            recorder: Some(recorder.clone()),
            ..Default::default()
        };
        let testing = OdeOptions {
            checkpoint: Checkpoint::Nothing,
            recorder: None,
            ..training.clone()
        };
        let blocks = |options: &OdeOptions| {
            let block = |i| Ok(block(&vars, i, width << i, sign, device)?.options(options.clone()));
            (0..BLOCKS)
                .map(block)
                .collect::<candle_diffeq::Result<Vec<_>>>()
        };
        let (training, testing) = (blocks(&training)?, blocks(&testing)?);
        let vb = VarBuilder::from_varmap(&vars, DType::F32, device);
        let entry = |i: usize| match i {
            0 => Entry::new(3, width, 3, vb.pp("entry0")),
            i => Entry::new(width << (i - 1), width << i, 1, vb.pp(format!("entry{i}"))),
        };
        let network = Self {
            entries: (0..BLOCKS).map(entry).collect::<Result<_>>()?,
            head: linear(width << (BLOCKS - 1), CLASSES, vb.pp("head"))?,
            device: device.clone(),
            vars,
            width,
            training,
            testing,
        };
        network.draw(filters, rng)?;
        Ok(network)
    }

    /// Initial weights; in a block, each interval has those of the first.
    fn draw(&self, filters: Filters, rng: &mut StdRng) -> common::Result<()> {
        initial::normal(&self.vars, rng, |name, shape| {
            match name.starts_with("block") {
                true => None,
                false => initial::he(name, shape),
            }
        })?;
        let data = self
            .vars
            .data()
            .lock()
            .map_err(|_| "the variables are locked")?;
        for i in 0..BLOCKS {
            let channels = self.width << i;
            let shape = (channels, channels, 3, 3);
            let deviation = filters.deviation(channels);
            let filters = (random::normal(rng, shape, DType::F32, &self.device)? * deviation)?;
            for interval in 0..INTERVALS {
                if let Some(var) = data.get(&format!("block{i}.{interval}.weight")) {
                    var.set(&filters)?;
                }
            }
        }
        Ok(())
    }

    pub(crate) fn vars(&self) -> Vec<Var> {
        self.vars.all_vars()
    }

    pub(crate) fn parameters(&self) -> usize {
        self.vars().iter().map(|var| var.elem_count()).sum()
    }

    /// Logits `(n, 10)` of images `(n, 3, side, side)`.
    pub(crate) fn train(&self, images: &Tensor) -> candle_diffeq::Result<Tensor> {
        self.logits(&self.training, images)
    }

    /// The same, with nothing kept for a backward pass.
    pub(crate) fn test(&self, images: &Tensor) -> candle_diffeq::Result<Tensor> {
        self.logits(&self.testing, images)
    }

    fn logits(&self, blocks: &[NeuralOde], images: &Tensor) -> candle_diffeq::Result<Tensor> {
        let (times, mut x) = (times()?, images.clone());
        for (i, (entry, block)) in self.entries.iter().zip(blocks).enumerate() {
            x = entry.forward(&x)?;
            if i > 0 {
                x = x.avg_pool2d(2)?;
            }
            x = block.solve(&x, &times)?;
        }
        Ok(self.head.forward(&x.flatten_from(2)?.mean(D::Minus1)?)?)
    }

    /// What the first block is given.
    pub(crate) fn first_state(&self, images: &Tensor) -> Result<Tensor> {
        Ok(self.entries[0].forward(images)?.detach())
    }

    /// The first block with these weights and any sign, at many times.
    pub(crate) fn first_block(
        &self,
        y0: &Tensor,
        sign: Sign,
        precision: Precision,
        times: &TimeGrid,
    ) -> candle_diffeq::Result<Tensor> {
        let options = OdeOptions {
            method: RK4,
            precision: Some(precision),
            checkpoint: Checkpoint::Nothing,
            ..Default::default()
        };
        let block = block(&self.vars, 0, self.width, sign, &self.device)?.options(options);
        block.solve(y0, times)
    }
}
