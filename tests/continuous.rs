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

use adaptive::{Kind, PAIRS};
use candle_core::{DType, Device, Tensor, Var, D};
use candle_diffeq::cde::{cdeint, Observations};
use candle_diffeq::dense::odeint_dense;
use candle_diffeq::error::ContinuousDefect;
use candle_diffeq::metrics::{Recorder, Stats};
use candle_diffeq::nn::{Activation, Mlp, WithIntegral};
use candle_diffeq::options::{
    Adaptive, AdjointNorm, AdjointSolve, AdjointTolerance, Checkpoint, Gradient, Output, OwnNorm,
    StepControl, Steps,
};
use candle_diffeq::tableau::{DOPRI5, RK4};
use candle_diffeq::{odeint, odeint_with, solution, Error, NeuralOde, OdeOptions, Precision, Time};
use common::{bits, relative, scattered, values, var, worst, U_BF16, U_F16};
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
            for gradient in kinds(&AdjointSolve::new().norm(norm)) {
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
    // With outputs a twentieth apart an error grows by e² only.
    let times: Vec<f64> = (0..=20).map(|i| 0.05 * f64::from(i)).collect();
    let gradient = Gradient::Backsolve(AdjointSolve::new());
    let error = relaxing(&times, &adaptive_options(1e-8, gradient)).unwrap();
    assert!(error < 1e-6, "{error:e}");
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
    let of = |gradient| {
        let adaptive = Adaptive::new(1e-10, 1e-12);
        let ode = ode(OdeOptions {
            steps: Steps::Adaptive(adaptive),
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
        let got = of(gradient.clone());
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
    let xs = var(&[2, 5, 3], 1.0, 1);
    let w = var(&[4, 12], 0.7, 2);
    let of = |gradient| {
        let path = Observations::new(xs.as_tensor()).unwrap().linear().unwrap();
        let read = w.as_tensor().clone();
        let f = move |_: &Time, z: &Tensor| z.matmul(&read)?.tanh()?.reshape((2, 4, 3));
        let z0 = scattered(&[2, 4], 0.5, 3);
        let options = OdeOptions {
            output: Output::Final,
            ..adaptive_options(1e-9, gradient)
        };
        let z = cdeint(f, &z0, &path, path.knots(), &options).unwrap();
        let grads = z.sqr().unwrap().sum_all().unwrap().backward().unwrap();
        [&xs, &w].map(|v| grads.get(v).unwrap().clone())
    };
    let exact = of(Gradient::Discrete);
    for norm in [AdjointNorm::Seminorm, AdjointNorm::Largest] {
        for gradient in kinds(&AdjointSolve::new().norm(norm)) {
            let got = of(gradient.clone());
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
fn what_cannot_be_had_is_an_error_before_the_first_step() {
    let y0 = Tensor::new(&[1f64], &Device::Cpu).unwrap();
    let run = |solve: AdjointSolve, method| {
        let options = OdeOptions {
            method,
            steps: Steps::PerInterval(2),
            gradient: Gradient::Backsolve(solve),
            ..Default::default()
        };
        let f = |_: &Time, y: &Tensor| y.neg();
        odeint(f, &y0, &[0.0, 1.0], &options).unwrap_err()
    };
    let adaptive = |adaptive: Adaptive| AdjointSolve::new().steps(Steps::Adaptive(adaptive));
    let by_row = run(
        adaptive(Adaptive::new(1e-3, 1e-3).control(StepControl::Rows)),
        DOPRI5,
    );
    let unavailable = |error: &Error| {
        matches!(
            error,
            Error::Continuous(ContinuousDefect::Unavailable { .. })
        )
    };
    assert!(unavailable(&by_row), "{by_row}");
    let points = run(AdjointSolve::new().points(17), RK4);
    assert!(matches!(
        points,
        Error::Continuous(ContinuousDefect::Points { points: 17 })
    ));
    let no_pair = run(adaptive(Adaptive::new(1e-3, 1e-3)), RK4);
    assert!(matches!(no_pair, Error::Adaptive(_)), "{no_pair}");
    let outside = run(AdjointSolve::new().steps(Steps::At(vec![2.0])), RK4);
    assert!(matches!(
        outside,
        Error::Continuous(ContinuousDefect::Outside { t: 2.0 })
    ));
    let options = adaptive_options(1e-3, Gradient::Backsolve(AdjointSolve::new()));
    let f = |_: &Time, y: &Tensor| y.neg();
    let dense = odeint_dense(f, &y0, &[0.0, 1.0], &options);
    assert!(unavailable(&dense.err().unwrap()));
}

#[test]
fn a_backward_solve_that_cannot_go_on_says_where() {
    let few = Adaptive::new(1e-9, 1e-11).max_steps(3);
    let solve = AdjointSolve::new().steps(Steps::Adaptive(few));
    let y0 = Var::new(&[1f64], &Device::Cpu).unwrap();
    let options = adaptive_options(1e-9, Gradient::Backsolve(solve));
    let f = |_: &Time, y: &Tensor| y.neg();
    let ys = odeint(f, y0.as_tensor(), &[0.0, 5.0], &options).unwrap();
    let error: Error = ys.sum_all().unwrap().backward().unwrap_err().into();
    let Error::Continuous(ContinuousDefect::Stopped {
        t,
        accepted,
        rejected,
        ..
    }) = error
    else {
        panic!("{error}");
    };
    assert!((0.0..5.0).contains(&t) && accepted + rejected == 3);
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
