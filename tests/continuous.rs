//! Continuous adjoints: gradients by a solve backward in time.
//!
//! `cargo test --test continuous`, seconds.

#[allow(dead_code)]
#[path = "../examples/conformance/adaptive.rs"]
mod adaptive;
mod common;
#[path = "../examples/conformance/continuous.rs"]
mod continuous;
#[path = "../examples/conformance/flows.rs"]
mod flows;
#[allow(dead_code)]
#[path = "../examples/conformance/oracle.rs"]
mod oracle;
#[allow(dead_code)]
#[path = "../examples/conformance/outcome.rs"]
mod outcome;

use std::path::PathBuf;
use std::rc::Rc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::Arc;

use adaptive::{Kind, PAIRS};
use candle_core::backprop::GradStore;
use candle_core::{DType, Device, Tensor, Var, D};
use candle_diffeq::cde::{cdeint, ControlledField, ControlledPullback, Observations};
use candle_diffeq::dense::odeint_dense;
use candle_diffeq::error::{ContinuousDefect, StopReason};
use candle_diffeq::fields::{Cotangents, FieldCheck, Pullback};
use candle_diffeq::metrics::{BackwardStats, Recorder, Stats};
use candle_diffeq::nn::{Activation, CdeMlp, Mlp, WithIntegral};
use candle_diffeq::options::{
    Adaptive, AdjointNorm, AdjointSolve, AdjointTolerance, Arithmetic, Checkpoint, Gradient, Norm,
    Output, OwnNorm, StepControl, Steps,
};
use candle_diffeq::scaling::{OnOverflow, Scaling};
use candle_diffeq::sde::{
    self, ito, sdeint, stratonovich, BrownianTree, Increments, NeuralSde, Noise, OfField,
    SdeMethod, SdeOptions, EULER_HEUN, EULER_MARUYAMA, HEUN, MIDPOINT, REVERSIBLE_HEUN,
};
use candle_diffeq::tableau::{Tableau, BOSH3, DOPRI5, FEHLBERG45, RK4, TSIT5};
use candle_diffeq::{
    odeint, odeint_with, solution, Error, NeuralOde, OdeOptions, Precision, Time, VectorField,
};
use common::{bits, relative, scattered, values, var, worst, U_BF16, U_F16, U_F32};
use continuous::{has_gradients, BAR, WAYS};
use oracle::Oracle;

fn files() -> Vec<Oracle> {
    let root = std::env::var_os("CARGO_MANIFEST_DIR");
    let root = root.map_or_else(|| env!("CARGO_MANIFEST_DIR").into(), PathBuf::from);
    let mut files = Oracle::read_all(&root.join("tests/data/adaptive")).unwrap();
    files.retain(|file| adaptive::kind(file.problem().unwrap()) == Some(Kind::Flow));
    files
}

#[test]
fn gradients_are_those_of_the_exact_flow() {
    let files: Vec<_> = files().into_iter().filter(has_gradients).collect();
    assert_eq!(files.len(), 6);
    let dopri5 = &PAIRS[0];
    for file in &files {
        for way in &WAYS {
            let flow = way.flow(file, dopri5).unwrap();
            let (error, name) = (flow.gradients(), way.name);
            assert!(error <= BAR, "{} {name}: {error:e}", file.file);
        }
    }
}

/// The three kinds with one backward solve.
fn kinds(solve: &AdjointSolve) -> [Gradient; 3] {
    [
        Gradient::Backsolve(solve.clone()),
        Gradient::Interpolated(solve.clone()),
        Gradient::Quadrature(solve.clone()),
    ]
}

/// Those that can have a norm: a Gauss rule has no error that one could read.
fn kinds_with(norm: AdjointNorm) -> Vec<Gradient> {
    let reads_sums = !matches!(norm, AdjointNorm::Seminorm);
    let [backsolve, interpolated, quadrature] = kinds(&AdjointSolve::new().norm(norm));
    match reads_sums {
        true => vec![backsolve, interpolated],
        false => vec![backsolve, interpolated, quadrature],
    }
}

fn adaptive_options(tol: f64, gradient: Gradient) -> OdeOptions {
    OdeOptions {
        method: DOPRI5,
        steps: Steps::Adaptive(Adaptive::new(tol, 1e-2 * tol).control(StepControl::Batch)),
        gradient,
        ..Default::default()
    }
}

/// A problem of two tensors that are coupled, with arguments and a weight, that reads time.
struct Coupled {
    y0: [Var; 2],
    w: Var,
    a: Var,
    t: Var,
}

/// Gradients of y0, weight, arguments and times, one after the other.
type Gradients = [Vec<f64>; 5];

impl Coupled {
    fn new() -> Self {
        let times = Tensor::new(&[0.1f64, 0.45, 0.8, 1.3], &Device::Cpu).unwrap();
        Self {
            y0: [var(&[3, 2], 1.0, 1), var(&[3, 1], 0.7, 2)],
            w: var(&[2, 2], 1.0, 3),
            a: var(&[2], 0.5, 4),
            t: Var::from_tensor(&times).unwrap(),
        }
    }

    fn gradients(&self, options: &OdeOptions) -> candle_diffeq::Result<Gradients> {
        let w = self.w.as_tensor().clone();
        let f = move |t: &Time, (x, z): &(Tensor, Tensor), a: &Tensor| {
            let t = t.tensor()?;
            let drive = x
                .matmul(&w.t()?)?
                .tanh()?
                .broadcast_add(&a.broadcast_mul(&t.sin()?)?)?;
            let dx = (drive + z.broadcast_mul(x)?.sin()?)?;
            let dz = (x.sqr()?.mean_keepdim(D::Minus1)? - z)?;
            Ok((dx, dz))
        };
        let y0 = (
            self.y0[0].as_tensor().clone(),
            self.y0[1].as_tensor().clone(),
        );
        let (xs, zs) = odeint_with(f, &y0, self.a.as_tensor(), &self.t, options)?;
        let last = |x: &Tensor| x.get(x.dim(0)? - 1);
        let loss = match options.output {
            Output::Final => (xs.sqr()?.sum_all()? + zs.sin()?.sum_all()?)?,
            _ => {
                let weights = scattered(xs.dims(), 1.0, 5);
                let ends = (last(&xs)?.sqr()?.sum_all()? + last(&zs)?.sin()?.sum_all()?)?;
                ((xs * weights)?.sum_all()? + ends)?
            }
        };
        let grads = loss.backward()?;
        let of = |v: &Var| values(grads.get(v).unwrap());
        Ok([&self.y0[0], &self.y0[1], &self.w, &self.a, &self.t].map(of))
    }
}

/// The largest error of a gradient relative to its size.
fn apart(a: &Gradients, b: &Gradients) -> f64 {
    worst(a.iter().zip(b).map(|(a, b)| {
        let size = worst(b.iter().copied());
        worst(a.iter().zip(b).map(|(a, b)| a - b)) / size
    }))
}

#[test]
fn tuple_states_weights_arguments_and_times_have_the_gradients_of_the_discrete_adjoint() {
    let problem = Coupled::new();
    for output in [Output::All, Output::Final] {
        let of = |gradient| OdeOptions {
            output,
            ..adaptive_options(1e-9, gradient)
        };
        let exact = problem.gradients(&of(Gradient::Discrete)).unwrap();
        let mut exact = exact;
        if output == Output::Final {
            // The times between are no outputs: the discrete steps do not depend on them either.
            assert!(worst(exact[4][1..3].iter().copied()) < 1e-7);
            exact[4][1] = 0.0;
            exact[4][2] = 0.0;
        }
        for norm in [
            AdjointNorm::Seminorm,
            AdjointNorm::Largest,
            AdjointNorm::Rms,
        ] {
            for gradient in kinds_with(norm) {
                let got = problem.gradients(&of(gradient.clone())).unwrap();
                let error = apart(&got, &exact);
                assert!(error <= 1e-7, "{gradient:?} {output:?}: {error:e}");
            }
        }
    }
}

#[test]
fn time_may_run_backward() {
    let problem = Coupled::new();
    let times = Tensor::new(&[1.3f64, 0.8, 0.45, 0.1], &Device::Cpu).unwrap();
    let problem = Coupled {
        t: Var::from_tensor(&times).unwrap(),
        ..problem
    };
    let exact = problem.gradients(&adaptive_options(1e-9, Gradient::Discrete));
    let exact = exact.unwrap();
    for gradient in kinds(&AdjointSolve::new()) {
        let got = problem
            .gradients(&adaptive_options(1e-9, gradient.clone()))
            .unwrap();
        let error = apart(&got, &exact);
        assert!(error <= 1e-7, "{gradient:?}: {error:e}");
    }
}

#[test]
fn fixed_steps_converge_with_the_order_of_the_method() {
    let problem = Coupled::new();
    let exact = problem
        .gradients(&adaptive_options(1e-10, Gradient::Discrete))
        .unwrap();
    for gradient in kinds(&AdjointSolve::new()) {
        let cuts: [fn(usize) -> Steps; 2] = [Steps::PerInterval, |n| Steps::Size(0.35 / n as f64)];
        for steps in cuts {
            let errors = [6, 12].map(|n| {
                let options = OdeOptions {
                    method: RK4,
                    steps: steps(n),
                    gradient: gradient.clone(),
                    ..Default::default()
                };
                apart(&problem.gradients(&options).unwrap(), &exact)
            });
            // The interpolant of RK4 is of order 3: 2³, with some room.
            let ratio = errors[0] / errors[1];
            assert!(ratio > 7.0 && errors[1] < 1e-3, "{gradient:?}: {errors:?}");
        }
    }
}

#[test]
fn a_backward_solve_may_have_steps_and_a_method_of_its_own() {
    let problem = Coupled::new();
    let exact = problem
        .gradients(&adaptive_options(1e-9, Gradient::Discrete))
        .unwrap();
    let own = [
        Steps::PerInterval(50),
        Steps::Size(8e-3),
        Steps::At((1..150).map(|i| 0.1 + 0.008 * f64::from(i)).collect()),
    ];
    for steps in own {
        let solve = AdjointSolve::new().method(RK4).steps(steps.clone());
        for gradient in kinds(&solve) {
            let got = problem
                .gradients(&adaptive_options(1e-9, gradient))
                .unwrap();
            let error = apart(&got, &exact);
            assert!(error <= 1e-6, "{steps:?}: {error:e}");
        }
    }
    // Adaptive backward over fixed forward.
    let tight = Steps::Adaptive(Adaptive::new(1e-9, 1e-11));
    let solve = AdjointSolve::new().method(DOPRI5).steps(tight);
    for gradient in kinds(&solve) {
        let options = OdeOptions {
            method: RK4,
            steps: Steps::PerInterval(60),
            gradient,
            ..Default::default()
        };
        let error = apart(&problem.gradients(&options).unwrap(), &exact);
        assert!(error <= 1e-6, "{error:e}");
    }
}

/// y' = rate ∘ y, its gradients by y0 and rate, and what was done.
fn decay(rate: f64, times: &[f64], scale: f64, options: OdeOptions) -> ([f64; 2], Stats) {
    let recorder = Recorder::tracing();
    let options = OdeOptions {
        recorder: Some(recorder.clone()),
        ..options
    };
    let y0 = Var::new(&[1f64, 0.5], &Device::Cpu).unwrap();
    let rate = Var::new(&[rate, 0.9 * rate], &Device::Cpu).unwrap();
    let read = rate.as_tensor().clone();
    let f = move |_: &Time, y: &Tensor| y * &read;
    let ys = odeint(f, y0.as_tensor(), times, &options).unwrap();
    let last = match options.output {
        Output::Final => ys,
        _ => ys.get(ys.dim(0).unwrap() - 1).unwrap(),
    };
    let loss = (last.sum_all().unwrap() * scale).unwrap();
    let grads = loss.backward().unwrap();
    let of = |v: &Var| values(grads.get(v).unwrap())[0];
    ([of(&y0), of(&rate)], recorder.take())
}

/// Relative errors of the gradients of ∫ x² dt over [0, 1] by x(0) and c, where x' = −40 (x − c): solved backward, an error
/// of x grows by e⁴⁰.
fn relaxing(times: &[f64], options: &OdeOptions) -> candle_diffeq::Result<f64> {
    let (rate, x0, c) = (40.0, 2.0, 1.0);
    let x = Var::new(&[[x0]], &Device::Cpu)?;
    let level = Var::new(c, &Device::Cpu)?;
    let read = level.as_tensor().clone();
    let f = move |_: &Time, x: &Tensor| x.broadcast_sub(&read)? * -rate;
    let field = WithIntegral::new(f, |_: &Time, x: &Tensor| x.sqr());
    let start = (x.as_tensor().clone(), x.zeros_like()?);
    let (_, costs) = odeint(field, &start, times, options)?;
    let cost = match options.output {
        Output::Final => costs,
        _ => costs.get(times.len() - 1)?,
    };
    let grads = cost.sum_all()?.backward()?;
    let got = [&x, &level].map(|v| values(grads.get(v).unwrap())[0]);
    // x = c + d e^{−rate t}.
    let integral = |r: f64| (1.0 - (-r).exp()) / r;
    let (d, one, two) = (x0 - c, integral(rate), integral(2.0 * rate));
    let exact = [
        2.0 * (c * one + d * two),
        2.0 * (c * (1.0 - one) + d * (one - two)),
    ];
    Ok(worst(got.iter().zip(exact).map(|(g, e)| g / e - 1.0)))
}

#[test]
fn a_backsolve_of_a_fast_relaxation_is_wrong_and_the_other_kinds_are_right() {
    let errors = kinds(&AdjointSolve::new()).map(|gradient| {
        let options = OdeOptions {
            output: Output::Final,
            ..adaptive_options(1e-8, gradient)
        };
        relaxing(&[0.0, 1.0], &options).unwrap_or(f64::INFINITY)
    });
    assert!(errors[0] > 0.1, "{errors:?}");
    assert!(errors[1].max(errors[2]) < 1e-6, "{errors:?}");
}

#[test]
fn y_starts_anew_at_every_output() {
    let gradient = Gradient::Backsolve(AdjointSolve::new());
    let error = relaxing(&twentieths(), &adaptive_options(1e-8, gradient)).unwrap();
    assert!(error < 1e-6, "{error:e}");
}

/// Outputs a twentieth apart: between two of them an error grows by e² only.
fn twentieths() -> Vec<f64> {
    (0..=20).map(|i| 0.05 * f64::from(i)).collect()
}

#[test]
fn the_drift_of_a_backsolve_says_whether_y_was_the_solution() {
    let run = |times: &[f64], options: OdeOptions| {
        let recorder = Recorder::default();
        let options = OdeOptions {
            recorder: Some(recorder.clone()),
            ..options
        };
        let error = relaxing(times, &options).unwrap_or(f64::INFINITY);
        (recorder.take().backward.drift, error)
    };
    let [backsolve, interpolated, quadrature] = kinds(&AdjointSolve::new());
    for output in [Output::Final, Output::All] {
        let of = |gradient: &Gradient| OdeOptions {
            output,
            ..adaptive_options(1e-8, gradient.clone())
        };
        let (drift, error) = run(&[0.0, 1.0], of(&backsolve));
        println!("{drift:e} {error:e}");
        assert!(drift > 0.1 && error > 0.1, "{drift:e} {error:e}");
        for gradient in [&interpolated, &quadrature] {
            assert_eq!(run(&[0.0, 1.0], of(gradient)).0, 0.0);
        }
    }
    let (drift, error) = run(&twentieths(), adaptive_options(1e-8, backsolve.clone()));
    println!("{drift:e} {error:e}");
    assert!((1e-12..1e-6).contains(&drift) && error < 1e-6, "{drift:e}");
    // Of fixed steps it falls with the order of the method: that of y solved there and back.
    let [coarse, fine] = [10, 20].map(|n| {
        let options = OdeOptions {
            method: RK4,
            steps: Steps::PerInterval(n),
            gradient: backsolve.clone(),
            ..Default::default()
        };
        run(&twentieths(), options).0
    });
    assert!(
        (12.0..40.0).contains(&(coarse / fine)),
        "{coarse:e} {fine:e}"
    );
}

#[test]
fn a_loss_times_a_number_takes_the_same_steps_if_the_tolerance_is_relative() {
    let run = |tolerance, scale| {
        let gradient = Gradient::Backsolve(AdjointSolve::new().tolerance(tolerance));
        decay(
            -1.0,
            &[0.0, 1.0, 2.0],
            scale,
            adaptive_options(1e-6, gradient),
        )
    };
    let small = 2f64.powi(-20);
    let [(one, stats), (less, of_less)] =
        [1.0, small].map(|scale| run(AdjointTolerance::Relative, scale));
    assert_eq!(stats.backward, of_less.backward);
    assert_eq!(one.map(|g| g * small), less);
    let [(_, stats), (_, of_less)] =
        [1.0, small].map(|scale| run(AdjointTolerance::Absolute, scale));
    assert!(of_less.backward.evaluations < stats.backward.evaluations);
}

#[test]
fn evaluations_are_two_to_begin_with_six_an_attempt_and_one_an_output() {
    let times = [0.0, 0.5, 1.1, 2.0];
    for gradient in kinds(&AdjointSolve::new()) {
        let (_, stats) = decay(-3.0, &times, 1.0, adaptive_options(1e-9, gradient.clone()));
        let backward = &stats.backward;
        let attempts = backward.steps + backward.rejected;
        assert_eq!(backward.evaluations, 2 + 6 * attempts + 2, "{gradient:?}");
        assert_eq!(backward.attempts.len(), attempts);
        assert_eq!(stats.vjps, backward.evaluations + backward.points);
        let taken = backward.attempts.iter().filter(|a| a.accepted);
        let taken: Vec<_> = taken.map(|a| [a.from, a.to]).collect();
        assert_eq!((taken[0][0], taken[taken.len() - 1][1]), (2.0, 0.0));
        assert!(taken.windows(2).all(|w| w[0][1] == w[1][0]));
        match gradient {
            Gradient::Quadrature(_) => assert_eq!(backward.points, 3 * backward.steps),
            _ => assert_eq!(backward.points, 0),
        }
    }
}

#[test]
fn rejected_attempts_leave_nothing_in_the_gradient() {
    let bold = Adaptive::new(1e-9, 1e-11).first_step(1.9);
    let solve = AdjointSolve::new().steps(Steps::Adaptive(bold));
    for gradient in kinds(&solve) {
        let (got, stats) = decay(-1.0, &[0.0, 2.0], 1.0, adaptive_options(1e-9, gradient));
        assert!(stats.backward.rejected > 0);
        // y(2) = e^{-2}; its derivative by the rate is 2 e^{-2}.
        let exact = [(-2f64).exp(), 2.0 * (-2f64).exp()];
        let error = worst(got.iter().zip(exact).map(|(g, e)| g / e - 1.0));
        assert!(error < 1e-7, "{error:e}");
    }
}

/// A perceptron with time, solved by a closure over variables; the gradient of its weights.
fn perceptron(gradient: Gradient, tol: f64) -> (Vec<f64>, Stats) {
    let recorder = Recorder::tracing();
    let options = OdeOptions {
        recorder: Some(recorder.clone()),
        output: Output::Final,
        ..adaptive_options(tol, gradient)
    };
    let (w1, w2) = (var(&[2, 16], 1.0, 1), var(&[16, 2], 1.0, 2));
    let (a, b) = (w1.as_tensor().clone(), w2.as_tensor().clone());
    let f = move |t: &Time, y: &Tensor| {
        let hidden = (y.matmul(&a)? * (3.0 * t.value()).cos())?.tanh()?;
        hidden.matmul(&b)
    };
    let y0 = scattered(&[8, 2], 1.0, 3);
    let y = odeint(f, &y0, &[0.0, 3.0], &options).unwrap();
    let grads = y.sqr().unwrap().sum_all().unwrap().backward().unwrap();
    let mut all = values(grads.get(&w1).unwrap());
    all.extend(values(grads.get(&w2).unwrap()));
    (all, recorder.take())
}

#[test]
fn the_seminorm_takes_no_more_evaluations_and_an_own_norm_can_be_the_seminorm() {
    let rms = |x: &Tensor| -> candle_core::Result<f64> {
        x.sqr()?
            .mean_all()?
            .sqrt()?
            .to_dtype(DType::F64)?
            .to_scalar()
    };
    let own = OwnNorm::of_state(move |ratios| {
        assert!(ratios.params.is_empty());
        Ok(f64::max(rms(&ratios.y[0])?, rms(&ratios.adjoint[0])?))
    });
    let all = OwnNorm::of_all(move |ratios| {
        let all = ratios.y.iter().chain(&ratios.adjoint).chain(&ratios.params);
        all.map(rms).try_fold(0.0, |max, r| Ok(f64::max(max, r?)))
    });
    let run = |norm| {
        let gradient = Gradient::Backsolve(AdjointSolve::new().norm(norm));
        perceptron(gradient, 1e-6)
    };
    let (seminorm, stats) = run(AdjointNorm::Seminorm);
    let (same, of_own) = run(AdjointNorm::Own(own));
    assert_eq!(
        stats.backward.attempts.len(),
        of_own.backward.attempts.len()
    );
    let apart = |a: &[f64], b: &[f64]| {
        worst(a.iter().zip(b).map(|(a, b)| a - b)) / worst(b.iter().copied())
    };
    assert!(apart(&seminorm, &same) < 1e-9);
    let (largest, of_largest) = run(AdjointNorm::Largest);
    let (of_all, own_stats) = run(AdjointNorm::Own(all));
    assert!(stats.backward.evaluations < of_largest.backward.evaluations);
    let attempts = [&of_largest, &own_stats].map(|stats| stats.backward.attempts.len());
    assert_eq!(attempts[0], attempts[1]);
    assert!(apart(&largest, &of_all) < 1e-9);
    let (exact, _) = perceptron(Gradient::Discrete, 1e-10);
    for got in [seminorm, largest] {
        assert!(apart(&got, &exact) < 1e-4);
    }
}

#[test]
fn a_backsolve_keeps_nothing_and_interpolation_reads_any_checkpoint() {
    let of = |gradient, checkpoint| {
        let options = OdeOptions {
            checkpoint,
            output: Output::Final,
            ..adaptive_options(1e-8, gradient)
        };
        decay(-2.0, &[0.0, 4.0], 1.0, options)
    };
    let (_, stats) = of(Gradient::Backsolve(AdjointSolve::new()), Checkpoint::All);
    assert_eq!((stats.states_kept, stats.bytes_kept), (0, 0));
    let [_, interpolated, quadrature] = kinds(&AdjointSolve::new());
    for gradient in [interpolated, quadrature] {
        let (all, stats) = of(gradient.clone(), Checkpoint::All);
        let kept = stats.states_kept;
        assert!(kept > 20);
        for checkpoint in [Checkpoint::Every(5), Checkpoint::States(6)] {
            let (got, stats) = of(gradient.clone(), checkpoint);
            assert_eq!(got, all);
            assert!(
                stats.states_kept <= kept / 2,
                "{} of {kept}",
                stats.states_kept
            );
        }
    }
}

#[test]
fn a_solve_that_a_tile_makes_has_a_continuous_adjoint_too() {
    let vars = candle_nn::VarMap::new();
    let device = Device::Cpu;
    let build = |vb: candle_nn::VarBuilder<'_>| Mlp::new(&[2, 16, 2], Activation::Tanh, vb);
    let y0 = scattered(&[6, 2], 1.0, 1);
    let ode = |options: OdeOptions| {
        NeuralOde::from_field(&vars, "f", DType::F64, &device, build)
            .unwrap()
            .options(options)
    };
    ode(OdeOptions::default());
    for (i, var) in vars.all_vars().iter().enumerate() {
        var.set(&scattered(var.dims(), 0.5, i)).unwrap();
    }
    let recorder = Recorder::default();
    let of = |gradient| {
        let adaptive = Adaptive::new(1e-10, 1e-12);
        let ode = ode(OdeOptions {
            steps: Steps::Adaptive(adaptive),
            recorder: Some(recorder.clone()),
            ..adaptive_options(1e-10, gradient)
        });
        let ys = ode.solve(&y0, &[0.0, 0.5, 1.0]).unwrap();
        let loss = ys.sqr().unwrap().mean_all().unwrap();
        let grads = loss.backward().unwrap();
        let grads = vars
            .all_vars()
            .into_iter()
            .map(|v| values(grads.get(&v).unwrap()));
        grads.collect::<Vec<_>>().concat()
    };
    let exact = of(Gradient::Discrete);
    for gradient in kinds(&AdjointSolve::new()) {
        recorder.take();
        let got = of(gradient.clone());
        let stats = recorder.take();
        assert!(stats.backward.steps > 0, "{gradient:?}");
        if matches!(gradient, Gradient::Backsolve(_)) {
            assert_eq!(stats.states_kept, 0);
        }
        let error = worst(got.iter().zip(&exact).map(|(a, b)| a - b));
        assert!(
            error <= 1e-8 * worst(exact.iter().copied()),
            "{gradient:?} {error:e}"
        );
    }
}

#[test]
fn a_solution_without_a_graph_has_the_same_gradients() {
    let rate = var(&[2], 0.8, 1);
    let y0 = var(&[3, 2], 1.0, 2);
    for gradient in kinds(&AdjointSolve::new()) {
        let options = adaptive_options(1e-8, gradient);
        let read = rate.as_tensor().clone();
        let f = move |_: &Time, y: &Tensor| y.sin()?.broadcast_mul(&read);
        let times = [0.0, 0.7, 1.5];
        let solved = solution(&f, y0.as_tensor(), &times, &options).unwrap();
        let cotangent = scattered(&[3, 3, 2], 1.0, 3);
        let grads = solved.vjp(&cotangent).unwrap();
        let ys = odeint(f.clone(), y0.as_tensor(), &times, &options).unwrap();
        let graph = (ys * &cotangent).unwrap().sum_all().unwrap().backward();
        let graph = graph.unwrap();
        assert_eq!(bits(&grads.y0), bits(graph.get(&y0).unwrap()));
        let of_rate = grads.params.get(&rate).unwrap();
        assert_eq!(bits(of_rate), bits(graph.get(&rate).unwrap()));
    }
}

#[test]
fn a_path_whose_slope_jumps_has_the_gradients_of_the_discrete_adjoint() {
    let recorder = Recorder::default();
    let xs = var(&[2, 5, 3], 1.0, 1);
    let w = var(&[4, 12], 0.7, 2);
    let of = |gradient| {
        let path = Observations::new(xs.as_tensor()).unwrap().linear().unwrap();
        let read = w.as_tensor().clone();
        let f = move |_: &Time, z: &Tensor| z.matmul(&read)?.tanh()?.reshape((2, 4, 3));
        let z0 = scattered(&[2, 4], 0.5, 3);
        let options = OdeOptions {
            output: Output::Final,
            recorder: Some(recorder.clone()),
            ..adaptive_options(1e-9, gradient)
        };
        let z = cdeint(f, &z0, &path, path.knots(), &options).unwrap();
        let grads = z.sqr().unwrap().sum_all().unwrap().backward().unwrap();
        [&xs, &w].map(|v| grads.get(v).unwrap().clone())
    };
    let exact = of(Gradient::Discrete);
    for norm in [AdjointNorm::Seminorm, AdjointNorm::Largest] {
        for gradient in kinds_with(norm) {
            let got = of(gradient.clone());
            assert!(recorder.take().backward.steps > 0, "{gradient:?}");
            let error = worst(got.iter().zip(&exact).map(|(g, e)| relative(g, e)));
            assert!(error <= 1e-7, "{gradient:?}: {error:e}");
        }
    }
}

#[test]
fn losses_that_are_integrals_have_the_gradient_of_the_exact_flow() {
    // x' = a x, ∫ x² dt over [0, 1] = x0² (e^{2a} − 1) / 2a.
    let (a, x0) = (0.7f64, 1.3f64);
    let e = (2.0 * a).exp();
    let by_a = x0 * x0 * (e / a - (e - 1.0) / (2.0 * a * a));
    let exact = [x0 * (e - 1.0) / a, by_a];
    let solve = AdjointSolve::new();
    let all = kinds(&solve).into_iter().chain([Gradient::Discrete]);
    for gradient in all {
        let x = Var::new(&[[x0]], &Device::Cpu).unwrap();
        let rate = Var::new(a, &Device::Cpu).unwrap();
        let read = rate.as_tensor().clone();
        let f = move |_: &Time, x: &Tensor| x.broadcast_mul(&read);
        let cost = |_: &Time, x: &Tensor| x.sqr();
        let start = (x.as_tensor().clone(), x.zeros_like().unwrap());
        let options = adaptive_options(1e-10, gradient.clone());
        let field = WithIntegral::new(f, cost);
        let (_, costs) = odeint(field, &start, &[0.0, 0.4, 1.0], &options).unwrap();
        let grads = costs.get(2).unwrap().sum_all().unwrap().backward().unwrap();
        let got = [&x, &rate].map(|v| values(grads.get(v).unwrap())[0]);
        let error = worst(got.iter().zip(exact).map(|(g, e)| g / e - 1.0));
        assert!(error <= 1e-6, "{gradient:?}: {error:e}");
    }
}

/// The gradient of the weights of a perceptron in one precision, of a loss times a number, divided by it.
fn rounded(precision: Precision, gradient: Gradient, tol: f64, scale: f64) -> Vec<f64> {
    let vars = candle_nn::VarMap::new();
    let build = |vb: candle_nn::VarBuilder<'_>| {
        let (a, b) = (vb.get((2, 16), "a")?, vb.get((16, 2), "b")?);
        Ok(move |_: &Time, y: &Tensor| y.matmul(&a)?.tanh()?.matmul(&b))
    };
    let ode = NeuralOde::from_field(&vars, "f", DType::F32, &Device::Cpu, build)
        .unwrap()
        .options(OdeOptions {
            precision: Some(precision),
            output: Output::Final,
            ..adaptive_options(tol, gradient)
        });
    let get = |name: &str| vars.data().lock().unwrap().get(name).unwrap().clone();
    let weights = [get("f.a"), get("f.b")];
    for (i, w) in weights.iter().enumerate() {
        let numbers = scattered(w.dims(), 0.5, i);
        w.set(&numbers.to_dtype(DType::F32).unwrap()).unwrap();
    }
    let y0 = scattered(&[8, 2], 1.0, 3).to_dtype(DType::F32).unwrap();
    let y = ode.solve(&y0, &[0.0, 1.0]).unwrap();
    let loss = (y.sqr().unwrap().sum_all().unwrap() * scale).unwrap();
    let grads = loss.backward().unwrap();
    let of = |w: &Var| values(grads.get(w).unwrap());
    let all = weights.iter().flat_map(of);
    all.map(|g| g / scale).collect()
}

#[test]
fn low_precision_gradients_err_by_its_rounding_and_small_losses_do_not_underflow() {
    let exact = rounded(Precision::f64(), Gradient::Discrete, 1e-9, 1.0);
    let size = worst(exact.iter().copied());
    for gradient in kinds(&AdjointSolve::new()) {
        for (precision, u) in [(Precision::bf16(), U_BF16), (Precision::f16(), U_F16)] {
            // In f16, cotangents of the second loss are below the smallest number.
            for scale in [1.0, 1e-9] {
                let got = rounded(precision, gradient.clone(), 1e-3, scale);
                let error = worst(got.iter().zip(&exact).map(|(g, e)| g - e)) / size;
                assert!(
                    error <= 16.0 * u,
                    "{gradient:?} {precision:?} {scale:e}: {error:e}"
                );
            }
        }
    }
}

#[test]
fn states_at_all_steps_and_intervals_without_a_cotangent_are_met() {
    for gradient in kinds(&AdjointSolve::new()) {
        let options = OdeOptions {
            output: Output::Steps,
            ..adaptive_options(1e-9, gradient.clone())
        };
        let (got, _) = decay(-1.0, &[0.0, 2.0], 1.0, options);
        let exact = [(-2f64).exp(), 2.0 * (-2f64).exp()];
        let error = worst(got.iter().zip(exact).map(|(g, e)| g / e - 1.0));
        assert!(error < 1e-7, "{gradient:?}: {error:e}");
        // Only the state at 1 is looked at: nothing is done behind it.
        let y0 = Var::new(&[1f64], &Device::Cpu).unwrap();
        let recorder = Recorder::tracing();
        let options = OdeOptions {
            recorder: Some(recorder.clone()),
            ..adaptive_options(1e-9, gradient)
        };
        let f = |_: &Time, y: &Tensor| y.neg();
        let ys = odeint(f, y0.as_tensor(), &[0.0, 1.0, 5.0], &options).unwrap();
        let grads = ys.get(1).unwrap().sum_all().unwrap().backward().unwrap();
        let got = values(grads.get(&y0).unwrap())[0];
        assert!((got - (-1f64).exp()).abs() < 1e-8);
        let attempts = recorder.take().backward.attempts;
        assert!(!attempts.is_empty() && attempts.iter().all(|a| a.from <= 1.0));
    }
}

#[test]
fn solutions_between_steps_do_not_go_with_a_continuous_adjoint() {
    let y0 = Tensor::new(&[1f64], &Device::Cpu).unwrap();
    let options = adaptive_options(1e-3, Gradient::Backsolve(AdjointSolve::new()));
    let f = |_: &Time, y: &Tensor| y.neg();
    let dense = odeint_dense(f, &y0, &[0.0, 1.0], &options);
    assert_eq!(
        unavailable(dense.err().unwrap()),
        "events or solutions between steps"
    );
}

/// What cannot be had, of the error that says so.
#[track_caller]
fn unavailable(error: Error) -> &'static str {
    match error {
        Error::Continuous(ContinuousDefect::Unavailable { what, .. }) => what,
        error => panic!("{error}"),
    }
}

#[test]
fn fixed_steps_read_neither_norm_nor_tolerance() {
    let run = |solve: AdjointSolve, kind: fn(AdjointSolve) -> Gradient| {
        let (w, formed) = (Var::new(-1f64, &Device::Cpu).unwrap(), Arc::default());
        let options = OdeOptions {
            method: RK4,
            steps: Steps::PerInterval(5),
            output: Output::Final,
            gradient: kind(solve),
            check: FieldCheck::Never,
            ..Default::default()
        };
        let field = Late {
            w: w.clone(),
            formed: Arc::clone(&formed),
        };
        let y0 = Var::new(&[1f64, 0.5], &Device::Cpu).unwrap();
        let y = odeint(field, y0.as_tensor(), &[0.0, 2.0], &options).unwrap();
        let grads = y.sum_all().unwrap().backward().unwrap();
        let bits = [&w, &y0].map(|v| bits(grads.get(v).unwrap()));
        (bits, formed.load(Ordering::Relaxed))
    };
    for kind in [Gradient::Backsolve, Gradient::Interpolated] {
        let plain = run(AdjointSolve::new(), kind);
        // Four stages with a weight, each once.
        assert_eq!(plain.1, 4 * 5);
        for norm in [AdjointNorm::Largest, AdjointNorm::Rms] {
            let solve = AdjointSolve::new().norm(norm);
            let solve = solve.tolerance(AdjointTolerance::Absolute);
            assert_eq!(run(solve, kind), plain);
        }
    }
}

#[test]
fn one_time_has_no_backward_step() {
    let decay = |_: &Time, y: &Tensor| y.neg();
    let y0 = Var::ones((2, 1), DType::F64, &Device::Cpu).unwrap();
    let options = |gradient| OdeOptions {
        method: DOPRI5,
        steps: Steps::Adaptive(Adaptive::new(1e-6, 1e-6)),
        gradient,
        ..Default::default()
    };
    let ys = odeint(
        decay,
        y0.as_tensor(),
        &[0.5],
        &options(Gradient::Backsolve(AdjointSolve::new())),
    );
    let grads = ys.unwrap().sum_all().unwrap().backward().unwrap();
    assert_eq!(values(grads.get(&y0).unwrap()), [1.0, 1.0]);
}

#[test]
fn times_of_states_inside_intervals_move_with_the_times_that_were_given() {
    let problem = Coupled::new();
    let tight = Steps::Adaptive(Adaptive::new(1e-10, 1e-12));
    let solve = AdjointSolve::new().method(DOPRI5).steps(tight);
    for steps in [Steps::PerInterval(30), Steps::Size(0.011)] {
        let of = |gradient| OdeOptions {
            method: RK4,
            steps: steps.clone(),
            output: Output::Steps,
            gradient,
            ..Default::default()
        };
        let exact = problem.gradients(&of(Gradient::Discrete)).unwrap();
        for gradient in kinds(&solve) {
            // The forward error of RK4; a term that is missing is as large as t̄.
            let error = apart(&problem.gradients(&of(gradient)).unwrap(), &exact);
            assert!(error <= 1e-5, "{steps:?}: {error:e}");
        }
    }
    // Adaptive steps: those that end at a time of the user move with it.
    let of = |gradient| {
        let adaptive = Adaptive::new(1e-9, 1e-11).step_on_outputs(true);
        OdeOptions {
            steps: Steps::Adaptive(adaptive.control(StepControl::Batch)),
            output: Output::Steps,
            ..adaptive_options(1e-9, gradient)
        }
    };
    let exact = problem.gradients(&of(Gradient::Discrete)).unwrap();
    for gradient in kinds(&AdjointSolve::new()) {
        let error = apart(&problem.gradients(&of(gradient)).unwrap(), &exact);
        assert!(error <= 1e-6, "{error:e}");
    }
}

/// Gradients of w and of the times, and what was done, of y' = w c y^p with a c that is looked up by the middle of the step
/// and jumps at unequal distances, once at one of the times.
fn looked_up(power: i32, options: &OdeOptions) -> ([Vec<f64>; 2], Stats) {
    const JUMPS: [f64; 4] = [0.3, 1.3, 1.4, 2.2];
    const SLOPES: [f64; 5] = [1.0, -0.5, 2.0, 0.25, -1.5];
    let recorder = Recorder::default();
    let steps = match &options.steps {
        Steps::Adaptive(adaptive) => Steps::Adaptive(adaptive.clone().jump_t(JUMPS)),
        steps => steps.clone(),
    };
    let options = OdeOptions {
        steps,
        recorder: Some(recorder.clone()),
        ..options.clone()
    };
    let times = Tensor::new(&[0.0f64, 0.7, 1.3, 1.35, 3.0], &Device::Cpu).unwrap();
    let times = Var::from_tensor(&times).unwrap();
    let w = Var::new(&[0.7f64], &Device::Cpu).unwrap();
    let read = w.as_tensor().clone();
    let f = move |t: &Time, y: &Tensor| {
        let [start, end] = t.interval().unwrap();
        let middle = 0.5 * (start + end);
        let slope = SLOPES[JUMPS.iter().filter(|jump| **jump < middle).count()];
        let y = if power == 0 {
            y.ones_like()?
        } else {
            y.clone()
        };
        y.broadcast_mul(&read)? * slope
    };
    let y0 = Tensor::new(&[1f64, 2.0], &Device::Cpu).unwrap();
    let ys = odeint(f, &y0, &times, &options).unwrap();
    let weights = scattered(ys.dims(), 1.0, 1);
    let grads = (ys * weights)
        .unwrap()
        .sum_all()
        .unwrap()
        .backward()
        .unwrap();
    let of = |v: &Var| values(grads.get(v).unwrap());
    ([of(&w), of(&times)], recorder.take())
}

#[test]
fn a_field_is_told_no_interval_that_a_jump_is_inside_of() {
    for output in [Output::All, Output::Final] {
        for (power, bar) in [(0, 1e-13), (1, 1e-8)] {
            let of = |gradient| {
                let options = OdeOptions {
                    output,
                    ..adaptive_options(1e-10, gradient)
                };
                looked_up(power, &options)
            };
            let (exact, stats) = of(Gradient::Discrete);
            if power == 0 {
                assert_eq!(stats.rejected, 0);
            }
            for gradient in kinds(&AdjointSolve::new()) {
                let (got, stats) = of(gradient.clone());
                for (got, exact) in got.iter().zip(&exact) {
                    let error = worst(got.iter().zip(exact).map(|(g, e)| g - e));
                    assert!(error <= bar, "{gradient:?} {output:?} {power}: {error:e}");
                }
                // Every step is exact where c is constant: none is rejected unless it read the wrong c.
                if power == 0 {
                    assert_eq!(stats.backward.rejected, 0, "{gradient:?} {output:?}");
                }
            }
        }
    }
}

#[test]
fn backward_steps_of_their_own_end_where_the_forward_steps_said_that_the_field_jumps() {
    let (exact, _) = looked_up(0, &adaptive_options(1e-10, Gradient::Discrete));
    for steps in [Steps::PerInterval(1), Steps::Size(0.4)] {
        let solve = AdjointSolve::new().method(RK4).steps(steps);
        for gradient in kinds(&solve) {
            let (got, _) = looked_up(0, &adaptive_options(1e-10, gradient));
            let error = worst(got[0].iter().zip(&exact[0]).map(|(g, e)| g - e));
            assert!(error <= 1e-13, "{error:e}");
        }
    }
}

#[test]
fn nothing_is_evaluated_again_behind_the_last_cotangent() {
    for checkpoint in [Checkpoint::All, Checkpoint::Every(4), Checkpoint::States(3)] {
        for gradient in &kinds(&AdjointSolve::new())[1..] {
            let of = |times: &[f64]| {
                let recorder = Recorder::default();
                let options = OdeOptions {
                    steps: Steps::PerInterval(8),
                    gradient: gradient.clone(),
                    checkpoint,
                    recorder: Some(recorder.clone()),
                    ..Default::default()
                };
                let y0 = Var::new(&[1f64], &Device::Cpu).unwrap();
                let f = |_: &Time, y: &Tensor| y.sin();
                let ys = odeint(f, y0.as_tensor(), times, &options).unwrap();
                let grads = ys.get(1).unwrap().sum_all().unwrap().backward().unwrap();
                (values(grads.get(&y0).unwrap()), recorder.take())
            };
            let (short, long) = (of(&[0.0, 1.0]), of(&[0.0, 1.0, 5.0]));
            assert_eq!(short.0, long.0);
            let [short, long] = [short.1, long.1].map(|stats| stats.recomputed);
            match checkpoint {
                // Fewer of the states are kept where the steps are more.
                Checkpoint::States(_) => assert!(long <= 3 * short, "{long} {short}"),
                _ => assert_eq!(long, short, "{checkpoint:?}"),
            }
        }
    }
}

/// The gradient of the weights of a perceptron in f16, of a loss times a number, and what was done.
fn in_f16(
    options: OdeOptions,
    times: &[f64],
    scale: f64,
) -> candle_diffeq::Result<(Vec<f64>, Stats)> {
    let vars = candle_nn::VarMap::new();
    let build = |vb: candle_nn::VarBuilder<'_>| {
        let (a, b) = (vb.get((2, 16), "a")?, vb.get((16, 2), "b")?);
        Ok(move |_: &Time, y: &Tensor| y.matmul(&a)?.tanh()?.matmul(&b))
    };
    let recorder = Recorder::tracing();
    let ode = NeuralOde::from_field(&vars, "f", DType::F32, &Device::Cpu, build)?;
    let ode = ode.options(OdeOptions {
        precision: options.precision.or(Some(Precision::f16())),
        output: Output::Final,
        recorder: Some(recorder.clone()),
        ..options
    });
    let weights = ["f.a", "f.b"].map(|name| common::named(&vars, name));
    for (i, w) in weights.iter().enumerate() {
        w.set(&scattered(w.dims(), 0.9, i).to_dtype(DType::F32)?)?;
    }
    let y0 = scattered(&[8, 2], 1.0, 3).to_dtype(DType::F32)?;
    let y = ode.solve(&y0, times)?;
    let loss = (y.sqr()?.sum_all()? * scale)?;
    let grads = loss.backward()?;
    let all = weights.iter().flat_map(|w| values(grads.get(w).unwrap()));
    Ok((all.collect(), recorder.take()))
}

#[test]
fn gradients_that_overflow_are_nan_where_this_is_the_policy_and_otherwise_an_error() {
    let fixed = AdjointSolve::new().method(RK4).steps(Steps::PerInterval(4));
    for gradient in kinds(&AdjointSolve::new()).into_iter().chain(kinds(&fixed)) {
        let of = |on_overflow| {
            let options = OdeOptions {
                scaling: Scaling::Off,
                on_overflow,
                ..adaptive_options(1e-3, gradient.clone())
            };
            in_f16(options, &[0.0, 1.0], 1e7)
        };
        let (grads, _) = of(OnOverflow::SkipUpdate).unwrap();
        assert!(grads.iter().all(|g| g.is_nan()), "{gradient:?}");
        let error = of(OnOverflow::Error).unwrap_err();
        let is_overflow = matches!(error, Error::NonFiniteGradient { .. });
        assert!(is_overflow, "{gradient:?}: {error}");
    }
}

#[test]
fn small_losses_take_the_same_steps_in_f16_too() {
    for gradient in kinds(&AdjointSolve::new()) {
        let small = 2f64.powi(-20);
        let of = |scale| {
            let options = adaptive_options(1e-4, gradient.clone());
            in_f16(options, &[0.0, 6.0], scale).unwrap()
        };
        let [(one, stats), (less, of_less)] = [1.0, small].map(of);
        assert!(stats.backward.attempts.len() > 4);
        assert_eq!(stats.backward.attempts, of_less.backward.attempts);
        assert_eq!(one.iter().map(|g| g * small).collect::<Vec<_>>(), less);
    }
}

#[test]
fn sums_over_many_steps_are_in_state_precision() {
    // ∂y(1)/∂w of y' = w is a sum of 2¹² terms 2⁻¹²: bf16 would come to a stop at 2⁻⁴.
    let w = Var::new(&[1f32], &Device::Cpu).unwrap();
    for gradient in kinds(&AdjointSolve::new()) {
        let options = OdeOptions {
            method: candle_diffeq::tableau::EULER,
            precision: Some(Precision::bf16()),
            steps: Steps::PerInterval(1 << 12),
            output: Output::Final,
            gradient,
            ..Default::default()
        };
        let read = w.as_tensor().clone();
        let f = move |_: &Time, y: &Tensor| read.to_dtype(y.dtype())?.broadcast_as(y.shape());
        let y0 = Tensor::zeros(1, DType::F32, &Device::Cpu).unwrap();
        let y = odeint(f, &y0, &[0.0, 1.0], &options).unwrap();
        let grads = y.sum_all().unwrap().backward().unwrap();
        assert_eq!(values(grads.get(&w).unwrap()), [1.0]);
    }
}

#[test]
fn options_of_the_forward_pass_hold_in_the_backward_pass() {
    let problem = Coupled::new();
    let exact = problem.gradients(&adaptive_options(1e-9, Gradient::Discrete));
    let exact = exact.unwrap();
    for gradient in kinds(&AdjointSolve::new()) {
        let adaptive = Adaptive::new(1e-9, 1e-11).norm(Norm::WorstRow);
        let worst_row = OdeOptions {
            steps: Steps::Adaptive(adaptive.control(StepControl::Batch)),
            ..adaptive_options(1e-9, gradient.clone())
        };
        let bytes = OdeOptions {
            checkpoint: Checkpoint::Bytes(800),
            ..adaptive_options(1e-9, gradient.clone())
        };
        for options in [worst_row, bytes] {
            let error = apart(&problem.gradients(&options).unwrap(), &exact);
            assert!(error <= 1e-7, "{gradient:?}: {error:e}");
        }
    }
}

#[test]
fn tensors_of_the_state_may_have_precisions_of_their_own() {
    let [x0, z0] = [1, 2].map(|seed| scattered(&[4, 2], 1.0, seed).to_dtype(DType::F32).unwrap());
    let w = Var::new(&[0.7f32, 1.3], &Device::Cpu).unwrap();
    let of = |leaf_precision: Vec<Precision>, gradient| {
        let read = w.as_tensor().clone();
        let f = move |_: &Time, (x, z): &(Tensor, Tensor)| {
            Ok((x.broadcast_mul(&read)?.sin()?, (x * z)?.cos()?))
        };
        let options = OdeOptions {
            leaf_precision,
            output: Output::Final,
            ..adaptive_options(1e-3, gradient)
        };
        let (_, z) = odeint(f, &(x0.clone(), z0.clone()), &[0.0, 1.0], &options).unwrap();
        let grads = z.sqr().unwrap().sum_all().unwrap().backward().unwrap();
        grads.get(&w).unwrap().clone()
    };
    let exact = of(vec![], Gradient::Discrete);
    for gradient in kinds(&AdjointSolve::new()) {
        let mixed = vec![Precision::f32(), Precision::bf16()];
        let error = relative(&of(mixed, gradient.clone()), &exact);
        // Of bf16, not of f32 nor of nothing.
        assert!(
            (U_BF16 / 64.0..=4.0 * U_BF16).contains(&error),
            "{gradient:?}: {error:e}"
        );
    }
}

#[test]
fn limits_of_backward_steps_are_counted() {
    let of = |adaptive: Adaptive| {
        let solve = AdjointSolve::new().steps(Steps::Adaptive(adaptive));
        let options = adaptive_options(1e-8, Gradient::Backsolve(solve));
        decay(-1.0, &[0.0, 2.0], 1.0, options).1.backward
    };
    let plain = of(Adaptive::new(1e-8, 1e-10));
    assert_eq!((plain.forced, plain.limited), (0, 0));
    assert!(plain.tolerance_factor <= 1.0);
    let forced = of(Adaptive::new(1e-8, 1e-10).min_step(0.5));
    assert!(forced.forced > 0 && forced.tolerance_factor > 1.0);
    // Tolerances below the rounding of f16.
    let limited = |is_error: bool| {
        let adaptive = Adaptive::new(1e-6, 1e-8).precision_limit_is_error(is_error);
        let solve = AdjointSolve::new().steps(Steps::Adaptive(adaptive));
        let options = adaptive_options(1e-3, Gradient::Interpolated(solve));
        in_f16(options, &[0.0, 2.0], 1.0)
    };
    assert!(limited(false).unwrap().1.backward.limited > 0);
    let error = limited(true).unwrap_err();
    assert!(matches!(
        error,
        Error::Continuous(ContinuousDefect::Stopped {
            reason: StopReason::PrecisionLimited { .. },
            ..
        })
    ));
}

#[test]
fn norms_of_ones_own_are_given_numbers_in_state_dtype_that_are_finite() {
    let own = OwnNorm::of_all(|ratios| {
        let all = ratios.y.iter().chain(&ratios.adjoint).chain(&ratios.params);
        let mut largest = 0f64;
        for x in all {
            assert_eq!(x.dtype(), DType::F32);
            let rms = x.sqr()?.mean_all()?.sqrt()?.to_scalar::<f32>()?;
            largest = largest.max(rms.into());
        }
        Ok(largest)
    });
    for norm in [AdjointNorm::Own(own), AdjointNorm::Largest] {
        for arithmetic in [Arithmetic::Native, Arithmetic::Rounded] {
            let recorder = Recorder::default();
            // The second weight is unused, and its tolerance is zero.
            let w = [0.5f32, 0.25].map(|w| Var::new(&[w], &Device::Cpu).unwrap());
            let reads = w.clone().map(|w| w.as_tensor().clone());
            let f = move |_: &Time, y: &Tensor| {
                let [a, b] = [&reads[0], &reads[1]].map(|w| w.to_dtype(y.dtype()));
                y.broadcast_mul(&a?)? + y.zeros_like()?.broadcast_mul(&b?)?
            };
            let options = OdeOptions {
                precision: Some(Precision::bf16().arithmetic(arithmetic)),
                steps: Steps::Adaptive(Adaptive::new(1e-2, 0.0)),
                recorder: Some(recorder.clone()),
                ..adaptive_options(
                    1e-2,
                    Gradient::Backsolve(AdjointSolve::new().norm(norm.clone())),
                )
            };
            let y0 = Tensor::new(&[1f32, 2.0], &Device::Cpu).unwrap();
            let y = odeint(f, &y0, &[0.0, 1.0], &options).unwrap();
            let grads = y.get(1).unwrap().sum_all().unwrap().backward().unwrap();
            let [used, unused] = [&w[0], &w[1]].map(|w| values(grads.get(w).unwrap())[0]);
            let error = used / (3.0 * 0.5f64.exp()) - 1.0;
            assert!(error.abs() <= 16.0 * U_BF16 && unused == 0.0, "{error:e}");
        }
    }
}

#[test]
fn parameters_that_are_frozen_have_no_gradient_and_the_others_keep_theirs() {
    let (a, b) = (var(&[2], 0.8, 1), scattered(&[2], 0.6, 2));
    for gradient in kinds(&AdjointSolve::new()) {
        let of = |b: &Tensor, gradient| {
            let (a, b) = (a.as_tensor().clone(), b.clone());
            let f = move |_: &Time, y: &Tensor| y.broadcast_mul(&a)?.sin()?.broadcast_mul(&b);
            let y0 = scattered(&[3, 2], 1.0, 3);
            let ys = odeint(f, &y0, &[0.0, 1.0], &adaptive_options(1e-9, gradient));
            ys.unwrap()
                .sqr()
                .unwrap()
                .sum_all()
                .unwrap()
                .backward()
                .unwrap()
        };
        let tracked = Var::from_tensor(&b).unwrap();
        let frozen = of(&b, gradient.clone());
        let both = of(tracked.as_tensor(), Gradient::Discrete);
        assert!(frozen.get(&b).is_none() && both.get(&tracked).is_some());
        let error = relative(frozen.get(&a).unwrap(), both.get(&a).unwrap());
        assert!(error <= 1e-7, "{error:e}");
    }
}

#[test]
fn a_solve_that_keeps_nothing_has_no_gradients_of_any_kind() {
    let y0 = Var::new(&[1f64], &Device::Cpu).unwrap();
    for gradient in kinds(&AdjointSolve::new()) {
        let options = OdeOptions {
            checkpoint: Checkpoint::Nothing,
            ..adaptive_options(1e-3, gradient)
        };
        let f = |_: &Time, y: &Tensor| y.neg();
        let ys = odeint(f, y0.as_tensor(), &[0.0, 1.0], &options).unwrap();
        let error: Error = ys.sum_all().unwrap().backward().unwrap_err().into();
        assert!(matches!(error, Error::NothingKept), "{error}");
    }
}

/// y' = w y, whose pull-back forms gradients of w when it is asked to, and counts how often.
struct Late {
    w: Var,
    formed: Arc<AtomicUsize>,
}

impl VectorField for Late {
    fn velocity(&self, _: &Time, y: &Tensor) -> candle_core::Result<Tensor> {
        y.broadcast_mul(&self.w.as_detached_tensor())
    }

    fn vjp<'f>(
        &'f self,
        t: &Time,
        y: &Tensor,
    ) -> candle_core::Result<(Tensor, Pullback<'f, Tensor>)> {
        let (k, y) = (self.velocity(t, y)?, y.clone());
        let pull = move |v: &Tensor| {
            self.formed.fetch_add(1, Ordering::Relaxed);
            let mut pulled = Cotangents::of_state(v.broadcast_mul(&self.w.as_detached_tensor())?);
            pulled
                .params
                .insert(self.w.as_tensor(), (v * &y)?.sum_all()?);
            Ok(pulled)
        };
        Ok((k, Box::new(pull)))
    }

    #[allow(clippy::type_complexity)]
    fn vjp_late<'f>(
        &'f self,
        t: &Time,
        y: &Tensor,
    ) -> candle_core::Result<
        Option<(
            Tensor,
            Box<
                dyn Fn(
                        &Tensor,
                    ) -> candle_core::Result<(
                        Tensor,
                        Rc<dyn Fn() -> candle_core::Result<GradStore> + 'f>,
                    )> + 'f,
            >,
        )>,
    > {
        let (k, y) = (self.velocity(t, y)?, y.clone());
        let pull = move |v: &Tensor| {
            let (v, y) = (v.clone(), y.clone());
            let w = v.broadcast_mul(&self.w.as_detached_tensor())?;
            let form = move || {
                self.formed.fetch_add(1, Ordering::Relaxed);
                let mut params = GradStore::default();
                params.insert(self.w.as_tensor(), (&v * &y)?.sum_all()?);
                Ok(params)
            };
            let form: Rc<dyn Fn() -> candle_core::Result<GradStore> + 'f> = Rc::new(form);
            Ok((w, form))
        };
        Ok(Some((k, Box::new(pull))))
    }

    fn parameters(&self) -> Option<Vec<Tensor>> {
        Some(vec![self.w.as_tensor().clone()])
    }
}

#[test]
fn gradients_of_parameters_are_formed_once_a_step_is_accepted() {
    let bold = Adaptive::new(1e-9, 1e-11).first_step(1.9);
    let solve = AdjointSolve::new().steps(Steps::Adaptive(bold));
    let run = |gradient| {
        let (w, formed) = (Var::new(-1f64, &Device::Cpu).unwrap(), Arc::default());
        let recorder = Recorder::default();
        let options = OdeOptions {
            output: Output::Final,
            recorder: Some(recorder.clone()),
            check: FieldCheck::Never,
            ..adaptive_options(1e-9, gradient)
        };
        let field = Late {
            w: w.clone(),
            formed: Arc::clone(&formed),
        };
        let y0 = Tensor::new(&[1f64, 0.5], &Device::Cpu).unwrap();
        let y = odeint(field, &y0, &[0.0, 2.0], &options).unwrap();
        let grads = y.sum_all().unwrap().backward().unwrap();
        let error = values(grads.get(&w).unwrap())[0] / (3.0 * (-2f64).exp()) - 1.0;
        assert!(error.abs() <= 1e-7, "{error:e}");
        (formed.load(Ordering::Relaxed), recorder.take().backward)
    };
    for gradient in &kinds(&solve)[..2] {
        let (formed, backward) = run(gradient.clone());
        assert!(backward.rejected > 0);
        // Five of the seven stages of dopri5 have a weight.
        assert_eq!(formed, 5 * backward.steps, "{gradient:?}");
    }
    let (formed, backward) = run(Gradient::Quadrature(solve.clone()));
    assert_eq!(formed, backward.points);
    // A norm that reads θ̄ needs them in every attempt.
    let largest = solve.norm(AdjointNorm::Largest);
    let (formed, backward) = run(Gradient::Backsolve(largest));
    assert_eq!(formed, backward.evaluations);
}

#[test]
fn gradients_that_are_formed_later_are_freed_of_the_scale() {
    // Cotangents of a loss times 2⁻²⁴ are below the numbers of f16, but for the scale.
    let run = |kind: fn(AdjointSolve) -> Gradient, scaling, loss: f64| {
        let (w, formed) = (Var::new(-1f32, &Device::Cpu).unwrap(), Arc::default());
        let recorder = Recorder::default();
        let options = OdeOptions {
            output: Output::Final,
            precision: Some(Precision::f16()),
            scaling,
            recorder: Some(recorder.clone()),
            check: FieldCheck::Never,
            ..adaptive_options(1e-3, kind(AdjointSolve::new()))
        };
        let field = Late {
            w: w.clone(),
            formed: Arc::clone(&formed),
        };
        let y0 = Tensor::new(&[1f32, 0.5], &Device::Cpu).unwrap();
        let y = odeint(field, &y0, &[0.0, 2.0], &options).unwrap();
        let grads = (y.sum_all().unwrap() * loss).unwrap().backward().unwrap();
        let backward = recorder.take().backward;
        let later = match backward.points {
            0 => 5 * backward.steps,
            points => points,
        };
        assert_eq!(formed.load(Ordering::Relaxed), later);
        values(grads.get(&w).unwrap())[0] / loss
    };
    let exact = 3.0 * (-2f64).exp();
    let small = 2f64.powi(-24);
    for kind in [
        Gradient::Backsolve,
        Gradient::Interpolated,
        Gradient::Quadrature,
    ] {
        let one = run(kind, Scaling::Off, 1.0);
        assert!((one / exact - 1.0).abs() <= 4.0 * U_F16, "{one:e}");
        for scale in [0.25, 1024.0] {
            assert_eq!(run(kind, Scaling::Fixed(scale), 1.0), one);
        }
        assert_eq!(run(kind, Scaling::Fixed(1.0 / small), small), one);
        let lost = run(kind, Scaling::Off, small);
        assert!((lost / exact - 1.0).abs() > 64.0 * U_F16, "{lost:e}");
    }
}

#[test]
fn a_perceptron_in_f16_has_the_gradients_of_f64_by_any_scale() {
    let of = |precision: Precision, scaling, tol, gradient, loss: f64| {
        let vars = candle_nn::VarMap::new();
        let build = |vb: candle_nn::VarBuilder<'_>| Mlp::new(&[2, 16, 2], Activation::Tanh, vb);
        let ode = NeuralOde::from_field(&vars, "f", DType::F32, &Device::Cpu, build);
        let ode = ode.unwrap().options(OdeOptions {
            precision: Some(precision),
            scaling,
            output: Output::Final,
            fusion: false,
            ..adaptive_options(tol, gradient)
        });
        common::scatter(&vars);
        let y0 = scattered(&[8, 2], 1.0, 3).to_dtype(DType::F32).unwrap();
        let y = ode.solve(&y0, &[0.0, 1.0]).unwrap();
        let loss_of_y = (y.sqr().unwrap().sum_all().unwrap() * loss).unwrap();
        let grads = loss_of_y.backward().unwrap();
        let all = common::all(&vars).into_iter();
        let all = all.flat_map(|(_, v)| values(grads.get(&v).unwrap()));
        all.map(|g| g / loss).collect::<Vec<_>>()
    };
    let exact = of(
        Precision::f64(),
        Scaling::Off,
        1e-9,
        Gradient::Discrete,
        1.0,
    );
    let size = worst(exact.iter().copied());
    for gradient in kinds(&AdjointSolve::new()) {
        for (scale, loss) in [(1.0, 1.0), (256.0, 1.0), (2f64.powi(24), 2f64.powi(-24))] {
            let scaling = Scaling::Fixed(scale);
            let got = of(Precision::f16(), scaling, 1e-4, gradient.clone(), loss);
            let error = worst(got.iter().zip(&exact).map(|(g, e)| g - e)) / size;
            assert!(
                error <= 8.0 * U_F16,
                "{gradient:?} {scale}: {:.1} u",
                error / U_F16
            );
        }
    }
}

/// A field that forms all of its gradients at once.
struct AtOnce<F>(F);

impl<F: VectorField> VectorField for AtOnce<F> {
    fn velocity(&self, t: &Time, y: &Tensor) -> candle_core::Result<Tensor> {
        self.0.velocity(t, y)
    }

    fn vjp<'f>(
        &'f self,
        t: &Time,
        y: &Tensor,
    ) -> candle_core::Result<(Tensor, Pullback<'f, Tensor>)> {
        self.0.vjp(t, y)
    }

    fn parameters(&self) -> Option<Vec<Tensor>> {
        self.0.parameters()
    }
}

impl<F: ControlledField> ControlledField for AtOnce<F> {
    fn matrix(&self, t: &Time, z: &Tensor) -> candle_core::Result<Tensor> {
        self.0.matrix(t, z)
    }

    fn vjp<'f>(
        &'f self,
        t: &Time,
        z: &Tensor,
        slope: &Tensor,
    ) -> candle_core::Result<Option<(Tensor, ControlledPullback<'f>)>> {
        self.0.vjp(t, z, slope)
    }

    fn parameters(&self) -> Option<Vec<Tensor>> {
        self.0.parameters()
    }
}

#[test]
fn gradients_that_are_formed_later_have_the_same_bits() {
    let vars = candle_nn::VarMap::new();
    let vb = candle_nn::VarBuilder::from_varmap(&vars, DType::F64, &Device::Cpu);
    let mlp = Mlp::with_time(&[2, 8, 8, 2], Activation::Tanh, vb.pp("f")).unwrap();
    let mlp = mlp.residual();
    let cde = CdeMlp::new(&[2, 8], 3, Activation::Relu, vb.pp("g")).unwrap();
    common::scatter(&vars);
    let xs = scattered(&[4, 5, 3], 1.0, 1);
    let path = Observations::new(&xs).unwrap().linear().unwrap();
    let y0 = scattered(&[4, 2], 1.0, 2);
    for gradient in kinds(&AdjointSolve::new()) {
        let options = OdeOptions {
            output: Output::Final,
            fusion: false,
            ..adaptive_options(1e-6, gradient)
        };
        let of = |y: candle_diffeq::Result<Tensor>| {
            let grads = y.unwrap().sqr().unwrap().sum_all().unwrap().backward();
            let grads = grads.unwrap();
            let found = vars
                .all_vars()
                .into_iter()
                .filter_map(|v| grads.get(&v).map(bits));
            let mut found: Vec<_> = found.collect();
            found.sort();
            found
        };
        let late = of(odeint(mlp.clone(), &y0, &[0.0, 1.0], &options));
        let at_once = of(odeint(AtOnce(mlp.clone()), &y0, &[0.0, 1.0], &options));
        assert!(late == at_once && late.len() == 6);
        let late = of(cdeint(cde.clone(), &y0, &path, path.knots(), &options));
        let at_once = of(cdeint(
            AtOnce(cde.clone()),
            &y0,
            &path,
            path.knots(),
            &options,
        ));
        assert!(late == at_once && late.len() == 4);
    }
}

/// Gradients by y0, μ and σ of the mean of Σ Y(1)², where dY = μ Y dt + σ Y ∘ dW along a Brownian tree.
fn geometric(method: SdeMethod, steps: usize, gradient: Gradient, output: Output) -> [Vec<f64>; 3] {
    let y0 = Var::from_tensor(&scattered(&[40, 2], 1.0, 1)).unwrap();
    let [mu, sigma] = [0.4f64, 0.5].map(|x| Var::new(x, &Device::Cpu).unwrap());
    let (m, s) = (mu.as_tensor().clone(), sigma.as_tensor().clone());
    let sde = stratonovich(
        move |_: &Time, y: &Tensor| y.broadcast_mul(&m),
        move |_: &Time, y: &Tensor| y.broadcast_mul(&s),
    );
    let options = SdeOptions {
        method,
        steps: Steps::PerInterval(steps),
        output,
        gradient,
        ..Default::default()
    };
    let noise = BrownianTree::new(3, 12).unwrap().into();
    let ys = sdeint(sde, y0.as_tensor(), &[0.0, 0.5, 1.0], &noise, &options).unwrap();
    let y = match output {
        Output::Final => ys,
        _ => ys.get(ys.dim(0).unwrap() - 1).unwrap(),
    };
    let grads = y.sqr().unwrap().sum_all().unwrap().backward().unwrap();
    [&y0, &mu, &sigma].map(|v| values(grads.get(v).unwrap()))
}

/// The same exactly: Y(1) = y0 exp(μ + σ W(1)).
fn geometric_exactly() -> [Vec<f64>; 3] {
    let y0 = values(&scattered(&[40, 2], 1.0, 1));
    let noise = Noise::from(BrownianTree::new(3, 12).unwrap());
    let increments = noise
        .increments(&[0.0, 1.0], (40, 2), DType::F64, &Device::Cpu)
        .unwrap();
    let w = values(increments.w());
    let y: Vec<_> = y0
        .iter()
        .zip(&w)
        .map(|(y0, w)| y0 * (0.4 + 0.5 * w).exp())
        .collect();
    let by_sigma: f64 = y.iter().zip(&w).map(|(y, w)| 2.0 * y * y * w).sum();
    let by_y0 = y.iter().zip(&y0).map(|(y, y0)| 2.0 * y * y / y0);
    [
        by_y0.collect(),
        vec![y.iter().map(|y| 2.0 * y * y).sum()],
        vec![by_sigma],
    ]
}

/// The largest error relative to the largest of its kind.
fn furthest(a: &[Vec<f64>; 3], b: &[Vec<f64>; 3]) -> f64 {
    worst(
        a.iter()
            .zip(b)
            .map(|(a, b)| worst(a.iter().zip(b).map(|(a, b)| a - b)) / worst(b.iter().copied())),
    )
}

#[test]
fn stochastic_adjoints_converge_to_the_exact_gradients_and_to_the_discrete_ones() {
    let exact = geometric_exactly();
    for (method, output) in [
        (HEUN, Output::All),
        (HEUN, Output::Final),
        (MIDPOINT, Output::Final),
        (EULER_HEUN, Output::Steps),
    ] {
        let backsolve = Gradient::Backsolve(AdjointSolve::new());
        let [got, discrete] = [backsolve, Gradient::Discrete].map(|gradient| {
            [16, 512].map(|steps| geometric(method, steps, gradient.clone(), output))
        });
        let errors = [0, 1].map(|i| furthest(&got[i], &exact));
        let apart = [0, 1].map(|i| furthest(&got[i], &discrete[i]));
        // Strong order one: 32, with room for the chance of 40 paths.
        for [coarse, fine] in [errors, apart] {
            assert!(coarse / fine > 8.0 && fine < 5e-3, "{errors:?} {apart:?}");
        }
    }
}

#[test]
fn stochastic_adjoints_of_general_noise_models_and_samples_are_near_the_discrete_ones() {
    // Two components and three channels that are mixed, so that no derivative of the diffusion is diagonal.
    let (y0, w) = (var(&[6, 2], 0.7, 1), var(&[2, 6], 0.4, 2));
    let of = |gradient, steps| {
        let (a, b) = (w.as_tensor().clone(), w.as_tensor().clone());
        let sde = stratonovich(
            move |t: &Time, y: &Tensor| y.matmul(&a.narrow(1, 0, 2)?)? * t.value().cos(),
            move |_: &Time, y: &Tensor| y.matmul(&b)?.tanh()?.reshape((12, 2, 3)),
        )
        .general(3);
        let recorder = Recorder::default();
        let options = SdeOptions {
            method: MIDPOINT,
            steps: Steps::PerInterval(steps),
            samples: 2,
            output: Output::Final,
            gradient,
            recorder: Some(recorder.clone()),
            ..Default::default()
        };
        let noise = BrownianTree::new(5, 12).unwrap().into();
        let y = sdeint(sde, y0.as_tensor(), &[0.0, 1.0], &noise, &options).unwrap();
        let grads = y.sqr().unwrap().sum_all().unwrap().backward().unwrap();
        let grads = [&y0, &w].map(|v| grads.get(v).unwrap().clone());
        (grads, recorder.take())
    };
    let mut drifts = vec![];
    let apart = [64, 1024].map(|steps| {
        let (got, stats) = of(Gradient::Backsolve(AdjointSolve::new()), steps);
        assert_eq!((stats.states_kept, stats.backward.steps), (0, steps));
        drifts.push(stats.backward.drift);
        let (exact, _) = of(Gradient::Discrete, steps);
        worst(got.iter().zip(&exact).map(|(g, e)| relative(g, e)))
    });
    // Strong order ½: 4.
    assert!(apart[0] / apart[1] > 2.0 && apart[1] < 0.02, "{apart:?}");
    // And so does the distance of y, solved there and back.
    assert!(drifts[0] / drifts[1] > 2.0 && drifts[1] > 0.0, "{drifts:?}");
}

#[test]
fn a_stochastic_adjoint_in_low_precision_errs_by_its_rounding() {
    let vars = candle_nn::VarMap::new();
    let of = |gradient, precision, steps| {
        let sde = NeuralSde::new(&vars, "sde", DType::F32, &Device::Cpu, |vb| {
            let drift = Mlp::new(&[2, 8, 2], Activation::Tanh, vb.pp("drift"))?;
            let spread = Mlp::new(&[2, 8, 2], Activation::Tanh, vb.pp("spread"))?;
            Ok(stratonovich(drift, OfField(spread)))
        });
        let sde = sde.unwrap().options(SdeOptions {
            method: HEUN,
            steps: Steps::PerInterval(steps),
            output: Output::Final,
            precision: Some(precision),
            gradient,
            ..Default::default()
        });
        common::scatter(&vars);
        let y0 = scattered(&[8, 2], 1.0, 1).to_dtype(DType::F32).unwrap();
        let noise = BrownianTree::new(4, 12).unwrap().into();
        let y = sde.solve(&y0, &[0.0, 1.0], &noise).unwrap();
        let grads = y.sqr().unwrap().sum_all().unwrap().backward().unwrap();
        let all = common::all(&vars).into_iter();
        let all = all.flat_map(|(_, v)| values(grads.get(&v).unwrap()));
        all.collect::<Vec<_>>()
    };
    let backsolve = || Gradient::Backsolve(AdjointSolve::new());
    let apart = |got: &[f64], exact: &[f64]| {
        worst(got.iter().zip(exact).map(|(g, e)| g - e)) / worst(exact.iter().copied())
    };
    // Of the same steps in f64: what is left is rounding.
    let exact = of(backsolve(), Precision::f64(), 256);
    // Roundings of the compute precision do not add up; those of the state are a random walk of 512 sums of y and λ.
    for (precision, u, bar) in [
        (Precision::f32(), U_F32, 4.0 * 512f64.sqrt()),
        (Precision::bf16(), U_BF16, 8.0),
        (Precision::f16(), U_F16, 8.0),
    ] {
        let error = apart(&of(backsolve(), precision, 256), &exact) / u;
        assert!((0.01..=bar).contains(&error), "{precision:?}: {error:.2} u");
    }
    // The error of the steps is another one, which falls with their strong order.
    let [coarse, fine] = [16, 256].map(|steps| {
        let discrete = of(Gradient::Discrete, Precision::f64(), steps);
        apart(&of(backsolve(), Precision::f64(), steps), &discrete)
    });
    assert!(coarse / fine > 4.0, "{coarse:e} {fine:e}");
}

#[test]
fn stochastic_adjoints_that_do_not_exist_are_errors() {
    let y0 = Tensor::ones((2, 1), DType::F64, &Device::Cpu).unwrap();
    let f = |_: &Time, y: &Tensor| y.neg();
    let backsolve = || Gradient::Backsolve(AdjointSolve::new());
    let of = |is_ito: bool, options: SdeOptions| {
        let noise = Noise::from(BrownianTree::new(1, 10).unwrap());
        match is_ito {
            true => sdeint(ito(f, f), &y0, &[0.0, 1.0], &noise, &options),
            false => sdeint(stratonovich(f, f), &y0, &[0.0, 1.0], &noise, &options),
        }
    };
    let with = |method, gradient, steps| SdeOptions {
        method,
        gradient,
        steps,
        ..Default::default()
    };
    let fixed = || Steps::PerInterval(4);
    let of_options = [
        AdjointSolve::new().steps(Steps::PerInterval(9)),
        AdjointSolve::new().method(RK4),
        AdjointSolve::new().norm(AdjointNorm::Largest),
        AdjointSolve::new().tolerance(AdjointTolerance::Absolute),
        AdjointSolve::new().points(2),
    ];
    for solve in of_options {
        let error = of(false, with(HEUN, Gradient::Backsolve(solve), fixed())).unwrap_err();
        assert_eq!(unavailable(error), "options of its own along noise");
    }
    let adaptive = Steps::Adaptive(Adaptive::new(1e-2, 1e-2));
    let [_, interpolated, quadrature] = kinds(&AdjointSolve::new());
    for (is_ito, options, what) in [
        (
            true,
            with(EULER_MARUYAMA, backsolve(), fixed()),
            "noise in the sense of Itô that is not additive",
        ),
        (
            false,
            with(REVERSIBLE_HEUN, backsolve(), fixed()),
            REVERSIBLE_HEUN.name(),
        ),
        (
            false,
            with(HEUN, interpolated, fixed()),
            "noise where y is interpolated",
        ),
        (
            false,
            with(HEUN, quadrature, fixed()),
            "noise where y is interpolated",
        ),
        (
            false,
            with(HEUN, backsolve(), adaptive),
            "adaptive steps along noise",
        ),
    ] {
        assert_eq!(unavailable(of(is_ito, options).unwrap_err()), what);
    }
    assert!(of(false, with(HEUN, backsolve(), fixed())).is_ok());
}

#[test]
fn an_interpolant_that_is_less_accurate_than_its_steps_shows_in_the_gradient() {
    let problem = Coupled::new();
    let exact = problem.gradients(&adaptive_options(1e-11, Gradient::Discrete));
    let exact = exact.unwrap();
    let of = |method: Tableau, tol, kind: fn(AdjointSolve) -> Gradient| {
        // λ is solved by the same method everywhere: what differs is y between the steps.
        let gradient = kind(AdjointSolve::new().method(DOPRI5));
        let options = OdeOptions {
            method,
            ..adaptive_options(tol, gradient)
        };
        apart(&problem.gradients(&options).unwrap(), &exact)
    };
    for method in [DOPRI5, TSIT5, BOSH3] {
        for tol in [1e-5, 1e-8] {
            let error = of(method.clone(), tol, Gradient::Interpolated);
            assert!(error <= 100.0 * tol, "{} {tol:e}: {error:e}", method.name());
        }
    }
    let [interpolated, backsolve] = [Gradient::Interpolated, Gradient::Backsolve]
        .map(|kind: fn(AdjointSolve) -> Gradient| of(FEHLBERG45, 1e-5, kind));
    assert!(
        interpolated > 2.0 * backsolve,
        "{interpolated:e} {backsolve:e}"
    );
}

#[test]
fn backward_steps_that_f32_does_not_resolve_are_an_error_of_a_field_that_reads_time() {
    // Near 10⁸ times of f32 are 8 apart.
    let times = Tensor::new(&[1e8f64, 1e8 + 64.0], &Device::Cpu).unwrap();
    let times = Var::from_tensor(&times).unwrap();
    let f = |t: &Time, y: &Tensor| {
        let pace = (t.tensor()? * 1e-10)?.cos()?;
        y.neg()?.broadcast_mul(&pace)? * 1e-3
    };
    for norm in [AdjointNorm::Seminorm, AdjointNorm::Largest] {
        for kind in [Gradient::Backsolve, Gradient::Interpolated] {
            let of = |longest: f64| {
                let steps = Adaptive::new(1e-2, 1e-2).first_step(longest);
                let steps = steps.max_step(longest);
                let solve = AdjointSolve::new().method(DOPRI5).norm(norm.clone());
                let options = OdeOptions {
                    method: RK4,
                    steps: Steps::PerInterval(4),
                    gradient: kind(solve.steps(Steps::Adaptive(steps))),
                    ..Default::default()
                };
                let y0 = Var::new(&[1f32], &Device::Cpu).unwrap();
                let ys = odeint(f, y0.as_tensor(), &times, &options).unwrap();
                ys.sum_all().unwrap().backward()
            };
            assert!(of(16.0).is_ok());
            let error: Error = of(2.0).unwrap_err().into();
            assert!(matches!(error, Error::TimeUnresolved { .. }), "{error}");
        }
    }
}

#[test]
fn additive_noise_has_a_stochastic_adjoint_in_both_senses() {
    // dY = −sin(a Y) dt + s (1 + t) dW.
    let [y0, a, s] = [var(&[40, 2], 1.0, 1), var(&[1], 1.3, 2), var(&[1], 0.6, 3)];
    let of = |is_ito: bool, gradient: Gradient, steps: usize| {
        let (a_, s_) = (a.as_tensor().clone(), s.as_tensor().clone());
        let drift = move |_: &Time, y: &Tensor| y.broadcast_mul(&a_)?.sin()?.neg();
        let spread = move |t: &Time, y: &Tensor| {
            let s = (s_.clone() * (1.0 + t.value()))?;
            y.zeros_like()?.broadcast_add(&s)
        };
        let options = SdeOptions {
            method: if is_ito { EULER_MARUYAMA } else { HEUN },
            steps: Steps::PerInterval(steps),
            output: Output::Final,
            gradient,
            ..Default::default()
        };
        let noise = BrownianTree::new(3, 12).unwrap().into();
        let y = match is_ito {
            true => {
                let sde = ito(drift, spread).additive();
                sdeint(sde, y0.as_tensor(), &[0.0, 1.0], &noise, &options)
            }
            false => {
                let sde = stratonovich(drift, spread).additive();
                sdeint(sde, y0.as_tensor(), &[0.0, 1.0], &noise, &options)
            }
        };
        let grads = y.unwrap().sqr().unwrap().sum_all().unwrap();
        let grads = grads.backward().unwrap();
        [&y0, &a, &s].map(|v| values(grads.get(v).unwrap()))
    };
    for is_ito in [true, false] {
        let [coarse, fine] = [16, 512].map(|steps| {
            let backsolve = Gradient::Backsolve(AdjointSolve::new());
            furthest(
                &of(is_ito, backsolve, steps),
                &of(is_ito, Gradient::Discrete, steps),
            )
        });
        assert!(coarse / fine > 8.0 && fine < 5e-3, "{coarse:e} {fine:e}");
    }
}

#[test]
fn noise_that_is_not_additive_as_declared_is_an_error_of_the_stochastic_adjoint() {
    let y0 = var(&[4, 2], 1.0, 1);
    let sde = ito(
        |_: &Time, y: &Tensor| y.neg(),
        |_: &Time, y: &Tensor| y * 0.3,
    );
    let options = SdeOptions {
        method: EULER_MARUYAMA,
        steps: Steps::PerInterval(4),
        gradient: Gradient::Backsolve(AdjointSolve::new()),
        ..Default::default()
    };
    let noise = Noise::seeded(1);
    let y = sdeint(
        sde.additive(),
        y0.as_tensor(),
        &[0.0, 1.0],
        &noise,
        &options,
    )
    .unwrap();
    let error = y.sum_all().unwrap().backward().unwrap_err();
    assert!(error.to_string().contains("additive"), "{error}");
}

#[test]
fn increments_that_are_given_have_no_gradient_by_a_stochastic_adjoint() {
    let y0 = var(&[4, 2], 1.0, 1);
    let times = [0.0, 0.5, 1.0];
    let equation = || {
        stratonovich(
            |_: &Time, y: &Tensor| y.neg(),
            |_: &Time, y: &Tensor| y * 0.3,
        )
    };
    let options = SdeOptions {
        method: HEUN,
        steps: Steps::PerInterval(1),
        output: Output::Final,
        gradient: Gradient::Backsolve(AdjointSolve::new()),
        ..Default::default()
    };
    let given = Noise::seeded(2).increments(&times, (4, 2), DType::F64, &Device::Cpu);
    let w = given.unwrap().w().clone();
    let noise = Noise::from(Increments::new(w.clone()));
    let y = sdeint(equation(), y0.as_tensor(), &times, &noise, &options).unwrap();
    let grads = y.sum_all().unwrap().backward().unwrap();
    let borrowed = equation();
    let solved = sde::solution(&borrowed, y0.as_tensor(), &times, &noise, &options).unwrap();
    let ours = solved.vjp(&solved.states().ones_like().unwrap()).unwrap();
    assert_eq!(bits(&ours.y0), bits(grads.get(&y0).unwrap()));
    assert!(ours.params.get(&w).is_none());
    let tracked = Var::from_tensor(&w).unwrap().into_inner();
    let tracked = Noise::from(Increments::new(tracked));
    let error = sdeint(equation(), y0.as_tensor(), &times, &tracked, &options).unwrap_err();
    assert_eq!(unavailable(error), "gradients of increments that are given");
}

#[test]
fn rounding_does_not_ask_for_backward_steps_by_any_norm() {
    for precision in [Precision::bf16(), Precision::f16()] {
        for norm in [
            AdjointNorm::Seminorm,
            AdjointNorm::Largest,
            AdjointNorm::Rms,
        ] {
            let attempts = |rtol: f64, floor: bool| {
                let steps = Adaptive::new(rtol, 1e-2 * rtol).noise_floor(floor);
                let steps = Steps::Adaptive(steps.max_steps(200));
                let solve = AdjointSolve::new().norm(norm.clone()).steps(steps);
                let options = OdeOptions {
                    precision: Some(precision),
                    ..adaptive_options(1e-3, Gradient::Backsolve(solve))
                };
                let (_, stats) = in_f16(options, &[0.0, 2.0], 1.0).ok()?;
                let BackwardStats {
                    steps, rejected, ..
                } = stats.backward;
                Some((steps + rejected, stats.backward.limited))
            };
            let found = [1e-7, 1e-9].map(|rtol| attempts(rtol, true));
            println!("{:?} {norm:?}: {found:?}", precision.compute);
            let [Some((first, _)), Some((second, limited))] = found else {
                panic!("{:?} {norm:?}: {found:?}", precision.compute);
            };
            // A hundredth of the tolerance: without the floor the attempts run out.
            assert!(2 * second <= 3 * first && 2 * limited > second);
            assert_eq!(attempts(1e-9, false), None);
        }
    }
}

#[test]
fn a_norm_of_all_sees_every_parameter_also_before_there_is_an_error() {
    // Without an absolute tolerance, sums that are zero take no part in the choice of the first length.
    let own = OwnNorm::of_all(|ratios| {
        let first = ratios.params[0].elem_count();
        assert!(first > 0);
        ratios.y[0]
            .abs()?
            .max_all()?
            .to_dtype(DType::F64)?
            .to_scalar()
    });
    let w = Var::new(&[0.5], &Device::Cpu).unwrap();
    let read = w.clone();
    let field = move |_: &Time, y: &Tensor| y.broadcast_mul(read.as_tensor());
    let y0 = Tensor::new(&[1.0], &Device::Cpu).unwrap();
    let options = OdeOptions {
        method: DOPRI5,
        steps: Steps::Adaptive(Adaptive::new(1e-6, 0.0)),
        gradient: Gradient::Backsolve(AdjointSolve::new().norm(AdjointNorm::Own(own))),
        ..Default::default()
    };
    let y = odeint(field, &y0, &[0.0, 1.0], &options).unwrap();
    let grads = y.get(1).unwrap().sum_all().unwrap().backward().unwrap();
    let got = values(grads.get(&w).unwrap())[0];
    assert!((got - 0.5f64.exp()).abs() <= 1e-4, "{got}");
}
