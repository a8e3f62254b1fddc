//! Fields that are made of another field over tiles, whatever field it is.

use super::activations::Part;
use super::lanewise::Lanewise;
use super::tile::{At, Slot, Tiled};
use crate::simd::{aligned, Element};

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
    pub(super) fn tiles<T: Element>(
        self,
        field: Box<dyn Tiled<T>>,
        dim: usize,
    ) -> Box<dyn Tiled<T>> {
        match self {
            Self::Relaxation => Box::new(Relaxing(field)),
            Self::RowSpeed => Box::new(Faster { field, dim }),
        }
    }
}

/// f(t, y) − y.  Slots and cotangents are those of f.
struct Relaxing<T: Element>(Box<dyn Tiled<T>>);

impl<T: Element> Tiled<T> for Relaxing<T> {
    fn batch(&self) -> usize {
        self.0.batch()
    }

    fn lanewise(&self) -> &dyn Lanewise<T> {
        self.0.lanewise()
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

    fn velocity(&self, at: &At<'_, T>, kept: &mut [T], k: Option<&mut [T]>) {
        // Every feature of y is read here.
        let at = &At {
            is_weighed: true,
            is_repeated: false,
            ..*at
        };
        let Some(out) = k else {
            return self.0.velocity(at, kept, None);
        };
        // A field may write time over numbers of y that it does not read.
        let mut y = aligned(out.len());
        y.copy_from_slice(&kept[..out.len()]);
        self.0.velocity(at, kept, Some(&mut *out));
        self.0.lanewise().subtract(&y, out);
    }

    fn recall(&self, at: &At<'_, T>, kept: &mut [T], known: &[bool]) {
        self.0.recall(at, kept, known);
    }

    fn vjp(&self, kept: &[T], cotangents: &mut [T], w: &mut [T]) {
        self.0.vjp(kept, cotangents, w);
        self.0.lanewise().subtract(cotangents, w);
    }

    fn accumulate(&self, window: &[Slot<'_, T>], scratch: &mut [T], sums: &mut [T]) {
        self.0.accumulate(window, scratch, sums);
    }

    fn gradients(&self, sums: &[T]) -> Vec<T> {
        self.0.gradients(sums)
    }
}

/// x' = e^s f(t, x), s' = 0.
///
/// A slot keeps `[x, s | x' | e^s]` and then the slot of f, cotangents are `[v_x, v_s]` and then those of f at e^s v_x.
struct Faster<T: Element> {
    field: Box<dyn Tiled<T>>,
    /// Features of x.
    dim: usize,
}

impl<T: Element> Faster<T> {
    /// Numbers of x, and of x and s.
    fn sizes(&self) -> [usize; 2] {
        [self.dim, self.dim + 1].map(|features| features * self.field.batch())
    }

    /// Numbers of a slot before the slot of f.
    fn before(&self) -> usize {
        2 * self.sizes()[1]
    }
}

impl<T: Element> Tiled<T> for Faster<T> {
    fn batch(&self) -> usize {
        self.field.batch()
    }

    fn lanewise(&self) -> &dyn Lanewise<T> {
        self.field.lanewise()
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

    fn velocity(&self, at: &At<'_, T>, kept: &mut [T], k: Option<&mut [T]>) {
        let [x, all] = self.sizes();
        let (state, rest) = kept.split_at_mut(all);
        let (velocity, slot) = rest.split_at_mut(all);
        let (velocity, factor) = velocity.split_at_mut(x);
        slot[..x].copy_from_slice(&state[..x]);
        // The pull-back to s reads all of it, whether or not it is asked for.
        let at = &At {
            is_repeated: false,
            ..*at
        };
        self.field.velocity(at, slot, Some(&mut *velocity));
        let on = self.field.lanewise();
        on.exponential(&state[x..], factor);
        on.scale(velocity, factor);
        if let Some(k) = k {
            k[..x].copy_from_slice(velocity);
            k[x..].fill(T::default());
        }
    }

    fn recall(&self, at: &At<'_, T>, kept: &mut [T], _: &[bool]) {
        let all = vec![true; self.field.parts().len()];
        self.field.recall(at, &mut kept[self.before()..], &all);
    }

    fn vjp(&self, kept: &[T], cotangents: &mut [T], w: &mut [T]) {
        let [x, all] = self.sizes();
        let (velocity, slot) = kept[all..].split_at(all);
        let (velocity, factor) = velocity.split_at(x);
        let (v, of_field) = cotangents.split_at_mut(all);
        let (w, of_speed) = w.split_at_mut(x);
        of_field[..x].copy_from_slice(&v[..x]);
        let on = self.field.lanewise();
        on.scale(&mut of_field[..x], factor);
        self.field.vjp(slot, of_field, w);
        on.dot_by_lane(&v[..x], velocity, of_speed);
    }

    fn accumulate(&self, window: &[Slot<'_, T>], scratch: &mut [T], sums: &mut [T]) {
        let mut of_field = Vec::with_capacity(window.len());
        for slot in window {
            of_field.push(Slot {
                kept: &slot.kept[self.before()..],
                cotangents: &slot.cotangents[self.sizes()[1]..],
            });
        }
        self.field.accumulate(&of_field, scratch, sums);
    }

    fn gradients(&self, sums: &[T]) -> Vec<T> {
        self.field.gradients(sums)
    }
}
