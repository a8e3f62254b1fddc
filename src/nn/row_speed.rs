//! A field whose rows have time scales of their own.

use candle_core::{DType, Result, Tensor};

use super::wrong_state;
use crate::field::{autograd, Cotangents, Offer, Pullback, VectorField};
use crate::offer::Offered;
use crate::rows::Around;
use crate::state::State;
use crate::time::Time;

/// x' = e^s f(t, x), s' = 0: the velocity of each row of the batch is multiplied by a factor e^s of this row.
///
/// The state is (x, s), where x is the state of f, and s has a number for each row: as many dimensions as x, of which
/// the last one, or the last ones, are 1.  So s is `(…, 1)` for an [`Mlp`](super::Mlp) over `(…, features)`, and
/// `(batch, 1, 1, 1)` for a [`ConvField`](super::ConvField) over images.  For a field of two tensors, such as
/// [`Cnf`](super::Cnf), the state is (z, l, s).  s has a gradient.
///
/// On \[0, 1\] with s = ln Δ, a row is integrated over a time Δ.  An ODE-RNN needs this, because each row has its own
/// times of observation.  A Δ of zero has no logarithm; leave out its row, which does not move.
///
/// The field is integrated tile by tile if f is.  Adaptive steps are then controlled for every row by itself: a slow
/// row takes few steps, whatever the other rows of the batch do.  In f32, tiles hold e^s between e^−87 and e^87.
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_diffeq::{NeuralOde, OdeOptions};
/// use candle_diffeq::nn::{Activation, Mlp, RowSpeed};
/// use candle_diffeq::options::{Adaptive, Steps};
/// use candle_diffeq::tableau::DOPRI5;
/// let vars = candle_nn::VarMap::new();
/// let ode = NeuralOde::from_field(&vars, "f", DType::F32, &Device::Cpu, |vb| {
///     Ok(RowSpeed::new(Mlp::new(&[2, 64, 2], Activation::Tanh, vb)?))
/// })?;
/// let ode = ode.options(OdeOptions {
///     method: DOPRI5,
///     steps: Steps::Adaptive(Adaptive::new(1e-4, 1e-6)),
///     ..OdeOptions::default()
/// });
/// let x0 = Tensor::ones((3, 2), DType::F32, &Device::Cpu)?;
/// let gaps = Tensor::new(&[[0.1f32], [1.0], [7.0]], &Device::Cpu)?;
/// let (xs, _) = ode.solve(&(x0, gaps.log()?), &[0.0, 1.0])?;
/// assert_eq!(xs.dims(), [2, 3, 2]);
/// # Ok::<(), candle_diffeq::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct RowSpeed<F> {
    field: F,
}

impl<F> RowSpeed<F> {
    /// The field f at the speed of each row.
    pub fn new(f: F) -> Self {
        Self { field: f }
    }
}

/// A state of one more tensor than that of the field inside a [`RowSpeed`]: the last one is s.
pub trait WithSpeed: State + 'static {
    /// The state of the field inside.
    type Inside: State + 'static;
}

impl WithSpeed for (Tensor, Tensor) {
    type Inside = Tensor;
}

impl WithSpeed for (Tensor, Tensor, Tensor) {
    type Inside = (Tensor, Tensor);
}

impl WithSpeed for Vec<Tensor> {
    type Inside = Vec<Tensor>;
}

/// The state of the field inside, and s; an error if these do not belong together.
fn split<S: WithSpeed>(y: &S) -> Result<(S::Inside, Tensor)> {
    let mut leaves = y.leaves();
    let fits = |s: &Tensor, x: &Tensor| {
        let each = s.dims().iter().zip(x.dims());
        s.rank() == x.rank() && each.into_iter().all(|(s, x)| *s == 1 || s == x)
    };
    match leaves.pop() {
        Some(s) if s.dims().last() == Some(&1) && leaves.iter().all(|x| fits(&s, x)) => {
            Ok((S::Inside::from_leaves(leaves)?, s))
        }
        s => {
            let needs = "s as the last tensor, with as many dimensions as each other tensor, of the same sizes or 1, the last \
                         one 1";
            let got: Vec<_> = leaves.iter().chain(&s).collect();
            Err(wrong_state("a RowSpeed".into(), needs.into(), &got))
        }
    }
}

/// The state of the field inside times a number for each row, in the wider dtype of both.
fn times<S: State>(x: &S, factor: &Tensor) -> Result<S> {
    let leaves = x.leaves();
    let times = |x: &Tensor| match x.dtype().size_in_bytes() > factor.dtype().size_in_bytes() {
        true => x.broadcast_mul(&factor.to_dtype(x.dtype())?),
        false => {
            let product = x.to_dtype(factor.dtype())?.broadcast_mul(factor)?;
            product.to_dtype(x.dtype())
        }
    };
    let leaves = leaves.iter().map(times);
    Ok(S::from_leaves(leaves.collect::<Result<_>>()?)?)
}

fn join<S: WithSpeed>(x: &S::Inside, s: Tensor) -> Result<S> {
    let mut leaves = x.leaves();
    leaves.push(s);
    Ok(S::from_leaves(leaves)?)
}

/// Σ v k over all that is one row of s, in its shape and dtype.
fn row_sums<S: State>(v: &S, k: &S, s: &Tensor) -> Result<Tensor> {
    // A row may be long: sums are not in low precision.
    let wide = match s.dtype() {
        DType::F64 => DType::F64,
        _ => DType::F32,
    };
    let mut sum = Tensor::zeros(s.shape(), wide, s.device())?;
    for (v, k) in v.leaves().iter().zip(k.leaves()) {
        let mut product = (v.to_dtype(wide)? * k.to_dtype(wide)?)?;
        for (dim, &size) in s.dims().iter().enumerate() {
            if size == 1 && product.dim(dim)? > 1 {
                product = product.sum_keepdim(dim)?;
            }
        }
        sum = (sum + product)?;
    }
    sum.to_dtype(s.dtype())
}

impl<S: WithSpeed, F: VectorField<S::Inside>> VectorField<S> for RowSpeed<F> {
    fn velocity(&self, t: &Time, y: &S) -> Result<S> {
        let (x, s) = split(y)?;
        let k = self.field.velocity(t, &x)?;
        join(&times(&k, &s.exp()?)?, s.zeros_like()?)
    }

    fn vjp<'f>(&'f self, t: &Time, y: &S) -> Result<(S, Pullback<'f, S>)> {
        if self.field.parameters().is_none() {
            return autograd::vjp(self, t, y);
        }
        let (x, s) = split(y)?;
        let factor = s.detach().exp()?;
        let (k, pull_field) = self.field.vjp(t, &x)?;
        let k = times(&k, &factor)?;
        let velocity = join(&k, s.zeros_like()?)?;
        let s = s.detach();
        let pull = move |v: &S| {
            let (v, _) = split(v)?;
            let Cotangents { y, t, params } = pull_field(&times(&v, &factor)?)?;
            Ok(Cotangents {
                y: join(&y, row_sums(&v, &k, &s)?)?,
                t,
                params,
            })
        };
        Ok((velocity, Box::new(pull)))
    }

    fn parameters(&self) -> Option<Vec<Tensor>> {
        self.field.parameters()
    }

    fn jumps(&self) -> Vec<f64> {
        self.field.jumps()
    }

    fn offer(&self) -> Option<Offer> {
        let offered = Offered::from(self.field.offer())?;
        Some(offered.around(Around::RowSpeed, RowSpeed::new).into())
    }

    fn is_constant_in(&self, leaf: usize) -> bool {
        self.field.is_constant_in(leaf)
    }
}
