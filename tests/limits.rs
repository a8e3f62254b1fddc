//! What is at the edge: solves that do not fit, batches without a row, steps that time cannot tell
//! apart, step sizes at the ends of the range of numbers, and what the statistics count.
//!
//! `cargo test --release --test limits`, a second.

mod common;

use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};

use candle_core::{DType, Device, IndexOp, Module, Tensor, Var};
use candle_diffeq::datasets::Density;
use candle_diffeq::dense::odeint_dense;
use candle_diffeq::error::{StopReason, Stopped};
use candle_diffeq::fields::PiecewiseConstant;
use candle_diffeq::metrics::{mmd, Recorder, Stats};
use candle_diffeq::nn::{Activation, Cnf, ConvField, Mlp, RowLoss};
use candle_diffeq::options::{
    ActivationCache, Adaptive, Checkpoint, OnFailure, Output, StepControl, Steps, TimeGrid, Times,
};
use candle_diffeq::scaling::{DynamicScaling, LossScaler, Scaling};
use candle_diffeq::tableau::{Tableau, BOSH3, DOPRI5, EULER, RK4};
use candle_diffeq::{
    odeint, solution, Error, NeuralOde, OdeOptions, Precision, State, Time, VectorField,
};
use candle_nn::{linear, VarBuilder, VarMap};
use common::{all, fill, has_tiles, scattered, values, U_BF16, U_F16, U_F32};

/// A perceptron of two features.
fn perceptron(vars: &VarMap) -> NeuralOde {
    let build = |vb: VarBuilder<'_>| Mlp::new(&[2, 16, 2], Activation::Tanh, vb);
    let ode = NeuralOde::new(vars, "f", &Device::Cpu, build).unwrap();
    fill(vars);
    ode
}

fn rows(n: usize) -> Tensor {
    scattered(&[n, 2], 0.8, n).to_dtype(DType::F32).unwrap()
}

fn in_steps(steps: usize) -> OdeOptions {
    OdeOptions {
        steps: Steps::PerInterval(steps),
        ..Default::default()
    }
}

fn decay(_: &Time, y: &Tensor) -> candle_core::Result<Tensor> {
    y.neg()
}

// Memory.

/// What no machine has: both numbers are there, and in the text.
#[track_caller]
fn assert_cannot_fit<T>(result: Result<T, Error>) {
    let Err(error) = result else {
        panic!("no error");
    };
    let Error::OutOfMemory { need, available } = &error else {
        panic!("{error}");
    };
    assert!(need.total() > u128::from(*available));
    let text = error.to_string();
    assert!(text.starts_with("the solve needs "), "{text}");
    assert!(text.contains("iB can be had: "), "{text}");
    assert!(text.contains("Checkpoint::"), "{text}");
}

#[test]
fn a_plan_that_cannot_fit_is_refused_before_the_first_step() {
    let plans = [
        Checkpoint::All,
        Checkpoint::Every(1),
        Checkpoint::Every(1 << 33),
        Checkpoint::Every(usize::MAX),
        Checkpoint::States(1 << 33),
        Checkpoint::States(usize::MAX),
        Checkpoint::Bytes(usize::MAX),
    ];
    for steps in [1 << 34, 1 << 40, (1 << 53) - 1] {
        for checkpoint in plans {
            let options = OdeOptions {
                checkpoint,
                ..in_steps(steps)
            };
            let vars = VarMap::new();
            let ode = perceptron(&vars).options(options.clone());
            assert_cannot_fit(ode.solve(&rows(40), &[0.0, 1.0]));
            let calls = AtomicUsize::new(0);
            let field = |t: &Time, y: &Tensor| {
                calls.fetch_add(1, Ordering::SeqCst);
                decay(t, y)
            };
            assert_cannot_fit(solution(&field, &rows(40), &[0.0, 1.0], &options));
            assert_eq!(calls.into_inner(), 0);
        }
    }
}

#[test]
fn evaluations_that_cannot_fit_are_refused_before_the_first_step() {
    if !has_tiles() {
        println!("skipped: without a vector unit there are no tiles, which alone keep evaluations");
        return;
    }
    let vars = VarMap::new();
    for steps in [1 << 34, 1 << 50] {
        for cache in [
            ActivationCache::ALL,
            ActivationCache::ALL.in_bf16(),
            ActivationCache::within(1 << 62),
        ] {
            let ode = perceptron(&vars).options(OdeOptions {
                activation_cache: cache,
                checkpoint: Checkpoint::States(4),
                ..in_steps(steps)
            });
            assert_cannot_fit(ode.solve(&rows(40), &[0.0, 1.0]));
        }
    }
}

#[test]
fn a_loss_of_a_solve_that_cannot_fit_is_refused() {
    let vars = VarMap::new();
    for steps in [1 << 34, 1 << 50] {
        for checkpoint in [Checkpoint::All, Checkpoint::Every(7)] {
            let ode = perceptron(&vars).options(OdeOptions {
                output: Output::Final,
                checkpoint,
                ..in_steps(steps)
            });
            let loss = RowLoss::MeanSquaredError(rows(40));
            assert_cannot_fit(ode.loss(&rows(40), &[0.0, 1.0], &loss));
        }
    }
}

#[test]
fn a_grid_that_cannot_fit_is_refused() {
    for n in [usize::MAX, usize::MAX / 8, 1 << 53] {
        assert!(matches!(
            TimeGrid::linspace(0.0, 1.0, n),
            Err(Error::AllocationFailed { .. })
        ));
    }
}

#[test]
fn neighbouring_points_that_are_near_stay_apart() {
    for (start, end, n) in [(1e9, 1e9 + 1e-5, 50), (0.1, 0.7, 7), (3.0, -4.0, 9)] {
        let grid = TimeGrid::linspace(start, end, n).unwrap();
        assert_eq!((grid.points()[0], grid.points()[n - 1]), (start, end));
    }
    assert_eq!(TimeGrid::linspace(2.0, 3.0, 1).unwrap().points(), [2.0]);
}

#[test]
fn a_solve_from_rest_begins_wherever_time_is() {
    // Neither the state nor its velocity tells a length, and 1e-4 would not change the time.
    for start in [0.0, 1.7e12, -3e12] {
        let y0 = Tensor::zeros((2, 3), DType::F64, &Device::Cpu).unwrap();
        let options = OdeOptions {
            method: DOPRI5,
            steps: Steps::Adaptive(Adaptive::new(1e-6, 1e-9)),
            ..Default::default()
        };
        let drift = |_: &Time, y: &Tensor| y.ones_like()?.affine(-1.0, 0.0)? - y;
        let times = [start, start + 64.0];
        let y = odeint(drift, &y0, &times, &options).unwrap();
        let y = values(&y.get(1).unwrap());
        assert!(y.iter().all(|y| (y + 1.0).abs() < 1e-5), "{start}: {y:?}");
    }
}

#[test]
fn a_loss_takes_every_budget_that_a_solve_takes() {
    for batch in [1, 3, 17, 40] {
        let vars = VarMap::new();
        let row = 8;
        for (bytes, fits) in [(batch * row, true), (batch * row - 1, false)] {
            let ode = perceptron(&vars).options(OdeOptions {
                checkpoint: Checkpoint::Bytes(bytes),
                output: Output::Final,
                ..in_steps(5)
            });
            let loss = RowLoss::MeanSquaredError(rows(batch));
            let solved = ode.solve(&rows(batch), &[0.0, 1.0]);
            assert_eq!(solved.is_ok(), fits, "{batch} rows");
            let graded = ode.loss(&rows(batch), &[0.0, 1.0], &loss);
            assert!(graded.is_ok() || !fits, "{batch} rows: {:?}", graded.err());
            if let Ok(graded) = graded {
                graded.backward().unwrap();
            }
        }
    }
}

// Step sizes.

/// Gradients of Σ c y(last) of y0 and all parameters.
fn gradients(
    dtype: DType,
    options: &OdeOptions,
    times: &[f64],
    c: f64,
) -> Result<Vec<Vec<f64>>, Error> {
    let vars = VarMap::new();
    let ode = NeuralOde::from_field(&vars, "f", dtype, &Device::Cpu, |vb| {
        Mlp::new(&[2, 16, 2], Activation::Tanh, vb)
    })?;
    fill(&vars);
    let y0 = Var::from_tensor(&rows(20).to_dtype(dtype)?)?;
    let ode = ode.options(options.clone());
    let ys = ode.solve(y0.as_tensor(), times)?;
    // A cotangent of c, where c Σ y could overflow.
    let grads = (ys.i(times.len() - 1)? * c)?.sum_all()?.backward()?;
    let of = |var: &Var| values(grads.get(var).unwrap());
    let variables = all(&vars);
    let all = std::iter::once(&y0).chain(variables.iter().map(|(_, var)| var));
    Ok(all.map(of).collect())
}

#[test]
fn steps_of_every_size_have_their_gradients_in_every_precision() {
    let precisions = [
        (Precision::f32(), 64.0 * U_F32),
        (Precision::bf16(), 8.0 * U_BF16),
        (Precision::f16(), 8.0 * U_F16),
    ];
    // Uneven steps, of which the last is far smaller: windows span sizes.
    let uneven = [0.0, 1.0, 2.5, 2.5 + 1.0 / (1 << 20) as f64];
    let mut cases = vec![];
    for h in [
        1e-44, 1e-39, -1e-39, 1e-35, 1e-30, 1e-25, 1e-15, -1e-9, 1e-7, 1e-3, 0.3,
    ] {
        for c in [1e-25, 1.0, 1e6] {
            cases.push((RK4, uneven.map(|t| t * h).to_vec(), c));
        }
    }
    // One step, since the state is far out after it.
    for h in [1e5, -1e9, 1e20, 1e35] {
        for c in [1e-25, 1e-10, 1.0] {
            cases.push((EULER, vec![0.0, h], c));
        }
    }
    for (method, times, c) in cases {
        let options = |precision, fusion| OdeOptions {
            method: method.clone(),
            precision: Some(precision),
            fusion,
            ..Default::default()
        };
        let exact = gradients(DType::F64, &options(Precision::f64(), false), &times, c).unwrap();
        for (precision, bound) in &precisions {
            for fusion in [true, false] {
                let case = format!("{:?}, {times:?}, {c:e}, {fusion}", precision.compute);
                let got = gradients(DType::F32, &options(*precision, fusion), &times, c);
                let got = got.unwrap_or_else(|error| panic!("{case}: {error}"));
                for (got, exact) in got.iter().zip(&exact) {
                    let norm =
                        |x: &mut dyn Iterator<Item = f64>| x.map(|x| x * x).sum::<f64>().sqrt();
                    let error = norm(&mut got.iter().zip(exact).map(|(x, y)| (x - y) / c));
                    let size = norm(&mut exact.iter().map(|y| y / c));
                    // Of each number half the spacing of the smallest f32 for each of a few roundings.
                    let smallest =
                        16.0 * f64::from(f32::from_bits(1)) * (exact.len() as f64).sqrt();
                    assert!(
                        error <= bound * size + smallest / c,
                        "{case}: {error:e} of {size:e}"
                    );
                }
            }
        }
    }
}

#[test]
fn steps_that_f32_does_not_hold_are_steps_of_their_size() {
    // From zero, so that y is all that was added to it.
    let y0 = Tensor::zeros((3, 2), DType::F32, &Device::Cpu).unwrap();
    let field = |_: &Time, y: &Tensor| y.affine(0.0, 1e30);
    for h in [1e-39, 1e-42, 1e-50] {
        let ys = solution(&field, &y0, &[0.0, h], &OdeOptions::default()).unwrap();
        for y in values(&ys.states().i(1).unwrap()) {
            assert!((y / (1e30 * h) - 1.0).abs() <= 4.0 * U_F32, "{y:e}");
        }
    }
}

// Time that stands still.

#[track_caller]
fn assert_unresolved<T>(result: Result<T, Error>, at: usize, from: f64, to: f64) {
    match result.err() {
        Some(Error::TimeUnresolved {
            step,
            t,
            end,
            dtype,
        }) => {
            assert_eq!((step, t, end, dtype), (at, from, to, DType::F32));
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn steps_that_the_state_dtype_cannot_tell_apart_are_refused_where_the_field_reads_time() {
    let timed = |t: &Time, y: &Tensor| y.broadcast_mul(&t.tensor()?.to_dtype(y.dtype())?.cos()?);
    let by_value = |t: &Time, y: &Tensor| y.affine(t.value().cos(), 0.0);
    let options = OdeOptions::default();
    let still: [&[f64]; 5] = [
        &[1e8, 1e8 + 1.0],
        &[0.0, 1e8, 1e8 + 1.0],
        &[-1e8, -1e8 - 2.0],
        &[0.0, 1e-46],
        &[1e39, 2e39],
    ];
    for times in still {
        let last = times.len() - 2;
        let (from, to) = (times[last], times[last + 1]);
        let vars = VarMap::new();
        let build = |vb: VarBuilder<'_>| Mlp::with_time(&[2, 16, 2], Activation::Tanh, vb);
        let with_time = NeuralOde::from_field(&vars, "f", DType::F32, &Device::Cpu, build);
        let with_time = with_time.unwrap();
        let y0 = rows(3);
        assert_unresolved(solution(&timed, &y0, times, &options), last, from, to);
        if times[0].abs() < 1e38 {
            assert_unresolved(with_time.solve(&y0, times), last, from, to);
        }
        // No alarm where nobody reads it, or in a dtype that tells them apart.
        let rest = y0.zeros_like().unwrap();
        assert!(solution(&decay, &rest, times, &options).is_ok());
        assert!(solution(&by_value, &rest, times, &options).is_ok());
        if times[0].abs() < 1e38 {
            assert!(perceptron(&VarMap::new()).solve(&y0, times).is_ok());
        }
        let double = rest.to_dtype(DType::F64).unwrap();
        assert!(solution(&timed, &double, times, &options).is_ok());
    }
    for times in [[1e8, 1e8 + 16.0], [0.0, 1e-44], [1000.0, 1000.0001]] {
        assert!(solution(&timed, &rows(3), &times, &options).is_ok());
    }
}

#[test]
fn a_part_of_a_step_in_which_time_stands_still_is_refused_too() {
    // The field jumps just behind the start of the only step, which is cut there.
    let jump = 0.5 + 1e-9;
    let solve = |build: fn(&[usize], Activation, VarBuilder<'_>) -> candle_core::Result<Mlp>,
                 fusion| {
        let ode = NeuralOde::from_field(
            &VarMap::new(),
            "f",
            DType::F32,
            &Device::Cpu,
            move |vb: VarBuilder<'_>| {
                let field = |i| build(&[2, 16, 2], Activation::Tanh, vb.pp(i));
                PiecewiseConstant::build(&[0.0, jump, 1.0], field)
            },
        );
        let options = OdeOptions {
            fusion,
            ..Default::default()
        };
        ode?.options(options).solve(&rows(3), &[0.5, 1.0])
    };
    for fusion in [true, false] {
        assert_unresolved(solve(Mlp::with_time, fusion), 0, 0.5, jump);
        // No alarm where no field reads time.
        assert!(solve(Mlp::new, fusion).is_ok());
    }
}

#[test]
fn adaptive_steps_that_time_does_not_tell_apart_are_refused_row_by_row_too() {
    let times = [1e8, 1e8 + 4.0];
    let solve = |build: fn(VarBuilder<'_>) -> candle_core::Result<Mlp>, steps: Adaptive| {
        let recorder = Recorder::tracing();
        let (vars, device) = (VarMap::new(), &Device::Cpu);
        let ode = NeuralOde::from_field(&vars, "f", DType::F32, device, build).unwrap();
        let ode = ode.options(OdeOptions {
            method: DOPRI5,
            steps: Steps::Adaptive(steps),
            recorder: Some(recorder.clone()),
            ..Default::default()
        });
        Ok::<_, Error>((ode.solve(&rows(3), &times)?, recorder.take()))
    };
    let timed = |vb: VarBuilder<'_>| Mlp::with_time(&[2, 16, 2], Activation::Tanh, vb);
    let steps = || Adaptive::new(1e-3, 1e-3);
    for steps in [
        steps(),
        steps().control(StepControl::Batch),
        steps().first_step(1.0),
    ] {
        let error = solve(timed, steps).map(|_| ());
        assert!(
            matches!(
                error,
                Err(Error::TimeUnresolved { step: 0, t, end, dtype: DType::F32 })
                    if t == 1e8 && end > t && end <= 1e8 + 4.0
            ),
            "{error:?}"
        );
    }
    if has_tiles() {
        let (states, stats) = solve(timed, steps().on_failure(OnFailure::Nan)).unwrap();
        assert!(values(&states.i(0).unwrap()).iter().all(|y| y.is_finite()));
        assert!(values(&states.i(1).unwrap()).iter().all(|y| y.is_nan()));
        let stopped = stats.rows.iter().map(|row| row.stopped);
        assert!(
            stopped.clone().count() == 3
                && stopped.flatten().all(|why| why == StopReason::Underflow)
        );
    }
    // A field that does not read time goes on.
    let still = |vb: VarBuilder<'_>| Mlp::new(&[2, 16, 2], Activation::Tanh, vb);
    assert!(solve(still, steps()).is_ok());
}

#[test]
fn an_autonomous_field_is_integrated_in_tiles_wherever_time_is() {
    for times in [[1e8, 1e8 + 1.0], [0.0, 1.0]] {
        assert_eq!(is_tiled(&VarMap::new(), &times), has_tiles());
    }
}

/// Whether a solve goes in tiles, where what is kept of evaluations takes other bytes than as tensors.
fn is_tiled(vars: &VarMap, times: &[f64]) -> bool {
    let bytes = [true, false].map(|fusion| {
        let recorder = Recorder::default();
        let ode = perceptron(vars).options(OdeOptions {
            activation_cache: ActivationCache::ALL,
            recorder: Some(recorder.clone()),
            fusion,
            ..Default::default()
        });
        ode.solve(&rows(5), times).unwrap();
        recorder.take().activation_bytes
    });
    bytes[0] != bytes[1]
}

// Times.

#[test]
fn times_of_f32_are_the_numbers_that_they_are() {
    let single = [0.1f32, 0.7, 1.3];
    let exact = single.map(f64::from);
    let slice: &[f32] = &single;
    let vector = single.to_vec();
    let double: &[f64] = &exact;
    fn grid<T: Times + ?Sized>(times: &T) -> TimeGrid {
        times.to_grid().unwrap()
    }
    let grids = [
        grid(&single),
        grid(slice),
        grid(&slice),
        grid(&vector),
        grid(&&vector),
        grid(double),
        grid(&double),
        grid(&exact.to_vec()),
        grid(&&exact),
    ];
    for grid in grids {
        assert_eq!(grid.points(), exact);
    }
    let options = OdeOptions::default();
    let expected = values(&odeint(decay, &rows(3), &exact, &options).unwrap());
    for ys in [
        odeint(decay, &rows(3), &single, &options),
        odeint(decay, &rows(3), slice, &options),
        odeint(decay, &rows(3), &slice, &options),
        odeint(decay, &rows(3), &vector, &options),
        odeint(decay, &rows(3), &&vector, &options),
    ] {
        assert_eq!(values(&ys.unwrap()), expected);
    }
    assert!(matches!(
        vec![0f32, f32::NAN].to_grid(),
        Err(Error::NonFiniteTime { index: 1, .. })
    ));
}

#[test]
fn a_grid_that_is_not_tracked_is_a_grid_of_numbers() {
    let points = [0.0, 0.4, 1.0];
    let tensor = Tensor::new(&points, &Device::Cpu).unwrap();
    let tracked = Var::from_tensor(&tensor).unwrap();
    let recorder = Recorder::default();
    let vars = VarMap::new();
    let ode = perceptron(&vars).options(OdeOptions {
        activation_cache: ActivationCache::ALL,
        recorder: Some(recorder.clone()),
        ..Default::default()
    });
    let y0 = Var::from_tensor(&rows(5)).unwrap();
    let cotangent = scattered(&[3, 5, 2], 1.0, 1).to_dtype(DType::F32).unwrap();
    let expected = ode.solve(y0.as_tensor(), &points).unwrap();
    let by_numbers = recorder.take();
    let ys = ode.solve(y0.as_tensor(), &tensor).unwrap();
    assert_eq!(values(&ys), values(&expected));
    // In tiles, too.
    assert_eq!(recorder.take(), by_numbers);
    assert_eq!(is_tiled(&vars, &points), has_tiles());

    let solution = ode.solution(y0.as_tensor(), &tensor).unwrap();
    assert!(solution.vjp(&cotangent).unwrap().times.is_none());
    let solution = ode.solution(y0.as_tensor(), &tracked).unwrap();
    assert!(solution.vjp(&cotangent).unwrap().times.is_some());
}

// Empty batches.

const PLANS: [Checkpoint; 5] = [
    Checkpoint::All,
    Checkpoint::Every(2),
    Checkpoint::States(2),
    Checkpoint::Bytes(0),
    Checkpoint::Bytes(100),
];

/// Solves from a state of these shapes in every way: outputs of their shapes, and zero gradients.
fn check_empty<S: State + 'static, F>(
    shapes: &[&[usize]],
    build: impl Fn(VarBuilder<'_>) -> candle_core::Result<F> + Clone + Send + Sync + 'static,
) where
    F: VectorField<S> + Send + Sync + 'static,
{
    let ways = PLANS
        .into_iter()
        .flat_map(|plan| [(plan, true), (plan, false)]);
    for (checkpoint, fusion) in ways {
        for output in [Output::All, Output::Final] {
            let vars = VarMap::new();
            let (device, build) = (&Device::Cpu, build.clone());
            let ode = NeuralOde::<S>::from_field(&vars, "f", DType::F32, device, build).unwrap();
            let ode = ode.options(OdeOptions {
                checkpoint,
                fusion,
                output,
                activation_cache: ActivationCache::ALL,
                ..in_steps(3)
            });
            let zeros = |shape: &&[usize]| Var::zeros(*shape, DType::F32, device).unwrap();
            let y0: Vec<Var> = shapes.iter().map(zeros).collect();
            let start = y0.iter().map(|y| y.as_tensor().clone()).collect();
            let start = S::from_leaves(start).unwrap();
            let times = Var::new(&[0.0, 0.5, 1.0], device).unwrap();
            let ys = ode.solve(&start, &times).unwrap().leaves();
            let mut loss = Tensor::new(0f32, device).unwrap();
            for (y, shape) in ys.iter().zip(shapes) {
                let expected = match output {
                    Output::All => [&[3], *shape].concat(),
                    _ => shape.to_vec(),
                };
                assert_eq!(y.dims(), expected);
                loss = (loss + y.sum_all().unwrap()).unwrap();
            }
            let grads = loss.backward().unwrap();
            for (_, var) in all(&vars) {
                let grad = grads.get(&var).unwrap();
                assert_eq!(grad.dims(), var.dims());
                assert!(values(grad).iter().all(|g| *g == 0.0));
            }
            for y in &y0 {
                assert_eq!(grads.get(y).unwrap().dims(), y.dims());
            }
            assert_eq!(values(grads.get(&times).unwrap()), [0.0; 3]);
            let solution = ode.solution(&start, &[0.0, 0.5, 1.0]).unwrap();
            let pulled = solution.vjp(solution.states()).unwrap();
            assert_eq!(pulled.y0.leaves()[0].dims(), shapes[0]);
        }
    }
}

#[test]
fn an_empty_batch_of_rows_with_steps_of_their_own_has_a_solution_too() {
    for control in [StepControl::Rows, StepControl::Batch] {
        let vars = VarMap::new();
        let ode = perceptron(&vars).options(OdeOptions {
            method: DOPRI5,
            steps: Steps::Adaptive(Adaptive::new(1e-3, 1e-3).control(control)),
            ..Default::default()
        });
        let y0 = Var::zeros((0, 2), DType::F32, &Device::Cpu).unwrap();
        let ys = ode.solve(y0.as_tensor(), &[0.0, 0.5, 1.0]).unwrap();
        assert_eq!(ys.dims(), [3, 0, 2]);
        let grads = ys.sum_all().unwrap().backward().unwrap();
        for (_, var) in all(&vars) {
            let grad = values(grads.get(&var).unwrap());
            assert!(grad.iter().all(|g| *g == 0.0));
        }
    }
}

#[test]
fn an_empty_batch_has_a_solution_without_rows_and_zero_gradients() {
    check_empty::<Tensor, _>(&[&[0, 2]], |vb| Mlp::new(&[2, 8, 2], Activation::Tanh, vb));
    check_empty::<Tensor, _>(&[&[3, 0, 2]], |vb| {
        Mlp::with_time(&[2, 8, 2], Activation::Tanh, vb)
    });
    check_empty::<(Tensor, Tensor), _>(&[&[0, 2], &[0, 1]], |vb| {
        Cnf::new(Mlp::with_time(&[2, 8, 2], Activation::Softplus, vb)?)
    });
    check_empty::<Tensor, _>(&[&[0, 3, 5, 5]], |vb| {
        ConvField::new(&[3, 4, 3], 3, Activation::Relu, vb)
    });
    // A layer that refuses an empty batch.
    check_empty::<Tensor, _>(&[&[0, 2]], |vb| {
        let l = linear(2, 2, vb)?;
        Ok(move |_: &Time, y: &Tensor| candle_nn::ops::softmax(&l.forward(y)?, 1))
    });
    // Rows without a feature.
    check_empty::<Tensor, _>(&[&[5, 0]], |_| Ok(decay));
}

#[test]
fn a_tensor_without_an_element_is_carried_along_beside_others() {
    let y0 = (
        Var::from_tensor(&rows(3)).unwrap(),
        Var::zeros((0, 4), DType::F32, &Device::Cpu).unwrap(),
    );
    for checkpoint in PLANS.into_iter().take(3) {
        let options = OdeOptions {
            checkpoint,
            ..in_steps(3)
        };
        let start = (y0.0.as_tensor().clone(), y0.1.as_tensor().clone());
        let field = |_: &Time, (z, e): &(Tensor, Tensor)| Ok((z.neg()?, (e * 2.0)?));
        let (z, e) = odeint(field, &start, &[0.0, 0.5, 1.0], &options).unwrap();
        assert_eq!((z.dims(), e.dims()), (&[3, 3, 2][..], &[3, 0, 4][..]));
        let alone = odeint(decay, &start.0, &[0.0, 0.5, 1.0], &options).unwrap();
        assert_eq!(values(&z), values(&alone));
        let of = |ys: &Tensor| {
            let grads = ys.sum_all().unwrap().backward().unwrap();
            values(grads.get(&y0.0).unwrap())
        };
        assert_eq!(of(&z), of(&alone));
    }
}

#[test]
fn variables_of_a_closure_have_zero_gradients_of_an_empty_batch() {
    let w = Var::ones((2, 2), DType::F32, &Device::Cpu).unwrap();
    let y0 = Var::zeros((0, 2), DType::F32, &Device::Cpu).unwrap();
    let captured = w.clone();
    let field = move |_: &Time, y: &Tensor| y.matmul(&captured)?.tanh();
    let ys = odeint(field, y0.as_tensor(), &[0.0, 1.0], &OdeOptions::default()).unwrap();
    assert_eq!(ys.dims(), [2, 0, 2]);
    let grads = ys.sum_all().unwrap().backward().unwrap();
    assert_eq!(values(grads.get(&w).unwrap()), [0.0; 4]);
    // What a field says against its contract it says here too.
    let wrong = |_: &Time, y: &Tensor| y.narrow(1, 0, 1);
    let refused = odeint(wrong, y0.as_tensor(), &[0.0, 1.0], &OdeOptions::default());
    assert!(matches!(refused, Err(Error::ShapeChanged { .. })));
    // And a plan that keeps nothing has no gradients of nothing.
    let options = OdeOptions {
        checkpoint: Checkpoint::Nothing,
        ..Default::default()
    };
    let solution = solution(&decay, y0.as_tensor(), &[0.0, 1.0], &options).unwrap();
    let refused = solution.vjp(solution.states());
    assert!(matches!(refused, Err(Error::NothingKept)));
}

#[test]
fn the_mean_over_no_rows_is_nan_with_zero_gradients() {
    let none = |shape: &[usize]| Tensor::zeros(shape, DType::F32, &Device::Cpu).unwrap();
    let losses = [
        RowLoss::MeanSquaredError(none(&[0, 2])),
        RowLoss::GaussianNll,
        RowLoss::CrossEntropy(Tensor::zeros(0, DType::U32, &Device::Cpu).unwrap()),
    ];
    for loss in losses {
        let vars = VarMap::new();
        let ode = perceptron(&vars).options(OdeOptions {
            output: Output::Final,
            ..Default::default()
        });
        let value = ode.loss(&none(&[0, 2]), &[0.0, 1.0], &loss).unwrap();
        assert!(value.to_scalar::<f32>().unwrap().is_nan(), "{loss}");
        let grads = value.backward().unwrap();
        for (name, var) in all(&vars) {
            let grad = values(grads.get(&var).unwrap());
            assert!(grad.iter().all(|g| *g == 0.0), "{loss}: {name}");
        }
    }
}

/// Marks the process of a test that limits its own memory.
const LIMITED: &str = "CANDLE_DIFFEQ_TEST_LIMITED";

/// Runs a test in a process of its own, which limits its memory by [`limited`].
fn in_its_own_process(test: &str) {
    in_its_own_process_with(test, &[]);
}

/// The same with variables of the environment.
fn in_its_own_process_with(test: &str, set: &[(&str, &str)]) {
    let mut command = Command::new(std::env::current_exe().unwrap());
    let output = command.args(["--exact", test]).env(LIMITED, "1");
    let output = output.envs(set.iter().copied());
    let output = output.env("RAYON_NUM_THREADS", "2").output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(
        output.status.success(),
        "{said} {}",
        String::from_utf8_lossy(&output.stderr)
    );
    assert!(said.contains("1 passed"), "{said}");
}

/// Leaves the process so many more bytes of addresses; false in a process of other tests.
fn limited(bytes: u64) -> bool {
    if std::env::var_os(LIMITED).is_none() {
        return false;
    }
    let pages = std::fs::read_to_string("/proc/self/statm").unwrap();
    let pages: u64 = pages.split_whitespace().next().unwrap().parse().unwrap();
    let hard = rlimit::Resource::AS.get_hard().unwrap();
    rlimit::Resource::AS
        .set(pages * 4096 + bytes, hard)
        .unwrap();
    true
}

/// The solve stopped for want of memory, and handed over what it had.
#[track_caller]
fn assert_stopped_by_memory<T>(result: Result<T, Error>, bytes: u64) -> Stopped {
    let Err(error) = result else {
        panic!("no error");
    };
    let text = error.to_string();
    let Error::Stopped(stopped) = error else {
        panic!("{text}");
    };
    let StopReason::Memory { need, available } = stopped.reason else {
        panic!("{text}");
    };
    assert!(available < need && need < bytes, "{text}");
    assert!(
        text.contains(&need.to_string()) && text.contains(&available.to_string()),
        "{text}"
    );
    assert!(stopped.t > 0.0 && stopped.accepted > 10, "{text}");
    *stopped
}

/// Turns by ever more; a state of a megabyte.
fn wide() -> (
    impl Fn(&Time, &Tensor) -> candle_core::Result<Tensor> + Send + Sync,
    Tensor,
) {
    let field = |_: &Time, y: &Tensor| y.cos()? * 3.0;
    (field, scattered(&[1 << 17], 1.0, 1))
}

fn tight(method: &Tableau, rtol: f64) -> OdeOptions {
    OdeOptions {
        method: method.clone(),
        steps: Steps::Adaptive(Adaptive::new(rtol, rtol)),
        ..Default::default()
    }
}

#[test]
#[cfg(target_os = "linux")]
fn adaptive_steps_that_fill_the_memory_stop_child() {
    let bytes = 384 << 20;
    if !limited(bytes) {
        return;
    }
    let (field, y0) = wide();
    let y0 = Var::from_tensor(&y0).unwrap();
    let times = [0.0, 0.01, 1e3];
    let options = tight(&BOSH3, 1e-10);
    let solved = odeint(field, y0.as_tensor(), &times, &options);
    let stopped = assert_stopped_by_memory(solved, bytes);
    assert_eq!(
        (stopped.outputs, stopped.states[0].dims()),
        (2, &[2, 1 << 17][..])
    );
    // What is thinned out does not grow: the solve goes on until its attempts are used up.
    let (field, _) = wide();
    let thin = OdeOptions {
        checkpoint: Checkpoint::States(20),
        steps: Steps::Adaptive(Adaptive::new(1e-10, 1e-10).max_steps(stopped.accepted + 100)),
        ..options.clone()
    };
    let error = odeint(field, y0.as_tensor(), &times, &thin).unwrap_err();
    let Error::Stopped(stopped) = error else {
        panic!("{error}");
    };
    assert!(matches!(stopped.reason, StopReason::Attempts { .. }));
    // All states of a dense solution, with their stages.
    let (field, y0) = wide();
    let dense = odeint_dense(field, &y0, &times, &options).map(|_| ());
    let dense = assert_stopped_by_memory(dense, bytes);
    assert!(dense.accepted < stopped.accepted);
    // Outputs grow too.
    let (field, y0) = wide();
    let every = OdeOptions {
        output: Output::Steps,
        checkpoint: Checkpoint::Nothing,
        ..options
    };
    let stopped = assert_stopped_by_memory(odeint(field, &y0, &times, &every), bytes);
    assert_eq!(stopped.states[0].dims(), [stopped.accepted + 1, 1 << 17]);
}

#[test]
#[cfg(target_os = "linux")]
fn adaptive_steps_that_fill_the_memory_stop() {
    in_its_own_process("adaptive_steps_that_fill_the_memory_stop_child");
}

#[test]
#[cfg(target_os = "linux")]
fn rows_that_fill_the_memory_stop_child() {
    let bytes = 320 << 20;
    if !has_tiles() || !limited(bytes) {
        return;
    }
    let vars = VarMap::new();
    let build = |vb: VarBuilder<'_>| Mlp::new(&[16, 16], Activation::Tanh, vb);
    let ode = NeuralOde::from_field(&vars, "f", DType::F64, &Device::Cpu, build).unwrap();
    fill(&vars);
    // Attempts enough to fill the memory with the few rows of a narrow tile.
    let steps = Adaptive::new(1e-13, 1e-13).max_steps(1 << 24);
    let ode = ode.options(OdeOptions {
        steps: Steps::Adaptive(steps),
        ..tight(&BOSH3, 1e-13)
    });
    let y0 = Var::from_tensor(&scattered(&[1 << 12, 16], 0.8, 1)).unwrap();
    let solved = ode.solve(y0.as_tensor(), &[0.0, 1e-3, 1e3]);
    let stopped = assert_stopped_by_memory(solved, bytes);
    assert_eq!(stopped.states[0].dims(), [stopped.outputs, 1, 16]);
}

#[test]
#[cfg(target_os = "linux")]
fn rows_that_fill_the_memory_stop() {
    in_its_own_process("rows_that_fill_the_memory_stop_child");
}

/// A solve with so many outputs of a megabyte each.
fn of_megabytes(
    calls: &AtomicUsize,
    outputs: usize,
    checkpoint: Checkpoint,
) -> Result<Tensor, Error> {
    let field = |t: &Time, y: &Tensor| {
        calls.fetch_add(1, Ordering::SeqCst);
        decay(t, y)
    };
    let times = TimeGrid::linspace(0.0, 1.0, outputs)?;
    let options = OdeOptions {
        method: EULER,
        checkpoint,
        ..Default::default()
    };
    let y0 = scattered(&[1 << 17], 1.0, 1);
    let solution = solution(&field, &y0, &times, &options)?;
    Ok(solution.states().clone())
}

#[test]
#[cfg(target_os = "linux")]
fn returned_states_are_reckoned_once_more_where_they_are_joined_child() {
    let calls = AtomicUsize::new(0);
    if limited_behind_threads(384 << 20) {
        // Each of them has its place, but not all of them joined, too.
        assert_cannot_fit(of_megabytes(&calls, 250, Checkpoint::Nothing));
        assert_eq!(calls.load(Ordering::SeqCst), 0);
    }
}

#[test]
#[cfg(target_os = "linux")]
fn kept_states_are_the_returned_ones_child() {
    if limited_behind_threads(384 << 20) {
        // They and all of them joined have their place, and once more would not fit.
        let checkpoint = match std::env::var_os(EVERY).is_some() {
            true => Checkpoint::Every(1),
            false => Checkpoint::All,
        };
        let states = of_megabytes(&AtomicUsize::new(0), 130, checkpoint).unwrap();
        assert_eq!(states.dims(), [130, 1 << 17]);
    }
}

/// As [`limited`], once there are threads, which take addresses of their own when they begin.
fn limited_behind_threads(bytes: u64) -> bool {
    of_megabytes(&AtomicUsize::new(0), 2, Checkpoint::All).unwrap();
    limited(bytes)
}

/// Asks for the other plan that keeps every state.
const EVERY: &str = "CANDLE_DIFFEQ_TEST_EVERY";

#[test]
#[cfg(target_os = "linux")]
fn returned_states_are_reckoned_once_more_where_they_are_joined() {
    in_its_own_process("returned_states_are_reckoned_once_more_where_they_are_joined_child");
}

#[test]
#[cfg(target_os = "linux")]
fn kept_states_are_the_returned_ones() {
    for set in [&[][..], &[(EVERY, "1")]] {
        in_its_own_process_with("kept_states_are_the_returned_ones_child", set);
    }
}

#[test]
fn adaptive_steps_that_cannot_fit_are_refused_before_the_first() {
    let calls: &'static AtomicUsize = Box::leak(Box::default());
    let short = OdeOptions {
        steps: Steps::Adaptive(Adaptive::new(1e-3, 1e-3).max_step(1e-12).max_steps(1 << 50)),
        ..Default::default()
    };
    let options = OdeOptions {
        method: DOPRI5,
        ..short
    };
    let field = move |_: &Time, y: &Tensor| {
        calls.fetch_add(1, Ordering::Relaxed);
        y.neg()
    };
    let y0 = Var::from_tensor(&scattered(&[1000], 1.0, 1)).unwrap();
    assert_cannot_fit(odeint(field, y0.as_tensor(), &[0.0, 1e3], &options));
    // Only what finds the variables of the field.
    assert!(calls.load(Ordering::Relaxed) <= 1);
    let budget = OdeOptions {
        checkpoint: Checkpoint::Bytes(1 << 60),
        ..options.clone()
    };
    assert_cannot_fit(odeint(field, y0.as_tensor(), &[0.0, 1e3], &budget));
    if has_tiles() {
        let vars = VarMap::new();
        let ode = perceptron(&vars).options(options);
        let y0 = Var::from_tensor(&rows(100)).unwrap();
        assert_cannot_fit(ode.solve(y0.as_tensor(), &[0.0, 1e3]));
    }
}

// Errors out of candle.

/// Every word of it: a child process of [`errors_out_of_backward_say_nothing_else`].
#[test]
fn the_text_of_an_error_out_of_backward_is_its_own() {
    let y0 = Var::from_tensor(&rows(3)).unwrap();
    let options = OdeOptions {
        checkpoint: Checkpoint::Nothing,
        ..Default::default()
    };
    let ys = odeint(decay, y0.as_tensor(), &[0.0, 1.0], &options).unwrap();
    let error = ys.sum_all().unwrap().backward().unwrap_err();
    let text = "the solve kept nothing for a backward pass (Checkpoint::Nothing): \
                set the option checkpoint to another plan, such as Checkpoint::All";
    assert_eq!(error.to_string(), text);
    assert_eq!(format!("{error:?}"), text);
    assert!(matches!(
        Error::from_candle(&error),
        Some(Error::NothingKept)
    ));
    assert_eq!(Error::from(error).to_string(), text);
    // Overflow of a fixed scale, by a loss with a cotangent that is not finite.
    let ys = odeint(decay, y0.as_tensor(), &[0.0, 1.0], &OdeOptions::default()).unwrap();
    let loss = (ys.sum_all().unwrap() * f64::INFINITY).unwrap();
    let error = loss.backward().unwrap_err();
    assert_eq!(error.to_string(), Error::NonFiniteCotangent.to_string());
}

#[test]
fn errors_out_of_backward_say_nothing_else() {
    let child = "the_text_of_an_error_out_of_backward_is_its_own";
    for backtrace in [None, Some("1"), Some("full")] {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command
            .args(["--exact", child])
            .env_remove("RUST_LIB_BACKTRACE");
        match backtrace {
            Some(value) => command.env("RUST_BACKTRACE", value),
            None => command.env_remove("RUST_BACKTRACE"),
        };
        let output = command.output().unwrap();
        let said = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success(), "{backtrace:?}: {said}");
        assert!(said.contains("1 passed"), "{said}");
    }
}

// Statistics.

/// What a pass forward and one backward count.
fn counted(options: &OdeOptions, loss: bool) -> Stats {
    let recorder = Recorder::default();
    let vars = VarMap::new();
    let ode = perceptron(&vars).options(OdeOptions {
        recorder: Some(recorder.clone()),
        ..options.clone()
    });
    let y0 = Var::from_tensor(&rows(70)).unwrap();
    let loss = match loss {
        true => ode
            .loss(y0.as_tensor(), &[0.0, 1.0], &RowLoss::GaussianNll)
            .unwrap(),
        false => ode
            .solve(y0.as_tensor(), &[0.0, 1.0])
            .unwrap()
            .sum_all()
            .unwrap(),
    };
    loss.backward().unwrap();
    recorder.take()
}

#[test]
fn tiles_and_the_general_path_count_alike() {
    let plans = [
        Checkpoint::All,
        Checkpoint::Every(3),
        Checkpoint::States(3),
        Checkpoint::Bytes(2000),
    ];
    for precision in [
        Precision::f32(),
        Precision::bf16(),
        Precision::f32().store(DType::BF16),
    ] {
        for checkpoint in plans {
            let options = |fusion| OdeOptions {
                precision: Some(precision),
                output: Output::Final,
                checkpoint,
                fusion,
                ..in_steps(10)
            };
            let [tiles, general] = [true, false].map(|fusion| counted(&options(fusion), false));
            assert_eq!(tiles, general, "{precision:?}, {checkpoint:?}");
            assert_eq!((tiles.steps, tiles.evaluations, tiles.vjps), (10, 40, 40));
            // In one pass, in which nothing of what is recomputed need be.
            let at_once = counted(&options(true), true);
            let counts = |s: &Stats| (s.steps, s.evaluations, s.vjps, s.retries);
            assert_eq!(counts(&at_once), counts(&general));
        }
    }
}

#[test]
fn pull_backs_are_those_of_the_batch_and_every_repetition() {
    for fusion in [true, false] {
        // Cotangents that grow beyond the room that they have.
        let tight = DynamicScaling {
            headroom: 1.0,
            ..Default::default()
        };
        let recorder = Recorder::default();
        let vars = VarMap::new();
        let ode = perceptron(&vars).options(OdeOptions {
            precision: Some(Precision::f16()),
            scaling: Scaling::Dynamic(tight),
            recorder: Some(recorder.clone()),
            fusion,
            ..in_steps(10)
        });
        for (_, var) in all(&vars) {
            var.set(&(var.as_tensor() * 6.0).unwrap()).unwrap();
        }
        let y0 = Var::from_tensor(&(rows(70) * 0.1).unwrap()).unwrap();
        let ys = ode.solve(y0.as_tensor(), &[0.0, 1.0]).unwrap();
        ys.sum_all().unwrap().backward().unwrap();
        let stats = recorder.take();
        assert!(stats.retries > 0, "nothing was repeated");
        assert_eq!(stats.vjps, 40 + stats.retries, "{stats:?}");
    }
}

// Constructors.

#[test]
fn numbers_that_make_no_sense_are_refused_by_name() {
    for n in [usize::MAX, usize::MAX / 2, 1 << 60] {
        assert!(Density::Moons.sample(n, 0, &Device::Cpu).is_err());
    }
    for bandwidth in [f64::NAN, f64::INFINITY, 0.0, -1.0, 1e-200, 1e200] {
        let refused = mmd(&rows(5), &rows(6), bandwidth);
        assert!(
            matches!(refused, Err(Error::Bandwidth { .. })),
            "{bandwidth}"
        );
    }
    assert!(mmd(&rows(5), &rows(6), 1e-100).unwrap().is_finite());
    for (start, end) in [(0.0, f64::NAN), (f64::NEG_INFINITY, 0.0)] {
        let refused = TimeGrid::linspace(start, end, 3);
        assert!(matches!(refused, Err(Error::NonFiniteTime { .. })));
    }
    for times in [[0.0, f64::NAN], [0.0, f64::INFINITY], [1.0, 1.0]] {
        let fields = vec![decay as fn(&Time, &Tensor) -> candle_core::Result<Tensor>];
        assert!(PiecewiseConstant::new(&times, fields).is_err());
    }
}

#[test]
fn a_loss_scaler_comes_back_from_whatever_its_scale_was_set_to() {
    for scale in [f64::INFINITY, f64::NAN, 0.0, -1.0, 1e300] {
        let mut scaler = LossScaler::default();
        scaler.scale = scale;
        scaler.update(false);
        assert!(scaler.scale > 0.0 && scaler.scale.is_finite(), "{scale}");
    }
}
