//! The tape's backward pass by hand, for Euler's method on z' = Az with L = Σ z(T).

use candle_core::DType;
use half::{bf16, f16};

use common::problem::{values, Problem};
use common::Result;

/// In which precision θ̄ is summed.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Sum {
    Low,
    Wide,
}

/// ∂L/∂A.  z and λ are f32; A, what f sees of z, and the cotangent of f are in `compute`.
pub(crate) fn weight_gradient(
    problem: &Problem,
    compute: DType,
    steps: usize,
    sum: Sum,
) -> Result<Vec<f64>> {
    let fl: fn(f32) -> f32 = match compute {
        DType::F16 => |x| f16::from_f32(x).to_f32(),
        DType::BF16 => |x| bf16::from_f32(x).to_f32(),
        _ => |x| x,
    };
    let a: Vec<f32> = values(&problem.weights[0])?
        .into_iter()
        .map(|x| fl(x as f32))
        .collect();
    let h = problem.end / steps as f64;
    let scaled = |x: f32| (f64::from(x) * h) as f32;

    let mut z: Vec<f32> = values(&problem.y0)?.into_iter().map(|x| x as f32).collect();
    let n = z.len();
    let mut seen = vec![];
    for _ in 0..steps {
        let low: Vec<f32> = z.iter().map(|x| fl(*x)).collect();
        for i in 0..n {
            let k: f32 = (0..n).map(|j| a[i * n + j] * low[j]).sum();
            z[i] += scaled(fl(k));
        }
        seen.push(low);
    }

    let (mut adjoint, mut theta) = (vec![1f32; n], vec![0f32; n * n]);
    for low in seen.iter().rev() {
        let v: Vec<f32> = adjoint.iter().map(|x| fl(scaled(*x))).collect();
        for i in 0..n {
            for j in 0..n {
                let term = fl(v[i] * low[j]);
                theta[i * n + j] = match sum {
                    Sum::Low => fl(theta[i * n + j] + term),
                    Sum::Wide => theta[i * n + j] + term,
                };
            }
        }
        for j in 0..n {
            let w: f32 = (0..n).map(|i| a[i * n + j] * v[i]).sum();
            adjoint[j] += fl(w);
        }
    }
    Ok(theta.into_iter().map(f64::from).collect())
}
