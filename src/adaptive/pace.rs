//! The pace of one solve, or of one row: where it is, and how long its next attempt is.

use super::{Control, Measured};
use crate::error::StopReason;
use crate::stats::Stats;

/// Attempts in a row whose error is not finite, after which a solve fails.
const MOST_NON_FINITE: usize = 10;

/// An error from which on it determines the length of the next step: with a smaller one, the next step may be one and a
/// half times as long.
const CONTROLS: f64 = 0.1;

/// An attempt [t, t + h] that is to be made.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Attempt {
    pub(crate) t: f64,
    /// Signed.
    pub(crate) h: f64,
    pub(crate) end: f64,
    /// The target that it ends on.
    pub(crate) lands: Option<usize>,
    /// Whether it is as short as it may be, and accepted in any case.
    forced: bool,
    /// The length that would have been tried but for a target.
    wanted: f64,
}

impl Attempt {
    /// The same, but shorter.
    pub(crate) fn until(&self, end: f64) -> Self {
        Self {
            h: end - self.t,
            end,
            lands: None,
            ..*self
        }
    }
}

/// What becomes of an attempt.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Verdict {
    Accepted,
    Rejected,
}

/// Why a solve does not go on.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Halt {
    /// So many attempts were not enough.
    Attempts,
    /// A step does not change the time.
    Underflow,
    /// The error was not finite many times in a row, or in a step that could not be shorter.
    NonFinite,
}

impl Halt {
    /// The same for the user.
    pub(crate) fn reason(self, control: &Control) -> StopReason {
        match self {
            Self::Attempts => StopReason::Attempts {
                max_steps: control.options.max_steps,
            },
            Self::Underflow => StopReason::Underflow,
            Self::NonFinite => StopReason::NonFinite,
        }
    }
}

/// Where a solve is, and what it has done.
#[derive(Clone, Debug)]
pub(crate) struct Pace {
    pub(crate) t: f64,
    /// The length of the next attempt, positive.
    pub(crate) h: f64,
    /// r of the last two accepted steps, or 1; nothing before the first one.
    before: Option<[f64; 2]>,
    /// The length of the last accepted step whose error has determined the length of the next one.
    controlled: Option<f64>,
    /// The largest rate of the field, where an accepted step has last shown it.
    rate: Option<f64>,
    /// The next target.
    target: usize,
    non_finite: usize,
    /// The end of the last attempt, if it was rejected: one that ends there again would be so for ever.
    refused: Option<f64>,
    pub(crate) accepted: usize,
    pub(crate) rejected: usize,
    /// Accepted because they could not be shorter.
    pub(crate) forced: usize,
    /// Accepted only because of the noise floor, and the largest error without it.
    pub(crate) limited: usize,
    pub(crate) factor: f64,
    /// The shortest and the longest accepted step, and the first.
    pub(crate) lengths: Option<[f64; 3]>,
    /// The same before the attempt that was accepted last.
    lengths_before: Option<[f64; 3]>,
}

impl Pace {
    /// At the start, with a first attempt of length h.
    pub(crate) fn new(control: &Control, h: f64) -> Self {
        Self {
            t: control.start,
            h,
            before: None,
            controlled: None,
            rate: None,
            target: 0,
            non_finite: 0,
            refused: None,
            accepted: 0,
            rejected: 0,
            forced: 0,
            limited: 0,
            factor: 0.0,
            lengths: None,
            lengths_before: None,
        }
    }

    /// Notes what was done.
    pub(crate) fn count(&self, stats: &mut Stats) {
        stats.steps += self.accepted;
        stats.rejected += self.rejected;
        stats.forced += self.forced;
        stats.limited += self.limited;
        stats.tolerance_factor = stats.tolerance_factor.max(self.factor);
        if let Some([least, most, first]) = self.lengths {
            stats.used_step(least);
            stats.used_step(most);
            stats.first_step = Some(first);
        }
    }

    /// That more than a tenth of the steps were limited by the compute precision, where this is to be an error.
    pub(crate) fn precision_limit(&self, control: &Control) -> Option<StopReason> {
        let (limited, factor) = (self.limited, self.factor);
        let is_error = control.options.limited_is_error && 10 * limited > self.accepted;
        is_error.then_some(StopReason::PrecisionLimited { limited, factor })
    }

    /// Whether the end is reached.
    pub(crate) fn is_done(&self, control: &Control) -> bool {
        self.target == control.targets.len()
    }

    /// The next attempt.  It never goes beyond a target, and ends exactly on one that is near.
    pub(crate) fn attempt(&self, control: &Control) -> Result<Attempt, Halt> {
        let options = &control.options;
        if self.accepted + self.rejected >= options.max_steps {
            return Err(Halt::Attempts);
        }
        let target = control.targets[self.target].t;
        let left = (target - self.t).abs();
        let wanted = self.h.clamp(options.min_step, options.max_step);
        let forced = self.h <= options.min_step;
        let (end, lands) = if wanted >= left * (1.0 - 1e-10) {
            (target, Some(self.target))
        } else {
            // Two equal steps rather than one and what it leaves.
            let h = if wanted > left / 2.0 {
                left / 2.0
            } else {
                wanted
            };
            (self.t + control.direction * h, None)
        };
        let h = end - self.t;
        let again = self.refused == Some(end) && !forced;
        if h == 0.0 || !h.is_finite() || again {
            return Err(match self.non_finite {
                0 => Halt::Underflow,
                _ => Halt::NonFinite,
            });
        }
        Ok(Attempt {
            t: self.t,
            h,
            end,
            lands,
            forced,
            wanted,
        })
    }

    /// The attempt that was accepted last is taken only as far as to this end.
    pub(crate) fn cut(&mut self, attempt: &Attempt, end: f64) {
        self.t = end;
        self.target -= usize::from(attempt.lands.is_some());
        self.lengths = with_length(self.lengths_before, (end - attempt.t).abs());
    }

    /// Limits the next length to one in which cotangents do not grow, after an accepted step of this length.
    fn limit(&mut self, control: &Control, length: f64, measured: Measured) {
        let safety = control.options.controller.safety;
        if !control.options.stability_limit {
            return;
        }
        if let Some(stiffness) = measured.stiffness {
            self.rate = Some(stiffness / length);
        }
        if let (Some(rate), Some(stability)) = (self.rate, &control.stability) {
            self.h = self.h.min(safety * stability.interval / rate);
        }
        // An error of exactly zero after others: the state has come to rest in its precision, perhaps before any rate was
        // seen.  It would stay there in steps of any length.
        if let Some(longest) = self.controlled.filter(|_| measured.r == 0.0) {
            self.h = self.h.min(safety * longest);
        }
        if measured.r >= CONTROLS {
            self.controlled = Some(length);
        }
    }

    /// Judges an attempt.
    pub(crate) fn judge(
        &mut self,
        control: &Control,
        attempt: &Attempt,
        measured: Measured,
    ) -> Result<Verdict, Halt> {
        let Measured { r, plain, .. } = measured;
        let controller = &control.options.controller;
        let accepted = r <= 1.0 || attempt.forced && r.is_finite();
        let length = attempt.h.abs();
        let next = length * controller.factor(r, self.before, control.order, accepted);
        if !accepted {
            self.rejected += 1;
            self.non_finite = if r.is_finite() {
                0
            } else {
                self.non_finite + 1
            };
            if self.non_finite >= MOST_NON_FINITE || attempt.forced {
                return Err(Halt::NonFinite);
            }
            self.h = next;
            self.refused = Some(attempt.end);
            return Ok(Verdict::Rejected);
        }
        (self.non_finite, self.refused) = (0, None);
        self.accepted += 1;
        self.forced += usize::from(r > 1.0);
        self.limited += usize::from(r <= 1.0 && plain > 1.0);
        self.factor = self.factor.max(plain);
        self.lengths_before = self.lengths;
        self.lengths = with_length(self.lengths, length);
        // A step that a target has shortened says nothing about the length that the problem wants.
        self.h = match length < attempt.wanted {
            true => next.max(attempt.wanted),
            false => next,
        };
        if control.jumps_at(attempt) {
            // Nothing is known of the field behind it.
            (self.controlled, self.rate) = (None, None);
        } else {
            self.limit(control, length, measured);
        }
        let [r1, r2] = self.before.unwrap_or([1.0; 2]);
        self.before = Some(if r > 0.0 { [r, r1] } else { [r1, r2] });
        self.t = attempt.end;
        self.target += usize::from(attempt.lands.is_some());
        Ok(Verdict::Accepted)
    }
}

/// The shortest and the longest step, and the first, after one more.
fn with_length(before: Option<[f64; 3]>, length: f64) -> Option<[f64; 3]> {
    let [least, most, first] = before.unwrap_or([length; 3]);
    Some([least.min(length), most.max(length), first])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::adaptive::Adaptive;
    use crate::tableau::DOPRI5;
    use crate::time::TimeGrid;

    fn control(options: &Adaptive, times: &[f64]) -> Control {
        let grid = TimeGrid::new(times.to_vec()).unwrap();
        Control::new(options, &DOPRI5, &grid, &[]).unwrap()
    }

    /// An error that is the same without a floor, of a field whose rate is not seen.
    fn plain(r: f64) -> Measured {
        Measured {
            r,
            plain: r,
            stiffness: None,
        }
    }

    #[test]
    fn steps_are_within_the_stability_of_the_method_for_the_rate_that_was_seen_last() {
        let options = Adaptive::new(1e-3, 1e-3).jump_t([50.0]);
        let control = control(&options, &[0.0, 100.0]);
        let interval = control.stability.as_ref().unwrap().interval;
        let mut pace = Pace::new(&control, 0.1);
        let mut attempt = |rate: Option<f64>| {
            let attempt = pace.attempt(&control).unwrap();
            let measured = Measured {
                stiffness: rate.map(|rate| rate * attempt.h),
                ..plain(1e-9)
            };
            let verdict = pace.judge(&control, &attempt, measured);
            assert_eq!(verdict, Ok(Verdict::Accepted));
            (attempt, pace.h)
        };
        let longest = |rate: f64| 0.9 * interval / rate;
        // It shortens steps, too, and holds while no rate is seen.
        assert!((attempt(Some(20.0)).1 - longest(20.0)).abs() < 1e-12);
        assert!((attempt(Some(40.0)).1 - longest(40.0)).abs() < 1e-12);
        assert!((attempt(None).1 - longest(40.0)).abs() < 1e-12);
        // What does not decay is not limited, and neither is what comes after a jump.
        let (free, next) = attempt(Some(0.0));
        assert_eq!(next, 10.0 * free.h);
        attempt(Some(1.0));
        while attempt(None).0.end < 50.0 {}
        let (behind, next) = attempt(None);
        assert_eq!(next, 10.0 * behind.h);
    }

    #[test]
    fn steps_at_rest_are_not_longer_than_those_that_an_error_has_controlled() {
        let options = Adaptive::new(1e-3, 1e-3);
        let control = control(&options, &[0.0, 100.0]);
        let attempt = |pace: &mut Pace, r: f64| {
            let attempt = pace.attempt(&control).unwrap();
            assert_eq!(
                pace.judge(&control, &attempt, plain(r)),
                Ok(Verdict::Accepted)
            );
            attempt.h
        };
        let mut pace = Pace::new(&control, 0.1);
        // Before any error, lengths grow as fast as they may.
        assert_eq!((attempt(&mut pace, 0.0), pace.h), (0.1, 1.0));
        let controlled = attempt(&mut pace, 0.5);
        let longer = attempt(&mut pace, 1e-4);
        assert!(longer > controlled);
        attempt(&mut pace, 0.0);
        assert!(pace.h < controlled);
        let at_rest = pace.h;
        attempt(&mut pace, 0.0);
        assert_eq!(pace.h, at_rest);
        // Unless gradients do not matter.
        let control = self::control(&options.stability_limit(false), &[0.0, 100.0]);
        let mut pace = Pace::new(&control, 0.1);
        for (r, longer) in [(0.5, false), (0.0, true), (0.0, true)] {
            let attempt = pace.attempt(&control).unwrap();
            let measured = Measured {
                stiffness: Some(1e6),
                ..plain(r)
            };
            let verdict = pace.judge(&control, &attempt, measured);
            assert_eq!(verdict, Ok(Verdict::Accepted));
            assert_eq!(pace.h > 9.0 * attempt.h, longer);
        }
    }

    /// All accepted attempts, where the error of a length is `r`.
    fn walk(control: &Control, h: f64, r: impl Fn(f64) -> f64) -> (Vec<Attempt>, Pace) {
        let mut pace = Pace::new(control, h);
        let mut taken = vec![];
        while !pace.is_done(control) {
            let attempt = pace.attempt(control).unwrap();
            let r = r(attempt.h.abs());
            if pace.judge(control, &attempt, plain(r)).unwrap() == Verdict::Accepted {
                taken.push(attempt);
            }
        }
        (taken, pace)
    }

    #[test]
    fn targets_are_hit_to_the_bit_and_steps_follow_each_other() {
        for times in [[0.1, 0.7, 1.3], [1.3, 0.7, 0.1]] {
            let options = Adaptive::new(1e-3, 1e-3).step_t([0.3, 1e9]).jump_t([0.9]);
            let control = control(&options, &times);
            let (taken, pace) = walk(&control, 0.07, |h| (h / 0.11).powi(5));
            assert_eq!(taken[0].t, times[0]);
            assert!(taken.windows(2).all(|w| w[0].end == w[1].t));
            let landed: Vec<_> = taken
                .iter()
                .filter(|a| a.lands.is_some())
                .map(|a| a.end)
                .collect();
            let wanted: Vec<_> = control.targets.iter().map(|t| t.t).collect();
            assert_eq!(landed, wanted);
            assert_eq!(landed.len(), 3);
            assert_eq!(pace.accepted, taken.len());
        }
    }

    #[test]
    fn a_step_that_a_target_shortens_does_not_shorten_the_next() {
        let control = control(&Adaptive::new(1e-3, 1e-3).step_t([1.0, 1.001]), &[0.0, 3.0]);
        let (taken, _) = walk(&control, 0.25, |_| 0.59f64);
        let at = taken.iter().position(|a| a.end == 1.001).unwrap();
        assert!(taken[at].h < 0.0011 && taken[at + 1].h > 0.2);
    }

    #[test]
    fn a_step_that_is_cut_counts_with_the_length_that_was_taken() {
        let control = control(&Adaptive::new(1e-3, 1e-3), &[0.0, 3.0]);
        for (steps, lengths) in [(1, [0.125; 3]), (2, [0.125, 0.25, 0.25])] {
            let mut pace = Pace::new(&control, 0.25);
            for n in 1..=steps {
                // The second one is longer than the first, but for the cut.
                pace.h = 0.25 * f64::from(n);
                let attempt = pace.attempt(&control).unwrap();
                pace.judge(&control, &attempt, plain(0.5)).unwrap();
                if n == steps {
                    pace.cut(&attempt, attempt.t + 0.125);
                }
            }
            assert_eq!(pace.lengths, Some(lengths));
            assert_eq!(pace.t, 0.25 * f64::from(steps - 1) + 0.125);
        }
    }

    #[test]
    fn the_first_length_is_not_looked_for_beyond_a_jump() {
        let longest = |options: Adaptive| control(&options, &[1.0, 3.0]).longest();
        let plain = Adaptive::new(1e-3, 1e-3);
        assert_eq!(longest(plain.clone().step_t([1.5])), 2.0);
        assert_eq!(longest(plain.clone().step_t([1.25]).jump_t([1.5])), 0.5);
        assert_eq!(longest(plain.max_step(0.125).jump_t([1.5])), 0.125);
    }

    #[test]
    fn what_is_rejected_goes_on_with_a_shorter_step_even_without_safety() {
        let law = super::super::Controller {
            p: 0.2,
            i: 0.3,
            d: 0.2,
            safety: 1.0,
            ..Default::default()
        };
        let control = control(&Adaptive::new(1e-3, 1e-3).controller(law), &[0.0, 100.0]);
        let mut pace = Pace::new(&control, 0.01);
        for r in [1e-6, 0.1] {
            let attempt = pace.attempt(&control).unwrap();
            let verdict = pace.judge(&control, &attempt, plain(r));
            assert_eq!(verdict, Ok(Verdict::Accepted));
        }
        let refused = pace.attempt(&control).unwrap();
        let verdict = pace.judge(&control, &refused, plain(2.0));
        assert_eq!(verdict, Ok(Verdict::Rejected));
        let again = pace.attempt(&control).unwrap();
        assert_eq!(again.t, refused.t);
        assert!(again.h < 0.9995 * refused.h && again.h > 0.9 * refused.h);
    }

    #[test]
    fn the_time_of_a_mirrored_interval_is_mirrored_to_the_bit() {
        let options = Adaptive::new(1e-3, 1e-3).controller(super::super::Controller::PI);
        let r = |h: f64| (h / 0.13).powi(5) + 0.01;
        let (there, _) = walk(&control(&options, &[0.0, 2.0]), 0.01, r);
        let (back, _) = walk(&control(&options, &[0.0, -2.0]), 0.01, r);
        let mirrored: Vec<_> = back.iter().map(|a| (-a.t, -a.end)).collect();
        let there: Vec<_> = there.iter().map(|a| (a.t, a.end)).collect();
        assert_eq!(there, mirrored);
    }
}
