//! A perceptron whose first layer reads arguments beside the state.

use candle_core::{Result, Tensor, D};
use candle_nn::{Linear, VarBuilder};

use super::mlp::Affine;
use super::{add_gradient, wrong_state, Activation, Mlp};
use crate::field::{Cotangents, FieldWithArgs, Pullback, VectorField};
use crate::time::Time;

/// f(t, y, a) = W_L σ(… σ(W_1 [y, a, t] + b_1) …) + b_L, with `[out, in]` weights: an [`Mlp`] with arguments, such as
/// the output of an encoder.
///
/// y: `(…, features)`, a: `(…, args)` with the same rows; every row is mapped on its own.  It runs in candle's
/// operations with a pull-back written by hand.
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_diffeq::nn::{Activation, ConditionalMlp};
/// use candle_diffeq::NeuralOde;
/// let (vars, device) = (candle_nn::VarMap::new(), Device::Cpu);
/// let ode = NeuralOde::with_args(&vars, "f", DType::F32, &device, |vb| {
///     ConditionalMlp::new(&[2, 64, 2], 3, Activation::Tanh, vb)    // f.0.weight (64, 2 + 3), …
/// })?;
/// let context = Tensor::ones((8, 3), DType::F32, &device)?;
/// let ys = ode.given(&context).solve(&Tensor::ones((8, 2), DType::F32, &device)?, &[0.0, 1.0])?;
/// assert_eq!(ys.dims(), [2, 8, 2]);
/// # Ok::<(), candle_diffeq::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct ConditionalMlp {
    /// Over the state and the arguments beside it, which stand still: the last layer has rows of zeros
    /// for them.
    whole: Mlp,
    /// The last layer as it is.
    last: Affine,
    args: usize,
}

impl ConditionalMlp {
    /// Layers of these widths, first features to last, the first with `args` more inputs after the
    /// features; names and initial values as those of [`Mlp::new`].
    ///
    /// # Errors
    /// Those of the builder; fewer than two widths, or one that is 0.
    pub fn new(
        widths: &[usize],
        args: usize,
        activation: Activation,
        vb: VarBuilder<'_>,
    ) -> Result<Self> {
        Self::build(widths, args, activation, false, vb)
    }

    /// Like [`new`](Self::new), with time as the last input of the first layer, after the arguments.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn with_time(
        widths: &[usize],
        args: usize,
        activation: Activation,
        vb: VarBuilder<'_>,
    ) -> Result<Self> {
        Self::build(widths, args, activation, true, vb)
    }

    fn build(
        widths: &[usize],
        args: usize,
        activation: Activation,
        time: bool,
        vb: VarBuilder<'_>,
    ) -> Result<Self> {
        if widths.contains(&0) {
            candle_core::bail!("a ConditionalMlp of widths {widths:?}: each must be at least 1")
        }
        let layer = |(i, w): (usize, &[usize])| {
            let more = if i == 0 { args + usize::from(time) } else { 0 };
            candle_nn::linear(w[0] + more, w[1], vb.pp(i))
        };
        let layers = widths.windows(2).enumerate().map(layer);
        let mut layers = layers.collect::<Result<Vec<_>>>()?;
        let Some(last) = layers.pop() else {
            candle_core::bail!("a ConditionalMlp needs a layer")
        };
        let Some(bias) = last.bias() else {
            candle_core::bail!("a ConditionalMlp needs biases")
        };
        let (weight, bias) = (last.weight().clone(), bias.clone());
        layers.push(Linear::new(
            weight.pad_with_zeros(0, 0, args)?,
            Some(bias.pad_with_zeros(0, 0, args)?),
        ));
        Ok(Self {
            whole: Mlp::from_layers(&layers, activation, time)?,
            last: Affine { weight, bias },
            args,
        })
    }

    /// Features of the state.
    pub fn features(&self) -> usize {
        self.last.outputs()
    }

    /// The state and the arguments beside it.
    fn beside(&self, y: &Tensor, args: &Tensor) -> Result<Tensor> {
        let (features, width) = (self.features(), self.args);
        let rows = |x: &Tensor, last: usize| match x.dims().split_last() {
            Some((l, rows)) if *l == last => Some(rows.to_vec()),
            _ => None,
        };
        let same = rows(y, features).is_some_and(|r| rows(args, width) == Some(r));
        if !same {
            let field = format!("a ConditionalMlp of {features} features and {width} arguments");
            let needs = format!("y (…, {features}) and arguments (…, {width}) with the same rows");
            return Err(wrong_state(field, needs, &[y, args]));
        }
        Tensor::cat(&[y, &args.to_dtype(y.dtype())?], D::Minus1)
    }
}

impl FieldWithArgs<Tensor, Tensor> for ConditionalMlp {
    fn velocity(&self, t: &Time, y: &Tensor, args: &Tensor) -> Result<Tensor> {
        let k = self.whole.velocity(t, &self.beside(y, args)?)?;
        k.narrow(D::Minus1, 0, self.features())?.contiguous()
    }

    fn vjp<'f>(
        &'f self,
        t: &Time,
        y: &Tensor,
        args: &Tensor,
    ) -> Result<(Tensor, Pullback<'f, Tensor>)> {
        let (features, args) = (self.features(), args.clone());
        let (k, pull_whole) = self.whole.vjp(t, &self.beside(y, &args)?.detach())?;
        let pull = move |v: &Tensor| {
            let v = v.pad_with_zeros(D::Minus1, 0, self.args)?;
            let mut whole = pull_whole(&v)?;
            // Of the last layer, the rows that are its own.
            let padded = self.whole.layers.last();
            for (padded, own) in [
                (padded.map(|l| &l.weight), &self.last.weight),
                (padded.map(|l| &l.bias), &self.last.bias),
            ] {
                if let Some(gradient) = padded.and_then(|p| whole.params.remove(p)) {
                    let gradient = gradient.narrow(0, 0, features)?.contiguous()?;
                    add_gradient(&mut whole.params, own, gradient)?;
                }
            }
            let of_args = whole.y.narrow(D::Minus1, features, self.args)?;
            add_gradient(&mut whole.params, &args, of_args.contiguous()?)?;
            Ok(Cotangents {
                y: whole.y.narrow(D::Minus1, 0, features)?.contiguous()?,
                t: whole.t,
                params: whole.params,
            })
        };
        let k = k.narrow(D::Minus1, 0, features)?.contiguous()?;
        Ok((k, Box::new(pull)))
    }

    fn parameters(&self) -> Option<Vec<Tensor>> {
        let layers = &self.whole.layers[..self.whole.layers.len() - 1];
        let all = layers.iter().chain([&self.last]);
        let all = all.flat_map(|l| [&l.weight, &l.bias]);
        Some(all.filter(|p| p.track_op()).cloned().collect())
    }
}
