//! Two kinds of random paths in the plane that differ in nothing but the sense in which they turn.

use candle_core::{DType, Device, Tensor};
use candle_diffeq::cde::{ControlPath, Observations};
use candle_diffeq::options::Steps;
use candle_diffeq::sde::{ito, predict, Noise, SdeOptions};
use candle_diffeq::Time;
use rand::rngs::StdRng;

use common::path_classifier::Labelled;
use common::random::normal;
use common::Result;

/// Points of a series.
pub(crate) const LENGTH: usize = 513;
/// Time from the first to the last.
const END: f64 = 16.0;
/// Radians in a unit of time.
const TURN: f64 = 2.0;

/// What is seen of a window of points.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Depth {
    /// Where it begins and ends.
    One,
    /// And the area between the path and its chord: the log-signature of depth two.
    Two,
}

impl Depth {
    pub(crate) fn number(self) -> usize {
        match self {
            Self::One => 1,
            Self::Two => 2,
        }
    }

    /// Of a path with time and two coordinates.
    pub(crate) fn channels(self) -> usize {
        match self {
            Self::One => 3,
            Self::Two => 6,
        }
    }
}

/// Stationary solutions of dX = (−X ± TURN J X) dt + dW, J a quarter of a turn; class 1 turns to the left.
pub(crate) fn series(count: usize, rng: &mut StdRng, seed: u64) -> Result<Labelled> {
    let labels: Vec<f32> = (0..count).map(|i| (i % 2) as f32).collect();
    let signs: Vec<f64> = labels
        .iter()
        .map(|l| TURN * f64::from(2.0 * l - 1.0))
        .collect();
    let signs = Tensor::from_vec(signs, (count, 1), &Device::Cpu)?;
    let drift = move |_: &Time, x: &Tensor| {
        let (a, b) = (x.narrow(1, 0, 1)?, x.narrow(1, 1, 1)?);
        let turned = Tensor::cat(&[&b.neg()?, &a], 1)?;
        turned.broadcast_mul(&signs)? - x
    };
    let sde = ito(drift, |_: &Time, x: &Tensor| x.ones_like()).additive();
    // The stationary deviation is √½.
    let start = (normal(rng, (count, 2), DType::F64, &Device::Cpu)? * 0.5f64.sqrt())?;
    let step = END / (LENGTH - 1) as f64;
    let times: Vec<f64> = (0..LENGTH).map(|i| i as f64 * step).collect();
    let options = SdeOptions {
        steps: Steps::PerInterval(1),
        ..Default::default()
    };
    let states = predict(
        &sde,
        &start,
        times.as_slice(),
        &Noise::seeded(seed),
        &options,
    )?;
    let values = states.transpose(0, 1)?.contiguous()?;
    Ok(Labelled {
        values: values.to_dtype(DType::F32)?,
        labels,
    })
}

/// Paths whose intervals are windows of so many points, over times from 0 to 1.
pub(crate) fn paths(values: &Tensor, window: usize, depth: Depth) -> Result<ControlPath> {
    let time = |i: usize| i as f64 / (LENGTH - 1) as f64;
    Ok(match depth {
        Depth::Two => {
            let times: Vec<f64> = (0..LENGTH).map(time).collect();
            let seen = Observations::at(times.as_slice(), values)?.with_time()?;
            seen.log_signature(window)?
        }
        Depth::One => {
            let ends = (0..LENGTH).step_by(window);
            let times: Vec<f64> = ends.clone().map(time).collect();
            let ends: Vec<u32> = ends.map(|i| i as u32).collect();
            let ends = Tensor::new(ends, values.device())?;
            let seen = values.index_select(&ends, 1)?.contiguous()?;
            Observations::at(times.as_slice(), &seen)?
                .with_time()?
                .linear()?
        }
    })
}
