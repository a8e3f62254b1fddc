//! Weights that are piecewise constant in time.
//!
//! `cargo test --test piecewise`, a second.

mod common;

use candle_core::{DType, Device, Tensor, Var};
use candle_diffeq::error::AdaptiveDefect;
use candle_diffeq::fields::PiecewiseConstant;
use candle_diffeq::metrics::Recorder;
use candle_diffeq::nn::{Activation, Cnf, ConvField, HyperCnf, Mlp, Relaxation, RowSpeed};
use candle_diffeq::options::{ActivationCache, Adaptive, Checkpoint, StepControl, Steps, TimeGrid};
use candle_diffeq::sde::{ito, predict, BrownianTree, Noise, OfField, SdeOptions, EULER_MARUYAMA};
use candle_diffeq::tableau::{DOPRI5, EULER, RK4};
use candle_diffeq::{odeint, Error, NeuralOde, OdeOptions, Precision, State, Time, VectorField};
use candle_nn::{VarBuilder, VarMap};
use common::{
    all, bits, error_of, has_tiles, method, relative, scatter, scattered, values, worst, U_BF16,
    U_F16, U_F32, U_F64,
};
use proptest::prelude::*;

type Growth = Box<dyn Fn(&Time, &Tensor) -> candle_core::Result<Tensor> + Send + Sync>;

/// y' = a_i y.
fn growth(rates: &[Var]) -> Vec<Growth> {
    let field = |a: &Var| {
        let a = a.as_tensor().clone();
        Box::new(move |_: &Time, y: &Tensor| y.broadcast_mul(&a)) as Growth
    };
    rates.iter().map(field).collect()
}

fn rates(values: &[f64]) -> Vec<Var> {
    let rate = |a: &f64| Var::new(*a, &Device::Cpu).unwrap();
    values.iter().map(rate).collect()
}

const A: [f64; 3] = [0.7, -1.3, 0.4];
const TIMES: [f64; 4] = [0.0, 0.3, 1.0, 1.2];

#[test]
fn euler_is_the_product_of_its_factors_and_every_rate_has_its_own_gradient() {
    let rates = rates(&A);
    let field = PiecewiseConstant::new(&TIMES, growth(&rates)).unwrap();
    let y0 = Tensor::new(&[2f64], &Device::Cpu).unwrap();
    let m = 7;
    let ys = odeint(field, &y0, &TIMES, &method(&EULER, m)).unwrap();
    let y = ys.get(3).unwrap();
    let h = |i: usize| (TIMES[i + 1] - TIMES[i]) / m as f64;
    let factor = |i: usize| 1.0 + h(i) * A[i];
    let exact = (0..3).map(|i| factor(i).powi(m as i32)).product::<f64>() * 2.0;
    assert!((values(&y)[0] / exact - 1.0).abs() < 64.0 * U_F64);
    let grads = y.sum_all().unwrap().backward().unwrap();
    for (i, rate) in rates.iter().enumerate() {
        let exact = m as f64 * h(i) / factor(i) * exact;
        let got = values(grads.get(rate).unwrap())[0];
        assert!((got / exact - 1.0).abs() < 64.0 * U_F64, "{got} {exact}");
    }
}

#[test]
fn every_stage_of_a_step_reads_the_field_of_its_interval() {
    // A step that ends on a break, and one that begins there; there and back.
    for (times, rate) in [
        ([0.0, 0.3], A[0]),
        ([0.3, 1.0], A[1]),
        ([1.0, 0.3], A[1]),
        ([0.3, 0.0], A[0]),
    ] {
        let field = PiecewiseConstant::new(&TIMES, growth(&rates(&A))).unwrap();
        let y0 = Tensor::new(&[1f64], &Device::Cpu).unwrap();
        let y = odeint(field, &y0, &times, &OdeOptions::default()).unwrap();
        let z = (times[1] - times[0]) * rate;
        let exact = 1.0 + z * (1.0 + z / 2.0 * (1.0 + z / 3.0 * (1.0 + z / 4.0)));
        assert!((values(&y)[1] - exact).abs() < 8.0 * U_F64, "{times:?}");
    }
}

#[test]
fn values_and_gradients_of_rk4_are_those_of_its_polynomial_in_all_directions() {
    let reversed = |x: &[f64]| x.iter().rev().copied().collect::<Vec<_>>();
    let two = [0.0, 0.3, 0.6];
    let cases = [
        (TIMES.to_vec(), TIMES.to_vec()),
        (TIMES.to_vec(), reversed(&TIMES)),
        (reversed(&TIMES), TIMES.to_vec()),
        (reversed(&TIMES), reversed(&TIMES)),
        // Beyond the grid, where the times of a solve are coarser than the breaks.
        (two.to_vec(), vec![-10.0, 0.3, 1.0]),
        (two.to_vec(), vec![50.0, 0.3, 0.0]),
        (vec![0.0, 0.1, 0.2], vec![5.0, 0.1, 0.0]),
    ];
    for (grid, times) in cases {
        for m in [1, 2, 3, 10] {
            let n = grid.len() - 1;
            let a: Vec<f64> = A[..n].iter().map(|a| 0.05 * a).collect();
            let rates = rates(&a);
            let field = PiecewiseConstant::new(&grid[..], growth(&rates)).unwrap();
            let (mut exact, mut slopes) = (1.0, vec![0.0; n]);
            for w in times.windows(2) {
                let piece = field.interval(0.5 * (w[0] + w[1]));
                let h = (w[1] - w[0]) / m as f64;
                let z = a[piece] * h;
                let factor = 1.0 + z * (1.0 + z / 2.0 * (1.0 + z / 3.0 * (1.0 + z / 4.0)));
                let slope = 1.0 + z * (1.0 + z / 2.0 * (1.0 + z / 3.0));
                exact *= factor.powi(m);
                slopes[piece] += f64::from(m) * h * slope / factor;
            }
            let y0 = Tensor::new(&[1f64], &Device::Cpu).unwrap();
            let ys = odeint(field, &y0, &times[..], &method(&RK4, m as usize)).unwrap();
            let y = ys.get(times.len() - 1).unwrap();
            let close = |got: f64, exact: f64| (got - exact).abs() <= 1024.0 * U_F64 * exact.abs();
            assert!(close(values(&y)[0], exact), "{grid:?}, {times:?}, {m}");
            let grads = y.sum_all().unwrap().backward().unwrap();
            for (rate, slope) in rates.iter().zip(slopes) {
                let got = grads.get(rate).map_or(0.0, |g| values(g)[0]);
                assert!(close(got, slope * exact), "{grid:?}, {times:?}, {m}: {got}");
            }
        }
    }
}

#[test]
fn a_field_of_an_empty_batch_sees_a_step_too() {
    let y0 = Tensor::zeros((0, 2), DType::F64, &Device::Cpu).unwrap();
    let field = |t: &Time, y: &Tensor| {
        assert_eq!((t.step(), t.interval()), (Some(0), Some([0.0, 0.5])));
        y.neg()
    };
    odeint(field, &y0, &[0.0, 0.5, 1.0], &method(&RK4, 1)).unwrap();
}

#[test]
fn a_step_is_cut_in_two_at_a_break_inside() {
    for times in [[0.2f64, 0.5], [0.5, 0.2]] {
        let field = PiecewiseConstant::new(&TIMES, growth(&rates(&A))).unwrap();
        let y0 = Tensor::new(&[1f64], &Device::Cpu).unwrap();
        let y = odeint(field, &y0, &times, &OdeOptions::default()).unwrap();
        let factor = |z: f64| 1.0 + z * (1.0 + z / 2.0 * (1.0 + z / 3.0 * (1.0 + z / 4.0)));
        let sign = (times[1] - times[0]).signum();
        let exact = factor(sign * (0.3 - 0.2) * A[0]) * factor(sign * (0.5 - 0.3) * A[1]);
        assert!((values(&y)[1] - exact).abs() < 8.0 * U_F64, "{times:?}");
    }
}

#[test]
fn a_field_sees_the_step_that_it_is_evaluated_in() {
    let seen = std::sync::Mutex::new(vec![]);
    let outside = Time::new(0.5, DType::F64, &Device::Cpu);
    assert_eq!((outside.step(), outside.interval()), (None, None));
    let y0 = Tensor::new(&[1f64], &Device::Cpu).unwrap();
    let options = OdeOptions {
        check: candle_diffeq::fields::FieldCheck::Never,
        ..method(&RK4, 2)
    };
    let field = |t: &Time, y: &Tensor| {
        seen.lock().unwrap().push((t.step(), t.interval()));
        y.neg()
    };
    candle_diffeq::solution(&field, &y0, &[1.0, 0.0], &options).unwrap();
    let seen = seen.into_inner().unwrap();
    let of = |step: usize, interval| vec![(Some(step), Some(interval)); 4];
    assert_eq!(seen, [of(0, [1.0, 0.5]), of(1, [0.5, 0.0])].concat());
}

/// The error of y at the end of `times` against the product of exponentials, with m steps an interval.
fn error_of_rk4(m: usize, times: &[f64]) -> f64 {
    let field = PiecewiseConstant::new(&TIMES, growth(&rates(&A))).unwrap();
    let y0 = Tensor::new(&[1f64], &Device::Cpu).unwrap();
    let ys = odeint(field, &y0, times, &method(&RK4, m)).unwrap();
    let (start, end) = (times[0], times[times.len() - 1]);
    let lasts = |i: usize| {
        let within = |t: f64| t.clamp(TIMES[i], TIMES[i + 1]);
        within(end) - within(start)
    };
    let exponent: f64 = (0..3).map(|i| A[i] * lasts(i)).sum();
    (values(&ys)[times.len() - 1] - exponent.exp()).abs()
}

#[test]
fn rk4_has_order_four_where_steps_end_on_breaks_and_where_they_do_not() {
    let reversed: Vec<f64> = TIMES.iter().rev().copied().collect();
    for times in [&TIMES[..], &reversed, &[0.1, 1.15], &[1.15, 0.1]] {
        let order = (error_of_rk4(8, times) / error_of_rk4(128, times)).log2() / 4.0;
        assert!((order - 4.0).abs() < 0.3, "{times:?}: {order}");
    }
}

#[test]
fn integrating_back_passes_the_fields_in_reverse() {
    let rates = rates(&A);
    let reversed: Vec<f64> = TIMES.iter().rev().copied().collect();
    let there = || PiecewiseConstant::new(&TIMES, growth(&rates)).unwrap();
    let back = || {
        let mut fields = growth(&rates);
        fields.reverse();
        PiecewiseConstant::new(&reversed, fields).unwrap()
    };
    let y0 = Tensor::new(&[1f64], &Device::Cpu).unwrap();
    let fine = |h| OdeOptions {
        steps: Steps::Size(h),
        ..method(&EULER, 1)
    };
    let returned = |h| {
        let y = odeint(there(), &y0, &TIMES, &fine(h)).unwrap();
        let y = odeint(back(), &y.get(3).unwrap(), &reversed, &fine(h)).unwrap();
        (values(&y)[3] - 1.0).abs()
    };
    // Euler's own error, order one; the wrong weights would leave an error that stays.
    assert!(returned(1e-3) < 2e-3);
    assert!(returned(1e-3) < 0.6 * returned(2e-3));
}

#[test]
fn fields_with_pull_backs_of_their_own_train_as_their_velocities_do_on_a_tape() {
    let vars = VarMap::new();
    let piece = |vb: candle_nn::VarBuilder<'_>| Mlp::new(&[2, 5, 2], Activation::Tanh, vb);
    let ode = NeuralOde::from_field(&vars, "f", DType::F64, &Device::Cpu, move |vb| {
        PiecewiseConstant::build(&TIMES, |i| piece(vb.pp(i)))
    })
    .unwrap()
    .options(method(&RK4, 2));
    scatter(&vars);
    assert_eq!(ode.parameters().len(), 12);
    let y0 = scattered(&[4, 2], 1.0, 3);
    let of = |ys: Tensor| ys.get(3).unwrap().sqr().unwrap().sum_all().unwrap();
    let ours = of(ode.solve(&y0, &TIMES).unwrap()).backward().unwrap();

    let vb = candle_nn::VarBuilder::from_varmap(&vars, DType::F64, &Device::Cpu).pp("f");
    let nets: Vec<_> = (0..3).map(|i| piece(vb.pp(i)).unwrap()).collect();
    let listed = PiecewiseConstant::new(&TIMES, nets).unwrap();
    let plain = move |t: &Time, y: &Tensor| listed.velocity(t, y);
    let tape = odeint(plain, &y0, &TIMES, &method(&RK4, 2)).unwrap();
    let tape = of(tape).backward().unwrap();
    assert!(error_of(&ours, &tape, &all(&vars)) < 64.0 * U_F64);
}

#[test]
fn weights_that_intervals_share_are_listed_once_and_summed() {
    let vars = VarMap::new();
    let ode = NeuralOde::from_field(&vars, "f", DType::F64, &Device::Cpu, |vb| {
        PiecewiseConstant::build(&TIMES, |_| {
            Mlp::new(&[2, 5, 2], Activation::Tanh, vb.clone())
        })
    })
    .unwrap();
    scatter(&vars);
    let one = NeuralOde::new(&vars, "f", &Device::Cpu, |vb| {
        Mlp::new(&[2, 5, 2], Activation::Tanh, vb)
    });
    // Of f64 variables, which exist already.
    let y0 = scattered(&[4, 2], 1.0, 3);
    let loss = |ys: Tensor| ys.sqr().unwrap().sum_all().unwrap();
    let shared = loss(ode.solve(&y0, &TIMES).unwrap()).backward().unwrap();
    let plain = loss(one.unwrap().solve(&y0, &TIMES).unwrap()).backward();
    assert!(error_of(&shared, &plain.unwrap(), &all(&vars)) < 64.0 * U_F64);
}

/// States, gradients of y0 and of all weights, on one path or the other.
fn answers<S: State + 'static, F: VectorField<S> + Send + Sync + 'static>(
    build: impl Fn(VarBuilder<'_>) -> candle_core::Result<F> + Send + Sync + 'static,
    (y0, times): (&[Tensor], &[f64]),
    options: &OdeOptions,
    fusion: bool,
) -> Vec<Tensor> {
    let vars = VarMap::new();
    let ode = NeuralOde::from_field(&vars, "f", y0[0].dtype(), &Device::Cpu, build).unwrap();
    scatter(&vars);
    let ode = ode.options(OdeOptions {
        fusion,
        ..options.clone()
    });
    let y0: Vec<_> = y0.iter().map(|y| Var::from_tensor(y).unwrap()).collect();
    let start = y0.iter().map(|y| y.as_tensor().clone()).collect();
    let ys = ode.solve(&S::from_leaves(start).unwrap(), times).unwrap();
    let ys = ys.leaves();
    let weighted = |(i, y): (usize, &Tensor)| {
        let weights = (scattered(y.dims(), 0.5, 50 + i) + 1.0)?.to_dtype(y.dtype())?;
        (y * weights)?.sum_all()
    };
    let parts = ys.iter().enumerate().map(|y| weighted(y).unwrap());
    let loss = parts.reduce(|sum, part| (sum + part).unwrap()).unwrap();
    let grads = loss.backward().unwrap();
    let of = |var: Var| grads.get(&var).unwrap().clone();
    let variables = y0
        .into_iter()
        .chain(all(&vars).into_iter().map(|(_, var)| var));
    let gradients: Vec<_> = variables.map(of).collect();
    [ys, gradients].concat()
}

/// A perceptron of three features for interval i: each of other widths, the second of another depth.
fn perceptron(i: usize, vb: VarBuilder<'_>) -> candle_core::Result<Mlp> {
    let widths: &[usize] = match i {
        1 => &[3, 9, 8, 3],
        _ => &[3, 5 + 4 * i, 3],
    };
    Mlp::with_time(widths, Activation::Tanh, vb.pp(i))
}

/// Whether two solves agree in every bit.
fn alike(these: &[Tensor], those: &[Tensor]) -> bool {
    let mut pairs = these.iter().zip(those);
    pairs.all(|(x, y)| bits(x) == bits(y))
}

#[test]
fn fields_that_take_turns_tile_by_tile_are_those_of_the_general_path() {
    // The first and the last interval share their weights.
    let pieces =
        |vb: VarBuilder<'_>| PiecewiseConstant::build(&TIMES, |i| perceptron(i % 2, vb.clone()));
    let flows = |vb: VarBuilder<'_>| {
        PiecewiseConstant::build(&TIMES, |i| Cnf::new(perceptron(i, vb.clone())?))
    };
    // Weights that are those of a time, too.
    let hyper = |vb: VarBuilder<'_>| {
        PiecewiseConstant::build(&TIMES, |i| HyperCnf::new(3, 7 - i, 4 + i, vb.pp(i)))
    };
    let fast = move |vb: VarBuilder<'_>| Ok(RowSpeed::new(Relaxation::new(pieces(vb)?)));
    let dense = |times: &[f64]| OdeOptions {
        method: DOPRI5,
        steps: Steps::At(times.to_vec()),
        ..Default::default()
    };
    let kept = OdeOptions {
        checkpoint: Checkpoint::States(2),
        activation_cache: ActivationCache::ALL,
        ..method(&RK4, 2)
    };
    for (times, options) in [
        (&TIMES[..], method(&RK4, 1)),
        // No step ends on a break by itself.
        (&[0.1, 0.4, 1.15], method(&RK4, 3)),
        (&[1.15, 0.4, 0.1], kept),
        (&[0.05, 0.2, 0.9, 1.1], dense(&[0.5, 0.7])),
        (&[1.1, 0.9, 0.2, 0.05], dense(&[0.7, 0.5])),
    ] {
        for dtype in [DType::F64, DType::F32] {
            let like = |x: Tensor| x.to_dtype(dtype).unwrap();
            let z = like(scattered(&[37, 3], 1.0, 3));
            let l = like(scattered(&[37, 1], 0.5, 4));
            let (one, two) = ([z.clone()], [z, l]);
            let check = |name: &str, of: &dyn Fn(bool) -> Vec<Tensor>| {
                let (tiles, general) = (of(true), of(false));
                assert_eq!(tiles.len(), general.len());
                // Sums of as many terms as rows and stages.
                let bound = match dtype {
                    DType::F64 => 1024.0 * U_F64,
                    _ => 1024.0 * U_F32,
                };
                for (i, (x, y)) in tiles.iter().zip(&general).enumerate() {
                    let error = relative(x, y);
                    assert!(error <= bound, "{name} {times:?} {dtype:?} {i}: {error:e}");
                }
                // Sums of f32 in another order: it was solved in tiles.
                if dtype == DType::F32 {
                    assert_eq!(alike(&tiles, &general), !has_tiles(), "{name} {times:?}");
                }
            };
            check("pieces", &|fusion| {
                answers::<Tensor, _>(pieces, (&one, times), &options, fusion)
            });
            type Two = (Tensor, Tensor);
            check("speed", &|fusion| {
                answers::<Two, _>(fast, (&two, times), &options, fusion)
            });
            check("flow", &|fusion| {
                answers::<Two, _>(flows, (&two, times), &options, fusion)
            });
            check("hyper", &|fusion| {
                answers::<Two, _>(hyper, (&two, times), &options, fusion)
            });
        }
    }
}

/// What is kept of evaluations changes no bit, and is what each of the fields needs.
fn check_caches<F: VectorField<Tensor> + Send + Sync + 'static>(
    build: fn(VarBuilder<'_>) -> candle_core::Result<F>,
    y0: &Tensor,
) {
    let y0 = [y0.to_dtype(DType::F32).unwrap()];
    let solve = |cache, fusion| {
        let recorder = Recorder::default();
        let options = OdeOptions {
            activation_cache: cache,
            recorder: Some(recorder.clone()),
            ..method(&RK4, 2)
        };
        let answers = answers::<Tensor, _>(build, (&y0, &[0.1, 0.4, 1.15]), &options, fusion);
        (answers, recorder.take())
    };
    let (general, none) = solve(ActivationCache::NONE, false);
    assert_eq!(none.activation_bytes, 0);
    let (again, none) = solve(ActivationCache::NONE, true);
    for (i, (x, y)) in again.iter().zip(&general).enumerate() {
        let error = relative(x, y);
        assert!(error <= 1024.0 * U_F32, "{i}: {error:e}");
    }
    if !has_tiles() {
        return;
    }
    assert!(!alike(&again, &general));
    let (kept, all) = solve(ActivationCache::ALL, true);
    assert!(alike(&kept, &again));
    assert!(all.activation_bytes > 0 && all.recomputed == 0);
    // The last steps alone.
    let (part, last) = solve(ActivationCache::within(all.activation_bytes / 2), true);
    assert!(alike(&part, &again));
    assert!((1..=all.activation_bytes / 2).contains(&last.activation_bytes));
    assert!((1..none.recomputed).contains(&last.recomputed));
}

#[test]
fn kept_evaluations_of_fields_of_other_sizes_change_no_bit_of_the_gradients() {
    check_caches(
        |vb| PiecewiseConstant::build(&TIMES, |i| perceptron(i, vb.clone())),
        &scattered(&[37, 3], 1.0, 3),
    );
    let convolutions = |vb: VarBuilder<'_>| {
        PiecewiseConstant::build(&TIMES, |i| {
            let channels: &[usize] = match i {
                1 => &[3, 4, 2, 3],
                _ => &[3, 2 + i, 3],
            };
            ConvField::new(channels, 3, Activation::Tanh, vb.pp(i))
        })
    };
    check_caches(convolutions, &scattered(&[5, 3, 4, 5], 1.0, 3));
}

#[test]
fn kept_evaluations_in_bf16_are_pulled_back_by_the_field_of_their_interval() {
    // More intervals than bf16 has integers in a row: 257 and 259 are none of them.
    let times = TimeGrid::linspace(0.0, 1.0, 261).unwrap();
    let times = times.points();
    let build = || {
        let times = times.to_vec();
        move |vb: VarBuilder<'_>| {
            let field = |i| Mlp::new(&[2, 3, 2], Activation::Tanh, vb.pp(i));
            PiecewiseConstant::build(&times[..], field)
        }
    };
    let one = [scattered(&[9, 2], 1.0, 3).to_dtype(DType::F32).unwrap()];
    let check = |name: &str, of: &dyn Fn(&OdeOptions) -> Vec<Tensor>| {
        let [exact, low] = [ActivationCache::ALL, ActivationCache::ALL.in_bf16()].map(|cache| {
            of(&OdeOptions {
                checkpoint: Checkpoint::All,
                activation_cache: cache,
                ..method(&RK4, 1)
            })
        });
        for (i, (x, y)) in low.iter().zip(&exact).enumerate() {
            // h and 1 − h² are rounded; another field would be wrong by the size of the gradient.
            let error = relative(x, y);
            assert!(error <= 4.0 * U_BF16, "{name} {i}: {error:e}");
        }
        // The general path keeps nothing in bf16.
        assert_eq!(alike(&low, &exact), !has_tiles(), "{name}");
    };
    check("pieces", &|options| {
        answers::<Tensor, _>(build(), (&one, times), options, true)
    });
}

#[test]
fn pieces_in_tiles_round_where_the_general_path_rounds_and_have_the_bits_of_solves_one_by_one() {
    let build = |vb: VarBuilder<'_>| {
        PiecewiseConstant::build(&TIMES, |i| {
            Mlp::new(&[3, 20, 3], Activation::Softplus, vb.pp(i))
        })
    };
    let y0 = [scattered(&[37, 3], 1.0, 3).to_dtype(DType::F32).unwrap()];
    for (low, u) in [(Precision::bf16(), U_BF16), (Precision::f16(), U_F16)] {
        let options = OdeOptions {
            precision: Some(low),
            ..method(&RK4, 2)
        };
        let [tiles, general] =
            [true, false].map(|on| answers::<Tensor, _>(build, (&y0, &TIMES), &options, on));
        for (x, y) in tiles.iter().zip(&general) {
            // Where a roundoff of f32 moves a number over the middle between two of low precision, it is rounded the
            // other way.
            assert!(relative(x, y) <= u, "{low:?}");
        }
    }
    // Solves of one interval each.
    let vars = VarMap::new();
    let whole = NeuralOde::from_field(&vars, "f", DType::F32, &Device::Cpu, build).unwrap();
    scatter(&vars);
    let whole = whole.options(method(&RK4, 2)).predict(&y0[0], &TIMES);
    let mut y = y0[0].clone();
    for i in 0..3 {
        let one = NeuralOde::from_field(&vars, "f", DType::F32, &Device::Cpu, move |vb| {
            Mlp::new(&[3, 20, 3], Activation::Softplus, vb.pp(i))
        });
        let ode = one.unwrap().options(method(&RK4, 2));
        y = ode
            .predict(&y, &TIMES[i..i + 2])
            .and_then(|ys| Ok(ys.get(1)?))
            .unwrap();
        let got = whole.as_ref().unwrap().get(i + 1).unwrap();
        assert_eq!(bits(&got), bits(&y), "{i}");
    }
}

#[test]
fn rows_have_no_adaptive_steps_of_their_own_where_fields_take_turns() {
    let solve = |control: Option<StepControl>| {
        let vars = VarMap::new();
        let ode = NeuralOde::from_field(&vars, "f", DType::F64, &Device::Cpu, |vb| {
            PiecewiseConstant::build(&TIMES, |i| Mlp::new(&[3, 9, 3], Activation::Tanh, vb.pp(i)))
        });
        let adaptive = Adaptive::new(1e-5, 1e-5);
        let ode = ode.unwrap().options(OdeOptions {
            method: DOPRI5,
            steps: Steps::Adaptive(match control {
                Some(control) => adaptive.control(control),
                None => adaptive,
            }),
            ..Default::default()
        });
        ode.solve(&scattered(&[5, 3], 1.0, 3), &TIMES)
    };
    assert!(solve(None).is_ok());
    let own = AdaptiveDefect::NoRows { row_wise: false };
    let refused = solve(Some(StepControl::Rows)).unwrap_err();
    assert!(matches!(refused, Error::Adaptive(defect) if defect == own));
}

#[test]
fn a_count_of_fields_that_is_not_that_of_intervals_is_an_error() {
    let of = |times: &[f64], n| PiecewiseConstant::new(times, growth(&rates(&vec![1.0; n])));
    for (times, n) in [(&TIMES[..], 2), (&TIMES[..], 4), (&[0.5][..], 0)] {
        let (fields, intervals) = (n, times.len() - 1);
        match of(times, n) {
            Err(Error::FieldCount {
                fields: f,
                intervals: i,
            }) => {
                assert_eq!((f, i), (fields, intervals));
            }
            _ => panic!("no error for {n} fields"),
        }
    }
    assert!(matches!(of(&[], 0), Err(Error::EmptyGrid)));
    let turned = of(&[0.0, 1.0, 0.5], 2);
    assert!(matches!(turned, Err(Error::GridNotMonotone { .. })));
}

proptest! {
    #[test]
    fn a_time_within_rounding_of_a_break_belongs_to_the_field_that_begins_there(
        start in -50.0..50.0f64,
        length in prop_oneof![0.1..100.0f64, -100.0..-0.1],
        n in 1usize..40,
        ulps in -2i64..=2,
    ) {
        let times = TimeGrid::linspace(start, start + length, n + 1).unwrap();
        let field = PiecewiseConstant::new(times.points(), vec![(); n]).unwrap();
        let points = times.points();
        let largest = worst(points.iter().copied());
        for i in 0..n {
            let near = points[i] + ulps as f64 * U_F64 * largest;
            prop_assert_eq!(field.interval(near), i);
            prop_assert_eq!(field.interval(0.5 * (points[i] + points[i + 1])), i);
        }
        prop_assert_eq!(field.interval(start - length), 0);
        prop_assert_eq!(field.interval(start + 2.0 * length), n - 1);
    }
}

#[test]
fn the_order_of_the_method_is_kept_across_breaks_inside_of_steps() {
    // Time-dependent fields, whose one-sided values matter.
    let wave = |rate: f64| {
        let field = move |t: &Time, y: &Tensor| y * (rate * (1.0 + t.value()));
        Box::new(field) as Growth
    };
    let z = |a: f64, b: f64, rate: f64| rate * ((b - a) + (b * b - a * a) / 2.0);
    let sum = |times: &[f64]| (0..3).map(|i| z(times[i], times[i + 1], A[i])).sum::<f64>();
    let exact = sum(&TIMES).exp();
    for (times, exact) in [([0.0, 1.2], exact), ([1.2, 0.0], 1.0 / exact)] {
        let field = || PiecewiseConstant::new(&TIMES, A.map(wave).into()).unwrap();
        let y0 = Tensor::new(&[1f64], &Device::Cpu).unwrap();
        let error = |steps: Steps| {
            let options = OdeOptions {
                steps,
                ..Default::default()
            };
            let ys = candle_diffeq::predict(&field(), &y0, &times, &options).unwrap();
            (values(&ys)[1] / exact - 1.0).abs()
        };
        // No number of steps has an end at a break.
        let errors = [7, 14, 28].map(|m| error(Steps::PerInterval(m)));
        for pair in errors.windows(2) {
            assert!(pair[0] / pair[1] > 12.0, "{errors:?}");
        }
        let at = |n: u32| {
            let inner = (1..n).map(|i| 1.2 * f64::from(i) / f64::from(n));
            error(Steps::At(match times[0] == 0.0 {
                true => inner.collect(),
                false => inner.rev().collect(),
            }))
        };
        let [coarse, fine] = [18, 36].map(at);
        assert!(coarse / fine > 12.0, "{coarse:e} {fine:e}");
        let adaptive = candle_diffeq::options::Adaptive::new(1e-9, 1e-9);
        let options = OdeOptions {
            method: candle_diffeq::tableau::DOPRI5,
            steps: Steps::Adaptive(adaptive),
            ..Default::default()
        };
        let ys = candle_diffeq::predict(&field(), &y0, &times, &options).unwrap();
        assert!((values(&ys)[1] / exact - 1.0).abs() < 1e-8);
    }
}

#[test]
fn steps_of_an_equation_with_noise_end_where_its_drift_or_its_diffusion_jumps() {
    const BREAKS: [f64; 4] = [0.0, 0.3, 0.7, 1.0];
    let constant = |value: f64| move |_: &Time, y: &Tensor| y.ones_like()? * value;
    let pieces = || PiecewiseConstant::new(&BREAKS, [0.5, -2.0, 1.0].map(constant).to_vec());
    let smooth = || PiecewiseConstant::new(&[0.0, 1.0], vec![constant(0.25)]);
    let y0 = Tensor::ones((3, 2), DType::F64, &Device::Cpu).unwrap();
    let solve = |[drift, diffusion]: [_; 2], steps| {
        let sde = ito(drift, OfField(diffusion));
        let noise = Noise::from(BrownianTree::new(5, 12).unwrap());
        let options = SdeOptions {
            method: EULER_MARUYAMA,
            steps,
            ..Default::default()
        };
        bits(&predict(&sde, &y0, &[0.0, 1.0], &noise, &options).unwrap())
    };
    for of_drift in [true, false] {
        let parts = || match of_drift {
            true => [pieces().unwrap(), smooth().unwrap()],
            false => [smooth().unwrap(), pieces().unwrap()],
        };
        let expected = solve(parts(), Steps::At(BREAKS.to_vec()));
        assert_eq!(solve(parts(), Steps::PerInterval(1)), expected);
    }
}

#[test]
fn steps_end_where_the_field_of_an_interval_jumps() {
    let constant = |value: f64| move |_: &Time, y: &Tensor| y.ones_like()? * value;
    let inner = |times: &[f64], values: Vec<f64>| {
        let fields = values.into_iter().map(constant).collect();
        PiecewiseConstant::new(times, fields).unwrap()
    };
    let fields = vec![
        inner(&[0.0, 0.25, 0.5], vec![1.0, 3.0]),
        inner(&[0.0, 0.75, 1.0], vec![-1.0, 2.0]),
    ];
    let field = PiecewiseConstant::new(&[0.0, 0.5, 1.0], fields).unwrap();
    let y0 = Tensor::zeros(1, DType::F64, &Device::Cpu).unwrap();
    let ys: Tensor = odeint(field, &y0, &[0.0, 1.0], &OdeOptions::default()).unwrap();
    // ∫ f = (1 + 3 − 1 + 2)/4.
    assert_eq!(values(&ys.get(1).unwrap()), [1.25]);
}
