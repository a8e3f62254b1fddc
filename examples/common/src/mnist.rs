//! MNIST, or what stands in for it.

use std::path::Path;

use candle_core::{Device, Tensor};
use rand::rngs::StdRng;
use rand::seq::SliceRandom;
use rand::Rng;

use super::idx::{self, Idx};
use super::Result;

pub const SIDE: usize = 28;
pub const PIXELS: usize = SIDE * SIDE;
pub const CLASSES: usize = 10;
/// Of all training pixels, as share of white.
const MEAN: f32 = 0.1307;
const DEVIATION: f32 = 0.3081;

/// By how many pixels an image is moved up and left.
pub type Shift = [isize; 2];

/// Of so many images, each of up to `most` pixels.
pub fn shifts(images: usize, most: usize, rng: &mut StdRng) -> Vec<Shift> {
    let mut draw = || rng.random_range(0..=2 * most) as isize - most as isize;
    (0..images).map(|_| [draw(), draw()]).collect()
}

/// Images and labels.
#[derive(Clone, Default)]
pub struct Images {
    pixels: Vec<u8>,
    pub labels: Vec<u32>,
}

/// What is trained on and what is held out.
pub struct Data {
    pub training: Images,
    pub validation: Images,
    /// Which images these are, for the table.
    pub name: String,
}

impl Images {
    pub fn count(&self) -> usize {
        self.labels.len()
    }

    /// The images of these indices, `(n, 1, 28, 28)` of mean 0 and deviation 1, each moved by its shift.
    pub fn batch(
        &self,
        indices: &[usize],
        shifts: &[Shift],
        device: &Device,
    ) -> Result<(Tensor, Tensor)> {
        let black = -MEAN / DEVIATION;
        let mut values = vec![black; indices.len() * PIXELS];
        let images = values.chunks_mut(PIXELS).zip(indices.iter().zip(shifts));
        for (image, (&index, [down, right])) in images {
            let pixels = &self.pixels[index * PIXELS..(index + 1) * PIXELS];
            let inside = |i: usize, by: isize| i.checked_add_signed(by).filter(|i| *i < SIDE);
            for y in 0..SIDE {
                for x in 0..SIDE {
                    if let (Some(v), Some(u)) = (inside(y, *down), inside(x, *right)) {
                        let white = f32::from(pixels[v * SIDE + u]) / 255.0;
                        image[y * SIDE + x] = (white - MEAN) / DEVIATION;
                    }
                }
            }
        }
        let labels: Vec<u32> = indices.iter().map(|&i| self.labels[i]).collect();
        let shape = (indices.len(), 1, SIDE, SIDE);
        Ok((
            Tensor::from_vec(values, shape, device)?,
            Tensor::from_vec(labels, indices.len(), device)?,
        ))
    }

    /// The pixels of the images of a class, row by row.
    pub fn of_class(&self, class: u32) -> impl Iterator<Item = &[u8]> {
        let all = self.pixels.chunks(PIXELS).zip(&self.labels);
        all.filter(move |(_, label)| **label == class)
            .map(|(pixels, _)| pixels)
    }

    /// The test images in the files of `dir`.
    pub fn test(dir: &Path) -> Result<Self> {
        pair(dir, "t10k")?.ok_or_else(|| missing(dir).into())
    }

    fn from_files(images: &Idx, labels: &Idx) -> Result<Self> {
        let fits = matches!(images.dims[..], [n, SIDE, SIDE] if labels.dims == [n]);
        if !fits || labels.bytes.iter().any(|&l| usize::from(l) >= CLASSES) {
            let (images, labels) = (&images.dims, &labels.dims);
            return Err(format!("images {images:?} and labels {labels:?} are not MNIST's").into());
        }
        Ok(Self {
            pixels: images.bytes.clone(),
            labels: labels.bytes.iter().map(|&l| u32::from(l)).collect(),
        })
    }

    fn select(&self, indices: &[usize]) -> Self {
        let mut chosen = Self::default();
        for &i in indices {
            chosen
                .pixels
                .extend(&self.pixels[i * PIXELS..(i + 1) * PIXELS]);
            chosen.labels.push(self.labels[i]);
        }
        chosen
    }

    /// All but `count`, and `count`, drawn at random.
    fn split(&self, count: usize, rng: &mut StdRng) -> (Self, Self) {
        let mut order: Vec<usize> = (0..self.count()).collect();
        order.shuffle(rng);
        let (held, rest) = order.split_at(count.min(order.len()));
        (self.select(rest), self.select(held))
    }
}

impl Data {
    /// The files of `dir`: the full set where it is there, otherwise the test images, one in `part` to validate and the
    /// others to train on.
    pub fn read(dir: &Path, part: usize, rng: &mut StdRng) -> Result<Self> {
        let test = Images::test(dir)?;
        Ok(match pair(dir, "train")? {
            Some(training) => Self {
                name: format!("MNIST, {} and {} images", training.count(), test.count()),
                training,
                validation: test,
            },
            None => {
                let (training, validation) = test.split(test.count() / part.max(1), rng);
                let (m, n) = (training.count(), validation.count());
                Self {
                    name: format!("{m} and {n} of MNIST's test images"),
                    training,
                    validation,
                }
            }
        })
    }

    /// The same, or drawn digits where `smoke` asks for a smoke test and there is no MNIST.
    pub fn read_or_draw(dir: &Path, part: usize, smoke: bool, rng: &mut StdRng) -> Result<Self> {
        match Self::read(dir, part, rng) {
            Err(error) if smoke => {
                eprintln!("{error}\n\nNOT MNIST: this smoke test runs on drawn digits.\n");
                Ok(Self::stand_in(rng))
            }
            data => data,
        }
    }

    /// Drawn digits of seven segments with noise, where there is no MNIST.
    pub fn stand_in(rng: &mut StdRng) -> Self {
        Self {
            training: segments(256, rng),
            validation: segments(64, rng),
            name: "NOT MNIST: drawn digits".to_owned(),
        }
    }
}

fn missing(dir: &Path) -> String {
    format!(
        "no MNIST in {}.  Fetch t10k-images-idx3-ubyte.gz and t10k-labels-idx1-ubyte.gz, and \
         train-images-idx3-ubyte.gz and train-labels-idx1-ubyte.gz for the full set, from \
         https://storage.googleapis.com/cvdf-datasets/mnist/ and say where they are: --data DIR",
        dir.display()
    )
}

/// Images and labels of one half, if the images are there.
fn pair(dir: &Path, half: &str) -> Result<Option<Images>> {
    let find = |kind: &str| {
        let plain = dir.join(format!("{half}-{kind}-ubyte"));
        let zipped = dir.join(format!("{half}-{kind}-ubyte.gz"));
        [plain, zipped].into_iter().find(|path| path.is_file())
    };
    match (find("images-idx3"), find("labels-idx1")) {
        (Some(images), Some(labels)) => {
            Images::from_files(&idx::read(&images)?, &idx::read(&labels)?).map(Some)
        }
        (None, None) => Ok(None),
        (images, _) => {
            let missing = if images.is_some() { "labels" } else { "images" };
            Err(format!("{}: {half}-{missing} are missing", dir.display()).into())
        }
    }
}

fn segments(count: usize, rng: &mut StdRng) -> Images {
    // Top, upper left, upper right, middle, lower left, lower right, bottom.
    const LIT: [u8; CLASSES] = [
        0b1110111, 0b0010010, 0b1011101, 0b1011011, 0b0111010, 0b1101011, 0b1101111, 0b1010010,
        0b1111111, 0b1111011,
    ];
    // Corners of each: left, top, right, bottom.
    const PLACES: [[usize; 4]; 7] = [
        [8, 4, 19, 6],
        [8, 4, 10, 14],
        [17, 4, 19, 14],
        [8, 13, 19, 15],
        [8, 14, 10, 24],
        [17, 14, 19, 24],
        [8, 22, 19, 24],
    ];
    let mut images = Images::default();
    for i in 0..count {
        let digit = i % CLASSES;
        let mut image = [0u8; PIXELS];
        image.iter_mut().for_each(|p| *p = rng.random_range(0..60));
        for (s, [left, top, right, bottom]) in PLACES.into_iter().enumerate() {
            if LIT[digit] >> (6 - s) & 1 == 1 {
                for y in top..bottom {
                    image[y * SIDE + left..y * SIDE + right].fill(rng.random_range(180..=255));
                }
            }
        }
        images.pixels.extend(image);
        images.labels.push(digit as u32);
    }
    images
}
