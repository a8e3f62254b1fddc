//! What is kept of evaluations is not evaluated again, and changes no gradient.

mod common;

use candle_core::{DType, Device, Tensor, Var};
use candle_diffeq::metrics::{Recorder, Stats};
use candle_diffeq::nn::{Activation, Cnf, ConvField, HyperCnf, Mlp};
use candle_diffeq::options::{ActivationCache, Checkpoint};
use candle_diffeq::tableau::DOPRI5;
use candle_diffeq::{odeint, OdeOptions, Precision, State, VectorField};
use candle_nn::{VarBuilder, VarMap};
use common::{fill, has_tiles, scattered, values};

const TIMES: [f64; 4] = [0.0, 0.2, 0.5, 0.9];

/// Gradients of y0 and all variables, by name, and what the passes did.
fn gradients<S: State + 'static, F: VectorField<S> + Clone + Send + Sync + 'static>(
    (field, vars): (&F, &VarMap),
    y0: &[Tensor],
    options: &OdeOptions,
) -> (Vec<Tensor>, Stats) {
    let recorder = Recorder::default();
    let options = OdeOptions {
        recorder: Some(recorder.clone()),
        method: DOPRI5,
        ..options.clone()
    };
    let y0: Vec<_> = y0.iter().map(|y| Var::from_tensor(y).unwrap()).collect();
    let leaves = y0.iter().map(|y| y.as_tensor().clone()).collect();
    let states = odeint(
        field.clone(),
        &S::from_leaves(leaves).unwrap(),
        &TIMES,
        &options,
    );
    let squares = states.unwrap().leaves().into_iter().map(|y| {
        let y = y.sin().unwrap();
        y.sqr().unwrap().sum_all().unwrap()
    });
    let loss = squares.reduce(|a, b| (a + b).unwrap()).unwrap();
    let grads = loss.backward().unwrap();
    let mut named: Vec<_> = vars.data().lock().unwrap().clone().into_iter().collect();
    named.sort_by(|a, b| a.0.cmp(&b.0));
    let all = y0.iter().chain(named.iter().map(|(_, var)| var));
    let all = all.map(|var| grads.get(var).unwrap().clone()).collect();
    (all, recorder.take())
}

fn random(shape: &[usize], dtype: DType) -> Tensor {
    scattered(shape, 0.8, shape.len()).to_dtype(dtype).unwrap()
}

/// No plan changes a bit of any gradient; with everything kept nothing is evaluated again.
fn check<S: State + 'static, F: VectorField<S> + Clone + Send + Sync + 'static>(
    make: impl Fn(VarBuilder<'_>) -> F,
    shapes: &[&[usize]],
) {
    if !has_tiles() {
        println!("skipped: without a vector unit there are no tiles, which alone keep evaluations");
        return;
    }
    for dtype in [DType::F32, DType::F64] {
        let vars = VarMap::new();
        let field = make(VarBuilder::from_varmap(&vars, dtype, &Device::Cpu));
        fill(&vars);
        let field = (&field, &vars);
        let y0: Vec<_> = shapes.iter().map(|shape| random(shape, dtype)).collect();
        let plain = OdeOptions::default();
        let (expected, recomputed) = gradients::<S, F>(field, &y0, &plain);
        assert_eq!(recomputed.activation_bytes, 0);
        let of = |activation_cache| OdeOptions {
            activation_cache,
            ..plain.clone()
        };
        let (kept, all) = gradients::<S, F>(field, &y0, &of(ActivationCache::ALL));
        assert_eq!(all.recomputed, 0);
        assert!(all.activation_bytes > 0);
        let mut results = vec![kept];
        for part in 1..8 {
            let budget = all.activation_bytes * part / 8;
            let (kept, stats) = gradients::<S, F>(field, &y0, &of(ActivationCache::within(budget)));
            assert!(stats.activation_bytes <= budget);
            assert!(0 < stats.recomputed && stats.recomputed <= recomputed.recomputed);
            results.push(kept);
        }
        for checkpoint in [
            Checkpoint::States(2),
            Checkpoint::Every(2),
            Checkpoint::Every(3),
        ] {
            for bytes in [0, all.activation_bytes / 3, all.activation_bytes / 2] {
                let replayed = OdeOptions {
                    checkpoint,
                    ..of(ActivationCache::within(bytes))
                };
                results.push(gradients::<S, F>(field, &y0, &replayed).0);
            }
            // What is known is not replayed.
            let known = OdeOptions {
                checkpoint,
                ..of(ActivationCache::ALL)
            };
            let (kept, stats) = gradients::<S, F>(field, &y0, &known);
            assert_eq!(stats.recomputed, 0);
            results.push(kept);
        }
        for result in results {
            for (got, expected) in result.iter().zip(&expected) {
                assert_eq!(values(got), values(expected));
            }
        }

        // Kept in bf16, half the bytes, and gradients at a point that is rounded to eight bits.
        let (low, stats) = gradients::<S, F>(field, &y0, &of(ActivationCache::ALL.in_bf16()));
        assert_eq!(
            stats.activation_bytes * dtype.size_in_bytes(),
            2 * all.activation_bytes
        );
        let norm = |x: &[f64]| x.iter().map(|x| x * x).sum::<f64>().sqrt();
        let mut rounded = false;
        for (got, expected) in low.iter().zip(&expected) {
            let (got, expected) = (values(got), values(expected));
            rounded |= got != expected;
            let difference: Vec<_> = got.iter().zip(&expected).map(|(a, b)| a - b).collect();
            let error = norm(&difference) / norm(&expected);
            assert!(error <= 4.0 * 2f64.powi(-8), "{error:e}");
        }
        assert!(rounded);
    }
}

#[test]
fn kept_activations_of_a_perceptron_change_no_bit_of_its_gradients() {
    for activation in [Activation::Tanh, Activation::Silu] {
        for widths in [&[3, 3][..], &[3, 40, 3], &[3, 17, 64, 5, 3]] {
            let new = |vb: VarBuilder<'_>| Mlp::new(widths, activation, vb).unwrap();
            check::<Tensor, _>(new, &[&[70, 3]]);
        }
        let timed = |vb: VarBuilder<'_>| Mlp::with_time(&[2, 24, 24, 2], activation, vb).unwrap();
        check::<Tensor, _>(|vb| timed(vb).residual(), &[&[9, 2]]);
    }
}

#[test]
fn kept_activations_of_a_flow_change_no_bit_of_its_gradients() {
    let flow = |vb: VarBuilder<'_>| {
        Cnf::new(Mlp::new(&[2, 16, 16, 2], Activation::Softplus, vb).unwrap()).unwrap()
    };
    check::<(Tensor, Tensor), _>(flow, &[&[40, 2], &[40, 1]]);
}

#[test]
fn kept_activations_of_a_convolution_change_no_bit_of_its_gradients() {
    let conv = |vb: VarBuilder<'_>| ConvField::new(&[3, 5, 3], 3, Activation::Tanh, vb).unwrap();
    check::<Tensor, _>(conv, &[&[4, 3, 6, 7]]);
}

#[test]
fn the_general_path_keeps_nothing_of_a_flow() {
    let vars = VarMap::new();
    let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
    let field = Cnf::new(Mlp::new(&[2, 8, 2], Activation::Tanh, vb).unwrap()).unwrap();
    fill(&vars);
    let options = OdeOptions {
        activation_cache: ActivationCache::ALL,
        fusion: false,
        ..Default::default()
    };
    let y0 = [&[5, 2][..], &[5, 1]].map(|shape| random(shape, DType::F32));
    let (_, stats) = gradients::<(Tensor, Tensor), _>((&field, &vars), &y0, &options);
    assert_eq!(stats.activation_bytes, 0);
    assert!(stats.recomputed > 0);
}

#[test]
fn nothing_is_kept_beside_states_that_are_rounded() {
    let vars = VarMap::new();
    let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
    let field = Mlp::new(&[2, 8, 2], Activation::Tanh, vb).unwrap();
    fill(&vars);
    let y0 = [random(&[5, 2], DType::F32)];
    let of = |activation_cache| OdeOptions {
        activation_cache,
        precision: Some(Precision::f32().store(DType::BF16)),
        ..Default::default()
    };
    let solved = |cache| gradients::<Tensor, _>((&field, &vars), &y0, &of(cache));
    let (expected, _) = solved(ActivationCache::NONE);
    let (got, stats) = solved(ActivationCache::ALL);
    assert_eq!(stats.activation_bytes, 0);
    for (got, expected) in got.iter().zip(&expected) {
        assert_eq!(values(got), values(expected));
    }
}

#[test]
fn evaluations_that_are_kept_in_bf16_are_at_their_own_time() {
    if !has_tiles() {
        return;
    }
    // Numbers of bf16 are half apart here.
    let times = [100.0, 100.3, 101.0];
    let vars = VarMap::new();
    let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
    let flow = HyperCnf::new(2, 6, 4, vb).unwrap();
    fill(&vars);
    // What the network of time reads is t − 100, of order one as all else.
    let named = |name: &str| vars.data().lock().unwrap()[name].clone();
    let weight = named("0.weight").squeeze(1).unwrap();
    named("0.bias").set(&(weight * -100.0).unwrap()).unwrap();
    let gradients = |activation_cache| {
        let options = OdeOptions {
            method: DOPRI5,
            activation_cache,
            ..Default::default()
        };
        let y0 = Var::from_tensor(&random(&[20, 2], DType::F32)).unwrap();
        let state = (y0.as_tensor().clone(), random(&[20, 1], DType::F32));
        let (z, l) = odeint(flow.clone(), &state, &times, &options).unwrap();
        let loss = (z.sqr().unwrap().sum_all().unwrap() + l.sum_all().unwrap()).unwrap();
        let grads = loss.backward().unwrap();
        let all = vars.all_vars().into_iter().chain([y0]);
        all.map(|var| values(grads.get(&var).unwrap()))
            .collect::<Vec<_>>()
    };
    let expected = gradients(ActivationCache::NONE);
    let low = gradients(ActivationCache::ALL.in_bf16());
    for (got, expected) in low.iter().zip(&expected) {
        let difference = got.iter().zip(expected).map(|(a, b)| (a - b).powi(2));
        let error = difference.sum::<f64>().sqrt();
        let size = expected.iter().map(|x| x * x).sum::<f64>().sqrt();
        assert!(error <= 4.0 * 2f64.powi(-8) * size, "{error:e} of {size:e}");
    }
}
