//! One flow: trained on one problem in one precision, and what it has learnt.

use std::f64::consts::TAU;
use std::time::Instant;

use candle_core::{DType, Device, Tensor, D};
use candle_diffeq::metrics::{mmd, Recorder, Stats};
use candle_diffeq::nn::OtFlow;
use candle_diffeq::options::{Output, Steps};
use candle_diffeq::{NeuralOde, OdeOptions};
use candle_nn::{AdamW, Optimizer, ParamsAdamW, VarMap};
use indicatif::ProgressBar;
use rand::rngs::StdRng;

use crate::problem::Problem;
use common::initial::{layers, uniform};
use common::mode::Mode;
use common::random::{generator, normal};
use common::{mean, median, values, Result};

/// Seeds of what flows are judged by; training's are below.
const JUDGED: u64 = 1 << 40;

/// Means over a batch: −log p, L and R.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Costs {
    pub(crate) nll: f64,
    pub(crate) transport: f64,
    pub(crate) residual: f64,
}

impl Costs {
    /// The loss, as published: α_L L + α_C C + α_R R.
    pub(crate) fn loss(&self, problem: &Problem) -> f64 {
        let w = &problem.weights;
        w.transport * self.transport + w.likelihood * self.nll + w.residual * self.residual
    }
}

/// A flow from data at time 0 to noise at time 1.
pub(crate) struct Flow {
    ode: NeuralOde<(Tensor, Tensor)>,
    device: Device,
}

impl Flow {
    fn new(vars: &VarMap, problem: &Problem, options: OdeOptions, device: &Device) -> Result<Self> {
        let (features, width, rank) = (problem.features(), problem.width, problem.rank);
        let field = move |vb: candle_nn::VarBuilder<'_>| OtFlow::new(features, width, rank, vb);
        let ode = NeuralOde::from_field(vars, "phi", DType::F32, device, field)?;
        Ok(Self {
            ode: ode.options(options),
            device: device.clone(),
        })
    }

    /// Moves points, (n, features), along these times: where they are at the last, and the costs
    /// l, L, R, (n, 3).
    fn transport(&self, x: &Tensor, times: [f64; 2]) -> candle_diffeq::Result<(Tensor, Tensor)> {
        let zeros = Tensor::zeros((x.dim(0)?, 3), DType::F32, &self.device)?;
        self.ode.solve(&(x.clone(), zeros), &times)
    }

    /// Where points, (n, features), get from one time to another.
    pub(crate) fn moved(&self, x: &Tensor, times: [f64; 2]) -> candle_diffeq::Result<Tensor> {
        Ok(self.transport(x, times)?.0.detach())
    }

    /// −log p of data, L and R, row by row, (n, 1) each.
    pub(crate) fn costs(&self, x: &Tensor) -> candle_diffeq::Result<[Tensor; 3]> {
        let (z, costs) = self.transport(x, [0.0, 1.0])?;
        let of = |i| costs.narrow(1, i, 1);
        let log_normal =
            ((z.sqr()?.sum_keepdim(D::Minus1)? * -0.5)? - 0.5 * x.dim(1)? as f64 * TAU.ln())?;
        Ok([(of(0)? - log_normal)?, of(1)?, of(2)?])
    }
}

fn means(costs: &[Tensor; 3]) -> Result<Costs> {
    let mean = |x: &Tensor| Ok::<_, candle_core::Error>(mean(&values(x)?));
    let [nll, transport, residual] = costs;
    Ok(Costs {
        nll: mean(nll)?,
        transport: mean(transport)?,
        residual: mean(residual)?,
    })
}

/// What a run came to.
pub(crate) struct Outcome {
    pub(crate) problem: Problem,
    pub(crate) mode: Mode,
    /// Of every iteration's batch.
    pub(crate) history: Vec<Costs>,
    /// Of fresh points, computed in f32.
    pub(crate) costs: Costs,
    /// Of samples to data, and of data sent to noise to noise.
    pub(crate) mmd: f64,
    pub(crate) mmd_noise: f64,
    /// Mean distance of x from where it gets to noise and back, relative to the mean ‖x‖, in f32
    /// and in the precision of the run.
    pub(crate) inverse: [f64; 2],
    /// Median milliseconds of an iteration, with one thread.
    pub(crate) forward: f64,
    pub(crate) backward: f64,
    pub(crate) stats: Stats,
    /// Drawn from the flow, (n, features).
    pub(crate) samples: Tensor,
    pub(crate) flow: Flow,
}

/// Variables as published: layers and A by the usual uniform rules, w ones, c zeros.
fn initialise(rng: &mut StdRng, vars: &VarMap) -> Result<()> {
    layers(vars, rng)?;
    let data = vars.data().lock();
    let data = data.map_err(|_| "the variables are poisoned")?;
    if let Some(a) = data.get("phi.A") {
        let bound = (6.0 / (a.dim(0)? + a.dim(1)?) as f64).sqrt();
        uniform(a, rng, bound)?;
    }
    Ok(())
}

/// Trains on the same points in every precision.
pub(crate) fn train(
    problem: Problem,
    mode: Mode,
    seed: u64,
    device: &Device,
    bar: &ProgressBar,
) -> Result<Outcome> {
    let (vars, recorder) = (VarMap::new(), Recorder::default());
    let options = |steps| OdeOptions {
        steps: Steps::PerInterval(steps),
        output: Output::Final,
        ..mode.options()
    };
    let training = OdeOptions {
        recorder: Some(recorder.clone()),
        ..options(problem.steps)
    };
    let flow = Flow::new(&vars, &problem, training, device)?;
    initialise(&mut generator(seed), &vars)?;
    let parameters = ParamsAdamW {
        lr: problem.learning_rate,
        weight_decay: 0.0,
        ..Default::default()
    };
    let mut optimiser = AdamW::new(vars.all_vars(), parameters)?;
    let (mut history, mut forward, mut backward) = (vec![], vec![], vec![]);
    let mut x = problem.sample(problem.batch, seed << 20, device)?;
    for i in 0..problem.iterations {
        let halvings = i * (problem.halvings + 1) / problem.iterations;
        optimiser.set_learning_rate(problem.learning_rate * 0.5f64.powi(halvings as i32));
        if i > 0 && i % problem.reuse == 0 {
            x = problem.sample(problem.batch, (seed << 20).wrapping_add(i as u64), device)?;
        }
        let clock = Instant::now();
        let costs = flow.costs(&x)?;
        history.push(means(&costs)?);
        forward.push(1e3 * clock.elapsed().as_secs_f64());
        let clock = Instant::now();
        let [nll, transport, residual] = costs;
        let w = &problem.weights;
        let loss = ((nll * w.likelihood)? + (transport * w.transport)?)?;
        let loss = (loss + (residual * w.residual)?)?.mean_all()?;
        optimiser.backward_step(&loss)?;
        device.synchronize()?;
        backward.push(1e3 * clock.elapsed().as_secs_f64());
        bar.inc(1);
    }
    let stats = recorder.stats();
    let own = Flow::new(&vars, &problem, options(problem.judged_steps), device)?;
    let single = OdeOptions {
        steps: Steps::PerInterval(problem.judged_steps),
        output: Output::Final,
        ..Default::default()
    };
    let flow = Flow::new(&vars, &problem, single, device)?;
    let judged = judge(&problem, &flow, &own, JUDGED.wrapping_add(seed))?;
    Ok(Outcome {
        problem,
        mode,
        history,
        costs: judged.costs,
        mmd: judged.mmd,
        mmd_noise: judged.mmd_noise,
        inverse: judged.inverse,
        forward: median(forward),
        backward: median(backward),
        stats,
        samples: judged.samples,
        flow,
    })
}

/// What a flow has learnt.
struct Judged {
    costs: Costs,
    mmd: f64,
    mmd_noise: f64,
    inverse: [f64; 2],
    samples: Tensor,
}

/// All of it in f32, but for the second inverse.
fn judge(problem: &Problem, flow: &Flow, own: &Flow, seed: u64) -> Result<Judged> {
    let device = &flow.device;
    let costs = flow.costs(&problem.sample(problem.points, seed, device)?)?;
    let data = problem.sample(problem.sample, seed + 1, device)?;
    let shape = (problem.sample, problem.features());
    let noise = normal(&mut generator(seed), shape, DType::F32, device)?;
    let samples = flow.moved(&noise, [1.0, 0.0])?;
    let sent = flow.moved(&data, [0.0, 1.0])?;
    // exp(−‖x − y‖²) in the plane, as published, and as wide in relation in more dimensions.
    let bandwidth = 0.5 * (problem.features() as f64).sqrt();
    let inverse = |flow: &Flow| -> Result<f64> {
        let there = flow.moved(&data, [0.0, 1.0])?;
        let back = flow.moved(&there, [1.0, 0.0])?;
        let norms = |x: &Tensor| values(&x.sqr()?.sum(1)?.sqrt()?);
        Ok(mean(&norms(&(back - &data)?)?) / mean(&norms(&data)?))
    };
    Ok(Judged {
        costs: means(&costs)?,
        mmd: mmd(&samples, &data, bandwidth)?,
        mmd_noise: mmd(&sent, &noise, bandwidth)?,
        inverse: [inverse(flow)?, inverse(own)?],
        samples,
    })
}
