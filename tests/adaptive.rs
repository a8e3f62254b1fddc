//! Adaptive steps, held against exact flows, against the same steps taken as fixed ones, and against a tape.
//!
//! `cargo test --test adaptive`.

mod common;
#[allow(dead_code)]
#[path = "../examples/conformance/flows.rs"]
mod flows;

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use candle_core::{DType, Device, Tensor, Var};
use candle_diffeq::dense::odeint_dense;
use candle_diffeq::error::{AdaptiveDefect, Error, StopReason};
use candle_diffeq::fields::FieldCheck;
use candle_diffeq::metrics::{Recorder, Stats};
use candle_diffeq::options::{Adaptive, Checkpoint, Controller, Norm, Output, Steps};
use candle_diffeq::tableau::{Tableau, BOSH3, DOPRI5, DOPRI8, FEHLBERG45, RK4, TSIT5};
use candle_diffeq::{odeint, predict, solution, OdeOptions, Precision, Time};
use common::{bits, relative, scattered, values, var, worst, U_F64};

const PAIRS: [Tableau; 5] = [BOSH3, FEHLBERG45, DOPRI5, TSIT5, DOPRI8];

fn options(method: &Tableau, adaptive: Adaptive) -> OdeOptions {
    OdeOptions {
        method: method.clone(),
        steps: Steps::Adaptive(adaptive),
        ..Default::default()
    }
}

fn file(name: &str) -> BTreeMap<String, Tensor> {
    let path = format!("tests/data/adaptive/{name}.safetensors");
    let all = candle_core::safetensors::load(path, &Device::Cpu).unwrap();
    all.into_iter().collect()
}

/// Relative errors of a trajectory and, over all weights together, of its gradients.
fn errors(name: &str, options: &OdeOptions) -> (f64, f64) {
    let file = file(name);
    let weights = file
        .iter()
        .filter_map(|(n, x)| Some((n.strip_prefix("w.")?, x)));
    let weights: BTreeMap<_, _> = weights
        .map(|(n, x)| (n.to_owned(), Var::from_tensor(x).unwrap()))
        .collect();
    let [y0, t] = ["y0", "t"].map(|n| Var::from_tensor(&file[n]).unwrap());
    let read = weights
        .iter()
        .map(|(n, w)| (n.clone(), w.as_tensor().clone()));
    let field = flows::flow(name, read.collect()).unwrap();
    let ys = odeint(field, y0.as_tensor(), &t, options).unwrap();
    let trajectory = relative(&ys, &file["traj"]);
    let Some(v) = file.get("loss.v") else {
        return (trajectory, 0.0);
    };
    let loss = flows::loss(&ys, v, &file["loss.target"]).unwrap();
    let grads = loss.backward().unwrap();
    let of = |var: &Var| grads.get(var).unwrap().flatten_all().unwrap();
    let exact = |name: &str| file[name].flatten_all().unwrap();
    let ours: Vec<_> = weights.values().map(of).collect();
    let theirs: Vec<_> = weights
        .keys()
        .map(|n| exact(&format!("grad.w.{n}")))
        .collect();
    let all = [
        relative(&of(&y0), &exact("grad.y0")),
        relative(&of(&t), &exact("grad.t")),
        relative(
            &Tensor::cat(&ours, 0).unwrap(),
            &Tensor::cat(&theirs, 0).unwrap(),
        ),
    ];
    (trajectory, worst(all))
}

const FLOWS: [&str; 8] = [
    "01_constant",
    "02_sine",
    "03_linear",
    "04_exp",
    "05_van_der_pol_mu1",
    "06_van_der_pol_mu5",
    "07_lorenz",
    "08_mlp",
];

#[test]
fn trajectories_and_gradients_converge_to_the_exact_flow() {
    for name in FLOWS {
        for method in [DOPRI5, TSIT5, DOPRI8] {
            let adaptive = Adaptive::new(1e-10, 1e-12);
            let (trajectory, gradients) = errors(name, &options(&method, adaptive));
            assert!(
                trajectory <= 1e-7,
                "{name} {}: {trajectory:e}",
                method.name()
            );
            assert!(gradients <= 1e-6, "{name} {}: {gradients:e}", method.name());
        }
        for method in [BOSH3, FEHLBERG45] {
            let (trajectory, gradients) =
                errors(name, &options(&method, Adaptive::new(1e-7, 1e-9)));
            assert!(
                trajectory <= 1e-3 && gradients <= 1e-3,
                "{name} {}",
                method.name()
            );
        }
    }
}

/// y' = tanh(W y + b t) over rows of three, with variables.
fn small_field(
    w: &Var,
    b: &Var,
) -> impl Fn(&Time, &Tensor) -> candle_core::Result<Tensor> + Send + Sync {
    let (w, b) = (w.as_tensor().clone(), b.as_tensor().clone());
    move |t, y| {
        let t = b.broadcast_mul(&t.tensor()?.to_dtype(y.dtype())?)?;
        y.matmul(&w)?.broadcast_add(&t)?.tanh()
    }
}

/// Gradients of Σ v y of y0, w, b and the times.
fn gradients(ys: &Tensor, of: [&Var; 4]) -> [Tensor; 4] {
    let v = scattered(ys.dims(), 1.0, 5).to_dtype(ys.dtype()).unwrap();
    let grads = (ys * v).unwrap().sum_all().unwrap().backward().unwrap();
    of.map(|var| grads.get(var).unwrap().clone())
}

/// The variables of [`small_field`], and times.
fn small_problem(times: &[f64]) -> [Var; 4] {
    let t = Tensor::new(times, &Device::Cpu).unwrap();
    [
        var(&[4, 3], 1.0, 1),
        var(&[3, 3], 2.0, 2),
        var(&[3], 1.0, 3),
        Var::from_tensor(&t).unwrap(),
    ]
}

const TIMES: [f64; 6] = [0.0, 0.1, 0.45, 0.5, 1.3, 2.0];

#[test]
fn the_steps_that_were_accepted_give_the_same_as_fixed_ones() {
    for method in PAIRS {
        for times in [TIMES, TIMES.map(|t| 1.0 - t)] {
            let [y0, w, b, t] = small_problem(&times);
            let recorder = Recorder::tracing();
            let adaptive = OdeOptions {
                recorder: Some(recorder.clone()),
                ..options(&method, Adaptive::new(1e-4, 1e-6).step_on_outputs(false))
            };
            let ys = odeint(small_field(&w, &b), y0.as_tensor(), &t, &adaptive).unwrap();
            let steps = recorder.take().step_times;
            let fixed = OdeOptions {
                method: method.clone(),
                steps: Steps::At(steps),
                ..Default::default()
            };
            let frozen = odeint(small_field(&w, &b), y0.as_tensor(), &t, &fixed).unwrap();
            let error = relative(&ys, &frozen);
            assert!(
                error <= 8.0 * U_F64,
                "{} {error:e} {:?}",
                method.name(),
                fixed.steps
            );
            let of = [&y0, &w, &b, &t];
            for (ours, frozen) in gradients(&ys, of).iter().zip(gradients(&frozen, of)) {
                let error = relative(ours, &frozen);
                assert!(error <= 1e-13, "{}: {error:e}", method.name());
            }
        }
    }
}

/// A program of the method over given steps, with outputs between them by the interpolant, on candle's tape.  The
/// ends of the steps are constants, but for the first and the last.
fn tape(
    field: impl Fn(&Tensor, &Tensor) -> candle_core::Result<Tensor>,
    y0: &Tensor,
    t: &Tensor,
    inner: &[f64],
) -> candle_core::Result<Tensor> {
    // The cubic Hermite polynomial over the classic method.
    let count = t.dim(0)?;
    let number = |t: f64| Tensor::new(t, &Device::Cpu);
    let mut nodes = vec![t.get(0)?];
    for &t in inner {
        nodes.push(number(t)?);
    }
    nodes.push(t.get(count - 1)?);
    let mut outputs = vec![y0.clone()];
    let mut y = y0.clone();
    for ends in nodes.windows(2) {
        let (start, end) = (&ends[0], &ends[1]);
        let h = (end - start)?;
        let plus = |y: &Tensor, c: f64, k: &Tensor| y + (k.broadcast_mul(&(&h * c)?)?);
        let at = |c: f64| start + (&h * c)?;
        let k1 = field(&at(0.0)?, &y)?;
        let k2 = field(&at(0.5)?, &plus(&y, 0.5, &k1)?)?;
        let k3 = field(&at(0.5)?, &plus(&y, 0.5, &k2)?)?;
        let k4 = field(&at(1.0)?, &plus(&y, 1.0, &k3)?)?;
        let sum = ((&k1 + (&k2 * 2.0)?)? + ((&k3 * 2.0)? + &k4)?)?;
        let next = plus(&y, 1.0 / 6.0, &sum)?;
        let k5 = field(end, &next)?;
        let (from, to) = (start.to_scalar::<f64>()?, end.to_scalar::<f64>()?);
        for i in 1..count - 1 {
            let time = t.get(i)?;
            let value = time.to_scalar::<f64>()?;
            if (value - from) * (value - to) < 0.0 {
                let x = ((time - start)? / &h)?;
                let (x2, x3) = (x.sqr()?, (x.sqr()? * &x)?);
                let first = ((&x - (&x2 * 2.0)?)? + &x3)?;
                let last = (&x3 - &x2)?;
                let whole = ((&x2 * 3.0)? - (&x3 * 2.0)?)?;
                let slope = (k1.broadcast_mul(&first)? + k5.broadcast_mul(&last)?)?;
                let slope = (slope + sum.broadcast_mul(&(whole / 6.0)?)?)?;
                outputs.push((&y + slope.broadcast_mul(&h)?)?);
            }
        }
        y = next;
    }
    outputs.push(y);
    Tensor::stack(&outputs, 0)
}

#[test]
fn outputs_inside_steps_and_their_gradients_are_those_of_a_tape() {
    for (times, inner) in [
        (TIMES, [0.3, 0.7, 1.2]),
        (TIMES.map(|t| 1.0 - t), [0.8, 0.4, -0.7]),
    ] {
        let [y0, w, b, t] = small_problem(&times);
        let steps = OdeOptions {
            method: RK4,
            steps: Steps::At(inner.into()),
            ..Default::default()
        };
        let ys = odeint(small_field(&w, &b), y0.as_tensor(), &t, &steps).unwrap();
        let field = |t: &Tensor, y: &Tensor| {
            let t = b.broadcast_mul(t)?;
            y.matmul(&w)?.broadcast_add(&t)?.tanh()
        };
        let exact = tape(field, &y0, &t, &inner).unwrap();
        assert!(relative(&ys, &exact) <= 16.0 * U_F64);
        let of = [&y0, &w, &b, &t];
        for (ours, exact) in gradients(&ys, of).iter().zip(gradients(&exact, of)) {
            let error = relative(ours, &exact);
            assert!(error <= 1e-12, "{error:e}");
        }
    }
}

#[test]
fn gradients_have_the_same_bits_whatever_is_kept() {
    let [y0, w, b, t] = small_problem(&TIMES);
    let solve = |checkpoint| {
        let recorder = Recorder::default();
        let options = OdeOptions {
            checkpoint,
            recorder: Some(recorder.clone()),
            ..options(&DOPRI5, Adaptive::new(1e-9, 1e-9))
        };
        let ys = odeint(small_field(&w, &b), y0.as_tensor(), &t, &options).unwrap();
        let grads = gradients(&ys, [&y0, &w, &b, &t]).map(|g| bits(&g));
        (grads, recorder.take())
    };
    let (all, stats) = solve(Checkpoint::All);
    assert!(stats.steps > 20);
    for checkpoint in [
        Checkpoint::Every(1),
        Checkpoint::Every(7),
        Checkpoint::States(1),
        Checkpoint::States(2),
        Checkpoint::States(5),
        Checkpoint::States(1000),
        Checkpoint::Bytes(3 * 12 * 8),
    ] {
        let (grads, kept) = solve(checkpoint);
        assert_eq!(grads, all, "{checkpoint:?}");
        match checkpoint {
            Checkpoint::States(n) => assert!(kept.states_kept <= n, "{checkpoint:?}"),
            Checkpoint::Bytes(n) => assert!(kept.bytes_kept <= n, "{checkpoint:?}"),
            _ => {}
        }
    }
}

/// Times at which a field is evaluated.
fn watched(calls: &Arc<Mutex<Vec<f64>>>) -> impl Fn(&Time, &Tensor) -> candle_core::Result<Tensor> {
    let calls = Arc::clone(calls);
    move |t, y| {
        calls.lock().unwrap().push(t.value());
        (y.sqr()? * -0.3)? + (3.0 * t.value()).sin()
    }
}

#[test]
fn times_are_hit_to_the_bit_and_nothing_is_evaluated_beyond_them() {
    for method in PAIRS {
        for (start, end) in [(0.0, 2.0), (2.0, 0.0)] {
            let calls = Arc::default();
            let recorder = Recorder::tracing();
            let options = OdeOptions {
                recorder: Some(recorder.clone()),
                ..options(
                    &method,
                    Adaptive::new(1e-5, 1e-5).step_t([0.7, 9.0]).jump_t([1.1]),
                )
            };
            let y0 = Tensor::new(&[1f64], &Device::Cpu).unwrap();
            predict(&watched(&calls), &y0, &[start, end], &options).unwrap();
            let times = recorder.take().step_times;
            for t in [start, 0.7, 1.1, end] {
                assert!(times.contains(&t), "{} {t} {times:?}", method.name());
            }
            let calls = calls.lock().unwrap();
            assert!(calls.iter().all(|t| (0.0..=2.0).contains(t)));
            // The jump itself is never evaluated: only its two sides, in order.
            let before = |t: &f64| if end > start { *t < 1.1 } else { *t > 1.1 };
            let jump = calls.iter().position(|t| !before(t)).unwrap();
            assert!(calls[..jump].iter().all(before));
            assert!(calls[jump..].iter().all(|t| !before(t) && *t != 1.1));
        }
    }
}

#[test]
fn the_evaluations_are_those_of_the_attempts() {
    for (method, stages, last) in [
        (BOSH3, 4, 0),
        (DOPRI5, 7, 0),
        (TSIT5, 7, 0),
        (FEHLBERG45, 6, 1),
        (DOPRI8, 13, 1),
    ] {
        let calls = Arc::default();
        let recorder = Recorder::default();
        let options = OdeOptions {
            output: Output::Final,
            recorder: Some(recorder.clone()),
            ..options(&method, Adaptive::new(1e-7, 1e-7).first_step(1.0))
        };
        let y0 = Tensor::new(&[1f64], &Device::Cpu).unwrap();
        predict(&watched(&calls), &y0, &[0.0, 2.0], &options).unwrap();
        let stats: Stats = recorder.take();
        assert!(stats.rejected > 0, "{}", method.name());
        let attempts = stats.steps + stats.rejected;
        let expected = 1 + (stages - 1) * attempts + last * (stats.steps - 1);
        assert_eq!(stats.evaluations, expected, "{}", method.name());
        assert_eq!(calls.lock().unwrap().len(), expected);
    }
}

/// Pairs with their stages and whether f(t_{n+1}, y_{n+1}) is a stage of its own, which is appended.
const COSTS: [(Tableau, usize, bool); 5] = [
    (BOSH3, 4, false),
    (DOPRI5, 7, false),
    (TSIT5, 7, false),
    (FEHLBERG45, 6, true),
    (DOPRI8, 13, true),
];

#[test]
fn evaluations_and_pull_backs_are_those_of_the_accepted_and_rejected_attempts() {
    let [y0, w, b, _] = small_problem(&TIMES);
    for (method, stages, appended) in COSTS {
        for first_step in [None, Some(1.5)] {
            for (times, jumps) in [
                (&[0.0, 2.0][..], &[][..]),
                (&TIMES, &[]),
                (&[0.0, 1.0, 1.999_999, 2.0], &[]),
                (&TIMES, &[0.7, 1.2]),
            ] {
                let calls: Arc<AtomicUsize> = Arc::default();
                let (counted, field) = (calls.clone(), small_field(&w, &b));
                let field = move |t: &Time, y: &Tensor| {
                    counted.fetch_add(1, Ordering::Relaxed);
                    field(t, y)
                };
                let mut adaptive = Adaptive::new(1e-8, 1e-8)
                    .step_on_outputs(false)
                    .jump_t(jumps);
                if let Some(h) = first_step {
                    adaptive = adaptive.first_step(h);
                }
                let recorder = Recorder::tracing();
                let options = OdeOptions {
                    recorder: Some(recorder.clone()),
                    check: FieldCheck::Never,
                    ..options(&method, adaptive)
                };
                let ys = odeint(field, y0.as_tensor(), times, &options).unwrap();
                let forward: Stats = recorder.take();
                let name = format!("{} {first_step:?} {times:?} {jumps:?}", method.name());
                let (accepted, rejected) = (forward.steps, forward.rejected);
                assert!(rejected > 0 || first_step.is_none(), "{name}");
                let nodes = &forward.step_times;
                assert_eq!(nodes.len(), accepted + 1);
                let has_inside = |n: usize| {
                    let inner = |t: &&f64| nodes[n] < **t && **t < nodes[n + 1];
                    times.iter().any(|t| inner(&t))
                };
                // k_1 and the probe of the first step, all other stages of every attempt, k_1 anew behind a jump.
                let mut expected = 1 + usize::from(first_step.is_none());
                expected += (stages - 1) * (accepted + rejected) + jumps.len();
                if appended {
                    expected += accepted - 1 + usize::from(has_inside(accepted - 1));
                }
                assert_eq!(forward.evaluations, expected, "{name}");
                assert_eq!(calls.load(Ordering::Relaxed), expected, "{name}");
                ys.sum_all().unwrap().backward().unwrap();
                let backward = recorder.take();
                // The last stage is pulled back as the first of the next step, if there is one behind no jump.
                let alone = |n: usize| n + 1 == accepted || jumps.contains(&nodes[n + 1]);
                let last = (0..accepted)
                    .filter(|n| has_inside(*n) && alone(*n))
                    .count();
                let of_step = stages - usize::from(!appended);
                assert_eq!(backward.vjps, of_step * accepted + last, "{name}");
                assert_eq!(backward.recomputed, of_step * accepted + last, "{name}");
                assert_eq!(backward.evaluations, 0);
            }
        }
    }
}

#[test]
fn a_jump_that_is_declared_costs_fewer_evaluations() {
    let file = file("10_jump");
    let field = flows::flow("10_jump", BTreeMap::new()).unwrap();
    let times = values(&file["t"]);
    let solve = |adaptive: Adaptive| {
        let recorder = Recorder::default();
        let options = OdeOptions {
            recorder: Some(recorder.clone()),
            ..options(&DOPRI5, adaptive)
        };
        let ys = predict(&field, &file["y0"], &times, &options).unwrap();
        (relative(&ys, &file["traj"]), recorder.take().evaluations)
    };
    let (unknown, evaluations) = solve(Adaptive::new(1e-10, 1e-10));
    let (known, fewer) = solve(Adaptive::new(1e-10, 1e-10).jump_t(values(&file["jump_t"])));
    assert!(unknown <= 1e-6 && known <= 1e-9, "{unknown:e} {known:e}");
    assert!(3 * fewer < 2 * evaluations, "{fewer} {evaluations}");
}

/// Twice the network of the figures on noise: 2-64-64-2 with weights that make it move.
fn noisy(precision: Precision, method: &Tableau, adaptive: Adaptive) -> (Tensor, Stats) {
    let weights: Vec<_> = [(2, 64, 11), (64, 64, 12), (64, 2, 13)]
        .map(|(i, o, seed)| scattered(&[i, o], 3.0 / (i as f64).sqrt(), seed))
        .into();
    let field = move |_: &Time, y: &Tensor| {
        let mut x = y.clone();
        for (l, w) in weights.iter().enumerate() {
            x = x.matmul(&w.to_dtype(x.dtype())?)?;
            if l < 2 {
                x = x.tanh()?;
            }
        }
        Ok(x)
    };
    let recorder = Recorder::default();
    let options = OdeOptions {
        precision: Some(precision),
        output: Output::Final,
        recorder: Some(recorder.clone()),
        ..options(method, adaptive)
    };
    let y0 = scattered(&[64, 2], 1.5, 4);
    let ys = match predict(&field, &y0, &[0.0, 4.0], &options) {
        Ok(ys) => ys,
        // Where there is no floor.
        Err(Error::Stopped(stopped)) if stopped.accepted + stopped.rejected >= 2000 => y0,
        Err(error) => panic!("{error}"),
    };
    (ys.to_dtype(DType::F64).unwrap(), recorder.take())
}

#[test]
fn in_low_precision_a_tolerance_that_cannot_be_kept_costs_no_steps() {
    let fine = |method: &Tableau| noisy(Precision::f64(), method, Adaptive::new(1e-11, 1e-11)).0;
    for method in [BOSH3, DOPRI5] {
        let exact = fine(&method);
        for precision in [Precision::bf16(), Precision::f16()] {
            let solve = |rtol: f64, floor: bool| {
                let adaptive = Adaptive::new(rtol, rtol / 100.0).noise_floor(floor);
                let adaptive = adaptive.max_steps(2000);
                noisy(precision, &method, adaptive)
            };
            let (coarse, few) = solve(1e-3, true);
            let (limited, many) = solve(1e-8, true);
            let error = |ys: &Tensor| relative(ys, &exact);
            let name = format!("{} {precision:?}", method.name());
            assert!(many.evaluations <= 3 * few.evaluations, "{name}");
            assert!(many.rejected * 5 <= many.steps + many.rejected, "{name}");
            assert!(error(&limited) <= 1.5 * error(&coarse), "{name}");
            assert!(many.limited * 2 > many.steps && many.tolerance_factor > 10.0);
            let (_, uncured) = solve(1e-8, false);
            assert!(
                uncured.evaluations > 20 * few.evaluations,
                "{name}: {}",
                uncured.evaluations
            );
        }
        let wide = |floor| {
            let adaptive = Adaptive::new(1e-8, 1e-10).noise_floor(floor);
            let (ys, stats) = noisy(Precision::f64(), &method, adaptive);
            (bits(&ys), stats.evaluations)
        };
        assert_eq!(wide(true), wide(false));
    }
}

#[test]
fn the_floor_is_known_before_the_attempt() {
    // Squares of the stages of this attempt overflow f32: a floor that were made of them would be infinite.
    let field = |_: &Time, y: &Tensor| y.sqr()?.neg();
    let y0 = Tensor::new(&[1f32, 2.0], &Device::Cpu).unwrap();
    let recorder = Recorder::default();
    let options = OdeOptions {
        recorder: Some(recorder.clone()),
        output: Output::Final,
        ..options(&DOPRI5, Adaptive::new(1e-4, 1e-6).first_step(1e6))
    };
    let ys = predict(&field, &y0, &[0.0, 1e6], &options).unwrap();
    assert!(recorder.take().rejected >= 3);
    for (y, y0) in values(&ys).iter().zip([1.0, 2.0]) {
        let exact = y0 / (1.0 + y0 * 1e6);
        assert!((y - exact).abs() <= 1e-4 * exact + 1e-5);
    }
}

#[test]
fn the_first_step_is_found_from_states_and_velocities_of_any_size() {
    for (y0, rate) in [
        (0.0f64, 0.0),
        (0.0, 1.0),
        (1.0, 0.0),
        (1e-30, 1e-3),
        (1e8, 1e4),
        (1.0, 1e-12),
    ] {
        let field = move |_: &Time, y: &Tensor| (y * 0.0)? + rate;
        let y = Tensor::new(&[y0], &Device::Cpu).unwrap();
        // Hairer, Nørsett, Wanner, "Solving Ordinary Differential Equations I", II.4, for f that does not change.
        let scale = 1e-8 + 1e-6 * y0.abs();
        let [d0, d1] = [y0 / scale, rate / scale];
        let probe = match d0 < 1e-5 || d1 < 1e-5 {
            true => 1e-6,
            false => 0.01 * d0 / d1,
        };
        let length = match d1 <= 1e-15 {
            true => f64::max(1e-6, 1e-3 * probe),
            false => (0.01 / d1).powf(0.2),
        };
        for end in [1.0, 1e-9, 1e6] {
            let recorder = Recorder::default();
            let options = OdeOptions {
                recorder: Some(recorder.clone()),
                ..options(&DOPRI5, Adaptive::new(1e-6, 1e-8))
            };
            let ys = predict(&field, &y, &[0.0, end], &options).unwrap();
            let first = recorder.take().first_step.unwrap();
            let expected = length.min(100.0 * probe).min(end);
            assert!(
                (first - expected).abs() <= 1e-9 * expected,
                "{y0} {rate} {end}: {first} {expected}"
            );
            let exact = y0 + rate * end;
            let got = values(&ys)[1];
            assert!(
                (got - exact).abs() <= 1e-12 * (1.0 + exact.abs()),
                "{y0} {rate} {end}: {got}"
            );
        }
    }
}

#[test]
fn time_that_decreases_mirrors_time_that_increases() {
    let solve = |sign: f64| {
        let recorder = Recorder::tracing();
        let options = OdeOptions {
            recorder: Some(recorder.clone()),
            ..options(&TSIT5, Adaptive::new(1e-7, 1e-9).controller(Controller::PI))
        };
        let field = move |_: &Time, y: &Tensor| y.sin()? * sign;
        let y0 = Tensor::new(&[0.3f64, 1.0], &Device::Cpu).unwrap();
        let ys = predict(&field, &y0, &[0.0, sign * 0.8, sign * 3.0], &options).unwrap();
        let times = recorder.take().step_times;
        (
            bits(&ys),
            times.iter().map(|t| t * sign).collect::<Vec<_>>(),
        )
    };
    assert_eq!(solve(1.0), solve(-1.0));
}

#[test]
fn tolerances_are_numbers_or_belong_to_tensors_or_elements() {
    let field = |_: &Time, (a, b): &(Tensor, Tensor)| Ok((a.neg()?, (b * 3.0)?.sin()?));
    let y0 = (scattered(&[5, 2], 1.0, 1), scattered(&[5], 1.0, 2));
    let solve = |adaptive: Adaptive| {
        let ys = predict(&field, &y0, &[0.0, 0.5, 2.0], &options(&DOPRI5, adaptive)).unwrap();
        (bits(&ys.0), bits(&ys.1))
    };
    let numbers = solve(Adaptive::new(1e-5, 1e-7));
    assert_eq!(
        solve(Adaptive::new([1e-5, 1e-5], vec![1e-7, 1e-7])),
        numbers
    );
    let of = |x: f64| {
        let one = Tensor::new(x, &Device::Cpu).unwrap();
        vec![one.reshape((1, 1)).unwrap(), one.reshape(1).unwrap()]
    };
    assert_eq!(solve(Adaptive::new(of(1e-5), of(1e-7))), numbers);
    assert_ne!(solve(Adaptive::new([1e-5, 1e-9], 1e-7)), numbers);
    // Every row keeps the tolerance.
    assert_ne!(
        solve(Adaptive::new(1e-5, 1e-7).norm(Norm::WorstRow)),
        numbers
    );
}

fn refused(method: &Tableau, adaptive: Adaptive) -> Error {
    let calls = Arc::new(AtomicUsize::new(0));
    let field = {
        let calls = Arc::clone(&calls);
        move |_: &Time, y: &Tensor| {
            calls.fetch_add(1, Ordering::SeqCst);
            y.neg()
        }
    };
    let y0 = Tensor::new(&[1f64, 2.0], &Device::Cpu).unwrap();
    let error = predict(&field, &y0, &[0.0, 1.0], &options(method, adaptive)).unwrap_err();
    assert_eq!(calls.load(Ordering::SeqCst), 0, "f was evaluated");
    error
}

#[test]
fn options_that_cannot_be_followed_are_refused_before_any_evaluation() {
    let ok = || Adaptive::new(1e-3, 1e-3);
    let controller = |safety, limits| Controller {
        safety,
        limits,
        ..Controller::I
    };
    for (adaptive, defect) in [
        (Adaptive::new(-1.0, 0.1), "rtol = -1.0"),
        (Adaptive::new(0.1, f64::NAN), "atol = NaN"),
        (Adaptive::new(0.0, 0.0), "both zero"),
        (
            Adaptive::new([1.0, 2.0], 1.0),
            "2 tolerances were given for a state of 1",
        ),
        (ok().first_step(0.0), "first_step = 0.0"),
        (ok().first_step(f64::INFINITY), "first_step"),
        (ok().max_step(-1.0), "max_step = -1.0"),
        (ok().max_steps(0), "max_steps = 0.0"),
        (ok().min_step(2.0).max_step(1.0), "min_step = 2.0"),
        (ok().step_t([f64::NAN]), "step_t = NaN"),
        (
            ok().step_t([0.5]).jump_t([0.5]),
            "t = 0.5 is in step_t and in jump_t",
        ),
        (
            ok().controller(controller(0.0, [0.2, 10.0])),
            "safety = 0.0",
        ),
        (
            ok().controller(controller(0.9, [0.0, 10.0])),
            "limits[0] = 0.0",
        ),
        (
            ok().controller(controller(0.9, [0.2, 0.5])),
            "limits[1] = 0.5",
        ),
    ] {
        let error = refused(&DOPRI5, adaptive);
        assert!(matches!(error, Error::Adaptive(_)), "{error}");
        assert!(error.to_string().contains(defect), "{error}");
    }
    let none = refused(&RK4, ok());
    assert!(
        matches!(none, Error::Adaptive(AdaptiveDefect::NoEstimate { method }) if method == "rk4")
    );
    let at = |times: &[f64]| {
        let options = OdeOptions {
            steps: Steps::At(times.into()),
            ..Default::default()
        };
        let y0 = Tensor::new(&[1f64], &Device::Cpu).unwrap();
        predict(&|_: &Time, y: &Tensor| y.neg(), &y0, &[0.0, 1.0], &options)
    };
    assert!(at(&[0.2, 0.7]).is_ok() && at(&[0.0, 0.2, 1.0]).is_ok() && at(&[]).is_ok());
    for times in [&[0.7, 0.2][..], &[-1.0], &[0.2, 0.2], &[f64::NAN], &[1.5]] {
        let error = at(times).unwrap_err();
        assert!(matches!(error, Error::StepTimes { .. }), "{error}");
    }
    // Of one time there is no step.
    for output in [Output::All, Output::Final, Output::Steps] {
        let one = |times: &[f64]| {
            let options = OdeOptions {
                steps: Steps::At(times.into()),
                output,
                ..Default::default()
            };
            let y0 = Tensor::new(&[1f64], &Device::Cpu).unwrap();
            predict(&|_: &Time, y: &Tensor| y.neg(), &y0, &[0.0], &options)
        };
        assert!(one(&[]).is_ok() && one(&[0.0]).is_ok());
        for times in [&[0.5][..], &[0.5, 1.0], &[-0.5], &[0.0, 0.5], &[f64::NAN]] {
            let error = one(times).map(|y| values(&y));
            assert!(
                matches!(error, Err(Error::StepTimes { .. })),
                "{times:?} {error:?}"
            );
        }
    }
}

/// Why a solve of y' = f stopped, and what it had returned.
fn stopped(
    field: impl Fn(&Time, &Tensor) -> candle_core::Result<Tensor>,
    adaptive: Adaptive,
) -> (StopReason, usize) {
    let y0 = Tensor::new(&[1f64, 2.0], &Device::Cpu).unwrap();
    let options = options(&DOPRI5, adaptive);
    let error = predict(&field, &y0, &[0.0, 0.1, 10.0], &options).unwrap_err();
    let Error::Stopped(stopped) = &error else {
        panic!("{error}");
    };
    assert_eq!(stopped.states[0].dims(), [stopped.outputs, 2]);
    assert!(error.to_string().contains(&stopped.reason.to_string()));
    (stopped.reason, stopped.outputs)
}

#[test]
fn a_solve_that_stops_says_why_and_hands_over_what_it_had_computed() {
    let ok = || Adaptive::new(1e-6, 1e-6);
    let decay = |_: &Time, y: &Tensor| y.neg();
    let (reason, outputs) = stopped(decay, ok().max_steps(4));
    assert_eq!(
        (reason, outputs),
        (StopReason::Attempts { max_steps: 4 }, 2)
    );
    // A pole at t = ½.
    let pole = |_: &Time, y: &Tensor| y.sqr();
    let (reason, outputs) = stopped(pole, ok());
    assert!(
        matches!(reason, StopReason::Underflow | StopReason::NonFinite),
        "{reason}"
    );
    assert_eq!(outputs, 2);
    // Velocities that are NaN from some time on, and once only.
    let nan = |t: &Time, y: &Tensor| y * if t.value() > 1.0 { f64::NAN } else { 1.0 };
    assert_eq!(stopped(nan, ok()), (StopReason::NonFinite, 2));
    let calls = AtomicUsize::new(0);
    let once = |_: &Time, y: &Tensor| {
        let n = calls.fetch_add(1, Ordering::SeqCst);
        y * if n == 12 { f64::NAN } else { -1.0 }
    };
    let y0 = Tensor::new(&[1f64], &Device::Cpu).unwrap();
    let y = predict(&once, &y0, &[0.0, 2.0], &options(&DOPRI5, ok())).unwrap();
    assert!((values(&y)[1] - (-2f64).exp()).abs() < 1e-5);
    // At the very start.
    let start = |_: &Time, y: &Tensor| y * f64::NAN;
    let error = predict(&start, &y0, &[0.0, 1.0], &options(&DOPRI5, ok())).unwrap_err();
    assert!(matches!(
        error,
        Error::NonFiniteVelocity {
            step: 0,
            stage: 0,
            ..
        }
    ));
    // A compute precision that limits most of the steps, where this is to be an error.
    let limited = OdeOptions {
        precision: Some(Precision::bf16()),
        ..options(&DOPRI5, ok().precision_limit_is_error(true))
    };
    let y0 = Tensor::new(&[1f32], &Device::Cpu).unwrap();
    let error = predict(&decay, &y0, &[0.0, 1.0], &limited).unwrap_err();
    let Error::Stopped(stopped) = error else {
        panic!("{error}")
    };
    assert!(matches!(stopped.reason, StopReason::PrecisionLimited { limited, .. } if limited > 0));
}

#[test]
fn a_solve_that_stops_shows_its_last_attempt_only_if_it_was_rejected() {
    // The first length is far too long, and one at a cliff later.
    let field = |t: &Time, y: &Tensor| y * if t.value() < 0.5 { -3.0 } else { 30.0 };
    let y0 = Tensor::new(&[1f64, 2.0], &Device::Cpu).unwrap();
    let (mut rejected, mut seen) = (0, [0, 0]);
    for limit in 1..30 {
        let steps = Adaptive::new(1e-6, 1e-6).first_step(0.4).max_steps(limit);
        let error = predict(&field, &y0, &[0.0, 1.0], &options(&DOPRI5, steps)).unwrap_err();
        let Error::Stopped(stopped) = error else {
            panic!("{error}");
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
        assert!(was_rejected || (stopped.h, stopped.error) == (0.0, 0.0));
    }
    assert!(seen[0] > 3 && seen[1] > 3, "{seen:?}");
}

#[test]
fn times_that_differ_by_rounding_only_are_one_time_at_which_a_step_ends() {
    let sum = 0.1 + 0.2;
    assert_ne!(sum, 0.3);
    let ok = || Adaptive::new(1e-4, 1e-4);
    let forced = [
        ok().step_t([0.3, sum]),
        ok().jump_t([sum, 0.3, 0.3]),
        ok().jump_t([0.3, sum, 0.5]).step_t([0.7, 0.7f64.next_up()]),
    ];
    for steps in forced {
        for times in [[0.0, 1.0], [1.0, 0.0]] {
            let recorder = Recorder::tracing();
            let options = OdeOptions {
                recorder: Some(recorder.clone()),
                ..options(&DOPRI5, steps.clone())
            };
            // In f32 a field that reads time refuses a step in which it stands still.
            let field =
                |t: &Time, y: &Tensor| y.broadcast_mul(&t.tensor()?.to_dtype(y.dtype())?.cos()?);
            let y0 = Tensor::new(&[1f32], &Device::Cpu).unwrap();
            predict(&field, &y0, &times, &options).unwrap();
            let nodes = recorder.take().step_times;
            assert!(nodes.iter().any(|t| (t - 0.3).abs() < 1e-12), "{nodes:?}");
            let shortest = nodes.windows(2).map(|w| (w[1] - w[0]).abs());
            assert!(shortest.fold(f64::INFINITY, f64::min) > 1e-12, "{nodes:?}");
        }
    }
    let both = refused(&DOPRI5, ok().step_t([0.3]).jump_t([sum]));
    assert!(
        matches!(&both, Error::Adaptive(AdaptiveDefect::ForcedTwice { t }) if *t == 0.3),
        "{both}"
    );
}

#[test]
fn a_step_that_may_not_be_shorter_is_accepted_and_counted() {
    let recorder = Recorder::default();
    let options = OdeOptions {
        recorder: Some(recorder.clone()),
        output: Output::Final,
        ..options(&DOPRI5, Adaptive::new(1e-12, 1e-12).min_step(0.1))
    };
    let y0 = Tensor::new(&[1f64], &Device::Cpu).unwrap();
    let field = |t: &Time, y: &Tensor| y * (5.0 * t.value()).cos();
    predict(&field, &y0, &[0.0, 2.0], &options).unwrap();
    let stats = recorder.take();
    assert!(stats.forced >= 10, "{stats:?}");
    let (least, most) = stats.step_range.unwrap();
    assert!(least >= 0.05 - 1e-12 && most <= 0.2);
}

#[test]
fn a_dense_solution_is_that_of_a_solve_with_outputs_there_and_so_are_its_gradients() {
    let [y0, w, b, t] = small_problem(&TIMES);
    for method in PAIRS {
        let adaptive = || Adaptive::new(1e-5, 1e-7).step_on_outputs(false);
        let options = options(&method, adaptive());
        let ends = [TIMES[0], TIMES[5]];
        let dense = odeint_dense(small_field(&w, &b), y0.as_tensor(), &ends, &options).unwrap();
        let ys = dense.at(&t).unwrap();
        let direct = odeint(small_field(&w, &b), y0.as_tensor(), &t, &options).unwrap();
        assert!(relative(&ys, &direct) <= 8.0 * U_F64, "{}", method.name());
        let ours = gradients(&ys, [&y0, &w, &b, &t]);
        let exact = gradients(&direct, [&y0, &w, &b, &t]);
        for (ours, exact) in ours.iter().zip(&exact).take(3) {
            assert!(relative(ours, exact) <= 1e-12, "{}", method.name());
        }
        // The ends are constants here.
        let inner = |x: &Tensor| x.narrow(0, 1, 4).unwrap();
        assert!(relative(&inner(&ours[3]), &inner(&exact[3])) <= 1e-12);
        // In any order, at the steps' own times, and its derivative is f.
        let back = dense.at(&[2.0, 1.3, 0.1]).unwrap();
        for (i, j) in [(0, 5), (1, 4), (2, 1)] {
            assert_eq!(bits(&back.get(i).unwrap()), bits(&ys.get(j).unwrap()));
        }
        let own = dense.step_times();
        let (states, slopes) = (dense.at(&own).unwrap(), dense.slopes_at(&own).unwrap());
        for (n, time) in own.iter().enumerate() {
            let time = Time::new(*time, DType::F64, &Device::Cpu);
            let exact = small_field(&w, &b)(&time, &states.get(n).unwrap()).unwrap();
            assert!(
                relative(&slopes.get(n).unwrap(), &exact) <= 1e-10,
                "{}",
                method.name()
            );
        }
        let outside = dense.at(&[2.5]).unwrap_err();
        assert!(matches!(
            outside,
            Error::Adaptive(AdaptiveDefect::Outside { .. })
        ));
    }
}

/// A solve of [`small_field`], and what it did.
fn small_solve(of: [&Var; 4], options: &OdeOptions) -> (Tensor, Stats) {
    let recorder = Recorder::tracing();
    let options = OdeOptions {
        recorder: Some(recorder.clone()),
        ..options.clone()
    };
    let [y0, w, b, t] = of;
    let ys = odeint(small_field(w, b), y0.as_tensor(), t, &options).unwrap();
    (ys, recorder.take())
}

#[test]
fn the_states_at_all_steps_and_their_gradients_are_those_of_a_solve_from_time_to_time() {
    for method in PAIRS {
        for times in [TIMES, TIMES.map(|t| 1.0 - t)] {
            let [y0, w, b, t] = small_problem(&times);
            let every = OdeOptions {
                output: Output::Steps,
                ..options(&method, Adaptive::new(1e-4, 1e-6).step_on_outputs(false))
            };
            let (ys, stats) = small_solve([&y0, &w, &b, &t], &every);
            let nodes = stats.step_times;
            assert_eq!(ys.dims(), [stats.steps + 1, 4, 3]);
            assert_eq!((nodes.len(), nodes[0]), (stats.steps + 1, times[0]));
            let grid = Var::new(nodes.as_slice(), &Device::Cpu).unwrap();
            let frozen = OdeOptions {
                method: method.clone(),
                ..Default::default()
            };
            let (exact, _) = small_solve([&y0, &w, &b, &grid], &frozen);
            assert!(relative(&ys, &exact) <= 8.0 * U_F64, "{}", method.name());
            let ours = gradients(&ys, [&y0, &w, &b, &t]);
            let exact = gradients(&exact, [&y0, &w, &b, &grid]);
            for (ours, exact) in ours.iter().zip(&exact).take(3) {
                let error = relative(ours, exact);
                assert!(error <= 1e-13, "{} {error:e}", method.name());
            }
            // The ends of steps that the controller chose are constants, and so is what lies between them.
            let (ours, exact) = (values(&ours[3]), values(&exact[3]));
            let size = worst(exact.clone());
            assert!(ours[1..5].iter().all(|&t| t == 0.0), "{ours:?}");
            assert!((ours[0] - exact[0]).abs() <= 1e-13 * size);
            assert!((ours[5] - exact[exact.len() - 1]).abs() <= 1e-13 * size);
            let all = gradients(&ys, [&y0, &w, &b, &t]).map(|x| bits(&x));
            for checkpoint in [
                Checkpoint::Every(3),
                Checkpoint::States(2),
                Checkpoint::Bytes(4 * 12 * 8),
            ] {
                let options = OdeOptions {
                    checkpoint,
                    ..every.clone()
                };
                let (again, _) = small_solve([&y0, &w, &b, &t], &options);
                assert_eq!(bits(&again), bits(&ys));
                let grads = gradients(&again, [&y0, &w, &b, &t]);
                assert_eq!(grads.map(|x| bits(&x)), all, "{checkpoint:?}");
            }
            let field = small_field(&w, &b);
            let solved = solution(&field, y0.as_tensor(), &times[..], &every).unwrap();
            assert_eq!(solved.times(), nodes);
            let cotangent = scattered(ys.dims(), 1.0, 5);
            let y0 = solved.vjp(&cotangent).unwrap().y0;
            assert_eq!(bits(&y0), all[0], "{}", method.name());
        }
    }
}

#[test]
fn the_states_at_all_fixed_steps_are_those_of_a_finer_grid() {
    let [y0, w, b, t] = small_problem(&TIMES);
    let finer: Vec<_> = TIMES
        .windows(2)
        .flat_map(|w| [0.0, 1.0, 2.0].map(|j| w[0] + (w[1] - w[0]) * (j / 3.0)))
        .chain([TIMES[5]])
        .collect();
    let grid = Var::new(finer.as_slice(), &Device::Cpu).unwrap();
    let (exact, _) = small_solve([&y0, &w, &b, &grid], &OdeOptions::default());
    let exact_grads = gradients(&exact, [&y0, &w, &b, &grid]);
    for steps in [Steps::PerInterval(3), Steps::At(finer.clone())] {
        let options = OdeOptions {
            output: Output::Steps,
            steps: steps.clone(),
            ..Default::default()
        };
        let (ys, _) = small_solve([&y0, &w, &b, &t], &options);
        assert_eq!(ys.dims(), exact.dims());
        assert!(relative(&ys, &exact) <= 8.0 * U_F64, "{steps:?}");
        let grads = gradients(&ys, [&y0, &w, &b, &t]);
        for (ours, exact) in grads.iter().zip(&exact_grads).take(3) {
            assert!(relative(ours, exact) <= 1e-13, "{steps:?}");
        }
        // Equal parts of an interval move with its ends; times that are given as numbers do not.
        let of_nodes = values(&exact_grads[3]);
        let mut expected = [0.0; 6];
        for (n, grad) in of_nodes.iter().enumerate() {
            let (i, s) = (n / 3, (n % 3) as f64 / 3.0);
            match steps {
                Steps::At(_) if s > 0.0 => {}
                _ => {
                    expected[i] += (1.0 - s) * grad;
                    expected[(i + 1).min(5)] += s * grad;
                }
            }
        }
        let ours = values(&grads[3]);
        let error = worst(ours.iter().zip(expected).map(|(a, b)| a - b)) / worst(expected);
        assert!(error <= 1e-12, "{steps:?} {error:e}");
        let field = small_field(&w, &b);
        let solved = solution(&field, y0.as_tensor(), &TIMES[..], &options).unwrap();
        let error = worst(solved.times().iter().zip(&finer).map(|(a, b)| a - b));
        assert!(error <= 4.0 * U_F64, "{steps:?} {error:e}");
    }
}

#[test]
fn a_solve_that_stops_hands_over_the_states_at_all_steps_that_it_took() {
    let [y0, w, b, _] = small_problem(&TIMES);
    let options = OdeOptions {
        output: Output::Steps,
        ..options(&DOPRI5, Adaptive::new(1e-9, 1e-9).max_steps(7))
    };
    let error = odeint(small_field(&w, &b), y0.as_tensor(), &TIMES, &options).unwrap_err();
    let Error::Stopped(stopped) = error else {
        panic!("{error}")
    };
    assert_eq!(stopped.outputs, stopped.accepted + 1);
    assert_eq!(stopped.states[0].dims(), [stopped.outputs, 4, 3]);
}

#[test]
fn three_hundred_outputs_cost_no_steps_unless_steps_end_on_them() {
    let times: Vec<f64> = (0..=300).map(|i| 3.0 * f64::from(i) / 300.0).collect();
    for method in PAIRS {
        for direction in [1.0, -1.0] {
            let times: Vec<f64> = times.iter().map(|t| direction * t).collect();
            let solve = |adaptive: Adaptive, times: &[f64]| {
                let recorder = Recorder::tracing();
                let options = OdeOptions {
                    recorder: Some(recorder.clone()),
                    ..options(&method, adaptive)
                };
                let y0 = Tensor::new(&[1f64, 0.0], &Device::Cpu).unwrap();
                let turn = |_: &Time, y: &Tensor| {
                    Tensor::cat(&[&y.narrow(0, 1, 1)?.neg()?, &y.narrow(0, 0, 1)?], 0)
                };
                let ys = predict(&turn, &y0, times, &options).unwrap();
                (
                    values(&ys.get(ys.dim(0).unwrap() - 1).unwrap()),
                    values(&ys),
                    recorder.take(),
                )
            };
            let adaptive = || Adaptive::new(1e-4, 1e-4);
            let ends = [times[0], times[300]];
            let (last, _, alone) = solve(adaptive(), &ends);
            let (same, all, between) = solve(adaptive().step_on_outputs(false), &times);
            let name = method.name();
            assert_eq!((&last, alone.steps), (&same, between.steps), "{name}");
            assert_eq!(alone.step_times, between.step_times, "{name}");
            assert!(between.steps < 60, "{name}");
            let exact = times.iter().flat_map(|t| [t.cos(), t.sin()]);
            let error = worst(all.iter().zip(exact).map(|(y, e)| y - e));
            assert!(error <= 1e-2, "{name} {error:e}");
            let (_, all, on) = solve(adaptive().step_on_outputs(true), &times);
            assert_eq!((on.steps, &on.step_times), (300, &times), "{name}");
            let exact = times.iter().flat_map(|t| [t.cos(), t.sin()]);
            let error = worst(all.iter().zip(exact).map(|(y, e)| y - e));
            assert!(error <= 1e-4, "{name} {error:e}");
        }
    }
}

/// The end of Van der Pol's oscillator, μ = 5, and what its solve did.
fn relaxation(precision: Precision, adaptive: Adaptive) -> (Tensor, Stats) {
    let field = |_: &Time, y: &Tensor| {
        let (x, v) = (y.narrow(0, 0, 1)?, y.narrow(0, 1, 1)?);
        let force = ((x.sqr()?.affine(-1.0, 1.0)? * &v)? * 5.0)?.sub(&x)?;
        Tensor::cat(&[&v, &force], 0)
    };
    let recorder = Recorder::default();
    let options = OdeOptions {
        precision: Some(precision),
        output: Output::Final,
        recorder: Some(recorder.clone()),
        ..options(&DOPRI5, adaptive)
    };
    let y0 = Tensor::new(&[2f64, 0.0], &Device::Cpu).unwrap();
    let y = match predict(&field, &y0, &[0.0, 10.0], &options) {
        Ok(y) => y,
        // Where there is no floor.
        Err(Error::Stopped(stopped)) if stopped.accepted + stopped.rejected >= 4000 => y0,
        Err(error) => panic!("{error}"),
    };
    (y.to_dtype(DType::F64).unwrap(), recorder.take())
}

#[test]
fn a_relaxation_oscillation_in_low_precision_costs_no_more_at_a_tolerance_that_cannot_be_kept() {
    let exact = relaxation(Precision::f64(), Adaptive::new(1e-12, 1e-12)).0;
    for (precision, noise) in [(Precision::bf16(), 5e-2), (Precision::f16(), 5e-3)] {
        let solve = |rtol: f64, floor: bool| {
            let adaptive = Adaptive::new(rtol, rtol / 100.0).noise_floor(floor);
            relaxation(precision, adaptive.max_steps(4000))
        };
        let (coarse, few) = solve(1e-3, true);
        let (limited, many) = solve(1e-8, true);
        let (_, uncured) = solve(1e-8, false);
        let error = |y: &Tensor| relative(y, &exact);
        assert!(many.evaluations <= 3 * few.evaluations, "{precision:?}");
        // The fast phases reject a part of their attempts at any tolerance.
        assert!(
            many.rejected * 3 <= many.steps + many.rejected,
            "{precision:?}"
        );
        assert!(
            error(&limited) <= noise && error(&coarse) <= noise,
            "{precision:?}"
        );
        assert!(uncured.evaluations > 20 * few.evaluations, "{precision:?}");
    }
}

#[test]
fn overflow_of_the_compute_precision_and_steps_without_length_are_told_apart() {
    let ok = || Adaptive::new(1e-6, 1e-6);
    // Finite everywhere, but no step is short enough for the jump.
    let cliff = |t: &Time, y: &Tensor| (y * 0.0)? + if t.value() < 0.5 { 0.0 } else { 1e30 };
    assert_eq!(stopped(cliff, ok()), (StopReason::Underflow, 2));
    // 4e4 t leaves the range of f16 at t = 1.64, and that of f32 never.
    let low = OdeOptions {
        precision: Some(Precision::f16()),
        ..options(&DOPRI5, ok())
    };
    let y0 = Tensor::new(&[1000f32], &Device::Cpu).unwrap();
    let rising = |t: &Time, y: &Tensor| (y * 0.0)? + 4e4 * t.value();
    let error = predict(&rising, &y0, &[0.0, 1.0, 6.0], &low).unwrap_err();
    let Error::Stopped(stopped) = error else {
        panic!("{error}");
    };
    assert_eq!(
        (stopped.reason, stopped.outputs),
        (StopReason::NonFinite, 2)
    );
    assert!((1.6..1.64).contains(&stopped.t), "{}", stopped.t);
    assert!(stopped.accepted > 1 && stopped.rejected >= 10 && stopped.h > 0.0);
}

#[test]
fn steps_of_a_batch_do_not_depend_on_the_number_of_threads() {
    let w = scattered(&[96, 96], 0.3, 1);
    let y0 = scattered(&[512, 96], 1.0, 2);
    let solve = |threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build();
        pool.unwrap().install(|| {
            let recorder = Recorder::tracing();
            let options = OdeOptions {
                recorder: Some(recorder.clone()),
                ..options(&DOPRI5, Adaptive::new(1e-9, 1e-9))
            };
            let field = |_: &Time, y: &Tensor| y.matmul(&w)?.tanh();
            let ys = predict(&field, &y0, &[0.0, 0.5, 2.0], &options).unwrap();
            (bits(&ys), recorder.take().step_times)
        })
    };
    let alone = solve(1);
    assert!(alone.1.len() > 5);
    assert!(solve(7) == alone);
}

#[test]
fn a_method_whose_embedded_weights_are_its_own_finds_no_error_and_takes_the_longest_steps() {
    use candle_diffeq::tableau::EULER;
    let b = RK4.b().to_vec();
    for method in [
        EULER.with_embedded(vec![1.0]).unwrap(),
        RK4.with_embedded(b).unwrap(),
    ] {
        let recorder = Recorder::default();
        let adaptive = Adaptive::new(1e-3, 1e-3).first_step(0.1).max_step(0.1);
        let options = OdeOptions {
            recorder: Some(recorder.clone()),
            ..options(&method, adaptive)
        };
        let y0 = scattered(&[3, 2], 1.0, 1);
        let decay = |_: &Time, y: &Tensor| y.neg();
        predict(&decay, &y0, &[0.0, 1.0], &options).unwrap();
        let stats = recorder.take();
        assert!((10..=11).contains(&stats.steps) && stats.rejected == 0);
    }
}

#[test]
fn a_tensor_without_elements_has_no_part_in_the_error() {
    let field = |_: &Time, (y, none): &(Tensor, Tensor)| Ok((y.neg()?, none.clone()));
    for shape in [vec![4, 0], vec![0]] {
        let y0 = (
            scattered(&[4, 2], 1.0, 1),
            Tensor::zeros(shape, DType::F64, &Device::Cpu).unwrap(),
        );
        for dtype in [DType::F32, DType::F64] {
            let y0 = (y0.0.to_dtype(dtype).unwrap(), y0.1.to_dtype(dtype).unwrap());
            let options = options(&DOPRI5, Adaptive::new(1e-5, 1e-7));
            let (ys, _) = odeint(field, &y0, &[0.0, 1.0], &options).unwrap();
            let exact = (&y0.0 * (-1f64).exp()).unwrap();
            assert!(relative(&ys.get(1).unwrap(), &exact) < 1e-4);
        }
    }
}

#[test]
fn an_infinite_state_is_no_solution() {
    let y0 = Tensor::zeros(2, DType::F32, &Device::Cpu).unwrap();
    let field = |_: &Time, y: &Tensor| y.ones_like()? * 3e38;
    let options = options(&DOPRI5, Adaptive::new(1e-3, 1e-3));
    let solved = odeint(field, &y0, &[0.0, 2.0], &options);
    assert!(solved.is_err(), "{:?}", solved.map(|y| values(&y)));
}

#[test]
fn a_component_that_begins_at_zero_needs_no_absolute_tolerance() {
    let y0 = Tensor::new(&[1f64, 0.0], &Device::Cpu).unwrap();
    let turn =
        |_: &Time, y: &Tensor| Tensor::cat(&[&y.narrow(0, 1, 1)?, &y.narrow(0, 0, 1)?.neg()?], 0);
    let options = options(&DOPRI5, Adaptive::new(1e-8, 0.0));
    let ys = odeint(turn, &y0, &[0.0, 1.0], &options).unwrap();
    let y = values(&ys.get(1).unwrap());
    let (sin, cos) = 1f64.sin_cos();
    assert!((y[0] - cos).abs() + (y[1] + sin).abs() < 1e-7, "{y:?}");
}

#[test]
fn a_dense_solution_is_differentiable_in_its_times_alone_and_refuses_what_was_not_kept() {
    let plain = scattered(&[3, 2], 1.0, 1);
    let decay = |_: &Time, y: &Tensor| y.neg();
    let options = options(&DOPRI5, Adaptive::new(1e-10, 1e-10));
    let dense = odeint_dense(decay, &plain, &[0.0, 1.0], &options).unwrap();
    let times = Var::new(&[0.2f64, 0.9], &Device::Cpu).unwrap();
    let ys = dense.at(times.as_tensor()).unwrap();
    let grads = ys.sum_all().unwrap().backward().unwrap();
    let sums: Vec<f64> = [0, 1]
        .map(|i| -values(&ys.get(i).unwrap()).iter().sum::<f64>())
        .to_vec();
    for (got, exact) in values(grads.get(&times).unwrap()).iter().zip(&sums) {
        assert!((got - exact).abs() < 1e-7, "{got} {exact}");
    }
    let nothing = OdeOptions {
        checkpoint: Checkpoint::Nothing,
        ..options
    };
    let y0 = Var::from_tensor(&plain).unwrap();
    let dense = odeint_dense(decay, y0.as_tensor(), &[0.0, 1.0], &nothing).unwrap();
    let ys = dense.at(&[0.5]).unwrap();
    let failed = ys.sum_all().unwrap().backward();
    assert!(failed.is_err());
}

#[test]
fn a_dense_solution_without_a_step_is_its_start() {
    let options = options(&DOPRI5, Adaptive::new(1e-6, 1e-6));
    let decay = |_: &Time, y: &Tensor| y.neg();
    let empty = Tensor::zeros((0, 2), DType::F64, &Device::Cpu).unwrap();
    let dense = odeint_dense(decay, &empty, &[0.0, 1.0], &options).unwrap();
    assert_eq!(dense.at(&[0.5, 1.0]).unwrap().dims(), [2, 0, 2]);
    let y0 = Var::from_tensor(&scattered(&[3, 2], 1.0, 1)).unwrap();
    let dense = odeint_dense(decay, y0.as_tensor(), &[2.0], &options).unwrap();
    let ys = dense.at(&[2.0]).unwrap();
    assert_eq!(values(&ys.get(0).unwrap()), values(y0.as_tensor()));
    let grads = ys.sum_all().unwrap().backward().unwrap();
    assert_eq!(values(grads.get(&y0).unwrap()), [1.0; 6]);
    assert_eq!(values(&dense.slopes_at(&[2.0]).unwrap()), [0.0; 6]);
    assert!(matches!(
        dense.at(&[2.5]),
        Err(Error::Adaptive(AdaptiveDefect::Outside { .. }))
    ));
}

#[test]
fn a_stiff_state_that_has_come_to_rest_has_the_gradient_of_the_flow() {
    // Eigenvalues -100, and -80 ± 30 i: after ten units of time, nothing is left of the start.
    let matrices = [vec![-100.0], vec![-80.0, 30.0, -30.0, -80.0]];
    for dtype in [DType::F32, DType::F64] {
        for (method, matrix) in PAIRS
            .iter()
            .flat_map(|m| matrices.iter().map(move |a| (m, a)))
        {
            for rtol in [1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7] {
                let dim = if matrix.len() == 1 { 1 } else { 2 };
                let tensor = |x: &[f64], shape: (usize, usize)| {
                    let x = Tensor::from_slice(x, shape, &Device::Cpu).unwrap();
                    x.to_dtype(dtype).unwrap()
                };
                let (a, rest) = (
                    tensor(matrix, (dim, dim)),
                    tensor(&[0.7, -0.3][..dim], (1, dim)),
                );
                let decay = move |_: &Time, y: &Tensor| y.broadcast_sub(&rest)?.matmul(&a);
                let y0 = Var::from_tensor(&tensor(&[0.1, 1.9][..dim], (1, dim))).unwrap();
                let options = options(method, Adaptive::new(rtol, rtol));
                let ys = odeint(decay, y0.as_tensor(), &[0.0, 10.0], &options).unwrap();
                let grads = ys.get(1).unwrap().sum_all().unwrap().backward().unwrap();
                let largest = worst(values(grads.get(&y0).unwrap()));
                let name = method.name();
                assert!(
                    largest < 1e-20,
                    "{name} {dtype:?} {rtol:e} {dim}: {largest:e}"
                );
            }
        }
    }
}
