//! Stochastic differential equations: the schemes of `tests/data/sde` on given increments, orders of convergence, gradients,
//! memory plans, precision, and what is refused.
//!
//! `cargo test --release --test sde`, seconds.

mod common;
#[path = "../examples/conformance/equations.rs"]
mod equations;
#[allow(dead_code)]
#[path = "../examples/conformance/oracle.rs"]
mod oracle;
#[allow(dead_code)]
#[path = "../examples/conformance/outcome.rs"]
mod outcome;
#[allow(dead_code)]
#[path = "../examples/conformance/sde.rs"]
mod sde;

use std::path::PathBuf;

use candle_core::{DType, Device, Module, Tensor, Var};
use candle_diffeq::error::SdeDefect;
use candle_diffeq::nn::ConstantField;
use candle_diffeq::options::{Checkpoint, Output, Steps};
use candle_diffeq::sde::{
    ito, predict, sdeint, solution, stratonovich, BrownianTree, Calculus, Increments, NeuralSde,
    Noise, NoiseType, OfField, SdeMethod, SdeOptions, ALL, EULER_HEUN, EULER_MARUYAMA, HEUN,
    MILSTEIN_FREE_ITO, MILSTEIN_ITO, REVERSIBLE_HEUN, SRA1, SRI2,
};
use candle_diffeq::{Error, Precision, Time};
use common::{bits, relative, values, U_BF16, U_F16};
use equations::{parts, Equation, Part};
use oracle::Oracle;
use sde::{as_weights, grid, of_file, schemes, weights};

fn files() -> Vec<Oracle> {
    let root = std::env::var_os("CARGO_MANIFEST_DIR");
    let root = root.map_or_else(|| env!("CARGO_MANIFEST_DIR").into(), PathBuf::from);
    Oracle::read_all(&root.join("tests/data/sde")).unwrap()
}

#[test]
fn states_and_gradients_of_every_scheme_are_those_of_the_oracles() {
    let mut runs = 0;
    for file in &files() {
        for scheme in schemes(file) {
            let run = sde::run(file, scheme, Checkpoint::All, Precision::f64()).unwrap();
            let name = scheme.1.name();
            assert!(
                run.states <= 1e-12,
                "{} {name}: {:e}",
                file.file,
                run.states
            );
            assert!(
                run.gradients <= 1e-11,
                "{} {name}: {:e}",
                file.file,
                run.gradients
            );
            runs += 1;
        }
    }
    assert_eq!(runs, 46);
}

/// Gradients of y0, of all weights and of the increments, of one solve by a method.
fn gradients(file: &Oracle, method: SdeMethod, checkpoint: Checkpoint) -> Vec<u64> {
    let vars = weights(file).unwrap();
    let equation = of_file(file, method, &as_weights(&vars)).unwrap();
    let noise = sde::increments(file, 16).unwrap();
    let options = SdeOptions {
        method,
        checkpoint,
        ..Default::default()
    };
    let y0 = file.tensor("y0").unwrap();
    let solved = solution(&equation, y0, &grid(16), &noise.clone().into(), &options).unwrap();
    let grads = solved.vjp(file.tensor("loss.v").unwrap()).unwrap();
    let mut all = bits(&grads.y0);
    for (_, var) in &vars {
        all.extend(bits(grads.params.get(var.as_tensor()).unwrap()));
    }
    all.extend(bits(grads.params.get(noise.w()).unwrap()));
    all
}

#[test]
fn every_memory_plan_gives_the_same_bits() {
    let file = &files()[4];
    for method in [EULER_MARUYAMA, MILSTEIN_FREE_ITO, REVERSIBLE_HEUN, SRI2] {
        let all = gradients(file, method, Checkpoint::All);
        for plan in [
            Checkpoint::Every(5),
            Checkpoint::States(3),
            Checkpoint::Every(1),
        ] {
            assert!(gradients(file, method, plan) == all, "{plan:?}");
        }
    }
}

/// Root mean square of the distance between the rows of two states.
fn rms(a: &Tensor, b: &Tensor) -> f64 {
    let d = values(&(a - b).unwrap());
    (d.iter().map(|d| d * d).sum::<f64>() / d.len() as f64).sqrt()
}

/// The slope of ln(error) over ln(h), of all halvings.
fn slope(errors: &[f64]) -> f64 {
    let n = errors.len() as f64;
    let x = |i: usize| -(i as f64) * 2f64.ln();
    let (mx, my) = (
        (0..errors.len()).map(x).sum::<f64>() / n,
        errors.iter().map(|e| e.ln()).sum::<f64>() / n,
    );
    let of = |f: &dyn Fn(usize) -> f64| (0..errors.len()).map(f).sum::<f64>();
    of(&|i| (x(i) - mx) * (errors[i].ln() - my)) / of(&|i| (x(i) - mx).powi(2))
}

/// Observed strong orders of every method that solves the problem of a file, on many paths: against the same path by the
/// best method with many steps.
fn strong_orders(file: &Oracle) -> Vec<(SdeMethod, f64, f64)> {
    const PATHS: usize = 128;
    let start = file.tensor("y0").unwrap();
    let d = start.dim(1).unwrap();
    let copies = PATHS.div_ceil(start.dim(0).unwrap());
    let y0 = start
        .repeat((copies, 1))
        .unwrap()
        .narrow(0, 0, PATHS)
        .unwrap();
    let vars = weights(file).unwrap();
    let problem = file.problem().unwrap();
    let channels = file.tensor("dW").unwrap().dim(2).unwrap();
    let (noise, additive, general) = match problem {
        "ou_additive" => (NoiseType::General { channels }, true, false),
        "linear_noncommutative" | "neural_general" => {
            (NoiseType::General { channels }, false, true)
        }
        "scalar_noise" => (NoiseType::Scalar, false, false),
        _ => (NoiseType::Diagonal, false, false),
    };
    assert!(noise != NoiseType::Diagonal || channels == d);
    // A reference of order ½ needs more steps than one of order 1.5.
    let finest = if general { 4096 } else { 2048 };
    let path = Noise::seeded(41)
        .increments(&grid(finest), (PATHS, channels), DType::F64, &Device::Cpu)
        .unwrap();
    let solve = |equation: &Equation, method: SdeMethod, n: usize| {
        let increments = path.coarsened(finest / n, 1.0 / finest as f64).unwrap();
        let options = SdeOptions {
            method,
            output: Output::Final,
            ..Default::default()
        };
        predict(equation, &y0, &grid(n), &increments.into(), &options).unwrap()
    };
    let run = |method: SdeMethod, n: usize| {
        let equation = of_file(file, method, &as_weights(&vars)).unwrap();
        solve(&equation, method, n)
    };
    let references = [Calculus::Ito, Calculus::Stratonovich].map(|calculus| match calculus {
        _ if additive => run(SRA1, finest),
        Calculus::Ito if general => run(EULER_MARUYAMA, finest),
        _ if general => run(HEUN, finest),
        Calculus::Ito => run(SRI2, finest),
        Calculus::Stratonovich => {
            // In the sense of Itô its drift is f + ½ g ∂g/∂y.
            let (f, g, term) = parts(problem, &as_weights(&vars)).unwrap();
            let term = term.unwrap();
            let drift: Part = Box::new(move |t, y| f(t, y)? + (term(t, y)? * 0.5)?);
            let none: Part = Box::new(|_, _| candle_core::bail!("not evaluated"));
            let ito = ito(drift, g).milstein_term(none);
            let ito = if noise == NoiseType::Scalar {
                ito.scalar()
            } else {
                ito
            };
            solve(&ito, SRI2, finest)
        }
    });
    let orders = ALL.iter().filter_map(|method| {
        let expected = method.strong_order(noise, additive)?;
        let needs_term = method.name().starts_with("milstein_") && !method.name().contains("free");
        if needs_term && (additive || general) {
            return None;
        }
        let reference = &references[usize::from(method.calculus() == Calculus::Stratonovich)];
        let errors: Vec<_> = [16, 32, 64, 128, 256]
            .iter()
            .map(|&n| rms(&run(*method, n), reference))
            .collect();
        Some((*method, slope(&errors), expected))
    });
    orders.collect()
}

/// Between which orders a method is seen to converge on a problem at these steps.  Where theory knows the leading term of the
/// error and it dominates, this is one number.
fn within(problem: &str, method: SdeMethod, guaranteed: f64) -> [f64; 2] {
    let name = method.name();
    match problem {
        // Linear drift and additive noise: the term of order 1.5 is a second derivative of the drift.
        "ou_additive" if guaranteed > 1.0 => [2.0, 2.0],
        // The term of order ½ of this method is a second derivative of g: none here …
        "gbm" if name == "milstein_free_stratonovich" => [1.0, 1.0],
        // … and small beside that of order one here.
        _ if name == "milstein_free_stratonovich" && guaranteed < 1.0 => [0.5, 1.0],
        // g hardly reads y, so that g ∂g/∂y, the term of order ½, is small beside that of order one.
        "neural_diagonal" if name == "euler_maruyama" => [0.5, 1.0],
        // Noise that nearly commutes: the Lévy areas, whose term has order ½, enter by commutators of the columns of g.
        "linear_noncommutative" | "neural_general" => [0.5, 1.0],
        _ => [guaranteed; 2],
    }
}

#[test]
fn every_method_has_its_strong_order_on_every_problem() {
    for file in &files() {
        let orders = strong_orders(file);
        assert!(orders.len() >= 5);
        for (method, observed, guaranteed) in orders {
            let [least, most] = within(file.problem().unwrap(), method, guaranteed);
            let line = format!("{:<40}{:<28}{observed:.2}", file.file, method.name());
            println!("{line} ({least} to {most})");
            assert!((least - 0.1..=most + 0.1).contains(&observed), "{line}");
            assert!(least >= guaranteed, "{line}");
        }
    }
}

#[test]
fn euler_maruyama_has_weak_order_one() {
    // E[Y²] of geometric Brownian motion is e^{(2a + b²)}; Euler–Maruyama has ((1 + ah)² + b²h)^N, which the mean over
    // paths approaches.  The path's own exact solution as control variate leaves little of the sampling error.
    let (a, b, rows) = (0.6, 0.4, 200_000);
    let gbm = ito(
        move |_: &Time, y: &Tensor| y * a,
        move |_: &Time, y: &Tensor| y * b,
    );
    let y0 = Tensor::ones((rows, 1), DType::F64, &Device::Cpu).unwrap();
    let mut errors = vec![];
    for n in [4, 8, 16, 32] {
        let path = Noise::seeded(n as u64)
            .increments(&grid(n), (rows, 1), DType::F64, &Device::Cpu)
            .unwrap();
        let options = SdeOptions {
            output: Output::Final,
            ..Default::default()
        };
        let y = predict(&gbm, &y0, &grid(n), &path.clone().into(), &options).unwrap();
        let w = path.w().sum(0).unwrap();
        let exact = ((w * b).unwrap() + (a - 0.5 * b * b))
            .unwrap()
            .exp()
            .unwrap();
        let difference = (y.sqr().unwrap() - exact.sqr().unwrap()).unwrap();
        let mean = difference.mean_all().unwrap().to_scalar::<f64>().unwrap();
        let h = 1.0 / n as f64;
        let theory = ((1.0 + a * h).powi(2) + b * b * h).powi(n as i32) - (2.0 * a + b * b).exp();
        let spread = values(&difference).iter().map(|d| d * d).sum::<f64>() / rows as f64;
        let bound = 5.0 * (spread / rows as f64).sqrt();
        assert!(
            (mean - theory).abs() <= bound,
            "{n}: {mean} for {theory} ± {bound}"
        );
        errors.push(mean.abs());
    }
    let order = slope(&errors);
    assert!((order - 1.0).abs() <= 0.1, "{order}");
}

/// Weights of a latent equation, by name and shape.
const LATENT: [(&str, &[usize]); 6] = [
    ("f1", &[16, 3]),
    ("f1b", &[16]),
    ("f2", &[3, 16]),
    ("f2b", &[3]),
    ("g", &[3]),
    ("gb", &[3]),
];

/// The posterior drift f of a latent SDE whose prior drift is −z, and ½ |(f + z)/g|².
fn latent_drift(w: &[Tensor], z: &Tensor) -> candle_core::Result<(Tensor, Tensor)> {
    let hidden = z.matmul(&w[0].t()?)?.broadcast_add(&w[1])?.tanh()?;
    let f = hidden.matmul(&w[2].t()?)?.broadcast_add(&w[3])?;
    let u = ((&f + z)? / latent_diffusion(w, z)?)?;
    Ok((f, (u.sqr()?.sum_keepdim(1)? * 0.5)?))
}

/// Its diffusion, which is diagonal.
fn latent_diffusion(w: &[Tensor], z: &Tensor) -> candle_core::Result<Tensor> {
    let x = z.broadcast_mul(&w[4])?.broadcast_add(&w[5])?;
    (x.tanh()? * 0.3)? + 0.7
}

/// What is optimised: a distance of the end from a point, and the KL divergence of the path.
fn latent_loss(z: &Tensor, cost: &Tensor) -> Tensor {
    let distance = (z - 0.5).unwrap().sqr().unwrap().sum_all().unwrap();
    (distance + cost.sum_all().unwrap()).unwrap()
}

/// The numbers of a weight, or of y0.
fn latent_numbers(shape: &[usize], seed: usize) -> Tensor {
    let numbers = common::scattered(shape, 0.6, seed);
    numbers.to_dtype(DType::F32).unwrap()
}

const LATENT_ROWS: usize = 24;

/// The gradients of y0 and of all weights, joined.
fn latent_gradients(loss: &Tensor, y0: &Var, weights: &[Var]) -> [Tensor; 2] {
    let grads = loss.backward().unwrap();
    let of = |var: &Var| {
        let grad = grads.get(var).unwrap().to_dtype(DType::F64);
        grad.unwrap().flatten_all().unwrap()
    };
    let all: Vec<_> = weights.iter().map(of).collect();
    [of(y0), Tensor::cat(&all, 0).unwrap()]
}

/// By the crate, in a precision.
fn latent_solved(precision: Precision, steps: usize, method: SdeMethod) -> [Tensor; 2] {
    let (vars, device) = (candle_nn::VarMap::new(), Device::Cpu);
    let sde = NeuralSde::new(&vars, "sde", DType::F32, &device, |vb| {
        let all = LATENT.iter().map(|(name, shape)| vb.get(*shape, name));
        let w = all.collect::<candle_core::Result<Vec<_>>>()?;
        let v = w.clone();
        Ok(stratonovich(
            move |_: &Time, (z, _): &(Tensor, Tensor)| latent_drift(&w, z),
            move |_: &Time, (z, _): &(Tensor, Tensor)| latent_diffusion(&v, z),
        ))
    })
    .unwrap()
    .options(SdeOptions {
        method,
        precision: Some(precision),
        steps: Steps::PerInterval(steps),
        output: Output::Final,
        ..Default::default()
    });
    let named = vars.data().lock().unwrap();
    let all = LATENT.iter().enumerate().map(|(i, (name, shape))| {
        let var = named[&format!("sde.{name}")].clone();
        var.set(&latent_numbers(shape, i)).unwrap();
        var
    });
    let all: Vec<_> = all.collect();
    drop(named);
    let y0 = Var::from_tensor(&latent_numbers(&[LATENT_ROWS, 3], 9)).unwrap();
    let cost = Tensor::zeros((LATENT_ROWS, 1), DType::F32, &device).unwrap();
    let noise = BrownianTree::new(5, 16).unwrap().into();
    let start = (y0.as_tensor().clone(), cost);
    let (z, cost) = sde.solve(&start, &[0.0, 1.0], &noise).unwrap();
    latent_gradients(&latent_loss(&z, &cost), &y0, &all)
}

/// By candle's tape over the same steps of Heun's method in f64, where what the parts of the equation are given and
/// return, and the cotangents of both, is rounded to a dtype.
fn latent_taped(rounded: DType, steps: usize) -> [Tensor; 2] {
    // The backward of a cast casts the cotangent.
    let q = |x: &Tensor| x.to_dtype(rounded).unwrap().to_dtype(DType::F64).unwrap();
    let weights = LATENT.iter().enumerate();
    let weights = weights.map(|(i, (_, shape))| Var::from_tensor(&q(&latent_numbers(shape, i))));
    let weights = weights.collect::<candle_core::Result<Vec<_>>>().unwrap();
    let w: Vec<_> = weights.iter().map(|var| var.as_tensor().clone()).collect();
    let y0 = latent_numbers(&[LATENT_ROWS, 3], 9).to_dtype(DType::F64);
    let y0 = Var::from_tensor(&y0.unwrap()).unwrap();
    let noise: Noise = BrownianTree::new(5, 16).unwrap().into();
    let path = noise
        .increments(&grid(steps), (LATENT_ROWS, 3), DType::F64, &Device::Cpu)
        .unwrap();
    let h = 1.0 / steps as f64;
    let (mut z, mut cost) = (
        y0.as_tensor().clone(),
        Tensor::zeros((24, 1), DType::F64, &Device::Cpu).unwrap(),
    );
    for n in 0..steps {
        let dw = path.w().get(n).unwrap();
        let part = |z: &Tensor| -> candle_core::Result<(Tensor, Tensor)> {
            let z = q(z);
            let (f, rate) = latent_drift(&w, &z)?;
            let noise = (q(&latent_diffusion(&w, &z)?) * &dw)?;
            Ok((((q(&f) * h)? + noise)?, (q(&rate) * h)?))
        };
        let (first, rate) = part(&z).unwrap();
        let (second, further) = part(&(&z + &first).unwrap()).unwrap();
        z = (&z + ((first + second).unwrap() * 0.5).unwrap()).unwrap();
        cost = (&cost + ((rate + further).unwrap() * 0.5).unwrap()).unwrap();
    }
    latent_gradients(&latent_loss(&z, &cost), &y0, &weights)
}

/// Relative distance in the root mean square.
fn apart(x: &Tensor, exact: &Tensor) -> f64 {
    let size = |x: &Tensor| values(x).iter().map(|x| x * x).sum::<f64>().sqrt();
    size(&(x.to_dtype(DType::F64).unwrap() - exact).unwrap()) / size(exact)
}

#[test]
fn gradients_of_a_latent_sde_in_low_precision_are_those_of_rounded_arithmetic_for_any_number_of_steps(
) {
    for (precision, u) in [(Precision::bf16(), U_BF16), (Precision::f16(), U_F16)] {
        let mut first = None;
        for steps in [16, 64, 256] {
            let exact = latent_taped(DType::F64, steps);
            let rounded = latent_taped(precision.compute, steps);
            let ours = latent_solved(precision, steps, HEUN);
            let errors = [0, 1].map(|i| apart(&ours[i], &exact[i]) / u);
            let bounds = [0, 1].map(|i| apart(&rounded[i], &exact[i]) / u);
            println!(
                "{:?}, {steps} steps: y0 {:.2} u ({:.2} by rounded arithmetic), θ {:.2} u ({:.2})",
                precision.compute, errors[0], bounds[0], errors[1], bounds[1]
            );
            let first = *first.get_or_insert(errors);
            for i in [0, 1] {
                assert!(
                    errors[i] <= 2.0 * bounds[i],
                    "{steps} steps: {errors:?} u for {bounds:?}"
                );
                assert!(errors[i] <= 2.0, "{steps} steps: {errors:?} u");
                assert!(
                    errors[i] <= 2.0 * first[i],
                    "{steps} steps: {errors:?} u, not {first:?}"
                );
            }
        }
    }
}

#[test]
fn other_methods_do_not_lose_more_in_low_precision() {
    for method in [EULER_HEUN, REVERSIBLE_HEUN] {
        for (precision, u) in [(Precision::bf16(), U_BF16), (Precision::f16(), U_F16)] {
            for steps in [16, 256] {
                let exact = latent_solved(Precision::f32(), steps, method);
                let ours = latent_solved(precision, steps, method);
                for (ours, exact) in ours.iter().zip(&exact) {
                    let error = apart(ours, exact) / u;
                    assert!(
                        error <= 2.0,
                        "{} at {steps} steps: {error} u",
                        method.name()
                    );
                }
            }
        }
    }
}

#[test]
fn roundings_of_small_steps_do_not_add_up_in_one_direction() {
    // 2·10⁴ steps in f32, each of which changes y by some hundred units of roundoff.
    let y0 = Tensor::ones((32, 2), DType::F64, &Device::Cpu).unwrap();
    let run = |dtype| {
        let sde = ito(
            |_: &Time, y: &Tensor| y * -0.5,
            |_: &Time, y: &Tensor| y * 0.1,
        );
        let options = SdeOptions {
            steps: Steps::PerInterval(20_000),
            output: Output::Final,
            ..Default::default()
        };
        let y0 = y0.to_dtype(dtype).unwrap();
        predict(&sde, &y0, &[0.0, 1.0], &Noise::seeded(2), &options).unwrap()
    };
    let error = relative(&run(DType::F32), &run(DType::F64));
    // A random walk of roundings of half a unit: √20000 of them are 71 units, and the largest of 64 rows is some more.
    assert!(
        error <= 250.0 * common::U_F32,
        "{:.0} u",
        error / common::U_F32
    );
}

#[test]
fn bits_do_not_depend_on_threads_and_a_row_not_on_the_batch() {
    let run = |rows: usize, threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .build()
            .unwrap();
        pool.install(|| {
            let y0 = common::scattered(&[700, 3], 1.0, 3)
                .narrow(0, 0, rows)
                .unwrap();
            let sde = ito(
                |_: &Time, y: &Tensor| y.sin(),
                |_: &Time, y: &Tensor| y.cos(),
            );
            let options = SdeOptions {
                method: SRI2,
                steps: Steps::PerInterval(20),
                output: Output::Final,
                ..Default::default()
            };
            bits(&predict(&sde, &y0, &[0.0, 1.0], &Noise::seeded(6), &options).unwrap())
        })
    };
    let whole = run(700, 1);
    assert_eq!(whole, run(700, 7));
    assert_eq!(whole[..30], run(10, 2));
}

#[test]
fn a_tensor_without_noise_is_integrated_beside_the_state() {
    // The second tensor is ∫ y² dt, by Euler's method.
    let sde = ito(
        |_: &Time, (y, _): &(Tensor, Tensor)| Ok((y.neg()?, y.sqr()?.sum_keepdim(1)?)),
        |_: &Time, (y, _): &(Tensor, Tensor)| y.ones_like(),
    )
    .additive();
    let y0 = (
        common::scattered(&[5, 2], 1.0, 1),
        Tensor::zeros((5, 1), DType::F64, &Device::Cpu).unwrap(),
    );
    let options = SdeOptions::default();
    let (ys, costs) = predict(&sde, &y0, &grid(8), &Noise::seeded(4), &options).unwrap();
    let sum = ys.narrow(0, 0, 8).unwrap().sqr().unwrap().sum(0).unwrap();
    let sum = (sum.sum_keepdim(1).unwrap() / 8.0).unwrap();
    assert!(relative(&costs.get(8).unwrap(), &sum) < 1e-14);
}

#[test]
fn steps_on_a_tree_see_one_path() {
    let sde = stratonovich(
        |_: &Time, y: &Tensor| y.neg(),
        |_: &Time, y: &Tensor| y.sin(),
    );
    let y0 = common::scattered(&[50, 2], 1.0, 1);
    let noise = BrownianTree::new(8, 20).unwrap().into();
    let run = |n: usize| {
        let options = SdeOptions {
            method: HEUN,
            steps: Steps::PerInterval(n),
            output: Output::Final,
            ..Default::default()
        };
        predict(&sde, &y0, &[0.0, 1.0], &noise, &options).unwrap()
    };
    let fine = run(1000);
    let errors = [10, 40].map(|n| rms(&run(n), &fine));
    assert!(
        errors[1] < 0.4 * errors[0] && errors[1] < 0.02,
        "{errors:?}"
    );
}

/// The defect of a solve that must be refused.
fn refused<S: std::fmt::Debug>(result: candle_diffeq::Result<S>) -> SdeDefect {
    match result {
        Err(Error::Sde(defect)) => defect,
        other => panic!("{other:?}"),
    }
}

#[test]
fn what_does_not_fit_together_is_refused_before_the_first_step() {
    let y0 = Tensor::ones((4, 2), DType::F64, &Device::Cpu).unwrap();
    let f = |_: &Time, y: &Tensor| y.neg();
    let g = |_: &Time, y: &Tensor| y * 0.5;
    let general = |_: &Time, y: &Tensor| Tensor::stack(&[y, y, y], 2);
    let noise = Noise::seeded(1);
    let with = |method| SdeOptions {
        method,
        ..Default::default()
    };
    let times = [0.0, 1.0];
    let found = refused(predict(&ito(f, g), &y0, &times, &noise, &with(HEUN)));
    assert!(matches!(
        found,
        SdeDefect::Calculus {
            of: "Stratonovich",
            given: "Itô",
            ..
        }
    ));
    let found = refused(predict(
        &stratonovich(f, g),
        &y0,
        &times,
        &noise,
        &with(SRI2),
    ));
    assert!(matches!(found, SdeDefect::Calculus { .. }));
    for method in [SRI2, MILSTEIN_FREE_ITO] {
        let sde = ito(f, general).general(3);
        let found = refused(predict(&sde, &y0, &times, &noise, &with(method)));
        assert!(matches!(found, SdeDefect::LevyAreas { .. }));
        assert!(found.to_string().contains("Lévy areas"));
    }
    let sde = ito(f, general).general(3).additive().milstein_term(g);
    let found = refused(predict(&sde, &y0, &times, &noise, &with(MILSTEIN_ITO)));
    assert!(matches!(found, SdeDefect::LevyAreas { .. }));
    let found = refused(predict(&ito(f, g), &y0, &times, &noise, &with(SRA1)));
    assert!(matches!(found, SdeDefect::NeedsAdditive { .. }));
    let found = refused(predict(
        &ito(f, g),
        &y0,
        &times,
        &noise,
        &with(MILSTEIN_ITO),
    ));
    assert!(matches!(found, SdeDefect::NoMilsteinTerm { .. }));
    let found = refused(predict(
        &ito(f, general),
        &y0,
        &times,
        &noise,
        &with(EULER_MARUYAMA),
    ));
    assert!(matches!(found, SdeDefect::DiffusionShape { leaf: 0, .. }));
    let found = refused(predict(
        &ito(f, g),
        &y0,
        &[1.0, 0.0],
        &noise,
        &with(EULER_MARUYAMA),
    ));
    assert_eq!(found, SdeDefect::BackwardTime);
    let few = Increments::new(Tensor::zeros((1, 3, 2), DType::F64, &Device::Cpu).unwrap()).into();
    let found = refused(predict(
        &ito(f, g),
        &y0,
        &times,
        &few,
        &with(EULER_MARUYAMA),
    ));
    assert!(matches!(
        found,
        SdeDefect::Increments {
            steps: 1,
            rows: 4,
            channels: 2,
            ..
        }
    ));
    let plain = Increments::new(Tensor::zeros((1, 4, 2), DType::F64, &Device::Cpu).unwrap()).into();
    let found = refused(predict(&ito(f, g), &y0, &times, &plain, &with(SRI2)));
    assert!(matches!(found, SdeDefect::NoIntegrals { .. }));
    let tracked = Var::new(&[0f64, 1.0], &Device::Cpu).unwrap();
    let found = refused(predict(
        &ito(f, g),
        &y0,
        &tracked,
        &noise,
        &with(EULER_MARUYAMA),
    ));
    assert_eq!(found, SdeDefect::TimeGradients);
    let at = SdeOptions {
        steps: Steps::At(vec![0.5]),
        ..Default::default()
    };
    let found = refused(predict(&ito(f, g), &y0, &[0.0, 0.3, 1.0], &noise, &at));
    assert!(matches!(found, SdeDefect::Steps { .. }));
    let scalar = Tensor::new(1f64, &Device::Cpu).unwrap();
    let found = refused(predict(
        &ito(f, g),
        &scalar,
        &times,
        &noise,
        &with(EULER_MARUYAMA),
    ));
    assert!(matches!(found, SdeDefect::NoRows { leaf: 0 }));
}

#[test]
fn noise_that_is_not_additive_as_declared_is_an_error_of_the_backward_pass() {
    let y0 = Tensor::ones((4, 2), DType::F64, &Device::Cpu).unwrap();
    let sde = ito(
        |_: &Time, y: &Tensor| y.neg(),
        |_: &Time, y: &Tensor| y * 0.5,
    )
    .additive();
    let options = SdeOptions {
        method: SRA1,
        ..Default::default()
    };
    let solved = solution(&sde, &y0, &[0.0, 1.0], &Noise::seeded(1), &options).unwrap();
    let cotangent = solved.states().ones_like().unwrap();
    let found = refused(solved.vjp(&cotangent).map(|_| ()));
    assert_eq!(found, SdeDefect::NotAdditive { step: 0, t: 0.0 });
}

#[test]
fn a_diffusion_without_a_trace_is_compared_with_other_states_once_in_a_pass() {
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::sync::Arc;
    let evaluations = |steps: usize| {
        let count = Arc::new(AtomicUsize::new(0));
        let counter = Arc::clone(&count);
        let g = move |_: &Time, y: &Tensor| {
            counter.fetch_add(1, Ordering::Relaxed);
            y.ones_like()
        };
        let sde = ito(|_: &Time, y: &Tensor| y.neg(), g).additive();
        let options = SdeOptions {
            steps: Steps::PerInterval(steps),
            ..Default::default()
        };
        let y0 = common::scattered(&[4, 2], 1.0, 1);
        let solved = solution(&sde, &y0, &[0.0, 1.0], &Noise::seeded(1), &options).unwrap();
        solved.vjp(&solved.states().ones_like().unwrap()).unwrap();
        count.load(Ordering::Relaxed)
    };
    // A step forward and back evaluates it twice, however many steps there are.
    assert_eq!(evaluations(20) - evaluations(10), 2 * 10);

    // One that does change with the state is an error all the same.
    let g = |_: &Time, y: &Tensor| y.detach().sqr();
    let sde = ito(|_: &Time, y: &Tensor| y.neg(), g).additive();
    let y0 = common::scattered(&[4, 2], 1.0, 1);
    let options = SdeOptions::default();
    let solved = solution(&sde, &y0, &[0.0, 1.0], &Noise::seeded(1), &options).unwrap();
    let found = solved.vjp(&solved.states().ones_like().unwrap());
    assert!(matches!(found, Err(Error::UntrackedVelocity { .. })));
}

/// States, and gradients of y0 and of a variable, of so many samples of each row: by the option, and of a y0 that the
/// caller has repeated.
#[test]
fn samples_are_rows_of_their_own_and_their_gradients_add_up() {
    let device = Device::Cpu;
    let spread = Var::from_tensor(&common::scattered(&[2], 0.5, 5)).unwrap();
    let start = Var::from_tensor(&common::scattered(&[3, 2], 1.0, 1)).unwrap();
    for (samples, method) in [(1, EULER_MARUYAMA), (4, EULER_MARUYAMA), (4, SRI2)] {
        let solve = |y0: &Tensor, samples: usize| {
            let spread = spread.as_tensor().clone();
            let sde = ito(
                |_: &Time, y: &Tensor| y.sin(),
                move |_: &Time, y: &Tensor| y.cos()?.broadcast_mul(&spread),
            );
            let options = SdeOptions {
                method,
                samples,
                steps: Steps::PerInterval(6),
                ..Default::default()
            };
            sdeint(sde, y0, &[0.0, 0.5, 1.0], &Noise::seeded(3), &options).unwrap()
        };
        let by_option = solve(start.as_tensor(), samples);
        let repeated = solve(&start.repeat((samples, 1)).unwrap(), 1);
        assert_eq!(by_option.dims(), [3, samples * 3, 2]);
        assert_eq!(bits(&by_option), bits(&repeated));
        let weights = common::scattered(by_option.dims(), 1.0, 8);
        let grads = [by_option, repeated].map(|ys| {
            let loss = (ys * &weights).unwrap().sum_all().unwrap();
            loss.backward().unwrap()
        });
        for var in [&start, &spread] {
            let [a, b] = grads.each_ref().map(|grads| grads.get(var).unwrap());
            assert!(relative(a, b) < 1e-13);
        }
    }

    // Several tensors; without a graph; none.
    let sde = ito(
        |_: &Time, (y, _): &(Tensor, Tensor)| Ok((y.neg()?, y.sqr()?)),
        |_: &Time, (y, _): &(Tensor, Tensor)| y.ones_like(),
    )
    .additive();
    let y0 = (
        start.as_tensor().detach(),
        Tensor::zeros((3, 2), DType::F64, &device).unwrap(),
    );
    let options = |samples| SdeOptions {
        samples,
        ..Default::default()
    };
    let noise = Noise::seeded(3);
    let solved = solution(&sde, &y0, &[0.0, 1.0], &noise, &options(5)).unwrap();
    let (ys, costs) = solved.states();
    assert_eq!(
        (ys.dims(), costs.dims()),
        (&[2, 15, 2][..], &[2, 15, 2][..])
    );
    let cotangent = (ys.ones_like().unwrap(), costs.ones_like().unwrap());
    let grads = solved.vjp(&cotangent).unwrap();
    assert_eq!(grads.y0.0.dims(), [3, 2]);
    // y(1) = y0 + (−y0) + ΔW and the cost is y0², at both times.
    let exact = ((start.as_tensor() * 10.0).unwrap() + 5.0).unwrap();
    assert!(relative(&grads.y0.0, &exact) < 1e-14);
    let found = refused(predict(&sde, &y0, &[0.0, 1.0], &noise, &options(0)));
    assert_eq!(found, SdeDefect::NoSamples);
}

#[test]
fn a_wrong_pull_back_of_the_diffusion_is_found() {
    let vars = candle_nn::VarMap::new();
    let sde = NeuralSde::new(&vars, "sde", DType::F32, &Device::Cpu, |vb| {
        let f = candle_nn::linear(3, 3, vb.pp("f"))?;
        let g = candle_nn::linear(3, 3, vb.pp("g"))?;
        Ok(ito(
            move |_: &Time, y: &Tensor| f.forward(y),
            move |_: &Time, y: &Tensor| candle_nn::ops::softmax_last_dim(&g.forward(y)?),
        ))
    })
    .unwrap();
    let y0 = common::scattered(&[4, 3], 1.0, 1)
        .to_dtype(DType::F32)
        .unwrap();
    let found = sde.solve(&y0, &[0.0, 0.1], &Noise::seeded(1));
    assert!(
        matches!(
            found,
            Err(Error::WrongPullback { .. } | Error::UntrackedVelocity { .. })
        ),
        "{found:?}"
    );
}

#[test]
fn gradients_are_at_the_increments_that_were_given_whatever_is_written_to_them_afterwards() {
    let fresh = || {
        let path = Noise::seeded(5).increments(&grid(4), (3, 2), DType::F64, &Device::Cpu);
        let path = path.unwrap();
        let [w, u] = [path.w(), path.u().unwrap()].map(|x| Var::from_tensor(x).unwrap());
        let start = Var::from_tensor(&common::scattered(&[3, 2], 1.0, 1)).unwrap();
        (w, u, start)
    };
    let parts = || {
        ito(
            |_: &Time, y: &Tensor| y.sin(),
            |_: &Time, y: &Tensor| y.cos(),
        )
    };
    let options = || SdeOptions {
        method: SRI2,
        output: Output::Final,
        ..Default::default()
    };
    let overwrite = |var: &Var| var.set(&var.zeros_like().unwrap()).unwrap();
    let in_graph = |written: bool, tracked: bool| {
        let (w, u, start) = fresh();
        // Increments that candle does not track may lie in the memory of a variable, too.
        let of = |x: &Var| match tracked {
            true => x.as_tensor().clone(),
            false => x.as_tensor().detach(),
        };
        let noise = Increments::new(of(&w)).with_integrals(of(&u)).unwrap();
        let y = sdeint(
            parts(),
            start.as_tensor(),
            &grid(4),
            &noise.into(),
            &options(),
        );
        let y = y.unwrap();
        if written {
            overwrite(&w);
            overwrite(&u);
        }
        let grads = y.sum_all().unwrap().backward().unwrap();
        let vars: &[&Var] = match tracked {
            true => &[&start, &w, &u],
            false => &[&start],
        };
        let all: Vec<_> = vars.iter().map(|x| bits(grads.get(x).unwrap())).collect();
        all
    };
    for tracked in [true, false] {
        assert_eq!(in_graph(true, tracked), in_graph(false, tracked));
    }
    let on_request = |written: bool| {
        let (w, u, start) = fresh();
        let noise = Increments::new(w.as_tensor().clone());
        let noise = noise.with_integrals(u.as_tensor().clone()).unwrap().into();
        let sde = parts();
        let y0 = start.as_tensor().detach();
        let solved = solution(&sde, &y0, &grid(4), &noise, &options()).unwrap();
        if written {
            overwrite(&w);
            overwrite(&u);
        }
        let grads = solved.vjp(&solved.states().ones_like().unwrap()).unwrap();
        [
            bits(&grads.y0),
            bits(grads.params.get(w.as_tensor()).unwrap()),
            bits(grads.params.get(u.as_tensor()).unwrap()),
        ]
    };
    assert_eq!(on_request(true), on_request(false));
}

/// y' = dW from 0 over an interval: rows of one channel.
fn driven_by(noise: &Noise, y0: &Tensor, interval: [f64; 2], steps: usize) -> Tensor {
    let sde = ito(
        |_: &Time, y: &Tensor| y.zeros_like(),
        |_: &Time, y: &Tensor| y.ones_like(),
    )
    .additive();
    let options = SdeOptions {
        steps: Steps::PerInterval(steps),
        output: Output::Final,
        ..Default::default()
    };
    predict(&sde, y0, &interval, noise, &options).unwrap()
}

#[test]
fn a_solve_that_continues_another_with_a_seed_of_its_own_continues_brownian_motion() {
    const ROWS: usize = 20_000;
    let y0 = Tensor::zeros((ROWS, 1), DType::F64, &Device::Cpu).unwrap();
    let second_moment = |y: &Tensor| values(y).iter().map(|y| y * y).sum::<f64>() / ROWS as f64;
    // Y(2) ~ N(0, 2), so that Y² has the variance 8: five standard deviations of the mean.
    let bound = 5.0 * (8.0 / ROWS as f64).sqrt();
    type Kind = fn(u64) -> Noise;
    let kinds: [Kind; 2] = [Noise::seeded, |seed| {
        BrownianTree::new(seed, 10).unwrap().into()
    }];
    for noise in kinds {
        for seed in [0, 1, 12_345, u64::MAX - 1] {
            let half = driven_by(&noise(seed), &y0, [0.0, 1.0], 4);
            let end = driven_by(&noise(seed + 1), &half, [1.0, 2.0], 4);
            let got = second_moment(&end);
            assert!((got - 2.0).abs() <= bound, "{seed}: {got}");
            // What the documentation warns of: the same seed gives the same increments again.
            let twice = driven_by(&noise(seed), &half, [1.0, 2.0], 4);
            assert!(relative(&twice, &(half * 2.0).unwrap()) < 1e-14);
        }
    }
}

#[test]
fn increments_of_a_tree_add_up_where_the_resolution_of_times_is_coarse() {
    // Times near 1.7e9 are 2.4e-7 apart: steps of 1e-3 differ from the distance of their ends by some 1e-4 of it.
    let ends = [1.7e9, 1.7e9 + 1.0];
    let noise = Noise::from(BrownianTree::new(3, 20).unwrap());
    let y0 = Tensor::zeros((16, 2), DType::F64, &Device::Cpu).unwrap();
    let w = noise.increments(&ends, (16, 2), DType::F64, &Device::Cpu);
    let w = w.unwrap().w().get(0).unwrap();
    // A thousand roundings, of sums of size one.
    let bound = 1000.0 * 2f64.powi(-53) * 4.0;
    assert!(relative(&driven_by(&noise, &y0, ends, 1000), &w) <= bound);
    // The same tile by tile.
    let field = |x: f64| ConstantField::from_value(Tensor::full(x, 2, &Device::Cpu).unwrap());
    let sde = ito(field(0.0).unwrap(), OfField(field(1.0).unwrap())).additive();
    let options = SdeOptions {
        steps: Steps::PerInterval(1000),
        output: Output::Final,
        ..Default::default()
    };
    let y = predict(&sde, &y0, &ends, &noise, &options).unwrap();
    assert!(relative(&y, &w) <= bound);
}

#[test]
fn every_method_solves_exactly_the_noise_that_the_documentation_says() {
    let y0 = Tensor::ones((4, 2), DType::F64, &Device::Cpu).unwrap();
    let f = |_: &Time, y: &Tensor| y.neg();
    // What the diffusion is does not matter here, but its shape does.
    let g = |_: &Time, y: &Tensor| y.ones_like();
    let wide = |_: &Time, y: &Tensor| Tensor::stack(&[y.ones_like()?, y.ones_like()?], 2);
    let zero = |_: &Time, y: &Tensor| y.zeros_like();
    for method in ALL {
        let name = method.name();
        let needs_term = matches!(name, "milstein_ito" | "milstein_stratonovich");
        for (calculus, kind, is_additive, has_term) in [Calculus::Ito, Calculus::Stratonovich]
            .into_iter()
            .flat_map(|c| ["diagonal", "scalar", "general"].map(|kind| (c, kind)))
            .flat_map(|(c, kind)| [false, true].map(|additive| (c, kind, additive)))
            .flat_map(|(c, kind, additive)| [false, true].map(|term| (c, kind, additive, term)))
        {
            let is_general = kind == "general";
            // The table of `sde`.
            let reaches = match name {
                "euler_maruyama" | "euler_heun" | "heun" | "midpoint" | "reversible_heun" => true,
                "milstein_free_ito" | "milstein_free_stratonovich" | "sri2" => {
                    !is_general || is_additive
                }
                "milstein_ito" | "milstein_stratonovich" => !is_general && has_term,
                "sra1" => is_additive,
                other => panic!("{other}"),
            };
            let says = reaches && (is_additive || calculus == method.calculus());
            let options = SdeOptions {
                method,
                ..Default::default()
            };
            macro_rules! solve {
                ($sde:expr) => {{
                    let sde = $sde;
                    let sde = if is_additive { sde.additive() } else { sde };
                    let sde = match kind {
                        "scalar" => sde.scalar(),
                        "general" => sde.general(2),
                        _ => sde,
                    };
                    let noise = Noise::seeded(1);
                    match has_term {
                        true => {
                            predict(&sde.milstein_term(zero), &y0, &[0.0, 1.0], &noise, &options)
                        }
                        false => predict(&sde, &y0, &[0.0, 1.0], &noise, &options),
                    }
                }};
            }
            let solved = match (calculus, is_general) {
                (Calculus::Ito, false) => solve!(ito(f, g)),
                (Calculus::Ito, true) => solve!(ito(f, wide)),
                (Calculus::Stratonovich, false) => solve!(stratonovich(f, g)),
                (Calculus::Stratonovich, true) => solve!(stratonovich(f, wide)),
            };
            let case =
                format!("{name}, {calculus:?}, {kind}, additive {is_additive}, term {has_term}");
            assert_eq!(solved.is_ok(), says, "{case}: {solved:?}");
            // The order says the same, but for the term and the calculus.
            let noise = match kind {
                "scalar" => NoiseType::Scalar,
                "general" => NoiseType::General { channels: 2 },
                _ => NoiseType::Diagonal,
            };
            let order = method.strong_order(noise, is_additive);
            assert_eq!(
                order.is_some(),
                reaches || needs_term && !is_general,
                "{case}"
            );
            // What an error advises is possible.
            if let Err(Error::Sde(found @ SdeDefect::NeedsAdditive { .. })) = solved {
                let advised = if is_general { EULER_MARUYAMA } else { SRI2 };
                let order = advised.strong_order(noise, is_additive);
                assert!(order.is_some() && advised.calculus() == calculus, "{case}");
                let named = advised.name().to_uppercase();
                assert!(found.to_string().contains(&named), "{case}: {found}");
            }
        }
    }
}
