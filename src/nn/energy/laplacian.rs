//! ΔΦ of a perceptron, forward: a tangent for each feature, and the sum of the second derivatives along them.

use candle_core::{Result, Tensor};

use super::mlp::Energy;
use crate::nn::perceptron::Perceptron;
use crate::nn::spread::spread;

/// ΔΦ of rows x `(row, feature)`, `(row, 1)`, in ordinary operations: with J_l = ∂a_l/∂x and ℓ_l = Δa_l,
///
/// ℓ_z = W_l ℓ_{l−1},  J_z = W_l J_{l−1},  ℓ_l = σ'' ∘ Σ_i J_{z,i}² + σ' ∘ ℓ_z,  J_l = σ' ∘ J_z.
pub(super) fn laplacian(net: &Perceptron, energy: Energy, x: &Tensor) -> Result<Tensor> {
    let pass = net.pass(x)?;
    let (rows, features) = (x.dim(0)?, x.dim(1)?);
    let eye = Tensor::eye(features, x.dtype(), x.device())?.unsqueeze(1)?;
    // `(feature, row, unit)`; one row stands for all as long as no slope has been met.
    let (mut tangents, mut second) = (eye, None::<Tensor>);
    for (l, layer) in net.layers.iter().enumerate() {
        let (skipped, skipped_second) = (tangents.clone(), second.clone());
        let weight = layer.weight.t()?;
        let (many, inputs, units) = (tangents.dim(1)?, weight.dim(0)?, weight.dim(1)?);
        let flat = tangents.reshape((features * many, inputs))?;
        tangents = flat.matmul(&weight)?.reshape((features, many, units))?;
        second = second.map(|s| s.matmul(&weight)).transpose()?;
        let squares = match many == rows {
            true => tangents.sqr()?.sum(0)?,
            false => spread(&tangents.sqr()?.sum(0)?, rows)?,
        };
        let Some([z, value, slope]) = pass.hidden.get(l) else {
            return total(energy, &pass.output, squares, second);
        };
        let bent = (net.activation.curvature(z, value, slope)? * squares)?;
        let mut sum = match second {
            Some(second) => (bent + (slope * second)?)?,
            None => bent,
        };
        tangents = tangents.broadcast_mul(&slope.unsqueeze(0)?)?;
        if net.skips(l) {
            tangents = tangents.broadcast_add(&skipped)?;
            if let Some(skipped) = skipped_second {
                sum = (sum + skipped)?;
            }
        }
        second = Some(sum);
    }
    candle_core::bail!("a Perceptron without layers")
}

/// ΔΦ of ΔN and Σ_i (∂N/∂x_i)²: ΔN, or 2 Σ_k (Σ_i (∂N_k/∂x_i)² + N_k ΔN_k).
fn total(
    energy: Energy,
    output: &Tensor,
    squares: Tensor,
    second: Option<Tensor>,
) -> Result<Tensor> {
    match energy {
        // Of a network without hidden layer, which is affine, it is zero.
        Energy::Output => second.map_or_else(|| output.zeros_like(), Ok),
        Energy::SumOfSquares => {
            let sum = match second {
                Some(second) => (squares + (output * second)?)?,
                None => squares,
            };
            sum.sum_keepdim(1)? * 2.0
        }
    }
}
