//! One flow: trained on one density in one precision, and what it has learnt.

use std::f64::consts::TAU;
use std::time::Instant;

use candle_core::{DType, Device, Tensor};
use candle_diffeq::datasets::Density;
use candle_diffeq::distributed::{mean as mean_over, share, total, Group, Replicas};
use candle_diffeq::metrics::{mmd, Recorder, Stats};
use candle_diffeq::nn::HyperCnf;
use candle_diffeq::options::Output;
use candle_diffeq::{NeuralOde, OdeOptions};
use candle_nn::{AdamW, Optimizer, ParamsAdamW, VarMap};
use indicatif::ProgressBar;

use crate::way::Way;
use common::initial::layers;
use common::random::{generator, normal};
use common::{median, Result};

/// Sizes of a run.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Setting {
    pub(crate) iterations: usize,
    /// Fresh points an iteration.
    pub(crate) batch: usize,
    /// Steps of RK4 between noise and data.
    pub(crate) steps: usize,
    pub(crate) width: usize,
    /// Points that the likelihood is judged by, and for each sample of the discrepancy.
    pub(crate) points: usize,
    pub(crate) sample: usize,
}

impl Setting {
    pub(crate) const SMOKE: Self = Self {
        iterations: 3,
        batch: 32,
        steps: 4,
        width: 8,
        points: 64,
        sample: 64,
    };
    pub(crate) const SMALL: Self = Self {
        iterations: 1000,
        batch: 256,
        steps: 16,
        width: 64,
        points: 4096,
        sample: 1024,
    };
    pub(crate) const PUBLISHED: Self = Self {
        iterations: 2000,
        batch: 1024,
        steps: 127,
        width: 128,
        points: 1024,
        sample: 1024,
    };
}

/// Hidden units of the network of time.
const HIDDEN: usize = 32;
const LEARNING_RATE: f64 = 1e-2;
/// σ of the discrepancy's kernel, exp(−‖x − y‖²).
const BANDWIDTH: f64 = std::f64::consts::FRAC_1_SQRT_2;
/// Seeds of what flows are judged by; training's are below.
const JUDGED: u64 = 1 << 40;

/// A flow from noise at time 0 to data at time 1.
pub(crate) struct Flow {
    ode: NeuralOde<(Tensor, Tensor)>,
    pub(crate) device: Device,
}

impl Flow {
    fn new(vars: &VarMap, setting: &Setting, options: OdeOptions, device: &Device) -> Result<Self> {
        let width = setting.width;
        let field = move |vb: candle_nn::VarBuilder<'_>| HyperCnf::new(2, width, HIDDEN, vb);
        let ode = NeuralOde::from_field(vars, "flow", DType::F32, device, field)?;
        Ok(Self {
            ode: ode.options(options),
            device: device.clone(),
        })
    }

    /// Moves points, (n, 2), between two times: where they get, and the log-density gained, (n, 1).
    fn transport(&self, x: &Tensor, from: f64, to: f64) -> candle_diffeq::Result<(Tensor, Tensor)> {
        let zeros = Tensor::zeros((x.dim(0)?, 1), DType::F32, &self.device)?;
        self.ode.solve(&(x.clone(), zeros), &[from, to])
    }

    /// log p of points at a time, (n, 1).
    pub(crate) fn log_density(&self, x: &Tensor, time: f64) -> candle_diffeq::Result<Tensor> {
        if time == 0.0 {
            return Ok(log_normal(x)?);
        }
        let (z, gained) = self.transport(x, time, 0.0)?;
        Ok((log_normal(&z)? - gained)?)
    }
}

/// Of the standard normal distribution in the plane, (n, 1).
fn log_normal(z: &Tensor) -> candle_core::Result<Tensor> {
    (z.sqr()?.sum_keepdim(1)? * -0.5)? - TAU.ln()
}

/// What a run came to.
pub(crate) struct Outcome {
    pub(crate) density: Density,
    pub(crate) way: Way,
    /// Negative log-likelihood of every iteration's batch.
    pub(crate) losses: Vec<f64>,
    /// Evaluations forward of every iteration.
    pub(crate) evaluations: Vec<f64>,
    /// Of fresh points, computed in f32.
    pub(crate) nll: f64,
    /// Of samples to data, and of data sent to noise to noise.
    pub(crate) mmd: f64,
    pub(crate) mmd_noise: f64,
    /// Median milliseconds of an iteration, with one thread.
    pub(crate) forward: f64,
    pub(crate) backward: f64,
    pub(crate) stats: Stats,
    /// Drawn from the flow, (n, 2).
    pub(crate) samples: Tensor,
    pub(crate) flow: Flow,
}

/// Trains on fresh points, the same ones in every precision, and whatever the number of processes that share them.
pub(crate) fn train(
    group: &dyn Group,
    density: Density,
    way: &Way,
    setting: &Setting,
    seed: u64,
    device: &Device,
    bar: &ProgressBar,
) -> Result<Outcome> {
    let (vars, recorder) = (VarMap::new(), Recorder::default());
    let options = OdeOptions {
        output: Output::Final,
        recorder: Some(recorder.clone()),
        ..way.options(setting.steps)
    };
    let judged = OdeOptions {
        output: options.output,
        ..way.judged(setting.steps)
    };
    let flow = Flow::new(&vars, setting, options, device)?;
    layers(&vars, &mut generator(seed))?;
    let parameters = ParamsAdamW {
        lr: LEARNING_RATE,
        weight_decay: 0.0,
        ..Default::default()
    };
    let replicas = Replicas::new(group, &vars)?;
    let mut optimiser = AdamW::new(replicas.variables(), parameters)?;
    let mine = share(group, setting.batch);
    let (mut losses, mut forward, mut backward) = (vec![], vec![], vec![]);
    let mut evaluations = vec![];
    for i in 0..setting.iterations {
        // A tenth of it for the second half.
        if i == setting.iterations / 2 {
            optimiser.set_learning_rate(0.1 * LEARNING_RATE);
        }
        let x = density.sample(setting.batch, (seed << 20).wrapping_add(i as u64), device)?;
        let x = x.narrow(0, mine.start, mine.len())?;
        let before = recorder.stats().evaluations;
        let clock = Instant::now();
        let loss = match mine.len() {
            0 => Tensor::new(0f32, device)?,
            _ => flow.log_density(&x, 1.0)?.mean_all()?.neg()?,
        };
        let value = f64::from(loss.to_scalar::<f32>()?);
        forward.push(1e3 * clock.elapsed().as_secs_f64());
        let clock = Instant::now();
        replicas.backward_step(&loss, mine.len(), &mut optimiser)?;
        device.synchronize()?;
        losses.push(mean_over(group, value, mine.len())?);
        backward.push(1e3 * clock.elapsed().as_secs_f64());
        evaluations.push((recorder.stats().evaluations - before) as f64);
        bar.inc(1);
    }
    let stats = total(group, &recorder.stats())?;
    let flow = Flow::new(&vars, setting, judged, device)?;
    judge(
        Outcome {
            density,
            way: way.clone(),
            losses,
            evaluations,
            nll: f64::NAN,
            mmd: f64::NAN,
            mmd_noise: f64::NAN,
            forward: median(forward),
            backward: median(backward),
            stats,
            samples: Tensor::zeros((1, 2), DType::F32, device)?,
            flow,
        },
        setting,
        seed,
    )
}

/// Fills in what the flow has learnt, all of it computed in f32.
fn judge(mut outcome: Outcome, setting: &Setting, seed: u64) -> Result<Outcome> {
    let (flow, device) = (&outcome.flow, &outcome.flow.device);
    let seed = JUDGED.wrapping_add(seed);
    let x = outcome.density.sample(setting.points, seed, device)?;
    let mean = flow.log_density(&x, 1.0)?.mean_all()?;
    let data = outcome.density.sample(setting.sample, seed + 1, device)?;
    let noise = normal(
        &mut generator(seed),
        (setting.sample, 2),
        DType::F32,
        device,
    )?;
    let (samples, _) = flow.transport(&noise, 0.0, 1.0)?;
    let (sent, _) = flow.transport(&data, 1.0, 0.0)?;
    outcome.nll = -f64::from(mean.to_scalar::<f32>()?);
    outcome.mmd = mmd(&samples, &data, BANDWIDTH)?;
    outcome.mmd_noise = mmd(&sent, &noise, BANDWIDTH)?;
    outcome.samples = samples.detach();
    Ok(outcome)
}
