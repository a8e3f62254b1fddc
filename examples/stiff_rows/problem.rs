//! The problem: spirals whose speed is a feature of the row, by one network for all.

use candle_core::{DType, Device, Result, Tensor};
use candle_diffeq::nn::{Activation, Mlp};
use candle_diffeq::{NeuralOde, OdeOptions};
use candle_nn::VarMap;
use rand::rngs::StdRng;
use rand::Rng;

use common::dtype::Dtype;
use common::random::{normal, uniform};

/// Pairs of hidden units.
const PAIRS: usize = 32;
/// Radians per unit of time of the fastest rows, and of the slowest.
const SPEEDS: [f64; 2] = [100.0, 0.5];
/// Loss of radius by radian.
const DAMPING: f64 = 0.02;

/// Rows (x, s) with x' = f(x, s), s' = 0 on [0, 1], where
///
/// f = c A Σ_j d_j (tanh(d_j·x + s) + tanh(d_j·x − s)), A = (−0.02, 1; −1, −0.02)
///
/// with random directions d_j: near zero a spiral with the speed of the fastest over cosh² s.
pub(crate) struct Problem {
    /// Of every row.
    pub(crate) speeds: Vec<f64>,
    y0: Tensor,
    /// Weight and bias of each layer.
    layers: [(Tensor, Tensor); 2],
}

/// Draws a problem; all numbers are of f32, so that every precision starts from the same.
pub(crate) fn problem(rng: &mut StdRng, rows: usize) -> Result<Problem> {
    let (mut first, mut last) = (vec![], vec![vec![0.0; 2 * PAIRS]; 3]);
    for j in 0..PAIRS {
        let (sine, cosine) = rng.random_range(0.0..std::f64::consts::TAU).sin_cos();
        // The sum of d_j d_jᵀ is about half of their number.
        let scale = SPEEDS[0] / PAIRS as f64;
        for (unit, sign) in [(2 * j, 1.0), (2 * j + 1, -1.0)] {
            first.push(vec![cosine, sine, sign]);
            last[0][unit] = scale * (sine - DAMPING * cosine);
            last[1][unit] = scale * (-cosine - DAMPING * sine);
        }
    }
    let cpu = &Device::Cpu;
    let zeros = |n: usize| Tensor::zeros(n, DType::F64, cpu);
    let rounded = |x: Tensor| x.to_dtype(DType::F32)?.to_dtype(DType::F64);
    let ratio = SPEEDS[0] / SPEEDS[1];
    // Evenly in their logarithms.
    let speeds: Vec<f64> = (0..rows)
        .map(|i| SPEEDS[0] * ratio.powf(-(i as f64) / (rows.max(2) - 1) as f64))
        .collect();
    let gates = speeds
        .iter()
        .map(|speed| (SPEEDS[0] / speed).sqrt().acosh());
    let gates = Tensor::from_iter(gates, cpu)?.unsqueeze(1)?;
    let angles = uniform(rng, (rows, 1), DType::F64, cpu)?.affine(std::f64::consts::TAU, 0.0)?;
    let radii = normal(rng, (rows, 1), DType::F64, cpu)?.affine(0.1, 0.5)?;
    let x = (radii.clone() * angles.cos()?)?;
    let y = (radii * angles.sin()?)?;
    Ok(Problem {
        speeds,
        y0: rounded(Tensor::cat(&[x, y, gates], 1)?)?,
        layers: [
            (rounded(Tensor::new(first, cpu)?)?, zeros(2 * PAIRS)?),
            (rounded(Tensor::new(last, cpu)?)?, zeros(3)?),
        ],
    })
}

/// Its neural ODE, and where it starts, in one precision.
pub(crate) struct Model {
    pub(crate) ode: NeuralOde,
    pub(crate) y0: Tensor,
}

impl Problem {
    pub(crate) fn model(&self, dtype: Dtype, options: OdeOptions) -> candle_diffeq::Result<Model> {
        let (state, mut vars) = (dtype.state(), VarMap::new());
        let ode = NeuralOde::from_field(&vars, "", state, &Device::Cpu, |vb| {
            Mlp::new(&[3, 2 * PAIRS, 3], Activation::Tanh, vb)
        })?;
        for (i, (weight, bias)) in self.layers.iter().enumerate() {
            vars.set_one(format!("{i}.weight"), weight.to_dtype(state)?)?;
            vars.set_one(format!("{i}.bias"), bias.to_dtype(state)?)?;
        }
        Ok(Model {
            ode: ode.options(OdeOptions {
                precision: Some(dtype.precision()),
                ..options
            }),
            y0: self.y0.to_dtype(state)?,
        })
    }
}
