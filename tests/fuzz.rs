//! That the fuzz can fail: a reference that is broken on purpose is found out, and the case shrunk.
//!
//! `cargo test --release --test fuzz`, seconds.

#![allow(dead_code)] // what only the command needs

#[path = "../src/every_core.rs"]
mod every_core;

#[path = "../examples/fuzz/bad/mod.rs"]
mod bad;
#[path = "../examples/fuzz/ball.rs"]
mod ball;
#[path = "../examples/fuzz/case.rs"]
mod case;
#[path = "../examples/fuzz/check.rs"]
mod check;
#[path = "../examples/fuzz/curve.rs"]
mod curve;
#[path = "../examples/fuzz/draw.rs"]
mod draw;
#[path = "../examples/fuzz/fields.rs"]
mod fields;
#[path = "../examples/fuzz/fuzz.rs"]
mod fuzz;
#[path = "../examples/fuzz/problem.rs"]
mod problem;
#[path = "../examples/fuzz/program.rs"]
mod program;
#[path = "../examples/fuzz/reference.rs"]
mod reference;
#[path = "../examples/fuzz/shrink.rs"]
mod shrink;
#[path = "../examples/fuzz/still.rs"]
mod still;
#[path = "../examples/fuzz/subject.rs"]
mod subject;
#[path = "../examples/fuzz/tape.rs"]
mod tape;

use ball::Dt;
use case::Cut;
use check::{Kind, Pools, Sabotage, Verdict};
use program::{Op, Program};
use tape::Arithmetic;

#[test]
fn a_broken_weight_of_a_method_is_found_and_shrunk_to_one_step_of_one_row() {
    let pools = Pools::new().unwrap();
    let (_, _, (smaller, failure)) = fuzz::found(Sabotage::Weight, &pools).unwrap();
    assert!(!matches!(failure.kind, Kind::Panic | Kind::Error));
    assert_eq!((smaller.rows, smaller.grid.fractions.len()), (1, 2));
    assert_eq!(smaller.steps, Cut::PerInterval(1));
}

#[test]
fn a_gradient_that_is_off_by_a_percent_is_found_and_shrunk() {
    let pools = Pools::new().unwrap();
    let (_, _, (smaller, failure)) = fuzz::found(Sabotage::Gradient, &pools).unwrap();
    assert_eq!(failure.kind, Kind::ParameterGradient);
    assert_eq!(smaller.rows, 1);
}

#[test]
fn a_case_follows_from_its_seed() {
    let pools = Pools::new().unwrap();
    for seed in 0..40 {
        let case = || format!("{:?}", draw::case(seed));
        assert_eq!(case(), case());
        let run = || match check::run(&draw::case(seed), &pools, Sabotage::None) {
            Verdict::Agrees { sharpness } => format!("{sharpness:e}"),
            Verdict::OutOfRange => "out of range".to_owned(),
            Verdict::Fails(failure) => failure.text,
        };
        assert_eq!(run(), run());
    }
}

#[test]
fn roundings_are_to_nearest_even_with_the_range_of_the_dtype() {
    for (dt, x, rounded) in [
        (Dt::F16, 2049.0, 2048.0),
        (Dt::F16, 2051.0, 2052.0),
        (Dt::F16, 65519.0, 65504.0),
        (Dt::F16, 65520.0, f64::INFINITY),
        (Dt::F16, 2f64.powi(-25), 0.0),
        (Dt::F16, 3.0 * 2f64.powi(-25), 2f64.powi(-23)),
        (Dt::Bf16, 257.0, 256.0),
        // Just above a tie: bits that f32 does not hold decide.
        (Dt::Bf16, 257.0 + 2f64.powi(-40), 258.0),
        (Dt::F32, 1.0 + 2f64.powi(-24), 1.0),
    ] {
        assert_eq!(dt.round(x), rounded, "{dt:?} {x}");
        assert_eq!(dt.round(-x), -rounded);
    }
    for bits in (0..0x7c00u16).step_by(7) {
        let x = half::f16::from_bits(bits).to_f64();
        assert_eq!(Dt::F16.round(x), x);
    }
}

/// Pull-backs of the reference are the derivatives of its velocities.
#[test]
fn the_reference_pulls_back_what_differences_see() {
    let of = Arithmetic {
        unit: 0.0,
        time: 0.0,
        kept: 0.0,
        terms: 1.0,
    };
    let mut seen = std::collections::HashSet::new();
    for seed in 0..400 {
        let mut case = draw::case(seed);
        case.rows = case.rows.min(3);
        let case = case.fitted();
        let Ok(p) = problem::Problem::new(&case) else {
            continue;
        };
        let kinked = |op: &Op| {
            matches!(
                op,
                Op::Act {
                    activation: candle_diffeq::nn::Activation::Relu,
                    ..
                }
            )
        };
        if p.program.ops.iter().any(kinked) || p.program.cost() > 20_000 {
            continue;
        }
        let program = &p.program;
        seen.extend(program.ops.iter().map(std::mem::discriminant));
        let value = |t: f64, y: &[ball::Balls], params: &[ball::Balls]| -> f64 {
            let all = program.run(of, t, y, params);
            let outputs = program.outputs.iter().zip(&p.cotangents[0]);
            let dot = |(&o, v): (&usize, &ball::Balls)| -> f64 {
                all[o].x.iter().zip(&v.x).map(|(k, v)| k * v).sum()
            };
            outputs.map(dot).sum()
        };
        let t = 0.37;
        let all = program.run(of, t, &p.y0, &p.params);
        let pulled = program.pull(of, &all, &p.params, &p.cotangents[0]);
        let h = 1e-5;
        let along = |x: &[ball::Balls], by: f64| -> Vec<ball::Balls> {
            let mut x = x.to_vec();
            for (n, x) in x.iter_mut().flat_map(|x| &mut x.x).enumerate() {
                *x += by * direction(n);
            }
            x
        };
        let dot = |x: &[ball::Balls]| -> f64 {
            let all = x.iter().flat_map(|x| &x.x).enumerate();
            all.map(|(n, x)| x * direction(n)).sum()
        };
        let size =
            |x: &[ball::Balls]| -> f64 { x.iter().flat_map(|x| &x.x).map(|x| x.abs()).sum() };
        let difference = |plus: f64, minus: f64| (plus - minus) / (2.0 * h);
        let y = difference(
            value(t, &along(&p.y0, h), &p.params),
            value(t, &along(&p.y0, -h), &p.params),
        );
        let theta = difference(
            value(t, &p.y0, &along(&p.params, h)),
            value(t, &p.y0, &along(&p.params, -h)),
        );
        let time = difference(
            value(t + h, &p.y0, &p.params),
            value(t - h, &p.y0, &p.params),
        );
        for (what, got, exact, size) in [
            ("state", dot(&pulled.state), y, size(&pulled.state)),
            (
                "parameters",
                dot(&pulled.params),
                theta,
                size(&pulled.params),
            ),
            ("time", pulled.time.0, time, pulled.time.0.abs()),
        ] {
            // Third derivatives, which group norms over a few numbers have large ones of, and cancellation.
            let near = 1e-4 * size + 1e-6 * p.case.cotangent_scale;
            assert!(
                (got - exact).abs() <= near,
                "seed {seed}, {what}: {got:e}, {exact:e}"
            );
        }
    }
    assert_eq!(
        seen.len(),
        every_op().ops.len(),
        "operations that no case has"
    );
}

/// A direction of many components, none small.
fn direction(n: usize) -> f64 {
    let angle = 12.9898 * (n + 1) as f64;
    angle.sin().signum() * (0.5 + angle.cos().abs())
}

/// One operation of each kind.
fn every_op() -> Program {
    let ops = vec![
        Op::State(0),
        Op::Param(0),
        Op::Time,
        Op::Column { p: 0, j: 0 },
        Op::Affine {
            x: 0,
            w: 0,
            b: None,
        },
        Op::Act {
            x: 0,
            activation: Default::default(),
            order: 0,
        },
        Op::Add(0, 0),
        Op::Mul(0, 0),
        Op::Scale(0, 1.0),
        Op::SumCols(0),
        Op::MeanRows(0),
        Op::Concat(0, 0),
        Op::Slice {
            x: 0,
            from: 0,
            n: 1,
        },
        Op::Conv {
            x: 0,
            w: 0,
            b: 0,
            image: program::Image {
                inputs: 1,
                outputs: 1,
                size: 1,
                height: 1,
                width: 1,
            },
        },
        Op::GroupMean { x: 0, groups: 1 },
        Op::Spread { x: 0, times: 1 },
        Op::RSqrt { x: 0, epsilon: 1.0 },
    ];
    Program {
        ops,
        ..Default::default()
    }
}
