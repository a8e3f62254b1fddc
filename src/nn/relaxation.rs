//! A field by which the state relaxes towards the value of another field.

use candle_core::{Result, Tensor};

use crate::field::{autograd, Offer, Pullback, VectorField};
use crate::offer::Offered;
use crate::rows::Around;
use crate::state::State;
use crate::time::Time;

/// y' = f(t, y) − y, the field of a continuous-time recurrent network: y relaxes towards f(t, y).
///
/// States are those of f.  The field is integrated tile by tile if f is.
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_diffeq::nn::{Activation, Mlp, Relaxation};
/// use candle_diffeq::NeuralOde;
/// let vars = candle_nn::VarMap::new();
/// let ode = NeuralOde::from_field(&vars, "f", DType::F32, &Device::Cpu, |vb| {
///     Ok(Relaxation::new(Mlp::new(&[2, 64, 2], Activation::Tanh, vb)?))
/// })?;
/// let ys = ode.solve(&Tensor::ones((8, 2), DType::F32, &Device::Cpu)?, &[0.0, 1.0])?;
/// assert_eq!(ys.dims(), [2, 8, 2]);
/// # Ok::<(), candle_diffeq::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Relaxation<F> {
    towards: F,
}

impl<F> Relaxation<F> {
    /// Towards the value of f.
    pub fn new(f: F) -> Self {
        Self { towards: f }
    }
}

/// x − y, leaf by leaf.
fn difference<S: State>(x: &S, y: &S) -> Result<S> {
    let leaves = x.leaves().into_iter().zip(y.leaves());
    let leaves = leaves.map(|(x, y)| x - y);
    Ok(S::from_leaves(leaves.collect::<Result<_>>()?)?)
}

impl<S: State + 'static, F: VectorField<S>> VectorField<S> for Relaxation<F> {
    fn velocity(&self, t: &Time, y: &S) -> Result<S> {
        difference(&self.towards.velocity(t, y)?, y)
    }

    fn vjp<'f>(&'f self, t: &Time, y: &S) -> Result<(S, Pullback<'f, S>)> {
        if self.towards.parameters().is_none() {
            return autograd::vjp(self, t, y);
        }
        let (k, pull_field) = self.towards.vjp(t, y)?;
        let pull = move |v: &S| {
            let mut pulled = pull_field(v)?;
            pulled.y = difference(&pulled.y, v)?;
            Ok(pulled)
        };
        Ok((difference(&k, &detached(y)?)?, Box::new(pull)))
    }

    fn parameters(&self) -> Option<Vec<Tensor>> {
        self.towards.parameters()
    }

    fn jumps(&self) -> Vec<f64> {
        self.towards.jumps()
    }

    fn offer(&self) -> Option<Offer> {
        let offered = Offered::from(self.towards.offer())?;
        Some(offered.around(Around::Relaxation, Relaxation::new).into())
    }
}

/// The same without history.
fn detached<S: State>(y: &S) -> Result<S> {
    Ok(S::from_leaves(
        y.leaves().iter().map(Tensor::detach).collect(),
    )?)
}
