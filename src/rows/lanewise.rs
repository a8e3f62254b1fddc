//! The operations of the solver on tiles, in code for the vector unit.  The loops over steps see numbers only and call
//! these, so that the loops are compiled once for each type of number and not once more for each vector unit.

use pulp::Simd;

use super::activations::{Load, Save};
use super::adaptive::{Attempted, Norms};
use super::driven::Mixed;
use super::lanes::{First, Terms};
use crate::precision::Low;
use crate::simd::two_sum::TwoSums;
use crate::simd::{enter, Element, Kernel};

/// Operations on tiles `[feature][B]`, lane by lane.
pub(super) trait Lanewise<T: Element>: Send + Sync {
    /// `out = first + Σ c_j x_j`, or `out += Σ c_j x_j` without `first`, with `batch` numbers of each c and the x_j
    /// one after the other in `xs`.
    fn sum(
        &self,
        batch: usize,
        out: &mut [T],
        first: Option<First<'_, T>>,
        terms: Terms<'_, T>,
        xs: &[T],
    );

    /// `[sum, lost] ← [fl(sum + lost), sum + lost − fl(sum + lost)]`.
    fn two_sums(&self, sum: &mut [T], lost: &mut [T]);

    /// A sum whose coefficients are combinations of functionals of noise.
    fn mix(&self, mixed: Mixed<'_, T>);

    /// `x` times a factor of every lane.
    fn scale(&self, x: &mut [T], factor: &[T]);

    /// `out −= x`, as far as `out` goes.
    fn subtract(&self, x: &[T], out: &mut [T]);

    /// `out = e^x`.
    fn exponential(&self, x: &[T], out: &mut [T]);

    /// `out = Σ_k x_k y_k`, a feature, by lane.
    fn dot_by_lane(&self, x: &[T], y: &[T], out: &mut [T]);

    /// Rounds every number.
    fn round(&self, low: Low, x: &mut [T]);

    /// Whether no number is NaN or infinite.
    fn is_finite(&self, x: &[T]) -> bool;

    /// The largest absolute value.
    fn largest(&self, x: &[T]) -> T;

    /// `total += a b part`, and zeros in place of `part`.
    fn promote(&self, factors: [T; 2], part: &mut [T], total: &mut [T]);

    /// Takes over the lanes that are marked.
    fn select(&self, mask: &[bool], to: &mut [T], from: &[T]);

    /// Keeps what is wanted of an evaluation.
    fn save(&self, save: Save<'_, T>);

    /// Puts back what was kept of an evaluation.
    fn load(&self, load: Load<'_, T>);

    /// Measures the errors of the lanes.
    fn measure(&self, norms: &mut Norms<'_>, attempt: Attempted<'_, T>);
}

/// A vector unit.
#[derive(Clone, Copy)]
pub(super) struct On<S>(pub(super) S);

impl<T: Element, S: Simd> Lanewise<T> for On<S> {
    fn sum(
        &self,
        batch: usize,
        out: &mut [T],
        first: Option<First<'_, T>>,
        terms: Terms<'_, T>,
        xs: &[T],
    ) {
        // Code for tiles of two vectors exists only where such tiles do.
        match T::WIDE && batch > T::lanes::<S>() {
            true => enter(
                self.0,
                LaneSum::<T, 2> {
                    out,
                    first,
                    terms,
                    xs,
                },
            ),
            false => enter(
                self.0,
                LaneSum::<T, 1> {
                    out,
                    first,
                    terms,
                    xs,
                },
            ),
        }
    }

    fn two_sums(&self, sum: &mut [T], lost: &mut [T]) {
        enter(self.0, TwoSums { sum, lost });
    }

    fn mix(&self, mixed: Mixed<'_, T>) {
        enter(self.0, mixed);
    }

    fn scale(&self, x: &mut [T], factor: &[T]) {
        enter(self.0, Scale { x, factor });
    }

    fn subtract(&self, x: &[T], out: &mut [T]) {
        enter(self.0, Subtract { x, out });
    }

    fn exponential(&self, x: &[T], out: &mut [T]) {
        enter(self.0, Exponential { x, out });
    }

    fn dot_by_lane(&self, x: &[T], y: &[T], out: &mut [T]) {
        enter(self.0, DotByLane { x, y, out });
    }

    fn round(&self, low: Low, x: &mut [T]) {
        enter(self.0, Round { low, x });
    }

    fn is_finite(&self, x: &[T]) -> bool {
        enter(self.0, IsFinite { x })
    }

    fn largest(&self, x: &[T]) -> T {
        enter(self.0, Largest { x })
    }

    fn promote(&self, factors: [T; 2], part: &mut [T], total: &mut [T]) {
        enter(
            self.0,
            Promote {
                factors,
                part,
                total,
            },
        );
    }

    fn select(&self, mask: &[bool], to: &mut [T], from: &[T]) {
        enter(self.0, Select { mask, to, from });
    }

    fn save(&self, save: Save<'_, T>) {
        enter(self.0, save);
    }

    fn load(&self, load: Load<'_, T>) {
        enter(self.0, load);
    }

    fn measure(&self, norms: &mut Norms<'_>, attempt: Attempted<'_, T>) {
        enter(self.0, Measure { norms, attempt });
    }
}

/// [`Lanewise::sum`] in tiles of V vectors; so are the other operations below.
struct LaneSum<'a, T, const V: usize> {
    out: &'a mut [T],
    first: Option<First<'a, T>>,
    terms: Terms<'a, T>,
    xs: &'a [T],
}

impl<T: Element, S: Simd, const V: usize> Kernel<S> for LaneSum<'_, T, V> {
    type Output = ();

    #[inline(always)]
    fn run(self, s: S) {
        let Self { out, terms, .. } = self;
        let (out, xs) = (T::vectors_mut::<S>(out), T::vectors::<S>(self.xs));
        if let Some(First { c, x }) = self.first {
            let x = &T::vectors::<S>(x)[..out.len()];
            let c = c.and_then(|c| T::vectors::<S>(c).as_chunks::<V>().0.first());
            match c {
                Some(c) => {
                    let x = x.as_chunks::<V>().0;
                    for (out, x) in out.as_chunks_mut::<V>().0.iter_mut().zip(x) {
                        for v in 0..V {
                            out[v] = T::times(s, c[v], x[v]);
                        }
                    }
                }
                None => out.copy_from_slice(x),
            }
        }
        let (mut cs, mut of) = (T::vectors::<S>(terms.cs).as_chunks::<V>().0, terms.of);
        while of.len() >= 4 {
            add_terms::<T, S, V, 4>(s, out, cs, of, xs);
            (cs, of) = (&cs[4..], &of[4..]);
        }
        match of.len() {
            1 => add_terms::<T, S, V, 1>(s, out, cs, of, xs),
            2 => add_terms::<T, S, V, 2>(s, out, cs, of, xs),
            3 => add_terms::<T, S, V, 3>(s, out, cs, of, xs),
            _ => {}
        }
    }
}

/// Adds the first N terms.
#[inline(always)]
fn add_terms<T: Element, S: Simd, const V: usize, const N: usize>(
    s: S,
    out: &mut [T::Vector<S>],
    cs: &[[T::Vector<S>; V]],
    of: &[usize],
    xs: &[T::Vector<S>],
) {
    let size = out.len();
    let (mut c, mut x) = ([[T::zeros::<S>(); V]; N], [xs[..0].as_chunks::<V>().0; N]);
    for n in 0..N {
        c[n] = cs[n];
        x[n] = xs[of[n] * size..][..size].as_chunks::<V>().0;
    }
    for (i, out) in out.as_chunks_mut::<V>().0.iter_mut().enumerate() {
        for v in 0..V {
            let mut sum = out[v];
            for n in 0..N {
                sum = T::mul_add(s, c[n][v], x[n][i][v], sum);
            }
            out[v] = sum;
        }
    }
}

struct Scale<'a, T> {
    x: &'a mut [T],
    factor: &'a [T],
}

impl<T: Element, S: Simd> Kernel<S> for Scale<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run(self, s: S) {
        let factor = T::vectors::<S>(self.factor);
        for x in T::vectors_mut::<S>(self.x).chunks_exact_mut(factor.len()) {
            for (x, factor) in x.iter_mut().zip(factor) {
                *x = T::times(s, *x, *factor);
            }
        }
    }
}

struct Subtract<'a, T> {
    x: &'a [T],
    out: &'a mut [T],
}

impl<T: Element, S: Simd> Kernel<S> for Subtract<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run(self, s: S) {
        let x = T::vectors::<S>(self.x);
        for (out, x) in T::vectors_mut::<S>(self.out).iter_mut().zip(x) {
            *out = T::minus(s, *out, *x);
        }
    }
}

struct Exponential<'a, T> {
    x: &'a [T],
    out: &'a mut [T],
}

impl<T: Element, S: Simd> Kernel<S> for Exponential<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run(self, s: S) {
        let x = T::vectors::<S>(self.x);
        for (out, x) in T::vectors_mut::<S>(self.out).iter_mut().zip(x) {
            *out = T::exp(s, *x);
        }
    }
}

struct DotByLane<'a, T> {
    x: &'a [T],
    y: &'a [T],
    out: &'a mut [T],
}

impl<T: Element, S: Simd> Kernel<S> for DotByLane<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run(self, s: S) {
        let out = T::vectors_mut::<S>(self.out);
        out.fill(T::zeros::<S>());
        let x = T::vectors::<S>(self.x).chunks_exact(out.len());
        for (x, y) in x.zip(T::vectors::<S>(self.y).chunks_exact(out.len())) {
            for ((out, x), y) in out.iter_mut().zip(x).zip(y) {
                *out = T::mul_add(s, *x, *y, *out);
            }
        }
    }
}

struct Round<'a, T> {
    low: Low,
    x: &'a mut [T],
}

impl<T: Element, S: Simd> Kernel<S> for Round<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run(self, s: S) {
        for x in T::vectors_mut::<S>(self.x) {
            *x = T::round(s, self.low, *x);
        }
    }
}

struct IsFinite<'a, T> {
    x: &'a [T],
}

impl<T: Element, S: Simd> Kernel<S> for IsFinite<'_, T> {
    type Output = bool;

    #[inline(always)]
    fn run(self, s: S) -> bool {
        // 0·x is 0 for finite x, and NaN otherwise; NaN stays in a sum.
        let (zero, mut sums) = (T::zeros::<S>(), [T::zeros::<S>(); 4]);
        let (fours, rest) = T::vectors::<S>(self.x).as_chunks::<4>();
        for x in fours {
            for i in 0..4 {
                sums[i] = T::mul_add(s, zero, x[i], sums[i]);
            }
        }
        for x in rest {
            sums[0] = T::mul_add(s, zero, *x, sums[0]);
        }
        let pairs = [T::plus(s, sums[0], sums[1]), T::plus(s, sums[2], sums[3])];
        T::total(s, T::plus(s, pairs[0], pairs[1])) == T::default()
    }
}

struct Largest<'a, T> {
    x: &'a [T],
}

impl<T: Element, S: Simd> Kernel<S> for Largest<'_, T> {
    type Output = T;

    #[inline(always)]
    fn run(self, s: S) -> T {
        let mut max = T::zeros::<S>();
        for x in T::vectors::<S>(self.x) {
            max = T::larger(s, max, T::abs(s, *x));
        }
        T::largest(s, max)
    }
}

struct Promote<'a, T> {
    factors: [T; 2],
    part: &'a mut [T],
    total: &'a mut [T],
}

impl<T: Element, S: Simd> Kernel<S> for Promote<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run(self, s: S) {
        let [a, b] = self.factors;
        let (a, b) = (T::splat(s, a), T::splat(s, b));
        let parts = T::vectors_mut::<S>(self.part).iter_mut();
        for (total, part) in T::vectors_mut::<S>(self.total).iter_mut().zip(parts) {
            *total = T::mul_add(s, a, T::times(s, b, *part), *total);
            *part = T::zeros::<S>();
        }
    }
}

struct Select<'a, T> {
    mask: &'a [bool],
    to: &'a mut [T],
    from: &'a [T],
}

impl<T: Element, S: Simd> Kernel<S> for Select<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run(self, _: S) {
        let Self { mask, to, from } = self;
        if mask.iter().all(|taken| *taken) {
            return to.copy_from_slice(from);
        }
        let batch = mask.len();
        for (to, from) in to.chunks_exact_mut(batch).zip(from.chunks_exact(batch)) {
            for ((to, from), taken) in to.iter_mut().zip(from).zip(mask) {
                *to = if *taken { *from } else { *to };
            }
        }
    }
}

struct Measure<'a, 'n, T> {
    norms: &'a mut Norms<'n>,
    attempt: Attempted<'a, T>,
}

impl<T: Element, S: Simd> Kernel<S> for Measure<'_, '_, T> {
    type Output = ();

    #[inline(always)]
    fn run(self, _: S) {
        self.norms.measure(self.attempt);
    }
}
