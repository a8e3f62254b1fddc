//! Events of rows: if every row of a batch has its own steps, every row also has its own events.
//!
//! The event function of a row is g(y) = y_c − value, for one component c.  Its time satisfies p_c(t_e) = value with the
//! interpolant p of the row's own step, and δt_e = −(δp_c − δvalue) / ṗ_c(t_e), as for other events.

use std::any::TypeId;
use std::sync::Arc;

use candle_core::{DType, Tensor};

use super::check_options;
use crate::adaptive::{OnFailure, StepControl};
use crate::crossing::{is_steep, Direction, RowCrossing, RowFound};
use crate::error::{AdaptiveDefect, Error, EventDefect, Result};
use crate::field::{Field, Leaves, SharedField, VectorField};
use crate::integrate::Forward;
use crate::memory::zeros;
use crate::node::{node, Source};
use crate::odeint::solved_in_graph;
use crate::offer::Offered;
use crate::parameters::Theta;
use crate::passes::run;
use crate::problem::{OdeOptions, Plan, Problem};
use crate::schedule::Steps;
use crate::state::{RowLayout, State};
use crate::time::Times;

/// An event of each row of a batch: a component of the row crosses a value.
///
/// The sign of the difference is examined at the end of every accepted step of the row and at three points inside the
/// step, as for an [`Event`](super::Event).  The value is rounded to the state dtype.
#[derive(Clone, Debug)]
pub struct RowEvent {
    leaf: usize,
    component: usize,
    value: Value,
    direction: Direction,
    terminal: bool,
    most: usize,
}

/// What the component crosses.
#[derive(Clone, Debug)]
enum Value {
    Number(f64),
    Each(Tensor),
}

impl RowEvent {
    /// An event that ends a row when a component of the row crosses a value in any direction.  Components are counted
    /// within a row of the first tensor of the state.
    pub fn new(component: usize, value: f64) -> Self {
        Self {
            leaf: 0,
            component,
            value: Value::Number(value),
            direction: Direction::Both,
            terminal: true,
            most: 1,
        }
    }

    /// Takes the component from another tensor of the state.
    #[must_use]
    pub fn leaf(self, leaf: usize) -> Self {
        Self { leaf, ..self }
    }

    /// A value for each row, `(rows)`, which receives gradients if candle tracks it.
    #[must_use]
    pub fn values(self, values: &Tensor) -> Self {
        Self {
            value: Value::Each(values.clone()),
            ..self
        }
    }

    /// Restricts the event to crossings in this direction.
    #[must_use]
    pub fn direction(self, direction: Direction) -> Self {
        Self { direction, ..self }
    }

    /// An event that is recorded and does not end a row.  Times and states of the first `most` crossings of each row are
    /// returned; all are counted.  The solve allocates memory for `most` states of every row.
    #[must_use]
    pub fn recorded(self, most: usize) -> Self {
        Self {
            terminal: false,
            most,
            ..self
        }
    }

    /// The event as a solver whose sums are of the dtype `state` sees it.
    fn crossing(&self, event: usize, layout: &RowLayout, state: DType) -> Result<RowCrossing> {
        let features = layout.features.get(self.leaf).copied();
        if features.is_none_or(|features| self.component >= features) {
            return Err(Error::Event(EventDefect::NoComponent {
                event,
                leaf: self.leaf,
                component: self.component,
                features: layout.features.clone(),
            }));
        }
        let values = match &self.value {
            Value::Number(value) => vec![*value],
            Value::Each(values) if values.dims() == [layout.rows] => {
                values.to_dtype(DType::F64)?.to_vec1()?
            }
            Value::Each(values) => {
                return Err(Error::Event(EventDefect::Values {
                    event,
                    shape: values.shape().clone(),
                    rows: layout.rows,
                }))
            }
        };
        if let Some(&value) = values.iter().find(|value| !value.is_finite()) {
            return Err(Error::Adaptive(AdaptiveDefect::Number {
                option: "the value of a row event",
                value,
                range: "finite",
            }));
        }
        if self.most == 0 {
            return Err(Error::Adaptive(AdaptiveDefect::Number {
                option: "the number of recorded events",
                value: 0.0,
                range: "at least 1",
            }));
        }
        // A row that begins on a value, as its dtype rounds it, has no sign there.
        let rounded = |value: f64| match state {
            DType::F32 => f64::from(value as f32),
            _ => value,
        };
        let before: usize = layout.features[..self.leaf].iter().sum();
        Ok(RowCrossing {
            component: before + self.component,
            values: values.into_iter().map(rounded).collect(),
            direction: self.direction,
            terminal: self.terminal,
            most: self.most,
        })
    }
}

/// What a solve with events of rows returns.
#[derive(Clone, Debug)]
pub struct RowEventSolution<S> {
    /// The states at the requested times, `(times, …)`: NaN in rows that had ended before.
    pub states: S,
    /// How many of the requested times each row has reached.
    pub outputs: Vec<usize>,
    /// The occurrences of each event, in the order in which the events were given.
    pub events: Vec<RowOccurrences<S>>,
    /// The event that has ended each row, if one has.
    pub ended: Vec<Option<usize>>,
}

/// The occurrences of one event in all rows.
#[derive(Clone, Debug)]
pub struct RowOccurrences<S> {
    /// How often it has occurred in each row; 0 in a row that has failed ([`OnFailure::Nan`]), also if it failed later.
    pub counts: Vec<usize>,
    /// The times, `(most, rows)` in f64, NaN where it has not occurred.  Differentiable with respect to everything that
    /// the solve read, and the values.
    pub t: Tensor,
    /// The states at these times, `(most, …)`, NaN where it has not occurred; differentiable in the same way.
    pub y: S,
}

/// Solves y' = f(t, y) as [`odeint`](crate::odeint), every row of the batch with adaptive steps of its own, until an event
/// ends the row or the last time is reached.  A lane whose row has ended takes the next row at once.
///
/// The field must be one that is integrated tile by tile ([`StepControl::Rows`]); events of other fields are
/// functions of the whole state, see [`odeint_event`](super::odeint_event).  The events of a row and their times do
/// not depend on the other rows: they have the same bits alone and in any batch, and so have the gradients of y0 and
/// of the values.
///
/// If a row touches a value without crossing it, the time of this event has no derivative.  If gradients are
/// required, this is an error.  With [`OnFailure::Nan`] the event is counted, but its time and state are NaN; the
/// other events and rows keep theirs.
///
/// ```
/// use candle_core::{DType, Device, IndexOp, Tensor};
/// use candle_diffeq::OdeOptions;
/// use candle_diffeq::events::{odeint_row_event, RowEvent};
/// use candle_diffeq::nn::{Activation, Mlp};
/// use candle_diffeq::options::{Adaptive, Steps};
/// use candle_diffeq::tableau::DOPRI5;
/// # #[cfg(target_arch = "x86_64")]
/// # if !(std::is_x86_feature_detected!("avx2") && std::is_x86_feature_detected!("fma")) { return Ok(()); }
/// # if std::env::var("CANDLE_DIFFEQ_SIMD").is_ok_and(|unit| unit == "none") { return Ok(()); }
/// let vars = candle_nn::VarMap::new();
/// let vb = candle_nn::VarBuilder::from_varmap(&vars, DType::F64, &Device::Cpu);
/// let field = Mlp::new(&[2, 16, 2], Activation::Tanh, vb)?;
/// let y0 = Tensor::new(&[[0.1f64, 0.2], [0.3, -0.4], [2.0, 0.0]], &Device::Cpu)?;
/// // Each row ends where its first component leaves the number 0.15.
/// let event = RowEvent::new(0, 0.15);
/// let options = OdeOptions {
///     method: DOPRI5,
///     steps: Steps::Adaptive(Adaptive::new(1e-6, 1e-8)),
///     ..Default::default()
/// };
/// let solved = odeint_row_event(field, &y0, &[0.0, 1.0], &[event], &options)?;
/// assert_eq!(solved.states.dims(), [2, 3, 2]);
/// assert_eq!(solved.events[0].t.dims(), [1, 3]);
/// for row in (0..3).filter(|row| solved.ended[*row].is_some()) {
///     let y = solved.events[0].y.i((0, row, 0))?.to_scalar::<f64>()?;
///     assert!((y - 0.15).abs() < 1e-9);
/// }
/// # Ok::<(), candle_diffeq::Error>(())
/// ```
///
/// # Errors
/// The errors of [`odeint`](crate::odeint), [`AdaptiveDefect::NoRows`] if rows cannot have steps of their own, and
/// [`Error::Event`] for a component that does not exist, values of another shape than `(rows)`, or, if gradients are
/// required, a component that touches the value without crossing it.  [`Error::AllocationFailed`] for more states of
/// events than there are numbers.
pub fn odeint_row_event<S, F, T>(
    field: F,
    y0: &S,
    times: &T,
    events: &[RowEvent],
    options: &OdeOptions,
) -> Result<RowEventSolution<S>>
where
    S: State + 'static,
    F: VectorField<S> + Send + Sync + 'static,
    T: Times + ?Sized,
{
    let options = row_options(options)?;
    let bind = |_| {
        let field: SharedField = Arc::new(Leaves::<Box<F>, S>::new(Box::new(field)));
        Ok(field)
    };
    let start = (y0.leaves(), vec![], times.to_grid()?);
    let mut search = RowSearch::new(events);
    let solved = solved_in_graph(
        start,
        &options,
        TypeId::of::<F>(),
        bind,
        |problem, field, y0, keep| search.advance(problem, field, y0, keep),
    )?;
    search.solution(
        solved.problem,
        Source::Shared(solved.field),
        solved.theta,
        solved.forward,
        &solved.joined,
    )
}

/// The same options with steps of every row.
pub(crate) fn row_options(options: &OdeOptions) -> Result<OdeOptions> {
    check_options(options)?;
    let mut options = options.clone();
    if let Steps::Adaptive(adaptive) = &mut options.steps {
        adaptive.control = Some(StepControl::Rows);
    }
    Ok(options)
}

/// The search for events of rows in a solve.
pub(crate) struct RowSearch<'a> {
    events: &'a [RowEvent],
    crossings: Arc<[RowCrossing]>,
    layout: Option<RowLayout>,
}

impl<'a> RowSearch<'a> {
    pub(crate) fn new(events: &'a [RowEvent]) -> Self {
        Self {
            events,
            crossings: Arc::default(),
            layout: None,
        }
    }

    /// The forward pass from y0, joined.
    pub(crate) fn advance(
        &mut self,
        problem: &Problem,
        field: &Field<'_>,
        y0: &Tensor,
        keep: &dyn Fn() -> bool,
    ) -> Result<Forward> {
        let offered = Offered::from(field.offer()).and_then(|offered| offered.rows);
        let rows = offered.and_then(|rows| rows.layout(problem.packing.shapes()));
        let no_rows = Error::Adaptive(AdaptiveDefect::NoRows { row_wise: false });
        let layout = rows.ok_or(no_rows)?;
        let each = self.events.iter().enumerate();
        let each = each.map(|(i, event)| event.crossing(i, &layout, problem.state()));
        let each = each.collect::<Result<Vec<_>>>()?;
        let points = problem.grid.points().len();
        check_count(points, &each, problem)?;
        // Where there is no step there is nothing to be crossed.
        if points > 1 && !problem.is_empty() {
            self.crossings = each.into();
        }
        self.layout = Some(layout);
        run(&self.crossed(problem.clone()), field, y0, None, keep)
    }

    /// The problem with its crossings.
    fn crossed(&self, problem: Problem) -> Problem {
        Problem {
            crossings: Arc::clone(&self.crossings),
            ..problem
        }
    }

    /// What the solve returns.
    pub(crate) fn solution<S: State>(
        self,
        problem: Problem,
        source: Source,
        theta: Theta,
        mut forward: Forward,
        joined: &Tensor,
    ) -> Result<RowEventSolution<S>> {
        let Some(layout) = &self.layout else {
            return Err(Error::NothingKept);
        };
        let on_failure = match &problem.plan {
            Plan::Adaptive(control) => control.options.on_failure,
            _ => OnFailure::Error,
        };
        let points = problem.grid.points().len();
        let found = std::mem::take(&mut forward.found);
        let all: S = node(self.crossed(problem), source, theta, forward, joined)?;
        let leaves = all.leaves();
        let part = |at: usize, count: usize| -> Result<Vec<Tensor>> {
            let part = leaves.iter().map(|x| match at < x.dim(0)? {
                true => Ok(x.narrow(0, at, count)?),
                false => nowhere(x, count),
            });
            part.collect()
        };
        let (mut at, mut occurrences) = (points, vec![]);
        for (i, event) in self.events.iter().enumerate() {
            let of_event = OfEvent {
                event,
                number: i,
                found: found.iter().filter(|found| found.event == i).collect(),
                on_failure,
                layout,
            };
            let states = part(at, event.most)?;
            occurrences.push(of_event.occurrences(states)?);
            at += event.most;
        }
        let mut ended = vec![None; layout.rows];
        let terminal = |found: &&RowFound| self.crossings[found.event].terminal;
        for found in found.iter().filter(terminal) {
            ended[found.row] = Some(found.event);
        }
        let states = part(0, points)?;
        Ok(RowEventSolution {
            outputs: reached(&states[0], points, layout)?,
            states: S::from_leaves(states)?,
            events: occurrences,
            ended,
        })
    }
}

/// That the states at all times and events can be counted.
fn check_count(points: usize, crossings: &[RowCrossing], problem: &Problem) -> Result<()> {
    let mut most = crossings.iter().map(|crossing| crossing.most);
    match most.try_fold(points, usize::checked_add) {
        Some(_) => Ok(()),
        None => Err(Error::AllocationFailed {
            what: "returned states",
            bytes: usize::MAX as u128 * problem.packing.len() as u128,
        }),
    }
}

/// So many states like those of `x`, at events that have not occurred.
fn nowhere(x: &Tensor, count: usize) -> Result<Tensor> {
    let shape = [&[count], &x.dims()[1..]].concat();
    let numbers = shape.iter().fold(1, |n: usize, dim| n.saturating_mul(*dim));
    let mut nan = zeros::<f64>("returned states", numbers)?;
    nan.fill(f64::NAN);
    Ok(Tensor::from_vec(nan, shape, x.device())?.to_dtype(x.dtype())?)
}

/// How many states each row has: those that it has not reached are NaN.
fn reached(states: &Tensor, points: usize, layout: &RowLayout) -> Result<Vec<usize>> {
    let by_row = states.reshape((points, layout.rows, layout.features[0]))?;
    let first = by_row.narrow(2, 0, 1)?.squeeze(2)?.to_dtype(DType::F64)?;
    let first = first.to_vec2::<f64>()?;
    let of_row = |row: usize| first.iter().take_while(|at| !at[row].is_nan()).count();
    Ok((0..layout.rows).map(of_row).collect())
}

/// One event, and where it was found.
struct OfEvent<'a> {
    event: &'a RowEvent,
    number: usize,
    found: Vec<&'a RowFound>,
    on_failure: OnFailure,
    layout: &'a RowLayout,
}

impl OfEvent<'_> {
    /// From the states at fixed times, `(most, …)`.
    fn occurrences<S: State>(&self, states: Vec<Tensor>) -> Result<RowOccurrences<S>> {
        let (most, rows) = (self.event.most, self.layout.rows);
        let device = states[0].device();
        let mut counts = vec![0; rows];
        for found in &self.found {
            counts[found.row] = counts[found.row].max(found.number + 1);
        }
        let returned = || self.found.iter().filter(|found| found.number < most);
        let mut times = vec![f64::NAN; most * rows];
        for found in returned() {
            times[found.number * rows + found.row] = found.t;
        }
        let by_row = |y: &Tensor, leaf: usize| y.reshape((most, rows, self.layout.features[leaf]));
        let leaf = self.event.leaf;
        let component = by_row(&states[leaf], leaf)?.narrow(2, self.event.component, 1)?;
        let surface = component.squeeze(2)?.to_dtype(DType::F64)?;
        let surface = match &self.event.value {
            Value::Number(_) => surface,
            Value::Each(values) => surface.broadcast_sub(&values.to_dtype(DType::F64)?)?,
        };
        if !surface.track_op() {
            let t = Tensor::from_vec(times, (most, rows), device)?;
            let y = S::from_leaves(states)?;
            return Ok(RowOccurrences { counts, t, y });
        }
        let before: usize = self.layout.features[..leaf].iter().sum();
        let mut derivatives = vec![1.0; most * rows];
        for found in returned() {
            let derivative = found.slope[before + self.event.component];
            let place = found.number * rows + found.row;
            if is_steep(derivative, found.speed) {
                derivatives[place] = derivative;
                continue;
            }
            if self.on_failure == OnFailure::Error {
                return Err(Error::Event(EventDefect::Grazing {
                    event: self.number,
                    t: found.t,
                    derivative,
                }));
            }
            // What does not use this time gets no NaN from it.
            (times[place], derivatives[place]) = (f64::NAN, f64::INFINITY);
        }
        let times = Tensor::from_vec(times, (most, rows), device)?;
        let derivatives = Tensor::from_vec(derivatives, (most, rows), device)?;
        // The number is zero but for rounding, and so is its value's part of t; where there is none, t is NaN.
        let zero = (&surface - surface.detach())?;
        let t = (times - (zero / derivatives)?)?;
        let moved = (&t - t.detach())?.unsqueeze(2)?;
        let (mut y, mut at) = (vec![], 0);
        for (leaf, state) in states.iter().enumerate() {
            let features = self.layout.features[leaf];
            let mut slopes = vec![0.0; most * rows * features];
            for found in returned() {
                let place = (found.number * rows + found.row) * features;
                slopes[place..][..features].copy_from_slice(&found.slope[at..][..features]);
            }
            at += features;
            let slopes = Tensor::from_vec(slopes, (most, rows, features), device)?;
            let moved = slopes.broadcast_mul(&moved)?.to_dtype(state.dtype())?;
            y.push((by_row(state, leaf)? + moved)?.reshape(state.shape())?);
        }
        let y = S::from_leaves(y)?;
        Ok(RowOccurrences { counts, t, y })
    }
}
