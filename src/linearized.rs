//! Linearised steps: steps of the forward pass whose pull-backs are kept, so that the backward pass need not evaluate them
//! again.
//!
//! The backward pass linearises at ŷ_n, so steps are kept only where ŷ_n = y_n; then gradients have the same bits as those
//! of stages that are evaluated again.

use std::collections::VecDeque;

use crate::step::{KeptStep, LinearStage};

/// The last steps of a solve, as many as a number of bytes permits.
pub(crate) struct Linearized {
    /// Bytes that it may hold.
    budget: usize,
    /// Steps of the solve, and the first one that is kept.
    steps: usize,
    from: usize,
    kept: VecDeque<KeptStep>,
    bytes: usize,
    /// The most bytes that were held at once, and those of the first step.
    most: usize,
    first: usize,
}

impl Linearized {
    /// None yet, of so many bytes and of a solve of so many steps.
    pub(crate) fn new(budget: usize, steps: usize) -> Self {
        Self {
            budget,
            steps,
            from: 0,
            kept: VecDeque::new(),
            bytes: 0,
            most: 0,
            first: 0,
        }
    }

    /// Whether step n is to be linearised; n ascends from 0.
    pub(crate) fn wants(&self, n: usize) -> bool {
        self.budget > 0 && n == self.from + self.kept.len()
    }

    /// Keeps step n, which was wanted.  The first step tells how many fit, and is dropped if not all do; if later ones are
    /// larger, those before them are dropped.
    pub(crate) fn keep(&mut self, n: usize, step: KeptStep) {
        let bytes = bytes_of(&step);
        if n == 0 {
            let fit = (self.budget / bytes.max(1)).min(self.steps);
            (self.first, self.from) = (bytes, self.steps - fit);
        }
        if n < self.from {
            return;
        }
        self.kept.push_back(step);
        self.bytes = self.bytes.saturating_add(bytes);
        while self.bytes > self.budget {
            let dropped = self.kept.pop_front().map_or(0, |step| bytes_of(&step));
            self.bytes -= dropped.min(self.bytes);
            self.from += 1;
        }
        self.most = self.most.max(self.bytes);
    }

    /// Keeps nothing, now and later: the graphs of the field cannot be kept.
    pub(crate) fn close(&mut self) {
        *self = Self::new(0, self.steps);
        self.from = self.steps;
    }

    /// Bytes of all steps that are to be kept, if they are like the first one.
    pub(crate) fn expected(&self) -> u128 {
        self.first as u128 * (self.steps - self.from) as u128
    }

    /// The most bytes that were held at once.
    pub(crate) fn most(&self) -> usize {
        self.most
    }

    /// The first step that was kept; all behind it were.
    pub(crate) fn from(&self) -> usize {
        self.from
    }

    /// The stages of step n, if it was kept.
    pub(crate) fn step(&self, n: usize) -> Option<Vec<Option<LinearStage<'_>>>> {
        let step = self.kept.get(n.checked_sub(self.from)?)?;
        let linear = step.iter().map(|stage| Some(stage.as_ref()?.linear()));
        Some(linear.collect())
    }
}

fn bytes_of(step: &KeptStep) -> usize {
    step.iter().flatten().map(|stage| stage.bytes).sum()
}
