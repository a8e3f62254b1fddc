//! Sums of tiles whose coefficients are combinations of functionals of the noise.

use pulp::Simd;

use crate::simd::{Element, Kernel};

/// Coefficients on 1 and on the other functionals that a table reads.
pub(super) type ByFunctional = [f64; 5];

/// Σ_j (Σ_φ c_jφ φ) x_j, feature by feature: the terms in their order, the first functional being 1.
#[derive(Clone, Debug)]
pub(in crate::rows) struct Mix<T> {
    terms: Vec<MixTerm>,
    /// By term, as far as its coefficients go.
    numbers: Vec<T>,
}

/// A term: which of the x it multiplies, and its coefficients, of which the last one is not zero.
#[derive(Clone, Debug)]
struct MixTerm {
    of: usize,
    cs: Vec<f64>,
}

impl<T: Element> Mix<T> {
    /// Of terms (which x, coefficients by functional); those that are zero are left out.
    pub(super) fn new(terms: impl IntoIterator<Item = (usize, ByFunctional)>) -> Self {
        let trimmed = terms.into_iter().filter_map(|(of, cs)| {
            let last = cs.iter().rposition(|c| *c != 0.0)?;
            let cs = cs[..=last].to_vec();
            Some(MixTerm { of, cs })
        });
        let terms: Vec<_> = trimmed.collect();
        let count = terms.iter().map(|term| term.cs.len()).sum();
        Self {
            terms,
            numbers: vec![T::default(); count],
        }
    }

    /// Multiplies the coefficients of every x by a factor.
    pub(super) fn multiply(&mut self, factor: impl Fn(usize) -> f64) {
        let mut numbers = self.numbers.iter_mut();
        for term in &self.terms {
            let factor = factor(term.of);
            // In this order: the other one takes a number more than there are coefficients.
            for (c, number) in term.cs.iter().zip(numbers.by_ref()) {
                *number = T::of(factor * c);
            }
        }
    }

    /// Which of the x it reads.
    pub(super) fn reads(&self, of: usize) -> bool {
        self.terms.iter().any(|term| term.of == of)
    }
}

/// A sum into `out`, with the x and the functionals behind 1 one after the other.
pub(in crate::rows) struct Mixed<'a, T> {
    pub(super) mix: &'a Mix<T>,
    pub(super) functionals: &'a [T],
    pub(super) xs: &'a [T],
    pub(super) out: &'a mut [T],
}

impl<T: Element, S: Simd> Kernel<S> for Mixed<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run(self, s: S) {
        let out = T::vectors_mut::<S>(self.out);
        let (functionals, xs) = (T::vectors::<S>(self.functionals), T::vectors::<S>(self.xs));
        let size = out.len();
        for (i, out) in out.iter_mut().enumerate() {
            let (mut sum, mut cs) = (T::zeros::<S>(), self.mix.numbers.as_slice());
            for term in &self.mix.terms {
                let own;
                (own, cs) = cs.split_at(term.cs.len());
                let mut weight = T::splat(s, own[0]);
                for (j, c) in own[1..].iter().enumerate() {
                    weight = T::mul_add(s, T::splat(s, *c), functionals[j * size + i], weight);
                }
                sum = T::mul_add(s, weight, xs[term.of * size + i], sum);
            }
            *out = sum;
        }
    }
}
