//! One training run in one precision.

use std::time::Instant;

use candle_core::{DType, Device, Tensor, D};
use candle_diffeq::metrics::{Recorder, Stats};
use candle_diffeq::options::TimeGrid;
use candle_diffeq::Precision;
use candle_nn::loss::cross_entropy;
use candle_nn::Optimizer;
use indicatif::ProgressBar;
use rand::seq::SliceRandom;

use crate::data::{Data, Images};
use crate::field::Sign;
use crate::network::{Filters, Network};
use common::dtype::Dtype;
use common::momentum::{cosine, Config, Momentum};
use common::random::{self, generator};
use common::{gradients, mean, median, Result};

/// Network and training.
#[derive(Clone, Debug)]
pub(crate) struct Setting {
    /// Channels of the first block.
    pub(crate) width: usize,
    /// Of the images, in pixels.
    pub(crate) side: usize,
    pub(crate) batch: usize,
    pub(crate) epochs: usize,
    pub(crate) rate: f64,
    pub(crate) filters: Filters,
    /// Largest norm of a gradient.
    pub(crate) clip: f64,
    /// Images of the training, of the validation and of the test, at most.
    pub(crate) counts: [usize; 3],
}

const LAST_RATE: f64 = 1e-4;
const MOMENTUM: f64 = 0.9;
const DECAY: f64 = 1e-4;
/// Weights stay in [−1, 1].
const CLAMP: f64 = 1.0;
/// Over how many iterations the first and the last loss are averaged.
const ENDS: usize = 10;
/// Images that are perturbed, and by how much relative to them.
const PERTURBED: usize = 4;
const PERTURBATION: f64 = 0.01;
/// Steps in which the perturbation is followed, and those of training.
const FINE: usize = 128;
const COARSE: usize = 4;

/// What a run came to.
pub(crate) struct Outcome {
    pub(crate) dtype: Dtype,
    pub(crate) losses: Vec<f64>,
    /// Shares of the held-out and of the test images.
    pub(crate) validation: f64,
    pub(crate) test: f64,
    pub(crate) parameters: usize,
    /// Medians of an iteration; backward with the optimiser's step.
    pub(crate) forward: f64,
    pub(crate) backward: f64,
    pub(crate) stats: Stats,
    pub(crate) perturbations: Perturbations,
}

/// ‖perturbed − unperturbed‖ relative to t = 0, over t, in the first block.
pub(crate) type Growth = Vec<(f64, f64)>;

/// With the initial weights, in fine steps and, with the stable sign, in those of training; and with
/// the weights that were learnt, in fine ones.
pub(crate) struct Perturbations {
    pub(crate) stable: Growth,
    pub(crate) unstable: Growth,
    pub(crate) coarse: Growth,
    pub(crate) learnt: Growth,
}

impl Outcome {
    pub(crate) fn first(&self) -> f64 {
        mean(&self.losses[..ENDS.min(self.losses.len())])
    }

    pub(crate) fn last(&self) -> f64 {
        mean(&self.losses[self.losses.len().saturating_sub(ENDS)..])
    }
}

/// The dtype roles: in low precision the trajectory is kept in it, too.
fn precision(dtype: Dtype) -> Precision {
    match dtype {
        Dtype::Bf16 => Precision::bf16().store(DType::BF16),
        Dtype::F16 => Precision::f16().store(DType::F16),
        other => other.precision(),
    }
}

/// Trains; iteration by iteration the same images for the same seed.
pub(crate) fn train(
    data: &Data,
    dtype: Dtype,
    sign: Sign,
    setting: &Setting,
    seed: u64,
    device: &Device,
    bar: &ProgressBar,
) -> Result<Outcome> {
    let (mut rng, recorder) = (generator(seed), Recorder::default());
    let &Setting {
        width,
        side,
        batch,
        epochs,
        ..
    } = setting;
    let network = Network::new(
        (width, setting.filters),
        sign,
        precision(dtype),
        device,
        &recorder,
        &mut rng,
    )?;
    let config = Config {
        rate: setting.rate,
        momentum: MOMENTUM,
        decay: DECAY,
    };
    let growth = |sign, steps| growth(&network, &data.test, dtype, sign, (side, steps), device);
    let (stable, unstable) = (growth(Sign::Stable, FINE)?, growth(Sign::Unstable, FINE)?);
    let coarse = growth(Sign::Stable, COARSE)?;
    let vars = network.vars();
    let mut optimiser = Momentum::new(vars.clone(), config)?;
    let mut order: Vec<usize> = (0..data.training.len()).collect();
    let total = epochs * (order.len() / batch);
    bar.set_length(total as u64);
    let (mut losses, mut forward, mut backward) = (vec![], vec![], vec![]);
    for _ in 0..epochs {
        order.shuffle(&mut rng);
        for indices in order.chunks_exact(batch) {
            let share = losses.len() as f64 / total as f64;
            optimiser.set_learning_rate(cosine(setting.rate, LAST_RATE, share));
            let (images, labels) = data.training.augmented(indices, side, &mut rng, device)?;
            let clock = Instant::now();
            let loss = cross_entropy(&network.train(&images)?, &labels)?;
            losses.push(f64::from(loss.to_scalar::<f32>()?));
            forward.push(1e3 * clock.elapsed().as_secs_f64());
            let clock = Instant::now();
            let mut grads = loss.backward()?;
            gradients::clip(&mut grads, &vars, setting.clip)?;
            optimiser.step(&grads)?;
            for var in &vars {
                var.set(&var.as_detached_tensor().clamp(-CLAMP, CLAMP)?)?;
            }
            device.synchronize()?;
            backward.push(1e3 * clock.elapsed().as_secs_f64());
            bar.set_message(format!("loss {:.3}", losses[losses.len() - 1]));
            bar.inc(1);
        }
    }
    let stats = recorder.take();
    Ok(Outcome {
        dtype,
        losses,
        validation: accuracy(&network, &data.validation, setting, device)?,
        test: accuracy(&network, &data.test, setting, device)?,
        parameters: network.parameters(),
        forward: median(forward),
        backward: median(backward),
        stats,
        perturbations: Perturbations {
            stable,
            unstable,
            coarse,
            learnt: growth(sign, FINE)?,
        },
    })
}

fn accuracy(network: &Network, images: &Images, setting: &Setting, device: &Device) -> Result<f64> {
    let all: Vec<usize> = (0..images.len()).collect();
    let mut right = 0.0;
    for indices in all.chunks(setting.batch) {
        let (batch, labels) = images.batch(indices, setting.side, device)?;
        let taken = network.test(&batch)?.argmax(D::Minus1)?;
        let hits = taken.eq(&labels)?.to_dtype(DType::F32)?.sum_all()?;
        right += f64::from(hits.to_scalar::<f32>()?);
    }
    Ok(right / images.len() as f64)
}

/// Follows a perturbation through the first block.
fn growth(
    network: &Network,
    images: &Images,
    dtype: Dtype,
    sign: Sign,
    (side, steps): (usize, usize),
    device: &Device,
) -> Result<Growth> {
    let some: Vec<usize> = (0..PERTURBED.min(images.len())).collect();
    let (batch, _) = images.batch(&some, side, device)?;
    let y0 = network.first_state(&batch)?;
    let noise = random::normal(&mut generator(0), y0.shape(), DType::F32, device)?;
    let size = y0.sqr()?.mean_all()?.sqrt()?.to_scalar::<f32>()?;
    let perturbed = (&y0 + (noise * (PERTURBATION * f64::from(size)))?)?;
    let times = TimeGrid::linspace(0.0, 1.0, steps + 1)?;
    let solve = |y0: &Tensor| network.first_block(y0, sign, precision(dtype), &times);
    let apart = (solve(&perturbed)? - solve(&y0)?)?.flatten_from(1)?;
    let norms = apart.sqr()?.sum(1)?.sqrt()?.to_dtype(DType::F64)?;
    let norms = norms.to_vec1::<f64>()?;
    let growth = norms.iter().map(|norm| norm / norms[0]);
    Ok(times.points().iter().copied().zip(growth).collect())
}
