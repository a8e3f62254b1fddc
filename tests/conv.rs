//! Convolutional fields: their pull-back against candle's autograd, their solve tile by tile against
//! the general path, and the layers that they refuse.
//!
//! `cargo test --test conv`, half a minute.

mod common;

use candle_core::{DType, Device, Module, Tensor, Var};
use candle_diffeq::nn::{Activation, ConvField};
use candle_diffeq::options::Output;
use candle_diffeq::tableau::{HEUN, RK4};
use candle_diffeq::{odeint, OdeOptions, Time, VectorField};
use candle_nn::{Conv2d, Conv2dConfig, VarBuilder, VarMap};
use common::{all, method, relative, scattered, values, var, worst};
use proptest::prelude::*;

/// A field and a batch of images.
#[derive(Clone, Debug)]
struct Shape {
    batch: usize,
    /// First to last.
    channels: Vec<usize>,
    size: usize,
    height: usize,
    width: usize,
    activation: Activation,
    norm: bool,
    seed: usize,
}

fn shapes() -> impl Strategy<Value = Shape> {
    let hidden = prop::collection::vec(1usize..10, 0..3);
    let image = (1usize..8, 1usize..8);
    let activation = (0..Activation::ALL.len()).prop_map(|i| Activation::ALL[i]);
    let size = prop_oneof![1 => Just(1usize), 4 => Just(3usize), 1 => Just(5usize)];
    let rest = (1usize..41, 1usize..10, 0usize..1000, any::<bool>());
    (rest, hidden, image, activation, size).prop_map(
        |((batch, first, seed, norm), hidden, (height, width), activation, size)| Shape {
            batch,
            channels: [vec![first], hidden, vec![first]].concat(),
            size,
            height,
            width,
            activation,
            norm,
            seed,
        },
    )
}

/// The field, its variables and images.
/// As many groups as divide all hidden channels, three at most.
fn groups(channels: &[usize]) -> usize {
    let hidden = &channels[1..channels.len() - 1];
    let fits = |groups: &usize| hidden.iter().all(|c| c.is_multiple_of(*groups));
    (1..=3).rev().find(fits).unwrap_or(1)
}

fn build(shape: &Shape, dtype: DType) -> (ConvField, VarMap, Var) {
    let vars = VarMap::new();
    let vb = VarBuilder::from_varmap(&vars, dtype, &Device::Cpu);
    let (channels, size, activation) = (&shape.channels, shape.size, shape.activation);
    let field = match shape.norm {
        true => ConvField::with_group_norm(channels, size, groups(channels), activation, vb),
        false => ConvField::new(channels, size, activation, vb),
    };
    for (i, (name, var)) in all(&vars).into_iter().enumerate() {
        let fan: usize = var.dims().iter().skip(1).product();
        let x = scattered(var.dims(), 1.0 / (fan as f64).sqrt(), shape.seed + i);
        let x = if name.ends_with("norm.weight") {
            x + 1.5
        } else {
            Ok(x)
        };
        var.set(&x.and_then(|x| x.to_dtype(dtype)).unwrap())
            .unwrap();
    }
    let state = [shape.batch, shape.channels[0], shape.height, shape.width];
    let y0 = scattered(&state, 1.0, shape.seed + 99).to_dtype(dtype);
    (
        field.unwrap(),
        vars,
        Var::from_tensor(&y0.unwrap()).unwrap(),
    )
}

/// The states, then the gradients of y0 and of every parameter, of a solve over two intervals.
fn solved(shape: &Shape, dtype: DType, fusion: bool, output: Output) -> Vec<(String, Tensor)> {
    let (field, vars, y0) = build(shape, dtype);
    let tableau = if shape.seed.is_multiple_of(2) {
        RK4
    } else {
        HEUN
    };
    let options = OdeOptions {
        fusion,
        output,
        ..method(&tableau, 2)
    };
    let ys = odeint(field, y0.as_tensor(), &[0.0, 0.4, 0.7], &options).unwrap();
    // All positive: a gradient that cancels to nothing has no digits to compare.
    let weights = (scattered(ys.dims(), 1.0, 7) + 1.5).and_then(|w| w.to_dtype(dtype));
    let weights = weights.unwrap();
    let grads = (&ys * weights)
        .unwrap()
        .sum_all()
        .unwrap()
        .backward()
        .unwrap();
    let mut of = all(&vars);
    of.push(("y0".to_owned(), y0));
    let grad = |(name, var): (String, Var)| (name, grads.get(&var).unwrap().clone());
    let states = [("states".to_owned(), ys.detach())];
    states.into_iter().chain(of.into_iter().map(grad)).collect()
}

/// max |x|.
fn norm(x: &Tensor) -> f64 {
    worst(values(x))
}

fn agree(shape: &Shape, dtype: DType, tolerance: f64) -> Result<(), TestCaseError> {
    let output = if shape.batch.is_multiple_of(2) {
        Output::All
    } else {
        Output::Final
    };
    let fused = solved(shape, dtype, true, output);
    let general = solved(shape, dtype, false, output);
    // Rounding is relative to the terms of a sum, of which a gradient may be a small remainder.
    let gradients = general.iter().filter(|(name, _)| name != "states");
    let largest = gradients.map(|(_, x)| norm(x)).fold(0.0, f64::max);
    for ((name, fused), (_, general)) in fused.iter().zip(&general) {
        let error = relative(fused, general) * norm(general) / largest.max(norm(general));
        prop_assert!(error <= tolerance, "{name}: {error:e}");
    }
    Ok(())
}

/// Solves in f32 by tiles have at most eight times the error of the general path against f64, or the tolerance.
fn are_alike(shape: &Shape, tolerance: f64) -> Result<(), TestCaseError> {
    let exact = solved(shape, DType::F64, false, Output::All);
    let gradients = exact.iter().filter(|(name, _)| name != "states");
    let largest = gradients.map(|(_, x)| norm(x)).fold(0.0, f64::max);
    let error = |fusion| {
        let got = solved(shape, DType::F32, fusion, Output::All);
        let pairs = got.iter().zip(&exact);
        let of = pairs.map(|((_, got), (_, exact))| {
            relative(got, exact) * norm(exact) / largest.max(norm(exact))
        });
        worst(of)
    };
    let (tiles, general) = (error(true), error(false));
    let bound = (8.0 * general).max(tolerance);
    prop_assert!(tiles <= bound, "tiles {tiles:e}, general path {general:e}");
    Ok(())
}

fn cases(cases: u32) -> ProptestConfig {
    ProptestConfig {
        cases,
        failure_persistence: None,
        ..Default::default()
    }
}

proptest! {
    #![proptest_config(cases(96))]

    #[test]
    fn the_pull_back_is_autograds(shape in shapes()) {
        let (field, vars, y) = build(&shape, DType::F64);
        let exact = field.forward(&y).unwrap();
        let v = scattered(exact.dims(), 1.0, 5);
        let grads = (&exact * &v).unwrap().sum_all().unwrap().backward().unwrap();
        let (k, pull) = field.vjp(&Time::new(0.3, DType::F64, &Device::Cpu), &y).unwrap();
        let cotangents = pull(&v).unwrap();
        prop_assert_eq!(values(&k), values(&exact));
        // candle's derivative of gelu_erf has 1/√(2π) to six digits.
        let gelu = shape.activation == Activation::Gelu;
        let tolerance = if gelu { 1e-5 } else { 1e-12 };
        let mut of = all(&vars);
        let pairs = of.drain(..).map(|(name, var)| {
            let [got, exact] = [&cotangents.params, &grads].map(|g| g.get(&var).unwrap());
            (name, got.clone(), exact.clone())
        });
        let y = ("y".to_owned(), cotangents.y.clone(), grads.get(&y).unwrap().clone());
        let pairs: Vec<_> = pairs.chain([y]).collect();
        // The gradient of a bias before a norm may vanish: errors are relative to the largest.
        let size = worst(pairs.iter().flat_map(|(_, _, exact)| values(exact)));
        for (name, got, exact) in pairs {
            let error = worst(values(&(got - exact).unwrap())) / size.max(1e-3);
            prop_assert!(error <= tolerance, "{name}: {error:e}");
        }
    }

    #[test]
    fn tiles_agree_with_the_general_path(shape in shapes()) {
        // A norm of nearly equal numbers magnifies rounding: the whole by about 1/√ε, for ε = 1e-5.
        let norm = if shape.norm { 316.0 } else { 1.0 };
        agree(&shape, DType::F64, 1e-12 * norm)?;
    }

    #[test]
    fn tiles_of_f32_agree_with_the_general_path(shape in shapes()) {
        let kink = shape.activation == Activation::Relu;
        let tolerance = if kink { 1e-4 } else { 2e-5 };
        match shape.norm {
            // Where the numbers of a group are nearly equal, a norm magnifies rounding on both paths.
            true => are_alike(&shape, tolerance)?,
            false => agree(&shape, DType::F32, tolerance)?,
        }
    }
}

#[test]
fn wide_tiles_agree_with_the_general_path() {
    for (batch, norm, hidden) in [(70, false, 11), (129, false, 11), (70, true, 12)] {
        let shape = Shape {
            batch,
            channels: vec![3, hidden, 3],
            size: 3,
            height: 6,
            width: 5,
            activation: Activation::Tanh,
            norm,
            seed: 4,
        };
        agree(&shape, DType::F64, 1e-12).unwrap();
        agree(&shape, DType::F32, 1e-5).unwrap();
    }
}

#[test]
fn names_and_shapes_are_those_of_candle_nn() {
    let vars = VarMap::new();
    let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
    ConvField::with_group_norm(&[2, 6, 2], 3, 3, Activation::Silu, vb).unwrap();
    let shapes = all(&vars);
    let shapes: Vec<_> = shapes.iter().map(|(n, v)| (n.as_str(), v.dims())).collect();
    assert_eq!(
        shapes,
        [
            ("0.bias", &[6usize][..]),
            ("0.norm.bias", &[6]),
            ("0.norm.weight", &[6]),
            ("0.weight", &[6, 2, 3, 3]),
            ("1.bias", &[2]),
            ("1.weight", &[2, 6, 3, 3]),
        ]
    );
}

#[test]
fn the_group_norm_is_candles() {
    let vars = VarMap::new();
    let vb = VarBuilder::from_varmap(&vars, DType::F64, &Device::Cpu);
    let field = ConvField::with_group_norm(&[2, 6, 2], 3, 3, Activation::Tanh, vb.clone()).unwrap();
    let norm = candle_nn::group_norm(3, 6, 1e-5, vb.pp("0.norm")).unwrap();
    let config = Conv2dConfig {
        padding: 1,
        ..Default::default()
    };
    let first = candle_nn::conv2d(2, 6, 3, config, vb.pp(0)).unwrap();
    let second = candle_nn::conv2d(6, 2, 3, config, vb.pp(1)).unwrap();
    let y = var(&[3, 2, 5, 4], 1.0, 1);
    let exact = first.forward(&y).and_then(|z| norm.forward(&z)?.tanh());
    let exact = exact.and_then(|h| second.forward(&h)).unwrap();
    assert!(relative(&field.forward(&y).unwrap(), &exact) <= 1e-13);
}

#[test]
fn layers_that_do_not_keep_the_image_are_refused() {
    let layer = |dims: [usize; 4], bias: bool, config: Conv2dConfig| {
        let weight = scattered(&dims, 1.0, 1);
        Conv2d::new(weight, bias.then(|| scattered(&dims[..1], 1.0, 2)), config)
    };
    let same = Conv2dConfig {
        padding: 1,
        ..Default::default()
    };
    let refused = |layers: &[Conv2d]| {
        ConvField::from_layers(layers, Activation::Relu)
            .unwrap_err()
            .to_string()
    };
    let cases = [
        (vec![], "needs a layer"),
        (vec![layer([2, 2, 3, 3], false, same)], "needs a bias"),
        (vec![layer([3, 2, 3, 3], true, same)], "do not map a state"),
        (
            vec![
                layer([3, 2, 3, 3], true, same),
                layer([2, 4, 3, 3], true, same),
            ],
            "do not map a state",
        ),
        (
            vec![layer([2, 2, 3, 5], true, same)],
            "do not keep the size",
        ),
        (
            vec![layer([2, 2, 2, 2], true, same)],
            "do not keep the size",
        ),
        (
            vec![layer([2, 2, 5, 5], true, same)],
            "do not keep the size",
        ),
        (
            vec![layer(
                [2, 2, 3, 3],
                true,
                Conv2dConfig { stride: 2, ..same },
            )],
            "do not keep the size",
        ),
        (
            vec![layer(
                [2, 2, 3, 3],
                true,
                Conv2dConfig {
                    dilation: 2,
                    ..same
                },
            )],
            "do not keep the size",
        ),
        (
            vec![layer(
                [2, 1, 3, 3],
                true,
                Conv2dConfig { groups: 2, ..same },
            )],
            "do not keep the size",
        ),
    ];
    for (layers, what) in cases {
        let error = refused(&layers);
        assert!(error.contains(what), "{error}");
    }
    let vars = VarMap::new();
    let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
    let odd = ConvField::with_group_norm(&[2, 6, 2], 3, 4, Activation::Relu, vb);
    assert!(odd.unwrap_err().to_string().contains("in 4 groups"));
}

#[test]
fn frozen_filters_have_no_gradient_on_either_path() {
    let vars = VarMap::new();
    let vb = VarBuilder::from_varmap(&vars, DType::F64, &Device::Cpu);
    let config = Conv2dConfig {
        padding: 1,
        ..Default::default()
    };
    let [frozen, trained] =
        ["0", "1"].map(|name| candle_nn::conv2d(2, 2, 3, config, vb.pp(name)).unwrap());
    let bias = frozen.bias().unwrap().detach();
    let frozen = Conv2d::new(frozen.weight().detach(), Some(bias), config);
    let field = ConvField::from_layers(&[frozen, trained], Activation::Tanh).unwrap();
    let y0 = scattered(&[3, 2, 4, 5], 1.0, 1);
    for fusion in [false, true] {
        let options = OdeOptions {
            fusion,
            ..Default::default()
        };
        let ys = odeint(field.clone(), &y0, &[0.0, 0.5], &options).unwrap();
        let grads = ys.sqr().and_then(|y| y.sum_all()?.backward()).unwrap();
        for (name, var) in all(&vars) {
            assert_eq!(grads.get(&var).is_some(), name.starts_with('1'), "{name}");
        }
    }
}
