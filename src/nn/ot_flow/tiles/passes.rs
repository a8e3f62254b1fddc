//! What an evaluation of an [`OtFlow`](super::OtFlow) and its pull-back do between products, over tiles.

use pulp::Simd;

use crate::simd::{Element, Kernel};

/// 1 − t².
#[inline(always)]
fn slope<T: Element, S: Simd>(s: S, t: T::Vector<S>) -> T::Vector<S> {
    T::fnmadd(s, t, t, T::splat(s, T::of(1.0)))
}

/// `out_j = c_j x_j`.
pub(super) struct Times<'a, T: Element, S: Simd, const V: usize> {
    pub(super) c: &'a [T],
    pub(super) x: &'a [T::Vector<S>],
    pub(super) out: &'a mut [T::Vector<S>],
}

impl<T: Element, S: Simd, const V: usize> Kernel<S> for Times<'_, T, S, V> {
    type Output = ();

    #[inline(always)]
    fn run(self, s: S) {
        let (x, out) = (self.x.as_chunks::<V>().0, self.out.as_chunks_mut::<V>().0);
        for ((c, x), out) in self.c.iter().zip(x).zip(out) {
            let c = T::splat(s, *c);
            for v in 0..V {
                out[v] = T::times(s, c, x[v]);
            }
        }
    }
}

/// tr ∇²Φ, and n.
pub(super) struct Trace<'a, T: Element, S: Simd, const V: usize> {
    /// ‖A‖².
    pub(super) start: T,
    pub(super) r: &'a [T],
    pub(super) w: &'a [T],
    /// t₀, z and e.
    pub(super) upper: [&'a [T::Vector<S>]; 3],
    pub(super) t1: &'a [T::Vector<S>],
    pub(super) q: &'a [T::Vector<S>],
    pub(super) n: &'a mut [T::Vector<S>],
}

impl<T: Element, S: Simd, const V: usize> Kernel<S> for Trace<'_, T, S, V> {
    type Output = [T::Vector<S>; V];

    #[inline(always)]
    fn run(self, s: S) -> Self::Output {
        let [t0, z, e] = self.upper.map(|x| x.as_chunks::<V>().0);
        let (t1, q) = (self.t1.as_chunks::<V>().0, self.q.as_chunks::<V>().0);
        let n = self.n.as_chunks_mut::<V>().0;
        let width = n.len();
        let mut first = [T::splat(s, self.start); V];
        let mut second = [T::zeros::<S>(); V];
        for (j, n) in n.iter_mut().enumerate() {
            let mut sum = [T::zeros::<S>(); V];
            for at in (j..q.len()).step_by(width) {
                for v in 0..V {
                    sum[v] = T::mul_add(s, q[at][v], q[at][v], sum[v]);
                }
            }
            *n = sum;
            let (r, w) = (T::splat(s, self.r[j]), T::splat(s, self.w[j]));
            for v in 0..V {
                let curved = T::fnmadd(s, t0[j][v], e[j][v], z[j][v]);
                first[v] = T::mul_add(s, r, curved, first[v]);
                let bent = T::times(s, w, slope::<T, S>(s, t1[j][v]));
                second[v] = T::mul_add(s, bent, sum[v], second[v]);
            }
        }
        for v in 0..V {
            first[v] = T::plus(s, first[v], second[v]);
        }
        first
    }
}

/// ½‖∇Φ‖², of x, and ∂Φ/∂t less that.
#[inline(always)]
fn transport<T: Element, S: Simd, const V: usize>(
    s: S,
    slopes: &[[T::Vector<S>; V]],
) -> [[T::Vector<S>; V]; 2] {
    let mut half = [T::zeros::<S>(); V];
    let mut residual = half;
    let Some((of_t, of_x)) = slopes.split_last() else {
        return [half, residual];
    };
    for g in of_x {
        for v in 0..V {
            half[v] = T::mul_add(s, g[v], g[v], half[v]);
        }
    }
    for v in 0..V {
        half[v] = T::times(s, half[v], T::splat(s, T::of(0.5)));
        residual[v] = T::minus(s, of_t[v], half[v]);
    }
    [half, residual]
}

/// The velocity of x and of the costs.
pub(super) struct Costs<'a, T: Element, S: Simd, const V: usize> {
    /// ∇Φ in x and t.
    pub(super) slopes: &'a [T::Vector<S>],
    pub(super) trace: [T::Vector<S>; V],
    pub(super) velocity: &'a mut [T::Vector<S>],
    pub(super) costs: &'a mut [T::Vector<S>],
}

impl<T: Element, S: Simd, const V: usize> Kernel<S> for Costs<'_, T, S, V> {
    type Output = ();

    #[inline(always)]
    fn run(self, s: S) {
        for (velocity, slope) in self.velocity.iter_mut().zip(self.slopes) {
            *velocity = T::minus(s, T::zeros::<S>(), *slope);
        }
        let [half, residual] = transport::<T, S, V>(s, self.slopes.as_chunks::<V>().0);
        if let [l, transport, violation] = self.costs.as_chunks_mut::<V>().0 {
            (*l, *transport) = (self.trace, half);
            for v in 0..V {
                violation[v] = T::abs(s, residual[v]);
            }
        }
    }
}

/// The cotangent g of ∇Φ, given those of the velocity and of the costs.
pub(super) struct Seeds<'a, T: Element, S: Simd, const V: usize> {
    pub(super) slopes: &'a [T::Vector<S>],
    pub(super) v: &'a [T::Vector<S>],
    pub(super) g: &'a mut [T::Vector<S>],
}

impl<T: Element, S: Simd, const V: usize> Kernel<S> for Seeds<'_, T, S, V> {
    type Output = ();

    #[inline(always)]
    fn run(self, s: S) {
        let slopes = self.slopes.as_chunks::<V>().0;
        let v = self.v.as_chunks::<V>().0;
        let Some((of_t, of_x)) = self.g.as_chunks_mut::<V>().0.split_last_mut() else {
            return;
        };
        let [.., of_transport, of_violation] = v else {
            return;
        };
        let [_, residual] = transport::<T, S, V>(s, slopes);
        let mut of_half = *of_transport;
        for i in 0..V {
            // The cotangent of |x|, zero at zero.
            let (x, c) = (residual[i], of_violation[i]);
            let above = T::positive_part(s, x);
            let below = T::positive_part(s, T::minus(s, T::zeros::<S>(), x));
            let above = T::where_positive(s, above, c);
            of_t[i] = T::minus(s, above, T::where_positive(s, below, c));
            of_half[i] = T::minus(s, of_half[i], of_t[i]);
        }
        for ((g, slope), v) in of_x.iter_mut().zip(slopes).zip(v) {
            for i in 0..V {
                let minus = T::minus(s, T::zeros::<S>(), v[i]);
                g[i] = T::mul_add(s, of_half[i], slope[i], minus);
            }
        }
    }
}

/// K₀g, in `open`, becomes what ∇Φ and the first sum of the trace leave for t₀; their cotangents of z and, row by row, of
/// r.  c is the cotangent of the trace.
pub(super) struct Upper<'a, T: Element, S: Simd, const V: usize> {
    pub(super) c: [T::Vector<S>; V],
    pub(super) r: &'a [T],
    /// t₀, z and e.
    pub(super) kept: [&'a [T::Vector<S>]; 3],
    pub(super) open: &'a mut [T::Vector<S>],
    pub(super) of_z: &'a mut [T::Vector<S>],
    pub(super) of_r: &'a mut [T::Vector<S>],
}

impl<T: Element, S: Simd, const V: usize> Kernel<S> for Upper<'_, T, S, V> {
    type Output = ();

    #[inline(always)]
    fn run(self, s: S) {
        let [t0, z, e] = self.kept.map(|x| x.as_chunks::<V>().0);
        let open = self.open.as_chunks_mut::<V>().0;
        let (of_z, of_r) = (
            self.of_z.as_chunks_mut::<V>().0,
            self.of_r.as_chunks_mut::<V>().0,
        );
        for (j, r) in self.r.iter().enumerate() {
            let (r, twice) = (T::splat(s, *r), T::splat(s, *r + *r));
            for v in 0..V {
                let (t0, z, g) = (t0[j][v], z[j][v], open[j][v]);
                let bent = T::times(s, self.c[v], slope::<T, S>(s, t0));
                of_r[j][v] = T::times(s, bent, z);
                of_z[j][v] = T::mul_add(s, g, t0, T::times(s, r, bent));
                let traced = T::times(s, twice, T::times(s, self.c[v], e[j][v]));
                open[j][v] = T::minus(s, T::times(s, g, z), traced);
            }
        }
    }
}

/// The cotangents of all q_k.
pub(super) struct Tangents<'a, T: Element, S: Simd, const V: usize> {
    pub(super) c: [T::Vector<S>; V],
    pub(super) w: &'a [T],
    pub(super) t1: &'a [T::Vector<S>],
    pub(super) q: &'a [T::Vector<S>],
    pub(super) of_q: &'a mut [T::Vector<S>],
}

impl<T: Element, S: Simd, const V: usize> Kernel<S> for Tangents<'_, T, S, V> {
    type Output = ();

    #[inline(always)]
    fn run(self, s: S) {
        let (t1, q) = (self.t1.as_chunks::<V>().0, self.q.as_chunks::<V>().0);
        let of_q = self.of_q.as_chunks_mut::<V>().0;
        let width = self.w.len();
        for (j, w) in self.w.iter().enumerate() {
            let twice = T::splat(s, *w + *w);
            let mut factor = self.c;
            for v in 0..V {
                let bent = T::times(s, twice, slope::<T, S>(s, t1[j][v]));
                factor[v] = T::times(s, factor[v], bent);
            }
            for at in (j..q.len()).step_by(width) {
                for v in 0..V {
                    of_q[at][v] = T::times(s, factor[v], q[at][v]);
                }
            }
        }
    }
}

/// K₁z̄, in `of_w`, becomes the cotangent of w row by row; that of K₁u + b₁.
pub(super) struct Lower<'a, T: Element, S: Simd, const V: usize> {
    pub(super) c: [T::Vector<S>; V],
    pub(super) w: &'a [T],
    pub(super) t1: &'a [T::Vector<S>],
    pub(super) n: &'a [T::Vector<S>],
    pub(super) of_z: &'a [T::Vector<S>],
    pub(super) of_w: &'a mut [T::Vector<S>],
    pub(super) inner: &'a mut [T::Vector<S>],
}

impl<T: Element, S: Simd, const V: usize> Kernel<S> for Lower<'_, T, S, V> {
    type Output = ();

    #[inline(always)]
    fn run(self, s: S) {
        let (t1, n) = (self.t1.as_chunks::<V>().0, self.n.as_chunks::<V>().0);
        let of_z = self.of_z.as_chunks::<V>().0;
        let (of_w, inner) = (
            self.of_w.as_chunks_mut::<V>().0,
            self.inner.as_chunks_mut::<V>().0,
        );
        for (j, w) in self.w.iter().enumerate() {
            let w = T::splat(s, *w);
            for v in 0..V {
                let (t1, h) = (t1[j][v], of_w[j][v]);
                let (bent, n) = (slope::<T, S>(s, t1), T::times(s, self.c[v], n[j][v]));
                of_w[j][v] = T::mul_add(s, h, t1, T::mul_add(s, bent, n, of_z[j][v]));
                let left = T::fnmadd(s, T::plus(s, n, n), t1, h);
                inner[j][v] = T::times(s, w, T::times(s, left, bent));
            }
        }
    }
}

/// t̄₀, in `open`, becomes ō = t̄₀ ∘ (1 − t₀²) + ū ∘ t₀, with ū in `scratch`.
pub(super) struct Open<'a, T: Element, S: Simd> {
    pub(super) t0: &'a [T::Vector<S>],
    pub(super) scratch: &'a [T::Vector<S>],
    pub(super) open: &'a mut [T::Vector<S>],
}

impl<T: Element, S: Simd> Kernel<S> for Open<'_, T, S> {
    type Output = ();

    #[inline(always)]
    fn run(self, s: S) {
        for ((open, t0), u) in self.open.iter_mut().zip(self.t0).zip(self.scratch) {
            let bent = T::times(s, *open, slope::<T, S>(s, *t0));
            *open = T::mul_add(s, *u, *t0, bent);
        }
    }
}
