//! Standard normal numbers from random words, to bits that do not depend on the machine.
//!
//! The method is that of Box and Muller: of two uniform numbers u in (0, 1) and v in [0, 1), (cos 2πv, sin 2πv)·√(−2 ln u)
//! are two independent normal numbers.  The C library's logarithm and sine differ from machine to machine, so those here
//! are series in additions, subtractions, products, quotients and square roots of f64, each rounded to nearest as IEEE 754
//! prescribes.  Rust contracts no product with a sum, so every machine, thread and vector unit gets the same bits.  The
//! series are accurate to 4 units of roundoff.

/// 1.5 · 2⁵²: added to a small number it leaves the nearest integer in the last bits of the mantissa.
const INTEGER: f64 = 6_755_399_441_055_744.0;

/// The bits of 2⁵².
const TWO_52: u64 = 0x4330_0000_0000_0000;

/// The mantissa of an f64.
const MANTISSA: u64 = (1 << 52) - 1;

/// Coefficients of z, z², … in 2 artanh(s)/s − 2, z = s²: 2/3, 2/5, ….
const ARTANH: [f64; 11] = {
    let mut c = [0.0; 11];
    let mut k = 0;
    while k < c.len() {
        c[k] = 2.0 / (2 * k + 3) as f64;
        k += 1;
    }
    c
};

/// Coefficients of z, z², … in sin(x)/x − 1, z = x²: −1/3!, 1/5!, ….
const SIN: [f64; 9] = factorials(2.0);

/// The same of cos(x) − 1: −1/2!, 1/4!, ….
const COS: [f64; 9] = factorials(1.0);

/// ∓1/(2k + n)!, with alternating signs; n is one or two.
const fn factorials(mut n: f64) -> [f64; 9] {
    let (mut c, mut factorial, mut k) = ([0.0; 9], n, 0);
    while k < c.len() {
        factorial *= -(n + 1.0) * if k == 0 { 1.0 } else { n };
        c[k] = 1.0 / factorial;
        n += 2.0;
        k += 1;
    }
    c
}

/// c_0 + c_1 z + c_2 z² + ….
#[inline(always)]
fn horner<const N: usize>(c: &[f64; N], z: f64) -> f64 {
    let mut sum = c[N - 1];
    for k in (0..N - 1).rev() {
        sum = sum * z + c[k];
    }
    sum
}

/// ln u of a normal, positive number: u = 2ᵉ m with √½ ≤ m < √2, and ln m = 2 artanh((m − 1)/(m + 1)).
#[inline(always)]
fn ln(u: f64) -> f64 {
    let bits = u.to_bits();
    let upper = f64::from_bits(bits & MANTISSA | 1f64.to_bits());
    let is_large = upper > std::f64::consts::SQRT_2;
    let m = if is_large { 0.5 * upper } else { upper };
    let bias = if is_large { 1022.0 } else { 1023.0 };
    let e = f64::from_bits(bits >> 52 | TWO_52) - (f64::from_bits(TWO_52) + bias);
    let s = (m - 1.0) / (m + 1.0);
    let z = s * s;
    e * std::f64::consts::LN_2 + (2.0 * s + s * (z * horner(&ARTANH, z)))
}

/// cos 2πv and sin 2πv, 0 ≤ v < 1: of the distance to the nearest quarter of a turn, and turned by quarters.
#[inline(always)]
fn on_circle(v: f64) -> [f64; 2] {
    let turned = 4.0 * v + INTEGER;
    let quarter = turned.to_bits();
    let x = (4.0 * v - (turned - INTEGER)) * std::f64::consts::FRAC_PI_2;
    let z = x * x;
    let (sin, cos) = (x + x * (z * horner(&SIN, z)), 1.0 + z * horner(&COS, z));
    let (a, b) = if quarter & 1 == 0 {
        (cos, sin)
    } else {
        (sin, cos)
    };
    let a = if (quarter + 1) & 2 == 0 { a } else { -a };
    let b = if quarter & 2 == 0 { b } else { -b };
    [a, b]
}

/// A number k 2⁻⁵² in [0, 1) of the upper 52 of 64 bits.
#[inline(always)]
fn uniform(high: u32, low: u32) -> f64 {
    let bits = u64::from(high) << 32 | u64::from(low);
    f64::from_bits(bits >> 12 | 1f64.to_bits()) - 1.0
}

/// Two independent standard normal numbers of four random words, for each lane.
#[inline(always)]
pub(super) fn pairs<const L: usize>(words: &[[u32; L]; 4]) -> [[f64; L]; 2] {
    let (mut first, mut second) = ([0.0; L], [0.0; L]);
    for l in 0..L {
        // In the middle between two of the numbers, so that it is neither zero nor one.
        let u = uniform(words[0][l], words[1][l]) + 0.5 * f64::EPSILON;
        let v = uniform(words[2][l], words[3][l]);
        let radius = (-2.0 * ln(u)).sqrt();
        let [cos, sin] = on_circle(v);
        first[l] = radius * cos;
        second[l] = radius * sin;
    }
    [first, second]
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Points that fill (0, 1), and some near its ends.
    fn points() -> impl Iterator<Item = f64> {
        let inside = (1..100_000).map(|i| f64::from(i) / 100_000.0);
        let near = (1..54).flat_map(|k| [0.5f64.powi(k), 1.0 - 0.5f64.powi(k)]);
        inside.chain(near).filter(|u| *u < 1.0)
    }

    #[test]
    fn the_logarithm_is_accurate_to_four_units_of_roundoff() {
        for u in points() {
            let exact = u.ln();
            assert!(
                (ln(u) - exact).abs() <= 4.0 * 0.5 * f64::EPSILON * exact.abs(),
                "{u:e}"
            );
        }
    }

    #[test]
    fn cosine_and_sine_are_accurate_to_four_units_of_roundoff() {
        for v in points().chain([0.0, 0.25, 0.5, 0.75]) {
            let [cos, sin] = on_circle(v);
            // 2πv as the library is given it is rounded, too.
            let angle = std::f64::consts::TAU * v;
            let bound = (4.0 + angle) * 0.5 * f64::EPSILON;
            assert!((cos - angle.cos()).abs() <= bound, "cos of {v}");
            assert!((sin - angle.sin()).abs() <= bound, "sin of {v}");
        }
    }

    #[test]
    fn the_bits_are_these_on_every_machine() {
        let words = [
            [0x243f_6a88, 0],
            [0x85a3_08d3, 0],
            [0x1319_8a2e, u32::MAX],
            [0x0370_7344, u32::MAX],
        ];
        let [first, second] = pairs(&words);
        let bits = [first[0], second[0], first[1], second[1]].map(f64::to_bits);
        // Computed by the same formulas in Python.
        let known = [
            0x3ffc_3933_0fb1_bc66,
            0x3fec_961f_5e82_8b21,
            0x4021_24b2_800e_da48,
            0xbd0a_edbf_e239_4204,
        ];
        assert_eq!(bits, known);
    }
}
