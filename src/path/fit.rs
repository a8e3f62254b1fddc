//! Paths through a batch of series, as one operation of candle's.

use std::sync::Arc;

use candle_core::{CpuStorage, CustomOp1, DType, Device, Layout, Shape, Tensor};

use super::series::{pieces, pull_pieces, Piece, Point, Slope, Through};

/// How a path runs between observations.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Interpolation {
    Linear,
    Hermite,
    NaturalCubic,
    Rectilinear { time: usize },
}

impl Interpolation {
    pub(super) fn through(self, channel: usize) -> Through {
        match self {
            Self::Linear | Self::Hermite => Through::Filled,
            Self::NaturalCubic => Through::Observed,
            Self::Rectilinear { time } if time == channel => Through::Ahead,
            Self::Rectilinear { .. } => Through::Held,
        }
    }

    pub(super) fn slope(self) -> Slope {
        match self {
            Self::Linear | Self::Rectilinear { .. } => Slope::Straight,
            Self::Hermite => Slope::Backward,
            Self::NaturalCubic => Slope::Natural,
        }
    }

    pub(super) fn degree(self) -> usize {
        match self {
            Self::Linear | Self::Rectilinear { .. } => 1,
            Self::Hermite | Self::NaturalCubic => 3,
        }
    }

    /// The knots of the path, of times of observation.
    pub(super) fn knots(self, times: &Arc<[f64]>) -> Arc<[f64]> {
        match self {
            Self::Rectilinear { .. } => {
                let knots = self.through(0).knots(times.len());
                (0..knots).map(|k| k as f64).collect()
            }
            _ => Arc::clone(times),
        }
    }
}

/// What is computed of observations `(batch, length, channels)`.
#[derive(Clone, Debug)]
pub(super) enum Wanted {
    /// The same with missing values filled in.
    Filled,
    /// Polynomials `(intervals, batch, degree + 1, channels)` between these knots.
    Pieces(Interpolation, Arc<[f64]>),
}

/// A linear map of the observations, whose missing values are NaN.
#[derive(Clone, Debug)]
pub(super) struct Fit {
    pub(super) wanted: Wanted,
    pub(super) times: Arc<[f64]>,
    /// Observations of each series.
    pub(super) lengths: Arc<[usize]>,
}

impl Fit {
    /// The result, on the device of the observations, in their dtype: f32 or f64.  The map is evaluated in f64 on the
    /// CPU: it is needed once for each batch.
    pub(super) fn of(self, xs: &Tensor) -> candle_core::Result<Tensor> {
        let there = xs.device();
        let fitted = xs.to_device(&Device::Cpu)?.contiguous()?.apply_op1(self)?;
        fitted.to_device(there)
    }

    /// Numbers of the result for each number of a series of the batch: of each interval, or of each observation.
    fn shape(&self, (rows, length, channels): (usize, usize, usize)) -> Vec<usize> {
        match &self.wanted {
            Wanted::Filled => vec![rows, length, channels],
            Wanted::Pieces(by, knots) => vec![knots.len() - 1, rows, by.degree() + 1, channels],
        }
    }

    /// The points of one channel of a row.
    fn points(&self, channel: usize, x: &[f64]) -> Vec<Point> {
        let through = match &self.wanted {
            Wanted::Filled => Through::Filled,
            Wanted::Pieces(by, _) => by.through(channel),
        };
        through.points(x, &self.times)
    }

    fn forward(&self, xs: &[f64], dims: (usize, usize, usize)) -> Vec<f64> {
        let (rows, length, channels) = dims;
        let mut out = vec![0.0; self.shape(dims).iter().product()];
        for (row, &seen) in self.lengths.iter().enumerate() {
            for channel in 0..channels {
                let place = |i: usize| (row * length + i) * channels + channel;
                let x: Vec<f64> = (0..seen).map(|i| xs[place(i)]).collect();
                let points = self.points(channel, &x);
                let values: Vec<f64> = points.iter().map(|p| p.value(&x)).collect();
                match &self.wanted {
                    Wanted::Filled => {
                        for i in 0..length {
                            out[place(i)] = values[i.min(seen - 1)];
                        }
                    }
                    Wanted::Pieces(by, knots) => {
                        let size = by.degree() + 1;
                        let curve = pieces(&points, &values, knots, by.slope());
                        for (interval, piece) in curve.iter().enumerate() {
                            for (j, number) in piece[..size].iter().enumerate() {
                                out[((interval * rows + row) * size + j) * channels + channel] =
                                    *number;
                            }
                        }
                    }
                }
            }
        }
        out
    }

    /// The transpose at the pattern of missing values of `xs`.
    fn backward(&self, xs: &[f64], grad: &[f64], dims: (usize, usize, usize)) -> Vec<f64> {
        let (rows, length, channels) = dims;
        let mut out = vec![0.0; xs.len()];
        for (row, &seen) in self.lengths.iter().enumerate() {
            for channel in 0..channels {
                let place = |i: usize| (row * length + i) * channels + channel;
                let x: Vec<f64> = (0..seen).map(|i| xs[place(i)]).collect();
                let points = self.points(channel, &x);
                let values = match &self.wanted {
                    Wanted::Filled => {
                        let mut values = vec![0.0; seen];
                        for i in 0..length {
                            values[i.min(seen - 1)] += grad[place(i)];
                        }
                        values
                    }
                    Wanted::Pieces(by, knots) => {
                        let size = by.degree() + 1;
                        let of = |interval: usize| {
                            let mut piece: Piece = [0.0; 4];
                            for (j, number) in piece[..size].iter_mut().enumerate() {
                                *number =
                                    grad[((interval * rows + row) * size + j) * channels + channel];
                            }
                            piece
                        };
                        let cotangents: Vec<Piece> = (0..knots.len() - 1).map(of).collect();
                        pull_pieces(&points, &cotangents, knots, by.slope())
                    }
                };
                let mut x_bar = vec![0.0; seen];
                for (point, cotangent) in points.iter().zip(values) {
                    point.pull(cotangent, &mut x_bar);
                }
                for (i, g) in x_bar.into_iter().enumerate() {
                    out[place(i)] = g;
                }
            }
        }
        out
    }
}

impl CustomOp1 for Fit {
    fn name(&self) -> &'static str {
        "control-path"
    }

    fn cpu_fwd(
        &self,
        storage: &CpuStorage,
        layout: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        let dims = layout.shape().dims3()?;
        let Some((from, to)) = layout.contiguous_offsets() else {
            candle_core::bail!("control-path: observations are not contiguous")
        };
        let shape = Shape::from(self.shape(dims));
        let storage = match storage {
            CpuStorage::F32(xs) => {
                let xs: Vec<f64> = xs[from..to].iter().map(|&x| x.into()).collect();
                let out = self.forward(&xs, dims);
                CpuStorage::F32(out.into_iter().map(|x| x as f32).collect())
            }
            CpuStorage::F64(xs) => CpuStorage::F64(self.forward(&xs[from..to], dims)),
            _ => candle_core::bail!("control-path: f32 or f64 is needed"),
        };
        Ok((storage, shape))
    }

    fn bwd(&self, xs: &Tensor, _: &Tensor, grad: &Tensor) -> candle_core::Result<Option<Tensor>> {
        let numbers = |x: &Tensor| {
            let x = x.detach().to_dtype(DType::F64)?;
            x.flatten_all()?.to_vec1::<f64>()
        };
        let dims = xs.dims3()?;
        let x_bar = self.backward(&numbers(xs)?, &numbers(grad)?, dims);
        let x_bar = Tensor::from_vec(x_bar, xs.shape(), &Device::Cpu)?;
        Ok(Some(x_bar.to_dtype(xs.dtype())?))
    }
}
