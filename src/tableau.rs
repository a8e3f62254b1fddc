//! Butcher tableaux (a, b, c) of explicit Runge-Kutta methods, as data:
//!
//! k_i = f(t + c_i h, y + h Σ_{j<i} a_ij k_j),  y⁺ = y + h Σ b_i k_i.
//!
//! A tableau is valid by construction: c_i = Σ_j a_ij, and for every rooted tree τ of at most
//! `order` vertices Σ b_i Φ_i(τ) = 1/γ(τ) (Hairer, Nørsett & Wanner, "Solving Ordinary Differential
//! Equations I", §II.2, theorem 2.13).

use std::borrow::Cow;

use crate::error::{Error, Result, TableauDefect};

/// An explicit Runge-Kutta method; the constants of this crate, or a user's own by
/// [`Tableau::new`].
///
/// ```
/// use candle_diffeq::Tableau;
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
}

/// Rows of a strictly lower triangular matrix, row i with i entries.
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
type Checked = std::result::Result<(), TableauDefect>;

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
        };
        tableau.check()?;
        Ok(tableau)
    }

    /// The same with weights of a second solution, whose difference estimates the local error.
    ///
    /// # Errors
    /// [`Error::InvalidTableau`] unless there is one finite weight a stage and they sum to one.
    pub fn with_embedded(mut self, weights: Vec<f64>) -> Result<Self> {
        self.embedded = Some(Cow::Owned(weights));
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
        let mut active: Vec<bool> = self.b.iter().map(|&b| b != 0.0).collect();
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
            });
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

    fn check_shape(&self) -> Checked {
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

    fn check_row_sums(&self) -> Checked {
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

fn check_order(tableau: &Tableau, what: &'static str, b: &[f64], order: usize) -> Checked {
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

/// Euler's method, order 1 (Institutionum calculi integralis I, 1768).
pub const EULER: Tableau = Tableau::constant("euler", 1, &[&[]], &[1.0], &[0.0], None);

/// The explicit midpoint rule, order 2 (Runge, Math. Ann. 46, 1895).
#[rustfmt::skip]
pub const MIDPOINT: Tableau = Tableau::constant(
    "midpoint", 2, &[&[], &[0.5]], &[0.0, 1.0], &[0.0, 0.5], None);

/// Heun's method, the explicit trapezoidal rule, order 2 (Z. Math. Phys. 45, 1900).
#[rustfmt::skip]
pub const HEUN: Tableau = Tableau::constant(
    "heun", 2, &[&[], &[1.0]], &[0.5, 0.5], &[0.0, 1.0], None);

/// Ralston's method of least truncation error, order 2 (Math. Comp. 16, 1962).
#[rustfmt::skip]
pub const RALSTON: Tableau = Tableau::constant(
    "ralston", 2, &[&[], &[r(2, 3)]], &[0.25, 0.75], &[0.0, r(2, 3)], None);

/// Kutta's method of order 3 (Z. Math. Phys. 46, 1901).
#[rustfmt::skip]
pub const RK3: Tableau = Tableau::constant("rk3", 3,
    &[&[], &[0.5], &[-1.0, 2.0]], &[r(1, 6), r(2, 3), r(1, 6)], &[0.0, 0.5, 1.0], None);

/// The strong-stability-preserving method of order 3 (Shu & Osher, J. Comput. Phys. 77, 1988).
#[rustfmt::skip]
pub const SSP_RK3: Tableau = Tableau::constant("ssp_rk3", 3,
    &[&[], &[1.0], &[0.25, 0.25]], &[r(1, 6), r(1, 6), r(2, 3)], &[0.0, 1.0, 0.5], None);

/// The classic method of order 4 (Kutta, Z. Math. Phys. 46, 1901).
#[rustfmt::skip]
pub const RK4: Tableau = Tableau::constant("rk4", 4,
    &[&[], &[0.5], &[0.0, 0.5], &[0.0, 0.0, 1.0]],
    &[r(1, 6), r(1, 3), r(1, 3), r(1, 6)],
    &[0.0, 0.5, 0.5, 1.0],
    None);

/// The 3/8 rule, order 4 (Kutta, Z. Math. Phys. 46, 1901); torchdiffeq's `rk4`.
#[rustfmt::skip]
pub const RK4_38: Tableau = Tableau::constant("rk4_38", 4,
    &[&[], &[r(1, 3)], &[r(-1, 3), 1.0], &[1.0, -1.0, 1.0]],
    &[0.125, 0.375, 0.375, 0.125],
    &[0.0, r(1, 3), r(2, 3), 1.0],
    None);

/// Bogacki & Shampine's pair 3(2) (Appl. Math. Lett. 2, 1989).
#[rustfmt::skip]
pub const BOSH3: Tableau = Tableau::constant("bosh3", 3,
    &[&[], &[0.5], &[0.0, 0.75], &[r(2, 9), r(1, 3), r(4, 9)]],
    &[r(2, 9), r(1, 3), r(4, 9), 0.0],
    &[0.0, 0.5, 0.75, 1.0],
    Some(&[r(7, 24), 0.25, r(1, 3), 0.125]));

/// Fehlberg's pair (NASA TR R-315, 1969); the weights of order 5 are propagated, those of order 4
/// embedded.
#[rustfmt::skip]
pub const FEHLBERG45: Tableau = Tableau::constant("fehlberg45", 5,
    &[
        &[], &[0.25], &[r(3, 32), r(9, 32)], &[r(1932, 2197), r(-7200, 2197), r(7296, 2197)],
        &[r(439, 216), -8.0, r(3680, 513), r(-845, 4104)],
        &[r(-8, 27), 2.0, r(-3544, 2565), r(1859, 4104), r(-11, 40)],
    ],
    &[r(16, 135), 0.0, r(6656, 12825), r(28561, 56430), r(-9, 50), r(2, 55)],
    &[0.0, 0.25, r(3, 8), r(12, 13), 1.0, 0.5],
    Some(&[r(25, 216), 0.0, r(1408, 2565), r(2197, 4104), -0.2, 0.0]));

/// Dormand & Prince's pair 5(4) (J. Comput. Appl. Math. 6, 1980), with their embedded weights, not
/// Shampine's, which diffrax and torchdiffeq take.
#[rustfmt::skip]
pub const DOPRI5: Tableau = Tableau::constant("dopri5", 5,
    &[
        &[], &[0.2], &[r(3, 40), r(9, 40)], &[r(44, 45), r(-56, 15), r(32, 9)],
        &[r(19372, 6561), r(-25360, 2187), r(64448, 6561), r(-212, 729)],
        &[r(9017, 3168), r(-355, 33), r(46732, 5247), r(49, 176), r(-5103, 18656)],
        &[r(35, 384), 0.0, r(500, 1113), r(125, 192), r(-2187, 6784), r(11, 84)],
    ],
    &[r(35, 384), 0.0, r(500, 1113), r(125, 192), r(-2187, 6784), r(11, 84), 0.0],
    &[0.0, 0.2, 0.3, 0.8, r(8, 9), 1.0, 1.0],
    Some(&[
        r(5179, 57600), 0.0, r(7571, 16695), r(393, 640), r(-92097, 339200), r(187, 2100),
        r(1, 40),
    ]));

/// Tsitouras' pair 5(4) (Comput. Math. Appl. 62, 2011).
#[allow(clippy::excessive_precision)]
#[rustfmt::skip]
pub const TSIT5: Tableau = Tableau::constant("tsit5", 5,
    &[
        &[], &[0.161], &[-0.008480655492356988544, 0.335480655492356988544],
        &[2.897153057105493432130, -6.359448489975074843148, 4.362295432869581411017],
        &[
            5.325864828439256604428, -11.74888356406282787774, 7.495539342889836208304,
            -0.09249506636175524925650,
        ],
        &[
            5.861455442946420028659, -12.92096931784710929170, 8.159367898576158643180,
            -0.07158497328140099722453, -0.02826905039406838290900,
        ],
        &[
            0.09646076681806522951816, 0.01, 0.4798896504144995747752, 1.379008574103741893192,
            -3.290069515436080679901, 2.324710524099773982415,
        ],
    ],
    &[
        0.09646076681806522951816, 0.01, 0.4798896504144995747752, 1.379008574103741893192,
        -3.290069515436080679901, 2.324710524099773982415, 0.0,
    ],
    &[0.0, 0.161, 0.327, 0.9, 0.9800255409045096857298, 1.0, 1.0],
    Some(&[
        0.09468075576583945807478, 0.009183565540343253096776, 0.4877705284247615707855,
        1.234297566930478985655, -2.707712349983525454881, 1.866628418170587035753, r(1, 66),
    ]));

/// Prince & Dormand's pair 8(7), RK8(7)13M (J. Comput. Appl. Math. 7, 1981).
#[rustfmt::skip]
pub const DOPRI8: Tableau =
    Tableau::constant("dopri8", 8, DOPRI8_A, DOPRI8_B, DOPRI8_C, Some(DOPRI8_EMBEDDED));

#[rustfmt::skip]
const DOPRI8_C: &[f64] = &[
    0.0, r(1, 18), r(1, 12), r(1, 8), r(5, 16), r(3, 8), r(59, 400), r(93, 200),
    r(5490023248, 9719169821), r(13, 20), r(1201146811, 1299019798), 1.0, 1.0,
];

#[rustfmt::skip]
const DOPRI8_B: &[f64] = &[
    r(14005451, 335480064), 0.0, 0.0, 0.0, 0.0, r(-59238493, 1068277825), r(181606767, 758867731),
    r(561292985, 797845732), r(-1041891430, 1371343529), r(760417239, 1151165299),
    r(118820643, 751138087), r(-528747749, 2220607170), 0.25,
];

#[rustfmt::skip]
const DOPRI8_EMBEDDED: &[f64] = &[
    r(13451932, 455176623), 0.0, 0.0, 0.0, 0.0, r(-808719846, 976000145),
    r(1757004468, 5645159321), r(656045339, 265891186), r(-3867574721, 1518517206),
    r(465885868, 322736535), r(53011238, 667516719), r(2, 45), 0.0,
];

#[rustfmt::skip]
const DOPRI8_A: &[&[f64]] = &[
    &[], &[r(1, 18)], &[r(1, 48), r(1, 16)], &[r(1, 32), 0.0, r(3, 32)],
    &[r(5, 16), 0.0, r(-75, 64), r(75, 64)], &[r(3, 80), 0.0, 0.0, r(3, 16), r(3, 20)],
    &[
        r(29443841, 614563906), 0.0, 0.0, r(77736538, 692538347), r(-28693883, 1125000000),
        r(23124283, 1800000000),
    ],
    &[
        r(16016141, 946692911), 0.0, 0.0, r(61564180, 158732637), r(22789713, 633445777),
        r(545815736, 2771057229), r(-180193667, 1043307555),
    ],
    &[
        r(39632708, 573591083), 0.0, 0.0, r(-433636366, 683701615), r(-421739975, 2616292301),
        r(100302831, 723423059), r(790204164, 839813087), r(800635310, 3783071287),
    ],
    &[
        r(246121993, 1340847787), 0.0, 0.0, r(-37695042795, 15268766246),
        r(-309121744, 1061227803), r(-12992083, 490766935), r(6005943493, 2108947869),
        r(393006217, 1396673457), r(123872331, 1001029789),
    ],
    &[
        r(-1028468189, 846180014), 0.0, 0.0, r(8478235783, 508512852), r(1311729495, 1432422823),
        r(-10304129995, 1701304382), r(-48777925059, 3047939560), r(15336726248, 1032824649),
        r(-45442868181, 3398467696), r(3065993473, 597172653),
    ],
    &[
        r(185892177, 718116043), 0.0, 0.0, r(-3185094517, 667107341), r(-477755414, 1098053517),
        r(-703635378, 230739211), r(5731566787, 1027545527), r(5232866602, 850066563),
        r(-4093664535, 808688257), r(3962137247, 1805957418), r(65686358, 487910083),
    ],
    &[
        r(403863854, 491063109), 0.0, 0.0, r(-5068492393, 434740067), r(-411421997, 543043805),
        r(652783627, 914296604), r(11173962825, 925320556), r(-13158990841, 6184727034),
        r(3936647629, 1978049680), r(-160528059, 685178525), r(248638103, 1413531060), 0.0,
    ],
];

#[cfg(test)]
mod tests {
    use super::trees;

    #[test]
    fn rooted_trees_are_counted_as_cayley_counted_them() {
        let counts: Vec<_> = trees(8).iter().map(Vec::len).collect();
        assert_eq!(counts, [1, 1, 2, 4, 9, 20, 48, 115]);
    }
}
