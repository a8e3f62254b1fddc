//! Spirals that turn to the left or to the right, seen at some times and in some coordinates only.

use std::f64::consts::PI;

use candle_core::{DType, Device, Tensor};
use candle_diffeq::cde::{ControlPath, Observations};
use rand::rngs::StdRng;
use rand::Rng;
use rand_distr::StandardNormal;

use common::path_classifier::Labelled;
use common::Result;

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

/// Times from 0 to 4π, each moved from a regular one by up to two fifths of the distance to the next.  Nearer ones would
/// make a slope of their noise, which backward differences hand on to the next interval.
pub(crate) fn times(rng: &mut StdRng) -> Vec<f64> {
    let last = (LENGTH - 1) as f64;
    let mut at = |i: usize| match i {
        0 => 0.0,
        i if i + 1 == LENGTH => last,
        i => i as f64 + rng.random_range(-0.4..0.4),
    };
    (0..LENGTH).map(|i| 4.0 * PI * at(i) / last).collect()
}
