//! Second derivatives are not supported, and say so.  candle cuts them off by itself unless it is
//! told not to by an environment variable, which each thread reads once: hence a binary of its own.
//! It asks for backtraces too, in which candle wraps its errors.
//!
//! `cargo test --test second_derivatives`, a second.

mod common;

use candle_core::{Tensor, Var};
use candle_diffeq::tableau::RK4;
use candle_diffeq::{odeint, solution, Error, Result, Time};
use common::{bits, method, scattered, var};

/// Before the first call of candle's on this thread.
fn do_not_detach() {
    std::env::set_var("CANDLE_GRAD_DO_NOT_DETACH", "1");
    std::env::set_var("RUST_BACKTRACE", "1");
}

const TIMES: [f64; 3] = [0.0, 0.5, 1.0];

/// y' = tanh(yW) over a variable.
fn field(weight: &Var) -> impl Fn(&Time, &Tensor) -> candle_core::Result<Tensor> + Send + Sync {
    let weight = weight.clone();
    move |_: &Time, y: &Tensor| y.matmul(&weight)?.tanh()
}

/// The variables y0 and W, and the states.
fn solved() -> ([Var; 2], Tensor) {
    let (y0, w) = (var(&[3, 2], 1.0, 1), var(&[2, 2], 1.0, 2));
    let ys = odeint(field(&w), y0.as_tensor(), &TIMES, &method(&RK4, 2)).unwrap();
    ([y0, w], ys)
}

fn trained(loss: &Tensor) -> Result<()> {
    loss.backward()?;
    Ok(())
}

#[test]
fn a_tracked_cotangent_is_refused_through_candle() {
    do_not_detach();
    let (vars, ys) = solved();
    let before = vars.each_ref().map(|v| bits(v));
    // The gradient of a square, 2 ys, depends on ys.
    let loss = ys.sqr().unwrap().sum_all().unwrap();
    let error = loss.backward().unwrap_err();
    assert!(
        matches!(Error::from_candle(&error), Some(Error::TrackedCotangent)),
        "{error}"
    );
    assert!(matches!(trained(&loss), Err(Error::TrackedCotangent)));
    assert_eq!(vars.each_ref().map(|v| bits(v)), before);
}

#[test]
fn a_cotangent_that_carries_nothing_is_pulled_back_as_ever_and_without_history() {
    do_not_detach();
    let (vars, ys) = solved();
    let weights = scattered(ys.dims(), 1.0, 3);
    let got = (&ys * &weights)
        .unwrap()
        .sum_all()
        .unwrap()
        .backward()
        .unwrap();
    // Without a graph around it, the cotangent is what the caller gives.
    let field = field(&vars[1]);
    let solution = solution(&field, vars[0].as_tensor(), &TIMES, &method(&RK4, 2)).unwrap();
    let grads = solution.vjp(&weights).unwrap();
    let expected = [grads.y0, grads.params.get(&vars[1]).unwrap().clone()];
    for (var, expected) in vars.iter().zip(expected) {
        let grad = got.get(var).unwrap();
        assert!(!grad.track_op());
        assert_eq!(bits(grad), bits(&expected));
    }
}

#[test]
fn errors_inside_backward_are_found_behind_backtraces() {
    do_not_detach();
    let (_, ys) = solved();
    let loss = (ys * f64::NAN).unwrap().sum_all().unwrap();
    let error = loss.backward().unwrap_err().context("while training").bt();
    assert!(matches!(error, candle_core::Error::WithBacktrace { .. }));
    assert!(matches!(
        Error::from_candle(&error),
        Some(Error::NonFiniteCotangent)
    ));
    assert!(matches!(Error::from(error), Error::NonFiniteCotangent));
}
