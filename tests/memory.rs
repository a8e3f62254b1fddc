//! Memory of solves of many steps.  The only test of its binary, because what it reads is the memory of the whole process.
//!
//! `cargo test --release --test memory`, seconds.

mod common;
#[allow(dead_code)] // The examples use more of it.
#[path = "../examples/common/memory.rs"]
mod memory;

use candle_core::{DType, Device, Tensor, Var};
use candle_diffeq::metrics::Recorder;
use candle_diffeq::options::{AdjointSolve, Checkpoint, Gradient, Output, Steps};
use candle_diffeq::sde::{ito, sdeint, Noise, SdeOptions};
use candle_diffeq::{odeint, OdeOptions, Time};
use common::relative;

#[test]
fn a_backsolve_keeps_no_step_and_a_stochastic_solve_what_an_ordinary_one_does() {
    a_backsolve_keeps_no_step();
    a_stochastic_solve_keeps_what_an_ordinary_one_does_and_no_noise();
}

/// First, for the most that was ever held is not told apart later.
fn a_backsolve_keeps_no_step() {
    let y0 = Var::ones((64, 16), DType::F64, &Device::Cpu).unwrap();
    let run = |steps| {
        let options = OdeOptions {
            method: candle_diffeq::tableau::EULER,
            steps: Steps::PerInterval(steps),
            output: Output::Final,
            gradient: Gradient::Backsolve(AdjointSolve::new()),
            ..Default::default()
        };
        let y = odeint(
            |_: &Time, y: &Tensor| y * -0.5,
            y0.as_tensor(),
            &[0.0, 1.0],
            &options,
        );
        let grads = y.unwrap().sum_all().unwrap().backward().unwrap();
        let exact = (1.0 - 0.5 / steps as f64).powi(steps as i32);
        let exact = Tensor::full(exact, (64, 16), &Device::Cpu).unwrap();
        assert!(relative(grads.get(&y0).unwrap(), &exact) <= steps as f64 * common::U_F64);
    };
    run(10);
    let before = memory::resident();
    run(20_000);
    // All of the states would be 164 MB.
    if let (Some(before), Some(most)) = (before, memory::peak()) {
        let more = most.saturating_sub(before);
        assert!(more < 16_000_000, "{before} bytes, then {most}");
    }
}

fn a_stochastic_solve_keeps_what_an_ordinary_one_does_and_no_noise() {
    const STEPS: usize = 100_000;
    let plan = Checkpoint::Every(316);
    let y0 = Var::ones((64, 4), DType::F64, &Device::Cpu).unwrap();
    let (of_sde, of_ode) = (Recorder::default(), Recorder::default());
    let before = memory::resident();
    let ys = sdeint(
        ito(
            |_: &Time, y: &Tensor| y * -0.5,
            |_: &Time, y: &Tensor| y * 0.1,
        ),
        y0.as_tensor(),
        &[0.0, 1.0],
        &Noise::seeded(2),
        &SdeOptions {
            steps: Steps::PerInterval(STEPS),
            checkpoint: plan,
            output: Output::Final,
            recorder: Some(of_sde.clone()),
            ..Default::default()
        },
    )
    .unwrap();
    let grads = ys.sum_all().unwrap().backward().unwrap();
    let most = memory::peak();
    // The equation is linear: y(1) is y0 times its derivative.
    let error = relative(&ys, grads.get(&y0).unwrap());
    assert!(error <= STEPS as f64 * common::U_F64, "{error:e}");
    let y = odeint(
        |_: &Time, y: &Tensor| y * -0.5,
        y0.as_tensor(),
        &[0.0, 1.0],
        &OdeOptions {
            method: candle_diffeq::tableau::EULER,
            steps: Steps::PerInterval(STEPS),
            checkpoint: plan,
            output: Output::Final,
            recorder: Some(of_ode.clone()),
            ..Default::default()
        },
    )
    .unwrap();
    y.sum_all().unwrap().backward().unwrap();
    let (sde, ode) = (of_sde.stats(), of_ode.stats());
    assert_eq!(
        (sde.states_kept, sde.bytes_kept),
        (ode.states_kept, ode.bytes_kept)
    );
    // All of the noise would be 205 MB.
    if let (Some(before), Some(most)) = (before, most) {
        let more = most.saturating_sub(before);
        println!("{} kB more at the peak", more / 1024);
        assert!(more < 50_000_000, "{before} bytes, then {most}");
    }
}
