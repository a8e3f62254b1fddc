//! Intervals of time between breaks, and which of them a stage of a solve lies in.

use crate::time::Time;

/// Half-open intervals between breaks t_1 … t_{n−1}: before t_1, from t_i to t_{i+1}, and from t_{n−1} on.
#[derive(Clone, Debug)]
pub(crate) struct Intervals {
    /// t_1 … t_{n−1}.
    breaks: Vec<f64>,
    /// Of the direction of the grid.
    sign: f64,
    /// Times closer than this are the same: times of stages carry a rounding.
    resolution: f64,
}

impl Intervals {
    /// Those between neighbouring points of a monotone grid of at least two.
    pub(crate) fn between(points: &[f64]) -> Self {
        let last = points.len().saturating_sub(1);
        let largest = points.iter().fold(0f64, |m, t| m.max(t.abs()));
        let ends = points.first().zip(points.last());
        Self {
            breaks: points.get(1..last).unwrap_or_default().to_vec(),
            sign: ends.map_or(1.0, |(first, last)| (last - first).signum()),
            resolution: 4.0 * f64::EPSILON * largest,
        }
    }

    /// t_1 … t_{n−1}.
    pub(crate) fn breaks(&self) -> &[f64] {
        &self.breaks
    }

    /// Times closer than this are the same.
    pub(crate) fn resolution(&self) -> f64 {
        self.resolution
    }

    /// The interval that t lies in, outside a step: at a break, the one that begins there.
    pub(crate) fn at(&self, t: f64) -> usize {
        self.begun(t, self.resolution)
    }

    /// Breaks that are not after t.
    fn begun(&self, t: f64, resolution: f64) -> usize {
        self.breaks
            .partition_point(|b| self.sign * (b - t) <= resolution)
    }

    /// The interval of a stage of a solve: one that its step has a part in.  So a stage at a break where the step ends
    /// lies in the interval before the break, and one where the step begins in the interval behind it.
    pub(crate) fn stage(&self, t: &Time) -> usize {
        match t.interval() {
            Some(step) => self.within(step, t.value()),
            None => self.at(t.value()),
        }
    }

    /// The same of time t in a step.
    pub(crate) fn within(&self, [start, end]: [f64; 2], t: f64) -> usize {
        // A solve may reach far beyond the grid, where times are coarser.
        let resolution = 4.0 * f64::EPSILON * start.abs().max(end.abs());
        let resolution = self.resolution.max(resolution);
        let (from, to) = match self.sign * (end - start) < 0.0 {
            true => (end, start),
            false => (start, end),
        };
        let first = self.begun(from, resolution);
        // Breaks before the end: at one that is the end, the next interval begins after the step.
        let last = self
            .breaks
            .partition_point(|b| self.sign * (b - to) < -resolution);
        self.begun(t, resolution).clamp(first, last.max(first))
    }
}
