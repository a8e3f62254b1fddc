//! Events: times at which a function of time and state crosses zero, located on the interpolant of adaptive steps.
//!
//! Let p be the interpolant.  The time t_e of an event satisfies g(t_e, p(t_e)) = 0.  By the implicit function theorem
//!
//! δt_e = −(g_y · δp + g_θ δθ) / D,  D = g_t + g_y · ṗ(t_e),
//!
//! where δp is the change of the interpolant at a fixed time, and δθ is the change of what g reads besides t and y.
//! D contains the derivative ṗ of the interpolant and not f(t_e, p), because t_e was located on the interpolant.  So
//! δt_e is the exact derivative of the computed t_e.  The time t_e and the state at t_e are returned as ordinary
//! tensors in candle's graph.

mod hybrid;
mod rows;
mod search;

use std::any::TypeId;
use std::sync::Arc;

use candle_core::{DType, Tensor};

pub use crate::crossing::Direction;
use crate::error::{AdaptiveDefect, Error, Result};
use crate::field::{Leaves, SharedField, VectorField};
use crate::odeint::in_graph_by;
use crate::passes::run_observed;
use crate::problem::OdeOptions;
use crate::schedule::{Output, Steps};
use crate::state::State;
use crate::time::{Time, Times};
pub use hybrid::{Hybrid, HybridSolution, Jump};
pub use rows::{odeint_row_event, RowEvent, RowEventSolution, RowOccurrences};
pub(crate) use rows::{row_options, RowSearch};
use search::Crossing;
use search::Origin;
pub(crate) use search::Search;

/// A function g(t, y) → number, tracked by candle in y and in what it captures.
pub(crate) type EventFunction<S> = dyn Fn(&Time, &S) -> candle_core::Result<Tensor> + Send + Sync;

/// An event: a number g(t, y) that crosses zero.
///
/// The sign of g is examined in state precision at the end of every accepted step and at three points of the
/// interpolant inside the step.  If g is zero at the start of a solve, the first of these points at which g is not
/// zero determines the sign of g, so that a solve may begin on the surface g = 0.  Two crossings between neighbouring
/// points are not detected; [`Adaptive::max_step`](crate::options::Adaptive::max_step) limits the distance between
/// the points.
pub struct Event<S = Tensor> {
    pub(crate) function: Arc<EventFunction<S>>,
    pub(crate) direction: Direction,
    pub(crate) terminal: bool,
}

impl<S> Clone for Event<S> {
    fn clone(&self) -> Self {
        Self {
            function: Arc::clone(&self.function),
            ..*self
        }
    }
}

impl<S> std::fmt::Debug for Event<S> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Event")
            .field("direction", &self.direction)
            .field("terminal", &self.terminal)
            .finish_non_exhaustive()
    }
}

impl<S> Event<S> {
    /// An event where `function` crosses zero in any direction; the solve ends there.  The function returns a tensor of
    /// one element.  It reads the time by [`Time::tensor`]: with [`Time::value`] the derivative of the event's time is not
    /// known, and where it is wanted the solve returns [`EventDefect::TimeValue`](crate::error::EventDefect::TimeValue).
    pub fn new(
        function: impl Fn(&Time, &S) -> candle_core::Result<Tensor> + Send + Sync + 'static,
    ) -> Self {
        Self {
            function: Arc::new(function),
            direction: Direction::Both,
            terminal: true,
        }
    }

    /// Restricts the event to crossings in this direction.
    #[must_use]
    pub fn direction(self, direction: Direction) -> Self {
        Self { direction, ..self }
    }

    /// An event that is recorded, and does not end the solve.  If the interpolant of the method is less accurate than
    /// its steps ([`FEHLBERG45`](crate::tableau::FEHLBERG45), [`DOPRI8`](crate::tableau::DOPRI8)), a step ends just
    /// after each such event, so that its time is as accurate as the steps; otherwise recorded events change no step.
    #[must_use]
    pub fn recorded(self) -> Self {
        Self {
            terminal: false,
            ..self
        }
    }
}

/// What a solve with events returns.
#[derive(Clone, Debug)]
pub struct EventSolution<S> {
    /// The states at the requested times up to the end of the solve, `(outputs, …)`.  If an event ends the solve at a
    /// requested time, this time is one of them.
    pub states: S,
    /// The number of requested times for which `states` has a state: all of them, unless an event ended the solve
    /// before the last.
    pub outputs: usize,
    /// The events, in order of time.  If several occur at the same time, the event that ends the solve is the last.
    pub events: Vec<Occurrence<S>>,
    /// Whether the last event in `events` ended the solve.
    pub ended: bool,
}

/// An event that has occurred.
#[derive(Clone, Debug)]
pub struct Occurrence<S> {
    /// The index of the event in the list that was given to the solve.
    pub event: usize,
    /// The time of the event, one number in f64, differentiable with respect to everything that the solve and the
    /// event function read.
    pub t: Tensor,
    /// The state at the time `t`, differentiable with respect to the same quantities.
    pub y: S,
}

/// Solves y' = f(t, y) as [`odeint`](crate::odeint), with adaptive steps, until an event ends the solve or the last
/// time is reached.
///
/// ```
/// use candle_core::{Device, Tensor, Var};
/// use candle_diffeq::{OdeOptions, Time};
/// use candle_diffeq::events::{odeint_event, Event};
/// use candle_diffeq::options::{Adaptive, Steps};
/// use candle_diffeq::tableau::DOPRI5;
/// // A stone that falls from a height of 2: it hits the ground at t = √(2 · 2 / g).
/// let g = Var::new(&[9.81f64], &Device::Cpu)?;
/// let gravity = g.as_tensor().clone();
/// let fall = move |_: &Time, y: &Tensor| Tensor::cat(&[&y.narrow(0, 1, 1)?, &gravity.neg()?], 0);
/// let ground = Event::new(|_: &Time, y: &Tensor| y.get(0));
/// let options = OdeOptions {
///     method: DOPRI5,
///     steps: Steps::Adaptive(Adaptive::new(1e-9, 1e-9)),
///     ..Default::default()
/// };
/// let y0 = Tensor::new(&[2f64, 0.0], &Device::Cpu)?;
/// let solved = odeint_event(fall, &y0, &[0.0, 10.0], &[ground], &options)?;
/// let t = &solved.events[0].t;
/// let exact = (4.0f64 / 9.81).sqrt();
/// assert!((t.to_scalar::<f64>()? - exact).abs() < 1e-9);
/// let grads = t.backward()?;                                             // ∂t/∂g = −t / 2g
/// let grad = grads.get(&g).unwrap().get(0)?.to_scalar::<f64>()?;
/// assert!((grad + exact / (2.0 * 9.81)).abs() < 1e-9);
/// # Ok::<(), candle_diffeq::Error>(())
/// ```
///
/// # Errors
/// The errors of [`odeint`](crate::odeint).  [`AdaptiveDefect::FixedSteps`] if the steps are not adaptive, and
/// [`AdaptiveDefect::EventOutput`] if [`OdeOptions::output`] is not [`Output::All`].  [`Error::Event`] if an event
/// function does not return one finite number, or if gradients are required and the trajectory touches the surface g
/// = 0 without crossing it.
pub fn odeint_event<S, F, T>(
    field: F,
    y0: &S,
    times: &T,
    events: &[Event<S>],
    options: &OdeOptions,
) -> Result<EventSolution<S>>
where
    S: State + 'static,
    F: VectorField<S> + Send + Sync + 'static,
    T: Times + ?Sized,
{
    let origin = Origin::default();
    let (solution, _) = solve(Arc::new(field), y0, times, events, origin, options)?;
    Ok(solution)
}

/// The same for a field that others share, with what the events know at the start, and at the end.
fn solve<S, F, T>(
    field: Arc<F>,
    y0: &S,
    times: &T,
    events: &[Event<S>],
    origin: Origin,
    options: &OdeOptions,
) -> Result<(EventSolution<S>, Origin)>
where
    S: State + 'static,
    F: VectorField<S> + Send + Sync + 'static,
    T: Times + ?Sized,
{
    check_options(options)?;
    let bind = |_| {
        let field: SharedField = Arc::new(Leaves::<Arc<F>, S>::new(field));
        Ok(field)
    };
    let mut search = Search::after(events, origin);
    let start = (y0.leaves(), vec![], times.to_grid()?);
    let states: S = in_graph_by(
        start,
        options,
        TypeId::of::<F>(),
        bind,
        |problem, field, y0, keep| run_observed(problem, field, y0, keep, &mut search),
    )?;
    Ok((search.solution(states)?, search.origin()))
}

/// That a solve with these options can have events.
pub(crate) fn check_options(options: &OdeOptions) -> Result<()> {
    if !matches!(options.steps, Steps::Adaptive(_)) {
        return Err(Error::Adaptive(AdaptiveDefect::FixedSteps));
    }
    if options.output != Output::All {
        return Err(Error::Adaptive(AdaptiveDefect::EventOutput));
    }
    Ok(())
}

impl<S: State> Search<'_, S> {
    /// What a solve returns, from the states at all times and events.
    pub(crate) fn solution(&self, states: S) -> Result<EventSolution<S>> {
        let leaves = states.leaves();
        let count = leaves[0].dim(0)?;
        let is_event = |row: &usize| self.found.iter().any(|found| found.row == *row);
        let rows: Vec<u32> = (0..count)
            .filter(|row| !is_event(row))
            .map(|row| row as u32)
            .collect();
        let outputs = rows.len();
        let of_times = |x: &Tensor| match outputs == count {
            true => Ok(x.clone()),
            false => x.index_select(&Tensor::new(rows.as_slice(), x.device())?, 0),
        };
        let of_times = leaves.iter().map(of_times);
        let states = S::from_leaves(of_times.collect::<candle_core::Result<_>>()?)?;
        let occurrence = |found: &Crossing| {
            let p = leaves.iter().map(|x| x.get(found.row));
            let p = p.collect::<candle_core::Result<Vec<_>>>()?;
            occurred(&self.events[found.event], found, p)
        };
        Ok(EventSolution {
            states,
            outputs,
            events: self.found.iter().map(occurrence).collect::<Result<_>>()?,
            ended: self
                .found
                .last()
                .is_some_and(|found| self.events[found.event].terminal),
        })
    }
}

/// An event at p, the state at its time as a fixed one.
fn occurred<S: State>(event: &Event<S>, found: &Crossing, p: Vec<Tensor>) -> Result<Occurrence<S>> {
    let device = p[0].device().clone();
    let dtype = p[0].dtype();
    let number = Tensor::new(found.t, &device)?;
    let surface = (event.function)(
        &Time::new(found.t, dtype, &device),
        &S::from_leaves(p.clone())?,
    )?;
    let surface = surface.reshape(())?.to_dtype(DType::F64)?;
    if !surface.track_op() {
        return Ok(Occurrence {
            event: found.event,
            t: number,
            y: S::from_leaves(p)?,
        });
    }
    let derivative = search::derivative(event, found, &p)?;
    // The event function is zero but for rounding, and so is its value's part of t.
    let zero = (&surface - surface.detach())?;
    let t = (number - (zero / derivative)?)?;
    let moved = (&t - t.detach())?;
    let y = p.iter().zip(&found.slope).map(|(p, slope)| {
        let moved = moved.to_dtype(p.dtype())?;
        p + slope.to_dtype(p.dtype())?.broadcast_mul(&moved)?
    });
    let y = y.collect::<candle_core::Result<Vec<_>>>()?;
    Ok(Occurrence {
        event: found.event,
        t,
        y: S::from_leaves(y)?,
    })
}
