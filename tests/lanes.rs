//! Lanes of a tile without a row are copies of a row: whatever they would do by themselves, they do not
//! fail a solve, and nothing of them is in a sum.
//!
//! Each field here stands still where its rows are, and runs away from zero.
//!
//! `cargo test --test lanes`, some seconds.

mod common;

use candle_core::{DType, Device, Tensor, Var};
use candle_diffeq::metrics::{Recorder, Stats};
use candle_diffeq::nn::{Activation, Cnf, ConvField, Hutchinson, Mlp, RowLoss};
use candle_diffeq::options::{Checkpoint, Output, Steps};
use candle_diffeq::tableau::RK4;
use candle_diffeq::{NeuralOde, OdeOptions, Precision, State};
use candle_nn::{VarBuilder, VarMap};
use common::{all, relative, U_BF16, U_F16, U_F32, U_F64};

/// y' = y − 1, which a roundoff from 1 would leave too; and y' = −max(1 − y, 0), whose rows from 2 on
/// feel nothing of what is below 1.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Growth {
    Linear,
    Below,
}

#[derive(Clone, Copy, Debug)]
enum Kind {
    Mlp,
    Cnf,
    /// With an estimated trace.
    Estimated,
    Conv,
}

/// What is asked of a solve.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Pass {
    Forward,
    /// Forward, and backward from a loss of all states.
    Both,
    /// The loss inside the solve.
    AtOnce,
}

const STEP: f64 = 64.0;

const KINDS: [Kind; 4] = [Kind::Mlp, Kind::Cnf, Kind::Estimated, Kind::Conv];

/// What comes out: by name the states or the loss, and gradients.
struct Answers {
    tensors: Vec<(String, Tensor)>,
    stats: Stats,
}

#[derive(Clone)]
struct Case {
    kind: Kind,
    growth: Growth,
    rows: usize,
    dtype: DType,
    times: Vec<f64>,
    options: OdeOptions,
    pass: Pass,
}

impl Case {
    /// So many steps, with an output in the middle, so long that they go from zero 7 · 10⁵ times as far
    /// each.
    fn new(kind: Kind, growth: Growth, rows: usize, dtype: DType, steps: usize) -> Self {
        let half = steps / 2;
        Self {
            kind,
            growth,
            rows,
            dtype,
            times: [0, half, 2 * half].map(|n| STEP * n as f64).to_vec(),
            options: OdeOptions {
                method: RK4,
                steps: Steps::PerInterval(half),
                ..Default::default()
            },
            pass: Pass::Both,
        }
    }

    fn at(&self, shape: &[usize]) -> Tensor {
        let start = match self.growth {
            Growth::Linear => 1.0,
            Growth::Below => 2.0,
        };
        let y = Tensor::full(start as f32, shape, &Device::Cpu);
        y.and_then(|y| y.to_dtype(self.dtype)).unwrap()
    }

    /// Hidden units, and the numbers of a variable of the field.
    fn weights(&self, name: &str) -> Vec<f64> {
        let hidden = !matches!(
            (self.kind, self.growth),
            (Kind::Mlp | Kind::Conv, Growth::Linear)
        );
        match (self.growth, hidden, name) {
            // y − 1.
            (Growth::Linear, false, "0.weight") => vec![1.0],
            (Growth::Linear, false, "0.bias") => vec![-1.0],
            // max(y, 0) − max(−y, 0) − 1.
            (Growth::Linear, true, "0.weight" | "1.weight") => vec![1.0, -1.0],
            (Growth::Linear, true, "0.bias") => vec![0.0, 0.0],
            (Growth::Linear, true, "1.bias") => vec![-1.0],
            // −max(1 − y, 0).
            (Growth::Below, _, "0.weight" | "1.weight") => vec![-1.0],
            (Growth::Below, _, "0.bias") => vec![1.0],
            (Growth::Below, _, "1.bias") => vec![0.0],
            _ => panic!("{name}"),
        }
    }

    fn widths(&self) -> Vec<usize> {
        match (self.growth, self.kind) {
            (Growth::Linear, Kind::Cnf | Kind::Estimated) => vec![1, 2, 1],
            (Growth::Linear, _) => vec![1, 1],
            (Growth::Below, _) => vec![1, 1, 1],
        }
    }

    fn run(&self, fusion: bool) -> candle_diffeq::Result<Answers> {
        let (vars, widths) = (VarMap::new(), self.widths());
        let relu = Activation::Relu;
        match self.kind {
            Kind::Mlp => {
                let build = move |vb: VarBuilder<'_>| Mlp::new(&widths, relu, vb);
                let ode = NeuralOde::from_field(&vars, "", self.dtype, &Device::Cpu, build)?;
                self.solved::<Tensor>(ode, &vars, vec![self.at(&[self.rows, 1])], fusion)
            }
            Kind::Cnf => {
                let build = move |vb: VarBuilder<'_>| Cnf::new(Mlp::new(&widths, relu, vb)?);
                let ode = NeuralOde::from_field(&vars, "", self.dtype, &Device::Cpu, build)?;
                let z = self.at(&[self.rows, 1]);
                let l = z.zeros_like()?;
                self.solved::<(Tensor, Tensor)>(ode, &vars, vec![z, l], fusion)
            }
            Kind::Estimated => {
                let build =
                    move |vb: VarBuilder<'_>| Ok(Hutchinson::new(Mlp::new(&widths, relu, vb)?));
                let ode = NeuralOde::from_field(&vars, "", self.dtype, &Device::Cpu, build)?;
                let z = self.at(&[self.rows, 1]);
                let y0 = vec![z.clone(), z.zeros_like()?, z.ones_like()?];
                self.solved::<(Tensor, Tensor, Tensor)>(ode, &vars, y0, fusion)
            }
            Kind::Conv => {
                let build = move |vb: VarBuilder<'_>| ConvField::new(&widths, 1, relu, vb);
                let ode = NeuralOde::from_field(&vars, "", self.dtype, &Device::Cpu, build)?;
                let y0 = vec![self.at(&[self.rows, 1, 2, 1])];
                self.solved::<Tensor>(ode, &vars, y0, fusion)
            }
        }
    }

    fn solved<S: State + 'static>(
        &self,
        ode: NeuralOde<S>,
        vars: &VarMap,
        y0: Vec<Tensor>,
        fusion: bool,
    ) -> candle_diffeq::Result<Answers> {
        for (name, var) in all(vars) {
            let x = Tensor::new(self.weights(&name), &Device::Cpu)?;
            var.set(&x.reshape(var.shape())?.to_dtype(var.dtype())?)?;
        }
        let recorder = Recorder::default();
        let ode = ode.options(OdeOptions {
            fusion,
            recorder: Some(recorder.clone()),
            ..self.options.clone()
        });
        let y0: Vec<_> = y0.iter().map(Var::from_tensor).collect::<Result<_, _>>()?;
        let start = S::from_leaves(y0.iter().map(|y| y.as_tensor().clone()).collect())?;
        let mut tensors = vec![];
        let loss = if self.pass == Pass::AtOnce {
            let loss = match self.kind {
                Kind::Cnf => RowLoss::GaussianNll,
                _ => {
                    let shape = [&[self.times.len()], y0[0].dims()].concat();
                    RowLoss::MeanSquaredError(Tensor::zeros(shape, y0[0].dtype(), &Device::Cpu)?)
                }
            };
            let loss = ode.loss(&start, &self.times[..], &loss)?;
            tensors.push(("loss".to_owned(), loss.detach()));
            loss
        } else {
            let states = ode.solve(&start, &self.times[..])?.leaves();
            let mut loss = Tensor::zeros((), states[0].dtype(), &Device::Cpu)?;
            for (leaf, y) in states.iter().enumerate() {
                tensors.push((format!("states {leaf}"), y.detach()));
                loss = (loss + y.sqr()?.sum_all()?)?;
            }
            loss
        };
        if self.pass != Pass::Forward {
            let grads = loss.backward()?;
            let starts = y0.iter().map(|y0| ("y0".to_owned(), y0.clone()));
            for (name, var) in starts.chain(all(vars)) {
                tensors.push((name, grads.get(&var).unwrap().clone()));
            }
        }
        Ok(Answers {
            tensors,
            stats: recorder.take(),
        })
    }

    /// Both paths agree within a bound; the statistics of both.
    #[track_caller]
    fn check(&self, bound: f64) -> [Stats; 2] {
        let Self {
            kind,
            growth,
            rows,
            dtype,
            pass,
            ..
        } = self;
        let what = format!("{kind:?}, {growth:?}, {rows} rows, {dtype:?}, {pass:?}");
        // On one thread: waking another takes longer than such a solve.
        let pool = rayon::ThreadPoolBuilder::new().num_threads(1).build();
        let pool = pool.unwrap();
        let [got, exact] = [true, false].map(|fusion| match pool.install(|| self.run(fusion)) {
            Ok(answers) => answers,
            Err(error) => panic!("{what}, fusion {fusion}: {error}"),
        });
        for ((name, x), (_, y)) in got.tensors.iter().zip(&exact.tensors) {
            let error = relative(x, y);
            assert!(error <= bound, "{what}, {name}: {error:e}");
        }
        [got.stats, exact.stats]
    }
}

/// A step forward and backward is a few roundings, and so is what a row adds to a sum.
fn roundoffs(case: &Case, unit: f64) -> f64 {
    let steps = case.times.last().unwrap() / STEP;
    (16.0 * steps + case.rows as f64) * unit
}

#[test]
fn rows_that_stand_still_are_solved_though_idle_lanes_would_overflow() {
    for kind in KINDS {
        for rows in 1..=70 {
            // From zero, f32 is left after six steps; so it would be by the cotangents of the rows.
            let mut case = Case::new(kind, Growth::Linear, rows, DType::F32, 8);
            case.pass = Pass::Forward;
            case.check(roundoffs(&case, U_F32));
        }
    }
}

#[test]
fn gradients_are_those_of_the_general_path_in_every_batch() {
    for kind in KINDS {
        for rows in 1..=70 {
            for (pass, growth, steps) in [
                (Pass::Both, Growth::Below, 8),
                (Pass::Both, Growth::Linear, 4),
                (Pass::AtOnce, Growth::Below, 8),
            ] {
                let estimated = matches!(kind, Kind::Estimated);
                // A loss in the solve is of one tensor, or of two; and candle's graph of a tangent takes long.
                if estimated && (pass == Pass::AtOnce || rows % 8 > 1) {
                    continue;
                }
                let mut case = Case::new(kind, growth, rows, DType::F32, steps);
                case.pass = pass;
                if pass == Pass::AtOnce && matches!(kind, Kind::Cnf) {
                    case.options.output = Output::Final;
                }
                case.check(roundoffs(&case, U_F32));
            }
        }
    }
}

#[test]
fn f64_leaves_its_range_later_and_no_more_than_f32() {
    for kind in KINDS {
        for rows in [1, 3, 7, 9] {
            let case = Case::new(kind, Growth::Below, rows, DType::F64, 56);
            case.check(roundoffs(&case, U_F64));
        }
    }
}

#[test]
fn every_memory_plan_keeps_idle_lanes_still() {
    for kind in KINDS {
        for rows in [1, 15, 33] {
            let state = match kind {
                Kind::Mlp => 4,
                Kind::Cnf | Kind::Conv => 8,
                Kind::Estimated => 12,
            };
            for checkpoint in [
                Checkpoint::All,
                Checkpoint::Every(3),
                Checkpoint::States(3),
                Checkpoint::Bytes(4 * rows * state),
            ] {
                for store in [DType::F32, DType::BF16, DType::F16] {
                    let mut case = Case::new(kind, Growth::Below, rows, DType::F32, 8);
                    case.options.checkpoint = checkpoint;
                    case.options.precision = Some(Precision::f32().store(store));
                    let [got, exact] = case.check(roundoffs(&case, U_F32));
                    assert_eq!(got, exact);
                }
            }
        }
    }
}

#[test]
fn idle_lanes_neither_fail_low_precision_nor_ask_its_scaler_for_another_try() {
    for (precision, unit) in [(Precision::f16(), U_F16), (Precision::bf16(), U_BF16)] {
        for kind in KINDS {
            for rows in [1, 2, 5, 16, 17, 40, 65] {
                // From zero, f16 is left in the third step of 8.
                for (growth, steps) in [(Growth::Below, 8), (Growth::Linear, 6)] {
                    let mut case = Case::new(kind, growth, rows, DType::F32, steps);
                    for t in &mut case.times {
                        *t *= 8.0 / STEP;
                    }
                    case.options.precision = Some(precision);
                    let [got, _] = case.check((16 * steps + rows) as f64 * unit);
                    assert_eq!(got.retries, 0);
                }
            }
        }
    }
}
