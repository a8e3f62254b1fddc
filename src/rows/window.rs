//! Evaluations with their cotangents, from which parameter gradients are collected window by window.

use super::activations::{KeptEvaluations, Selection};
use super::lanewise::Lanewise;
use super::tile::{Slot, Tiled};
use crate::simd::scratch::Scratch;
use crate::simd::{aligned, Aligned, Element};
use candle_core::DType;

/// Evaluations in a window, at least, where its slots are small.
const WINDOW: usize = 4;

/// The largest slot, in bytes, that may wait in a window; the gradients of larger slots are accumulated
/// immediately, while a part of the slot is still in cache.
const CACHED: usize = 1 << 20;

/// Windows in a partial sum, before it is added to the total; see [`crate::accumulator`].
const BLOCK: usize = 64;

/// What is kept of the evaluations of a tile.
pub(super) struct KeptBy<'a, T> {
    pub(super) selection: &'a Selection,
    pub(super) evaluations: &'a KeptEvaluations<T>,
}

/// An evaluation in a window: its slot there, and its step and stage.
#[derive(Clone, Copy)]
struct Pending {
    slot: usize,
    at: (usize, usize),
}

/// What was kept of an evaluation, and scratch for its cotangents.
pub(super) struct OpenSlot<'a, X> {
    pub(super) kept: &'a [X],
    pub(super) cotangents: &'a mut [X],
}

/// Evaluations with their cotangents, from which parameter gradients are collected.
pub(super) struct Window<T: Element> {
    /// Whether gradients of parameters are wanted at all.
    differentiate: bool,
    /// Numbers of a feature: rows of a tile.
    batch: usize,
    /// Numbers of a slot.
    kept_size: usize,
    cotangent_size: usize,
    kept: Scratch,
    cotangents: Scratch,
    /// Slots of this step, and how many there are in all.
    stages: usize,
    capacity: usize,
    /// Whether every evaluation is collected at once, so that all share the scratch for cotangents.
    at_once: bool,
    /// First slot of the step at hand.
    base: usize,
    /// What is not yet collected.
    pending: Vec<Pending>,
    scratch: Aligned<T>,
    /// Numbers of sums of gradients.
    sums: usize,
    /// S times the gradients of the block of windows at hand, once there is one.
    part: Option<Scratch>,
    windows: usize,
    scale: f64,
    /// The sum of the blocks before, once there is one.
    total: Option<Scratch>,
    /// What rounding has taken from it, if sums are compensated.
    lost: Option<Scratch>,
    compensated: bool,
}

impl<T: Element> Window<T> {
    pub(super) fn new(
        field: &dyn Tiled<T>,
        stages: usize,
        steps: usize,
        differentiate: bool,
    ) -> Self {
        let batch = field.batch();
        let (kept, cotangents) = (field.kept() * batch, field.cotangents() * batch);
        let slot = (kept + cotangents) * size_of::<T>();
        let at_once = slot > CACHED;
        let several = WINDOW.div_ceil(stages.max(1)).min(steps.max(1));
        let capacity = if at_once { 1 } else { several } * stages;
        let pairs = if at_once { 1 } else { capacity };
        let memory = |numbers| Scratch::new(numbers * size_of::<T>());
        Self {
            differentiate,
            batch,
            kept_size: kept,
            cotangent_size: cotangents,
            kept: memory(capacity * kept),
            cotangents: memory(pairs * cotangents),
            stages,
            capacity,
            at_once,
            base: 0,
            pending: Vec::with_capacity(capacity),
            scratch: aligned(if differentiate {
                field.scratch(pairs)
            } else {
                0
            }),
            sums: field.sums(),
            part: None,
            windows: 0,
            scale: 1.0,
            total: None,
            lost: None,
            compensated: false,
        }
    }

    /// The same with compensated sums of blocks, or without.
    pub(super) fn compensating(self, compensated: bool) -> Self {
        Self {
            compensated,
            ..self
        }
    }

    /// Forgets everything: another group begins.
    pub(super) fn clear(&mut self) {
        self.pending.clear();
        if self.windows > 0 {
            self.part = None;
        }
        (self.total, self.lost) = (None, None);
        (self.base, self.windows, self.scale) = (0, 0, 1.0);
    }

    /// Makes space for the slots of a step.
    pub(super) fn begin_step(&mut self, field: &dyn Tiled<T>, kept: &KeptBy<'_, T>) {
        if self.base + self.stages > self.capacity {
            self.flush(field, kept);
            self.base = 0;
        }
    }

    pub(super) fn next_kept(&mut self) -> &mut [T] {
        let slots = self.base * self.kept_size..(self.base + self.stages) * self.kept_size;
        &mut self.kept.numbers_mut()[slots]
    }

    /// What was kept of a stage of the step, and scratch for its cotangents.
    pub(super) fn slot<'a>(
        &'a mut self,
        at: (usize, usize),
        kept: &'a KeptBy<'_, T>,
    ) -> OpenSlot<'a, T> {
        let slot = self.base + at.1;
        let pair = if self.at_once { 0 } else { slot };
        let whole = kept.evaluations.slot(kept.selection, at, self.batch);
        OpenSlot {
            kept: whole
                .unwrap_or_else(|| &self.kept.numbers()[slot * self.kept_size..][..self.kept_size]),
            cotangents: &mut self.cotangents.numbers_mut()[pair * self.cotangent_size..]
                [..self.cotangent_size],
        }
    }

    pub(super) fn push(&mut self, field: &dyn Tiled<T>, at: (usize, usize), kept: &KeptBy<'_, T>) {
        let slot = self.base + at.1;
        self.pending.push(Pending { slot, at });
        if self.at_once {
            self.flush(field, kept);
        }
    }

    pub(super) fn end_step(&mut self) {
        self.base += self.stages;
    }

    /// From now on, cotangents carry this scale.
    pub(super) fn scaled_by(&mut self, field: &dyn Tiled<T>, kept: &KeptBy<'_, T>, scale: f64) {
        if self.scale != scale {
            self.flush(field, kept);
            self.promote(field.lanewise());
            self.scale = scale;
        }
    }

    /// Collects the gradients of what is pending.
    pub(super) fn flush(&mut self, field: &dyn Tiled<T>, kept: &KeptBy<'_, T>) {
        if self.differentiate && !self.pending.is_empty() {
            let slot = |&Pending { slot, at }: &Pending| {
                let pair = if self.at_once { 0 } else { slot };
                let whole = kept.evaluations.slot(kept.selection, at, self.batch);
                Slot {
                    kept: whole.unwrap_or_else(|| {
                        &self.kept.numbers()[slot * self.kept_size..][..self.kept_size]
                    }),
                    cotangents: &self.cotangents.numbers()[pair * self.cotangent_size..]
                        [..self.cotangent_size],
                }
            };
            let slots: Vec<_> = self.pending.iter().map(slot).collect();
            let bytes = self.sums * size_of::<T>();
            let part = self.part.get_or_insert_with(|| Scratch::new(bytes));
            field.accumulate(&slots, &mut self.scratch, part.numbers_mut());
            self.windows += 1;
        }
        self.pending.clear();
        if self.windows >= BLOCK {
            self.promote(field.lanewise());
        }
    }

    /// Adds the partial sums to the total.
    fn promote(&mut self, on: &dyn Lanewise<T>) {
        let Some(part) = self.part.as_mut().filter(|_| self.windows > 0) else {
            return;
        };
        let part = part.numbers_mut::<T>();
        let total = self
            .total
            .get_or_insert_with(|| Scratch::new(size_of_val(part)));
        let (a, b) = in_range::<T>(1.0 / self.scale);
        let factors = [T::of(a), T::of(b)];
        if self.compensated {
            let bytes = size_of_val(part);
            let lost = self.lost.get_or_insert_with(|| Scratch::new(bytes));
            on.promote(factors, part, lost.numbers_mut());
            on.two_sums(total.numbers_mut(), lost.numbers_mut());
        } else {
            on.promote(factors, part, total.numbers_mut());
        }
        self.windows = 0;
    }

    /// The sums of a group, which are handed over.
    pub(super) fn finish(&mut self, field: &dyn Tiled<T>) -> Sums {
        if !self.differentiate {
            return Sums::default();
        }
        if self.scale != 1.0 || self.total.is_some() {
            self.promote(field.lanewise());
        }
        self.lost = None;
        let sums = self.total.take().or_else(|| {
            self.windows = 0;
            self.part.take()
        });
        Sums(sums)
    }
}

/// Sums of gradients as a field collects them ([`Tiled::accumulate`]); nothing instead of zeros, or if none are wanted.
#[derive(Default)]
pub(super) struct Sums(Option<Scratch>);

impl Sums {
    /// Adds those of another group.
    pub(super) fn add<T: Element>(&mut self, others: Self) {
        match (&mut self.0, others.0) {
            (Some(sums), Some(others)) => {
                for (sum, other) in sums
                    .numbers_mut::<T>()
                    .iter_mut()
                    .zip(others.numbers::<T>())
                {
                    *sum += *other;
                }
            }
            (sums @ None, others) => *sums = others,
            (Some(_), None) => {}
        }
    }

    /// The gradients, parameter after parameter, which the sums of all groups are turned into once.
    pub(super) fn gradients<T: Element>(&self, field: &dyn Tiled<T>) -> Vec<T> {
        let sums = self.0.as_ref();
        sums.map_or_else(Vec::new, |sums| field.gradients(sums.numbers()))
    }
}

/// c as a product of two numbers that T holds to its precision; the second is one wherever it can be.
pub(super) fn in_range<T: Element>(c: f64) -> (f64, f64) {
    let single = f64::from(f32::MIN_POSITIVE)..=f64::from(f32::MAX);
    if T::DTYPE == DType::F64 || c == 0.0 || single.contains(&c.abs()) {
        return (c, 1.0);
    }
    // About the root, and exact.
    let root = power(c.abs().sqrt());
    (c / root, root)
}

/// The largest power of two that is not larger than |c|, of normal numbers.
pub(super) fn power(c: f64) -> f64 {
    const EXPONENT: u64 = 0x7ff << (f64::MANTISSA_DIGITS - 1);
    f64::from_bits(c.to_bits() & EXPONENT).max(f64::MIN_POSITIVE)
}
