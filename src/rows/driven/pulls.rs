//! The pull-backs of one step of a tile that is driven by noise.
//!
//! With c the factor of an evaluation, h or √h, and w' = c w, the sweep of a step is, for descending evaluations,
//!
//! v_i = Σ (Σ_φ c_iφ φ) s,  w'_i = (∂k_i/∂y)ᵀ (c v_i),  θ̄ += (∂k_i/∂θ)ᵀ (c v_i)
//!
//! over the sums that read k_i, where s is λ of the next value of a carried state, or w'_j of a later evaluation.

use super::mix::{Mix, Mixed};
use super::noise::{coefficients, functionals};
use super::stepper::{constant, DrivenStepper};
use crate::error::{Error, Result};
use crate::precision::Low;
use crate::rows::lanes::Factor;
use crate::rows::window::{KeptBy, OpenSlot, Window};
use crate::scaler::{Outcome, Scaler};
use crate::schedule::Step;
use crate::simd::{aligned, Aligned, Element};
use crate::stats::Stats;

/// Pulls steps of one tile back; owns the scratch that this needs.
pub(super) struct DrivenPulls<T: Element> {
    /// v_i.
    seeds: Vec<Mix<T>>,
    /// λ_n of each carried state.
    carried: Vec<Mix<T>>,
    /// The step length and the scale that the coefficients of the seeds are for.
    seeded: Option<(f64, f64)>,
    /// w' by evaluation, then λ by carried state, then the cotangent of what is returned at the node.
    xs: Aligned<T>,
    before: Aligned<T>,
    /// Numbers of y, and of all w'.
    size: usize,
    first: usize,
    /// c, its inverse, and what a pull-back is divided by.
    c: Factor<T>,
    inverse: Factor<T>,
    unscale: Factor<T>,
}

impl<T: Element> DrivenPulls<T> {
    pub(super) fn new(stepper: &DrivenStepper<'_, T>) -> Self {
        let (table, size) = (stepper.table(), stepper.size);
        let (evaluations, carried) = (table.evaluations.len(), table.next.len());
        let on = functionals(table);
        let seed = |i: usize| {
            let next = table.next.iter().enumerate();
            let next = next.map(|(q, sum)| (evaluations + q, coefficients(sum, i, &on)));
            let later = table.evaluations.iter().enumerate().skip(i + 1);
            let later = later.map(|(j, e)| (j, coefficients(&e.at, i, &on)));
            Mix::new(next.chain(later))
        };
        let of_state = |r: usize| {
            let at = table.evaluations.iter().enumerate();
            let at = at.map(|(j, e)| (j, constant(e.at.base[r])));
            let returned = [(evaluations + carried, constant(1.0))];
            let returned = returned.into_iter().filter(|_| r == 0);
            // λ last, as y in a step.
            let next = table.next.iter().enumerate();
            let next = next.map(|(q, sum)| (evaluations + q, constant(sum.base[r])));
            let mut mix = Mix::new(at.chain(returned).chain(next));
            mix.multiply(|_| 1.0);
            mix
        };
        Self {
            seeds: (0..evaluations).map(seed).collect(),
            carried: (0..carried).map(of_state).collect(),
            seeded: None,
            xs: aligned((evaluations + carried + 1) * size),
            before: aligned(carried * size),
            size,
            first: evaluations * size,
            c: Factor::new(stepper.batch),
            inverse: Factor::new(stepper.batch),
            unscale: Factor::new(stepper.batch),
        }
    }

    /// λ of all carried states.
    pub(super) fn carried(&self) -> &[T] {
        &self.xs[self.first..][..self.before.len()]
    }

    /// Begins at the end: `seed` fills in λ of y, and the other states have none.
    pub(super) fn begin(&mut self, seed: impl FnOnce(&mut [T])) {
        let carried = &mut self.xs[self.first..][..self.before.len()];
        carried.fill(T::default());
        seed(&mut carried[..self.size]);
    }

    /// λ_0: every state began at y0.
    pub(super) fn at_start(&mut self) -> &[T] {
        let carried = &mut self.xs[self.first..][..self.before.len()];
        let (y, others) = carried.split_at_mut(self.size);
        for other in others.chunks_exact(self.size) {
            for (y, other) in y.iter_mut().zip(other) {
                *y += *other;
            }
        }
        y
    }

    /// w' of all evaluations of a step, with the cotangents left in the windows; the scaler after it.
    pub(super) fn step(
        &mut self,
        stepper: &DrivenStepper<'_, T>,
        step: Step,
        windows: &mut [Window<T>],
        kept: &[KeptBy<'_, T>],
        mut scaler: Scaler,
        stats: &mut Stats,
    ) -> Result<Scaler> {
        for i in (0..self.seeds.len()).rev() {
            let part = stepper.table().evaluations[i].part as usize;
            let (window, kept) = (&mut windows[part], &kept[part]);
            scaler = self.pull(stepper, (step, i), window, kept, scaler, stats)?;
        }
        Ok(scaler.after_step())
    }

    /// λ_n in place of λ_{n+1}; `incoming` fills in the cotangent of what is returned at node n.
    pub(super) fn finish(
        &mut self,
        stepper: &DrivenStepper<'_, T>,
        incoming: impl FnOnce(&mut [T]),
    ) {
        let carried = self.before.len();
        incoming(&mut self.xs[self.first + carried..]);
        let before = self.before.chunks_exact_mut(self.size);
        for (mix, out) in self.carried.iter().zip(before) {
            stepper.on.mix(Mixed {
                mix,
                functionals: &[],
                xs: &self.xs,
                out,
            });
        }
        self.xs[self.first..][..carried].copy_from_slice(&self.before);
    }

    /// w'_i; the scaler after it.
    fn pull(
        &mut self,
        stepper: &DrivenStepper<'_, T>,
        (step, i): (Step, usize),
        window: &mut Window<T>,
        kept: &KeptBy<'_, T>,
        mut scaler: Scaler,
        stats: &mut Stats,
    ) -> Result<Scaler> {
        let (on, size) = (stepper.on, self.size);
        let evaluation = &stepper.table().evaluations[i];
        let field = &stepper.parts[evaluation.part as usize];
        let factor = evaluation.part.scale(step.h);
        let rounds = stepper.plan.low.iter().any(|low| *low != Low::None);
        let place = (step.index, stepper.ordinals[i]);
        let mut attempts = 0;
        loop {
            let scale = scaler.scale();
            stats.vjps += 1;
            if scaler.is_on() {
                stats.used_scale(scale);
            }
            attempts += 1;
            self.seed_for(stepper, step.h, scale, rounds);
            window.scaled_by(&**field, kept, scale);
            let OpenSlot {
                kept: values,
                cotangents,
            } = window.slot(place, kept);
            let v = &mut cotangents[..size];
            // S c v_i, or c Q(S v_i) where compute precision is low.
            on.mix(Mixed {
                mix: &self.seeds[i],
                functionals: stepper.noise.values(),
                xs: &self.xs,
                out: &mut *v,
            });
            if rounds {
                stepper.round(v);
                self.c.set(&[factor]);
                self.c.apply(on, v);
            }
            let w = &mut self.xs[i * size..][..size];
            field.vjp(values, cotangents, w);
            if rounds {
                self.inverse.set(&[1.0 / factor]);
                self.inverse.apply(on, w);
                stepper.round(w);
            }
            if !scaler.is_dynamic() || on.is_finite(w) {
                let left = if rounds { factor } else { 1.0 };
                self.unscale.set(&[left / scale]);
                self.unscale.apply(on, w);
                let has_derivative = || Ok(on.largest(w) != T::default());
                stepper
                    .driven
                    .must_be_additive(evaluation.part, &step, has_derivative)?;
                window.push(&**field, place, kept);
                return Ok(scaler);
            }
            scaler = scaler.after(Outcome::StateOverflow);
            stats.retries += 1;
            if scaler.is_exhausted(attempts) {
                return Err(Error::ScaleExhausted {
                    step: step.index,
                    t: step.t,
                    scale,
                    attempts,
                });
            }
        }
    }

    /// Prepares the coefficients of the seeds for a step length and a scale.
    fn seed_for(&mut self, stepper: &DrivenStepper<'_, T>, h: f64, scale: f64, rounds: bool) {
        if self.seeded == Some((h, scale)) {
            return;
        }
        self.seeded = Some((h, scale));
        let evaluations = stepper.table().evaluations.iter();
        for (seed, evaluation) in self.seeds.iter_mut().zip(evaluations) {
            let factor = if rounds {
                1.0
            } else {
                evaluation.part.scale(h)
            };
            seed.multiply(|_| scale * factor);
        }
    }
}
