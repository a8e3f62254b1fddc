//! What the backward solves of continuous adjoints did.

/// Counts of the backward solves of continuous adjoints, added over solves.
#[derive(Clone, Debug, Default, PartialEq)]
#[non_exhaustive]
pub struct BackwardStats {
    /// Steps; of adaptive ones those that were accepted.
    pub steps: usize,
    /// Attempts of adaptive steps that were rejected.
    pub rejected: usize,
    /// Adaptive steps that were accepted although their error was larger than the tolerance, since they could not be
    /// shorter ([`Adaptive::min_step`](crate::options::Adaptive::min_step)).
    pub forced: usize,
    /// Adaptive steps that were accepted only because of the noise floor
    /// ([`Adaptive::noise_floor`](crate::options::Adaptive::noise_floor)).
    pub limited: usize,
    /// The largest error of an accepted adaptive step, relative to the tolerance without a noise floor.
    pub tolerance_factor: f64,
    /// Evaluations of the equation that is solved backward, each one evaluation of the field with one pull-back
    /// (the NFE of a backward pass).  Those of rejected attempts and for the first step are among them; stages of
    /// forward steps that are computed again, and points of a Gauss rule, are not.
    pub evaluations: usize,
    /// Points at which parameter gradients were evaluated for a Gauss rule.
    pub points: usize,
    /// How far a y that a [`Backsolve`](crate::options::Gradient::Backsolve) solved backward was from the states of the
    /// forward pass, where it starts anew from them and at the first time: the largest difference of a number, relative
    /// to the largest number of that state.  λ was solved along this y.  If the drift is far above the tolerance, or
    /// above the error of fixed steps, the gradient is wrong.  Zero for the other kinds, which do not solve y again.
    pub drift: f64,
    /// Every attempt in its order, from the last time to the first.  Filled only by a
    /// [`Recorder::tracing`](crate::metrics::Recorder::tracing).
    pub attempts: Vec<BackwardAttempt>,
}

/// An attempt of a backward step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct BackwardAttempt {
    /// The time that it begins at.
    pub from: f64,
    /// The time that it would end at.
    pub to: f64,
    /// Whether it was accepted.
    pub accepted: bool,
}

impl BackwardStats {
    /// Adds counts; the attempts are the recorder's to keep.
    pub(crate) fn add(&mut self, other: &Self) {
        self.steps += other.steps;
        self.rejected += other.rejected;
        self.evaluations += other.evaluations;
        self.points += other.points;
        self.forced += other.forced;
        self.limited += other.limited;
        self.tolerance_factor = self.tolerance_factor.max(other.tolerance_factor);
        self.drift = self.drift.max(other.drift);
    }

    /// Counts an attempt, and keeps it if it is wanted.
    pub(crate) fn note(&mut self, [from, to]: [f64; 2], accepted: bool, keeps: bool) {
        match accepted {
            true => self.steps += 1,
            false => self.rejected += 1,
        }
        if keeps {
            self.attempts.push(BackwardAttempt { from, to, accepted });
        }
    }
}
