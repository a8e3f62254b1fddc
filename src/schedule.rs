//! The steps of a solve as data: the steps that the backward pass traverses, and the states that the solve returns.
//!
//! Nodes t_0 … t_N bound the steps: step n goes from node n to node n + 1.  A returned state lies either at a node,
//! where it is y_n, or inside step n at the time t_n + x h, where it is y_n + h Σ b_i(x) k_i with the weights b_i(x)
//! of the method's interpolant (see [`crate::tableau`]).

mod fixed;
mod recorded;

use candle_core::DType;

use crate::adaptive::Adaptive;
use crate::error::Result;
use crate::time::{beside, Time, TimeGrid};
use fixed::Fixed;
pub(crate) use recorded::Recorded;

/// How the time between outputs is cut into steps.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum Steps {
    /// m equal steps in every output interval.
    PerInterval(usize),
    /// ⌈|t_{i+1} − t_i| / size⌉ equal steps in every output interval, so none is longer than `size`.
    Size(f64),
    /// Steps between these times, wherever the outputs are: an output inside a step is interpolated, see
    /// [`Tableau::with_interpolant`](crate::tableau::Tableau::with_interpolant).  Steps begin at the first time of the
    /// solve and end at its last time in any case; these times need not be in the list.
    At(Vec<f64>),
    /// Steps that are as long as a tolerance permits.
    Adaptive(Adaptive),
}

impl Default for Steps {
    fn default() -> Self {
        Self::PerInterval(1)
    }
}

/// Which states a solve returns.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Output {
    /// A state for every given time: tensors of shape `(times, …)`.
    #[default]
    All,
    /// The state at the last time: tensors of shape `(…)`.
    Final,
    /// A state for every node of the solve (its start, and the end of every step that was taken): tensors of shape
    /// `(steps + 1, …)`.  A given time at which no step ends, which is possible with adaptive steps and with
    /// [`Steps::At`], has no state of its own.  [`Solution::times`](crate::Solution::times) are the times of the states.
    ///
    /// With adaptive steps, the whole batch then has the same steps
    /// ([`StepControl::Batch`](crate::options::StepControl::Batch)).  Rows with steps of their own would have
    /// different numbers of states, and asking for them is an error
    /// ([`AdaptiveDefect::StepsOfRows`](crate::error::AdaptiveDefect::StepsOfRows)).
    Steps,
}

/// How a node depends on the times that the user gave.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Node {
    /// It is t_i + s (t_{i+1} − t_i), 0 ≤ s ≤ 1.
    Between(usize, f64),
    /// The field jumps there, and t_i is the same time: steps end at the jump, wherever t_i is moved.
    AtJump(usize),
    /// It is a constant.
    Constant,
}

impl Node {
    /// The derivative with respect to each of the user's times that it depends on.
    pub(crate) fn derivatives(self) -> impl Iterator<Item = (usize, f64)> {
        let of = match self {
            Self::Between(i, s) => [(i, 1.0 - s), (i + 1, s)],
            Self::AtJump(_) | Self::Constant => [(0, 0.0); 2],
        };
        of.into_iter().filter(|(_, d)| *d != 0.0)
    }

    /// What the time of a state that is returned here depends on, which a step need not end at.
    pub(crate) fn of_output(self) -> Self {
        match self {
            Self::AtJump(i) => Self::Between(i, 0.0),
            other => other,
        }
    }

    /// The same node between two steps, where the field jumps.
    fn at_jump(self) -> Self {
        match self {
            Self::Between(i, 0.0) => Self::AtJump(i),
            Self::Between(i, 1.0) => Self::AtJump(i + 1),
            _ => Self::Constant,
        }
    }
}

/// One step [t, t + h].
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Step {
    /// Number of the step in the solve.
    pub(crate) index: usize,
    /// Time at its start.
    pub(crate) t: f64,
    /// Signed length.
    pub(crate) h: f64,
    /// Time at its end: the start of the next step, or the output time that it ends on, to the bit.
    pub(crate) end: f64,
    /// What its start and its end depend on.
    pub(crate) nodes: [Node; 2],
    /// The times at which stages at its start and at its end are evaluated: these, or next to them inside the step
    /// where the field jumps.
    pub(crate) limits: [f64; 2],
    /// Whether outputs inside it read stages that the state at its end does not.
    pub(crate) dense: bool,
}

impl Step {
    /// A step whose ends depend on none of the user's times.
    pub(crate) fn free(index: usize, t: f64, h: f64, end: f64) -> Self {
        Self {
            index,
            t,
            h,
            end,
            nodes: [Node::Constant; 2],
            limits: [t, end],
            dense: false,
        }
    }

    /// Time of a stage at abscissa c.
    pub(crate) fn at(&self, c: f64) -> f64 {
        match c {
            0.0 => self.limits[0],
            1.0 => self.limits[1],
            _ => self.t + c * self.h,
        }
    }

    /// The same step where the field jumps at its start or at its end: it is evaluated on the step's own side.
    pub(crate) fn between_jumps(self, [start, end]: [bool; 2]) -> Self {
        // A step of length zero has a direction, too: a lane that waits behind a jump is evaluated there.
        let forward = self.h.is_sign_positive();
        Self {
            limits: [
                if start {
                    beside(self.t, forward)
                } else {
                    self.t
                },
                if end {
                    beside(self.end, !forward)
                } else {
                    self.end
                },
            ],
            ..self
        }
    }

    /// What the tensor of a time within it shows: in f32 the neighbour, inside the step, of the number that a jump at one of
    /// its ends rounds to.
    pub(crate) fn shown(&self, t: f64, dtype: DType) -> f64 {
        let forward = self.h.is_sign_positive();
        let after = match self.limits {
            [start, _] if t == start && start != self.t => forward,
            [_, end] if t == end && end != self.end => !forward,
            _ => return t,
        };
        match (dtype, after) {
            (DType::F32, true) => (t as f32).next_up().into(),
            (DType::F32, false) => (t as f32).next_down().into(),
            _ => t,
        }
    }

    /// A time within it, which knows so.
    pub(crate) fn within(&self, time: Time) -> Time {
        let shown = self.shown(time.peek(), time.kind().0);
        time.within(self.index, [self.t, self.end]).shown_as(shown)
    }

    /// Whether it begins and ends at one number of this dtype.
    pub(crate) fn stands_still_in(&self, dtype: DType) -> bool {
        let end = self.t + self.h;
        match dtype {
            DType::F64 => self.t == end,
            _ => self.t as f32 == end as f32,
        }
    }
}

/// A state that is returned between the ends of a step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Inside {
    pub(crate) step: usize,
    /// Its number among the returned states.
    pub(crate) output: usize,
    /// The user's time that it is at; an event has none.
    pub(crate) given: Option<usize>,
    /// Where it is: t = t_n + x h.
    pub(crate) x: f64,
}

/// The steps of a solve.
#[derive(Clone, Debug)]
pub(crate) enum Schedule {
    /// Computed on request.
    Fixed(Fixed),
    /// Stored one by one.
    Recorded(Recorded),
}

impl Schedule {
    /// Steps that are known before the solve; where the field jumps, a step ends.
    pub(crate) fn new(
        grid: &TimeGrid,
        steps: &Steps,
        output: Output,
        jumps: &[f64],
    ) -> Result<Self> {
        Ok(match steps {
            Steps::At(times) => Self::Recorded(Recorded::at(grid, times, output, jumps)?),
            _ => Self::Fixed(Fixed::new(grid, steps, output)?.cut(jumps)),
        })
    }

    /// Number of steps N.
    pub(crate) fn len(&self) -> usize {
        match self {
            Self::Fixed(fixed) => fixed.len(),
            Self::Recorded(recorded) => recorded.len(),
        }
    }

    /// Step n < N.
    pub(crate) fn step(&self, n: usize) -> Step {
        match self {
            Self::Fixed(fixed) => fixed.step(n),
            Self::Recorded(recorded) => recorded.step(n),
        }
    }

    /// t_0 … t_N.
    pub(crate) fn times(&self) -> Vec<f64> {
        match self {
            Self::Fixed(fixed) => fixed.times().collect(),
            Self::Recorded(recorded) => recorded.times().collect(),
        }
    }

    /// Number of states that are returned.
    pub(crate) fn outputs(&self) -> usize {
        match self {
            Self::Fixed(fixed) => fixed.outputs(),
            Self::Recorded(recorded) => recorded.outputs(),
        }
    }

    /// The number of the state that is returned at node n ≤ N, if one is.
    pub(crate) fn at_node(&self, n: usize) -> Option<usize> {
        match self {
            Self::Fixed(fixed) => fixed.at_node(n),
            Self::Recorded(recorded) => recorded.at_node(n),
        }
    }

    /// The states that are returned inside step n, in the order of their numbers.
    pub(crate) fn inside(&self, n: usize) -> &[Inside] {
        match self {
            Self::Fixed(_) => &[],
            Self::Recorded(recorded) => recorded.inside(n),
        }
    }

    /// Whether any state is returned inside a step.
    pub(crate) fn is_dense(&self) -> bool {
        match self {
            Self::Fixed(_) => false,
            Self::Recorded(recorded) => recorded.is_dense(),
        }
    }

    /// Whether the first stage of step n is the last stage of the step before, which was evaluated at the same
    /// point.
    pub(crate) fn is_joined(&self, n: usize) -> bool {
        match self {
            Self::Fixed(_) => false,
            Self::Recorded(recorded) => recorded.is_joined(n),
        }
    }

    /// Whether no step can begin and end at one number of this dtype.
    pub(crate) fn is_resolved_in(&self, dtype: DType) -> bool {
        match self {
            Self::Fixed(fixed) => fixed.is_resolved_in(dtype),
            Self::Recorded(recorded) => {
                dtype == DType::F64 || recorded.steps().all(|step| !step.stands_still_in(dtype))
            }
        }
    }

    /// Whether every step is within so many octaves of one.
    pub(crate) fn is_moderate(&self, octaves: i32) -> bool {
        match self {
            Self::Fixed(fixed) => fixed.is_moderate(octaves),
            Self::Recorded(recorded) => recorded.steps().all(|step| is_moderate(step.h, octaves)),
        }
    }
}

/// Whether a length is within so many octaves of one.
fn is_moderate(h: f64, octaves: i32) -> bool {
    let far = 2f64.powi(octaves);
    (1.0 / far..=far).contains(&h.abs())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// So many that comparing each with each would take minutes.
    const MANY: usize = 1 << 16;

    fn times_of(points: &[f64], steps: &Steps, jumps: &[f64]) -> (Vec<f64>, Vec<Step>) {
        let grid = TimeGrid::new(points.to_vec()).unwrap();
        let schedule = Schedule::new(&grid, steps, Output::All, jumps).unwrap();
        let steps = (0..schedule.len()).map(|n| schedule.step(n));
        (schedule.times(), steps.collect())
    }

    fn mirrored(times: &[f64]) -> Vec<f64> {
        times.iter().map(|t| -t).collect()
    }

    #[test]
    fn steps_end_at_each_of_very_many_jumps_on_the_right_side_of_it() {
        let whole: Vec<_> = (0..=MANY).map(|n| n as f64).collect();
        let halves: Vec<_> = (0..MANY).map(|n| n as f64 + 0.5).collect();
        let both: Vec<_> = (0..=2 * MANY).map(|n| n as f64 / 2.0).collect();
        let ends = [0.0, MANY as f64].as_slice();
        let points = whole.as_slice();
        let one = || Steps::PerInterval(1);
        let inner = || Steps::At(whole.clone());
        let many = || Steps::PerInterval(MANY);
        // Points, steps and jumps, and the ends of steps.
        let cases = [
            (points, one(), &halves, &both),
            (points, one(), &whole, &whole),
            (ends, one(), &whole, &whole),
            (ends, many(), &halves, &both),
            (ends, many(), &whole, &whole),
            (ends, inner(), &halves, &both),
            (points, Steps::At(vec![]), &whole, &whole),
        ];
        for (points, steps, jumps, expected) in cases {
            let (there, limits) = times_of(points, &steps, jumps);
            assert_eq!(&there, expected);
            for step in &limits {
                let jumps_at = |t: f64| jumps.binary_search_by(|at| at.total_cmp(&t)).is_ok();
                let inward = [step.limits[0] > step.t, step.limits[1] < step.end];
                assert_eq!(inward, [step.t, step.end].map(jumps_at), "{step:?}");
            }
            // The order in which a field lists them is of no importance.
            let listed: Vec<_> = jumps.iter().rev().copied().collect();
            assert_eq!(times_of(points, &steps, &listed).1, limits);
            let back = match &steps {
                Steps::At(times) => Steps::At(mirrored(times)),
                steps => steps.clone(),
            };
            let (back, _) = times_of(&mirrored(points), &back, &mirrored(&listed));
            assert_eq!(back, mirrored(&there));
        }
    }

    #[test]
    fn jumps_that_differ_from_ends_of_steps_or_from_each_other_by_rounding_cut_nothing() {
        let sum = 0.1 + 0.2;
        for steps in [Steps::PerInterval(1), Steps::At(vec![])] {
            for jumps in [vec![0.3, sum], vec![sum, 0.3], vec![sum, 1.0, 0.3, -1.0]] {
                for points in [[0.0, 1.0f64.next_up()], [1.0f64.next_up(), 0.0]] {
                    let (times, _) = times_of(&points, &steps, &jumps);
                    assert_eq!(times.len(), 3, "{steps:?} {jumps:?} {times:?}");
                }
            }
        }
    }
}
