//! Stochastic differential equations on given increments, held against torchsde and numpy: states and gradients.

use candle_core::{Tensor, Var};
use candle_diffeq::options::{Checkpoint, Output};
use candle_diffeq::sde::{
    sdeint, Increments, SdeMethod, SdeOptions, EULER_HEUN, EULER_MARUYAMA, HEUN, MIDPOINT,
    MILSTEIN_FREE_ITO, MILSTEIN_FREE_STRATONOVICH, MILSTEIN_ITO, MILSTEIN_STRATONOVICH,
    REVERSIBLE_HEUN, SRA1, SRI2,
};
use candle_diffeq::Precision;

use crate::equations::{equation, Equation, Weights};
use crate::oracle::{Oracle, Result};
use crate::outcome::{error, parts, worse, Parts};

/// Schemes as the files call them; `srk` is one of two.
const SCHEMES: [(&str, SdeMethod); 11] = [
    ("euler", EULER_MARUYAMA),
    ("milstein_ito", MILSTEIN_ITO),
    ("milstein_strat", MILSTEIN_STRATONOVICH),
    ("milstein_free_ito", MILSTEIN_FREE_ITO),
    ("milstein_free_strat", MILSTEIN_FREE_STRATONOVICH),
    ("euler_heun", EULER_HEUN),
    ("heun", HEUN),
    ("midpoint", MIDPOINT),
    ("reversible_heun", REVERSIBLE_HEUN),
    ("srk", SRI2),
    ("srk", SRA1),
];

/// Steps of the run whose gradients a file has.
const STEPS: usize = 16;

/// The schemes of a file, with their names in it.
pub(crate) fn schemes(oracle: &Oracle) -> Vec<(&'static str, SdeMethod)> {
    let additive = oracle.problem().is_some_and(|p| p.ends_with("additive"));
    let fits = |(name, method): &(&str, SdeMethod)| {
        oracle.knows(name) && (*name != "srk" || (*method == SRA1) == additive)
    };
    SCHEMES.into_iter().filter(fits).collect()
}

/// The increments of a file over so many equal steps of [0, 1].
pub(crate) fn increments(oracle: &Oracle, steps: usize) -> Result<Increments> {
    let w = oracle.tensor("dW")?.clone();
    let finest = w.dim(0)?;
    let all = Increments::new(w).with_integrals(oracle.tensor("U")?.clone())?;
    Ok(all.coarsened(finest / steps, 1.0 / finest as f64)?)
}

/// The equation of a file for a method, over given weights.
pub(crate) fn of_file(oracle: &Oracle, method: SdeMethod, w: &Weights) -> Result<Equation> {
    let name = oracle.problem().unwrap_or_default();
    let channels = oracle.tensor("dW")?.dim(2)?;
    let sde = equation(name, channels, w, method.calculus());
    sde.ok_or_else(|| oracle.failed(format_args!("unknown problem `{name}`")))
}

/// The weights of a file as variables.
pub(crate) fn weights(oracle: &Oracle) -> Result<Vec<(String, Var)>> {
    let named = oracle.under("w.").into_iter();
    let vars = named.map(|(name, x)| Ok((name, Var::from_tensor(&x)?)));
    vars.collect()
}

pub(crate) fn as_weights(vars: &[(String, Var)]) -> Weights {
    let named = vars.iter();
    let named = named.map(|(name, var)| (name.clone(), var.as_tensor().clone()));
    named.collect()
}

/// Times between n equal steps of [0, 1].
pub(crate) fn grid(n: usize) -> Vec<f64> {
    (0..=n).map(|i| i as f64 / n as f64).collect()
}

/// Largest relative error of the states and of the gradients.
pub(crate) struct Errors {
    pub(crate) states: f64,
    pub(crate) gradients: f64,
}

/// Runs one scheme of a file under a plan, in a precision.
pub(crate) fn run(
    oracle: &Oracle,
    (name, method): (&str, SdeMethod),
    checkpoint: Checkpoint,
    precision: Precision,
) -> Result<Errors> {
    let options = SdeOptions {
        method,
        checkpoint,
        precision: Some(precision),
        ..Default::default()
    };
    let vars = weights(oracle)?;
    let y0 = Var::from_tensor(oracle.tensor("y0")?)?;
    let mut states = 0.0;
    for n in [8, 32, 64, 128] {
        let options = SdeOptions {
            output: Output::Final,
            ..options.clone()
        };
        let sde = of_file(oracle, method, &as_weights(&vars))?;
        let noise = increments(oracle, n)?.into();
        // Outputs at every step, of which the last is returned, so that steps are those of the file.
        let y = sdeint(sde, &y0.as_tensor().detach(), &grid(n), &noise, &options)?;
        states = worse(
            states,
            difference(&y, oracle.tensor(&format!("{name}/{n}/y1"))?)?,
        );
    }
    let given = increments(oracle, STEPS)?;
    let u = given.u().ok_or("no integrals")?;
    let (w, u) = (Var::from_tensor(given.w())?, Var::from_tensor(u)?);
    let noise = Increments::new(w.as_tensor().clone()).with_integrals(u.as_tensor().clone())?;
    let sde = of_file(oracle, method, &as_weights(&vars))?;
    let ys = sdeint(sde, y0.as_tensor(), &grid(STEPS), &noise.into(), &options)?;
    let exact = |what: &str| oracle.tensor(&format!("{name}/{what}"));
    states = worse(states, difference(&ys, exact("traj")?)?);
    let distance = (ys.get(STEPS)? - oracle.tensor("loss.target")?)?;
    let linear = (&ys * oracle.tensor("loss.v")?)?.sum_all()?;
    let loss = (linear + (distance.sqr()?.sum_all()? * 0.5)?)?;
    states = worse(states, difference(&loss.reshape(1)?, exact("loss")?)?);
    let grads = loss.backward()?;
    let of = |var: &Var| grads.get(var).ok_or("a gradient is missing");
    let mut gradients = worse(0.0, difference(of(&y0)?, exact("grad.y0")?)?);
    for (weight, var) in &vars {
        let exact = exact(&format!("grad.w.{weight}"))?;
        gradients = worse(gradients, difference(of(var)?, exact)?);
    }
    gradients = worse(gradients, difference(of(&w)?, exact("grad.dW")?)?);
    if name == "srk" {
        gradients = worse(gradients, difference(of(&u)?, exact("grad.U")?)?);
    }
    Ok(Errors { states, gradients })
}

/// Relative difference in the norm of the whole tensor.
fn difference(ours: &Tensor, exact: &Tensor) -> Result<f64> {
    let named = |x: &Tensor| -> Result<Parts> { parts(vec![(String::new(), x.clone())]) };
    Ok(error(&named(ours)?, &named(exact)?))
}
