//! Where event functions cross zero.

use candle_core::{DType, Tensor, Var};

use super::{Direction, Event};
use crate::error::{Error, EventDefect, Result};
use crate::integrate::observe::{InStep, Observer, Wanted};
use crate::state::State;
use crate::time::Time;

/// Points of a step at which the sign of an event function is looked at.
const POINTS: [f64; 4] = [0.25, 0.5, 0.75, 1.0];

/// The trajectory is taken to touch a surface, and not to cross it, where the event function changes slower than on
/// average by this factor.
const FLAT: f64 = 1e-8;

/// A crossing that was found.
pub(super) struct Crossing {
    pub(super) event: usize,
    pub(super) t: f64,
    /// How fast its function changes in the step on average.
    pub(super) pace: f64,
    /// ṗ there.
    pub(super) slope: Vec<Tensor>,
    /// Its number among the returned states.
    pub(super) row: usize,
}

/// The search for all crossings of a solve.
pub(super) struct Search<'a, S> {
    events: &'a [Event<S>],
    /// The event that has led to the start, whose sign there is rounding.
    fired: Option<usize>,
    /// The sign of each event function where the solve is, once it has one.
    signs: Vec<Option<f64>>,
    begun: bool,
    pub(super) found: Vec<Crossing>,
    /// The signs before the last step, and what had been found.
    before: (Vec<Option<f64>>, usize),
}

impl<'a, S: State> Search<'a, S> {
    pub(super) fn new(events: &'a [Event<S>], fired: Option<usize>) -> Self {
        Self {
            events,
            fired,
            signs: vec![None; events.len()],
            begun: false,
            found: vec![],
            before: Default::default(),
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

    /// The fraction of the step at which an event function crosses zero for the first time, and how fast the function
    /// changes on average.
    fn first(&mut self, event: usize, inside: &InStep<'_>) -> Result<Option<[f64; 2]>> {
        let (mut found, mut largest) = (None, 0.0f64);
        let (mut before, mut at) = (self.signs[event], 0.0);
        for x in POINTS {
            let g = self.value(event, inside, x)?;
            largest = largest.max(g.abs());
            if let Some(sign) = before {
                let crosses = g * sign <= 0.0;
                let wanted = match self.events[event].direction {
                    Direction::Both => true,
                    Direction::Rising => sign < 0.0,
                    Direction::Falling => sign > 0.0,
                };
                if crosses && wanted && found.is_none() {
                    found = Some(self.root(event, inside, [at, x], sign, g)?);
                }
            }
            // On the surface there is no sign.
            before = (g != 0.0).then_some(g.signum());
            at = x;
        }
        self.signs[event] = before;
        let pace = largest / inside.step().h.abs();
        Ok(found.map(|x| [x, pace]))
    }

    /// The root in [a, b], where g has `sign` at a and the value g_b at b, to four ulps of time: inverse quadratic
    /// interpolation where it is safe, otherwise bisection (Chandrupatla, Adv. Eng. Software 28, 1997).
    fn root(
        &self,
        event: usize,
        inside: &InStep<'_>,
        [a, b]: [f64; 2],
        sign: f64,
        g_b: f64,
    ) -> Result<f64> {
        let g_a = self.value(event, inside, a)?;
        // The sign may be that of a point before: then the crossing is where the step begins.
        if g_b == 0.0 || g_a * sign <= 0.0 {
            return Ok(if g_b == 0.0 { b } else { a });
        }
        let step = inside.step();
        let ulps = 4.0 * f64::EPSILON * step.t.abs().max(step.end.abs());
        let resolution = ulps.max(f64::MIN_POSITIVE) / step.h.abs();
        let (mut one, mut two, mut part) = ((b, g_b), (a, g_a), 0.5);
        loop {
            let x = one.0 + part * (two.0 - one.0);
            let now = (x, self.value(event, inside, x)?);
            let three = match now.1 * one.1 > 0.0 {
                true => std::mem::replace(&mut one, now),
                false => {
                    let three = std::mem::replace(&mut two, one);
                    one = now;
                    three
                }
            };
            let best = if one.1.abs() < two.1.abs() { one } else { two };
            let least = resolution / (2.0 * (two.0 - one.0).abs());
            if best.1 == 0.0 || least > 0.5 {
                return Ok(best.0);
            }
            let xi = (one.0 - two.0) / (three.0 - two.0);
            let phi = (one.1 - two.1) / (three.1 - two.1);
            let is_safe = phi * phi < xi && (1.0 - phi) * (1.0 - phi) < 1.0 - xi;
            part = match is_safe {
                true => {
                    let first = one.1 / (two.1 - one.1) * (three.1 / (two.1 - three.1));
                    let along = (three.0 - one.0) / (two.0 - one.0);
                    first + along * (one.1 / (three.1 - one.1)) * (two.1 / (three.1 - two.1))
                }
                false => 0.5,
            };
            part = part.clamp(least, 1.0 - least);
        }
    }
}

impl<S: State> Observer for Search<'_, S> {
    fn begin(&mut self) {
        self.signs = vec![None; self.events.len()];
        self.begun = false;
        self.found.clear();
    }

    fn retract(&mut self) {
        let (signs, found) = std::mem::take(&mut self.before);
        self.signs = signs;
        self.found.truncate(found);
    }

    fn accepted(&mut self, inside: &InStep<'_>, returned: usize, others: &[f64]) -> Result<Wanted> {
        if !self.begun {
            self.begun = true;
            for event in 0..self.events.len() {
                if self.fired != Some(event) {
                    let g = self.value(event, inside, 0.0)?;
                    self.signs[event] = (g != 0.0).then_some(g.signum());
                }
            }
        }
        self.before = (self.signs.clone(), self.found.len());
        let mut crossings = vec![];
        for event in 0..self.events.len() {
            if let Some([x, pace]) = self.first(event, inside)? {
                crossings.push((x, pace, event));
            }
        }
        // Ties in the order of the list.
        crossings.sort_by(|a, b| a.0.total_cmp(&b.0));
        let mut wanted = Wanted::default();
        for (x, pace, event) in crossings {
            let before = others.iter().filter(|&&other| other < x).count();
            self.found.push(Crossing {
                event,
                t: inside.time(x),
                pace,
                slope: inside.slope(x)?,
                row: returned + before + wanted.at.len(),
            });
            wanted.at.push(x);
            if self.events[event].terminal {
                wanted.stops = true;
                break;
            }
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
    // A derivative that is NaN is none.
    if sum.is_nan() || sum.abs() <= FLAT * found.pace {
        return Err(Error::Event(EventDefect::Grazing {
            event: found.event,
            t: found.t,
            derivative: sum,
        }));
    }
    Ok(sum)
}
