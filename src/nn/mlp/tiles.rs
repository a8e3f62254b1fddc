//! An [`Mlp`] over tiles.

use candle_core::{Shape, Tensor};
use pulp::Simd;

use super::{Affine, Mlp};
use crate::error::Error;
use crate::nn::activation::{Apply, Pull, TimesSlope};
use crate::nn::weights::{fill, numbers, with_numbers, LayerWeights, Place, RowWeights, Weights};
use crate::nn::Activation;
use crate::rows::{At, Part, RowField, Slot, TileField};
use crate::simd::outer::add_rows;
use crate::simd::product::{Product, Tanh};
use crate::simd::{enter, Aligned, Element};
use crate::state::RowLayout;

impl RowField for Mlp {
    type Tiles<T: Element> = MlpTiles<T>;

    fn weights(&self) -> Vec<Tensor> {
        self.tensors().cloned().collect()
    }

    fn reads_time(&self) -> bool {
        self.time
    }

    fn layout(&self, shapes: &[Shape]) -> Option<RowLayout> {
        let [shape] = shapes else { return None };
        let (last, rows) = shape.dims().split_last()?;
        (*last == self.features()).then(|| RowLayout {
            rows: rows.iter().product(),
            features: vec![*last],
        })
    }

    fn tiles<T: Element, S: Simd>(
        &self,
        s: S,
        _: &[Shape],
    ) -> std::result::Result<MlpTiles<T>, Error> {
        self.packed(s)
    }
}

impl Mlp {
    fn packed<T: Element, S: Simd, W: LayerWeights<T>>(
        &self,
        s: S,
    ) -> std::result::Result<MlpTiles<T, W>, Error> {
        let skips = |l: usize| l + 1 < self.layers.len() && self.skips(l);
        MlpTiles::new(s, &self.layers, self.activation, self.time, skips)
    }
}

/// An [`Mlp`] over few rows, with their features in the lanes: each lane is a row of the state that it is given.
#[derive(Clone)]
pub(super) struct FewRows(pub(super) Mlp);

impl RowField for FewRows {
    type Tiles<T: Element> = MlpTiles<T, RowWeights<T>>;

    fn weights(&self) -> Vec<Tensor> {
        RowField::weights(&self.0)
    }

    fn reads_time(&self) -> bool {
        self.0.time
    }

    fn joins_lanes(&self) -> bool {
        true
    }

    fn layout(&self, shapes: &[Shape]) -> Option<RowLayout> {
        let [shape] = shapes else { return None };
        let (rows, features) = shape.dims2().ok()?;
        Some(RowLayout {
            rows,
            features: vec![features],
        })
    }

    fn tiles<T: Element, S: Simd>(
        &self,
        s: S,
        _: &[Shape],
    ) -> std::result::Result<Self::Tiles<T>, Error> {
        self.0.packed(s)
    }
}

/// An [`Mlp`] over tiles.
///
/// A slot keeps `[y, t | h_1 | h_2 | …]`, what the layers read, and after that the slopes where they
/// do not follow from h; cotangents are `[g_L | … | g_1]`, of the layers' z, and behind them the
/// cotangent that a skipped layer's output passes to its input.
pub(crate) struct MlpTiles<T, W = Weights<T>> {
    pub(in crate::nn) layers: Vec<MlpTileLayer<T, W>>,
    pub(in crate::nn) activation: Activation,
    pub(in crate::nn) time: bool,
}

pub(in crate::nn) struct MlpTileLayer<T, W> {
    pub(in crate::nn) weights: W,
    pub(in crate::nn) bias: Aligned<T>,
    pub(in crate::nn) skips: bool,
}

/// Products that take as long as an activation.
const ACTIVATION: usize = 16;

impl<T: Element, W: LayerWeights<T>> MlpTileLayer<T, W> {
    /// Vectors of the sums of dW and db.
    fn sums<S: Simd>(&self) -> usize {
        self.weights.sums::<S>() + self.weights.outputs()
    }
}

impl<T: Element, W: LayerWeights<T>> MlpTiles<T, W> {
    /// Layers that follow on each other, from any number of features to any other; whether the first reads time
    /// behind its features, and which are skipped by their inputs.
    pub(in crate::nn) fn new<S: Simd>(
        s: S,
        affine: &[Affine],
        activation: Activation,
        time: bool,
        skips: impl Fn(usize) -> bool,
    ) -> std::result::Result<Self, Error> {
        let mut layers = Vec::with_capacity(affine.len());
        for (l, layer) in affine.iter().enumerate() {
            let (inputs, outputs) = (layer.inputs(), layer.outputs());
            // Of the first layer, Wᵀ leaves out what belongs to time.
            let pulled = inputs - usize::from(time && l == 0);
            layers.push(MlpTileLayer {
                weights: with_numbers(&layer.weight, |weight| {
                    W::pack(s, weight, outputs, inputs, pulled)
                })?,
                bias: W::bias::<S>(&numbers(&layer.bias)?),
                skips: skips(l),
            });
        }
        Ok(Self {
            layers,
            activation,
            time,
        })
    }

    /// Features of the state.
    pub(in crate::nn) fn features(&self) -> usize {
        self.layers[0].weights.inputs() - usize::from(self.time)
    }

    /// Features of all that layers read.
    fn inputs(&self) -> usize {
        self.layers.iter().map(|l| l.weights.inputs()).sum()
    }

    /// Whether hidden layers keep their slopes.
    pub(in crate::nn) fn keeps_slopes(&self) -> bool {
        self.activation.keeps_slope() || self.layers.iter().any(|l| l.skips)
    }

    /// An evaluation, but for those hidden layers that are known.
    #[inline(always)]
    fn evaluate<S: Simd, const V: usize>(
        &self,
        s: S,
        at: &At<'_, T::Vector<S>>,
        kept: &mut [T::Vector<S>],
        k: Option<&mut [T::Vector<S>]>,
        known: &[bool],
    ) {
        let (read, mut slopes) = kept.split_at_mut(self.inputs() * V);
        let (mut x, mut rest) = read.split_at_mut(self.layers[0].weights.inputs() * V);
        if self.time {
            let time = x.len() - V;
            x[time..].copy_from_slice(at.times);
        }
        let (last, hidden) = match self.layers.split_last() {
            Some(split) => split,
            None => return,
        };
        for (l, layer) in hidden.iter().enumerate() {
            let size = layer.weights.outputs() * V;
            let (out, after) = rest.split_at_mut(size);
            let kept = if self.keeps_slopes() { size } else { 0 };
            let (slope, more) = slopes.split_at_mut(kept);
            slopes = more;
            if known.get(l) == Some(&true) {
                (x, rest) = (out, after);
                continue;
            }
            if self.activation == Activation::Tanh {
                let weights = layer.weights.forward();
                weights.product_with::<S, V>(s, &layer.bias, x, out, Tanh);
            } else {
                let weights = layer.weights.forward();
                weights.product::<S, V>(s, &layer.bias, x, out);
                let apply = Apply::<T, S> {
                    activation: self.activation,
                    z: out,
                    slope,
                };
                enter(s, apply);
            }
            if self.keeps_slopes() && !self.activation.keeps_slope() {
                slope.fill(T::splat(s, T::of(1.0)));
                enter(
                    s,
                    Pull::<T, S> {
                        activation: self.activation,
                        value: out,
                        g: slope,
                    },
                );
            }
            if layer.skips {
                for (h, x) in out.iter_mut().zip(&*x) {
                    *h = T::plus(s, *h, *x);
                }
            }
            (x, rest) = (out, after);
        }
        if let Some(out) = k {
            let weights = last.weights.forward();
            weights.product::<S, V>(s, &last.bias, x, out);
        }
    }

    /// Features of the widest layer that is skipped.
    pub(in crate::nn) fn skipped(&self) -> usize {
        let skipped = self.layers.iter().filter(|l| l.skips);
        skipped.map(|l| l.weights.outputs()).max().unwrap_or(0)
    }

    /// Features of all layers' z.
    fn outputs(&self) -> usize {
        self.layers.iter().map(|l| l.weights.outputs()).sum()
    }

    /// Features of all hidden layers.
    pub(in crate::nn) fn hidden(&self) -> usize {
        self.layers[1..].iter().map(|l| l.weights.inputs()).sum()
    }
}

impl<T: Element, W: LayerWeights<T>> TileField<T> for MlpTiles<T, W> {
    fn kept(&self) -> usize {
        self.inputs()
            + if self.keeps_slopes() {
                self.hidden()
            } else {
                0
            }
    }

    fn cotangents<S: Simd>(&self) -> usize {
        // The transposition reads whole vectors of features.
        self.outputs() + self.skipped() + T::lanes::<S>()
    }

    fn sums<S: Simd>(&self) -> usize {
        self.layers.iter().map(MlpTileLayer::sums::<S>).sum()
    }

    fn scratch<S: Simd, const V: usize>(&self, pairs: usize) -> usize {
        let spare = self.layers.iter().map(|l| l.weights.scratch::<S, V>(pairs));
        spare.max().unwrap_or(0)
    }

    fn parameters(&self) -> usize {
        self.layers.iter().map(|l| l.weights.parameters()).sum()
    }

    #[inline(always)]
    fn velocity<S: Simd, const V: usize>(
        &self,
        s: S,
        at: &At<'_, T::Vector<S>>,
        kept: &mut [T::Vector<S>],
        k: Option<&mut [T::Vector<S>]>,
    ) {
        self.evaluate::<S, V>(s, at, kept, k, &[]);
    }

    fn parts(&self) -> Vec<Part> {
        let state = self.features();
        let mut parts = vec![Part {
            features: [0..state, 0..0],
            work: 0,
        }];
        let mut value = self.layers[0].weights.inputs();
        let mut slope = self.inputs();
        for layer in &self.layers[..self.layers.len() - 1] {
            let (inputs, outputs) = (layer.weights.inputs(), layer.weights.outputs());
            let slopes = match self.keeps_slopes() {
                true => slope..slope + outputs,
                false => 0..0,
            };
            parts.push(Part {
                features: [value..value + outputs, slopes],
                work: (inputs + ACTIVATION) * outputs,
            });
            value += outputs;
            slope += outputs;
        }
        parts
    }

    #[inline(always)]
    fn recall<S: Simd, const V: usize>(
        &self,
        s: S,
        at: &At<'_, T::Vector<S>>,
        kept: &mut [T::Vector<S>],
        known: &[bool],
    ) {
        self.evaluate::<S, V>(s, at, kept, None, &known[1..]);
    }

    #[inline(always)]
    fn vjp<S: Simd, const V: usize>(
        &self,
        s: S,
        kept: &[T::Vector<S>],
        cotangents: &mut [T::Vector<S>],
        w: &mut [T::Vector<S>],
    ) {
        let (mut read, mut slopes) = kept.split_at(self.inputs() * V);
        let (cotangents, carried) = cotangents.split_at_mut(self.outputs() * V);
        let velocity = self.layers.last().map_or(0, |l| l.weights.outputs());
        let (mut g, mut rest) = cotangents.split_at_mut(velocity * V);
        for (l, layer) in self.layers.iter().enumerate().rev() {
            let value;
            (read, value) = read.split_at(read.len() - layer.weights.inputs() * V);
            let hidden = if l == 0 { 0 } else { layer.weights.inputs() };
            let (below, after) = rest.split_at_mut(hidden * V);
            let out = if l == 0 { &mut *w } else { &mut *below };
            let kept = if self.keeps_slopes() { hidden * V } else { 0 };
            let slope;
            (slopes, slope) = slopes.split_at(slopes.len() - kept);
            let carries = l > 0 && self.layers[l - 1].skips;
            if l > 0 && !layer.skips && !carries {
                let epilogue = TimesSlope::<T, S> {
                    activation: self.activation,
                    value,
                    slope,
                };
                let weights = layer.weights.adjoint();
                weights.product_with::<S, V>(s, &[], g, out, epilogue);
            } else {
                layer.weights.adjoint().product::<S, V>(s, &[], g, out);
                if layer.skips {
                    for (out, c) in out.iter_mut().zip(&*carried) {
                        *out = T::plus(s, *out, *c);
                    }
                }
                if carries {
                    carried[..out.len()].copy_from_slice(out);
                }
                // Where layers are skipped, slopes are kept; the first layer reads none.
                for (out, d) in out.iter_mut().zip(slope) {
                    *out = T::times(s, *out, *d);
                }
            }
            (g, rest) = (below, after);
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
        for layer in &self.layers {
            left -= layer.weights.outputs();
            fill::<_, V>(
                &mut pairs,
                window,
                Place { read, left },
                layer.weights.inputs(),
            );
            let (weights, after) = rest.split_at_mut(layer.weights.sums::<S>());
            layer
                .weights
                .accumulate::<S, V>(s, &pairs, scratch, weights);
            let (biases, after) = after.split_at_mut(layer.weights.outputs());
            add_rows::<T, S, V>(s, &pairs, biases);
            rest = after;
            read += layer.weights.inputs();
        }
    }

    #[inline(always)]
    fn gradients<S: Simd>(&self, s: S, sums: &[T::Vector<S>]) -> Vec<T> {
        let mut gradients = Vec::with_capacity(self.parameters());
        let mut rest = sums;
        for layer in &self.layers {
            let (weights, biases);
            (weights, rest) = rest.split_at(layer.weights.sums::<S>());
            (biases, rest) = rest.split_at(layer.weights.outputs());
            layer.weights.gradient(s, weights, &mut gradients);
            layer.weights.bias_gradient(s, biases, &mut gradients);
        }
        gradients
    }
}
