//! Steps that are known before the solve: equal parts of every output interval.

use candle_core::DType;

use super::{is_moderate, Node, Output, Step, Steps};
use crate::error::{Error, Result};
use crate::time::TimeGrid;

/// The steps of a solve: their number is stored, but not the steps; step n is computed on request.
#[derive(Clone, Debug)]
pub(crate) struct Fixed {
    points: Vec<f64>,
    /// Steps before each interval, and in all.
    first: Vec<usize>,
    output: Output,
}

/// Numbers of steps are whole numbers in f64, and fit `usize`.
const COUNTABLE: f64 = if usize::BITS < 64 {
    usize::MAX as f64
} else {
    (1u64 << f64::MANTISSA_DIGITS) as f64
};

impl Fixed {
    /// Equal steps, of a number or a size.
    pub(super) fn new(grid: &TimeGrid, steps: &Steps, output: Output) -> Result<Self> {
        match *steps {
            Steps::PerInterval(0) => return Err(Error::NoSteps),
            Steps::Size(size) if !(size > 0.0 && size.is_finite()) => {
                return Err(Error::InvalidStepSize { step_size: size })
            }
            _ => {}
        }
        let parts = |w: &[f64]| match *steps {
            // An interval of exactly m sizes is cut in m, although the quotient may round above it.
            Steps::Size(size) => (((w[1] - w[0]).abs() / size) * (1.0 - 4.0 * f64::EPSILON))
                .ceil()
                .max(1.0),
            Steps::PerInterval(m) => m as f64,
            _ => 1.0,
        };
        let mut first = vec![0];
        let mut count = 0.0;
        for (interval, w) in grid.points().windows(2).enumerate() {
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
            points: grid.points().to_vec(),
            first,
            output,
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
    pub(super) fn is_resolved_in(&self, dtype: DType) -> bool {
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
    pub(super) fn is_moderate(&self) -> bool {
        let intervals = self.points.windows(2).zip(self.first.windows(2));
        let size = |(t, n): (&[f64], &[usize])| (t[1] - t[0]) / (n[1] - n[0]) as f64;
        intervals.map(size).all(is_moderate)
    }

    /// Number of steps.
    pub(super) fn len(&self) -> usize {
        self.first.last().copied().unwrap_or(0)
    }

    /// Number of states that are returned.
    pub(super) fn outputs(&self) -> usize {
        match self.output {
            Output::All => self.points.len(),
            Output::Final => 1,
        }
    }

    /// The number of the state that is returned at node n.
    pub(super) fn at_node(&self, n: usize) -> Option<usize> {
        match self.output {
            Output::All => self.first.binary_search(&n).ok(),
            Output::Final => (n == self.len()).then_some(0),
        }
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
    pub(super) fn step(&self, n: usize) -> Step {
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
            limits: [at(j), at(j + 1.0)],
            nodes: [j, j + 1.0].map(|j| Node::Between(interval, j / parts)),
            dense: false,
        }
    }
}
