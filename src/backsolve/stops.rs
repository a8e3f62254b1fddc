//! Where a backward solve stops, and the fixed steps between two stops.

use super::instants::Instants;
use crate::schedule::Steps;
use crate::time::coincide;

/// From the last time to the first, each with the number of the output that is there: at all outputs, at the first time
/// and, with fixed steps, at all times of the user.
pub(super) fn stops(outputs: &[f64], points: &[f64], steps: &Steps) -> Vec<(f64, Option<usize>)> {
    let mut stops: Vec<_> = outputs.iter().copied().zip((0..).map(Some)).collect();
    let own = match steps {
        Steps::Adaptive(_) => &points[..1],
        _ => points,
    };
    let ascending = points[points.len() - 1] >= points[0];
    let from_the_last = |a: &f64, b: &f64| match ascending {
        true => b.total_cmp(a),
        false => a.total_cmp(b),
    };
    stops.sort_by(|a, b| from_the_last(&a.0, &b.0));
    let mut more = vec![];
    for t in own {
        let at = stops.partition_point(|(stop, _)| from_the_last(stop, t).is_lt());
        let near = |i: usize| stops.get(i).is_some_and(|(stop, _)| coincide(*stop, *t));
        if !(near(at) || at > 0 && near(at - 1)) {
            more.push((*t, None));
        }
    }
    stops.append(&mut more);
    stops.sort_by(|a, b| from_the_last(&a.0, &b.0));
    stops
}

/// Steps between two stops, which lie in one interval of the user's times; `given` are the times of [`Steps::At`].
pub(super) fn cut(steps: &Steps, [from, to]: [f64; 2], points: &[f64], given: &Instants) -> Steps {
    let length = (from - to).abs();
    let pieces = |of: f64| ((length / of - 1e-9).ceil().max(1.0)) as usize;
    match steps {
        Steps::PerInterval(m) => {
            let middle = 0.5 * (from + to);
            let ascending = points[points.len() - 1] >= points[0];
            let after = points.partition_point(|t| (*t <= middle) == ascending);
            let ends = after.checked_sub(1).map(|i| (points[i], points.get(after)));
            let whole = match ends {
                Some((start, Some(end))) => (end - start).abs(),
                _ => length,
            };
            Steps::PerInterval(pieces(whole / (*m).max(1) as f64))
        }
        Steps::Size(size) => Steps::PerInterval(pieces(*size)),
        Steps::At(_) => {
            let is_inside = |t: &&f64| {
                let apart = !coincide(**t, from) && !coincide(**t, to);
                apart && (**t - from) * (**t - to) < 0.0
            };
            let inside = given.within([from, to]).iter().filter(is_inside).copied();
            Steps::At(match to < from {
                true => inside.rev().collect(),
                false => inside.collect(),
            })
        }
        steps => steps.clone(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::adaptive::Adaptive;

    #[test]
    fn fixed_steps_stop_at_all_times_and_adaptive_ones_at_outputs() {
        let points = [0.0, 1.0, 3.0];
        let fixed = stops(&[3.0], &points, &Steps::PerInterval(4));
        assert_eq!(fixed, [(3.0, Some(0)), (1.0, None), (0.0, None)]);
        let adaptive = Steps::Adaptive(Adaptive::new(1e-3, 1e-3));
        assert_eq!(
            stops(&[3.0], &points, &adaptive),
            [(3.0, Some(0)), (0.0, None)]
        );
        let down = stops(&[3.0, 1.0, 0.0], &[3.0, 1.0, 0.0], &adaptive);
        assert_eq!(down, [(0.0, Some(2)), (1.0, Some(1)), (3.0, Some(0))]);
    }

    #[test]
    fn an_interval_that_is_cut_by_outputs_has_its_steps_shared_among_the_pieces() {
        let none = Instants::default();
        let count = |steps: Steps, ends| match cut(&steps, ends, &[0.0, 1.0, 3.0], &none) {
            Steps::PerInterval(n) => n,
            _ => 0,
        };
        assert_eq!(count(Steps::PerInterval(4), [3.0, 1.0]), 4);
        assert_eq!(count(Steps::PerInterval(4), [1.5, 1.0]), 1);
        assert_eq!(count(Steps::PerInterval(4), [2.6, 1.0]), 4);
        assert_eq!(count(Steps::Size(0.3), [1.0, 0.0]), 4);
        let down = cut(&Steps::PerInterval(4), [1.0, 1.5], &[3.0, 1.0, 0.0], &none);
        assert!(matches!(down, Steps::PerInterval(1)));
        let times = vec![0.5, 1.0, 2.0, 2.5];
        let (steps, given) = (Steps::At(times.clone()), Instants::new(times));
        let Steps::At(inside) = cut(&steps, [3.0, 1.0], &[0.0, 1.0, 3.0], &given) else {
            panic!();
        };
        assert_eq!(inside, [2.5, 2.0]);
    }
}
