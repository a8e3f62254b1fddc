//! One training run in one precision.

use std::time::Instant;

use candle_core::{DType, Device, Tensor, D};
use candle_diffeq::{Checkpoint, NeuralOde, OdeOptions, Recorder, Stats, RK4};
use candle_nn::{linear, AdamW, Module, Optimizer, ParamsAdamW, VarBuilder, VarMap};
use indicatif::ProgressBar;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use rand_distr::{Distribution, Normal};

use crate::common::dtype::Dtype;
use crate::common::{mean, median, Result};
use crate::spiral::{velocity, Trajectory};

const HIDDEN: usize = 50;
const WINDOWS: usize = 20;
const LENGTH: usize = 10;
/// Held for three quarters of the iterations, then falling linearly to zero: with a constant rate
/// the last losses are the noise of the windows.
const LEARNING_RATE: f64 = 1e-3;
/// Over how many iterations the first and the last loss are averaged.
const FIRST: usize = 10;
const LAST: usize = 50;

/// What a run came to.
pub(crate) struct Outcome {
    pub(crate) dtype: Dtype,
    /// L1 loss of every iteration.
    pub(crate) losses: Vec<f64>,
    /// Learnt states at the times of the data, (points, 2).
    pub(crate) states: Vec<Vec<f64>>,
    /// Mean |y − ŷ| over the whole trajectory, solved from its start.
    pub(crate) trajectory_error: f64,
    /// Mean of |f − f̂| / |f| over the points of the trajectory.
    pub(crate) field_error: f64,
    /// Median milliseconds of an iteration.
    pub(crate) forward: f64,
    pub(crate) backward: f64,
    pub(crate) stats: Stats,
}

impl Outcome {
    /// Mean loss of the first iterations.
    pub(crate) fn first(&self) -> f64 {
        mean(&self.losses[..FIRST.min(self.losses.len())])
    }

    /// Mean loss of the last iterations.
    pub(crate) fn last(&self) -> f64 {
        mean(&self.losses[self.losses.len().saturating_sub(LAST)..])
    }
}

/// f̂(y) = l2(tanh(l1(y³))), an ordinary candle module.
fn network(vb: VarBuilder<'_>) -> candle_core::Result<impl Module + Send + Sync> {
    let (l1, l2) = (
        linear(2, HIDDEN, vb.pp("l1"))?,
        linear(HIDDEN, 2, vb.pp("l2"))?,
    );
    Ok(candle_nn::func(move |y| {
        let cube = (y.sqr()? * y)?;
        l2.forward(&l1.forward(&cube)?.tanh()?)
    }))
}

/// Weights of standard deviation 0.1 and no bias, the same in every precision.
fn initialise(vars: &mut VarMap, ode: &NeuralOde, rng: &mut StdRng) -> Result<()> {
    let normal = Normal::new(0f32, 0.1)?;
    for name in ode.parameters() {
        let shape = match vars.data().lock() {
            Ok(data) => data.get(name).map(|var| var.shape().clone()),
            Err(_) => None,
        };
        let shape = shape.ok_or_else(|| format!("no variable {name}"))?;
        let values: Vec<f32> = match name.ends_with("bias") {
            true => vec![0.0; shape.elem_count()],
            false => (0..shape.elem_count())
                .map(|_| normal.sample(rng))
                .collect(),
        };
        vars.set_one(name, Tensor::from_vec(values, shape, &Device::Cpu)?)?;
    }
    Ok(())
}

/// Trains on windows of the data; iteration by iteration the same windows for the same seed.
pub(crate) fn train(
    data: &Trajectory,
    dtype: Dtype,
    iterations: usize,
    seed: u64,
    bar: &ProgressBar,
) -> Result<Outcome> {
    let mut rng = StdRng::seed_from_u64(seed);
    let (mut vars, recorder) = (VarMap::new(), Recorder::default());
    let options = OdeOptions {
        method: RK4,
        precision: Some(dtype.precision()),
        recorder: Some(recorder.clone()),
        ..Default::default()
    };
    let ode = NeuralOde::new(&vars, "ode", &Device::Cpu, network)?.options(options.clone());
    initialise(&mut vars, &ode, &mut rng)?;
    let adam = ParamsAdamW {
        lr: LEARNING_RATE,
        weight_decay: 0.0,
        ..Default::default()
    };
    let mut optimiser = AdamW::new(vars.all_vars(), adam)?;

    let times: Vec<f64> = (0..LENGTH).map(|i| i as f64 * data.spacing()).collect();
    let starts = 0..(data.times.points().len() - LENGTH) as u32;
    let (mut losses, mut forward, mut backward) = (vec![], vec![], vec![]);
    for i in 0..iterations {
        optimiser.set_learning_rate(
            LEARNING_RATE * (4.0 * (1.0 - i as f64 / iterations as f64)).min(1.0),
        );
        let starts: Vec<u32> = (0..WINDOWS)
            .map(|_| rng.random_range(starts.clone()))
            .collect();
        let truth = data.windows(&starts, LENGTH, DType::F32)?;
        let clock = Instant::now();
        let states = ode.solve(&truth.get(0)?, &times)?;
        let loss = (states - truth)?.abs()?.mean_all()?;
        forward.push(clock.elapsed().as_secs_f64() * 1e3);
        let clock = Instant::now();
        let grads = loss.backward()?;
        backward.push(clock.elapsed().as_secs_f64() * 1e3);
        optimiser.step(&grads)?;
        losses.push(f64::from(loss.to_scalar::<f32>()?));
        bar.set_message(format!("loss {:.2e}", losses[losses.len() - 1]));
        bar.inc(1);
    }
    let stats = recorder.take();
    let ode = ode.options(OdeOptions {
        checkpoint: Checkpoint::Nothing,
        ..options
    });
    let (states, trajectory_error) = learnt_trajectory(data, &ode)?;
    Ok(Outcome {
        dtype,
        losses,
        states,
        trajectory_error,
        field_error: field_error(data, &vars)?,
        forward: median(forward),
        backward: median(backward),
        stats,
    })
}

/// The states from the data's start on, and how far they are from the data on average.
fn learnt_trajectory(data: &Trajectory, ode: &NeuralOde) -> Result<(Vec<Vec<f64>>, f64)> {
    let states = ode.solve(&data.start(DType::F32)?, &data.times)?;
    let states = states.squeeze(1)?.detach().to_dtype(DType::F64)?;
    let error = (&states - &data.states)?.abs()?.mean_all()?;
    Ok((states.to_vec2()?, error.to_scalar()?))
}

/// How far f̂, with the weights as the optimiser holds them, is from f on the trajectory.
fn field_error(data: &Trajectory, vars: &VarMap) -> Result<f64> {
    let vb = VarBuilder::from_varmap(vars, DType::F32, &Device::Cpu);
    let learnt = network(vb.pp("ode"))?.forward(&data.states.to_dtype(DType::F32)?)?;
    let truth = velocity(&data.states)?;
    let norm = |x: &Tensor| x.sqr()?.sum(D::Minus1)?.sqrt();
    let error = norm(&(learnt.detach().to_dtype(DType::F64)? - &truth)?)?;
    Ok((error / norm(&truth)?)?.mean_all()?.to_scalar()?)
}
