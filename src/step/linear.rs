//! Linearised steps: those that the backward pass forms, and those of the forward pass that are kept for it.

use candle_core::Tensor;

use super::{Scheme, Taken};
use crate::error::Result;
use crate::field::{Field, KeptPullback, Pullback};
use crate::memory::held;
use crate::schedule::Step;
use crate::time::Time;
use crate::watch::Watch;

/// A stage linearised: its velocity and its pull-back.
pub(crate) struct LinearStage<'f> {
    /// Time of the stage.
    pub(crate) t: f64,
    /// The velocity.  A stage that was kept has it only if gradients of times are wanted.
    pub(crate) k: Vec<Tensor>,
    pub(crate) pull: Pullback<'f, Vec<Tensor>>,
}

/// A stage of the forward pass whose pull-back is kept for the backward pass.
pub(crate) struct KeptStage {
    /// Time of the stage.
    t: f64,
    /// The velocity, if gradients of times are wanted; otherwise nothing.
    k: Vec<Tensor>,
    pull: KeptPullback,
    /// Of the tensors that it holds.
    pub(crate) bytes: usize,
}

impl KeptStage {
    /// The stage as the backward pass would linearise it.
    pub(crate) fn linear(&self) -> LinearStage<'_> {
        LinearStage {
            t: self.t,
            k: self.k.clone(),
            pull: Box::new(&*self.pull),
        }
    }
}

/// The stages of a step, `None` where one was not evaluated.
pub(crate) type KeptStep = Vec<Option<KeptStage>>;

impl Scheme {
    /// The stages of the step from y, each with its pull-back; `None` where a stage is not needed.
    pub(crate) fn linearize<'f>(
        &self,
        field: &'f Field<'_>,
        step: Step,
        y: &[Tensor],
        differentiate_time: bool,
    ) -> Result<Vec<Option<LinearStage<'f>>>> {
        let mut ks = vec![];
        let at = |t: &Time, y: &Vec<Tensor>| Ok(Some(field.vjp(t, y)?));
        let stages = (self.active(&step), differentiate_time);
        let pulls = self.each_stage(step, (y, &mut ks), stages, at, |_, _| Ok(()))?;
        let times = self.tableau.c().iter().map(|c| step.at(*c));
        let linear = times.zip(ks).zip(pulls.unwrap_or_default());
        let linear = linear.map(|((t, k), pull)| {
            let (k, pull) = k.zip(pull)?;
            Some(LinearStage { t, k, pull })
        });
        Ok(linear.collect())
    }

    /// y_{n+1} and the stages with their pull-backs, of a field whose pull-backs can be kept; otherwise `None`, before
    /// anything is evaluated: the answer of a field does not depend on t and y.
    pub(crate) fn advance_and_linearize(
        &self,
        field: &Field<'_>,
        step: Step,
        y: &[Tensor],
        differentiate_time: bool,
        watch: &mut Watch,
    ) -> Result<Option<(Taken, KeptStep)>> {
        let mut ks = vec![];
        let at = |t: &Time, y: &Vec<Tensor>| {
            let Some((k, pull, bytes)) = field.vjp_kept(t, y)? else {
                return Ok(None);
            };
            self.check_time(step, t)?;
            Ok(Some((k, (pull, bytes))))
        };
        let state = &y[..self.roles.len()];
        let stages = (self.active(&step), differentiate_time);
        let see = |i: usize, k: &[Tensor]| watch.see(k, || self.bad_velocity(step, i));
        let Some(pulls) = self.each_stage(step, (state, &mut ks), stages, at, see)? else {
            return Ok(None);
        };
        let times = self.tableau.c().iter().map(|c| step.at(*c));
        let kept = times.zip(&ks).zip(pulls).map(|((t, k), pull)| {
            let (k, (pull, bytes)) = k.as_ref().zip(pull)?;
            // Only gradients of times read k.
            let k = if differentiate_time {
                k.clone()
            } else {
                vec![]
            };
            let bytes = bytes + held(&k, []);
            Some(KeptStage { t, k, pull, bytes })
        });
        let kept = kept.collect();
        Ok(Some((self.taken(step, y, ks, false, watch)?, kept)))
    }
}
