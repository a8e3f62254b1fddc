//! Events of rows with steps of their own, held against the same rows alone on the general path, against closed forms, and
//! against themselves in other company.
//!
//! `cargo test --test row_events`.

mod common;

use candle_core::{DType, Device, IndexOp, Tensor, Var};
use candle_diffeq::error::{AdaptiveDefect, Error, EventDefect, StopReason};
use candle_diffeq::events::{
    odeint_event, odeint_row_event, Direction, Event, RowEvent, RowEventSolution,
};
use candle_diffeq::metrics::Recorder;
use candle_diffeq::nn::{Activation, Cnf, Mlp};
use candle_diffeq::options::{Adaptive, Checkpoint, OnFailure, Output, Steps};
use candle_diffeq::tableau::{Tableau, BOSH3, DOPRI5, DOPRI8, FEHLBERG45, TSIT5};
use candle_diffeq::{odeint, NeuralOde, OdeOptions, Precision, State, Time};
use candle_nn::{VarBuilder, VarMap};
use common::{all, bits, fill, relative, scattered, values, worst, U_F64};

/// Whether the process has no vector unit, so that rows cannot have steps of their own.
fn without_tiles() -> bool {
    !common::has_tiles()
}

const PAIRS: [Tableau; 5] = [BOSH3, FEHLBERG45, DOPRI5, TSIT5, DOPRI8];
const TIMES: [f64; 4] = [0.0, 0.4, 1.1, 2.0];

fn options(method: &Tableau, rtol: f64) -> OdeOptions {
    OdeOptions {
        method: method.clone(),
        steps: Steps::Adaptive(Adaptive::new(rtol, rtol * 1e-2)),
        ..Default::default()
    }
}

/// A network whose rows move far enough to cross something.
fn network(vars: &VarMap, dtype: DType) -> Mlp {
    network_of(Activation::Tanh, vars, dtype)
}

fn network_of(activation: Activation, vars: &VarMap, dtype: DType) -> Mlp {
    let vb = VarBuilder::from_varmap(vars, dtype, &Device::Cpu);
    let mlp = Mlp::with_time(&[3, 12, 9, 3], activation, vb).unwrap();
    fill(vars);
    for (_, var) in all(vars) {
        var.set(&(var.as_tensor() * 1.5).unwrap()).unwrap();
    }
    mlp
}

fn start(rows: usize, dtype: DType) -> Tensor {
    scattered(&[rows, 3], 1.5, 11).to_dtype(dtype).unwrap()
}

/// The events of most tests: one that is recorded, one that ends a row, of which the values differ by row.
fn events(levels: &Tensor) -> [RowEvent; 2] {
    [
        RowEvent::new(1, 0.2).recorded(2),
        RowEvent::new(0, 0.0).values(levels),
    ]
}

fn levels(rows: usize) -> Tensor {
    scattered(&[rows], 0.6, 3)
}

fn pick(x: &Tensor, which: &[u32]) -> Tensor {
    x.index_select(&Tensor::new(which, &Device::Cpu).unwrap(), 0)
        .unwrap()
}

/// Σ of times and squared states at all events that occurred, and of the states at all times that were reached.
fn loss(solved: &RowEventSolution<Tensor>) -> Tensor {
    let mut sum = Tensor::zeros((), DType::F64, &Device::Cpu).unwrap();
    let mut add = |x: Tensor| {
        let x = x.to_dtype(DType::F64).unwrap().sum_all().unwrap();
        sum = (&sum + x).unwrap();
    };
    for (row, reached) in solved.outputs.iter().enumerate() {
        add(solved.states.i((..*reached, row)).unwrap().sqr().unwrap());
        for event in &solved.events {
            let most = event.t.dim(0).unwrap();
            for number in 0..event.counts[row].min(most) {
                add(event.t.i((number, row)).unwrap());
                add(event.y.i((number, row)).unwrap().sqr().unwrap());
            }
        }
    }
    sum
}

/// Everything of one row, in f64, and its gradient.
struct OfRow {
    numbers: Vec<f64>,
    counts: Vec<usize>,
    ended: Option<usize>,
}

fn of_row(solved: &RowEventSolution<Tensor>, row: usize) -> OfRow {
    let mut numbers = values(&solved.states.i((.., row)).unwrap());
    for event in &solved.events {
        numbers.extend(values(&event.t.i((.., row)).unwrap()));
        numbers.extend(values(&event.y.i((.., row)).unwrap()));
    }
    OfRow {
        numbers,
        counts: solved
            .events
            .iter()
            .map(|event| event.counts[row])
            .collect(),
        ended: solved.ended[row],
    }
}

#[test]
fn events_of_a_row_and_their_gradients_are_those_of_the_row_alone_on_the_general_path() {
    if without_tiles() {
        return;
    }
    for method in PAIRS {
        for times in [TIMES, TIMES.map(|t| 1.0 - t)] {
            let vars = VarMap::new();
            let field = network(&vars, DType::F64);
            let y0 = Var::from_tensor(&start(23, DType::F64)).unwrap();
            let level = Var::from_tensor(&levels(23)).unwrap();
            let solved = odeint_row_event(
                field.clone(),
                y0.as_tensor(),
                &times,
                &events(&level),
                &options(&method, 1e-8),
            )
            .unwrap();
            let grads = loss(&solved).backward().unwrap();
            let (mut ended, mut recorded) = (0, 0);
            let mut sum = loss(&solved).detach();
            let mut theirs: Option<Vec<Tensor>> = None;
            let of_weights = |grads: &candle_core::backprop::GradStore| -> Vec<Tensor> {
                let zeros = |var: &Var| var.zeros_like().unwrap();
                let of = |(_, var): &(String, Var)| grads.get(var).cloned().unwrap_or(zeros(var));
                all(&vars).iter().map(of).collect()
            };
            for row in 0..23 {
                let name = format!("{} row {row}", method.name());
                let own = Var::from_tensor(&y0.i(row..row + 1).unwrap()).unwrap();
                let at = Var::from_tensor(&level.i(row..row + 1).unwrap()).unwrap();
                let of_level = at.as_tensor().clone();
                let crosses = [
                    Event::new(|_: &Time, y: &Tensor| y.i((0, 1))? - 0.2).recorded(),
                    Event::new(move |_: &Time, y: &Tensor| y.i((0, 0))?.sub(&of_level.i(0)?)),
                ];
                let steps = odeint_event(
                    field.clone(),
                    own.as_tensor(),
                    &times,
                    &crosses,
                    &options(&method, 1e-8),
                )
                .unwrap();
                assert_eq!(steps.outputs, solved.outputs[row], "{name}");
                assert_eq!(steps.ended, solved.ended[row].is_some(), "{name}");
                let mut own_loss = steps.states.sqr().unwrap().sum_all().unwrap();
                for (e, event) in solved.events.iter().enumerate() {
                    let most = event.t.dim(0).unwrap();
                    let same: Vec<_> = steps.events.iter().filter(|o| o.event == e).collect();
                    assert_eq!(same.len(), event.counts[row], "{name}");
                    for (number, other) in same.iter().take(most).enumerate() {
                        let t = event
                            .t
                            .i((number, row))
                            .unwrap()
                            .to_scalar::<f64>()
                            .unwrap();
                        let error = t - other.t.to_scalar::<f64>().unwrap();
                        assert!(error.abs() <= 1e-9, "{name} {error:e}");
                        let y = event.y.i((number, row..row + 1)).unwrap();
                        assert!(relative(&y, &other.y) <= 1e-8, "{name}");
                        let of_y = other.y.sqr().unwrap().sum_all().unwrap();
                        own_loss = ((own_loss + &other.t).unwrap() + of_y).unwrap();
                    }
                    for number in event.counts[row].min(most)..most {
                        let t = event.t.i((number, row)).unwrap().to_scalar::<f64>();
                        assert!(t.unwrap().is_nan(), "{name}");
                    }
                }
                ended += usize::from(steps.ended);
                recorded += solved.events[0].counts[row];
                sum = (sum - own_loss.detach()).unwrap();
                let alone = own_loss.backward().unwrap();
                for (ours, theirs) in [(&y0, &own), (&level, &at)] {
                    let none = ours.zeros_like().unwrap();
                    let ours = grads.get(ours).unwrap_or(&none).i(row..row + 1).unwrap();
                    let zero = theirs.zeros_like().unwrap();
                    let theirs = alone.get(theirs).unwrap_or(&zero);
                    let size = 1.0 + worst(values(theirs));
                    let pairs = values(&ours).into_iter().zip(values(theirs));
                    let error = worst(pairs.map(|(a, b)| a - b)) / size;
                    assert!(error <= 1e-6, "{name} {error:e}");
                }
                let weights = of_weights(&alone);
                theirs = Some(match theirs {
                    None => weights,
                    Some(sum) => sum
                        .iter()
                        .zip(&weights)
                        .map(|(a, b)| (a + b).unwrap())
                        .collect(),
                });
            }
            assert!(
                ended > 3 && ended < 21 && recorded > 3,
                "{ended} {recorded}"
            );
            assert!(sum.to_scalar::<f64>().unwrap().abs() <= 1e-6);
            for (ours, theirs) in of_weights(&grads).iter().zip(theirs.unwrap()) {
                let error = relative(ours, &theirs);
                assert!(error <= 1e-6, "{} {error:e}", method.name());
            }
        }
    }
}

#[test]
fn events_of_a_row_have_the_same_bits_alone_and_in_any_company() {
    if without_tiles() {
        return;
    }
    for dtype in [DType::F32, DType::F64] {
        for method in [DOPRI5, DOPRI8] {
            let vars = VarMap::new();
            let field = network(&vars, dtype);
            let solve = |which: &[u32]| {
                let y0 = Var::from_tensor(&pick(&start(200, dtype), which)).unwrap();
                let level = pick(&levels(200), which);
                let rtol = if dtype == DType::F32 { 1e-5 } else { 1e-8 };
                let options = options(&method, rtol);
                let field = field.clone();
                let solved =
                    odeint_row_event(field, y0.as_tensor(), &TIMES, &events(&level), &options);
                let solved = solved.unwrap();
                let grads = loss(&solved).backward().unwrap();
                let of_y0 = grads.get(&y0).unwrap().clone();
                let weights = all(&vars).into_iter();
                let weights = weights.map(|(_, var)| bits(grads.get(&var).unwrap()));
                (solved, of_y0, weights.collect::<Vec<_>>())
            };
            let on_threads = |threads: usize| {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build();
                pool.unwrap()
                    .install(|| solve(&(0..200).collect::<Vec<_>>()))
            };
            let whole = on_threads(7);
            assert_eq!(whole.2, on_threads(1).2);
            let backwards: Vec<u32> = (0..200).rev().collect();
            let some: Vec<u32> = (0..200).step_by(17).collect();
            for which in [&[0][..], &[7], &[199], &[9, 8, 7], &backwards, &some] {
                let part = solve(which);
                for (at, &row) in which.iter().enumerate() {
                    let (ours, theirs) = (of_row(&part.0, at), of_row(&whole.0, row as usize));
                    let to_bits = |x: &[f64]| x.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
                    assert_eq!(
                        to_bits(&ours.numbers),
                        to_bits(&theirs.numbers),
                        "row {row}"
                    );
                    assert_eq!((ours.counts, ours.ended), (theirs.counts, theirs.ended));
                    let (a, b) = (part.1.i(at).unwrap(), whole.1.i(row as usize).unwrap());
                    assert_eq!(bits(&a), bits(&b), "row {row}");
                }
            }
        }
    }
}

/// A solve with events of rows, from y0.
type SolveRows<'a> = dyn Fn(&Tensor) -> RowEventSolution<Tensor> + 'a;

#[test]
fn events_of_the_rows_of_a_model_are_those_of_its_field() {
    if without_tiles() {
        return;
    }
    for dtype in [DType::F32, DType::F64] {
        let options = options(&DOPRI5, 1e-5);
        let vars = VarMap::new();
        let build = |vb: VarBuilder<'_>| Mlp::with_time(&[3, 12, 9, 3], Activation::Tanh, vb);
        let ode = NeuralOde::from_field(&vars, "", dtype, &Device::Cpu, build).unwrap();
        let ode = ode.options(options.clone());
        // The same variables.
        let field = network(&vars, dtype);
        let levels = levels(40);
        let solves: [&SolveRows; 2] = [
            &|y0| ode.row_events(y0, &TIMES, &events(&levels)).unwrap(),
            &|y0| {
                let field = field.clone();
                odeint_row_event(field, y0, &TIMES, &events(&levels), &options).unwrap()
            },
        ];
        let [model, closure] = solves.map(|solve| {
            let y0 = Var::from_tensor(&start(40, dtype)).unwrap();
            let solved = solve(y0.as_tensor());
            let grads = loss(&solved).backward().unwrap();
            let of_weights = all(&vars).into_iter();
            let of_weights = of_weights.map(|(_, var)| bits(grads.get(&var).unwrap()));
            let of_y0 = bits(grads.get(&y0).unwrap());
            let of_rows = (0..40).map(|row| of_row(&solved, row));
            let of_rows = of_rows.map(|row| {
                (
                    row.numbers
                        .into_iter()
                        .map(f64::to_bits)
                        .collect::<Vec<_>>(),
                    row.counts,
                    row.ended,
                )
            });
            (
                of_rows.collect::<Vec<_>>(),
                of_y0,
                of_weights.collect::<Vec<_>>(),
            )
        });
        assert!(model == closure, "{dtype:?}");
        assert!(model.0.iter().any(|(_, _, ended)| ended.is_some()));
    }
}

#[test]
fn rows_on_circles_cross_at_the_times_of_the_closed_form() {
    if without_tiles() {
        return;
    }
    for method in [DOPRI5, TSIT5, DOPRI8] {
        let vars = VarMap::new();
        let vb = VarBuilder::from_varmap(&vars, DType::F64, &Device::Cpu);
        // y' = (−y₂, y₁).
        let field = Mlp::new(&[2, 2], Activation::Tanh, vb).unwrap();
        for (_, var) in all(&vars) {
            let numbers: Vec<f64> = match var.rank() {
                2 => vec![0.0, -1.0, 1.0, 0.0],
                _ => vec![0.0; 2],
            };
            let turn = Tensor::from_vec(numbers, var.shape(), &Device::Cpu).unwrap();
            var.set(&turn).unwrap();
        }
        let phases: Vec<f64> = (0..13).map(|row| 0.1 + 0.1 * row as f64).collect();
        let y0 = phases.iter().flat_map(|p| [p.cos(), p.sin()]).collect();
        let y0 = Var::from_vec(y0, (13, 2), &Device::Cpu).unwrap();
        // cos(t + p) = 0 on the way down at π/2 − p, on the way up at 3π/2 − p, and so on.
        let events = [
            RowEvent::new(0, 0.0).recorded(4),
            RowEvent::new(0, 0.0)
                .direction(Direction::Rising)
                .recorded(1),
        ];
        let mut tight = options(&method, 1e-10);
        tight.steps = Steps::Adaptive(Adaptive::new(1e-10, 1e-10));
        let solved =
            odeint_row_event(field, y0.as_tensor(), &[0.0, 10.0], &events, &tight).unwrap();
        let quarter = std::f64::consts::FRAC_PI_2;
        for (row, phase) in phases.iter().enumerate() {
            let exact: Vec<_> = (0..4)
                .map(|i| quarter * (2 * i + 1) as f64 - phase)
                .collect();
            let count = exact.iter().filter(|t| **t < 10.0).count();
            assert_eq!(solved.events[0].counts[row], count);
            for (number, exact) in exact.iter().take(count).enumerate() {
                let t = solved.events[0].t.i((number, row)).unwrap();
                let error = t.to_scalar::<f64>().unwrap() - exact;
                assert!(
                    error.abs() <= 1e-9,
                    "{} {row} {number}: {error:e}",
                    method.name()
                );
                if (2..11).contains(&row) {
                    continue;
                }
                // The phase is the angle of y0, which a small rotation changes.
                let grads = t.backward().unwrap();
                let of_y0 = values(&grads.get(&y0).unwrap().i(row).unwrap());
                let along = -phase.sin() * of_y0[0] + phase.cos() * of_y0[1];
                assert!((along + 1.0).abs() <= 1e-6, "{} {along}", method.name());
            }
            let rising = solved.events[1].t.i((0, row)).unwrap();
            let error = rising.to_scalar::<f64>().unwrap() - exact[1];
            assert!(error.abs() <= 1e-9, "{} {row}: {error:e}", method.name());
            assert_eq!(solved.ended[row], None);
        }
    }
}

#[test]
fn a_row_that_has_ended_has_no_states_and_leaves_its_lane_to_the_next() {
    if without_tiles() {
        return;
    }
    let vars = VarMap::new();
    let field = network(&vars, DType::F64);
    let y0 = start(200, DType::F64);
    let solve = |events: &[RowEvent]| {
        let recorder = Recorder::tracing();
        let options = OdeOptions {
            recorder: Some(recorder.clone()),
            ..options(&DOPRI5, 1e-8)
        };
        let solved = odeint_row_event(field.clone(), &y0, &TIMES, events, &options).unwrap();
        (solved, recorder.take())
    };
    let (solved, stats) = solve(&events(&levels(200)));
    let (free, of_all) = solve(&[RowEvent::new(0, 1e9)]);
    assert!(free.ended.iter().all(Option::is_none) && free.outputs.iter().all(|n| *n == 4));
    let mut ended = 0;
    for row in 0..200 {
        let states = solved.states.i((.., row)).unwrap();
        let reached = solved.outputs[row];
        let known = values(&states.i(..reached).unwrap());
        assert!(known.iter().all(|y| y.is_finite()));
        let rest = values(&states.i(reached..).unwrap());
        assert!(rest.iter().all(|y| y.is_nan()), "row {row}");
        let t = solved.events[1]
            .t
            .i((0, row))
            .unwrap()
            .to_scalar::<f64>()
            .unwrap();
        assert_eq!(t.is_finite(), solved.ended[row] == Some(1));
        let last = stats.rows[row].times.last().unwrap();
        if t.is_finite() {
            ended += 1;
            // The last step ends just behind the event, and nothing is evaluated beyond it.
            let begins = stats.rows[row].times.iter().rev().nth(1).unwrap();
            // Next to the start of a step, the interpolant is as accurate as the step, which stays as it is.
            let is_near = t - begins < 1e-3 * (last - begins);
            assert!(
                *last >= t && (is_near || *last <= t + 1e-3 * (1.0 + t)),
                "{last} {t}"
            );
            let before = TIMES.iter().filter(|time| **time < t).count();
            assert_eq!(reached, before.max(1));
        } else {
            assert_eq!((*last, reached), (2.0, 4));
        }
    }
    assert!(ended > 20, "{ended}");
    assert!(stats.tile_evaluations < of_all.tile_evaluations);
    let lanes = stats.row_evaluations as f64 / stats.tile_evaluations as f64;
    assert!(lanes > 2.0, "{lanes}");
}

#[test]
fn gradients_of_events_of_rows_have_the_same_bits_whatever_is_kept() {
    if without_tiles() {
        return;
    }
    let vars = VarMap::new();
    let field = network(&vars, DType::F64);
    let solve = |checkpoint| {
        let y0 = Var::from_tensor(&start(21, DType::F64)).unwrap();
        let options = OdeOptions {
            checkpoint,
            ..options(&DOPRI8, 1e-9)
        };
        let levels = levels(21);
        let solved = odeint_row_event(
            field.clone(),
            y0.as_tensor(),
            &TIMES,
            &events(&levels),
            &options,
        );
        let grads = loss(&solved.unwrap()).backward().unwrap();
        let weights = all(&vars).into_iter();
        let weights = weights.map(|(_, var)| bits(grads.get(&var).unwrap()));
        let mut all: Vec<_> = weights.collect();
        all.push(bits(grads.get(&y0).unwrap()));
        all
    };
    let kept = solve(Checkpoint::All);
    for checkpoint in [
        Checkpoint::Every(3),
        Checkpoint::States(1),
        Checkpoint::States(4),
        Checkpoint::Bytes(3 * 21 * 3 * 8),
    ] {
        assert_eq!(solve(checkpoint), kept, "{checkpoint:?}");
    }
}

#[test]
fn an_event_may_be_about_any_tensor_of_the_state() {
    if without_tiles() {
        return;
    }
    let vars = VarMap::new();
    let vb = VarBuilder::from_varmap(&vars, DType::F64, &Device::Cpu);
    let flow = Cnf::new(Mlp::with_time(&[2, 12, 2], Activation::Tanh, vb).unwrap()).unwrap();
    fill(&vars);
    let z = scattered(&[9, 2], 1.0, 2);
    let logp = Tensor::zeros((9, 1), DType::F64, &Device::Cpu).unwrap();
    let event = RowEvent::new(0, 0.01).leaf(1);
    let (times, options) = ([0.0, 3.0], options(&DOPRI5, 1e-9));
    let solved = odeint_row_event(flow, &(z, logp), &times, &[event], &options).unwrap();
    let (_, logp) = &solved.events[0].y;
    assert_eq!(logp.dims(), [1, 9, 1]);
    let ended = solved.ended.iter().filter(|ended| ended.is_some()).count();
    assert!(ended > 0);
    for (row, ended) in solved.ended.iter().enumerate() {
        let logp = values(&logp.i((0, row)).unwrap())[0];
        assert_eq!(ended.is_some(), (logp - 0.01).abs() <= 1e-12, "{logp}");
    }
    assert_eq!(solved.states.leaves().len(), 2);
}

#[test]
fn events_of_rows_that_cannot_be_had_are_errors() {
    let vars = VarMap::new();
    let field = network(&vars, DType::F64);
    let (y0, levels) = (start(5, DType::F64), levels(4));
    let solve = |event: RowEvent, options: &OdeOptions| {
        let solved = odeint_row_event(field.clone(), &y0, &TIMES, &[event], options);
        solved.map(|_| ()).unwrap_err()
    };
    let adaptive = options(&DOPRI5, 1e-6);
    let fixed = solve(RowEvent::new(0, 0.0), &OdeOptions::default());
    assert!(matches!(fixed, Error::Adaptive(AdaptiveDefect::FixedSteps)));
    let last = OdeOptions {
        output: Output::Final,
        ..adaptive.clone()
    };
    let last = solve(RowEvent::new(0, 0.0), &last);
    assert!(matches!(last, Error::Adaptive(AdaptiveDefect::EventOutput)));
    let closure = |_: &Time, y: &Tensor| y.neg();
    let closure = odeint_row_event(closure, &y0, &TIMES, &[RowEvent::new(0, 0.0)], &adaptive);
    let closure = closure.map(|_| ()).unwrap_err();
    assert!(matches!(
        closure,
        Error::Adaptive(AdaptiveDefect::NoRows { row_wise: false })
    ));
    let general = OdeOptions {
        fusion: false,
        ..adaptive.clone()
    };
    let general = solve(RowEvent::new(0, 0.0), &general);
    assert!(matches!(
        general,
        Error::Adaptive(AdaptiveDefect::NoRows { row_wise: true })
    ));
    for event in [RowEvent::new(3, 0.0), RowEvent::new(0, 0.0).leaf(1)] {
        let error = solve(event, &adaptive);
        assert!(matches!(
            error,
            Error::Event(EventDefect::NoComponent { event: 0, .. })
        ));
    }
    let error = solve(RowEvent::new(0, 0.0).values(&levels), &adaptive);
    assert!(matches!(
        error,
        Error::Event(EventDefect::Values { rows: 5, .. })
    ));
    for event in [
        RowEvent::new(0, f64::NAN),
        RowEvent::new(0, 0.0).recorded(0),
    ] {
        let error = solve(event, &adaptive);
        assert!(matches!(
            error,
            Error::Adaptive(AdaptiveDefect::Number { .. })
        ));
    }
}

#[test]
fn a_row_that_fails_has_no_events_and_leaves_those_of_the_others_alone() {
    if without_tiles() {
        return;
    }
    let vars = VarMap::new();
    // Not bounded: products of large numbers overflow.
    let field = network_of(Activation::Relu, &vars, DType::F64);
    let y0 = start(9, DType::F64);
    let solve = |y0: &Tensor| {
        let steps = Adaptive::new(1e-8, 1e-10).on_failure(OnFailure::Nan);
        let options = OdeOptions {
            steps: Steps::Adaptive(steps),
            ..options(&DOPRI5, 1e-8)
        };
        let y0 = Var::from_tensor(y0).unwrap();
        let events = events(&levels(9));
        let solved = odeint_row_event(field.clone(), y0.as_tensor(), &TIMES, &events, &options);
        let solved = solved.unwrap();
        let grads = loss(&solved).backward().unwrap();
        (solved, grads.get(&y0).unwrap().clone())
    };
    let (whole, of_whole) = solve(&y0);
    let infinite = Tensor::full(1e308, (1, 3), &Device::Cpu).unwrap();
    let broken = Tensor::cat(&[&y0.i(..4).unwrap(), &infinite, &y0.i(5..).unwrap()], 0).unwrap();
    let (part, of_part) = solve(&broken);
    assert_eq!((part.outputs[4], part.ended[4]), (1, None));
    assert!(part.events.iter().all(|event| event.counts[4] == 0));
    for row in (0..9).filter(|row| *row != 4) {
        let (ours, theirs) = (of_row(&part, row), of_row(&whole, row));
        let to_bits = |x: &[f64]| x.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
        assert_eq!(
            to_bits(&ours.numbers),
            to_bits(&theirs.numbers),
            "row {row}"
        );
        let [a, b] = [&of_part, &of_whole].map(|grads| bits(&grads.i(row).unwrap()));
        assert_eq!(a, b, "row {row}");
    }
}

#[test]
fn a_row_that_stays_on_a_value_has_no_event() {
    if without_tiles() {
        return;
    }
    let vars = VarMap::new();
    let vb = VarBuilder::from_varmap(&vars, DType::F64, &Device::Cpu);
    let field = Mlp::new(&[2, 2], Activation::Tanh, vb).unwrap();
    // The first component does not move: it is on the value for ever.
    for (_, var) in all(&vars) {
        var.set(&var.zeros_like().unwrap()).unwrap();
    }
    let y0 = Tensor::new(&[[0.5f64, 0.0]], &Device::Cpu).unwrap();
    let solve = |y0: &Tensor| {
        let event = RowEvent::new(0, 0.5);
        odeint_row_event(field.clone(), y0, &TIMES, &[event], &options(&DOPRI5, 1e-6))
    };
    // No sign at the start, none later: no event.
    let solved = solve(&y0).unwrap();
    assert_eq!((solved.ended[0], solved.events[0].counts[0]), (None, 0));
}

#[test]
fn the_time_at_which_a_row_touches_a_value_has_no_gradient() {
    if without_tiles() {
        return;
    }
    // y₁ = (t − 1)³, by y′ = (y₂, y₃, 6).
    let vars = VarMap::new();
    let vb = VarBuilder::from_varmap(&vars, DType::F64, &Device::Cpu);
    let field = Mlp::new(&[3, 3], Activation::Tanh, vb).unwrap();
    for (_, var) in all(&vars) {
        let numbers = match var.rank() {
            2 => vec![0.0, 1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0],
            _ => vec![0.0, 0.0, 6.0],
        };
        let chain = Tensor::from_vec(numbers, var.shape(), &Device::Cpu).unwrap();
        var.set(&chain).unwrap();
    }
    let y0 = Tensor::new(&[[-1f64, 3.0, -6.0]], &Device::Cpu).unwrap();
    let event = RowEvent::new(0, 0.0);
    let options = options(&DOPRI5, 1e-6);
    let error = odeint_row_event(field, &y0, &[0.0, 2.0], &[event], &options);
    let error = error.map(|_| ()).unwrap_err();
    assert!(matches!(
        error,
        Error::Event(EventDefect::Grazing { event: 0, .. })
    ));
}

/// (−y₂, y₁).
fn turning(dtype: DType) -> Mlp {
    linear(&[0.0, -1.0, 1.0, 0.0], &[0.0; 2], dtype)
}

/// W y + b.
fn linear(weight: &[f64], bias: &[f64], dtype: DType) -> Mlp {
    let vars = VarMap::new();
    let vb = VarBuilder::from_varmap(&vars, dtype, &Device::Cpu);
    let field = Mlp::new(&[bias.len(), bias.len()], Activation::Tanh, vb).unwrap();
    for (_, var) in all(&vars) {
        let numbers = if var.rank() == 2 { weight } else { bias };
        let numbers = Tensor::from_slice(numbers, var.shape(), &Device::Cpu).unwrap();
        var.set(&numbers.to_dtype(dtype).unwrap()).unwrap();
    }
    field
}

/// Steps that begin with this length, and are accepted whatever their error is but for very large ones.
fn in_steps_of(h: f64) -> OdeOptions {
    OdeOptions {
        method: DOPRI5,
        steps: Steps::Adaptive(Adaptive::new(1.0, 1.0).first_step(h)),
        ..Default::default()
    }
}

#[test]
fn every_crossing_of_a_row_between_the_points_of_a_step_is_an_event() {
    if without_tiles() {
        return;
    }
    // From the angle −1, in one step through the angles ∓0.64, between which the first component is above 0.8.
    let y0 = Tensor::new(&[[1f64.cos(), -1f64.sin()]], &Device::Cpu).unwrap();
    let level = RowEvent::new(0, 0.8);
    let events = [
        level.clone().recorded(4),
        level.clone().direction(Direction::Rising).recorded(4),
        level.clone().direction(Direction::Falling).recorded(4),
        // Counted without a place.
        level.recorded(1),
    ];
    let recorder = Recorder::default();
    let options = OdeOptions {
        recorder: Some(recorder.clone()),
        ..in_steps_of(2.0)
    };
    let solved = odeint_row_event(turning(DType::F64), &y0, &[0.0, 2.0], &events, &options);
    let solved = solved.unwrap();
    assert_eq!(recorder.take().steps, 1);
    let counts: Vec<_> = solved.events.iter().map(|event| event.counts[0]).collect();
    assert_eq!(counts, [2, 1, 1, 2]);
    let t = values(&solved.events[0].t);
    assert!(
        (0.0..0.5).contains(&t[0]) && (1.5..2.0).contains(&t[1]),
        "{t:?}"
    );
    assert_eq!(
        [
            values(&solved.events[1].t)[0],
            values(&solved.events[2].t)[0]
        ],
        t[..2]
    );
    for y in &values(&solved.events[0].y)[..4]
        .iter()
        .step_by(2)
        .collect::<Vec<_>>()
    {
        assert!((*y - 0.8).abs() <= 8.0 * U_F64);
    }
}

#[test]
fn rows_of_one_time_have_a_state_and_no_events() {
    if without_tiles() {
        return;
    }
    for rows in [1, 200] {
        let y0 = Var::from_tensor(&start(rows, DType::F64)).unwrap();
        let field = network(&VarMap::new(), DType::F64);
        let options = options(&DOPRI5, 1e-6);
        let events = [RowEvent::new(0, 0.5), RowEvent::new(1, 0.2).recorded(3)];
        let solved = odeint_row_event(field, y0.as_tensor(), &[0.7], &events, &options).unwrap();
        assert_eq!(bits(&solved.states), bits(&y0));
        assert_eq!(solved.outputs, vec![1; rows]);
        assert_eq!(solved.ended, vec![None; rows]);
        for (event, most) in solved.events.iter().zip([1, 3]) {
            assert_eq!(event.counts, vec![0; rows]);
            assert_eq!(
                (event.t.dims(), event.y.dims()),
                (&[most, rows][..], &[most, rows, 3][..])
            );
            let nothing = [values(&event.t), values(&event.y)].concat();
            assert!(nothing.iter().all(|x| x.is_nan()));
        }
        let grads = loss(&solved).backward().unwrap();
        let twice = (y0.as_tensor() * 2.0).unwrap();
        assert_eq!(bits(grads.get(&y0).unwrap()), bits(&twice));
    }
}

#[test]
fn more_places_for_events_than_fit_are_an_error() {
    if without_tiles() {
        return;
    }
    let field = network(&VarMap::new(), DType::F64);
    for most in [usize::MAX, usize::MAX - 1, usize::MAX / 2, usize::MAX / 64] {
        let event = RowEvent::new(0, 0.1).recorded(most);
        for (rows, events) in [
            (3, vec![event.clone()]),
            (3, vec![event.clone(); 3]),
            (0, vec![event; 2]),
        ] {
            let (y0, options) = (start(rows, DType::F64), options(&DOPRI5, 1e-6));
            for times in [&[0.0, 1.0][..], &[0.0]] {
                let solved = odeint_row_event(field.clone(), &y0, times, &events, &options);
                match solved.map(|solved| solved.events[0].counts.len()) {
                    Err(Error::OutOfMemory { .. } | Error::AllocationFailed { .. }) => {}
                    // Of no row there is nothing to be returned.
                    Ok(0) if rows == 0 => {}
                    other => panic!("{rows} {most} {other:?}"),
                }
            }
        }
    }
}

#[test]
fn a_time_at_which_an_event_ends_a_row_is_reached() {
    if without_tiles() {
        return;
    }
    // At the end of a step, to the bit: y′ = y.
    let growth = || linear(&[1.0], &[0.0], DType::F64);
    let y0 = Tensor::new(&[[1f64]], &Device::Cpu).unwrap();
    for times in [&[0.0, 1.0][..], &[0.0, 0.25, 1.0], &[0.0, 1.0, 2.0]] {
        let options = OdeOptions {
            steps: Steps::Adaptive(Adaptive::new(1e-6, 1e-6).step_t([1.0])),
            ..options(&DOPRI5, 1e-6)
        };
        let plain = odeint(growth(), &y0, times, &options).unwrap();
        let last = times.iter().position(|t| *t == 1.0).unwrap();
        let event = RowEvent::new(0, values(&plain)[last]);
        let own = Var::from_tensor(&y0).unwrap();
        let solved =
            odeint_row_event(growth(), own.as_tensor(), times, &[event], &options).unwrap();
        assert_eq!((solved.outputs[0], solved.ended[0]), (last + 1, Some(0)));
        assert_eq!(values(&solved.events[0].t), [1.0]);
        let reached = plain.narrow(0, 0, last + 1).unwrap();
        let states = solved.states.narrow(0, 0, last + 1).unwrap();
        assert_eq!(bits(&states), bits(&reached));
        // e at a fixed time.
        let grads = states
            .i(last)
            .unwrap()
            .sum_all()
            .unwrap()
            .backward()
            .unwrap();
        let slope = values(grads.get(&own).unwrap())[0];
        assert!(
            (slope - values(&reached)[last]).abs() <= 16.0 * U_F64,
            "{slope}"
        );
    }
    // And inside: y′ = 1.
    let mut met = 0;
    for i in 1..97 {
        let level = i as f64 / 97.0;
        let (y0, times) = (
            Tensor::new(&[[0f64]], &Device::Cpu).unwrap(),
            [0.0, level, 1.5],
        );
        let (clock, event) = (linear(&[0.0], &[1.0], DType::F64), RowEvent::new(0, level));
        let solved = odeint_row_event(clock, &y0, &times, &[event], &options(&DOPRI5, 1e-6));
        let solved = solved.unwrap();
        let t = values(&solved.events[0].t)[0];
        met += usize::from(t == level);
        let reached = times.iter().filter(|time| **time <= t).count();
        assert_eq!(solved.outputs, [reached], "{level} {t}");
    }
    assert!(met > 9, "{met} events are at a time to the bit");
}

/// Rows of a perceptron that decays, in bf16 with a tolerance that it does not reach.
fn limited_by_precision(
    level: f64,
    on_failure: OnFailure,
) -> candle_diffeq::Result<(RowEventSolution<Tensor>, Tensor)> {
    let steps = Adaptive::new(1e-8, 1e-10).precision_limit_is_error(true);
    let options = OdeOptions {
        precision: Some(Precision::bf16()),
        steps: Steps::Adaptive(steps.on_failure(on_failure)),
        ..options(&DOPRI5, 1e-8)
    };
    let y0 = Var::new(&[[1f32, 0.3], [0.9, 0.2], [0.0, 0.0]], &Device::Cpu).unwrap();
    let decay = linear(&[-1.0, 0.0, 0.0, -1.0], &[0.0; 2], DType::F32);
    let event = RowEvent::new(0, level);
    let solved = odeint_row_event(decay, y0.as_tensor(), &TIMES, &[event], &options)?;
    let grads = loss(&solved).backward()?;
    let of_y0 = grads.get(&y0).unwrap().clone();
    Ok((solved, of_y0))
}

#[test]
fn rows_that_the_precision_limits_are_errors_whether_or_not_an_event_ends_them() {
    if without_tiles() {
        return;
    }
    for level in [0.5, -1.0] {
        let error = limited_by_precision(level, OnFailure::Error).map(|_| ());
        let Err(Error::Stopped(stopped)) = error else {
            panic!("level {level}: {error:?}");
        };
        assert!(matches!(
            stopped.reason,
            StopReason::PrecisionLimited { .. }
        ));
        assert_eq!(stopped.worst.unwrap().row, 0);
        let (solved, of_y0) = limited_by_precision(level, OnFailure::Nan).unwrap();
        for row in 0..2 {
            // Nothing that was computed counts, and neither do cotangents.
            let after = values(&solved.states.i((1.., row)).unwrap());
            assert!(after.iter().all(|y| y.is_nan()), "{level} {after:?}");
            assert_eq!((solved.ended[row], solved.events[0].counts[row]), (None, 0));
            assert_eq!(solved.outputs[row], 1);
            assert_eq!(values(&of_y0.i(row).unwrap()), [0.0; 2]);
        }
        // A row that rests is not limited.
        assert_eq!(values(&solved.states.i((.., 2)).unwrap()), [0.0; 8]);
    }
}

#[test]
fn a_batch_without_rows_has_no_events() {
    for leaf in [DType::F32, DType::F64] {
        let (vars, y0) = (
            VarMap::new(),
            Var::zeros((0, 3), leaf, &Device::Cpu).unwrap(),
        );
        let none = Tensor::zeros(0, DType::F64, &Device::Cpu).unwrap();
        let events = [
            RowEvent::new(1, 0.2).recorded(2),
            RowEvent::new(0, 0.0).values(&none),
        ];
        let field = network(&vars, leaf);
        let solved = odeint_row_event(
            field,
            y0.as_tensor(),
            &TIMES,
            &events,
            &options(&DOPRI5, 1e-6),
        );
        let solved = solved.unwrap();
        assert_eq!(solved.states.dims(), [4, 0, 3]);
        assert!(solved.outputs.is_empty() && solved.ended.is_empty());
        for (event, most) in solved.events.iter().zip([2, 1]) {
            assert!(event.counts.is_empty());
            assert_eq!(
                (event.t.dims(), event.y.dims()),
                (&[most, 0][..], &[most, 0, 3][..])
            );
        }
        let grads = solved.states.sum_all().unwrap().backward().unwrap();
        for (_, var) in all(&vars) {
            assert!(values(grads.get(&var).unwrap()).iter().all(|g| *g == 0.0));
        }
    }
}

#[test]
fn a_row_begins_on_a_value_that_its_dtype_rounds_to_where_it_begins() {
    if without_tiles() {
        return;
    }
    // In f32 the number 0.1 is above that in f64, and 0.3 too.
    let decay = || linear(&[-1.0], &[0.0], DType::F32);
    let y0 = Tensor::new(&[[0.1f32], [0.3], [0.7]], &Device::Cpu).unwrap();
    let each = Tensor::new(&[0.1f64, 0.3, 0.7], &Device::Cpu).unwrap();
    let solve = |event: RowEvent| {
        let solved = odeint_row_event(decay(), &y0, &[0.0, 1.0], &[event], &options(&DOPRI5, 1e-5));
        solved.unwrap()
    };
    assert_eq!(solve(RowEvent::new(0, 0.0).values(&each)).ended, [None; 3]);
    assert_eq!(solve(RowEvent::new(0, 0.1)).ended[0], None);
    // The others come to it.
    assert_eq!(solve(RowEvent::new(0, 0.15)).ended, [None, Some(0), None]);
}

#[test]
fn events_of_a_row_at_one_place_are_all_recorded_before_one_of_them_ends_it() {
    if without_tiles() {
        return;
    }
    let level = || RowEvent::new(0, 0.7);
    for (events, last) in [
        ([level(), level().recorded(1)], 0),
        ([level().recorded(1), level()], 1),
    ] {
        let y0 = Tensor::new(&[[0f64]], &Device::Cpu).unwrap();
        let clock = linear(&[0.0], &[1.0], DType::F64);
        let solved = odeint_row_event(clock, &y0, &[0.0, 1.0], &events, &options(&DOPRI5, 1e-6));
        let solved = solved.unwrap();
        assert_eq!(solved.ended, [Some(last)]);
        assert!(solved.events.iter().all(|event| event.counts == [1]));
    }
}

#[test]
fn a_row_that_touches_its_value_does_not_take_the_gradients_of_the_others() {
    if without_tiles() {
        return;
    }
    // y₁ = (t − 1)³ in the first row, by y′ = (y₂, y₃, 6); the other rows cross.
    let field = || {
        linear(
            &[0.0, 1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0],
            &[0.0, 0.0, 6.0],
            DType::F64,
        )
    };
    let rows = [[-1f64, 3.0, -6.0], [-1.5, 4.0, -6.0], [-0.7, 1.0, 0.0]];
    let solve = |rows: &[[f64; 3]]| {
        let y0 = Var::from_vec(rows.concat(), (rows.len(), 3), &Device::Cpu).unwrap();
        let steps = Adaptive::new(1e-6, 1e-8).on_failure(OnFailure::Nan);
        let options = OdeOptions {
            steps: Steps::Adaptive(steps),
            ..options(&DOPRI5, 1e-6)
        };
        let event = RowEvent::new(0, 0.0);
        let solved = odeint_row_event(field(), y0.as_tensor(), &[0.0, 3.0], &[event], &options);
        let solved = solved.unwrap();
        // Of the rows whose event has a time.
        let mut sum = Tensor::zeros((), DType::F64, &Device::Cpu).unwrap();
        let t = solved.events[0].t.i(0).unwrap();
        for (row, value) in values(&t).iter().enumerate().filter(|(_, t)| t.is_finite()) {
            assert!(*value > 0.0);
            let y = solved.events[0].y.i((0, row)).unwrap().sqr().unwrap();
            sum = ((sum + t.i(row).unwrap()).unwrap() + y.sum_all().unwrap()).unwrap();
        }
        let grads = sum.backward().unwrap();
        let of_y0 = grads.get(&y0).unwrap().clone();
        (solved, of_y0)
    };
    let (all, of_all) = solve(&rows);
    let (others, of_others) = solve(&rows[1..]);
    assert_eq!(all.events[0].counts, [1; 3]);
    assert!(values(&all.events[0].t)[0].is_nan());
    assert!(values(&all.events[0].y.i((0, 0)).unwrap())
        .iter()
        .all(|y| y.is_nan()));
    assert_eq!(values(&of_all.i(0).unwrap()), [0.0; 3]);
    assert_eq!(bits(&of_all.i(1..).unwrap()), bits(&of_others));
    for row in 0..2 {
        let (ours, theirs) = (of_row(&all, row + 1), of_row(&others, row));
        let to_bits = |x: &[f64]| x.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
        assert_eq!(to_bits(&ours.numbers), to_bits(&theirs.numbers));
    }
}
