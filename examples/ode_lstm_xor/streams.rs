//! Streams of random bits as runs of equal bits.

use candle_core::{Device, Tensor};
use rand::rngs::StdRng;
use rand::Rng;

use common::Result;

/// Streams, each as a list of its runs; after the last run of a stream its row is empty.
pub(crate) struct Runs {
    /// The bit of a run as ±1, and half its length, `(rows, runs, 2)`.
    pub(crate) x: Tensor,
    /// In bits, `(rows, runs)`.
    pub(crate) lengths: Tensor,
    /// 1 where there is a run, `(rows, runs)`.
    pub(crate) seen: Tensor,
    /// The exclusive or of all bits up to the end of a run, `(rows, runs)`; after the last run that of the stream.
    pub(crate) parities: Tensor,
}

/// So many streams of so many bits.
pub(crate) fn streams(rows: usize, bits: usize, rng: &mut StdRng, device: &Device) -> Result<Runs> {
    let (mut x, mut lengths, mut seen, mut parities) = (vec![], vec![], vec![], vec![]);
    for _ in 0..rows {
        let stream: Vec<bool> = (0..bits).map(|_| rng.random()).collect();
        let mut runs = stream.chunk_by(|a, b| a == b);
        let mut ones = 0;
        for _ in 0..bits {
            let run = runs.next().unwrap_or_default();
            let sign = match run.first() {
                None => 0.0,
                Some(false) => -1.0,
                Some(true) => 1.0,
            };
            let length = run.len() as f32;
            ones += run.iter().filter(|bit| **bit).count() as u32;
            x.extend([sign, 0.5 * length]);
            lengths.push(length);
            seen.push(f32::from(!run.is_empty()));
            parities.push(ones % 2);
        }
    }
    let shape = (rows, bits);
    Ok(Runs {
        x: Tensor::from_vec(x, (rows, bits, 2), device)?,
        lengths: Tensor::from_vec(lengths, shape, device)?,
        seen: Tensor::from_vec(seen, shape, device)?,
        parities: Tensor::from_vec(parities, shape, device)?,
    })
}
