//! Continuous adjoints: λ is solved backward from output to output, with y beside it or interpolated in the forward steps.
//!
//! λ' = −(∂f/∂y)ᵀ λ,  θ̄' = −(∂f/∂θ)ᵀ λ,  λ(t_i⁻) = λ(t_i⁺) + ȳ_i,
//!
//! t̄_i = ȳ_iᵀ f(t_i, y_i) for i > 0,  t̄_0 = −λ(t_0)ᵀ f(t_0, y_0) with λ(t_0) before ȳ_0 is added.
//!
//! θ̄ is no state: nothing depends on it, so that it is a sum over the stages of the steps that were accepted,
//! θ̄ ← θ̄ + |h| Σ b_i (∂f/∂θ)ᵀ λ_i, in state precision.  The field runs in compute precision, and its pull-back is fed
//! Q(S·λ), as in the discrete sweep.

mod augmented;
mod forward;
mod instants;
mod march;
mod measure;
mod pullback;
mod quadrature;
mod stages;
mod stochastic;
mod stops;

use std::sync::Arc;

use candle_core::{DType, Tensor};

use crate::accumulator::Accumulator;
use crate::error::{ContinuousDefect, Error, Result};
use crate::integrate::Forward;
use crate::ops;
use crate::problem::Problem;
use crate::reverse::{Adjoint, Backward, Reversible};
use crate::schedule::{Output, Step};
use crate::stats::Stats;
use crate::time::Time;
use crate::trajectory::Checkpoint;
use augmented::Augmented;
use forward::ForwardStates;
use march::March;
use stops::stops;

/// A solve whose gradient is a continuous adjoint.
struct Backsolve {
    /// The times of the returned states.
    times: Vec<f64>,
    /// These states, `(outputs, elements)`, and y_0, in state precision.
    states: Tensor,
    y0: Vec<Tensor>,
    /// The forward steps, where their states are read.
    steps: Option<Arc<dyn Reversible>>,
    kept: bool,
}

/// A forward pass from y0, joined, with the way back of a continuous adjoint, if one is wanted.
pub(crate) fn over(
    problem: &Problem,
    forward: Forward,
    y0: &Tensor,
    kept: bool,
) -> Result<Forward> {
    let Some(continuous) = &problem.continuous else {
        return Ok(forward);
    };
    let points = problem.grid.points();
    let times = match problem.output {
        Output::All => points.to_vec(),
        Output::Final => points[points.len() - 1..].to_vec(),
        Output::Steps => match problem.plan.known() {
            Some(schedule) => schedule.times(),
            None => forward.back.step_times(),
        },
    };
    let y0 = problem.packing.split(&problem.start(y0)?.copy()?)?;
    let back = Backsolve {
        times,
        states: forward.packed.clone(),
        y0,
        steps: continuous.reads_states().then(|| Arc::clone(&forward.back)),
        kept: kept && problem.checkpoint != Checkpoint::Nothing,
    };
    Ok(Forward {
        back: Arc::new(back),
        ..forward
    })
}

/// What a continuous adjoint cannot be had of.
pub(crate) fn check(problem: &Problem) -> Result<()> {
    let unavailable = ContinuousDefect::unavailable;
    match (&problem.continuous, &problem.driven) {
        (Some(_), _) if !problem.crossings.is_empty() => {
            unavailable("events of rows", "Gradient::Discrete")
        }
        (Some(_), _) if problem.scheme.compensated => unavailable(
            "compensated sums",
            "Precision without compensated, or Gradient::Discrete",
        ),
        (Some(continuous), Some(driven)) => stochastic::check(problem, continuous, driven),
        _ => Ok(()),
    }
}

impl Reversible for Backsolve {
    fn can_rewind(&self) -> bool {
        let steps = self.steps.as_ref();
        self.kept && steps.is_none_or(|steps| steps.can_rewind())
    }

    fn reads_field(&self) -> bool {
        true
    }

    fn step_times(&self) -> Vec<f64> {
        self.times.clone()
    }

    fn ignores_cotangents(&self) -> bool {
        // They are looked at here: their size is that of the tolerance.
        true
    }

    fn pull_back(&self, back: &Backward<'_>, stats: &mut Stats) -> Result<Adjoint> {
        let problem = back.problem;
        let Some(continuous) = &problem.continuous else {
            return Err(Error::NothingKept);
        };
        let largest = ops::magnitude(back.cotangent)?;
        if !largest.is_finite() {
            return Err(Error::NonFiniteCotangent);
        }
        if problem.is_empty() {
            return self.nothing(back);
        }
        if let Some(driven) = &problem.driven {
            return stochastic::pull_back(self, back, (continuous, driven), stats);
        }
        let steps = match &self.steps {
            Some(steps) => Some(steps.taken_steps().ok_or(Error::NothingKept)?),
            None => None,
        };
        let states = steps.map(|(trajectory, schedule)| {
            ForwardStates::new(problem, back.field, trajectory, schedule)
        });
        let augmented = Augmented::new(back, states, continuous);
        let mut march = March::new(&augmented, continuous, largest)?;
        let solved = self.solve(back, &mut march);
        march.count(stats);
        augmented.count(stats);
        let times = solved?;
        let (y0, theta) = march.finish()?;
        Ok(Adjoint { y0, theta, times })
    }
}

impl Backsolve {
    /// From the last time to the first; t̄.
    fn solve(&self, back: &Backward<'_>, march: &mut March<'_, '_>) -> Result<Vec<f64>> {
        let problem = back.problem;
        let points = problem.grid.points();
        let mut times = vec![
            0.0;
            if back.differentiate_time {
                points.len()
            } else {
                0
            }
        ];
        let stops = stops(&self.times, points, &march.continuous().steps);
        for (n, &(t, output)) in stops.iter().enumerate() {
            if n > 0 {
                march.to(t)?;
            }
            let is_first = n + 1 == stops.len();
            let kept = match output {
                Some(output) => Some(problem.packing.unpack(&self.states.get(output)?)?),
                None => is_first.then(|| self.y0.clone()),
            };
            if let Some(kept) = &kept {
                march.compare(kept)?;
            }
            if is_first && back.differentiate_time {
                let towards = march.last_start().unwrap_or(t);
                let f = self.slope(back, march, [t, towards], &self.y0)?;
                times[0] -= dot(march.adjoint(), &f)?;
            }
            let Some((output, y)) = output.zip(kept) else {
                continue;
            };
            let given = problem.packing.unpack(&back.cotangent.get(output)?)?;
            let moved = match back.differentiate_time && !is_first {
                true => self.moved_by(problem, output),
                false => vec![],
            };
            if !moved.is_empty() {
                let f = self.slope(back, march, [t, stops[n + 1].0], &y)?;
                let change = dot(&given, &f)?;
                for (number, derivative) in moved {
                    times[number] += derivative * change;
                }
            }
            march.meet(y, &given)?;
        }
        match times.iter().position(|t| !t.is_finite()) {
            Some(number) => Err(Error::NonFiniteGradient {
                step: march.steps(),
                t: points[number],
            }),
            None => Ok(times),
        }
    }

    /// The user's times that the time of a returned state depends on, with the derivatives.
    fn moved_by(&self, problem: &Problem, output: usize) -> Vec<(usize, f64)> {
        let points = problem.grid.points();
        match (problem.output, problem.plan.known()) {
            (Output::All, _) => vec![(output, 1.0)],
            (Output::Final, _) => vec![(points.len() - 1, 1.0)],
            (Output::Steps, Some(schedule)) => match output.checked_sub(1) {
                Some(step) => schedule.step(step).nodes[1]
                    .of_output()
                    .derivatives()
                    .collect(),
                None => vec![],
            },
            // Of adaptive steps only those that end at a time of the user move.
            (Output::Steps, None) => {
                let t = self.times[output];
                let ascending = points[points.len() - 1] >= points[0];
                let at = points.partition_point(|point| *point != t && (*point < t) == ascending);
                match points.get(at) {
                    Some(point) if *point == t => vec![(at, 1.0)],
                    _ => vec![],
                }
            }
        }
    }

    /// f(t, y) on the side of t on which another time lies, in a step that no jump is inside of.
    fn slope(
        &self,
        back: &Backward<'_>,
        march: &March<'_, '_>,
        [t, towards]: [f64; 2],
        y: &[Tensor],
    ) -> Result<Vec<Tensor>> {
        let problem = back.problem;
        let end = march.until_jump(t, towards);
        let step = march.between(Step::free(0, t, end - t, end));
        let time = Time::new(step.at(0.0), problem.state(), problem.device());
        let roles = &problem.scheme.roles;
        let y = y.iter().zip(roles).map(|(y, roles)| roles.compute.round(y));
        let y = y.collect::<Result<Vec<_>>>()?;
        Ok(back.field.velocity(&step.within(time), &y)?)
    }

    /// The gradients of a state without an element.
    fn nothing(&self, back: &Backward<'_>) -> Result<Adjoint> {
        let zeros = |y: &Tensor| Ok(y.zeros_like()?);
        Ok(Adjoint {
            y0: self.y0.iter().map(zeros).collect::<Result<_>>()?,
            theta: Accumulator::new(back.theta, back.problem.state())?.finish()?,
            times: match back.differentiate_time {
                true => vec![0.0; back.problem.grid.points().len()],
                false => vec![],
            },
        })
    }
}

/// The largest difference of a number of x and of y, relative to the largest number of y, over the tensors of y.
fn drift(x: &[Tensor], y: &[Tensor]) -> Result<f64> {
    let (mut apart, mut size) = (0f64, 0f64);
    for (x, y) in x.iter().zip(y) {
        apart = apart.max(ops::magnitude(&(x - y)?)?);
        size = size.max(ops::magnitude(y)?);
    }
    Ok(match apart {
        0.0 => 0.0,
        apart => apart / size,
    })
}

/// Σ of the products of two lists of tensors.
fn dot(a: &[Tensor], b: &[Tensor]) -> Result<f64> {
    let products = a.iter().zip(b).map(|(a, b)| -> Result<f64> {
        let product = ops::dot(a, b)?.reshape(())?;
        ops::note_host_read(product.device());
        Ok(product.to_dtype(DType::F64)?.to_scalar()?)
    });
    products.sum()
}
