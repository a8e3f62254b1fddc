//! The forward pass of an equation that is driven by noise, tile by tile.

use std::ops::Range;
use std::sync::Arc;

use candle_core::Tensor;

use super::backward::DrivenTrajectories;
use super::stepper::{shared, DrivenStepper};
use crate::driven::Driven;
use crate::error::Result;
use crate::memory::room_for;
use crate::rows::forward::{assemble, each_leaf};
use crate::rows::tile::Tiled;
use crate::rows::trajectory::{TileStore, TileTrajectory};
use crate::rows::{on_all_threads, Failure, Solved, TilePlan};
use crate::schedule::Schedule;
use crate::simd::tiles::{load, store, Idle};
use crate::simd::Element;
use crate::stats::Stats;

/// A tile's rows, and what is kept of its steps.
pub(super) struct DrivenTile<T> {
    pub(super) rows: Range<usize>,
    pub(super) trajectory: TileTrajectory<T>,
}

/// One group's tiles, and their returned states, `[tile][output][leaf][row]`.
struct Integrated<T> {
    tiles: Vec<DrivenTile<T>>,
    states: Vec<T>,
}

/// The forward pass of all tiles, and the way back.
pub(super) fn run<T: Element>(
    parts: Vec<Box<dyn Tiled<T>>>,
    weights: Vec<Tensor>,
    (plan, driven, schedule): (&TilePlan<'_>, &Arc<Driven>, &Arc<Schedule>),
    y0: Vec<T>,
    stats: &mut Stats,
) -> Result<Solved> {
    let (problem, layout) = (plan.problem, plan.layout);
    let batch = parts[0].batch();
    let rows = layout.rows.next_multiple_of(batch);
    let mut need = plan.need(&*parts[0], schedule.len(), rows, problem.packing.len());
    need.work = parts.iter().map(|part| plan.at_work(&**part)).sum();
    need.check()?;
    let parameters = parts.iter().map(|part| part.parameters()).sum();
    let groups = plan.groups(batch, parameters);
    let pass = Integrate {
        parts: &parts,
        plan,
        driven,
        schedule,
        y0: &y0,
    };
    let each = |(): &mut (), tiles: &Vec<usize>| pass.group(tiles);
    let mut done = Vec::with_capacity(groups.len());
    on_all_threads(&groups, &|| (), &each, &mut |_, group| done.push(group))?;
    let by_tile = done.iter().map(|group: &Integrated<T>| {
        let rows = group.tiles.iter().map(|tile| &tile.rows);
        (rows.collect(), group.states.as_slice())
    });
    let packed = assemble(plan, by_tile)?;
    stats.steps += schedule.len();
    stats.evaluations += schedule.len() * problem.evaluations();
    let groups: Vec<_> = done.into_iter().map(|group| group.tiles).collect();
    if let Some(tile) = groups.iter().flatten().next() {
        tile.trajectory.record(stats);
    }
    let shape = (problem.outputs(), problem.packing.len());
    Ok(Solved {
        packed: Tensor::from_vec(packed, shape, problem.device())?,
        back: Arc::new(DrivenTrajectories {
            parts,
            weights: weights.iter().map(Tensor::id).collect(),
            shapes: weights.iter().map(|w| w.shape().clone()).collect(),
            layout: layout.clone(),
            schedule: Arc::clone(schedule),
            driven: Arc::clone(driven),
            groups,
        }),
        found: vec![],
    })
}

/// What every tile's forward pass reads.
struct Integrate<'a, T: Element> {
    parts: &'a [Box<dyn Tiled<T>>],
    plan: &'a TilePlan<'a>,
    driven: &'a Driven,
    schedule: &'a Schedule,
    y0: &'a [T],
}

impl<T: Element> Integrate<'_, T> {
    /// Runs the forward pass of the tiles with these first rows.
    fn group(&self, tiles: &[usize]) -> std::result::Result<Integrated<T>, Failure> {
        let Self {
            plan, schedule, y0, ..
        } = *self;
        let TilePlan {
            problem, layout, ..
        } = plan;
        let mut stepper = DrivenStepper::new(self.parts, plan, self.driven);
        let mut scratch = stepper.scratch();
        let batch = stepper.batch;
        let anywhere = |error| Failure { at: (0, 0), error };
        let rows: usize = tiles.iter().map(|&t| plan.rows(t, batch).len()).sum();
        let numbers = rows.saturating_mul(layout.dim());
        let numbers = numbers.saturating_mul(problem.outputs());
        let mut group = Integrated {
            tiles: Vec::with_capacity(tiles.len()),
            states: room_for("returned states", numbers).map_err(anywhere)?,
        };
        let steps = schedule.len();
        let carried = self.driven.table().next.len();
        // Tiles behind one that fails may fail at an earlier step.
        let mut failure = None;
        'tiles: for &first in tiles {
            let rows = plan.rows(first, batch);
            stepper.clock.hold(rows.clone());
            each_leaf(layout, batch, |leaf, features, range| {
                let from = layout.offset(leaf, first);
                let numbers = &y0[from..from + rows.len() * features];
                let y = &mut stepper.carried_mut()[range];
                load(numbers, features, batch, Idle::Copies, y);
            });
            stepper.begin();
            let elements = carried * problem.packing.len();
            let dtype = problem.scheme.roles[0].store.to;
            let store = TileStore::new(dtype, elements, stepper.carried().len());
            let trajectory =
                TileTrajectory::new(problem.checkpoint, steps, store, stepper.carried());
            let mut trajectory = trajectory.map_err(anywhere)?;
            let returned = |y: &[T], states: &mut Vec<T>| {
                each_leaf(layout, batch, |_, features, range| {
                    let at = states.len();
                    states.resize(at + rows.len() * features, T::default());
                    self::store(&y[range], features, batch, &mut states[at..]);
                });
            };
            if schedule.at_node(0).is_some() {
                returned(stepper.y(), &mut group.states);
            }
            for n in 0..steps {
                if Failure::is_before(&failure, n) {
                    continue 'tiles;
                }
                trajectory.keep(n, stepper.carried()).map_err(anywhere)?;
                let advanced = stepper.advance(schedule.step(n), &mut shared(&mut scratch));
                if let Err(failed) = advanced {
                    Failure::first(&mut failure, failed);
                    continue 'tiles;
                }
                if schedule.at_node(n + 1).is_some() {
                    returned(stepper.y(), &mut group.states);
                }
            }
            group.tiles.push(DrivenTile { rows, trajectory });
        }
        failure.map_or(Ok(group), Err)
    }
}
