//! The path of one channel of one series: a linear map from its observations to polynomials, and the transpose of
//! this map.  All of it in f64.

/// The value of the path at a knot: a combination of at most two observations.
#[derive(Clone, Copy, Debug)]
pub(super) struct Point {
    pub(super) knot: usize,
    of: [(f64, usize); 2],
}

impl Point {
    fn at(knot: usize, observation: usize) -> Self {
        let of = [(1.0, observation), (0.0, 0)];
        Self { knot, of }
    }

    /// Zero, where nothing was observed.
    fn zero(knot: usize) -> Self {
        let of = [(0.0, 0); 2];
        Self { knot, of }
    }

    /// The value, of observations among which those that it does not use may be missing.
    pub(super) fn value(&self, x: &[f64]) -> f64 {
        let terms = self.of.iter().filter(|(c, _)| *c != 0.0);
        terms.map(|&(c, i)| c * x[i]).sum()
    }

    /// Adds what a cotangent of the value is to the observations.
    pub(super) fn pull(&self, cotangent: f64, x: &mut [f64]) {
        for &(c, i) in self.of.iter().filter(|(c, _)| *c != 0.0) {
            x[i] += c * cotangent;
        }
    }
}

/// The points that a path goes through.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Through {
    /// Every knot; missing values by straight lines in time, constant before the first and behind the last.
    Filled,
    /// What was observed, and both ends.
    Observed,
    /// Every value is held until the next observation, at knots twice as many: a missing one is the last that was seen, and
    /// zero before the first.
    Held,
    /// The same for time itself, which moves on before the other channels do.
    Ahead,
}

impl Through {
    /// Knots of the path of so many observations.
    pub(super) fn knots(self, observations: usize) -> usize {
        match self {
            Self::Filled | Self::Observed => observations,
            Self::Held | Self::Ahead => 2 * observations - 1,
        }
    }

    /// The points of a series of one observation at least.
    pub(super) fn points(self, x: &[f64], times: &[f64]) -> Vec<Point> {
        let seen: Vec<usize> = (0..x.len()).filter(|&i| !x[i].is_nan()).collect();
        let last = self.knots(x.len()) - 1;
        let (Some(&first_seen), Some(&last_seen)) = (seen.first(), seen.last()) else {
            return match self {
                Self::Observed if last > 0 => vec![Point::zero(0), Point::zero(last)],
                _ => (0..=last).map(Point::zero).collect(),
            };
        };
        // The last that was seen up to observation i, or the first of all.
        let held = |i: usize| match seen.partition_point(|&s| s <= i) {
            0 => first_seen,
            n => seen[n - 1],
        };
        match self {
            Self::Filled => {
                let between = |i: usize| {
                    let p = held(i);
                    match seen.get(seen.partition_point(|&s| s <= i)) {
                        Some(&q) if p < i => {
                            let w = (times[i] - times[p]) / (times[q] - times[p]);
                            let of = [(1.0 - w, p), (w, q)];
                            Point { knot: i, of }
                        }
                        _ => Point::at(i, p),
                    }
                };
                (0..=last).map(between).collect()
            }
            Self::Observed => {
                let start = (first_seen > 0).then(|| Point::at(0, first_seen));
                let end = (last_seen < last).then(|| Point::at(last, last_seen));
                let inner = seen.iter().map(|&i| Point::at(i, i));
                start.into_iter().chain(inner).chain(end).collect()
            }
            Self::Held => {
                let past = |k: usize| match k / 2 < first_seen {
                    true => Point::zero(k),
                    false => Point::at(k, held(k / 2)),
                };
                (0..=last).map(past).collect()
            }
            Self::Ahead => (0..=last)
                .map(|k| Point::at(k, held(k.div_ceil(2))))
                .collect(),
        }
    }
}

/// What the slope of the path at its points is.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Slope {
    /// That of straight lines, on each side its own.
    Straight,
    /// At the end of each piece that of the straight line over it.
    Backward,
    /// Such that the second derivative is continuous, and zero at both ends.
    Natural,
}

/// A polynomial a + b s + c s² + d s³ of the time s since the start of an interval.
pub(super) type Piece = [f64; 4];

/// The path through points of given values, by interval between `knots`; behind the last point it stands still.
pub(super) fn pieces(points: &[Point], values: &[f64], knots: &[f64], slope: Slope) -> Vec<Piece> {
    let coarse = Coarse::new(points, knots);
    let fitted = coarse.fit(values, slope);
    let last = values.last().copied().unwrap_or_default();
    let place = |interval: usize| match coarse.piece_of(interval) {
        Some((p, s)) => {
            let [a, b, c, d] = fitted[p];
            [
                a + s * (b + s * (c + s * d)),
                b + s * (2.0 * c + s * 3.0 * d),
                c + 3.0 * d * s,
                d,
            ]
        }
        None => [last, 0.0, 0.0, 0.0],
    };
    (0..knots.len() - 1).map(place).collect()
}

/// The transpose of [`pieces`]: cotangents of the polynomials to those of the values.
pub(super) fn pull_pieces(
    points: &[Point],
    cotangents: &[Piece],
    knots: &[f64],
    slope: Slope,
) -> Vec<f64> {
    let coarse = Coarse::new(points, knots);
    let mut fitted = vec![[0.0; 4]; points.len().saturating_sub(1)];
    let mut still = 0.0;
    for (interval, &[a, b, c, d]) in cotangents.iter().enumerate() {
        match coarse.piece_of(interval) {
            Some((p, s)) => {
                let sum = &mut fitted[p];
                sum[0] += a;
                sum[1] += s * a + b;
                sum[2] += s * (s * a + 2.0 * b) + c;
                sum[3] += s * (s * (s * a + 3.0 * b) + 3.0 * c) + d;
            }
            None => still += a,
        }
    }
    let mut values = coarse.pull(&fitted, slope);
    if let Some(last) = values.last_mut() {
        *last += still;
    }
    values
}

/// The points of a path, between which it is one polynomial each.
struct Coarse<'a> {
    points: &'a [Point],
    knots: &'a [f64],
}

impl<'a> Coarse<'a> {
    fn new(points: &'a [Point], knots: &'a [f64]) -> Self {
        Self { points, knots }
    }

    /// The polynomial of an interval between knots, and how far after its start the interval begins; none behind the
    /// last point.
    fn piece_of(&self, interval: usize) -> Option<(usize, f64)> {
        let after = self.points.partition_point(|p| p.knot <= interval);
        if after == self.points.len() {
            return None;
        }
        let p = after.checked_sub(1)?;
        Some((p, self.knots[interval] - self.knots[self.points[p].knot]))
    }

    /// Lengths of the polynomials' intervals.
    fn lengths(&self) -> Vec<f64> {
        let time = |p: &Point| self.knots[p.knot];
        let pairs = self.points.windows(2);
        pairs.map(|w| time(&w[1]) - time(&w[0])).collect()
    }

    /// The polynomials between points, by the cubic Hermite form: value and slope at both ends.
    fn fit(&self, values: &[f64], slope: Slope) -> Vec<Piece> {
        let h = self.lengths();
        let mean: Vec<f64> = (0..h.len())
            .map(|i| (values[i + 1] - values[i]) / h[i])
            .collect();
        let ends = slope.ends(&mean, &h);
        let piece = |i: usize| {
            let (m, [k0, k1], h) = (mean[i], ends[i], h[i]);
            let c = (3.0 * m - 2.0 * k0 - k1) / h;
            [values[i], k0, c, (k0 + k1 - 2.0 * m) / (h * h)]
        };
        (0..h.len()).map(piece).collect()
    }

    /// The transpose.
    fn pull(&self, pieces: &[Piece], slope: Slope) -> Vec<f64> {
        let h = self.lengths();
        let mut values = vec![0.0; self.points.len()];
        let mut mean = vec![0.0; h.len()];
        let mut ends = vec![[0.0; 2]; h.len()];
        for (i, &[a, b, c, d]) in pieces.iter().enumerate() {
            let (c, d) = (c / h[i], d / (h[i] * h[i]));
            values[i] += a;
            mean[i] += 3.0 * c - 2.0 * d;
            ends[i] = [b - 2.0 * c + d, d - c];
        }
        slope.pull_ends(&ends, &h, &mut mean);
        for (i, m) in mean.iter().enumerate() {
            values[i] -= m / h[i];
            values[i + 1] += m / h[i];
        }
        values
    }
}

impl Slope {
    /// Slopes at the start and the end of every polynomial, of the mean slopes and the lengths of all.
    fn ends(self, mean: &[f64], h: &[f64]) -> Vec<[f64; 2]> {
        match self {
            Self::Straight => mean.iter().map(|&m| [m, m]).collect(),
            Self::Backward => (0..mean.len())
                .map(|i| [mean[i.saturating_sub(1)], mean[i]])
                .collect(),
            Self::Natural => {
                let mut k = vec![0.0; mean.len() + 1];
                for (i, m) in mean.iter().enumerate() {
                    k[i] += 3.0 * m / h[i];
                    k[i + 1] += 3.0 * m / h[i];
                }
                solve_natural(h, &mut k);
                k.windows(2).map(|k| [k[0], k[1]]).collect()
            }
        }
    }

    /// The transpose, added to the cotangents of the mean slopes.
    fn pull_ends(self, ends: &[[f64; 2]], h: &[f64], mean: &mut [f64]) {
        match self {
            Self::Straight => {
                for (m, [k0, k1]) in mean.iter_mut().zip(ends) {
                    *m += k0 + k1;
                }
            }
            Self::Backward => {
                for (i, [k0, k1]) in ends.iter().enumerate() {
                    mean[i.saturating_sub(1)] += k0;
                    mean[i] += k1;
                }
            }
            Self::Natural => {
                let mut k = vec![0.0; ends.len() + 1];
                for (i, [k0, k1]) in ends.iter().enumerate() {
                    k[i] += k0;
                    k[i + 1] += k1;
                }
                // The matrix is symmetric.
                solve_natural(h, &mut k);
                for (i, m) in mean.iter_mut().enumerate() {
                    *m += 3.0 * (k[i] + k[i + 1]) / h[i];
                }
            }
        }
    }
}

/// Solves the tridiagonal equations for the knot slopes of a natural spline,
/// (k_{i−1} + 2 k_i)/h_{i−1} + (2 k_i + k_{i+1})/h_i = r_i with one term each at the ends, in place of r.
fn solve_natural(h: &[f64], r: &mut [f64]) {
    let before = |i: usize| match i {
        0 => 0.0,
        _ => 1.0 / h[i - 1],
    };
    let after = |i: usize| h.get(i).map_or(0.0, |h| 1.0 / h);
    if h.is_empty() {
        return;
    }
    // Elimination without pivots: the matrix is diagonally dominant.
    let mut pivots = Vec::with_capacity(r.len());
    for i in 0..r.len() {
        let mut pivot = 2.0 * (before(i) + after(i));
        if i > 0 {
            let factor = before(i) / pivots[i - 1];
            pivot -= factor * before(i);
            r[i] -= factor * r[i - 1];
        }
        pivots.push(pivot);
    }
    for i in (0..r.len()).rev() {
        if let Some(&next) = r.get(i + 1) {
            r[i] -= after(i) * next;
        }
        r[i] /= pivots[i];
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GONE: f64 = f64::NAN;
    const TIMES: [f64; 6] = [0.0, 0.5, 1.5, 2.0, 3.5, 4.0];

    /// Values that look like chance.
    fn some(n: usize, seed: usize) -> Vec<f64> {
        (0..n)
            .map(|i| (((i + 3) * (seed + 7) * 37) % 101) as f64 / 50.0 - 1.0)
            .collect()
    }

    #[test]
    fn the_pull_back_is_the_transpose_for_every_curve_with_and_without_missing_values() {
        let masks = [
            [1.0; 6],
            [1.0, GONE, 1.0, GONE, GONE, 1.0],
            [GONE, GONE, 1.0, 1.0, 1.0, GONE],
            [GONE, GONE, GONE, 1.0, GONE, GONE],
            [GONE; 6],
        ];
        let kinds = [
            (Through::Filled, Slope::Straight),
            (Through::Filled, Slope::Backward),
            (Through::Observed, Slope::Natural),
            (Through::Held, Slope::Straight),
            (Through::Ahead, Slope::Straight),
        ];
        for mask in masks {
            for (through, slope) in kinds {
                for length in [6, 4, 1] {
                    let x: Vec<f64> = some(6, 1).iter().zip(mask).map(|(x, m)| x * m).collect();
                    let x = &x[..length];
                    let halves: Vec<f64> = (0..11).map(f64::from).collect();
                    let knots = match through.knots(6) {
                        6 => &TIMES[..],
                        _ => &halves[..],
                    };
                    let points = through.points(x, &TIMES);
                    let values: Vec<f64> = points.iter().map(|p| p.value(x)).collect();
                    let curve = pieces(&points, &values, knots, slope);
                    assert_eq!(curve.len(), knots.len() - 1);
                    let v = some(4 * curve.len(), 5);
                    let v: Vec<Piece> = v.chunks(4).map(|v| [v[0], v[1], v[2], v[3]]).collect();
                    let mut x_bar = vec![0.0; length];
                    let pulled = pull_pieces(&points, &v, knots, slope);
                    for (point, g) in points.iter().zip(pulled) {
                        point.pull(g, &mut x_bar);
                    }
                    // ⟨v, M x⟩ = ⟨Mᵀ v, x⟩.
                    let pairs = v.iter().flatten().zip(curve.iter().flatten());
                    let here: f64 = pairs.map(|(v, p)| v * p).sum();
                    let seen = x_bar.iter().zip(x).filter(|(_, x)| !x.is_nan());
                    let there: f64 = seen.map(|(g, x)| g * x).sum();
                    assert!(
                        (here - there).abs() < 1e-12 * (1.0 + here.abs()),
                        "{through:?} {slope:?}: {here} {there}"
                    );
                    let unseen = x_bar.iter().zip(x).filter(|(_, x)| x.is_nan());
                    assert!(unseen.into_iter().all(|(g, _)| *g == 0.0));
                }
            }
        }
    }

    #[test]
    fn a_natural_spline_has_continuous_second_derivatives_that_vanish_at_both_ends() {
        let x = some(6, 2);
        let points = Through::Observed.points(&x, &TIMES);
        let curve = pieces(&points, &x, &TIMES, Slope::Natural);
        let at_end = |i: usize, order: usize| {
            let (h, [a, b, c, d]) = (TIMES[i + 1] - TIMES[i], curve[i]);
            match order {
                0 => a + h * (b + h * (c + h * d)),
                1 => b + h * (2.0 * c + h * 3.0 * d),
                _ => 2.0 * c + 6.0 * d * h,
            }
        };
        for (before, [a, b, c, _]) in curve[1..].iter().enumerate() {
            for (order, start) in [*a, *b, 2.0 * c].into_iter().enumerate() {
                assert!((at_end(before, order) - start).abs() < 1e-13);
            }
        }
        assert!(curve[0][2].abs() < 1e-14 && at_end(4, 2).abs() < 1e-13);
        assert!((at_end(4, 0) - x[5]).abs() < 1e-14);
    }
}
