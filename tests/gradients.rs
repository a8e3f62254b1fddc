//! Gradients, held against the method unrolled in candle's own autograd in f64, over everything
//! that a user may do around a solve; and the Taylor test of the backward pass in each precision.
//!
//! `cargo test --test gradients`, ten seconds.

mod common;

use candle_core::backprop::GradStore;
use candle_core::{DType, Device, IndexOp, Module, Result, Tensor, Var};
use candle_diffeq::fields::autonomous;
use candle_diffeq::options::{Arithmetic, Output};
use candle_diffeq::tableau::{Tableau, DOPRI5, EULER, HEUN, RK3, RK4, RK4_38};
use candle_diffeq::{odeint, solution, NeuralOde, OdeOptions, Precision, Time};
use candle_nn::{linear, Optimizer, VarBuilder, VarMap, SGD};
use common::{
    all, bits, error_of, method, named, net, relative, scatter, scattered, unrolled, values, var,
    worst, Net, U_BF16, U_F16, U_F32, U_F64,
};
use proptest::prelude::*;

const METHODS: [Tableau; 5] = [EULER, HEUN, RK4, RK4_38, DOPRI5];

/// Not equidistant.
const TIMES: [f64; 4] = [0.0, 0.25, 0.7, 1.1];

/// Both sides add the same few hundred terms, in different orders; three times the worst seen.
const EXACT: f64 = 64.0 * U_F64;

/// Gradients of Σ x, the last step of every loss here.
fn pulled(x: Result<Tensor>) -> GradStore {
    x.and_then(|x| x.sum_all()?.backward()).unwrap()
}

/// The gradients of `of` are those of unrolled autograd.
fn assert_exact(what: &str, got: &GradStore, exact: &GradStore, of: &[(String, Var)]) {
    let error = error_of(got, exact, of);
    assert!(error <= EXACT, "{what}: {error:e}");
}

/// The gradients of `of` are the same, bit for bit.
fn assert_same(got: &GradStore, other: &GradStore, of: &[(String, Var)]) {
    for (name, var) in of {
        let [got, other] = [got, other].map(|g| bits(g.get(var).unwrap()));
        assert_eq!(got, other, "{name}");
    }
}

/// Variables under the names that failures show.
fn list<const N: usize>(of: [(&str, &Var); N]) -> Vec<(String, Var)> {
    of.map(|(name, var)| (name.to_owned(), var.clone())).into()
}

fn single(x: &Tensor) -> Tensor {
    x.to_dtype(DType::F32).unwrap()
}

/// The unrolled method over [`TIMES`], for a state of one tensor and a field without time.
fn tape(tableau: &Tableau, y0: &Tensor, f: impl Fn(&Tensor) -> Result<Tensor>) -> Tensor {
    let field = |_: &Tensor, y: &[Tensor]| Ok(vec![f(&y[0])?]);
    let times = Tensor::new(&TIMES, &Device::Cpu).unwrap();
    unrolled(tableau, 1, field, std::slice::from_ref(y0), &times).unwrap()[0].clone()
}

/// A network under "ode" with time, y0 and the grid as variables, in f64.
struct Case {
    options: OdeOptions,
    steps: usize,
    vars: VarMap,
    ode: NeuralOde,
    net: Net,
    y0: Var,
    times: Var,
}

impl Case {
    fn new(tableau: &Tableau, steps: usize, times: &[f64]) -> Self {
        let (vars, options) = (VarMap::new(), method(tableau, steps));
        let (ode, net) = net(&vars, "ode", DType::F64, options.clone());
        Self {
            options,
            steps,
            vars,
            ode,
            net,
            y0: var(&[3, 2], 1.0, 7),
            times: Var::new(times, &Device::Cpu).unwrap(),
        }
    }

    /// The same solved in another precision.
    fn precision(self, precision: Precision) -> Self {
        let ode = self.ode.precision(precision);
        Self { ode, ..self }
    }

    /// The same with the other outputs.
    fn output(self, output: Output) -> Self {
        let options = OdeOptions {
            output,
            ..self.options.clone()
        };
        let ode = self.ode.options(options);
        Self { ode, ..self }
    }

    fn variables(&self) -> Vec<(String, Var)> {
        let own = list([("y0", &self.y0), ("times", &self.times)]);
        all(&self.vars).into_iter().chain(own).collect()
    }

    fn solved(&self) -> Tensor {
        self.solved_from(&self.y0)
    }

    fn solved_from(&self, y0: &Tensor) -> Tensor {
        self.ode.solve(y0, &self.times).unwrap()
    }

    fn unrolled_from(&self, y0: &Tensor) -> Tensor {
        let field = |t: &Tensor, y: &[Tensor]| Ok(vec![self.net.rhs(t, &y[0])?]);
        let (tableau, y0) = (&self.options.method, [y0.clone()]);
        unrolled(tableau, self.steps, field, &y0, &self.times).unwrap()[0].clone()
    }

    /// Every gradient of a loss on the states is that of unrolled autograd.
    fn assert_exact(&self, loss: impl Fn(&Tensor) -> Result<Tensor>) {
        let (got, exact) = (self.solved(), self.unrolled_from(&self.y0));
        let what = format!("{}, {} steps", self.options.method.name(), self.steps);
        let (got, exact) = (pulled(loss(&got)), pulled(loss(&exact)));
        assert_exact(&what, &got, &exact, &self.variables());
    }
}

#[test]
fn a_loss_on_an_early_time_only_is_differentiated_exactly() {
    for tableau in METHODS {
        let case = Case::new(&tableau, 2, &TIMES);
        case.assert_exact(|ys| ys.i(1)?.sqr());
        // What comes later has no influence at all.
        let grads = pulled(case.solved().i(1).and_then(|y| y.sqr()));
        assert_eq!(values(grads.get(&case.times).unwrap())[2..], [0.0, 0.0]);
    }
}

#[test]
fn a_loss_on_any_subset_of_times_is_differentiated_exactly() {
    let case = Case::new(&RK4, 1, &TIMES);
    for subset in 1u32..16 {
        case.assert_exact(|ys| {
            let seen = (0..4).filter(|n| subset >> n & 1 == 1);
            let looks = seen.map(|n| ys.i(n)?.powf(3.0)? * (n + 1) as f64);
            Tensor::cat(&looks.collect::<Result<Vec<_>>>()?, 0)
        });
    }
}

#[test]
fn an_all_zero_cotangent_gives_zeros_in_every_precision() {
    for precision in [
        Precision::f64(),
        Precision::f32(),
        Precision::bf16(),
        Precision::f16(),
    ] {
        let case = Case::new(&RK4, 2, &TIMES).precision(precision);
        let ys = case.solved();
        let grads = pulled(&ys * ys.zeros_like().unwrap());
        for (name, var) in case.variables() {
            let grad = values(grads.get(&var).unwrap());
            assert!(
                grad.iter().all(|&g| g == 0.0),
                "{name} in {precision:?}: {grad:?}"
            );
        }
    }
}

#[test]
fn a_sum_whose_cotangent_has_no_strides_is_differentiated_exactly() {
    for tableau in METHODS {
        Case::new(&tableau, 1, &TIMES).assert_exact(Tensor::sum_all);
    }
}

#[test]
fn batched_time_gradients_are_exact_for_the_steps_that_were_run() {
    let decreasing = [1.1, 0.6, 0.2, -0.1];
    let weights = scattered(&[4, 3, 2], 1.0, 3);
    for tableau in METHODS {
        for (steps, times) in [(1, TIMES), (3, TIMES), (1, decreasing), (4, decreasing)] {
            Case::new(&tableau, steps, &times).assert_exact(|ys| ys.sqr()? * &weights);
        }
    }
}

#[test]
fn a_field_without_time_still_has_time_gradients() {
    let vars = VarMap::new();
    let build = |vb: VarBuilder<'_>| linear(2, 2, vb).map(autonomous);
    let ode = NeuralOde::from_field(&vars, "a", DType::F64, &Device::Cpu, build).unwrap();
    scatter(&vars);
    let vb = VarBuilder::from_varmap(&vars, DType::F64, &Device::Cpu);
    let layer = linear(2, 2, vb.pp("a")).unwrap();
    let (y0, times) = (
        var(&[3, 2], 1.0, 1),
        Var::new(&TIMES, &Device::Cpu).unwrap(),
    );
    let ys = ode
        .options(method(&HEUN, 2))
        .solve(y0.as_tensor(), &times)
        .unwrap();
    let field = |_: &Tensor, y: &[Tensor]| Ok(vec![layer.forward(&y[0])?]);
    let exact = unrolled(&HEUN, 2, field, &[y0.as_tensor().clone()], &times).unwrap();
    let of = list([("y0", &y0), ("times", &times)]);
    assert_exact("heun", &pulled(ys.sqr()), &pulled(exact[0].sqr()), &of);
}

/// A field that treats its parameters differently: `frozen` is detached, `idle` never read, `late`
/// read after t = ½ only.
struct Selective {
    weight: Tensor,
    frozen: Tensor,
    late: Tensor,
    _idle: Tensor,
}

impl Selective {
    fn new(vb: VarBuilder<'_>) -> Result<Self> {
        Ok(Self {
            weight: vb.get((2, 2), "weight")?,
            frozen: vb.get((2, 2), "frozen")?.detach(),
            late: vb.get((2, 2), "late")?,
            _idle: vb.get((2, 2), "idle")?,
        })
    }

    fn rhs(&self, t: f64, y: &Tensor) -> Result<Tensor> {
        let k = (y.matmul(&self.weight)? + y.matmul(&self.frozen)?)?.tanh()?;
        match t > 0.5 {
            true => k + y.matmul(&self.late)?.sin()?,
            false => Ok(k),
        }
    }
}

#[test]
fn frozen_and_unread_parameters_get_no_entry_and_late_ones_their_gradient() {
    for (tableau, end) in [
        (EULER, 1.0),
        (HEUN, 1.0),
        (RK4, 1.0),
        (RK4_38, 1.0),
        (RK4, 0.5),
    ] {
        let vars = VarMap::new();
        let build = |vb: VarBuilder<'_>| {
            let field = Selective::new(vb)?;
            Ok(move |t: &Time, y: &Tensor| field.rhs(t.value(), y))
        };
        let ode = NeuralOde::from_field(&vars, "f", DType::F64, &Device::Cpu, build).unwrap();
        assert_eq!(
            ode.parameters(),
            ["f.weight", "f.frozen", "f.late", "f.idle"]
        );
        let ode = ode.freeze(&["f.frozen"]).unwrap();
        scatter(&vars);
        let y0 = var(&[3, 2], 1.0, 2);
        let times = [0.0, 0.4 * end, end];
        let ys = ode
            .options(method(&tableau, 2))
            .solve(y0.as_tensor(), &times)
            .unwrap();
        let vb = VarBuilder::from_varmap(&vars, DType::F64, &Device::Cpu).pp("f");
        let field = Selective::new(vb).unwrap();
        let rhs = |t: &Tensor, y: &[Tensor]| Ok(vec![field.rhs(t.to_scalar()?, &y[0])?]);
        let grid = Tensor::new(&times, &Device::Cpu).unwrap();
        let exact = unrolled(&tableau, 2, rhs, &[y0.as_tensor().clone()], &grid).unwrap();
        let grads = pulled(ys.sqr());
        let mut of = all(&vars);
        of.extend(list([("y0", &y0)]));
        assert_exact(tableau.name(), &grads, &pulled(exact[0].sqr()), &of);
        let entry = |name: &str| grads.get(&named(&vars, name)).is_some();
        assert_eq!([entry("f.weight"), entry("f.late")], [true, end > 0.5]);
        assert_eq!([entry("f.frozen"), entry("f.idle")], [false, false]);
    }
}

#[test]
fn a_captured_variable_that_is_read_late_or_never_is_found_or_left_out() {
    let (late, idle, y0) = (var(&[1], 1.0, 1), var(&[1], 1.0, 2), var(&[1], 1.0, 3));
    let (w, unread) = (late.clone(), idle.clone());
    let field = move |t: &Time, y: &Tensor| match t.value() {
        t if t > 9.0 => y * unread.as_tensor(),
        t if t > 0.5 => y * w.as_tensor(),
        _ => y.neg(),
    };
    let times = [0.0, 0.5, 1.0, 1.5];
    let ys = odeint(field, y0.as_tensor(), &times, &method(&EULER, 1)).unwrap();
    let grads = pulled(ys.i(3));
    // The steps at t = 0 and ½ halve y, the one at t = 1 multiplies it by 1 + w/2.
    let (y, w) = (values(&y0)[0], values(&late)[0]);
    for (var, expected) in [(&late, 0.125 * y), (&y0, 0.25 * (1.0 + 0.5 * w))] {
        let grad = values(grads.get(var).unwrap())[0];
        assert!((grad - expected).abs() <= 4.0 * U_F64 * expected.abs());
    }
    assert!(grads.get(&idle).is_none());
}

/// dz/dt of a network and a log-density beside it, in which all leaves meet.
fn flow(net: &Net, t: &Tensor, z: &Tensor, logp: &Tensor) -> Result<[Tensor; 2]> {
    let dz = net.rhs(t, z)?;
    let pull = (logp * 0.1)?.tanh()?.unsqueeze(1)?.to_dtype(dz.dtype())?;
    let divergence = (dz.sqr()?.neg()? + 1.0)?.sum(1)?;
    Ok([dz.broadcast_add(&pull)?, divergence.to_dtype(logp.dtype())?])
}

fn flow_ode(vars: &VarMap, dtype: DType) -> NeuralOde<(Tensor, Tensor)> {
    let build = |vb: VarBuilder<'_>| {
        let net = Net::new(vb)?;
        let rhs = move |t: &Time, (z, logp): &(Tensor, Tensor)| flow(&net, &t.tensor()?, z, logp);
        Ok(move |t: &Time, y: &(Tensor, Tensor)| rhs(t, y).map(Into::into))
    };
    let ode = NeuralOde::from_field(vars, "flow", dtype, &Device::Cpu, build).unwrap();
    scatter(vars);
    ode
}

#[test]
fn a_tuple_of_a_matrix_and_a_vector_is_differentiated_exactly() {
    for tableau in METHODS {
        let vars = VarMap::new();
        let ode = flow_ode(&vars, DType::F64).options(method(&tableau, 2));
        let vb = VarBuilder::from_varmap(&vars, DType::F64, &Device::Cpu);
        let net = Net::new(vb.pp("flow")).unwrap();
        let (z, logp) = (var(&[3, 2], 1.0, 1), var(&[3], 1.0, 2));
        let times = Var::new(&TIMES, &Device::Cpu).unwrap();
        let state = (z.as_tensor().clone(), logp.as_tensor().clone());
        let got = ode.solve(&state, &times).unwrap();
        let field = |t: &Tensor, y: &[Tensor]| flow(&net, t, &y[0], &y[1]).map(Vec::from);
        let exact = unrolled(&tableau, 2, field, &[state.0, state.1], &times).unwrap();
        let loss = |z: &Tensor, logp: &Tensor| (z.sqr()?.sum(2)? + logp)?.i(1..)?.sin();
        let (got, exact) = (loss(&got.0, &got.1), loss(&exact[0], &exact[1]));
        let mut of = all(&vars);
        of.extend(list([("z", &z), ("logp", &logp), ("times", &times)]));
        assert_exact(tableau.name(), &pulled(got), &pulled(exact), &of);
    }
}

/// Gradients of `variables` and of (z, logp) through a loss on the final state.
fn density_gradients(
    solve: impl Fn(&(Tensor, Tensor)) -> (Tensor, Tensor),
    variables: Vec<(String, Var)>,
    dtype: DType,
) -> Vec<Tensor> {
    let leaf = |x: Tensor| Var::from_tensor(&x.to_dtype(dtype).unwrap()).unwrap();
    let (z, logp) = (
        leaf(scattered(&[3, 2], 1.0, 1)),
        leaf(scattered(&[3], 1.0, 2)),
    );
    let (zs, logps) = solve(&(z.as_tensor().clone(), logp.as_tensor().clone()));
    let grads = pulled(zs.i(3).unwrap().sum(1).unwrap() + logps.i(3).unwrap());
    let of = variables.into_iter().map(|(_, v)| v).chain([z, logp]);
    of.map(|v| grads.get(&v).unwrap().clone()).collect()
}

#[test]
fn a_leaf_in_f32_beside_one_in_bf16_has_gradients_of_f32() {
    // The leaves do not meet, so each shows the roundoff of its own precision.
    let field = |_: &Time, (z, logp): &(Tensor, Tensor)| Ok((z.sin()?.neg()?, logp.cos()?));
    let run = |options: &OdeOptions, dtype| {
        let solve = |y0: &(Tensor, Tensor)| odeint(field, y0, &TIMES, options).unwrap();
        density_gradients(solve, vec![], dtype)
    };
    let exact = run(&method(&RK4, 2), DType::F64);
    for low in [
        Precision::bf16(),
        Precision::bf16().arithmetic(Arithmetic::Native),
    ] {
        let options = OdeOptions {
            precision: Some(low),
            leaf_precision: vec![low, Precision::f32()],
            ..method(&RK4, 2)
        };
        let got = run(&options, DType::F32);
        let (z, logp) = (relative(&got[0], &exact[0]), relative(&got[1], &exact[1]));
        assert!(z > U_BF16 / 64.0 && z <= U_BF16, "{z:e}");
        assert!(logp <= 8.0 * U_F32, "{logp:e}");
    }
}

#[test]
fn a_flow_with_its_density_in_f32_is_differentiated_to_the_roundoff_of_bf16() {
    let vars = VarMap::new();
    let run = |ode: &NeuralOde<(Tensor, Tensor)>, dtype| {
        let solve = |y0: &(Tensor, Tensor)| ode.solve(y0, &TIMES).unwrap();
        density_gradients(solve, all(&vars), dtype)
    };
    let options = |precision| OdeOptions {
        precision: Some(precision),
        ..method(&RK4, 2)
    };
    let ode = flow_ode(&vars, DType::F32).options(options(Precision::f64()));
    let exact = run(&ode, DType::F64);
    let ode = ode.options(OdeOptions {
        leaf_precision: vec![Precision::bf16(), Precision::f32()],
        ..options(Precision::bf16())
    });
    let got = run(&ode, DType::F32);
    let error = worst(got.iter().zip(&exact).map(|(g, e)| relative(g, e)));
    assert!(error <= 2.0 * U_BF16, "{error:e}");
}

#[test]
fn two_solves_in_one_graph_add_their_gradients() {
    for tableau in [EULER, HEUN, RK4, RK4_38] {
        let case = Case::new(&tableau, 1, &TIMES);
        // The second starts where the first ended; both are looked at.
        let run = |solve: &dyn Fn(&Tensor) -> Tensor| {
            let first = solve(&case.y0);
            let second = solve(&first.i(3).unwrap());
            pulled(first.sqr().unwrap() + second.sin().unwrap())
        };
        let (got, exact) = (
            run(&|y| case.solved_from(y)),
            run(&|y| case.unrolled_from(y)),
        );
        assert_exact(tableau.name(), &got, &exact, &case.variables());
    }
}

#[test]
fn an_encoder_before_and_a_head_after_get_their_gradients() {
    for tableau in [EULER, HEUN, RK4, RK4_38] {
        let case = Case::new(&tableau, 1, &TIMES);
        let vb = VarBuilder::from_varmap(&case.vars, DType::F64, &Device::Cpu);
        let [encoder, head] = ["encoder", "head"].map(|name| linear(2, 2, vb.pp(name)).unwrap());
        scatter(&case.vars);
        let run = |solve: &dyn Fn(&Tensor) -> Tensor| {
            let y0 = encoder.forward(&case.y0).and_then(|y| y.tanh()).unwrap();
            let ys = solve(&y0).reshape(((), 2)).unwrap();
            pulled(head.forward(&ys).and_then(|x| x.sqr()))
        };
        let (got, exact) = (
            run(&|y| case.solved_from(y)),
            run(&|y| case.unrolled_from(y)),
        );
        assert!(got.get(&named(&case.vars, "encoder.weight")).is_some());
        assert_exact(tableau.name(), &got, &exact, &case.variables());
    }
}

#[test]
fn the_f32_module_works_beside_the_low_precision_solve_that_shares_its_variables() {
    for precision in [Precision::bf16(), Precision::f16()] {
        let vars = VarMap::new();
        let (ode, net) = net(&vars, "ode", DType::F32, method(&RK4, 1));
        let ode = ode.precision(precision);
        let (t, y0) = (
            Tensor::new(0.3f32, &Device::Cpu).unwrap(),
            single(&scattered(&[3, 2], 1.0, 1)),
        );
        let before = bits(&net.rhs(&t, &y0).unwrap());
        // A penalty on the f32 velocity beside a loss on the solution.
        let penalty = || net.rhs(&t, &y0).and_then(|k| k.sqr()?.sum_all());
        let loss = || {
            ode.solve(&y0, &TIMES)
                .unwrap()
                .sqr()
                .and_then(|x| x.sum_all())
        };
        let both = pulled(loss().unwrap() + penalty().unwrap());
        let (penalty, loss) = (pulled(penalty()), pulled(loss()));
        for (name, var) in all(&vars) {
            let [both, penalty, loss] = [&both, &penalty, &loss].map(|g| g.get(&var).unwrap());
            assert_eq!(both.dtype(), DType::F32);
            assert_eq!(bits(both), bits(&(penalty + loss).unwrap()), "{name}");
        }
        assert_eq!(bits(&net.rhs(&t, &y0).unwrap()), before);
    }
}

#[test]
fn other_layers_of_the_map_are_untouched_and_get_no_entry() {
    let case = Case::new(&RK4, 1, &TIMES);
    let vb = VarBuilder::from_varmap(&case.vars, DType::F64, &Device::Cpu);
    linear(2, 2, vb.pp("other")).unwrap();
    linear(2, 2, vb.pp("ode").pp("other")).unwrap();
    let two = candle_nn::Init::Const(2.0);
    vb.get_with_hints_dtype(3, "steps", two, DType::U32)
        .unwrap();
    let of_all = || {
        all(&case.vars)
            .iter()
            .map(|(_, v)| bits(v))
            .collect::<Vec<_>>()
    };
    let before = of_all();
    let grads = pulled(case.solved().sqr());
    assert_eq!(of_all(), before);
    for name in [
        "other.weight",
        "other.bias",
        "ode.other.weight",
        "ode.other.bias",
        "steps",
    ] {
        assert!(grads.get(&named(&case.vars, name)).is_none(), "{name}");
        assert!(!case.ode.parameters().iter().any(|p| p == name), "{name}");
    }
    case.assert_exact(Tensor::sqr);
}

#[test]
fn two_odes_under_two_prefixes_are_differentiated_apart_and_together() {
    for tableau in [EULER, RK4] {
        let first = Case::new(&tableau, 1, &TIMES);
        let (ode, net) = net(&first.vars, "other", DType::F64, method(&tableau, 1));
        let second = Case {
            ode,
            net,
            vars: first.vars.clone(),
            times: first.times.clone(),
            ..Case::new(&tableau, 1, &TIMES)
        };
        let alone = pulled(Ok(first.solved()));
        for (name, var) in all(&first.vars) {
            assert_eq!(
                alone.get(&var).is_some(),
                name.starts_with("ode."),
                "{name}"
            );
        }
        let got = second.solved_from(&first.solved().i(3).unwrap());
        let exact = second.unrolled_from(&first.unrolled_from(&first.y0).i(3).unwrap());
        let (got, exact) = (pulled(got.sqr()), pulled(exact.sqr()));
        assert_exact(tableau.name(), &got, &exact, &first.variables());
    }
}

#[test]
fn variables_that_a_closure_captures_are_discovered() {
    for tableau in METHODS {
        let (w, b, y0) = (
            var(&[2, 2], 1.0, 1),
            var(&[2], 1.0, 2),
            var(&[3, 2], 1.0, 3),
        );
        let times = Var::new(&TIMES, &Device::Cpu).unwrap();
        let of = list([("w", &w), ("b", &b), ("y0", &y0), ("times", &times)]);
        let rhs = move |t: &Tensor, y: &Tensor| {
            let b = b.broadcast_mul(&t.sin()?)?;
            y.matmul(&w)?.broadcast_add(&b)?.tanh()
        };
        let tape = |t: &Tensor, y: &[Tensor]| Ok(vec![rhs(t, &y[0])?]);
        let exact = unrolled(&tableau, 2, tape, &[y0.as_tensor().clone()], &times).unwrap();
        let field = move |t: &Time, y: &Tensor| rhs(&t.tensor()?, y);
        let ys = odeint(field, y0.as_tensor(), &times, &method(&tableau, 2)).unwrap();
        assert_exact(
            tableau.name(),
            &pulled(ys.sqr()),
            &pulled(exact[0].sqr()),
            &of,
        );
    }
}

#[test]
fn a_tensor_that_a_closure_captures_passes_its_gradient_on() {
    // A conditioning vector that an encoder made: the gradient goes on to the encoder's variables.
    let (e, y0) = (var(&[1, 2], 1.0, 1), var(&[3, 2], 1.0, 2));
    let context = e.as_tensor().sqr().unwrap();
    let rhs = move |y: &Tensor| y.broadcast_mul(&context)?.sin();
    let exact = tape(&RK4, &y0, &rhs);
    let field = move |_: &Time, y: &Tensor| rhs(y);
    let ys = odeint(field, y0.as_tensor(), &TIMES, &method(&RK4, 1)).unwrap();
    let of = list([("e", &e), ("y0", &y0)]);
    assert_exact("rk4", &pulled(ys.sin()), &pulled(exact.sin()), &of);
}

#[test]
fn a_variable_that_is_both_initial_state_and_parameter_gets_both_gradients() {
    let y0 = var(&[3, 2], 1.0, 1);
    let w = y0.clone();
    let rhs = move |y: &Tensor| (y * w.as_tensor())?.tanh();
    let exact = tape(&RK4, &y0, &rhs);
    let field = move |_: &Time, y: &Tensor| rhs(y);
    let ys = odeint(field, y0.as_tensor(), &TIMES, &method(&RK4, 1)).unwrap();
    assert_exact(
        "rk4",
        &pulled(ys.sqr()),
        &pulled(exact.sqr()),
        &list([("y0", &y0)]),
    );
}

#[test]
fn the_final_output_is_the_last_of_all_in_value_and_gradients() {
    for tableau in METHODS {
        let case = Case::new(&tableau, 2, &TIMES);
        let last_of_all = case.solved().i(3).unwrap();
        let case = case.output(Output::Final);
        let last = case.solved();
        assert_eq!(last.dims(), [3, 2]);
        assert_eq!(bits(&last), bits(&last_of_all));
        assert_same(
            &pulled(last.sin()),
            &pulled(last_of_all.sin()),
            &case.variables(),
        );
    }
}

#[test]
fn a_grid_of_one_point_returns_y0_and_the_identity_as_gradient() {
    for (output, dims) in [(Output::All, &[1, 3, 2][..]), (Output::Final, &[3, 2])] {
        let case = Case::new(&RK4, 3, &[0.7]).output(output);
        let ys = case.solved();
        assert_eq!(ys.dims(), dims);
        assert_eq!(bits(&ys), bits(&case.y0));
        let weights = scattered(dims, 1.0, 5);
        let grads = pulled(ys * &weights);
        assert_eq!(bits(grads.get(&case.y0).unwrap()), bits(&weights));
        assert_eq!(values(grads.get(&case.times).unwrap()), [0.0]);
        assert!(all(&case.vars).iter().all(|(_, v)| grads.get(v).is_none()));
    }
}

#[test]
fn the_gradient_on_a_grid_of_one_point_is_the_callers_own() {
    for dtype in [DType::F64, DType::F32] {
        let y0 = scattered(&[3, 2], 1.0, 1).to_dtype(dtype).unwrap();
        let field = |_: &Time, y: &Tensor| y.neg();
        let solution = solution(&field, &y0, &[0.5], &method(&RK4, 1)).unwrap();
        let buffer = Var::from_tensor(&y0.unsqueeze(0).unwrap()).unwrap();
        let grads = solution.vjp(&buffer.as_detached_tensor()).unwrap();
        let before = bits(&grads.y0);
        buffer.set(&buffer.zeros_like().unwrap()).unwrap();
        assert_eq!(bits(&grads.y0), before);
    }
}

#[test]
fn backward_may_be_called_again_on_the_same_graph() {
    for precision in [Precision::f64(), Precision::f16()] {
        let case = Case::new(&RK4, 2, &TIMES).precision(precision);
        let loss = case.solved().sqr().unwrap().sum_all().unwrap();
        let (first, again) = (loss.backward().unwrap(), loss.backward().unwrap());
        assert_same(&first, &again, &case.variables());
    }
}

#[test]
fn several_losses_on_one_solve_have_gradients_that_add_up() {
    let case = Case::new(&RK4, 1, &TIMES);
    let ys = case.solved();
    let losses = [
        ys.i(1).unwrap().sqr().unwrap(),
        ys.i(2..).unwrap().sin().unwrap(),
    ];
    let losses = losses.map(|l| l.sum_all().unwrap());
    let both = pulled(&losses[0] + &losses[1]);
    let [a, b] = losses.map(|l| l.backward().unwrap());
    for (name, var) in case.variables() {
        let [both, a, b] = [&both, &a, &b].map(|g| g.get(&var).unwrap());
        let error = relative(&(a + b).unwrap(), both);
        assert!(error <= EXACT, "{name}: {error:e}");
    }
}

#[test]
fn gradients_come_back_untracked_although_the_loss_is_not_linear() {
    let case = Case::new(&RK4, 1, &TIMES);
    let ys = case.solved();
    let grads = pulled(ys.sqr().unwrap() * &ys);
    for (name, var) in case.variables() {
        assert!(!grads.get(&var).unwrap().track_op(), "{name}");
    }
}

#[test]
fn the_solution_without_a_graph_has_the_same_gradients() {
    for precision in [Precision::f64(), Precision::f16(), Precision::bf16()] {
        let case = Case::new(&HEUN, 2, &TIMES).precision(precision);
        let cotangent = scattered(&[4, 3, 2], 1.0, 9)
            .to_dtype(precision.state)
            .unwrap();
        let ys = case.solved();
        let solution = case.ode.solution(case.y0.as_tensor(), &case.times).unwrap();
        assert_eq!(bits(solution.states()), bits(&ys));
        assert!(!solution.states().track_op());
        let grads = solution.vjp(&cotangent).unwrap();
        let mut params = grads.params;
        assert!(all(&case.vars)
            .iter()
            .all(|(_, v)| !params.get(v).unwrap().track_op()));
        params.insert(&case.y0, grads.y0);
        params.insert(&case.times, grads.times.unwrap());
        assert_same(&params, &pulled(ys * &cotangent), &case.variables());
    }
}

#[test]
fn a_borrowed_field_has_the_gradients_of_an_owned_one() {
    let (w, y0) = (var(&[2, 2], 1.0, 1), var(&[3, 2], 1.0, 2));
    let (cotangent, options) = (scattered(&[4, 3, 2], 1.0, 3), method(&RK4, 2));
    // An `Rc` cannot cross threads: only `solution` takes such a field.
    let weight = std::rc::Rc::new(w.clone());
    let field = |_: &Time, y: &Tensor| y.matmul(&weight)?.tanh();
    let grads = solution(&field, y0.as_tensor(), &TIMES, &options)
        .unwrap()
        .vjp(&cotangent)
        .unwrap();
    assert!(grads.times.is_none());
    let captured = w.clone();
    let field = move |_: &Time, y: &Tensor| y.matmul(&captured)?.tanh();
    let ys = odeint(field, y0.as_tensor(), &TIMES, &options).unwrap();
    let mut params = grads.params;
    params.insert(&y0, grads.y0);
    assert_same(
        &params,
        &pulled(ys * &cotangent),
        &list([("w", &w), ("y0", &y0)]),
    );
}

#[test]
fn solving_and_differentiating_leaves_every_variable_as_it_was() {
    for precision in [
        Precision::f64(),
        Precision::f32(),
        Precision::bf16(),
        Precision::f16(),
    ] {
        let case = Case::new(&RK4, 2, &TIMES).precision(precision);
        let of_all = || {
            case.variables()
                .iter()
                .map(|(_, v)| bits(v))
                .collect::<Vec<_>>()
        };
        let before = of_all();
        pulled(case.solved().sqr());
        assert_eq!(of_all(), before);
    }
}

#[test]
fn a_neural_ode_is_differentiated_as_it_was_solved_whatever_the_optimiser_did_since() {
    let case = Case::new(&RK4, 2, &TIMES);
    let (exact, pending) = (pulled(case.solved().sqr()), case.solved().sqr());
    let variables = case.variables().into_iter().map(|(_, v)| v).collect();
    SGD::new(variables, 0.1).unwrap().step(&exact).unwrap();
    // The loss itself reads ys, which candle keeps; the solve reads its own copies of y0 and θ.
    assert_same(&pulled(pending), &exact, &case.variables());
}

#[test]
fn gradients_arrive_in_the_dtype_of_each_variable() {
    let y0 = scattered(&[3, 2], 1.0, 1).to_dtype(DType::BF16).unwrap();
    let (y0, w) = (Var::from_tensor(&y0).unwrap(), var(&[2, 2], 1.0, 2));
    let times = Var::new(&[0f32, 0.5, 1.0], &Device::Cpu).unwrap();
    let weight = w.clone();
    let field = move |_: &Time, y: &Tensor| y.matmul(&weight.to_dtype(y.dtype())?);
    let ys = odeint(field, y0.as_tensor(), &times, &method(&RK4, 1)).unwrap();
    assert_eq!(ys.dtype(), DType::F32);
    let grads = pulled(Ok(ys));
    let dtype = |v: &Var| grads.get(v).unwrap().dtype();
    assert_eq!(
        [dtype(&y0), dtype(&w), dtype(&times)],
        [DType::BF16, DType::F64, DType::F32]
    );
}

fn few_cases() -> ProptestConfig {
    ProptestConfig {
        cases: 32,
        failure_persistence: None,
        ..Default::default()
    }
}

proptest! {
    #![proptest_config(few_cases())]

    #[test]
    fn the_backward_pass_is_linear_in_the_cotangent(
        a in -3f64..3.0,
        b in -3f64..3.0,
        seed in 0usize..1000,
        which in 0usize..METHODS.len(),
    ) {
        let case = Case::new(&METHODS[which], 2, &TIMES);
        let solution = case.ode.solution(case.y0.as_tensor(), &case.times).unwrap();
        let gradients = |cotangent: &Tensor| {
            let grads = solution.vjp(cotangent).unwrap();
            let params = all(&case.vars).into_iter().map(|(_, v)| grads.params.get(&v).unwrap().clone());
            params.chain([grads.y0.clone(), grads.times.clone().unwrap()]).collect::<Vec<_>>()
        };
        let scaled = |x: &Tensor, c: f64| (x * c).unwrap();
        let (u, v) = (scattered(&[4, 3, 2], 1.0, seed), scattered(&[4, 3, 2], 1.0, seed + 1));
        let sum = gradients(&(scaled(&u, a) + scaled(&v, b)).unwrap());
        for ((u, v), sum) in gradients(&u).into_iter().zip(gradients(&v)).zip(sum) {
            let (u, v) = (scaled(&u, a), scaled(&v, b));
            let size = worst(values(&u)) + worst(values(&v));
            let error = worst(values(&(sum - (u + v).unwrap()).unwrap()));
            prop_assert!(error <= EXACT * size, "{:e}", error / size);
        }
    }

    #[test]
    fn the_scaled_f16_backward_pass_commutes_with_powers_of_two(k in -60i32..60, seed in 0usize..1000) {
        // λ = 2^k λ' moves S by 2^−k and leaves every number that f16 sees as it is.
        let case = Case::new(&RK4, 2, &TIMES).precision(Precision::f16());
        let solution = case.ode.solution(case.y0.as_tensor(), &TIMES).unwrap();
        let u = single(&scattered(&[4, 3, 2], 1.0, seed));
        let factor = 2f64.powi(k);
        let (one, scaled) = (solution.vjp(&u).unwrap(), solution.vjp(&(u * factor).unwrap()).unwrap());
        let times = |x: &Tensor| values(x).iter().map(|x| x * factor).collect::<Vec<_>>();
        prop_assert_eq!(times(&one.y0), values(&scaled.y0));
        for (_, var) in all(&case.vars) {
            let [one, scaled] = [&one, &scaled].map(|g| g.params.get(&var).unwrap());
            prop_assert_eq!(times(one), values(scaled));
        }
    }
}

/// Slope of log y over log x by least squares.
fn slope(points: &[(f64, f64)]) -> f64 {
    let logs: Vec<_> = points.iter().map(|(x, y)| (x.ln(), y.ln())).collect();
    let mean = |f: &dyn Fn(&(f64, f64)) -> f64| logs.iter().map(f).sum::<f64>() / logs.len() as f64;
    let (x, y) = (mean(&|p| p.0), mean(&|p| p.1));
    mean(&|p| (p.0 - x) * (p.1 - y)) / mean(&|p| (p.0 - x).powi(2))
}

#[test]
fn going_there_and_back_returns_to_y0_with_the_order_of_the_method() {
    // Where the order is even, the error constants of a step and of its way back cancel: one more.
    for (tableau, order) in [
        (EULER, 1.0),
        (HEUN, 3.0),
        (RK3, 3.0),
        (RK4, 5.0),
        (RK4_38, 5.0),
    ] {
        let error = |steps: usize| {
            let case = Case::new(&tableau, steps, &[0.0, 1.0]);
            let end = case.solved().i(1).unwrap();
            let back = case.ode.solve(&end, &[1.0, 0.0]).unwrap().i(1).unwrap();
            relative(&back, &case.y0)
        };
        let points = [8, 16, 32].map(|n| (1.0 / n as f64, error(n)));
        let got = slope(&points);
        assert!(
            (got - order).abs() <= 0.1,
            "{}: {got}, {points:?}",
            tableau.name()
        );
    }
}

/// What a Taylor test varies.
#[derive(Clone, Copy, Debug)]
enum Along {
    State,
    Weights,
    Times,
}

/// L at x + h d and ∂L at x, for a loss of state, weights and times in some precision.
struct Taylor {
    vars: VarMap,
    ode: NeuralOde,
    y0: Var,
    times: Var,
}

impl Taylor {
    fn new(tableau: &Tableau, precision: Precision) -> Self {
        let vars = VarMap::new();
        let options = OdeOptions {
            precision: Some(precision),
            ..method(tableau, 2)
        };
        let (ode, _) = net(&vars, "ode", precision.state, options);
        let y0 = scattered(&[8, 2], 1.0, 7)
            .to_dtype(precision.state)
            .unwrap();
        Self {
            vars,
            ode,
            y0: Var::from_tensor(&y0).unwrap(),
            times: Var::new(&TIMES, &Device::Cpu).unwrap(),
        }
    }

    fn variables(&self, along: Along) -> Vec<Var> {
        match along {
            Along::State => vec![self.y0.clone()],
            Along::Weights => all(&self.vars).into_iter().map(|(_, v)| v).collect(),
            Along::Times => vec![self.times.clone()],
        }
    }

    /// In f64, so that only the solve rounds.
    fn loss(&self) -> Tensor {
        let ys = self.ode.solve(self.y0.as_tensor(), &self.times).unwrap();
        let target = scattered(ys.dims(), 1.5, 11);
        let off = (ys.to_dtype(DType::F64).unwrap() - target).unwrap();
        off.sqr().and_then(|l| l.sum_all()).unwrap()
    }

    /// (h, mean of |L(x ± hd) − L(x) ∓ h g·d|) over directions d, with g multiplied by `factor`.
    fn remainders(&self, along: Along, hs: &[f64], factor: f64) -> Vec<(f64, f64)> {
        let variables = self.variables(along);
        let x: Vec<_> = variables
            .iter()
            .map(|v| v.as_tensor().copy().unwrap())
            .collect();
        let loss = self.loss();
        let grads = loss.backward().unwrap();
        let loss = values(&loss)[0];
        let mut sums: Vec<_> = hs.iter().map(|&h| (h, 0.0)).collect();
        for seed in 0..4 {
            let direction = |v: &Var| scattered(v.dims(), 0.3, 20 + seed);
            let d: Vec<_> = variables.iter().map(direction).collect();
            let of = |(v, d): (&Var, &Tensor)| {
                let g = values(grads.get(v).unwrap());
                g.iter().zip(values(d)).map(|(g, d)| g * d).sum::<f64>()
            };
            let gd = factor * variables.iter().zip(&d).map(of).sum::<f64>();
            for (h, sum) in &mut sums {
                for h in [*h, -*h] {
                    self.set(&variables, &x, &d, h);
                    *sum += (values(&self.loss())[0] - loss - h * gd).abs() / 8.0;
                }
            }
        }
        self.set(&variables, &x, &x, 0.0);
        sums
    }

    /// The order in h of the remainder, over the steps at which it is above ten times the roundoff
    /// floor: what is left a few unit roundoffs away from x, where h² has vanished.
    fn slope(&self, along: Along, unit: f64, factor: f64) -> f64 {
        let near: Vec<_> = (1..5).map(|k| unit * 2f64.powi(k)).collect();
        let floor = self.remainders(along, &near, factor);
        let floor = worst(floor.into_iter().map(|(_, r)| r));
        let far: Vec<_> = (0..12).map(|k| 0.5f64.powi(k)).collect();
        let mut above = self.remainders(along, &far, factor);
        above.retain(|(_, r)| *r > 10.0 * floor);
        assert!(above.len() >= 3, "{along:?}: {above:?} above {floor:e}");
        slope(&above)
    }

    fn set(&self, variables: &[Var], x: &[Tensor], d: &[Tensor], h: f64) {
        for ((v, x), d) in variables.iter().zip(x).zip(d) {
            let to = (x.to_dtype(DType::F64).unwrap()
                + (d.to_dtype(DType::F64).unwrap() * h).unwrap())
            .unwrap();
            v.set(&to.to_dtype(v.dtype()).unwrap()).unwrap();
        }
    }
}

#[test]
fn a_taylor_remainder_is_of_second_order_along_state_weights_and_times() {
    // With each precision its unit roundoff, and an error of g that must be noticed.
    for (precision, unit, off) in [
        (Precision::f64(), U_F64, 0.01),
        (Precision::f32(), U_F32, 0.01),
        (Precision::f16(), U_F16, 0.2),
    ] {
        for tableau in [EULER, RK4] {
            for along in [Along::State, Along::Weights, Along::Times] {
                let what = format!("{} along {along:?}, {precision:?}", tableau.name());
                let case = Taylor::new(&tableau, precision);
                let right = case.slope(along, unit, 1.0);
                eprintln!(
                    "{what} {right:.3} {:.3}",
                    case.slope(along, unit, 1.0 - off)
                );
                assert!((right - 2.0).abs() <= 0.2, "{what}: {right}");
                let wrong = case.slope(along, unit, 1.0 - off);
                assert!(
                    wrong < 1.8,
                    "{what}: {wrong} although the gradient is wrong"
                );
            }
        }
    }
}
