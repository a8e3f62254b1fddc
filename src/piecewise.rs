//! A vector field whose weights are piecewise constant in time.

use candle_core::{Result, Tensor};

use crate::error::Error;
use crate::field::{Pullback, VectorField};
use crate::state::State;
use crate::time::{Time, Times};

/// f(t, y) = f_i(t, y) for t_i ≤ t < t_{i+1}: one field after the other, each with weights of its own.
///
/// Networks whose weights change with depth, without a hyper-network: the first field is in force
/// before t_1, the last from t_{n−1} on, also outside the grid.  On a decreasing grid the same
/// holds in the direction of integration.  Which one is in force follows from the host's f64 time;
/// nothing is read from a device.  States and dtypes are those of the fields; the breaks have no
/// gradient.
///
/// At a break the field that begins there is in force, so that a stage at the end of a step that
/// ends on a break (the last of RK4) reads the next field's weights.  A method keeps its order
/// within an interval; across a jump of f it has order one.  Where that matters, chain one solve
/// an interval, which is also integrated tile by tile where the field can be: this one never is.
/// Build it on a grid in the direction of the solve.
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_diffeq::nn::{Activation, ConvField};
/// use candle_diffeq::{NeuralOde, PiecewiseConstant};
/// const TIMES: [f64; 4] = [0.0, 0.25, 0.5, 1.0];
/// let vars = candle_nn::VarMap::new();
/// let ode = NeuralOde::from_field(&vars, "ode", DType::F32, &Device::Cpu, |vb| {
///     PiecewiseConstant::build(&TIMES, |i| {
///         ConvField::new(&[3, 8, 3], 3, Activation::Relu, vb.pp(i)) // ode.0.0.weight, …
///     })
/// })?;
/// let ys = ode.solve(&Tensor::ones((2, 3, 9, 9), DType::F32, &Device::Cpu)?, &TIMES)?;
/// assert_eq!(ys.dims(), [4, 2, 3, 9, 9]);
/// # Ok::<(), candle_diffeq::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct PiecewiseConstant<F> {
    fields: Vec<F>,
    /// t_1 … t_{n−1}.
    breaks: Vec<f64>,
    /// Of the direction of integration.
    sign: f64,
    /// Times closer than this are the same: times of stages carry a rounding.
    resolution: f64,
}

impl<F> PiecewiseConstant<F> {
    /// Fields that exist, one for each interval of `times`.
    ///
    /// # Errors
    /// Those of the grid, and [`Error::FieldCount`].
    pub fn new<T: Times + ?Sized>(times: &T, fields: Vec<F>) -> crate::Result<Self> {
        let grid = times.to_grid()?;
        let points = grid.points();
        let intervals = points.len() - 1;
        if fields.is_empty() || fields.len() != intervals {
            return Err(Error::FieldCount {
                fields: fields.len(),
                intervals,
            });
        }
        let largest = points.iter().fold(0f64, |m, t| m.max(t.abs()));
        Ok(Self {
            fields,
            breaks: points[1..intervals].to_vec(),
            sign: (points[intervals] - points[0]).signum(),
            resolution: 4.0 * f64::EPSILON * largest,
        })
    }

    /// The field of interval i from `build(i)`, for all of `times`.
    ///
    /// # Errors
    /// As [`new`](Self::new), and those of `build`.
    pub fn build<T: Times + ?Sized>(
        times: &T,
        build: impl FnMut(usize) -> Result<F>,
    ) -> Result<Self> {
        let intervals = times.to_grid()?.points().len() - 1;
        let fields = (0..intervals).map(build).collect::<Result<_>>()?;
        Ok(Self::new(times, fields)?)
    }

    /// The interval whose field is in force at time t.
    pub fn interval(&self, t: f64) -> usize {
        self.breaks
            .partition_point(|b| self.sign * (b - t) <= self.resolution)
    }

    /// The fields, by interval.
    pub fn fields(&self) -> &[F] {
        &self.fields
    }
}

impl<S: State, F: VectorField<S>> VectorField<S> for PiecewiseConstant<F> {
    fn velocity(&self, t: &Time, y: &S) -> Result<S> {
        self.fields[self.interval(t.value())].velocity(t, y)
    }

    fn vjp<'f>(&'f self, t: &Time, y: &S) -> Result<(S, Pullback<'f, S>)> {
        self.fields[self.interval(t.value())].vjp(t, y)
    }

    fn parameters(&self) -> Option<Vec<Tensor>> {
        let mut all: Vec<Tensor> = vec![];
        for field in &self.fields {
            for p in field.parameters()? {
                // Intervals may share weights.
                if all.iter().all(|q| q.id() != p.id()) {
                    all.push(p);
                }
            }
        }
        Some(all)
    }
}
