//! One training run in one precision.

use std::time::Instant;

use candle_core::{DType, Device, Tensor, D};
use candle_diffeq::metrics::{Recorder, Stats};
use candle_diffeq::options::Checkpoint;
use candle_diffeq::tableau::RK4;
use candle_diffeq::{NeuralOde, OdeOptions};
use candle_nn::{linear, AdamW, Module, Optimizer, ParamsAdamW, VarBuilder, VarMap};
use indicatif::ProgressBar;
use rand::rngs::StdRng;
use rand::Rng;
use rand_distr::{Distribution, Normal};

use crate::spiral::Trajectory;
use common::dtype::Dtype;
use common::random::generator;
use common::{mean, median, Result};

/// Network and training.
#[derive(Clone)]
pub(crate) struct Setting {
    /// Width of the network.
    hidden: usize,
    /// In a batch, and times in each.
    windows: usize,
    length: usize,
    /// Held for three quarters of the iterations, then falling linearly to zero: with a constant
    /// rate the last losses are the noise of the windows.
    learning_rate: f64,
    pub(crate) iterations: usize,
}

impl Setting {
    /// torchdiffeq's demo.
    pub(crate) const SMALL: Self = Self {
        hidden: 50,
        windows: 20,
        length: 10,
        learning_rate: 1e-3,
        iterations: 2000,
    };
    /// rampde's demo, with Adam for RMSprop.
    pub(crate) const PUBLISHED: Self = Self {
        hidden: 128,
        windows: 128,
        length: 100,
        learning_rate: 1e-4,
        iterations: 3000,
    };

    /// The same, longer or shorter.
    pub(crate) fn for_iterations(&self, iterations: usize) -> Self {
        Self {
            iterations,
            ..self.clone()
        }
    }
}

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
fn network(vb: VarBuilder<'_>, hidden: usize) -> candle_core::Result<impl Module + Send + Sync> {
    let (l1, l2) = (
        linear(2, hidden, vb.pp("l1"))?,
        linear(hidden, 2, vb.pp("l2"))?,
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
        let like = match vars.data().lock() {
            Ok(data) => data
                .get(name)
                .map(|var| (var.shape().clone(), var.device().clone())),
            Err(_) => None,
        };
        let (shape, device) = like.ok_or_else(|| format!("no variable {name}"))?;
        let values: Vec<f32> = match name.ends_with("bias") {
            true => vec![0.0; shape.elem_count()],
            false => (0..shape.elem_count())
                .map(|_| normal.sample(rng))
                .collect(),
        };
        vars.set_one(name, Tensor::from_vec(values, shape, &device)?)?;
    }
    Ok(())
}

/// Trains on windows of the data; iteration by iteration the same windows for the same seed.
pub(crate) fn train(
    data: &Trajectory,
    dtype: Dtype,
    setting: &Setting,
    seed: u64,
    device: &Device,
    bar: &ProgressBar,
) -> Result<Outcome> {
    let mut rng = generator(seed);
    let (mut vars, recorder) = (VarMap::new(), Recorder::default());
    let options = OdeOptions {
        method: RK4,
        precision: Some(dtype.precision()),
        recorder: Some(recorder.clone()),
        ..Default::default()
    };
    let &Setting {
        hidden,
        windows,
        length,
        learning_rate,
        iterations,
    } = setting;
    let ode = NeuralOde::new(&vars, "ode", device, move |vb| network(vb, hidden))?
        .options(options.clone());
    initialise(&mut vars, &ode, &mut rng)?;
    let adam = ParamsAdamW {
        lr: learning_rate,
        weight_decay: 0.0,
        ..Default::default()
    };
    let mut optimiser = AdamW::new(vars.all_vars(), adam)?;

    let times: Vec<f64> = (0..length).map(|i| i as f64 * data.spacing()).collect();
    let starts = 0..(data.times.points().len() - length) as u32;
    let (mut losses, mut forward, mut backward) = (vec![], vec![], vec![]);
    for i in 0..iterations {
        optimiser.set_learning_rate(
            learning_rate * (4.0 * (1.0 - i as f64 / iterations as f64)).min(1.0),
        );
        let starts: Vec<u32> = (0..windows)
            .map(|_| rng.random_range(starts.clone()))
            .collect();
        let truth = data
            .windows(&starts, length, DType::F32)?
            .to_device(device)?;
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
    let (states, trajectory_error) = learnt_trajectory(data, &ode, device)?;
    Ok(Outcome {
        dtype,
        losses,
        states,
        trajectory_error,
        field_error: field_error(data, &vars, hidden, device)?,
        forward: median(forward),
        backward: median(backward),
        stats,
    })
}

/// The states from the data's start on, and how far they are from the data on average.
fn learnt_trajectory(
    data: &Trajectory,
    ode: &NeuralOde,
    device: &Device,
) -> Result<(Vec<Vec<f64>>, f64)> {
    let start = data.start(DType::F32)?.to_device(device)?;
    let states = ode.solve(&start, &data.times)?;
    let states = states.squeeze(1)?.detach().to_device(&Device::Cpu)?;
    let states = states.to_dtype(DType::F64)?;
    let error = (&states - &data.states)?.abs()?.mean_all()?;
    Ok((states.to_vec2()?, error.to_scalar()?))
}

/// How far f̂, with the weights as the optimiser holds them, is from f on the trajectory.
fn field_error(data: &Trajectory, vars: &VarMap, hidden: usize, device: &Device) -> Result<f64> {
    let vb = VarBuilder::from_varmap(vars, DType::F32, device);
    let states = data.states.to_dtype(DType::F32)?.to_device(device)?;
    let learnt = network(vb.pp("ode"), hidden)?.forward(&states)?;
    let learnt = learnt.detach().to_device(&Device::Cpu)?;
    let truth = data.spiral.velocity(&data.states)?;
    let norm = |x: &Tensor| x.sqr()?.sum(D::Minus1)?.sqrt();
    let error = norm(&(learnt.to_dtype(DType::F64)? - &truth)?)?;
    Ok((error / norm(&truth)?)?.mean_all()?.to_scalar()?)
}
