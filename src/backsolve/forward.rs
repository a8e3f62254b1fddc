//! y(t) inside the forward steps, for a backward pass that visits them from the last to the first.
//!
//! The states at the starts of steps come from what the forward pass has kept, by its checkpoints; the stages of a step
//! are computed again when the backward solve comes to it, and dropped when it has passed.

use std::collections::VecDeque;

use candle_core::Tensor;

use crate::error::{Error, Result};
use crate::field::Field;
use crate::precision::Roles;
use crate::problem::Problem;
use crate::schedule::{Schedule, Step};
use crate::stats::Stats;
use crate::step::{Increments, Scheme};
use crate::trajectory::{Rewind, Trajectory};
use crate::watch::Watch;

/// The forward steps that the backward solve is in, and those before them.
pub(super) struct ForwardStates<'a> {
    field: &'a Field<'a>,
    /// What took the steps, with an interpolant.
    scheme: Scheme,
    schedule: &'a Schedule,
    trajectory: &'a Trajectory,
    /// From the first step that is read.
    rewind: Option<Rewind<'a, Vec<Tensor>, Vec<Roles>>>,
    /// Where the solve is: steps that begin there or behind are not read any more.
    here: f64,
    /// In the order of the backward pass.
    loaded: VecDeque<Loaded>,
    /// Steps that have not been loaded yet.
    left: usize,
    pub(super) stats: Stats,
}

/// A step with its stages.
struct Loaded {
    step: Step,
    y: Vec<Tensor>,
    ks: Increments,
}

impl<'a> ForwardStates<'a> {
    pub(super) fn new(
        problem: &'a Problem,
        field: &'a Field<'a>,
        trajectory: &'a Trajectory,
        schedule: &'a Schedule,
    ) -> Self {
        let Scheme {
            tableau,
            roles,
            device,
            ..
        } = &problem.scheme;
        Self {
            field,
            scheme: Scheme::new(tableau, true, roles.clone(), device.clone()),
            schedule,
            trajectory,
            rewind: None,
            here: problem.grid.points()[problem.grid.points().len() - 1],
            loaded: VecDeque::new(),
            left: schedule.len(),
            stats: Stats::default(),
        }
    }

    /// y(t), in state precision.
    pub(super) fn at(&mut self, t: f64) -> Result<Vec<Tensor>> {
        let starts_behind = |step: &Step| (step.t - t) * step.h.signum() > 0.0;
        while self.left > 0 && self.loaded.back().is_none_or(|l| starts_behind(&l.step)) {
            self.load()?;
        }
        let inside = self.loaded.iter().rev().find(|l| {
            let beyond = (t - l.step.end) * l.step.h.signum() > 0.0;
            !beyond
        });
        let Loaded { step, y, ks } = inside
            .or_else(|| self.loaded.front())
            .ok_or(Error::NothingKept)?;
        let x = ((t - step.t) / step.h).clamp(0.0, 1.0);
        match x {
            0.0 => Ok(y.clone()),
            _ => self.scheme.interpolated((step, x), y, ks),
        }
    }

    /// The solve is at t: drops the steps that begin there or behind it.
    pub(super) fn release(&mut self, t: f64) {
        self.here = t;
        while self.loaded.front().is_some_and(|l| is_passed(&l.step, t)) {
            self.loaded.pop_front();
        }
    }

    /// How many of the first steps are still read.
    fn read(&self) -> usize {
        let (mut read, mut passed) = (0, self.left);
        while read < passed {
            let middle = read + (passed - read) / 2;
            match is_passed(&self.schedule.step(middle), self.here) {
                true => passed = middle,
                false => read = middle + 1,
            }
        }
        read
    }

    /// The step before the first that is loaded, if it is still read.
    fn load(&mut self) -> Result<()> {
        if self.rewind.is_none() {
            // Behind this step nothing is computed again, neither states nor stages.
            self.left = self.read().max(1);
            self.rewind = Some(self.trajectory.rewind_from(self.left - 1));
        }
        let Some(rewind) = &mut self.rewind else {
            return Err(Error::NothingKept);
        };
        let n = self.left - 1;
        let (mut watch, mut replayed, mut kept) = (Watch::default(), 0, Stats::default());
        let (scheme, schedule, field) = (&self.scheme, self.schedule, self.field);
        let mut advance = |m: usize, y: &Vec<Tensor>| {
            let step = schedule.step(m);
            replayed += scheme.evaluations();
            Ok(scheme
                .advance_and_store(field, step, y, false, &mut watch)?
                .y)
        };
        let y = rewind.state(n, &mut advance, &mut kept)?;
        self.left = n;
        if is_passed(&schedule.step(n), self.here) {
            self.stats.recomputed += replayed;
            self.stats.kept(kept.states_kept, kept.bytes_kept);
            return watch.finish();
        }
        let step = Step {
            dense: true,
            ..schedule.step(n)
        };
        let mut ks = vec![];
        let wanted = scheme.active(&step);
        scheme.evaluate(field, step, &y, &mut ks, wanted, |_, _| Ok(()))?;
        replayed += ks.iter().flatten().count();
        watch.finish()?;
        self.stats.recomputed += replayed;
        self.stats.kept(kept.states_kept, kept.bytes_kept);
        self.loaded.push_back(Loaded { step, y, ks });
        Ok(())
    }
}

/// Whether a step begins at t or behind it.
fn is_passed(step: &Step, t: f64) -> bool {
    (step.t - t) * step.h.signum() >= 0.0
}
