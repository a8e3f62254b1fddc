//! Continuous flows beyond `Cnf`: traces against full Jacobians, pull-backs against autograd,
//! densities that integrate to one; what judges them.
//!
//! `cargo test --test flows`, ten seconds.

mod common;

use candle_core::{DType, Device, Result, Tensor, Var};
use candle_diffeq::datasets::Density;
use candle_diffeq::error::{AdaptiveDefect, Error};
use candle_diffeq::metrics::mmd;
use candle_diffeq::metrics::Recorder;
use candle_diffeq::nn::{Activation, Cnf, Hutchinson, HyperCnf, Mlp, OtFlow, Probe};
use candle_diffeq::options::{Adaptive, Arithmetic, Output, StepControl, Steps};
use candle_diffeq::tableau::{DOPRI5, EULER};
use candle_diffeq::{NeuralOde, OdeOptions, Precision, State, Time, VectorField};
use candle_nn::{VarBuilder, VarMap};
use common::{
    all, bits, error_of, relative, scatter, scattered, values, worst, U_BF16, U_F16, U_F32, U_F64,
};
use proptest::prelude::*;

fn at(t: f64) -> Time {
    Time::new(t, DType::F64, &Device::Cpu)
}

fn zeros(rows: usize, columns: usize) -> Tensor {
    Tensor::zeros((rows, columns), DType::F64, &Device::Cpu).unwrap()
}

/// tr ∂g/∂z of rows that do not see each other, one row of the Jacobian after the other by candle's
/// autograd.
fn trace(g: impl Fn(&Tensor) -> Result<Tensor>, z: &Tensor) -> Result<Tensor> {
    let z = Var::from_tensor(z)?;
    let k = g(&z)?;
    let mut sum = zeros(z.dim(0)?, 1);
    for i in 0..z.dim(1)? {
        let grads = k.narrow(1, i, 1)?.sum_all()?.backward()?;
        if let Some(row) = grads.get(&z) {
            sum = (sum + row.narrow(1, i, 1)?)?;
        }
    }
    Ok(sum)
}

fn map() -> (VarMap, VarBuilder<'static>) {
    let vars = VarMap::new();
    let vb = VarBuilder::from_varmap(&vars, DType::F64, &Device::Cpu);
    (vars, vb)
}

fn hyper(features: usize, width: usize, hidden: usize) -> (VarMap, HyperCnf) {
    let (vars, vb) = map();
    let field = HyperCnf::new(features, width, hidden, vb).unwrap();
    scatter(&vars);
    (vars, field)
}

fn ot_flow(features: usize, width: usize, rank: usize) -> (VarMap, OtFlow) {
    let (vars, vb) = map();
    let field = OtFlow::new(features, width, rank, vb).unwrap();
    scatter(&vars);
    (vars, field)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    #[test]
    fn the_trace_of_a_hyper_network_flow_is_that_of_the_full_jacobian(
        features in 1..5usize, width in 1..20usize, hidden in 1..8usize, rows in 1..9usize,
    ) {
        let (_, field) = hyper(features, width, hidden);
        let z = scattered(&[rows, features], 1.5, 3);
        let k = |z: &Tensor| field.velocity(&at(0.3), &(z.clone(), zeros(rows, 1)));
        let exact = trace(|z| Ok(k(z)?.0), &z).unwrap();
        let error = relative(&k(&z).unwrap().1.neg().unwrap(), &exact);
        prop_assert!(error <= 1e-12, "{error:e}");
    }

    #[test]
    fn the_pull_back_of_a_hyper_network_flow_is_that_of_autograd(
        features in 1..5usize, width in 1..20usize, hidden in 1..8usize, rows in 1..9usize,
    ) {
        let (vars, field) = hyper(features, width, hidden);
        let z = common::var(&[rows, features], 1.5, 3);
        let v = (scattered(&[rows, features], 1.0, 5), scattered(&[rows, 1], 1.0, 6));
        let y = (z.as_tensor().clone(), zeros(rows, 1));
        let t = Time::differentiable(0.3, DType::F64, &Device::Cpu);
        let tape = field.velocity(&t, &y).and_then(|(k, l)| {
            ((k * &v.0)?.sum_all()? + (l * &v.1)?.sum_all()?)?.backward()
        });
        let tape = tape.unwrap();
        let (_, pull) = field.vjp(&at(0.3), &y).unwrap();
        let pulled = pull(&v).unwrap();
        let error = error_of(&pulled.params, &tape, &all(&vars));
        prop_assert!(error <= 1e-12, "parameters: {error:e}");
        let error = relative(&pulled.y.0, tape.get(&z).unwrap());
        prop_assert!(error <= 1e-12, "z: {error:e}");
        let error = relative(&pulled.t.unwrap(), tape.get(&t.tensor().unwrap()).unwrap());
        prop_assert!(error <= 1e-12, "t: {error:e}");
    }

    #[test]
    fn derivatives_of_a_potential_are_those_of_autograd(
        features in 1..7usize, width in 1..20usize, rank in 1..5usize, rows in 1..9usize,
    ) {
        let (_, field) = ot_flow(features, width, rank);
        let x = common::var(&[rows, features], 1.5, 3);
        let t = Time::differentiable(0.3, DType::F64, &Device::Cpu);
        let potential = field.potential(&t, &x).unwrap();
        let slopes = potential.sum_all().and_then(|p| p.backward()).unwrap();
        let k = |x: &Tensor| field.velocity(&at(0.3), &(x.clone(), zeros(rows, 3)));
        let (v, costs) = k(&x).unwrap();
        let minus_slope = slopes.get(&x).unwrap().neg().unwrap();
        prop_assert!(relative(&v, &minus_slope) <= 1e-12);
        let minus_trace = trace(|x| Ok(k(x)?.0), &x).unwrap();
        let error = relative(&costs.narrow(1, 0, 1).unwrap().neg().unwrap(), &minus_trace);
        prop_assert!(error <= 1e-10, "trace: {error:e}");
        let transport = (v.sqr().unwrap().sum_keepdim(1).unwrap() * 0.5).unwrap();
        prop_assert!(relative(&costs.narrow(1, 1, 1).unwrap(), &transport) <= 1e-12);
        // One row: t is shared by all, and R is of each.
        if rows == 1 {
            let slope = values(slopes.get(&t.tensor().unwrap()).unwrap())[0];
            let residual = (slope - values(&transport)[0]).abs();
            let got = values(&costs.narrow(1, 2, 1).unwrap())[0];
            let size = slope.abs().max(values(&transport)[0]);
            prop_assert!((got - residual).abs() <= 1e-12 * size, "{got} {residual}");
        }
    }

    #[test]
    fn the_pull_back_of_a_potential_flow_is_that_of_autograd(
        features in 1..7usize, width in 1..20usize, rank in 1..5usize, rows in 1..9usize,
    ) {
        let (vars, field) = ot_flow(features, width, rank);
        let x = common::var(&[rows, features], 1.5, 3);
        let v = (scattered(&[rows, features], 1.0, 5), scattered(&[rows, 3], 1.0, 6));
        let y = (x.as_tensor().clone(), zeros(rows, 3));
        let t = Time::differentiable(0.3, DType::F64, &Device::Cpu);
        let tape = field.velocity(&t, &y).and_then(|(k, costs)| {
            ((k * &v.0)?.sum_all()? + (costs * &v.1)?.sum_all()?)?.backward()
        });
        let tape = tape.unwrap();
        let (k, pull) = field.vjp(&at(0.3), &y).unwrap();
        prop_assert_eq!(values(&k.1), values(&field.velocity(&at(0.3), &y).unwrap().1));
        let pulled = pull(&v).unwrap();
        // A gradient may be the small remainder of a sum: errors are relative to the largest.
        let vars = all(&vars);
        let largest = |of: &Tensor| values(of).into_iter().fold(0.0, |m: f64, x| m.max(x.abs()));
        let size = vars.iter().map(|(_, var)| largest(tape.get(var).unwrap()));
        let size = size.fold(largest(tape.get(&x).unwrap()), f64::max);
        for (name, var) in &vars {
            let (got, exact) = (pulled.params.get(var).unwrap(), tape.get(var).unwrap());
            let error = largest(&(got - exact).unwrap()) / size;
            prop_assert!(error <= 1e-12, "{name}: {error:e}");
        }
        let error = largest(&(&pulled.y.0 - tape.get(&x).unwrap()).unwrap()) / size;
        prop_assert!(error <= 1e-12, "x: {error:e}");
        let error = relative(&pulled.t.unwrap(), tape.get(&t.tensor().unwrap()).unwrap());
        prop_assert!(error <= 1e-11, "t: {error:e}");
    }

    #[test]
    fn the_mean_over_all_rademacher_probes_is_the_trace(
        features in 1..6usize,
        hidden in prop::collection::vec(1..12usize, 0..4),
        activation in prop::sample::select(Activation::ALL.to_vec()),
        residual in any::<bool>(),
        rows in 1..5usize,
    ) {
        let (vars, vb) = map();
        let widths = [&[features], &hidden[..], &[features]].concat();
        let mut mlp = Mlp::with_time(&widths, activation, vb).unwrap();
        if residual {
            mlp = mlp.residual();
        }
        scatter(&vars);
        let z = scattered(&[rows, features], 1.5, 3);
        let exact = trace(|z| mlp.velocity(&at(0.3), z), &z).unwrap();
        let flow = Hutchinson::new(mlp.clone());
        let mut sum = zeros(rows, 1);
        for signs in 0..1u32 << features {
            let sign = |i: usize| if signs >> (i % features) & 1 == 1 { 1.0 } else { -1.0 };
            let probe: Vec<f64> = (0..rows * features).map(sign).collect();
            let probe = Tensor::from_vec(probe, (rows, features), &Device::Cpu).unwrap();
            let y = (z.clone(), zeros(rows, 1), probe);
            let (k, l, still) = flow.velocity(&at(0.3), &y).unwrap();
            prop_assert!(relative(&k, &mlp.velocity(&at(0.3), &z).unwrap()) <= 1e-13);
            prop_assert_eq!(worst(values(&still)), 0.0);
            sum = (sum - l).unwrap();
        }
        let mean = (sum / f64::from(1u32 << features)).unwrap();
        // The estimates are up to `features` times as large as what is left of them.
        let size = worst(values(&exact)).max(1.0);
        let error = worst(values(&(mean - exact).unwrap())) / size;
        prop_assert!(error <= 4096.0 * U_F64, "{error:e}");
    }
}

#[test]
fn the_mean_gradient_over_all_probes_is_that_of_the_exact_trace() {
    const FEATURES: usize = 3;
    for activation in Activation::ALL {
        let (vars, vb) = map();
        let mlp = Mlp::with_time(&[FEATURES, 7, 5, FEATURES], activation, vb).unwrap();
        scatter(&vars);
        let z = scattered(&[2, FEATURES], 1.0, 3);
        let v = (scattered(z.dims(), 1.0, 5), scattered(&[2, 1], 1.0, 6));
        let exact = Cnf::new(mlp.clone()).unwrap();
        let (_, pull) = exact.vjp(&at(0.3), &(z.clone(), zeros(2, 1))).unwrap();
        let exact = pull(&v).unwrap();
        let flow = Hutchinson::new(mlp);
        let variables = all(&vars);
        let mut means: Vec<_> = variables
            .iter()
            .map(|(_, v)| v.zeros_like().unwrap())
            .collect();
        let mut mean_z = z.zeros_like().unwrap();
        for signs in 0..1u32 << FEATURES {
            let sign = |i: usize| {
                if signs >> (i % FEATURES) & 1 == 1 {
                    1.0
                } else {
                    -1.0
                }
            };
            let probe = Tensor::from_iter((0..2 * FEATURES).map(sign), &Device::Cpu);
            let probe = probe.and_then(|p| p.reshape((2, FEATURES))).unwrap();
            let (_, pull) = flow
                .vjp(&at(0.3), &(z.clone(), zeros(2, 1), probe))
                .unwrap();
            let pulled = pull(&(v.0.clone(), v.1.clone(), z.zeros_like().unwrap())).unwrap();
            for (mean, (_, var)) in means.iter_mut().zip(&variables) {
                *mean = (&*mean + (pulled.params.get(var).unwrap() / 8.0).unwrap()).unwrap();
            }
            mean_z = (mean_z + (pulled.y.0 / 8.0).unwrap()).unwrap();
        }
        let error = relative(&mean_z, &exact.y.0);
        assert!(error <= 1e-12, "{activation:?}, z: {error:e}");
        for (mean, (name, var)) in means.iter().zip(&variables) {
            let error = relative(mean, exact.params.get(var).unwrap());
            assert!(error <= 1e-12, "{activation:?}, {name}: {error:e}");
        }
    }
}

/// ∫ p over a grid of the window ±`reach`, given log p of points (n, 2).
fn integral(reach: f64, log_density: impl Fn(&Tensor) -> Tensor) -> f64 {
    const CELLS: usize = 100;
    let width = 2.0 * reach / CELLS as f64;
    let middle = |i: usize| -reach + (i as f64 + 0.5) * width;
    let grid = (0..CELLS).flat_map(|i| (0..CELLS).flat_map(move |j| [middle(i), middle(j)]));
    let grid = Tensor::from_iter(grid, &Device::Cpu).unwrap();
    let density = log_density(&grid.reshape((CELLS * CELLS, 2)).unwrap());
    let density = density.exp().unwrap();
    values(&density).into_iter().sum::<f64>() * width * width
}

/// log N(z; 0, I) of (n, 2), (n, 1).
fn log_normal(z: &Tensor) -> Result<Tensor> {
    (z.sqr()?.sum_keepdim(1)? * -0.5)? - std::f64::consts::TAU.ln()
}

/// ∫ p over the plane for a flow with l as its cost column 0, noise at time `noise`.
fn mass<F>(field: F, columns: usize, noise: f64) -> f64
where
    F: VectorField<(Tensor, Tensor)> + Send + Sync + 'static,
{
    let field = std::sync::Arc::new(field);
    let options = OdeOptions {
        steps: Steps::PerInterval(12),
        output: Output::Final,
        ..Default::default()
    };
    integral(8.0, |x| {
        let y0 = (x.clone(), zeros(x.dim(0).unwrap(), columns));
        let solved =
            candle_diffeq::solution(&*field, &y0, &[1.0 - noise, noise], &options).unwrap();
        let (z, gained) = solved.states();
        (log_normal(z).unwrap() - gained.narrow(1, 0, 1).unwrap()).unwrap()
    })
}

#[test]
fn densities_of_flows_integrate_to_one() {
    // Random fields, and as bent as trained ones: the density varies by a factor of hundreds.
    let (_, hyper) = hyper(2, 24, 6);
    let (vars, potential) = ot_flow(2, 6, 2);
    for (_, var) in all(&vars) {
        // Lest data lie outside the window.
        var.set(&(var.as_tensor() * 0.4).unwrap()).unwrap();
    }
    let (vars, vb) = map();
    let mlp = Mlp::with_time(&[2, 16, 16, 2], Activation::Tanh, vb).unwrap();
    scatter(&vars);
    for (name, mass) in [
        ("hyper-network", mass(hyper, 1, 0.0)),
        ("perceptron", mass(Cnf::new(mlp).unwrap(), 1, 0.0)),
        ("potential", mass(potential, 3, 1.0)),
    ] {
        assert!((mass - 1.0).abs() <= 0.01, "{name}: {mass}");
    }
}

/// Solves a field of (z, summed) in native low precision, summed in f32, and in f32: the largest
/// errors of both tensors and of the parameters' gradients.
fn cost_of_native<F, B>(build: B, columns: usize, low: Precision) -> [f64; 3]
where
    F: VectorField<(Tensor, Tensor)> + Send + Sync + 'static,
    B: Fn(VarBuilder<'_>) -> Result<F> + Send + Sync + Copy + 'static,
{
    let single = Precision::f32();
    let solved = [low.arithmetic(Arithmetic::Native), single].map(|precision| {
        let vars = VarMap::new();
        let ode = NeuralOde::from_field(&vars, "f", DType::F32, &Device::Cpu, build).unwrap();
        scatter(&vars);
        let ode = ode.options(OdeOptions {
            leaf_precision: vec![precision, single],
            steps: Steps::PerInterval(4),
            output: Output::Final,
            ..Default::default()
        });
        let f32 = |x: Tensor| x.to_dtype(DType::F32).unwrap();
        let y0 = (f32(scattered(&[16, 2], 1.0, 1)), f32(zeros(16, columns)));
        let (z, sums) = ode.solve(&y0, &[0.0, 0.5]).unwrap();
        assert_eq!((z.dtype(), sums.dtype()), (DType::F32, DType::F32));
        let loss = (z.sum_all().unwrap() + sums.sum_all().unwrap()).unwrap();
        let grads = loss.backward().unwrap();
        let gradients = all(&vars).into_iter().map(|(_, v)| {
            let of = grads.get(&v).unwrap();
            of.flatten_all().unwrap()
        });
        let gradients: Vec<_> = gradients.collect();
        [z, sums, Tensor::cat(&gradients, 0).unwrap()]
    });
    let [low, exact] = &solved;
    [0, 1, 2].map(|i| relative(&low[i], &exact[i]))
}

#[test]
fn flows_run_in_native_low_precision_with_sums_in_f32() {
    for (low, u) in [(Precision::f16(), U_F16), (Precision::bf16(), U_BF16)] {
        let hyper = cost_of_native(|vb| HyperCnf::new(2, 16, 8, vb), 1, low);
        let potential = cost_of_native(|vb| OtFlow::new(2, 8, 2, vb), 3, low);
        for errors in [hyper, potential] {
            assert!(worst(errors) <= 32.0 * u, "{errors:?}");
        }
    }
}

/// Solves a field of (z, costs) with fusion or without: states, gradients of y0, and of the parameters.
fn solved<F, B>(
    build: B,
    columns: usize,
    rows: usize,
    times: &[f64],
    options: OdeOptions,
) -> candle_diffeq::Result<Vec<Tensor>>
where
    F: VectorField<(Tensor, Tensor)> + Send + Sync + 'static,
    B: Fn(VarBuilder<'_>) -> Result<F> + Send + Sync + Copy + 'static,
{
    let vars = VarMap::new();
    let ode = NeuralOde::from_field(&vars, "f", DType::F32, &Device::Cpu, build)?;
    scatter(&vars);
    let f32 = |x: Tensor| x.to_dtype(DType::F32);
    let z0 = Var::from_tensor(&f32(scattered(&[rows, 2], 1.0, 1))?)?;
    let l0 = Var::from_tensor(&f32(zeros(rows, columns))?)?;
    let y0 = (z0.as_tensor().clone(), l0.as_tensor().clone());
    let (z, l) = ode.options(options).solve(&y0, times)?;
    // Of one sign, lest gradients cancel.
    let weighted =
        |x: &Tensor, seed| (f32((scattered(x.dims(), 0.5, seed) + 1.0)?)? * x)?.sum_all();
    let loss = (weighted(&z, 7)? + weighted(&l, 9)?)?;
    let grads = loss.backward()?;
    let variables = all(&vars).into_iter().map(|(_, var)| var);
    let of = |var: Var| grads.get(&var).unwrap().clone();
    let gradients = [z0, l0].into_iter().chain(variables).map(of);
    Ok([z, l].into_iter().chain(gradients).collect())
}

#[test]
fn tiles_round_where_the_general_path_rounds() {
    let check = |of: &dyn Fn(OdeOptions) -> candle_diffeq::Result<Vec<Tensor>>| {
        for (low, u) in [(Precision::bf16(), U_BF16), (Precision::f16(), U_F16)] {
            let [general, tiles] = [false, true].map(|fusion| {
                of(OdeOptions {
                    fusion,
                    leaf_precision: vec![low, Precision::f32()],
                    ..Default::default()
                })
                .unwrap()
            });
            // Where a roundoff of f32 moves a number over the middle between two of low precision, it is rounded the
            // other way.
            let errors = tiles.iter().zip(&general).map(|(x, y)| relative(x, y));
            assert!(worst(errors) <= u, "{low:?}");
        }
    };
    let times = [0.0, 0.25, 0.5];
    check(&|options| solved(|vb| HyperCnf::new(2, 20, 9, vb), 1, 37, &times, options));
    check(&|options| solved(|vb| OtFlow::new(2, 19, 3, vb), 3, 37, &times, options));
}

/// Solves a flow from (z, l, …) over two intervals: z and l, and gradients of both starts and of the parameters by name.
fn answers<S, F, B>(build: B, y0: &[Tensor], options: OdeOptions) -> Vec<Tensor>
where
    S: State + 'static,
    F: VectorField<S> + Send + Sync + 'static,
    B: Fn(VarBuilder<'_>) -> Result<F> + Send + Sync + 'static,
{
    let vars = VarMap::new();
    let ode = NeuralOde::from_field(&vars, "f", y0[0].dtype(), &Device::Cpu, build);
    scatter(&vars);
    let starts = [0, 1].map(|i| Var::from_tensor(&y0[i]).unwrap());
    let leaves = starts.iter().map(|x| x.as_tensor().clone());
    let start = S::from_leaves(leaves.chain(y0[2..].iter().cloned()).collect()).unwrap();
    let solved = ode
        .unwrap()
        .options(options)
        .solve(&start, &[0.0, 0.25, 0.5]);
    let states = solved.unwrap().leaves();
    let weighted = |(i, x): (usize, &Tensor)| {
        // Of one sign, lest gradients cancel, and the same for all rows.
        let weights = (scattered(&x.dims()[2..], 0.5, 7 + i) + 1.0)?.to_dtype(x.dtype())?;
        x.broadcast_mul(&weights)?.sum_all()
    };
    let [of_z, of_l] = [0, 1].map(|i| weighted((i, &states[i])).unwrap());
    let grads = (of_z + of_l).and_then(|loss| loss.backward()).unwrap();
    let variables = all(&vars).into_iter().map(|(_, var)| var);
    let of = |var: Var| grads.get(&var).unwrap().clone();
    let gradients = starts.into_iter().chain(variables).map(of);
    states[..2].iter().cloned().chain(gradients).collect()
}

/// The same of a perceptron with an estimated trace.
fn estimated<B>(build: B, y0: [&Tensor; 2], dtype: DType, options: OdeOptions) -> Vec<Tensor>
where
    B: Fn(VarBuilder<'_>) -> Result<Mlp> + Send + Sync + 'static,
{
    let [z, probe] = y0;
    let y0 = [z, &zeros(z.dim(0).unwrap(), 1), probe].map(|x| x.to_dtype(dtype).unwrap());
    let build = move |vb: VarBuilder<'_>| Ok(Hutchinson::new(build(vb)?));
    answers::<(Tensor, Tensor, Tensor), _, _>(build, &y0, options)
}

#[test]
fn tiles_of_an_estimated_trace_round_where_the_general_path_rounds() {
    for activation in Activation::ALL {
        // A roundoff may move a unit of relu over its kink.
        if activation == Activation::Relu {
            continue;
        }
        let build = move |vb: VarBuilder<'_>| Mlp::with_time(&[3, 20, 9, 3], activation, vb);
        let z = scattered(&[37, 3], 1.0, 1);
        let probe = Probe::Rademacher.sample(&z, 5).unwrap();
        for (low, u) in [(Precision::bf16(), U_BF16), (Precision::f16(), U_F16)] {
            let [general, tiles] = [false, true].map(|fusion| {
                let options = OdeOptions {
                    fusion,
                    leaf_precision: vec![low, Precision::f32(), low],
                    ..Default::default()
                };
                estimated(build, [&z, &probe], DType::F32, options)
            });
            // Where a roundoff of f32 moves a number over the middle between two of low precision, it is rounded the
            // other way.
            let errors = tiles.iter().zip(&general).map(|(x, y)| relative(x, y));
            let errors: Vec<_> = errors.collect();
            assert!(
                worst(errors.clone()) <= u,
                "{activation:?} {low:?} {errors:?}"
            );
        }
    }
}

#[test]
fn an_estimated_trace_has_the_same_bits_with_any_number_of_threads() {
    let z = scattered(&[203, 3], 1.0, 1);
    let probe = Probe::Gaussian.sample(&z, 5).unwrap();
    for dtype in [DType::F32, DType::F64] {
        let [one, seven] = [1, 7].map(|threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build();
            let build = |vb: VarBuilder<'_>| Mlp::new(&[3, 20, 20, 3], Activation::Silu, vb);
            let solve = || estimated(build, [&z, &probe], dtype, OdeOptions::default());
            pool.unwrap().install(solve)
        });
        for (x, y) in one.iter().zip(&seven) {
            assert_eq!(bits(x), bits(y), "{dtype:?}");
        }
    }
}

#[test]
fn the_mean_of_solves_over_all_rademacher_probes_is_that_of_the_exact_trace() {
    // z does not depend on the probe, and l is linear in the trace, so that means of solutions and of gradients are
    // those of the exact trace.
    const FEATURES: usize = 3;
    let z = scattered(&[5, FEATURES], 1.0, 1);
    let probes = 1u32 << FEATURES;
    let sign = |i: usize| {
        let (signs, feature) = (i / (5 * FEATURES), i % FEATURES);
        if signs >> feature & 1 == 1 {
            1.0
        } else {
            -1.0
        }
    };
    let shape = (probes as usize * 5, FEATURES);
    let probe = Tensor::from_iter((0..shape.0 * shape.1).map(sign), &Device::Cpu);
    let probe = probe.and_then(|p| p.reshape(shape)).unwrap();
    let repeated = Tensor::cat(&vec![&z; probes as usize], 0).unwrap();
    // That of one hidden layer takes another form of the exact trace than those of more.
    for hidden in [&[9][..], &[9, 8], &[9, 8, 7]] {
        for activation in Activation::ALL {
            let widths = [&[FEATURES], hidden, &[FEATURES]].concat();
            let build = move |vb: VarBuilder<'_>| Mlp::with_time(&widths, activation, vb);
            let options = OdeOptions {
                method: DOPRI5,
                ..Default::default()
            };
            let cnf = {
                let build = build.clone();
                move |vb: VarBuilder<'_>| Cnf::new(build(vb)?)
            };
            let general = OdeOptions {
                fusion: false,
                ..options.clone()
            };
            let y0 = [z.clone(), zeros(5, 1)];
            let exact = answers::<(Tensor, Tensor), _, _>(cnf, &y0, general);
            let tiles = estimated(build, [&repeated, &probe], DType::F64, options);
            let mean = |x: &Tensor, rows: usize| {
                let rest = &x.dims()[rows + 1..];
                let shape = [&x.dims()[..rows], &[probes as usize, 5], rest].concat();
                x.reshape(shape)?.mean(rows)
            };
            let of_rows = [mean(&tiles[0], 1), mean(&tiles[1], 1), mean(&tiles[2], 0)];
            let of_l0 = mean(&tiles[3], 0);
            let of_weights = tiles[4..].iter().map(|g| g / f64::from(probes));
            let got = of_rows.into_iter().chain([of_l0]).chain(of_weights);
            for (i, (got, exact)) in got.zip(&exact).enumerate() {
                let error = relative(&got.unwrap(), exact);
                // The estimates are up to `FEATURES` times as large as what is left of them.
                assert!(
                    error <= 4096.0 * U_F64,
                    "{hidden:?} {activation:?} {i}: {error:e}"
                );
            }
        }
    }
}

#[test]
fn weights_of_very_many_times_are_computed_when_they_are_needed() {
    // More times than are listed before the first step, and the same in two solves of fewer.
    let steps = 70_000;
    let solve = |times: &[f64], steps, y0: &(Tensor, Tensor)| {
        let vars = VarMap::new();
        let ode = NeuralOde::from_field(&vars, "f", DType::F32, &Device::Cpu, |vb| {
            HyperCnf::new(2, 5, 3, vb)
        });
        scatter(&vars);
        let options = OdeOptions {
            method: EULER,
            steps: Steps::PerInterval(steps),
            output: Output::Final,
            ..Default::default()
        };
        ode.unwrap().options(options).predict(y0, times).unwrap()
    };
    let f32 = |x: Tensor| x.to_dtype(DType::F32).unwrap();
    let y0 = (f32(scattered(&[3, 2], 1.0, 1)), f32(zeros(3, 1)));
    let whole = solve(&[0.0, 1.0], steps, &y0);
    let half = solve(&[0.0, 0.5], steps / 2, &y0);
    let parts = solve(&[0.5, 1.0], steps / 2, &half);
    for (x, y) in [(&whole.0, &parts.0), (&whole.1, &parts.1)] {
        let error = relative(x, y);
        assert!(error <= 16.0 * U_F32, "{error:e}");
    }
}

#[test]
fn rows_that_share_the_weights_of_a_time_have_no_steps_of_their_own() {
    let build = |vb: VarBuilder<'_>| HyperCnf::new(2, 6, 4, vb);
    let solve = |control: Option<StepControl>, fusion| {
        let adaptive = Adaptive::new(1e-4, 1e-6);
        let recorder = Recorder::default();
        let options = OdeOptions {
            method: DOPRI5,
            steps: Steps::Adaptive(match control {
                Some(control) => adaptive.control(control),
                None => adaptive,
            }),
            recorder: Some(recorder.clone()),
            fusion,
            ..Default::default()
        };
        let answers = solved(build, 1, 20, &[0.0, 0.4], options)?;
        Ok::<_, Error>((answers, recorder.take()))
    };
    let refused = solve(Some(StepControl::Rows), true).unwrap_err();
    let own = AdaptiveDefect::NoRows { row_wise: false };
    assert!(matches!(refused, Error::Adaptive(defect) if defect == own));
    let [(tiles, stats), (general, _)] = [true, false].map(|on| solve(None, on).unwrap());
    assert_eq!(stats.row_evaluations, 0);
    for (x, y) in tiles.iter().zip(&general) {
        assert_eq!(values(x), values(y));
    }
}

#[test]
fn a_probe_stays_what_it_is_and_has_no_gradient() {
    let vars = VarMap::new();
    let flow = NeuralOde::from_field(&vars, "f", DType::F64, &Device::Cpu, |vb| {
        let mlp = Mlp::new(&[3, 8, 3], Activation::Tanh, vb)?;
        Ok(Hutchinson::new(mlp))
    });
    let flow = flow.unwrap();
    scatter(&vars);
    let z = common::var(&[5, 3], 1.0, 1);
    for probe in [Probe::Rademacher, Probe::Gaussian] {
        let probe = Var::from_tensor(&probe.sample(&z, 7).unwrap()).unwrap();
        let y0 = (
            z.as_tensor().clone(),
            zeros(5, 1),
            probe.as_tensor().clone(),
        );
        let (zs, ls, probes) = flow.solve(&y0, &[0.0, 0.5, 1.0]).unwrap();
        assert_eq!(values(&probes.get(2).unwrap()), values(&probe));
        let loss = (zs.sum_all().unwrap() + ls.sum_all().unwrap()).unwrap();
        let grads = loss.backward().unwrap();
        assert_eq!(worst(values(grads.get(&probe).unwrap())), 0.0);
        assert!(all(&vars)
            .iter()
            .all(|(_, v)| worst(values(grads.get(v).unwrap())) > 0.0));
    }
}

#[test]
fn probes_have_mean_zero_and_covariance_one() {
    let like = zeros(40_000, 2);
    for probe in [Probe::Rademacher, Probe::Gaussian] {
        let x = probe.sample(&like, 3).unwrap();
        assert_eq!(values(&x), values(&probe.sample(&like, 3).unwrap()));
        let mean = x.mean(0).unwrap();
        let covariance = x
            .t()
            .unwrap()
            .matmul(&x)
            .and_then(|c| c / 40_000.0)
            .unwrap();
        let exact = Tensor::eye(2, DType::F64, &Device::Cpu).unwrap();
        // Five standard deviations of the mean of as many.
        assert!(worst(values(&mean)) <= 5.0 / 200.0);
        let error = worst(values(&(covariance - exact).unwrap()));
        assert!(error <= 5.0 * 2f64.sqrt() / 200.0, "{error}");
    }
}

#[test]
fn states_of_other_shapes_are_refused() {
    let (_, hyper) = hyper(2, 4, 3);
    let (_, potential) = ot_flow(2, 4, 2);
    for (z, l) in [([3, 3], [3, 1]), ([3, 2], [3, 2]), ([3, 2], [2, 1])] {
        let y = (scattered(&z, 1.0, 1), scattered(&l, 1.0, 2));
        let error = hyper.velocity(&at(0.0), &y).unwrap_err().to_string();
        assert!(error.contains("HyperCnf of 2 features"), "{error}");
        assert!(hyper.vjp(&at(0.0), &y).is_err());
        let y = (y.0.clone(), y.1, y.0);
        let flow = Hutchinson::new(|_: &Time, z: &Tensor, e: &Tensor| Ok((z.clone(), e.clone())));
        assert!(l == [3, 1] || flow.velocity(&at(0.0), &y).is_err());
    }
    for (x, costs) in [([3, 3], [3, 3]), ([3, 2], [3, 1]), ([3, 2], [2, 3])] {
        let y = (scattered(&x, 1.0, 1), scattered(&costs, 1.0, 2));
        let error = potential.velocity(&at(0.0), &y).unwrap_err().to_string();
        assert!(error.contains("OtFlow"), "{error}");
        assert!(potential.vjp(&at(0.0), &y).is_err());
    }
    let (_, vb) = map();
    assert!(HyperCnf::new(2, 0, 3, vb.clone()).is_err());
    assert!(OtFlow::new(0, 4, 2, vb).is_err());
}

#[test]
fn the_discrepancy_is_its_formula() {
    let (x, y) = (scattered(&[7, 3], 1.0, 1), scattered(&[5, 3], 1.5, 2));
    let rows = |x: &Tensor| x.to_vec2::<f64>().unwrap();
    let kernel = |x: &[f64], y: &[f64]| {
        let squares = x.iter().zip(y).map(|(x, y)| (x - y) * (x - y));
        (-squares.sum::<f64>() / (2.0 * 0.81)).exp()
    };
    let pairs = |x: &[Vec<f64>], y: &[Vec<f64>], same: bool| {
        let (mut sum, mut count) = (0.0, 0.0);
        for (i, x) in x.iter().enumerate() {
            for (j, y) in y.iter().enumerate() {
                if !same || i != j {
                    sum += kernel(x, y);
                    count += 1.0;
                }
            }
        }
        sum / count
    };
    let (a, b) = (rows(&x), rows(&y));
    let exact = pairs(&a, &a, true) + pairs(&b, &b, true) - 2.0 * pairs(&a, &b, false);
    let got = mmd(&x, &y, 0.9).unwrap();
    assert!((got - exact).abs() <= 64.0 * U_F64, "{got} {exact}");
    // In blocks of rows it is the same.
    let long = scattered(&[2100, 2], 2.0, 4);
    let [first, second] = [0, 1000].map(|from| long.narrow(0, from, 1100).unwrap());
    let (there, back) = (mmd(&first, &second, 1.0), mmd(&second, &first, 1.0));
    // Sums of a million numbers up to one.
    assert!((there.unwrap() - back.unwrap()).abs() <= 4096.0 * U_F64);
}

#[test]
fn samples_of_one_density_are_alike_and_those_of_two_are_not() {
    let sample = |d: Density, seed| d.sample(600, seed, &Device::Cpu).unwrap();
    let sigma = 0.5f64.sqrt();
    for (i, a) in Density::ALL.into_iter().enumerate() {
        assert_eq!(values(&sample(a, 1)), values(&sample(a, 1)));
        assert_ne!(values(&sample(a, 1)), values(&sample(a, 2)));
        let same = mmd(&sample(a, 1), &sample(a, 2), sigma).unwrap();
        assert!(same.abs() <= 0.003, "{a}: {same}");
        for b in &Density::ALL[..i] {
            let apart = mmd(&sample(a, 1), &sample(*b, 2), sigma).unwrap();
            assert!(apart >= 0.004, "{a}, {b}: {apart}");
        }
    }
}

#[test]
fn densities_are_where_they_should_be() {
    let points = |d: Density| {
        d.sample(2000, 5, &Device::Cpu)
            .unwrap()
            .to_vec2::<f32>()
            .unwrap()
    };
    for d in Density::ALL {
        let far = points(d).iter().flatten().fold(0f32, |m, x| m.max(x.abs()));
        assert!((2.0..5.0).contains(&far), "{d}: {far}");
    }
    for p in points(Density::Checkerboard) {
        let square = (p[0] / 2.0).floor() + (p[1] / 2.0).floor();
        assert_eq!(square.rem_euclid(2.0), 0.0, "{p:?}");
    }
    // Of a component, on average: how far from its centre, or from 0.
    let mean = |of: Vec<f32>| of.iter().sum::<f32>() / of.len() as f32;
    let deviation = points(Density::EightGaussians).into_iter().map(|p| {
        let turn =
            (p[1].atan2(p[0]) / std::f32::consts::FRAC_PI_4).round() * std::f32::consts::FRAC_PI_4;
        let (s, c) = turn.sin_cos();
        let r = 8f32.sqrt();
        (p[0] - r * c).powi(2) + (p[1] - r * s).powi(2)
    });
    let variance = mean(deviation.collect()) / 2.0;
    assert!((variance - 0.125).abs() < 0.01, "{variance}");
    let radii = points(Density::Rings)
        .iter()
        .map(|p| p[0].hypot(p[1]))
        .collect();
    assert!((mean(radii) - 1.875).abs() < 0.1);
    let unknown = "9gaussians".parse::<Density>().unwrap_err();
    assert!(
        unknown.to_string().contains("8gaussians, 2spirals"),
        "{unknown}"
    );
}

#[test]
fn a_discrepancy_does_not_depend_on_where_the_samples_are() {
    let (x, y) = (scattered(&[40, 2], 1.0, 1), scattered(&[50, 2], 1.0, 2));
    let expected = mmd(&x, &y, 0.7).unwrap();
    for offset in [1e6, 1.7e9] {
        let [x, y] = [&x, &y].map(|s| (s + offset).unwrap());
        let got = mmd(&x, &y, 0.7).unwrap();
        // The samples themselves have lost what the offset has taken.
        let lost = offset * U_F64;
        assert!((got - expected).abs() <= 16.0 * lost, "{got} {expected}");
    }
    // Nor on how far they are from each other, once nothing is left of the kernel between them.
    let apart = |offset: f64| mmd(&x, &(&y + offset).unwrap(), 0.7).unwrap();
    let expected = apart(1e3);
    for offset in [1e6, 1e9] {
        let lost = offset * U_F64;
        assert!((apart(offset) - expected).abs() <= 16.0 * lost, "{offset}");
    }
    assert!(apart(1e200).is_finite());
    // A lost row is far from all but itself, and the others are as far from each other as before.
    let far = mmd(
        &Tensor::cat(
            &[&x, &Tensor::new(&[[1e4, -3e3]], &Device::Cpu).unwrap()],
            0,
        )
        .unwrap(),
        &y,
        0.7,
    );
    let far = far.unwrap();
    for seed in 0..200 {
        let lost = (scattered(&[1, 2], 1e9, 7 + seed) + 2e9).unwrap();
        let got = mmd(&Tensor::cat(&[&x, &lost], 0).unwrap(), &y, 0.7).unwrap();
        assert!((got - far).abs() <= 64.0 * U_F64, "{got} {far}");
    }
}
