//! What must hold in a group of any number of ranks, on whatever carries its messages; and a group of threads.
#![allow(dead_code)] // each test binary uses a part of it

use std::sync::{Arc, Condvar, Mutex};

use candle_core::{DType, Device, Tensor, Var};
use candle_diffeq::distributed::{mean, share, total, Alone, Group, Replicas, Shards, Wire};
use candle_diffeq::error::GroupDefect;
use candle_diffeq::metrics::{BackwardStats, Recorder, Stats};
use candle_diffeq::nn::{Activation, Mlp, RowLoss};
use candle_diffeq::options::{Output, Steps};
use candle_diffeq::scaling::{LossScaler, OnOverflow, Stepped};
use candle_diffeq::{Error, NeuralOde, OdeOptions, Precision, Result};
use candle_nn::{AdamW, Optimizer, ParamsAdamW, VarMap, SGD};

use crate::common::{bits, fill, named, scattered, values, worst, U_BF16, U_F32, U_F64};

/// Iterations of a training.
const ITERATIONS: usize = 50;
/// Rows of a batch: no multiple of 2, 3 or 4.
const ROWS: usize = 37;

pub(crate) fn cpu<D: candle_core::NdArray>(data: D) -> Tensor {
    Tensor::new(data, &Device::Cpu).unwrap()
}

/// The defect that has ended a group.
#[track_caller]
pub(crate) fn defect<T>(result: Result<T>) -> GroupDefect {
    match result {
        Err(Error::Group(defect)) => defect,
        Err(other) => panic!("another error: {other}"),
        Ok(_) => panic!("no error"),
    }
}

/// A scenario, by its name.
pub(crate) type Scenario = (&'static str, fn(&dyn Group));

/// All that need no time.
pub(crate) const SCENARIOS: [Scenario; 18] = [
    ("operations", operations_are_those_of_all_ranks),
    ("dtypes", other_dtypes_and_ranks_are_refused),
    (
        "training",
        training_is_that_of_one_process_with_the_whole_batch,
    ),
    ("bits", two_runs_give_the_same_bits),
    ("uneven", uneven_shards_give_the_gradient_of_the_whole_batch),
    ("overflow", an_overflow_on_one_rank_is_skipped_by_all),
    ("bf16", sums_in_bf16_are_within_their_bound),
    ("clip", gradients_are_clipped_by_the_norm_of_the_whole_batch),
    (
        "absent",
        a_variable_without_gradient_on_all_ranks_stays_without,
    ),
    (
        "checkpoints",
        checkpoints_are_written_by_rank_0_and_read_by_all,
    ),
    ("variables", other_variables_are_refused_on_all_ranks),
    ("totals", losses_and_statistics_are_those_of_all_ranks),
    ("spread", variables_that_differ_are_seen_even_if_one_is_nan),
    ("options", ranks_that_train_in_other_ways_are_refused_on_all),
    ("empty", a_batch_without_rows_is_refused_on_all_ranks),
    (
        "precisions",
        gradients_are_averaged_in_f32_or_f64_and_given_in_the_dtype_of_the_variable,
    ),
    (
        "frozen",
        frozen_variables_are_equal_but_have_no_part_in_training,
    ),
    ("idle", a_rank_without_rows_has_no_part_in_gradients),
];

/// A perceptron in time over variables of its own, its options, and its optimiser's variables.
fn model(options: OdeOptions) -> (VarMap, NeuralOde) {
    let vars = VarMap::new();
    let ode = NeuralOde::new(&vars, "ode", &Device::Cpu, |vb| {
        Mlp::new(&[2, 16, 16, 2], Activation::Tanh, vb)
    });
    let ode = ode.unwrap().options(OdeOptions {
        steps: Steps::PerInterval(4),
        output: Output::Final,
        ..options
    });
    fill(&vars);
    (vars, ode)
}

/// What training came to.
struct Trained {
    weights: Vec<f64>,
    losses: Vec<f64>,
}

/// Trains on the same batches of the whole group, whatever its size, by a row loss tile by tile.
fn train(group: &dyn Group, wire: Wire) -> Trained {
    let (vars, ode) = model(OdeOptions::default());
    // Small buckets, so that there are several.
    let replicas = Replicas::new(group, &vars).unwrap().wire(wire).bucket(1000);
    let parameters = ParamsAdamW {
        lr: 1e-2,
        ..Default::default()
    };
    let mut optimiser = AdamW::new(replicas.variables(), parameters).unwrap();
    let data = scattered(&[100, 2], 1.0, 1).to_dtype(DType::F32).unwrap();
    let target = (data.neg().unwrap() * 0.5).unwrap();
    let shards = Shards::new(group, 100, ROWS, 3).unwrap();
    let mut batches = vec![];
    for epoch in 0.. {
        batches.extend(shards.epoch(epoch));
        if batches.len() >= ITERATIONS {
            break;
        }
    }
    let mut losses = vec![];
    for rows in &batches[..ITERATIONS] {
        let loss = match rows.len() {
            0 => cpu(0f32),
            _ => {
                let rows = cpu(rows.iter().map(|i| *i as u32).collect::<Vec<_>>());
                let [x, target] = [&data, &target].map(|d| d.index_select(&rows, 0).unwrap());
                ode.loss(&x, &[0.0, 1.0], &RowLoss::MeanSquaredError(target))
                    .unwrap()
            }
        };
        replicas
            .backward_step(&loss, rows.len(), &mut optimiser)
            .unwrap();
        losses.push(mean(group, values(&loss)[0], rows.len()).unwrap());
    }
    assert_eq!(replicas.spread().unwrap(), 0.0, "ranks have drifted apart");
    let weights = replicas
        .variables()
        .iter()
        .flat_map(|v| values(v))
        .collect();
    Trained { weights, losses }
}

/// ‖x − y‖ / ‖y‖.
fn distance(x: &[f64], y: &[f64]) -> f64 {
    let norm = |v: &mut dyn Iterator<Item = f64>| v.map(|x| x * x).sum::<f64>().sqrt();
    norm(&mut x.iter().zip(y).map(|(x, y)| x - y)) / norm(&mut y.iter().copied())
}

pub(crate) fn training_is_that_of_one_process_with_the_whole_batch(group: &dyn Group) {
    let (several, one) = (train(group, Wire::F32), train(&Alone, Wire::F32));
    let apart = distance(&several.weights, &one.weights);
    let losses = several
        .losses
        .iter()
        .zip(&one.losses)
        .map(|(a, b)| (a - b) / b);
    let losses = worst(losses);
    if group.rank() == 0 {
        println!(
            "{} ranks: weights {apart:.1e}, losses {losses:.1e}",
            group.size()
        );
    }
    assert!(apart <= 1e-5, "weights are {apart:e} apart");
    assert!(losses <= 5e-5, "losses are {losses:e} apart");
    assert!(
        one.losses[ITERATIONS - 1] < 0.5 * one.losses[0],
        "it did not learn"
    );
}

pub(crate) fn two_runs_give_the_same_bits(group: &dyn Group) {
    for wire in [Wire::F32, Wire::Bf16] {
        let [a, b] = [(); 2].map(|()| train(group, wire));
        let bits = |x: &[f64]| x.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
        assert_eq!(bits(&a.weights), bits(&b.weights));
        assert_eq!(bits(&a.losses), bits(&b.losses));
        if group.rank() == 0 {
            let fold = |h: u64, x: &f64| (h ^ x.to_bits()).wrapping_mul(0x0100_0000_01b3);
            println!("bits in {wire:?}: {:016x}", a.weights.iter().fold(1, fold));
        }
    }
}

/// Variables w (3) and b (1, unread by some), and the gradient of the mean of (x·w + b)² over some rows, by candle.
fn linear() -> (VarMap, Var, Var) {
    let vars = VarMap::new();
    let mut data = vars.data().lock().unwrap();
    for (name, shape) in [("w", vec![3]), ("b", vec![1])] {
        let x = scattered(&shape, 1.0, 5).to_dtype(DType::F32).unwrap();
        data.insert(name.into(), Var::from_tensor(&x).unwrap());
    }
    drop(data);
    let (w, b) = (named(&vars, "w"), named(&vars, "b"));
    (vars, w, b)
}

fn squares(x: &Tensor, w: &Tensor, b: &Tensor) -> Tensor {
    let y = x.broadcast_mul(w).unwrap().sum_keepdim(1).unwrap();
    y.broadcast_add(b)
        .unwrap()
        .sqr()
        .unwrap()
        .mean_all()
        .unwrap()
}

pub(crate) fn uneven_shards_give_the_gradient_of_the_whole_batch(group: &dyn Group) {
    // Fewer rows than ranks, one more than ranks, many.
    for rows in [1, group.size().max(2) - 1, group.size() + 1, 37] {
        let (vars, w, b) = linear();
        let replicas = Replicas::new(group, &vars).unwrap();
        let x = scattered(&[rows, 3], 2.0, 7);
        let mine = share(group, rows);
        let x32 = x
            .narrow(0, mine.start, mine.len())
            .unwrap()
            .to_dtype(DType::F32)
            .unwrap();
        let mut grads = match mine.len() {
            0 => cpu(f32::NAN).backward().unwrap(),
            _ => squares(&x32, &w, &b).backward().unwrap(),
        };
        replicas.average(&mut grads, mine.len()).unwrap();
        // In f64, with all rows.
        let wide = |v: &Var| Var::from_tensor(&v.to_dtype(DType::F64).unwrap()).unwrap();
        let (exact_w, exact_b) = (wide(&w), wide(&b));
        let exact = squares(&x, &exact_w, &exact_b).backward().unwrap();
        // Against the whole gradient: parts of b's may cancel.
        let got = [&w, &b].map(|var| values(grads.get(var).unwrap())).concat();
        let exact = [&exact_w, &exact_b].map(|var| values(exact.get(var).unwrap()));
        let error = distance(&got, &exact.concat());
        assert!(
            error <= 20.0 * U_F32,
            "{rows} rows on {} ranks: {error:e}",
            group.size()
        );
    }
}

pub(crate) fn an_overflow_on_one_rank_is_skipped_by_all(group: &dyn Group) {
    let (vars, ode) = model(OdeOptions {
        precision: Some(Precision::f16()),
        on_overflow: OnOverflow::SkipUpdate,
        ..Default::default()
    });
    let replicas = Replicas::new(group, &vars).unwrap();
    let mut sgd = SGD::new(replicas.variables(), 0.1).unwrap();
    let mut scaler = LossScaler::new(1024.0).unwrap().growth_interval(4);
    let last = group.size() - 1;
    let data = scattered(&[ROWS, 2], 1.0, 1).to_dtype(DType::F32).unwrap();
    let mine = share(group, ROWS);
    let x = data.narrow(0, mine.start, mine.len()).unwrap();
    let (mut outcomes, mut scales) = (vec![], vec![]);
    for i in 0..12 {
        let before: Vec<_> = replicas.variables().iter().map(|v| bits(v)).collect();
        let y = ode.solve(&x, &[0.0, 1.0]).unwrap();
        let mut loss = y.sqr().unwrap().mean_all().unwrap();
        // On one rank only.
        if group.rank() == last && (i == 3 || i == 8) {
            loss = (loss * 1e36).unwrap();
        }
        let stepped = replicas
            .scaled_step(&mut scaler, &loss, mine.len(), &mut sgd)
            .unwrap();
        let after: Vec<_> = replicas.variables().iter().map(|v| bits(v)).collect();
        assert_eq!(
            before == after,
            stepped == Stepped::Skipped,
            "iteration {i}"
        );
        outcomes.push(stepped);
        scales.push(scaler.scale);
    }
    let skipped = |i| i == 3 || i == 8;
    let expected = (0..12).map(|i| [Stepped::Taken, Stepped::Skipped][usize::from(skipped(i))]);
    assert_eq!(outcomes, expected.collect::<Vec<_>>());
    // Halved twice, doubled after four clean steps.
    assert_eq!(scales[3..9], [512.0, 512.0, 512.0, 512.0, 1024.0, 512.0]);
    // Equal bit for bit on all ranks.
    let mine = cpu(scales);
    let (most, least) = (
        group.max(&mine).unwrap(),
        group.max(&mine.neg().unwrap()).unwrap(),
    );
    assert_eq!(bits(&most), bits(&least.neg().unwrap()));
    assert_eq!(replicas.spread().unwrap(), 0.0);
}

pub(crate) fn sums_in_bf16_are_within_their_bound(group: &dyn Group) {
    let n = 1003;
    let of = |rank: usize| scattered(&[n], 1.0 + rank as f64, 11 + rank);
    let all: Vec<_> = (0..group.size())
        .map(|r| of(r).to_dtype(DType::F32).unwrap())
        .collect();
    let vars = VarMap::new();
    let var = Var::zeros(n, DType::F32, &Device::Cpu).unwrap();
    vars.data().lock().unwrap().insert("v".into(), var.clone());
    let replicas = Replicas::new(group, &vars).unwrap().wire(Wire::Bf16);
    let mut grads = cpu(0f32).backward().unwrap();
    grads.insert(&var, all[group.rank()].clone());
    replicas.average(&mut grads, 5).unwrap();
    let got = values(grads.get(&var).unwrap());
    let weight = 1.0 / group.size() as f64;
    let all: Vec<_> = all.iter().map(values).collect();
    let mut largest = 0f64;
    for i in 0..n {
        let exact: f64 = all.iter().map(|x| weight * x[i]).sum();
        let parts: f64 = all.iter().map(|x| (weight * x[i]).abs()).sum();
        let bound = U_BF16 * (parts + exact.abs()) * (1.0 + U_BF16) + 8.0 * U_F32 * parts;
        let error = (got[i] - exact).abs();
        assert!(error <= bound, "{error:e} at {i}, beyond {bound:e}");
        largest = largest.max(error / exact.abs().max(1e-3));
    }
    // With one rank nothing is on the wire.
    assert_eq!(largest > U_BF16 / 4.0, group.size() > 1, "{largest:e}");
}

pub(crate) fn gradients_are_clipped_by_the_norm_of_the_whole_batch(group: &dyn Group) {
    let rows = 9;
    let x = scattered(&[rows, 3], 2.0, 7).to_dtype(DType::F32).unwrap();
    let mine = share(group, rows);
    let clipped = |limit: f64, group: &dyn Group, mine: std::ops::Range<usize>| {
        let (vars, w, b) = linear();
        let replicas = Replicas::new(group, &vars).unwrap().clip(limit).unwrap();
        let mut grads = match mine.len() {
            0 => cpu(0f32).backward().unwrap(),
            n => squares(&x.narrow(0, mine.start, n).unwrap(), &w, &b)
                .backward()
                .unwrap(),
        };
        replicas.average(&mut grads, mine.len()).unwrap();
        [&w, &b].map(|var| values(grads.get(var).unwrap())).concat()
    };
    let norm = |x: &[f64]| x.iter().map(|x| x * x).sum::<f64>().sqrt();
    let free = clipped(1e9, &Alone, 0..rows);
    for limit in [0.1, 0.5 * norm(&free), 2.0 * norm(&free)] {
        let got = clipped(limit, group, mine.clone());
        let expected: Vec<_> = free
            .iter()
            .map(|x| x * (limit / norm(&free)).min(1.0))
            .collect();
        let error = distance(&got, &expected);
        assert!(error <= 20.0 * U_F32, "at {limit}: {error:e}");
    }
    // Squares that overflow or underflow f64, and what has no norm.
    for (size, limit) in [(1e200, 1.0), (1e-200, 1e-210), (f64::NAN, 1.0)] {
        let vars = VarMap::new();
        let var = Var::zeros(4, DType::F64, &Device::Cpu).unwrap();
        vars.data().lock().unwrap().insert("v".into(), var.clone());
        let replicas = Replicas::new(group, &vars).unwrap().clip(limit).unwrap();
        let mut grads = cpu(0f32).backward().unwrap();
        grads.insert(&var, (var.ones_like().unwrap() * size).unwrap());
        replicas.average(&mut grads, 1).unwrap();
        for got in values(grads.get(&var).unwrap()) {
            let exact = 0.5 * limit;
            assert!(
                size.is_nan() && got.is_nan() || (got / exact - 1.0).abs() <= 1e-12,
                "{size:e}: {got:e}"
            );
        }
    }
    for limit in [0.0, -1.0, f64::NAN] {
        let refused = Replicas::new(group, &VarMap::new()).unwrap().clip(limit);
        assert!(matches!(defect(refused), GroupDefect::Clip { .. }));
    }
}

pub(crate) fn a_variable_without_gradient_on_all_ranks_stays_without(group: &dyn Group) {
    let (vars, w, b) = linear();
    let replicas = Replicas::new(group, &vars).unwrap();
    // w is read by rank 0 only, b by none.
    let loss = match group.rank() {
        0 => w.sum_all().unwrap(),
        _ => cpu(0f32),
    };
    let mut grads = loss.backward().unwrap();
    replicas.average(&mut grads, 1).unwrap();
    let share = 1.0 / group.size() as f64;
    let got = values(grads.get(&w).unwrap());
    assert!(got.iter().all(|x| (x - share).abs() <= U_F32), "{got:?}");
    assert!(grads.get(&b).is_none());
}

/// A folder that all ranks of this machine share.
fn folder(group: &dyn Group) -> std::path::PathBuf {
    let name = [
        f64::from(std::process::id()),
        f64::from(std::time::UNIX_EPOCH.elapsed().unwrap().subsec_nanos()),
    ];
    let name = values(&group.broadcast(&cpu(&name), 0).unwrap());
    let path = std::env::temp_dir().join(format!("candle-diffeq-{}-{}", name[0], name[1]));
    if group.rank() == 0 {
        std::fs::create_dir(&path).unwrap();
    }
    group.barrier().unwrap();
    path
}

pub(crate) fn checkpoints_are_written_by_rank_0_and_read_by_all(group: &dyn Group) {
    let (vars, w, b) = linear();
    let replicas = Replicas::new(group, &vars).unwrap();
    let folder = folder(group);
    let path = folder.join("model.safetensors");
    let (saved, of_b) = (bits(&w), bits(&b));
    replicas.save(&path).unwrap();
    for var in [&w, &b] {
        let other = (var.as_detached_tensor() + (1.0 + group.rank() as f64)).unwrap();
        var.set(&other).unwrap();
    }
    replicas.load(&path).unwrap();
    assert_eq!((bits(&w), bits(&b)), (saved.clone(), of_b));
    // candle reads it, too.
    let (mut other, v, _) = linear();
    v.set(&v.zeros_like().unwrap()).unwrap();
    other.load(&path).unwrap();
    assert_eq!(bits(&v), saved);
    // Where it cannot be written or read, all ranks know, and nothing has changed.
    let nowhere = folder.join("nowhere").join("model.safetensors");
    let more = VarMap::new();
    more.data()
        .lock()
        .unwrap()
        .insert("w".into(), Var::zeros(4, DType::F32, &Device::Cpu).unwrap());
    let shape = Replicas::new(group, &more).unwrap();
    more.data()
        .lock()
        .unwrap()
        .insert("x".into(), Var::zeros(1, DType::F32, &Device::Cpu).unwrap());
    more.data().lock().unwrap().remove("w");
    let missing = Replicas::new(group, &more).unwrap();
    // A save that fails in the middle leaves the old file.
    let part = folder.join("model.safetensors.part");
    if group.rank() == 0 {
        std::fs::create_dir(&part).unwrap();
    }
    let changed = (&w.as_detached_tensor() + 1.0).unwrap();
    w.set(&changed).unwrap();
    let occupied = replicas.save(&path);
    replicas.load(&path).unwrap();
    assert_eq!(bits(&w), saved);
    let refused = [
        (replicas.save(&nowhere), "nowhere"),
        (replicas.load(&nowhere), "nowhere"),
        (shape.load(&path), "w is F32 of shape [3] there"),
        (missing.load(&path), "x is missing"),
        (occupied, "directory"),
    ];
    for (result, says) in refused {
        let defect = defect(result);
        let GroupDefect::Checkpoint { path, message } = &defect else {
            panic!("{defect}");
        };
        let shown = format!("{path} {message}");
        assert!(!message.is_empty() && shown.contains(says), "{defect}");
    }
    assert_eq!(bits(&w), saved);
    group.barrier().unwrap();
    if group.rank() == 0 {
        std::fs::remove_dir_all(&folder).unwrap();
    }
}

pub(crate) fn other_variables_are_refused_on_all_ranks(group: &dyn Group) {
    let last = group.size() - 1;
    let with = |name: &str, shape: &[usize], dtype| {
        let vars = VarMap::new();
        let var = Var::zeros(shape, dtype, &Device::Cpu).unwrap();
        vars.data().lock().unwrap().insert(name.into(), var);
        vars
    };
    for (name, shape, dtype) in [
        ("other", vec![2, 3], DType::F32),
        ("w", vec![3, 2], DType::F32),
        ("w", vec![2, 3], DType::F64),
    ] {
        let vars = match group.rank() == last && last > 0 {
            true => with(name, &shape, dtype),
            false => with("w", &[2, 3], DType::F32),
        };
        let made = Replicas::new(group, &vars).map(drop);
        match last {
            0 => made.unwrap(),
            rank => assert_eq!(defect(made), GroupDefect::OtherVariables { rank }),
        }
    }
}

pub(crate) fn operations_are_those_of_all_ranks(group: &dyn Group) {
    let (rank, size) = (group.rank(), group.size());
    for dtype in [DType::F32, DType::F64, DType::BF16] {
        let u = match dtype {
            DType::F32 => U_F32,
            DType::F64 => U_F64,
            _ => 2.0 * U_BF16,
        };
        // No element, one, and more than one piece for each rank.
        for shape in [vec![0], vec![], vec![3, 35]] {
            let all = |rank| scattered(&shape, 1.0, rank).to_dtype(dtype).unwrap();
            let sum = group.sum(&all(rank)).unwrap();
            assert_eq!((sum.dims(), sum.dtype()), (&shape[..], dtype));
            let each: Vec<_> = (0..size).map(|r| values(&all(r))).collect();
            for (i, got) in values(&sum).into_iter().enumerate() {
                let exact: f64 = each.iter().map(|x| x[i]).sum();
                let parts: f64 = each.iter().map(|x| x[i].abs()).sum();
                assert!(
                    (got - exact).abs() <= u * size as f64 * parts,
                    "{dtype:?}, {shape:?}"
                );
            }
            if dtype != DType::BF16 {
                let most = values(&group.max(&all(rank)).unwrap());
                for (i, got) in most.into_iter().enumerate() {
                    let exact = each.iter().map(|x| x[i]).fold(f64::MIN, f64::max);
                    assert_eq!(got, exact, "{dtype:?}, {shape:?}");
                }
            }
        }
    }
    for root in [0, size - 1] {
        for dtype in [
            DType::F32,
            DType::F64,
            DType::F16,
            DType::BF16,
            DType::U8,
            DType::U32,
            DType::I64,
        ] {
            let of = |rank: usize| {
                (scattered(&[5, 3], 50.0, rank) + 60.0)
                    .unwrap()
                    .to_dtype(dtype)
                    .unwrap()
            };
            let got = group.broadcast(&of(rank), root).unwrap();
            assert_eq!(
                (bits(&got), got.dims()),
                (bits(&of(root)), &[5, 3][..]),
                "{dtype:?}"
            );
        }
    }
    // An operand that is a view, and one with a history, which the result does not have.
    let view = scattered(&[4, 6], 1.0, 1).t().unwrap();
    assert_eq!(values(&group.broadcast(&view, 0).unwrap()), values(&view));
    let var = Var::from_tensor(&view).unwrap();
    assert!(!group.sum(&var.sqr().unwrap()).unwrap().track_op());
    group.barrier().unwrap();
    group.watch(std::time::Duration::ZERO).unwrap();
}

pub(crate) fn other_dtypes_and_ranks_are_refused(group: &dyn Group) {
    let x = cpu(&[1u32]);
    let refused = [
        group.sum(&x),
        group.max(&x),
        group.broadcast(&x, group.size()),
    ];
    let expected = [
        GroupDefect::Dtype {
            operation: "a sum",
            dtype: DType::U32,
        },
        GroupDefect::Dtype {
            operation: "a maximum",
            dtype: DType::U32,
        },
        GroupDefect::NoSuchRank {
            rank: group.size(),
            size: group.size(),
        },
    ];
    assert_eq!(refused.map(defect), expected);
    let bf16 = Tensor::zeros(1, DType::BF16, &Device::Cpu).unwrap();
    assert!(group.sum(&bf16).is_ok() && group.max(&bf16).is_err());
    let none = Shards::new(group, 10, 0, 0).map(drop);
    assert_eq!(defect(none), GroupDefect::EmptyBatch);
    // The group goes on.
    group.barrier().unwrap();
}

pub(crate) fn losses_and_statistics_are_those_of_all_ranks(group: &dyn Group) {
    let (rank, size) = (group.rank(), group.size());
    // Rank r has r rows of value r; rank 0 has none, and its NaN does not count.
    let value = if rank == 0 { f64::NAN } else { rank as f64 };
    let got = mean(group, value, rank).unwrap();
    let (mut rows, mut sum) = (0.0, 0.0);
    for r in 1..size {
        rows += r as f64;
        sum += (r * r) as f64;
    }
    match size {
        1 => assert!(got.is_nan()),
        _ => assert!((got - sum / rows).abs() <= 4.0 * U_F64 * got, "{got}"),
    }
    // Every count is another one, so that none can stand for another.
    let counts = |of: &dyn Fn(usize) -> usize| {
        let mut backward = BackwardStats::default();
        backward.steps = of(12);
        backward.rejected = of(13);
        backward.evaluations = of(14);
        backward.points = of(15);
        backward.forced = of(16);
        backward.limited = of(17);
        Stats {
            steps: of(0),
            rejected: of(1),
            forced: of(2),
            limited: of(3),
            evaluations: of(4),
            row_evaluations: of(5),
            tile_evaluations: of(6),
            recomputed: of(7),
            vjps: of(8),
            retries: of(9),
            host_reads: of(10),
            replayed: of(11),
            backward,
            ..Default::default()
        }
    };
    let mut stats = Stats {
        states_kept: 100 * (rank + 1),
        bytes_kept: 200 * (size - rank),
        activation_bytes: 300 * (rank + 1),
        tolerance_factor: rank as f64,
        step_range: (rank > 0).then_some((0.1 / rank as f64, rank as f64)),
        scale_range: None,
        first_step: Some(1.0 + rank as f64),
        ..counts(&|i| 10 * i + rank)
    };
    stats.backward.tolerance_factor = 2.0 * rank as f64;
    stats.backward.drift = 3.0 * rank as f64;
    let all = total(group, &stats).unwrap();
    let ranks = size * (size - 1) / 2;
    let mut expected = Stats {
        states_kept: 100 * size,
        bytes_kept: 200 * size,
        activation_bytes: 300 * size,
        tolerance_factor: (size - 1) as f64,
        step_range: (size > 1).then_some((0.1 / (size - 1) as f64, (size - 1) as f64)),
        scale_range: None,
        first_step: Some(1.0),
        ..counts(&|i| 10 * i * size + ranks)
    };
    expected.backward.tolerance_factor = 2.0 * (size - 1) as f64;
    expected.backward.drift = 3.0 * (size - 1) as f64;
    assert_eq!(all, expected);
    // Those of solves.
    let recorder = Recorder::default();
    let (_, ode) = model(OdeOptions {
        recorder: Some(recorder.clone()),
        ..Default::default()
    });
    ode.predict(
        &scattered(&[3, 2], 1.0, 1).to_dtype(DType::F32).unwrap(),
        &[0.0, 1.0],
    )
    .unwrap();
    assert_eq!(
        total(group, &recorder.take()).unwrap().evaluations,
        16 * size
    );
}

/// Variables of these names, shapes and dtypes.
fn variables(of: &[(&str, usize, DType)]) -> (VarMap, Vec<Var>) {
    let vars = VarMap::new();
    let made: Vec<_> = of
        .iter()
        .map(|(name, length, dtype)| {
            let var = Var::ones(*length, *dtype, &Device::Cpu).unwrap();
            vars.data()
                .lock()
                .unwrap()
                .insert((*name).into(), var.clone());
            var
        })
        .collect();
    (vars, made)
}

pub(crate) fn variables_that_differ_are_seen_even_if_one_is_nan(group: &dyn Group) {
    let (vars, var) = variables(&[("a", 2, DType::F32), ("b", 3, DType::F32)]);
    let replicas = Replicas::new(group, &vars).unwrap();
    assert_eq!(replicas.spread().unwrap(), 0.0);
    let set = |value: f32, on: &dyn Fn(usize) -> bool| {
        let value = if on(group.rank()) { value } else { 1.0 };
        var[0].set(&cpu(&[1f32, value])).unwrap();
        replicas.spread().unwrap()
    };
    let (last, several) = (group.size() - 1, group.size() > 1);
    for value in [f32::NAN, f32::INFINITY, 1.25] {
        let expected = match value {
            1.25 => 0.25,
            _ => f64::INFINITY,
        };
        for other in [0, last] {
            let got = set(value, &|rank| rank == other);
            let expected = if several { expected } else { 0.0 };
            assert_eq!(got, expected, "{value} on rank {other}");
        }
        assert_eq!(set(value, &|_| true), 0.0, "{value} everywhere");
    }
}

pub(crate) fn ranks_that_train_in_other_ways_are_refused_on_all(group: &dyn Group) {
    let last = group.size() - 1;
    let (vars, var) = variables(&[("a", 2, DType::F32), ("b", 3, DType::F32)]);
    let made = || Replicas::new(group, &vars).unwrap();
    let mut sgd = SGD::new(var.clone(), 0.0).unwrap();
    let loss = || (var[0].sum_all().unwrap() + var[1].sum_all().unwrap()).unwrap();
    let scaler = || LossScaler::new(8.0).unwrap();
    for way in 0..7 {
        let odd = group.rank() == last && last > 0;
        let replicas = match (odd, way) {
            (true, 0) => made().clip(1.0).unwrap(),
            (true, 1) => made().wire(Wire::Bf16),
            (true, 2) => made().bucket(4),
            (true, 3) => made().freeze(|name| name == "a"),
            _ => made(),
        };
        let mut scaler = match (odd, way) {
            (true, 4) => LossScaler::new(16.0).unwrap(),
            (true, 5) => scaler().growth_interval(3),
            _ => scaler(),
        };
        let outcome = match (odd, way) {
            (true, 6) => replicas.backward_step(&loss(), 1, &mut sgd),
            _ => replicas
                .scaled_step(&mut scaler, &loss(), 1, &mut sgd)
                .map(drop),
        };
        match last {
            0 => outcome.unwrap(),
            rank => assert_eq!(
                defect(outcome),
                GroupDefect::OtherOptions { rank },
                "way {way}"
            ),
        }
    }
    // Options that are equal again are taken.
    made().backward_step(&loss(), 1, &mut sgd).unwrap();
}

pub(crate) fn a_batch_without_rows_is_refused_on_all_ranks(group: &dyn Group) {
    let (vars, var) = variables(&[("a", 2, DType::F32)]);
    let replicas = Replicas::new(group, &vars).unwrap();
    let parameters = ParamsAdamW {
        weight_decay: 0.5,
        ..Default::default()
    };
    let mut adam = AdamW::new(replicas.variables(), parameters).unwrap();
    let mut scaler = LossScaler::default();
    let before = bits(&var[0]);
    let loss = var[0].sum_all().unwrap();
    let outcome = replicas.backward_step(&loss, 0, &mut adam);
    assert_eq!(defect(outcome), GroupDefect::EmptyBatch);
    let outcome = replicas.scaled_step(&mut scaler, &loss, 0, &mut adam);
    assert_eq!(defect(outcome), GroupDefect::EmptyBatch);
    assert_eq!((bits(&var[0]), scaler), (before, LossScaler::default()));
    group.barrier().unwrap();
}

pub(crate) fn gradients_are_averaged_in_f32_or_f64_and_given_in_the_dtype_of_the_variable(
    group: &dyn Group,
) {
    let dtypes = [DType::F64, DType::F16, DType::F32, DType::BF16, DType::F16];
    let names = ["a", "b", "c", "d", "e"];
    let of: Vec<_> = (0..5).map(|i| (names[i], 7 + i, dtypes[i])).collect();
    let (vars, var) = variables(&of);
    let (rank, size) = (group.rank(), group.size());
    let rows = |rank: usize| 3 + rank;
    let all: usize = (0..size).map(rows).sum();
    for (bucket, wire) in [
        (1, Wire::F32),
        (60, Wire::F32),
        (1 << 20, Wire::F32),
        (60, Wire::Bf16),
    ] {
        let replicas = Replicas::new(group, &vars).unwrap();
        let replicas = replicas.bucket(bucket).wire(wire);
        let given = |i: usize, rank: usize| {
            let x = scattered(&[7 + i], 1.0, 31 * i + rank + 1);
            x.to_dtype(dtypes[i]).unwrap()
        };
        let mut grads = cpu(0f32).backward().unwrap();
        for (i, var) in var.iter().enumerate() {
            grads.insert(var, given(i, rank));
        }
        replicas.average(&mut grads, rows(rank)).unwrap();
        for (i, var) in var.iter().enumerate() {
            let got = grads.get(var).unwrap();
            assert_eq!((got.dtype(), got.dims()), (dtypes[i], var.dims()));
            // The sum's, and the rounding to the variable's dtype.
            let u = match (dtypes[i], wire) {
                (DType::F64, _) => 16.0 * U_F64,
                (DType::BF16, _) | (_, Wire::Bf16) => 2.5 * U_BF16,
                (DType::F16, _) => 1.1 * 2f64.powi(-11),
                _ => 8.0 * U_F32,
            };
            for (k, got) in values(got).into_iter().enumerate() {
                let part = |rank| values(&given(i, rank))[k] * rows(rank) as f64 / all as f64;
                let exact: f64 = (0..size).map(part).sum();
                let parts: f64 = (0..size).map(|rank| part(rank).abs()).sum();
                assert!(
                    (got - exact).abs() <= u * parts,
                    "{:?}, {wire:?}: {got:e} is not {exact:e}",
                    dtypes[i]
                );
            }
        }
    }
    // Finite on every rank and in the mean, but not in f16; all skip.
    let (vars, var) = variables(&[("w", 2, DType::F16), ("v", 2, DType::F32)]);
    let replicas = Replicas::new(group, &vars).unwrap();
    let mut sgd = SGD::new(replicas.variables(), 0.1).unwrap();
    // Below one: candle casts the gradient of the scaled loss to f16, before this scale is taken off.
    let mut scaler = LossScaler::new(0.5).unwrap();
    let wide = var[0].to_dtype(DType::F32).unwrap();
    let read = (wide.sum_all().unwrap() + var[1].sum_all().unwrap()).unwrap();
    let mut step = |factor: f64| {
        let loss = (&read * factor).unwrap();
        replicas
            .scaled_step(&mut scaler, &loss, 1, &mut sgd)
            .unwrap()
    };
    assert_eq!(
        [step(60000.0), step(70000.0), step(1.0)],
        [Stepped::Taken, Stepped::Skipped, Stepped::Taken]
    );
    assert_eq!(scaler.scale, 0.25);
}

pub(crate) fn frozen_variables_are_equal_but_have_no_part_in_training(group: &dyn Group) {
    let (vars, var) = variables(&[("head", 1, DType::F32), ("stem", 2, DType::F32)]);
    var[1].set(&cpu(&[group.rank() as f32, f32::MAX])).unwrap();
    let replicas = Replicas::new(group, &vars).unwrap();
    let replicas = replicas.freeze(|name| name == "stem").clip(2.0).unwrap();
    // Those of rank 0.
    assert_eq!(values(&var[1]), [0.0, f64::from(f32::MAX)]);
    let trained = replicas.variables();
    assert_eq!(trained.len(), 1);
    let mut sgd = SGD::new(trained, 1.0).unwrap();
    let mut scaler = LossScaler::new(2.0).unwrap();
    // The gradient of the stem overflows; that of the head is 1, below the limit.
    let loss = (var[0].sum_all().unwrap()
        + (var[1].sqr().unwrap() * 2.0).unwrap().sum_all().unwrap())
    .unwrap();
    let stepped = replicas.scaled_step(&mut scaler, &loss, 1, &mut sgd);
    assert_eq!(stepped.unwrap(), Stepped::Taken);
    assert_eq!(values(&var[0]), [0.0]);
    assert_eq!(values(&var[1]), [0.0, f64::from(f32::MAX)]);
    // Not even in an optimiser that has them, though their gradients differ by rank.
    let (vars, var) = variables(&[("head", 1, DType::F32), ("stem", 2, DType::F32)]);
    let replicas = Replicas::new(group, &vars).unwrap();
    let replicas = replicas.freeze(|name| name == "stem");
    let mut sgd = SGD::new(vars.all_vars(), 0.5).unwrap();
    let loss = || {
        let read = (var[0].sum_all().unwrap() + var[1].sum_all().unwrap()).unwrap();
        (read * (1.0 + group.rank() as f64)).unwrap()
    };
    replicas.backward_step(&loss(), 1, &mut sgd).unwrap();
    let stepped = replicas.scaled_step(&mut scaler, &loss(), 1, &mut sgd);
    assert_eq!(stepped.unwrap(), Stepped::Taken);
    assert_eq!(values(&var[1]), [1.0, 1.0]);
    assert_eq!(replicas.spread().unwrap(), 0.0);
    let mut grads = loss().backward().unwrap();
    replicas.average(&mut grads, 1).unwrap();
    assert!(grads.get(&var[0]).is_some() && grads.get(&var[1]).is_none());
    // Who freezes again freezes more.
    assert!(replicas
        .freeze(|name| name == "head")
        .variables()
        .is_empty());
}

pub(crate) fn a_rank_without_rows_has_no_part_in_gradients(group: &dyn Group) {
    let (vars, var) = variables(&[("u", 2, DType::F32), ("w", 3, DType::F32)]);
    let (u, w) = (&var[0], &var[1]);
    let replicas = Replicas::new(group, &vars).unwrap();
    let parameters = ParamsAdamW {
        weight_decay: 0.5,
        ..Default::default()
    };
    let mut adam = AdamW::new(replicas.variables(), parameters).unwrap();
    let mut scaler = LossScaler::new(8.0).unwrap();
    let idle = group.rank() > 0 && group.rank() == group.size() - 1;
    let rows = usize::from(!idle);
    // Only the rank without rows reads u.
    let loss = || match idle {
        true => (u.sum_all().unwrap() + (w.sum_all().unwrap() * 100.0).unwrap()).unwrap(),
        false => w.sum_all().unwrap(),
    };
    let before = bits(u);
    replicas.backward_step(&loss(), rows, &mut adam).unwrap();
    let stepped = replicas.scaled_step(&mut scaler, &loss(), rows, &mut adam);
    assert_eq!(stepped.unwrap(), Stepped::Taken);
    assert_eq!(bits(u), before);
    assert_eq!(replicas.spread().unwrap(), 0.0);
    let mut grads = loss().backward().unwrap();
    replicas.average(&mut grads, rows).unwrap();
    assert!(grads.get(u).is_none());
    let of_w = values(grads.get(w).unwrap());
    let u = 2.0 * U_F32 * group.size() as f64;
    assert!(of_w.iter().all(|x| (x - 1.0).abs() <= u), "{of_w:?}");
}

/// A group of threads of one process, by which all that does not depend on messages is tested quickly.
pub(crate) struct Threads {
    rank: usize,
    meeting: Arc<Meeting>,
}

struct Meeting {
    size: usize,
    table: Mutex<Table>,
    all_here: Condvar,
}

#[derive(Default)]
struct Table {
    brought: Vec<Option<Tensor>>,
    taken: usize,
    gone: Option<GroupDefect>,
}

impl Threads {
    /// Runs one function on so many ranks.
    pub(crate) fn run(size: usize, body: impl Fn(&dyn Group) + Sync) {
        let meeting = Arc::new(Meeting {
            size,
            table: Mutex::new(Table {
                brought: vec![None; size],
                ..Default::default()
            }),
            all_here: Condvar::new(),
        });
        std::thread::scope(|scope| {
            for rank in 0..size {
                let (meeting, body) = (meeting.clone(), &body);
                scope.spawn(move || {
                    let group = Threads { rank, meeting };
                    body(&group);
                });
            }
        });
    }

    /// What every rank has brought.
    fn meet(&self, x: &Tensor) -> Result<Vec<Tensor>> {
        let meeting = &*self.meeting;
        let wait = |table| meeting.all_here.wait(table).unwrap();
        let mut table = meeting.table.lock().unwrap();
        let gone = |table: &Table| table.gone.clone().map_or(Ok(()), |g| Err(Error::from(g)));
        // The last meeting is still on.
        while table.taken > 0 {
            table = wait(table);
        }
        gone(&table)?;
        table.brought[self.rank] = Some(x.detach());
        meeting.all_here.notify_all();
        while table.brought.iter().any(Option::is_none) {
            gone(&table)?;
            table = wait(table);
        }
        let all = table.brought.iter().flatten().cloned().collect();
        table.taken += 1;
        if table.taken == meeting.size {
            table.taken = 0;
            table.brought.fill(None);
        }
        meeting.all_here.notify_all();
        // Nobody brings something new before all have taken.
        while table.taken > 0 {
            table = wait(table);
        }
        Ok(all)
    }
}

impl Drop for Threads {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.give_up("it panicked");
        }
    }
}

impl Group for Threads {
    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.meeting.size
    }

    fn sum(&self, x: &Tensor) -> Result<Tensor> {
        Alone.sum(x)?;
        let all = self.meet(x)?;
        let wide = |x: &Tensor| match x.dtype() {
            DType::BF16 => x.to_dtype(DType::F32),
            _ => Ok(x.clone()),
        };
        let mut sum = wide(&all[0])?;
        for x in &all[1..] {
            sum = (sum + wide(x)?)?;
        }
        Ok(sum.to_dtype(x.dtype())?)
    }

    fn max(&self, x: &Tensor) -> Result<Tensor> {
        Alone.max(x)?;
        let all = self.meet(x)?;
        let more = all[1..]
            .iter()
            .try_fold(all[0].clone(), |a, b| a.maximum(b));
        Ok(more?)
    }

    fn broadcast(&self, x: &Tensor, root: usize) -> Result<Tensor> {
        Alone.broadcast(x, 0)?;
        if root >= self.size() {
            return Err(GroupDefect::NoSuchRank {
                rank: root,
                size: self.size(),
            }
            .into());
        }
        Ok(self.meet(x)?[root].clone())
    }

    fn barrier(&self) -> Result<()> {
        self.meet(&cpu(0f32)).map(drop)
    }

    fn give_up(&self, reason: &str) {
        let mut table = self.meeting.table.lock().unwrap_or_else(|e| e.into_inner());
        let (rank, reason) = (self.rank, reason.to_owned());
        table.gone.get_or_insert(GroupDefect::Left { rank, reason });
        self.meeting.all_here.notify_all();
    }
}
