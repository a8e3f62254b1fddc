//! Symplectic ODE-Net (ICLR 2020) of two angles, in the derivatives of three perceptrons.
//!
//! State (c, q̇, u) with c = (cos q, sin q).  o = M(c) are the entries of L, W = L Lᵀ + 0.1 is the inverse of the
//! mass matrix, H = ½ pᵀW p + V(c), p = W⁻¹q̇; so ∂H/∂p = q̇, and
//!
//! c' = (−sin q ∘ q̇, cos q ∘ q̇),  p' = sin q ∘ ∂H/∂cos − cos q ∘ ∂H/∂sin + G u,  q̈ = W p' + Ẇ p,  u' = 0.

use candle_core::{Module, Result, Tensor, D};
use candle_diffeq::nn::Perceptron;
use candle_diffeq::Time;

/// What is added to the diagonal of W.
const SHIFT: f64 = 0.1;

/// The three networks of c.
pub(super) struct Symplectic {
    mass: Perceptron,
    potential: Perceptron,
    input: Perceptron,
}

/// Two columns of a batch.
type Pair = [Tensor; 2];

/// Columns `from` and `from + 1`.
fn pair(x: &Tensor, from: usize) -> Result<Pair> {
    Ok([x.narrow(1, from, 1)?, x.narrow(1, from + 1, 1)?])
}

/// L x for the entries o of L = \[\[o₀, 0\], \[o₂, o₁\]\].
fn lower(o: &[Tensor; 3], x: &Pair) -> Result<Pair> {
    Ok([(&o[0] * &x[0])?, ((&o[2] * &x[0])? + (&o[1] * &x[1])?)?])
}

/// Lᵀ x.
fn upper(o: &[Tensor; 3], x: &Pair) -> Result<Pair> {
    Ok([((&o[0] * &x[0])? + (&o[2] * &x[1])?)?, (&o[1] * &x[1])?])
}

fn plus(x: Pair, y: &Pair) -> Result<Pair> {
    let [a, b] = x;
    Ok([(a + &y[0])?, (b + &y[1])?])
}

fn entries(o: &Tensor) -> Result<[Tensor; 3]> {
    Ok([o.narrow(1, 0, 1)?, o.narrow(1, 1, 1)?, o.narrow(1, 2, 1)?])
}

/// W⁻¹ v by the adjugate.
fn momentum(o: &[Tensor; 3], v: &Pair) -> Result<Pair> {
    let a = (o[0].sqr()? + SHIFT)?;
    let b = (&o[0] * &o[2])?;
    let d = ((o[2].sqr()? + o[1].sqr()?)? + SHIFT)?;
    let det = ((&a * &d)? - b.sqr()?)?;
    Ok([
        (((&d * &v[0])? - (&b * &v[1])?)? / &det)?,
        (((&a * &v[1])? - (&b * &v[0])?)? / &det)?,
    ])
}

impl Symplectic {
    pub(super) fn new([mass, potential, input]: [Perceptron; 3]) -> Self {
        Self {
            mass,
            potential,
            input,
        }
    }

    pub(super) fn field(self) -> impl Fn(&Time, &Tensor) -> Result<Tensor> {
        move |_: &Time, y: &Tensor| self.velocity(y)
    }

    fn velocity(&self, y: &Tensor) -> Result<Tensor> {
        let (rows, columns) = y.dims2()?;
        let c = y.narrow(1, 0, 4)?.contiguous()?;
        let (cos, sin, speed) = (pair(y, 0)?, pair(y, 2)?, pair(y, 4)?);
        let u = y.narrow(1, 6, columns - 6)?.contiguous()?;
        let o = entries(&self.mass.forward(&c)?)?;
        let p = momentum(&o, &speed)?;
        // ∂/∂c of ½ |Lᵀp|², p fixed, and of V.
        let bent = upper(&o, &p)?;
        let w = [
            (&p[0] * &bent[0])?,
            (&p[1] * &bent[1])?,
            (&p[1] * &bent[0])?,
        ];
        let (_, kinetic) = self.mass.pull(&c, &Tensor::cat(&w, 1)?)?;
        let one = Tensor::ones((rows, 1), y.dtype(), y.device())?;
        let (_, potential) = self.potential.pull(&c, &one)?;
        let slope = (kinetic + potential)?;
        let (of_cos, of_sin) = (pair(&slope, 0)?, pair(&slope, 2)?);
        let inputs = u.dim(1)?;
        let g = self.input.forward(&c)?.reshape((rows, 2, inputs))?;
        let driven = pair(&g.matmul(&u.unsqueeze(2)?)?.squeeze(2)?, 0)?;
        let force = |i: usize| {
            let turned = ((&sin[i] * &of_cos[i])? - (&cos[i] * &of_sin[i])?)?;
            turned + &driven[i]
        };
        let force = [force(0)?, force(1)?];
        let c_dot = [
            (&sin[0] * &speed[0])?.neg()?,
            (&sin[1] * &speed[1])?.neg()?,
            (&cos[0] * &speed[0])?,
            (&cos[1] * &speed[1])?,
        ];
        let c_dot = Tensor::cat(&c_dot, 1)?;
        let o_dot = entries(&self.mass.jvp(&c, &c_dot)?.1)?;
        let pushed = lower(&o, &upper(&o, &force)?)?;
        let pushed = plus(pushed, &[(&force[0] * SHIFT)?, (&force[1] * SHIFT)?])?;
        let turned = plus(lower(&o_dot, &bent)?, &lower(&o, &upper(&o_dot, &p)?)?)?;
        let [a, b] = plus(pushed, &turned)?;
        Tensor::cat(&[c_dot, a, b, u.zeros_like()?], D::Minus1)
    }
}
