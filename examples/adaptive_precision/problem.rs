//! The problems: a neural field on a batch, and a relaxation oscillator.

use candle_core::{DType, Device, Result, Tensor};
use candle_diffeq::nn::{Activation, Mlp};
use candle_diffeq::{predict, NeuralOde, OdeOptions, Time};
use candle_nn::VarMap;
use rand::rngs::StdRng;

use common::dtype::Dtype;
use common::random::{normal, uniform};

/// y' = f(y) on [0, T] from each of some starts, one solve for each.
pub(crate) struct Problem {
    pub(crate) name: &'static str,
    pub(crate) starts: Vec<Tensor>,
    end: f64,
    field: Field,
}

enum Field {
    /// Weights and biases in turn, in f64.
    Perceptron(Vec<Tensor>),
    VanDerPol,
}

const MU: f64 = 5.0;
const STARTS: u32 = 8;
const BATCH: usize = 64;
const WIDTHS: [usize; 4] = [2, 64, 64, 2];
/// Of the weights against the usual initialisation, with which little moves.
const GAIN: f64 = 2.0;

/// A perceptron 2-64-64-2 with tanh over 64 rows, T = 4.
pub(crate) fn perceptron(rng: &mut StdRng) -> Result<Problem> {
    let mut weights = vec![];
    for pair in WIDTHS.windows(2) {
        let bound = GAIN / (pair[0] as f64).sqrt();
        for shape in [&[pair[1], pair[0]][..], &pair[1..]] {
            let draw = uniform(rng, shape, DType::F64, &Device::Cpu)?;
            weights.push(draw.affine(2.0 * bound, -bound)?);
        }
    }
    Ok(Problem {
        name: "MLP 2-64-64-2",
        starts: vec![normal(rng, (BATCH, WIDTHS[0]), DType::F64, &Device::Cpu)?],
        end: 4.0,
        field: Field::Perceptron(weights),
    })
}

/// y₁' = y₂, y₂' = μ (1 − y₁²) y₂ − y₁ with μ = 5, T = 10, from (2, 0) and points beside it, since errors of one start are
/// partly luck.
pub(crate) fn van_der_pol() -> Result<Problem> {
    let start = |k: u32| Tensor::new(&[[2.0 + f64::from(k) / 16.0, 0.0]], &Device::Cpu);
    Ok(Problem {
        name: "Van der Pol, μ = 5",
        starts: (0..STARTS).map(start).collect::<Result<_>>()?,
        end: 10.0,
        field: Field::VanDerPol,
    })
}

impl Problem {
    /// y(T) from one of the starts.
    pub(crate) fn solve(
        &self,
        y0: &Tensor,
        dtype: Dtype,
        options: OdeOptions,
        device: &Device,
    ) -> candle_diffeq::Result<Tensor> {
        let state = dtype.state();
        let options = OdeOptions {
            precision: Some(dtype.precision()),
            ..options
        };
        let y0 = y0.to_device(device)?.to_dtype(state)?;
        let times = [0.0, self.end];
        match &self.field {
            Field::VanDerPol => predict(&oscillator, &y0, &times, &options),
            Field::Perceptron(weights) => {
                let mut vars = VarMap::new();
                let ode = NeuralOde::from_field(&vars, "", state, device, |vb| {
                    Mlp::new(&WIDTHS, Activation::Tanh, vb)
                })?;
                for (i, pair) in weights.chunks(2).enumerate() {
                    for (name, x) in ["weight", "bias"].iter().zip(pair) {
                        let x = x.to_device(device)?.to_dtype(state)?;
                        vars.set_one(format!("{i}.{name}"), x)?;
                    }
                }
                ode.options(options).predict(&y0, &times)
            }
        }
    }
}

fn oscillator(_: &Time, y: &Tensor) -> Result<Tensor> {
    let (position, velocity) = (y.narrow(1, 0, 1)?, y.narrow(1, 1, 1)?);
    let damping = position.sqr()?.affine(-MU, MU)?;
    let force = ((damping * &velocity)? - position)?;
    Tensor::cat(&[velocity, force], 1)
}
