//! A [`HyperCnf`] over tiles.
//!
//! All lanes of a tile are at one time, so that they share the weights of that time.  Those of the times of a grid are
//! computed before the first step, once for all tiles.  The gradients of the weights of a time are summed over the rows of
//! a tile, and pulled back through the network of time together with those of other times of the window.

mod network;
mod passes;

use std::borrow::Cow;

use candle_core::Result;
use pulp::Simd;

use super::HyperCnf;
use crate::rows::{At, Slot, TileField};
use crate::simd::outer::{outer_room, Outer, Pair};
use crate::simd::product::{Layer, Tanh, WithEpilogue};
use crate::simd::{enter, scalars, Element};
use network::{Generated, Network};
use passes::{Bend, MinusTrace};

/// Hidden units of the network of time up to which a pull-back through it for every tile is worth it.
const MOST_HIDDEN: usize = 128;

/// Numbers of weights that are computed before the first step: 16 MiB in f32.
const MOST_READY: usize = 1 << 22;

/// Features beyond those of a layer that a transposition may read: lanes of the longest vector.
const BEYOND: usize = 16;

/// Whether a flow whose network of time has so many hidden units has tiles.
pub(super) fn are_for(hidden: usize) -> bool {
    hidden <= MOST_HIDDEN
}

/// The network of time, and the weights of the times of a grid.
///
/// A slot keeps `[z, 1 | t | h]`: 1 takes the place of l, which no velocity reads.  Cotangents are `[v_z, c | x̄ | c (h² −
/// 1)]`, x̄ those of Wz + b.
pub(crate) struct HyperTiles<T> {
    network: Network<T>,
    /// By time, ascending.
    ready: Vec<Generated<T>>,
    features: usize,
    width: usize,
}

impl<T: Element> HyperTiles<T> {
    pub(super) fn new<S: Simd>(_: S, flow: &HyperCnf) -> Result<Self> {
        Ok(Self {
            network: Network::new::<S>(flow)?,
            ready: vec![],
            features: flow.features,
            width: flow.width,
        })
    }

    /// The weights at a time.
    #[inline(always)]
    fn at<S: Simd>(&self, s: S, t: T) -> Cow<'_, Generated<T>> {
        let found = self.ready.partition_point(|ready| ready.t < t);
        match self.ready.get(found) {
            Some(ready) if ready.t == t => Cow::Borrowed(ready),
            _ => Cow::Owned(self.network.generate(s, t)),
        }
    }

    /// Features of z and 1.
    fn inputs(&self) -> usize {
        self.features + 1
    }

    /// Vectors of the sums of one time: of x̄ with z and 1, of h with v, and of c (h² − 1).
    fn of_one_time<S: Simd>(&self) -> usize {
        let rows = 2 * self.features + 2;
        rows * self.network.padded_width::<S>() / T::lanes::<S>()
    }

    /// The time of a slot.
    #[inline(always)]
    fn time<S: Simd, const V: usize>(&self, kept: &[T::Vector<S>]) -> T {
        scalars::<T, S>(&kept[self.inputs() * V..][..1])[0]
    }
}

impl<T: Element> TileField<T> for HyperTiles<T> {
    fn kept(&self) -> usize {
        self.inputs() + 1 + self.width + BEYOND
    }

    fn cotangents<S: Simd>(&self) -> usize {
        self.inputs() + 2 * self.width + T::lanes::<S>()
    }

    fn sums<S: Simd>(&self) -> usize {
        self.network.sums::<S>()
    }

    fn scratch<S: Simd, const V: usize>(&self, pairs: usize) -> usize {
        // All evaluations of a window may be at different times.
        let of_times = self.of_one_time::<S>() + self.network.scratch::<S>();
        outer_room::<T, S, V>(pairs) + network::TOGETHER * of_times
    }

    fn parameters(&self) -> usize {
        self.network.parameters()
    }

    #[inline(always)]
    fn prepare<S: Simd>(&mut self, s: S, times: &[T]) {
        let numbers = self.network.generated().max(1);
        self.ready.clear();
        if times.len().saturating_mul(numbers) <= MOST_READY {
            for t in times {
                self.ready.push(self.network.generate(s, *t));
            }
        }
    }

    #[inline(always)]
    fn velocity<S: Simd, const V: usize>(
        &self,
        s: S,
        at: &At<'_, T::Vector<S>>,
        kept: &mut [T::Vector<S>],
        k: Option<&mut [T::Vector<S>]>,
    ) {
        let d = self.features;
        kept[d * V..][..V].fill(T::splat(s, T::of(1.0)));
        kept[self.inputs() * V..][..V].copy_from_slice(at.times);
        let weights = self.at(s, self.time::<S, V>(kept));
        let (state, h) = kept.split_at_mut((self.inputs() + 1) * V);
        let h = &mut h[..self.width * V];
        let product = Layer::<T, S, V> {
            weights: &weights.w,
            start: &weights.bias,
            x: &state[..d * V],
            out: h,
        };
        let epilogue = Tanh;
        enter(s, WithEpilogue { product, epilogue });
        if let Some(k) = k {
            let (velocity, of_l) = k.split_at_mut(d * V);
            let product = Layer::<T, S, V> {
                weights: &weights.v_transposed,
                start: &[],
                x: h,
                out: velocity,
            };
            enter(s, product);
            let coupling = &weights.coupling;
            let trace = enter(s, MinusTrace::<T, S, V> { coupling, h });
            of_l.copy_from_slice(&trace);
        }
    }

    fn time_place(&self) -> Option<usize> {
        Some(self.inputs())
    }

    #[inline(always)]
    fn vjp<S: Simd, const V: usize>(
        &self,
        s: S,
        kept: &[T::Vector<S>],
        cotangents: &mut [T::Vector<S>],
        w: &mut [T::Vector<S>],
    ) {
        let (d, size) = (self.features, self.width * V);
        let weights = self.at(s, self.time::<S, V>(kept));
        let h = &kept[(self.inputs() + 1) * V..][..size];
        let (v, rest) = cotangents.split_at_mut(self.inputs() * V);
        let (x_bar, rest) = rest.split_at_mut(size);
        let mut c = [T::zeros::<S>(); V];
        c.copy_from_slice(&v[d * V..][..V]);
        let product = Layer::<T, S, V> {
            weights: &weights.v,
            start: &[],
            x: &v[..d * V],
            out: x_bar,
        };
        enter(s, product);
        let bend = Bend::<T, S, V> {
            c,
            coupling: &weights.coupling,
            h,
            x_bar,
            of_coupling: &mut rest[..size],
        };
        enter(s, bend);
        let product = Layer::<T, S, V> {
            weights: &weights.w_transposed,
            start: &[],
            x: x_bar,
            out: w,
        };
        enter(s, product);
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
        let room = outer_room::<T, S, V>(window.len());
        let (transposed, rest) = scratch.split_at_mut(room);
        let (of_times, rest) = rest.split_at_mut(network::TOGETHER * self.of_one_time::<S>());
        let mut order: Vec<usize> = (0..window.len()).collect();
        // Evaluations at one time stand together; which times there are does not depend on the tile.
        let time = |at: &usize| self.time::<S, V>(window[*at].kept);
        order.sort_by(|a, b| time(a).wide().total_cmp(&time(b).wide()));
        let mut groups: Vec<&[usize]> = order.chunk_by(|a, b| time(a) == time(b)).collect();
        while !groups.is_empty() {
            let next = groups.split_off(groups.len().min(network::TOGETHER));
            let mut weights = Vec::with_capacity(groups.len());
            for (group, sums) in groups
                .iter()
                .zip(of_times.chunks_exact_mut(self.of_one_time::<S>()))
            {
                self.sum_up::<S, V>(s, window, group, transposed, sums);
                weights.push(self.at(s, time(&group[0])));
            }
            let of_times = &mut of_times[..groups.len() * self.of_one_time::<S>()];
            self.network.accumulate(s, &weights, of_times, rest, sums);
            groups = next;
        }
    }

    #[inline(always)]
    fn gradients<S: Simd>(&self, s: S, sums: &[T::Vector<S>]) -> Vec<T> {
        self.network.gradients(s, sums)
    }
}

impl<T: Element> HyperTiles<T> {
    /// The sums of the evaluations at one time over the rows of the tile.
    #[inline(always)]
    fn sum_up<S: Simd, const V: usize>(
        &self,
        s: S,
        window: &[Slot<'_, T::Vector<S>>],
        group: &[usize],
        transposed: &mut [T::Vector<S>],
        sums: &mut [T::Vector<S>],
    ) {
        let (d, m) = (self.features, self.width);
        let outputs = self.network.padded_width::<S>();
        sums.fill(T::zeros::<S>());
        let mut rest = sums;
        for part in 0..3 {
            let inputs = [d + 1, d, 1][part];
            let mut pairs = Vec::with_capacity(group.len());
            for at in group {
                let Slot { kept, cotangents } = window[*at];
                let (x, g) = match part {
                    0 => (kept, &cotangents[(d + 1) * V..]),
                    1 => (cotangents, &kept[(d + 2) * V..]),
                    _ => (&kept[d * V..], &cotangents[(d + 1 + m) * V..]),
                };
                pairs.push(Pair { x, g });
            }
            let sums;
            (sums, rest) = rest.split_at_mut(inputs * outputs / T::lanes::<S>());
            let outer = Outer::<T, S, V> {
                inputs,
                outputs,
                window: &pairs,
                transposed: &mut *transposed,
                sums,
            };
            enter(s, outer);
        }
    }
}
