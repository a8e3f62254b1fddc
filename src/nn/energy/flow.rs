//! Flows along a gradient, and orthogonal to it.

use candle_core::{Module, Result, Tensor};

use super::tiles::Turn;
use super::{through, Curved, Potential};
use crate::error::Error;
use crate::field::{autograd, Offer, Pullback, VectorField};
use crate::nn::{add_gradient, wrong_state, Jvp, Perceptron};
use crate::time::Time;

/// x' = −∇Φ, along which Φ falls if it does not read t.
///
/// x: `(…, features)`.  With [`Hutchinson`](crate::nn::Hutchinson) it is a continuous normalising flow along a
/// gradient.
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_diffeq::nn::energy::{Energy, GradientFlow};
/// use candle_diffeq::nn::{Activation, EnergyMlp};
/// use candle_diffeq::NeuralOde;
/// let vars = candle_nn::VarMap::new();
/// let ode = NeuralOde::from_field(&vars, "e", DType::F32, &Device::Cpu, |vb| {
///     let energy = EnergyMlp::new(&[2, 64, 64, 1], Activation::Softplus, Energy::Output, vb)?;
///     Ok(GradientFlow::new(energy))
/// })?;
/// let xs = ode.solve(&Tensor::ones((8, 2), DType::F32, &Device::Cpu)?, &[0.0, 1.0])?;
/// assert_eq!(xs.dims(), [2, 8, 2]);
/// # Ok::<(), candle_diffeq::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct GradientFlow<P> {
    energy: P,
}

impl<P: Potential> GradientFlow<P> {
    /// The flow of the potential.
    pub fn new(energy: P) -> Self {
        Self { energy }
    }

    /// Φ.
    pub fn energy(&self) -> &P {
        &self.energy
    }
}

impl<P: Potential> VectorField<Tensor> for GradientFlow<P> {
    fn velocity(&self, t: &Time, x: &Tensor) -> Result<Tensor> {
        self.energy.gradient(t, x)?.1.neg()
    }

    fn vjp<'f>(&'f self, t: &Time, x: &Tensor) -> Result<(Tensor, Pullback<'f, Tensor>)> {
        if self.energy.parameters().is_none() {
            return autograd::vjp(self, t, x);
        }
        let (g, pull) = self.energy.gradient_vjp(t, x)?;
        Ok((g.neg()?, through(pull, Tensor::neg)))
    }

    fn parameters(&self) -> Option<Vec<Tensor>> {
        self.energy.parameters()
    }

    fn offer(&self) -> Option<Offer> {
        self.energy.offer(Turn::Down)
    }
}

impl<P: Curved> Jvp for GradientFlow<P> {
    fn jvp(&self, t: &Time, x: &Tensor, tangent: &Tensor) -> Result<(Tensor, Tensor)> {
        let (g, bent) = self.energy.gradient_jvp(t, x, (0.0, tangent))?;
        Ok((g.neg()?, bent.neg()?))
    }
}

/// x' = ½ (M(x) − M(x)ᵀ) ∇Φ, along which Φ does not change, since vᵀ(M − Mᵀ)v = 0.
///
/// x: `(…, features)`; M is a network from the features to features² numbers, read as the rows of a matrix.
/// "Stable Neural Flows" (arXiv 2003.08063), section 4.
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_diffeq::nn::energy::{Energy, Skew};
/// use candle_diffeq::nn::{Activation, EnergyMlp, Perceptron};
/// use candle_diffeq::NeuralOde;
/// let vars = candle_nn::VarMap::new();
/// let ode = NeuralOde::from_field(&vars, "f", DType::F32, &Device::Cpu, |vb| {
///     let energy = EnergyMlp::new(&[2, 64, 1], Activation::Tanh, Energy::Output, vb.pp("energy"))?;
///     Skew::new(energy, Perceptron::new(&[2, 16, 4], Activation::Tanh, vb.pp("matrix"))?)
/// })?;
/// let xs = ode.solve(&Tensor::ones((8, 2), DType::F32, &Device::Cpu)?, &[0.0, 1.0])?;
/// assert_eq!(xs.dims(), [2, 8, 2]);
/// # Ok::<(), candle_diffeq::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Skew<P> {
    energy: P,
    matrix: Perceptron,
}

impl<P: Potential> Skew<P> {
    /// The flow of the potential orthogonal to its gradient, in a direction that M determines.
    ///
    /// # Errors
    /// If M does not put out the square of its features.
    pub fn new(energy: P, matrix: Perceptron) -> Result<Self> {
        let (inputs, outputs) = (matrix.inputs(), matrix.outputs());
        if outputs != inputs * inputs {
            let layer = "nn::energy::Skew, the matrix".to_owned();
            return Err(Error::LayerTensor {
                layer,
                tensor: "last weight",
                expected: format!("of {} outputs, {inputs} × {inputs}", inputs * inputs),
                got: format!("of {outputs}"),
            }
            .into());
        }
        Ok(Self { energy, matrix })
    }

    /// Φ.
    pub fn energy(&self) -> &P {
        &self.energy
    }

    fn check(&self, x: &Tensor) -> Result<()> {
        let features = self.matrix.inputs();
        if x.dims().last() == Some(&features) {
            return Ok(());
        }
        let field = format!("a Skew field of {features} features");
        Err(wrong_state(field, format!("x (…, {features})"), &[x]))
    }

    /// ½ (M − Mᵀ), `(row, feature, feature)`, of M `(…, features²)`.
    fn skew(&self, m: &Tensor) -> Result<Tensor> {
        let n = self.matrix.inputs();
        let m = m.reshape(((), n, n))?;
        (&m - m.transpose(1, 2)?)? * 0.5
    }
}

/// A x row by row, A `(row, n, n)`, x `(…, n)`: of n columns, as sums of products, for n is small.
fn times(a: &Tensor, x: &Tensor) -> Result<Tensor> {
    let n = a.dim(2)?;
    let products = a.matmul(&x.reshape(((), n, 1))?)?;
    products.reshape(x.shape())
}

impl<P: Potential> VectorField<Tensor> for Skew<P> {
    fn velocity(&self, t: &Time, x: &Tensor) -> Result<Tensor> {
        self.check(x)?;
        let skew = self.skew(&self.matrix.forward(x)?)?;
        times(&skew, &self.energy.gradient(t, x)?.1)
    }

    fn vjp<'f>(&'f self, t: &Time, x: &Tensor) -> Result<(Tensor, Pullback<'f, Tensor>)> {
        if self.energy.parameters().is_none() {
            return autograd::vjp(self, t, x);
        }
        self.check(x)?;
        let (g, pull_gradient) = self.energy.gradient_vjp(t, x)?;
        let (m, pull_matrix) = self.matrix.vjp(t, x)?;
        let skew = self.skew(&m)?;
        let k = times(&skew, &g)?;
        let pull = move |v: &Tensor| {
            // ½ (M − Mᵀ)ᵀ v of the gradient, and ½ (v gᵀ − g vᵀ) of M.
            let mut pulled = pull_gradient(&times(&skew, v)?.neg()?)?;
            let n = self.matrix.inputs();
            let (column, row) = (v.reshape(((), n, 1))?, g.reshape(((), 1, n))?);
            let outer = self.skew(&column.broadcast_mul(&row)?)?;
            let of_matrix = pull_matrix(&outer.reshape(m.shape())?)?;
            pulled.y = (pulled.y + of_matrix.y)?;
            let mut gradients = of_matrix.params;
            for p in self.matrix.tensors() {
                if let Some(gradient) = gradients.remove(p) {
                    add_gradient(&mut pulled.params, p, gradient)?;
                }
            }
            Ok(pulled)
        };
        Ok((k, Box::new(pull)))
    }

    fn parameters(&self) -> Option<Vec<Tensor>> {
        let mut listed = self.energy.parameters()?;
        for p in self.matrix.tensors().filter(|p| p.track_op()) {
            // The two may share weights.
            if listed.iter().all(|q| q.id() != p.id()) {
                listed.push(p.clone());
            }
        }
        Some(listed)
    }
}
