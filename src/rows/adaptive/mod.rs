//! Adaptive steps, tile by tile: every row of the batch has steps of its own.
//!
//! All lanes of a tile evaluate the stages of their attempts together, and each lane accepts or rejects its own
//! attempt.  A lane whose row has reached the end takes the next row of the group at once and does not wait for the
//! other lanes.  Rows with many steps are taken first, so that no lane begins a long one when the others have ended.
//! The result of a row depends only on this row: not on the other lanes, the number of lanes, or the threads.

mod backward;
mod decide;
mod events;
mod forward;
mod inside;
mod lane;
mod norms;

use std::ops::Range;
use std::sync::Arc;

use candle_core::{Shape, Tensor, TensorId};

use super::activations::{Selection, Size};
use super::tile::Tiled;
use super::trajectory::TileTrajectory;
use super::{numbers, on_all_threads, Solved, Task, TilePlan};
use crate::adaptive::{Control, Pace};
use crate::crossing::RowFound;
use crate::error::{Result, StopReason};
use crate::memory::{zeros, Growth};
use crate::problem::ActivationCache;
use crate::reverse::{Adjoint, Backward, Reversible};
use crate::schedule::Recorded;
use crate::simd::Element;
use crate::state::RowLayout;
use crate::stats::{RowStats, Stats};
use forward::IntegrateRows;
use norms::Tolerances;
pub(super) use norms::{Attempted, Norms};

/// A row that was solved: its steps, what was kept of its states, and what it did.
struct RowSolve<T> {
    steps: Recorded,
    trajectory: TileTrajectory<T>,
    pace: Pace,
    evaluations: usize,
    /// Why it did not reach the end.
    stopped: Option<StopReason>,
    /// Its events.
    found: Vec<RowFound>,
}

/// The rows of one group, and their returned states, `[row][output][feature]`.
struct SolvedGroup<T> {
    rows: Range<usize>,
    solves: Vec<RowSolve<T>>,
    states: Vec<T>,
    /// Evaluations of the whole tile.
    calls: usize,
}

/// Rows for a lane of a tile: fewer, and lanes that have no row left wait for the last ones.
const ROWS_OF_A_LANE: usize = 4;

/// The groups of rows that go through one tile after each other.  Which they are depends on the problem alone.
fn groups(plan: &TilePlan<'_>, batch: usize, parameters: usize) -> Vec<Range<usize>> {
    let rows = plan.layout.rows;
    let count = (rows / (ROWS_OF_A_LANE * batch)).clamp(1, plan.most_groups(parameters));
    let cut = |g: usize| g * rows / count;
    (0..count).map(|g| cut(g)..cut(g + 1)).collect()
}

/// The forward pass of all rows, and the way back.
pub(super) fn run<T: Element>(
    field: Box<dyn Tiled<T>>,
    task: Task<'_, T>,
    control: &Arc<Control>,
    stats: &mut Stats,
) -> Result<Solved> {
    let Task {
        plan,
        y0,
        weights,
        reads_time,
        reads_clock,
    } = task;
    let (problem, layout) = (plan.problem, plan.layout);
    let tolerances = Tolerances::new(problem, control)?;
    let groups = groups(plan, field.batch(), field.parameters());
    let elements = problem.packing.len();
    let need = plan.need(&*field, control.least_steps(), layout.rows, elements);
    need.check()?;
    let has_events = !problem.crossings.is_empty();
    let pass = IntegrateRows {
        field: &*field,
        plan,
        control,
        tolerances: &tolerances,
        y0: &y0,
        reads_time,
        reads_clock,
        refines: has_events && !problem.scheme.tableau.interpolates_well(),
        growth: &Growth::default(),
    };
    let each = |(): &mut (), rows: &Range<usize>| pass.group(rows.clone());
    let mut done = Vec::with_capacity(groups.len());
    on_all_threads(&groups, &|| (), &each, &mut |_, group| done.push(group))?;
    let mut packed = zeros::<T>(
        "returned states",
        problem.outputs().saturating_mul(elements),
    )?;
    for SolvedGroup { rows, states, .. } in &mut done {
        let mut states = std::mem::take(states);
        let mut rest = states.as_mut_slice() as &[T];
        for row in rows.clone() {
            for output in 0..problem.outputs() {
                let state = &mut packed[output * elements..][..elements];
                rest = layout.place(&(row..row + 1), rest, state);
            }
        }
    }
    count(&done, problem.recorder.traces(), stats);
    let shape = (problem.outputs(), elements);
    let solves = done.iter_mut().flat_map(|group| &mut group.solves);
    let found = solves.flat_map(|solve| std::mem::take(&mut solve.found));
    let found = found.collect();
    Ok(Solved {
        packed: Tensor::from_vec(packed, shape, problem.device())?,
        back: Arc::new(RowTrajectories {
            field,
            weights: weights.iter().map(Tensor::id).collect(),
            shapes: weights.iter().map(|w| w.shape().clone()).collect(),
            layout: layout.clone(),
            groups: done,
            reads_clock,
            has_events,
        }),
        found,
    })
}

/// Notes what the rows did.
fn count<T: Element>(groups: &[SolvedGroup<T>], traces: bool, stats: &mut Stats) {
    let mut most = Stats::default();
    for group in groups {
        most.tile_evaluations += group.calls;
        for solve in &group.solves {
            let mut of_row = Stats {
                evaluations: solve.evaluations,
                ..Default::default()
            };
            solve.pace.count(&mut of_row);
            solve.trajectory.record(&mut of_row);
            most.row_evaluations += solve.evaluations;
            most.see_row(&of_row);
            if traces {
                most.rows.push(RowStats {
                    accepted: solve.pace.accepted,
                    rejected: solve.pace.rejected,
                    evaluations: solve.evaluations,
                    limited: solve.pace.limited,
                    stopped: solve.stopped,
                    times: solve.steps.times().collect(),
                });
            }
        }
    }
    stats.take_over(&mut most);
}

/// What a forward pass by rows leaves for the way back.
struct RowTrajectories<T: Element> {
    field: Box<dyn Tiled<T>>,
    weights: Vec<TensorId>,
    shapes: Vec<Shape>,
    layout: RowLayout,
    groups: Vec<SolvedGroup<T>>,
    /// Whether tiles read the times of the lanes.
    reads_clock: bool,
    /// Whether states of events are among the returned ones; a row need not have all of them.
    has_events: bool,
}

impl<T: Element> Reversible for RowTrajectories<T> {
    fn can_rewind(&self) -> bool {
        let mut solves = self.groups.iter().flat_map(|group| &group.solves);
        solves.all(|solve| solve.trajectory.can_rewind())
    }

    fn ignores_cotangents(&self) -> bool {
        let mut solves = self.groups.iter().flat_map(|group| &group.solves);
        self.has_events || solves.any(|solve| solve.stopped.is_some())
    }

    fn pull_back(&self, back: &Backward<'_>, stats: &mut Stats) -> Result<Adjoint> {
        backward::pull_back(self, &numbers::<T>(back.cotangent)?, back, stats)
    }
}

/// Nothing is kept of evaluations, since rows have steps of their own.
fn keeps_no_evaluations<T: Element>(field: &dyn Tiled<T>, stages: usize) -> Selection {
    let size = Size {
        rows: 0,
        features: field.kept(),
        stages,
        steps: usize::MAX,
    };
    Selection::new::<T>(field.parts(), ActivationCache::NONE, size)
}
