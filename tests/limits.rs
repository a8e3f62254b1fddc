//! What is at the edge: solves that do not fit, batches without a row, steps that time cannot tell
//! apart, step sizes at the ends of the range of numbers, and what the statistics count.
//!
//! `cargo test --release --test limits`, a second.

mod common;

use candle_core::{DType, Device, IndexOp, Tensor, Var};
use candle_diffeq::nn::{Activation, Cnf, ConvField, Mlp};
use candle_diffeq::{
    odeint, solve, ActivationCache, Checkpoint, Error, NeuralOde, OdeOptions, Output, Precision,
    Recorder, RowLoss, Stats, Steps, Time, TimeGrid, EULER, RK4,
};
use candle_nn::{VarBuilder, VarMap};
use common::{all, fill, scattered, values};

/// A perceptron of two features.
fn perceptron(vars: &VarMap) -> NeuralOde {
    let build = |vb: VarBuilder<'_>| Mlp::new(&[2, 16, 2], Activation::Tanh, vb);
    let ode = NeuralOde::new(vars, "f", &Device::Cpu, build).unwrap();
    fill(vars);
    ode
}

fn rows(n: usize) -> Tensor {
    scattered(&[n, 2], 0.8, n).to_dtype(DType::F32).unwrap()
}

fn in_steps(steps: usize) -> OdeOptions {
    OdeOptions {
        steps: Steps::PerInterval(steps),
        ..Default::default()
    }
}

fn decay(_: &Time, y: &Tensor) -> candle_core::Result<Tensor> {
    y.neg()
}

#[test]
fn a_plan_that_cannot_fit_is_refused_before_the_first_step() {
    let many = 1 << 34;
    let plans = [
        Checkpoint::All,
        Checkpoint::Every(1),
        Checkpoint::Every(usize::MAX),
        Checkpoint::States(usize::MAX),
        Checkpoint::Bytes(usize::MAX),
    ];
    for checkpoint in plans {
        for fusion in [true, false] {
            let options = OdeOptions {
                checkpoint,
                fusion,
                ..in_steps(many)
            };
            let vars = VarMap::new();
            let ode = perceptron(&vars).options(options.clone());
            let refused = ode.solve(&rows(40), &[0.0, 1.0]).unwrap_err();
            println!("{refused}");
            let refused = solve(&decay, &rows(40), &[0.0, 1.0], &options).err().unwrap();
            println!("{refused}");
        }
    }
}

#[test]
fn all_evaluations_of_a_solve_that_cannot_fit_are_refused() {
    let vars = VarMap::new();
    let ode = perceptron(&vars).options(OdeOptions {
        activation_cache: ActivationCache::ALL,
        checkpoint: Checkpoint::States(4),
        ..in_steps(1 << 34)
    });
    let refused = ode.solve(&rows(40), &[0.0, 1.0]).unwrap_err();
    println!("{refused}");
}

#[test]
fn a_loss_of_a_solve_that_cannot_fit_is_refused() {
    let vars = VarMap::new();
    let ode = perceptron(&vars).options(OdeOptions {
        output: Output::Final,
        ..in_steps(1 << 34)
    });
    let loss = RowLoss::MeanSquaredError(rows(40));
    let refused = ode.loss(&rows(40), &[0.0, 1.0], &loss).unwrap_err();
    println!("{refused}");
}

#[test]
fn a_loss_takes_the_budget_that_a_solve_takes() {
    for batch in [1, 3, 17, 40] {
        let vars = VarMap::new();
        for (bytes, fits) in [(batch * 8, true), (batch * 8 - 1, false)] {
            let ode = perceptron(&vars).options(OdeOptions {
                checkpoint: Checkpoint::Bytes(bytes),
                output: Output::Final,
                ..in_steps(5)
            });
            let loss = RowLoss::MeanSquaredError(rows(batch));
            let solved = ode.solve(&rows(batch), &[0.0, 1.0]);
            let graded = ode.loss(&rows(batch), &[0.0, 1.0], &loss);
            assert_eq!(solved.is_ok(), fits);
            assert!(graded.is_ok() || !fits, "{batch} rows: {:?}", graded.err());
        }
    }
}

#[test]
fn tiny_and_huge_steps_have_the_gradients_of_the_general_path() {
    for (precision, bound) in [
        (Precision::f32(), 1e-5),
        (Precision::bf16(), 2e-2),
        (Precision::f16(), 4e-3),
    ] {
        for size in [1e-42, 1e-39, 1e-36, 1e-20, 1.0, 1e20, 1e30] {
            let mut gradients = vec![];
            for fusion in [true, false] {
                let vars = VarMap::new();
                let ode = perceptron(&vars).options(OdeOptions {
                    precision: Some(precision),
                    method: EULER,
                    fusion,
                    ..Default::default()
                });
                // As f is small where t is large.
                let data = vars.data().lock().unwrap();
                for (name, var) in data.iter() {
                    if name.starts_with("f.1") || name.contains("l1") {
                        let _ = var;
                    }
                }
                drop(data);
                let y0 = Var::from_tensor(&rows(20)).unwrap();
                let ys = ode.solve(y0.as_tensor(), &[0.0, size, 2.0 * size]);
                let Ok(ys) = ys else { continue };
                let grads = ys.i(2).unwrap().sum_all().unwrap().backward();
                let grads = match grads {
                    Ok(grads) => grads,
                    Err(e) => {
                        println!("{precision:?} {size:e} fusion {fusion}: {e}");
                        continue;
                    }
                };
                let of = |var: &Var| values(grads.get(var).unwrap());
                let each: Vec<_> = all(&vars).iter().map(|(_, var)| of(var)).collect();
                gradients.push(each);
            }
            if let [fused, general] = &gradients[..] {
                for (f, g) in fused.iter().zip(general) {
                    let norm = |x: &[f64]| x.iter().map(|x| x * x).sum::<f64>().sqrt();
                    let d: Vec<_> = f.iter().zip(g).map(|(f, g)| f - g).collect();
                    println!("{:?} {size:e}: {:e} of {:e} (bound {bound:e})", precision.compute, norm(&d), norm(g));
                }
            }
        }
    }
}

#[test]
fn empty_batches() {
    for fusion in [true, false] {
        let options = OdeOptions { fusion, ..Default::default() };
        let vars = VarMap::new();
        let ode = perceptron(&vars).options(options.clone());
        let y0 = Var::zeros((0, 2), DType::F32, &Device::Cpu).unwrap();
        match ode.solve(y0.as_tensor(), &[0.0, 0.5, 1.0]) {
            Ok(ys) => println!("{:?}", ys.shape()),
            Err(e) => println!("{e}"),
        }
    }
    // What candle does.
    let cpu = &Device::Cpu;
    let y0 = Var::zeros((0, 2), DType::F32, cpu).unwrap();
    println!("mean {:?}", y0.mean_all());
    println!("mean grad {:?}", y0.sqr().unwrap().mean_all().unwrap().backward().map(|g| g.get(&y0).cloned()));
    let classes = Tensor::zeros(0, DType::U32, cpu).unwrap();
    println!("ce {:?}", candle_nn::loss::cross_entropy(y0.as_tensor(), &classes));
    let stacked = Tensor::stack(&[y0.as_tensor(), y0.as_tensor()], 0).unwrap();
    println!("stack {:?} {:?}", stacked.shape(), stacked.get(1).map(|x| x.shape().clone()));
    let w = Var::ones((2, 3), DType::F32, cpu).unwrap();
    let k = y0.matmul(&w).unwrap().tanh().unwrap();
    println!("matmul {:?}", k.backward().map(|g| (g.get(&w).cloned(), g.get(&y0).cloned())));
    let image = Var::zeros((0, 3, 5, 5), DType::F32, cpu).unwrap();
    let filter = Var::ones((4, 3, 3, 3), DType::F32, cpu).unwrap();
    let k = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| image.conv2d(&filter, 1, 1, 1, 1)));
    println!("conv {:?}", k.map(|k| k.map(|k| (k.shape().clone(), k.backward().map(|g| g.get(&filter).cloned())))));
    let k = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| image.avg_pool2d(2)));
    println!("pool {:?}", k);
    let k = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| candle_nn::ops::softmax(y0.as_tensor(), 1)));
    println!("softmax {:?}", k);
    let k = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| candle_nn::ops::softmax_last_dim(y0.as_tensor())));
    println!("softmax last {:?}", k);
}

#[test]
fn times_that_the_state_dtype_cannot_tell_apart_are_refused_where_the_field_reads_them() {
    let y0 = rows(3);
    let timed = |t: &Time, y: &Tensor| y.broadcast_mul(&t.tensor()?.cos()?);
    let times = [1e8, 1e8 + 1.0];
    let options = OdeOptions::default();
    assert!(solve(&decay, &y0, &times, &options).is_ok());
    assert!(solve(&timed, &y0, &times, &options).is_err());
    let vars = VarMap::new();
    let with_time = NeuralOde::new(&vars, "f", &Device::Cpu, |vb: VarBuilder<'_>| {
        Mlp::with_time(&[2, 16, 2], Activation::Tanh, vb)
    });
    let with_time = with_time.unwrap();
    assert!(with_time.solve(&y0, &times).is_err());
}

#[test]
fn errors_out_of_backward_are_their_own_text() {
    let y0 = Var::from_tensor(&rows(3)).unwrap();
    let options = OdeOptions { checkpoint: Checkpoint::Nothing, ..Default::default() };
    let ys = odeint(decay, y0.as_tensor(), &[0.0, 1.0], &options).unwrap();
    let error = ys.sum_all().unwrap().backward().unwrap_err();
    assert_eq!(error.to_string(), Error::NothingKept.to_string());
}

#[test]
fn statistics() {
    for precision in [Precision::f32(), Precision::f16()] {
        for checkpoint in [Checkpoint::All, Checkpoint::Every(3), Checkpoint::States(3), Checkpoint::Bytes(2000)] {
            let mut both = vec![];
            for fusion in [true, false] {
                let recorder = Recorder::default();
                let vars = VarMap::new();
                let ode = perceptron(&vars).options(OdeOptions {
                    precision: Some(precision), checkpoint, fusion, method: RK4,
                    recorder: Some(recorder.clone()), ..in_steps(10)
                });
                let y0 = Var::from_tensor(&rows(70)).unwrap();
                let ys = ode.solve(y0.as_tensor(), &[0.0, 1.0]).unwrap();
                ys.i(1).unwrap().sum_all().unwrap().backward().unwrap();
                both.push(recorder.take());
            }
            println!("{both:#?}");
            assert_eq!(both[0].vjps, both[1].vjps);
        }
    }
    let _ = (Stats::default(), TimeGrid::linspace(0.0, 1.0, 3), ActivationCache::NONE);
    let _ = |vb: VarBuilder<'_>| Cnf::new(Mlp::with_time(&[2, 16, 16, 2], Activation::Softplus, vb)?);
    let _ = |vb: VarBuilder<'_>| ConvField::new(&[3, 8, 3], 3, Activation::Relu, vb);
}
