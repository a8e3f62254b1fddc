//! A [`Cnf`](super::Cnf) of one or two hidden layers over tiles.

use candle_core::Result;
use pulp::Simd;

use crate::nn::activation::{Bend, Expand};
use crate::nn::weights::{append_totals, fill, numbers, Place, Weights};
use crate::nn::{Activation, Mlp};
use crate::rows::{At, Slot, TileField};
use crate::simd::outer::add_rows;
use crate::simd::product::Layer;
use crate::simd::{enter, Element, Kernel};

/// The layers, and the matrix B of the trace uᵀ B d₁, u being d₂, or 1 with one hidden layer.
///
/// A slot keeps `[z, l | h_1 | h_2 | d_1 | u | B d_1]`, the values and slopes of the hidden layers,
/// and after that the curvatures where they do not follow from these; time, where it is read, takes
/// the place of l, which no layer reads.  Cotangents are `[v_z, v_l | g_2 | g_1 | c u]`, those of
/// the hidden layers' z and, with c = −v_l that of the trace, the left factor of dB.
pub(crate) struct CnfTiles<T> {
    layers: Vec<CnfTileLayer<T>>,
    coupling: Weights<T>,
    activation: Activation,
    features: usize,
    time: bool,
}

struct CnfTileLayer<T> {
    weights: Weights<T>,
    bias: Vec<T>,
    /// W, `[output][input]`.
    rows: Vec<T>,
}

impl<T: Element> CnfTileLayer<T> {
    /// W_oi.
    fn at(&self, output: usize, input: usize) -> T {
        self.rows[output * self.weights.inputs + input]
    }
}

/// The parts of a slot.
struct SlotParts<'a, X> {
    values: &'a [X],
    slopes: &'a [X],
    /// B d_1.
    coupled: &'a [X],
    curvatures: &'a [X],
}

impl<T: Element> CnfTiles<T> {
    pub(super) fn new<S: Simd>(s: S, mlp: &Mlp) -> Result<Self> {
        let mut layers = Vec::with_capacity(mlp.layers.len());
        let mut dim = mlp.features();
        for layer in &mlp.layers {
            let (inputs, outputs) = (layer.inputs(), layer.outputs());
            let rows = numbers(&layer.weight)?;
            layers.push(CnfTileLayer {
                weights: Weights::new(s, &rows, outputs, inputs, dim),
                bias: numbers(&layer.bias)?,
                rows,
            });
            dim = outputs;
        }
        let (b, left, right) = coupling(&layers, mlp.features());
        Ok(Self {
            coupling: Weights::new(s, &b, left, right, right),
            layers,
            activation: mlp.activation,
            features: mlp.features(),
            time: mlp.time,
        })
    }

    /// Features of all hidden layers.
    fn hidden(&self) -> usize {
        self.layers[1..].iter().map(|l| l.weights.inputs).sum()
    }

    /// Features of d_1 and u.
    fn slopes(&self) -> usize {
        self.coupling.inputs + self.coupling.outputs
    }

    /// Features of the curvatures that are kept.
    fn curvatures(&self) -> usize {
        if self.activation.keeps_curvature() {
            self.hidden()
        } else {
            0
        }
    }

    /// Features of z, l, and of the cotangents before c u.
    fn outputs(&self) -> usize {
        self.features + 1 + self.hidden()
    }

    #[inline(always)]
    fn parts<'a, X, const V: usize>(&self, kept: &'a [X]) -> SlotParts<'a, X> {
        let rest = &kept[(self.features + 1) * V..];
        let (values, rest) = rest.split_at(self.hidden() * V);
        let (slopes, rest) = rest.split_at(self.slopes() * V);
        let (coupled, curvatures) = rest.split_at(self.coupling.outputs * V);
        SlotParts {
            values,
            slopes,
            coupled,
            curvatures,
        }
    }
}

/// B, its rows and its columns.
fn coupling<T: Element>(layers: &[CnfTileLayer<T>], features: usize) -> (Vec<T>, usize, usize) {
    let (first, last) = (&layers[0], &layers[layers.len() - 1]);
    let (left, right) = (last.weights.inputs, first.weights.outputs);
    if layers.len() == 2 {
        let b = (0..right).map(|j| {
            let mut sum = T::default();
            for i in 0..features {
                sum += first.at(j, i) * last.at(i, j);
            }
            sum
        });
        return (b.collect(), 1, right);
    }
    let m = through(first, last, features);
    let b = m.iter().zip(&layers[1].rows).map(|(m, w)| *m * *w);
    (b.collect(), left, right)
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

impl<T: Element> CnfTiles<T> {
    /// Adds what dB leaves for the weights to their gradients.
    fn add_coupling(&self, b: &[T], gradients: &mut [Vec<T>]) {
        match gradients {
            [first, last] => self.add_diagonal(b, first, last),
            [first, middle, last] => {
                let m = through(&self.layers[0], &self.layers[2], self.features);
                let mut m_bar = Vec::with_capacity(b.len());
                for (at, b) in b.iter().enumerate() {
                    middle[at] += *b * m[at];
                    m_bar.push(*b * self.layers[1].rows[at]);
                }
                self.add_through(&m_bar, first, last);
            }
            _ => {}
        }
    }

    /// Of one hidden layer: B_j = Σ_i W1_ji W2_ij.
    fn add_diagonal(&self, b: &[T], first: &mut [T], last: &mut [T]) {
        let (columns, width) = (self.layers[0].weights.inputs, b.len());
        for (j, b) in b.iter().enumerate() {
            for i in 0..self.features {
                first[j * columns + i] += *b * self.layers[1].at(i, j);
                last[i * width + j] += *b * self.layers[0].at(j, i);
            }
        }
    }

    /// Of two: M_kj = Σ_i W1_ji W3_ik.
    fn add_through(&self, m_bar: &[T], first: &mut [T], last: &mut [T]) {
        let columns = self.layers[0].weights.inputs;
        let (left, right) = (self.coupling.outputs, self.coupling.inputs);
        let mut row = vec![T::default(); right];
        for i in 0..self.features {
            let column: Vec<T> = (0..right).map(|j| self.layers[0].at(j, i)).collect();
            row.fill(T::default());
            for (k, m) in m_bar.chunks_exact(right).enumerate() {
                let w = self.layers[2].at(i, k);
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

/// −Σ_k x_k y_k, by lane.
struct MinusDot<'a, T: Element, S: Simd, const V: usize> {
    x: &'a [T::Vector<S>],
    y: &'a [T::Vector<S>],
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
struct Scale<'a, T: Element, S: Simd, const V: usize> {
    c: [T::Vector<S>; V],
    x: &'a [T::Vector<S>],
    out: &'a mut [T::Vector<S>],
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

impl<T: Element> TileField<T> for CnfTiles<T> {
    fn kept(&self) -> usize {
        self.outputs() + self.slopes() + self.coupling.outputs + self.curvatures()
    }

    fn cotangents<S: Simd>(&self) -> usize {
        // c u shares its place with B^T u; the transposition reads whole vectors of features.
        let shared = self.coupling.outputs.max(self.coupling.inputs);
        self.outputs() + shared + T::lanes::<S>()
    }

    fn sums<S: Simd>(&self) -> usize {
        let of = |l: &CnfTileLayer<T>| l.weights.sums::<S>() + l.weights.outputs;
        self.layers.iter().map(of).sum::<usize>() + self.coupling.sums::<S>()
    }

    fn scratch<S: Simd, const V: usize>(&self, pairs: usize) -> usize {
        let spare = self.layers.iter().map(|l| l.weights.scratch::<S, V>(pairs));
        let most = spare.max().unwrap_or(0);
        most.max(self.coupling.scratch::<S, V>(pairs))
    }

    fn parameters(&self) -> usize {
        let of = |l: &CnfTileLayer<T>| l.rows.len() + l.bias.len();
        self.layers.iter().map(of).sum()
    }

    #[inline(always)]
    fn velocity<S: Simd, const V: usize>(
        &self,
        s: S,
        at: &At<'_, T::Vector<S>>,
        kept: &mut [T::Vector<S>],
        k: Option<&mut [T::Vector<S>]>,
    ) {
        let Some((last, hidden)) = self.layers.split_last() else {
            return;
        };
        let (mut x, rest) = kept.split_at_mut((self.features + 1) * V);
        if self.time {
            x[self.features * V..].copy_from_slice(at.times);
        }
        let (mut values, rest) = rest.split_at_mut(self.hidden() * V);
        let (slopes, rest) = rest.split_at_mut(self.slopes() * V);
        let (coupled, mut curvatures) = rest.split_at_mut(self.coupling.outputs * V);
        // What hidden layers do not overwrite is the u of one hidden layer.
        slopes[self.coupling.inputs * V..].fill(T::splat(s, T::of(1.0)));
        let mut left = &mut *slopes;
        for layer in hidden {
            let size = layer.weights.outputs * V;
            let (z, slope, curvature);
            (z, values) = values.split_at_mut(size);
            (slope, left) = left.split_at_mut(size);
            let held = if curvatures.is_empty() { 0 } else { size };
            (curvature, curvatures) = curvatures.split_at_mut(held);
            let product = Layer::<T, S, V> {
                weights: &layer.weights.forward,
                start: &layer.bias,
                x,
                out: z,
            };
            enter(s, product);
            let expand = Expand::<T, S> {
                activation: self.activation,
                z,
                slope,
                curvature,
            };
            enter(s, expand);
            x = z;
        }
        let (first, u) = slopes.split_at(self.coupling.inputs * V);
        let product = Layer::<T, S, V> {
            weights: &self.coupling.forward,
            start: &[],
            x: first,
            out: coupled,
        };
        enter(s, product);
        if let Some(k) = k {
            let (velocity, trace) = k.split_at_mut(self.features * V);
            let product = Layer::<T, S, V> {
                weights: &last.weights.forward,
                start: &last.bias,
                x,
                out: velocity,
            };
            enter(s, product);
            let minus = enter(s, MinusDot::<T, S, V> { x: u, y: coupled });
            trace.copy_from_slice(&minus);
        }
    }

    #[inline(always)]
    fn vjp<S: Simd, const V: usize>(
        &self,
        s: S,
        kept: &[T::Vector<S>],
        cotangents: &mut [T::Vector<S>],
        w: &mut [T::Vector<S>],
    ) {
        let kept = self.parts::<_, V>(kept);
        let (mut values, mut curvatures) = (kept.values, kept.curvatures);
        let (slopes, u) = kept.slopes.split_at(self.coupling.inputs * V);
        let (cotangents, shared) = cotangents.split_at_mut(self.outputs() * V);
        let (mut g, mut rest) = cotangents.split_at_mut((self.features + 1) * V);
        let mut c = [T::zeros::<S>(); V];
        for (c, v) in c.iter_mut().zip(&g[self.features * V..]) {
            *c = T::minus(s, T::zeros::<S>(), *v);
        }
        for (l, layer) in self.layers.iter().enumerate().skip(1).rev() {
            let size = layer.weights.inputs * V;
            let (out, value, curvature);
            (out, rest) = rest.split_at_mut(size);
            (values, value) = values.split_at(values.len() - size);
            let held = if curvatures.is_empty() { 0 } else { size };
            (curvatures, curvature) = curvatures.split_at(curvatures.len() - held);
            let product = Layer::<T, S, V> {
                weights: &layer.weights.adjoint,
                start: &[],
                x: g,
                out,
            };
            enter(s, product);
            if l == 1 {
                let product = Layer::<T, S, V> {
                    weights: &self.coupling.adjoint,
                    start: &[],
                    x: u,
                    out: shared,
                };
                enter(s, product);
            }
            let bend = Bend::<T, S, V> {
                activation: self.activation,
                value,
                slope: if l == 1 { slopes } else { u },
                curvature,
                c,
                r: if l == 1 { &*shared } else { kept.coupled },
                g: out,
            };
            enter(s, bend);
            g = out;
        }
        let product = Layer::<T, S, V> {
            weights: &self.layers[0].weights.adjoint,
            start: &[],
            x: g,
            out: w,
        };
        enter(s, product);
        w[self.features * V..].fill(T::zeros::<S>());
        let scale = Scale::<T, S, V> {
            c,
            x: u,
            out: shared,
        };
        enter(s, scale);
    }

    #[inline(always)]
    fn accumulate<S: Simd, const V: usize>(
        &self,
        s: S,
        window: &[Slot<'_, T::Vector<S>>],
        scratch: &mut [T::Vector<S>],
        sums: &mut [T::Vector<S>],
    ) {
        let (mut read, mut left, mut rest) = (0, self.outputs(), sums);
        let mut pairs = Vec::with_capacity(window.len());
        for (l, layer) in self.layers.iter().enumerate() {
            let Weights {
                inputs, outputs, ..
            } = layer.weights;
            left = if l + 1 < self.layers.len() {
                left - outputs
            } else {
                0
            };
            fill::<_, V>(&mut pairs, window, Place { read, left }, inputs);
            let (weights, after) = rest.split_at_mut(layer.weights.sums::<S>());
            layer
                .weights
                .accumulate::<S, V>(s, &pairs, scratch, weights);
            let (biases, after) = after.split_at_mut(outputs);
            add_rows::<T, S, V>(s, &pairs, biases);
            rest = after;
            read += if l == 0 { self.features + 1 } else { inputs };
        }
        let place = Place {
            read,
            left: self.outputs(),
        };
        fill::<_, V>(&mut pairs, window, place, self.coupling.inputs);
        self.coupling.accumulate::<S, V>(s, &pairs, scratch, rest);
    }

    #[inline(always)]
    fn gradients<S: Simd>(&self, s: S, sums: &[T::Vector<S>]) -> Vec<T> {
        let (mut weights, mut biases) = (vec![], vec![]);
        let mut rest = sums;
        for layer in &self.layers {
            let (of_weights, of_bias);
            (of_weights, rest) = rest.split_at(layer.weights.sums::<S>());
            (of_bias, rest) = rest.split_at(layer.weights.outputs);
            let mut gradient = Vec::with_capacity(layer.rows.len());
            layer.weights.gradient(s, of_weights, &mut gradient);
            weights.push(gradient);
            biases.push(of_bias);
        }
        let mut b = vec![];
        self.coupling.gradient(s, rest, &mut b);
        self.add_coupling(&b, &mut weights);
        let mut gradients = Vec::with_capacity(self.parameters());
        for (weight, bias) in weights.iter().zip(biases) {
            gradients.extend(weight);
            append_totals::<T, S>(s, bias, &mut gradients);
        }
        gradients
    }
}
