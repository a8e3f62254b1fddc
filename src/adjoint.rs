//! The backward sweep: the exact discrete adjoint of the steps that were taken, rounding treated as
//! the identity (discretise, then optimise).
//!
//! For n = N−1 … 0, with λ = λ_{n+1} in state precision and the stages recomputed from ŷ_n:
//!
//! v_i = b_i λ + h Σ_{j>i} a_ji w_j,  w_i = (∂f/∂y)ᵀ v_i,  θ̄ += h (∂f/∂θ)ᵀ v_i,
//!
//! λ_n = λ + h Σ w_i + ȳ_n,
//!
//! t̄_{n+1} += Σ v_iᵀ(k_i + c_i h ∂_t f_i),  t̄_n += Σ v_iᵀ(−k_i + (1−c_i) h ∂_t f_i).
//!
//! With compensated sums λ carries what rounding has taken from it, as y does in the forward pass; v_i does not read it.
//!
//! v_i carries no factor h, so it stays of the size of λ.  Only the pull-back is in compute
//! precision: it is fed Q(S·v_i), and its results are divided by S in state precision.

#[cfg(feature = "cuda")]
mod device;
mod driven;
mod outputs;
#[cfg(feature = "cuda")]
mod replay;
mod runge_kutta;
mod times;

use std::sync::Arc;

use candle_core::Tensor;

use crate::accumulator::Accumulator;
use crate::driven::Driven;
use crate::error::{Error, Result};
use crate::field::Field;
use crate::linearized::Linearized;
use crate::precision::Roles;
use crate::reverse::{Adjoint, Backward, Reversible};
use crate::scaler::Scaler;
use crate::schedule::{Schedule, Step};
#[cfg(feature = "cuda")]
use crate::stats::NotReplayed;
use crate::stats::Stats;
use crate::step::{LinearStage, Scheme};
use crate::trajectory::{Rewind, Trajectory};
use crate::watch::Watch;
use outputs::Outputs;
use times::TimeGradients;

/// A solve step by step over the whole batch: what it kept, and the steps that it took.
pub(crate) struct StepByStep {
    pub(crate) trajectory: Arc<Trajectory>,
    /// Steps whose evaluations were kept.
    pub(crate) linearized: Option<Arc<Linearized>>,
    pub(crate) schedule: Arc<Schedule>,
    /// What took the steps, if they are driven by noise.
    pub(crate) driven: Option<Arc<Driven>>,
}

impl Reversible for StepByStep {
    fn can_rewind(&self) -> bool {
        self.trajectory.can_rewind()
    }

    fn reads_field(&self) -> bool {
        true
    }

    fn step_times(&self) -> Vec<f64> {
        self.schedule.times()
    }

    fn taken_steps(&self) -> Option<(&Trajectory, &Schedule)> {
        Some((&self.trajectory, &self.schedule))
    }

    fn returning(&self, places: &[(usize, f64)]) -> Option<Arc<dyn Reversible>> {
        let Schedule::Recorded(record) = &*self.schedule else {
            return None;
        };
        let schedule = Schedule::Recorded(record.returning(places));
        Some(Arc::new(Self {
            trajectory: Arc::clone(&self.trajectory),
            linearized: None,
            schedule: Arc::new(schedule),
            driven: self.driven.clone(),
        }))
    }

    fn pull_back(&self, back: &Backward<'_>, stats: &mut Stats) -> Result<Adjoint> {
        let problem = back.problem;
        let mut watch = Watch::default();
        if !back.cotangent.device().is_cpu() {
            watch.see(std::slice::from_ref(back.cotangent), || {
                Error::NonFiniteCotangent
            })?;
        }
        let sweep = Sweep {
            scheme: &problem.scheme,
            driven: self.driven.as_deref(),
            schedule: &self.schedule,
            trajectory: &self.trajectory,
            linearized: self.linearized.as_deref(),
            field: back.field,
            theta: back.theta,
            outputs: Outputs {
                packed: back.cotangent,
                packing: &problem.packing,
            },
            times: match back.differentiate_time {
                true => problem.grid.points().len(),
                false => 0,
            },
            scaler: problem.scaler,
            #[cfg(feature = "cuda")]
            graphs: problem.graphs,
        };
        sweep.run(watch, stats)
    }
}

/// A one-step method as a pass over all steps sees it.
pub(crate) trait Method {
    /// y_{n+1} from y_n.
    fn advance(
        &self,
        field: &Field<'_>,
        step: Step,
        y: &[Tensor],
        watch: &mut Watch,
    ) -> Result<Vec<Tensor>>;

    /// How often a step evaluates the field.
    fn evaluations_of(&self, step: &Step) -> usize;

    /// λ_n from λ_{n+1}, cotangents of outputs at node n and inside the step included; what the step adds to θ̄ and
    /// t̄ goes to the sums.
    fn pull_back(
        &self,
        at: &StepBack<'_>,
        adj: &[Tensor],
        sums: &mut Sums,
        stats: &mut Stats,
    ) -> Result<Vec<Tensor>>;

    /// λ_N of everything that a step carries, from that of y.
    fn cotangents_at_end(&self, adj: Vec<Tensor>) -> Result<Vec<Tensor>> {
        Ok(adj)
    }

    /// λ_0 of y0 from that of everything that the first step was given.
    fn cotangents_at_start(&self, adj: Vec<Tensor>) -> Result<Vec<Tensor>> {
        Ok(adj)
    }
}

/// Where a step is pulled back.
pub(crate) struct StepBack<'a> {
    pub(crate) sweep: &'a Sweep<'a>,
    pub(crate) step: Step,
    /// ŷ_n; nothing for a step that is linearised already.
    pub(crate) y: &'a [Tensor],
}

/// What a sweep hands from step to step beside λ.
pub(crate) struct Sums {
    theta: Accumulator,
    times: TimeGradients,
    scaler: Scaler,
    /// k_1 of the step after, which may be the last stage of the step.
    after: Option<Vec<Tensor>>,
}

/// What the sweep needs to know of the solve.
#[derive(Clone, Copy)]
pub(crate) struct Sweep<'a> {
    pub(crate) scheme: &'a Scheme,
    /// What took the steps instead, if they are driven by noise.
    pub(crate) driven: Option<&'a Driven>,
    pub(crate) schedule: &'a Schedule,
    pub(crate) trajectory: &'a Trajectory,
    /// Steps whose evaluations were kept.
    pub(crate) linearized: Option<&'a Linearized>,
    pub(crate) field: &'a Field<'a>,
    /// The tensors that the field reads as parameters.
    pub(crate) theta: &'a [Tensor],
    pub(crate) outputs: Outputs<'a>,
    /// How many times have gradients: all of the user's or none.
    pub(crate) times: usize,
    pub(crate) scaler: Scaler,
    /// Whether steps may be replayed.
    #[cfg(feature = "cuda")]
    pub(crate) graphs: bool,
}

impl Sweep<'_> {
    /// What took the steps.
    fn method(&self) -> &dyn Method {
        match self.driven {
            Some(driven) => driven,
            None => self.scheme,
        }
    }

    /// Pulls the cotangents of the outputs back to y0, θ and t.
    fn run(&self, mut watch: Watch, stats: &mut Stats) -> Result<Adjoint> {
        let schedule = self.schedule;
        let mut adj = self.outputs.at_end(schedule)?;
        if adj.iter().all(|y| y.elem_count() == 0) {
            return self.nothing(&adj);
        }
        #[cfg(feature = "cuda")]
        if self.scheme.device.is_cuda() && self.times == 0 && self.driven.is_none() {
            return self.run_on_device(adj, watch, stats);
        }
        #[cfg(feature = "cuda")]
        if self.graphs && self.scheme.device.is_cuda() {
            stats.not_replayed = Some(NotReplayed::TimeGradients);
        }
        let steps = schedule.len();
        let mut sums = Sums {
            theta: self.accumulator()?,
            times: TimeGradients::new(self.times),
            scaler: self.scaler,
            after: None,
        };
        let method = self.method();
        adj = method.cotangents_at_end(adj)?;
        let mut rewind = None;
        for n in (0..steps).rev() {
            let step = schedule.step(n);
            let replay = |m, y: &Vec<Tensor>| self.replay(m, y, &mut watch, stats);
            let mut held = Stats::default();
            let y = self.state_at(n, &mut rewind, replay, &mut held)?;
            stats.kept(held.states_kept, held.bytes_kept);
            let at = StepBack {
                sweep: self,
                step,
                y: &y,
            };
            adj = method.pull_back(&at, &adj, &mut sums, stats)?;
            watch.see(&adj, || gradient(step))?;
        }
        adj = method.cotangents_at_start(adj)?;
        let Sums { theta, times, .. } = sums;
        let theta = theta.finish()?;
        watch.see(&theta, || Error::NonFiniteParameterGradient)?;
        watch.finish()?;
        if steps == 0 {
            // λ_0 is what was given; the gradient is to be the caller's own.
            let own = adj.iter().map(Tensor::copy);
            adj = own.collect::<candle_core::Result<_>>()?;
        }
        Ok(Adjoint {
            y0: adj,
            theta,
            times: times.finish()?,
        })
    }

    /// The linearised stages of a step: those that the forward pass kept, otherwise evaluated again at ŷ_n.
    fn linearize(
        &self,
        step: Step,
        y: &[Tensor],
        stats: &mut Stats,
    ) -> Result<Vec<Option<LinearStage<'_>>>> {
        if let Some(linear) = self.linearized.and_then(|kept| kept.step(step.index)) {
            return Ok(linear);
        }
        stats.recomputed += self.scheme.evaluations_of(&step);
        self.scheme.linearize(self.field, step, y, self.times > 0)
    }

    /// The first step whose evaluations were kept; those of all later steps were kept, too, and need no ŷ_n.
    fn linear_from(&self) -> usize {
        self.linearized
            .map_or(self.schedule.len(), Linearized::from)
    }

    /// ŷ_n, or nothing for a step whose evaluations were kept.
    fn state_at<'t>(
        &'t self,
        n: usize,
        rewind: &mut Option<Rewind<'t, Vec<Tensor>, Vec<Roles>>>,
        mut replay: impl FnMut(usize, &Vec<Tensor>) -> Result<Vec<Tensor>>,
        held: &mut Stats,
    ) -> Result<Vec<Tensor>> {
        if n >= self.linear_from() {
            return Ok(vec![]);
        }
        let rewind = rewind.get_or_insert_with(|| self.trajectory.rewind_from(n));
        rewind.state(n, &mut replay, held)
    }

    /// θ̄ before the first term.
    fn accumulator(&self) -> Result<Accumulator> {
        Accumulator::new(self.theta, self.scheme.roles[0].state)?
            .compensating(self.scheme.compensated)
    }

    /// The gradients of a state without an element, which nothing depends on.
    fn nothing(&self, last: &[Tensor]) -> Result<Adjoint> {
        let own = last.iter().map(Tensor::zeros_like);
        Ok(Adjoint {
            y0: own.collect::<candle_core::Result<_>>()?,
            theta: Accumulator::new(self.theta, self.scheme.roles[0].state)?.finish()?,
            times: TimeGradients::new(self.times).finish()?,
        })
    }

    /// y_{m+1} from y_m, for a plan that did not keep it.
    fn replay(
        &self,
        m: usize,
        y: &[Tensor],
        watch: &mut Watch,
        stats: &mut Stats,
    ) -> Result<Vec<Tensor>> {
        let step = self.schedule.step(m);
        stats.recomputed += self.method().evaluations_of(&step);
        self.method().advance(self.field, step, y, watch)
    }
}

fn gradient(step: Step) -> Error {
    Error::NonFiniteGradient {
        step: step.index,
        t: step.t,
    }
}
