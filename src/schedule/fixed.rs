//! Steps that are known before the solve: equal parts of every output interval.

use candle_core::DType;

use super::{is_moderate, Node, Output, Step, Steps};
use crate::error::{Error, Result};
use crate::time::{coincide, in_order, TimeGrid};

/// The steps of a solve: their number is stored, but not the steps; step n is computed on request.
#[derive(Clone, Debug)]
pub(crate) struct Fixed {
    pieces: Vec<Piece>,
    /// Steps before each piece, and in all.
    first: Vec<usize>,
    output: Output,
    outputs: usize,
    /// t_0.
    start: f64,
}

/// An output interval, or a part of one that ends where the field jumps, cut into equal steps.
#[derive(Clone, Debug)]
struct Piece {
    ends: [f64; 2],
    steps: usize,
    /// The output interval, and what the ends depend on.
    interval: usize,
    nodes: [Node; 2],
    /// Whether the field jumps at the ends.
    jumps: [bool; 2],
}

impl Piece {
    /// The j-th of the times between steps.
    fn at(&self, j: f64) -> f64 {
        let [t0, t1] = self.ends;
        match j == self.steps as f64 {
            true => t1,
            false => t0 + (t1 - t0) * (j / self.steps as f64),
        }
    }

    /// What it depends on.
    fn node(&self, j: f64) -> Node {
        match self.nodes {
            [Node::Between(i, from), Node::Between(_, to)] => {
                Node::Between(i, from + (to - from) * (j / self.steps as f64))
            }
            [start, _] if j == 0.0 => start,
            [_, end] => end,
        }
    }

    /// The length of a step.
    fn h(&self) -> f64 {
        (self.ends[1] - self.ends[0]) / self.steps as f64
    }

    /// The steps from the j-th to the k-th.
    fn part(&self, j: usize, k: usize) -> Option<Self> {
        let last = k == self.steps;
        (j < k).then(|| Self {
            ends: [self.at(j as f64), self.at(k as f64)],
            steps: k - j,
            interval: self.interval,
            nodes: [self.node(j as f64), self.node(k as f64)],
            jumps: [self.jumps[0] && j == 0, self.jumps[1] && last],
        })
    }
}

/// Numbers of steps are whole numbers in f64, and fit `usize`.
const COUNTABLE: f64 = if usize::BITS < 64 {
    usize::MAX as f64
} else {
    (1u64 << f64::MANTISSA_DIGITS) as f64
};

impl Fixed {
    /// Equal steps, of a number or a size.
    pub(super) fn new(grid: &TimeGrid, steps: &Steps, output: Output) -> Result<Self> {
        match *steps {
            Steps::PerInterval(0) => return Err(Error::NoSteps),
            Steps::Size(size) if !(size > 0.0 && size.is_finite()) => {
                return Err(Error::InvalidStepSize { step_size: size })
            }
            _ => {}
        }
        let parts = |w: &[f64]| match *steps {
            // An interval of exactly m sizes is cut in m, although the quotient may round above it.
            Steps::Size(size) => (((w[1] - w[0]).abs() / size) * (1.0 - 4.0 * f64::EPSILON))
                .ceil()
                .max(1.0),
            Steps::PerInterval(m) => m as f64,
            _ => 1.0,
        };
        let (mut pieces, mut count) = (vec![], 0.0);
        for (interval, w) in grid.points().windows(2).enumerate() {
            if !(w[1] - w[0]).is_finite() {
                return Err(Error::IntervalOverflow {
                    index: interval,
                    t0: w[0],
                    t1: w[1],
                });
            }
            let parts = parts(w);
            count += parts;
            if count >= COUNTABLE {
                return Err(Error::TooManySteps {
                    steps: format!("{steps:?}"),
                    interval,
                    count,
                });
            }
            pieces.push(Piece {
                ends: [w[0], w[1]],
                steps: parts as usize,
                interval,
                nodes: [0.0, 1.0].map(|s| Node::Between(interval, s)),
                jumps: [false; 2],
            });
        }
        let plan = Self::of(pieces, output, grid.points().len(), grid.points()[0]);
        // Steps of one piece are equal, so its first and last tell whether any vanishes.
        for i in 0..plan.pieces.len() {
            for n in [plan.first[i], plan.first[i + 1] - 1] {
                let step = plan.step(n);
                if step.t + step.h == step.t {
                    return Err(Error::StepUnderflow { step: n, t: step.t });
                }
            }
        }
        Ok(plan)
    }

    fn of(pieces: Vec<Piece>, output: Output, points: usize, start: f64) -> Self {
        let mut first = vec![0];
        for piece in &pieces {
            first.push(first[first.len() - 1] + piece.steps);
        }
        Self {
            outputs: match output {
                Output::All => points,
                Output::Final => 1,
                Output::Steps => first[pieces.len()] + 1,
            },
            pieces,
            first,
            output,
            start,
        }
    }

    /// The same steps, cut in two where the field jumps inside of one.
    pub(super) fn cut(self, jumps: &[f64]) -> Self {
        let forward = self.pieces.iter().all(|piece| piece.h() > 0.0);
        let before = |a: f64, b: f64| (a < b) == forward && !coincide(a, b);
        // In one sweep: pieces that no further jump can meet, and those ahead, the next one last.
        let mut done = vec![];
        let mut ahead: Vec<_> = self.pieces.into_iter().rev().collect();
        for t in in_order(jumps, forward) {
            while let Some(piece) = ahead.pop_if(|piece| before(piece.ends[1], t)) {
                done.push(piece);
            }
            let close = |end: f64| coincide(t, end);
            let mut next = vec![];
            while let Some(mut piece) = ahead.pop_if(|piece| !before(t, piece.ends[0])) {
                let [t0, t1] = piece.ends;
                // In steps from the start of the piece.
                let place = (t - t0) / piece.h();
                let (j, k) = (place.floor(), place.floor() + 1.0);
                for (i, end) in [t0, t1].into_iter().enumerate() {
                    piece.jumps[i] |= close(end);
                }
                if !(0.0..piece.steps as f64).contains(&place) || close(t0) || close(t1) {
                    next.push(piece);
                    continue;
                }
                let near = [j, k].into_iter().find(|&j| close(piece.at(j)));
                let jump = |side: usize, piece: Option<Piece>| {
                    piece.map(|mut piece| {
                        piece.jumps[side] = true;
                        piece
                    })
                };
                if let Some(j) = near {
                    let j = j as usize;
                    next.extend(jump(1, piece.part(0, j)));
                    next.extend(jump(0, piece.part(j, piece.steps)));
                    continue;
                }
                let (j, k) = (j as usize, k as usize);
                next.extend(piece.part(0, j));
                if let Some(step) = piece.part(j, k) {
                    let half = |side: usize| {
                        let mut half = step.clone();
                        half.ends[1 - side] = t;
                        half.nodes[1 - side] = Node::Constant;
                        half.jumps[1 - side] = true;
                        half
                    };
                    next.extend([half(0), half(1)]);
                }
                next.extend(piece.part(k, piece.steps));
            }
            ahead.extend(next.into_iter().rev());
        }
        done.extend(ahead.into_iter().rev());
        let points = match self.output {
            Output::All => self.outputs,
            Output::Final | Output::Steps => 0,
        };
        Self::of(done, self.output, points, self.start)
    }

    /// Whether no step can begin and end at one number of this dtype.
    pub(super) fn is_resolved_in(&self, dtype: DType) -> bool {
        if dtype == DType::F64 {
            // Or the plan would not be.
            return true;
        }
        self.pieces.iter().all(|piece| {
            let [t0, t1] = piece.ends;
            let largest = t0.abs().max(t1.abs()) as f32;
            let spacing = largest.next_up() - largest;
            piece.h().abs() > spacing.into()
        })
    }

    /// Whether every step is within so many octaves of one.
    pub(super) fn is_moderate(&self, octaves: i32) -> bool {
        self.pieces
            .iter()
            .all(|piece| is_moderate(piece.h(), octaves))
    }

    /// Number of steps.
    pub(super) fn len(&self) -> usize {
        self.first.last().copied().unwrap_or(0)
    }

    /// Number of states that are returned.
    pub(super) fn outputs(&self) -> usize {
        self.outputs
    }

    /// The number of the state that is returned at node n.
    pub(super) fn at_node(&self, n: usize) -> Option<usize> {
        match self.output {
            Output::Final => (n == self.len()).then_some(0),
            Output::Steps => Some(n),
            Output::All if n == 0 => Some(0),
            Output::All => {
                let piece = &self.pieces[self.first.binary_search(&n).ok()? - 1];
                let ends = matches!(piece.nodes[1], Node::Between(_, 1.0));
                ends.then_some(piece.interval + 1)
            }
        }
    }

    /// t_0 … t_N.
    pub(super) fn times(&self) -> impl Iterator<Item = f64> + '_ {
        let ends = (0..self.len()).map(|n| self.step(n).end);
        std::iter::once(self.start).chain(ends)
    }

    /// The piece that step n < len is in.
    fn piece(&self, n: usize) -> usize {
        // Where all have as many steps it is this one.
        let even = n.checked_mul(self.pieces.len()).map(|n| n / self.len());
        let even = even.filter(|&i| self.first[i] <= n && n < self.first[i + 1]);
        even.unwrap_or_else(|| self.first.partition_point(|&f| f <= n) - 1)
    }

    /// Step n < len.
    pub(super) fn step(&self, n: usize) -> Step {
        let i = self.piece(n);
        let (piece, j) = (&self.pieces[i], (n - self.first[i]) as f64);
        let [t, end] = [j, j + 1.0].map(|j| piece.at(j));
        let mut step = Step {
            index: n,
            t,
            h: piece.h(),
            end,
            limits: [t, end],
            nodes: [j, j + 1.0].map(|j| piece.node(j)),
            dense: false,
        };
        let [start_jumps, end_jumps] = piece.jumps;
        let is_last = n + 1 == self.first[i + 1];
        let jumps = [start_jumps && j == 0.0, end_jumps && is_last];
        // The ends of the solve move with their times.
        if jumps[0] && n > 0 {
            step.nodes[0] = step.nodes[0].at_jump();
        }
        if jumps[1] && n + 1 < self.len() {
            step.nodes[1] = step.nodes[1].at_jump();
        }
        match jumps {
            [false, false] => step,
            _ => step.between_jumps(jumps),
        }
    }
}
