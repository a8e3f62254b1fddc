//! The data that may differ between the lanes of a tile: their steps, and the coefficients that depend on the step
//! lengths.

#![allow(clippy::type_complexity)] // pairs of slices of vectors

use pulp::Simd;

use super::tile::At;
use super::window::in_range;
use crate::schedule::Step;
use crate::simd::{enter, scalars_mut, vectors, Element, Kernel, Vectors};

/// The steps that the lanes of a tile take.
#[derive(Clone, Copy)]
pub(super) enum LaneSteps<'a> {
    /// All lanes take the same one.
    All(Step),
    /// Each lane takes its own.
    Each(&'a [Step]),
}

impl LaneSteps<'_> {
    /// The first one, which stands for all where an error or a place in memory is named.
    pub(super) fn first(&self) -> Option<&Step> {
        match self {
            Self::All(step) => Some(step),
            Self::Each(steps) => steps.first(),
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
pub(super) struct LaneClock<T: Element, S: Simd> {
    /// By lane, V vectors.
    times: Vectors<T, S>,
    rows: Vec<usize>,
}

impl<T: Element, S: Simd> LaneClock<T, S> {
    pub(super) fn new(width: usize) -> Self {
        Self {
            times: vectors::<T, S>(width),
            rows: vec![0; width * T::lanes::<S>()],
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
    pub(super) fn at(&mut self, steps: LaneSteps<'_>, c: f64) -> At<'_, T::Vector<S>> {
        let times = self.times_mut();
        match steps {
            LaneSteps::All(step) => times.fill(T::of(step.at(c))),
            LaneSteps::Each(steps) => {
                for (time, step) in times.iter_mut().zip(steps) {
                    *time = T::of(step.at(c));
                }
            }
        }
        self.now()
    }

    /// Times that are given by lane.
    pub(super) fn times_mut(&mut self) -> &mut [T] {
        scalars_mut::<T, S>(&mut self.times)
    }

    pub(super) fn now(&self) -> At<'_, T::Vector<S>> {
        At {
            times: &self.times,
            rows: &self.rows,
        }
    }
}

/// Non-zero coefficients of a tableau's row or column, with the stages that they belong to.
pub(super) type Row = Vec<(f64, usize)>;

/// Rows of coefficients, each multiplied by a factor of every lane.  The products are formed in f64 and rounded once.
pub(super) struct Coefficients<T: Element, S: Simd> {
    /// Row after row.
    values: Vec<f64>,
    of: Vec<usize>,
    /// Where each row begins and the last one ends.
    starts: Vec<usize>,
    width: usize,
    /// `[coefficient][V]`.
    numbers: Vectors<T, S>,
    /// What they were multiplied by: one factor for all lanes, or one for each.
    factors: Vec<f64>,
}

impl<T: Element, S: Simd> Coefficients<T, S> {
    pub(super) fn new(width: usize, rows: &[Row]) -> Self {
        let mut starts = vec![0];
        for row in rows {
            starts.push(starts[starts.len() - 1] + row.len());
        }
        let all = rows.iter().flatten();
        let (values, of): (Vec<_>, Vec<_>) = all.copied().unzip();
        Self {
            numbers: vectors::<T, S>(values.len() * width),
            values,
            of,
            starts,
            width,
            factors: vec![],
        }
    }

    /// The same, multiplied by one for all lanes.
    pub(super) fn plain(width: usize, rows: &[Row]) -> Self {
        let mut coefficients = Self::new(width, rows);
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
        let lanes = self.width * T::lanes::<S>();
        let numbers = scalars_mut::<T, S>(&mut self.numbers).chunks_exact_mut(lanes);
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

    pub(super) fn row(&self, i: usize) -> Terms<'_, T::Vector<S>> {
        let row = self.starts[i]..self.starts[i + 1];
        Terms {
            cs: &self.numbers[row.start * self.width..row.end * self.width],
            of: &self.of[row],
        }
    }
}

/// Multiples c x_j: V vectors of each c, and the j.
#[derive(Clone, Copy)]
pub(super) struct Terms<'a, X> {
    cs: &'a [X],
    of: &'a [usize],
}

impl<'a, X> Terms<'a, X> {
    /// The coefficient of a row of one.
    pub(super) fn coefficient(&self) -> &'a [X] {
        self.cs
    }
}

/// A factor of every lane, as a product of two numbers that T holds.
pub(super) struct Factor<T: Element, S: Simd> {
    parts: [Vectors<T, S>; 2],
    of: Vec<f64>,
    is_one: bool,
    /// Whether the second part is not one everywhere.
    has_second: bool,
}

impl<T: Element, S: Simd> Factor<T, S> {
    pub(super) fn new(width: usize) -> Self {
        Self {
            parts: [vectors::<T, S>(width), vectors::<T, S>(width)],
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
        let lanes = scalars_mut::<T, S>(first).iter_mut();
        let lanes = lanes.zip(scalars_mut::<T, S>(second));
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
    pub(super) fn apply(&self, s: S, x: &mut [T::Vector<S>]) {
        if self.is_one {
            return;
        }
        let parts = if self.has_second { 2 } else { 1 };
        for factor in &self.parts[..parts] {
            enter(s, Scale::<T, S> { x, factor });
        }
    }
}

/// What a sum begins with: c x, with V vectors of c, or x.
#[derive(Clone, Copy)]
pub(super) struct First<'a, X> {
    c: Option<&'a [X]>,
    x: &'a [X],
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
pub(super) fn add<T: Element, S: Simd>(
    s: S,
    width: usize,
    out: &mut [T::Vector<S>],
    terms: Terms<'_, T::Vector<S>>,
    xs: &[T::Vector<S>],
) {
    sum::<T, S>(s, width, out, None, terms, xs);
}

/// `out = first + Σ c_j x_j`.
pub(super) fn combine<T: Element, S: Simd>(
    s: S,
    width: usize,
    out: &mut [T::Vector<S>],
    first: First<'_, T::Vector<S>>,
    terms: Terms<'_, T::Vector<S>>,
    xs: &[T::Vector<S>],
) {
    sum::<T, S>(s, width, out, Some(first), terms, xs);
}

fn sum<'a, T: Element, S: Simd>(
    s: S,
    width: usize,
    out: &'a mut [T::Vector<S>],
    first: Option<First<'a, T::Vector<S>>>,
    terms: Terms<'a, T::Vector<S>>,
    xs: &'a [T::Vector<S>],
) {
    // Code for tiles of two vectors exists only where such tiles do.
    match T::WIDE && width == 2 {
        true => enter(
            s,
            LaneSum::<T, S, 2> {
                out,
                first,
                terms,
                xs,
            },
        ),
        false => enter(
            s,
            LaneSum::<T, S, 1> {
                out,
                first,
                terms,
                xs,
            },
        ),
    }
}

/// A sum of multiples: of `out` itself, or of a first vector in its place, and of the x_j.
struct LaneSum<'a, T: Element, S: Simd, const V: usize> {
    out: &'a mut [T::Vector<S>],
    first: Option<First<'a, T::Vector<S>>>,
    terms: Terms<'a, T::Vector<S>>,
    xs: &'a [T::Vector<S>],
}

impl<T: Element, S: Simd, const V: usize> Kernel<S> for LaneSum<'_, T, S, V> {
    type Output = ();

    #[inline(always)]
    fn run(self, s: S) {
        let Self { out, xs, terms, .. } = self;
        if let Some(First { c, x }) = self.first {
            match c.and_then(|c| c.as_chunks::<V>().0.first()) {
                Some(c) => {
                    let x = x[..out.len()].as_chunks::<V>().0;
                    for (out, x) in out.as_chunks_mut::<V>().0.iter_mut().zip(x) {
                        for v in 0..V {
                            out[v] = T::times(s, c[v], x[v]);
                        }
                    }
                }
                None => out.copy_from_slice(&x[..out.len()]),
            }
        }
        let (mut cs, mut of) = (terms.cs.as_chunks::<V>().0, terms.of);
        while of.len() >= 4 {
            add_terms::<T, S, V, 4>(s, out, cs, of, xs);
            (cs, of) = (&cs[4..], &of[4..]);
        }
        match of.len() {
            1 => add_terms::<T, S, V, 1>(s, out, cs, of, xs),
            2 => add_terms::<T, S, V, 2>(s, out, cs, of, xs),
            3 => add_terms::<T, S, V, 3>(s, out, cs, of, xs),
            _ => {}
        }
    }
}

/// Adds the first N terms.
#[inline(always)]
fn add_terms<T: Element, S: Simd, const V: usize, const N: usize>(
    s: S,
    out: &mut [T::Vector<S>],
    cs: &[[T::Vector<S>; V]],
    of: &[usize],
    xs: &[T::Vector<S>],
) {
    let size = out.len();
    let (mut c, mut x) = ([[T::zeros::<S>(); V]; N], [xs[..0].as_chunks::<V>().0; N]);
    for n in 0..N {
        c[n] = cs[n];
        x[n] = xs[of[n] * size..][..size].as_chunks::<V>().0;
    }
    for (i, out) in out.as_chunks_mut::<V>().0.iter_mut().enumerate() {
        for v in 0..V {
            let mut sum = out[v];
            for n in 0..N {
                sum = T::mul_add(s, c[n][v], x[n][i][v], sum);
            }
            out[v] = sum;
        }
    }
}

/// `x` times a factor of every lane.
struct Scale<'a, T: Element, S: Simd> {
    x: &'a mut [T::Vector<S>],
    factor: &'a [T::Vector<S>],
}

impl<T: Element, S: Simd> Kernel<S> for Scale<'_, T, S> {
    type Output = ();

    #[inline(always)]
    fn run(self, s: S) {
        for x in self.x.chunks_exact_mut(self.factor.len()) {
            for (x, factor) in x.iter_mut().zip(self.factor) {
                *x = T::times(s, *x, *factor);
            }
        }
    }
}
