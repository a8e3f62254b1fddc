//! Controlled differential equations along four control paths, held against independent solutions and gradients.

use candle_core::{Device, Tensor, Var};
use candle_diffeq::cde::{ControlPath, NeuralCde, Observations};
use candle_diffeq::nn::{Activation, CdeMlp};
use candle_diffeq::options::Steps;
use candle_diffeq::tableau::{Tableau, EULER, RK4};
use candle_diffeq::OdeOptions;
use candle_nn::VarMap;

use crate::oracle::{Named, Oracle, Result};
use crate::outcome::{error, parts, worse};

/// Paths by the names that files give them.
const PATHS: [&str; 4] = ["linear", "hermite", "natural", "rectilinear"];

/// The channel of time.
const TIME: usize = 0;

/// Methods by their names in files, and steps of an interval between knots.
const SCHEMES: [(&str, Tableau, usize); 3] =
    [("euler", EULER, 1), ("rk4", RK4, 1), ("exact", RK4, 64)];

/// Quantities that are compared: coefficients of the path, its values and slopes, and z, L and gradients of L with
/// respect to observations and weights.
pub(crate) const HEADS: [&str; 6] = ["path", "at", "traj", "loss", "grad_x", "grad_w"];

/// Relative errors of one scheme, under [`HEADS`].
pub(crate) struct Row {
    pub(crate) scheme: String,
    pub(crate) errors: [f64; 6],
}

/// Every scheme of a file.
pub(crate) fn rows(oracle: &Oracle) -> Result<Vec<Row>> {
    let mut rows = vec![];
    for path in PATHS {
        if oracle.tensor(&format!("{path}/a")).is_err() {
            continue;
        }
        let [coefficients, at] = path_errors(oracle, path)?;
        for (name, method, steps) in SCHEMES {
            if !oracle.knows(&format!("{path}/{name}")) {
                continue;
            }
            let [traj, loss, grad_x, grad_w] = solve_errors(oracle, path, name, method, steps)?;
            rows.push(Row {
                scheme: format!("{path} {name}"),
                errors: [coefficients, at, traj, loss, grad_x, grad_w],
            });
        }
    }
    if let Ok(increment) = oracle.tensor("log_signature.increment") {
        rows.push(Row {
            scheme: "log-signature".into(),
            errors: [
                log_signature_error(oracle, increment)?,
                0.0,
                0.0,
                0.0,
                0.0,
                0.0,
            ],
        });
    }
    match rows.is_empty() {
        true => Err(oracle.failed("no scheme of a controlled differential equation")),
        false => Ok(rows),
    }
}

/// The largest of all errors.
pub(crate) fn worst(rows: &[Row]) -> f64 {
    let all = rows.iter().flat_map(|row| row.errors);
    all.fold(0.0, worse)
}

fn observations(oracle: &Oracle, xs: &Tensor) -> Result<Observations> {
    let times = oracle.tensor("t")?.to_vec1::<f64>()?;
    Ok(Observations::at(&times, xs)?)
}

fn along(observations: &Observations, path: &str) -> Result<ControlPath> {
    Ok(match path {
        "linear" => observations.linear()?,
        "hermite" => observations.hermite()?,
        "natural" => observations.natural_cubic()?,
        "rectilinear" => observations.rectilinear(TIME)?,
        _ => return Err(format!("unknown path `{path}`").into()),
    })
}

/// Relative error of tensors, all together.
fn relative(ours: Vec<Tensor>, exact: Vec<Tensor>) -> Result<f64> {
    let named = |xs: Vec<Tensor>| -> Named {
        let numbered = xs.into_iter().enumerate();
        numbered.map(|(i, x)| (i.to_string(), x)).collect()
    };
    Ok(error(&parts(named(ours))?, &parts(named(exact))?))
}

/// Errors of the coefficients, with filled observations where some are missing, and of values and slopes.
fn path_errors(oracle: &Oracle, name: &str) -> Result<[f64; 2]> {
    let observations = observations(oracle, oracle.tensor("x")?)?;
    let path = along(&observations, name)?;
    let (mut ours, mut exact) = (vec![], vec![]);
    if let Ok(filled) = oracle.tensor("x_filled") {
        ours.push(observations.filled()?);
        exact.push(filled.clone());
    }
    if let Ok(knots) = oracle.tensor(&format!("{name}/t")) {
        ours.push(Tensor::new(path.knots(), &Device::Cpu)?);
        exact.push(knots.to_device(&Device::Cpu)?);
    }
    // (rows, degree + 1, channels) by interval, and by power (rows, intervals, channels).
    let pieces: Vec<_> = (0..).map_while(|i| path.coefficients(i)).collect();
    let pieces = Tensor::stack(&pieces, 1)?;
    for (power, letter) in ["a", "b", "c", "d"].into_iter().enumerate() {
        if let Ok(there) = oracle.tensor(&format!("{name}/{letter}")) {
            ours.push(pieces.narrow(2, power, 1)?.squeeze(2)?);
            exact.push(there.clone());
        }
    }
    let coefficients = relative(ours, exact)?;
    let at = oracle.tensor(&format!("{name}/at"))?.to_vec1::<f64>()?;
    let (mut values, mut slopes) = (vec![], vec![]);
    for t in at {
        values.push(path.evaluate(t)?);
        slopes.push(path.derivative(t)?);
    }
    let exact = |what: &str| oracle.tensor(&format!("{name}/{what}")).cloned();
    let ours = vec![Tensor::stack(&values, 1)?, Tensor::stack(&slopes, 1)?];
    let at = relative(ours, vec![exact("path")?, exact("derivative")?])?;
    Ok([coefficients, at])
}

/// Errors of the trajectory, of L, and of its gradients.
fn solve_errors(
    oracle: &Oracle,
    path: &str,
    scheme: &str,
    method: Tableau,
    steps: usize,
) -> Result<[f64; 4]> {
    let exact = |what: &str| oracle.tensor(&format!("{path}/{scheme}/{what}"));
    // Gradients are those of the observations after filling.
    let seen = oracle.tensor("x_filled").or(oracle.tensor("x"))?;
    let xs = Var::from_tensor(seen)?;
    let along_path = along(&observations(oracle, &xs)?, path)?;
    let (vars, cde) = model(oracle)?;
    let cde = cde.options(OdeOptions {
        method,
        steps: Steps::PerInterval(steps),
        ..Default::default()
    });
    let zs = cde.solve(&along_path, along_path.knots())?;
    let of_path = |what: &str| oracle.tensor(&format!("{path}/loss.{what}"));
    let last = zs.get(zs.dim(0)? - 1)?;
    let away = (last - of_path("target")?)?;
    let loss = ((&zs * of_path("v")?)?.sum_all()? + (away.sqr()?.sum_all()? * 0.5)?)?;
    let grads = loss.backward()?;
    let of = |var: &Var| match grads.get(var) {
        Some(grad) => Ok(grad.clone()),
        None => var.zeros_like(),
    };
    let prefix = format!("{path}/{scheme}/grad.w.");
    let (mut ours, mut theirs) = (vec![], vec![]);
    let data = vars.data().lock().map_err(|_| "a poisoned lock")?;
    for (name, grad) in oracle.under(&prefix) {
        let name = variable(&name);
        let var = data.get(&name).ok_or(format!("no variable `{name}`"))?;
        ours.push(of(var)?);
        theirs.push(grad);
    }
    let mut grad_w = 0.0;
    for (ours, theirs) in ours.into_iter().zip(theirs) {
        grad_w = worse(grad_w, relative(vec![ours], vec![theirs])?);
    }
    Ok([
        relative(vec![zs], vec![exact("traj")?.clone()])?,
        relative(vec![loss.reshape(1)?], vec![exact("loss")?.clone()])?,
        relative(vec![of(&xs)?], vec![exact("grad.x")?.clone()])?,
        grad_w,
    ])
}

/// The name of a weight among the variables of the model.
fn variable(name: &str) -> String {
    match name.starts_with("initial.") {
        true => name.to_owned(),
        false => format!("field.{name}"),
    }
}

/// The model of a file, with its weights.
fn model(oracle: &Oracle) -> Result<(VarMap, NeuralCde)> {
    let vars = VarMap::new();
    let first = oracle.tensor("w.initial.weight")?;
    let (hidden, channels) = first.dims2()?;
    let (dtype, device) = (first.dtype(), first.device().clone());
    let mut widths = vec![];
    for l in 1.. {
        let Ok(weight) = oracle.tensor(&format!("w.f{l}.weight")) else {
            break;
        };
        let (outputs, inputs) = weight.dims2()?;
        widths.push((inputs, outputs));
    }
    {
        let mut data = vars.data().lock().map_err(|_| "a poisoned lock")?;
        for (name, weight) in oracle.under("w.") {
            data.insert(variable(&name), Var::from_tensor(&weight)?);
        }
    }
    let activation = activation(oracle)?;
    let cde = NeuralCde::new(
        &vars,
        "",
        dtype,
        &device,
        move |vb| candle_nn::linear(channels, hidden, vb),
        move |vb| {
            let layers = widths.iter().enumerate();
            let layer = |(l, &(inputs, outputs)): (usize, &(usize, usize))| {
                candle_nn::linear(inputs, outputs, vb.pp(format!("f{}", l + 1)))
            };
            let layers = layers.map(layer).collect::<candle_core::Result<Vec<_>>>()?;
            CdeMlp::from_layers(&layers, channels, activation)
        },
    )?;
    Ok((vars, cde))
}

/// The activation of hidden layers, the first word that a file says about it.
fn activation(oracle: &Oracle) -> Result<Activation> {
    let said = oracle.said("activation").unwrap_or_default();
    let name = said.split(',').next().unwrap_or_default().trim();
    Ok(match name {
        "tanh" => Activation::Tanh,
        "relu" => Activation::Relu,
        "softplus" => Activation::Softplus,
        "silu" => Activation::Silu,
        _ => return Err(oracle.failed(format_args!("unknown activation `{said}`"))),
    })
}

/// Error of increments and areas of the whole path.
fn log_signature_error(oracle: &Oracle, increment: &Tensor) -> Result<f64> {
    let seen = oracle.tensor("x_filled").or(oracle.tensor("x"))?;
    let observations = observations(oracle, seen)?;
    let path = observations.log_signature(observations.times().len() - 1)?;
    let [start, end] = path.ends();
    let rise = (path.evaluate(end)? - path.evaluate(start)?)?;
    let area = oracle.tensor("log_signature.area")?;
    let channels = increment.dim(1)?;
    let mut exact = vec![increment.clone()];
    for i in 0..channels {
        let above = area.narrow(1, i, 1)?.squeeze(1)?;
        exact.push(above.narrow(1, i + 1, channels - i - 1)?);
    }
    relative(vec![rise], vec![Tensor::cat(&exact, 1)?])
}
