//! tr ∂g/∂z of a perceptron g of three hidden layers or more, over tiles.
//!
//! With w_i, column i of W₁, and v_i, row i of the last matrix W_{L+1},
//!
//! tr ∂g/∂z = Σ_i v_iᵀ D_L W_L D_{L−1} … D_2 W_2 D_1 w_i = Σ_i q_iᵀ D_{L−1} u_i,
//!
//! where u_i = W_{L−1} D_{L−2} … W_2 D_1 w_i comes from the first layer and q_i = W_Lᵀ D_L v_i from the last.  The two
//! outer products are linear in slopes, W_2 D_1 w_i = P_i d_1 and q_i = Q_i d_L with P_i = W_2 ∘ w_iᵀ and Q_i = W_Lᵀ ∘
//! v_iᵀ, so that each is one product for all i, and only slopes are kept of its input.  The layers between are applied
//! to each tangent.

use pulp::Simd;

use super::{CnfTileLayer, Trail};
use crate::nn::tangents::{is_zero, Form, MinusForm, Through};
use crate::nn::weights::{fill, LayerWeights, Place, Weights};
use crate::rows::Slot;
use crate::simd::outer::Pair;
use crate::simd::product::Layer;
use crate::simd::{enter, Element};

/// The numbers of P and Q together that are worth to be held: 16 MiB in f32.
const MOST: usize = 1 << 22;

/// Whether the trace of a perceptron of these widths, features first and last, is formed in this way.
pub(super) fn is_for(widths: &[usize]) -> bool {
    let [features, hidden @ .., _] = widths else {
        return false;
    };
    let (Some([n, m]), Some([before, last])) = (hidden.first_chunk(), hidden.last_chunk()) else {
        return false;
    };
    let numbers = n
        .saturating_mul(*m)
        .saturating_add(before.saturating_mul(*last));
    hidden.len() > 2 && numbers.saturating_mul(*features) <= MOST
}

/// P and Q, and where a slot has what.
///
/// A slot keeps `[u | q]` and, for every layer between W_2 and W_L, what it reads and what it writes, of every i; the
/// last u_i are those that q_i meet.  Cotangents are `[of q | of u_i behind W_{L−1} | … | of u_i behind W_2]`, and the
/// scratch of one layer.
pub(super) struct Chain<T> {
    first: Weights<T>,
    last: Weights<T>,
    features: usize,
    /// Of all hidden layers.
    widths: Vec<usize>,
}

impl<T: Element> Chain<T> {
    pub(super) fn new<S: Simd>(s: S, layers: &[CnfTileLayer<T>], features: usize) -> Self {
        let widths: Vec<_> = layers[1..].iter().map(|l| l.weights.inputs).collect();
        let (top, end) = (widths.len() - 1, layers.len() - 1);
        let (n, m) = (widths[0], widths[1]);
        let mut p = Vec::with_capacity(features * n * m);
        for i in 0..features {
            for k in 0..m {
                for j in 0..n {
                    p.push(layers[1].at(k, j) * layers[0].at(j, i));
                }
            }
        }
        let first = Weights::pack(s, &p, features * m, n, n);
        let (n, m) = (widths[top], widths[top - 1]);
        let mut q = Vec::with_capacity(features * n * m);
        for i in 0..features {
            for k in 0..m {
                for j in 0..n {
                    q.push(layers[top].at(j, k) * layers[end].at(i, j));
                }
            }
        }
        Self {
            first,
            last: Weights::pack(s, &q, features * m, n, n),
            features,
            widths,
        }
    }

    /// The hidden layer, from zero, whose slopes u_i and q_i meet at.
    fn joint(&self) -> usize {
        self.widths.len() - 2
    }

    /// Features of the tangents behind hidden layer l's matrix.
    fn size(&self, l: usize) -> usize {
        self.features * self.widths[l]
    }

    /// Where the tangents behind hidden layer l's matrix are kept, from hidden layer 1 on.
    fn behind(&self, l: usize) -> usize {
        (1..l).map(|l| 2 * self.size(l)).sum()
    }

    /// Where what the matrix of hidden layer l reads is kept, from hidden layer 2 on.
    fn read(&self, l: usize) -> usize {
        self.behind(l) - self.size(l - 1)
    }

    /// Where q is kept.
    fn met(&self) -> usize {
        self.behind(self.joint()) + self.size(self.joint())
    }

    /// Where the cotangents of the tangents behind hidden layer l's matrix are left.
    fn left(&self, l: usize) -> usize {
        let below = l + 1..=self.joint();
        self.size(self.joint()) + below.map(|l| self.size(l)).sum::<usize>()
    }

    /// Where the scratch of one layer begins, for the tangents in it and for what is left for its slopes.
    fn scratch_at(&self) -> usize {
        self.left(1) + self.size(1)
    }

    /// Features of the tangents that are pulled back to a layer.
    fn pulled(&self) -> usize {
        let between = 1..self.joint();
        between.map(|l| self.size(l)).max().unwrap_or(0)
    }

    pub(super) fn kept(&self) -> usize {
        self.met() + self.size(self.joint())
    }

    pub(super) fn cotangents(&self) -> usize {
        self.scratch_at() + self.pulled() + self.widths.iter().max().copied().unwrap_or(0)
    }

    pub(super) fn sums<S: Simd>(&self) -> usize {
        self.first.sums::<S>() + self.last.sums::<S>()
    }

    /// For so many evaluations, with one pair of each and of each of its tangents.
    pub(super) fn scratch<S: Simd, const V: usize>(
        &self,
        layers: &[CnfTileLayer<T>],
        pairs: usize,
    ) -> usize {
        let mut most = self.first.scratch::<S, V>(pairs);
        most = most.max(self.last.scratch::<S, V>(pairs));
        for layer in &layers[2..layers.len() - 2] {
            most = most.max(layer.weights.scratch::<S, V>(pairs * (1 + self.features)));
        }
        most
    }

    /// Fills what is kept.
    #[inline(always)]
    pub(super) fn evaluate<S: Simd, const V: usize>(
        &self,
        s: S,
        layers: &[CnfTileLayer<T>],
        slopes: &[T::Vector<S>],
        kept: &mut [T::Vector<S>],
    ) {
        let mut slopes = Trail { rest: slopes };
        let (tangents, met) = kept.split_at_mut(self.met() * V);
        let (mut u, mut rest) = tangents.split_at_mut(self.size(1) * V);
        let product = Layer::<T, S, V> {
            weights: &self.first.forward,
            start: &[],
            x: slopes.next(self.widths[0] * V),
            out: u,
        };
        enter(s, product);
        for (l, layer) in layers.iter().enumerate().take(self.joint() + 1).skip(2) {
            let (x, out);
            (x, rest) = rest.split_at_mut(self.size(l - 1) * V);
            (out, rest) = rest.split_at_mut(self.size(l) * V);
            let through = Through::<T, S, V> {
                c: None,
                d: slopes.next(self.widths[l - 1] * V),
                x: u,
                out: x,
            };
            enter(s, through);
            let each = out.chunks_exact_mut(self.widths[l] * V);
            for (x, out) in x.chunks_exact(self.widths[l - 1] * V).zip(each) {
                let product = Layer::<T, S, V> {
                    weights: &layer.weights.forward,
                    start: &[],
                    x,
                    out,
                };
                enter(s, product);
            }
            u = out;
        }
        slopes.next(self.widths[self.joint()] * V);
        let product = Layer::<T, S, V> {
            weights: &self.last.forward,
            start: &[],
            x: slopes.next(self.widths[self.joint() + 1] * V),
            out: met,
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
        let joint = self.joint();
        let before: usize = self.widths[..joint].iter().sum();
        let minus = MinusForm::<T, S, V> {
            d: &slopes[before * V..][..self.widths[joint] * V],
            u: &kept[self.behind(joint) * V..][..self.size(joint) * V],
            q: &kept[self.met() * V..][..self.size(joint) * V],
        };
        enter(s, minus)
    }

    /// What the trace leaves for the slopes of hidden layer l, from zero, given its cotangent c.  Hidden layers are
    /// visited from the last one to the first.  Where c is zero, as in a stage that only other stages read, nothing is
    /// left.
    #[inline(always)]
    pub(super) fn pull<'a, S: Simd, const V: usize>(
        &self,
        s: S,
        layers: &[CnfTileLayer<T>],
        (l, c): (usize, [T::Vector<S>; V]),
        slopes: &[T::Vector<S>],
        kept: &[T::Vector<S>],
        cotangents: &'a mut [T::Vector<S>],
    ) -> &'a [T::Vector<S>] {
        let (joint, n) = (self.joint(), self.widths[l]);
        let size = self.size(joint) * V;
        let (left, scratch) = cotangents.split_at_mut(self.scratch_at() * V);
        let (tangents, bar) = scratch.split_at_mut(self.pulled() * V);
        let bar = &mut bar[..n * V];
        if is_zero::<T, S>(&c) {
            bar.fill(T::zeros::<S>());
            return bar;
        }
        let q = &kept[self.met() * V..][..size];
        if l > joint {
            let before: usize = self.widths[..joint].iter().sum();
            let d = &slopes[before * V..][..self.widths[joint] * V];
            let u = &kept[self.behind(joint) * V..][..size];
            let (of_q, of_u) = left.split_at_mut(size);
            for (x, out) in [(u, &mut *of_q), (q, &mut of_u[..size])] {
                let through = Through::<T, S, V> {
                    c: Some(c),
                    d,
                    x,
                    out,
                };
                enter(s, through);
            }
            let product = Layer::<T, S, V> {
                weights: &self.last.adjoint,
                start: &[],
                x: of_q,
                out: bar,
            };
            enter(s, product);
        } else if l == 0 {
            let product = Layer::<T, S, V> {
                weights: &self.first.adjoint,
                start: &[],
                x: &left[self.left(1) * V..],
                out: bar,
            };
            enter(s, product);
        } else if l == joint {
            let u = &kept[self.behind(l) * V..][..size];
            let form = Form::<T, S, V> {
                c: Some(c),
                x: u,
                y: q,
                out: bar,
            };
            enter(s, form);
        } else {
            let size = self.size(l) * V;
            let (tangents, above) = (&mut tangents[..size], self.left(l + 1) * V);
            let (from, to) = left[above..].split_at_mut(self.size(l + 1) * V);
            let each = tangents.chunks_exact_mut(n * V);
            for (x, out) in from.chunks_exact(self.widths[l + 1] * V).zip(each) {
                let product = Layer::<T, S, V> {
                    weights: &layers[l + 1].weights.adjoint,
                    start: &[],
                    x,
                    out,
                };
                enter(s, product);
            }
            let form = Form::<T, S, V> {
                c: None,
                x: tangents,
                y: &kept[self.behind(l) * V..][..size],
                out: bar,
            };
            enter(s, form);
            let before: usize = self.widths[..l].iter().sum();
            let through = Through::<T, S, V> {
                c: None,
                d: &slopes[before * V..][..n * V],
                x: tangents,
                out: &mut to[..size],
            };
            enter(s, through);
        }
        bar
    }

    /// Whether the cotangent of the trace was zero.
    #[inline(always)]
    fn left_nothing<S: Simd, const V: usize>(&self, slot: &Slot<'_, T::Vector<S>>) -> bool {
        is_zero::<T, S>(&slot.cotangents[self.features * V..][..V])
    }

    /// Adds the operands of the products of layer l, from zero, with tangents: what is kept of the trace and its
    /// cotangents begin at `place`.
    #[inline(always)]
    pub(super) fn add_pairs<'a, S: Simd, const V: usize>(
        &self,
        l: usize,
        window: &[Slot<'a, T::Vector<S>>],
        place: Place,
        pairs: &mut Vec<Pair<'a, T::Vector<S>>>,
    ) {
        if l < 2 || l > self.joint() {
            return;
        }
        let (inputs, outputs) = (self.widths[l - 1], self.widths[l]);
        let (read, left) = (place.read + self.read(l), place.left + self.left(l));
        for slot in window {
            if self.left_nothing::<S, V>(slot) {
                continue;
            }
            for i in 0..self.features {
                pairs.push(Pair {
                    x: &slot.kept[(read + i * inputs) * V..][..inputs * V],
                    g: &slot.cotangents[(left + i * outputs) * V..],
                });
            }
        }
    }

    /// Adds dP and dQ to the sums; `of` is where slopes and the cotangents of the trace begin.
    #[inline(always)]
    pub(super) fn accumulate<'a, S: Simd, const V: usize>(
        &self,
        s: S,
        window: &[Slot<'a, T::Vector<S>>],
        of: Place,
        pairs: &mut Vec<Pair<'a, T::Vector<S>>>,
        scratch: &mut [T::Vector<S>],
        sums: &mut [T::Vector<S>],
    ) {
        let (first, last) = sums.split_at_mut(self.first.sums::<S>());
        let mut left = Vec::with_capacity(window.len());
        for slot in window {
            if !self.left_nothing::<S, V>(slot) {
                left.push(*slot);
            }
        }
        let window = &left[..];
        let place = Place {
            read: of.read,
            left: of.left + self.left(1),
        };
        fill::<_, V>(pairs, window, place, self.widths[0]);
        self.first.accumulate::<S, V>(s, pairs, scratch, first);
        let before: usize = self.widths[..=self.joint()].iter().sum();
        let place = Place {
            read: of.read + before,
            left: of.left,
        };
        fill::<_, V>(pairs, window, place, self.widths[self.joint() + 1]);
        self.last.accumulate::<S, V>(s, pairs, scratch, last);
    }

    /// Adds what dP and dQ leave for the weights to their gradients.
    #[inline(always)]
    pub(super) fn gradients<S: Simd>(
        &self,
        s: S,
        layers: &[CnfTileLayer<T>],
        sums: &[T::Vector<S>],
        gradients: &mut [Vec<T>],
    ) {
        let (first, last) = sums.split_at(self.first.sums::<S>());
        let (mut p, mut q) = (vec![], vec![]);
        self.first.gradient(s, first, &mut p);
        self.last.gradient(s, last, &mut q);
        let (top, end) = (self.joint() + 1, layers.len() - 1);
        let mut add = |l: usize, (row, column): (usize, usize), x: T| {
            gradients[l][row * layers[l].weights.inputs + column] += x;
        };
        for (at, of) in p.chunks_exact(self.widths[0]).enumerate() {
            let (i, k) = (at / self.widths[1], at % self.widths[1]);
            for (j, x) in of.iter().enumerate() {
                add(1, (k, j), *x * layers[0].at(j, i));
                add(0, (j, i), *x * layers[1].at(k, j));
            }
        }
        for (at, of) in q.chunks_exact(self.widths[top]).enumerate() {
            let (i, k) = (at / self.widths[top - 1], at % self.widths[top - 1]);
            for (j, x) in of.iter().enumerate() {
                add(top, (j, k), *x * layers[end].at(i, j));
                add(end, (i, j), *x * layers[top].at(j, k));
            }
        }
    }
}
