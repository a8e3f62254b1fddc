//! Linear and nonlinear problems whose adjoints leave the range of f16.

use candle_core::{DType, Device, Result, Tensor};
use rand::rngs::StdRng;

use common::problem::Problem;
use common::random::normal;

/// A problem, and how many steps of RK4 it takes.
pub(crate) struct Case {
    pub(crate) name: &'static str,
    pub(crate) problem: Problem,
    pub(crate) steps: usize,
}

/// All cases.
pub(crate) fn cases(rng: &mut StdRng) -> Result<Vec<Case>> {
    Ok(vec![
        // A target that is nearly met: λ starts at about 1e-10.
        Case {
            name: "small loss",
            problem: linear(rng, |y| y.sqr()?.mean_all()? * 1e-6)?,
            steps: 99,
        },
        // As a loss scaler leaves it that has not met its limit.
        Case {
            name: "loss times 2²⁰",
            problem: linear(rng, |y| y.sum_all()? * 2f64.powi(20))?,
            steps: 99,
        },
        Case {
            name: "growing adjoint",
            problem: rated(rng, 12.0, 1e-4)?,
            steps: 128,
        },
        Case {
            name: "falling adjoint",
            problem: rated(rng, -32.0, 1.0)?,
            steps: 128,
        },
    ])
}

/// y' = yAᵀ on [0, 1], A standard normal, y0 too but for a factor of 1e-4.
fn linear(rng: &mut StdRng, loss: fn(&Tensor) -> Result<Tensor>) -> Result<Problem> {
    Ok(Problem {
        field: |w, _, y| y.matmul(&w[0].t()?),
        weights: vec![draw(rng, &[3, 3], 1.0)?],
        y0: draw(rng, &[1, 3], 1e-4)?,
        end: 1.0,
        loss,
    })
}

/// y' = ry + W₂ tanh(W₁ y + b) on [0, 1], L = Σ y(1), y0 and W₂ of a size.
fn rated(rng: &mut StdRng, rate: f64, size: f64) -> Result<Problem> {
    Ok(Problem {
        field: |w, _, y| {
            let hidden = y.matmul(&w[0].t()?)?.broadcast_add(&w[1])?.tanh()?;
            hidden.matmul(&w[2].t()?)? + y.broadcast_mul(&w[3])?
        },
        weights: vec![
            draw(rng, &[16, 4], 0.5)?,
            draw(rng, &[16], 0.5)?,
            draw(rng, &[4, 16], 0.25 * size)?,
            Tensor::new(rate, &Device::Cpu)?,
        ],
        y0: draw(rng, &[8, 4], size)?,
        end: 1.0,
        loss: Tensor::sum_all,
    })
}

/// Normal, of this standard deviation.
fn draw(rng: &mut StdRng, shape: &[usize], size: f64) -> Result<Tensor> {
    normal(rng, shape, DType::F64, &Device::Cpu)? * size
}
