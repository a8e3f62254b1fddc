//! Solves of a model with events.

use super::run::Pass;
use super::{Given, NeuralOde};
use crate::error::Result;
use crate::events::{
    check_options, row_options, Event, EventSolution, RowEvent, RowEventSolution, RowSearch, Search,
};
use crate::passes::run_observed;
use crate::state::State;
use crate::time::Times;

impl<S: State + 'static> NeuralOde<S> {
    /// The states at `times` until an event ends the solve, and the events; differentiable as [`solve`](Self::solve)
    /// is, and in what the event functions read.  As [`odeint_event`](crate::events::odeint_event).
    ///
    /// ```
    /// use candle_core::{DType, Device, Tensor};
    /// use candle_diffeq::{NeuralOde, OdeOptions, Time};
    /// use candle_diffeq::events::Event;
    /// use candle_diffeq::nn::{Activation, Mlp};
    /// use candle_diffeq::options::{Adaptive, Steps};
    /// use candle_diffeq::tableau::DOPRI5;
    /// let vars = candle_nn::VarMap::new();
    /// let ode = NeuralOde::new(&vars, "f", &Device::Cpu, |vb| {
    ///     Mlp::new(&[2, 16, 2], Activation::Tanh, vb)
    /// })?
    /// .options(OdeOptions {
    ///     method: DOPRI5,
    ///     steps: Steps::Adaptive(Adaptive::new(1e-5, 1e-5)),
    ///     ..Default::default()
    /// });
    /// let y0 = Tensor::ones((1, 2), DType::F32, &Device::Cpu)?;
    /// // Where the sum of the state has moved by a tenth.
    /// let event = Event::new(|_: &Time, y: &Tensor| (y.sum_all()? - 2.0)?.abs()? - 0.1);
    /// let solved = ode.events(&y0, &[0.0, 1.0], &[event])?;
    /// for occurrence in &solved.events {
    ///     let gradients = occurrence.t.backward()?;
    ///     assert!(vars.all_vars().iter().all(|var| gradients.get(var).is_some()));
    /// }
    /// # Ok::<(), candle_diffeq::Error>(())
    /// ```
    ///
    /// # Errors
    /// As [`solve`](Self::solve), and as `odeint_event`.
    pub fn events<T: Times + ?Sized>(
        &self,
        y0: &S,
        times: &T,
        events: &[Event<S>],
    ) -> Result<EventSolution<S>> {
        self.given(&()).events(y0, times, events)
    }

    /// The states at `times` and the events of every row, which has steps of its own; differentiable as
    /// [`solve`](Self::solve) is, and in the values that the rows cross.  As
    /// [`odeint_row_event`](crate::events::odeint_row_event).
    ///
    /// # Errors
    /// As [`solve`](Self::solve), and as `odeint_row_event`.
    pub fn row_events<T: Times + ?Sized>(
        &self,
        y0: &S,
        times: &T,
        events: &[RowEvent],
    ) -> Result<RowEventSolution<S>> {
        self.given(&()).row_events(y0, times, events)
    }
}

impl<S: State + 'static, A: State + 'static> Given<'_, S, A> {
    /// As [`NeuralOde::events`]; differentiable in the arguments, too.
    ///
    /// # Errors
    /// As [`NeuralOde::events`], and [`Error::ArgsPrecisionCount`](crate::Error::ArgsPrecisionCount).
    pub fn events<T: Times + ?Sized>(
        &self,
        y0: &S,
        times: &T,
        events: &[Event<S>],
    ) -> Result<EventSolution<S>> {
        let options = &self.ode.options;
        check_options(options)?;
        let mut search = Search::new(events);
        let pass = Pass {
            options,
            advance: &mut |problem, field, y0, keep| {
                run_observed(problem, field, y0, keep, &mut search)
            },
        };
        let solve = self.ode.run_with((y0, self.args), times, pass)?;
        search.solution(solve.in_graph()?)
    }

    /// As [`NeuralOde::row_events`]; differentiable in the arguments, too.
    ///
    /// # Errors
    /// As [`NeuralOde::row_events`], and [`Error::ArgsPrecisionCount`](crate::Error::ArgsPrecisionCount).
    pub fn row_events<T: Times + ?Sized>(
        &self,
        y0: &S,
        times: &T,
        events: &[RowEvent],
    ) -> Result<RowEventSolution<S>> {
        let options = row_options(&self.ode.options)?;
        let mut search = RowSearch::new(events);
        let pass = Pass {
            options: &options,
            advance: &mut |problem, field, y0, keep| search.advance(problem, field, y0, keep),
        };
        let solve = self.ode.run_with((y0, self.args), times, pass)?;
        search.solution(
            solve.problem,
            solve.source,
            solve.theta,
            solve.forward,
            &solve.y0,
        )
    }
}
