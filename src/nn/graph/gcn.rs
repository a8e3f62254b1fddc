//! Graph convolution.

use candle_core::{Module, Result, Tensor};
use candle_nn::VarBuilder;

use super::Csr;
use crate::nn::Linear;

/// y = A (x Wᵀ) + b: a linear layer of every node, averaged over its neighbours (Kipf & Welling, "Semi-supervised
/// classification with graph convolutional networks", arXiv 1609.02907).
///
/// x `(nodes, inputs)`, y `(nodes, outputs)`; A is a [`Csr`], mostly [`Csr::normalised_adjacency`].
#[derive(Clone, Debug)]
pub struct Gcn {
    graph: Csr,
    linear: Linear,
    bias: Tensor,
}

impl Gcn {
    /// A layer over this graph; variables `weight` `(outputs, inputs)` and `bias` `(outputs)`, initialised as those of
    /// [`candle_nn::linear()`].
    ///
    /// # Errors
    /// Of the builder.
    pub fn new(inputs: usize, outputs: usize, graph: &Csr, vb: VarBuilder<'_>) -> Result<Self> {
        let layer = Linear::new(inputs, outputs, vb)?;
        match layer.bias {
            Some(bias) => Self::from_tensors(graph, layer.weight, bias),
            None => candle_core::bail!("a linear layer without a bias"),
        }
    }

    /// Of tensors that exist.
    ///
    /// # Errors
    /// If W is no matrix, or b has not a number for each of its rows.
    pub fn from_tensors(graph: &Csr, weight: Tensor, bias: Tensor) -> Result<Self> {
        let (outputs, _) = weight.dims2()?;
        if bias.dims() != [outputs] {
            candle_core::bail!(
                "a Gcn layer of {outputs} outputs needs as many biases, got {:?}",
                bias.shape()
            )
        }
        Ok(Self {
            graph: graph.clone(),
            linear: Linear { weight, bias: None },
            bias,
        })
    }

    /// The same weights over another graph.
    pub fn over(&self, graph: &Csr) -> Self {
        Self {
            graph: graph.clone(),
            ..self.clone()
        }
    }
}

impl Module for Gcn {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let y = self.graph.matmul(&self.linear.forward(x)?)?;
        y + crate::nn::spread::spread(&self.bias, self.graph.dims().0)?
    }
}
