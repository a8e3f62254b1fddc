//! Solves of few rows, with the features of a row in the lanes instead of the rows of the batch.
//!
//! A batch of few rows would leave most lanes of a vector idle.  So each row of the state is dealt out to as many
//! rows as there are lanes, feature i to row i mod L, and the field of these rows reads all lanes of a vector together.
//! Everything else that a solver does is the same for every feature, so that nothing else needs to know of it.

use std::sync::Arc;

use candle_core::{DType, Shape, Tensor};
use pulp::{Simd, WithSimd};

use super::{dispatch, held, AnyRows, Rows, Solved};
use crate::error::Result;
use crate::problem::Problem;
use crate::reverse::{Adjoint, Backward, Reversible};
use crate::simd::Element;
use crate::state::{Packing, RowLayout};
use crate::stats::Stats;
use crate::trajectory::Checkpoint;

/// The least multiply-adds of a solve of one tile, for which the change of order is worth while.
const WORK: usize = 1 << 18;
/// The same of a solve of several tiles, for which a second thread wakes up.
const WORK_OF_THREADS: usize = 1 << 22;
/// The most numbers that returned states may have in addition, which fill up vectors.
const FILLING: usize = 1 << 24;

/// How the rows of a state are dealt out.
#[derive(Clone, Copy)]
pub(super) struct Deal {
    rows: usize,
    features: usize,
    lanes: usize,
}

/// Lanes of f32 on the vector unit.
struct Lanes;

impl WithSimd for Lanes {
    type Output = usize;

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) -> usize {
        f32::lanes::<S>()
    }
}

impl Deal {
    /// That of a problem which has too few rows for the lanes, and enough to do for a network of so many weights.
    pub(super) fn of(
        problem: &Problem,
        layout: &RowLayout,
        weights: usize,
    ) -> Result<Option<Self>> {
        let (Some(schedule), [features]) = (problem.plan.known(), &layout.features[..]) else {
            return Ok(None);
        };
        let evaluations = schedule.len().saturating_mul(problem.scheme.evaluations());
        let work = evaluations
            .saturating_mul(weights)
            .saturating_mul(layout.rows);
        let least = match layout.rows {
            ..=2 => WORK,
            _ => WORK_OF_THREADS,
        };
        if layout.rows == 0 || work < least || held(problem) != Some(DType::F32) {
            return Ok(None);
        }
        let deal = Self {
            rows: layout.rows,
            features: *features,
            lanes: dispatch(Lanes)?.unwrap_or(0),
        };
        // Each tile reads all weights, for two rows at most: with more rows than half the lanes, rows in the lanes are faster.
        Ok((2 * deal.rows <= deal.lanes && deal.fits(problem)).then_some(deal))
    }

    /// Whether what fills up vectors is little, and a budget in bytes is enough for the states alone.
    fn fits(&self, problem: &Problem) -> bool {
        let filling = self.rows * (self.vectors() * self.lanes - self.features);
        let state = self.rows * self.features * size_of::<f32>() * problem.scheme.carried();
        let enough = match problem.checkpoint {
            Checkpoint::Bytes(bytes) => bytes >= state,
            _ => true,
        };
        enough && filling.saturating_mul(problem.outputs()) <= FILLING
    }

    /// Features of the rows that a row is dealt out to.
    fn vectors(&self) -> usize {
        self.features.div_ceil(self.lanes)
    }

    /// The same problem of the rows that are dealt out, with a budget for as many states.
    fn problem(&self, problem: &Problem) -> Problem {
        let shape = Shape::from((self.rows * self.lanes, self.vectors()));
        let whole = (self.vectors() * self.lanes) as u128;
        let checkpoint = match problem.checkpoint {
            Checkpoint::Bytes(bytes) => {
                let bytes = bytes as u128 * whole / self.features.max(1) as u128;
                Checkpoint::Bytes(usize::try_from(bytes).unwrap_or(usize::MAX))
            }
            plan => plan,
        };
        Problem {
            packing: Packing::of(vec![shape]),
            checkpoint,
            ..problem.clone()
        }
    }

    /// States, `(n, elements)`, dealt out.
    fn deal(&self, states: &Tensor, n: usize) -> candle_core::Result<Tensor> {
        let (all, whole) = (n * self.rows, self.vectors() * self.lanes);
        states
            .detach()
            .reshape((all, self.features))?
            .pad_with_zeros(1, 0, whole - self.features)?
            .reshape((all, self.vectors(), self.lanes))?
            .transpose(1, 2)?
            .contiguous()?
            .reshape((n, self.rows * whole))
    }

    /// The states that were dealt out.
    fn collect(&self, dealt: &Tensor, n: usize) -> candle_core::Result<Tensor> {
        let all = n * self.rows;
        dealt
            .reshape((all, self.lanes, self.vectors()))?
            .transpose(1, 2)?
            .contiguous()?
            .reshape((all, self.vectors() * self.lanes))?
            .narrow(1, 0, self.features)?
            .contiguous()?
            .reshape((n, self.rows * self.features))
    }

    /// Runs a pass.  Its `bytes_kept` counts the features alone, and not what fills up vectors.
    fn counted<R>(&self, stats: &mut Stats, pass: impl FnOnce(&mut Stats) -> R) -> R {
        let before = std::mem::take(&mut stats.bytes_kept);
        let result = pass(stats);
        let whole = self.vectors() * self.lanes;
        stats.bytes_kept = before.max(stats.bytes_kept / whole.max(1) * self.features);
        result
    }

    /// Solves the problem with a field of the rows that are dealt out.
    pub(super) fn solve(
        self,
        field: &Arc<dyn AnyRows>,
        problem: &Problem,
        y0: &Tensor,
        stats: &mut Stats,
    ) -> Result<Option<Solved>> {
        let dealt = self.problem(problem);
        let rows = Rows {
            field: Arc::clone(field),
            few: None,
            around: vec![],
        };
        let y0 = self.deal(y0, 1)?.flatten_all()?;
        let solved = self.counted(stats, |stats| rows.solve(&dealt, &y0, None, stats))?;
        let Some(solved) = solved else {
            return Ok(None);
        };
        Ok(Some(Solved {
            packed: self.collect(&solved.packed, problem.outputs())?,
            back: Arc::new(Dealt {
                deal: self,
                back: solved.back,
            }),
            found: solved.found,
        }))
    }
}

/// The way back of rows that were dealt out.
struct Dealt {
    deal: Deal,
    back: Arc<dyn Reversible>,
}

impl Reversible for Dealt {
    fn can_rewind(&self) -> bool {
        self.back.can_rewind()
    }

    fn pull_back(&self, back: &Backward<'_>, stats: &mut Stats) -> Result<Adjoint> {
        let problem = self.deal.problem(back.problem);
        let cotangent = self.deal.deal(back.cotangent, back.problem.outputs())?;
        let dealt = Backward {
            problem: &problem,
            cotangent: &cotangent,
            ..*back
        };
        let pull = |stats: &mut Stats| self.back.pull_back(&dealt, stats);
        let mut adjoint = self.deal.counted(stats, pull)?;
        for (y0, shape) in adjoint.y0.iter_mut().zip(back.problem.packing.shapes()) {
            *y0 = self.deal.collect(y0, 1)?.reshape(shape)?;
        }
        Ok(adjoint)
    }
}
