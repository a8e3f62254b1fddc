//! What is tested: rampde's z' = ±½z (2 components, [0, 2], target 2), and a small MLP.  Where rampde
//! starts at 1, there is a batch around 1: the mean over it is less noisy than one rounded solve.

use candle_core::{DType, Device, Result, Tensor};
use rand::rngs::StdRng;

use common::problem::Problem;
use common::random::normal;

pub(crate) struct Named {
    pub(crate) name: &'static str,
    pub(crate) problem: Problem,
}

const BATCH: usize = 32;

/// All with L = ½|z(2) − 2|², its mean over the batch.
pub(crate) fn problems(rng: &mut StdRng) -> Result<Vec<Named>> {
    Ok(vec![
        Named {
            name: "z' = ½z",
            problem: linear(rng, 0.5)?,
        },
        Named {
            name: "z' = −½z",
            problem: linear(rng, -0.5)?,
        },
        Named {
            name: "MLP 2-16-2",
            problem: mlp(rng)?,
        },
    ])
}

fn linear(rng: &mut StdRng, rate: f64) -> Result<Problem> {
    Ok(Problem {
        field: |w, _, z| z.matmul(&w[0].t()?),
        weights: vec![(Tensor::eye(2, DType::F64, &Device::Cpu)? * rate)?],
        y0: start(rng)?,
        end: 2.0,
        loss,
    })
}

fn mlp(rng: &mut StdRng) -> Result<Problem> {
    let mut draw =
        |shape: &[usize], scale: f64| normal(rng, shape, DType::F64, &Device::Cpu)? * scale;
    let weights = vec![
        draw(&[16, 2], 0.7)?,
        draw(&[16], 0.3)?,
        draw(&[2, 16], 0.25)?,
        draw(&[2], 0.1)?,
    ];
    Ok(Problem {
        field: |w, _, z| {
            let layer = |x: &Tensor, i: usize| x.matmul(&w[i].t()?)?.broadcast_add(&w[i + 1]);
            layer(&layer(z, 0)?.tanh()?, 2)
        },
        weights,
        y0: start(rng)?,
        end: 2.0,
        loss,
    })
}

fn start(rng: &mut StdRng) -> Result<Tensor> {
    normal(rng, (BATCH, 2), DType::F64, &Device::Cpu)?.affine(0.5, 1.0)
}

fn loss(z: &Tensor) -> Result<Tensor> {
    (z - 2.0)?.sqr()?.sum_all()? * (0.5 / BATCH as f64)
}
