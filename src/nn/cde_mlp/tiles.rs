//! A [`CdeMlp`] along a path, over tiles.

use std::sync::Arc;

use candle_core::{DType, Result, Shape, Tensor};
use pulp::Simd;

use super::CdeMlp;
use crate::controlled::Driven;
use crate::error::Error;
use crate::field::{FieldWithArgs, Offer, Pullback, VectorField};
use crate::nn::mlp::tiles::MlpTiles;
use crate::nn::weights::numbers;
use crate::nn::Activation;
use crate::offer::Offered;
use crate::path::{ControlPath, Lookup};
use crate::rows::{At, RowField, Slot, TileField};
use crate::simd::{scalars_mut, Element};
use crate::state::RowLayout;
use crate::time::Time;

/// A field with the path that drives it, of whose observations nobody asks the gradient.
#[derive(Clone)]
pub(super) struct Along {
    field: Arc<Driven<CdeMlp>>,
    path: ControlPath,
}

impl CdeMlp {
    /// The field along a path, tile by tile if the path fits.
    pub(super) fn along(&self, path: &ControlPath) -> Option<Offer> {
        if path.is_tracked() || path.channels() != self.channels {
            return None;
        }
        let along = Along {
            field: Arc::new(Driven(self.clone())),
            path: path.clone(),
        };
        Some(Offered::of::<Tensor, _>(&along, true).into())
    }
}

impl VectorField<Tensor> for Along {
    fn velocity(&self, t: &Time, z: &Tensor) -> Result<Tensor> {
        self.field.velocity(t, z, &self.path)
    }

    fn vjp<'f>(&'f self, t: &Time, z: &Tensor) -> Result<(Tensor, Pullback<'f, Tensor>)> {
        self.field.vjp(t, z, &self.path)
    }

    fn parameters(&self) -> Option<Vec<Tensor>> {
        self.field.parameters()
    }

    fn offer(&self) -> Option<Offer> {
        Some(Offered::of::<Tensor, _>(self, true).into())
    }
}

impl RowField for Along {
    type Tiles<T: Element> = AlongTiles<T>;

    fn weights(&self) -> Vec<Tensor> {
        self.field.0.tensors().cloned().collect()
    }

    /// Only the path does, which looks times up in f64.
    fn reads_time(&self) -> bool {
        false
    }

    fn reads_clock(&self) -> bool {
        true
    }

    fn domain(&self) -> Option<[f64; 2]> {
        Some(self.path.ends())
    }

    fn layout(&self, shapes: &[Shape]) -> Option<RowLayout> {
        let [shape] = shapes else { return None };
        let features = self.field.0.features();
        let fits = shape.dims() == [self.path.rows(), features];
        fits.then(|| RowLayout {
            rows: self.path.rows(),
            features: vec![features],
        })
    }

    fn tiles<T: Element, S: Simd>(
        &self,
        s: S,
        _: &[Shape],
    ) -> std::result::Result<AlongTiles<T>, Error> {
        let CdeMlp {
            layers,
            activation,
            output,
            channels,
        } = &self.field.0;
        let pieces = Pieces::new((0..).map_while(|i| self.path.coefficients(i)))?;
        let size = pieces.size();
        Ok(AlongTiles {
            mlp: MlpTiles::new(s, layers, *activation, false, |_| false)?,
            features: self.field.0.features(),
            channels: *channels,
            bounded: matches!(output, Some(Activation::Tanh)),
            lookup: self.path.lookup(),
            terms: size / (self.path.rows() * channels).max(1),
            pieces,
        })
    }
}

/// A [`CdeMlp`] along a path, over tiles.
///
/// A slot keeps that of the perceptron, then F, `[hidden][channel]`, and the slope of the path of every lane's row;
/// cotangents are v, and then those of the perceptron.
pub(crate) struct AlongTiles<T> {
    mlp: MlpTiles<T>,
    features: usize,
    channels: usize,
    /// Whether F is tanh of the perceptron.
    bounded: bool,
    lookup: Lookup,
    pieces: Pieces,
    /// How many powers.
    terms: usize,
}

/// Coefficients of a path in their own dtype, by interval `[row][power][channel]`.
enum Pieces {
    Single(Vec<Vec<f32>>),
    Double(Vec<Vec<f64>>),
}

impl Pieces {
    fn new<'a>(coefficients: impl Iterator<Item = &'a Tensor> + Clone) -> Result<Self> {
        let is_double = |x: &Tensor| x.dtype() == DType::F64;
        Ok(match coefficients.clone().any(is_double) {
            true => Self::Double(coefficients.map(numbers).collect::<Result<_>>()?),
            false => Self::Single(coefficients.map(numbers).collect::<Result<_>>()?),
        })
    }

    /// Numbers of an interval.
    fn size(&self) -> usize {
        match self {
            Self::Single(all) => all.first().map_or(0, Vec::len),
            Self::Double(all) => all.first().map_or(0, Vec::len),
        }
    }

    /// The slopes of a row's path at s in an interval, by channel.
    #[inline(always)]
    fn slopes(
        &self,
        (interval, row): (usize, usize),
        [terms, channels]: [usize; 2],
        s: f64,
        each: impl FnMut(usize, f64),
    ) {
        let of_row = row * terms * channels..(row + 1) * terms * channels;
        match self {
            Self::Single(all) => slopes(&all[interval][of_row], channels, s, each),
            Self::Double(all) => slopes(&all[interval][of_row], channels, s, each),
        }
    }
}

/// Σ j a_j s^{j−1} by channel, by Horner's rule, of coefficients `[power][channel]`.
#[inline(always)]
fn slopes<C: Copy + Into<f64>>(
    coefficients: &[C],
    channels: usize,
    s: f64,
    mut each: impl FnMut(usize, f64),
) {
    let terms = coefficients.len() / channels.max(1);
    for c in 0..channels {
        let mut slope = 0.0;
        for j in (1..terms).rev() {
            slope = slope * s + j as f64 * coefficients[j * channels + c].into();
        }
        each(c, slope);
    }
}

impl<T: Element> AlongTiles<T> {
    /// Numbers of F.
    fn matrix(&self) -> usize {
        self.features * self.channels
    }

    /// The slopes of the paths of all lanes' rows, `[channel][B]`.
    fn slopes<X>(&self, at: &At<'_, X>, slopes: &mut [T]) {
        let (batch, channels) = (at.rows.len(), self.channels);
        let (mut instant, mut place) = (None, (0, 0.0));
        for (lane, &row) in at.rows.iter().enumerate() {
            let now = at.instant(lane);
            if instant != Some(now) {
                instant = Some(now);
                place = self.lookup.place(now.t, now.step);
            }
            let (interval, s) = place;
            let sizes = [self.terms, channels];
            self.pieces.slopes((interval, row), sizes, s, |c, slope| {
                slopes[c * batch + lane] = T::of(slope);
            });
        }
    }
}

impl<T: Element> TileField<T> for AlongTiles<T> {
    fn kept(&self) -> usize {
        self.mlp.kept() + self.matrix() + self.channels
    }

    fn cotangents<S: Simd>(&self) -> usize {
        self.features + self.mlp.cotangents::<S>()
    }

    fn sums<S: Simd>(&self) -> usize {
        self.mlp.sums::<S>()
    }

    fn scratch<S: Simd, const V: usize>(&self, pairs: usize) -> usize {
        self.mlp.scratch::<S, V>(pairs)
    }

    fn parameters(&self) -> usize {
        self.mlp.parameters()
    }

    #[inline(always)]
    fn velocity<S: Simd, const V: usize>(
        &self,
        s: S,
        at: &At<'_, T::Vector<S>>,
        kept: &mut [T::Vector<S>],
        k: Option<&mut [T::Vector<S>]>,
    ) {
        let (slot, rest) = kept.split_at_mut(self.mlp.kept() * V);
        let (matrix, slopes) = rest.split_at_mut(self.matrix() * V);
        let slopes = &mut slopes[..self.channels * V];
        // F is needed by the pull-back, whether or not its product is asked for.
        self.mlp.velocity::<S, V>(s, at, slot, Some(&mut *matrix));
        if self.bounded {
            for f in matrix.iter_mut() {
                *f = T::tanh(s, *f);
            }
        }
        self.slopes(at, scalars_mut::<T, S>(slopes));
        let Some(k) = k else { return };
        for (k, row) in k
            .chunks_exact_mut(V)
            .zip(matrix.chunks_exact(self.channels * V))
        {
            let mut sums = [T::zeros::<S>(); V];
            for (f, slope) in row.chunks_exact(V).zip(slopes.chunks_exact(V)) {
                for v in 0..V {
                    sums[v] = T::mul_add(s, f[v], slope[v], sums[v]);
                }
            }
            k.copy_from_slice(&sums);
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
        let (slot, rest) = kept.split_at(self.mlp.kept() * V);
        let (matrix, slopes) = rest.split_at(self.matrix() * V);
        let slopes = &slopes[..self.channels * V];
        let (seed, of_mlp) = cotangents.split_at_mut(self.features * V);
        let one = T::splat(s, T::of(1.0));
        let rows = matrix.chunks_exact(self.channels * V);
        let out = of_mlp.chunks_exact_mut(self.channels * V);
        for ((seed, row), out) in seed.chunks_exact(V).zip(rows).zip(out) {
            let columns = row.chunks_exact(V).zip(slopes.chunks_exact(V));
            for ((f, slope), g) in columns.zip(out.chunks_exact_mut(V)) {
                for v in 0..V {
                    g[v] = T::times(s, seed[v], slope[v]);
                    if self.bounded {
                        g[v] = T::times(s, g[v], T::fnmadd(s, f[v], f[v], one));
                    }
                }
            }
        }
        self.mlp.vjp::<S, V>(s, slot, of_mlp, w);
    }

    #[inline(always)]
    fn accumulate<S: Simd, const V: usize>(
        &self,
        s: S,
        window: &[Slot<'_, T::Vector<S>>],
        scratch: &mut [T::Vector<S>],
        sums: &mut [T::Vector<S>],
    ) {
        let mut of_mlp = Vec::with_capacity(window.len());
        for slot in window {
            of_mlp.push(Slot {
                kept: slot.kept,
                cotangents: &slot.cotangents[self.features * V..],
            });
        }
        self.mlp.accumulate::<S, V>(s, &of_mlp, scratch, sums);
    }

    #[inline(always)]
    fn gradients<S: Simd>(&self, s: S, sums: &[T::Vector<S>]) -> Vec<T> {
        self.mlp.gradients::<S>(s, sums)
    }
}
