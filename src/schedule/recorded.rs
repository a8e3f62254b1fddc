//! Steps that are stored: given one by one, or chosen while the solve goes on.

use super::{Inside, Node, Output, Step};
use crate::error::{Error, Result};
use crate::memory::{push, room_within};
use crate::time::{coincide, in_order, TimeGrid};

/// The steps that a solve has taken, in order, and the states that it has returned.
#[derive(Clone, Debug)]
pub(crate) struct Recorded {
    /// Start and length of each step, if they are kept, and how many there were.
    steps: Vec<(f64, f64)>,
    count: usize,
    keeps: bool,
    /// The time at the end of the last one.
    end: f64,
    /// The nodes that are times of the user's, and the outputs that are returned at nodes.
    given: Vec<(usize, Node)>,
    returned: Vec<(usize, usize)>,
    /// By step.
    inside: Vec<Inside>,
    outputs: usize,
    /// Whether a step hands its last stage on as the first of the next, unless there is a break between them.
    joins: bool,
    breaks: Vec<usize>,
}

impl Recorded {
    /// No step yet; the first begins at t.
    pub(crate) fn from(t: f64, joins: bool) -> Self {
        Self {
            steps: vec![],
            count: 0,
            keeps: true,
            end: t,
            given: vec![],
            returned: vec![],
            inside: vec![],
            outputs: 0,
            joins,
            breaks: vec![],
        }
    }

    /// The same, which counts its steps and keeps nothing of them.
    pub(crate) fn counting(self) -> Self {
        Self {
            keeps: false,
            ..self
        }
    }

    /// Bytes of the steps and of the outputs inside them, with the room that more of them will take first.
    pub(crate) fn held(&self) -> u64 {
        let steps = self.steps.capacity() * size_of::<(f64, f64)>();
        (steps + self.inside.capacity() * size_of::<Inside>()) as u64
    }

    /// Makes room for so many more steps, as far as they fill a kilobyte.
    pub(crate) fn reserve(&mut self, steps: usize) {
        const MOST: usize = 1 << 6;
        if !self.keeps {
            return;
        }
        // Without it, memory is found later or refused there.
        let _ = self.steps.try_reserve_exact(steps.min(MOST));
    }

    /// The steps between these times and the ends of the grid; one ends where the field jumps, too.
    pub(super) fn at(
        grid: &TimeGrid,
        times: &[f64],
        output: Output,
        jumps: &[f64],
    ) -> Result<Self> {
        let points = grid.points();
        let (first, last) = (points[0], points[points.len() - 1]);
        let forward = last >= first;
        let mut nodes = room_within("steps", times.len().saturating_add(2))?;
        nodes.push(first);
        nodes.extend(times.iter().filter(|&&t| t != first && t != last));
        // Of one time there is no step, and none may be asked for.
        let is_still = points.len() == 1;
        if !is_still {
            nodes.push(last);
        }
        // Of NaN nothing is true.
        let follows = |w: &[f64]| (w[0] < w[1] && forward) || (w[0] > w[1] && !forward);
        if let Some(index) = nodes.windows(2).position(|w| is_still || !follows(w)) {
            return Err(Error::StepTimes {
                t0: nodes[index],
                t1: nodes[index + 1],
                first,
                last,
            });
        }
        let too_long = |w: &[f64]| !(w[1] - w[0]).is_finite();
        if let Some(index) = nodes.windows(2).position(too_long) {
            return Err(Error::IntervalOverflow {
                index,
                t0: nodes[index],
                t1: nodes[index + 1],
            });
        }
        let inside = |t: f64| follows(&[first, t]) && follows(&[t, last]);
        let jumps = in_order(jumps, forward);
        let mut ahead = jumps.iter().copied().filter(|&t| inside(t)).peekable();
        let mut all: Vec<f64> = room_within("steps", nodes.len().saturating_add(jumps.len()))?;
        for node in nodes {
            while let Some(jump) = ahead.next_if(|&jump| follows(&[jump, node])) {
                let near = |t: f64| coincide(t, jump);
                if !near(node) && !all.last().is_some_and(|&t| near(t)) {
                    all.push(jump);
                }
            }
            all.push(node);
        }
        let nodes = all;
        let mut ahead = jumps.into_iter().peekable();
        let mut record = Self::from(first, false);
        let mut points = points.iter().enumerate().peekable();
        let is_last = |i: usize| i + 1 == grid.points().len();
        for w in std::iter::once([first, first]).chain(nodes.windows(2).map(|w| [w[0], w[1]])) {
            if w[0] != w[1] {
                record.push(w[0], w[1] - w[0], w[1])?;
            }
            while ahead
                .next_if(|&t| follows(&[t, w[1]]) && !coincide(t, w[1]))
                .is_some()
            {}
            if ahead.peek().is_some_and(|&jump| coincide(jump, w[1])) {
                record.break_here();
            }
            if output == Output::Steps {
                record.ret(record.len())?;
            }
            while let Some((i, &t)) = points.next_if(|(_, &t)| t == w[1] || follows(&[t, w[1]])) {
                let number = match output {
                    Output::All => Some(i),
                    Output::Final => is_last(i).then_some(0),
                    Output::Steps => None,
                };
                if t == w[1] {
                    record.mark(i)?;
                    number.map_or(Ok(()), |number| record.ret(number))?;
                } else if let Some(number) = number {
                    record.save((t - w[0]) / (w[1] - w[0]), number, Some(i))?;
                }
            }
        }
        Ok(record)
    }

    /// Another step.
    pub(crate) fn push(&mut self, t: f64, h: f64, end: f64) -> Result<()> {
        keep(self.keeps, &mut self.steps, (t, h))?;
        self.count += 1;
        self.end = end;
        Ok(())
    }

    /// The end so far is the user's time `given`.
    pub(crate) fn mark(&mut self, given: usize) -> Result<()> {
        let at = (self.count, Node::Between(given, 0.0));
        keep(self.keeps, &mut self.given, at)
    }

    /// An output is returned at the end so far.
    pub(crate) fn ret(&mut self, output: usize) -> Result<()> {
        self.outputs = self.outputs.max(output + 1);
        keep(self.keeps, &mut self.returned, (self.count, output))
    }

    /// An output is returned at a fraction x of the last step.
    pub(crate) fn save(&mut self, x: f64, output: usize, given: Option<usize>) -> Result<()> {
        self.outputs = self.outputs.max(output + 1);
        let inside = Inside {
            step: self.count - 1,
            output,
            given,
            x,
        };
        keep(self.keeps, &mut self.inside, inside)
    }

    /// The same steps, with states returned at these places, each a step and a fraction of it.
    pub(crate) fn returning(&self, places: &[(usize, f64)]) -> Self {
        let of = |(output, &(step, x)): (usize, &(usize, f64))| Inside {
            step,
            output,
            given: Some(output),
            x,
        };
        let mut inside: Vec<_> = places.iter().enumerate().map(of).collect();
        inside.sort_by_key(|inside| inside.step);
        Self {
            given: vec![],
            returned: vec![],
            outputs: places.len(),
            inside,
            ..self.clone()
        }
    }

    /// The next step begins with an evaluation of its own.
    pub(crate) fn break_here(&mut self) {
        if self.keeps {
            self.breaks.push(self.count);
        }
    }

    /// t_0 … t_N.
    pub(crate) fn times(&self) -> impl Iterator<Item = f64> + '_ {
        let starts = self.steps.iter().map(|(t, _)| *t);
        starts.chain(std::iter::once(self.end))
    }

    /// How many steps there were.
    pub(crate) fn len(&self) -> usize {
        self.count
    }

    /// The signed length of step n < len.
    pub(crate) fn length(&self, n: usize) -> f64 {
        self.steps[n].1
    }

    /// Step n < len.
    pub(crate) fn step(&self, n: usize) -> Step {
        let (t, h) = self.steps[n];
        let end = self.steps.get(n + 1).map_or(self.end, |next| next.0);
        let step = Step {
            index: n,
            t,
            h,
            end,
            limits: [t, end],
            nodes: [n, n + 1].map(|n| self.node(n)),
            dense: !self.inside(n).is_empty() && !self.is_joined(n + 1),
        };
        step.between_jumps([n, n + 1].map(|n| self.breaks.binary_search(&n).is_ok()))
    }

    fn node(&self, n: usize) -> Node {
        let node = match self.given.binary_search_by_key(&n, |(n, _)| *n) {
            Ok(i) => self.given[i].1,
            Err(_) => Node::Constant,
        };
        // The ends of the solve move with their times.
        let is_inner = n > 0 && n < self.len();
        match is_inner && self.breaks.binary_search(&n).is_ok() {
            true => node.at_jump(),
            false => node,
        }
    }

    pub(super) fn steps(&self) -> impl Iterator<Item = Step> + '_ {
        (0..self.len()).map(|n| self.step(n))
    }

    pub(super) fn outputs(&self) -> usize {
        self.outputs
    }

    /// The numbers of all states that are returned.
    pub(crate) fn numbers(&self) -> impl Iterator<Item = usize> + '_ {
        let at_nodes = self.returned.iter().map(|(_, output)| *output);
        at_nodes.chain(self.inside.iter().map(|inside| inside.output))
    }

    /// The number of the state that is returned at node n.
    pub(crate) fn at_node(&self, n: usize) -> Option<usize> {
        let i = self.returned.binary_search_by_key(&n, |(n, _)| *n).ok()?;
        Some(self.returned[i].1)
    }

    /// The states that are returned inside step n.
    pub(crate) fn inside(&self, n: usize) -> &[Inside] {
        let from = self.inside.partition_point(|inside| inside.step < n);
        let count = self.inside[from..].partition_point(|inside| inside.step == n);
        &self.inside[from..from + count]
    }

    pub(super) fn is_dense(&self) -> bool {
        !self.inside.is_empty()
    }

    /// Whether step n begins with the last stage of the one before.
    pub(crate) fn is_joined(&self, n: usize) -> bool {
        let inner = n > 0 && n < self.len();
        self.joins && inner && self.breaks.binary_search(&n).is_err()
    }
}

/// One more of many, where they are kept.
fn keep<N>(keeps: bool, many: &mut Vec<N>, one: N) -> Result<()> {
    match keeps {
        true => push("steps", many, one),
        false => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_that_are_only_counted_take_no_memory() {
        let mut kept = Recorded::from(0.0, true);
        let mut counted = Recorded::from(0.0, true).counting();
        for record in [&mut kept, &mut counted] {
            record.reserve(8);
            record.mark(0).unwrap();
            record.ret(0).unwrap();
            for n in 0..1000 {
                let t = f64::from(n);
                record.push(t, 1.0, t + 1.0).unwrap();
                record.save(0.5, n as usize + 1, None).unwrap();
                record.break_here();
            }
            assert_eq!((record.len(), record.outputs()), (1000, 1001));
        }
        assert!(kept.held() >= 1000 * 16 && counted.held() == 0);
        assert_eq!(kept.numbers().count(), 1001);
        assert_eq!(kept.times().last(), Some(1000.0));
    }
}
