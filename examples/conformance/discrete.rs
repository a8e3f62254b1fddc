//! One problem under one fixed-step method: solved and differentiated through `loss.backward()`.
//!
//! L = Σ_j (Σ_i ⟨v_j[i], y_j(t_i)⟩ + ½|y_j(t_N) − target_j|²) over the tensors j of the state.

use std::collections::BTreeMap;
use std::sync::PoisonError;

use candle_core::{DType, Tensor, Var};
use candle_diffeq::tableau::{Tableau, EULER, HEUN, MIDPOINT, RK4, RK4_38};
use candle_diffeq::{NeuralOde, OdeOptions, Precision};
use candle_nn::{VarBuilder, VarMap};

use crate::fields::{self, Field, Weights};
use crate::oracle::{Named, Oracle, Result};
use crate::outcome::{parts, Outcome};

/// The methods of the oracles, under their names there.
pub(crate) const METHODS: [Tableau; 5] = [EULER, MIDPOINT, HEUN, RK4, RK4_38];

/// The files that tell what a known problem gives; the others, with the reason.
///
/// # Errors
/// An unknown problem; nothing left to check.
pub(crate) fn usable(oracles: Vec<Oracle>) -> Result<(Vec<Oracle>, Vec<String>)> {
    let (mut usable, mut skipped) = (vec![], vec![]);
    for oracle in oracles {
        match oracle.problem() {
            None => skipped.push(format!("{}: names no problem", oracle.file)),
            Some(name) if fields::by_name(name).is_none() => {
                return Err(oracle.failed(format_args!("unknown problem `{name}`")));
            }
            Some(_) if METHODS.iter().any(|m| oracle.knows(m.name())) => usable.push(oracle),
            Some(_) => skipped.push(format!("{}: no method's values", oracle.file)),
        }
    }
    if usable.is_empty() {
        return Err(format!("nothing to check; skipped {}", skipped.join(", ")).into());
    }
    Ok((usable, skipped))
}

/// What the file says that the method gives.
pub(crate) fn exact(oracle: &Oracle, method: &Tableau) -> Result<Outcome> {
    let of = |name: &str| format!("{}/{name}", method.name());
    let trajectory = oracle.parts(&of("traj"))?;
    let one = |name: &str| -> Result<Named> {
        Ok(vec![(name.to_owned(), oracle.tensor(&of(name))?.clone())])
    };
    let mut weights = vec![];
    for (name, _) in oracle.under("w.") {
        let grad = oracle.tensor(&of(&format!("grad.w.{name}")))?;
        weights.push((name, grad.clone()));
    }
    outcome(
        trajectory,
        one("loss")?,
        oracle.parts(&of("grad.y0"))?,
        weights,
        one("grad.t")?,
    )
}

/// What we get, from inputs rounded to state precision.
pub(crate) fn solved(oracle: &Oracle, method: &Tableau, precision: Precision) -> Result<Outcome> {
    let dtype = precision.state;
    let build = oracle.problem().and_then(fields::by_name);
    let build = build.ok_or_else(|| oracle.failed("unknown problem"))?;
    let (ode, vars) = model(oracle, dtype, build)?;
    let ode = ode.options(OdeOptions {
        method: method.clone(),
        precision: Some(precision),
        ..Default::default()
    });
    let y0 = leaves(oracle.parts("y0")?, dtype)?;
    let times = Var::from_tensor(&oracle.tensor("t")?.to_dtype(dtype)?)?;

    let state = y0.iter().map(|(_, y)| y.as_tensor().clone()).collect();
    let trajectory: Vec<Tensor> = ode.solve(&state, &times)?;
    let loss = loss(oracle, &trajectory)?;
    let grads = loss.backward()?;

    let grad = |(name, var): (String, Var)| match grads.get(&var) {
        Some(grad) => Ok((name, grad.clone())),
        None => Ok((name, var.zeros_like()?)), // f does not depend on it
    };
    let gradients =
        |vars: Vec<(String, Var)>| vars.into_iter().map(grad).collect::<Result<Named>>();
    outcome(
        trajectory
            .into_iter()
            .map(|y| ("traj".to_owned(), y))
            .collect(),
        vec![("loss".to_owned(), loss)],
        gradients(y0)?,
        gradients(named(&vars))?,
        gradients(vec![("t".to_owned(), times)])?,
    )
}

pub(crate) fn outcome(
    trajectory: Named,
    loss: Named,
    y0: Named,
    weights: Named,
    times: Named,
) -> Result<Outcome> {
    let last = |(name, y): &(String, Tensor)| Ok((name.clone(), y.get(y.dim(0)? - 1)?));
    let last = trajectory.iter().map(last).collect::<Result<Named>>()?;
    Ok(Outcome([
        parts(trajectory)?,
        parts(last)?,
        parts(loss)?,
        parts(y0)?,
        parts(weights)?,
        parts(times)?,
    ]))
}

pub(crate) fn loss(oracle: &Oracle, trajectory: &[Tensor]) -> Result<Tensor> {
    let (cotangents, targets) = (oracle.parts("loss.v")?, oracle.parts("loss.target")?);
    let mut terms = vec![];
    for ((y, (_, v)), (_, target)) in trajectory.iter().zip(cotangents).zip(targets) {
        let distance = (y.get(y.dim(0)? - 1)? - target.to_dtype(y.dtype())?)?;
        terms.push((y * v.to_dtype(y.dtype())?)?.sum_all()?);
        terms.push((distance.sqr()?.sum_all()? * 0.5)?);
    }
    Ok(Tensor::stack(&terms, 0)?.sum_all()?)
}

/// The file's weights as variables, and a field over them.
pub(crate) fn model<B>(
    oracle: &Oracle,
    dtype: DType,
    build: B,
) -> Result<(NeuralOde<Vec<Tensor>>, VarMap)>
where
    B: Fn(&Weights<'_>) -> candle_core::Result<Field> + Send + Sync + 'static,
{
    let weights = leaves(oracle.under("w."), dtype)?;
    let shape = |(name, w): &(String, Var)| (name.clone(), w.shape().clone());
    let shapes: BTreeMap<_, _> = weights.iter().map(shape).collect();
    let vars = VarMap::new();
    vars.data()
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .extend(weights);
    let build = move |vb: VarBuilder<'_>| {
        build(&Weights {
            vb,
            shapes: &shapes,
        })
    };
    Ok((
        NeuralOde::from_field(&vars, "", dtype, &oracle.device(), build)?,
        vars,
    ))
}

pub(crate) fn leaves(named: Named, dtype: DType) -> Result<Vec<(String, Var)>> {
    let leaf = |(name, x): (String, Tensor)| Ok((name, Var::from_tensor(&x.to_dtype(dtype)?)?));
    named.into_iter().map(leaf).collect()
}

/// The variables of a map, by name.
pub(crate) fn named(vars: &VarMap) -> Vec<(String, Var)> {
    let data = vars.data().lock().unwrap_or_else(PoisonError::into_inner);
    let mut named: Vec<_> = data
        .iter()
        .map(|(name, var)| (name.clone(), var.clone()))
        .collect();
    named.sort_by(|a, b| a.0.cmp(&b.0));
    named
}
