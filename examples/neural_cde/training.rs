//! One training run in one precision from one seed.

use std::time::Instant;

use candle_core::{DType, Device, Module, Tensor, D};
use candle_diffeq::cde::NeuralCde;
use candle_diffeq::metrics::{Recorder, Stats};
use candle_diffeq::nn::{Activation, CdeMlp};
use candle_diffeq::tableau::MIDPOINT;
use candle_diffeq::OdeOptions;
use candle_nn::{loss::cross_entropy, AdamW, Linear, Optimizer, ParamsAdamW, VarBuilder, VarMap};
use indicatif::ProgressBar;
use rand::seq::SliceRandom;

use crate::data::{Data, Kind, Utterances, CLASSES};
use common::dtype::Dtype;
use common::random::generator;
use common::{initial, mean, median, Result};

const HIDDEN: usize = 32;
const WIDTH: usize = 40;
/// Utterances of a batch.
pub(crate) const BATCH: usize = 90;

/// What is the same in all runs.
#[derive(Clone, Copy)]
pub(crate) struct Setting {
    pub(crate) kind: Kind,
    pub(crate) epochs: usize,
    pub(crate) rate: f64,
    /// Deviation of the noise on training data.
    pub(crate) noise: f64,
}

/// After an epoch.
pub(crate) struct Epoch {
    pub(crate) loss: f64,
    pub(crate) accuracy: f64,
}

/// What a run came to.
pub(crate) struct Outcome {
    pub(crate) dtype: Dtype,
    pub(crate) seed: u64,
    pub(crate) epochs: Vec<Epoch>,
    /// Right in training, at the end.
    pub(crate) training: f64,
    /// Test utterances, by true speaker and by the one that they were taken for.
    pub(crate) confusion: Vec<Vec<f64>>,
    /// Evaluations of the field in a forward pass, and evaluations that are pulled back in a backward pass.
    pub(crate) evaluations: f64,
    pub(crate) backward: f64,
    /// Median of an update.
    pub(crate) milliseconds: f64,
    pub(crate) parameters: usize,
    pub(crate) stats: Stats,
}

impl Outcome {
    /// After the last epoch: none is picked by the utterances that it is judged by.
    pub(crate) fn accuracy(&self) -> f64 {
        self.epochs.last().map_or(f64::NAN, |e| e.accuracy)
    }
}

struct Model {
    vars: VarMap,
    cde: NeuralCde,
    readout: Linear,
}

impl Model {
    fn new(
        kind: Kind,
        dtype: Dtype,
        seed: u64,
        device: &Device,
        recorder: &Recorder,
    ) -> Result<Self> {
        let (vars, channels) = (VarMap::new(), kind.channels());
        let cde = NeuralCde::new(
            &vars,
            "cde",
            DType::F32,
            device,
            move |vb| candle_nn::linear(channels, HIDDEN, vb),
            move |vb| {
                CdeMlp::new(
                    &[HIDDEN, WIDTH, WIDTH, WIDTH],
                    channels,
                    Activation::Relu,
                    vb,
                )
            },
        )?
        .options(OdeOptions {
            method: MIDPOINT,
            precision: Some(dtype.precision()),
            recorder: Some(recorder.clone()),
            ..Default::default()
        });
        let vb = VarBuilder::from_varmap(&vars, DType::F32, device);
        let readout = candle_nn::linear(2 * HIDDEN, CLASSES, vb.pp("readout"))?;
        initial::layers(&vars, &mut generator(seed))?;
        Ok(Self { vars, cde, readout })
    }

    /// Of states at all knots, `(knots, utterances, HIDDEN)`: a linear map of the last and the mean.
    fn logits(&self, states: &Tensor, weights: &Tensor) -> Result<Tensor> {
        let last = states.get(states.dim(0)? - 1)?;
        let mean = states.broadcast_mul(weights)?.sum(0)?;
        Ok(self.readout.forward(&Tensor::cat(&[last, mean], 1)?)?)
    }

    fn test(&self, all: &Utterances, kind: Kind, device: &Device) -> Result<Vec<Vec<f64>>> {
        let everything: Vec<usize> = (0..all.len()).collect();
        let path = all.paths(&everything, kind, None, device)?;
        let states = self.cde.predict(&path, path.knots())?;
        let weights = all.weights(&everything, path.knots(), device)?;
        let taken = self.logits(&states, &weights)?.argmax(D::Minus1)?;
        let mut counts = vec![vec![0.0; CLASSES]; CLASSES];
        for (taken, &truth) in taken.to_vec1::<u32>()?.into_iter().zip(&all.labels) {
            counts[truth as usize][taken as usize] += 1.0;
        }
        Ok(counts)
    }
}

/// Share on the diagonal.
fn right(confusion: &[Vec<f64>]) -> f64 {
    let all: f64 = confusion.iter().flatten().sum();
    let right: f64 = (0..confusion.len()).map(|c| confusion[c][c]).sum();
    right / all
}

/// Trains; the same batches in the same order for the same seed, in every precision.
pub(crate) fn train(
    data: &Data,
    setting: &Setting,
    dtype: Dtype,
    seed: u64,
    device: &Device,
    bar: &ProgressBar,
) -> Result<Outcome> {
    let recorder = Recorder::default();
    let model = Model::new(setting.kind, dtype, seed, device, &recorder)?;
    let adam = ParamsAdamW {
        lr: setting.rate,
        weight_decay: 0.01,
        ..Default::default()
    };
    let mut optimiser = AdamW::new(model.vars.all_vars(), adam)?;
    let mut rng = generator(seed);
    let mut order: Vec<usize> = (0..data.training.len()).collect();
    let updates = setting.epochs * order.len() / BATCH;
    let (mut epochs, mut milliseconds) = (vec![], vec![]);
    let mut confusion = vec![];
    for _ in 0..setting.epochs {
        order.shuffle(&mut rng);
        let mut losses = vec![];
        for chosen in order.chunks_exact(BATCH) {
            // Half a cosine.
            let part = milliseconds.len() as f64 / updates as f64;
            let rate = 0.5 * setting.rate * (1.0 + (std::f64::consts::PI * part).cos());
            optimiser.set_learning_rate(rate);
            let clock = Instant::now();
            let noise = (setting.noise > 0.0).then_some((setting.noise, &mut rng));
            let path = data.training.paths(chosen, setting.kind, noise, device)?;
            let states = model.cde.solve(&path, path.knots())?;
            let weights = data.training.weights(chosen, path.knots(), device)?;
            let logits = model.logits(&states, &weights)?;
            let loss = cross_entropy(&logits, &data.training.labels(chosen, device)?)?;
            optimiser.backward_step(&loss)?;
            losses.push(f64::from(loss.to_scalar::<f32>()?));
            milliseconds.push(1e3 * clock.elapsed().as_secs_f64());
            bar.inc(1);
        }
        confusion = model.test(&data.test, setting.kind, device)?;
        let (loss, accuracy) = (mean(&losses), right(&confusion));
        bar.set_message(format!("loss {loss:.3}, test {:.1} %", 100.0 * accuracy));
        epochs.push(Epoch { loss, accuracy });
    }
    let training = right(&model.test(&data.training, setting.kind, device)?);
    let stats = recorder.take();
    // Every update and every test is one forward pass.
    let passes = milliseconds.len() + setting.epochs + 1;
    Ok(Outcome {
        dtype,
        seed,
        epochs,
        training,
        confusion,
        evaluations: stats.evaluations as f64 / passes as f64,
        backward: stats.recomputed as f64 / milliseconds.len() as f64,
        milliseconds: median(milliseconds),
        parameters: model.vars.all_vars().iter().map(|v| v.elem_count()).sum(),
        stats,
    })
}
