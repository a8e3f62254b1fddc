//! Noise: increments of Brownian motion, which are computed from a seed and never stored, or given by the user.

mod draw;
mod increments;
mod lanes;
mod normal;
mod philox;
mod tree;

use candle_core::{DType, Device, Tensor};

use crate::error::{Error, Result, SdeDefect};
use crate::schedule::Step;
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
/// **Every solve begins its noise anew.**  The numbers of [`Noise::seeded`] belong to the numbers of the steps, and the path
/// of a [`BrownianTree`] to the interval of the solve, from its first time to its last.  Two solves with one seed are
/// therefore not independent: if [0, 1] and then [1, 2] are solved with the same seed, both have the same increments, and
/// W(2) = 2 W(1).  Give every further solve, such as one that continues another, a seed of its own.  A part of a solve has
/// other noise than the whole: a solve over [0, ½] sees another path than the first half of a solve over [0, 1].
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
    /// They are those of a solve whose steps end at the times of the grid.  The grid must begin and end where the solve
    /// does: with a [`BrownianTree`], the increments over [0, ½] alone are not those of a solve over [0, 1].  Another solve
    /// needs another seed.  Increments that were given are converted to the dtype and moved to the device.
    ///
    /// # Errors
    /// Those of a solve: [`SdeDefect::TreeTooCoarse`], [`SdeDefect::BackwardTime`], [`SdeDefect::TooManyRows`], and
    /// [`SdeDefect::Increments`] if given increments are not for this grid.
    pub fn increments(
        &self,
        grid: &[f64],
        (rows, channels): (usize, usize),
        dtype: DType,
        device: &Device,
    ) -> Result<Increments> {
        if let Source::Given(given) = &self.0 {
            given.check(grid.len().saturating_sub(1), rows, channels)?;
            return given.converted(dtype, device);
        }
        self.check_rows(rows as u128)?;
        let span = [0, grid.len().saturating_sub(1)].map(|i| grid.get(i).copied().unwrap_or(0.0));
        let (mut ws, mut us) = (vec![], vec![]);
        for (n, ends) in grid.windows(2).enumerate() {
            let h = ends[1] - ends[0];
            if h <= 0.0 || h.is_nan() {
                return Err(Error::Sde(SdeDefect::BackwardTime));
            }
            let step = Step::free(n, ends[0], h, ends[1]);
            let drawn = self.draw(step, span, (rows, channels), true)?;
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

    /// The increments of a step, in units of its length; `None` of those that are given.
    pub(crate) fn draw(
        &self,
        step: Step,
        span: [f64; 2],
        (rows, channels): (usize, usize),
        integrals: bool,
    ) -> Result<Option<Drawn>> {
        match &self.0 {
            Source::Given(_) => Ok(None),
            Source::Tree(tree) => tree.step(step, span, (rows, channels)).map(Some),
            &Source::Steps { seed, first_row } => {
                let of = |purpose| {
                    let place = Place {
                        seed,
                        purpose,
                        at: step.index as u64,
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

    /// Rows are numbered by 32 bits, from the first row of the noise on.
    pub(crate) fn check_rows(&self, rows: u128) -> Result<()> {
        let end = u128::from(self.first_row()) + rows;
        match end > 1 << 32 {
            true => Err(Error::Sde(SdeDefect::TooManyRows { end })),
            false => Ok(()),
        }
    }

    /// The shortest step over a span that it resolves.
    pub(crate) fn finest(&self, span: [f64; 2]) -> f64 {
        match &self.0 {
            Source::Tree(tree) => tree.finest(span),
            _ => 0.0,
        }
    }

    /// The same for a solve: those that are given may be written before its backward pass.
    pub(crate) fn kept(self) -> Result<Self> {
        Ok(Self(match self.0 {
            Source::Given(given) => Source::Given(given.copied()?),
            drawn => drawn,
        }))
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
