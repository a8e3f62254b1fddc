//! Every method converges with its order, on a problem whose field depends on time.

#[path = "../src/every_core.rs"]
mod every_core;

use candle_core::{Device, Tensor, D};
use candle_diffeq::options::{Output, Steps};
use candle_diffeq::tableau::{
    Tableau, BOSH3, DOPRI5, DOPRI8, EULER, FEHLBERG45, HEUN, MIDPOINT, RALSTON, RK3, RK4, RK4_38,
    SSP_RK3, TSIT5,
};
use candle_diffeq::{solution, OdeOptions, Time};

/// An oscillator whose frequency swings: y1' = ω(t) y2, y2' = −ω(t) y1, ω = 2 + sin t.  On it the
/// leading error terms of all methods are far above roundoff (those of dopri5 and tsit5 nearly
/// vanish on many problems).
fn field(t: &Time, y: &Tensor) -> candle_core::Result<Tensor> {
    let omega = 2.0 + t.value().sin();
    let (y1, y2) = (y.narrow(D::Minus1, 0, 1)?, y.narrow(D::Minus1, 1, 1)?);
    Tensor::cat(&[(y2 * omega)?, (y1 * -omega)?], D::Minus1)
}

/// Several states, so that no leading error term cancels by accident.
const Y0: [[f64; 2]; 3] = [[0.5, -0.4], [0.9, 0.3], [-0.6, 0.8]];

fn solved(method: &Tableau, steps: usize, end: f64) -> Vec<f64> {
    let y0 = Tensor::new(&Y0, &Device::Cpu).unwrap();
    let options = OdeOptions {
        method: method.clone(),
        steps: Steps::PerInterval(steps),
        output: Output::Final,
        ..Default::default()
    };
    let solution = solution(&field, &y0, &[0.0, end], &options).unwrap();
    solution.states().flatten_all().unwrap().to_vec1().unwrap()
}

/// A rotation by φ(t) = ∫ω = 2t + 1 − cos t.
fn exact(t: f64) -> Vec<f64> {
    let (sin, cos) = (2.0 * t + 1.0 - t.cos()).sin_cos();
    let rotate = |[y1, y2]: [f64; 2]| [cos * y1 + sin * y2, cos * y2 - sin * y1];
    Y0.into_iter().flat_map(rotate).collect()
}

fn error(method: &Tableau, steps: usize, end: f64, exact: &[f64]) -> f64 {
    let y = solved(method, steps, end);
    y.iter()
        .zip(exact)
        .map(|(a, b)| (a - b).powi(2))
        .sum::<f64>()
        .sqrt()
}

#[test]
fn every_method_has_its_order() {
    for (method, steps) in [
        (EULER, 4096),
        (MIDPOINT, 512),
        (HEUN, 512),
        (RALSTON, 512),
        (RK3, 512),
        (SSP_RK3, 512),
        (BOSH3, 512),
        (RK4, 256),
        (RK4_38, 256),
        (FEHLBERG45, 64),
        (DOPRI5, 64),
        (TSIT5, 128),
        (DOPRI8, 16),
    ] {
        for end in [3.0, -3.0] {
            let exact = exact(end);
            let (coarse, fine) = (
                error(&method, steps, end, &exact),
                error(&method, 2 * steps, end, &exact),
            );
            let order = (coarse / fine).log2();
            let stated = method.order() as f64;
            assert!(
                (order - stated).abs() <= 0.1,
                "{}: {order:.3} instead of {stated} towards {end} ({coarse:e}, {fine:e})",
                method.name()
            );
        }
    }
}
