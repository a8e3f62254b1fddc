//! Stochastic equations are solved alike tile by tile and on the general path, by every method, and with the same noise.
//!
//! `cargo test --release --test sde_tiles`, seconds; of other vector units under `CANDLE_DIFFEQ_SIMD=avx2`.

mod common;

use candle_core::{DType, Device, Tensor, Var};
use candle_diffeq::error::SdeDefect;
use candle_diffeq::metrics::Recorder;
use candle_diffeq::nn::{Activation, ConstantField, Mlp, Relaxation};
use candle_diffeq::options::{Checkpoint, Output, Steps};
use candle_diffeq::sde::{
    ito, predict, sdeint, stratonovich, BrownianTree, Calculus, NeuralSde, Noise, NoiseType,
    OfField, Sde, SdeMethod, SdeOptions, ALL, EULER_HEUN, EULER_MARUYAMA, HEUN, REVERSIBLE_HEUN,
    SRA1, SRI2,
};
use candle_diffeq::{Error, Precision, Time};
use candle_nn::VarMap;
use common::{values as numbers, U_BF16, U_F16, U_F32};

const FEATURES: usize = 3;

/// How an equation is made.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Kind {
    Diagonal,
    Scalar,
    /// Diagonal and additive.
    Additive,
}

/// States, gradients of y0, gradients of all parameters.
type Answers = [Vec<f64>; 3];

#[derive(Clone, Debug)]
struct Case {
    kind: Kind,
    method: SdeMethod,
    noise: Noise,
    rows: usize,
    dtype: DType,
    options: SdeOptions,
}

fn case(kind: Kind, method: SdeMethod) -> Case {
    Case {
        kind,
        method,
        noise: Noise::seeded(11),
        rows: 37,
        dtype: DType::F64,
        options: SdeOptions {
            method,
            steps: Steps::PerInterval(5),
            ..Default::default()
        },
    }
}

/// Numbers in (−size, size), of f32.
fn some(shape: &[usize], size: f64, seed: usize, dtype: DType) -> Tensor {
    let n: usize = shape.iter().product();
    let at = |i: usize| (size * (12.9898 * (i + 1) as f64 + 4.1414 * seed as f64).sin()) as f32;
    let x = Tensor::from_vec((0..n).map(at).collect::<Vec<_>>(), shape, &Device::Cpu);
    x.unwrap().to_dtype(dtype).unwrap()
}

impl Case {
    fn equation<F, G>(&self, drift: F, diffusion: G) -> Sde<F, G> {
        let sde = match self.method.calculus() {
            Calculus::Ito => ito(drift, diffusion),
            Calculus::Stratonovich => stratonovich(drift, diffusion),
        };
        match self.kind {
            Kind::Diagonal => sde,
            Kind::Scalar => sde.scalar(),
            Kind::Additive => sde.additive(),
        }
    }

    fn model(&self, vars: &VarMap, fusion: bool) -> NeuralSde {
        let case = self.clone();
        let widths = [FEATURES, 17, FEATURES];
        let (of_both, device) = (self.dtype, Device::Cpu);
        let sde = match self.kind {
            Kind::Additive if !needs_term(self.method) => {
                NeuralSde::new(vars, "", of_both, &device, move |vb| {
                    let drift = Mlp::with_time(&widths, Activation::Silu, vb.pp("f"))?;
                    let spread = ConstantField::new(FEATURES, 0.4, vb.pp("g"))?;
                    Ok(case.equation(drift, OfField(spread)))
                })
            }
            // What stands for g ∂g/∂y is a network of its own: tiles need not know what it means.
            _ if needs_term(self.method) => NeuralSde::new(vars, "", of_both, &device, move |vb| {
                let mlp = |name: &str| Mlp::new(&widths, Activation::Tanh, vb.pp(name));
                let sde = case.equation(mlp("f")?, OfField(mlp("g")?));
                Ok(sde.milstein_term(mlp("m")?))
            }),
            _ => NeuralSde::new(vars, "", of_both, &device, move |vb| {
                let drift = Relaxation::new(Mlp::new(&widths, Activation::Tanh, vb.pp("f"))?);
                let diffusion = Mlp::new(&widths, Activation::Tanh, vb.pp("g"))?;
                Ok(case.equation(drift, OfField(diffusion)))
            }),
        };
        sde.unwrap().options(SdeOptions {
            fusion,
            ..self.options.clone()
        })
    }

    fn answers(&self, fusion: bool) -> Answers {
        let vars = VarMap::new();
        let sde = self.model(&vars, fusion);
        let mut all: Vec<_> = vars.data().lock().unwrap().clone().into_iter().collect();
        all.sort_by(|a, b| a.0.cmp(&b.0));
        for (seed, (_, var)) in all.iter().enumerate() {
            var.set(&some(var.dims(), 0.5, seed, self.dtype)).unwrap();
        }
        let y0 = Var::from_tensor(&some(&[self.rows, FEATURES], 1.0, 40, self.dtype)).unwrap();
        let ys = sde
            .solve(y0.as_tensor(), &[0.0, 0.3, 1.0], &self.noise)
            .unwrap();
        let weights = some(ys.dims(), 1.0, 50, ys.dtype());
        let loss = (&ys * weights).unwrap().sum_all().unwrap();
        let grads = loss.backward().unwrap();
        let of = |var: &Var| numbers(grads.get(var).unwrap());
        let theta = all.iter().flat_map(|(_, var)| of(var)).collect();
        [numbers(&ys), of(&y0), theta]
    }
}

/// max |x − exact| / max |exact| of each.
fn errors(got: &Answers, exact: &Answers) -> [f64; 3] {
    [0, 1, 2].map(|i| {
        assert_eq!(got[i].len(), exact[i].len());
        let largest = |x: &mut dyn Iterator<Item = f64>| x.map(f64::abs).fold(0.0, f64::max);
        let differences = got[i].iter().zip(&exact[i]).map(|(x, e)| x - e);
        assert!(differences.clone().all(f64::is_finite));
        largest(&mut { differences }) / largest(&mut exact[i].iter().copied())
    })
}

fn bits(answers: &Answers) -> Vec<u64> {
    answers.iter().flatten().map(|x| x.to_bits()).collect()
}

/// Whether a method evaluates g ∂g/∂y.
fn needs_term(method: SdeMethod) -> bool {
    method.name().starts_with("milstein_") && !method.name().contains("free")
}

/// Cases of every method, with the noise that it is for.
fn cases() -> Vec<Case> {
    let mut cases = vec![];
    for method in ALL {
        let kinds = [Kind::Diagonal, Kind::Scalar, Kind::Additive];
        let noise = |kind| match kind {
            Kind::Scalar => NoiseType::Scalar,
            _ => NoiseType::Diagonal,
        };
        let fits = |kind: &Kind| {
            let additive = *kind == Kind::Additive;
            let solves = method.strong_order(noise(*kind), additive).is_some();
            solves && !(additive && needs_term(method))
        };
        cases.extend(
            kinds
                .into_iter()
                .filter(fits)
                .map(|kind| case(kind, method)),
        );
    }
    cases
}

#[test]
fn every_method_gives_the_states_and_gradients_of_the_general_path() {
    let all = cases();
    assert!(all.len() >= 28);
    for mut case in all {
        let exact = case.answers(false);
        for error in errors(&case.answers(true), &exact) {
            assert!(error <= 1e-12, "{case:?}: {error:e}");
        }
        // In f32 tiles of one vector, and of two.
        for rows in [37, 150] {
            case.rows = rows;
            case.dtype = DType::F64;
            let exact = case.answers(false);
            case.dtype = DType::F32;
            let general = errors(&case.answers(false), &exact);
            let tiles = errors(&case.answers(true), &exact);
            for (error, general) in tiles.iter().zip(general) {
                // Tiles sum in f32 what the general path sums in f64 and rounds once: the terms of every evaluation of a
                // step, forward and back.
                let terms = 4 * case.method.evaluations().iter().sum::<usize>();
                let bound = (16 + terms) as f64 * U_F32 + general;
                assert!(*error <= bound, "{case:?}: {tiles:?}, {general:e}");
            }
        }
    }
}

#[test]
fn a_path_of_a_tree_is_the_same_in_tiles() {
    for method in [HEUN, REVERSIBLE_HEUN] {
        let mut case = case(Kind::Diagonal, method);
        case.noise = BrownianTree::new(3, 12).unwrap().into();
        let exact = case.answers(false);
        assert!(errors(&case.answers(true), &exact)
            .iter()
            .all(|e| *e <= 1e-12));
    }
}

/// y' = 0 dt + 1 dW over steps of length one: the increments themselves, and their running sum.
#[test]
fn the_noise_of_tiles_has_the_bits_of_the_general_path() {
    let (rows, features) = (75, 5);
    let zeros = Tensor::zeros(features, DType::F64, &Device::Cpu).unwrap();
    let ones = zeros.ones_like().unwrap();
    let y0 = Tensor::zeros((rows, features), DType::F64, &Device::Cpu).unwrap();
    let times = [0.0, 1.0, 2.0];
    let tree = Noise::from(BrownianTree::new(4, 12).unwrap());
    for noise in [
        Noise::seeded(77),
        Noise::seeded(77).from_row(1000),
        tree.from_row(3),
    ] {
        let path = noise.increments(&times, (rows, features), DType::F64, &Device::Cpu);
        let path = path.unwrap().w().clone();
        let sums = (path.get(0).unwrap() + path.get(1).unwrap()).unwrap();
        for dtype in [DType::F64, DType::F32] {
            let solve = |fusion| {
                let of = |c: &Tensor| ConstantField::from_value(c.to_dtype(dtype).unwrap());
                let sde = ito(of(&zeros).unwrap(), OfField(of(&ones).unwrap())).additive();
                let options = SdeOptions {
                    fusion,
                    ..Default::default()
                };
                let y0 = y0.to_dtype(dtype).unwrap();
                numbers(&predict(&sde, &y0, &times, &noise, &options).unwrap())
            };
            let (tiles, general) = (solve(true), solve(false));
            assert!(tiles == general);
            let first = numbers(&path.get(0).unwrap().to_dtype(dtype).unwrap());
            assert!(tiles[rows * features..][..rows * features] == first);
            if dtype == DType::F64 {
                assert!(tiles[2 * rows * features..] == numbers(&sums));
            }
        }
    }
}

#[test]
fn bits_do_not_depend_on_the_number_of_threads_nor_on_the_memory_plan() {
    for method in [EULER_MARUYAMA, REVERSIBLE_HEUN, SRI2] {
        let mut case = case(Kind::Diagonal, method);
        case.dtype = DType::F32;
        case.rows = 300;
        let on = |case: &Case, threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads);
            pool.build().unwrap().install(|| bits(&case.answers(true)))
        };
        let one = on(&case, 1);
        assert!(one == on(&case, 7));
        for plan in [
            Checkpoint::Every(3),
            Checkpoint::States(2),
            Checkpoint::Bytes(20_000),
        ] {
            case.options.checkpoint = plan;
            assert!(one == on(&case, 2), "{plan:?}");
        }
    }
}

/// Of `benches/peers/driven.py`, which draws the same noise with numpy.
#[test]
fn loss_and_gradients_are_those_of_an_independent_reference_with_the_same_seed() {
    let file = "tests/data/workloads/S0.safetensors";
    let tensors = candle_core::safetensors::load(file, &Device::Cpu).unwrap();
    let double = |name: &str| tensors[name].to_dtype(DType::F64).unwrap();
    let weights: Vec<_> = (0..8)
        .map(|i| Var::from_tensor(&double(&format!("p{i}"))).unwrap())
        .collect();
    let network = |of: &[Var]| {
        let layer = |pair: &[Var]| {
            candle_nn::Linear::new(
                pair[0].as_tensor().clone(),
                Some(pair[1].as_tensor().clone()),
            )
        };
        let layers: Vec<_> = of.chunks(2).map(layer).collect();
        Mlp::from_layers(&layers, Activation::Tanh, false).unwrap()
    };
    let y0 = Var::from_tensor(&double("y0")).unwrap();
    let times = double("t").to_vec1::<f64>().unwrap();
    for fusion in [true, false] {
        let sde = stratonovich(network(&weights[..4]), OfField(network(&weights[4..])));
        let options = SdeOptions {
            method: HEUN,
            fusion,
            output: Output::Final,
            ..Default::default()
        };
        let noise = Noise::seeded(70);
        let y = sdeint(sde, y0.as_tensor(), &times[..], &noise, &options).unwrap();
        let loss = (y - double("target")).unwrap().sqr().unwrap();
        let loss = loss.mean_all().unwrap();
        let grads = loss.backward().unwrap();
        assert!(common::relative(&loss.reshape(1).unwrap(), &double("loss")) < 1e-13);
        let named = weights
            .iter()
            .enumerate()
            .map(|(i, w)| (format!("grad.p{i}"), w));
        for (name, var) in named.chain([("grad.y0".to_owned(), &y0)]) {
            let error = common::relative(grads.get(var).unwrap(), &double(&name));
            assert!(error < 1e-12, "{name}: {error:e}");
        }
    }
}

#[test]
fn statistics_are_those_of_the_general_path() {
    for method in [EULER_MARUYAMA, REVERSIBLE_HEUN, SRI2] {
        for plan in [Checkpoint::All, Checkpoint::Every(3)] {
            let of = |fusion| {
                let recorder = Recorder::default();
                let mut case = case(Kind::Diagonal, method);
                case.options.checkpoint = plan;
                case.options.recorder = Some(recorder.clone());
                case.answers(fusion);
                let stats = recorder.take();
                let work = [stats.steps, stats.evaluations, stats.recomputed, stats.vjps];
                (work, stats.states_kept, stats.bytes_kept)
            };
            assert_eq!(of(true), of(false), "{} {plan:?}", method.name());
        }
    }
}

#[test]
fn what_states_are_said_to_need_is_what_is_kept_of_all_that_a_step_carries() {
    /// Steps in each of two intervals: few, and more than any machine has memory for, all of moderate length.
    const STEPS: [usize; 2] = [32, 1 << 40];
    const ENDS: [f64; 2] = [1.0, (1 << 20) as f64];
    for method in [HEUN, REVERSIBLE_HEUN] {
        for fusion in [true, false] {
            let mut case = case(Kind::Diagonal, method);
            case.rows = 1 << 9;
            let mut run = |steps: usize, end: f64, checkpoint: Checkpoint| {
                let recorder = Recorder::default();
                case.options.steps = Steps::PerInterval(steps);
                case.options.checkpoint = checkpoint;
                case.options.recorder = Some(recorder.clone());
                let sde = case.model(&VarMap::new(), fusion);
                let y0 = some(&[case.rows, FEATURES], 1.0, 40, case.dtype);
                let y0 = Var::from_tensor(&y0).unwrap();
                let ys = sde.solve(y0.as_tensor(), &[0.0, 0.3 * end, end], &case.noise)?;
                ys.sum_all()?.backward()?;
                Ok::<_, Error>(recorder.take())
            };
            let budget = |steps: usize| Checkpoint::Bytes(steps << 13);
            for plan in [|_| Checkpoint::All, |_| Checkpoint::Every(8), budget] {
                let kept = run(STEPS[0], ENDS[0], plan(STEPS[0])).unwrap();
                let (name, plan) = (method.name(), plan(STEPS[1]));
                let need = match run(STEPS[1], ENDS[1], plan) {
                    Err(Error::OutOfMemory { need, .. }) => need.states as f64,
                    other => panic!("{name} {plan:?}: {other:?}"),
                };
                let steps = (2 * STEPS[1]) as f64;
                let will_be_kept = match plan {
                    Checkpoint::Bytes(bytes) => bytes as f64,
                    _ => {
                        let states = match plan {
                            Checkpoint::Every(k) => steps / k as f64,
                            _ => steps,
                        };
                        states * kept.bytes_kept as f64 / kept.states_kept as f64
                    }
                };
                let ratio = need / will_be_kept;
                // What is kept of a tile by itself takes 64 bytes more, where the numbers of four rows take 96.
                assert!(
                    (1.0 - 1e-6..=1.7).contains(&ratio),
                    "{name} {plan:?} {fusion}: {ratio}"
                );
                if plan == Checkpoint::All {
                    // Tensors take some more than their numbers, tiles do not.
                    assert_eq!(ratio > 1.001, !(fusion && common::has_tiles()), "{name}");
                }
            }
        }
    }
}

#[test]
fn a_row_does_not_depend_on_the_rows_beside_it() {
    let states = |rows: usize| {
        let mut case = case(Kind::Diagonal, HEUN);
        case.rows = rows;
        case.options.output = Output::Final;
        let [states, ..] = case.answers(true);
        states
    };
    let whole = states(100);
    let y = |rows: usize| rows * FEATURES;
    assert_eq!(states(7), whole[..y(7)]);
    assert_eq!(states(33), whole[..y(33)]);
}

#[test]
fn rounding_around_tiles_is_that_of_the_general_path() {
    for (precision, u) in [(Precision::bf16(), U_BF16), (Precision::f16(), U_F16)] {
        for (kind, method) in [
            (Kind::Diagonal, EULER_HEUN),
            (Kind::Scalar, HEUN),
            (Kind::Additive, SRA1),
        ] {
            let mut case = case(kind, method);
            case.dtype = DType::F32;
            let exact = case.answers(false);
            case.options.precision = Some(precision);
            let general = errors(&case.answers(false), &exact);
            let tiles = errors(&case.answers(true), &exact);
            for (tiles, general) in tiles.iter().zip(general) {
                assert!(*tiles <= general + u, "{case:?}: {tiles:e}, {general:e}");
            }
            // Something was rounded at all.
            assert!(tiles.iter().all(|e| *e > 0.02 * u), "{tiles:?}");
        }
    }
}

#[test]
fn what_has_no_tiles_is_left_to_the_general_path() {
    let vars = VarMap::new();
    let mut case = case(Kind::Diagonal, EULER_MARUYAMA);
    case.options.steps = Steps::PerInterval(1);
    let models = [true, false].map(|fusion| case.model(&vars, fusion));
    let times = [0.0, 0.5];
    let path = Noise::seeded(1)
        .increments(&times, (5, FEATURES), DType::F64, &Device::Cpu)
        .unwrap();
    // Increments that are given; rows in two dimensions, of which the first has noise of its own; steps by which f32
    // cannot multiply cotangents.
    for (shape, times, noise) in [
        (vec![5, FEATURES], times, path.into()),
        (vec![4, 2, FEATURES], times, Noise::seeded(1)),
        (vec![5, FEATURES], [0.0, 1e-9], Noise::seeded(1)),
    ] {
        let y0 = some(&shape, 1.0, 1, DType::F64);
        let [tiles, general] = models
            .each_ref()
            .map(|sde| numbers(&sde.predict(&y0, &times, &noise).unwrap()));
        assert_eq!(tiles, general);
    }
}

#[test]
fn noise_that_is_not_additive_as_declared_is_an_error_of_the_backward_pass() {
    let vars = VarMap::new();
    let sde = NeuralSde::new(&vars, "", DType::F32, &Device::Cpu, |vb| {
        let mlp = |name: &str| Mlp::new(&[2, 8, 2], Activation::Tanh, vb.pp(name));
        Ok(ito(mlp("f")?, OfField(mlp("g")?)).additive())
    })
    .unwrap();
    let y0 = some(&[20, 2], 1.0, 1, DType::F32);
    let ys = sde.solve(&y0, &[0.0, 0.1, 0.2], &Noise::seeded(1)).unwrap();
    let error = ys.sum_all().unwrap().backward().map(|_| ()).unwrap_err();
    let expected = Error::Sde(SdeDefect::NotAdditive { step: 1, t: 0.1 });
    assert!(error.to_string().contains(&expected.to_string()), "{error}");
}

#[test]
fn a_part_of_other_features_than_the_state_is_an_error() {
    let device = Device::Cpu;
    let value = |n: usize| Tensor::ones(n, DType::F32, &device).unwrap();
    let fields = |f: usize, g: usize| {
        let of = |n: usize| ConstantField::from_value(value(n)).unwrap();
        ito(of(f), OfField(of(g))).additive()
    };
    let y0 = some(&[6, 3], 1.0, 1, DType::F32);
    for (f, g) in [(2, 3), (3, 2), (1, 1)] {
        let solved = predict(
            &fields(f, g),
            &y0,
            &[0.0, 0.1],
            &Noise::seeded(1),
            &Default::default(),
        );
        let error = solved.unwrap_err().to_string();
        assert!(error.contains("a ConstantField of"), "{error}");
    }
    let wide = Tensor::ones((2, 2), DType::F32, &device).unwrap();
    let whole = Tensor::ones(2, DType::U32, &device).unwrap();
    let none = Tensor::zeros(0, DType::F32, &device).unwrap();
    for value in [wide, whole, none] {
        assert!(ConstantField::from_value(value).is_err());
    }
}

#[test]
fn samples_of_tiles_are_rows_of_a_repeated_state() {
    let vars = VarMap::new();
    let mut case = case(Kind::Diagonal, HEUN);
    let of = |case: &Case, samples: usize, y0: &Tensor| {
        let mut case = case.clone();
        case.options.samples = samples;
        let sde = case.model(&vars, true);
        let ys = sde.solution(y0, &[0.0, 0.5], &case.noise).unwrap();
        let grads = ys.vjp(&ys.states().ones_like().unwrap()).unwrap();
        (numbers(ys.states()), grads.y0)
    };
    let y0 = some(&[5, FEATURES], 1.0, 3, DType::F64);
    case.rows = 5;
    let (by_option, gradient) = of(&case, 9, &y0);
    let (repeated, each) = of(&case, 1, &y0.repeat((9, 1)).unwrap());
    assert_eq!(by_option, repeated);
    let sum = each.reshape((9, 5, FEATURES)).unwrap().sum(0).unwrap();
    assert_eq!(gradient.dims(), [5, FEATURES]);
    assert!(common::relative(&gradient, &sum) < 1e-14);
}

#[test]
fn samples_that_have_no_noise_of_their_own_or_no_memory_are_refused() {
    let sde = ito(
        |_: &Time, y: &Tensor| y.neg(),
        |_: &Time, y: &Tensor| y.ones_like(),
    )
    .additive();
    let y0 = Tensor::ones((2, 1), DType::F64, &Device::Cpu).unwrap();
    let run = |y0: &Tensor, samples: usize, noise: Noise| {
        let options = SdeOptions {
            samples,
            ..Default::default()
        };
        predict(&sde, y0, &[0.0, 1.0], &noise, &options)
    };
    let part = run(&y0, 2, Noise::seeded(1).from_row(2));
    let (samples, first_row) = (2, 2);
    let expected = SdeDefect::SamplesOfPart { samples, first_row };
    assert!(matches!(part, Err(Error::Sde(defect)) if defect == expected));
    let beyond = run(&y0, 1, Noise::seeded(1).from_row((1 << 32) - 1));
    assert!(matches!(
        beyond,
        Err(Error::Sde(SdeDefect::TooManyRows { .. }))
    ));
    for samples in [1 << 40, usize::MAX] {
        let many = run(&y0, samples, Noise::seeded(1));
        assert!(matches!(many, Err(Error::OutOfMemory { .. })), "{many:?}");
    }
    // No rows are no error.
    let none = Tensor::zeros((0, 1), DType::F64, &Device::Cpu).unwrap();
    let ys = run(&none, 3, Noise::seeded(1)).unwrap();
    assert_eq!(ys.dims(), [2, 0, 1]);
}
