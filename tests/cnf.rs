//! The continuous normalising flow: its trace against full Jacobians, its pull-back against
//! autograd and differences, its solves tile by tile against the general path.
//!
//! `cargo test --test cnf`, ten seconds.

mod common;

use candle_core::{DType, Device, Result, Tensor};
use candle_diffeq::nn::{Activation, Cnf, Mlp};
use candle_diffeq::options::{Checkpoint, Output, Steps};
use candle_diffeq::tableau::{DOPRI5, HEUN, RK4};
use candle_diffeq::{odeint, NeuralOde, OdeOptions, Precision, Time, VectorField};
use candle_nn::{Linear, VarBuilder, VarMap};
use common::{all, error_of, fill, relative, scattered, values, var, worst, U_BF16};
use proptest::prelude::*;

/// Both sides add the same few thousand terms, in different orders.
const EXACT: f64 = 1e-12;

/// A perceptron: widths, activation, whether it reads time.
#[derive(Clone, Debug)]
struct Shape {
    widths: Vec<usize>,
    activation: Activation,
    time: bool,
}

impl Shape {
    fn mlp(&self, vb: VarBuilder<'_>) -> Result<Mlp> {
        if self.time {
            Mlp::with_time(&self.widths, self.activation, vb)
        } else {
            Mlp::new(&self.widths, self.activation, vb)
        }
    }

    fn features(&self) -> usize {
        self.widths[0]
    }

    /// A perceptron over scattered variables, and the flow of it.
    fn build(&self) -> (VarMap, Mlp, Cnf) {
        let vars = VarMap::new();
        let vb = VarBuilder::from_varmap(&vars, DType::F64, &Device::Cpu);
        let mlp = self.mlp(vb).unwrap();
        fill(&vars);
        (vars, mlp.clone(), Cnf::new(mlp).unwrap())
    }

    /// A neural ODE with scattered variables.
    fn ode(&self, dtype: DType, options: OdeOptions) -> (VarMap, NeuralOde<(Tensor, Tensor)>) {
        let (vars, shape) = (VarMap::new(), self.clone());
        let flow = move |vb: VarBuilder<'_>| Cnf::new(shape.mlp(vb)?);
        let ode = NeuralOde::from_field(&vars, "flow", dtype, &Device::Cpu, flow).unwrap();
        fill(&vars);
        (vars, ode.options(options))
    }
}

fn activation() -> impl Strategy<Value = Activation> {
    prop::sample::select(Activation::ALL.to_vec())
}

/// Perceptrons of as many hidden layers, widths up to `most`.
fn shapes(hidden: std::ops::Range<usize>, most: usize) -> impl Strategy<Value = Shape> {
    let widths = prop::collection::vec(1..=most, hidden);
    (1..=12usize, widths, activation(), any::<bool>()).prop_map(
        |(dim, hidden, activation, time)| Shape {
            widths: [&[dim], &hidden[..], &[dim]].concat(),
            activation,
            time,
        },
    )
}

fn at(t: f64) -> Time {
    Time::new(t, DType::F64, &Device::Cpu)
}

fn zeros(rows: usize) -> Tensor {
    Tensor::zeros((rows, 1), DType::F64, &Device::Cpu).unwrap()
}

/// −tr ∂g/∂z, one row of the Jacobian after the other by candle's autograd.
fn minus_trace(mlp: &Mlp, t: &Time, z: &Tensor) -> Result<Tensor> {
    let z = candle_core::Var::from_tensor(z)?;
    let k = mlp.velocity(t, &z)?;
    let mut sum = zeros(z.dim(0)?);
    for i in 0..z.dim(1)? {
        let grads = k.narrow(1, i, 1)?.sum_all()?.backward()?;
        if let Some(row) = grads.get(&z) {
            sum = (sum - row.narrow(1, i, 1)?)?;
        }
    }
    Ok(sum)
}

/// ⟨v, f⟩ of both parts.
fn product((k, kl): &(Tensor, Tensor), (v, vl): &(Tensor, Tensor)) -> Result<Tensor> {
    (k * v)?.sum_all()? + (kl * vl)?.sum_all()?
}

fn number(x: Result<Tensor>) -> f64 {
    values(&x.unwrap())[0]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn the_trace_is_that_of_the_full_jacobian(shape in shapes(0..5, 40), rows in 1..20usize) {
        let (_, mlp, cnf) = shape.build();
        let z = scattered(&[rows, shape.features()], 1.5, 3);
        let (k, l) = cnf.velocity(&at(0.3), &(z.clone(), zeros(rows))).unwrap();
        let exact = minus_trace(&mlp, &at(0.3), &z).unwrap();
        prop_assert!(relative(&l, &exact) <= EXACT, "{:e}", relative(&l, &exact));
        let velocity = mlp.velocity(&at(0.3), &z).unwrap();
        prop_assert_eq!(values(&k), values(&velocity));
    }

    #[test]
    fn the_pull_back_is_that_of_autograd(shape in shapes(0..5, 24), rows in 1..20usize) {
        let (vars, _, cnf) = shape.build();
        let z = var(&[rows, shape.features()], 1.5, 3);
        let v = (scattered(&[rows, shape.features()], 1.0, 5), scattered(&[rows, 1], 1.0, 6));
        let y = (z.as_tensor().clone(), zeros(rows));
        let tape = cnf.velocity(&at(0.3), &y).and_then(|k| product(&k, &v)?.backward()).unwrap();
        let (k, pull) = cnf.vjp(&at(0.3), &y).unwrap();
        let pulled = pull(&v).unwrap();
        let same = cnf.velocity(&at(0.3), &y).unwrap();
        prop_assert_eq!(values(&k.1), values(&same.1));
        let error = error_of(&pulled.params, &tape, &all(&vars));
        prop_assert!(error <= EXACT, "parameters: {:e}", error);
        if let Some(exact) = tape.get(&z) {
            let error = relative(&pulled.y.0, exact);
            prop_assert!(error <= EXACT, "z: {:e}", error);
        }
        prop_assert_eq!(worst(values(&pulled.y.1)), 0.0);
    }

    #[test]
    fn the_pull_back_is_that_of_differences(shape in shapes(0..5, 24), rows in 1..20usize) {
        // A difference over the kink of relu is none.
        prop_assume!(shape.activation != Activation::Relu);
        let (vars, _, cnf) = shape.build();
        let z = scattered(&[rows, shape.features()], 1.5, 3);
        let v = (scattered(z.dims(), 1.0, 5), scattered(&[rows, 1], 1.0, 6));
        let along = scattered(z.dims(), 1.0, 8);
        let (_, pull) = cnf.vjp(&at(0.3), &(z.clone(), zeros(rows))).unwrap();
        let pulled = pull(&v).unwrap();
        let mut slope = number((&pulled.y.0 * &along).and_then(|x| x.sum_all()));
        slope += pulled.t.map_or(0.0, |t| number(Ok(t)));
        let mut started = vec![];
        for (seed, (_, var)) in all(&vars).iter().enumerate() {
            let along = scattered(var.dims(), 1.0, 20 + seed);
            let grad = pulled.params.get(var).unwrap();
            slope += number((grad * &along).and_then(|x| x.sum_all()));
            started.push((var.clone(), var.as_tensor().copy().unwrap(), along));
        }
        let value = |e: f64| {
            for (var, start, along) in &started {
                var.set(&(start + (along * e).unwrap()).unwrap()).unwrap();
            }
            let z = (&z + (&along * e).unwrap()).unwrap();
            let k = cnf.velocity(&at(0.3 + e), &(z, zeros(rows)));
            number(k.and_then(|k| product(&k, &v)))
        };
        let e = 1e-4;
        // Of order four.
        let near = (value(e) - value(-e)) / (2.0 * e);
        let far = (value(2.0 * e) - value(-2.0 * e)) / (4.0 * e);
        let difference = (4.0 * near - far) / 3.0;
        let size = slope.abs().max(1.0);
        prop_assert!((slope - difference).abs() <= 1e-8 * size, "{slope} {difference}");
    }
}

/// Solves and differentiates a weighted sum of the states; errors of the second against the first:
/// z, l, parameters, z0, l0.
fn errors(shape: &Shape, rows: usize, sides: [(DType, OdeOptions); 2], times: &[f64]) -> [f64; 5] {
    let [exact, got] = sides.map(|(dtype, options)| {
        let (vars, ode) = shape.ode(dtype, options);
        let start = |dims: &[usize], seed| {
            let x = scattered(dims, 1.0, seed).to_dtype(DType::F32);
            let x = x.and_then(|x| x.to_dtype(dtype)).unwrap();
            candle_core::Var::from_tensor(&x).unwrap()
        };
        let (z0, l0) = (start(&[rows, shape.features()], 1), start(&[rows, 1], 2));
        let y0 = (z0.as_tensor().clone(), l0.as_tensor().clone());
        let (z, l) = ode.solve(&y0, times).unwrap();
        let weighted = |x: &Tensor, seed| {
            // Of one sign, lest the outputs' gradients cancel; the same numbers in both dtypes.
            let weights = (scattered(x.dims(), 0.5, seed) + 1.0)?.to_dtype(DType::F32)?;
            (x * weights.to_dtype(dtype)?)?.sum_all()
        };
        let loss = weighted(&z, 7).and_then(|a| a + weighted(&l, 9)?).unwrap();
        let grads = loss.backward().unwrap();
        let gradient = |x: &Tensor| grads.get(x).unwrap().to_dtype(DType::F64).unwrap();
        let double = |x: &Tensor| x.to_dtype(DType::F64).unwrap();
        let parameters: Vec<_> = all(&vars).iter().map(|(_, v)| gradient(v)).collect();
        (
            double(&z),
            double(&l),
            parameters,
            gradient(&z0),
            gradient(&l0),
        )
    });
    let parameters = got.2.iter().zip(&exact.2).map(|(x, e)| relative(x, e));
    [
        relative(&got.0, &exact.0),
        relative(&got.1, &exact.1),
        worst(parameters),
        relative(&got.3, &exact.3),
        relative(&got.4, &exact.4),
    ]
}

fn fusion(on: bool, options: &OdeOptions) -> OdeOptions {
    OdeOptions {
        fusion: on,
        ..options.clone()
    }
}

fn options() -> impl Strategy<Value = OdeOptions> {
    let methods = prop::sample::select(vec![RK4, HEUN, DOPRI5]);
    let outputs = prop::sample::select(vec![Output::All, Output::Final]);
    let plans = vec![Checkpoint::All, Checkpoint::Every(2), Checkpoint::States(2)];
    let plans = prop::sample::select(plans);
    (methods, outputs, plans, 1..4usize).prop_map(|(method, output, checkpoint, steps)| {
        OdeOptions {
            method,
            output,
            checkpoint,
            steps: Steps::PerInterval(steps),
            ..Default::default()
        }
    })
}

fn times() -> impl Strategy<Value = Vec<f64>> {
    prop::sample::select(vec![vec![0.0, 0.2, 0.5], vec![1.0, 0.7], vec![0.0, 0.4]])
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn tiles_and_the_general_path_agree(
        shape in prop_oneof![shapes(1..3, 40), shapes(3..6, 24)],
        rows in 1..70usize,
        options in options(),
        times in times(),
    ) {
        let sides = [false, true].map(|on| (DType::F64, fusion(on, &options)));
        let errors = errors(&shape, rows, sides, &times);
        prop_assert!(worst(errors) <= EXACT, "{errors:?}");
    }

    #[test]
    fn tiles_of_f32_are_as_good_as_f32(
        shape in prop_oneof![shapes(1..3, 40), shapes(3..6, 24)],
        rows in 1..140usize,
        options in options(),
        times in times(),
    ) {
        // A rounding may move a unit of relu over its kink.
        prop_assume!(shape.activation != Activation::Relu);
        let of = |on: bool| {
            let sides = [(DType::F64, false), (DType::F32, on)];
            let sides = sides.map(|(dtype, on)| (dtype, fusion(on, &options)));
            errors(&shape, rows, sides, &times)
        };
        // Where a gradient cancels, the general path loses as many digits.
        let (tiles, general) = (of(true), of(false));
        for (tiles, general) in tiles.iter().zip(general) {
            prop_assert!(*tiles <= 4e-6 + 2.0 * general, "{tiles:?}, {general:?}");
        }
    }
}

#[test]
fn tiles_round_where_the_general_path_rounds() {
    for widths in [
        vec![3, 20, 3],
        vec![2, 17, 33, 2],
        vec![2, 17, 33, 20, 2],
        vec![3, 9, 18, 17, 8, 3],
    ] {
        let shape = Shape {
            widths,
            activation: Activation::Tanh,
            time: true,
        };
        let options = OdeOptions {
            precision: Some(Precision::bf16()),
            ..Default::default()
        };
        let sides = [false, true].map(|on| (DType::F32, fusion(on, &options)));
        let errors = errors(&shape, 37, sides, &[0.0, 0.25, 0.5]);
        assert!(worst(errors) <= U_BF16, "{errors:?}");
    }
}

#[test]
fn flows_of_every_depth_are_the_same_with_fusion_and_without() {
    for hidden in 0..7 {
        let shape = Shape {
            widths: [vec![2], vec![5; hidden], vec![2]].concat(),
            activation: Activation::Silu,
            time: false,
        };
        let sides = [false, true].map(|on| (DType::F64, fusion(on, &OdeOptions::default())));
        assert!(worst(errors(&shape, 9, sides, &[0.0, 1.0])) <= EXACT);
    }
}

#[test]
fn frozen_layers_have_no_gradient() {
    for on in [false, true] {
        let layer = |dims: [usize; 2], seed| {
            let weight = var(&dims, 0.5, seed);
            (
                weight.clone(),
                Linear::new(weight.into_inner(), Some(scattered(&dims[..1], 0.5, 3))),
            )
        };
        let ((_, first), (last, second)) = (layer([6, 2], 1), layer([2, 6], 2));
        let bias = first.bias().cloned();
        let frozen = Linear::new(first.weight().detach(), bias);
        let mlp = Mlp::from_layers(&[frozen, second], Activation::Sin, false).unwrap();
        let y0 = (scattered(&[5, 2], 1.0, 1), zeros(5));
        let options = fusion(on, &OdeOptions::default());
        let (z, _) = odeint(Cnf::new(mlp).unwrap(), &y0, &[0.0, 1.0], &options).unwrap();
        let grads = z.sum_all().and_then(|z| z.backward()).unwrap();
        assert!(grads.get(&last).is_some() && grads.get(first.weight()).is_none());
    }
}

#[test]
fn batches_may_have_more_dimensions() {
    let shape = Shape {
        widths: vec![3, 8, 9, 3],
        activation: Activation::Softplus,
        time: true,
    };
    let solved = |on: bool, rows: &[usize]| {
        let (_, ode) = shape.ode(DType::F64, fusion(on, &OdeOptions::default()));
        let z = scattered(&[6, 3], 1.0, 1)
            .reshape([rows, &[3]].concat())
            .unwrap();
        let l = zeros(6).reshape([rows, &[1]].concat()).unwrap();
        let (z, l) = ode.solve(&(z, l), &[0.0, 1.0]).unwrap();
        assert_eq!(z.dims(), [&[2], rows, &[3]].concat());
        assert_eq!(l.dims(), [&[2], rows, &[1]].concat());
        [values(&z), values(&l)].concat()
    };
    let exact = solved(false, &[6]);
    for on in [false, true] {
        let got = solved(on, &[2, 3]);
        let error = worst(got.iter().zip(&exact).map(|(x, e)| x - e));
        assert!(error <= EXACT, "{error:e}");
    }
}

#[test]
fn residual_layers_and_other_shapes_are_refused() {
    let shape = Shape {
        widths: vec![2, 4, 2],
        activation: Activation::Tanh,
        time: false,
    };
    let (_, mlp, cnf) = shape.build();
    let refused = Cnf::new(mlp.residual()).unwrap_err().to_string();
    assert!(refused.contains("residual"), "{refused}");
    for (z, l) in [([3, 3], [3, 1]), ([3, 2], [3, 2]), ([3, 2], [2, 1])] {
        let y = (scattered(&z, 1.0, 1), scattered(&l, 1.0, 2));
        let error = cnf.velocity(&at(0.0), &y).unwrap_err().to_string();
        assert!(error.contains("Cnf of 2 features"), "{error}");
        assert!(cnf.vjp(&at(0.0), &y).is_err());
        let (_, ode) = shape.ode(DType::F64, OdeOptions::default());
        assert!(ode.solve(&y, &[0.0, 1.0]).is_err());
    }
}
