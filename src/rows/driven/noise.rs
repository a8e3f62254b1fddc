//! The functionals of a step's noise, lane by lane.

use super::mix::ByFunctional;
use crate::driven::{Driven, Functional, NoiseType, Sum, Table};
use crate::error::Result;
use crate::schedule::Step;
use crate::simd::{aligned, Aligned, Element};

/// The functionals that a table reads, the first of which is 1.
pub(super) fn functionals(table: &Table) -> Vec<Functional> {
    let mut found = vec![Functional::One];
    let sums = table.evaluations.iter().map(|e| &e.at).chain(table.next);
    for term in sums.flat_map(|sum| sum.terms) {
        if !found.contains(&term.on) {
            found.push(term.on);
        }
    }
    found
}

/// The coefficients of evaluation i in a sum, by functional.
pub(super) fn coefficients(sum: &Sum, i: usize, functionals: &[Functional]) -> ByFunctional {
    let mut cs = ByFunctional::default();
    for term in sum.terms.iter().filter(|term| term.of == i) {
        for (c, on) in cs.iter_mut().zip(functionals) {
            if *on == term.on {
                *c += term.c;
            }
        }
    }
    cs
}

/// ξ, η and what the sums of a table read of them, of one tile.
pub(super) struct LaneNoise<T: Element> {
    functionals: Vec<Functional>,
    /// `[channel][B]`; η is empty where no functional reads it.
    w: Vec<f64>,
    u: Vec<f64>,
    /// Features of the state that a channel drives.
    shared: usize,
    /// The functionals behind 1, `[functional][feature][B]`.
    values: Aligned<T>,
}

impl<T: Element> LaneNoise<T> {
    pub(super) fn new(driven: &Driven, dim: usize, batch: usize) -> Self {
        let functionals = functionals(driven.table());
        let (channels, shared) = match driven.drive.equation.noise {
            NoiseType::Scalar => (1, dim),
            _ => (dim, 1),
        };
        let integrals = functionals.contains(&Functional::U);
        Self {
            w: vec![0.0; channels * batch],
            u: vec![0.0; if integrals { channels * batch } else { 0 }],
            shared,
            values: aligned((functionals.len() - 1) * dim * batch),
            functionals,
        }
    }

    /// Those of a step for the rows of the lanes.
    pub(super) fn draw(&mut self, driven: &Driven, step: Step, rows: &[usize]) -> Result<()> {
        if self.functionals.len() == 1 {
            return Ok(());
        }
        let (w, u) = (&mut self.w, &mut self.u);
        driven
            .drive
            .noise
            .draw_lanes(step, driven.span, rows, [&mut w[..], &mut u[..]])?;
        let batch = rows.len();
        let size = self.w.len() * self.shared;
        let values = self.values.chunks_exact_mut(size.max(1));
        for (on, values) in self.functionals[1..].iter().zip(values) {
            let units = match on {
                Functional::U => &self.u,
                _ => &self.w,
            };
            // ξ and η are rounded once; what is made of them, once more.
            for (channel, values) in units
                .chunks_exact(batch)
                .zip(values.chunks_exact_mut(self.shared * batch))
            {
                for values in values.chunks_exact_mut(batch) {
                    for (value, x) in values.iter_mut().zip(channel) {
                        let x = T::of(*x).wide();
                        *value = T::of(match on {
                            Functional::One => 1.0,
                            Functional::W | Functional::U => x,
                            Functional::Ww => 0.5 * x * x - 0.5,
                            Functional::Www => (x * x * x - 3.0 * x) / 6.0,
                        });
                    }
                }
            }
        }
        Ok(())
    }

    /// The functionals behind 1, one after the other.
    pub(super) fn values(&self) -> &[T] {
        &self.values
    }
}
