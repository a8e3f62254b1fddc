//! Fields along the gradient of an [`EnergyMlp`], over tiles.

mod offered;
mod places;
mod turn;

use pulp::Simd;

use super::mlp::{Energy, EnergyMlp};
use crate::error::Error;
use crate::nn::activation::{Expand, TimesSlope};
use crate::nn::curves::{PlusBent, Seed, Split, Tangent};
use crate::nn::weights::{
    append_totals, fill, numbers, with_numbers, LayerWeights, Place, Weights,
};
use crate::nn::{Activation, Linear};
use crate::rows::{At, Slot, TileField};
use crate::simd::outer::{add_rows, Pair};
use crate::simd::product::{Layer, Tanh, WithEpilogue};
use crate::simd::{enter, Element};
pub(in crate::nn::energy) use turn::Turn;

/// x' = A ∇Φ(t, x) over tiles, in the notation of [`EnergyMlp`].
///
/// A slot keeps `[x, t | δ_L | δ_1 | δ_2 | … | r_1 | r_2 | … | a_1 | a_2 | … | σ'_1 | σ'_2 | …]` with r_l = σ''(z_l) ∘ g_l; δ_L
/// only if the outputs are squared, σ' only where it does not follow from a.  Cotangents are `[v | ȧ_0 | ȧ_1 | … | δ̇_L |
/// δ̇_1 | δ̇_2 | … | r_1 ∘ ż_1 | r_2 ∘ ż_2 | …]`, with 0 for the tangent of time.
pub(crate) struct EnergyTiles<T> {
    hidden: Vec<EnergyLayer<T>>,
    end: End<T>,
    activation: Activation,
    turn: Turn,
    features: usize,
    time: bool,
}

struct EnergyLayer<T> {
    weights: Weights<T>,
    /// Zeros without a bias.
    bias: Vec<T>,
    has_bias: bool,
}

/// How Φ is computed from the last hidden layer.
enum End<T> {
    /// The scalar product with these weights.
    Output(Vec<T>),
    /// The sum of squares of the outputs of a layer.
    Squares(EnergyLayer<T>),
}

impl<T: Element> EnergyLayer<T> {
    /// Vectors of the sums of its gradients.
    fn sums<S: Simd>(&self) -> usize {
        let biases = if self.has_bias {
            self.weights.outputs
        } else {
            0
        };
        self.weights.sums::<S>() + biases
    }

    fn parameters(&self) -> usize {
        (self.weights.inputs + usize::from(self.has_bias)) * self.weights.outputs
    }
}

impl<T: Element> EnergyTiles<T> {
    fn new<S: Simd>(s: S, energy: &EnergyMlp, turn: Turn) -> std::result::Result<Self, Error> {
        let layer = |l: usize, layer: &Linear| {
            let [outputs, inputs] = [0, 1].map(|i| layer.weight.dims()[i]);
            // Of the first layer, Wᵀ leaves out what belongs to time.
            let pulled = inputs - usize::from(energy.time && l == 0);
            let bias = layer.bias.as_ref().map(numbers).transpose()?;
            Ok::<_, candle_core::Error>(EnergyLayer {
                weights: with_numbers(&layer.weight, |weight| {
                    Weights::pack(s, weight, outputs, inputs, pulled)
                })?,
                has_bias: bias.is_some(),
                bias: bias.unwrap_or_else(|| vec![T::default(); outputs]),
            })
        };
        let Some((last, hidden)) = energy.net.layers.split_last() else {
            return Err(candle_core::Error::msg("a potential without layers").into());
        };
        let hidden = hidden.iter().enumerate().map(|(l, h)| layer(l, h));
        let hidden = hidden.collect::<Result<Vec<_>, _>>()?;
        Ok(Self {
            end: match energy.energy {
                Energy::Output => End::Output(numbers(&last.weight)?),
                Energy::SumOfSquares => End::Squares(layer(hidden.len(), last)?),
            },
            hidden,
            activation: energy.net.activation,
            turn,
            features: energy.features(),
            time: energy.time,
        })
    }

    /// What the first layer reads.
    fn inputs(&self) -> usize {
        self.features + usize::from(self.time)
    }

    /// Features of all hidden layers.
    fn units(&self) -> usize {
        self.hidden.iter().map(|l| l.weights.outputs).sum()
    }

    /// a_l of every hidden layer, σ' where it is kept, and σ'' where it does not follow from these, in the place of r.
    #[inline(always)]
    fn evaluate<S: Simd, const V: usize>(&self, s: S, kept: &mut [T::Vector<S>]) {
        let places = self.places();
        let (before, after) = kept.split_at_mut(places.value * V);
        let (x, between) = before.split_at_mut(self.inputs() * V);
        let mut curvatures = &mut between[(places.bend - self.inputs()) * V..];
        let (mut values, mut slopes) = after.split_at_mut(self.units() * V);
        let mut x = &*x;
        for layer in &self.hidden {
            let size = layer.weights.outputs * V;
            let (out, rest) = values.split_at_mut(size);
            let (curvature, more) = curvatures.split_at_mut(size);
            let (slope, others) = slopes.split_at_mut(size.min(slopes.len()));
            (values, curvatures, slopes) = (rest, more, others);
            let product = Layer::<T, S, V> {
                weights: &layer.weights.forward,
                start: &layer.bias,
                x,
                out,
            };
            if self.activation == Activation::Tanh {
                let epilogue = Tanh;
                enter(s, WithEpilogue { product, epilogue });
            } else {
                enter(s, product);
                let held = if self.activation.keeps_curvature() {
                    size
                } else {
                    0
                };
                let expand = Expand::<T, S> {
                    activation: self.activation,
                    z: out,
                    slope,
                    curvature: &mut curvature[..held],
                };
                enter(s, expand);
            }
            x = out;
        }
    }

    /// δ_l and r_l of every hidden layer, from the last one to the first.
    #[inline(always)]
    fn descend<S: Simd, const V: usize>(&self, s: S, kept: &mut [T::Vector<S>]) {
        let places = self.places();
        let (before, after) = kept.split_at_mut(places.value * V);
        let (values, slopes) = after.split_at(self.units() * V);
        let (_, rest) = before.split_at_mut(places.delta_last * V);
        let (delta_last, rest) = rest.split_at_mut((places.delta - places.delta_last) * V);
        let (deltas, bends) = rest.split_at_mut(self.units() * V);
        let mut from = self.units() * V;
        for (l, layer) in self.hidden.iter().enumerate().rev() {
            let to = from;
            from -= layer.weights.outputs * V;
            let (below, above) = deltas.split_at_mut(to);
            let g = &mut below[from..];
            match (self.hidden.get(l + 1), &self.end) {
                (Some(next), _) => {
                    let size = next.weights.outputs * V;
                    let product = Layer::<T, S, V> {
                        weights: &next.weights.adjoint,
                        start: &[],
                        x: &above[..size],
                        out: g,
                    };
                    enter(s, product);
                }
                (None, End::Output(weights)) => enter(s, Seed::<T, S, V> { weights, g }),
                (None, End::Squares(last)) => {
                    let product = Layer::<T, S, V> {
                        weights: &last.weights.forward,
                        start: &last.bias,
                        x: &values[from..to],
                        out: delta_last,
                    };
                    enter(s, product);
                    for z in delta_last.iter_mut() {
                        *z = T::plus(s, *z, *z);
                    }
                    let product = Layer::<T, S, V> {
                        weights: &last.weights.adjoint,
                        start: &[],
                        x: delta_last,
                        out: g,
                    };
                    enter(s, product);
                }
            }
            let split = Split::<T, S> {
                activation: self.activation,
                value: &values[from..to],
                slope: slopes.get(from..to).unwrap_or(&[]),
                g,
                bend: &mut bends[from..to],
            };
            enter(s, split);
        }
    }
}

impl<T: Element> TileField<T> for EnergyTiles<T> {
    fn kept(&self) -> usize {
        self.places().kept
    }

    fn cotangents<S: Simd>(&self) -> usize {
        // The transposition reads whole vectors of features.
        self.places().cotangents + T::lanes::<S>()
    }

    fn sums<S: Simd>(&self) -> usize {
        let last = match &self.end {
            End::Output(weights) => weights.len(),
            End::Squares(layer) => layer.sums::<S>(),
        };
        self.hidden
            .iter()
            .map(EnergyLayer::sums::<S>)
            .sum::<usize>()
            + last
    }

    fn scratch<S: Simd, const V: usize>(&self, pairs: usize) -> usize {
        // Each evaluation leaves two outer products.
        let spare = |l: &EnergyLayer<T>| l.weights.scratch::<S, V>(2 * pairs);
        let last = match &self.end {
            End::Output(_) => 0,
            End::Squares(layer) => spare(layer),
        };
        self.hidden.iter().map(spare).max().unwrap_or(0).max(last)
    }

    fn parameters(&self) -> usize {
        let last = match &self.end {
            End::Output(weights) => weights.len(),
            End::Squares(layer) => layer.parameters(),
        };
        let hidden = self.hidden.iter().map(EnergyLayer::parameters);
        hidden.sum::<usize>() + last
    }

    #[inline(always)]
    fn velocity<S: Simd, const V: usize>(
        &self,
        s: S,
        at: &At<'_, T::Vector<S>>,
        kept: &mut [T::Vector<S>],
        k: Option<&mut [T::Vector<S>]>,
    ) {
        if self.time {
            kept[self.features * V..][..V].copy_from_slice(at.times);
        }
        self.evaluate::<S, V>(s, kept);
        self.descend::<S, V>(s, kept);
        let (Some(k), Some(first)) = (k, self.hidden.first()) else {
            return;
        };
        let product = Layer::<T, S, V> {
            weights: &first.weights.adjoint,
            start: &[],
            x: &kept[self.places().delta * V..][..first.weights.outputs * V],
            out: k,
        };
        enter(s, product);
        self.turn.apply::<T, S>(s, k);
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
        let (places, units) = (self.places(), self.units() * V);
        let bends = &kept[places.bend * V..][..units];
        let values = &kept[places.value * V..][..units];
        let slopes = &kept[places.slope * V..];
        let (v, rest) = cotangents.split_at_mut(places.tangent * V);
        let (mut x, rest) = rest.split_at_mut(self.inputs() * V);
        let (mut tangents, rest) = rest.split_at_mut(units);
        let (dot_last, rest) = rest.split_at_mut((places.dot - places.dot_last) * V);
        let (dots, rest) = rest.split_at_mut(units);
        let bent = &mut rest[..units];
        let (moved, still) = x.split_at_mut(self.features * V);
        self.turn.pull::<T, S>(s, v, moved);
        still.fill(T::zeros::<S>());
        let mut from = 0;
        for layer in &self.hidden {
            let to = from + layer.weights.outputs * V;
            let (out, above) = tangents.split_at_mut(to - from);
            let product = Layer::<T, S, V> {
                weights: &layer.weights.forward,
                start: &[],
                x,
                out,
            };
            enter(s, product);
            let tangent = Tangent::<T, S> {
                activation: self.activation,
                value: &values[from..to],
                slope: slopes.get(from..to).unwrap_or(&[]),
                bend: &bends[from..to],
                z_dot: out,
                bent: &mut bent[from..to],
            };
            enter(s, tangent);
            (x, tangents, from) = (out, above, to);
        }
        for (l, layer) in self.hidden.iter().enumerate().rev() {
            let to = from;
            from -= layer.weights.outputs * V;
            let (below, above) = dots.split_at_mut(to);
            let (out, bent) = (&mut below[from..], &bent[from..to]);
            let epilogue = PlusBent::<T, S> {
                slopes: TimesSlope {
                    activation: self.activation,
                    value: &values[from..to],
                    slope: slopes.get(from..to).unwrap_or(&[]),
                },
                bent,
            };
            let (weights, x) = match (self.hidden.get(l + 1), &self.end) {
                (Some(next), _) => (&next.weights.adjoint, &above[..next.weights.outputs * V]),
                (None, End::Output(_)) => {
                    out.copy_from_slice(bent);
                    continue;
                }
                (None, End::Squares(last)) => {
                    let product = Layer::<T, S, V> {
                        weights: &last.weights.forward,
                        start: &[],
                        x,
                        out: dot_last,
                    };
                    enter(s, product);
                    for z in dot_last.iter_mut() {
                        *z = T::plus(s, *z, *z);
                    }
                    (&last.weights.adjoint, &*dot_last)
                }
            };
            let product = Layer::<T, S, V> {
                weights,
                start: &[],
                x,
                out,
            };
            enter(s, WithEpilogue { product, epilogue });
        }
        if let Some(first) = self.hidden.first() {
            let product = Layer::<T, S, V> {
                weights: &first.weights.adjoint,
                start: &[],
                x: &dots[..first.weights.outputs * V],
                out: w,
            };
            enter(s, product);
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
        let places = self.places();
        let mut rest = sums;
        let mut pairs = Vec::with_capacity(2 * window.len());
        // What a layer reads, its δ and δ̇, and the tangent of what it reads.
        let (mut read, mut delta) = (0, places.delta);
        let (mut dot, mut tangent) = (places.dot, places.tangent);
        let squares = match &self.end {
            End::Output(_) => None,
            End::Squares(layer) => Some(layer),
        };
        let last = self.hidden.len();
        for (l, layer) in self.hidden.iter().chain(squares).enumerate() {
            let (inputs, outputs) = (layer.weights.inputs, layer.weights.outputs);
            if l == last {
                (delta, dot) = (places.delta_last, places.dot_last);
            }
            fill::<_, V>(&mut pairs, window, Place { read, left: dot }, inputs);
            let (weights, after) = rest.split_at_mut(layer.weights.sums::<S>());
            let biases;
            (biases, rest) = after.split_at_mut(if layer.has_bias { outputs } else { 0 });
            add_rows::<T, S, V>(s, &pairs, biases);
            for slot in window {
                pairs.push(Pair {
                    x: &slot.cotangents[tangent * V..][..inputs * V],
                    g: &slot.kept[delta * V..],
                });
            }
            layer
                .weights
                .accumulate::<S, V>(s, &pairs, scratch, weights);
            read = if l == 0 { places.value } else { read + inputs };
            (delta, dot) = (delta + outputs, dot + outputs);
            tangent += inputs;
        }
        if squares.is_none() {
            // δ_L is 1.
            pairs.clear();
            for slot in window {
                pairs.push(Pair {
                    x: &slot.kept[..0],
                    g: &slot.cotangents[tangent * V..],
                });
            }
            add_rows::<T, S, V>(s, &pairs, rest);
        }
    }

    #[inline(always)]
    fn gradients<S: Simd>(&self, s: S, sums: &[T::Vector<S>]) -> Vec<T> {
        let mut gradients = Vec::with_capacity(self.parameters());
        let mut rest = sums;
        let squares = match &self.end {
            End::Output(_) => None,
            End::Squares(layer) => Some(layer),
        };
        for layer in self.hidden.iter().chain(squares) {
            let (weights, biases);
            (weights, rest) = rest.split_at(layer.weights.sums::<S>());
            let has = if layer.has_bias {
                layer.weights.outputs
            } else {
                0
            };
            (biases, rest) = rest.split_at(has);
            layer.weights.gradient(s, weights, &mut gradients);
            append_totals::<T, S>(s, biases, &mut gradients);
        }
        append_totals::<T, S>(s, rest, &mut gradients);
        gradients
    }
}
