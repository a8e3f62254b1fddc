//! Control paths X(t) of controlled differential equations, z' = F(z) X'(t).

mod fit;
mod log_signature;
mod observations;
mod series;

use std::sync::Arc;

use candle_core::{DType, Tensor};

pub use observations::Observations;

use crate::error::{Error, PathDefect, Result};
use crate::intervals::Intervals;
use crate::state::State;
use crate::time::Time;

/// A control path X(t): a piecewise polynomial `(rows, channels)`, one for each row of a batch.  All rows have the same
/// knots.
///
/// A path is built from [`Observations`] by one of five interpolations:
///
/// | | X | X' | observations that X needs on \[t_i, t_{i+1}\] |
/// |---|---|---|---|
/// | [`linear`](Observations::linear) | straight lines | jumps at knots | up to t_{i+1}, and the next one of a channel that is missing there |
/// | [`hermite`](Observations::hermite) | cubic, backward differences | continuous | the same |
/// | [`natural_cubic`](Observations::natural_cubic) | cubic spline | continuously differentiable | all |
/// | [`rectilinear`](Observations::rectilinear) | one coordinate after the other | jumps at knots | only those up to the present time |
/// | [`log_signature`](Observations::log_signature) | straight lines over windows, with areas | jumps at knots | the same, of the window |
///
/// Between knots t_i, X = a_i + b_i s + c_i s² + d_i s³ with s = t − t_i.  Where X' jumps, a stage of a solve takes
/// the slope of the interval in which its step lies ([`ControlPath::slope`]).  With the slope of the other interval,
/// every method would have order one.  Steps end where X' jumps ([`odeint_with`](crate::odeint_with) and
/// [`NeuralOde::given`](crate::NeuralOde::given) read this from the path).
///
/// As a [`State`], a path is a list of tensors.  The first tensor holds the knots as integers.  Then follows one
/// tensor of coefficients, `(rows, degree + 1, channels)`, for each interval.  A stage of a solve reads the
/// coefficients of one interval, and its gradient is added to this tensor only.
///
/// [`cdeint`](crate::cde::cdeint) and [`NeuralCde`](crate::cde::NeuralCde) solve CDEs along a path.  A path is a
/// [`State`], so it may also be the argument of any field:
///
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_diffeq::{odeint_with, OdeOptions, Time};
/// use candle_diffeq::cde::{ControlPath, Observations};
/// // y' = −y + X(t)·1, driven by values of the path rather than by its slope.
/// let xs = Tensor::new(&[[[0f64], [1.0], [0.0]]], &Device::Cpu)?;
/// let path = Observations::new(&xs)?.linear()?;
/// let f = |t: &Time, y: &Tensor, path: &ControlPath| path.value(t)? - y;
/// let y0 = Tensor::new(&[[0f64]], &Device::Cpu)?;
/// let ys = odeint_with(f, &y0, &path, &[0.0, 1.0, 2.0], &OdeOptions::default())?;
/// assert!((ys.get(1)?.to_vec2::<f64>()?[0][0] - (-1f64).exp()).abs() < 0.01);   // t − 1 + e^−t
/// # Ok::<(), candle_diffeq::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct ControlPath {
    lookup: Lookup,
    /// Knots at which the slope jumps.
    jumps: Arc<[f64]>,
    /// Bits of the knots, and whether the slope jumps there, `(2, knots)` integers.
    table: Tensor,
    pieces: Vec<Tensor>,
}

/// Where a time lies among the knots of a path.
#[derive(Clone, Debug)]
pub(crate) struct Lookup {
    knots: Arc<[f64]>,
    intervals: Arc<Intervals>,
}

impl Lookup {
    fn new(knots: Arc<[f64]>) -> Self {
        Self {
            intervals: Arc::new(Intervals::between(&knots)),
            knots,
        }
    }

    /// The interval of time t in a step, and the time since its start.
    pub(crate) fn place(&self, t: f64, step: [f64; 2]) -> (usize, f64) {
        self.since(self.intervals.within(step, t), t)
    }

    fn since(&self, interval: usize, t: f64) -> (usize, f64) {
        (interval, t - self.knots[interval])
    }
}

impl ControlPath {
    /// Polynomials `(rows, degree + 1, channels)` between knots, at some of which the slope jumps.
    fn new(knots: Arc<[f64]>, jumps: &[f64], pieces: Vec<Tensor>) -> Result<Self> {
        let Some(first) = pieces.first() else {
            return Err(PathDefect::TooShort { length: 1 }.into());
        };
        let bits = knots.iter().map(|t| t.to_bits() as i64);
        let marks = knots
            .iter()
            .map(|t| i64::from(jumps.binary_search_by(|jump| jump.total_cmp(t)).is_ok()));
        let table: Vec<i64> = bits.chain(marks).collect();
        let table = Tensor::from_vec(table, (2, knots.len()), first.device())?;
        Ok(Self {
            lookup: Lookup::new(knots),
            jumps: jumps.into(),
            table,
            pieces,
        })
    }

    /// The knots t_0 … t_n.  As the times of a solve, they give steps that are intervals of the path.
    pub fn knots(&self) -> &[f64] {
        &self.lookup.knots
    }

    /// The first and the last knot.
    pub fn ends(&self) -> [f64; 2] {
        let knots = self.knots();
        [knots[0], knots[knots.len() - 1]]
    }

    /// The same path, but steps of a solve end at all its knots, as they do if the slope jumps there.  The slope of a
    /// cubic path is continuous, but higher derivatives jump: adaptive steps across knots are rejected often, and
    /// their error may be a hundred tolerances.
    ///
    /// # Errors
    /// candle's.
    pub fn stopping_at_knots(self) -> Result<Self> {
        let knots = Arc::clone(&self.lookup.knots);
        let inner = knots[1..knots.len() - 1].to_vec();
        Self::new(knots, &inner, self.pieces)
    }

    /// Rows of the batch.
    pub fn rows(&self) -> usize {
        self.pieces[0].dims()[0]
    }

    /// Channels of the path.
    pub fn channels(&self) -> usize {
        self.pieces[0].dims()[2]
    }

    /// Dtype of values and slopes: f32 or f64.
    pub fn dtype(&self) -> DType {
        self.pieces[0].dtype()
    }

    /// Whether candle tracks the observations.
    pub fn is_tracked(&self) -> bool {
        self.pieces.iter().any(Tensor::track_op)
    }

    /// X(t), `(rows, channels)`.
    ///
    /// # Errors
    /// [`PathDefect::Outside`].
    pub fn evaluate(&self, t: f64) -> Result<Tensor> {
        self.outside_steps(t, 0)
    }

    /// X'(t), `(rows, channels)`.  At a knot, this is the slope of the interval that begins there.
    ///
    /// # Errors
    /// [`PathDefect::Outside`].
    pub fn derivative(&self, t: f64) -> Result<Tensor> {
        self.outside_steps(t, 1)
    }

    /// X''(t), `(rows, channels)`.  At a knot, this is the value in the interval that begins there.
    ///
    /// # Errors
    /// [`PathDefect::Outside`].
    pub fn second_derivative(&self, t: f64) -> Result<Tensor> {
        self.outside_steps(t, 2)
    }

    /// X at a stage of a solve.
    ///
    /// # Errors
    /// [`PathDefect::Outside`].
    pub fn value(&self, t: &Time) -> candle_core::Result<Tensor> {
        self.in_step(t, 0)
    }

    /// X' at a stage of a solve.  At a knot, this is the slope of the interval in which the step of the stage lies.
    /// If gradients with respect to time are wanted, X' is tracked through [`Time::tensor`].
    ///
    /// # Errors
    /// [`PathDefect::Outside`].
    pub fn slope(&self, t: &Time) -> candle_core::Result<Tensor> {
        self.in_step(t, 1)
    }

    /// The interval of a stage, and the time since its start.
    fn place(&self, t: &Time) -> Result<(usize, f64)> {
        self.defined(t.value())?;
        let interval = self.lookup.intervals.stage(t);
        Ok(self.lookup.since(interval, t.value()))
    }

    /// The same for other code.
    pub(crate) fn lookup(&self) -> Lookup {
        self.lookup.clone()
    }

    /// Coefficients of an interval, `(rows, degree + 1, channels)`: of the powers of the time since its start.
    pub fn coefficients(&self, interval: usize) -> Option<&Tensor> {
        self.pieces.get(interval)
    }

    fn outside_steps(&self, t: f64, order: usize) -> Result<Tensor> {
        self.defined(t)?;
        let (interval, s) = self.lookup.since(self.lookup.intervals.at(t), t);
        let s = Since::Number(s);
        Ok(polynomial(&self.pieces[interval], order, &s)?)
    }

    fn in_step(&self, t: &Time, order: usize) -> candle_core::Result<Tensor> {
        let (interval, s) = self.place(t)?;
        let piece = &self.pieces[interval];
        // The slope of a straight line does not depend on time.
        let depends = piece.dims()[1] > order + 1;
        let since = match depends && t.is_differentiable() {
            true => {
                // s to its own precision, with the derivative of t.
                let t = t.tensor()?;
                Since::Tensor(((&t - t.detach())? + s)?.to_dtype(piece.dtype())?)
            }
            false => Since::Number(s),
        };
        polynomial(piece, order, &since)
    }

    fn defined(&self, t: f64) -> Result<()> {
        let [start, end] = self.ends();
        let resolution = self.lookup.intervals.resolution();
        if t >= start - resolution && t <= end + resolution {
            return Ok(());
        }
        Err(PathDefect::Outside { t, start, end }.into())
    }
}

/// The time since the start of an interval.
enum Since {
    Number(f64),
    /// 0-d.
    Tensor(Tensor),
}

/// A derivative of a polynomial in s with coefficients `(rows, degree + 1, channels)`, by Horner's rule.
fn polynomial(coefficients: &Tensor, order: usize, s: &Since) -> candle_core::Result<Tensor> {
    let degree = coefficients.dims()[1] - 1;
    let term = |j: usize| {
        // j (j − 1) … (j − order + 1), of s^j.
        let factor = (0..order).fold(1.0, |f, i| f * (j - i) as f64);
        let c = coefficients.narrow(1, j, 1)?.squeeze(1)?;
        if factor == 1.0 {
            Ok::<_, candle_core::Error>(c)
        } else {
            c * factor
        }
    };
    if order > degree {
        return coefficients.narrow(1, 0, 1)?.squeeze(1)?.zeros_like();
    }
    let mut sum = term(degree)?;
    for j in (order..degree).rev() {
        let times = match s {
            Since::Number(s) => (sum * *s)?,
            Since::Tensor(s) => sum.broadcast_mul(s)?,
        };
        sum = (term(j)? + times)?;
    }
    Ok(sum)
}

/// The slices of a tensor along its first dimension, each in memory of its own.  Halves of halves: the gradient of a
/// slice is as large as what it was cut from, so that n slices of one tensor would cost n² in the backward pass.
fn unstacked(x: &Tensor) -> candle_core::Result<Vec<Tensor>> {
    match x.dim(0)? {
        0 => Ok(vec![]),
        1 => Ok(vec![x.squeeze(0)?.force_contiguous()?]),
        n => {
            let mut slices = unstacked(&x.narrow(0, 0, n / 2)?)?;
            slices.extend(unstacked(&x.narrow(0, n / 2, n - n / 2)?)?);
            Ok(slices)
        }
    }
}

impl State for ControlPath {
    fn leaves(&self) -> Vec<Tensor> {
        let pieces = self.pieces.iter();
        std::iter::once(&self.table)
            .chain(pieces)
            .cloned()
            .collect()
    }

    fn from_leaves(mut leaves: Vec<Tensor>) -> Result<Self> {
        let no_path = || Error::from(PathDefect::NoPath);
        if leaves.len() < 2 {
            return Err(no_path());
        }
        let pieces = leaves.split_off(1);
        let table = leaves.pop().ok_or_else(no_path)?;
        if table.dims() != [2, pieces.len() + 1] || table.dtype() != DType::I64 {
            return Err(no_path());
        }
        let numbers = table.flatten_all()?.to_vec1::<i64>()?;
        let (bits, marks) = numbers.split_at(pieces.len() + 1);
        let knots: Arc<[f64]> = bits.iter().map(|&b| f64::from_bits(b as u64)).collect();
        let marked = knots.iter().zip(marks).filter(|(_, mark)| **mark != 0);
        let same = |piece: &Tensor| piece.rank() == 3 && piece.shape() == pieces[0].shape();
        if !pieces.iter().all(same) {
            return Err(no_path());
        }
        Ok(Self {
            jumps: marked.map(|(t, _)| *t).collect(),
            lookup: Lookup::new(knots),
            table,
            pieces,
        })
    }

    fn keeps_dtypes(&self) -> bool {
        true
    }

    fn jumps(&self) -> Vec<f64> {
        self.jumps.to_vec()
    }
}
