//! The latent model: one update, and what it makes of series and of nothing.

use candle_core::{DType, Device, Module, Tensor};
use candle_diffeq::sde::{NeuralSde, Noise, SdeOptions};
use candle_nn::{linear, AdamW, Linear, Optimizer, ParamsAdamW, VarBuilder, VarMap};

use crate::data::{Data, COORDINATES};
use crate::networks::{posterior, prior, Encoder, Posterior, LATENT};
use common::dtype::Dtype;
use common::random::{generator, normal};
use common::{initial, values, Result};

/// Deviation of an observation around the decoded path.
const SCALE: f64 = 0.1;
const RATE: f64 = 5e-3;
const DECAY: f64 = 0.995;

/// The parts of the loss, by series.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Losses {
    pub(crate) points: f64,
    pub(crate) start: f64,
    pub(crate) path: f64,
}

/// Encoder, the two equations, decoder.
pub(crate) struct Latent {
    encoder: Encoder,
    posterior: Posterior,
    prior: NeuralSde,
    decoder: Linear,
    /// Mean and log-deviation of z(t_0) under the prior.
    start: [Tensor; 2],
    optimiser: AdamW,
    dtype: DType,
    device: Device,
}

impl Latent {
    pub(crate) fn new(dtype: Dtype, hidden: usize, seed: u64, device: &Device) -> Result<Self> {
        let (vars, state) = (VarMap::new(), dtype.state());
        let options = SdeOptions {
            precision: Some(dtype.precision()),
            ..Default::default()
        };
        let build = move |vb: VarBuilder<'_>| posterior(hidden, &vb);
        let posterior = NeuralSde::new(&vars, "sde", state, device, build)?;
        let build = move |vb: VarBuilder<'_>| prior(hidden, &vb);
        let prior = NeuralSde::new(&vars, "sde", state, device, build)?;
        let vb = VarBuilder::from_varmap(&vars, state, device);
        let encoder = Encoder::new(hidden, &vb.pp("encoder"))?;
        let decoder = linear(LATENT, COORDINATES, vb.pp("decoder"))?;
        let start = [
            vb.get(LATENT, "start.mean")?,
            vb.get(LATENT, "start.log_spread")?,
        ];
        initial::normal(&vars, &mut generator(seed + 1), |name, shape| {
            let weight = shape.rank() == 2 && !name.ends_with("offset");
            Some(match weight {
                // The weights of the diffusion are one for each coordinate.
                true if name.contains("spread") => 0.5,
                true => (1.0 / initial::fans(shape).0).sqrt(),
                false => 0.0,
            })
        })?;
        let settings = ParamsAdamW {
            lr: RATE,
            weight_decay: 0.0,
            ..Default::default()
        };
        Ok(Self {
            optimiser: AdamW::new(vars.all_vars(), settings)?,
            encoder,
            posterior: posterior.options(options.clone()),
            prior: prior.options(options),
            decoder,
            start,
            dtype: state,
            device: device.clone(),
        })
    }

    /// Decoded paths `(times, rows, COORDINATES)` given observations, and the KL divergences of start and path by row.
    fn given(&self, xs: &Tensor, times: &[f64], seed: u64) -> Result<(Tensor, Tensor, Tensor)> {
        let (contexts, [mean, log_spread]) = self.encoder.forward(xs)?;
        let draws = normal(&mut generator(seed), mean.shape(), self.dtype, &self.device)?;
        let z0 = (&mean + (draws * log_spread.exp()?)?)?;
        let [own, own_log] = &self.start;
        // KL of two Gaussians.
        let distance = mean.broadcast_sub(own)?.sqr()?;
        let squares = (((&log_spread * 2.0)?.exp()? + distance)? * 0.5)?;
        let squares = squares.broadcast_div(&(own_log * 2.0)?.exp()?)?;
        let start = (squares - log_spread)?.broadcast_add(own_log)?;
        let start = (start - 0.5)?.sum_keepdim(1)?;
        let cost = Tensor::zeros((xs.dim(1)?, 1), self.dtype, &self.device)?;
        let noise = Noise::seeded(seed);
        let (zs, _, costs) = self.posterior.solve(&(z0, contexts, cost), times, &noise)?;
        let path = costs.get(times.len() - 1)?;
        Ok((self.decoder.forward(&zs)?, start, path))
    }

    /// One step of the optimiser; the KL divergences count with a weight.
    pub(crate) fn update(
        &mut self,
        data: &Data,
        chosen: &[u32],
        number: usize,
        (seed, weight): (u64, f64),
    ) -> Result<Losses> {
        let xs = data.batch(chosen, self.dtype, &self.device)?;
        let (decoded, start, path) = self.given(&xs, &data.times, seed)?;
        let rows = chosen.len() as f64;
        let squares = ((decoded - &xs)?.sqr()?.sum_all()? / (2.0 * SCALE * SCALE * rows))?;
        let of_one = (SCALE * std::f64::consts::TAU.sqrt()).ln();
        let points = (squares + of_one * xs.elem_count() as f64 / rows)?;
        let (start, path) = (start.mean_all()?, path.mean_all()?);
        let loss = (&points + ((&start + &path)? * weight)?)?;
        self.optimiser
            .set_learning_rate(RATE * DECAY.powf(number as f64));
        self.optimiser.backward_step(&loss)?;
        let number = |x: &Tensor| -> Result<f64> { Ok(x.to_dtype(DType::F64)?.to_scalar()?) };
        Ok(Losses {
            points: number(&points)?,
            start: number(&start)?,
            path: number(&path)?,
        })
    }

    /// Decoded samples given one series, by sample, time and coordinate.
    pub(crate) fn samples(
        &self,
        data: &Data,
        series: usize,
        count: usize,
        seed: u64,
    ) -> Result<Paths> {
        let xs = data.batch(&vec![series as u32; count], self.dtype, &self.device)?;
        let (decoded, ..) = self.given(&xs, &data.times, seed)?;
        by_row(&decoded.detach())
    }

    /// Decoded samples of the prior.
    pub(crate) fn dreams(&self, times: &[f64], count: usize, seed: u64) -> Result<Paths> {
        let [mean, log_spread] = &self.start;
        let shape = (count, LATENT);
        let draws = normal(&mut generator(seed), shape, self.dtype, &self.device)?;
        let z0 = draws
            .broadcast_mul(&log_spread.exp()?)?
            .broadcast_add(mean)?;
        let zs = self
            .prior
            .predict(&z0.detach(), times, &Noise::seeded(seed))?;
        by_row(&self.decoder.forward(&zs)?.detach())
    }
}

/// Coordinates by row and time.
pub(crate) type Paths = Vec<Vec<Vec<f64>>>;

/// Of `(times, rows, coordinates)`.
pub(crate) fn by_row(xs: &Tensor) -> Result<Paths> {
    let (times, rows, d) = xs.dims3()?;
    let all = values(xs)?;
    let at = |time: usize, row: usize| {
        let from = (time * rows + row) * d;
        all[from..from + d].to_vec()
    };
    let path = |row: usize| (0..times).map(|time| at(time, row)).collect();
    Ok((0..rows).map(path).collect())
}
