//! Noise: increments of Brownian motion, which are computed from a seed and never stored, or given by the user.

mod draw;
mod increments;
mod lanes;
mod normal;
mod philox;
mod tree;

use candle_core::{DType, Device, Tensor};

use crate::error::{Error, Result, SdeDefect};
use draw::{Place, Purpose};
pub use increments::Increments;
pub use philox::philox4x32;
pub use tree::BrownianTree;

/// Where the increments of a solve come from.
///
/// Over a step of length h the driving path W of one channel has the increment ΔW ~ N(0, h) and the integral U =
/// ∫_t^{t+h} (W(s) − W(t)) ds, with mean ½hΔW and variance h³/12 given ΔW.  They come from one of these
/// sources:
///
/// * [`Noise::seeded`]: a generator with a counter.  The numbers of step n, row r and channel j are a function of
///   (seed, n, r, j), computed by Philox 4×32-10 ([`philox4x32`]) and the method of Box and Muller.  Nothing is kept:
///   the backward pass computes them again, in any order.  If you change the steps, you get another Brownian path.
/// * [`BrownianTree`]: a path that is a function of time, so that solves with other steps see the same path.
/// * [`Increments`]: increments that the user gives, with gradients if candle tracks them.
///
/// **Bits.**  The numbers are computed by integer arithmetic and by additions, products, quotients and square roots
/// of f64, so that the bits do not depend on the machine, the number of threads or the vector unit.  The numbers of a
/// row do not depend on how many rows there are.  In a solve in f32 the numbers are rounded once, at the end.
///
/// ```
/// use candle_core::{DType, Device};
/// use candle_diffeq::sde::{BrownianTree, Noise};
/// // The path of a tree over [0, 1] on 64 steps is a refinement of the same on 16.
/// let noise = Noise::from(BrownianTree::new(7, 20)?);
/// let grid = |n: usize| (0..=n).map(|i| i as f64 / n as f64).collect::<Vec<_>>();
/// let fine = noise.increments(&grid(64), (5, 2), DType::F64, &Device::Cpu)?;
/// let coarse = noise.increments(&grid(16), (5, 2), DType::F64, &Device::Cpu)?;
/// let difference = (fine.coarsened(4, 1.0 / 64.0)?.w() - coarse.w())?.abs()?.max_all()?;
/// assert!(difference.to_scalar::<f64>()? < 1e-12);
/// # Ok::<(), candle_diffeq::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Noise(Source);

#[derive(Clone, Debug)]
enum Source {
    Steps { seed: u64, first_row: u64 },
    Tree(BrownianTree),
    Given(Increments),
}

/// Increments of one step in units of its length, `[row][channel]`: ξ = ΔW/√h and η = U/√h³.
#[derive(Clone, Debug)]
pub(crate) struct Drawn {
    pub(crate) w: Vec<f64>,
    /// Empty unless it was asked for.
    pub(crate) u: Vec<f64>,
}

impl Noise {
    /// Independent increments of every step, row and channel, as functions of a seed.
    pub fn seeded(seed: u64) -> Self {
        Self(Source::Steps { seed, first_row: 0 })
    }

    /// The row of the whole batch that the first row is.
    pub(crate) fn first_row(&self) -> u64 {
        match &self.0 {
            Source::Steps { first_row, .. } => *first_row,
            Source::Tree(tree) => tree.first_row,
            _ => 0,
        }
    }

    /// The noise for rows first_row, first_row + 1, … of a larger batch, so that the parts of a batch that is split
    /// among processes see the noise of the whole batch.  Given increments are not changed.
    #[must_use]
    pub fn from_row(self, first_row: u64) -> Self {
        Self(match self.0 {
            Source::Steps { seed, .. } => Source::Steps { seed, first_row },
            Source::Tree(tree) => Source::Tree(BrownianTree { first_row, ..tree }),
            given => given,
        })
    }

    /// The increments of all steps between the times of a grid for a number of rows and channels: ΔW and U of shapes
    /// (steps, rows, channels).
    ///
    /// # Errors
    /// Those of a solve: [`SdeDefect::TreeTooCoarse`], [`SdeDefect::BackwardTime`], and [`SdeDefect::Increments`] if
    /// given increments are not for this grid.
    pub fn increments(
        &self,
        grid: &[f64],
        (rows, channels): (usize, usize),
        dtype: DType,
        device: &Device,
    ) -> Result<Increments> {
        if let Source::Given(given) = &self.0 {
            given.check(grid.len().saturating_sub(1), rows, channels)?;
            return Ok(given.clone());
        }
        let span = [0, grid.len().saturating_sub(1)].map(|i| grid.get(i).copied().unwrap_or(0.0));
        let (mut ws, mut us) = (vec![], vec![]);
        for (n, ends) in grid.windows(2).enumerate() {
            let ends = [ends[0], ends[1]];
            let h = ends[1] - ends[0];
            if h <= 0.0 || h.is_nan() {
                return Err(Error::Sde(SdeDefect::BackwardTime));
            }
            let drawn = self.draw((n, ends), span, (rows, channels), true)?;
            if let Some(Drawn { w, u }) = drawn {
                ws.extend(w.iter().map(|w| h.sqrt() * w));
                us.extend(u.iter().map(|u| h * h.sqrt() * u));
            }
        }
        let shape = (grid.len().saturating_sub(1), rows, channels);
        let tensor = |x: Vec<f64>| Tensor::from_vec(x, shape, &Device::Cpu)?.to_dtype(dtype);
        let tensor = |x| tensor(x)?.to_device(device);
        Increments::new(tensor(ws)?).with_integrals(tensor(us)?)
    }

    /// The increments of step n between its ends, in units of its length; `None` of those that are given.
    pub(crate) fn draw(
        &self,
        (n, ends): (usize, [f64; 2]),
        span: [f64; 2],
        (rows, channels): (usize, usize),
        integrals: bool,
    ) -> Result<Option<Drawn>> {
        match &self.0 {
            Source::Given(_) => Ok(None),
            Source::Tree(tree) => tree.step(ends, span, (rows, channels)).map(Some),
            &Source::Steps { seed, first_row } => {
                let of = |purpose| {
                    let place = Place {
                        seed,
                        purpose,
                        at: n as u64,
                        first_row,
                        blocks: 0,
                    };
                    place.numbers(rows, channels)
                };
                let w = of(Purpose::Increment)?;
                let u = match integrals {
                    false => vec![],
                    true => {
                        let areas = of(Purpose::Area)?.into_iter();
                        let spread = spread_of_area();
                        areas.zip(&w).map(|(z, w)| 0.5 * w + spread * z).collect()
                    }
                };
                Ok(Some(Drawn { w, u }))
            }
        }
    }

    /// Whether it is a path that does not depend on the steps.
    pub(crate) fn is_path(&self) -> bool {
        matches!(self.0, Source::Tree(_))
    }

    /// The increments, if they are given.
    pub(crate) fn given(&self) -> Option<&Increments> {
        match &self.0 {
            Source::Given(given) => Some(given),
            _ => None,
        }
    }
}

/// The standard deviation of η − ½ξ.
fn spread_of_area() -> f64 {
    (1f64 / 12.0).sqrt()
}

impl From<BrownianTree> for Noise {
    fn from(tree: BrownianTree) -> Self {
        Self(Source::Tree(tree))
    }
}

impl From<Increments> for Noise {
    fn from(increments: Increments) -> Self {
        Self(Source::Given(increments))
    }
}

#[cfg(test)]
mod tests;
