//! Where a number that depends on time and state crosses zero inside a step.

use crate::error::Result;

/// The directions of zero crossing that count as events.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Direction {
    /// Crossings in both directions.
    #[default]
    Both,
    /// From negative to positive.
    Rising,
    /// From positive to negative.
    Falling,
}

impl Direction {
    /// Whether a number that had this sign before may cross.
    fn leaves(self, sign: f64) -> bool {
        match self {
            Self::Both => true,
            Self::Rising => sign < 0.0,
            Self::Falling => sign > 0.0,
        }
    }
}

/// Points of a step at which the sign of a number is looked at.
const POINTS: [f64; 4] = [0.25, 0.5, 0.75, 1.0];

/// The part of a step, at both of its ends, in which the interpolant is as accurate as the step.
const NEAR: f64 = 1e-3;

/// A trajectory is taken to touch a surface, and not to cross it, where the number changes slower than on average by
/// this factor.
const FLAT: f64 = 1e-8;

/// A place where a number crosses zero.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Place {
    /// The fraction of the step.
    pub(crate) x: f64,
    /// How fast the number changes in the step on average.
    pub(crate) speed: f64,
    /// The sign of the number before.
    pub(crate) before: f64,
    /// The size of the number there, which is rounding; zero where it had another sign from the start of the step on.
    pub(crate) residual: f64,
}

/// A number along a step: its value at a fraction of the step.
pub(crate) type Along<'a> = dyn FnMut(f64) -> Result<f64> + 'a;

/// An event of rows: a component of a row crosses a value.
#[derive(Clone, Debug)]
pub(crate) struct RowCrossing {
    /// The component, counted over all features of a row.
    pub(crate) component: usize,
    /// The value of all rows, or one of each.
    pub(crate) values: Vec<f64>,
    pub(crate) direction: Direction,
    /// Whether a row ends there.
    pub(crate) terminal: bool,
    /// How many crossings of a row have a place among the returned states.
    pub(crate) most: usize,
}

impl RowCrossing {
    /// The value of a row.
    pub(crate) fn value(&self, row: usize) -> f64 {
        match self.values.as_slice() {
            [value] => *value,
            values => values[row],
        }
    }
}

/// A crossing of a row that was found.
#[derive(Clone, Debug)]
pub(crate) struct RowFound {
    pub(crate) row: usize,
    pub(crate) event: usize,
    /// Its number among the crossings of this event and row.
    pub(crate) number: usize,
    pub(crate) t: f64,
    pub(crate) speed: f64,
    /// The derivative of the interpolant there, by feature; empty if the state is not returned.
    pub(crate) slope: Vec<f64>,
}

/// Whether two times of a solve whose `largest` time is this are one: roots are found to four ulps of it, and rounding adds
/// a few.
pub(crate) fn is_met(time: f64, other: f64, largest: f64) -> bool {
    (time - other).abs() <= 8.0 * f64::EPSILON * largest
}

/// The sign of a number, if it has one.
pub(crate) fn sign(g: f64) -> Option<f64> {
    (g != 0.0).then_some(g.signum())
}

/// The places in a step between two times where a number crosses zero, in ascending order, one at most between two
/// neighbouring points, and its sign at the end of the step.  On the surface a number has no sign.
pub(crate) fn crossings(
    g: &mut Along<'_>,
    ends: [f64; 2],
    direction: Direction,
    sign_before: Option<f64>,
) -> Result<(Vec<Place>, Option<f64>)> {
    let (mut roots, mut largest) = (vec![], 0.0f64);
    let (mut before, mut at) = (sign_before, 0.0);
    for x in POINTS {
        let value = g(x)?;
        largest = largest.max(value.abs());
        if let Some(sign) = before {
            if value * sign <= 0.0 && direction.leaves(sign) {
                roots.push((root(g, ends, [at, x], sign, value)?, sign));
            }
        }
        before = sign(value);
        at = x;
    }
    let speed = largest / (ends[1] - ends[0]).abs();
    let place = |([x, residual], before): ([f64; 2], f64)| Place {
        x,
        speed,
        before,
        residual,
    };
    Ok((roots.into_iter().map(place).collect(), before))
}

/// Orders the crossings of several events in a step, each a place and the number of its event, as far as to the first at
/// which the solve ends; whether it ends.  At one place those at which it does not end come first, and otherwise the order
/// is that of the events.
pub(crate) fn in_order(
    crossings: &mut Vec<(Place, usize)>,
    is_terminal: impl Fn(usize) -> bool,
) -> bool {
    let of = |(place, event): &(Place, usize)| (place.x, is_terminal(*event));
    crossings.sort_by(|a, b| {
        let (a, b) = (of(a), of(b));
        a.0.total_cmp(&b.0).then(a.1.cmp(&b.1))
    });
    let last = crossings.iter().position(|(_, event)| is_terminal(*event));
    crossings.truncate(last.map_or(crossings.len(), |last| last + 1));
    last.is_some()
}

/// The root in [a, b], where g has `sign` at a and the value g_b at b, to four ulps of time, and [`Place::residual`]:
/// inverse quadratic interpolation where it is safe, otherwise bisection (Chandrupatla, Adv. Eng. Software 28, 1997).
fn root(
    g: &mut Along<'_>,
    [t, end]: [f64; 2],
    [a, b]: [f64; 2],
    sign: f64,
    g_b: f64,
) -> Result<[f64; 2]> {
    let g_a = g(a)?;
    // The sign may be that of a point before: then the crossing is where the step begins.
    if g_b == 0.0 || g_a * sign <= 0.0 {
        return Ok([if g_b == 0.0 { b } else { a }, 0.0]);
    }
    let ulps = 4.0 * f64::EPSILON * t.abs().max(end.abs());
    let resolution = ulps.max(f64::MIN_POSITIVE) / (end - t).abs();
    let (mut one, mut two, mut part) = ((b, g_b), (a, g_a), 0.5);
    loop {
        let x = one.0 + part * (two.0 - one.0);
        let now = (x, g(x)?);
        let three = match now.1 * one.1 > 0.0 {
            true => std::mem::replace(&mut one, now),
            false => {
                let three = std::mem::replace(&mut two, one);
                one = now;
                three
            }
        };
        let best = if one.1.abs() < two.1.abs() { one } else { two };
        let least = resolution / (2.0 * (two.0 - one.0).abs());
        if best.1 == 0.0 || least > 0.5 {
            return Ok([best.0, best.1.abs()]);
        }
        let xi = (one.0 - two.0) / (three.0 - two.0);
        let phi = (one.1 - two.1) / (three.1 - two.1);
        let is_safe = phi * phi < xi && (1.0 - phi) * (1.0 - phi) < 1.0 - xi;
        part = match is_safe {
            true => {
                let first = one.1 / (two.1 - one.1) * (three.1 / (two.1 - three.1));
                let along = (three.0 - one.0) / (two.0 - one.0);
                first + along * (one.1 / (three.1 - one.1)) * (two.1 / (three.1 - two.1))
            }
            false => 0.5,
        };
        part = part.clamp(least, 1.0 - least);
    }
}

/// The place behind which a step is to end, so that the place is as accurate as a step: the one at which the solve ends, or
/// the first of all if the interpolant is less accurate than steps are (`refines`); the first that is [inner](is_inner), if
/// there is one.  Places are in ascending order, each with whether the solve ends there.
pub(crate) fn behind_which(places: &[(f64, bool)], refines: bool) -> Option<f64> {
    let places = places.iter().filter(|(_, ends)| refines || *ends);
    let mut places = places.map(|(x, _)| *x);
    let first = places.clone().next();
    places.find(|x| is_inner(*x)).or(first)
}

/// Whether the interpolant may be less accurate at a fraction x of a step than at its ends.
pub(crate) fn is_inner(x: f64) -> bool {
    (NEAR..1.0 - NEAR).contains(&x)
}

/// The end of a step of length h from t that ends just behind a fraction x of it: there the interpolant is as accurate
/// as the step.
pub(crate) fn behind(t: f64, h: f64, x: f64) -> f64 {
    t + h * x * (1.0 + 1e-4)
}

/// Whether a derivative along the trajectory is one of a number that crosses zero, and does not only touch it.
pub(crate) fn is_steep(derivative: f64, speed: f64) -> bool {
    // A derivative that is NaN is none.
    derivative.abs() > FLAT * speed
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_root_is_found_to_four_ulps_of_time() {
        for (t, end) in [(0.0, 1.0), (1e6, 1e6 + 3.0), (2.0, -5.0), (1e-9, 2e-9)] {
            for root in [1e-7, 0.1, 0.251, 0.5, 0.9999, 1.0] {
                let ends = [t, end];
                let mut g = |x: f64| Ok((x - root) * (1.0 + x * x).exp() * (x - 3.0));
                let before = sign(g(0.0).unwrap());
                let (found, after) = crossings(&mut g, ends, Direction::Both, before).unwrap();
                let [found] = found[..] else {
                    panic!("{found:?}");
                };
                let ulps = 4.0 * f64::EPSILON * t.abs().max(end.abs());
                let error = (found.x - root).abs() * (end - t).abs();
                assert!(
                    error <= ulps + 4.0 * f64::EPSILON * (end - t).abs(),
                    "{t} {root} {error:e}"
                );
                assert_eq!(after, sign(g(1.0).unwrap()));
                // In one of the directions it is none.
                let only = [Direction::Rising, Direction::Falling];
                let found = only.map(|only| crossings(&mut g, ends, only, before).unwrap().0);
                assert!(found[0].is_empty() && found[1].len() == 1);
            }
        }
    }

    #[test]
    fn a_root_in_each_quarter_is_found_in_its_direction() {
        let roots = [0.1, 0.3, 0.6, 0.9];
        let mut g = |x: f64| Ok(roots.iter().map(|root| x - root).product());
        for (direction, expected) in [
            (Direction::Both, &[0, 1, 2, 3][..]),
            (Direction::Rising, &[1, 3]),
            (Direction::Falling, &[0, 2]),
        ] {
            let (found, after) = crossings(&mut g, [0.0, 1.0], direction, Some(1.0)).unwrap();
            assert_eq!((found.len(), after), (expected.len(), Some(1.0)));
            for (place, expected) in found.iter().zip(expected) {
                assert!((place.x - roots[*expected]).abs() <= 8.0 * f64::EPSILON);
            }
        }
        // A root at one of the points is one root.
        let mut g = |x: f64| Ok((x - 0.5) * (x - 0.9));
        let (found, _) = crossings(&mut g, [0.0, 1.0], Direction::Both, Some(1.0)).unwrap();
        assert_eq!((found.len(), found[0].x), (2, 0.5));
        assert!((found[1].x - 0.9).abs() <= 8.0 * f64::EPSILON);
    }

    #[test]
    fn crossings_at_one_place_are_kept_as_far_as_to_the_first_that_ends_the_solve() {
        let at = |x: f64, event: usize| {
            let place = Place {
                x,
                speed: 1.0,
                before: 1.0,
                residual: 0.0,
            };
            (place, event)
        };
        let mut all = vec![at(0.5, 0), at(0.5, 1), at(0.2, 2), at(0.6, 1), at(0.5, 3)];
        assert!(in_order(&mut all, |event| event == 0));
        assert_eq!(all, [at(0.2, 2), at(0.5, 1), at(0.5, 3), at(0.5, 0)]);
        let mut all = vec![at(0.5, 1), at(0.2, 2)];
        assert!(!in_order(&mut all, |event| event == 0));
        assert_eq!(all, [at(0.2, 2), at(0.5, 1)]);
    }

    #[test]
    fn a_step_ends_behind_the_place_where_the_solve_ends_or_behind_the_first() {
        let places = [(0.3, false), (0.6, true)];
        assert_eq!(behind_which(&places, false), Some(0.6));
        assert_eq!(behind_which(&places, true), Some(0.3));
        assert_eq!(behind_which(&places[..1], false), None);
        // Near the start of the step the interpolant is accurate.
        assert_eq!(behind_which(&[(5e-4, false), (0.5, true)], true), Some(0.5));
        assert_eq!(behind_which(&[(5e-4, false)], true), Some(5e-4));
        for (t, h) in [(0.0, 1.0), (5.0, -2.0)] {
            let x = (0.3 * h) / (behind(t, h, 0.3) - t);
            assert!(x < 1.0 && !is_inner(x) && is_inner(0.3));
        }
    }
}
