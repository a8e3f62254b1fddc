//! The equation that is solved backward, as a field: of (y, λ), or of λ alone where y is interpolated.

use std::cell::RefCell;

use candle_core::Tensor;

use super::forward::ForwardStates;
use super::pullback::{linearised, Pull, Pulled, Wants, When};
use super::stages::Stage;
use crate::error::{Error, Result};
use crate::field::{Field, VectorField};
use crate::gradient::{Continuous, Kind};
use crate::ops;
use crate::precision::Roles;
use crate::problem::Problem;
use crate::reverse::Backward;
use crate::scaler::Scaler;
use crate::stats::Stats;
use crate::time::Time;

/// (f, −(∂f/∂y)ᵀ λ), or −(∂f/∂y)ᵀ λ alone.
pub(super) struct Augmented<'a> {
    pub(super) problem: &'a Problem,
    pub(super) field: &'a Field<'a>,
    pub(super) theta: &'a [Tensor],
    states: Option<RefCell<ForwardStates<'a>>>,
    wants: Wants,
    pub(super) work: RefCell<Work<'a>>,
}

/// What changes while it is evaluated.
pub(super) struct Work<'a> {
    pub(super) scaler: Scaler,
    pub(super) stats: Stats,
    /// Of the evaluations since they were taken last.
    pub(super) stages: Vec<Stage<'a>>,
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
                    _ if continuous.reads_sums() => When::Now,
                    _ if back.problem.scaler.is_dynamic() => When::Now,
                    _ => When::Later,
                },
                t: back.differentiate_time && continuous.reads_sums(),
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
