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

#[cfg(feature = "cuda")]
mod device;
#[cfg(feature = "cuda")]
mod replay;

use candle_core::{DType, Tensor};

use crate::accumulator::Accumulator;
use crate::error::{Error, Result};
use crate::field::{pullback, Field};
use crate::ops;
use crate::precision::{Roles, Rounding};
use crate::scaler::{Outcome, Scaler};
#[cfg(feature = "cuda")]
use crate::stats::NotReplayed;
use crate::stats::Stats;
use crate::step::{located, Linear, Scheme};
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
#[derive(Clone, Copy)]
pub(crate) struct Sweep<'a> {
    pub(crate) scheme: &'a Scheme,
    pub(crate) plan: &'a StepPlan,
    pub(crate) trajectory: &'a Trajectory,
    pub(crate) field: &'a Field<'a>,
    /// The tensors that the field reads as parameters.
    pub(crate) theta: &'a [Tensor],
    pub(crate) scaler: Scaler,
    pub(crate) differentiate_time: bool,
    /// Whether steps may be replayed.
    #[cfg(feature = "cuda")]
    pub(crate) graphs: bool,
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
        if last.iter().all(|y| y.elem_count() == 0) {
            return self.nothing(&last);
        }
        #[cfg(feature = "cuda")]
        if self.scheme.device.is_cuda() && !self.differentiate_time {
            return self.run_on_device(last, earlier, watch, stats);
        }
        #[cfg(feature = "cuda")]
        if self.graphs && self.scheme.device.is_cuda() {
            stats.not_replayed = Some(NotReplayed::TimeGradients);
        }
        let steps = self.plan.len();
        let mut scaler = self.scaler;
        let mut theta = Accumulator::new(self.theta, self.scheme.roles[0].state)?;
        let mut times = TimeGradients::new(self.differentiate_time, self.plan.outputs());
        let mut rewind = self.trajectory.rewind();
        let mut adj = last;
        for n in (0..steps).rev() {
            let step = self.plan.step(n);
            let replay = |m, y: &Vec<Tensor>| self.replay(m, y, &mut watch, stats);
            let mut kept = Stats::default();
            let y = rewind.state(n, &mut { replay }, &mut kept)?;
            stats.kept(kept.states_kept, kept.bytes_kept);
            let linear = self
                .scheme
                .linearize(self.field, step, &y, self.differentiate_time)?;
            stats.recomputed += self.scheme.evaluations();
            if scaler.is_dynamic() {
                scaler = scaler.aimed(self.magnitude(&adj)?);
            }
            let ws;
            (ws, scaler) =
                self.pull_back(step, &adj, &linear, scaler, &mut theta, &mut times, stats)?;
            let incoming = match step.span.0 {
                0.0 => earlier(step.interval)?,
                _ => None,
            };
            adj = self.update(step, &adj, &ws, incoming.as_deref())?;
            watch.see(&adj, || gradient(step))?;
        }
        let theta = theta.finish()?;
        watch.see(&theta, || Error::NonFiniteParameterGradient)?;
        watch.finish()?;
        if steps == 0 {
            // λ_0 is what was given; the gradient is to be the caller's own.
            let own = adj.iter().map(Tensor::copy);
            adj = own.collect::<candle_core::Result<_>>()?;
        }
        Ok(Adjoint {
            y0: adj,
            theta,
            times: times.finish()?,
        })
    }

    /// The gradients of a state without an element, which nothing depends on.
    fn nothing(&self, last: &[Tensor]) -> Result<Adjoint> {
        let own = last.iter().map(Tensor::zeros_like);
        Ok(Adjoint {
            y0: own.collect::<candle_core::Result<_>>()?,
            theta: Accumulator::new(self.theta, self.scheme.roles[0].state)?.finish()?,
            times: TimeGradients::new(self.differentiate_time, self.plan.outputs()).finish()?,
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

    /// max|λ| over the leaves whose cotangents can overflow.  Over all if none can, or while it is
    /// zero: a leaf whose λ starts at zero gets it from the others', through the field.
    fn magnitude(&self, adj: &[Tensor]) -> Result<f64> {
        let max_over = |looked_at: fn(&Roles) -> bool| {
            let leaves = adj.iter().zip(&self.scheme.roles);
            let leaves = leaves.filter(|(_, roles)| looked_at(roles));
            leaves
                .map(|(adj, _)| ops::magnitude(adj))
                .try_fold(0.0, |max, m| Ok::<_, Error>(f64::max(max, m?)))
        };
        match max_over(Roles::needs_scaling)? {
            0.0 => max_over(|_| true),
            max => Ok(max),
        }
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
        times: &mut TimeGradients,
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
                if scaler.is_on() {
                    stats.used_scale_at(stage.t, scale);
                }
                attempts += 1;
                let grads = self.pull(step, i, stage, &v)?;
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
                    times,
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
            // A sum is formed in the widest dtype of its operands: with λ among them, in f64 where the
            // state is.
            let first = (b != 0.0 || adj.dtype() == DType::F64).then_some((b, adj));
            let terms: Vec<_> = first.into_iter().chain(later).collect();
            ops::combine(&terms, scale, rounding(leaf))
        };
        adj.iter().enumerate().map(of_leaf).collect()
    }

    /// One pull-back; the cotangent of the state is rounded as the seed was.
    fn pull(&self, step: Step, i: usize, stage: &Linear<'_>, v: &Vec<Tensor>) -> Result<Grads> {
        let mut pulled = (stage.pull)(v).map_err(|e| located(e.into(), step, i, stage.t))?;
        let invalid = |defect| Error::InvalidPullback {
            step: step.index,
            stage: i,
            t: stage.t,
            defect,
        };
        pullback::check(v, self.theta, &pulled).map_err(invalid)?;
        let round = |(w, roles): (&Tensor, &Roles)| roles.compute.round(w);
        let y = pulled.y.iter().zip(&self.scheme.roles).map(round);
        let params = self.theta.iter().map(|p| pulled.params.remove(p));
        let params = params.map(|g| g.map(|g| g.detach())).collect();
        pullback::check_rest(self.field, &pulled.params).map_err(invalid)?;
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

fn gradient(step: Step) -> Error {
    Error::NonFiniteGradient {
        step: step.index,
        t: step.t,
    }
}

/// Time terms on a device that are kept before they are read.
const BLOCK: usize = 1024;

/// t̄, added up on the host: at once where reading a scalar costs nothing, otherwise in blocks.
struct TimeGradients {
    times: Vec<f64>,
    pending: Vec<TimeTerm>,
}

impl TimeGradients {
    /// Zero at every output time, or nothing at all.
    fn new(wanted: bool, outputs: usize) -> Self {
        Self {
            times: vec![0.0; if wanted { outputs } else { 0 }],
            pending: vec![],
        }
    }

    fn add(&mut self, term: TimeTerm) -> Result<()> {
        if term.value.device().is_cpu() {
            let value = term.value.to_scalar()?;
            return self.sum(&term, value);
        }
        self.pending.push(term);
        match self.pending.len() {
            BLOCK.. => self.flush(),
            _ => Ok(()),
        }
    }

    /// Reads what is pending, in one transfer.
    fn flush(&mut self) -> Result<()> {
        let terms = std::mem::take(&mut self.pending);
        if terms.is_empty() {
            return Ok(());
        }
        let values: Vec<_> = terms.iter().map(|t| &t.value).collect();
        ops::note_host_read(values[0].device());
        let values = Tensor::stack(&values, 0)?.to_vec1()?;
        let mut terms = terms.iter().zip(values);
        terms.try_for_each(|(term, value)| self.sum(term, value))
    }

    fn sum(&mut self, term: &TimeTerm, value: f64) -> Result<()> {
        let interval = term.step.interval;
        for (i, weight) in [(interval, term.start), (interval + 1, term.end)] {
            self.times[i] += weight * value;
            if !self.times[i].is_finite() {
                return Err(gradient(term.step));
            }
        }
        Ok(())
    }

    fn finish(mut self) -> Result<Vec<f64>> {
        self.flush()?;
        Ok(self.times)
    }
}

/// A scalar on the device that belongs, with weights, to the two output times around a step.
struct TimeTerm {
    value: Tensor,
    step: Step,
    start: f64,
    end: f64,
}

impl TimeTerm {
    /// Weights at the ends of the step, passed on to the ends of its interval: a step end that is
    /// no output time depends linearly on both.
    fn new(step: Step, value: Tensor, at_start: f64, at_end: f64) -> Result<Self> {
        let (s0, s1) = step.span;
        Ok(Self {
            value: value.reshape(())?.to_dtype(DType::F64)?,
            step,
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

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    #[test]
    fn time_terms_that_wait_are_summed_in_blocks_to_the_same_numbers() {
        let step = |interval| Step {
            index: interval,
            t: 0.0,
            h: 1.0,
            end: 1.0,
            interval,
            span: (0.0, 1.0),
        };
        let (mut at_once, mut waiting) = (TimeGradients::new(true, 3), TimeGradients::new(true, 3));
        for n in 0..2 * BLOCK + 3 {
            let term = || {
                let value = Tensor::new(n as f64, &Device::Cpu).unwrap();
                TimeTerm::new(step(n % 2), value, -1.0, 0.5).unwrap()
            };
            at_once.add(term()).unwrap();
            waiting.pending.push(term());
            if waiting.pending.len() == BLOCK {
                waiting.flush().unwrap();
            }
        }
        assert!(at_once.pending.is_empty() && waiting.pending.len() == 3);
        assert_eq!(at_once.finish().unwrap(), waiting.finish().unwrap());
        assert!(TimeGradients::new(false, 3).finish().unwrap().is_empty());
    }
}
