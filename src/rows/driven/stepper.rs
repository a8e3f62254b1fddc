//! Steps of one tile that are driven by noise.

use super::mix::{ByFunctional, Mix, Mixed};
use super::noise::{coefficients, functionals, LaneNoise};
use crate::driven::{Driven, Sum, Table};
use crate::error::Error;
use crate::rows::lanes::{LaneClock, LaneSteps};
use crate::rows::lanewise::Lanewise;
use crate::rows::stepper::round;
use crate::rows::tile::Tiled;
use crate::rows::trajectory::Snapshot;
use crate::rows::{Failure, TilePlan};
use crate::schedule::Step;
use crate::simd::{aligned, Aligned, Element};

/// Where the evaluations of one part keep what their pull-backs need: in one place after the other, or all in one.
pub(super) struct Slots<'a, T> {
    pub(super) numbers: &'a mut [T],
    pub(super) stride: usize,
}

/// Takes steps of one tile after the other; owns the scratch that a step needs.
pub(super) struct DrivenStepper<'p, T: Element> {
    pub(super) on: &'p dyn Lanewise<T>,
    pub(super) parts: &'p [Box<dyn Tiled<T>>],
    pub(super) plan: &'p TilePlan<'p>,
    pub(super) driven: &'p Driven,
    pub(super) batch: usize,
    /// Numbers of y.
    pub(super) size: usize,
    pub(super) clock: LaneClock<T>,
    pub(super) noise: LaneNoise<T>,
    /// Of every evaluation: the number of it among those of its part.
    pub(super) ordinals: Vec<usize>,
    /// The state that each evaluation is given, and whether it is that of the one before.
    stages: Vec<(Mix<T>, bool)>,
    /// The next value of each carried state.
    next: Vec<Mix<T>>,
    /// The step length that the coefficients are for.
    h: Option<f64>,
    /// Values of the evaluations, and behind them the carried states.
    xs: Aligned<T>,
    /// The state that an evaluation is given; the next carried states.
    at: Aligned<T>,
    after: Aligned<T>,
}

impl<'p, T: Element> DrivenStepper<'p, T> {
    pub(super) fn new(
        parts: &'p [Box<dyn Tiled<T>>],
        plan: &'p TilePlan<'p>,
        driven: &'p Driven,
    ) -> Self {
        let (table, batch) = (driven.table(), parts[0].batch());
        let size = plan.layout.dim() * batch;
        let (evaluations, carried) = (table.evaluations.len(), table.next.len());
        let on = functionals(table);
        let mix = |sum: &Sum| {
            let values = (0..evaluations).map(|i| (i, coefficients(sum, i, &on)));
            // The state comes last; see the sums over tensors.
            let base = sum.base.iter().enumerate();
            let base = base.map(|(r, c)| (evaluations + r, constant(*c)));
            Mix::new(values.chain(base))
        };
        let stage = |i: usize| {
            let at = &table.evaluations[i].at;
            let same = i > 0 && at.is(&table.evaluations[i - 1].at);
            (mix(at), same)
        };
        let ordinal = |i: usize| {
            let before = table.evaluations[..i].iter();
            before
                .filter(|e| e.part == table.evaluations[i].part)
                .count()
        };
        Self {
            on: parts[0].lanewise(),
            parts,
            plan,
            driven,
            batch,
            size,
            clock: LaneClock::new(batch),
            noise: LaneNoise::new(driven, plan.layout.dim(), batch),
            ordinals: (0..evaluations).map(ordinal).collect(),
            stages: (0..evaluations).map(stage).collect(),
            next: table.next.iter().map(mix).collect(),
            h: None,
            xs: aligned((evaluations + carried) * size),
            at: aligned(size),
            after: aligned(carried * size),
        }
    }

    pub(super) fn table(&self) -> &'static Table {
        self.driven.table()
    }

    /// Where the carried states begin.
    fn first(&self) -> usize {
        self.table().evaluations.len() * self.size
    }

    /// The carried states.
    pub(super) fn carried(&self) -> &[T] {
        &self.xs[self.first()..]
    }

    pub(super) fn carried_mut(&mut self) -> &mut [T] {
        let first = self.first();
        &mut self.xs[first..]
    }

    /// y.
    pub(super) fn y(&self) -> &[T] {
        &self.carried()[..self.size]
    }

    /// Begins at y0, which has been loaded as y: every state does.
    pub(super) fn begin(&mut self) {
        let size = self.size;
        let (y, others) = self.carried_mut().split_at_mut(size);
        for other in others.chunks_exact_mut(size) {
            other.copy_from_slice(y);
        }
    }

    /// Scratch for what one evaluation of each part keeps.
    pub(super) fn scratch(&self) -> Vec<Aligned<T>> {
        let parts = self.parts.iter();
        parts
            .map(|part| aligned(part.kept() * self.batch))
            .collect()
    }

    /// The carried states at the end of a step in place of those at its start.
    pub(super) fn advance(
        &mut self,
        step: Step,
        slots: &mut [Slots<'_, T>],
    ) -> Result<(), Failure> {
        self.evaluate(step, slots, true)?;
        let (functionals, size) = (self.noise.values(), self.size);
        let after = self.after.chunks_exact_mut(size);
        for (sum, after) in self.next.iter().zip(after) {
            self.on.mix(Mixed {
                mix: sum,
                functionals,
                xs: &self.xs,
                out: after,
            });
        }
        let first = self.first();
        self.xs[first..].copy_from_slice(&self.after);
        if !self.on.is_finite(self.carried()) {
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

    /// All evaluations of a step, each into its slot; without `values` only those values that other evaluations read.
    pub(super) fn evaluate(
        &mut self,
        step: Step,
        slots: &mut [Slots<'_, T>],
        values: bool,
    ) -> Result<(), Failure> {
        let failed = |i, error| Failure {
            at: (step.index, i),
            error,
        };
        let rows = self.clock.rows_mut();
        let drawn = self.noise.draw(self.driven, step, rows);
        drawn.map_err(|error| failed(0, error))?;
        self.begin_step(step.h);
        let table = self.table();
        for (i, evaluation) in table.evaluations.iter().enumerate() {
            let (sum, same) = &self.stages[i];
            if !same {
                self.on.mix(Mixed {
                    mix: sum,
                    functionals: self.noise.values(),
                    xs: &self.xs,
                    out: &mut self.at,
                });
                round::<T>(self.on, self.plan, self.batch, &mut self.at);
            }
            let part = evaluation.part as usize;
            let (field, slots) = (&self.parts[part], &mut slots[part]);
            let kept = field.kept() * self.batch;
            let slot = &mut slots.numbers[self.ordinals[i] * slots.stride..][..kept];
            slot[..self.size].copy_from_slice(&self.at);
            let at = self.clock.at(LaneSteps::All(step), evaluation.c);
            if !values && !self.stages[i + 1..].iter().any(|(sum, _)| sum.reads(i)) {
                field.velocity(&at, slot, None);
                continue;
            }
            let k = &mut self.xs[i * self.size..][..self.size];
            field.velocity(&at, slot, Some(&mut *k));
            round::<T>(self.on, self.plan, self.batch, k);
            if values && !self.on.is_finite(k) {
                let t = step.at(evaluation.c);
                let error = Error::NonFiniteVelocity {
                    step: step.index,
                    stage: i,
                    t,
                };
                return Err(failed(i, error));
            }
        }
        Ok(())
    }

    /// Rounds a tile like y to compute precision, leaf by leaf.
    pub(super) fn round(&self, x: &mut [T]) {
        round::<T>(self.on, self.plan, self.batch, x);
    }

    /// From now on, steps have this length.
    fn begin_step(&mut self, h: f64) {
        if self.h == Some(h) {
            return;
        }
        self.h = Some(h);
        let evaluations = self.table().evaluations;
        // A carried state is taken as it is.
        let factor = |x: usize| evaluations.get(x).map_or(1.0, |e| e.part.scale(h));
        let stages = self.stages.iter_mut().map(|(sum, _)| sum);
        for sum in stages.chain(&mut self.next) {
            sum.multiply(factor);
        }
    }

    /// The carried states at the end of a step from those at its start as they are kept, for a plan that did not keep
    /// them.
    pub(super) fn replay(
        &mut self,
        step: Step,
        start: &Snapshot<T>,
        scratch: &mut [Aligned<T>],
    ) -> Result<Snapshot<T>, Failure> {
        start.load(self.carried_mut());
        self.advance(step, &mut shared(scratch))?;
        Snapshot::of(self.carried()).map_err(|error| Failure {
            at: (step.index, 0),
            error,
        })
    }
}

/// A coefficient on 1.
pub(super) fn constant(c: f64) -> ByFunctional {
    let mut cs = ByFunctional::default();
    cs[0] = c;
    cs
}

/// Slots of which all evaluations of a part have the same.
pub(super) fn shared<T: Element>(scratch: &mut [Aligned<T>]) -> Vec<Slots<'_, T>> {
    let slots = scratch.iter_mut().map(|numbers| Slots {
        numbers: &mut numbers[..],
        stride: 0,
    });
    slots.collect()
}
