//! One training run in one precision.

use std::time::Instant;

use candle_core::{Device, Tensor, D};
use candle_diffeq::distributed::{mean as mean_over, share, total, Group, Replicas};
use candle_diffeq::metrics::{Recorder, Stats};
use candle_nn::loss::cross_entropy;
use candle_nn::Optimizer;
use indicatif::ProgressBar;
use rand::seq::SliceRandom;

use crate::network::{Layout, Network};
use common::dtype::Dtype;
use common::mnist::{shifts, Data, Images, CLASSES};
use common::momentum::{cosine, Config, Momentum};
use common::random::generator;
use common::{mean, median, Result};

/// Network and training.
#[derive(Clone, Debug)]
pub(crate) struct Setting {
    pub(crate) layout: Layout,
    pub(crate) batch: usize,
    pub(crate) epochs: usize,
    pub(crate) rate: f64,
    /// Images are moved by up to so many pixels.
    pub(crate) shift: usize,
}

const MOMENTUM: f64 = 0.9;
/// Images in a batch of the validation.
const TEST: usize = 250;

/// What an epoch came to.
pub(crate) struct Epoch {
    /// Mean cross entropy.
    pub(crate) loss: f64,
    /// Share of the validation images.
    pub(crate) accuracy: f64,
    /// Of the field forward in training, by image.
    pub(crate) evaluations: f64,
}

/// What a run came to.
pub(crate) struct Outcome {
    pub(crate) dtype: Dtype,
    pub(crate) epochs: Vec<Epoch>,
    pub(crate) parameters: usize,
    pub(crate) iterations: usize,
    /// Processes that shared every batch; each has its own passes.
    pub(crate) ranks: usize,
    /// Median of an iteration.
    pub(crate) milliseconds: f64,
    pub(crate) seconds: f64,
    /// Of all iterations.
    pub(crate) stats: Stats,
    /// How many of each true class (row) were taken for each class (column).
    pub(crate) confusion: Vec<Vec<f64>>,
}

impl Outcome {
    /// After the last epoch: none is picked by the images that it is judged by.
    pub(crate) fn accuracy(&self) -> f64 {
        self.epochs.last().map_or(f64::NAN, |e| e.accuracy)
    }

    pub(crate) fn loss(&self) -> f64 {
        self.epochs.last().map_or(f64::NAN, |e| e.loss)
    }
}

/// Trains; epoch by epoch the same images in the same order for the same seed, however many processes share them.
pub(crate) fn train(
    group: &dyn Group,
    data: &Data,
    dtype: Dtype,
    setting: &Setting,
    seed: u64,
    device: &Device,
    bar: &ProgressBar,
) -> Result<Outcome> {
    let clock = Instant::now();
    let (mut rng, recorder) = (generator(seed), Recorder::default());
    let network = Network::new(setting.layout, dtype, device, &recorder, &mut rng)?;
    let config = Config {
        rate: setting.rate,
        momentum: MOMENTUM,
        decay: 0.0,
    };
    let replicas = Replicas::new(group, network.map())?;
    let mut optimiser = Momentum::new(replicas.variables(), config)?;
    let mut order: Vec<usize> = (0..data.training.count()).collect();
    let batches = order.len() / setting.batch;
    let iterations = batches * setting.epochs;
    bar.set_length(iterations as u64);
    let (mut epochs, mut milliseconds, mut confusion) = (vec![], vec![], vec![]);
    for epoch in 0..setting.epochs {
        order.shuffle(&mut rng);
        let before = recorder.stats();
        let mut losses = vec![];
        for (n, indices) in order.chunks_exact(setting.batch).enumerate() {
            let part = (epoch * batches + n) as f64 / iterations as f64;
            optimiser.set_learning_rate(cosine(setting.rate, 0.0, part));
            let shifts = shifts(indices.len(), setting.shift, &mut rng);
            let mine = share(group, indices.len());
            let (indices, shifts) = (&indices[mine.clone()], &shifts[mine.clone()]);
            let (images, labels) = data.training.batch(indices, shifts, device)?;
            let clock = Instant::now();
            let loss = match mine.len() {
                0 => Tensor::new(0f32, device)?,
                _ => cross_entropy(&network.train(&images)?, &labels)?,
            };
            replicas.backward_step(&loss, mine.len(), &mut optimiser)?;
            let loss = f64::from(loss.to_scalar::<f32>()?);
            losses.push(mean_over(group, loss, mine.len())?);
            milliseconds.push(1e3 * clock.elapsed().as_secs_f64());
            bar.inc(1);
        }
        let images = batches * setting.batch;
        let evaluations = by_image(group, (&before, &recorder.stats()), images, batches)?;
        confusion = confusions(group, &network, &data.validation, device)?;
        let right: f64 = (0..CLASSES).map(|c| confusion[c][c]).sum();
        epochs.push(Epoch {
            loss: mean(&losses),
            accuracy: right / data.validation.count() as f64,
            evaluations,
        });
        let Epoch { loss, accuracy, .. } = &epochs[epoch];
        bar.set_message(format!(
            "loss {loss:.3}, accuracy {:.1} %",
            100.0 * accuracy
        ));
    }
    Ok(Outcome {
        dtype,
        epochs,
        parameters: network.parameters(),
        iterations,
        ranks: group.size(),
        milliseconds: median(milliseconds),
        seconds: clock.elapsed().as_secs_f64(),
        stats: total(group, &recorder.take())?,
        confusion,
    })
}

/// Evaluations of an image between two counts: of its own steps, or of those of its batch.
fn by_image(
    group: &dyn Group,
    (before, after): (&Stats, &Stats),
    images: usize,
    batches: usize,
) -> Result<f64> {
    let (before, after) = (total(group, before)?, total(group, after)?);
    Ok(match after.row_evaluations - before.row_evaluations {
        0 => (after.evaluations - before.evaluations) as f64 / (batches * group.size()) as f64,
        of_rows => of_rows as f64 / images as f64,
    })
}

/// Every process counts those of its own images.
fn confusions(
    group: &dyn Group,
    network: &Network,
    images: &Images,
    device: &Device,
) -> Result<Vec<Vec<f64>>> {
    let mut counts = vec![0.0; CLASSES * CLASSES];
    let mine: Vec<usize> = share(group, images.count()).collect();
    for indices in mine.chunks(TEST) {
        let (batch, labels) = images.batch(indices, &vec![[0; 2]; indices.len()], device)?;
        let taken: Tensor = network.test(&batch)?.argmax(D::Minus1)?;
        let both = labels
            .to_vec1::<u32>()?
            .into_iter()
            .zip(taken.to_vec1::<u32>()?);
        both.for_each(|(truth, taken)| counts[truth as usize * CLASSES + taken as usize] += 1.0);
    }
    let counts = group.sum(&Tensor::new(counts, &Device::Cpu)?)?;
    Ok(counts.reshape((CLASSES, CLASSES))?.to_vec2()?)
}
