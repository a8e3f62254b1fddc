//! Steps of one tile.

use super::activations::{KeptEvaluations, Selection};
use super::lanes::{add, add_carried, combine, Coefficients, First, LaneClock, LaneSteps, Row};
use super::lanewise::Lanewise;
use super::tile::{At, Tiled};
use super::trajectory::Snapshot;
use super::{Failure, TilePlan};
use crate::adaptive::Control;
use crate::error::Error;
use crate::precision::Low;
use crate::schedule::Step;
use crate::simd::{aligned, Aligned, Element};

/// Takes steps of one tile after the other; owns the scratch that a step needs.
pub(super) struct Stepper<'p, T: Element> {
    pub(super) on: &'p dyn Lanewise<T>,
    pub(super) field: &'p dyn Tiled<T>,
    pub(super) plan: &'p TilePlan<'p>,
    /// Numbers of a feature: rows of a tile.
    pub(super) batch: usize,
    /// Numbers of a state.
    pub(super) size: usize,
    /// Numbers of what a step carries: the state, and what rounding has taken from it if sums are compensated.
    pub(super) carried: usize,
    /// Active stages, ascending: those that the solution reads, and those that outputs inside a step read.
    stages: [Vec<usize>; 2],
    c: Vec<f64>,
    /// Of every stage, whether more than other stages reads it; see [`At::is_weighed`].
    weighed: Vec<bool>,
    pub(super) clock: LaneClock<T>,
    /// h of all lanes, or of each.
    lengths: Vec<f64>,
    /// h a_ij, row after row, h b_j, and what attempts are measured by.
    coefficients: Coefficients<T>,
    /// k_j.
    pub(super) ks: Aligned<T>,
    /// Scratch for what rounding takes from a stage.
    lost: Aligned<T>,
}

impl<'p, T: Element> Stepper<'p, T> {
    pub(super) fn new(field: &'p dyn Tiled<T>, plan: &'p TilePlan<'p>) -> Self {
        Self::estimating(field, plan, None)
    }

    /// One that also forms the sums of velocities that an attempt is measured by: with weights b − b̂, and with those of
    /// the differences of stages.
    pub(super) fn estimating(
        field: &'p dyn Tiled<T>,
        plan: &'p TilePlan<'p>,
        control: Option<&Control>,
    ) -> Self {
        let scheme = &plan.problem.scheme;
        let (tableau, batch) = (&scheme.tableau, field.batch());
        let size = plan.layout.dim() * batch;
        let carried = size * scheme.carried();
        let stages = [scheme.stages(), scheme.dense_stages()];
        let terms = |row: &[f64]| -> Row {
            let all = row.iter().copied().enumerate();
            all.filter(|(_, c)| *c != 0.0)
                .map(|(j, c)| (c, j))
                .collect()
        };
        // Also the stages that only the estimate reads; those of the steps read none of them.
        let mut rows: Vec<_> = (0..tableau.stages())
            .map(|i| terms(&tableau.a(i)[..i.min(tableau.a(i).len())]))
            .collect();
        rows.push(terms(tableau.b()));
        if let Some(control) = control {
            rows.push(terms(&control.estimate));
            let stability = control.stability.as_ref();
            rows.push(stability.map_or(vec![], |of| terms(&of.velocities)));
            rows.push(stability.map_or(vec![], |of| terms(&of.states)));
        }
        Self {
            on: field.lanewise(),
            field,
            plan,
            batch,
            size,
            c: tableau.c().to_vec(),
            weighed: (0..tableau.stages())
                .map(|i| tableau.is_weighed(i))
                .collect(),
            clock: LaneClock::new(batch),
            lengths: vec![],
            coefficients: Coefficients::new(batch, &rows),
            ks: aligned(tableau.stages() * size),
            lost: aligned(carried - size),
            carried,
            stages,
        }
    }

    /// The stages of steps with outputs inside them, or without.
    pub(super) fn stages(&self, dense: bool) -> &[usize] {
        &self.stages[usize::from(dense)]
    }

    /// Scratch for what one evaluation keeps.
    pub(super) fn slot(&self) -> Aligned<T> {
        aligned(self.field.kept() * self.batch)
    }

    /// y_{n+1} in place of y_n, with what else a step carries; what is wanted of the evaluations is kept.
    pub(super) fn advance(
        &mut self,
        step: Step,
        y: &mut [T],
        slot: &mut [T],
        mut kept: Option<(&Selection, &mut KeptEvaluations<T>)>,
    ) -> Result<(), Failure> {
        let steps = LaneSteps::All(step);
        self.begin(steps);
        for at in 0..self.stages(step.dense).len() {
            let i = self.stages(step.dense)[at];
            let place = match &mut kept {
                Some((selection, kept)) => kept.slot_mut(selection, (step.index, at), self.batch),
                None => None,
            };
            // As the backward pass evaluates it again, from the state alone.
            let state = &y[..self.size];
            if let Some(place) = place {
                self.stage(i, state, place);
                self.evaluate(steps, i, place);
            } else {
                self.stage(i, state, slot);
                self.evaluate(steps, i, slot);
                if let Some((selection, kept)) = &mut kept {
                    kept.save(self.on, selection, (step.index, at), slot, self.batch);
                }
            }
            let k = &self.ks[i * self.size..][..self.size];
            if !self.on.is_finite(k) {
                return Err(Failure {
                    at: (step.index, i),
                    error: Error::NonFiniteVelocity {
                        step: step.index,
                        stage: i,
                        t: step.at(self.c[i]),
                    },
                });
            }
        }
        self.update(y);
        if !self.on.is_finite(y) {
            return Err(Failure {
                at: (step.index, usize::MAX),
                error: Error::NonFiniteSolution {
                    step: step.index,
                    t: step.end,
                },
            });
        }
        Ok(())
    }

    /// Evaluates the stages of the steps from y again, each into a slot of its own; the velocities
    /// only as far as later stages read them.
    pub(super) fn linearize(&mut self, steps: LaneSteps<'_>, y: &[T], slots: &mut [T]) {
        self.begin(steps);
        let size = self.field.kept() * self.batch;
        let (dense, mut slots) = (steps.is_dense(), slots.chunks_exact_mut(size));
        for at in 0..self.stages(dense).len() {
            let (i, Some(slot)) = (self.stages(dense)[at], slots.next()) else {
                return;
            };
            self.stage(i, y, slot);
            let is_last = at + 1 == self.stages(dense).len();
            let at = At {
                is_weighed: self.weighed[i],
                is_repeated: true,
                ..self.clock.at(steps, self.c[i])
            };
            if is_last {
                return self.field.velocity(&at, slot, None);
            }
            let k = &mut self.ks[i * self.size..][..self.size];
            self.field.velocity(&at, slot, Some(&mut *k));
            round::<T>(self.on, self.plan, self.batch, k);
        }
    }

    /// The same of one step that all lanes take, from what was kept of it.
    pub(super) fn recall(
        &mut self,
        step: Step,
        selection: &Selection,
        kept: &KeptEvaluations<T>,
        slots: &mut [T],
    ) {
        let known = selection.known(step.index);
        let size = self.field.kept() * self.batch;
        let stages = &self.stages[usize::from(step.dense)];
        for ((at, &i), slot) in stages.iter().enumerate().zip(slots.chunks_exact_mut(size)) {
            kept.load(self.on, selection, (step.index, at), slot, self.batch);
            let at = self.clock.at(LaneSteps::All(step), self.c[i]);
            let is_weighed = self.weighed[i];
            self.field.recall(&At { is_weighed, ..at }, slot, &known);
        }
    }

    /// From now on, steps have these lengths.
    pub(super) fn begin(&mut self, steps: LaneSteps<'_>) {
        steps.each(|step| step.h, &mut self.lengths);
        self.coefficients.multiply(&self.lengths);
    }

    /// h of all lanes, or of each.
    pub(super) fn lengths(&self) -> &[f64] {
        &self.lengths
    }

    /// Y_i = Q(y + h Σ a_ij k_j), the first features of the slot.
    pub(super) fn stage(&mut self, i: usize, y: &[T], slot: &mut [T]) {
        self.sum_stage(i, y, slot);
        self.round(&mut slot[..self.size]);
    }

    /// The same before it is rounded.
    pub(super) fn sum_stage(&mut self, i: usize, y: &[T], slot: &mut [T]) {
        let (stage, terms) = (&mut slot[..self.size], self.coefficients.row(i));
        let (state, lost) = y.split_at(self.size);
        let tableau = &self.plan.problem.scheme.tableau;
        if !lost.is_empty() && tableau.ends_step(i) {
            // The first stage of the next step: the state there to the bit.
            stage.copy_from_slice(state);
            self.lost.copy_from_slice(lost);
            add::<T>(self.on, self.batch, &mut self.lost, terms, &self.ks);
            return self.on.two_sums(stage, &mut self.lost);
        }
        combine::<T>(self.on, self.batch, stage, First::plain(y), terms, &self.ks);
    }

    /// How many stages the method has.
    pub(super) fn count(&self) -> usize {
        self.c.len()
    }

    /// Sets the clock to stage i.
    pub(super) fn tell(&mut self, steps: LaneSteps<'_>, i: usize) {
        self.clock.at(steps, self.c[i]);
    }

    /// k_i = Q(f(t_i, Y_i)).
    pub(super) fn evaluate(&mut self, steps: LaneSteps<'_>, i: usize, slot: &mut [T]) {
        self.clock.at(steps, self.c[i]);
        self.evaluate_now(i, self.weighed[i], slot);
    }

    /// The same at the times that the clock shows; `is_weighed` as in [`At`], at least where the method says so.
    pub(super) fn evaluate_now(&mut self, i: usize, is_weighed: bool, slot: &mut [T]) {
        let k = &mut self.ks[i * self.size..][..self.size];
        let is_weighed = is_weighed || self.weighed[i];
        let at = At {
            is_weighed,
            ..self.clock.now()
        };
        self.field.velocity(&at, slot, Some(k));
        round::<T>(self.on, self.plan, self.batch, k);
    }

    /// y + h Σ b_i k_i in place of y, with what else a step carries.
    pub(super) fn update(&self, y: &mut [T]) {
        let b = self.coefficients.row(self.c.len());
        add_carried::<T>(self.on, self.batch, self.size, y, b, &self.ks);
    }

    /// y + h Σ b_i k_i, the error estimate h Σ (b_i − b̂_i) k_i, and the differences h Σ d_i k_i and Σ d_i Y_i of stages.
    pub(super) fn finish(&self, y: &[T], after: &mut [T], measures: &mut [Aligned<T>; 3]) {
        after.copy_from_slice(y);
        self.update(after);
        for (sum, row) in measures.iter_mut().zip(self.c.len() + 1..) {
            sum.fill(T::default());
            let terms = self.coefficients.row(row);
            add::<T>(self.on, self.batch, sum, terms, &self.ks);
        }
    }

    /// b_i(x).
    pub(super) fn interpolant(&self, x: f64) -> Vec<f64> {
        self.plan.problem.scheme.tableau.weights_at(x)
    }

    /// The state at a fraction x of the step that all lanes have taken from y.
    pub(super) fn interpolate(&self, (step, x): (&Step, f64), y: &[T], out: &mut [T]) {
        let weights = self.interpolant(x);
        let terms = weights.iter().enumerate().filter(|(_, b)| **b != 0.0);
        let row = terms.map(|(i, b)| (*b, i)).collect();
        let mut coefficients = Coefficients::<T>::new(self.batch, &[row]);
        coefficients.multiply(&[step.h]);
        let terms = coefficients.row(0);
        combine::<T>(self.on, self.batch, out, First::plain(y), terms, &self.ks);
    }

    /// The same as [`advance`](Self::advance) where each lane takes a step of its own, none with outputs inside.
    pub(super) fn advance_lanes(&mut self, steps: &[Step], y: &mut [T], slot: &mut [T]) {
        let steps = LaneSteps::Each(steps);
        self.begin(steps);
        for at in 0..self.stages(false).len() {
            let i = self.stages(false)[at];
            self.stage(i, y, slot);
            self.evaluate(steps, i, slot);
        }
        self.update(y);
    }

    /// Rounds a state-like tile to compute precision, leaf by leaf.
    pub(super) fn round(&self, x: &mut [T]) {
        round::<T>(self.on, self.plan, self.batch, x);
    }

    /// y at the end of a step from y at its start as it is kept, for a plan that did not keep it.
    pub(super) fn replay(
        &mut self,
        step: Step,
        y: &Snapshot<T>,
        slot: &mut [T],
    ) -> Result<Snapshot<T>, Failure> {
        let mut tile = aligned(self.carried);
        y.load(&mut tile);
        self.advance(step, &mut tile, slot, None)?;
        let failed = |error| Failure {
            at: (step.index, 0),
            error,
        };
        Snapshot::of(&tile).map_err(failed)
    }
}

/// Rounds a state-like tile to compute precision, leaf by leaf.
pub(super) fn round<T: Element>(
    on: &dyn Lanewise<T>,
    plan: &TilePlan<'_>,
    batch: usize,
    x: &mut [T],
) {
    let mut rest = x;
    for (features, low) in plan.layout.features.iter().zip(&plan.low) {
        let leaf;
        (leaf, rest) = rest.split_at_mut(features * batch);
        if *low != Low::None {
            on.round(*low, leaf);
        }
    }
}
