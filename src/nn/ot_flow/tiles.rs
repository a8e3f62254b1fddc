//! An [`OtFlow`] over tiles.
//!
//! In the names of [`OtFlow`] and of its evaluation over a batch: with o = K₀s + b₀, t₀ = tanh o, u = σ(o), t₁ =
//! tanh(K₁u + b₁), z = w + K₁ᵀ(t₁ ∘ w) and e = t₀ ∘ z,
//!
//! ∇Φ = K₀ᵀe + AᵀA s + c,  tr ∇²Φ = (z − t₀ ∘ e)·r + (1 − t₁²)·(w ∘ n) + ‖A‖².
//!
//! K₀ and A are one matrix M of more rows: one product gives K₀s and As, and one gives K₀ᵀe + AᵀAs.  The tangents q_k =
//! K₁(t₀ ∘ K₀e_k) are linear in t₀: q_k = Q_k t₀ with Q_k = K₁ diag(K₀e_k), so that one product gives all of them.

mod passes;

use candle_core::Result;
use pulp::Simd;

use super::OtFlow;
use crate::nn::activation::Apply;
use crate::nn::weights::{append_totals, fill, numbers, LayerWeights, Place, Weights};
use crate::nn::Activation;
use crate::rows::{At, Slot, TileField};
use crate::simd::outer::{add_rows, Pair};
use crate::simd::product::{Layer, Tanh, WithEpilogue};
use crate::simd::{enter, Element};
use passes::{Costs, Lower, Open, Seeds, Tangents, Times, Trace, Upper};

/// The numbers of Q that are worth to be held: 16 MiB in f32.
const MOST: usize = 1 << 22;

/// Whether a potential of so many features and hidden units has tiles.
pub(super) fn are_for(features: usize, width: usize) -> bool {
    let numbers = width.saturating_mul(width).saturating_mul(features);
    numbers <= MOST
}

/// The matrices, packed, and their rows.
///
/// A slot keeps `[x, costs | e, As | w ∘ t₁ | t₀ | u | t₁ | z | q | n | ∇Φ]`; time takes the place of the first of the
/// costs, which the potential does not read.  Cotangents are `[v | g | ō, Ag | p̄ | z̄ | ω | ρ | q̄ | scratch]`: g is that of
/// ∇Φ, ō and p̄ those of K₀s + b₀ and K₁u + b₁, and the sums of ω and ρ over the rows are those of w and r.
pub(crate) struct OtFlowTiles<T> {
    /// M.
    outer: Weights<T>,
    /// b₀, and zeros for A.
    outer_bias: Vec<T>,
    /// K₁.
    inner: Weights<T>,
    inner_bias: Vec<T>,
    /// Q.
    pushed: Weights<T>,
    w: Vec<T>,
    c: Vec<T>,
    /// r.
    squares: Vec<T>,
    /// ‖A‖², of the columns of x.
    of_a: T,
    /// K₀ and A, `[row][feature]`, and K₁.
    outer_rows: Vec<T>,
    inner_rows: Vec<T>,
    features: usize,
    width: usize,
}

/// Where the parts of a slot begin, in features.
struct Places {
    /// Of what is kept.
    weighted: usize,
    t0: usize,
    u: usize,
    t1: usize,
    z: usize,
    q: usize,
    n: usize,
    slopes: usize,
    kept: usize,
    /// Of the cotangents.
    open: usize,
    inner: usize,
    of_z: usize,
    of_w: usize,
    of_q: usize,
    cotangents: usize,
}

impl<T: Element> OtFlowTiles<T> {
    pub(super) fn new<S: Simd>(s: S, flow: &OtFlow) -> Result<Self> {
        let ([k0, b0], [k1, b1]) = (&flow.open, &flow.inner);
        let (d, inputs) = (flow.features(), flow.features() + 1);
        let (width, rank) = (k1.dim(0)?, flow.a.dim(0)?);
        let mut outer_rows = numbers::<T>(k0)?;
        let inner_rows = numbers::<T>(k1)?;
        let mut q = Vec::with_capacity(d * width * width);
        for k in 0..d {
            for row in inner_rows.chunks_exact(width) {
                let of_x = outer_rows.chunks_exact(inputs).map(|row| row[k]);
                q.extend(row.iter().zip(of_x).map(|(k1, k0)| *k1 * k0));
            }
        }
        let square = |row: &[T]| {
            let squares = row[..d].iter().map(|x| x.wide() * x.wide());
            squares.sum::<f64>()
        };
        let squares = outer_rows.chunks_exact(inputs).map(square);
        let squares = squares.map(T::of).collect();
        let a = numbers::<T>(&flow.a)?;
        let of_a = a.chunks_exact(inputs).map(square).sum();
        outer_rows.extend(a);
        let mut outer_bias = numbers(b0)?;
        outer_bias.resize(width + rank, T::default());
        Ok(Self {
            outer: Weights::pack(s, &outer_rows, width + rank, inputs, inputs),
            outer_bias,
            inner: Weights::pack(s, &inner_rows, width, width, width),
            inner_bias: numbers(b1)?,
            pushed: Weights::pack(s, &q, d * width, width, width),
            w: numbers(&flow.w)?,
            c: numbers(&flow.c)?,
            squares,
            of_a: T::of(of_a),
            outer_rows,
            inner_rows,
            features: d,
            width,
        })
    }

    /// Features of x and time.
    fn inputs(&self) -> usize {
        self.features + 1
    }

    fn places(&self) -> Places {
        let (d, m, inputs) = (self.features, self.width, self.inputs());
        let state = d + COSTS;
        let weighted = state + self.outer.outputs;
        let q = weighted + 5 * m;
        let open = state + inputs;
        let inner = open + self.outer.outputs;
        let of_q = inner + 4 * m;
        Places {
            weighted,
            t0: weighted + m,
            u: weighted + 2 * m,
            t1: weighted + 3 * m,
            z: weighted + 4 * m,
            q,
            n: q + d * m,
            slopes: q + (d + 1) * m,
            kept: q + (d + 1) * m + inputs,
            open,
            inner,
            of_z: inner + m,
            of_w: inner + 2 * m,
            of_q,
            cotangents: of_q + (d + 1) * m,
        }
    }
}

/// l, L and R.
const COSTS: usize = 3;

impl<T: Element> TileField<T> for OtFlowTiles<T> {
    fn kept(&self) -> usize {
        self.places().kept
    }

    fn cotangents<S: Simd>(&self) -> usize {
        // The transposition reads whole vectors of features.
        self.places().cotangents + T::lanes::<S>()
    }

    fn sums<S: Simd>(&self) -> usize {
        let matrices = [&self.outer, &self.inner, &self.pushed];
        let matrices = matrices.iter().map(|w| w.sums::<S>()).sum::<usize>();
        // Of b₀, b₁, w, r, c and ‖A‖².
        matrices + 4 * self.width + self.inputs() + 1
    }

    fn scratch<S: Simd, const V: usize>(&self, pairs: usize) -> usize {
        let matrices = [&self.outer, &self.inner, &self.pushed];
        let spare = matrices.iter().map(|w| w.scratch::<S, V>(2 * pairs));
        spare.max().unwrap_or(0)
    }

    fn parameters(&self) -> usize {
        let shifts = 3 * self.width + self.inputs();
        self.outer_rows.len() + self.inner_rows.len() + shifts
    }

    #[inline(always)]
    fn velocity<S: Simd, const V: usize>(
        &self,
        s: S,
        at: &At<'_, T::Vector<S>>,
        kept: &mut [T::Vector<S>],
        k: Option<&mut [T::Vector<S>]>,
    ) {
        let (d, m, places) = (self.features, self.width * V, self.places());
        kept[d * V..][..V].copy_from_slice(at.times);
        let (state, rest) = kept.split_at_mut((d + COSTS) * V);
        let (ends, rest) = rest.split_at_mut(self.outer.outputs * V);
        let (weighted, rest) = rest.split_at_mut(m);
        let (t0, rest) = rest.split_at_mut(m);
        let (u, rest) = rest.split_at_mut(m);
        let (t1, rest) = rest.split_at_mut(m);
        let (z, rest) = rest.split_at_mut(m);
        let (q, rest) = rest.split_at_mut((places.n - places.q) * V);
        let (n, slopes) = rest.split_at_mut(m);
        let product = Layer::<T, S, V> {
            weights: &self.outer.forward,
            start: &self.outer_bias,
            x: &state[..self.inputs() * V],
            out: ends,
        };
        enter(s, product);
        u.copy_from_slice(&ends[..m]);
        let activation = Activation::LogTwoCosh;
        let apply = Apply::<T, S> {
            activation,
            z: u,
            slope: t0,
        };
        enter(s, apply);
        let product = Layer::<T, S, V> {
            weights: &self.inner.forward,
            start: &self.inner_bias,
            x: u,
            out: t1,
        };
        let epilogue = Tanh;
        enter(s, WithEpilogue { product, epilogue });
        let times = Times::<T, S, V> {
            c: &self.w,
            x: t1,
            out: weighted,
        };
        enter(s, times);
        let product = Layer::<T, S, V> {
            weights: &self.inner.adjoint,
            start: &self.w,
            x: weighted,
            out: z,
        };
        enter(s, product);
        for ((e, t0), z) in ends.iter_mut().zip(&*t0).zip(&*z) {
            *e = T::times(s, *t0, *z);
        }
        let product = Layer::<T, S, V> {
            weights: &self.outer.adjoint,
            start: &self.c,
            x: ends,
            out: slopes,
        };
        enter(s, product);
        let mut trace = [T::zeros::<S>(); V];
        if at.is_weighed {
            let product = Layer::<T, S, V> {
                weights: &self.pushed.forward,
                start: &[],
                x: t0,
                out: q,
            };
            enter(s, product);
            let of = Trace::<T, S, V> {
                start: self.of_a,
                r: &self.squares,
                w: &self.w,
                upper: [t0, z, &ends[..m]],
                t1,
                q,
                n,
            };
            trace = enter(s, of);
        } else {
            // Of cotangents that are zero: what is here from before may be infinite.
            q.fill(T::zeros::<S>());
            n.fill(T::zeros::<S>());
        }
        if let Some(k) = k {
            let (velocity, costs) = k.split_at_mut(d * V);
            let costs = Costs::<T, S, V> {
                slopes,
                trace,
                velocity,
                costs,
            };
            enter(s, costs);
        }
    }

    fn time_place(&self) -> Option<usize> {
        Some(self.features)
    }

    #[inline(always)]
    fn vjp<S: Simd, const V: usize>(
        &self,
        s: S,
        kept: &[T::Vector<S>],
        cotangents: &mut [T::Vector<S>],
        w: &mut [T::Vector<S>],
    ) {
        let (d, m, places) = (self.features, self.width * V, self.places());
        let of = |from: usize| &kept[from * V..][..m];
        let (t0, t1, z) = (of(places.t0), of(places.t1), of(places.z));
        let (e, n) = (of(d + COSTS), of(places.n));
        let q = &kept[places.q * V..places.n * V];
        let (v, rest) = cotangents.split_at_mut((d + COSTS) * V);
        let (g, rest) = rest.split_at_mut(self.inputs() * V);
        let (ends, rest) = rest.split_at_mut(self.outer.outputs * V);
        let (inner, rest) = rest.split_at_mut(m);
        let (of_z, rest) = rest.split_at_mut(m);
        let (of_w, rest) = rest.split_at_mut(m);
        let (of_r, rest) = rest.split_at_mut(m);
        let (of_q, rest) = rest.split_at_mut(q.len());
        let scratch = &mut rest[..m];
        let mut c = [T::zeros::<S>(); V];
        c.copy_from_slice(&v[d * V..][..V]);
        let seeds = Seeds::<T, S, V> {
            slopes: &kept[places.slopes * V..][..self.inputs() * V],
            v,
            g,
        };
        enter(s, seeds);
        let product = Layer::<T, S, V> {
            weights: &self.outer.forward,
            start: &[],
            x: g,
            out: ends,
        };
        enter(s, product);
        let open = &mut ends[..m];
        let upper = Upper::<T, S, V> {
            c,
            r: &self.squares,
            kept: [t0, z, e],
            open,
            of_z,
            of_r,
        };
        enter(s, upper);
        let tangents = Tangents::<T, S, V> {
            c,
            w: &self.w,
            t1,
            q,
            of_q,
        };
        enter(s, tangents);
        let product = Layer::<T, S, V> {
            weights: &self.pushed.adjoint,
            start: &[],
            x: of_q,
            out: inner,
        };
        enter(s, product);
        for (open, of_q) in ends.iter_mut().zip(&*inner) {
            *open = T::plus(s, *open, *of_q);
        }
        let product = Layer::<T, S, V> {
            weights: &self.inner.forward,
            start: &[],
            x: of_z,
            out: of_w,
        };
        enter(s, product);
        let lower = Lower::<T, S, V> {
            c,
            w: &self.w,
            t1,
            n,
            of_z,
            of_w,
            inner,
        };
        enter(s, lower);
        let product = Layer::<T, S, V> {
            weights: &self.inner.adjoint,
            start: &[],
            x: inner,
            out: scratch,
        };
        enter(s, product);
        let open = &mut ends[..m];
        enter(s, Open::<T, S> { t0, scratch, open });
        let product = Layer::<T, S, V> {
            weights: &self.outer.adjoint,
            start: &[],
            x: ends,
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
        let (d, m, places) = (self.features, self.width, self.places());
        let mut pairs = Vec::with_capacity(2 * window.len());
        let (outer, rest) = sums.split_at_mut(self.outer.sums::<S>());
        let (inner, rest) = rest.split_at_mut(self.inner.sums::<S>());
        let (pushed, rest) = rest.split_at_mut(self.pushed.sums::<S>());
        let (of_open, rest) = rest.split_at_mut(m);
        let (of_inner, rest) = rest.split_at_mut(m);
        let (of_weights, rest) = rest.split_at_mut(2 * m);
        let (of_slopes, of_trace) = rest.split_at_mut(self.inputs());

        let place = |read, left| Place { read, left };
        fill::<_, V>(&mut pairs, window, place(0, places.open), self.inputs());
        add_rows::<T, S, V>(s, &pairs, of_open);
        for slot in window {
            pairs.push(Pair {
                x: &slot.cotangents[(d + COSTS) * V..][..self.inputs() * V],
                g: &slot.kept[(d + COSTS) * V..],
            });
        }
        self.outer.accumulate::<S, V>(s, &pairs, scratch, outer);

        fill::<_, V>(&mut pairs, window, place(places.u, places.inner), m);
        add_rows::<T, S, V>(s, &pairs, of_inner);
        for slot in window {
            pairs.push(Pair {
                x: &slot.cotangents[places.of_z * V..][..m * V],
                g: &slot.kept[places.weighted * V..],
            });
        }
        self.inner.accumulate::<S, V>(s, &pairs, scratch, inner);

        fill::<_, V>(&mut pairs, window, place(places.t0, places.of_q), m);
        self.pushed.accumulate::<S, V>(s, &pairs, scratch, pushed);

        fill::<_, V>(&mut pairs, window, place(0, places.of_w), 0);
        add_rows::<T, S, V>(s, &pairs, of_weights);
        fill::<_, V>(&mut pairs, window, place(0, d + COSTS), 0);
        add_rows::<T, S, V>(s, &pairs, of_slopes);
        fill::<_, V>(&mut pairs, window, place(0, d), 0);
        add_rows::<T, S, V>(s, &pairs, of_trace);
    }

    #[inline(always)]
    fn gradients<S: Simd>(&self, s: S, sums: &[T::Vector<S>]) -> Vec<T> {
        let (d, m, inputs) = (self.features, self.width, self.inputs());
        let (outer, rest) = sums.split_at(self.outer.sums::<S>());
        let (inner, rest) = rest.split_at(self.inner.sums::<S>());
        let (pushed, rest) = rest.split_at(self.pushed.sums::<S>());
        let (mut of_outer, mut of_inner, mut of_q) = (vec![], vec![], vec![]);
        self.outer.gradient(s, outer, &mut of_outer);
        self.inner.gradient(s, inner, &mut of_inner);
        self.pushed.gradient(s, pushed, &mut of_q);
        let mut shifts = Vec::with_capacity(rest.len());
        append_totals::<T, S>(s, rest, &mut shifts);
        let (b0, rest) = shifts.split_at(m);
        let (b1, rest) = rest.split_at(m);
        let (w, rest) = rest.split_at(m);
        let (r, rest) = rest.split_at(m);
        let (c, trace) = rest.split_at(inputs);
        // Q_k = K₁ diag(K₀e_k).
        for (at, of_q) in of_q.chunks_exact(m).enumerate() {
            let (k, j) = (at / m, at % m);
            for (i, x) in of_q.iter().enumerate() {
                of_inner[j * m + i] += *x * self.outer_rows[i * inputs + k];
                of_outer[i * inputs + k] += *x * self.inner_rows[j * m + i];
            }
        }
        // r, the squared norms of the rows of K₀, and ‖A‖²: of the columns of x.
        let rows = of_outer.chunks_exact_mut(inputs);
        for (i, (of_row, row)) in rows.zip(self.outer_rows.chunks_exact(inputs)).enumerate() {
            let x = r.get(i).copied().unwrap_or(trace[0]);
            for (of, k) in of_row[..d].iter_mut().zip(row) {
                *of += (x + x) * *k;
            }
        }
        let (k0, a) = of_outer.split_at(m * inputs);
        [k0, b0, &of_inner, b1, w, a, c].concat()
    }
}
