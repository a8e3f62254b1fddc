//! On the general path, graphs of the forward pass that are kept replace evaluations of the backward pass, and change no
//! bit of any gradient.

mod common;

use candle_core::{DType, Device, Module, Result, Tensor, Var};
use candle_diffeq::fields::PiecewiseConstant;
use candle_diffeq::fields::{Cotangents, Pullback};
use candle_diffeq::metrics::{Recorder, Stats};
use candle_diffeq::nn::graph::{Csr, GcnField};
use candle_diffeq::nn::{Activation, Mlp};
use candle_diffeq::options::{ActivationCache, Checkpoint, Steps, TimeGrid};
use candle_diffeq::tableau::{DOPRI5, RK4};
use candle_diffeq::{
    odeint, odeint_with, Error, NeuralOde, OdeOptions, Precision, Time, VectorField,
};
use candle_nn::{linear, VarMap};
use common::{bits, fill, scattered};

const TIMES: [f64; 4] = [0.0, 0.2, 0.5, 0.9];
const STEPS: usize = 3;

fn caches() -> [ActivationCache; 3] {
    let of = ActivationCache::within;
    [ActivationCache::NONE, of(20_000), ActivationCache::ALL]
}

fn options(cache: ActivationCache, recorder: &Recorder) -> OdeOptions {
    OdeOptions {
        activation_cache: cache,
        recorder: Some(recorder.clone()),
        ..Default::default()
    }
}

/// The gradients that `solve` leaves in the variables are the same for each of the caches.
fn compare(vars: &[Var], solve: impl Fn(OdeOptions) -> Tensor) -> Vec<Stats> {
    compare_with(caches(), vars, solve)
}

fn compare_with(
    caches: [ActivationCache; 3],
    vars: &[Var],
    solve: impl Fn(OdeOptions) -> Tensor,
) -> Vec<Stats> {
    let mut expected: Option<Vec<_>> = None;
    let of = |cache| {
        let recorder = Recorder::default();
        let loss = solve(options(cache, &recorder));
        let grads = loss.sin().unwrap().sum_all().unwrap().backward().unwrap();
        let found: Vec<_> = vars.iter().map(|v| bits(grads.get(v).unwrap())).collect();
        assert_eq!(expected.get_or_insert_with(|| found.clone()), &found);
        recorder.take()
    };
    caches.into_iter().map(of).collect()
}

fn var(shape: &[usize], seed: usize) -> Var {
    let x = scattered(shape, 0.7, seed).to_dtype(DType::F32).unwrap();
    Var::from_tensor(&x).unwrap()
}

#[test]
fn a_closure_keeps_as_many_of_the_last_steps_as_fit_and_its_gradients_stay_the_same() {
    let (y0, w, v) = (var(&[8, 4], 1), var(&[4, 16], 2), var(&[16, 4], 3));
    let stats = compare(&[y0.clone(), w.clone(), v.clone()], |options| {
        let (w, v) = (w.as_tensor().clone(), v.as_tensor().clone());
        let f = move |t: &Time, y: &Tensor| {
            let hidden = (y.matmul(&w)? + t.value().sin())?.tanh()?;
            hidden.matmul(&v)
        };
        odeint(f, &y0, &TIMES, &options).unwrap()
    });
    let [none, some, all] = &stats[..] else {
        unreachable!()
    };
    let stages = RK4.stages();
    assert_eq!(
        (none.activation_bytes, none.recomputed),
        (0, STEPS * stages)
    );
    assert_eq!(all.recomputed, 0);
    assert_eq!(all.evaluations, none.evaluations);
    assert_eq!(all.activation_bytes % STEPS, 0);
    let step = all.activation_bytes / STEPS;
    let kept = some.activation_bytes / step;
    assert!((1..STEPS).contains(&kept) && some.activation_bytes <= 20_000);
    assert_eq!(some.recomputed, (STEPS - kept) * stages);
}

#[test]
fn a_model_with_arguments_a_state_of_two_tensors_and_times_has_the_same_gradients_with_kept_graphs()
{
    let device = Device::Cpu;
    let vars = VarMap::new();
    let ode = |options| {
        NeuralOde::with_args(&vars, "f", DType::F32, &device, |vb| {
            let (a, b) = (linear(5, 12, vb.pp("a"))?, linear(12, 3, vb.pp("b"))?);
            Ok(move |t: &Time, (y, s): &(Tensor, Tensor), c: &Tensor| {
                let hidden = a.forward(&Tensor::cat(&[y, c], 1)?)?;
                let k = b.forward(&hidden.broadcast_add(&t.tensor()?)?.tanh()?)?;
                Ok((k.clone(), (k.sqr()?.sum(1)? - s)?))
            })
        })
        .unwrap()
        .options(options)
    };
    ode(OdeOptions::default());
    fill(&vars);
    let (y0, c) = (var(&[6, 3], 4), var(&[6, 2], 5));
    let s0 = Tensor::zeros(6, DType::F32, &device).unwrap();
    let times = Var::new(&TIMES, &device).unwrap();
    let mut all = vec![y0.clone(), c.clone(), times.clone()];
    all.extend(vars.all_vars());
    for method in [RK4, DOPRI5] {
        let stats = compare(&all, |options| {
            let options = OdeOptions {
                method: method.clone(),
                steps: Steps::Size(0.15),
                ..options
            };
            let grid = TimeGrid::from_tensor(&times).unwrap();
            let state = (y0.as_tensor().clone(), s0.clone());
            let (ys, ss) = ode(options).given(&c).solve(&state, &grid).unwrap();
            (ys.sum(2).unwrap() + ss).unwrap()
        });
        assert_eq!(stats[2].recomputed, 0);
    }
}

#[test]
fn low_precision_compensated_sums_and_checkpoint_plans_have_the_same_gradients_with_kept_graphs() {
    let vars = VarMap::new();
    let precisions = [
        (Precision::f16(), Checkpoint::States(2)),
        (Precision::bf16(), Checkpoint::Every(3)),
        (Precision::f32().compensated(), Checkpoint::All),
        (Precision::f64(), Checkpoint::Bytes(400)),
    ];
    for (precision, checkpoint) in precisions {
        let ode = |options| {
            NeuralOde::new(&vars, "f", &Device::Cpu, |vb| linear(4, 4, vb))
                .unwrap()
                .options(options)
        };
        ode(OdeOptions::default());
        fill(&vars);
        let y0 = var(&[5, 4], 6);
        let mut all = vec![y0.clone()];
        all.extend(vars.all_vars());
        let stats = compare(&all, |options| {
            let options = OdeOptions {
                precision: Some(precision),
                checkpoint,
                steps: Steps::Size(0.1),
                ..options
            };
            (ode(options).solve(&y0, &TIMES).unwrap() * 1e-3).unwrap()
        });
        assert!(stats[0].recomputed > 0);
        assert_eq!(stats[2].recomputed, 0);
    }
}

#[test]
fn a_perceptron_keeps_its_evaluations_where_it_is_not_solved_in_tiles() {
    let times = Var::new(&TIMES, &Device::Cpu).unwrap();
    let precisions = [
        (Precision::f32(), Activation::Silu),
        (Precision::f64(), Activation::Tanh),
        (Precision::bf16(), Activation::Relu),
        (Precision::f16(), Activation::Softplus),
    ];
    let (rows, stages) = (64, RK4.stages());
    for (precision, activation) in precisions {
        let vars = VarMap::new();
        let ode = |options| {
            NeuralOde::new(&vars, "f", &Device::Cpu, move |vb| {
                Ok(Mlp::with_time(&[4, 24, 24, 4], activation, vb)?.residual())
            })
            .unwrap()
            .options(options)
        };
        ode(OdeOptions::default());
        fill(&vars);
        let y0 = var(&[rows, 4], 6);
        // On the CPU, bf16 and f16 are rounded numbers in f32.
        let size = precision.state.size_in_bytes();
        let tensor = 384;
        let inputs = rows * (4 + 24 + 24) * size + 3 * tensor;
        let products = rows * (24 + 24) * size + 2 * tensor;
        let (time, velocity) = (size + tensor, rows * 4 * size + tensor);
        for timed in [false, true] {
            let mut all = vec![y0.clone()];
            all.extend(vars.all_vars());
            if timed {
                all.push(times.clone());
            }
            let stage = inputs + products + time + if timed { velocity } else { 0 };
            let caches = [
                ActivationCache::NONE,
                ActivationCache::within(2 * stages * stage + 1),
                ActivationCache::ALL,
            ];
            let stats = compare_with(caches, &all, |options| {
                let options = OdeOptions {
                    precision: Some(precision),
                    fusion: false,
                    ..options
                };
                match timed {
                    true => {
                        let grid = TimeGrid::from_tensor(&times).unwrap();
                        ode(options).solve(&y0, &grid).unwrap()
                    }
                    false => ode(options).solve(&y0, &TIMES).unwrap(),
                }
            });
            let steps = [0, 2, STEPS];
            let bytes: Vec<_> = stats.iter().map(|stats| stats.activation_bytes).collect();
            let expected = steps.map(|kept| kept * stages * stage);
            assert_eq!(bytes, expected, "{precision:?}");
            let again: Vec<_> = stats.iter().map(|stats| stats.recomputed).collect();
            assert_eq!(again, steps.map(|kept| (STEPS - kept) * stages));
        }
    }
}

#[test]
fn outputs_inside_steps_have_the_same_gradients_with_kept_graphs() {
    let (y0, w) = (var(&[6, 3], 13), var(&[3, 3], 14));
    let stats = compare(&[y0.clone(), w.clone()], |options| {
        let w = w.as_tensor().clone();
        let fields = [0.5, -2.0].map(|c| {
            let w = w.clone();
            move |_: &Time, y: &Tensor| y.matmul(&w)?.tanh()? * c
        });
        let field = PiecewiseConstant::new(&[0.0, 0.4, 1.0], fields.to_vec()).unwrap();
        // The second step has outputs inside and more stages than the first.
        let options = OdeOptions {
            method: DOPRI5,
            steps: Steps::At(vec![0.0, 0.1, 0.6, 0.9]),
            ..options
        };
        odeint(field, &y0, &TIMES, &options).unwrap()
    });
    assert!(stats[0].recomputed > 0);
    assert_eq!(stats[2].recomputed, 0);
}

#[test]
fn a_budget_below_the_parameters_holds_graphs_because_these_are_not_counted() {
    // 64 kB of weights; of a step less than 4 kB for each stage.
    let (y0, w) = (var(&[1, 128], 15), var(&[128, 128], 16));
    let recorder = Recorder::default();
    let options = options(ActivationCache::within(60_000), &recorder);
    let w = w.as_tensor().clone();
    let f = move |_: &Time, y: &Tensor| y.matmul(&w.t()?)?.tanh();
    odeint(f, &y0, &TIMES, &options).unwrap();
    let bytes = recorder.take().activation_bytes;
    assert!((1..60_000).contains(&bytes), "{bytes}");
}

/// y' = −y whose graph does not say so, with a list of parameters that says that nothing is to be looked for.
#[derive(Clone)]
struct Cut;

impl VectorField for Cut {
    fn velocity(&self, _: &Time, y: &Tensor) -> Result<Tensor> {
        y.detach().neg()
    }

    fn is_traced(&self) -> bool {
        true
    }

    fn parameters(&self) -> Option<Vec<Tensor>> {
        Some(vec![])
    }
}

#[test]
fn a_graph_that_does_not_reach_the_state_is_an_error_with_a_cache_too() {
    let y0 = var(&[3], 17);
    for cache in caches() {
        let options = options(cache, &Recorder::default());
        let solved = odeint(Cut, &y0, &TIMES, &options);
        let error = solved
            .and_then(|ys| Ok(ys.sum_all()?.backward()?))
            .unwrap_err();
        assert!(
            matches!(error, Error::UntrackedVelocity { .. }),
            "{error:?}"
        );
    }
}

#[test]
fn a_graph_field_keeps_its_evaluations_with_the_same_gradients() {
    let vars = VarMap::new();
    let ring = Csr::normalised_adjacency(
        5,
        &[[0, 1], [1, 2], [2, 3], [3, 4]],
        DType::F32,
        &Device::Cpu,
    );
    let ring = ring.unwrap();
    let ode = |options| {
        let ring = ring.clone();
        NeuralOde::from_field(&vars, "f", DType::F32, &Device::Cpu, move |vb| {
            GcnField::new(&[4, 8, 4], Activation::Softplus, &ring, vb)
        })
        .unwrap()
        .options(options)
    };
    ode(OdeOptions::default());
    fill(&vars);
    let y0 = var(&[5, 4], 7);
    let mut all = vec![y0.clone()];
    all.extend(vars.all_vars());
    let stats = compare(&all, |options| ode(options).solve(&y0, &TIMES).unwrap());
    assert_eq!(stats[2].recomputed, 0);
    assert!(stats[2].activation_bytes > 0);
}

/// y' = y with a pull-back by hand.
#[derive(Clone)]
struct Own;

impl VectorField for Own {
    fn velocity(&self, _: &Time, y: &Tensor) -> Result<Tensor> {
        Ok(y.clone())
    }

    fn vjp<'f>(&'f self, _: &Time, y: &Tensor) -> Result<(Tensor, Pullback<'f, Tensor>)> {
        let pull = |v: &Tensor| Ok(Cotangents::of_state(v.clone()));
        Ok((y.detach(), Box::new(pull)))
    }
}

#[test]
fn a_field_with_a_pull_back_of_its_own_is_not_recorded() {
    let y0 = var(&[4], 8);
    let stats = compare(std::slice::from_ref(&y0), |options| {
        odeint(Own, &y0, &TIMES, &options).unwrap()
    });
    assert_eq!(stats[2].activation_bytes, 0);
    assert_eq!(stats[2].recomputed, stats[0].recomputed);
}

#[test]
fn parameters_that_are_written_after_the_solve_are_an_error_with_kept_graphs_too() {
    let (y0, w) = (var(&[3], 9), var(&[3], 10));
    let factor = w.as_tensor().clone();
    let f = move |_: &Time, y: &Tensor| y * &factor;
    let options = options(ActivationCache::ALL, &Recorder::default());
    let ys = odeint(f, &y0, &TIMES, &options).unwrap();
    w.set(&(w.as_tensor() * 2.0).unwrap()).unwrap();
    let error = ys.sum_all().unwrap().backward().unwrap_err();
    assert!(matches!(Error::from(error), Error::ParametersChanged));
}

#[test]
fn a_second_backward_pass_reads_the_same_graphs() {
    let (y0, c) = (var(&[3, 2], 11), var(&[3, 2], 12));
    let f = |_: &Time, y: &Tensor, c: &Tensor| (y * c)?.sin();
    let options = options(ActivationCache::ALL, &Recorder::default());
    let ys = odeint_with(f, &y0, &c.as_tensor().clone(), &TIMES, &options).unwrap();
    let grads = |factor: f64| {
        let loss = (ys.sum_all().unwrap() * factor).unwrap();
        let grads = loss.backward().unwrap();
        [bits(grads.get(&y0).unwrap()), bits(grads.get(&c).unwrap())]
    };
    assert_eq!(grads(1.0), grads(1.0));
}
