//! Points with the numbers of their classes.

use std::f64::consts::{PI, TAU};

use candle_core::{Device, Result, Tensor};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use rand_distr::StandardNormal;

use crate::memory::room_within;

/// A set of classes of points that can be sampled.  The classes take turns: point i is of class i mod classes.
///
/// ```
/// use candle_core::Device;
/// use candle_diffeq::datasets::Labelled;
/// let spheres = Labelled::Spheres { features: 3, radii: [0.5, 1.0], noise: 0.05 };
/// let (x, classes) = spheres.sample(512, 0, &Device::Cpu)?;
/// assert_eq!((x.dims(), classes.dims()), (&[512, 3][..], &[512][..]));      // f32, u32
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum Labelled {
    /// Two half circles of radius 1 in the plane, each reaching into the other, with normal noise of this deviation.
    Moons {
        /// Deviation of each coordinate.
        noise: f64,
    },
    /// Two arms in the plane, of `turns` turns each, whose radius grows from 0 to 1 with the root of a uniform
    /// number.
    Spirals {
        /// Turns of an arm.
        turns: f64,
        /// Deviation of each coordinate.
        noise: f64,
    },
    /// Two concentric spheres in any number of dimensions.
    Spheres {
        /// Dimensions.
        features: usize,
        /// Radius of the inner and of the outer sphere.
        radii: [f64; 2],
        /// Deviation of each coordinate.
        noise: f64,
    },
    /// Normal distributions whose means are spread evenly over a circle in the plane.
    Gaussians {
        /// Their number.
        classes: usize,
        /// Of the circle.
        radius: f64,
        /// Deviation of each coordinate.
        noise: f64,
    },
    /// Normal distributions whose means lie on a spiral in the plane: class k at the angle 2π k / classes and at the radius
    /// (k + 1) / classes.
    GaussianSpiral {
        /// Their number.
        classes: usize,
        /// Deviation of each coordinate.
        noise: f64,
    },
}

impl Labelled {
    /// Coordinates of a point.
    pub fn features(&self) -> usize {
        match self {
            Self::Spheres { features, .. } => *features,
            _ => 2,
        }
    }

    /// Number of classes.
    pub fn classes(&self) -> usize {
        match self {
            Self::Gaussians { classes, .. } | Self::GaussianSpiral { classes, .. } => *classes,
            _ => 2,
        }
    }

    /// `n` points `(n, features)` in f32 and their classes `(n)` in u32, the same for the same seed.
    ///
    /// # Errors
    /// No features or no classes; if the tensors cannot be made on the device.
    pub fn sample(&self, n: usize, seed: u64, device: &Device) -> Result<(Tensor, Tensor)> {
        let (features, classes) = (self.features(), self.classes());
        if features * classes == 0 {
            candle_core::bail!("a data set needs at least one feature and one class: {self:?} has {features} features and {classes} classes")
        }
        let mut rng = StdRng::seed_from_u64(seed);
        let mut points = room_within("points of a set", n.saturating_mul(features))?;
        for i in 0..n {
            let point = self.point(i % classes, &mut rng);
            points.extend(point.into_iter().map(|x| x as f32));
        }
        let labels: Vec<u32> = (0..n).map(|i| (i % classes) as u32).collect();
        let points = Tensor::from_vec(points, (n, features), device)?;
        Ok((points, Tensor::from_vec(labels, n, device)?))
    }

    fn point(&self, class: usize, rng: &mut StdRng) -> Vec<f64> {
        let (on, noise) = match *self {
            Self::Moons { noise } => {
                let (sin, cos) = rng.random_range(0.0..PI).sin_cos();
                let on = match class {
                    0 => vec![cos, sin],
                    _ => vec![1.0 - cos, 0.5 - sin],
                };
                (on, noise)
            }
            Self::Spirals { turns, noise } => {
                let radius = rng.random::<f64>().sqrt();
                let angle = TAU * turns * radius + PI * class as f64;
                (circle(radius, angle), noise)
            }
            Self::Spheres {
                features,
                radii,
                noise,
            } => {
                let direction: Vec<f64> =
                    (0..features).map(|_| rng.sample(StandardNormal)).collect();
                let length = direction.iter().map(|x| x * x).sum::<f64>().sqrt();
                let scale = radii[class] / length.max(f64::MIN_POSITIVE);
                (direction.into_iter().map(|x| x * scale).collect(), noise)
            }
            Self::Gaussians {
                classes,
                radius,
                noise,
            } => (circle(radius, TAU * share(class, classes)), noise),
            Self::GaussianSpiral { classes, noise } => {
                let radius = share(class + 1, classes);
                (circle(radius, TAU * share(class, classes)), noise)
            }
        };
        let moved = |x: f64| x + noise * rng.sample::<f64, _>(StandardNormal);
        on.into_iter().map(moved).collect()
    }
}

fn share(k: usize, of: usize) -> f64 {
    k as f64 / of as f64
}

fn circle(radius: f64, angle: f64) -> Vec<f64> {
    let (sin, cos) = angle.sin_cos();
    vec![radius * cos, radius * sin]
}
