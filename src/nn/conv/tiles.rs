//! A [`ConvField`] over tiles.

use candle_core::{Shape, Tensor};
use pulp::Simd;

use super::normed::{NormSums, Normalise, PullNorm, TileNorm};
use super::ConvField;
use crate::error::Error;
use crate::nn::activation::{Apply, Pull};
use crate::nn::weights::{append_totals, numbers, with_numbers};
use crate::nn::Activation;
use crate::rows::{At, RowField, Slot, TileField};
use crate::simd::convolution::{
    adjoint_filters, filter_totals, filters, Convolution, Correlation, Image,
};
use crate::simd::packed::Packed;
use crate::simd::{enter, Element, Kernel};
use crate::state::RowLayout;

impl RowField for ConvField {
    type Tiles<T: Element> = ConvTiles<T>;

    fn weights(&self) -> Vec<Tensor> {
        self.tensors().cloned().collect()
    }

    fn reads_time(&self) -> bool {
        false
    }

    fn layout(&self, shapes: &[Shape]) -> Option<RowLayout> {
        let [shape] = shapes else { return None };
        let &[rows, channels, height, width] = shape.dims() else {
            return None;
        };
        let pixels = height * width;
        (channels == self.channels() && pixels > 0).then(|| RowLayout {
            rows,
            features: vec![channels * pixels],
        })
    }

    fn tiles<T: Element, S: Simd>(
        &self,
        _: S,
        shapes: &[Shape],
    ) -> std::result::Result<ConvTiles<T>, Error> {
        let (_, _, height, width) = match shapes {
            [shape] => shape.dims4()?,
            _ => return Err(candle_core::Error::msg("images are one tensor").into()),
        };
        let mut layers = Vec::with_capacity(self.layers.len());
        for layer in &self.layers {
            let shape = layer.shape();
            let (forward, adjoint) = with_numbers::<T, _>(&layer.weight, |w| {
                (filters::<T, S>(shape, w), adjoint_filters::<T, S>(shape, w))
            })?;
            layers.push(ConvTileLayer {
                outputs: shape[0],
                inputs: shape[1],
                size: shape[2],
                forward,
                adjoint,
                bias: numbers(&layer.bias)?,
                norm: layer.norm.as_ref().map(TileNorm::new).transpose()?,
            });
        }
        Ok(ConvTiles {
            layers,
            activation: self.activation,
            image: Image { height, width },
        })
    }
}

/// A [`ConvField`] over tiles.
///
/// A slot keeps `[y | h_1 | h_2 | …]`, what the layers read, after that the slopes where they do not follow from h, and
/// then what group norms keep; cotangents are `[g_L | … | g_1]`, of the layers' z, and behind them those of what group
/// norms put out.
pub(crate) struct ConvTiles<T> {
    layers: Vec<ConvTileLayer<T>>,
    activation: Activation,
    image: Image,
}

struct ConvTileLayer<T> {
    outputs: usize,
    inputs: usize,
    size: usize,
    forward: Packed<T>,
    adjoint: Packed<T>,
    bias: Vec<T>,
    norm: Option<TileNorm<T>>,
}

impl<T: Element> ConvTileLayer<T> {
    /// Numbers of the filters.
    fn weights(&self) -> usize {
        self.outputs * self.inputs * self.size * self.size
    }

    /// Numbers of the group norm.
    fn normed(&self) -> usize {
        self.norm.as_ref().map_or(0, |norm| 2 * norm.channels())
    }

    /// Features that the group norm keeps.
    fn kept_by_norm(&self, pixels: usize) -> usize {
        self.norm.as_ref().map_or(0, |norm| norm.kept(pixels))
    }
}

impl<T: Element> ConvTiles<T> {
    /// Channels of all that layers read.
    fn inputs(&self) -> usize {
        self.layers.iter().map(|l| l.inputs).sum()
    }

    /// Channels of all hidden layers.
    fn hidden(&self) -> usize {
        self.layers[1..].iter().map(|l| l.inputs).sum()
    }

    /// σ of a row of all channels.
    #[inline(always)]
    fn activate<S: Simd, const V: usize>(
        &self,
        s: S,
        row: usize,
        z: &mut [T::Vector<S>],
        slope: &mut [T::Vector<S>],
    ) {
        let row = ActivateRow::<T, S, V> {
            activation: self.activation,
            image: self.image,
            row,
            z,
            slope,
        };
        enter(s, row);
    }

    /// Features of what layers read and of the slopes.
    fn values(&self) -> usize {
        let slopes = match self.activation.keeps_slope() {
            true => self.hidden(),
            false => 0,
        };
        (self.inputs() + slopes) * self.image.pixels()
    }

    /// Features of all layers' z.
    fn outputs(&self) -> usize {
        let outputs: usize = self.layers.iter().map(|l| l.outputs).sum();
        outputs * self.image.pixels()
    }
}

impl<T: Element> TileField<T> for ConvTiles<T> {
    fn kept(&self) -> usize {
        let pixels = self.image.pixels();
        let normed = self.layers.iter().map(|l| l.kept_by_norm(pixels));
        self.values() + normed.sum::<usize>()
    }

    fn cotangents<S: Simd>(&self) -> usize {
        let normed = self.layers.iter().filter(|l| l.norm.is_some());
        let normed: usize = normed.map(|l| l.outputs).sum();
        self.outputs() + normed * self.image.pixels()
    }

    fn sums<S: Simd>(&self) -> usize {
        self.parameters()
    }

    fn scratch<S: Simd, const V: usize>(&self, _: usize) -> usize {
        0
    }

    fn parameters(&self) -> usize {
        let of = |l: &ConvTileLayer<T>| l.weights() + l.outputs + l.normed();
        self.layers.iter().map(of).sum()
    }

    #[inline(always)]
    fn velocity<S: Simd, const V: usize>(
        &self,
        s: S,
        _: &At<'_, T::Vector<S>>,
        kept: &mut [T::Vector<S>],
        k: Option<&mut [T::Vector<S>]>,
    ) {
        let Some((last, hidden)) = self.layers.split_last() else {
            return;
        };
        let (pixels, plane) = (self.image.pixels(), self.image.pixels() * V);
        let (kept, mut normed) = kept.split_at_mut(self.values() * V);
        let (read, mut slopes) = kept.split_at_mut(self.inputs() * plane);
        let (mut x, mut rest) = read.split_at_mut(self.layers[0].inputs * plane);
        for layer in hidden {
            let size = layer.outputs * plane;
            let (out, after) = rest.split_at_mut(size);
            let kept = if self.activation.keeps_slope() {
                size
            } else {
                0
            };
            let (slope, more) = slopes.split_at_mut(kept);
            for row in 0..self.image.height {
                enter(
                    s,
                    Convolution::<T, S, V> {
                        filters: &layer.forward,
                        size: layer.size,
                        image: self.image,
                        start: &layer.bias,
                        row,
                        x,
                        out,
                    },
                );
                if layer.norm.is_none() {
                    self.activate::<S, V>(s, row, out, slope);
                }
            }
            if let Some(norm) = &layer.norm {
                let kept;
                (kept, normed) = normed.split_at_mut(norm.kept(pixels) * V);
                enter(
                    s,
                    Normalise::<T, S, V> {
                        norm,
                        pixels,
                        z: out,
                        kept,
                    },
                );
                for row in 0..self.image.height {
                    self.activate::<S, V>(s, row, out, slope);
                }
            }
            (x, rest, slopes) = (out, after, more);
        }
        let Some(out) = k else { return };
        for row in 0..self.image.height {
            enter(
                s,
                Convolution::<T, S, V> {
                    filters: &last.forward,
                    size: last.size,
                    image: self.image,
                    start: &last.bias,
                    row,
                    x,
                    out,
                },
            );
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
        let (pixels, plane) = (self.image.pixels(), self.image.pixels() * V);
        let (kept, mut normed) = kept.split_at(self.values() * V);
        let (mut read, mut slopes) = kept.split_at(self.inputs() * plane);
        let (cotangents, mut of_normed) = cotangents.split_at_mut(self.outputs() * V);
        let (mut g, mut rest) = cotangents.split_at_mut(w.len());
        for (l, layer) in self.layers.iter().enumerate().rev() {
            let value;
            (read, value) = read.split_at(read.len() - layer.inputs * plane);
            let (below, after) = rest.split_at_mut(if l == 0 { 0 } else { value.len() });
            let out = if l == 0 { &mut *w } else { &mut *below };
            let kept = if l > 0 && self.activation.keeps_slope() {
                value.len()
            } else {
                0
            };
            let slope;
            (slopes, slope) = slopes.split_at(slopes.len() - kept);
            for row in 0..self.image.height {
                enter(
                    s,
                    Convolution::<T, S, V> {
                        filters: &layer.adjoint,
                        size: layer.size,
                        image: self.image,
                        start: &[],
                        row,
                        x: g,
                        out,
                    },
                );
                if l > 0 {
                    enter(
                        s,
                        PullRow::<T, S, V> {
                            activation: self.activation,
                            image: self.image,
                            row,
                            value,
                            slope,
                            g: out,
                        },
                    );
                }
            }
            // The layer below has put out what this one reads.
            let norm = l.checked_sub(1).and_then(|l| self.layers[l].norm.as_ref());
            if let Some(norm) = norm {
                let (kept, of_y);
                (normed, kept) = normed.split_at(normed.len() - norm.kept(pixels) * V);
                let end = of_normed.len() - below.len();
                (of_normed, of_y) = of_normed.split_at_mut(end);
                of_y.copy_from_slice(below);
                enter(
                    s,
                    PullNorm::<T, S, V> {
                        norm,
                        pixels,
                        kept,
                        g: below,
                    },
                );
            }
            (g, rest) = (below, after);
        }
    }

    #[inline(always)]
    fn accumulate<S: Simd, const V: usize>(
        &self,
        s: S,
        window: &[Slot<'_, T::Vector<S>>],
        _: &mut [T::Vector<S>],
        sums: &mut [T::Vector<S>],
    ) {
        let (pixels, plane) = (self.image.pixels(), self.image.pixels() * V);
        for slot in window {
            let (mut x, mut normed) = slot.kept.split_at(self.values() * V);
            let (mut g, mut of_normed) = slot.cotangents.split_at(self.outputs() * V);
            let mut rest = &mut *sums;
            for layer in &self.layers {
                let (filters, biases, norms, own);
                (filters, rest) = rest.split_at_mut(layer.weights());
                (biases, rest) = rest.split_at_mut(layer.outputs);
                (norms, rest) = rest.split_at_mut(layer.normed());
                (g, own) = g.split_at(g.len() - layer.outputs * plane);
                enter(
                    s,
                    Correlation::<T, S, V> {
                        size: layer.size,
                        image: self.image,
                        inputs: layer.inputs,
                        outputs: layer.outputs,
                        x: &x[..layer.inputs * plane],
                        g: own,
                        filters,
                        biases,
                    },
                );
                x = &x[layer.inputs * plane..];
                if let Some(norm) = &layer.norm {
                    let (kept, of_y);
                    (kept, normed) = normed.split_at(norm.kept(pixels) * V);
                    (of_y, of_normed) = of_normed.split_at(layer.outputs * plane);
                    enter(
                        s,
                        NormSums::<T, S, V> {
                            pixels,
                            kept,
                            g: of_y,
                            to: norms,
                        },
                    );
                }
            }
        }
    }

    #[inline(always)]
    fn gradients<S: Simd>(&self, s: S, sums: &[T::Vector<S>]) -> Vec<T> {
        let mut gradients = Vec::with_capacity(self.parameters());
        let mut rest = sums;
        for layer in &self.layers {
            let (filters, biases);
            (filters, rest) = rest.split_at(layer.weights());
            (biases, rest) = rest.split_at(layer.outputs);
            let norms;
            (norms, rest) = rest.split_at(layer.normed());
            let shape = [layer.outputs, layer.inputs, layer.size];
            gradients.extend(filter_totals::<T, S>(s, shape, filters));
            append_totals::<T, S>(s, biases, &mut gradients);
            append_totals::<T, S>(s, norms, &mut gradients);
        }
        gradients
    }
}

/// z becomes σ(z) in one row of all channels; `slope` becomes σ'(z) where it must be kept.
struct ActivateRow<'a, T: Element, S: Simd, const V: usize> {
    activation: Activation,
    image: Image,
    row: usize,
    z: &'a mut [T::Vector<S>],
    slope: &'a mut [T::Vector<S>],
}

impl<T: Element, S: Simd, const V: usize> Kernel<S> for ActivateRow<'_, T, S, V> {
    type Output = ();

    #[inline(always)]
    fn run(self, s: S) {
        let (plane, length) = (self.image.pixels() * V, self.image.width * V);
        let mut at = self.row * length;
        while at < self.z.len() {
            let slope = match self.slope.get_mut(at..at + length) {
                Some(slope) => slope,
                None => &mut [],
            };
            let row = Apply::<T, S> {
                activation: self.activation,
                z: &mut self.z[at..at + length],
                slope,
            };
            row.run(s);
            at += plane;
        }
    }
}

/// g becomes σ' g in one row of all channels.
struct PullRow<'a, T: Element, S: Simd, const V: usize> {
    activation: Activation,
    image: Image,
    row: usize,
    value: &'a [T::Vector<S>],
    slope: &'a [T::Vector<S>],
    g: &'a mut [T::Vector<S>],
}

impl<T: Element, S: Simd, const V: usize> Kernel<S> for PullRow<'_, T, S, V> {
    type Output = ();

    #[inline(always)]
    fn run(self, s: S) {
        let (plane, length) = (self.image.pixels() * V, self.image.width * V);
        let mut at = self.row * length;
        while at < self.g.len() {
            let g = &mut self.g[at..at + length];
            if let Some(slope) = self.slope.get(at..at + length) {
                for (g, d) in g.iter_mut().zip(slope) {
                    *g = T::times(s, *g, *d);
                }
            } else {
                let row = Pull::<T, S> {
                    activation: self.activation,
                    value: &self.value[at..at + length],
                    g,
                };
                row.run(s);
            }
            at += plane;
        }
    }
}
