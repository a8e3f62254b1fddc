//! Every error, made by the mistake that it is for: its numbers, that f was not evaluated where the
//! mistake shows before, that it is found again behind candle's own error, and that nothing of the
//! user's was changed.
//!
//! `cargo test --test errors`, a second.

mod common;

use std::backtrace::Backtrace;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::Arc;

use candle_core::{Context, DType, Device, IndexOp, Shape, Tensor, Var};
use candle_diffeq::error::{
    AdaptiveDefect, Argument, ContinuousDefect, PullbackDefect, StopReason, TableauDefect,
};
use candle_diffeq::fields::{constant, Cotangents, FieldCheck, Pullback};
use candle_diffeq::metrics::Recorder;
use candle_diffeq::options::{
    Adaptive, AdjointNorm, AdjointSolve, Checkpoint, Gradient, OnFailure, Output, OwnNorm,
    StepControl, Steps, TimeGrid, Times,
};
use candle_diffeq::scaling::{DynamicScaling, LossScaler, OnOverflow, Scaling, Stepped};
use candle_diffeq::tableau::{Tableau, DOPRI5, EULER, HEUN, RK4};
use candle_diffeq::{
    odeint, solution, Error, NeuralOde, OdeOptions, Precision, Result, State, Time, VectorField,
};
use candle_nn::{Init, Optimizer, VarBuilder, VarMap, SGD};
use common::{all, bits, method, named, var};

/// Errors are compared with all their fields; NaN in them is equal to NaN.
#[track_caller]
fn assert_is(got: Error, expected: Error) {
    assert_eq!(format!("{got:?}"), format!("{expected:?}"));
}

/// The error behind a result without a Debug of its own.
#[track_caller]
fn error<T>(result: Result<T>) -> Error {
    match result {
        Ok(_) => panic!("no error"),
        Err(error) => error,
    }
}

fn cpu<D: candle_core::NdArray>(data: D) -> Tensor {
    Tensor::new(data, &Device::Cpu).unwrap()
}

/// Runs what may fail and makes sure that it writes to no variable.
#[track_caller]
fn unchanged<T>(vars: &[&Var], run: impl FnOnce() -> T) -> T {
    let of_all = || vars.iter().map(|v| bits(v)).collect::<Vec<_>>();
    let before = of_all();
    let result = run();
    assert_eq!(of_all(), before, "a variable was written");
    result
}

/// Evaluations of a field.
#[derive(Clone, Default)]
struct Calls(Arc<AtomicUsize>);

impl Calls {
    /// Notes one, and says how many there were before.
    fn note(&self) -> usize {
        self.0.fetch_add(1, Ordering::SeqCst)
    }

    fn count(&self) -> usize {
        self.0.load(Ordering::SeqCst)
    }
}

/// y' = −y for any state.
fn decay<S: State>(calls: &Calls) -> impl Fn(&Time, &S) -> candle_core::Result<S> + Send + Sync {
    let calls = calls.clone();
    move |_: &Time, y: &S| {
        calls.note();
        let k = y
            .leaves()
            .iter()
            .map(Tensor::neg)
            .collect::<candle_core::Result<_>>()?;
        Ok(S::from_leaves(k)?)
    }
}

/// What `odeint` and `solution` both answer, before any evaluation.
#[track_caller]
fn refused<S: State + 'static>(
    y0: &S,
    times: &(impl Times + ?Sized),
    options: &OdeOptions,
) -> Error {
    let calls = Calls::default();
    let by_odeint = error(odeint(decay(&calls), y0, times, options));
    let by_solve = error(solution(&decay(&calls), y0, times, options));
    assert_eq!(calls.count(), 0, "f was evaluated");
    assert_eq!(format!("{by_odeint:?}"), format!("{by_solve:?}"));
    by_odeint
}

/// The same, from a state and a grid that are all right.
#[track_caller]
fn refused_options(options: OdeOptions) -> Error {
    refused(&cpu(&[1f32, 2.0]), &[0.0, 1.0], &options)
}

#[test]
fn every_error_has_a_test() {
    let errors = include_str!("../src/error.rs");
    // Here, or beside the tests of what alone returns it.
    let tests = [
        include_str!("errors.rs"),
        include_str!("adaptive.rs"),
        include_str!("events.rs"),
        include_str!("graphs.rs"),
        include_str!("group/mod.rs"),
        include_str!("arguments.rs"),
        include_str!("field_check.rs"),
        include_str!("layers.rs"),
        include_str!("limits.rs"),
        include_str!("cde.rs"),
        include_str!("continuous.rs"),
        include_str!("piecewise.rs"),
        include_str!("row_loss.rs"),
        include_str!("sde.rs"),
        include_str!("units.rs"),
        include_str!("zoo.rs"),
    ];
    let body = errors.split("pub enum Error {").nth(1).unwrap();
    let body = body.split("\n}\n").next().unwrap();
    let named = body.lines().filter_map(|l| l.strip_prefix("    "));
    let names = named.filter(|l| l.starts_with(|c: char| c.is_ascii_uppercase()));
    let names = names.map(|l| l.split(|c: char| !c.is_alphanumeric()).next().unwrap());
    let lines = || tests.iter().flat_map(|file| file.lines());
    let code = || lines().filter(|l| !l.trim_start().starts_with("//"));
    let untested = |name: &&str| !code().any(|l| l.contains(&format!("Error::{name}")));
    let untested: Vec<_> = names.filter(untested).collect();
    // Other devices' are of the CUDA build.
    assert_eq!(untested, ["TooLarge", "DeviceMismatch"]);
}

#[test]
fn every_defect_of_a_continuous_adjoint_has_a_test_here() {
    let defects = include_str!("../src/error/continuous.rs");
    let body = defects.split("pub enum ContinuousDefect {").nth(1).unwrap();
    let body = body.split("\n}\n").next().unwrap();
    let named = body.lines().filter_map(|l| l.strip_prefix("    "));
    let names: Vec<_> = named
        .filter(|l| l.starts_with(|c: char| c.is_ascii_uppercase()))
        .map(|l| l.split(|c: char| !c.is_alphanumeric()).next().unwrap())
        .collect();
    assert!(names.len() >= 4, "{names:?}");
    for name in names {
        let named = format!("ContinuousDefect::{name}");
        assert!(include_str!("errors.rs").contains(&named), "{name}");
    }
}

#[test]
fn a_grid_that_is_none_is_refused_before_any_evaluation() {
    let (nan, inf) = (f64::NAN, f64::INFINITY);
    let turned = |index, t0, t1| Error::GridNotMonotone { index, t0, t1 };
    for (times, expected) in [
        (vec![], Error::EmptyGrid),
        (vec![0.0, 1.0, 1.0], turned(1, 1.0, 1.0)),
        (vec![0.0, 1.0, 0.5, 2.0], turned(1, 1.0, 0.5)),
        (vec![1.0, 0.5, 0.75, 0.0], turned(1, 0.5, 0.75)),
        (vec![2.0, 2.0], turned(0, 2.0, 2.0)),
        (vec![0.0, nan], Error::NonFiniteTime { index: 1, t: nan }),
        (vec![-inf, 0.0], Error::NonFiniteTime { index: 0, t: -inf }),
        (vec![nan], Error::NonFiniteTime { index: 0, t: nan }),
    ] {
        let y0 = cpu(&[1f64]);
        assert_is(refused(&y0, &times, &OdeOptions::default()), expected);
        // The grid alone, and the same times as a tensor, say the same.
        let (alone, n) = (error(TimeGrid::new(times.clone())), times.len());
        let tensor = Tensor::from_vec(times, n, &Device::Cpu).unwrap();
        assert_is(refused(&y0, &tensor, &OdeOptions::default()), alone);
    }
    assert_is(error(TimeGrid::linspace(0.0, 1.0, 0)), Error::EmptyGrid);
    assert_is(error(TimeGrid::linspace(1.0, 1.0, 2)), turned(0, 1.0, 1.0));
}

#[test]
fn a_grid_tensor_is_one_dimensional_and_f32_or_f64() {
    let y0 = cpu(&[1f64]);
    let refused = |times: &Tensor| refused(&y0, times, &OdeOptions::default());
    let shape = |dims: &[usize]| Error::GridShape {
        shape: Shape::from(dims),
    };
    assert_is(refused(&cpu(&[[0f64, 1.0]])), shape(&[1, 2]));
    assert_is(refused(&cpu(0f64)), shape(&[]));
    for dtype in [DType::F16, DType::BF16, DType::U32, DType::I64] {
        let times = cpu(&[0f64, 1.0]).to_dtype(dtype).unwrap();
        assert_is(refused(&times), Error::GridDtype { dtype });
    }
}

#[test]
fn steps_that_cannot_be_taken_are_refused_before_any_evaluation() {
    let options = |steps| OdeOptions {
        steps,
        ..Default::default()
    };
    assert_is(
        refused_options(options(Steps::PerInterval(0))),
        Error::NoSteps,
    );
    for step_size in [0.0, -0.1, f64::NAN, f64::INFINITY] {
        let expected = Error::InvalidStepSize { step_size };
        assert_is(refused_options(options(Steps::Size(step_size))), expected);
    }
    // f64 has a spacing of 2 at 1e16: half a spacing rounds to even, back to t.
    let far = [1e16, 1e16 + 2.0, 1e16 + 4.0];
    let refused = |steps| refused(&cpu(&[1f64]), &far, &options(steps));
    assert_is(
        refused(Steps::PerInterval(2)),
        Error::StepUnderflow { step: 0, t: 1e16 },
    );
    assert_is(
        refused(Steps::Size(1.0)),
        Error::StepUnderflow { step: 0, t: 1e16 },
    );
}

#[test]
fn steps_that_cannot_be_counted_are_refused_before_any_evaluation() {
    let refused = |times: &[f64], steps| {
        let options = OdeOptions {
            steps,
            ..Default::default()
        };
        refused(&cpu(&[1f64]), times, &options)
    };
    let wide = [-1.7e308, 1.7e308];
    for steps in [Steps::PerInterval(4), Steps::Size(1e307)] {
        let (index, [t0, t1]) = (0, wide);
        assert_is(
            refused(&wide, steps),
            Error::IntervalOverflow { index, t0, t1 },
        );
    }
    // So are steps that would be longer than any number: one between given times, and the search for the first.
    let (index, [t0, t1]) = (0, [-1e308, 1e308]);
    for steps in [
        Steps::At(vec![]),
        Steps::Adaptive(Adaptive::new(1e-3, 1e-3)),
        Steps::Adaptive(Adaptive::new(1e-3, 1e-3).first_step(1.0).step_t([0.0])),
    ] {
        for times in [vec![t0, t1], vec![t0, 0.0, t1]] {
            let options = OdeOptions {
                method: DOPRI5,
                steps: steps.clone(),
                ..Default::default()
            };
            assert_is(
                self::refused(&cpu(&[1f64]), &times, &options),
                Error::IntervalOverflow { index, t0, t1 },
            );
        }
    }
    let most = 1usize << 53;
    let too_many = |steps: Steps, interval, count| Error::TooManySteps {
        steps: format!("{steps:?}"),
        interval,
        count,
    };
    for (steps, interval, count) in [
        (Steps::Size(1e-300), 0, 1.0 / 1e-300),
        (Steps::Size(5e-324), 0, f64::INFINITY),
        (Steps::PerInterval(most), 0, most as f64),
        (Steps::PerInterval(most / 2), 1, most as f64),
        (Steps::PerInterval(usize::MAX), 0, usize::MAX as f64),
    ] {
        let got = refused(&[0.0, 1.0, 2.0], steps.clone());
        let text = got.to_string();
        assert!(text.contains(&format!("Steps::{steps:?}")), "{text}");
        match got {
            Error::TooManySteps {
                interval: at,
                count: n,
                ..
            } => {
                assert_eq!(at, interval);
                assert!(n == count || (n / count - 1.0).abs() < 1e-14, "{n:e}");
            }
            other => panic!("{other} instead of {}", too_many(steps, interval, count)),
        }
    }
}

#[test]
fn a_state_that_cannot_be_integrated_is_refused_before_any_evaluation() {
    let refused = |y0: Vec<Tensor>| refused(&y0, &[0.0, 1.0], &OdeOptions::default());
    let good = || cpu(&[1f32, 2.0]);
    assert_is(refused(vec![]), Error::EmptyState);
    for dtype in [DType::U8, DType::U32, DType::I64] {
        let integers = good().to_dtype(dtype).unwrap();
        assert_is(
            refused(vec![good(), integers]),
            Error::UnsupportedState { leaf: 1, dtype },
        );
    }
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        for dtype in [DType::F16, DType::BF16, DType::F32, DType::F64] {
            let y0 = cpu(&[[1f32, bad]]).to_dtype(dtype).unwrap();
            assert_is(refused(vec![y0.clone()]), Error::NonFiniteState { leaf: 0 });
            assert_is(refused(vec![good(), y0]), Error::NonFiniteState { leaf: 1 });
        }
    }
}

#[test]
fn dtypes_that_cannot_play_their_roles_are_refused_before_any_evaluation() {
    use DType::{BF16, F16, F32, F64, U32};
    for (state, compute, store) in [
        (F16, F16, F16),
        (BF16, F32, F32),
        (U32, F32, F32),
        (F32, F64, F32),
        (F32, F32, F64),
        (F32, U32, F32),
        (F64, F64, U32),
    ] {
        let precision = Precision::new(state, compute).store(store);
        let unsupported = || Error::UnsupportedPrecision {
            state,
            compute,
            store,
        };
        let options = OdeOptions {
            precision: Some(precision),
            ..Default::default()
        };
        assert_is(refused_options(options), unsupported());
        let options = OdeOptions {
            leaf_precision: vec![precision],
            ..Default::default()
        };
        assert_is(refused_options(options), unsupported());
    }
}

#[test]
fn precisions_by_leaf_fit_the_state_and_have_one_dtype_of_sums() {
    let y0 = (cpu(&[1f32, 2.0]), cpu(&[3f32]));
    let refused = |leaf_precision| {
        let options = OdeOptions {
            leaf_precision,
            ..Default::default()
        };
        refused(&y0, &[0.0, 1.0], &options)
    };
    for given in [1, 3] {
        let expected = Error::PrecisionCount { leaves: 2, given };
        assert_is(refused(vec![Precision::bf16(); given]), expected);
    }
    let (first, other) = (DType::F32, DType::F64);
    let mixed = vec![Precision::f32(), Precision::f64()];
    assert_is(refused(mixed), Error::MixedState { first, other });
}

#[test]
fn options_out_of_range_are_refused_before_any_evaluation() {
    let dynamic = |rule| Scaling::Dynamic(rule);
    let rule = DynamicScaling::default();
    let none = DynamicScaling {
        max_attempts: 0,
        ..rule
    };
    let mut cases = vec![(dynamic(none), "max_attempts", 0.0, "at least 1")];
    for headroom in [0.5, -1.0, f64::NAN, f64::INFINITY] {
        cases.push((
            dynamic(DynamicScaling { headroom, ..rule }),
            "headroom",
            headroom,
            "at least 1 and at most 2^39",
        ));
    }
    for scale in [0.0, -2.0, f64::NAN, f64::INFINITY, 1e200] {
        let range = "at least 2^-100 and at most 2^100";
        cases.push((Scaling::Fixed(scale), "scale", scale, range));
    }
    for (scaling, what, value, range) in cases {
        let options = OdeOptions {
            scaling,
            ..Default::default()
        };
        assert_is(
            refused_options(options),
            Error::InvalidScaling { what, value, range },
        );
    }
    // Two f32 are eight bytes.
    for (checkpoint, option, given, needed) in [
        (Checkpoint::Every(0), "Every", 0, 1),
        (Checkpoint::States(0), "States", 0, 1),
        (Checkpoint::Bytes(7), "Bytes", 7, 8),
    ] {
        let options = OdeOptions {
            checkpoint,
            ..Default::default()
        };
        assert_is(
            refused_options(options),
            Error::InvalidCheckpoint {
                option,
                given,
                needed,
            },
        );
    }
    for scale in [0.0, -1.0, f64::NAN, f64::INFINITY] {
        let (what, value, range) = ("scale", scale, "positive and finite");
        assert_is(
            error(LossScaler::new(scale)),
            Error::InvalidScaling { what, value, range },
        );
    }
}

#[test]
fn what_does_not_go_with_a_continuous_adjoint_is_refused_with_what_does() {
    let of = |precision, steps, gradient| OdeOptions {
        method: DOPRI5,
        precision,
        steps,
        gradient,
        ..Default::default()
    };
    let tight = || Adaptive::new(1e-3, 1e-3);
    let by_row = Steps::Adaptive(tight().control(StepControl::Rows));
    let nan = Steps::Adaptive(tight().on_failure(OnFailure::Nan));
    let adaptive = || Steps::Adaptive(tight());
    let compensated = Some(Precision::f32().compensated());
    let plain = Gradient::Backsolve(AdjointSolve::new());
    let mut cases = vec![
        (
            of(compensated, adaptive(), plain.clone()),
            "compensated sums",
            "Precision without compensated, or Gradient::Discrete",
        ),
        (
            of(None, nan, plain),
            "rows that are NaN (OnFailure::Nan)",
            "OnFailure::Error or Gradient::Discrete",
        ),
        (
            of(
                None,
                adaptive(),
                Gradient::Backsolve(AdjointSolve::new().steps(by_row)),
            ),
            "backward steps by row",
            "StepControl::Batch in AdjointSolve::steps",
        ),
    ];
    for gradient in [
        Gradient::Interpolated(AdjointSolve::new()),
        Gradient::Quadrature(AdjointSolve::new()),
    ] {
        let rows = Steps::Adaptive(Adaptive::new(1e-3, 1e-5).control(StepControl::Rows));
        cases.push((
            of(None, rows, gradient),
            "forward steps by row with a gradient that reads y from the forward pass",
            "StepControl::Batch, Gradient::Backsolve or Gradient::Discrete",
        ));
    }
    let all = OwnNorm::of_all(|_| Ok(0.5));
    for norm in [
        AdjointNorm::Largest,
        AdjointNorm::Rms,
        AdjointNorm::Own(all),
    ] {
        let gradient = Gradient::Quadrature(AdjointSolve::new().norm(norm));
        cases.push((
            of(None, adaptive(), gradient),
            "a norm of θ̄ and a Gauss rule",
            "AdjointNorm::Seminorm, OwnNorm::of_state or Gradient::Interpolated",
        ));
    }
    for (options, what, take) in cases {
        let expected = ContinuousDefect::Unavailable { what, take };
        assert_is(refused_options(options), expected.into());
    }
}

#[test]
fn a_backward_solve_that_cannot_be_made_is_refused_before_the_forward_pass() {
    let refused = |solve: AdjointSolve| {
        refused_options(OdeOptions {
            method: RK4,
            steps: Steps::PerInterval(2),
            gradient: Gradient::Backsolve(solve),
            ..Default::default()
        })
    };
    for points in [0, 17] {
        let got = refused(AdjointSolve::new().points(points));
        assert_is(got, ContinuousDefect::Points { points }.into());
    }
    for t in [2.0, -1e-3, f64::INFINITY] {
        let got = refused(AdjointSolve::new().steps(Steps::At(vec![0.5, t])));
        assert_is(got, ContinuousDefect::Outside { t }.into());
    }
    let adaptive = |adaptive| AdjointSolve::new().steps(Steps::Adaptive(adaptive));
    // RK4 has no error estimate.
    let no_pair = refused(adaptive(Adaptive::new(1e-3, 1e-3)));
    assert!(matches!(no_pair, Error::Adaptive(_)), "{no_pair}");
    let tolerances = |a| match refused(adaptive(a).method(DOPRI5)) {
        Error::Adaptive(defect) => defect,
        error => panic!("{error}"),
    };
    assert!(matches!(
        tolerances(Adaptive::new(-1e-3, 1e-3)),
        AdaptiveDefect::Tolerance { which: "rtol", .. }
    ));
    assert!(matches!(
        tolerances(Adaptive::new(0.0, 0.0)),
        AdaptiveDefect::NoTolerance { leaf: 0 }
    ));
    assert!(matches!(
        tolerances(Adaptive::new([1e-3, 1e-3, 1e-3], 1e-3)),
        AdaptiveDefect::ToleranceCount { got: 3, .. }
    ));
}

#[test]
fn a_backward_solve_that_cannot_go_on_says_where() {
    let few = Adaptive::new(1e-9, 1e-11).max_steps(3);
    let options = OdeOptions {
        method: DOPRI5,
        steps: Steps::Adaptive(Adaptive::new(1e-9, 1e-11)),
        gradient: Gradient::Backsolve(AdjointSolve::new().steps(Steps::Adaptive(few))),
        ..Default::default()
    };
    let y0 = Var::new(&[1f64], &Device::Cpu).unwrap();
    let f = |_: &Time, y: &Tensor| y.neg();
    let ys = odeint(f, y0.as_tensor(), &[0.0, 5.0], &options).unwrap();
    let error = unchanged(&[&y0], || ys.sum_all().unwrap().backward().unwrap_err());
    let Error::Continuous(ContinuousDefect::Stopped {
        reason,
        t,
        accepted,
        rejected,
    }) = error.into()
    else {
        panic!();
    };
    assert_eq!(reason, StopReason::Attempts { max_steps: 3 });
    assert!((0.0..5.0).contains(&t) && accepted + rejected == 3);
}

#[test]
fn samples_that_cannot_be_compared_are_refused() {
    let of = |dims: &[usize]| Tensor::zeros(dims, DType::F32, &Device::Cpu).unwrap();
    for (x, y) in [
        (vec![1, 2], vec![4, 2]),
        (vec![4, 2], vec![1, 2]),
        (vec![4, 2], vec![4, 3]),
        (vec![4, 2, 1], vec![4, 2]),
        (vec![4], vec![4]),
    ] {
        let (x, y) = (of(&x), of(&y));
        let expected = Error::Samples {
            x: x.shape().clone(),
            y: y.shape().clone(),
        };
        assert_is(error(candle_diffeq::metrics::mmd(&x, &y, 1.0)), expected);
    }
}

#[test]
fn a_kernel_without_width_is_none_and_nan_is_no_distance() {
    let x = Tensor::randn(0f32, 1.0, (9, 2), &Device::Cpu).unwrap();
    for bandwidth in [0.0, -1.0, f64::INFINITY] {
        let expected = Error::Bandwidth { bandwidth };
        assert_is(
            error(candle_diffeq::metrics::mmd(&x, &x, bandwidth)),
            expected,
        );
    }
    for bad in [f32::NAN, f32::INFINITY] {
        let bad = Tensor::cat(&[&x, &Tensor::new(&[[0.0, bad]], &Device::Cpu).unwrap()], 0);
        assert!(candle_diffeq::metrics::mmd(&bad.unwrap(), &x, 1.0)
            .unwrap()
            .is_nan());
    }
}

#[test]
fn a_tableau_that_is_no_method_of_its_order_does_not_come_into_being() {
    let invalid = |defect| Error::InvalidTableau {
        name: "mine".into(),
        defect,
    };
    let made = Tableau::new("mine", 2, vec![vec![]], vec![1.0], vec![0.0]);
    let defect = TableauDefect::OrderCondition {
        what: "b",
        order: 2,
        tree: "[[]]".into(),
        residual: -0.5,
    };
    assert_is(error(made), invalid(defect));
    let made = Tableau::new("mine", 1, vec![vec![0.5]], vec![1.0], vec![0.5]);
    assert_is(
        error(made),
        invalid(TableauDefect::RowLength { row: 0, got: 1 }),
    );
}

/// Both entries on one field, from a tracked y0; evaluations of each.
#[track_caller]
fn failed(
    field: impl Fn(&Time, &(Tensor, Tensor), usize) -> candle_core::Result<Vec<Tensor>>
        + Send
        + Sync
        + 'static,
    expected: impl Fn() -> Error,
    evaluations: usize,
) {
    let y0 = [var(&[2, 3], 1.0, 1), var(&[2], 1.0, 2)];
    let times = Var::new(&[0f64, 1.0, 3.0], &Device::Cpu).unwrap();
    let calls = [Calls::default(), Calls::default()];
    let field = Arc::new(field);
    // Looks at states nearby, whether a velocity changes with what it is not connected with, do not count.
    let counted = |calls: &Calls, in_graph: bool| {
        let (calls, field) = (calls.clone(), field.clone());
        move |t: &Time, y: &Vec<Tensor>| {
            let call = match y[0].track_op() || !in_graph {
                true => calls.note(),
                false => usize::MAX,
            };
            field(t, &(y[0].clone(), y[1].clone()), call)
        }
    };
    let state = y0.each_ref().map(|v| v.as_tensor().clone()).to_vec();
    let options = method(&RK4, 2);
    unchanged(&[&y0[0], &y0[1], &times], || {
        assert_is(
            error(odeint(counted(&calls[0], true), &state, &times, &options)),
            expected(),
        );
        assert_is(
            error(solution(
                &counted(&calls[1], false),
                &state,
                &times,
                &options,
            )),
            expected(),
        );
    });
    assert_eq!(calls.map(|c| c.count()), [evaluations; 2]);
}

#[test]
fn a_velocity_that_is_not_like_its_state_is_refused_at_the_first_evaluation() {
    let keep = |(z, a): &(Tensor, Tensor)| vec![z.neg().unwrap(), a.neg().unwrap()];
    failed(
        move |_, y, _| Ok(keep(y)[..1].to_vec()),
        || Error::LeafCount {
            expected: 2,
            got: 1,
        },
        1,
    );
    failed(
        move |_, y, _| Ok(vec![keep(y)[0].clone(), y.1.unsqueeze(0)?]),
        || Error::ShapeChanged {
            leaf: 1,
            expected: Shape::from(2),
            got: Shape::from((1, 2)),
        },
        1,
    );
    failed(
        move |_, y, _| Ok(vec![y.0.t()?, keep(y)[1].clone()]),
        || Error::ShapeChanged {
            leaf: 0,
            expected: Shape::from((2, 3)),
            got: Shape::from((3, 2)),
        },
        1,
    );
    failed(
        move |_, y, _| Ok(vec![keep(y)[0].clone(), y.1.to_dtype(DType::F32)?]),
        || Error::DtypeChanged {
            leaf: 1,
            expected: DType::F64,
            got: DType::F32,
        },
        1,
    );
    // What it is unlike is said first, also where candle cannot trace it.
    failed(
        move |_, y, _| Ok(vec![y.0.detach()]),
        || Error::LeafCount {
            expected: 2,
            got: 1,
        },
        1,
    );
    failed(
        move |_, y, _| Ok(vec![y.0.detach().t()?, y.1.detach()]),
        || Error::ShapeChanged {
            leaf: 0,
            expected: Shape::from((2, 3)),
            got: Shape::from((3, 2)),
        },
        1,
    );
    failed(
        move |_, y, _| Ok(vec![y.0.detach(), y.1.detach().to_dtype(DType::F32)?]),
        || Error::DtypeChanged {
            leaf: 1,
            expected: DType::F64,
            got: DType::F32,
        },
        1,
    );
    // A change later on is found where it happens.
    failed(
        move |_, y, call| match call {
            5 => Ok(vec![y.0.t()?, keep(y)[1].clone()]),
            _ => Ok(keep(y)),
        },
        || Error::ShapeChanged {
            leaf: 0,
            expected: Shape::from((2, 3)),
            got: Shape::from((3, 2)),
        },
        6,
    );
}

#[test]
fn a_velocity_that_is_not_finite_is_found_at_its_step_stage_and_time() {
    // Four steps of four stages: [0, ½, 1], then [1, 2, 3].
    let steps = [(0.0, 0.5), (0.5, 0.5), (1.0, 1.0), (2.0, 1.0)];
    for bad in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
        for (step, (start, h)) in steps.into_iter().enumerate() {
            for (stage, c) in RK4.c().iter().enumerate() {
                let at = 4 * step + stage;
                let t = start + c * h;
                let field = move |_: &Time, (z, a): &(Tensor, Tensor), call: usize| {
                    let add = if call == at { bad } else { 0.0 };
                    Ok(vec![z.neg()?, (a.neg()? + add)?])
                };
                failed(
                    field,
                    || Error::NonFiniteVelocity { step, stage, t },
                    at + 1,
                );
            }
        }
    }
}

#[test]
fn a_state_that_overflows_from_finite_velocities_is_found_after_its_step() {
    let y0 = Var::new(&[3e38f32], &Device::Cpu).unwrap();
    let calls = Calls::default();
    let noted = calls.clone();
    let field = move |_: &Time, y: &Tensor| {
        noted.note();
        y * 1e-3
    };
    // y grows by 3e35 a unit of time and passes 3.4028e38 within the second step.
    let run = || {
        odeint(
            field,
            y0.as_tensor(),
            &[0.0, 50.0, 150.0, 200.0],
            &method(&EULER, 1),
        )
    };
    let got = unchanged(&[&y0], || error(run()));
    assert_is(got, Error::NonFiniteSolution { step: 1, t: 150.0 });
    assert_eq!(calls.count(), 2);
}

/// A neural ODE of one weight (2, 2) and what else `add` makes it read.
fn neural(
    vars: &VarMap,
    calls: &Calls,
    add: impl Fn(&VarBuilder<'_>) -> candle_core::Result<Tensor> + Send + Sync + 'static,
) -> NeuralOde {
    let calls = calls.clone();
    let build = move |vb: VarBuilder<'_>| {
        let (weight, other, calls) = (vb.get((2, 2), "weight")?, add(&vb)?, calls.clone());
        Ok(move |_: &Time, y: &Tensor| {
            calls.note();
            y.matmul(&weight)?
                .broadcast_add(&other.to_dtype(y.dtype())?)
        })
    };
    NeuralOde::from_field(vars, "ode", DType::F32, &Device::Cpu, build).unwrap()
}

#[test]
fn parameters_of_integers_or_of_several_dtypes_are_refused_before_any_evaluation() {
    let y0 = cpu(&[[1f32, 2.0]]);
    for (dtype, expected) in [
        (
            DType::U32,
            Error::ParameterDtype {
                name: "ode.table".into(),
                dtype: DType::U32,
            },
        ),
        (
            DType::F64,
            Error::MixedParameters {
                name: "ode.table".into(),
                expected: DType::F32,
                got: DType::F64,
            },
        ),
    ] {
        let (vars, calls) = (VarMap::new(), Calls::default());
        let two = Init::Const(2.0);
        let table = move |vb: &VarBuilder<'_>| vb.get_with_hints_dtype(2, "table", two, dtype);
        let ode = neural(&vars, &calls, table);
        let [weight, table] = ["ode.weight", "ode.table"].map(|name| named(&vars, name));
        let got = unchanged(&[&weight, &table], || error(ode.solve(&y0, &[0.0, 1.0])));
        assert_is(got, expected);
        assert_eq!(calls.count(), 0);
    }
}

#[test]
fn captured_variables_of_integers_or_of_several_dtypes_are_refused() {
    let y0 = var(&[1, 2], 1.0, 1);
    let options = method(&EULER, 1);
    let index = Var::new(&[1u32, 0], &Device::Cpu).unwrap();
    let at = index.clone();
    let field = move |_: &Time, y: &Tensor| y.index_select(&at, 1);
    let run = || error(odeint(field, y0.as_tensor(), &[0.0, 1.0], &options));
    let (name, dtype) = ("0 of the closure".to_owned(), DType::U32);
    assert_is(
        unchanged(&[&y0, &index], run),
        Error::ParameterDtype { name, dtype },
    );

    let (w, b) = (
        var(&[2], 1.0, 2),
        Var::new(&[1f32, 2.0], &Device::Cpu).unwrap(),
    );
    let of = (w.clone(), b.clone());
    let field = move |_: &Time, y: &Tensor| {
        y.broadcast_mul(&of.0)?
            .broadcast_add(&of.1.to_dtype(DType::F64)?)
    };
    let run = || error(odeint(field, y0.as_tensor(), &[0.0, 1.0], &options));
    // Which of the two is met first is candle's business.
    match unchanged(&[&y0, &w, &b], run) {
        Error::MixedParameters {
            name,
            expected,
            got,
        } => {
            assert_eq!(name, "1 of the closure");
            assert_ne!(expected, got);
        }
        other => panic!("{other}"),
    }
}

#[test]
fn a_variable_that_the_constructor_did_not_ask_for_is_refused() {
    let foreign = Var::new(&[1f32, 2.0], &Device::Cpu).unwrap();
    let y0 = cpu(&[[1f32, 2.0]]);
    let (vars, calls, captured) = (VarMap::new(), Calls::default(), foreign.clone());
    let ode = neural(&vars, &calls, move |_| Ok(captured.as_tensor().clone()));
    let weight = named(&vars, "ode.weight");
    let got = unchanged(&[&foreign, &weight], || error(ode.solve(&y0, &[0.25, 1.0])));
    assert_is(got, Error::ForeignParameter { t: 0.25 });
    assert_eq!(calls.count(), 1);

    // Also where it is read at a later time only.
    let (vars, captured) = (VarMap::new(), foreign.clone());
    let build = move |vb: VarBuilder<'_>| {
        let (weight, foreign) = (vb.get((2, 2), "weight")?, captured.clone());
        Ok(move |t: &Time, y: &Tensor| match t.value() {
            t if t > 0.5 => y.matmul(&weight)?.broadcast_mul(&foreign),
            _ => y.matmul(&weight),
        })
    };
    let ode = NeuralOde::from_field(&vars, "ode", DType::F32, &Device::Cpu, build).unwrap();
    let got = unchanged(&[&foreign], || error(ode.solve(&y0, &[0.0, 1.0, 2.0])));
    assert_is(got, Error::ForeignParameter { t: 1.0 });
}

#[test]
fn an_untracked_velocity_is_refused_at_the_first_evaluation() {
    let y0 = var(&[1, 2], 1.0, 1);
    let calls = Calls::default();
    let noted = calls.clone();
    let field = move |_: &Time, y: &Tensor| {
        noted.note();
        y.detach().neg()
    };
    let options = method(&RK4, 1);
    let got = unchanged(&[&y0], || {
        error(odeint(
            field.clone(),
            y0.as_tensor(),
            &[0.25, 1.0],
            &options,
        ))
    });
    assert_is(got, Error::UntrackedVelocity { t: 0.25 });
    // One of the solve, the same again, and three step sizes to both sides in two directions.
    assert_eq!(calls.count(), 2 + 2 * 6);
    // Without a graph nothing is wrong until gradients are asked for, at the last step.
    let solution = solution(&field, y0.as_tensor(), &[0.25, 1.0, 2.0], &options).unwrap();
    let got = error(solution.vjp(solution.states()));
    assert_is(got, Error::UntrackedVelocity { t: 1.0 });

    let vars = VarMap::new();
    let build = |vb: VarBuilder<'_>| {
        let weight = vb.get((2, 2), "weight")?;
        Ok(move |_: &Time, y: &Tensor| y.matmul(&weight).map(|k| k.detach()))
    };
    let ode = NeuralOde::from_field(&vars, "ode", DType::F64, &Device::Cpu, build).unwrap();
    let refused = || {
        unchanged(&[&y0, &named(&vars, "ode.weight")], || {
            error(ode.solve(y0.as_tensor(), &[0.25, 1.0]))
        })
    };
    // With weights of zero the velocity does not change with the state, but with them.
    let of = match refused() {
        Error::WrongPullback { of, .. } => of,
        other => panic!("{other}"),
    };
    assert_eq!(of, "parameter ode.weight");
    common::scatter(&vars);
    assert_is(refused(), Error::UntrackedVelocity { t: 0.25 });
}

#[test]
fn a_velocity_that_becomes_untracked_is_refused_in_the_forward_pass() {
    let y0 = var(&[1, 2], 1.0, 1);
    let (times, options) = ([0.0, 1.0, 2.0, 3.0], method(&EULER, 1));
    let late = |t: &Time, k: Tensor| match t.value() {
        t if t > 1.5 => k.detach(),
        _ => k,
    };
    let field = move |t: &Time, y: &Tensor| Ok(late(t, y.neg()?));
    let run = || odeint(field, y0.as_tensor(), &times, &options);
    let got = unchanged(&[&y0], || error(run()));
    assert_is(got, Error::UntrackedVelocity { t: 2.0 });

    let vars = VarMap::new();
    let build = move |vb: VarBuilder<'_>| {
        let weight = vb.get((2, 2), "weight")?;
        Ok(move |t: &Time, y: &Tensor| Ok(late(t, y.matmul(&weight)?)))
    };
    let ode = NeuralOde::from_field(&vars, "ode", DType::F64, &Device::Cpu, build).unwrap();
    let ode = ode.options(options.clone());
    let refused = || unchanged(&[&y0], || error(ode.solve(y0.as_tensor(), &times)));
    // With weights of zero the velocity does not change with the state, but with them.
    let lost = refused();
    assert!(
        matches!(lost, Error::WrongPullback { t, .. } if t == 2.0),
        "{lost}"
    );
    common::scatter(&vars);
    assert_is(refused(), Error::UntrackedVelocity { t: 2.0 });
}

#[test]
fn a_velocity_that_comes_to_read_parameters_only_is_no_error() {
    let (y0, vars) = (var(&[1, 2], 1.0, 1), VarMap::new());
    let build = move |vb: VarBuilder<'_>| {
        let rate = vb.get_with_hints((1, 2), "rate", Init::Const(0.5))?;
        Ok(move |t: &Time, y: &Tensor| match t.value() {
            t if t > 0.5 => rate.copy(),
            _ => y * &rate,
        })
    };
    let ode = NeuralOde::from_field(&vars, "ode", DType::F64, &Device::Cpu, build).unwrap();
    let ode = ode.options(method(&EULER, 1));
    let ys = ode.solve(y0.as_tensor(), &[0.0, 1.0, 2.0]).unwrap();
    let grads = ys.i(2).unwrap().sum_all().unwrap().backward().unwrap();
    // y(2) = (1 + w) y0 + w.
    let rate = grads.get(&named(&vars, "ode.rate")).unwrap();
    let exact = (y0.as_tensor() + 1.0).unwrap();
    assert!(common::relative(rate, &exact) <= 4.0 * common::U_F64);
}

/// −∇Φ by candle's `backward()` inside the field, Φ = Σ tanh²(yW): candle forgets how the
/// gradient depends on y, and keeps a part of how it depends on W.
fn force(y: &Tensor, weight: &Tensor) -> candle_core::Result<Tensor> {
    let potential = y.matmul(weight)?.tanh()?.sqr()?.sum_all()?;
    let grads = potential.backward()?;
    grads.get(y).context("y has no gradient")?.neg()
}

#[test]
fn a_field_that_calls_backward_is_refused_and_not_silently_differentiated_wrongly() {
    let (y0, w) = (var(&[1, 2], 1.0, 1), var(&[2, 2], 1.0, 2));
    let weight = w.clone();
    let field = move |_: &Time, y: &Tensor| match y.track_op() {
        true => force(y, &weight),
        // Evaluations without a graph have nothing to call backward on.
        false => force(Var::from_tensor(y)?.as_tensor(), &weight),
    };
    let run = || odeint(field, y0.as_tensor(), &[0.25, 1.0], &method(&EULER, 1));
    let got = unchanged(&[&y0, &w], || error(run()));
    assert_is(got, Error::UntrackedVelocity { t: 0.25 });
}

#[test]
fn a_field_that_calls_backward_on_its_own_variable_is_refused() {
    let (y0, w) = (var(&[1, 2], 1.0, 1), var(&[2, 2], 1.0, 2));
    let weight = w.clone();
    let field = move |_: &Time, y: &Tensor| force(Var::from_tensor(y)?.as_tensor(), &weight);
    let run = || odeint(field, y0.as_tensor(), &[0.25, 1.0], &method(&EULER, 1));
    let got = unchanged(&[&y0, &w], || error(run()));
    assert_is(got, Error::UntrackedVelocity { t: 0.25 });
}

#[test]
fn a_neural_ode_that_calls_backward_is_refused() {
    let y0 = var(&[1, 2], 1.0, 1);
    for own in [false, true] {
        let vars = VarMap::new();
        let build = move |vb: VarBuilder<'_>| {
            let weight = vb.get_with_hints((2, 2), "weight", Init::Const(0.7))?;
            Ok(move |_: &Time, y: &Tensor| match own || !y.track_op() {
                false => force(y, &weight),
                true => force(Var::from_tensor(y)?.as_tensor(), &weight),
            })
        };
        let ode = NeuralOde::from_field(&vars, "ode", DType::F64, &Device::Cpu, build).unwrap();
        let weight = named(&vars, "ode.weight");
        match unchanged(&[&y0, &weight], || {
            error(ode.solve(y0.as_tensor(), &[0.25, 1.0]))
        }) {
            Error::UntrackedVelocity { t } | Error::ForeignParameter { t } => assert_eq!(t, 0.25),
            other => panic!("{other}"),
        }
    }
}

#[test]
fn a_state_tensor_whose_velocity_is_untracked_is_refused() {
    // q' = p is tracked, p' = −sin q is not: gradients would lack the force without a word.
    let (q, p) = (var(&[2], 1.0, 1), var(&[2], 1.0, 2));
    let field = |_: &Time, (q, p): &(Tensor, Tensor)| Ok((p.copy()?, q.detach().sin()?.neg()?));
    let y0 = (q.as_tensor().clone(), p.as_tensor().clone());
    let run = || odeint(field, &y0, &[0.25, 1.0], &method(&EULER, 1));
    let got = unchanged(&[&q, &p], || error(run()));
    assert_is(got, Error::UntrackedVelocity { t: 0.25 });
    // Without a graph the gradient is asked for later, and nothing is refused before.
    let solution = solution(&field, &y0, &[0.25, 1.0], &method(&EULER, 1)).unwrap();
    let pulled = solution.vjp(solution.states());
    assert_is(error(pulled), Error::UntrackedVelocity { t: 1.0 });
    // Two tensors of which one does not read the other are no fault.
    let separate = |_: &Time, (q, p): &(Tensor, Tensor)| Ok((q.neg()?, p.neg()?));
    let solution =
        candle_diffeq::solution(&separate, &y0, &[0.0, 1.0], &method(&EULER, 1)).unwrap();
    solution.vjp(solution.states()).unwrap();
    // A field is told its step there, too, and is looked at once.
    let calls = Calls::default();
    let told = |t: &Time, y: &Tensor| {
        calls.note();
        let [start, end] = t.interval().unwrap();
        y * (end - start)
    };
    let y0 = var(&[2], 1.0, 1);
    let solution =
        candle_diffeq::solution(&told, y0.as_tensor(), &[0.0, 0.5, 2.0], &method(&EULER, 1))
            .unwrap();
    solution.vjp(solution.states()).unwrap();
    let first = calls.count();
    solution.vjp(solution.states()).unwrap();
    assert_eq!(calls.count() - first, 2);
}

/// f(y) = w y of two captured numbers, solved in f64 from t = 0 over 1 to 2.
struct Scaled {
    w: Var,
    y0: Var,
    calls: Calls,
    ys: Tensor,
}

impl Scaled {
    fn new(w: f64, y0: f64, options: &OdeOptions) -> Self {
        Self::over(w, y0, options, DType::F64)
    }

    fn over(w: f64, y0: f64, options: &OdeOptions, dtype: DType) -> Self {
        let leaf = |x: f64| Var::from_tensor(&cpu(&[x]).to_dtype(dtype).unwrap()).unwrap();
        let (w, y0, calls) = (leaf(w), leaf(y0), Calls::default());
        let (weight, noted) = (w.clone(), calls.clone());
        let field = move |_: &Time, y: &Tensor| {
            noted.note();
            y * weight.to_dtype(y.dtype())?
        };
        let ys = odeint(field, y0.as_tensor(), &[0.0, 1.0, 2.0, 3.0], options).unwrap();
        calls.0.store(0, Ordering::SeqCst);
        Self { w, y0, calls, ys }
    }

    /// The error of backward from c · y(end), and how often f was evaluated for it.
    #[track_caller]
    fn backward(&self, c: f64) -> (Error, usize) {
        let loss = (self.ys.i(3).unwrap() * c).unwrap().sum_all().unwrap();
        let got = unchanged(&[&self.w, &self.y0], || loss.backward().unwrap_err());
        assert!(Error::from_candle(&got).is_some(), "{got}");
        (got.into(), self.calls.count())
    }
}

#[test]
fn an_upstream_gradient_that_is_not_finite_is_refused_before_any_evaluation() {
    for bad in [f64::INFINITY, f64::NEG_INFINITY, f64::NAN] {
        let (got, evaluations) = Scaled::new(0.5, 1.0, &method(&EULER, 1)).backward(bad);
        assert_is(got, Error::NonFiniteCotangent);
        assert_eq!(evaluations, 0);
    }
}

#[test]
fn an_adjoint_that_overflows_is_found_at_its_step() {
    // λ is multiplied by 101 at each step back: 1e36, 1.01e38, and beyond f32 in step 1.
    let options = method(&EULER, 1);
    let (got, evaluations) = Scaled::over(100.0, 0.0, &options, DType::F32).backward(1e36);
    assert_is(got, Error::NonFiniteGradient { step: 1, t: 1.0 });
    assert_eq!(evaluations, 2);
    // λ stays at 1e20 and y at 1e30; their product, ∂L/∂w, is beyond f32.
    let (got, _) = Scaled::over(0.0, 1e30, &options, DType::F32).backward(1e20);
    assert_is(got, Error::NonFiniteParameterGradient);
}

#[test]
fn a_time_gradient_that_overflows_is_found_at_its_step() {
    // λ = 1e20 and f = 1e20; their product, ∂L/∂t, is beyond f32, and nothing else is.
    let y0 = Var::new(&[0f32], &Device::Cpu).unwrap();
    let times = Var::new(&[0f64, 1.0, 2.0], &Device::Cpu).unwrap();
    let solved = |on_overflow| {
        let field = constant(|_: &Time, y: &Tensor| y.ones_like()? * 1e20);
        let options = OdeOptions {
            on_overflow,
            ..method(&EULER, 1)
        };
        let ys = odeint(field, y0.as_tensor(), &times, &options).unwrap();
        (ys.i(2).unwrap() * 1e20).unwrap().sum_all().unwrap()
    };
    let got = unchanged(&[&y0, &times], || {
        solved(OnOverflow::Error).backward().unwrap_err()
    });
    assert_is(got.into(), Error::NonFiniteGradient { step: 1, t: 1.0 });
    let grads = solved(OnOverflow::SkipUpdate).backward().unwrap();
    let grad = common::values(grads.get(&times).unwrap());
    assert!(grad.iter().all(|g| g.is_nan()));
}

#[test]
fn parameters_written_between_solve_and_backward_are_noticed_before_any_evaluation() {
    let case = Scaled::new(0.5, 1.0, &method(&EULER, 1));
    let grads = case.ys.sum_all().unwrap().backward().unwrap();
    SGD::new(vec![case.w.clone()], 0.1)
        .unwrap()
        .step(&grads)
        .unwrap();
    case.calls.0.store(0, Ordering::SeqCst);
    let (got, evaluations) = case.backward(1.0);
    assert_is(got, Error::ParametersChanged);
    assert_eq!(evaluations, 0);
    // Written back, all is well; and y0 may be written, the solve has its own.
    case.w.set(&cpu(&[0.5f64])).unwrap();
    case.y0.set(&cpu(&[9f64])).unwrap();
    let again = case.ys.sum_all().unwrap().backward().unwrap();
    assert_eq!(
        bits(again.get(&case.w).unwrap()),
        bits(grads.get(&case.w).unwrap())
    );
}

/// y' = √y at y = 0: a finite velocity whose derivative is infinite, at any scale.
fn cliff(options: OdeOptions) -> (Var, Tensor) {
    let y0 = Var::new(&[0f32], &Device::Cpu).unwrap();
    let options = OdeOptions {
        precision: Some(Precision::f16()),
        method: EULER,
        ..options
    };
    let field = |_: &Time, y: &Tensor| y.sqrt();
    let ys = odeint(field, y0.as_tensor(), &[0.0, 1.0, 3.0], &options).unwrap();
    (y0, ys)
}

#[test]
fn a_scale_that_no_lowering_cures_is_exhausted_at_its_step() {
    let rule = DynamicScaling::default();
    for max_attempts in [1, 3, rule.max_attempts] {
        let recorder = Recorder::default();
        let (y0, ys) = cliff(OdeOptions {
            scaling: Scaling::Dynamic(DynamicScaling {
                max_attempts,
                ..rule
            }),
            recorder: Some(recorder.clone()),
            ..Default::default()
        });
        let loss = ys.i(2).unwrap().sum_all().unwrap();
        let got = unchanged(&[&y0], || loss.backward().unwrap_err());
        let stats = recorder.take();
        // λ = 1 is aimed at 2^9, headroom 64 below 2^15, and halved at every attempt.
        let tried = 0.5f64.powi(stats.vjps as i32 - 1) * 512.0;
        assert_eq!(stats.scale_range, Some((tried, 512.0)));
        assert!(stats.vjps <= max_attempts);
        // Below 2^−24 nothing of S·λ is left in f16.
        assert!(
            stats.vjps == max_attempts || tried <= 2f64.powi(-24),
            "{stats:?}"
        );
        let expected = Error::ScaleExhausted {
            step: 1,
            t: 1.0,
            scale: tried,
            attempts: stats.vjps,
        };
        assert_is(got.into(), expected);
    }
}

#[test]
fn an_update_may_be_skipped_by_gradients_that_are_nan_on_purpose() {
    let skip = || OdeOptions {
        on_overflow: OnOverflow::SkipUpdate,
        ..method(&EULER, 1)
    };
    let all_nan = |x: &Tensor| common::values(x).iter().all(|x| x.is_nan());
    // Upstream, in the adjoint, in the parameter's gradient.
    for (w, y0, c) in [
        (0.5, 1.0, f64::INFINITY),
        (100.0, 0.0, 1e36),
        (0.0, 1e30, 1e20),
    ] {
        let case = Scaled::over(w, y0, &skip(), DType::F32);
        let loss = (case.ys.i(3).unwrap() * c).unwrap().sum_all().unwrap();
        let grads = unchanged(&[&case.w, &case.y0], || loss.backward().unwrap());
        assert!(all_nan(grads.get(&case.w).unwrap()) && all_nan(grads.get(&case.y0).unwrap()));
    }
    // No scale helps.
    let (y0, ys) = cliff(skip());
    let grads = ys.i(2).unwrap().sum_all().unwrap().backward().unwrap();
    assert!(all_nan(grads.get(&y0).unwrap()));
    // Time gradients too.
    let (y0, times) = (
        var(&[2], 1.0, 1),
        Var::new(&[0f64, 1.0], &Device::Cpu).unwrap(),
    );
    let ys = odeint(
        decay::<Tensor>(&Calls::default()),
        y0.as_tensor(),
        &times,
        &skip(),
    )
    .unwrap();
    let grads = (ys * f64::INFINITY)
        .unwrap()
        .sum_all()
        .unwrap()
        .backward()
        .unwrap();
    assert!(all_nan(grads.get(&times).unwrap()) && all_nan(grads.get(&y0).unwrap()));
    // What is no overflow stays an error.
    let case = Scaled::new(0.5, 1.0, &skip());
    case.w.set(&cpu(&[0.6f64])).unwrap();
    assert_is(case.backward(1.0).0, Error::ParametersChanged);
}

#[test]
fn a_solution_without_a_graph_leaves_the_policy_to_its_caller() {
    let options = OdeOptions {
        on_overflow: OnOverflow::SkipUpdate,
        ..method(&EULER, 1)
    };
    let field = decay::<Tensor>(&Calls::default());
    let solution = solution(&field, &cpu(&[1f64]), &[0.0, 1.0], &options).unwrap();
    let got = error(solution.vjp(&cpu(&[[0.0], [f64::NAN]])));
    assert_is(got, Error::NonFiniteCotangent);
}

#[test]
fn a_loss_scaler_skips_the_step_that_overflowed_and_halves_its_scale() {
    let options = OdeOptions {
        on_overflow: OnOverflow::SkipUpdate,
        ..method(&EULER, 1)
    };
    let mut scaler = LossScaler::default();
    // Scaled by 2^16, 1e36 is beyond f32 before it reaches the solve, 1e32 within it; 1 is not.
    let mut scale = 65536.0;
    for (c, expected) in [
        (1e36, Stepped::Skipped),
        (1e32, Stepped::Skipped),
        (1.0, Stepped::Taken),
    ] {
        let case = Scaled::over(100.0, 0.0, &options, DType::F32);
        let loss = (case.ys.i(3).unwrap() * c).unwrap().sum_all().unwrap();
        let vars = [case.w.clone(), case.y0.clone()];
        let mut sgd = SGD::new(vars.to_vec(), 1e-3).unwrap();
        let before = vars.each_ref().map(|v| bits(v));
        assert_eq!(
            scaler.backward_step(&loss, &vars, &mut sgd).unwrap(),
            expected
        );
        let skipped = expected == Stepped::Skipped;
        assert_eq!(vars.each_ref().map(|v| bits(v)) == before, skipped);
        scale = if skipped { scale / 2.0 } else { scale };
        assert_eq!(scaler.scale, scale);
    }
}

#[test]
fn a_cotangent_that_does_not_fit_is_refused_before_any_evaluation() {
    let calls = Calls::default();
    let field = decay::<(Tensor, Tensor)>(&calls);
    let y0 = (cpu(&[1f64, 2.0]), cpu(&[3f64]));
    let options = method(&RK4, 1);
    let solved = solution(&field, &y0, &[0.0, 1.0, 2.0], &options).unwrap();
    let forward = calls.count();
    let good = |n| Tensor::ones((3, n), DType::F64, &Device::Cpu).unwrap();
    let got = error(solved.vjp(&(good(2), good(2))));
    let (expected, shape) = (Shape::from((3, 1)), Shape::from((3, 2)));
    assert_is(
        got,
        Error::CotangentShape {
            expected,
            got: shape,
        },
    );
    let tracked = Var::from_tensor(&good(1)).unwrap();
    let got = error(solved.vjp(&(good(2), tracked.as_tensor().clone())));
    assert_is(got, Error::TrackedCotangent);
    let tracked = tracked.as_tensor().sqr().unwrap();
    assert_is(
        error(solved.vjp(&(good(2), tracked))),
        Error::TrackedCotangent,
    );
    let nan = (good(1) * f64::NAN).unwrap();
    assert_is(
        error(solved.vjp(&(good(2), nan))),
        Error::NonFiniteCotangent,
    );

    let field = decay::<Vec<Tensor>>(&calls);
    let y0 = vec![y0.0, y0.1];
    let solved = solution(&field, &y0, &[0.0, 1.0, 2.0], &options).unwrap();
    let got = error(solved.vjp(&vec![good(2)]));
    assert_is(
        got,
        Error::LeafCount {
            expected: 2,
            got: 1,
        },
    );
    assert_eq!(calls.count(), 2 * forward);
}

#[test]
fn a_solution_that_kept_nothing_has_no_gradients_to_give() {
    let options = OdeOptions {
        checkpoint: Checkpoint::Nothing,
        output: Output::Final,
        ..method(&RK4, 1)
    };
    let (calls, y0) = (Calls::default(), cpu(&[1f64, 2.0]));
    let field = decay::<Tensor>(&calls);
    let solution = solution(&field, &y0, &[0.0, 1.0], &options).unwrap();
    assert_is(error(solution.vjp(&y0)), Error::NothingKept);
    assert_eq!(calls.count(), 4);
    let vars = VarMap::new();
    let ode = neural(&vars, &calls, |vb| vb.get(2, "bias")).options(options);
    let y0 = cpu(&[[1f32, 2.0]]);
    let solution = ode.solution(&y0, &[0.0, 1.0]).unwrap();
    assert_is(error(solution.vjp(&y0)), Error::NothingKept);
    // In candle's graph that shows in backward, and is no gradient left out in silence.
    let y = ode.solve(&y0, &[0.0, 1.0]).unwrap();
    let got = y.sum_all().unwrap().backward().unwrap_err();
    assert_is(got.into(), Error::NothingKept);
}

#[test]
fn a_state_has_as_many_tensors_as_its_type() {
    let x = || cpu(&[1f64]);
    let wrong = |expected, got| Error::LeafCount { expected, got };
    assert_is(error(Tensor::from_leaves(vec![])), wrong(1, 0));
    assert_is(
        error(<(Tensor, Tensor)>::from_leaves(vec![x()])),
        wrong(2, 1),
    );
    let got = error(<(Tensor, Tensor, Tensor)>::from_leaves(vec![x(), x()]));
    assert_is(got, wrong(3, 2));
    assert_is(error(<[Tensor; 4]>::from_leaves(vec![x(); 5])), wrong(4, 5));
}

#[test]
fn an_error_of_the_field_keeps_its_message_and_says_where_it_happened() {
    let fails_at = |at: usize| {
        let calls = Calls::default();
        let w = Tensor::ones((3, 3), DType::F64, &Device::Cpu).unwrap();
        move |_: &Time, y: &Tensor| match calls.note() == at {
            true => y.matmul(&w),
            false => y.neg(),
        }
    };
    let y0 = var(&[1, 2], 1.0, 1);
    let options = OdeOptions {
        check: FieldCheck::Never,
        ..method(&RK4, 1)
    };
    let times = [0.0, 1.0, 3.0];
    let says = |error: Error, place: &str| {
        assert!(matches!(error, Error::Candle(_)));
        let text = error.to_string();
        assert!(text.contains("shape mismatch in matmul"), "{text}");
        assert!(text.contains(place), "{text}");
    };
    let ninth = fails_at(6);
    let got = unchanged(&[&y0], || {
        error(odeint(ninth, y0.as_tensor(), &times, &options))
    });
    says(got, "step 1, stage 2, t = 2");
    // In the backward pass, which starts with the eight evaluations of the last step.
    let field = fails_at(8 + 3);
    let ys = odeint(field, y0.as_tensor(), &times, &options).unwrap();
    let got = unchanged(&[&y0], || ys.sum_all().unwrap().backward().unwrap_err());
    says(got.into(), "step 1, stage 3, t = 3");
}

#[test]
fn an_error_of_the_pull_back_keeps_its_message_and_says_where_it_happened() {
    // candle has no backward of this operation.
    let field = |_: &Time, y: &Tensor| {
        let kernel = Tensor::ones((1, 1, 1), DType::F64, &Device::Cpu)?;
        let k = y
            .reshape((1, 1, 2))?
            .conv_transpose1d(&kernel, 0, 0, 1, 1, 1)?;
        k.reshape(2)
    };
    let y0 = var(&[2], 1.0, 1);
    let ys = odeint(field, y0.as_tensor(), &[0.0, 1.0, 3.0], &method(&EULER, 1)).unwrap();
    let got = ys.sum_all().unwrap().backward().unwrap_err();
    let text = Error::from(got).to_string();
    assert!(
        text.contains("backward is not supported for conv-transpose1d"),
        "{text}"
    );
    assert!(text.contains("step 1, stage 0, t = 1"), "{text}");
}

/// y' = w y with a pull-back of the user's.
struct OwnPullback {
    w: Tensor,
    pull: fn(&Tensor, &Tensor) -> candle_core::Result<Cotangents<Tensor>>,
}

impl VectorField for OwnPullback {
    fn velocity(&self, _: &Time, y: &Tensor) -> candle_core::Result<Tensor> {
        y.broadcast_mul(&self.w.detach())
    }

    fn vjp<'f>(
        &'f self,
        t: &Time,
        y: &Tensor,
    ) -> candle_core::Result<(Tensor, Pullback<'f, Tensor>)> {
        let pull = |v: &Tensor| (self.pull)(v, &self.w);
        Ok((self.velocity(t, y)?, Box::new(pull)))
    }

    fn parameters(&self) -> Option<Vec<Tensor>> {
        Some(vec![self.w.clone()])
    }
}

/// The right cotangents of an `OwnPullback` at y = 1, and what `change` makes of them.
fn pulled(
    v: &Tensor,
    w: &Tensor,
    change: impl Fn(&mut Cotangents<Tensor>) -> candle_core::Result<()>,
) -> candle_core::Result<Cotangents<Tensor>> {
    let mut cotangents = Cotangents::of_state(v.broadcast_mul(&w.detach())?);
    cotangents.params.insert(w, v.sum(0)?);
    change(&mut cotangents)?;
    Ok(cotangents)
}

#[test]
fn a_pull_back_whose_cotangents_do_not_fit_is_refused_at_its_stage() {
    use PullbackDefect as D;
    let w = var(&[2], 1.0, 1);
    let y0 = Tensor::ones((1, 2), DType::F64, &Device::Cpu).unwrap();
    let vjp = |pull: fn(&Tensor, &Tensor) -> candle_core::Result<Cotangents<Tensor>>| {
        let field = OwnPullback {
            w: w.as_tensor().clone(),
            pull,
        };
        let solution = solution(&field, &y0, &[0.0, 1.0, 3.0], &method(&HEUN, 1)).unwrap();
        solution.vjp(solution.states()).map(|_| ())
    };
    vjp(|v, w| pulled(v, w, |_| Ok(()))).unwrap();
    // Gradients of another float dtype are summed as they are, and one element is a number.
    vjp(|v, w| {
        pulled(v, w, |c| {
            c.params.insert(w, v.sum(0)?.to_dtype(DType::BF16)?);
            c.t = Some(Tensor::zeros(1, DType::F32, v.device())?);
            Ok(())
        })
    })
    .unwrap();
    let shape = |of, expected: &[usize], got: &[usize]| D::Shape {
        of,
        expected: Shape::from(expected),
        got: Shape::from(got),
    };
    let dtype = |of, expected, got| D::Dtype { of, expected, got };
    type Pull = fn(&Tensor, &Tensor) -> candle_core::Result<Cotangents<Tensor>>;
    let cases: [(Pull, PullbackDefect); 7] = [
        // As many elements, so that sums would go through.
        (
            |v, w| {
                pulled(v, w, |c| {
                    c.y = c.y.t()?;
                    Ok(())
                })
            },
            shape(Argument::State(0), &[1, 2], &[2, 1]),
        ),
        (
            |v, w| {
                pulled(v, w, |c| {
                    c.params.insert(w, v.copy()?);
                    Ok(())
                })
            },
            shape(Argument::Parameter(0), &[2], &[1, 2]),
        ),
        (
            |v, w| {
                pulled(v, w, |c| {
                    c.t = Some(v.sum(0)?);
                    Ok(())
                })
            },
            shape(Argument::Time, &[], &[2]),
        ),
        (
            |v, w| {
                pulled(v, w, |c| {
                    c.y = c.y.to_dtype(DType::F32)?;
                    Ok(())
                })
            },
            dtype(Argument::State(0), DType::F64, DType::F32),
        ),
        (
            |v, w| {
                pulled(v, w, |c| {
                    c.params.insert(w, v.sum(0)?.to_dtype(DType::U32)?);
                    Ok(())
                })
            },
            dtype(Argument::Parameter(0), DType::F64, DType::U32),
        ),
        (
            |v, w| {
                pulled(v, w, |c| {
                    c.t = Some(Tensor::zeros((), DType::U32, v.device())?);
                    Ok(())
                })
            },
            dtype(Argument::Time, DType::F32, DType::U32),
        ),
        // A copy of the parameter is another tensor.
        (
            |v, w| {
                pulled(v, w, |c| {
                    c.params.insert(&w.copy()?, v.sum(0)?);
                    Ok(())
                })
            },
            D::Unlisted { count: 1 },
        ),
    ];
    for (pull, defect) in cases {
        let got = error(vjp(pull));
        assert!(got.to_string().contains("pull-back (not the velocity)"));
        assert_is(
            got,
            Error::InvalidPullback {
                step: 1,
                stage: 1,
                t: 3.0,
                defect,
            },
        );
    }
}

#[test]
fn a_pull_back_of_fewer_tensors_than_the_state_has_is_refused() {
    struct Short;
    impl VectorField<Vec<Tensor>> for Short {
        fn velocity(&self, _: &Time, y: &Vec<Tensor>) -> candle_core::Result<Vec<Tensor>> {
            Ok(y.clone())
        }

        fn vjp(
            &self,
            t: &Time,
            y: &Vec<Tensor>,
        ) -> candle_core::Result<(Vec<Tensor>, Pullback<'_, Vec<Tensor>>)> {
            let pull = |v: &Vec<Tensor>| Ok(Cotangents::of_state(v[..1].to_vec()));
            Ok((self.velocity(t, y)?, Box::new(pull)))
        }

        fn parameters(&self) -> Option<Vec<Tensor>> {
            Some(vec![])
        }
    }
    let y0 = vec![cpu(&[1f64]), cpu(&[2f64])];
    let solution = solution(&Short, &y0, &[0.0, 1.0], &method(&EULER, 1)).unwrap();
    let (step, stage, t) = (0, 0, 0.0);
    let defect = PullbackDefect::LeafCount {
        expected: 2,
        got: 1,
    };
    assert_is(
        error(solution.vjp(solution.states())),
        Error::InvalidPullback {
            step,
            stage,
            t,
            defect,
        },
    );
}

#[test]
fn parameters_that_a_constructor_lists_are_those_it_got() {
    let y0 = cpu(&[[1f32, 1.0]]);
    let ode = |of: fn(&Tensor) -> candle_core::Result<Tensor>| {
        let vars = VarMap::new();
        let build = move |vb: VarBuilder<'_>| {
            let pull = |v: &Tensor, w: &Tensor| pulled(v, w, |_| Ok(()));
            let w = of(&vb.get_with_hints(2, "w", Init::Const(0.5))?)?;
            Ok(OwnPullback { w, pull })
        };
        let ode = NeuralOde::from_field(&vars, "ode", DType::F32, &Device::Cpu, build);
        (ode.unwrap(), vars)
    };
    let (own, vars) = ode(|w| Ok(w.clone()));
    let ys = own.solve(&y0, &[0.0, 1.0]).unwrap();
    let grads = ys.sum_all().unwrap().backward().unwrap();
    assert!(grads.get(&named(&vars, "ode.w")).is_some());
    let (copied, _vars) = ode(Tensor::copy);
    let got = error(copied.solve(&y0, &[0.0, 1.0]));
    assert_is(got, Error::UnknownParameter { index: 0 });
}

/// A function of the user's, whose `?` turns candle's errors into ours.
fn trained(loss: &Tensor) -> Result<()> {
    loss.backward()?;
    Ok(())
}

#[test]
fn an_error_inside_backward_is_found_again_and_restored() {
    let case = Scaled::new(0.5, 1.0, &method(&EULER, 1));
    let loss = (case.ys.i(3).unwrap() * f64::NAN)
        .unwrap()
        .sum_all()
        .unwrap();
    let through_candle = loss.backward().unwrap_err();
    assert!(through_candle
        .to_string()
        .contains("the gradient that arrives from the loss"));
    assert_is(error(trained(&loss)), Error::NonFiniteCotangent);
}

/// candle's wrappings, one after the other; the last three are what its own functions make of an
/// error under RUST_BACKTRACE=1, `.with_path(..)`, and `Context`.
fn wrapped(error: candle_core::Error, how: usize) -> candle_core::Error {
    use candle_core::Error as E;
    match how {
        0 => error,
        1 => error.context("while training"),
        2 => error.with_path("weights.safetensors"),
        3 => E::WithBacktrace {
            inner: Box::new(error),
            backtrace: Box::new(Backtrace::force_capture()),
        },
        _ => Err::<(), _>(error).context("while training").unwrap_err(),
    }
}

#[test]
fn an_error_is_found_behind_any_pile_of_candles_wrappings() {
    let expected = || Error::NonFiniteVelocity {
        step: 3,
        stage: 1,
        t: 0.5,
    };
    for pile in 0..125 {
        let pile = || [pile % 5, pile / 5 % 5, pile / 25].into_iter();
        let error = pile().fold(expected().into(), wrapped);
        let found = Error::from_candle(&error)
            .unwrap_or_else(|| panic!("lost by {:?}", pile().collect::<Vec<_>>()));
        assert_eq!(format!("{found:?}"), format!("{:?}", expected()));
        assert_is(error.into(), expected());
    }
}

#[test]
fn an_error_is_found_behind_the_context_that_a_user_gives_it() {
    // candle's `Context` takes any error, ours too.
    let empty: [f64; 0] = [];
    let field = decay::<Tensor>(&Calls::default());
    let solved = odeint(field, &cpu(&[1f64]), &empty, &OdeOptions::default());
    let error = solved.map(|_| ()).context("while solving").unwrap_err();
    assert!(
        matches!(Error::from_candle(&error), Some(Error::EmptyGrid)),
        "{error}"
    );
    assert_is(error.into(), Error::EmptyGrid);
}

#[test]
fn an_error_of_candles_own_is_passed_on_as_it_is() {
    let candles = cpu(&[1f64]).matmul(&cpu(&[1f64])).unwrap_err();
    assert!(Error::from_candle(&candles).is_none());
    let text = candles.to_string();
    let ours = Error::from(candles);
    assert!(matches!(ours, Error::Candle(_)));
    assert_eq!(ours.to_string(), text);
    assert_eq!(candle_core::Error::from(ours).to_string(), text);
}

#[test]
fn a_variable_that_left_the_map_is_missed_before_any_evaluation() {
    let (vars, calls) = (VarMap::new(), Calls::default());
    let ode = neural(&vars, &calls, |vb| vb.get(2, "bias"));
    vars.data().lock().unwrap().remove("ode.bias");
    let kept = all(&vars);
    let got = unchanged(&[&kept[0].1], || {
        error(ode.solve(&cpu(&[[1f32, 2.0]]), &[0.0, 1.0]))
    });
    assert!(matches!(got, Error::Candle(_)));
    assert!(
        got.to_string().contains("cannot find tensor ode.bias"),
        "{got}"
    );
    assert_eq!(calls.count(), 0);
}

#[test]
fn a_constructor_that_fails_leaves_no_variables_behind() {
    let vars = VarMap::new();
    let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
    vb.get(2, "ode.old").unwrap();
    vb.get(2, "other").unwrap();
    let build = |vb: VarBuilder<'_>| {
        let old = vb.get(2, "old")?;
        vb.get(3, "new")?;
        // Of another shape than it has.
        vb.get(3, "old")?;
        Ok(move |_: &Time, y: &Tensor| y.broadcast_mul(&old))
    };
    let made = NeuralOde::from_field(&vars, "ode", DType::F32, &Device::Cpu, build);
    assert!(matches!(error(made), Error::Candle(_)));
    let names: Vec<_> = all(&vars).into_iter().map(|(name, _)| name).collect();
    assert_eq!(names, ["ode.old", "other"]);
}
