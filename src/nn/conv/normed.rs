//! Group norm over tiles of images: each lane is an image, so that means are sums over features.

use pulp::Simd;

use super::{GroupNorm, EPSILON};
use crate::nn::weights::numbers;
use crate::simd::{scalars_mut, Element, Kernel};

/// A [`GroupNorm`] over tiles.
pub(super) struct TileNorm<T> {
    pub(super) groups: usize,
    /// γ and β, by channel.
    weight: Vec<T>,
    bias: Vec<T>,
}

impl<T: Element> TileNorm<T> {
    pub(super) fn new(norm: &GroupNorm) -> candle_core::Result<Self> {
        Ok(Self {
            groups: norm.groups,
            weight: numbers(&norm.weight)?,
            bias: numbers(&norm.bias)?,
        })
    }

    pub(super) fn channels(&self) -> usize {
        self.weight.len()
    }

    /// Features that an evaluation keeps: (z − mean) / deviation of each channel, and 1 / deviation of each group.
    pub(super) fn kept(&self, pixels: usize) -> usize {
        self.channels() * pixels + self.groups
    }
}

/// Terms of a sum before it is added to the total, so that rounding does not grow with the image.
const BLOCK: usize = 64;

/// Σ x y over the features of a group, by lane.
#[inline(always)]
fn sums<T: Element, S: Simd, const V: usize>(
    s: S,
    x: &[T::Vector<S>],
    y: &[T::Vector<S>],
) -> [T::Vector<S>; V] {
    let mut total = [T::zeros::<S>(); V];
    for (x, y) in x.chunks(BLOCK * V).zip(y.chunks(BLOCK * V)) {
        let mut part = [T::zeros::<S>(); V];
        for (x, y) in x.as_chunks::<V>().0.iter().zip(y.as_chunks::<V>().0) {
            for v in 0..V {
                part[v] = T::mul_add(s, x[v], y[v], part[v]);
            }
        }
        for v in 0..V {
            total[v] = T::plus(s, total[v], part[v]);
        }
    }
    total
}

/// Σ over the features of a group, by lane.
#[inline(always)]
fn total<T: Element, S: Simd, const V: usize>(s: S, x: &[T::Vector<S>]) -> [T::Vector<S>; V] {
    let mut total = [T::zeros::<S>(); V];
    for x in x.chunks(BLOCK * V) {
        let mut part = [T::zeros::<S>(); V];
        for x in x.as_chunks::<V>().0 {
            for v in 0..V {
                part[v] = T::plus(s, part[v], x[v]);
            }
        }
        for v in 0..V {
            total[v] = T::plus(s, total[v], part[v]);
        }
    }
    total
}

/// The sums divided by the number of features.
#[inline(always)]
fn means<T: Element, S: Simd, const V: usize>(
    s: S,
    mut sums: [T::Vector<S>; V],
    features: usize,
) -> [T::Vector<S>; V] {
    let n = T::splat(s, T::of(1.0 / features.max(1) as f64));
    for sum in &mut sums {
        *sum = T::times(s, *sum, n);
    }
    sums
}

/// z becomes γ n + β, where n = (z − mean) / deviation by group, and n and 1 / deviation are kept.
pub(super) struct Normalise<'a, T: Element, S: Simd, const V: usize> {
    pub(super) norm: &'a TileNorm<T>,
    pub(super) pixels: usize,
    pub(super) z: &'a mut [T::Vector<S>],
    pub(super) kept: &'a mut [T::Vector<S>],
}

impl<T: Element, S: Simd, const V: usize> Kernel<S> for Normalise<'_, T, S, V> {
    type Output = ();

    #[inline(always)]
    fn run(self, s: S) {
        let (plane, channels) = (self.pixels * V, self.norm.channels());
        let size = channels / self.norm.groups * plane;
        let (normal, scales) = self.kept.split_at_mut(channels * plane);
        let groups = self.z.chunks_exact_mut(size);
        let kept = normal
            .chunks_exact_mut(size)
            .zip(scales.as_chunks_mut::<V>().0);
        for (g, (z, (normal, scale))) in groups.zip(kept).enumerate() {
            let mean = means::<T, S, V>(s, total::<T, S, V>(s, z), size / V);
            for (n, z) in normal
                .as_chunks_mut::<V>()
                .0
                .iter_mut()
                .zip(z.as_chunks::<V>().0)
            {
                for v in 0..V {
                    n[v] = T::minus(s, z[v], mean[v]);
                }
            }
            *scale = means::<T, S, V>(s, sums::<T, S, V>(s, normal, normal), size / V);
            // One number for each image: a square root by lane.
            for x in scalars_mut::<T, S>(scale) {
                *x = T::of(1.0 / (x.wide() + EPSILON).sqrt());
            }
            let by_channel = normal
                .chunks_exact_mut(plane)
                .zip(z.chunks_exact_mut(plane));
            let first = g * (channels / self.norm.groups);
            for (c, (normal, z)) in (first..).zip(by_channel) {
                let weight = T::splat(s, self.norm.weight[c]);
                let bias = T::splat(s, self.norm.bias[c]);
                let normal = normal.as_chunks_mut::<V>().0.iter_mut();
                for (n, z) in normal.zip(z.as_chunks_mut::<V>().0) {
                    for v in 0..V {
                        n[v] = T::times(s, n[v], scale[v]);
                        z[v] = T::mul_add(s, weight, n[v], bias);
                    }
                }
            }
        }
    }
}

/// The cotangent of y becomes that of z: (γ g − mean(γ g) − n mean(γ g n)) / deviation.
pub(super) struct PullNorm<'a, T: Element, S: Simd, const V: usize> {
    pub(super) norm: &'a TileNorm<T>,
    pub(super) pixels: usize,
    pub(super) kept: &'a [T::Vector<S>],
    pub(super) g: &'a mut [T::Vector<S>],
}

impl<T: Element, S: Simd, const V: usize> Kernel<S> for PullNorm<'_, T, S, V> {
    type Output = ();

    #[inline(always)]
    fn run(self, s: S) {
        let (plane, channels) = (self.pixels * V, self.norm.channels());
        let size = channels / self.norm.groups * plane;
        let (normal, scales) = self.kept.split_at(channels * plane);
        for (c, g) in self.g.chunks_exact_mut(plane).enumerate() {
            let weight = T::splat(s, self.norm.weight[c]);
            for g in g {
                *g = T::times(s, *g, weight);
            }
        }
        let kept = normal.chunks_exact(size).zip(scales.as_chunks::<V>().0);
        for (g, (normal, scale)) in self.g.chunks_exact_mut(size).zip(kept) {
            let mean = means::<T, S, V>(s, total::<T, S, V>(s, g), size / V);
            let along = means::<T, S, V>(s, sums::<T, S, V>(s, g, normal), size / V);
            for (g, n) in g
                .as_chunks_mut::<V>()
                .0
                .iter_mut()
                .zip(normal.as_chunks::<V>().0)
            {
                for v in 0..V {
                    let rest = T::minus(s, g[v], mean[v]);
                    g[v] = T::times(s, T::fnmadd(s, n[v], along[v], rest), scale[v]);
                }
            }
        }
    }
}

/// Adds the gradients of γ and β, by lane, from the cotangent of y.
pub(super) struct NormSums<'a, T: Element, S: Simd, const V: usize> {
    pub(super) pixels: usize,
    pub(super) kept: &'a [T::Vector<S>],
    pub(super) g: &'a [T::Vector<S>],
    /// γ̄ and then β̄, by channel.
    pub(super) to: &'a mut [T::Vector<S>],
}

impl<T: Element, S: Simd, const V: usize> Kernel<S> for NormSums<'_, T, S, V> {
    type Output = ();

    #[inline(always)]
    fn run(self, s: S) {
        let plane = self.pixels * V;
        let (weights, biases) = self.to.split_at_mut(self.to.len() / 2);
        let planes = self
            .g
            .chunks_exact(plane)
            .zip(self.kept.chunks_exact(plane));
        for ((g, normal), (weight, bias)) in planes.zip(weights.iter_mut().zip(biases)) {
            for sum in sums::<T, S, V>(s, g, normal) {
                *weight = T::plus(s, *weight, sum);
            }
            for sum in total::<T, S, V>(s, g) {
                *bias = T::plus(s, *bias, sum);
            }
        }
    }
}
