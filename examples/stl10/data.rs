//! STL-10's binary files, or a stand-in of the same shapes; crops, flips and colours.

use std::path::Path;

use candle_core::{Device, Tensor};
use rand::rngs::StdRng;
use rand::seq::SliceRandom;
use rand::Rng;

use common::Result;

/// Of an image, in pixels.
pub(crate) const SIDE: usize = 96;
pub(crate) const CHANNELS: usize = 3;
const BYTES: usize = CHANNELS * SIDE * SIDE;
pub(crate) const CLASSES: usize = 10;
/// Of each channel of the training images, as share of white.
const MEANS: [f32; CHANNELS] = [0.4467, 0.4398, 0.4066];
const DEVIATIONS: [f32; CHANNELS] = [0.2241, 0.2210, 0.2239];
/// Of the augmentation: the least share of the area and the extreme aspects of a crop, the largest
/// change of brightness, contrast and saturation, the share of images without colour.
const LEAST_AREA: f64 = 0.5;
const ASPECTS: [f64; 2] = [3.0 / 4.0, 4.0 / 3.0];
const JITTER: f32 = 0.4;
const GREY: f64 = 0.1;
/// Share of the training images that is held out.
const HELD: usize = 5;

/// Images `[channel][row][column]` and labels.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Images {
    pub(crate) pixels: Vec<u8>,
    pub(crate) labels: Vec<u32>,
}

/// What is trained on, what is held out, and the test split.
pub(crate) struct Data {
    pub(crate) training: Images,
    pub(crate) validation: Images,
    pub(crate) test: Images,
    /// Which images these are, for the table.
    pub(crate) name: String,
}

/// Images from the bytes of `X.bin`, which holds columns one after the other, and of `y.bin`, which
/// counts from 1.
pub(crate) fn parse(images: &[u8], labels: &[u8]) -> std::result::Result<Images, String> {
    if images.len() != labels.len() * BYTES {
        let (pixels, labels) = (images.len(), labels.len());
        return Err(format!("{pixels} bytes are not {labels} images of {BYTES}"));
    }
    if let Some(label) = labels.iter().find(|l| !(1..=CLASSES as u8).contains(l)) {
        return Err(format!("{label} is no label of STL-10"));
    }
    let mut pixels = Vec::with_capacity(images.len());
    for channel in images.chunks(SIDE * SIDE) {
        let rows = (0..SIDE).flat_map(|y| (0..SIDE).map(move |x| channel[x * SIDE + y]));
        pixels.extend(rows);
    }
    Ok(Images {
        pixels,
        labels: labels.iter().map(|l| u32::from(l - 1)).collect(),
    })
}

fn read(dir: &Path, half: &str) -> Result<Images> {
    let bytes = |kind: &str| {
        let path = dir.join(format!("{half}_{kind}.bin"));
        std::fs::read(&path).map_err(|e| format!("{}: {e}", path.display()))
    };
    Ok(parse(&bytes("X")?, &bytes("y")?)?)
}

impl Data {
    /// The official files: a fifth of the training images is held out, the test split is the real
    /// one; at most `counts` of each.
    pub(crate) fn read(dir: &Path, counts: [usize; 3], rng: &mut StdRng) -> Result<Self> {
        let all = read(dir, "train")?;
        Ok(Self::new(all, read(dir, "test")?, counts, "STL-10", rng))
    }

    /// Coloured stripes with noise, where there is no STL-10: a class is a direction and a colour.
    pub(crate) fn stand_in(counts: [usize; 3], rng: &mut StdRng) -> Self {
        let [training, validation, test] = counts;
        let (all, test) = (stripes(training + validation, rng), stripes(test, rng));
        Self::new(all, test, counts, "NOT STL-10: drawn stripes", rng)
    }

    fn new(all: Images, test: Images, counts: [usize; 3], name: &str, rng: &mut StdRng) -> Self {
        let mut order: Vec<usize> = (0..all.labels.len()).collect();
        order.shuffle(rng);
        let held = (order.len() / HELD).min(counts[1]);
        let (validation, training) = order.split_at(held);
        let training = &training[..training.len().min(counts[0])];
        let some: Vec<usize> = (0..test.labels.len().min(counts[2])).collect();
        let name = format!(
            "{name}, {} + {held} + {} images",
            training.len(),
            some.len()
        );
        Self {
            training: all.select(training),
            validation: all.select(validation),
            test: test.select(&some),
            name,
        }
    }
}

/// How an image is cut and coloured.
struct View {
    /// Of the crop, in pixels.
    top: f64,
    left: f64,
    height: f64,
    width: f64,
    flipped: bool,
    brightness: f32,
    contrast: f32,
    saturation: f32,
}

impl View {
    const WHOLE: Self = Self {
        top: 0.0,
        left: 0.0,
        height: SIDE as f64,
        width: SIDE as f64,
        flipped: false,
        brightness: 1.0,
        contrast: 1.0,
        saturation: 1.0,
    };

    fn random(rng: &mut StdRng) -> Self {
        let side = SIDE as f64;
        let area = side * side * rng.random_range(LEAST_AREA..1.0);
        let aspect = rng.random_range(ASPECTS[0].ln()..ASPECTS[1].ln()).exp();
        let height = (area / aspect).sqrt().min(side);
        let width = (area * aspect).sqrt().min(side);
        let mut around = || 1.0 + rng.random_range(-JITTER..JITTER);
        let (brightness, contrast, saturation) = (around(), around(), around());
        Self {
            top: rng.random_range(0.0..=side - height),
            left: rng.random_range(0.0..=side - width),
            height,
            width,
            flipped: rng.random(),
            brightness,
            contrast,
            saturation: if rng.random_bool(GREY) {
                0.0
            } else {
                saturation
            },
        }
    }

    /// An image of `side` × `side` pixels, each the mean of the samples that fall into it.
    fn of(&self, image: &[u8], side: usize) -> Vec<f32> {
        let samples = (SIDE / side).max(1);
        let fine = side * samples;
        // Bilinear between the pixels of the image.
        let at = |start: f64, length: f64, i: usize| {
            (start + length * (i as f64 + 0.5) / fine as f64 - 0.5).clamp(0.0, (SIDE - 1) as f64)
        };
        let mut values = vec![0.0; CHANNELS * side * side];
        let share = 1.0 / (samples * samples) as f32;
        for i in 0..fine {
            let y = at(self.top, self.height, i);
            for j in 0..fine {
                let x = at(
                    self.left,
                    self.width,
                    if self.flipped { fine - 1 - j } else { j },
                );
                for channel in 0..CHANNELS {
                    let plane = &image[channel * SIDE * SIDE..(channel + 1) * SIDE * SIDE];
                    let place = (channel * side + i / samples) * side + j / samples;
                    values[place] += share * bilinear(plane, y, x);
                }
            }
        }
        self.colour(&mut values, side * side);
        values
    }

    /// Changes colours, then brings every channel to mean 0 and deviation 1.
    fn colour(&self, values: &mut [f32], pixels: usize) {
        values
            .iter_mut()
            .for_each(|v| *v = (*v * self.brightness).clamp(0.0, 1.0));
        let grey = |values: &[f32], i: usize| {
            0.299 * values[i] + 0.587 * values[pixels + i] + 0.114 * values[2 * pixels + i]
        };
        let mean = (0..pixels).map(|i| grey(values, i)).sum::<f32>() / pixels as f32;
        let blend = |v: f32, with: f32, share: f32| (with + share * (v - with)).clamp(0.0, 1.0);
        values
            .iter_mut()
            .for_each(|v| *v = blend(*v, mean, self.contrast));
        for i in 0..pixels {
            let grey = grey(values, i);
            for channel in 0..CHANNELS {
                let v = &mut values[channel * pixels + i];
                *v = (blend(*v, grey, self.saturation) - MEANS[channel]) / DEVIATIONS[channel];
            }
        }
    }
}

/// The value between pixels, as share of white.
fn bilinear(plane: &[u8], y: f64, x: f64) -> f32 {
    let (row, column) = (y as usize, x as usize);
    let (below, right) = ((row + 1).min(SIDE - 1), (column + 1).min(SIDE - 1));
    let (v, u) = ((y - row as f64) as f32, (x - column as f64) as f32);
    let at = |row: usize, column: usize| f32::from(plane[row * SIDE + column]) / 255.0;
    let upper = (1.0 - u) * at(row, column) + u * at(row, right);
    let lower = (1.0 - u) * at(below, column) + u * at(below, right);
    (1.0 - v) * upper + v * lower
}

impl Images {
    pub(crate) fn len(&self) -> usize {
        self.labels.len()
    }

    fn select(&self, indices: &[usize]) -> Self {
        let mut chosen = Self::default();
        for &i in indices {
            chosen
                .pixels
                .extend(&self.pixels[i * BYTES..(i + 1) * BYTES]);
            chosen.labels.push(self.labels[i]);
        }
        chosen
    }

    /// The images of these indices, `(n, 3, side, side)`, whole, and their labels.
    pub(crate) fn batch(
        &self,
        indices: &[usize],
        side: usize,
        device: &Device,
    ) -> candle_core::Result<(Tensor, Tensor)> {
        self.views(indices, side, device, || View::WHOLE)
    }

    /// The same, each cut, flipped and coloured at random.
    pub(crate) fn augmented(
        &self,
        indices: &[usize],
        side: usize,
        rng: &mut StdRng,
        device: &Device,
    ) -> candle_core::Result<(Tensor, Tensor)> {
        self.views(indices, side, device, || View::random(rng))
    }

    fn views(
        &self,
        indices: &[usize],
        side: usize,
        device: &Device,
        mut view: impl FnMut() -> View,
    ) -> candle_core::Result<(Tensor, Tensor)> {
        let image = |&i: &usize| view().of(&self.pixels[i * BYTES..(i + 1) * BYTES], side);
        let values: Vec<f32> = indices.iter().flat_map(image).collect();
        let labels: Vec<u32> = indices.iter().map(|&i| self.labels[i]).collect();
        let n = indices.len();
        Ok((
            Tensor::from_vec(values, (n, CHANNELS, side, side), device)?,
            Tensor::from_vec(labels, n, device)?,
        ))
    }
}

fn stripes(count: usize, rng: &mut StdRng) -> Images {
    const PERIOD: f64 = 16.0;
    const NOISE: f64 = 25.0;
    let mut images = Images::default();
    for i in 0..count {
        let class = i % CLASSES;
        // Five directions, two colours.
        let angle = std::f64::consts::PI * (class % 5) as f64 / 5.0 + rng.random_range(-0.1..0.1);
        let tint = if class < 5 {
            [1.0, 0.6, 0.3]
        } else {
            [0.3, 0.6, 1.0]
        };
        let (phase, period) = (
            rng.random_range(0.0..1.0),
            PERIOD * rng.random_range(0.7..1.4),
        );
        for strength in tint {
            for pixel in 0..SIDE * SIDE {
                let (y, x) = ((pixel / SIDE) as f64, (pixel % SIDE) as f64);
                let along = (x * angle.cos() + y * angle.sin()) / period + phase;
                let wave = 90.0 * strength * (std::f64::consts::TAU * along).sin();
                let value = 120.0 + wave + rng.random_range(-NOISE..NOISE);
                images.pixels.push(value.clamp(0.0, 255.0) as u8);
            }
        }
        images.labels.push(class as u32);
    }
    images
}
