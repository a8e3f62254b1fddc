//! A matrix over tiles: its products, and the sums of its gradient.

use candle_core::{Result, Storage, Tensor};
use pulp::Simd;

use crate::rows::Slot;
use crate::simd::outer::{outer_room, Dot, Outer, Pair};
use crate::simd::product::{padded, Packed, Transpose};
use crate::simd::{enter, Element};

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
    pub(super) fn new<S: Simd>(
        s: S,
        weight: &[T],
        outputs: usize,
        inputs: usize,
        pulled: usize,
    ) -> Self {
        Self {
            inputs,
            outputs,
            forward: Packed::of_rows(s, outputs, inputs, weight),
            adjoint: Packed::of_columns::<S>(pulled, inputs, weight),
        }
    }

    /// Whether dW is formed with outputs in the lanes.
    fn is_wide<S: Simd>(&self) -> bool {
        self.inputs.min(self.outputs) >= T::lanes::<S>()
    }

    /// Vectors of the sums of dW.
    pub(super) fn sums<S: Simd>(&self) -> usize {
        if self.is_wide::<S>() {
            self.inputs * padded::<T, S>(self.outputs) / T::lanes::<S>()
        } else {
            self.inputs * self.outputs
        }
    }

    /// Vectors of scratch that [`accumulate`](Self::accumulate) needs.
    pub(super) fn scratch<S: Simd, const V: usize>(&self, pairs: usize) -> usize {
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
        scratch: &mut [T::Vector<S>],
        sums: &mut [T::Vector<S>],
    ) {
        if self.is_wide::<S>() {
            let outer = Outer::<T, S, V> {
                inputs: self.inputs,
                outputs: padded::<T, S>(self.outputs),
                window: pairs,
                transposed: scratch,
                sums,
            };
            enter(s, outer);
        } else {
            let dot = Dot::<T, S, V> {
                inputs: self.inputs,
                outputs: self.outputs,
                window: pairs,
                sums,
            };
            enter(s, dot);
        }
    }

    /// Appends the sums as dW, `[output][input]`.
    #[inline(always)]
    pub(super) fn gradient<S: Simd>(&self, s: S, sums: &[T::Vector<S>], to: &mut Vec<T>) {
        let size = self.outputs * self.inputs;
        if !self.is_wide::<S>() {
            return append_totals::<T, S>(s, sums, to);
        }
        let from = to.len();
        to.resize(from + size, T::default());
        let turn = Transpose::<T, S> {
            rows: self.inputs,
            columns: self.outputs,
            from: sums,
            to: &mut to[from..],
        };
        enter(s, turn);
    }
}

/// Appends the sum of the lanes of each.
#[inline(always)]
pub(super) fn append_totals<T: Element, S: Simd>(s: S, sums: &[T::Vector<S>], to: &mut Vec<T>) {
    let from = to.len();
    to.resize(from + sums.len(), T::default());
    for (to, sum) in to[from..].iter_mut().zip(sums) {
        *to = T::total(s, *sum);
    }
}

/// What is made of all elements, in T: they are read where they are, if they are such.
pub(super) fn with_numbers<T: Element, R>(x: &Tensor, see: impl FnOnce(&[T]) -> R) -> Result<R> {
    // Before the storage is locked, which both read.
    let x = x.detach().to_dtype(T::DTYPE)?.contiguous()?;
    let (storage, layout) = x.storage_and_layout();
    match (&*storage, layout.contiguous_offsets()) {
        (Storage::Cpu(_), Some((start, end))) if start == end => Ok(see(&[])),
        (Storage::Cpu(all), Some((start, end))) => Ok(see(&all.as_slice::<T>()?[start..end])),
        _ => candle_core::bail!("weights of tiles are on the CPU"),
    }
}

/// A copy of them.
pub(super) fn numbers<T: Element>(x: &Tensor) -> Result<Vec<T>> {
    with_numbers(x, <[T]>::to_vec)
}
