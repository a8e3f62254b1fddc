//! A loss that the solve looks at row by row is the loss of its states, and so are its gradients.

mod common;

use candle_core::{DType, Device, Tensor, Var};
use candle_diffeq::error::LossDefect;
use candle_diffeq::metrics::Recorder;
use candle_diffeq::nn::{Activation, Cnf, ConvField, Mlp, RowLoss};
use candle_diffeq::options::{Checkpoint, Output};
use candle_diffeq::scaling::{OnOverflow, Scaling};
use candle_diffeq::tableau::DOPRI5;
use candle_diffeq::{Error, NeuralOde, OdeOptions, Precision, State};
use candle_nn::{VarBuilder, VarMap};
use common::{fill, has_tiles, scattered, values};

const TIMES: [f64; 4] = [0.0, 0.2, 0.5, 0.9];

fn random(shape: &[usize], dtype: DType) -> Tensor {
    scattered(shape, 0.8, shape.len()).to_dtype(dtype).unwrap()
}

fn goal(shape: &[usize], dtype: DType) -> Tensor {
    scattered(shape, 0.8, 20 + shape.len())
        .to_dtype(dtype)
        .unwrap()
}

/// ‖x − y‖ / ‖y‖.
fn distance(x: &Tensor, y: &Tensor) -> f64 {
    let norm = |x: Vec<f64>| x.iter().map(|x| x * x).sum::<f64>().sqrt();
    norm(values(&(x - y).unwrap())) / norm(values(y)).max(1e-12)
}

/// The loss, and the gradients of 3 times it, of y0 and all variables by name.
fn gradients(loss: Tensor, y0: &[Var], vars: &VarMap) -> Vec<Tensor> {
    let grads = (&loss * 3.0).unwrap().backward().unwrap();
    let mut named: Vec<_> = vars.data().lock().unwrap().clone().into_iter().collect();
    named.sort_by(|a, b| a.0.cmp(&b.0));
    let all = y0.iter().chain(named.iter().map(|(_, var)| var));
    let gradients = all.map(|var| grads.get(var).unwrap().clone());
    std::iter::once(loss.detach()).chain(gradients).collect()
}

fn check<S: State + 'static>(
    ode: NeuralOde<S>,
    vars: &VarMap,
    y0: &[Tensor],
    loss: &RowLoss,
    options: &OdeOptions,
    bound: f64,
) {
    fill(vars);
    let recorder = Recorder::default();
    let ode = ode.options(OdeOptions {
        recorder: Some(recorder.clone()),
        ..options.clone()
    });
    let y0: Vec<_> = y0.iter().map(|y| Var::from_tensor(y).unwrap()).collect();
    let start = S::from_leaves(y0.iter().map(|y| y.as_tensor().clone()).collect()).unwrap();
    let at_once = ode.loss(&start, &TIMES, loss).unwrap();
    assert!(at_once.dims().is_empty());
    let at_once = gradients(at_once, &y0, vars);
    let stats = recorder.take();
    // Evaluations are kept where the loss is looked at tile by tile.
    assert_eq!(stats.activation_bytes > 0, has_tiles());
    assert!(stats.vjps > 0);
    let states = ode.solve(&start, &TIMES).unwrap();
    let expected = gradients(loss.of(&states).unwrap(), &y0, vars);
    for (got, expected) in at_once.iter().zip(&expected) {
        assert_eq!(got.shape(), expected.shape());
        let error = distance(got, expected);
        assert!(error <= bound, "{error:e}");
    }
    let two = recorder.take();
    assert_eq!((stats.evaluations, stats.vjps), (two.evaluations, two.vjps));
}

fn perceptron(vars: &VarMap) -> NeuralOde {
    let ode = NeuralOde::new(vars, "f", &Device::Cpu, |vb: VarBuilder<'_>| {
        Mlp::new(&[3, 24, 24, 3], Activation::Tanh, vb)
    });
    fill(vars);
    ode.unwrap()
}

const PRECISIONS: [(Precision, f64); 4] = [
    (Precision::f64(), 1e-13),
    (Precision::f32(), 4e-6),
    // The cotangents that are rounded differ in their last bit.
    (Precision::bf16(), 2e-2),
    (Precision::f16(), 3e-3),
];

fn with(precision: Precision, output: Output) -> OdeOptions {
    OdeOptions {
        method: DOPRI5,
        precision: Some(precision),
        output,
        ..Default::default()
    }
}

#[test]
fn mean_squares_and_their_gradients_are_those_of_the_states() {
    for (precision, bound) in PRECISIONS {
        for (output, target) in [(Output::All, &[4, 70, 3][..]), (Output::Final, &[70, 3])] {
            let vars = VarMap::new();
            let loss = RowLoss::MeanSquaredError(goal(target, precision.state));
            let y0 = [random(&[70, 3], DType::F32)
                .to_dtype(precision.state)
                .unwrap()];
            let ode = match precision.state {
                DType::F64 => NeuralOde::from_field(&vars, "f", DType::F64, &Device::Cpu, |vb| {
                    Mlp::new(&[3, 24, 24, 3], Activation::Tanh, vb)
                })
                .unwrap(),
                _ => perceptron(&vars),
            };
            check(ode, &vars, &y0, &loss, &with(precision, output), bound);
        }
    }
}

#[test]
fn likelihoods_of_a_flow_are_those_of_its_states() {
    for (precision, bound) in &PRECISIONS[..2] {
        let vars = VarMap::new();
        let flow = |vb: VarBuilder<'_>| {
            Cnf::new(Mlp::with_time(&[2, 16, 16, 2], Activation::Softplus, vb)?)
        };
        let ode = NeuralOde::from_field(&vars, "f", precision.state, &Device::Cpu, flow).unwrap();
        let y0 = [
            random(&[37, 2], precision.state),
            random(&[37, 1], precision.state),
        ];
        let options = with(*precision, Output::Final);
        check::<(Tensor, Tensor)>(ode, &vars, &y0, &RowLoss::GaussianNll, &options, *bound);
    }
}

#[test]
fn cross_entropies_are_those_of_the_states() {
    let vars = VarMap::new();
    let classes: Vec<u32> = (0..70).map(|i| i % 3).collect();
    let loss = RowLoss::CrossEntropy(Tensor::new(classes, &Device::Cpu).unwrap());
    let options = with(Precision::f32(), Output::Final);
    check(
        perceptron(&vars),
        &vars,
        &[random(&[70, 3], DType::F32)],
        &loss,
        &options,
        4e-6,
    );
}

#[test]
fn images_have_losses_too() {
    let vars = VarMap::new();
    let ode = NeuralOde::new(&vars, "f", &Device::Cpu, |vb: VarBuilder<'_>| {
        ConvField::new(&[2, 5, 2], 3, Activation::Silu, vb)
    });
    let y0 = [random(&[5, 2, 6, 7], DType::F32)];
    let loss = RowLoss::MeanSquaredError(goal(&[5, 2, 6, 7], DType::F32));
    let options = with(Precision::f32(), Output::Final);
    check(ode.unwrap(), &vars, &y0, &loss, &options, 4e-6);
}

/// The loss and its gradients, tile by tile and on the general path.
fn same_on_the_general_path(shape: &[usize], loss: &RowLoss, ode: NeuralOde, vars: &VarMap) {
    fill(vars);
    let y0 = [Var::from_tensor(&random(shape, DType::F32)).unwrap()];
    let options = with(Precision::f32(), Output::Final);
    let ode = ode.options(options.clone());
    let fused = ode.loss(y0[0].as_tensor(), &TIMES, loss).unwrap();
    let fused = gradients(fused, &y0, vars);
    let ode = ode.options(OdeOptions {
        fusion: false,
        ..options
    });
    let general = ode.loss(y0[0].as_tensor(), &TIMES, loss).unwrap();
    for (got, expected) in fused.iter().zip(gradients(general, &y0, vars)) {
        assert!(distance(got, &expected) <= 1e-5);
    }
}

#[test]
fn every_loss_is_that_of_the_general_path() {
    let classes: Vec<u32> = (0..40).map(|i| i % 3).collect();
    let losses = [
        RowLoss::MeanSquaredError(goal(&[40, 3], DType::F32)),
        RowLoss::GaussianNll,
        RowLoss::CrossEntropy(Tensor::new(classes, &Device::Cpu).unwrap()),
    ];
    for loss in &losses {
        let vars = VarMap::new();
        same_on_the_general_path(&[40, 3], loss, perceptron(&vars), &vars);
    }
    // Rows of a likelihood of images are not the images.
    for loss in [
        RowLoss::GaussianNll,
        RowLoss::MeanSquaredError(goal(&[3, 2, 5, 4], DType::F32)),
    ] {
        let vars = VarMap::new();
        let ode = NeuralOde::new(&vars, "f", &Device::Cpu, |vb: VarBuilder<'_>| {
            ConvField::new(&[2, 5, 2], 3, Activation::Tanh, vb)
        });
        same_on_the_general_path(&[3, 2, 5, 4], &loss, ode.unwrap(), &vars);
    }
}

#[test]
fn large_batches_have_the_same_loss_on_any_number_of_threads() {
    let vars = VarMap::new();
    let ode = perceptron(&vars).options(with(Precision::f32(), Output::All));
    let rows = 2100;
    let y0 = [Var::from_tensor(&random(&[rows, 3], DType::F32)).unwrap()];
    let loss = RowLoss::MeanSquaredError(goal(&[4, rows, 3], DType::F32));
    let states = ode.solve(y0[0].as_tensor(), &TIMES).unwrap();
    let expected = gradients(loss.of(&states).unwrap(), &y0, &vars);
    let on = |threads: usize| -> Vec<Vec<f64>> {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads);
        let run = || {
            gradients(
                ode.loss(y0[0].as_tensor(), &TIMES, &loss).unwrap(),
                &y0,
                &vars,
            )
        };
        let results = pool.build().unwrap().install(run);
        for (got, expected) in results.iter().zip(&expected) {
            assert!(distance(got, expected) <= 4e-6);
        }
        results.iter().map(values).collect()
    };
    let one = on(1);
    for threads in [2, 3, 5] {
        assert_eq!(one, on(threads));
    }
}

#[test]
fn memory_plans_second_passes_and_constants_change_nothing() {
    let vars = VarMap::new();
    let y = random(&[50, 3], DType::F32);
    let y0 = [Var::from_tensor(&y).unwrap()];
    let loss = RowLoss::MeanSquaredError(goal(&[50, 3], DType::F32));
    let mut expected: Option<Vec<Vec<f64>>> = None;
    let mut same = |results: &[Tensor]| {
        let results: Vec<_> = results.iter().map(values).collect();
        assert_eq!(*expected.get_or_insert(results.clone()), results);
    };
    for checkpoint in [Checkpoint::All, Checkpoint::Every(2), Checkpoint::States(1)] {
        let ode = perceptron(&vars).options(OdeOptions {
            checkpoint,
            ..with(Precision::f32(), Output::Final)
        });
        let value = ode.loss(y0[0].as_tensor(), &TIMES, &loss).unwrap();
        same(&gradients(value.clone(), &y0, &vars));
        same(&gradients(value, &y0, &vars));
        let constant = ode.loss(&y, &TIMES, &loss).unwrap();
        let grads = (constant * 3.0).unwrap().backward().unwrap();
        assert!(vars.all_vars().iter().all(|var| grads.get(var).is_some()));
    }
}

#[test]
fn a_scale_of_the_loss_reaches_cotangents_before_they_are_rounded() {
    // A gradient that f16 cannot hold, with a scale that it can.
    let options = OdeOptions {
        scaling: Scaling::Off,
        ..with(Precision::f16(), Output::Final)
    };
    let vars = VarMap::new();
    let ode = perceptron(&vars).options(options);
    let y0 = [Var::from_tensor(&random(&[50, 3], DType::F32)).unwrap()];
    let target = (ode.solve(y0[0].as_tensor(), &TIMES).unwrap().detach() + 1e-6).unwrap();
    let loss = RowLoss::MeanSquaredError(target);
    let scaled = |loss: Tensor| {
        let grads = (loss * 2f64.powi(30)).unwrap().backward().unwrap();
        grads.get(&y0[0]).unwrap().clone()
    };
    let got = scaled(ode.loss(y0[0].as_tensor(), &TIMES, &loss).unwrap());
    let states = ode.solve(y0[0].as_tensor(), &TIMES).unwrap();
    let expected = scaled(loss.of(&states).unwrap());
    assert!(values(&expected).iter().any(|g| *g != 0.0));
    assert_eq!(values(&got), values(&expected));
}

#[test]
fn a_scaled_loss_whose_gradient_overflows_is_an_error() {
    let vars = VarMap::new();
    let ode = perceptron(&vars).options(with(Precision::f32(), Output::Final));
    let y0 = Var::from_tensor(&random(&[9, 3], DType::F32)).unwrap();
    let target = (goal(&[9, 3], DType::F32) * 1e18).unwrap();
    let loss = RowLoss::MeanSquaredError(target);
    let loss = ode.loss(y0.as_tensor(), &TIMES, &loss).unwrap();
    let error = Error::from((loss * 1e30).unwrap().backward().unwrap_err());
    // Tiles have formed the gradient before; the general path forms it of the scaled cotangent.
    let expected = match has_tiles() {
        true => matches!(
            error,
            Error::NonFiniteParameterGradient | Error::NonFiniteGradient { .. }
        ),
        false => matches!(error, Error::NonFiniteCotangent),
    };
    assert!(expected, "{error}");
}

#[test]
fn a_target_that_is_a_variable_has_its_gradient() {
    let vars = VarMap::new();
    let ode = perceptron(&vars).options(with(Precision::f32(), Output::Final));
    let target = Var::from_tensor(&goal(&[9, 3], DType::F32)).unwrap();
    let loss = RowLoss::MeanSquaredError(target.as_tensor().clone());
    let loss = ode
        .loss(&random(&[9, 3], DType::F32), &TIMES, &loss)
        .unwrap();
    assert!(loss.backward().unwrap().get(&target).is_some());
}

#[test]
fn losses_of_other_states_are_errors() {
    let vars = VarMap::new();
    let ode = perceptron(&vars);
    let y0 = random(&[9, 3], DType::F32);
    let classes = RowLoss::CrossEntropy(Tensor::zeros(9, DType::U32, &Device::Cpu).unwrap());
    for loss in [&classes, &RowLoss::GaussianNll] {
        let error = ode.loss(&y0, &TIMES, loss).unwrap_err();
        assert!(
            matches!(error, Error::Loss(LossDefect::Output { .. })),
            "{error}"
        );
    }
    // The number of elements is right, their order is not.
    let turned = RowLoss::MeanSquaredError(goal(&[9, 4, 3], DType::F32));
    let error = ode.loss(&y0, &TIMES, &turned).unwrap_err();
    assert!(
        matches!(error, Error::Loss(LossDefect::States { .. })),
        "{error}"
    );
    let last = ode.options(with(Precision::f32(), Output::Final));
    let few = RowLoss::CrossEntropy(Tensor::zeros(8, DType::U32, &Device::Cpu).unwrap());
    let error = last.loss(&y0, &TIMES, &few).unwrap_err();
    assert!(
        matches!(error, Error::Loss(LossDefect::States { .. })),
        "{error}"
    );
    let signed = RowLoss::CrossEntropy(Tensor::zeros(9, DType::I64, &Device::Cpu).unwrap());
    let error = last.loss(&y0, &TIMES, &signed).unwrap_err();
    assert!(
        matches!(error, Error::Loss(LossDefect::States { .. })),
        "{error}"
    );
    let none = RowLoss::CrossEntropy(Tensor::new(&[3u32; 9], &Device::Cpu).unwrap());
    assert!(last.loss(&y0, &TIMES, &none).is_err());
}

#[test]
fn an_overflow_is_met_in_the_backward_pass_as_without_a_loss() {
    let vars = VarMap::new();
    let ode = perceptron(&vars).options(OdeOptions {
        scaling: Scaling::Fixed(2f64.powi(60)),
        on_overflow: OnOverflow::SkipUpdate,
        ..with(Precision::f16(), Output::Final)
    });
    let y0 = Var::from_tensor(&random(&[9, 3], DType::F32)).unwrap();
    let loss = RowLoss::MeanSquaredError((goal(&[9, 3], DType::F32) * 1e15).unwrap());
    let loss = ode.loss(y0.as_tensor(), &TIMES, &loss).unwrap();
    let grads = loss.backward().unwrap();
    assert!(values(grads.get(&y0).unwrap()).iter().all(|g| g.is_nan()));
}

#[test]
fn a_solve_that_keeps_nothing_has_a_loss_and_no_gradient() {
    let vars = VarMap::new();
    let ode = perceptron(&vars).options(OdeOptions {
        checkpoint: Checkpoint::Nothing,
        ..with(Precision::f32(), Output::Final)
    });
    let loss = RowLoss::MeanSquaredError(goal(&[9, 3], DType::F32));
    let loss = ode
        .loss(&random(&[9, 3], DType::F32), &TIMES, &loss)
        .unwrap();
    assert!(matches!(
        Error::from(loss.backward().unwrap_err()),
        Error::NothingKept
    ));
}
