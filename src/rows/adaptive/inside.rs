//! Outputs inside the steps of the lanes, forward and backward.  A step may have any number of them, so they are taken
//! in rounds: in each round every lane has its next output, and all lanes are computed together.

use super::decide::Taken;
use super::forward::Group;
use crate::rows::lanes::{add, combine, First, Terms};
use crate::rows::lanewise::Lanewise;
use crate::rows::pulls::DenseSeeds;
use crate::rows::stepper::Stepper;
use crate::simd::{aligned, Aligned, Element};

/// Weights of the stages of every lane, each for an output of its own, and a tile for these outputs or for their
/// cotangents.
pub(super) struct LaneWeights<T: Element> {
    /// `[stage][B]`; zeros where a lane has no output.
    weights: Aligned<T>,
    /// The stages, 0, 1, 2 ….
    stages: Vec<usize>,
    tile: Aligned<T>,
    ones: Aligned<T>,
}

impl<T: Element> LaneWeights<T> {
    pub(super) fn new(stepper: &Stepper<'_, T>) -> Self {
        let (stages, batch) = (stepper.plan.problem.scheme.tableau.stages(), stepper.batch);
        let mut ones = aligned(batch);
        ones.fill(T::of(1.0));
        Self {
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
        self.weights.fill(T::default());
        self.tile.fill(T::default());
    }

    /// The weights of a lane, stage by stage.
    pub(super) fn set(&mut self, lane: usize, weights: impl Iterator<Item = f64>) {
        let batch = self.batch();
        let places = self.weights.iter_mut().skip(lane).step_by(batch);
        for (place, weight) in places.zip(weights) {
            *place = T::of(weight);
        }
    }

    /// The numbers of a lane, feature by feature.
    pub(super) fn hold(&mut self, lane: usize, numbers: impl Iterator<Item = T>) {
        let batch = self.batch();
        let places = self.tile.iter_mut().skip(lane).step_by(batch);
        for (place, number) in places.zip(numbers) {
            *place = number;
        }
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

    /// Adds b_i ȳ to the cotangent of every stage, ȳ in the tile.
    pub(super) fn weigh(&self, on: &dyn Lanewise<T>, seeds: &mut DenseSeeds<T>) {
        let (batch, size) = (self.batch(), self.tile.len());
        let stages = seeds.stages.chunks_exact_mut(size);
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

impl<T: Element> Group<'_, T> {
    /// Returns the states at the given times inside these steps.
    pub(super) fn return_inside(&mut self, taken: &[Taken]) {
        let rounds = taken.iter().map(|taken| taken.inside.len()).max();
        let (problem, batch) = (self.pass.plan.problem, self.batch());
        for round in 0..rounds.unwrap_or(0) {
            let now = taken
                .iter()
                .filter_map(|taken| Some((taken, taken.inside.clone().nth(round)?)));
            self.inside.clear();
            for (taken, output) in now.clone() {
                let x = taken.fraction(problem.grid.points()[output]);
                let weights = self.stepper.interpolant(x).into_iter();
                let weights = weights.map(|b| taken.attempt.h * b);
                self.inside.set(taken.at, weights);
            }
            let ks = &self.stepper.ks;
            self.inside.interpolate(self.stepper.on, &self.y, ks);
            for (taken, output) in now {
                let Some(row) = self.lanes[taken.at].as_ref().map(|lane| lane.row) else {
                    continue;
                };
                let place = self.place(row, output);
                let tile = self.inside.tile.iter().skip(taken.at).step_by(batch);
                let returned = &mut self.states[place];
                returned.iter_mut().zip(tile).for_each(|(to, y)| *to = *y);
            }
        }
    }
}
