//! Solves tile by tile are the solves of the general path.

#[path = "../src/every_core.rs"]
mod every_core;

use candle_core::{DType, Device, IndexOp, Module, Result, Shape, Tensor, Var};
use candle_diffeq::metrics::{Recorder, Stats};
use candle_diffeq::nn::{Activation, Cnf, ConvField, Mlp};
use candle_diffeq::options::{Checkpoint, Output, Steps};
use candle_diffeq::scaling::{DynamicScaling, Scaling};
use candle_diffeq::tableau::{BOSH3, DOPRI5, EULER, RK4};
use candle_diffeq::{odeint, Error, NeuralOde, OdeOptions, Precision, Time, VectorField};
use candle_nn::{Linear, VarBuilder, VarMap};
use proptest::prelude::*;

/// Numbers of a tensor.
fn values(x: &Tensor) -> Vec<f64> {
    let x = x.detach().to_dtype(DType::F64).unwrap();
    x.flatten_all().unwrap().to_vec1().unwrap()
}

/// ‖x − y‖ / ‖y‖.
fn distance(x: &Tensor, y: &Tensor) -> f64 {
    assert_eq!(x.shape(), y.shape());
    let norm = |v: &mut dyn Iterator<Item = f64>| v.map(|x| x * x).sum::<f64>().sqrt();
    let (x, y) = (values(x), values(y));
    norm(&mut x.iter().zip(&y).map(|(x, y)| x - y)) / norm(&mut y.iter().copied()).max(1e-300)
}

/// Numbers between −1.5 and 1.5 that are the same in every run.
fn scattered(shape: impl Into<Shape>, dtype: DType) -> Tensor {
    let shape = shape.into();
    let number = |i: usize| 1.5 * (i as f64 * 1.618_033_988_7 + 0.4).sin();
    let numbers: Vec<_> = (0..shape.elem_count()).map(number).collect();
    let x = Tensor::from_vec(numbers, shape, &Device::Cpu).unwrap();
    x.to_dtype(dtype).unwrap()
}

/// A perceptron whose variables the map holds, of the size that candle initialises.
fn mlp(vars: &VarMap, widths: &[usize], activation: Activation, time: bool, dtype: DType) -> Mlp {
    let vb = VarBuilder::from_varmap(vars, dtype, &Device::Cpu);
    let inputs: Vec<_> = widths.windows(2).map(|w| w[0]).collect();
    for (l, inputs) in inputs.into_iter().enumerate() {
        let inputs = inputs + usize::from(time && l == 0);
        for (name, shape) in [
            ("weight", Shape::from((widths[l + 1], inputs))),
            ("bias", Shape::from(widths[l + 1])),
        ] {
            let size = (inputs as f64).sqrt().recip();
            let value = (scattered(shape, dtype) * size).unwrap();
            let mut data = vars.data().lock().unwrap();
            data.insert(format!("{l}.{name}"), Var::from_tensor(&value).unwrap());
        }
    }
    match time {
        true => Mlp::with_time(widths, activation, vb).unwrap(),
        false => Mlp::new(widths, activation, vb).unwrap(),
    }
}

/// States and the gradients of y0 and all parameters, for a loss that looks at every state.
struct Outcome {
    states: Tensor,
    y0: Tensor,
    params: Vec<Tensor>,
    stats: Stats,
}

fn outcome(
    field: &Mlp,
    vars: &VarMap,
    y0: &Tensor,
    times: &[f64],
    options: &OdeOptions,
) -> candle_diffeq::Result<Outcome> {
    let recorder = Recorder::default();
    let options = OdeOptions {
        recorder: Some(recorder.clone()),
        ..options.clone()
    };
    let y0 = Var::from_tensor(y0)?;
    let states = odeint(field.clone(), y0.as_tensor(), times, &options)?;
    let weights = (states.ones_like()?.flatten_all()?.cumsum(0)? * 0.01)?
        .sin()?
        .reshape(states.shape())?;
    let grads = (&states * weights)?.sum_all()?.backward()?;
    let mut named: Vec<_> = vars.data().lock().unwrap().clone().into_iter().collect();
    named.sort_by(|a, b| a.0.cmp(&b.0));
    let grad = |var: &Var| grads.get(var).expect("a gradient").clone();
    Ok(Outcome {
        states: states.detach(),
        y0: grad(&y0),
        params: named.iter().map(|(_, var)| grad(var)).collect(),
        stats: recorder.take(),
    })
}

/// Both paths, compared; the fused one is returned.
fn agree(
    field: &Mlp,
    vars: &VarMap,
    y0: &Tensor,
    times: &[f64],
    options: &OdeOptions,
    bound: f64,
) -> (Outcome, Outcome) {
    let on = |fusion| {
        let options = OdeOptions {
            fusion,
            ..options.clone()
        };
        outcome(field, vars, y0, times, &options).unwrap()
    };
    let (fused, general) = (on(true), on(false));
    assert!(distance(&fused.states, &general.states) <= bound);
    let error = distance(&fused.y0, &general.y0);
    assert!(error <= bound, "y0: {error:e}");
    for (i, (f, g)) in fused.params.iter().zip(&general.params).enumerate() {
        // Against the size of all gradients: a bias may cancel to nothing.
        let error = distance(f, g) * norm(g) / norm(&general.params[0]).max(norm(g));
        assert!(error <= bound, "parameter {i}: {error:e}");
    }
    (fused, general)
}

fn norm(x: &Tensor) -> f64 {
    values(x).iter().map(|x| x * x).sum::<f64>().sqrt()
}

prop_compose! {
    /// Widths of one to four layers, the last like the first.
    fn widths()(features in 1usize..40, hidden in prop::collection::vec(1usize..130, 0..4)) -> Vec<usize> {
        let mut widths = vec![features];
        widths.extend(hidden);
        widths.push(features);
        widths
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    #[test]
    fn a_perceptron_and_its_vjp_are_those_of_candle(
        widths in widths(), batch in 1usize..70, which in 0usize..7, time in any::<bool>(), residual in any::<bool>(),
    ) {
        let vars = VarMap::new();
        let mut field = mlp(&vars, &widths, Activation::ALL[which], time, DType::F64);
        if residual {
            field = field.residual();
        }
        let y = Var::from_tensor(&scattered((batch, widths[0]), DType::F64)).unwrap();
        let t = Time::differentiable(0.3, DType::F64, &Device::Cpu);
        let k = field.velocity(&t, y.as_tensor()).unwrap();
        let v = scattered(k.shape().clone(), DType::F64).cos().unwrap();
        let expected = (&k * &v).unwrap().sum_all().unwrap().backward().unwrap();
        let (velocity, pull) = field.vjp(&t, y.as_tensor()).unwrap();
        let got = pull(&v).unwrap();
        prop_assert!(distance(&velocity, &k) <= 1e-13);
        prop_assert!(distance(&got.y, expected.get(&y).unwrap()) <= 1e-12);
        for var in vars.all_vars() {
            let error = distance(got.params.get(&var).unwrap(), expected.get(&var).unwrap());
            prop_assert!(error <= 1e-12, "{:e}", error);
        }
        prop_assert_eq!(got.t.is_some(), time);
        if let Some(got) = got.t {
            let expected = expected.get(&t.tensor().unwrap()).unwrap();
            prop_assert!((values(&got)[0] - values(expected)[0]).abs() <= 1e-12 * (1.0 + norm(&v) * norm(&k)));
        }
    }

    #[test]
    fn a_fused_solve_is_the_general_one(
        widths in widths(), batch in 1usize..140, which in 0usize..7, time in any::<bool>(), residual in any::<bool>(),
        method in 0usize..4, steps in 1usize..4, last in any::<bool>(), backwards in any::<bool>(),
    ) {
        let vars = VarMap::new();
        let mut field = mlp(&vars, &widths, Activation::ALL[which], time, DType::F64);
        if residual {
            field = field.residual();
        }
        let y0 = scattered((batch, widths[0]), DType::F64);
        let mut times = [0.0, 0.1, 0.25, 0.3];
        if backwards {
            times.reverse();
        }
        let options = OdeOptions {
            method: [EULER, BOSH3, RK4, DOPRI5][method].clone(),
            steps: Steps::PerInterval(steps),
            output: if last { Output::Final } else { Output::All },
            ..Default::default()
        };
        let (fused, general) = agree(&field, &vars, &y0, &times, &options, 1e-11);
        prop_assert_eq!(fused.stats, general.stats);
    }
}

#[test]
fn layers_that_are_skipped_meet_layers_that_are_not_in_both_paths() {
    for widths in [
        &[5, 5, 5, 8, 5][..],
        &[20, 40, 40, 40, 20],
        &[5, 8, 8, 5, 5, 5],
    ] {
        for activation in Activation::ALL {
            // States and gradients, in f64.
            let on = |dtype, fusion| -> Vec<Tensor> {
                let vars = VarMap::new();
                let field = mlp(&vars, widths, activation, false, dtype).residual();
                let y0 = scattered((21, widths[0]), dtype);
                let options = OdeOptions {
                    fusion,
                    ..Default::default()
                };
                let got = outcome(&field, &vars, &y0, &TIMES, &options).unwrap();
                let all = [got.states, got.y0].into_iter().chain(got.params);
                all.map(|x| x.to_dtype(DType::F64).unwrap()).collect()
            };
            let exact = on(DType::F64, false);
            let worst = |got: &[Tensor]| {
                let pairs = got.iter().zip(&exact);
                pairs.map(|(x, y)| distance(x, y)).fold(0.0, f64::max)
            };
            let (fused, general) = (worst(&on(DType::F32, true)), worst(&on(DType::F32, false)));
            assert!(worst(&on(DType::F64, true)) <= 64.0 * 2f64.powi(-53));
            // In f32, twice what candle's operations lose at most.
            assert!(fused <= 2.0 * general, "{fused:e}, {general:e}");
        }
    }
}

/// A field on which both paths can be compared in f32, whose batch is no multiple of the lanes.
fn spiral(dtype: DType) -> (VarMap, Mlp, Tensor) {
    let vars = VarMap::new();
    let field = mlp(&vars, &[3, 40, 33, 3], Activation::Tanh, false, dtype);
    (vars, field, scattered((77, 3), dtype))
}

const TIMES: [f64; 4] = [0.0, 0.3, 0.5, 1.0];

#[test]
fn every_memory_plan_gives_the_same_bits() {
    let (vars, field, y0) = spiral(DType::F32);
    let with = |checkpoint| {
        let options = OdeOptions {
            checkpoint,
            steps: Steps::PerInterval(7),
            ..Default::default()
        };
        agree(&field, &vars, &y0, &TIMES, &options, 2e-6)
    };
    let (all, _) = with(Checkpoint::All);
    for plan in [
        Checkpoint::Every(4),
        Checkpoint::States(3),
        Checkpoint::Bytes(5 * 77 * 3 * 4),
    ] {
        let (fused, general) = with(plan);
        assert_eq!(fused.stats, general.stats, "{plan:?}");
        assert_eq!(values(&fused.y0), values(&all.y0), "{plan:?}");
        for (p, q) in fused.params.iter().zip(&all.params) {
            assert_eq!(values(p), values(q), "{plan:?}");
        }
    }
}

#[test]
fn low_precision_rounds_as_the_general_path_does() {
    let (vars, field, y0) = spiral(DType::F32);
    for (precision, unit) in [(Precision::bf16(), 8), (Precision::f16(), 11)] {
        for store in [DType::F32, precision.compute] {
            let options = OdeOptions {
                precision: Some(precision.store(store)),
                steps: Steps::PerInterval(5),
                ..Default::default()
            };
            // A rounding may fall to the other side where the sums differ in their last bit.
            let bound = 2f64.powi(-unit);
            let (fused, general) = agree(&field, &vars, &y0, &TIMES, &options, bound);
            assert_eq!(fused.stats.bytes_kept, general.stats.bytes_kept);
            let exact = OdeOptions {
                steps: Steps::PerInterval(5),
                ..Default::default()
            };
            let exact = outcome(&field, &vars, &y0, &TIMES, &exact).unwrap();
            let error = distance(&fused.states, &exact.states);
            assert!(error > 0.02 * bound, "nothing was rounded: {error:e}");
        }
    }
}

#[test]
fn a_tiny_cotangent_survives_f16_with_the_scaler_and_is_lost_without() {
    let (vars, field, y0) = spiral(DType::F32);
    let gradient = |precision, scaling, factor: f64| {
        let options = OdeOptions {
            precision: Some(precision),
            scaling,
            ..Default::default()
        };
        let y0 = Var::from_tensor(&y0).unwrap();
        let states = odeint(field.clone(), y0.as_tensor(), &TIMES, &options).unwrap();
        let loss = (states.i(3).unwrap().sum_all().unwrap() * factor).unwrap();
        let grads = loss.backward().unwrap();
        let weight = vars.data().lock().unwrap()["1.weight"].clone();
        (grads.get(&weight).unwrap() * factor.recip()).unwrap()
    };
    let factor = 2f64.powi(-40);
    let exact = gradient(Precision::f32(), Scaling::Off, factor);
    let scaled = gradient(Precision::f16(), Scaling::Auto, factor);
    assert!(distance(&scaled, &exact) <= 4.0 * 2f64.powi(-11));
    let unscaled = gradient(Precision::f16(), Scaling::Off, factor);
    assert!(distance(&unscaled, &exact) > 0.5);
}

#[test]
fn an_overflowing_pull_back_is_repeated_with_a_smaller_scale() {
    let (vars, field, y0) = spiral(DType::F32);
    let options = OdeOptions {
        precision: Some(Precision::f16()),
        scaling: Scaling::Dynamic(DynamicScaling {
            headroom: 1.0,
            ..Default::default()
        }),
        steps: Steps::PerInterval(4),
        ..Default::default()
    };
    // Weights so large that cotangents grow inside the field.
    for var in vars.all_vars() {
        var.set(&(var.as_tensor() * 4.0).unwrap()).unwrap();
    }
    let outcome = outcome(&field, &vars, &y0, &[0.0, 0.05, 0.1], &options).unwrap();
    assert!(outcome.stats.retries > 0);
    assert!(values(&outcome.y0).iter().all(|x| x.is_finite()));
}

#[test]
fn results_do_not_depend_on_the_number_of_threads() {
    let (vars, field, _) = spiral(DType::F32);
    let y0 = scattered((1000, 3), DType::F32);
    let on = |threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build();
        pool.unwrap()
            .install(|| outcome(&field, &vars, &y0, &TIMES, &OdeOptions::default()).unwrap())
    };
    let one = on(1);
    for threads in [2, 3, 5] {
        let many = on(threads);
        assert_eq!(values(&many.states), values(&one.states));
        assert_eq!(values(&many.y0), values(&one.y0));
        for (p, q) in many.params.iter().zip(&one.params) {
            assert_eq!(values(p), values(q));
        }
    }
}

#[test]
fn the_first_bad_velocity_is_named_wherever_its_row_is() {
    // y' = 30 y in every row: the larger a row starts, the earlier it overflows.
    let weight = Var::new(&[[30f32]], &Device::Cpu).unwrap();
    let bias = Var::new(&[0f32], &Device::Cpu).unwrap();
    let layer = Linear::new(weight.as_tensor().clone(), Some(bias.as_tensor().clone()));
    let field = Mlp::from_layers(&[layer], Activation::Tanh, false).unwrap();
    // In a tile of its own, and in one of several that a thread takes after each other.
    for count in [300, 5000] {
        let mut rows = vec![1e20f32; count];
        rows[250] = 1e30;
        let y0 = Tensor::from_vec(rows, (count, 1), &Device::Cpu).unwrap();
        let error = |fusion| {
            let options = OdeOptions {
                fusion,
                steps: Steps::Size(0.1),
                ..Default::default()
            };
            odeint(field.clone(), &y0, &[0.0, 10.0], &options)
                .err()
                .map(|e| e.to_string())
        };
        assert!(error(true).is_some());
        assert_eq!(error(true), error(false), "{count} rows");
    }
}

#[test]
fn a_non_finite_start_is_an_error() {
    let (_, field, y0) = spiral(DType::F32);
    let bad = (y0.narrow(0, 0, 1).unwrap() * f64::NAN).unwrap();
    let error = odeint(field, &bad, &TIMES, &OdeOptions::default());
    assert!(matches!(error, Err(Error::NonFiniteState { leaf: 0 })));
}

#[test]
fn a_state_of_other_features_is_an_error_as_it_is_without_fusion() {
    let (_, field, _) = spiral(DType::F32);
    let y0 = Tensor::ones((5, 4), DType::F32, &Device::Cpu).unwrap();
    assert!(odeint(field, &y0, &TIMES, &OdeOptions::default()).is_err());
}

#[test]
fn frozen_weights_get_no_gradient_and_the_others_theirs() {
    let (vars, field, y0) = spiral(DType::F64);
    let all = outcome(&field, &vars, &y0, &TIMES, &OdeOptions::default()).unwrap();
    let mut named: Vec<_> = vars.data().lock().unwrap().clone().into_iter().collect();
    named.sort_by(|a, b| a.0.cmp(&b.0));
    // Layers 0 and 2 frozen.
    let layer = |l: usize| {
        let (bias, weight) = (&named[2 * l].1, &named[2 * l + 1].1);
        match l {
            1 => Linear::new(weight.as_tensor().clone(), Some(bias.as_tensor().clone())),
            _ => Linear::new(weight.as_detached_tensor(), Some(bias.as_detached_tensor())),
        }
    };
    let frozen = Mlp::from_layers(&[layer(0), layer(1), layer(2)], Activation::Tanh, false);
    let y0 = Var::from_tensor(&y0).unwrap();
    let states = odeint(
        frozen.unwrap(),
        y0.as_tensor(),
        &TIMES,
        &OdeOptions::default(),
    )
    .unwrap();
    let weights = (states
        .ones_like()
        .unwrap()
        .flatten_all()
        .unwrap()
        .cumsum(0)
        .unwrap()
        * 0.01)
        .unwrap()
        .sin()
        .unwrap()
        .reshape(states.shape())
        .unwrap();
    let grads = (&states * weights)
        .unwrap()
        .sum_all()
        .unwrap()
        .backward()
        .unwrap();
    assert!(distance(grads.get(&y0).unwrap(), &all.y0) <= 1e-14);
    for (i, (_, var)) in named.iter().enumerate() {
        match i {
            2 | 3 => assert!(distance(grads.get(var).unwrap(), &all.params[i]) <= 1e-14),
            _ => assert!(grads.get(var).is_none()),
        }
    }
}

#[test]
fn many_tiny_terms_do_not_drift() {
    // 20 000 steps: sums of gradients in blocks stay at the roundoff of f32.
    let vars = VarMap::new();
    let field = mlp(&vars, &[2, 16, 2], Activation::Tanh, false, DType::F64);
    let y0 = scattered((16, 2), DType::F64);
    let options = OdeOptions {
        method: EULER,
        steps: Steps::PerInterval(20_000),
        output: Output::Final,
        ..Default::default()
    };
    let exact = outcome(&field, &vars, &y0, &[0.0, 1.0], &options).unwrap();
    let single = VarMap::new();
    let low = mlp(&single, &[2, 16, 2], Activation::Tanh, false, DType::F32);
    for (name, var) in vars.data().lock().unwrap().iter() {
        let twin = single.data().lock().unwrap()[name].clone();
        twin.set(&var.to_dtype(DType::F32).unwrap()).unwrap();
    }
    let y0 = y0.to_dtype(DType::F32).unwrap();
    let single = outcome(&low, &single, &y0, &[0.0, 1.0], &options).unwrap();
    for (p, q) in single.params.iter().zip(&exact.params) {
        let p = p.to_dtype(DType::F64).unwrap();
        let error = distance(&p, q);
        assert!(error <= 2e-5, "{error:e}");
    }
}

#[test]
fn a_layer_that_is_used_twice_has_the_sum_of_both_gradients() {
    let weight = Var::from_tensor(&(scattered((3, 3), DType::F64) * 0.4).unwrap()).unwrap();
    let bias = Var::from_tensor(&scattered(3, DType::F64)).unwrap();
    let layer = Linear::new(weight.as_tensor().clone(), Some(bias.as_tensor().clone()));
    let tied = Mlp::from_layers(&[layer.clone(), layer.clone()], Activation::Tanh, false).unwrap();
    let plain = move |_: &Time, y: &Tensor| layer.forward(&layer.forward(y)?.tanh()?);
    let y0 = scattered((5, 3), DType::F64);
    let gradients = |states: candle_diffeq::Result<Tensor>| {
        let grads = states.unwrap().sin().and_then(|x| x.sum_all()?.backward());
        let grads = grads.unwrap();
        [&weight, &bias].map(|p| grads.get(p).unwrap().clone())
    };
    let exact = gradients(odeint(plain, &y0, &TIMES, &OdeOptions::default()));
    for fusion in [true, false] {
        let options = OdeOptions {
            fusion,
            ..Default::default()
        };
        let got = gradients(odeint(tied.clone(), &y0, &TIMES, &options));
        for (got, exact) in got.iter().zip(&exact) {
            assert!(distance(got, exact) <= 1e-13);
        }
    }
}

#[test]
fn threads_that_go_back_through_one_graph_have_gradients_of_their_own() {
    let (vars, field, y0) = spiral(DType::F64);
    let y0 = Var::from_tensor(&y0).unwrap();
    let states = odeint(field, y0.as_tensor(), &TIMES, &OdeOptions::default()).unwrap();
    let gradients = |factor: f64| -> Vec<f64> {
        let loss = (&states * factor).and_then(|x| x.sum_all());
        let grads = loss.and_then(|loss| loss.backward()).unwrap();
        let all = vars.all_vars().into_iter().chain([y0.clone()]);
        all.flat_map(|p| values(grads.get(&p).unwrap())).collect()
    };
    // Powers of two, so that gradients are multiples to the bit.
    let one = gradients(1.0);
    std::thread::scope(|scope| {
        for factor in [2.0, 4.0, 8.0] {
            let (one, gradients) = (&one, &gradients);
            scope.spawn(move || {
                for _ in 0..20 {
                    let scaled: Vec<_> = one.iter().map(|g| g * factor).collect();
                    assert_eq!(gradients(factor), scaled);
                }
            });
        }
    });
}

#[test]
fn a_module_is_what_its_layers_are() -> Result<()> {
    let (vars, field, y0) = spiral(DType::F64);
    let data = vars.data().lock().unwrap();
    let affine = |x: &Tensor, l: usize| {
        x.matmul(&data[&format!("{l}.weight")].t()?)?
            .broadcast_add(&data[&format!("{l}.bias")])
    };
    let h = affine(&affine(&affine(&y0, 0)?.tanh()?, 1)?.tanh()?, 2)?;
    assert!(distance(&field.forward(&y0)?, &h) <= 1e-15);
    Ok(())
}

#[test]
fn a_neural_ode_of_a_perceptron_is_fused_and_differentiates_times_all_the_same() {
    let (vars, field, y0) = spiral(DType::F32);
    let ode = NeuralOde::new(&vars, "", &Device::Cpu, |vb| {
        Mlp::new(&[3, 40, 33, 3], Activation::Tanh, vb)
    })
    .unwrap();
    let alone = odeint(field, &y0, &TIMES, &OdeOptions::default()).unwrap();
    assert_eq!(values(&ode.solve(&y0, &TIMES).unwrap()), values(&alone));

    // Times that are tracked take the general path.
    let times = Var::new(&TIMES, &Device::Cpu).unwrap();
    let states = ode.solve(&y0, &times).unwrap();
    assert!(distance(&states.detach(), &alone.detach()) <= 1e-6);
    let grads = states.i(3).unwrap().sum_all().unwrap().backward().unwrap();
    assert!(norm(grads.get(&times).unwrap()) > 0.0);
    for var in vars.all_vars() {
        assert!(norm(grads.get(&var).unwrap()) > 0.0);
    }
}

#[test]
fn layers_that_do_not_fit_are_an_error() {
    let layer = |rows: usize, columns: usize| {
        let weight = Tensor::zeros((rows, columns), DType::F32, &Device::Cpu).unwrap();
        let bias = Tensor::zeros(rows, DType::F32, &Device::Cpu).unwrap();
        Linear::new(weight, Some(bias))
    };
    let of = |layers: &[Linear], time| {
        Mlp::from_layers(layers, Activation::Tanh, time)
            .map(|_| ())
            .map_err(|e| e.to_string())
    };
    assert!(of(&[layer(4, 2), layer(2, 4)], false).is_ok());
    assert!(of(&[layer(4, 3), layer(2, 4)], true).is_ok());
    assert!(of(&[layer(4, 2), layer(2, 5)], false).is_err());
    assert!(of(&[layer(4, 2), layer(3, 4)], false).is_err());
    assert!(of(&[], false).is_err());
    let bare = Linear::new(
        Tensor::zeros((2, 2), DType::F32, &Device::Cpu).unwrap(),
        None,
    );
    assert!(of(&[bare], false).is_err());
}

/// The gradients of Σ y(1)² with respect to what the map holds, by name.
fn gradients_of(ode: &NeuralOde, vars: &VarMap, between: impl FnOnce()) -> Vec<(String, Vec<f64>)> {
    let y0 = scattered((5, 2), DType::F32);
    let loss = ode.solve(&y0, &[0.0, 1.0]).unwrap().sqr().unwrap();
    let loss = loss.sum_all().unwrap();
    between();
    let grads = loss.backward().unwrap();
    let data = vars.data().lock().unwrap();
    let mut found: Vec<_> = data
        .iter()
        .map(|(name, var)| (name.clone(), values(grads.get(var.as_tensor()).unwrap())))
        .collect();
    found.sort_by(|(a, _), (b, _)| a.cmp(b));
    found
}

fn small_ode(vars: &VarMap) -> NeuralOde {
    NeuralOde::new(vars, "", &Device::Cpu, |vb| {
        Mlp::new(&[2, 8, 2], Activation::Tanh, vb)
    })
    .unwrap()
}

#[test]
fn a_variable_that_is_written_before_the_backward_pass_changes_nothing() {
    let vars = VarMap::new();
    mlp(&vars, &[2, 8, 2], Activation::Tanh, false, DType::F32);
    let ode = small_ode(&vars);
    let expected = gradients_of(&ode, &vars, || {});
    let written = gradients_of(&ode, &vars, || {
        for var in vars.all_vars() {
            var.set(&(var.as_tensor() * 7.0).unwrap()).unwrap();
        }
    });
    assert_eq!(written, expected);
    // The next solve reads what was written.
    assert_ne!(gradients_of(&ode, &vars, || {}), expected);
}

#[test]
fn variables_that_a_map_is_given_later_are_those_that_are_read() {
    let (vars, others) = (VarMap::new(), VarMap::new());
    mlp(&vars, &[2, 8, 2], Activation::Tanh, false, DType::F32);
    let ode = small_ode(&vars);
    let before = gradients_of(&ode, &vars, || {});
    for (name, var) in vars.data().lock().unwrap().iter_mut() {
        *var = Var::from_tensor(&(var.as_tensor() * 0.5).unwrap()).unwrap();
        others
            .data()
            .lock()
            .unwrap()
            .insert(name.clone(), var.clone());
    }
    let after = gradients_of(&ode, &vars, || {});
    assert_ne!(after, before);
    assert_eq!(
        after,
        gradients_of(&small_ode(&others), &others, || {}),
        "as of a model that was built over them"
    );
}

/// A perceptron of one layer whose weight a constructor makes of the variable `w`.
fn made_of(
    vars: &VarMap,
    of: impl Fn(&Tensor) -> Result<Tensor> + Send + Sync + 'static,
) -> NeuralOde {
    NeuralOde::new(vars, "", &Device::Cpu, move |vb| {
        let w = vb.get_with_hints((2, 2), "w", candle_nn::Init::Const(0.5))?;
        let bias = vb.get_with_hints(2, "b", candle_nn::Init::Const(0.1))?;
        let layer = Linear::new(of(&w)?, Some(bias));
        Mlp::from_layers(&[layer], Activation::Tanh, false)
    })
    .unwrap()
}

#[test]
fn weights_that_a_constructor_computes_are_computed_for_each_solve() {
    let y0 = scattered((3, 2), DType::F32);
    let vars = VarMap::new();
    let ode = made_of(&vars, |w| Ok((w * 0.5)?.detach()));
    let end = || values(&ode.solve(&y0, &[0.0, 1.0]).unwrap());
    let before = end();
    for var in vars.all_vars() {
        var.set(&(var.as_tensor() * 3.0).unwrap()).unwrap();
    }
    assert_ne!(end(), before);
}

#[test]
fn weights_that_are_no_variables_of_the_map_are_an_error_where_they_want_gradients() {
    let y0 = scattered((3, 2), DType::F32);
    let foreign = Var::from_tensor(&scattered((2, 2), DType::F32)).unwrap();
    let foreign = made_of(&VarMap::new(), move |_| Ok(foreign.as_tensor().clone()));
    let computed = made_of(&VarMap::new(), |w| w * 0.5);
    for ode in [foreign, computed] {
        let error = ode.solve(&y0, &[0.0, 1.0]).unwrap_err();
        assert!(matches!(error, Error::UnknownParameter { index: 0 }));
    }
}

#[test]
fn parameters_follow_the_precision_that_is_theirs_though_the_state_has_another() {
    for fusion in [true, false] {
        for field in ["Mlp", "Cnf", "ConvField"] {
            let vars = VarMap::new();
            // States and gradients.
            let end = |parameters: Precision| -> Vec<f64> {
                let rows = [scattered((5, 2), DType::F64), scattered((5, 1), DType::F64)];
                let image = scattered((3, 2, 3, 3), DType::F64);
                let options = OdeOptions {
                    fusion,
                    precision: Some(parameters),
                    leaf_precision: vec![Precision::f64()],
                    ..Default::default()
                };
                let mlp = |vb: VarBuilder<'_>| Mlp::new(&[2, 8, 2], Activation::Tanh, vb);
                let conv = |vb: VarBuilder<'_>| ConvField::new(&[2, 4, 2], 3, Activation::Tanh, vb);
                let (f64, cpu) = (DType::F64, &Device::Cpu);
                let states = match field {
                    "Mlp" => {
                        let ode = NeuralOde::from_field(&vars, "", f64, cpu, mlp).unwrap();
                        ode.options(options).solve(&rows[0], &[0.0, 1.0])
                    }
                    "Cnf" => {
                        let flow = move |vb: VarBuilder<'_>| Cnf::new(mlp(vb)?);
                        let ode = NeuralOde::from_field(&vars, "", f64, cpu, flow).unwrap();
                        let [z, l] = rows;
                        let ode = ode.options(OdeOptions {
                            leaf_precision: vec![Precision::f64(); 2],
                            ..options
                        });
                        let states = ode.solve(&(z, l), &[0.0, 1.0]);
                        states.and_then(|(z, l)| Ok(Tensor::cat(&[z, l], 2)?))
                    }
                    _ => {
                        let ode = NeuralOde::from_field(&vars, "", f64, cpu, conv).unwrap();
                        ode.options(options).solve(&image, &[0.0, 1.0])
                    }
                };
                let states = states.unwrap();
                let grads = states.sqr().and_then(|y| y.sum_all()?.backward()).unwrap();
                let mut named: Vec<_> = vars.data().lock().unwrap().clone().into_iter().collect();
                named.sort_by(|a, b| a.0.cmp(&b.0));
                let all = named.iter().map(|(_, var)| grads.get(var).unwrap());
                std::iter::once(&states)
                    .chain(all)
                    .flat_map(values)
                    .collect()
            };
            let cast = end(Precision::new(DType::F64, DType::F32));
            let exact = end(Precision::f64());
            for var in vars.all_vars() {
                let low = var.to_dtype(DType::F32);
                let low = low.and_then(|x| x.to_dtype(DType::F64));
                var.set(&low.unwrap()).unwrap();
            }
            let rounded = end(Precision::f64());
            assert_eq!(cast, rounded, "{field}, fusion {fusion}");
            assert_ne!(cast, exact, "{field}, fusion {fusion}");
        }
    }
}

#[test]
fn one_tensor_of_any_rank_is_solved_as_it_is_and_as_a_vector_of_one() {
    let decay = |_: &Time, y: &Tensor| y.neg();
    for shape in [vec![], vec![3], vec![2, 3]] {
        for output in [Output::All, Output::Final] {
            let options = OdeOptions {
                output,
                ..Default::default()
            };
            let times = if output == Output::All {
                vec![2]
            } else {
                vec![]
            };
            let y0 = Var::from_tensor(&scattered(shape.clone(), DType::F64)).unwrap();
            let one = odeint(decay, y0.as_tensor(), &[0.0, 1.0], &options).unwrap();
            assert_eq!(one.dims(), [times, shape.clone()].concat());
            let grads = one.sum_all().unwrap().backward().unwrap();
            assert_eq!(grads.get(&y0).unwrap().dims(), shape);
            let field = |_: &Time, y: &Vec<Tensor>| Ok(vec![y[0].neg()?]);
            let vector = odeint(field, &vec![y0.as_tensor().clone()], &[0.0, 1.0], &options);
            assert_eq!(values(&vector.unwrap()[0]), values(&one));
        }
    }
}

#[test]
fn a_tracked_view_with_strides_has_the_gradient_of_what_it_shows() {
    let whole = Var::from_tensor(&scattered((2, 5), DType::F32)).unwrap();
    let vars = VarMap::new();
    let field = mlp(&vars, &[2, 8, 2], Activation::Tanh, false, DType::F32);
    let gradient = |y0: &Tensor| {
        let ys = odeint(field.clone(), y0, &[0.0, 1.0], &OdeOptions::default()).unwrap();
        let grads = ys.sqr().unwrap().sum_all().unwrap().backward().unwrap();
        values(grads.get(&whole).unwrap())
    };
    let view = whole.t().unwrap();
    assert!(!view.is_contiguous());
    assert_eq!(gradient(&view), gradient(&view.contiguous().unwrap()));
}
