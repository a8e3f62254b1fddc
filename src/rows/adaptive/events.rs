//! Events of rows: where a component of a row crosses a value inside a step of its lane.

use super::forward::Group;
use crate::adaptive::{Attempt, Pace};
use crate::crossing::{
    behind, behind_which, crossings, in_order, is_inner, sign, Place, RowCrossing, RowFound,
};
use crate::error::Result;
use crate::simd::Element;
use crate::tableau::Tableau;

/// The events of the row that a lane holds.
#[derive(Default)]
pub(super) struct RowEvents {
    /// The sign of each event's number where the row is; empty at the start of the row.
    signs: Vec<Option<f64>>,
    /// How often each has occurred.
    counts: Vec<usize>,
    pub(super) found: Vec<RowFound>,
    /// The pace before the attempt under way.
    pub(super) before: Option<Pace>,
    /// A step that is taken again, with another end.
    pub(super) again: Option<Again>,
}

/// A step that was accepted and is taken again.
pub(super) struct Again {
    /// To be made.
    pub(super) attempt: Attempt,
    /// The one that was accepted, and the pace after it.
    whole: Attempt,
    judged: Pace,
    /// Whether it is shorter than the one that was accepted.
    is_cut: bool,
}

/// What becomes of an accepted step of a row with events.
pub(super) struct Met {
    /// The crossings in it, in their order; the row ends at the last of them if `ends`.
    pub(super) crossings: Vec<(Place, usize)>,
    ends: bool,
}

impl Met {
    /// The fraction of the step at which the row ends, if it does.
    pub(super) fn end(&self) -> Option<f64> {
        let last = self.crossings.last().filter(|_| self.ends)?;
        Some(last.0.x)
    }
}

impl RowEvents {
    /// The crossings in a step, and the signs at its end.
    fn search(
        &self,
        events: &[RowCrossing],
        components: &[Component],
        tableau: &Tableau,
        attempt: &Attempt,
    ) -> Result<(Met, Vec<Option<f64>>)> {
        let (mut found, mut signs) = (vec![], vec![]);
        for (event, component) in components.iter().enumerate() {
            let mut g = |x: f64| Ok(component.at(tableau, attempt.h, x));
            let (ends, direction) = ([attempt.t, attempt.end], events[event].direction);
            let (places, sign) = crossings(&mut g, ends, direction, self.signs[event])?;
            found.extend(places.into_iter().map(|place| (place, event)));
            signs.push(sign);
        }
        let ends = in_order(&mut found, |event| events[event].terminal);
        let crossings = found;
        Ok((Met { crossings, ends }, signs))
    }

    /// The step to be taken again, if one is, where the step that was accepted should end behind `target`.
    fn retaken(
        &mut self,
        pace: &mut Pace,
        attempt: &Attempt,
        target: Option<f64>,
    ) -> Option<Again> {
        match (self.again.take(), self.before.take()) {
            (None, before) => {
                let x = target.filter(|x| is_inner(*x))?;
                Some(Again {
                    attempt: attempt.until(behind(attempt.t, attempt.h, x)),
                    whole: *attempt,
                    judged: std::mem::replace(pace, before?),
                    is_cut: true,
                })
            }
            // The shorter step has lost the crossing; the longer one has not.
            (Some(again), _) if again.is_cut && target.is_none() => Some(Again {
                attempt: again.whole,
                is_cut: false,
                ..again
            }),
            (Some(again), _) => {
                *pace = again.judged;
                if again.is_cut {
                    pace.cut(&again.whole, attempt.end);
                }
                None
            }
        }
    }
}

/// A component of a row in a step: y_n, y_{n+1}, and its velocities by stage.
struct Component {
    y: f64,
    after: f64,
    ks: Vec<f64>,
    value: f64,
}

impl Component {
    /// Its distance from the value at a fraction x of a step of length h.
    fn at(&self, tableau: &Tableau, h: f64, x: f64) -> f64 {
        let weights = tableau.weights_at(x);
        let terms = weights.iter().zip(&self.ks);
        // What has no weight may not have been evaluated.
        let terms = terms.filter(|(b, _)| **b != 0.0);
        let slope: f64 = terms.map(|(b, k)| b * k).sum();
        match x {
            0.0 => self.y - self.value,
            // As the next step begins.
            1.0 => self.after - self.value,
            _ => self.y + h * slope - self.value,
        }
    }
}

impl<T: Element> Group<'_, T> {
    /// Whether rows have events.
    pub(super) fn has_events(&self) -> bool {
        !self.pass.plan.problem.crossings.is_empty()
    }

    /// A component of a lane's row.
    fn component(&self, at: usize, event: &RowCrossing, row: usize) -> Component {
        let (batch, size) = (self.batch(), self.stepper.size);
        let place = event.component * batch + at;
        let stages = self.stepper.ks.chunks_exact(size);
        Component {
            y: self.y[place].wide(),
            after: self.after[place].wide(),
            ks: stages.map(|k| k[place].wide()).collect(),
            value: event.value(row),
        }
    }

    /// Looks for crossings in a step that was accepted.  `None`: the lane takes the step again, and ends it behind a
    /// crossing.
    pub(super) fn meet(&mut self, at: usize, attempt: &Attempt) -> Result<Option<Met>> {
        let problem = self.pass.plan.problem;
        let (events, tableau) = (&problem.crossings, &problem.scheme.tableau);
        let row = self.lanes[at].as_ref().map_or(0, |lane| lane.row);
        let components = events.iter().map(|event| self.component(at, event, row));
        let components: Vec<_> = components.collect();
        let refines = self.pass.refines;
        let Some(lane) = &mut self.lanes[at] else {
            return Ok(None);
        };
        let of_row = &mut lane.events;
        if of_row.signs.is_empty() {
            let start = components.iter();
            of_row.signs = start.map(|c| sign(c.at(tableau, 0.0, 0.0))).collect();
            of_row.counts = vec![0; events.len()];
        }
        let (met, signs) = of_row.search(events, &components, tableau, attempt)?;
        let places = met.crossings.iter();
        let places: Vec<_> = places
            .map(|(place, event)| (place.x, events[*event].terminal))
            .collect();
        let target = behind_which(&places, refines);
        of_row.again = of_row.retaken(&mut lane.pace, attempt, target);
        if of_row.again.is_some() {
            return Ok(None);
        }
        of_row.signs = signs;
        Ok(Some(met))
    }

    /// Returns the states at the crossings in a step that was recorded.
    pub(super) fn return_crossings(
        &mut self,
        at: usize,
        attempt: &Attempt,
        met: &Met,
        y: &[T],
    ) -> Result<()> {
        let problem = self.pass.plan.problem;
        let points = problem.grid.points().len();
        for (Place { x, speed, .. }, event) in met.crossings.iter().copied() {
            let is_end = x == 1.0;
            let t = if is_end {
                attempt.end
            } else {
                attempt.t + x * attempt.h
            };
            let Some(lane) = &mut self.lanes[at] else {
                return Ok(());
            };
            let (row, number) = (lane.row, lane.events.counts[event]);
            lane.events.counts[event] += 1;
            let mut found = RowFound {
                row,
                event,
                number,
                t,
                speed,
                slope: vec![],
            };
            if number < problem.crossings[event].most {
                let output = points + problem.of_crossings(event) + number;
                lane.record.save(x, output, None)?;
                found.slope = self.slope(at, x);
                let state = self.interpolated(at, attempt.h, x, y);
                self.returned(row, output).copy_from_slice(&state);
            }
            if let Some(lane) = &mut self.lanes[at] {
                lane.events.found.push(found);
            }
        }
        Ok(())
    }

    /// The derivative of the interpolant at a fraction x of a lane's step, by feature.
    fn slope(&self, at: usize, x: f64) -> Vec<f64> {
        let (batch, size) = (self.batch(), self.stepper.size);
        let slopes = self.pass.plan.problem.scheme.tableau.slopes_at(x);
        let mut sums = vec![0.0; size / batch];
        for (b, k) in slopes.iter().zip(self.stepper.ks.chunks_exact(size)) {
            if *b == 0.0 {
                continue;
            }
            let k = k.iter().skip(at).step_by(batch);
            for (sum, k) in sums.iter_mut().zip(k) {
                *sum += b * k.wide();
            }
        }
        sums
    }

    /// Marks the states of a row that were not reached.
    pub(super) fn void(&mut self, row: usize, reached: &[usize]) {
        let mut is_there = vec![false; self.pass.plan.problem.outputs()];
        for &output in reached {
            is_there[output] = true;
        }
        for (output, is_there) in is_there.into_iter().enumerate() {
            if !is_there {
                self.returned(row, output).fill(T::of(f64::NAN));
            }
        }
    }
}
