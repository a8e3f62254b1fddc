//! A training that begins with short streams and makes them longer as soon as the model has learnt them.

use std::time::Instant;

use candle_core::{DType, Device, Tensor, Var, D};
use candle_nn::loss::cross_entropy;
use candle_nn::{AdamW, Optimizer, ParamsAdamW, VarMap};

use crate::model::{Kind, Model};
use crate::streams::{streams, Runs};
use common::random::generator;
use common::{gradients, progress, Result};

const BATCH: usize = 128;
const RATE: f64 = 3e-3;
/// Updates over which the rate rises to `RATE`.
const WARM_UP: usize = 50;
/// What the norm of a gradient is at most.
const CLIP: f64 = 1.0;
/// Bits of the first streams.
const FIRST: usize = 2;
/// The share of streams that must be right before they become longer, and before the training ends.
const PASS: f64 = 0.95;
const DONE: f64 = 0.99;
/// Over about so many updates the share is a mean; no length is trained for fewer.
const WINDOW: usize = 10;
/// Updates after the last length is learnt; the rate falls to a twentieth over them.
const LAST: usize = 400;
const FALLS_TO: f64 = 0.05;
/// Streams of a test.
const TEST: usize = 1000;

/// The longest streams to train with, and the most updates.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Plan {
    pub(crate) bits: usize,
    pub(crate) updates: usize,
}

/// What a training came to.
pub(crate) struct Outcome {
    pub(crate) kind: Kind,
    pub(crate) seed: u64,
    /// Bits of the streams of each update, and the share of these that was right.
    pub(crate) course: Vec<(usize, f64)>,
    /// Bits of test streams, and the share of them that is right.
    pub(crate) tests: Vec<(usize, f64)>,
    pub(crate) seconds: f64,
}

impl Outcome {
    /// The share of test streams of so many bits that is right.
    pub(crate) fn right(&self, bits: usize) -> f64 {
        let mut tests = self.tests.iter();
        tests
            .find(|(n, _)| *n == bits)
            .map_or(f64::NAN, |(_, right)| *right)
    }
}

/// Where a training stands.
#[derive(Clone, Copy, Debug)]
enum Stage {
    /// Streams of so many bits, the share of them that was right in the last updates, and how many updates there were.
    Learning {
        bits: usize,
        right: f64,
        updates: usize,
    },
    /// All is learnt; updates that are left.
    Ending(usize),
}

impl Stage {
    fn first(bits: usize) -> Self {
        Self::Learning {
            bits,
            right: 0.5,
            updates: 0,
        }
    }

    /// After an update in which this share of the streams was right.
    fn after(self, now: f64, longest: usize) -> Self {
        match self {
            Self::Ending(left) => Self::Ending(left - 1),
            Self::Learning {
                bits,
                right,
                updates,
            } => {
                let right = right + (now - right) / WINDOW as f64;
                let updates = updates + 1;
                let enough = updates >= WINDOW;
                match bits < longest {
                    true if enough && right > PASS => Self::first(bits + 1),
                    false if enough && right > DONE => Self::Ending(LAST),
                    _ => Self::Learning {
                        bits,
                        right,
                        updates,
                    },
                }
            }
        }
    }

    fn bits(self, longest: usize) -> usize {
        match self {
            Self::Learning { bits, .. } => bits,
            Self::Ending(_) => longest,
        }
    }

    /// The learning rate of an update.
    fn rate(self, update: usize) -> f64 {
        match self {
            Self::Learning { .. } => RATE * ((update + 1) as f64 / WARM_UP as f64).min(1.0),
            Self::Ending(left) => RATE * FALLS_TO.powf(1.0 - left as f64 / LAST as f64),
        }
    }
}

pub(crate) fn train(kind: Kind, seed: u64, plan: Plan, device: &Device) -> Result<Outcome> {
    let clock = Instant::now();
    let (vars, mut rng) = (VarMap::new(), generator(seed));
    let model = Model::new(kind, &vars, &mut rng, device)?;
    let vars = by_name(&vars)?;
    let adam = ParamsAdamW {
        beta2: 0.99,
        weight_decay: 0.0,
        ..Default::default()
    };
    let mut optimiser = AdamW::new(vars.clone(), adam)?;
    let bar = progress(&kind.name(), plan.updates)?;
    let mut stage = Stage::first(FIRST.min(plan.bits));
    let mut course = vec![];
    while course.len() < plan.updates && !matches!(stage, Stage::Ending(0)) {
        let bits = stage.bits(plan.bits);
        let runs = streams(BATCH, bits, &mut rng, device)?;
        let logits = model.logits(&runs)?;
        let loss = cross_entropy(&logits.flatten(0, 1)?, &runs.parities.flatten_all()?)?;
        let mut grads = loss.backward()?;
        gradients::clip(&mut grads, &vars, CLIP)?;
        optimiser.set_learning_rate(stage.rate(course.len()));
        optimiser.step(&grads)?;
        let right = right(&logits, &runs)?;
        course.push((bits, right));
        stage = stage.after(right, plan.bits);
        bar.set_message(format!("{bits} bits, {:.0} % right", 100.0 * right));
        bar.inc(1);
    }
    bar.finish_and_clear();
    let mut tests = vec![];
    for bits in [plan.bits, 3 * plan.bits / 2, 2 * plan.bits] {
        let runs = streams(TEST, bits, &mut rng, device)?;
        tests.push((bits, right(&model.logits(&runs)?, &runs)?));
    }
    Ok(Outcome {
        kind,
        seed,
        course,
        tests,
        seconds: clock.elapsed().as_secs_f64(),
    })
}

/// The share of streams whose parity is told after the last run.
fn right(logits: &Tensor, runs: &Runs) -> Result<f64> {
    let told = logits.detach().argmax(D::Minus1)?;
    let last = told.dim(1)? - 1;
    let right = told
        .narrow(1, last, 1)?
        .eq(&runs.parities.narrow(1, last, 1)?)?;
    Ok(right.to_dtype(DType::F64)?.mean_all()?.to_scalar()?)
}

/// In an order that is the same in every run, so that a norm over all of them is.
fn by_name(vars: &VarMap) -> Result<Vec<Var>> {
    let data = vars.data().lock().map_err(|_| "the variables are locked")?;
    let mut named: Vec<_> = data.iter().collect();
    named.sort_by_key(|(name, _)| name.as_str());
    Ok(named.into_iter().map(|(_, var)| var.clone()).collect())
}
