//! Gauss rules: ∫_0^1 g(x) dx ≈ Σ w_i g(x_i), exact for polynomials of degree 2n − 1.

/// Points and weights of the rule of n points, ascending (P. J. Davis, P. Rabinowitz, "Methods of numerical integration",
/// §2.7): the zeros of the Legendre polynomial P_n, by Newton's method.
pub(super) fn gauss(n: usize) -> Vec<(f64, f64)> {
    let rule = |i: usize| {
        let mut z = -(std::f64::consts::PI * (i as f64 + 0.75) / (n as f64 + 0.5)).cos();
        for _ in 0..NEWTON {
            let (p, slope) = legendre(n, z);
            z -= p / slope;
        }
        let (_, slope) = legendre(n, z);
        let weight = 1.0 / ((1.0 - z * z) * slope * slope);
        (0.5 * (1.0 + z), weight)
    };
    (0..n).map(rule).collect()
}

/// Iterations, which double the digits of a start that has two.
const NEWTON: usize = 6;

/// P_n(z) and its derivative.
fn legendre(n: usize, z: f64) -> (f64, f64) {
    let (mut p, mut before) = (1.0, 0.0);
    for j in 0..n {
        let j = j as f64;
        let next = ((2.0 * j + 1.0) * z * p - j * before) / (j + 1.0);
        (p, before) = (next, p);
    }
    (p, n as f64 * (z * p - before) / (z * z - 1.0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rule_of_n_points_is_exact_to_degree_2n_minus_1_and_no_further() {
        for n in 1..=16 {
            let rule = gauss(n);
            let integral =
                |d: usize| -> f64 { rule.iter().map(|(x, w)| w * x.powi(d as i32)).sum() };
            for d in 0..2 * n {
                let error = (integral(d) - 1.0 / (d + 1) as f64).abs();
                assert!(
                    error <= 16.0 * f64::EPSILON,
                    "{n} points, degree {d}: {error:e}"
                );
            }
            if n <= 8 {
                let d = 2 * n;
                assert!((integral(d) - 1.0 / (d + 1) as f64).abs() > 1e-12, "{n}");
            }
            assert!(rule.windows(2).all(|w| w[0].0 < w[1].0));
        }
    }
}
