//! Memory of solves of many steps.  The only test of its binary, because what it reads is the memory of the whole process.
//!
//! `cargo test --release --test memory`, seconds.

mod common;

use std::process::Command;

use ::common::memory;
use candle_core::{DType, Device, Tensor, Var};
use candle_diffeq::cde::{cdeint, Observations};
use candle_diffeq::fields::FieldCheck;
use candle_diffeq::metrics::Recorder;
use candle_diffeq::nn::{Activation, CdeMlp, Mlp};
use candle_diffeq::options::{
    Adaptive, AdjointNorm, AdjointSolve, Checkpoint, Gradient, Output, Steps,
};
use candle_diffeq::sde::{ito, sdeint, Noise, SdeOptions};
use candle_diffeq::tableau::DOPRI5;
use candle_diffeq::{odeint, OdeOptions, Time};
use candle_nn::{VarBuilder, VarMap};
use common::relative;

#[test]
fn a_backsolve_keeps_no_step_and_a_stochastic_solve_what_an_ordinary_one_does() {
    if let Ok(cell) = std::env::var("CANDLE_DIFFEQ_MEMORY_CELL") {
        return measure(&cell);
    }
    a_backsolve_keeps_no_step();
    gradients_that_are_formed_later_keep_what_layers_read_and_their_cotangents();
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

/// For every stage of an attempt, until the step is accepted: two numbers for a row and a unit of a hidden layer, one for
/// a unit of the first input and of the last output.  Gradients that are formed at once, for a norm that reads them, keep
/// neither.
fn gradients_that_are_formed_later_keep_what_layers_read_and_their_cotangents() {
    let numbers = |widths: &[usize]| -> usize { widths.windows(2).map(|w| w[0] + w[1]).sum() };
    for (field, widths) in [
        ("Mlp", &[8, 64, 64, 8][..]),
        ("CdeMlp", &[8, 32, 8 * CHANNELS]),
    ] {
        // In f32.  What is evaluated now is held in both, with its own stage; six others wait beside it.
        let waiting = (6 * ROWS * 4 * numbers(widths)) as f64;
        let held = ["at once", "later"].map(|when| in_a_process(&format!("{field} {when}")));
        println!("{field}: {held:?} bytes, {waiting} of six stages");
        let [Some(at_once), Some(later)] = held else {
            return;
        };
        let ratio = (later - at_once) / waiting;
        assert!((0.75..=1.25).contains(&ratio), "{field}: {ratio:.2}");
    }
}

const ROWS: usize = 1 << 14;
const CHANNELS: usize = 8;

/// What one solve held beyond what the process held before it, and nobody has freed anything before; `None` where the
/// system does not tell.
fn in_a_process(cell: &str) -> Option<f64> {
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--nocapture"])
        .env("CANDLE_DIFFEQ_MEMORY_CELL", cell)
        .output()
        .unwrap();
    assert!(output.status.success(), "{output:?}");
    let text = String::from_utf8(output.stdout).unwrap();
    let bytes = text.lines().find_map(|line| line.strip_prefix("bytes: "));
    match bytes.unwrap() {
        "unknown" => None,
        bytes => Some(bytes.parse().unwrap()),
    }
}

/// One step of seven stages, there and back.
fn measure(cell: &str) {
    let vars = VarMap::new();
    let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
    let mlp = Mlp::new(&[8, 64, 64, 8], Activation::Tanh, vb.pp("f")).unwrap();
    let cde = CdeMlp::new(&[8, 32], CHANNELS, Activation::Tanh, vb.pp("g")).unwrap();
    let norm = match cell.ends_with("later") {
        true => AdjointNorm::Seminorm,
        false => AdjointNorm::Largest,
    };
    let options = OdeOptions {
        method: DOPRI5,
        steps: Steps::Adaptive(Adaptive::new(1.0, 1.0).first_step(1.0)),
        output: Output::Final,
        gradient: Gradient::Backsolve(AdjointSolve::new().norm(norm)),
        fusion: false,
        check: FieldCheck::Never,
        ..Default::default()
    };
    let before = memory::resident();
    let y0 = Tensor::ones((ROWS, 8), DType::F32, &Device::Cpu).unwrap();
    let y = match cell.starts_with("Mlp") {
        true => odeint(mlp, &y0, &[0.0, 1.0], &options),
        false => {
            let xs = Tensor::ones((ROWS, 2, CHANNELS), DType::F32, &Device::Cpu).unwrap();
            let path = Observations::new(&xs).unwrap().linear().unwrap();
            cdeint(cde, &y0, &path, path.knots(), &options)
        }
    };
    y.unwrap().sum_all().unwrap().backward().unwrap();
    match (before, memory::peak()) {
        (Some(before), Some(most)) => println!("\nbytes: {}", most.saturating_sub(before)),
        _ => println!("\nbytes: unknown"),
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
