//! Mixed precision: errors of the order of the unit roundoff of compute precision, flat in the
//! number of steps.

use std::sync::{Arc, Mutex};

use candle_core::{DType, Device, Tensor, Var};
use candle_diffeq::fields::FieldCheck;
use candle_diffeq::metrics::Recorder;
use candle_diffeq::options::{Arithmetic, Output, Steps};
use candle_diffeq::scaling::{LossScaler, Scaling, Stepped};
use candle_diffeq::tableau::{DOPRI5, EULER, RK4};
use candle_diffeq::{odeint, solution, NeuralOde, OdeOptions, Precision, Time};

#[path = "../examples/precision/studies.rs"]
#[allow(dead_code)]
mod studies;

use candle_nn::Optimizer;
use common::problem;

/// Unit roundoff of f16 and bf16.
const U_F16: f64 = 1.0 / 2048.0;
const U_BF16: f64 = 1.0 / 256.0;

fn model_equation_is_flat(precision: Precision, bound: f64) {
    let (mut few, mut many) = (0f64, 0f64);
    for steps in [32, 64, 128, 256, 512, 1024, 2048, 8192] {
        let e = studies::model_equation(precision, steps).unwrap();
        let worst = e.state.max(e.y0).max(e.theta);
        assert!(worst <= bound, "N = {steps}: {e:?}");
        if steps >= 1024 {
            many = many.max(worst);
        } else {
            few = few.max(worst);
        }
    }
    assert!(
        many <= 2.0 * few,
        "errors grow with N: {few:e}, then {many:e}"
    );
}

#[test]
fn f16_model_equation_error_does_not_grow_with_the_number_of_steps() {
    model_equation_is_flat(Precision::f16(), 0.6 * U_F16);
}

#[test]
fn bf16_model_equation_error_does_not_grow_with_the_number_of_steps() {
    model_equation_is_flat(Precision::bf16(), 0.6 * U_BF16);
}

#[test]
fn storing_in_compute_precision_costs_no_more_than_one_rounding() {
    for (precision, unit) in [
        (Precision::f16().store(DType::F16), U_F16),
        (Precision::bf16().store(DType::BF16), U_BF16),
    ] {
        for steps in [32, 512] {
            let e = studies::model_equation(precision, steps).unwrap();
            assert!(e.theta <= unit, "N = {steps}: {e:?}");
        }
    }
}

#[test]
fn short_steps_do_not_stagnate_where_a_low_precision_tape_does() {
    let (e, _) = studies::stagnation(Precision::bf16(), 2000).unwrap();
    assert!(e.state <= 3e-4 && e.y0 <= 3e-4 && e.theta <= 1e-3, "{e:?}");
    let tape = studies::naive(DType::BF16, 200).unwrap();
    assert!(
        tape.state > 100.0 * e.state && tape.theta > 100.0 * e.theta,
        "{tape:?}"
    );
}

#[test]
fn scaling_saves_the_f16_gradients_of_the_polynomial_problem() {
    for error in studies::polynomial(Precision::f16()).unwrap() {
        assert!(error <= 2e-3, "{error:e}");
    }
}

#[test]
fn the_scaler_wastes_no_pull_back_on_a_smooth_field() {
    let (per_stage, stats) = studies::scaler_waste().unwrap();
    assert!(per_stage <= 1.02, "{stats:?}");
    assert_eq!(stats.evaluations, 4 * 128);
    assert_eq!(stats.recomputed, 4 * 128);
}

/// Evaluations of a field, as (time, bits of the velocity).
type Log = Arc<Mutex<Vec<(u64, Vec<u64>)>>>;

fn logged(log: Log) -> impl Fn(&Time, &Tensor) -> candle_core::Result<Tensor> + Send + Sync {
    let w = candle_core::Var::new(&[[0.3f32, -1.7], [1.1, 0.2]], &Device::Cpu).unwrap();
    move |t: &Time, y: &Tensor| {
        let w = w.as_tensor().to_dtype(y.dtype())?;
        let rate = (t.tensor()?.cos()? + 1.5)?.to_dtype(y.dtype())?;
        let k = y.matmul(&w)?.tanh()?.broadcast_mul(&rate)?;
        let bits = problem::values(&k)?.into_iter().map(f64::to_bits).collect();
        log.lock().unwrap().push((t.value().to_bits(), bits));
        Ok(k)
    }
}

#[test]
fn recomputed_velocities_are_the_forward_ones_bit_for_bit() {
    let native = |p: Precision| p.arithmetic(Arithmetic::Native);
    for precision in [
        Precision::f32(),
        Precision::f16(),
        Precision::bf16(),
        native(Precision::f16()),
        native(Precision::bf16()),
        Precision::new(DType::F64, DType::F32),
        Precision::f32().compensated(),
        Precision::bf16().compensated(),
    ] {
        for method in [RK4, DOPRI5] {
            let log = Log::default();
            let y0 = candle_core::Var::new(&[[0.4f32, -0.3], [1.3, 0.7]], &Device::Cpu).unwrap();
            let options = OdeOptions {
                method,
                precision: Some(precision),
                steps: Steps::PerInterval(7),
                output: Output::Final,
                check: FieldCheck::Never,
                ..Default::default()
            };
            let y = odeint(logged(log.clone()), y0.as_tensor(), &[0.0, 0.9], &options).unwrap();
            let forward = std::mem::take(&mut *log.lock().unwrap());
            y.sum_all().unwrap().backward().unwrap();
            let backward = std::mem::take(&mut *log.lock().unwrap());
            // The backward pass takes the steps from last to first, the stages of each in order.
            let stages = forward.len() / 7;
            let again: Vec<_> = backward.chunks(stages).rev().flatten().cloned().collect();
            assert_eq!(forward, again, "{precision:?}");
        }
    }
}

#[test]
fn states_come_back_in_state_precision() {
    let y0 = Tensor::new(&[1.2345678f32], &Device::Cpu).unwrap();
    for precision in [Precision::f16(), Precision::bf16()] {
        let options = OdeOptions {
            precision: Some(precision),
            ..Default::default()
        };
        let ys = odeint(|_: &Time, y: &Tensor| y.neg(), &y0, &[0.0, 1e-3], &options).unwrap();
        assert_eq!(ys.dtype(), DType::F32);
        let ys = ys.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        assert_eq!(ys[0], 1.2345678);
        // A step far below the spacing of f16 at y still moves y.
        let exact = 1.2345678 * (-1e-3f64).exp();
        assert!((f64::from(ys[1]) - exact).abs() < 1e-3 * U_BF16 * exact);
    }
}

#[test]
fn the_dtype_of_y0_decides_when_nothing_is_said() {
    for (dtype, state, seen) in [
        (DType::F64, DType::F64, DType::F64),
        (DType::F32, DType::F32, DType::F32),
        (DType::BF16, DType::F32, DType::F32),
        (DType::F16, DType::F32, DType::F32),
    ] {
        let y0 = Tensor::ones(3, dtype, &Device::Cpu).unwrap();
        let field = move |_: &Time, y: &Tensor| {
            assert_eq!(y.dtype(), seen);
            y.neg()
        };
        let y = odeint(field, &y0, &[0.0, 1.0], &OdeOptions::default()).unwrap();
        assert_eq!(y.dtype(), state);
    }
}

#[test]
fn native_arithmetic_gives_the_field_its_compute_dtype_and_agrees_with_rounding() {
    let y0 = Tensor::new(&[[0.4f32, -0.3], [1.3, 0.7]], &Device::Cpu).unwrap();
    for (precision, dtype, unit) in [
        (Precision::f16(), DType::F16, U_F16),
        (Precision::bf16(), DType::BF16, U_BF16),
    ] {
        let run = |precision: Precision, seen: DType| {
            let field = move |_: &Time, y: &Tensor| {
                assert_eq!(y.dtype(), seen);
                y.tanh()?.neg()
            };
            let options = OdeOptions {
                precision: Some(precision),
                steps: Steps::PerInterval(10),
                output: Output::Final,
                ..Default::default()
            };
            let y = solution(&field, &y0, &[0.0, 1.0], &options).unwrap();
            problem::values(y.states()).unwrap()
        };
        let native = run(precision.arithmetic(Arithmetic::Native), dtype);
        let rounded = run(precision, DType::F32);
        assert!(problem::relative(&native, &rounded) <= unit);
    }
}

#[test]
fn a_leaf_may_have_a_precision_of_its_own() {
    let z = Tensor::ones((3, 2), DType::F32, &Device::Cpu).unwrap();
    let logp = Tensor::zeros(3, DType::F32, &Device::Cpu).unwrap();
    let native = Precision::bf16().arithmetic(Arithmetic::Native);
    let options = OdeOptions {
        method: EULER,
        precision: Some(native),
        leaf_precision: vec![native, Precision::f32()],
        ..Default::default()
    };
    let field = |_: &Time, (z, logp): &(Tensor, Tensor)| {
        assert_eq!((z.dtype(), logp.dtype()), (DType::BF16, DType::F32));
        Ok((z.neg()?, z.to_dtype(DType::F32)?.sum(1)?))
    };
    let (zs, logps) = odeint(field, &(z, logp), &[0.0, 1.0], &options).unwrap();
    assert_eq!((zs.dims(), logps.dims()), (&[2, 3, 2][..], &[2, 3][..]));
    assert_eq!((zs.dtype(), logps.dtype()), (DType::F32, DType::F32));
}

#[test]
fn parameters_follow_the_narrowest_leaf_where_no_precision_is_given() {
    let native = |p: Precision| p.arithmetic(Arithmetic::Native);
    for (each, seen) in [
        ([Precision::f32(), native(Precision::bf16())], DType::BF16),
        ([native(Precision::f16()), Precision::f32()], DType::F16),
        ([Precision::f32(), Precision::f32()], DType::F32),
    ] {
        let vars = candle_nn::VarMap::new();
        let build = move |vb: candle_nn::VarBuilder<'_>| {
            let rate = vb.get_with_hints(2, "rate", candle_nn::Init::Const(0.5))?;
            Ok(move |_: &Time, (a, b): &(Tensor, Tensor)| {
                // One of the two leaves is of the parameters' dtype.
                let k = |y: &Tensor| match y.dtype() == seen {
                    true => y.broadcast_mul(&rate),
                    false => y.neg(),
                };
                Ok((k(a)?, k(b)?))
            })
        };
        let ode = NeuralOde::from_field(&vars, "ode", DType::F32, &Device::Cpu, build).unwrap();
        let ode = ode.options(OdeOptions {
            leaf_precision: each.to_vec(),
            ..Default::default()
        });
        let y0 = Tensor::ones((3, 2), DType::F32, &Device::Cpu).unwrap();
        let (a, b) = ode.solve(&(y0.clone(), y0), &[0.0, 1.0]).unwrap();
        let grads = (a + b).and_then(|x| x.sum_all()?.backward()).unwrap();
        let rate = vars.all_vars().remove(0);
        assert_eq!(grads.get(&rate).unwrap().dtype(), DType::F32);
    }
}

#[test]
fn a_leaf_in_f16_whose_adjoint_starts_at_zero_gets_its_gradient_from_the_others() {
    // L = 1e-9 q(T), q' = Σ z²: far below f16 when it reaches z.
    let gradient = |precision: [Precision; 2], dtype: DType| {
        let z = Tensor::new(&[0.7f64, -0.4, 1.1], &Device::Cpu).unwrap();
        let z = z.to_dtype(dtype).unwrap();
        let q = Tensor::zeros(1, dtype, &Device::Cpu).unwrap();
        let options = OdeOptions {
            leaf_precision: precision.to_vec(),
            steps: Steps::PerInterval(4),
            output: Output::Final,
            ..Default::default()
        };
        let field = |_: &Time, (z, q): &(Tensor, Tensor)| {
            Ok((z.neg()?, z.sqr()?.sum_keepdim(0)?.to_dtype(q.dtype())?))
        };
        let solution = solution(&field, &(z.clone(), q.clone()), &[0.0, 1.0], &options).unwrap();
        let seeds = (
            z.zeros_like().unwrap(),
            (q.ones_like().unwrap() * 1e-9).unwrap(),
        );
        problem::values(&solution.vjp(&seeds).unwrap().y0.0).unwrap()
    };
    let exact = gradient([Precision::f64(), Precision::f64()], DType::F64);
    for arithmetic in [Arithmetic::Rounded, Arithmetic::Native] {
        let low = Precision::f16().arithmetic(arithmetic);
        let got = gradient([low, Precision::f32()], DType::F32);
        assert!(problem::relative(&got, &exact) <= 2.0 * U_F16, "{got:?}");
    }
}

#[test]
fn a_scale_is_reported_where_cotangents_are_scaled_and_nowhere_else() {
    let range = |precision, scaling| {
        let recorder = Recorder::default();
        let options = OdeOptions {
            precision: Some(precision),
            scaling,
            recorder: Some(recorder.clone()),
            ..Default::default()
        };
        let y0 = Var::new(&[1f32], &Device::Cpu).unwrap();
        let field = |_: &Time, y: &Tensor| y.neg();
        let ys = odeint(field, y0.as_tensor(), &[0.0, 1.0], &options).unwrap();
        ys.sum_all().unwrap().backward().unwrap();
        recorder.take().scale_range
    };
    for precision in [Precision::f32(), Precision::bf16()] {
        assert_eq!(range(precision, Scaling::Auto), None);
    }
    assert_eq!(range(Precision::f16(), Scaling::Off), None);
    assert_eq!(
        range(Precision::f32(), Scaling::Fixed(8.0)),
        Some((8.0, 8.0))
    );
    assert_eq!(
        range(Precision::f32(), Scaling::Fixed(1.0)),
        Some((1.0, 1.0))
    );
    assert!(range(Precision::f16(), Scaling::Auto).is_some_and(|(min, _)| min > 1.0));
}

#[test]
fn a_tracing_recorder_keeps_the_scales_of_a_falling_adjoint_and_a_plain_one_does_not() {
    let scales = |recorder: Recorder| {
        let options = OdeOptions {
            precision: Some(Precision::f16()),
            steps: Steps::PerInterval(64),
            recorder: Some(recorder.clone()),
            ..Default::default()
        };
        let y0 = Var::new(&[1f32], &Device::Cpu).unwrap();
        // λ(0) = e⁻⁸, so that S has eleven binades to rise.
        let field = |_: &Time, y: &Tensor| y * -8.0;
        let ys = odeint(field, y0.as_tensor(), &[0.0, 1.0], &options).unwrap();
        ys.get(1).unwrap().sum_all().unwrap().backward().unwrap();
        let stats = recorder.take();
        assert!(recorder.take().scales.is_empty());
        (stats.scales, stats.scale_range.unwrap())
    };
    let (trace, range) = scales(Recorder::tracing());
    assert_eq!(trace.len(), 12, "{trace:?}");
    assert_eq!((trace[0].1, trace[11].1), range);
    for pair in trace.windows(2) {
        assert!(pair[1].0 < pair[0].0 && pair[1].1 == 2.0 * pair[0].1);
    }
    assert!(scales(Recorder::default()).0.is_empty());
}

#[test]
fn a_loss_scaler_divides_in_f32_whatever_the_gradient_is_and_leaves_it_there() {
    for dtype in [DType::F16, DType::BF16, DType::F32] {
        let w = Tensor::ones(2, dtype, &Device::Cpu).unwrap();
        let w = Var::from_tensor(&w).unwrap();
        let mut grads = candle_core::backprop::GradStore::default();
        grads.insert(&w, (w.as_detached_tensor() * 1024.0).unwrap());
        // 2^−26 is nothing in f16, and neither is 2^−30.
        let scaler = LossScaler::new(2f64.powi(40)).unwrap();
        assert!(scaler
            .unscale(&mut grads, std::slice::from_ref(&w))
            .unwrap());
        let grad = grads.get(&w).unwrap();
        assert_eq!(grad.dtype(), DType::F32);
        assert_eq!(problem::values(grad).unwrap(), [2f64.powi(-30); 2]);
    }
}

#[test]
fn a_loss_scaler_steps_variables_of_every_dtype() {
    for dtype in [DType::F16, DType::BF16, DType::F32, DType::F64] {
        let w = Tensor::ones(2, dtype, &Device::Cpu).unwrap();
        let w = Var::from_tensor(&w).unwrap();
        let mut sgd = candle_nn::SGD::new(vec![w.clone()], 0.25).unwrap();
        let mut scaler = LossScaler::new(1024.0).unwrap();
        let loss = w.as_tensor().sqr().unwrap().sum_all().unwrap();
        let step = scaler.backward_step(&loss, std::slice::from_ref(&w), &mut sgd);
        assert_eq!(step.unwrap(), Stepped::Taken);
        assert_eq!(
            (w.dtype(), problem::values(&w).unwrap()),
            (dtype, vec![0.5; 2])
        );
    }
}

#[test]
fn a_loss_scaler_steps_by_gradients_of_f64_that_f32_does_not_hold() {
    let w = Var::new(&[1f64, 2.0], &Device::Cpu).unwrap();
    let mut sgd = candle_nn::SGD::new(vec![w.clone()], 2f64.powi(-500)).unwrap();
    let mut scaler = LossScaler::new(1024.0).unwrap();
    let mut step = |size: f64| {
        let loss = (w.sum_all().unwrap() * size).unwrap();
        let step = scaler.backward_step(&loss, std::slice::from_ref(&w), &mut sgd);
        (step.unwrap(), problem::values(&w).unwrap())
    };
    let taken = (Stepped::Taken, vec![0.0, 1.0]);
    assert_eq!(step(2f64.powi(500)), taken);
    // With the scale it is more than f64 holds.
    let skipped = (Stepped::Skipped, taken.1);
    assert_eq!(step(2f64.powi(1020)), skipped);
}
