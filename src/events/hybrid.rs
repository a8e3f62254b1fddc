//! Hybrid systems: the state follows an ODE until an event occurs, changes by a jump at the event, and then follows
//! the ODE again.

use std::sync::Arc;

use candle_core::{DType, Device, Shape, Tensor};

use super::search::Origin;
use super::{solve, Event, Occurrence};
use crate::crossing::is_met;
use crate::error::{Error, EventDefect, Result};
use crate::field::VectorField;
use crate::problem::OdeOptions;
use crate::state::State;
use crate::time::Times;

/// A flow y' = f(t, y) until an event, then a jump y⁺ = J(t, y⁻), then the flow again.
///
/// Times and states of the jumps are differentiable, because the flow after a jump begins at a time that has a
/// gradient.  So gradients contain the saltation matrix of hybrid systems, which need not be written down.  Variables that
/// the field, an event or the jump reads receive gradients.
pub struct Hybrid<S, F> {
    field: Arc<F>,
    events: Vec<Event<S>>,
    jump: Box<JumpFunction<S>>,
    max_events: usize,
}

/// J(event, t, y⁻), in candle's graph.
type JumpFunction<S> = dyn Fn(usize, &Tensor, &S) -> candle_core::Result<S> + Send + Sync;

/// A jump that was made.
#[derive(Clone, Debug)]
pub struct Jump<S> {
    /// The event, its time, and the state before.
    pub before: Occurrence<S>,
    /// The state after.
    pub after: S,
}

/// What a hybrid solve returns.
#[derive(Clone, Debug)]
pub struct HybridSolution<S> {
    /// The states at all times, `(times, …)`.
    pub states: S,
    /// The jumps, in order of time.
    pub jumps: Vec<Jump<S>>,
    /// The events that were [recorded](Event::recorded), without a jump, in order of time.
    pub recorded: Vec<Occurrence<S>>,
}

impl<S, F> Hybrid<S, F>
where
    S: State + 'static,
    F: VectorField<S> + Send + Sync + 'static,
{
    /// A field, the events that interrupt it, and the jump: which event, its time, and the state before it.
    pub fn new(
        field: F,
        events: Vec<Event<S>>,
        jump: impl Fn(usize, &Tensor, &S) -> candle_core::Result<S> + Send + Sync + 'static,
    ) -> Self {
        Self {
            field: Arc::new(field),
            events,
            jump: Box::new(jump),
            max_events: 1000,
        }
    }

    /// The most jumps; more are [`EventDefect::TooMany`].  Default: 1000.
    #[must_use]
    pub fn max_events(self, most: usize) -> Self {
        Self {
            max_events: most,
            ..self
        }
    }

    /// The states at `times`, and the jumps between them.  Events at one time all occur, except at the last of `times`,
    /// where the first of them ends the solve.  At the time of a jump, the state is the state before the
    /// jump; times are the same up to sixteen unit roundoffs of the largest time since the jump before.
    ///
    /// # Errors
    /// As [`odeint_event`](super::odeint_event), of the jump, [`EventDefect::JumpShapes`] and [`EventDefect::TooMany`].
    pub fn solve<T: Times + ?Sized>(
        &self,
        y0: &S,
        times: &T,
        options: &OdeOptions,
    ) -> Result<HybridSolution<S>> {
        let grid = times.to_grid()?;
        let points = grid.points();
        // The state that an event returns has another dtype than y0 may have, and says nothing of the precision.
        let options = &OdeOptions {
            precision: options.common_precision(&y0.leaves()),
            ..options.clone()
        };
        let device = y0
            .leaves()
            .first()
            .map_or(Device::Cpu, |y| y.device().clone());
        let all = match grid.tensor() {
            Some(times) => times.to_dtype(DType::F64)?.to_device(&device)?,
            None => Tensor::new(points, &device)?,
        };
        let mut parts: Vec<Vec<Tensor>> = vec![];
        let (mut jumps, mut recorded, mut done) = (vec![], vec![], 0);
        let (mut y, mut start, mut origin) = (y0.clone(), None, Origin::default());
        loop {
            let rest = all.narrow(0, done, points.len() - done)?;
            let times = match &start {
                // The start of a flow after a jump is a time that is no output.
                Some(t) => Tensor::cat(&[t, &rest], 0)?,
                None => rest,
            };
            let (solved, next) = solve(
                Arc::clone(&self.field),
                &y,
                &times,
                &self.events,
                origin,
                options,
            )?;
            origin = next;
            let own = usize::from(start.is_some());
            let kept = solved.outputs - own;
            if kept > 0 {
                let of = |x: &Tensor| x.narrow(0, own, kept);
                let leaves = solved.states.leaves();
                let part = leaves.iter().map(of).collect::<candle_core::Result<_>>()?;
                parts.push(part);
            }
            done += kept;
            let (ended, mut events) = (solved.ended, solved.events);
            let last = if ended { events.pop() } else { None };
            recorded.extend(events);
            let Some(before) = last else {
                break;
            };
            let t: f64 = before.t.to_scalar()?;
            if jumps.len() == self.max_events {
                let count = jumps.len();
                return Err(Error::Event(EventDefect::TooMany { count, t }));
            }
            // Times that are behind that of the jump only by rounding have the state before it, too.
            while points
                .get(done)
                .is_some_and(|&next| is_met(next, t, origin.largest))
            {
                let leaves = before.y.leaves();
                let state = leaves.iter().map(|y| y.unsqueeze(0));
                parts.push(state.collect::<candle_core::Result<_>>()?);
                done += 1;
            }
            y = (self.jump)(before.event, &before.t, &before.y)?;
            check_jump(&before, &y)?;
            start = Some(before.t.reshape(1)?);
            jumps.push(Jump {
                before,
                after: y.clone(),
            });
            if done == points.len() {
                break;
            }
        }
        let leaf = |i: usize| {
            let parts: Vec<_> = parts.iter().map(|part| &part[i]).collect();
            Tensor::cat(&parts, 0)
        };
        let leaves = (0..y.leaves().len()).map(leaf);
        Ok(HybridSolution {
            states: S::from_leaves(leaves.collect::<candle_core::Result<_>>()?)?,
            jumps,
            recorded,
        })
    }
}

/// That a jump has returned a state of the shapes of the state before it.
fn check_jump<S: State>(before: &Occurrence<S>, after: &S) -> Result<()> {
    let shapes = |y: &S| y.leaves().iter().map(|y| y.shape().clone()).collect();
    let (expected, got): (Vec<Shape>, Vec<Shape>) = (shapes(&before.y), shapes(after));
    match expected == got {
        true => Ok(()),
        false => Err(Error::Event(EventDefect::JumpShapes {
            event: before.event,
            expected,
            got,
        })),
    }
}

impl<S, F> std::fmt::Debug for Hybrid<S, F> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Hybrid")
            .field("events", &self.events)
            .field("max_events", &self.max_events)
            .finish_non_exhaustive()
    }
}
