//! A field over tiles.

use pulp::Simd;

use super::activations::Part;
use super::lanewise::{Lanewise, On};
use crate::simd::{enter, Element, Kernel};

/// When and what a tile is evaluated: the time of every lane, V vectors of them, and its row in the batch.
#[derive(Clone, Copy)]
pub(crate) struct At<'a, X> {
    pub(crate) times: &'a [X],
    /// For fields that know something of each row.
    pub(crate) rows: &'a [usize],
    /// For fields that jump: the time of every lane and its step, or one for all.
    pub(super) instants: &'a [Instant],
    /// Whether the state, its error, or an output inside the step reads this velocity.  Otherwise only other stages
    /// do, and features of y that f does not depend on need no velocity.
    pub(crate) is_weighed: bool,
    /// Whether an evaluation is repeated to be pulled back.  Then only other stages read the velocity, but everything
    /// that is kept must still be computed.
    pub(crate) is_repeated: bool,
}

impl<X> At<'_, X> {
    /// The time of a lane and its step.
    pub(crate) fn instant(&self, lane: usize) -> Instant {
        match self.instants {
            [all] => *all,
            each => each[lane],
        }
    }
}

/// A time in f64, and the step that it lies in, from start to end.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Instant {
    pub(crate) t: f64,
    pub(crate) step: [f64; 2],
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

    /// Computes what depends on time alone, for these times and before any evaluation, if all lanes of a tile are at one
    /// time ([`RowField::shares_time`](super::RowField::shares_time)).  Other times may come, too.
    fn prepare<S: Simd>(&mut self, _: S, _times: &[T]) {}

    /// Computes f(t, y) into `k`, with t by lane, where y is the first features of `kept`, and fills the rest of `kept`; without
    /// `k`, only `kept` is filled.  Features of y that f does not depend on may be written over, and their velocity and
    /// what is kept for it may be anything finite where nothing but other stages reads them ([`At::is_weighed`]).
    fn velocity<S: Simd, const V: usize>(
        &self,
        s: S,
        at: &At<'_, T::Vector<S>>,
        kept: &mut [T::Vector<S>],
        k: Option<&mut [T::Vector<S>]>,
    );

    /// The feature of a slot that holds the time, if one does.
    fn time_place(&self) -> Option<usize> {
        None
    }

    /// What may be kept of an evaluation by itself, the stage first; by default all or nothing.
    fn parts(&self) -> Vec<Part> {
        vec![Part {
            features: [0..self.kept(), 0..0],
            work: 0,
        }]
    }

    /// Computes the missing parts of `kept`.  The parts marked in `known`, always including the first, are
    /// already in place, perhaps in a lower precision.  By default nothing is missing, and the time is written again.
    #[inline(always)]
    fn recall<S: Simd, const V: usize>(
        &self,
        _: S,
        at: &At<'_, T::Vector<S>>,
        kept: &mut [T::Vector<S>],
        _known: &[bool],
    ) {
        if let Some(time) = self.time_place() {
            kept[time * V..][..V].copy_from_slice(at.times);
        }
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
/// compiled once for all fields, units and widths.  Tiles are numbers `[feature][B]`.
pub(super) trait Tiled<T: Element>: Send + Sync {
    /// Rows of a tile.
    fn batch(&self) -> usize;

    /// The operations of the solver on these tiles.
    fn lanewise(&self) -> &dyn Lanewise<T>;

    /// [`TileField::kept`].
    fn kept(&self) -> usize;

    /// [`TileField::cotangents`].
    fn cotangents(&self) -> usize;

    /// Numbers of sums of gradients; see [`TileField::sums`].
    fn sums(&self) -> usize;

    /// Numbers of scratch; see [`TileField::scratch`].
    fn scratch(&self, pairs: usize) -> usize;

    /// [`TileField::parameters`].
    fn parameters(&self) -> usize;

    /// [`TileField::parts`].
    fn parts(&self) -> Vec<Part>;

    /// [`TileField::velocity`].
    fn velocity(&self, at: &At<'_, T>, kept: &mut [T], k: Option<&mut [T]>);

    /// [`TileField::recall`].
    fn recall(&self, at: &At<'_, T>, kept: &mut [T], known: &[bool]);

    /// [`TileField::vjp`].
    fn vjp(&self, kept: &[T], cotangents: &mut [T], w: &mut [T]);

    /// [`TileField::accumulate`].
    fn accumulate(&self, window: &[Slot<'_, T>], scratch: &mut [T], sums: &mut [T]);

    /// [`TileField::gradients`].
    fn gradients(&self, sums: &[T]) -> Vec<T>;
}

/// A field in tiles of V vectors of S a feature.
pub(super) struct Wide<F, S, const V: usize> {
    pub(super) field: F,
    pub(super) on: On<S>,
}

impl<T: Element, S: Simd, F: TileField<T>, const V: usize> Tiled<T> for Wide<F, S, V> {
    fn batch(&self) -> usize {
        V * T::lanes::<S>()
    }

    fn lanewise(&self) -> &dyn Lanewise<T> {
        &self.on
    }

    fn kept(&self) -> usize {
        self.field.kept()
    }

    fn cotangents(&self) -> usize {
        self.field.cotangents::<S>()
    }

    fn sums(&self) -> usize {
        self.field.sums::<S>() * T::lanes::<S>()
    }

    fn scratch(&self, pairs: usize) -> usize {
        self.field.scratch::<S, V>(pairs) * T::lanes::<S>()
    }

    fn parameters(&self) -> usize {
        self.field.parameters()
    }

    fn parts(&self) -> Vec<Part> {
        self.field.parts()
    }

    fn velocity(&self, at: &At<'_, T>, kept: &mut [T], k: Option<&mut [T]>) {
        let velocity = Velocity::<T, S, F, V> {
            field: &self.field,
            at: &at.vectors::<S>(),
            kept: T::vectors_mut::<S>(kept),
            k: k.map(T::vectors_mut::<S>),
        };
        enter(self.on.0, velocity);
    }

    fn recall(&self, at: &At<'_, T>, kept: &mut [T], known: &[bool]) {
        let recall = Recall::<T, S, F, V> {
            field: &self.field,
            at: &at.vectors::<S>(),
            kept: T::vectors_mut::<S>(kept),
            known,
        };
        enter(self.on.0, recall);
    }

    fn vjp(&self, kept: &[T], cotangents: &mut [T], w: &mut [T]) {
        let vjp = Vjp::<T, S, F, V> {
            field: &self.field,
            kept: T::vectors::<S>(kept),
            cotangents: T::vectors_mut::<S>(cotangents),
            w: T::vectors_mut::<S>(w),
        };
        enter(self.on.0, vjp);
    }

    fn accumulate(&self, window: &[Slot<'_, T>], scratch: &mut [T], sums: &mut [T]) {
        let slots = window.iter().map(|slot| Slot {
            kept: T::vectors::<S>(slot.kept),
            cotangents: T::vectors::<S>(slot.cotangents),
        });
        let accumulate = Accumulate::<T, S, F, V> {
            field: &self.field,
            window: &slots.collect::<Vec<_>>(),
            scratch: T::vectors_mut::<S>(scratch),
            sums: T::vectors_mut::<S>(sums),
        };
        enter(self.on.0, accumulate);
    }

    fn gradients(&self, sums: &[T]) -> Vec<T> {
        let gradients = GradientsOfTile::<T, S, F> {
            field: &self.field,
            sums: T::vectors::<S>(sums),
        };
        enter(self.on.0, gradients)
    }
}

impl<T: Element> At<'_, T> {
    /// The same in vectors.
    fn vectors<S: Simd>(&self) -> At<'_, T::Vector<S>> {
        At {
            times: T::vectors::<S>(self.times),
            rows: self.rows,
            instants: self.instants,
            is_weighed: self.is_weighed,
            is_repeated: self.is_repeated,
        }
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
