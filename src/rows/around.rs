//! Fields that are made of another field over tiles, whatever field it is.

use pulp::Simd;

use super::activations::Part;
use super::tile::{At, Slot, Tiled};
use crate::simd::{enter, Element, Kernel};

/// What is made of a field f.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Around {
    /// f(t, y) − y.
    Relaxation,
    /// x' = e^s f(t, x) and s' = 0, where s is one more leaf of one feature.
    RowSpeed,
}

impl Around {
    /// Leaves that the state has more than that of f.
    pub(super) fn leaves(self) -> usize {
        usize::from(self == Self::RowSpeed)
    }

    /// The field made of `field`, whose state has so many features.
    pub(super) fn tiles<T: Element, S: Simd>(
        self,
        field: Box<dyn Tiled<T, S>>,
        dim: usize,
    ) -> Box<dyn Tiled<T, S>> {
        match self {
            Self::Relaxation => Box::new(Relaxing(field)),
            Self::RowSpeed => Box::new(Faster { field, dim }),
        }
    }
}

/// f(t, y) − y.  Slots and cotangents are those of f.
struct Relaxing<T: Element, S: Simd>(Box<dyn Tiled<T, S>>);

impl<T: Element, S: Simd> Tiled<T, S> for Relaxing<T, S> {
    fn width(&self) -> usize {
        self.0.width()
    }

    fn kept(&self) -> usize {
        self.0.kept()
    }

    fn cotangents(&self) -> usize {
        self.0.cotangents()
    }

    fn sums(&self) -> usize {
        self.0.sums()
    }

    fn scratch(&self, pairs: usize) -> usize {
        self.0.scratch(pairs)
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
        let Some(out) = k else {
            return self.0.velocity(s, at, kept, None);
        };
        self.0.velocity(s, at, kept, Some(&mut *out));
        enter(s, Subtract::<T, S> { x: kept, out });
    }

    fn recall(&self, s: S, at: &At<'_, T::Vector<S>>, kept: &mut [T::Vector<S>], known: &[bool]) {
        self.0.recall(s, at, kept, known);
    }

    fn vjp(
        &self,
        s: S,
        kept: &[T::Vector<S>],
        cotangents: &mut [T::Vector<S>],
        w: &mut [T::Vector<S>],
    ) {
        self.0.vjp(s, kept, cotangents, w);
        let (x, out) = (&*cotangents, w);
        enter(s, Subtract::<T, S> { x, out });
    }

    fn accumulate(
        &self,
        s: S,
        window: &[Slot<'_, T::Vector<S>>],
        scratch: &mut [T::Vector<S>],
        sums: &mut [T::Vector<S>],
    ) {
        self.0.accumulate(s, window, scratch, sums);
    }

    fn gradients(&self, s: S, sums: &[T::Vector<S>]) -> Vec<T> {
        self.0.gradients(s, sums)
    }
}

/// `out −= x`, as far as `out` goes.
struct Subtract<'a, T: Element, S: Simd> {
    x: &'a [T::Vector<S>],
    out: &'a mut [T::Vector<S>],
}

impl<T: Element, S: Simd> Kernel<S> for Subtract<'_, T, S> {
    type Output = ();

    #[inline(always)]
    fn run(self, s: S) {
        for (out, x) in self.out.iter_mut().zip(self.x) {
            *out = T::minus(s, *out, *x);
        }
    }
}

/// x' = e^s f(t, x), s' = 0.
///
/// A slot keeps `[x, s | x' | e^s]` and then the slot of f, cotangents are `[v_x, v_s]` and then those of f at e^s v_x.
struct Faster<T: Element, S: Simd> {
    field: Box<dyn Tiled<T, S>>,
    /// Features of x.
    dim: usize,
}

impl<T: Element, S: Simd> Faster<T, S> {
    /// Vectors of x, and of x and s.
    fn sizes(&self) -> [usize; 2] {
        [self.dim, self.dim + 1].map(|features| features * self.field.width())
    }

    /// Vectors of a slot before the slot of f.
    fn before(&self) -> usize {
        2 * self.sizes()[1]
    }
}

impl<T: Element, S: Simd> Tiled<T, S> for Faster<T, S> {
    fn width(&self) -> usize {
        self.field.width()
    }

    fn kept(&self) -> usize {
        2 * (self.dim + 1) + self.field.kept()
    }

    fn cotangents(&self) -> usize {
        self.dim + 1 + self.field.cotangents()
    }

    fn sums(&self) -> usize {
        self.field.sums()
    }

    fn scratch(&self, pairs: usize) -> usize {
        self.field.scratch(pairs)
    }

    fn parameters(&self) -> usize {
        self.field.parameters()
    }

    /// All or nothing: x' is no part of what f keeps.
    fn parts(&self) -> Vec<Part> {
        vec![Part {
            features: [0..self.kept(), 0..0],
            work: 0,
        }]
    }

    fn velocity(
        &self,
        s: S,
        at: &At<'_, T::Vector<S>>,
        kept: &mut [T::Vector<S>],
        k: Option<&mut [T::Vector<S>]>,
    ) {
        let [x, all] = self.sizes();
        let (state, rest) = kept.split_at_mut(all);
        let (velocity, slot) = rest.split_at_mut(all);
        let (velocity, factor) = velocity.split_at_mut(x);
        slot[..x].copy_from_slice(&state[..x]);
        // The pull-back to s reads it, whether or not it is asked for.
        self.field.velocity(s, at, slot, Some(&mut *velocity));
        let speed = &state[x..];
        enter(s, Exponential::<T, S> { speed, factor });
        let (by, out) = (&*factor, &mut *velocity);
        enter(s, Multiply::<T, S> { by, out });
        if let Some(k) = k {
            k[..x].copy_from_slice(velocity);
            k[x..].fill(T::zeros::<S>());
        }
    }

    fn recall(&self, _: S, _: &At<'_, T::Vector<S>>, _: &mut [T::Vector<S>], _: &[bool]) {}

    fn vjp(
        &self,
        s: S,
        kept: &[T::Vector<S>],
        cotangents: &mut [T::Vector<S>],
        w: &mut [T::Vector<S>],
    ) {
        let [x, all] = self.sizes();
        let (velocity, slot) = kept[all..].split_at(all);
        let (velocity, factor) = velocity.split_at(x);
        let (v, of_field) = cotangents.split_at_mut(all);
        let (w, of_speed) = w.split_at_mut(x);
        of_field[..x].copy_from_slice(&v[..x]);
        let (by, out) = (factor, &mut of_field[..x]);
        enter(s, Multiply::<T, S> { by, out });
        self.field.vjp(s, slot, of_field, w);
        let product = DotByLane::<T, S> {
            x: &v[..x],
            y: velocity,
            out: of_speed,
        };
        enter(s, product);
    }

    fn accumulate(
        &self,
        s: S,
        window: &[Slot<'_, T::Vector<S>>],
        scratch: &mut [T::Vector<S>],
        sums: &mut [T::Vector<S>],
    ) {
        let mut of_field = Vec::with_capacity(window.len());
        for slot in window {
            of_field.push(Slot {
                kept: &slot.kept[self.before()..],
                cotangents: &slot.cotangents[self.sizes()[1]..],
            });
        }
        self.field.accumulate(s, &of_field, scratch, sums);
    }

    fn gradients(&self, s: S, sums: &[T::Vector<S>]) -> Vec<T> {
        self.field.gradients(s, sums)
    }
}

/// `factor = e^speed`.
struct Exponential<'a, T: Element, S: Simd> {
    speed: &'a [T::Vector<S>],
    factor: &'a mut [T::Vector<S>],
}

impl<T: Element, S: Simd> Kernel<S> for Exponential<'_, T, S> {
    type Output = ();

    #[inline(always)]
    fn run(self, s: S) {
        for (factor, speed) in self.factor.iter_mut().zip(self.speed) {
            *factor = T::exp(s, *speed);
        }
    }
}

/// Every feature of `out` times the one of `by`.
struct Multiply<'a, T: Element, S: Simd> {
    by: &'a [T::Vector<S>],
    out: &'a mut [T::Vector<S>],
}

impl<T: Element, S: Simd> Kernel<S> for Multiply<'_, T, S> {
    type Output = ();

    #[inline(always)]
    fn run(self, s: S) {
        for out in self.out.chunks_exact_mut(self.by.len()) {
            for (out, by) in out.iter_mut().zip(self.by) {
                *out = T::times(s, *out, *by);
            }
        }
    }
}

/// `out = Σ_k x_k y_k`, a feature, by lane.
struct DotByLane<'a, T: Element, S: Simd> {
    x: &'a [T::Vector<S>],
    y: &'a [T::Vector<S>],
    out: &'a mut [T::Vector<S>],
}

impl<T: Element, S: Simd> Kernel<S> for DotByLane<'_, T, S> {
    type Output = ();

    #[inline(always)]
    fn run(self, s: S) {
        self.out.fill(T::zeros::<S>());
        let width = self.out.len();
        for (x, y) in self.x.chunks_exact(width).zip(self.y.chunks_exact(width)) {
            for ((out, x), y) in self.out.iter_mut().zip(x).zip(y) {
                *out = T::mul_add(s, *x, *y, *out);
            }
        }
    }
}
