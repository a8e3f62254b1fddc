//! What the forward pass keeps of its evaluations, so that the backward pass need not repeat them.

use std::marker::PhantomData;
use std::ops::Range;

use half::bf16;
use pulp::Simd;

use super::lanewise::Lanewise;
use crate::error::{Error, Result};
use crate::problem::ActivationCache;
use crate::simd::scratch::Scratch;
use crate::simd::{Element, Kernel};

/// A part of what an evaluation keeps in its slot.
#[derive(Clone, Debug)]
pub(crate) struct Part {
    /// Features of the slot, in up to two places; an empty range for none.
    pub(crate) features: [Range<usize>; 2],
    /// Products of a row that are saved by having it.
    pub(crate) work: usize,
}

impl Part {
    fn size(&self) -> usize {
        self.features.iter().map(Range::len).sum()
    }
}

/// Which parts are kept of which steps.
#[derive(Clone, Debug)]
pub(super) struct Selection {
    parts: Vec<Part>,
    /// The first step that each part is kept of, all later ones too: the backward pass begins there.
    from: Vec<usize>,
    size: Size,
    low: bool,
    /// Whether slots are kept as they are, and need not be copied.
    whole: bool,
}

/// What there is to keep: of so many rows, those that fill up the last tile too.
#[derive(Clone, Copy, Debug)]
pub(super) struct Size {
    pub(super) rows: usize,
    /// Features of a slot.
    pub(super) features: usize,
    pub(super) stages: usize,
    pub(super) steps: usize,
}

impl Selection {
    /// The parts that save most work a byte, of as many steps as the bytes are enough for.  The first
    /// part is the stage, without which no other is of use.
    pub(super) fn new<T>(parts: Vec<Part>, cache: ActivationCache, size: Size) -> Self {
        let worth = |p: &usize| match p {
            0 => f64::INFINITY,
            p => parts[*p].work as f64 / parts[*p].size().max(1) as f64,
        };
        let mut order: Vec<_> = (0..parts.len()).collect();
        order.sort_by(|p, q| worth(q).total_cmp(&worth(p)));
        let mut selection = Self {
            from: vec![size.steps; parts.len()],
            parts,
            size,
            low: cache.low,
            whole: false,
        };
        let mut left = cache.bytes;
        for p in order {
            let number = selection.bytes_of_number::<T>() * size.stages;
            let step = number.saturating_mul(size.rows);
            let step = selection.parts[p].size().saturating_mul(step);
            let most = match p {
                0 => size.steps,
                _ => size.steps - selection.from[0],
            };
            let kept = (left / step.max(1)).min(most);
            selection.from[p] = size.steps - kept;
            left -= kept * step;
        }
        let features: usize = selection.parts.iter().map(Part::size).sum();
        let alike = selection.from.iter().all(|&from| from == selection.from[0]);
        selection.whole = alike && !cache.low && features == size.features;
        selection
    }

    /// Whether the slots of step n are kept as they are.
    pub(super) fn has_whole(&self, n: usize) -> bool {
        self.whole && self.knows(n)
    }

    /// Whether the stages of step n are kept.
    pub(super) fn knows(&self, n: usize) -> bool {
        self.from[0] <= n
    }

    /// Whether every part is kept of step n.
    pub(super) fn knows_all(&self, n: usize) -> bool {
        self.from.iter().all(|&from| from <= n)
    }

    /// Whether each part is kept of step n.
    pub(super) fn known(&self, n: usize) -> Vec<bool> {
        self.from.iter().map(|&from| from <= n).collect()
    }

    /// Bytes kept of all rows.
    pub(super) fn bytes<T>(&self) -> u128 {
        self.numbers(self.size.rows) * self.bytes_of_number::<T>() as u128
    }

    /// Numbers kept of so many rows.
    fn numbers(&self, rows: usize) -> u128 {
        let Size { stages, steps, .. } = self.size;
        let parts = self.parts.iter().zip(&self.from);
        let of_row =
            |(part, from): (&Part, &usize)| (steps - from) as u128 * (stages * part.size()) as u128;
        parts.map(of_row).sum::<u128>() * rows as u128
    }

    fn bytes_of_number<T>(&self) -> usize {
        if self.low {
            size_of::<bf16>()
        } else {
            size_of::<T>()
        }
    }
}

/// What is kept of the evaluations of one tile, part by part, `[step][stage][feature][row]`; whole
/// slots are one part.
pub(super) struct KeptEvaluations<T> {
    scratch: Scratch,
    /// Where each part begins, in numbers.
    starts: Vec<usize>,
    number: PhantomData<T>,
}

impl<T: Element> KeptEvaluations<T> {
    /// Scratch for a tile of so many rows.
    pub(super) fn new(selection: &Selection, rows: usize) -> Result<Self> {
        let bytes = selection.numbers(rows) * selection.bytes_of_number::<T>() as u128;
        let what = "kept evaluations";
        let scratch = usize::try_from(bytes).ok().and_then(Scratch::try_new);
        let scratch = scratch.ok_or(Error::AllocationFailed { what, bytes })?;
        let Size { stages, steps, .. } = selection.size;
        let (mut starts, mut end) = (vec![], 0);
        for (part, from) in selection.parts.iter().zip(&selection.from) {
            starts.push(end);
            end += (steps - from) * stages * part.size() * rows;
        }
        Ok(Self {
            scratch,
            starts,
            number: PhantomData,
        })
    }

    /// Where the slot of an evaluation is kept as it is.
    fn place(
        &self,
        selection: &Selection,
        (n, stage): (usize, usize),
        batch: usize,
    ) -> Option<Range<usize>> {
        let size = selection.size.features * batch;
        let evaluation = n.checked_sub(selection.from[0])? * selection.size.stages + stage;
        selection
            .whole
            .then_some(evaluation * size..(evaluation + 1) * size)
    }

    /// The slot of an evaluation, if it is kept as it is.
    #[inline(always)]
    pub(super) fn slot(
        &self,
        selection: &Selection,
        at: (usize, usize),
        batch: usize,
    ) -> Option<&[T]> {
        let place = self.place(selection, at, batch)?;
        Some(&self.scratch.numbers::<T>()[place])
    }

    /// The same to write.
    #[inline(always)]
    pub(super) fn slot_mut(
        &mut self,
        selection: &Selection,
        at: (usize, usize),
        batch: usize,
    ) -> Option<&mut [T]> {
        let place = self.place(selection, at, batch)?;
        Some(&mut self.scratch.numbers_mut::<T>()[place])
    }

    /// Keeps what is wanted of an evaluation, in parts.
    pub(super) fn save(
        &mut self,
        on: &dyn Lanewise<T>,
        selection: &Selection,
        at: (usize, usize),
        slot: &[T],
        rows: usize,
    ) {
        on.save(Save {
            kept: self,
            selection,
            at,
            slot,
            rows,
        });
    }

    /// Puts what was kept of an evaluation back.
    pub(super) fn load(
        &self,
        on: &dyn Lanewise<T>,
        selection: &Selection,
        at: (usize, usize),
        slot: &mut [T],
        rows: usize,
    ) {
        on.load(Load {
            kept: self,
            selection,
            at,
            slot,
            rows,
        });
    }
}

/// [`KeptEvaluations::save`].
pub(super) struct Save<'a, T> {
    kept: &'a mut KeptEvaluations<T>,
    selection: &'a Selection,
    at: (usize, usize),
    slot: &'a [T],
    rows: usize,
}

impl<T: Element, S: Simd> Kernel<S> for Save<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run(self, _: S) {
        let (selection, rows, (n, stage)) = (self.selection, self.rows, self.at);
        for (p, (part, &from)) in selection.parts.iter().zip(&selection.from).enumerate() {
            if n < from {
                continue;
            }
            let evaluation = (n - from) * selection.size.stages + stage;
            let mut at = self.kept.starts[p] + evaluation * part.size() * rows;
            for features in &part.features {
                let x = &self.slot[features.start * rows..features.end * rows];
                if selection.low {
                    let kept = &mut self.kept.scratch.numbers_mut::<bf16>()[at..][..x.len()];
                    for (kept, x) in kept.iter_mut().zip(x) {
                        *kept = narrowed(x.to_f64() as f32);
                    }
                } else {
                    self.kept.scratch.numbers_mut::<T>()[at..][..x.len()].copy_from_slice(x);
                }
                at += x.len();
            }
        }
    }
}

/// [`KeptEvaluations::load`].
pub(super) struct Load<'a, T> {
    kept: &'a KeptEvaluations<T>,
    selection: &'a Selection,
    at: (usize, usize),
    slot: &'a mut [T],
    rows: usize,
}

impl<T: Element, S: Simd> Kernel<S> for Load<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run(self, _: S) {
        let (selection, rows, (n, stage)) = (self.selection, self.rows, self.at);
        for (p, (part, &from)) in selection.parts.iter().zip(&selection.from).enumerate() {
            if n < from {
                continue;
            }
            let evaluation = (n - from) * selection.size.stages + stage;
            let mut at = self.kept.starts[p] + evaluation * part.size() * rows;
            for features in &part.features {
                let x = &mut self.slot[features.start * rows..features.end * rows];
                if selection.low {
                    let kept = &self.kept.scratch.numbers::<bf16>()[at..];
                    for (x, kept) in x.iter_mut().zip(kept) {
                        *x = T::of(f32::from_bits(u32::from(kept.to_bits()) << 16).into());
                    }
                } else {
                    x.copy_from_slice(&self.kept.scratch.numbers::<T>()[at..][..x.len()]);
                }
                at += x.len();
            }
        }
    }
}

/// To bf16, to nearest even.  A NaN or an infinity is not kept: the step would have failed.
#[inline(always)]
fn narrowed(x: f32) -> bf16 {
    let bits = x.to_bits();
    let carried = bits.wrapping_add(0x7fff + ((bits >> 16) & 1));
    bf16::from_bits((carried >> 16) as u16)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parts() -> Vec<Part> {
        let part = |features: Range<usize>, work| Part {
            features: [features, 0..0],
            work,
        };
        // A state of 4, and layers that cost 4 and 16 products a feature.
        vec![part(0..4, 0), part(4..20, 64), part(20..36, 256)]
    }

    fn selection(bytes: usize, low: bool) -> Selection {
        let size = Size {
            rows: 10,
            features: 36,
            stages: 4,
            steps: 5,
        };
        Selection::new::<f32>(parts(), ActivationCache { bytes, low }, size)
    }

    #[test]
    fn the_part_that_saves_most_work_a_byte_is_kept_first() {
        let all = 5 * 4 * 10 * 4 * 36;
        assert_eq!(selection(all, false).from, [0, 0, 0]);
        assert_eq!(selection(usize::MAX, false).from, [0, 0, 0]);
        // The stages, and the dear layer of three steps.
        let step = 4 * 10 * 4;
        assert_eq!(selection(step * (5 * 4 + 3 * 16), false).from, [0, 5, 2]);
        assert_eq!(selection(step * (5 * 4 + 3 * 16) / 2, true).from, [0, 5, 2]);
        assert_eq!(selection(step * 4 - 1, false).from, [5, 5, 5]);
    }

    #[test]
    fn slots_are_kept_whole_where_all_of_them_is_kept_of_the_same_steps() {
        let step = 4 * 10 * 4 * 36;
        for (bytes, low, whole) in [
            (usize::MAX, false, [true; 5]),
            (usize::MAX, true, [false; 5]),
            (3 * step, false, [false; 5]),
        ] {
            let selection = selection(bytes, low);
            assert_eq!([0, 1, 2, 3, 4].map(|n| selection.has_whole(n)), whole);
        }
        // One part that is all there is, of the last three steps.
        let size = Size {
            rows: 10,
            features: 36,
            stages: 4,
            steps: 5,
        };
        let part = Part {
            features: [0..20, 20..36],
            work: 0,
        };
        let cache = ActivationCache::within(3 * step);
        let selection = Selection::new::<f32>(vec![part], cache, size);
        let whole = [false, false, true, true, true];
        assert_eq!([0, 1, 2, 3, 4].map(|n| selection.has_whole(n)), whole);
    }

    #[test]
    fn what_is_kept_stays_within_the_bytes_and_is_of_use() {
        for bytes in (0..60_000).step_by(97) {
            for low in [false, true] {
                let selection = selection(bytes, low);
                assert!(selection.bytes::<f32>() <= bytes as u128);
                assert!(selection.from.iter().all(|from| *from >= selection.from[0]));
            }
        }
        // A rest that is too small for another stage, and enough for a thin layer.
        let part = |features, work| Part {
            features: [features, 0..0],
            work,
        };
        let size = Size {
            rows: 1,
            features: 520,
            stages: 1,
            steps: 10,
        };
        let cache = ActivationCache::within(4 * (3 * 512 + 5 * 8));
        let thin = Selection::new::<f32>(vec![part(0..512, 0), part(512..520, 9)], cache, size);
        assert_eq!(thin.from, [7, 7]);
    }
}
