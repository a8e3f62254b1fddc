//! Rotating threes: sixteen frames of a digit, each turned by a sixteenth of a circle against the one before.

use std::path::Path;

use candle_core::{Device, Tensor};
use rand::rngs::StdRng;
use rand::Rng;

use common::{mnist, Result};

/// Frames of a sequence, and pixels along the side of one.
pub(crate) const FRAMES: usize = 16;
pub(crate) const SIDE: usize = 14;
pub(crate) const PIXELS: usize = SIDE * SIDE;

/// Sequences `(sequences, FRAMES, PIXELS)` of numbers between 0 and 1.
pub(crate) struct Data {
    pub(crate) training: Tensor,
    pub(crate) test: Tensor,
    pub(crate) name: &'static str,
}

/// A fifth of the sequences is held out, and the picture shows two of these.
const HELD: usize = 5;
const LEAST: usize = 2 * HELD;

/// An image as large as MNIST's.
struct Image {
    pixels: Vec<f32>,
}

impl Image {
    /// Between pixels, bilinear; black outside.
    fn at(&self, x: f32, y: f32) -> f32 {
        let pixel = |i: f32, j: f32| {
            let inside = |k: f32| k >= 0.0 && k < mnist::SIDE as f32;
            match inside(i) && inside(j) {
                true => self.pixels[j as usize * mnist::SIDE + i as usize],
                false => 0.0,
            }
        };
        let (i, j) = (x.floor(), y.floor());
        let (a, b) = (x - i, y - j);
        let above = (1.0 - a) * pixel(i, j) + a * pixel(i + 1.0, j);
        let below = (1.0 - a) * pixel(i, j + 1.0) + a * pixel(i + 1.0, j + 1.0);
        (1.0 - b) * above + b * below
    }

    /// All frames, at half of the size.
    fn frames(&self) -> Vec<f32> {
        let side = mnist::SIDE as f32;
        let (middle, scale) = (0.5 * (side - 1.0), side / SIDE as f32);
        let frame = |k: usize| {
            let (sin, cos) = (std::f32::consts::TAU * k as f32 / FRAMES as f32).sin_cos();
            let pixel = move |p: usize| {
                // The mean of four points of a pixel.
                let points = [(0.25, 0.25), (0.75, 0.25), (0.25, 0.75), (0.75, 0.75)];
                let value = |(dx, dy): (f32, f32)| {
                    let x = ((p % SIDE) as f32 + dx) * scale - 0.5 - middle;
                    let y = ((p / SIDE) as f32 + dy) * scale - 0.5 - middle;
                    self.at(middle + cos * x - sin * y, middle + sin * x + cos * y)
                };
                points.into_iter().map(value).sum::<f32>() / 4.0
            };
            (0..PIXELS).map(pixel)
        };
        (0..FRAMES).flat_map(frame).collect()
    }

    /// Two half circles of sizes of their own, one above the other.
    fn drawn(rng: &mut StdRng) -> Self {
        let side = mnist::SIDE;
        let radii = [rng.random_range(4.0..6.0f32), rng.random_range(4.0..6.0)];
        let width = rng.random_range(1.2..2.2f32);
        let pixel = |p: usize| {
            let (x, y) = ((p % side) as f32 - 13.0, (p / side) as f32 - 13.5);
            let (radius, centre) = match y < 0.0 {
                true => (radii[0], -radii[0]),
                false => (radii[1], radii[1]),
            };
            let (dx, dy) = (x, y - centre);
            let open = dx < -0.5 * radius;
            let off = (dx.hypot(dy) - radius).abs() / width;
            if open {
                0.0
            } else {
                (1.5 - off).clamp(0.0, 1.0)
            }
        };
        Self {
            pixels: (0..mnist::PIXELS).map(pixel).collect(),
        }
    }
}

impl Data {
    /// Of the threes among the images of a folder with MNIST's test set.
    pub(crate) fn read(folder: &Path, most: usize, device: &Device) -> Result<Self> {
        let images = mnist::Images::test(folder)?;
        let threes = images.of_class(3).map(|pixels| Image {
            pixels: pixels.iter().map(|p| f32::from(*p) / 255.0).collect(),
        });
        let threes: Vec<_> = threes.take(most).collect();
        if threes.len() < LEAST {
            let (folder, n) = (folder.display(), threes.len());
            return Err(format!("{folder}: {n} threes, but at least {LEAST} are needed").into());
        }
        Self::of(threes, "threes of MNIST's test set", device)
    }

    /// Of threes that are made of arcs.
    pub(crate) fn drawn(sequences: usize, rng: &mut StdRng, device: &Device) -> Result<Self> {
        let images = (0..sequences).map(|_| Image::drawn(rng)).collect();
        Self::of(images, "threes of two arcs", device)
    }

    fn of(images: Vec<Image>, name: &'static str, device: &Device) -> Result<Self> {
        let n = images.len();
        let numbers: Vec<f32> = images.iter().flat_map(Image::frames).collect();
        let all = Tensor::from_vec(numbers, (n, FRAMES, PIXELS), device)?;
        let test = n / HELD;
        Ok(Self {
            training: all.narrow(0, test, n - test)?,
            test: all.narrow(0, 0, test)?,
            name,
        })
    }
}
