//! Hamiltonian systems, with dissipation and without.

use candle_core::{DType, Result, Tensor, D};

use super::tiles::Turn;
use super::{half, through, Curved, Potential};
use crate::field::{autograd, Cotangents, Offer, Pullback, VectorField};
use crate::nn::linear::sum_of_rows;
use crate::nn::perceptron::part;
use crate::nn::{add_gradient, Jvp};
use crate::time::Time;

/// x' = J ∇H for x = (q, p): q' = ∂H/∂p, p' = −∂H/∂q, along which H does not change if it does not read t.
///
/// x: `(…, 2n)`, the n coordinates followed by their momenta.  With an [`EnergyMlp`](crate::nn::EnergyMlp) it is a
/// Hamiltonian neural network (arXiv 1906.01563), whose pull-back is written by hand.
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_diffeq::nn::energy::{Energy, Hamiltonian};
/// use candle_diffeq::nn::{Activation, EnergyMlp};
/// use candle_diffeq::NeuralOde;
/// let vars = candle_nn::VarMap::new();
/// let ode = NeuralOde::from_field(&vars, "h", DType::F32, &Device::Cpu, |vb| {
///     let energy = EnergyMlp::new(&[2, 64, 64, 1], Activation::Tanh, Energy::Output, vb)?;
///     Ok(Hamiltonian::new(energy))
/// })?;
/// let x0 = Tensor::ones((8, 2), DType::F32, &Device::Cpu)?;
/// let xs = ode.solve(&x0, &[0.0, 0.5, 1.0])?;
/// assert_eq!(xs.dims(), [3, 8, 2]);
/// # Ok::<(), candle_diffeq::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Hamiltonian<P> {
    energy: P,
}

const NAME: &str = "a Hamiltonian field";

/// (g_p, −g_q) of g = (g_q, g_p).
fn turned(g: &Tensor) -> Result<Tensor> {
    let n = half(g, NAME)?;
    Tensor::cat(&[part(g, n, n)?, part(g, 0, n)?.neg()?], D::Minus1)
}

/// The transposed map: (−v_p, v_q) of v = (v_q, v_p).
fn turned_back(v: &Tensor) -> Result<Tensor> {
    let n = half(v, NAME)?;
    Tensor::cat(&[part(v, n, n)?.neg()?, part(v, 0, n)?], D::Minus1)
}

impl<P: Potential> Hamiltonian<P> {
    /// The system of the Hamiltonian H.
    pub fn new(energy: P) -> Self {
        Self { energy }
    }

    /// H.
    pub fn energy(&self) -> &P {
        &self.energy
    }
}

impl<P: Potential> VectorField<Tensor> for Hamiltonian<P> {
    fn velocity(&self, t: &Time, x: &Tensor) -> Result<Tensor> {
        half(x, NAME)?;
        turned(&self.energy.gradient(t, x)?.1)
    }

    fn vjp<'f>(&'f self, t: &Time, x: &Tensor) -> Result<(Tensor, Pullback<'f, Tensor>)> {
        if self.energy.parameters().is_none() {
            return autograd::vjp(self, t, x);
        }
        half(x, NAME)?;
        let (g, pull) = self.energy.gradient_vjp(t, x)?;
        Ok((turned(&g)?, through(pull, turned_back)))
    }

    fn parameters(&self) -> Option<Vec<Tensor>> {
        self.energy.parameters()
    }

    fn offer(&self) -> Option<Offer> {
        self.energy.offer(Turn::Symplectic)
    }
}

impl<P: Curved> Jvp for Hamiltonian<P> {
    fn jvp(&self, t: &Time, x: &Tensor, tangent: &Tensor) -> Result<(Tensor, Tensor)> {
        half(x, NAME)?;
        let (g, bent) = self.energy.gradient_jvp(t, x, (0.0, tangent))?;
        Ok((turned(&g)?, turned(&bent)?))
    }
}

/// x' = (J − R) ∇H for x = (q, p): q' = ∂H/∂p, p' = −∂H/∂q − r ∘ ∂H/∂p with r = e^ρ > 0, so that
/// dH/dt = −Σ r (∂H/∂p)² ≤ 0.
///
/// x: `(…, 2n)`, ρ `(n)`, a parameter: the logarithms of n coefficients of friction.
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_diffeq::nn::energy::{Energy, PortHamiltonian};
/// use candle_diffeq::nn::{Activation, EnergyMlp};
/// use candle_diffeq::NeuralOde;
/// let vars = candle_nn::VarMap::new();
/// let ode = NeuralOde::from_field(&vars, "h", DType::F32, &Device::Cpu, |vb| {
///     let energy = EnergyMlp::new(&[4, 32, 1], Activation::Tanh, Energy::Output, vb.pp("energy"))?;
///     PortHamiltonian::new(energy, vb.get_with_hints(2, "friction", candle_nn::Init::Const(-2.0))?)
/// })?;
/// let xs = ode.solve(&Tensor::ones((8, 4), DType::F32, &Device::Cpu)?, &[0.0, 1.0])?;
/// assert_eq!(xs.dims(), [2, 8, 4]);
/// # Ok::<(), candle_diffeq::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct PortHamiltonian<P> {
    energy: P,
    friction: Tensor,
}

impl<P: Potential> PortHamiltonian<P> {
    /// The system of H with the logarithms ρ of the coefficients of friction.
    ///
    /// # Errors
    /// If ρ is no vector.
    pub fn new(energy: P, friction: Tensor) -> Result<Self> {
        friction.dims1()?;
        Ok(Self { energy, friction })
    }

    /// H.
    pub fn energy(&self) -> &P {
        &self.energy
    }

    /// n; whether x is a state of this field.
    fn check(&self, x: &Tensor) -> Result<usize> {
        let (n, frictions) = (half(x, NAME)?, self.friction.elem_count());
        if n != frictions {
            let field = format!("a PortHamiltonian field of {frictions} coefficients of friction");
            return Err(super::wrong_state(
                field,
                format!("x (…, {})", 2 * frictions),
                &[x],
            ));
        }
        Ok(n)
    }

    /// r in the dtype of x.
    fn rates(&self, x: &Tensor) -> Result<Tensor> {
        // In f32 at least: the exponential of a number that is rounded to bf16 is off by several roundings.
        let wide = match x.dtype() {
            DType::F64 => DType::F64,
            _ => DType::F32,
        };
        self.friction.to_dtype(wide)?.exp()?.to_dtype(x.dtype())
    }
}

/// (J − R) g.
fn damped(g: &Tensor, rates: &Tensor, n: usize) -> Result<Tensor> {
    let (of_q, of_p) = (part(g, 0, n)?, part(g, n, n)?);
    let force = (of_q + of_p.broadcast_mul(rates)?)?.neg()?;
    Tensor::cat(&[of_p, force], D::Minus1)
}

impl<P: Potential> VectorField<Tensor> for PortHamiltonian<P> {
    fn velocity(&self, t: &Time, x: &Tensor) -> Result<Tensor> {
        let n = self.check(x)?;
        damped(&self.energy.gradient(t, x)?.1, &self.rates(x)?, n)
    }

    fn vjp<'f>(&'f self, t: &Time, x: &Tensor) -> Result<(Tensor, Pullback<'f, Tensor>)> {
        if self.energy.parameters().is_none() {
            return autograd::vjp(self, t, x);
        }
        let n = self.check(x)?;
        let (g, pull_gradient) = self.energy.gradient_vjp(t, x)?;
        let rates = self.rates(x)?.detach();
        let k = damped(&g, &rates, n)?;
        let pull = move |v: &Tensor| -> Result<Cotangents<Tensor>> {
            // (−v_p, v_q − r ∘ v_p), and −Σ v_p r g_p of ρ.
            let (of_q, of_p) = (part(v, 0, n)?, part(v, n, n)?);
            let slowed = of_p.broadcast_mul(&rates)?;
            let mut pulled =
                pull_gradient(&Tensor::cat(&[of_p.neg()?, (of_q - &slowed)?], D::Minus1)?)?;
            if self.friction.track_op() {
                let products = (slowed * part(&g, n, n)?)?.neg()?.reshape(((), n))?;
                add_gradient(&mut pulled.params, &self.friction, sum_of_rows(&products)?)?;
            }
            Ok(pulled)
        };
        Ok((k, Box::new(pull)))
    }

    fn parameters(&self) -> Option<Vec<Tensor>> {
        let mut listed = self.energy.parameters()?;
        listed.extend(Some(&self.friction).filter(|p| p.track_op()).cloned());
        Some(listed)
    }
}
