//! The files of the model zoo: potentials with their second derivatives, and fields that are made of them.
//!
//! A file that no part of the library answers yet is named and counts as failed.

mod models;
mod potentials;
mod symplectic;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::PoisonError;

use candle_core::{DType, Device, Tensor, Var};
use candle_diffeq::nn::Activation;
use candle_diffeq::tableau::Tableau;
use candle_diffeq::{NeuralOde, OdeOptions, Precision, VectorField};
use candle_nn::{VarBuilder, VarMap};

use crate::discrete::{exact, leaves, loss, named, outcome, METHODS};
use crate::fields::Weights;
use crate::oracle::{Named, Oracle, Result};
use crate::outcome::Outcome;

/// Largest relative error of a quantity.
pub(crate) const BAR: f64 = 1e-10;

/// What a file came to: a line for each method or kind of derivative, with its largest error and what has it.
pub(crate) enum Answer {
    Lines(Vec<(String, f64, String)>),
    /// Why there is none.
    None(String),
}

/// All files of a directory, by name.
pub(crate) fn files(dir: &Path, device: &Device) -> Result<Vec<Oracle>> {
    let all = Oracle::read_all(dir)?.into_iter();
    all.map(|oracle| oracle.on(device)).collect()
}

/// Holds the library against a file.
pub(crate) fn answer(oracle: &Oracle) -> Result<Answer> {
    let Some(problem) = oracle.problem() else {
        return Ok(Answer::None("names no problem".into()));
    };
    if problem.starts_with("potential_") {
        let lines = potentials::lines(oracle, activation(oracle)?);
        return lines.map(Answer::Lines);
    }
    models::answer(oracle, problem)
}

/// The file's activation.
fn activation(oracle: &Oracle) -> Result<Activation> {
    let name = oracle.activation().unwrap_or_default();
    // As `log_two_cosh` is `LogTwoCosh`.
    let plain = name.replace('_', "");
    let known = Activation::ALL.into_iter();
    let mut known = known.filter(|a| format!("{a:?}").to_lowercase() == plain);
    let unknown = || oracle.failed(format_args!("unknown activation `{name}`"));
    known.next().ok_or_else(unknown)
}

/// A field under every method that the file knows.
fn field<F, B>(oracle: &Oracle, build: B) -> Result<Answer>
where
    F: VectorField<Tensor> + 'static,
    B: Fn(&Weights<'_>) -> candle_core::Result<F> + Clone + Send + Sync + 'static,
{
    let mut lines = vec![];
    for method in METHODS.iter().filter(|m| oracle.knows(m.name())) {
        let got = solved(oracle, method, build.clone()).map_err(|e| oracle.failed(e))?;
        let parts = got.worst_parts(&exact(oracle, method)?);
        let names = crate::outcome::QUANTITIES;
        let worst = parts.into_iter().zip(names);
        let worst = worst.max_by(|(a, _), (b, _)| a.0.total_cmp(&b.0));
        let ((error, part), quantity) = worst.ok_or("no quantity")?;
        let part = format!("{quantity} {part}");
        lines.push((method.name().to_owned(), error, part));
    }
    if lines.is_empty() {
        return Ok(Answer::None("no method's values".into()));
    }
    Ok(Answer::Lines(lines))
}

/// What we get in f64.
fn solved<F, B>(oracle: &Oracle, method: &Tableau, build: B) -> Result<Outcome>
where
    F: VectorField<Tensor> + 'static,
    B: Fn(&Weights<'_>) -> candle_core::Result<F> + Send + Sync + 'static,
{
    let (ode, vars) = model(oracle, build)?;
    let ode = ode.options(OdeOptions {
        method: method.clone(),
        precision: Some(Precision::f64()),
        ..Default::default()
    });
    let y0 = Var::from_tensor(oracle.tensor("y0")?)?;
    let times = Var::from_tensor(oracle.tensor("t")?)?;
    let trajectory = ode.solve(y0.as_tensor(), &times)?;
    let loss = loss(oracle, std::slice::from_ref(&trajectory))?;
    let grads = loss.backward()?;
    let grad = |(name, var): (String, Var)| match grads.get(&var) {
        Some(grad) => Ok((name, grad.clone())),
        // f does not depend on it.
        None => Ok((name, var.zeros_like()?)),
    };
    let gradients =
        |vars: Vec<(String, Var)>| vars.into_iter().map(grad).collect::<Result<Named>>();
    outcome(
        vec![("traj".to_owned(), trajectory)],
        vec![("loss".to_owned(), loss)],
        gradients(vec![("y0".to_owned(), y0)])?,
        gradients(named(&vars))?,
        gradients(vec![("t".to_owned(), times)])?,
    )
}

/// The file's weights as variables, and a field over them.
fn model<F, B>(oracle: &Oracle, build: B) -> Result<(NeuralOde, VarMap)>
where
    F: VectorField<Tensor> + 'static,
    B: Fn(&Weights<'_>) -> candle_core::Result<F> + Send + Sync + 'static,
{
    let weights = leaves(oracle.under("w."), DType::F64)?;
    let shape = |(name, w): &(String, Var)| (name.clone(), w.shape().clone());
    let shapes: BTreeMap<_, _> = weights.iter().map(shape).collect();
    let vars = VarMap::new();
    let data = vars.data().lock();
    data.unwrap_or_else(PoisonError::into_inner).extend(weights);
    let build = move |vb: VarBuilder<'_>| {
        build(&Weights {
            vb,
            shapes: &shapes,
        })
    };
    let ode = NeuralOde::from_field(&vars, "", DType::F64, &oracle.device(), build)?;
    Ok((ode, vars))
}
