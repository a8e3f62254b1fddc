//! Steps that are replayed as CUDA graphs give the bits of steps that are launched operation by
//! operation, and what cannot be replayed is launched so.  Without a GPU every test says so and passes,
//! unless `CANDLE_DIFFEQ_NEEDS_GPU` is set.
#![cfg(feature = "cuda")]

mod common;

use std::cell::{Cell, RefCell};
use std::sync::{Mutex, MutexGuard, PoisonError};

use candle_core::cuda_backend::cudarc::driver::result::mem_get_info;
use candle_core::{
    CpuStorage, CudaStorage, CustomOp1, DType, Device, Layout, Module, Shape, Tensor, Var,
};
use candle_diffeq::error::NotReplayed;
use candle_diffeq::fields::PiecewiseConstant;
use candle_diffeq::metrics::{Recorder, Stats};
use candle_diffeq::nn::{Activation, Cnf, ConvField, HyperCnf, Linear, Mlp, OtFlow};
use candle_diffeq::options::{Checkpoint, Output, Steps};
use candle_diffeq::scaling::{DynamicScaling, Scaling};
use candle_diffeq::tableau::{BOSH3, DOPRI5, EULER};
use candle_diffeq::{
    odeint, solution, Error, NeuralOde, OdeOptions, Precision, Result, State, Time, VectorField,
};
use candle_nn::{VarBuilder, VarMap};
use common::{bits, descend, scattered, var, worst};

/// The GPU, for one test at a time: one looks at its memory.
fn gpu() -> Option<(Device, MutexGuard<'static, ()>)> {
    static ALONE: Mutex<()> = Mutex::new(());
    let alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    match Device::new_cuda(0) {
        Ok(device) => Some((device, alone)),
        Err(error) => {
            let needed = std::env::var_os("CANDLE_DIFFEQ_NEEDS_GPU").is_some();
            assert!(!needed, "a GPU is needed: {error}");
            eprintln!("NOT RUN on CUDA: no device");
            None
        }
    }
}

/// Output times that are not evenly spaced.
const TIMES: [f64; 4] = [0.0, 0.3, 0.7, 1.0];

/// What a solve and its backward pass came to: bits of states and gradients, and counts of each pass.
struct Outcome {
    bits: Vec<Vec<u64>>,
    stats: [Stats; 2],
}

fn with_recorder(options: &OdeOptions, graphs: bool) -> (OdeOptions, Recorder) {
    let recorder = Recorder::default();
    let options = OdeOptions {
        recorder: Some(recorder.clone()),
        graphs,
        fusion: false,
        ..options.clone()
    };
    (options, recorder)
}

/// A perceptron as a neural ODE.
fn perceptron(
    device: &Device,
    widths: &'static [usize],
    time: bool,
    options: OdeOptions,
) -> (VarMap, NeuralOde) {
    let vars = VarMap::new();
    for (l, pair) in widths.windows(2).enumerate() {
        let inputs = pair[0] + usize::from(time && l == 0);
        let weight = scattered(&[pair[1], inputs], 0.9, l);
        for (name, value) in [("weight", weight), ("bias", scattered(&[pair[1]], 0.3, l))] {
            let value = value.to_dtype(DType::F32).unwrap().to_device(device);
            let value = Var::from_tensor(&value.unwrap()).unwrap();
            let mut data = vars.data().lock().unwrap();
            data.insert(format!("f.{l}.{name}"), value);
        }
    }
    let ode = NeuralOde::new(&vars, "f", device, move |vb| match time {
        true => Mlp::with_time(widths, Activation::Tanh, vb),
        false => Ok(Mlp::new(widths, Activation::Softplus, vb)?.residual()),
    });
    (vars, ode.unwrap().options(options))
}

/// A solve with a perceptron and the gradients of a weighted sum of its states.
fn trained(
    device: &Device,
    time: bool,
    times: &[f64],
    scale: f64,
    graphs: bool,
    options: &OdeOptions,
) -> Result<Outcome> {
    let (options, recorder) = with_recorder(options, graphs);
    let (vars, ode) = perceptron(device, &[3, 20, 20, 3], time, options);
    let y0 = scattered(&[5, 3], 1.0, 7).to_dtype(DType::F32)?;
    let y0 = Var::from_tensor(&y0.to_device(device)?)?;
    let states: Tensor = ode.solve(y0.as_tensor(), times)?;
    let forward = recorder.take();
    let weights = scattered(states.dims(), scale, 3).to_dtype(states.dtype())?;
    let loss = (&states * weights.to_device(device)?)?.sum_all()?;
    let grads = loss.backward()?;
    let mut all = vec![bits(&states), bits(grads.get(&y0).unwrap())];
    let mut data: Vec<_> = vars.data().lock().unwrap().clone().into_iter().collect();
    data.sort_by(|a, b| a.0.cmp(&b.0));
    all.extend(data.iter().map(|(_, var)| bits(grads.get(var).unwrap())));
    Ok(Outcome {
        bits: all,
        stats: [forward, recorder.take()],
    })
}

/// The counts that both ways have in common.
fn counts(stats: &Stats) -> [usize; 6] {
    let Stats {
        steps,
        evaluations,
        recomputed,
        vjps,
        retries,
        host_reads,
        ..
    } = *stats;
    [steps, evaluations, recomputed, vjps, retries, host_reads]
}

/// Both ways give the same bits and counts; how many steps were replayed, forward and backward.
fn same(plain: &Outcome, replayed: &Outcome, what: &str) -> [usize; 2] {
    for (i, (plain, replayed)) in plain.bits.iter().zip(&replayed.bits).enumerate() {
        let others = plain.iter().zip(replayed).filter(|(a, b)| a != b).count();
        assert_eq!(
            others,
            0,
            "{what}: bits of {others} in result {i} {:?} {:?}",
            f64::from_bits(plain[0]),
            f64::from_bits(replayed[0])
        );
    }
    let finite = |x: &Vec<u64>| worst(x.iter().map(|&x| f64::from_bits(x))).is_finite();
    assert!(plain.bits.iter().all(finite), "{what}");
    for (plain, replayed) in plain.stats.iter().zip(&replayed.stats) {
        assert_eq!(counts(plain), counts(replayed), "{what}");
        assert_eq!(plain.scale_range, replayed.scale_range, "{what}");
        assert_eq!((plain.replayed, &plain.not_replayed), (0, &None), "{what}");
    }
    [0, 1].map(|pass| replayed.stats[pass].replayed)
}

#[test]
fn replayed_passes_give_the_bits_of_launched_ones() {
    let Some((gpu, _alone)) = gpu() else { return };
    let precisions = [
        Precision::f32(),
        Precision::bf16(),
        Precision::bf16().store(DType::BF16),
        Precision::f16(),
        Precision::f32().compensated(),
        Precision::bf16().store(DType::BF16).compensated(),
    ];
    for precision in precisions {
        for (checkpoint, output, time) in [
            (Checkpoint::All, Output::All, true),
            (Checkpoint::All, Output::Final, false),
            (Checkpoint::Every(4), Output::All, false),
            (Checkpoint::States(3), Output::Final, true),
        ] {
            let options = OdeOptions {
                precision: Some(precision),
                checkpoint,
                output,
                steps: Steps::PerInterval(3),
                ..Default::default()
            };
            let run = |graphs| trained(&gpu, time, &TIMES, 1.0, graphs, &options).unwrap();
            let (plain, replayed) = (run(false), run(true));
            let what = format!("{precision:?}, {checkpoint:?}, {output:?}");
            let [forward, backward] = same(&plain, &replayed, &what);
            // All but the first step of each pass; steps between checkpoints, too.
            assert_eq!(forward, 8, "{what}");
            match checkpoint {
                Checkpoint::All => assert_eq!(backward, 8, "{what}"),
                _ => assert!(backward > 8, "{what}"),
            }
            for stats in &replayed.stats {
                assert_eq!(stats.not_replayed, None, "{what}");
                assert!(stats.host_reads <= 1, "{what}");
            }
        }
    }
}

#[test]
fn every_method_can_be_replayed_and_blocks_of_gradients_are_summed_as_ever() {
    let Some((gpu, _alone)) = gpu() else { return };
    for (method, steps) in [(EULER, 150), (BOSH3, 50), (DOPRI5, 30)] {
        let options = OdeOptions {
            method,
            steps: Steps::PerInterval(steps),
            ..Default::default()
        };
        let run = |graphs| trained(&gpu, true, &[1.0, 0.0], 1.0, graphs, &options).unwrap();
        let [forward, backward] = same(&run(false), &run(true), options.method.name());
        // Two evaluations come first.
        let first = if steps == 150 { 2 } else { 1 };
        assert_eq!([forward, backward], [steps - first, steps - 1]);
    }
}

#[test]
fn an_overflow_within_a_replayed_sweep_is_taken_back() {
    let Some((gpu, _alone)) = gpu() else { return };
    let rule = DynamicScaling {
        headroom: 1.0,
        ..Default::default()
    };
    for checkpoint in [Checkpoint::All, Checkpoint::States(2)] {
        let options = OdeOptions {
            precision: Some(Precision::f16()),
            scaling: Scaling::Dynamic(rule),
            checkpoint,
            steps: Steps::PerInterval(3),
            ..Default::default()
        };
        let run = |graphs| trained(&gpu, false, &TIMES, 1.0, graphs, &options).unwrap();
        let (plain, replayed) = (run(false), run(true));
        let [_, backward] = same(&plain, &replayed, &format!("{checkpoint:?}"));
        let retries = plain.stats[1].retries;
        assert!(
            retries > 0 && backward > 8,
            "{retries} retries, {backward} replayed"
        );
    }
}

/// A solve of a closure over `a` and its gradients.
fn closure<S, F>(
    y0: &S,
    a: &Var,
    graphs: bool,
    options: &OdeOptions,
    field: impl FnOnce(Tensor) -> F,
) -> Result<Outcome>
where
    S: State + Send + Sync + 'static,
    F: VectorField<S> + Send + Sync + 'static,
{
    let (options, recorder) = with_recorder(options, graphs);
    let states = odeint(field(a.as_tensor().clone()), y0, &TIMES, &options)?;
    let forward = recorder.take();
    let leaves = states.leaves();
    let mut loss = leaves[0].sqr()?.sum_all()?;
    for leaf in &leaves[1..] {
        loss = (loss + leaf.sqr()?.sum_all()?)?;
    }
    let grads = loss.backward()?;
    let given = y0.leaves().into_iter().chain([a.as_tensor().clone()]);
    let gradients = given.filter_map(|x| grads.get(&x).map(bits));
    Ok(Outcome {
        bits: leaves.iter().map(bits).chain(gradients).collect(),
        stats: [forward, recorder.take()],
    })
}

/// Steps enough for a graph.
fn steps() -> OdeOptions {
    OdeOptions {
        steps: Steps::PerInterval(3),
        ..Default::default()
    }
}

fn on(device: &Device, x: &Var) -> Var {
    Var::from_tensor(&x.as_tensor().detach().to_device(device).unwrap()).unwrap()
}

#[test]
fn what_candle_differentiates_is_replayed_with_views_constants_and_time() {
    let Some((gpu, _alone)) = gpu() else { return };
    let (y0, a) = (
        on(&gpu, &var(&[4, 3], 1.0, 1)),
        on(&gpu, &var(&[3, 3], 0.8, 2)),
    );
    let field = |a: Tensor| {
        move |t: &Time, y: &Tensor| {
            let shift = Tensor::new(&[0.1f64, 0.2, 0.3], y.device())?;
            let turned = y.t()?.contiguous()?.narrow(1, 1, 2)?.sum(1)?;
            let k = y.matmul(&a.t()?)?.broadcast_add(&shift)?.tanh()?;
            k.broadcast_mul(&t.tensor()?.cos()?)?
                .broadcast_sub(&(turned * 0.1)?)
        }
    };
    let run = |graphs| closure(y0.as_tensor(), &a, graphs, &steps(), field).unwrap();
    let replayed = run(true);
    assert_eq!(replayed.stats[1].not_replayed, None);
    // A closure's variables are compared with what they were, which is one more look.
    assert!(replayed.stats[0].host_reads <= 1 && replayed.stats[1].host_reads <= 2);
    assert_eq!(same(&run(false), &replayed, "a closure"), [8, 8]);
}

#[test]
fn candles_linear_layer_is_replayed() {
    let Some((gpu, _alone)) = gpu() else { return };
    let (y0, a) = (
        on(&gpu, &var(&[4, 3], 1.0, 1)),
        on(&gpu, &var(&[3, 3], 0.8, 2)),
    );
    let field = |a: Tensor| {
        let bias = scattered(&[3], 0.5, 4).to_device(a.device()).unwrap();
        let layer = candle_nn::Linear::new(a, Some(bias));
        move |_: &Time, y: &Tensor| layer.forward(y)?.sin()
    };
    let run = |graphs| closure(y0.as_tensor(), &a, graphs, &steps(), field).unwrap();
    assert_eq!(same(&run(false), &run(true), "a linear layer"), [8, 8]);
}

#[test]
fn a_velocity_may_be_the_state_itself() {
    let Some((gpu, _alone)) = gpu() else { return };
    let [y, z] = [1, 2].map(|i| on(&gpu, &var(&[3], 1.0, i)).as_tensor().detach());
    let field = |_: &Time, (y, z): &(Tensor, Tensor)| Ok((z.clone(), y.clone()));
    let run = |graphs| {
        let (options, recorder) = with_recorder(&steps(), graphs);
        let y0 = (y.clone(), z.clone());
        let solution = solution(&field, &y0, &TIMES, &options).unwrap();
        let ones = solution.states().0.ones_like().unwrap();
        let forward = recorder.take();
        let gradient = || solution.vjp(&(ones.clone(), ones.clone())).unwrap().y0;
        // A solve may be pulled back twice.
        let ((a, b), (c, d)) = (gradient(), gradient());
        let (s, t) = solution.states();
        Outcome {
            bits: [s, t, &a, &b, &c, &d].map(bits).into(),
            stats: [forward, recorder.take()],
        }
    };
    assert_eq!(same(&run(false), &run(true), "two leaves"), [8, 16]);
}

/// Solves with a field of this crate both ways, and holds them to the same bits.
fn field_is_replayed<S, F>(
    device: &Device,
    shapes: &[&[usize]],
    build: impl Fn(VarBuilder<'_>) -> candle_core::Result<F> + Clone + Send + Sync + 'static,
) where
    S: State + 'static,
    F: VectorField<S> + Send + Sync + 'static,
{
    let what = std::any::type_name::<F>();
    // The names, from a model on the CPU: nothing is drawn by chance.
    let named = VarMap::new();
    NeuralOde::<S>::from_field(&named, "f", DType::F32, &Device::Cpu, build.clone()).unwrap();
    let here = |shape: &[usize], seed| {
        let x = scattered(shape, 0.6, seed).to_dtype(DType::F32).unwrap();
        x.to_device(device).unwrap()
    };
    let run = |graphs| {
        let (options, recorder) = with_recorder(&steps(), graphs);
        let vars = VarMap::new();
        let mut names: Vec<_> = named.data().lock().unwrap().clone().into_iter().collect();
        names.sort_by(|a, b| a.0.cmp(&b.0));
        for (i, (name, var)) in names.iter().enumerate() {
            let var = Var::from_tensor(&here(var.dims(), i)).unwrap();
            vars.data().lock().unwrap().insert(name.clone(), var);
        }
        let ode = NeuralOde::<S>::from_field(&vars, "f", DType::F32, device, build.clone());
        let y0 = shapes
            .iter()
            .enumerate()
            .map(|(i, shape)| here(shape, 10 + i));
        let y0 = S::from_leaves(y0.collect()).unwrap();
        let leaves = ode
            .unwrap()
            .options(options)
            .solve(&y0, &TIMES)
            .unwrap()
            .leaves();
        let forward = recorder.take();
        let squares = leaves.iter().map(|y| y.sqr()?.mean_all());
        let squares: candle_core::Result<Vec<_>> = squares.collect();
        let loss = Tensor::stack(&squares.unwrap(), 0).unwrap().sum_all();
        let grads = loss.unwrap().backward().unwrap();
        let data = vars.data().lock().unwrap();
        let grads = names.iter().filter_map(|(name, _)| grads.get(&data[name]));
        Outcome {
            bits: leaves.iter().chain(grads).map(bits).collect(),
            stats: [forward, recorder.take()],
        }
    };
    let replayed = run(true);
    let reasons = replayed.stats.each_ref().map(|s| s.not_replayed.clone());
    assert_eq!(reasons, [None, None], "{what}");
    assert_eq!(same(&run(false), &replayed, what), [8, 8], "{what}");
}

#[test]
fn fields_of_this_crate_are_replayed() {
    let Some((gpu, _alone)) = gpu() else { return };
    type Flow = (Tensor, Tensor);
    field_is_replayed::<Tensor, _>(&gpu, &[&[4, 3]], |vb| {
        let layers = [
            Linear::new(3, 8, vb.pp("a"))?,
            Linear::without_bias(8, 3, vb.pp("b"))?,
        ];
        Ok(move |_: &Time, y: &Tensor| {
            layers[1].forward(&Activation::Gelu.forward(&layers[0].forward(y)?)?)
        })
    });
    field_is_replayed::<Flow, _>(&gpu, &[&[4, 2], &[4, 1]], |vb| {
        Cnf::new(Mlp::with_time(&[2, 8, 2], Activation::Tanh, vb)?)
    });
    field_is_replayed::<Flow, _>(&gpu, &[&[4, 2], &[4, 1]], |vb| HyperCnf::new(2, 4, 5, vb));
    field_is_replayed::<Flow, _>(&gpu, &[&[4, 2], &[4, 3]], |vb| OtFlow::new(2, 8, 3, vb));
    field_is_replayed::<Tensor, _>(&gpu, &[&[2, 2, 5, 5]], |vb| {
        ConvField::new(&[2, 3, 2], 3, Activation::Silu, vb)
    });
}

/// Runs a closure both ways; the reason why each pass was not replayed, if it was not.
fn refused<F>(
    device: &Device,
    options: &OdeOptions,
    field: impl Fn(Tensor) -> F,
) -> [Option<NotReplayed>; 2]
where
    F: VectorField<Tensor> + Send + Sync + 'static,
{
    let (y0, a) = (
        on(device, &var(&[4, 3], 1.0, 1)),
        on(device, &var(&[3, 3], 0.8, 2)),
    );
    let run = |graphs| closure(y0.as_tensor(), &a, graphs, options, &field).unwrap();
    let (plain, replayed) = (run(false), run(true));
    let counts = same(&plain, &replayed, "refused");
    let reasons = replayed.stats.map(|stats| stats.not_replayed);
    for (reason, count) in reasons.iter().zip(counts) {
        assert_eq!(reason.is_some(), count == 0, "{reason:?}, {count}");
    }
    reasons
}

#[test]
fn a_field_that_reads_the_value_of_time_is_launched() {
    let Some((gpu, _alone)) = gpu() else { return };
    let reasons = refused(&gpu, &steps(), |a| {
        move |t: &Time, y: &Tensor| y.matmul(&a)? * (1.0 + t.value())
    });
    assert_eq!(reasons, [const { Some(NotReplayed::TimeValue) }; 2]);
    let reasons = refused(&gpu, &steps(), |a| {
        let fields = [1.0, -1.0].map(|sign: f64| {
            let a = a.clone();
            move |_: &Time, y: &Tensor| y.matmul(&a)? * sign
        });
        PiecewiseConstant::new(&[0.0, 0.5, 1.0], fields.into()).unwrap()
    });
    assert_eq!(reasons, [const { Some(NotReplayed::TimeValue) }; 2]);
}

#[test]
fn a_field_that_asks_the_host_is_launched() {
    let Some((gpu, _alone)) = gpu() else { return };
    let reads = refused(&gpu, &steps(), |a| {
        move |t: &Time, y: &Tensor| y.matmul(&a)? * t.tensor()?.to_scalar::<f64>()?
    });
    let waits = refused(&gpu, &steps(), |a| {
        move |_: &Time, y: &Tensor| {
            y.device().synchronize()?;
            y.matmul(&a)
        }
    });
    // More than candle keeps on the device.
    let uploads = refused(&gpu, &steps(), |a| {
        move |_: &Time, y: &Tensor| {
            let many = Tensor::from_vec(vec![0.5f64; 1000], 1000, y.device())?;
            y.matmul(&a)?.broadcast_mul(&many.mean_all()?)
        }
    });
    for reasons in [reads, waits, uploads] {
        for reason in reasons {
            assert!(
                matches!(reason, Some(NotReplayed::Capture(_))),
                "{reason:?}"
            );
        }
    }
}

/// x + 1, the 1 uploaded behind candle's back.
struct PlusOne;

impl CustomOp1 for PlusOne {
    fn name(&self) -> &'static str {
        "plus one"
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        candle_core::bail!("on CUDA only")
    }

    fn cuda_fwd(&self, x: &CudaStorage, l: &Layout) -> candle_core::Result<(CudaStorage, Shape)> {
        let stream = x.device.cuda_stream();
        let ones = stream.clone_htod(&vec![1f64; l.shape().elem_count()]);
        let ones = ones.map_err(candle_core::Error::wrap)?;
        Ok((
            CudaStorage::wrap_cuda_slice(ones, x.device.clone()),
            l.shape().clone(),
        ))
    }
}

#[test]
fn a_graph_that_copies_from_the_host_is_not_launched() {
    let Some((gpu, _alone)) = gpu() else { return };
    let reasons = refused(&gpu, &steps(), |a| {
        move |_: &Time, y: &Tensor| y.matmul(&a)? + y.detach().apply_op1_no_bwd(&PlusOne)?
    });
    assert_eq!(reasons, [const { Some(NotReplayed::HostMemory) }; 2]);
}

#[test]
fn a_stream_that_is_ordered_by_events_is_not_captured() {
    let Some((_, _alone)) = gpu() else { return };
    let device = Device::new_cuda_with_stream(0).unwrap();
    let field = |a: Tensor| move |_: &Time, y: &Tensor| y.matmul(&a)?.tanh();
    let reasons = refused(&device, &steps(), field);
    assert_eq!(reasons, [const { Some(NotReplayed::EventTracking) }; 2]);
    let cuda = device.as_cuda_device().unwrap();
    // SAFETY: one stream is used.
    #[allow(unsafe_code)]
    unsafe {
        cuda.disable_event_tracking()
    };
    assert_eq!(refused(&device, &steps(), field), [None, None]);
}

#[test]
fn few_steps_and_gradients_of_times_are_launched() {
    let Some((gpu, _alone)) = gpu() else { return };
    let field = |a: Tensor| move |_: &Time, y: &Tensor| y.matmul(&a)?.tanh();
    let reasons = refused(&gpu, &OdeOptions::default(), field);
    let few = NotReplayed::FewSteps { steps: 3, least: 4 };
    assert_eq!(reasons, [Some(few.clone()), Some(few)]);

    let run = |graphs| {
        let (options, recorder) = with_recorder(&steps(), graphs);
        let times = Var::new(&TIMES, &gpu).unwrap();
        let y0 = on(&gpu, &var(&[3], 1.0, 1)).as_tensor().detach();
        let field = |t: &Time, y: &Tensor| y.broadcast_mul(&t.tensor()?.cos()?);
        let ys = odeint(field, &y0, times.as_tensor(), &options).unwrap();
        let forward = recorder.take();
        let grads = ys.sqr().unwrap().sum_all().unwrap().backward().unwrap();
        Outcome {
            bits: vec![bits(&ys), bits(grads.get(&times).unwrap())],
            stats: [forward, recorder.take()],
        }
    };
    let replayed = run(true);
    assert_eq!(same(&run(false), &replayed, "times"), [8, 0]);
    let reason = replayed.stats[1].not_replayed.clone();
    assert_eq!(reason, Some(NotReplayed::TimeGradients));
}

#[test]
fn the_cpu_has_no_graphs() {
    let options = OdeOptions {
        fusion: true,
        ..steps()
    };
    let field = |a: Tensor| move |_: &Time, y: &Tensor| y.matmul(&a)?.tanh();
    let (y0, a) = (var(&[4, 3], 1.0, 1), var(&[3, 3], 0.8, 2));
    let run = |graphs| closure(y0.as_tensor(), &a, graphs, &options, field).unwrap();
    let replayed = run(true);
    assert_eq!(same(&run(false), &replayed, "the CPU"), [0, 0]);
    assert!(replayed.stats.iter().all(|s| s.not_replayed.is_none()));
}

#[test]
fn failures_in_replayed_steps_are_named_as_ever() {
    let Some((gpu, _alone)) = gpu() else { return };
    let y0 = Var::new(&[[1f32, 2.0]], &gpu).unwrap();
    let options = OdeOptions {
        steps: Steps::PerInterval(6),
        ..Default::default()
    };
    // y' = y² leaves every bound in finite time.
    let forward = |graphs| {
        let (options, recorder) = with_recorder(&options, graphs);
        let field = |_: &Time, y: &Tensor| y.sqr()? * 3.0;
        let error = odeint(field, y0.as_tensor(), &TIMES, &options).unwrap_err();
        (error.to_string(), recorder.take().replayed)
    };
    let ((plain, none), (replayed, some)) = (forward(false), forward(true));
    assert_eq!((plain, none), (replayed.clone(), 0));
    assert!(some > 0 && !replayed.contains("step 0"), "{replayed}");

    // λ' = −40 λ grows beyond f32 on the way back.
    let backward = |graphs| {
        let (options, recorder) = with_recorder(&options, graphs);
        let field = |_: &Time, y: &Tensor| y * 40.0;
        let ys = odeint(field, &(y0.as_tensor() * 1e-30).unwrap(), &TIMES, &options).unwrap();
        let loss = (ys * 1e35).unwrap().sum_all().unwrap();
        recorder.take();
        let error = loss.backward().unwrap_err().to_string();
        (error, recorder.take().replayed)
    };
    let ((plain, none), (replayed, some)) = (backward(false), backward(true));
    assert_eq!((plain, none), (replayed.clone(), 0));
    assert!(some > 0 && replayed.contains("step"), "{replayed}");

    // The field itself fails: in the first step, or in the second, which is captured.
    for evaluations in [2, 4] {
        let run = |graphs| {
            let calls = Cell::new(0);
            let field = |_: &Time, y: &Tensor| {
                calls.set(calls.get() + 1);
                match calls.get() > evaluations {
                    true => candle_core::bail!("no more"),
                    false => y.neg(),
                }
            };
            let y0 = y0.as_tensor().detach();
            let error = solution(&field, &y0, &TIMES, &with_recorder(&options, graphs).0);
            error.err().unwrap().to_string()
        };
        let error = run(true);
        assert_eq!(error.lines().next(), run(false).lines().next());
        assert!(error.contains("no more"), "{error}");
    }
}

#[test]
fn a_field_that_keeps_what_it_made_is_an_error() {
    let Some((gpu, _alone)) = gpu() else { return };
    let kept = RefCell::new(vec![]);
    let field = |_: &Time, y: &Tensor| {
        let k = y.neg()?;
        kept.borrow_mut().push(k.clone());
        Ok(k)
    };
    let y0 = on(&gpu, &var(&[3], 1.0, 1)).as_tensor().detach();
    let run =
        |graphs| solution(&field, &y0, &TIMES, &with_recorder(&steps(), graphs).0).map(|_| ());
    run(false).unwrap();
    let error = run(true).unwrap_err();
    assert!(matches!(error, Error::KeptInGraph), "{error}");
}

#[test]
fn training_with_graphs_takes_no_more_memory_with_every_step() {
    let Some((gpu, _alone)) = gpu() else { return };
    let (options, recorder) = with_recorder(&steps(), true);
    let (vars, ode) = perceptron(&gpu, &[3, 8, 3], true, options);
    let y0 = scattered(&[5, 3], 1.0, 7).to_dtype(DType::F32).unwrap();
    let y0 = y0.to_device(&gpu).unwrap();
    let mut free = vec![];
    for _ in 0..20 {
        let ys: Tensor = ode.solve(&y0, &TIMES).unwrap();
        descend(&vars, &ys);
        gpu.synchronize().unwrap();
        drop(ys);
        free.push(mem_get_info().unwrap().0);
    }
    assert_eq!(recorder.take().replayed, 20 * 16);
    assert!(free[10..].iter().all(|&f| f >= free[9]), "{free:?}");
}
