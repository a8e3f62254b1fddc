//! Equations of higher order.

use candle_core::{Result, Tensor, D};

use super::perceptron::part;
use super::wrong_state;
use crate::field::{autograd, Cotangents, Pullback, VectorField};
use crate::time::Time;

/// x⁽ⁿ⁾ = f(t, x, x', …, x⁽ⁿ⁻¹⁾) as a field over the state (x, x', …, x⁽ⁿ⁻¹⁾).
///
/// State: `(…, n d)`, the n derivatives one after the other; f maps it to `(…, d)`.  f is a
/// [`Perceptron`](super::Perceptron) from n d to d features, whose pull-back is then written by hand, or a closure of time
/// and state.
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_diffeq::nn::{Activation, HigherOrder, Perceptron};
/// use candle_diffeq::NeuralOde;
/// let vars = candle_nn::VarMap::new();
/// let ode = NeuralOde::from_field(&vars, "f", DType::F32, &Device::Cpu, |vb| {
///     HigherOrder::new(Perceptron::new(&[4, 64, 2], Activation::Tanh, vb)?, 2)
/// })?;
/// // Positions and velocities of two features.
/// let xs = ode.solve(&Tensor::ones((8, 4), DType::F32, &Device::Cpu)?, &[0.0, 1.0])?;
/// assert_eq!(xs.dims(), [2, 8, 4]);
/// # Ok::<(), candle_diffeq::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct HigherOrder<F> {
    field: F,
    order: usize,
}

impl<F: VectorField<Tensor>> HigherOrder<F> {
    /// The equation of order n for its last derivative f.
    ///
    /// # Errors
    /// n = 0.
    pub fn new(f: F, n: usize) -> Result<Self> {
        if n == 0 {
            candle_core::bail!("the order of a HigherOrder field must be at least 1, got 0")
        }
        Ok(Self { field: f, order: n })
    }

    /// d.
    fn features(&self, x: &Tensor) -> Result<usize> {
        match x.dims().last() {
            Some(&all) if all > 0 && all % self.order == 0 => Ok(all / self.order),
            _ => {
                let (n, field) = (self.order, "a HigherOrder field");
                let needs = format!("x (…, {n} d), {n} derivatives one after the other");
                Err(wrong_state(field.to_owned(), needs, &[x]))
            }
        }
    }

    /// (x', …, x⁽ⁿ⁻¹⁾, k).
    fn join(&self, x: &Tensor, k: Tensor, d: usize) -> Result<Tensor> {
        let last = k.dims().last() == Some(&d) && k.rank() == x.rank();
        if !last {
            let field = format!(
                "a HigherOrder field of order {} of {d} features",
                self.order
            );
            let needs = format!("f to return (…, {d})");
            return Err(wrong_state(field, needs, &[&k]));
        }
        let rest = x.narrow(D::Minus1, d, (self.order - 1) * d)?;
        Tensor::cat(&[rest, k], D::Minus1)
    }
}

impl<F: VectorField<Tensor>> VectorField<Tensor> for HigherOrder<F> {
    fn velocity(&self, t: &Time, x: &Tensor) -> Result<Tensor> {
        let d = self.features(x)?;
        self.join(x, self.field.velocity(t, x)?, d)
    }

    fn is_traced(&self) -> bool {
        self.field.parameters().is_none()
    }

    fn vjp<'f>(&'f self, t: &Time, x: &Tensor) -> Result<(Tensor, Pullback<'f, Tensor>)> {
        if self.field.parameters().is_none() {
            return autograd::vjp(self, t, x);
        }
        let d = self.features(x)?;
        let (k, pull_last) = self.field.vjp(t, x)?;
        let k = self.join(&x.detach(), k, d)?;
        let pull = move |v: &Tensor| {
            let before = (self.order - 1) * d;
            let Cotangents { y, t, params } = pull_last(&part(v, before, d)?)?;
            // Each derivative is the velocity of the one before it.
            let shifted = v.narrow(D::Minus1, 0, before)?;
            let y = match before {
                0 => y,
                _ => (y + shifted.pad_with_zeros(D::Minus1, d, 0)?)?,
            };
            Ok(Cotangents { y, t, params })
        };
        Ok((k, Box::new(pull)))
    }

    fn parameters(&self) -> Option<Vec<Tensor>> {
        self.field.parameters()
    }

    fn jumps(&self) -> Vec<f64> {
        self.field.jumps()
    }
}
