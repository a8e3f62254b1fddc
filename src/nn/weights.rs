//! A matrix over tiles: its products, and the sums of its gradient.

use pulp::Simd;

use crate::rows::Slot;
use crate::simd::product::{outer_room, padded, Dot, Outer, Packed, Pair};
use crate::simd::{enter, scalars, scalars_mut, Element};

/// W of `outputs` rows and `inputs` columns.
pub(super) struct Weights<T> {
    pub(super) inputs: usize,
    pub(super) outputs: usize,
    /// W.
    pub(super) forward: Packed<T>,
    /// Wᵀ, of the inputs that cotangents go back to.
    pub(super) adjoint: Packed<T>,
}

/// Where the inputs of a product and the cotangents of its outputs lie in a slot, in features.
#[derive(Clone, Copy)]
pub(super) struct Place {
    pub(super) read: usize,
    pub(super) left: usize,
}

/// The operands of a product, evaluation by evaluation.
#[inline(always)]
pub(super) fn fill<'a, X, const V: usize>(
    pairs: &mut Vec<Pair<'a, X>>,
    window: &[Slot<'a, X>],
    place: Place,
    inputs: usize,
) {
    pairs.clear();
    for slot in window {
        pairs.push(Pair {
            x: &slot.kept[place.read * V..][..inputs * V],
            g: &slot.cotangents[place.left * V..],
        });
    }
}

impl<T: Element> Weights<T> {
    /// Packs `weight`, `[output][input]`; cotangents go back to the first `pulled` inputs.
    pub(super) fn new<S: Simd>(weight: &[T], outputs: usize, inputs: usize, pulled: usize) -> Self {
        Self {
            inputs,
            outputs,
            forward: Packed::of_rows::<S>(outputs, inputs, weight),
            adjoint: Packed::of_columns::<S>(pulled, inputs, weight),
        }
    }

    /// Whether dW is formed with outputs in the lanes.
    fn is_wide<S: Simd>(&self) -> bool {
        self.inputs.min(self.outputs) >= T::lanes::<S>()
    }

    /// Vectors of the sums of dW.
    pub(super) fn sums<S: Simd>(&self) -> usize {
        let numbers = if self.is_wide::<S>() {
            self.inputs * padded::<T, S>(self.outputs)
        } else {
            (self.inputs * self.outputs).next_multiple_of(T::lanes::<S>())
        };
        numbers / T::lanes::<S>()
    }

    /// Vectors of room that [`accumulate`](Self::accumulate) needs.
    pub(super) fn room<S: Simd, const V: usize>(&self, pairs: usize) -> usize {
        if self.is_wide::<S>() {
            outer_room::<T, S, V>(pairs)
        } else {
            0
        }
    }

    /// Adds dW = Σ g xᵀ to the sums.
    #[inline(always)]
    pub(super) fn accumulate<S: Simd, const V: usize>(
        &self,
        s: S,
        pairs: &[Pair<'_, T::Vector<S>>],
        room: &mut [T::Vector<S>],
        sums: &mut [T::Vector<S>],
    ) {
        if self.is_wide::<S>() {
            let outer = Outer::<T, S, V> {
                inputs: self.inputs,
                outputs: padded::<T, S>(self.outputs),
                window: pairs,
                turned: room,
                sums,
            };
            enter(s, outer);
        } else {
            let dot = Dot::<T, S, V> {
                inputs: self.inputs,
                outputs: self.outputs,
                window: pairs,
                sums: scalars_mut::<T, S>(sums),
            };
            enter(s, dot);
        }
    }

    /// Appends the sums as dW, `[output][input]`.
    pub(super) fn gradient<S: Simd>(&self, sums: &[T::Vector<S>], to: &mut Vec<T>) {
        let sums = scalars::<T, S>(sums);
        let size = self.outputs * self.inputs;
        if !self.is_wide::<S>() {
            to.extend_from_slice(&sums[..size]);
            return;
        }
        let from = to.len();
        to.resize(from + size, T::default());
        let across = padded::<T, S>(self.outputs);
        // A vector's outputs at a time, so that what is read at once lies together.
        let blocks = to[from..].chunks_mut(T::lanes::<S>() * self.inputs);
        for (block, rows) in blocks.enumerate() {
            let first = block * T::lanes::<S>();
            for i in 0..self.inputs {
                let column = &sums[i * across + first..];
                for (row, x) in rows.chunks_exact_mut(self.inputs).zip(column) {
                    row[i] = *x;
                }
            }
        }
    }
}
