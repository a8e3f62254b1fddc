//! The backward pass of the rows of a group.  Every lane goes through the steps of its own row, from the last step to
//! the first, and then takes the next row of the group.
//!
//! If the field does not jump between them, the last stage of step n is also the first stage of step n + 1, which the
//! backward pass has already pulled back.  The cotangent that the outputs inside step n give to this stage is
//! therefore passed to step n + 1: κ = h_n Σ_m b_s(x_m) ȳ_m is added to v_1 of step n + 1 as κ / h_{n+1}.
//!
//! In f16 every row has its own adjoint scale, so that its gradient does not depend on the rows beside it.

use super::inside::{put, take, LaneOutputs};
use super::{keeps_no_evaluations, RowSolve, RowTrajectories, SolvedGroup};
use crate::error::{Error, Result};
use crate::reverse::{Adjoint, Backward};
use crate::rows::activations::{KeptEvaluations, Selection};
use crate::rows::backward::{adjoint, SweptGroup};
use crate::rows::lanes::LaneSteps;
use crate::rows::pulls::{DenseSeeds, StagePulls};
use crate::rows::scales::Scales;
use crate::rows::stepper::Stepper;
use crate::rows::trajectory::{Snapshot, TileStore, TileTrajectory};
use crate::rows::window::{KeptBy, Sums, Window};
use crate::rows::{on_all_threads, Failure, TilePlan};
use crate::schedule::{Inside, Step};
use crate::simd::two_sum::two_sum;
use crate::simd::{aligned, Aligned, Element};
use crate::stats::Stats;
use crate::trajectory::{Next, Rewind};

/// The gradients of y0 and θ.
pub(super) fn pull_back<T: Element>(
    solved: &RowTrajectories<T>,
    cotangent: &[T],
    back: &Backward<'_>,
    stats: &mut Stats,
) -> Result<Adjoint> {
    let Backward { problem, theta, .. } = *back;
    let plan = TilePlan::new(problem, &solved.layout);
    let stages = problem.scheme.dense_stages().len();
    let pass = RowsPass {
        solved,
        plan: &plan,
        selection: &keeps_no_evaluations(&*solved.field, stages),
        cotangent,
    };
    pass.check()?;
    let mut y0 = vec![T::default(); problem.packing.len()];
    let mut sums = Sums::default();
    let mut counted = Stats::default();
    let mut fold = |g: usize, group: SweptGroup<T>| {
        let mut rest = group.y0.as_slice();
        for row in solved.groups[g].rows.clone() {
            rest = solved.layout.place(&(row..row + 1), rest, &mut y0);
        }
        sums.add::<T>(group.sums);
        counted.join(&group.stats);
    };
    let differentiate = !theta.is_empty();
    let compensated = problem.scheme.compensated;
    let window =
        || Window::new(&*solved.field, stages, usize::MAX, differentiate).compensating(compensated);
    let each = |window: &mut Window<T>, group: &SolvedGroup<T>| pass.sweep(group, window);
    on_all_threads(&solved.groups, &window, &each, &mut fold)?;
    stats.add(&counted);
    let gradients = sums.gradients(&*solved.field);
    let of = (&solved.weights[..], &solved.shapes[..]);
    adjoint(problem, of, theta, y0, gradients)
}

/// What every group's backward pass reads.
struct RowsPass<'a, T: Element> {
    solved: &'a RowTrajectories<T>,
    plan: &'a TilePlan<'a>,
    selection: &'a Selection,
    /// Of the returned states, `(outputs, elements)`.
    cotangent: &'a [T],
}

impl<T: Element> RowsPass<'_, T> {
    /// The cotangents of an output of a row, leaf by leaf.
    fn seed(&self, row: usize, output: usize) -> impl Iterator<Item = &[T]> + '_ {
        let layout = self.plan.layout;
        let all = &self.cotangent[output * self.plan.problem.packing.len()..];
        let leaves = layout.features.iter().enumerate();
        leaves.map(move |(leaf, &features)| &all[layout.offset(leaf, row)..][..features])
    }

    /// That the cotangents of every row that has reached the end are finite.
    fn check(&self) -> Result<()> {
        for group in &self.solved.groups {
            for (row, solve) in group
                .rows
                .clone()
                .zip(&group.solves)
                .filter(|(_, s)| s.stopped.is_none())
            {
                // What the row has not reached is none of its outputs.
                for output in solve.steps.numbers() {
                    // Without a branch for every number.
                    let finite = |all: bool, y: &T| all & y.wide().is_finite();
                    let mut leaves = self.seed(row, output);
                    if !leaves.all(|leaf| leaf.iter().fold(true, finite)) {
                        return Err(Error::NonFiniteCotangent);
                    }
                }
            }
        }
        Ok(())
    }

    /// The backward pass of one group.
    fn sweep(
        &self,
        group: &SolvedGroup<T>,
        window: &mut Window<T>,
    ) -> std::result::Result<SweptGroup<T>, Failure> {
        let anywhere = |error| Failure { at: (0, 0), error };
        let (field, plan) = (&*self.solved.field, self.plan);
        let evaluations = KeptEvaluations::new(self.selection, 0).map_err(anywhere)?;
        let kept = KeptBy {
            selection: self.selection,
            evaluations: &evaluations,
        };
        window.clear();
        let mut walks = Walks::new(self, group);
        let mut pull = StagePulls::<T>::new(&walks.stepper);
        let mut dense = DenseSeeds::new(&walks.stepper);
        let mut counted = Stats::default();
        while walks.enter_steps(&mut counted).map_err(anywhere)? {
            let seeds = walks.weigh(&mut dense).then_some(&dense);
            let steps = LaneSteps::Each(&walks.steps);
            window.begin_step(field, &kept);
            walks.stepper.linearize(steps, &walks.y, window.next_kept());
            counted.recomputed += walks.stepper.stages(steps.is_dense()).len();
            let adj = &walks.adj[..walks.stepper.size];
            walks.scales.aim(walks.stepper.on, plan, adj, seeds);
            pull.step(
                &walks.stepper,
                steps,
                &mut walks.adj,
                seeds,
                window,
                &kept,
                &mut walks.scales,
                &mut counted,
            )
            .map_err(|exhausted| {
                let walk = walks.lanes[exhausted.lane].as_ref();
                Failure {
                    at: (walk.map_or(0, |walk| walk.row), 0),
                    error: exhausted.error(steps),
                }
            })?;
            walks.leave_steps()?;
            window.end_step();
        }
        window.flush(field, &kept);
        Ok(SweptGroup {
            y0: walks.y0,
            sums: window.finish(field),
            stats: counted,
        })
    }
}

/// A lane on its way through the steps of a row.
struct Walk<'a, T> {
    row: usize,
    solve: &'a RowSolve<T>,
    /// The step that it is in, or before which it has arrived.
    n: usize,
    /// Outputs inside that step, and inside the step before it.
    inside: [&'a [Inside]; 2],
    /// What the last stage of that step is also the first stage of: whether of the step after it; of the step before,
    /// whose last stage is the first one of that step, the length over that of the step.
    joins: bool,
    ratio: Option<f64>,
    rewind: Option<Rewind<'a, Snapshot<T>, TileStore>>,
    /// The step that is replayed, until the state is there.
    replayed: Option<usize>,
    arrived: bool,
}

impl<T: Element> Walk<'_, T> {
    /// Enters the step before; the step.
    fn enter(&mut self) -> Step {
        let steps = &self.solve.steps;
        let of_step_before = |n: usize| n.checked_sub(1).map_or(&[][..], |n| steps.inside(n));
        self.n -= 1;
        self.arrived = false;
        self.joins = steps.is_joined(self.n + 1);
        self.inside = [self.inside[1], of_step_before(self.n)];
        let step = steps.step(self.n);
        self.ratio = (steps.is_joined(self.n) && !self.inside[1].is_empty())
            .then(|| steps.length(self.n - 1) / step.h);
        step
    }
}

/// The lanes of a tile on their ways.
struct Walks<'a, T: Element> {
    pass: &'a RowsPass<'a, T>,
    group: &'a SolvedGroup<T>,
    stepper: Stepper<'a, T>,
    /// The rows of the group that no lane has taken yet, the one with the fewest steps first: lanes take the longest
    /// rows first, so that they end at about the same time.
    waiting: Vec<usize>,
    lanes: Vec<Option<Walk<'a, T>>>,
    steps: Vec<Step>,
    y: Aligned<T>,
    adj: Aligned<T>,
    scales: Scales,
    /// The numbers of one row, and of what a step of it carries; a tile that is replayed, and its slot.
    row: Vec<T>,
    carried: Vec<T>,
    tile: Aligned<T>,
    slot: Aligned<T>,
    /// Of outputs inside the steps.
    inside: LaneOutputs<T>,
    /// λ_0, `[row][feature]`.
    y0: Vec<T>,
}

impl<'a, T: Element> Walks<'a, T> {
    fn new(pass: &'a RowsPass<'a, T>, group: &'a SolvedGroup<T>) -> Self {
        let mut stepper = Stepper::new(&*pass.solved.field, pass.plan);
        stepper.clock.is_read = pass.solved.reads_clock;
        let (size, batch) = (stepper.size, stepper.batch);
        let mut waiting: Vec<_> = (0..group.solves.len()).rev().collect();
        waiting.sort_by_key(|&place| group.solves[place].steps.len());
        let mut walks = Self {
            waiting,
            lanes: (0..batch).map(|_| None).collect(),
            steps: vec![],
            y: aligned(size),
            adj: aligned(stepper.carried),
            scales: Scales::by_lane(pass.plan.problem.scaler, batch),
            row: vec![T::default(); pass.plan.layout.dim()],
            carried: vec![T::default(); stepper.carried / batch],
            tile: aligned(stepper.carried),
            slot: stepper.slot(),
            inside: LaneOutputs::new(&stepper),
            y0: vec![T::default(); group.rows.len() * pass.plan.layout.dim()],
            pass,
            group,
            stepper,
        };
        for lane in 0..batch {
            walks.refill(lane);
        }
        walks
    }

    fn batch(&self) -> usize {
        self.lanes.len()
    }

    /// Lets a lane begin at the end of the next row that has steps.
    fn refill(&mut self, at: usize) {
        let batch = self.batch();
        let adj = &mut self.adj;
        self.lanes[at] = None;
        self.scales.begin(at);
        for i in (at..adj.len()).step_by(batch) {
            adj[i] = T::default();
        }
        while let Some(place) = self.waiting.pop() {
            let (row, solve) = (self.group.rows.start + place, &self.group.solves[place]);
            let (n, dim) = (solve.steps.len(), self.pass.plan.layout.dim());
            // The cotangents of a row that has stopped are ignored.
            let output = solve.steps.at_node(n).filter(|_| solve.stopped.is_none());
            let seed = output.into_iter().flat_map(|o| self.pass.seed(row, o));
            if n == 0 || solve.stopped.is_some() {
                let y0 = self.y0[place * dim..][..dim].iter_mut();
                y0.zip(seed.flatten()).for_each(|(y0, seed)| *y0 = *seed);
                continue;
            }
            put(seed, batch, at, adj);
            self.stepper.clock.rows_mut()[at] = row;
            self.lanes[at] = Some(Walk {
                row,
                solve,
                n,
                inside: [&[], solve.steps.inside(n - 1)],
                joins: false,
                ratio: None,
                rewind: None,
                replayed: None,
                arrived: false,
            });
            return;
        }
    }

    /// Puts every lane at the start of the step before; false if no lane has any.
    fn enter_steps(&mut self, stats: &mut Stats) -> Result<bool> {
        let batch = self.batch();
        let Some(live) = self.lanes.iter().position(Option::is_some) else {
            return Ok(false);
        };
        for (at, walk) in self.lanes.iter_mut().enumerate() {
            let Some(walk) = walk else { continue };
            let step = walk.enter();
            if self.steps.is_empty() {
                self.steps = vec![step; batch];
            }
            self.steps[at] = step;
        }
        while self.find_states(stats)? {
            self.replay(stats)?;
        }
        // Lanes without a row do what another does, with cotangents of zero.
        let y = &mut self.y;
        for at in 0..batch {
            if self.lanes[at].is_none() {
                self.steps[at] = self.steps[live];
                for i in (0..y.len()).step_by(batch) {
                    y[i + at] = y[i + live];
                }
            }
        }
        Ok(true)
    }

    /// ŷ_n of every lane that has it; whether others need a replay first.
    fn find_states(&mut self, stats: &mut Stats) -> Result<bool> {
        let batch = self.batch();
        let y = &mut self.y;
        let tile = &mut self.tile;
        let mut replays = false;
        for (at, walk) in self.lanes.iter_mut().enumerate() {
            let Some(walk) = walk.as_mut().filter(|walk| !walk.arrived) else {
                continue;
            };
            walk.replayed = None;
            match &walk.solve.trajectory {
                TileTrajectory::All(states) => {
                    let there = states.load(walk.n, &mut self.row);
                    there.ok_or(Error::NothingKept)?;
                }
                TileTrajectory::Planned(planned) => {
                    let rewind = walk.rewind.get_or_insert_with(|| planned.rewind());
                    let mut seen = Stats::default();
                    let next = rewind.ask(walk.n, &mut seen)?;
                    stats.kept(seen.states_kept, seen.bytes_kept);
                    match next {
                        Next::State(state) => state.load(&mut self.row),
                        Next::Advance(m, state) => {
                            state.load(&mut self.carried);
                            put(std::iter::once(&*self.carried), batch, at, tile);
                            walk.replayed = Some(m);
                            replays = true;
                            continue;
                        }
                    }
                }
            }
            put(std::iter::once(&*self.row), batch, at, y);
            walk.arrived = true;
        }
        Ok(replays)
    }

    /// Advances the lanes that need it by a step of their rows; the others stand still.
    fn replay(&mut self, stats: &mut Stats) -> Result<()> {
        let batch = self.batch();
        let of = |walk: &Option<Walk<'_, T>>| {
            let walk = walk.as_ref()?;
            // Outputs inside the step have been returned.
            let dense = false;
            let step = walk.solve.steps.step(walk.replayed?);
            Some(Step { dense, ..step })
        };
        let steps: Vec<_> = self.lanes.iter().map(of).collect();
        let Some(replayed) = steps.iter().flatten().next().copied() else {
            return Ok(());
        };
        let standing = Step { h: 0.0, ..replayed };
        let each: Vec<_> = steps.iter().map(|step| step.unwrap_or(standing)).collect();
        stats.recomputed += self.stepper.stages(false).len();
        self.stepper
            .advance_lanes(&each, &mut self.tile, &mut self.slot);
        let tile = &mut self.tile;
        for (at, walk) in self.lanes.iter_mut().enumerate() {
            let Some(walk) = walk.as_mut().filter(|walk| walk.replayed.is_some()) else {
                continue;
            };
            take(tile, batch, at, &mut self.carried);
            if let Some(rewind) = &mut walk.rewind {
                rewind.answer(Snapshot::of(&self.carried)?);
            }
        }
        Ok(())
    }

    /// What enters the steps from outputs inside them and inside those before, if there are any.
    fn weigh(&mut self, dense: &mut DenseSeeds<T>) -> bool {
        let tableau = &self.pass.plan.problem.scheme.tableau;
        let (on, last) = (self.stepper.on, tableau.stages() - 1);
        let walks = self.lanes.iter().enumerate();
        let walks = walks.filter_map(|(at, walk)| Some((at, walk.as_ref()?)));
        let rounds =
            |of: &dyn Fn(&Walk<'a, T>) -> usize| walks.clone().map(|(_, walk)| of(walk)).max();
        let own = rounds(&|walk| walk.inside[0].len()).unwrap_or(0);
        let before = |walk: &Walk<'a, T>| walk.ratio.map_or(0, |_| walk.inside[1].len());
        let before = rounds(&before).unwrap_or(0);
        if own + before == 0 {
            return false;
        }
        dense.clear();
        for round in 0..own {
            self.inside.clear();
            for (at, walk) in walks.clone() {
                if let Some(output) = walk.inside[0].get(round) {
                    self.inside.set(at, output.x, 1.0);
                    self.inside
                        .hold(at, self.pass.seed(walk.row, output.output));
                }
            }
            for i in 0..=last {
                self.inside.weights(tableau, i, i);
            }
            for (at, _) in walks.clone().filter(|(_, walk)| walk.joins) {
                self.inside.leave_out(last, at);
            }
            self.inside.weigh(on, last + 1, dense);
            self.inside.pass(on, dense);
        }
        // κ / h of the outputs inside the step before.
        for round in 0..before {
            self.inside.clear();
            for (at, walk) in walks.clone() {
                if let (Some(ratio), Some(output)) = (walk.ratio, walk.inside[1].get(round)) {
                    self.inside.set(at, output.x, ratio);
                    self.inside
                        .hold(at, self.pass.seed(walk.row, output.output));
                }
            }
            self.inside.weights(tableau, last, 0);
            self.inside.weigh(on, 1, dense);
        }
        true
    }

    /// Adds what is returned at the nodes that the lanes have reached; those at the start of their row take the next.
    fn leave_steps(&mut self) -> std::result::Result<(), Failure> {
        let finite = self.stepper.on.is_finite(&self.adj);
        let (batch, dim) = (self.batch(), self.pass.plan.layout.dim());
        let size = self.stepper.size;
        for at in 0..batch {
            let Some(walk) = &self.lanes[at] else {
                continue;
            };
            let adj = &mut self.adj;
            if let Some(output) = walk.solve.steps.at_node(walk.n) {
                let (sum, lost) = adj.split_at_mut(size);
                for (i, y) in self.pass.seed(walk.row, output).flatten().enumerate() {
                    let place = i * batch + at;
                    match lost.get_mut(place) {
                        Some(lost) => [sum[place], *lost] = two_sum(sum[place], *lost + *y),
                        None => sum[place] += *y,
                    }
                }
            }
            let mut lane = adj.iter().skip(at).step_by(batch);
            let was_added = walk.solve.steps.at_node(walk.n).is_some();
            if (!finite || was_added) && !lane.all(|x| x.wide().is_finite()) {
                let step = walk.solve.steps.step(walk.n);
                let error = Error::NonFiniteGradient {
                    step: step.index,
                    t: step.t,
                };
                return Err(Failure {
                    at: (walk.row, 0),
                    error,
                });
            }
            if walk.n == 0 {
                let place = walk.row - self.group.rows.start;
                take(adj, batch, at, &mut self.y0[place * dim..][..dim]);
                self.refill(at);
            }
        }
        Ok(())
    }
}
