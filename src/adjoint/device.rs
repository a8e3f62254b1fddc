//! The sweep on a GPU: optimistic, so that it need not wait for the host.
//!
//! S is chosen on the device from max|λ|, which the update of λ leaves there.  Where a pull-back
//! overflows, neither λ nor θ̄ is touched in that step and in those after it; the host finds out once,
//! at the end, and goes on from that step with a smaller S.  A clean sweep is read once.

use candle_core::{DType, Tensor};

use super::outputs::Dense;
use super::replay::SweepReplay;
use super::runge_kutta::Grads;
use super::{gradient, Method, Sweep};
use crate::accumulator::Accumulator;
use crate::error::{Error, Result};
use crate::ops;
use crate::ops::cuda::{Finding, Stop, SweepState};
use crate::precision::Roles;
use crate::replay::StepSequence;
use crate::reverse::Adjoint;
use crate::scaler::{Outcome, Scaler};
use crate::schedule::Step;
use crate::stats::{NotReplayed, Stats};
use crate::step::{LinearStage, Scheme};
use crate::watch::Watch;

/// Where a sweep begins, and with what.
struct Start {
    /// Steps still to be taken back.
    steps: usize,
    scaler: Scaler,
}

/// What a sweep takes from step to step.
pub(super) struct Way<'a> {
    /// λ, updated in place with what else the sweep carries of it: the cotangent is the caller's.
    pub(super) adj: Vec<Tensor>,
    pub(super) state: SweepState,
    pub(super) theta: Accumulator,
    /// Steps forward, between checkpoints.
    stepper: StepSequence<'a>,
    replay: SweepReplay,
}

/// One step back.
pub(super) struct Back<'a> {
    pub(super) step: Step,
    /// ŷ_n.
    pub(super) y: &'a [Tensor],
    /// ȳ_n, where the state there is returned, and of outputs inside the step.
    pub(super) incoming: Option<&'a [Tensor]>,
    pub(super) dense: &'a Dense,
    /// Number of the look at λ.
    pub(super) look: usize,
}

impl Sweep<'_> {
    /// As [`Sweep::run`], without time gradients.
    pub(super) fn run_on_device(
        &self,
        last: Vec<Tensor>,
        mut watch: Watch,
        stats: &mut Stats,
    ) -> Result<Adjoint> {
        let adj = last.iter().map(Tensor::force_contiguous);
        let adj = adj.collect::<candle_core::Result<Vec<_>>>()?;
        let sweep_state = SweepState::new(self.scaler, &adj, &self.can_overflow())?;
        let adj = self.scheme.cotangents_at_end(adj)?;
        let steps = self.schedule.len();
        let mut way = Way {
            state: sweep_state,
            theta: self.accumulator()?,
            stepper: StepSequence::new(self.scheme, false, self.graphs, self.linear_from()),
            replay: SweepReplay::new(self.graphs, self.linear_from()),
            adj,
        };
        let mut start = Start {
            steps,
            scaler: self.scaler,
        };
        let mut attempts = (usize::MAX, 0);
        loop {
            let found = self.descend(&start, &mut way, &mut watch, stats)?;
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
                return Err(gradient(self.schedule.step(start.steps - 1 - index)));
            }
            let Some(stop) = found.stop else { break };
            attempts = match attempts {
                (step, count) if step == stop.step => (step, count + 1),
                _ => (stop.step, 1),
            };
            start = self.resume(stop, attempts.1, stats)?;
            way.state.resume(start.scaler)?;
        }
        Ok(Adjoint {
            y0: self.scheme.cotangents_at_start(way.adj)?,
            theta: way.theta.finish()?,
            times: vec![],
        })
    }

    /// Leaves whose cotangents can.
    fn can_overflow(&self) -> Vec<bool> {
        self.scheme.roles.iter().map(Roles::needs_scaling).collect()
    }

    /// Where to go on after an overflow.
    fn resume(&self, stop: Stop, attempts: usize, stats: &mut Stats) -> Result<Start> {
        let scaler = stop.scaler.after(stop.outcome);
        stats.retries += 1;
        if scaler.is_exhausted(attempts) {
            let step = self.schedule.step(stop.step);
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
        })
    }

    /// Takes steps back until the first, or until nothing changes any more.
    fn descend(
        &self,
        start: &Start,
        way: &mut Way<'_>,
        watch: &mut Watch,
        stats: &mut Stats,
    ) -> Result<Finding> {
        let mut rewind = None;
        for n in (0..start.steps).rev() {
            let step = self.schedule.step(n);
            let stepper = &mut way.stepper;
            let replay = |m, y: &Vec<Tensor>| {
                let step = self.schedule.step(m);
                stats.recomputed += self.scheme.evaluations_of(&step);
                Ok(stepper.advance(self.field, step, y, true, watch, stats)?.y)
            };
            let mut held = Stats::default();
            let y = self.state_at(n, &mut rewind, replay, &mut held)?;
            stats.kept(held.states_kept, held.bytes_kept);
            let dense = self.outputs.dense(&self.scheme.tableau, self.schedule, n)?;
            let incoming = self.outputs.at_node(self.schedule, n)?;
            let incoming = self.with_inside(incoming, &dense)?;
            let back = Back {
                step,
                y: &y,
                incoming: incoming.as_deref(),
                dense: &dense,
                look: start.steps - 1 - n,
            };
            let Way {
                adj,
                state,
                theta,
                replay,
                ..
            } = way;
            let is_replayed = match n < self.linear_from() {
                true => replay.step_back(self, &back, adj, state, theta, stats)?,
                false => {
                    if self.graphs {
                        stats.not_replayed = Some(NotReplayed::KeptEvaluations);
                    }
                    false
                }
            };
            if !is_replayed {
                self.step_back(&back, adj, state, theta, stats)?;
            }
            theta.end_step()?;
        }
        watch.see(way.theta.so_far()?, || Error::NonFiniteParameterGradient)?;
        watch.leave_to(&way.state)?;
        way.state.read(start.scaler)
    }

    /// All that is added to λ_n: ȳ_n, and the cotangents of outputs inside the step.
    fn with_inside(
        &self,
        at_node: Option<Vec<Tensor>>,
        dense: &Dense,
    ) -> Result<Option<Vec<Tensor>>> {
        let leaves = self.scheme.roles.iter().enumerate();
        let of_leaf = |(leaf, roles): (usize, &Roles)| {
            let own = at_node.iter().map(|y| (1.0, &y[leaf]));
            let terms: Vec<_> = own.chain(dense.of_state(leaf)).collect();
            ops::combine(&terms, 1.0, roles.state())
        };
        match dense.of_state(0).next() {
            None => Ok(at_node),
            Some(_) => leaves.map(of_leaf).collect::<Result<_>>().map(Some),
        }
    }

    /// λ_n from λ_{n+1}, in place, and what the step adds to θ̄.
    pub(super) fn step_back(
        &self,
        back: &Back<'_>,
        adj: &[Tensor],
        state: &SweepState,
        theta: &mut Accumulator,
        stats: &mut Stats,
    ) -> Result<()> {
        let (step, h, clock) = (
            back.step,
            self.scheme.pace(back.step.h),
            self.scheme.clock(),
        );
        if self.scaler.is_dynamic() {
            state.raise(back.dense.seeds(), &self.can_overflow())?;
        }
        if self.scaler.is_on() {
            state.aim()?;
        }
        let linear = self.linearize(step, back.y, stats)?;
        let (ws, waiting) = self.pull_stages(back, adj, &linear, state, theta, stats)?;
        let carried = adj;
        for (leaf, (adj, can_overflow)) in adj.iter().zip(self.can_overflow()).enumerate() {
            let ws: Vec<_> = ws.iter().flatten().map(|w| (h, &w[leaf])).collect();
            let incoming = back.incoming.map(|y| &y[leaf]);
            let of_leaf = (adj, self.scheme.lost(carried, leaf));
            state.update(of_leaf, &ws, incoming, back.look, can_overflow, clock)?;
        }
        for grads in &waiting {
            theta.add_all(h, grads, state, clock)?;
        }
        match self.scaler.is_dynamic() {
            true => state.settle(step.index, clock),
            false => Ok(()),
        }
    }

    /// w_i of every stage, still multiplied by S, and the parameter gradients that have to wait for
    /// the others, because one that overflows takes back the whole step.
    #[allow(clippy::type_complexity)]
    fn pull_stages(
        &self,
        back: &Back<'_>,
        adj: &[Tensor],
        linear: &[Option<LinearStage<'_>>],
        state: &SweepState,
        theta: &mut Accumulator,
        stats: &mut Stats,
    ) -> Result<(Vec<Option<Vec<Tensor>>>, Vec<Vec<Option<Tensor>>>)> {
        let (step, dynamic) = (back.step, self.scaler.is_dynamic());
        let mut ws: Vec<Option<Vec<Tensor>>> = linear.iter().map(|_| None).collect();
        let mut waiting = vec![];
        for i in (0..linear.len()).rev() {
            let Some(stage) = &linear[i] else { continue };
            let v = seeds(self.scheme, back, i, adj, &ws, state)?;
            stats.vjps += 1;
            let Grads {
                y, theta: grads, ..
            } = self.pull(step, (i, stage.t), &v, (self.field, &v), &stage.pull)?;
            if dynamic {
                let pulled = linear.len() - 1 - i;
                let full: Vec<_> = grads.iter().flatten().cloned().collect();
                state.look(pulled, Outcome::StateOverflow, &y)?;
                state.look(pulled, Outcome::ParameterOverflow, &full)?;
                waiting.push(grads);
            } else {
                let (h, clock) = (self.scheme.pace(step.h), self.scheme.clock());
                theta.add_all(h, &grads, state, clock)?;
            }
            ws[i] = Some(y);
        }
        Ok((ws, waiting))
    }
}

/// Q(S·v_i), v_i = b_i λ + h Σ_{j>i} a_ji w_j.
fn seeds(
    scheme: &Scheme,
    back: &Back<'_>,
    i: usize,
    adj: &[Tensor],
    ws: &[Option<Vec<Tensor>>],
    state: &SweepState,
) -> Result<Vec<Tensor>> {
    let (b, h, clock) = (
        scheme.tableau.b()[i],
        scheme.pace(back.step.h),
        scheme.clock(),
    );
    let of_leaf = |(leaf, adj): (usize, &Tensor)| {
        let later = ws.iter().enumerate().skip(i + 1).filter_map(|(j, w)| {
            let a = scheme.tableau.a(j)[i];
            Some((h * a, &w.as_ref()?[leaf])).filter(|_| a != 0.0)
        });
        // As on the CPU: with λ among the terms the sum is in f64 where the state is.
        let first = (b != 0.0 || adj.dtype() == DType::F64).then_some((b, adj));
        let dense = back.dense.terms(i, leaf);
        let mut terms: Vec<_> = first.into_iter().chain(dense).collect();
        if terms.is_empty() {
            terms.push((0.0, adj));
        }
        let scaled_from = terms.len();
        terms.extend(later);
        state.seed(&terms, scaled_from, scheme.roles[leaf].compute, clock)
    };
    let leaves = scheme.roles.len();
    adj[..leaves].iter().enumerate().map(of_leaf).collect()
}
