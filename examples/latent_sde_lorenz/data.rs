//! Noisy observations of a stochastic Lorenz attractor.

use candle_core::{DType, Device, Tensor};
use candle_diffeq::options::Steps;
use candle_diffeq::sde::{ito, predict, Noise, SdeOptions};
use candle_diffeq::Time;

use common::random::{generator, normal};
use common::Result;

/// Coordinates of an observation.
pub(crate) const COORDINATES: usize = 3;
/// Deviation of the observations, in units of the data's own.
const OBSERVED: f64 = 0.01;
const END: f64 = 2.0;

/// Series at common times.
pub(crate) struct Data {
    pub(crate) times: Vec<f64>,
    /// `(times, series, COORDINATES)`, of mean 0 and deviation 1 by coordinate.
    pub(crate) values: Tensor,
}

impl Data {
    /// dX = Lorenz(10, 28, 8/3) dt + diag(0.1, 0.28, 0.3) X dW from X₀ ~ N(0, 1), on [0, 2].
    pub(crate) fn new(series: usize, length: usize, seed: u64) -> Result<Self> {
        let drift = |_: &Time, x: &Tensor| {
            let [a, b, c] = [0, 1, 2].map(|i| x.narrow(1, i, 1));
            let (a, b, c) = (a?, b?, c?);
            let first = ((&b - &a)? * 10.0)?;
            let second = ((&a * (28.0 - &c)?)? - &b)?;
            let third = ((&a * &b)? - (&c * (8.0 / 3.0))?)?;
            Tensor::cat(&[&first, &second, &third], 1)
        };
        let sizes = Tensor::new(&[[0.1f64, 0.28, 0.3]], &Device::Cpu)?;
        let sde = ito(drift, move |_: &Time, x: &Tensor| x.broadcast_mul(&sizes));
        let mut rng = generator(seed);
        let start = normal(&mut rng, (series, COORDINATES), DType::F64, &Device::Cpu)?;
        let last = (length - 1) as f64;
        let times: Vec<f64> = (0..length).map(|i| END * i as f64 / last).collect();
        let options = SdeOptions {
            steps: Steps::Size(0.005),
            ..Default::default()
        };
        let noise = Noise::seeded(seed);
        let xs = predict(&sde, &start, times.as_slice(), &noise, &options)?;
        let flat = xs.reshape((length * series, COORDINATES))?;
        let mean = flat.mean_keepdim(0)?;
        let deviation = flat.var_keepdim(0)?.sqrt()?;
        let xs = xs.broadcast_sub(&mean)?.broadcast_div(&deviation)?;
        let errors = normal(&mut rng, xs.shape(), DType::F64, &Device::Cpu)?;
        Ok(Self {
            times,
            values: (xs + (errors * OBSERVED)?)?,
        })
    }

    /// Some of the series.
    pub(crate) fn batch(&self, chosen: &[u32], dtype: DType, device: &Device) -> Result<Tensor> {
        let index = Tensor::new(chosen, &Device::Cpu)?;
        let values = self.values.index_select(&index, 1)?;
        Ok(values.to_dtype(dtype)?.to_device(device)?)
    }
}
