//! Butcher tableaux (a, b, c) of explicit Runge-Kutta methods, as data:
//!
//! k_i = f(t + c_i h, y + h Σ_{j<i} a_ij k_j),  y⁺ = y + h Σ b_i k_i.
//!
//! A tableau is valid by construction: c_i = Σ_j a_ij, and for every rooted tree τ of at most
//! `order` vertices Σ b_i Φ_i(τ) = 1/γ(τ) (Hairer, Nørsett & Wanner, "Solving Ordinary Differential
//! Equations I", §II.2, theorem 2.13).

mod interpolant;
mod methods;

use std::borrow::Cow;

use crate::error::{Error, Result, TableauDefect};
pub use methods::*;

/// An explicit Runge-Kutta method; the constants of this crate, or a user's own by
/// [`Tableau::new`].
///
/// ```
/// use candle_diffeq::tableau::Tableau;
/// // Heun's method of order three.
/// let a = vec![vec![], vec![1.0 / 3.0], vec![0.0, 2.0 / 3.0]];
/// let heun3 = Tableau::new("heun3", 3, a, vec![0.25, 0.0, 0.75], vec![0.0, 1.0 / 3.0, 2.0 / 3.0])?;
/// assert_eq!(heun3.stages(), 3);
/// # Ok::<(), candle_diffeq::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct Tableau {
    name: Cow<'static, str>,
    order: usize,
    a: Rows,
    b: Cow<'static, [f64]>,
    c: Cow<'static, [f64]>,
    embedded: Option<Cow<'static, [f64]>>,
    /// Coefficients of x, x², … by stage.
    interpolant: Option<Rows>,
}

/// Rows of a matrix: of a strictly lower triangular one, row i has i entries.
#[derive(Clone, Debug, PartialEq)]
enum Rows {
    Static(&'static [&'static [f64]]),
    Owned(Vec<Vec<f64>>),
}

impl Rows {
    fn len(&self) -> usize {
        match self {
            Self::Static(rows) => rows.len(),
            Self::Owned(rows) => rows.len(),
        }
    }

    fn row(&self, i: usize) -> &[f64] {
        match self {
            Self::Static(rows) => rows.get(i).copied().unwrap_or_default(),
            Self::Owned(rows) => rows.get(i).map(Vec::as_slice).unwrap_or_default(),
        }
    }
}

/// What a check found, before it is tied to the tableau's name.
type Verified = std::result::Result<(), TableauDefect>;

/// Relative to the sum of absolute values, the constants below miss no condition by more than
/// 9e-17; the rest is left to coefficients that a user copies with twelve digits.
const TOLERANCE: f64 = 1e-12;

/// The sum of absolute values counts for at most this multiple of the right-hand side.  In tall
/// trees of [`DOPRI8`] it is 1.6e13 times as large: without a cap the test would pass anything
/// there.  Every constant stays within 6e-14 of the right-hand side, against 1e-9 allowed.
const CONDITION: f64 = 1e3;

/// Whether `sum`, of terms with absolute values of sum `size`, is `exact`.  False for NaN.
fn meets(sum: f64, exact: f64, size: f64, scale: f64) -> bool {
    (sum - exact).abs() <= TOLERANCE * size.min(CONDITION * scale)
}

impl Tableau {
    /// Every constant of this crate, by order.
    pub const ALL: [Self; 13] = [
        EULER, MIDPOINT, HEUN, RALSTON, RK3, SSP_RK3, BOSH3, RK4, RK4_38, FEHLBERG45, DOPRI5,
        TSIT5, DOPRI8,
    ];

    /// A validated tableau.  `a`: one row a stage, row i with i entries.
    ///
    /// # Errors
    /// [`Error::InvalidTableau`] with the [`TableauDefect`]: lengths, non-finite coefficients, row
    /// sums, and every order condition up to `order`.
    pub fn new(
        name: impl Into<String>,
        order: usize,
        a: Vec<Vec<f64>>,
        b: Vec<f64>,
        c: Vec<f64>,
    ) -> Result<Self> {
        let tableau = Self {
            name: Cow::Owned(name.into()),
            order,
            a: Rows::Owned(a),
            b: Cow::Owned(b),
            c: Cow::Owned(c),
            embedded: None,
            interpolant: None,
        };
        tableau.check()?;
        Ok(tableau)
    }

    /// The same method with weights of a second solution; the difference of the two solutions estimates the local
    /// error.
    ///
    /// # Errors
    /// [`Error::InvalidTableau`] unless there is one finite weight a stage and they sum to one.
    pub fn with_embedded(mut self, weights: Vec<f64>) -> Result<Self> {
        self.embedded = Some(Cow::Owned(weights));
        self.check()?;
        Ok(self)
    }

    /// The same method with an interpolant: row i holds the coefficients of x, x², … in b_i(x), where y(t_n + x h) =
    /// y_n + h Σ b_i(x) k_i.  There is one row a stage, or one more: the last then belongs to f(t_{n+1}, y_{n+1}).
    /// Without it the interpolant of a method is the cubic Hermite polynomial through the states and velocities at
    /// both ends of a step.
    ///
    /// ```
    /// use candle_diffeq::tableau::Tableau;
    /// // The midpoint rule, interpolated to order two.
    /// let midpoint = Tableau::new("m", 2, vec![vec![], vec![0.5]], vec![0.0, 1.0], vec![0.0, 0.5])?;
    /// let midpoint = midpoint.with_interpolant(vec![vec![1.0, -1.0], vec![0.0, 1.0]])?;
    /// # Ok::<(), candle_diffeq::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::InvalidTableau`] unless the coefficients are finite, and b(1) = b.
    pub fn with_interpolant(mut self, rows: Vec<Vec<f64>>) -> Result<Self> {
        self.interpolant = Some(Rows::Owned(rows));
        self.check()?;
        Ok(self)
    }

    const fn constant(
        name: &'static str,
        order: usize,
        a: &'static [&'static [f64]],
        b: &'static [f64],
        c: &'static [f64],
        embedded: Option<&'static [f64]>,
    ) -> Self {
        Self::interpolated(name, order, a, b, c, embedded, None)
    }

    const fn interpolated(
        name: &'static str,
        order: usize,
        a: &'static [&'static [f64]],
        b: &'static [f64],
        c: &'static [f64],
        embedded: Option<&'static [f64]>,
        interpolant: Option<&'static [&'static [f64]]>,
    ) -> Self {
        Self {
            name: Cow::Borrowed(name),
            order,
            a: Rows::Static(a),
            b: Cow::Borrowed(b),
            c: Cow::Borrowed(c),
            embedded: match embedded {
                Some(weights) => Some(Cow::Borrowed(weights)),
                None => None,
            },
            interpolant: match interpolant {
                Some(rows) => Some(Rows::Static(rows)),
                None => None,
            },
        }
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its order of convergence.
    pub fn order(&self) -> usize {
        self.order
    }

    /// Number of stages s.
    pub fn stages(&self) -> usize {
        self.b.len()
    }

    /// a_i1 … a_i,i−1 of stage i, counted from 0; empty beyond the last.
    pub fn a(&self, i: usize) -> &[f64] {
        self.a.row(i)
    }

    /// The weights.
    pub fn b(&self) -> &[f64] {
        &self.b
    }

    /// The abscissae.
    pub fn c(&self) -> &[f64] {
        &self.c
    }

    /// The weights of the embedded solution, of an order lower.
    pub fn embedded(&self) -> Option<&[f64]> {
        self.embedded.as_deref()
    }

    /// The stages that the solution depends on.  At fixed step the last stage of a pair that is
    /// "first same as last" is not among them.
    pub fn active(&self) -> Vec<bool> {
        self.read_by(self.b.iter().map(|&b| b != 0.0).collect())
    }

    /// Whether stage i is y_{n+1}, so that it is also the first stage of the next step.
    pub(crate) fn ends_step(&self, i: usize) -> bool {
        let (read, others) = self.b.split_at(i);
        self.a(i) == read && others.iter().all(|b| *b == 0.0)
    }

    /// The stages that these are computed from, and these.
    fn read_by(&self, mut active: Vec<bool>) -> Vec<bool> {
        for i in (0..self.stages()).rev() {
            if active[i] {
                for (j, &a) in self.a(i).iter().enumerate() {
                    active[j] |= a != 0.0;
                }
            }
        }
        active
    }

    /// Everything that makes it a method of its order.
    ///
    /// # Errors
    /// [`Error::InvalidTableau`].
    pub fn check(&self) -> Result<()> {
        let checked = self
            .check_shape()
            .and_then(|()| self.check_row_sums())
            .and_then(|()| check_order(self, "b", &self.b, self.order))
            .and_then(|()| {
                self.embedded()
                    .map_or(Ok(()), |b| check_order(self, "embedded", b, 1))
            })
            .and_then(|()| self.check_interpolant());
        checked.map_err(|defect| self.invalid(defect))
    }

    /// Whether weights `b` with this a and c meet every order condition up to `order`; the embedded
    /// weights have an order of their own.
    ///
    /// # Errors
    /// [`Error::InvalidTableau`] with the first condition that is missed.
    pub fn check_weights(&self, b: &[f64], order: usize) -> Result<()> {
        let (what, stages, got) = ("weights", self.stages(), b.len());
        if got != stages {
            return Err(self.invalid(TableauDefect::Length { what, stages, got }));
        }
        check_order(self, what, b, order).map_err(|defect| self.invalid(defect))
    }

    fn invalid(&self, defect: TableauDefect) -> Error {
        let name = self.name.to_string();
        Error::InvalidTableau { name, defect }
    }

    fn check_shape(&self) -> Verified {
        let stages = self.stages();
        if stages == 0 {
            return Err(TableauDefect::NoStages);
        }
        let embedded = self.embedded().map_or(stages, <[f64]>::len);
        let lengths = [
            ("a", self.a.len()),
            ("c", self.c.len()),
            ("embedded", embedded),
        ];
        if let Some(&(what, got)) = lengths.iter().find(|(_, got)| *got != stages) {
            return Err(TableauDefect::Length { what, stages, got });
        }
        if let Some(row) = (0..stages).find(|&i| self.a(i).len() != i) {
            let got = self.a(row).len();
            return Err(TableauDefect::RowLength { row, got });
        }
        let finite = |x: &[f64]| x.iter().all(|x| x.is_finite());
        let all = [
            ("a", (0..stages).all(|i| finite(self.a(i)))),
            ("b", finite(&self.b)),
            ("c", finite(&self.c)),
            ("embedded", self.embedded().is_none_or(finite)),
        ];
        match all.iter().find(|(_, finite)| !finite) {
            Some(&(what, _)) => Err(TableauDefect::NonFinite { what }),
            None => Ok(()),
        }
    }

    fn check_row_sums(&self) -> Verified {
        for (row, &c) in self.c.iter().enumerate() {
            let sum: f64 = self.a(row).iter().sum();
            let size: f64 = self.a(row).iter().map(|a| a.abs()).sum();
            if !meets(sum, c, 1.0 + size, 1.0) {
                return Err(TableauDefect::RowSum { row, sum, c });
            }
        }
        Ok(())
    }
}

/// A rooted tree: the vertex and its subtrees, largest first.
#[derive(Clone, PartialEq, PartialOrd)]
struct Tree {
    order: usize,
    children: Vec<Tree>,
}

impl Tree {
    /// γ = order · Π γ(child).
    fn density(&self) -> f64 {
        self.order as f64 * self.children.iter().map(Tree::density).product::<f64>()
    }

    /// Φ_i = Π_children Σ_j a_ij Φ_j(child), and the same with absolute values.
    fn weights(&self, tableau: &Tableau) -> Vec<(f64, f64)> {
        let mut phi = vec![(1.0, 1.0); tableau.stages()];
        for child in &self.children {
            let below = child.weights(tableau);
            for (i, (phi, size)) in phi.iter_mut().enumerate() {
                let terms = tableau.a(i).iter().zip(&below);
                let (sum, abs) = terms.fold((0.0, 0.0), |(sum, abs), (a, (below, size))| {
                    (sum + a * below, abs + a.abs() * size)
                });
                *phi *= sum;
                *size *= abs;
            }
        }
        phi
    }
}

impl std::fmt::Display for Tree {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("[")?;
        self.children.iter().try_for_each(|child| child.fmt(f))?;
        f.write_str("]")
    }
}

/// All rooted trees by order: `trees(p)[q]` are those of q + 1 vertices.
fn trees(order: usize) -> Vec<Vec<Tree>> {
    let mut all: Vec<Vec<Tree>> = vec![];
    for order in 1..=order {
        let mut forests = vec![];
        collect(&all, order - 1, &mut vec![], &mut forests);
        let grow = |children| Tree { order, children };
        all.push(forests.into_iter().map(grow).collect());
    }
    all
}

/// Multisets of trees with `left` vertices in all, each listed once, largest tree first.
fn collect(all: &[Vec<Tree>], left: usize, chosen: &mut Vec<Tree>, forests: &mut Vec<Vec<Tree>>) {
    if left == 0 {
        forests.push(chosen.clone());
        return;
    }
    for tree in all[..left].iter().flatten() {
        if chosen.last().is_none_or(|last| tree <= last) {
            chosen.push(tree.clone());
            collect(all, left - tree.order, chosen, forests);
            chosen.pop();
        }
    }
}

fn check_order(tableau: &Tableau, what: &'static str, b: &[f64], order: usize) -> Verified {
    if !(1..=8).contains(&order) {
        return Err(TableauDefect::OrderUnsupported { order });
    }
    for tree in trees(order).into_iter().flatten() {
        let phi = tree.weights(tableau);
        let exact = 1.0 / tree.density();
        let terms = b.iter().zip(&phi);
        let (sum, size) = terms.fold((0.0, exact), |(sum, size), (b, (phi, abs))| {
            (sum + b * phi, size + b.abs() * abs)
        });
        if !meets(sum, exact, size, exact) {
            return Err(TableauDefect::OrderCondition {
                what,
                order: tree.order,
                tree: tree.to_string(),
                residual: sum - exact,
            });
        }
    }
    Ok(())
}

/// The rational p/q, rounded once.
const fn r(p: i64, q: i64) -> f64 {
    p as f64 / q as f64
}

#[cfg(test)]
mod tests {
    use super::trees;

    #[test]
    fn rooted_trees_are_counted_as_cayley_counted_them() {
        let counts: Vec<_> = trees(8).iter().map(Vec::len).collect();
        assert_eq!(counts, [1, 1, 2, 4, 9, 20, 48, 115]);
    }
}
