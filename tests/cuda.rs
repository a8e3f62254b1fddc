//! Solves on a GPU are the solves of the CPU.  Without a GPU every test says so and passes, unless
//! `CANDLE_DIFFEQ_NEEDS_GPU` is set.
#![cfg(feature = "cuda")]

mod common;

use std::sync::{Mutex, MutexGuard, PoisonError};

use candle_core::{DType, Device, IndexOp, Shape, Tensor, Var};
use candle_diffeq::dense::odeint_dense;
use candle_diffeq::error::{AdaptiveDefect, NotReplayed, StopReason};
use candle_diffeq::metrics::{Recorder, RowStats, Stats};
use candle_diffeq::nn::graph::Csr;
use candle_diffeq::nn::{Activation, Mlp};
use candle_diffeq::options::{
    ActivationCache, Adaptive, AdjointNorm, AdjointSolve, Arithmetic, Checkpoint, Controller,
    Gradient, Norm, OnFailure, Output, StepControl, Steps, TimeGrid,
};
use candle_diffeq::scaling::{DynamicScaling, Scaling};
use candle_diffeq::sde::{sdeint, stratonovich, Noise, SdeOptions, HEUN};
use candle_diffeq::tableau::{
    Tableau, BOSH3, DOPRI5, DOPRI8, EULER, FEHLBERG45, MIDPOINT, RK4, TSIT5,
};
use candle_diffeq::{odeint, solution, Error, NeuralOde, OdeOptions, Precision, Time};
use candle_nn::VarMap;
use common::descend;

/// The GPU, for one test at a time: some look at its memory.
struct Gpu {
    device: Device,
    _alone: MutexGuard<'static, ()>,
}

impl std::ops::Deref for Gpu {
    type Target = Device;

    fn deref(&self) -> &Device {
        &self.device
    }
}

/// The GPU, if there is one.
fn gpu() -> Option<Gpu> {
    static ALONE: Mutex<()> = Mutex::new(());
    let alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    match Device::new_cuda(0) {
        Ok(device) => Some(Gpu {
            device,
            _alone: alone,
        }),
        Err(error) => {
            let needed = std::env::var_os("CANDLE_DIFFEQ_NEEDS_GPU").is_some();
            assert!(!needed, "a GPU is needed: {error}");
            eprintln!("NOT RUN on CUDA: no device");
            None
        }
    }
}

fn values(x: &Tensor) -> Vec<f64> {
    let x = x
        .detach()
        .to_device(&Device::Cpu)
        .unwrap()
        .to_dtype(DType::F64)
        .unwrap();
    x.flatten_all().unwrap().to_vec1().unwrap()
}

/// ‖x − y‖ / ‖y‖.
fn distance(x: &Tensor, y: &Tensor) -> f64 {
    assert_eq!(x.shape(), y.shape());
    let norm = |v: &mut dyn Iterator<Item = f64>| v.map(|x| x * x).sum::<f64>().sqrt();
    let (x, y) = (values(x), values(y));
    norm(&mut x.iter().zip(&y).map(|(x, y)| x - y)) / norm(&mut y.iter().copied()).max(1e-300)
}

/// Numbers between −1.5 and 1.5, the same in every run.
fn scattered(shape: impl Into<Shape>, dtype: DType, device: &Device) -> Tensor {
    let shape = shape.into();
    let number = |i: usize| 1.5 * (i as f64 * 1.618_033_988_7 + 0.4).sin();
    let numbers: Vec<_> = (0..shape.elem_count()).map(number).collect();
    let x = Tensor::from_vec(numbers, shape, &Device::Cpu).unwrap();
    x.to_dtype(dtype).unwrap().to_device(device).unwrap()
}

/// A perceptron of these widths as a neural ODE, with the same weights on every device.
fn network(device: &Device, net: &Net, options: &OdeOptions) -> (VarMap, NeuralOde) {
    let vars = VarMap::new();
    for (l, pair) in net.widths.windows(2).enumerate() {
        let inputs = pair[0] + usize::from(net.time && l == 0);
        for (name, shape) in [
            ("weight", Shape::from((pair[1], inputs))),
            ("bias", Shape::from(pair[1])),
        ] {
            let value =
                (scattered(shape, DType::F32, device) * (inputs as f64).sqrt().recip()).unwrap();
            let mut data = vars.data().lock().unwrap();
            data.insert(format!("f.{l}.{name}"), Var::from_tensor(&value).unwrap());
        }
    }
    let net = *net;
    let ode = NeuralOde::new(&vars, "f", device, move |vb| {
        let mlp = match net.time {
            true => Mlp::with_time(net.widths, net.activation, vb)?,
            false => Mlp::new(net.widths, net.activation, vb)?,
        };
        Ok(if net.residual { mlp.residual() } else { mlp })
    })
    .unwrap();
    (vars, ode.options(options.clone()))
}

#[derive(Clone, Copy)]
struct Net {
    widths: &'static [usize],
    activation: Activation,
    time: bool,
    residual: bool,
}

const SPIRAL: Net = Net {
    widths: &[2, 64, 64, 2],
    activation: Activation::Tanh,
    time: false,
    residual: false,
};

/// What a solve and its backward pass came to.
struct Outcome {
    states: Tensor,
    y0: Tensor,
    params: Vec<Tensor>,
    /// Of the forward pass, and of the backward pass.
    stats: [Stats; 2],
}

fn outcome(
    device: &Device,
    net: &Net,
    rows: usize,
    times: &[f64],
    scale: f64,
    options: &OdeOptions,
) -> candle_diffeq::Result<Outcome> {
    let y0 = scattered((rows, net.widths[0]), DType::F32, device);
    outcome_of(net, &y0, times, scale, options, Recorder::default())
}

/// The same from y0, with statistics from a recorder.
fn outcome_of(
    net: &Net,
    y0: &Tensor,
    times: &[f64],
    scale: f64,
    options: &OdeOptions,
    recorder: Recorder,
) -> candle_diffeq::Result<Outcome> {
    let device = y0.device();
    let options = OdeOptions {
        recorder: Some(recorder.clone()),
        ..options.clone()
    };
    let (vars, ode) = network(device, net, &options);
    let y0 = Var::from_tensor(y0)?;
    let states: Tensor = ode.solve(y0.as_tensor(), times)?;
    let forward = recorder.take();
    let weights = (scattered(states.shape().clone(), states.dtype(), device) * scale)?;
    let grads = (&states * weights)?.sum_all()?.backward()?;
    let data = vars.data().lock().unwrap();
    let mut names: Vec<_> = data.keys().cloned().collect();
    names.sort();
    Ok(Outcome {
        y0: grads.get(&y0).unwrap().clone(),
        params: names
            .iter()
            .map(|n| grads.get(&data[n]).unwrap().clone())
            .collect(),
        states,
        stats: [forward, recorder.take()],
    })
}

fn assert_close(a: &Outcome, b: &Outcome, bound: f64, what: &str) {
    let states = distance(&a.states, &b.states);
    assert!(states <= bound, "{what}: states {states:e}");
    let y0 = distance(&a.y0, &b.y0);
    assert!(y0 <= bound, "{what}: y0 {y0:e}");
    for (i, (a, b)) in a.params.iter().zip(&b.params).enumerate() {
        let error = distance(a, b);
        assert!(error <= bound, "{what}: parameter {i} {error:e}");
    }
}

const TIMES: [f64; 4] = [0.0, 0.3, 0.7, 1.0];

#[test]
fn closures_are_solved_as_on_the_cpu_in_f64() {
    let Some(gpu) = gpu() else { return };
    for method in [EULER, RK4, DOPRI5] {
        for checkpoint in [Checkpoint::All, Checkpoint::Every(3), Checkpoint::States(2)] {
            let on = |device: &Device| {
                let a = Var::from_tensor(&scattered((5, 5), DType::F64, device)).unwrap();
                let y0 = Var::from_tensor(&scattered((3, 5), DType::F64, device)).unwrap();
                let inside = a.as_tensor().clone();
                let field = move |t: &Time, y: &Tensor| {
                    (y.matmul(&inside)?.tanh()? * (1.0 + t.value()))?.neg()
                };
                let options = OdeOptions {
                    method: method.clone(),
                    checkpoint,
                    steps: Steps::PerInterval(2),
                    ..Default::default()
                };
                let ys = odeint(field, y0.as_tensor(), &TIMES, &options).unwrap();
                let loss = ys.sqr().unwrap().sum_all().unwrap();
                let grads = loss.backward().unwrap();
                [
                    ys,
                    grads.get(&y0).unwrap().clone(),
                    grads.get(&a).unwrap().clone(),
                ]
            };
            for (there, here) in on(&gpu).iter().zip(on(&Device::Cpu)) {
                assert!(
                    distance(there, &here) <= 1e-12,
                    "{} {checkpoint:?}",
                    method.name()
                );
            }
        }
    }
}

#[test]
fn compensated_sums_lose_as_little_on_the_gpu_as_on_the_cpu() {
    let Some(gpu) = gpu() else { return };
    let net = Net {
        widths: &[2, 8, 2],
        ..SPIRAL
    };
    let unit = 2f64.powi(-24);
    let run = |device: &Device, fusion: bool, steps: usize, checkpoint| {
        let options = OdeOptions {
            method: EULER,
            precision: Some(Precision::f32().compensated()),
            steps: Steps::PerInterval(steps),
            checkpoint,
            fusion,
            ..Default::default()
        };
        outcome(device, &net, 3, &[0.0, 1.0], 1.0, &options).unwrap()
    };
    let alike = |a: &Outcome, b: &Outcome| {
        assert_eq!(bits(&a.states), bits(&b.states));
        assert_eq!(bits(&a.y0), bits(&b.y0));
        for (a, b) in a.params.iter().zip(&b.params) {
            assert_eq!(bits(a), bits(b));
        }
    };
    for steps in [16, 600] {
        let there = run(&gpu, false, steps, Checkpoint::All);
        let here = run(&Device::Cpu, false, steps, Checkpoint::All);
        assert_close(&there, &here, 16.0 * unit, &format!("{steps} steps"));
        alike(&run(&gpu, false, steps, Checkpoint::States(3)), &there);
        // One launch, which sums without compensation, is not taken.
        alike(&run(&gpu, true, steps, Checkpoint::All), &there);
    }
    // Adaptive steps of the whole batch.
    let adaptive = |device: &Device| {
        let steps = Adaptive::new(1e-1, 1e-1).max_step(1.0 / 200.0);
        let options = OdeOptions {
            method: BOSH3,
            precision: Some(Precision::f32().compensated()),
            steps: Steps::Adaptive(steps.first_step(1.0 / 200.0)),
            fusion: false,
            ..Default::default()
        };
        outcome(device, &net, 3, &TIMES, 1.0, &options).unwrap()
    };
    let what = "adaptive steps";
    assert_close(&adaptive(&gpu), &adaptive(&Device::Cpu), 32.0 * unit, what);
}

#[test]
fn steps_by_row_with_compensated_sums_are_refused_and_those_of_the_batch_are_the_default() {
    let Some(gpu) = gpu() else { return };
    let net = Net {
        widths: &[2, 8, 2],
        ..SPIRAL
    };
    let of = |device: &Device, control: Option<StepControl>| {
        let steps = Adaptive::new(1e-3, 1e-5);
        let options = OdeOptions {
            method: DOPRI5,
            precision: Some(Precision::f32().compensated()),
            steps: Steps::Adaptive(match control {
                Some(control) => steps.control(control),
                None => steps,
            }),
            ..Default::default()
        };
        outcome(device, &net, 3, &TIMES, 1.0, &options)
    };
    let Err(refused) = of(&gpu, Some(StepControl::Rows)) else {
        panic!("steps by row without a launch");
    };
    let no_rows = matches!(refused, Error::Adaptive(AdaptiveDefect::NoRows { .. }));
    assert!(
        no_rows && refused.to_string().contains("compensated"),
        "{refused}"
    );
    let default = of(&gpu, None).unwrap();
    let batch = of(&gpu, Some(StepControl::Batch)).unwrap();
    assert_eq!(bits(&default.states), bits(&batch.states));
    assert_eq!(default.stats[0].row_evaluations, 0);
    let here = of(&Device::Cpu, Some(StepControl::Batch)).unwrap();
    assert_close(&default, &here, 64.0 * 2f64.powi(-24), "of the batch");
}

/// The three kinds of continuous adjoints with one backward solve.
fn kinds(solve: &AdjointSolve) -> [Gradient; 3] {
    [
        Gradient::Backsolve(solve.clone()),
        Gradient::Interpolated(solve.clone()),
        Gradient::Quadrature(solve.clone()),
    ]
}

/// Fixed steps, and adaptive steps of the batch.
fn ways() -> [(Tableau, Steps); 2] {
    // At these tolerances, y0 that is rounded otherwise takes as many steps.
    let adaptive = Adaptive::new(2e-4, 2e-6).control(StepControl::Batch);
    [
        (RK4, Steps::PerInterval(3)),
        (DOPRI5, Steps::Adaptive(adaptive)),
    ]
}

#[test]
fn continuous_adjoints_of_a_closure_are_those_of_the_cpu() {
    let Some(gpu) = gpu() else { return };
    let unit = 2f64.powi(-24);
    // Also a norm that reads θ̄ and t̄, which a Gauss rule does not have.
    let [largest, interpolated, _] = kinds(&AdjointSolve::new().norm(AdjointNorm::Largest));
    let seminorm = kinds(&AdjointSolve::new());
    for gradient in seminorm.into_iter().chain([largest, interpolated]) {
        for (method, steps) in ways() {
            let on = |device: &Device| {
                let recorder = Recorder::default();
                let times = Var::new(&TIMES, device).unwrap();
                let a = Var::from_tensor(&scattered((3, 3), DType::F32, device)).unwrap();
                let y0 = Var::from_tensor(&scattered((5, 3), DType::F32, device)).unwrap();
                let inside = a.as_tensor().clone();
                let field = move |t: &Time, y: &Tensor| {
                    let pace = t.tensor()?.cos()?.to_dtype(y.dtype())?;
                    y.matmul(&inside)?.tanh()?.broadcast_mul(&pace)
                };
                let options = OdeOptions {
                    method: method.clone(),
                    steps: steps.clone(),
                    gradient: gradient.clone(),
                    recorder: Some(recorder.clone()),
                    ..Default::default()
                };
                let ys = odeint(field, y0.as_tensor(), times.as_tensor(), &options).unwrap();
                let grads = ys.sqr().unwrap().sum_all().unwrap().backward().unwrap();
                let found = [&y0, &a, &times].map(|v| grads.get(v).unwrap().clone());
                (found, recorder.take().backward)
            };
            let ((there, counts), (here, counts_here)) = (on(&gpu), on(&Device::Cpu));
            assert_eq!(
                (counts.steps, counts.rejected, counts.evaluations),
                (
                    counts_here.steps,
                    counts_here.rejected,
                    counts_here.evaluations
                )
            );
            for (name, (there, here)) in ["y0", "a", "t"].iter().zip(there.iter().zip(&here)) {
                let error = distance(there, here) / unit;
                let what = format!("{gradient:?}, {}, {name}", method.name());
                assert!(error <= 32.0, "{what}: {error:.1} u");
            }
        }
    }
}

#[test]
fn continuous_adjoints_of_a_perceptron_are_those_of_the_cpu() {
    let Some(gpu) = gpu() else { return };
    let unit = 2f64.powi(-24);
    let net = Net {
        widths: &[3, 16, 3],
        time: true,
        ..SPIRAL
    };
    for gradient in kinds(&AdjointSolve::new()) {
        for (method, steps) in ways() {
            // A backsolve begins with the outputs of one launch where there is one.
            for fusion in [true, false] {
                let options = OdeOptions {
                    method: method.clone(),
                    steps: steps.clone(),
                    gradient: gradient.clone(),
                    fusion,
                    ..Default::default()
                };
                let on = |device: &Device| outcome(device, &net, 5, &TIMES, 1.0, &options);
                let (there, here) = (on(&gpu).unwrap(), on(&Device::Cpu).unwrap());
                let what = format!("{gradient:?}, {}, fusion {fusion}", method.name());
                assert_close(&there, &here, 64.0 * unit, &what);
                let counts = [&there, &here].map(|o| &o.stats[1].backward);
                assert!(counts[0].steps > 0, "{what}");
                assert_eq!(counts[0].steps, counts[1].steps, "{what}");
            }
        }
    }
}

#[test]
fn continuous_adjoints_in_low_precision_are_those_of_the_cpu_to_its_roundoff() {
    let Some(gpu) = gpu() else { return };
    let net = Net {
        widths: &[2, 16, 2],
        ..SPIRAL
    };
    for gradient in kinds(&AdjointSolve::new()) {
        for (precision, unit) in [
            (Precision::bf16(), 2f64.powi(-8)),
            (Precision::f16(), 2f64.powi(-11)),
        ] {
            let of = |device: &Device, precision| {
                let options = OdeOptions {
                    precision,
                    steps: Steps::PerInterval(2),
                    gradient: gradient.clone(),
                    ..Default::default()
                };
                // A loss whose cotangents are below the numbers of f16.
                outcome(device, &net, 5, &TIMES, 1e-8, &options).unwrap()
            };
            let exact = of(&Device::Cpu, None);
            let what = format!("{gradient:?} {precision:?}");
            assert_close(&of(&gpu, Some(precision)), &exact, 12.0 * unit, &what);
        }
    }
}

#[test]
fn the_stochastic_adjoint_is_that_of_the_cpu() {
    let Some(gpu) = gpu() else { return };
    let on = |device: &Device| {
        let a = Var::from_tensor(&scattered((3, 3), DType::F32, device)).unwrap();
        let y0 = Var::from_tensor(&scattered((7, 3), DType::F32, device)).unwrap();
        let inside = a.as_tensor().clone();
        let sde = stratonovich(
            move |_: &Time, y: &Tensor| y.matmul(&inside)?.tanh(),
            |_: &Time, y: &Tensor| (y.sqr()? + 1.0)?.sqrt()? * 0.3,
        );
        let options = SdeOptions {
            method: HEUN,
            steps: Steps::PerInterval(4),
            gradient: Gradient::Backsolve(AdjointSolve::new()),
            ..Default::default()
        };
        let noise = Noise::seeded(5);
        let ys = sdeint(sde, y0.as_tensor(), &TIMES, &noise, &options).unwrap();
        let grads = ys.sqr().unwrap().sum_all().unwrap().backward().unwrap();
        [&y0, &a].map(|v| grads.get(v).unwrap().clone())
    };
    for (there, here) in on(&gpu).iter().zip(&on(&Device::Cpu)) {
        let error = distance(there, here) * 2f64.powi(24);
        assert!(error <= 32.0, "{error:.1} u");
    }
}

#[test]
fn noise_has_the_bits_of_the_cpu_and_moves_the_state_as_there() {
    let Some(gpu) = gpu() else { return };
    let on = |device: &Device| {
        let noise = Noise::seeded(5);
        let increments = noise.increments(&TIMES, (7, 3), DType::F32, device);
        let sde = stratonovich(
            |_: &Time, y: &Tensor| y.neg(),
            |_: &Time, y: &Tensor| (y.sqr()? + 1.0)?.sqrt()? * 0.3,
        );
        let y0 = Var::from_tensor(&scattered((7, 3), DType::F64, device)).unwrap();
        let options = SdeOptions {
            method: HEUN,
            steps: Steps::PerInterval(4),
            ..Default::default()
        };
        let ys = sdeint(sde, y0.as_tensor(), &TIMES, &noise, &options).unwrap();
        let grads = ys.sqr().unwrap().sum_all().unwrap().backward().unwrap();
        (
            increments.unwrap().w().clone(),
            [ys, grads.get(&y0).unwrap().clone()],
        )
    };
    let ((drawn_there, there), (drawn_here, here)) = (on(&gpu), on(&Device::Cpu));
    assert_eq!(values(&drawn_there), values(&drawn_here));
    for (there, here) in there.iter().zip(&here) {
        assert!(distance(there, here) <= 1e-12);
    }
}

/// The sum over later stages would be formed in f32 without λ among its terms.
#[test]
fn cotangents_of_stages_without_weight_are_summed_in_f64_where_the_state_is() {
    let Some(gpu) = gpu() else { return };
    // Steps of short decimals, times numbers of f32, fall in the middle between two of these too often: the
    // last bit of an f64 would decide.
    let times = [0.0, 0.1, 0.5, 0.9].map(f64::sqrt);
    for method in [MIDPOINT, DOPRI5] {
        let on = |device: &Device| {
            let a = scattered((40, 50), DType::F32, device);
            let y0 = Var::from_tensor(&scattered((40, 50), DType::F64, device)).unwrap();
            // One operation an element, so that both devices round alike.
            let field = move |_: &Time, y: &Tensor| y * &a;
            let options = OdeOptions {
                method: method.clone(),
                precision: Some(Precision::new(DType::F64, DType::F32)),
                ..Default::default()
            };
            let ys = odeint(field, y0.as_tensor(), &times, &options).unwrap();
            let loss = ys.get(3).unwrap().sum_all().unwrap();
            loss.backward().unwrap().get(&y0).unwrap().clone()
        };
        let error = distance(&on(&gpu), &on(&Device::Cpu));
        assert!(error <= 1e-12, "{}: {error:e}", method.name());
    }
}

#[test]
fn gradients_of_times_come_back_from_the_gpu() {
    let Some(gpu) = gpu() else { return };
    let on = |device: &Device| {
        let times = Var::new(&TIMES, device).unwrap();
        let y0 = scattered((3, 2), DType::F64, device);
        let field = |t: &Time, y: &Tensor| y.broadcast_mul(&t.tensor()?.cos()?);
        let ys = odeint(field, &y0, times.as_tensor(), &OdeOptions::default()).unwrap();
        let grads = ys.sqr().unwrap().sum_all().unwrap().backward().unwrap();
        grads.get(&times).unwrap().clone()
    };
    assert!(distance(&on(&gpu), &on(&Device::Cpu)) <= 1e-12);
}

#[test]
fn one_launch_computes_what_step_by_step_does() {
    let Some(gpu) = gpu() else { return };
    let nets = [
        Net {
            widths: &[2, 64, 64, 2],
            activation: Activation::Tanh,
            time: false,
            residual: false,
        },
        Net {
            widths: &[3, 17, 3],
            activation: Activation::Softplus,
            time: true,
            residual: false,
        },
        Net {
            widths: &[5, 20, 20, 20, 5],
            activation: Activation::Silu,
            time: false,
            residual: true,
        },
        Net {
            widths: &[4, 4],
            activation: Activation::Tanh,
            time: false,
            residual: false,
        },
        Net {
            widths: &[6, 6, 6, 6],
            activation: Activation::Gelu,
            time: true,
            residual: true,
        },
        Net {
            widths: &[1, 33, 1],
            activation: Activation::Relu,
            time: false,
            residual: false,
        },
        Net {
            widths: &[2, 9, 2],
            activation: Activation::Sigmoid,
            time: false,
            residual: false,
        },
        Net {
            widths: &[2, 9, 2],
            activation: Activation::Sin,
            time: false,
            residual: true,
        },
        Net {
            widths: &[2, 128, 128, 2],
            activation: Activation::Tanh,
            time: false,
            residual: false,
        },
    ];
    for (i, net) in nets.iter().enumerate() {
        for (rows, output, method) in [
            (1, Output::All, RK4),
            (33, Output::Final, BOSH3),
            (70, Output::All, DOPRI5),
        ] {
            let options = OdeOptions {
                method,
                output,
                steps: Steps::PerInterval(2),
                ..Default::default()
            };
            let general = OdeOptions {
                fusion: false,
                ..options.clone()
            };
            let fused = outcome(&gpu, net, rows, &TIMES, 1.0, &options).unwrap();
            let stepped = outcome(&gpu, net, rows, &TIMES, 1.0, &general).unwrap();
            let here = outcome(&Device::Cpu, net, rows, &TIMES, 1.0, &general).unwrap();
            assert_close(
                &fused,
                &here,
                2e-5,
                &format!("net {i}, {rows} rows, one launch"),
            );
            assert_close(
                &stepped,
                &here,
                2e-5,
                &format!("net {i}, {rows} rows, step by step"),
            );
            for (fused, stepped) in fused.stats.iter().zip(&stepped.stats) {
                assert_eq!(
                    (fused.steps, fused.evaluations),
                    (stepped.steps, stepped.evaluations)
                );
                assert_eq!(fused.vjps, stepped.vjps);
                assert!(fused.host_reads <= 1 && stepped.host_reads <= 1);
            }
        }
    }
}

#[test]
fn low_precision_is_the_cpus_to_its_roundoff() {
    let Some(gpu) = gpu() else { return };
    for (precision, unit) in [
        (Precision::bf16(), 2f64.powi(-8)),
        (Precision::f16(), 2f64.powi(-11)),
    ] {
        for store in [DType::F32, precision.compute] {
            for fusion in [true, false] {
                for arithmetic in [Arithmetic::Native, Arithmetic::Rounded] {
                    let options = OdeOptions {
                        precision: Some(precision.store(store).arithmetic(arithmetic)),
                        fusion,
                        ..Default::default()
                    };
                    let exact = OdeOptions::default();
                    let there = outcome(&gpu, &SPIRAL, 50, &TIMES, 1e-4, &options).unwrap();
                    let here = outcome(&Device::Cpu, &SPIRAL, 50, &TIMES, 1e-4, &exact).unwrap();
                    let what = format!("{precision:?}, fusion {fusion}, {arithmetic:?}");
                    assert_close(&there, &here, 12.0 * unit, &what);
                    assert!(there.stats.iter().all(|s| s.host_reads <= 1), "{what}");
                }
            }
        }
    }
}

#[test]
fn an_overflow_of_the_adjoint_is_taken_back_and_scaled_away() {
    let Some(gpu) = gpu() else { return };
    // No headroom: the field's own growth overflows f16.
    let rule = DynamicScaling {
        headroom: 1.0,
        ..Default::default()
    };
    let net = Net {
        widths: &[2, 64, 64, 2],
        activation: Activation::Softplus,
        time: false,
        residual: false,
    };
    for fusion in [true, false] {
        for checkpoint in [Checkpoint::All, Checkpoint::Every(2), Checkpoint::States(2)] {
            let options = OdeOptions {
                precision: Some(Precision::f16()),
                scaling: Scaling::Dynamic(rule),
                fusion,
                checkpoint,
                steps: Steps::PerInterval(3),
                ..Default::default()
            };
            let there = outcome(&gpu, &net, 40, &TIMES, 1.0, &options).unwrap();
            let here = outcome(
                &Device::Cpu,
                &net,
                40,
                &TIMES,
                1.0,
                &OdeOptions {
                    precision: None,
                    scaling: Scaling::Auto,
                    ..options
                },
            )
            .unwrap();
            assert_close(
                &there,
                &here,
                12.0 * 2f64.powi(-11),
                &format!("fusion {fusion}, {checkpoint:?}"),
            );
        }
    }
}

/// Bits of states and gradients.
fn all_bits(outcome: &Outcome) -> Vec<Vec<u64>> {
    let all = [&outcome.states, &outcome.y0].into_iter();
    all.chain(&outcome.params).map(bits).collect()
}

#[test]
fn evaluations_that_are_kept_have_the_bits_of_those_that_are_repeated() {
    let Some(gpu) = gpu() else { return };
    let nets = [
        (Activation::Tanh, false, false),
        (Activation::Softplus, false, true),
        (Activation::Silu, true, true),
    ];
    let ways = [
        (RK4, Checkpoint::All),
        (DOPRI5, Checkpoint::Every(3)),
        (BOSH3, Checkpoint::States(2)),
    ];
    for precision in [
        Precision::f32().compensated(),
        Precision::f64(),
        Precision::bf16(),
        Precision::f16(),
    ] {
        for ((activation, time, residual), (method, checkpoint)) in nets.into_iter().zip(&ways) {
            let net = Net {
                widths: &[2, 48, 48, 2],
                activation,
                time,
                residual,
            };
            let solve = |activation_cache, graphs| {
                let options = OdeOptions {
                    method: method.clone(),
                    precision: Some(precision),
                    fusion: false,
                    steps: Steps::PerInterval(4),
                    checkpoint: *checkpoint,
                    activation_cache,
                    graphs,
                    ..Default::default()
                };
                outcome(&gpu, &net, 40, &TIMES, 1.0, &options).unwrap()
            };
            let what = format!("{precision:?} {activation:?} {checkpoint:?}");
            let none = solve(ActivationCache::NONE, false);
            let evaluations = none.stats[0].evaluations;
            let expected = all_bits(&none);
            let all = solve(ActivationCache::ALL, false);
            assert_eq!(expected, all_bits(&all), "{what}");
            assert_eq!(all.stats[1].recomputed, 0, "{what}");
            let half = ActivationCache::within(all.stats[0].activation_bytes / 2);
            for graphs in [false, true] {
                let some = solve(half, graphs);
                assert_eq!(expected, all_bits(&some), "{what}");
                let [forward, backward] = &some.stats;
                assert!(backward.recomputed >= evaluations / 2, "{what}");
                assert!(backward.recomputed < none.stats[1].recomputed, "{what}");
                let [there, back] = [forward, backward].map(|stats| stats.replayed > 0);
                assert_eq!([there, back], [graphs, graphs], "{what}");
                let reason = graphs.then_some(NotReplayed::KeptEvaluations);
                assert_eq!(forward.not_replayed, reason, "{what}");
            }
        }
    }
}

#[test]
fn an_overflow_in_a_step_whose_evaluations_are_kept_is_scaled_away() {
    let Some(gpu) = gpu() else { return };
    // No headroom, and a loss of the last state: the first steps that are pulled back overflow.
    let rule = DynamicScaling {
        headroom: 1.0,
        ..Default::default()
    };
    let net = Net {
        widths: &[2, 64, 64, 2],
        activation: Activation::Softplus,
        time: false,
        residual: true,
    };
    let solve = |activation_cache| {
        let options = OdeOptions {
            precision: Some(Precision::f16()),
            scaling: Scaling::Dynamic(rule),
            fusion: false,
            output: Output::Final,
            steps: Steps::PerInterval(3),
            activation_cache,
            ..Default::default()
        };
        outcome(&gpu, &net, 40, &TIMES, 1.0, &options).unwrap()
    };
    let [none, all] = [ActivationCache::NONE, ActivationCache::ALL].map(solve);
    assert!(none.stats[1].retries > 0);
    assert_eq!(all_bits(&none), all_bits(&all));
    assert_eq!(all.stats[1].retries, none.stats[1].retries);
    assert_eq!(all.stats[1].recomputed, 0);
}

#[test]
fn gradients_of_times_read_evaluations_that_were_kept() {
    let Some(gpu) = gpu() else { return };
    let times = Var::new(&TIMES, &Device::Cpu).unwrap();
    let net = Net {
        widths: &[2, 32, 2],
        activation: Activation::Tanh,
        time: true,
        residual: false,
    };
    let y0 = Var::from_tensor(&scattered((5, 2), DType::F32, &gpu)).unwrap();
    let solve = |activation_cache| {
        let recorder = Recorder::default();
        let options = OdeOptions {
            activation_cache,
            recorder: Some(recorder.clone()),
            ..Default::default()
        };
        let (_vars, ode) = network(&gpu, &net, &options);
        let grid = TimeGrid::from_tensor(&times).unwrap();
        let ys = ode.solve(y0.as_tensor(), &grid).unwrap();
        // A second backward pass reads the same evaluations.
        let found = [(); 2].map(|()| {
            let grads = ys.sqr().unwrap().sum_all().unwrap().backward().unwrap();
            [&y0, &times].map(|v| bits(grads.get(v).unwrap()))
        });
        assert_eq!(found[0], found[1]);
        (found, recorder.take().recomputed)
    };
    let (expected, again) = solve(ActivationCache::NONE);
    assert!(again > 0);
    assert_eq!(solve(ActivationCache::ALL), (expected, 0));
}

#[test]
fn a_closure_on_the_gpu_keeps_its_graphs_with_the_same_bits() {
    let Some(gpu) = gpu() else { return };
    let (y0, w) = (
        scattered((8, 4), DType::F32, &gpu),
        scattered((4, 4), DType::F32, &gpu),
    );
    let [y0, w] = [y0, w].map(|x| Var::from_tensor(&x).unwrap());
    let solve = |activation_cache| {
        let recorder = Recorder::default();
        let options = OdeOptions {
            activation_cache,
            recorder: Some(recorder.clone()),
            ..Default::default()
        };
        let factor = w.as_tensor().clone();
        let f = move |_: &Time, y: &Tensor| y.matmul(&factor)?.tanh();
        let ys = odeint(f, y0.as_tensor(), &TIMES, &options).unwrap();
        let grads = ys.sqr().unwrap().sum_all().unwrap().backward().unwrap();
        let found = [&y0, &w].map(|v| bits(grads.get(v).unwrap()));
        (found, recorder.take().recomputed)
    };
    let (expected, again) = solve(ActivationCache::NONE);
    assert!(again > 0);
    assert_eq!(solve(ActivationCache::ALL), (expected, 0));
}

#[test]
fn a_scale_that_cannot_be_found_is_an_error() {
    let Some(gpu) = gpu() else { return };
    let rule = DynamicScaling {
        max_attempts: 3,
        ..Default::default()
    };
    for fusion in [true, false] {
        let options = OdeOptions {
            precision: Some(Precision::f16()),
            scaling: Scaling::Dynamic(rule),
            fusion,
            ..Default::default()
        };
        // Weights whose pull-back overflows at any scale.
        let (vars, ode) = network(&gpu, &SPIRAL, &options);
        let last = vars.data().lock().unwrap()["f.2.weight"].clone();
        last.set(&(last.as_tensor() * 3e4).unwrap()).unwrap();
        let first = vars.data().lock().unwrap()["f.0.weight"].clone();
        first.set(&(first.as_tensor() * 3e4).unwrap()).unwrap();
        let y0 = Tensor::zeros((4, 2), DType::F32, &gpu).unwrap();
        let ys: Tensor = ode.solve(&y0, &[0.0, 1e-9]).unwrap();
        let error = Error::from(ys.sum_all().unwrap().backward().unwrap_err());
        assert!(
            matches!(
                error,
                Error::ScaleExhausted {
                    step: 0,
                    attempts: 3,
                    ..
                }
            ),
            "{error}"
        );
    }
}

#[test]
fn failures_are_named_as_on_the_cpu() {
    let Some(gpu) = gpu() else { return };
    for fusion in [true, false] {
        let options = OdeOptions {
            fusion,
            ..Default::default()
        };
        let (vars, ode) = network(&gpu, &SPIRAL, &options);
        let y0 = Tensor::new(&[[0.5f32, 0.5], [f32::NAN, 0.0]], &gpu).unwrap();
        let error = ode.solve(&y0, &TIMES).unwrap_err();
        assert!(
            matches!(error, Error::NonFiniteState { leaf: 0 }),
            "{fusion} {error}"
        );

        let y0 = Tensor::ones((3, 2), DType::F32, &gpu).unwrap();
        let ys = ode.solve(&y0, &TIMES).unwrap();
        let nan = Tensor::full(f32::NAN, ys.shape(), &gpu).unwrap();
        let error = Error::from(
            (ys * nan)
                .unwrap()
                .sum_all()
                .unwrap()
                .backward()
                .unwrap_err(),
        );
        assert!(
            matches!(error, Error::NonFiniteCotangent),
            "{fusion} {error}"
        );

        let bias = vars.data().lock().unwrap()["f.2.bias"].clone();
        bias.set(&Tensor::full(f32::INFINITY, 2, &gpu).unwrap())
            .unwrap();
        let error = ode.solve(&y0, &TIMES).unwrap_err();
        assert!(
            matches!(
                error,
                Error::NonFiniteVelocity {
                    step: 0,
                    stage: 0,
                    ..
                }
            ),
            "{fusion} {error}"
        );

        bias.set(&Tensor::full(3e38f32, 2, &gpu).unwrap()).unwrap();
        let error = ode.solve(&y0, &[0.0, 1.0, 2.0, 3.0]).unwrap_err();
        assert!(
            matches!(
                error,
                Error::NonFiniteSolution { step: 1, .. } | Error::NonFiniteVelocity { step: 1, .. }
            ),
            "{fusion} {error}"
        );
    }
}

#[test]
fn a_solve_on_the_gpu_without_a_graph_has_gradients_too() {
    let Some(gpu) = gpu() else { return };
    let y0 = scattered((4, 3), DType::F32, &gpu);
    let field = |_: &Time, y: &Tensor| y.neg();
    let solution = solution(&field, &y0, &[0.0, 1.0], &OdeOptions::default()).unwrap();
    let last = solution.states().i(1).unwrap();
    let cotangent = solution.states().ones_like().unwrap();
    let gradient = solution.vjp(&cotangent).unwrap().y0;
    let growth = 1.0 + values(&last)[0] / values(&y0)[0];
    assert!((values(&gradient)[0] - growth).abs() <= 1e-6);
}

#[test]
fn nothing_is_kept_if_nothing_is_wanted() {
    let Some(gpu) = gpu() else { return };
    let options = OdeOptions {
        checkpoint: Checkpoint::Nothing,
        ..Default::default()
    };
    let (_, ode) = network(&gpu, &SPIRAL, &options);
    let y0 = Tensor::ones((3, 2), DType::F32, &gpu).unwrap();
    let ys = ode.solve(&y0, &TIMES).unwrap();
    let error = Error::from(ys.sum_all().unwrap().backward().unwrap_err());
    assert!(matches!(error, Error::NothingKept), "{error}");
}

#[test]
fn training_takes_no_more_memory_with_every_step() {
    let Some(gpu) = gpu() else { return };
    let free = || {
        candle_core::cuda_backend::cudarc::driver::result::mem_get_info()
            .unwrap()
            .0
    };
    let fixed = OdeOptions::default();
    let adaptive = by_row(&DOPRI5, adaptive(1e-4));
    for (fusion, precision, options) in [
        (true, Precision::f32(), &fixed),
        (false, Precision::f16(), &fixed),
        (true, Precision::f16(), &adaptive),
    ] {
        let options = OdeOptions {
            fusion,
            precision: Some(precision),
            ..options.clone()
        };
        let net = Net {
            widths: &[2, 8, 2],
            ..SPIRAL
        };
        let (vars, ode) = network(&gpu, &net, &options);
        let y0 = scattered((8, 2), DType::F32, &gpu);
        let mut after = vec![];
        for _ in 0..30 {
            let ys: Tensor = ode.solve(&y0, &TIMES).unwrap();
            descend(&vars, &ys);
            gpu.synchronize().unwrap();
            drop(ys);
            after.push(free());
        }
        assert!(
            after[10..].iter().all(|&f| f >= after[9]),
            "{fusion} {after:?}"
        );
    }
}

/// The relative error of the bias gradient of a layer of a batch in bf16, whose exact value is known.
fn error_of_bias<F>(
    device: &Device,
    rows: usize,
    build: impl Fn(candle_nn::VarBuilder<'_>) -> candle_core::Result<F> + Send + Sync + 'static,
) -> f64
where
    F: candle_diffeq::VectorField<Tensor> + Send + Sync + 'static,
{
    let vars = VarMap::new();
    for (name, shape) in [("weight", vec![8, 8]), ("bias", vec![8])] {
        let value = (scattered(shape, DType::F32, device) * 0.3).unwrap();
        let var = Var::from_tensor(&value).unwrap();
        vars.data().lock().unwrap().insert(format!("f.{name}"), var);
    }
    let ode = NeuralOde::from_field(&vars, "f", DType::F32, device, build).unwrap();
    let ode = ode.options(OdeOptions {
        method: EULER,
        precision: Some(Precision::bf16().arithmetic(Arithmetic::Native)),
        output: Output::Final,
        ..Default::default()
    });
    let y0 = scattered((rows, 8), DType::F32, device);
    // Numbers of bf16 between 1 and 2, that a sum in bf16 cannot hold.
    let bits = |i: usize| (i as u32).wrapping_mul(2_654_435_761) >> 25;
    let number = |i: usize| 1.0 + bits(i) as f32 / 128.0;
    let g: Vec<f32> = (0..rows * 8).map(number).collect();
    let column = |c: usize| g.iter().skip(c).step_by(8).map(|&g| f64::from(g)).sum();
    let exact: Vec<f64> = (0..8).map(column).collect();
    let g = Tensor::from_vec(g, (rows, 8), device).unwrap();
    let states = ode.solve(&y0, &[0.0, 1.0]).unwrap();
    let loss = (states * g).and_then(|x| x.sum_all()).unwrap();
    let grads = loss.backward().unwrap();
    let data = vars.data().lock().unwrap();
    let bias = data
        .iter()
        .find(|(name, _)| name.ends_with("bias"))
        .unwrap()
        .1;
    let pairs = values(grads.get(bias).unwrap()).into_iter().zip(exact);
    pairs
        .map(|(b, exact)| (b / exact - 1.0).abs())
        .fold(0.0, f64::max)
}

#[test]
fn bias_gradients_of_large_batches_keep_their_digits_in_layers_of_this_crate() {
    let Some(gpu) = gpu() else { return };
    for rows in [512, 4096, 65_536] {
        let layer = |vb: candle_nn::VarBuilder<'_>| candle_nn::linear(8, 8, vb);
        let ours = error_of_bias(&gpu, rows, move |vb| {
            Mlp::from_layers(&[layer(vb)?], Activation::Tanh, false)
        });
        let candles = error_of_bias(&gpu, rows, move |vb| {
            let layer = layer(vb)?;
            Ok(move |_: &Time, y: &Tensor| candle_core::Module::forward(&layer, y))
        });
        println!("{rows} rows: {ours:.1e} by Mlp, {candles:.1e} by candle_nn::linear");
        assert!(ours <= 2f64.powi(-9), "{ours:e}");
    }
}

/// A perceptron of time, stiff enough that the rows of a batch need different steps.
const SWINGING: Net = Net {
    widths: &[3, 33, 17, 3],
    activation: Activation::Tanh,
    time: true,
    residual: false,
};

const LONG: [f64; 6] = [0.0, 0.31, 1.45, 1.5, 3.3, 6.0];

const PAIRS: [Tableau; 5] = [BOSH3, FEHLBERG45, DOPRI5, TSIT5, DOPRI8];

/// Whether the CPU has no vector unit, so that rows cannot have steps of their own there.
fn without_tiles() -> bool {
    !common::has_tiles()
}

fn by_row(method: &Tableau, adaptive: Adaptive) -> OdeOptions {
    OdeOptions {
        method: method.clone(),
        steps: Steps::Adaptive(adaptive.control(StepControl::Rows)),
        ..Default::default()
    }
}

fn adaptive(rtol: f64) -> Adaptive {
    Adaptive::new(rtol, rtol / 100.0).step_on_outputs(false)
}

/// Where rows begin: the later ones are the faster ones.
fn starts(rows: usize, device: &Device) -> Tensor {
    let y0 = scattered((rows, 3), DType::F32, device);
    let growth = Tensor::arange(0f32, rows as f32, device).unwrap();
    let growth = ((growth * (2.0 / rows as f64)).unwrap() + 0.2).unwrap();
    y0.broadcast_mul(&growth.unsqueeze(1).unwrap()).unwrap()
}

fn traced(
    net: &Net,
    y0: &Tensor,
    times: &[f64],
    options: &OdeOptions,
) -> candle_diffeq::Result<Outcome> {
    outcome_of(net, y0, times, 1.0, options, Recorder::tracing())
}

/// The bits of a tensor.
fn bits(x: &Tensor) -> Vec<u64> {
    values(x).into_iter().map(f64::to_bits).collect()
}

/// The bits of the states and of the gradient of one row.
fn bits_of_row(outcome: &Outcome, row: usize) -> Vec<Vec<u64>> {
    let states = outcome.states.i((.., row)).unwrap();
    [&states, &outcome.y0.i(row).unwrap()].map(bits).into()
}

/// Variants of options that mean the same everywhere.
fn variants() -> Vec<Adaptive> {
    let plain = || adaptive(1e-3);
    vec![
        plain().step_t([0.3, 0.8, 7.0]).jump_t([1.1]),
        plain().jump_t([0.2, 0.21, 1.7]),
        plain().step_on_outputs(true),
        plain(),
        plain().first_step(1e-2),
        plain().max_step(0.1),
        plain().min_step(0.4),
        plain().controller(Controller::PI),
        plain().controller(Controller {
            p: 0.2,
            i: 0.5,
            d: 0.1,
            ..Controller::I
        }),
        plain().noise_floor(false),
        plain().stability_limit(false),
        Adaptive::new(0.0, 1e-3),
        Adaptive::new(1e-3, 0.0),
    ]
}

/// Whether a row took as many steps and evaluations in two solves.
fn is_alike(a: &RowStats, b: &RowStats) -> bool {
    let counts = |row: &RowStats| (row.accepted, row.rejected, row.evaluations);
    counts(a) == counts(b)
}

/// The distance of the states of two solves: of rows that took as many steps, and of the others.
fn states_apart(a: &Outcome, b: &Outcome) -> [f64; 2] {
    let rows = a.stats[0].rows.iter().zip(&b.stats[0].rows).zip(0u32..);
    let (alike, others): (Vec<_>, Vec<_>) = rows.partition(|((a, b), _)| is_alike(a, b));
    [alike, others].map(|rows| {
        let which: Vec<_> = rows.into_iter().map(|(_, row)| row).collect();
        if which.is_empty() {
            return 0.0;
        }
        let which = Tensor::new(which, &Device::Cpu).unwrap();
        let of = |solved: &Outcome| {
            let states = solved.states.to_device(&Device::Cpu).unwrap();
            states.index_select(&which, 1).unwrap()
        };
        distance(&of(a), &of(b))
    })
}

/// How far the times of the rows of two solves are apart: of how many rows that took as many steps, and their median.
fn apart(a: &Outcome, b: &Outcome) -> (usize, f64) {
    let mut apart = vec![];
    for (a, b) in a.stats[0].rows.iter().zip(&b.stats[0].rows) {
        if is_alike(a, b) {
            let each = a.times.iter().zip(&b.times).map(|(a, b)| (a - b).abs());
            apart.push(each.fold(0.0, f64::max));
        }
    }
    apart.sort_by(f64::total_cmp);
    let median = apart.get(apart.len() / 2);
    (apart.len(), median.copied().unwrap_or(f64::INFINITY))
}

/// An error estimate that is small beside the state is mostly the rounding of f32, and the lengths of steps follow from
/// it.  So both devices are to agree as well as the CPU does with itself from a state that is rounded otherwise.
#[test]
fn rows_choose_their_own_steps_in_one_launch_as_on_the_cpu() {
    let Some(gpu) = gpu() else { return };
    if without_tiles() {
        return;
    }
    let mut solves = vec![];
    for (i, variant) in variants().into_iter().enumerate() {
        solves.push((PAIRS[i % 3].clone(), variant, LONG));
        solves.push((
            BOSH3,
            solves[solves.len() - 1].1.clone(),
            LONG.map(|t| 2.0 - t),
        ));
    }
    for method in PAIRS {
        solves.push((method, adaptive(1e-2), LONG));
    }
    let mut most = 0;
    for (method, variant, times) in solves {
        let options = by_row(&method, variant.clone());
        let y0 = starts(40, &Device::Cpu);
        let there = traced(&SWINGING, &y0.to_device(&gpu).unwrap(), &times, &options).unwrap();
        let here = traced(&SWINGING, &y0, &times, &options).unwrap();
        let beside = (y0 * (1.0 + 2f64.powi(-23))).unwrap();
        let beside = traced(&SWINGING, &beside, &times, &options).unwrap();
        let name = format!("{} {variant:?} {times:?}", method.name());
        let ((alike, distant), (of_cpu, noise)) = (apart(&there, &here), apart(&beside, &here));
        println!("{} {alike} {of_cpu} {distant:e} {noise:e}", method.name());
        assert!(
            alike + 6 >= of_cpu && of_cpu >= 20,
            "{name}: {alike} {of_cpu}"
        );
        assert!(
            distant <= 4.0 * noise + 1e-4,
            "{name}: {distant:e} {noise:e}"
        );
        // Where an error is at the tolerance but for rounding, a row may be tried once more: it is as accurate as that.
        let (states, bound) = (states_apart(&there, &here), states_apart(&beside, &here));
        assert!(
            states[0] <= 4.0 * bound[0] + 1e-5,
            "{name}: {states:?} {bound:?}"
        );
        assert!(states[1] <= 2e-2, "{name}: {states:?}");
        let (ours, theirs) = (&there.stats[0], &here.stats[0]);
        assert_eq!(ours.rows.len(), 40);
        assert!(ours.rows.iter().all(|row| row.stopped.is_none()), "{name}");
        let sum: usize = ours.rows.iter().map(|row| row.evaluations).sum();
        assert_eq!(sum, ours.row_evaluations);
        let most_steps = ours.rows.iter().map(|row| row.accepted).max();
        assert_eq!(most_steps, Some(ours.steps));
        let first = &ours.rows[0].times;
        assert_eq!(ours.first_step, Some((first[1] - first[0]).abs()));
        let lengths = ours.rows.iter().flat_map(|row| row.times.windows(2));
        let lengths = lengths.map(|w| (w[1] - w[0]).abs());
        let (least, longest) = ours.step_range.unwrap();
        assert_eq!(lengths.clone().fold(f64::INFINITY, f64::min), least);
        assert_eq!(lengths.fold(0.0, f64::max), longest);
        assert_eq!(ours.forced > 0, theirs.forced > 0, "{name}");
        let factors = ours.tolerance_factor / theirs.tolerance_factor;
        assert!((0.5..2.0).contains(&factors), "{name} {factors}");
        most = most.max(ours.rejected);
    }
    assert!(most > 0, "some attempts are rejected");
}

#[test]
fn gradients_of_one_launch_are_those_of_the_steps_that_each_row_took() {
    let Some(gpu) = gpu() else { return };
    let nets = [
        SWINGING,
        Net {
            residual: true,
            activation: Activation::Silu,
            widths: &[3, 20, 20, 3],
            time: false,
        },
    ];
    for (i, method) in PAIRS.iter().enumerate() {
        let net = &nets[i % 2];
        // So many outputs that steps of different rows hold some at the same time, before a jump and elsewhere.
        let many: Vec<f64> = (0..=40).map(|i| 0.15 * f64::from(i)).collect();
        let mirrored = many.iter().map(|t| 2.0 - t).collect();
        for (times, output) in [
            (many, Output::All),
            (mirrored, Output::All),
            (LONG.to_vec(), Output::Final),
        ] {
            let y0 = starts(7, &gpu);
            let control = adaptive(1e-4).jump_t([0.77]).step_t([0.9]);
            let options = OdeOptions {
                output,
                ..by_row(method, control)
            };
            let ours = traced(net, &y0, &times, &options).unwrap();
            let name = format!("{} {output:?} to {:?}", method.name(), times.last());
            let mut params: Vec<Tensor> = vec![];
            for row in 0..7 {
                let at = ours.stats[0].rows[row].times.clone();
                let fixed = OdeOptions {
                    method: method.clone(),
                    steps: Steps::At(at),
                    output,
                    fusion: false,
                    ..Default::default()
                };
                let alone = y0.narrow(0, row, 1).unwrap().to_device(&Device::Cpu);
                // Every row has other weights in the loss.
                let (vars, ode) = network(&Device::Cpu, net, &fixed);
                let alone = Var::from_tensor(&alone.unwrap()).unwrap();
                let states: Tensor = ode.solve(alone.as_tensor(), &times[..]).unwrap();
                let shape = ours.states.shape().clone();
                let dim = shape.rank() - 2;
                let weights = scattered(shape, DType::F32, &Device::Cpu);
                let weights = weights.narrow(dim, row, 1).unwrap();
                let loss = (&states * weights).unwrap().sum_all().unwrap();
                let grads = loss.backward().unwrap();
                let there = ours.states.narrow(dim, row, 1).unwrap();
                let error = distance(&there, &states);
                assert!(error <= 2e-5, "{name} row {row}: states {error:e}");
                let there = ours.y0.narrow(0, row, 1).unwrap();
                let error = distance(&there, grads.get(&alone).unwrap());
                assert!(error <= 4e-5, "{name} row {row}: y0 {error:e}");
                let data = vars.data().lock().unwrap();
                let mut names: Vec<_> = data.keys().cloned().collect();
                names.sort();
                let of_row = names.iter().map(|n| grads.get(&data[n]).unwrap().clone());
                params = match params.is_empty() {
                    true => of_row.collect(),
                    false => params
                        .iter()
                        .zip(of_row)
                        .map(|(a, b)| (a + b).unwrap())
                        .collect(),
                };
            }
            for (i, (a, b)) in ours.params.iter().zip(&params).enumerate() {
                let error = distance(a, b);
                assert!(error <= 4e-5, "{name}: parameter {i} {error:e}");
            }
        }
    }
}

#[test]
fn a_row_on_the_gpu_does_not_depend_on_its_company() {
    let Some(gpu) = gpu() else { return };
    for precision in [Precision::f32(), Precision::bf16(), Precision::f16()] {
        let options = OdeOptions {
            precision: Some(precision),
            ..by_row(&DOPRI5, adaptive(1e-3))
        };
        // The weight of a row in the loss depends on the row alone.  Together, these do not fit into f16.
        let solved = |y0: &Tensor, which: &[u32]| {
            let weights: Vec<f32> = which
                .iter()
                .map(|row| (-2.0 * (row % 40) as f32).exp2())
                .collect();
            let weights = Tensor::from_vec(weights, (which.len(), 1), &gpu).unwrap();
            let recorder = Recorder::tracing();
            let options = OdeOptions {
                recorder: Some(recorder.clone()),
                ..options.clone()
            };
            let (_, ode) = network(&gpu, &SWINGING, &options);
            let y0 = Var::from_tensor(y0).unwrap();
            let states: Tensor = ode.solve(y0.as_tensor(), &LONG).unwrap();
            let loss = states
                .sqr()
                .unwrap()
                .broadcast_mul(&weights)
                .unwrap()
                .sum_all();
            let grads = loss.unwrap().backward().unwrap();
            Outcome {
                y0: grads.get(&y0).unwrap().clone(),
                params: vec![],
                states,
                stats: [recorder.take(), Stats::default()],
            }
        };
        let y0 = starts(330, &gpu);
        let all: Vec<u32> = (0..330).collect();
        let whole = solved(&y0, &all);
        let backwards: Vec<u32> = (0..330).rev().collect();
        for which in [&[0][..], &[7, 250], &backwards[100..170], &backwards] {
            let index = Tensor::new(which, &gpu).unwrap();
            let part = solved(&y0.index_select(&index, 0).unwrap(), which);
            for (at, &row) in which.iter().enumerate() {
                let name = format!("{precision:?}, row {row} of {}", which.len());
                let (ours, theirs) = (bits_of_row(&part, at), bits_of_row(&whole, row as usize));
                assert_eq!(ours, theirs, "{name}");
                let (ours, theirs) = (&part.stats[0].rows[at], &whole.stats[0].rows[row as usize]);
                assert_eq!(ours, theirs, "{name}");
            }
        }
    }
}

#[test]
fn nothing_is_read_before_the_end_of_an_adaptive_launch() {
    let Some(gpu) = gpu() else { return };
    let run = |options: &OdeOptions| {
        outcome_of(
            &SPIRAL,
            &scattered((60, 2), DType::F32, &gpu),
            &LONG,
            1.0,
            options,
            Recorder::default(),
        )
        .unwrap()
    };
    // It is the default of a field whose rows are independent.
    let plain = OdeOptions {
        steps: Steps::Adaptive(adaptive(1e-4)),
        method: DOPRI5,
        ..Default::default()
    };
    let first = run(&plain);
    assert!(first.stats[0].row_evaluations > 0);
    assert_eq!(first.stats.each_ref().map(|s| s.host_reads), [1, 1]);
    assert_eq!(first.stats[0].states_kept, first.stats[0].steps);
    assert_eq!(first.stats[1].recomputed, first.stats[1].vjps);
    // More steps than there is room for: a second launch has the room, and the next solve at once.
    let short = OdeOptions {
        steps: Steps::Adaptive(adaptive(1e-4).max_step(0.02)),
        ..plain.clone()
    };
    let (second, third) = (run(&short), run(&short));
    assert!(second.stats[0].steps >= 300);
    assert_eq!(second.stats.each_ref().map(|s| s.host_reads), [2, 1]);
    assert_eq!(third.stats.each_ref().map(|s| s.host_reads), [1, 1]);
    let all = |o: &Outcome| -> Vec<_> {
        let params = o.params.iter().map(bits);
        [bits(&o.states), bits(&o.y0)]
            .into_iter()
            .chain(params)
            .collect()
    };
    assert_eq!(all(&second), all(&third));
    // What is not kept needs no room.
    let nothing = OdeOptions {
        checkpoint: Checkpoint::Nothing,
        ..short
    };
    let (_, ode) = network(&gpu, &SPIRAL, &nothing);
    let y0 = scattered((60, 2), DType::F32, &gpu);
    let states: Tensor = ode.solve(&y0, &LONG).unwrap();
    assert_eq!(bits(&states), bits(&third.states));
    let error = Error::from(states.sum_all().unwrap().backward().unwrap_err());
    assert!(matches!(error, Error::NothingKept), "{error}");
}

#[test]
fn low_precision_by_row_is_within_its_roundoff_and_takes_no_steps_that_bring_nothing() {
    let Some(gpu) = gpu() else { return };
    let y0 = starts(50, &gpu);
    let single = traced(&SWINGING, &y0, &LONG, &by_row(&DOPRI5, adaptive(1e-6))).unwrap();
    for (precision, unit) in [
        (Precision::bf16(), 2f64.powi(-8)),
        (Precision::f16(), 2f64.powi(-11)),
    ] {
        for store in [DType::F32, precision.compute] {
            for arithmetic in [Arithmetic::Native, Arithmetic::Rounded] {
                let of = |rtol: f64| {
                    let options = OdeOptions {
                        precision: Some(precision.store(store).arithmetic(arithmetic)),
                        ..by_row(&DOPRI5, adaptive(rtol))
                    };
                    traced(&SWINGING, &y0, &LONG, &options).unwrap()
                };
                let (loose, tight) = (of(1e-3), of(1e-8));
                let name = format!("{precision:?} {store:?} {arithmetic:?}");
                assert_close(&tight, &single, 20.0 * unit, &name);
                let (loose, tight) = (&loose.stats[0], &tight.stats[0]);
                assert!(tight.row_evaluations <= 3 * loose.row_evaluations, "{name}");
                let sum = |of: &dyn Fn(&candle_diffeq::metrics::RowStats) -> usize| -> usize {
                    tight.rows.iter().map(of).sum()
                };
                let (accepted, rejected) = (sum(&|r| r.accepted), sum(&|r| r.rejected));
                assert!(5 * rejected <= accepted + rejected, "{name} {rejected}");
                assert!(tight.limited > 0 && tight.tolerance_factor > 1.0, "{name}");
            }
        }
    }
}

#[test]
fn an_overflow_of_the_adjoint_of_rows_is_scaled_away() {
    let Some(gpu) = gpu() else { return };
    let rule = DynamicScaling {
        headroom: 1.0,
        ..Default::default()
    };
    let run = |precision: Precision, rtol: f64| {
        let recorder = Recorder::default();
        let options = OdeOptions {
            precision: Some(precision),
            scaling: match precision.compute {
                DType::F16 => Scaling::Dynamic(rule),
                _ => Scaling::Auto,
            },
            recorder: Some(recorder.clone()),
            ..by_row(&BOSH3, adaptive(rtol))
        };
        let (vars, ode) = network(&gpu, &SPIRAL, &options);
        // The field's own growth overflows f16, for there is no headroom.
        let steep = vars.data().lock().unwrap()["f.2.weight"].clone();
        steep.set(&(steep.as_tensor() * 20.0).unwrap()).unwrap();
        let y0 = Var::from_tensor(&scattered((40, 2), DType::F32, &gpu)).unwrap();
        let states: Tensor = ode.solve(y0.as_tensor(), &[0.0, 0.1, 0.4]).unwrap();
        let forward = recorder.take();
        let grads = states.sqr().unwrap().sum_all().unwrap().backward().unwrap();
        let data = vars.data().lock().unwrap();
        let mut names: Vec<_> = data.keys().cloned().collect();
        names.sort();
        let params = names.iter().map(|n| grads.get(&data[n]).unwrap().clone());
        Outcome {
            y0: grads.get(&y0).unwrap().clone(),
            params: params.collect(),
            states,
            stats: [forward, recorder.take()],
        }
    };
    let there = run(Precision::f16(), 1e-3);
    let here = run(Precision::f32(), 1e-5);
    assert_close(&there, &here, 40.0 * 2f64.powi(-11), "f16");
    assert!(there.stats[1].retries > 0);
    assert_eq!(
        there.stats[1].vjps,
        there.stats[1].recomputed + there.stats[1].retries
    );
    assert!(there.stats[1].scale_range.is_some());
}

#[test]
fn a_row_that_fails_on_the_gpu_leaves_the_others_alone() {
    let Some(gpu) = gpu() else { return };
    let y0 = starts(50, &gpu);
    let plain = adaptive(1e-4);
    let fine = traced(&SWINGING, &y0, &LONG, &by_row(&DOPRI5, plain.clone())).unwrap();
    let attempts = fine.stats[0].rows.iter().map(|r| r.accepted + r.rejected);
    let limit = attempts.clone().max().unwrap() - 1;
    let fails: Vec<_> = attempts.map(|attempts| attempts > limit).collect();
    let first = fails.iter().position(|fails| *fails).unwrap();
    let short = plain.max_steps(limit);
    let error = traced(&SWINGING, &y0, &LONG, &by_row(&DOPRI5, short.clone())).err();
    match error {
        Some(Error::Stopped(stopped)) => {
            assert_eq!(stopped.reason, StopReason::Attempts { max_steps: limit });
            assert_eq!(stopped.worst.unwrap().row, first);
            assert_eq!(stopped.accepted + stopped.rejected, limit);
            assert_eq!(stopped.states[0].dims(), [stopped.outputs, 1, 3]);
            let last = stopped.outputs - 1;
            let there = fine.states.i((last, first)).unwrap();
            assert_eq!(bits(&stopped.states[0].i((last, 0)).unwrap()), bits(&there));
            assert!(stopped.t > LONG[last] && stopped.t < 6.0);
        }
        other => panic!("{other:?}"),
    }
    let options = by_row(&DOPRI5, short.on_failure(OnFailure::Nan));
    let nan = traced(&SWINGING, &y0, &LONG, &options).unwrap();
    for (row, &fails) in fails.iter().enumerate() {
        assert_eq!(nan.stats[0].rows[row].stopped.is_some(), fails);
        if fails {
            let last = values(&nan.states.i((LONG.len() - 1, row)).unwrap());
            assert!(last.iter().all(|x| x.is_nan()));
            assert!(values(&nan.y0.i(row).unwrap()).iter().all(|x| *x == 0.0));
            let start = nan.states.i((0, row)).unwrap();
            assert_eq!(bits(&start), bits(&y0.i(row).unwrap()));
        } else {
            assert_eq!(bits_of_row(&nan, row), bits_of_row(&fine, row));
        }
    }
    assert!(nan.params.iter().flat_map(values).all(f64::is_finite));
}

#[test]
fn failures_of_adaptive_launches_are_named_as_on_the_cpu() {
    let Some(gpu) = gpu() else { return };
    let relu = Net {
        activation: Activation::Relu,
        widths: &[3, 12, 9, 3],
        ..SWINGING
    };
    let y0 = starts(40, &gpu);
    let with = |numbers: [f32; 3]| {
        let bad = Tensor::new(&[numbers], &gpu).unwrap();
        y0.slice_assign(&[17..18, 0..3], &bad).unwrap()
    };
    let plain = by_row(&DOPRI5, adaptive(1e-3));
    let error = |net: &Net, y0: &Tensor, options: &OdeOptions| {
        let solved = traced(net, y0, &LONG, options);
        solved.err().expect("it fails")
    };
    let given = error(&relu, &with([f32::NAN, 0.0, 0.0]), &plain);
    assert!(
        matches!(given, Error::NonFiniteState { leaf: 0 }),
        "{given}"
    );
    // A number of f32 that bf16 does not have.
    let huge = with([f32::MAX; 3]);
    let low = |control: Adaptive| OdeOptions {
        precision: Some(Precision::bf16()),
        ..by_row(&DOPRI5, control)
    };
    let velocity = error(&relu, &huge, &low(adaptive(1e-3)));
    let is_first = matches!(
        velocity,
        Error::NonFiniteVelocity { step: 0, stage: 0, t } if t == 0.0
    );
    assert!(is_first, "{velocity}");
    let nan = low(adaptive(1e-3).on_failure(OnFailure::Nan));
    let solved = traced(&relu, &huge, &LONG, &nan).unwrap();
    let fine = traced(&relu, &y0, &LONG, &nan).unwrap();
    for row in 0..40 {
        if row == 17 {
            let stopped = solved.stats[0].rows[row].stopped;
            assert_eq!(stopped, Some(StopReason::NonFinite));
            let after = solved.states.i((1.., row)).unwrap();
            assert!(values(&after).iter().all(|x| x.is_nan()));
        } else {
            assert_eq!(bits_of_row(&solved, row), bits_of_row(&fine, row));
        }
    }
    // What the compute precision limits.
    let strict = adaptive(1e-8).precision_limit_is_error(true);
    match error(&SWINGING, &y0, &low(strict)) {
        Error::Stopped(stopped) => {
            let StopReason::PrecisionLimited { limited, factor } = stopped.reason else {
                panic!("{stopped}")
            };
            assert!(10 * limited > stopped.accepted && factor > 1.0);
            assert_eq!((stopped.worst.unwrap().row, stopped.t), (0, 6.0));
        }
        other => panic!("{other}"),
    }
    // A length that does not change the time.
    let options = by_row(&DOPRI5, adaptive(1e-3).max_step(1e-30));
    match traced(&SWINGING, &y0, &[1.0, 2.0], &options).err() {
        Some(Error::Stopped(stopped)) => {
            assert_eq!(stopped.reason, StopReason::Underflow);
            assert_eq!((stopped.t, stopped.accepted, stopped.outputs), (1.0, 0, 1));
        }
        other => panic!("{other:?}"),
    }
    // A length that f32, in which the field reads time, does not tell from nothing.
    let times = [1e8, 1e8 + 4.0];
    let error = traced(&SWINGING, &y0, &times, &plain).err();
    assert!(
        matches!(
            error,
            Some(Error::TimeUnresolved { step: 0, t, end, dtype: DType::F32 })
                if t == 1e8 && end > t && end <= 1e8 + 4.0
        ),
        "{error:?}"
    );
    let options = by_row(&DOPRI5, adaptive(1e-3).on_failure(OnFailure::Nan));
    let solved = traced(&SWINGING, &y0, &times, &options).unwrap();
    for row in &solved.stats[0].rows {
        assert_eq!(row.stopped, Some(StopReason::Underflow));
    }
    // No step of a row that the compute precision limits counts.
    let strict = adaptive(1e-8).precision_limit_is_error(true);
    let strict = low(strict.on_failure(OnFailure::Nan));
    let solved = traced(&SWINGING, &y0, &LONG, &strict).unwrap();
    let first = solved.states.i((0, 0)).unwrap();
    assert_eq!(bits(&first), bits(&y0.i(0).unwrap()));
    let after = values(&solved.states.i((1.., 0)).unwrap());
    assert!(after.iter().all(|x| x.is_nan()));
    // Of the backward pass.
    let (_, ode) = network(&gpu, &SWINGING, &plain);
    let ys: Tensor = ode.solve(&y0, &LONG).unwrap();
    for at in [0, 2, LONG.len() - 1] {
        let one = ys.i(at).unwrap();
        let loss = (one * f64::NAN).unwrap().sum_all().unwrap();
        let error = Error::from(loss.backward().unwrap_err());
        assert!(matches!(error, Error::NonFiniteCotangent), "{at} {error}");
    }
    let loss = (ys.i(5).unwrap() * 3e38).unwrap().sum_all().unwrap();
    let error = Error::from(loss.backward().unwrap_err());
    assert!(
        matches!(
            error,
            Error::NonFiniteGradient { .. } | Error::NonFiniteParameterGradient
        ),
        "{error}"
    );
    // What the kernels do not do.
    let every = OdeOptions {
        checkpoint: Checkpoint::Every(2),
        ..plain
    };
    let error = error_of(&SWINGING, &y0, &every);
    let defect = Error::Adaptive(AdaptiveDefect::NoRows { row_wise: true });
    assert_eq!(error.to_string(), defect.to_string());
}

fn error_of(net: &Net, y0: &Tensor, options: &OdeOptions) -> Error {
    traced(net, y0, &LONG, options).err().expect("it fails")
}

#[test]
fn a_tolerance_of_each_element_is_that_of_its_row_on_the_gpu() {
    let Some(gpu) = gpu() else { return };
    let y0 = starts(40, &gpu);
    let rtol: Vec<f64> = (0..40)
        .flat_map(|row| [if row < 20 { 1e-2 } else { 1e-5 }; 3])
        .collect();
    let rtol = Tensor::from_vec(rtol, (40, 3), &Device::Cpu).unwrap();
    let mixed = traced(
        &SWINGING,
        &y0,
        &LONG,
        &by_row(&DOPRI5, Adaptive::new(rtol, 1e-6)),
    );
    let mixed = mixed.unwrap();
    for (rtol, rows) in [(1e-2f32, 0..20), (1e-5, 20..40)] {
        // As f32 has it.
        let alike = Adaptive::new(f64::from(rtol), 1e-6);
        let alike = traced(&SWINGING, &y0, &LONG, &by_row(&DOPRI5, alike)).unwrap();
        for row in rows {
            assert_eq!(bits_of_row(&mixed, row), bits_of_row(&alike, row), "{row}");
        }
    }
}

/// The solution of y' = 2²³ (t − 1) from zero, whose velocity is 0 at 1 and 1 at the next number of f32.
fn steep(device: &Device, times: [f64; 2], steps: Steps, method: &Tableau) -> f64 {
    let vars = VarMap::new();
    let rate = 2f32.powi(23);
    for (name, value) in [
        ("0.weight", Tensor::new(&[[0f32, rate]], device).unwrap()),
        ("0.bias", Tensor::new(&[-rate], device).unwrap()),
    ] {
        let var = Var::from_tensor(&value).unwrap();
        vars.data().lock().unwrap().insert(name.into(), var);
    }
    let build = |vb: candle_nn::VarBuilder<'_>| Mlp::with_time(&[1, 1], Activation::Tanh, vb);
    let ode = NeuralOde::<Tensor>::from_field(&vars, "", DType::F32, device, build).unwrap();
    let ode = ode.options(OdeOptions {
        steps,
        method: method.clone(),
        output: Output::Final,
        ..Default::default()
    });
    let y0 = Tensor::zeros((1, 1), DType::F32, device).unwrap();
    values(&ode.solve(&y0, &times).unwrap())[0]
}

/// A method of two stages with these weights, which estimates its error as zero.
fn two_stages(weights: [f64; 2]) -> Tableau {
    let a = vec![vec![], vec![1.0]];
    let method = Tableau::new("two", 1, a, weights.into(), vec![0.0, 1.0]).unwrap();
    method.with_embedded(weights.into()).unwrap()
}

/// The end of a step is where the next one begins, not t + h to the last bit: a field that grows fast with time tells
/// them apart.
#[test]
fn stages_at_the_end_of_a_step_see_the_time_at_which_it_ends() {
    let Some(gpu) = gpu() else { return };
    // Halfway between two numbers of f32, the last bit of an f64 decides which of them the field sees.
    let end = 1.0 + 2f64.powi(-24);
    let differs = |t: &f64| (t + (end - t)) as f32 != end as f32;
    let start = (1..10_000).map(|i| -f64::from(i) / 7777.0).find(differs);
    let start = start.unwrap();
    // The first stage is far from zero, and has no weight.
    let last = two_stages([0.0, 1.0]);
    let exact = (end - start) * f64::from((end as f32 - 1.0) * 2f32.powi(23));
    let once = Adaptive::new(1.0, 1e30)
        .first_step(10.0)
        .control(StepControl::Rows);
    for steps in [Steps::PerInterval(1), Steps::Adaptive(once)] {
        let there = steep(&gpu, [start, end], steps.clone(), &last);
        assert!((there - exact).abs() <= 1e-6, "{steps:?}: {there} {exact}");
    }
}

/// A stage at the end of a step sees the field before the jump, and the first stage of the next step after it.
#[test]
fn stages_beside_a_jump_see_their_own_side_of_it() {
    let Some(gpu) = gpu() else { return };
    // Halfway between two numbers of f32, at which the velocity is 1 and 2: its neighbours are rounded to different ones,
    // and neither to 1, at which time would stand still.
    let jump = 1.0 + 3.0 * 2f64.powi(-24);
    let control = |first: f64| {
        let adaptive = Adaptive::new(1.0, 1e30).first_step(first);
        Steps::Adaptive(adaptive.jump_t([jump]).control(StepControl::Rows))
    };
    let (before, after) = (two_stages([0.0, 1.0]), two_stages([1.0, 0.0]));
    let there = steep(&gpu, [1.0, 2.0], control(10.0), &after);
    assert!((there - 2.0 * (2.0 - jump)).abs() <= 1e-6, "{there}");
    // Backwards in time the jump lies before the end that is later.
    let there = steep(&gpu, [1.5, 1.0], control(10.0), &before);
    assert!((there - 2.0 * (jump - 1.5)).abs() <= 1e-6, "{there}");
}

#[test]
fn an_attempt_of_any_field_costs_one_look_of_the_host() {
    let Some(gpu) = gpu() else { return };
    for dtype in [DType::F32, DType::F64] {
        for norm in [Norm::Batch, Norm::WorstRow] {
            let recorder = Recorder::tracing();
            let options = OdeOptions {
                steps: Steps::Adaptive(adaptive(1e-5).norm(norm)),
                method: DOPRI5,
                recorder: Some(recorder.clone()),
                ..Default::default()
            };
            let on = |device: &Device| {
                let y0 = Var::from_tensor(&scattered((5, 3), dtype, device)).unwrap();
                let a = scattered((3, 3), dtype, device);
                let field = move |_: &Time, y: &Tensor| y.matmul(&a)?.sin();
                let ys = odeint(field, y0.as_tensor(), &LONG, &options).unwrap();
                let forward = recorder.take();
                let loss = ys.sqr().unwrap().sum_all().unwrap();
                let gradient = loss.backward().unwrap().get(&y0).unwrap().clone();
                (ys, gradient, forward, recorder.take())
            };
            let (ys, gradient, forward, backward) = on(&gpu);
            let attempts = forward.steps + forward.rejected;
            assert!(attempts >= 20, "{attempts}");
            // Before the first attempt: y0, the first velocity, three norms for the first length.
            let reads = forward.host_reads;
            assert!(
                reads >= attempts && reads <= attempts + 5,
                "{reads} {attempts}"
            );
            assert!(backward.host_reads <= 2, "{}", backward.host_reads);
            let here = on(&Device::Cpu);
            let bound = if dtype == DType::F64 { 1e-9 } else { 1e-4 };
            assert!(distance(&ys, &here.0) <= bound);
            assert!(distance(&gradient, &here.1) <= bound);
            if dtype == DType::F64 {
                let counts = |s: &Stats| (s.steps, s.rejected, s.evaluations);
                assert_eq!(counts(&forward), counts(&here.2));
            }
        }
    }
}

#[test]
fn cotangents_inside_a_step_of_any_size_give_the_same_digits() {
    let Some(gpu) = gpu() else { return };
    // All cotangents enter inside the last step, where λ is zero; the smaller ones are below the numbers of f16 unless they
    // are scaled.  Powers of two change no digit.
    let gradient = |device: &Device, size: f64| {
        let y0 = Var::from_tensor(&scattered((4, 3), DType::F32, device)).unwrap();
        let w = Var::from_tensor(&scattered((3, 3), DType::F32, device)).unwrap();
        let of = w.as_tensor().clone();
        let field = move |_: &Time, y: &Tensor| y.matmul(&of.to_dtype(y.dtype())?)?.tanh();
        let options = OdeOptions {
            method: DOPRI5,
            steps: Steps::Adaptive(Adaptive::new(1e-3, 1e-3)),
            precision: Some(Precision::f16()),
            ..Default::default()
        };
        let dense = odeint_dense(field, y0.as_tensor(), &[0.0, 1.0], &options).unwrap();
        let loss = (dense.at(&[0.9, 1.0]).unwrap().sum_all().unwrap() * size).unwrap();
        let grads = loss.backward().unwrap();
        [&y0, &w].map(|var| {
            let grad = values(grads.get(var).unwrap()).into_iter();
            grad.map(|x| x / size).collect::<Vec<_>>()
        })
    };
    for device in [Device::Cpu, gpu.clone()] {
        let large = gradient(&device, 1.0);
        assert!(large.iter().flatten().all(|x| *x != 0.0));
        assert_eq!(gradient(&device, 2f64.powi(-27)), large, "{device:?}");
    }
}

#[test]
fn a_row_that_is_lost_in_an_attempt_is_seen_beside_rows_that_are_not() {
    let Some(gpu) = gpu() else { return };
    // y' = −y³: the first attempt is far too long for the second row, whose numbers overflow.
    for norm in [Norm::Batch, Norm::WorstRow] {
        for first in [Some(0.1), None] {
            let recorder = Recorder::default();
            let mut control = Adaptive::new(1e-3, 1e-6).norm(norm);
            if let Some(first) = first {
                control = control.first_step(first);
            }
            let options = OdeOptions {
                steps: Steps::Adaptive(control),
                method: DOPRI5,
                recorder: Some(recorder.clone()),
                ..Default::default()
            };
            let on = |device: &Device| {
                let y0 = Tensor::new(&[[0.1f32], [100.0]], device).unwrap();
                let field = |_: &Time, y: &Tensor| y.sqr()?.neg()? * y;
                let y = odeint(field, &y0, &[0.0, 1.0], &options).unwrap();
                (values(&y), recorder.take().rejected)
            };
            let ((there, rejected), (here, _)) = (on(&gpu), on(&Device::Cpu));
            assert!(rejected > 0);
            assert!(there.iter().all(|y| y.is_finite()), "{there:?}");
            for (there, here) in there.iter().zip(&here) {
                assert!((there - here).abs() <= 2e-3 * here.abs(), "{there} {here}");
            }
        }
    }
}

/// Runge–Kutta's method with as many stages as there are copies of its last one.
fn many_stages(copies: usize) -> Tableau {
    let mut a = vec![vec![], vec![0.5], vec![0.0, 0.5]];
    let (mut b, mut c) = (vec![1.0 / 6.0, 1.0 / 3.0, 1.0 / 3.0], vec![0.0, 0.5, 0.5]);
    for _ in 0..copies {
        let mut row = vec![0.0; a.len()];
        row[2] = 1.0;
        a.push(row);
        b.push(1.0 / 6.0 / copies as f64);
        c.push(1.0);
    }
    Tableau::new("many", 4, a, b, c).unwrap()
}

#[test]
fn methods_of_many_stages_have_gradients() {
    let Some(gpu) = gpu() else { return };
    for copies in [12, 13, 17, 30] {
        let options = OdeOptions {
            method: many_stages(copies),
            steps: Steps::PerInterval(2),
            ..Default::default()
        };
        let on = |device: &Device| {
            let y0 = Var::from_tensor(&scattered((4, 3), DType::F64, device)).unwrap();
            let a = Var::from_tensor(&scattered((3, 3), DType::F64, device)).unwrap();
            let read = a.clone();
            let field = move |_: &Time, y: &Tensor| y.matmul(read.as_tensor())?.tanh();
            let y = odeint(field, y0.as_tensor(), &[0.0, 0.4, 1.0], &options).unwrap();
            let grads = y.sqr().unwrap().sum_all().unwrap().backward().unwrap();
            [&y0, &a].map(|v| grads.get(v).unwrap().clone())
        };
        for (there, here) in on(&gpu).iter().zip(on(&Device::Cpu)) {
            assert!(distance(there, &here) <= 1e-13, "{copies}");
        }
    }
}

#[test]
fn a_solve_that_starts_at_a_jump_starts_on_its_far_side() {
    let Some(gpu) = gpu() else { return };
    // Just above a number of f32 at which the velocity is another one than at the next.
    let start = 1.0 + 2f64.powi(-24);
    let control = |jumps: &[f64]| {
        let adaptive = Adaptive::new(1.0, 1e30).first_step(10.0);
        let adaptive = adaptive.jump_t(jumps.to_vec());
        Steps::Adaptive(adaptive.control(StepControl::Rows))
    };
    let euler = two_stages([1.0, 0.0]);
    for jumps in [&[][..], &[start]] {
        let there = steep(&gpu, [start, 2.0], control(jumps), &euler);
        let here = steep(&Device::Cpu, [start, 2.0], control(jumps), &euler);
        assert_eq!(there, here, "{jumps:?}");
    }
}

#[test]
fn sparse_products_have_the_bits_of_the_cpu() {
    let Some(gpu) = gpu() else { return };
    let edges: Vec<[u32; 2]> = (0..300).map(|i| [i * 7 % 41, i * 13 % 40]).collect();
    for dtype in [DType::F32, DType::F64, DType::BF16] {
        for width in [1, 5, 16, 33] {
            let on = |device: &Device| {
                let wide = if dtype == DType::F64 {
                    dtype
                } else {
                    DType::F32
                };
                let graph = Csr::normalised_adjacency(41, &edges, wide, device).unwrap();
                let weights = Var::from_tensor(graph.values()).unwrap();
                let graph = graph.with_values(weights.as_tensor().clone()).unwrap();
                let x = Var::from_tensor(&scattered((41, width), dtype, device)).unwrap();
                let y = graph.matmul(x.as_tensor()).unwrap();
                let g = scattered((41, width), dtype, device);
                let loss = (&y * &g).unwrap().sum_all().unwrap();
                let grads = loss.backward().unwrap();
                [&x, &weights]
                    .map(|v| bits(grads.get(v).unwrap()))
                    .into_iter()
                    .chain([bits(&y)])
                    .collect::<Vec<_>>()
            };
            assert_eq!(on(&gpu), on(&Device::Cpu), "{dtype:?} {width}");
        }
    }
}
