//! tr ∂g/∂z of a perceptron g of one or two hidden layers, over tiles: uᵀ B d₁, u being d₂, or 1 with one hidden layer.

use pulp::Simd;

use super::CnfTileLayer;
use crate::nn::tangents::{MinusDot, Scale};
use crate::nn::weights::{fill, LayerWeights, Place, Weights};
use crate::rows::Slot;
use crate::simd::outer::Pair;
use crate::simd::product::Layer;
use crate::simd::{enter, Element};

/// B.  A slot keeps `[1 | B d_1]` of one hidden layer, `[B d_1]` of two, and of cotangents c u.
pub(super) struct Coupling<T> {
    b: Weights<T>,
    features: usize,
    /// Whether u is 1, and kept.
    diagonal: bool,
}

impl<T: Element> Coupling<T> {
    pub(super) fn new<S: Simd>(s: S, layers: &[CnfTileLayer<T>], features: usize) -> Self {
        let (first, last) = (&layers[0], &layers[layers.len() - 1]);
        let (left, right) = (last.weights.inputs, first.weights.outputs);
        let diagonal = layers.len() == 2;
        let b: Vec<_> = if diagonal {
            let b = (0..right).map(|j| {
                let mut sum = T::default();
                for i in 0..features {
                    sum += first.at(j, i) * last.at(i, j);
                }
                sum
            });
            b.collect()
        } else {
            let m = through(first, last, features);
            m.iter()
                .zip(&layers[1].rows)
                .map(|(m, w)| *m * *w)
                .collect()
        };
        let left = if diagonal { 1 } else { left };
        Self {
            b: Weights::pack(s, &b, left, right, right),
            features,
            diagonal,
        }
    }

    pub(super) fn kept(&self) -> usize {
        self.b.outputs + usize::from(self.diagonal)
    }

    pub(super) fn cotangents(&self) -> usize {
        // c u shares its place with B^T u.
        self.b.outputs.max(self.b.inputs)
    }

    pub(super) fn sums<S: Simd>(&self) -> usize {
        self.b.sums::<S>()
    }

    pub(super) fn scratch<S: Simd, const V: usize>(&self, pairs: usize) -> usize {
        self.b.scratch::<S, V>(pairs)
    }

    /// u, of the slopes or of what is kept, and B d_1.
    #[inline(always)]
    fn factors<'a, X, const V: usize>(&self, slopes: &'a [X], kept: &'a [X]) -> (&'a [X], &'a [X]) {
        match self.diagonal {
            true => kept.split_at(V),
            false => (&slopes[self.b.inputs * V..], kept),
        }
    }

    /// Fills what is kept.
    #[inline(always)]
    pub(super) fn evaluate<S: Simd, const V: usize>(
        &self,
        s: S,
        slopes: &[T::Vector<S>],
        kept: &mut [T::Vector<S>],
    ) {
        let (u, coupled) = kept.split_at_mut(if self.diagonal { V } else { 0 });
        u.fill(T::splat(s, T::of(1.0)));
        let product = Layer::<T, S, V> {
            weights: &self.b.forward,
            start: &[],
            x: &slopes[..self.b.inputs * V],
            out: coupled,
        };
        enter(s, product);
    }

    /// −tr ∂g/∂z.
    #[inline(always)]
    pub(super) fn minus_trace<S: Simd, const V: usize>(
        &self,
        s: S,
        slopes: &[T::Vector<S>],
        kept: &[T::Vector<S>],
    ) -> [T::Vector<S>; V] {
        let (x, y) = self.factors::<_, V>(slopes, kept);
        enter(s, MinusDot::<T, S, V> { x, y })
    }

    /// What the trace leaves for the slopes of hidden layer l, from zero, but for the factor c.
    #[inline(always)]
    pub(super) fn pull<'a, S: Simd, const V: usize>(
        &self,
        s: S,
        l: usize,
        slopes: &'a [T::Vector<S>],
        kept: &'a [T::Vector<S>],
        cotangents: &'a mut [T::Vector<S>],
    ) -> &'a [T::Vector<S>] {
        let (u, coupled) = self.factors::<_, V>(slopes, kept);
        if l > 0 {
            return coupled;
        }
        let out = &mut cotangents[..self.b.inputs * V];
        let product = Layer::<T, S, V> {
            weights: &self.b.adjoint,
            start: &[],
            x: u,
            out,
        };
        enter(s, product);
        out
    }

    /// Leaves the left factor of dB.
    #[inline(always)]
    pub(super) fn leave<S: Simd, const V: usize>(
        &self,
        s: S,
        c: [T::Vector<S>; V],
        slopes: &[T::Vector<S>],
        kept: &[T::Vector<S>],
        cotangents: &mut [T::Vector<S>],
    ) {
        let (x, _) = self.factors::<_, V>(slopes, kept);
        let out = cotangents;
        enter(s, Scale::<T, S, V> { c, x, out });
    }

    /// Adds dB to the sums.
    #[inline(always)]
    pub(super) fn accumulate<'a, S: Simd, const V: usize>(
        &self,
        s: S,
        window: &[Slot<'a, T::Vector<S>>],
        place: Place,
        pairs: &mut Vec<Pair<'a, T::Vector<S>>>,
        scratch: &mut [T::Vector<S>],
        sums: &mut [T::Vector<S>],
    ) {
        fill::<_, V>(pairs, window, place, self.b.inputs);
        self.b.accumulate::<S, V>(s, pairs, scratch, sums);
    }

    /// Adds what dB leaves for the weights to their gradients.
    #[inline(always)]
    pub(super) fn gradients<S: Simd>(
        &self,
        s: S,
        layers: &[CnfTileLayer<T>],
        sums: &[T::Vector<S>],
        gradients: &mut [Vec<T>],
    ) {
        let mut b = vec![];
        self.b.gradient(s, sums, &mut b);
        match gradients {
            [first, last] => self.add_diagonal(layers, &b, first, last),
            [first, middle, last] => {
                let m = through(&layers[0], &layers[2], self.features);
                let mut m_bar = Vec::with_capacity(b.len());
                for (at, b) in b.iter().enumerate() {
                    middle[at] += *b * m[at];
                    m_bar.push(*b * layers[1].rows[at]);
                }
                self.add_through(layers, &m_bar, first, last);
            }
            _ => {}
        }
    }

    /// Of one hidden layer: B_j = Σ_i W1_ji W2_ij.
    fn add_diagonal(&self, layers: &[CnfTileLayer<T>], b: &[T], first: &mut [T], last: &mut [T]) {
        let (columns, width) = (layers[0].weights.inputs, b.len());
        for (j, b) in b.iter().enumerate() {
            for i in 0..self.features {
                first[j * columns + i] += *b * layers[1].at(i, j);
                last[i * width + j] += *b * layers[0].at(j, i);
            }
        }
    }

    /// Of two: M_kj = Σ_i W1_ji W3_ik.
    fn add_through(
        &self,
        layers: &[CnfTileLayer<T>],
        m_bar: &[T],
        first: &mut [T],
        last: &mut [T],
    ) {
        let columns = layers[0].weights.inputs;
        let (left, right) = (self.b.outputs, self.b.inputs);
        let mut row = vec![T::default(); right];
        for i in 0..self.features {
            let column: Vec<T> = (0..right).map(|j| layers[0].at(j, i)).collect();
            row.fill(T::default());
            for (k, m) in m_bar.chunks_exact(right).enumerate() {
                let w = layers[2].at(i, k);
                let mut sum = T::default();
                for ((m, x), out) in m.iter().zip(&column).zip(&mut row) {
                    sum += *m * *x;
                    *out += *m * w;
                }
                last[i * left + k] += sum;
            }
            for (j, sum) in row.iter().enumerate() {
                first[j * columns + i] += *sum;
            }
        }
    }
}

/// M = (W₁ W₃)ᵀ, `[k][j]`.
fn through<T: Element>(first: &CnfTileLayer<T>, last: &CnfTileLayer<T>, features: usize) -> Vec<T> {
    let (left, right) = (last.weights.inputs, first.weights.outputs);
    let mut m = vec![T::default(); left * right];
    for (k, row) in m.chunks_exact_mut(right).enumerate() {
        for (j, m) in row.iter_mut().enumerate() {
            for i in 0..features {
                *m += first.at(j, i) * last.at(i, k);
            }
        }
    }
    m
}
