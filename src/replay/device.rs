//! Steps forward as a CUDA graph.
//!
//! The first step (or two, of one evaluation each) is launched operation by operation, but already from and
//! to the memory that the graph will use and with h and t read from there: what it needs is then on the
//! device.  The next is captured and launched, the others are launched.  Only what is kept is copied out.

use std::sync::Arc;

use candle_core::{Tensor, TensorId};

use crate::error::Result;
use crate::field::Field;
use crate::ops::cuda::{capture, keep_uploads, obstacle, Captured, Graph};
use crate::schedule::Step;
use crate::stats::{NotReplayed, Stats};
use crate::step::{Fixture, Scheme, Taken};
use crate::watch::Watch;

/// Fewest steps of a solve that are replayed: one is taken to learn, one to capture.
const LEAST: usize = 4;

/// Evaluations after which all that a field uses is on the device: the first is traced, later ones need not.
const SEEN: usize = 2;

/// Why a solve of so many steps is not replayed, whatever its field is.
pub(crate) fn refusal(scheme: &Scheme, steps: usize) -> Option<NotReplayed> {
    if steps < LEAST {
        let least = LEAST;
        return Some(NotReplayed::FewSteps { steps, least });
    }
    obstacle(&scheme.device)
}

/// x ← value, in x's own memory.
pub(crate) fn overwrite(x: &Tensor, value: &Tensor) -> Result<()> {
    Ok(x.flatten_all()?
        .slice_set(&value.contiguous()?.flatten_all()?, 0, 0)?)
}

/// An evaluation to be made: the field, and where.
pub(super) struct StepAt<'a> {
    pub(super) field: &'a Field<'a>,
    pub(super) step: Step,
    pub(super) y: &'a [Tensor],
}

/// How far a pass has come.
pub(super) enum StepReplay {
    /// Every step is launched operation by operation.
    Off,
    /// The next step is the first.
    Asked(usize),
    /// The next step is captured.
    Warm(Box<ReplayedSteps>),
    Ready(Box<ReplayedSteps>, Graph),
}

impl StepReplay {
    pub(super) fn new(scheme: &Scheme, graphs: bool, steps: usize) -> Self {
        match graphs && scheme.device.is_cuda() {
            true => Self::Asked(steps),
            false => Self::Off,
        }
    }

    /// The step as a graph, or as one that becomes one; `None` if it is to be launched otherwise.
    pub(super) fn advance(
        &mut self,
        scheme: &Scheme,
        copies: bool,
        at: &StepAt<'_>,
        kept: bool,
        watch: &mut Watch,
        stats: &mut Stats,
    ) -> Result<Option<Taken>> {
        let (mut steps, graph) = match std::mem::replace(self, Self::Off) {
            Self::Off => return Ok(None),
            Self::Asked(count) => match ReplayedSteps::begin(scheme, copies, count, at.y) {
                Ok(mut steps) => {
                    steps.warm_up(at, watch)?;
                    let next = steps.next(kept)?;
                    match steps.fixture.value_was_read() {
                        true => stats.not_replayed = Some(NotReplayed::TimeValue),
                        false => *self = Self::Warm(Box::new(steps)),
                    }
                    return Ok(Some(next));
                }
                Err(reason) => {
                    stats.not_replayed = Some(reason);
                    return Ok(None);
                }
            },
            Self::Warm(mut steps) if steps.evaluations < SEEN => {
                steps.warm_up(at, watch)?;
                let next = steps.next(kept)?;
                *self = Self::Warm(steps);
                return Ok(Some(next));
            }
            Self::Warm(mut steps) => match steps.capture(at, watch)? {
                Captured::Graph(graph) => (steps, graph),
                Captured::Refused(reason) => {
                    stats.not_replayed = Some(reason);
                    return Ok(None);
                }
            },
            Self::Ready(steps, graph) => (steps, graph),
        };
        steps.show(at, watch)?;
        graph.launch()?;
        steps.looked(at, watch)?;
        stats.replayed += 1;
        let next = steps.next(kept)?;
        *self = Self::Ready(steps, graph);
        Ok(Some(next))
    }
}

/// Steps that begin and end in the same memory.
pub(super) struct ReplayedSteps {
    scheme: Scheme,
    fixture: Arc<Fixture>,
    /// y_n, then y_{n+1}.
    y: Vec<Tensor>,
    /// The tensors outside that have the same values.
    like: Vec<TensorId>,
    /// ŷ_{n+1} where it is not the same; empty until the first step has been taken.
    stored: Vec<Option<Tensor>>,
    copies: bool,
    /// So far, operation by operation.
    evaluations: usize,
}

impl ReplayedSteps {
    fn begin(
        scheme: &Scheme,
        copies: bool,
        count: usize,
        y: &[Tensor],
    ) -> std::result::Result<Self, NotReplayed> {
        if let Some(reason) = refusal(scheme, count) {
            return Err(reason);
        }
        let ready = || -> Result<Self> {
            let fixture = Arc::new(Fixture::new(scheme)?);
            let own = y.iter().map(Tensor::force_contiguous);
            Ok(Self {
                scheme: scheme.replayed(&fixture),
                fixture,
                y: own.collect::<candle_core::Result<_>>()?,
                like: y.iter().map(Tensor::id).collect(),
                stored: vec![],
                copies,
                evaluations: 0,
            })
        };
        ready().map_err(|error| NotReplayed::Capture(error.to_string()))
    }

    /// Puts y_n in place and sets the clock.
    fn show(&self, at: &StepAt<'_>, watch: &mut Watch) -> Result<()> {
        for ((own, like), y) in self.y.iter().zip(&self.like).zip(at.y) {
            if y.id() != *like && y.id() != own.id() {
                overwrite(own, y)?;
            }
        }
        let look = watch.taken(&self.y[0])?;
        self.fixture.show(&self.scheme, at.step, look)
    }

    /// The step itself.
    fn run(&mut self, at: &StepAt<'_>, watch: &mut Watch) -> Result<()> {
        let Self { scheme, y, .. } = &*self;
        let (taken, looks) = watch.in_replay(&y[0], &self.fixture.clock, |watch| {
            scheme.advance_and_store(at.field, at.step, y, self.copies, watch)
        })?;
        debug_assert_eq!(looks, self.scheme.meanings(at.step).len());
        let Taken {
            y: next, stored, ..
        } = taken;
        if let Some(stored) = stored {
            if self.stored.is_empty() {
                let slot = |(stored, next): (&Tensor, &Tensor)| {
                    let differs = stored.id() != next.id();
                    differs.then(|| stored.force_contiguous()).transpose()
                };
                let slots = stored.iter().zip(&next).map(slot);
                self.stored = slots.collect::<candle_core::Result<_>>()?;
            }
            for (slot, stored) in self.stored.iter().zip(&stored) {
                if let Some(slot) = slot {
                    overwrite(slot, stored)?;
                }
            }
        }
        // Last: a velocity may be the state itself.
        let mut ends = self.y.iter().zip(&next);
        ends.try_for_each(|(y, next)| overwrite(y, next))
    }

    /// A step operation by operation, which brings to the device what the others need.
    fn warm_up(&mut self, at: &StepAt<'_>, watch: &mut Watch) -> Result<()> {
        self.show(at, watch)?;
        {
            let _uploads = keep_uploads(&self.scheme.device)?;
            self.run(at, watch)?;
        }
        self.evaluations += self.scheme.evaluations();
        self.looked(at, watch)
    }

    fn capture(&mut self, at: &StepAt<'_>, watch: &mut Watch) -> Result<Captured> {
        let device = self.scheme.device.clone();
        let captured = capture(&device, || self.run(at, watch))?;
        Ok(match self.fixture.value_was_read() {
            true => Captured::Refused(NotReplayed::TimeValue),
            false => captured,
        })
    }

    /// The step has looked for NaN.
    fn looked(&self, at: &StepAt<'_>, watch: &mut Watch) -> Result<()> {
        watch.replayed(&self.y[0], self.scheme.meanings(at.step))
    }

    /// y_{n+1}, with memory of its own if it is kept, and ŷ_{n+1} if copies are wanted.
    fn next(&mut self, kept: bool) -> Result<Taken> {
        let y: Vec<Tensor> = match kept {
            true => self
                .y
                .iter()
                .map(Tensor::force_contiguous)
                .collect::<candle_core::Result<_>>()?,
            false => self.y.clone(),
        };
        self.like = y.iter().map(Tensor::id).collect();
        let ks = vec![];
        if !self.copies {
            let stored = None;
            return Ok(Taken { y, stored, ks });
        }
        let copy = |(slot, y): (&Option<Tensor>, &Tensor)| match slot {
            Some(slot) => slot.force_contiguous(),
            None if kept => Ok(y.clone()),
            None => y.force_contiguous(),
        };
        let stored = self.stored.iter().zip(&y).map(copy);
        let stored = Some(stored.collect::<candle_core::Result<_>>()?);
        Ok(Taken { y, stored, ks })
    }
}
