//! Potentials, and the fields that are built from their gradients.
//!
//! A potential Φ(t, x) gives one number for every row of x.  Its gradient ∇Φ is written in ordinary operations, so
//! that candle, which has no second derivatives, can differentiate it once more.  These fields can be built from any
//! [`Potential`]:
//!
//! | field | x' | along a solution, where Φ does not read t |
//! |---|---|---|
//! | [`GradientFlow`] | −∇Φ | Φ falls |
//! | [`Skew`] | ½ (M(x) − M(x)ᵀ) ∇Φ | Φ is constant |
//! | [`Hamiltonian`] | (∂H/∂p, −∂H/∂q), x = (q, p) | H is constant |
//! | [`PortHamiltonian`] | (∂H/∂p, −∂H/∂q − r ∘ ∂H/∂p) | H falls |
//! | [`Lagrangian`] | (q̇, M⁻¹(∂L/∂q − (∂²L/∂q̇∂q) q̇ − ∂²L/∂q̇∂t)), M = ∂²L/∂q̇∂q̇, x = (q, q̇) | the energy is constant |
//!
//! [`EnergyMlp`](super::EnergyMlp) is a potential with a pull-back of its gradient written by hand.  [`Hamiltonian`] and
//! [`GradientFlow`] of one are integrated tile by tile, if it has a hidden layer and none is residual.  A closure that returns
//! Φ and ∇Φ is a potential too:
//!
//! ```
//! use candle_core::{DType, Device, Tensor};
//! use candle_diffeq::{odeint, OdeOptions, Time};
//! use candle_diffeq::nn::energy::Hamiltonian;
//! use candle_diffeq::options::Steps;
//! // A pendulum: H = ½ p² + 1 − cos q.
//! let pendulum = Hamiltonian::new(|_: &Time, x: &Tensor| {
//!     let (q, p) = (x.narrow(1, 0, 1)?, x.narrow(1, 1, 1)?);
//!     let h = (((p.sqr()? * 0.5)? + 1.0)? - q.cos()?)?;
//!     Ok((h, Tensor::cat(&[q.sin()?, p], 1)?))
//! });
//! let x0 = Tensor::new(&[[1.0, 0.0]], &Device::Cpu)?;
//! let options = OdeOptions { steps: Steps::PerInterval(40), ..Default::default() };
//! let x = odeint(pendulum, &x0, &[0.0, 1.0], &options)?.get(1)?.to_vec2::<f64>()?;
//! let energy = 0.5 * x[0][1].powi(2) + 1.0 - x[0][0].cos();
//! assert!((energy - (1.0 - 1f64.cos())).abs() < 1e-8);
//! # Ok::<(), candle_diffeq::Error>(())
//! ```

mod flow;
mod hamiltonian;
mod lagrangian;
mod laplacian;
pub(super) mod mlp;
mod solve;
pub(super) mod tiles;

pub use flow::{GradientFlow, Skew};
pub use hamiltonian::{Hamiltonian, PortHamiltonian};
pub use lagrangian::Lagrangian;
pub use mlp::Energy;

use candle_core::{Result, Tensor, D};

use super::wrong_state;
use crate::field::{autograd, Cotangents, Offer, Pullback};
use crate::time::Time;
use tiles::Turn;

/// A scalar function Φ(t, x) of every row of x, with its gradient in x as a value.
///
/// Every closure `Fn(&Time, &Tensor) -> candle_core::Result<(Tensor, Tensor)>` that returns both is one.
#[diagnostic::on_unimplemented(
    message = "`{Self}` is not a potential",
    note = "a closure returns the potential and its gradient: `|t: &Time, x: &Tensor| Ok((phi, gradient))`"
)]
pub trait Potential {
    /// Φ(t, x), `(…, 1)`, and ∇Φ, of x's shape `(…, features)` and dtype, in operations that candle can trace to x and to
    /// the parameters.
    ///
    /// # Errors
    /// Whatever the model's operations return.
    fn gradient(&self, t: &Time, x: &Tensor) -> Result<(Tensor, Tensor)>;

    /// ∇Φ and its pull-back v ↦ (∇²Φ v, vᵀ∂∇Φ/∂t, vᵀ∂∇Φ/∂θ), for potentials that bring their own;
    /// together with [`parameters`](Self::parameters).  By default candle's autograd over one evaluation.
    ///
    /// # Errors
    /// As [`gradient`](Self::gradient).
    fn gradient_vjp<'f>(&'f self, t: &Time, x: &Tensor) -> Result<(Tensor, Pullback<'f, Tensor>)> {
        let gradient = |t: &Time, x: &Tensor| -> Result<Tensor> { Ok(self.gradient(t, x)?.1) };
        autograd::vjp(&gradient, t, x)
    }

    /// The parameters that [`gradient_vjp`](Self::gradient_vjp) returns gradients of, as
    /// [`VectorField::parameters`](crate::VectorField::parameters); `None` (the default) lets the solver find them.
    fn parameters(&self) -> Option<Vec<Tensor>> {
        None
    }

    /// What the field x' = A ∇Φ offers to the solver, for potentials of this crate.
    #[doc(hidden)]
    fn offer(&self, _turn: Turn) -> Option<Offer> {
        None
    }
}

impl<F> Potential for F
where
    F: Fn(&Time, &Tensor) -> Result<(Tensor, Tensor)>,
{
    fn gradient(&self, t: &Time, x: &Tensor) -> Result<(Tensor, Tensor)> {
        self(t, x)
    }
}

/// A potential whose Hessian ∇²Φ can be multiplied with vectors.
pub trait Curved: Potential {
    /// ∇Φ and its derivative along the tangent (ṫ, ẋ), ṫ ∂∇Φ/∂t + ∇²Φ ẋ, both of the shape and dtype of x and ẋ, in
    /// operations that candle can trace to x, ẋ and the parameters.  A potential that does not read t ignores ṫ.
    ///
    /// # Errors
    /// Whatever the model's operations return.
    fn gradient_jvp(
        &self,
        t: &Time,
        x: &Tensor,
        tangent: (f64, &Tensor),
    ) -> Result<(Tensor, Tensor)>;

    /// ∇²Φ, `(…, features, features)`, for x `(…, features)`: its products with all unit vectors, as one batch.
    ///
    /// # Errors
    /// As [`gradient_jvp`](Self::gradient_jvp).
    fn hessian(&self, t: &Time, x: &Tensor) -> Result<Tensor> {
        let (features, wanted) = (x.dim(D::Minus1)?, x.dims());
        let columns = self.hessian_columns(t, x, 0..features)?;
        let shape = [wanted, &[features]].concat();
        columns.transpose(0, 1)?.contiguous()?.reshape(shape)
    }

    /// tr ∇²Φ, `(…, 1)`.
    ///
    /// # Errors
    /// As [`gradient_jvp`](Self::gradient_jvp).
    fn laplacian(&self, t: &Time, x: &Tensor) -> Result<Tensor> {
        let features = x.dim(D::Minus1)?;
        let columns = self.hessian_columns(t, x, 0..features)?;
        let unit = Tensor::eye(features, x.dtype(), x.device())?.unsqueeze(1)?;
        let trace = columns.broadcast_mul(&unit)?.sum(2)?.sum(0)?;
        trace.reshape([&x.dims()[..x.rank() - 1], &[1]].concat())
    }

    /// The columns ∇²Φ e_i for i in `range`, `(column, row, feature)`, in one evaluation.
    #[doc(hidden)]
    fn hessian_columns(
        &self,
        t: &Time,
        x: &Tensor,
        range: std::ops::Range<usize>,
    ) -> Result<Tensor> {
        let (features, columns) = (x.dim(D::Minus1)?, range.len());
        let x = x.reshape(((), features))?;
        let rows = x.dim(0)?;
        let unit = Tensor::eye(features, x.dtype(), x.device())?.narrow(0, range.start, columns)?;
        let unit = unit.unsqueeze(1)?.broadcast_as((columns, rows, features))?;
        let unit = unit.reshape((columns * rows, features))?;
        let all = Tensor::cat(&vec![&x; columns], 0)?;
        let (_, products) = self.gradient_jvp(t, &all, (0.0, &unit))?;
        products.reshape((columns, rows, features))
    }
}

/// n of x = (q, p), both `(…, n)`.
fn half(x: &Tensor, field: &str) -> Result<usize> {
    match x.dims().last() {
        Some(&features) if features > 0 && features % 2 == 0 => Ok(features / 2),
        _ => {
            let needs = "x (…, 2n), the n coordinates followed by as many momenta or velocities";
            Err(wrong_state(field.to_owned(), needs.to_owned(), &[x]))
        }
    }
}

/// The pull-back of x' = A ∇Φ for a linear map A, of which `transposed` is Aᵀ.
fn through<'f>(
    pull_gradient: Pullback<'f, Tensor>,
    transposed: impl Fn(&Tensor) -> Result<Tensor> + 'f,
) -> Pullback<'f, Tensor> {
    Box::new(move |v: &Tensor| -> Result<Cotangents<Tensor>> { pull_gradient(&transposed(v)?) })
}
