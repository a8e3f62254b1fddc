//! Events along a flow, held against closed forms: their times, their states, and the derivatives of their times.

use std::collections::BTreeMap;

use candle_core::{Tensor, Var};
use candle_diffeq::events::{odeint_event, Direction, Event, Hybrid, Occurrence};
use candle_diffeq::metrics::{Recorder, Stats};
use candle_diffeq::options::Adaptive;
use candle_diffeq::Time;

use crate::adaptive::Pair;
use crate::flows::numbers;
use crate::oracle::{Oracle, Result};
use crate::outcome::worse;

/// The largest errors of the times of events and of their derivatives.
fn bars(pair: &Pair) -> [f64; 2] {
    match pair.is_high() {
        true => [1e-9, 1e-6],
        false => [1e-3, 1e-3],
    }
}

/// Largest errors under one pair: of times, and of states and derivatives relative to one plus their size.
pub(crate) struct Events {
    pub(crate) count: usize,
    pub(crate) time: f64,
    pub(crate) state: f64,
    pub(crate) derivative: f64,
    pub(crate) stats: Stats,
}

impl Events {
    /// The largest error over its bar.
    pub(crate) fn over_bar(&self, pair: &Pair) -> f64 {
        let [time, derivative] = bars(pair);
        let state = self.state / pair.trajectory();
        worse(worse(self.time / time, state), self.derivative / derivative)
    }
}

/// What derivatives are with respect to.
struct Variables {
    weights: BTreeMap<String, Var>,
    y0: Var,
}

impl Variables {
    fn of(oracle: &Oracle) -> Result<Self> {
        let weight = |(name, w): (String, Tensor)| Ok((name, Var::from_tensor(&w)?));
        let weights = oracle.under("w.").into_iter().map(weight);
        Ok(Self {
            weights: weights.collect::<Result<_>>()?,
            y0: Var::from_tensor(oracle.tensor("y0")?)?,
        })
    }

    /// A weight of one number, of shape (1).
    fn weight(&self, oracle: &Oracle, name: &str) -> Result<&Var> {
        let missing = || oracle.failed(format_args!("no tensor `w.{name}`"));
        self.weights.get(name).ok_or_else(missing)
    }
}

/// Solves the problem of a file until its last event, and differentiates the times of all.
pub(crate) fn events(oracle: &Oracle, pair: &Pair) -> Result<Events> {
    let variables = Variables::of(oracle)?;
    let recorder = Recorder::default();
    let [ball, oscillator] = [["g", "e"], ["omega", "level"]];
    let (ours, order, states) = match oracle.problem() {
        Some("bouncing ball") => {
            let bounces = bounces(oracle, &variables, ball, pair, &recorder)?;
            (bounces, ball, "event_y_before")
        }
        Some("oscillator event") => {
            let crossings = crossings(oracle, &variables, oscillator, pair, &recorder)?;
            (crossings, oscillator, "event_y")
        }
        name => return Err(oracle.failed(format_args!("no events of {name:?}"))),
    };
    let stats = recorder.take();
    let times = numbers(oracle.tensor("event_t")?)?;
    let (states, slopes) = (
        numbers(oracle.tensor(states)?)?,
        numbers(oracle.tensor("grad.event_t")?)?,
    );
    let features = variables.y0.elem_count();
    let width = order.len() + features;
    if ours.len() != times.len() {
        let counts = format!("{} events, not {}", ours.len(), times.len());
        return Err(counts.into());
    }
    if states.len() != features * times.len() || slopes.len() != width * times.len() {
        return Err(oracle.failed("states or derivatives of another number of events"));
    }
    let mut events = Events {
        count: ours.len(),
        time: 0.0,
        state: 0.0,
        derivative: 0.0,
        stats,
    };
    let relative = |ours: &[f64], exact: &[f64]| {
        let errors = ours
            .iter()
            .zip(exact)
            .map(|(y, e)| (y - e).abs() / (1.0 + e.abs()));
        errors.fold(0.0, worse)
    };
    for (i, event) in ours.iter().enumerate() {
        let t: f64 = event.t.to_scalar()?;
        events.time = worse(events.time, (t - times[i]).abs());
        let exact = &states[features * i..features * (i + 1)];
        events.state = worse(events.state, relative(&numbers(&event.y)?, exact));
        let grads = event.t.backward()?;
        let of = |var: &Var| match grads.get(var) {
            Some(grad) => numbers(grad),
            None => numbers(&var.zeros_like()?),
        };
        let mut ours = vec![];
        for name in order {
            ours.extend(of(variables.weight(oracle, name)?)?);
        }
        ours.extend(of(&variables.y0)?);
        if ours.len() != width {
            return Err(oracle.failed("weights of more than one number"));
        }
        let exact = &slopes[width * i..width * (i + 1)];
        events.derivative = worse(events.derivative, relative(&ours, exact));
    }
    Ok(events)
}

fn options(pair: &Pair, recorder: &Recorder) -> candle_diffeq::OdeOptions {
    let [rtol, atol] = pair.tolerances();
    pair.options(Adaptive::new(rtol, atol).max_steps(1 << 22), recorder)
}

/// The last time of an event in the file.
fn last(oracle: &Oracle) -> Result<(usize, f64)> {
    let times = numbers(oracle.tensor("event_t")?)?;
    let missing = || oracle.failed("`event_t` is empty");
    let last = times.last().copied().ok_or_else(missing)?;
    Ok((times.len(), last))
}

/// A ball under gravity g, that keeps the part e of its speed at every bounce.
fn bounces(
    oracle: &Oracle,
    variables: &Variables,
    [g, e]: [&str; 2],
    pair: &Pair,
    recorder: &Recorder,
) -> Result<Vec<Occurrence<Tensor>>> {
    let [gravity, kept] = [variables.weight(oracle, g)?, variables.weight(oracle, e)?]
        .map(|weight| weight.as_tensor().clone());
    let number = |x: &Tensor| Ok::<_, crate::oracle::Error>(numbers(x)?[0]);
    let (count, last) = last(oracle)?;
    // The highest point after the last bounce: half of the flight until the next.
    let before = numbers(oracle.tensor("event_y_before")?)?;
    let speed = before.last().copied().unwrap_or_default().abs();
    let end = last + number(&kept)? * speed / number(&gravity)?;
    let field = move |_: &Time, y: &Tensor| Tensor::cat(&[&y.narrow(0, 1, 1)?, &gravity.neg()?], 0);
    let ground = Event::new(|_: &Time, y: &Tensor| y.get(0)).direction(Direction::Falling);
    let system = Hybrid::new(field, vec![ground], move |_, _, y: &Tensor| {
        let speed = y.narrow(0, 1, 1)?.broadcast_mul(&kept)?.neg()?;
        // Exactly on the ground.
        Tensor::cat(&[&y.narrow(0, 0, 1)?.zeros_like()?, &speed], 0)
    });
    let solved = system.max_events(count + 1).solve(
        variables.y0.as_tensor(),
        &[0.0, end],
        &options(pair, recorder),
    )?;
    Ok(solved.jumps.into_iter().map(|jump| jump.before).collect())
}

/// y1'' = −omega² y1 at the first times where y1 is `level`: as many as the file holds.
fn crossings(
    oracle: &Oracle,
    variables: &Variables,
    [omega, level]: [&str; 2],
    pair: &Pair,
    recorder: &Recorder,
) -> Result<Vec<Occurrence<Tensor>>> {
    let [omega, level] = [omega, level].map(|name| variables.weight(oracle, name));
    let (omega, level) = (omega?.as_tensor().clone(), level?.as_tensor().clone());
    let (count, last) = last(oracle)?;
    let end = last + std::f64::consts::TAU / numbers(&omega)?[0].abs();
    let field = move |_: &Time, y: &Tensor| {
        let force = y.narrow(0, 0, 1)?.broadcast_mul(&omega.sqr()?)?.neg()?;
        Tensor::cat(&[&y.narrow(0, 1, 1)?, &force], 0)
    };
    let mut event = Event::new(move |_: &Time, y: &Tensor| y.narrow(0, 0, 1)?.sub(&level));
    if count > 1 {
        event = event.recorded();
    }
    let solved = odeint_event(
        field,
        variables.y0.as_tensor(),
        &[0.0, end],
        &[event],
        &options(pair, recorder),
    )?;
    Ok(solved.events.into_iter().take(count).collect())
}
