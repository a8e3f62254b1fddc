//! The pull-backs of one step of a tile.

use pulp::Simd;

use super::stepper::{combine, is_finite, Stepper};
use super::window::{in_range, power, KeptBy, OpenSlot, Window};
use crate::error::{Error, Result};
use crate::precision::Low;
use crate::scaler::{Outcome, Scaler};
use crate::schedule::Step;
use crate::simd::{vectors, Element, Vectors};
use crate::stats::Stats;

/// The pull-backs of a step.
pub(super) struct StagePulls<T: Element, S: Simd> {
    /// w'_i by stage.
    pub(super) ws: Vectors<T, S>,
    /// a_ji by stage i, for the j > i.
    a: Vec<Vec<(f64, usize)>>,
    /// Every active stage, with coefficient 1.
    pub(super) all: Vec<(f64, usize)>,
}

impl<T: Element, S: Simd> StagePulls<T, S> {
    pub(super) fn new(stepper: &Stepper<'_, T, S>) -> Self {
        let tableau = &stepper.plan.problem.scheme.tableau;
        let column = |i: usize| {
            let later = stepper.stages.iter().filter(|&&j| j > i);
            let terms = later.map(|&j| (tableau.a(j)[i], j));
            terms.filter(|(a, _)| *a != 0.0).collect()
        };
        Self {
            ws: vectors::<T, S>(tableau.stages() * stepper.size),
            a: (0..tableau.stages()).map(column).collect(),
            all: stepper.stages.iter().map(|&j| (1.0, j)).collect(),
        }
    }

    /// w'_i, with the cotangents left in the window; the scaler after it.
    #[allow(clippy::too_many_arguments)]
    #[inline(always)]
    pub(super) fn stage(
        &mut self,
        stepper: &Stepper<'_, T, S>,
        step: Step,
        (i, at): (usize, usize),
        adj: &[T::Vector<S>],
        window: &mut Window<T, S>,
        kept: &KeptBy<'_, T>,
        mut scaler: Scaler,
        stats: &mut Stats,
    ) -> Result<Scaler> {
        let (s, size) = (stepper.s, stepper.size);
        let b = stepper.plan.problem.scheme.tableau.b()[i];
        let rounds = stepper.plan.low.iter().any(|low| *low != Low::None);
        let (m, p) = mantissa(step.h);
        let mut attempts = 0;
        loop {
            let scale = scaler.scale();
            stats.vjps += 1;
            if scaler.is_on() {
                stats.used_scale(scale);
            }
            attempts += 1;
            window.scaled_by(s, stepper.field, kept, scale / p);
            let OpenSlot {
                kept: values,
                cotangents,
            } = window.slot((step.index, at), kept);
            let v = &mut cotangents[..size];
            // S m v_i, or m Q(S v_i) where compute precision is low.
            let factor = if rounds { scale } else { scale * m };
            combine::<T, S>(s, v, (factor * b, adj), factor, &self.a[i], &self.ws);
            if rounds {
                stepper.round(v);
                scale_by::<T, S>(s, v, m);
            }
            let w = &mut self.ws[i * size..][..size];
            stepper.field.vjp(s, values, cotangents, w);
            if rounds {
                scale_by::<T, S>(s, w, 1.0 / m);
                stepper.round(w);
            }
            let outcome = match scaler.is_dynamic() && !is_finite::<T, S>(s, w) {
                true => Outcome::StateOverflow,
                false => Outcome::Clean,
            };
            if outcome == Outcome::Clean {
                let unscale = if rounds { step.h / scale } else { p / scale };
                if unscale != 1.0 {
                    scale_by::<T, S>(s, w, unscale);
                }
                window.push(s, stepper.field, (step.index, at), kept);
                return Ok(scaler);
            }
            scaler = scaler.after(outcome);
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
}

#[inline(always)]
fn scale_by<T: Element, S: Simd>(s: S, x: &mut [T::Vector<S>], c: f64) {
    let (a, b) = in_range::<T>(c);
    let a = T::splat(s, T::of(a));
    for x in &mut *x {
        *x = T::times(s, *x, a);
    }
    if b != 1.0 {
        let b = T::splat(s, T::of(b));
        for x in x {
            *x = T::times(s, *x, b);
        }
    }
}

/// h as m p, p a power of two, which is one where h is neither very small nor very large.
fn mantissa(h: f64) -> (f64, f64) {
    const MODERATE: f64 = (1 << 24) as f64;
    if (1.0 / MODERATE..=MODERATE).contains(&h.abs()) {
        return (h, 1.0);
    }
    let p = power(h);
    (h / p, p)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_are_cut_exactly_and_stay_whole_where_they_are_moderate() {
        for h in [1.0, -0.1, 1e-7, 6.1e-8, -1e7] {
            assert_eq!(mantissa(h), (h, 1.0));
        }
        for h in [
            1e-8,
            -1e-20,
            1e-39,
            1e-300,
            f64::MIN_POSITIVE,
            5e-324,
            1e9,
            -1e308,
        ] {
            let (m, p) = mantissa(h);
            assert_eq!(m * p, h);
            assert!(m.abs() < 2.0);
            assert_eq!(p.log2().fract(), 0.0);
        }
    }

    #[test]
    fn factors_that_f32_does_not_hold_are_products_of_two_that_it_holds() {
        for c in [0.0, 1.0, -0.3, 1e-37, 1e38] {
            assert_eq!(in_range::<f32>(c), (c, 1.0));
        }
        for c in [1e-39, -1e-60, 1e39, 1e60] {
            let (a, b) = in_range::<f32>(c);
            assert_eq!(a * b, c);
            for factor in [a, b] {
                assert!((f32::MIN_POSITIVE..=f32::MAX).contains(&(factor.abs() as f32)));
            }
            assert_eq!(in_range::<f64>(c), (c, 1.0));
        }
    }
}
