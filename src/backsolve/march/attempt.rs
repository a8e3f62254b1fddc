//! Attempts of adaptive backward steps: the first stage with its noise floor, the length to begin with, and the error.

use candle_core::Tensor;

use super::super::measure::Floor;
use super::super::stages::{Stage, Stages};
use super::March;
use crate::adaptive::Control;
use crate::error::{Error, Result};
use crate::ops;
use crate::schedule::Step;

/// An attempt that was made: what it leads to, and its error with the noise floor and without.
pub(super) struct Tried<'a> {
    pub(super) x: Vec<Tensor>,
    pub(super) stages: Stages<'a>,
    pub(super) norms: [f64; 2],
}

impl<'a> March<'_, 'a> {
    /// Evaluates the first stage of steps of about this length.
    pub(super) fn start_anew(
        &mut self,
        control: &Control,
        t: f64,
        h: Option<f64>,
    ) -> Result<Floor> {
        // No attempt goes on beyond what the field is told here.
        let h = h.unwrap_or_else(|| control.longest());
        let h = control.direction * h.min(control.room(t));
        let step = self.between(Step::free(self.counts.steps, t, h, t + h));
        let mut stages = Stages::default();
        self.evaluate(step, &mut stages, &[true])?;
        self.first = stages.first();
        for k in self.first.iter().flat_map(|(k, _)| k) {
            if !ops::magnitude(k)?.is_finite() {
                let step = self.counts.steps;
                return Err(Error::NonFiniteGradient { step, t });
            }
        }
        self.floor()
    }

    pub(super) fn floor(&self) -> Result<Floor> {
        let (Some((adaptive, measure)), Some((k, stage))) = (&self.adaptive, &self.first) else {
            return Ok(None);
        };
        match measure.reads_sums() && adaptive.noise_floor {
            true => {
                let (x, k) = (
                    self.extended(&self.x, None)?,
                    self.extended(k, Some(stage))?,
                );
                measure.floor(&x, &k)
            }
            false => measure.floor(&self.x, k),
        }
    }

    /// The length of the first attempt.
    pub(super) fn first_length(&mut self, control: &Control) -> Result<f64> {
        let (Some((_, measure)), Some((k, stage))) = (&self.adaptive, &self.first) else {
            return Ok(control.longest());
        };
        let all = measure.begins_with_sums();
        let extended = |x: &[Tensor], sums: Option<&Stage<'_>>| match all {
            true => self.extended(x, sums),
            false => Ok(x.to_vec()),
        };
        let y = extended(&self.x, None)?;
        let first = extended(k, Some(stage))?;
        let probe = |h: f64| {
            let step = self.between(Step::free(0, control.start, h, control.start + h));
            let further = self.scheme.after_euler(self.augmented, step, &self.x, k)?;
            let stage = self.augmented.take_stages().pop();
            extended(&further, stage.as_ref())
        };
        let h = measure.first_length(control, &y, &first, probe)?;
        self.counts.evaluations += 1;
        Ok(h)
    }

    /// Velocities, or zeros of a state, with those of θ̄ and t̄ behind them.
    fn extended(&self, x: &[Tensor], stage: Option<&Stage<'_>>) -> Result<Vec<Tensor>> {
        let mut all = x.to_vec();
        let state = self.scheme.roles[0].state();
        for (i, p) in self.augmented.theta.iter().enumerate() {
            all.push(match stage.and_then(|s| Some((s.unscale, s.known(i)?))) {
                Some((unscale, grad)) => ops::combine(&[(-unscale, grad)], 1.0, state)?,
                None => Tensor::zeros(p.shape(), state.to, p.device())?,
            });
        }
        if self.augmented.reads_time() {
            let t = stage.map_or(Ok(0.0), Stage::slope_of_time)?;
            all.push(self.number(t)?);
        }
        Ok(all)
    }

    /// All stages but one that was appended, what they lead to, and its error.
    pub(super) fn attempt(
        &mut self,
        control: &Control,
        step: Step,
        floor: &Floor,
    ) -> Result<Tried<'a>> {
        let mut stages = Stages::after(self.first.as_ref());
        let count = self.scheme.tableau.stages() - usize::from(control.appended);
        self.evaluate(step, &mut stages, &vec![true; count])?;
        let x = self.scheme.update(step.h, &self.x, &stages.ks)?;
        let mut error = self
            .scheme
            .weighted(step.h, &control.estimate, &stages.ks)?;
        let mut ends = [self.x.clone(), x.clone()];
        let Some((_, measure)) = &self.adaptive else {
            return Err(Error::NothingKept);
        };
        if measure.reads_sums() {
            let state = self.scheme.roles[0].state();
            let before = self.theta.so_far()?.to_vec();
            for (i, before) in before.into_iter().enumerate() {
                let change = |weights: &[f64]| stages.change(step.h, weights, i, &before, state);
                error.push(change(&control.estimate)?);
                let change = change(self.scheme.tableau.b())?;
                ends[1].push((&before + change)?);
                ends[0].push(before);
            }
            if self.augmented.reads_time() {
                error.push(self.number(stages.time_change(step.h, &control.estimate)?)?);
                let change = stages.time_change(step.h, self.scheme.tableau.b())?;
                ends[0].push(self.number(self.time)?);
                ends[1].push(self.number(self.time + change)?);
            }
        }
        let norms = measure.norms(&error, [&ends[0], &ends[1]], floor, step.h)?;
        Ok(Tried { x, stages, norms })
    }

    /// A number in state precision on the device.
    fn number(&self, x: f64) -> Result<Tensor> {
        let (state, device) = (self.scheme.roles[0].state, &self.scheme.device);
        Ok(Tensor::new(x, device)?.to_dtype(state)?)
    }
}
