//! A neural controlled differential equation along utterances of nine speakers: straight lines, whose slopes jump at
//! knots.

use std::collections::HashMap;
use std::time::Instant;

use candle_core::{DType, Device, Tensor, D};
use candle_diffeq::cde::{ControlPath, NeuralCde, Observations};
use candle_diffeq::metrics::Recorder;
use candle_diffeq::nn::{Activation, CdeMlp};
use candle_diffeq::{OdeOptions, Precision};
use candle_nn::loss::cross_entropy;
use candle_nn::{AdamW, Linear, Module, Optimizer, ParamsAdamW, VarBuilder, VarMap};
use indicatif::ProgressBar;
use rand::seq::SliceRandom;

use crate::data::{Data, Utterances, CHANNELS, CLASSES, COEFFICIENTS, LENGTH};
use crate::way::{Cost, Pair, Way};
use common::random::generator;
use common::{initial, mean, median, Result};

const HIDDEN: usize = 32;
const WIDTH: usize = 40;
/// Utterances of a batch.
const BATCH: usize = 90;
/// Every so manyth utterance is taken for one gradient.
const STRIDE: usize = 9;

/// The pairs of the published experiment.
pub(crate) const PAIRS: [Pair; 3] = [Pair(1e-3, 1e-6), Pair(1e-4, 1e-7), Pair(1e-5, 1e-8)];

/// Straight lines through some utterances with time as the first channel, from 0 to 1 over the longest utterance; after its
/// end an utterance stands still.
fn lines(all: &Utterances, chosen: &[usize], device: &Device) -> Result<ControlPath> {
    let mut values = Vec::with_capacity(chosen.len() * LENGTH * CHANNELS);
    for &n in chosen {
        for i in (0..LENGTH).map(|i| i.min(all.lengths[n] - 1)) {
            values.push(i as f32 / (LENGTH - 1) as f32);
            let frame = (n * LENGTH + i) * COEFFICIENTS;
            values.extend(&all.values[frame..frame + COEFFICIENTS]);
        }
    }
    let xs = Tensor::from_vec(values, (chosen.len(), LENGTH, CHANNELS), device)?;
    Ok(Observations::new(&xs)?.linear()?)
}

struct Model {
    vars: VarMap,
    cde: NeuralCde,
    readout: Linear,
}

impl Model {
    /// The same initial weights for the same seed.
    fn new(seed: u64, options: OdeOptions, device: &Device) -> Result<Self> {
        let vars = VarMap::new();
        let cde = NeuralCde::new(
            &vars,
            "cde",
            DType::F32,
            device,
            |vb| candle_nn::linear(CHANNELS, HIDDEN, vb),
            |vb| {
                CdeMlp::new(
                    &[HIDDEN, WIDTH, WIDTH, WIDTH],
                    CHANNELS,
                    Activation::Relu,
                    vb,
                )
            },
        )?;
        let vb = VarBuilder::from_varmap(&vars, DType::F32, device);
        let readout = candle_nn::linear(HIDDEN, CLASSES, vb.pp("readout"))?;
        initial::layers(&vars, &mut generator(seed))?;
        Ok(Self {
            vars,
            cde: cde.options(options),
            readout,
        })
    }

    fn logits(&self, path: &ControlPath) -> Result<Tensor> {
        let z = self.cde.solve(path, &path.ends())?;
        Ok(self.readout.forward(&z.to_dtype(DType::F32)?)?)
    }

    /// Share of utterances that are told right.
    fn accuracy(&self, all: &Utterances, device: &Device) -> Result<f64> {
        let everything: Vec<usize> = (0..all.len()).collect();
        let path = lines(all, &everything, device)?;
        let z = self.cde.predict(&path, &path.ends())?;
        let taken = self
            .readout
            .forward(&z)?
            .argmax(D::Minus1)?
            .to_vec1::<u32>()?;
        let right = taken
            .iter()
            .zip(&all.labels)
            .filter(|(a, b)| a == b)
            .count();
        Ok(right as f64 / all.len() as f64)
    }
}

/// One gradient of F's parameters at the initial weights, and what it took.
pub(crate) fn gradient(
    data: &Data,
    way: Way,
    pair: Pair,
    seed: u64,
    device: &Device,
) -> Result<(Vec<f64>, Cost)> {
    let recorder = Recorder::tracing();
    let options = way.options(pair, &recorder);
    gradient_by(data, way, options, seed, &recorder, device)
}

/// The same in f64 at a tolerance so small that it counts as exact.
pub(crate) fn converged(data: &Data, pair: Pair, seed: u64, device: &Device) -> Result<Vec<f64>> {
    let recorder = Recorder::default();
    let options = OdeOptions {
        precision: Some(Precision::f64()),
        ..Way::Discrete.options(pair, &recorder)
    };
    Ok(gradient_by(data, Way::Discrete, options, seed, &recorder, device)?.0)
}

fn gradient_by(
    data: &Data,
    way: Way,
    options: OdeOptions,
    seed: u64,
    recorder: &Recorder,
    device: &Device,
) -> Result<(Vec<f64>, Cost)> {
    let model = Model::new(seed, options, device)?;
    let chosen: Vec<usize> = (0..data.training.len()).step_by(STRIDE).collect();
    let path = lines(&data.training, &chosen, device)?;
    let labels = data.training.labels(&chosen, device)?;
    let run = || -> Result<_> {
        let clock = Instant::now();
        let grads = cross_entropy(&model.logits(&path)?, &labels)?.backward()?;
        Ok((grads, 1e3 * clock.elapsed().as_secs_f64()))
    };
    // The first solve also checks the field.
    run()?;
    recorder.take();
    let (grads, milliseconds) = run()?;
    let vars = model
        .vars
        .data()
        .lock()
        .map_err(|_| "the variables are locked")?;
    let mut flat = vec![];
    for name in model.cde.parameters() {
        let var = vars.get(name).ok_or("a parameter is missing")?;
        let grad = grads.get(var).ok_or("a parameter has no gradient")?;
        flat.extend(grad.flatten_all()?.to_dtype(DType::F64)?.to_vec1::<f64>()?);
    }
    Ok((flat, Cost::new(way, recorder.take(), milliseconds)))
}

/// Writes the initial weights of a seed, and the exact gradients of F's parameters there under `exact.` and their names,
/// so that other libraries can begin with them.
pub(crate) fn export(
    exact: &[f64],
    seed: u64,
    device: &Device,
    folder: &std::path::Path,
) -> Result<()> {
    let model = Model::new(seed, OdeOptions::default(), device)?;
    let vars = model
        .vars
        .data()
        .lock()
        .map_err(|_| "the variables are locked")?;
    let weights = vars
        .iter()
        .map(|(name, v)| (name.clone(), v.as_tensor().clone()));
    let mut tensors: HashMap<String, Tensor> = weights.collect();
    let mut rest = exact;
    for name in model.cde.parameters() {
        let shape = vars.get(name).ok_or("a parameter is missing")?.shape();
        let (own, others) = rest.split_at(shape.elem_count());
        tensors.insert(
            format!("exact.{name}"),
            Tensor::from_slice(own, shape, &Device::Cpu)?,
        );
        rest = others;
    }
    std::fs::create_dir_all(folder)?;
    let file = folder.join(format!("seed{seed}.safetensors"));
    Ok(candle_core::safetensors::save(&tensors, file)?)
}

/// What a training came to.
pub(crate) struct Trained {
    pub(crate) way: Way,
    pub(crate) seed: u64,
    /// Evaluations of every update.
    pub(crate) forward: Vec<f64>,
    pub(crate) backward: Vec<f64>,
    pub(crate) accuracy: f64,
    pub(crate) training: f64,
    pub(crate) milliseconds: f64,
}

/// Trains; the same batches in the same order for the same seed.
pub(crate) fn train(
    data: &Data,
    way: Way,
    pair: Pair,
    updates: usize,
    seed: u64,
    device: &Device,
    bar: &ProgressBar,
) -> Result<Trained> {
    let recorder = Recorder::default();
    let model = Model::new(seed, way.options(pair, &recorder), device)?;
    let adam = ParamsAdamW {
        lr: 4e-3,
        weight_decay: 0.01,
        ..Default::default()
    };
    let mut optimiser = AdamW::new(model.vars.all_vars(), adam)?;
    let mut rng = generator(seed);
    let mut order: Vec<usize> = (0..data.training.len()).collect();
    let (mut forward, mut backward, mut milliseconds) = (vec![], vec![], vec![]);
    while milliseconds.len() < updates {
        order.shuffle(&mut rng);
        let left = updates - milliseconds.len();
        for chosen in order.chunks_exact(BATCH).take(left) {
            let path = lines(&data.training, chosen, device)?;
            let labels = data.training.labels(chosen, device)?;
            recorder.take();
            let clock = Instant::now();
            let loss = cross_entropy(&model.logits(&path)?, &labels)?;
            optimiser.backward_step(&loss)?;
            let took = 1e3 * clock.elapsed().as_secs_f64();
            let cost = Cost::new(way, recorder.take(), took);
            forward.push(cost.forward as f64);
            backward.push(cost.backward as f64);
            milliseconds.push(took);
            bar.inc(1);
        }
    }
    Ok(Trained {
        way,
        seed,
        forward,
        backward,
        accuracy: model.accuracy(&data.test, device)?,
        training: model.accuracy(&data.training, device)?,
        milliseconds: median(milliseconds),
    })
}

/// The mean over seeds of a way, of a figure.
pub(crate) fn mean_of(all: &[Trained], way: Way, of: impl Fn(&Trained) -> f64) -> f64 {
    let figures: Vec<f64> = all.iter().filter(|t| t.way == way).map(of).collect();
    mean(&figures)
}
