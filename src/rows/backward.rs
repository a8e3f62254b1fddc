//! The backward pass, tile by tile.
//!
//! With w' = h w the sweep of a step is, for descending stages,
//!
//! v_i = b_i λ + Σ_{j>i} a_ji w'_j,  w'_i = (∂f/∂y)ᵀ (h v_i),  θ̄ += (∂f/∂θ)ᵀ (h v_i),
//! λ ← λ + Σ_i w'_i + ȳ_n,
//!
//! so that the contribution of a step to θ̄ needs no further factor, and a window may span several steps.  A very
//! small or very large h is factored as m p, where p is a power of two: v_i is multiplied by m only, so that it
//! stays in the range of f32, and p is part of the scale of the window and of w'_i.

use candle_core::{Shape, Tensor, TensorId};
use pulp::Simd;

use super::activations::Selection;
use super::forward::{each_leaf, Tile};
use super::stepper::{add, combine, is_finite, Stepper};
use super::tile::Tiled;
use super::trajectory::TileTrajectory;
use super::window::{in_range, power, KeptBy, OpenSlot, Window};
use super::{gradient_of, numbers, on_all_threads, Failure, Reversible, TilePlan};
use crate::adjoint::Adjoint;
use crate::error::{Error, Result};
use crate::precision::Low;
use crate::problem::{Output, Problem};
use crate::scaler::{Outcome, Scaler};
use crate::simd::product::{load, store, Idle};
use crate::simd::{enter, vectors, Element, Kernel, Vectors};
use crate::state::RowLayout;
use crate::stats::Stats;
use crate::time::Step;
use crate::trajectory::Checkpoint;

/// What a forward pass over tiles leaves for the way back.
pub(super) struct Trajectories<T: Element, S: Simd> {
    pub(super) s: S,
    pub(super) field: Box<dyn Tiled<T, S>>,
    pub(super) selection: Selection,
    pub(super) weights: Vec<TensorId>,
    pub(super) shapes: Vec<Shape>,
    pub(super) layout: RowLayout,
    pub(super) groups: Vec<Vec<Tile<T>>>,
}

impl<T: Element, S: Simd> Reversible for Trajectories<T, S> {
    fn can_rewind(&self) -> bool {
        let mut tiles = self.groups.iter().flatten();
        tiles.all(|tile| tile.trajectory.can_rewind())
    }

    fn backward(
        &self,
        problem: &Problem,
        cotangent: &Tensor,
        theta: &[Tensor],
        stats: &mut Stats,
    ) -> Result<Adjoint> {
        let plan = TilePlan::new(problem, &self.layout);
        let cotangent = numbers::<T>(cotangent)?;
        let mut y0 = vec![T::default(); problem.packing.len()];
        let mut gradients = vec![];
        let mut counted = Stats::default();
        let mut fold = |g: usize, group: SweptGroup<T>| {
            let mut tiles = group.y0.as_slice();
            for tile in &self.groups[g] {
                tiles = self.layout.place(&tile.rows, tiles, &mut y0);
            }
            add_up(&mut gradients, group.gradients);
            counted.join(&group.stats);
        };
        let pass = Pass {
            field: &*self.field,
            selection: &self.selection,
            plan: &plan,
            differentiate: !theta.is_empty(),
        };
        let (stages, steps) = (problem.scheme.evaluations(), problem.plan.len());
        let window = || Window::new(pass.field, stages, steps, pass.differentiate);
        let each = |window: &mut Window<T, S>, tiles: &Vec<Tile<T>>| {
            let seed = Seed::Packed(&cotangent);
            pass.sweep(self.s, tiles, seed, window)
        };
        on_all_threads(&self.groups, &window, &each, &mut fold)?;
        stats.add(&counted);
        // Without a branch, so that many are looked at at a time.
        let finite = |all: bool, g: &T| all & g.to_f64().is_finite();
        if !gradients.iter().fold(true, finite) {
            return Err(Error::NonFiniteParameterGradient);
        }
        adjoint(problem, (&self.weights, &self.shapes), theta, y0, gradients)
    }
}

/// Adds a group's gradients to the sum, which is empty before the first.
pub(super) fn add_up<T: Element>(sum: &mut Vec<T>, group: Vec<T>) {
    if sum.is_empty() {
        *sum = group;
        return;
    }
    for (sum, part) in sum.iter_mut().zip(group) {
        *sum += part;
    }
}

/// λ_0, packed, and θ̄, weight after weight, as gradients of y0 and of `theta`.
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
    /// θ̄ of its rows, parameter after parameter.
    pub(super) gradients: Vec<T>,
    pub(super) stats: Stats,
}

/// What every tile's backward pass reads.
pub(super) struct Pass<'a, T: Element, S: Simd> {
    pub(super) field: &'a dyn Tiled<T, S>,
    pub(super) selection: &'a Selection,
    pub(super) plan: &'a TilePlan<'a>,
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
    fn of(
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

impl<T: Element, S: Simd> Pass<'_, T, S> {
    /// The backward pass of one group; compiled once for all that call it.
    #[inline(never)]
    pub(super) fn sweep(
        &self,
        s: S,
        tiles: &[Tile<T>],
        seed: Seed<'_, T>,
        window: &mut Window<T, S>,
    ) -> std::result::Result<SweptGroup<T>, Failure> {
        let sweep = Sweep {
            pass: self,
            tiles,
            seed,
            window,
        };
        enter(s, sweep)
    }
}

/// The backward pass of one group of tiles.
struct Sweep<'a, T: Element, S: Simd> {
    pass: &'a Pass<'a, T, S>,
    tiles: &'a [Tile<T>],
    seed: Seed<'a, T>,
    window: &'a mut Window<T, S>,
}

impl<T: Element, S: Simd> Kernel<S> for Sweep<'_, T, S> {
    type Output = std::result::Result<SweptGroup<T>, Failure>;

    #[inline(always)]
    fn run(self, s: S) -> Self::Output {
        let Pass {
            field,
            selection,
            plan,
            ..
        } = *self.pass;
        let (problem, layout) = (plan.problem, plan.layout);
        let mut stepper = Stepper::<T, S>::new(s, field, plan);
        let (size, width) = (stepper.size, stepper.width);
        let batch = width * T::lanes::<S>();
        let steps = problem.plan.len();
        // Room for replays, which this plan needs none of.
        let mut slot = match problem.checkpoint {
            Checkpoint::All => vectors::<T, S>(0),
            _ => stepper.slot(),
        };
        let window = self.window;
        window.clear();
        let mut state = vectors::<T, S>(size);
        let mut adj = vectors::<T, S>(size);
        let mut incoming = match problem.output {
            Output::All => vectors::<T, S>(size),
            Output::Final => vectors::<T, S>(0),
        };
        let mut pull = StagePulls::<T, S>::new(&stepper);
        let mut y0 = vec![];
        let mut stats = Stats::default();
        // Where the tile's states begin among the group's.
        let mut at = 0;

        for Tile {
            rows,
            trajectory,
            kept: evaluations,
        } in self.tiles
        {
            let seed = |output: usize, to: &mut [T::Vector<S>]| {
                each_leaf(layout, width, |leaf, features, range| {
                    let numbers = self.seed.of(problem, layout, output, leaf, (rows, at));
                    load::<T, S>(numbers, features, batch, Idle::Zeros, &mut to[range]);
                });
            };
            seed(problem.outputs() - 1, &mut adj);
            let mut scaler = problem.scaler;
            // Steps that are known need no state, and no replay.
            let mut rewind = None;
            let mut counted = Stats::default();
            let kept = KeptBy {
                selection,
                evaluations,
            };
            for n in (0..steps).rev() {
                let step = problem.plan.step(n);
                let failed = |error| Failure {
                    at: (steps - n, 0),
                    error,
                };
                window.begin_step(s, field, &kept);
                let slots = window.next_kept();
                if !selection.knows_all(n) {
                    counted.recomputed += stepper.stages.len();
                }
                if selection.has_whole(n) {
                    // They are read where they are.
                } else if selection.knows(n) {
                    stepper.recall(step, selection, evaluations, slots);
                } else {
                    match trajectory {
                        TileTrajectory::All(states) => {
                            let there = states.load::<S>(n, &mut state);
                            there.ok_or(Error::NothingKept).map_err(failed)?;
                        }
                        TileTrajectory::Planned(planned) => {
                            let mut replayed = 0;
                            let mut states = Stats::default();
                            let mut replay = |m, y: &_| {
                                replayed += 1;
                                stepper.replay(m, y, &mut slot).map_err(|f| f.error)
                            };
                            let rewind = rewind.get_or_insert_with(|| planned.rewind_from(n));
                            let y = rewind.state(n, &mut replay, &mut states).map_err(failed)?;
                            counted.kept(states.states_kept, states.bytes_kept);
                            counted.recomputed += replayed * stepper.stages.len();
                            y.load::<S>(&mut state);
                        }
                    }
                    stepper.linearize(step, &state, slots);
                }

                if scaler.is_dynamic() {
                    scaler = scaler.aimed(magnitude::<T, S>(s, plan, width, &adj));
                }
                for stage in (0..stepper.stages.len()).rev() {
                    let i = stepper.stages[stage];
                    let at = (i, stage);
                    scaler = pull
                        .stage(
                            &stepper,
                            step,
                            at,
                            &adj,
                            window,
                            &kept,
                            scaler,
                            &mut counted,
                        )
                        .map_err(failed)?;
                }
                scaler = scaler.after_step();
                add::<T, S>(s, &mut adj, 1.0, &pull.all, &pull.ws);
                if step.span.0 == 0.0 && problem.output == Output::All {
                    seed(step.interval, &mut incoming);
                    add::<T, S>(s, &mut adj, 1.0, &[(1.0, 0)], &incoming);
                }
                if !is_finite::<T, S>(s, &adj) {
                    return Err(failed(not_finite(step)));
                }
                window.end_step();
            }
            window.flush(s, field, &kept);
            each_leaf(layout, width, |_, features, range| {
                let at = y0.len();
                y0.resize(at + rows.len() * features, T::default());
                store::<T, S>(&adj[range], features, batch, &mut y0[at..]);
            });
            stats.join(&counted);
            at += problem.outputs() * rows.len() * layout.dim();
        }
        Ok(SweptGroup {
            y0,
            gradients: window.finish(s, field),
            stats,
        })
    }
}

/// max|λ| over the leaves whose cotangents can overflow, or over all where these are zero.
#[inline(always)]
fn magnitude<T: Element, S: Simd>(
    s: S,
    plan: &TilePlan<'_>,
    width: usize,
    adj: &[T::Vector<S>],
) -> f64 {
    let (mut low, mut all) = (0.0, 0.0f64);
    let mut rest = adj;
    for (features, rounds_to) in plan.layout.features.iter().zip(&plan.low) {
        let leaf;
        (leaf, rest) = rest.split_at(features * width);
        let mut max = T::zeros::<S>();
        for x in leaf {
            max = T::larger(s, max, T::abs(s, *x));
        }
        let max = T::largest(s, max).to_f64();
        all = all.max(max);
        if *rounds_to == Low::F16 {
            low = f64::max(low, max);
        }
    }
    if low > 0.0 {
        low
    } else {
        all
    }
}

/// The pull-backs of a step.
struct StagePulls<T: Element, S: Simd> {
    /// w'_i by stage.
    ws: Vectors<T, S>,
    /// a_ji by stage i, for the j > i.
    a: Vec<Vec<(f64, usize)>>,
    /// Every active stage, with coefficient 1.
    all: Vec<(f64, usize)>,
}

impl<T: Element, S: Simd> StagePulls<T, S> {
    fn new(stepper: &Stepper<'_, T, S>) -> Self {
        let tableau = &stepper.plan.problem.scheme.tableau;
        let column = |i: usize| {
            let later = stepper.stages.iter().filter(|&&j| j > i);
            let terms = later.map(|&j| (tableau.a(j)[i], j));
            terms.filter(|(a, _)| *a != 0.0).collect()
        };
        Self {
            ws: vectors::<T, S>(tableau.stages() * stepper.size),
            a: (0..tableau.stages()).map(column).collect(),
            all: stepper.stages.iter().map(|&j| (1.0, j)).collect(),
        }
    }

    /// w'_i, with the cotangents left in the window; the scaler after it.
    #[allow(clippy::too_many_arguments)]
    #[inline(always)]
    fn stage(
        &mut self,
        stepper: &Stepper<'_, T, S>,
        step: Step,
        (i, at): (usize, usize),
        adj: &[T::Vector<S>],
        window: &mut Window<T, S>,
        kept: &KeptBy<'_, T>,
        mut scaler: Scaler,
        stats: &mut Stats,
    ) -> Result<Scaler> {
        let (s, size) = (stepper.s, stepper.size);
        let b = stepper.plan.problem.scheme.tableau.b()[i];
        let rounds = stepper.plan.low.iter().any(|low| *low != Low::None);
        let (m, p) = mantissa(step.h);
        let mut attempts = 0;
        loop {
            let scale = scaler.scale();
            stats.vjps += 1;
            if scaler.is_on() {
                stats.used_scale(scale);
            }
            attempts += 1;
            window.scaled_by(s, stepper.field, kept, scale / p);
            let OpenSlot {
                kept: values,
                cotangents,
            } = window.slot((step.index, at), kept);
            let v = &mut cotangents[..size];
            // S m v_i, or m Q(S v_i) where compute precision is low.
            let factor = if rounds { scale } else { scale * m };
            combine::<T, S>(s, v, (factor * b, adj), factor, &self.a[i], &self.ws);
            if rounds {
                stepper.round(v);
                scale_by::<T, S>(s, v, m);
            }
            let w = &mut self.ws[i * size..][..size];
            stepper.field.vjp(s, values, cotangents, w);
            if rounds {
                scale_by::<T, S>(s, w, 1.0 / m);
                stepper.round(w);
            }
            let outcome = match scaler.is_dynamic() && !is_finite::<T, S>(s, w) {
                true => Outcome::StateOverflow,
                false => Outcome::Clean,
            };
            if outcome == Outcome::Clean {
                let unscale = if rounds { step.h / scale } else { p / scale };
                if unscale != 1.0 {
                    scale_by::<T, S>(s, w, unscale);
                }
                window.push(s, stepper.field, (step.index, at), kept);
                return Ok(scaler);
            }
            scaler = scaler.after(outcome);
            stats.retries += 1;
            if scaler.is_exhausted(attempts) {
                return Err(Error::ScaleExhausted {
                    step: step.index,
                    t: step.t,
                    scale,
                    attempts,
                });
            }
        }
    }
}

#[inline(always)]
fn scale_by<T: Element, S: Simd>(s: S, x: &mut [T::Vector<S>], c: f64) {
    let (a, b) = in_range::<T>(c);
    let a = T::splat(s, T::of(a));
    for x in &mut *x {
        *x = T::times(s, *x, a);
    }
    if b != 1.0 {
        let b = T::splat(s, T::of(b));
        for x in x {
            *x = T::times(s, *x, b);
        }
    }
}

/// h as m p, p a power of two, which is one where h is neither very small nor very large.
fn mantissa(h: f64) -> (f64, f64) {
    const MODERATE: f64 = (1 << 24) as f64;
    if (1.0 / MODERATE..=MODERATE).contains(&h.abs()) {
        return (h, 1.0);
    }
    let p = power(h);
    (h / p, p)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_are_cut_exactly_and_stay_whole_where_they_are_moderate() {
        for h in [1.0, -0.1, 1e-7, 6.1e-8, -1e7] {
            assert_eq!(mantissa(h), (h, 1.0));
        }
        for h in [
            1e-8,
            -1e-20,
            1e-39,
            1e-300,
            f64::MIN_POSITIVE,
            5e-324,
            1e9,
            -1e308,
        ] {
            let (m, p) = mantissa(h);
            assert_eq!(m * p, h);
            assert!(m.abs() < 2.0);
            assert_eq!(p.log2().fract(), 0.0);
        }
    }

    #[test]
    fn factors_that_f32_does_not_hold_are_products_of_two_that_it_holds() {
        for c in [0.0, 1.0, -0.3, 1e-37, 1e38] {
            assert_eq!(in_range::<f32>(c), (c, 1.0));
        }
        for c in [1e-39, -1e-60, 1e39, 1e60] {
            let (a, b) = in_range::<f32>(c);
            assert_eq!(a * b, c);
            for factor in [a, b] {
                assert!((f32::MIN_POSITIVE..=f32::MAX).contains(&(factor.abs() as f32)));
            }
            assert_eq!(in_range::<f64>(c), (c, 1.0));
        }
    }
}
