//! Numbers of which rounding may have made others: x ± e.
//!
//! x is what exact arithmetic on the same roundings gives, e a bound on how far a computation with unit
//! roundoff u can be from it: for every operation what it inherits plus u times the sum of the absolute
//! terms (Higham, "Accuracy and Stability of Numerical Algorithms", §3.3: running error analysis).

/// Dtypes that a solve computes in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Dt {
    F64,
    F32,
    Bf16,
    F16,
}

impl Dt {
    /// Unit roundoff; twice that of f64, in which the reference rounds too.
    pub(crate) fn unit(self) -> f64 {
        let own = if self == Self::F64 { 1 } else { 0 };
        0.5f64.powi(self.digits() - own)
    }

    /// Significant bits.
    fn digits(self) -> i32 {
        match self {
            Self::F64 => 53,
            Self::F32 => 24,
            Self::Bf16 => 8,
            Self::F16 => 11,
        }
    }

    /// The nearest number of the dtype, to even where two are as near.
    pub(crate) fn round(self, x: f64) -> f64 {
        let least = match self {
            Self::F64 => return x,
            Self::F32 => return f64::from(x as f32),
            Self::Bf16 => -126,
            Self::F16 => -14,
        };
        let rounded = self.round_above(x, least);
        match rounded.abs() > self.largest() {
            true => f64::INFINITY.copysign(x),
            false => rounded,
        }
    }

    /// The nearest number of as many significant bits, whatever its exponent.
    fn round_digits(self, x: f64) -> f64 {
        self.round_above(x, -900)
    }

    /// The same with the spacing of numbers from 2^least on at least.
    fn round_above(self, x: f64, least: i32) -> f64 {
        if x == 0.0 || !x.is_finite() || self == Self::F64 {
            return x;
        }
        let exponent = ((x.to_bits() >> 52) & 0x7ff) as i32 - 1023;
        let scale = 2f64.powi(self.digits() - 1 - exponent.max(least));
        (x * scale).round_ties_even() / scale
    }

    /// Whether it is narrower than f32.
    pub(crate) fn is_low(self) -> bool {
        matches!(self, Self::Bf16 | Self::F16)
    }

    /// Its largest number.
    pub(crate) fn largest(self) -> f64 {
        match self {
            Self::F64 => f64::MAX,
            Self::F32 => f32::MAX.into(),
            Self::Bf16 => half::bf16::MAX.to_f64(),
            Self::F16 => half::f16::MAX.to_f64(),
        }
    }
}

/// A matrix of them.
#[derive(Clone, Debug, Default)]
pub(crate) struct Balls {
    pub(crate) rows: usize,
    pub(crate) cols: usize,
    pub(crate) x: Vec<f64>,
    pub(crate) e: Vec<f64>,
}

impl Balls {
    pub(crate) fn zeros(rows: usize, cols: usize) -> Self {
        let x = vec![0.0; rows * cols];
        Self {
            rows,
            cols,
            e: x.clone(),
            x,
        }
    }

    /// Numbers that are known.
    pub(crate) fn exact(rows: usize, cols: usize, x: Vec<f64>) -> Self {
        let e = vec![0.0; x.len()];
        Self { rows, cols, x, e }
    }

    pub(crate) fn len(&self) -> usize {
        self.x.len()
    }

    /// Widens every bound by a multiple of the number.
    pub(crate) fn blur(&mut self, unit: f64) {
        for (x, e) in self.x.iter().zip(&mut self.e) {
            *e += unit * x.abs();
        }
    }

    /// max |x| + e.
    pub(crate) fn most(&self) -> f64 {
        let sizes = self.x.iter().zip(&self.e).map(|(x, e)| x.abs() + e);
        // NaN counts as the largest.
        sizes.fold(0.0, |most, size| if size <= most { most } else { size })
    }

    /// max |x| − e: what is reached for certain.
    pub(crate) fn least_of_most(&self) -> f64 {
        let sizes = self.x.iter().zip(&self.e).map(|(x, e)| x.abs() - e);
        sizes.fold(0.0, f64::max)
    }

    /// Rounds to the numbers of a dtype.  A bound that no neighbour is within reach of becomes zero: the
    /// computation has rounded to the same number.
    pub(crate) fn round(&mut self, to: Dt) {
        self.round_by(|x| to.round(x), 0.0);
    }

    /// The same for cotangents, which are scaled: any exponent, and what is below the range of the
    /// scaled ones is lost.
    pub(crate) fn round_scaled(&mut self, to: Dt, lost: f64) {
        self.round_by(|x| to.round_digits(x), lost);
    }

    fn round_by(&mut self, round: impl Fn(f64) -> f64, lost: f64) {
        for (x, e) in self.x.iter_mut().zip(&mut self.e) {
            let (low, high) = (round(*x - *e), round(*x + *e));
            *x = round(*x);
            *e = (high - *x).max(*x - low) + lost;
        }
    }
}

/// Σ c_j x_j of matrices of one shape, in arithmetic of unit roundoff u: the c_j are rounded, the products,
/// and the sums in any order.
pub(crate) fn combine(terms: &[(f64, &Balls)], unit: f64) -> Balls {
    let first = terms[0].1;
    let mut sum = Balls::zeros(first.rows, first.cols);
    let unit = (terms.len() + 2) as f64 * unit;
    for (c, term) in terms {
        for i in 0..sum.len() {
            sum.x[i] += c * term.x[i];
            sum.e[i] += c.abs() * (term.e[i] + unit * term.x[i].abs());
        }
    }
    sum
}

/// Σ x y over all elements, likewise.
pub(crate) fn dot(x: &Balls, y: &Balls, unit: f64) -> (f64, f64) {
    let unit = (x.len() + 2) as f64 * unit;
    let mut sum = (0.0, 0.0);
    for i in 0..x.len() {
        sum.0 += x.x[i] * y.x[i];
        sum.1 += x.x[i].abs() * y.e[i] + y.x[i].abs() * x.e[i] + x.e[i] * y.e[i];
        sum.1 += unit * (x.x[i] * y.x[i]).abs();
    }
    sum
}
