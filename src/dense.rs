//! Dense output: solutions that can be evaluated at any time of their interval after the solve.

use std::any::TypeId;
use std::sync::Arc;

use candle_core::Tensor;

use crate::error::{AdaptiveDefect, Error, Result};
use crate::field::{Leaves, SharedField, VectorField};
use crate::integrate::observe::{InStep, Observer, Wanted};
use crate::integrate::Forward;
use crate::memory::TENSOR;
use crate::node::{in_graph, Source};
use crate::odeint::{solved_in_graph, InGraph};
use crate::parameters::Theta;
use crate::passes::run_observed;
use crate::problem::{OdeOptions, Problem};
use crate::reverse::Reversible;
use crate::schedule::{Output, Step, Steps};
use crate::state::{Packing, State};
use crate::step::{Increments, Scheme};
use crate::time::Times;

/// A solution over an interval of time, which can be evaluated at any time in it and is differentiable there.
///
/// The solution keeps the state and all stages of every step.  A step needs the memory of s + 1 states, where s is
/// the number of stages, plus the stage at the end of the step if it is not a stage already.  What a backward pass needs
/// is kept, too, even if nothing is tracked, unless [`Checkpoint::Nothing`](crate::options::Checkpoint::Nothing) is set.
/// Inside a step, the solution is the interpolant of the method.
pub struct DenseSolution<S> {
    problem: Problem,
    field: SharedField,
    theta: Theta,
    back: Arc<dyn Reversible>,
    y0: Tensor,
    steps: Vec<Kept>,
    state: std::marker::PhantomData<fn() -> S>,
}

/// A step: its start, and its stages.
struct Kept {
    step: Step,
    y: Vec<Tensor>,
    ks: Increments,
}

/// Keeps every step.
#[derive(Default)]
struct All(Vec<Kept>);

impl Observer for All {
    fn begin(&mut self) {
        self.0.clear();
    }

    fn accepted(&mut self, inside: &InStep<'_>, _: usize, _: &[f64]) -> Result<Wanted> {
        let (y, ks) = inside.parts();
        self.0.push(Kept {
            step: *inside.step(),
            y,
            ks,
        });
        Ok(Wanted::default())
    }

    fn retract(&mut self) {
        self.0.pop();
    }

    fn bytes(&self) -> u64 {
        let of = |y: &Vec<Tensor>| -> usize {
            let bytes = |y: &Tensor| y.elem_count() * y.dtype().size_in_bytes() + TENSOR as usize;
            y.iter().map(bytes).sum()
        };
        // All steps are alike.
        let of_step = |kept: &Kept| of(&kept.y) + kept.ks.iter().flatten().map(of).sum::<usize>();
        self.0.first().map_or(0, of_step) as u64 * self.0.len() as u64
    }
}

/// Solves y' = f(t, y) from y0 over the interval between the first and the last of `times`, with adaptive steps.
/// Other times in `times` and [`OdeOptions::output`] are not used: [`DenseSolution::at`] is asked for states.
///
/// ```
/// use candle_core::{Device, Var};
/// use candle_diffeq::{OdeOptions, Time};
/// use candle_diffeq::dense::odeint_dense;
/// use candle_diffeq::options::{Adaptive, Steps};
/// use candle_diffeq::tableau::DOPRI5;
/// let options = OdeOptions {
///     method: DOPRI5,
///     steps: Steps::Adaptive(Adaptive::new(1e-9, 1e-9)),
///     ..Default::default()
/// };
/// let y0 = Var::new(&[1f64], &Device::Cpu)?;
/// let decay = |_: &Time, y: &candle_core::Tensor| y.neg();
/// let solution = odeint_dense(decay, y0.as_tensor(), &[0.0, 2.0], &options)?;
/// let ys = solution.at(&[0.3, 1.7])?;
/// assert!((ys.get(1)?.get(0)?.to_scalar::<f64>()? - (-1.7f64).exp()).abs() < 1e-8);
/// let grads = ys.get(0)?.sum_all()?.backward()?;                         // ∂y(0.3)/∂y0
/// let grad = grads.get(&y0).unwrap().get(0)?.to_scalar::<f64>()?;
/// assert!((grad - (-0.3f64).exp()).abs() < 1e-8);
/// # Ok::<(), candle_diffeq::Error>(())
/// ```
///
/// # Errors
/// The errors of [`odeint`](crate::odeint), and [`AdaptiveDefect::FixedSteps`] if the steps are not adaptive.
pub fn odeint_dense<S, F, T>(
    field: F,
    y0: &S,
    times: &T,
    options: &OdeOptions,
) -> Result<DenseSolution<S>>
where
    S: State + 'static,
    F: VectorField<S> + Send + Sync + 'static,
    T: Times + ?Sized,
{
    if !matches!(options.steps, Steps::Adaptive(_)) {
        return Err(Error::Adaptive(AdaptiveDefect::FixedSteps));
    }
    let bind = |_| {
        let field: SharedField = Arc::new(Leaves::<Box<F>, S>::new(Box::new(field)));
        Ok(field)
    };
    let options = OdeOptions {
        output: Output::Final,
        ..options.clone()
    };
    let mut all = All::default();
    let start = (y0.leaves(), vec![], times.to_grid()?);
    let kind = TypeId::of::<F>();
    // What a backward pass needs is kept in any case: the times of `at` may be tracked.
    let solved = solved_in_graph(start, &options, kind, bind, |problem, field, y0, _| {
        run_observed(problem, field, y0, &|| true, &mut all)
    })?;
    let InGraph {
        problem,
        field,
        theta,
        forward,
        joined,
    } = solved;
    Ok(DenseSolution {
        problem,
        field,
        theta,
        back: forward.back,
        y0: joined,
        steps: all.0,
        state: std::marker::PhantomData,
    })
}

impl<S: State> DenseSolution<S> {
    /// The times at which steps begin or end, from the start of the first step to the end of the last step.
    pub fn step_times(&self) -> Vec<f64> {
        let starts = self.steps.iter().map(|kept| kept.step.t);
        let end = self.steps.last().map(|kept| kept.step.end);
        starts.chain(end).collect()
    }

    /// The states at `times`, `(times, …)`, in candle's graph: differentiable with respect to y0, everything that the
    /// field read, and the times.
    ///
    /// # Errors
    /// The errors of a time grid, and [`AdaptiveDefect::Outside`] if a time is outside the interval of the solution.
    pub fn at<T: Times + ?Sized>(&self, times: &T) -> Result<S> {
        let grid = times.to_grid()?;
        if self.steps.is_empty() {
            return self.unmoved(grid.points());
        }
        let places = self.places(grid.points())?;
        let scheme = &self.problem.scheme;
        let values = self.packed(&places, |kept, x| match x {
            0.0 => Ok(kept.y.clone()),
            _ => scheme.interpolated((&kept.step, x), &kept.y, &kept.ks),
        })?;
        let back = self.back.returning(&places);
        let problem = Problem {
            grid,
            output: Output::All,
            ..self.problem.clone()
        };
        let Some(back) = back else {
            let states = values.reshape(problem.returned(values.dim(0)?))?;
            return S::from_leaves(problem.packing.split(&states)?);
        };
        let problem = Arc::new(problem);
        let forward = Forward {
            packed: values,
            back,
            is_loss: false,
            found: vec![],
        };
        let (source, theta) = (Source::Shared(Arc::clone(&self.field)), self.theta.clone());
        let states = in_graph(Arc::clone(&problem), source, theta, forward, &self.y0)?;
        S::from_leaves(problem.packing.split(&states)?)
    }

    /// The time derivatives of the interpolant at `times`, `(times, …)`, detached from candle's graph; zero in a solution
    /// of one time, which has no step.
    ///
    /// # Errors
    /// As [`at`](Self::at).
    pub fn slopes_at<T: Times + ?Sized>(&self, times: &T) -> Result<S> {
        let grid = times.to_grid()?;
        if self.steps.is_empty() {
            let states = self.unmoved(grid.points())?.leaves();
            let zeros = states.iter().map(|y| y.zeros_like());
            return S::from_leaves(zeros.collect::<candle_core::Result<_>>()?);
        }
        let scheme: &Scheme = &self.problem.scheme;
        let slopes = self.packed(&self.places(grid.points())?, |kept, x| {
            scheme.weighted(1.0, &scheme.tableau.slopes_at(x), &kept.ks)
        })?;
        let problem = &self.problem;
        let state = problem.packing.joined();
        let slopes = slopes.reshape([vec![grid.points().len()], state].concat())?;
        S::from_leaves(problem.packing.split(&slopes)?)
    }

    /// y0 at every time of a solve that has no step: of an empty batch, or of one time.
    fn unmoved(&self, times: &[f64]) -> Result<S> {
        let points = self.problem.grid.points();
        let (from, to) = (points[0], points[points.len() - 1]);
        let is_outside = |t: &&f64| !(from.min(to)..=from.max(to)).contains(*t);
        if let Some(&t) = times.iter().find(is_outside) {
            return Err(Error::Adaptive(AdaptiveDefect::Outside { t, from, to }));
        }
        // A copy: the user's own may be written.
        let y0 = self.y0.force_contiguous()?;
        let all = vec![&y0; times.len()];
        let packing = &self.problem.packing;
        let states =
            Tensor::stack(&all, 0)?.reshape([vec![times.len()], packing.joined()].concat())?;
        S::from_leaves(packing.split(&states)?)
    }

    /// The step and the fraction of it for each time.
    fn places(&self, times: &[f64]) -> Result<Vec<(usize, f64)>> {
        let own = self.step_times();
        let (from, to) = match (own.first(), own.last()) {
            (Some(from), Some(to)) => (*from, *to),
            _ => return Err(Error::NothingKept),
        };
        let sign = if to < from { -1.0 } else { 1.0 };
        let place = |&t: &f64| {
            if !((t - from) * sign >= 0.0 && (to - t) * sign >= 0.0) {
                return Err(Error::Adaptive(AdaptiveDefect::Outside { t, from, to }));
            }
            let after = self
                .steps
                .partition_point(|kept| (kept.step.end - t) * sign < 0.0);
            let step = &self.steps[after].step;
            let x = match t == step.end {
                true => 1.0,
                false => (t - step.t) / step.h,
            };
            Ok((after, x))
        };
        times.iter().map(place).collect()
    }

    /// Values at places, `(places, elements)`.
    fn packed(
        &self,
        places: &[(usize, f64)],
        value: impl Fn(&Kept, f64) -> Result<Vec<Tensor>>,
    ) -> Result<Tensor> {
        let pack = |(step, x): &(usize, f64)| {
            let leaves = value(&self.steps[*step], *x)?;
            Packing::pack(&leaves, self.problem.state())
        };
        let all = places.iter().map(pack).collect::<Result<Vec<_>>>()?;
        Ok(Tensor::stack(&all, 0)?)
    }
}

impl<S> std::fmt::Debug for DenseSolution<S> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("DenseSolution")
            .field("steps", &self.steps.len())
            .finish_non_exhaustive()
    }
}
