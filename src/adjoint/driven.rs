//! Steps that are driven by noise, pulled back: the exact discrete adjoint of the sums of a table, given the increments.
//!
//! An evaluation k_i that enters sums with coefficients (or, of the diffusion, with products of noise) c gets the cotangent
//! v_i = Σ c s over these sums, where s is λ for the next value of a carried state, and the cotangent of the state that a
//! later evaluation was given.  As in the steps of an ordinary equation, v_i carries neither h nor √h; they multiply what
//! the pull-back returns.  The increments are computed again, and what was computed from them is never rounded below state
//! precision: λ∘ΔW is a product in state precision, which is rounded once it is part of v_i.

use candle_core::Tensor;

use super::{Method, StepBack, Sums};
use crate::driven::{is_any, Driven, Evaluated, Functional, NoiseType, Part, StepNoise, Sum, Term};
use crate::error::Result;
use crate::field::{Field, Pullback};
use crate::ops;
use crate::precision::Rounding;
use crate::schedule::Step;
use crate::stats::Stats;
use crate::watch::Watch;

/// The cotangent of a state that an evaluation was given: tensors, and what they are to be multiplied by.
type Pulled = (f64, Vec<Tensor>);

type Linear<'f> = Evaluated<Pullback<'f, Vec<Tensor>>>;

/// A step that is pulled back.
struct Pass<'a, 'f> {
    driven: &'a Driven,
    step: Step,
    noise: StepNoise<'a>,
    linear: Vec<Linear<'f>>,
    /// λ_{n+1} of everything that is carried.
    adj: &'a [Tensor],
    /// Of every evaluation, once it has been pulled back.
    pulled: Vec<Option<Pulled>>,
}

/// How an evaluation enters a sum: its terms, the cotangent of the sum, and a factor of that.
struct Use<'a> {
    terms: &'static [Term],
    factor: f64,
    cotangent: &'a [Tensor],
}

impl Method for Driven {
    fn advance(
        &self,
        field: &Field<'_>,
        step: Step,
        y: &[Tensor],
        watch: &mut Watch,
    ) -> Result<Vec<Tensor>> {
        self.advance(field, step, y, watch)
    }

    fn evaluations_of(&self, _: &Step) -> usize {
        self.table().evaluations.len()
    }

    fn pull_back(
        &self,
        at: &StepBack<'_>,
        adj: &[Tensor],
        sums: &mut Sums,
        stats: &mut Stats,
    ) -> Result<Vec<Tensor>> {
        let (sweep, step) = (at.sweep, at.step);
        let parts = self.parts(sweep.field)?;
        let mut noise = self.noise(step);
        let linear = self.evaluate(step, at.y, &mut noise, None, |part, t, y| {
            parts[part as usize].vjp(t, y)
        })?;
        stats.recomputed += linear.len();
        if sums.scaler.is_dynamic() {
            let largest = adj.iter().map(ops::magnitude);
            let largest = largest.collect::<Result<Vec<_>>>()?;
            let largest = largest.into_iter().fold(0.0, f64::max);
            sums.scaler = sums.scaler.aimed(largest);
        }
        let pulled = linear.iter().map(|_| None).collect();
        let mut back = Pass {
            driven: self,
            step,
            noise,
            linear,
            adj,
            pulled,
        };
        for i in (0..back.linear.len()).rev() {
            let seeds = back.seeds(i)?;
            let evaluation = &back.linear[i];
            let Sums { theta, scaler, .. } = sums;
            let grads = sweep.until_clean(step, evaluation.t, scaler, stats, |scale| {
                let v = back.seed(&seeds, scale)?;
                let part = (parts[evaluation.part as usize], evaluation.at.as_slice());
                sweep.pull(step, (i, evaluation.t), &v, part, &evaluation.linear)
            })?;
            let has_derivative = || is_any(&grads.y);
            back.driven
                .must_be_additive(evaluation.part, &step, has_derivative)?;
            let factor = evaluation.part.scale(step.h) / scaler.scale();
            for (p, grad) in grads.theta.iter().enumerate() {
                if let Some(grad) = grad {
                    theta.add(p, factor, grad)?;
                }
            }
            back.pulled[i] = Some((factor, grads.y));
        }
        sums.scaler = sums.scaler.after_step();
        back.increments(sweep.theta, sums)?;
        let incoming = sweep.outputs.at_node(sweep.schedule, step.index)?;
        back.carried(incoming.as_deref())
    }

    fn cotangents_at_end(&self, adj: Vec<Tensor>) -> Result<Vec<Tensor>> {
        let others = self.table().next.len() - 1;
        let zeros = (0..others).flat_map(|_| adj.iter().map(Tensor::zeros_like));
        let zeros = zeros.collect::<candle_core::Result<Vec<_>>>()?;
        Ok([adj, zeros].concat())
    }

    fn cotangents_at_start(&self, adj: Vec<Tensor>) -> Result<Vec<Tensor>> {
        let leaves = self.leaves();
        let of_leaf = |leaf: usize| {
            let states = adj.iter().skip(leaf).step_by(leaves);
            let terms: Vec<_> = states.map(|adj| (1.0, adj)).collect();
            match terms.as_slice() {
                [(_, one)] => Ok((*one).clone()),
                terms => ops::combine(terms, 1.0, Rounding::cast(self.state())),
            }
        };
        (0..leaves).map(of_leaf).collect()
    }
}

impl Pass<'_, '_> {
    /// Every way in which evaluation i enters the step.
    fn uses(&self, i: usize) -> Vec<Use<'_>> {
        let (table, leaves) = (self.driven.table(), self.driven.leaves());
        let next = table.next.iter().zip(self.adj.chunks(leaves.max(1)));
        let next = next.map(|(sum, adj)| (sum, 1.0, adj));
        let later = table.evaluations.iter().zip(&self.pulled);
        let later = later.filter_map(|(evaluation, pulled)| {
            let (factor, tensors) = pulled.as_ref()?;
            Some((&evaluation.at, *factor, tensors.as_slice()))
        });
        let of = |sum: &'static Sum| {
            let mut all = sum.terms.chunk_by(|a, b| a.of == b.of);
            all.find(|terms| terms[0].of == i)
        };
        let uses = next.chain(later).filter_map(|(sum, factor, cotangent)| {
            Some(Use {
                terms: of(sum)?,
                factor,
                cotangent,
            })
        });
        uses.collect()
    }

    /// v_i by tensor, as terms.
    fn seeds(&mut self, i: usize) -> Result<Vec<Vec<(f64, Tensor)>>> {
        let (part, tensors) = (self.linear[i].part, self.linear[i].value.len());
        let driven = self.driven;
        let mut seeds = vec![vec![]; tensors];
        let mut noise = std::mem::replace(&mut self.noise, driven.noise(self.step));
        for Use {
            terms,
            factor,
            cotangent,
        } in self.uses(i)
        {
            for (leaf, s) in cotangent.iter().take(tensors).enumerate() {
                let (constant, weight) = noise.weight(terms, leaf, &self.linear)?;
                if constant != 0.0 {
                    let product = driven.product_back(part, s, None)?;
                    seeds[leaf].push((factor * constant, product));
                }
                if let Some(weight) = weight {
                    let product = driven.product_back(part, s, Some(&weight))?;
                    seeds[leaf].push((factor, product));
                }
            }
        }
        self.noise = noise;
        for (seeds, value) in seeds.iter_mut().zip(&self.linear[i].value) {
            if seeds.is_empty() {
                let zero = value.zeros_like()?.to_dtype(driven.state())?;
                seeds.push((0.0, zero));
            }
        }
        Ok(seeds)
    }

    /// Q(S·v_i).
    fn seed(&self, seeds: &[Vec<(f64, Tensor)>], scale: f64) -> Result<Vec<Tensor>> {
        let of_leaf = |(leaf, seeds): (usize, &Vec<(f64, Tensor)>)| {
            let terms: Vec<_> = seeds.iter().map(|(c, x)| (*c, x)).collect();
            ops::combine(&terms, scale, self.driven.roles[leaf].compute)
        };
        seeds.iter().enumerate().map(of_leaf).collect()
    }

    /// λ_n of everything that is carried.
    fn carried(&self, incoming: Option<&[Tensor]>) -> Result<Vec<Tensor>> {
        let (table, leaves) = (self.driven.table(), self.driven.leaves());
        let mut carried = vec![];
        for state in 0..table.next.len() {
            for leaf in 0..leaves {
                let next = table.next.iter().enumerate();
                let next = next.map(|(q, sum)| (sum.base[state], &self.adj[q * leaves + leaf]));
                let at = table.evaluations.iter().zip(&self.pulled);
                let at = at.filter_map(|(evaluation, pulled)| {
                    let (factor, tensors) = pulled.as_ref()?;
                    Some((factor * evaluation.at.base[state], &tensors[leaf]))
                });
                let incoming = incoming.filter(|_| state == 0).map(|y| (1.0, &y[leaf]));
                // λ last, as y in a step.
                let terms = at.chain(incoming).chain(next);
                let mut terms: Vec<_> = terms.filter(|(c, _)| *c != 0.0).collect();
                if terms.is_empty() {
                    terms.push((0.0, &self.adj[leaf]));
                }
                let rounding = self.driven.roles[leaf].state();
                carried.push(ops::combine(&terms, 1.0, rounding)?);
            }
        }
        Ok(carried)
    }

    /// The gradients of given increments, if they are among θ.
    fn increments(&self, theta: &[Tensor], sums: &mut Sums) -> Result<()> {
        let Some(given) = self.driven.drive.noise.given() else {
            return Ok(());
        };
        let place = |of: &Tensor| theta.iter().position(|p| p.id() == of.id());
        let (w, u) = (place(given.w()), given.u().and_then(place));
        if w.is_none() && u.is_none() {
            return Ok(());
        }
        let h = self.step.h;
        let [of_w, of_u] = self.units_back()?;
        for (at, grad, unit) in [(w, of_w, h.sqrt()), (u, of_u, h * h.sqrt())] {
            if let (Some(at), Some(grad)) = (at, grad) {
                sums.theta.set(at, self.step.index, &(grad / unit)?)?;
            }
        }
        Ok(())
    }

    /// ξ̄ and η̄ of the step, `(rows, channels)`.
    fn units_back(&self) -> Result<[Option<Tensor>; 2]> {
        let tensors = self.noise.units().len();
        let mut by_leaf: [Vec<Option<Tensor>>; 2] = [vec![None; tensors], vec![None; tensors]];
        let add = |to: &mut Option<Tensor>, x: Tensor| -> Result<()> {
            *to = Some(match to.take() {
                Some(sum) => (sum + x)?,
                None => x,
            });
            Ok(())
        };
        for (i, evaluation) in self.linear.iter().enumerate() {
            let scale = evaluation.part.scale(self.step.h);
            if evaluation.part == Part::Drift {
                continue;
            }
            for of in self.uses(i) {
                let values = of.cotangent.iter().zip(&evaluation.value);
                for (leaf, (s, value)) in values.enumerate().take(tensors) {
                    let back = self.driven.weight_back(evaluation.part, s, value)?;
                    let back = (back * (of.factor * scale))?;
                    let units = &self.noise.units()[leaf];
                    for term in of.terms {
                        if term.on == Functional::U {
                            add(&mut by_leaf[1][leaf], (&back * term.c)?)?;
                        } else if let Some(slope) = units.slope(term.on)? {
                            let slope = slope.reshape(back.shape())?;
                            add(&mut by_leaf[0][leaf], ((&back * slope)? * term.c)?)?;
                        }
                    }
                }
            }
        }
        let rows = self.adj[0].dim(0)?;
        let joined = |leaves: Vec<Option<Tensor>>| -> Result<Option<Tensor>> {
            let of_leaf = |(leaf, x): (usize, Option<Tensor>)| match x {
                Some(x) => Ok(x),
                None => {
                    let columns = match self.driven.drive.equation.noise {
                        NoiseType::Diagonal => self.noise.features(leaf),
                        _ => self.noise.channels(tensors),
                    };
                    let device = self.adj[0].device();
                    Ok(Tensor::zeros((rows, columns), self.driven.state(), device)?)
                }
            };
            let leaves = leaves.into_iter().enumerate().map(of_leaf);
            let leaves = leaves.collect::<Result<Vec<_>>>()?;
            let mut rest = leaves.iter().skip(1);
            Ok(match (leaves.first(), self.driven.drive.equation.noise) {
                (None, _) => None,
                (Some(_), NoiseType::Diagonal) => Some(Tensor::cat(&leaves, 1)?),
                (Some(first), _) => Some(rest.try_fold(first.clone(), |sum, x| sum + x)?),
            })
        };
        let [w, u] = by_leaf;
        Ok([joined(w)?, joined(u)?])
    }
}
