//! The trajectory: what the forward pass keeps of y_0 … y_{N−1}, and how the backward pass gets the
//! rest back.
//!
//! Backward needs ŷ_n = Q_store(y_n) for n = N−1 … 0.  A plan keeps all of them, or restart states
//! y_n in **state** precision from which the steps between are taken again; ŷ_n is formed from the
//! same y_n either way, so every plan gives the same bits.  A restart state is everything that a step carries: with
//! compensated sums also what rounding has taken from y_n, which ŷ_n does without.
//!
//! The budget plan is binomial checkpointing: Griewank & Walther, "Algorithm 799: revolve", ACM
//! Trans. Math. Software 26 (2000): with s states and at most r replays of each step,
//! β(s, r) = C(s + r, s) steps can be reversed, and no schedule does better.

use std::sync::{Mutex, MutexGuard, PoisonError};

use candle_core::Tensor;

use crate::error::{Error, Result};
use crate::memory::push;
use crate::precision::Roles;
use crate::stats::Stats;

/// What a solve keeps for its backward pass.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Checkpoint {
    /// Every state, in store precision.
    #[default]
    All,
    /// Every k-th state in state precision; the backward pass computes the steps of one segment again at a time, and
    /// holds its k states in store precision.
    Every(usize),
    /// At most this many states at any time, in state precision.  With fixed steps they are placed so that the fewest
    /// steps are computed again (A. Griewank, A. Walther, "Algorithm 799: revolve", ACM Trans. Math. Software 26, 2000); with adaptive steps, up to half as many more may be computed again.  A first
    /// backward pass frees the states that the forward pass kept, all but y_0.  A further backward pass of the same
    /// solve computes all steps again from y_0, with the same bits.
    States(usize),
    /// As many states as fit into this many bytes, placed as with [`Checkpoint::States`].  The bytes are those of the
    /// numbers in the states of the whole batch, as in [`Stats::bytes_kept`](crate::metrics::Stats::bytes_kept); with
    /// [compensated sums](crate::Precision::compensated), and with a method that carries two states from step to step
    /// ([`REVERSIBLE_HEUN`](crate::sde::REVERSIBLE_HEUN)), a state has twice as many.
    Bytes(usize),
    /// Nothing: the solution has no gradients, and its backward pass is an error.
    Nothing,
}

impl Checkpoint {
    /// The most states that are kept at once of N steps, forward or backward: in state precision, of so
    /// many bytes each, and in store precision.
    pub(crate) fn most(self, steps: usize, bytes: usize) -> (usize, usize) {
        match self {
            Self::All => (0, steps),
            Self::Every(k) => (steps.div_ceil(k.max(1)), k.min(steps)),
            Self::States(b) => (b.min(steps), 0),
            Self::Bytes(b) => (steps.min(b / bytes.max(1)), 0),
            Self::Nothing => (0, 0),
        }
    }

    /// An error if not a single state of so many bytes can be kept.
    pub(crate) fn check(self, bytes: usize) -> Result<()> {
        let (option, given, needed) = match self {
            Self::Every(0) => ("Every", 0, 1),
            Self::States(0) => ("States", 0, 1),
            Self::Bytes(b) if b < bytes => ("Bytes", b, bytes),
            _ => return Ok(()),
        };
        Err(Error::InvalidCheckpoint {
            option,
            given,
            needed,
        })
    }
}

/// A [`Checkpoint`] for N steps of a given size.
#[derive(Clone, Copy, Debug)]
enum Placement {
    All,
    Every(usize),
    States(usize),
    /// As many states, at multiples of a stride that doubles whenever there would be more.
    Online {
        budget: usize,
        stride: usize,
    },
    Nothing,
}

/// How states of type Y are kept.
pub(crate) trait Store<Y> {
    /// ŷ = Q_store(y), without what a step carries beside it.
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
pub(crate) struct Trajectory<Y = Vec<Tensor>, K = Vec<Roles>> {
    plan: Placement,
    store: K,
    /// Ascending.  A pass of the budget plan takes all but y_0, which any number of passes share.
    kept: Mutex<Vec<(usize, Y)>>,
    /// The next step whose start the budget plan keeps from the forward pass.
    mark: Option<Mark>,
}

impl<Y: Clone, K: Store<Y>> Trajectory<Y, K> {
    /// An empty trajectory for N steps from y0, which is in state precision.
    pub(crate) fn new(checkpoint: Checkpoint, steps: usize, store: K, y0: &Y) -> Result<Self> {
        let needed = store.bytes(y0);
        checkpoint.check(needed)?;
        let plan = match checkpoint {
            Checkpoint::All => Placement::All,
            Checkpoint::Nothing => Placement::Nothing,
            Checkpoint::Every(k) => Placement::Every(k),
            Checkpoint::States(b) => Placement::States(b),
            Checkpoint::Bytes(b) => Placement::States(b / needed.max(1)),
        };
        let mark = match plan {
            Placement::States(budget) => Mark::first(steps, budget),
            _ => None,
        };
        Ok(Self {
            plan,
            store,
            kept: Mutex::default(),
            mark,
        })
    }

    /// The same for a number of steps that is not known yet.  A budget of states is thinned out as steps are added: the
    /// kept states are at the multiples of a power of two.  The first backward pass replays at most half as many steps
    /// again as with the best placement.
    pub(crate) fn online(checkpoint: Checkpoint, store: K, y0: &Y) -> Result<Self> {
        let mut trajectory = Self::new(checkpoint, 0, store, y0)?;
        if let Placement::States(budget) = trajectory.plan {
            trajectory.plan = Placement::Online { budget, stride: 1 };
        }
        Ok(trajectory)
    }

    /// Whether a backward pass is possible.
    pub(crate) fn can_rewind(&self) -> bool {
        !matches!(self.plan, Placement::Nothing)
    }

    /// Whether y_n is to be kept; n ascends from 0.
    pub(crate) fn wants(&self, n: usize) -> bool {
        match self.plan {
            Placement::All => true,
            Placement::Every(k) => n.is_multiple_of(k),
            Placement::States(_) => self.mark.is_some_and(|mark| mark.at == n),
            Placement::Online { stride, .. } => n.is_multiple_of(stride),
            Placement::Nothing => false,
        }
    }

    /// Offers y_n at the start of step n; n ascends from 0.
    pub(crate) fn offer(&mut self, n: usize, y: &Y) -> Result<()> {
        self.offer_stored(n, y, None)
    }

    /// Whether what is kept are copies in store precision.
    pub(crate) fn keeps_copies(&self) -> bool {
        matches!(self.plan, Placement::All)
    }

    /// The same, with ŷ_n where it is at hand.
    pub(crate) fn offer_stored(&mut self, n: usize, y: &Y, stored: Option<Y>) -> Result<()> {
        if self.wants(n) {
            let y = match (self.plan, stored) {
                (Placement::All, Some(stored)) => stored,
                (Placement::All, None) => self.store.stored(y)?,
                _ => y.clone(),
            };
            push("kept states", &mut self.kept(), (n, y))?;
            if let Placement::Online { budget, stride } = &mut self.plan {
                let kept = self.kept.get_mut().unwrap_or_else(PoisonError::into_inner);
                while kept.len() > *budget {
                    *stride *= 2;
                    kept.retain(|(n, _)| n.is_multiple_of(*stride));
                }
            }
            self.mark = self.mark.and_then(Mark::next);
        }
        Ok(())
    }

    /// How many states are kept.
    pub(crate) fn kept_states(&self) -> usize {
        self.kept().len()
    }

    /// Notes what is kept.
    pub(crate) fn record(&self, stats: &mut Stats) {
        let (states, bytes) = size(&self.store, &self.kept());
        stats.kept(states, bytes);
    }

    /// Starts a backward pass.  Plans `All` and `Every` keep their states for further ones; of the
    /// budget plan's this one takes all but y_0, so that it frees those that it has passed.
    pub(crate) fn rewind(&self) -> Rewind<'_, Y, K> {
        let mut kept = self.kept();
        let own = match self.plan {
            Placement::States(_) | Placement::Online { .. } if !kept.is_empty() => {
                let later = kept.split_off(1);
                kept.iter().cloned().chain(later).collect()
            }
            _ => kept.clone(),
        };
        Rewind {
            trajectory: self,
            kept: own,
            segment: vec![],
            at: None,
            asked: 0,
            target: 0,
        }
    }

    /// The same, from step n on downwards.
    pub(crate) fn rewind_from(&self, n: usize) -> Rewind<'_, Y, K> {
        let mut rewind = self.rewind();
        rewind.kept.retain(|(at, _)| *at <= n);
        rewind
    }

    fn kept(&self) -> MutexGuard<'_, Vec<(usize, Y)>> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A backward pass over a trajectory: hands out ŷ_{N−1}, …, ŷ_0.
pub(crate) struct Rewind<'t, Y, K> {
    trajectory: &'t Trajectory<Y, K>,
    /// Restart states still needed.
    kept: Vec<(usize, Y)>,
    /// ŷ of the segment being reversed (plan `Every`), last step last.
    segment: Vec<Y>,
    /// Where a replay is.
    at: Option<(usize, Y)>,
    /// The step that was asked for, and the node that the replay stops at next.
    asked: usize,
    target: usize,
}

/// What a backward pass is given, or has to give.
pub(crate) enum Next<Y> {
    /// ŷ_n.
    State(Y),
    /// y_m, of which y_{m+1} is needed first.
    Advance(usize, Y),
}

impl<Y: Clone, K: Store<Y>> Rewind<'_, Y, K> {
    /// ŷ_n; n descends from N − 1.  `advance(n, y_n)` is y_{n+1}.
    pub(crate) fn state(
        &mut self,
        n: usize,
        advance: &mut dyn FnMut(usize, &Y) -> Result<Y>,
        stats: &mut Stats,
    ) -> Result<Y> {
        loop {
            match self.ask(n, stats)? {
                Next::State(y) => return Ok(y),
                Next::Advance(m, y) => {
                    let y = advance(m, &y)?;
                    self.answer(y);
                }
            }
        }
    }

    /// The same step by step: ŷ_n, or a state that is to be advanced first and given to [`answer`](Self::answer).
    pub(crate) fn ask(&mut self, n: usize, stats: &mut Stats) -> Result<Next<Y>> {
        let store = &self.trajectory.store;
        match self.trajectory.plan {
            Placement::All | Placement::Nothing => match self.kept.pop() {
                Some((at, y)) if at == n => Ok(Next::State(y)),
                _ => Err(Error::NothingKept),
            },
            Placement::Every(_) => {
                if self.segment.is_empty() && self.at.is_none() {
                    self.at = Some(self.pop()?);
                }
                if let Some((m, y)) = self.at.take() {
                    push("replayed states", &mut self.segment, store.stored(&y)?)?;
                    if m < n {
                        self.asked = m;
                        return Ok(Next::Advance(m, y));
                    }
                    self.record(stats);
                }
                let y = self.segment.pop().ok_or(Error::NothingKept)?;
                Ok(Next::State(y))
            }
            Placement::States(budget) | Placement::Online { budget, .. } => {
                let (m, y) = match self.at.take() {
                    Some(replayed) => replayed,
                    None => {
                        let kept = self.pop()?;
                        self.target = kept.0;
                        kept
                    }
                };
                if m == self.target && m < n {
                    // The state at hand stays kept; a further one, while the budget lasts, goes
                    // where the binomial schedule wants it, and otherwise replay runs up to n.
                    self.kept.push((m, y.clone()));
                    let free = budget.saturating_sub(self.kept.len());
                    self.target = m + split(n + 1 - m, free + 1);
                    self.record(stats);
                }
                if m < self.target {
                    self.asked = m;
                    return Ok(Next::Advance(m, y));
                }
                Ok(Next::State(store.stored(&y)?))
            }
        }
    }

    /// y_{m+1} of the state that was to be advanced.
    pub(crate) fn answer(&mut self, y: Y) {
        self.at = Some((self.asked + 1, y));
    }

    fn pop(&mut self) -> Result<(usize, Y)> {
        self.kept.pop().ok_or(Error::NothingKept)
    }

    /// Notes what is alive: this pass's own restart states under the budget plan, otherwise all of
    /// the trajectory's, used or not, and the segment.
    fn record(&self, stats: &mut Stats) {
        let store = &self.trajectory.store;
        let (states, bytes) = match self.trajectory.plan {
            Placement::States(_) | Placement::Online { .. } => size(store, &self.kept),
            _ => size(store, &self.trajectory.kept()),
        };
        let segment: usize = self.segment.iter().map(|y| store.bytes(y)).sum();
        stats.kept(states + self.segment.len(), bytes + segment);
    }
}

/// How many states, and their bytes.
fn size<Y, K: Store<Y>>(store: &K, kept: &[(usize, Y)]) -> (usize, usize) {
    let bytes = kept.iter().map(|(_, y)| store.bytes(y)).sum();
    (kept.len(), bytes)
}

/// A step of which the forward pass of the budget plan keeps the start.  The next is computed from it, so
/// that no number of steps takes memory.
#[derive(Clone, Copy, Debug)]
struct Mark {
    at: usize,
    /// States that may still be kept, this one included.
    left: usize,
    steps: usize,
}

impl Mark {
    fn first(steps: usize, budget: usize) -> Option<Self> {
        let first = Self {
            at: 0,
            left: budget,
            steps,
        };
        (steps > 0 && budget > 0).then_some(first)
    }

    fn next(self) -> Option<Self> {
        let rest = self.steps - self.at;
        (self.left > 1 && rest > 1).then(|| Self {
            at: self.at + split(rest, self.left),
            left: self.left - 1,
            ..self
        })
    }
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
    use std::cell::Cell;
    use std::rc::Rc;

    use super::*;

    /// A state that is its own number, clones of which share one living thing.
    #[derive(Clone)]
    struct Counted {
        n: usize,
        _alive: Rc<Alive>,
    }

    /// Counts itself for as long as it lives.
    struct Alive(Rc<Cell<usize>>);

    impl Drop for Alive {
        fn drop(&mut self) {
            self.0.set(self.0.get() - 1);
        }
    }

    fn counted(n: usize, alive: &Rc<Cell<usize>>) -> Counted {
        alive.set(alive.get() + 1);
        let _alive = Rc::new(Alive(alive.clone()));
        Counted { n, _alive }
    }

    /// Stores copies.
    struct Copies(Rc<Cell<usize>>);

    impl Store<Counted> for Copies {
        fn stored(&self, y: &Counted) -> Result<Counted> {
            Ok(counted(y.n, &self.0))
        }

        fn bytes(&self, _: &Counted) -> usize {
            8
        }
    }

    /// Runs forward and twice backward; what the statistics say, and the most that was alive while
    /// a backward pass replayed or held a state.
    fn reversed(checkpoint: Checkpoint, steps: usize) -> (Stats, usize) {
        let alive = Rc::new(Cell::new(0));
        let store = Copies(alive.clone());
        let mut y = counted(0, &alive);
        let mut trajectory = Trajectory::new(checkpoint, steps, store, &y).unwrap();
        for n in 0..steps {
            trajectory.offer(n, &y).unwrap();
            y = counted(n + 1, &alive);
        }
        drop(y);
        let mut stats = Stats::default();
        trajectory.record(&mut stats);
        assert_eq!(
            (stats.states_kept, stats.bytes_kept),
            (alive.get(), 8 * alive.get())
        );
        let most = Cell::new(alive.get());
        let see = || most.set(most.get().max(alive.get()));
        for _ in 0..2 {
            let mut rewind = trajectory.rewind();
            for n in (0..steps).rev() {
                let advance = |m: usize, y: &Counted| {
                    assert_eq!(y.n, m);
                    let next = counted(m + 1, &alive);
                    see();
                    Ok(next)
                };
                let y = rewind.state(n, &mut { advance }, &mut stats).unwrap();
                assert_eq!(y.n, n);
                see();
            }
        }
        (stats, most.get())
    }

    #[test]
    fn no_more_states_live_than_the_statistics_say_but_for_those_at_hand() {
        for steps in [1, 2, 7, 30, 64] {
            let (stats, most) = reversed(Checkpoint::All, steps);
            assert_eq!((stats.states_kept, most), (steps, steps));
            for k in [1, 3, 8, 100] {
                let (stats, most) = reversed(Checkpoint::Every(k), steps);
                let kept = steps.div_ceil(k) + k.min(steps);
                assert_eq!(stats.states_kept, kept, "every {k} of {steps}");
                assert!(most <= kept + 1, "every {k} of {steps}: {most}");
            }
            for budget in [1, 2, 5, 12, 100] {
                let (stats, most) = reversed(Checkpoint::States(budget), steps);
                assert!(stats.states_kept <= budget, "{budget} of {steps}");
                // A step has a state before and one after it.
                let bound = stats.states_kept + 2;
                assert!(most <= bound, "{budget} of {steps}: {most} > {bound}");
            }
        }
    }

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
    fn no_number_of_steps_takes_memory_or_overflows() {
        let marks = |steps, budget| {
            std::iter::successors(Mark::first(steps, budget), |mark| mark.next()).map(|m| m.at)
        };
        for steps in [1, 2, 1 << 34, 1 << 40, (1 << 53) - 1] {
            for budget in [1, 3, 100, 1 << 33, usize::MAX] {
                let first: Vec<_> = marks(steps, budget).take(100).collect();
                assert_eq!(first[0], 0);
                assert!(first.windows(2).all(|w| w[0] < w[1]));
                assert!(first.iter().all(|&at| at < steps));
                assert_eq!(first.len(), budget.min(steps).min(100));
            }
        }
        // Where there is room for all, all are kept.
        assert_eq!(
            marks(40, 40).collect::<Vec<_>>(),
            (0..40).collect::<Vec<_>>()
        );
        assert_eq!(marks(0, 7).count(), 0);
    }

    #[test]
    fn a_plan_says_how_many_states_it_keeps_at_most() {
        for steps in [0, 1, 2, 7, 30, 64] {
            for checkpoint in [
                Checkpoint::All,
                Checkpoint::Every(1),
                Checkpoint::Every(8),
                Checkpoint::Every(usize::MAX),
                Checkpoint::States(1),
                Checkpoint::States(12),
                Checkpoint::States(usize::MAX),
                Checkpoint::Bytes(100),
                Checkpoint::Bytes(usize::MAX),
            ] {
                let (stats, _) = reversed(checkpoint, steps);
                let (restart, stored) = checkpoint.most(steps, 8);
                assert_eq!(
                    stats.states_kept,
                    restart + stored,
                    "{checkpoint:?} of {steps}"
                );
            }
        }
    }

    /// Steps that the first backward pass replays where the number of steps was not known, and the most states that
    /// lived at once.
    fn online(budget: usize, steps: usize) -> (usize, usize) {
        let alive = Rc::new(Cell::new(0));
        let store = Copies(alive.clone());
        let mut y = counted(0, &alive);
        let mut trajectory = Trajectory::online(Checkpoint::States(budget), store, &y).unwrap();
        let most = Cell::new(0);
        let see = || most.set(most.get().max(alive.get()));
        for n in 0..steps {
            trajectory.offer(n, &y).unwrap();
            see();
            y = counted(n + 1, &alive);
        }
        drop(y);
        let replays = Cell::new(0);
        let mut rewind = trajectory.rewind();
        for n in (0..steps).rev() {
            let advance = |m: usize, y: &Counted| {
                assert_eq!(y.n, m);
                replays.set(replays.get() + 1);
                let next = counted(m + 1, &alive);
                see();
                Ok(next)
            };
            let y = rewind
                .state(n, &mut { advance }, &mut Stats::default())
                .unwrap();
            assert_eq!(y.n, n);
            see();
        }
        (replays.get(), most.get())
    }

    #[test]
    fn a_budget_holds_where_the_number_of_steps_is_not_known_and_costs_little_more() {
        for (budget, steps) in [
            (1, 40),
            (2, 100),
            (5, 1000),
            (12, 1000),
            (40, 100_000),
            (100, 64),
        ] {
            let (replays, most) = online(budget, steps);
            assert!(most <= budget + 3, "{budget} of {steps}: {most}");
            let best = replayed(steps, budget.min(steps));
            // The forward pass has replayed nothing yet: the best placement begins with a pass of its own.
            println!("{budget} of {steps}: {replays}, best {best}");
            assert!(
                2 * replays <= 3 * best + 2 * steps,
                "{budget} of {steps}: {replays}, {best}"
            );
        }
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
