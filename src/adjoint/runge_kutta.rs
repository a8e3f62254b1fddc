//! Explicit Runge-Kutta steps, pulled back.

use candle_core::{DType, Tensor};

use super::outputs::Dense;
use super::times::{TimeGradients, TimeTerm};
use super::{Method, StepBack, Sums, Sweep};
use crate::error::{Error, Result};
use crate::field::{pullback, Field, Pullback};
use crate::ops;
use crate::precision::{Roles, Rounding};
use crate::scaler::{Outcome, Scaler};
use crate::schedule::{Node, Step};
use crate::stats::Stats;
use crate::step::{located, LinearStage, Scheme};
use crate::watch::Watch;

impl Method for Scheme {
    fn advance(
        &self,
        field: &Field<'_>,
        step: Step,
        y: &[Tensor],
        watch: &mut Watch,
    ) -> Result<Vec<Tensor>> {
        Ok(self.advance_and_store(field, step, y, false, watch)?.y)
    }

    fn evaluations_of(&self, step: &Step) -> usize {
        self.active(step).iter().filter(|&&active| active).count()
    }

    fn pull_back(
        &self,
        at: &StepBack<'_>,
        adj: &[Tensor],
        sums: &mut Sums,
        stats: &mut Stats,
    ) -> Result<Vec<Tensor>> {
        let (sweep, step) = (at.sweep, at.step);
        let linear = sweep.linearize(step, at.y, stats)?;
        let n = step.index;
        let dense = sweep.outputs.dense(&self.tableau, sweep.schedule, n)?;
        if sums.scaler.is_dynamic() {
            let magnitude = sweep.magnitude(adj, &dense)?;
            sums.scaler = sums.scaler.aimed(magnitude);
        }
        let seeds = StageSeeds { adj, dense: &dense };
        let ws = sweep.pull_stages_back(step, &seeds, &linear, sums, stats)?;
        if sweep.times > 0 {
            let after = sums.after.take();
            sums.after = sweep.times_of_outputs(step, &linear, after, &mut sums.times)?;
            sweep.time_of_output_at_jump(step, &linear, sums, stats)?;
        }
        let incoming = sweep.outputs.at_node(sweep.schedule, n)?;
        sweep.update(step, &seeds, &ws, incoming.as_deref())
    }

    fn cotangents_at_end(&self, adj: Vec<Tensor>) -> Result<Vec<Tensor>> {
        self.begin(adj)
    }

    fn cotangents_at_start(&self, mut adj: Vec<Tensor>) -> Result<Vec<Tensor>> {
        adj.truncate(self.roles.len());
        Ok(adj)
    }
}

/// w_i as the pull-back left it, and what it still has to be multiplied with.
type Pulled = (Vec<Tensor>, f64);

impl Sweep<'_> {
    /// The time terms of outputs inside the step, and of the part of them that the step before has handed on to its
    /// first stage; k_1, which may be the last stage of the step before.
    fn times_of_outputs(
        &self,
        step: Step,
        linear: &[Option<LinearStage<'_>>],
        after: Option<Vec<Tensor>>,
        times: &mut TimeGradients,
    ) -> Result<Option<Vec<Tensor>>> {
        let (tableau, last) = (&self.scheme.tableau, linear.len() - 1);
        let first = linear[0].as_ref().map(|stage| &stage.k);
        for at in self.schedule.inside(step.index) {
            let slopes = tableau.slopes_at(at.x);
            let k = |i: usize| match &linear[i] {
                Some(stage) => Some(&stage.k),
                None => after.as_ref().filter(|_| i == last),
            };
            for (leaf, y) in self.outputs.of(at.output)?.iter().enumerate() {
                let stages = (0..slopes.len()).filter(|&i| slopes[i] != 0.0);
                let terms: Vec<_> = stages
                    .filter_map(|i| Some((slopes[i], &k(i)?[leaf])))
                    .collect();
                if terms.is_empty() {
                    continue;
                }
                let slope = ops::combine(&terms, 1.0, self.scheme.roles[leaf].state())?;
                let value = ops::dot(y, &slope)?;
                if let Some(given) = at.given {
                    times.add(TimeTerm::at(given, step, value.clone())?)?;
                }
                times.add(TimeTerm::new(step, value, at.x - 1.0, -at.x)?)?;
            }
        }
        if let Some(k) = first.filter(|_| self.schedule.is_joined(step.index)) {
            let before = self.schedule.step(step.index - 1);
            for at in self.schedule.inside(before.index) {
                let weight = tableau.weights_at(at.x)[last];
                for (y, k) in self.outputs.of(at.output)?.iter().zip(k) {
                    let value = ops::dot(y, k)?;
                    times.add(TimeTerm::new(before, value, -weight, weight)?)?;
                }
            }
        }
        Ok(first.cloned())
    }

    /// The time term of an output at the end of the step, where the field jumps: the step ends at the jump, but an output that
    /// moves alone would move along the solution before it.
    fn time_of_output_at_jump(
        &self,
        step: Step,
        linear: &[Option<LinearStage<'_>>],
        sums: &mut Sums,
        stats: &mut Stats,
    ) -> Result<()> {
        let Node::AtJump(given) = step.nodes[1] else {
            return Ok(());
        };
        let Some(adj) = self.outputs.at_node(self.schedule, step.index + 1)? else {
            return Ok(());
        };
        let nothing = Dense::default();
        let mut own = Sums {
            theta: self.accumulator()?,
            times: TimeGradients::new(self.times),
            scaler: match sums.scaler.is_dynamic() {
                true => sums.scaler.aimed(self.magnitude(&adj, &nothing)?),
                false => sums.scaler,
            },
            after: None,
        };
        let seeds = StageSeeds {
            adj: &adj,
            dense: &nothing,
        };
        let step = Step {
            nodes: [Node::Constant, Node::Between(given, 0.0)],
            ..step
        };
        self.pull_stages_back(step, &seeds, linear, &mut own, stats)?;
        sums.times.add_all(own.times);
        Ok(())
    }

    /// max|λ| over the leaves whose cotangents can overflow.  Over all if none can, or while it is
    /// zero: a leaf whose λ starts at zero gets it from the others', through the field.
    fn magnitude(&self, adj: &[Tensor], dense: &Dense) -> Result<f64> {
        let max_over = |looked_at: fn(&Roles) -> bool| {
            let leaves = adj.iter().zip(&self.scheme.roles);
            let leaves = leaves.filter(|(_, roles)| looked_at(roles));
            let start = dense.magnitude(|leaf| looked_at(&self.scheme.roles[leaf]))?;
            leaves
                .map(|(adj, _)| ops::magnitude(adj))
                .try_fold(start, |max, m| Ok::<_, Error>(f64::max(max, m?)))
        };
        match max_over(Roles::needs_scaling)? {
            0.0 => max_over(|_| true),
            max => Ok(max),
        }
    }

    /// w_i of every stage, θ̄ and time terms added on the way.
    fn pull_stages_back(
        &self,
        step: Step,
        seeds: &StageSeeds<'_>,
        linear: &[Option<LinearStage<'_>>],
        sums: &mut Sums,
        stats: &mut Stats,
    ) -> Result<Vec<Option<Pulled>>> {
        let Sums {
            theta,
            times,
            scaler,
            ..
        } = sums;
        let mut ws: Vec<Option<Pulled>> = linear.iter().map(|_| None).collect();
        for i in (0..linear.len()).rev() {
            let Some(stage) = &linear[i] else { continue };
            let grads = self.until_clean(step, stage.t, scaler, stats, |scale| {
                let v =
                    self.cotangents(step, i, seeds, &ws, scale, |l| self.scheme.roles[l].compute)?;
                self.pull(step, (i, stage.t), &v, (self.field, &v), &stage.pull)
            })?;
            let unscale = 1.0 / scaler.scale();
            for (p, grad) in grads.theta.iter().enumerate() {
                if let Some(grad) = grad {
                    theta.add(p, step.h * unscale, grad)?;
                }
            }
            if self.times > 0 {
                // Without what the step before handed on, which its own length multiplies.
                let own = StageSeeds {
                    dense: &seeds.dense.own(),
                    ..*seeds
                };
                let v =
                    self.cotangents(step, i, &own, &ws, 1.0, |l| self.scheme.roles[l].state())?;
                self.time_terms(
                    step,
                    self.scheme.tableau.c()[i],
                    &v,
                    &stage.k,
                    grads.t,
                    unscale,
                    times,
                )?;
            }
            ws[i] = Some((grads.y, unscale));
        }
        *scaler = scaler.after_step();
        Ok(ws)
    }

    /// A pull-back with the scale that it is given, and with smaller ones while it overflows.
    pub(super) fn until_clean(
        &self,
        step: Step,
        t: f64,
        scaler: &mut Scaler,
        stats: &mut Stats,
        pull: impl Fn(f64) -> Result<Grads>,
    ) -> Result<Grads> {
        let mut attempts = 0;
        loop {
            let scale = scaler.scale();
            stats.vjps += 1;
            if scaler.is_on() {
                stats.used_scale_at(t, scale);
            }
            attempts += 1;
            let grads = pull(scale)?;
            let outcome = match scaler.is_dynamic() {
                true => grads.outcome()?,
                false => Outcome::Clean,
            };
            if outcome == Outcome::Clean {
                return Ok(grads);
            }
            *scaler = scaler.after(outcome);
            stats.retries += 1;
            if scaler.is_exhausted(attempts) {
                return Err(Error::ScaleExhausted {
                    step: step.index,
                    t: step.t,
                    scale,
                    attempts,
                });
            }
        }
    }

    /// Q(S·v_i), v_i = b_i λ + h Σ_{j>i} a_ji w_j.
    fn cotangents(
        &self,
        step: Step,
        i: usize,
        StageSeeds { adj, dense }: &StageSeeds<'_>,
        ws: &[Option<Pulled>],
        scale: f64,
        rounding: impl Fn(usize) -> Rounding,
    ) -> Result<Vec<Tensor>> {
        let tableau = &self.scheme.tableau;
        let of_leaf = |(leaf, adj): (usize, &Tensor)| {
            let later = ws.iter().enumerate().skip(i + 1).filter_map(|(j, w)| {
                let (w, unscale) = w.as_ref()?;
                let a = tableau.a(j)[i];
                (a != 0.0).then(|| (step.h * a * unscale, &w[leaf]))
            });
            let b = tableau.b()[i];
            // A sum is formed in the widest dtype of its operands: with λ among them, in f64 where the
            // state is.
            let first = (b != 0.0 || adj.dtype() == DType::F64).then_some((b, adj));
            let dense = dense.terms(i, leaf);
            let mut terms: Vec<_> = first.into_iter().chain(later).chain(dense).collect();
            if terms.is_empty() {
                terms.push((0.0, adj));
            }
            ops::combine(&terms, scale, rounding(leaf))
        };
        let leaves = self.scheme.roles.len();
        adj[..leaves].iter().enumerate().map(of_leaf).collect()
    }

    /// One pull-back of a stage of the field, or of a part of it, which was evaluated at a state like `y`; the cotangent of
    /// the state is rounded as the seed was.
    pub(super) fn pull(
        &self,
        step: Step,
        (stage, t): (usize, f64),
        v: &Vec<Tensor>,
        (field, y): (&Field<'_>, &[Tensor]),
        pull: &Pullback<'_, Vec<Tensor>>,
    ) -> Result<Grads> {
        let mut pulled = pull(v).map_err(|e| located(e.into(), step, stage, t))?;
        let invalid = |defect| Error::InvalidPullback {
            step: step.index,
            stage,
            t,
            defect,
        };
        pullback::check(y, self.theta, &pulled).map_err(invalid)?;
        let round = |(w, roles): (&Tensor, &Roles)| roles.compute.round(w);
        let y = pulled.y.iter().zip(&self.scheme.roles).map(round);
        let params = self.theta.iter().map(|p| pulled.params.remove(p));
        let params = params.map(|g| g.map(|g| g.detach())).collect();
        pullback::check_rest(field, &pulled.params).map_err(invalid)?;
        Ok(Grads {
            y: y.collect::<Result<_>>()?,
            theta: params,
            t: pulled.t.map(|t| t.detach()),
        })
    }

    /// λ + h Σ w_i + ȳ, with what rounding has taken from it if that is carried.
    fn update(
        &self,
        step: Step,
        StageSeeds { adj, dense }: &StageSeeds<'_>,
        ws: &[Option<Pulled>],
        incoming: Option<&[Tensor]>,
    ) -> Result<Vec<Tensor>> {
        let (mut before, mut rests) = (vec![], vec![]);
        for (leaf, roles) in self.scheme.roles.iter().enumerate() {
            let ws = ws.iter().flatten();
            let ws = ws.map(|(w, unscale)| (step.h * unscale, &w[leaf]));
            let incoming = incoming.map(|y| (1.0, &y[leaf]));
            let terms: Vec<_> = std::iter::once((1.0, &adj[leaf]))
                .chain(ws)
                .chain(incoming)
                .chain(dense.of_state(leaf))
                .collect();
            match self.scheme.lost(adj, leaf) {
                Some(lost) => {
                    let [adj, lost] = ops::add_compensated([&adj[leaf], lost], &terms[1..])?;
                    before.push(adj);
                    rests.push(lost);
                }
                None => before.push(ops::combine(&terms, 1.0, roles.state())?),
            }
        }
        before.append(&mut rests);
        Ok(before)
    }

    /// The contributions of stage i to t̄: h depends on both ends of the step, the stage's time too.
    #[allow(clippy::too_many_arguments)]
    fn time_terms(
        &self,
        step: Step,
        c: f64,
        v: &[Tensor],
        k: &[Tensor],
        through_f: Option<Tensor>,
        unscale: f64,
        times: &mut TimeGradients,
    ) -> Result<()> {
        for (v, k) in v.iter().zip(k) {
            times.add(TimeTerm::new(step, ops::dot(v, k)?, -1.0, 1.0)?)?;
        }
        if let Some(dt) = through_f {
            let h = step.h * unscale;
            times.add(TimeTerm::new(step, dt, (1.0 - c) * h, c * h)?)?;
        }
        Ok(())
    }
}

/// λ_{n+1}, and what enters the step from outputs inside it.
#[derive(Clone, Copy)]
struct StageSeeds<'a> {
    adj: &'a [Tensor],
    dense: &'a Dense,
}

/// What one pull-back gave, still multiplied by S.
pub(super) struct Grads {
    pub(super) y: Vec<Tensor>,
    pub(super) theta: Vec<Option<Tensor>>,
    t: Option<Tensor>,
}

impl Grads {
    pub(super) fn outcome(&self) -> Result<Outcome> {
        let finite = |x: &Tensor| Ok::<_, Error>(ops::magnitude(x)?.is_finite());
        for w in self.y.iter().chain(&self.t) {
            if !finite(w)? {
                return Ok(Outcome::StateOverflow);
            }
        }
        for grad in self.theta.iter().flatten() {
            if !finite(grad)? {
                return Ok(Outcome::ParameterOverflow);
            }
        }
        Ok(Outcome::Clean)
    }
}
