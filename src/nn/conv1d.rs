//! Convolutions of sequences, as products with patches.

use candle_core::{Module, Result, Tensor};
use candle_nn::{Conv1dConfig, VarBuilder};

use super::linear::affine;
use super::{wrong_state, Checked};

/// y = w ∗ x + b over sequences: x `(batch, in, length)`, w `(out, in / groups, size)`, b `(out)`,
/// y `(batch, out, ⌊(length + 2 padding − dilation (size − 1) − 1) / stride⌋ + 1)`.
///
/// Takes the place of [`candle_nn::Conv1d`] in any model: the same names, shapes and initial values.
/// candle's own gives filters a wrong gradient on the CPU where the batch is larger than one.  This one
/// is a product of patches, in every float dtype.
///
/// ```
/// use candle_core::{DType, Device, Module, Tensor};
/// use candle_diffeq::nn::conv1d;
/// let vars = candle_nn::VarMap::new();
/// let vb = candle_nn::VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
/// let config = candle_nn::Conv1dConfig { padding: 1, ..Default::default() };
/// let layer = conv1d(3, 5, 3, config, vb)?;                          // weight, bias
/// let y = layer.forward(&Tensor::ones((2, 3, 8), DType::F32, &Device::Cpu)?)?;
/// assert_eq!(y.dims(), [2, 5, 8]);
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Conv1d {
    weight: Tensor,
    bias: Option<Tensor>,
    config: Conv1dConfig,
}

impl Conv1d {
    /// A layer made of filters and biases that exist.
    pub fn new(weight: Tensor, bias: Option<Tensor>, config: Conv1dConfig) -> Self {
        Self {
            weight,
            bias,
            config,
        }
    }

    /// Padding, stride, dilation and groups.
    pub fn config(&self) -> &Conv1dConfig {
        &self.config
    }

    /// w.
    pub fn weight(&self) -> &Tensor {
        &self.weight
    }

    /// b.
    pub fn bias(&self) -> Option<&Tensor> {
        self.bias.as_ref()
    }

    /// The length of what comes out of sequences like x.
    fn length(&self, x: &Tensor) -> Result<usize> {
        let (weight, mut checked) = (&self.weight, Checked::new("nn::Conv1d"));
        checked.weight(0, weight, 3, "filters (outputs, inputs / groups, size)")?;
        let (outputs, inputs, size) = weight.dims3()?;
        if let Some(bias) = &self.bias {
            checked.bias(0, bias, outputs)?;
        }
        let Conv1dConfig {
            padding,
            stride,
            dilation,
            groups,
            ..
        } = self.config;
        if stride * dilation * groups * size == 0 || outputs % groups != 0 {
            candle_core::bail!(
                "nn::Conv1d: filters {:?} with {:?}",
                weight.dims(),
                self.config
            )
        }
        let (inputs, reach) = (inputs * groups, dilation * (size - 1) + 1);
        match x.dims() {
            &[_, of, length] if of == inputs && length + 2 * padding >= reach => {
                Ok((length + 2 * padding - reach) / stride + 1)
            }
            _ => Err(wrong_state(
                format!("a Conv1d of {inputs} channels"),
                format!("x (batch, {inputs}, length), at least {reach} long with its padding"),
                &[x],
            )),
        }
    }

    /// What the filters read of x, padded, at each place: `(batch, place, channel, tap)`.
    fn patches(&self, x: &Tensor, length: usize) -> Result<Tensor> {
        let Conv1dConfig {
            stride, dilation, ..
        } = self.config;
        let tap = |k: usize| {
            // Every stride-th element, from k dilations on.
            let read = x.narrow(2, k * dilation, (length - 1) * stride + 1)?;
            if stride == 1 {
                return Ok(read);
            }
            let (batch, channels, _) = x.dims3()?;
            let cut = read.pad_with_zeros(2, 0, stride - 1)?;
            let cut = cut.reshape((batch, channels, length, stride))?;
            cut.narrow(3, 0, 1)?.squeeze(3)
        };
        let taps = (0..self.weight.dim(2)?).map(tap);
        Tensor::stack(&taps.collect::<Result<Vec<_>>>()?, 3)?.transpose(1, 2)
    }
}

impl From<candle_nn::Conv1d> for Conv1d {
    fn from(layer: candle_nn::Conv1d) -> Self {
        Self::new(
            layer.weight().clone(),
            layer.bias().cloned(),
            *layer.config(),
        )
    }
}

impl Module for Conv1d {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let length = self.length(x)?;
        let (outputs, inputs, size) = self.weight.dims3()?;
        let (batch, groups) = (x.dim(0)?, self.config.groups);
        let padding = self.config.padding;
        let patches = self.patches(&x.pad_with_zeros(2, padding, padding)?, length)?;
        let part = outputs / groups;
        let group = |i: usize| {
            let read = patches.narrow(2, i * inputs, inputs)?;
            let read = read.reshape((batch * length, inputs * size))?;
            let weight = self.weight.narrow(0, i * part, part)?;
            let weight = weight.reshape((part, inputs * size))?;
            let bias = self.bias.as_ref().map(|b| b.narrow(0, i * part, part));
            affine(&read, &weight, bias.transpose()?.as_ref())
        };
        let y = (0..groups).map(group).collect::<Result<Vec<_>>>()?;
        let y = Tensor::cat(&y, 1)?.reshape((batch, length, outputs))?;
        y.transpose(1, 2)?.contiguous()
    }
}

/// `weight` and `bias` of a builder, initialised as [`candle_nn::conv1d`] does.
///
/// # Errors
/// Those of the builder.
pub fn conv1d(
    in_channels: usize,
    out_channels: usize,
    kernel_size: usize,
    config: Conv1dConfig,
    vb: VarBuilder<'_>,
) -> Result<Conv1d> {
    candle_nn::conv1d(in_channels, out_channels, kernel_size, config, vb).map(Conv1d::from)
}

/// The same without bias, as [`candle_nn::conv1d_no_bias`].
///
/// # Errors
/// Those of the builder.
pub fn conv1d_no_bias(
    in_channels: usize,
    out_channels: usize,
    kernel_size: usize,
    config: Conv1dConfig,
    vb: VarBuilder<'_>,
) -> Result<Conv1d> {
    candle_nn::conv1d_no_bias(in_channels, out_channels, kernel_size, config, vb).map(Conv1d::from)
}
