//! Steps of one tile.

use pulp::Simd;

use super::tile::{Snapshot, TileField};
use super::{Failure, Plan};
use crate::error::Error;
use crate::precision::Low;
use crate::simd::{enter, vectors, Element, Kernel, Vectors};
use crate::time::Step;

/// Non-zero coefficients of a tableau's row or column, with the stages that they belong to.
type Terms = Vec<(f64, usize)>;

/// Takes steps of one tile after the other; owns the room that a step needs.
pub(super) struct Stepper<'p, T: Element, S: Simd, F, const V: usize> {
    pub(super) s: S,
    pub(super) field: &'p F,
    pub(super) plan: &'p Plan<'p>,
    /// Vectors of a state.
    pub(super) size: usize,
    /// Active stages, ascending.
    pub(super) stages: Vec<usize>,
    /// a_ij by stage i.
    a: Vec<Terms>,
    /// b_j.
    b: Terms,
    /// k_j.
    ks: Vectors<T, S>,
}

impl<'p, T: Element, S: Simd, F: TileField<T>, const V: usize> Stepper<'p, T, S, F, V> {
    pub(super) fn new(s: S, field: &'p F, plan: &'p Plan<'p>) -> Self {
        let scheme = &plan.problem.scheme;
        let (tableau, size) = (&scheme.tableau, plan.layout.dim() * V);
        let stages: Vec<_> = (0..tableau.stages())
            .filter(|&i| scheme.active[i])
            .collect();
        let terms = |row: &[f64]| {
            let of = stages.iter().filter_map(|&j| Some((*row.get(j)?, j)));
            of.filter(|(c, _)| *c != 0.0).collect()
        };
        Self {
            s,
            field,
            plan,
            size,
            a: (0..tableau.stages())
                .map(|i| terms(&tableau.a(i)[..i.min(tableau.a(i).len())]))
                .collect(),
            b: terms(tableau.b()),
            ks: vectors::<T, S>(tableau.stages() * size),
            stages,
        }
    }

    /// Room for what one evaluation keeps.
    pub(super) fn slot(&self) -> Vectors<T, S> {
        vectors::<T, S>(self.field.kept() * V)
    }

    /// y_{n+1} in place of y_n.
    #[inline(always)]
    pub(super) fn advance(
        &mut self,
        step: Step,
        y: &mut [T::Vector<S>],
        slot: &mut [T::Vector<S>],
    ) -> Result<(), Failure> {
        for at in 0..self.stages.len() {
            let i = self.stages[at];
            self.stage(step, i, y, slot);
            self.evaluate(step, i, slot);
            let k = &self.ks[i * self.size..][..self.size];
            if !is_finite::<T, S>(self.s, k) {
                return Err(Failure {
                    at: (step.index, i),
                    error: Error::NonFiniteVelocity {
                        step: step.index,
                        stage: i,
                        t: step.at(self.plan.problem.scheme.tableau.c()[i]),
                    },
                });
            }
        }
        add::<T, S>(self.s, y, step.h, &self.b, &self.ks);
        if !is_finite::<T, S>(self.s, y) {
            return Err(Failure {
                at: (step.index, usize::MAX),
                error: Error::NonFiniteSolution {
                    step: step.index,
                    t: step.t + step.h,
                },
            });
        }
        Ok(())
    }

    /// Evaluates the stages of the step from y again, each into a slot of its own; the velocities
    /// only as far as later stages read them.
    #[inline(always)]
    pub(super) fn linearize(&mut self, step: Step, y: &[T::Vector<S>], slots: &mut [T::Vector<S>]) {
        let size = self.field.kept() * V;
        for (at, slot) in (0..self.stages.len()).zip(slots.chunks_exact_mut(size)) {
            let i = self.stages[at];
            self.stage(step, i, y, slot);
            if at + 1 < self.stages.len() {
                self.evaluate(step, i, slot);
            } else {
                let t = step.at(self.plan.problem.scheme.tableau.c()[i]);
                self.field.velocity::<S, V>(self.s, t, slot, None);
            }
        }
    }

    /// Y_i = Q(y + h Σ a_ij k_j), the first features of the slot.
    #[inline(always)]
    fn stage(&self, step: Step, i: usize, y: &[T::Vector<S>], slot: &mut [T::Vector<S>]) {
        let stage = &mut slot[..self.size];
        stage.copy_from_slice(y);
        add::<T, S>(self.s, stage, step.h, &self.a[i], &self.ks);
        self.round(stage);
    }

    /// k_i = Q(f(t_i, Y_i)).
    #[inline(always)]
    fn evaluate(&mut self, step: Step, i: usize, slot: &mut [T::Vector<S>]) {
        let t = step.at(self.plan.problem.scheme.tableau.c()[i]);
        let k = &mut self.ks[i * self.size..][..self.size];
        self.field.velocity::<S, V>(self.s, t, slot, Some(k));
        round::<T, S, V>(self.s, self.plan, k);
    }

    /// Rounds a state-like tile to compute precision, leaf by leaf.
    #[inline(always)]
    pub(super) fn round(&self, x: &mut [T::Vector<S>]) {
        round::<T, S, V>(self.s, self.plan, x);
    }

    /// y_{m+1} from y_m as they are kept, for a plan that did not keep it.
    pub(super) fn replay(
        &mut self,
        m: usize,
        y: &Snapshot<T>,
        slot: &mut [T::Vector<S>],
    ) -> Result<Snapshot<T>, Failure> {
        let s = self.s;
        let mut tile = vectors::<T, S>(self.size);
        y.load::<S>(&mut tile);
        let advance = Advance {
            step: self.plan.problem.plan.step(m),
            stepper: &mut *self,
            y: &mut tile,
            slot,
        };
        enter(s, advance)?;
        Ok(Snapshot::of::<S>(&tile))
    }
}

/// [`Stepper::advance`], where no vector code is entered yet.
struct Advance<'a, 'p, T: Element, S: Simd, F, const V: usize> {
    stepper: &'a mut Stepper<'p, T, S, F, V>,
    step: Step,
    y: &'a mut [T::Vector<S>],
    slot: &'a mut [T::Vector<S>],
}

impl<T: Element, S: Simd, F: TileField<T>, const V: usize> Kernel<S>
    for Advance<'_, '_, T, S, F, V>
{
    type Output = Result<(), Failure>;

    #[inline(always)]
    fn run(self, _: S) -> Self::Output {
        self.stepper.advance(self.step, self.y, self.slot)
    }
}

#[inline(always)]
fn round<T: Element, S: Simd, const V: usize>(s: S, plan: &Plan<'_>, x: &mut [T::Vector<S>]) {
    let mut rest = x;
    for (features, low) in plan.layout.features.iter().zip(&plan.low) {
        let leaf;
        (leaf, rest) = rest.split_at_mut(features * V);
        if *low != Low::None {
            for x in leaf {
                *x = T::round(s, *low, *x);
            }
        }
    }
}

/// `y += h Σ c x_j`, the x_j one after the other in `xs`.
#[inline(always)]
pub(super) fn add<T: Element, S: Simd>(
    s: S,
    y: &mut [T::Vector<S>],
    h: f64,
    terms: &[(f64, usize)],
    xs: &[T::Vector<S>],
) {
    let size = y.len();
    let (fours, ones) = terms.as_chunks::<4>();
    for [a, b, c, d] in fours {
        let [ca, cb, cc, cd] = [a.0, b.0, c.0, d.0].map(|c| T::of(h * c));
        let [ca, cb] = [T::splat(s, ca), T::splat(s, cb)];
        let [cc, cd] = [T::splat(s, cc), T::splat(s, cd)];
        let [xa, xb, xc, xd] = [a.1, b.1, c.1, d.1].map(|j| &xs[j * size..][..size]);
        for (i, y) in y.iter_mut().enumerate() {
            let sum = T::mul_add(s, ca, xa[i], *y);
            let sum = T::mul_add(s, cb, xb[i], sum);
            let sum = T::mul_add(s, cc, xc[i], sum);
            *y = T::mul_add(s, cd, xd[i], sum);
        }
    }
    for (c, j) in ones {
        let c = T::splat(s, T::of(h * c));
        for (y, x) in y.iter_mut().zip(&xs[j * size..][..size]) {
            *y = T::mul_add(s, c, *x, *y);
        }
    }
}

/// Whether no number is NaN or infinite.
#[inline(always)]
pub(super) fn is_finite<T: Element, S: Simd>(s: S, x: &[T::Vector<S>]) -> bool {
    // 0·x is 0 for finite x, and NaN otherwise; NaN stays in a sum.
    let (zero, mut sum) = (T::zeros::<S>(), T::zeros::<S>());
    for x in x {
        sum = T::mul_add(s, zero, *x, sum);
    }
    T::total(s, sum) == T::default()
}
