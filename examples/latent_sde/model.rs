//! The points, the two equations, and one update.

use candle_core::{DType, Device, Module, Tensor};
use candle_diffeq::options::Steps;
use candle_diffeq::sde::{ito, predict, NeuralSde, Noise, SdeOptions};
use candle_diffeq::Time;
use candle_nn::{linear, AdamW, Optimizer, ParamsAdamW, VarBuilder, VarMap};

use common::dtype::Dtype;
use common::random::{generator, normal, uniform};
use common::{values, Result};

/// The prior dY = −RATE Y dt + SPREAD dW in its stationary state.
const RATE: f64 = 1.0;
const SPREAD: f64 = 0.5;
/// Of the Laplace distribution of a point around the path.
const SCALE: f64 = 0.05;
const END: f64 = 2.0;
const STEP: f64 = 0.02;
const LEARNING_RATE: f64 = 1e-2;
const DECAY: f64 = 0.997;

/// Points of cos 2πt in two intervals, with noise.
pub(crate) struct Data {
    pub(crate) times: Vec<f64>,
    pub(crate) values: Vec<f64>,
}

impl Data {
    pub(crate) fn new(seed: u64) -> Self {
        use rand::Rng;
        let mut rng = generator(seed);
        let between = |(a, b): (f64, f64)| (0..10).map(move |i| a + (b - a) * f64::from(i) / 9.0);
        let times: Vec<_> = [(0.3, 0.8), (1.2, 1.5)]
            .into_iter()
            .flat_map(between)
            .collect();
        let mut noisy = |t: &f64| {
            let u: f64 = rng.random_range(-0.5..0.5);
            let laplace = -u.signum() * (1.0 - 2.0 * u.abs()).ln();
            (std::f64::consts::TAU * t).cos() + 0.5 * SCALE * laplace
        };
        Self {
            values: times.iter().map(&mut noisy).collect(),
            times,
        }
    }

    /// The times of a solve: its start, the points, its end.
    fn grid(&self) -> Vec<f64> {
        [&[0.0], self.times.as_slice(), &[END]].concat()
    }
}

/// The parts of the loss.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Losses {
    pub(crate) points: f64,
    pub(crate) start: f64,
    pub(crate) path: f64,
}

impl Losses {
    pub(crate) fn total(&self) -> f64 {
        self.points + self.start + self.path
    }
}

/// A Gaussian at the start, and a drift.
pub(crate) struct Latent {
    vars: VarMap,
    sde: NeuralSde<(Tensor, Tensor)>,
    optimiser: AdamW,
    dtype: DType,
    device: Device,
    seed: u64,
}

fn stationary() -> f64 {
    SPREAD / (2.0 * RATE).sqrt()
}

impl Latent {
    pub(crate) fn new(dtype: Dtype, hidden: usize, seed: u64, device: &Device) -> Result<Self> {
        let vars = VarMap::new();
        let state = dtype.state();
        let sde = NeuralSde::new(&vars, "sde", state, device, move |vb: VarBuilder<'_>| {
            let l1 = linear(3, hidden, vb.pp("l1"))?;
            let l2 = linear(hidden, hidden, vb.pp("l2"))?;
            let l3 = linear(hidden, 1, vb.pp("l3"))?;
            let drift = move |t: &Time, (y, _): &(Tensor, Tensor)| {
                let t = (t.tensor()? * std::f64::consts::PI)?;
                let clock = Tensor::stack(&[t.sin()?, t.cos()?], 0)?.to_dtype(y.dtype())?;
                let clock = clock.reshape((1, 2))?.broadcast_as((y.dim(0)?, 2))?;
                let x = Tensor::cat(&[&clock, y], 1)?;
                let f = l3.forward(&l2.forward(&l1.forward(&x)?.tanh()?)?.tanh()?)?;
                // ½ ((f − h)/g)², the rate of the KL divergence from the prior with drift h.
                let u = ((&f + (y * RATE)?)? / SPREAD)?;
                Ok((f, (u.sqr()? * 0.5)?))
            };
            let diffusion = |_: &Time, (y, _): &(Tensor, Tensor)| y.ones_like()? * SPREAD;
            Ok(ito(drift, diffusion).additive())
        })?
        .options(SdeOptions {
            precision: Some(dtype.precision()),
            steps: Steps::Size(STEP),
            ..Default::default()
        });
        let vb = VarBuilder::from_varmap(&vars, state, device);
        let spread = stationary().ln();
        vb.get_with_hints(1, "start.mean", candle_nn::Init::Const(0.0))?;
        vb.get_with_hints(1, "start.log_spread", candle_nn::Init::Const(spread))?;
        let mut rng = generator(seed + 1);
        for (name, inputs) in [("l1", 3), ("l2", hidden), ("l3", hidden)] {
            for part in ["weight", "bias"] {
                let data = vars.data().lock().map_err(|_| "a thread has failed")?;
                let var = data
                    .get(&format!("sde.{name}.{part}"))
                    .ok_or("no such layer")?;
                // The last layer begins at zero: the posterior at a Brownian motion.
                let size = if name == "l3" {
                    0.0
                } else {
                    (inputs as f64).sqrt().recip()
                };
                let draws = uniform(&mut rng, var.shape(), state, device)?;
                var.set(&((draws - 0.5)? * (2.0 * size))?)?;
            }
        }
        let settings = ParamsAdamW {
            lr: LEARNING_RATE,
            weight_decay: 0.0,
            ..Default::default()
        };
        Ok(Self {
            optimiser: AdamW::new(vars.all_vars(), settings)?,
            vars,
            sde,
            dtype: state,
            device: device.clone(),
            seed,
        })
    }

    fn var(&self, name: &str) -> Result<Tensor> {
        let data = self.vars.data().lock().map_err(|_| "a thread has failed")?;
        Ok(data
            .get(name)
            .ok_or("no such variable")?
            .as_tensor()
            .clone())
    }

    /// Starts of the posterior, and the KL divergence of their distribution from the prior's.
    fn start(&self, rows: usize, seed: u64) -> Result<(Tensor, Tensor)> {
        let (mean, log_spread) = (self.var("start.mean")?, self.var("start.log_spread")?);
        let spread = log_spread.exp()?;
        let draws = normal(&mut generator(seed), (rows, 1), self.dtype, &self.device)?;
        let y0 = draws.broadcast_mul(&spread)?.broadcast_add(&mean)?;
        let s = stationary();
        let square = ((spread.sqr()? + mean.sqr()?)? / (2.0 * s * s))?;
        let kl = ((square - log_spread)? + (s.ln() - 0.5))?;
        Ok((y0, kl.sum_all()?))
    }

    /// One step of the optimiser; the KL divergence counts with a weight.
    pub(crate) fn update(
        &mut self,
        data: &Data,
        batch: usize,
        number: u64,
        weight: f64,
    ) -> Result<Losses> {
        let seed = self.seed << 32 | (number + 1);
        let (y0, start) = self.start(batch, seed)?;
        let cost = Tensor::zeros((batch, 1), self.dtype, &self.device)?;
        let noise = Noise::seeded(seed);
        let (ys, costs) = self.sde.solve(&(y0, cost), &data.grid(), &noise)?;
        let count = data.values.len();
        let target = Tensor::new(data.values.as_slice(), &self.device)?.to_dtype(self.dtype)?;
        let distance = ys
            .narrow(0, 1, count)?
            .broadcast_sub(&target.reshape((count, 1, 1))?)?;
        let points = ((distance.abs()?.sum_all()? / (batch as f64 * SCALE))?
            + (count as f64 * (2.0 * SCALE).ln()))?;
        let path = costs.get(count + 1)?.mean_all()?;
        let loss = (&points + ((&start + &path)? * weight)?)?;
        self.optimiser.backward_step(&loss)?;
        self.optimiser
            .set_learning_rate(LEARNING_RATE * DECAY.powf(number as f64));
        let number = |x: &Tensor| -> Result<f64> { Ok(x.to_dtype(DType::F64)?.to_scalar()?) };
        Ok(Losses {
            points: number(&points)?,
            start: number(&start)?,
            path: number(&path)?,
        })
    }

    /// Samples of the posterior at times.
    fn samples(&self, times: &[f64], rows: usize, seed: u64) -> Result<Vec<Vec<f64>>> {
        let (y0, _) = self.start(rows, seed)?;
        let cost = y0.zeros_like()?;
        let (ys, _) = self.sde.predict(&(y0, cost), times, &Noise::seeded(seed))?;
        by_time(&ys)
    }

    /// Times, bands of the posterior at them, and a few of its samples.
    #[allow(clippy::type_complexity)]
    pub(crate) fn bands(
        &self,
        rows: usize,
        seed: u64,
    ) -> Result<(Vec<f64>, Vec<[f64; 5]>, Vec<Vec<f64>>)> {
        let times: Vec<_> = (0..=100).map(|i| END * f64::from(i) / 100.0).collect();
        let all = self.samples(&times, rows, seed)?;
        let few = (0..5)
            .map(|row| all.iter().map(|at| at[row]).collect())
            .collect();
        Ok((times, all.into_iter().map(quantiles).collect(), few))
    }

    pub(crate) fn prior_bands(
        &self,
        times: &[f64],
        rows: usize,
        seed: u64,
    ) -> Result<Vec<[f64; 5]>> {
        let draws = normal(&mut generator(seed), (rows, 1), self.dtype, &self.device)?;
        let y0 = (draws * stationary())?;
        let prior = ito(
            |_: &Time, y: &Tensor| y * -RATE,
            |_: &Time, y: &Tensor| y.ones_like()? * SPREAD,
        )
        .additive();
        let options = SdeOptions {
            steps: Steps::Size(STEP),
            ..Default::default()
        };
        let ys = predict(&prior, &y0, times, &Noise::seeded(seed + 7), &options)?;
        Ok(by_time(&ys)?.into_iter().map(quantiles).collect())
    }

    /// Root mean square distance of the mean of samples from the points.
    pub(crate) fn distance(&self, data: &Data, rows: usize) -> Result<f64> {
        let all = self.samples(&data.grid(), rows, self.seed + 99)?;
        let points = all[1..].iter().zip(&data.values);
        let squares =
            points.map(|(at, value)| (at.iter().sum::<f64>() / at.len() as f64 - value).powi(2));
        Ok((squares.sum::<f64>() / data.values.len() as f64).sqrt())
    }
}

fn by_time(ys: &Tensor) -> Result<Vec<Vec<f64>>> {
    let rows = ys.dim(1)?;
    Ok(values(ys)?.chunks(rows).map(<[f64]>::to_vec).collect())
}

/// The 5, 25, 50, 75 and 95 % of a sample.
fn quantiles(mut sample: Vec<f64>) -> [f64; 5] {
    sample.sort_by(f64::total_cmp);
    [0.05, 0.25, 0.5, 0.75, 0.95].map(|p| sample[(p * (sample.len() - 1) as f64) as usize])
}
