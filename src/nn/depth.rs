//! What a field reads beside its state: time, and the data that the solve began with.

use candle_core::{Module, Result, Tensor, D};

use super::wrong_state;
use crate::field::FieldWithArgs;
use crate::time::Time;

/// x with time as one more channel of dimension `dim`, after the others.  With it, any layer can depend on time.
///
/// Time is rounded to the dtype of x, and receives its gradient.  [`Mlp::with_time`](super::Mlp::with_time) forms its
/// product with time in the precision of the state instead; prefer it if the field is a perceptron.
///
/// ```
/// use candle_core::{DType, Device, Module, Tensor};
/// use candle_diffeq::nn::{depth_cat, Linear};
/// use candle_diffeq::{NeuralOde, Time};
/// let vars = candle_nn::VarMap::new();
/// let ode = NeuralOde::from_field(&vars, "f", DType::F32, &Device::Cpu, |vb| {
///     let (l1, l2) = (Linear::new(3, 64, vb.pp("l1"))?, Linear::new(65, 2, vb.pp("l2"))?);
///     Ok(move |t: &Time, y: &Tensor| {
///         let hidden = l1.forward(&depth_cat(t, y, 1)?)?.tanh()?;
///         l2.forward(&depth_cat(t, &hidden, 1)?)
///     })
/// })?;
/// let ys = ode.solve(&Tensor::ones((8, 2), DType::F32, &Device::Cpu)?, &[0.0, 1.0])?;
/// assert_eq!(ys.dims(), [2, 8, 2]);
/// # Ok::<(), candle_diffeq::Error>(())
/// ```
///
/// # Errors
/// If x has no such dimension; those of candle's operations.
pub fn depth_cat(t: &Time, x: &Tensor, dim: usize) -> Result<Tensor> {
    let mut shape = x.dims().to_vec();
    if dim >= shape.len() {
        let needs = format!("x of more than {dim} dimensions");
        return Err(wrong_state("depth_cat".into(), needs, &[x]));
    }
    shape[dim] = 1;
    // In this order the gradient of time is summed in its own dtype.
    let t = t.tensor()?.broadcast_as(shape)?.to_dtype(x.dtype())?;
    Tensor::cat(&[x, &t], dim)
}

/// f(t, y, x) = m([y, x]) for a module m: a field that sees the data x that its solve began with, or any other arguments, at
/// every time ("Dissecting Neural ODEs", arXiv 2002.08071, section 5).
///
/// y and x have the same shape but for the dimension on which they are joined, by default the last.  x is given as
/// the arguments of the solve and receives its gradient.  For a perceptron use
/// [`ConditionalMlp`](super::ConditionalMlp), which does the same with a pull-back written by hand.
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_diffeq::nn::{Activation, DataControl, Perceptron};
/// use candle_diffeq::NeuralOde;
/// let vars = candle_nn::VarMap::new();
/// let ode = NeuralOde::with_args(&vars, "f", DType::F32, &Device::Cpu, |vb| {
///     Ok(DataControl::new(Perceptron::new(&[4, 64, 2], Activation::Tanh, vb)?))
/// })?;
/// let x = Tensor::ones((8, 2), DType::F32, &Device::Cpu)?;
/// let ys = ode.given(&x).solve(&x, &[0.0, 1.0])?;
/// assert_eq!(ys.dims(), [2, 8, 2]);
/// # Ok::<(), candle_diffeq::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct DataControl<M> {
    module: M,
    dim: Option<usize>,
}

impl<M: Module> DataControl<M> {
    /// A module of the state and the data, joined on the last dimension.
    pub fn new(module: M) -> Self {
        Self { module, dim: None }
    }

    /// Joined on another dimension, 1 for images.
    #[must_use]
    pub fn on(self, dim: usize) -> Self {
        Self {
            dim: Some(dim),
            ..self
        }
    }
}

impl<M: Module> FieldWithArgs<Tensor, Tensor> for DataControl<M> {
    fn velocity(&self, _: &Time, y: &Tensor, x: &Tensor) -> Result<Tensor> {
        let x = x.to_dtype(y.dtype())?;
        let joined = match self.dim {
            Some(dim) => Tensor::cat(&[y, &x], dim)?,
            None => Tensor::cat(&[y, &x], D::Minus1)?,
        };
        self.module.forward(&joined)
    }

    fn is_traced(&self) -> bool {
        true
    }
}
