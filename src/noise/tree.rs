//! A Brownian path that is fixed before it is looked at: the virtual Brownian tree.
//!
//! The path over the whole interval of a solve is halved again and again.  Over an interval of length h the pair (W, H) is
//! the increment and the space-time area H = U/h − ½W, where U is the integral of the path above its start; W ~ N(0, h) and
//! H ~ N(0, h/12) are independent.  With two standard normal numbers z₁, z₂ of the interval's own, its left half has
//!
//! W₁ = ½W + (3/2)H + ¼√h z₁,  H₁ = ¼H − ⅛√h z₁ + ½√(h/12) z₂,
//!
//! and its right half W₂ = W − W₁, H₂ = ¼H − ⅛√h z₁ − ½√(h/12) z₂ (J. Foster, T. Lyons, H. Oberhauser, "An optimal polynomial
//! approximation of Brownian motion", SIAM J. Numer. Anal. 58 (2020)).  So a step may be of any length, and be tried again
//! with another; nothing is kept, and a query costs as many halvings as the tree is deep.
//!
//! At a part r of an interval of length h, with x = r(1 − r), the path and its integral I from the start of the interval are
//!
//! W(r) = rW + 6xH + √h a z₁,  I(r) = h (½r²W + (3 − 2r)r²H + √h (b z₁ + c z₂)),
//!
//! with a² = x(1 − 3x), ab = x²(½ − r) and b² + c² = x³/3, their covariances given W and H; r = ½ is the halving.

use super::draw::{Place, Purpose};
use super::Drawn;
use crate::error::{Error, Result, SdeDefect};
use crate::schedule::Step;

/// A Brownian path over the interval of a solve, which does not depend on the steps; see [`Noise`](super::Noise).
///
/// The path over the interval is halved again and again, by the conditional law of the increment and the space-time area of
/// each half (J. Foster, T. Lyons, H. Oberhauser, "An optimal polynomial approximation of Brownian motion", SIAM J. Numer.
/// Anal. 58, 2020).  `depth` is the number of halvings: the finest of the 2^depth intervals have the length of the whole divided by
/// 2^depth.  One point inside a finest interval has the law that it has in Brownian motion, but two points have not, so a
/// step must not be shorter than a finest interval.  The time of a step grows with the depth, and nothing is stored.
///
/// The path belongs to the interval from the first time of a solve to its last.  Over another interval, the same seed gives
/// the same path in other units of time, neither its continuation nor a part of it.  So a solve that continues another
/// needs another seed, and the grid of [`Noise::increments`](super::Noise::increments) must begin and end where the solve
/// does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BrownianTree {
    pub(super) seed: u64,
    pub(super) first_row: u64,
    pub(super) depth: u32,
}

/// The deepest tree: then the numbers of nodes fit into a counter.
const DEEPEST: u32 = 52;

/// A point nearer to a node than this part of the finest interval lies on it: times are rounded.
const ON_NODE: f64 = 1e-6;

/// The path from the start of an interval on: that interval, and the values at its start.
struct Walk {
    /// W and its integral from the start of the solve.
    value: Vec<f64>,
    integral: Vec<f64>,
    /// Of the interval.
    w: Vec<f64>,
    h: Vec<f64>,
    length: f64,
}

impl Walk {
    /// Moves on by a part 0 < r < 1 of the interval.
    fn advance(&mut self, r: f64, [z1, z2]: &[Vec<f64>; 2]) {
        let (x, root) = (r * (1.0 - r), self.length.sqrt());
        let a = (x * (1.0 - 3.0 * x)).sqrt();
        let b = x * x * (0.5 - r) / a;
        let c = (x * x * x / (12.0 * (1.0 - 3.0 * x))).sqrt();
        for i in 0..self.w.len() {
            let (w, h) = (self.w[i], self.h[i]);
            let area = 0.5 * r * r * w + (3.0 - 2.0 * r) * r * r * h;
            let turn = root * (b * z1[i] + c * z2[i]);
            self.integral[i] += self.length * (r * self.value[i] + area + turn);
            self.value[i] += r * w + 6.0 * x * h + root * a * z1[i];
        }
    }

    /// Moves on to the end of the interval.
    fn end(&mut self) {
        for i in 0..self.w.len() {
            let (w, h) = (self.w[i], self.h[i]);
            self.integral[i] += self.length * (self.value[i] + 0.5 * w + h);
            self.value[i] += w;
        }
    }

    /// Goes to a half of the interval.
    fn halve(&mut self, [z1, z2]: &[Vec<f64>; 2], right: bool) {
        let (root, spread) = (self.length.sqrt(), (self.length / 12.0).sqrt());
        self.length *= 0.5;
        for i in 0..self.w.len() {
            let (w, h) = (self.w[i], self.h[i]);
            let (middle, turn) = (0.25 * h - 0.125 * root * z1[i], 0.5 * spread * z2[i]);
            let left = 0.5 * w + 1.5 * h + 0.25 * root * z1[i];
            if right {
                let area = 0.5 * left + middle + turn;
                self.integral[i] += self.length * (self.value[i] + area);
                self.value[i] += left;
                (self.w[i], self.h[i]) = (w - left, middle - turn);
            } else {
                (self.w[i], self.h[i]) = (left, middle + turn);
            }
        }
    }
}

impl BrownianTree {
    /// The path of a seed, with `depth` halvings.  A depth of 20 resolves steps of a millionth of the interval.
    ///
    /// # Errors
    /// [`SdeDefect::Depth`]: a depth above 52.
    pub fn new(seed: u64, depth: u32) -> Result<Self> {
        match depth <= DEEPEST {
            true => Ok(Self {
                seed,
                first_row: 0,
                depth,
            }),
            false => Err(Error::Sde(SdeDefect::Depth { depth })),
        }
    }

    /// W and its integral from the start of the span to time t, `[row][channel]`.
    fn at(&self, t: f64, span: [f64; 2], (rows, channels): (usize, usize)) -> Result<Walk> {
        let length = span[1] - span[0];
        let scale = f64::from(self.depth).exp2();
        let place = ((t - span[0]) / length).clamp(0.0, 1.0) * scale;
        let (mut node, mut rest) = (place.floor(), place - place.floor());
        if rest > 1.0 - ON_NODE {
            (node, rest) = (node + 1.0, 0.0);
        } else if rest < ON_NODE {
            rest = 0.0;
        }
        let drawn = |purpose: Purpose, at: u64| {
            let place = Place {
                seed: self.seed,
                purpose,
                at,
                first_row: self.first_row,
                blocks: channels,
            };
            place.pairs(rows)
        };
        let [z1, z2] = drawn(Purpose::Root, 0)?;
        let scaled = |z: Vec<f64>, c: f64| z.into_iter().map(|z| c * z).collect();
        let mut walk = Walk {
            value: vec![0.0; z1.len()],
            integral: vec![0.0; z1.len()],
            w: scaled(z1, length.sqrt()),
            h: scaled(z2, (length / 12.0).sqrt()),
            length,
        };
        if node >= scale {
            walk.end();
            return Ok(walk);
        }
        let node = node as u64;
        for level in 0..self.depth {
            // On the start of the interval that has been reached: nothing below it is asked for.
            let below = self.depth - level;
            if rest == 0.0 && node & ((1 << below) - 1) == 0 {
                return Ok(walk);
            }
            let here = 1 << level | node >> below;
            walk.halve(&drawn(Purpose::Node, here)?, node >> (below - 1) & 1 == 1);
        }
        if rest > 0.0 {
            walk.advance(rest, &drawn(Purpose::Node, 1 << self.depth | node)?);
        }
        Ok(walk)
    }

    /// The length of a finest interval.
    pub(super) fn finest(&self, span: [f64; 2]) -> f64 {
        (span[1] - span[0]) / f64::from(self.depth).exp2()
    }

    /// Of a step of a solve over the span.
    pub(super) fn step(&self, step: Step, span: [f64; 2], shape: (usize, usize)) -> Result<Drawn> {
        let Step { t, h, end, .. } = step;
        // Times are rounded, so that this is not h where they are large.
        let apart = end - t;
        let finest = self.finest(span);
        if h.max(apart) < finest * (1.0 - ON_NODE) {
            return Err(Error::Sde(SdeDefect::TreeTooCoarse { t, h, finest }));
        }
        let (start, end) = (self.at(t, span, shape)?, self.at(end, span, shape)?);
        // The solve multiplies by powers of h.
        let (root, cube) = (h.sqrt(), h * h.sqrt());
        let each = 0..start.value.len();
        Ok(Drawn {
            w: each
                .clone()
                .map(|i| (end.value[i] - start.value[i]) / root)
                .collect(),
            u: each
                .map(|i| (end.integral[i] - start.integral[i] - apart * start.value[i]) / cube)
                .collect(),
        })
    }
}
