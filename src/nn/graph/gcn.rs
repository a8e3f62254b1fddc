//! Graph convolution.

use std::sync::Arc;

use candle_core::{Module, Result, Tensor};
use candle_nn::VarBuilder;

use super::pool::Pool;
use super::Csr;
use crate::nn::linear::affine;
use crate::nn::spread::spread;
use crate::nn::{Checked, Linear};

/// y = A x Wᵀ + b: a linear layer of every node, averaged over its neighbours (Kipf & Welling, "Semi-supervised
/// classification with graph convolutional networks", arXiv 1609.02907).
///
/// x `(nodes, inputs)`, y `(nodes, outputs)`; A is a [`Csr`], mostly [`Csr::normalised_adjacency`].
#[derive(Clone, Debug)]
pub struct Gcn {
    pub(super) graph: Csr,
    pub(super) linear: Linear,
    pub(super) bias: Tensor,
}

impl Gcn {
    /// A layer over this graph; variables `weight` `(outputs, inputs)` and `bias` `(outputs)`, initialised as those of
    /// [`candle_nn::linear()`].
    ///
    /// # Errors
    /// Those of the builder.
    pub fn new(inputs: usize, outputs: usize, graph: &Csr, vb: VarBuilder<'_>) -> Result<Self> {
        let layer = Linear::new(inputs, outputs, vb)?;
        match layer.bias {
            Some(bias) => Self::from_tensors(graph, layer.weight, bias),
            None => candle_core::bail!("a linear layer without a bias"),
        }
    }

    /// A layer over this graph, made of tensors that exist.
    ///
    /// # Errors
    /// If W is no matrix, b has not a number for each of its rows, or both do not have one dtype on one device.
    pub fn from_tensors(graph: &Csr, weight: Tensor, bias: Tensor) -> Result<Self> {
        let mut checked = Checked::new("Gcn::from_tensors");
        checked.weight(0, &weight, 2, "a matrix (outputs, inputs)")?;
        checked.bias(0, &bias, weight.dims()[0])?;
        Ok(Self {
            graph: graph.clone(),
            linear: Linear { weight, bias: None },
            bias,
        })
    }

    /// Inputs and outputs.
    pub(super) fn widths(&self) -> (usize, usize) {
        let dims = self.linear.weight.dims();
        (dims[1], dims[0])
    }

    /// Memory for evaluations over its graph.
    pub(super) fn pool(&self) -> Arc<Pool> {
        Arc::clone(&self.graph.pattern().pool)
    }

    /// W and b.
    pub(super) fn tensors(&self) -> impl Iterator<Item = &Tensor> {
        [&self.linear.weight, &self.bias].into_iter()
    }

    /// The same with weights in the dtype of x.
    pub(super) fn like(&self, x: &Tensor) -> Result<Self> {
        Ok(Self {
            graph: self.graph.clone(),
            linear: Linear {
                weight: self.linear.weight.to_dtype(x.dtype())?,
                bias: None,
            },
            bias: self.bias.to_dtype(x.dtype())?,
        })
    }

    /// The same weights over another graph.
    #[must_use]
    pub fn over(&self, graph: &Csr) -> Self {
        Self {
            graph: graph.clone(),
            ..self.clone()
        }
    }
}

impl Module for Gcn {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let (inputs, outputs) = self.widths();
        if inputs <= outputs {
            // The product adds the bias in the same pass.
            return affine(
                &self.graph.matmul(x)?,
                &self.linear.weight,
                Some(&self.bias),
            );
        }
        let y = self.graph.matmul(&self.linear.forward(x)?)?;
        y + spread(&self.bias, self.graph.dims().0)?
    }
}
