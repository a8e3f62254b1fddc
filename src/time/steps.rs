//! The steps between output times.

use candle_core::DType;

use super::TimeGrid;
use crate::error::{Error, Result};

/// How each output interval is cut into steps.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Steps {
    /// m equal steps in every interval.
    PerInterval(usize),
    /// ⌈|t_{i+1} − t_i| / size⌉ equal steps, so none is longer than `size`.
    Size(f64),
}

impl Default for Steps {
    fn default() -> Self {
        Self::PerInterval(1)
    }
}

/// One step [t, t + h], the j-th of the m equal parts of an output interval.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Step {
    /// Number of the step in the solve.
    pub(crate) index: usize,
    /// Time at its start.
    pub(crate) t: f64,
    /// Signed length.
    pub(crate) h: f64,
    /// Time at its end: the start of the next step, or the output time that it ends on, to the bit.
    pub(crate) end: f64,
    /// Output interval that it lies in.
    pub(crate) interval: usize,
    /// Its start and end as fractions of that interval.
    pub(crate) span: (f64, f64),
}

impl Step {
    /// Time of a stage at abscissa c.
    pub(crate) fn at(&self, c: f64) -> f64 {
        self.t + c * self.h
    }

    /// Whether it begins and ends at one number of this dtype.
    pub(crate) fn stands_still_in(&self, dtype: DType) -> bool {
        let end = self.t + self.h;
        match dtype {
            DType::F64 => self.t == end,
            _ => self.t as f32 == end as f32,
        }
    }

    /// Whether an output time ends the step.
    pub(crate) fn ends_interval(&self) -> bool {
        self.span.1 == 1.0
    }
}

/// The steps of a solve: their number is stored, but not the steps; step n is computed on request.
#[derive(Clone, Debug)]
pub(crate) struct StepPlan {
    points: Vec<f64>,
    /// Steps before each interval, and in all.
    first: Vec<usize>,
}

/// Numbers of steps are whole numbers in f64, and fit `usize`.
const COUNTABLE: f64 = if usize::BITS < 64 {
    usize::MAX as f64
} else {
    (1u64 << f64::MANTISSA_DIGITS) as f64
};

impl StepPlan {
    pub(crate) fn new(grid: &TimeGrid, steps: Steps) -> Result<Self> {
        match steps {
            Steps::PerInterval(0) => return Err(Error::NoSteps),
            Steps::Size(size) if !(size > 0.0 && size.is_finite()) => {
                return Err(Error::InvalidStepSize { step_size: size })
            }
            _ => {}
        }
        let parts = |w: &[f64]| match steps {
            Steps::PerInterval(m) => m as f64,
            // An interval of exactly m sizes is cut in m, although the quotient may round above it.
            Steps::Size(size) => (((w[1] - w[0]).abs() / size) * (1.0 - 4.0 * f64::EPSILON))
                .ceil()
                .max(1.0),
        };
        let mut first = vec![0];
        let mut count = 0.0;
        for (interval, w) in grid.points.windows(2).enumerate() {
            if !(w[1] - w[0]).is_finite() {
                return Err(Error::IntervalOverflow {
                    index: interval,
                    t0: w[0],
                    t1: w[1],
                });
            }
            count += parts(w);
            if count >= COUNTABLE {
                return Err(Error::TooManySteps {
                    steps: format!("{steps:?}"),
                    interval,
                    count,
                });
            }
            first.push(count as usize);
        }
        let plan = Self {
            points: grid.points.clone(),
            first,
        };
        // Steps of one interval are equal, so its first and last tell whether any vanishes.
        for i in 0..plan.points.len() - 1 {
            for n in [plan.first[i], plan.first[i + 1] - 1] {
                let step = plan.step(n);
                if step.t + step.h == step.t {
                    return Err(Error::StepUnderflow { step: n, t: step.t });
                }
            }
        }
        Ok(plan)
    }

    /// Whether no step can begin and end at one number of this dtype.
    pub(crate) fn is_resolved_in(&self, dtype: DType) -> bool {
        if dtype == DType::F64 {
            // Or the plan would not be.
            return true;
        }
        let intervals = 0..self.points.len() - 1;
        intervals.into_iter().all(|i| {
            let (t0, t1) = (self.points[i], self.points[i + 1]);
            let parts = (self.first[i + 1] - self.first[i]) as f64;
            let largest = t0.abs().max(t1.abs()) as f32;
            let spacing = largest.next_up() - largest;
            ((t1 - t0) / parts).abs() > spacing.into()
        })
    }

    /// Whether every step is far from the ends of the range of f32.
    pub(crate) fn is_moderate(&self) -> bool {
        let far = 2f64.powi(100);
        let moderate = 1.0 / far..=far;
        let intervals = self.points.windows(2).zip(self.first.windows(2));
        let size = |(t, n): (&[f64], &[usize])| ((t[1] - t[0]) / (n[1] - n[0]) as f64).abs();
        intervals.map(size).all(|h| moderate.contains(&h))
    }

    /// Number of steps.
    pub(crate) fn len(&self) -> usize {
        self.first.last().copied().unwrap_or(0)
    }

    /// Number of output times.
    pub(crate) fn outputs(&self) -> usize {
        self.points.len()
    }

    /// The interval that step n < len is in.
    fn interval(&self, n: usize) -> usize {
        // Where all have as many steps it is this one.
        let intervals = self.points.len() - 1;
        let even = n.checked_mul(intervals).map(|n| n / self.len());
        let even = even.filter(|&i| self.first[i] <= n && n < self.first[i + 1]);
        even.unwrap_or_else(|| self.first.partition_point(|&f| f <= n) - 1)
    }

    /// Step n < len.
    pub(crate) fn step(&self, n: usize) -> Step {
        let interval = self.interval(n);
        let (t0, t1) = (self.points[interval], self.points[interval + 1]);
        let parts = (self.first[interval + 1] - self.first[interval]) as f64;
        let j = (n - self.first[interval]) as f64;
        let at = |j: f64| match j == parts {
            true => t1,
            false => t0 + (t1 - t0) * (j / parts),
        };
        Step {
            index: n,
            t: at(j),
            h: (t1 - t0) / parts,
            end: at(j + 1.0),
            interval,
            span: (j / parts, (j + 1.0) / parts),
        }
    }
}
