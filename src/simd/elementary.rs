//! Elementary functions of f32 vectors, a few unit roundoffs each; the f64 twins by scalars.
//!
//! Polynomials are near-minimax fits of our own on the reduced interval (discrete least squares at
//! Chebyshev nodes, Lawson's weights).

use pulp::Simd;

use super::Element;

/// Σ c_i x^i, by Horner's rule.
#[inline(always)]
fn polynomial<S: Simd, const N: usize>(s: S, x: S::f32s, c: [f32; N]) -> S::f32s {
    let mut sum = s.splat_f32s(c[N - 1]);
    for i in (0..N - 1).rev() {
        sum = s.mul_add_e_f32s(sum, x, s.splat_f32s(c[i]));
    }
    sum
}

/// The same by Horner's rule in x² over pairs of terms, whose products need not wait for each other: faster where the
/// sum is the longest chain of a function.
#[inline(always)]
fn polynomial_by_pairs<S: Simd, const N: usize>(s: S, x: S::f32s, c: [f32; N]) -> S::f32s {
    let square = s.mul_f32s(x, x);
    let (pairs, last) = c.as_chunks::<2>();
    let mut sum = match last {
        [c] => s.splat_f32s(*c),
        _ => s.splat_f32s(0.0),
    };
    for [even, odd] in pairs.iter().rev() {
        let pair = s.mul_add_e_f32s(s.splat_f32s(*odd), x, s.splat_f32s(*even));
        sum = s.mul_add_e_f32s(sum, square, pair);
    }
    sum
}

/// x, but not below `low`; a NaN stays one.
#[inline(always)]
pub(super) fn at_least<S: Simd>(s: S, low: f32, x: S::f32s) -> S::f32s {
    // Vector units give the second operand, or NaN, if either is NaN; Rust's scalar `max` does not.
    let max = s.max_f32s(s.splat_f32s(low), x);
    if S::IS_SCALAR {
        return keep_nan(s, x, max);
    }
    max
}

/// x, but not above `high`; a NaN stays one.
#[inline(always)]
pub(super) fn at_most<S: Simd>(s: S, high: f32, x: S::f32s) -> S::f32s {
    let min = s.min_f32s(s.splat_f32s(high), x);
    if S::IS_SCALAR {
        return keep_nan(s, x, min);
    }
    min
}

/// p / q for q between 1 and 10⁴, to 2 unit roundoffs.
#[inline(always)]
fn quotient<S: Simd>(s: S, p: S::f32s, q: S::f32s) -> S::f32s {
    #[cfg(target_arch = "x86_64")]
    if let Some(v4) = (&s as &dyn std::any::Any).downcast_ref::<pulp::x86::V4>() {
        // An approximate reciprocal and one Newton step take a third of the time of a division.
        let r = bytemuck::cast(v4.avx512f._mm512_rcp14_ps(bytemuck::cast(q)));
        let y = s.mul_f32s(p, r);
        let error = s.negate_mul_add_e_f32s(q, y, p);
        return s.mul_add_e_f32s(error, r, y);
    }
    s.div_f32s(p, q)
}

/// tanh x = x P(x²) / Q(x²), exactly ±1 in f32 beyond 9.02.
#[inline(always)]
pub(super) fn tanh<S: Simd>(s: S, x: S::f32s) -> S::f32s {
    let x = at_least(s, -9.02, at_most(s, 9.02, x));
    let t = s.mul_f32s(x, x);
    let p = [
        1.0,
        0.133_797_3,
        3.494_048_5e-3,
        2.058_369_3e-5,
        1.331_933_6e-8,
    ];
    let q = [
        1.0,
        0.467_130_45,
        2.587_112_8e-2,
        3.283_115e-4,
        7.762_133_7e-7,
    ];
    let p = s.mul_f32s(polynomial(s, t, p), x);
    quotient(s, p, polynomial(s, t, q))
}

/// ½ + ½ tanh(x/2) for positive x, and for negative x exp(x) / (1 + exp(x)), which keeps the digits
/// of the tail.
#[inline(always)]
pub(super) fn sigmoid<S: Simd>(s: S, x: S::f32s) -> S::f32s {
    let e = exp_of_minus(s, minus_abs(s, x));
    let one = s.splat_f32s(1.0);
    let positive = s.greater_than_f32s(x, s.splat_f32s(0.0));
    // NaN is not positive, and e carries it.
    quotient(s, s.select_f32s(positive, one, e), s.add_f32s(one, e))
}

/// −|x|.
#[inline(always)]
fn minus_abs<S: Simd>(s: S, x: S::f32s) -> S::f32s {
    s.or_f32s(x, s.splat_f32s(-0.0))
}

/// 1.5 · 2²³: adding it leaves the nearest integer in the low bits.
const INTEGER: f32 = 12_582_912.0;

/// exp x for x ≤ 0; below −87 it stays at exp(−87) = 1.6e-38.
#[inline(always)]
fn exp_of_minus<S: Simd>(s: S, given: S::f32s) -> S::f32s {
    let x = at_least(s, -87.0, given);
    let shifted = s.mul_add_e_f32s(
        x,
        s.splat_f32s(std::f32::consts::LOG2_E),
        s.splat_f32s(INTEGER),
    );
    let n = s.sub_f32s(shifted, s.splat_f32s(INTEGER));
    // x − n ln 2, with ln 2 in two parts.
    let r = s.mul_add_e_f32s(n, s.splat_f32s(-0.693_115_23), x);
    let r = s.mul_add_e_f32s(n, s.splat_f32s(-3.194_618_5e-5), r);
    let c = [
        1.0,
        1.0,
        0.499_999_93,
        0.166_665_15,
        4.166_845_7e-2,
        8.369_419e-3,
        1.381_314_2e-3,
    ];
    let power = s.wrapping_dyn_shl_u32s(s.transmute_u32s_f32s(shifted), s.splat_u32s(23));
    let scaled = s.add_u32s(s.transmute_u32s_f32s(polynomial_by_pairs(s, r, c)), power);
    keep_nan(s, given, s.transmute_f32s_u32s(scaled))
}

/// exp x, by 1 / exp(−x) where x is positive; between exp(−87) and exp 87.
#[inline(always)]
pub(super) fn exp<S: Simd>(s: S, x: S::f32s) -> S::f32s {
    let (e, one) = (exp_of_minus(s, minus_abs(s, x)), s.splat_f32s(1.0));
    let positive = s.greater_than_f32s(x, s.splat_f32s(0.0));
    s.select_f32s(positive, s.div_f32s(one, e), e)
}

/// ln(1 + exp x) = max(x, 0) + ln(1 + e), e = exp(−|x|), by ln(1 + e) = e P(e); and its derivative, the sigmoid.
#[inline(always)]
pub(super) fn softplus<S: Simd>(s: S, x: S::f32s) -> [S::f32s; 2] {
    let e = exp_of_minus(s, minus_abs(s, x));
    let one = s.splat_f32s(1.0);
    let c = [
        1.0,
        -0.499_996_48,
        0.333_213_24,
        -0.248_571_63,
        0.191_536_55,
        -0.137_538_03,
        7.920_454e-2,
        -3.006_579_2e-2,
        5.364_824_6e-3,
    ];
    let value = s.mul_add_e_f32s(e, polynomial_by_pairs(s, e, c), at_least(s, 0.0, x));
    let positive = s.greater_than_f32s(x, s.splat_f32s(0.0));
    let slope = quotient(s, s.select_f32s(positive, one, e), s.add_f32s(one, e));
    [value, slope]
}

/// For |x| up to 10⁴: Φ(x) = ½ erfc(−x/√2) with erfc z = t P(t) exp(−z²), t = 1 / (1 + 0.4 z), z ≥ 0, and Φ(−x) =
/// 1 − Φ(x); Φ'(x) = exp(−x²/2) / √(2π).
#[inline(always)]
pub(super) fn normal<S: Simd>(s: S, x: S::f32s) -> [S::f32s; 2] {
    let one = s.splat_f32s(1.0);
    let z = s.mul_f32s(s.abs_f32s(x), s.splat_f32s(std::f32::consts::FRAC_1_SQRT_2));
    let t = quotient(s, one, s.mul_add_e_f32s(z, s.splat_f32s(0.4), one));
    let c = [
        0.225_634_24,
        0.226_443,
        0.201_888_49,
        0.193_389_54,
        7.976_541e-2,
        8.795_103_5e-2,
        8.399_922e-2,
        -0.140_325_13,
        4.125_427_4e-2,
    ];
    let e = exp_of_minus(s, s.mul_f32s(s.mul_f32s(x, x), s.splat_f32s(-0.5)));
    let tail = s.mul_f32s(s.mul_f32s(t, polynomial_by_pairs(s, t, c)), e);
    let tail = s.mul_f32s(tail, s.splat_f32s(0.5));
    let positive = s.greater_than_f32s(x, s.splat_f32s(0.0));
    let value = s.select_f32s(positive, s.sub_f32s(one, tail), tail);
    [value, s.mul_f32s(e, s.splat_f32s(0.398_942_3))]
}

/// Beyond this, the reduction by multiples of π loses digits.
const FAR: f32 = 8192.0;

/// sin x and cos x; a lane does not depend on the others.
#[inline(always)]
pub(super) fn sin_cos<S: Simd>(s: S, x: S::f32s) -> [S::f32s; 2] {
    let reduced = sin_cos_near(s, x);
    // Lanes that are not known to be near, NaN among them, which a maximum may lose.
    let near = s.less_than_or_equal_f32s(s.abs_f32s(x), s.splat_f32s(FAR));
    let far = s.select_f32s(near, s.splat_f32s(0.0), s.splat_f32s(1.0));
    if s.reduce_max_f32s(far) > 0.0 {
        let exact = [f32::map::<S>(x, f32::sin), f32::map::<S>(x, f32::cos)];
        return [0, 1].map(|i| s.select_f32s(near, reduced[i], exact[i]));
    }
    reduced
}

/// The same where |x| ≤ [`FAR`]: x = nπ + r, |r| ≤ π/2, both with the sign (−1)ⁿ.
#[inline(always)]
fn sin_cos_near<S: Simd>(s: S, x: S::f32s) -> [S::f32s; 2] {
    let inverse = s.splat_f32s(std::f32::consts::FRAC_1_PI);
    let shifted = s.mul_add_e_f32s(x, inverse, s.splat_f32s(INTEGER));
    let n = s.sub_f32s(shifted, s.splat_f32s(INTEGER));
    // π in three parts, the first two exact in products with n.
    let r = s.mul_add_e_f32s(n, s.splat_f32s(-3.140_625), x);
    let r = s.mul_add_e_f32s(n, s.splat_f32s(-9.675_026e-4), r);
    let r = s.mul_add_e_f32s(n, s.splat_f32s(-1.509_958e-7), r);
    let sign = s.wrapping_dyn_shl_u32s(s.transmute_u32s_f32s(shifted), s.splat_u32s(31));
    let t = s.mul_f32s(r, r);
    let sin = [
        1.0,
        -0.166_666_6,
        8.333_05e-3,
        -1.980_830_6e-4,
        2.602_776_4e-6,
    ];
    let cos = [
        1.0,
        -0.5,
        4.166_665_5e-2,
        -1.388_855e-3,
        2.476_801_5e-5,
        -2.616_707_8e-7,
    ];
    let sin = s.transmute_u32s_f32s(s.mul_f32s(r, polynomial(s, t, sin)));
    let cos = s.transmute_u32s_f32s(polynomial(s, t, cos));
    [
        s.transmute_f32s_u32s(s.xor_u32s(sin, sign)),
        s.transmute_f32s_u32s(s.xor_u32s(cos, sign)),
    ]
}

/// To bf16, to nearest even.
#[inline(always)]
pub(super) fn round_bf16<S: Simd>(s: S, x: S::f32s) -> S::f32s {
    let bits = s.transmute_u32s_f32s(x);
    let odd = s.and_u32s(
        s.wrapping_dyn_shr_u32s(bits, s.splat_u32s(16)),
        s.splat_u32s(1),
    );
    let rounded = s.add_u32s(bits, s.add_u32s(odd, s.splat_u32s(0x7fff)));
    let rounded = s.transmute_f32s_u32s(s.and_u32s(rounded, s.splat_u32s(0xffff_0000)));
    keep_nan(s, x, rounded)
}

/// To f16, to nearest even, with its subnormals and its overflow at 65520.
#[inline(always)]
pub(super) fn round_f16<S: Simd>(s: S, x: S::f32s) -> S::f32s {
    let sign = s.and_f32s(x, s.splat_f32s(-0.0));
    let size = s.abs_f32s(x);
    let bits = s.transmute_u32s_f32s(size);
    let odd = s.and_u32s(
        s.wrapping_dyn_shr_u32s(bits, s.splat_u32s(13)),
        s.splat_u32s(1),
    );
    let rounded = s.add_u32s(bits, s.add_u32s(odd, s.splat_u32s(0xfff)));
    let normal = s.transmute_f32s_u32s(s.and_u32s(rounded, s.splat_u32s(0xffff_e000)));
    // Below 2⁻¹⁴ the spacing is 2⁻²⁴, which is the spacing of f32 at 0.75.
    let ulp = s.splat_f32s(0.75);
    let subnormal = s.sub_f32s(s.add_f32s(size, ulp), ulp);
    let small = s.less_than_f32s(size, s.splat_f32s(6.103_515_6e-5));
    let large = s.less_than_f32s(size, s.splat_f32s(65520.0));
    let finite = s.select_f32s(small, subnormal, normal);
    let rounded = s.select_f32s(large, finite, s.splat_f32s(f32::INFINITY));
    keep_nan(s, x, s.or_f32s(rounded, sign))
}

/// `rounded`, but for NaN, which integer arithmetic may have carried into something else.
#[inline(always)]
fn keep_nan<S: Simd>(s: S, x: S::f32s, rounded: S::f32s) -> S::f32s {
    s.select_f32s(s.equal_f32s(x, x), rounded, x)
}

pub(crate) fn sigmoid_f64(x: f64) -> f64 {
    let e = (-x.abs()).exp();
    (if x > 0.0 { 1.0 } else { e }) / (1.0 + e)
}

pub(super) fn normal_f64(x: f64) -> f64 {
    0.5 * candle_core::cpu::erf::erfc_f64(-x * std::f64::consts::FRAC_1_SQRT_2)
}

pub(super) fn normal_density_f64(x: f64) -> f64 {
    const ROOT_OF_TAU: f64 = 2.506_628_274_631_000_5;
    (-0.5 * x * x).exp() / ROOT_OF_TAU
}
