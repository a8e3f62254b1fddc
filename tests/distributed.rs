//! Data-parallel training, on ranks that are threads of one process; tests/mpi.rs has the same on MPI.
//!
//! `cargo test --test distributed`, seconds.

mod common;
mod group;

use candle_core::{Device, Var};
use candle_diffeq::distributed::{share, told, Alone, Replicas, Shards};
use candle_diffeq::error::GroupDefect;
use candle_diffeq::scaling::LossScaler;
use candle_diffeq::{odeint, Error};
use candle_nn::{Optimizer, VarMap, SGD};

use crate::group::{cpu, defect, Threads, SCENARIOS};

fn holds(name: &str) {
    let (_, scenario) = SCENARIOS.into_iter().find(|(n, _)| *n == name).unwrap();
    scenario(&Alone);
    for size in [1, 2, 3, 4] {
        Threads::run(size, scenario);
    }
}

#[test]
fn a_variable_with_two_names_is_trained_once() {
    let vars = VarMap::new();
    let w = Var::new(&[1f64, 2.0], &Device::Cpu).unwrap();
    for name in ["a", "b"] {
        vars.data().lock().unwrap().insert(name.into(), w.clone());
    }
    let replicas = Replicas::new(&Alone, &vars).unwrap();
    assert_eq!(replicas.variables().len(), 1);
    let frozen = Replicas::new(&Alone, &vars).unwrap();
    assert!(frozen.freeze(|name| name == "a").variables().is_empty());
    let mut sgd = SGD::new(replicas.variables(), 0.1).unwrap();
    let loss = w.sqr().unwrap().sum_all().unwrap();
    replicas.backward_step(&loss, 1, &mut sgd).unwrap();
    assert_eq!(w.to_vec1::<f64>().unwrap(), [0.8, 1.6]);
    let scaler = LossScaler::new(8.0).unwrap();
    let loss = (w.sum_all().unwrap() * 8.0).unwrap();
    let mut grads = loss.backward().unwrap();
    assert!(scaler.unscale(&mut grads, &vars.all_vars()).unwrap());
    assert_eq!(grads.get(&w).unwrap().to_vec1::<f64>().unwrap(), [1.0, 1.0]);
}

macro_rules! scenarios {
    ($($test:ident = $name:literal,)+) => {
        $(#[test] fn $test() { holds($name); })+

        #[test]
        fn every_scenario_is_run() {
            let run = [$($name),+];
            assert!(SCENARIOS.iter().all(|(name, _)| run.contains(name)));
        }
    };
}

scenarios! {
    operations_are_those_of_all_ranks = "operations",
    other_dtypes_and_ranks_are_refused = "dtypes",
    training_is_that_of_one_process_with_the_whole_batch = "training",
    two_runs_give_the_same_bits = "bits",
    uneven_shards_give_the_gradient_of_the_whole_batch = "uneven",
    an_overflow_on_one_rank_is_skipped_by_all = "overflow",
    sums_in_bf16_are_within_their_bound = "bf16",
    gradients_are_clipped_by_the_norm_of_the_whole_batch = "clip",
    a_variable_without_gradient_on_all_ranks_stays_without = "absent",
    checkpoints_are_written_by_rank_0_and_read_by_all = "checkpoints",
    other_variables_are_refused_on_all_ranks = "variables",
    losses_and_statistics_are_those_of_all_ranks = "totals",
    variables_that_differ_are_seen_even_if_one_is_nan = "spread",
    ranks_that_train_in_other_ways_are_refused_on_all = "options",
    a_batch_without_rows_is_refused_on_all_ranks = "empty",
    gradients_are_averaged_in_f32_or_f64_and_given_in_the_dtype_of_the_variable = "precisions",
    frozen_variables_are_equal_but_have_no_part_in_training = "frozen",
    a_rank_without_rows_has_no_part_in_gradients = "idle",
}

#[test]
fn ranks_take_every_row_of_every_batch_once_in_an_order_that_does_not_depend_on_their_number() {
    let epoch = |size: usize, epoch: u64, seed: u64| {
        let batches = std::sync::Mutex::new(vec![vec![vec![]; size]; 5]);
        Threads::run(size, |group| {
            let shards = Shards::new(group, 33, 7, seed).unwrap();
            let mine = shards.epoch(epoch);
            assert_eq!(mine.len(), 5);
            for (batch, rows) in mine.into_iter().enumerate() {
                let even = 7 / size..=7usize.div_ceil(size);
                assert!(batch == 4 || even.contains(&rows.len()));
                batches.lock().unwrap()[batch][group.rank()] = rows;
            }
        });
        let batches = batches.into_inner().unwrap();
        batches
            .into_iter()
            .map(|parts| parts.concat())
            .collect::<Vec<_>>()
    };
    let one = epoch(1, 2, 9);
    let mut rows = one.concat();
    rows.sort_unstable();
    assert_eq!(rows, (0..33).collect::<Vec<_>>());
    for size in [2, 3, 4, 8] {
        assert_eq!(epoch(size, 2, 9), one, "{size} ranks");
    }
    assert_ne!(epoch(1, 3, 9), one);
    assert_ne!(epoch(1, 2, 8), one);
    assert_eq!(share(&Alone, usize::MAX), 0..usize::MAX);
}

#[test]
fn rows_that_memory_cannot_list_are_refused() {
    for rows in [1 << 45, usize::MAX] {
        let shards = Shards::new(&Alone, rows, 4, 7);
        assert!(matches!(shards, Err(Error::AllocationFailed { .. })));
    }
}

#[test]
fn an_error_in_the_backward_pass_of_one_rank_ends_the_others_with_its_reason() {
    Threads::run(3, |group| {
        let vars = VarMap::new();
        let w = Var::new(&[1f32], &Device::Cpu).unwrap();
        vars.data().lock().unwrap().insert("w".into(), w.clone());
        let replicas = Replicas::new(group, &vars).unwrap();
        let mut sgd = SGD::new(replicas.variables(), 0.1).unwrap();
        let y0 = (w.as_tensor() * 1.0).unwrap();
        let f = |_: &candle_diffeq::Time, y: &candle_core::Tensor| y.neg();
        let y = odeint(f, &y0, &[0.0, 1.0], &Default::default()).unwrap();
        let mut loss = y.sum_all().unwrap();
        if group.rank() == 1 {
            loss = (loss * f64::INFINITY).unwrap();
        }
        let failed = replicas.backward_step(&loss, 1, &mut sgd);
        match group.rank() {
            1 => assert!(matches!(failed, Err(Error::NonFiniteCotangent))),
            _ => match defect(failed) {
                GroupDefect::Left { rank: 1, reason } => {
                    assert!(reason.contains("NaN or infinity"))
                }
                other => panic!("{other}"),
            },
        }
        assert!(group.sum(&cpu(1f32)).is_err());
    });
}

#[test]
fn a_gradient_of_another_shape_on_one_rank_ends_the_others_with_its_reason() {
    Threads::run(3, |group| {
        let vars = VarMap::new();
        let w = Var::new(&[1f32, 2.0], &Device::Cpu).unwrap();
        vars.data().lock().unwrap().insert("w".into(), w.clone());
        let replicas = Replicas::new(group, &vars).unwrap();
        let mut grads = w.sum_all().unwrap().backward().unwrap();
        if group.rank() == 2 {
            grads.insert(&w, cpu(&[1f32; 3]));
        }
        match (group.rank(), defect(replicas.average(&mut grads, 1))) {
            (2, GroupDefect::Gradient { variable, .. }) => assert_eq!(variable, "w"),
            (0 | 1, GroupDefect::Left { rank: 2, reason }) => assert!(reason.contains("shape [3]")),
            (rank, other) => panic!("rank {rank}: {other}"),
        }
    });
}

#[test]
fn an_error_of_a_program_is_told_to_the_other_ranks() {
    Threads::run(3, |group| {
        let outcome = match group.rank() {
            1 => Err("no such file"),
            _ => Ok(()),
        };
        assert_eq!(told(group, outcome), outcome);
        let expected = GroupDefect::Left {
            rank: 1,
            reason: "no such file".into(),
        };
        assert_eq!(defect(group.barrier()), expected);
    });
}
