//! The sweep on a GPU: optimistic, so that it need not wait for the host.
//!
//! S is chosen on the device from max|λ|, which the update of λ leaves there.  Where a pull-back
//! overflows, neither λ nor θ̄ is touched in that step and in those after it; the host finds out once,
//! at the end, and goes on from that step with a smaller S.  A clean sweep is read once.

use candle_core::Tensor;

use super::{gradient, Adjoint, Grads, Sweep};
use crate::accumulator::Accumulator;
use crate::error::{Error, Result};
use crate::ops::cuda::{Finding, Stop, SweepState};
use crate::precision::Roles;
use crate::scaler::{Outcome, Scaler};
use crate::stats::Stats;
use crate::step::{Linear, Scheme};
use crate::time::Step;
use crate::watch::Watch;

/// Where a sweep begins, and with what.
struct Start {
    /// Steps still to be taken back.
    steps: usize,
    scaler: Scaler,
    /// Whether S is set for the first of them.
    resumed: bool,
}

impl Sweep<'_> {
    /// As [`Sweep::run`], without time gradients.
    pub(super) fn run_on_device(
        &self,
        last: Vec<Tensor>,
        earlier: impl Fn(usize) -> Result<Option<Vec<Tensor>>>,
        mut watch: Watch,
        stats: &mut Stats,
    ) -> Result<Adjoint> {
        // λ is updated in place, and the cotangent is the caller's.
        let adj = last.iter().map(Tensor::copy);
        let adj = adj.collect::<candle_core::Result<Vec<_>>>()?;
        let mut theta = Accumulator::new(self.theta, self.scheme.roles[0].state)?;
        let mut start = Start {
            steps: self.plan.len(),
            scaler: self.scaler,
            resumed: false,
        };
        let mut attempts = (usize::MAX, 0);
        loop {
            let found = self.descend(&start, &adj, &earlier, &mut theta, &mut watch, stats)?;
            if let Some((smallest, largest)) = found.scales.filter(|_| self.scaler.is_on()) {
                stats.used_scale(smallest);
                stats.used_scale(largest);
            }
            // The cotangent was looked at first, then λ after each step, from the last to the first.
            if let (Some(0), _) | (Some(_), None) = (found.watched, found.bad) {
                let error = found.watched.and_then(|look| watch.meaning(look));
                return Err(error.unwrap_or(Error::NonFiniteParameterGradient));
            }
            if let Some(index) = found.bad {
                return Err(gradient(self.plan.step(start.steps - 1 - index)));
            }
            let Some(stop) = found.stop else { break };
            attempts = match attempts {
                (step, count) if step == stop.step => (step, count + 1),
                _ => (stop.step, 1),
            };
            start = self.resume(stop, attempts.1, stats)?;
        }
        Ok(Adjoint {
            y0: adj,
            theta: theta.finish()?,
            times: vec![],
        })
    }

    /// Where to go on after an overflow.
    fn resume(&self, stop: Stop, attempts: usize, stats: &mut Stats) -> Result<Start> {
        let scaler = stop.scaler.after(stop.outcome);
        stats.retries += 1;
        if scaler.is_exhausted(attempts) {
            let step = self.plan.step(stop.step);
            return Err(Error::ScaleExhausted {
                step: step.index,
                t: step.t,
                scale: stop.scaler.scale(),
                attempts,
            });
        }
        Ok(Start {
            steps: stop.step + 1,
            scaler,
            resumed: true,
        })
    }

    /// Takes steps back until the first, or until nothing changes any more.
    fn descend(
        &self,
        start: &Start,
        adj: &[Tensor],
        earlier: &impl Fn(usize) -> Result<Option<Vec<Tensor>>>,
        theta: &mut Accumulator,
        watch: &mut Watch,
        stats: &mut Stats,
    ) -> Result<Finding> {
        let can_overflow: Vec<_> = self.scheme.roles.iter().map(Roles::needs_scaling).collect();
        let dynamic = start.scaler.is_dynamic();
        let state = SweepState::new(start.scaler, adj, &can_overflow, start.resumed)?;
        let mut rewind = self.trajectory.rewind_from(start.steps.saturating_sub(1));
        for n in (0..start.steps).rev() {
            let step = self.plan.step(n);
            let replay = |m, y: &Vec<Tensor>| self.replay(m, y, watch, stats);
            let mut kept = Stats::default();
            let y = rewind.state(n, replay, &mut kept)?;
            stats.kept(kept.states_kept, kept.bytes_kept);
            let is_set = start.resumed && n + 1 == start.steps;
            if self.scaler.is_on() && !is_set {
                state.aim()?;
            }
            let linear = self.scheme.linearize(self.field, step, &y, false)?;
            stats.recomputed += self.scheme.evaluations();
            let (ws, waiting) = self.pull_stages(step, adj, &linear, &state, theta, stats)?;
            let incoming = match step.span.0 {
                0.0 => earlier(step.interval)?,
                _ => None,
            };
            for (leaf, adj) in adj.iter().enumerate() {
                let ws: Vec<_> = ws.iter().flatten().map(|w| (step.h, &w[leaf])).collect();
                let incoming = incoming.as_ref().map(|y| &y[leaf]);
                let look = start.steps - 1 - n;
                state.update(adj, &ws, incoming, look, can_overflow[leaf])?;
            }
            for grads in &waiting {
                theta.add_all(step.h, grads, &state)?;
            }
            if dynamic {
                state.settle(n)?;
            }
        }
        watch.see(theta.so_far()?, || Error::NonFiniteParameterGradient)?;
        watch.leave_to(&state)?;
        state.read(start.scaler)
    }

    /// w_i of every stage, still multiplied by S, and the parameter gradients that have to wait for
    /// the others, because one that overflows takes back the whole step.
    #[allow(clippy::type_complexity)]
    fn pull_stages(
        &self,
        step: Step,
        adj: &[Tensor],
        linear: &[Option<Linear<'_>>],
        state: &SweepState,
        theta: &mut Accumulator,
        stats: &mut Stats,
    ) -> Result<(Vec<Option<Vec<Tensor>>>, Vec<Vec<Option<Tensor>>>)> {
        let dynamic = self.scaler.is_dynamic();
        let mut ws: Vec<Option<Vec<Tensor>>> = linear.iter().map(|_| None).collect();
        let mut waiting = vec![];
        for i in (0..linear.len()).rev() {
            let Some(stage) = &linear[i] else { continue };
            let v = seeds(self.scheme, step, i, adj, &ws, state)?;
            stats.vjps += 1;
            let Grads {
                y, theta: grads, ..
            } = self.pull(step, i, stage, &v)?;
            if dynamic {
                let pulled = linear.len() - 1 - i;
                let full: Vec<_> = grads.iter().flatten().cloned().collect();
                state.look(pulled, Outcome::StateOverflow, &y)?;
                state.look(pulled, Outcome::ParameterOverflow, &full)?;
                waiting.push(grads);
            } else {
                theta.add_all(step.h, &grads, state)?;
            }
            ws[i] = Some(y);
        }
        Ok((ws, waiting))
    }
}

/// Q(S·v_i), v_i = b_i λ + h Σ_{j>i} a_ji w_j.
fn seeds(
    scheme: &Scheme,
    step: Step,
    i: usize,
    adj: &[Tensor],
    ws: &[Option<Vec<Tensor>>],
    state: &SweepState,
) -> Result<Vec<Tensor>> {
    let b = scheme.tableau.b()[i];
    let of_leaf = |(leaf, adj): (usize, &Tensor)| {
        let later = ws.iter().enumerate().skip(i + 1).filter_map(|(j, w)| {
            let a = scheme.tableau.a(j)[i];
            Some((step.h * a, &w.as_ref()?[leaf])).filter(|_| a != 0.0)
        });
        let first = (b != 0.0).then_some((b, adj));
        let scaled_from = usize::from(first.is_some());
        let terms: Vec<_> = first.into_iter().chain(later).collect();
        state.seed(&terms, scaled_from, scheme.roles[leaf].compute)
    };
    adj.iter().enumerate().map(of_leaf).collect()
}
