//! Solves of which no gradient is wanted keep nothing, and what a newcomer writes compiles.

mod common;

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::Arc;

use candle_core::{DType, Device, IndexOp, Module, Tensor, Var};
use candle_diffeq::metrics::Recorder;
use candle_diffeq::nn::{Activation, Mlp};
use candle_diffeq::options::{Output, Steps};
use candle_diffeq::{odeint, predict, Error, NeuralOde, OdeOptions, Time};
use candle_nn::{linear, seq, VarBuilder, VarMap};
use common::{bits, scattered, var};

fn recorded(output: Output) -> (Recorder, OdeOptions) {
    let recorder = Recorder::default();
    let options = OdeOptions {
        steps: Steps::PerInterval(200),
        recorder: Some(recorder.clone()),
        output,
        ..Default::default()
    };
    (recorder, options)
}

#[test]
fn where_nothing_is_tracked_nothing_is_kept() {
    let y0 = scattered(&[4, 3], 1.0, 1);
    let (recorder, options) = recorded(Output::Final);
    odeint(|_: &Time, y: &Tensor| y.neg(), &y0, &[0.0, 1.0], &options).unwrap();
    assert_eq!(recorder.stats().bytes_kept, 0);
    // Tile by tile, too.
    let weights = VarBuilder::zeros(DType::F64, &Device::Cpu);
    let mlp = Mlp::new(&[3, 4, 3], Activation::Tanh, weights).unwrap();
    odeint(mlp, &y0, &[0.0, 1.0], &options).unwrap();
    assert_eq!(recorder.stats().bytes_kept, 0);
    // A variable anywhere is reason enough.
    let w = var(&[3, 3], 0.5, 2);
    let field = move |_: &Time, y: &Tensor| y.matmul(w.as_tensor());
    odeint(field, &y0, &[0.0, 1.0], &options).unwrap();
    assert_eq!(recorder.stats().bytes_kept, 200 * 4 * 3 * 8);
}

#[test]
fn a_variable_that_is_read_late_only_has_its_gradient() {
    let run = |late: bool| {
        let (w, calls) = (var(&[1], 0.5, 1), Arc::new(AtomicUsize::new(0)));
        let (rate, count) = (w.clone(), calls.clone());
        let field = move |t: &Time, y: &Tensor| {
            count.fetch_add(1, Ordering::SeqCst);
            let on = t.value() > 0.6;
            let gain = rate.as_tensor() * f64::from(u8::from(on));
            match on || !late {
                true => y.broadcast_mul(&gain?),
                false => y * 0.0,
            }
        };
        let options = OdeOptions {
            steps: Steps::PerInterval(10),
            ..Default::default()
        };
        let y0 = scattered(&[3], 1.0, 2);
        let ys = odeint(field, &y0, &[0.0, 1.0], &options).unwrap();
        let grads = ys.i(1).unwrap().sqr().unwrap().sum_all().unwrap();
        bits(grads.backward().unwrap().get(&w).unwrap())
    };
    assert_eq!(run(true), run(false));
}

#[test]
fn a_prediction_is_the_solve_without_what_is_kept() {
    for known in [false, true] {
        let (recorder, options) = recorded(Output::All);
        let vars = VarMap::new();
        let ode = match known {
            true => NeuralOde::new(&vars, "f", &Device::Cpu, |vb| {
                Mlp::new(&[2, 8, 2], Activation::Tanh, vb)
            }),
            false => NeuralOde::new(&vars, "f", &Device::Cpu, |vb| {
                Ok(seq()
                    .add(linear(2, 8, vb.pp(0))?)
                    .add(candle_nn::Activation::Silu)
                    .add(linear(8, 2, vb.pp(1))?))
            }),
        };
        let ode = ode.unwrap().options(options);
        common::scatter(&vars);
        let y0 = scattered(&[5, 2], 1.0, 1).to_dtype(DType::F32).unwrap();
        let predicted = ode.predict(&y0, &[0.0, 0.5, 1.0]).unwrap();
        assert_eq!(recorder.stats().bytes_kept, 0);
        assert!(!predicted.track_op());
        let solved = ode.solve(&y0, &[0.0, 0.5, 1.0]).unwrap();
        assert!(solved.track_op() && recorder.stats().bytes_kept > 0);
        assert_eq!(bits(&predicted), bits(&solved));
    }
    let y0 = var(&[3], 1.0, 1);
    let (recorder, options) = recorded(Output::Final);
    let y = predict(
        &|_: &Time, y: &Tensor| y.sin(),
        y0.as_tensor(),
        &[0.0, 1.0],
        &options,
    );
    assert!(!y.unwrap().track_op());
    assert_eq!(recorder.stats().bytes_kept, 0);
}

#[test]
fn a_model_that_cannot_cross_threads_is_trained_and_its_backward_pass_may() {
    let vars = VarMap::new();
    let ode = NeuralOde::new(&vars, "f", &Device::Cpu, |vb| {
        // Neither is Send.
        let boxed: Box<dyn Module> = Box::new(linear(2, 16, vb.pp(0))?);
        let rest = seq()
            .add(candle_nn::Activation::Relu)
            .add(linear(16, 2, vb.pp(1))?);
        Ok(move |y: &Tensor| rest.forward(&boxed.forward(y)?))
    })
    .unwrap();
    common::scatter(&vars);
    let y0 = scattered(&[4, 2], 1.0, 1).to_dtype(DType::F32).unwrap();
    let loss = ode.solve(&y0, &[0.0, 0.5, 1.0]).unwrap();
    let loss = loss.i(2).unwrap().sqr().unwrap().sum_all().unwrap();
    let here = loss.backward().unwrap();
    let there = std::thread::spawn(move || loss.backward().unwrap())
        .join()
        .unwrap();
    for var in vars.all_vars() {
        assert_eq!(
            bits(here.get(&var).unwrap()),
            bits(there.get(&var).unwrap())
        );
    }
}

#[test]
fn a_constructor_that_panics_leaves_no_variable() {
    let vars = VarMap::new();
    let attempt = std::panic::catch_unwind(|| {
        NeuralOde::new(&vars, "f", &Device::Cpu, |vb| {
            let l = linear(2, 2, vb)?;
            assert!(l.weight().dim(0)? == 3, "on purpose");
            Ok(l)
        })
    });
    assert!(attempt.is_err());
    assert!(vars.all_vars().is_empty());
}

#[test]
fn a_parameter_that_is_nan_was_not_written() {
    let w = Var::new(&[f64::NAN, 2.0], &Device::Cpu).unwrap();
    let captured = w.clone();
    // NaN times nothing: the element is read and its velocity is finite.
    let field = move |_: &Time, y: &Tensor| y.broadcast_mul(&captured.i(1)?);
    let y0 = var(&[3], 1.0, 1);
    let ys = odeint(field, y0.as_tensor(), &[0.0, 1.0], &OdeOptions::default()).unwrap();
    let backward = ys.sum_all().unwrap().backward();
    assert!(backward.is_ok(), "{:?}", backward.err());
}

#[test]
fn a_parameter_that_changed_by_one_roundoff_of_its_own_dtype_was_written() {
    // The state is f32, in which the change cannot be seen.
    let w = Var::new(1f64, &Device::Cpu).unwrap();
    let captured = w.clone();
    let field = move |_: &Time, y: &Tensor| y.broadcast_mul(&captured.to_dtype(y.dtype())?);
    let y0 = Var::new(&[1f32], &Device::Cpu).unwrap();
    let ys = odeint(field, y0.as_tensor(), &[0.0, 1.0], &OdeOptions::default()).unwrap();
    w.set(&Tensor::new(1.0 + f64::EPSILON, &Device::Cpu).unwrap())
        .unwrap();
    let error: Error = ys.sum_all().unwrap().backward().unwrap_err().into();
    assert!(matches!(error, Error::ParametersChanged));
}
