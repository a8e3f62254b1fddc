//! One training run in one precision.

use std::time::Instant;

use candle_core::{Device, Tensor, D};
use candle_diffeq::metrics::{Recorder, Stats};
use candle_nn::{AdamW, Optimizer, ParamsAdamW};
use indicatif::ProgressBar;

use crate::model::Model;
use crate::oscillator::{velocity, Trajectory, START};
use common::dtype::Dtype;
use common::random::generator;
use common::{mean, median, Result};

const WINDOWS: usize = 20;
const LENGTH: usize = 10;
const LEARNING_RATE: f64 = 1e-3;
/// Iterations from one test to the next.
const TEST: usize = 20;
/// Over how many iterations the last loss is averaged.
const LAST: usize = 50;

/// What a run came to.
pub(crate) struct Outcome {
    pub(crate) dtype: Dtype,
    /// Mean square error over the windows of every iteration.
    pub(crate) losses: Vec<f64>,
    /// Iterations, and the mean square error over the whole trajectory, solved from its start.
    pub(crate) tests: Vec<(usize, f64)>,
    /// Mean of ‖f − f̂‖ relative to the mean of ‖f‖ over the trajectory, with the best weights.
    pub(crate) field_error: f64,
    /// Median of an iteration.
    pub(crate) milliseconds: f64,
    pub(crate) stats: Stats,
    /// With the best weights.
    pub(crate) model: Model,
}

impl Outcome {
    /// Iteration and error of the best test.
    pub(crate) fn best(&self) -> (usize, f64) {
        let tests = self.tests.iter().copied();
        let best = tests.min_by(|a, b| a.1.total_cmp(&b.1));
        best.unwrap_or((0, f64::NAN))
    }

    /// Mean loss of the last iterations.
    pub(crate) fn last(&self) -> f64 {
        mean(&self.losses[self.losses.len().saturating_sub(LAST)..])
    }

    /// Median of the later half of the tests: they swing while the loss hardly changes.
    pub(crate) fn later(&self) -> f64 {
        let tests = &self.tests[self.tests.len() / 2..];
        median(tests.iter().map(|(_, error)| *error).collect())
    }
}

/// Trains on windows of the data; iteration by iteration the same windows for the same seed.
pub(crate) fn train(
    data: &Trajectory,
    dtype: Dtype,
    iterations: usize,
    seed: u64,
    device: &Device,
    bar: &ProgressBar,
) -> Result<Outcome> {
    let recorder = Recorder::default();
    let model = Model::new(dtype, seed, device, &recorder)?;
    let adam = ParamsAdamW {
        lr: LEARNING_RATE,
        weight_decay: 0.0,
        ..Default::default()
    };
    let mut optimiser = AdamW::new(model.vars(), adam)?;
    let times: Vec<f64> = (0..LENGTH).map(|i| i as f64 * data.spacing()).collect();
    let starts = data.times.points().len() - LENGTH + 1;
    let mut rng = generator(seed);
    let (mut losses, mut milliseconds, mut tests) = (vec![], vec![], vec![]);
    let (mut least, mut best) = (f64::INFINITY, vec![]);
    for i in 0..=iterations {
        if i % TEST == 0 || i == iterations {
            let error = test(data, &model)?;
            if error < least {
                let copies = model.vars().into_iter().map(|var| Ok((var.copy()?, var)));
                (least, best) = (error, copies.collect::<Result<_>>()?);
            }
            tests.push((i, error));
        }
        if i == iterations {
            break;
        }
        // Without replacement.
        let chosen = rand::seq::index::sample(&mut rng, starts, WINDOWS);
        let chosen: Vec<u32> = chosen.iter().map(|start| start as u32).collect();
        let windows = data.windows(&chosen, LENGTH)?;
        let clock = Instant::now();
        let loss = model.loss(&windows, &times)?;
        optimiser.backward_step(&loss)?;
        losses.push(f64::from(loss.to_scalar::<f32>()?));
        milliseconds.push(1e3 * clock.elapsed().as_secs_f64());
        bar.set_message(format!("loss {:.1e}", losses[i]));
        bar.inc(1);
    }
    for (copy, var) in best {
        var.set(&copy)?;
    }
    Ok(Outcome {
        dtype,
        losses,
        tests,
        field_error: field_error(data, &model)?,
        milliseconds: median(milliseconds),
        stats: recorder.take(),
        model,
    })
}

/// Mean square error over the whole trajectory.
fn test(data: &Trajectory, model: &Model) -> Result<f64> {
    let start = Tensor::new(&[START], &Device::Cpu)?;
    let states = model.solve(&start, &data.times)?.squeeze(1)?;
    Ok((states - &data.states)?.sqr()?.mean_all()?.to_scalar()?)
}

fn field_error(data: &Trajectory, model: &Model) -> Result<f64> {
    let truth = velocity(&data.states)?;
    let size = |x: &Tensor| {
        let norms = x.sqr()?.sum(D::Minus1)?.sqrt()?;
        norms.mean_all()?.to_scalar::<f64>()
    };
    let difference = (model.velocity(&data.states)? - &truth)?;
    Ok(size(&difference)? / size(&truth)?)
}
