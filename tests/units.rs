//! `CANDLE_DIFFEQ_SIMD` caps the vector unit.  It is read once a process, so each sentence runs in one
//! of its own: this binary, called for one of the tests that are ignored.
//!
//! `cargo test --test units`, a second.

mod common;

use std::process::{Command, Output};

use candle_core::{DType, Device, Module, Tensor};
use candle_diffeq::nn::{Activation, Cnf, Linear, Mlp};
use candle_diffeq::{odeint, Error, NeuralOde, OdeOptions, Time};
use candle_nn::{VarBuilder, VarMap};
use common::{bits, fill, scattered};

const VARIABLE: &str = "CANDLE_DIFFEQ_SIMD";

/// Runs one of the ignored tests under a value of the variable.
fn run(test: &str, value: Option<&str>) -> Output {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args([test, "--exact", "--ignored", "--nocapture"]);
    match value {
        Some(value) => command.env(VARIABLE, value),
        None => command.env_remove(VARIABLE),
    };
    command.output().unwrap()
}

/// The same, of a test that must pass; the line that it prints after a colon.
#[track_caller]
fn printed(test: &str, value: Option<&str>) -> String {
    let output = run(test, value);
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{value:?}: {text}");
    assert!(text.contains("1 passed"), "{text}");
    let line = text.lines().find_map(|line| line.split_once("printed: "));
    line.expect("a line").1.to_owned()
}

/// A perceptron's states and gradients, solved tile by tile where there is a unit.
fn answers(fusion: bool) -> Vec<u64> {
    let vars = VarMap::new();
    let ode = NeuralOde::new(&vars, "", &Device::Cpu, |vb| {
        Mlp::new(&[3, 40, 17, 3], Activation::Tanh, vb)
    });
    fill(&vars);
    let ode = ode.unwrap().options(OdeOptions {
        fusion,
        ..Default::default()
    });
    let y0 = scattered(&[37, 3], 1.0, 1).to_dtype(DType::F32).unwrap();
    let ys = ode.solve(&y0, &[0.0, 0.5, 1.0]).unwrap();
    let grads = ys.sqr().and_then(|y| y.sum_all()?.backward()).unwrap();
    let vars = common::all(&vars);
    let gradients = vars.iter().flat_map(|(_, v)| bits(grads.get(v).unwrap()));
    bits(&ys).into_iter().chain(gradients).collect()
}

/// One number for many.
fn digest(numbers: &[u64]) -> u64 {
    let step = |hash: u64, x: &u64| (hash ^ x).wrapping_mul(0x0000_0100_0000_01b3);
    numbers.iter().fold(0xcbf2_9ce4_8422_2325, step)
}

#[test]
#[ignore = "run by the other tests in a process of its own"]
fn child_solves_with_fusion_and_without() {
    let (fused, general) = (digest(&answers(true)), digest(&answers(false)));
    println!("\nprinted: {fused:x} {general:x}");
}

#[test]
#[ignore = "run by the other tests in a process of its own"]
fn child_meets_the_error() {
    let x = scattered(&[4, 3], 1.0, 1).to_dtype(DType::F32).unwrap();
    let given = |error: &Error| match error {
        Error::UnknownVectorUnit { given } => given.clone(),
        other => panic!("{other:?}"),
    };
    let of_candle = |error: candle_core::Error| given(Error::from_candle(&error).unwrap());
    // A closure that computes with candle alone, a perceptron, a flow.
    let decay = |_: &Time, y: &Tensor| y.neg();
    let error = odeint(decay, &x, &[0.0, 1.0], &OdeOptions::default());
    let word = given(&error.unwrap_err());
    let vb = VarBuilder::zeros(DType::F32, &Device::Cpu);
    let mlp = Mlp::new(&[3, 8, 3], Activation::Tanh, vb.clone()).unwrap();
    let error = odeint(mlp.clone(), &x, &[0.0, 1.0], &OdeOptions::default());
    assert_eq!(given(&error.unwrap_err()), word);
    let l = Tensor::zeros((4, 1), DType::F32, &Device::Cpu).unwrap();
    let flow = Cnf::new(mlp.clone()).unwrap();
    let error = odeint(flow, &(x.clone(), l), &[0.0, 1.0], &OdeOptions::default());
    assert_eq!(given(&error.err().unwrap()), word);
    // What computes without a solve.
    assert_eq!(of_candle(Activation::Tanh.forward(&x).unwrap_err()), word);
    assert_eq!(of_candle(mlp.forward(&x).unwrap_err()), word);
    let layer = Linear::new(3, 2, vb.pp("layer")).unwrap();
    assert_eq!(of_candle(layer.forward(&x).unwrap_err()), word);
    println!("\nprinted: {}", Error::UnknownVectorUnit { given: word });
}

#[test]
fn an_unknown_word_is_an_error_of_every_solve_and_of_every_layer() {
    for word in ["AVX2", "sse", "avx-512", " none"] {
        let text = printed("child_meets_the_error", Some(word));
        assert!(text.contains(&format!("{word:?}")), "{text}");
        assert!(text.contains("avx512, avx2 or none"), "{text}");
    }
}

#[test]
fn without_a_unit_fields_of_tiles_are_solved_on_the_general_path() {
    let text = printed("child_solves_with_fusion_and_without", Some("none"));
    let (fused, general) = text.split_once(' ').unwrap();
    assert_eq!(fused, general);
}

#[test]
fn the_best_unit_is_the_one_without_a_wish() {
    let of = |value| printed("child_solves_with_fusion_and_without", value);
    let best = of(None);
    assert_eq!(of(Some("avx512")), best);
    assert_eq!(of(Some("")), best);
}

#[test]
fn avx2_is_another_unit_where_there_are_both() {
    #[cfg(target_arch = "x86_64")]
    if std::is_x86_feature_detected!("avx512f") {
        let of = |value| printed("child_solves_with_fusion_and_without", value);
        // Sums over other lanes: other bits.
        assert_ne!(of(Some("avx2")), of(None));
    }
}
