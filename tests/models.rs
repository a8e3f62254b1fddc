//! Graph convolutions, recurrent models between observations, multiple shooting and hypersolvers: against dense products,
//! plain loops, and what theory says of them.
//!
//! `cargo test --test models`, seconds.

mod common;

use candle_core::backprop::GradStore;
use candle_core::{DType, Device, Module, Tensor, Var};
use candle_diffeq::fields::{check_field, FieldCheck, PiecewiseConstant};
use candle_diffeq::models::hypersolver::{residuals, Hypersolver};
use candle_diffeq::models::recurrent::{
    Cell, GruCell, GruOdeBayes, Hidden, LatentOde, LstmCell, OdeRnn, Order, RnnCell, Sporadic,
};
use candle_diffeq::models::shooting::Shooting;
use candle_diffeq::nn::graph::{Csr, Gcn, GcnField};
use candle_diffeq::nn::{dropout_mask, Activation, GruField, Linear, Mlp, RowSpeed};
use candle_diffeq::options::{Output, Steps, TimeGrid};
use candle_diffeq::tableau::{EULER, MIDPOINT, RK4};
use candle_diffeq::{odeint, predict, NeuralOde, OdeOptions, Precision, Time, VectorField};
use candle_nn::{VarBuilder, VarMap};
use common::{all, error_of, fill, relative, scattered, values, var, U_BF16, U_F16, U_F32, U_F64};

fn cpu() -> Device {
    Device::Cpu
}

/// max |x − y|.
fn apart(x: &Tensor, y: &Tensor) -> f64 {
    assert_eq!(x.dims(), y.dims());
    let pairs = values(x).into_iter().zip(values(y));
    pairs.map(|(x, y)| (x - y).abs()).fold(0.0, f64::max)
}

/// A sparse matrix with some empty rows and columns, and the same dense.
fn sparse(rows: usize, columns: usize) -> (Csr, Tensor) {
    let (mut offsets, mut across) = (vec![0], vec![]);
    let mut dense = vec![0.0; rows * columns];
    for i in 0..rows {
        for j in 0..columns {
            if i % 5 != 3 && j % 7 != 2 && (i * 31 + j * 17) % 11 < 3 {
                across.push(j as u32);
                dense[i * columns + j] = ((i * 7 + j * 3 + 1) as f64).sin();
            }
        }
        offsets.push(across.len());
    }
    let values: Vec<f64> = dense.iter().copied().filter(|x| *x != 0.0).collect();
    assert_eq!(values.len(), across.len());
    let entries = values.len();
    let values = Tensor::from_vec(values, entries, &cpu()).unwrap();
    let csr = Csr::new(offsets, across, columns, values).unwrap();
    (
        csr,
        Tensor::from_vec(dense, (rows, columns), &cpu()).unwrap(),
    )
}

#[test]
fn a_sparse_product_and_its_pull_backs_are_those_of_the_dense_matrix() {
    // Widths of whole blocks, of none, and of a block and a rest; work for one thread and for several.
    for (rows, columns, width) in [(13, 9, 5), (40, 60, 32), (700, 500, 71), (3, 4, 1)] {
        let (csr, dense) = sparse(rows, columns);
        let entries = Var::from_tensor(csr.values()).unwrap();
        let csr = csr.with_values(entries.as_tensor().clone()).unwrap();
        let (x, dense) = (
            var(&[columns, width], 1.0, 1),
            Var::from_tensor(&dense).unwrap(),
        );
        let g = scattered(&[rows, width], 1.0, 2);
        let (y, exact) = (csr.matmul(&x).unwrap(), dense.matmul(&x).unwrap());
        let terms = (rows.max(columns).max(width) + 2) as f64;
        let close = |got: &Tensor, exact: &Tensor| {
            let size = values(exact)
                .into_iter()
                .fold(1.0, |a: f64, b| a.max(b.abs()));
            let error = apart(got, exact);
            assert!(
                error <= 4.0 * terms * U_F64 * size,
                "{rows} x {columns}: {error:e}"
            );
        };
        close(&y, &exact);
        let grads = (y * &g).unwrap().sum_all().unwrap().backward().unwrap();
        let known = (exact * &g).unwrap().sum_all().unwrap().backward().unwrap();
        close(grads.get(&x).unwrap(), known.get(&x).unwrap());
        let of_dense = known.get(&dense).unwrap().flatten_all().unwrap();
        let places = values(&dense).into_iter().zip(values(&of_dense));
        let known: Vec<f64> = places.filter(|(a, _)| *a != 0.0).map(|(_, g)| g).collect();
        close(
            grads.get(&entries).unwrap(),
            &Tensor::new(known.as_slice(), &cpu()).unwrap(),
        );
    }
}

#[test]
fn sums_of_a_sparse_product_do_not_depend_on_the_number_of_threads() {
    let (csr, _) = sparse(700, 500);
    let x = scattered(&[500, 71], 1.0, 1).to_dtype(DType::F32).unwrap();
    let on = |threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .build()
            .unwrap();
        values(&pool.install(|| csr.matmul(&x)).unwrap())
    };
    assert_eq!(on(1), on(3));
}

#[test]
fn narrow_numbers_are_summed_in_f32() {
    // 4096 ones are 256 where bf16 is summed in bf16.
    let ones = Tensor::ones(4096, DType::F32, &cpu()).unwrap();
    let row = Csr::new(vec![0, 4096], (0..4096).collect(), 4096, ones).unwrap();
    let x = Tensor::ones((4096, 2), DType::BF16, &cpu()).unwrap();
    let y = row.matmul(&x).unwrap();
    assert_eq!((y.dtype(), values(&y)), (DType::BF16, vec![4096.0; 2]));
}

#[test]
fn a_matrix_that_is_none_and_a_product_that_does_not_fit_are_errors() {
    let two = || Tensor::new(&[1.0, 2.0], &cpu()).unwrap();
    assert!(Csr::new(vec![0, 2, 1], vec![0, 1], 2, two()).is_err());
    assert!(Csr::new(vec![0, 1, 2], vec![0, 2], 2, two()).is_err());
    assert!(Csr::new(
        vec![0, 1, 2],
        vec![0, 1],
        2,
        Tensor::new(&[1.0], &cpu()).unwrap()
    )
    .is_err());
    assert!(Csr::normalised_adjacency(2, &[[0, 2]], DType::F32, &cpu()).is_err());
    let (csr, _) = sparse(4, 6);
    let error = csr
        .matmul(&scattered(&[5, 2], 1.0, 1))
        .unwrap_err()
        .to_string();
    assert!(error.contains("(6, features)"), "{error}");
    assert!(dropout_mask(3, 1.0, 0, DType::F32, &cpu()).is_err());
    // Of no columns and of no rows there are empty products.
    assert_eq!(
        csr.matmul(&scattered(&[6, 0], 1.0, 1)).unwrap().dims(),
        [4, 0]
    );
}

#[test]
fn a_graph_convolution_averages_a_constant_over_a_regular_graph_to_itself() {
    // Of a ring every node has two neighbours: the rows of D^−½ (A + I) D^−½ add up to one.
    let edges: Vec<[u32; 2]> = (0..6).map(|i| [i, (i + 1) % 6]).collect();
    let ring = Csr::normalised_adjacency(6, &edges, DType::F64, &cpu()).unwrap();
    let (weight, bias) = (scattered(&[3, 2], 1.0, 1), scattered(&[3], 1.0, 2));
    let layer = Gcn::from_tensors(&ring, weight.clone(), bias.clone()).unwrap();
    let row = scattered(&[1, 2], 1.0, 3);
    let y = layer.forward(&row.repeat((6, 1)).unwrap()).unwrap();
    let one = row
        .matmul(&weight.t().unwrap())
        .unwrap()
        .broadcast_add(&bias)
        .unwrap();
    assert!(apart(&y, &one.repeat((6, 1)).unwrap()) <= 16.0 * U_F64);
}

/// The equations of [`GruField`] in candle's operations.
fn plain_gru(w: [Tensor; 6]) -> impl Fn(&Time, &Tensor) -> candle_core::Result<Tensor> {
    move |_: &Time, h: &Tensor| {
        let layer = |x: &Tensor, i: usize| x.matmul(&w[i].t()?)?.broadcast_add(&w[i + 1]);
        let r = candle_nn::ops::sigmoid(&layer(h, 0)?)?;
        let z = candle_nn::ops::sigmoid(&layer(h, 2)?)?;
        let u = layer(&(r * h)?, 4)?.tanh()?;
        (1.0 - z)? * (u - h)?
    }
}

#[test]
fn the_pull_back_of_the_gru_field_is_that_of_autograd() {
    let w: Vec<Var> = (0..6)
        .map(|i| var(if i % 2 == 0 { &[4, 4] } else { &[4] }, 0.8, i))
        .collect();
    let tensor = |i: usize| w[i].as_tensor().clone();
    let layer = |i: usize| Linear::from(candle_nn::Linear::new(tensor(i), Some(tensor(i + 1))));
    let ours = GruField::of([layer(0), layer(2), layer(4)]).unwrap();
    let plain = plain_gru(std::array::from_fn(tensor));
    let (h, v) = (scattered(&[7, 4], 0.9, 7), scattered(&[7, 4], 1.0, 8));
    let t = Time::new(0.0, DType::F64, &cpu());
    let (k, pull) = ours.vjp(&t, &h).unwrap();
    let (exact, pull_plain) = plain.vjp(&t, &h).unwrap();
    let (got, known) = (pull(&v).unwrap(), pull_plain(&v).unwrap());
    assert!(apart(&k, &exact) <= 64.0 * U_F64);
    assert!(apart(&got.y, &known.y) <= 64.0 * U_F64);
    for w in &w {
        let error = apart(got.params.get(w).unwrap(), known.params.get(w).unwrap());
        assert!(error <= 256.0 * U_F64, "{error:e}");
    }
    check_field(&ours, 0.0, &h).unwrap();
}

#[test]
fn a_gru_field_keeps_its_state_between_minus_one_and_one() {
    let vars = VarMap::new();
    let ode =
        NeuralOde::from_field(&vars, "f", DType::F64, &cpu(), |vb| GruField::new(6, vb)).unwrap();
    fill(&vars);
    let h0 = scattered(&[20, 6], 0.999, 1);
    let times: Vec<f64> = (0..40).map(f64::from).collect();
    let steps = Steps::PerInterval(10);
    let ode = ode.options(OdeOptions {
        steps,
        ..Default::default()
    });
    let hs = ode.predict(&h0, &times).unwrap();
    assert!(values(&hs).into_iter().all(|h| h.abs() < 1.0));
}

type Flow = NeuralOde<(Tensor, Tensor)>;

/// A neural ODE at the speed of each row, and its field alone.
fn flow(vars: &VarMap, hidden: usize) -> (Flow, NeuralOde) {
    let build = move |vb: VarBuilder<'_>| Mlp::new(&[hidden, 9, hidden], Activation::Tanh, vb);
    let rows = NeuralOde::from_field(vars, "f", DType::F64, &cpu(), move |vb| {
        build(vb).map(RowSpeed::new)
    });
    let alone = NeuralOde::from_field(vars, "f", DType::F64, &cpu(), build).unwrap();
    let options = OdeOptions {
        steps: Steps::PerInterval(20),
        output: Output::Final,
        ..Default::default()
    };
    (
        rows.unwrap().options(options.clone()),
        alone.options(options),
    )
}

fn vb(vars: &VarMap) -> VarBuilder<'static> {
    VarBuilder::from_varmap(vars, DType::F64, &cpu())
}

/// Observations of two features at four times of five rows, with gaps of their own, some of them zero.
fn observations() -> (Tensor, Tensor) {
    let gaps: Vec<f64> = (0..20).map(|i| f64::from(i * 7 % 5) * 0.4).collect();
    (
        scattered(&[5, 4, 2], 1.0, 1),
        Tensor::from_vec(gaps, (5, 4), &cpu()).unwrap(),
    )
}

fn rows_are_solved_over_their_own_gaps<C: Cell>(
    cell: impl Fn(VarBuilder<'static>) -> candle_core::Result<C>,
    order: Order,
) {
    let vars = VarMap::new();
    let (rows, alone) = flow(&vars, 3);
    let own = cell(vb(&vars).pp("cell")).unwrap();
    let model = OdeRnn::new(rows, cell(vb(&vars).pp("cell")).unwrap()).order(order);
    fill(&vars);
    let (x, gaps) = observations();
    let hs = model.forward(&x, &gaps, None).unwrap();
    for row in 0..5 {
        let mut hidden = own.start(1, DType::F64, &cpu()).unwrap();
        let all = values(&gaps.get(row).unwrap());
        for (i, gap) in all.into_iter().enumerate() {
            let solved = |h: &Tensor| match gap {
                0.0 => h.clone(),
                gap => alone.predict(h, &[0.0, gap]).unwrap(),
            };
            if order == Order::FlowFirst {
                hidden.h = solved(&hidden.h);
            }
            let x = x.get(row).unwrap().narrow(0, i, 1).unwrap();
            hidden = own.update(&x, &hidden).unwrap();
            if order == Order::CellFirst {
                hidden.h = solved(&hidden.h);
            }
            let got = hs.get(row).unwrap().narrow(0, i, 1).unwrap();
            assert!(apart(&got, &hidden.h) <= 1e4 * U_F64);
        }
    }
}

#[test]
fn every_row_of_a_recurrent_model_flows_over_gaps_of_its_own() {
    rows_are_solved_over_their_own_gaps(|vb| RnnCell::new(2, 3, vb), Order::FlowFirst);
    rows_are_solved_over_their_own_gaps(|vb| GruCell::new(2, 3, vb), Order::FlowFirst);
    rows_are_solved_over_their_own_gaps(|vb| LstmCell::new(2, 3, vb), Order::CellFirst);
}

#[test]
fn the_cells_are_the_textbooks() {
    let vars = VarMap::new();
    let (gru, lstm) = (
        GruCell::new(2, 3, vb(&vars).pp("g")),
        LstmCell::new(2, 3, vb(&vars).pp("l")),
    );
    fill(&vars);
    let (x, h, c) = (
        scattered(&[4, 2], 1.0, 1),
        scattered(&[4, 3], 0.9, 2),
        scattered(&[4, 3], 0.9, 3),
    );
    let data = vars.data().lock().unwrap();
    let layer = |cell: &str, of: &str, x: &Tensor| {
        let get = |part: &str| data[&format!("{cell}.{of}.{part}")].as_tensor().clone();
        x.matmul(&get("weight").t().unwrap())
            .unwrap()
            .broadcast_add(&get("bias"))
            .unwrap()
    };
    let part = |x: &Tensor, i: usize| x.narrow(1, 3 * i, 3).unwrap();
    let sigmoid = |x: &Tensor| candle_nn::ops::sigmoid(x).unwrap();
    let (a, b) = (layer("g", "x", &x), layer("g", "h", &h));
    let r = sigmoid(&(part(&a, 0) + part(&b, 0)).unwrap());
    let z = sigmoid(&(part(&a, 1) + part(&b, 1)).unwrap());
    let n = (part(&a, 2) + (r * part(&b, 2)).unwrap())
        .unwrap()
        .tanh()
        .unwrap();
    let known = ((1.0 - &z).unwrap() * n).unwrap() + (z * &h).unwrap();
    let before = Hidden {
        h: h.clone(),
        still: None,
    };
    let got = gru.unwrap().update(&x, &before).unwrap();
    assert!(apart(&got.h, &known.unwrap()) <= 32.0 * U_F64);
    let all = (layer("l", "x", &x) + layer("l", "h", &h)).unwrap();
    let forget = sigmoid(&(part(&all, 1) + 1.0).unwrap());
    let new = (sigmoid(&part(&all, 0)) * part(&all, 2).tanh().unwrap()).unwrap();
    let memory = ((forget * &c).unwrap() + new).unwrap();
    let known = (sigmoid(&part(&all, 3)) * memory.tanh().unwrap()).unwrap();
    let got = lstm
        .unwrap()
        .update(&x, &Hidden { h, still: Some(c) })
        .unwrap();
    assert!(apart(&got.h, &known) <= 32.0 * U_F64);
    assert!(apart(got.still.as_ref().unwrap(), &memory) <= 32.0 * U_F64);
}

#[test]
fn rows_without_an_observation_flow_on_and_negative_gaps_are_errors() {
    let vars = VarMap::new();
    let (rows, alone) = flow(&vars, 3);
    let model = OdeRnn::new(rows, GruCell::new(2, 3, vb(&vars).pp("cell")).unwrap());
    fill(&vars);
    let x = scattered(&[2, 2, 2], 1.0, 1);
    let gaps = Tensor::new(&[[0.0, 0.7], [0.0, 0.7]], &cpu()).unwrap();
    let seen = Tensor::new(&[[1.0, 0.0], [1.0, 1.0]], &cpu()).unwrap();
    let hs = model.forward(&x, &gaps, Some(&seen)).unwrap();
    let first = hs.narrow(0, 0, 1).unwrap();
    let at = |i: usize| first.narrow(1, i, 1).unwrap().squeeze(1).unwrap();
    let flown = alone.predict(&at(0), &[0.0, 0.7]).unwrap();
    assert!(apart(&at(1), &flown) <= 1e4 * U_F64);
    // What was not observed has no influence, not even as NaN, and none on gradients.
    let gone = f64::NAN;
    let mut numbers = values(&x);
    numbers[2..4].copy_from_slice(&[gone, gone]);
    let x = Tensor::from_vec(numbers, (2, 2, 2), &cpu()).unwrap();
    let missing = model.forward(&x, &gaps, Some(&seen)).unwrap();
    assert_eq!(values(&missing), values(&hs));
    let [grads, known] = [missing, hs].map(|hs| hs.sum_all().unwrap().backward().unwrap());
    for var in vars.all_vars() {
        let of = |grads: &GradStore| grads.get(&var).map(values);
        assert_eq!(of(&grads), of(&known));
    }
    for gap in [-0.1, f64::NAN] {
        let gaps = Tensor::new(&[[0.0, gap], [0.0, 0.7]], &cpu()).unwrap();
        assert!(model.forward(&x, &gaps, None).is_err());
    }
}

#[test]
fn the_loss_of_sporadic_observations_is_that_of_normal_distributions() {
    let vars = VarMap::new();
    let model = GruOdeBayes::new(&vars, "m", [2, 5, 4], DType::F64, &cpu()).unwrap();
    fill(&vars);
    let mask = Tensor::new(
        &[[[1.0, 1.0], [0.0, 1.0]], [[1.0, 0.0], [0.0, 0.0]]],
        &cpu(),
    )
    .unwrap();
    let seen = Sporadic {
        values: scattered(&[2, 2, 2], 1.0, 1),
        mask: mask.clone(),
        gaps: Tensor::new(&[[0.3, 1.0], [0.2, 0.0]], &cpu()).unwrap(),
    };
    let predictions = model.forward(&seen).unwrap();
    let lambda = 0.01;
    let [m, l] = [&predictions.before.mean, &predictions.before.log_variance].map(values);
    let [n, k] = [&predictions.after.mean, &predictions.after.log_variance].map(values);
    let (x, mask) = (values(&seen.values), values(&mask));
    let mut sum = 0.0;
    for i in (0..8).filter(|i| mask[*i] == 1.0) {
        let (deviation, s) = ((0.5 * l[i]).exp(), 0.01f64);
        let error = (x[i] - m[i]) / deviation;
        sum += 0.5 * error * error + deviation.ln() + 0.5 * std::f64::consts::TAU.ln();
        let square = k[i].exp() + (n[i] - x[i]).powi(2);
        sum += lambda * (s.ln() - 0.5 * k[i] + square / (2.0 * s * s) - 0.5);
    }
    let loss = predictions.loss(&seen, lambda).unwrap();
    let (got, known) = (values(&loss)[0], sum / 4.0);
    assert!(
        (got - known).abs() <= 256.0 * U_F64 * known.abs(),
        "{got} {known}"
    );
    // What was not observed has no influence, whatever stands there.
    let other = Sporadic {
        values: {
            let fill = (seen.values.ones_like().unwrap() * 1e200).unwrap();
            let is_seen = seen.mask.ne(0.0).unwrap();
            is_seen.where_cond(&seen.values, &fill).unwrap()
        },
        ..seen.clone()
    };
    let again = model.forward(&other).unwrap().loss(&other, lambda).unwrap();
    assert_eq!(values(&again), values(&loss));
    // The second row is not seen again, and its gap is zero: nothing changes.
    let second = |x: &Tensor, i: usize| x.get(1).unwrap().get(i).unwrap();
    assert_eq!(
        apart(
            &second(&predictions.after.mean, 0),
            &second(&predictions.after.mean, 1)
        ),
        0.0
    );
    let grads = loss.backward().unwrap();
    for (name, var) in vars.data().lock().unwrap().iter() {
        assert!(grads.get(var).is_some(), "no gradient of {name}");
    }
}

#[test]
fn a_latent_ode_is_decoded_from_its_code_and_every_parameter_has_a_gradient() {
    let vars = VarMap::new();
    let model = LatentOde::new(&vars, "m", [2, 6, 3, 7], 0.1, DType::F64, &cpu()).unwrap();
    fill(&vars);
    let (x, times) = (scattered(&[4, 3, 2], 1.0, 1), [0.0, 0.4, 1.0]);
    let noise = scattered(&[4, 3], 1.0, 2);
    let elbo = model.elbo(&x, &times, &noise).unwrap();
    let (mean, deviation) = model.encode(&x, &times).unwrap();
    let z = (&mean + (&deviation * &noise).unwrap()).unwrap();
    let decoded = model.decode(&z, &times).unwrap();
    let [x_, y] = [&x, &decoded].map(values);
    let (m, s) = (values(&mean), values(&deviation));
    let (likelihood, divergence) = (values(&elbo.likelihood), values(&elbo.divergence));
    for row in 0..4 {
        let of = |x: &[f64], n: usize| x[row * n..(row + 1) * n].to_vec();
        let errors = of(&x_, 6).into_iter().zip(of(&y, 6));
        let squares: f64 = errors.map(|(x, y)| ((x - y) / 0.1).powi(2)).sum();
        let known = -0.5 * (squares / 6.0 + (std::f64::consts::TAU * 0.01).ln());
        assert!((likelihood[row] - known).abs() <= 1e3 * U_F64 * known.abs());
        let terms = of(&m, 3).into_iter().zip(of(&s, 3));
        let known: f64 = terms
            .map(|(m, s)| 0.5 * (m * m + s * s - 1.0) - s.ln())
            .sum();
        assert!((divergence[row] - known).abs() <= 1e3 * U_F64 * known.abs().max(1.0));
    }
    let grads = elbo.loss(0.5).unwrap().backward().unwrap();
    for (name, var) in vars.data().lock().unwrap().iter() {
        assert!(grads.get(var).is_some(), "no gradient of {name}");
    }
    assert!(model.encode(&x, &times[..2]).is_err());
    for sigma in [0.0, -1.0, f64::NAN, f64::INFINITY] {
        let refused = LatentOde::new(&vars, "m", [2, 6, 3, 7], sigma, DType::F64, &cpu());
        assert!(refused.err().unwrap().to_string().contains("sigma"));
    }
}

#[test]
fn models_return_the_dtype_of_their_series_whatever_their_solves_sum_in() {
    for dtype in [DType::F32, DType::BF16] {
        let vars = VarMap::new();
        let build =
            |vb: VarBuilder<'_>| Ok(RowSpeed::new(Mlp::new(&[3, 5, 3], Activation::Tanh, vb)?));
        let flow = NeuralOde::from_field(&vars, "f", dtype, &cpu(), build).unwrap();
        let flow = match dtype {
            DType::F32 => flow.options(OdeOptions {
                precision: Some(Precision::f64()),
                ..Default::default()
            }),
            _ => flow,
        };
        let vb = VarBuilder::from_varmap(&vars, dtype, &cpu());
        let cell = GruCell::new(2, 3, vb.pp("cell")).unwrap();
        let model = OdeRnn::new(flow, cell);
        fill(&vars);
        let gaps = Tensor::new(&[[0.5f32, 0.0, 100.0]; 4], &cpu()).unwrap();
        let x = scattered(&[4, 3, 2], 1.0, 1).to_dtype(dtype).unwrap();
        let hs = model.forward(&x, &gaps, None).unwrap();
        assert_eq!(hs.dtype(), dtype);
    }
    let vars = VarMap::new();
    let model = LatentOde::new(&vars, "m", [2, 6, 3, 7], 0.1, DType::F32, &cpu()).unwrap();
    let double = OdeOptions {
        precision: Some(Precision::f64()),
        ..Default::default()
    };
    let model = model.options(double.clone(), double);
    fill(&vars);
    let [x, noise] = [&[4, 3, 2][..], &[4, 3]].map(|shape| scattered(shape, 1.0, 1));
    let [x, noise] = [x, noise].map(|x| x.to_dtype(DType::F32).unwrap());
    let elbo = model.elbo(&x, &[0.0, 0.4, 1.0], &noise).unwrap();
    assert_eq!(elbo.loss(1.0).unwrap().dtype(), DType::F32);
}

#[test]
fn parareal_sums_in_the_dtype_of_the_fine_solver() {
    let (intervals, length) = (6, 0.1);
    let (y0, exact) = serial(intervals, length);
    let single = OdeOptions {
        precision: Some(Precision::f32()),
        ..steps(4)
    };
    let shot = Shooting::new(single, steps(20));
    let shot = shot.solve(&lorenz, &y0, (intervals, length)).unwrap();
    assert_eq!(shot.states.dtype(), DType::F64);
    assert!(apart(&shot.states, &exact) <= 1e-9 * 50.0);
    // From a start of low precision.
    let low = y0.to_dtype(DType::BF16).unwrap();
    let double = |n| OdeOptions {
        precision: Some(Precision::f64()),
        ..steps(n)
    };
    let shot = Shooting::new(double(4), double(20));
    let shot = shot.solve(&lorenz, &low, (intervals, length)).unwrap();
    let error = apart(
        &shot.states.get(0).unwrap(),
        &low.to_dtype(DType::F64).unwrap(),
    );
    assert_eq!((shot.states.dtype(), error), (DType::F64, 0.0));
}

#[test]
fn what_was_not_observed_does_not_overflow() {
    let vars = VarMap::new();
    let model = GruOdeBayes::new(&vars, "m", [2, 5, 4], DType::F32, &cpu()).unwrap();
    fill(&vars);
    let mask = Tensor::new(&[[[1f32, 0.0]], [[0.0, 1.0]]], &cpu()).unwrap();
    let seen = Sporadic {
        values: scattered(&[2, 1, 2], 1.0, 1).to_dtype(DType::F32).unwrap(),
        gaps: Tensor::new(&[[0.3f32], [0.2]], &cpu()).unwrap(),
        mask,
    };
    let mut predictions = model.forward(&seen).unwrap();
    let loss = values(&predictions.loss(&seen, 0.1).unwrap());
    for size in [-200f64, 200.0] {
        let unseen = seen.mask.eq(0.0).unwrap();
        for normal in [&mut predictions.before, &mut predictions.after] {
            let far = (normal.log_variance.ones_like().unwrap() * size).unwrap();
            normal.log_variance = unseen.where_cond(&far, &normal.log_variance).unwrap();
        }
        assert_eq!(values(&predictions.loss(&seen, 0.1).unwrap()), loss);
    }
}

fn lorenz(_: &Time, y: &Tensor) -> candle_core::Result<Tensor> {
    let [x, y, z] = [0, 1, 2].map(|i| y.narrow(1, i, 1));
    let (x, y, z) = (x?, y?, z?);
    let k = [
        ((&y - &x)? * 10.0)?,
        ((&x * (28.0 - &z)?)? - &y)?,
        ((&x * &y)? - (z * (8.0 / 3.0))?)?,
    ];
    Tensor::cat(&k, 1)
}

/// The same with its derivative along a direction.
struct Lorenz;

impl VectorField for Lorenz {
    fn velocity(&self, t: &Time, y: &Tensor) -> candle_core::Result<Tensor> {
        lorenz(t, y)
    }
}

impl candle_diffeq::nn::Jvp for Lorenz {
    fn jvp(&self, t: &Time, y: &Tensor, v: &Tensor) -> candle_core::Result<(Tensor, Tensor)> {
        let k = lorenz(t, y)?;
        let part = |x: &Tensor, i: usize| x.narrow(1, i, 1);
        let [x, y, z] = [part(y, 0)?, part(y, 1)?, part(y, 2)?];
        let [a, b, c] = [part(v, 0)?, part(v, 1)?, part(v, 2)?];
        let bent = [
            ((&b - &a)? * 10.0)?,
            (((&a * (28.0 - &z)?)? - (&x * &c)?)? - &b)?,
            (((&a * &y)? + (&x * &b)?)? - (c * (8.0 / 3.0))?)?,
        ];
        Ok((k, Tensor::cat(&bent, 1)?))
    }
}

fn steps(n: usize) -> OdeOptions {
    OdeOptions {
        steps: Steps::PerInterval(n),
        ..Default::default()
    }
}

/// The fine solver from interval to interval, and two starts.
fn serial(intervals: usize, length: f64) -> (Tensor, Tensor) {
    let y0 = Tensor::new(&[[1.0, 2.0, 20.0], [-4.0, 3.0, 25.0]], &cpu()).unwrap();
    let times: Vec<f64> = (0..=intervals).map(|n| n as f64 * length).collect();
    let serial = predict(&lorenz, &y0, &times, &steps(20)).unwrap();
    (y0, serial)
}

#[test]
fn parareal_is_exact_on_the_first_k_intervals_after_k_sweeps_and_on_all_in_the_end() {
    let (intervals, length) = (10, 0.2);
    let (y0, serial) = serial(intervals, length);
    let size = values(&serial)
        .into_iter()
        .fold(0.0, |a: f64, b| a.max(b.abs()));
    for sweeps in [1, 4, intervals] {
        let shooting = Shooting::new(steps(4), steps(20))
            .sweeps(sweeps)
            .tolerance(0.0);
        let shot = shooting.solve(&lorenz, &y0, (intervals, length)).unwrap();
        let first = |x: &Tensor| x.narrow(0, 0, sweeps + 1).unwrap();
        let error = apart(&first(&shot.states), &first(&serial)) / size;
        assert!(error <= 1e-10, "{sweeps} sweeps: {error:e}");
    }
}

#[test]
fn newtons_multiple_shooting_needs_fewer_sweeps_than_parareal() {
    let (intervals, length) = (10, 0.2);
    let (y0, serial) = serial(intervals, length);
    let shooting = Shooting::new(steps(4), steps(20)).tolerance(1e-11);
    let parareal = shooting.solve(&lorenz, &y0, (intervals, length)).unwrap();
    let newton = shooting.newton(&Lorenz, &y0, (intervals, length)).unwrap();
    let size = values(&serial)
        .into_iter()
        .fold(0.0, |a: f64, b| a.max(b.abs()));
    assert!(apart(&newton.states, &serial) / size <= 1e-10);
    assert!(newton.changes.len() < parareal.changes.len());
    // Quadratic: each change is below a constant times the square of the one before.
    let square = |pair: &[f64]| pair[1] <= 100.0 * pair[0] * pair[0] + 1e-11;
    assert!(
        newton.changes.windows(2).all(square),
        "{:?}",
        newton.changes
    );
}

#[test]
fn a_step_with_its_own_residual_is_exact() {
    let field = |_: &Time, y: &Tensor| y.sin();
    let y0 = scattered(&[3, 2], 1.0, 1);
    let times = TimeGrid::new(vec![0.0, 0.3, 0.5, 1.1]).unwrap();
    let exact = predict(&field, &y0, &times, &steps(200)).unwrap();
    for method in [EULER, MIDPOINT, RK4] {
        let r = residuals(&field, &method, &times, &exact).unwrap();
        assert_eq!((r.times.len(), r.residuals.dims()), (3, &[3, 3, 2][..]));
        let starts = r.times.clone();
        let all = r.residuals.clone();
        let correction = move |t: &Time, _: &Tensor, k: &Tensor| {
            let n = starts.iter().position(|s| *s == t.value());
            let n = n.ok_or(candle_core::Error::Msg("no such step".into()))?;
            // Of k it has no derivative here.
            (k * 0.0)? + all.get(n)?
        };
        let hyper = Hypersolver::new(field, method.clone(), correction);
        let options = OdeOptions {
            method: EULER,
            ..Default::default()
        };
        let ys = predict(&hyper, &y0, &times, &options).unwrap();
        let error = apart(&ys, &exact);
        assert!(error <= 64.0 * U_F64, "{}: {error:e}", method.name());
    }
}

#[test]
fn a_corrected_method_has_one_order_more() {
    // Of y' = −y: h² y/2 of Euler's method, h³ (−y)/6 of the midpoint rule.
    let field = |_: &Time, y: &Tensor| y.neg();
    let y0 = Tensor::new(&[1.0], &cpu()).unwrap();
    for (method, factor) in [(EULER, 0.5), (MIDPOINT, -1.0 / 6.0)] {
        let error = |n: usize| {
            let g = move |_: &Time, y: &Tensor, _: &Tensor| y * factor;
            let hyper = Hypersolver::new(field, method.clone(), g);
            let options = OdeOptions {
                method: EULER,
                ..steps(n)
            };
            let ys = odeint(hyper, &y0, &[0.0, 1.0], &options).unwrap();
            (values(&ys)[1] - (-1f64).exp()).abs()
        };
        let order = (error(10) / error(20)).log2();
        let expected = method.order() as f64 + 1.0;
        assert!(
            (order - expected).abs() < 0.15,
            "{}: {order}",
            method.name()
        );
    }
}

#[test]
fn a_hypersolver_by_another_method_than_eulers_is_an_error() {
    let field = |_: &Time, y: &Tensor| y.neg();
    let hyper = Hypersolver::new(field, EULER, |_: &Time, y: &Tensor, _: &Tensor| y * 0.5);
    let y0 = Tensor::new(&[1.0], &cpu()).unwrap();
    let error = predict(&hyper, &y0, &[0.0, 1.0], &steps(2)).unwrap_err();
    assert!(error.to_string().contains("euler"), "{error}");
}

#[test]
fn recurrent_models_run_in_low_precision_to_a_rounding_or_two() {
    let vars = VarMap::new();
    let build = |precision: Precision| {
        let flow = NeuralOde::from_field(&vars, "f", DType::F32, &cpu(), |vb| {
            GruField::new(8, vb).map(RowSpeed::new)
        });
        let cell = VarBuilder::from_varmap(&vars, DType::F32, &cpu()).pp("cell");
        let flow = flow.unwrap().precision(precision);
        OdeRnn::new(flow, GruCell::new(2, 8, cell).unwrap())
    };
    let (single, low) = (build(Precision::f32()), build(Precision::bf16()));
    fill(&vars);
    let (x, gaps) = observations();
    let (x, gaps) = (
        x.to_dtype(DType::F32).unwrap(),
        gaps.to_dtype(DType::F32).unwrap(),
    );
    let run = |model: &OdeRnn<GruCell>| model.forward(&x, &gaps, None).unwrap();
    let error = apart(&run(&single), &run(&low));
    // Four gaps of up to 1.6 with velocities below 2, each off by a rounding: 12.8 of them at most.
    assert!(error > U_F32 && error <= 12.8 * U_BF16, "{error:e}");
}

/// Nodes of a graph, each joined to the next and to another.
const NODES: usize = 150;

/// A matrix over the nodes that is not its transpose.
fn graph_of(dtype: DType) -> Csr {
    let n = NODES as u32;
    let pairs = (0..n).flat_map(|i| [[i, (i + 1) % n], [i, (7 * i + 3) % n]]);
    let edges: Vec<_> = pairs.filter(|[i, j]| i != j).collect();
    let graph = Csr::normalised_adjacency(NODES, &edges, dtype, &cpu()).unwrap();
    let change = (scattered(graph.values().dims(), 0.5, 23) + 1.0).unwrap();
    let values = (graph.values() * change.to_dtype(dtype).unwrap()).unwrap();
    graph.with_values(values).unwrap()
}

/// A field of graph convolutions, and its layers.
fn graph_field(dtype: DType, widths: &[usize]) -> (VarMap, GcnField, Vec<Gcn>) {
    let graph = graph_of(dtype);
    let vars = VarMap::new();
    let vb = VarBuilder::from_varmap(&vars, dtype, &cpu());
    let field = GcnField::new(widths, Activation::Softplus, &graph, vb.clone()).unwrap();
    fill(&vars);
    let layer = |(i, w): (usize, &[usize])| Gcn::new(w[0], w[1], &graph, vb.pp(i)).unwrap();
    let layers = widths.windows(2).enumerate().map(layer).collect();
    (vars, field, layers)
}

/// The same in candle's operations.
fn composed(layers: &[Gcn], y: &Tensor) -> candle_core::Result<Tensor> {
    let first = layers[0].forward(y)?;
    layers[1..].iter().try_fold(first, |z, layer| {
        layer.forward(&Activation::Softplus.forward(&z)?)
    })
}

#[test]
fn a_field_of_graph_convolutions_has_the_velocity_and_pull_back_of_its_layers() {
    // Several chunks of the wide layers and one of the thin, and a layer alone.
    for widths in [&[5, 3, 7, 5][..], &[200, 300, 200], &[6, 6]] {
        let (vars, field, layers) = graph_field(DType::F64, widths);
        let y = var(&[NODES, widths[0]], 1.0, 19);
        let v = scattered(y.dims(), 1.0, 18);
        let t = Time::new(0.0, DType::F64, &cpu());
        let k = composed(&layers, y.as_tensor()).unwrap();
        let expected = (&k * &v).unwrap().sum_all().unwrap().backward().unwrap();
        let (velocity, pull) = field.vjp(&t, y.as_tensor()).unwrap();
        let got = pull(&v).unwrap();
        let terms = widths.iter().sum::<usize>() + NODES;
        assert!(relative(&velocity, &k) <= terms as f64 * U_F64);
        // A cotangent has passed through the sums of the layers twice: slopes forward, itself backward.
        let bar = 2.0 * terms as f64 * U_F64;
        let error = relative(&got.y, expected.get(&y).unwrap());
        assert!(error <= bar, "{widths:?}: {error:e}");
        let error = error_of(&got.params, &expected, &all(&vars));
        assert!(error <= bar, "{widths:?}: {error:e}");
        assert!(relative(&field.velocity(&t, y.as_tensor()).unwrap(), &k) <= terms as f64 * U_F64);
    }
}

#[test]
fn a_graph_neural_ode_is_that_of_its_layers() {
    let widths = [6, 11, 6];
    let y0 = scattered(&[NODES, 6], 1.0, 19)
        .to_dtype(DType::F32)
        .unwrap();
    let gradients = |fused: bool| {
        let (vars, field, layers) = graph_field(DType::F32, &widths);
        let y0 = Var::from_tensor(&y0).unwrap();
        let (times, options) = ([0.0, 0.3, 1.0], OdeOptions::default());
        let ys = match fused {
            true => odeint(field, y0.as_tensor(), &times, &options),
            false => {
                let field = move |_: &Time, y: &Tensor| composed(&layers, y);
                odeint(field, y0.as_tensor(), &times, &options)
            }
        };
        let loss = ys.unwrap().sqr().unwrap().sum_all().unwrap();
        let grads = loss.backward().unwrap();
        let of = |x: &Var| grads.get(x).unwrap().clone();
        let mut found: Vec<_> = all(&vars).iter().map(|(_, var)| of(var)).collect();
        found.push(of(&y0));
        found
    };
    for (got, expected) in gradients(true).iter().zip(&gradients(false)) {
        let error = relative(got, expected);
        assert!(error <= 256.0 * U_F32, "{:?}: {error:e}", got.dims());
    }
}

#[test]
fn a_model_of_graph_convolutions_has_the_gradients_of_a_closure_of_its_layers() {
    let (vars, _, layers) = graph_field(DType::F32, &[6, 11, 6]);
    let graph = graph_of(DType::F32);
    let build =
        move |vb: VarBuilder<'_>| GcnField::new(&[6, 11, 6], Activation::Softplus, &graph, vb);
    // The field is compared with a second one that is built of weights without history: both have the same bits.
    let ode = NeuralOde::from_field(&vars, "", DType::F32, &cpu(), build).unwrap();
    let ode = ode.options(OdeOptions {
        check: FieldCheck::Always,
        ..Default::default()
    });
    let y0 = scattered(&[NODES, 6], 1.0, 19)
        .to_dtype(DType::F32)
        .unwrap();
    let times = [0.0, 0.3, 1.0];
    let ours = ode.solve(&y0, &times).unwrap();
    let closure = move |_: &Time, y: &Tensor| composed(&layers, y);
    let theirs = odeint(closure, &y0, &times, &OdeOptions::default()).unwrap();
    let [ours, theirs] = [ours, theirs].map(|ys| {
        let grads = ys.sqr().unwrap().sum_all().unwrap().backward().unwrap();
        let of = |(_, var): &(String, Var)| grads.get(var).unwrap().clone();
        all(&vars).iter().map(of).collect::<Vec<_>>()
    });
    for (got, expected) in ours.iter().zip(&theirs) {
        let error = relative(got, expected);
        assert!(error <= 256.0 * U_F32, "{:?}: {error:e}", got.dims());
    }
}

#[test]
fn the_velocity_of_graph_convolutions_is_differentiable_in_weights_and_state() {
    let (vars, field, layers) = graph_field(DType::F64, &[5, 3, 7, 5]);
    let y = var(&[NODES, 5], 1.0, 19);
    let t = Time::new(0.0, DType::F64, &cpu());
    let of = |k: Tensor| {
        let grads = k.sqr().unwrap().sum_all().unwrap().backward().unwrap();
        let weights = all(&vars).into_iter().map(|(_, var)| var);
        let vars = weights.chain([y.clone()]);
        vars.map(|var| grads.get(&var).unwrap().clone())
            .collect::<Vec<_>>()
    };
    let ours = of(field.velocity(&t, y.as_tensor()).unwrap());
    let theirs = of(composed(&layers, y.as_tensor()).unwrap());
    for (got, expected) in ours.iter().zip(&theirs) {
        let error = relative(got, expected);
        assert!(error <= 1e-13, "{:?}: {error:e}", got.dims());
    }
    // At a state that is not tracked nothing is kept, and the weights have the same gradients.
    let k = field.velocity(&t, &y.as_detached_tensor()).unwrap();
    let grads = k.sqr().unwrap().sum_all().unwrap().backward().unwrap();
    for ((_, var), expected) in all(&vars).iter().zip(&theirs) {
        let error = relative(grads.get(var).unwrap(), expected);
        assert!(error <= 1e-13, "{:?}: {error:e}", var.dims());
    }
}

#[test]
fn layers_that_are_no_field_over_one_graph_are_refused() {
    let ring = |n: u32| {
        let edges: Vec<_> = (0..n).map(|i| [i, (i + 1) % n]).collect();
        Csr::normalised_adjacency(n as usize, &edges, DType::F64, &cpu()).unwrap()
    };
    let vars = VarMap::new();
    let vb = VarBuilder::from_varmap(&vars, DType::F64, &cpu());
    let layer = |inputs, outputs, nodes, name: &str| {
        Gcn::new(inputs, outputs, &ring(nodes), vb.pp(name)).unwrap()
    };
    let empty = |inputs, outputs| {
        let zeros = |shape: &[usize]| Tensor::zeros(shape, DType::F64, &cpu()).unwrap();
        Gcn::from_tensors(&ring(5), zeros(&[outputs, inputs]), zeros(&[outputs])).unwrap()
    };
    for layers in [
        vec![],
        vec![layer(3, 4, 5, "a")],
        vec![layer(3, 4, 5, "b"), layer(4, 3, 6, "c")],
        vec![layer(3, 4, 5, "d"), layer(5, 3, 5, "e")],
        vec![empty(3, 0), empty(0, 3)],
    ] {
        let error = GcnField::from_layers(layers, Activation::Tanh).unwrap_err();
        let text = error.to_string();
        assert!(
            text.contains("do not map a state to its velocity"),
            "{text}"
        );
    }
    let zeros = |dtype| Tensor::zeros((3, 3), dtype, &cpu()).unwrap();
    let single = zeros(DType::F32).get(0).unwrap();
    let mixed = Gcn::from_tensors(&ring(5), zeros(DType::F64), single);
    let text = mixed.unwrap_err().to_string();
    assert!(
        text.contains("Gcn::from_tensors, layer 0: bias is F32"),
        "{text}"
    );
    let (_, field, _) = graph_field(DType::F64, &[3, 3]);
    let y = scattered(&[5, 3], 1.0, 1);
    let text = field.velocity(&Time::new(0.0, DType::F64, &cpu()), &y);
    let text = text.unwrap_err().to_string();
    assert!(text.contains("150 nodes"), "{text}");
}

#[test]
fn an_edge_that_is_listed_twice_is_one_edge() {
    let of = |edges: &[[u32; 2]]| {
        let matrix = Csr::normalised_adjacency(4, edges, DType::F64, &cpu()).unwrap();
        let eye = Tensor::eye(4, DType::F64, &cpu()).unwrap();
        values(&matrix.matmul(&eye).unwrap())
    };
    let once = of(&[[0, 1], [1, 2]]);
    assert_eq!(of(&[[0, 1], [1, 0], [1, 2], [2, 1], [1, 2]]), once);
    assert_eq!(of(&[[0, 0], [0, 1], [1, 2], [3, 3]]), once);
    // Node 3 has its loop alone, and node 0 two neighbours with itself.
    assert_eq!(once[15], 1.0);
    assert!((once[0] - 0.5).abs() <= U_F64);
}

#[test]
fn gaps_of_time_are_not_rounded_to_compute_precision() {
    // h' = 1 from h = 0: what is left after a gap is the gap.
    let vars = VarMap::new();
    for precision in [Precision::bf16(), Precision::f16()] {
        for fusion in [true, false] {
            let flow = NeuralOde::from_field(&vars, "f", DType::F32, &cpu(), |vb| {
                Mlp::new(&[1, 1], Activation::Tanh, vb).map(RowSpeed::new)
            });
            let flow = flow.unwrap().options(OdeOptions {
                precision: Some(precision),
                fusion,
                method: EULER,
                ..Default::default()
            });
            let cell = VarBuilder::from_varmap(&vars, DType::F32, &cpu()).pp("cell");
            let model = OdeRnn::new(flow, GruCell::new(1, 1, cell).unwrap());
            for (name, var) in vars.data().lock().unwrap().iter() {
                let is_one = name == "f.0.bias";
                let value = (var.zeros_like().unwrap() + f64::from(u8::from(is_one))).unwrap();
                var.set(&value).unwrap();
            }
            let gaps = [0.01f32, 0.1, 0.7, 50.0];
            let seen = Tensor::zeros((4, 1), DType::F32, &cpu()).unwrap();
            let x = Tensor::zeros((4, 1, 1), DType::F32, &cpu()).unwrap();
            let all = Tensor::new(&gaps, &cpu()).unwrap().unsqueeze(1).unwrap();
            let h = values(&model.forward(&x, &all, Some(&seen)).unwrap());
            for (h, gap) in h.into_iter().zip(gaps.map(f64::from)) {
                // The velocity is rounded once.
                let u = if precision == Precision::bf16() {
                    U_BF16
                } else {
                    U_F16
                };
                assert!((h / gap - 1.0).abs() <= u, "{gap}: {h}");
            }
            // Gaps in low precision have logarithms, too, and of gaps in one column one may be zero.
            let low = all.to_dtype(DType::F16).unwrap();
            let rows = low.dim(0).unwrap();
            let first = Tensor::from_vec(vec![0f32; 1], (1, 1), &cpu()).unwrap();
            let first = first.to_dtype(DType::F16).unwrap();
            let some = Tensor::cat(&[&first, &low.narrow(0, 1, rows - 1).unwrap()], 0).unwrap();
            let h = values(&model.forward(&x, &some, Some(&seen)).unwrap());
            // In place of zero there is a gap of 1e-30.
            assert!(h.iter().all(|h| h.is_finite()) && h[0] < 1e-29, "{h:?}");
        }
    }
}

#[test]
fn where_nothing_is_observed_there_is_no_loss_and_no_row_is_no_error() {
    let vars = VarMap::new();
    let model = GruOdeBayes::new(&vars, "m", [2, 5, 4], DType::F64, &cpu()).unwrap();
    fill(&vars);
    let zeros = |shape: &[usize]| Tensor::zeros(shape, DType::F64, &cpu()).unwrap();
    let seen = |rows: usize| Sporadic {
        values: zeros(&[rows, 2, 2]),
        mask: zeros(&[rows, 2, 2]),
        gaps: (zeros(&[rows, 2]) + 0.5).unwrap(),
    };
    let loss = model
        .forward(&seen(3))
        .unwrap()
        .loss(&seen(3), 0.1)
        .unwrap();
    assert_eq!(values(&loss), [0.0]);
    let grads = loss.backward().unwrap();
    for var in vars.all_vars() {
        let grad = grads.get(&var).map(values).unwrap_or_default();
        assert!(grad.iter().all(|g| *g == 0.0));
    }
    let none = model.forward(&seen(0)).unwrap();
    assert_eq!(none.before.mean.dims(), [0, 2, 2]);
}

#[test]
fn a_latent_ode_returns_the_series_whatever_output_its_options_ask_for() {
    let vars = VarMap::new();
    let model = LatentOde::new(&vars, "m", [2, 6, 3, 7], 0.1, DType::F64, &cpu()).unwrap();
    fill(&vars);
    let z = scattered(&[4, 3], 1.0, 1);
    let expected = values(&model.decode(&z, &[0.0, 0.4, 1.0]).unwrap());
    let last = OdeOptions {
        output: Output::Final,
        ..Default::default()
    };
    let model = model.options(last.clone(), last);
    let got = model.decode(&z, &[0.0, 0.4, 1.0]).unwrap();
    assert_eq!((got.dims(), values(&got)), (&[4, 3, 2][..], expected));
}

#[test]
fn a_hypersolver_knows_a_step_from_a_jump_for_one_from_its_start() {
    // A step that begins at a jump is evaluated beside it, by more than a billionth of a step so short.
    let pieces = PiecewiseConstant::new(
        &[99.0, 100.0, 101.0],
        vec![|_: &Time, y: &Tensor| y.neg(), |_: &Time, y: &Tensor| {
            y.affine(-2.0, 0.0)
        }],
    )
    .unwrap();
    let g = |_: &Time, y: &Tensor, _: &Tensor| y.zeros_like();
    let hyper = Hypersolver::new(pieces, EULER, g);
    let y0 = Tensor::new(&[1.0], &cpu()).unwrap();
    let options = OdeOptions {
        method: EULER,
        ..Default::default()
    };
    let y = predict(&hyper, &y0, &[100.0 - 1e-4, 100.0, 100.0 + 1e-4], &options).unwrap();
    assert!((values(&y)[2] - (1.0 - 1e-4) * (1.0 - 2e-4)).abs() <= 1e-11);
}
