//! Rows with time scales of their own, and relaxation towards a field: against candle's autograd, against time itself,
//! tile by tile against the general path.
//!
//! `cargo test --test row_speed`.

mod common;

use candle_core::{DType, Device, Result, Tensor, Var};
use candle_diffeq::metrics::Recorder;
use candle_diffeq::nn::{Activation, Cnf, ConvField, Mlp, Relaxation, RowSpeed};
use candle_diffeq::options::{Adaptive, Output, StepControl, Steps};
use candle_diffeq::tableau::{DOPRI5, RK4};
use candle_diffeq::{odeint, Error, NeuralOde, OdeOptions, Precision, State, Time, VectorField};
use candle_nn::{VarBuilder, VarMap};
use common::{all, error_of, fill, relative, scattered, values, worst, U_BF16, U_F64};

/// Both sides add the same few thousand terms, in different orders.
const EXACT: f64 = 1e-12;

/// What is inside.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Inside {
    Mlp,
    Relaxing,
    Cnf,
    Deep,
    RelaxingDeep,
    Conv,
}

const INSIDES: [Inside; 6] = [
    Inside::Mlp,
    Inside::Relaxing,
    Inside::Cnf,
    Inside::Deep,
    Inside::RelaxingDeep,
    Inside::Conv,
];

fn mlp(vb: VarBuilder<'_>) -> Result<Mlp> {
    Mlp::with_time(&[3, 20, 9, 3], Activation::Tanh, vb)
}

fn flow(inside: Inside, vb: VarBuilder<'_>) -> Result<Cnf> {
    let widths: &[usize] = match inside {
        Inside::Deep | Inside::RelaxingDeep => &[3, 18, 17, 9, 3],
        _ => &[3, 12, 9, 3],
    };
    Cnf::new(Mlp::with_time(widths, Activation::Softplus, vb)?)
}

fn conv(vb: VarBuilder<'_>) -> Result<ConvField> {
    ConvField::new(&[2, 3, 2], 3, Activation::Tanh, vb)
}

/// The field inside, over the variables of `vb`, at the speed of each row, over lists of tensors.
fn faster(inside: Inside, vb: VarBuilder<'_>) -> Result<Box<dyn VectorField<Vec<Tensor>>>> {
    Ok(match inside {
        Inside::Mlp => Box::new(OfList(RowSpeed::new(mlp(vb)?))) as _,
        Inside::Relaxing => Box::new(OfList(RowSpeed::new(Relaxation::new(mlp(vb)?)))),
        Inside::Conv => Box::new(OfList(RowSpeed::new(conv(vb)?))),
        Inside::Cnf | Inside::Deep => Box::new(OfTriple(RowSpeed::new(flow(inside, vb)?))),
        Inside::RelaxingDeep => {
            let field = Relaxation::new(flow(inside, vb)?);
            Box::new(OfTriple(RowSpeed::new(field)))
        }
    })
}

struct OfList<F>(F);
struct OfTriple<F>(F);

macro_rules! of_leaves {
    ($name:ident, $state:ty) => {
        impl<F: VectorField<$state>> VectorField<Vec<Tensor>> for $name<F> {
            fn velocity(&self, t: &Time, y: &Vec<Tensor>) -> Result<Vec<Tensor>> {
                Ok(self
                    .0
                    .velocity(t, &<$state>::from_leaves(y.clone())?)?
                    .leaves())
            }

            fn vjp<'f>(
                &'f self,
                t: &Time,
                y: &Vec<Tensor>,
            ) -> Result<(
                Vec<Tensor>,
                candle_diffeq::fields::Pullback<'f, Vec<Tensor>>,
            )> {
                let (k, pull) = self.0.vjp(t, &<$state>::from_leaves(y.clone())?)?;
                let pull = move |v: &Vec<Tensor>| {
                    let pulled = pull(&<$state>::from_leaves(v.clone())?)?;
                    Ok(candle_diffeq::fields::Cotangents {
                        y: pulled.y.leaves(),
                        t: pulled.t,
                        params: pulled.params,
                    })
                };
                Ok((k.leaves(), Box::new(pull)))
            }
        }
    };
}

of_leaves!(OfList, (Tensor, Tensor));
of_leaves!(OfTriple, (Tensor, Tensor, Tensor));

/// States of so many rows; the last leaf is the speed of each.
fn start(inside: Inside, rows: usize, dtype: DType) -> Vec<Tensor> {
    let shapes: &[&[usize]] = match inside {
        Inside::Mlp | Inside::Relaxing => &[&[3], &[1]],
        Inside::Cnf | Inside::Deep | Inside::RelaxingDeep => &[&[3], &[1], &[1]],
        Inside::Conv => &[&[2, 3, 2], &[1, 1, 1]],
    };
    let leaf = |(i, shape): (usize, &&[usize])| {
        let x = scattered(&[&[rows], *shape].concat(), 1.0, 11 + i);
        // The numbers of f32, so that both dtypes see the same.
        let x = x.to_dtype(DType::F32).and_then(|x| x.to_dtype(dtype));
        x.unwrap()
    };
    shapes.iter().enumerate().map(leaf).collect()
}

#[test]
fn the_pull_back_is_that_of_autograd() {
    for inside in INSIDES {
        let (vars, device) = (VarMap::new(), Device::Cpu);
        let field = faster(inside, VarBuilder::from_varmap(&vars, DType::F64, &device)).unwrap();
        fill(&vars);
        let y0 = start(inside, 7, DType::F64);
        let y: Vec<_> = y0.iter().map(|y| Var::from_tensor(y).unwrap()).collect();
        let y: Vec<_> = y.iter().map(|y| y.as_tensor().clone()).collect();
        let v: Vec<_> = (0..)
            .zip(&y)
            .map(|(i, y)| scattered(y.dims(), 1.0, 40 + i))
            .collect();
        let t = Time::new(0.3, DType::F64, &device);
        let k = field.velocity(&t, &y).unwrap();
        let mut sum = Tensor::zeros((), DType::F64, &device).unwrap();
        for (k, v) in k.iter().zip(&v) {
            sum = (sum + (k * v).and_then(|x| x.sum_all()).unwrap()).unwrap();
        }
        let tape = sum.backward().unwrap();
        let (same, pull) = field.vjp(&t, &y).unwrap();
        for (k, same) in k.iter().zip(&same) {
            assert!(relative(same, k) <= 4.0 * U_F64, "{inside:?}");
        }
        let pulled = pull(&v).unwrap();
        let error = error_of(&pulled.params, &tape, &all(&vars));
        assert!(error <= EXACT, "{inside:?}, parameters: {error:e}");
        for (leaf, (y, w)) in y.iter().zip(&pulled.y).enumerate() {
            // A log-density is read by nothing but its own relaxation.
            let Some(exact) = tape.get(y) else {
                assert_eq!(worst(values(w)), 0.0);
                continue;
            };
            assert!(relative(w, exact) <= EXACT, "{inside:?}, leaf {leaf}");
        }
        let speed = pulled.y.last().map(values).unwrap();
        assert!(worst(speed) > 1e-3, "{inside:?}: no gradient of the speed");
    }
}

/// States, then gradients of Σ v y of y0 by leaf and of the weights.
type Answers = (Vec<Tensor>, Vec<Tensor>);

fn solve(inside: Inside, y0: &[Tensor], options: &OdeOptions) -> candle_diffeq::Result<Answers> {
    let (vars, dtype) = (VarMap::new(), y0[0].dtype());
    let device = &Device::Cpu;
    match inside {
        Inside::Mlp => {
            let build = |vb: VarBuilder<'_>| Ok(RowSpeed::new(mlp(vb)?));
            let ode = NeuralOde::from_field(&vars, "", dtype, device, build)?;
            run::<(Tensor, Tensor)>(ode, &vars, y0, options)
        }
        Inside::Relaxing => {
            let build = |vb: VarBuilder<'_>| Ok(RowSpeed::new(Relaxation::new(mlp(vb)?)));
            let ode = NeuralOde::from_field(&vars, "", dtype, device, build)?;
            run::<(Tensor, Tensor)>(ode, &vars, y0, options)
        }
        Inside::Conv => {
            let build = |vb: VarBuilder<'_>| Ok(RowSpeed::new(conv(vb)?));
            let ode = NeuralOde::from_field(&vars, "", dtype, device, build)?;
            run::<(Tensor, Tensor)>(ode, &vars, y0, options)
        }
        Inside::Cnf | Inside::Deep => {
            let build = move |vb: VarBuilder<'_>| Ok(RowSpeed::new(flow(inside, vb)?));
            let ode = NeuralOde::from_field(&vars, "", dtype, device, build)?;
            run::<(Tensor, Tensor, Tensor)>(ode, &vars, y0, options)
        }
        Inside::RelaxingDeep => {
            let build =
                move |vb: VarBuilder<'_>| Ok(RowSpeed::new(Relaxation::new(flow(inside, vb)?)));
            let ode = NeuralOde::from_field(&vars, "", dtype, device, build)?;
            run::<(Tensor, Tensor, Tensor)>(ode, &vars, y0, options)
        }
    }
}

fn run<S: State + 'static>(
    ode: NeuralOde<S>,
    vars: &VarMap,
    y0: &[Tensor],
    options: &OdeOptions,
) -> candle_diffeq::Result<Answers> {
    fill(vars);
    let ode = ode.options(options.clone());
    let y0: Vec<_> = y0.iter().map(|y| Var::from_tensor(y).unwrap()).collect();
    let start = S::from_leaves(y0.iter().map(|y| y.as_tensor().clone()).collect())?;
    let states = ode.solve(&start, &[0.0, 0.3, 1.0])?.leaves();
    let mut loss = Tensor::zeros((), states[0].dtype(), &Device::Cpu)?;
    for (i, y) in states.iter().enumerate() {
        // Of one sign, lest gradients cancel; the same numbers in all dtypes.
        let v = (scattered(y.dims(), 0.5, 5 + i) + 1.0)?.to_dtype(DType::F32)?;
        loss = (loss + (y * v.to_dtype(y.dtype())?)?.sum_all()?)?;
    }
    let grads = loss.backward()?;
    let mut gradients: Vec<_> = y0.iter().map(|y| grads.get(y).unwrap().clone()).collect();
    let of = |(_, var): &(String, Var)| grads.get(var).unwrap().clone();
    gradients.extend(all(vars).iter().map(of));
    Ok((states, gradients))
}

fn distance(x: &Answers, exact: &Answers) -> f64 {
    let each = x.0.iter().chain(&x.1).zip(exact.0.iter().chain(&exact.1));
    worst(each.map(|(x, exact)| relative(x, exact)))
}

fn fixed(fusion: bool, output: Output) -> OdeOptions {
    OdeOptions {
        fusion,
        output,
        method: RK4,
        steps: Steps::PerInterval(4),
        ..Default::default()
    }
}

#[test]
fn tiles_and_the_general_path_agree() {
    for inside in INSIDES {
        for rows in [1, 5, 37, 70] {
            for output in [Output::All, Output::Final] {
                let y0 = start(inside, rows, DType::F64);
                let [exact, tiles] =
                    [false, true].map(|on| solve(inside, &y0, &fixed(on, output)).unwrap());
                let error = distance(&tiles, &exact);
                assert!(error <= EXACT, "{inside:?}, {rows} rows: {error:e}");
                let y0 = start(inside, rows, DType::F32);
                let [general, tiles] = [false, true]
                    .map(|on| distance(&solve(inside, &y0, &fixed(on, output)).unwrap(), &exact));
                assert!(
                    tiles <= 4e-6 + 2.0 * general,
                    "{inside:?}: {tiles:e}, {general:e}"
                );
            }
        }
    }
}

#[test]
fn a_trace_is_formed_in_every_stage_whose_log_density_is_read() {
    // The second stage of DOPRI5 has no weight: other stages read the log-density there only where it relaxes.
    for inside in INSIDES {
        let y0 = start(inside, 37, DType::F64);
        let [exact, tiles] = [false, true].map(|on| {
            let options = OdeOptions {
                method: DOPRI5,
                ..fixed(on, Output::All)
            };
            solve(inside, &y0, &options).unwrap()
        });
        let error = distance(&tiles, &exact);
        assert!(error <= EXACT, "{inside:?}: {error:e}");
    }
}

#[test]
fn tiles_round_where_the_general_path_rounds() {
    for inside in INSIDES {
        let y0 = start(inside, 37, DType::F32);
        let [general, tiles] = [false, true].map(|on| {
            let options = OdeOptions {
                precision: Some(Precision::bf16()),
                ..fixed(on, Output::All)
            };
            solve(inside, &y0, &options).unwrap()
        });
        let error = distance(&tiles, &general);
        assert!(error <= 2.0 * U_BF16, "{inside:?}: {error:e}");
    }
}

#[test]
fn a_row_at_speed_s_is_the_row_over_a_time_exp_s() {
    let (vars, device) = (VarMap::new(), Device::Cpu);
    let build = |vb: VarBuilder<'_>| Mlp::new(&[3, 20, 9, 3], Activation::Tanh, vb);
    let plain = build(VarBuilder::from_varmap(&vars, DType::F64, &device)).unwrap();
    fill(&vars);
    let gaps = [0.25f64, 1.0, 3.0];
    let x0 = scattered(&[3, 3], 1.0, 1);
    let s = Tensor::new(&gaps, &device)
        .and_then(|g| g.log()?.reshape((3, 1)))
        .unwrap();
    for fusion in [false, true] {
        let options = fixed(fusion, Output::Final);
        let state = (x0.clone(), s.clone());
        let (x, same) =
            odeint(RowSpeed::new(plain.clone()), &state, &[0.0, 1.0], &options).unwrap();
        assert_eq!(values(&same), values(&s));
        for (row, gap) in gaps.into_iter().enumerate() {
            let x0 = x0.narrow(0, row, 1).unwrap();
            let alone = odeint(plain.clone(), &x0, &[0.0, gap], &options).unwrap();
            let error = relative(&x.narrow(0, row, 1).unwrap(), &alone);
            assert!(error <= 100.0 * U_F64, "{gap}: {error:e}");
        }
    }
}

#[test]
fn a_slow_row_takes_few_steps() {
    if !common::has_tiles() {
        return;
    }
    let vars = VarMap::new();
    let ode = NeuralOde::from_field(&vars, "", DType::F32, &Device::Cpu, |vb| {
        Ok(RowSpeed::new(Relaxation::new(Mlp::new(
            &[2, 16, 2],
            Activation::Tanh,
            vb,
        )?)))
    })
    .unwrap();
    fill(&vars);
    let recorder = Recorder::tracing();
    let ode = ode.options(OdeOptions {
        method: DOPRI5,
        steps: Steps::Adaptive(Adaptive::new(1e-5, 1e-7).control(StepControl::Rows)),
        recorder: Some(recorder.clone()),
        ..Default::default()
    });
    let x0 = Tensor::ones((3, 2), DType::F32, &Device::Cpu).unwrap();
    let s = Tensor::new(&[[-3f32], [1.0], [4.0]], &Device::Cpu).unwrap();
    ode.solve(&(x0, s), &[0.0, 1.0]).unwrap();
    let rows = recorder.take().rows;
    let steps: Vec<_> = rows.iter().map(|row| row.accepted).collect();
    assert!(
        2 * steps[0] <= steps[1] && 2 * steps[1] <= steps[2],
        "{steps:?}"
    );
}

#[test]
fn a_closure_may_be_inside() {
    let w = Var::from_tensor(&scattered(&[3, 3], 0.7, 2)).unwrap();
    let (x0, s) = (common::var(&[4, 3], 1.0, 1), common::var(&[4, 1], 1.0, 3));
    let options = fixed(true, Output::Final);
    let solved = |by_hand: bool| {
        let y0 = (x0.as_tensor().clone(), s.as_tensor().clone());
        let inner = w.as_tensor().clone();
        let field = move |_: &Time, x: &Tensor| x.matmul(&inner)?.tanh();
        let (x, _) = match by_hand {
            false => odeint(
                RowSpeed::new(Relaxation::new(field)),
                &y0,
                &[0.0, 1.0],
                &options,
            ),
            true => {
                let whole = move |t: &Time, (x, s): &(Tensor, Tensor)| {
                    let k = (field(t, x)? - x)?.broadcast_mul(&s.exp()?)?;
                    Ok((k, s.zeros_like()?))
                };
                odeint(whole, &y0, &[0.0, 1.0], &options)
            }
        }
        .unwrap();
        let grads = x.sqr().and_then(|x| x.sum_all()?.backward()).unwrap();
        let mut all = vec![x];
        all.extend([&w, &x0, &s].map(|v| grads.get(v).unwrap().clone()));
        all
    };
    for (x, exact) in solved(false).iter().zip(&solved(true)) {
        assert!(relative(x, exact) <= 1e-14);
    }
}

#[test]
fn speeds_of_other_shapes_are_refused() {
    let vars = VarMap::new();
    let vb = VarBuilder::from_varmap(&vars, DType::F64, &Device::Cpu);
    let field = RowSpeed::new(mlp(vb).unwrap());
    for s in [vec![5, 3], vec![5], vec![4, 1], vec![1, 5, 1], vec![]] {
        let y = (scattered(&[5, 3], 1.0, 1), scattered(&s, 1.0, 2));
        let refused = odeint(field.clone(), &y, &[0.0, 1.0], &OdeOptions::default());
        let refused = refused.unwrap_err();
        assert!(
            matches!(refused, Error::FieldState { .. }),
            "{s:?}: {refused}"
        );
        assert!(refused.to_string().contains("RowSpeed"), "{refused}");
        let t = Time::new(0.0, DType::F64, &Device::Cpu);
        assert!(field.vjp(&t, &y).is_err());
    }
    // One speed for all rows is one that broadcasts: it is no number for each row, and not tiled.
    let y = (scattered(&[5, 3], 1.0, 1), scattered(&[1, 1], 1.0, 2));
    assert!(odeint(field, &y, &[0.0, 1.0], &OdeOptions::default()).is_ok());
}
