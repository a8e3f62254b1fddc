//! What can be wrong with an event.

use candle_core::Shape;

use super::defects::listed;

/// Events that cannot be found or differentiated.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum EventDefect {
    /// An event function is not one number.
    #[error("event function {event} is of shape {shape:?}: it must return one number, for example by sum_all, or by get for one component")]
    NotScalar {
        /// Which of the events.
        event: usize,
        /// Its shape.
        shape: Shape,
    },
    /// An event of rows is about a component that rows do not have.
    #[error("event {event} is about component {component} of state tensor {leaf}, but a row has {features:?} components in the tensors of the state")]
    NoComponent {
        /// Which of the events.
        event: usize,
        /// The tensor of the state.
        leaf: usize,
        /// The component.
        component: usize,
        /// Components of a row, by tensor of the state.
        features: Vec<usize>,
    },
    /// The values that a component crosses are not one number for each row.
    #[error("event {event} has values of shape {shape:?} for {rows} rows: one number for each is needed")]
    Values {
        /// Which of the events.
        event: usize,
        /// The shape of the values.
        shape: Shape,
        /// Rows of the state.
        rows: usize,
    },
    /// An event function is NaN or infinite.
    #[error("event function {event} is not finite at t = {t:?}: it must be finite at every state of the solution")]
    NonFinite {
        /// Which of the events.
        event: usize,
        /// The time.
        t: f64,
    },
    /// The trajectory touches the surface of an event without crossing it, so that the time of the event has no
    /// derivative.
    #[error("event {event} grazes its surface at t = {t:?}: the derivative of its function along the trajectory is {derivative:e}, so its time has no gradient: detach the time and the state of the event, or choose a function that crosses zero along the trajectory")]
    Grazing {
        /// Which of the events.
        event: usize,
        /// The time.
        t: f64,
        /// The derivative of the event function along the trajectory.
        derivative: f64,
    },
    /// An event function reads the time as a number, which has no gradient.
    #[error("event function {event} reads Time::value, so the derivative of the event's time is not known: read Time::tensor")]
    TimeValue {
        /// Which of the events.
        event: usize,
    },
    /// The jump of a hybrid system returned tensors of other shapes than the state has.
    #[error("the jump after event {event} returned {}, but the state is {}: return the state behind the jump, in the same tensors", listed(got), listed(expected))]
    JumpShapes {
        /// Which of the events.
        event: usize,
        /// Shapes of the state before the jump.
        expected: Vec<Shape>,
        /// Shapes of the state after the jump.
        got: Vec<Shape>,
    },
    /// There are more events than permitted: perhaps infinitely many in a finite time.
    #[error("{count} events until t = {t:?}: are there infinitely many (Zeno)? Hybrid::max_events sets the limit")]
    TooMany {
        /// How many.
        count: usize,
        /// The time of the last.
        t: f64,
    },
}
