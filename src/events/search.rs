//! Where event functions cross zero.

use candle_core::{DType, Tensor, Var};

use super::Event;
use crate::crossing::{crossings, in_order, is_met, is_steep, sign, Place};
use crate::error::{Error, EventDefect, Result};
use crate::integrate::observe::{InStep, Observer, Wanted};
use crate::state::State;
use crate::time::Time;

/// A crossing that was found.
pub(super) struct Crossing {
    pub(super) event: usize,
    pub(super) t: f64,
    /// The largest time from the start of the solve to the step in which it was found.
    largest: f64,
    /// How fast its function changes in the step on average.
    pub(super) speed: f64,
    /// Values of its function up to this size near this place may be rounding alone.
    rounding: f64,
    /// ṗ there.
    pub(super) slope: Vec<Tensor>,
    /// Its number among the returned states.
    pub(super) row: usize,
}

/// What the events of a solve know of the solve before it, which an event ended.
#[derive(Clone, Debug, Default)]
pub(super) struct Origin {
    /// The events that ended it and those before at the same time, each with what is rounding in a value of its
    /// function.  A value of this size has no sign: the jump has left the state on the surface.
    pub(super) fired: Vec<(usize, f64)>,
    /// Events that occurred at the same time and were not reached: their number, and the sign that they had before.
    pub(super) together: Vec<(usize, f64)>,
    /// The largest time from the start of the solve to the event that ended it, whose rounding is that of the event.
    pub(super) largest: f64,
}

/// The search for all crossings of a solve.
pub(crate) struct Search<'a, S> {
    pub(super) events: &'a [Event<S>],
    /// What led to the start.
    origin: Origin,
    /// The sign of each event function where the solve is, once it has one.
    signs: Vec<Option<f64>>,
    /// The time at its start, once it has a step.
    begun: Option<f64>,
    pub(super) found: Vec<Crossing>,
    /// The signs before the last step, and what had been found.
    before: (Vec<Option<f64>>, usize),
    /// As [`Origin::together`], of this solve.
    together: Vec<(usize, f64)>,
}

impl<'a, S: State> Search<'a, S> {
    pub(crate) fn new(events: &'a [Event<S>]) -> Self {
        Self::after(events, Origin::default())
    }

    /// Of a solve that begins where an event has ended another one.
    pub(super) fn after(events: &'a [Event<S>], origin: Origin) -> Self {
        Self {
            events,
            origin,
            together: vec![],
            signs: vec![None; events.len()],
            begun: None,
            found: vec![],
            before: Default::default(),
        }
    }

    /// What a solve from the end of this one has to know, if an event has ended it.
    pub(super) fn origin(&self) -> Origin {
        let (mut fired, mut largest) = (vec![], 0.0);
        if let Some(last) = self.found.last().filter(|f| self.events[f.event].terminal) {
            largest = last.largest;
            // Also those that were recorded at the same time.
            let at_once = self.found.iter().filter(|f| is_met(f.t, last.t, largest));
            fired.extend(at_once.map(|f| (f.event, f.rounding)));
            let both = self.origin.largest.max(largest);
            if self.begun.is_some_and(|start| is_met(start, last.t, both)) {
                fired.extend(&self.origin.fired);
                largest = both;
            }
        }
        Origin {
            fired,
            together: self.together.clone(),
            largest,
        }
    }

    /// g at a fraction x of the step.
    fn value(&self, event: usize, inside: &InStep<'_>, x: f64) -> Result<f64> {
        let y = inside.state(x)?;
        let time = Time::new(inside.time(x), y[0].dtype(), y[0].device());
        let g = (self.events[event].function)(&time, &S::from_leaves(y)?)?;
        if g.elem_count() != 1 {
            let shape = g.shape().clone();
            return Err(Error::Event(EventDefect::NotScalar { event, shape }));
        }
        let g: f64 = g.reshape(())?.to_dtype(DType::F64)?.to_scalar()?;
        match g.is_finite() {
            true => Ok(g),
            false => Err(Error::Event(EventDefect::NonFinite {
                event,
                t: inside.time(x),
            })),
        }
    }
}

impl<S: State> Observer for Search<'_, S> {
    fn begin(&mut self) {
        self.signs = vec![None; self.events.len()];
        self.begun = None;
        self.found.clear();
    }

    fn retract(&mut self) {
        let (signs, found) = std::mem::take(&mut self.before);
        self.signs = signs;
        self.found.truncate(found);
    }

    fn accepted(&mut self, inside: &InStep<'_>, returned: usize, others: &[f64]) -> Result<Wanted> {
        if self.begun.is_none() {
            self.begun = Some(inside.step().t);
            for event in 0..self.events.len() {
                let of =
                    |list: &[(usize, f64)]| list.iter().find(|(e, _)| *e == event).map(|(_, x)| *x);
                let (fired, together) = (of(&self.origin.fired), of(&self.origin.together));
                self.signs[event] = match (fired, together) {
                    (None, Some(before)) => Some(before),
                    (rounding, _) => {
                        let g = self.value(event, inside, 0.0)?;
                        sign(g).filter(|_| rounding.is_none_or(|rounding| g.abs() > rounding))
                    }
                };
            }
        }
        self.before = (self.signs.clone(), self.found.len());
        let mut found = vec![];
        for event in 0..self.events.len() {
            let (direction, before) = (self.events[event].direction, self.signs[event]);
            let mut g = |x: f64| self.value(event, inside, x);
            let step = inside.step();
            let (places, after) = crossings(&mut g, [step.t, step.end], direction, before)?;
            self.signs[event] = after;
            found.extend(places.into_iter().map(|place| (place, event)));
        }
        let all = found.clone();
        let ends = in_order(&mut found, |event| self.events[event].terminal);
        self.together.clear();
        if let (true, Some((end, fired))) = (ends, found.last()) {
            let (end, step) = (inside.time(end.x), inside.step());
            let is_left = |crossing: &&(Place, usize)| {
                let (place, event) = crossing;
                let at_end = is_met(inside.time(place.x), end, step.t.abs().max(step.end.abs()));
                at_end && event != fired && !found.contains(crossing)
            };
            let left = all.iter().filter(is_left);
            self.together = left.map(|(place, event)| (*event, place.before)).collect();
        }
        let mut wanted = Wanted::default();
        for (place, event) in found {
            let Place {
                x, speed, residual, ..
            } = place;
            // States at one time: those of events come first.
            let before = others.iter().filter(|&&other| other < x).count();
            let (start, step) = (self.begun.unwrap_or(inside.step().t), inside.step());
            let largest = start.abs().max(step.end.abs());
            // The root is found to four ulps of time, and the number changes by speed · h in the step.
            let of_time = 8.0 * f64::EPSILON * largest * speed;
            let of_state = inside.roundoff() * speed * (step.end - step.t).abs();
            self.found.push(Crossing {
                event,
                t: inside.time(x),
                largest,
                speed,
                rounding: 16.0 * residual.max(of_time).max(of_state),
                slope: inside.slope(x)?,
                row: returned + before + wanted.at.len(),
            });
            wanted.at.push((x, self.events[event].terminal));
        }
        Ok(wanted)
    }
}

/// D = g_t + g_y · ṗ, the derivative of the event function along the trajectory.
pub(super) fn derivative<S: State>(
    event: &Event<S>,
    found: &Crossing,
    p: &[Tensor],
) -> Result<f64> {
    let leaves = p.iter().map(|p| Var::from_tensor(&p.detach()));
    let leaves = leaves.collect::<candle_core::Result<Vec<_>>>()?;
    let time = Time::differentiable(found.t, p[0].dtype(), p[0].device());
    let y = leaves.iter().map(|y| y.as_tensor().clone()).collect();
    let g = (event.function)(&time, &S::from_leaves(y)?)?.sum_all()?;
    if time.was_read() {
        let event = found.event;
        return Err(Error::Event(EventDefect::TimeValue { event }));
    }
    let mut sum = 0.0;
    if g.track_op() {
        let grads = g.backward()?;
        let number = |x: Tensor| x.sum_all()?.to_dtype(DType::F64)?.to_scalar::<f64>();
        if let Some(of_time) = time.leaf().and_then(|t| grads.get(t)) {
            sum += number(of_time.clone())?;
        }
        for (y, slope) in leaves.iter().zip(&found.slope) {
            if let Some(of_state) = grads.get(y) {
                let product = (of_state.to_dtype(DType::F64)? * slope.to_dtype(DType::F64)?)?;
                sum += number(product)?;
            }
        }
    }
    if !is_steep(sum, found.speed) {
        return Err(Error::Event(EventDefect::Grazing {
            event: found.event,
            t: found.t,
            derivative: sum,
        }));
    }
    Ok(sum)
}
