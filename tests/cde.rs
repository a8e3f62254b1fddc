//! Controlled differential equations: paths through observations, and solutions along them.
//!
//! `cargo test --test cde`, seconds.

mod common;

use std::path::PathBuf;

use candle_core::{DType, Device, IndexOp, Tensor, Var};
use candle_diffeq::cde::{cdeint, ControlPath, NeuralCde, Observations};
use candle_diffeq::error::PathDefect;
use candle_diffeq::metrics::Recorder;
use candle_diffeq::nn::{Activation, CdeMlp};
use candle_diffeq::options::{Adaptive, Arithmetic, Checkpoint, Output, Steps};
use candle_diffeq::tableau::{DOPRI5, EULER, RK4};
use candle_diffeq::{Error, OdeOptions, Precision, Result, Time};
use candle_nn::VarMap;

#[path = "../examples/conformance/cde.rs"]
#[allow(dead_code)]
mod controlled;
#[path = "../examples/conformance/oracle.rs"]
#[allow(dead_code)]
mod oracle;
#[path = "../examples/conformance/outcome.rs"]
#[allow(dead_code)]
mod outcome;

use oracle::Oracle;

const CPU: Device = Device::Cpu;

/// Numbers in [−1, 1) that look like chance.
fn some(shape: &[usize], seed: u64) -> Tensor {
    let mut x = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut next = || {
        x = x
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (x >> 11) as f64 / (1u64 << 52) as f64 - 1.0
    };
    let n = shape.iter().product();
    let numbers: Vec<f64> = (0..n).map(|_| next()).collect();
    Tensor::from_vec(numbers, shape, &CPU).unwrap()
}

fn numbers(x: &Tensor) -> Vec<f64> {
    let x = x.to_dtype(DType::F64).unwrap();
    x.flatten_all().unwrap().to_vec1().unwrap()
}

fn distance(x: &Tensor, y: &Tensor) -> f64 {
    let (x, y) = (numbers(x), numbers(y));
    assert_eq!(x.len(), y.len());
    let norm = |x: &mut dyn Iterator<Item = f64>| x.map(|x| x * x).sum::<f64>().sqrt();
    let size = norm(&mut y.iter().copied());
    norm(&mut x.iter().zip(&y).map(|(x, y)| x - y)) / size.max(1e-300)
}

const TIMES: [f64; 6] = [0.0, 0.4, 1.0, 1.3, 2.1, 2.5];

/// Three series of two channels, one of which is time.
fn observations(xs: &Tensor) -> Observations {
    Observations::at(&TIMES, xs).unwrap()
}

type Kind = (&'static str, fn(&Observations) -> Result<ControlPath>);

/// Every path, with channel 0 as time.
const KINDS: [Kind; 5] = [
    ("linear", Observations::linear),
    ("hermite", Observations::hermite),
    ("natural cubic", Observations::natural_cubic),
    ("rectilinear", |o| o.rectilinear(0)),
    ("log-signature", |o| o.log_signature(2)),
];

/// F of a closure: tanh of a linear map of z, as (rows, hidden, channels).
fn closure(
    weight: &Tensor,
    channels: usize,
) -> impl Fn(&Time, &Tensor) -> candle_core::Result<Tensor> + Send + Sync + 'static {
    let weight = weight.clone();
    move |_: &Time, z: &Tensor| {
        let (rows, hidden) = z.dims2()?;
        let flat = z.matmul(&weight.to_dtype(z.dtype())?.t()?)?.tanh()?;
        flat.reshape((rows, hidden, channels))
    }
}

#[test]
fn solutions_and_gradients_along_every_path_equal_independent_ones() {
    let root = std::env::var_os("CARGO_MANIFEST_DIR");
    let root = root.map_or_else(|| env!("CARGO_MANIFEST_DIR").into(), PathBuf::from);
    let oracles = Oracle::read_all(&root.join("tests/data/cde")).unwrap();
    assert_eq!(oracles.len(), 3);
    let mut schemes = 0;
    for oracle in oracles {
        let rows = controlled::rows(&oracle).unwrap();
        for controlled::Row { scheme, errors } in &rows {
            assert!(errors.iter().all(|e| *e <= 1e-10), "{scheme}: {errors:?}");
        }
        assert!(controlled::worst(&rows) <= 1e-10);
        schemes += rows.len();
    }
    // 4 paths, 4 paths and 2 paths by three schemes, and three log-signatures.
    assert_eq!(schemes, 33);
}

#[test]
fn rk4_has_order_four_along_every_path_although_slopes_jump() {
    let xs = some(&[3, 6, 2], 1);
    let weight = some(&[8, 4], 2);
    let z0 = some(&[3, 4], 3);
    for (name, kind) in &KINDS[..4] {
        let path = kind(&observations(&xs)).unwrap();
        let end = |steps: usize| {
            let options = OdeOptions {
                method: RK4,
                steps: Steps::PerInterval(steps),
                output: Output::Final,
                ..Default::default()
            };
            cdeint(closure(&weight, 2), &z0, &path, path.knots(), &options).unwrap()
        };
        let exact = end(256);
        let errors = [16, 32].map(|steps| distance(&end(steps), &exact));
        let order = (errors[0] / errors[1]).log2();
        assert!(
            (order - 4.0).abs() < 0.35,
            "{name}: order {order}, {errors:?}"
        );
    }
}

#[test]
fn steps_are_cut_at_the_knots_that_lie_inside_them() {
    let xs = some(&[3, 6, 2], 1);
    let (weight, z0) = (some(&[8, 4], 2), some(&[3, 4], 3));
    let path = observations(&xs).linear().unwrap();
    let solve = |times: &[f64]| {
        let recorder = Recorder::default();
        let options = OdeOptions {
            output: Output::Final,
            recorder: Some(recorder.clone()),
            ..Default::default()
        };
        let z = cdeint(closure(&weight, 2), &z0, &path, times, &options).unwrap();
        (z, recorder.take().steps)
    };
    let (by_knots, steps) = solve(&TIMES);
    let (whole, cut) = solve(&path.ends());
    assert_eq!((steps, cut), (5, 5));
    assert_eq!(numbers(&by_knots), numbers(&whole));
}

#[test]
fn adaptive_steps_that_end_on_knots_keep_the_tolerance_and_hardly_any_is_rejected() {
    let xs = some(&[3, 6, 2], 1);
    let z0 = some(&[3, 4], 3);
    let fixed = OdeOptions {
        steps: Steps::PerInterval(200),
        output: Output::Final,
        ..Default::default()
    };
    for (name, kind) in KINDS {
        let path = kind(&observations(&xs)).unwrap();
        let weight = some(&[4 * path.channels(), 4], 2);
        let solve = |path: &ControlPath, times: &[f64], options: &OdeOptions| {
            let recorder = Recorder::default();
            let options = OdeOptions {
                recorder: Some(recorder.clone()),
                ..options.clone()
            };
            let field = closure(&weight, path.channels());
            let z = cdeint(field, &z0, path, times, &options).unwrap();
            (z, recorder.take())
        };
        let (exact, _) = solve(&path, path.knots(), &fixed);
        let adaptive = OdeOptions {
            method: DOPRI5,
            steps: Steps::Adaptive(Adaptive::new(1e-8, 1e-8)),
            output: Output::Final,
            ..Default::default()
        };
        let (across, cost) = solve(&path, &path.ends(), &adaptive);
        let stopping = path.clone().stopping_at_knots().unwrap();
        let (z, stats) = solve(&stopping, &path.ends(), &adaptive);
        let error = distance(&z, &exact);
        assert!(error < 10.0 * 1e-8, "{name}: {error:e}");
        assert!(stats.rejected <= stats.steps / 4, "{name}: {stats:?}");
        match name {
            // Their slopes are continuous, so that steps may cross knots.
            "hermite" | "natural cubic" => {
                assert!(distance(&across, &exact) < 1e-5, "{name}");
                assert!(cost.rejected > stats.rejected, "{name}: {cost:?}");
            }
            _ => assert_eq!(numbers(&across), numbers(&z), "{name}"),
        }
    }
}

/// A model and its variables, in f64.
fn model(channels: usize) -> (VarMap, NeuralCde) {
    let vars = VarMap::new();
    let cde = NeuralCde::new(
        &vars,
        "cde",
        DType::F64,
        &CPU,
        move |vb| candle_nn::linear(channels, 4, vb),
        move |vb| CdeMlp::new(&[4, 6], channels, Activation::Tanh, vb),
    )
    .unwrap();
    // Not by chance.
    let data = vars.data().lock().unwrap();
    let mut names: Vec<_> = data.keys().cloned().collect();
    names.sort();
    for (i, name) in names.iter().enumerate() {
        let var = &data[name];
        let value = (some(var.dims(), 40 + i as u64) * 0.7).unwrap();
        var.set(&value).unwrap();
    }
    drop(data);
    (vars, cde)
}

#[test]
fn the_pull_back_by_hand_equals_candles_with_respect_to_state_weights_and_observations() {
    let (vars, cde) = model(2);
    for (name, kind) in &KINDS[..4] {
        let xs = Var::from_tensor(&some(&[3, 6, 2], 5)).unwrap();
        let path = kind(&observations(&xs)).unwrap();
        let v = some(&[path.knots().len(), 3, 4], 6);
        let by_hand = cde.solve(&path, path.knots()).unwrap();
        let by_hand_grads = (&by_hand * &v)
            .unwrap()
            .sum_all()
            .unwrap()
            .backward()
            .unwrap();
        // The same field as a closure over the same variables.
        let get = |name: &str| vars.data().lock().unwrap()[name].clone();
        let layers = ["0", "1"].map(|l| {
            let part = |what: &str| get(&format!("cde.field.{l}.{what}")).into_inner();
            candle_nn::Linear::new(part("weight"), Some(part("bias")))
        });
        let field = CdeMlp::from_layers(&layers, 2, Activation::Tanh).unwrap();
        let field =
            move |t: &Time, z: &Tensor| candle_diffeq::cde::ControlledField::matrix(&field, t, z);
        let z0 = cde.initial_state(&path, 0.0).unwrap();
        let options = OdeOptions::default();
        let plain = cdeint(field, &z0, &path, path.knots(), &options).unwrap();
        assert!(distance(&by_hand, &plain) < 1e-14, "{name}");
        let grads = (&plain * &v)
            .unwrap()
            .sum_all()
            .unwrap()
            .backward()
            .unwrap();
        let all = vars.all_vars();
        assert_eq!(all.len(), 6);
        for var in all.iter().chain([&xs]) {
            let (ours, theirs) = (by_hand_grads.get(var).unwrap(), grads.get(var).unwrap());
            assert!(distance(ours, theirs) < 1e-12, "{name}: {:?}", var.shape());
        }
    }
}

#[test]
fn a_rectilinear_path_does_not_know_what_comes_later() {
    let gone = f64::NAN;
    let series = |last: f64| {
        let rows = [[[0.0, gone], [1.0, gone], [2.0, last], [3.0, gone]]];
        let xs = Tensor::new(&rows, &CPU).unwrap();
        Observations::new(&xs).unwrap().rectilinear(0).unwrap()
    };
    let (one, other) = (series(7.0), series(-5.0));
    // Observation 2 is at knot 4, and the path goes to it from knot 3 on.
    for knot in [0.0, 1.0, 2.5, 3.0] {
        let at = |path: &ControlPath| numbers(&path.evaluate(knot).unwrap());
        assert_eq!(at(&one), at(&other));
        assert_eq!(at(&one)[1], 0.0);
    }
    for knot in [4.0, 6.0] {
        assert_eq!(numbers(&one.evaluate(knot).unwrap())[1], 7.0);
    }
}

#[test]
fn gradients_of_observations_are_those_of_differences_and_zero_where_one_is_missing() {
    let gone = f64::NAN;
    let holes = Tensor::new(
        &[
            [0.0, 1.0, gone, 2.0, gone, gone],
            [gone, 0.5, 1.0, gone, 2.0, 0.3],
        ],
        &CPU,
    )
    .unwrap();
    let data = holes.unsqueeze(2).unwrap();
    for (name, kind) in KINDS {
        if name == "rectilinear" {
            continue;
        }
        let loss = |xs: &Tensor| {
            let path = observations(xs).with_time().and_then(|o| kind(&o)).unwrap();
            let weight = some(&[4 * path.channels(), 4], 2);
            let z0 = some(&[2, 4], 3);
            let field = closure(&weight, path.channels());
            let options = OdeOptions {
                output: Output::Final,
                ..Default::default()
            };
            let z = cdeint(field, &z0, &path, path.knots(), &options).unwrap();
            (z * some(&[2, 4], 9)).unwrap().sum_all().unwrap()
        };
        let xs = Var::from_tensor(&data).unwrap();
        let grads = loss(&xs).backward().unwrap();
        let grad = numbers(grads.get(&xs).unwrap());
        for (i, x) in numbers(&data).into_iter().enumerate() {
            if x.is_nan() {
                assert_eq!(grad[i], 0.0);
                continue;
            }
            let at = |d: f64| {
                let mut moved = numbers(&data);
                moved[i] += d;
                let moved = Tensor::from_vec(moved, data.shape(), &CPU).unwrap();
                loss(&moved).to_scalar::<f64>().unwrap()
            };
            let difference = (at(1e-5) - at(-1e-5)) / 2e-5;
            assert!(
                (grad[i] - difference).abs() < 1e-8,
                "{name}, {i}: {} {difference}",
                grad[i]
            );
        }
    }
}

#[test]
fn a_series_in_a_batch_of_longer_ones_has_the_solution_that_it_has_alone() {
    let xs = some(&[3, 6, 2], 7);
    let lengths = [6, 3, 1];
    let (weight, z0) = (some(&[8, 4], 2), some(&[3, 4], 3));
    for (name, kind) in &KINDS[..4] {
        let together = observations(&xs).lengths(&lengths).unwrap();
        let path = kind(&together).unwrap();
        let options = OdeOptions {
            output: Output::Final,
            ..Default::default()
        };
        let knots = path.knots().to_vec();
        let all = cdeint(closure(&weight, 2), &z0, &path, &knots, &options).unwrap();
        let short = xs.i((1..2, ..3)).unwrap();
        let alone = kind(&Observations::at(&TIMES[..3], &short).unwrap()).unwrap();
        let z = cdeint(
            closure(&weight, 2),
            &z0.i(1..2).unwrap(),
            &alone,
            alone.knots(),
            &options,
        )
        .unwrap();
        let batched = all.i(1).unwrap();
        assert!(
            distance(&batched, &z.flatten_all().unwrap()) < 1e-14,
            "{name}"
        );
        // A single observation moves nothing.
        let last = all.i(2).unwrap();
        assert_eq!(numbers(&last), numbers(&z0.i(2).unwrap()), "{name}");
    }
}

#[test]
fn gradients_with_respect_to_time_are_those_of_differences() {
    let xs = some(&[3, 6, 2], 1);
    let (weight, z0) = (some(&[8, 4], 2), some(&[3, 4], 3));
    let path = observations(&xs).hermite().unwrap();
    let options = OdeOptions {
        steps: Steps::PerInterval(4),
        output: Output::Final,
        ..Default::default()
    };
    let loss = |times: &Tensor| {
        let z = cdeint(closure(&weight, 2), &z0, &path, times, &options).unwrap();
        z.sum_all().unwrap()
    };
    // Within an interval of the path.
    let times = Var::new(&[0.45, 0.9], &CPU).unwrap();
    let grads = loss(&times).backward().unwrap();
    let grad = numbers(grads.get(&times).unwrap());
    for i in 0..2 {
        let at = |d: f64| {
            let mut moved = [0.45, 0.9];
            moved[i] += d;
            let moved = Tensor::new(&moved, &CPU).unwrap();
            loss(&moved).to_scalar::<f64>().unwrap()
        };
        let difference = (at(1e-5) - at(-1e-5)) / 2e-5;
        assert!((grad[i] - difference).abs() < 1e-8, "{grad:?} {difference}");
    }
}

/// Weights of F, a network 4-6-(4 × 2) with tanh, by name and shape.
const WEIGHTS: [(&str, &[usize]); 4] = [("a", &[6, 4]), ("b", &[6]), ("c", &[8, 6]), ("d", &[8])];

fn matrix(w: &[Tensor], z: &Tensor) -> candle_core::Result<Tensor> {
    let hidden = z.matmul(&w[0].t()?)?.broadcast_add(&w[1])?.tanh()?;
    let f = hidden.matmul(&w[2].t()?)?.broadcast_add(&w[3])?.tanh()?;
    f.reshape((z.dim(0)?, 4, 2))
}

/// The gradients of z0 and of all weights of the sum of squares of z at the end, each joined.
fn gradients_of(z: &Tensor, z0: &Var, weights: &[Var]) -> [Vec<f64>; 2] {
    let grads = z.sqr().unwrap().sum_all().unwrap().backward().unwrap();
    let of = |var: &Var| numbers(grads.get(var).unwrap());
    [of(z0), weights.iter().flat_map(of).collect()]
}

/// Values that f32 holds, as a variable in a dtype.
fn single(shape: &[usize], seed: u64, dtype: DType) -> Var {
    let x = some(shape, seed).to_dtype(DType::F32).unwrap();
    Var::from_tensor(&x.to_dtype(dtype).unwrap()).unwrap()
}

#[test]
fn gradients_in_low_precision_are_those_of_rounded_arithmetic_for_any_number_of_steps() {
    let xs = some(&[3, 6, 2], 5).to_dtype(DType::F32).unwrap();
    let path = observations(&xs).hermite().unwrap();
    let exact_path = observations(&xs.to_dtype(DType::F64).unwrap())
        .hermite()
        .unwrap();
    // By the crate.
    let vars = VarMap::new();
    let cde = NeuralCde::new(
        &vars,
        "cde",
        DType::F32,
        &CPU,
        |vb| candle_nn::linear(2, 4, vb),
        |vb| {
            let all = WEIGHTS.iter().map(|(name, shape)| vb.get(*shape, name));
            let w = all.collect::<candle_core::Result<Vec<_>>>()?;
            Ok(move |_: &Time, z: &Tensor| matrix(&w, z))
        },
    )
    .unwrap();
    let weights: Vec<_> = WEIGHTS
        .iter()
        .zip(70..)
        .map(|((name, shape), seed)| {
            let var = vars.data().lock().unwrap()[&format!("cde.field.{name}")].clone();
            var.set(single(shape, seed, DType::F32).as_tensor())
                .unwrap();
            var
        })
        .collect();
    let z0 = single(&[3, 4], 60, DType::F32);
    let mut cde = Some(cde);
    let mut solved = |precision: Precision, steps: usize| {
        let next = cde.take().unwrap().options(OdeOptions {
            precision: Some(precision),
            steps: Steps::PerInterval(steps),
            output: Output::Final,
            ..Default::default()
        });
        let z = next
            .solve_from(z0.as_tensor(), &path, path.knots())
            .unwrap();
        cde = Some(next);
        gradients_of(&z, &z0, &weights)
    };
    // By candle's tape over the same steps in f64, where what F is given and what F X' is, and the cotangents of both,
    // is rounded: the backward of a cast casts.
    let taped = |rounded: DType, steps: usize| {
        let q = |x: &Tensor| x.to_dtype(rounded).unwrap().to_dtype(DType::F64).unwrap();
        let weights = WEIGHTS.iter().zip(70..).map(|((_, shape), seed)| {
            let value = single(shape, seed, DType::F64);
            Var::from_tensor(&q(value.as_tensor()).detach()).unwrap()
        });
        let weights: Vec<_> = weights.collect();
        let w: Vec<_> = weights.iter().map(|var| var.as_tensor().clone()).collect();
        let z0 = single(&[3, 4], 60, DType::F64);
        let velocity = |t: f64, z: &Tensor| {
            let slope = q(&exact_path.derivative(t).unwrap()).unsqueeze(1).unwrap();
            let f = matrix(&w, &q(z)).unwrap();
            q(&f.broadcast_mul(&slope).unwrap().sum(2).unwrap())
        };
        let mut z = z0.as_tensor().clone();
        for knots in exact_path.knots().windows(2) {
            let h = (knots[1] - knots[0]) / steps as f64;
            for n in 0..steps {
                let t = knots[0] + n as f64 * h;
                let moved = |k: &Tensor, c: f64| (&z + (k * (c * h)).unwrap()).unwrap();
                let k1 = velocity(t, &z);
                let k2 = velocity(t + 0.5 * h, &moved(&k1, 0.5));
                let k3 = velocity(t + 0.5 * h, &moved(&k2, 0.5));
                let k4 = velocity((t + h).min(knots[1]), &moved(&k3, 1.0));
                let middle = ((k2 + k3).unwrap() * 2.0).unwrap();
                let sum = ((k1 + k4).unwrap() + middle).unwrap();
                z = moved(&sum, 1.0 / 6.0);
            }
        }
        gradients_of(&z, &z0, &weights)
    };
    let apart = |x: &[f64], exact: &[f64]| {
        let norm = |x: &mut dyn Iterator<Item = f64>| x.map(|x| x * x).sum::<f64>().sqrt();
        let off = norm(&mut x.iter().zip(exact).map(|(x, e)| x - e));
        off / norm(&mut exact.iter().copied())
    };
    for (precision, u) in [
        (Precision::bf16(), 2f64.powi(-8)),
        (Precision::f16(), 2f64.powi(-11)),
    ] {
        let mut first = None;
        for steps in [1, 8, 64] {
            let exact = taped(DType::F64, steps);
            let rounded = taped(precision.compute, steps);
            let ours = solved(precision, steps);
            let errors = [0, 1].map(|i| apart(&ours[i], &exact[i]) / u);
            let bounds = [0, 1].map(|i| apart(&rounded[i], &exact[i]) / u);
            println!(
                "{:?}, {steps} steps an interval: z0 {:.2} u ({:.2} by rounded arithmetic), θ {:.2} u ({:.2})",
                precision.compute, errors[0], bounds[0], errors[1], bounds[1]
            );
            let first = *first.get_or_insert(errors);
            for i in [0, 1] {
                assert!(
                    errors[i] <= 2.0 * bounds[i],
                    "{steps}: {errors:?} u for {bounds:?}"
                );
                assert!(
                    errors[i] <= 2.0 * first[i],
                    "{steps}: {errors:?} u, not {first:?}"
                );
            }
        }
    }
}

#[test]
fn fewer_checkpoints_change_no_bit_of_a_gradient() {
    let (vars, mut cde) = model(2);
    let xs = Var::from_tensor(&some(&[3, 6, 2], 5)).unwrap();
    let path = observations(&xs).linear().unwrap();
    let mut found: Vec<Vec<f64>> = vec![];
    for checkpoint in [Checkpoint::All, Checkpoint::Every(3), Checkpoint::States(2)] {
        cde = cde.options(OdeOptions {
            checkpoint,
            steps: Steps::PerInterval(3),
            ..Default::default()
        });
        let z = cde.solve(&path, path.knots()).unwrap();
        let grads = z.sqr().unwrap().sum_all().unwrap().backward().unwrap();
        let mut all: Vec<f64> = numbers(grads.get(&xs).unwrap());
        let mut vars = vars.all_vars();
        vars.sort_by_key(|v| format!("{:?}", v.id()));
        for var in vars {
            all.extend(numbers(grads.get(&var).unwrap()));
        }
        found.push(all);
    }
    assert_eq!(found[0], found[1]);
    assert_eq!(found[0], found[2]);
}

/// z at all times, and the gradients of z0 and the weights for a loss that reads every state.
fn outcome_of(
    cde: NeuralCde,
    vars: &VarMap,
    (z0, path): (&Tensor, &ControlPath),
    times: &[f64],
    options: OdeOptions,
) -> (Vec<Tensor>, NeuralCde) {
    let cde = cde.options(options);
    let z0 = Var::from_tensor(z0).unwrap();
    let zs = cde.solve_from(&z0, path, times).unwrap();
    let v = some(zs.dims(), 17).to_dtype(zs.dtype()).unwrap();
    let grads = (&zs * v).unwrap().sum_all().unwrap().backward().unwrap();
    let mut found = vec![zs.detach(), grads.get(&z0).unwrap().clone()];
    for l in ["0", "1"] {
        for what in ["weight", "bias"] {
            let var = vars.data().lock().unwrap()[&format!("cde.field.{l}.{what}")].clone();
            found.push(grads.get(&var).unwrap().clone());
        }
    }
    (found, cde)
}

#[test]
fn tiles_and_candles_operations_agree_along_every_path_in_both_directions() {
    for rows in [1, 5, 83] {
        let xs = some(&[rows, 6, 2], 8);
        let lengths: Vec<usize> = (0..rows).map(|i| 6 - i % 4).collect();
        let z0 = some(&[rows, 4], 3);
        for (name, kind) in KINDS {
            let path = kind(&observations(&xs).lengths(&lengths).unwrap()).unwrap();
            let (vars, mut cde) = model(path.channels());
            let mut times = path.knots().to_vec();
            for backward in [false, true] {
                if backward {
                    times.reverse();
                }
                let options = |fusion: bool| OdeOptions {
                    fusion,
                    steps: Steps::PerInterval(2),
                    checkpoint: Checkpoint::Every(3),
                    ..Default::default()
                };
                let (tiles, c) = outcome_of(cde, &vars, (&z0, &path), &times, options(true));
                let (plain, c) = outcome_of(c, &vars, (&z0, &path), &times, options(false));
                cde = c;
                for (tiles, plain) in tiles.iter().zip(&plain) {
                    let error = distance(tiles, plain);
                    assert!(error < 1e-13, "{name}, {rows} rows, {backward}: {error:e}");
                }
            }
        }
    }
}

#[test]
fn in_tiles_the_rounding_of_low_precision_is_that_of_candles_operations() {
    let xs = some(&[40, 6, 2], 8).to_dtype(DType::F32).unwrap();
    let z0 = some(&[40, 4], 3).to_dtype(DType::F32).unwrap();
    let path = observations(&xs).hermite().unwrap();
    let (vars, mut cde) = model(2);
    for (precision, bound) in [
        (Precision::f32(), 2f64.powi(-20)),
        (Precision::bf16(), 2f64.powi(-8)),
        (Precision::f16(), 2f64.powi(-11)),
    ] {
        let options = |fusion: bool| OdeOptions {
            fusion,
            precision: Some(precision),
            ..Default::default()
        };
        let (tiles, c) = outcome_of(cde, &vars, (&z0, &path), path.knots(), options(true));
        let (plain, c) = outcome_of(c, &vars, (&z0, &path), path.knots(), options(false));
        cde = c;
        for (tiles, plain) in tiles.iter().zip(&plain) {
            let error = distance(tiles, plain);
            assert!(error < bound, "{precision:?}: {error:e}");
        }
    }
}

#[test]
fn rows_with_adaptive_steps_of_their_own_end_on_knots_and_do_not_depend_on_each_other() {
    let rows = 37;
    let xs = some(&[rows, 6, 2], 8);
    let z0 = some(&[rows, 4], 3);
    for (name, kind) in [KINDS[0], KINDS[2], KINDS[4]] {
        let path = kind(&observations(&xs)).unwrap();
        let (vars, mut cde) = model(path.channels());
        for backward in [false, true] {
            let mut ends = path.ends();
            if backward {
                ends.reverse();
            }
            let recorder = Recorder::default();
            let options = |recorder: &Recorder| OdeOptions {
                method: DOPRI5,
                steps: Steps::Adaptive(Adaptive::new(1e-9, 1e-11)),
                recorder: Some(recorder.clone()),
                ..Default::default()
            };
            let (found, c) = outcome_of(cde, &vars, (&z0, &path), &ends, options(&recorder));
            let stats = recorder.take();
            let none = !common::has_tiles();
            assert!(none || stats.row_evaluations > 0, "{name}: not row by row");
            let fixed = OdeOptions {
                steps: Steps::Size(0.01),
                fusion: false,
                ..Default::default()
            };
            let (exact, c) = outcome_of(c, &vars, (&z0, &path), &ends, fixed);
            for (found, exact) in found.iter().zip(&exact) {
                let error = distance(found, exact);
                assert!(error < 1e-6, "{name}, {backward}: {error:e}");
            }
            let (row, path) = (20, kind(&observations(&xs.i(20..21).unwrap())).unwrap());
            let alone = z0.i(row..row + 1).unwrap();
            let (alone, c) = outcome_of(c, &vars, (&alone, &path), &ends, options(&recorder));
            cde = c;
            if !none {
                assert_eq!(
                    numbers(&found[0].i((.., row)).unwrap()),
                    numbers(&alone[0]),
                    "{name}"
                );
            }
        }
    }
}

/// The defect of an error.
fn defect<T>(result: Result<T>) -> PathDefect {
    match result {
        Err(Error::Path(defect)) => defect,
        Err(other) => panic!("{other}"),
        Ok(_) => panic!("no error"),
    }
}

#[test]
fn bad_observations_and_uses_of_paths_are_told_apart() {
    let xs = some(&[3, 6, 2], 1);
    let made = Observations::new;
    let zeros = |shape: &[usize], dtype| Tensor::zeros(shape, dtype, &CPU).unwrap();
    assert!(matches!(
        defect(made(&zeros(&[3, 2], DType::F32))),
        PathDefect::Shape { .. }
    ));
    assert!(matches!(
        defect(made(&zeros(&[0, 6, 2], DType::F32))),
        PathDefect::Shape { .. }
    ));
    assert!(matches!(
        defect(made(&zeros(&[3, 6, 2], DType::U32))),
        PathDefect::Dtype { .. }
    ));
    assert_eq!(
        defect(made(&zeros(&[3, 1, 2], DType::F32))),
        PathDefect::TooShort { length: 1 }
    );
    assert_eq!(
        defect(Observations::at(&[0.0, 1.0], &xs)),
        PathDefect::Times {
            times: 2,
            length: 6
        }
    );
    let falling: Vec<f64> = TIMES.iter().rev().copied().collect();
    assert!(matches!(
        defect(Observations::at(&falling, &xs)),
        PathDefect::Decreasing { .. }
    ));
    let tracked = Var::new(&TIMES, &CPU).unwrap();
    assert_eq!(
        defect(Observations::at(&tracked, &xs)),
        PathDefect::TimeGradients
    );
    assert!(Observations::at(&tracked.detach(), &xs).is_ok());
    let infinite = Tensor::new(&[[[1f64], [f64::INFINITY]]], &CPU).unwrap();
    assert!(matches!(
        defect(made(&infinite)),
        PathDefect::Infinite { index: 1, .. }
    ));
    let observed = || observations(&xs);
    assert_eq!(
        defect(observed().lengths(&[6])),
        PathDefect::Lengths { given: 1, rows: 3 }
    );
    assert_eq!(
        defect(observed().lengths(&[6, 7, 1])),
        PathDefect::Length {
            row: 1,
            length: 7,
            most: 6
        }
    );
    assert!(matches!(
        defect(observed().lengths(&[6, 0, 1])),
        PathDefect::Length { .. }
    ));
    assert!(matches!(
        defect(observed().rectilinear(2)),
        PathDefect::NoChannel { .. }
    ));
    let gone = Tensor::new(&[[[1f64], [f64::NAN]]], &CPU).unwrap();
    let gone = made(&gone).unwrap().rectilinear(0);
    assert!(matches!(
        defect(gone),
        PathDefect::TimeMissing { index: 1, .. }
    ));
    assert_eq!(defect(observed().log_signature(0)), PathDefect::Window);
    // Seconds since 1970 are 128 apart in f32.
    let seconds = [1.7e9, 1.7e9 + 1.0];
    let xs = Tensor::zeros((1, 2, 1), DType::F32, &CPU).unwrap();
    let times = Observations::at(&seconds, &xs).unwrap().with_time();
    assert_eq!(
        defect(times),
        PathDefect::TimesCoincide {
            start: seconds[0],
            end: seconds[1],
            dtype: DType::F32
        }
    );

    let path = observed().linear().unwrap();
    assert!(matches!(
        defect(path.evaluate(2.6)),
        PathDefect::Outside { .. }
    ));
    let solve = |z0: &Tensor, times: &[f64], channels: usize| {
        let weight = some(&[4 * channels, 4], 2);
        cdeint(
            closure(&weight, channels),
            z0,
            &path,
            times,
            &OdeOptions::default(),
        )
    };
    let z0 = some(&[3, 4], 3);
    assert!(matches!(
        defect(solve(&z0, &[0.0, 3.0], 2)),
        PathDefect::Outside { .. }
    ));
    assert!(matches!(
        defect(solve(&z0, &[0.0, 1.0], 3)),
        PathDefect::Matrix { .. }
    ));
    assert!(matches!(
        defect(solve(&some(&[2, 4], 3), &[0.0, 1.0], 2)),
        PathDefect::State { .. }
    ));
    let (_, cde) = model(3);
    assert!(cde.solve(&path, &[0.0, 1.0]).is_err());
    let (_, cde) = model(2);
    let wrong = |vb: candle_nn::VarBuilder<'_>| candle_nn::linear(2, 4, vb);
    let mlp = |vb: candle_nn::VarBuilder<'_>| CdeMlp::new(&[4, 6], 3, Activation::Tanh, vb);
    assert!(cde.solve(&path, &[0.0, 1.0]).is_ok());
    let cde = NeuralCde::new(&VarMap::new(), "", DType::F64, &CPU, wrong, mlp).unwrap();
    assert!(matches!(
        defect(cde.solve(&path, &[0.0, 1.0])),
        PathDefect::Channels {
            needs: 3,
            channels: 2
        } | PathDefect::Matrix { .. }
    ));
}

#[test]
fn every_window_of_a_log_signature_rises_by_its_increments_and_its_own_areas() {
    // Windows of 3, 3 and 2 intervals; the second series ends inside the second window, the third in the last one.
    let times = [0.0, 0.4, 1.0, 1.3, 2.1, 2.5, 3.5, 3.6, 4.2];
    let (cuts, lengths) = ([0, 3, 6, 8], [9, 5, 8]);
    let xs = some(&[3, 9, 3], 11);
    let seen = Observations::at(&times, &xs).unwrap().lengths(&lengths);
    let path = seen.unwrap().log_signature(3).unwrap();
    assert_eq!(path.knots(), cuts.map(|i| times[i]));
    let x = xs.to_vec3::<f64>().unwrap();
    let mut expected = vec![vec![0.0; 6]; 3];
    for (expected, x) in expected.iter_mut().zip(&x) {
        expected[..3].copy_from_slice(&x[0]);
    }
    for window in cuts.windows(2) {
        let (from, to) = (times[window[0]], times[window[1]]);
        let start = path.evaluate(from).unwrap().to_vec2::<f64>().unwrap();
        let slope = path.derivative(from).unwrap().to_vec2::<f64>().unwrap();
        for (row, length) in lengths.into_iter().enumerate() {
            // Constant after its length.
            let at = |k: usize| &x[row][k.min(length - 1)];
            let first = at(window[0]);
            let mut rise = [0.0; 6];
            for k in window[0]..window[1] {
                let away = |i: usize| at(k)[i] - first[i];
                let delta = |i: usize| at(k + 1)[i] - at(k)[i];
                for (i, rise) in rise[..3].iter_mut().enumerate() {
                    *rise += delta(i);
                }
                for (area, (i, j)) in [(0, 1), (0, 2), (1, 2)].into_iter().enumerate() {
                    rise[3 + area] += 0.5 * (away(i) * delta(j) - away(j) * delta(i));
                }
            }
            for channel in 0..6 {
                let found = slope[row][channel] * (to - from);
                // Some ten roundings of numbers of size one.
                assert!((found - rise[channel]).abs() < 1e-14, "{window:?} {row}");
                let value = start[row][channel];
                assert!((value - expected[row][channel]).abs() < 1e-14);
                expected[row][channel] += rise[channel];
            }
        }
    }
}

#[test]
fn numbers_behind_the_end_of_a_series_change_nothing() {
    let lengths = [6, 4, 2];
    let xs = some(&[3, 6, 2], 1);
    let filled = |with: f64| {
        let mut x = xs.to_vec3::<f64>().unwrap();
        for (row, length) in x.iter_mut().zip(lengths) {
            row[length..].fill(vec![with; 2]);
        }
        Var::from_tensor(&Tensor::new(x, &CPU).unwrap()).unwrap()
    };
    for (name, kind) in KINDS {
        let all = [0.0, 1e300, f64::NAN].map(|with| {
            let xs = filled(with);
            let path = kind(&observations(&xs).lengths(&lengths).unwrap()).unwrap();
            let value = path.evaluate(path.ends()[1]).unwrap();
            let grads = value.sqr().unwrap().sum_all().unwrap().backward().unwrap();
            (numbers(&value), numbers(grads.get(&xs).unwrap()))
        });
        assert!(all[0] == all[1] && all[0] == all[2], "{name}");
    }
    // They are finite or NaN: lengths are given after the observations have been looked at.
    assert!(matches!(
        defect(Observations::new(&filled(f64::INFINITY))),
        PathDefect::Infinite {
            row: 1,
            index: 4,
            ..
        }
    ));
}

#[test]
fn gradients_are_at_the_observations_that_were_given_whatever_is_written_to_them_afterwards() {
    let given = |written: &str| {
        let xs = Var::from_tensor(&some(&[3, 6, 2], 1)).unwrap();
        let write = |when: &str| {
            if when == written {
                // All of them are missing.
                let gone = Tensor::full(f64::NAN, (3, 6, 2), &CPU).unwrap();
                xs.set(&gone).unwrap();
            }
        };
        let seen = observations(&xs);
        write("before there is a path");
        let path = seen.hermite().unwrap();
        let value = path.evaluate(1.1).unwrap();
        write("before the backward pass");
        let grads = value.sqr().unwrap().sum_all().unwrap().backward().unwrap();
        numbers(grads.get(&xs).unwrap())
    };
    let exact = given("never");
    for when in ["before there is a path", "before the backward pass"] {
        assert_eq!(given(when), exact, "{when}");
    }
}

#[test]
fn the_slope_has_the_dtype_in_which_the_field_is_given_the_state() {
    // F is one in both channels, whose slopes nearly cancel: 1.001 is 1 in bf16.
    let xs = Tensor::new(&[[[0f32, 0.0], [1.001, -1.0]]], &CPU).unwrap();
    let path = Observations::new(&xs).unwrap().linear().unwrap();
    let z0 = Tensor::zeros((1, 1), DType::F32, &CPU).unwrap();
    let end = |arithmetic| {
        let options = OdeOptions {
            method: EULER,
            precision: Some(Precision::bf16().arithmetic(arithmetic)),
            output: Output::Final,
            ..Default::default()
        };
        let ones = |_: &Time, z: &Tensor| Tensor::ones((1, 1, 2), z.dtype(), &CPU);
        numbers(&cdeint(ones, &z0, &path, path.knots(), &options).unwrap())[0]
    };
    assert_eq!(end(Arithmetic::Native), 0.0);
    for arithmetic in [Arithmetic::Auto, Arithmetic::Rounded] {
        let error = (end(arithmetic) - 0.001).abs();
        // One rounding of the product to bf16, of slopes in f32.
        assert!(error <= 0.001 * 2f64.powi(-8) + 2f64.powi(-23));
    }
}
