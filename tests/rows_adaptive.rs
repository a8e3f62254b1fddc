//! Adaptive steps of every row by itself, tile by tile: held against the row alone, against the same steps taken as
//! fixed ones on the general path, and against control of the whole batch.
//!
//! `cargo test --release --test rows_adaptive`.

mod common;

use candle_core::{DType, Device, IndexOp, Tensor, Var};
use candle_diffeq::error::{AdaptiveDefect, Error, StopReason};
use candle_diffeq::metrics::{Recorder, Stats};
use candle_diffeq::nn::{
    Activation, Cnf, ConvField, Hutchinson, Mlp, OtFlow, Relaxation, RowSpeed,
};
use candle_diffeq::options::{
    Adaptive, Checkpoint, Controller, OnFailure, Output, StepControl, Steps,
};
use candle_diffeq::tableau::{Tableau, BOSH3, DOPRI5, DOPRI8, FEHLBERG45, RK4, TSIT5};
use candle_diffeq::{NeuralOde, OdeOptions, Precision, State};
use candle_nn::{VarBuilder, VarMap};
use common::{all, bits, fill, relative, scattered, values, U_F64};

/// Whether the process has no vector unit, so that rows cannot have steps of their own.
fn without_tiles() -> bool {
    !common::has_tiles()
}

const PAIRS: [Tableau; 5] = [BOSH3, FEHLBERG45, DOPRI5, TSIT5, DOPRI8];

#[derive(Clone, Copy, Debug, PartialEq)]
enum Kind {
    Mlp,
    Timed,
    Cnf,
    /// Three hidden layers.
    Deep,
    /// With an estimated trace.
    Estimated,
    /// A perceptron to which the state relaxes, at the speed of the row.
    Speed,
    /// A flow to which the state relaxes.
    Relaxed,
    Conv,
    /// With its costs.
    Potential,
    /// Not bounded: large states move without bounds.
    Relu,
}

const KINDS: [Kind; 9] = [
    Kind::Mlp,
    Kind::Timed,
    Kind::Cnf,
    Kind::Deep,
    Kind::Estimated,
    Kind::Speed,
    Kind::Relaxed,
    Kind::Conv,
    Kind::Potential,
];

/// Where each row begins: the later ones move faster.
fn start(kind: Kind, rows: usize, dtype: DType) -> Vec<Tensor> {
    let shapes: &[&[usize]] = match kind {
        Kind::Mlp | Kind::Timed | Kind::Relu => &[&[3]],
        Kind::Cnf | Kind::Deep | Kind::Speed | Kind::Relaxed => &[&[3], &[1]],
        Kind::Estimated => &[&[3], &[1], &[3]],
        Kind::Conv => &[&[2, 3, 2]],
        Kind::Potential => &[&[3], &[3]],
    };
    let leaf = |(i, shape): (usize, &&[usize])| {
        let x = scattered(&[&[rows], *shape].concat(), 1.5, 11 + i);
        x.to_dtype(dtype).unwrap()
    };
    shapes.iter().enumerate().map(leaf).collect()
}

/// What comes out of a solve: states by leaf, gradients of Σ v y of y0 by leaf and of the weights, or of none.
struct Answers {
    states: Vec<Tensor>,
    y0: Vec<Tensor>,
    weights: Vec<Tensor>,
    stats: Stats,
}

const TIMES: [f64; 6] = [0.0, 0.11, 0.45, 0.5, 1.3, 2.0];

fn adaptive(rtol: f64, atol: f64) -> Adaptive {
    Adaptive::new(rtol, atol)
        .control(StepControl::Rows)
        .step_on_outputs(false)
}

fn options(method: &Tableau, adaptive: Adaptive) -> OdeOptions {
    OdeOptions {
        method: method.clone(),
        steps: Steps::Adaptive(adaptive),
        ..Default::default()
    }
}

fn solve(
    kind: Kind,
    y0: &[Tensor],
    times: &[f64],
    options: &OdeOptions,
) -> candle_diffeq::Result<Answers> {
    let (vars, dtype) = (VarMap::new(), y0[0].dtype());
    let tanh = Activation::Tanh;
    match kind {
        Kind::Mlp | Kind::Timed | Kind::Relu => {
            let build = move |vb: VarBuilder<'_>| match kind {
                Kind::Mlp => Mlp::new(&[3, 12, 9, 3], tanh, vb),
                Kind::Relu => Mlp::new(&[3, 12, 9, 3], Activation::Relu, vb),
                _ => Mlp::with_time(&[3, 12, 9, 3], tanh, vb),
            };
            let ode = NeuralOde::from_field(&vars, "", dtype, &Device::Cpu, build)?;
            run::<Tensor>(ode, &vars, y0, times, options)
        }
        Kind::Speed => {
            let build = move |vb: VarBuilder<'_>| {
                let mlp = Mlp::new(&[3, 12, 9, 3], tanh, vb)?;
                Ok(RowSpeed::new(Relaxation::new(mlp)))
            };
            let ode = NeuralOde::from_field(&vars, "", dtype, &Device::Cpu, build)?;
            run::<(Tensor, Tensor)>(ode, &vars, y0, times, options)
        }
        Kind::Relaxed => {
            let build = move |vb: VarBuilder<'_>| {
                let mlp = Mlp::with_time(&[3, 12, 9, 3], tanh, vb)?;
                Ok(Relaxation::new(Cnf::new(mlp)?))
            };
            let ode = NeuralOde::from_field(&vars, "", dtype, &Device::Cpu, build)?;
            run::<(Tensor, Tensor)>(ode, &vars, y0, times, options)
        }
        Kind::Cnf | Kind::Deep => {
            let widths: &[usize] = match kind {
                Kind::Deep => &[3, 9, 8, 7, 3],
                _ => &[3, 12, 9, 3],
            };
            let build = move |vb: VarBuilder<'_>| {
                Cnf::new(Mlp::with_time(widths, Activation::Softplus, vb)?)
            };
            let ode = NeuralOde::from_field(&vars, "", dtype, &Device::Cpu, build)?;
            run::<(Tensor, Tensor)>(ode, &vars, y0, times, options)
        }
        Kind::Estimated => {
            let build = move |vb: VarBuilder<'_>| {
                let mlp = Mlp::with_time(&[3, 12, 9, 3], Activation::Softplus, vb)?;
                Ok(Hutchinson::new(mlp))
            };
            let ode = NeuralOde::from_field(&vars, "", dtype, &Device::Cpu, build)?;
            run::<(Tensor, Tensor, Tensor)>(ode, &vars, y0, times, options)
        }
        Kind::Potential => {
            let build = move |vb: VarBuilder<'_>| OtFlow::new(3, 12, 2, vb);
            let ode = NeuralOde::from_field(&vars, "", dtype, &Device::Cpu, build)?;
            run::<(Tensor, Tensor)>(ode, &vars, y0, times, options)
        }
        Kind::Conv => {
            let build = move |vb: VarBuilder<'_>| ConvField::new(&[2, 3, 2], 3, tanh, vb);
            let ode = NeuralOde::from_field(&vars, "", dtype, &Device::Cpu, build)?;
            run::<Tensor>(ode, &vars, y0, times, options)
        }
    }
}

fn run<S: State + 'static>(
    ode: NeuralOde<S>,
    vars: &VarMap,
    y0: &[Tensor],
    times: &[f64],
    options: &OdeOptions,
) -> candle_diffeq::Result<Answers> {
    fill(vars);
    for (name, var) in all(vars) {
        var.set(&(var.as_tensor() * 1.5)?)?;
        if name == "c" {
            // Of a potential: ∂Φ/∂t − ½‖∇Φ‖² is far from its kink at 0, where gradients depend on each step length.
            let of_x = var.narrow(0, 0, var.elem_count() - 1)?;
            let of_time = Tensor::full(-40f32, 1, &Device::Cpu)?.to_dtype(var.dtype())?;
            var.set(&Tensor::cat(&[of_x, of_time], 0)?)?;
        }
    }
    let recorder = Recorder::tracing();
    let ode = ode.options(OdeOptions {
        recorder: Some(recorder.clone()),
        ..options.clone()
    });
    let y0: Vec<_> = y0.iter().map(|y| Var::from_tensor(y).unwrap()).collect();
    let start = S::from_leaves(y0.iter().map(|y| y.as_tensor().clone()).collect())?;
    let states = ode.solve(&start, times)?.leaves();
    let (mut gradients, mut weights) = (vec![], vec![]);
    if options.checkpoint != Checkpoint::Nothing {
        let mut loss = Tensor::zeros((), states[0].dtype(), &Device::Cpu)?;
        for (i, y) in states.iter().enumerate() {
            // Of every row and output another weight, that does not depend on the number of rows.
            let rank = y.rank();
            let v = scattered(&y.dims()[rank - 1..], 1.0, 5 + i).to_dtype(y.dtype())?;
            loss = (loss + y.sqr()?.broadcast_mul(&v)?.sum_all()?)?;
        }
        let grads = loss.backward()?;
        gradients = y0.iter().map(|y| grads.get(y).unwrap().clone()).collect();
        let of = |(_, var): &(String, Var)| grads.get(var).unwrap().clone();
        weights = all(vars).iter().map(of).collect();
    }
    Ok(Answers {
        states,
        y0: gradients,
        weights,
        stats: recorder.take(),
    })
}

/// Some rows of a batch.
fn rows(y0: &[Tensor], which: &[u32]) -> Vec<Tensor> {
    let which = Tensor::new(which, &Device::Cpu).unwrap();
    let of = |y: &Tensor| y.index_select(&which, 0).unwrap();
    y0.iter().map(of).collect()
}

/// The bits of one row of states and gradients.
fn row_bits(answers: &Answers, row: usize) -> Vec<Vec<u64>> {
    let state = |y: &Tensor| bits(&y.i((.., row)).unwrap());
    let gradient = |y: &Tensor| bits(&y.i(row).unwrap());
    let states = answers.states.iter().map(state);
    states.chain(answers.y0.iter().map(gradient)).collect()
}

fn on_threads<R: Send>(threads: usize, f: impl FnOnce() -> R + Send) -> R {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build();
    pool.unwrap().install(f)
}

#[test]
fn a_row_is_solved_as_if_it_were_alone_to_the_bit() {
    if without_tiles() {
        return;
    }
    let precisions = [
        (DType::F32, None, 1e-5),
        (DType::F64, None, 1e-5),
        (DType::F32, Some(Precision::f16()), 1e-3),
        (DType::F32, Some(Precision::bf16()), 1e-2),
    ];
    // Of how many the rows take different numbers of steps.
    let mut differing = 0;
    for (dtype, precision, rtol) in precisions {
        for kind in KINDS {
            let y0 = start(kind, 200, dtype);
            let options = OdeOptions {
                precision,
                ..options(&DOPRI5, adaptive(rtol, 0.01 * rtol))
            };
            let whole = on_threads(7, || solve(kind, &y0, &TIMES, &options).unwrap());
            let again = on_threads(1, || solve(kind, &y0, &TIMES, &options).unwrap());
            for (a, b) in whole.weights.iter().zip(&again.weights) {
                assert_eq!(bits(a), bits(b), "{kind:?} {dtype:?}: threads");
            }
            let accepted: Vec<_> = whole.stats.rows.iter().map(|row| row.accepted).collect();
            differing += usize::from(accepted.iter().any(|steps| *steps != accepted[0]));
            let backwards: Vec<u32> = (0..200).rev().collect();
            for which in [
                &[0][..],
                &[7],
                &[199],
                &[3, 150],
                &[9, 8, 7, 6, 5],
                &backwards[50..120],
                &backwards,
            ] {
                let part = solve(kind, &rows(&y0, which), &TIMES, &options).unwrap();
                for (at, &row) in which.iter().enumerate() {
                    let (ours, theirs) = (row_bits(&part, at), row_bits(&whole, row as usize));
                    assert_eq!(
                        ours,
                        theirs,
                        "{kind:?} {dtype:?} row {row} of {}",
                        which.len()
                    );
                    assert_eq!(part.stats.rows[at], whole.stats.rows[row as usize]);
                }
            }
        }
    }
    assert!(
        2 * differing > precisions.len() * KINDS.len(),
        "{differing}"
    );
}

#[test]
fn in_f16_the_gradient_of_a_row_scales_with_its_loss_whatever_the_loss_of_other_rows() {
    if without_tiles() {
        return;
    }
    let vars = VarMap::new();
    let build = |vb: VarBuilder<'_>| Mlp::with_time(&[3, 12, 9, 3], Activation::Tanh, vb);
    let ode = NeuralOde::from_field(&vars, "", DType::F32, &Device::Cpu, build).unwrap();
    fill(&vars);
    let ode = ode.options(OdeOptions {
        precision: Some(Precision::f16()),
        ..options(&DOPRI5, adaptive(1e-3, 1e-5))
    });
    // The weight of the first row is 1, that of the last one 2^-80: one scale for both does not fit into f16.
    let weights: Vec<f32> = (0..41).map(|row| 2f32.powi(-2 * row)).collect();
    let weights = Tensor::from_vec(weights, (41, 1), &Device::Cpu).unwrap();
    let gradient = |w: &Tensor| {
        let y0 = Var::from_tensor(&start(Kind::Timed, 41, DType::F32)[0]).unwrap();
        let y = ode.solve(y0.as_tensor(), &TIMES).unwrap();
        let loss = y.sqr().unwrap().broadcast_mul(w).unwrap().sum_all();
        let grads = loss.unwrap().backward().unwrap();
        grads.get(&y0).unwrap().clone()
    };
    let equal = gradient(&weights.ones_like().unwrap());
    let ours = gradient(&weights).broadcast_div(&weights).unwrap();
    assert_eq!(bits(&ours), bits(&equal));
}

/// Heun's method with Euler's as the embedded one: its last stage is not the first one of the next step, which is
/// therefore appended, and neither pair nor interpolant gives that stage a weight.
fn own_pair() -> Tableau {
    let heun = Tableau::new(
        "own",
        2,
        vec![vec![], vec![1.0]],
        vec![0.5, 0.5],
        vec![0.0, 1.0],
    );
    let pair = heun.unwrap().with_embedded(vec![1.0, 0.0]).unwrap();
    pair.with_interpolant(vec![vec![1.0, -0.5], vec![0.0, 0.5]])
        .unwrap()
}

#[test]
fn one_row_is_solved_as_a_batch_of_one_is() {
    if without_tiles() {
        return;
    }
    for method in PAIRS.iter().chain([&own_pair()]) {
        for kind in KINDS {
            for row in [0, 5] {
                let y0 = rows(&start(kind, 8, DType::F64), &[row]);
                let ours =
                    solve(kind, &y0, &TIMES, &options(method, adaptive(1e-5, 1e-7))).unwrap();
                let batch = adaptive(1e-5, 1e-7).control(StepControl::Batch);
                let theirs = solve(kind, &y0, &TIMES, &options(method, batch)).unwrap();
                let name = method.name();
                assert_eq!(ours.stats.steps, theirs.stats.steps, "{name} {kind:?}");
                assert_eq!(
                    ours.stats.rejected, theirs.stats.rejected,
                    "{name} {kind:?}"
                );
                assert_eq!(
                    ours.stats.evaluations, theirs.stats.evaluations,
                    "{name} {kind:?}"
                );
                let all = |answers: Answers| [answers.states, answers.y0, answers.weights].concat();
                for (x, y) in all(ours).iter().zip(all(theirs)) {
                    let error = relative(x, &y);
                    // Lengths follow from errors of 1e-7, which have nine digits.
                    assert!(error <= 1e-8, "{name} {kind:?} {error:e}");
                }
            }
        }
    }
}

#[test]
fn gradients_are_those_of_the_accepted_steps_of_every_row() {
    if without_tiles() {
        return;
    }
    for method in &PAIRS {
        for (kind, times) in KINDS
            .into_iter()
            .flat_map(|k| [(k, TIMES), (k, TIMES.map(|t| 1.0 - t))])
        {
            if kind == Kind::Estimated && method.name() != DOPRI5.name() {
                // Its general path has no pull-back written by hand, and takes minutes.
                continue;
            }
            let y0 = start(kind, 37, DType::F64);
            let control = adaptive(1e-4, 1e-6).jump_t([0.77]);
            let ours = solve(kind, &y0, &times, &options(method, control.clone())).unwrap();
            let mut weights: Vec<Tensor> = vec![];
            for row in 0..37u32 {
                let alone = rows(&y0, &[row]);
                let at = &ours.stats.rows[row as usize].times;
                let fixed = OdeOptions {
                    method: method.clone(),
                    steps: Steps::At(at.clone()),
                    fusion: false,
                    ..Default::default()
                };
                let theirs = solve(kind, &alone, &times, &fixed).unwrap();
                let of = |ours: &[Tensor], dim: usize| -> Vec<Tensor> {
                    let row = |y: &Tensor| y.narrow(dim, row as usize, 1).unwrap();
                    ours.iter().map(row).collect()
                };
                let states = of(&ours.states, 1);
                let gradients = of(&ours.y0, 0);
                for (x, y) in states
                    .iter()
                    .zip(&theirs.states)
                    .chain(gradients.iter().zip(&theirs.y0))
                {
                    let error = relative(x, y);
                    assert!(
                        error <= 1e-12,
                        "{} {kind:?} row {row}: {error:e}",
                        method.name()
                    );
                }
                weights = match weights.is_empty() {
                    true => theirs.weights,
                    false => weights
                        .iter()
                        .zip(&theirs.weights)
                        .map(|(a, b)| (a + b).unwrap())
                        .collect(),
                };
            }
            for (x, y) in ours.weights.iter().zip(&weights) {
                let error = relative(x, y);
                assert!(error <= 1e-12, "{} {kind:?}: {error:e}", method.name());
            }
        }
    }
}

#[test]
fn gradients_have_the_same_bits_whatever_is_kept() {
    if without_tiles() {
        return;
    }
    for method in [DOPRI5, FEHLBERG45] {
        let y0 = start(Kind::Timed, 45, DType::F32);
        let run = |checkpoint| {
            let options = OdeOptions {
                checkpoint,
                ..options(&method, adaptive(1e-6, 1e-7))
            };
            solve(Kind::Timed, &y0, &TIMES, &options).unwrap()
        };
        let whole = run(Checkpoint::All);
        let bytes = 45 * 3 * 4;
        for checkpoint in [
            Checkpoint::Every(1),
            Checkpoint::Every(5),
            Checkpoint::States(1),
            Checkpoint::States(3),
            Checkpoint::States(1000),
            Checkpoint::Bytes(3 * bytes),
        ] {
            let part = run(checkpoint);
            for (a, b) in part
                .y0
                .iter()
                .chain(&part.weights)
                .zip(whole.y0.iter().chain(&whole.weights))
            {
                assert_eq!(bits(a), bits(b), "{checkpoint:?}");
            }
            match checkpoint {
                Checkpoint::States(n) => assert!(part.stats.states_kept <= n),
                Checkpoint::Bytes(n) => assert!(part.stats.bytes_kept <= n),
                _ => {}
            }
        }
        let nothing = run(Checkpoint::Nothing);
        assert_eq!(bits(&nothing.states[0]), bits(&whole.states[0]));
    }
}

#[test]
fn lanes_that_are_done_take_other_rows() {
    if without_tiles() {
        return;
    }
    let y0 = start(Kind::Mlp, 800, DType::F32);
    let alike = rows(&y0, &[0; 1024]);
    let options = OdeOptions {
        checkpoint: Checkpoint::Nothing,
        ..options(&DOPRI5, adaptive(1e-5, 1e-7))
    };
    let Stats {
        row_evaluations,
        tile_evaluations,
        evaluations,
        rows,
        ..
    } = solve(Kind::Mlp, &y0, &[0.0, 2.0], &options).unwrap().stats;
    assert_eq!(
        rows.iter().map(|row| row.evaluations).sum::<usize>(),
        row_evaluations
    );
    assert_eq!(
        rows.iter().map(|row| row.evaluations).max().unwrap(),
        evaluations
    );
    let used = row_evaluations as f64 / tile_evaluations as f64;
    // Of rows that are alike, all lanes are always in use.
    let stats = solve(Kind::Mlp, &alike, &[0.0, 2.0], &options).unwrap();
    let Stats {
        row_evaluations,
        tile_evaluations,
        ..
    } = stats.stats;
    let lanes = (row_evaluations as f64 / tile_evaluations as f64).round();
    assert!([4.0, 8.0, 16.0, 32.0].contains(&lanes), "{lanes}");
    println!("{used} of {lanes} lanes");
    assert!(used >= 0.75 * lanes, "{used} of {lanes} lanes");
}

#[test]
fn outputs_inside_fixed_steps_are_those_of_the_general_path() {
    if without_tiles() {
        return;
    }
    for method in [RK4, DOPRI5, DOPRI8] {
        for kind in KINDS {
            for (rows, checkpoint) in [(3, Checkpoint::All), (70, Checkpoint::States(2))] {
                let y0 = start(kind, rows, DType::F64);
                let fixed = |fusion| OdeOptions {
                    method: method.clone(),
                    steps: Steps::At(vec![0.3, 0.7, 1.2]),
                    fusion,
                    checkpoint,
                    ..Default::default()
                };
                let ours = solve(kind, &y0, &TIMES, &fixed(true)).unwrap();
                let theirs = solve(kind, &y0, &TIMES, &fixed(false)).unwrap();
                assert_eq!(ours.stats.evaluations, theirs.stats.evaluations);
                assert_eq!(ours.stats.vjps, theirs.stats.vjps);
                let all = |answers: Answers| [answers.states, answers.y0, answers.weights].concat();
                for (x, y) in all(ours).iter().zip(all(theirs)) {
                    let error = relative(x, &y);
                    assert!(error <= 1e-12, "{} {kind:?} {error:e}", method.name());
                }
            }
        }
    }
}

#[test]
fn low_precision_takes_no_steps_that_bring_nothing() {
    if without_tiles() {
        return;
    }
    for precision in [Precision::bf16(), Precision::f16()] {
        let y0 = start(Kind::Timed, 64, DType::F32);
        let of = |rtol: f64| {
            let options = OdeOptions {
                precision: Some(precision),
                ..options(&DOPRI5, adaptive(rtol, rtol / 100.0))
            };
            solve(Kind::Timed, &y0, &TIMES, &options).unwrap()
        };
        let (loose, tight) = (of(1e-3), of(1e-8));
        assert!(tight.stats.row_evaluations <= 3 * loose.stats.row_evaluations);
        let attempts: usize = tight
            .stats
            .rows
            .iter()
            .map(|r| r.accepted + r.rejected)
            .sum();
        let rejected: usize = tight.stats.rows.iter().map(|r| r.rejected).sum();
        assert!(5 * rejected <= attempts, "{rejected} of {attempts}");
        assert!(tight.stats.limited > 0);
        let single = solve(
            Kind::Timed,
            &y0,
            &TIMES,
            &options(&DOPRI5, adaptive(1e-6, 1e-8)),
        )
        .unwrap();
        let u = if precision == Precision::bf16() {
            2f64.powi(-8)
        } else {
            2f64.powi(-11)
        };
        for (x, y) in tight
            .states
            .iter()
            .chain(&tight.y0)
            .chain(&tight.weights)
            .zip(
                single
                    .states
                    .iter()
                    .chain(&single.y0)
                    .chain(&single.weights),
            )
        {
            let error = relative(x, y);
            assert!(error <= 16.0 * u, "{precision:?} {error:e}");
        }
    }
}

#[test]
fn a_row_that_fails_leaves_the_others_alone() {
    if without_tiles() {
        return;
    }
    let y0 = start(Kind::Mlp, 50, DType::F64);
    let fine = solve(
        Kind::Mlp,
        &y0,
        &TIMES,
        &options(&DOPRI5, adaptive(1e-5, 1e-7)),
    )
    .unwrap();
    let most = fine.stats.rows.iter().map(|r| r.accepted + r.rejected);
    let limit = most.clone().max().unwrap() - 1;
    let fails: Vec<_> = most.map(|attempts| attempts > limit).collect();
    let first = fails.iter().position(|fails| *fails).unwrap();
    let stopped = adaptive(1e-5, 1e-7).max_steps(limit);
    match solve(Kind::Mlp, &y0, &TIMES, &options(&DOPRI5, stopped.clone())) {
        Err(Error::Stopped(stopped)) => {
            assert_eq!(stopped.reason, StopReason::Attempts { max_steps: limit });
            assert_eq!(stopped.worst.unwrap().row, first);
            assert_eq!(stopped.states[0].dims(), [stopped.outputs, 1, 3]);
        }
        other => panic!("{:?}", other.err()),
    }
    let options = options(&DOPRI5, stopped.on_failure(OnFailure::Nan));
    let nan = solve(Kind::Mlp, &y0, &TIMES, &options).unwrap();
    for (row, &fails) in fails.iter().enumerate() {
        assert_eq!(nan.stats.rows[row].stopped.is_some(), fails);
        let gradient = values(&nan.y0[0].i(row).unwrap());
        if fails {
            let last = values(&nan.states[0].i((TIMES.len() - 1, row)).unwrap());
            assert!(last.iter().all(|x| x.is_nan()));
            assert!(gradient.iter().all(|x| *x == 0.0));
            let first = nan.states[0].i((0, row)).unwrap();
            assert_eq!(bits(&first), bits(&y0[0].i(row).unwrap()));
        } else {
            assert_eq!(row_bits(&nan, row), row_bits(&fine, row));
        }
    }
    assert!(nan.weights.iter().flat_map(values).all(f64::is_finite));
}

#[test]
fn of_all_rows_that_fail_the_first_is_the_error() {
    if without_tiles() {
        return;
    }
    // All rows need several steps; lanes take those with short first steps first, wherever they are in the batch.
    for rows in [1, 5, 20, 50] {
        let y0 = start(Kind::Mlp, rows, DType::F64);
        let stopped = adaptive(1e-9, 1e-9).max_steps(1);
        match solve(Kind::Mlp, &y0, &TIMES, &options(&DOPRI5, stopped)) {
            Err(Error::Stopped(stopped)) => assert_eq!(stopped.worst.unwrap().row, 0),
            other => panic!("{:?}", other.err()),
        }
    }
}

#[test]
fn rows_that_are_asked_for_and_cannot_be_had_are_an_error() {
    if without_tiles() {
        return;
    }
    let y0 = start(Kind::Mlp, 5, DType::F64);
    let options = OdeOptions {
        fusion: false,
        ..options(&DOPRI5, adaptive(1e-5, 1e-7))
    };
    let error = solve(Kind::Mlp, &y0, &TIMES, &options).err();
    assert!(matches!(
        error,
        Some(Error::Adaptive(AdaptiveDefect::NoRows { row_wise: true }))
    ));
}

#[test]
fn the_final_state_alone_takes_the_same_steps() {
    if without_tiles() {
        return;
    }
    let y0 = start(Kind::Cnf, 20, DType::F64);
    for method in &PAIRS {
        let all = options(method, adaptive(1e-5, 1e-7));
        let last = OdeOptions {
            output: Output::Final,
            ..all.clone()
        };
        let all = solve(Kind::Cnf, &y0, &TIMES, &all).unwrap();
        let last = solve(Kind::Cnf, &y0, &TIMES, &last).unwrap();
        for (a, b) in all.states.iter().zip(&last.states) {
            assert_eq!(bits(&a.i(TIMES.len() - 1).unwrap()), bits(b));
        }
    }
}

/// Options that Batch and Rows follow in the same way.
fn variants() -> Vec<Adaptive> {
    let plain = || adaptive(1e-5, 1e-7);
    vec![
        plain().step_t([0.3, 0.8, 7.0]).jump_t([1.1]),
        plain().jump_t([0.2, 0.21, 1.7]),
        plain().step_on_outputs(true),
        plain().first_step(1e-3),
        plain().max_step(0.04),
        plain().min_step(0.02),
        plain().controller(Controller::PI),
        plain().noise_floor(false),
        adaptive(0.0, 1e-6),
        adaptive(1e-4, 0.0),
    ]
}

#[test]
fn every_option_means_for_a_row_what_it_means_for_a_batch() {
    if without_tiles() {
        return;
    }
    let times = [TIMES, TIMES.map(|t| 2.0 - t)];
    for (method, times) in [DOPRI5, FEHLBERG45, BOSH3]
        .iter()
        .zip([times[0], times[1], times[0]])
    {
        for variant in variants() {
            let y0 = rows(&start(Kind::Timed, 8, DType::F64), &[3]);
            let batch = options(method, variant.clone().control(StepControl::Batch));
            let ours = solve(Kind::Timed, &y0, &times, &options(method, variant.clone())).unwrap();
            let theirs = solve(Kind::Timed, &y0, &times, &batch).unwrap();
            let counts = |s: &Stats| (s.steps, s.rejected, s.forced, s.limited, s.evaluations);
            let name = format!("{} {variant:?}", method.name());
            assert_eq!(counts(&ours.stats), counts(&theirs.stats), "{name}");
            let (ours_t, theirs_t) = (&ours.stats.rows[0].times, &theirs.stats.step_times);
            let most = ours_t.iter().zip(theirs_t).map(|(a, b)| (a - b).abs());
            let most = most.fold(0.0, f64::max);
            // The two paths add in another order.  In a first step whose error is far below the tolerance, say 1e-11 of h k,
            // roundings of 1e-16 h k are 1e-5 of the estimate, and 1e-6 of the next length (the ratio to the power 1/5 to 1/7).  The
            // solution hardly depends on these lengths.
            assert!(most <= 1e-6, "{name} {most:e}");
            for (x, y) in ours
                .states
                .iter()
                .chain(&ours.y0)
                .zip(theirs.states.iter().chain(&theirs.y0))
            {
                let error = relative(x, y);
                assert!(error <= 1e-8, "{name} {error:e}");
            }
        }
    }
}

#[test]
fn a_tolerance_of_each_element_is_that_of_its_row() {
    if without_tiles() {
        return;
    }
    let y0 = start(Kind::Mlp, 40, DType::F64);
    let rtol: Vec<f64> = (0..40)
        .flat_map(|row| [if row < 20 { 1e-3 } else { 1e-8 }; 3])
        .collect();
    let rtol = Tensor::from_vec(rtol, (40, 3), &Device::Cpu).unwrap();
    let mixed = Adaptive::new(rtol, 1e-9).control(StepControl::Rows);
    let mixed = solve(Kind::Mlp, &y0, &TIMES, &options(&DOPRI5, mixed)).unwrap();
    for (rtol, rows) in [(1e-3, 0..20), (1e-8, 20..40)] {
        let alike = adaptive(rtol, 1e-9);
        let alike = solve(Kind::Mlp, &y0, &TIMES, &options(&DOPRI5, alike)).unwrap();
        for row in rows {
            assert_eq!(row_bits(&mixed, row), row_bits(&alike, row));
        }
    }
}

#[test]
fn a_row_whose_field_is_no_number_from_the_start_is_not_the_others_affair() {
    if without_tiles() {
        return;
    }
    let y0 = start(Kind::Relu, 40, DType::F32);
    let bad = Tensor::new(&[[3e38f32, 3e38, 3e38]], &Device::Cpu).unwrap();
    let with_bad = y0[0].slice_assign(&[17..18, 0..3], &bad).unwrap();
    let control = adaptive(1e-3, 1e-3);
    match solve(
        Kind::Relu,
        std::slice::from_ref(&with_bad),
        &TIMES,
        &options(&DOPRI5, control.clone()),
    ) {
        Err(Error::NonFiniteVelocity {
            step: 0,
            stage: 0,
            t,
        }) => assert_eq!(t, 0.0),
        other => panic!("{:?}", other.err()),
    }
    let options = options(&DOPRI5, control.on_failure(OnFailure::Nan));
    let fine = solve(Kind::Relu, &y0, &TIMES, &options).unwrap();
    let nan = solve(Kind::Relu, &[with_bad], &TIMES, &options).unwrap();
    for row in 0..40 {
        if row == 17 {
            assert_eq!(nan.stats.rows[row].stopped, Some(StopReason::NonFinite));
            let after = nan.states[0].i((1.., row)).unwrap();
            assert!(values(&after).iter().all(|x| x.is_nan()));
        } else {
            assert_eq!(row_bits(&nan, row), row_bits(&fine, row));
        }
    }
}

#[test]
fn a_perceptron_converges_to_the_exact_flow() {
    if without_tiles() {
        return;
    }
    let file =
        candle_core::safetensors::load("tests/data/adaptive/08_mlp.safetensors", &Device::Cpu);
    let file = file.unwrap();
    let vars = VarMap::new();
    let build = |vb: VarBuilder<'_>| Mlp::with_time(&[3, 24, 24, 3], Activation::Tanh, vb);
    let ode = NeuralOde::<Tensor>::from_field(&vars, "", DType::F64, &Device::Cpu, build).unwrap();
    let theirs = |name: &str| {
        let (layer, tensor) = name.split_once('.').unwrap();
        format!("l{}.{tensor}", layer.parse::<usize>().unwrap() + 1)
    };
    for (name, var) in all(&vars) {
        var.set(&file[&format!("w.{}", theirs(&name))]).unwrap();
    }
    let ode = ode.options(options(&DOPRI5, adaptive(1e-10, 1e-12)));
    let y0 = Var::from_tensor(&file["y0"]).unwrap();
    let times: Vec<f64> = file["t"].to_vec1().unwrap();
    let ys = ode.solve(y0.as_tensor(), &times[..]).unwrap();
    assert!(relative(&ys, &file["traj"]) <= 1e-8);
    let last = ys.i(times.len() - 1).unwrap();
    let squares = (&last - &file["loss.target"])
        .unwrap()
        .sqr()
        .unwrap()
        .sum_all()
        .unwrap();
    let linear = (&ys * &file["loss.v"]).unwrap().sum_all().unwrap();
    let grads = (linear + (squares * 0.5).unwrap())
        .unwrap()
        .backward()
        .unwrap();
    assert!(relative(grads.get(&y0).unwrap(), &file["grad.y0"]) <= 1e-7);
    for (name, var) in all(&vars) {
        let exact = &file[&format!("grad.w.{}", theirs(&name))];
        assert!(relative(grads.get(&var).unwrap(), exact) <= 1e-7, "{name}");
    }
}

#[test]
fn the_states_at_all_steps_have_one_step_length_for_the_batch() {
    let y0 = start(Kind::Mlp, 9, DType::F64);
    let every = |adaptive: Adaptive| OdeOptions {
        output: Output::Steps,
        ..options(&DOPRI5, adaptive)
    };
    let error = solve(Kind::Mlp, &y0, &TIMES, &every(adaptive(1e-5, 1e-7)))
        .err()
        .unwrap();
    assert!(
        matches!(error, Error::Adaptive(AdaptiveDefect::StepsOfRows)),
        "{error}"
    );
    let unsaid = solve(Kind::Mlp, &y0, &TIMES, &every(Adaptive::new(1e-5, 1e-7))).unwrap();
    let batch = Adaptive::new(1e-5, 1e-7).control(StepControl::Batch);
    let batch = solve(Kind::Mlp, &y0, &TIMES, &every(batch)).unwrap();
    assert_eq!(bits(&unsaid.states[0]), bits(&batch.states[0]));
    assert_eq!(unsaid.states[0].dims(), [unsaid.stats.steps + 1, 9, 3]);
}

#[test]
fn the_states_at_all_fixed_steps_are_the_same_tile_by_tile() {
    for kind in KINDS {
        let y0 = start(kind, 21, DType::F64);
        let tiles = OdeOptions {
            output: Output::Steps,
            steps: Steps::PerInterval(3),
            ..Default::default()
        };
        let steps = OdeOptions {
            fusion: false,
            ..tiles.clone()
        };
        let ours = solve(kind, &y0, &TIMES, &tiles).unwrap();
        let theirs = solve(kind, &y0, &TIMES, &steps).unwrap();
        assert_eq!(ours.states[0].dim(0).unwrap(), 16);
        let all = |answers: Answers| [answers.states, answers.y0, answers.weights].concat();
        for (x, y) in all(ours).iter().zip(all(theirs)) {
            let error = relative(x, &y);
            assert!(error <= 1e-12, "{kind:?} {error:e}");
        }
    }
}

#[test]
fn evaluations_and_pull_backs_of_a_row_are_those_of_its_attempts() {
    if without_tiles() {
        return;
    }
    for (method, stages, appended) in [
        (BOSH3, 4, false),
        (DOPRI5, 7, false),
        (TSIT5, 7, false),
        (FEHLBERG45, 6, true),
        (DOPRI8, 13, true),
    ] {
        for first_step in [None, Some(1.5)] {
            let mut steps = adaptive(1e-8, 1e-8);
            if let Some(h) = first_step {
                steps = steps.first_step(h);
            }
            let y0 = start(Kind::Timed, 37, DType::F64);
            let options = options(&method, steps);
            let last_has_outputs = |times: &[f64]| {
                let before = times[times.len() - 2];
                TIMES.iter().any(|t| before < *t && *t < 2.0)
            };
            let whole = solve(Kind::Timed, &y0, &TIMES, &options).unwrap().stats;
            let mut sum = 0;
            for (i, row) in whole.rows.iter().enumerate() {
                let mut expected = 1 + usize::from(first_step.is_none());
                expected += (stages - 1) * (row.accepted + row.rejected);
                if appended {
                    expected += row.accepted - 1 + usize::from(last_has_outputs(&row.times));
                }
                assert_eq!(row.evaluations, expected, "{} row {i}", method.name());
                assert_eq!(row.times.len(), row.accepted + 1);
                sum += row.evaluations;
            }
            assert!(first_step.is_none() || whole.rejected > 0);
            assert_eq!(whole.row_evaluations, sum);
            let most = whole.rows.iter().map(|row| row.evaluations).max();
            assert_eq!(Some(whole.evaluations), most);
            // Backward, of a row alone: rejected attempts cost nothing.
            for row in [0, 11] {
                let alone = solve(Kind::Timed, &rows(&y0, &[row]), &TIMES, &options)
                    .unwrap()
                    .stats;
                let of_row = &alone.rows[0];
                assert_eq!(of_row, &whole.rows[row as usize]);
                let last = usize::from(last_has_outputs(&of_row.times));
                let of_step = stages - usize::from(!appended);
                let expected = of_step * of_row.accepted + last;
                assert_eq!(alone.vjps, expected, "{} row {row}", method.name());
                assert_eq!(alone.recomputed, expected, "{} row {row}", method.name());
            }
        }
    }
}

#[test]
fn a_row_takes_more_steps_the_faster_it_is() {
    if without_tiles() {
        return;
    }
    // Eight oscillators of rates 1, 2, 4, … side by side; in each row another one is in motion.
    let (vars, count) = (VarMap::new(), 8);
    let build = |vb: VarBuilder<'_>| Mlp::new(&[16, 16], Activation::Tanh, vb);
    let ode = NeuralOde::from_field(&vars, "", DType::F64, &Device::Cpu, build).unwrap();
    for (_, var) in all(&vars) {
        let mut numbers = vec![0.0; var.elem_count()];
        if var.rank() == 2 {
            for i in 0..count {
                let rate = f64::from(1 << i);
                numbers[2 * i * 16 + 2 * i + 1] = -rate;
                numbers[(2 * i + 1) * 16 + 2 * i] = rate;
            }
        }
        var.set(&Tensor::from_vec(numbers, var.shape(), &Device::Cpu).unwrap())
            .unwrap();
    }
    let mut y0 = vec![0.0; count * 16];
    for row in 0..count {
        y0[row * 16 + 2 * row] = 1.0;
    }
    let recorder = Recorder::tracing();
    let ode = ode.options(OdeOptions {
        recorder: Some(recorder.clone()),
        ..options(&DOPRI5, adaptive(1e-6, 1e-6))
    });
    let y0 = Tensor::from_vec(y0, (count, 16), &Device::Cpu).unwrap();
    let ys = ode.predict(&y0, &[0.0, 5.0]).unwrap();
    let stats = recorder.take();
    let evaluations: Vec<_> = stats.rows.iter().map(|row| row.evaluations).collect();
    assert!(
        evaluations
            .windows(2)
            .all(|w| w[1] as f64 > 1.5 * w[0] as f64),
        "{evaluations:?}"
    );
    for row in 0..count {
        let rate = f64::from(1 << row);
        let y = values(&ys.i((1, row)).unwrap());
        let error = (y[2 * row] - (5.0 * rate).cos()).abs();
        assert!(error <= 1e-3, "{row} {error:e}");
    }
}

/// Euler's method with a pair of stages that only its estimate reads, the second one from the first.
fn far_estimate() -> Tableau {
    let euler = Tableau::new(
        "far",
        1,
        vec![vec![], vec![0.5], vec![0.0, 1.0]],
        vec![1.0, 0.0, 0.0],
        vec![0.0, 0.5, 1.0],
    );
    let pair = euler.unwrap().with_embedded(vec![0.0, 0.0, 1.0]).unwrap();
    pair.with_interpolant(vec![vec![1.0], vec![0.0], vec![0.0]])
        .unwrap()
}

#[test]
fn stages_that_only_the_estimate_reads_read_each_other() {
    if without_tiles() {
        return;
    }
    for kind in [Kind::Mlp, Kind::Timed] {
        let y0 = rows(&start(kind, 8, DType::F64), &[5]);
        let control = || adaptive(1e-3, 1e-5);
        let ours = solve(kind, &y0, &TIMES, &options(&far_estimate(), control())).unwrap();
        let batch = control().control(StepControl::Batch);
        let theirs = solve(kind, &y0, &TIMES, &options(&far_estimate(), batch)).unwrap();
        assert_eq!(ours.stats.steps, theirs.stats.steps);
        assert!(ours.stats.steps > 20, "{}", ours.stats.steps);
    }
}

#[test]
fn rows_of_sines_do_not_depend_on_rows_that_are_far_away_or_lost() {
    if without_tiles() {
        return;
    }
    let vars = VarMap::new();
    let build = |vb: VarBuilder<'_>| Mlp::new(&[1, 16, 1], Activation::Sin, vb);
    let ode = NeuralOde::from_field(&vars, "", DType::F32, &Device::Cpu, build).unwrap();
    fill(&vars);
    let mut control = adaptive(1e-4, 1e-6);
    control = control.on_failure(OnFailure::Nan);
    let ode = ode.options(options(&DOPRI5, control));
    let of = |y0: &[f32]| {
        let y0 = Tensor::new(y0, &Device::Cpu).unwrap().unsqueeze(1).unwrap();
        let y = ode.predict(&y0, &TIMES).unwrap();
        bits(&y.i((.., 0, ..)).unwrap())
    };
    let alone = of(&[0.3]);
    assert_eq!(of(&[0.3, 2e5]), alone);
    assert_eq!(of(&[0.3, 2e5, -0.4, 1e30]), alone);
}

/// The midpoint rule with a third stage that neither the solution nor the pair reads, but the interpolant does.
fn far_interpolant() -> Tableau {
    let midpoint = Tableau::new(
        "far_interpolant",
        2,
        vec![vec![], vec![0.5], vec![1.0, 0.0]],
        vec![0.0, 1.0, 0.0],
        vec![0.0, 0.5, 1.0],
    );
    let pair = midpoint.unwrap().with_embedded(vec![1.0, 0.0, 0.0]);
    let rows = vec![
        vec![1.0, -1.5, 0.5],
        vec![0.0, 2.0, -1.0],
        vec![0.0, -0.5, 0.5],
    ];
    pair.unwrap().with_interpolant(rows).unwrap()
}

#[test]
fn a_stage_that_only_the_interpolant_reads_is_differentiated() {
    // Of a linear equation every solution of a method is y0 times a number, which is its derivative.
    let vars = VarMap::new();
    let build = |vb: VarBuilder<'_>| Mlp::new(&[1, 1], Activation::Tanh, vb);
    let model = || NeuralOde::from_field(&vars, "", DType::F64, &Device::Cpu, build).unwrap();
    model();
    for (name, var) in vars.data().lock().unwrap().iter() {
        let value = f64::from(u8::from(name.contains("weight"))) * 1.3;
        var.set(&var.affine(0.0, value).unwrap()).unwrap();
    }
    for control in [StepControl::Rows, StepControl::Batch] {
        for fusion in [true, false] {
            if (control == StepControl::Rows) && (!fusion || without_tiles()) {
                continue;
            }
            let steps = adaptive(1e-4, 1e-3).control(control);
            let mut options = options(&far_interpolant(), steps);
            options.fusion = fusion;
            let ode = model().options(options);
            let y0 = [0.01, 0.3, 1.0, 20.0, -3.0];
            let y0 = Var::from_vec(y0.to_vec(), (5, 1), &Device::Cpu).unwrap();
            let times = [0.0, 0.11, 0.3, 0.47, 1.0];
            let ys = ode.solve(&y0, &times).unwrap();
            for i in 0..times.len() {
                let y = ys.get(i).unwrap();
                let grads = y.sum_all().unwrap().backward().unwrap();
                let exact = (&y / y0.as_tensor()).unwrap();
                let error = relative(grads.get(&y0).unwrap(), &exact);
                assert!(error < 64.0 * U_F64, "{control:?} {fusion} {i}: {error:e}");
            }
        }
    }
}

#[test]
fn rows_that_come_to_rest_have_the_gradients_of_the_flow_at_every_tolerance() {
    if without_tiles() {
        return;
    }
    for method in [&BOSH3, &DOPRI5, &TSIT5] {
        let of = |dtype: DType, rtol: f64| {
            let [x, _] = &start(Kind::Speed, 40, dtype)[..] else {
                panic!("x and s");
            };
            // From 1 to 200.
            let speeds = Tensor::arange(0f64, 40.0, &Device::Cpu).unwrap();
            let speeds = (speeds * (200f64.ln() / 39.0)).unwrap();
            let speeds = speeds.unsqueeze(1).unwrap().to_dtype(dtype).unwrap();
            let adaptive = adaptive(rtol, 0.01 * rtol);
            let solved = solve(
                Kind::Speed,
                &[x.clone(), speeds],
                &[0.0, 0.5, 2.0],
                &options(method, adaptive),
            );
            let Answers { y0, weights, .. } = solved.unwrap();
            let y0 = y0[0].to_dtype(DType::F64).unwrap();
            let weights: Vec<_> = weights.iter().map(|w| w.flatten_all().unwrap()).collect();
            let weights = Tensor::cat(&weights, 0)
                .unwrap()
                .to_dtype(DType::F64)
                .unwrap();
            [y0, weights]
        };
        let exact = of(DType::F64, 1e-9);
        for dtype in [DType::F32, DType::F64] {
            for rtol in [1e-4, 1e-5, 1e-6, 1e-7] {
                let errors = of(dtype, rtol);
                let errors = [0, 1].map(|i| relative(&errors[i], &exact[i]));
                let name = method.name();
                assert!(
                    errors.iter().all(|e| *e < 2.0 * rtol + 1e-6),
                    "{name} {dtype:?} {rtol:e} {errors:?}"
                );
            }
        }
    }
}
