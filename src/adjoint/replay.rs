//! Steps back as CUDA graphs: one for steps at whose start the loss looks, one for the others.
//!
//! As steps forward: the first is launched operation by operation from the memory that the graphs will
//! use.  λ, θ̄ and the scaler stay where they are; blocks of θ̄ are added up between steps.

use std::sync::Arc;

use candle_core::Tensor;

use super::device::Back;
use super::Sweep;
use crate::accumulator::Accumulator;
use crate::error::Result;
use crate::ops::cuda::{capture, keep_uploads, Captured, Graph, SweepState};
use crate::replay::{overwrite, refusal};
use crate::stats::{NotReplayed, Stats};
use crate::step::{Fixture, Scheme};

/// How far a pass has come.
pub(super) enum SweepReplay {
    /// Every step is launched operation by operation.
    Off,
    /// The next step, of so many, is the first.
    Asked(usize),
    On(Box<SweepSteps>),
}

impl SweepReplay {
    /// For a pass of so many steps.
    pub(super) fn new(graphs: bool, steps: usize) -> Self {
        match graphs {
            true => Self::Asked(steps),
            false => Self::Off,
        }
    }

    /// As [`Sweep::step_back`]; false if nothing was done.
    pub(super) fn step_back(
        &mut self,
        sweep: &Sweep<'_>,
        back: &Back<'_>,
        adj: &[Tensor],
        state: &SweepState,
        theta: &mut Accumulator,
        stats: &mut Stats,
    ) -> Result<bool> {
        let (mut steps, is_first) = match std::mem::replace(self, Self::Off) {
            Self::Off => return Ok(false),
            Self::On(steps) => (steps, false),
            Self::Asked(count) => {
                match SweepSteps::begin(sweep.scheme, count, back.y, adj, theta) {
                    Ok(steps) => (Box::new(steps), true),
                    Err(reason) => {
                        stats.not_replayed = Some(reason);
                        return Ok(false);
                    }
                }
            }
        };
        let at = SweepAt {
            sweep,
            back,
            adj,
            state,
        };
        let refusal = match is_first {
            true => {
                steps.warm_up(&at, theta, stats)?;
                None
            }
            false => steps.replay(&at, theta, stats)?,
        };
        let read = steps.fixture.value_was_read();
        let reason = refusal.clone().or(read.then_some(NotReplayed::TimeValue));
        match reason {
            Some(reason) => stats.not_replayed = Some(reason),
            None => *self = Self::On(steps),
        }
        Ok(refusal.is_none())
    }
}

/// A step back: of which sweep, from where, and what it changes in place.
struct SweepAt<'a> {
    sweep: &'a Sweep<'a>,
    back: &'a Back<'a>,
    adj: &'a [Tensor],
    state: &'a SweepState,
}

/// Steps that read from the same memory.
pub(super) struct SweepSteps {
    scheme: Scheme,
    fixture: Arc<Fixture>,
    /// ŷ_n.
    y: Vec<Tensor>,
    /// ȳ_n, where the loss looks.
    incoming: Vec<Tensor>,
    /// Of steps without ȳ_n, and of those with it.
    graphs: [Option<Graph>; 2],
    /// What a step counts.
    counts: Stats,
    /// Terms that a step adds to each parameter's gradient.
    terms: Vec<usize>,
}

impl SweepSteps {
    fn begin(
        scheme: &Scheme,
        count: usize,
        y: &[Tensor],
        adj: &[Tensor],
        theta: &mut Accumulator,
    ) -> std::result::Result<Self, NotReplayed> {
        if let Some(reason) = refusal(scheme, count) {
            return Err(reason);
        }
        let mut ready = || -> Result<Self> {
            theta.open_all()?;
            let fixture = Arc::new(Fixture::new(scheme)?);
            let like = |xs: &[Tensor]| -> candle_core::Result<Vec<_>> {
                xs.iter().map(Tensor::force_contiguous).collect()
            };
            Ok(Self {
                scheme: scheme.replayed(&fixture),
                fixture,
                y: like(y)?,
                incoming: like(&adj[..scheme.roles.len()])?,
                graphs: [None, None],
                counts: Stats::default(),
                terms: vec![],
            })
        };
        ready().map_err(|error| NotReplayed::Capture(error.to_string()))
    }

    /// Puts ŷ_n and ȳ_n in place and sets the clock.
    fn show(&self, back: &Back<'_>) -> Result<()> {
        let incoming = self.incoming.iter().zip(back.incoming.unwrap_or_default());
        for (own, given) in self.y.iter().zip(back.y).chain(incoming) {
            overwrite(own, given)?;
        }
        self.fixture.show(&self.scheme, back.step, back.look as u32)
    }

    /// The step itself.
    fn run(&self, at: &SweepAt<'_>, theta: &mut Accumulator, stats: &mut Stats) -> Result<()> {
        let scheme = &self.scheme;
        let own = Back {
            y: &self.y,
            incoming: at.back.incoming.map(|_| self.incoming.as_slice()),
            // The clock says from where it counts.
            look: 0,
            ..*at.back
        };
        Sweep {
            scheme,
            ..*at.sweep
        }
        .step_back(&own, at.adj, at.state, theta, stats)
    }

    /// The first step, which brings to the device what the others need.
    fn warm_up(
        &mut self,
        at: &SweepAt<'_>,
        theta: &mut Accumulator,
        stats: &mut Stats,
    ) -> Result<()> {
        self.show(at.back)?;
        let _uploads = keep_uploads(&self.scheme.device)?;
        let (before, mut counts) = (theta.terms(), Stats::default());
        self.run(at, theta, &mut counts)?;
        let added = theta.terms().into_iter().zip(before);
        self.terms = added.map(|(after, before)| after - before).collect();
        stats.add(&counts);
        self.counts = counts;
        Ok(())
    }

    /// The step as a graph, captured if there is none yet; or why not, and nothing was done.
    fn replay(
        &mut self,
        at: &SweepAt<'_>,
        theta: &mut Accumulator,
        stats: &mut Stats,
    ) -> Result<Option<NotReplayed>> {
        let (kind, before) = (usize::from(at.back.incoming.is_some()), theta.terms());
        if self.graphs[kind].is_none() {
            let device = &self.scheme.device;
            let captured = capture(device, || self.run(at, theta, &mut Stats::default()));
            theta.set_terms(before.iter().copied());
            match captured? {
                Captured::Graph(_) if self.fixture.value_was_read() => {
                    return Ok(Some(NotReplayed::TimeValue))
                }
                Captured::Graph(graph) => self.graphs[kind] = Some(graph),
                Captured::Refused(reason) => return Ok(Some(reason)),
            }
        }
        self.show(at.back)?;
        if let Some(graph) = &self.graphs[kind] {
            graph.launch()?;
        }
        theta.set_terms(before.iter().zip(&self.terms).map(|(b, t)| b + t));
        stats.add(&self.counts);
        stats.replayed += 1;
        Ok(None)
    }
}
