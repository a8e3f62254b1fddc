//! The adjoint scales of a tile: one that all lanes share, or one for each lane.
//!
//! Lanes that share their steps share a scale, too, chosen from the largest cotangent of the tile.  If every row has
//! its own steps, the scale of a lane belongs to the row that it holds, so that the gradient of a row does not depend
//! on the rows beside it.

use crate::error::Error;
use crate::precision::Low;
use crate::scaler::{Outcome, Scaler};
use crate::simd::Element;

use super::lanes::LaneSteps;
use super::lanewise::Lanewise;
use super::plan::TilePlan;
use super::pulls::DenseSeeds;

/// A scaler of all lanes, or one of each.
pub(super) struct Scales {
    /// How the scale of a row begins.
    first: Scaler,
    scalers: Vec<Scaler>,
    batch: usize,
    by_lane: bool,
    /// The S that the scalers hold now.
    numbers: Vec<f64>,
}

/// A scale that no smaller one can replace: the lane, S, and the attempts that were made.
#[derive(Clone, Copy)]
pub(super) struct Exhausted {
    pub(super) lane: usize,
    scale: f64,
    attempts: usize,
}

impl Exhausted {
    /// The error, in these steps.
    pub(super) fn error(&self, steps: LaneSteps<'_>) -> Error {
        let step = steps.of(self.lane);
        Error::ScaleExhausted {
            step: step.map_or(0, |step| step.index),
            t: step.map_or(f64::NAN, |step| step.t),
            scale: self.scale,
            attempts: self.attempts,
        }
    }
}

impl Scales {
    /// One scale for all lanes.
    pub(super) fn shared(first: Scaler, batch: usize) -> Self {
        Self {
            first,
            scalers: vec![first],
            batch,
            by_lane: false,
            numbers: vec![first.scale()],
        }
    }

    /// One for each lane, if scales follow the cotangents; those that do not are equal.
    pub(super) fn by_lane(first: Scaler, batch: usize) -> Self {
        let mut scales = Self::shared(first, batch);
        if first.is_dynamic() {
            scales.scalers = vec![first; batch];
            scales.numbers = vec![first.scale(); batch];
            scales.by_lane = true;
        }
        scales
    }

    /// Whether every lane has its own.
    pub(super) fn differ(&self) -> bool {
        self.by_lane
    }

    /// A lane takes another row.
    pub(super) fn begin(&mut self, lane: usize) {
        if self.differ() {
            self.scalers[lane] = self.first;
        }
    }

    /// The scales that cotangents are multiplied by; lanes whose cotangents have been zero so far have none.
    pub(super) fn used(&self) -> impl Iterator<Item = f64> + '_ {
        let used = self.scalers.iter().filter(|scaler| match self.differ() {
            true => scaler.is_aimed(),
            false => scaler.is_on(),
        });
        used.map(Scaler::scale)
    }

    /// The scale of the sums over rows: none where every lane has its own.
    pub(super) fn of_sums(&self) -> f64 {
        match self.differ() {
            true => 1.0,
            false => self.scalers[0].scale(),
        }
    }

    /// S: one for all lanes, or one for each.
    pub(super) fn numbers(&mut self) -> &[f64] {
        self.numbers.clear();
        self.numbers.extend(self.scalers.iter().map(Scaler::scale));
        &self.numbers
    }

    /// Aims the scales at a step with these cotangents.
    pub(super) fn aim<T: Element>(
        &mut self,
        on: &dyn Lanewise<T>,
        plan: &TilePlan<'_>,
        adj: &[T],
        dense: Option<&DenseSeeds<T>>,
    ) {
        if !self.first.is_dynamic() {
            return;
        }
        if !self.differ() {
            let magnitude = magnitude(on, plan, self.batch, adj, dense);
            self.scalers[0] = self.scalers[0].aimed(magnitude);
            return;
        }
        let (mut low, mut all) = (vec![0.0f64; self.batch], vec![0.0f64; self.batch]);
        each_leaf(plan, self.batch, adj, dense, |rounds_to, x| {
            for x in x.chunks_exact(self.batch) {
                let lanes = all.iter_mut().zip(&mut low).zip(x);
                for ((all, low), x) in lanes {
                    let x = x.wide().abs();
                    *all = all.max(x);
                    if rounds_to == Low::F16 {
                        *low = low.max(x);
                    }
                }
            }
        });
        let lanes = self.scalers.iter_mut().zip(low.iter().zip(&all));
        for (scaler, (&low, &all)) in lanes {
            *scaler = scaler.aimed(if low > 0.0 { low } else { all });
        }
    }

    /// Whether the cotangents w of a stage are finite; where they are not, scales are lowered for the next of
    /// `attempts`, as long as a smaller one can help.
    pub(super) fn fit<T: Element>(
        &mut self,
        on: &dyn Lanewise<T>,
        w: &[T],
        attempts: usize,
    ) -> std::result::Result<bool, Exhausted> {
        if !self.first.is_dynamic() || on.is_finite(w) {
            return Ok(true);
        }
        for (lane, scaler) in self.scalers.iter_mut().enumerate() {
            let lanes = w.chunks_exact(self.batch);
            let overflowed = || lanes.into_iter().any(|x| !x[lane].wide().is_finite());
            if self.by_lane && !overflowed() {
                continue;
            }
            let scale = scaler.scale();
            *scaler = scaler.after(Outcome::StateOverflow);
            if scaler.is_exhausted(attempts) {
                return Err(Exhausted {
                    lane,
                    scale,
                    attempts,
                });
            }
        }
        Ok(false)
    }

    /// A whole step has not overflowed.
    pub(super) fn end_step(&mut self) {
        for scaler in &mut self.scalers {
            *scaler = scaler.after_step();
        }
    }
}

/// max|λ|, and that of what enters from outputs inside the step, over the leaves whose cotangents can overflow, or
/// over all where these are zero.
pub(super) fn magnitude<T: Element>(
    on: &dyn Lanewise<T>,
    plan: &TilePlan<'_>,
    batch: usize,
    adj: &[T],
    dense: Option<&DenseSeeds<T>>,
) -> f64 {
    let (mut low, mut all) = (0.0, 0.0f64);
    each_leaf(plan, batch, adj, dense, |rounds_to, x| {
        let max = on.largest(x).wide();
        all = all.max(max);
        if rounds_to == Low::F16 {
            low = f64::max(low, max);
        }
    });
    if low > 0.0 {
        low
    } else {
        all
    }
}

/// The leaves of λ, and of what enters from outputs inside the step, with what they are rounded to.
fn each_leaf<T: Element>(
    plan: &TilePlan<'_>,
    batch: usize,
    adj: &[T],
    dense: Option<&DenseSeeds<T>>,
    mut see: impl FnMut(Low, &[T]),
) {
    let stages = dense.map_or(&[][..], |dense| &dense.stages);
    for tile in std::iter::once(adj).chain(stages.chunks_exact(adj.len())) {
        let mut rest = tile;
        for (features, rounds_to) in plan.layout.features.iter().zip(&plan.low) {
            let x;
            (x, rest) = rest.split_at(features * batch);
            see(*rounds_to, x);
        }
    }
}
