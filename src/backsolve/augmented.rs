//! The equation that is solved backward, as a field: of (y, λ), or of λ alone where y is interpolated.

use std::cell::RefCell;

use candle_core::Tensor;

use super::forward::ForwardStates;
use crate::error::{Error, Result};
use crate::field::{pullback, Field, VectorField};
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
    /// Whether stages are to have their parts of θ̄' and t̄'.
    wants: [bool; 2],
    work: RefCell<Work>,
}

struct Work {
    scaler: Scaler,
    stats: Stats,
    /// Of the evaluations since they were taken last.
    stages: Vec<Stage>,
}

/// (∂f/∂θ)ᵀ λ and (∂f/∂t)ᵀ λ of one evaluation, still multiplied by S.
#[derive(Clone)]
pub(super) struct Stage {
    pub(super) theta: Vec<Option<Tensor>>,
    pub(super) t: Option<Tensor>,
    /// 1 / S.
    pub(super) unscale: f64,
}

/// One pull-back.
struct Pulled {
    y: Vec<Tensor>,
    stage: Stage,
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
            wants: [
                continuous.kind != Kind::Quadrature,
                back.differentiate_time && continuous.norm.reads_sums(),
            ],
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
        self.wants[1]
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
    pub(super) fn take_stages(&self) -> Vec<Stage> {
        std::mem::take(&mut self.work.borrow_mut().stages)
    }

    /// A step was accepted that ends at t: forward steps behind it are of no use any more.
    pub(super) fn passed(&self, t: f64) {
        let mut work = self.work.borrow_mut();
        work.scaler = work.scaler.after_step();
        if let Some(states) = &self.states {
            states.borrow_mut().release(t);
        }
    }

    /// (∂f/∂θ)ᵀ λ at a time at which y is interpolated.
    pub(super) fn at_point(&self, t: &Time, adj: &[Tensor]) -> Result<Stage> {
        let y = self.interpolated(t)?;
        Ok(self.pull(t, &y, adj, [true, false])?.1.stage)
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

    /// f(t, y) and its pull-back of λ.
    fn pull(
        &self,
        t: &Time,
        y: &Vec<Tensor>,
        adj: &[Tensor],
        wants: [bool; 2],
    ) -> Result<(Vec<Tensor>, Pulled)> {
        let own;
        let time = match (wants[1], t.peek_step()) {
            (true, Some((step, interval))) => {
                let (dtype, device) = t.kind();
                own = Time::differentiable(t.peek(), dtype, &device).within(step, interval);
                &own
            }
            _ => t,
        };
        let (k, pull) = self.field.vjp(time, y)?;
        let mut work = self.work.borrow_mut();
        if work.scaler.is_dynamic() {
            work.scaler = work.scaler.aimed(self.magnitude(adj)?);
        }
        let roles = &self.problem.scheme.roles;
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
            let mut pulled = pull(&v)?;
            let (step, stage) = (t.peek_step().map_or(0, |(step, _)| step), work.stages.len());
            let invalid = |defect| Error::InvalidPullback {
                step,
                stage,
                t: t.peek(),
                defect,
            };
            pullback::check(y, self.theta, &pulled).map_err(invalid)?;
            let round = |(w, roles): (&Tensor, &Roles)| roles.compute.round(w);
            let w = pulled.y.iter().zip(roles).map(round);
            let theta = self.theta.iter().map(|p| pulled.params.remove(p));
            let theta = theta.map(|g| g.filter(|_| wants[0]).map(|g| g.detach()));
            let found = Pulled {
                y: w.collect::<Result<_>>()?,
                stage: Stage {
                    theta: theta.collect(),
                    t: pulled.t.filter(|_| wants[1]).map(|t| t.detach()),
                    unscale: 1.0 / scale,
                },
            };
            pullback::check_rest(self.field, &pulled.params).map_err(invalid)?;
            let outcome = match work.scaler.is_dynamic() {
                true => found.outcome()?,
                false => Outcome::Clean,
            };
            if outcome == Outcome::Clean {
                return Ok((k, found));
            }
            work.scaler = work.scaler.after(outcome);
            work.stats.retries += 1;
            if work.scaler.is_exhausted(attempts) {
                return Err(Error::ScaleExhausted {
                    step,
                    t: t.peek(),
                    scale,
                    attempts,
                });
            }
        }
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
        let roles = &self.problem.scheme.roles;
        let unscale = pulled.stage.unscale;
        let back =
            |(w, roles): (&Tensor, &Roles)| ops::combine(&[(-unscale, w)], 1.0, roles.state());
        let back = pulled.y.iter().zip(roles).map(back);
        let back = back.collect::<Result<Vec<_>>>()?;
        self.work.borrow_mut().stages.push(pulled.stage);
        Ok(match self.carries_y() {
            true => k.into_iter().chain(back).collect(),
            false => back,
        })
    }
}

impl Pulled {
    fn outcome(&self) -> Result<Outcome> {
        let finite = |x: &Tensor| Ok::<_, Error>(ops::magnitude(x)?.is_finite());
        for w in self.y.iter().chain(&self.stage.t) {
            if !finite(w)? {
                return Ok(Outcome::StateOverflow);
            }
        }
        for grad in self.stage.theta.iter().flatten() {
            if !finite(grad)? {
                return Ok(Outcome::ParameterOverflow);
            }
        }
        Ok(Outcome::Clean)
    }
}
