//! The check of a field's pull-back against differences: it finds what is wrong, and leaves alone what is
//! sound.

mod common;

use candle_core::{DType, Device, IndexOp, Module, Tensor, Var, D};
use candle_diffeq::fields::{autonomous, check_field, Cotangents, FieldCheck, Pullback};
use candle_diffeq::options::{Output, Steps};
use candle_diffeq::tableau::EULER;
use candle_diffeq::{odeint, Error, NeuralOde, OdeOptions, Precision, Time, VectorField};
use candle_nn::{embedding, linear, Init, VarBuilder, VarMap};
use common::{bits, fill, named, relative, scattered, values, var, U_F32, U_F64};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

fn wrong(result: candle_diffeq::Result<impl std::fmt::Debug>) -> String {
    match result {
        Err(Error::WrongPullback { of, .. }) => of,
        other => panic!("expected WrongPullback, got {other:?}"),
    }
}

fn f32s(shape: &[usize], seed: usize) -> Tensor {
    scattered(shape, 1.0, seed).to_dtype(DType::F32).unwrap()
}

#[test]
fn a_layer_without_a_backward_operation_is_found_beside_a_skip() {
    // Self-attention, in which candle_nn's softmax over the last dimension records nothing.
    let build = |sound: bool| {
        let vars = VarMap::new();
        let ode = NeuralOde::new(&vars, "f", &Device::Cpu, move |vb| {
            let q = linear(4, 4, vb.pp("q"))?;
            let k = linear(4, 4, vb.pp("k"))?;
            let v = linear(4, 4, vb.pp("v"))?;
            Ok(move |y: &Tensor| {
                let scores = q.forward(y)?.matmul(&k.forward(y)?.t()?)?;
                let attention = match sound {
                    true => candle_nn::ops::softmax(&scores, D::Minus1)?,
                    false => candle_nn::ops::softmax_last_dim(&scores)?,
                };
                attention.matmul(&v.forward(y)?)? - y
            })
        });
        (vars, ode.unwrap())
    };
    let y0 = f32s(&[2, 3, 4], 1);
    let (vars, ode) = build(false);
    common::scatter(&vars);
    let of = wrong(ode.solve(&y0, &[0.0, 0.5, 1.0]));
    assert!(of.starts_with("parameter f."), "{of}");
    let error = ode.solve(&y0, &[0.0, 0.5, 1.0]).unwrap_err().to_string();
    assert!(error.contains("nn::softmax"), "{error}");
    let (vars, ode) = build(true);
    common::scatter(&vars);
    let grads = ode.solve(&y0, &[0.0, 0.5, 1.0]).unwrap();
    let grads = grads.i(2).unwrap().sqr().unwrap().sum_all().unwrap();
    let grads = grads.backward().unwrap();
    assert!(vars.all_vars().iter().all(|v| grads.get(v).is_some()));
}

/// tanh of a convolution over one dimension.
fn convolution(w: &Tensor, y: &Tensor) -> candle_core::Result<Tensor> {
    y.conv1d(w, 1, 1, 1, 1)?.tanh()
}

#[test]
fn a_wrong_filter_gradient_is_found_in_a_model_and_in_a_closure() {
    let y0 = scattered(&[2, 3, 8], 0.4, 1);
    let vars = VarMap::new();
    let ode = NeuralOde::from_field(&vars, "f", DType::F64, &Device::Cpu, |vb| {
        let w = vb.get((3, 3, 3), "w")?;
        Ok(move |_: &Time, y: &Tensor| convolution(&w, y))
    })
    .unwrap();
    common::scatter(&vars);
    assert_eq!(wrong(ode.solve(&y0, &[0.0, 1.0])), "parameter f.w");

    let w = var(&[3, 3, 3], 0.4, 2);
    let before = bits(&w);
    let captured = w.clone();
    let field = move |_: &Time, y: &Tensor| convolution(&captured, y);
    let of = wrong(odeint(
        field.clone(),
        &y0,
        &[0.0, 1.0],
        &OdeOptions::default(),
    ));
    assert!(of.contains("variable 0"), "{of}");
    assert!(wrong(check_field(&field, 0.0, &y0)).contains("parameter 0"));
    assert_eq!(bits(&w), before);
    // A batch of one is right.
    let one = y0.narrow(0, 0, 1).unwrap();
    check_field(&field, 0.0, &one).unwrap();
    odeint(field, &one, &[0.0, 1.0], &OdeOptions::default()).unwrap();
    assert_eq!(bits(&w), before);
}

#[test]
fn a_constructor_that_draws_is_found() {
    let vars = VarMap::new();
    let ode = NeuralOde::new(&vars, "f", &Device::Cpu, |vb| {
        let frequencies = Tensor::randn(0f32, 1.0, (4, 32), vb.device())?;
        let l = linear(32, 4, vb.pp("l"))?;
        Ok(move |y: &Tensor| l.forward(&y.matmul(&frequencies)?.sin()?))
    })
    .unwrap();
    let got = ode.solve(&f32s(&[1, 4], 1), &[0.0, 1.0]);
    assert!(matches!(got, Err(Error::NotDeterministic { leaf: 0, t }) if t == 0.0));
}

#[test]
fn dropout_is_found() {
    let dropout = candle_nn::Dropout::new(0.5);
    let w = var(&[8, 8], 0.5, 1);
    let field = move |_: &Time, y: &Tensor| dropout.forward(&y.matmul(w.as_tensor())?, true);
    let y0 = scattered(&[4, 8], 1.0, 2);
    let got = odeint(field, &y0, &[0.0, 1.0], &OdeOptions::default());
    assert!(matches!(got, Err(Error::NotDeterministic { .. })));
}

#[test]
fn a_field_that_starts_to_detach_later_in_the_solve_is_found() {
    // Of the state only: the parameter is still connected.
    let (w, y0) = (var(&[2, 2], 0.7, 1), var(&[3, 2], 1.0, 2));
    let late = |y: &Tensor, t: f64| match t > 0.3 {
        true => y.detach(),
        false => y.clone(),
    };
    let captured = w.clone();
    let field = move |t: &Time, y: &Tensor| late(y, t.value()).matmul(captured.as_tensor())?.tanh();
    let got = odeint(
        field,
        y0.as_tensor(),
        &[0.0, 0.25, 0.5],
        &OdeOptions::default(),
    );
    assert!(matches!(got, Err(Error::UntrackedVelocity { t }) if t > 0.3 && t <= 0.5));
    // Of one of two paths: candle still sees the other.
    let field = move |t: &Time, y: &Tensor| late(y, t.value()).tanh()? - y;
    let got = odeint(
        field,
        y0.as_tensor(),
        &[0.0, 0.25, 0.5],
        &OdeOptions::default(),
    );
    assert_eq!(wrong(got), "state tensor 0");
}

#[test]
fn a_detached_state_is_found_where_a_fixed_distance_would_not_move_it() {
    // 1.25 y + 0.25 = y at y = −1.
    let y0 = Tensor::full(-1f64, (2, 2), &Device::Cpu).unwrap();
    let w = var(&[2, 2], 0.7, 1);
    let field = move |_: &Time, y: &Tensor| y.detach().matmul(w.as_tensor())?.tanh();
    let got = odeint(field, &y0, &[0.0, 1.0], &OdeOptions::default());
    assert!(matches!(got, Err(Error::UntrackedVelocity { .. })));
}

#[test]
fn a_hand_written_pullback_with_a_wrong_sign_is_found() {
    struct Turned;
    impl VectorField for Turned {
        fn velocity(&self, _: &Time, y: &Tensor) -> candle_core::Result<Tensor> {
            y.sin()
        }
        fn vjp(&self, t: &Time, y: &Tensor) -> candle_core::Result<(Tensor, Pullback<'_, Tensor>)> {
            let (k, slope) = (self.velocity(t, y)?, y.cos()?.neg()?);
            Ok((
                k,
                Box::new(move |v| Ok(Cotangents::of_state((v * &slope)?))),
            ))
        }
        fn parameters(&self) -> Option<Vec<Tensor>> {
            Some(vec![])
        }
    }
    let y0 = var(&[5], 1.0, 1);
    assert_eq!(
        wrong(check_field(&Turned, 0.0, y0.as_tensor())),
        "state tensor 0"
    );
    let got = odeint(Turned, y0.as_tensor(), &[0.0, 1.0], &OdeOptions::default());
    assert_eq!(wrong(got), "state tensor 0");
}

#[test]
fn a_time_gradient_that_is_missing_is_found() {
    let field = |t: &Time, y: &Tensor| {
        let t = t.tensor()?.detach();
        y.broadcast_mul(&t.to_dtype(y.dtype())?.cos()?)
    };
    let y0 = scattered(&[3], 1.0, 1);
    assert_eq!(wrong(check_field(&field, 0.7, &y0)), "time");
    let times = Var::new(&[0.5f64, 1.0], &Device::Cpu).unwrap();
    assert_eq!(
        wrong(odeint(field, &y0, &times, &OdeOptions::default())),
        "time"
    );
    // Nobody asks for it here.
    odeint(field, &y0, &[0.5, 1.0], &OdeOptions::default()).unwrap();
}

#[test]
fn a_class_label_in_the_state_is_no_fault() {
    let vars = VarMap::new();
    let ode =
        NeuralOde::<(Tensor, Tensor)>::from_field(&vars, "f", DType::F32, &Device::Cpu, |vb| {
            let (e, l) = (embedding(10, 4, vb.pp("e"))?, linear(6, 2, vb.pp("l"))?);
            Ok(move |_: &Time, (y, label): &(Tensor, Tensor)| {
                let e = e.forward(&label.to_dtype(DType::U32)?)?;
                let k = l.forward(&Tensor::cat(&[y, &e], 1)?)?.tanh()?;
                Ok((k, label.zeros_like()?))
            })
        })
        .unwrap();
    let y0 = Tensor::ones((3, 2), DType::F32, &Device::Cpu).unwrap();
    let label = Tensor::new(&[7f32, 8.0, 9.0], &Device::Cpu).unwrap();
    let (ys, labels) = ode.solve(&(y0, label.clone()), &[0.0, 1.0]).unwrap();
    assert_eq!(values(&labels.i(1).unwrap()), values(&label));
    let grads = ys.i(1).unwrap().sum_all().unwrap().backward().unwrap();
    // The rows of the table that were read have gradients, the others zero.
    let table = values(grads.get(&named(&vars, "f.e.weight")).unwrap());
    let rows: Vec<_> = table
        .chunks(4)
        .map(|row| row.iter().any(|g| *g != 0.0))
        .collect();
    assert_eq!(rows, [vec![false; 7], vec![true; 3]].concat());
}

#[test]
fn a_thermostat_and_a_sign_have_the_derivative_zero() {
    // Whatever side of the threshold, however many elements are near it.
    for n in [2usize, 4096] {
        for at in [0.45, 0.4999, 0.5, 0.5001, 2.0] {
            let y0 = Tensor::full(at, n, &Device::Cpu).unwrap();
            let y0 = (y0 + scattered(&[n], 0.05, 3)).unwrap();
            let y0 = Var::from_tensor(&y0).unwrap();
            let count = y0.zeros_like().unwrap();
            let field = |_: &Time, (y, _count): &(Tensor, Tensor)| {
                Ok((y.neg()?, y.gt(0.5)?.to_dtype(y.dtype())?))
            };
            let state = (y0.as_tensor().clone(), count);
            let (ys, counts) =
                odeint(field, &state, &[0.0, 0.5, 1.0], &OdeOptions::default()).unwrap();
            let loss = (ys.i(2).unwrap() + counts.i(2).unwrap()).unwrap();
            let grads = loss.sum_all().unwrap().backward().unwrap();
            // RK4's e^−½ twice.
            let step: f64 = 1.0 - 0.5 + 0.125 - 0.125 / 6.0 + 0.0625 / 24.0;
            let exact = Tensor::full(step * step, n, &Device::Cpu).unwrap();
            assert!(relative(grads.get(&y0).unwrap(), &exact) <= 16.0 * U_F64);
        }
    }
}

#[test]
fn a_field_that_is_off_for_part_of_the_time_is_solved_with_its_gradients() {
    let run = |zero: fn(&Tensor) -> candle_core::Result<Tensor>| {
        let (k, y0) = (var(&[1], 0.7, 1), var(&[2], 1.0, 2));
        let rate = k.clone();
        let field = move |t: &Time, y: &Tensor| match t.value() < 0.5 {
            true => y.broadcast_mul(rate.as_tensor())?.neg(),
            false => zero(y),
        };
        let options = OdeOptions {
            steps: Steps::Size(0.1),
            ..Default::default()
        };
        let ys = odeint(field, y0.as_tensor(), &[0.0, 0.5, 1.0], &options).unwrap();
        let grads = ys.i(2).unwrap().sqr().unwrap().sum_all().unwrap();
        let grads = grads.backward().unwrap();
        [
            bits(&ys),
            bits(grads.get(&k).unwrap()),
            bits(grads.get(&y0).unwrap()),
        ]
    };
    assert_eq!(run(|y| y.zeros_like()), run(|y| y * 0.0));
}

#[test]
fn a_table_of_times_needs_no_declaration() {
    let field = |t: &Time, y: &Tensor| y.ones_like()? * (2.0 * t.value());
    let y0 = Var::new(&[1f64], &Device::Cpu).unwrap();
    let ys = odeint(field, y0.as_tensor(), &[0.0, 3.0], &OdeOptions::default()).unwrap();
    assert!((values(&ys)[1] - 10.0).abs() < 1e-14);
    let grads = ys.i(1).unwrap().sum_all().unwrap().backward().unwrap();
    assert_eq!(values(grads.get(&y0).unwrap()), [1.0]);
}

#[test]
fn a_parameter_without_a_gradient_is_lost_unless_it_is_frozen() {
    let build = |detached: bool| {
        let vars = VarMap::new();
        let ode = NeuralOde::from_field(&vars, "f", DType::F64, &Device::Cpu, move |vb| {
            let (w, frozen) = (vb.get((2, 2), "w")?, vb.get((2, 2), "frozen")?);
            let frozen = if detached { frozen.detach() } else { frozen };
            Ok(move |_: &Time, y: &Tensor| y.matmul(&w)?.tanh()? + y.matmul(&frozen)?)
        })
        .unwrap();
        common::scatter(&vars);
        (vars, ode)
    };
    let (_, ode) = build(true);
    let lost = wrong(ode.solve(&scattered(&[3, 2], 1.0, 1), &[0.0, 1.0]));
    assert_eq!(lost, "parameter f.frozen");
    assert!(ode.freeze(&["f.frozen", "f.other"]).is_err());
    // softmax of a parameter: nothing of it depends on the state.
    let gates = VarMap::new();
    let ode = NeuralOde::from_field(&gates, "f", DType::F64, &Device::Cpu, |vb| {
        let (w, g) = (vb.get((2, 2), "w")?, vb.get(2, "gates")?);
        Ok(move |_: &Time, y: &Tensor| {
            let gates = candle_nn::ops::softmax_last_dim(&g)?;
            y.matmul(&w)?.tanh()?.broadcast_mul(&gates)
        })
    })
    .unwrap();
    common::scatter(&gates);
    let lost = wrong(ode.solve(&scattered(&[3, 2], 1.0, 1), &[0.0, 1.0]));
    assert_eq!(lost, "parameter f.gates");

    for detached in [true, false] {
        let (vars, ode) = build(detached);
        let ode = ode.freeze(&["f.frozen"]).unwrap();
        let ys = ode.solve(&scattered(&[3, 2], 1.0, 1), &[0.0, 1.0]).unwrap();
        let grads = ys.sqr().unwrap().sum_all().unwrap().backward().unwrap();
        assert!(grads.get(&named(&vars, "f.w")).is_some());
        assert!(grads.get(&named(&vars, "f.frozen")).is_none());
    }
}

#[test]
fn a_detach_that_comes_and_goes_is_found() {
    let b = var(&[2], 0.5, 3);
    let field = move |t: &Time, y: &Tensor| {
        let drift = b.as_tensor().broadcast_as(y.shape())?;
        match t.value() > 0.55 && t.value() < 0.9 {
            true => y.detach().tanh()? + drift,
            false => Ok(drift),
        }
    };
    let options = OdeOptions {
        method: EULER,
        steps: Steps::PerInterval(20),
        ..Default::default()
    };
    let y0 = var(&[3, 2], 1.0, 1);
    let got = odeint(field, y0.as_tensor(), &[0.0, 1.0], &options);
    assert!(matches!(got, Err(Error::UntrackedVelocity { .. })));
}

#[test]
fn every_tensor_of_the_velocity_is_asked_for_its_own_path() {
    // dz reads z, dl reads it detached: a log-density by backward() inside the field.
    let field =
        |_: &Time, (z, _): &(Tensor, Tensor)| Ok((z.tanh()?, z.detach().sqr()?.sum_keepdim(1)?));
    let y0 = (scattered(&[3, 2], 1.0, 1), scattered(&[3, 1], 1.0, 2));
    let y0 = (Var::from_tensor(&y0.0).unwrap(), y0.1);
    let state = (y0.0.as_tensor().clone(), y0.1);
    let options = OdeOptions {
        check: FieldCheck::Never,
        ..Default::default()
    };
    let got = odeint(field, &state, &[0.0, 1.0], &options);
    assert!(matches!(got, Err(Error::UntrackedVelocity { .. })));
}

#[test]
fn what_a_field_cannot_do_is_an_error_of_its_check() {
    let y = scattered(&[3, 4], 1.0, 1);
    let short = |_: &Time, y: &Tensor| y.sum_all()?.tanh();
    assert!(matches!(
        check_field(&short, 0.0, &y),
        Err(Error::ShapeChanged { .. })
    ));
    let detached = |_: &Time, y: &Tensor| y.detach().tanh();
    assert!(matches!(
        check_field(&detached, 0.0, &y),
        Err(Error::UntrackedVelocity { .. })
    ));
}

#[test]
fn time_is_checked_at_the_first_grid_that_asks_for_its_gradient() {
    let vars = VarMap::new();
    let ode = NeuralOde::from_field(&vars, "f", DType::F64, &Device::Cpu, |vb| {
        let w = vb.get((2, 2), "w")?;
        Ok(move |t: &Time, y: &Tensor| y.matmul(&w)?.broadcast_mul(&t.tensor()?.detach().cos()?))
    })
    .unwrap();
    common::scatter(&vars);
    let y0 = scattered(&[3, 2], 1.0, 1);
    ode.solve(&y0, &[0.5, 1.0]).unwrap();
    let times = Var::new(&[0.5f64, 1.0], &Device::Cpu).unwrap();
    assert_eq!(wrong(ode.solve(&y0, &times)), "time");
}

#[test]
fn a_class_is_never_moved_off_itself() {
    let field = |_: &Time, (y, class): &(Tensor, Tensor)| {
        let seen = class.to_vec1::<f32>()?;
        assert_eq!(seen, [5000.0, 7.0]);
        Ok((y.tanh()?, class.zeros_like()?))
    };
    let y0 = f32s(&[2, 3], 1);
    let class = Tensor::new(&[5000f32, 7.0], &Device::Cpu).unwrap();
    check_field(&field, 0.0, &(y0.clone(), class.clone())).unwrap();
    let y0 = Var::from_tensor(&y0).unwrap();
    let state = (y0.as_tensor().clone(), class);
    odeint(field, &state, &[0.0, 1.0], &OdeOptions::default()).unwrap();
}

#[test]
fn roundings_inside_a_field_raise_no_alarm() {
    for seed in 0..60 {
        let w = f32s(&[3, 3], 200 + seed);
        let field = move |_: &Time, y: &Tensor| {
            let z = y.matmul(&w)?.to_dtype(DType::BF16)?.tanh()?;
            z.to_dtype(DType::F32)?.matmul(&w)
        };
        check_field(&field, 0.0, &f32s(&[3, 3], seed)).unwrap();
    }
}

#[test]
fn tensors_that_share_a_velocity_cancel_and_are_no_fault() {
    // Along cotangents of opposite sign both numbers are exactly zero.
    for seed in 0..40 {
        let state = (scattered(&[1], 1.0, seed), scattered(&[1], 1.0, seed + 50));
        let field = |_: &Time, (a, b): &(Tensor, Tensor)| {
            let k = (a * b)?.sin()?;
            Ok((k.clone(), k))
        };
        check_field(&field, 0.0, &state).unwrap();
    }
}

#[test]
fn a_constant_field_keeps_the_gradients_of_its_parameters() {
    let w = Var::new(0.5f64, &Device::Cpu).unwrap();
    let captured = w.clone();
    let field = candle_diffeq::fields::constant(move |_: &Time, y: &Tensor| {
        y.detach().sin()?.broadcast_mul(captured.as_tensor())
    });
    let y0 = var(&[2], 1.0, 1);
    let options = OdeOptions {
        method: EULER,
        ..Default::default()
    };
    let ys = odeint(field, y0.as_tensor(), &[0.0, 1.0], &options).unwrap();
    let grads = ys.i(1).unwrap().sum_all().unwrap().backward().unwrap();
    assert_eq!(values(grads.get(&y0).unwrap()), [1.0, 1.0]);
    let exact = y0.sin().unwrap().sum_all().unwrap();
    assert!(relative(grads.get(&w).unwrap(), &exact) <= 4.0 * U_F64);
}

#[test]
fn straight_through_estimators_are_left_alone() {
    // y rounded to halves on the way forward, the identity on the way back.
    let field = |_: &Time, y: &Tensor| {
        let rounded = ((y * 2.0)?.round()? * 0.5)?;
        (y + (rounded - y)?.detach())?.neg()
    };
    let y0 = var(&[40], 3.0, 1);
    let ys = odeint(
        field,
        y0.as_tensor(),
        &[0.0, 0.5, 1.0],
        &OdeOptions::default(),
    )
    .unwrap();
    assert!(ys.sum_all().unwrap().backward().is_ok());
}

#[test]
fn the_check_can_be_turned_off_and_asked_for_always() {
    let build = |check| {
        let vars = VarMap::new();
        let ode = NeuralOde::from_field(&vars, "f", DType::F64, &Device::Cpu, |vb| {
            let w = vb.get((3, 3, 3), "w")?;
            Ok(move |t: &Time, y: &Tensor| match t.value() < 1.5 {
                true => y * w.mean_all()?.broadcast_as(y.shape())?,
                false => convolution(&w, y),
            })
        })
        .unwrap();
        common::scatter(&vars);
        ode.options(OdeOptions {
            check,
            ..Default::default()
        })
    };
    let y0 = scattered(&[2, 3, 8], 0.4, 1);
    let never = build(FieldCheck::Never);
    never.solve(&y0, &[2.0, 3.0]).unwrap();
    // Sound at the first solve, wrong at the second: only the first is looked at.
    let once = build(FieldCheck::Once);
    once.solve(&y0, &[0.0, 1.0]).unwrap();
    once.solve(&y0, &[2.0, 3.0]).unwrap();
    let always = build(FieldCheck::Always);
    always.solve(&y0, &[0.0, 1.0]).unwrap();
    assert_eq!(wrong(always.solve(&y0, &[2.0, 3.0])), "parameter f.w");
}

#[test]
fn a_checked_solve_has_the_bits_of_one_that_is_not() {
    let run = |check| {
        let vars = VarMap::new();
        let ode = NeuralOde::from_field(&vars, "f", DType::F32, &Device::Cpu, |vb| {
            let net = common::Net::new(vb)?;
            Ok(move |t: &Time, y: &Tensor| net.rhs(&t.tensor()?, y))
        })
        .unwrap()
        .options(OdeOptions {
            check,
            ..Default::default()
        });
        common::scatter(&vars);
        let y0 = Var::from_tensor(&f32s(&[5, 2], 1)).unwrap();
        let ys = ode.solve(y0.as_tensor(), &[0.0, 0.5, 1.0]).unwrap();
        let grads = ys.sqr().unwrap().sum_all().unwrap().backward().unwrap();
        let mut all = vec![bits(&ys), bits(grads.get(&y0).unwrap())];
        for (_, var) in common::all(&vars) {
            all.push(bits(grads.get(&var).unwrap()));
        }
        all
    };
    assert_eq!(run(FieldCheck::Never), run(FieldCheck::Always));
}

/// A random sound field over (rows, features), of a few of the things that models are made of.
fn random_field(
    seed: u64,
    features: usize,
    vb: &VarBuilder<'_>,
) -> candle_core::Result<impl Fn(&Time, &Tensor) -> candle_core::Result<Tensor>> {
    let mut rng = StdRng::seed_from_u64(seed);
    let hidden = rng.random_range(1..24);
    let zero_bias = rng.random::<bool>();
    let uniform = Init::Uniform { lo: -1.0, up: 1.0 };
    let first = vb.get_with_hints((hidden, features), "first", uniform)?;
    let bias = match zero_bias {
        true => vb.get_with_hints(hidden, "zero", Init::Const(0.0))?,
        false => vb.get_with_hints(hidden, "bias", uniform)?,
    };
    let second = vb.get_with_hints((features, hidden), "second", uniform)?;
    let table = vb.get_with_hints((7, features), "table", uniform)?;
    let kinds: Vec<u32> = (0..4).map(|_| rng.random_range(0..10)).collect();
    Ok(move |t: &Time, y: &Tensor| {
        let z = y.matmul(&first.t()?)?.broadcast_add(&bias)?;
        let h = match kinds[0] {
            0 => z.relu()?,
            1 => z.tanh()?,
            2 => z.abs()?,
            3 => z.clamp(-0.5, 0.5)?,
            4 => z.gelu_erf()?,
            5 => z.sin()?,
            6 => z.maximum(&(&z * 0.1)?)?,
            7 => (z.sign()? + &z)?,
            8 => z.silu()?,
            _ => z.floor()?.detach(),
        };
        let k = h.matmul(&second.t()?)?;
        match kinds[1] {
            0 => Ok(k),
            1 => k - y,
            2 => k * (y.gt(0.0)?.to_dtype(y.dtype())?),
            3 => k.broadcast_mul(&t.tensor()?.to_dtype(y.dtype())?.cos()?),
            4 => {
                let class = (y.sum(1)?.abs()? * 2.0)?
                    .clamp(0.0, 6.0)?
                    .to_dtype(DType::U32)?;
                k + table.index_select(&class, 0)?
            }
            5 => y.zeros_like(),
            6 => k.relu(),
            7 => y.ones_like()? * t.value(),
            _ => k.tanh(),
        }
    })
}

#[test]
fn two_hundred_random_sound_fields_raise_no_alarm() {
    for seed in 0..200u64 {
        let mut rng = StdRng::seed_from_u64(1000 + seed);
        let (rows, features) = (rng.random_range(1..40), rng.random_range(1..8));
        // Some states hold zeros, integers, or are zero altogether.
        let y0 = scattered(&[rows, features], 2.0, seed as usize);
        let y0 = match seed % 5 {
            0 => y0.round().unwrap(),
            1 => y0.relu().unwrap(),
            2 if seed % 10 == 2 => y0.zeros_like().unwrap(),
            _ => y0,
        };
        for (name, precision) in [
            ("f32", Precision::f32()),
            ("bf16", Precision::bf16()),
            ("f16", Precision::f16()),
        ] {
            let vars = VarMap::new();
            let ode = NeuralOde::from_field(&vars, "f", DType::F32, &Device::Cpu, move |vb| {
                random_field(seed, features, &vb)
            })
            .unwrap();
            fill(&vars);
            if let Some(zero) = vars.data().lock().unwrap().get("f.zero") {
                zero.set(&zero.zeros_like().unwrap()).unwrap();
            }
            let ode = ode.options(OdeOptions {
                precision: Some(precision),
                check: FieldCheck::Always,
                output: Output::Final,
                steps: Steps::PerInterval(3),
                ..Default::default()
            });
            let y0 = Var::from_tensor(&y0.to_dtype(DType::F32).unwrap()).unwrap();
            let y = ode.solve(y0.as_tensor(), &[0.0, 0.5]);
            let y = y.unwrap_or_else(|e| panic!("seed {seed}, {name}: {e}"));
            y.sum_all().unwrap().backward().unwrap();
        }
    }
}

#[test]
fn every_other_random_field_with_a_detached_path_is_found() {
    // One of two smooth paths from y is cut; what is left is never more than nine tenths.
    for seed in 0..60usize {
        let (w, u) = (var(&[4, 4], 1.0, seed), var(&[4, 4], 1.0, 100 + seed));
        let field = move |_: &Time, y: &Tensor| {
            let cut = y.detach().matmul(w.as_tensor())?.tanh()?;
            cut + y.matmul(u.as_tensor())?.sin()?
        };
        let y0 = f32s(&[6, 4], seed).to_dtype(DType::F64).unwrap();
        let of = wrong(check_field(&field, 0.0, &y0));
        assert_eq!(of, "state tensor 0", "seed {seed}");
    }
}

#[test]
fn a_module_without_time_is_checked_as_a_field() {
    let vars = VarMap::new();
    let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
    let norm = candle_nn::layer_norm(4, 1e-5, vb.pp("norm")).unwrap();
    let l = linear(4, 4, vb.pp("l")).unwrap();
    let module = move |y: &Tensor| l.forward(&norm.forward(y)?)? - y;
    let of = wrong(check_field(&autonomous(module), 0.0, &f32s(&[3, 4], 1)));
    assert!(
        of.starts_with("parameter") || of == "state tensor 0",
        "{of}"
    );
    let _ = U_F32;
}
