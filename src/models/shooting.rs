//! Multiple shooting: all intervals of a solve at once, each from a guess of its start.
//!
//! The times t_0 … t_N bound N intervals of one length.  With a fine solver F and a coarse one C over an interval,
//! *parareal* (Lions, Maday, Turinici 2001) corrects guesses B_n of the states at t_n in sweeps,
//!
//! B_{n+1} ← F(B_n) + C(B_n new) − C(B_n old),
//!
//! and *Newton's method* solves B_{n+1} = F(B_n) by
//!
//! B_{n+1} ← F(B_n) + DF(B_n) (B_n new − B_n old).
//!
//! F and DF are the expensive parts.  They are evaluated at all starts at once: the intervals are rows of one batch.  What
//! goes from interval to interval is C, or a product with a matrix.  After k sweeps the first k intervals are exact, and
//! after N sweeps all of them are, to rounding; where the guesses are any good, far fewer are needed.
//!
//! The equation is autonomous, y' = f(y), and rows do not read each other: intervals could not be rows otherwise.  States are
//! returned without history.

use candle_core::{DType, Tensor};

use crate::error::Result;
use crate::field::VectorField;
use crate::nn::Jvp;
use crate::odeint::predict;
use crate::precision::Precision;
use crate::problem::OdeOptions;
use crate::schedule::Output;
use crate::time::Time;

/// Multiple shooting over intervals of one length.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_diffeq::{OdeOptions, Time};
/// use candle_diffeq::models::shooting::Shooting;
/// use candle_diffeq::options::Steps;
/// let options = |steps| OdeOptions { steps: Steps::PerInterval(steps), ..Default::default() };
/// let shooting = Shooting::new(options(1), options(20));
/// let decay = |_: &Time, y: &Tensor| y.neg();
/// let shot = shooting.solve(&decay, &Tensor::new(&[[1.0]], &Device::Cpu)?, (8, 0.5))?;
/// let end = shot.states.get(8)?.get(0)?.get(0)?.to_scalar::<f64>()?;
/// assert!((end - (-4f64).exp()).abs() < 1e-9 && shot.changes.len() < 8);
/// # Ok::<(), candle_diffeq::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Shooting {
    coarse: OdeOptions,
    fine: OdeOptions,
    sweeps: usize,
    tolerance: f64,
}

/// What shooting came to.
#[derive(Clone, Debug)]
pub struct Shot {
    /// The states at the bounds of the intervals, `(intervals + 1, rows, …)`, without history.
    pub states: Tensor,
    /// For every sweep, the largest change of any number of the states in it, divided by the largest absolute value of any
    /// number after it.
    pub changes: Vec<f64>,
}

impl Shooting {
    /// Shooting with these options of the coarse and of the fine solver over one interval.
    pub fn new(coarse: OdeOptions, fine: OdeOptions) -> Self {
        let last = |options: OdeOptions| OdeOptions {
            output: Output::Final,
            ..options
        };
        Self {
            coarse: last(coarse),
            fine: last(fine),
            sweeps: usize::MAX,
            tolerance: 1e-12,
        }
    }

    /// Ends after so many sweeps.  Default: as many as there are intervals.
    #[must_use]
    pub fn sweeps(self, most: usize) -> Self {
        Self {
            sweeps: most,
            ..self
        }
    }

    /// Ends when no number has changed by more than this, in units of the largest number.  Default: 1e-12, for f64.
    #[must_use]
    pub fn tolerance(self, tolerance: f64) -> Self {
        Self { tolerance, ..self }
    }

    /// The states of y' = f(y) from y0 `(rows, …)` at the bounds of so many intervals of this length, by parareal.
    ///
    /// # Errors
    /// Those of the solves.
    pub fn solve<F: VectorField>(
        &self,
        field: &F,
        y0: &Tensor,
        (intervals, length): (usize, f64),
    ) -> Result<Shot> {
        let over = |options: &OdeOptions, y: &Tensor| predict(field, y, &[0.0, length], options);
        let guesses = self.guesses(field, y0, (intervals, length))?;
        // C at the old guesses.
        let mut old = guesses[1..].to_vec();
        self.sweeping(guesses, |first, guesses| {
            let fines = over(&self.fine, &Tensor::cat(&guesses[first..intervals], 0)?)?;
            let mut next = guesses.to_vec();
            for n in first..intervals {
                let new = match n == first {
                    // Its start was exact before the sweep.
                    true => old[n].clone(),
                    false => over(&self.coarse, &next[n])?.to_dtype(fines.dtype())?,
                };
                next[n + 1] = ((part(&fines, n - first, y0)? + &new)? - &old[n])?;
                old[n] = new;
            }
            Ok(next)
        })
    }

    /// The same by Newton's method, for a field that has a derivative along a direction, and states `(rows, features)`.
    ///
    /// DF has a column for every feature, all of which are rows of the fine solve, too.
    ///
    /// # Errors
    /// Those of the solves; if y0 is no matrix.
    pub fn newton<F: VectorField + Jvp>(
        &self,
        field: &F,
        y0: &Tensor,
        (intervals, length): (usize, f64),
    ) -> Result<Shot> {
        let (rows, features) = y0.dims2()?;
        let guesses = self.guesses(field, y0, (intervals, length))?;
        let along = |t: &Time, (y, v): &(Tensor, Tensor)| field.jvp(t, y, v);
        let unit = Tensor::eye(features, guesses[0].dtype(), y0.device())?;
        self.sweeping(guesses, |first, guesses| {
            let starts = Tensor::cat(&guesses[first..intervals], 0)?;
            let count = starts.dim(0)?;
            // Every start once for each direction.
            let shape = (count, features, features);
            let each = starts.unsqueeze(1)?.broadcast_as(shape)?.contiguous()?;
            let each = each.reshape((count * features, features))?;
            let directions = unit.unsqueeze(0)?.broadcast_as(shape)?.contiguous()?;
            let directions = directions.reshape((count * features, features))?;
            let (ends, bent) = predict(&along, &(each, directions), &[0.0, length], &self.fine)?;
            let ends = ends.reshape(shape)?.narrow(1, 0, 1)?.squeeze(1)?;
            let bent = bent.reshape(shape)?;
            let mut next = guesses.to_vec();
            for n in first..intervals {
                let moved = (&next[n] - &guesses[n])?.unsqueeze(1)?;
                let columns = bent.narrow(0, (n - first) * rows, rows)?;
                let turned = moved
                    .contiguous()?
                    .matmul(&columns.contiguous()?)?
                    .squeeze(1)?;
                next[n + 1] = (part(&ends, n - first, y0)? + turned)?;
            }
            Ok(next)
        })
    }

    /// The states by the coarse solver alone.
    fn guesses<F: VectorField>(
        &self,
        field: &F,
        y0: &Tensor,
        (intervals, length): (usize, f64),
    ) -> Result<Vec<Tensor>> {
        // All in the dtype in which the fine solver sums.
        let precision = self
            .fine
            .precision
            .unwrap_or_else(|| Precision::of(y0.dtype()));
        let mut guesses = vec![y0.detach().to_dtype(precision.state)?];
        for n in 0..intervals {
            let next = predict(field, &guesses[n], &[0.0, length], &self.coarse)?;
            guesses.push(next.to_dtype(precision.state)?);
        }
        Ok(guesses)
    }

    /// Sweeps until nothing changes; sweep k is told that the starts up to that of interval k are exact.
    fn sweeping(
        &self,
        mut guesses: Vec<Tensor>,
        mut sweep: impl FnMut(usize, &[Tensor]) -> Result<Vec<Tensor>>,
    ) -> Result<Shot> {
        let mut changes = vec![];
        for first in 0..self.sweeps.min(guesses.len() - 1) {
            let next = sweep(first, &guesses)?;
            let [before, after] = [Tensor::stack(&guesses, 0)?, Tensor::stack(&next, 0)?];
            let size = largest(&after)?.max(f64::MIN_POSITIVE);
            let change = largest(&(&after - before)?)? / size;
            changes.push(change);
            guesses = next;
            if change <= self.tolerance {
                break;
            }
        }
        let states = Tensor::stack(&guesses, 0)?;
        Ok(Shot { states, changes })
    }
}

/// The rows of interval n of a batch of all.
fn part(all: &Tensor, n: usize, y0: &Tensor) -> Result<Tensor> {
    let rows = y0.dim(0)?;
    Ok(all.narrow(0, n * rows, rows)?)
}

/// max |x|.
fn largest(x: &Tensor) -> Result<f64> {
    if x.elem_count() == 0 {
        return Ok(0.0);
    }
    let x = x.abs()?.flatten_all()?;
    // A maximum may skip NaN, a sum does not.
    let largest = (x.max(0)? + (&x * 0.0)?.sum(0)?)?;
    Ok(largest.to_dtype(DType::F64)?.to_scalar()?)
}
