//! Whole solves of equations that are driven by noise, tile by tile: each part of the equation is a field that is
//! integrated over tiles, and the noise of a tile's rows is drawn in its lanes.
//!
//! Steps and their pull-backs are those of [`Driven`](crate::driven::Driven): the sums of a table.  The backward pass
//! computes the increments again.  A tile contains all states that the method carries, one after the other.

mod backward;
mod forward;
mod mix;
mod noise;
mod pulls;
mod stepper;

use candle_core::{DType, Shape, Tensor};

pub(super) use mix::Mixed;

use super::tile::Tiled;
use super::{held, Rows, Solved, TilePlan};
use crate::driven::{Driven, NoiseType};
use crate::error::Result;
use crate::problem::{Plan, Problem};
use crate::simd::Element;
use crate::state::RowLayout;
use crate::stats::Stats;

/// The steps that tiles multiply by are powers of two of at most so many octaves: then no product of a cotangent with h
/// or √h leaves the range of f32.
const OCTAVES: i32 = 24;

/// Makes tiles of a part; `None` without a vector unit.
type InTiles<'a, T> = dyn Fn(&Rows) -> Result<Option<Box<dyn Tiled<T>>>> + 'a;

/// The parts of an equation, each a field over tiles, in the order of [`Part`](crate::driven::Part).
pub(crate) struct DrivenRows(Vec<Rows>);

impl DrivenRows {
    pub(crate) fn new(parts: Vec<Rows>) -> Self {
        Self(parts)
    }

    /// What the parts read when a solve begins.
    pub(crate) fn weights(&self) -> Vec<Tensor> {
        self.0.iter().flat_map(Rows::weights).collect()
    }

    /// Rows and features of a state of these shapes, if they are those of all parts.
    fn layout(&self, shapes: &[Shape]) -> Option<RowLayout> {
        let mut layouts = self.0.iter().map(|part| part.layout(shapes));
        let first = layouts.next()??;
        layouts
            .all(|layout| layout.as_ref() == Some(&first))
            .then_some(first)
    }

    /// Solves the problem tile by tile, or leaves it to the general path.
    pub(crate) fn solve(
        &self,
        problem: &Problem,
        y0: &Tensor,
        stats: &mut Stats,
    ) -> Result<Option<Solved>> {
        let (Some(driven), Plan::Known(schedule)) = (&problem.driven, &problem.plan) else {
            return Ok(None);
        };
        let Some(layout) = self.layout(problem.packing.shapes()) else {
            return Ok(None);
        };
        // Rows that share a leading dimension have one row of the noise.
        let takes = self.takes(driven) && layout.rows == driven.rows;
        if !takes || !schedule.is_moderate(OCTAVES) {
            return Ok(None);
        }
        if !self.0.iter().all(|part| part.takes(problem)) {
            return Ok(None);
        }
        let plan = TilePlan::new(problem, &layout);
        match held(problem) {
            Some(DType::F32) => {
                let parts = self.parts(&|rows| rows.single(&plan, problem.packing.shapes()))?;
                self.run::<f32>(&plan, y0, parts, stats)
            }
            Some(DType::F64) => {
                let parts = self.parts(&|rows| rows.double(&plan, problem.packing.shapes()))?;
                self.run::<f64>(&plan, y0, parts, stats)
            }
            _ => Ok(None),
        }
    }

    /// Whether noise and method are those of tiles.
    fn takes(&self, driven: &Driven) -> bool {
        let drive = &driven.drive;
        let noise = matches!(
            drive.equation.noise,
            NoiseType::Diagonal | NoiseType::Scalar
        );
        noise && drive.noise.is_drawn() && driven.leaves() > 0
    }

    /// The parts over tiles; `None` without a vector unit.
    fn parts<T: Element>(&self, tiles: &InTiles<'_, T>) -> Result<Option<Vec<Box<dyn Tiled<T>>>>> {
        self.0.iter().map(tiles).collect()
    }

    fn run<T: Element>(
        &self,
        plan: &TilePlan<'_>,
        y0: &Tensor,
        parts: Option<Vec<Box<dyn Tiled<T>>>>,
        stats: &mut Stats,
    ) -> Result<Option<Solved>> {
        let (Some(parts), Some(driven), Plan::Known(schedule)) =
            (parts, &plan.problem.driven, &plan.problem.plan)
        else {
            return Ok(None);
        };
        forward::run(
            parts,
            self.weights(),
            (plan, driven, schedule),
            super::forward::start::<T>(plan.problem, y0)?,
            stats,
        )
        .map(Some)
    }
}
