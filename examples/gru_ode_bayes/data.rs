//! Sporadic observations of a stochastic Brusselator.

use candle_core::{DType, Device, Tensor};
use candle_diffeq::models::recurrent::Sporadic;
use rand::seq::SliceRandom;

use common::random::generator;
use common::Result;

const FILE: &[u8] = include_bytes!("bxlator.safetensors");

pub(crate) const VARIABLES: usize = 2;
/// What is predicted lies after this time, and so many observations of it.
const SEEN_UNTIL: f32 = 35.0;
const PREDICTED: usize = 3;
/// Series to test on.
const TEST: usize = 200;

/// A time, the values, and 1 for each that was observed.
pub(crate) type Observation = (f32, [f32; VARIABLES], [f32; VARIABLES]);

/// Series of one length, filled up with observations of nothing.
pub(crate) struct Data {
    /// `(series, length, …)`.
    values: Tensor,
    mask: Tensor,
    gaps: Tensor,
    /// 1 where the test hides an observation.
    hidden: Tensor,
    /// 1 where the test asks for one.
    asked: Tensor,
    pub(crate) training: Vec<u32>,
    test: Vec<u32>,
    /// Times, values and masks by series.
    pub(crate) plain: Vec<Vec<Observation>>,
}

impl Data {
    /// Values are of mean 0 and deviation 1.
    pub(crate) fn read(seed: u64, device: &Device) -> Result<Self> {
        let tensors = candle_core::safetensors::load_buffer(FILE, &Device::Cpu)?;
        let get = |name: &str| tensors.get(name).ok_or(format!("no tensor `{name}`"));
        let times = get("times")?.to_vec1::<f32>()?;
        let values = get("values")?.to_vec2::<f32>()?;
        let mask = get("mask")?.to_dtype(DType::F32)?.to_vec2::<f32>()?;
        let offsets = get("offsets")?.to_vec1::<u32>()?;
        let moments = |c: usize| {
            let seen = values.iter().zip(&mask).filter(|(_, m)| m[c] > 0.0);
            let seen: Vec<f64> = seen.map(|(v, _)| f64::from(v[c])).collect();
            let mean = common::mean(&seen);
            let squares: Vec<f64> = seen.iter().map(|x| (x - mean).powi(2)).collect();
            (mean as f32, common::mean(&squares).sqrt() as f32)
        };
        let moments = [moments(0), moments(1)];
        let scaled = |i: usize, c: usize| mask[i][c] * (values[i][c] - moments[c].0) / moments[c].1;
        let plain: Vec<Vec<_>> = offsets
            .windows(2)
            .map(|pair| {
                let each = pair[0] as usize..pair[1] as usize;
                let one = |i: usize| {
                    let both = [0, 1];
                    (
                        times[i],
                        both.map(|c| scaled(i, c)),
                        both.map(|c| mask[i][c]),
                    )
                };
                each.map(one).collect()
            })
            .collect();
        let length = plain.iter().map(Vec::len).max().unwrap_or(0);
        let series = plain.len();
        let mut all: [Vec<f32>; 5] = Default::default();
        let [x, m, gaps, hidden, asked] = &mut all;
        for one in &plain {
            let (mut before, mut after) = (0.0, 0);
            for i in 0..length {
                let Some((t, value, seen)) = one.get(i) else {
                    x.extend([0.0; VARIABLES]);
                    m.extend([0.0; VARIABLES]);
                    gaps.push(0.0);
                    hidden.push(0.0);
                    asked.push(0.0);
                    continue;
                };
                x.extend(value);
                m.extend(seen);
                gaps.push(t - before);
                before = *t;
                let late = *t > SEEN_UNTIL;
                hidden.push(f32::from(late));
                asked.push(f32::from(late && after < PREDICTED));
                after += usize::from(late);
            }
        }
        let [x, m, gaps, hidden, asked] = all;
        let of = |numbers: Vec<f32>, shape: &[usize]| {
            Tensor::from_vec(numbers, shape, &Device::Cpu)?.to_device(device)
        };
        let mut order: Vec<u32> = (0..series as u32).collect();
        order.shuffle(&mut generator(seed));
        Ok(Self {
            values: of(x, &[series, length, VARIABLES])?,
            mask: of(m, &[series, length, VARIABLES])?,
            gaps: of(gaps, &[series, length])?,
            hidden: of(hidden, &[series, length, 1])?,
            asked: of(asked, &[series, length, 1])?,
            training: order[TEST..].to_vec(),
            test: order[..TEST].to_vec(),
            plain,
        })
    }

    /// Some series.
    pub(crate) fn batch(&self, series: &[u32]) -> Result<Sporadic> {
        let series = Tensor::new(series, self.values.device())?;
        let of = |x: &Tensor| x.index_select(&series, 0);
        Ok(Sporadic {
            values: of(&self.values)?,
            mask: of(&self.mask)?,
            gaps: of(&self.gaps)?,
        })
    }

    /// The test series.
    pub(crate) fn whole(&self) -> Result<Sporadic> {
        self.batch(&self.test)
    }

    /// The test series without what lies after a time, all of their values, and where they are asked for.
    pub(crate) fn test(&self) -> Result<(Sporadic, Tensor, Tensor)> {
        let whole = self.whole()?;
        let series = Tensor::new(self.test.as_slice(), self.values.device())?;
        let shown = (1.0 - self.hidden.index_select(&series, 0)?)?;
        let asked = self
            .asked
            .index_select(&series, 0)?
            .broadcast_mul(&whole.mask)?;
        let seen = Sporadic {
            values: whole.values.broadcast_mul(&shown)?,
            mask: whole.mask.broadcast_mul(&shown)?,
            gaps: whole.gaps,
        };
        Ok((seen, whole.values, asked))
    }

    /// The first test series.
    pub(crate) fn shown(&self) -> u32 {
        self.test[0]
    }
}
