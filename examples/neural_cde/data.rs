//! Japanese Vowels: utterances of nine speakers as series of 12 cepstrum coefficients.

use candle_core::{DType, Device, Tensor};
use candle_diffeq::cde::{ControlPath, Observations};
use rand::rngs::StdRng;

use common::{random, Result};

const FILE: &[u8] = include_bytes!("japanese_vowels.safetensors");

pub(crate) const CLASSES: usize = 9;
/// Channels of a path: time and the coefficients.
pub(crate) const CHANNELS: usize = 13;
pub(crate) const COEFFICIENTS: usize = 12;
/// Frames of the longest utterance.
pub(crate) const LENGTH: usize = 29;

/// Utterances, filled up to one length.
pub(crate) struct Utterances {
    /// `(utterances, LENGTH, COEFFICIENTS)`, of mean 0 and deviation 1 over the frames of the training part.
    pub(crate) values: Vec<f32>,
    pub(crate) lengths: Vec<usize>,
    pub(crate) labels: Vec<u32>,
}

/// Both parts.
pub(crate) struct Data {
    pub(crate) training: Utterances,
    pub(crate) test: Utterances,
}

impl Data {
    pub(crate) fn read() -> Result<Self> {
        let tensors = candle_core::safetensors::load_buffer(FILE, &Device::Cpu)?;
        let get = |name: &str| tensors.get(name).ok_or(format!("no tensor `{name}`"));
        let frames = get("train.values")?.to_dtype(DType::F64)?;
        let mean = frames.mean(0)?.to_vec1::<f64>()?;
        let deviation = frames.var(0)?.sqrt()?.to_vec1::<f64>()?;
        let part = |part: &str| -> Result<Utterances> {
            let frames = get(&format!("{part}.values"))?.to_vec2::<f32>()?;
            let lengths = get(&format!("{part}.lengths"))?.to_vec1::<u32>()?;
            let labels = get(&format!("{part}.labels"))?.to_dtype(DType::U32)?;
            let mut values = vec![0.0; lengths.len() * LENGTH * COEFFICIENTS];
            let mut frames = frames.into_iter();
            for (n, &length) in lengths.iter().enumerate() {
                for (i, frame) in frames.by_ref().take(length as usize).enumerate() {
                    for (c, x) in frame.into_iter().enumerate() {
                        values[(n * LENGTH + i) * COEFFICIENTS + c] =
                            ((f64::from(x) - mean[c]) / deviation[c]) as f32;
                    }
                }
            }
            Ok(Utterances {
                values,
                lengths: lengths.into_iter().map(|n| n as usize).collect(),
                labels: labels.to_vec1()?,
            })
        };
        Ok(Self {
            training: part("train")?,
            test: part("test")?,
        })
    }
}

/// Which path goes through the frames.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Kind {
    Hermite,
    Linear,
    /// Depth 2 over windows of four frames.
    LogSignature,
}

impl Kind {
    pub(crate) fn channels(self) -> usize {
        match self {
            Self::LogSignature => CHANNELS + CHANNELS * (CHANNELS - 1) / 2,
            _ => CHANNELS,
        }
    }
}

impl Utterances {
    pub(crate) fn len(&self) -> usize {
        self.labels.len()
    }

    /// Paths through some utterances, with noise of this deviation on every coefficient.
    pub(crate) fn paths(
        &self,
        chosen: &[usize],
        kind: Kind,
        noise: Option<(f64, &mut StdRng)>,
        device: &Device,
    ) -> Result<ControlPath> {
        let size = LENGTH * COEFFICIENTS;
        let values: Vec<f32> = chosen
            .iter()
            .flat_map(|&n| &self.values[n * size..(n + 1) * size])
            .copied()
            .collect();
        let shape = (chosen.len(), LENGTH, COEFFICIENTS);
        let mut xs = Tensor::from_vec(values, shape, device)?;
        if let Some((deviation, rng)) = noise {
            xs = (xs + (random::normal(rng, shape, DType::F32, device)? * deviation)?)?;
        }
        let lengths: Vec<usize> = chosen.iter().map(|&n| self.lengths[n]).collect();
        let observed = Observations::new(&xs)?.lengths(&lengths)?.with_time()?;
        Ok(match kind {
            Kind::Hermite => observed.hermite()?,
            Kind::Linear => observed.linear()?,
            Kind::LogSignature => observed.log_signature(4)?,
        })
    }

    /// Weights of the knots of an utterance with which its states are averaged up to its end, `(knots, utterances, 1)`.
    pub(crate) fn weights(
        &self,
        chosen: &[usize],
        knots: &[f64],
        device: &Device,
    ) -> Result<Tensor> {
        let within = |n: usize| {
            let end = (self.lengths[n] - 1) as f64;
            knots.iter().filter(|&&t| t <= end).count()
        };
        let counts: Vec<usize> = chosen.iter().map(|&n| within(n)).collect();
        let weight = |i: usize, count: usize| if i < count { 1.0 / count as f32 } else { 0.0 };
        let all = (0..knots.len()).flat_map(|i| counts.iter().map(move |&count| weight(i, count)));
        let all: Vec<f32> = all.collect();
        let shape = (knots.len(), chosen.len(), 1);
        Ok(Tensor::from_vec(all, shape, device)?)
    }

    pub(crate) fn labels(&self, chosen: &[usize], device: &Device) -> Result<Tensor> {
        let labels: Vec<u32> = chosen.iter().map(|&n| self.labels[n]).collect();
        Ok(Tensor::new(labels, device)?)
    }
}
