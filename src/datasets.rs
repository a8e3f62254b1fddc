//! Data to learn from; feature `datasets`: toy densities in the plane, the usual test pieces of continuous flows, here;
//! points with classes ([`Labelled`]); and systems of ordinary differential equations ([`System`]).
//!
//! Densities are after the figures of "FFJORD: Free-form Continuous Dynamics for Scalable Reversible Generative
//! Models" (arXiv 1810.01367) and the densities that its code added.  All lie within about [−4, 4]².

mod labelled;
mod systems;

pub use labelled::Labelled;
pub use systems::System;

use std::f64::consts::{FRAC_PI_4, PI, TAU};

use candle_core::{Device, Result, Tensor};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use rand_distr::StandardNormal;

use crate::memory::room_within;

/// A density in the plane that can be sampled.
///
/// ```
/// use candle_core::Device;
/// use candle_diffeq::datasets::Density;
/// for density in Density::ALL {
///     let x = density.sample(256, 0, &Device::Cpu)?;                 // (256, 2), f32
///     assert_eq!(x.dims(), [256, 2]);
///     assert_eq!(density.name().parse(), Ok(density));
/// }
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Density {
    /// Eight Gaussians of standard deviation 0.35 on a circle of radius 2.8.
    EightGaussians,
    /// Two arms of one and a half turns each.
    TwoSpirals,
    /// The dark squares of a 4 × 4 board.
    Checkerboard,
    /// Five curved blades.
    Pinwheel,
    /// Two half circles, each reaching into the other.
    Moons,
    /// Two concentric circles.
    Circles,
    /// A spiral of one and a half turns.
    SwissRoll,
    /// Four concentric circles.
    Rings,
}

impl Density {
    /// All of them.
    pub const ALL: [Self; 8] = [
        Self::EightGaussians,
        Self::TwoSpirals,
        Self::Checkerboard,
        Self::Pinwheel,
        Self::Moons,
        Self::Circles,
        Self::SwissRoll,
        Self::Rings,
    ];

    /// As in the literature, and as [`FromStr`](std::str::FromStr) reads it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::EightGaussians => "8gaussians",
            Self::TwoSpirals => "2spirals",
            Self::Checkerboard => "checkerboard",
            Self::Pinwheel => "pinwheel",
            Self::Moons => "moons",
            Self::Circles => "circles",
            Self::SwissRoll => "swissroll",
            Self::Rings => "rings",
        }
    }

    /// `n` independent points, `(n, 2)` in f32, the same for the same seed.
    ///
    /// # Errors
    /// If the tensor cannot be made on the device.
    pub fn sample(self, n: usize, seed: u64, device: &Device) -> Result<Tensor> {
        let mut rng = StdRng::seed_from_u64(seed);
        let mut points = room_within("points of a density", n.saturating_mul(2))?;
        for _ in 0..n {
            points.extend(self.point(&mut rng).map(|x| x as f32));
        }
        Tensor::from_vec(points, (n, 2), device)
    }

    fn point(self, rng: &mut StdRng) -> [f64; 2] {
        match self {
            Self::EightGaussians => {
                let centre = polar(4.0, FRAC_PI_4 * f64::from(rng.random_range(0..8)));
                let noise = normal(rng, 0.5);
                [0, 1].map(|i| (centre[i] + noise[i]) / 2f64.sqrt())
            }
            Self::TwoSpirals => two_spirals(rng),
            Self::Checkerboard => {
                let x = rng.random_range(-2.0..2.0f64);
                let row = rng.random::<f64>() - 2.0 * f64::from(rng.random_range(0..2));
                [2.0 * x, 2.0 * (row + x.floor().rem_euclid(2.0))]
            }
            Self::Pinwheel => pinwheel(rng),
            Self::Moons => {
                let angle = rng.random_range(0.0..PI);
                let [c, s] = polar(1.0, angle);
                let [x, y] = match rng.random() {
                    true => [c, s],
                    false => [1.0 - c, 0.5 - s],
                };
                let noise = normal(rng, 0.1);
                [2.0 * (x + noise[0]) - 1.0, 2.0 * (y + noise[1]) - 0.2]
            }
            Self::Circles => circle(rng, &[3.0, 1.5], 0.24),
            Self::SwissRoll => {
                let angle = 1.5 * PI * (1.0 + 2.0 * rng.random::<f64>());
                let (on, noise) = (polar(angle, angle), normal(rng, 1.0));
                [0, 1].map(|i| (on[i] + noise[i]) / 5.0)
            }
            Self::Rings => circle(rng, &[3.0, 2.25, 1.5, 0.75], 0.08),
        }
    }
}

/// r (cos φ, sin φ).
fn polar(r: f64, angle: f64) -> [f64; 2] {
    let (sin, cos) = angle.sin_cos();
    [r * cos, r * sin]
}

/// Two independent normal numbers of that standard deviation.
fn normal(rng: &mut StdRng, deviation: f64) -> [f64; 2] {
    [0, 1].map(|_| deviation * rng.sample::<f64, _>(StandardNormal))
}

/// One of these circles about 0, all equally likely.
fn circle(rng: &mut StdRng, radii: &[f64], deviation: f64) -> [f64; 2] {
    let radius = radii[rng.random_range(0..radii.len())];
    let (on, noise) = (
        polar(radius, rng.random_range(0.0..TAU)),
        normal(rng, deviation),
    );
    [0, 1].map(|i| on[i] + noise[i])
}

/// A point of angle up to 540°, uniform in area, or its mirror image.
fn two_spirals(rng: &mut StdRng) -> [f64; 2] {
    let angle = rng.random::<f64>().sqrt() * 3.0 * PI;
    let [c, s] = polar(angle, angle);
    let arm = [-c, s].map(|x| x + 0.5 * rng.random::<f64>());
    let sign = if rng.random() { 1.0 } else { -1.0 };
    let noise = normal(rng, 0.1);
    [0, 1].map(|i| sign * arm[i] / 3.0 + noise[i])
}

/// A flat Gaussian, off the centre, turned by an angle that grows with the distance.
fn pinwheel(rng: &mut StdRng) -> [f64; 2] {
    let [along, across] = normal(rng, 1.0);
    let (along, across) = (1.0 + 0.3 * along, 0.1 * across);
    let blade = TAU / 5.0 * f64::from(rng.random_range(0..5));
    let [c, s] = polar(1.0, blade + 0.25 * along.exp());
    [
        2.0 * (along * c - across * s),
        2.0 * (along * s + across * c),
    ]
}

/// There is no density of this name.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("no density is called {name:?}; there are {}", names())]
pub struct UnknownDensity {
    /// The name.
    pub name: String,
}

fn names() -> String {
    Density::ALL.map(Density::name).join(", ")
}

impl std::str::FromStr for Density {
    type Err = UnknownDensity;

    fn from_str(name: &str) -> std::result::Result<Self, UnknownDensity> {
        let named = Self::ALL.into_iter().find(|d| d.name() == name);
        named.ok_or_else(|| UnknownDensity {
            name: name.to_owned(),
        })
    }
}

impl std::fmt::Display for Density {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}
