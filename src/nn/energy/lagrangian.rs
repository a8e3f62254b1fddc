//! The equation of motion of a Lagrangian.

use candle_core::{DType, Result, Tensor, D};

use super::solve::{inverse, Singular};
use super::{half, Curved};
use crate::error::{Error, PotentialDefect};
use crate::field::VectorField;
use crate::nn::perceptron::part;
use crate::precision::unit_roundoff;
use crate::time::Time;

/// x' = (q̇, M⁻¹(∂L/∂q − C q̇ − ∂²L/∂q̇∂t)) for x = (q, q̇), with M = ∂²L/∂q̇∂q̇ and C = ∂²L/∂q̇∂q: the equation of
/// Euler and Lagrange, d/dt ∂L/∂q̇ = ∂L/∂q.
///
/// x: `(…, 2n)`, the n coordinates followed by their velocities.  With an [`EnergyMlp`](crate::nn::EnergyMlp) it is a
/// Lagrangian neural network (arXiv 2003.04630).
///
/// M q̈ + C q̇ + ∂²L/∂q̇∂t is the lower half of d(∇L)/dt along the motion itself, whose tangent is (1, q̇, q̈).  So q̈ is
/// found in two parts: first q̈₀ = M⁻¹(∂L/∂q − C q̇ − ∂²L/∂q̇∂t) on detached tensors, with M column by column from n Hessian products, and its inverse in
/// f64 on the host; then one step of Newton's method in candle's graph,
///
/// q̈ = q̈₀ + M₀⁻¹ (∂L/∂q − \[∂∇L/∂t + ∇²L (q̇, q̈₀)\]_q̇).
///
/// The correction is of the size of a rounding error, and its derivative is that of the implicit function.  The
/// gradient needs one Hessian product, whatever n is, and no derivative of the inverse.
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_diffeq::nn::energy::{Energy, Lagrangian};
/// use candle_diffeq::nn::{Activation, EnergyMlp};
/// use candle_diffeq::NeuralOde;
/// let vars = candle_nn::VarMap::new();
/// let ode = NeuralOde::from_field(&vars, "l", DType::F32, &Device::Cpu, |vb| {
///     let l = EnergyMlp::new(&[4, 32, 32, 1], Activation::Softplus, Energy::Output, vb)?;
///     Ok(Lagrangian::with_mass(l, 1.0))
/// })?;
/// let xs = ode.solve(&Tensor::ones((8, 4), DType::F32, &Device::Cpu)?, &[0.0, 0.1])?;
/// assert_eq!(xs.dims(), [2, 8, 4]);
/// # Ok::<(), candle_diffeq::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Lagrangian<P> {
    potential: P,
    mass: f64,
}

const NAME: &str = "a Lagrangian field";

impl<P: Curved> Lagrangian<P> {
    /// The motion of the Lagrangian L(t, (q, q̇)).
    ///
    /// Where M is singular, evaluations return
    /// [`PotentialDefect::SingularMass`](crate::error::PotentialDefect::SingularMass).
    pub fn new(lagrangian: P) -> Self {
        Self::with_mass(lagrangian, 0.0)
    }

    /// The motion of L + ½ m |q̇|²: a network at its initial weights has a mass matrix that is small and
    /// indefinite, to which this adds m.
    pub fn with_mass(lagrangian: P, m: f64) -> Self {
        Self {
            potential: lagrangian,
            mass: m,
        }
    }

    /// L without what [`with_mass`](Self::with_mass) adds.
    pub fn potential(&self) -> &P {
        &self.potential
    }

    /// M⁻¹ `(row, n, n)` and q̈₀ `(row, n)`, without history.
    fn solve(&self, t: &Time, x: &Tensor, n: usize) -> Result<[Tensor; 2]> {
        let x = x.detach();
        let rows = x.dim(0)?;
        let wide = |x: &Tensor| x.detach().to_dtype(DType::F64)?.flatten_all()?.to_vec1();
        let columns = self.potential.hessian_columns(t, &x, n..2 * n)?;
        let mass: Vec<f64> = wide(&columns.narrow(2, n, n)?)?;
        let moving = Tensor::cat(&[part(&x, n, n)?, part(&x, 0, n)?.zeros_like()?], 1)?;
        let (gradient, along) = self.potential.gradient_jvp(t, &x, (1.0, &moving))?;
        let force = wide(&(part(&gradient, 0, n)? - part(&along, n, n)?)?)?;
        let least = n as f64 * unit_roundoff(x.dtype());
        let (mut inverses, mut accelerations) = (vec![], vec![]);
        for row in 0..rows {
            let entry = |k: usize| {
                let (i, j) = (k / n, k % n);
                // Column i of the symmetric matrix.
                mass[(i * rows + row) * n + j] + if i == j { self.mass } else { 0.0 }
            };
            let matrix: Vec<f64> = (0..n * n).map(entry).collect();
            let inverse = inverse(&matrix, n, least).map_err(|Singular(pivot)| {
                let t = t.peek();
                Error::from(PotentialDefect::SingularMass { row, t, pivot })
            })?;
            let product = |i: usize| {
                let each = (0..n).map(|j| inverse[i * n + j] * force[row * n + j]);
                each.sum::<f64>()
            };
            accelerations.extend((0..n).map(product));
            inverses.extend(inverse);
        }
        let back = |numbers: Vec<f64>, shape: &[usize]| {
            let host = Tensor::from_vec(numbers, shape, &candle_core::Device::Cpu)?;
            host.to_dtype(x.dtype())?.to_device(x.device())
        };
        Ok([
            back(inverses, &[rows, n, n])?,
            back(accelerations, &[rows, n])?,
        ])
    }
}

impl<P: Curved> VectorField<Tensor> for Lagrangian<P> {
    fn velocity(&self, t: &Time, x: &Tensor) -> Result<Tensor> {
        let n = half(x, NAME)?;
        let rows = x.reshape(((), 2 * n))?;
        let [inverse, first] = self.solve(t, &rows, n)?;
        let velocity = part(&rows, n, n)?;
        let motion = Tensor::cat(&[&velocity, &first], D::Minus1)?;
        let (gradient, along) = self.potential.gradient_jvp(t, &rows, (1.0, &motion))?;
        let rest = (part(&gradient, 0, n)? - part(&along, n, n)?)?;
        let rest = (rest - (&first * self.mass)?)?;
        let correction = inverse.matmul(&rest.unsqueeze(2)?)?.squeeze(2)?;
        let acceleration = (first + correction)?;
        Tensor::cat(&[velocity, acceleration], D::Minus1)?.reshape(x.shape())
    }
}
