//! What an evaluation of a [`HyperCnf`](super::HyperCnf) and its pull-back do beside products, over tiles.

use pulp::Simd;

use crate::simd::{Element, Kernel};

/// Σ_j s_j (h_j² − 1), by lane, s_j = v_j·w_j.
pub(super) struct MinusTrace<'a, T: Element, S: Simd, const V: usize> {
    pub(super) coupling: &'a [T],
    pub(super) h: &'a [T::Vector<S>],
}

impl<T: Element, S: Simd, const V: usize> Kernel<S> for MinusTrace<'_, T, S, V> {
    type Output = [T::Vector<S>; V];

    #[inline(always)]
    fn run(self, s: S) -> Self::Output {
        // In two parts, so that sums need not wait for each other.
        let mut sums = [[T::zeros::<S>(); V]; 2];
        let minus_one = T::splat(s, T::of(-1.0));
        let h = self.h.as_chunks::<V>().0;
        for (j, (coupling, h)) in self.coupling.iter().zip(h).enumerate() {
            let (sum, coupling) = (&mut sums[j % 2], T::splat(s, *coupling));
            for v in 0..V {
                let slope = T::mul_add(s, h[v], h[v], minus_one);
                sum[v] = T::mul_add(s, coupling, slope, sum[v]);
            }
        }
        let [mut sum, other] = sums;
        for v in 0..V {
            sum[v] = T::plus(s, sum[v], other[v]);
        }
        sum
    }
}

/// Vg, in `x_bar`, becomes the cotangents of Wz + b, and those of s row by row are written, given c, that of l'.
pub(super) struct Bend<'a, T: Element, S: Simd, const V: usize> {
    pub(super) c: [T::Vector<S>; V],
    pub(super) coupling: &'a [T],
    pub(super) h: &'a [T::Vector<S>],
    pub(super) x_bar: &'a mut [T::Vector<S>],
    pub(super) of_coupling: &'a mut [T::Vector<S>],
}

impl<T: Element, S: Simd, const V: usize> Kernel<S> for Bend<'_, T, S, V> {
    type Output = ();

    #[inline(always)]
    fn run(self, s: S) {
        let h = self.h.as_chunks::<V>().0;
        let x_bar = self.x_bar.as_chunks_mut::<V>().0;
        let of_coupling = self.of_coupling.as_chunks_mut::<V>().0;
        let minus_one = T::splat(s, T::of(-1.0));
        let each = x_bar.iter_mut().zip(of_coupling).zip(h);
        for (((x_bar, of_coupling), h), coupling) in each.zip(self.coupling) {
            let twice = T::splat(s, *coupling + *coupling);
            for v in 0..V {
                let minus_slope = T::mul_add(s, h[v], h[v], minus_one);
                of_coupling[v] = T::times(s, self.c[v], minus_slope);
                let bent = T::times(s, twice, T::times(s, self.c[v], h[v]));
                let g = T::times(s, T::plus(s, x_bar[v], bent), minus_slope);
                x_bar[v] = T::minus(s, T::zeros::<S>(), g);
            }
        }
    }
}
