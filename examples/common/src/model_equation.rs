//! rampde's model equation: y' = Ay, A = −5 I (10 × 10), T = 1, L = Σ y(T).

use candle_core::{DType, Device, Result, Tensor};

use super::problem::{values, Gradients, Problem};

/// rampde's initial value, a standard normal sample.
pub const Y0: [f32; 10] = [
    0.336_690_37,
    0.128_809_4,
    0.234_462_37,
    0.230_333_03,
    -1.122_856_4,
    -0.186_328_3,
    2.208_201_4,
    -0.637_997_03,
    0.461_657_22,
    0.267_350_9,
];

/// The equation from y0.
pub fn model_equation(y0: [f32; 10]) -> Result<Problem> {
    Ok(Problem {
        field: |weights, _, y| y.matmul(&weights[0].t()?),
        weights: vec![(Tensor::eye(10, DType::F64, &Device::Cpu)? * -5.0)?],
        y0: Tensor::new(&[y0], &Device::Cpu)?.to_dtype(DType::F64)?,
        end: 1.0,
        loss: Tensor::sum_all,
    })
}

/// Solution and gradients of y' = Ay with L = Σ y(T), by matrix exponentials in f64.
///
/// ∂L/∂A = ∫ e^{sAᵀ} 1 y0ᵀ e^{(T−s)Aᵀ} ds is the upper right block of exp T (Aᵀ, 1 y0ᵀ; 0, Aᵀ)
/// (Van Loan, "Computing Integrals Involving the Matrix Exponential", 1978).
pub fn exact(problem: &Problem) -> Result<Gradients> {
    let a = &problem.weights[0];
    let (n, transposed) = (a.dim(0)?, a.t()?);
    let ones = Tensor::ones((n, 1), a.dtype(), a.device())?;
    let outer = ones.matmul(&problem.y0)?;
    let upper = Tensor::cat(&[&transposed, &outer], 1)?;
    let lower = Tensor::cat(&[&outer.zeros_like()?, &transposed.contiguous()?], 1)?;
    let block = exponential(&(Tensor::cat(&[upper, lower], 0)? * problem.end)?)?;
    let flow = block.narrow(0, 0, n)?.narrow(1, 0, n)?.contiguous()?;
    Ok(Gradients {
        state: values(&problem.y0.matmul(&flow)?)?,
        y0: values(&flow.matmul(&ones)?)?,
        theta: values(&block.narrow(0, 0, n)?.narrow(1, n, n)?)?,
        ..Default::default()
    })
}

/// exp M, scaled until ‖M‖ ≤ ½, by Taylor's series to 2⁻⁶⁰, and squared again.
fn exponential(m: &Tensor) -> Result<Tensor> {
    const TERMS: usize = 16;
    let norm: f64 = values(&m.abs()?.sum(1)?)?.into_iter().fold(0.0, f64::max);
    let squarings = (norm.max(0.5) / 0.5).log2().ceil() as i32;
    let m = (m * 2f64.powi(-squarings))?;
    let one = Tensor::eye(m.dim(0)?, m.dtype(), m.device())?;
    // Horner: I + M (I + M/2 (I + M/3 …)).
    let mut sum = one.clone();
    for k in (1..=TERMS).rev() {
        sum = (&one + (m.matmul(&sum)? / k as f64)?)?;
    }
    for _ in 0..squarings {
        sum = sum.matmul(&sum)?;
    }
    Ok(sum)
}
