//! The equation that is solved backward, as a field: of (y, λ), or of λ alone where y is interpolated.

use std::cell::RefCell;

use candle_core::Tensor;

use super::forward::ForwardStates;
use crate::error::{Error, PullbackDefect, Result};
use crate::field::{
    pullback, Cotangents, Field, LateGradients, LatePullback, Pullback, VectorField,
};
use crate::gradient::{Continuous, Kind};
use crate::ops;
use crate::precision::Roles;
use crate::problem::Problem;
use crate::reverse::Backward;
use crate::scaler::{Outcome, Scaler};
use crate::stats::Stats;
use crate::time::Time;

/// (f, −(∂f/∂y)ᵀ λ), or −(∂f/∂y)ᵀ λ alone.
pub(super) struct Augmented<'a> {
    pub(super) problem: &'a Problem,
    field: &'a Field<'a>,
    pub(super) theta: &'a [Tensor],
    states: Option<RefCell<ForwardStates<'a>>>,
    wants: Wants,
    work: RefCell<Work<'a>>,
}

/// What a pull-back is to give beside (∂f/∂y)ᵀ λ.
#[derive(Clone, Copy)]
struct Wants {
    theta: When,
    t: bool,
}

/// When (∂f/∂θ)ᵀ λ is formed.  Later and never are promises of the caller, not of the field: one that cannot form it
/// later does so at once.
#[derive(Clone, Copy, PartialEq)]
enum When {
    Now,
    Later,
    Never,
}

struct Work<'a> {
    scaler: Scaler,
    stats: Stats,
    /// Of the evaluations since they were taken last.
    stages: Vec<Stage<'a>>,
}

/// (∂f/∂θ)ᵀ λ and (∂f/∂t)ᵀ λ of one evaluation, still multiplied by S.
#[derive(Clone)]
pub(super) struct Stage<'a> {
    pub(super) theta: Theta<'a>,
    pub(super) t: Option<Tensor>,
    /// 1 / S.
    pub(super) unscale: f64,
    /// Where it was evaluated.
    at: Place,
}

/// (∂f/∂θ)ᵀ λ by parameter, or how it is formed.
#[derive(Clone)]
pub(super) enum Theta<'a> {
    Known(Vec<Option<Tensor>>),
    Later(LateGradients<'a>),
}

/// A stage of a step.
#[derive(Clone, Copy)]
struct Place {
    step: usize,
    stage: usize,
    t: f64,
}

/// One pull-back.
struct Pulled<'a> {
    y: Vec<Tensor>,
    stage: Stage<'a>,
}

impl<'a> Augmented<'a> {
    pub(super) fn new(
        back: &Backward<'a>,
        states: Option<ForwardStates<'a>>,
        continuous: &Continuous,
    ) -> Self {
        Self {
            problem: back.problem,
            field: back.field,
            theta: back.theta,
            states: states.map(RefCell::new),
            wants: Wants {
                theta: match continuous.kind {
                    Kind::Quadrature => When::Never,
                    // Their error is estimated, or they are looked at for overflow.
                    _ if continuous.norm.reads_sums() => When::Now,
                    _ if back.problem.scaler.is_dynamic() => When::Now,
                    _ => When::Later,
                },
                t: back.differentiate_time && continuous.norm.reads_sums(),
            },
            work: RefCell::new(Work {
                scaler: back.problem.scaler,
                stats: Stats::default(),
                stages: vec![],
            }),
        }
    }

    /// Whether y is part of what is solved.
    pub(super) fn carries_y(&self) -> bool {
        self.states.is_none()
    }

    /// Whether t̄ is to be integrated.
    pub(super) fn reads_time(&self) -> bool {
        self.wants.t
    }

    /// Roles of what is solved.  λ is rounded here, where it is scaled, and not by the scheme.
    pub(super) fn roles(&self) -> Vec<Roles> {
        let of_y = &self.problem.scheme.roles;
        let of_adjoint = of_y.iter().map(|roles| Roles {
            compute: roles.state(),
            store: roles.state(),
            ..*roles
        });
        match self.carries_y() {
            true => of_y.iter().copied().chain(of_adjoint).collect(),
            false => of_adjoint.collect(),
        }
    }

    /// Times at which the field jumps.
    pub(super) fn jumps(&self) -> Vec<f64> {
        self.field.jumps()
    }

    /// What the evaluations since the last call have left.
    pub(super) fn take_stages(&self) -> Vec<Stage<'a>> {
        std::mem::take(&mut self.work.borrow_mut().stages)
    }

    /// A step was accepted that ends at t.
    pub(super) fn passed(&self, t: f64) {
        let mut work = self.work.borrow_mut();
        work.scaler = work.scaler.after_step();
        self.begin_at(t);
    }

    /// The solve goes on from t: forward steps behind it are of no use any more.
    pub(super) fn begin_at(&self, t: f64) {
        if let Some(states) = &self.states {
            states.borrow_mut().release(t);
        }
    }

    /// (∂f/∂θ)ᵀ λ at a time at which y is interpolated.
    pub(super) fn at_point(&self, t: &Time, adj: &[Tensor]) -> Result<Stage<'a>> {
        let y = self.interpolated(t)?;
        let wants = Wants {
            theta: When::Now,
            t: false,
        };
        Ok(self.pull(t, &y, adj, wants)?.1.stage)
    }

    /// (∂f/∂θ)ᵀ λ of a stage by parameter.
    pub(super) fn theta_of(&self, stage: &Stage<'_>) -> Result<Vec<Option<Tensor>>> {
        match &stage.theta {
            Theta::Known(grads) => Ok(grads.clone()),
            Theta::Later(form) => {
                let invalid = |defect| stage.at.invalid(defect);
                let mut params = form()?;
                pullback::check_parameters(self.theta, &params).map_err(invalid)?;
                let grads = self.theta.iter().map(|p| params.remove(p));
                let grads = grads.map(|grad| grad.map(|grad| grad.detach())).collect();
                pullback::check_rest(self.field, &params).map_err(invalid)?;
                Ok(grads)
            }
        }
    }

    pub(super) fn count(&self, stats: &mut Stats) {
        stats.add(&self.work.borrow().stats);
        if let Some(states) = &self.states {
            stats.add(&states.borrow().stats);
        }
    }

    /// y(t) between the forward steps, in compute precision.
    fn interpolated(&self, t: &Time) -> Result<Vec<Tensor>> {
        let states = self.states.as_ref().ok_or(Error::NothingKept)?;
        let y = states.borrow_mut().at(t.peek())?;
        let roles = &self.problem.scheme.roles;
        let rounded = y.iter().zip(roles).map(|(y, roles)| roles.compute.round(y));
        rounded.collect()
    }

    /// A part of an equation at (t, y), and its pull-back as far as stages want it.
    pub(super) fn linearised(
        &self,
        part: &'a Field<'a>,
        t: &Time,
        y: &Vec<Tensor>,
    ) -> Result<(Vec<Tensor>, Pull<'a>)> {
        linearised(part, t, y, self.wants)
    }

    /// What a pull-back makes of cotangents: for the state without S, and its part of θ̄.
    pub(super) fn pulled(
        &self,
        pull: &Pull<'a>,
        t: &Time,
        y: &[Tensor],
        seeds: &[Tensor],
    ) -> Result<(Vec<Tensor>, Stage<'a>)> {
        let pulled = self.pull_by(pull, t, y, seeds, self.wants)?;
        Ok((self.unscaled(&pulled, 1.0)?, pulled.stage))
    }

    /// c (∂f/∂y)ᵀ λ, in state precision.
    fn unscaled(&self, pulled: &Pulled<'a>, c: f64) -> Result<Vec<Tensor>> {
        let c = c * pulled.stage.unscale;
        let unscaled = |(w, roles): (&Tensor, &Roles)| ops::combine(&[(c, w)], 1.0, roles.state());
        let roles = &self.problem.scheme.roles;
        pulled.y.iter().zip(roles).map(unscaled).collect()
    }

    /// f(t, y) and its pull-back of λ.
    fn pull(
        &self,
        t: &Time,
        y: &Vec<Tensor>,
        adj: &[Tensor],
        wants: Wants,
    ) -> Result<(Vec<Tensor>, Pulled<'a>)> {
        let (k, pull) = linearised(self.field, t, y, wants)?;
        Ok((k, self.pull_by(&pull, t, y, adj, wants)?))
    }

    /// A pull-back of cotangents, scaled so that they are within the range of the compute precision.
    fn pull_by(
        &self,
        pull: &Pull<'a>,
        t: &Time,
        y: &[Tensor],
        adj: &[Tensor],
        wants: Wants,
    ) -> Result<Pulled<'a>> {
        let mut work = self.work.borrow_mut();
        if work.scaler.is_dynamic() {
            work.scaler = work.scaler.aimed(self.magnitude(adj)?);
        }
        let roles = &self.problem.scheme.roles;
        let at = Place {
            step: t.peek_step().map_or(0, |(step, _)| step),
            stage: work.stages.len(),
            t: t.peek(),
        };
        let mut attempts = 0;
        loop {
            let scale = work.scaler.scale();
            let round =
                |(adj, roles): (&Tensor, &Roles)| ops::combine(&[(1.0, adj)], scale, roles.compute);
            let v = adj.iter().zip(roles).map(round);
            let v = v.collect::<Result<Vec<_>>>()?;
            work.stats.vjps += 1;
            if work.scaler.is_on() {
                work.stats.used_scale_at(t.peek(), scale);
            }
            attempts += 1;
            let (w, theta, of_time) = self.found(pull, &v, y, wants, at)?;
            let round = |(w, roles): (&Tensor, &Roles)| roles.compute.round(w);
            let w = w.iter().zip(roles).map(round);
            let found = Pulled {
                y: w.collect::<Result<_>>()?,
                stage: Stage {
                    theta,
                    t: of_time,
                    unscale: 1.0 / scale,
                    at,
                },
            };
            let outcome = match work.scaler.is_dynamic() {
                true => found.outcome()?,
                false => Outcome::Clean,
            };
            if outcome == Outcome::Clean {
                return Ok(found);
            }
            work.scaler = work.scaler.after(outcome);
            work.stats.retries += 1;
            if work.scaler.is_exhausted(attempts) {
                let Place { step, t, .. } = at;
                return Err(Error::ScaleExhausted {
                    step,
                    t,
                    scale,
                    attempts,
                });
            }
        }
    }

    /// What a pull-back returns for v, checked.
    #[allow(clippy::type_complexity)]
    fn found(
        &self,
        pull: &Pull<'a>,
        v: &Vec<Tensor>,
        y: &[Tensor],
        wants: Wants,
        at: Place,
    ) -> Result<(Vec<Tensor>, Theta<'a>, Option<Tensor>)> {
        let invalid = |defect| at.invalid(defect);
        let mut pulled = match pull {
            Pull::Whole(pull) => pull(v)?,
            Pull::Late(pull) => {
                let (w, later) = pull(v)?;
                let alone = Cotangents::of_state(w);
                pullback::check(y, &[], &alone).map_err(invalid)?;
                let theta = match wants.theta {
                    When::Never => Theta::Known(vec![None; self.theta.len()]),
                    _ => Theta::Later(later),
                };
                return Ok((alone.y, theta, None));
            }
        };
        pullback::check(y, self.theta, &pulled).map_err(invalid)?;
        let theta = self.theta.iter().map(|p| pulled.params.remove(p));
        let wanted = wants.theta != When::Never;
        let theta = theta.map(|g| g.filter(|_| wanted).map(|g| g.detach()));
        let theta = Theta::Known(theta.collect());
        pullback::check_rest(self.field, &pulled.params).map_err(invalid)?;
        let t = pulled.t.filter(|_| wants.t).map(|t| t.detach());
        Ok((pulled.y, theta, t))
    }

    /// max|λ| over the tensors whose cotangents can overflow; over all while it is zero.
    fn magnitude(&self, adj: &[Tensor]) -> Result<f64> {
        let roles = &self.problem.scheme.roles;
        let over = |looked_at: fn(&Roles) -> bool| {
            let leaves = adj.iter().zip(roles).filter(|(_, roles)| looked_at(roles));
            let mut sizes = leaves.map(|(adj, _)| ops::magnitude(adj));
            sizes.try_fold(0.0, |max, size| Ok::<_, Error>(f64::max(max, size?)))
        };
        match over(Roles::needs_scaling)? {
            0.0 => over(|_| true),
            max => Ok(max),
        }
    }
}

impl VectorField<Vec<Tensor>> for Augmented<'_> {
    fn velocity(&self, t: &Time, x: &Vec<Tensor>) -> candle_core::Result<Vec<Tensor>> {
        let leaves = self.problem.scheme.roles.len();
        let (y, adj) = match self.carries_y() {
            true => (x[..leaves].to_vec(), &x[leaves..]),
            false => (self.interpolated(t)?, x.as_slice()),
        };
        let (k, pulled) = self.pull(t, &y, adj, self.wants)?;
        let back = self.unscaled(&pulled, -1.0)?;
        self.work.borrow_mut().stages.push(pulled.stage);
        Ok(match self.carries_y() {
            true => k.into_iter().chain(back).collect(),
            false => back,
        })
    }
}

/// f(t, y) and its pull-back, as far as it is wanted.
fn linearised<'a>(
    field: &'a Field<'a>,
    t: &Time,
    y: &Vec<Tensor>,
    wants: Wants,
) -> Result<(Vec<Tensor>, Pull<'a>)> {
    if wants.theta != When::Now && !wants.t {
        if let Some((k, pull)) = field.vjp_late(t, y)? {
            return Ok((k, Pull::Late(pull)));
        }
    }
    let own;
    let time = match (wants.t, t.peek_step()) {
        (true, Some((step, interval))) => {
            let (dtype, device) = t.kind();
            own = Time::differentiable(t.peek(), dtype, &device).within(step, interval);
            &own
        }
        _ => t,
    };
    let (k, pull) = field.vjp(time, y)?;
    Ok((k, Pull::Whole(pull)))
}

/// A pull-back at one evaluation.
pub(super) enum Pull<'a> {
    Whole(Pullback<'a, Vec<Tensor>>),
    Late(LatePullback<'a, Vec<Tensor>>),
}

impl Place {
    fn invalid(self, defect: PullbackDefect) -> Error {
        let Self { step, stage, t } = self;
        Error::InvalidPullback {
            step,
            stage,
            t,
            defect,
        }
    }
}

impl Pulled<'_> {
    fn outcome(&self) -> Result<Outcome> {
        let finite = |x: &Tensor| Ok::<_, Error>(ops::magnitude(x)?.is_finite());
        for w in self.y.iter().chain(&self.stage.t) {
            if !finite(w)? {
                return Ok(Outcome::StateOverflow);
            }
        }
        if let Theta::Known(grads) = &self.stage.theta {
            for grad in grads.iter().flatten() {
                if !finite(grad)? {
                    return Ok(Outcome::ParameterOverflow);
                }
            }
        }
        Ok(Outcome::Clean)
    }
}
