//! The backward sweep: the exact discrete adjoint of the steps that were taken, rounding treated as
//! the identity (discretise, then optimise).
//!
//! For n = N−1 … 0, with λ = λ_{n+1} in state precision and the stages recomputed from ŷ_n:
//!
//! v_i = b_i λ + h Σ_{j>i} a_ji w_j,  w_i = (∂f/∂y)ᵀ v_i,  θ̄ += h (∂f/∂θ)ᵀ v_i,
//!
//! λ_n = λ + h Σ w_i + ȳ_n,
//!
//! t̄_{n+1} += Σ v_iᵀ(k_i + c_i h ∂_t f_i),  t̄_n += Σ v_iᵀ(−k_i + (1−c_i) h ∂_t f_i).
//!
//! v_i carries no factor h, so it stays of the size of λ.  Only the pull-back is in compute
//! precision: it is fed Q(S·v_i), and its results are divided by S in state precision.

use candle_core::{DType, Tensor};

use crate::accumulator::Accumulator;
use crate::error::{Error, Result};
use crate::ops;
use crate::precision::{Roles, Rounding};
use crate::scaler::{Outcome, Scaler};
use crate::stats::Stats;
use crate::step::{located, Field, Linear, Scheme};
use crate::time::{Step, StepPlan};
use crate::trajectory::Trajectory;
use crate::watch::Watch;

/// Gradients in state precision, without history.
pub(crate) struct Adjoint {
    /// λ_0.
    pub(crate) y0: Vec<Tensor>,
    /// θ̄, by parameter.
    pub(crate) theta: Vec<Tensor>,
    /// t̄, by output time; empty unless asked for.
    pub(crate) times: Vec<f64>,
}

/// What the sweep needs to know of the solve.
pub(crate) struct Sweep<'a> {
    pub(crate) scheme: &'a Scheme,
    pub(crate) plan: &'a StepPlan,
    pub(crate) trajectory: &'a Trajectory,
    pub(crate) field: &'a Field<'a>,
    /// The tensors that the field reads as parameters.
    pub(crate) theta: &'a [Tensor],
    pub(crate) scaler: Scaler,
    pub(crate) differentiate_time: bool,
}

/// w_i as the pull-back left it, and what it still has to be multiplied with.
type Pulled = (Vec<Tensor>, f64);

impl Sweep<'_> {
    /// Pulls cotangents of the outputs back to y0, θ and t.  `last` is ȳ at the last output time and
    /// `earlier(i)` at output time i, in state precision, `None` where the loss does not look.
    pub(crate) fn run(
        &self,
        last: Vec<Tensor>,
        earlier: impl Fn(usize) -> Result<Option<Vec<Tensor>>>,
        mut watch: Watch,
        stats: &mut Stats,
    ) -> Result<Adjoint> {
        let steps = self.plan.len();
        let mut scaler = self.scaler;
        let mut theta = Accumulator::new(self.theta, self.scheme.roles[0].state)?;
        let mut time_terms = vec![];
        let mut rewind = self.trajectory.rewind();
        let mut adj = last;
        for n in (0..steps).rev() {
            let step = self.plan.step(n);
            let replay = |m, y: &Vec<Tensor>| self.replay(m, y, &mut watch, stats);
            let mut kept = Stats::default();
            let y = rewind.state(n, replay, &mut kept)?;
            stats.kept(kept.states_kept, kept.bytes_kept);
            let linear = self
                .scheme
                .linearize(self.field, step, &y, self.differentiate_time)?;
            stats.recomputed += self.scheme.evaluations();
            if scaler.is_dynamic() {
                scaler = scaler.aimed(self.magnitude(&adj)?);
            }
            let ws;
            (ws, scaler) = self.pull_back(
                step,
                &adj,
                &linear,
                scaler,
                &mut theta,
                &mut time_terms,
                stats,
            )?;
            let incoming = match step.span.0 {
                0.0 => earlier(step.interval)?,
                _ => None,
            };
            adj = self.update(step, &adj, &ws, incoming.as_deref())?;
            watch.see(&adj, || gradient(step))?;
        }
        let theta = theta.finish()?;
        if steps > 0 {
            watch.see(&theta, || gradient(self.plan.step(0)))?;
        }
        watch.finish()?;
        Ok(Adjoint {
            y0: adj,
            theta,
            times: self.times(&time_terms)?,
        })
    }

    /// y_{m+1} from y_m, for a plan that did not keep it.
    fn replay(
        &self,
        m: usize,
        y: &[Tensor],
        watch: &mut Watch,
        stats: &mut Stats,
    ) -> Result<Vec<Tensor>> {
        stats.recomputed += self.scheme.evaluations();
        self.scheme.advance(self.field, self.plan.step(m), y, watch)
    }

    /// max|λ| over the leaves whose cotangents can overflow, or over all if none can.
    fn magnitude(&self, adj: &[Tensor]) -> Result<f64> {
        let roles = &self.scheme.roles;
        let any = roles.iter().any(Roles::needs_scaling);
        let looked_at = adj.iter().zip(roles);
        let looked_at = looked_at.filter(|(_, roles)| !any || roles.needs_scaling());
        looked_at
            .map(|(adj, _)| ops::magnitude(adj))
            .try_fold(0.0, |max, m| Ok(f64::max(max, m?)))
    }

    /// w_i of every stage, θ̄ and time terms added on the way.
    #[allow(clippy::too_many_arguments)]
    fn pull_back(
        &self,
        step: Step,
        adj: &[Tensor],
        linear: &[Option<Linear<'_>>],
        mut scaler: Scaler,
        theta: &mut Accumulator,
        time_terms: &mut Vec<TimeTerm>,
        stats: &mut Stats,
    ) -> Result<(Vec<Option<Pulled>>, Scaler)> {
        let mut ws: Vec<Option<Pulled>> = linear.iter().map(|_| None).collect();
        for i in (0..linear.len()).rev() {
            let Some(stage) = &linear[i] else { continue };
            let mut attempts = 0;
            let grads = loop {
                let v = self.cotangents(step, i, adj, &ws, scaler.scale(), |l| {
                    self.scheme.roles[l].compute
                })?;
                let scale = scaler.scale();
                stats.vjps += 1;
                stats.used_scale(scale);
                attempts += 1;
                let grads = self
                    .pull(stage, &v)
                    .map_err(|e| located(e, step, i, stage.t))?;
                let outcome = match scaler.is_dynamic() {
                    true => grads.outcome()?,
                    false => Outcome::Clean,
                };
                if outcome == Outcome::Clean {
                    break grads;
                }
                scaler = scaler.after(outcome);
                stats.retries += 1;
                if scaler.is_exhausted(attempts) {
                    return Err(Error::ScaleExhausted {
                        step: step.index,
                        t: step.t,
                        scale,
                        attempts,
                    });
                }
            };
            let unscale = 1.0 / scaler.scale();
            for (p, grad) in grads.theta.iter().enumerate() {
                if let Some(grad) = grad {
                    theta.add(p, step.h * unscale, grad)?;
                }
            }
            if self.differentiate_time {
                let v =
                    self.cotangents(step, i, adj, &ws, 1.0, |l| self.scheme.roles[l].state())?;
                self.time_terms(
                    step,
                    self.scheme.tableau.c()[i],
                    &v,
                    &stage.k,
                    grads.t,
                    unscale,
                    time_terms,
                )?;
            }
            ws[i] = Some((grads.y, unscale));
        }
        Ok((ws, scaler.after_step()))
    }

    /// Q(S·v_i), v_i = b_i λ + h Σ_{j>i} a_ji w_j.
    fn cotangents(
        &self,
        step: Step,
        i: usize,
        adj: &[Tensor],
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
            let first = (b != 0.0).then_some((b, adj));
            let terms: Vec<_> = first.into_iter().chain(later).collect();
            ops::combine(&terms, scale, rounding(leaf))
        };
        adj.iter().enumerate().map(of_leaf).collect()
    }

    /// One pull-back; the cotangent of the state is rounded as the seed was.
    fn pull(&self, stage: &Linear<'_>, v: &Vec<Tensor>) -> Result<Grads> {
        let mut pulled = (stage.pull)(v)?;
        self.scheme.check(v, &pulled.y)?;
        let round = |(w, roles): (&Tensor, &Roles)| roles.compute.round(w);
        let y = pulled.y.iter().zip(&self.scheme.roles).map(round);
        let params = self.theta.iter().map(|p| pulled.params.remove(p));
        let params = params.map(|g| g.map(|g| g.detach())).collect();
        Ok(Grads {
            y: y.collect::<Result<_>>()?,
            theta: params,
            t: pulled.t.map(|t| t.detach()),
        })
    }

    /// λ + h Σ w_i + ȳ.
    fn update(
        &self,
        step: Step,
        adj: &[Tensor],
        ws: &[Option<Pulled>],
        incoming: Option<&[Tensor]>,
    ) -> Result<Vec<Tensor>> {
        let of_leaf = |(leaf, adj): (usize, &Tensor)| {
            let ws = ws.iter().flatten();
            let ws = ws.map(|(w, unscale)| (step.h * unscale, &w[leaf]));
            let incoming = incoming.map(|y| (1.0, &y[leaf]));
            let terms: Vec<_> = std::iter::once((1.0, adj))
                .chain(ws)
                .chain(incoming)
                .collect();
            ops::combine(&terms, 1.0, self.scheme.roles[leaf].state())
        };
        adj.iter().enumerate().map(of_leaf).collect()
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
        terms: &mut Vec<TimeTerm>,
    ) -> Result<()> {
        for (v, k) in v.iter().zip(k) {
            terms.push(TimeTerm::new(step, ops::dot(v, k)?, -1.0, 1.0)?);
        }
        if let Some(dt) = through_f {
            let h = step.h * unscale;
            terms.push(TimeTerm::new(step, dt, (1.0 - c) * h, c * h)?);
        }
        Ok(())
    }

    /// Reads all time terms in one transfer and adds them up by output time.
    fn times(&self, terms: &[TimeTerm]) -> Result<Vec<f64>> {
        if !self.differentiate_time {
            return Ok(vec![]);
        }
        let mut times = vec![0.0; self.plan.outputs()];
        if terms.is_empty() {
            return Ok(times);
        }
        let values: Vec<_> = terms.iter().map(|t| &t.value).collect();
        let values = Tensor::stack(&values, 0)?.to_vec1::<f64>()?;
        for (term, value) in terms.iter().zip(values) {
            times[term.interval] += term.start * value;
            times[term.interval + 1] += term.end * value;
        }
        Ok(times)
    }
}

fn gradient(step: Step) -> Error {
    Error::NonFiniteGradient {
        step: step.index,
        t: step.t,
    }
}

/// A scalar on the device that belongs, with weights, to the two output times around a step.
struct TimeTerm {
    value: Tensor,
    interval: usize,
    start: f64,
    end: f64,
}

impl TimeTerm {
    /// Weights at the ends of the step, passed on to the ends of its interval: a step end that is
    /// no output time depends linearly on both.
    fn new(step: Step, value: Tensor, at_start: f64, at_end: f64) -> Result<Self> {
        let (s0, s1) = step.span;
        Ok(Self {
            value: value.to_dtype(DType::F64)?,
            interval: step.interval,
            start: at_start * (1.0 - s0) + at_end * (1.0 - s1),
            end: at_start * s0 + at_end * s1,
        })
    }
}

/// What one pull-back gave, still multiplied by S.
struct Grads {
    y: Vec<Tensor>,
    theta: Vec<Option<Tensor>>,
    t: Option<Tensor>,
}

impl Grads {
    fn outcome(&self) -> Result<Outcome> {
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
