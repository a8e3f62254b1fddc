//! Few rows are solved with their features in the lanes, and it does not show.
//!
//! `cargo test --test few_rows`, some seconds.  Without a vector unit, and for more rows than half its lanes, both sides of a
//! comparison are solved in the same way.

mod common;

use candle_core::{DType, Device, Tensor, Var};
use candle_diffeq::metrics::{Recorder, Stats};
use candle_diffeq::nn::{Activation, Mlp};
use candle_diffeq::options::{ActivationCache, Checkpoint, Output, Steps};
use candle_diffeq::tableau::{DOPRI5, EULER, RK4};
use candle_diffeq::{odeint, OdeOptions, Precision};
use candle_nn::{VarBuilder, VarMap};
use common::{bits, has_tiles, method, relative, scattered, U_BF16, U_F16, U_F32};

/// Rows of a batch that every vector unit fills.
const COMPANY: usize = 32;

#[derive(Clone)]
struct Case {
    widths: Vec<usize>,
    activation: Activation,
    time: bool,
    residual: bool,
    dtype: DType,
    options: OdeOptions,
}

struct Outcome {
    states: Tensor,
    y0: Tensor,
    params: Vec<Tensor>,
    stats: Stats,
}

impl Case {
    /// Enough work for the features of several rows to be put into the lanes: 4 · 700 evaluations of some thousand weights.
    fn new(widths: &[usize]) -> Self {
        Self {
            widths: widths.to_vec(),
            activation: Activation::Tanh,
            time: false,
            residual: false,
            dtype: DType::F32,
            options: method(&RK4, 350),
        }
    }

    fn field(&self, vars: &VarMap) -> Mlp {
        let vb = VarBuilder::from_varmap(vars, self.dtype, &Device::Cpu);
        for (l, pair) in self.widths.windows(2).enumerate() {
            let inputs = pair[0] + usize::from(self.time && l == 0);
            for (name, shape) in [("weight", vec![pair[1], inputs]), ("bias", vec![pair[1]])] {
                let value = self.numbers(&shape, 1.2 / (inputs as f64).sqrt(), l);
                let mut data = vars.data().lock().unwrap();
                data.insert(format!("{l}.{name}"), Var::from_tensor(&value).unwrap());
            }
        }
        let field = match self.time {
            true => Mlp::with_time(&self.widths, self.activation, vb).unwrap(),
            false => Mlp::new(&self.widths, self.activation, vb).unwrap(),
        };
        match self.residual {
            true => field.residual(),
            false => field,
        }
    }

    /// Numbers that are f32 in either dtype.
    fn numbers(&self, shape: &[usize], size: f64, seed: usize) -> Tensor {
        let x = scattered(shape, size, seed).to_dtype(DType::F32).unwrap();
        x.to_dtype(self.dtype).unwrap()
    }

    /// The first rows of one batch, and the gradients of a loss that looks at every state of each row.
    fn solve(&self, rows: usize) -> Outcome {
        let (vars, recorder) = (VarMap::new(), Recorder::default());
        let field = self.field(&vars);
        let options = OdeOptions {
            recorder: Some(recorder.clone()),
            ..self.options.clone()
        };
        let all = self.numbers(&[COMPANY, self.widths[0]], 1.0, 7);
        let y0 = Var::from_tensor(&all.narrow(0, 0, rows).unwrap()).unwrap();
        let states = odeint(field, y0.as_tensor(), &[0.0, 0.3, 1.0], &options).unwrap();
        let of = self.numbers(&[3, COMPANY, self.widths[0]], 1.0, 8);
        let weights = of.narrow(1, 0, rows).unwrap();
        let weights = match states.rank() {
            2 => weights.get(2).unwrap(),
            _ => weights,
        };
        let loss = (&states * weights).unwrap().sum_all().unwrap();
        let grads = loss.backward().unwrap();
        let mut named: Vec<_> = vars.data().lock().unwrap().clone().into_iter().collect();
        named.sort_by(|a, b| a.0.cmp(&b.0));
        let grad = |var: &Var| grads.get(var).unwrap().clone();
        Outcome {
            states: states.detach(),
            y0: grad(&y0),
            params: named.iter().map(|(_, var)| grad(var)).collect(),
            stats: recorder.take(),
        }
    }
}

/// Widths of every kind: whole vectors, less than one, a rest of one to three behind a multiple of four, one layer, many blocks.
/// Two of them where there is no vector unit, which solves few rows as it solves many.
fn shapes() -> Vec<Vec<usize>> {
    let mut shapes = vec![
        vec![2, 64, 64, 2],
        vec![3, 70, 19, 35, 3],
        vec![17, 130, 17],
        vec![50, 50],
        vec![1, 300, 9, 1],
        // More inputs than products with rows in the lanes read at a time.
        vec![2, 1100, 2],
        vec![8, 128, 16, 8],
    ];
    if !has_tiles() {
        shapes.truncate(2);
    }
    shapes
}

#[test]
fn a_row_has_the_same_bits_alone_and_in_company() {
    for widths in shapes() {
        for (activation, time, residual) in [
            (Activation::Tanh, false, false),
            (Activation::Softplus, true, false),
            (Activation::Sigmoid, false, true),
            (Activation::Relu, true, true),
        ] {
            let case = Case {
                activation,
                time,
                residual,
                ..Case::new(&widths)
            };
            let company = case.solve(COMPANY);
            for rows in [1, 2, 3, 4] {
                let few = case.solve(rows);
                let expected = company.states.narrow(1, 0, rows).unwrap();
                assert_eq!(
                    bits(&few.states),
                    bits(&expected),
                    "{widths:?} {activation:?}, {rows} rows: states"
                );
                let expected = company.y0.narrow(0, 0, rows).unwrap();
                assert_eq!(
                    bits(&few.y0),
                    bits(&expected),
                    "{widths:?} {activation:?}, {rows} rows: ∂y0"
                );
            }
        }
    }
}

#[test]
fn gradients_of_parameters_are_as_exact_as_those_of_the_general_path() {
    for widths in shapes() {
        for activation in Activation::ALL {
            for (rows, time, residual) in [(1, true, false), (3, false, true)] {
                let case = Case {
                    activation,
                    time,
                    residual,
                    options: method(&DOPRI5, 60),
                    ..Case::new(&widths)
                };
                let general = |dtype| {
                    let options = OdeOptions {
                        fusion: false,
                        ..case.options.clone()
                    };
                    let case = case.clone();
                    Case {
                        dtype,
                        options,
                        ..case
                    }
                    .solve(rows)
                };
                let (few, general, exact) =
                    (case.solve(rows), general(DType::F32), general(DType::F64));
                let all = few.params.iter().zip(&general.params).zip(&exact.params);
                for (i, ((few, general), exact)) in all.enumerate() {
                    let (error, allowed) = (relative(few, exact), relative(general, exact));
                    assert!(
                        error <= 2.0 * allowed + 32.0 * U_F32,
                        "{widths:?} {activation:?}, {rows} rows, parameter {i}: {error:e}, general path {allowed:e}"
                    );
                }
                assert_eq!(few.stats, general.stats);
            }
        }
    }
}

#[test]
fn every_memory_plan_gives_the_same_bits() {
    for rows in [1, 4] {
        let case = Case::new(&[3, 70, 19, 3]);
        let all = case.solve(rows);
        for checkpoint in [
            Checkpoint::Every(7),
            Checkpoint::States(9),
            Checkpoint::Bytes(4 * 3 * 4 * 40),
        ] {
            for cache in [ActivationCache::NONE, ActivationCache::within(1 << 20)] {
                let options = OdeOptions {
                    checkpoint,
                    activation_cache: cache,
                    ..case.options.clone()
                };
                let planned = Case {
                    options,
                    ..case.clone()
                };
                let planned = planned.solve(rows);
                assert_eq!(bits(&planned.states), bits(&all.states));
                assert_eq!(bits(&planned.y0), bits(&all.y0));
                for (got, expected) in planned.params.iter().zip(&all.params) {
                    assert_eq!(bits(got), bits(expected), "{checkpoint:?}, {rows} rows");
                }
                if cache != ActivationCache::NONE {
                    continue;
                }
                let general = Case {
                    options: OdeOptions {
                        checkpoint,
                        fusion: false,
                        ..case.options.clone()
                    },
                    ..case.clone()
                };
                let stats = general.solve(rows).stats;
                assert_eq!(planned.stats.states_kept, stats.states_kept);
                assert_eq!(planned.stats.bytes_kept, stats.bytes_kept);
            }
        }
    }
}

#[test]
fn features_are_in_the_lanes() {
    // An evaluation of one row keeps whole vectors of its features, and not a vector for each feature.
    let kept = |rows| {
        let case = Case {
            options: OdeOptions {
                activation_cache: ActivationCache::ALL,
                ..method(&RK4, 350)
            },
            ..Case::new(&[2, 64, 64, 2])
        };
        case.solve(rows).stats.activation_bytes
    };
    if has_tiles() {
        assert!(
            kept(1) <= kept(COMPANY) / 20,
            "{} {}",
            kept(1),
            kept(COMPANY)
        );
    }
}

#[test]
fn lanes_hold_no_row_that_is_not_there() {
    // A row of ones would grow by e¹⁰⁰; these stand still.
    let mut weight = [0f32; 64];
    weight[0] = 100.0;
    for rows in 1..=9 {
        let weight = Tensor::from_slice(&weight, (8, 8), &Device::Cpu).unwrap();
        let bias = Tensor::zeros(8, DType::F32, &Device::Cpu).unwrap();
        let layer = candle_nn::Linear::new(weight, Some(bias));
        let field = Mlp::from_layers(&[layer], Activation::Tanh, false).unwrap();
        let row = Tensor::new(&[0f32, 0., 0., 0., 0., 0., 0., 1.], &Device::Cpu).unwrap();
        let y0 = row.broadcast_as((rows, 8)).unwrap().contiguous().unwrap();
        let ys = odeint(field, &y0, &[0.0, 1.0], &method(&RK4, 30_000)).unwrap();
        assert_eq!(bits(&ys.get(1).unwrap()), bits(&y0), "{rows} rows");
    }
}

#[test]
fn states_of_any_rank_and_outputs_inside_steps_are_those_of_rows_in_company() {
    let times: Vec<_> = (0..=7).map(|i| f64::from(i) / 7.0).collect();
    for compensated in [false, true] {
        let case = Case {
            options: OdeOptions {
                steps: Steps::At((0..=500).map(|i| f64::from(i) / 500.0).collect()),
                precision: compensated.then(|| Precision::f32().compensated()),
                ..method(&DOPRI5, 1)
            },
            ..Case::new(&[3, 70, 19, 3])
        };
        let vars = VarMap::new();
        let field = case.field(&vars);
        let all = case.numbers(&[COMPANY, 3], 1.0, 7);
        let company = odeint(field.clone(), &all, &times, &case.options).unwrap();
        for shape in [&[3][..], &[1, 1, 3], &[2, 1, 3]] {
            let rows = shape.iter().product::<usize>() / 3;
            let y0 = all.narrow(0, 0, rows).unwrap().reshape(shape).unwrap();
            let few = odeint(field.clone(), &y0, &times, &case.options).unwrap();
            assert_eq!(few.dims()[1..], *shape);
            let expected = company.narrow(1, 0, rows).unwrap();
            assert_eq!(bits(&few), bits(&expected), "{shape:?}");
        }
    }
}

#[test]
fn both_paths_count_the_same() {
    for (rows, output) in [(1, Output::All), (3, Output::Final)] {
        let case = Case {
            options: OdeOptions {
                output,
                ..method(&EULER, 1000)
            },
            ..Case::new(&[3, 70, 19, 3])
        };
        let few = case.solve(rows);
        let general = Case {
            options: OdeOptions {
                fusion: false,
                ..case.options.clone()
            },
            ..case
        };
        assert_eq!(few.stats, general.solve(rows).stats);
    }
}

#[test]
fn low_precision_rounds_alike_alone_and_in_company() {
    for (precision, unit) in [(Precision::bf16(), U_BF16), (Precision::f16(), U_F16)] {
        let case = Case {
            options: OdeOptions {
                precision: Some(precision),
                ..method(&RK4, 350)
            },
            ..Case::new(&[5, 66, 30, 5])
        };
        let company = case.solve(COMPANY);
        let exact = Case {
            options: method(&RK4, 350),
            ..case.clone()
        };
        for rows in [1, 2, 4] {
            let few = case.solve(rows);
            let expected = company.states.narrow(1, 0, rows).unwrap();
            assert_eq!(bits(&few.states), bits(&expected), "{rows} rows");
            let exact = exact.solve(rows);
            for (got, expected) in few.params.iter().zip(&exact.params) {
                let error = relative(got, expected);
                assert!(error <= 8.0 * unit, "{rows} rows: {error:e}");
            }
        }
    }
}
