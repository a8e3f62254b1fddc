//! Pull-backs of the field at one evaluation: of cotangents that are scaled so that they are within the range of the
//! compute precision, and with gradients of the parameters at once, later or never.

use candle_core::Tensor;

use super::augmented::Augmented;
use super::stages::{Place, Stage, Theta};
use crate::error::{Error, Result};
use crate::field::{pullback, Cotangents, Field, LatePullback, Pullback};
use crate::ops;
use crate::precision::Roles;
use crate::scaler::Outcome;
use crate::time::Time;

/// What a pull-back is to give beside (∂f/∂y)ᵀ λ.
#[derive(Clone, Copy)]
pub(super) struct Wants {
    pub(super) theta: When,
    pub(super) t: bool,
}

/// When (∂f/∂θ)ᵀ λ is formed.  Later and never are promises of the caller, not of the field: one that cannot form it
/// later does so at once.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum When {
    Now,
    Later,
    Never,
}

/// A pull-back at one evaluation.
pub(super) enum Pull<'a> {
    Whole(Pullback<'a, Vec<Tensor>>),
    Late(LatePullback<'a, Vec<Tensor>>),
}

/// One pull-back.
pub(super) struct Pulled<'a> {
    pub(super) y: Vec<Tensor>,
    pub(super) stage: Stage<'a>,
}

/// f(t, y) and its pull-back, as far as it is wanted.
pub(super) fn linearised<'a>(
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
    let time = match wants.t && t.peek_step().is_some() {
        true => {
            own = t.tracked();
            &own
        }
        false => t,
    };
    let (k, pull) = field.vjp(time, y)?;
    if time.was_shown() {
        t.show();
    }
    Ok((k, Pull::Whole(pull)))
}

impl<'a> Augmented<'a> {
    /// A pull-back of cotangents, scaled so that they are within the range of the compute precision.
    pub(super) fn pull_by(
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
