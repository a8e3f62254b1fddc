//! The activations and their derivatives, by formulas of their own, in f64.

use candle_diffeq::nn::Activation;

/// A few roundoffs of what a vector unit makes of an activation: the bounds that the crate proves are below
/// four; compositions in candle's operations take a few more.
const ROUNDOFFS: f64 = 12.0;

/// σ, σ' or σ'' at x.
pub(crate) fn derivative(activation: Activation, order: usize, x: f64) -> f64 {
    let logistic = |x: f64| match x >= 0.0 {
        true => 1.0 / (1.0 + (-x).exp()),
        false => x.exp() / (1.0 + x.exp()),
    };
    let s = logistic(x);
    let ds = s * logistic(-x);
    match (activation, order) {
        (Activation::Tanh, 0) => x.tanh(),
        (Activation::Tanh, 1) => x.cosh().recip().powi(2),
        (Activation::Tanh, _) => -2.0 * x.tanh() * x.cosh().recip().powi(2),
        (Activation::Sigmoid, 0) => s,
        (Activation::Sigmoid, 1) => ds,
        (Activation::Sigmoid, _) => ds * (1.0 - 2.0 * s),
        (Activation::Softplus, 0) => x.max(0.0) + (-x.abs()).exp().ln_1p(),
        (Activation::Softplus, 1) => s,
        (Activation::Softplus, _) => ds,
        (Activation::Relu, 0) => x.max(0.0),
        (Activation::Relu, 1) => f64::from(u8::from(x > 0.0)),
        (Activation::Relu, _) => 0.0,
        (Activation::Silu, 0) => x * s,
        (Activation::Silu, 1) => s + x * ds,
        (Activation::Silu, _) => ds * (2.0 + x * (1.0 - 2.0 * s)),
        (Activation::Gelu, 0) => x * normal(x),
        (Activation::Gelu, 1) => normal(x) + x * density(x),
        (Activation::Gelu, _) => density(x) * (2.0 - x * x),
        (Activation::Sin, 0) => x.sin(),
        (Activation::Sin, 1) => x.cos(),
        (Activation::Sin, _) => -x.sin(),
        (Activation::LogTwoCosh, 0) => x.abs() + (-2.0 * x.abs()).exp().ln_1p(),
        (Activation::LogTwoCosh, 1) => x.tanh(),
        (Activation::LogTwoCosh, _) => x.cosh().recip().powi(2),
    }
}

/// Bounds of |σ'|, |σ''| and |σ'''|.
pub(crate) fn largest(activation: Activation, order: usize) -> f64 {
    let [first, second, third] = match activation {
        Activation::Tanh => [1.0, 0.77, 2.0],
        Activation::Sigmoid => [0.25, 0.1, 0.125],
        Activation::Softplus => [1.0, 0.25, 0.1],
        Activation::Relu => [1.0, 0.0, 0.0],
        Activation::Silu => [1.1, 0.5, 0.6],
        Activation::Gelu => [1.13, 0.8, 1.0],
        Activation::Sin => [1.0, 1.0, 1.0],
        Activation::LogTwoCosh => [1.0, 1.0, 0.77],
    };
    [0.0, first, second, third][order]
}

/// The derivative of an order ≤ 2 at x ± e, with a bound, in arithmetic of unit roundoff u.
pub(crate) fn at(
    activation: Activation,
    order: usize,
    (x, e): (f64, f64),
    unit: f64,
) -> (f64, f64) {
    let value = derivative(activation, order, x);
    if activation == Activation::Relu && order > 0 {
        // A kink within reach: either slope may have been taken.
        let either = order == 1 && x.abs() <= e;
        return (value, f64::from(u8::from(either)));
    }
    let slope = match order {
        2 => largest(activation, 3),
        _ => {
            let here = derivative(activation, order + 1, x).abs();
            let bend = largest(activation, order + 2).max(here);
            // A kink of relu bends within e: its slope is one at most.
            let reached = match activation {
                Activation::Relu => 1.0,
                _ => here + bend * e,
            };
            reached.min(largest(activation, order + 1).max(here))
        }
    };
    let exact = activation == Activation::Relu;
    let unit = if exact { 0.0 } else { ROUNDOFFS * unit };
    (value, slope * e + unit * x.abs().max(1.0))
}

/// Φ.
fn normal(x: f64) -> f64 {
    0.5 * (1.0 + erf(x * std::f64::consts::FRAC_1_SQRT_2))
}

/// φ.
fn density(x: f64) -> f64 {
    (-0.5 * x * x).exp() / (2.0 * std::f64::consts::PI).sqrt()
}

/// 2/√π exp(−x²) Σ 2ⁿ x²ⁿ⁺¹ / (2n + 1)!!, all terms of one sign (Abramowitz & Stegun 7.1.6).
fn erf(x: f64) -> f64 {
    if x.abs() > 6.0 {
        return x.signum();
    }
    let (mut term, mut sum, mut n) = (x, 0.0, 0.0);
    while term != 0.0 && sum + term != sum {
        sum += term;
        n += 1.0;
        term *= 2.0 * x * x / (2.0 * n + 1.0);
    }
    std::f64::consts::FRAC_2_SQRT_PI * (-x * x).exp() * sum
}
