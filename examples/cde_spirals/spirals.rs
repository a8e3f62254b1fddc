//! Spirals that turn to the left or to the right, seen at some times and in some coordinates only.

use std::f64::consts::PI;

use candle_core::{DType, Device, Tensor};
use candle_diffeq::path::{ControlPath, Observations};
use rand::rngs::StdRng;
use rand::Rng;
use rand_distr::StandardNormal;

use crate::common::path_classifier::Labelled;
use crate::common::Result;

/// Times of observation, irregular in [0, 4π].
pub(crate) const LENGTH: usize = 100;
/// Time, and two coordinates.
pub(crate) const CHANNELS: usize = 3;
const NOISE: f64 = 0.01;

/// Series of (x, y) = (±cos, sin)(a + t)/(1 + t/2) with a random a, half of each sign, with noise, at common times; a
/// share of the coordinates is missing, which is NaN.  Class 1 turns to the left.
pub(crate) fn spirals(
    series: usize,
    times: &[f64],
    missing: f64,
    rng: &mut StdRng,
) -> Result<Labelled> {
    let (mut seen, mut labels) = (vec![], vec![]);
    for i in 0..series {
        let left = i % 2 == 0;
        let start = 2.0 * PI * rng.random::<f64>();
        for t in times {
            let size = 1.0 / (1.0 + t / 2.0);
            let x = size * (start + t).cos() * if left { 1.0 } else { -1.0 };
            for x in [x, size * (start + t).sin()] {
                let noise: f64 = rng.sample(StandardNormal);
                let gone = rng.random::<f64>() < missing;
                seen.push(if gone { f64::NAN } else { x + NOISE * noise });
            }
        }
        labels.push(if left { 1.0 } else { 0.0 });
    }
    let shape = (series, times.len(), CHANNELS - 1);
    Ok(Labelled {
        values: Tensor::from_vec(seen, shape, &Device::Cpu)?.to_dtype(DType::F32)?,
        labels,
    })
}

/// Hermite paths through what was seen, with time as a channel.
pub(crate) fn paths(times: &[f64], seen: &Tensor) -> Result<ControlPath> {
    Ok(Observations::at(times, seen)?.with_time()?.hermite()?)
}

/// Times in [0, 4π], drawn at random, from the first to the last.
pub(crate) fn times(rng: &mut StdRng) -> Vec<f64> {
    let end = 4.0 * PI;
    let mut inner: Vec<f64> = (0..LENGTH - 2).map(|_| end * rng.random::<f64>()).collect();
    inner.extend([0.0, end]);
    inner.sort_by(f64::total_cmp);
    // No two of them at once.
    inner.dedup_by(|a, b| *a - *b < 1e-6);
    inner
}
