//! The problem: a continuous normalising flow, whose weights a hyper-network gives at every time.
//!
//! t ↦ (W, B, U, G) by 1-32-32-896 with relu;  z' = mean tanh(zW + B) (U σ(G)),
//! (log p)' = −mean (1 − tanh²)(w·u), the exact trace;  L = −mean(log N(z(1); 0, I) + log p(1)).

use candle_core::{DType, Device, Result, Tensor};
use rand::rngs::StdRng;

use common::problem::Problem;
use common::random::{normal, uniform};

const BATCH: usize = 16;
const HYPER: usize = 32;
const WIDTH: usize = 128;
/// Of the last layer against the usual initialisation, with which nothing moves.
const STRENGTH: f64 = 8.0;

/// y = (z, log p), (16, 3), on [0, 1], U multiplied by a factor.
pub(crate) fn flow(rng: &mut StdRng, factor: f64) -> Result<Problem> {
    let mut weights = vec![];
    for (i, o, strength) in [
        (1, HYPER, 1.0),
        (HYPER, HYPER, 1.0),
        (HYPER, 7 * WIDTH, STRENGTH),
    ] {
        // Uniform of ±1/√i, as PyTorch has it.
        let bound = strength / (i as f64).sqrt();
        for shape in [&[o, i][..], &[o]] {
            let draw = uniform(rng, shape, DType::F64, &Device::Cpu)?;
            weights.push(draw.affine(2.0 * bound, -bound)?);
        }
    }
    // The rows of U, of weight and bias.
    for last in &mut weights[4..] {
        let of_u = |i: usize| match (2 * WIDTH..4 * WIDTH).contains(&i) {
            true => factor,
            false => 1.0,
        };
        let strengths: Vec<f64> = (0..7 * WIDTH).map(of_u).collect();
        let rows = Tensor::new(strengths, &Device::Cpu)?;
        *last = match last.rank() {
            1 => (&*last * rows)?,
            _ => last.broadcast_mul(&rows.unsqueeze(1)?)?,
        };
    }
    let z = normal(rng, (BATCH, 2), DType::F64, &Device::Cpu)?;
    Ok(Problem {
        field: velocity,
        weights,
        y0: z.pad_with_zeros(1, 0, 1)?,
        end: 1.0,
        loss: negative_log_likelihood,
    })
}

fn velocity(weights: &[Tensor], t: f64, y: &Tensor) -> Result<Tensor> {
    let layer = |x: &Tensor, i: usize| {
        let (weight, bias) = (&weights[2 * i], &weights[2 * i + 1]);
        x.matmul(&weight.t()?)?.broadcast_add(bias)
    };
    let t = Tensor::new(&[[t]], y.device())?.to_dtype(y.dtype())?;
    let hidden = layer(&layer(&t, 0)?.relu()?, 1)?.relu()?;
    let given = layer(&hidden, 2)?.squeeze(0)?;
    let part = |i: usize| given.narrow(0, 2 * i * WIDTH, 2 * WIDTH);
    let w = part(0)?.reshape((2, WIDTH))?;
    let gate = candle_nn::ops::sigmoid(&part(2)?)?;
    let u = (part(1)? * gate)?.reshape((WIDTH, 2))?;
    let b = given.narrow(0, 6 * WIDTH, WIDTH)?;

    let z = y.narrow(1, 0, 2)?.contiguous()?;
    let h = z.matmul(&w)?.broadcast_add(&b)?.tanh()?;
    let velocity = (h.matmul(&u)? / WIDTH as f64)?;
    let product = (&w.t()? * &u)?.sum_keepdim(1)?;
    let slope = h.sqr()?.affine(-1.0, 1.0)?;
    let trace = (slope.matmul(&product)? / WIDTH as f64)?;
    Tensor::cat(&[velocity, trace.neg()?], 1)
}

fn negative_log_likelihood(y: &Tensor) -> Result<Tensor> {
    let log_normal = y
        .narrow(1, 0, 2)?
        .sqr()?
        .sum(1)?
        .affine(-0.5, -(std::f64::consts::TAU).ln())?;
    (log_normal + y.narrow(1, 2, 1)?.squeeze(1)?)?
        .mean_all()?
        .neg()
}
