//! A stage at a jump of the field is evaluated on the side on which its step lies, wherever the jump is.
//!
//! `cargo test --test jumps`, seconds.

mod common;

use candle_core::{DType, Device, Result, Tensor, Var};
use candle_diffeq::metrics::Recorder;
use candle_diffeq::options::{Adaptive, AdjointSolve, Gradient, Steps};
use candle_diffeq::sde::{sdeint, stratonovich, BrownianTree, Noise, SdeOptions, HEUN};
use candle_diffeq::tableau::{Tableau, BOSH3, DOPRI5, RK4};
use candle_diffeq::{odeint, predict, OdeOptions, Time, VectorField};
use common::{values, U_F32, U_F64};

/// y' = before · y until the jump, and after · y from there on.
#[derive(Clone, Copy)]
struct Switch {
    at: f64,
    before: f64,
    after: f64,
    /// Whether the field itself says where it jumps.
    says: bool,
}

impl Switch {
    fn rate(&self, t: &Time) -> f64 {
        match t.value() < self.at {
            true => self.before,
            false => self.after,
        }
    }

    /// What y grows by from one time to another.
    fn growth(&self, [from, to]: [f64; 2]) -> f64 {
        let (low, high) = (from.min(to), from.max(to));
        let before = (self.at.clamp(low, high) - low) * self.before;
        let after = (high - self.at.clamp(low, high)) * self.after;
        ((before + after) * (to - from).signum()).exp()
    }
}

impl VectorField for Switch {
    fn velocity(&self, t: &Time, y: &Tensor) -> Result<Tensor> {
        y * self.rate(t)
    }

    fn jumps(&self) -> Vec<f64> {
        match self.says {
            true => vec![self.at],
            false => vec![],
        }
    }
}

/// y at the end and dy/dy0, which are the same for y0 = 1.
fn solved(field: Switch, times: &[f64], options: &OdeOptions) -> [f64; 2] {
    let y0 = Var::new(&[1f64], &Device::Cpu).unwrap();
    let ys = odeint(field, y0.as_tensor(), times, options).unwrap();
    let y = ys.get(times.len() - 1).unwrap();
    let grads = y.sum_all().unwrap().backward().unwrap();
    [values(&y)[0], values(grads.get(&y0).unwrap())[0]]
}

fn adaptive(method: Tableau, jump_t: Vec<f64>) -> OdeOptions {
    OdeOptions {
        method,
        steps: Steps::Adaptive(Adaptive::new(1e-11, 1e-11).jump_t(jump_t)),
        ..Default::default()
    }
}

#[test]
fn a_jump_at_an_end_or_inside_is_met_from_the_side_of_the_step_in_both_directions() {
    // Steep on the side that no step lies on, so that one stage there would be seen.
    for at in [0.0, 0.4, 1.0] {
        for times in [[0.0, 1.0], [1.0, 0.0]] {
            let steep = |side: f64| if at == side { 1e3 } else { 0.7 };
            for says in [true, false] {
                let field = Switch {
                    at,
                    before: steep(0.0),
                    after: if at == 1.0 { 1e3 } else { -0.3 },
                    says,
                };
                let exact = field.growth(times);
                for method in [DOPRI5, BOSH3] {
                    let jumps = if says { vec![] } else { vec![at] };
                    let name = method.name().to_owned();
                    let [y, slope] = solved(field, &times, &adaptive(method, jumps));
                    assert!((y - exact).abs() <= 1e-8, "{name} {at} {times:?}: {y}");
                    // Of a linear field the two are one number.
                    let error = (slope - y).abs() / y.abs();
                    assert!(error <= 1e3 * U_F64, "{name} {at} {times:?}: {error:e}");
                }
            }
        }
    }
}

#[test]
fn a_jump_that_differs_from_a_time_by_rounding_is_at_that_time() {
    let [one, other] = [0.3, 0.1 + 0.2];
    assert!(one != other);
    for (at, node) in [(one, other), (other, one)] {
        let field = Switch {
            at,
            before: 0.0,
            after: 1e3,
            says: true,
        };
        let fixed = OdeOptions {
            method: RK4,
            ..Default::default()
        };
        for options in [fixed, adaptive(DOPRI5, vec![])] {
            let y = solved(field, &[0.0, node], &options);
            assert!((y[0] - 1.0).abs() <= 1e-12 && y[0] == y[1], "{y:?}");
            let back = solved(field, &[0.0, 0.1, node], &options);
            assert!((back[0] - 1.0).abs() <= 1e-12, "{back:?}");
        }
        // The other side begins there.
        let field = Switch {
            before: 1e3,
            after: 0.0,
            ..field
        };
        let y = solved(field, &[node, 1.0], &adaptive(DOPRI5, vec![]));
        assert!((y[0] - 1.0).abs() <= 1e-12, "{y:?}");
    }
}

#[test]
fn a_jump_at_an_end_is_met_from_the_side_of_the_step_with_noise_too() {
    for at in [0.0, 0.4, 1.0] {
        let steep = |is_steep: bool, else_: f64| if is_steep { 1e3 } else { else_ };
        let drift = Switch {
            at,
            before: steep(at == 0.0, 0.7),
            after: steep(at == 1.0, -0.3),
            says: true,
        };
        // Without noise the solution is known.
        let none = |_: &Time, y: &Tensor| y.zeros_like();
        let sde = stratonovich(drift, none).additive();
        let options = SdeOptions {
            method: HEUN,
            steps: Steps::Adaptive(Adaptive::new(1e-5, 1e-5)),
            ..Default::default()
        };
        let y0 = Var::new(&[[1f64]], &Device::Cpu).unwrap();
        let noise = Noise::from(BrownianTree::new(3, 30).unwrap());
        let ys = sdeint(sde, y0.as_tensor(), &[0.0, 1.0], &noise, &options).unwrap();
        let y = ys.get(1).unwrap();
        let grads = y.sum_all().unwrap().backward().unwrap();
        let [y, slope] = [&y, grads.get(&y0).unwrap()].map(|x| values(x)[0]);
        let exact = drift.growth([0.0, 1.0]);
        assert!((y - exact).abs() <= 1e-3, "{at}: {y} {exact}");
        assert!(
            (slope - y).abs() <= 1e3 * U_F64 * y.abs(),
            "{at}: {slope} {y}"
        );
    }
}

#[test]
fn times_that_lie_on_jumps_have_the_gradients_of_the_exact_flow() {
    let field = |says| Switch {
        at: 1.0,
        before: 0.5,
        after: -1.25,
        says,
    };
    let at: Vec<f64> = (0..=512).map(|n| n as f64 / 256.0).collect();
    let fixed = |steps| OdeOptions {
        method: RK4,
        steps,
        ..Default::default()
    };
    let backward = at.iter().rev().copied().collect();
    for (says, options, reversed) in [
        (true, fixed(Steps::PerInterval(256)), None),
        (true, fixed(Steps::Size(1.0 / 256.0)), None),
        (true, fixed(Steps::At(at)), Some(fixed(Steps::At(backward)))),
        (false, adaptive(DOPRI5, vec![1.0]), None),
        (true, adaptive(BOSH3, vec![]), None),
    ] {
        for times in [
            vec![0.0, 1.0, 2.0],
            vec![0.0, 2.0],
            vec![0.0, 0.5, 1.0],
            vec![1.0, 1.5, 2.0],
        ] {
            for is_reversed in [false, true] {
                let times: Vec<f64> = match is_reversed {
                    false => times.clone(),
                    true => times.iter().rev().copied().collect(),
                };
                let ends = [times[0], times[times.len() - 1]];
                let options = match (&options.steps, is_reversed, &reversed) {
                    (Steps::At(_), true, Some(reversed)) => reversed,
                    _ => &options,
                };
                let mut options = options.clone();
                if let Steps::At(at) = &mut options.steps {
                    let [low, high] = [ends[0].min(ends[1]), ends[0].max(ends[1])];
                    at.retain(|t| (low..=high).contains(t));
                }
                let field = field(says);
                let t = Var::new(times.as_slice(), &Device::Cpu).unwrap();
                let y0 = Tensor::new(&[1f64], &Device::Cpu).unwrap();
                let ys = odeint(field, &y0, &t, &options).unwrap();
                let weights: Vec<f64> = (0..times.len()).map(|i| 1.0 + 0.3 * i as f64).collect();
                let of = Tensor::new(weights.as_slice(), &Device::Cpu).unwrap();
                let loss = (ys.squeeze(1).unwrap() * of).unwrap().sum_all().unwrap();
                let got = values(loss.backward().unwrap().get(&t).unwrap());
                // The rate on the side of a time on which another time lies.
                let rate = |t: f64, towards: f64| match 0.5 * (t + towards) < 1.0 {
                    true => field.before,
                    false => field.after,
                };
                let mut exact = vec![0.0; times.len()];
                for (i, weight) in weights.iter().enumerate().skip(1) {
                    let y = weight * field.growth([times[0], times[i]]);
                    exact[0] -= rate(times[0], 0.999 * times[0] + 0.001 * times[i]) * y;
                    exact[i] += rate(times[i], 0.999 * times[i] + 0.001 * times[i - 1]) * y;
                }
                for (got, exact) in got.iter().zip(&exact) {
                    let steps = &options.steps;
                    let error = (got - exact).abs();
                    assert!(error < 1e-8, "{steps:?} {times:?}: {got} {exact}");
                }
            }
        }
    }
}

#[test]
fn the_tensor_of_a_time_in_f32_is_on_the_side_of_the_step_too() {
    for at in [1.0f64, 0.3, 1.0 / 3.0, 0.7] {
        for times in [[0.0f64, 1.6], [1.6, 0.0]] {
            let field = move |t: &Time, y: &Tensor| {
                let is_after = t.tensor()?.ge(at as f32)?.to_dtype(y.dtype())?;
                (y * 0.0)?.broadcast_add(&((is_after * 2.0)? - 0.5)?)
            };
            for method in [DOPRI5, BOSH3] {
                let recorder = Recorder::default();
                let options = OdeOptions {
                    method,
                    steps: Steps::Adaptive(Adaptive::new(1e-6, 1e-6).jump_t([at])),
                    recorder: Some(recorder.clone()),
                    ..Default::default()
                };
                let y0 = Tensor::zeros(1, DType::F32, &Device::Cpu).unwrap();
                let ys = predict(&field, &y0, &times, &options).unwrap();
                let exact = (1.5 * (1.6 - at) - 0.5 * at) * (times[1] - times[0]).signum();
                let error = (values(&ys)[1] - exact).abs();
                assert!(error <= 16.0 * U_F32, "{at} {times:?}: {error:e}");
                assert_eq!(recorder.take().rejected, 0, "{at} {times:?}");
            }
        }
    }
}

#[test]
fn continuous_adjoints_in_f32_take_as_many_evaluations_at_a_jump_as_in_f64() {
    let at = 0.3f64;
    let field = move |t: &Time, y: &Tensor| {
        let is_after = t.tensor()?.ge(at)?.to_dtype(y.dtype())?;
        y.broadcast_mul(&((is_after * 2.0)? - 0.5)?)
    };
    let solve = AdjointSolve::new();
    for gradient in [
        Gradient::Backsolve(solve.clone()),
        Gradient::Interpolated(solve.clone()),
        Gradient::Quadrature(solve),
    ] {
        let of = |dtype| {
            let recorder = Recorder::default();
            let options = OdeOptions {
                method: DOPRI5,
                steps: Steps::Adaptive(Adaptive::new(1e-4, 1e-4).jump_t([at])),
                gradient: gradient.clone(),
                recorder: Some(recorder.clone()),
                ..Default::default()
            };
            let t = Var::new(&[0.0f64, 1.6], &Device::Cpu).unwrap();
            let y0 = Tensor::ones(1, dtype, &Device::Cpu).unwrap();
            let y0 = Var::from_tensor(&y0).unwrap();
            let ys = odeint(field, y0.as_tensor(), &t, &options).unwrap();
            let grads = ys.get(1).unwrap().sum_all().unwrap().backward().unwrap();
            let exact = (1.5 * (1.6 - at) - 0.5 * at).exp();
            let error = values(grads.get(&y0).unwrap())[0] - exact;
            assert!(
                error.abs() < 2e-3 * exact,
                "{gradient:?} {dtype:?}: {error:e}"
            );
            recorder.take().backward.evaluations
        };
        let (single, double) = (of(DType::F32), of(DType::F64));
        assert!(single <= double + 6, "{gradient:?}: {single} {double}");
    }
}
