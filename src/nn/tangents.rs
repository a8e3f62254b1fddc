//! Products of tangents over tiles: with slopes, with each other, and with a factor of each row.

use pulp::Simd;

use crate::simd::{scalars, Element, Kernel};

/// Whether every number is zero.
#[inline(always)]
pub(super) fn is_zero<T: Element, S: Simd>(x: &[T::Vector<S>]) -> bool {
    for x in scalars::<T, S>(x) {
        if *x != T::default() {
            return false;
        }
    }
    true
}

/// `out_i = c d ∘ x_i` for every tangent, with one c for every row of the tile, or 1.
pub(super) struct Through<'a, T: Element, S: Simd, const V: usize> {
    pub(super) c: Option<[T::Vector<S>; V]>,
    pub(super) d: &'a [T::Vector<S>],
    pub(super) x: &'a [T::Vector<S>],
    pub(super) out: &'a mut [T::Vector<S>],
}

impl<T: Element, S: Simd, const V: usize> Kernel<S> for Through<'_, T, S, V> {
    type Output = ();

    #[inline(always)]
    fn run(self, s: S) {
        let d = self.d.as_chunks::<V>().0;
        let c = match self.c {
            Some(c) => c,
            None => [T::splat(s, T::of(1.0)); V],
        };
        let size = self.d.len();
        for (x, out) in self
            .x
            .chunks_exact(size)
            .zip(self.out.chunks_exact_mut(size))
        {
            let (x, out) = (x.as_chunks::<V>().0, out.as_chunks_mut::<V>().0);
            for ((d, x), out) in d.iter().zip(x).zip(out) {
                for v in 0..V {
                    out[v] = T::times(s, T::times(s, c[v], d[v]), x[v]);
                }
            }
        }
    }
}

/// `out = c Σ_i x_i ∘ y_i`, with one c for every row of the tile, or 1.
pub(super) struct Form<'a, T: Element, S: Simd, const V: usize> {
    pub(super) c: Option<[T::Vector<S>; V]>,
    pub(super) x: &'a [T::Vector<S>],
    pub(super) y: &'a [T::Vector<S>],
    pub(super) out: &'a mut [T::Vector<S>],
}

impl<T: Element, S: Simd, const V: usize> Kernel<S> for Form<'_, T, S, V> {
    type Output = ();

    #[inline(always)]
    fn run(self, s: S) {
        let (x, y) = (self.x.as_chunks::<V>().0, self.y.as_chunks::<V>().0);
        let out = self.out.as_chunks_mut::<V>().0;
        let c = match self.c {
            Some(c) => c,
            None => [T::splat(s, T::of(1.0)); V],
        };
        let (n, all) = (out.len(), x.len().min(y.len()));
        for (k, out) in out.iter_mut().enumerate() {
            let mut sum = [T::zeros::<S>(); V];
            for at in (k..all).step_by(n) {
                for v in 0..V {
                    sum[v] = T::mul_add(s, x[at][v], y[at][v], sum[v]);
                }
            }
            for v in 0..V {
                out[v] = T::times(s, c[v], sum[v]);
            }
        }
    }
}

/// −Σ_k d_k Σ_i u_ik q_ik, by lane.
pub(super) struct MinusForm<'a, T: Element, S: Simd, const V: usize> {
    pub(super) d: &'a [T::Vector<S>],
    pub(super) u: &'a [T::Vector<S>],
    pub(super) q: &'a [T::Vector<S>],
}

impl<T: Element, S: Simd, const V: usize> Kernel<S> for MinusForm<'_, T, S, V> {
    type Output = [T::Vector<S>; V];

    #[inline(always)]
    fn run(self, s: S) -> Self::Output {
        let (u, q) = (self.u.as_chunks::<V>().0, self.q.as_chunks::<V>().0);
        let (d, all) = (self.d.as_chunks::<V>().0, u.len().min(q.len()));
        let n = d.len();
        // In two parts, so that sums need not wait for each other.
        let mut sums = [[T::zeros::<S>(); V]; 2];
        for (k, d) in d.iter().enumerate() {
            let sum = &mut sums[k % 2];
            for at in (k..all).step_by(n) {
                for v in 0..V {
                    let product = T::times(s, u[at][v], q[at][v]);
                    sum[v] = T::fnmadd(s, d[v], product, sum[v]);
                }
            }
        }
        let [mut sum, other] = sums;
        for v in 0..V {
            sum[v] = T::plus(s, sum[v], other[v]);
        }
        sum
    }
}

/// −Σ_k x_k y_k, by lane.
pub(super) struct MinusDot<'a, T: Element, S: Simd, const V: usize> {
    pub(super) x: &'a [T::Vector<S>],
    pub(super) y: &'a [T::Vector<S>],
}

impl<T: Element, S: Simd, const V: usize> Kernel<S> for MinusDot<'_, T, S, V> {
    type Output = [T::Vector<S>; V];

    #[inline(always)]
    fn run(self, s: S) -> Self::Output {
        // In four parts, so that sums need not wait for each other.
        let mut sums = [[T::zeros::<S>(); V]; 4];
        let (x, y) = (self.x.as_chunks::<V>().0, self.y.as_chunks::<V>().0);
        for (k, (x, y)) in x.iter().zip(y).enumerate() {
            let sum = &mut sums[k % 4];
            for v in 0..V {
                sum[v] = T::mul_add(s, x[v], y[v], sum[v]);
            }
        }
        let [a, b, c, d] = sums;
        let mut total = a;
        for v in 0..V {
            let sum = T::plus(s, T::plus(s, a[v], b[v]), T::plus(s, c[v], d[v]));
            total[v] = T::minus(s, T::zeros::<S>(), sum);
        }
        total
    }
}

/// out = c x, with one c for every row of the tile.
pub(super) struct Scale<'a, T: Element, S: Simd, const V: usize> {
    pub(super) c: [T::Vector<S>; V],
    pub(super) x: &'a [T::Vector<S>],
    pub(super) out: &'a mut [T::Vector<S>],
}

impl<T: Element, S: Simd, const V: usize> Kernel<S> for Scale<'_, T, S, V> {
    type Output = ();

    #[inline(always)]
    fn run(self, s: S) {
        let (x, out) = (self.x.as_chunks::<V>().0, self.out.as_chunks_mut::<V>().0);
        for (x, out) in x.iter().zip(out) {
            for v in 0..V {
                out[v] = T::times(s, self.c[v], x[v]);
            }
        }
    }
}
