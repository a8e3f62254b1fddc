//! Time: the points at which the solution is wanted, and the time that a field sees.
//!
//! The times t_0 … t_N are kept in f64 on the host.

use std::cell::{Cell, OnceCell};

use candle_core::{DType, Device, Tensor, Var};

use crate::error::{Error, Result};
use crate::memory::room_within;

/// How far two times differ by rounding only, as a part of their size.
const ROUNDING: f64 = 4.0 * f64::EPSILON;

/// Whether two times differ by rounding only.
pub(crate) fn coincide(a: f64, b: f64) -> bool {
    (a - b).abs() <= ROUNDING * a.abs().max(b.abs())
}

/// The finite ones of these times, in the order in which they are met.
pub(crate) fn in_order(times: &[f64], forward: bool) -> Vec<f64> {
    let finite = times.iter().copied().filter(|t| t.is_finite());
    let mut times: Vec<_> = finite.collect();
    times.sort_by(|a, b| match forward {
        true => a.total_cmp(b),
        false => b.total_cmp(a),
    });
    times
}

/// A time next to t, after it or before it, which is also after or before every time that differs from t by rounding only.
pub(crate) fn beside(t: f64, after: bool) -> f64 {
    let by = 2.0 * ROUNDING * t.abs();
    match after {
        true => (t + by).max(t.next_up()),
        false => (t - by).min(t.next_down()),
    }
}

/// The time at which a field is evaluated.
#[derive(Debug)]
pub struct Time {
    value: f64,
    dtype: DType,
    device: Device,
    differentiable: bool,
    /// The step of the solve: its number, and its start and end.
    step: Option<(usize, [f64; 2])>,
    /// The number that the tensor shows, before it is rounded to `dtype`.
    shown_as: f64,
    tensor: OnceCell<Tensor>,
    /// Whether the field asked for the value.
    read: Cell<bool>,
    /// Whether it asked for the tensor.
    shown: Cell<bool>,
}

impl Time {
    /// Time t for fields whose state is summed in `dtype` on `device`.
    pub fn new(t: f64, dtype: DType, device: &Device) -> Self {
        Self {
            value: t,
            dtype,
            device: device.clone(),
            differentiable: false,
            step: None,
            shown_as: t,
            tensor: OnceCell::new(),
            read: Cell::new(false),
            shown: Cell::new(false),
        }
    }

    /// The same, with a tensor that shows t whenever it is read.
    #[cfg(feature = "cuda")]
    pub(crate) fn shown_by(t: f64, tensor: Tensor) -> Self {
        Self {
            tensor: tensor.clone().into(),
            ..Self::new(t, tensor.dtype(), tensor.device())
        }
    }

    /// Like [`new`](Self::new), with [`tensor`](Self::tensor) tracked by candle.
    pub fn differentiable(t: f64, dtype: DType, device: &Device) -> Self {
        Self {
            differentiable: true,
            ..Self::new(t, dtype, device)
        }
    }

    /// t as f64: for tables, schedules and coefficients computed on the host.  Gradients with respect to
    /// time do not include what is computed from this value; use [`tensor`](Self::tensor) for that,
    /// and if steps are to be replayed ([`OdeOptions::graphs`](crate::OdeOptions::graphs)).
    pub fn value(&self) -> f64 {
        self.read.set(true);
        self.value
    }

    /// Marks this time as that of a stage of step number `step` of a solve; the step goes from `interval[0]` to
    /// `interval[1]`.  A solve passes such times to the field; use this in tests of fields that read the step.
    #[must_use]
    pub fn within(self, step: usize, interval: [f64; 2]) -> Self {
        Self {
            step: Some((step, interval)),
            ..self
        }
    }

    /// The same, with a tensor that shows another number, as [`Step::shown`](crate::schedule::Step::shown) says.
    pub(crate) fn shown_as(self, shown_as: f64) -> Self {
        Self { shown_as, ..self }
    }

    /// The same time with a tensor that candle tracks.
    pub(crate) fn tracked(&self) -> Self {
        Self {
            step: self.step,
            shown_as: self.shown_as,
            ..Self::differentiable(self.value, self.dtype, &self.device)
        }
    }

    /// The number that the tensor shows.
    pub(crate) fn peek_shown(&self) -> f64 {
        self.shown_as
    }

    /// Start and end of the step that the field is evaluated in, in the direction of the solve; `None` outside a
    /// solve.  Use it, not [`value`](Self::value), to look up a quantity that jumps in time (slopes of a piecewise
    /// linear path, weights per interval): a stage at the end of a step and a stage at the start of the next step
    /// have the same time, but belong to different sides of a jump.  As with `value`, time gradients do not include
    /// what is computed from it, and a step whose field reads it is not replayed.
    ///
    /// ```
    /// use candle_core::{DType, Device};
    /// use candle_diffeq::Time;
    /// // A table of slopes by unit interval: that of the step, also at its end.
    /// let slope = |t: &Time| {
    ///     let [start, end] = t.interval().unwrap_or([t.value(); 2]);
    ///     [2.0, -1.0][(0.5 * (start + end)) as usize]
    /// };
    /// let stage = Time::new(1.0, DType::F32, &Device::Cpu);
    /// assert_eq!(slope(&stage), -1.0);
    /// assert_eq!(slope(&stage.within(0, [0.0, 1.0])), 2.0);
    /// ```
    pub fn interval(&self) -> Option<[f64; 2]> {
        self.read.set(true);
        self.step.map(|(_, interval)| interval)
    }

    /// Number of the step that the field is evaluated in; `None` outside a solve.
    pub fn step(&self) -> Option<usize> {
        self.read.set(true);
        self.step.map(|(step, _)| step)
    }

    /// The value, without noting that it was read.
    pub(crate) fn peek(&self) -> f64 {
        self.value
    }

    /// The step and its interval, without noting it either.
    pub(crate) fn peek_step(&self) -> Option<(usize, [f64; 2])> {
        self.step
    }

    /// Dtype and device of the tensor.
    pub(crate) fn kind(&self) -> (DType, Device) {
        (self.dtype, self.device.clone())
    }

    /// Whether [`value`](Self::value) has been asked for.
    pub(crate) fn was_read(&self) -> bool {
        self.read.get()
    }

    /// t as a 0-d tensor in **state** dtype, tracked when time gradients are wanted.  If the
    /// field runs in low precision, compute coefficients from this tensor first, and cast the coefficients, not t.
    ///
    /// It is t rounded to that dtype; at a jump of the field, where the solve goes step by step over the whole batch, it is the
    /// neighbour of that number on the side of the step.  Neighbouring numbers of the dtype have a distance: in f32, 2⁻²³ near 1 and 8
    /// near 10⁸.  If the start and the end of a step round to the same number and the field asks for this
    /// tensor, the solve returns [`Error::TimeUnresolved`], because time would not change for the field.  Stages
    /// inside a step may round to the same number; this is ordinary rounding of t.
    ///
    /// ```
    /// use candle_core::{DType, Device, Tensor};
    /// use candle_diffeq::Time;
    /// // f(t, y) = cos(2t)·y, the coefficient formed in state precision, then cast.
    /// let f = |t: &Time, y: &Tensor| y.broadcast_mul(&(t.tensor()? * 2.0)?.cos()?.to_dtype(y.dtype())?);
    /// let y = Tensor::ones((3, 2), DType::BF16, &Device::Cpu)?;
    /// let k = f(&Time::new(0.5, DType::F32, &Device::Cpu), &y)?;
    /// assert_eq!((k.dims(), k.dtype()), (&[3, 2][..], DType::BF16));
    /// # Ok::<(), candle_core::Error>(())
    /// ```
    pub fn tensor(&self) -> candle_core::Result<Tensor> {
        self.shown.set(true);
        if let Some(tensor) = self.tensor.get() {
            return Ok(tensor.clone());
        }
        let tensor = Tensor::new(self.shown_as, &self.device)?.to_dtype(self.dtype)?;
        let tensor = if self.differentiable {
            Var::from_tensor(&tensor)?.into_inner()
        } else {
            tensor
        };
        Ok(self.tensor.get_or_init(|| tensor).clone())
    }

    /// Whether [`tensor`](Self::tensor) is tracked.
    pub(crate) fn is_differentiable(&self) -> bool {
        self.differentiable
    }

    /// Notes that a field has been shown this time by another `Time`.
    pub(crate) fn show(&self) {
        self.shown.set(true);
    }

    /// Whether [`tensor`](Self::tensor) has been asked for.
    pub(crate) fn was_shown(&self) -> bool {
        self.shown.get()
    }

    /// The tracked tensor, if time gradients are wanted and the field asked for it.
    pub(crate) fn leaf(&self) -> Option<&Tensor> {
        self.tensor.get().filter(|_| self.differentiable)
    }
}

/// The times at which the solution is wanted: strictly increasing or strictly decreasing.
#[derive(Clone, Debug)]
pub struct TimeGrid {
    points: Vec<f64>,
    tensor: Option<Tensor>,
}

impl TimeGrid {
    /// A grid of host times.
    ///
    /// # Errors
    /// [`Error::EmptyGrid`], [`Error::NonFiniteTime`], [`Error::GridNotMonotone`].
    pub fn new(points: Vec<f64>) -> Result<Self> {
        let Some((&first, &last)) = points.first().zip(points.last()) else {
            return Err(Error::EmptyGrid);
        };
        if let Some((index, &t)) = points.iter().enumerate().find(|(_, t)| !t.is_finite()) {
            return Err(Error::NonFiniteTime { index, t });
        }
        let forward = last > first;
        let bad = points
            .windows(2)
            .position(|w| w[0] == w[1] || (w[1] > w[0]) != forward);
        if let Some(index) = bad {
            return Err(Error::GridNotMonotone {
                index,
                t0: points[index],
                t1: points[index + 1],
            });
        }
        Ok(Self {
            points,
            tensor: None,
        })
    }

    /// A grid from a 1-D f32 or f64 tensor, read once; tracked (a [`Var`], or computed from one), it
    /// receives time gradients.
    ///
    /// # Errors
    /// As [`TimeGrid::new`], and [`Error::GridShape`], [`Error::GridDtype`].
    pub fn from_tensor(times: &Tensor) -> Result<Self> {
        if times.rank() != 1 {
            return Err(Error::GridShape {
                shape: times.shape().clone(),
            });
        }
        if !matches!(times.dtype(), DType::F32 | DType::F64) {
            return Err(Error::GridDtype {
                dtype: times.dtype(),
            });
        }
        let points = times.to_dtype(DType::F64)?.to_vec1::<f64>()?;
        Ok(Self {
            tensor: Some(times.clone()),
            ..Self::new(points)?
        })
    }

    /// N points from `start` to `end`, both included.
    ///
    /// # Errors
    /// As [`TimeGrid::new`], and [`Error::AllocationFailed`].
    pub fn linspace(start: f64, end: f64, n: usize) -> Result<Self> {
        let last = n.saturating_sub(1).max(1) as f64;
        let at = |i: usize| {
            let (s, length) = (i as f64 / last, end - start);
            match i + 1 == n && n > 1 {
                true => end,
                // One rounding less, so that neighbours that are near stay apart.
                false if length.is_finite() => start + length * s,
                false => start * (1.0 - s) + end * s,
            }
        };
        let mut points = room_within("a time grid", n)?;
        points.extend((0..n).map(at));
        Self::new(points)
    }

    /// The output times.
    pub fn points(&self) -> &[f64] {
        &self.points
    }

    /// The tensor that the grid was read from.
    pub(crate) fn tensor(&self) -> Option<&Tensor> {
        self.tensor.as_ref()
    }

    /// Whether the grid is part of candle's graph.
    pub(crate) fn is_tracked(&self) -> bool {
        self.tensor.as_ref().is_some_and(Tensor::track_op)
    }
}

/// What can be given as output times: slices, arrays and `Vec`s of f64 or f32, a 1-D tensor, a
/// [`TimeGrid`], and references to any of them.
///
/// An f32 is converted to f64 exactly, without further rounding: as a time, `0.1f32` is
/// 0.100000001490116…, not 0.1.
///
/// ```
/// use candle_diffeq::options::Times;
/// let (single, double) = (vec![0f32, 0.5, 1.0], [0.0, 0.5, 1.0]);
/// assert_eq!(single.to_grid()?.points(), double.to_grid()?.points());
/// assert_eq!(single[1..].to_grid()?.points(), (&&double[1..]).to_grid()?.points());
/// # Ok::<(), candle_diffeq::Error>(())
/// ```
pub trait Times {
    /// Validates the times.
    ///
    /// # Errors
    /// As [`TimeGrid::new`] and [`TimeGrid::from_tensor`].
    fn to_grid(&self) -> Result<TimeGrid>;
}

impl Times for [f64] {
    fn to_grid(&self) -> Result<TimeGrid> {
        TimeGrid::new(self.to_vec())
    }
}

impl<const N: usize> Times for [f64; N] {
    fn to_grid(&self) -> Result<TimeGrid> {
        TimeGrid::new(self.to_vec())
    }
}

impl Times for Vec<f64> {
    fn to_grid(&self) -> Result<TimeGrid> {
        TimeGrid::new(self.clone())
    }
}

impl Times for [f32] {
    fn to_grid(&self) -> Result<TimeGrid> {
        TimeGrid::new(self.iter().map(|&t| t.into()).collect())
    }
}

impl<const N: usize> Times for [f32; N] {
    fn to_grid(&self) -> Result<TimeGrid> {
        self.as_slice().to_grid()
    }
}

impl Times for Vec<f32> {
    fn to_grid(&self) -> Result<TimeGrid> {
        self.as_slice().to_grid()
    }
}

impl<T: Times + ?Sized> Times for &T {
    fn to_grid(&self) -> Result<TimeGrid> {
        (**self).to_grid()
    }
}

impl Times for Tensor {
    fn to_grid(&self) -> Result<TimeGrid> {
        TimeGrid::from_tensor(self)
    }
}

impl Times for Var {
    fn to_grid(&self) -> Result<TimeGrid> {
        TimeGrid::from_tensor(self.as_tensor())
    }
}

impl Times for TimeGrid {
    fn to_grid(&self) -> Result<TimeGrid> {
        Ok(self.clone())
    }
}
