//! Events and jumps, held against closed forms.
//!
//! `cargo test --test events`.

mod common;

use std::collections::HashMap;

use candle_core::{DType, Device, Result, Tensor, Var};
use candle_diffeq::error::{AdaptiveDefect, Error, EventDefect};
use candle_diffeq::events::{odeint_event, Direction, Event, Hybrid, RowEvent};
use candle_diffeq::fields::FieldCheck;
use candle_diffeq::metrics::Recorder;
use candle_diffeq::options::{Adaptive, Checkpoint, Output, StepControl, Steps};
use candle_diffeq::tableau::{Tableau, BOSH3, DOPRI5, DOPRI8, FEHLBERG45, TSIT5};
use candle_diffeq::{odeint, NeuralOde, OdeOptions, Precision, Time};
use candle_nn::{Init, VarBuilder, VarMap};
use common::{bits, values, U_F32, U_F64};

fn options(method: &Tableau, tolerance: f64) -> OdeOptions {
    OdeOptions {
        method: method.clone(),
        steps: Steps::Adaptive(Adaptive::new(tolerance, tolerance)),
        ..Default::default()
    }
}

fn file(name: &str) -> HashMap<String, Tensor> {
    let path = format!("tests/data/adaptive/{name}.safetensors");
    candle_core::safetensors::load(path, &Device::Cpu).unwrap()
}

fn number(x: &Tensor) -> f64 {
    values(x)[0]
}

fn variable(x: &Tensor) -> Var {
    Var::from_tensor(x).unwrap()
}

/// (v, −g) of a state (p, v).
fn ball(g: &Var) -> impl Fn(&Time, &Tensor) -> Result<Tensor> + Send + Sync {
    let g = g.as_tensor().clone();
    move |_, y| Tensor::cat(&[&y.narrow(0, 1, 1)?, &g.neg()?], 0)
}

fn ground() -> Event {
    Event::new(|_: &Time, y: &Tensor| y.get(0)).direction(Direction::Falling)
}

/// A ball that loses a part of its speed at each bounce.
fn bouncing(
    g: &Var,
    e: &Var,
) -> Hybrid<Tensor, impl Fn(&Time, &Tensor) -> Result<Tensor> + Send + Sync> {
    let e = e.as_tensor().clone();
    Hybrid::new(ball(g), vec![ground()], move |_, _, y| {
        let v = y.narrow(0, 1, 1)?.broadcast_mul(&e)?.neg()?;
        // Exactly on the ground.
        Tensor::cat(&[&(y.narrow(0, 0, 1)? * 0.0)?, &v], 0)
    })
}

#[test]
fn the_bounces_of_a_ball_and_their_derivatives_are_those_of_the_closed_form() {
    let file = file("11_bouncing_ball");
    let [g, e, y0] = ["w.g", "w.e", "y0"].map(|n| variable(&file[n]));
    let exact = values(&file["event_t"]);
    let before = file["event_y_before"].to_vec2::<f64>().unwrap();
    let slopes = file["grad.event_t"].to_vec2::<f64>().unwrap();
    let end = exact[exact.len() - 1] + 1e-3;
    for method in [DOPRI5, TSIT5, DOPRI8] {
        let system = bouncing(&g, &e);
        let solved = system
            .solve(y0.as_tensor(), &[0.0, end], &options(&method, 1e-10))
            .unwrap();
        assert_eq!(solved.jumps.len(), exact.len(), "{}", method.name());
        for (i, jump) in solved.jumps.iter().enumerate() {
            let t = &jump.before.t;
            assert!(
                (number(t) - exact[i]).abs() <= 1e-9,
                "{} {i}",
                method.name()
            );
            let y = values(&jump.before.y);
            let error = (y[0] - before[i][0]).abs() + (y[1] - before[i][1]).abs();
            assert!(
                error <= 1e-8,
                "{} {i}: {y:?} {:?}",
                method.name(),
                before[i]
            );
            let grads = t.backward().unwrap();
            let of_y0 = values(grads.get(&y0).unwrap());
            let of = |var: &Var| grads.get(var).map_or(0.0, number);
            let ours = [of(&g), of(&e), of_y0[0], of_y0[1]];
            for (ours, exact) in ours.iter().zip(&slopes[i]) {
                let error = (ours - exact).abs() / (1.0 + exact.abs());
                assert!(error <= 1e-6, "{} {i}: {ours} {exact}", method.name());
            }
        }
    }
}

#[test]
fn the_first_crossing_of_an_oscillator_and_its_derivatives_are_exact() {
    let file = file("12_oscillator_event");
    let [omega, level, y0] = ["w.omega", "w.level", "y0"].map(|n| variable(&file[n]));
    for (method, tolerance, bar) in [
        (DOPRI5, 1e-10, 1.0),
        (TSIT5, 1e-10, 1.0),
        (DOPRI8, 1e-10, 1.0),
        (BOSH3, 1e-7, 1e3),
        (FEHLBERG45, 1e-7, 1e3),
    ] {
        let (w, l) = (omega.as_tensor().clone(), level.as_tensor().clone());
        let field = move |_: &Time, y: &Tensor| {
            let force = y.narrow(0, 0, 1)?.broadcast_mul(&w.sqr()?)?.neg()?;
            Tensor::cat(&[&y.narrow(0, 1, 1)?, &force], 0)
        };
        let event = Event::new(move |_: &Time, y: &Tensor| y.narrow(0, 0, 1)?.sub(&l));
        let times = [0.0, 100.0];
        let solved = odeint_event(
            field,
            y0.as_tensor(),
            &times,
            &[event],
            &options(&method, tolerance),
        );
        let solved = solved.unwrap();
        assert!(solved.ended && solved.outputs == 1);
        let event = &solved.events[0];
        assert!(
            (number(&event.t) - number(&file["event_t"])).abs() <= bar * 1e-9,
            "{}",
            method.name()
        );
        let (y, exact) = (values(&event.y), values(&file["event_y"]));
        assert!(y
            .iter()
            .zip(exact)
            .all(|(y, e)| (y - e).abs() <= bar * 1e-8));
        let grads = event.t.backward().unwrap();
        let of_y0 = values(grads.get(&y0).unwrap());
        let of = |var: &Var| number(grads.get(var).unwrap());
        let ours = [of(&omega), of(&level), of_y0[0], of_y0[1]];
        for (ours, exact) in ours.iter().zip(values(&file["grad.event_t"])) {
            assert!(
                (ours - exact).abs() <= bar * 1e-6,
                "{} {ours} {exact}",
                method.name()
            );
        }
        // The state on the surface changes with the level as the surface does.
        let grads = event.y.get(0).unwrap().backward().unwrap();
        assert!((number(grads.get(&level).unwrap()) - 1.0).abs() <= bar * 1e-8);
        assert!(number(grads.get(&omega).unwrap()).abs() <= bar * 1e-6);
    }
}

/// y' = 1.
fn clock(_: &Time, y: &Tensor) -> Result<Tensor> {
    (y * 0.0)? + 1.0
}

fn at(level: f64) -> Event {
    Event::new(move |_: &Time, y: &Tensor| y.get(0)? - level)
}

fn start(y: f64) -> Tensor {
    Tensor::new(&[y], &Device::Cpu).unwrap()
}

#[test]
fn events_are_recorded_in_order_and_a_terminal_one_ends_the_solve() {
    let events = [
        at(0.75).recorded(),
        at(0.25).recorded(),
        at(2.5),
        at(0.5).direction(Direction::Falling),
    ];
    let times = [0.0, 0.3, 0.7, 1.0, 2.0, 3.0];
    let solved =
        odeint_event(clock, &start(0.0), &times, &events, &options(&DOPRI5, 1e-6)).unwrap();
    let which: Vec<_> = solved.events.iter().map(|e| e.event).collect();
    assert_eq!(which, [1, 0, 2]);
    for (event, exact) in solved.events.iter().zip([0.25, 0.75, 2.5]) {
        assert!((number(&event.t) - exact).abs() <= 4.0 * f64::EPSILON * exact);
        assert!((number(&event.y) - exact).abs() <= 1e-14);
    }
    assert_eq!((solved.outputs, solved.ended), (5, true));
    for (y, t) in values(&solved.states).iter().zip(times) {
        assert!((y - t).abs() < 1e-14);
    }
    // Backward in time, and no event at all.
    let back = [3.0, 1.0, 0.0];
    let solved = odeint_event(
        clock,
        &start(3.0),
        &back,
        &[at(2.5)],
        &options(&DOPRI5, 1e-6),
    )
    .unwrap();
    assert!((number(&solved.events[0].t) - 2.5).abs() < 1e-14 && solved.outputs == 1);
    let solved = odeint_event(
        clock,
        &start(0.0),
        &times,
        &[at(9.0)],
        &options(&DOPRI5, 1e-6),
    )
    .unwrap();
    assert_eq!(
        (solved.events.len(), solved.outputs, solved.ended),
        (0, 6, false)
    );
}

#[test]
fn a_solve_may_begin_on_the_surface() {
    // Upwards from zero: nothing until it comes down again.
    let g = Var::new(&[2f64], &Device::Cpu).unwrap();
    let y0 = Tensor::new(&[0f64, 1.0], &Device::Cpu).unwrap();
    for event in [ground(), Event::new(|_: &Time, y: &Tensor| y.get(0))] {
        let solved = odeint_event(
            ball(&g),
            &y0,
            &[0.0, 5.0],
            &[event],
            &options(&DOPRI5, 1e-8),
        )
        .unwrap();
        assert!((number(&solved.events[0].t) - 1.0).abs() < 1e-9);
    }
}

#[test]
fn two_crossings_within_one_step_are_seen_at_interior_points() {
    // One step of this smooth field is longer than the time between the crossings.
    let g = Var::new(&[2f64], &Device::Cpu).unwrap();
    let y0 = Tensor::new(&[-0.1f64, 1.0], &Device::Cpu).unwrap();
    let event = Event::new(|_: &Time, y: &Tensor| y.get(0)).recorded();
    let solved = odeint_event(
        ball(&g),
        &y0,
        &[0.0, 4.0],
        &[event],
        &options(&DOPRI5, 1e-8),
    )
    .unwrap();
    assert_eq!(solved.events.len(), 2);
    for (event, sign) in solved.events.iter().zip([-1.0, 1.0]) {
        let root = (1.0 + sign * (1.0f64 - 0.4).sqrt()) / 2.0;
        assert!(
            (number(&event.t) - root).abs() < 1e-9,
            "{:?} {root}",
            solved.events
        );
    }
}

/// y' = (−y₂, y₁).
fn turning(_: &Time, y: &Tensor) -> Result<Tensor> {
    Tensor::cat(&[&y.narrow(0, 1, 1)?.neg()?, &y.narrow(0, 0, 1)?], 0)
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
fn every_crossing_between_the_points_of_a_step_is_an_event() {
    // From the angle −1, in one step through the angles ∓0.64, between which the first component is above 0.8.
    let y0 = Tensor::new(&[1f64.cos(), -1f64.sin()], &Device::Cpu).unwrap();
    let level = Var::new(0.8f64, &Device::Cpu).unwrap();
    let both = [[0.0, 0.5], [1.5, 2.0]];
    for (direction, quarters) in [
        (Direction::Both, &both[..]),
        (Direction::Rising, &both[..1]),
        (Direction::Falling, &both[1..]),
    ] {
        let of_level = level.as_tensor().clone();
        let event = Event::new(move |_: &Time, y: &Tensor| y.get(0)?.sub(&of_level));
        let event = event.direction(direction).recorded();
        let recorder = Recorder::default();
        let options = OdeOptions {
            recorder: Some(recorder.clone()),
            ..in_steps_of(2.0)
        };
        let solved = odeint_event(turning, &y0, &[0.0, 2.0], &[event], &options).unwrap();
        assert_eq!(recorder.take().steps, 1);
        assert_eq!(solved.events.len(), quarters.len(), "{direction:?}");
        for (event, [from, to]) in solved.events.iter().zip(quarters) {
            assert!((*from..*to).contains(&number(&event.t)), "{event:?}");
            let first = event.y.get(0).unwrap();
            assert!((number(&first) - 0.8).abs() <= 8.0 * U_F64);
            // It moves with the level.
            let grads = first.backward().unwrap();
            let moved = number(grads.get(&level).unwrap());
            assert!((moved - 1.0).abs() <= 1e3 * U_F64, "{moved}");
        }
    }
}

#[test]
fn events_at_one_place_are_all_recorded_before_one_of_them_ends_the_solve() {
    let level = || at(0.7);
    for (events, last) in [
        ([level(), level().recorded()], 0),
        ([level().recorded(), level()], 1),
    ] {
        let solved = odeint_event(
            clock,
            &start(0.0),
            &[0.0, 1.0],
            &events,
            &options(&DOPRI5, 1e-6),
        );
        let solved = solved.unwrap();
        let which: Vec<_> = solved.events.iter().map(|e| e.event).collect();
        assert_eq!((which, solved.ended), (vec![1 - last, last], true));
    }
}

/// y' = y.
fn growth(_: &Time, y: &Tensor) -> Result<Tensor> {
    y * 1.0
}

#[test]
fn an_output_at_the_time_of_an_event_keeps_the_derivative_of_its_own_time() {
    let times = Var::new(&[0f64, 0.5, 1.0], &Device::Cpu).unwrap();
    let (y0, options) = (start(1.0), in_steps_of(1.0));
    let plain = odeint(growth, &y0, times.as_tensor(), &options).unwrap();
    let middle = plain.get(1).unwrap();
    let event = at(number(&middle)).recorded();
    let solved = odeint_event(growth, &y0, times.as_tensor(), &[event], &options).unwrap();
    assert_eq!(number(&solved.events[0].t), 0.5);
    let of_times = |y: &Tensor| {
        let grads = y.backward().unwrap();
        values(grads.get(&times).unwrap())
    };
    let exact = of_times(&middle);
    assert!(exact[1] > 1.0);
    let ours = of_times(&solved.states.get(1).unwrap());
    assert!(
        (ours[1] - exact[1]).abs() <= 4.0 * U_F64 * exact[1],
        "{ours:?} {exact:?}"
    );
    // The event is where the level is, whenever outputs are wanted.
    assert_eq!(of_times(&solved.events[0].t)[1], 0.0);
}

#[test]
fn a_time_at_which_an_event_ends_the_solve_is_reached() {
    // At the end of a step, to the bit.
    for times in [&[0.0, 1.0][..], &[0.0, 0.25, 1.0], &[0.0, 1.0, 2.0]] {
        let options = OdeOptions {
            steps: Steps::Adaptive(Adaptive::new(1e-6, 1e-6).step_t([1.0])),
            ..options(&DOPRI5, 1e-6)
        };
        let plain = odeint(growth, &start(1.0), times, &options).unwrap();
        let last = times.iter().position(|t| *t == 1.0).unwrap();
        let event = at(number(&plain.get(last).unwrap()));
        let solved = odeint_event(growth, &start(1.0), times, &[event], &options).unwrap();
        assert_eq!((solved.outputs, solved.ended), (last + 1, true));
        assert_eq!(number(&solved.events[0].t), 1.0);
        let reached = plain.narrow(0, 0, last + 1).unwrap();
        assert_eq!(bits(&solved.states), bits(&reached));
    }
    // And inside.
    let mut met = 0;
    for i in 1..97 {
        let level = i as f64 / 97.0;
        let times = [0.0, level, 1.5];
        let solved = odeint_event(
            clock,
            &start(0.0),
            &times,
            &[at(level)],
            &options(&DOPRI5, 1e-6),
        );
        let solved = solved.unwrap();
        let t = number(&solved.events[0].t);
        met += usize::from(t == level);
        // One that rounding has put behind the event may be reached or not.
        if t < level {
            continue;
        }
        assert_eq!(
            solved.outputs,
            times.iter().filter(|time| **time <= t).count()
        );
    }
    assert!(met > 9, "{met} events are at a time to the bit");
}

#[test]
fn the_state_at_the_time_of_a_jump_is_the_one_before_it() {
    for i in 1..97 {
        let level = i as f64 / 97.0;
        let system = Hybrid::new(clock, vec![at(level)], |_, _, y: &Tensor| y * 0.0);
        let end = 1.5 * level;
        for time in [level.next_down(), level, level.next_up()] {
            let options = options(&DOPRI5, 1e-6);
            let solved = system
                .solve(&start(0.0), &[0.0, time, end], &options)
                .unwrap();
            let states = values(&solved.states);
            assert_eq!((states.len(), solved.jumps.len()), (3, 1), "{level}");
            assert!((states[1] - level).abs() <= 1e-14, "{level} {states:?}");
            assert!(
                (states[2] - 0.5 * level).abs() <= 1e-14,
                "{level} {states:?}"
            );
        }
        // Where the time is zero, and rounding is that of the times before.
        let options_at_zero = options(&DOPRI5, 1e-6);
        for time in [-U_F64 * level, 0.0, U_F64 * level] {
            let times = [-level, time, 0.5 * level];
            let solved = system.solve(&start(0.0), &times, &options_at_zero);
            let states = values(&solved.unwrap().states);
            assert!((states[1] - level).abs() <= 1e-14, "{level} {states:?}");
        }
        // Where it is the last time.
        let solved = system
            .solve(&start(0.0), &[0.0, level], &options(&DOPRI5, 1e-6))
            .unwrap();
        let states = values(&solved.states);
        assert!((states[1] - level).abs() <= 1e-14, "{level} {states:?}");
    }
}

#[test]
fn a_hybrid_system_without_a_state_is_an_error() {
    let still = |_: &Time, y: &Vec<Tensor>| Ok(y.clone());
    let system = Hybrid::new(still, vec![], |_, _, y: &Vec<Tensor>| Ok(y.clone()));
    let error = system.solve(&vec![], &[0.0, 1.0], &options(&DOPRI5, 1e-6));
    assert!(matches!(error.map(|_| ()), Err(Error::EmptyState)));
}

#[test]
fn gradients_with_events_have_the_same_bits_whatever_is_kept() {
    let [g, e] = [2.0, 0.8].map(|x| Var::new(&[x], &Device::Cpu).unwrap());
    let y0 = Var::new(&[1f64, 0.0], &Device::Cpu).unwrap();
    let solve = |checkpoint| {
        let options = OdeOptions {
            checkpoint,
            ..options(&DOPRI5, 1e-8)
        };
        let solved = bouncing(&g, &e)
            .solve(y0.as_tensor(), &[0.0, 2.0, 3.5], &options)
            .unwrap();
        let loss = solved.states.sqr().unwrap().sum_all().unwrap();
        let grads = loss.backward().unwrap();
        [&g, &e, &y0].map(|var| bits(grads.get(var).unwrap()))
    };
    let all = solve(Checkpoint::All);
    for checkpoint in [Checkpoint::Every(3), Checkpoint::States(2)] {
        assert_eq!(solve(checkpoint), all);
    }
}

#[test]
fn the_state_after_jumps_has_the_derivative_of_the_closed_form() {
    // After the first bounce from height h: p(t) = v (t − t1) − g/2 (t − t1)², v = e √(2gh), t1 = √(2h/g).
    let [g, e] = [2.0, 0.8].map(|x| Var::new(&[x], &Device::Cpu).unwrap());
    let y0 = Var::new(&[1f64, 0.0], &Device::Cpu).unwrap();
    let solved = bouncing(&g, &e)
        .solve(y0.as_tensor(), &[0.0, 1.5], &options(&DOPRI5, 1e-10))
        .unwrap();
    assert_eq!(solved.jumps.len(), 1);
    let p = solved.states.get(1).unwrap().get(0).unwrap();
    let grads = p.backward().unwrap();
    let exact = |g: f64, e: f64, h: f64| {
        let (v, s) = (e * (2.0 * g * h).sqrt(), 1.5 - (2.0 * h / g).sqrt());
        v * s - 0.5 * g * s * s
    };
    let d = 1e-6;
    let slope = |dg: f64, de: f64, dh: f64| {
        let at = |s: f64| exact(2.0 + s * dg, 0.8 + s * de, 1.0 + s * dh);
        (at(d) - at(-d)) / (2.0 * d)
    };
    assert!((number(&p) - exact(2.0, 0.8, 1.0)).abs() < 1e-9);
    assert!((number(grads.get(&g).unwrap()) - slope(1.0, 0.0, 0.0)).abs() < 1e-7);
    assert!((number(grads.get(&e).unwrap()) - slope(0.0, 1.0, 0.0)).abs() < 1e-7);
    assert!((number(grads.get(&y0).unwrap()) - slope(0.0, 0.0, 1.0)).abs() < 1e-7);
}

#[test]
fn an_event_that_a_jump_has_left_is_met_again_in_the_first_step_after_it() {
    // A neuron: y' = 1200 from −65, at −50 back to −65.  The first step after a jump may pass the level at once.
    let drift = |_: &Time, y: &Tensor| y.ones_like()? * 1200.0;
    let level = Event::new(|_: &Time, y: &Tensor| y.get(0)? + 50.0);
    let reset = |_: usize, _: &Tensor, y: &Tensor| y.ones_like()? * -65.0;
    for dtype in [DType::F64, DType::F32] {
        let system = Hybrid::new(drift, vec![level.clone()], reset);
        let steps = Adaptive::new(1e-3, 1e-6);
        for steps in [steps.clone(), steps.first_step(0.9)] {
            let options = OdeOptions {
                method: DOPRI5,
                steps: Steps::Adaptive(steps),
                ..Default::default()
            };
            let y0 = start(-65.0).to_dtype(dtype).unwrap();
            let solved = system.solve(&y0, &[0.0, 0.99], &options).unwrap();
            assert_eq!(solved.jumps.len(), 79, "{dtype:?}");
            let u = if dtype == DType::F64 { U_F64 } else { U_F32 };
            for (i, jump) in solved.jumps.iter().enumerate() {
                let error = number(&jump.before.t) - 0.0125 * (i + 1) as f64;
                assert!(error.abs() <= 64.0 * u, "{dtype:?} {i}: {error:e}");
            }
        }
    }
}

#[test]
fn every_flow_of_a_hybrid_system_has_the_precision_of_y0() {
    let drift = |_: &Time, y: &Tensor| {
        let rounded = y.to_dtype(DType::BF16)?.to_dtype(y.dtype())?;
        assert_eq!(
            bits(&rounded),
            bits(y),
            "a stage that is not rounded to bf16"
        );
        (y * 0.5)? + 1.0
    };
    let event = Event::new(|_: &Time, y: &Tensor| y.get(0)?.to_dtype(DType::F32)? - 0.25);
    let reset = |_: usize, _: &Tensor, y: &Tensor| y * 0.0;
    let system = Hybrid::new(drift, vec![event], reset);
    let y0 = start(0.0).to_dtype(DType::BF16).unwrap();
    let solved = system.solve(&y0, &[0.0, 0.9], &options(&DOPRI5, 1e-3));
    assert_eq!(solved.unwrap().jumps.len(), 3);
}

#[test]
fn events_that_are_recorded_between_jumps_are_returned() {
    let event = |level: f64| Event::new(move |_: &Time, y: &Tensor| y.get(0)? - level);
    let events = vec![event(1.0), event(0.5).recorded()];
    let system = Hybrid::new(clock, events, |_, _, y: &Tensor| y * 0.0);
    let solved = system.solve(&start(0.0), &[0.0, 2.75], &options(&DOPRI5, 1e-6));
    let solved = solved.unwrap();
    let times = solved.recorded.iter().map(|occurred| number(&occurred.t));
    for (t, exact) in times.zip([0.5, 1.5, 2.5]) {
        assert!((t - exact).abs() <= 64.0 * U_F64, "{t}");
    }
    assert_eq!((solved.recorded.len(), solved.jumps.len()), (3, 2));
    assert!(solved.recorded.iter().all(|occurred| occurred.event == 1));
}

#[test]
fn an_event_that_is_recorded_with_the_one_that_ends_a_flow_occurs_once() {
    // A ball that is reflected where it is, on both sides of rounding.
    for height in [0.7, 1.0, 2f64.sqrt(), 3.3] {
        let g = Var::new(&[2f64], &Device::Cpu).unwrap();
        let floor = || Event::new(|_: &Time, y: &Tensor| y.get(0));
        let events = vec![floor().direction(Direction::Falling), floor().recorded()];
        let jump = |_: usize, _: &Tensor, y: &Tensor| {
            Tensor::cat(&[&y.narrow(0, 0, 1)?, &(y.narrow(0, 1, 1)? * -0.9)?], 0)
        };
        let system = Hybrid::new(ball(&g), events, jump);
        let y0 = Tensor::new(&[height, 0.0], &Device::Cpu).unwrap();
        let first = height.sqrt();
        let times = [0.0, 2.0 * first];
        let solved = system.solve(&y0, &times, &options(&DOPRI5, 1e-10)).unwrap();
        assert_eq!(
            (solved.jumps.len(), solved.recorded.len()),
            (1, 1),
            "{height}"
        );
    }
}

#[test]
fn a_jump_to_a_state_of_other_shapes_is_an_error() {
    let still = |_: &Time, y: &Vec<Tensor>| y.iter().map(Tensor::ones_like).collect();
    for count in [1, 3] {
        let event = Event::new(|_: &Time, y: &Vec<Tensor>| y[0].get(0)? - 0.5);
        let jump = move |_: usize, _: &Tensor, y: &Vec<Tensor>| Ok(vec![y[0].clone(); count]);
        let y0 = vec![start(0.0); 2];
        for end in [0.5, 1.0] {
            let system = Hybrid::new(still, vec![event.clone()], jump);
            let refused = system.solve(&y0, &[0.0, end], &options(&DOPRI5, 1e-6));
            match defect(refused) {
                EventDefect::JumpShapes { expected, got, .. } => {
                    assert_eq!((expected.len(), got.len()), (2, count));
                }
                other => panic!("{other:?}"),
            }
        }
    }
}

fn defect(result: candle_diffeq::Result<impl std::fmt::Debug>) -> EventDefect {
    match result {
        Err(Error::Event(defect)) => defect,
        other => panic!("{other:?}"),
    }
}

#[test]
fn events_that_cannot_be_found_or_differentiated_are_errors() {
    let ok = options(&DOPRI5, 1e-6);
    let times = [0.0, 2.0];
    let solve = |y0: &Tensor, event: Event, options: &OdeOptions| {
        odeint_event(clock, y0, &times, &[event], options)
    };
    let fixed = OdeOptions::default();
    let error = solve(&start(0.0), at(1.0), &fixed).unwrap_err();
    assert!(matches!(error, Error::Adaptive(AdaptiveDefect::FixedSteps)));
    let last = OdeOptions {
        output: Output::Final,
        ..ok.clone()
    };
    let error = solve(&start(0.0), at(1.0), &last).unwrap_err();
    assert!(matches!(
        error,
        Error::Adaptive(AdaptiveDefect::EventOutput)
    ));
    let two = Event::new(|_: &Time, y: &Tensor| Tensor::cat(&[y, y], 0));
    assert!(matches!(
        defect(solve(&start(0.0), two, &ok)),
        EventDefect::NotScalar { event: 0, .. }
    ));
    let nan = Event::new(|_: &Time, y: &Tensor| y.get(0)? * f64::NAN);
    assert!(matches!(
        defect(solve(&start(0.0), nan, &ok)),
        EventDefect::NonFinite { .. }
    ));
    // (y − 1)³ touches with slope zero.
    let flat = Event::new(|_: &Time, y: &Tensor| (y.get(0)? - 1.0)?.powf(3.0));
    let y0 = Var::new(&[0f64], &Device::Cpu).unwrap();
    let grazing = defect(odeint_event(clock, y0.as_tensor(), &times, &[flat], &ok));
    assert!(
        matches!(grazing, EventDefect::Grazing { event: 0, .. }),
        "{grazing}"
    );
    // A ball that bounces infinitely often in a finite time.
    let [g, e] = [2.0, 0.1].map(|x| Var::new(&[x], &Device::Cpu).unwrap());
    let y0 = Tensor::new(&[1f64, 0.0], &Device::Cpu).unwrap();
    let zeno = bouncing(&g, &e).max_events(5).solve(&y0, &[0.0, 9.0], &ok);
    assert!(matches!(
        defect(zeno),
        EventDefect::TooMany { count: 5, .. }
    ));
}

/// (cos ωt, −ω sin ωt).
fn oscillator(omega: &Var) -> impl Fn(&Time, &Tensor) -> Result<Tensor> + Send + Sync {
    let omega = omega.as_tensor().clone();
    move |_: &Time, y: &Tensor| {
        let force = y.narrow(0, 0, 1)?.broadcast_mul(&omega.sqr()?)?.neg()?;
        Tensor::cat(&[&y.narrow(0, 1, 1)?, &force], 0)
    }
}

#[test]
fn recorded_events_are_as_accurate_as_steps_whatever_the_interpolant() {
    for (method, tolerance, bar) in [
        (DOPRI5, 1e-10, 1e-9),
        (TSIT5, 1e-10, 1e-9),
        (DOPRI8, 1e-10, 1e-9),
        (BOSH3, 1e-6, 1e-4),
        (FEHLBERG45, 1e-7, 1e-5),
    ] {
        let omega = Var::new(&[1.3f64], &Device::Cpu).unwrap();
        let y0 = Tensor::new(&[1f64, 0.0], &Device::Cpu).unwrap();
        let level = |level: f64| Event::new(move |_: &Time, y: &Tensor| y.get(0)? - level);
        // Often two of them in one step.
        let events = [level(0.3).recorded(), level(0.29).recorded()];
        let times = [0.0, 5.0, 20.0];
        let steps = Adaptive::new(tolerance, tolerance * 1e-2);
        let options = OdeOptions {
            steps: Steps::Adaptive(steps),
            ..options(&method, tolerance)
        };
        let solved = odeint_event(oscillator(&omega), &y0, &times, &events, &options).unwrap();
        let mut exact = vec![];
        for (event, level) in [0.3f64, 0.29].into_iter().enumerate() {
            for turn in 0..6 {
                let (angle, whole) = (level.acos(), std::f64::consts::TAU * turn as f64);
                exact.extend([whole + angle, whole - angle].map(|angle| (angle / 1.3, event)));
            }
        }
        exact.retain(|(t, _)| (0.0..20.0).contains(t));
        exact.sort_by(|a, b| a.0.total_cmp(&b.0));
        let name = method.name();
        assert_eq!(
            (solved.events.len(), solved.outputs),
            (exact.len(), 3),
            "{name}"
        );
        assert!(!solved.ended && exact.len() > 12);
        for (ours, (t, event)) in solved.events.iter().zip(&exact) {
            assert_eq!(ours.event, *event, "{name}");
            let error = number(&ours.t) - t;
            assert!(error.abs() <= bar, "{name} {t}: {error:e}");
            let grads = ours.t.backward().unwrap();
            let error = number(grads.get(&omega).unwrap()) + t / 1.3;
            assert!(error.abs() <= 1e3 * bar, "{name} {t}: {error:e}");
        }
        let last = solved.states.get(2).unwrap();
        assert!(
            (values(&last)[0] - (1.3f64 * 20.0).cos()).abs() <= 10.0 * bar,
            "{name}"
        );
    }
}

#[test]
fn every_evaluation_of_a_solve_with_events_is_counted_once() {
    use std::sync::atomic::{AtomicUsize, Ordering};
    let mut lost = 0;
    for method in [FEHLBERG45, DOPRI8, BOSH3, DOPRI5] {
        for i in 0..60 {
            // At such tolerances the interpolant is off by more than a shorter step is longer than to its event: some of
            // the crossings that are found on it are lost on the shorter step, and the longer one is taken after all.
            let level = -0.9 + 0.03 * i as f64;
            let event = Event::new(move |_: &Time, y: &Tensor| y.get(0)? - level);
            let calls = std::sync::Arc::new(AtomicUsize::new(0));
            let counted = calls.clone();
            let field = move |t: &Time, y: &Tensor| {
                counted.fetch_add(1, Ordering::Relaxed);
                oscillator(&Var::new(&[1.3f64], &Device::Cpu)?)(t, y)
            };
            let recorder = Recorder::tracing();
            let options = OdeOptions {
                recorder: Some(recorder.clone()),
                check: FieldCheck::Never,
                ..options(&method, 3e-2)
            };
            let y0 = Tensor::new(&[1f64, 0.0], &Device::Cpu).unwrap();
            let recorded = event.clone().direction(Direction::Rising).recorded();
            for event in [event, recorded] {
                let times = [0.0, 9.0];
                let solved = odeint_event(field.clone(), &y0, &times, &[event], &options).unwrap();
                let stats = recorder.take();
                let name = method.name();
                assert_eq!(
                    stats.evaluations,
                    calls.swap(0, Ordering::Relaxed),
                    "{name} {level}"
                );
                if solved.ended {
                    let end = stats.step_times.len() - 1;
                    let [t0, t1] = [stats.step_times[end - 1], stats.step_times[end]];
                    let x = (number(&solved.events[0].t) - t0) / (t1 - t0);
                    lost += usize::from((0.01..0.99).contains(&x));
                }
            }
        }
    }
    assert!(
        lost > 0,
        "no crossing was lost: the test does not reach the case"
    );
}

/// Fields and events of these tests: a linear field whose matrix is a weight, and a plane whose place is a variable.
fn turn(vb: VarBuilder<'_>) -> Result<impl Fn(&Time, &Tensor) -> Result<Tensor> + Send + Sync> {
    let a = vb.get_with_hints((2, 2), "a", Init::Const(0.3))?;
    Ok(move |_: &Time, y: &Tensor| y.matmul(&a.t()?.to_dtype(y.dtype())?)?.tanh())
}

fn plane(place: &Var) -> Event {
    let place = place.as_tensor().clone();
    Event::new(move |_: &Time, y: &Tensor| {
        let place = place.to_dtype(y.dtype())?;
        y.get(0)?.narrow(0, 0, 1)?.broadcast_sub(&place)
    })
}

#[test]
fn events_of_a_model_and_their_gradients_are_those_of_its_field() {
    let vars = VarMap::new();
    let place = variable(&Tensor::new(&[0.8f64], &Device::Cpu).unwrap());
    let ode = NeuralOde::from_field(&vars, "", DType::F64, &Device::Cpu, turn).unwrap();
    let ode = ode.options(options(&DOPRI5, 1e-8));
    let of_weight = vars.all_vars().remove(0);
    let field = turn(VarBuilder::from_varmap(&vars, DType::F64, &Device::Cpu)).unwrap();
    let y0 = variable(&Tensor::new(&[[0.5f64, 0.6]], &Device::Cpu).unwrap());
    let times = [0.0, 0.3, 5.0];
    let ours = ode
        .events(y0.as_tensor(), &times, &[plane(&place)])
        .unwrap();
    let of_field = odeint_event(
        field,
        y0.as_tensor(),
        &times,
        &[plane(&place)],
        &options(&DOPRI5, 1e-8),
    )
    .unwrap();
    assert!(ours.ended && ours.outputs == 2);
    assert_eq!(bits(&ours.states), bits(&of_field.states));
    let [ours, of_field] = [ours, of_field].map(|solved| {
        let occurrence = &solved.events[0];
        let sum = (occurrence.y.sum_all().unwrap() + &occurrence.t).unwrap();
        let grads = sum.backward().unwrap();
        let gradients = [&of_weight, &y0, &place].map(|var| values(grads.get(var).unwrap()));
        (number(&occurrence.t), gradients)
    });
    assert_eq!(ours.0.to_bits(), of_field.0.to_bits());
    for (ours, of_field) in ours.1.iter().flatten().zip(of_field.1.iter().flatten()) {
        assert!((ours - of_field).abs() <= 64.0 * U_F64 * of_field.abs());
        assert!(*ours != 0.0);
    }
}

#[test]
fn events_of_a_model_in_low_precision_are_near_those_in_f64() {
    let device = Device::Cpu;
    let of = |dtype: DType, precision: Option<Precision>, tolerance: f64| {
        let vars = VarMap::new();
        let ode = NeuralOde::from_field(&vars, "", dtype, &device, turn).unwrap();
        let ode = ode.options(OdeOptions {
            precision,
            ..options(&DOPRI5, tolerance)
        });
        let place = variable(&Tensor::new(&[0.8f64], &device).unwrap());
        let y0 = Tensor::new(&[[0.5f64, 0.6]], &device).unwrap();
        let y0 = y0.to_dtype(dtype).unwrap();
        let solved = ode.events(&y0, &[0.0, 5.0], &[plane(&place)]).unwrap();
        let t = &solved.events[0].t;
        let grads = t.backward().unwrap();
        let of_weight = values(grads.get(&vars.all_vars()[0]).unwrap());
        let of_place = values(grads.get(&place).unwrap());
        [vec![number(t)], of_weight, of_place].concat()
    };
    let exact = of(DType::F64, None, 1e-10);
    for (precision, u) in [
        (Precision::bf16(), 2f64.powi(-8)),
        (Precision::f16(), 2f64.powi(-11)),
    ] {
        for (x, exact) in of(DType::F32, Some(precision), 1e-3).iter().zip(&exact) {
            let error = (x - exact).abs() / exact.abs();
            assert!(error <= 8.0 * u, "{precision:?} {error:e}");
        }
    }
}

#[test]
fn events_of_a_model_need_adaptive_steps_and_all_times() {
    let vars = VarMap::new();
    let ode = NeuralOde::from_field(&vars, "", DType::F64, &Device::Cpu, turn).unwrap();
    let place = variable(&Tensor::new(&[0.8f64], &Device::Cpu).unwrap());
    let y0 = Tensor::new(&[[0.5f64, 0.6]], &Device::Cpu).unwrap();
    let fixed = ode.events(&y0, &[0.0, 1.0], &[plane(&place)]);
    assert!(matches!(
        fixed.unwrap_err(),
        Error::Adaptive(AdaptiveDefect::FixedSteps)
    ));
    let ode = ode.options(OdeOptions {
        output: Output::Final,
        ..options(&DOPRI5, 1e-6)
    });
    let last = ode.events(&y0, &[0.0, 1.0], &[plane(&place)]);
    assert!(matches!(
        last.unwrap_err(),
        Error::Adaptive(AdaptiveDefect::EventOutput)
    ));
    let ode = ode.options(options(&DOPRI5, 1e-6));
    let rows = ode.row_events(&y0, &[0.0, 1.0], &[RowEvent::new(0, 0.8)]);
    assert!(matches!(
        rows.unwrap_err(),
        Error::Adaptive(AdaptiveDefect::NoRows { .. })
    ));
}

#[test]
fn events_of_a_model_are_differentiable_in_its_arguments() {
    // y' = c, so that y crosses 1 from 0 at t = 1/c, and ∂t/∂c = −1/c².
    let vars = VarMap::new();
    let build =
        |_: VarBuilder<'_>| Ok(|_: &Time, y: &Tensor, c: &Tensor| y.zeros_like()?.broadcast_add(c));
    let ode = NeuralOde::with_args(&vars, "", DType::F64, &Device::Cpu, build).unwrap();
    let ode = ode.options(options(&DOPRI5, 1e-8));
    let c = variable(&Tensor::new(&[1.6f64], &Device::Cpu).unwrap());
    let y0 = Tensor::zeros(1, DType::F64, &Device::Cpu).unwrap();
    let event = Event::new(|_: &Time, y: &Tensor| y - 1.0);
    let solved = ode.given(c.as_tensor()).events(&y0, &[0.0, 2.0], &[event]);
    let t = solved.unwrap().events[0].t.clone();
    assert!((number(&t) - 1.0 / 1.6).abs() <= 16.0 * U_F64);
    let grads = t.backward().unwrap();
    let by_c = number(grads.get(&c).unwrap());
    assert!((by_c + 1.0 / (1.6 * 1.6)).abs() <= 64.0 * U_F64);
}

#[test]
fn events_at_the_same_time_all_occur_in_a_hybrid_system() {
    // Two equal balls over one floor, at many heights: (p, v, p, v).
    let fall = |_: &Time, y: &Tensor| {
        let down = (y.narrow(0, 1, 1)?.ones_like()? * -9.81)?;
        Tensor::cat(&[&y.narrow(0, 1, 1)?, &down, &y.narrow(0, 3, 1)?, &down], 0)
    };
    let floor = |ball: usize| {
        Event::new(move |_: &Time, y: &Tensor| y.get(2 * ball)).direction(Direction::Falling)
    };
    for (i, at_zero) in (1..40).flat_map(|i| [(i, false), (i, true)]) {
        let height = 0.3 + i as f64 / 17.0;
        let system = Hybrid::new(fall, vec![floor(0), floor(1)], |event, _, y: &Tensor| {
            let mut numbers = y.to_vec1::<f64>()?;
            numbers[2 * event] = 0.0;
            numbers[2 * event + 1] *= -0.5;
            Tensor::new(numbers, y.device())
        });
        let y0 = Tensor::new(&[height, 0.0, height, 0.0], &Device::Cpu).unwrap();
        let first = (2.0 * height / 9.81).sqrt();
        // At time zero nothing but the step says how exact a time is.
        let from = if at_zero { -first } else { 0.0 };
        let times = [from, from + 1.5 * first];
        let solved = system.solve(&y0, &times, &options(&DOPRI5, 1e-9)).unwrap();
        // Crossings in both directions, with a jump that leaves the places as they are.
        let both = |ball: usize| Event::new(move |_: &Time, y: &Tensor| y.get(2 * ball));
        let system = Hybrid::new(fall, vec![both(0), both(1)], |event, _, y: &Tensor| {
            let mut numbers = y.to_vec1::<f64>()?;
            numbers[2 * event + 1] *= -0.5;
            Tensor::new(numbers, y.device())
        });
        let again = system.solve(&y0, &times, &options(&DOPRI5, 1e-9)).unwrap();
        assert_eq!(again.jumps.len(), 2, "{height}");
        let mut balls: Vec<_> = solved.jumps.iter().map(|jump| jump.before.event).collect();
        balls.sort_unstable();
        assert_eq!(balls, [0, 1], "{height}");
        let y = values(&solved.states.get(1).unwrap());
        assert!(y[0] > 0.0 && (y[0] - y[2]).abs() < 1e-7, "{height}: {y:?}");
    }
}

#[test]
fn an_event_that_reads_the_time_as_a_number_has_no_gradient_and_says_so() {
    let event =
        || Event::new(|t: &Time, y: &Tensor| (y.get(0)? - (2.0 * t.value() - 1.0))?.reshape(()));
    let y0 = variable(&start(0.2));
    let defect = defect(odeint_event(
        clock,
        y0.as_tensor(),
        &[0.0, 3.0],
        &[event()],
        &options(&DOPRI5, 1e-6),
    ));
    assert_eq!(defect, EventDefect::TimeValue { event: 0 });
    // Without gradients there is nothing to miss.
    let solved = odeint_event(
        clock,
        &start(0.2),
        &[0.0, 3.0],
        &[event()],
        &options(&DOPRI5, 1e-6),
    );
    assert!((number(&solved.unwrap().events[0].t) - 1.2).abs() < 1e-9);
}

#[test]
fn rows_with_steps_of_their_own_are_refused_where_every_step_is_looked_at() {
    let options = OdeOptions {
        steps: Steps::Adaptive(Adaptive::new(1e-6, 1e-6).control(StepControl::Rows)),
        ..options(&DOPRI5, 1e-6)
    };
    let solved = odeint_event(clock, &start(0.0), &[0.0, 1.0], &[at(0.5)], &options);
    assert!(matches!(
        solved,
        Err(Error::Adaptive(AdaptiveDefect::RowsObserved))
    ));
}
