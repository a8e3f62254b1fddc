//! Forward and backward pass in one: each tile is integrated, its loss is computed, and its cotangents
//! are pulled back while its evaluations are still in cache.

use std::sync::Arc;

use candle_core::{Shape, Tensor, TensorId};

use super::activations::{KeptEvaluations, Selection};
use super::backward::{self, Seed, TilePass};
use super::forward::{self, Integrate};
use super::grade::{Grade, RowsOf};
use super::tile::Tiled;
use super::window::{Sums, Window};
use super::{numbers, on_all_threads, Failure, Solved, Task, TilePlan};
use crate::error::{Error, Result};
use crate::memory::zeros;
use crate::problem::ActivationCache;
use crate::reverse::{Adjoint, Backward, Reversible};
use crate::schedule::Schedule;
use crate::simd::Element;
use crate::stats::Stats;

/// The most bytes of evaluations that a tile may keep, those of its last steps if not all fit: an amount
/// that a shared cache can hold for each of several cores.
const KEPT: usize = 12 << 20;

/// The gradients of the loss, not yet multiplied by the cotangent of the loss itself.
struct Graded<T> {
    weights: Vec<TensorId>,
    shapes: Vec<Shape>,
    y0: Vec<T>,
    gradients: Vec<T>,
}

impl<T: Element> Reversible for Graded<T> {
    fn can_rewind(&self) -> bool {
        true
    }

    fn pull_back(&self, back: &Backward<'_>, _: &mut Stats) -> Result<Adjoint> {
        let Backward { problem, theta, .. } = *back;
        let c = match numbers::<T>(back.cotangent)?.as_slice() {
            [c] => *c,
            _ => return Err(Error::NothingKept),
        };
        let scaled = |x: &[T]| x.iter().map(|x| *x * c).collect::<Vec<_>>();
        let (y0, gradients) = (scaled(&self.y0), scaled(&self.gradients));
        let finite = |x: &[T]| x.iter().all(|x| x.to_f64().is_finite());
        if !finite(&y0) {
            let t = problem.grid.points()[0];
            return Err(Error::NonFiniteGradient { step: 0, t });
        }
        backward::adjoint(problem, (&self.weights, &self.shapes), theta, y0, gradients)
    }
}

/// The loss of all rows, in a tensor of one element, and its gradients.
pub(super) fn run<T: Element>(
    field: &dyn Tiled<T>,
    task: Task<'_, T>,
    schedule: &Schedule,
    loss: &dyn Grade<T>,
    stats: &mut Stats,
) -> Result<Solved> {
    let Task {
        plan, y0, weights, ..
    } = task;
    let (problem, layout) = (plan.problem, plan.layout);
    let mut graded = Graded {
        y0: vec![T::default(); y0.len()],
        gradients: vec![],
        weights: weights.iter().map(Tensor::id).collect(),
        shapes: weights.iter().map(|w| w.shape().clone()).collect(),
    };
    let (mut total, mut counted, mut sums) = (0.0, Stats::default(), Sums::default());
    let mut fold = |_: usize, group: GradedGroup<T>| {
        total += group.loss;
        let mut tiles = group.swept.y0.as_slice();
        for rows in &group.rows {
            tiles = layout.place(rows, tiles, &mut graded.y0);
        }
        sums.add::<T>(group.swept.sums);
        counted.join(&group.swept.stats);
        counted.kept_evaluations(group.bytes);
    };
    let (stages, steps) = (backward::most_stages(problem, schedule), schedule.len());
    let rows = field.batch();
    let groups = plan.groups(rows, field.parameters());
    let cache = ActivationCache::within(KEPT);
    let selection = Selection::new::<T>(
        field.parts(),
        cache,
        plan.size(schedule, rows, field.kept()),
    );
    // A tile of every thread at a time; what fills up the last one is not of the batch.
    let alive = groups.len().min(rayon::current_num_threads());
    let elements = layout.rows.min(alive * rows) * layout.dim();
    // Which budgets are too small does not depend on the number of threads.
    problem
        .checkpoint
        .check(problem.packing.len() * size_of::<T>() * problem.scheme.carried())?;
    let bytes = alive as u128 * selection.bytes::<T>();
    plan.need(field, steps, alive * rows, elements)
        .of(bytes)
        .check()?;
    let integrate = Integrate {
        field,
        selection: &selection,
        plan,
        schedule,
        y0: &y0,
        elements,
    };
    let pass = TilePass {
        field,
        selection: &selection,
        plan,
        schedule,
        differentiate: weights.iter().any(Tensor::track_op),
    };
    // Pages cost more than what is written to them: the scratch of one tile is the next one's.
    let scratch = || {
        let window = Window::<T>::new(field, stages, steps, pass.differentiate)
            .compensating(problem.scheme.compensated);
        (window, vec![])
    };
    let tile = |(window, spare): &mut (Window<T>, Vec<KeptEvaluations<T>>), first: &usize| {
        let integrated = integrate.group(std::slice::from_ref(first), std::mem::take(spare))?;
        let anywhere = |error| Failure { at: (0, 0), error };
        let (loss, cotangent) = grade(loss, plan, &integrated).map_err(anywhere)?;
        let seed = Seed::ByTile(&cotangent);
        let mut swept = pass.sweep_into(&integrated.tiles, seed, window)?;
        if let Some(tile) = integrated.tiles.first() {
            tile.trajectory.record(&mut swept.stats);
        }
        let tiles = integrated.tiles.into_iter();
        let (rows, used) = tiles.map(|tile| (tile.rows, tile.kept)).unzip();
        *spare = used;
        Ok::<_, Failure>(GradedGroup {
            loss,
            swept,
            bytes,
            rows,
        })
    };
    let each = |scratch: &mut (Window<T>, Vec<_>), group: &Vec<usize>| {
        scratch.0.clear();
        let mut sum = GradedGroup::default();
        for first in group {
            sum = sum.and(tile(scratch, first)?);
        }
        sum.swept.sums = scratch.0.finish(field);
        Ok(sum)
    };
    on_all_threads(&groups, &scratch, &each, &mut fold)?;
    graded.gradients = sums.gradients(field);
    let wanted = weights.iter().map(|w| (w.track_op(), w.elem_count()));
    backward::check_finite(&graded.gradients, wanted)?;
    forward::count(problem, schedule, stats);
    stats.add(&counted);
    Ok(Solved {
        packed: Tensor::new(&[T::of(total)], problem.device())?,
        back: Arc::new(graded),
        found: vec![],
    })
}

/// What a tile leaves, or a group of them.
#[derive(Default)]
struct GradedGroup<T> {
    loss: f64,
    rows: Vec<std::ops::Range<usize>>,
    swept: backward::SweptGroup<T>,
    bytes: u128,
}

impl<T: Element> GradedGroup<T> {
    /// Appends the result of the next tile to this one; its gradients are in the window of both.
    fn and(mut self, next: Self) -> Self {
        self.loss += next.loss;
        self.bytes = self.bytes.max(next.bytes);
        self.rows.extend(next.rows);
        self.swept.y0.extend(next.swept.y0);
        self.swept.stats.join(&next.swept.stats);
        self
    }
}

/// The loss of a group, and its cotangents in the order of its states.
fn grade<T: Element>(
    loss: &dyn Grade<T>,
    plan: &TilePlan<'_>,
    group: &forward::IntegratedGroup<T>,
) -> Result<(f64, Vec<T>)> {
    let outputs = plan.problem.outputs();
    let mut cotangents = zeros::<T>("the cotangents of a loss", group.states.len())?;
    let (mut total, mut at) = (0.0, 0);
    for tile in &group.tiles {
        let size = tile.rows.len() * plan.layout.dim();
        for output in 0..outputs {
            let of = RowsOf {
                output: (output, outputs),
                first: tile.rows.start,
                y: &group.states[at..][..size],
            };
            total += loss.grade(plan.layout, &of, &mut cotangents[at..][..size]);
            at += size;
        }
    }
    Ok((total, cotangents))
}
