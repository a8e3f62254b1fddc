//! One step of an equation that is driven by noise: evaluations of its parts, and the sums of a table.
//!
//! A state that a step carries, and the cotangent of one, are lists of tensors; a method with several states has them one
//! after the other.  Evaluations are in compute precision.  The increments, their products with evaluations and with
//! cotangents, and every sum are in state precision, with √h and h as coefficients of the sums.

mod apply;
mod attempt;
mod commute;
mod equation;
mod increments;
pub(crate) mod methods;
mod table;

use candle_core::{DType, Device, Shape, Tensor};

use crate::error::{Error, MemoryNeed, Result, SdeDefect};
use crate::field::{pullback::alike, Field};
use crate::noise::Noise;
use crate::ops;
use crate::precision::{Roles, Rounding};
use crate::schedule::{Schedule, Step};
use crate::step::located;
use crate::time::{Time, TimeGrid};
use crate::watch::Watch;
pub(crate) use apply::is_any;
pub(crate) use attempt::Attempted;
pub(crate) use equation::Equation;
pub use equation::{Calculus, NoiseType};
pub(crate) use increments::StepNoise;
use table::Evaluation;
pub use table::SdeMethod;
pub(crate) use table::{Embedded, Functional, Part, Sum, Table, Term};

/// How an equation is to be solved, and by what it is driven.
#[derive(Clone, Debug)]
pub(crate) struct Drive {
    pub(crate) method: SdeMethod,
    pub(crate) equation: Equation,
    pub(crate) noise: Noise,
    /// Solutions of each initial state.
    pub(crate) samples: usize,
}

impl Drive {
    /// The same for a solve that may be pulled back.
    pub(crate) fn kept(self) -> Result<Self> {
        Ok(Self {
            noise: self.noise.kept()?,
            ..self
        })
    }

    /// Whether the lengths of steps may be chosen by looking at the noise in them.
    fn may_adapt(&self) -> Result<()> {
        let Equation {
            calculus,
            noise,
            additive,
            ..
        } = self.equation;
        let defect = match noise {
            _ if calculus == Calculus::Ito && !additive => SdeDefect::AdaptiveIto,
            NoiseType::General { .. } if !additive => SdeDefect::AdaptiveGeneral,
            _ if !self.method.estimates_errors() => {
                let method = self.method.name();
                SdeDefect::NoEstimate { method }
            }
            _ if !self.noise.is_path() => SdeDefect::NotAPath,
            _ => return Ok(()),
        };
        Err(Error::Sde(defect))
    }

    /// Whether there is memory for all samples of `rows` rows of so many bytes in all, and every row has its own noise.
    pub(crate) fn check_samples(&self, rows: usize, bytes: usize) -> Result<()> {
        let (samples, first_row) = (self.samples, self.noise.first_row());
        let states = samples as u128 * bytes as u128;
        let need = MemoryNeed {
            states,
            ..Default::default()
        };
        need.check()?;
        if samples == 0 {
            return Err(Error::Sde(SdeDefect::NoSamples));
        }
        self.noise.check_rows(samples as u128 * rows as u128)?;
        match samples > 1 && first_row > 0 {
            true => Err(Error::Sde(SdeDefect::SamplesOfPart { samples, first_row })),
            false => Ok(()),
        }
    }

    /// The given increments that gradients are computed of: those that candle tracks, or all of them.
    pub(crate) fn masters(&self, all: bool) -> Vec<Tensor> {
        let Some(given) = self.noise.given() else {
            return vec![];
        };
        let integrals = given.u().filter(|_| self.method.needs_integrals());
        let both = std::iter::once(given.w()).chain(integrals);
        match all || both.clone().any(Tensor::track_op) {
            true => both.cloned().collect(),
            false => vec![],
        }
    }
}

/// The steps of a solve that is driven by noise.
#[derive(Clone, Debug)]
pub(crate) struct Driven {
    pub(crate) drive: Drive,
    /// Roles, and shapes, of the tensors of y.
    pub(crate) roles: Vec<Roles>,
    shapes: Vec<Shape>,
    device: Device,
    pub(crate) rows: usize,
    /// Steps of the solve, and its interval.
    steps: usize,
    pub(crate) span: [f64; 2],
}

/// An evaluation of a part, with the state that it was given.
#[derive(Clone)]
pub(crate) struct Evaluated<L> {
    pub(crate) part: Part,
    pub(crate) t: f64,
    pub(crate) at: Vec<Tensor>,
    pub(crate) value: Vec<Tensor>,
    /// What the pass keeps of it beside its value.
    pub(crate) linear: L,
}

impl Driven {
    /// The steps of a schedule over a grid from y0, or adaptive steps where there is none; validated.
    pub(crate) fn new(
        drive: Drive,
        (y0, roles): (&[Shape], &[Roles]),
        (grid, schedule): (&TimeGrid, Option<&Schedule>),
        device: &Device,
    ) -> Result<Self> {
        let refused = |defect| Err(Error::Sde(defect));
        if schedule.is_none() {
            drive.may_adapt()?;
        }
        drive.method.check(&drive.equation)?;
        let points = grid.points();
        let span = [points[0], points[points.len() - 1]];
        if span[1] < span[0] {
            return refused(SdeDefect::BackwardTime);
        }
        if grid.is_tracked() {
            return refused(SdeDefect::TimeGradients);
        }
        if schedule.is_some_and(Schedule::is_dense) {
            return refused(SdeDefect::Steps {
                what: "an output inside a step",
            });
        }
        let mut rows = None;
        for (leaf, shape) in y0.iter().enumerate() {
            let Some(&got) = shape.dims().first() else {
                return refused(SdeDefect::NoRows { leaf });
            };
            let expected = *rows.get_or_insert(got);
            if got != expected {
                return refused(SdeDefect::Rows {
                    leaf,
                    expected,
                    got,
                });
            }
        }
        Ok(Self {
            drive,
            roles: roles.to_vec(),
            shapes: y0.to_vec(),
            device: device.clone(),
            rows: rows.unwrap_or(0),
            steps: schedule.map_or(0, Schedule::len),
            span,
        })
    }

    pub(crate) fn table(&self) -> &'static Table {
        self.drive.method.0
    }

    /// Tensors of y.
    pub(crate) fn leaves(&self) -> usize {
        self.shapes.len()
    }

    /// Roles of everything that a step carries.
    pub(crate) fn carried_roles(&self) -> Vec<Roles> {
        self.roles.repeat(self.table().next.len())
    }

    /// What the first step is given: every state begins at y0.
    pub(crate) fn begin(&self, y0: Vec<Tensor>) -> Vec<Tensor> {
        let states = self.table().next.len();
        let all = std::iter::repeat_n(y0, states).flatten();
        all.collect()
    }

    /// Dtype of every sum.
    pub(crate) fn state(&self) -> DType {
        self.roles[0].state
    }

    /// The parts of a field, which has at least two.
    pub(crate) fn parts<'f>(&self, field: &'f Field<'_>) -> Result<Vec<&'f Field<'f>>> {
        let parts = field.parts();
        match parts.len() > Part::Diffusion as usize {
            true => Ok(parts),
            false => Err(Error::Sde(SdeDefect::DiffusionCount {
                state: self.leaves(),
                got: 0,
            })),
        }
    }

    /// What a step carries at its end.
    pub(crate) fn advance(
        &self,
        field: &Field<'_>,
        step: Step,
        y: &[Tensor],
        watch: &mut Watch,
    ) -> Result<Vec<Tensor>> {
        let parts = self.parts(field)?;
        let mut noise = self.noise(step);
        let evaluate = |part, t: &Time, at: &Vec<Tensor>| {
            let part: &Field<'_> = parts[part as usize];
            Ok((part.velocity(t, at)?, ()))
        };
        let evaluated = self.evaluate(step, y, &mut noise, Some(watch), evaluate)?;
        let mut next = vec![];
        for sum in self.table().next {
            let roles = |leaf: usize| self.roles[leaf].state();
            next.extend(self.sum(sum, step, y, &evaluated, &mut noise, roles)?);
        }
        watch.see(&next, || Error::NonFiniteSolution {
            step: step.index,
            t: step.end,
        })?;
        Ok(next)
    }

    /// The noise of a step.
    pub(crate) fn noise(&self, step: Step) -> StepNoise<'_> {
        StepNoise::new(self, step)
    }

    /// All evaluations of a step, one after the other; `evaluate` is given the part, the time and the state.
    pub(crate) fn evaluate<L>(
        &self,
        step: Step,
        y: &[Tensor],
        noise: &mut StepNoise<'_>,
        watch: Option<&mut Watch>,
        evaluate: impl Fn(Part, &Time, &Vec<Tensor>) -> candle_core::Result<(Vec<Tensor>, L)>,
    ) -> Result<Vec<Evaluated<L>>> {
        let all: Vec<_> = self.table().evaluations.iter().collect();
        let mut done = vec![];
        self.evaluate_rest(&all, step, y, noise, watch, &mut done, evaluate)?;
        Ok(done)
    }

    /// Those of these evaluations that are not done yet.
    #[allow(clippy::too_many_arguments)]
    fn evaluate_rest<L>(
        &self,
        all: &[&Evaluation],
        step: Step,
        y: &[Tensor],
        noise: &mut StepNoise<'_>,
        mut watch: Option<&mut Watch>,
        done: &mut Vec<Evaluated<L>>,
        evaluate: impl Fn(Part, &Time, &Vec<Tensor>) -> candle_core::Result<(Vec<Tensor>, L)>,
    ) -> Result<()> {
        for (i, evaluation) in all.iter().enumerate().skip(done.len()) {
            let t = step.at(evaluation.c);
            let before = i.checked_sub(1).map(|j| (all[j], &done[j]));
            let at = match before {
                Some((before, evaluated)) if evaluation.at.is(&before.at) => evaluated.at.clone(),
                _ => {
                    let roles = |leaf: usize| self.roles[leaf].compute;
                    self.sum(&evaluation.at, step, y, done, noise, roles)?
                }
            };
            let time = step.within(Time::new(t, self.state(), &self.device));
            let (value, linear) =
                evaluate(evaluation.part, &time, &at).map_err(|e| located(e.into(), step, i, t))?;
            if time.was_shown() && step.stands_still_in(self.state()) {
                return Err(Error::TimeUnresolved {
                    step: step.index,
                    t: step.t,
                    end: step.end,
                    dtype: self.state(),
                });
            }
            match evaluation.part {
                Part::Diffusion => self.check_diffusion(&at, &value)?,
                _ => alike(&at, &value)?,
            }
            let round = |(k, roles): (&Tensor, &Roles)| roles.compute.round(k);
            let value = value.iter().zip(&self.roles).map(round);
            let value = value.collect::<Result<Vec<_>>>()?;
            if let Some(watch) = &mut watch {
                watch.see(&value, || Error::NonFiniteVelocity {
                    step: step.index,
                    stage: i,
                    t,
                })?;
            }
            done.push(Evaluated {
                part: evaluation.part,
                t,
                value,
                at,
                linear,
            });
        }
        Ok(())
    }

    /// What a sum of a table is.
    fn sum<L>(
        &self,
        sum: &Sum,
        step: Step,
        y: &[Tensor],
        evaluated: &[Evaluated<L>],
        noise: &mut StepNoise<'_>,
        rounding: impl Fn(usize) -> Rounding,
    ) -> Result<Vec<Tensor>> {
        let leaves = self.leaves();
        let mut products: Vec<Vec<(f64, Tensor)>> = vec![vec![]; leaves];
        for terms in sum.terms.chunk_by(|a, b| a.of == b.of) {
            let evaluation = &evaluated[terms[0].of];
            let scale = evaluation.part.scale(step.h);
            for (leaf, value) in evaluation.value.iter().enumerate() {
                let (constant, weight) = match evaluation.part {
                    Part::Drift => (constant(terms), None),
                    _ => noise.weight(terms, leaf, evaluated)?,
                };
                if constant != 0.0 {
                    let value = self.contracted(evaluation.part, value)?;
                    products[leaf].push((scale * constant, value));
                }
                if let Some(weight) = weight {
                    let product = self.product(evaluation.part, value, &weight)?;
                    products[leaf].push((scale, product));
                }
            }
        }
        let of_leaf = |leaf: usize| {
            let base = sum.base.iter().enumerate().filter(|(_, c)| **c != 0.0);
            let base = base.map(|(state, c)| (*c, &y[state * leaves + leaf]));
            // The state comes last: y + h f, rounded before the noise is added, would be off in the same direction for
            // many steps.
            let increments = products[leaf].iter().map(|(c, x)| (*c, x));
            let terms: Vec<_> = increments.chain(base).collect();
            match terms.as_slice() {
                [(1.0, y)] => rounding(leaf).round(y),
                terms => ops::combine(terms, 1.0, rounding(leaf)),
            }
        };
        (0..leaves).map(of_leaf).collect()
    }

    /// What the diffusion returned must fit the state and the declared noise.
    fn check_diffusion(&self, y: &[Tensor], g: &[Tensor]) -> Result<()> {
        if g.is_empty() || g.len() > y.len() {
            return Err(Error::Sde(SdeDefect::DiffusionCount {
                state: y.len(),
                got: g.len(),
            }));
        }
        for (leaf, (y, g)) in y.iter().zip(g).enumerate() {
            let noise = self.drive.equation.noise;
            let expected = match noise {
                NoiseType::General { channels } => [y.dims(), &[channels]].concat(),
                _ => y.dims().to_vec(),
            };
            if g.dims() != expected {
                return Err(Error::Sde(SdeDefect::DiffusionShape {
                    noise: noise.name(),
                    leaf,
                    expected: expected.into(),
                    got: g.shape().clone(),
                }));
            }
            if g.dtype() != y.dtype() {
                return Err(Error::DtypeChanged {
                    leaf,
                    expected: y.dtype(),
                    got: g.dtype(),
                });
            }
            if !g.device().same_device(y.device()) {
                return Err(Error::DeviceMismatch {
                    what: format!("what the diffusion returned for state tensor {leaf}"),
                    expected: y.device().location(),
                    got: g.device().location(),
                });
            }
        }
        Ok(())
    }
}

/// Σ of the coefficients on 1.
fn constant(terms: &[Term]) -> f64 {
    let on_one = terms.iter().filter(|term| term.on == Functional::One);
    on_one.map(|term| term.c).sum()
}

impl Sum {
    /// Whether it is the same sum.
    pub(crate) fn is(&self, other: &Self) -> bool {
        self.base == other.base
            && self.terms.len() == other.terms.len()
            && self
                .terms
                .iter()
                .zip(other.terms)
                .all(|(a, b)| a.of == b.of && a.on == b.on && a.c.to_bits() == b.c.to_bits())
    }
}
