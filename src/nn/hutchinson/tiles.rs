//! The [`Hutchinson`](super::Hutchinson) flow of a perceptron over tiles.
//!
//! With a_0 = z and the tangent ȧ_0 = ε, and z_l = W_l a_{l−1} + b_l and ż_l = W_l ȧ_{l−1} in every layer l,
//!
//! a_l = σ(z_l), ȧ_l = σ'(z_l) ∘ ż_l in hidden layers, and z' = z_L, l' = −ε·ż_L in the last one.
//!
//! Let v and c be the cotangents of z' and of −l'.  Those of z_l and ż_l are, from the last layer to the first,
//!
//! z̄_L = v, ẑ_L = c ε;  ẑ_l = σ' ∘ W_{l+1}ᵀ ẑ_{l+1},  z̄_l = σ' ∘ W_{l+1}ᵀ z̄_{l+1} + r_l ∘ W_{l+1}ᵀ ẑ_{l+1}
//!
//! with r_l = σ''(z_l) ∘ ż_l,
//!
//! and those of the weights W̄_l = z̄_l a_{l−1}ᵀ + ẑ_l ȧ_{l−1}ᵀ and b̄_l = z̄_l.

use pulp::Simd;

use crate::nn::activation::{Expand, TimesSlope};
use crate::nn::curves::{PlusBent, Split, Tangent};
use crate::nn::mlp::tiles::MlpTiles;
use crate::nn::tangents::{is_zero, MinusDot, Scale};
use crate::nn::weights::{fill, LayerWeights, Place};
use crate::nn::Activation;
use crate::rows::{At, Slot, TileField};
use crate::simd::outer::{add_rows, Pair};
use crate::simd::product::{Layer, Tanh, WithEpilogue};
use crate::simd::{enter, Element};

/// The perceptron.
///
/// A slot keeps `[z, l | ε, 0 | a_1 | a_2 | … | σ'_1 | σ'_2 | … | ȧ_1 | ȧ_2 | … | r_1 | r_2 | …]`, σ' only where it does
/// not follow from a.  Time, where it is read, takes the place of l, and 0 is its tangent.  Cotangents are `[v, −c, of ε |
/// ẑ_L | z̄_1 | z̄_2 | … | ẑ_1 | ẑ_2 | … | scratch]`, and behind them those that skipped layers' outputs pass to their
/// inputs.
pub(crate) struct HutchinsonTiles<T> {
    net: MlpTiles<T>,
}

/// Where the parts of a slot begin, in features.
struct Places {
    /// Of what is kept.
    probe: usize,
    value: usize,
    slope: usize,
    tangent: usize,
    bend: usize,
    kept: usize,
    /// Of the cotangents.
    end: usize,
    bar: usize,
    dot: usize,
    bent: usize,
    carried: usize,
    cotangents: usize,
}

impl<T: Element> HutchinsonTiles<T> {
    pub(super) fn new(net: MlpTiles<T>) -> Self {
        Self { net }
    }

    fn places(&self) -> Places {
        let (d, units) = (self.net.features(), self.net.hidden());
        let value = 2 * d + 1 + usize::from(self.net.time);
        let slope = value + units;
        let tangent = slope + if self.net.keeps_slopes() { units } else { 0 };
        let bar = 3 * d + 1;
        let bent = bar + 2 * units;
        let widths = self.net.layers[1..].iter().map(|l| l.weights.inputs);
        let carried = bent + widths.max().unwrap_or(0);
        Places {
            probe: d + 1,
            value,
            slope,
            tangent,
            bend: tangent + units,
            kept: tangent + 2 * units,
            end: 2 * d + 1,
            bar,
            dot: bar + units,
            bent,
            carried,
            cotangents: carried + 2 * self.net.skipped(),
        }
    }

    /// Whether l' has no cotangent, as in a stage that only other stages read.
    #[inline(always)]
    fn is_still<S: Simd, const V: usize>(&self, cotangents: &[T::Vector<S>]) -> bool {
        is_zero::<T, S>(&cotangents[self.net.features() * V..][..V])
    }
}

impl<T: Element> TileField<T> for HutchinsonTiles<T> {
    fn kept(&self) -> usize {
        self.places().kept
    }

    fn cotangents<S: Simd>(&self) -> usize {
        // The transposition reads whole vectors of features.
        self.places().cotangents + T::lanes::<S>()
    }

    fn sums<S: Simd>(&self) -> usize {
        self.net.sums::<S>()
    }

    fn scratch<S: Simd, const V: usize>(&self, pairs: usize) -> usize {
        // Each evaluation leaves two outer products.
        self.net.scratch::<S, V>(2 * pairs)
    }

    fn parameters(&self) -> usize {
        self.net.parameters()
    }

    #[inline(always)]
    fn velocity<S: Simd, const V: usize>(
        &self,
        s: S,
        at: &At<'_, T::Vector<S>>,
        kept: &mut [T::Vector<S>],
        k: Option<&mut [T::Vector<S>]>,
    ) {
        let Some((last, hidden)) = self.net.layers.split_last() else {
            return;
        };
        let (d, places, activation) = (self.net.features(), self.places(), self.net.activation);
        if self.net.time {
            kept[d * V..][..V].copy_from_slice(at.times);
            kept[(2 * d + 1) * V..][..V].fill(T::zeros::<S>());
        }
        let (start, rest) = kept.split_at_mut(places.value * V);
        let (mut values, rest) = rest.split_at_mut((places.slope - places.value) * V);
        let (mut slopes, rest) = rest.split_at_mut((places.tangent - places.slope) * V);
        let (mut tangents, mut bends) = rest.split_at_mut((places.bend - places.tangent) * V);
        let probe = &start[places.probe * V..];
        let (mut x, mut e) = (&*start, probe);
        for layer in hidden {
            let size = layer.weights.outputs * V;
            let (value, slope, tangent, bend);
            (value, values) = values.split_at_mut(size);
            (slope, slopes) = slopes.split_at_mut(size.min(slopes.len()));
            (tangent, tangents) = tangents.split_at_mut(size);
            (bend, bends) = bends.split_at_mut(size);
            let product = Layer::<T, S, V> {
                weights: &layer.weights.forward,
                start: &layer.bias,
                x,
                out: value,
            };
            if activation == Activation::Tanh && slope.is_empty() {
                let epilogue = Tanh;
                enter(s, WithEpilogue { product, epilogue });
            } else {
                enter(s, product);
                let held = if activation.keeps_curvature() {
                    size
                } else {
                    0
                };
                let expand = Expand::<T, S> {
                    activation,
                    z: value,
                    slope,
                    curvature: &mut bend[..held],
                };
                enter(s, expand);
            }
            if at.is_weighed {
                let product = Layer::<T, S, V> {
                    weights: &layer.weights.forward,
                    start: &[],
                    x: e,
                    out: tangent,
                };
                enter(s, product);
                let split = Split::<T, S> {
                    activation,
                    value,
                    slope,
                    g: tangent,
                    bend,
                };
                enter(s, split);
            } else {
                // Of cotangents that are zero: what is here from before may be infinite.
                tangent.fill(T::zeros::<S>());
                bend.fill(T::zeros::<S>());
            }
            if layer.skips {
                for (h, x) in value.iter_mut().zip(x) {
                    *h = T::plus(s, *h, *x);
                }
                for (h, e) in tangent.iter_mut().zip(e) {
                    *h = T::plus(s, *h, *e);
                }
            }
            (x, e) = (value, tangent);
        }
        let Some(k) = k else { return };
        let (velocity, rest) = k.split_at_mut(d * V);
        let (of_l, of_probe) = rest.split_at_mut(V);
        let product = Layer::<T, S, V> {
            weights: &last.weights.forward,
            start: &last.bias,
            x,
            out: velocity,
        };
        enter(s, product);
        of_l.fill(T::zeros::<S>());
        if at.is_weighed {
            let product = Layer::<T, S, V> {
                weights: &last.weights.forward,
                start: &[],
                x: e,
                out: of_probe,
            };
            enter(s, product);
            let minus = MinusDot::<T, S, V> {
                x: &probe[..d * V],
                y: of_probe,
            };
            of_l.copy_from_slice(&enter(s, minus));
        }
        of_probe.fill(T::zeros::<S>());
    }

    fn time_place(&self) -> Option<usize> {
        self.net.time.then(|| self.net.features())
    }

    #[inline(always)]
    fn vjp<S: Simd, const V: usize>(
        &self,
        s: S,
        kept: &[T::Vector<S>],
        cotangents: &mut [T::Vector<S>],
        w: &mut [T::Vector<S>],
    ) {
        let (d, places, activation) = (self.net.features(), self.places(), self.net.activation);
        let units = self.net.hidden() * V;
        let part = |from: usize, to: usize| &kept[from * V..to * V];
        let values = part(places.value, places.slope);
        let slopes = part(places.slope, places.tangent);
        let bends = part(places.bend, places.kept);
        let still = self.is_still::<S, V>(cotangents);
        let (v, rest) = cotangents.split_at_mut(places.end * V);
        let (end, rest) = rest.split_at_mut(d * V);
        let (bars, rest) = rest.split_at_mut(units);
        let (dots, rest) = rest.split_at_mut(units);
        let (bent, rest) = rest.split_at_mut((places.carried - places.bent) * V);
        let (carried, carried_dot) = rest.split_at_mut(self.net.skipped() * V);
        let mut c = [T::zeros::<S>(); V];
        for (c, of_l) in c.iter_mut().zip(&v[d * V..]) {
            *c = T::minus(s, T::zeros::<S>(), *of_l);
        }
        let scale = Scale::<T, S, V> {
            c,
            x: part(places.probe, places.probe + d),
            out: end,
        };
        enter(s, scale);
        let (mut bar_above, mut dot_above) = (&*v, &*end);
        let (mut bars, mut dots) = (bars, dots);
        let mut to = units;
        for (l, layer) in self.net.layers.iter().enumerate().skip(1).rev() {
            let from = to - layer.weights.inputs * V;
            let below = &self.net.layers[l - 1];
            let (bar, dot);
            (bars, bar) = bars.split_at_mut(from);
            (dots, dot) = dots.split_at_mut(from);
            let bent = &mut bent[..to - from];
            let (value, slope) = (&values[from..to], slopes.get(from..to).unwrap_or(&[]));
            if still {
                dot.fill(T::zeros::<S>());
                bent.fill(T::zeros::<S>());
            } else {
                let product = Layer::<T, S, V> {
                    weights: &layer.weights.adjoint,
                    start: &[],
                    x: dot_above,
                    out: dot,
                };
                enter(s, product);
                pass_by::<T, S>(s, [layer.skips, below.skips], dot, carried_dot);
                let tangent = Tangent::<T, S> {
                    activation,
                    value,
                    slope,
                    bend: &bends[from..to],
                    z_dot: dot,
                    bent,
                };
                enter(s, tangent);
            }
            let product = Layer::<T, S, V> {
                weights: &layer.weights.adjoint,
                start: &[],
                x: bar_above,
                out: bar,
            };
            if layer.skips || below.skips {
                enter(s, product);
                pass_by::<T, S>(s, [layer.skips, below.skips], bar, carried);
                // Where layers are skipped, slopes are kept.
                for ((bar, d), bent) in bar.iter_mut().zip(slope).zip(&*bent) {
                    *bar = T::mul_add(s, *bar, *d, *bent);
                }
            } else {
                let slopes = TimesSlope {
                    activation,
                    value,
                    slope,
                };
                let epilogue = PlusBent::<T, S> { slopes, bent };
                enter(s, WithEpilogue { product, epilogue });
            }
            (bar_above, dot_above, to) = (bar, dot, from);
        }
        let first = &self.net.layers[0];
        let product = Layer::<T, S, V> {
            weights: &first.weights.adjoint,
            start: &[],
            x: bar_above,
            out: w,
        };
        enter(s, product);
        pass_by::<T, S>(s, [first.skips, false], &mut w[..d * V], carried);
        w[d * V..].fill(T::zeros::<S>());
    }

    #[inline(always)]
    fn accumulate<S: Simd, const V: usize>(
        &self,
        s: S,
        window: &[Slot<'_, T::Vector<S>>],
        scratch: &mut [T::Vector<S>],
        sums: &mut [T::Vector<S>],
    ) {
        let (places, last) = (self.places(), self.net.layers.len() - 1);
        let mut pairs = Vec::with_capacity(2 * window.len());
        // What a layer reads, its tangent, and the cotangents of z and ż.
        let (mut read, mut tangent) = (0, places.probe);
        let (mut bar, mut dot, mut rest) = (places.bar, places.dot, sums);
        for (l, layer) in self.net.layers.iter().enumerate() {
            let (inputs, outputs) = (layer.weights.inputs, layer.weights.outputs);
            if l == last {
                (bar, dot) = (0, places.end);
            }
            fill::<_, V>(&mut pairs, window, Place { read, left: bar }, inputs);
            let (weights, after) = rest.split_at_mut(layer.weights.sums::<S>());
            let (biases, after) = after.split_at_mut(outputs);
            add_rows::<T, S, V>(s, &pairs, biases);
            for slot in window {
                if !self.is_still::<S, V>(slot.cotangents) {
                    pairs.push(Pair {
                        x: &slot.kept[tangent * V..][..inputs * V],
                        g: &slot.cotangents[dot * V..],
                    });
                }
            }
            layer
                .weights
                .accumulate::<S, V>(s, &pairs, scratch, weights);
            (read, tangent) = match l {
                0 => (places.value, places.tangent),
                _ => (read + inputs, tangent + inputs),
            };
            (bar, dot, rest) = (bar + outputs, dot + outputs, after);
        }
    }

    #[inline(always)]
    fn gradients<S: Simd>(&self, s: S, sums: &[T::Vector<S>]) -> Vec<T> {
        self.net.gradients(s, sums)
    }
}

/// Adds to the cotangent g of what a layer reads that of the layer's output, if the layer is skipped; and keeps the sum
/// for the layer below, if that is skipped.
#[inline(always)]
fn pass_by<T: Element, S: Simd>(
    s: S,
    [skips, below_skips]: [bool; 2],
    g: &mut [T::Vector<S>],
    carried: &mut [T::Vector<S>],
) {
    if skips {
        for (g, c) in g.iter_mut().zip(&*carried) {
            *g = T::plus(s, *g, *c);
        }
    }
    if below_skips {
        carried[..g.len()].copy_from_slice(g);
    }
}
