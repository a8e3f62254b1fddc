//! A continuous flow from eight Gaussians in a ring to noise.

use std::f64::consts::{SQRT_2, TAU};
use std::time::Instant;

use candle_core::{DType, Device, Tensor};
use candle_diffeq::metrics::Recorder;
use candle_diffeq::nn::{Activation, Cnf, Mlp};
use candle_diffeq::NeuralOde;
use candle_nn::{AdamW, Optimizer, ParamsAdamW, VarMap};
use rand::rngs::StdRng;
use rand::Rng;
use rand_distr::StandardNormal;

use crate::way::{Cost, Pair, Way};
use common::random::generator;
use common::{initial, median, Result};

const BATCH: usize = 512;
const TOLERANCE: Pair = Pair(1e-5, 1e-5);

/// What a training came to.
pub(crate) struct Flowed {
    pub(crate) way: Way,
    pub(crate) forward: Vec<f64>,
    pub(crate) backward: Vec<f64>,
    /// Negative log-likelihood of 4096 fresh points, nats.
    pub(crate) nll: f64,
    pub(crate) milliseconds: f64,
}

/// Trains on fresh points, the same ones for the same seed.
pub(crate) fn train(way: Way, updates: usize, seed: u64, device: &Device) -> Result<Flowed> {
    let (vars, recorder) = (VarMap::new(), Recorder::default());
    let flow = NeuralOde::from_field(&vars, "flow", DType::F32, device, |vb| {
        Cnf::new(Mlp::with_time(&[2, 64, 64, 2], Activation::Tanh, vb)?)
    })?
    .options(way.options(TOLERANCE, &recorder));
    let mut rng = generator(seed);
    initial::layers(&vars, &mut rng)?;
    let adam = ParamsAdamW {
        lr: 3e-3,
        weight_decay: 0.0,
        ..Default::default()
    };
    let mut optimiser = AdamW::new(vars.all_vars(), adam)?;
    let nll = |x: &Tensor| -> Result<Tensor> {
        let zeros = Tensor::zeros((x.dim(0)?, 1), DType::F32, device)?;
        let (z, gained) = flow.solve(&(x.clone(), zeros), &[1.0, 0.0])?;
        // The state is solved from the data to noise: what is gained on the way is minus the log-density's change.
        let noise = ((z.sqr()?.sum_keepdim(1)? * 0.5)? + TAU.ln())?;
        Ok((noise + gained)?.mean_all()?)
    };
    let (mut forward, mut backward, mut milliseconds) = (vec![], vec![], vec![]);
    for _ in 0..updates {
        let x = points(&mut rng, BATCH, device)?;
        recorder.take();
        let clock = Instant::now();
        optimiser.backward_step(&nll(&x)?)?;
        let took = 1e3 * clock.elapsed().as_secs_f64();
        let cost = Cost::new(way, recorder.take(), took);
        forward.push(cost.forward as f64);
        backward.push(cost.backward as f64);
        milliseconds.push(took);
    }
    let test = points(&mut generator(1 << 40), 4096, device)?;
    Ok(Flowed {
        way,
        forward,
        backward,
        nll: f64::from(nll(&test)?.to_scalar::<f32>()?),
        milliseconds: median(milliseconds),
    })
}

/// Points of eight Gaussians, (n, 2).
fn points(rng: &mut StdRng, n: usize, device: &Device) -> Result<Tensor> {
    let mut numbers = Vec::with_capacity(2 * n);
    for _ in 0..n {
        let angle = f64::from(rng.random_range(0u32..8)) * TAU / 8.0;
        for centre in [angle.cos(), angle.sin()] {
            let noise: f64 = rng.sample(StandardNormal);
            numbers.push(((4.0 * centre + 0.5 * noise) / SQRT_2) as f32);
        }
    }
    Ok(Tensor::from_vec(numbers, (n, 2), device)?)
}
