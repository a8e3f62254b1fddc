//! The forward loop: steps taken one after the other, outputs collected, the trajectory kept.

use std::sync::Arc;

use candle_core::{DType, Shape, Tensor};

use crate::error::{Error, MemoryNeed, Result};
use crate::field::Field;
use crate::memory::TENSOR;
use crate::precision::Roles;
use crate::problem::{Output, Problem};
use crate::replay::StepSequence;
use crate::rows::{Reversible, Solved};
use crate::state::Packing;
use crate::stats::Stats;
use crate::time::Time;
use crate::trajectory::{Checkpoint, Trajectory};
use crate::watch::Watch;

/// What the forward pass hands on.
pub(crate) struct Forward {
    /// The returned states in state precision, packed: `(outputs, elements)`.
    pub(crate) packed: Tensor,
    /// What was kept for the backward pass.
    pub(crate) kept: Kept,
    /// Whether `packed` is a loss of the states, not the states.
    pub(crate) is_loss: bool,
}

impl Forward {
    /// States that were integrated tile by tile.
    pub(crate) fn of_rows(solved: Solved) -> Self {
        Self {
            packed: solved.packed,
            kept: Kept::Rows(solved.trajectory),
            is_loss: false,
        }
    }

    /// A loss that was formed on the way.
    pub(crate) fn graded(solved: Solved) -> Self {
        Self {
            is_loss: true,
            ..Self::of_rows(solved)
        }
    }
}

/// What a forward pass keeps, by the way that it took.
pub(crate) enum Kept {
    /// Step by step over the whole batch.
    Steps(Trajectory),
    /// Tile by tile over all steps.
    Rows(Arc<dyn Reversible>),
}

impl Kept {
    /// Whether a backward pass is possible.
    pub(crate) fn can_rewind(&self) -> bool {
        match self {
            Self::Steps(trajectory) => trajectory.can_rewind(),
            Self::Rows(trajectory) => trajectory.can_rewind(),
        }
    }
}

/// What a solve step by step holds at once.
fn need(problem: &Problem, checkpoint: Checkpoint) -> MemoryNeed {
    let roles = &problem.scheme.roles;
    let bytes = |dtype: fn(&Roles) -> DType| {
        let leaves = problem.packing.shapes().iter().zip(roles);
        let of = |(shape, roles): (&Shape, &Roles)| {
            shape.elem_count() as u128 * dtype(roles).size_in_bytes() as u128
        };
        // The numbers of a device are in memory of its own.
        let here = problem.device().is_cpu();
        let numbers: u128 = leaves.map(of).sum();
        roles.len() as u128 * TENSOR + if here { numbers } else { 0 }
    };
    let (state, store) = (bytes(|roles| roles.state), bytes(|roles| roles.store.to));
    let whole = problem.packing.len() * problem.state().size_in_bytes();
    let (restart, stored) = checkpoint.most(problem.plan.len(), whole);
    MemoryNeed {
        states: restart as u128 * state + stored as u128 * store,
        returned: problem.outputs() as u128 * state,
        ..Default::default()
    }
}

/// A state without an element: its solution has none, and no step is taken.  The field is evaluated once,
/// for the variables that it reads, unless its layers refuse such a batch, as some of candle's do.
fn nothing(problem: &Problem, field: &Field<'_>, y0: &[Tensor]) -> Result<Forward> {
    let Problem { scheme, .. } = problem;
    let time = Time::new(problem.grid.points()[0], problem.state(), problem.device());
    let time = match problem.plan.len() {
        0 => time,
        _ => {
            let step = problem.plan.step(0);
            time.within(step.index, [step.t, step.end])
        }
    };
    let round = |(y, roles): (&Tensor, &Roles)| roles.compute.round(y);
    let y = y0
        .iter()
        .zip(&scheme.roles)
        .map(round)
        .collect::<Result<Vec<_>>>()?;
    match field.velocity(&time, &y).map_err(Error::from) {
        Ok(k) => scheme.check(&y, &k)?,
        Err(Error::Candle(_) | Error::UntrackedVelocity { .. }) => {}
        Err(error) => return Err(error),
    }
    let y0 = y0.to_vec();
    let trajectory = Trajectory::new(problem.checkpoint, 0, scheme.roles.clone(), &y0)?;
    Ok(Forward {
        packed: Tensor::zeros((problem.outputs(), 0), problem.state(), problem.device())?,
        kept: Kept::Steps(trajectory),
        is_loss: false,
    })
}

/// Integrates from y0 (leaves in state precision, our own) over the whole plan.  What a backward pass needs
/// is kept if `keep` says so once the field has been evaluated; where it comes to say so later only, the
/// pass begins anew.
pub(crate) fn integrate(
    problem: &Problem,
    field: &Field<'_>,
    y0: Vec<Tensor>,
    keep: &dyn Fn() -> bool,
    stats: &mut Stats,
) -> Result<Forward> {
    let mut counted = Stats::default();
    let forward = pass(problem, field, y0.clone(), keep, &mut counted);
    // A pass that failed is counted up to its failure.
    let forward = forward.inspect_err(|_| stats.add(&counted))?;
    let forgot = !forward.kept.can_rewind() && problem.checkpoint != Checkpoint::Nothing;
    if !(forgot && keep()) {
        stats.add(&counted);
        return Ok(forward);
    }
    pass(problem, field, y0, &|| true, stats)
}

/// One pass over all steps.
fn pass(
    problem: &Problem,
    field: &Field<'_>,
    y0: Vec<Tensor>,
    keep: &dyn Fn() -> bool,
    stats: &mut Stats,
) -> Result<Forward> {
    if problem.is_empty() {
        return nothing(problem, field, &y0);
    }
    // What is not known to be kept yet is reckoned after the first step.
    let known = keep();
    let plan_of = |keeps| match keeps {
        true => problem.checkpoint,
        false => Checkpoint::Nothing,
    };
    need(problem, plan_of(known)).check()?;
    let Problem { scheme, plan, .. } = problem;
    let mut watch = Watch::default();
    for (leaf, y) in y0.iter().enumerate() {
        watch.see(std::slice::from_ref(y), || Error::NonFiniteState { leaf })?;
    }
    let mut trajectory =
        Trajectory::new(problem.checkpoint, plan.len(), scheme.roles.clone(), &y0)?;
    let mut outputs = vec![];
    let mut y = y0;
    let mut stored = None;
    if problem.output == Output::All {
        outputs.push(Packing::pack(&y, problem.state())?);
    }
    let copies = trajectory.keeps_copies();
    let mut stepper = StepSequence::new(scheme, copies, problem.graphs, plan.len());
    for n in 0..plan.len() {
        let step = plan.step(n);
        trajectory.offer_stored(n, &y, stored)?;
        let returned = n + 1 == plan.len() || problem.output == Output::All && step.ends_interval();
        let kept = returned || !copies && trajectory.wants(n + 1);
        (y, stored) = stepper.advance(field, step, &y, kept, &mut watch, stats)?;
        stats.steps += 1;
        stats.evaluations += scheme.evaluations();
        if n == 0 && !known && keep() {
            need(problem, problem.checkpoint).check()?;
        } else if n == 0 && !known {
            let roles = scheme.roles.clone();
            trajectory = Trajectory::new(Checkpoint::Nothing, plan.len(), roles, &y)?;
        }
        if problem.output == Output::All && step.ends_interval() {
            outputs.push(Packing::pack(&y, problem.state())?);
        }
    }
    if problem.output == Output::Final {
        outputs.push(Packing::pack(&y, problem.state())?);
    }
    watch.finish()?;
    trajectory.record(stats);
    Ok(Forward {
        packed: Tensor::stack(&outputs, 0)?,
        kept: Kept::Steps(trajectory),
        is_loss: false,
    })
}
