//! Arguments of a field: differentiated like parameters, at the cost of one pass through their history.

mod common;

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::Arc;

use candle_core::{
    CpuStorage, CustomOp1, DType, Device, IndexOp, Layout, Module, Shape, Tensor, Var, D,
};
use candle_diffeq::fields::FieldWithArgs;
use candle_diffeq::metrics::Recorder;
use candle_diffeq::nn::{Activation, ConditionalMlp};
use candle_diffeq::options::{Checkpoint, Output, Steps};
use candle_diffeq::{
    odeint, odeint_with, solution_with, Error, NeuralOde, OdeOptions, Precision, Time,
};
use candle_nn::{linear, VarBuilder, VarMap};
use common::{all, bits, fill, relative, scattered, values, var, U_BF16, U_F64};

fn field(_: &Time, y: &Tensor, a: &Tensor) -> candle_core::Result<Tensor> {
    (y * a)?.sin()
}

fn options() -> OdeOptions {
    OdeOptions {
        steps: Steps::PerInterval(5),
        ..Default::default()
    }
}

fn loss(ys: &Tensor) -> Tensor {
    ys.sqr().unwrap().sum_all().unwrap()
}

#[test]
fn the_gradient_of_an_argument_is_that_of_a_captured_tensor() {
    let (y0, a) = (var(&[3, 2], 1.0, 1), var(&[3, 2], 1.0, 2));
    let ys = odeint_with(
        field,
        y0.as_tensor(),
        a.as_tensor(),
        &[0.0, 0.5, 1.0],
        &options(),
    );
    let grads = loss(&ys.unwrap()).backward().unwrap();
    let captured = a.clone();
    let same = move |t: &Time, y: &Tensor| field(t, y, captured.as_tensor());
    let ys = odeint(same, y0.as_tensor(), &[0.0, 0.5, 1.0], &options()).unwrap();
    let expected = loss(&ys).backward().unwrap();
    for x in [&y0, &a] {
        let (got, expected) = (grads.get(x).unwrap(), expected.get(x).unwrap());
        assert!(relative(got, expected) <= 4.0 * U_F64);
    }
}

#[test]
fn all_plans_give_the_same_bits_and_a_solution_the_same_gradient() {
    let (y0, a) = (scattered(&[3, 2], 1.0, 1), var(&[3, 2], 1.0, 2));
    let run = |checkpoint| {
        let options = OdeOptions {
            checkpoint,
            ..options()
        };
        let ys = odeint_with(field, &y0, a.as_tensor(), &[0.0, 1.0], &options).unwrap();
        bits(loss(&ys).backward().unwrap().get(&a).unwrap())
    };
    let whole = run(Checkpoint::All);
    for plan in [Checkpoint::Every(2), Checkpoint::States(2)] {
        assert_eq!(run(plan), whole);
    }
    // Without a graph an argument has a gradient whether it is tracked or not.
    let plain = a.as_detached_tensor();
    let solution = solution_with(&field, &y0, &plain, &[0.0, 1.0], &options()).unwrap();
    let cotangent = (solution.states() * 2.0).unwrap();
    let grads = solution.vjp(&cotangent).unwrap();
    assert_eq!(bits(grads.params.get(&plain).unwrap()), whole);
}

/// The identity, which counts how often a gradient passes.
struct Counted(Arc<AtomicUsize>);

impl CustomOp1 for Counted {
    fn name(&self) -> &'static str {
        "counted"
    }

    fn cpu_fwd(&self, x: &CpuStorage, l: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        use candle_core::backend::BackendStorage;
        Ok((x.try_clone(l)?, l.shape().clone()))
    }

    fn bwd(&self, _: &Tensor, _: &Tensor, g: &Tensor) -> candle_core::Result<Option<Tensor>> {
        self.0.fetch_add(1, Ordering::SeqCst);
        Ok(Some(g.clone()))
    }
}

#[test]
fn an_encoder_is_differentiated_once_a_solve() {
    let passes = Arc::new(AtomicUsize::new(0));
    let vars = VarMap::new();
    let vb = VarBuilder::from_varmap(&vars, DType::F64, &Device::Cpu);
    let encoder = linear(5, 2, vb.pp("encoder")).unwrap();
    let ode = NeuralOde::with_args(&vars, "f", DType::F64, &Device::Cpu, |vb| {
        let l = linear(4, 2, vb)?;
        Ok(move |_: &Time, y: &Tensor, a: &Tensor| {
            l.forward(&Tensor::cat(&[y, a], D::Minus1)?)?.tanh()
        })
    })
    .unwrap()
    .options(options());
    common::scatter(&vars);
    let (x, y0) = (scattered(&[3, 5], 1.0, 1), scattered(&[3, 2], 1.0, 2));
    let context = encoder.forward(&x).unwrap();
    let context = context.apply_op1(Counted(passes.clone())).unwrap();
    let ys = ode.given(&context).solve(&y0, &[0.0, 0.5, 1.0]).unwrap();
    let grads = loss(&ys).backward().unwrap();
    assert_eq!(passes.load(Ordering::SeqCst), 1);
    // As with the encoder inside the field, at every stage.
    let l = linear(
        4,
        2,
        VarBuilder::from_varmap(&vars, DType::F64, &Device::Cpu).pp("f"),
    )
    .unwrap();
    let inside = move |_: &Time, y: &Tensor| {
        let a = encoder.forward(&x)?;
        l.forward(&Tensor::cat(&[y, &a], D::Minus1)?)?.tanh()
    };
    let ys = odeint(inside, &y0, &[0.0, 0.5, 1.0], &options()).unwrap();
    let expected = loss(&ys).backward().unwrap();
    for (name, var) in all(&vars) {
        let error = relative(grads.get(&var).unwrap(), expected.get(&var).unwrap());
        assert!(error <= 64.0 * U_F64, "{name}: {error}");
    }
}

#[test]
fn a_perceptron_of_ours_with_arguments_is_the_closure_of_its_layers() {
    for (time, widths) in [
        (false, vec![2, 2]),
        (true, vec![2, 6, 2]),
        (false, vec![2, 5, 7, 2]),
    ] {
        let (vars, names) = (VarMap::new(), widths.clone());
        let ours =
            NeuralOde::with_args(&vars, "f", DType::F64, &Device::Cpu, move |vb| match time {
                true => ConditionalMlp::with_time(&names, 3, Activation::Silu, vb),
                false => ConditionalMlp::new(&names, 3, Activation::Silu, vb),
            });
        let ours = ours.unwrap().options(options());
        common::scatter(&vars);
        let plain = NeuralOde::with_args(&vars, "f", DType::F64, &Device::Cpu, move |vb| {
            let layer = |(i, w): (usize, &[usize])| {
                let more = if i == 0 { 3 + usize::from(time) } else { 0 };
                linear(w[0] + more, w[1], vb.pp(i))
            };
            let layers = widths.windows(2).enumerate().map(layer);
            let layers = layers.collect::<candle_core::Result<Vec<_>>>()?;
            Ok(move |t: &Time, y: &Tensor, a: &Tensor| {
                let mut x = Tensor::cat(&[y, a], 1)?;
                if time {
                    let t = t.tensor()?.broadcast_as((y.dim(0)?, 1))?;
                    x = Tensor::cat(&[&x, &t], 1)?;
                }
                for (l, layer) in layers.iter().enumerate() {
                    x = layer.forward(&x)?;
                    if l + 1 < layers.len() {
                        x = x.silu()?;
                    }
                }
                Ok(x)
            })
        });
        let plain = plain.unwrap().options(options());
        let (y0, a) = (var(&[4, 2], 1.0, 1), var(&[4, 3], 1.0, 2));
        let times = Var::new(&[0.0, 0.4, 1.0], &Device::Cpu).unwrap();
        let run = |ode: &NeuralOde<Tensor, Tensor>| {
            let ys = ode
                .given(a.as_tensor())
                .solve(y0.as_tensor(), &times)
                .unwrap();
            let grads = loss(&ys).backward().unwrap();
            (ys, grads)
        };
        let ((ys, grads), (expected, expected_grads)) = (run(&ours), run(&plain));
        assert!(relative(&ys, &expected) <= 64.0 * U_F64);
        let mut of = vec![("y0".to_owned(), y0.clone()), ("a".to_owned(), a.clone())];
        of.push(("t".to_owned(), times.clone()));
        of.extend(all(&vars));
        for (name, x) in of {
            let (got, exact) = (grads.get(&x).unwrap(), expected_grads.get(&x).unwrap());
            let error = relative(got, exact);
            assert!(error <= 256.0 * U_F64, "{name}: {error:e}");
        }
        let wrong = scattered(&[4, 2], 1.0, 1);
        let error = ours.given(&wrong).solve(y0.as_tensor(), &[0.0, 1.0]);
        assert!(matches!(error, Err(Error::FieldState { .. })));
    }
}

#[test]
fn arguments_are_any_tensors_and_integers_arrive_as_they_are() {
    let table = var(&[4, 2], 1.0, 1);
    let (class, gain) = (
        Tensor::new(&[3u32, 0, 2], &Device::Cpu).unwrap(),
        var(&[1], 1.0, 2),
    );
    let captured = table.clone();
    let f = move |_: &Time, y: &Tensor, (class, gain): &(Tensor, Tensor)| {
        assert_eq!(class.dtype(), DType::U32);
        y.broadcast_mul(gain)? + captured.index_select(class, 0)?
    };
    let y0 = scattered(&[3, 2], 1.0, 3);
    let args = (class, gain.as_tensor().clone());
    let ys = odeint_with(f, &y0, &args, &[0.0, 1.0], &options()).unwrap();
    let grads = loss(&ys).backward().unwrap();
    assert!(grads.get(&gain).is_some());
    let read: Vec<_> = values(grads.get(&table).unwrap())
        .chunks(2)
        .map(|row| row.iter().any(|g| *g != 0.0))
        .collect();
    assert_eq!(read, [true, false, true, true]);
}

#[test]
fn arguments_are_rounded_by_leaf_and_their_gradients_summed_in_state_precision() {
    let dtypes = |args_precision: Vec<Precision>| {
        let seen = Arc::new(std::sync::Mutex::new(vec![]));
        let noted = seen.clone();
        let f = move |_: &Time, y: &Tensor, (a, b): &(Tensor, Tensor)| {
            *noted.lock().unwrap() = vec![values(a)[0], values(b)[0]];
            (y * a)? + b
        };
        let third = Var::new(&[1f32 / 3.0], &Device::Cpu).unwrap();
        let other = Var::new(&[1f32 / 3.0], &Device::Cpu).unwrap();
        let args = (third.as_tensor().clone(), other.as_tensor().clone());
        let options = OdeOptions {
            precision: Some(Precision::bf16()),
            args_precision,
            steps: Steps::PerInterval(1000),
            output: Output::Final,
            ..Default::default()
        };
        let y0 = Tensor::new(&[0f32], &Device::Cpu).unwrap();
        let y = odeint_with(f, &y0, &args, &[0.0, 1.0], &options).unwrap();
        let grads = y.sum_all().unwrap().backward().unwrap();
        let grad = values(grads.get(&other).unwrap())[0];
        let seen = seen.lock().unwrap().clone();
        (seen, grad)
    };
    let third = f64::from(1f32 / 3.0);
    let rounded = half::bf16::from_f64(third).to_f64();
    let (seen, grad) = dtypes(vec![]);
    assert_eq!(seen, [rounded, rounded]);
    // y' = a y + b: ∂y(1)/∂b = (e^a − 1)/a, a sum of 4000 terms that bf16 could not hold.
    let exact = (rounded.exp() - 1.0) / rounded;
    assert!(
        (grad - exact).abs() <= 2.0 * U_BF16 * exact,
        "{grad} {exact}"
    );
    let (seen, _) = dtypes(vec![Precision::bf16(), Precision::f32()]);
    assert_eq!(seen, [rounded, third]);
}

#[test]
fn arguments_may_be_written_after_the_solve() {
    let (y0, a) = (scattered(&[2, 2], 1.0, 1), var(&[2, 2], 1.0, 2));
    let ys = odeint_with(field, &y0, a.as_tensor(), &[0.0, 1.0], &options()).unwrap();
    let before = loss(&ys).backward().unwrap();
    a.set(&scattered(&[2, 2], 1.0, 3)).unwrap();
    let after = loss(&ys).backward().unwrap();
    assert_eq!(bits(before.get(&a).unwrap()), bits(after.get(&a).unwrap()));
}

#[test]
fn a_tensor_that_is_given_twice_has_the_sum_of_its_gradients() {
    let f = |_: &Time, y: &Tensor, (a, b): &(Tensor, Tensor)| y.broadcast_mul(&(a + b)?);
    let (y0, rate) = (scattered(&[1], 1.0, 1), var(&[1], 0.5, 2));
    let twice = (rate.as_tensor().clone(), rate.as_tensor().clone());
    let ys = odeint_with(f, &y0, &twice, &[0.0, 1.0], &options()).unwrap();
    let expected = loss(&ys).backward().unwrap();
    let solution = solution_with(&f, &y0, &twice, &[0.0, 1.0], &options()).unwrap();
    let grads = solution.vjp(&(solution.states() * 2.0).unwrap()).unwrap();
    assert!(
        relative(
            grads.params.get(&rate).unwrap(),
            expected.get(&rate).unwrap()
        ) <= 8.0 * U_F64
    );
}

#[test]
fn a_context_without_history_is_a_constant() {
    let vars = VarMap::new();
    let ode = NeuralOde::with_args(&vars, "f", DType::F64, &Device::Cpu, |vb| {
        ConditionalMlp::new(&[2, 4, 2], 3, Activation::Tanh, vb)
    })
    .unwrap();
    common::scatter(&vars);
    let context = scattered(&[4, 3], 1.0, 1);
    let ys = ode
        .given(&context)
        .solve(&scattered(&[4, 2], 1.0, 2), &[0.0, 1.0])
        .unwrap();
    let grads = loss(&ys).backward().unwrap();
    assert!(vars.all_vars().iter().all(|v| grads.get(v).is_some()));
    assert!(grads.get(&context).is_none());
}

#[test]
fn bad_arguments_have_errors_of_their_own() {
    let (y0, a) = (scattered(&[2], 1.0, 1), scattered(&[2], 1.0, 2));
    let options = OdeOptions {
        args_precision: vec![Precision::f64(); 2],
        ..options()
    };
    let got = odeint_with(field, &y0, &a, &[0.0, 1.0], &options);
    assert!(matches!(
        got,
        Err(Error::ArgsPrecisionCount { args: 1, given: 2 })
    ));
}

#[test]
fn untracked_arguments_keep_nothing_and_are_no_node() {
    let recorder = Recorder::default();
    let options = OdeOptions {
        recorder: Some(recorder.clone()),
        ..options()
    };
    let (y0, a) = (scattered(&[2], 1.0, 1), scattered(&[2], 1.0, 2));
    let ys = odeint_with(field, &y0, &a, &[0.0, 1.0], &options).unwrap();
    assert!(!ys.track_op());
    assert_eq!(recorder.stats().bytes_kept, 0);
    let _ = ys.i(0);
}

#[test]
fn a_field_with_arguments_reads_variables_that_are_set() {
    let vars = VarMap::new();
    let vb = VarBuilder::from_varmap(&vars, DType::F64, &Device::Cpu);
    for time in [false, true] {
        let build = |vb: VarBuilder<'_>| match time {
            true => ConditionalMlp::with_time(&[2, 5, 2], 3, Activation::Tanh, vb).unwrap(),
            false => ConditionalMlp::new(&[2, 5, 2], 3, Activation::Tanh, vb).unwrap(),
        };
        let field = build(vb.pp(time));
        fill(&vars);
        let (y0, context) = (scattered(&[4, 2], 0.8, 1), scattered(&[4, 3], 0.8, 2));
        let solved = |field: &ConditionalMlp| {
            let options = OdeOptions::default();
            let y = odeint_with(field.clone(), &y0, &context, &[0.0, 0.7], &options).unwrap();
            let grads = y.sqr().unwrap().sum_all().unwrap().backward().unwrap();
            let of = |var: &Var| values(grads.get(var).unwrap());
            let listed = FieldWithArgs::parameters(field).unwrap();
            let own = vars.all_vars().into_iter().filter(|var| {
                let is_it = |p: &Tensor| p.id() == var.id();
                listed.iter().any(is_it)
            });
            let mut all: Vec<_> = own.map(|var| of(&var)).collect();
            all.sort_by(|a, b| a[0].total_cmp(&b[0]));
            (values(&y), all)
        };
        assert_eq!(solved(&field), solved(&build(vb.pp(time))));
    }
}
