//! The cost of a sum over N ranks, α + β · bytes for a message:
//!
//! tree  ⌈log₂ N⌉ (α + β B),   ring  2 (N − 1) (α + β B / N),
//!
//! whichever is less, for the gradients; and a tree of one short message, in which ranks tell each other their rows.

use crate::job::Point;

/// y = start + slope · x.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Linear {
    pub(crate) start: f64,
    pub(crate) slope: f64,
}

impl Linear {
    pub(crate) fn at(self, x: f64) -> f64 {
        self.start + self.slope * x
    }
}

/// Least squares of relative errors, so that short times count as much as long ones; a line through zero where one of
/// the two would be negative.
pub(crate) fn fit(points: &[Point]) -> Linear {
    let sum = |f: fn(&Point) -> f64| points.iter().map(f).sum::<f64>();
    // Rows (1, x) / y and the value 1.
    let (aa, ab) = (sum(|p| 1.0 / (p.y * p.y)), sum(|p| p.x / (p.y * p.y)));
    let bb = sum(|p| p.x * p.x / (p.y * p.y));
    let (a, b) = (sum(|p| 1.0 / p.y), sum(|p| p.x / p.y));
    let determinant = aa * bb - ab * ab;
    let start = (a * bb - b * ab) / determinant;
    let slope = (aa * b - ab * a) / determinant;
    match start > 0.0 && slope > 0.0 {
        true => Linear { start, slope },
        false => Linear {
            start: 0.0,
            slope: b / bb,
        },
    }
}

/// What carries messages, in milliseconds.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Network {
    pub(crate) name: &'static str,
    pub(crate) alpha: f64,
    pub(crate) beta: f64,
}

/// Assumed, of the usual kinds: half a round trip through TCP and 10 Gbit/s; a fast fabric of 100 Gbit/s.
pub(crate) const NETWORKS: [Network; 2] = [
    Network {
        name: "10 Gbit Ethernet, assumed: 30 µs",
        alpha: 30e-3,
        beta: 0.8e-6,
    },
    Network {
        name: "100 Gbit fabric, assumed: 2 µs",
        alpha: 2e-3,
        beta: 0.08e-6,
    },
];

/// Numbers of ranks in the table.
pub(crate) const RANKS: [usize; 4] = [2, 16, 128, 1024];

impl Network {
    /// Milliseconds of a step's sums over n ranks.
    pub(crate) fn sums(&self, ranks: usize, bytes: f64) -> f64 {
        if ranks < 2 {
            return 0.0;
        }
        let n = ranks as f64;
        let rounds = n.log2().ceil();
        let tree = rounds * (self.alpha + self.beta * bytes);
        let ring = 2.0 * (n - 1.0) * (self.alpha + self.beta * bytes / n);
        tree.min(ring) + rounds * self.alpha
    }

    /// The share of a step that is not spent on sums, of ranks that each have so many rows.
    pub(crate) fn efficiency(&self, ranks: usize, bytes: f64, step: f64) -> f64 {
        step / (step + self.sums(ranks, bytes))
    }

    /// Rows of a rank from which on that share is at least this.
    pub(crate) fn rows(&self, ranks: usize, bytes: f64, step: Linear, share: f64) -> f64 {
        let least = share / (1.0 - share) * self.sums(ranks, bytes);
        ((least - step.start) / step.slope).ceil().max(1.0)
    }
}
