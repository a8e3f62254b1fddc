//! Whole solves of fields whose batch rows are independent of each other.
//!
//! Such a field can be integrated tile by tile: one core takes a tile of rows, one row per lane, through the
//! whole interval in its cache, forward and backward; threads synchronise twice per solve.
//! The results equal those of the general path up to rounding.
//!
//! Which rows share a tile and which tiles share a partial sum of gradients depends on the problem
//! alone, so results do not depend on the number of threads.

mod activations;
mod adaptive;
mod around;
mod backward;
mod forward;
mod grade;
mod graded;
mod lanes;
mod lanewise;
mod pulls;
mod stepper;
#[cfg(test)]
mod tests;
mod threads;
mod tile;
mod trajectory;
mod window;

use std::marker::PhantomData;
use std::ops::Range;

use std::sync::Arc;

use candle_core::{DType, Shape, Tensor, TensorId};
use pulp::{Simd, WithSimd};

use crate::adaptive::StepControl;
use crate::crossing::RowFound;
use crate::error::{MemoryNeed, Result};
use crate::precision::Low;
use crate::problem::{Plan, Problem};
use crate::reverse::Reversible;
use crate::schedule::{Output, Schedule};
use crate::simd::{unit, Element};
use crate::state::RowLayout;
use crate::stats::Stats;
pub(crate) use activations::Part;
use activations::Size;
pub(crate) use around::Around;
pub(crate) use grade::{Grade, RowGrade, RowsOf};
use lanewise::On;
use threads::{on_all_threads, Failure};
pub(crate) use tile::{At, Slot, TileField};
use tile::{Tiled, Wide};

/// A field that the solver may integrate tile by tile.
pub(crate) trait RowField: Clone + Send + Sync + 'static {
    /// The field over tiles of T.
    type Tiles<T: Element>: TileField<T>;

    /// The parameters, in the order in which [`TileField::gradients`] returns their gradients.
    fn weights(&self) -> Vec<Tensor>;

    /// Whether velocities depend on time.
    fn reads_time(&self) -> bool;

    /// The first and the last time at which the field is defined, if it is not everywhere.
    fn domain(&self) -> Option<[f64; 2]> {
        None
    }

    /// Rows and features of each leaf of a state of these shapes; `None` if they are not the
    /// field's.
    fn layout(&self, shapes: &[Shape]) -> Option<RowLayout>;

    /// Packs the weights for a vector unit, for states of these shapes.
    fn tiles<T: Element, S: Simd>(&self, s: S, shapes: &[Shape]) -> Result<Self::Tiles<T>>;
}

/// A [`RowField`] of any kind, as a vector field offers it to the solver.
pub(crate) struct Rows {
    field: Arc<dyn AnyRows>,
    /// What is made of the field, from the inside to the outside.
    around: Vec<Around>,
}

impl Rows {
    pub(crate) fn new<F: RowField>(field: Arc<F>) -> Self {
        Self {
            field,
            around: vec![],
        }
    }

    /// What is made of such a field.
    pub(crate) fn around(mut self, around: Around) -> Self {
        self.around.push(around);
        self
    }

    /// What the field reads when a solve begins.
    pub(crate) fn weights(&self) -> Vec<Tensor> {
        self.field.weights()
    }

    /// Leaves that the state has more than that of the field inside.
    fn leaves_around(&self) -> usize {
        self.around.iter().map(|around| around.leaves()).sum()
    }

    /// Rows and features of a state of these shapes, if they are the field's.
    pub(crate) fn layout(&self, shapes: &[Shape]) -> Option<RowLayout> {
        let own = shapes.len().checked_sub(self.leaves_around())?;
        let (inner, outer) = shapes.split_at_checked(own)?;
        let mut layout = self.field.layout(inner)?;
        // One number for each row.
        let rows = |speed: &Shape| {
            let ones = speed.dims().iter().rev().take_while(|&&n| n == 1).count();
            let of = &speed.dims()[..speed.rank() - ones];
            let fits = |x: &Shape| x.rank() == speed.rank() && x.dims().starts_with(of);
            ones > 0 && inner.iter().all(fits) && speed.elem_count() == layout.rows
        };
        if !outer.iter().all(rows) {
            return None;
        }
        layout.features.extend(outer.iter().map(|_| 1));
        Some(layout)
    }

    /// Solves the problem tile by tile, or leaves it to the general path.  With a loss, the result is
    /// its value.
    pub(crate) fn solve(
        &self,
        problem: &Problem,
        y0: &Tensor,
        loss: Option<&dyn RowGrade>,
        stats: &mut Stats,
    ) -> Result<Option<Solved>> {
        let Some(layout) = self.layout(problem.packing.shapes()) else {
            return Ok(None);
        };
        if !problem.fusion || !problem.device().is_cpu() || problem.grid.is_tracked() {
            return Ok(None);
        }
        // Where a field is not defined, the general path says so.
        let outside = |[start, end]: [f64; 2]| {
            let mut points = problem.grid.points().iter();
            points.any(|t| !(start..=end).contains(t))
        };
        if self.field.domain().is_some_and(outside) {
            return Ok(None);
        }
        // That time stands still for a field that reads it is found where steps are taken one by one; of adaptive steps it
        // is not known before they are taken.
        if self.field.reads_time() && !problem.resolved {
            return Ok(None);
        }
        if let Plan::Adaptive(control) = &problem.plan {
            let batch = control.options.control == Some(StepControl::Batch);
            if batch || problem.output == Output::Steps {
                return Ok(None);
            }
        }
        let roles = &problem.scheme.roles;
        let held = |dtype| {
            roles
                .iter()
                .all(|r| r.state == dtype && r.compute.held == dtype)
        };
        let stores = |dtype| roles.iter().all(|r| r.store.to == dtype);
        let plan = TilePlan::new(problem, &layout);
        if held(DType::F32) && stores(roles[0].store.to) {
            let prepared = |loss: &dyn RowGrade| loss.single(problem, &layout);
            let tiles = |own: &[Shape]| self.field.single(&plan, own);
            self.solve_in::<f32>(&plan, y0, (loss, &prepared), &tiles, stats)
        } else if held(DType::F64) && stores(DType::F64) {
            let prepared = |loss: &dyn RowGrade| loss.double(problem, &layout);
            let tiles = |own: &[Shape]| self.field.double(&plan, own);
            self.solve_in::<f64>(&plan, y0, (loss, &prepared), &tiles, stats)
        } else {
            Ok(None)
        }
    }

    /// The same over numbers of T.
    fn solve_in<T: Element>(
        &self,
        plan: &TilePlan<'_>,
        y0: &Tensor,
        (loss, prepared): (Option<&dyn RowGrade>, &Preparation<'_, T>),
        tiles: &TilesFor<'_, T>,
        stats: &mut Stats,
    ) -> Result<Option<Solved>> {
        let Some(wanted) = Wanted::of(loss, plan, prepared)? else {
            return Ok(None);
        };
        let task = self.task(plan, y0)?;
        let shapes = plan.problem.packing.shapes();
        let own = shapes.len() - self.leaves_around();
        let Some(mut field) = tiles(&shapes[..own])? else {
            return Ok(None);
        };
        let mut dim = plan.layout.features[..own].iter().sum();
        for around in &self.around {
            field = around.tiles(field, dim);
            dim += around.leaves();
        }
        solve_tiles(field, task, wanted, stats).map(Some)
    }

    fn task<'a, T: Element>(&self, plan: &'a TilePlan<'a>, y0: &Tensor) -> Result<Task<'a, T>> {
        Ok(Task {
            plan,
            y0: forward::start::<T>(plan.problem, y0)?,
            weights: self.weights(),
            reads_time: self.field.reads_time(),
        })
    }
}

/// Returned states, packed `(outputs, elements)`, and what the backward pass needs.
pub(crate) struct Solved {
    pub(crate) packed: Tensor,
    pub(crate) back: Arc<dyn Reversible>,
    /// What was found of events of rows.
    pub(crate) found: Vec<RowFound>,
}

/// [`RowField`] without its type.
trait AnyRows: Send + Sync {
    fn weights(&self) -> Vec<Tensor>;

    fn reads_time(&self) -> bool;

    fn domain(&self) -> Option<[f64; 2]>;

    fn layout(&self, shapes: &[Shape]) -> Option<RowLayout>;

    /// In tiles of f32 on the vector unit, if there is one.
    fn single(&self, plan: &TilePlan<'_>, shapes: &[Shape]) -> Result<Option<Box<dyn Tiled<f32>>>>;

    /// In tiles of f64.
    fn double(&self, plan: &TilePlan<'_>, shapes: &[Shape]) -> Result<Option<Box<dyn Tiled<f64>>>>;
}

impl<F: RowField> AnyRows for F {
    fn weights(&self) -> Vec<Tensor> {
        RowField::weights(self)
    }

    fn reads_time(&self) -> bool {
        RowField::reads_time(self)
    }

    fn domain(&self) -> Option<[f64; 2]> {
        RowField::domain(self)
    }

    fn layout(&self, shapes: &[Shape]) -> Option<RowLayout> {
        RowField::layout(self, shapes)
    }

    fn single(&self, plan: &TilePlan<'_>, shapes: &[Shape]) -> Result<Option<Box<dyn Tiled<f32>>>> {
        tiles_of(self, plan, shapes)
    }

    fn double(&self, plan: &TilePlan<'_>, shapes: &[Shape]) -> Result<Option<Box<dyn Tiled<f64>>>> {
        tiles_of(self, plan, shapes)
    }
}

fn tiles_of<T: Element, F: RowField>(
    spec: &F,
    plan: &TilePlan<'_>,
    shapes: &[Shape],
) -> Result<Option<Box<dyn Tiled<T>>>> {
    let job = OnUnit {
        spec,
        plan,
        shapes,
        number: PhantomData,
    };
    dispatch(job)?.transpose()
}

/// A solve over numbers of T.
struct Task<'a, T> {
    plan: &'a TilePlan<'a>,
    y0: Vec<T>,
    weights: Vec<Tensor>,
    /// Whether velocities depend on time.
    reads_time: bool,
}

/// Packs the weights of a field for the vector unit, for leaves of these shapes; `None` without a unit.
type TilesFor<'a, T> = dyn Fn(&[Shape]) -> Result<Option<Box<dyn Tiled<T>>>> + 'a;

/// What makes a loss over numbers of T of one that does not know its numbers yet.
type Preparation<'a, T> = dyn Fn(&dyn RowGrade) -> Result<Option<Box<dyn Grade<T>>>> + 'a;

/// What a solve returns.
enum Wanted<T> {
    States,
    Loss(Box<dyn Grade<T>>),
}

impl<T: Element> Wanted<T> {
    /// `None` of a loss that is left to two passes.
    fn of(
        loss: Option<&dyn RowGrade>,
        plan: &TilePlan<'_>,
        prepared: &Preparation<'_, T>,
    ) -> Result<Option<Self>> {
        let (Some(loss), problem) = (loss, plan.problem) else {
            return Ok(Some(Self::States));
        };
        if problem.plan.known().is_none() {
            return Ok(None);
        }
        // What a fixed scale is for, the scale of the loss, is not known yet; and of states that are rounded
        // when they are kept, the last steps would be linearised at others than the first.
        let scales =
            problem.scaler.is_dynamic() || problem.scheme.roles.iter().all(|r| !r.needs_scaling());
        if !scales || !problem.stores_state() {
            return Ok(None);
        }
        Ok(prepared(loss)?.map(Self::Loss))
    }
}

/// The tiles of a field on the vector unit.
struct OnUnit<'a, T, F> {
    spec: &'a F,
    plan: &'a TilePlan<'a>,
    shapes: &'a [Shape],
    number: PhantomData<T>,
}

impl<T: Element, F: RowField> WithSimd for OnUnit<'_, T, F> {
    type Output = Result<Box<dyn Tiled<T>>>;

    #[inline(always)]
    fn with_simd<S: Simd>(self, s: S) -> Self::Output {
        let field = self.spec.tiles(s, self.shapes)?;
        let on = On(s);
        Ok(match T::WIDE && self.plan.is_wide::<T>(T::lanes::<S>()) {
            true => Box::new(Wide::<_, S, 2> { field, on }),
            false => Box::new(Wide::<_, S, 1> { field, on }),
        })
    }
}

fn solve_tiles<T: Element>(
    field: Box<dyn Tiled<T>>,
    task: Task<'_, T>,
    wanted: Wanted<T>,
    stats: &mut Stats,
) -> Result<Solved> {
    match (&task.plan.problem.plan, wanted) {
        (Plan::Known(schedule), Wanted::States) => forward::run(field, task, schedule, stats),
        (Plan::Known(schedule), Wanted::Loss(loss)) => {
            graded::run(&*field, task, schedule, &*loss, stats)
        }
        // A loss is left to two passes.
        (Plan::Adaptive(control), _) => adaptive::run(field, task, control, stats),
    }
}

/// The solve as both passes see it.
struct TilePlan<'p> {
    problem: &'p Problem,
    layout: &'p RowLayout,
    /// What the compute precision of each leaf rounds to.
    low: Vec<Low>,
    /// Whether tiles have two vectors, where a test says so.
    #[cfg(test)]
    forced: Option<bool>,
}

impl<'p> TilePlan<'p> {
    fn new(problem: &'p Problem, layout: &'p RowLayout) -> Self {
        let low = problem.scheme.roles.iter().map(|r| r.compute.low());
        Self {
            low: low.collect(),
            #[cfg(test)]
            forced: tests::width::here(),
            problem,
            layout,
        }
    }

    /// What there is to keep of so many rows, in slots of so many features.
    fn size(&self, schedule: &Schedule, rows: usize, features: usize) -> Size {
        Size {
            rows,
            features,
            stages: backward::most_stages(self.problem, schedule),
            steps: schedule.len(),
        }
    }

    /// The memory that tiles of `batch` rows, `rows` rows in all, hold at once over so many steps, in addition to kept evaluations.
    /// `elements` is the number of state elements of those rows without the padding of the last tile.
    fn need<T: Element>(
        &self,
        batch: usize,
        steps: usize,
        rows: usize,
        elements: usize,
    ) -> MemoryNeed {
        /// Bytes of a state that is kept by itself beside its numbers.
        const STATE: usize = 64;
        let problem = self.problem;
        let bytes = elements.saturating_mul(size_of::<T>());
        let (restart, stored) = problem.checkpoint.most(steps, bytes);
        // Kept with the lanes that fill up the last tile.
        let numbers = rows as u128 * self.layout.dim() as u128;
        let tiles = rows.div_ceil(batch);
        let state = numbers * size_of::<T>() as u128;
        let store = problem.scheme.roles[0].store.to.size_in_bytes();
        let single = state + (tiles * STATE) as u128;
        MemoryNeed {
            states: restart as u128 * single + stored as u128 * numbers * store as u128,
            // As tiles leave them, and as they are handed over.
            returned: 2 * problem.outputs() as u128 * bytes as u128,
            ..Default::default()
        }
    }

    /// Whether there are rows enough for tiles of two vectors of so many lanes, and the tiles stay small.
    fn is_wide<T: Element>(&self, lanes: usize) -> bool {
        #[cfg(test)]
        if let Some(wide) = self.forced {
            return T::WIDE && wide;
        }
        T::WIDE && self.layout.rows >= 4 * lanes && self.layout.dim() <= WIDEST
    }

    /// First rows of the tiles, group by group; the tiles of a group share a partial sum.
    fn groups(&self, batch: usize, parameters: usize) -> Vec<Vec<usize>> {
        let tiles: Vec<usize> = (0..self.layout.rows).step_by(batch).collect();
        let groups = tiles.len().min(self.most_groups(parameters));
        let cut = |g: usize| g * tiles.len() / groups;
        (0..groups)
            .map(|g| tiles[cut(g)..cut(g + 1)].to_vec())
            .collect()
    }

    /// As many groups as many cores can use, but no more than a few million numbers of partial sums.
    fn most_groups(&self, parameters: usize) -> usize {
        (MOST_NUMBERS / parameters.max(1)).clamp(4, MOST_GROUPS)
    }

    /// Rows of the tile that begins at `first`.
    fn rows(&self, first: usize, batch: usize) -> Range<usize> {
        first..self.layout.rows.min(first + batch)
    }
}

/// Features of the largest state in tiles of two vectors.
const WIDEST: usize = 4096;

const MOST_GROUPS: usize = 32;
const MOST_NUMBERS: usize = 1 << 22;

/// Runs on the vector unit; without one, solves are left to the general path.
fn dispatch<J: WithSimd>(job: J) -> Result<Option<J::Output>> {
    // Not by [`Arch::dispatch`](pulp::Arch::dispatch), which would compile everything for scalars too.
    Ok(match unit()? {
        #[cfg(target_arch = "x86_64")]
        pulp::Arch::V4(s) => Some(Simd::vectorize(s, job)),
        #[cfg(target_arch = "x86_64")]
        pulp::Arch::V3(s) => Some(Simd::vectorize(s, job)),
        #[cfg(target_arch = "aarch64")]
        pulp::Arch::Neon(s) => Some(Simd::vectorize(s, job)),
        _ => None,
    })
}

/// The numbers of a packed tensor of T.
fn numbers<T: Element>(packed: &Tensor) -> Result<Vec<T>> {
    Ok(packed.flatten_all()?.to_vec1::<T>()?)
}

/// The gradient of a parameter: the sum over all weights that are this parameter, zero if there is
/// none.
pub(crate) fn gradient_of(
    p: &Tensor,
    weights: &[TensorId],
    gradients: &[Tensor],
    dtype: DType,
) -> Result<Tensor> {
    let shares = weights.iter().zip(gradients);
    let mut shares = shares.filter(|(w, _)| **w == p.id()).map(|(_, g)| g);
    let first = match shares.next() {
        Some(gradient) => gradient.clone(),
        None => Tensor::zeros(p.shape(), dtype, p.device())?,
    };
    Ok(shares.try_fold(first, |sum, gradient| sum + gradient)?)
}
