//! What activations do to a derivative that is a value, and to the derivative of that, over tiles: to the gradient of a
//! potential and its derivative along a tangent, and to a tangent and its pull-back.

use pulp::Simd;

use crate::nn::activation::{curvature_of, pulled, TimesSlope};
use crate::nn::Activation;
use crate::simd::product::Epilogue;
use crate::simd::{Element, Kernel};

/// g becomes a number of its own in all rows.
pub(super) struct Seed<'a, T: Element, S: Simd, const V: usize> {
    pub(super) weights: &'a [T],
    pub(super) g: &'a mut [T::Vector<S>],
}

impl<T: Element, S: Simd, const V: usize> Kernel<S> for Seed<'_, T, S, V> {
    type Output = ();

    #[inline(always)]
    fn run(self, s: S) {
        for (g, w) in self.g.as_chunks_mut::<V>().0.iter_mut().zip(self.weights) {
            *g = [T::splat(s, *w); V];
        }
    }
}

/// g becomes δ = σ' g, and `bend` becomes r = σ'' g.
pub(super) struct Split<'a, T: Element, S: Simd> {
    pub(super) activation: Activation,
    pub(super) value: &'a [T::Vector<S>],
    /// Where it is kept, else empty.
    pub(super) slope: &'a [T::Vector<S>],
    pub(super) g: &'a mut [T::Vector<S>],
    /// σ'' at first, where it does not follow from value and slope.
    pub(super) bend: &'a mut [T::Vector<S>],
}

impl<T: Element, S: Simd> Kernel<S> for Split<'_, T, S> {
    type Output = ();

    #[inline(always)]
    fn run(self, s: S) {
        let activation = self.activation;
        let one = T::splat(s, T::of(1.0));
        let each = self.g.iter_mut().zip(self.bend).zip(self.value);
        if activation.keeps_curvature() {
            for (((g, r), _), d) in each.zip(self.slope) {
                (*g, *r) = (T::times(s, *g, *d), T::times(s, *g, *r));
            }
        } else if self.slope.is_empty() {
            for ((g, r), h) in each {
                let d = pulled::<T, S>(s, activation, *h, one);
                let e = curvature_of::<T, S>(s, activation, *h, d);
                (*g, *r) = (T::times(s, *g, d), T::times(s, *g, e));
            }
        } else {
            for (((g, r), h), d) in each.zip(self.slope) {
                let e = curvature_of::<T, S>(s, activation, *h, *d);
                (*g, *r) = (T::times(s, *g, *d), T::times(s, *g, e));
            }
        }
    }
}

/// ż becomes ȧ = σ' ż, and `bent` becomes r ż.
pub(super) struct Tangent<'a, T: Element, S: Simd> {
    pub(super) activation: Activation,
    pub(super) value: &'a [T::Vector<S>],
    /// Where it is kept, else empty.
    pub(super) slope: &'a [T::Vector<S>],
    /// r.
    pub(super) bend: &'a [T::Vector<S>],
    pub(super) z_dot: &'a mut [T::Vector<S>],
    pub(super) bent: &'a mut [T::Vector<S>],
}

impl<T: Element, S: Simd> Kernel<S> for Tangent<'_, T, S> {
    type Output = ();

    #[inline(always)]
    fn run(self, s: S) {
        let each = self.z_dot.iter_mut().zip(self.bent).zip(self.bend);
        if self.slope.is_empty() {
            for (((z, bent), r), h) in each.zip(self.value) {
                *bent = T::times(s, *r, *z);
                *z = pulled::<T, S>(s, self.activation, *h, *z);
            }
        } else {
            for (((z, bent), r), d) in each.zip(self.slope) {
                *bent = T::times(s, *r, *z);
                *z = T::times(s, *d, *z);
            }
        }
    }
}

/// A product that forms ġ leaves δ̇ = σ' ġ + r ż.
pub(super) struct PlusBent<'a, T: Element, S: Simd> {
    pub(super) slopes: TimesSlope<'a, T, S>,
    /// r ż.
    pub(super) bent: &'a [T::Vector<S>],
}

impl<T: Element, S: Simd> Epilogue<T, S> for PlusBent<'_, T, S> {
    #[inline(always)]
    fn store<const R: usize, const V: usize>(
        &self,
        s: S,
        at: usize,
        g: [[T::Vector<S>; V]; R],
        out: &mut [[T::Vector<S>; V]; R],
    ) {
        self.slopes.store(s, at, g, out);
        let bent = self.bent[at..][..R * V].as_chunks::<V>().0;
        for r in 0..R {
            for v in 0..V {
                out[r][v] = T::plus(s, out[r][v], bent[r][v]);
            }
        }
    }
}
