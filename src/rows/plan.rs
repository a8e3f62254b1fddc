//! What tiles of a solve have in common: which rows a tile has, which tiles share a sum, how much memory they need.

use std::ops::Range;

use super::activations::Size;
use super::backward;
#[cfg(test)]
use super::tests;
use super::tile::Tiled;
use crate::error::MemoryNeed;
use crate::intervals::Intervals;
use crate::precision::Low;
use crate::problem::Problem;
use crate::schedule::{Schedule, Step};
use crate::simd::Element;
use crate::state::RowLayout;
use crate::trajectory::Checkpoint;

/// The solve as both passes see it.
pub(super) struct TilePlan<'p> {
    pub(super) problem: &'p Problem,
    pub(super) layout: &'p RowLayout,
    /// What the compute precision of each leaf rounds to.
    pub(super) low: Vec<Low>,
    /// For a field that takes turns with others: the intervals, and the number of the one that is the field's turn;
    /// several where such fields are inside each other.
    turns: Vec<(&'p Intervals, usize)>,
    /// Whether tiles have two vectors, where a test says so.
    #[cfg(test)]
    pub(super) forced: Option<bool>,
}

impl<'p> TilePlan<'p> {
    pub(super) fn new(problem: &'p Problem, layout: &'p RowLayout) -> Self {
        let low = problem.scheme.roles.iter().map(|r| r.compute.low());
        Self {
            low: low.collect(),
            turns: vec![],
            #[cfg(test)]
            forced: tests::width::here(),
            problem,
            layout,
        }
    }

    /// The same of a field whose turn is the interval of this number.
    pub(super) fn in_turn<'a>(&'a self, intervals: &'a Intervals, number: usize) -> TilePlan<'a> {
        let outer = self.turns.iter().copied();
        TilePlan {
            low: self.low.clone(),
            turns: outer.chain([(intervals, number)]).collect(),
            ..*self
        }
    }

    /// What there is to keep of so many rows, in slots of so many features.
    pub(super) fn size(&self, schedule: &Schedule, rows: usize, features: usize) -> Size {
        Size {
            rows,
            features,
            stages: backward::most_stages(self.problem, schedule),
            steps: schedule.len(),
        }
    }

    /// Bytes that the steps at hand take, of all threads: the velocities of a step, a slot of the forward pass, and, where
    /// there is a backward pass, the slots of a step with the cotangents of one.
    pub(super) fn at_work<T: Element>(&self, field: &dyn Tiled<T>) -> u128 {
        let groups = self.groups(field.batch(), field.parameters()).len();
        let threads = rayon::current_num_threads().min(groups);
        let stages = match &self.problem.driven {
            Some(driven) => driven.table().evaluations.len(),
            None => self.problem.scheme.dense_stages().len(),
        };
        // Velocities of all stages, the state and the state after it, a cotangent, and what an attempt is measured by: its
        // error and, where steps are adaptive, two differences of stages.
        let measures = if self.problem.plan.known().is_some() {
            1
        } else {
            3
        };
        let of_steps = (stages + 3 + measures) * self.layout.dim();
        let numbers = match self.problem.checkpoint {
            Checkpoint::Nothing => field.kept() + of_steps,
            _ => (stages + 1) * field.kept() + field.cotangents() + of_steps,
        };
        numbers as u128 * (field.batch() * size_of::<T>() * threads) as u128
    }

    /// Whether most lanes of the only tile would be idle, and would take much memory.  Never with adaptive steps: those of
    /// rows, and their failures, are had in tiles alone.
    pub(super) fn is_mostly_idle<T: Element>(&self, field: &dyn Tiled<T>) -> bool {
        /// Bytes that lanes may waste.
        const MOST: u128 = 1 << 28;
        let is_known = self.problem.plan.known().is_some();
        is_known && 2 * self.layout.rows <= field.batch() && self.at_work(field) > MOST
    }

    /// The memory that tiles of a field, `rows` rows in all, hold at once over so many steps, in addition to kept
    /// evaluations.  `elements` is the number of state elements of those rows without the padding of the last tile.
    pub(super) fn need<T: Element>(
        &self,
        field: &dyn Tiled<T>,
        steps: usize,
        rows: usize,
        elements: usize,
    ) -> MemoryNeed {
        /// Bytes of a state that is kept by itself beside its numbers.
        const STATE: usize = 64;
        let problem = self.problem;
        let bytes = elements.saturating_mul(size_of::<T>());
        let (carried, copied) = (problem.carried(), problem.copied());
        let (restart, stored) = problem
            .checkpoint
            .most(steps, bytes.saturating_mul(carried));
        // Kept with the lanes that fill up the last tile.
        let numbers = rows as u128 * self.layout.dim() as u128;
        let tiles = rows.div_ceil(field.batch());
        let state = numbers * size_of::<T>() as u128;
        let store = problem.scheme.roles[0].store.to.size_in_bytes();
        let single = state * carried as u128 + (tiles * STATE) as u128;
        MemoryNeed {
            states: restart as u128 * single
                + stored as u128 * copied as u128 * numbers * store as u128,
            // As tiles leave them, and as they are handed over.
            returned: 2 * problem.outputs() as u128 * bytes as u128,
            work: self.at_work(field),
            ..Default::default()
        }
    }

    /// The times of all stages of known steps in the field's turn, ascending, each once; none if there are very many
    /// steps.
    pub(super) fn stage_times<T: Element>(&self) -> Vec<T> {
        /// Times worth to be listed.
        const MOST: usize = 1 << 16;
        let Some(schedule) = self.problem.plan.known() else {
            return vec![];
        };
        let c: Vec<f64> = match &self.problem.driven {
            Some(driven) => driven.table().evaluations.iter().map(|e| e.c).collect(),
            None => self.problem.scheme.tableau.c().to_vec(),
        };
        if schedule.len().saturating_mul(c.len()) > MOST {
            return vec![];
        }
        // All stages of a step are in one turn.
        let is_taken = |step: &Step| {
            let turn = |(of, number): &(&Intervals, usize)| {
                of.within([step.t, step.end], step.t) == *number
            };
            self.turns.iter().all(turn)
        };
        let steps = (0..schedule.len()).map(|n| schedule.step(n));
        let steps = steps.filter(is_taken);
        let times = steps.flat_map(|step| c.iter().map(move |c| T::of(step.at(*c))));
        let mut times: Vec<_> = times.collect();
        times.sort_by(|a, b| a.wide().total_cmp(&b.wide()));
        times.dedup();
        times
    }

    /// Whether there are rows enough for tiles of two vectors of so many lanes, and the tiles stay small.
    pub(super) fn is_wide<T: Element>(&self, lanes: usize) -> bool {
        #[cfg(test)]
        if let Some(wide) = self.forced {
            return T::WIDE && wide;
        }
        T::WIDE && self.layout.rows >= 4 * lanes && self.layout.dim() <= WIDEST
    }

    /// First rows of the tiles, group by group; the tiles of a group share a partial sum.
    pub(super) fn groups(&self, batch: usize, parameters: usize) -> Vec<Vec<usize>> {
        let tiles: Vec<usize> = (0..self.layout.rows).step_by(batch).collect();
        let groups = tiles.len().min(self.most_groups(parameters));
        let cut = |g: usize| g * tiles.len() / groups;
        (0..groups)
            .map(|g| tiles[cut(g)..cut(g + 1)].to_vec())
            .collect()
    }

    /// As many groups as many cores can use, but no more than a few million numbers of partial sums.
    pub(super) fn most_groups(&self, parameters: usize) -> usize {
        (MOST_NUMBERS / parameters.max(1)).clamp(4, MOST_GROUPS)
    }

    /// Rows of the tile that begins at `first`.
    pub(super) fn rows(&self, first: usize, batch: usize) -> Range<usize> {
        first..self.layout.rows.min(first + batch)
    }
}

/// Features of the largest state in tiles of two vectors.
const WIDEST: usize = 4096;

const MOST_GROUPS: usize = 32;
const MOST_NUMBERS: usize = 1 << 22;
