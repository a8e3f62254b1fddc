//! Solves on a GPU are the solves of the CPU.  Without a GPU every test says so and passes, unless
//! `CANDLE_DIFFEQ_NEEDS_GPU` is set.
#![cfg(feature = "cuda")]

mod common;

use std::sync::{Mutex, MutexGuard, PoisonError};

use candle_core::{DType, Device, IndexOp, Shape, Tensor, Var};
use candle_diffeq::nn::{Activation, Mlp};
use candle_diffeq::{
    odeint,
    scaling::{DynamicScaling, Scaling},
    solution,
    tableau::{BOSH3, EULER, MIDPOINT},
    Arithmetic, Checkpoint, Error, NeuralOde, OdeOptions, Output, Precision, Recorder, Stats,
    Steps, Time, DOPRI5, RK4,
};
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
    let recorder = Recorder::default();
    let options = OdeOptions {
        recorder: Some(recorder.clone()),
        ..options.clone()
    };
    let (vars, ode) = network(device, net, &options);
    let y0 = Var::from_tensor(&scattered((rows, net.widths[0]), DType::F32, device))?;
    let states: Tensor = ode.solve(y0.as_tensor(), times)?;
    let forward = recorder.take();
    let weights = (scattered(states.shape().clone(), DType::F32, device) * scale)?;
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
        let Ok(ys) = ode.solve(&y0, &[0.0, 1e-9]) else {
            continue;
        };
        let ys: Tensor = ys;
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
    for (fusion, precision) in [(true, Precision::f32()), (false, Precision::f16())] {
        let options = OdeOptions {
            fusion,
            precision: Some(precision),
            ..Default::default()
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
