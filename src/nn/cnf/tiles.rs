//! A [`Cnf`](super::Cnf) over tiles.

mod chain;
mod coupling;

use candle_core::Result;
use pulp::Simd;

use crate::nn::activation::{Bend, Expand};
use crate::nn::weights::{append_totals, fill, numbers, LayerWeights, Place, Weights};
use crate::nn::{Activation, Mlp};
use crate::rows::{At, Slot, TileField};
use crate::simd::outer::add_rows;
use crate::simd::product::Layer;
use crate::simd::{enter, Element};
use chain::Chain;
use coupling::Coupling;

/// Whether a perceptron of these widths, features first and last, has tiles: not if the products of its trace would
/// be too large, nor without hidden layers.
pub(super) fn are_for(widths: &[usize]) -> bool {
    matches!(widths.len(), 3 | 4) || chain::is_for(widths)
}

/// The layers, and what the trace is formed by.
///
/// A slot keeps `[z, l | h_1 | h_2 | … | d_1 | d_2 | …]`, the values and slopes of the hidden layers, then what the
/// trace keeps, and after that the curvatures where they do not follow from these; time, where it is read, takes
/// the place of l, which no layer reads.  Cotangents are `[v_z, v_l | … | g_2 | g_1]`, those of the hidden layers' z,
/// and those that the trace leaves, of which c = −v_l is the cotangent.
pub(crate) struct CnfTiles<T> {
    layers: Vec<CnfTileLayer<T>>,
    trace: Trace<T>,
    activation: Activation,
    features: usize,
    time: bool,
}

/// The trace, by the number of hidden layers.
enum Trace<T> {
    /// One or two.
    Coupling(Coupling<T>),
    /// More.
    Chain(Chain<T>),
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

/// What the hidden layers keep, from the first one on.
struct Trail<'a, X> {
    rest: &'a [X],
}

impl<'a, X> Trail<'a, X> {
    /// So many vectors of the next one.
    #[inline(always)]
    fn next(&mut self, vectors: usize) -> &'a [X] {
        let next;
        (next, self.rest) = self.rest.split_at(vectors);
        next
    }

    /// The same from the last one on.
    #[inline(always)]
    fn last(&mut self, vectors: usize) -> &'a [X] {
        let last;
        (self.rest, last) = self.rest.split_at(self.rest.len() - vectors);
        last
    }
}

/// The parts of a slot.
struct SlotParts<'a, X> {
    values: Trail<'a, X>,
    slopes: &'a [X],
    trace: &'a [X],
    curvatures: Trail<'a, X>,
}

impl<T: Element> CnfTiles<T> {
    pub(super) fn new<S: Simd>(s: S, mlp: &Mlp) -> Result<Self> {
        let mut layers = Vec::with_capacity(mlp.layers.len());
        let mut dim = mlp.features();
        for layer in &mlp.layers {
            let (inputs, outputs) = (layer.inputs(), layer.outputs());
            let rows = numbers(&layer.weight)?;
            layers.push(CnfTileLayer {
                weights: Weights::pack(s, &rows, outputs, inputs, dim),
                bias: numbers(&layer.bias)?,
                rows,
            });
            dim = outputs;
        }
        let features = mlp.features();
        Ok(Self {
            trace: match layers.len() {
                ..=3 => Trace::Coupling(Coupling::new(s, &layers, features)),
                _ => Trace::Chain(Chain::new(s, &layers, features)),
            },
            layers,
            activation: mlp.activation,
            features,
            time: mlp.time,
        })
    }

    /// Features of all hidden layers.
    fn hidden(&self) -> usize {
        self.layers[1..].iter().map(|l| l.weights.inputs).sum()
    }

    /// Features that the trace keeps.
    fn of_trace(&self) -> usize {
        match &self.trace {
            Trace::Coupling(trace) => trace.kept(),
            Trace::Chain(trace) => trace.kept(),
        }
    }

    /// Features of the curvatures that are kept.
    fn curvatures(&self) -> usize {
        if self.activation.keeps_curvature() {
            self.hidden()
        } else {
            0
        }
    }

    /// Features of z, l, and of the cotangents before those that the trace leaves.
    fn outputs(&self) -> usize {
        self.features + 1 + self.hidden()
    }

    #[inline(always)]
    fn parts<'a, X, const V: usize>(&self, kept: &'a [X]) -> SlotParts<'a, X> {
        let rest = &kept[(self.features + 1) * V..];
        let (values, rest) = rest.split_at(self.hidden() * V);
        let (slopes, rest) = rest.split_at(self.hidden() * V);
        let (trace, curvatures) = rest.split_at(self.of_trace() * V);
        SlotParts {
            values: Trail { rest: values },
            slopes,
            trace,
            curvatures: Trail { rest: curvatures },
        }
    }
}

impl<T: Element> TileField<T> for CnfTiles<T> {
    fn kept(&self) -> usize {
        self.outputs() + self.hidden() + self.of_trace() + self.curvatures()
    }

    fn cotangents<S: Simd>(&self) -> usize {
        let of_trace = match &self.trace {
            Trace::Coupling(trace) => trace.cotangents(),
            Trace::Chain(trace) => trace.cotangents(),
        };
        // The transposition reads whole vectors of features.
        self.outputs() + of_trace + T::lanes::<S>()
    }

    fn sums<S: Simd>(&self) -> usize {
        let of = |l: &CnfTileLayer<T>| l.weights.sums::<S>() + l.weights.outputs;
        let of_trace = match &self.trace {
            Trace::Coupling(trace) => trace.sums::<S>(),
            Trace::Chain(trace) => trace.sums::<S>(),
        };
        self.layers.iter().map(of).sum::<usize>() + of_trace
    }

    fn scratch<S: Simd, const V: usize>(&self, pairs: usize) -> usize {
        let spare = self.layers.iter().map(|l| l.weights.scratch::<S, V>(pairs));
        let of_trace = match &self.trace {
            Trace::Coupling(trace) => trace.scratch::<S, V>(pairs),
            Trace::Chain(trace) => trace.scratch::<S, V>(&self.layers, pairs),
        };
        spare.max().unwrap_or(0).max(of_trace)
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
        let (slopes, rest) = rest.split_at_mut(self.hidden() * V);
        let (of_trace, mut curvatures) = rest.split_at_mut(self.of_trace() * V);
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
        if at.is_weighed {
            match &self.trace {
                Trace::Coupling(trace) => trace.evaluate::<S, V>(s, slopes, of_trace),
                Trace::Chain(trace) => trace.evaluate::<S, V>(s, &self.layers, slopes, of_trace),
            }
        }
        if let Some(k) = k {
            let (velocity, trace) = k.split_at_mut(self.features * V);
            let product = Layer::<T, S, V> {
                weights: &last.weights.forward,
                start: &last.bias,
                x,
                out: velocity,
            };
            enter(s, product);
            if !at.is_weighed || at.is_repeated {
                trace.fill(T::zeros::<S>());
                return;
            }
            let minus = match &self.trace {
                Trace::Coupling(of) => of.minus_trace::<S, V>(s, slopes, of_trace),
                Trace::Chain(of) => of.minus_trace::<S, V>(s, slopes, of_trace),
            };
            trace.copy_from_slice(&minus);
        }
    }

    fn time_place(&self) -> Option<usize> {
        self.time.then_some(self.features)
    }

    #[inline(always)]
    fn vjp<S: Simd, const V: usize>(
        &self,
        s: S,
        kept: &[T::Vector<S>],
        cotangents: &mut [T::Vector<S>],
        w: &mut [T::Vector<S>],
    ) {
        let mut kept = self.parts::<_, V>(kept);
        let mut slopes = Trail { rest: kept.slopes };
        let (cotangents, left) = cotangents.split_at_mut(self.outputs() * V);
        let (mut g, mut rest) = cotangents.split_at_mut((self.features + 1) * V);
        let mut c = [T::zeros::<S>(); V];
        for (c, v) in c.iter_mut().zip(&g[self.features * V..]) {
            *c = T::minus(s, T::zeros::<S>(), *v);
        }
        for (l, layer) in self.layers.iter().enumerate().skip(1).rev() {
            let size = layer.weights.inputs * V;
            let out;
            (out, rest) = rest.split_at_mut(size);
            let product = Layer::<T, S, V> {
                weights: &layer.weights.adjoint,
                start: &[],
                x: g,
                out,
            };
            enter(s, product);
            let (all, of_trace) = (kept.slopes, kept.trace);
            let (c, r) = match &self.trace {
                Trace::Coupling(trace) => {
                    let r = trace.pull::<S, V>(s, l - 1, all, of_trace, left);
                    (c, r)
                }
                Trace::Chain(trace) => {
                    let r = trace.pull::<S, V>(s, &self.layers, (l - 1, c), all, of_trace, left);
                    ([T::splat(s, T::of(1.0)); V], r)
                }
            };
            let held = if kept.curvatures.rest.is_empty() {
                0
            } else {
                size
            };
            let bend = Bend::<T, S, V> {
                activation: self.activation,
                value: kept.values.last(size),
                slope: slopes.last(size),
                curvature: kept.curvatures.last(held),
                c,
                r,
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
        if let Trace::Coupling(trace) = &self.trace {
            trace.leave::<S, V>(s, c, kept.slopes, kept.trace, left);
        }
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
        let slopes = self.outputs();
        let of_trace = Place {
            read: slopes + self.hidden(),
            left: self.outputs(),
        };
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
            let (biases, after) = after.split_at_mut(outputs);
            add_rows::<T, S, V>(s, &pairs, biases);
            if let Trace::Chain(trace) = &self.trace {
                trace.add_pairs::<S, V>(l, window, of_trace, &mut pairs);
            }
            layer
                .weights
                .accumulate::<S, V>(s, &pairs, scratch, weights);
            rest = after;
            read += if l == 0 { self.features + 1 } else { inputs };
        }
        let place = Place {
            read: slopes,
            left: self.outputs(),
        };
        match &self.trace {
            Trace::Coupling(trace) => {
                trace.accumulate::<S, V>(s, window, place, &mut pairs, scratch, rest);
            }
            Trace::Chain(trace) => {
                trace.accumulate::<S, V>(s, window, place, &mut pairs, scratch, rest);
            }
        }
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
        match &self.trace {
            Trace::Coupling(trace) => trace.gradients(s, &self.layers, rest, &mut weights),
            Trace::Chain(trace) => trace.gradients(s, &self.layers, rest, &mut weights),
        }
        let mut gradients = Vec::with_capacity(self.parameters());
        for (weight, bias) in weights.iter().zip(biases) {
            gradients.extend(weight);
            append_totals::<T, S>(s, bias, &mut gradients);
        }
        gradients
    }
}
