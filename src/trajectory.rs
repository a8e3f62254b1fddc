//! The trajectory: what the forward pass keeps of y_0 … y_{N−1}, and how the backward pass gets the
//! rest back.
//!
//! Backward needs ŷ_n = Q_store(y_n) for n = N−1 … 0.  A plan keeps all of them, or restart states
//! y_n in **state** precision from which the steps between are taken again; ŷ_n is formed from the
//! same y_n either way, so every plan gives the same bits.
//!
//! The budget plan is binomial checkpointing: Griewank & Walther, "Algorithm 799: revolve", ACM
//! Trans. Math. Software 26 (2000): with s states and at most r replays of each step,
//! β(s, r) = C(s + r, s) steps can be reversed, and no schedule does better.

use candle_core::Tensor;

use crate::error::{Error, Result};
use crate::precision::Roles;
use crate::stats::Stats;

/// What a solve keeps for its backward pass.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Checkpoint {
    /// Every state, in store precision.
    #[default]
    All,
    /// Every k-th state in state precision; the backward pass replays one segment at a time and
    /// holds its k states in store precision.
    Every(usize),
    /// At most this many states at any time, in state precision, placed so that the fewest steps
    /// are replayed.
    States(usize),
    /// As many states as fit into this many bytes, placed as by [`Checkpoint::States`].
    Bytes(usize),
    /// Nothing: the solution has no gradients.
    Nothing,
}

/// A [`Checkpoint`] for N steps of a given size.
#[derive(Clone, Copy, Debug)]
enum Plan {
    All,
    Every(usize),
    States(usize),
    Nothing,
}

/// How states of type Y are kept.
pub(crate) trait Store<Y> {
    /// ŷ = Q_store(y).
    fn stored(&self, y: &Y) -> Result<Y>;

    /// Size of a state.
    fn bytes(&self, y: &Y) -> usize;
}

impl Store<Vec<Tensor>> for Vec<Roles> {
    fn stored(&self, y: &Vec<Tensor>) -> Result<Vec<Tensor>> {
        let round = |(y, roles): (&Tensor, &Roles)| roles.store.round(y);
        y.iter().zip(self).map(round).collect()
    }

    fn bytes(&self, y: &Vec<Tensor>) -> usize {
        let of = |y: &Tensor| y.elem_count() * y.dtype().size_in_bytes();
        y.iter().map(of).sum()
    }
}

/// The states that were kept, by step.
#[derive(Clone)]
pub(crate) struct Trajectory<Y = Vec<Tensor>, K = Vec<Roles>> {
    plan: Plan,
    store: K,
    kept: Vec<(usize, Y)>,
    /// Steps whose start the budget plan keeps from the forward pass, ascending.
    marks: Vec<usize>,
}

impl<Y: Clone, K: Store<Y>> Trajectory<Y, K> {
    /// An empty trajectory for N steps from y0, which is in state precision.
    pub(crate) fn new(checkpoint: Checkpoint, steps: usize, store: K, y0: &Y) -> Result<Self> {
        let needed = store.bytes(y0);
        let plan = match checkpoint {
            Checkpoint::All => Plan::All,
            Checkpoint::Nothing => Plan::Nothing,
            Checkpoint::Every(k) if k > 0 => Plan::Every(k),
            Checkpoint::States(b) if b > 0 => Plan::States(b),
            Checkpoint::Bytes(b) if b >= needed => Plan::States(b / needed),
            _ => return Err(Error::InvalidCheckpoint { needed }),
        };
        let marks = match plan {
            Plan::States(budget) => marks(steps, budget),
            _ => vec![],
        };
        Ok(Self {
            plan,
            store,
            kept: vec![],
            marks,
        })
    }

    /// Whether a backward pass is possible.
    pub(crate) fn can_rewind(&self) -> bool {
        !matches!(self.plan, Plan::Nothing)
    }

    /// Whether y_n is to be kept; n ascends from 0.
    pub(crate) fn wants(&self, n: usize) -> bool {
        match self.plan {
            Plan::All => true,
            Plan::Every(k) => n.is_multiple_of(k),
            Plan::States(_) => self.marks.get(self.kept.len()) == Some(&n),
            Plan::Nothing => false,
        }
    }

    /// Offers y_n at the start of step n; n ascends from 0.
    pub(crate) fn offer(&mut self, n: usize, y: &Y) -> Result<()> {
        if self.wants(n) {
            let y = match self.plan {
                Plan::All => self.store.stored(y)?,
                _ => y.clone(),
            };
            self.kept.push((n, y));
        }
        Ok(())
    }

    /// Notes what is kept.
    pub(crate) fn record(&self, stats: &mut Stats) {
        let of = |(_, y): &(usize, Y)| self.store.bytes(y);
        stats.kept(self.kept.len(), self.kept.iter().map(of).sum());
    }

    /// Starts a backward pass; the trajectory stays as it is, for further ones.
    pub(crate) fn rewind(&self) -> Rewind<'_, Y, K> {
        Rewind {
            trajectory: self,
            kept: self.kept.clone(),
            segment: vec![],
        }
    }
}

/// A backward pass over a trajectory: hands out ŷ_{N−1}, …, ŷ_0.
pub(crate) struct Rewind<'t, Y, K> {
    trajectory: &'t Trajectory<Y, K>,
    /// Restart states still needed.
    kept: Vec<(usize, Y)>,
    /// ŷ of the segment being reversed (plan `Every`), last step last.
    segment: Vec<Y>,
}

impl<Y: Clone, K: Store<Y>> Rewind<'_, Y, K> {
    /// ŷ_n; n descends from N − 1.  `advance(n, y_n)` is y_{n+1}.
    pub(crate) fn state(
        &mut self,
        n: usize,
        mut advance: impl FnMut(usize, &Y) -> Result<Y>,
        stats: &mut Stats,
    ) -> Result<Y> {
        let store = &self.trajectory.store;
        match self.trajectory.plan {
            Plan::All | Plan::Nothing => match self.kept.pop() {
                Some((at, y)) if at == n => Ok(y),
                _ => Err(Error::InvalidCheckpoint { needed: 1 }),
            },
            Plan::Every(_) => {
                if self.segment.is_empty() {
                    let (at, mut y) = self.pop()?;
                    for m in at..n {
                        self.segment.push(store.stored(&y)?);
                        y = advance(m, &y)?;
                    }
                    self.segment.push(store.stored(&y)?);
                    self.record(stats);
                }
                self.segment
                    .pop()
                    .ok_or(Error::InvalidCheckpoint { needed: 1 })
            }
            Plan::States(budget) => {
                let (mut at, mut y) = self.pop()?;
                while at < n {
                    // The state at hand stays kept; a further one, while the budget lasts, goes
                    // where the binomial schedule wants it, and otherwise replay runs up to n.
                    self.kept.push((at, y.clone()));
                    let free = budget.saturating_sub(self.kept.len());
                    let next = at + split(n + 1 - at, free + 1);
                    for m in at..next {
                        y = advance(m, &y)?;
                    }
                    at = next;
                    self.record(stats);
                }
                store.stored(&y)
            }
        }
    }

    fn pop(&mut self) -> Result<(usize, Y)> {
        self.kept
            .pop()
            .ok_or(Error::InvalidCheckpoint { needed: 1 })
    }

    fn record(&self, stats: &mut Stats) {
        let store = &self.trajectory.store;
        let kept: usize = self.kept.iter().map(|(_, y)| store.bytes(y)).sum();
        let segment: usize = self.segment.iter().map(|y| store.bytes(y)).sum();
        stats.kept(self.kept.len() + self.segment.len(), kept + segment);
    }
}

/// Steps of which the forward pass keeps the start, for `budget` states and N steps.
fn marks(steps: usize, budget: usize) -> Vec<usize> {
    let mut marks = vec![];
    let mut at = 0;
    while at < steps && marks.len() < budget {
        marks.push(at);
        let free = budget - marks.len();
        if free == 0 || at + 1 == steps {
            break;
        }
        at += split(steps - at, free + 1);
    }
    marks
}

/// β(s, r) = C(s + r, s), saturating.
fn reversible(states: usize, replays: usize) -> u128 {
    let (small, large) = (states.min(replays) as u128, states.max(replays) as u128);
    let mut beta = 1u128;
    for i in 1..=small {
        beta = match beta.checked_mul(large + i) {
            Some(product) => product / i,
            None => return u128::MAX,
        };
    }
    beta
}

/// Where to put the next state when `steps` ≥ 2 remain and `states` are to be had, the one at their
/// start included: the number of steps to take first.  One state: all but the last step.
fn split(steps: usize, states: usize) -> usize {
    if states <= 1 || steps <= 1 {
        return steps.saturating_sub(1);
    }
    let length = steps as u128;
    let mut replays = 1;
    while reversible(states, replays) < length {
        replays += 1;
    }
    // Optimal splits m satisfy β(s, r−2) ≤ m ≤ β(s, r−1) and β(s−1, r−1) ≤ l − m ≤ β(s−1, r).
    let least = length.saturating_sub(reversible(states - 1, replays));
    let below = if replays >= 2 {
        reversible(states, replays - 2)
    } else {
        1
    };
    least.max(below).clamp(1, length - 1) as usize
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Fewest steps that any schedule replays to reverse l steps with s states, by dynamic
    /// programming; the adjoint of a step starts from its state and takes no replay here.
    fn fewest(
        l: usize,
        s: usize,
        memo: &mut std::collections::HashMap<(usize, usize), usize>,
    ) -> usize {
        if l <= 1 {
            return 0;
        }
        if s == 1 {
            return l * (l - 1) / 2;
        }
        if let Some(&known) = memo.get(&(l, s)) {
            return known;
        }
        let best = (1..l)
            .map(|m| m + fewest(l - m, s - 1, memo) + fewest(m, s, memo))
            .min()
            .unwrap_or(0);
        memo.insert((l, s), best);
        best
    }

    fn replayed(l: usize, s: usize) -> usize {
        if l <= 1 {
            return 0;
        }
        if s == 1 {
            return l * (l - 1) / 2;
        }
        let m = split(l, s);
        m + replayed(l - m, s - 1) + replayed(m, s)
    }

    #[test]
    fn splits_are_optimal() {
        let mut memo = Default::default();
        for l in 1..60 {
            for s in 1..12 {
                assert_eq!(
                    replayed(l, s),
                    fewest(l, s, &mut memo),
                    "{l} steps, {s} states"
                );
            }
        }
    }
}
