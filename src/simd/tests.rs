//! Every kernel on every vector unit that the machine has, against f64 arithmetic.

use proptest::prelude::*;
use pulp::{Scalar, Simd, WithSimd};

use super::matrix::{Matrix, RowBlock};
use super::outer::{add_rows, outer_room, Dot, Outer, Pair};
use super::packed::Packed;
use super::product::{padded, Epilogue, Layer, Tanh, Transpose, WithEpilogue, FAR, NEAR};
use super::tiles::{load, store, Idle};
use super::{enter, scalars, scalars_mut, Element};
use crate::precision::Low;

/// A check that runs on a vector unit.
trait Check: Copy {
    fn check<S: Simd>(self, s: S);
}

struct On<C>(C);

impl<C: Check> WithSimd for On<C> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, s: S) {
        self.0.check(s);
    }
}

/// Runs a check on every unit.
fn everywhere(check: impl Check) {
    Scalar::new().vectorize(On(check));
    #[cfg(target_arch = "x86_64")]
    {
        if let Some(s) = pulp::x86::V3::try_new() {
            Simd::vectorize(s, On(check));
        }
        if let Some(s) = pulp::x86::V4::try_new() {
            Simd::vectorize(s, On(check));
        }
    }
    pulp::Arch::new().dispatch(On(check));
}

/// Numbers as vectors, the last one filled up with zeros.
fn vectors<T: Element, S: Simd>(x: &[T]) -> Vec<T::Vector<S>> {
    let mut out = vec![T::zeros::<S>(); x.len().div_ceil(T::lanes::<S>())];
    scalars_mut::<T, S>(&mut out)[..x.len()].copy_from_slice(x);
    out
}

/// A function of f32 vectors, its exact value, and its bound in unit roundoffs of the value plus a
/// number.
#[derive(Clone, Copy)]
struct Accuracy {
    name: &'static str,
    exact: fn(f64) -> f64,
    units: f64,
    absolute: f64,
    range: f32,
}

impl Accuracy {
    #[inline(always)]
    fn value<S: Simd>(self, s: S, x: S::f32s) -> S::f32s {
        match self.name {
            "tanh" => <f32 as Element>::tanh(s, x),
            "exp" => <f32 as Element>::exp(s, x),
            "sigmoid" => <f32 as Element>::sigmoid(s, x),
            "softplus" => <f32 as Element>::softplus(s, x)[0],
            "softplus slope" => <f32 as Element>::softplus(s, x)[1],
            "normal" => <f32 as Element>::normal(s, x)[0],
            "density" => <f32 as Element>::normal(s, x)[1],
            "sin" => <f32 as Element>::sin_cos(s, x)[0],
            _ => <f32 as Element>::sin_cos(s, x)[1],
        }
    }
}

impl Check for Accuracy {
    #[inline(always)]
    fn check<S: Simd>(self, s: S) {
        const POINTS: usize = 20_000;
        let at = |i: usize| self.range * (2.0 * i as f32 / POINTS as f32 - 1.0);
        let mut x: Vec<f32> = (0..=POINTS).map(at).collect();
        x.extend([1e-30, -1e-30, 1e-5, -1e-5, 0.0]);
        for x in &vectors::<f32, S>(&x) {
            let y = self.value(s, *x);
            let (x, y) = (std::slice::from_ref(x), std::slice::from_ref(&y));
            for (&x, &y) in scalars::<f32, S>(x).iter().zip(scalars::<f32, S>(y)) {
                let exact = (self.exact)(x.into());
                let bound = self.units * 2f64.powi(-24) * exact.abs() + self.absolute;
                let error = (f64::from(y) - exact).abs();
                assert!(error <= bound, "{} {x:e}: {y:e}, {exact:e}", self.name);
            }
        }
        // A NaN stays one whatever its payload is.
        for bits in [0x7fc0_0001, 0xffff_ffff_u32] {
            let nan = self.value(s, s.splat_f32s(f32::from_bits(bits)));
            let nan = std::slice::from_ref(&nan);
            let all = scalars::<f32, S>(nan).iter().all(|y| y.is_nan());
            assert!(all, "{} {bits:x}", self.name);
        }
        let nan = self.value(s, s.splat_f32s(f32::NAN));
        let nan = std::slice::from_ref(&nan);
        assert!(
            scalars::<f32, S>(nan).iter().all(|y| y.is_nan()),
            "{}",
            self.name
        );
    }
}

#[test]
fn elementary_functions_are_accurate_to_a_few_roundoffs_and_pass_nan_on() {
    let sigmoid = |x: f64| 1.0 / (1.0 + (-x).exp());
    let normal = |x: f64| 0.5 * candle_core::cpu::erf::erfc_f64(-x * 0.5f64.sqrt());
    let tiny = 1e-37;
    let of = |name, exact, units, absolute, range| Accuracy {
        name,
        exact,
        units,
        absolute,
        range,
    };
    for accuracy in [
        of("tanh", f64::tanh, 14.0, tiny, 20.0),
        of("exp", f64::exp, 8.0, tiny, 86.0),
        of("sigmoid", sigmoid, 8.0, tiny, 80.0),
        of(
            "softplus",
            |x: f64| x.max(0.0) + (-x.abs()).exp().ln_1p(),
            8.0,
            tiny,
            80.0,
        ),
        of("softplus slope", sigmoid, 8.0, tiny, 80.0),
        // The tail loses the digits of x².
        of("normal", normal, 8.0, 4e-8, 12.0),
        of(
            "density",
            |x: f64| (-0.5 * x * x).exp() / std::f64::consts::TAU.sqrt(),
            8.0,
            4e-8,
            12.0,
        ),
        of("sin", f64::sin, 4.0, 4.0 * 2f64.powi(-24), 2000.0),
        of("cos", f64::cos, 4.0, 4.0 * 2f64.powi(-24), 2000.0),
        of("sin", f64::sin, 4.0, 4.0 * 2f64.powi(-24), 1e6),
    ] {
        everywhere(accuracy);
    }
}

#[derive(Clone, Copy)]
struct Rounding;

impl Check for Rounding {
    #[inline(always)]
    fn check<S: Simd>(self, s: S) {
        let extremes = [
            0x7f80_0000,
            0xff80_0000,
            0x4780_0000,
            0x477f_efff,
            0x477f_f000,
            0x3380_0000,
            0x3300_0000,
            0x3300_0001,
            0x8000_0000,
            0x7f7f_ffff,
            0x0000_0001,
        ];
        let x = (0..=u32::MAX).step_by(0xfff * 61).chain(extremes);
        let x: Vec<f32> = x.map(f32::from_bits).collect();
        for x in &vectors::<f32, S>(&x) {
            for low in [Low::None, Low::Bf16, Low::F16] {
                let y = <f32 as Element>::round(s, low, *x);
                let (x, y) = (std::slice::from_ref(x), std::slice::from_ref(&y));
                for (&x, &y) in scalars::<f32, S>(x).iter().zip(scalars::<f32, S>(y)) {
                    let exact = low.round(x);
                    assert!(
                        y.to_bits() == exact.to_bits() || (x.is_nan() && y.is_nan()),
                        "{low:?} {x:e}: {y:e}, {exact:e}"
                    );
                }
            }
        }
    }
}

#[test]
fn vectors_round_to_the_nearest_low_number() {
    everywhere(Rounding);
}

#[derive(Clone, Copy)]
struct Transposes;

impl Transposes {
    #[inline(always)]
    fn of<T: Element, S: Simd>(s: S) {
        let lanes = T::lanes::<S>();
        let (from_stride, to_stride) = (3, 2);
        let numbers: Vec<T> = (0..lanes * lanes * 3).map(|i| T::of(i as f64)).collect();
        let from = vectors::<T, S>(&numbers);
        let mut to = vec![T::zeros::<S>(); lanes * to_stride];
        T::transpose(s, &from, from_stride, &mut to, to_stride);
        let (from, to) = (scalars::<T, S>(&from), scalars::<T, S>(&to));
        for r in 0..lanes {
            for c in 0..lanes {
                assert_eq!(
                    to[c * to_stride * lanes + r],
                    from[r * from_stride * lanes + c]
                );
            }
        }
    }
}

impl Check for Transposes {
    #[inline(always)]
    fn check<S: Simd>(self, s: S) {
        Self::of::<f32, S>(s);
        Self::of::<f64, S>(s);
    }
}

#[test]
fn transposition_turns_rows_into_columns() {
    everywhere(Transposes);
}

/// Products of random numbers, of these sizes.
#[derive(Clone, Copy)]
struct Products<'a> {
    rows: usize,
    columns: usize,
    pairs: usize,
    numbers: &'a [f64],
}

impl Products<'_> {
    fn numbers<T: Element>(&self, from: usize, n: usize) -> Vec<T> {
        let cycled = self.numbers.iter().cycle().skip(from);
        cycled.take(n).map(|&x| T::of(x)).collect()
    }

    #[inline(always)]
    fn of<T: Element, S: Simd, const V: usize>(self, s: S) {
        let batch = V * T::lanes::<S>();
        let unit = if size_of::<T>() == 4 {
            2f64.powi(-24)
        } else {
            2f64.powi(-53)
        };
        let (rows, columns) = (self.rows, self.columns);
        let weights = self.numbers::<T>(0, rows * columns);
        let start = self.numbers::<T>(7, rows);
        let x = vectors::<T, S>(&self.numbers::<T>(3, columns * batch));
        let packed = Packed::new::<S>(rows, columns, |r, c| weights[r * columns + c]);
        let of_rows = Packed::of_rows(s, rows, columns, &weights);
        assert_eq!(of_rows.data, packed.data);
        // Of more rows than are wanted.
        let beyond = self.numbers::<T>(5, columns * (rows + 3));
        let columns_of = Packed::of_columns::<S>(rows, rows + 3, &beyond);
        let wanted = Packed::new::<S>(rows, columns, |r, c| beyond[c * (rows + 3) + r]);
        assert_eq!(columns_of.data, wanted.data);
        for start in [&start[..], &[]] {
            // What was there is written over.
            let mut out = vec![T::splat(s, T::of(7.0)); rows * V];
            let layer = Layer::<T, S, V> {
                weights: &packed,
                start,
                x: &x,
                out: &mut out,
            };
            enter(s, layer);
            let (x, out) = (scalars::<T, S>(&x), scalars::<T, S>(&out));
            for r in 0..rows {
                for b in 0..batch {
                    let mut exact = start.get(r).map_or(0.0, |x| x.to_f64());
                    let mut size = exact.abs();
                    for c in 0..columns {
                        let term = weights[r * columns + c].to_f64() * x[c * batch + b].to_f64();
                        exact += term;
                        size += term.abs();
                    }
                    let error = (out[r * batch + b].to_f64() - exact).abs();
                    assert!(error <= (columns + 2) as f64 * unit * size, "{error:e}");
                }
            }
        }
        self.gradients::<T, S, V>(s, unit);
    }

    #[inline(always)]
    fn gradients<T: Element, S: Simd, const V: usize>(self, s: S, unit: f64) {
        let (outputs, inputs) = (self.rows, self.columns);
        let batch = V * T::lanes::<S>();
        let across = padded::<T, S>(outputs);
        let tiles = |features: usize, from: usize| -> Vec<Vec<T::Vector<S>>> {
            let tile = |p| vectors::<T, S>(&self.numbers::<T>(from + 11 * p, features * batch));
            (0..self.pairs).map(tile).collect()
        };
        let (xs, gs) = (tiles(inputs, 1), tiles(across, 5));
        let pairs = xs.iter().zip(&gs).map(|(x, g)| Pair { x, g });
        let window: Vec<_> = pairs.collect();
        let lanes = T::lanes::<S>();
        let mut wide = vec![T::zeros::<S>(); inputs * across / lanes];
        let outer = Outer::<T, S, V> {
            inputs,
            outputs: across,
            window: &window,
            transposed: &mut vec![T::zeros::<S>(); outer_room::<T, S, V>(self.pairs)],
            sums: &mut wide,
        };
        enter(s, outer);
        let mut thin = vec![T::zeros::<S>(); inputs * outputs];
        // Twice: what is there is added to.
        for _ in 0..2 {
            let dot = Dot::<T, S, V> {
                inputs,
                outputs,
                window: &window,
                sums: &mut thin,
            };
            enter(s, dot);
        }
        let mut biases = vec![T::zeros::<S>(); outputs];
        add_rows::<T, S, V>(s, &window, &mut biases);
        let mut transposed = vec![T::default(); outputs * inputs];
        let turn = Transpose::<T, S> {
            rows: inputs,
            columns: outputs,
            from: &wide[..inputs * padded::<T, S>(outputs) / lanes],
            to: &mut transposed,
        };
        enter(s, turn);
        let at = |tile: &[T::Vector<S>], i: usize, b: usize| -> f64 {
            scalars::<T, S>(tile)[i * batch + b].to_f64()
        };
        let terms = (self.pairs * batch) as f64;
        for (o, bias) in biases.iter().enumerate() {
            let all = || (0..self.pairs).flat_map(|p| (0..batch).map(move |b| (p, b)));
            for i in 0..inputs {
                let terms_of = all().map(|(p, b)| at(&xs[p], i, b) * at(&gs[p], o, b));
                let (exact, size) = terms_of.fold((0.0, 0.0), |(e, s), t| (e + t, s + t.abs()));
                let thin = T::total(s, thin[o * inputs + i]) * T::of(0.5);
                for got in [transposed[o * inputs + i], thin] {
                    let error = (got.to_f64() - exact).abs();
                    assert!(error <= terms * unit * size, "{error:e}");
                }
            }
            let terms_of = all().map(|(p, b)| at(&gs[p], o, b));
            let (exact, size) = terms_of.fold((0.0, 0.0), |(e, s), t| (e + t, s + t.abs()));
            let error = (T::total(s, *bias).to_f64() - exact).abs();
            assert!(error <= terms * unit * size, "{error:e}");
        }
    }
}

impl Check for Products<'_> {
    #[inline(always)]
    fn check<S: Simd>(self, s: S) {
        self.of::<f32, S, 1>(s);
        self.of::<f32, S, 2>(s);
        self.of::<f64, S, 1>(s);
        self.of::<f64, S, 2>(s);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]

    #[test]
    fn products_are_sums_in_f64_rounded(
        rows in 1usize..40, columns in 0usize..40, pairs in 1usize..4,
        numbers in prop::collection::vec(-2f64..2.0, 97),
    ) {
        everywhere(Products { rows, columns, pairs, numbers: &numbers });
    }
}

/// c − ab.
#[derive(Clone, Copy)]
struct Less;

impl Less {
    #[inline(always)]
    fn of<T: Element, S: Simd>(s: S, unit: f64) {
        let numbers = |phase: f64| -> Vec<T> {
            let at = |i: usize| (i as f64 * 0.37 + phase).sin();
            (0..96).map(|i| T::of(at(i))).collect()
        };
        let all = [0.0, 1.0, 2.0].map(numbers);
        let [a, b, c] = [0, 1, 2].map(|i| vectors::<T, S>(&all[i]));
        for i in 0..a.len() {
            let less = [T::fnmadd(s, a[i], b[i], c[i])];
            let from = i * T::lanes::<S>();
            for (i, less) in (from..96).zip(scalars::<T, S>(&less)) {
                let [a, b, c] = [0, 1, 2].map(|n| all[n][i].to_f64());
                let (exact, size) = (c - a * b, (a * b).abs() + c.abs());
                let error = (less.to_f64() - exact).abs();
                assert!(error <= 2.0 * unit * size, "{error:e}");
            }
        }
    }
}

impl Check for Less {
    #[inline(always)]
    fn check<S: Simd>(self, s: S) {
        Self::of::<f32, S>(s, 2f64.powi(-24));
        Self::of::<f64, S>(s, 2f64.powi(-53));
    }
}

#[test]
fn a_product_is_taken_off_to_two_roundings() {
    everywhere(Less);
}

/// Factors by place.
struct Factors<'a, X>(&'a [X]);

impl<T: Element, S: Simd> Epilogue<T, S> for Factors<'_, T::Vector<S>> {
    #[inline(always)]
    fn store<const R: usize, const V: usize>(
        &self,
        s: S,
        at: usize,
        sums: [[T::Vector<S>; V]; R],
        out: &mut [[T::Vector<S>; V]; R],
    ) {
        let factors = &self.0[at..];
        for ((out, sum), factor) in out
            .iter_mut()
            .flatten()
            .zip(sums.iter().flatten())
            .zip(factors)
        {
            *out = T::times(s, *sum, *factor);
        }
    }
}

/// Of more columns than are near at a time, and weights that are asked for.
#[derive(Clone, Copy)]
struct InPlace;

impl InPlace {
    #[inline(always)]
    fn of<T: Element, S: Simd, const V: usize>(s: S) {
        let (rows, lanes) = (31, T::lanes::<S>());
        let columns = 2 * NEAR / (V * size_of::<T::Vector<S>>()) + 7;
        assert!(rows * columns * size_of::<T>() > FAR);
        let numbers = |n: usize| -> Vec<T> {
            let at = |i: usize| (i as f64 * 0.37).sin();
            (0..n).map(|i| T::of(at(i))).collect()
        };
        let weights = Packed::of_rows(s, rows, columns, &numbers(rows * columns));
        let start = numbers(rows);
        let x = vectors::<T, S>(&numbers(columns * V * lanes));
        let factors = vectors::<T, S>(&numbers(rows * V * lanes));
        let mut outs = [(); 3].map(|()| vec![T::zeros::<S>(); rows * V]);
        let [plain, with_epilogue, bent] = &mut outs;
        let layer = |out| Layer::<T, S, V> {
            weights: &weights,
            start: &start,
            x: &x,
            out,
        };
        enter(s, layer(plain));
        let product = layer(with_epilogue);
        let epilogue = Factors(&factors);
        enter(s, WithEpilogue { product, epilogue });
        let product = layer(bent);
        let epilogue = Tanh;
        enter(s, WithEpilogue { product, epilogue });
        for (i, x) in plain.iter().enumerate() {
            let expected = [T::times(s, *x, factors[i]), T::tanh(s, *x)];
            let got = [with_epilogue[i], bent[i]];
            assert_eq!(scalars::<T, S>(&expected), scalars::<T, S>(&got));
        }
    }
}

impl Check for InPlace {
    #[inline(always)]
    fn check<S: Simd>(self, s: S) {
        Self::of::<f32, S, 1>(s);
        Self::of::<f32, S, 2>(s);
        Self::of::<f64, S, 1>(s);
    }
}

#[test]
fn products_are_finished_once_each_in_its_place() {
    everywhere(InPlace);
}

#[derive(Clone, Copy)]
struct Lines;

impl Lines {
    fn of<T: Element, S: Simd>() {
        // From small pieces of the heap to pages; a vector may be a part of a line.
        for n in [0, 1, 3, 70, (1 << 20) + 1] {
            let vectors = super::vectors::<T, S>(n);
            assert_eq!(vectors.len(), n);
            let mut numbers = scalars::<T, S>(&vectors).iter();
            assert!(numbers.all(|x| *x == T::default()));
            assert_eq!(vectors.as_ptr().align_offset(64), 0);
        }
    }
}

impl Check for Lines {
    #[inline(always)]
    fn check<S: Simd>(self, _: S) {
        Self::of::<f32, S>();
        Self::of::<f64, S>();
    }
}

#[test]
fn vectors_are_zeros_from_the_beginning_of_a_line_on() {
    everywhere(Lines);
}

/// Rows 3 and on of a product of matrices of `rows` × `inner` and `inner` × `columns`.
#[derive(Clone, Copy)]
struct Product<'a> {
    rows: usize,
    inner: usize,
    columns: usize,
    transposed: [bool; 2],
    numbers: &'a [f64],
}

impl Product<'_> {
    fn of<T: Element, S: Simd>(self, s: S, unit: f64) {
        let Self {
            rows,
            inner,
            columns,
            ..
        } = self;
        let at = |i: usize| T::of(self.numbers[i % self.numbers.len()]);
        let a: Vec<T> = (0..rows * inner).map(at).collect();
        let b: Vec<T> = (0..inner * columns).map(|i| at(3 * i + 5)).collect();
        // Every third product has no start.
        let start: Vec<T> = (0..columns).map(|i| at(7 * i + 1)).collect();
        let start = if rows % 3 == 0 { vec![] } else { start };
        let matrix = |data, rows, columns, transposed| match transposed {
            true => Matrix::new(data, columns, rows).t(),
            false => Matrix::new(data, rows, columns),
        };
        let [a_turned, b_turned] = self.transposed;
        let first = rows.min(3) - 1;
        // What is there before does not matter.
        let mut out = vec![T::of(f64::NAN); (rows - first) * columns];
        let piece = RowBlock {
            a: matrix(&a, rows, inner, a_turned),
            b: matrix(&b, inner, columns, b_turned),
            start: &start,
            first,
            out: &mut out,
        };
        piece.with_simd(s);
        let of =
            |data: &[T], (i, j): (usize, usize), (rows, columns): (usize, usize), transposed| {
                let at = if transposed {
                    j * rows + i
                } else {
                    i * columns + j
                };
                data[at].to_f64()
            };
        for (i, out) in out.chunks_exact(columns).enumerate() {
            for (j, got) in out.iter().enumerate() {
                let begin = start.get(j).map_or(0.0, |x| x.to_f64());
                let (mut exact, mut size) = (begin, begin.abs());
                for k in 0..inner {
                    let x = of(&a, (first + i, k), (rows, inner), a_turned)
                        * of(&b, (k, j), (inner, columns), b_turned);
                    (exact, size) = (exact + x, size + x.abs());
                }
                let error = (got.to_f64() - exact).abs();
                assert!(error <= (inner + 2) as f64 * unit * size, "{error:e}");
            }
        }
    }
}

impl Check for Product<'_> {
    #[inline(always)]
    fn check<S: Simd>(self, s: S) {
        self.of::<f32, S>(s, 2f64.powi(-24));
        self.of::<f64, S>(s, 2f64.powi(-53));
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn products_of_matrices_are_sums_in_f64_rounded(
        rows in 1usize..30, inner in 0usize..600, columns in 1usize..70,
        a in any::<bool>(), b in any::<bool>(), numbers in prop::collection::vec(-2f64..2.0, 97),
    ) {
        everywhere(Product { rows, inner, columns, transposed: [a, b], numbers: &numbers });
    }
}

#[derive(Clone, Copy)]
struct Tiles;

impl Check for Tiles {
    fn check<S: Simd>(self, _: S) {
        let (features, batch) = (5, 2 * f32::lanes::<S>());
        for count in 1..=batch {
            let rows: Vec<f32> = (0..count * features).map(|i| i as f32 + 1.0).collect();
            for idle in [Idle::Copies, Idle::Zeros] {
                // What was there is written over.
                let mut tile = vec![f32::NAN; features * batch];
                load(&rows, features, batch, idle, &mut tile);
                for i in 0..features {
                    for b in 0..batch {
                        let row = rows.chunks_exact(features).nth(b.min(count - 1)).unwrap();
                        let expected = match idle {
                            Idle::Zeros if b >= count => 0.0,
                            _ => row[i],
                        };
                        assert_eq!(tile[i * batch + b], expected);
                    }
                }
                let mut back = vec![0.0; rows.len()];
                store(&tile, features, batch, &mut back);
                assert_eq!(back, rows);
            }
        }
    }
}

#[test]
fn a_tile_holds_rows_in_its_lanes_and_copies_or_zeros_in_the_others() {
    everywhere(Tiles);
}

#[cfg(target_arch = "x86_64")]
#[test]
fn blocks_of_less_than_four_rows_have_the_same_rows_on_every_unit() {
    fn small<S: Simd>(rows: usize) -> Vec<(usize, usize)> {
        let (mut first, mut small) = (0, vec![]);
        while first < rows {
            let height = super::product::block::<f32, S>(rows, first);
            if height < 4 {
                small.push((first, height));
            }
            first += height;
        }
        assert_eq!(first, rows);
        small
    }
    for rows in 0..100 {
        let [a, b] = [small::<pulp::x86::V3>(rows), small::<pulp::x86::V4>(rows)];
        assert_eq!(a, b, "{rows}");
    }
}
