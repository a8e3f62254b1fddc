//! Layers and fields of `nn`: what they refuse and how they say it, what they do with NaN, infinity and
//! late times, and the gradients of those that stand in for candle's.

mod common;

use candle_core::{DType, Device, Module, Result, Tensor, Var, D};
use candle_diffeq::error::LossDefect;
use candle_diffeq::fields::PiecewiseConstant;
use candle_diffeq::nn::{
    conv1d, conv1d_no_bias, layer_norm, layer_norm_no_bias, rms_norm, softmax, softmax_last_dim,
    Activation, Cnf, ConditionalMlp, Conv1d, ConvField, Hutchinson, HyperCnf, LayerNorm, Linear,
    Mlp, OtFlow, Probe, RmsNorm, RowLoss,
};
use candle_diffeq::options::Output;
use candle_diffeq::{odeint, Error, NeuralOde, OdeOptions, State, Time, VectorField};
use candle_nn::{Conv1dConfig, Conv2d, Conv2dConfig, LayerNormConfig, VarBuilder, VarMap};
use common::{fill, relative, scattered, values, worst, U_BF16, U_F16, U_F32, U_F64};

fn zeros(shape: &[usize], dtype: DType) -> Tensor {
    Tensor::zeros(shape, dtype, &Device::Cpu).unwrap()
}

/// `shape` with another last dimension.
fn beside(shape: &[usize], last: usize) -> Vec<usize> {
    match shape.split_last() {
        Some((_, rows)) => [rows, &[last]].concat(),
        None => vec![],
    }
}

fn at(t: f64, dtype: DType) -> Time {
    Time::new(t, dtype, &Device::Cpu)
}

/// All fields of two features, each with a state that has z of this shape.
struct Fields {
    vars: VarMap,
    dtype: DType,
}

impl Fields {
    fn of(dtype: DType) -> Self {
        let vars = VarMap::new();
        Self { vars, dtype }
    }

    fn vb(&self, name: &str) -> VarBuilder<'static> {
        VarBuilder::from_varmap(&self.vars, self.dtype, &Device::Cpu).pp(name)
    }

    /// Calls `see` with every field that acts on rows.
    fn each(&self, z: &Tensor, see: &mut impl FnMut(&str, &dyn Evaluate)) {
        let more = |n| zeros(&beside(z.dims(), n), z.dtype());
        let mut one = |name: &str, field: Mlp| see(name, &On(field, z.clone()));
        let mlp = |widths: &[usize], name: &str| {
            Mlp::with_time(widths, Activation::Silu, self.vb(name)).unwrap()
        };
        one("an Mlp", mlp(&[2, 8, 2], "mlp"));
        let deep = Mlp::new(&[2, 5, 5, 2], Activation::Relu, self.vb("deep"));
        one("an Mlp", deep.unwrap().residual());
        for (i, widths) in [&[2, 2][..], &[2, 7, 2], &[2, 7, 5, 2], &[2, 3, 4, 3, 2]]
            .iter()
            .enumerate()
        {
            let name = format!("cnf{i}");
            let flow = Cnf::new(mlp(widths, &name)).unwrap();
            see("a Cnf", &On(flow, (z.clone(), more(1))));
        }
        let hyper = HyperCnf::new(2, 6, 4, self.vb("hyper")).unwrap();
        see("a HyperCnf", &On(hyper, (z.clone(), more(1))));
        let estimated = Hutchinson::new(mlp(&[2, 8, 2], "hutchinson"));
        see("", &On(estimated, (z.clone(), more(1), z.clone())));
        let flow = OtFlow::new(2, 8, 2, self.vb("flow")).unwrap();
        see("an OtFlow", &On(flow, (z.clone(), more(3))));
        let pieces = PiecewiseConstant::build(&[0.0, 1.0, 2.0], |i| {
            Mlp::new(&[2, 6, 2], Activation::Tanh, self.vb("pieces").pp(i))
        });
        see("an Mlp", &On(pieces.unwrap(), z.clone()));
    }

    /// And every field that acts on images.
    fn each_of_images(&self, y: &Tensor, see: &mut impl FnMut(&str, &dyn Evaluate)) {
        let plain = ConvField::new(&[2, 4, 2], 3, Activation::Relu, self.vb("conv")).unwrap();
        see("a ConvField", &On(plain, y.clone()));
        let normed =
            ConvField::with_group_norm(&[2, 4, 2], 3, 2, Activation::Gelu, self.vb("normed"));
        see("a ConvField", &On(normed.unwrap(), y.clone()));
    }
}

struct On<F, S>(F, S);

trait Evaluate {
    fn velocity(&self) -> Result<Vec<Tensor>>;
    /// Of the state and of the parameters that have one.
    fn gradients(&self) -> Result<(Vec<Tensor>, Vec<Tensor>)>;
}

impl<S: State, F: VectorField<S>> Evaluate for On<F, S> {
    fn velocity(&self) -> Result<Vec<Tensor>> {
        Ok(self.0.velocity(&at(0.3, DType::F32), &self.1)?.leaves())
    }

    fn gradients(&self) -> Result<(Vec<Tensor>, Vec<Tensor>)> {
        let (k, pull) = self.0.vjp(&at(0.3, DType::F32), &self.1)?;
        let cotangents = pull(&k)?;
        let listed = self.0.parameters().unwrap_or_default();
        let params = listed
            .iter()
            .filter_map(|p| cotangents.params.get(p).cloned());
        Ok((cotangents.y.leaves(), params.collect()))
    }
}

#[test]
fn fields_say_which_states_they_need() {
    let fields = Fields::of(DType::F32);
    let refused = |name: &str, field: &dyn Evaluate| {
        for error in [
            field.velocity().unwrap_err(),
            field.gradients().unwrap_err(),
        ] {
            let text = error.to_string();
            match Error::from(error) {
                Error::FieldState { field, .. } => assert!(field.starts_with(name), "{field}"),
                other => panic!("{name}: {other}"),
            }
            assert!(
                text.contains(" needs ") && text.contains(", got ["),
                "{text}"
            );
        }
    };
    for shape in [&[][..], &[3], &[4, 3], &[0, 3], &[2, 2, 1], &[2, 0]] {
        fields.each(&zeros(shape, DType::F32), &mut |name, field| {
            refused(name, field)
        });
    }
    for shape in [
        &[][..],
        &[2],
        &[2, 4, 4],
        &[1, 3, 4, 4],
        &[1, 2, 4, 4, 1],
        &[1, 2, 0, 4],
    ] {
        fields.each_of_images(&zeros(shape, DType::F32), &mut |name, field| {
            refused(name, field)
        });
    }
    // As before a solve, and as a module.
    for fusion in [true, false] {
        let ode = NeuralOde::new(&VarMap::new(), "f", &Device::Cpu, |vb| {
            Mlp::new(&[2, 8, 2], Activation::Tanh, vb)
        });
        let ode = ode.unwrap().options(OdeOptions {
            fusion,
            ..Default::default()
        });
        for (shape, got) in [(&[4, 3][..], "[4, 3]"), (&[], "[]")] {
            let error = ode
                .solve(&zeros(shape, DType::F32), &[0.0, 1.0])
                .unwrap_err();
            let text = format!("an Mlp of 2 features needs y (…, 2), got {got}");
            assert_eq!(error.to_string(), text);
        }
    }
    let mlp = Mlp::new(&[2, 8, 2], Activation::Tanh, fields.vb("module")).unwrap();
    let linear = Linear::new(2, 3, fields.vb("linear")).unwrap();
    let norm = layer_norm(2, 1e-5, fields.vb("norm")).unwrap();
    let conv = conv1d(2, 3, 3, Conv1dConfig::default(), fields.vb("conv1d")).unwrap();
    for shape in [&[][..], &[3], &[4, 3]] {
        let y = zeros(shape, DType::F32);
        for layer in [&mlp as &dyn Module, &linear, &norm, &conv] {
            let error = Error::from(layer.forward(&y).unwrap_err());
            assert!(matches!(error, Error::FieldState { .. }), "{error}");
        }
    }
}

#[test]
fn an_empty_batch_has_a_velocity_of_its_shape_and_gradients_of_zero() {
    for dtype in [DType::F32, DType::F64, DType::BF16, DType::F16] {
        let fields = Fields::of(dtype);
        let empty = |name: &str, field: &dyn Evaluate, shape: &[usize]| {
            assert_eq!(field.velocity().unwrap()[0].dims(), shape, "{name}");
            let (y, params) = field.gradients().unwrap();
            assert_eq!(y[0].dims(), shape);
            assert!(params.iter().all(|g| worst(values(g)) == 0.0), "{name}");
        };
        for shape in [&[0, 2][..], &[0, 3, 2], &[3, 0, 2]] {
            fields.each(&zeros(shape, dtype), &mut |name, field| {
                empty(name, field, shape)
            });
        }
        if dtype == DType::F32 || dtype == DType::F64 {
            let shape = [0, 2, 4, 4];
            fields.each_of_images(&zeros(&shape, dtype), &mut |name, field| {
                empty(name, field, &shape);
            });
        }
    }
}

#[test]
fn perceptrons_and_convolutions_are_not_built_with_a_width_of_zero() {
    let vars = VarMap::new();
    let vb = |name: &str| VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu).pp(name);
    let refused = |got: Result<()>, what: &str| {
        let text = got.unwrap_err().to_string();
        assert!(text.contains(what), "{text}");
    };
    for widths in [vec![2, 0, 2], vec![0, 3, 0], vec![0, 0]] {
        let said = format!("of widths {widths:?}");
        refused(
            Mlp::new(&widths, Activation::Tanh, vb("a")).map(|_| ()),
            &said,
        );
        refused(
            Mlp::with_time(&widths, Activation::Tanh, vb("b")).map(|_| ()),
            &said,
        );
        let conditional = ConditionalMlp::new(&widths, 1, Activation::Tanh, vb("c"));
        refused(conditional.map(|_| ()), &said);
        let channels = format!("of channels {widths:?}");
        let conv = ConvField::new(&widths, 3, Activation::Tanh, vb("d"));
        refused(conv.map(|_| ()), &channels);
    }
    let conv = ConvField::new(&[2, 2], 0, Activation::Tanh, vb("e"));
    refused(conv.map(|_| ()), "filters of 0");
    assert!(vars.all_vars().is_empty());
}

#[test]
fn layers_that_exist_are_checked() {
    let like = |shape: &[usize]| scattered(shape, 1.0, 1).to_dtype(DType::F32).unwrap();
    let layer =
        |weight: &[usize], bias: &[usize]| candle_nn::Linear::new(like(weight), Some(like(bias)));
    let refused = |error: candle_core::Error, part: &str| match Error::from(error) {
        Error::LayerTensor { tensor, .. } => assert_eq!(tensor, part),
        other => panic!("{part}: {other}"),
    };
    let of = |layers: &[candle_nn::Linear]| Mlp::from_layers(layers, Activation::Tanh, false);
    let good = || layer(&[3, 2], &[3]);
    for bias in [&[1][..], &[3], &[4], &[0], &[], &[2, 1], &[1, 2]] {
        refused(of(&[good(), layer(&[2, 3], bias)]).unwrap_err(), "bias");
    }
    for weight in [&[][..], &[6], &[2, 3, 1]] {
        refused(of(&[good(), layer(weight, &[2])]).unwrap_err(), "weight");
        refused(of(&[layer(weight, &[2]), good()]).unwrap_err(), "weight");
    }
    let wide = like(&[2]).to_dtype(DType::F64).unwrap();
    let mixed = candle_nn::Linear::new(like(&[2, 3]), Some(wide.clone()));
    refused(of(&[good(), mixed.clone()]).unwrap_err(), "bias");
    let whole = zeros(&[3, 2], DType::U32);
    let whole = candle_nn::Linear::new(whole, Some(zeros(&[3], DType::U32)));
    refused(of(&[whole]).unwrap_err(), "weight");
    assert!(of(&[candle_nn::Linear::new(like(&[2, 2]), None)]).is_err());
    assert!(of(&[]).is_err() && of(&[layer(&[3, 2], &[3])]).is_err());
    assert!(of(&[good(), layer(&[2, 3], &[2])]).is_ok());

    let x = like(&[4, 2]);
    refused(
        Linear::from(layer(&[3, 2], &[1])).forward(&x).unwrap_err(),
        "bias",
    );
    refused(
        Linear::from(layer(&[6], &[3])).forward(&x).unwrap_err(),
        "weight",
    );

    let config = Conv2dConfig {
        padding: 1,
        ..Default::default()
    };
    let image = |weight: &[usize], bias: &[usize]| {
        let layer = Conv2d::new(like(weight), Some(like(bias)), config);
        ConvField::from_layers(&[layer], Activation::Tanh)
    };
    for bias in [&[1][..], &[3], &[], &[2, 1]] {
        refused(image(&[2, 2, 3, 3], bias).unwrap_err(), "bias");
    }
    for weight in [&[][..], &[2, 2, 3], &[36]] {
        refused(image(weight, &[2]).unwrap_err(), "weight");
    }
    assert!(image(&[2, 2, 3, 3], &[2]).is_ok());

    let norm = |weight: &[usize], bias: &[usize]| {
        LayerNorm::new(like(weight), like(bias), 1e-5).forward(&x)
    };
    refused(norm(&[2], &[1]).unwrap_err(), "bias");
    refused(norm(&[2, 1], &[2]).unwrap_err(), "weight");
    let conv = |weight: &[usize], bias: &[usize]| {
        let layer = Conv1d::new(like(weight), Some(like(bias)), Conv1dConfig::default());
        layer.forward(&like(&[2, 2, 5]))
    };
    refused(conv(&[3, 2, 3], &[1]).unwrap_err(), "bias");
    refused(conv(&[3, 6], &[3]).unwrap_err(), "weight");
    assert!(conv(&[3, 2, 3], &[3]).is_ok());
}

/// σ(x) and σ'(x) in f64, with their limits.
fn exact(activation: Activation, x: f64) -> [f64; 2] {
    let e = (-x.abs()).exp();
    let sigmoid = if x > 0.0 { 1.0 } else { e } / (1.0 + e);
    let near = x.clamp(-700.0, 700.0);
    match activation {
        Activation::Tanh => [x.tanh(), 1.0 - x.tanh() * x.tanh()],
        Activation::Sigmoid => [sigmoid, e / (1.0 + e).powi(2)],
        Activation::Softplus => [x.max(0.0) + e.ln_1p(), sigmoid],
        Activation::Relu => [x.max(0.0), f64::from(u8::from(x > 0.0))],
        Activation::Silu => [
            if x < 0.0 { near * sigmoid } else { x * sigmoid },
            sigmoid + near * e / (1.0 + e).powi(2),
        ],
        Activation::Gelu => {
            let normal = 0.5 * candle_core::cpu::erf::erfc_f64(-near * 0.5f64.sqrt());
            let density = (-0.5 * near * near).exp() / std::f64::consts::TAU.sqrt();
            [
                if x < 0.0 { near * normal } else { x * normal },
                normal + near * density,
            ]
        }
        Activation::Sin => [x.sin(), x.cos()],
        Activation::LogTwoCosh => [x.abs() + (-2.0 * x.abs()).exp().ln_1p(), x.tanh()],
    }
}

/// σ(x) and its gradient, as candle has it.
fn with_gradient(activation: Activation, x: &[f64], dtype: DType) -> [Vec<f64>; 2] {
    let x = Tensor::new(x, &Device::Cpu).and_then(|x| x.to_dtype(dtype));
    let x = Var::from_tensor(&x.unwrap()).unwrap();
    let y = activation.forward(&x).unwrap();
    let grads = y.sum_all().unwrap().backward().unwrap();
    [values(&y), values(grads.get(&x).unwrap())]
}

#[test]
fn activations_pass_nan_on_and_have_their_limits() {
    let mut points = vec![f64::INFINITY, f64::NEG_INFINITY];
    for size in [
        1e-3, 0.7, 3.0, 9.0, 12.0, 40.0, 88.0, 104.0, 300.0, 1e4, 6e4, 1e20, 3e38,
    ] {
        points.extend([size, -size]);
    }
    for (dtype, u) in [
        (DType::F64, U_F64),
        (DType::F32, U_F32),
        (DType::BF16, U_BF16),
        (DType::F16, U_F16),
    ] {
        for activation in Activation::ALL {
            let low = matches!(dtype, DType::BF16 | DType::F16);
            let largest = if dtype == DType::F16 {
                65504.0
            } else {
                f64::INFINITY
            };
            let fits = |x: &&f64| x.is_infinite() || x.abs() <= largest;
            // As the dtype has them.
            let x: Vec<_> = points.iter().filter(fits).copied().collect();
            let x = values(
                &Tensor::new(x, &Device::Cpu)
                    .unwrap()
                    .to_dtype(dtype)
                    .unwrap(),
            );
            // A slope that is a difference of sines needs more digits than bf16 has of x.
            let [value, gradient] = with_gradient(activation, &x, dtype);
            for (i, &x) in x.iter().enumerate() {
                let wanted = exact(activation, x);
                for (got, wanted) in [value[i], gradient[i]].into_iter().zip(wanted) {
                    if wanted.is_nan() || wanted.is_infinite() {
                        assert!(
                            got == wanted || (got.is_nan() && wanted.is_nan()),
                            "{activation:?} {dtype:?} {x}: {got}, {wanted}"
                        );
                        continue;
                    }
                    // Of sums of numbers near one.
                    let bound = 16.0 * u * wanted.abs().max(1.0);
                    let bound = if low { 2.0 * bound } else { bound };
                    let off = (got - wanted).abs();
                    assert!(
                        off <= bound,
                        "{activation:?} {dtype:?} {x}: {got}, {wanted}"
                    );
                }
            }
            for width in [1, 3, 8, 16, 37, 200] {
                for place in [0, width / 2, width - 1] {
                    let mut x = vec![0.5; width];
                    x[place] = f64::NAN;
                    if width > 4 {
                        x[(place + 1) % width] = 2e4;
                    }
                    for result in with_gradient(activation, &x, dtype) {
                        for (i, y) in result.into_iter().enumerate() {
                            assert_eq!(y.is_nan(), i == place, "{activation:?} {dtype:?} {y}");
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn a_nan_in_a_hidden_layer_is_a_velocity_that_is_not_finite() {
    for dtype in [DType::F32, DType::F64] {
        for (activation, fusion) in Activation::ALL
            .into_iter()
            .flat_map(|a| [(a, true), (a, false)])
        {
            let like = |shape: &[usize]| scattered(shape, 1.0, 1).to_dtype(dtype).unwrap();
            let mut bias = values(&like(&[7]));
            bias[5] = f64::NAN;
            let bias = Tensor::new(bias, &Device::Cpu)
                .unwrap()
                .to_dtype(dtype)
                .unwrap();
            let layers = [
                candle_nn::Linear::new(like(&[7, 2]), Some(bias)),
                candle_nn::Linear::new(like(&[2, 7]), Some(like(&[2]))),
            ];
            let mlp = Mlp::from_layers(&layers, activation, false).unwrap();
            let options = OdeOptions {
                fusion,
                ..Default::default()
            };
            let error = odeint(mlp, &like(&[5, 2]), &[0.0, 1.0], &options).unwrap_err();
            let finite = !matches!(error, Error::NonFiniteVelocity { .. });
            assert!(!finite, "{activation:?} {dtype:?} {fusion}: {error}");
        }
    }
}

/// A time of which bf16 knows no more than 100.5, at which 3 t − 300 is 0.9.
const LATE: f64 = 100.3;

/// Variables whose products with time, at `LATE`, are cancelled by their biases but for what is beyond
/// 100: `w`, `(units, features + 1)` with time last, and `b`.
fn late(vars: &VarMap, w: &str, b: &str) {
    let data = vars.data().lock().unwrap();
    let (w, b) = (&data[w], &data[b]);
    let (units, columns) = w.dims2().unwrap();
    let mut weight = values(w);
    let mut bias = vec![0.0; units];
    for unit in 0..units {
        // Numbers of few bits.
        let of_time = [3.0, -2.0, 1.5, -0.5][unit % 4];
        weight[unit * columns + columns - 1] = of_time;
        bias[unit] = -100.0 * of_time;
    }
    let set = |var: &Var, x: Vec<f64>| {
        let x = Tensor::from_vec(x, var.dims(), &Device::Cpu).unwrap();
        var.set(&x.to_dtype(var.dtype()).unwrap()).unwrap();
    };
    set(w, weight);
    set(b, bias);
}

/// What a field that is built in `dtype` computes late, and its f64 twin of the same numbers: the
/// velocity and the gradients of time and of all parameters.
fn late_results<S: State, F: VectorField<S>>(
    build: impl Fn(VarBuilder<'_>) -> F,
    shapes: &[&[usize]],
    (w, b): (&str, &str),
    dtype: DType,
) -> [Vec<Tensor>; 2] {
    let vars = VarMap::new();
    build(VarBuilder::from_varmap(&vars, dtype, &Device::Cpu));
    fill(&vars);
    late(&vars, w, b);
    let data = vars.data().lock().unwrap().clone();
    [(dtype, DType::F32), (DType::F64, DType::F64)].map(|(dtype, state)| {
        let twin = VarMap::new();
        for (name, var) in &data {
            let var = Var::from_tensor(&var.to_dtype(dtype).unwrap()).unwrap();
            twin.data().lock().unwrap().insert(name.clone(), var);
        }
        let field = build(VarBuilder::from_varmap(&twin, dtype, &Device::Cpu));
        let low = |seed, shape: &&[usize]| {
            let y = scattered(shape, 0.8, seed).to_dtype(DType::BF16).unwrap();
            y.to_dtype(dtype).unwrap()
        };
        let y = shapes
            .iter()
            .enumerate()
            .map(|(seed, shape)| low(seed, shape));
        let y = S::from_leaves(y.collect()).unwrap();
        let time = Time::differentiable(LATE, state, &Device::Cpu);
        let plain = field.velocity(&at(LATE, state), &y).unwrap().leaves();
        let (k, pull) = field.vjp(&time, &y).unwrap();
        assert_eq!(values(&plain[0]), values(&k.leaves()[0]));
        let velocities = k.leaves();
        let seeds = velocities
            .iter()
            .enumerate()
            .map(|(i, k)| low(i + 7, &k.dims()));
        let pulled = pull(&S::from_leaves(seeds.collect()).unwrap()).unwrap();
        let mut results = velocities;
        results.push(pulled.t.unwrap().reshape(()).unwrap());
        let mut names: Vec<_> = data.keys().collect();
        names.sort();
        let twin = twin.data().lock().unwrap();
        results.extend(
            names
                .into_iter()
                .map(|name| pulled.params.get(&twin[name]).unwrap().clone()),
        );
        results
    })
}

#[test]
fn coefficients_of_time_are_formed_in_state_precision() {
    let check = |name: &str, [low, wide]: [Vec<Tensor>; 2], bound: f64| {
        for (i, (got, exact)) in low.iter().zip(&wide).enumerate() {
            // Times that are rounded are off by half of all.
            let error = relative(got, exact);
            assert!(error <= bound, "{name}, result {i}: {error:e}");
        }
    };
    let layers = ("0.weight", "0.bias");
    for (dtype, u) in [(DType::BF16, U_BF16), (DType::F32, U_F32 * 64.0)] {
        for residual in [false, true] {
            let mlp = |vb: VarBuilder<'_>| {
                let mlp = Mlp::with_time(&[2, 8, 8, 2], Activation::Tanh, vb).unwrap();
                if residual {
                    mlp.residual()
                } else {
                    mlp
                }
            };
            check(
                "Mlp",
                late_results(mlp, &[&[3, 2]], layers, dtype),
                12.0 * u,
            );
        }
        let mlp = |vb: VarBuilder<'_>| Mlp::with_time(&[2, 8, 2], Activation::Tanh, vb).unwrap();
        let cnf = |vb: VarBuilder<'_>| Cnf::new(mlp(vb)).unwrap();
        check(
            "Cnf",
            late_results(cnf, &[&[3, 2], &[3, 1]], layers, dtype),
            24.0 * u,
        );
        let hyper = |vb: VarBuilder<'_>| HyperCnf::new(2, 4, 4, vb).unwrap();
        check(
            "HyperCnf",
            late_results(hyper, &[&[3, 2], &[3, 1]], layers, dtype),
            24.0 * u,
        );
        let flow = |vb: VarBuilder<'_>| OtFlow::new(2, 4, 2, vb).unwrap();
        let names = ("open.weight", "open.bias");
        check(
            "OtFlow",
            late_results(flow, &[&[3, 2], &[3, 3]], names, dtype),
            24.0 * u,
        );
    }
}

#[test]
fn hutchinson_over_fields_whose_jacobian_stands_still_has_the_right_gradients() {
    let z = Var::from_tensor(&scattered(&[4, 3], 0.9, 5)).unwrap();
    let probe = Probe::Rademacher.sample(&z, 3).unwrap();
    for widths in [&[3, 3][..], &[3, 6, 3], &[3, 5, 4, 3]] {
        let vars = VarMap::new();
        let flow = NeuralOde::from_field(&vars, "f", DType::F64, &Device::Cpu, |vb| {
            Ok(Hutchinson::new(Mlp::with_time(
                widths,
                Activation::Relu,
                vb,
            )?))
        });
        let flow = flow.unwrap();
        fill(&vars);
        let loss = || {
            let y0 = (
                z.as_tensor().clone(),
                zeros(&[4, 1], DType::F64),
                probe.clone(),
            );
            let (zs, ls, _) = flow.solve(&y0, &[0.0, 0.4, 1.0]).unwrap();
            let zs = zs.get(2).unwrap().sin().unwrap().sum_all().unwrap();
            (zs + ls.get(2).unwrap().sqr().unwrap().sum_all().unwrap()).unwrap()
        };
        let grads = loss().backward().unwrap();
        let data = vars.data().lock().unwrap().clone();
        for var in data.values().chain([&z]) {
            let got = values(grads.get(var).unwrap());
            let (start, base) = (var.as_tensor().copy().unwrap(), values(var));
            for i in [0, base.len() / 2, base.len() - 1] {
                let moved = |by: f64| {
                    let mut x = base.clone();
                    x[i] += by;
                    var.set(&Tensor::from_vec(x, var.dims(), &Device::Cpu).unwrap())
                        .unwrap();
                    let loss = values(&loss())[0];
                    var.set(&start).unwrap();
                    loss
                };
                let difference = (moved(1e-6) - moved(-1e-6)) / 2e-6;
                let size = difference.abs().max(1.0);
                assert!(
                    (got[i] - difference).abs() <= 1e-8 * size,
                    "{} {difference}",
                    got[i]
                );
            }
        }
    }
    // And one that is written as a closure.
    let vars = VarMap::new();
    let flow = NeuralOde::from_field(&vars, "f", DType::F64, &Device::Cpu, |vb| {
        let w = vb.get((3, 3), "w")?;
        let linear = move |_: &Time, z: &Tensor, e: &Tensor| Ok((z.matmul(&w)?, e.matmul(&w)?));
        Ok(Hutchinson::new(linear))
    });
    fill(&vars);
    let y0 = (z.as_tensor().clone(), zeros(&[4, 1], DType::F64), probe);
    let (_, ls, _) = flow.unwrap().solve(&y0, &[0.0, 1.0]).unwrap();
    let grads = ls.get(1).unwrap().sum_all().unwrap().backward().unwrap();
    assert_eq!(worst(values(grads.get(&z).unwrap())), 0.0);
}

#[test]
fn a_class_that_is_none_is_named() {
    let logits = scattered(&[5, 3], 1.0, 2).to_dtype(DType::F32).unwrap();
    for class in [3, 4, 1 << 31, u32::MAX] {
        let classes = Tensor::new(&[0, 2, 1, class, 0], &Device::Cpu).unwrap();
        let loss = RowLoss::CrossEntropy(classes);
        let named = |error: Error| match error {
            Error::Loss(LossDefect::NoSuchClass {
                row: 3,
                class: got,
                classes: 3,
            }) => assert_eq!(got, class),
            other => panic!("{other}"),
        };
        named(loss.of(&logits).unwrap_err());
        for fusion in [true, false] {
            let ode = NeuralOde::new(&VarMap::new(), "f", &Device::Cpu, |vb| {
                Mlp::new(&[3, 8, 3], Activation::Tanh, vb)
            });
            let ode = ode.unwrap().options(OdeOptions {
                fusion,
                output: Output::Final,
                ..Default::default()
            });
            named(ode.loss(&logits, &[0.0, 1.0], &loss).unwrap_err());
        }
    }
    for classes in [
        zeros(&[5], DType::I64),
        zeros(&[5], DType::F32),
        zeros(&[5], DType::U8),
        zeros(&[5, 1], DType::U32),
        zeros(&[4], DType::U32),
        zeros(&[], DType::U32),
    ] {
        let error = RowLoss::CrossEntropy(classes).of(&logits).unwrap_err();
        assert!(
            matches!(error, Error::Loss(LossDefect::States { .. })),
            "{error}"
        );
        assert!(error.to_string().contains("U32"), "{error}");
    }
}

/// Σ g ∘ f(x) is pulled back as central differences have it, in f64.
fn pulls_back(name: &str, f: &dyn Fn(&[Tensor]) -> Result<Tensor>, x: &[Tensor]) {
    let vars: Vec<_> = x.iter().map(|x| Var::from_tensor(x).unwrap()).collect();
    let tracked: Vec<_> = vars.iter().map(|v| v.as_tensor().clone()).collect();
    let weighed = |x: &[Tensor]| {
        let y = f(x).unwrap();
        (&y * scattered(y.dims(), 1.0, 31))
            .unwrap()
            .sum_all()
            .unwrap()
    };
    let grads = weighed(&tracked).backward().unwrap();
    for (i, var) in vars.iter().enumerate() {
        let (got, base) = (values(grads.get(var).unwrap()), values(var));
        for j in 0..base.len() {
            let moved = |by: f64| {
                let (mut all, mut numbers) = (x.to_vec(), base.clone());
                numbers[j] += by;
                all[i] = Tensor::from_vec(numbers, var.dims(), &Device::Cpu).unwrap();
                values(&weighed(&all))[0]
            };
            let difference = (moved(1e-5) - moved(-1e-5)) / 2e-5;
            let off = (got[j] - difference).abs();
            assert!(off <= 1e-8, "{name}, input {i}: {}, {difference}", got[j]);
        }
    }
}

fn inputs(shapes: &[&[usize]]) -> Vec<Tensor> {
    let each = shapes.iter().enumerate();
    each.map(|(seed, shape)| scattered(shape, 1.2, seed + 1))
        .collect()
}

#[test]
fn norms_and_softmax_have_right_pull_backs() {
    let x = inputs(&[&[2, 3, 4], &[4], &[4]]);
    let norm = |x: &[Tensor]| LayerNorm::new(x[1].clone(), x[2].clone(), 1e-5).forward(&x[0]);
    pulls_back("LayerNorm", &norm, &x);
    let bare = |x: &[Tensor]| LayerNorm::new_no_bias(x[1].clone(), 1e-5).forward(&x[0]);
    pulls_back("LayerNorm", &bare, &x[..2]);
    let rms = |x: &[Tensor]| RmsNorm::new(x[1].clone(), 1e-5).forward(&x[0]);
    pulls_back("RmsNorm", &rms, &x[..2]);
    let turned = inputs(&[&[4, 3], &[4], &[4]]);
    let of_turned = |x: &[Tensor]| norm(&[x[0].t()?, x[1].clone(), x[2].clone()]);
    pulls_back("LayerNorm of a turned tensor", &of_turned, &turned);
    for dim in 0..3 {
        pulls_back("softmax", &|x: &[Tensor]| softmax(&x[0], dim), &x[..1]);
    }
    pulls_back(
        "softmax",
        &|x: &[Tensor]| softmax_last_dim(&x[0].t()?),
        &x[..1],
    );
}

#[test]
fn convolutions_of_sequences_have_right_pull_backs() {
    let plain = Conv1dConfig::default();
    for (padding, stride, dilation, groups) in [
        (0, 1, 1, 1),
        (1, 1, 1, 1),
        (2, 2, 1, 1),
        (1, 3, 2, 1),
        (1, 1, 1, 2),
        (0, 2, 2, 2),
    ] {
        let config = Conv1dConfig {
            padding,
            stride,
            dilation,
            groups,
            ..plain
        };
        for (batch, size) in [(1, 3), (2, 3), (3, 2), (2, 1)] {
            let x = inputs(&[&[batch, 2, 8], &[4, 2 / groups, size], &[4]]);
            let ours =
                |x: &[Tensor]| Conv1d::new(x[1].clone(), Some(x[2].clone()), config).forward(&x[0]);
            pulls_back("Conv1d", &ours, &x);
            let theirs = candle_nn::Conv1d::new(x[1].clone(), Some(x[2].clone()), config);
            let theirs = theirs.forward(&x[0]).unwrap();
            assert!(relative(&ours(&x).unwrap(), &theirs) <= 32.0 * U_F64);
        }
        let x = inputs(&[&[6, 2, 2], &[4, 2 / groups, 2]]);
        let turned = |x: &[Tensor]| {
            Conv1d::new(x[1].clone(), None, config).forward(&x[0].permute((2, 1, 0))?)
        };
        pulls_back("Conv1d of a turned tensor", &turned, &x);
    }
}

#[test]
fn drop_ins_are_candles_layers_by_name_shape_first_value_and_result() {
    for (dtype, u) in [
        (DType::F64, U_F64),
        (DType::F32, U_F32),
        (DType::BF16, U_BF16),
        (DType::F16, U_F16),
    ] {
        let vars = VarMap::new();
        let vb = || VarBuilder::from_varmap(&vars, dtype, &Device::Cpu);
        let x = scattered(&[3, 5, 8], 2.0, 4).to_dtype(dtype).unwrap();
        // candle's fused norms know no f64, and a tensor that is not contiguous takes the other way.
        let turned = x.transpose(0, 1).unwrap();
        let same = |name: &str, ours: &dyn Module, theirs: &dyn Module| {
            let (got, wanted) = (
                ours.forward(&turned).unwrap(),
                theirs.forward(&turned).unwrap(),
            );
            assert_eq!(got.dtype(), dtype);
            // Ours rounds once, candle's at each step.
            assert!(relative(&got, &wanted) <= 8.0 * u, "{name} {dtype:?}");
            if dtype != DType::F64 {
                let (got, wanted) = (ours.forward(&x).unwrap(), theirs.forward(&x).unwrap());
                assert!(relative(&got, &wanted) <= 8.0 * u, "{name} {dtype:?}");
            }
        };
        let config = LayerNormConfig {
            eps: 1e-3,
            ..Default::default()
        };
        let (ours, theirs) = (
            layer_norm(8, config, vb().pp("a")),
            candle_nn::layer_norm(8, config, vb().pp("a")),
        );
        same("layer_norm", &ours.unwrap(), &theirs.unwrap());
        let (ours, theirs) = (
            rms_norm(8, 1e-6, vb().pp("b")),
            candle_nn::rms_norm(8, 1e-6, vb().pp("b")),
        );
        same("rms_norm", &ours.unwrap(), &theirs.unwrap());
        let (ours, theirs) = (
            layer_norm_no_bias(8, 1e-5, vb().pp("c")),
            candle_nn::layer_norm_no_bias(8, 1e-5, vb().pp("c")),
        );
        same("layer_norm_no_bias", &ours.unwrap(), &theirs.unwrap());
        let mean = LayerNormConfig {
            remove_mean: false,
            ..config
        };
        let (ours, theirs) = (
            layer_norm(8, mean, vb().pp("d")),
            candle_nn::layer_norm(8, mean, vb().pp("d")),
        );
        same("layer_norm without mean", &ours.unwrap(), &theirs.unwrap());
        let config = Conv1dConfig {
            padding: 1,
            ..Default::default()
        };
        let ours = conv1d(5, 4, 3, config, vb().pp("e")).unwrap();
        let theirs = candle_nn::conv1d(5, 4, 3, config, vb().pp("e")).unwrap();
        let bare = conv1d_no_bias(5, 4, 3, config, vb().pp("e")).unwrap();
        assert!(bare.bias().is_none() && bare.weight().dims() == theirs.weight().dims());
        if dtype == DType::F32 || dtype == DType::F64 {
            let (got, wanted) = (ours.forward(&x).unwrap(), theirs.forward(&x).unwrap());
            assert!(relative(&got, &wanted) <= 8.0 * u);
        }
        for dim in 0..3 {
            let (got, wanted) = (
                softmax(&x, dim).unwrap(),
                candle_nn::ops::softmax(&x, dim).unwrap(),
            );
            assert_eq!(got.dtype(), dtype);
            assert!(relative(&got, &wanted) <= 8.0 * u);
        }
        let mut names: Vec<_> = vars.data().lock().unwrap().keys().cloned().collect();
        names.sort();
        assert_eq!(
            names,
            [
                "a.bias", "a.weight", "b.weight", "c.weight", "d.bias", "d.weight", "e.bias",
                "e.weight"
            ]
        );
        // Low precision is rounded once: against f64 it is off by one roundoff.
        let wide = x.to_dtype(DType::F64).unwrap();
        let exact = candle_nn::ops::softmax(&wide, D::Minus1).unwrap();
        assert!(relative(&softmax(&x, D::Minus1).unwrap(), &exact) <= u + 8.0 * U_F32);
    }
}

#[test]
fn the_gradient_of_a_bias_is_summed_in_f32_over_a_large_batch() {
    let bias = Var::from_tensor(&zeros(&[3], DType::BF16)).unwrap();
    let layer = candle_nn::Linear::new(zeros(&[3, 2], DType::BF16), Some(bias.as_tensor().clone()));
    let y = Linear::from(layer)
        .forward(&zeros(&[4096, 2], DType::BF16))
        .unwrap();
    let grads = y.sum_all().unwrap().backward().unwrap();
    assert_eq!(values(grads.get(&bias).unwrap()), [4096.0; 3]);
}

#[test]
fn variables_that_are_set_are_read_by_the_next_evaluation() {
    let fields = Fields::of(DType::F32);
    let z = scattered(&[3, 2], 0.7, 1).to_dtype(DType::F32).unwrap();
    let y = scattered(&[2, 2, 4, 4], 0.7, 1)
        .to_dtype(DType::F32)
        .unwrap();
    let results = |see: &dyn Evaluate| {
        let (y, params) = see.gradients().unwrap();
        let all = [see.velocity().unwrap(), y, params].concat();
        all.iter().map(values).collect::<Vec<_>>()
    };
    // Fields over the variables as they are drawn, of which the values are then replaced.
    let drawn: std::cell::RefCell<Vec<Vec<Vec<f64>>>> = Default::default();
    let each = |look: &mut dyn FnMut(&str, &dyn Evaluate)| {
        fields.each(&z, &mut |name: &str, field: &dyn Evaluate| {
            look(name, field);
        });
        fields.each_of_images(&y, &mut |name: &str, field: &dyn Evaluate| {
            look(name, field);
        });
    };
    // All variables exist before any is filled.
    each(&mut |_, _| {});
    each(&mut |_, field| {
        // Evaluated once, so that whatever is kept is there.
        results(field);
        fill(&fields.vars);
        drawn.borrow_mut().push(results(field));
        for var in fields.vars.all_vars() {
            var.set(&(var.as_tensor() * 0.5).unwrap()).unwrap();
        }
    });
    fill(&fields.vars);
    let mut before = drawn.into_inner().into_iter();
    each(&mut |name, field| {
        assert_eq!(Some(results(field)), before.next(), "{name}");
    });
}
