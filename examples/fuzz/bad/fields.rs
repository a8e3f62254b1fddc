//! Fields, layers, cotangents, parameters and losses that do not fit, and solutions that leave every range.

use candle_core::{DType, Device, Tensor, Var};
use candle_diffeq::nn::{Activation, Cnf, ConvField, Mlp, RowLoss};
use candle_diffeq::options::{Output, Steps, TimeGrid};
use candle_diffeq::{odeint, solution, NeuralOde, OdeOptions, Precision, Time};
use candle_nn::{Linear, VarBuilder, VarMap};
use rand::rngs::StdRng;
use rand::Rng;

use super::{attempt, builder, conv, decay, flow, mlp, not_finite, ones, pick, through, Attempt};

/// States that are not the field's.
pub(super) fn shapes(rng: &mut StdRng) -> Attempt {
    let fusion = pick(rng, &[true, false]);
    let which = rng.random_range(0..9);
    attempt(
        format!("state of kind {which} for another field, fusion {fusion}"),
        move || {
            let options = OdeOptions {
                fusion,
                ..Default::default()
            };
            let vars = &VarMap::new();
            match which {
                0 => through(&ones(&[2, 4])?, options, vars, mlp),
                1 => through(&ones(&[])?, options, vars, mlp),
                2 => through(&ones(&[2])?, options, vars, mlp),
                3 => through(&(ones(&[2, 3])?, ones(&[2])?), options, vars, flow),
                4 => through(&(ones(&[2, 3])?, ones(&[3, 1])?), options, vars, flow),
                5 => through(&(ones(&[2, 2])?, ones(&[2, 1])?), options, vars, flow),
                6 => through(&ones(&[2, 3])?, options, vars, conv),
                7 => through(&ones(&[2, 2, 4, 4])?, options, vars, conv),
                _ => through(&(ones(&[])?, ones(&[])?), options, vars, flow),
            }
        },
    )
}

/// Layers that do not fit.
pub(super) fn layers(rng: &mut StdRng) -> Attempt {
    let which = rng.random_range(0..9);
    let fusion = pick(rng, &[true, false]);
    let rows = rng.random_range(1..20);
    attempt(
        format!("layers with defect {which}, fusion {fusion}, {rows} rows"),
        move || {
            let (mut weight, mut bias) = (ones(&[3, 3])?, ones(&[3])?);
            match which {
                0 => bias = ones(&[1])?,
                1 => bias = ones(&[4])?,
                2 => bias = ones(&[0])?,
                3 => bias = ones(&[1, 3])?,
                4 => weight = ones(&[9])?,
                5 => weight = ones(&[1, 3, 3])?,
                6 => weight = ones(&[])?,
                7 => weight = weight.to_dtype(DType::F64)?,
                _ => bias = bias.to_dtype(DType::U32)?,
            }
            let layers = [
                Linear::new(ones(&[3, 3])?, Some(ones(&[3])?)),
                Linear::new(weight, Some(bias)),
            ];
            let mlp = Mlp::from_layers(&layers, Activation::Tanh, false)?;
            let options = OdeOptions {
                fusion,
                ..Default::default()
            };
            let y0 = Var::from_tensor(&ones(&[rows, 3])?)?;
            let ys = odeint(mlp, y0.as_tensor(), &[0.0, 0.1], &options)?;
            ys.sum_all()?.backward()?;
            Ok(())
        },
    )
}

/// Fields that return what is no velocity, from some evaluation on.
pub(super) fn velocities(rng: &mut StdRng) -> Attempt {
    let which = rng.random_range(0..7);
    let from = rng.random_range(0.0..0.9);
    let x = not_finite(rng);
    attempt(
        format!("velocity of kind {which} ({x}) from t = {from} on"),
        move || {
            let field = move |t: &Time, y: &Tensor| {
                if t.value() < from {
                    return y * -0.5;
                }
                match which {
                    0 => y.narrow(0, 0, 1),
                    1 => y.to_dtype(DType::F64),
                    2 => y.reshape((3, 2)),
                    3 => y * x,
                    4 => y.broadcast_add(&Tensor::new(x as f32, &Device::Cpu)?),
                    5 => candle_core::bail!("a field that fails"),
                    _ => y.unsqueeze(0),
                }
            };
            let y0 = Var::from_tensor(&ones(&[2, 3])?)?;
            let ys = odeint(
                field,
                y0.as_tensor(),
                &[0.0, 0.5, 1.0],
                &OdeOptions::default(),
            )?;
            ys.sum_all()?.backward()?;
            Ok(())
        },
    )
}

pub(super) fn cotangents(rng: &mut StdRng) -> Attempt {
    let (which, x) = (rng.random_range(0..5), not_finite(rng));
    let ours = pick(rng, &[true, false]);
    attempt(
        format!("cotangent of kind {which} ({x}), ours {ours}"),
        move || {
            let v = ones(&[2, 5, 3])?;
            let v = match which {
                0 => ones(&[5, 3])?,
                1 => ones(&[3, 5, 3])?,
                2 => (v * x)?,
                3 => Tensor::cat(&[ones(&[1, 5, 3])?, (ones(&[1, 5, 3])? * x)?], 0)?,
                _ => Var::from_tensor(&v)?.into_inner(),
            };
            let (y0, times, options) = (ones(&[5, 3])?, [0.0, 0.5], OdeOptions::default());
            if ours {
                let field = mlp(builder(&VarMap::new(), DType::F32))?;
                solution(&field, &y0, &times, &options)?.vjp(&v)?;
            } else {
                solution(&decay, &y0, &times, &options)?.vjp(&v)?;
            }
            Ok(())
        },
    )
}

/// Parameters that are not finite, or not of one floating-point dtype.
pub(super) fn parameters(rng: &mut StdRng) -> Attempt {
    let activation = pick(rng, &Activation::ALL);
    // An infinity is another matter: a sigmoid of it is one.
    let (which, x) = (rng.random_range(0..5), f64::NAN);
    let (fusion, name) = (pick(rng, &[true, false]), rng.random_range(0..4));
    let words = format!("parameter {name} is {x}, kind {which}, {activation:?}, fusion {fusion}");
    attempt(words, move || {
        let options = OdeOptions {
            fusion,
            ..Default::default()
        };
        let names = ["0.weight", "0.bias", "1.weight", "1.bias"];
        let spoil = |vars: &VarMap, to: fn(&Tensor, f64) -> candle_core::Result<Tensor>| {
            let mut data = vars.data().lock().unwrap_or_else(|e| e.into_inner());
            let Some(var) = data.get_mut(names[name]) else {
                return Ok(());
            };
            *var = Var::from_tensor(&to(var.as_tensor(), x)?)?;
            Ok::<_, candle_core::Error>(())
        };
        let vars = VarMap::new();
        let vb = || builder(&vars, DType::F32);
        let bad = |x: &Tensor, bad: f64| x.detach() * bad;
        let (y0, times) = (ones(&[4, 3])?, [0.0, 0.2]);
        match which {
            0 => {
                let build = || Mlp::new(&[3, 5, 3], activation, vb());
                build()?;
                spoil(&vars, bad)?;
                odeint(build()?, &y0, &times, &options)?;
            }
            1 => {
                let build = || Cnf::new(Mlp::new(&[3, 5, 3], activation, vb())?);
                build()?;
                spoil(&vars, bad)?;
                odeint(build()?, &(y0, ones(&[4, 1])?), &times, &options)?;
            }
            2 => {
                let build = || ConvField::new(&[3, 5, 3], 3, activation, vb());
                build()?;
                spoil(&vars, bad)?;
                odeint(build()?, &ones(&[2, 3, 4, 4])?, &times, &options)?;
            }
            _ => {
                let build = move |vb: VarBuilder<'_>| Mlp::new(&[3, 5, 3], activation, vb);
                let ode = NeuralOde::new(&vars, "", &Device::Cpu, build)?;
                spoil(
                    &vars,
                    if which == 3 {
                        |x, _| x.detach().to_dtype(DType::F64)
                    } else {
                        |x, _| x.detach().to_dtype(DType::U32)
                    },
                )?;
                ode.options(options).solve(&y0, &times)?;
            }
        }
        Ok(())
    })
}

pub(super) fn losses(rng: &mut StdRng) -> Attempt {
    let which = rng.random_range(0..9);
    attempt(
        format!("a loss of kind {which} of other states"),
        move || {
            let vars = VarMap::new();
            let ode = NeuralOde::new(&vars, "f", &Device::Cpu, mlp)?;
            let classes = |class: u32| Tensor::new(&[0, class], &Device::Cpu);
            let (output, loss) = match which {
                0 => (Output::All, RowLoss::GaussianNll),
                1 => (Output::All, RowLoss::CrossEntropy(classes(1)?)),
                2 => (Output::Final, RowLoss::CrossEntropy(classes(3)?)),
                3 => (Output::Final, RowLoss::CrossEntropy(classes(u32::MAX)?)),
                4 => (
                    Output::Final,
                    RowLoss::CrossEntropy(classes(1)?.to_dtype(DType::F32)?),
                ),
                5 => (
                    Output::Final,
                    RowLoss::CrossEntropy(Tensor::zeros(3, DType::U32, &Device::Cpu)?),
                ),
                6 => (Output::Final, RowLoss::MeanSquaredError(ones(&[2, 2, 3])?)),
                7 => (Output::All, RowLoss::MeanSquaredError(ones(&[2, 3])?)),
                _ => (
                    Output::Final,
                    RowLoss::MeanSquaredError((ones(&[2, 3])? * f64::NAN)?),
                ),
            };
            let options = OdeOptions {
                output,
                ..Default::default()
            };
            let loss = ode
                .options(options)
                .loss(&ones(&[2, 3])?, &[0.0, 0.5], &loss)?;
            loss.backward()?;
            Ok(())
        },
    )
}

pub(super) fn constructors(rng: &mut StdRng) -> Attempt {
    let which = rng.random_range(0..9);
    attempt(format!("a constructor with defect {which}"), move || {
        let vb = builder(&VarMap::new(), DType::F32);
        let tanh = Activation::Tanh;
        match which {
            0 => drop(Mlp::new(&[], tanh, vb)?),
            1 => drop(Mlp::new(&[3], tanh, vb)?),
            2 => drop(Mlp::new(&[3, 4], tanh, vb)?),
            3 => drop(ConvField::new(&[2, 2], 2, tanh, vb)?),
            4 => drop(ConvField::new(&[2], 3, tanh, vb)?),
            5 => drop(ConvField::new(&[2, 3], 3, tanh, vb)?),
            6 => drop(ConvField::with_group_norm(&[2, 3, 2], 3, 2, tanh, vb)?),
            7 => drop(ConvField::with_group_norm(&[2, 4, 2], 3, 0, tanh, vb)?),
            _ => drop(Cnf::new(mlp(vb)?.residual())?),
        }
        Ok(())
    })
}

/// Solutions that leave every range.
pub(super) fn explosions(rng: &mut StdRng) -> Attempt {
    let which = rng.random_range(0..5);
    let fusion = pick(rng, &[true, false]);
    let rows = rng.random_range(1..20);
    attempt(
        format!("an explosion of kind {which}, {rows} rows, fusion {fusion}"),
        move || {
            let mut options = OdeOptions {
                fusion,
                steps: Steps::PerInterval(40),
                ..Default::default()
            };
            let y0 = (ones(&[rows, 1])? * 3e38)?;
            let linear = |w: f32, b: f32| {
                let weight = Tensor::full(w, (1, 1), &Device::Cpu)?;
                let layer = Linear::new(weight, Some(Tensor::full(b, 1, &Device::Cpu)?));
                Mlp::from_layers(&[layer], Activation::Tanh, false)
            };
            match which {
                0 => drop(odeint(linear(5.0, 1.0)?, &y0, &[0.0, 1.0], &options)?),
                1 => drop(odeint(
                    linear(500.0, 1.0)?,
                    &ones(&[rows, 1])?,
                    &[0.0, 9.0],
                    &options,
                )?),
                2 => {
                    // In f16 velocities end at 65504.
                    options.precision = Some(Precision::f16());
                    odeint(
                        linear(3e4, 0.0)?,
                        &(ones(&[rows, 1])? * 3.0)?,
                        &[0.0, 1e-3],
                        &options,
                    )?;
                }
                3 => {
                    let square = |_: &Time, y: &Tensor| y.sqr();
                    odeint(square, &y0, &[0.0, 1.0], &options)?;
                }
                _ => {
                    let grid = TimeGrid::linspace(0.0, 1.0, 3)?;
                    odeint(
                        |_: &Time, y: &Tensor| y.exp()?.exp(),
                        &(ones(&[rows])? * 9.0)?,
                        &grid,
                        &options,
                    )?;
                }
            }
            Ok(())
        },
    )
}
