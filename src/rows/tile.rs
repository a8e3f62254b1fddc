//! A field over tiles, and what is kept of a tile's trajectory.

use std::sync::Arc;

use candle_core::DType;
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use pulp::Simd;

use super::activations::Part;
use crate::error::Result;
use crate::simd::{scalars, scalars_mut, Element};
use crate::trajectory::Store;

/// A vector field over tiles `[feature][B]` of V vectors, with its pull-back.
///
/// An evaluation keeps what its pull-back needs in one slot, and a pull-back leaves the cotangents
/// of the products in another; from a window of such pairs the parameter gradients are collected.
pub(crate) trait TileField<T: Element>: Send + Sync {
    /// Features that an evaluation keeps; the first are the stage that it is given.
    fn kept(&self) -> usize;

    /// Features of the cotangents of a pull-back; the first are the cotangent of the velocity that
    /// it is given.
    fn cotangents<S: Simd>(&self) -> usize;

    /// Vectors of sums of gradients.
    fn sums<S: Simd>(&self) -> usize;

    /// Vectors of room that `accumulate` needs for a window of so many pairs.
    fn room<S: Simd, const V: usize>(&self, pairs: usize) -> usize;

    /// Numbers of all parameters.
    fn parameters(&self) -> usize;

    /// f(t, y), y being the first features of `kept`; without `k` only what is kept.
    fn velocity<S: Simd, const V: usize>(
        &self,
        s: S,
        t: f64,
        kept: &mut [T::Vector<S>],
        k: Option<&mut [T::Vector<S>]>,
    );

    /// What may be kept of an evaluation by itself, the stage first; by default all or nothing.
    fn parts(&self) -> Vec<Part> {
        vec![Part {
            features: [0..self.kept(), 0..0],
            work: 0,
        }]
    }

    /// Completes what an evaluation keeps, where the parts that are `known`, the first among them, are
    /// in their places.
    fn recall<S: Simd, const V: usize>(
        &self,
        _: S,
        _: f64,
        _kept: &mut [T::Vector<S>],
        _known: &[bool],
    ) {
    }

    /// vᵀ∂f/∂y into `w`, v being the first features of `cotangents`.
    fn vjp<S: Simd, const V: usize>(
        &self,
        s: S,
        kept: &[T::Vector<S>],
        cotangents: &mut [T::Vector<S>],
        w: &mut [T::Vector<S>],
    );

    /// Adds vᵀ∂f/∂θ of every pair to the sums.
    fn accumulate<S: Simd, const V: usize>(
        &self,
        s: S,
        window: &[Slot<'_, T::Vector<S>>],
        room: &mut [T::Vector<S>],
        sums: &mut [T::Vector<S>],
    );

    /// The sums as gradients, parameter after parameter, in their own order of elements.
    fn gradients<S: Simd>(&self, s: S, sums: &[T::Vector<S>]) -> Vec<T>;
}

/// What one evaluation kept and what its pull-back left.
#[derive(Clone, Copy)]
pub(crate) struct Slot<'a, X> {
    pub(crate) kept: &'a [X],
    pub(crate) cotangents: &'a [X],
}

/// A kept state of a tile, in its store precision.
#[derive(Clone, Debug)]
pub(super) enum Snapshot<T> {
    State(Arc<[T]>),
    Bf16(Arc<[bf16]>),
    F16(Arc<[f16]>),
}

impl<T: Element> Snapshot<T> {
    /// In state precision.
    pub(super) fn of<S: Simd>(y: &[T::Vector<S>]) -> Self {
        Self::State(scalars::<T, S>(y).into())
    }

    /// Back into a tile.
    pub(super) fn load<S: Simd>(&self, y: &mut [T::Vector<S>]) {
        let y = scalars_mut::<T, S>(y);
        match self {
            Self::State(kept) => y.copy_from_slice(kept),
            Self::Bf16(kept) => widen(y, kept.iter().map(|x| x.to_f32())),
            Self::F16(kept) => widen(y, kept.iter().map(|x| x.to_f32())),
        }
    }
}

fn widen<T: Element>(y: &mut [T], kept: impl Iterator<Item = f32>) {
    for (y, x) in y.iter_mut().zip(kept) {
        *y = T::of(x.into());
    }
}

/// How the states of a tile are kept: all leaves alike, since they lie in one tile.
#[derive(Clone, Debug)]
pub(super) struct TileStore {
    /// Store precision.
    dtype: DType,
    /// Of the whole batch: what is counted is what all tiles keep together.
    elements: usize,
}

impl TileStore {
    /// For states of so many elements, of the whole batch.
    pub(super) fn new(dtype: DType, elements: usize) -> Self {
        Self { dtype, elements }
    }
}

impl<T: Element> Store<Snapshot<T>> for TileStore {
    fn stored(&self, y: &Snapshot<T>) -> Result<Snapshot<T>> {
        let Snapshot::State(state) = y else {
            return Ok(y.clone());
        };
        let single = || -> Vec<f32> { state.iter().map(|y| y.to_f64() as f32).collect() };
        Ok(match self.dtype {
            DType::BF16 => {
                let mut low = vec![bf16::ZERO; state.len()];
                low.convert_from_f32_slice(&single());
                Snapshot::Bf16(low.into())
            }
            DType::F16 => {
                let mut low = vec![f16::ZERO; state.len()];
                low.convert_from_f32_slice(&single());
                Snapshot::F16(low.into())
            }
            _ => y.clone(),
        })
    }

    fn bytes(&self, y: &Snapshot<T>) -> usize {
        self.elements
            * match y {
                Snapshot::State(_) => size_of::<T>(),
                Snapshot::Bf16(_) | Snapshot::F16(_) => 2,
            }
    }
}
