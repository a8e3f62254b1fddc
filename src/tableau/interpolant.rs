//! Interpolants (dense output): the state at a fraction x of a step, computed from the stages of the step.
//!
//! y(t_n + x h) = y_n + h Σ_i b_i(x) k_i with polynomials b_i, b(0) = 0 and b(1) = b.  Every interpolant that this
//! crate provides is continuously differentiable across steps: its time derivative Σ_i b_i′(x) k_i is the first stage
//! at x = 0, and the last stage f(t_{n+1}, y_{n+1}) at x = 1.

use super::{meets, trees, Rows, Tableau, Tree, Verified};
use crate::error::TableauDefect;

impl Tableau {
    /// The same method with a last stage f(t_{n+1}, y_{n+1}) and an interpolant: its own, or otherwise the cubic
    /// Hermite polynomial through the states and the velocities at both ends, of order three at most.
    pub(crate) fn dense(&self) -> Self {
        let mut dense = self.ending_in_its_end();
        let stages = dense.stages();
        let rows = match &self.interpolant {
            Some(rows) => {
                let mut own: Vec<_> = (0..stages).map(|i| rows.row(i).to_vec()).collect();
                // f(t_{n+1}, y_{n+1}) may have a row of its own although it is the last stage.
                if let (true, Some(last)) = (rows.len() > stages, own.last_mut()) {
                    last.resize(last.len().max(rows.row(stages).len()), 0.0);
                    for (own, more) in last.iter_mut().zip(rows.row(stages)) {
                        *own += more;
                    }
                }
                own
            }
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

    /// Whether the interpolant has the order of the embedded solution at least, which is one less than the method's: then
    /// it is as accurate as the tolerance asks for.
    pub(crate) fn interpolates_well(&self) -> bool {
        self.interpolation_order() + 1 >= self.order
    }

    /// Whether adaptive steps end at outputs unless the options say otherwise: the method has no interpolant of its own,
    /// and the cubic Hermite polynomial, of order three, is more than one order below the method.
    pub(crate) fn ends_steps_at_outputs(&self) -> bool {
        self.interpolant.is_none() && self.order > 4
    }

    /// The order of the interpolant, up to that of the method: Σ b_i(x) Φ_i(τ) = x^|τ| / γ(τ) for every rooted tree τ of
    /// as many vertices.
    fn interpolation_order(&self) -> usize {
        const X: f64 = 0.5;
        let dense = self.dense();
        let weights = dense.weights_at(X);
        let holds = |tree: &Tree| {
            let exact = X.powi(tree.order as i32) / tree.density();
            let terms = weights.iter().zip(tree.weights(&dense));
            let (sum, size) = terms.fold((0.0, exact), |(sum, size), (b, (phi, abs))| {
                (sum + b * phi, size + b.abs() * abs)
            });
            (sum - exact).abs() <= 1e-9 * size
        };
        let all = trees(self.order);
        all.iter()
            .take_while(|trees| trees.iter().all(holds))
            .count()
    }

    /// The stages that the solution or the interpolant depends on.
    pub(crate) fn dense_active(&self) -> Vec<bool> {
        self.active_with_rows(self.stages())
    }

    /// The same of a step that hands its last stage on to the next, which then counts it among its own.
    pub(crate) fn joined_active(&self) -> Vec<bool> {
        self.active_with_rows(self.stages() - 1)
    }

    /// The stages that the solution or the first rows of the interpolant depend on.
    fn active_with_rows(&self, rows: usize) -> Vec<bool> {
        let read = |i: usize| {
            let row = self.interpolant.as_ref().filter(|_| i < rows);
            let row = row.map_or(&[][..], |rows| rows.row(i));
            self.b[i] != 0.0 || row.iter().any(|c| *c != 0.0)
        };
        self.read_by((0..self.stages()).map(read).collect())
    }

    /// Whether the state at the end of a step, the embedded one, an output inside the step, the control of the step
    /// length, or the next step reads stage i itself, and not only through other stages.
    pub(crate) fn is_weighed(&self, i: usize) -> bool {
        let is_handed_on = i + 1 == self.stages() && self.is_fsal();
        let is_first_of_pair = i == 0 && self.embedded().is_some();
        if is_handed_on || is_first_of_pair {
            return true;
        }
        let row = self
            .interpolant
            .as_ref()
            .map_or(&[][..], |rows| rows.row(i));
        let embedded = self.embedded().and_then(|b| b.get(i));
        let weights = row.iter().chain(self.b.get(i)).chain(embedded);
        weights.into_iter().any(|b| *b != 0.0)
    }

    /// b_i(x) of every stage; none where there is no interpolant.
    pub(crate) fn weights_at(&self, x: f64) -> Vec<f64> {
        if x == 1.0 {
            return self.b.to_vec();
        }
        self.polynomials(|row| row.iter().rev().fold(0.0, |sum, c| (sum + c) * x))
    }

    /// b_i(x) of one stage at several x.
    pub(crate) fn weights_of_stage(&self, i: usize, xs: &[f64], weights: &mut [f64]) {
        let row = self
            .interpolant
            .as_ref()
            .map_or(&[][..], |rows| rows.row(i));
        weights.fill(0.0);
        for c in row.iter().rev() {
            for (weight, x) in weights.iter_mut().zip(xs) {
                *weight = (*weight + c) * x;
            }
        }
        for (weight, _) in weights.iter_mut().zip(xs).filter(|(_, x)| **x == 1.0) {
            *weight = self.b[i];
        }
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

#[cfg(test)]
mod tests {
    use super::super::{BOSH3, DOPRI5, DOPRI8, FEHLBERG45, RK4, TSIT5};
    use super::*;

    /// Pairs, the orders of their interpolants, and whether these suffice for the tolerance.
    const ORDERS: [(Tableau, usize, bool); 5] = [
        (BOSH3, 3, true),
        (FEHLBERG45, 3, false),
        (DOPRI5, 4, true),
        (TSIT5, 4, true),
        (DOPRI8, 5, false),
    ];

    /// The largest defect of a condition of order p at x, relative to its right-hand side.
    fn defect(method: &Tableau, p: usize, x: f64) -> f64 {
        let (dense, mut worst) = (method.dense(), 0.0f64);
        let weights = dense.weights_at(x);
        for tree in &trees(p)[p - 1] {
            let exact = x.powi(p as i32) / tree.density();
            let terms = weights.iter().zip(tree.weights(&dense));
            let sum: f64 = terms.map(|(b, (phi, _))| b * phi).sum();
            worst = worst.max((sum - exact).abs() / exact);
        }
        worst
    }

    #[test]
    fn a_row_of_the_end_is_that_of_the_last_stage_where_both_are_one() {
        let hermite = BOSH3.hermite();
        // The last stage of BOSH3 is f(t_{n+1}, y_{n+1}): its row, given as one of its own.
        let mut rows = hermite.clone();
        rows.push(rows[3].clone());
        rows[3] = vec![];
        let method = BOSH3.with_interpolant(rows).unwrap();
        let [own, known] = [method.dense(), BOSH3.with_interpolant(hermite).unwrap()];
        assert_eq!(own.weights_at(0.3), known.dense().weights_at(0.3));
    }

    #[test]
    fn interpolants_meet_the_conditions_of_their_orders_and_no_more() {
        for (method, order, suffices) in ORDERS {
            let name = method.name().to_owned();
            for x in [0.1, 0.25, 0.4, 0.5, 0.77, 0.9] {
                for p in 1..=order {
                    let defect = defect(&method, p, x);
                    assert!(defect <= 1e-9, "{name} order {p} at {x}: {defect:e}");
                }
                assert!(defect(&method, order + 1, x) > 1e-7, "{name} at {x}");
            }
            assert_eq!(method.interpolation_order(), order, "{name}");
            assert_eq!(method.interpolates_well(), suffices, "{name}");
            // Of the pairs, one has none of its own that is better than the Hermite polynomial.
            assert_eq!(
                method.ends_steps_at_outputs(),
                name == "fehlberg45",
                "{name}"
            );
        }
    }

    #[test]
    fn interpolants_join_states_and_velocities_at_the_ends_of_steps() {
        for method in ORDERS.map(|(method, ..)| method).into_iter().chain([RK4]) {
            let dense = method.dense();
            let last = dense.stages() - 1;
            let unit = |at: usize| move |i: usize| f64::from(u8::from(i == at));
            let near = |got: Vec<f64>, exact: &dyn Fn(usize) -> f64| {
                let pairs = got.iter().enumerate();
                pairs.map(|(i, b)| (b - exact(i)).abs()).fold(0.0, f64::max)
            };
            let b = |i: usize| dense.b[i];
            let name = method.name();
            assert_eq!(near(dense.weights_at(0.0), &|_| 0.0), 0.0, "{name}");
            assert_eq!(near(dense.weights_at(1.0), &b), 0.0, "{name}");
            // And not only there, where it is b by definition.
            assert!(near(dense.weights_at(1.0 - 1e-15), &b) <= 1e-10, "{name}");
            assert!(near(dense.slopes_at(0.0), &unit(0)) <= 1e-10, "{name}");
            assert!(near(dense.slopes_at(1.0), &unit(last)) <= 1e-10, "{name}");
        }
    }

    #[test]
    fn weights_are_the_same_one_by_one_and_stage_by_stage() {
        let xs = [0.0, 0.3, 1.0, 0.75];
        for (method, ..) in &ORDERS {
            let method = method.dense();
            let mut weights = [0.0; 4];
            for i in 0..method.stages() {
                method.weights_of_stage(i, &xs, &mut weights);
                assert_eq!(weights, xs.map(|x| method.weights_at(x)[i]));
            }
        }
    }

    #[test]
    fn only_other_stages_read_the_second_stage_of_dopri5() {
        let unread = |method: &Tableau| -> Vec<_> {
            let all = 0..method.stages();
            all.filter(|&i| !method.is_weighed(i)).collect()
        };
        assert_eq!(unread(&DOPRI5.dense()), [1]);
        assert_eq!(unread(&DOPRI8.dense()), [1, 2, 3, 4]);
        assert_eq!(unread(&TSIT5.dense()), [0; 0]);
        assert_eq!(unread(&RK4), [0; 0]);
    }

    #[test]
    fn error_weights_are_those_of_the_pairs() {
        for (method, q, size) in [
            (BOSH3, 2, 0.199),
            (FEHLBERG45, 4, 0.059),
            (DOPRI5, 4, 0.080),
            (TSIT5, 4, 0.755),
            (DOPRI8, 7, 2.77),
        ] {
            let (name, embedded) = (method.name(), method.embedded().unwrap());
            let e: Vec<f64> = method.b.iter().zip(embedded).map(|(b, e)| b - e).collect();
            let norm = e.iter().map(|e| e * e).sum::<f64>().sqrt();
            assert!((norm - size).abs() <= 0.006 * size, "{name}: {norm}");
            // They measure the terms of order q + 1 and no lower ones.
            for trees in &trees(q) {
                for tree in trees {
                    let terms = e.iter().zip(tree.weights(&method));
                    let (sum, size) = terms.fold((0.0, 0.0), |(sum, size), (e, (phi, abs))| {
                        (sum + e * phi, size + e.abs() * abs)
                    });
                    assert!(sum.abs() <= 1e-12 * (1.0 + size), "{name} {tree}: {sum:e}");
                }
            }
            let next = trees(q + 1);
            let of_next = next[q].iter().map(|tree| {
                let terms = e.iter().zip(tree.weights(&method));
                terms.map(|(e, (phi, _))| e * phi).sum::<f64>().abs()
            });
            assert!(of_next.fold(0.0, f64::max) > 1e-6, "{name}");
        }
    }
}
