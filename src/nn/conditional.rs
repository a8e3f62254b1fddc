//! A perceptron whose first layer reads arguments beside the state.

use candle_core::{Result, Tensor, D};
use candle_nn::VarBuilder;

use super::{add_gradient, wrong_state, Activation, Mlp};
use crate::field::{Cotangents, FieldWithArgs, Pullback};
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
    /// From the state and the arguments beside it to the velocity.
    whole: Mlp,
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
        if widths.first() != widths.last() {
            candle_core::bail!(
                "a ConditionalMlp of widths {widths:?} does not map a state to its velocity"
            )
        }
        let layers = widths.windows(2).enumerate().map(layer);
        let layers = layers.collect::<Result<Vec<_>>>()?;
        let whole = Mlp::of_any("a ConditionalMlp", &layers, activation, time)?;
        Ok(Self { whole, args })
    }

    /// Features of the state.
    pub fn features(&self) -> usize {
        self.whole.features()
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
        self.whole.value_of_any(t, &self.beside(y, args)?)
    }

    fn vjp<'f>(
        &'f self,
        t: &Time,
        y: &Tensor,
        args: &Tensor,
    ) -> Result<(Tensor, Pullback<'f, Tensor>)> {
        let (features, args) = (self.features(), args.clone());
        let (k, pull_whole) = self.whole.vjp_of_any(t, &self.beside(y, &args)?)?;
        let pull = move |v: &Tensor| {
            let mut whole = pull_whole(v)?;
            let of_args = whole.y.narrow(D::Minus1, features, self.args)?;
            add_gradient(&mut whole.params, &args, of_args.contiguous()?)?;
            Ok(Cotangents {
                y: whole.y.narrow(D::Minus1, 0, features)?.contiguous()?,
                t: whole.t,
                params: whole.params,
            })
        };
        Ok((k, Box::new(pull)))
    }

    fn parameters(&self) -> Option<Vec<Tensor>> {
        let tracked = self.whole.tensors().filter(|p| p.track_op());
        Some(tracked.cloned().collect())
    }
}
