//! A field over tiles.

use pulp::Simd;

use super::activations::Part;
use crate::simd::Element;

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
