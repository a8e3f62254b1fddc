//! Steps of one tile.

use pulp::Simd;

use super::activations::{KeptEvaluations, Selection};
use super::lanes::{add, combine, Coefficients, First, LaneClock, LaneSteps, Row};
use super::tile::Tiled;
use super::trajectory::Snapshot;
use super::{Failure, TilePlan};
use crate::error::Error;
use crate::precision::Low;
use crate::schedule::Step;
use crate::simd::{enter, vectors, Element, Kernel, Vectors};

/// Takes steps of one tile after the other; owns the scratch that a step needs.
pub(super) struct Stepper<'p, T: Element, S: Simd> {
    pub(super) s: S,
    pub(super) field: &'p dyn Tiled<T, S>,
    pub(super) plan: &'p TilePlan<'p>,
    /// Vectors of a feature.
    pub(super) width: usize,
    /// Vectors of a state.
    pub(super) size: usize,
    /// Active stages, ascending: those that the solution reads, and those that outputs inside a step read.
    stages: [Vec<usize>; 2],
    c: Vec<f64>,
    pub(super) clock: LaneClock<T, S>,
    /// h of all lanes, or of each.
    lengths: Vec<f64>,
    /// h a_ij, row after row, h b_j, and h (b_j − b̂_j).
    coefficients: Coefficients<T, S>,
    /// k_j.
    pub(super) ks: Vectors<T, S>,
}

impl<'p, T: Element, S: Simd> Stepper<'p, T, S> {
    pub(super) fn new(s: S, field: &'p dyn Tiled<T, S>, plan: &'p TilePlan<'p>) -> Self {
        Self::estimating(s, field, plan, &[])
    }

    /// One that also forms the error estimate with these weights b − b̂.
    pub(super) fn estimating(
        s: S,
        field: &'p dyn Tiled<T, S>,
        plan: &'p TilePlan<'p>,
        estimate: &[f64],
    ) -> Self {
        let scheme = &plan.problem.scheme;
        let (tableau, width) = (&scheme.tableau, field.width());
        let size = plan.layout.dim() * width;
        let stages = [scheme.stages(), scheme.dense_stages()];
        let terms = |row: &[f64], stages: &[usize]| -> Row {
            let of = stages.iter().filter_map(|&j| Some((*row.get(j)?, j)));
            of.filter(|(c, _)| *c != 0.0).collect()
        };
        let mut rows: Vec<_> = (0..tableau.stages())
            .map(|i| terms(&tableau.a(i)[..i.min(tableau.a(i).len())], &stages[1]))
            .collect();
        rows.push(terms(tableau.b(), &stages[0]));
        let estimate = estimate.iter().copied().enumerate();
        rows.push(
            estimate
                .filter(|(_, e)| *e != 0.0)
                .map(|(i, e)| (e, i))
                .collect(),
        );
        Self {
            s,
            field,
            plan,
            width,
            size,
            c: tableau.c().to_vec(),
            clock: LaneClock::new(width),
            lengths: vec![],
            coefficients: Coefficients::new(width, &rows),
            ks: vectors::<T, S>(tableau.stages() * size),
            stages,
        }
    }

    /// The stages of steps with outputs inside them, or without.
    pub(super) fn stages(&self, dense: bool) -> &[usize] {
        &self.stages[usize::from(dense)]
    }

    /// Scratch for what one evaluation keeps.
    pub(super) fn slot(&self) -> Vectors<T, S> {
        vectors::<T, S>(self.field.kept() * self.width)
    }

    /// y_{n+1} in place of y_n; what is wanted of the evaluations is kept.
    pub(super) fn advance(
        &mut self,
        step: Step,
        y: &mut [T::Vector<S>],
        slot: &mut [T::Vector<S>],
        mut kept: Option<(&Selection, &mut KeptEvaluations<T>)>,
    ) -> Result<(), Failure> {
        let steps = LaneSteps::All(step);
        self.begin(steps);
        for at in 0..self.stages(step.dense).len() {
            let i = self.stages(step.dense)[at];
            let place = match &mut kept {
                Some((selection, kept)) => {
                    kept.slot_mut::<S>(selection, (step.index, at), self.width)
                }
                None => None,
            };
            if let Some(place) = place {
                self.stage(i, y, place);
                self.evaluate(steps, i, place);
            } else {
                self.stage(i, y, slot);
                self.evaluate(steps, i, slot);
                if let Some((selection, kept)) = &mut kept {
                    kept.save(self.s, selection, (step.index, at), slot, self.width);
                }
            }
            let k = &self.ks[i * self.size..][..self.size];
            if !is_finite::<T, S>(self.s, k) {
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
        if !is_finite::<T, S>(self.s, y) {
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
    pub(super) fn linearize(
        &mut self,
        steps: LaneSteps<'_>,
        y: &[T::Vector<S>],
        slots: &mut [T::Vector<S>],
    ) {
        self.begin(steps);
        let size = self.field.kept() * self.width;
        let (dense, mut slots) = (steps.is_dense(), slots.chunks_exact_mut(size));
        for at in 0..self.stages(dense).len() {
            let (i, Some(slot)) = (self.stages(dense)[at], slots.next()) else {
                return;
            };
            self.stage(i, y, slot);
            if at + 1 < self.stages(dense).len() {
                self.evaluate(steps, i, slot);
            } else {
                let at = self.clock.at(steps, self.c[i]);
                self.field.velocity(self.s, &at, slot, None);
            }
        }
    }

    /// The same of one step that all lanes take, from what was kept of it.
    pub(super) fn recall(
        &mut self,
        step: Step,
        selection: &Selection,
        kept: &KeptEvaluations<T>,
        slots: &mut [T::Vector<S>],
    ) {
        let known = selection.known(step.index);
        let size = self.field.kept() * self.width;
        let stages = &self.stages[usize::from(step.dense)];
        for ((at, &i), slot) in stages.iter().enumerate().zip(slots.chunks_exact_mut(size)) {
            kept.load(self.s, selection, (step.index, at), slot, self.width);
            let at = self.clock.at(LaneSteps::All(step), self.c[i]);
            self.field.recall(self.s, &at, slot, &known);
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
    pub(super) fn stage(&self, i: usize, y: &[T::Vector<S>], slot: &mut [T::Vector<S>]) {
        self.sum_stage(i, y, slot);
        self.round(&mut slot[..self.size]);
    }

    /// The same before it is rounded.
    pub(super) fn sum_stage(&self, i: usize, y: &[T::Vector<S>], slot: &mut [T::Vector<S>]) {
        let (stage, terms) = (&mut slot[..self.size], self.coefficients.row(i));
        combine::<T, S>(self.s, self.width, stage, First::plain(y), terms, &self.ks);
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
    pub(super) fn evaluate(&mut self, steps: LaneSteps<'_>, i: usize, slot: &mut [T::Vector<S>]) {
        let k = &mut self.ks[i * self.size..][..self.size];
        let at = self.clock.at(steps, self.c[i]);
        self.field.velocity(self.s, &at, slot, Some(k));
        round::<T, S>(self.s, self.plan, self.width, k);
    }

    /// The same at the times that the clock shows.
    pub(super) fn evaluate_now(&mut self, i: usize, slot: &mut [T::Vector<S>]) {
        let k = &mut self.ks[i * self.size..][..self.size];
        self.field
            .velocity(self.s, &self.clock.now(), slot, Some(k));
        round::<T, S>(self.s, self.plan, self.width, k);
    }

    /// y + h Σ b_i k_i in place of y.
    pub(super) fn update(&self, y: &mut [T::Vector<S>]) {
        let b = self.coefficients.row(self.c.len());
        add::<T, S>(self.s, self.width, y, b, &self.ks);
    }

    /// y + h Σ b_i k_i, and the error estimate h Σ (b_i − b̂_i) k_i.
    pub(super) fn finish(
        &self,
        y: &[T::Vector<S>],
        after: &mut [T::Vector<S>],
        error: &mut [T::Vector<S>],
    ) {
        let (b, e) = (self.c.len(), self.c.len() + 1);
        let terms = self.coefficients.row(b);
        combine::<T, S>(self.s, self.width, after, First::plain(y), terms, &self.ks);
        error.fill(T::zeros::<S>());
        add::<T, S>(
            self.s,
            self.width,
            error,
            self.coefficients.row(e),
            &self.ks,
        );
    }

    /// b_i(x).
    pub(super) fn interpolant(&self, x: f64) -> Vec<f64> {
        self.plan.problem.scheme.tableau.weights_at(x)
    }

    /// The state at a fraction x of the step that all lanes have taken from y.
    pub(super) fn interpolate(
        &self,
        (step, x): (&Step, f64),
        y: &[T::Vector<S>],
        out: &mut [T::Vector<S>],
    ) {
        let weights = self.interpolant(x);
        let terms = weights.iter().enumerate().filter(|(_, b)| **b != 0.0);
        let row = terms.map(|(i, b)| (*b, i)).collect();
        let mut coefficients = Coefficients::<T, S>::new(self.width, &[row]);
        coefficients.multiply(&[step.h]);
        let terms = coefficients.row(0);
        combine::<T, S>(self.s, self.width, out, First::plain(y), terms, &self.ks);
    }

    /// y_{n+1} in place of y_n where each lane takes a step of its own, none with outputs inside.
    pub(super) fn advance_lanes(
        &mut self,
        steps: &[Step],
        y: &mut [T::Vector<S>],
        slot: &mut [T::Vector<S>],
    ) {
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
    pub(super) fn round(&self, x: &mut [T::Vector<S>]) {
        round::<T, S>(self.s, self.plan, self.width, x);
    }

    /// y at the end of a step from y at its start as it is kept, for a plan that did not keep it.
    pub(super) fn replay(
        &mut self,
        step: Step,
        y: &Snapshot<T>,
        slot: &mut [T::Vector<S>],
    ) -> Result<Snapshot<T>, Failure> {
        let mut tile = vectors::<T, S>(self.size);
        y.load::<S>(&mut tile);
        self.advance(step, &mut tile, slot, None)?;
        let failed = |error| Failure {
            at: (step.index, 0),
            error,
        };
        Snapshot::of::<S>(&tile).map_err(failed)
    }
}

fn round<T: Element, S: Simd>(s: S, plan: &TilePlan<'_>, width: usize, x: &mut [T::Vector<S>]) {
    let mut rest = x;
    for (features, low) in plan.layout.features.iter().zip(&plan.low) {
        let x;
        (x, rest) = rest.split_at_mut(features * width);
        if *low != Low::None {
            enter(s, RoundLeaf::<T, S> { low: *low, x });
        }
    }
}

/// Rounds a leaf of a tile.
struct RoundLeaf<'a, T: Element, S: Simd> {
    low: Low,
    x: &'a mut [T::Vector<S>],
}

impl<T: Element, S: Simd> Kernel<S> for RoundLeaf<'_, T, S> {
    type Output = ();

    #[inline(always)]
    fn run(self, s: S) {
        for x in self.x {
            *x = T::round(s, self.low, *x);
        }
    }
}

/// Whether no number is NaN or infinite.
pub(super) fn is_finite<T: Element, S: Simd>(s: S, x: &[T::Vector<S>]) -> bool {
    enter(s, IsFinite::<T, S> { x })
}

/// [`is_finite`], in code for the vector unit.
struct IsFinite<'a, T: Element, S: Simd> {
    x: &'a [T::Vector<S>],
}

impl<T: Element, S: Simd> Kernel<S> for IsFinite<'_, T, S> {
    type Output = bool;

    #[inline(always)]
    fn run(self, s: S) -> bool {
        // 0·x is 0 for finite x, and NaN otherwise; NaN stays in a sum.
        let (zero, mut sums) = (T::zeros::<S>(), [T::zeros::<S>(); 4]);
        let (fours, rest) = self.x.as_chunks::<4>();
        for x in fours {
            for i in 0..4 {
                sums[i] = T::mul_add(s, zero, x[i], sums[i]);
            }
        }
        for x in rest {
            sums[0] = T::mul_add(s, zero, *x, sums[0]);
        }
        let pairs = [T::plus(s, sums[0], sums[1]), T::plus(s, sums[2], sums[3])];
        T::total(s, T::plus(s, pairs[0], pairs[1])) == T::default()
    }
}
