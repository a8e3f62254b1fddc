//! Outputs inside the steps of the lanes, forward and backward.  A step may have any number of them, so they are taken
//! in rounds: in each round every lane has its next output, and all lanes are computed together.

use super::decide::Taken;
use super::forward::Group;
use crate::rows::lanes::{add, combine, First, Terms};
use crate::rows::lanewise::Lanewise;
use crate::rows::pulls::DenseSeeds;
use crate::rows::stepper::Stepper;
use crate::simd::{aligned, Aligned, Element};
use crate::tableau::Tableau;

/// Outputs of the lanes, at most one of each: where they are in the steps, and a tile for them or for their cotangents.
pub(super) struct LaneOutputs<T: Element> {
    /// The fraction of the step, by lane, and what the weights of the stages are multiplied by: zero where a lane has
    /// no output.
    x: Vec<f64>,
    factors: Vec<f64>,
    /// The weights of one stage.
    weights_of_stage: Vec<f64>,
    /// `[stage][B]`.
    weights: Aligned<T>,
    /// The stages, 0, 1, 2 ….
    stages: Vec<usize>,
    tile: Aligned<T>,
    ones: Aligned<T>,
}

impl<T: Element> LaneOutputs<T> {
    pub(super) fn new(stepper: &Stepper<'_, T>) -> Self {
        let (stages, batch) = (stepper.plan.problem.scheme.tableau.stages(), stepper.batch);
        let mut ones = aligned(batch);
        ones.fill(T::of(1.0));
        let by_lane = vec![0.0; batch];
        Self {
            x: by_lane.clone(),
            factors: by_lane.clone(),
            weights_of_stage: by_lane,
            weights: aligned(stages * batch),
            stages: (0..stages).collect(),
            tile: aligned(stepper.size),
            ones,
        }
    }

    fn batch(&self) -> usize {
        self.ones.len()
    }

    pub(super) fn clear(&mut self) {
        self.factors.fill(0.0);
        self.tile.fill(T::default());
    }

    /// The output of a lane at the fraction x of its step, with weights that are multiplied by a factor.
    pub(super) fn set(&mut self, lane: usize, x: f64, factor: f64) {
        self.x[lane] = x;
        self.factors[lane] = factor;
    }

    /// The numbers of a lane, leaf by leaf.
    pub(super) fn hold<'a>(&mut self, lane: usize, leaves: impl Iterator<Item = &'a [T]>) {
        put(leaves, self.batch(), lane, &mut self.tile);
    }

    /// Computes the weights b_i(x) of stage i, as those of `to`.
    pub(super) fn weights(&mut self, tableau: &Tableau, i: usize, to: usize) {
        let batch = self.batch();
        tableau.weights_of_stage(i, &self.x, &mut self.weights_of_stage);
        let places = self.weights[to * batch..][..batch].iter_mut();
        let products = self.weights_of_stage.iter().zip(&self.factors);
        for (place, (weight, factor)) in places.zip(products) {
            *place = match *factor {
                0.0 => T::default(),
                factor => T::of(factor * weight),
            };
        }
    }

    /// The weight of a stage of one lane is zero.
    pub(super) fn leave_out(&mut self, i: usize, lane: usize) {
        let batch = self.batch();
        self.weights[i * batch + lane] = T::default();
    }

    /// y + Σ_i b_i k_i in the tile.
    fn interpolate(&mut self, on: &dyn Lanewise<T>, y: &[T], ks: &[T]) {
        let batch = self.batch();
        let terms = Terms {
            cs: &self.weights,
            of: &self.stages,
        };
        combine(on, batch, &mut self.tile, First::plain(y), terms, ks);
    }

    /// Adds b_i ȳ to the cotangents of the first stages, ȳ in the tile.
    pub(super) fn weigh(&self, on: &dyn Lanewise<T>, stages: usize, seeds: &mut DenseSeeds<T>) {
        let (batch, size) = (self.batch(), self.tile.len());
        let stages = seeds.stages.chunks_exact_mut(size).take(stages);
        for (stage, weights) in stages.zip(self.weights.chunks_exact(batch)) {
            if weights.iter().any(|b| *b != T::default()) {
                let terms = Terms {
                    cs: weights,
                    of: &[0],
                };
                add(on, batch, stage, terms, &self.tile);
            }
        }
    }

    /// Adds ȳ to the cotangent of the state at the start of the step.
    pub(super) fn pass(&self, on: &dyn Lanewise<T>, seeds: &mut DenseSeeds<T>) {
        let terms = Terms {
            cs: &self.ones,
            of: &[0],
        };
        add(on, self.batch(), &mut seeds.state, terms, &self.tile);
    }
}

/// Puts the leaves of a row into a lane of a tile.
pub(super) fn put<'a, T: Element>(
    leaves: impl Iterator<Item = &'a [T]>,
    batch: usize,
    lane: usize,
    tile: &mut [T],
) {
    let mut rest = tile;
    for leaf in leaves {
        let of_leaf;
        (of_leaf, rest) = rest.split_at_mut(leaf.len() * batch);
        for (feature, number) in of_leaf.chunks_exact_mut(batch).zip(leaf) {
            feature[lane] = *number;
        }
    }
}

/// Takes the row out of a lane of a tile.
pub(super) fn take<T: Element>(tile: &[T], batch: usize, lane: usize, row: &mut [T]) {
    for (number, feature) in row.iter_mut().zip(tile.chunks_exact(batch)) {
        *number = feature[lane];
    }
}

impl<T: Element> Group<'_, T> {
    /// Returns the states at the given times inside these steps.
    pub(super) fn return_inside(&mut self, taken: &[Taken]) {
        let rounds = taken.iter().map(|taken| taken.inside.len()).max();
        let (problem, batch) = (self.pass.plan.problem, self.batch());
        let (tableau, points) = (&problem.scheme.tableau, problem.grid.points());
        for round in 0..rounds.unwrap_or(0) {
            let now = taken.iter().filter_map(|taken| {
                let output = taken.inside.start + round;
                (output < taken.inside.end).then_some((taken, output))
            });
            self.inside.clear();
            for (taken, output) in now.clone() {
                let x = taken.fraction(points[output]);
                self.inside.set(taken.at, x, taken.attempt.h);
            }
            for i in 0..tableau.stages() {
                self.inside.weights(tableau, i, i);
            }
            let ks = &self.stepper.ks;
            self.inside.interpolate(self.stepper.on, &self.y, ks);
            for (taken, output) in now {
                let Some(row) = self.lanes[taken.at].as_ref().map(|lane| lane.row) else {
                    continue;
                };
                let place = self.place(row, output);
                take(&self.inside.tile, batch, taken.at, &mut self.states[place]);
            }
        }
    }
}
