//! How long a step may be in a stiff field.
//!
//! A component that decays with rate λ is multiplied by R(−hλ) in a step of length h, where R is the stability function of
//! the method.  If |R| > 1, a small difference from the decayed solution grows; the error estimate limits this growth,
//! but only once the difference is as large as the tolerance.  The cotangents of the discrete adjoint are multiplied by
//! the same factor, and nothing limits them.  So steps are limited by an estimate of the largest rate.
//!
//! Let Σ d_i = 0.  The difference of the stages Δ = Σ d_i Y_i and that of their velocities, Σ d_i k_i, have the ratio λ in
//! the direction of Δ, which is mostly that of the fastest components (E. Hairer, G. Wanner, "Solving Ordinary
//! Differential Equations II", §IV.2, where it detects stiffness).

use crate::tableau::Tableau;

/// How stable a method is, and the difference of its stages that shows how stiff a field is.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Stability {
    /// The largest x for which |R(−z)| ≤ 1 for all z in [0, x].
    pub(crate) interval: f64,
    /// Σ_i d_i a_ij: the weights of Δ / h.
    pub(crate) states: Vec<f64>,
    /// d.
    pub(crate) velocities: Vec<f64>,
}

impl Stability {
    /// Of a method; nothing if its stages show no rate, or if it is not stable for any.
    pub(crate) fn of(method: &Tableau) -> Option<Self> {
        let stages = method.stages();
        let velocities = difference(method.c())?;
        let row = |i: usize| (0..stages).map(move |j| method.a(i).get(j).copied().unwrap_or(0.0));
        let mut states = vec![0.0; stages];
        for (i, d) in velocities.iter().enumerate().filter(|(_, d)| **d != 0.0) {
            for (sum, a) in states.iter_mut().zip(row(i)) {
                *sum += d * a;
            }
        }
        let interval = interval(method)?;
        let shows = states.iter().any(|weight| *weight != 0.0);
        shows.then_some(Self {
            interval,
            states,
            velocities,
        })
    }
}

/// Weights of stages with these nodes whose sum is zero, so that the time and the smooth part of the solution fall out:
/// those of the difference of two stages at one node or, without such a pair, of the highest divided difference.
fn difference(c: &[f64]) -> Option<Vec<f64>> {
    let pairs = (0..c.len()).flat_map(|j| (0..j).map(move |i| (i, j)));
    let mut weights = vec![0.0; c.len()];
    if let Some((i, j)) = pairs.rev().find(|&(i, j)| c[i] == c[j]) {
        (weights[i], weights[j]) = (-1.0, 1.0);
        return Some(weights);
    }
    if c.len() < 3 {
        return None;
    }
    for (i, weight) in weights.iter_mut().enumerate() {
        let others = c.iter().enumerate().filter(|(j, _)| *j != i);
        *weight = others.map(|(_, other)| 1.0 / (c[i] - other)).product();
    }
    let largest = weights.iter().fold(0.0f64, |a, b| a.max(b.abs()));
    let scaled: Vec<_> = weights.iter().map(|weight| weight / largest).collect();
    scaled
        .iter()
        .all(|weight| weight.is_finite())
        .then_some(scaled)
}

/// The largest x for which |R(−z)| ≤ 1 for all z in [0, x], where R(z) = 1 + Σ zⁿ bᵀ Aⁿ⁻¹ 1.
fn interval(method: &Tableau) -> Option<f64> {
    let stages = method.stages();
    let mut powers = vec![1.0; stages];
    let mut coefficients = vec![1.0];
    for _ in 0..stages {
        coefficients.push(method.b().iter().zip(&powers).map(|(b, x)| b * x).sum());
        powers = (0..stages)
            .map(|i| method.a(i).iter().zip(&powers).map(|(a, x)| a * x).sum())
            .collect();
    }
    let is_stable = |x: f64| {
        let value = coefficients.iter().rev().fold(0.0, |sum, c| c - x * sum);
        value.abs() <= 1.0 + 1e-9
    };
    // No explicit method is stable beyond 2 s².
    const PARTS: usize = 64;
    let end = 2 * stages * stages * PARTS;
    let at = |n: usize| n as f64 / PARTS as f64;
    let first = (1..=end).find(|n| !is_stable(at(*n)))?;
    let (mut low, mut high) = (at(first - 1), at(first));
    for _ in 0..50 {
        let middle = (low + high) / 2.0;
        match is_stable(middle) {
            true => low = middle,
            false => high = middle,
        }
    }
    (low > 0.0).then_some(low)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tableau::{BOSH3, DOPRI5, DOPRI8, FEHLBERG45, TSIT5};

    #[test]
    fn intervals_are_those_of_the_literature() {
        for (method, known) in [(BOSH3, 2.5127), (DOPRI5, 3.3066), (FEHLBERG45, 3.6777)] {
            let found = Stability::of(&method).unwrap().interval;
            assert!((found - known).abs() < 1e-4, "{}: {found}", method.name());
        }
    }

    #[test]
    fn the_ratio_of_differences_is_the_rate_of_a_linear_field() {
        const RATE: f64 = -7.0;
        const H: f64 = 0.3;
        for method in [BOSH3, DOPRI5, TSIT5, FEHLBERG45, DOPRI8] {
            let stability = Stability::of(&method).unwrap();
            let mut ks = vec![];
            for i in 0..method.stages() {
                let sum: f64 = method.a(i).iter().zip(&ks).map(|(a, k)| a * k).sum();
                ks.push(RATE * (1.0 + H * sum));
            }
            let weigh = |weights: &[f64]| weights.iter().zip(&ks).map(|(d, k)| d * k).sum::<f64>();
            let ratio = weigh(&stability.velocities) / (H * weigh(&stability.states));
            assert!(
                (ratio / RATE - 1.0).abs() < 1e-11,
                "{}: {ratio}",
                method.name()
            );
        }
    }
}
