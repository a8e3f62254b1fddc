//! Convolutions as one matrix product over the patches that they read: candle's own have a slow
//! backward pass on the CPU.

use candle_core::{Module, Result, Tensor};
use candle_nn::{Init, VarBuilder};

/// w ∗ x + b, from `(batch, in, height, width)` to `(batch, out, …)`.
pub struct Conv {
    /// `(out, in, size, size)`.
    weight: Tensor,
    bias: Tensor,
    stride: usize,
    padding: usize,
}

impl Conv {
    /// Inputs, outputs and size of the filters; named `weight` and `bias`, and zero until drawn.
    pub fn new(
        [inputs, outputs, size]: [usize; 3],
        stride: usize,
        padding: usize,
        vb: VarBuilder<'_>,
    ) -> Result<Self> {
        let shape = (outputs, inputs, size, size);
        Ok(Self {
            weight: vb.get_with_hints(shape, "weight", Init::Const(0.0))?,
            bias: vb.get_with_hints(outputs, "bias", Init::Const(0.0))?,
            stride,
            padding,
        })
    }
}

impl Module for Conv {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let (batch, channels, height, width) = x.dims4()?;
        let (outputs, _, size, _) = self.weight.dims4()?;
        let pad = self.padding;
        let x = x.pad_with_zeros(2, pad, pad)?.pad_with_zeros(3, pad, pad)?;
        let padded = width + 2 * pad;
        let places = |length: usize| (length + 2 * pad - size) / self.stride + 1;
        let (rows, columns) = (places(height), places(width));
        let taps = (0..size).flat_map(|dy| (0..size).map(move |dx| (dy, dx)));
        let read = taps.flat_map(|(dy, dx)| {
            let at =
                move |i: usize, j: usize| (i * self.stride + dy) * padded + j * self.stride + dx;
            (0..rows).flat_map(move |i| (0..columns).map(move |j| at(i, j) as u32))
        });
        let read = Tensor::from_iter(read, x.device())?;
        let patches = x.flatten_from(2)?.index_select(&read, 2)?;
        let patches = patches.reshape((batch, channels * size * size, rows * columns))?;
        let y = self.weight.flatten_from(1)?.broadcast_matmul(&patches)?;
        let y = y.broadcast_add(&self.bias.reshape((outputs, 1))?)?;
        y.reshape((batch, outputs, rows, columns))
    }
}
