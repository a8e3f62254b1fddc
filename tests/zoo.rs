//! Potentials with their second derivatives, the fields that are made of them, and the layers and wrappers of the model
//! zoo: against oracles, against candle's autograd, and against what theory says of them.
//!
//! `cargo test --test zoo`, seconds.

mod common;

use candle_core::backprop::GradStore;
use candle_core::{DType, Device, Module, Result, Tensor, Var};
use candle_diffeq::error::PotentialDefect;
use candle_diffeq::fields::{check_field, Pullback};
use candle_diffeq::models::hypersolver::Hypersolver;
use candle_diffeq::nn::energy::{
    Curved, Energy, GradientFlow, Hamiltonian, Lagrangian, PortHamiltonian, Potential, Skew,
};
use candle_diffeq::nn::{
    cost_precision, depth_cat, Activation, Augmenter, Basis, DataControl, EnergyMlp, Galerkin,
    HigherOrder, Hutchinson, Linear, Mlp, Perceptron, WithIntegral,
};
use candle_diffeq::tableau::{EULER, RK4};
use candle_diffeq::{
    odeint, odeint_with, Error, NeuralOde, OdeOptions, Precision, Time, VectorField,
};
use candle_nn::{VarBuilder, VarMap};
use common::{
    all, error_of, fill, method, relative, scattered, values, var, worst, U_BF16, U_F16, U_F32,
    U_F64,
};

#[path = "../examples/conformance/discrete.rs"]
#[allow(dead_code)]
mod discrete;
#[path = "../examples/conformance/fields.rs"]
#[allow(dead_code)]
mod fields;
#[path = "../examples/conformance/oracle.rs"]
#[allow(dead_code)]
mod oracle;
#[path = "../examples/conformance/outcome.rs"]
#[allow(dead_code)]
mod outcome;
#[path = "../examples/conformance/zoo/mod.rs"]
#[allow(dead_code)]
mod zoo;

/// Both sides add the same numbers, in different orders.
const EXACT: f64 = 512.0 * U_F64;

fn time(t: f64) -> Time {
    Time::new(t, DType::F64, &Device::Cpu)
}

/// The activations that have a curvature.
fn smooth() -> impl Iterator<Item = Activation> {
    Activation::ALL
        .into_iter()
        .filter(|a| *a != Activation::Relu)
}

#[test]
fn potentials_and_models_in_f64_are_those_of_the_oracles() {
    let root = std::env::var_os("CARGO_MANIFEST_DIR");
    let root = root.map_or_else(
        || env!("CARGO_MANIFEST_DIR").into(),
        std::path::PathBuf::from,
    );
    let files = zoo::files(&root.join("tests/data/zoo"), &Device::Cpu).unwrap();
    let (mut answered, mut left) = (0, vec![]);
    for oracle in files {
        match zoo::answer(&oracle).unwrap() {
            zoo::Answer::None(_) => left.push(oracle.file),
            zoo::Answer::Lines(lines) => {
                answered += 1;
                for (what, error, part) in lines {
                    // Of the friction's gradient, one number of 1.3e-3 beside others of 11, whose terms
                    // cancel: 1.3e-12 measured, an absolute error of two roundings of those terms.
                    assert!(error <= 1e-11, "{} {what} {part}: {error:e}", oracle.file);
                }
            }
        }
    }
    assert!(left.is_empty(), "{left:?}");
    assert_eq!(answered, 25);
}

/// max |x|.
fn largest(x: &Tensor) -> f64 {
    worst(values(x))
}

/// A network over scattered variables.
fn net(widths: &[usize], activation: Activation) -> (VarMap, Perceptron) {
    let vars = VarMap::new();
    let vb = VarBuilder::from_varmap(&vars, DType::F64, &Device::Cpu);
    let net = Perceptron::new(widths, activation, vb).unwrap();
    fill(&vars);
    (vars, net)
}

/// Potentials of every kind: with time and without, residual, of one output and of several.
fn potentials(activation: Activation) -> Vec<(VarMap, EnergyMlp)> {
    let plain = |widths: &[usize], energy| {
        let (vars, net) = net(widths, activation);
        (vars, EnergyMlp::of(net, energy).unwrap())
    };
    let (timed_vars, timed) = net(&[4, 6, 5, 1], activation);
    let (squares_vars, squares) = net(&[4, 6, 2], activation);
    let (residual_vars, residual) = net(&[3, 3, 5, 5, 1], activation);
    let (both_vars, both) = net(&[4, 3, 3, 2], activation);
    vec![
        plain(&[3, 7, 1], Energy::Output),
        plain(&[3, 7, 5, 4, 1], Energy::Output),
        plain(&[3, 1], Energy::Output),
        plain(&[3, 2], Energy::SumOfSquares),
        plain(&[3, 6, 4], Energy::SumOfSquares),
        (
            timed_vars,
            EnergyMlp::of_time(timed, Energy::Output).unwrap(),
        ),
        (
            squares_vars,
            EnergyMlp::of_time(squares, Energy::SumOfSquares).unwrap(),
        ),
        (
            residual_vars,
            EnergyMlp::of(residual.residual(), Energy::Output).unwrap(),
        ),
        (
            both_vars,
            EnergyMlp::of_time(both.residual(), Energy::SumOfSquares).unwrap(),
        ),
    ]
}

#[test]
fn the_pull_back_of_a_gradient_by_hand_is_that_of_autograd() {
    for activation in smooth() {
        for (vars, energy) in potentials(activation) {
            let (x, v) = (var(&[5, 3], 0.9, 1), scattered(&[5, 3], 1.0, 2));
            let t = Time::differentiable(0.7, DType::F64, &Device::Cpu);
            let (_, gradient) = energy.gradient(&t, &x).unwrap();
            let exact = (&gradient * &v)
                .unwrap()
                .sum_all()
                .unwrap()
                .backward()
                .unwrap();
            let (again, pull) = energy.gradient_vjp(&t, &x).unwrap();
            assert!(relative(&again, &gradient) <= EXACT);
            let pulled = pull(&v).unwrap();
            let zero = x.zeros_like().unwrap();
            let of_x = exact.get(&x).unwrap_or(&zero);
            assert!(
                relative(&pulled.y, of_x) <= EXACT,
                "{activation:?} {energy:?}"
            );
            let (reads, tensor) = (pulled.t.is_some(), t.tensor().unwrap());
            if reads {
                let of_t = exact.get(&tensor).unwrap();
                assert!(
                    relative(&pulled.t.unwrap(), of_t) <= EXACT,
                    "{activation:?}"
                );
            }
            let listed: Vec<_> = energy
                .parameters()
                .unwrap()
                .iter()
                .map(|p| p.id())
                .collect();
            for (name, p) in all(&vars) {
                let got = pulled.params.get(&p);
                assert_eq!(got.is_some(), listed.contains(&p.id()), "{name}");
                match (got, exact.get(&p)) {
                    (Some(got), Some(exact)) => {
                        assert!(relative(got, exact) <= EXACT, "{activation:?} {name}");
                    }
                    // A number that is added to a potential has no gradient.
                    (None, None) => assert!(name.ends_with("bias")),
                    (Some(got), None) => assert!(values(got).iter().all(|g| *g == 0.0)),
                    (None, Some(exact)) => assert!(values(exact).iter().all(|g| *g == 0.0)),
                }
            }
        }
    }
}

#[test]
fn a_laplacian_is_the_trace_of_the_hessian_with_its_gradients() {
    for activation in smooth() {
        for (vars, energy) in potentials(activation) {
            let x = var(&[4, 3], 0.9, 3);
            let t = time(0.4);
            let forward = energy.laplacian(&t, &x).unwrap();
            let hessian = energy.hessian(&t, &x).unwrap();
            let unit = Tensor::eye(3, DType::F64, &Device::Cpu).unwrap();
            let trace = hessian.broadcast_mul(&unit).unwrap();
            let trace = trace.sum(2).unwrap().sum_keepdim(1).unwrap();
            assert!(largest(&(&forward - &trace).unwrap()) <= EXACT);
            assert!(largest(&(&hessian - hessian.transpose(1, 2).unwrap()).unwrap()) <= EXACT);
            let c = scattered(&[4, 1], 1.0, 4);
            let gradients = |y: &Tensor| (y * &c).unwrap().sum_all().unwrap().backward().unwrap();
            let (got, exact) = (gradients(&forward), gradients(&trace));
            for (name, p) in all(&vars) {
                let zero = p.zeros_like().unwrap();
                let [got, exact] = [&got, &exact].map(|g| g.get(&p).unwrap_or(&zero).clone());
                let off = largest(&(&got - &exact).unwrap());
                assert!(
                    off <= EXACT * largest(&exact).max(1.0),
                    "{activation:?} {name}"
                );
            }
        }
    }
}

#[test]
fn jvp_and_pull_are_transposed_and_pull_jvp_is_the_derivative_of_pull() {
    let e = 1e-6;
    for activation in smooth() {
        let (_, plain) = net(&[3, 5, 5, 2], activation);
        for net in [plain.clone(), plain.residual()] {
            let (x, v) = (scattered(&[6, 3], 0.9, 1), scattered(&[6, 3], 1.0, 2));
            let (w, w_dot) = (scattered(&[6, 2], 1.0, 3), scattered(&[6, 2], 1.0, 4));
            let (value, jv) = net.jvp(&x, &v).unwrap();
            let (again, jw) = net.pull(&x, &w).unwrap();
            assert!(relative(&again, &value) <= EXACT);
            let sum = |a: &Tensor, b: &Tensor| values(&(a * b).unwrap()).iter().sum::<f64>();
            assert!((sum(&jv, &w) - sum(&v, &jw)).abs() <= 1e-13);
            let moved = |s: f64| {
                let (x, w) = (
                    (&x + (&v * s).unwrap()).unwrap(),
                    (&w + (&w_dot * s).unwrap()).unwrap(),
                );
                net.pull(&x, &w).unwrap().1
            };
            let differences = ((moved(e) - moved(-e)).unwrap() / (2.0 * e)).unwrap();
            let (same, bent) = net.pull_jvp(&x, &w, &v, &w_dot).unwrap();
            assert!(relative(&same, &jw) <= EXACT);
            assert!(relative(&bent, &differences) <= 1e-8, "{activation:?}");
        }
    }
}

#[test]
fn the_pull_of_an_mlp_is_that_of_its_vjp_with_time_and_residual() {
    let vars = VarMap::new();
    let vb = VarBuilder::from_varmap(&vars, DType::F64, &Device::Cpu);
    let field = Mlp::with_time(&[3, 3, 4, 4, 3], Activation::Silu, vb)
        .unwrap()
        .residual();
    fill(&vars);
    let (t, y, v) = (
        time(0.3),
        scattered(&[5, 3], 0.9, 1),
        scattered(&[5, 3], 1.0, 2),
    );
    let (_, pull) = field.vjp(&t, &y).unwrap();
    let pulled = field.pull(&t, &y, &v).unwrap();
    assert!(relative(&pulled, &pull(&v).unwrap().y) <= EXACT);
    let zero = v.zeros_like().unwrap();
    let (again, bent) = field.pull_jvp(&t, &y, &v, &zero, &v).unwrap();
    assert!(relative(&again, &pulled) <= EXACT);
    // Along a tangent of zero only w moves, and the map is linear in it.
    assert!(relative(&bent, &pulled) <= EXACT);
}

/// The fields of this crate that bring their own pull-backs, over four features.
const NAMES: [&str; 5] = [
    "Hamiltonian",
    "GradientFlow",
    "PortHamiltonian",
    "Skew",
    "HigherOrder",
];

/// One of them.
fn made(name: &str, vb: &VarBuilder<'_>) -> Result<Box<dyn VectorField<Tensor>>> {
    let energy = || {
        EnergyMlp::with_time(
            &[4, 9, 7, 1],
            Activation::Tanh,
            Energy::Output,
            vb.pp("energy"),
        )
    };
    let net = |widths: &[usize]| Perceptron::new(widths, Activation::Sin, vb.pp("net"));
    Ok(match name {
        "Hamiltonian" => Box::new(Hamiltonian::new(energy()?)),
        "GradientFlow" => Box::new(GradientFlow::new(energy()?)),
        "PortHamiltonian" => Box::new(PortHamiltonian::new(energy()?, vb.get(2, "friction")?)?),
        "Skew" => Box::new(Skew::new(energy()?, net(&[4, 5, 16])?)?),
        _ => Box::new(HigherOrder::new(net(&[4, 8, 2])?, 2)?),
    })
}

/// A field whose type is not known, with the pull-back that it has.
struct Own(Box<dyn VectorField<Tensor>>);

impl VectorField<Tensor> for Own {
    fn velocity(&self, t: &Time, y: &Tensor) -> Result<Tensor> {
        self.0.velocity(t, y)
    }

    fn vjp<'f>(&'f self, t: &Time, y: &Tensor) -> Result<(Tensor, Pullback<'f, Tensor>)> {
        self.0.vjp(t, y)
    }

    fn parameters(&self) -> Option<Vec<Tensor>> {
        self.0.parameters()
    }
}

/// A neural ODE of the field over these variables, which are created if there are none.
fn own(name: &'static str, vars: &VarMap, dtype: DType) -> NeuralOde {
    let build = move |vb: VarBuilder<'_>| Ok(Own(made(name, &vb)?));
    NeuralOde::from_field(vars, "f", dtype, &Device::Cpu, build).unwrap()
}

/// The same, whose way back candle finds.
fn taped(name: &'static str, vars: &VarMap, dtype: DType) -> NeuralOde {
    let build = move |vb: VarBuilder<'_>| {
        let field = made(name, &vb)?;
        Ok(move |t: &Time, y: &Tensor| field.velocity(t, y))
    };
    NeuralOde::from_field(vars, "f", dtype, &Device::Cpu, build).unwrap()
}

/// The states, the gradients of y0 and of the times, and those of parameters.
fn solved(ode: &NeuralOde, dtype: DType) -> ([Tensor; 3], GradStore) {
    let leaf = |x: &Tensor| Var::from_tensor(&x.to_dtype(dtype).unwrap()).unwrap();
    let y0 = leaf(&scattered(&[6, 4], 0.8, 1));
    let times = leaf(&Tensor::new(&[0.0, 0.3, 0.8], &Device::Cpu).unwrap());
    let ys = ode.solve(y0.as_tensor(), &times).unwrap();
    let v = scattered(&[3, 6, 4], 1.0, 5).to_dtype(dtype).unwrap();
    let grads = (&ys * v).unwrap().sum_all().unwrap().backward().unwrap();
    let of = |var: &Var| grads.get(var).unwrap().clone();
    ([ys, of(&y0), of(&times)], grads)
}

#[test]
fn hand_written_pull_backs_of_fields_are_those_of_the_same_field_on_the_tape() {
    for name in NAMES {
        let vars = VarMap::new();
        let own = own(name, &vars, DType::F64).options(method(&RK4, 3));
        fill(&vars);
        let twin = taped(name, &vars, DType::F64).options(method(&RK4, 3));
        let (got, grads) = solved(&own, DType::F64);
        let (exact, twin_grads) = solved(&twin, DType::F64);
        for (got, exact) in got.iter().zip(&exact) {
            assert!(relative(got, exact) <= EXACT, "{name}");
        }
        assert!(
            error_of(&grads, &twin_grads, &all(&vars)) <= EXACT,
            "{name}"
        );
    }
}

#[test]
fn fields_over_potentials_are_off_by_a_few_roundings_in_low_precision() {
    for name in NAMES {
        let (vars, wide_vars) = (VarMap::new(), VarMap::new());
        let mut ode = own(name, &vars, DType::F32).options(method(&RK4, 2));
        fill(&vars);
        let wide = own(name, &wide_vars, DType::F64).options(method(&RK4, 2));
        // The same numbers, for they are those of f32.
        fill(&wide_vars);
        let (exact, _) = solved(&wide, DType::F64);
        for (precision, u) in [
            (Precision::f32(), U_F32),
            (Precision::bf16(), U_BF16),
            (Precision::f16(), U_F16),
        ] {
            ode = ode.precision(precision);
            let (got, _) = solved(&ode, DType::F32);
            for (got, exact) in got.iter().zip(&exact) {
                let off = relative(got, exact);
                assert!(off <= 16.0 * u, "{name} {precision:?}: {off:e}");
            }
        }
    }
}

/// Φ at every output.
fn energies<P: Potential>(potential: &P, ys: &Tensor) -> Vec<f64> {
    let (phi, _) = potential.gradient(&time(0.0), ys).unwrap();
    values(&phi)
}

#[test]
fn energies_are_constant_or_fall_as_theory_says() {
    let (_, net) = net(&[4, 16, 1], Activation::Tanh);
    let energy = EnergyMlp::of(net, Energy::Output).unwrap();
    let y0 = scattered(&[1, 4], 0.8, 1);
    let times: Vec<f64> = (0..9).map(|i| 0.5 * f64::from(i)).collect();
    let along = |field: &dyn VectorField<Tensor>, steps: usize| {
        let f = |t: &Time, y: &Tensor| field.velocity(t, y);
        let ys = candle_diffeq::predict(&f, &y0, &times, &method(&RK4, steps)).unwrap();
        energies(&energy, &ys)
    };
    let drift = |e: &[f64]| e.iter().map(|x| (x - e[0]).abs()).fold(0.0, f64::max);
    let (_, matrix) = self::net(&[4, 6, 16], Activation::Tanh);
    let skew = Skew::new(energy.clone(), matrix).unwrap();
    let conservative: [&dyn VectorField<Tensor>; 2] = [&Hamiltonian::new(energy.clone()), &skew];
    for field in conservative {
        let [coarse, fine] = [2, 4].map(|steps| drift(&along(field, steps)));
        // RK4 keeps it to order four or better.
        assert!(coarse < 1e-3 && fine < coarse / 10.0, "{coarse:e} {fine:e}");
    }
    let friction = Tensor::new(&[0.3, -0.5], &Device::Cpu).unwrap();
    let damped = PortHamiltonian::new(energy.clone(), friction).unwrap();
    let falling: [&dyn VectorField<Tensor>; 2] = [&GradientFlow::new(energy.clone()), &damped];
    for field in falling {
        let e = along(field, 8);
        assert!(e.windows(2).all(|w| w[1] < w[0]), "{e:?}");
    }
}

/// L = ½ m q̇² − ½ k q² of one coordinate, or of more that do not interact.
struct Springs {
    mass: f64,
    stiffness: Var,
}

impl Potential for Springs {
    fn gradient(&self, _: &Time, x: &Tensor) -> Result<(Tensor, Tensor)> {
        let n = x.dim(1)? / 2;
        let (q, v) = (x.narrow(1, 0, n)?, x.narrow(1, n, n)?);
        let force = q.broadcast_mul(&self.stiffness)?.neg()?;
        let momentum = (&v * self.mass)?;
        let value = (((&v * &momentum)? + (&q * &force)?)? * 0.5)?;
        let gradient = Tensor::cat(&[force, momentum], 1)?;
        Ok((value.sum_keepdim(1)?, gradient))
    }
}

impl Curved for Springs {
    fn gradient_jvp(
        &self,
        t: &Time,
        x: &Tensor,
        (_, v): (f64, &Tensor),
    ) -> Result<(Tensor, Tensor)> {
        // Quadratic: the Hessian's product is the gradient at v.
        Ok((self.gradient(t, x)?.1, self.gradient(t, v)?.1))
    }
}

#[test]
fn the_motion_of_a_textbook_lagrangian_is_newtons_for_any_number_of_coordinates() {
    for n in [1, 2, 3, 5] {
        let stiffness = Var::new(3.0, &Device::Cpu).unwrap();
        let springs = Springs {
            mass: 2.0,
            stiffness: stiffness.clone(),
        };
        let field = Lagrangian::new(springs);
        let x = var(&[4, 2 * n], 0.9, 1);
        let k = field.velocity(&time(0.0), &x).unwrap();
        let (q, v) = (x.narrow(1, 0, n).unwrap(), x.narrow(1, n, n).unwrap());
        let expected = Tensor::cat(&[v, (q * -1.5).unwrap()], 1).unwrap();
        assert!(relative(&k, &expected) <= 8.0 * U_F64, "{n}");
        // q̈ = −k q/m, through the implicit function.
        let weights = scattered(&[4, 2 * n], 1.0, 2);
        let loss = (k * &weights).unwrap().sum_all().unwrap();
        let grads = loss.backward().unwrap();
        let lower = weights.narrow(1, n, n).unwrap();
        let of_stiffness = (x.narrow(1, 0, n).unwrap() * &lower)
            .unwrap()
            .sum_all()
            .unwrap();
        let of_stiffness = -0.5 * of_stiffness.to_scalar::<f64>().unwrap();
        let got = grads.get(&stiffness).unwrap().to_scalar::<f64>().unwrap();
        assert!(
            (got - of_stiffness).abs() <= 1e-14 * (n as f64),
            "{n}: {got} {of_stiffness}"
        );
        let upper = weights.narrow(1, 0, n).unwrap();
        let of_x = Tensor::cat(&[(lower * -1.5).unwrap(), upper], 1).unwrap();
        assert!(
            relative(grads.get(&x).unwrap(), &of_x) <= 8.0 * U_F64,
            "{n}"
        );
    }
}

#[test]
fn a_lagrangian_without_mass_is_an_error_that_names_row_and_time() {
    let stiffness = Var::new(1.0, &Device::Cpu).unwrap();
    let massless = Lagrangian::new(Springs {
        mass: 0.0,
        stiffness: stiffness.clone(),
    });
    let error = odeint(
        massless,
        &scattered(&[3, 4], 1.0, 1),
        &[0.5, 1.0],
        &OdeOptions::default(),
    );
    match error.unwrap_err() {
        Error::Potential(PotentialDefect::SingularMass { row: 0, t, pivot }) => {
            assert_eq!((t, pivot), (0.5, 0.0));
        }
        other => panic!("{other}"),
    }
    // With a mass of its own it moves.
    let moving = Lagrangian::with_mass(
        Springs {
            mass: 0.0,
            stiffness,
        },
        2.0,
    );
    let x = scattered(&[3, 4], 1.0, 1);
    let k = moving.velocity(&time(0.0), &x).unwrap();
    let q = x.narrow(1, 0, 2).unwrap();
    assert!(relative(&k.narrow(1, 2, 2).unwrap(), &(q * -0.5).unwrap()) <= 8.0 * U_F64);
}

#[test]
fn a_lagrangian_network_passes_the_check_against_differences_and_trains() {
    let vars = VarMap::new();
    let ode = NeuralOde::from_field(&vars, "l", DType::F64, &Device::Cpu, |vb| {
        let l = EnergyMlp::with_time(&[4, 12, 10, 1], Activation::Softplus, Energy::Output, vb)?;
        Ok(Lagrangian::with_mass(l, 1.0))
    })
    .unwrap();
    fill(&vars);
    let x0 = scattered(&[5, 4], 0.9, 1);
    // The first solve compares all gradients with differences.
    let loss = |xs: &Tensor| xs.sqr().unwrap().mean_all().unwrap();
    let before = loss(&ode.solve(&x0, &[0.0, 0.2]).unwrap());
    let grads = before.backward().unwrap();
    for (_, p) in all(&vars) {
        if let Some(grad) = grads.get(&p) {
            p.set(&(p.as_tensor() - (grad * 1e-2).unwrap()).unwrap())
                .unwrap();
        }
    }
    let after = loss(&ode.solve(&x0, &[0.0, 0.2]).unwrap());
    assert!(after.to_scalar::<f64>().unwrap() < before.to_scalar::<f64>().unwrap());
}

#[test]
fn potentials_that_cannot_learn_are_refused_with_a_reason() {
    let defect = |made: Result<EnergyMlp>| match Error::from_candle(&made.unwrap_err()) {
        Some(Error::Potential(defect)) => defect.clone(),
        other => panic!("{other:?}"),
    };
    let vb = || VarBuilder::zeros(DType::F64, &Device::Cpu);
    let flat = EnergyMlp::new(&[2, 8, 1], Activation::Relu, Energy::Output, vb());
    let reason = defect(flat);
    assert_eq!(reason, PotentialDefect::Flat { activation: "ReLU" });
    assert!(reason.to_string().contains("second derivative is zero"));
    let wide = EnergyMlp::new(&[2, 8, 3], Activation::Tanh, Energy::Output, vb());
    assert_eq!(defect(wide), PotentialDefect::Outputs { outputs: 3 });
    assert!(EnergyMlp::new(&[2, 8, 3], Activation::Tanh, Energy::SumOfSquares, vb()).is_ok());
    // A network that exists has its last bias; one that is built has none.
    let vars = VarMap::new();
    let vb = VarBuilder::from_varmap(&vars, DType::F64, &Device::Cpu);
    EnergyMlp::new(&[2, 8, 1], Activation::Tanh, Energy::Output, vb).unwrap();
    assert_eq!(all(&vars).len(), 3);
}

#[test]
fn states_that_do_not_fit_are_errors_that_say_what_is_needed() {
    let (_, net) = net(&[3, 6, 1], Activation::Tanh);
    let energy = EnergyMlp::of(net, Energy::Output).unwrap();
    let odd = scattered(&[2, 3], 1.0, 1);
    let message = |made: Result<Tensor>| made.unwrap_err().to_string();
    let text = message(Hamiltonian::new(energy.clone()).velocity(&time(0.0), &odd));
    assert!(text.contains("(…, 2n)"), "{text}");
    let text = message(Lagrangian::new(energy.clone()).velocity(&time(0.0), &odd));
    assert!(text.contains("(…, 2n)"), "{text}");
    let text = message(GradientFlow::new(energy).velocity(&time(0.0), &scattered(&[2, 2], 1.0, 1)));
    assert!(text.contains("(…, 3)"), "{text}");
    let (_, last) = self::net(&[4, 5, 3], Activation::Tanh);
    let order = HigherOrder::new(last, 2).unwrap();
    let text = message(order.velocity(&time(0.0), &scattered(&[2, 4], 1.0, 1)));
    assert!(text.contains("(…, 2)"), "{text}");
}

#[test]
fn a_flow_along_a_gradient_has_the_estimated_trace_of_its_hessian() {
    let (_, net) = net(&[3, 6, 1], Activation::Softplus);
    let energy = EnergyMlp::of(net, Energy::Output).unwrap();
    let (z, probe) = (scattered(&[4, 3], 0.9, 1), scattered(&[4, 3], 1.0, 2));
    let l = Tensor::zeros((4, 1), DType::F64, &Device::Cpu).unwrap();
    let flow = Hutchinson::new(GradientFlow::new(energy.clone()));
    let (_, k, _) = flow
        .velocity(&time(0.0), &(z.clone(), l, probe.clone()))
        .unwrap();
    let (_, product) = energy.gradient_jvp(&time(0.0), &z, (0.0, &probe)).unwrap();
    let expected = (product * probe).unwrap().sum_keepdim(1).unwrap();
    assert!(relative(&k, &expected) <= EXACT);
}

#[test]
fn an_equation_of_order_three_is_its_first_order_system() {
    // x''' = −x has the solution of a matrix exponential; compared with the same field by hand.
    let minus = |_: &Time, x: &Tensor| x.narrow(1, 0, 2)?.neg();
    let field = HigherOrder::new(minus, 3).unwrap();
    let by_hand = |_: &Time, x: &Tensor| {
        let shifted = x.narrow(1, 2, 4)?;
        Tensor::cat(&[shifted, x.narrow(1, 0, 2)?.neg()?], 1)
    };
    let x0 = scattered(&[3, 6], 0.9, 1);
    let options = method(&RK4, 4);
    let got = odeint(field, &x0, &[0.0, 1.0], &options).unwrap();
    let expected = odeint(by_hand, &x0, &[0.0, 1.0], &options).unwrap();
    assert!(relative(&got, &expected) <= 4.0 * U_F64);
    assert!(HigherOrder::new(minus, 0).is_err());
}

#[test]
fn a_running_cost_is_the_integral_with_the_gradient_of_its_scheme() {
    // ∫₀¹ (y0 e^{−at})² dt = y0² (1 − e^{−2a}) / 2a.
    let (a, y0) = (Var::new(0.7, &Device::Cpu).unwrap(), var(&[4, 1], 0.9, 1));
    let rate = a.as_tensor().clone();
    let field = WithIntegral::new(
        move |_: &Time, y: &Tensor| y.broadcast_mul(&rate.neg()?),
        |_: &Time, y: &Tensor| y.sqr(),
    );
    let none = Tensor::zeros((4, 1), DType::F64, &Device::Cpu).unwrap();
    let start = (y0.as_tensor().clone(), none);
    let (_, costs) = odeint(field, &start, &[0.0, 1.0], &method(&RK4, 256)).unwrap();
    let cost = costs.get(1).unwrap();
    let share = (1.0 - (-1.4f64).exp()) / 1.4;
    let expected = (y0.sqr().unwrap() * share).unwrap();
    assert!(relative(&cost, &expected) <= 1e-9);
    let grads = cost.sum_all().unwrap().backward().unwrap();
    let of_y0 = (y0.as_tensor() * (2.0 * share)).unwrap();
    assert!(relative(grads.get(&y0).unwrap(), &of_y0) <= 1e-9);
    let slope = ((-1.4f64).exp() * (2.0 * 0.7) - (1.0 - (-1.4f64).exp())) / (2.0 * 0.49);
    let squares: f64 = values(&y0).iter().map(|y| y * y).sum();
    let got = grads.get(&a).unwrap().to_scalar::<f64>().unwrap();
    assert!(
        (got - slope * squares).abs() <= 1e-9,
        "{got} {}",
        slope * squares
    );
}

#[test]
fn a_running_cost_stays_in_f32_where_the_state_is_computed_in_bf16() {
    let field = WithIntegral::new(
        |_: &Time, y: &Tensor| y * 0.0,
        |_: &Time, y: &Tensor| y.ones_like()? * 0.1,
    );
    let (x, none) = (
        Tensor::ones((2, 1), DType::F32, &Device::Cpu).unwrap(),
        Tensor::zeros((2, 1), DType::F32, &Device::Cpu).unwrap(),
    );
    let cost = |leaf_precision| {
        let options = OdeOptions {
            leaf_precision,
            ..method(&RK4, 16)
        };
        let (_, costs) =
            candle_diffeq::predict(&field, &(x.clone(), none.clone()), &[0.0, 1.0], &options)
                .unwrap();
        values(&costs.get(1).unwrap())[0]
    };
    let kept = cost(cost_precision(Precision::bf16()));
    assert!((kept - 0.1).abs() <= 4.0 * U_F32, "{kept}");
    // In bf16 the cost itself is rounded: 0.1 is none of its numbers.
    let lost = cost(vec![Precision::bf16(); 2]);
    assert!((lost - 0.1).abs() > 100.0 * U_F32, "{lost}");
}

#[test]
fn the_data_that_controls_a_field_has_its_whole_gradient() {
    let (vars, net) = net(&[4, 7, 2], Activation::Tanh);
    let x = var(&[5, 2], 0.9, 1);
    let field = DataControl::new(net.clone());
    let ys = odeint_with(
        field,
        x.as_tensor(),
        x.as_tensor(),
        &[0.0, 0.5],
        &method(&RK4, 2),
    )
    .unwrap();
    let v = scattered(&[2, 5, 2], 1.0, 2);
    let grads = (&ys * &v).unwrap().sum_all().unwrap().backward().unwrap();
    // The data as a second tensor of the state that stands still.
    let beside = move |_: &Time, (y, x): &(Tensor, Tensor)| {
        Ok((net.forward(&Tensor::cat(&[y, x], 1)?)?, x.zeros_like()?))
    };
    let start = (x.as_tensor().clone(), x.as_tensor().clone());
    let (twin, _) = odeint(beside, &start, &[0.0, 0.5], &method(&RK4, 2)).unwrap();
    let exact = (&twin * &v).unwrap().sum_all().unwrap().backward().unwrap();
    assert!(relative(&ys, &twin) <= EXACT);
    assert!(relative(grads.get(&x).unwrap(), exact.get(&x).unwrap()) <= EXACT);
    assert!(error_of(&grads, &exact, &all(&vars)) <= EXACT);
}

#[test]
fn augmentation_adds_zeros_or_features_on_any_side_and_dimension() {
    let x = scattered(&[4, 3, 2], 1.0, 1);
    let shape = |x: Result<Tensor>| x.unwrap().dims().to_vec();
    assert_eq!(shape(Augmenter::zeros(5).forward(&x)), [4, 8, 2]);
    assert_eq!(shape(Augmenter::zeros(5).on(2).forward(&x)), [4, 3, 7]);
    assert!(Augmenter::zeros(5).on(3).forward(&x).is_err());
    let flat = x.flatten_from(1).unwrap();
    let vars = VarMap::new();
    let vb = VarBuilder::from_varmap(&vars, DType::F64, &Device::Cpu);
    let layer = Linear::new(6, 2, vb).unwrap();
    let after = Augmenter::learned(layer.clone()).forward(&flat).unwrap();
    let before = Augmenter::learned(layer.clone())
        .before()
        .forward(&flat)
        .unwrap();
    let more = layer.forward(&flat).unwrap();
    assert_eq!(values(&after.narrow(1, 6, 2).unwrap()), values(&more));
    assert_eq!(values(&after.narrow(1, 0, 6).unwrap()), values(&flat));
    assert_eq!(values(&before.narrow(1, 0, 2).unwrap()), values(&more));
    let any = candle_nn::func(|x: &Tensor| x.sqr());
    assert_eq!(shape(Augmenter::learned(any).forward(&flat)), [4, 12]);
    let grads = after.sum_all().unwrap().backward().unwrap();
    assert_eq!(
        all(&vars)
            .iter()
            .filter(|(_, v)| grads.get(v).is_some())
            .count(),
        2
    );
}

#[test]
fn time_is_a_channel_of_any_dimension_and_has_its_gradient() {
    let t = Time::differentiable(0.25, DType::F64, &Device::Cpu);
    let x = scattered(&[2, 3, 4, 4], 1.0, 1);
    let joined = depth_cat(&t, &x, 1).unwrap();
    assert_eq!(joined.dims(), [2, 4, 4, 4]);
    let channel = joined.narrow(1, 3, 1).unwrap();
    assert!(values(&channel).iter().all(|v| *v == 0.25));
    let weights = scattered(&[2, 4, 4, 4], 1.0, 2);
    let grads = (&joined * &weights)
        .unwrap()
        .sum_all()
        .unwrap()
        .backward()
        .unwrap();
    let got = grads
        .get(&t.tensor().unwrap())
        .unwrap()
        .to_scalar::<f64>()
        .unwrap();
    let expected: f64 = values(&weights.narrow(1, 3, 1).unwrap()).iter().sum();
    assert!((got - expected).abs() <= 1e-14);
    assert!(depth_cat(&t, &x, 4).is_err());
}

#[test]
fn fourier_orders_need_not_be_integers_and_expansions_start_away_from_zero() {
    let device = &Device::Cpu;
    let coeffs = Tensor::new(&[[1.0], [0.0], [0.0], [2.0]], device).unwrap();
    let of_time = [
        Tensor::new(&[2.0], device).unwrap(),
        Tensor::new(&[0.1], device).unwrap(),
    ];
    let basis = Basis::Fourier {
        orders: vec![0.0, 1.25],
    };
    let curve = Galerkin::from_tensors(basis, coeffs, of_time, None).unwrap();
    let got = values(&curve.at(&time(0.3)).unwrap())[0];
    assert!((got - (1.0 + 2.0 * (1.25 * 0.7f64).sin())).abs() <= 4.0 * U_F64);
    let vars = VarMap::new();
    let vb = VarBuilder::from_varmap(&vars, DType::F32, device);
    let drawn = Galerkin::new(64, Basis::Chebyshev { terms: 3 }, 0.5, vb).unwrap();
    let size = values(&drawn.at(&time(0.3)).unwrap())
        .iter()
        .map(|x| x * x)
        .sum::<f64>()
        / 64.0;
    assert!(size > 0.01 && size < 1.0, "{size}");
    let bad = Galerkin::from_tensors(
        Basis::Gaussian { terms: 3 },
        Tensor::zeros((3, 2), DType::F64, device).unwrap(),
        [(); 2].map(|()| Tensor::zeros(1, DType::F64, device).unwrap()),
        None,
    );
    assert!(bad.is_err());
}

#[test]
fn closures_of_a_potential_and_its_gradient_are_fields_with_exact_pull_backs() {
    let k = Var::new(1.5, &Device::Cpu).unwrap();
    let stiffness = k.as_tensor().clone();
    let spring = move |_: &Time, x: &Tensor| {
        let (q, p) = (x.narrow(1, 0, 1)?, x.narrow(1, 1, 1)?);
        let force = q.broadcast_mul(&stiffness)?;
        let h = ((q * &force)? + p.sqr()?)?;
        Ok(((h * 0.5)?, Tensor::cat(&[force, p], 1)?))
    };
    let field = Hamiltonian::new(spring);
    let y = scattered(&[3, 2], 1.0, 1);
    check_field(&field, 0.0, &y).unwrap();
    let ys = odeint(field, &y, &[0.0, 1.0], &method(&RK4, 50)).unwrap();
    let omega = 1.5f64.sqrt();
    let (start, end) = (values(&y), values(&ys.get(1).unwrap()));
    for row in 0..3 {
        let exact = start[2 * row] * omega.cos() + start[2 * row + 1] * omega.sin() / omega;
        assert!((end[2 * row] - exact).abs() < 1e-8);
    }
}

/// L = e^{γt} (½ q̇² − ½ k q²), of a damped oscillator (Caldirola and Kanai).
struct Damped {
    gamma: f64,
    k: f64,
}

impl Damped {
    fn weight(&self, t: &Time) -> Result<Tensor> {
        (t.tensor()?.to_dtype(DType::F64)? * self.gamma)?.exp()
    }
}

impl Potential for Damped {
    fn gradient(&self, t: &Time, x: &Tensor) -> Result<(Tensor, Tensor)> {
        let (q, v) = (x.narrow(1, 0, 1)?, x.narrow(1, 1, 1)?);
        let value = ((v.sqr()? * 0.5)? - (q.sqr()? * (0.5 * self.k))?)?;
        let gradient = Tensor::cat(&[(q * -self.k)?, v], 1)?;
        let weight = self.weight(t)?;
        Ok((
            value.broadcast_mul(&weight)?,
            gradient.broadcast_mul(&weight)?,
        ))
    }
}

impl Curved for Damped {
    fn gradient_jvp(
        &self,
        t: &Time,
        x: &Tensor,
        (rate, v): (f64, &Tensor),
    ) -> Result<(Tensor, Tensor)> {
        let gradient = self.gradient(t, x)?.1;
        // Linear in x, and its derivative in time is γ times itself.
        let along = (self.gradient(t, v)?.1 + (&gradient * (rate * self.gamma))?)?;
        Ok((gradient, along))
    }
}

#[test]
fn a_lagrangian_that_reads_time_has_the_friction_that_its_equation_has() {
    let (gamma, k) = (0.3, 1.7);
    let x = scattered(&[5, 2], 1.2, 1);
    for t in [0.0, 0.8] {
        let field = Lagrangian::new(Damped { gamma, k });
        let got = values(&field.velocity(&time(t), &x).unwrap());
        for (got, x) in got.chunks(2).zip(values(&x).chunks(2)) {
            let expected = [x[1], -gamma * x[1] - k * x[0]];
            for (got, expected) in got.iter().zip(expected) {
                assert!((got - expected).abs() <= 64.0 * U_F64, "{got} {expected}");
            }
        }
    }
}

#[test]
fn along_the_motion_of_a_timed_lagrangian_network_momenta_change_by_the_force() {
    // d/dt ∂L/∂q̇ = ∂L/∂q, the left side by differences along the motion.
    for energy in [Energy::Output, Energy::SumOfSquares] {
        let outputs = if energy == Energy::Output { 1 } else { 3 };
        let vars = VarMap::new();
        let vb = VarBuilder::from_varmap(&vars, DType::F64, &Device::Cpu);
        let net = EnergyMlp::with_time(&[4, 6, 5, outputs], Activation::Softplus, energy, vb);
        let (net, mass) = (net.unwrap(), 2.0);
        fill(&vars);
        let field = Lagrangian::with_mass(net.clone(), mass);
        let (t, x) = (0.6, scattered(&[3, 4], 0.9, 1));
        let motion = field.velocity(&time(t), &x).unwrap();
        let momenta = |e: f64| {
            let x = (&x + (&motion * e).unwrap()).unwrap();
            let of_net = net.gradient(&time(t + e), &x).unwrap().1;
            let velocity = (x.narrow(1, 2, 2).unwrap() * mass).unwrap();
            (of_net.narrow(1, 2, 2).unwrap() + velocity).unwrap()
        };
        let e = 1e-5;
        let change = ((momenta(e) - momenta(-e)).unwrap() * (0.5 / e)).unwrap();
        let force = net
            .gradient(&time(t), &x)
            .unwrap()
            .1
            .narrow(1, 0, 2)
            .unwrap();
        // Of the difference: e² and roundings over e.
        assert!(largest(&(change - force).unwrap()) <= 1e-9, "{energy:?}");
    }
}

#[test]
fn a_timed_potential_without_hidden_layers_has_gradients() {
    let vars = VarMap::new();
    let vb = VarBuilder::from_varmap(&vars, DType::F64, &Device::Cpu);
    let net = Perceptron::new(&[3, 1], Activation::Tanh, vb).unwrap();
    let field = GradientFlow::new(EnergyMlp::of_time(net, Energy::Output).unwrap());
    fill(&vars);
    let y0 = var(&[4, 2], 1.0, 1);
    let y = odeint(field, y0.as_tensor(), &[0.0, 1.0], &OdeOptions::default()).unwrap();
    let grads = y.sqr().unwrap().sum_all().unwrap().backward().unwrap();
    let named = vars.data().lock().unwrap().clone();
    assert!(grads.get(&named["0.weight"]).is_some());
}

/// y' = w y, whose velocity candle cannot trace to w, with the gradient of w by hand: the field in the documentation of
/// `VectorField`.
struct Growth(Var);

impl VectorField<Tensor> for Growth {
    fn velocity(&self, _: &Time, y: &Tensor) -> Result<Tensor> {
        y.broadcast_mul(&self.0.as_detached_tensor())
    }

    fn parameters(&self) -> Option<Vec<Tensor>> {
        Some(vec![self.0.as_tensor().clone()])
    }
}

#[test]
fn a_wrapper_that_would_lose_the_gradients_of_its_field_is_an_error() {
    let w = Var::new(&[0.5], &Device::Cpu).unwrap();
    let cost = |_: &Time, x: &Tensor| x.sqr()?.sum_keepdim(1);
    let y0 = var(&[3, 1], 1.0, 1);
    let state = || {
        (
            y0.as_tensor().clone(),
            Tensor::zeros((3, 1), DType::F64, &Device::Cpu).unwrap(),
        )
    };
    let options = OdeOptions::default();
    let field = WithIntegral::new(Growth(w.clone()), cost);
    let error = odeint(field, &state(), &[0.0, 1.0], &options).unwrap_err();
    assert!(error.to_string().contains("WithIntegral"), "{error}");
    let corrected = |_: &Time, y: &Tensor, _: &Tensor| y.zeros_like();
    let hyper = Hypersolver::new(Growth(w.clone()), EULER, corrected);
    let euler = OdeOptions {
        method: EULER,
        ..Default::default()
    };
    let error = odeint(hyper, y0.as_tensor(), &[0.0, 1.0], &euler).unwrap_err();
    assert!(error.to_string().contains("Hypersolver"), "{error}");
    // Of a field of this crate that lists its parameters nothing is lost, and of a frozen one nothing is wanted.
    let vars = VarMap::new();
    let build = move |vb: VarBuilder<'_>| {
        let mlp = Mlp::new(&[1, 4, 1], Activation::Tanh, vb)?;
        Ok(WithIntegral::new(mlp, cost))
    };
    let ode: NeuralOde<(Tensor, Tensor)> =
        NeuralOde::from_field(&vars, "f", DType::F64, &Device::Cpu, build).unwrap();
    let loss = |ode: &NeuralOde<(Tensor, Tensor)>| {
        let costs = ode.solve(&state(), &[0.0, 1.0]).unwrap().1;
        costs.sum_all().unwrap().backward().unwrap()
    };
    let grads = loss(&ode);
    assert!(vars.all_vars().iter().all(|var| grads.get(var).is_some()));
    let names: Vec<_> = ode.parameters().iter().map(ToString::to_string).collect();
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    let grads = loss(&ode.freeze(&names).unwrap());
    assert!(vars.all_vars().iter().all(|var| grads.get(var).is_none()));
    // Nor of a closure.
    let read = w.clone();
    let closure = move |_: &Time, y: &Tensor| y.broadcast_mul(read.as_tensor());
    let solved = odeint(
        WithIntegral::new(closure, cost),
        &state(),
        &[0.0, 1.0],
        &options,
    );
    let grads = solved.unwrap().1.sum_all().unwrap().backward().unwrap();
    assert!(grads.get(&w).is_some());
}

#[test]
fn potentials_and_layers_have_no_rows_where_there_are_none() {
    let (_, net) = net(&[3, 6, 1], Activation::Softplus);
    let energy = EnergyMlp::of(net, Energy::Output).unwrap();
    let none = Tensor::zeros((0, 3), DType::F64, &Device::Cpu).unwrap();
    let laplacian = energy.laplacian(&time(0.0), &none).unwrap();
    assert_eq!(laplacian.dims(), [0, 1]);
    let y = candle_diffeq::nn::softmax(&none, 1).unwrap();
    assert_eq!(y.dims(), [0, 3]);
}
