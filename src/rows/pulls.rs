//! The pull-backs of one step of a tile.
//!
//! With w' = h w the sweep of a step is, for descending stages,
//!
//! v_i = b_i λ + Σ_m b_i(x_m) ȳ_m + Σ_{j>i} a_ji w'_j,  w'_i = (∂f/∂y)ᵀ (h v_i),  θ̄ += (∂f/∂θ)ᵀ (h v_i),
//! λ ← λ + Σ_m ȳ_m + Σ_i w'_i + ȳ_n,
//!
//! where ȳ_m are the cotangents of outputs at fractions x_m of the step, and h may differ from lane to lane.  So the
//! contribution of a step to θ̄ needs no further factor, and a window may span several steps.  A very
//! small or very large h is factored as m p, where p is a power of two: v_i is multiplied by m only, so that it
//! stays in the range of f32, and p is part of the scale of the window and of w'_i.
//!
//! With compensated sums λ carries what rounding has taken from it, as y does in the forward pass.

use super::lanes::{add, add_carried, combine, Coefficients, Factor, First, LaneSteps, Row};
use super::lanewise::Lanewise;
use super::scales::{Exhausted, Scales};
use super::stepper::Stepper;
use super::window::{power, KeptBy, OpenSlot, Window};
use crate::precision::Low;
use crate::simd::{aligned, Aligned, Element};
use crate::stats::Stats;

/// The cotangents of outputs inside the steps of a tile, by the weights of the interpolant.
pub(super) struct DenseSeeds<T: Element> {
    /// Σ_m b_i(x_m) ȳ_m, stage after stage.
    pub(super) stages: Aligned<T>,
    /// Σ_m ȳ_m.
    pub(super) state: Aligned<T>,
}

impl<T: Element> DenseSeeds<T> {
    /// Zeros.
    pub(super) fn new(stepper: &Stepper<'_, T>) -> Self {
        let stages = stepper.plan.problem.scheme.tableau.stages();
        Self {
            stages: aligned(stages * stepper.size),
            state: aligned(stepper.size),
        }
    }

    /// Adds the cotangent ȳ of an output with these weights b_i(x), in all lanes.
    pub(super) fn weigh(&mut self, stepper: &Stepper<'_, T>, weights: &[f64], output: &[T]) {
        let (on, batch, size) = (stepper.on, stepper.batch, stepper.size);
        let rows: Vec<Row> = weights.iter().map(|b| vec![(*b, 0)]).collect();
        let weights = Coefficients::<T>::plain(batch, &rows);
        for (i, stage) in self.stages.chunks_exact_mut(size).enumerate() {
            add::<T>(on, batch, stage, weights.row(i), output);
        }
        let one = Coefficients::<T>::plain(batch, &[vec![(1.0, 0)]]);
        add::<T>(on, batch, &mut self.state, one.row(0), output);
    }

    pub(super) fn clear(&mut self) {
        self.stages.fill(T::default());
        self.state.fill(T::default());
    }
}

/// The pull-backs of a step.
pub(super) struct StagePulls<T: Element> {
    /// w'_i by stage.
    ws: Aligned<T>,
    /// Multiplied by the scale, and by m where compute precision is not low: by stage the a_ji with j > i, of
    /// the stages of a step without outputs inside and of one with them, then by stage the b_i, then 1.
    coefficients: Coefficients<T>,
    /// Rows of ones: for every active stage, for every stage of a step with outputs inside, and for one vector.
    ones: Coefficients<T>,
    factors: Vec<f64>,
    /// The scales that the factors below belong to; none at the start of a step.
    scales: Vec<f64>,
    /// m of all lanes or of each, and p.
    mantissas: Vec<f64>,
    power: f64,
    m: Factor<T>,
    inverse: Factor<T>,
    unscale: Factor<T>,
    /// 1/S of each lane, if scales differ.
    common: Factor<T>,
}

/// λ, and what enters the step from outputs inside it.
#[derive(Clone, Copy)]
pub(super) struct TileSeeds<'a, T: Element> {
    pub(super) adj: &'a [T],
    pub(super) dense: Option<&'a DenseSeeds<T>>,
}

impl<T: Element> StagePulls<T> {
    pub(super) fn new(stepper: &Stepper<'_, T>) -> Self {
        let (tableau, batch) = (&stepper.plan.problem.scheme.tableau, stepper.batch);
        let column = |(dense, i): (bool, usize)| -> Row {
            let later = stepper.stages(dense).iter().filter(|&&j| j > i);
            let terms = later.map(|&j| (tableau.a(j)[i], j));
            terms.filter(|(a, _)| *a != 0.0).collect()
        };
        let both = [false, true].into_iter();
        let columns = both.flat_map(|dense| (0..tableau.stages()).map(move |i| (dense, i)));
        let columns = columns.map(column);
        let weights = tableau.b().iter().map(|b| vec![(*b, 0)]);
        let rows: Vec<_> = columns.chain(weights).chain([vec![(1.0, 0)]]).collect();
        let ones = |stages: &[usize]| stages.iter().map(|&j| (1.0, j)).collect();
        let ones = [
            ones(stepper.stages(false)),
            ones(stepper.stages(true)),
            vec![(1.0, 0)],
        ];
        Self {
            ws: aligned(tableau.stages() * stepper.size),
            coefficients: Coefficients::new(batch, &rows),
            ones: Coefficients::plain(batch, &ones),
            factors: vec![],
            scales: vec![],
            mantissas: vec![],
            power: 1.0,
            m: Factor::new(batch),
            inverse: Factor::new(batch),
            unscale: Factor::new(batch),
            common: Factor::new(batch),
        }
    }

    /// λ_n but for what is returned at the node, in place of λ_{n+1}, with the cotangents left in the window.
    #[allow(clippy::too_many_arguments)]
    pub(super) fn step(
        &mut self,
        stepper: &Stepper<'_, T>,
        steps: LaneSteps<'_>,
        adj: &mut [T],
        dense: Option<&DenseSeeds<T>>,
        window: &mut Window<T>,
        kept: &KeptBy<'_, T>,
        scales: &mut Scales,
        stats: &mut Stats,
    ) -> std::result::Result<(), Exhausted> {
        let (on, batch) = (stepper.on, stepper.batch);
        self.measure(steps);
        let stages = stepper.stages(steps.is_dense());
        for (at, &i) in stages.iter().enumerate().rev() {
            let seeds = TileSeeds { adj: &*adj, dense };
            self.stage(stepper, steps, (i, at), seeds, window, kept, scales, stats)?;
        }
        let all = self.ones.row(usize::from(steps.is_dense()));
        add_carried::<T>(on, batch, stepper.size, adj, all, &self.ws);
        if let Some(dense) = dense {
            self.add(on, batch, adj, &dense.state);
        }
        scales.end_step();
        Ok(())
    }

    /// λ + ȳ, λ with what rounding has taken from it if that is carried.
    pub(super) fn add(&self, on: &dyn Lanewise<T>, batch: usize, adj: &mut [T], incoming: &[T]) {
        let one = self.ones.row(2);
        add_carried::<T>(on, batch, incoming.len(), adj, one, incoming);
    }

    /// Takes the lengths of the steps as m p.
    fn measure(&mut self, steps: LaneSteps<'_>) {
        steps.each(|step| step.h, &mut self.mantissas);
        let longest = self
            .mantissas
            .iter()
            .fold(0.0f64, |max, h| max.max(h.abs()));
        self.power = divisor(longest);
        for h in &mut self.mantissas {
            *h /= self.power;
        }
        self.scales.clear();
    }

    /// Prepares for these scales: one for all lanes, or one for each.
    fn scale_by(&mut self, rounds: bool, scales: &[f64]) {
        if self.scales == scales {
            return;
        }
        self.scales.clear();
        self.scales.extend_from_slice(scales);
        let (mantissas, p, factors) = (&self.mantissas[..], self.power, &mut self.factors);
        let mut set = |of: &dyn Fn(f64, f64) -> f64, set: &mut dyn FnMut(&[f64])| {
            let lanes = mantissas.len().max(scales.len());
            let pairs = mantissas.iter().cycle().zip(scales.iter().cycle());
            factors.clear();
            factors.extend(pairs.take(lanes).map(|(m, scale)| of(*m, *scale)));
            set(factors);
        };
        if rounds {
            set(&|_, scale| scale, &mut |of| self.coefficients.multiply(of));
            set(&|m, _| m, &mut |of| self.m.set(of));
            set(&|m, _| 1.0 / m, &mut |of| self.inverse.set(of));
            set(&|m, scale| m * p / scale, &mut |of| self.unscale.set(of));
        } else {
            set(&|m, scale| scale * m, &mut |of| {
                self.coefficients.multiply(of);
            });
            set(&|_, scale| p / scale, &mut |of| self.unscale.set(of));
        }
        if scales.len() > 1 {
            set(&|_, scale| 1.0 / scale, &mut |of| self.common.set(of));
        }
    }

    /// w'_i, with the cotangents left in the window.
    #[allow(clippy::too_many_arguments)]
    fn stage(
        &mut self,
        stepper: &Stepper<'_, T>,
        steps: LaneSteps<'_>,
        (i, at): (usize, usize),
        seeds: TileSeeds<'_, T>,
        window: &mut Window<T>,
        kept: &KeptBy<'_, T>,
        scales: &mut Scales,
        stats: &mut Stats,
    ) -> std::result::Result<(), Exhausted> {
        let (on, size, batch) = (stepper.on, stepper.size, stepper.batch);
        let stages = stepper.plan.problem.scheme.tableau.stages();
        let rounds = stepper.plan.low.iter().any(|low| *low != Low::None);
        let place = (steps.index(), at);
        let mut attempts = 0;
        loop {
            stats.vjps += 1;
            attempts += 1;
            scales.used().for_each(|scale| stats.used_scale(scale));
            self.scale_by(rounds, scales.numbers());
            window.scaled_by(stepper.field, kept, scales.of_sums() / self.power);
            let OpenSlot {
                kept: values,
                cotangents,
            } = window.slot(place, kept);
            let v = &mut cotangents[..size];
            // S m v_i, or m Q(S v_i) where compute precision is low.
            let rows = &self.coefficients;
            let first = First::times(rows.row(2 * stages + i).coefficient(), seeds.adj);
            let later = rows.row(if steps.is_dense() { stages + i } else { i });
            combine::<T>(on, batch, v, first, later, &self.ws);
            if let Some(dense) = seeds.dense {
                let dense = &dense.stages[i * size..][..size];
                add::<T>(on, batch, v, rows.row(3 * stages), dense);
            }
            if rounds {
                stepper.round(v);
                self.m.apply(on, v);
            }
            let w = &mut self.ws[i * size..][..size];
            stepper.field.vjp(values, cotangents, w);
            if rounds {
                self.inverse.apply(on, w);
                stepper.round(w);
            }
            if scales.fit(on, w, attempts)? {
                self.unscale.apply(on, w);
                if scales.differ() {
                    // The sums over rows that a window collects have no scale of a row.
                    self.common.apply(on, cotangents);
                }
                window.push(stepper.field, place, kept);
                return Ok(());
            }
            stats.retries += 1;
        }
    }
}

/// The power of two that a length is divided by: one where it is neither very small nor very large.
fn divisor(h: f64) -> f64 {
    const MODERATE: f64 = (1 << 24) as f64;
    if (1.0 / MODERATE..=MODERATE).contains(&h.abs()) {
        return 1.0;
    }
    power(h)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rows::window::in_range;

    fn mantissa(h: f64) -> (f64, f64) {
        (h / divisor(h), divisor(h))
    }

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
