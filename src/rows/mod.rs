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
mod driven;
mod few;
mod forward;
mod grade;
mod graded;
mod lanes;
mod lanewise;
mod pieces;
mod plan;
mod pulls;
mod scales;
mod stepper;
#[cfg(test)]
mod tests;
mod threads;
mod tile;
mod trajectory;
mod window;

use std::marker::PhantomData;

use std::sync::Arc;

use candle_core::{DType, Shape, Tensor};
use pulp::{Simd, WithSimd};

use crate::adaptive::StepControl;
use crate::crossing::RowFound;
use crate::error::Result;
use crate::intervals::Intervals;
use crate::problem::{Plan, Problem};
use crate::reverse::Reversible;
use crate::schedule::Output;
use crate::simd::{unit, Element};
use crate::state::RowLayout;
use crate::stats::Stats;
pub(crate) use activations::Part;
pub(crate) use around::Around;
pub(crate) use driven::DrivenRows;
use few::Deal;
pub(crate) use grade::{Grade, RowGrade, RowsOf};
use lanewise::On;
use pieces::Pieces;
use plan::TilePlan;
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

    /// Whether its tiles read the times of the lanes, in whatever precision.
    fn reads_clock(&self) -> bool {
        self.reads_time()
    }

    /// The first and the last time at which the field is defined, if it is not everywhere.
    fn domain(&self) -> Option<[f64; 2]> {
        None
    }

    /// Whether all lanes of a tile must be at one time, so that rows cannot have steps of their own.
    fn shares_time(&self) -> bool {
        false
    }

    /// Whether the lanes of a vector are read together, so that no vector may have lanes without a row.
    fn joins_lanes(&self) -> bool {
        false
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
    /// The same field for few rows, each dealt out to the lanes of a vector.
    few: Option<Arc<dyn AnyRows>>,
    /// What is made of the field, from the inside to the outside.
    around: Vec<Around>,
}

impl Rows {
    pub(crate) fn new<F: RowField>(field: Arc<F>) -> Self {
        Self {
            field,
            few: None,
            around: vec![],
        }
    }

    /// The same, with a field over rows that are dealt out to the lanes of a vector.
    pub(crate) fn few<F: RowField>(self, field: F) -> Self {
        Self {
            few: Some(Arc::new(field)),
            ..self
        }
    }

    /// Fields that take turns: each in the interval of time that has its number.
    pub(crate) fn in_turn(rows: Vec<Self>, intervals: Intervals) -> Self {
        Self {
            field: Arc::new(Pieces { rows, intervals }),
            few: None,
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

    /// Whether rows may have steps of their own.
    pub(crate) fn may_part(&self) -> bool {
        !self.field.shares_time()
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
        if !self.takes(problem) {
            return Ok(None);
        }
        if let Plan::Adaptive(control) = &problem.plan {
            let batch = control.options.control == Some(StepControl::Batch);
            if batch || problem.output == Output::Steps || !self.may_part() {
                return Ok(None);
            }
        }
        if let (Some(few), None, true) = (&self.few, loss, self.around.is_empty()) {
            let weights = self.weights().iter().map(Tensor::elem_count).sum();
            if let Some(deal) = Deal::of(problem, &layout, weights)? {
                return deal.solve(few, problem, y0, stats);
            }
        }
        let plan = TilePlan::new(problem, &layout);
        match held(problem) {
            Some(DType::F32) => {
                let prepared = |loss: &dyn RowGrade| loss.single(problem, &layout);
                let tiles = || self.single(&plan, problem.packing.shapes());
                self.solve_in::<f32>(&plan, y0, (loss, &prepared), &tiles, stats)
            }
            Some(DType::F64) => {
                let prepared = |loss: &dyn RowGrade| loss.double(problem, &layout);
                let tiles = || self.double(&plan, problem.packing.shapes());
                self.solve_in::<f64>(&plan, y0, (loss, &prepared), &tiles, stats)
            }
            _ => Ok(None),
        }
    }

    /// Whether tiles may solve the problem, whatever its state is.
    fn takes(&self, problem: &Problem) -> bool {
        if !problem.fusion || !problem.device().is_cpu() || problem.grid.is_tracked() {
            return false;
        }
        // Where a field is not defined, the general path says so.
        let outside = |[start, end]: [f64; 2]| {
            let mut points = problem.grid.points().iter();
            points.any(|t| !(start..=end).contains(t))
        };
        if self.field.domain().is_some_and(outside) {
            return false;
        }
        // That time stands still for a field that reads it is found where steps are taken one by one; of adaptive steps it
        // is not known before they are taken.
        !self.field.reads_time() || problem.resolved
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
        let field = tiles()?.filter(|field| !plan.is_mostly_idle(&**field));
        field
            .map(|field| solve_tiles(field, task, wanted, stats))
            .transpose()
    }

    /// In tiles of f32 on the vector unit, if there is one, for states of these shapes.
    fn single(&self, plan: &TilePlan<'_>, shapes: &[Shape]) -> Result<Option<Box<dyn Tiled<f32>>>> {
        let own = &shapes[..shapes.len() - self.leaves_around()];
        let field = self.field.single(plan, own)?;
        Ok(field.map(|field| self.made_of(field, plan, own.len())))
    }

    /// In tiles of f64.
    fn double(&self, plan: &TilePlan<'_>, shapes: &[Shape]) -> Result<Option<Box<dyn Tiled<f64>>>> {
        let own = &shapes[..shapes.len() - self.leaves_around()];
        let field = self.field.double(plan, own)?;
        Ok(field.map(|field| self.made_of(field, plan, own.len())))
    }

    /// What is made of the field inside, whose state has so many leaves.
    fn made_of<T: Element>(
        &self,
        mut field: Box<dyn Tiled<T>>,
        plan: &TilePlan<'_>,
        own: usize,
    ) -> Box<dyn Tiled<T>> {
        let mut dim = plan.layout.features[..own].iter().sum();
        for around in &self.around {
            field = around.tiles(field, dim);
            dim += around.leaves();
        }
        field
    }

    fn task<'a, T: Element>(&self, plan: &'a TilePlan<'a>, y0: &Tensor) -> Result<Task<'a, T>> {
        Ok(Task {
            plan,
            y0: forward::start::<T>(plan.problem, y0)?,
            weights: self.weights(),
            reads_time: self.field.reads_time(),
            reads_clock: self.field.reads_clock(),
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

    fn reads_clock(&self) -> bool;

    fn domain(&self) -> Option<[f64; 2]>;

    fn shares_time(&self) -> bool;

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

    fn reads_clock(&self) -> bool {
        RowField::reads_clock(self)
    }

    fn domain(&self) -> Option<[f64; 2]> {
        RowField::domain(self)
    }

    fn shares_time(&self) -> bool {
        RowField::shares_time(self)
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

/// The numbers that tiles of a problem compute with, if its dtype roles are those of tiles.
fn held(problem: &Problem) -> Option<DType> {
    let roles = &problem.scheme.roles;
    let held = |dtype| {
        roles
            .iter()
            .all(|r| r.state == dtype && r.compute.held == dtype)
    };
    let stores = |dtype| roles.iter().all(|r| r.store.to == dtype);
    let single = held(DType::F32) && stores(roles[0].store.to);
    let double = held(DType::F64) && stores(DType::F64);
    match (single, double) {
        (true, _) => Some(DType::F32),
        (_, true) => Some(DType::F64),
        _ => None,
    }
}

/// A solve over numbers of T.
struct Task<'a, T> {
    plan: &'a TilePlan<'a>,
    y0: Vec<T>,
    weights: Vec<Tensor>,
    /// Whether velocities depend on time.
    reads_time: bool,
    /// Whether tiles read the times of the lanes.
    reads_clock: bool,
}

/// Packs the weights of a field for the vector unit; `None` without a unit.
type TilesFor<'a, T> = dyn Fn() -> Result<Option<Box<dyn Tiled<T>>>> + 'a;

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
        let mut field = self.spec.tiles(s, self.shapes)?;
        if self.spec.shares_time() {
            field.prepare(s, &self.plan.stage_times());
        }
        let (on, lanes) = (On(s), T::lanes::<S>());
        let wide = match self.spec.joins_lanes() {
            true => self.plan.layout.rows.is_multiple_of(2 * lanes),
            false => self.plan.is_wide::<T>(lanes),
        };
        Ok(match T::WIDE && wide {
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
