//! The data that may differ between the lanes of a tile: their steps, and the coefficients that depend on the step
//! lengths.

use super::lanewise::Lanewise;
use super::tile::{At, Instant};
use super::window::in_range;
use crate::schedule::Step;
use crate::simd::{aligned, Aligned, Element};

/// The steps that the lanes of a tile take.
#[derive(Clone, Copy)]
pub(super) enum LaneSteps<'a> {
    /// All lanes take the same one.
    All(Step),
    /// Each lane takes its own.
    Each(&'a [Step]),
}

impl LaneSteps<'_> {
    /// The step of a lane.
    pub(super) fn of(&self, lane: usize) -> Option<&Step> {
        match self {
            Self::All(step) => Some(step),
            Self::Each(steps) => steps.get(lane),
        }
    }

    /// The number of the step in the solve; lanes with steps of their own keep nothing by it.
    pub(super) fn index(&self) -> usize {
        match self {
            Self::All(step) => step.index,
            Self::Each(_) => 0,
        }
    }

    /// Whether any lane needs the stages that only outputs inside steps read.
    pub(super) fn is_dense(&self) -> bool {
        match self {
            Self::All(step) => step.dense,
            Self::Each(steps) => steps.iter().any(|step| step.dense),
        }
    }

    /// A number of every step: one for all lanes, or one for each.
    pub(super) fn each(&self, of: impl Fn(&Step) -> f64, numbers: &mut Vec<f64>) {
        numbers.clear();
        match self {
            Self::All(step) => numbers.push(of(step)),
            Self::Each(steps) => numbers.extend(steps.iter().map(of)),
        }
    }
}

/// The times at which a tile is evaluated, and its rows.
pub(super) struct LaneClock<T: Element> {
    /// By lane, V vectors.
    times: Aligned<T>,
    instants: Vec<Instant>,
    /// Whether all lanes are at the first instant.
    together: bool,
    rows: Vec<usize>,
    /// Whether the field's tiles read times; otherwise they need not be right.
    pub(super) is_read: bool,
}

impl<T: Element> LaneClock<T> {
    pub(super) fn new(batch: usize) -> Self {
        Self {
            times: aligned::<T>(batch),
            instants: vec![Instant::default(); batch],
            together: true,
            rows: vec![0; batch],
            is_read: true,
        }
    }

    /// The lanes hold consecutive rows from `first` on, and then copies of the last one.
    pub(super) fn hold(&mut self, rows: std::ops::Range<usize>) {
        let last = rows.end.saturating_sub(1);
        for (lane, row) in self.rows.iter_mut().enumerate() {
            *row = last.min(rows.start + lane);
        }
    }

    /// The rows of the lanes.
    pub(super) fn rows_mut(&mut self) -> &mut [usize] {
        &mut self.rows
    }

    /// A stage at abscissa c of every lane's step.
    pub(super) fn at(&mut self, steps: LaneSteps<'_>, c: f64) -> At<'_, T> {
        let instant = |step: &Step| Instant {
            t: step.at(c),
            step: [step.t, step.end],
        };
        match steps {
            LaneSteps::All(step) => {
                let instant = instant(&step);
                self.times.fill(T::of(instant.t));
                self.instants[0] = instant;
                self.together = true;
            }
            LaneSteps::Each(steps) if self.is_read => {
                for (lane, step) in steps.iter().enumerate() {
                    self.set(lane, instant(step));
                }
            }
            LaneSteps::Each(_) => {}
        }
        self.now()
    }

    /// A time of one lane.
    pub(super) fn set(&mut self, lane: usize, instant: Instant) {
        if self.together {
            let all = self.instants[0];
            self.instants.fill(all);
            self.together = false;
        }
        self.times[lane] = T::of(instant.t);
        self.instants[lane] = instant;
    }

    pub(super) fn now(&self) -> At<'_, T> {
        At {
            times: &self.times,
            rows: &self.rows,
            instants: match self.together {
                true => &self.instants[..1],
                false => &self.instants,
            },
            is_weighed: true,
            is_repeated: false,
        }
    }
}

/// Non-zero coefficients of a tableau's row or column, with the stages that they belong to.
pub(super) type Row = Vec<(f64, usize)>;

/// Rows of coefficients, each multiplied by a factor of every lane.  The products are formed in f64 and rounded once.
pub(super) struct Coefficients<T: Element> {
    /// Row after row.
    values: Vec<f64>,
    of: Vec<usize>,
    /// Where each row begins and the last one ends.
    starts: Vec<usize>,
    batch: usize,
    /// `[coefficient][B]`.
    numbers: Aligned<T>,
    /// What they were multiplied by: one factor for all lanes, or one for each.
    factors: Vec<f64>,
}

impl<T: Element> Coefficients<T> {
    pub(super) fn new(batch: usize, rows: &[Row]) -> Self {
        let mut starts = vec![0];
        for row in rows {
            starts.push(starts[starts.len() - 1] + row.len());
        }
        let all = rows.iter().flatten();
        let (values, of): (Vec<_>, Vec<_>) = all.copied().unzip();
        Self {
            numbers: aligned::<T>(values.len() * batch),
            values,
            of,
            starts,
            batch,
            factors: vec![],
        }
    }

    /// The same, multiplied by one for all lanes.
    pub(super) fn plain(batch: usize, rows: &[Row]) -> Self {
        let mut coefficients = Self::new(batch, rows);
        coefficients.multiply(&[1.0]);
        coefficients
    }

    /// Multiplies by one factor for all lanes, or by one for each.
    pub(super) fn multiply(&mut self, factors: &[f64]) {
        if self.factors == factors {
            return;
        }
        self.factors.clear();
        self.factors.extend_from_slice(factors);
        let numbers = self.numbers.chunks_exact_mut(self.batch);
        for (c, numbers) in self.values.iter().zip(numbers) {
            match *factors {
                [factor] => numbers.fill(T::of(factor * c)),
                _ => {
                    for (number, factor) in numbers.iter_mut().zip(factors) {
                        *number = T::of(factor * c);
                    }
                }
            }
        }
    }

    pub(super) fn row(&self, i: usize) -> Terms<'_, T> {
        let row = self.starts[i]..self.starts[i + 1];
        Terms {
            cs: &self.numbers[row.start * self.batch..row.end * self.batch],
            of: &self.of[row],
        }
    }
}

/// Multiples c x_j: B numbers of each c, and the j.
#[derive(Clone, Copy)]
pub(super) struct Terms<'a, X> {
    pub(super) cs: &'a [X],
    pub(super) of: &'a [usize],
}

impl<'a, X> Terms<'a, X> {
    /// The coefficient of a row of one.
    pub(super) fn coefficient(&self) -> &'a [X] {
        self.cs
    }
}

/// A factor of every lane, as a product of two numbers that T holds.
pub(super) struct Factor<T: Element> {
    parts: [Aligned<T>; 2],
    of: Vec<f64>,
    is_one: bool,
    /// Whether the second part is not one everywhere.
    has_second: bool,
}

impl<T: Element> Factor<T> {
    pub(super) fn new(batch: usize) -> Self {
        Self {
            parts: [aligned::<T>(batch), aligned::<T>(batch)],
            of: vec![],
            is_one: false,
            has_second: false,
        }
    }

    /// One for all lanes, or one for each.
    pub(super) fn set(&mut self, factors: &[f64]) {
        if self.of == factors {
            return;
        }
        self.of.clear();
        self.of.extend_from_slice(factors);
        self.is_one = factors.iter().all(|f| *f == 1.0);
        let [first, second] = &mut self.parts;
        let lanes = first.iter_mut();
        let lanes = lanes.zip(second.iter_mut());
        let mut has_second = false;
        // One factor for all lanes is repeated.
        for ((first, second), factor) in lanes.zip(factors.iter().cycle()) {
            let (a, b) = in_range::<T>(*factor);
            (*first, *second) = (T::of(a), T::of(b));
            has_second |= b != 1.0;
        }
        self.has_second = has_second;
    }

    /// x times the factor.
    pub(super) fn apply(&self, on: &dyn Lanewise<T>, x: &mut [T]) {
        if self.is_one {
            return;
        }
        let parts = if self.has_second { 2 } else { 1 };
        for factor in &self.parts[..parts] {
            on.scale(x, factor);
        }
    }
}

/// What a sum begins with: c x, with B numbers of c, or x.
#[derive(Clone, Copy)]
pub(super) struct First<'a, X> {
    pub(super) c: Option<&'a [X]>,
    pub(super) x: &'a [X],
}

impl<'a, X> First<'a, X> {
    pub(super) fn plain(x: &'a [X]) -> Self {
        Self { c: None, x }
    }

    pub(super) fn times(c: &'a [X], x: &'a [X]) -> Self {
        Self { c: Some(c), x }
    }
}

/// `out += Σ c x_j`, the x_j one after the other in `xs`.
pub(super) fn add<T: Element>(
    on: &dyn Lanewise<T>,
    batch: usize,
    out: &mut [T],
    terms: Terms<'_, T>,
    xs: &[T],
) {
    on.sum(batch, out, None, terms, xs);
}

/// The same for a state of `size` numbers, with what rounding has taken from it behind them if that is carried: this
/// is added first, and taken anew.
pub(super) fn add_carried<T: Element>(
    on: &dyn Lanewise<T>,
    batch: usize,
    size: usize,
    state: &mut [T],
    terms: Terms<'_, T>,
    xs: &[T],
) {
    let (sum, lost) = state.split_at_mut(size);
    if lost.is_empty() {
        return add(on, batch, sum, terms, xs);
    }
    add(on, batch, lost, terms, xs);
    on.two_sums(sum, lost);
}

/// `out = first + Σ c_j x_j`.
pub(super) fn combine<T: Element>(
    on: &dyn Lanewise<T>,
    batch: usize,
    out: &mut [T],
    first: First<'_, T>,
    terms: Terms<'_, T>,
    xs: &[T],
) {
    on.sum(batch, out, Some(first), terms, xs);
}
