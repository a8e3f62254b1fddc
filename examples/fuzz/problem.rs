//! A case with its numbers drawn: the problem that both sides solve.

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use crate::ball::{combine, Balls, Dt};
use crate::case::{Case, Cut, Entry, Given, Lead, Numbers, Plan, Scale};
use crate::curve;
use crate::fields;
use crate::program::{Op, Program};
use crate::reference::Expected;
use crate::tape::Arithmetic;

/// Coefficients of a method.
#[derive(Clone, Debug)]
pub(crate) struct Table {
    pub(crate) a: Vec<Vec<f64>>,
    pub(crate) b: Vec<f64>,
    pub(crate) c: Vec<f64>,
}

/// Everything about a solve, in numbers that its dtypes hold.
pub(crate) struct Problem {
    pub(crate) case: Case,
    pub(crate) numbers: Numbers,
    pub(crate) program: Program,
    pub(crate) table: Table,
    /// The variables, in their dtype.
    pub(crate) params: Vec<Balls>,
    pub(crate) y0: Vec<Balls>,
    pub(crate) times: Vec<f64>,
    /// By output and tensor; the target of the mean of squares.
    pub(crate) cotangents: Vec<Vec<Balls>>,
    pub(crate) classes: Vec<u32>,
    /// Step size of a plan by size.
    pub(crate) size: f64,
}

impl Problem {
    /// # Errors
    /// A method that is none.
    pub(crate) fn new(case: &Case) -> candle_diffeq::Result<Self> {
        let tableau = case.method.tableau()?;
        let stages = 0..tableau.stages();
        let table = Table {
            a: stages.map(|i| tableau.a(i).to_vec()).collect(),
            b: tableau.b().to_vec(),
            c: tableau.c().to_vec(),
        };
        let program = fields::program(case);
        let numbers = case.numbers;
        let mut problem = Self {
            case: case.clone(),
            numbers,
            table,
            params: vec![],
            y0: vec![],
            times: vec![],
            cotangents: vec![],
            classes: vec![],
            size: 1.0,
            program,
        };
        problem.draw();
        problem.place_times();
        Ok(problem)
    }

    fn draw(&mut self) {
        let stream = |n: u64| StdRng::seed_from_u64(self.case.seed ^ (n << 32));
        let uniform = |rng: &mut StdRng, rows, cols, dt: Dt, centre: f64, spread: f64| {
            let x = (0..rows * cols).map(|_| dt.round(centre + rng.random_range(-spread..=spread)));
            Balls::exact(rows, cols, x.collect())
        };
        let masters = self.numbers.masters(self.case.entry);
        let of = |(n, p): (usize, &crate::program::Param)| {
            let rng = &mut stream(n as u64 + 1);
            uniform(rng, p.rows, p.cols, masters, p.centre, p.spread)
        };
        let params: Vec<_> = self.program.params.iter().enumerate().map(of).collect();
        let leaves = &self.program.leaves;
        let scale = self.case.y0_scale;
        let of = |(n, &(rows, cols)): (usize, &(usize, usize))| {
            let rng = &mut stream(n as u64 + 1000);
            uniform(rng, rows, cols, self.numbers.y0, 0.0, 1.5 * scale)
        };
        let y0: Vec<_> = leaves.iter().enumerate().map(of).collect();
        let outputs = match self.case.is_final {
            true => 1,
            false => self.case.grid.fractions.len(),
        };
        let rng = &mut stream(2000);
        let scale = match self.case.entry.is_loss() {
            true => 1.0,
            false => self.case.cotangent_scale,
        };
        let mut cotangents = vec![];
        for output in 0..outputs {
            // The loss looks at the last, and mostly at the others.
            let looks = output + 1 == outputs || rng.random_range(0..4) > 0;
            let scale = if looks { scale } else { 0.0 };
            let of = |&(rows, cols): &(usize, usize)| {
                uniform(rng, rows, cols, self.numbers.state, 0.0, scale)
            };
            cotangents.push(leaves.iter().map(of).collect::<Vec<_>>());
        }
        let (rows, cols) = leaves[0];
        let classes = (0..rows)
            .map(|_| rng.random_range(0..cols as u32))
            .collect();
        (self.params, self.y0, self.cotangents, self.classes) = (params, y0, cotangents, classes);
    }

    /// Times as the grid's dtype holds them, over a span that lets perturbations grow by so much.
    fn place_times(&mut self) {
        let grid = &self.case.grid;
        let span = grid.growth / self.lipschitz().clamp(1e-2, 1e6);
        let span = if grid.backward { -span } else { span };
        let dt = match grid.given {
            Given::Host => Dt::F64,
            Given::Tensor(dt) | Given::Variable(dt) => dt,
        };
        let at = |f: &f64| dt.round(grid.start + span * f);
        self.times = grid.fractions.iter().map(at).collect();
        if self.times.windows(2).any(|w| w[0] == w[1]) {
            // Too far from zero for such a span.
            self.times = grid.fractions.iter().map(|f| dt.round(span * f)).collect();
        }
        if let Cut::Size(fraction) = self.case.steps {
            // Not so that rounding decides how many there are.
            self.size = (span * fraction).abs();
            let near = |size: f64| {
                let parts = self.times.windows(2).map(|w| (w[1] - w[0]).abs() / size);
                parts.into_iter().any(|p| (p - p.round()).abs() < 1e-6 * p)
            };
            let mut size = self.size;
            while near(size) {
                size *= 1.0123;
            }
            self.size = size;
        }
    }

    /// A bound of the field's Lipschitz constant in the largest norm, near y0.
    fn lipschitz(&self) -> f64 {
        let exact = Arithmetic {
            unit: 0.0,
            time: 0.0,
            kept: 0.0,
            terms: 0.0,
        };
        let all = self.program.run(exact, 0.0, &self.y0, &self.params);
        let mut most: Vec<f64> = all.iter().map(Balls::most).collect();
        for (most, op) in most.iter_mut().zip(&self.program.ops) {
            // At other times and states a bounded one is at its bound.
            if let Op::Act { .. } = op {
                *most = most.max(1.0);
            }
        }
        let row_sums = |w: &Balls| {
            let rows =
                w.x.chunks(w.cols)
                    .map(|row| row.iter().map(|w| w.abs()).sum());
            rows.fold(0.0, f64::max)
        };
        let mut of: Vec<f64> = vec![];
        for (n, op) in self.program.ops.iter().enumerate() {
            of.push(match op {
                Op::State(_) => 1.0,
                Op::Param(_) | Op::Time | Op::Column { .. } => 0.0,
                Op::Affine { x, w, .. } | Op::Conv { x, w, .. } => {
                    of[*x] * row_sums(&self.params[*w])
                }
                Op::Act {
                    x,
                    activation,
                    order,
                } => of[*x] * curve::largest(*activation, order + 1),
                Op::Add(a, b) => of[*a] + of[*b],
                Op::Mul(a, b) => most[*a] * of[*b] + most[*b] * of[*a],
                Op::Scale(x, c) => of[*x] * c.abs(),
                Op::SumCols(x) => of[*x] * self.program.shapes[*x].1 as f64,
                Op::MeanRows(x) | Op::Slice { x, .. } | Op::GroupMean { x, .. } => of[*x],
                Op::Spread { x, .. } => of[*x],
                Op::Concat(a, b) => of[*a].max(of[*b]),
                Op::RSqrt { x, .. } => {
                    let least = all[n].x.iter().copied().fold(0.0, f64::max);
                    of[*x] * 0.5 * least.powi(3)
                }
            });
        }
        let outputs = self.program.outputs.iter().map(|&o| of[o]);
        outputs.fold(0.0, f64::max)
    }

    /// Steps in an interval of this length.
    pub(crate) fn parts(&self, length: f64) -> usize {
        match self.case.steps {
            Cut::PerInterval(m) => m,
            Cut::Size(_) => (length.abs() / self.size).ceil() as usize,
        }
    }

    /// Steps in all.
    pub(crate) fn step_count(&self) -> usize {
        self.times.windows(2).map(|w| self.parts(w[1] - w[0])).sum()
    }

    /// Terms of a sum over rows, steps and stages.
    pub(crate) fn terms(&self) -> usize {
        self.case.rows * self.table.b.len() * self.step_count().max(1)
    }

    /// Multiply-adds of both passes, roughly.
    pub(crate) fn work(case: &Case) -> f64 {
        let steps: f64 = match case.steps {
            Cut::PerInterval(m) => (m * (case.grid.fractions.len() - 1)) as f64,
            Cut::Size(size) => {
                let intervals = case.grid.fractions.windows(2);
                intervals.map(|w| ((w[1] - w[0]) / size).ceil()).sum()
            }
        };
        let stages = case.method.tableau().map_or(1, |t| t.stages());
        (steps + 1.0) * stages as f64 * fields::program(case).cost() as f64 * 4.0
    }

    /// θ as the field sees it.
    pub(crate) fn rounded_parameters(&self) -> Vec<Balls> {
        let mut params = self.params.clone();
        if self.case.entry.has_masters() {
            // Roundings of numbers that are known are known.
            let narrowest = self.numbers.parameters();
            let round = |x: &mut f64| *x = narrowest.round(Dt::round(self.numbers.held(), *x));
            params
                .iter_mut()
                .for_each(|p| p.x.iter_mut().for_each(round));
        }
        params
    }

    /// The cotangents of the outputs; a loss has its value noted.
    pub(crate) fn looks(&self, expected: &mut Expected) -> Vec<Vec<Balls>> {
        let u = self.numbers.state.unit();
        let states = &expected.states;
        let terms = (states.len() * states[0].iter().map(Balls::len).sum::<usize>()) as f64;
        let mut value = (0.0, 0.0);
        let mut add = |x: f64, e: f64| {
            value.0 += x;
            value.1 += e + (terms + 8.0) * u * x.abs();
        };
        let rows = self.case.rows as f64;
        let cotangents = match self.case.entry {
            Entry::Squares => {
                let of = |(y, target): (&Vec<Balls>, &Vec<Balls>)| {
                    let mut error = combine(&[(1.0, &y[0]), (-1.0, &target[0])], u);
                    for i in 0..error.len() {
                        let (x, e) = (error.x[i], error.e[i]);
                        add(x * x / terms, (2.0 * x.abs() * e + e * e) / terms);
                        error.x[i] = 2.0 * x / terms;
                        error.e[i] = 2.0 * e / terms + 6.0 * u * error.x[i].abs();
                    }
                    vec![error]
                };
                states.iter().zip(&self.cotangents).map(of).collect()
            }
            Entry::Likelihood => {
                let mut v = states[0].clone();
                let features = v[0].cols as f64;
                for (leaf, y) in v.iter_mut().enumerate() {
                    for i in 0..y.len() {
                        let (x, e) = (y.x[i], y.e[i]);
                        match leaf {
                            0 => {
                                add(0.5 * x * x / rows, (x.abs() * e + 0.5 * e * e) / rows);
                                (y.x[i], y.e[i]) = (x / rows, e / rows + 4.0 * u * x.abs() / rows);
                            }
                            _ => {
                                add(x / rows, e / rows);
                                (y.x[i], y.e[i]) = (1.0 / rows, 4.0 * u / rows);
                            }
                        }
                    }
                }
                add(0.5 * features * (2.0 * std::f64::consts::PI).ln(), 0.0);
                vec![v]
            }
            Entry::Entropy => {
                let y = &states[0][0];
                let mut v = y.clone();
                for (r, &class) in self.classes.iter().enumerate() {
                    let row = r * y.cols..(r + 1) * y.cols;
                    let (x, e) = (&y.x[row.clone()], &y.e[row.clone()]);
                    let most = x.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                    let size = x.iter().fold(1.0, |m: f64, x| m.max(x.abs()));
                    let total: f64 = x.iter().map(|x| (x - most).exp()).sum();
                    let e_most = e.iter().copied().fold(0.0, f64::max);
                    let reach = 2.0 * e_most + (y.cols + 16) as f64 * u * size;
                    add((total.ln() + most - x[class as usize]) / rows, reach / rows);
                    // Of a softmax: p_i (e_i + Σ p_j e_j), as differences of logarithms.
                    for (i, at) in row.enumerate() {
                        let p = (y.x[at] - most).exp() / total;
                        let one = f64::from(u8::from(i == class as usize));
                        v.x[at] = (p - one) / rows;
                        v.e[at] = (p * reach.exp_m1() + 8.0 * u) / rows;
                    }
                }
                vec![vec![v]]
            }
            _ => return self.cotangents.clone(),
        };
        expected.loss = Some(Balls {
            rows: 1,
            cols: 1,
            x: vec![value.0],
            e: vec![value.1],
        });
        cotangents
    }

    /// A fixed scale of cotangents in f16, and what lies below the range of scaled ones: half a spacing
    /// of subnormal numbers over the scale.  The dynamic scale S keeps S max|λ| above 2^(13 − headroom),
    /// or half the range above the largest of what comes back.
    pub(crate) fn scaled(&self, to: Dt, largest: f64) -> (Option<f64>, f64) {
        if to != Dt::F16 {
            return (None, 0.0);
        }
        match self.case.scaling {
            Scale::Off => (Some(1.0), 2f64.powi(-25)),
            Scale::Fixed(scale) => (Some(2f64.powi(scale)), 2f64.powi(-25 - scale)),
            Scale::Auto => (None, largest * 2f64.powi(6 - 38)),
            Scale::Dynamic(headroom) => (None, largest * 2f64.powi(headroom - 38)),
        }
    }

    /// Relative errors of activations that are kept in bf16.
    pub(crate) fn kept_noise(&self) -> f64 {
        let cache = self.case.cache;
        match cache.low && cache.bytes > 0 && self.may_be_tiled() {
            true => Dt::Bf16.unit(),
            false => 0.0,
        }
    }

    /// Whether it may be solved tile by tile.
    pub(crate) fn may_be_tiled(&self) -> bool {
        let tracked = matches!(self.case.grid.given, Given::Variable(_));
        self.case.fusion && !tracked && self.case.field.is_tiled()
    }

    /// Dimensions of a tensor of the state.
    pub(crate) fn shape(&self, leaf: usize) -> Vec<usize> {
        let (rows, cols) = self.program.leaves[leaf];
        if let crate::case::Field::Conv {
            channels,
            height,
            width,
            ..
        } = &self.case.field
        {
            return vec![rows, channels[0], *height, *width];
        }
        match self.case.lead {
            Lead::Rows => vec![rows, cols],
            Lead::Three => vec![1, rows, cols],
            Lead::Vector => vec![cols],
            Lead::Scalar => vec![],
        }
    }

    /// Bytes of a plan.
    pub(crate) fn bytes(&self, states: usize) -> usize {
        let numbers: usize = self.y0.iter().map(Balls::len).sum();
        let carried = if self.numbers.compensated { 2 } else { 1 };
        states * carried * numbers * if self.numbers.state == Dt::F64 { 8 } else { 4 }
    }
}

impl Plan {
    pub(crate) fn checkpoint(self, p: &Problem) -> candle_diffeq::options::Checkpoint {
        match self {
            Self::All => candle_diffeq::options::Checkpoint::All,
            Self::Every(n) => candle_diffeq::options::Checkpoint::Every(n),
            Self::States(n) => candle_diffeq::options::Checkpoint::States(n),
            Self::Bytes(n) => candle_diffeq::options::Checkpoint::Bytes(p.bytes(n)),
        }
    }
}

impl Numbers {
    /// Compute dtype of a tensor of the state.
    pub(crate) fn compute(&self, leaf: usize) -> Dt {
        match self.last {
            Some(last) if leaf > 0 => last,
            _ => self.compute,
        }
    }

    /// That of parameters: the narrowest unless the options say.
    pub(crate) fn parameters(&self) -> Dt {
        self.compute
    }

    /// Dtype of the variables.
    pub(crate) fn masters(&self, entry: Entry) -> Dt {
        match (entry.has_masters(), self.wide_masters) {
            (false, _) => self.held(),
            (true, true) => Dt::F64,
            (true, false) => Dt::F32,
        }
    }
}
