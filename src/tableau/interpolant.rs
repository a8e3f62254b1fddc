//! Interpolants (dense output): the state at a fraction x of a step, computed from the stages of the step.
//!
//! y(t_n + x h) = y_n + h Σ_i b_i(x) k_i with polynomials b_i, b(0) = 0 and b(1) = b.  Every interpolant that this
//! crate provides is continuously differentiable across steps: its time derivative Σ_i b_i′(x) k_i is the first stage
//! at x = 0, and the last stage f(t_{n+1}, y_{n+1}) at x = 1.

use super::{meets, Rows, Tableau, Verified};
use crate::error::TableauDefect;

impl Tableau {
    /// The same method with a last stage f(t_{n+1}, y_{n+1}) and an interpolant: its own, or otherwise the cubic
    /// Hermite polynomial through the states and the velocities at both ends, of order three at most.
    pub(crate) fn dense(&self) -> Self {
        let mut dense = self.ending_in_its_end();
        let stages = dense.stages();
        let rows = match &self.interpolant {
            Some(rows) => (0..stages).map(|i| rows.row(i).to_vec()).collect(),
            None => dense.hermite(),
        };
        dense.interpolant = Some(Rows::Owned(rows));
        dense
    }

    /// Whether the last stage is f(t_{n+1}, y_{n+1}), which is the first one of the next step.
    pub(crate) fn is_fsal(&self) -> bool {
        let last = self.stages() - 1;
        last > 0 && self.c[last] == 1.0 && self.b[last] == 0.0 && self.a(last) == &self.b[..last]
    }

    /// The same method, with f(t_{n+1}, y_{n+1}) appended where it is not the last stage already.
    fn ending_in_its_end(&self) -> Self {
        if self.is_fsal() {
            return self.clone();
        }
        let mut a: Vec<_> = (0..self.stages()).map(|i| self.a(i).to_vec()).collect();
        a.push(self.b.to_vec());
        let with = |x: &[f64], last: f64| [x, &[last]].concat().into();
        Self {
            a: Rows::Owned(a),
            b: with(&self.b, 0.0),
            c: with(&self.c, 1.0),
            embedded: self.embedded().map(|b| with(b, 0.0)),
            ..self.clone()
        }
    }

    /// b(x) = (3x² − 2x³) b + (x − 2x² + x³) e_1 + (x³ − x²) e_s.
    fn hermite(&self) -> Vec<Vec<f64>> {
        let last = self.stages() - 1;
        let row = |(i, b): (usize, &f64)| {
            let (first, last) = (f64::from(u8::from(i == 0)), f64::from(u8::from(i == last)));
            vec![first, 3.0 * b - 2.0 * first - last, first + last - 2.0 * b]
        };
        self.b.iter().enumerate().map(row).collect()
    }

    /// The stages that the solution or the interpolant depends on.
    pub(crate) fn dense_active(&self) -> Vec<bool> {
        let read = |i: usize| {
            let row = self
                .interpolant
                .as_ref()
                .map_or(&[][..], |rows| rows.row(i));
            self.b[i] != 0.0 || row.iter().any(|c| *c != 0.0)
        };
        self.read_by((0..self.stages()).map(read).collect())
    }

    /// b_i(x) of every stage; none where there is no interpolant.
    pub(crate) fn weights_at(&self, x: f64) -> Vec<f64> {
        if x == 1.0 {
            return self.b.to_vec();
        }
        self.polynomials(|row| row.iter().rev().fold(0.0, |sum, c| (sum + c) * x))
    }

    /// The coefficients of x, x², … in b_i(x); none where there is no interpolant.
    #[cfg(feature = "cuda")]
    pub(crate) fn interpolant_row(&self, i: usize) -> &[f64] {
        self.interpolant.as_ref().map_or(&[], |rows| rows.row(i))
    }

    /// b_i′(x) of every stage.
    pub(crate) fn slopes_at(&self, x: f64) -> Vec<f64> {
        self.polynomials(|row| {
            let terms = row.iter().enumerate().rev();
            terms.fold(0.0, |sum, (p, c)| sum * x + (p + 1) as f64 * c)
        })
    }

    /// That b(1) = b.
    pub(super) fn check_interpolant(&self) -> Verified {
        let Some(rows) = &self.interpolant else {
            return Ok(());
        };
        let (what, stages, got) = ("interpolant", self.stages(), rows.len());
        if got != stages && got != stages + 1 {
            return Err(TableauDefect::Length { what, stages, got });
        }
        for i in 0..got {
            let row = rows.row(i);
            if !row.iter().all(|c| c.is_finite()) {
                return Err(TableauDefect::NonFinite { what });
            }
            let b = self.b.get(i).copied().unwrap_or(0.0);
            let (sum, size) = row
                .iter()
                .fold((0.0, 1.0), |(sum, size), c| (sum + c, size + c.abs()));
            if !meets(sum, b, size, 1.0) {
                return Err(TableauDefect::InterpolantEnd { stage: i, sum, b });
            }
        }
        Ok(())
    }

    fn polynomials(&self, value: impl Fn(&[f64]) -> f64) -> Vec<f64> {
        let rows = self.interpolant.iter();
        rows.flat_map(|rows| (0..rows.len()).map(|i| value(rows.row(i))))
            .collect()
    }
}
