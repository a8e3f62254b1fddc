//! The textbook: an explicit Runge-Kutta method and its discrete adjoint, in f64, with bounds.
//!
//! Y_i = Q(y_n + h Σ_{j<i} a_ij k_j),  k_i = Q(f(τ_i, Y_i)),  y_{n+1} = y_n + h Σ b_i k_i;
//!
//! v_i = b_i λ + h Σ_{j>i} a_ji w_j,  w_i = Q((∂f/∂y)ᵀ Q(v_i)),  θ̄ += h (∂f/∂θ)ᵀ Q(v_i),
//! λ ← λ + h Σ w_i + ȳ_n, at stages formed anew from Q_store(y_n).

use crate::ball::{combine, dot, Balls, Dt};
use crate::problem::Problem;
use crate::tape::Arithmetic;

/// What a solve should give.
#[derive(Default)]
pub(crate) struct Expected {
    /// By output, then by tensor.
    pub(crate) states: Vec<Vec<Balls>>,
    pub(crate) loss: Option<Balls>,
    pub(crate) y0: Vec<Balls>,
    pub(crate) params: Vec<Balls>,
    pub(crate) times: Balls,
    /// Whether numbers leave the range of their dtype: certainly, or perhaps.
    pub(crate) overflow: Range,
}

/// How far numbers go in their dtype.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Range {
    #[default]
    Inside,
    Perhaps,
    Outside,
}

/// One step [t, t + h], part `j` of `m` of the output interval `interval`.
#[derive(Clone, Copy)]
struct Step {
    t: f64,
    h: f64,
    interval: usize,
    j: usize,
    m: usize,
}

struct Solver<'p> {
    p: &'p Problem,
    theta: Vec<Balls>,
    overflow: Range,
    /// The largest of λ, v and w so far in the sweep, which bounds the scale from below.
    largest: f64,
}

/// Solves and differentiates.
pub(crate) fn solve(p: &Problem) -> Expected {
    let mut solver = Solver {
        theta: p.rounded_parameters(),
        p,
        overflow: Range::Inside,
        largest: 0.0,
    };
    let steps = steps(p);
    let mut y = p.y0.clone();
    let mut kept = vec![];
    let mut states = vec![y.clone()];
    for step in &steps {
        kept.push(solver.stored(&y));
        let (_, _, ks) = solver.stages(*step, &y, 0.0);
        y = solver.update(*step, &y, &ks);
        if step.j + 1 == step.m {
            states.push(y.clone());
        }
    }
    if p.case.is_final {
        states.drain(..states.len() - 1);
    }
    let mut expected = Expected {
        loss: None,
        states,
        ..Default::default()
    };
    let cotangents = p.looks(&mut expected);
    if let Some(loss) = &expected.loss {
        solver.within(std::slice::from_ref(loss), 1.0, p.numbers.state);
    }
    solver.sweep(&steps, &kept, cotangents, &mut expected);
    expected.overflow = solver.overflow;
    expected
}

/// The steps of a grid.
fn steps(p: &Problem) -> Vec<Step> {
    let mut steps = vec![];
    for (interval, pair) in p.times.windows(2).enumerate() {
        let m = p.parts(pair[1] - pair[0]);
        for j in 0..m {
            let length = pair[1] - pair[0];
            steps.push(Step {
                t: pair[0] + length * j as f64 / m as f64,
                h: length / m as f64,
                interval,
                j,
                m,
            });
        }
    }
    steps
}

impl Solver<'_> {
    fn state_unit(&self) -> f64 {
        self.p.numbers.state.unit()
    }

    fn arithmetic(&self, kept: f64) -> Arithmetic {
        let unit = self.p.numbers.held().unit();
        let latest = self.p.times.iter().fold(0.0, |most, t| t.abs().max(most));
        Arithmetic {
            unit,
            time: 2.0 * unit.max(self.state_unit()) * latest,
            kept,
            terms: self.p.terms() as f64,
        }
    }

    /// Notes numbers that are to be held in a dtype.
    fn within(&mut self, balls: &[Balls], scale: f64, dt: Dt) {
        for x in balls {
            let range = if scale * x.least_of_most() > dt.largest() * 1.01 {
                Range::Outside
            } else if scale * x.most() < dt.largest() * 0.99 {
                Range::Inside
            } else {
                Range::Perhaps
            };
            self.overflow = self.overflow.max(range);
        }
    }

    fn round(&mut self, leaves: &mut [Balls]) {
        let held = self.p.numbers.held();
        for (leaf, x) in leaves.iter_mut().enumerate() {
            let to = self.p.numbers.compute(leaf);
            self.within(std::slice::from_ref(x), 1.0, to);
            if to.is_low() {
                x.blur(held.unit());
            }
            if to != self.p.numbers.state {
                x.round(to);
            }
        }
    }

    fn stored(&self, y: &[Balls]) -> Vec<Balls> {
        let mut y = y.to_vec();
        if self.p.numbers.store != self.p.numbers.state {
            for y in &mut y {
                if self.p.numbers.store.is_low() {
                    // From f64 by way of f32.
                    y.blur(Dt::F32.unit());
                }
                y.round(self.p.numbers.store);
            }
        }
        y
    }

    /// Σ by tensor.
    fn combine(&self, terms: &[(f64, &Vec<Balls>)]) -> Vec<Balls> {
        let of = |leaf: usize| {
            let terms: Vec<_> = terms.iter().map(|(c, x)| (*c, &x[leaf])).collect();
            combine(&terms, self.state_unit())
        };
        (0..self.p.y0.len()).map(of).collect()
    }

    /// Times, all results and velocities of the stages of a step.
    #[allow(clippy::type_complexity)]
    fn stages(
        &mut self,
        step: Step,
        y: &Vec<Balls>,
        kept: f64,
    ) -> (Vec<f64>, Vec<Vec<Balls>>, Vec<Vec<Balls>>) {
        let (mut times, mut all, mut ks) = (vec![], vec![], Vec::<Vec<Balls>>::new());
        for i in 0..self.p.table.b.len() {
            let mut terms = vec![(1.0, y)];
            for (j, k) in ks.iter().enumerate() {
                let a = self.p.table.a[i][j];
                if a != 0.0 {
                    terms.push((step.h * a, k));
                }
            }
            let mut stage = self.combine(&terms);
            self.round(&mut stage);
            let t = step.t + self.p.table.c[i] * step.h;
            let results = self
                .p
                .program
                .run(self.arithmetic(kept), t, &stage, &self.theta);
            let outputs = self.p.program.outputs.iter();
            let mut k: Vec<Balls> = outputs.map(|&o| results[o].clone()).collect();
            self.round(&mut k);
            times.push(t);
            all.push(results);
            ks.push(k);
        }
        (times, all, ks)
    }

    fn update(&mut self, step: Step, y: &Vec<Balls>, ks: &[Vec<Balls>]) -> Vec<Balls> {
        let mut terms = vec![(1.0, y)];
        for (b, k) in self.p.table.b.iter().zip(ks) {
            if *b != 0.0 {
                terms.push((step.h * b, k));
            }
        }
        let y = self.combine(&terms);
        self.within(&y, 1.0, self.p.numbers.state);
        y
    }

    /// The cotangents of a stage, or what came back, as the field's arithmetic has them.
    fn round_cotangents(&mut self, v: &mut [Balls]) {
        let largest = v.iter().map(Balls::most).fold(self.largest, f64::max);
        self.largest = largest;
        for (leaf, v) in v.iter_mut().enumerate() {
            let to = self.p.numbers.compute(leaf);
            let (scale, lost) = self.p.scaled(to, largest);
            if let Some(scale) = scale {
                self.within(std::slice::from_ref(v), scale, to);
            }
            if to.is_low() {
                v.blur(self.p.numbers.held().unit());
            }
            if to != self.p.numbers.state {
                v.round_scaled(to, lost);
            }
        }
    }

    fn sweep(
        &mut self,
        steps: &[Step],
        kept: &[Vec<Balls>],
        mut cotangents: Vec<Vec<Balls>>,
        expected: &mut Expected,
    ) {
        let noise = self.p.kept_noise();
        let of = self.arithmetic(noise);
        let u = self.state_unit();
        let mut lambda = cotangents.pop().unwrap_or_default();
        let zeros = |p: &Balls| Balls::zeros(p.rows, p.cols);
        expected.params = self.theta.iter().map(zeros).collect();
        expected.times = Balls::zeros(1, self.p.times.len());
        for (step, y) in steps.iter().zip(kept).rev() {
            let (_, all, ks) = self.stages(*step, y, noise);
            let stages = ks.len();
            let mut ws: Vec<Option<Vec<Balls>>> = vec![None; stages];
            let largest = lambda.iter().map(Balls::most).fold(self.largest, f64::max);
            self.largest = largest;
            for i in (0..stages).rev() {
                let mut terms = vec![(self.p.table.b[i], &lambda)];
                for (j, w) in ws.iter().enumerate() {
                    if let (true, Some(w)) = (j > i, w) {
                        terms.push((step.h * self.p.table.a[j][i], w));
                    }
                }
                terms.retain(|term| term.0 != 0.0);
                if terms.is_empty() {
                    continue;
                }
                let v = self.combine(&terms);
                let mut seed = v.clone();
                self.round_cotangents(&mut seed);
                let pulled = self.p.program.pull(of, &all[i], &self.theta, &seed);
                let mut w = pulled.state;
                self.round_cotangents(&mut w);
                for (sum, g) in expected.params.iter_mut().zip(&pulled.params) {
                    for n in 0..g.len() {
                        sum.x[n] += step.h * g.x[n];
                        // h is rounded, the product, and the sum, the length of which `pull` has seen.
                        sum.e[n] += step.h.abs() * (g.e[n] + (of.terms + 4.0) * u * g.x[n].abs());
                    }
                }
                let along = v.iter().zip(&ks[i]).map(|(v, k)| dot(v, k, of.unit.max(u)));
                let along = along.fold((0.0, 0.0), |a, b| (a.0 + b.0, a.1 + b.1));
                self.time_terms(*step, i, along, pulled.time, &mut expected.times);
                ws[i] = Some(w);
            }
            let mut terms = vec![(1.0, &lambda)];
            terms.extend(ws.iter().flatten().map(|w| (step.h, w)));
            let incoming = match (step.j, self.p.case.is_final) {
                (0, false) => cotangents.pop(),
                _ => None,
            };
            terms.extend(incoming.as_ref().map(|v| (1.0, v)));
            lambda = self.combine(&terms);
            self.within(&lambda, 1.0, self.p.numbers.state);
        }
        self.within(&expected.params, 1.0, self.p.numbers.held());
        expected.y0 = lambda;
    }

    /// h = (T₁ − T₀)/m and τ_i = T₀ + (T₁ − T₀)(j + c_i)/m: what v·k and v·∂_t f are of T₀ and T₁.
    fn time_terms(
        &self,
        step: Step,
        i: usize,
        along: (f64, f64),
        through_f: (f64, f64),
        times: &mut Balls,
    ) {
        let m = step.m as f64;
        let at = (step.j as f64 + self.p.table.c[i]) / m;
        let u = 8.0 * self.p.numbers.held().unit().max(self.state_unit());
        let mut add = |time: usize, of_h: f64, of_t: f64| {
            times.x[time] += of_h * along.0 + of_t * through_f.0;
            let size = (of_h * along.0).abs() + (of_t * through_f.0).abs();
            times.e[time] += of_h.abs() * along.1 + of_t.abs() * through_f.1 + u * size;
        };
        add(step.interval, -1.0 / m, step.h * (1.0 - at));
        add(step.interval + 1, 1.0 / m, step.h * at);
    }
}
