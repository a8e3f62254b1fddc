//! Series of observations, from which control paths are built.

use std::sync::Arc;

use candle_core::{DType, IndexOp, Tensor};

use super::fit::{Fit, Interpolation, Wanted};
use super::{log_signature, unstacked, ControlPath};
use crate::error::{PathDefect, Result};
use crate::time::Times;

/// A batch of series of observations, `(batch, length, channels)`, from which control paths are built.
///
/// A value that is NaN was not observed.  Times are common to all series: the solution of a CDE does not depend on
/// how fast its path is run through, so a series with times of its own has them as a channel (as
/// [`with_time`](Self::with_time) adds the common ones), at knots 0, 1, ….  Shorter series are filled up with any
/// finite numbers or NaN, and their [`lengths`](Self::lengths) are given: after its end a path is constant, and so is the solution.
/// (A path of log-signatures is constant from the end of the window in which the series ends.)
///
/// Paths have the dtype of the observations, f32 at least, and their gradients reach the observations if candle tracks
/// these.  The polynomials are computed in f64; log-signatures are computed in the dtype of the path.  Observations are
/// copied: paths and gradients are those of the numbers that were given, whatever is written to a variable afterwards.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_diffeq::cde::Observations;
/// // Two series of two channels; of the second channel of the first one an observation is missing.
/// let xs = Tensor::new(&[[[0f32, 1.0], [2.0, f32::NAN], [3.0, 5.0]], [[1.0, 0.0], [1.0, 1.0], [4.0, 2.0]]], &Device::Cpu)?;
/// let path = Observations::at(&[0.0, 0.5, 2.0], &xs)?.with_time()?.linear()?;
/// assert_eq!((path.rows(), path.channels()), (2, 3));                      // time, and the two
/// assert_eq!(path.evaluate(0.5)?.to_vec2::<f32>()?, [[0.5, 2.0, 2.0], [0.5, 1.0, 1.0]]);
/// assert_eq!(path.derivative(1.0)?.to_vec2::<f32>()?[1], [1.0, 2.0, 2.0 / 3.0]);
/// # Ok::<(), candle_diffeq::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Observations {
    xs: Tensor,
    times: Arc<[f64]>,
    lengths: Arc<[usize]>,
}

impl Observations {
    /// Observations at the times 0, 1, 2, ….
    ///
    /// # Errors
    /// [`PathDefect::Shape`], [`PathDefect::Dtype`], [`PathDefect::TooShort`], [`PathDefect::Infinite`].
    pub fn new(xs: &Tensor) -> Result<Self> {
        let length = xs.dims().get(1).copied().unwrap_or_default();
        Self::made((0..length).map(|i| i as f64).collect(), xs)
    }

    /// Observations at times that increase.  Times of observation receive no gradients; times as data are a channel.
    ///
    /// # Errors
    /// As [`new`](Self::new), those of the grid, [`PathDefect::Times`], [`PathDefect::Decreasing`] and
    /// [`PathDefect::TimeGradients`].
    pub fn at<T: Times + ?Sized>(times: &T, xs: &Tensor) -> Result<Self> {
        let grid = times.to_grid()?;
        match grid.is_tracked() {
            true => Err(PathDefect::TimeGradients.into()),
            false => Self::made(grid.points().into(), xs),
        }
    }

    fn made(times: Arc<[f64]>, xs: &Tensor) -> Result<Self> {
        let shape = || PathDefect::Shape {
            shape: xs.shape().clone(),
        };
        let (rows, length, channels) = xs.dims3().map_err(|_| shape())?;
        if rows * length * channels == 0 {
            return Err(shape().into());
        }
        if times.len() != length {
            let times = times.len();
            return Err(PathDefect::Times { times, length }.into());
        }
        if length < 2 {
            return Err(PathDefect::TooShort { length }.into());
        }
        let (start, end) = (times[0], times[length - 1]);
        if start > end {
            return Err(PathDefect::Decreasing { start, end }.into());
        }
        let xs = match xs.dtype() {
            DType::F32 | DType::F64 => xs.force_contiguous()?,
            DType::F16 | DType::BF16 => xs.to_dtype(DType::F32)?,
            dtype => return Err(PathDefect::Dtype { dtype }.into()),
        };
        let observations = Self {
            xs,
            times,
            lengths: vec![length; rows].into(),
        };
        observations.each(|[row, index, channel], value| match value.is_infinite() {
            true => Err(PathDefect::Infinite {
                row,
                index,
                channel,
                value,
            }),
            false => Ok(()),
        })?;
        Ok(observations)
    }

    /// Looks at every observation, at row, time and channel.
    fn each(
        &self,
        mut see: impl FnMut([usize; 3], f64) -> std::result::Result<(), PathDefect>,
    ) -> Result<()> {
        let (_, length, channels) = self.xs.dims3()?;
        let numbers = self.xs.detach().to_dtype(DType::F64)?.flatten_all()?;
        for (i, x) in numbers.to_vec1::<f64>()?.into_iter().enumerate() {
            let (row, rest) = (i / (length * channels), i % (length * channels));
            see([row, rest / channels, rest % channels], x)?;
        }
        Ok(())
    }

    /// The number of observations of each series: only the first `lengths[i]` observations of series i count.
    ///
    /// # Errors
    /// [`PathDefect::Lengths`], [`PathDefect::Length`].
    pub fn lengths(mut self, lengths: &[usize]) -> Result<Self> {
        let (rows, most, _) = self.xs.dims3()?;
        if lengths.len() != rows {
            let given = lengths.len();
            return Err(PathDefect::Lengths { given, rows }.into());
        }
        for (row, &length) in lengths.iter().enumerate() {
            if !(1..=most).contains(&length) {
                return Err(PathDefect::Length { row, length, most }.into());
            }
        }
        self.lengths = lengths.into();
        Ok(self)
    }

    /// The same observations with their times as one more channel, the first.  Without a channel of time, the
    /// solution does not depend on the speed at which a series is observed.
    ///
    /// # Errors
    /// [`PathDefect::TimesCoincide`] if neighbouring times are equal in the dtype of the observations.
    pub fn with_time(self) -> Result<Self> {
        let (rows, length, _) = self.xs.dims3()?;
        let dtype = self.xs.dtype();
        let times = Tensor::new(&*self.times, self.xs.device())?.to_dtype(dtype)?;
        let rounded = times.to_dtype(DType::F64)?.to_vec1::<f64>()?;
        if let Some(i) = rounded.windows(2).position(|pair| pair[0] == pair[1]) {
            let (start, end) = (self.times[i], self.times[i + 1]);
            return Err(PathDefect::TimesCoincide { start, end, dtype }.into());
        }
        let times = times.reshape((1, length, 1))?.expand((rows, length, 1))?;
        Ok(Self {
            xs: Tensor::cat(&[&times, &self.xs], 2)?,
            ..self
        })
    }

    /// Times of observation.
    pub fn times(&self) -> &[f64] {
        &self.times
    }

    /// The observations, `(batch, length, channels)`, with missing values filled in: by straight lines in time,
    /// constant before the first and after the last observation of a series, and 0 if a channel has no observation.
    ///
    /// # Errors
    /// candle's.
    pub fn filled(&self) -> Result<Tensor> {
        Ok(self.fit(Wanted::Filled).of(&self.xs)?)
    }

    /// Straight lines between observations; missing values are [filled in](Self::filled).  The slope jumps at every
    /// time of observation, so every step of a solve ends there.
    ///
    /// # Errors
    /// candle's.
    pub fn linear(&self) -> Result<ControlPath> {
        self.path(Interpolation::Linear)
    }

    /// Cubic Hermite polynomials with backward differences: the slope at an observation is that of the straight line
    /// from the observation before; missing values are [filled in](Self::filled).  The path up to a time depends on
    /// observations up to the next one only, and its slope is continuous.  J. Morrill et al., "On the choice of
    /// interpolation scheme for neural CDEs" (TMLR 2022).
    ///
    /// # Errors
    /// candle's.
    pub fn hermite(&self) -> Result<ControlPath> {
        self.path(Interpolation::Hermite)
    }

    /// Natural cubic splines through what was observed, channel by channel.  They have the least ∫ |X''|² of all
    /// interpolants.  A channel that was not observed at the first or at the last time has its first or last value
    /// there.
    ///
    /// # Errors
    /// candle's.
    pub fn natural_cubic(&self) -> Result<ControlPath> {
        self.path(Interpolation::NaturalCubic)
    }

    /// Each observation is held until the time of the next observation.  Then the path changes while time is
    /// constant: in one interval, the path goes through (t_i, x_i), (t_{i+1}, x_i) and (t_{i+1}, x_{i+1}) by straight
    /// lines.  So the path up to a time depends on observations up to this time only.  A missing value is the last
    /// that was seen, and zero before the first one.
    ///
    /// `time` is the channel of time.  The knots of the path are 0, 1, 2, …, 2(length − 1), whatever the times of
    /// observation; observation i is at knot 2i.
    ///
    /// # Errors
    /// [`PathDefect::NoChannel`], [`PathDefect::TimeMissing`].
    pub fn rectilinear(&self, time: usize) -> Result<ControlPath> {
        let channels = self.xs.dim(2)?;
        if time >= channels {
            let channel = time;
            return Err(PathDefect::NoChannel { channel, channels }.into());
        }
        self.each(|[row, index, channel], value| {
            let missing = channel == time && index < self.lengths[row] && value.is_nan();
            match missing {
                true => Err(PathDefect::TimeMissing {
                    row,
                    index,
                    channel,
                }),
                false => Ok(()),
            }
        })?;
        self.path(Interpolation::Rectilinear { time })
    }

    /// The log-signature of depth 2 over windows of `window` intervals, for neural rough differential equations.  In
    /// each window the channels of the path change, at constant speed, by the increments ΔX_i; further channels
    /// change by the Lévy areas A_ij = ½ ∫ (X_i dX_j − X_j dX_i), i < j, of the linear path.  For `c` channels the
    /// path has c + c (c − 1)/2 channels.  It has knots only at the ends of windows, so that long series need few
    /// steps.  J. Morrill et al., "Neural rough differential equations for long time series" (ICML 2021).
    ///
    /// # Errors
    /// [`PathDefect::Window`].
    pub fn log_signature(&self, window: usize) -> Result<ControlPath> {
        if window == 0 {
            return Err(PathDefect::Window.into());
        }
        let last = self.times.len() - 1;
        let cuts: Vec<usize> = (0..last).step_by(window).chain([last]).collect();
        let knots: Arc<[f64]> = cuts.iter().map(|&i| self.times[i]).collect();
        let pieces = log_signature::pieces(&self.filled()?, &cuts, &knots)?;
        let jumps = knots[1..knots.len() - 1].to_vec();
        ControlPath::new(knots, &jumps, pieces)
    }

    fn fit(&self, wanted: Wanted) -> Fit {
        Fit {
            wanted,
            times: Arc::clone(&self.times),
            lengths: Arc::clone(&self.lengths),
        }
    }

    fn path(&self, by: Interpolation) -> Result<ControlPath> {
        let knots = by.knots(&self.times);
        let all = self
            .fit(Wanted::Pieces(by, Arc::clone(&knots)))
            .of(&self.xs)?;
        // Where the slope of any series jumps.
        let last = knots.len() - 1;
        let jumps: Vec<f64> = match by.degree() {
            1 => knots[1..last].to_vec(),
            _ => {
                let mut ends: Vec<usize> = self.lengths.iter().map(|n| n - 1).collect();
                ends.sort_unstable();
                ends.dedup();
                let inner = ends.into_iter().filter(|&k| k > 0 && k < last);
                inner.map(|k| knots[k]).collect()
            }
        };
        ControlPath::new(knots, &jumps, unstacked(&all)?)
    }

    /// Series from `first` on, `count` of them.
    ///
    /// # Errors
    /// candle's.
    pub fn narrow(&self, first: usize, count: usize) -> Result<Self> {
        Ok(Self {
            xs: self.xs.i(first..first + count)?,
            times: Arc::clone(&self.times),
            lengths: self.lengths[first..first + count].into(),
        })
    }
}
