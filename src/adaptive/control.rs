//! Adaptive steps for one interval, validated: where steps must end, and what their errors are made of.

use candle_core::{DType, Device, Shape};

use super::stability::Stability;
use super::{out_of_range, Adaptive, Attempt, OfLeaf};
use crate::error::{AdaptiveDefect, Error, Result};
use crate::tableau::Tableau;
use crate::time::{coincide, TimeGrid};

/// A time at which a step must end.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Target {
    pub(crate) t: f64,
    /// Its number among the user's times.
    pub(crate) given: Option<usize>,
    /// Whether the field jumps there.
    pub(crate) jumps: bool,
}

/// What rounding in compute precision makes of one tensor of the state: of a stage u (RMS|y| + |h| RMS(max(|k_1|, κ))), and of
/// the error estimate `weight` times that.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Rounding {
    /// u.
    pub(crate) roundoff: f64,
    /// κ.
    pub(crate) least: f64,
    /// ‖b − b̂‖₂; zero without a noise floor.
    pub(crate) weight: f64,
}

/// Adaptive steps for one interval, validated.
#[derive(Clone, Debug)]
pub(crate) struct Control {
    pub(crate) options: Adaptive,
    pub(crate) start: f64,
    /// Whether the field jumps there.
    pub(crate) starts_at_jump: bool,
    /// 1, or −1 where time decreases.
    pub(crate) direction: f64,
    /// In the order in which they are met; the last is the end.
    pub(crate) targets: Vec<Target>,
    /// The order of the method.
    pub(crate) order: f64,
    /// b − b̂ by stage of the tableau that ends in f(t_{n+1}, y_{n+1}).
    pub(crate) estimate: Vec<f64>,
    /// Whether that last stage was appended: then an attempt can do without it.
    pub(crate) appended: bool,
    /// How long steps may be in a stiff field.
    pub(crate) stability: Option<Stability>,
}

impl Control {
    pub(crate) fn new(
        options: &Adaptive,
        method: &Tableau,
        grid: &TimeGrid,
        jumps: &[f64],
    ) -> Result<Self> {
        options.controller.check()?;
        let positive = |option, value: f64| match value > 0.0 {
            true => Ok(()),
            false => Err(out_of_range(option, value)),
        };
        options.first_step.map_or(Ok(()), |h| {
            positive("first_step", if h.is_finite() { h } else { f64::NAN })
        })?;
        positive("max_step", options.max_step)?;
        positive("max_steps", options.max_steps as f64)?;
        let value = options.min_step;
        if !(value >= 0.0 && value <= options.max_step) {
            let option = "min_step";
            return Err(out_of_range(option, value));
        }
        let Some(embedded) = method.embedded() else {
            let method = method.name().to_owned();
            return Err(Error::Adaptive(AdaptiveDefect::NoEstimate { method }));
        };
        let difference = method.b().iter().zip(embedded).map(|(b, e)| b - e);
        let mut estimate: Vec<f64> = difference.collect();
        estimate.resize(method.dense().stages(), 0.0);
        let points = grid.points();
        let (start, end) = (points[0], points[points.len() - 1]);
        if !(end - start).is_finite() {
            return Err(Error::IntervalOverflow {
                index: 0,
                t0: start,
                t1: end,
            });
        }
        let mut targets = targets(options, method, points, jumps)?;
        let jumps_at = |end: f64| {
            let mut all = options.jump_t.iter().chain(jumps);
            all.any(|&t| coincide(t, end))
        };
        if let Some(last) = targets.last_mut() {
            last.jumps |= jumps_at(end);
        }
        Ok(Self {
            starts_at_jump: jumps_at(start),
            direction: if end < start { -1.0 } else { 1.0 },
            targets,
            options: options.clone(),
            start,
            order: method.order() as f64,
            estimate,
            appended: !method.is_fsal(),
            stability: Stability::of(method).filter(|_| options.stability_limit),
        })
    }

    /// The same for another estimate: the power of h with which it falls, and its weights.
    pub(crate) fn estimating(&self, (order, estimate): (f64, Vec<f64>)) -> Self {
        Self {
            order,
            estimate,
            appended: false,
            stability: None,
            ..self.clone()
        }
    }

    /// rtol and atol by tensor of a state of these shapes.
    pub(crate) fn tolerances(
        &self,
        shapes: &[Shape],
        state: DType,
        device: &Device,
    ) -> Result<[Vec<OfLeaf>; 2]> {
        let Adaptive { rtol, atol, .. } = &self.options;
        let rtol = rtol.by_leaf("rtol", shapes, state, device)?;
        let atol = atol.by_leaf("atol", shapes, state, device)?;
        for (leaf, (rtol, atol)) in rtol.iter().zip(&atol).enumerate() {
            if rtol.is_zero()? && atol.is_zero()? {
                return Err(Error::Adaptive(AdaptiveDefect::NoTolerance { leaf }));
            }
        }
        Ok([rtol, atol])
    }

    /// What rounding makes of every tensor of the state, from their u and κ.
    pub(crate) fn roundings(&self, precisions: &[(f64, f64)]) -> Result<Vec<Rounding>> {
        let size = self.estimate_size();
        // In f64 a floor of 1e-17 would change the steps in their last digits only.
        let least = self.options.rtol.least()?;
        let counts = |u: f64| self.options.noise_floor && (u > 2f64.powi(-50) || least < 1e-12);
        let rounding = |&(roundoff, least): &(f64, f64)| Rounding {
            roundoff,
            least,
            weight: if counts(roundoff) { size } else { 0.0 },
        };
        Ok(precisions.iter().map(rounding).collect())
    }

    /// ‖b − b̂‖₂.
    fn estimate_size(&self) -> f64 {
        let squares = self.estimate.iter().map(|e| e * e);
        squares.sum::<f64>().sqrt()
    }

    /// Whether the field jumps at the end of an attempt.
    pub(crate) fn jumps_at(&self, attempt: &Attempt) -> bool {
        attempt
            .lands
            .is_some_and(|target| self.targets[target].jumps)
    }

    /// The fewest steps that the solve can take: one to each target, none longer than permitted.
    pub(crate) fn least_steps(&self) -> usize {
        let end = self.targets.last().map_or(self.start, |target| target.t);
        let steps = ((end - self.start).abs() / self.options.max_step) as usize;
        steps.max(self.targets.len()).min(self.options.max_steps)
    }

    /// The distance from a time to the next one at which a step must end.
    pub(crate) fn room(&self, t: f64) -> f64 {
        let met = |target: &Target| (target.t - t) * self.direction <= 0.0;
        let next = self.targets.get(self.targets.partition_point(met));
        next.map_or(f64::INFINITY, |target| (target.t - t).abs())
    }

    /// The longest first step, and the furthest point at which the first length is looked for: neither is beyond a jump
    /// of the field.
    pub(crate) fn longest(&self) -> f64 {
        let jump = self.targets.iter().find(|target| target.jumps);
        let end = jump.or(self.targets.last()).map_or(self.start, |end| end.t);
        (end - self.start).abs().min(self.options.max_step)
    }

    /// The length that is tried where the state or its velocity gives none: the time changes by it in f64.
    fn shortest(&self) -> f64 {
        f64::max(1e-6, 64.0 * f64::EPSILON * self.start.abs())
    }

    /// The length of the first attempt but for limits, from ‖y0‖, ‖f0‖ in the norm of the tolerance; the first part,
    /// which says where to evaluate once more.
    pub(crate) fn probe(&self, d0: f64, d1: f64) -> f64 {
        // A tolerance of zero, such as a relative one of a component that is zero, makes the norm infinite.
        let says_nothing = !d0.is_finite() || !d1.is_finite();
        match d0 < 1e-5 || d1 < 1e-5 || says_nothing {
            true => self.shortest(),
            false => 0.01 * d0 / d1,
        }
    }

    /// The second part, from the difference d2 of the two evaluations divided by the length of the probe.
    pub(crate) fn first_length(&self, probe: f64, d1: f64, d2: f64) -> f64 {
        let d = d1.max(d2);
        let h = match d <= 1e-15 {
            true => self.shortest().max(probe * 1e-3),
            false => (0.01 / d).powf(1.0 / self.order),
        };
        h.min(100.0 * probe)
    }
}

/// All times at which a step must end, in order.
fn targets(
    options: &Adaptive,
    method: &Tableau,
    points: &[f64],
    jumps: &[f64],
) -> Result<Vec<Target>> {
    let (start, end) = (points[0], points[points.len() - 1]);
    let forward = end >= start;
    let is_inside = |t: f64| match forward {
        true => start < t && t < end && !coincide(t, start),
        false => end < t && t < start && !coincide(t, start),
    };
    let later = |a: &Target, b: &Target| match forward {
        true => a.t.total_cmp(&b.t),
        false => b.t.total_cmp(&a.t),
    };
    let forced = |t: f64, jumps: bool| Target {
        t,
        given: None,
        jumps,
    };
    let mut all = vec![];
    for (option, times, jumps) in [
        ("step_t", &options.step_t, false),
        ("jump_t", &options.jump_t, true),
    ] {
        if let Some(t) = times.iter().find(|t| !t.is_finite()) {
            return Err(out_of_range(option, *t));
        }
        let inside = times.iter().filter(|t| is_inside(**t));
        all.extend(inside.map(|t| forced(*t, jumps)));
    }
    all.sort_by(later);
    let twice = |w: &&[Target]| coincide(w[0].t, w[1].t) && w[0].jumps != w[1].jumps;
    if let Some(w) = all.windows(2).find(twice) {
        return Err(Error::Adaptive(AdaptiveDefect::ForcedTwice { t: w[0].t }));
    }
    // Those that the field says itself.
    let inside = jumps.iter().filter(|t| is_inside(**t));
    all.extend(inside.map(|t| forced(*t, true)));
    let on_outputs = options.on_outputs.unwrap_or(method.ends_steps_at_outputs());
    let is_wanted = |target: &Target| match target.given {
        Some(given) => on_outputs || given + 1 == points.len(),
        None => true,
    };
    let given = points.iter().enumerate().skip(1);
    all.extend(given.map(|(given, &t)| Target {
        t,
        given: Some(given),
        jumps: false,
    }));
    all.sort_by(later);
    // A step ends once at times that differ by rounding only.
    let mut once: Vec<(Target, bool)> = vec![];
    for target in all {
        let wanted = is_wanted(&target);
        match once.last_mut() {
            Some((before, wanted_before)) if coincide(before.t, target.t) => {
                before.jumps |= target.jumps;
                *wanted_before |= wanted;
                if target.given.is_some() {
                    // The user's own time, to the bit.
                    (before.t, before.given) = (target.t, target.given);
                }
            }
            _ => once.push((target, wanted)),
        }
    }
    let wanted = once.into_iter().filter(|(_, wanted)| *wanted);
    Ok(wanted.map(|(target, _)| target).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tableau::DOPRI5;

    fn targets_of(options: &Adaptive, points: &[f64], jumps: &[f64]) -> Vec<Target> {
        targets(options, &DOPRI5, points, jumps).unwrap()
    }

    #[test]
    fn steps_end_once_at_each_of_very_many_times() {
        // So many that comparing each with each would take minutes.
        const MANY: usize = 1 << 17;
        let options = Adaptive::new(1e-3, 1e-3).step_on_outputs(true);
        let whole: Vec<_> = (0..=MANY).map(|n| n as f64).collect();
        // Every second one is a jump, but for rounding; others lie between.  They are listed in no order.
        let jumps = whole.iter().step_by(2).skip(1).rev();
        let jumps = jumps.map(|t| t.next_up());
        let between = whole.iter().map(|t| t + 0.5);
        let jumps: Vec<_> = jumps.chain(between).collect();
        let mirrored = |times: &[f64]| times.iter().map(|t| -t).collect::<Vec<_>>();
        let there = targets_of(&options, &whole, &jumps);
        let back = targets_of(&options, &mirrored(&whole), &mirrored(&jumps));
        assert_eq!(there.len(), 2 * MANY);
        for (n, (there, back)) in there.iter().zip(&back).enumerate() {
            let is_given = n % 2 == 1;
            let expected = Target {
                t: (n + 1) as f64 / 2.0,
                given: is_given.then_some(n / 2 + 1),
                jumps: !is_given || n % 4 == 3 && n + 1 < 2 * MANY,
            };
            assert_eq!(*there, expected);
            assert_eq!(
                Target {
                    t: -back.t,
                    ..*back
                },
                expected
            );
        }
    }

    #[test]
    fn of_times_that_differ_by_rounding_the_users_output_time_stays_and_the_jump_counts() {
        let (sum, third) = (0.1 + 0.2, 0.3);
        let options = Adaptive::new(1e-3, 1e-3).step_t([third, sum]);
        let expected = |t: f64, given: Option<usize>, jumps: bool| Target { t, given, jumps };
        let end = |given: usize| expected(1.0, Some(given), false);
        for (points, jumps, t, given) in [
            (vec![0.0, 1.0], vec![], third, None),
            (vec![0.0, sum, 1.0], vec![], sum, Some(1)),
            (vec![0.0, third, 1.0], vec![sum], third, Some(1)),
        ] {
            let first = expected(t, given, !jumps.is_empty());
            let found = targets_of(&options, &points, &jumps);
            assert_eq!(found, [first, end(points.len() - 1)]);
        }
    }
}
