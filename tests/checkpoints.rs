//! Memory plans: every plan sees the same numbers, keeps what it says, and replays no more than it
//! must.

#[path = "../src/every_core.rs"]
mod every_core;

use std::sync::mpsc;
use std::time::Duration;

use candle_core::{DType, Device, Tensor, Var};
use candle_diffeq::metrics::{Recorder, Stats};
use candle_diffeq::options::{Checkpoint, Output, Steps};
use candle_diffeq::tableau::EULER;
use candle_diffeq::{odeint, Error, OdeOptions, Precision, Time};
use proptest::prelude::*;

/// Bits of the gradients of y0 and w, and the counts.
fn gradients(checkpoint: Checkpoint, steps: usize, precision: Precision) -> (Vec<u64>, Stats) {
    let device = Device::Cpu;
    let y0 = Var::new(&[[0.4f64, -0.3], [1.3, 0.7], [0.1, 0.2]], &device).unwrap();
    let w = Var::new(&[[0.3f64, -1.7], [1.1, 0.2]], &device).unwrap();
    let read = w.as_tensor().clone();
    let field = move |t: &Time, y: &Tensor| {
        let k = y.matmul(&read.to_dtype(y.dtype())?)?.tanh()?;
        k.affine(1.0 + 0.5 * t.value().sin(), 0.0)
    };
    let recorder = Recorder::default();
    let options = OdeOptions {
        precision: Some(precision),
        steps: Steps::PerInterval(steps),
        checkpoint,
        recorder: Some(recorder.clone()),
        ..Default::default()
    };
    let ys = odeint(field, y0.as_tensor(), &[0.0, 0.7, 1.5], &options).unwrap();
    let loss = ys.sqr().unwrap().sum_all().unwrap();
    let bits = || {
        let grads = loss.backward().unwrap();
        let of = |v: &Var| {
            let g = grads.get(v).unwrap().flatten_all().unwrap();
            g.to_vec1::<f64>().unwrap()
        };
        let grads = [of(&y0), of(&w)].concat();
        grads.into_iter().map(f64::to_bits).collect::<Vec<_>>()
    };
    let first = bits();
    let stats = recorder.take();
    assert_eq!(bits(), first, "a second pass, {checkpoint:?}");
    let again = recorder.take();
    assert!(again.states_kept <= stats.states_kept, "{checkpoint:?}");
    (first, stats)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn every_plan_gives_bit_identical_gradients(
        steps in 1usize..20,
        k in 1usize..25,
        budget in 1usize..45,
        low in 0usize..3,
    ) {
        let precision = [
            Precision::f64(),
            Precision::f16(),
            Precision::bf16().store(DType::BF16),
        ][low];
        let (reference, all) = gradients(Checkpoint::All, steps, precision);
        prop_assert_eq!(all.states_kept, 2 * steps);
        prop_assert_eq!(all.recomputed, 4 * 2 * steps);

        let (every, stats) = gradients(Checkpoint::Every(k), steps, precision);
        prop_assert_eq!(&every, &reference);
        prop_assert_eq!(stats.states_kept, (2 * steps).div_ceil(k) + k.min(2 * steps));
        // Each step of a segment but its last is replayed once.
        prop_assert!(stats.recomputed <= 2 * all.recomputed);

        let (states, stats) = gradients(Checkpoint::States(budget), steps, precision);
        prop_assert_eq!(&states, &reference);
        prop_assert!(stats.states_kept <= budget, "{:?}", stats);
        prop_assert_eq!(stats.evaluations, all.evaluations);
        if budget >= 2 * steps {
            prop_assert_eq!(stats.recomputed, all.recomputed);
        }
    }
}

/// Steps taken by the best schedule with s states that reverses l steps, its first sweep included:
/// r·l − C(s + r, r − 1) (Griewank & Walther, prop. 1).
fn optimum(l: usize, s: usize) -> usize {
    let binomial = |n: usize, k: usize| (0..k.min(n - k)).fold(1, |c, i| c * (n - i) / (i + 1));
    let r = (1..).find(|&r| binomial(s + r, r) >= l).unwrap();
    r * l - binomial(s + r, r - 1)
}

#[test]
fn a_budget_replays_no_more_than_the_binomial_optimum() {
    for (steps, budget) in [(50, 3), (50, 7), (32, 1), (64, 12), (20, 40)] {
        let (_, stats) = gradients(Checkpoint::States(budget), steps, Precision::f64());
        let l = 2 * steps;
        let replayed = stats.recomputed / 4 - l;
        // The forward pass has taken the first sweep, as far as the last state that it kept.
        let optimum = optimum(l, budget.min(l));
        assert!(
            replayed <= optimum && replayed + l > optimum,
            "{steps}, {budget}: {replayed}"
        );
    }
}

#[test]
fn the_readmes_table_of_budgets_is_what_is_counted() {
    for (budget, recomputed) in [
        (1000, 4_000),
        (500, 6_004),
        (100, 7_604),
        (30, 9_904),
        (10, 14_564),
        (5, 25_172),
    ] {
        let (_, stats) = gradients(Checkpoint::States(budget), 500, Precision::f64());
        assert_eq!(stats.recomputed, recomputed, "{budget} states");
        assert_eq!(stats.states_kept, budget);
    }
}

#[test]
fn a_budget_in_bytes_is_kept() {
    // One state is 3 × 2 values in f64: 48 bytes.
    let (_, stats) = gradients(Checkpoint::Bytes(500), 25, Precision::f64());
    assert_eq!((stats.states_kept, stats.bytes_kept), (10, 480));
}

#[test]
fn storing_in_bf16_halves_the_trajectory() {
    let (_, full) = gradients(Checkpoint::All, 10, Precision::bf16());
    let (_, half) = gradients(Checkpoint::All, 10, Precision::bf16().store(DType::BF16));
    assert_eq!(full.bytes_kept, 2 * half.bytes_kept);
    assert_eq!(half.bytes_kept, 20 * 6 * 2);
}

#[test]
fn a_plan_that_keeps_nothing_has_no_gradients() {
    let y0 = Var::new(&[1f64], &Device::Cpu).unwrap();
    let options = OdeOptions {
        checkpoint: Checkpoint::Nothing,
        ..Default::default()
    };
    let decay = |_: &Time, y: &Tensor| y.neg();
    let y = odeint(decay, y0.as_tensor(), &[0.0, 1.0], &options).unwrap();
    let error = Error::from(y.sum_all().unwrap().backward().unwrap_err());
    assert!(matches!(error, Error::NothingKept));
    let solution = candle_diffeq::solution(&decay, y0.as_tensor(), &[0.0, 1.0], &options).unwrap();
    let cotangent = y.detach();
    assert!(matches!(solution.vjp(&cotangent), Err(Error::NothingKept)));
}

/// 100 000 steps on a stack of 2 MB: a tape over steps would overflow it.
fn long(checkpoint: Checkpoint) -> Stats {
    let solve = move || {
        let y0 = Var::new(&[[1f32, -0.5]], &Device::Cpu).unwrap();
        let recorder = Recorder::default();
        let options = OdeOptions {
            method: EULER,
            steps: Steps::PerInterval(100_000),
            output: Output::Final,
            checkpoint,
            recorder: Some(recorder.clone()),
            ..Default::default()
        };
        let field = |_: &Time, y: &Tensor| y.neg();
        let y = odeint(field, y0.as_tensor(), &[0.0, 1.0], &options).unwrap();
        let grads = y.sum_all().unwrap().backward().unwrap();
        let grad = grads
            .get(&y0)
            .unwrap()
            .flatten_all()
            .unwrap()
            .to_vec1::<f32>()
            .unwrap();
        // (1 − h)^N, whose rounding errors grow at most like N unit roundoffs.
        let exact = (1.0 - 1e-5f64).powi(100_000);
        let bound = 1e5 * 2f64.powi(-24) * exact;
        assert!(
            grad.iter().all(|&g| (f64::from(g) - exact).abs() <= bound),
            "{grad:?}"
        );
        recorder.take()
    };
    let thread = std::thread::Builder::new().stack_size(2 << 20).spawn(solve);
    thread.unwrap().join().unwrap()
}

#[test]
fn a_hundred_thousand_steps_need_no_stack() {
    let stats = long(Checkpoint::All);
    assert_eq!((stats.steps, stats.states_kept), (100_000, 100_000));
    assert_eq!(stats.bytes_kept, 800_000);
}

#[test]
fn a_hundred_thousand_steps_fit_into_few_states() {
    let stats = long(Checkpoint::Every(316));
    // 317 restart states, which stay for further passes, and a segment of 316.
    assert_eq!(
        (stats.states_kept, stats.bytes_kept),
        (317 + 316, 8 * (317 + 316))
    );
    assert!(stats.recomputed < 200_000);
}

#[test]
fn a_field_may_read_the_recorder_that_its_solve_counts_in() {
    let (done, wait) = mpsc::channel();
    std::thread::spawn(move || {
        let recorder = Recorder::default();
        let options = OdeOptions {
            recorder: Some(recorder.clone()),
            ..Default::default()
        };
        let read = recorder.clone();
        let field = move |_: &Time, y: &Tensor| {
            read.stats();
            y.neg()
        };
        let y0 = Var::new(&[1f64], &Device::Cpu).unwrap();
        let ys = odeint(field, y0.as_tensor(), &[0.0, 1.0, 2.0], &options).unwrap();
        ys.sum_all().unwrap().backward().unwrap();
        done.send(recorder.take()).unwrap();
    });
    let stats = wait.recv_timeout(Duration::from_secs(60)).unwrap();
    assert_eq!(
        (stats.steps, stats.evaluations, stats.recomputed, stats.vjps),
        (2, 8, 8, 8)
    );
}

#[test]
fn a_pass_that_failed_is_counted_up_to_its_failure() {
    let recorder = Recorder::default();
    let options = OdeOptions {
        recorder: Some(recorder.clone()),
        ..Default::default()
    };
    let field = |t: &Time, y: &Tensor| match t.value() {
        t if t > 1.0 => candle_core::bail!("too late"),
        _ => y.neg(),
    };
    let y0 = Tensor::new(&[1f64], &Device::Cpu).unwrap();
    assert!(odeint(field, &y0, &[0.0, 0.5, 1.0, 2.0], &options).is_err());
    let stats = recorder.take();
    assert_eq!((stats.steps, stats.evaluations), (2, 8));
}
