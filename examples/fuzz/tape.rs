//! A program evaluated and pulled back in plain loops over [`Balls`].

use candle_diffeq::nn::Activation;

use crate::ball::Balls;
use crate::curve;
use crate::program::{Op, Program};

/// The arithmetic whose errors are bounded.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Arithmetic {
    /// Unit roundoff in which the field runs.
    pub(crate) unit: f64,
    /// Error of the value of time that it is given.
    pub(crate) time: f64,
    /// Relative errors of states and activations that were kept in a lower precision.
    pub(crate) kept: f64,
    /// Terms of the longest sum of a parameter's gradient.
    pub(crate) terms: f64,
}

/// Gradients of one evaluation.
pub(crate) struct Pulled {
    pub(crate) state: Vec<Balls>,
    pub(crate) params: Vec<Balls>,
    pub(crate) time: (f64, f64),
}

impl Program {
    /// The results of all operations.
    pub(crate) fn run(
        &self,
        of: Arithmetic,
        t: f64,
        state: &[Balls],
        params: &[Balls],
    ) -> Vec<Balls> {
        let mut all: Vec<Balls> = Vec::with_capacity(self.ops.len());
        for (op, &(rows, cols)) in self.ops.iter().zip(&self.shapes) {
            let mut y = Balls::zeros(rows, cols);
            match op {
                Op::State(leaf) => {
                    y = state[*leaf].clone();
                    y.blur(of.kept);
                }
                Op::Param(p) => y = params[*p].clone(),
                Op::Time => {
                    y.x[0] = t;
                    y.e[0] = of.time + of.kept * t.abs();
                }
                Op::Column { p, j } => {
                    let p = &params[*p];
                    y.x = (0..p.rows).map(|o| p.x[o * p.cols + j]).collect();
                }
                Op::Affine { x, w, b } => {
                    let b = b.map(|b| &params[b]);
                    affine(of.unit, &all[*x], &params[*w], b, &mut y);
                }
                Op::Act {
                    x,
                    activation,
                    order,
                } => {
                    let x = &all[*x];
                    for i in 0..y.len() {
                        (y.x[i], y.e[i]) =
                            curve::at(*activation, *order, (x.x[i], x.e[i]), of.unit);
                    }
                    y.blur(of.kept);
                }
                Op::Add(a, b) => each(&all[*a], &all[*b], &mut y, |a, b| {
                    let sum = a.0 + b.0;
                    (sum, a.1 + b.1 + of.unit * sum.abs())
                }),
                Op::Mul(a, b) => each(&all[*a], &all[*b], &mut y, |a, b| times(a, b, of.unit)),
                Op::Scale(x, c) => {
                    let x = &all[*x];
                    for i in 0..y.len() {
                        y.x[i] = c * x.x[i];
                        y.e[i] = c.abs() * x.e[i] + 2.0 * of.unit * y.x[i].abs();
                    }
                }
                Op::SumCols(x) => {
                    let x = &all[*x];
                    gather(x, &mut y, (x.cols + 1) as f64 * of.unit, |r, _| (r, 0));
                }
                Op::MeanRows(x) => {
                    let x = &all[*x];
                    gather(x, &mut y, (x.rows + 3) as f64 * of.unit, |_, c| (0, c));
                    divide(&mut y, x.rows);
                }
                Op::GroupMean { x, groups } => {
                    let x = &all[*x];
                    let each = x.cols / groups;
                    gather(x, &mut y, (each + 3) as f64 * of.unit, |r, c| (r, c / each));
                    divide(&mut y, each);
                }
                Op::Spread { x, times } => {
                    let x = &all[*x];
                    for i in 0..y.len() {
                        let from = i / y.cols * x.cols + i % y.cols / times;
                        (y.x[i], y.e[i]) = (x.x[from], x.e[from]);
                    }
                }
                Op::Concat(a, b) => {
                    let (a, b) = (&all[*a], &all[*b]);
                    for i in 0..y.len() {
                        let (r, c) = (i / cols, i % cols);
                        let (part, c) = if c < a.cols { (a, c) } else { (b, c - a.cols) };
                        let from = if part.rows == 1 { c } else { r * part.cols + c };
                        (y.x[i], y.e[i]) = (part.x[from], part.e[from]);
                    }
                }
                Op::Slice { x, from, n } => {
                    let x = &all[*x];
                    for i in 0..y.len() {
                        let from = i / n * x.cols + from + i % n;
                        (y.x[i], y.e[i]) = (x.x[from], x.e[from]);
                    }
                }
                Op::Conv { x, w, b, image } => {
                    let (x, w, b) = (&all[*x], &params[*w], &params[*b]);
                    let unit = (image.inputs * image.size * image.size + 2) as f64 * of.unit;
                    let pixels = image.height * image.width;
                    for i in 0..y.len() {
                        y.x[i] = b.x[i % cols / pixels];
                        y.e[i] = unit * y.x[i].abs();
                    }
                    for r in 0..rows {
                        let (to, from) = (r * cols, r * x.cols);
                        image.taps(|o, i, tap| {
                            let (x, e, w) = (x.x[from + i], x.e[from + i], w.x[tap]);
                            y.x[to + o] += x * w;
                            y.e[to + o] += w.abs() * (e + unit * x.abs());
                        });
                    }
                }
                Op::RSqrt { x, epsilon } => {
                    let x = &all[*x];
                    for i in 0..y.len() {
                        let (root, slope) = rsqrt(x.x[i], x.e[i], *epsilon);
                        (y.x[i], y.e[i]) = (root, slope * x.e[i] + 8.0 * of.unit * root);
                    }
                }
            }
            all.push(y);
        }
        all
    }

    /// What is v of the outputs is this of state, parameters and time.
    pub(crate) fn pull(
        &self,
        of: Arithmetic,
        all: &[Balls],
        params: &[Balls],
        v: &[Balls],
    ) -> Pulled {
        let mut grads: Vec<Option<Balls>> = vec![None; self.ops.len()];
        let zeros = |p: &Balls| Balls::zeros(p.rows, p.cols);
        let mut pulled = Pulled {
            state: self.leaves.iter().map(|l| Balls::zeros(l.0, l.1)).collect(),
            params: params.iter().map(zeros).collect(),
            time: (0.0, 0.0),
        };
        for (&output, v) in self.outputs.iter().zip(v) {
            add(&mut grads[output], v, of.unit);
        }
        // Sums over rows, steps and stages, in any order.
        let many = (of.terms + 2.0) * of.unit;
        for (n, op) in self.ops.iter().enumerate().rev() {
            let Some(g) = grads[n].take() else { continue };
            match op {
                Op::State(leaf) => sum(&mut pulled.state[*leaf], &g, of.unit),
                Op::Param(p) => sum(&mut pulled.params[*p], &g, many),
                Op::Time => {
                    pulled.time.0 += g.x[0];
                    pulled.time.1 += g.e[0];
                }
                Op::Column { p, j } => {
                    let p = &mut pulled.params[*p];
                    for o in 0..g.len() {
                        p.x[o * p.cols + j] += g.x[o];
                        p.e[o * p.cols + j] += g.e[o] + many * g.x[o].abs();
                    }
                }
                Op::Affine { x, w, b } => {
                    let input = &all[*x];
                    let mut down = zeros(input);
                    affine_down(of.unit, &g, &params[*w], &mut down);
                    add(&mut grads[*x], &down, of.unit);
                    outer(many, &g, input, &mut pulled.params[*w]);
                    if let Some(b) = b {
                        let mut column = zeros(&params[*b]);
                        gather(&g, &mut column, many, |_, c| (0, c));
                        sum(&mut pulled.params[*b], &column, of.unit);
                    }
                }
                Op::Act {
                    x,
                    activation,
                    order,
                } => {
                    let input = &all[*x];
                    let mut down = zeros(input);
                    for i in 0..g.len() {
                        let at = (input.x[i], input.e[i]);
                        let (slope, e) = curve::at(*activation, order + 1, at, of.unit);
                        let smooth = *activation != Activation::Relu;
                        let kept = if smooth { 4.0 * of.kept } else { 0.0 };
                        let slope = (slope, e + kept);
                        (down.x[i], down.e[i]) = times(slope, (g.x[i], g.e[i]), of.unit);
                    }
                    add(&mut grads[*x], &down, of.unit);
                }
                Op::Add(a, b) => {
                    for x in [*a, *b] {
                        let mut down = zeros(&all[x]);
                        narrow(&g, &mut down, many);
                        add(&mut grads[x], &down, of.unit);
                    }
                }
                Op::Mul(a, b) => {
                    for (x, other) in [(*a, *b), (*b, *a)] {
                        let mut wide = zeros(&g);
                        each(&g, &all[other], &mut wide, |g, y| times(g, y, of.unit));
                        let mut down = zeros(&all[x]);
                        narrow(&wide, &mut down, many);
                        add(&mut grads[x], &down, of.unit);
                    }
                }
                Op::Scale(x, c) => {
                    let mut down = g;
                    for i in 0..down.len() {
                        down.x[i] *= c;
                        down.e[i] = c.abs() * down.e[i] + 2.0 * of.unit * down.x[i].abs();
                    }
                    add(&mut grads[*x], &down, of.unit);
                }
                Op::SumCols(x) => {
                    let mut down = zeros(&all[*x]);
                    scatter(&g, &mut down, 1.0, |r, _| (r, 0));
                    add(&mut grads[*x], &down, of.unit);
                }
                Op::MeanRows(x) => {
                    let mut down = zeros(&all[*x]);
                    let share = 1.0 / down.rows as f64;
                    scatter(&g, &mut down, share, |_, c| (0, c));
                    down.blur(2.0 * of.unit);
                    add(&mut grads[*x], &down, of.unit);
                }
                Op::GroupMean { x, groups } => {
                    let mut down = zeros(&all[*x]);
                    let each = down.cols / groups;
                    scatter(&g, &mut down, 1.0 / each as f64, |r, c| (r, c / each));
                    down.blur(2.0 * of.unit);
                    add(&mut grads[*x], &down, of.unit);
                }
                Op::Spread { x, times } => {
                    let mut down = zeros(&all[*x]);
                    gather(&g, &mut down, many, |r, c| (r, c / times));
                    add(&mut grads[*x], &down, of.unit);
                }
                Op::Concat(a, b) => {
                    let mut from = 0;
                    for x in [*a, *b] {
                        let mut part = Balls::zeros(g.rows, all[x].cols);
                        scatter(&g, &mut part, 1.0, |r, c| (r, from + c));
                        from += all[x].cols;
                        let mut down = zeros(&all[x]);
                        narrow(&part, &mut down, many);
                        add(&mut grads[x], &down, of.unit);
                    }
                }
                Op::Slice { x, from, n } => {
                    let mut down = zeros(&all[*x]);
                    for i in 0..g.len() {
                        let to = i / n * down.cols + from + i % n;
                        (down.x[to], down.e[to]) = (g.x[i], g.e[i]);
                    }
                    add(&mut grads[*x], &down, of.unit);
                }
                Op::Conv { x, w, b, image } => {
                    let (input, filters) = (&all[*x], &params[*w]);
                    let unit = (image.outputs * image.size * image.size + 2) as f64 * of.unit;
                    let many = (of.terms * (image.height * image.width) as f64 + 2.0) * of.unit;
                    let mut down = zeros(input);
                    let grad = &mut pulled.params[*w];
                    for r in 0..g.rows {
                        let (to, from) = (r * g.cols, r * input.cols);
                        image.taps(|o, i, tap| {
                            let (v, e, w) = (g.x[to + o], g.e[to + o], filters.x[tap]);
                            down.x[from + i] += v * w;
                            down.e[from + i] += w.abs() * (e + unit * v.abs());
                            let at = (input.x[from + i], input.e[from + i]);
                            let (x, e) = times((v, e), at, many);
                            grad.x[tap] += x;
                            grad.e[tap] += e;
                        });
                    }
                    let pixels = image.height * image.width;
                    gather(&g, &mut pulled.params[*b], many, |_, c| (0, c / pixels));
                    add(&mut grads[*x], &down, of.unit);
                }
                Op::RSqrt { x, epsilon } => {
                    let input = &all[*x];
                    let mut down = zeros(input);
                    for i in 0..g.len() {
                        let (x, e) = (input.x[i], input.e[i]);
                        let (root, reach) = rsqrt(x, e, *epsilon);
                        // d/dx (x + ε)^−3/2 = −3/2 (x + ε)^−5/2, at most where x is least.
                        let bend = 3.0 * reach / (x - e + epsilon).max(f64::MIN_POSITIVE);
                        let slope = -0.5 * root.powi(3);
                        let slope = (slope, 0.5 * bend * e + 16.0 * of.unit * slope.abs());
                        (down.x[i], down.e[i]) = times(slope, (g.x[i], g.e[i]), of.unit);
                    }
                    add(&mut grads[*x], &down, of.unit);
                }
            }
        }
        pulled
    }
}

/// 1/√(x + ε), and the largest |slope| within x ± e.
fn rsqrt(x: f64, e: f64, epsilon: f64) -> (f64, f64) {
    let least = (x - e).max(0.0) + epsilon;
    ((x + epsilon).sqrt().recip(), 0.5 * least.powf(-1.5))
}

/// a b, each with its bound.
fn times(a: (f64, f64), b: (f64, f64), unit: f64) -> (f64, f64) {
    let product = a.0 * b.0;
    let inherited = a.0.abs() * b.1 + b.0.abs() * a.1 + a.1 * b.1;
    (product, inherited + unit * product.abs())
}

/// An operation on every pair of elements, one row or one column standing for all.
fn each(a: &Balls, b: &Balls, y: &mut Balls, op: impl Fn((f64, f64), (f64, f64)) -> (f64, f64)) {
    let at = |of: &Balls, r: usize, c: usize| {
        let r = if of.rows == 1 { 0 } else { r };
        let c = if of.cols == 1 { 0 } else { c };
        (of.x[r * of.cols + c], of.e[r * of.cols + c])
    };
    for r in 0..y.rows {
        for c in 0..y.cols {
            let i = r * y.cols + c;
            (y.x[i], y.e[i]) = op(at(a, r, c), at(b, r, c));
        }
    }
}

/// The transpose of that: sums over the rows or columns that one stood for.
fn narrow(g: &Balls, down: &mut Balls, unit: f64) {
    if (g.rows, g.cols) == (down.rows, down.cols) {
        down.x.clone_from(&g.x);
        down.e.clone_from(&g.e);
        return;
    }
    let (rows, cols) = (down.rows, down.cols);
    gather(g, down, unit, |r, c| {
        (if rows == 1 { 0 } else { r }, if cols == 1 { 0 } else { c })
    });
}

/// Adds every element of x to the one of y that `to` names.
fn gather(x: &Balls, y: &mut Balls, unit: f64, to: impl Fn(usize, usize) -> (usize, usize)) {
    for r in 0..x.rows {
        for c in 0..x.cols {
            let (i, (row, col)) = (r * x.cols + c, to(r, c));
            let j = row * y.cols + col;
            y.x[j] += x.x[i];
            y.e[j] += x.e[i] + unit * x.x[i].abs();
        }
    }
}

/// Every element of y is a multiple of the one of x that `from` names.
fn scatter(x: &Balls, y: &mut Balls, c: f64, from: impl Fn(usize, usize) -> (usize, usize)) {
    for r in 0..y.rows {
        for col in 0..y.cols {
            let (row, at) = from(r, col);
            let (i, j) = (r * y.cols + col, row * x.cols + at);
            (y.x[i], y.e[i]) = (c * x.x[j], c * x.e[j]);
        }
    }
}

fn divide(y: &mut Balls, by: usize) {
    for i in 0..y.len() {
        y.x[i] /= by as f64;
        y.e[i] /= by as f64;
    }
}

fn sum(total: &mut Balls, g: &Balls, unit: f64) {
    for i in 0..g.len() {
        total.x[i] += g.x[i];
        total.e[i] += g.e[i] + unit * g.x[i].abs();
    }
}

/// Adds to a gradient; candle and we may do so in any order, one rounding for each summand.
fn add(total: &mut Option<Balls>, g: &Balls, unit: f64) {
    match total {
        None => *total = Some(g.clone()),
        Some(total) => {
            for i in 0..g.len() {
                total.x[i] += g.x[i];
                total.e[i] += g.e[i] + unit * (total.x[i].abs() + g.x[i].abs());
            }
        }
    }
}

fn affine(unit: f64, x: &Balls, w: &Balls, b: Option<&Balls>, y: &mut Balls) {
    let unit = (x.cols + 2) as f64 * unit;
    let mut wide = x.clone();
    wide.blur(unit);
    for r in 0..y.rows {
        let (x, e) = (
            &x.x[r * x.cols..][..x.cols],
            &wide.e[r * x.cols..][..x.cols],
        );
        for o in 0..y.cols {
            let bias = b.map_or(0.0, |b| b.x[o]);
            let (mut value, mut bound) = (bias, unit * bias.abs());
            let row = &w.x[o * w.cols..][..w.cols];
            for ((w, x), e) in row.iter().zip(x).zip(e) {
                value += w * x;
                bound += w.abs() * e;
            }
            (y.x[r * y.cols + o], y.e[r * y.cols + o]) = (value, bound);
        }
    }
}

/// g W.
fn affine_down(unit: f64, g: &Balls, w: &Balls, down: &mut Balls) {
    let unit = (g.cols + 2) as f64 * unit;
    for r in 0..g.rows {
        for o in 0..g.cols {
            let (v, e) = (g.x[r * g.cols + o], g.e[r * g.cols + o]);
            let e = e + unit * v.abs();
            let row = &w.x[o * w.cols..][..w.cols];
            let x = down.x[r * w.cols..].iter_mut();
            for ((w, x), sum) in row.iter().zip(x).zip(&mut down.e[r * w.cols..]) {
                *x += v * w;
                *sum += e * w.abs();
            }
        }
    }
}

/// gᵀ x.
fn outer(unit: f64, g: &Balls, x: &Balls, w: &mut Balls) {
    for r in 0..g.rows {
        for o in 0..g.cols {
            let v = (g.x[r * g.cols + o], g.e[r * g.cols + o]);
            for i in 0..x.cols {
                let (p, e) = times(v, (x.x[r * x.cols + i], x.e[r * x.cols + i]), unit);
                w.x[o * w.cols + i] += p;
                w.e[o * w.cols + i] += e;
            }
        }
    }
}
