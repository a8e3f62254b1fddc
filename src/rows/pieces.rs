//! Fields that take turns in time, over tiles, whatever fields they are.
//!
//! All lanes of a tile are in one step, which lies in one interval of time, so that they are in the turn of one field.

use candle_core::{Shape, Tensor};

use super::activations::Part;
use super::lanewise::Lanewise;
use super::plan::TilePlan;
use super::tile::{At, Slot, Tiled};
use super::{AnyRows, Rows};
use crate::error::Result;
use crate::intervals::Intervals;
use crate::simd::Element;
use crate::state::RowLayout;

/// One field for each interval.
pub(super) struct Pieces {
    pub(super) rows: Vec<Rows>,
    pub(super) intervals: Intervals,
}

impl AnyRows for Pieces {
    /// Those of all fields; a tensor that several of them read is there several times.
    fn weights(&self) -> Vec<Tensor> {
        self.rows.iter().flat_map(Rows::weights).collect()
    }

    fn reads_time(&self) -> bool {
        self.rows.iter().any(|rows| rows.field.reads_time())
    }

    fn reads_clock(&self) -> bool {
        true
    }

    fn domain(&self) -> Option<[f64; 2]> {
        let domains = self.rows.iter().filter_map(|rows| rows.field.domain());
        domains.reduce(|[a, b], [start, end]| [a.max(start), b.min(end)])
    }

    fn shares_time(&self) -> bool {
        true
    }

    fn layout(&self, shapes: &[Shape]) -> Option<RowLayout> {
        let mut layouts = self.rows.iter().map(|rows| rows.layout(shapes));
        let first = layouts.next()??;
        layouts
            .all(|layout| layout.as_ref() == Some(&first))
            .then_some(first)
    }

    fn single(&self, plan: &TilePlan<'_>, shapes: &[Shape]) -> Result<Option<Box<dyn Tiled<f32>>>> {
        let field =
            |(i, rows): (usize, &Rows)| rows.single(&plan.in_turn(&self.intervals, i), shapes);
        let fields = self.rows.iter().enumerate().map(field);
        Ok(self.in_turn(fields.collect::<Result<_>>()?))
    }

    fn double(&self, plan: &TilePlan<'_>, shapes: &[Shape]) -> Result<Option<Box<dyn Tiled<f64>>>> {
        let field =
            |(i, rows): (usize, &Rows)| rows.double(&plan.in_turn(&self.intervals, i), shapes);
        let fields = self.rows.iter().enumerate().map(field);
        Ok(self.in_turn(fields.collect::<Result<_>>()?))
    }
}

impl Pieces {
    fn in_turn<T: Element>(
        &self,
        fields: Option<Vec<Box<dyn Tiled<T>>>>,
    ) -> Option<Box<dyn Tiled<T>>> {
        let fields = fields?;
        let kept = fields.iter().map(|field| field.kept()).max()?;
        Some(Box::new(InTurn {
            kept: kept + 1,
            fields,
            intervals: self.intervals.clone(),
        }))
    }
}

/// The fields over tiles.
///
/// A slot keeps what the field whose turn it is keeps, and as its last feature the number of the interval.
struct InTurn<T: Element> {
    fields: Vec<Box<dyn Tiled<T>>>,
    intervals: Intervals,
    /// Features of a slot.
    kept: usize,
}

impl<T: Element> InTurn<T> {
    /// The number of the interval that a slot keeps.
    fn number(&self, kept: &[T]) -> usize {
        kept[(self.kept - 1) * self.batch()].wide() as usize
    }

    /// The field whose turn it is, and its slot; the number of the interval is written.
    ///
    /// A slot that was kept in bf16 has lost the number.
    fn turn<'a>(&self, at: &At<'_, T>, kept: &'a mut [T]) -> (&dyn Tiled<T>, &'a mut [T]) {
        let (instant, batch) = (at.instant(0), self.batch());
        let number = self.intervals.within(instant.step, instant.t);
        let (slot, last) = kept.split_at_mut((self.kept - 1) * batch);
        last.fill(T::of(number as f64));
        let field = &*self.fields[number];
        (field, &mut slot[..field.kept() * batch])
    }

    /// A slot as a field has it.
    fn own<'a>(&self, field: &dyn Tiled<T>, kept: &'a [T]) -> &'a [T] {
        &kept[..field.kept() * self.batch()]
    }
}

impl<T: Element> Tiled<T> for InTurn<T> {
    fn batch(&self) -> usize {
        self.fields[0].batch()
    }

    fn lanewise(&self) -> &dyn Lanewise<T> {
        self.fields[0].lanewise()
    }

    fn kept(&self) -> usize {
        self.kept
    }

    fn cotangents(&self) -> usize {
        let each = self.fields.iter().map(|field| field.cotangents());
        each.max().unwrap_or(0)
    }

    /// Those of one field after the other.
    fn sums(&self) -> usize {
        self.fields.iter().map(|field| field.sums()).sum()
    }

    fn scratch(&self, pairs: usize) -> usize {
        let each = self.fields.iter().map(|field| field.scratch(pairs));
        each.max().unwrap_or(0)
    }

    fn parameters(&self) -> usize {
        self.fields.iter().map(|field| field.parameters()).sum()
    }

    /// All or nothing: fields have parts of their own.
    fn parts(&self) -> Vec<Part> {
        vec![Part {
            features: [0..self.kept, 0..0],
            work: 0,
        }]
    }

    fn velocity(&self, at: &At<'_, T>, kept: &mut [T], k: Option<&mut [T]>) {
        let (field, slot) = self.turn(at, kept);
        field.velocity(at, slot, k);
    }

    fn recall(&self, at: &At<'_, T>, kept: &mut [T], _: &[bool]) {
        let (field, slot) = self.turn(at, kept);
        field.recall(at, slot, &vec![true; field.parts().len()]);
    }

    fn vjp(&self, kept: &[T], cotangents: &mut [T], w: &mut [T]) {
        let field = &*self.fields[self.number(kept)];
        let size = field.cotangents() * self.batch();
        field.vjp(self.own(field, kept), &mut cotangents[..size], w);
    }

    fn accumulate(&self, window: &[Slot<'_, T>], scratch: &mut [T], sums: &mut [T]) {
        let mut rest = sums;
        for (number, field) in self.fields.iter().enumerate() {
            let sums;
            (sums, rest) = rest.split_at_mut(field.sums());
            let of_field = window
                .iter()
                .filter(|slot| self.number(slot.kept) == number);
            let of_field = of_field.map(|slot| Slot {
                kept: self.own(&**field, slot.kept),
                cotangents: &slot.cotangents[..field.cotangents() * self.batch()],
            });
            let of_field: Vec<_> = of_field.collect();
            if !of_field.is_empty() {
                field.accumulate(&of_field, scratch, sums);
            }
        }
    }

    fn gradients(&self, sums: &[T]) -> Vec<T> {
        let (mut gradients, mut rest) = (Vec::with_capacity(self.parameters()), sums);
        for field in &self.fields {
            let sums;
            (sums, rest) = rest.split_at(field.sums());
            gradients.extend(field.gradients(sums));
        }
        gradients
    }
}
