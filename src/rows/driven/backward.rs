//! The backward pass of an equation that is driven by noise, tile by tile.

use std::sync::Arc;

use candle_core::{Shape, TensorId};

use super::forward::DrivenTile;
use super::pulls::DrivenPulls;
use super::stepper::{DrivenStepper, Slots};
use crate::driven::Driven;
use crate::error::{Error, Result};
use crate::problem::ActivationCache;
use crate::reverse::{Adjoint, Backward, Reversible};
use crate::rows::activations::{KeptEvaluations, Selection, Size};
use crate::rows::backward::{adjoint, Seed};
use crate::rows::forward::each_leaf;
use crate::rows::scales::magnitude;
use crate::rows::tile::Tiled;
use crate::rows::trajectory::TileTrajectory;
use crate::rows::window::{KeptBy, Sums, Window};
use crate::rows::{numbers, on_all_threads, Failure, TilePlan};
use crate::schedule::{Schedule, Step};
use crate::simd::tiles::{load, store, Idle};
use crate::simd::{aligned, Element};
use crate::state::RowLayout;
use crate::stats::Stats;
use crate::trajectory::Checkpoint;

/// What a forward pass over tiles leaves for the way back.
pub(super) struct DrivenTrajectories<T: Element> {
    pub(super) parts: Vec<Box<dyn Tiled<T>>>,
    pub(super) weights: Vec<TensorId>,
    pub(super) shapes: Vec<Shape>,
    pub(super) layout: RowLayout,
    pub(super) schedule: Arc<Schedule>,
    pub(super) driven: Arc<Driven>,
    pub(super) groups: Vec<Vec<DrivenTile<T>>>,
}

impl<T: Element> Reversible for DrivenTrajectories<T> {
    fn can_rewind(&self) -> bool {
        let mut tiles = self.groups.iter().flatten();
        tiles.all(|tile| tile.trajectory.can_rewind())
    }

    fn pull_back(&self, back: &Backward<'_>, stats: &mut Stats) -> Result<Adjoint> {
        let Backward { problem, theta, .. } = *back;
        let plan = TilePlan::new(problem, &self.layout);
        let cotangent = numbers::<T>(back.cotangent)?;
        let mut y0 = vec![T::default(); problem.packing.len()];
        let mut sums: Vec<_> = self.parts.iter().map(|_| Sums::default()).collect();
        let mut counted = Stats::default();
        let mut fold = |g: usize, group: SweptTiles<T>| {
            let mut tiles = group.y0.as_slice();
            for tile in &self.groups[g] {
                tiles = self.layout.place(&tile.rows, tiles, &mut y0);
            }
            for (sums, of_group) in sums.iter_mut().zip(group.sums) {
                sums.add::<T>(of_group);
            }
            counted.join(&group.stats);
        };
        let sweep = DrivenSweep {
            parts: &self.parts,
            plan: &plan,
            driven: &self.driven,
            schedule: &self.schedule,
            kept: self.nothing_kept()?,
        };
        let windows = || sweep.windows(!theta.is_empty());
        let each = |windows: &mut Vec<Window<T>>, tiles: &Vec<DrivenTile<T>>| {
            sweep.group(tiles, &cotangent, windows)
        };
        on_all_threads(&self.groups, &windows, &each, &mut fold)?;
        stats.add(&counted);
        let mut gradients = vec![];
        for (part, sums) in self.parts.iter().zip(&sums) {
            let end = gradients.len() + part.parameters();
            gradients.extend(sums.gradients(&**part));
            // None are there where none were wanted.
            gradients.resize(end, T::default());
        }
        adjoint(problem, (&self.weights, &self.shapes), theta, y0, gradients)
    }
}

impl<T: Element> DrivenTrajectories<T> {
    /// By part, that no evaluation is kept.
    fn nothing_kept(&self) -> Result<Vec<(Selection, KeptEvaluations<T>)>> {
        let of = |part: &dyn Tiled<T>| {
            let size = Size {
                rows: part.batch(),
                features: part.kept(),
                stages: 1,
                steps: self.schedule.len(),
            };
            let selection = Selection::new::<T>(part.parts(), ActivationCache::NONE, size);
            let kept = KeptEvaluations::new(&selection, part.batch())?;
            Ok((selection, kept))
        };
        self.parts.iter().map(|part| of(&**part)).collect()
    }
}

/// What every tile's backward pass reads.
struct DrivenSweep<'a, T: Element> {
    parts: &'a [Box<dyn Tiled<T>>],
    plan: &'a TilePlan<'a>,
    driven: &'a Driven,
    schedule: &'a Schedule,
    kept: Vec<(Selection, KeptEvaluations<T>)>,
}

impl<T: Element> DrivenSweep<'_, T> {
    /// A window for each part.
    fn windows(&self, differentiate: bool) -> Vec<Window<T>> {
        let evaluations = self.driven.table().evaluations;
        let parts = self.parts.iter().enumerate();
        let windows = parts.map(|(p, part)| {
            let own = evaluations.iter().filter(|e| e.part as usize == p);
            Window::new(&**part, own.count(), self.schedule.len(), differentiate)
        });
        windows.collect()
    }

    /// The backward pass of one group of tiles.
    fn group(
        &self,
        tiles: &[DrivenTile<T>],
        cotangent: &[T],
        windows: &mut [Window<T>],
    ) -> std::result::Result<SweptTiles<T>, Failure> {
        let Self { plan, schedule, .. } = *self;
        let (problem, layout) = (plan.problem, plan.layout);
        let mut stepper = DrivenStepper::new(self.parts, plan, self.driven);
        let (size, batch, steps) = (stepper.size, stepper.batch, schedule.len());
        let evaluations = self.driven.table().evaluations.len();
        let kept = self.kept.iter().map(|(selection, evaluations)| KeptBy {
            selection,
            evaluations,
        });
        let kept: Vec<_> = kept.collect();
        // Replays, which this plan needs none of.
        let mut scratch = match problem.checkpoint {
            Checkpoint::All => vec![],
            _ => stepper.scratch(),
        };
        for window in &mut *windows {
            window.clear();
        }
        let mut state = aligned(stepper.carried().len());
        let mut pulls = DrivenPulls::new(&stepper);
        let mut swept = SweptTiles::default();
        for DrivenTile { rows, trajectory } in tiles {
            let seed = |output: usize, to: &mut [T]| {
                each_leaf(layout, batch, |leaf, features, range| {
                    let of = Seed::Packed(cotangent);
                    let numbers = of.of(problem, layout, output, leaf, (rows, 0));
                    load(numbers, features, batch, Idle::Zeros, &mut to[range]);
                });
            };
            stepper.clock.hold(rows.clone());
            pulls.begin(|adj| seed(problem.outputs() - 1, adj));
            let (mut scaler, mut rewind) = (problem.scaler, None);
            let mut counted = Stats::default();
            for n in (0..steps).rev() {
                let step = schedule.step(n);
                let failed = |error| Failure {
                    at: (steps - n, 0),
                    error,
                };
                match trajectory {
                    TileTrajectory::All(states) => {
                        let there = states.load(n, stepper.carried_mut());
                        there.ok_or(Error::NothingKept).map_err(failed)?;
                    }
                    TileTrajectory::Planned(planned) => {
                        let (mut replayed, mut states) = (0, Stats::default());
                        let mut replay = |m, y: &_| {
                            replayed += evaluations;
                            let step = schedule.step(m);
                            let next = stepper.replay(step, y, &mut scratch);
                            next.map_err(|failure| failure.error)
                        };
                        let rewind = rewind.get_or_insert_with(|| planned.rewind_from(n));
                        let y = rewind.state(n, &mut replay, &mut states).map_err(failed)?;
                        counted.kept(states.states_kept, states.bytes_kept);
                        counted.recomputed += replayed;
                        y.load(&mut state);
                        stepper.carried_mut().copy_from_slice(&state);
                    }
                }
                let parts = self.parts.iter().zip(&kept).zip(&mut *windows);
                let mut slots = vec![];
                for ((part, kept), window) in parts {
                    window.begin_step(&**part, kept);
                    slots.push(Slots {
                        numbers: window.next_kept(),
                        stride: part.kept() * batch,
                    });
                }
                stepper.evaluate(step, &mut slots, false)?;
                counted.recomputed += evaluations;
                if scaler.is_dynamic() {
                    let adj = pulls.carried();
                    let largest = adj
                        .chunks_exact(size)
                        .map(|adj| magnitude(stepper.on, plan, batch, adj, None))
                        .fold(0.0, f64::max);
                    scaler = scaler.aimed(largest);
                }
                scaler = pulls
                    .step(&stepper, step, windows, &kept, scaler, &mut counted)
                    .map_err(failed)?;
                match schedule.at_node(n) {
                    Some(output) => pulls.finish(&stepper, |incoming| seed(output, incoming)),
                    None => pulls.finish(&stepper, |incoming| incoming.fill(T::default())),
                }
                if !stepper.on.is_finite(pulls.carried()) {
                    return Err(failed(not_finite(step)));
                }
                for window in &mut *windows {
                    window.end_step();
                }
            }
            for ((part, kept), window) in self.parts.iter().zip(&kept).zip(&mut *windows) {
                window.flush(&**part, kept);
            }
            let adj = pulls.at_start();
            each_leaf(layout, batch, |_, features, range| {
                let at = swept.y0.len();
                swept.y0.resize(at + rows.len() * features, T::default());
                store(&adj[range], features, batch, &mut swept.y0[at..]);
            });
            swept.stats.join(&counted);
        }
        for (part, window) in self.parts.iter().zip(windows) {
            swept.sums.push(window.finish(&**part));
        }
        Ok(swept)
    }
}

/// What the backward pass of one group leaves.
#[derive(Default)]
struct SweptTiles<T> {
    /// λ_0, `[tile][leaf][row]`.
    y0: Vec<T>,
    /// Those of θ̄ of its rows, part by part.
    sums: Vec<Sums>,
    stats: Stats,
}

fn not_finite(step: Step) -> Error {
    Error::NonFiniteGradient {
        step: step.index,
        t: step.t,
    }
}
