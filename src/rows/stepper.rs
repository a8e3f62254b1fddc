//! Steps of one tile.

use pulp::Simd;

use super::activations::{KeptEvaluations, Selection};
use super::tile::Tiled;
use super::trajectory::Snapshot;
use super::{Failure, TilePlan};
use crate::error::Error;
use crate::precision::Low;
use crate::schedule::Step;
use crate::simd::{enter, vectors, Element, Kernel, Vectors};

/// Non-zero coefficients of a tableau's row or column, with the stages that they belong to.
type Terms = Vec<(f64, usize)>;

/// Takes steps of one tile after the other; owns the room that a step needs.
pub(super) struct Stepper<'p, T: Element, S: Simd> {
    pub(super) s: S,
    pub(super) field: &'p dyn Tiled<T, S>,
    pub(super) plan: &'p TilePlan<'p>,
    /// Vectors of a feature.
    pub(super) width: usize,
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

impl<'p, T: Element, S: Simd> Stepper<'p, T, S> {
    pub(super) fn new(s: S, field: &'p dyn Tiled<T, S>, plan: &'p TilePlan<'p>) -> Self {
        let scheme = &plan.problem.scheme;
        let (tableau, width) = (&scheme.tableau, field.width());
        let size = plan.layout.dim() * width;
        let stages = scheme.stages();
        let terms = |row: &[f64]| {
            let of = stages.iter().filter_map(|&j| Some((*row.get(j)?, j)));
            of.filter(|(c, _)| *c != 0.0).collect()
        };
        Self {
            s,
            field,
            plan,
            width,
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
        vectors::<T, S>(self.field.kept() * self.width)
    }

    /// y_{n+1} in place of y_n; what is wanted of the evaluations is kept.
    pub(super) fn advance(
        &mut self,
        step: Step,
        y: &mut [T::Vector<S>],
        slot: &mut [T::Vector<S>],
        kept: Option<(&Selection, &mut KeptEvaluations<T>)>,
    ) -> Result<(), Failure> {
        let advance = Advance {
            stepper: &mut *self,
            step,
            y,
            slot,
            kept,
        };
        enter(advance.stepper.s, advance)
    }

    #[inline(always)]
    fn take(
        &mut self,
        step: Step,
        y: &mut [T::Vector<S>],
        slot: &mut [T::Vector<S>],
        mut kept: Option<(&Selection, &mut KeptEvaluations<T>)>,
    ) -> Result<(), Failure> {
        for at in 0..self.stages.len() {
            let i = self.stages[at];
            let place = match &mut kept {
                Some((selection, kept)) => {
                    kept.slot_mut::<S>(selection, (step.index, at), self.width)
                }
                None => None,
            };
            if let Some(place) = place {
                self.stage(step, i, y, place);
                self.evaluate(step, i, place);
            } else {
                self.stage(step, i, y, slot);
                self.evaluate(step, i, slot);
                if let Some((selection, kept)) = &mut kept {
                    kept.save(self.s, selection, (step.index, at), slot, self.width);
                }
            }
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
                    t: step.end,
                },
            });
        }
        Ok(())
    }

    /// Evaluates the stages of the step from y again, each into a slot of its own; the velocities
    /// only as far as later stages read them.
    #[inline(always)]
    pub(super) fn linearize(&mut self, step: Step, y: &[T::Vector<S>], slots: &mut [T::Vector<S>]) {
        let size = self.field.kept() * self.width;
        for (at, slot) in (0..self.stages.len()).zip(slots.chunks_exact_mut(size)) {
            let i = self.stages[at];
            self.stage(step, i, y, slot);
            if at + 1 < self.stages.len() {
                self.evaluate(step, i, slot);
            } else {
                let t = step.at(self.plan.problem.scheme.tableau.c()[i]);
                self.field.velocity(self.s, t, slot, None);
            }
        }
    }

    /// The same from what was kept of them.
    #[inline(always)]
    pub(super) fn recall(
        &mut self,
        step: Step,
        selection: &Selection,
        kept: &KeptEvaluations<T>,
        slots: &mut [T::Vector<S>],
    ) {
        let known = selection.known(step.index);
        let size = self.field.kept() * self.width;
        for (at, slot) in (0..self.stages.len()).zip(slots.chunks_exact_mut(size)) {
            let i = self.stages[at];
            kept.load(self.s, selection, (step.index, at), slot, self.width);
            let t = step.at(self.plan.problem.scheme.tableau.c()[i]);
            self.field.recall(self.s, t, slot, &known);
        }
    }

    /// Y_i = Q(y + h Σ a_ij k_j), the first features of the slot.
    #[inline(always)]
    fn stage(&self, step: Step, i: usize, y: &[T::Vector<S>], slot: &mut [T::Vector<S>]) {
        let stage = &mut slot[..self.size];
        combine::<T, S>(self.s, stage, (1.0, y), step.h, &self.a[i], &self.ks);
        self.round(stage);
    }

    /// k_i = Q(f(t_i, Y_i)).
    #[inline(always)]
    fn evaluate(&mut self, step: Step, i: usize, slot: &mut [T::Vector<S>]) {
        let t = step.at(self.plan.problem.scheme.tableau.c()[i]);
        let k = &mut self.ks[i * self.size..][..self.size];
        self.field.velocity(self.s, t, slot, Some(k));
        round::<T, S>(self.s, self.plan, self.width, k);
    }

    /// Rounds a state-like tile to compute precision, leaf by leaf.
    #[inline(always)]
    pub(super) fn round(&self, x: &mut [T::Vector<S>]) {
        round::<T, S>(self.s, self.plan, self.width, x);
    }

    /// y_{m+1} from y_m as they are kept, for a plan that did not keep it.
    pub(super) fn replay(
        &mut self,
        m: usize,
        y: &Snapshot<T>,
        slot: &mut [T::Vector<S>],
    ) -> Result<Snapshot<T>, Failure> {
        let mut tile = vectors::<T, S>(self.size);
        y.load::<S>(&mut tile);
        self.advance(self.plan.schedule.step(m), &mut tile, slot, None)?;
        let failed = |error| Failure { at: (m, 0), error };
        Snapshot::of::<S>(&tile).map_err(failed)
    }
}

/// [`Stepper::advance`], in code for the vector unit.
struct Advance<'a, 'p, T: Element, S: Simd> {
    stepper: &'a mut Stepper<'p, T, S>,
    step: Step,
    y: &'a mut [T::Vector<S>],
    slot: &'a mut [T::Vector<S>],
    kept: Option<(&'a Selection, &'a mut KeptEvaluations<T>)>,
}

impl<T: Element, S: Simd> Kernel<S> for Advance<'_, '_, T, S> {
    type Output = Result<(), Failure>;

    #[inline(always)]
    fn run(self, _: S) -> Self::Output {
        self.stepper.take(self.step, self.y, self.slot, self.kept)
    }
}

#[inline(always)]
fn round<T: Element, S: Simd>(s: S, plan: &TilePlan<'_>, width: usize, x: &mut [T::Vector<S>]) {
    let mut rest = x;
    for (features, low) in plan.layout.features.iter().zip(&plan.low) {
        let leaf;
        (leaf, rest) = rest.split_at_mut(features * width);
        if *low != Low::None {
            for x in leaf {
                *x = T::round(s, *low, *x);
            }
        }
    }
}

/// `y += h Σ c x_j`, the x_j one after the other in `xs`.
pub(super) fn add<T: Element, S: Simd>(
    s: S,
    y: &mut [T::Vector<S>],
    h: f64,
    terms: &[(f64, usize)],
    xs: &[T::Vector<S>],
) {
    enter(
        s,
        Add::<T, S> {
            out: y,
            first: None,
            h,
            terms,
            xs,
        },
    );
}

/// `out = c x + h Σ c_j x_j`, in one pass over `out` for few terms.
pub(super) fn combine<T: Element, S: Simd>(
    s: S,
    out: &mut [T::Vector<S>],
    first: (f64, &[T::Vector<S>]),
    h: f64,
    terms: &[(f64, usize)],
    xs: &[T::Vector<S>],
) {
    enter(
        s,
        Add::<T, S> {
            out,
            first: Some(first),
            h,
            terms,
            xs,
        },
    );
}

/// A sum of multiples: of `out` itself, or of a first vector in its place, and of the x_j.
struct Add<'a, T: Element, S: Simd> {
    out: &'a mut [T::Vector<S>],
    first: Option<(f64, &'a [T::Vector<S>])>,
    h: f64,
    terms: &'a [(f64, usize)],
    xs: &'a [T::Vector<S>],
}

impl<T: Element, S: Simd> Kernel<S> for Add<'_, T, S> {
    type Output = ();

    #[inline(always)]
    fn run(self, s: S) {
        let Self { out, h, xs, .. } = self;
        let Some((c, x)) = self.first else {
            return add_all::<T, S>(s, out, h, self.terms, xs);
        };
        let first = (T::of(c), x);
        match self.terms {
            [] => set_terms::<T, S, 0>(s, out, first, h, &[], xs),
            [a] => set_terms::<T, S, 1>(s, out, first, h, &[*a], xs),
            [a, b] => set_terms::<T, S, 2>(s, out, first, h, &[*a, *b], xs),
            [a, b, d] => set_terms::<T, S, 3>(s, out, first, h, &[*a, *b, *d], xs),
            [a, b, d, e, rest @ ..] => {
                set_terms::<T, S, 4>(s, out, first, h, &[*a, *b, *d, *e], xs);
                add_all::<T, S>(s, out, h, rest, xs);
            }
        }
    }
}

#[inline(always)]
fn add_all<T: Element, S: Simd>(
    s: S,
    y: &mut [T::Vector<S>],
    h: f64,
    terms: &[(f64, usize)],
    xs: &[T::Vector<S>],
) {
    let (fours, rest) = terms.as_chunks::<4>();
    for terms in fours {
        add_terms::<T, S, 4>(s, y, h, terms, xs);
    }
    match *rest {
        [a] => add_terms::<T, S, 1>(s, y, h, &[a], xs),
        [a, b] => add_terms::<T, S, 2>(s, y, h, &[a, b], xs),
        [a, b, c] => add_terms::<T, S, 3>(s, y, h, &[a, b, c], xs),
        _ => {}
    }
}

/// [`add`] of N terms.
#[inline(always)]
fn add_terms<T: Element, S: Simd, const N: usize>(
    s: S,
    y: &mut [T::Vector<S>],
    h: f64,
    terms: &[(f64, usize); N],
    xs: &[T::Vector<S>],
) {
    let (cs, xs) = factors::<T, S, N>(s, y.len(), h, terms, xs);
    for (i, y) in y.iter_mut().enumerate() {
        let mut sum = *y;
        for n in 0..N {
            sum = T::mul_add(s, cs[n], xs[n][i], sum);
        }
        *y = sum;
    }
}

/// [`combine`] of N terms.
#[inline(always)]
fn set_terms<T: Element, S: Simd, const N: usize>(
    s: S,
    out: &mut [T::Vector<S>],
    (c, x): (T, &[T::Vector<S>]),
    h: f64,
    terms: &[(f64, usize); N],
    xs: &[T::Vector<S>],
) {
    let (cs, xs) = factors::<T, S, N>(s, out.len(), h, terms, xs);
    let (c, x) = (T::splat(s, c), &x[..out.len()]);
    for (i, y) in out.iter_mut().enumerate() {
        let mut sum = T::times(s, c, x[i]);
        for n in 0..N {
            sum = T::mul_add(s, cs[n], xs[n][i], sum);
        }
        *y = sum;
    }
}

/// h c_j and x_j of the terms.
#[allow(clippy::type_complexity)]
#[inline(always)]
fn factors<'a, T: Element, S: Simd, const N: usize>(
    s: S,
    size: usize,
    h: f64,
    terms: &[(f64, usize); N],
    xs: &'a [T::Vector<S>],
) -> ([T::Vector<S>; N], [&'a [T::Vector<S>]; N]) {
    let (mut cs, mut each) = ([T::zeros::<S>(); N], [&xs[..0]; N]);
    for n in 0..N {
        cs[n] = T::splat(s, T::of(h * terms[n].0));
        each[n] = &xs[terms[n].1 * size..][..size];
    }
    (cs, each)
}

/// Whether no number is NaN or infinite.
#[inline(always)]
pub(super) fn is_finite<T: Element, S: Simd>(s: S, x: &[T::Vector<S>]) -> bool {
    // 0·x is 0 for finite x, and NaN otherwise; NaN stays in a sum.
    let (zero, mut sums) = (T::zeros::<S>(), [T::zeros::<S>(); 4]);
    let (fours, rest) = x.as_chunks::<4>();
    for x in fours {
        for i in 0..4 {
            sums[i] = T::mul_add(s, zero, x[i], sums[i]);
        }
    }
    for x in rest {
        sums[0] = T::mul_add(s, zero, *x, sums[0]);
    }
    let pairs = [T::plus(s, sums[0], sums[1]), T::plus(s, sums[2], sums[3])];
    T::total(s, T::plus(s, pairs[0], pairs[1])) == T::default()
}
