//! The forward loop: steps taken one after the other, outputs collected, the trajectory kept.

mod adaptive;
mod driven;
mod estimate;
mod kept;
pub(crate) mod observe;

use std::sync::Arc;

use candle_core::{DType, Shape, Tensor};

use crate::adjoint::{Method, StepByStep};
use crate::crossing::RowFound;
use crate::driven::Driven;
use crate::error::{Error, MemoryNeed, Result};
use crate::field::Field;
use crate::linearized::Linearized;
use crate::memory::TENSOR;
use crate::precision::Roles;
use crate::problem::{Plan, Problem};
use crate::replay::StepSequence;
use crate::reverse::Reversible;
use crate::schedule::{Recorded, Schedule};
use crate::state::Packing;
#[cfg(feature = "cuda")]
use crate::stats::NotReplayed;
use crate::stats::Stats;
use crate::step::Taken;
use crate::time::Time;
use crate::trajectory::{Checkpoint, Trajectory};
use crate::watch::Watch;
pub(crate) use estimate::first_length;
use observe::Observer;

/// What the forward pass hands on.
pub(crate) struct Forward {
    /// The returned states in state precision, packed: `(outputs, elements)`.
    pub(crate) packed: Tensor,
    /// The way back.
    pub(crate) back: Arc<dyn Reversible>,
    /// Whether `packed` is a loss of the states, not the states.
    pub(crate) is_loss: bool,
    /// What was found of events of rows.
    pub(crate) found: Vec<RowFound>,
}

impl Forward {
    /// States that were integrated step by step over the whole batch.
    fn by_steps(packed: Tensor, trajectory: Trajectory, schedule: Arc<Schedule>) -> Self {
        Self::by_steps_of(None, packed, trajectory, None, schedule)
    }

    /// The same by steps that may be driven by noise, or linearised on the way.
    fn by_steps_of(
        driven: Option<Arc<Driven>>,
        packed: Tensor,
        trajectory: Trajectory,
        linearized: Option<Linearized>,
        schedule: Arc<Schedule>,
    ) -> Self {
        Self {
            packed,
            back: Arc::new(StepByStep {
                trajectory: Arc::new(trajectory),
                linearized: linearized.map(Arc::new),
                schedule,
                driven,
            }),
            is_loss: false,
            found: vec![],
        }
    }
}

/// What a solve step by step holds at once.
fn need(problem: &Problem, steps: usize, checkpoint: Checkpoint) -> MemoryNeed {
    let roles = &problem.scheme.roles;
    // The numbers of a device are in memory of its own.
    let here = u128::from(problem.device().is_cpu());
    let numbers = |dtype: fn(&Roles) -> DType| -> u128 {
        let leaves = problem.packing.shapes().iter().zip(roles);
        let of = |(shape, roles): (&Shape, &Roles)| {
            shape.elem_count() as u128 * dtype(roles).size_in_bytes() as u128
        };
        here * leaves.map(of).sum::<u128>()
    };
    let (state, store) = (numbers(|r| r.state), numbers(|r| r.store.to));
    let whole = problem.packing.len() * problem.state().size_in_bytes() * problem.carried();
    let (restart, stored) = checkpoint.most(steps, whole);
    let beside = roles.len() as u128 * TENSOR;
    let kept = |states: usize, of_each: usize, numbers: u128| {
        states as u128 * of_each as u128 * (beside + numbers)
    };
    // A state of one tensor that is kept as it was computed shares its numbers with the one that is returned, if every
    // state is kept and outputs are among them.
    let outputs = problem.outputs() as u128;
    let shared = match checkpoint {
        _ if roles.len() > 1 || problem.plan.is_dense() => 0,
        Checkpoint::All if !problem.stores_state() => 0,
        Checkpoint::All | Checkpoint::Every(1) => outputs.min(restart.max(stored) as u128),
        _ => 0,
    };
    MemoryNeed {
        states: kept(restart, problem.carried(), state) + kept(stored, problem.copied(), store),
        // Each by itself, and at the end all of them joined.
        returned: outputs * (2 * state + TENSOR) - shared * state,
        ..Default::default()
    }
}

/// A place for linearised steps, where they are wanted and the backward pass can use them: where ŷ_n = y_n.
fn place_for_linearized(problem: &Problem, steps: usize) -> Option<Linearized> {
    let budget = problem.activation_cache.bytes;
    let device = problem.device();
    let discrete = problem.continuous.is_none() && problem.driven.is_none();
    let here = device.is_cpu() || device.is_cuda();
    let wanted = budget > 0 && problem.stores_state() && discrete && here;
    wanted.then(|| Linearized::new(budget, steps))
}

/// A state without an element: its solution has none, and no step is taken.  The field is evaluated once,
/// for the variables that it reads, unless its layers refuse such a batch, as some of candle's do.
fn nothing(problem: &Problem, field: &Field<'_>, y0: &[Tensor]) -> Result<Forward> {
    let Problem { scheme, .. } = problem;
    let time = Time::new(problem.grid.points()[0], problem.state(), problem.device());
    let time = match &problem.plan {
        Plan::Known(schedule) if schedule.len() > 0 => schedule.step(0).within(time),
        _ => time,
    };
    let round = |(y, roles): (&Tensor, &Roles)| roles.compute.round(y);
    let y = y0
        .iter()
        .zip(&scheme.roles)
        .map(round)
        .collect::<Result<Vec<_>>>()?;
    match field.velocity(&time, &y).map_err(Error::from) {
        // An equation of several parts returns one after the other.
        Ok(k) if field.parts().is_empty() => scheme.check(&y, &k)?,
        Ok(_) => {}
        Err(Error::Candle(_) | Error::UntrackedVelocity { .. }) => {}
        Err(error) => return Err(error),
    }
    let y0 = y0.to_vec();
    let trajectory = Trajectory::new(problem.checkpoint, 0, scheme.roles.clone(), &y0)?;
    // Of adaptive steps there is the state at the start, whatever is asked for.
    let outputs = problem.outputs().max(1);
    let packed = Tensor::zeros((outputs, 0), problem.state(), problem.device())?;
    let schedule = match &problem.plan {
        Plan::Known(schedule) => Arc::clone(schedule),
        Plan::Adaptive(control) => {
            Arc::new(Schedule::Recorded(Recorded::from(control.start, true)))
        }
    };
    Ok(Forward::by_steps(packed, trajectory, schedule))
}

/// Integrates from y0 (leaves in state precision, our own) over all steps.  What a backward pass needs
/// is kept if `keep` says so once the field has been evaluated; where it comes to say so later only, the
/// pass begins anew.
pub(crate) fn integrate(
    problem: &Problem,
    field: &Field<'_>,
    y0: Vec<Tensor>,
    keep: &dyn Fn() -> bool,
    observer: &mut dyn Observer,
    stats: &mut Stats,
) -> Result<Forward> {
    let mut counted = Stats::default();
    let forward = pass(problem, field, y0.clone(), keep, observer, &mut counted);
    // A pass that failed is counted up to its failure.
    let forward = forward.inspect_err(|_| stats.take_over(&mut counted))?;
    let forgot = !forward.back.can_rewind() && problem.checkpoint != Checkpoint::Nothing;
    if !(forgot && keep()) {
        stats.take_over(&mut counted);
        return Ok(forward);
    }
    pass(problem, field, y0, &|| true, observer, stats)
}

/// One pass over all steps.
fn pass(
    problem: &Problem,
    field: &Field<'_>,
    y0: Vec<Tensor>,
    keep: &dyn Fn() -> bool,
    observer: &mut dyn Observer,
    stats: &mut Stats,
) -> Result<Forward> {
    if problem.is_empty() {
        return nothing(problem, field, &y0);
    }
    let schedule = match &problem.plan {
        Plan::Known(schedule) => schedule,
        Plan::Adaptive(control) => {
            return match &problem.driven {
                Some(driven) => driven::pass((problem, control), driven, field, y0, keep, stats),
                None => adaptive::pass(problem, control, field, y0, keep, observer, stats),
            }
        }
    };
    // What is not known to be kept yet is reckoned after the first step.
    let known = keep();
    let plan_of = |keeps| match keeps {
        true => problem.checkpoint,
        false => Checkpoint::Nothing,
    };
    need(problem, schedule.len(), plan_of(known)).check()?;
    let (scheme, steps) = (&problem.scheme, schedule.len());
    let mut watch = Watch::default();
    for (leaf, y) in y0.iter().enumerate() {
        watch.see(std::slice::from_ref(y), || Error::NonFiniteState { leaf })?;
    }
    let driven = problem.driven.as_deref();
    let (y0, roles) = match driven {
        Some(driven) => (driven.begin(y0), driven.carried_roles()),
        None => (scheme.begin(y0)?, scheme.roles.clone()),
    };
    let mut trajectory = Trajectory::new(problem.checkpoint, steps, roles.clone(), &y0)?;
    let mut outputs = vec![];
    let mut returns = |y: &[Tensor]| -> Result<()> {
        outputs.push(Packing::pack(&y[..scheme.roles.len()], problem.state())?);
        Ok(())
    };
    let mut y = y0;
    let mut stored = None;
    if schedule.at_node(0).is_some() {
        returns(&y)?;
    }
    let copies = trajectory.keeps_copies();
    let mut linearized = place_for_linearized(problem, steps).filter(|_| trajectory.can_rewind());
    let mut stepper = StepSequence::new(scheme, copies, problem.graphs, steps);
    for n in 0..steps {
        let step = schedule.step(n);
        trajectory.offer_stored(n, &y, stored)?;
        let is_returned = schedule.at_node(n + 1).is_some();
        let is_read = linearized.as_ref().is_some_and(|kept| kept.wants(n + 1));
        let kept = is_returned || is_read || n + 1 == steps || !copies && trajectory.wants(n + 1);
        let with_graphs = match &mut linearized {
            Some(linearized) if linearized.wants(n) => {
                let timed = problem.grid.is_tracked();
                let taken = scheme.advance_and_linearize(field, step, &y, timed, &mut watch)?;
                match taken {
                    Some((taken, linear)) => {
                        linearized.keep(n, linear);
                        #[cfg(feature = "cuda")]
                        if problem.graphs && problem.device().is_cuda() {
                            stats.not_replayed = Some(NotReplayed::KeptEvaluations);
                        }
                        Some(taken)
                    }
                    None => {
                        linearized.close();
                        None
                    }
                }
            }
            _ => None,
        };
        let taken = match (with_graphs, driven) {
            (Some(taken), _) => taken,
            (None, Some(driven)) => Taken {
                y: driven.advance(field, step, &y, &mut watch)?,
                stored: None,
                ks: vec![],
            },
            (None, None) => stepper.advance(field, step, &y, kept, &mut watch, stats)?,
        };
        stats.steps += 1;
        stats.evaluations += match driven {
            Some(driven) => driven.evaluations_of(&step),
            None => scheme.evaluations_of(&step),
        };
        if n == 0 && !known && !keep() {
            trajectory = Trajectory::new(Checkpoint::Nothing, steps, roles.clone(), &y)?;
            linearized = None;
        } else if n == 0 {
            let mut need = need(problem, steps, problem.checkpoint);
            // Those of a device are in memory of its own.
            let here = linearized.as_ref().filter(|_| problem.device().is_cpu());
            need.evaluations = here.map_or(0, Linearized::expected);
            if !known || need.evaluations > 0 {
                need.check()?;
            }
        }
        for inside in schedule.inside(n) {
            returns(&scheme.interpolated((&step, inside.x), &y, &taken.ks)?)?;
        }
        (y, stored) = (taken.y, taken.stored);
        if is_returned {
            returns(&y)?;
        }
    }
    watch.finish()?;
    trajectory.record(stats);
    stats.kept_evaluations(linearized.as_ref().map_or(0, Linearized::most) as u128);
    let packed = Tensor::stack(&outputs, 0)?;
    let driven = problem.driven.clone();
    let schedule = Arc::clone(schedule);
    Ok(Forward::by_steps_of(
        driven, packed, trajectory, linearized, schedule,
    ))
}
