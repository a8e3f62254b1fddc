//! Adaptive steps of stochastic differential equations: one path whatever is tried, the exact adjoint of what was accepted,
//! errors that follow the tolerance, rounding that does not ask for steps, and what is refused.
//!
//! `cargo test --release --test sde_adaptive`, seconds.

mod common;

use candle_core::{DType, Device, Tensor, Var};
use candle_diffeq::error::{SdeDefect, StopReason};
use candle_diffeq::metrics::Recorder;
use candle_diffeq::nn::{Activation, Mlp};
use candle_diffeq::options::{Adaptive, Checkpoint, Norm, Output, Steps};
use candle_diffeq::sde::{
    ito, predict, solution, stratonovich, BrownianTree, Diffusion, Increments, NeuralSde, Noise,
    OfField, Sde, SdeOptions, Without, EULER_HEUN, EULER_MARUYAMA, HEUN,
};
use candle_diffeq::{Error, Precision, Time, VectorField};
use common::{bits, relative, scattered, values};

type Part = Box<dyn Fn(&Time, &Tensor) -> candle_core::Result<Tensor>>;

/// y − y³ + sin 3t of every component.
fn drift(t: &Time, y: &Tensor) -> candle_core::Result<Tensor> {
    let swing = (t.tensor()? * 3.0)?.sin()?.to_dtype(y.dtype())?;
    (y - (y.sqr()? * y)?)?.broadcast_add(&swing)
}

/// √(1 + y²)/2 by component.
fn spread(_: &Time, y: &Tensor) -> candle_core::Result<Tensor> {
    (y.sqr()? + 1.0)?.sqrt()? * 0.5
}

/// The same noise for every state, changing in time.
fn additive(t: &Time, y: &Tensor) -> candle_core::Result<Tensor> {
    let size = ((t.tensor()? * 2.0)?.cos()? + 1.5)?.to_dtype(y.dtype())?;
    (y.ones_like()? * 0.6)?.broadcast_mul(&size)
}

/// Noise of the same size for every state, growing in time.
fn growing(t: &Time, y: &Tensor) -> candle_core::Result<Tensor> {
    let size = ((t.tensor()? * 2.0)? + 0.2)?.to_dtype(y.dtype())?;
    y.ones_like()?.broadcast_mul(&size)
}

fn still(_: &Time, y: &Tensor) -> candle_core::Result<Tensor> {
    y.zeros_like()
}

/// Diagonal, additive, scalar; and noise alone.
fn equations() -> [(&'static str, Sde<Part, Part>); 5] {
    let of = |g: fn(&Time, &Tensor) -> candle_core::Result<Tensor>| {
        stratonovich(Box::new(drift) as Part, Box::new(g) as Part)
    };
    [
        ("diagonal", of(spread)),
        ("additive", of(additive).additive()),
        ("scalar", of(spread).scalar()),
        (
            "without drift",
            stratonovich(Box::new(still) as Part, Box::new(spread) as Part),
        ),
        (
            "additive, without drift",
            stratonovich(Box::new(still) as Part, Box::new(growing) as Part).additive(),
        ),
    ]
}

fn start(rows: usize) -> Tensor {
    scattered(&[rows, 3], 1.0, 4)
}

fn tree() -> Noise {
    BrownianTree::new(11, 24).unwrap().into()
}

fn adaptive(rtol: f64) -> SdeOptions {
    SdeOptions {
        method: HEUN,
        steps: Steps::Adaptive(Adaptive::new(rtol, rtol)),
        ..Default::default()
    }
}

const TIMES: [f64; 4] = [0.0, 0.4, 1.1, 2.0];

#[test]
fn the_accepted_path_is_the_fixed_solve_on_the_accepted_grid_to_the_bit() {
    for (name, sde) in equations() {
        for precision in [
            Precision::f64(),
            Precision::f32(),
            Precision::bf16(),
            Precision::f16(),
        ] {
            let y0 = start(5).to_dtype(precision.state).unwrap();
            let recorder = Recorder::tracing();
            let options = SdeOptions {
                precision: Some(precision),
                recorder: Some(recorder.clone()),
                ..adaptive(5e-4)
            };
            let chosen = solution(&sde, &y0, &TIMES, &tree(), &options).unwrap();
            let stats = recorder.take();
            assert!(stats.rejected > 0 && stats.steps > 8, "{name}: {stats:?}");
            assert_eq!(stats.step_times.len(), stats.steps + 1);
            let at = SdeOptions {
                steps: Steps::At(stats.step_times),
                precision: Some(precision),
                ..adaptive(5e-4)
            };
            let given = solution(&sde, &y0, &TIMES, &tree(), &at).unwrap();
            assert_eq!(bits(chosen.states()), bits(given.states()), "{name}");
            let cotangent = scattered(&[4, 5, 3], 1.0, 6);
            let cotangent = cotangent.to_dtype(precision.state).unwrap();
            let [a, b] = [chosen, given].map(|solved| solved.vjp(&cotangent).unwrap().y0);
            assert_eq!(bits(&a), bits(&b), "{name}");
        }
    }
}

#[test]
fn every_memory_plan_gives_the_same_bits_and_nothing_need_be_kept() {
    let (_, sde) = equations().into_iter().next().unwrap();
    let run = |checkpoint| {
        let options = SdeOptions {
            checkpoint,
            ..adaptive(1e-2)
        };
        let solved = solution(&sde, &start(4), &TIMES, &tree(), &options).unwrap();
        let cotangent = solved.states().ones_like().unwrap();
        (
            bits(solved.states()),
            bits(&solved.vjp(&cotangent).unwrap().y0),
        )
    };
    let all = run(Checkpoint::All);
    assert!(all == run(Checkpoint::Every(4)) && all == run(Checkpoint::States(3)));
    let predicted = predict(&sde, &start(4), &TIMES, &tree(), &adaptive(1e-2)).unwrap();
    assert_eq!(all.0, bits(&predicted));
}

#[test]
fn what_drives_the_solution_is_the_same_path_whatever_is_rejected() {
    // y' = 1 ∘ dW beside a component that is hard, whose steps are rejected for it: y is W at every time, to rounding.
    // Increments that were drawn anew after a rejection, or kept only where they were small, would give another law.
    let sde = stratonovich(
        |_: &Time, y: &Tensor| {
            let hard = (y.narrow(1, 1, 1)? * 40.0)?.sin()?;
            Tensor::cat(&[&hard.zeros_like()?, &(hard * 20.0)?], 1)
        },
        |_: &Time, y: &Tensor| y.ones_like(),
    )
    .additive();
    let y0 = Tensor::zeros((400, 2), DType::F64, &Device::Cpu).unwrap();
    let recorder = Recorder::default();
    let options = SdeOptions {
        recorder: Some(recorder.clone()),
        ..adaptive(1e-2)
    };
    let y = predict(&sde, &y0, &[0.0, 1.0], &tree(), &options).unwrap();
    assert!(recorder.take().rejected > 0);
    let w = tree().increments(&[0.0, 1.0], (400, 2), DType::F64, &Device::Cpu);
    let w = w.unwrap().w().get(0).unwrap();
    let [y, w] = [y.get(1).unwrap(), w].map(|x| x.narrow(1, 0, 1).unwrap());
    assert!(relative(&y, &w) < 1e-12);
}

#[test]
fn errors_fall_with_the_tolerance_as_steps_of_order_one_do() {
    for (name, sde) in equations() {
        let fine = SdeOptions {
            steps: Steps::PerInterval(4000),
            output: Output::Final,
            ..adaptive(1.0)
        };
        // Of several paths: the errors of one differ by a factor of three from those of another.
        let paths = [11, 12, 13, 14].map(|seed| Noise::from(BrownianTree::new(seed, 24).unwrap()));
        let run = |options: &SdeOptions| {
            let run = |path: &Noise| predict(&sde, &start(40), &[0.0, 2.0], path, options).unwrap();
            Tensor::stack(&paths.each_ref().map(run), 0).unwrap()
        };
        let exact = run(&fine);
        let (mut errors, mut steps) = (vec![], vec![]);
        for rtol in [1e-2, 1e-3, 1e-4] {
            let recorder = Recorder::default();
            let options = SdeOptions {
                output: Output::Final,
                recorder: Some(recorder.clone()),
                ..adaptive(rtol)
            };
            let difference = (run(&options) - &exact).unwrap();
            let squares = difference.sqr().unwrap().mean_all().unwrap();
            errors.push(squares.to_scalar::<f64>().unwrap().sqrt());
            steps.push(recorder.take().steps);
        }
        println!("{name}: errors {errors:?}, steps {steps:?}");
        // An error of h^{3/2} in a step is the tolerance; of order one in h in all: tolerance^{2/3}, a factor of 21.5.
        assert!(errors[0] > errors[1] && errors[1] > errors[2], "{name}");
        assert!(errors[0] / errors[2] > 12.0, "{name}: {errors:?}");
        assert!(errors[2] < 60.0 * 1e-4, "{name}: {errors:?}");
        let growth = steps[2] as f64 / steps[1] as f64;
        assert!((3.0..7.0).contains(&growth), "{name}: {steps:?}");
    }
}

#[test]
fn gradients_are_those_of_the_tape_over_the_accepted_steps() {
    let of = |a: &Tensor, b: &Tensor, is_additive: bool| {
        let (a, b) = (a.clone(), b.clone());
        let f = move |t: &Time, y: &Tensor| drift(t, &y.broadcast_mul(&a)?);
        let g = move |t: &Time, y: &Tensor| match is_additive {
            true => additive(t, y)?.broadcast_mul(&b),
            false => spread(t, &y.broadcast_mul(&b)?),
        };
        (f, g)
    };
    for is_additive in [false, true] {
        let positive = |seed| {
            let x = (scattered(&[3], 0.2, seed) + 1.0).unwrap();
            Var::from_tensor(&x).unwrap()
        };
        let (a, b) = (positive(1), positive(2));
        let y0 = Var::from_tensor(&start(3)).unwrap();
        let (f, g) = of(a.as_tensor(), b.as_tensor(), is_additive);
        let mut sde = stratonovich(f, g);
        if is_additive {
            sde = sde.additive();
        }
        let recorder = Recorder::tracing();
        let options = SdeOptions {
            recorder: Some(recorder.clone()),
            ..adaptive(1e-2)
        };
        let ys = candle_diffeq::sde::sdeint(sde, y0.as_tensor(), &TIMES, &tree(), &options);
        let weights = scattered(&[4, 3, 3], 1.0, 9);
        let ys = ys.unwrap();
        let loss = |ys: &Tensor| (ys.sqr().unwrap() * &weights).unwrap().sum_all().unwrap();
        let ours = loss(&ys).backward().unwrap();
        let times = recorder.take().step_times;
        assert!(times.len() > 15);
        // Heun's method on candle's own tape, with the increments of the tree between these times.
        let increments = tree()
            .increments(&times, (3, 3), DType::F64, &Device::Cpu)
            .unwrap();
        let (f, g) = of(a.as_tensor(), b.as_tensor(), is_additive);
        let (mut y, mut kept) = (y0.as_tensor().clone(), vec![y0.as_tensor().clone()]);
        for (n, ends) in times.windows(2).enumerate() {
            let (h, dw) = (ends[1] - ends[0], increments.w().get(n).unwrap());
            let [t0, t1] = [ends[0], ends[1]].map(|t| Time::new(t, DType::F64, &Device::Cpu));
            let part = |t: &Time, y: &Tensor| -> candle_core::Result<Tensor> {
                (f(t, y)? * h)? + (g(t, y)? * &dw)?
            };
            let first = part(&t0, &y).unwrap();
            let second = part(&t1, &(&y + &first).unwrap()).unwrap();
            y = (&y + ((first + second).unwrap() * 0.5).unwrap()).unwrap();
            if TIMES.contains(&ends[1]) {
                kept.push(y.clone());
            }
        }
        let taped = Tensor::stack(&kept, 0).unwrap();
        assert!(relative(&ys, &taped) < 1e-13);
        let exact = loss(&taped).backward().unwrap();
        for var in [&y0, &a, &b] {
            let error = relative(ours.get(var).unwrap(), exact.get(var).unwrap());
            assert!(error < 1e-11, "additive {is_additive}: {error:e}");
        }
    }
}

#[test]
fn rounding_does_not_ask_for_steps() {
    for (name, sde) in equations() {
        for precision in [Precision::bf16(), Precision::f16()] {
            let run = |rtol: f64, floor: bool| {
                let recorder = Recorder::default();
                let steps = Adaptive::new(rtol, rtol).noise_floor(floor).max_steps(1000);
                let options = SdeOptions {
                    steps: Steps::Adaptive(steps),
                    precision: Some(precision),
                    output: Output::Final,
                    recorder: Some(recorder.clone()),
                    ..adaptive(rtol)
                };
                let y0 = start(8).to_dtype(DType::F32).unwrap();
                let solved = predict(&sde, &y0, &[0.0, 1.0], &tree(), &options);
                (solved, recorder.take())
            };
            let [first, second] = [1e-6, 1e-7].map(|rtol| run(rtol, true).1);
            let counts = [first.steps, second.steps];
            println!("{name} {:?}: {counts:?} steps", precision.compute);
            assert!(
                counts[1] <= counts[0] + counts[0] / 10,
                "{name}: {counts:?}"
            );
            assert!(first.limited > first.steps / 2 && first.tolerance_factor > 1.0);
            // Without the floor attempts run out, or steps become finer than the tree.
            let (failed, stats) = run(1e-7, false);
            match failed {
                Err(Error::Stopped(stopped)) => {
                    assert!(matches!(stopped.reason, StopReason::Attempts { .. }));
                }
                Err(Error::Sde(SdeDefect::TreeTooCoarse { .. })) => {}
                other => panic!("{name}: {other:?}, {stats:?}"),
            }
        }
    }
}

#[test]
fn the_norm_and_limits_of_adaptive_steps_hold() {
    let (_, sde) = equations().into_iter().next().unwrap();
    let steps = |steps: Adaptive| {
        let recorder = Recorder::default();
        let options = SdeOptions {
            steps: Steps::Adaptive(steps),
            recorder: Some(recorder.clone()),
            ..adaptive(1e-2)
        };
        let solved = predict(&sde, &start(20), &TIMES, &tree(), &options);
        (solved, recorder.take())
    };
    let (_, batch) = steps(Adaptive::new(1e-2, 1e-2));
    let (_, worst) = steps(Adaptive::new(1e-2, 1e-2).norm(Norm::WorstRow));
    assert!(worst.steps > batch.steps);
    // Two evaluations at the start of a step, five of each attempt, and once, at the first and at the last time, two at five
    // states with other components: at one all of them differ, at four some.
    let attempts = batch.steps + batch.rejected;
    assert_eq!(
        batch.evaluations,
        2 * batch.steps + 5 * attempts + 2 * 2 * 5
    );
    let (_, short) = steps(Adaptive::new(1e-2, 1e-2).max_step(0.01));
    assert!(short.steps >= 200 && short.step_range.unwrap().1 <= 0.01 * (1.0 + 1e-12));
    let (stopped, _) = steps(Adaptive::new(1e-2, 1e-2).max_steps(5));
    let Err(Error::Stopped(stopped)) = stopped else {
        panic!("{stopped:?}")
    };
    assert_eq!(stopped.accepted + stopped.rejected, 5);
    assert!(stopped.t > 0.0 && stopped.t < 2.0);
    // The last attempt is shown if it was rejected, and no earlier one.
    let (mut rejected, mut seen) = (0, [0, 0]);
    for limit in 1..20 {
        let steps_of = Adaptive::new(1e-3, 1e-3).first_step(0.5).max_steps(limit);
        let Err(Error::Stopped(stopped)) = steps(steps_of).0 else {
            panic!("{limit} attempts sufficed")
        };
        let was_rejected = stopped.rejected > rejected;
        rejected = stopped.rejected;
        seen[usize::from(was_rejected)] += 1;
        let shown = [
            stopped.h > 0.0,
            stopped.error > 1.0,
            stopped.worst.is_some(),
        ];
        assert_eq!(shown, [was_rejected; 3], "{limit}: {stopped}");
    }
    assert!(seen[0] > 1 && seen[1] > 1, "{seen:?}");
}

/// The defect of a solve that must be refused.
fn refused<F, G>(sde: &Sde<F, G, Without>, noise: &Noise, options: &SdeOptions) -> SdeDefect
where
    F: VectorField<Tensor>,
    G: Diffusion<Tensor>,
{
    match predict(sde, &start(2), &TIMES, noise, options) {
        Err(Error::Sde(defect)) => defect,
        other => panic!("{other:?}"),
    }
}

#[test]
fn what_would_have_another_limit_is_refused_with_the_reason() {
    let general = |_: &Time, y: &Tensor| Tensor::stack(&[y, y], 2);
    let options = adaptive(1e-2);
    let with = |method| SdeOptions {
        method,
        ..options.clone()
    };
    let of_ito = ito(drift, spread);
    for method in [HEUN, EULER_MARUYAMA] {
        let found = refused(&of_ito, &tree(), &with(method));
        assert_eq!(found, SdeDefect::AdaptiveIto);
        assert!(found.to_string().contains("not independent of that noise"));
    }
    let found = refused(&stratonovich(drift, general).general(2), &tree(), &options);
    assert_eq!(found, SdeDefect::AdaptiveGeneral);
    assert!(found.to_string().contains("Lévy areas"));
    // Of additive noise both senses are one, and areas do not enter.
    let constant = |_: &Time, y: &Tensor| Tensor::stack(&[y.ones_like()?, y.ones_like()?], 2);
    let sde = ito(drift, constant).general(2).additive();
    predict(&sde, &start(2), &TIMES, &tree(), &options).unwrap();
    // Noise that is declared diagonal, and is not: each component reads the next one.
    let coupled = |t: &Time, y: &Tensor| {
        spread(
            t,
            &Tensor::cat(&[&y.narrow(1, 1, 2)?, &y.narrow(1, 0, 1)?], 1)?,
        )
    };
    let found = refused(&stratonovich(drift, coupled), &tree(), &options);
    assert_eq!(found, SdeDefect::AdaptiveCoupled { leaf: 0 });
    // Also where the noise of a state that begins at zero begins at zero, too.
    let crossed = |_: &Time, y: &Tensor| {
        Tensor::cat(
            &[
                &y.narrow(1, 1, 1)?,
                &y.narrow(1, 0, 1)?,
                &y.narrow(1, 2, 1)?,
            ],
            1,
        )
    };
    let is_coupled = |g: Part, y0: &[f64]| {
        let y0 = Tensor::new(y0, &Device::Cpu).unwrap();
        let y0 = y0.repeat((2, 1)).unwrap();
        let sde = stratonovich(drift, g);
        let found = predict(&sde, &y0, &TIMES, &tree(), &options);
        matches!(
            found,
            Err(Error::Sde(SdeDefect::AdaptiveCoupled { leaf: 0 }))
        )
    };
    assert!(is_coupled(Box::new(crossed), &[0.0; 3]));
    // A factor that is zero at the start.
    let factor = |_: &Time, y: &Tensor| {
        let next = Tensor::cat(&[&y.narrow(1, 1, 2)?, &y.narrow(1, 0, 1)?], 1)?;
        y * candle_nn::ops::sigmoid(&next)?
    };
    assert!(is_coupled(Box::new(factor), &[0.0; 3]));
    // Changes that cancel where all components are moved alike.
    let cancels = |_: &Time, y: &Tensor| {
        let of = |i: usize| y.narrow(1, i, 1);
        let first = ((of(1)? + of(2)?)? - of(3)?)?;
        Tensor::cat(&[&first, &of(1)?, &of(2)?, &of(3)?], 1)
    };
    assert!(is_coupled(Box::new(cancels), &[0.0; 4]));
    // What is coupled after the start alone.
    let later = |t: &Time, y: &Tensor| {
        let next = Tensor::cat(&[&y.narrow(1, 1, 2)?, &y.narrow(1, 0, 1)?], 1)?;
        next.broadcast_mul(&t.tensor()?.to_dtype(DType::F64)?)? + 1.0
    };
    assert!(is_coupled(Box::new(later), &[0.5, 0.2, -0.1]));
    assert!(!is_coupled(Box::new(spread), &[0.5, 0.2, -0.1]));
    // Numbers for which the diffusion has no value are not moved to.
    let bounded = |_: &Time, y: &Tensor| (y * (1.0 - y)?)?.sqrt();
    assert!(!is_coupled(Box::new(bounded), &[0.9, 0.9, 0.1]));
    let bounded_and_coupled = |_: &Time, y: &Tensor| {
        let next = Tensor::cat(&[&y.narrow(1, 1, 2)?, &y.narrow(1, 0, 1)?], 1)?;
        ((y * (1.0 - y)?)?.sqrt()? * next)? + 0.1
    };
    assert!(is_coupled(Box::new(bounded_and_coupled), &[0.9, 0.9, 0.1]));
    let vars = candle_nn::VarMap::new();
    let vb = candle_nn::VarBuilder::from_varmap(&vars, DType::F64, &Device::Cpu);
    let net = Mlp::new(&[3, 8, 3], Activation::Tanh, vb).unwrap();
    let found = refused(&stratonovich(drift, OfField(net)), &tree(), &options);
    assert_eq!(found, SdeDefect::AdaptiveCoupled { leaf: 0 });
    // What has no noise may be read.
    let quiet = |_: &Time, y: &Tensor| {
        let first = y.narrow(1, 0, 1)?;
        let g = (&first * y.narrow(1, 1, 1)?)?;
        Tensor::cat(&[&g, &first.zeros_like()?, &first.zeros_like()?], 1)
    };
    predict(
        &stratonovich(drift, quiet),
        &start(2),
        &TIMES,
        &tree(),
        &options,
    )
    .unwrap();
    let sde = stratonovich(drift, spread);
    let found = refused(&sde, &tree(), &with(EULER_HEUN));
    assert!(matches!(found, SdeDefect::NoEstimate { .. }));
    assert_eq!(
        refused(&sde, &Noise::seeded(1), &options),
        SdeDefect::NotAPath
    );
    let given = Tensor::zeros((9, 2, 3), DType::F64, &Device::Cpu).unwrap();
    let given = Increments::new(given).into();
    assert_eq!(refused(&sde, &given, &options), SdeDefect::NotAPath);
    let shallow = BrownianTree::new(1, 3).unwrap().into();
    let found = refused(&sde, &shallow, &options);
    assert!(matches!(found, SdeDefect::TreeTooCoarse { .. }));
}

#[test]
fn a_running_cost_has_a_tolerance_of_its_own_and_all_values_are_finite() {
    let sde = stratonovich(
        |t: &Time, (y, _): &(Tensor, Tensor)| Ok((drift(t, y)?, y.sqr()?.sum_keepdim(1)?)),
        |t: &Time, (y, _): &(Tensor, Tensor)| spread(t, y),
    );
    let y0 = (
        start(6),
        Tensor::zeros((6, 1), DType::F64, &Device::Cpu).unwrap(),
    );
    let (ys, costs) = predict(&sde, &y0, &TIMES, &tree(), &adaptive(1e-3)).unwrap();
    assert_eq!((ys.dims(), costs.dims()), (&[4, 6, 3][..], &[4, 6, 1][..]));
    let costs = values(&costs);
    assert!(costs.iter().all(|c| c.is_finite()) && costs[18] > costs[0]);
}

#[test]
fn a_model_takes_adaptive_steps_in_low_precision_with_gradients_of_all_parameters() {
    let vars = candle_nn::VarMap::new();
    let sde = NeuralSde::new(&vars, "sde", DType::F32, &Device::Cpu, |vb| {
        let drift = Mlp::new(&[3, 8, 3], Activation::Tanh, vb.pp("f"))?;
        let sizes = vb.get(3, "g")?;
        let diffusion = move |t: &Time, y: &Tensor| spread(t, y)?.broadcast_mul(&sizes);
        Ok(stratonovich(drift, diffusion))
    });
    common::scatter(&vars);
    let recorder = Recorder::default();
    let sde = sde.unwrap().options(SdeOptions {
        precision: Some(Precision::bf16()),
        recorder: Some(recorder.clone()),
        ..adaptive(1e-2)
    });
    let y0 = start(5).to_dtype(DType::F32).unwrap();
    let solved = sde.solve(&y0, &TIMES, &tree()).unwrap();
    assert!(recorder.take().steps > 5);
    let predicted = sde.predict(&y0, &TIMES, &tree()).unwrap();
    assert_eq!(bits(&solved), bits(&predicted));
    let grads = solved
        .sqr()
        .unwrap()
        .mean_all()
        .unwrap()
        .backward()
        .unwrap();
    for var in vars.all_vars() {
        let largest = common::worst(values(grads.get(&var).unwrap()));
        assert!(largest > 0.0 && largest.is_finite());
    }
}

/// The state at the end, and the times of the steps, of one y0.
fn walked<F, G>(sde: &Sde<F, G>, y0: &Tensor, options: &SdeOptions) -> (Vec<u64>, Vec<f64>)
where
    F: VectorField<Tensor>,
    G: Diffusion<Tensor>,
{
    let recorder = Recorder::tracing();
    let options = SdeOptions {
        recorder: Some(recorder.clone()),
        ..options.clone()
    };
    let y = predict(sde, y0, &TIMES, &tree(), &options).unwrap();
    (bits(&y), recorder.take().step_times)
}

#[test]
fn the_numbers_of_a_vector_are_rows_as_those_of_a_column_are() {
    // Two channels for each number of a state of any shape, the same for every state.
    let wide = |t: &Time, y: &Tensor| {
        let g = additive(t, y)?;
        Tensor::stack(&[&g, &(&g * 0.5)?], y.rank())
    };
    let column = |rows: usize| start(rows).narrow(1, 0, 1).unwrap().contiguous().unwrap();
    for dtype in [DType::F64, DType::F32] {
        for norm in [Norm::Batch, Norm::WorstRow] {
            for rows in [5, 40] {
                let options = SdeOptions {
                    steps: Steps::Adaptive(Adaptive::new(1e-3, 1e-3).norm(norm)),
                    ..adaptive(1e-3)
                };
                let column = column(rows).to_dtype(dtype).unwrap();
                let vector = column.flatten_all().unwrap();
                let general = stratonovich(drift, wide).general(2).additive();
                let pair = [&vector, &column].map(|y0| walked(&general, y0, &options));
                assert!(pair[0].1.len() > 10 && pair[0] == pair[1]);
                let diagonal = stratonovich(drift, spread);
                let pair = [&vector, &column].map(|y0| walked(&diagonal, y0, &options));
                assert!(pair[0].1.len() > 10 && pair[0] == pair[1]);
            }
        }
    }
}

#[test]
fn the_first_attempt_is_a_hundredth_of_the_interval_unless_a_limit_or_the_tree_says_otherwise() {
    let sde = stratonovich(drift, additive).additive();
    let first = |depth: u32, steps: Adaptive| {
        let recorder = Recorder::default();
        let options = SdeOptions {
            steps: Steps::Adaptive(steps),
            recorder: Some(recorder.clone()),
            ..adaptive(1.0)
        };
        let noise = BrownianTree::new(1, depth).unwrap().into();
        predict(&sde, &start(2), &[0.0, 1.0], &noise, &options).unwrap();
        recorder.take().first_step.unwrap()
    };
    // Tolerances that accept every attempt.
    let loose = || Adaptive::new(1e3, 1e3);
    assert_eq!(first(20, loose()), 0.01);
    assert_eq!(first(20, loose().max_step(0.005)), 0.005);
    assert_eq!(first(20, loose().jump_t([0.004])), 0.004);
    assert_eq!(first(20, loose().first_step(0.125)), 0.125);
    for depth in 0..=6 {
        assert_eq!(first(depth, loose()), 0.5f64.powi(depth as i32));
    }
    // The longest step is not divided once more: a hundredth of it would be finer than the tree.
    assert_eq!(first(10, Adaptive::new(1e-2, 1e-2).max_step(0.01)), 0.01);
}
