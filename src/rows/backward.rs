//! The backward pass, tile by tile.

use std::sync::Arc;

use candle_core::{Shape, Tensor, TensorId};

use super::activations::Selection;
use super::forward::{each_leaf, Tile};
use super::lanes::LaneSteps;
use super::pulls::{DenseSeeds, StagePulls};
use super::scales::Scales;
use super::stepper::Stepper;
use super::tile::Tiled;
use super::trajectory::TileTrajectory;
use super::window::{KeptBy, Sums, Window};
use super::{numbers, on_all_threads, Failure, TilePlan};
use crate::accumulator::gradient_of;
use crate::error::{Error, Result};
use crate::problem::Problem;
use crate::reverse::{Adjoint, Backward, Reversible};
use crate::schedule::{Schedule, Step};
use crate::simd::tiles::{load, store, Idle};
use crate::simd::{aligned, Element};
use crate::state::RowLayout;
use crate::stats::Stats;
use crate::trajectory::Checkpoint;

/// What a forward pass over tiles leaves for the way back.
pub(super) struct Trajectories<T: Element> {
    pub(super) field: Box<dyn Tiled<T>>,
    pub(super) selection: Selection,
    pub(super) weights: Vec<TensorId>,
    pub(super) shapes: Vec<Shape>,
    pub(super) layout: RowLayout,
    pub(super) schedule: Arc<Schedule>,
    pub(super) groups: Vec<Vec<Tile<T>>>,
}

impl<T: Element> Reversible for Trajectories<T> {
    fn can_rewind(&self) -> bool {
        let mut tiles = self.groups.iter().flatten();
        tiles.all(|tile| tile.trajectory.can_rewind())
    }

    fn pull_back(&self, back: &Backward<'_>, stats: &mut Stats) -> Result<Adjoint> {
        let Backward { problem, theta, .. } = *back;
        let plan = TilePlan::new(problem, &self.layout);
        let cotangent = numbers::<T>(back.cotangent)?;
        let mut y0 = vec![T::default(); problem.packing.len()];
        let mut sums = Sums::default();
        let mut counted = Stats::default();
        let mut fold = |g: usize, group: SweptGroup<T>| {
            let mut tiles = group.y0.as_slice();
            for tile in &self.groups[g] {
                tiles = self.layout.place(&tile.rows, tiles, &mut y0);
            }
            sums.add::<T>(group.sums);
            counted.join(&group.stats);
        };
        let pass = TilePass {
            field: &*self.field,
            selection: &self.selection,
            plan: &plan,
            schedule: &self.schedule,
            differentiate: !theta.is_empty(),
        };
        let stages = most_stages(problem, &self.schedule);
        let steps = self.schedule.len();
        let window = || {
            Window::new(pass.field, stages, steps, pass.differentiate)
                .compensating(problem.scheme.compensated)
        };
        let each = |window: &mut Window<T>, tiles: &Vec<Tile<T>>| {
            let seed = Seed::Packed(&cotangent);
            pass.sweep(tiles, seed, window)
        };
        on_all_threads(&self.groups, &window, &each, &mut fold)?;
        stats.add(&counted);
        let gradients = sums.gradients(pass.field);
        adjoint(problem, (&self.weights, &self.shapes), theta, y0, gradients)
    }
}

/// λ_0, packed, and θ̄, weight after weight, as gradients of y0 and of `theta`; an error if one of these is not finite.
pub(super) fn adjoint<T: Element>(
    problem: &Problem,
    (weights, shapes): (&[TensorId], &[Shape]),
    theta: &[Tensor],
    y0: Vec<T>,
    mut gradients: Vec<T>,
) -> Result<Adjoint> {
    let device = problem.device();
    // None are there where none were wanted.
    gradients.resize(shapes.iter().map(Shape::elem_count).sum(), T::default());
    let sizes = shapes.iter().map(Shape::elem_count);
    let wanted = weights
        .iter()
        .map(|w| theta.iter().any(|p| p.id() == *w))
        .zip(sizes);
    check_finite(&gradients, wanted)?;
    let count = gradients.len();
    let all = Tensor::from_vec(gradients, count, device)?;
    let (mut at, mut by_weight) = (0, vec![]);
    for shape in shapes {
        by_weight.push(all.narrow(0, at, shape.elem_count())?.reshape(shape)?);
        at += shape.elem_count();
    }
    let y0 = Tensor::from_vec(y0, problem.packing.len(), device)?;
    Ok(Adjoint {
        y0: problem.packing.unpack(&y0)?,
        theta: theta
            .iter()
            .map(|p| gradient_of(p, weights, &by_weight, T::DTYPE))
            .collect::<Result<_>>()?,
        times: vec![],
    })
}

/// An error if a gradient that is wanted is not finite; by weight, whether it is, and how many numbers it has.
pub(super) fn check_finite<T: Element>(
    gradients: &[T],
    weights: impl Iterator<Item = (bool, usize)>,
) -> Result<()> {
    let mut rest = gradients;
    for (is_wanted, size) in weights {
        let own;
        (own, rest) = rest.split_at(size.min(rest.len()));
        // Without a branch, so that many are looked at at a time.
        let finite = |all: bool, g: &T| all & g.to_f64().is_finite();
        if is_wanted && !own.iter().fold(true, finite) {
            return Err(Error::NonFiniteParameterGradient);
        }
    }
    Ok(())
}

fn not_finite(step: Step) -> Error {
    Error::NonFiniteGradient {
        step: step.index,
        t: step.t,
    }
}

/// What the backward pass of one group leaves.
#[derive(Default)]
pub(super) struct SweptGroup<T> {
    /// λ_0, `[tile][leaf][row]`.
    pub(super) y0: Vec<T>,
    /// Those of θ̄ of its rows.
    pub(super) sums: Sums,
    pub(super) stats: Stats,
}

/// What every tile's backward pass reads.
pub(super) struct TilePass<'a, T: Element> {
    pub(super) field: &'a dyn Tiled<T>,
    pub(super) selection: &'a Selection,
    pub(super) plan: &'a TilePlan<'a>,
    pub(super) schedule: &'a Schedule,
    pub(super) differentiate: bool,
}

/// The cotangents of the returned states.
#[derive(Clone, Copy)]
pub(super) enum Seed<'a, T> {
    /// Of all rows, `(outputs, elements)`.
    Packed(&'a [T]),
    /// Of the group, as its states: `[tile][output][leaf][row]`.
    ByTile(&'a [T]),
}

impl<'a, T> Seed<'a, T> {
    /// Of a leaf of some rows, whose tile begins at `tile` in the group.
    pub(super) fn of(
        self,
        problem: &Problem,
        layout: &RowLayout,
        output: usize,
        leaf: usize,
        (rows, tile): (&std::ops::Range<usize>, usize),
    ) -> &'a [T] {
        let size = rows.len() * layout.features[leaf];
        let before: usize = layout.features[..leaf].iter().sum();
        match self {
            Self::Packed(all) => {
                let from = output * problem.packing.len() + layout.offset(leaf, rows.start);
                &all[from..][..size]
            }
            Self::ByTile(group) => {
                let from = tile + (output * layout.dim() + before) * rows.len();
                &group[from..][..size]
            }
        }
    }
}

impl<T: Element> TilePass<'_, T> {
    /// The backward pass of one group of tiles.
    pub(super) fn sweep(
        &self,
        tiles: &[Tile<T>],
        seeds: Seed<'_, T>,
        window: &mut Window<T>,
    ) -> std::result::Result<SweptGroup<T>, Failure> {
        window.clear();
        let swept = self.sweep_into(tiles, seeds, window)?;
        Ok(SweptGroup {
            sums: window.finish(self.field),
            ..swept
        })
    }

    /// The same of some tiles of a group, whose sums stay in the window.
    pub(super) fn sweep_into(
        &self,
        tiles: &[Tile<T>],
        seeds: Seed<'_, T>,
        window: &mut Window<T>,
    ) -> std::result::Result<SweptGroup<T>, Failure> {
        let TilePass {
            field,
            selection,
            plan,
            schedule,
            ..
        } = *self;
        let (problem, layout) = (plan.problem, plan.layout);
        let mut stepper = Stepper::<T>::new(field, plan);
        let (size, batch) = (stepper.size, stepper.batch);
        let steps = schedule.len();
        // Scratch for replays, which this plan needs none of.
        let mut slot = match problem.checkpoint {
            Checkpoint::All => aligned(0),
            _ => stepper.slot(),
        };
        let mut state = aligned(size);
        let mut adj = aligned(stepper.carried);
        let mut incoming = match schedule.outputs() {
            1 => aligned(0),
            _ => aligned(size),
        };
        let mut pull = StagePulls::<T>::new(&stepper);
        let mut dense = schedule.is_dense().then(|| DenseSeeds::new(&stepper));
        let mut y0 = vec![];
        let mut stats = Stats::default();
        // Where the tile's states begin among the group's.
        let mut at = 0;

        for Tile {
            rows,
            trajectory,
            kept: evaluations,
        } in tiles
        {
            let seed = |output: usize, to: &mut [T]| {
                each_leaf(layout, batch, |leaf, features, range| {
                    let numbers = seeds.of(problem, layout, output, leaf, (rows, at));
                    load(numbers, features, batch, Idle::Zeros, &mut to[range]);
                });
            };
            stepper.clock.hold(rows.clone());
            seed(problem.outputs() - 1, &mut adj);
            adj[size..].fill(T::default());
            let mut scales = Scales::shared(problem.scaler, batch);
            // Steps that are known need no state, and no replay.
            let mut rewind = None;
            let mut counted = Stats::default();
            let kept = KeptBy {
                selection,
                evaluations,
            };
            for n in (0..steps).rev() {
                let step = schedule.step(n);
                let failed = |error| Failure {
                    at: (steps - n, 0),
                    error,
                };
                let stages = stepper.stages(step.dense).len();
                window.begin_step(field, &kept);
                let slots = window.next_kept();
                if !selection.knows_all(n) {
                    counted.recomputed += stages;
                }
                if selection.has_whole(n) {
                    // They are read where they are.
                } else if selection.knows(n) {
                    stepper.recall(step, selection, evaluations, slots);
                } else {
                    match trajectory {
                        TileTrajectory::All(states) => {
                            let there = states.load(n, &mut state);
                            there.ok_or(Error::NothingKept).map_err(failed)?;
                        }
                        TileTrajectory::Planned(planned) => {
                            let mut replayed = 0;
                            let mut states = Stats::default();
                            let mut replay = |m, y: &_| {
                                let step = schedule.step(m);
                                replayed += stepper.stages(step.dense).len();
                                stepper.replay(step, y, &mut slot).map_err(|f| f.error)
                            };
                            let rewind = rewind.get_or_insert_with(|| planned.rewind_from(n));
                            let y = rewind.state(n, &mut replay, &mut states).map_err(failed)?;
                            counted.kept(states.states_kept, states.bytes_kept);
                            counted.recomputed += replayed;
                            y.load(&mut state);
                        }
                    }
                    stepper.linearize(LaneSteps::All(step), &state, slots);
                }

                let inside = schedule.inside(n);
                let mut seeds = dense.as_mut().filter(|_| !inside.is_empty());
                if let Some(seeds) = &mut seeds {
                    seeds.clear();
                    for at in inside {
                        seed(at.output, &mut incoming);
                        seeds.weigh(&stepper, &stepper.interpolant(at.x), &incoming);
                    }
                }
                let seeds = seeds.as_deref();
                scales.aim(stepper.on, plan, &adj[..size], seeds);
                pull.step(
                    &stepper,
                    LaneSteps::All(step),
                    &mut adj,
                    seeds,
                    window,
                    &kept,
                    &mut scales,
                    &mut counted,
                )
                .map_err(|exhausted| failed(exhausted.error(LaneSteps::All(step))))?;
                if let Some(output) = schedule.at_node(n) {
                    seed(output, &mut incoming);
                    pull.add(stepper.on, batch, &mut adj, &incoming);
                }
                if !stepper.on.is_finite(&adj) {
                    return Err(failed(not_finite(step)));
                }
                window.end_step();
            }
            window.flush(field, &kept);
            each_leaf(layout, batch, |_, features, range| {
                let at = y0.len();
                y0.resize(at + rows.len() * features, T::default());
                store(&adj[range], features, batch, &mut y0[at..]);
            });
            stats.join(&counted);
            at += problem.outputs() * rows.len() * layout.dim();
        }
        Ok(SweptGroup {
            y0,
            sums: Sums::default(),
            stats,
        })
    }
}

/// The most stages that are evaluated in a step of a schedule.
pub(super) fn most_stages(problem: &Problem, schedule: &Schedule) -> usize {
    match schedule.is_dense() {
        true => problem.scheme.dense_stages().len(),
        false => problem.scheme.evaluations(),
    }
}
