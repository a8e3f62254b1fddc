//! Systems of ordinary differential equations of physics, as fields and as data to learn from.

use candle_core::{Result, Tensor, D};

use crate::error::Error;
use crate::field::VectorField;
use crate::time::Time;

/// A system x' = f(x), in ordinary operations over rows `(…, features)`.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_diffeq::{predict, OdeOptions};
/// use candle_diffeq::datasets::System;
/// use candle_diffeq::options::{Steps, TimeGrid};
/// let x0 = Tensor::new(&[[1.0, 0.0]], &Device::Cpu)?;
/// let options = OdeOptions { steps: Steps::PerInterval(20), ..Default::default() };
/// let spring = System::MassSpring { mass: 0.5, stiffness: 2.0 };             // H = q² + p²
/// let xs = predict(&spring, &x0, &TimeGrid::linspace(0.0, std::f64::consts::PI, 31)?, &options)?;
/// let error = (xs.get(30)? - &x0)?.abs()?.max_all()?.to_scalar::<f64>()?;     // its period is π
/// assert!(error < 1e-6);
/// let energy = spring.energy(&xs)?.expect("the energy of a spring");         // (31, 1, 1)
/// assert_eq!(energy.dims(), [31, 1, 1]);
/// # Ok::<(), candle_diffeq::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub enum System {
    /// x' = σ(y − x), y' = x(ρ − z) − y, z' = xy − βz over (x, y, z).
    Lorenz {
        /// σ, 10.
        sigma: f64,
        /// ρ, 28.
        rho: f64,
        /// β, 8/3.
        beta: f64,
    },
    /// x' = v, v' = μ(1 − x²)v − x over (x, v).
    VanDerPol {
        /// μ.
        mu: f64,
    },
    /// x' = y(z − 1 + x²) + γx, y' = x(3z + 1 − x²) + γy, z' = −2z(α + xy) over (x, y, z).
    RabinovichFabrikant {
        /// α, 0.14.
        alpha: f64,
        /// γ, 0.10.
        gamma: f64,
    },
    /// q' = p/m, p' = −k q over (q, p): H = p²/2m + k q²/2.
    MassSpring {
        /// m.
        mass: f64,
        /// k.
        stiffness: f64,
    },
    /// q' = p/I, p' = −w sin q over (q, p), q from the vertical: H = p²/2I + w(1 − cos q).
    Pendulum {
        /// I = m l².
        inertia: f64,
        /// w = m g l.
        weight: f64,
    },
    /// Two rods of length 1 and masses of 1 at their ends over (θ₁, θ₂, ω₁, ω₂), angles from the vertical.
    DoublePendulum {
        /// Acceleration of gravity, 9.8.
        gravity: f64,
    },
    /// The acrobot of control theory over (θ₁, θ₂, ω₁, ω₂, u₁, u₂), with the torques u, which stay as they are: rods of
    /// length, mass and moment of inertia 1, centres of mass at ½, θ₁ from the vertical, θ₂ from the first rod.  The torques
    /// enter as in the data of Symplectic ODE-Net: u₁ drives the second joint, and u₂ the first with the opposite sign.
    Acrobot {
        /// Acceleration of gravity, 9.8.
        gravity: f64,
    },
    /// Two bodies of mass 1 in the plane over (q₁, q₂, p₁, p₂), each of two coordinates: H = ½|p|² − 1/|q₁ − q₂|.
    TwoBodies,
}

impl System {
    /// Lorenz' own: σ = 10, ρ = 28, β = 8/3.
    pub const LORENZ: Self = Self::Lorenz {
        sigma: 10.0,
        rho: 28.0,
        beta: 8.0 / 3.0,
    };
    /// α = 0.14, γ = 0.10.
    pub const RABINOVICH_FABRIKANT: Self = Self::RabinovichFabrikant {
        alpha: 0.14,
        gamma: 0.10,
    };

    /// Numbers of a row.
    pub fn features(&self) -> usize {
        match self {
            Self::VanDerPol { .. } | Self::MassSpring { .. } | Self::Pendulum { .. } => 2,
            Self::Lorenz { .. } | Self::RabinovichFabrikant { .. } => 3,
            Self::DoublePendulum { .. } => 4,
            Self::Acrobot { .. } => 6,
            Self::TwoBodies => 8,
        }
    }

    /// The columns of a state, `(…, 1)` each.
    fn columns(&self, x: &Tensor) -> Result<Vec<Tensor>> {
        let features = self.features();
        if x.dims().last() != Some(&features) {
            let (field, got) = (format!("{self:?}"), vec![x.shape().clone()]);
            let needs = format!("x (…, {features})");
            return Err(Error::FieldState { field, needs, got }.into());
        }
        (0..features).map(|i| x.narrow(D::Minus1, i, 1)).collect()
    }

    /// The energy `(…, 1)`; `None` of a system that has none.
    ///
    /// # Errors
    /// If x has other features; those of candle's operations.
    pub fn energy(&self, x: &Tensor) -> Result<Option<Tensor>> {
        let x = self.columns(x)?;
        Ok(Some(match *self {
            Self::MassSpring { mass, stiffness } => {
                ((x[1].sqr()? * (0.5 / mass))? + (x[0].sqr()? * (0.5 * stiffness))?)?
            }
            Self::Pendulum { inertia, weight } => {
                let height = (1.0 - x[0].cos()?)?;
                ((x[1].sqr()? * (0.5 / inertia))? + (height * weight)?)?
            }
            Self::DoublePendulum { gravity } => {
                // ω₁² + ½ ω₂² + ω₁ω₂ cos(θ₁ − θ₂) − g(2 cos θ₁ + cos θ₂).
                let coupled = ((&x[2] * &x[3])? * (&x[0] - &x[1])?.cos()?)?;
                let kinetic = ((x[2].sqr()? + (x[3].sqr()? * 0.5)?)? + coupled)?;
                let height = ((x[0].cos()? * 2.0)? + x[1].cos()?)?;
                (kinetic - (height * gravity)?)?
            }
            Self::TwoBodies => {
                let kinetic = x[4..].iter().map(Tensor::sqr);
                let mut sum = x[0].zeros_like()?;
                for square in kinetic {
                    sum = (sum + (square? * 0.5)?)?;
                }
                (sum - distance(&x)?.recip()?)?
            }
            _ => return Ok(None),
        }))
    }

    fn velocities(&self, x: &[Tensor]) -> Result<Vec<Tensor>> {
        Ok(match *self {
            Self::Lorenz { sigma, rho, beta } => vec![
                ((&x[1] - &x[0])? * sigma)?,
                ((&x[0] * (rho - &x[2])?)? - &x[1])?,
                ((&x[0] * &x[1])? - (&x[2] * beta)?)?,
            ],
            Self::VanDerPol { mu } => {
                let damping = ((1.0 - x[0].sqr()?)? * mu)?;
                vec![x[1].clone(), ((damping * &x[1])? - &x[0])?]
            }
            Self::RabinovichFabrikant { alpha, gamma } => {
                let square = x[0].sqr()?;
                let first = (&x[1] * ((&x[2] - 1.0)? + &square)?)?;
                let second = (&x[0] * (((&x[2] * 3.0)? + 1.0)? - square)?)?;
                let third = (&x[2] * ((&x[0] * &x[1])? + alpha)?)?;
                vec![
                    (first + (&x[0] * gamma)?)?,
                    (second + (&x[1] * gamma)?)?,
                    (third * -2.0)?,
                ]
            }
            Self::MassSpring { mass, stiffness } => {
                vec![(&x[1] / mass)?, (&x[0] * -stiffness)?]
            }
            Self::Pendulum { inertia, weight } => {
                vec![(&x[1] / inertia)?, (x[0].sin()? * -weight)?]
            }
            Self::DoublePendulum { gravity } => double_pendulum(x, gravity)?,
            Self::Acrobot { gravity } => acrobot(x, gravity)?,
            Self::TwoBodies => {
                let cube = distance(x)?.powf(3.0)?;
                let pull = |i: usize| (&x[i] - &x[2 + i])? / &cube;
                let (along, across) = (pull(0)?, pull(1)?);
                let mut k = x[4..].to_vec();
                k.extend([along.neg()?, across.neg()?, along, across]);
                k
            }
        })
    }
}

/// |q₁ − q₂|.
fn distance(x: &[Tensor]) -> Result<Tensor> {
    let square = |i: usize| (&x[i] - &x[2 + i])?.sqr();
    (square(0)? + square(1)?)?.sqrt()
}

/// With Δ = θ₁ − θ₂, a₁ = ½ cos Δ, a₂ = cos Δ, f₁ = −½ ω₂² sin Δ − g sin θ₁, f₂ = ω₁² sin Δ − g sin θ₂:
/// ω₁' = (f₁ − a₁f₂)/(1 − a₁a₂), ω₂' = (f₂ − a₂f₁)/(1 − a₁a₂).
fn double_pendulum(x: &[Tensor], gravity: f64) -> Result<Vec<Tensor>> {
    let apart = (&x[0] - &x[1])?;
    let (sin, a2) = (apart.sin()?, apart.cos()?);
    let a1 = (&a2 * 0.5)?;
    let f1 = ((x[3].sqr()? * &sin)? * -0.5)?;
    let f1 = (f1 - (x[0].sin()? * gravity)?)?;
    let f2 = ((x[2].sqr()? * sin)? - (x[1].sin()? * gravity)?)?;
    let whole = (1.0 - (&a1 * &a2)?)?;
    Ok(vec![
        x[2].clone(),
        x[3].clone(),
        ((&f1 - (a1 * &f2)?)? / &whole)?,
        ((f2 - (a2 * f1)?)? / whole)?,
    ])
}

/// θ₁ from the vertical, as the sine in place of cos(θ₁ − π/2).
fn acrobot(x: &[Tensor], gravity: f64) -> Result<Vec<Tensor>> {
    const CENTRE: f64 = 0.5;
    let (sin2, cos2) = (x[1].sin()?, x[1].cos()?);
    let d1 = ((&cos2 * (2.0 * CENTRE))? + (CENTRE * CENTRE + 1.0 + CENTRE * CENTRE + 2.0))?;
    let d2 = ((&cos2 * CENTRE)? + (CENTRE * CENTRE + 1.0))?;
    let phi2 = ((&x[0] + &x[1])?.sin()? * (CENTRE * gravity))?;
    let turning = ((x[3].sqr()? * &sin2)? * CENTRE)?;
    let mixed = (((&x[2] * &x[3])? * &sin2)? * (2.0 * CENTRE))?;
    let falling = (x[0].sin()? * ((CENTRE + 1.0) * gravity))?;
    let phi1 = (((falling + &phi2)? - turning)? - mixed)?;
    let ratio = (&d2 / &d1)?;
    let pushed = ((x[2].sqr()? * sin2)? * CENTRE)?;
    let force = (((&x[4] + (&ratio * &phi1)?)? - pushed)? - phi2)?;
    let second = (force / ((CENTRE * CENTRE + 1.0) - (&d2 * ratio)?)?)?;
    let first = ((((&x[5] + (d2 * &second)?)? + phi1)? / d1)?).neg()?;
    let still = x[4].zeros_like()?;
    let k = [
        x[2].clone(),
        x[3].clone(),
        first,
        second,
        still.clone(),
        still,
    ];
    Ok(k.to_vec())
}

impl VectorField<Tensor> for System {
    fn velocity(&self, _: &Time, x: &Tensor) -> Result<Tensor> {
        Tensor::cat(&self.velocities(&self.columns(x)?)?, D::Minus1)
    }

    fn is_traced(&self) -> bool {
        true
    }
}
