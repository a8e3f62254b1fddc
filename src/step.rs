//! One step of an explicit Runge-Kutta method, and its linearisation.
//!
//! With tableau (a, b, c), s stages, step h, and Q rounding to compute precision:
//!
//! Y_i = Q(y_n + h Σ_{j<i} a_ij k_j),  k_i = Q(f(t_n + c_i h, Y_i)),  y_{n+1} = y_n + h Σ b_i k_i.
//!
//! Every sum is formed in state precision from the state-precision y_n, so nothing piles up but the roundings of y_{n+1}.
//!
//! With compensated sums a step carries e_n beside y_n, which is what rounding has taken from y_n: y_{n+1} and e_{n+1}
//! are the rounded sum and the rest of y_n + (e_n + h Σ b_i k_i).  No stage reads e_n, since a rounding of Y_i changes k_i
//! by a rounding, so that what the backward pass linearises at needs y_n only.  With adaptive steps
//! a stage at the end of a step is an exception: it is the first one of the next step, which begins at y_{n+1}.

#[cfg(feature = "cuda")]
mod fixture;
mod linear;

#[cfg(feature = "cuda")]
use std::sync::Arc;

use candle_core::{Device, Tensor};

use crate::error::{Error, Result};
use crate::field::{pullback::alike, Field};
use crate::ops;
#[cfg(feature = "cuda")]
use crate::ops::cuda::{self, Clock};
use crate::precision::{Roles, Rounding};
use crate::schedule::Step;
use crate::tableau::Tableau;
use crate::time::Time;
use crate::watch::Watch;
#[cfg(feature = "cuda")]
pub(crate) use fixture::Fixture;
pub(crate) use linear::{KeptStep, LinearStage};

/// k_i of every stage, `None` where a stage was not evaluated.
pub(crate) type Increments = Vec<Option<Vec<Tensor>>>;

/// A step that was taken.
pub(crate) struct Taken {
    /// y_{n+1}.
    pub(crate) y: Vec<Tensor>,
    /// ŷ_{n+1}, if copies were wanted and come with it.
    pub(crate) stored: Option<Vec<Tensor>>,
    pub(crate) ks: Increments,
}

/// A method at a precision: what turns y_n into y_{n+1}.
#[derive(Clone, Debug)]
pub(crate) struct Scheme {
    pub(crate) tableau: Tableau,
    /// Stages that the solution depends on, and an output inside a step if the next step begins with its last stage; and
    /// those that an output inside any other step depends on.
    active: Vec<bool>,
    dense_active: Vec<bool>,
    /// Roles of each leaf.
    pub(crate) roles: Vec<Roles>,
    /// Whether y and λ are summed with compensation.
    pub(crate) compensated: bool,
    pub(crate) device: Device,
    /// Where steps read h and t if they are replayed.
    #[cfg(feature = "cuda")]
    pub(crate) fixture: Option<Arc<Fixture>>,
}

impl Scheme {
    /// A method that interpolates if `dense` says so.
    pub(crate) fn new(method: &Tableau, dense: bool, roles: Vec<Roles>, device: Device) -> Self {
        let tableau = match dense {
            true => method.dense(),
            false => method.clone(),
        };
        Self {
            active: match dense {
                true => tableau.joined_active(),
                false => tableau.active(),
            },
            dense_active: tableau.dense_active(),
            tableau,
            roles,
            compensated: false,
            device,
            #[cfg(feature = "cuda")]
            fixture: None,
        }
    }

    /// The same with compensated sums, or without.
    pub(crate) fn compensating(self, compensated: bool) -> Self {
        Self {
            compensated,
            ..self
        }
    }

    /// How many tensors a step carries for each leaf.
    pub(crate) fn carried(&self) -> usize {
        1 + usize::from(self.compensated)
    }

    /// What the first step is given: y, of which rounding has taken nothing yet.  So is λ at the end.
    pub(crate) fn begin(&self, mut y: Vec<Tensor>) -> Result<Vec<Tensor>> {
        if self.compensated {
            let zeros = y.iter().map(Tensor::zeros_like);
            y.extend(zeros.collect::<candle_core::Result<Vec<_>>>()?);
        }
        Ok(y)
    }

    /// What rounding has taken from a leaf, in what a step carries.
    pub(crate) fn lost<'a>(&self, y: &'a [Tensor], leaf: usize) -> Option<&'a Tensor> {
        y.get(self.roles.len() + leaf).filter(|_| self.compensated)
    }

    /// The same, whose steps read h and t from a fixture.
    #[cfg(feature = "cuda")]
    pub(crate) fn replayed(&self, fixture: &Arc<Fixture>) -> Self {
        Self {
            fixture: Some(Arc::clone(fixture)),
            ..self.clone()
        }
    }

    /// The stages of a step that are evaluated.
    pub(crate) fn active(&self, step: &Step) -> &[bool] {
        match step.dense {
            true => &self.dense_active,
            false => &self.active,
        }
    }

    /// The stages that the solution depends on, ascending.
    pub(crate) fn stages(&self) -> Vec<usize> {
        (0..self.active.len()).filter(|&i| self.active[i]).collect()
    }

    /// The stages that an output inside a step depends on, or the solution, ascending.
    pub(crate) fn dense_stages(&self) -> Vec<usize> {
        let all = 0..self.dense_active.len();
        all.filter(|&i| self.dense_active[i]).collect()
    }

    /// Number of stages that are evaluated in a step that no output is inside of.
    pub(crate) fn evaluations(&self) -> usize {
        self.active.iter().filter(|&&active| active).count()
    }

    /// y_{n+1} and, if `copies` are wanted and come with it, ŷ_{n+1}.
    pub(crate) fn advance_and_store(
        &self,
        field: &Field<'_>,
        step: Step,
        y: &[Tensor],
        copies: bool,
        watch: &mut Watch,
    ) -> Result<Taken> {
        let mut ks = vec![];
        // Stages read the state alone: the backward pass linearises them at ŷ_n.
        let state = &y[..self.roles.len()];
        self.evaluate(field, step, state, &mut ks, self.active(&step), |i, k| {
            watch.see(k, || self.bad_velocity(step, i))
        })?;
        self.taken(step, y, ks, copies, watch)
    }

    /// The step from y with these increments.
    fn taken(
        &self,
        step: Step,
        y: &[Tensor],
        ks: Increments,
        copies: bool,
        watch: &mut Watch,
    ) -> Result<Taken> {
        let bad = || bad_solution(step);
        #[cfg(feature = "cuda")]
        if self.device.is_cuda() {
            let (y, stored) = self.update_and_store(step.h, y, &ks, copies, |x, update| {
                watch.look(x, bad(), update)
            })?;
            return Ok(Taken { y, stored, ks });
        }
        let _ = copies;
        let y = self.update(step.h, y, &ks)?;
        watch.see(&y, bad)?;
        let stored = None;
        Ok(Taken { y, stored, ks })
    }

    fn bad_velocity(&self, step: Step, stage: usize) -> Error {
        Error::NonFiniteVelocity {
            step: step.index,
            stage,
            t: step.at(self.tableau.c()[stage]),
        }
    }

    /// Evaluates those of the next stages that are `wanted`, one after the other; `see` looks at each velocity.
    pub(crate) fn evaluate(
        &self,
        field: &Field<'_>,
        step: Step,
        y: &[Tensor],
        ks: &mut Increments,
        wanted: &[bool],
        see: impl FnMut(usize, &[Tensor]) -> Result<()>,
    ) -> Result<()> {
        let at = |t: &Time, y: &Vec<Tensor>| {
            let k = field.velocity(t, y)?;
            self.check_time(step, t)?;
            Ok(Some((k, ())))
        };
        self.each_stage(step, (y, ks), (wanted, false), at, see)?;
        Ok(())
    }

    /// Evaluates those of the next stages that are `wanted`, one after the other, at times that are `differentiable` or
    /// not.  `at` returns the velocity and what belongs to the stage beside it, or `None` if it cannot; then no further
    /// stage is evaluated, and the result is `None`.  `see` looks at each velocity after rounding.
    fn each_stage<X>(
        &self,
        step: Step,
        (y, ks): (&[Tensor], &mut Increments),
        (wanted, differentiable): (&[bool], bool),
        mut at: impl FnMut(&Time, &Vec<Tensor>) -> Result<Option<(Vec<Tensor>, X)>>,
        mut see: impl FnMut(usize, &[Tensor]) -> Result<()>,
    ) -> Result<Option<Vec<Option<X>>>> {
        let mut besides = vec![];
        for (i, &wanted) in wanted.iter().enumerate().skip(ks.len()) {
            if !wanted {
                ks.push(None);
                besides.push(None);
                continue;
            }
            let stage = self.stage(i, step.h, y, ks)?;
            let time = self.time(i, step, differentiable)?;
            let found = at(&time, &stage);
            let found = found.map_err(|e| located(e, step, i, step.at(self.tableau.c()[i])))?;
            let Some((k, beside)) = found else {
                return Ok(None);
            };
            self.note(&time);
            self.check(&stage, &k)?;
            let k = self.rounded(&k)?;
            see(i, &k)?;
            ks.push(Some(k));
            besides.push(Some(beside));
        }
        Ok(Some(besides))
    }

    /// y + h Σ b_j k_j, ŷ of it where it is not the same, and a look at it, in one pass by leaf.
    #[cfg(feature = "cuda")]
    fn update_and_store(
        &self,
        h: f64,
        y: &[Tensor],
        ks: &[Option<Vec<Tensor>>],
        copies: bool,
        mut look: impl FnMut(
            &Tensor,
            &mut dyn FnMut(&mut cuda::Looks) -> Result<(Tensor, Option<Tensor>)>,
        ) -> Result<(Tensor, Option<Tensor>)>,
    ) -> Result<(Vec<Tensor>, Option<Vec<Tensor>>)> {
        let (mut next, mut lost, mut stored) = (vec![], vec![], vec![]);
        for (leaf, roles) in self.roles.iter().enumerate() {
            let terms = terms(leaf, self.pace(h), y, self.tableau.b(), ks);
            let store = (copies && roles.store != roles.state()).then_some(roles.store);
            let before = self.lost(y, leaf);
            let (y, copy) = look(&y[leaf], &mut |looks| {
                let to = (roles.state(), store);
                let updated = cuda::update(&terms, before, to, looks, self.clock())?;
                lost.extend(updated.lost);
                Ok((updated.y, updated.stored))
            })?;
            stored.push(match copy {
                Some(copy) => copy,
                None => y.clone(),
            });
            next.push(y);
        }
        next.append(&mut lost);
        Ok((next, copies.then_some(stored)))
    }

    /// The time of stage i.
    fn time(&self, i: usize, step: Step, differentiable: bool) -> Result<Time> {
        let (t, dtype) = (step.at(self.tableau.c()[i]), self.roles[0].state);
        let within = |time| step.within(time);
        #[cfg(feature = "cuda")]
        if let Some(fixture) = &self.fixture {
            return Ok(within(Time::shown_by(t, fixture.clock.time(i)?)));
        }
        Ok(within(match differentiable {
            true => Time::differentiable(t, dtype, &self.device),
            false => Time::new(t, dtype, &self.device),
        }))
    }

    /// Notes what the field did with its time, if that decides about a replay.
    fn note(&self, time: &Time) {
        #[cfg(feature = "cuda")]
        if let Some(fixture) = &self.fixture {
            fixture.note(time);
        }
        let _ = time;
    }

    /// For a field that reads time as a tensor, time must not stand still.
    fn check_time(&self, step: Step, time: &Time) -> Result<()> {
        let dtype = self.roles[0].state;
        if !(time.was_shown() && step.stands_still_in(dtype)) {
            return Ok(());
        }
        Err(Error::TimeUnresolved {
            step: step.index,
            t: step.t,
            end: step.end,
            dtype,
        })
    }

    /// The clock that steps are replayed by, if they are.
    #[cfg(feature = "cuda")]
    pub(crate) fn clock(&self) -> Option<&Clock> {
        self.fixture.as_ref().map(|fixture| &fixture.clock)
    }

    /// What coefficients are to be multiplied by: h, or one where kernels read it from a clock.
    pub(crate) fn pace(&self, h: f64) -> f64 {
        #[cfg(feature = "cuda")]
        if self.fixture.is_some() {
            return 1.0;
        }
        h
    }

    /// What the looks of [`advance`](Self::advance) mean, in their order.
    #[cfg(feature = "cuda")]
    pub(crate) fn meanings(&self, step: Step) -> Vec<Error> {
        let active = (0..self.tableau.stages()).filter(|&i| self.active(&step)[i]);
        let velocities = active.map(|i| self.bad_velocity(step, i));
        let states = self.roles.iter().map(|_| bad_solution(step));
        velocities.chain(states).collect()
    }

    /// Σ of terms, all but the first with a factor h, in one leaf.
    fn sum(&self, terms: &[(f64, &Tensor)], out: Rounding) -> Result<Tensor> {
        #[cfg(feature = "cuda")]
        if let Some(clock) = self.clock() {
            return cuda::stage(terms, out, clock);
        }
        ops::combine(terms, 1.0, out)
    }

    /// Y_i = Q(y + h Σ_{j<i} a_ij k_j).
    fn stage(
        &self,
        i: usize,
        h: f64,
        y: &[Tensor],
        ks: &[Option<Vec<Tensor>>],
    ) -> Result<Vec<Tensor>> {
        let ends = self.tableau.ends_step(i);
        let of_leaf = |(leaf, roles): (usize, &Roles)| {
            let terms = terms(leaf, self.pace(h), y, self.tableau.a(i), ks);
            if let Some(lost) = self.lost(y, leaf).filter(|_| ends) {
                let [y, _] = ops::add_compensated([&y[leaf], lost], &terms[1..])?;
                return roles.compute.round(&y);
            }
            match terms.as_slice() {
                [(_, y)] => roles.compute.round(y),
                terms => self.sum(terms, roles.compute),
            }
        };
        self.roles.iter().enumerate().map(of_leaf).collect()
    }

    /// Q(x): a velocity as a field that runs in compute precision would have returned it.
    fn rounded(&self, x: &[Tensor]) -> Result<Vec<Tensor>> {
        let round = |(x, roles): (&Tensor, &Roles)| roles.compute.round(x);
        x.iter().zip(&self.roles).map(round).collect()
    }

    /// The velocity at the end of a step of Euler's method with the velocity k.
    pub(crate) fn after_euler(
        &self,
        field: &Field<'_>,
        step: Step,
        y: &[Tensor],
        k: &[Tensor],
    ) -> Result<Vec<Tensor>> {
        let of_leaf = |(leaf, roles): (usize, &Roles)| {
            ops::combine(&[(1.0, &y[leaf]), (step.h, &k[leaf])], 1.0, roles.compute)
        };
        let y = self.roles.iter().enumerate().map(of_leaf);
        let y = y.collect::<Result<Vec<_>>>()?;
        let time = step.within(Time::new(step.end, self.roles[0].state, &self.device));
        let k = field
            .velocity(&time, &y)
            .map_err(|e| located(e.into(), step, 1, step.end))?;
        self.check(&y, &k)?;
        self.rounded(&k)
    }

    /// h Σ c_j k_j in state precision.
    pub(crate) fn weighted(&self, h: f64, c: &[f64], ks: &Increments) -> Result<Vec<Tensor>> {
        let of_leaf = |(leaf, roles): (usize, &Roles)| {
            let stages = c.iter().zip(ks).filter(|(c, _)| **c != 0.0);
            let terms = stages.filter_map(|(c, k)| Some((h * c, &k.as_ref()?[leaf])));
            let mut terms: Vec<_> = terms.collect();
            if terms.is_empty() {
                // A sum of nothing, such as the slope of an interpolant where it has none.
                terms.extend(ks.iter().flatten().take(1).map(|k| (0.0, &k[leaf])));
            }
            ops::combine(&terms, 1.0, roles.state())
        };
        self.roles.iter().enumerate().map(of_leaf).collect()
    }

    /// y + h Σ b_j k_j in state precision, with what rounding has taken from it if that is carried.
    pub(crate) fn update(
        &self,
        h: f64,
        y: &[Tensor],
        ks: &[Option<Vec<Tensor>>],
    ) -> Result<Vec<Tensor>> {
        let (mut next, mut rests) = (vec![], vec![]);
        for (leaf, roles) in self.roles.iter().enumerate() {
            let terms = terms(leaf, h, y, self.tableau.b(), ks);
            match self.lost(y, leaf) {
                Some(lost) => {
                    let [y, lost] = ops::add_compensated([&y[leaf], lost], &terms[1..])?;
                    next.push(y);
                    rests.push(lost);
                }
                None => next.push(ops::combine(&terms, 1.0, roles.state())?),
            }
        }
        next.append(&mut rests);
        Ok(next)
    }

    /// y(t_n + x h) from the stages of the step.
    pub(crate) fn interpolated(
        &self,
        (step, x): (&Step, f64),
        y: &[Tensor],
        ks: &Increments,
    ) -> Result<Vec<Tensor>> {
        let weights = self.tableau.weights_at(x);
        let of_leaf = |(leaf, roles): (usize, &Roles)| {
            ops::combine(&terms(leaf, step.h, y, &weights, ks), 1.0, roles.state())
        };
        self.roles.iter().enumerate().map(of_leaf).collect()
    }

    /// What a field returns must be like what it was given: as many tensors, shapes, dtypes, device.
    pub(crate) fn check(&self, y: &[Tensor], k: &[Tensor]) -> Result<()> {
        alike(y, k)
    }
}

fn bad_solution(step: Step) -> Error {
    Error::NonFiniteSolution {
        step: step.index,
        t: step.end,
    }
}

/// y and h·c_j k_j of one leaf, zero coefficients left out.
fn terms<'a>(
    leaf: usize,
    h: f64,
    y: &'a [Tensor],
    c: &[f64],
    ks: &'a [Option<Vec<Tensor>>],
) -> Vec<(f64, &'a Tensor)> {
    let stages = c.iter().zip(ks).filter(|(c, _)| **c != 0.0);
    let stages = stages.filter_map(|(c, k)| Some((h * c, &k.as_ref()?[leaf])));
    std::iter::once((1.0, &y[leaf])).chain(stages).collect()
}

/// Says where the field failed; an error of our own passes as it is.
pub(crate) fn located(error: Error, step: Step, stage: usize, t: f64) -> Error {
    let Error::Candle(error) = error else {
        return error;
    };
    let step = step.index;
    Error::Candle(error.context(format!(
        "the field failed at step {step}, stage {stage}, t = {t:?}"
    )))
}
