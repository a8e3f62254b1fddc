//! A step of the forward pass that keeps the graphs of its stages for the backward pass.

use candle_core::Tensor;

use super::{bad_solution, located, Increments, LinearStage, Scheme, Taken};
use crate::error::Result;
use crate::field::{Field, KeptPullback};
use crate::schedule::Step;
use crate::watch::Watch;

/// A stage of the forward pass with its graph, which is kept for the backward pass.
pub(crate) struct KeptStage {
    /// Time of the stage.
    t: f64,
    k: Vec<Tensor>,
    pull: KeptPullback,
    /// Of the tensors in the graph.
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
    /// y_{n+1} and the graphs of the stages, of a field whose graphs can be kept; otherwise `None`, before anything is
    /// evaluated: the answer of a field does not depend on t and y.
    pub(crate) fn advance_and_linearize(
        &self,
        field: &Field<'_>,
        step: Step,
        y: &[Tensor],
        differentiate_time: bool,
        watch: &mut Watch,
    ) -> Result<Option<(Taken, KeptStep)>> {
        let (mut linear, mut ks): (KeptStep, Increments) = (vec![], vec![]);
        let state = &y[..self.roles.len()];
        for (i, &active) in self.active(&step).iter().enumerate() {
            if !active {
                linear.push(None);
                ks.push(None);
                continue;
            }
            let t = step.at(self.tableau.c()[i]);
            let stage = self.stage(i, step.h, state, &ks)?;
            let time = self.time(i, step, differentiate_time)?;
            let kept = field.vjp_kept(&time, &stage);
            let Some((k, pull, bytes)) = kept.map_err(|e| located(e.into(), step, i, t))? else {
                return Ok(None);
            };
            self.check_time(step, &time)?;
            self.check(&stage, &k)?;
            let k = self.rounded(&k)?;
            watch.see(&k, || self.bad_velocity(step, i))?;
            ks.push(Some(k.clone()));
            linear.push(Some(KeptStage { t, k, pull, bytes }));
        }
        let y = self.update(step.h, y, &ks)?;
        watch.see(&y, || bad_solution(step))?;
        let stored = None;
        Ok(Some((Taken { y, stored, ks }, linear)))
    }
}
