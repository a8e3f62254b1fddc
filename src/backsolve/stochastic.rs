//! The stochastic adjoint: y and λ are solved backward along the noise of the forward pass.
//!
//! In the sense of Stratonovich the rules of ordinary calculus hold, so that λ solves
//!
//! dλ = −(∂f/∂y)ᵀ λ dt − (∂g/∂y)ᵀ (λ ∘ dW),  θ̄ = ∫ (∂f/∂θ)ᵀ λ dt + ∫ (∂g/∂θ)ᵀ (λ ∘ dW)
//!
//! (X. Li, T.-K. L. Wong, R. T. Q. Chen, D. Duvenaud, "Scalable gradients for stochastic differential equations", AISTATS
//! 2020).  Every forward step is taken back by the method of the forward pass, with −h and −ΔW in the places of h and ΔW;
//! the increments are drawn again.  λ is multiplied by the noise before it is pulled back: the noise of λ is not diagonal,
//! even where that of y is.

use candle_core::Tensor;

use super::augmented::Augmented;
use super::stages::Stage;
use super::{drift, Backsolve};
use crate::accumulator::Accumulator;
use crate::driven::{is_any, Calculus, Driven, Evaluated, Functional, Part, StepNoise, Sum, Term};
use crate::error::{ContinuousDefect, Error, Result};
use crate::field::Field;
use crate::gradient::{Continuous, Kind};
use crate::ops;
use crate::problem::{Plan, Problem};
use crate::reverse::{Adjoint, Backward};
use crate::schedule::Step;
use crate::stats::Stats;
use crate::time::Time;

/// What a stochastic adjoint cannot be had of.
pub(super) fn check(problem: &Problem, continuous: &Continuous, driven: &Driven) -> Result<()> {
    let unavailable = ContinuousDefect::unavailable;
    let (table, equation) = (driven.table(), &driven.drive.equation);
    let mut sums = table.evaluations.iter().map(|e| &e.at).chain(table.next);
    let is_plain = |sum: &Sum| {
        let mut terms = sum.terms.iter();
        sum.base == [1.0]
            && terms.all(|term| match table.evaluations[term.of].part {
                Part::Drift => term.on == Functional::One,
                Part::Diffusion => term.on == Functional::W,
                Part::MilsteinTerm => false,
            })
    };
    match &problem.plan {
        _ if continuous.kind != Kind::Backsolve => unavailable(
            "noise where y is interpolated",
            "Gradient::Backsolve or Gradient::Discrete",
        ),
        // Every forward step is taken back by itself, with its own method and length.
        _ if continuous.is_own => unavailable(
            "options of its own along noise",
            "AdjointSolve::new() or Gradient::Discrete",
        ),
        Plan::Adaptive(_) => unavailable(
            "adaptive steps along noise",
            "fixed steps or Gradient::Discrete",
        ),
        _ if table.calculus != Calculus::Stratonovich && !equation.additive => unavailable(
            "noise in the sense of Itô that is not additive",
            "the sense of Stratonovich (f − ½ g ∂g/∂y) or Gradient::Discrete",
        ),
        _ if !sums.all(is_plain) => unavailable(
            table.name,
            "sde::{EULER_HEUN, HEUN, MIDPOINT}, for additive noise EULER_MARUYAMA, or Gradient::Discrete",
        ),
        _ if driven.drive.masters(false).is_empty() => Ok(()),
        _ => unavailable("gradients of increments that are given", "Gradient::Discrete"),
    }
}

/// (∂f/∂y)ᵀ λ of an evaluation, or (∂g/∂y)ᵀ (λ ξ), in state precision, and its part of θ̄.
struct Pulled<'a> {
    w: Vec<Tensor>,
    stage: Option<Stage<'a>>,
}

/// A backward solve under way.
struct Return<'m, 'a> {
    driven: &'m Driven,
    augmented: &'m Augmented<'a>,
    parts: Vec<&'a Field<'a>>,
    y: Vec<Tensor>,
    adj: Vec<Tensor>,
    theta: Accumulator,
    /// Whether steps led here from where y last started anew.
    stepped: bool,
    drift: f64,
}

/// From the last step to the first.
pub(super) fn pull_back(
    solved: &Backsolve,
    back: &Backward<'_>,
    (continuous, driven): (&Continuous, &Driven),
    stats: &mut Stats,
) -> Result<Adjoint> {
    let problem = back.problem;
    let Some(schedule) = problem.plan.known() else {
        return Err(Error::NothingKept);
    };
    let augmented = Augmented::new(back, None, continuous);
    let zeros = |y: &Tensor| Ok(y.zeros_like()?);
    let mut way = Return {
        driven,
        augmented: &augmented,
        parts: driven.parts(back.field)?,
        y: solved.y0.clone(),
        adj: solved.y0.iter().map(zeros).collect::<Result<_>>()?,
        theta: Accumulator::new(back.theta, problem.state())?,
        stepped: false,
        drift: 0.0,
    };
    let (mut taken, mut result) = (0, Ok(()));
    for n in (0..schedule.len()).rev() {
        if let Some(output) = schedule.at_node(n + 1) {
            let given = problem.packing.unpack(&back.cotangent.get(output)?)?;
            way.start_from(problem.packing.unpack(&solved.states.get(output)?)?)?;
            way.meet(&given)?;
        }
        let sizes = way.adj.iter().map(ops::magnitude);
        if sizes.sum::<Result<f64>>()? == 0.0 {
            way.stepped = false;
            continue;
        }
        taken += 1;
        result = way.step(schedule.step(n));
        if result.is_err() {
            break;
        }
    }
    if result.is_ok() {
        result = way.start_from(solved.y0.clone());
    }
    let evaluations = taken * driven.table().evaluations.len();
    stats.recomputed += evaluations;
    stats.backward.steps += taken;
    stats.backward.evaluations += evaluations;
    stats.backward.drift = stats.backward.drift.max(way.drift);
    augmented.count(stats);
    result?;
    if let Some(output) = schedule.at_node(0) {
        way.meet(&problem.packing.unpack(&back.cotangent.get(output)?)?)?;
    }
    let theta = way.theta.finish()?;
    for grad in &theta {
        if !ops::magnitude(grad)?.is_finite() {
            return Err(Error::NonFiniteParameterGradient);
        }
    }
    Ok(Adjoint {
        y0: way.adj,
        theta,
        times: vec![],
    })
}

impl<'a> Return<'_, 'a> {
    /// y starts anew from a kept state, which it is compared with.
    fn start_from(&mut self, kept: Vec<Tensor>) -> Result<()> {
        if self.stepped {
            self.drift = self.drift.max(drift(&self.y, &kept)?);
        }
        (self.y, self.stepped) = (kept, false);
        Ok(())
    }

    /// A cotangent comes in.
    fn meet(&mut self, given: &[Tensor]) -> Result<()> {
        let state = |leaf: usize| self.driven.roles[leaf].state();
        let pairs = self.adj.iter().zip(given).enumerate();
        let sum = pairs.map(|(leaf, (adj, given))| {
            ops::combine(&[(1.0, adj), (1.0, given)], 1.0, state(leaf))
        });
        self.adj = sum.collect::<Result<_>>()?;
        Ok(())
    }

    /// Takes a step of the forward pass back.
    fn step(&mut self, step: Step) -> Result<()> {
        let driven = self.driven;
        let mut noise = driven.noise(step);
        let mut done: Vec<Evaluated<Pulled<'a>>> = vec![];
        for evaluation in driven.table().evaluations {
            let (y, adj) = self.sum(&evaluation.at, step, &done, &mut noise)?;
            let y = y.iter().zip(&driven.roles);
            let y = y.map(|(y, roles)| roles.compute.round(y));
            let y = y.collect::<Result<Vec<_>>>()?;
            let t = step.at(1.0 - evaluation.c);
            let time = step.within(Time::new(
                t,
                driven.state(),
                self.augmented.problem.device(),
            ));
            let part = self.parts[evaluation.part as usize];
            let (value, pull) = self.augmented.linearised(part, &time, &y)?;
            let value = value.iter().zip(&driven.roles);
            let value = value.map(|(k, roles)| roles.compute.round(k));
            let value = value.collect::<Result<Vec<_>>>()?;
            done.push(Evaluated {
                part: evaluation.part,
                t,
                at: y,
                value,
                linear: Pulled {
                    w: vec![],
                    stage: None,
                },
            });
            let seeds = match evaluation.part {
                Part::Diffusion => self.times_noise(&adj, &done, &mut noise)?,
                _ => adj,
            };
            let last = done.len() - 1;
            let at = &done[last].at;
            let (w, stage) = self.augmented.pulled(&pull, &time, at, &seeds)?;
            driven.must_be_additive(evaluation.part, &step, || is_any(&w))?;
            let stage = Some(stage);
            done[last].linear = Pulled { w, stage };
        }
        let next = &driven.table().next[0];
        let (y, adj) = self.sum(next, step, &done, &mut noise)?;
        for x in y.iter().chain(&adj) {
            if !ops::magnitude(x)?.is_finite() {
                let (step, t) = (step.index, step.t);
                return Err(Error::NonFiniteGradient { step, t });
            }
        }
        for Term { of, c, .. } in next.terms {
            let Evaluated { part, linear, .. } = &done[*of];
            if let Some(stage) = &linear.stage {
                let weight = c * part.scale(step.h) * stage.unscale;
                stage.add_to(&mut self.theta, self.augmented, weight)?;
            }
        }
        (self.y, self.adj, self.stepped) = (y, adj, true);
        self.augmented.passed(step.t);
        Ok(())
    }

    /// λ ξ, as the cotangent of the diffusion that was evaluated last.
    fn times_noise(
        &self,
        adj: &[Tensor],
        done: &[Evaluated<Pulled<'a>>],
        noise: &mut StepNoise<'_>,
    ) -> Result<Vec<Tensor>> {
        let tensors = done.last().map_or(0, |last| last.value.len());
        let of_leaf = |(leaf, adj): (usize, &Tensor)| {
            let (_, weight) = noise.weight(&[XI], leaf, done)?;
            self.driven
                .product_back(Part::Diffusion, adj, weight.as_ref())
        };
        adj.iter().take(tensors).enumerate().map(of_leaf).collect()
    }

    /// y and λ of a sum of the table, backward.
    fn sum(
        &self,
        sum: &Sum,
        step: Step,
        done: &[Evaluated<Pulled<'a>>],
        noise: &mut StepNoise<'_>,
    ) -> Result<(Vec<Tensor>, Vec<Tensor>)> {
        let leaves = self.driven.leaves();
        let mut of_y: Vec<Vec<(f64, Tensor)>> = vec![vec![]; leaves];
        let mut of_adj: Vec<Vec<(f64, &Tensor)>> = vec![vec![]; leaves];
        for Term { of, c, .. } in sum.terms {
            let Evaluated {
                part,
                value,
                linear,
                ..
            } = &done[*of];
            let c = c * part.scale(step.h);
            for (leaf, value) in value.iter().enumerate() {
                let product = match part {
                    Part::Diffusion => match noise.weight(&[XI], leaf, done)? {
                        (_, Some(weight)) => self.driven.product(*part, value, &weight)?,
                        (_, None) => continue,
                    },
                    _ => value.clone(),
                };
                of_y[leaf].push((-c, product));
            }
            for (leaf, w) in linear.w.iter().enumerate() {
                of_adj[leaf].push((c, w));
            }
        }
        let (mut y, mut adj) = (vec![], vec![]);
        for (leaf, roles) in self.driven.roles.iter().enumerate() {
            // The state comes last, as in a forward step.
            let terms = of_y[leaf].iter().map(|(c, x)| (*c, x));
            let terms: Vec<_> = terms.chain([(1.0, &self.y[leaf])]).collect();
            y.push(ops::combine(&terms, 1.0, roles.state())?);
            of_adj[leaf].push((1.0, &self.adj[leaf]));
            adj.push(ops::combine(&of_adj[leaf], 1.0, roles.state())?);
        }
        Ok((y, adj))
    }
}

/// ξ.
const XI: Term = Term {
    of: 0,
    on: Functional::W,
    c: 1.0,
};
