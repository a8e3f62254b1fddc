//! Compensated sums of the state: rounding errors of the solution and of the gradients do not grow with the number of
//! steps, whatever way a problem is solved by, and every memory plan sees the same numbers.

mod common;

use candle_core::{DType, Device, Module, Tensor, Var};
use candle_diffeq::error::{ContinuousDefect, SdeDefect};
use candle_diffeq::metrics::Recorder;
use candle_diffeq::nn::{Activation, Mlp, RowLoss};
use candle_diffeq::options::{
    Adaptive, AdjointSolve, Checkpoint, Gradient, Output, StepControl, Steps,
};
use candle_diffeq::sde::{self, Noise, SdeOptions};
use candle_diffeq::tableau::{Tableau, BOSH3, DOPRI5, EULER, RK4};
use candle_diffeq::{odeint, Error, NeuralOde, OdeOptions, Precision, Time};
use candle_nn::{VarBuilder, VarMap};
use common::{all, bits, fill, has_tiles, relative, scattered, U_F32, U_F64};

const COMPENSATED: Precision = Precision::f32().compensated();

/// How a problem is solved.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Way {
    /// The whole batch, step by step, in operations over tensors.
    Steps,
    /// Tile by tile.
    Tiles,
    /// The same, with the loss inside.
    LossInTiles,
}

const WAYS: [Way; 3] = [Way::Steps, Way::Tiles, Way::LossInTiles];

/// y(1), and the gradients of y0 and of all parameters, of a perceptron as a field from (40, 3): rows for more than one
/// tile.
fn solve(way: Way, options: &OdeOptions, times: &[f64]) -> Vec<Tensor> {
    let precision = options.precision.unwrap();
    let vars = VarMap::new();
    let build = |vb: VarBuilder<'_>| Mlp::new(&[3, 16, 3], Activation::Tanh, vb);
    let ode = NeuralOde::from_field(&vars, "f", precision.state, &Device::Cpu, build).unwrap();
    fill(&vars);
    let ode = ode.options(OdeOptions {
        fusion: way != Way::Steps,
        ..options.clone()
    });
    let y0 = (scattered(&[40, 3], 1.0, 7) + 1.5).unwrap();
    // The values of f32, so that both dtypes see the same.
    let y0 = y0.to_dtype(DType::F32).unwrap();
    let y0 = Var::from_tensor(&y0.to_dtype(precision.state).unwrap()).unwrap();
    let y = ode.solve(y0.as_tensor(), times).unwrap();
    let goal = scattered(y.dims(), 0.5, 3).to_dtype(DType::F32).unwrap();
    let loss = RowLoss::MeanSquaredError(goal.to_dtype(precision.state).unwrap());
    let value = match way {
        Way::LossInTiles => ode.loss(y0.as_tensor(), times, &loss).unwrap(),
        _ => loss.of(&y).unwrap(),
    };
    let grads = value.backward().unwrap();
    let of = |var: &Var| grads.get(var).unwrap().clone();
    let params = all(&vars).into_iter().map(|(_, var)| of(&var));
    [y.detach(), of(&y0)].into_iter().chain(params).collect()
}

/// The largest relative errors of y, of the gradient of y0, and of those of the parameters.
fn errors(got: &[Tensor], exact: &[Tensor]) -> [f64; 3] {
    let of = |(got, exact): (&Tensor, &Tensor)| relative(&got.to_dtype(DType::F64).unwrap(), exact);
    let each: Vec<_> = got.iter().zip(exact).map(of).collect();
    let worst = each[2..].iter().copied().fold(0.0, f64::max);
    [each[0], each[1], worst]
}

fn options(method: &Tableau, steps: Steps, precision: Precision) -> OdeOptions {
    OdeOptions {
        method: method.clone(),
        steps,
        precision: Some(precision),
        output: Output::Final,
        ..Default::default()
    }
}

#[test]
fn errors_of_rounding_do_not_grow_with_the_number_of_steps() {
    let times = [0.0, 1.0];
    for method in [EULER, RK4] {
        let run = |way, precision, n| {
            let steps = Steps::PerInterval(n);
            solve(way, &options(&method, steps, precision), &times)
        };
        let exact = [64, 4096].map(|n| run(Way::Tiles, Precision::f64(), n));
        for way in WAYS {
            let few = errors(&run(way, COMPENSATED, 64), &exact[0]);
            let [many, plain] = [COMPENSATED, Precision::f32()]
                .map(|precision| errors(&run(way, precision, 4096), &exact[1]));
            for (q, name) in ["y", "y0", "θ"].into_iter().enumerate() {
                let found = || format!("{way:?}, {}, {name}: {few:?}, {many:?}", method.name());
                // What is small is small by chance: 4 u is what one may hope for.
                assert!(many[q] <= 2.0 * few[q].max(2.0 * U_F32), "{}", found());
                assert!(many[q] <= 40.0 * U_F32, "{}", found());
                // Otherwise this test could not fail.
                assert!(plain[q] >= 5.0 * many[q], "{}: {plain:?}", found());
            }
        }
    }
}

#[test]
fn sums_of_parameter_gradients_in_tiles_do_not_drift_in_a_hundred_thousand_steps() {
    if !has_tiles() {
        return;
    }
    // Windows of four steps, and 64 windows in a block: 512 blocks are summed.
    let run = |precision| {
        let options = OdeOptions {
            checkpoint: Checkpoint::Every(256),
            ..options(&EULER, Steps::PerInterval(1 << 17), precision)
        };
        solve(Way::Tiles, &options, &[0.0, 1.0])
    };
    let found = errors(&run(COMPENSATED), &run(Precision::f64()));
    assert!(found.iter().all(|error| *error <= 8.0 * U_F32), "{found:?}");
}

#[test]
fn errors_of_rounding_do_not_grow_with_the_number_of_adaptive_steps() {
    for control in [StepControl::Batch, StepControl::Rows] {
        if control == StepControl::Rows && !has_tiles() {
            continue;
        }
        for method in [BOSH3, DOPRI5] {
            let run = |precision, n: usize| {
                // Every step as long as it may be, so that both precisions take the same.
                let h = 1.0 / n as f64;
                let adaptive = Adaptive::new(1e-1, 1e-1).max_step(h).first_step(h);
                let steps = Steps::Adaptive(adaptive.control(control));
                solve(
                    Way::Tiles,
                    &OdeOptions {
                        output: Output::All,
                        ..options(&method, steps, precision)
                    },
                    &[0.0, 0.437, 0.61, 1.0],
                )
            };
            let few = errors(&run(COMPENSATED, 64), &run(Precision::f64(), 64));
            let exact = run(Precision::f64(), 2048);
            let [many, plain] = [COMPENSATED, Precision::f32()]
                .map(|precision| errors(&run(precision, 2048), &exact));
            for q in 0..3 {
                let found = format!("{control:?}, {}: {few:?}, {many:?}", method.name());
                assert!(many[q] <= 2.0 * few[q].max(2.0 * U_F32), "{found}");
                assert!(plain[q] >= 4.0 * many[q], "{found}, {plain:?}");
            }
        }
    }
}

#[test]
fn every_memory_plan_gives_the_same_bits() {
    let fixed = [EULER, RK4, DOPRI5].map(|method| (method, Steps::PerInterval(9)));
    let adaptive = [BOSH3, DOPRI5].map(|method| {
        let by = |control| Steps::Adaptive(Adaptive::new(1e-5, 1e-6).control(control));
        (method, by(StepControl::Batch), by(StepControl::Rows))
    });
    let mut cases: Vec<_> = fixed.to_vec();
    for (method, batch, rows) in adaptive {
        cases.push((method.clone(), batch));
        if has_tiles() {
            cases.push((method, rows));
        }
    }
    let stores = [
        COMPENSATED,
        Precision::bf16().store(DType::BF16).compensated(),
    ];
    for (method, steps) in cases {
        for precision in stores {
            let by_row = matches!(&steps, Steps::Adaptive(a) if format!("{a:?}").contains("Rows"));
            for way in [Way::Steps, Way::Tiles] {
                if by_row && way == Way::Steps {
                    continue;
                }
                let run = |checkpoint| {
                    let options = OdeOptions {
                        checkpoint,
                        output: Output::All,
                        ..options(&method, steps.clone(), precision)
                    };
                    let solved = solve(way, &options, &[0.0, 0.3, 1.0]);
                    solved.iter().map(bits).collect::<Vec<_>>()
                };
                let reference = run(Checkpoint::All);
                for plan in [
                    Checkpoint::Every(4),
                    Checkpoint::States(3),
                    Checkpoint::Bytes(3000),
                ] {
                    let name = method.name();
                    assert!(
                        run(plan) == reference,
                        "{way:?}, {name}, {steps:?}, {plan:?}"
                    );
                }
            }
        }
    }
}

#[test]
fn a_state_of_several_tensors_is_compensated_as_a_whole() {
    // A rotation and its arc length: the second tensor grows where the first does not.
    let field = |_: &Time, (q, l): &(Tensor, Tensor)| {
        let turned = Tensor::cat(&[&q.narrow(1, 1, 1)?.neg()?, &q.narrow(1, 0, 1)?], 1)?;
        Ok((turned, (l.ones_like()? * 1.3)?))
    };
    let run = |precision: Precision, by_leaf: bool, checkpoint| {
        let q = Var::new(&[[0.6f32, 0.8], [1.0, 0.1]], &Device::Cpu).unwrap();
        let l = Var::new(&[0.25f32, 3.0], &Device::Cpu).unwrap();
        let of = |x: &Var| x.as_tensor().to_dtype(precision.state).unwrap();
        let plain = Precision {
            compensated: false,
            ..precision
        };
        let options = OdeOptions {
            leaf_precision: match by_leaf {
                true => vec![plain, precision],
                false => vec![],
            },
            checkpoint,
            precision: (!by_leaf).then_some(precision),
            ..options(&RK4, Steps::PerInterval(3000), precision)
        };
        let state = (of(&q), of(&l));
        let (y, length) = odeint(field, &state, &[0.0, 2.0], &options).unwrap();
        let loss = (y.powf(3.0).unwrap().sum_all().unwrap() * 2.0).unwrap();
        let loss = (loss + length.sqr().unwrap().sum_all().unwrap()).unwrap();
        let grads = loss.backward().unwrap();
        let of = |x: &Var| grads.get(x).unwrap().clone();
        [y.detach(), length.detach(), of(&q), of(&l)]
    };
    let exact = run(Precision::f64(), false, Checkpoint::All);
    let whole = run(COMPENSATED, false, Checkpoint::All);
    for (got, exact) in whole.iter().zip(&exact) {
        assert!(
            relative(
                &got.to_dtype(DType::F64).unwrap(),
                &exact.to_dtype(DType::F64).unwrap()
            ) <= 8.0 * U_F32
        );
    }
    // One tensor that asks for it is enough, and plans see the same numbers.
    let by_leaf = run(COMPENSATED, true, Checkpoint::States(5));
    for (a, b) in whole.iter().zip(&by_leaf) {
        assert_eq!(bits(a), bits(b));
    }
    let plain = run(Precision::f32(), false, Checkpoint::All);
    let error = |x: &[Tensor; 4]| relative(&x[1].to_dtype(DType::F64).unwrap(), &exact[1]);
    assert!(error(&plain) > 20.0 * error(&whole).max(U_F32));
}

#[test]
fn the_state_is_never_worse_in_f64() {
    // y' = y by Euler's method with steps of a power of two: (1 + h)^N, and the derivative with respect to y0 is the same.
    for doublings in [6, 9, 12] {
        let (n, h) = (1usize << doublings, 2f64.powi(-doublings));
        let exact = (n as f64 * h.ln_1p()).exp();
        let run = |precision| {
            let y0 = Var::new(&[1f64], &Device::Cpu).unwrap();
            let options = options(&EULER, Steps::PerInterval(n), precision);
            let field = |_: &Time, y: &Tensor| Ok(y.clone());
            let y = odeint(field, y0.as_tensor(), &[0.0, 1.0], &options).unwrap();
            let grads = y.sum_all().unwrap().backward().unwrap();
            [y, grads.get(&y0).unwrap().clone()]
                .map(|x| (common::values(&x)[0] - exact).abs() / exact)
        };
        let (plain, compensated) = (run(Precision::f64()), run(Precision::f64().compensated()));
        for (plain, compensated) in plain.iter().zip(compensated) {
            assert!(
                compensated <= plain.max(3.0 * U_F64),
                "{n}: {plain:e}, {compensated:e}"
            );
        }
    }
}

#[test]
fn compensation_is_asked_for_and_changes_nothing_else() {
    assert_eq!(
        Precision::bf16().compensated(),
        Precision {
            compensated: true,
            ..Precision::bf16()
        }
    );
    assert!(!Precision::f32().compensated);
    // The velocities of bf16 and f16 hide what the sums lose; their errors are what they were.
    for low in [Precision::bf16(), Precision::f16()] {
        for way in WAYS {
            let run = |precision, n| {
                let steps = Steps::PerInterval(n);
                solve(way, &options(&RK4, steps, precision), &[0.0, 1.0])
            };
            let exact = run(Precision::f64(), 40);
            let [plain, compensated] =
                [low, low.compensated()].map(|p| errors(&run(p, 40), &exact));
            for q in 0..3 {
                assert!(compensated[q] <= 1.5 * plain[q] && plain[q] <= 1.5 * compensated[q]);
            }
        }
    }
}

#[test]
fn restart_states_have_what_was_lost_beside_them_and_others_do_not() {
    for way in [Way::Steps, Way::Tiles] {
        let kept = |precision, checkpoint| {
            let recorder = Recorder::default();
            let options = OdeOptions {
                checkpoint,
                recorder: Some(recorder.clone()),
                ..options(&RK4, Steps::PerInterval(20), precision)
            };
            solve(way, &options, &[0.0, 1.0]);
            let stats = recorder.take();
            (stats.states_kept, stats.bytes_kept)
        };
        let state = 40 * 3 * 4;
        for precision in [Precision::f32(), COMPENSATED] {
            assert_eq!(kept(precision, Checkpoint::All), (20, 20 * state));
        }
        assert_eq!(
            kept(Precision::f32(), Checkpoint::States(4)),
            (4, 4 * state)
        );
        assert_eq!(kept(COMPENSATED, Checkpoint::States(4)), (4, 8 * state));
        assert_eq!(
            kept(COMPENSATED, Checkpoint::Bytes(5 * state)),
            (2, 4 * state)
        );
    }
}

#[test]
fn a_model_says_that_it_compensates() {
    let vars = VarMap::new();
    let build = |vb: VarBuilder<'_>| Mlp::new(&[2, 64, 2], Activation::Tanh, vb);
    let ode = NeuralOde::new(&vars, "f", &Device::Cpu, build).unwrap();
    let text = ode.precision(COMPENSATED).to_string();
    let said = "computes in f32, sums in f32 with compensation; 4 parameters";
    assert!(text.contains(said), "{text}");
}

#[test]
fn what_cannot_be_compensated_is_refused() {
    let y0 = Tensor::ones((2, 1), DType::F32, &Device::Cpu).unwrap();
    let sde = sde::ito(
        |_: &Time, y: &Tensor| y.neg(),
        |_: &Time, y: &Tensor| y.ones_like(),
    );
    let options_of_noise = SdeOptions {
        precision: Some(COMPENSATED),
        ..Default::default()
    };
    let refused = sde::predict(&sde, &y0, &[0.0, 1.0], &Noise::seeded(1), &options_of_noise);
    assert!(matches!(refused, Err(Error::Sde(SdeDefect::Compensated))));
    for gradient in [
        Gradient::Backsolve(AdjointSolve::new()),
        Gradient::Interpolated(AdjointSolve::new()),
    ] {
        let options = OdeOptions {
            gradient,
            ..options(
                &DOPRI5,
                Steps::Adaptive(Adaptive::new(1e-4, 1e-4)),
                COMPENSATED,
            )
        };
        let refused = odeint(|_: &Time, y: &Tensor| y.neg(), &y0, &[0.0, 1.0], &options);
        let Err(Error::Continuous(ContinuousDefect::Unavailable { what, .. })) = refused else {
            panic!("{refused:?}");
        };
        assert_eq!(what, "compensated sums");
    }
}

#[test]
fn steps_too_short_for_the_coefficients_of_f32_are_compensated_too() {
    let w = candle_nn::Linear::new(Tensor::new(&[[1e37f32]], &Device::Cpu).unwrap(), None);
    let field = move |_: &Time, y: &Tensor| w.forward(y);
    let y0 = Tensor::ones((1, 1), DType::F32, &Device::Cpu).unwrap();
    let options = options(&EULER, Steps::PerInterval(1000), COMPENSATED);
    // h = 1e-40, and h λ = 1e-3.
    let y = odeint(field, &y0, &[0.0, 1e-37], &options).unwrap();
    let exact = (1000.0 * 1e-3f64.ln_1p()).exp();
    let error = (common::values(&y)[0] - exact).abs() / exact;
    assert!(error <= 8.0 * U_F32, "{error:e}");
}
