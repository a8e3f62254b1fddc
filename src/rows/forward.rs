//! The forward pass, tile by tile.

use std::ops::Range;
use std::sync::Arc;

use candle_core::Tensor;

use super::activations::{KeptEvaluations, Selection};
use super::backward::Trajectories;
use super::stepper::Stepper;
use super::tile::Tiled;
use super::trajectory::{TileStore, TileTrajectory};
use super::{numbers, on_all_threads, Failure, Solved, Task, TilePlan};
use crate::adjoint::Method;
use crate::error::{Error, Result};
use crate::memory::{room_for, zeros};
use crate::ops;
use crate::problem::{ActivationCache, Problem};
use crate::schedule::Schedule;
use crate::simd::tiles::{load, store, Idle};
use crate::simd::{aligned, Element};
use crate::state::RowLayout;
use crate::stats::Stats;

/// A tile's rows, its trajectory, and what is kept of its evaluations.
pub(super) struct Tile<T> {
    pub(super) rows: Range<usize>,
    pub(super) trajectory: TileTrajectory<T>,
    pub(super) kept: KeptEvaluations<T>,
}

/// One group's tiles, and their returned states, `[tile][output][leaf][row]`.
pub(super) struct IntegratedGroup<T> {
    pub(super) tiles: Vec<Tile<T>>,
    pub(super) states: Vec<T>,
}

/// The numbers of y0, if they are finite.
pub(super) fn start<T: Element>(problem: &Problem, y0: &Tensor) -> Result<Vec<T>> {
    for (leaf, y) in problem.packing.unpack(y0)?.iter().enumerate() {
        if !ops::magnitude(y)?.is_finite() {
            return Err(Error::NonFiniteState { leaf });
        }
    }
    numbers::<T>(y0)
}

/// The forward pass of all tiles, and the way back.
pub(super) fn run<T: Element>(
    field: Box<dyn Tiled<T>>,
    task: Task<'_, T>,
    schedule: &Arc<Schedule>,
    stats: &mut Stats,
) -> Result<Solved> {
    let Task {
        plan, y0, weights, ..
    } = task;
    let (problem, layout) = (plan.problem, plan.layout);
    let cache = match problem.stores_state() {
        true => problem.activation_cache,
        false => ActivationCache::NONE,
    };
    let batch = field.batch();
    let rows = layout.rows.next_multiple_of(batch);
    let selection = Selection::new::<T>(
        field.parts(),
        cache,
        plan.size(schedule, rows, field.kept()),
    );
    let need = plan.need(&*field, schedule.len(), rows, problem.packing.len());
    need.of(selection.bytes::<T>()).check()?;
    let groups = plan.groups(batch, field.parameters());
    let pass = Integrate {
        field: &*field,
        selection: &selection,
        plan,
        schedule,
        y0: &y0,
        elements: problem.packing.len(),
    };
    let each = |(): &mut (), tiles: &Vec<usize>| pass.group(tiles, vec![]);
    let mut done = Vec::with_capacity(groups.len());
    on_all_threads(&groups, &|| (), &each, &mut |_, group| done.push(group))?;
    let by_tile = done.iter().map(|group: &IntegratedGroup<T>| {
        let rows = group.tiles.iter().map(|tile| &tile.rows);
        (rows.collect(), group.states.as_slice())
    });
    let packed = assemble(plan, by_tile)?;
    let shape = (problem.outputs(), problem.packing.len());
    let groups: Vec<_> = done.into_iter().map(|g| g.tiles).collect();
    count(problem, schedule, stats);
    if let Some(tile) = groups.iter().flatten().next() {
        tile.trajectory.record(stats);
    }
    stats.kept_evaluations(selection.bytes::<T>());
    Ok(Solved {
        packed: Tensor::from_vec(packed, shape, problem.device())?,
        back: Arc::new(Trajectories {
            field,
            selection,
            weights: weights.iter().map(Tensor::id).collect(),
            shapes: weights.iter().map(|w| w.shape().clone()).collect(),
            layout: layout.clone(),
            schedule: Arc::clone(schedule),
            groups,
        }),
        found: vec![],
    })
}

/// Notes the steps of a forward pass.
pub(super) fn count(problem: &Problem, schedule: &Schedule, stats: &mut Stats) {
    stats.steps += schedule.len();
    stats.evaluations += match schedule.is_dense() {
        true => (0..schedule.len())
            .map(|n| problem.scheme.evaluations_of(&schedule.step(n)))
            .sum(),
        false => schedule.len() * problem.scheme.evaluations(),
    };
}

/// What every tile's forward pass reads.
#[derive(Clone, Copy)]
pub(super) struct Integrate<'a, T: Element> {
    pub(super) field: &'a dyn Tiled<T>,
    pub(super) selection: &'a Selection,
    pub(super) plan: &'a TilePlan<'a>,
    pub(super) schedule: &'a Schedule,
    pub(super) y0: &'a [T],
    /// Elements of all states that are kept at a time, for the statistics.
    pub(super) elements: usize,
}

impl<T: Element> Integrate<'_, T> {
    /// Runs the forward pass of the tiles with these first rows.  Buffers for kept evaluations are taken from
    /// `spare` before new ones are allocated.
    pub(super) fn group(
        &self,
        tiles: &[usize],
        mut spare: Vec<KeptEvaluations<T>>,
    ) -> std::result::Result<IntegratedGroup<T>, Failure> {
        let Integrate {
            field,
            selection,
            plan,
            schedule,
            elements,
            ..
        } = *self;
        let TilePlan {
            problem, layout, ..
        } = plan;
        let mut stepper = Stepper::<T>::new(field, plan);
        let mut slot = stepper.slot();
        let mut y = aligned(stepper.carried);
        // The state at the start of a step that outputs are inside of, and such an output.
        let between = if schedule.is_dense() { stepper.size } else { 0 };
        let (mut start, mut output) = (aligned(between), aligned(between));
        let batch = stepper.batch;
        let mut group = IntegratedGroup {
            tiles: Vec::with_capacity(tiles.len()),
            states: vec![],
        };
        let anywhere = |error| Failure { at: (0, 0), error };
        let rows: usize = tiles.iter().map(|&t| plan.rows(t, batch).len()).sum();
        let numbers = rows.saturating_mul(layout.dim());
        let numbers = numbers.saturating_mul(problem.outputs());
        group.states = room_for("returned states", numbers).map_err(anywhere)?;
        // Tiles behind one that fails may fail at an earlier step.
        let mut failure = None;
        'tiles: for &first in tiles {
            let rows = plan.rows(first, batch);
            stepper.clock.hold(rows.clone());
            each_leaf(layout, batch, |leaf, features, range| {
                let from = layout.offset(leaf, first);
                let numbers = &self.y0[from..from + rows.len() * features];
                load(numbers, features, batch, Idle::Copies, &mut y[range]);
            });
            y[stepper.size..].fill(T::default());
            let dtype = problem.scheme.roles[0].store.to;
            let store = TileStore::new(dtype, elements, stepper.size);
            let steps = schedule.len();
            let trajectory = TileTrajectory::new(problem.checkpoint, steps, store, &y);
            let mut trajectory = trajectory.map_err(anywhere)?;
            let returned = |y: &[T], states: &mut Vec<T>| {
                each_leaf(layout, batch, |_, features, range| {
                    let at = states.len();
                    states.resize(at + rows.len() * features, T::default());
                    self::store(&y[range], features, batch, &mut states[at..]);
                });
            };
            if schedule.at_node(0).is_some() {
                returned(&y, &mut group.states);
            }
            let mut kept = match spare.pop() {
                Some(scratch) => scratch,
                None => KeptEvaluations::new(selection, batch).map_err(anywhere)?,
            };
            for n in 0..steps {
                if Failure::is_before(&failure, n) {
                    continue 'tiles;
                }
                let step = schedule.step(n);
                trajectory.keep(n, &y).map_err(anywhere)?;
                let wanted = Some((selection, &mut kept));
                let inside = schedule.inside(n);
                if !inside.is_empty() {
                    start.copy_from_slice(&y[..stepper.size]);
                }
                if let Err(failed) = stepper.advance(step, &mut y, &mut slot, wanted) {
                    Failure::first(&mut failure, failed);
                    continue 'tiles;
                }
                for at in inside {
                    stepper.interpolate((&step, at.x), &start, &mut output);
                    returned(&output, &mut group.states);
                }
                if schedule.at_node(n + 1).is_some() {
                    returned(&y, &mut group.states);
                }
            }
            group.tiles.push(Tile {
                rows,
                trajectory,
                kept,
            });
        }
        failure.map_or(Ok(group), Err)
    }
}

/// Calls `see` with each leaf, its number of features and the range of its numbers, in tiles of `batch` rows.
pub(super) fn each_leaf(
    layout: &RowLayout,
    batch: usize,
    mut see: impl FnMut(usize, usize, std::ops::Range<usize>),
) {
    let mut at = 0;
    for (leaf, &features) in layout.features.iter().enumerate() {
        see(leaf, features, at..at + features * batch);
        at += features * batch;
    }
}

/// Brings the states of all tiles into the order of the packed state, output by output; by group, the rows of its tiles
/// and their states.
pub(super) fn assemble<'a, T: Element>(
    plan: &TilePlan<'_>,
    groups: impl Iterator<Item = (Vec<&'a Range<usize>>, &'a [T])>,
) -> Result<Vec<T>> {
    let (problem, layout) = (plan.problem, plan.layout);
    let elements = problem.packing.len();
    let numbers = problem.outputs().saturating_mul(elements);
    let mut packed = zeros::<T>("returned states", numbers)?;
    for (tiles, mut states) in groups {
        for rows in tiles {
            for output in 0..problem.outputs() {
                let state = &mut packed[output * elements..][..elements];
                states = layout.place(rows, states, state);
            }
        }
    }
    Ok(packed)
}
