//! Error estimates of the lanes of a tile relative to the tolerances of their rows.  Every sum over the features of a
//! row is formed in f64 in the order of the features, so that the sum depends neither on the other lanes nor on the
//! number of lanes.

use std::ops::Range;

use candle_core::{DType, Tensor};

use crate::adaptive::{ratio, Control, Measured, OfLeaf, Rounding};
use crate::error::{Result, Worst};
use crate::problem::Problem;
use crate::simd::Element;
use crate::state::RowLayout;

/// The tolerances of a solve.
pub(super) struct Tolerances {
    rtol: Vec<ToleranceNumbers>,
    atol: Vec<ToleranceNumbers>,
    /// By leaf.
    roundings: Vec<Rounding>,
}

/// A tolerance of one leaf: one number, or one for each element of the batch.
enum ToleranceNumbers {
    One(f64),
    Each(Vec<f64>),
}

impl ToleranceNumbers {
    fn of(tolerance: &OfLeaf) -> Result<Self> {
        let numbers = |x: &Tensor| x.to_dtype(DType::F64)?.flatten_all()?.to_vec1::<f64>();
        Ok(match tolerance {
            OfLeaf::Number(value) => Self::One(*value),
            OfLeaf::Elements(x) => Self::Each(numbers(x)?),
        })
    }

    fn get(&self, element: usize) -> f64 {
        match self {
            Self::One(value) => *value,
            Self::Each(values) => values[element],
        }
    }
}

impl Tolerances {
    pub(super) fn new(problem: &Problem, control: &Control) -> Result<Self> {
        let (shapes, state) = (problem.packing.shapes(), problem.state());
        let [rtol, atol] = control.tolerances(shapes, state, problem.device())?;
        let all = |of: &[OfLeaf]| of.iter().map(ToleranceNumbers::of).collect::<Result<_>>();
        let roles = problem.scheme.roles.iter();
        let precisions: Vec<_> = roles.map(|r| r.compute.roundoff()).collect();
        Ok(Self {
            rtol: all(&rtol)?,
            atol: all(&atol)?,
            roundings: control.roundings(&precisions)?,
        })
    }
}

/// An attempt of every lane: tiles `[feature][B]` of y_n, y_{n+1}, k_1, the error, and the differences of stages h Σ d_i k_i
/// and Σ d_i Y_i; and the lengths.
#[derive(Clone, Copy)]
pub(in crate::rows) struct Attempted<'a, T> {
    pub(super) y: &'a [T],
    pub(super) next: &'a [T],
    pub(super) k: &'a [T],
    pub(super) error: &'a [T],
    pub(super) apart: [&'a [T]; 2],
    pub(super) lengths: &'a [f64],
}

/// The tolerances of the rows that the lanes hold, and scratch for their norms.
pub(in crate::rows) struct Norms<'a> {
    of: &'a Tolerances,
    layout: &'a RowLayout,
    batch: usize,
    /// `[feature][B]`.
    rtol: Vec<f64>,
    atol: Vec<f64>,
    /// By lane.
    sums: [Vec<f64>; 2],
    /// What rounding makes of the stages of one leaf, and of their error.
    rounding: Vec<f64>,
    floor: Vec<f64>,
    /// Norms, with the floor and without.
    r: Vec<f64>,
    plain: Vec<f64>,
    /// Mean squares of the differences of stages and of what rounding makes of a stage, relative to the tolerance.
    apart: [Vec<f64>; 3],
}

impl<'a> Norms<'a> {
    pub(super) fn new(of: &'a Tolerances, layout: &'a RowLayout, batch: usize) -> Self {
        let (lanes, tile) = (vec![0.0; batch], vec![1.0; layout.dim() * batch]);
        Self {
            of,
            layout,
            batch,
            rtol: tile.clone(),
            atol: tile,
            sums: [lanes.clone(), lanes.clone()],
            rounding: lanes.clone(),
            floor: lanes.clone(),
            r: lanes.clone(),
            plain: lanes.clone(),
            apart: std::array::from_fn(|_| lanes.clone()),
        }
    }

    /// A lane takes a row.
    pub(super) fn hold(&mut self, lane: usize, row: usize) {
        let mut at = lane;
        for (leaf, &features) in self.layout.features.iter().enumerate() {
            for i in row * features..(row + 1) * features {
                self.rtol[at] = self.of.rtol[leaf].get(i);
                self.atol[at] = self.of.atol[leaf].get(i);
                at += self.batch;
            }
        }
    }

    /// What was measured of a lane.
    pub(super) fn of(&self, lane: usize) -> Measured {
        let apart = self.apart.each_ref().map(|squares| squares[lane]);
        Measured::new([self.r[lane], self.plain[lane]], apart)
    }

    /// The norms of an attempt of all lanes: the largest RMS of a leaf, infinite where a number is not finite.
    #[inline(always)]
    pub(in crate::rows) fn measure<T: Element>(&mut self, attempt: Attempted<'_, T>) {
        let (batch, mut at) = (self.batch, 0);
        self.r.fill(0.0);
        self.plain.fill(0.0);
        self.apart.iter_mut().for_each(|squares| squares.fill(0.0));
        for (leaf, &features) in self.layout.features.iter().enumerate() {
            let tile = at..at + features * batch;
            at = tile.end;
            let (y, k) = (&attempt.y[tile.clone()], &attempt.k[tile.clone()]);
            self.raise(y, k, attempt.lengths, self.of.roundings[leaf]);
            // What follows the first leaf of a field in tiles does not act on it, such as integrals along the flow, and its
            // stages may be anything.
            if leaf == 0 {
                let ends = [attempt.y, attempt.next].map(|y| &y[tile.clone()]);
                self.compare(tile.clone(), ends, attempt.apart.map(|x| &x[tile.clone()]));
            }
            let [sums, plain] = &mut self.sums;
            sums.fill(0.0);
            plain.fill(0.0);
            // Of a length that the compiler knows to be the same, so that many lanes are looked at at a time.
            let (sums, plain) = (&mut sums[..batch], &mut plain[..batch]);
            let floor = &self.floor[..batch];
            let tolerances = self.rtol[tile.clone()].chunks_exact(batch);
            let tolerances = tolerances.zip(self.atol[tile.clone()].chunks_exact(batch));
            let states = attempt.y[tile.clone()].chunks_exact(batch);
            let states = states.zip(attempt.next[tile.clone()].chunks_exact(batch));
            let errors = attempt.error[tile].chunks_exact(batch);
            for (((rtol, atol), (y, next)), error) in tolerances.zip(states).zip(errors) {
                let (rtol, atol, error) = (&rtol[..batch], &atol[..batch], &error[..batch]);
                let (y, next) = (&y[..batch], &next[..batch]);
                for lane in 0..batch {
                    let (a, b) = (y[lane].wide().abs(), next[lane].wide().abs());
                    let tolerance = atol[lane] + rtol[lane] * if a > b { a } else { b };
                    let error = error[lane].wide();
                    sums[lane] += square(error, tolerance + floor[lane], b);
                    plain[lane] += square(error, tolerance, b);
                }
            }
            let count = features.max(1) as f64;
            for (norms, sums) in [(&mut self.r, sums), (&mut self.plain, plain)] {
                for (norm, sum) in norms.iter_mut().zip(sums) {
                    *norm = larger(*norm, (*sum / count).sqrt());
                }
            }
        }
        for norm in self.r.iter_mut().chain(&mut self.plain) {
            *norm = finite(*norm);
        }
    }

    /// Adds the mean squares of one leaf to those by which the stiffness is seen.
    #[inline(always)]
    fn compare<T: Element>(&mut self, tile: Range<usize>, ends: [&[T]; 2], apart: [&[T]; 2]) {
        let batch = self.batch;
        let count = (tile.len() / batch).max(1) as f64;
        let [moved, distance, rounding] = &mut self.apart;
        let (moved, distance) = (&mut moved[..batch], &mut distance[..batch]);
        let (rounding, of_stage) = (&mut rounding[..batch], &self.rounding[..batch]);
        let floor = &self.floor[..batch];
        let tolerances = self.rtol[tile.clone()].chunks_exact(batch);
        let tolerances = tolerances.zip(self.atol[tile].chunks_exact(batch));
        let states = ends[0].chunks_exact(batch).zip(ends[1].chunks_exact(batch));
        let apart = apart[0]
            .chunks_exact(batch)
            .zip(apart[1].chunks_exact(batch));
        for (((rtol, atol), (y, next)), (by, from)) in tolerances.zip(states).zip(apart) {
            let (rtol, atol, y, next) =
                (&rtol[..batch], &atol[..batch], &y[..batch], &next[..batch]);
            let (by, from) = (&by[..batch], &from[..batch]);
            for lane in 0..batch {
                let (a, b) = (y[lane].wide().abs(), next[lane].wide().abs());
                let scale = atol[lane] + rtol[lane] * if a > b { a } else { b } + floor[lane];
                // What has no tolerance is not compared.
                let weight = if scale > 0.0 { 1.0 / scale } else { 0.0 };
                let (by, from) = (by[lane].wide() * weight, from[lane].wide() * weight);
                let least = of_stage[lane] * weight;
                moved[lane] += by * by / count;
                distance[lane] += from * from / count;
                rounding[lane] += least * least / count;
            }
        }
    }

    /// What rounding makes of the stages of one leaf, α + |h| β, and of their error.
    #[inline(always)]
    fn raise<T: Element>(&mut self, y: &[T], k: &[T], h: &[f64], of: Rounding) {
        let Rounding {
            roundoff,
            least,
            weight,
        } = of;
        let batch = self.batch;
        let [alpha, beta] = &mut self.sums;
        let (alpha, beta) = (&mut alpha[..batch], &mut beta[..batch]);
        alpha.fill(0.0);
        beta.fill(0.0);
        for (y, k) in y.chunks_exact(batch).zip(k.chunks_exact(batch)) {
            let (y, k) = (&y[..batch], &k[..batch]);
            for lane in 0..batch {
                let (y, k) = (y[lane].wide(), k[lane].wide().abs());
                let k = if k < least { least } else { k };
                alpha[lane] += y * y;
                beta[lane] += k * k;
            }
        }
        let count = (y.len() / batch).max(1) as f64;
        for lane in 0..batch {
            let (alpha, beta) = ((alpha[lane] / count).sqrt(), (beta[lane] / count).sqrt());
            let (u, floor) = (roundoff, roundoff * weight);
            self.rounding[lane] = alpha * u + beta * u * h[lane].abs();
            self.floor[lane] = alpha * floor + beta * floor * h[lane].abs();
        }
    }

    /// The norm of x relative to the tolerance at y, of one lane and without a floor.
    fn of_lane(&self, lane: usize, y: &[impl Element], x: impl Fn(usize, usize) -> f64) -> f64 {
        let (mut norm, mut at) = (0.0, lane);
        for (leaf, &features) in self.layout.features.iter().enumerate() {
            let mut sum = 0.0;
            for _ in 0..features {
                let size = y[at].wide().abs();
                sum += square(x(leaf, at), self.atol[at] + self.rtol[at] * size, size);
                at += self.batch;
            }
            norm = larger(norm, (sum / features.max(1) as f64).sqrt());
        }
        finite(norm)
    }

    /// The length of the explicit Euler step that the first length is found by, and the norm of the velocity.
    pub(super) fn probe<T: Element>(
        &self,
        control: &Control,
        lane: usize,
        y: &[T],
        k: &[T],
    ) -> (f64, f64) {
        let d0 = self.of_lane(lane, y, |_, at| y[at].wide());
        let d1 = self.of_lane(lane, y, |_, at| k[at].wide());
        (control.probe(d0, d1).min(control.longest()), d1)
    }

    /// The first length, from the velocity `further` after that step.  The part of the difference that can be
    /// rounding is left out.
    pub(super) fn first_length<T: Element>(
        &self,
        control: &Control,
        lane: usize,
        (y, k, further): (&[T], &[T], &[T]),
        (probe, d1): (f64, f64),
    ) -> f64 {
        let difference = |leaf: usize, at: usize| {
            let (a, b) = (k[at].wide(), further[at].wide());
            let moved = T::of(b - a).wide().abs();
            let noise = T::of(2.0 * self.of.roundings[leaf].roundoff * a.abs()).wide();
            T::of(moved - noise).wide().max(0.0)
        };
        let d2 = self.of_lane(lane, y, difference) / probe;
        let h = control.first_length(probe, d1, d2);
        match h.is_finite() && h > 0.0 {
            true => h.min(control.longest()),
            false => probe,
        }
    }

    /// The element of a lane's row whose error is largest.
    pub(super) fn worst<T: Element>(
        &self,
        (lane, row): (usize, usize),
        attempt: Attempted<'_, T>,
    ) -> Option<Worst> {
        let (mut worst, mut largest, mut at) = (None, -1.0, lane);
        for (leaf, &features) in self.layout.features.iter().enumerate() {
            for index in 0..features {
                let size = f64::max(attempt.y[at].wide().abs(), attempt.next[at].wide().abs());
                let tolerance = self.atol[at] + self.rtol[at] * size;
                let ratio = ratio(attempt.error[at].wide(), tolerance);
                if ratio > largest {
                    largest = ratio;
                    worst = Some(Worst { leaf, row, index });
                }
                at += self.batch;
            }
        }
        worst
    }
}

/// (error / tolerance)²: an error of zero needs no tolerance, and a state that is not finite is seen in any case.
#[inline(always)]
fn square(error: f64, tolerance: f64, state: f64) -> f64 {
    let ratio = error / tolerance;
    let square = if error == 0.0 { 0.0 } else { ratio * ratio };
    if state < f64::INFINITY {
        square
    } else {
        f64::INFINITY
    }
}

/// The larger of both; NaN where one is.
#[inline(always)]
fn larger(a: f64, b: f64) -> f64 {
    if a >= b || a.is_nan() {
        a
    } else {
        b
    }
}

#[inline(always)]
fn finite(norm: f64) -> f64 {
    if norm < f64::INFINITY {
        norm
    } else {
        f64::INFINITY
    }
}
