//! A field over tiles.

use pulp::Simd;

use super::activations::Part;
use crate::simd::{enter, Element, Kernel};

/// When and what a tile is evaluated: the time of every lane, V vectors of them, and its row in the batch.
#[derive(Clone, Copy)]
pub(crate) struct At<'a, X> {
    pub(crate) times: &'a [X],
    /// For fields that know something of each row.
    #[allow(dead_code)]
    pub(crate) rows: &'a [usize],
}

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

    /// Vectors of scratch that `accumulate` needs for a window of so many pairs.
    fn scratch<S: Simd, const V: usize>(&self, pairs: usize) -> usize;

    /// Numbers of all parameters.
    fn parameters(&self) -> usize;

    /// Computes f(t, y) into `k`, with t by lane, where y is the first features of `kept`, and fills the rest of `kept`; without
    /// `k`, only `kept` is filled.
    fn velocity<S: Simd, const V: usize>(
        &self,
        s: S,
        at: &At<'_, T::Vector<S>>,
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

    /// Computes the missing parts of `kept`.  The parts marked in `known`, always including the first, are
    /// already in place.
    fn recall<S: Simd, const V: usize>(
        &self,
        _: S,
        _: &At<'_, T::Vector<S>>,
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
        scratch: &mut [T::Vector<S>],
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

/// A type-erased [`TileField`] for one vector unit and one tile width, so that the loops over steps are
/// compiled once for all fields and widths.
pub(super) trait Tiled<T: Element, S: Simd>: Send + Sync {
    /// Vectors of a feature.
    fn width(&self) -> usize;

    /// [`TileField::kept`].
    fn kept(&self) -> usize;

    /// [`TileField::cotangents`].
    fn cotangents(&self) -> usize;

    /// [`TileField::sums`].
    fn sums(&self) -> usize;

    /// [`TileField::scratch`].
    fn scratch(&self, pairs: usize) -> usize;

    /// [`TileField::parameters`].
    fn parameters(&self) -> usize;

    /// [`TileField::parts`].
    fn parts(&self) -> Vec<Part>;

    /// [`TileField::velocity`].
    fn velocity(
        &self,
        s: S,
        at: &At<'_, T::Vector<S>>,
        kept: &mut [T::Vector<S>],
        k: Option<&mut [T::Vector<S>]>,
    );

    /// [`TileField::recall`].
    fn recall(&self, s: S, at: &At<'_, T::Vector<S>>, kept: &mut [T::Vector<S>], known: &[bool]);

    /// [`TileField::vjp`].
    fn vjp(
        &self,
        s: S,
        kept: &[T::Vector<S>],
        cotangents: &mut [T::Vector<S>],
        w: &mut [T::Vector<S>],
    );

    /// [`TileField::accumulate`].
    fn accumulate(
        &self,
        s: S,
        window: &[Slot<'_, T::Vector<S>>],
        scratch: &mut [T::Vector<S>],
        sums: &mut [T::Vector<S>],
    );

    /// [`TileField::gradients`].
    fn gradients(&self, s: S, sums: &[T::Vector<S>]) -> Vec<T>;
}

/// A field in tiles of V vectors a feature.
pub(super) struct Wide<F, const V: usize>(pub(super) F);

impl<T: Element, S: Simd, F: TileField<T>, const V: usize> Tiled<T, S> for Wide<F, V> {
    fn width(&self) -> usize {
        V
    }

    fn kept(&self) -> usize {
        self.0.kept()
    }

    fn cotangents(&self) -> usize {
        self.0.cotangents::<S>()
    }

    fn sums(&self) -> usize {
        self.0.sums::<S>()
    }

    fn scratch(&self, pairs: usize) -> usize {
        self.0.scratch::<S, V>(pairs)
    }

    fn parameters(&self) -> usize {
        self.0.parameters()
    }

    fn parts(&self) -> Vec<Part> {
        self.0.parts()
    }

    fn velocity(
        &self,
        s: S,
        at: &At<'_, T::Vector<S>>,
        kept: &mut [T::Vector<S>],
        k: Option<&mut [T::Vector<S>]>,
    ) {
        let field = &self.0;
        enter(s, Velocity::<T, S, F, V> { field, at, kept, k });
    }

    fn recall(&self, s: S, at: &At<'_, T::Vector<S>>, kept: &mut [T::Vector<S>], known: &[bool]) {
        let recall = Recall::<T, S, F, V> {
            field: &self.0,
            at,
            kept,
            known,
        };
        enter(s, recall);
    }

    fn vjp(
        &self,
        s: S,
        kept: &[T::Vector<S>],
        cotangents: &mut [T::Vector<S>],
        w: &mut [T::Vector<S>],
    ) {
        let vjp = Vjp::<T, S, F, V> {
            field: &self.0,
            kept,
            cotangents,
            w,
        };
        enter(s, vjp);
    }

    fn accumulate(
        &self,
        s: S,
        window: &[Slot<'_, T::Vector<S>>],
        scratch: &mut [T::Vector<S>],
        sums: &mut [T::Vector<S>],
    ) {
        let accumulate = Accumulate::<T, S, F, V> {
            field: &self.0,
            window,
            scratch,
            sums,
        };
        enter(s, accumulate);
    }

    fn gradients(&self, s: S, sums: &[T::Vector<S>]) -> Vec<T> {
        enter(
            s,
            GradientsOfTile::<T, S, F> {
                field: &self.0,
                sums,
            },
        )
    }
}

/// [`TileField::velocity`], in code for the vector unit; so are the others below.
struct Velocity<'a, T: Element, S: Simd, F, const V: usize> {
    field: &'a F,
    at: &'a At<'a, T::Vector<S>>,
    kept: &'a mut [T::Vector<S>],
    k: Option<&'a mut [T::Vector<S>]>,
}

impl<T: Element, S: Simd, F: TileField<T>, const V: usize> Kernel<S> for Velocity<'_, T, S, F, V> {
    type Output = ();

    #[inline(always)]
    fn run(self, s: S) {
        self.field.velocity::<S, V>(s, self.at, self.kept, self.k);
    }
}

struct Recall<'a, T: Element, S: Simd, F, const V: usize> {
    field: &'a F,
    at: &'a At<'a, T::Vector<S>>,
    kept: &'a mut [T::Vector<S>],
    known: &'a [bool],
}

impl<T: Element, S: Simd, F: TileField<T>, const V: usize> Kernel<S> for Recall<'_, T, S, F, V> {
    type Output = ();

    #[inline(always)]
    fn run(self, s: S) {
        self.field.recall::<S, V>(s, self.at, self.kept, self.known);
    }
}

struct Vjp<'a, T: Element, S: Simd, F, const V: usize> {
    field: &'a F,
    kept: &'a [T::Vector<S>],
    cotangents: &'a mut [T::Vector<S>],
    w: &'a mut [T::Vector<S>],
}

impl<T: Element, S: Simd, F: TileField<T>, const V: usize> Kernel<S> for Vjp<'_, T, S, F, V> {
    type Output = ();

    #[inline(always)]
    fn run(self, s: S) {
        self.field
            .vjp::<S, V>(s, self.kept, self.cotangents, self.w);
    }
}

struct Accumulate<'a, T: Element, S: Simd, F, const V: usize> {
    field: &'a F,
    window: &'a [Slot<'a, T::Vector<S>>],
    scratch: &'a mut [T::Vector<S>],
    sums: &'a mut [T::Vector<S>],
}

impl<T: Element, S: Simd, F: TileField<T>, const V: usize> Kernel<S>
    for Accumulate<'_, T, S, F, V>
{
    type Output = ();

    #[inline(always)]
    fn run(self, s: S) {
        self.field
            .accumulate::<S, V>(s, self.window, self.scratch, self.sums);
    }
}

struct GradientsOfTile<'a, T: Element, S: Simd, F> {
    field: &'a F,
    sums: &'a [T::Vector<S>],
}

impl<T: Element, S: Simd, F: TileField<T>> Kernel<S> for GradientsOfTile<'_, T, S, F> {
    type Output = Vec<T>;

    #[inline(always)]
    fn run(self, s: S) -> Vec<T> {
        self.field.gradients::<S>(s, self.sums)
    }
}
