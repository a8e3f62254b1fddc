//! A vector field whose weights are piecewise constant in time.

use candle_core::{Result, Tensor};

use crate::error::Error;
use crate::field::{Offer, Pullback, VectorField};
use crate::intervals::Intervals;
use crate::offer::Offered;
use crate::state::State;
use crate::time::{Time, Times};

/// f(t, y) = f_i(t, y) for t_i ≤ t < t_{i+1}: one field after the other, each with weights of its own.
///
/// This gives networks whose weights change with depth, without a hyper-network.  The first field is used before t_1
/// and the last from t_{n−1} on, also outside the grid.  On a decreasing grid, "before" refers to the direction of
/// the grid.  A solve may run in either direction, whatever the direction of the grid.  The field is selected by
/// times on the host; nothing is read from a device.  States and dtypes are those of the fields; the times between
/// the intervals have no gradient.
///
/// Every step of a solve lies in one interval, and all its stages use the field of that interval, also a stage at the
/// time where the interval ends.  A step with such a time inside is cut in two there ([`jumps`](VectorField::jumps)),
/// and adaptive steps end there.  So a method keeps its order.
///
/// On the CPU and with fixed steps, it is integrated tile by tile if its fields are.  With adaptive steps all rows of
/// the batch share their steps, and the solve is not tiled.  Separate solves of each interval are tiled if the fields
/// are.
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_diffeq::nn::{Activation, ConvField};
/// use candle_diffeq::fields::PiecewiseConstant;
/// use candle_diffeq::NeuralOde;
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
    intervals: Intervals,
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
        Ok(Self {
            fields,
            intervals: Intervals::between(points),
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

    /// The interval whose field is used at time t, outside a step.  At a time between two intervals, this is the
    /// interval that begins there.
    pub fn interval(&self, t: f64) -> usize {
        self.intervals.at(t)
    }

    /// The fields, by interval.
    pub fn fields(&self) -> &[F] {
        &self.fields
    }
}

impl<S: State, F: VectorField<S>> VectorField<S> for PiecewiseConstant<F> {
    fn velocity(&self, t: &Time, y: &S) -> Result<S> {
        self.fields[self.intervals.stage(t)].velocity(t, y)
    }

    fn is_traced(&self) -> bool {
        self.fields.iter().all(F::is_traced)
    }

    fn vjp<'f>(&'f self, t: &Time, y: &S) -> Result<(S, Pullback<'f, S>)> {
        self.fields[self.intervals.stage(t)].vjp(t, y)
    }

    fn jumps(&self) -> Vec<f64> {
        let mut jumps = self.intervals.breaks().to_vec();
        // Each field has its own, also outside the interval in which it is used.
        jumps.extend(self.fields.iter().flat_map(F::jumps));
        jumps
    }

    fn offer(&self) -> Option<Offer> {
        let parts = self.fields.iter().map(|f| Offered::from(f.offer()));
        let parts = parts.collect::<Option<Vec<_>>>()?;
        let intervals = self.intervals.clone();
        let shared = |fields| PiecewiseConstant { fields, intervals };
        Some(Offered::in_turn(parts, &self.intervals, shared).into())
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
