//! Losses that are integrals along a solution.

use candle_core::{Result, Tensor};

use super::wrong_state;
use crate::field::autograd::check_traced;
use crate::field::VectorField;
use crate::precision::Precision;
use crate::time::Time;

/// x' = f(t, x) together with the running cost ℓ' = l(t, x), so that ℓ(T) = ∫ l dt: a loss of the whole solution.
///
/// The state is (x, ℓ), ℓ `(…, 1)` or any shape that l returns.  The gradient is that of the discrete scheme, as of any
/// other state: a method of order p integrates the cost to order p.  The cost is computed in the dtype of ℓ: with
/// [`cost_precision`] in the options it is formed and summed in the precision of the state, whatever that of x is.
///
/// Both are differentiated by candle's graph, also where f has a pull-back of its own.
///
/// ```
/// use candle_core::{DType, Device, Tensor, D};
/// use candle_diffeq::nn::{cost_precision, Activation, Mlp, WithIntegral};
/// use candle_diffeq::{NeuralOde, OdeOptions, Precision, Time};
/// let vars = candle_nn::VarMap::new();
/// let ode = NeuralOde::from_field(&vars, "f", DType::F32, &Device::Cpu, |vb| {
///     // ∫ |x|² dt.
///     let cost = |_: &Time, x: &Tensor| x.sqr()?.sum_keepdim(D::Minus1);
///     Ok(WithIntegral::new(Mlp::new(&[2, 16, 2], Activation::Tanh, vb)?, cost))
/// })?
/// .options(OdeOptions {
///     leaf_precision: cost_precision(Precision::bf16()),
///     ..OdeOptions::default()
/// });
/// let x0 = Tensor::ones((8, 2), DType::F32, &Device::Cpu)?;
/// let none = Tensor::zeros((8, 1), DType::F32, &Device::Cpu)?;
/// let (xs, costs) = ode.solve(&(x0, none), &[0.0, 0.5, 1.0])?;
/// costs.get(2)?.mean_all()?.backward()?;
/// assert_eq!(xs.dims(), [3, 8, 2]);
/// # Ok::<(), candle_diffeq::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct WithIntegral<F, L> {
    field: F,
    cost: L,
}

impl<F, L> WithIntegral<F, L>
where
    F: VectorField<Tensor>,
    L: Fn(&Time, &Tensor) -> Result<Tensor>,
{
    /// The field f with the running cost l, written in ordinary operations.
    pub fn new(f: F, l: L) -> Self {
        Self { field: f, cost: l }
    }
}

/// Precisions for [`OdeOptions::leaf_precision`](crate::OdeOptions::leaf_precision) of a state (x, ℓ): x as given, the
/// cost ℓ in state precision.
pub fn cost_precision(precision: Precision) -> Vec<Precision> {
    vec![precision, Precision::new(precision.state, precision.state)]
}

impl<F, L> VectorField<(Tensor, Tensor)> for WithIntegral<F, L>
where
    F: VectorField<Tensor>,
    L: Fn(&Time, &Tensor) -> Result<Tensor>,
{
    fn velocity(&self, t: &Time, (x, cost): &(Tensor, Tensor)) -> Result<(Tensor, Tensor)> {
        let k = self.field.velocity(t, x)?;
        check_traced("a WithIntegral", &self.field, x, &k)?;
        let l = (self.cost)(t, &x.to_dtype(cost.dtype())?)?;
        if l.dims() != cost.dims() {
            let needs = format!("a cost {:?}, as its running cost is", l.dims());
            return Err(wrong_state("a WithIntegral".into(), needs, &[cost]));
        }
        Ok((k, l.to_dtype(cost.dtype())?))
    }

    fn is_traced(&self) -> bool {
        true
    }

    fn jumps(&self) -> Vec<f64> {
        self.field.jumps()
    }
}
