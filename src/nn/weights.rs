//! A matrix over tiles: its products, and the sums of its gradient, with rows of the batch in the lanes ([`Weights`]) or,
//! for few rows, with features in the lanes ([`RowWeights`]).

use candle_core::{Result, Storage, Tensor};
use pulp::Simd;

use crate::rows::Slot;
use crate::simd::matvec::{Across, OuterOfRows};
use crate::simd::outer::{outer_room, Dot, Outer, Pair};
use crate::simd::packed::Packed;
use crate::simd::product::{padded, Product, Transpose};
use crate::simd::{aligned, enter, scalars, Aligned, Element};

/// The weights of a layer over tiles, in one of two layouts.
pub(crate) trait LayerWeights<T: Element>: Send + Sync + Sized {
    type Matrix: Product<T>;

    /// Packs `weight`, `[output][input]`; cotangents go back to the first `pulled` inputs.
    fn pack<S: Simd>(s: S, weight: &[T], outputs: usize, inputs: usize, pulled: usize) -> Self;

    /// A bias as products read it.
    fn bias<S: Simd>(bias: &[T]) -> Aligned<T>;

    /// Features of a tile that hold the inputs.
    fn inputs(&self) -> usize;

    /// Features of a tile that hold the outputs.
    fn outputs(&self) -> usize;

    /// Numbers of the matrix and the bias.
    fn parameters(&self) -> usize;

    /// W.
    fn forward(&self) -> &Self::Matrix;

    /// Wᵀ, of the inputs that cotangents go back to.
    fn adjoint(&self) -> &Self::Matrix;

    /// Vectors of the sums of dW.
    fn sums<S: Simd>(&self) -> usize;

    /// Vectors of scratch that [`accumulate`](Self::accumulate) needs for so many pairs.
    fn scratch<S: Simd, const V: usize>(&self, pairs: usize) -> usize;

    /// Adds dW = Σ g xᵀ to the sums.
    fn accumulate<S: Simd, const V: usize>(
        &self,
        s: S,
        pairs: &[Pair<'_, T::Vector<S>>],
        scratch: &mut [T::Vector<S>],
        sums: &mut [T::Vector<S>],
    );

    /// Appends the sums as dW, `[output][input]`.
    fn gradient<S: Simd>(&self, s: S, sums: &[T::Vector<S>], to: &mut Vec<T>);

    /// Appends the sums of g as the gradient of the bias.
    fn bias_gradient<S: Simd>(&self, s: S, sums: &[T::Vector<S>], to: &mut Vec<T>);
}

/// W of `outputs` rows and `inputs` columns.
pub(crate) struct Weights<T> {
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
    /// Whether dW is formed with outputs in the lanes.
    fn is_wide<S: Simd>(&self) -> bool {
        self.inputs.min(self.outputs) >= T::lanes::<S>()
    }
}

impl<T: Element> LayerWeights<T> for Weights<T> {
    type Matrix = Packed<T>;

    fn pack<S: Simd>(s: S, weight: &[T], outputs: usize, inputs: usize, pulled: usize) -> Self {
        Self {
            inputs,
            outputs,
            forward: Packed::of_rows(s, outputs, inputs, weight),
            adjoint: Packed::of_columns::<S>(pulled, inputs, weight),
        }
    }

    fn bias<S: Simd>(bias: &[T]) -> Aligned<T> {
        let mut copy = aligned(bias.len());
        copy.copy_from_slice(bias);
        copy
    }

    fn inputs(&self) -> usize {
        self.inputs
    }

    fn outputs(&self) -> usize {
        self.outputs
    }

    fn parameters(&self) -> usize {
        (self.inputs + 1) * self.outputs
    }

    fn forward(&self) -> &Packed<T> {
        &self.forward
    }

    fn adjoint(&self) -> &Packed<T> {
        &self.adjoint
    }

    fn sums<S: Simd>(&self) -> usize {
        if self.is_wide::<S>() {
            self.inputs * padded::<T, S>(self.outputs) / T::lanes::<S>()
        } else {
            self.inputs * self.outputs
        }
    }

    fn scratch<S: Simd, const V: usize>(&self, pairs: usize) -> usize {
        if self.is_wide::<S>() {
            outer_room::<T, S, V>(pairs)
        } else {
            0
        }
    }

    #[inline(always)]
    fn accumulate<S: Simd, const V: usize>(
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

    #[inline(always)]
    fn gradient<S: Simd>(&self, s: S, sums: &[T::Vector<S>], to: &mut Vec<T>) {
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

    #[inline(always)]
    fn bias_gradient<S: Simd>(&self, s: S, sums: &[T::Vector<S>], to: &mut Vec<T>) {
        append_totals::<T, S>(s, sums, to);
    }
}

/// W with features in the lanes: a tile holds whole vectors of inputs and outputs of each row.  Inputs that cotangents do not
/// go back to, such as time, have a vector each.
pub(crate) struct RowWeights<T> {
    inputs: usize,
    outputs: usize,
    /// Vectors of inputs and of outputs.
    across: [usize; 2],
    forward: Across<T>,
    adjoint: Across<T>,
}

/// Where so many features lie: vector and lane.
fn places(features: usize, lanes: usize) -> impl Iterator<Item = [u32; 2]> {
    (0..features).map(move |i| [(i / lanes) as u32, (i % lanes) as u32])
}

impl<T: Element> LayerWeights<T> for RowWeights<T> {
    type Matrix = Across<T>;

    fn pack<S: Simd>(_: S, weight: &[T], outputs: usize, inputs: usize, pulled: usize) -> Self {
        let lanes = T::lanes::<S>();
        let vectors = pulled.div_ceil(lanes);
        let others = (vectors..vectors + inputs - pulled).map(|vector| [vector as u32, 0]);
        let read: Vec<_> = places(pulled, lanes).chain(others).collect();
        let left = places(outputs, lanes).collect();
        Self {
            inputs,
            outputs,
            across: [vectors + inputs - pulled, outputs.div_ceil(lanes)],
            forward: Across::new::<S>(outputs, read, |o, i| weight[o * inputs + i]),
            adjoint: Across::new::<S>(pulled, left, |i, o| weight[o * inputs + i]),
        }
    }

    fn bias<S: Simd>(bias: &[T]) -> Aligned<T> {
        let mut whole = aligned(padded::<T, S>(bias.len()));
        whole[..bias.len()].copy_from_slice(bias);
        whole
    }

    fn inputs(&self) -> usize {
        self.across[0]
    }

    fn outputs(&self) -> usize {
        self.across[1]
    }

    fn parameters(&self) -> usize {
        (self.inputs + 1) * self.outputs
    }

    fn forward(&self) -> &Across<T> {
        &self.forward
    }

    fn adjoint(&self) -> &Across<T> {
        &self.adjoint
    }

    fn sums<S: Simd>(&self) -> usize {
        self.outputs * self.across[0]
    }

    fn scratch<S: Simd, const V: usize>(&self, _: usize) -> usize {
        0
    }

    #[inline(always)]
    fn accumulate<S: Simd, const V: usize>(
        &self,
        s: S,
        pairs: &[Pair<'_, T::Vector<S>>],
        _: &mut [T::Vector<S>],
        sums: &mut [T::Vector<S>],
    ) {
        let outer = OuterOfRows::<T, S, V> {
            outputs: self.outputs,
            across: self.across[0],
            window: pairs,
            sums,
        };
        enter(s, outer);
    }

    #[inline(always)]
    fn gradient<S: Simd>(&self, _: S, sums: &[T::Vector<S>], to: &mut Vec<T>) {
        let (lanes, all) = (T::lanes::<S>(), scalars::<T, S>(sums));
        for output in all.chunks_exact((self.across[0] * lanes).max(1)) {
            let at = |[vector, lane]: &[u32; 2]| output[*vector as usize * lanes + *lane as usize];
            to.extend(self.forward.places().iter().map(at));
        }
    }

    #[inline(always)]
    fn bias_gradient<S: Simd>(&self, _: S, sums: &[T::Vector<S>], to: &mut Vec<T>) {
        to.extend_from_slice(&scalars::<T, S>(sums)[..self.outputs]);
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
