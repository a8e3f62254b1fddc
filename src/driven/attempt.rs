//! A step that is tried: what it carries at its end, and the estimate of its error.

use candle_core::Tensor;

use super::{Driven, Embedded, Evaluated, Evaluation, StepNoise};
use crate::error::Result;
use crate::field::Field;
use crate::schedule::Step;
use crate::time::Time;

/// What an attempt came to.
pub(crate) struct Attempted {
    /// What the step carries at its end.
    pub(crate) next: Vec<Tensor>,
    /// By tensor of y.
    pub(crate) error: Vec<Tensor>,
}

impl Embedded {
    /// The coefficients of the difference, of which the noise floor is made.
    pub(crate) fn weights(&self) -> Vec<f64> {
        self.error.terms.iter().map(|term| term.c).collect()
    }
}

impl Driven {
    /// The second solution of the method, which adaptive steps have.
    pub(crate) fn embedded(&self) -> Option<&'static Embedded> {
        self.table().embedded
    }

    /// The evaluations that a step from y begins with; no noise enters them, and all attempts share them.
    pub(crate) fn start(
        &self,
        field: &Field<'_>,
        step: Step,
        y: &[Tensor],
    ) -> Result<Vec<Evaluated<()>>> {
        let all = self.table().evaluations.iter();
        let at_start = all.take_while(|e| e.c == 0.0 && e.at.terms.is_empty());
        let mut done = vec![];
        let at_start: Vec<_> = at_start.collect();
        self.evaluate_all(
            field,
            &at_start,
            (step, &mut self.noise(step)),
            y,
            &mut done,
        )?;
        Ok(done)
    }

    /// A step from y, with the evaluations that it begins with; the same bits as [`advance`](Self::advance).
    pub(crate) fn attempt(
        &self,
        field: &Field<'_>,
        step: Step,
        y: &[Tensor],
        start: &[Evaluated<()>],
    ) -> Result<Attempted> {
        let embedded = self.embedded();
        let more = embedded.map_or(&[][..], |embedded| embedded.evaluations);
        let all: Vec<_> = self.table().evaluations.iter().chain(more).collect();
        let mut done = start.to_vec();
        let (mut noise, roles) = (self.noise(step), |leaf: usize| self.roles[leaf].state());
        self.evaluate_all(field, &all, (step, &mut noise), y, &mut done)?;
        let mut next = vec![];
        for sum in self.table().next {
            next.extend(self.sum(sum, step, y, &done, &mut noise, roles)?);
        }
        let error = match embedded {
            Some(embedded) => self.sum(&embedded.error, step, y, &done, &mut noise, roles)?,
            None => vec![],
        };
        Ok(Attempted { next, error })
    }

    fn evaluate_all(
        &self,
        field: &Field<'_>,
        all: &[&Evaluation],
        (step, noise): (Step, &mut StepNoise<'_>),
        y: &[Tensor],
        done: &mut Vec<Evaluated<()>>,
    ) -> Result<()> {
        let parts = self.parts(field)?;
        self.evaluate_rest(all, step, y, noise, None, done, |part, t: &Time, at| {
            Ok((parts[part as usize].velocity(t, at)?, ()))
        })
    }
}
