//! The stochastic differential equations of the files in `--sde`.

use std::collections::BTreeMap;

use candle_core::{Error, Tensor, D};
use candle_diffeq::sde::{ito, stratonovich, Calculus, Sde};
use candle_diffeq::Time;

/// Weights by name.
pub(crate) type Weights = BTreeMap<String, Tensor>;

/// A part of an equation.
pub(crate) type Part = Box<dyn Fn(&Time, &Tensor) -> candle_core::Result<Tensor> + Send + Sync>;

/// An equation of such parts.
pub(crate) type Equation = Sde<Part, Part, Part>;

/// A weight, which the file must have.
fn of<'a>(weights: &'a Weights, name: &str) -> candle_core::Result<&'a Tensor> {
    let missing = || Error::CannotFindTensor {
        path: name.to_owned(),
    };
    weights.get(name).ok_or_else(missing)
}

/// M y of every row y.
fn times(y: &Tensor, m: &Tensor) -> candle_core::Result<Tensor> {
    y.matmul(&m.t()?)
}

/// A layer with bias.
fn layer(w: &Weights, name: &str, x: &Tensor) -> candle_core::Result<Tensor> {
    times(x, of(w, &format!("{name}.weight"))?)?.broadcast_add(of(w, &format!("{name}.bias"))?)
}

/// Two layers with tanh between them, of state and time.
fn network(w: &Weights, names: [&str; 2], t: &Time, y: &Tensor) -> candle_core::Result<Tensor> {
    let t = t
        .tensor()?
        .to_dtype(y.dtype())?
        .broadcast_as((y.dim(0)?, 1))?;
    let x = Tensor::cat(&[y, &t], 1)?;
    layer(w, names[1], &layer(w, names[0], &x)?.tanh()?)
}

/// The small networks of every component: their tanh, of shape (rows, d, hidden), and g.
fn by_component(w: &Weights, y: &Tensor) -> candle_core::Result<(Tensor, Tensor)> {
    let x = y.unsqueeze(D::Minus1)?.broadcast_mul(of(w, "g1.weight")?)?;
    let hidden = x.broadcast_add(of(w, "g1.bias")?)?.tanh()?;
    let sum = hidden.broadcast_mul(of(w, "g2.weight")?)?.sum(D::Minus1)?;
    let sum = sum.broadcast_add(of(w, "g2.bias")?)?;
    Ok((hidden, ((sum.neg()?.exp()? + 1.0)?).recip()?))
}

fn oscillating(w: &Weights, t: &Time, y: &Tensor) -> candle_core::Result<Tensor> {
    let x = times(y, of(w, "b")?)?.broadcast_add(of(w, "c")?)?;
    x.broadcast_add(&t.tensor()?.to_dtype(y.dtype())?)
}

/// Drift, diffusion and, where the noise is diagonal or scalar, g ∂g/∂y.
pub(crate) fn parts(problem: &str, w: &Weights) -> Option<(Part, Part, Option<Part>)> {
    let [f, g, m] = [w, w, w].map(Clone::clone);
    Some(match problem {
        "gbm" => (
            Box::new(move |_, y| y.broadcast_mul(of(&f, "a")?)),
            Box::new(move |_, y| y.broadcast_mul(of(&g, "b")?)),
            Some(Box::new(move |_, y| y.broadcast_mul(&of(&m, "b")?.sqr()?))),
        ),
        "ou_additive" => (
            Box::new(move |_, y| {
                let distance = y.neg()?.broadcast_add(of(&f, "mu")?)?;
                distance.broadcast_mul(of(&f, "theta")?)
            }),
            Box::new(move |t, y| {
                let swing = ((t.tensor()? * 2.0)?.sin()? * 0.5)?;
                let swing = (swing + 1.0)?.to_dtype(y.dtype())?;
                let sigma = of(&g, "sigma")?.broadcast_mul(&swing)?;
                sigma.broadcast_as([&[y.dim(0)?], sigma.dims()].concat())
            }),
            None,
        ),
        "linear_noncommutative" => (
            Box::new(move |_, y| times(y, of(&f, "A")?)),
            Box::new(move |_, y| {
                let b = of(&g, "B")?;
                let columns = (0..b.dim(0)?).map(|k| times(y, &b.get(k)?));
                let columns = columns.collect::<candle_core::Result<Vec<_>>>()?;
                Tensor::stack(&columns, D::Minus1)
            }),
            None,
        ),
        "scalar_noise" => (
            Box::new(move |_, y| times(y, of(&f, "a")?)?.tanh()? - (y * 0.5)?),
            Box::new(move |t, y| oscillating(&g, t, y)?.sin()),
            Some(Box::new(move |t, y| {
                let x = oscillating(&m, t, y)?;
                x.cos()? * times(&x.sin()?, of(&m, "b")?)?
            })),
        ),
        "neural_diagonal" => (
            Box::new(move |t, y| network(&f, ["f1", "f2"], t, y)),
            Box::new(move |_, y| Ok(by_component(&g, y)?.1)),
            Some(Box::new(move |_, y| {
                let (hidden, g) = by_component(&m, y)?;
                let inner = (hidden.sqr()?.neg()? + 1.0)?;
                let weights = (of(&m, "g1.weight")? * of(&m, "g2.weight")?)?;
                let slope = inner.broadcast_mul(&weights)?.sum(D::Minus1)?;
                // σ' = σ (1 − σ), and once more g.
                (g.sqr()? * (g.neg()? + 1.0)?)? * slope
            })),
        ),
        "neural_general" => (
            Box::new(move |t, y| network(&f, ["f1", "f2"], t, y)),
            Box::new(move |t, y| {
                let g = (network(&g, ["g1", "g2"], t, y)?.tanh()? * 0.5)?;
                let (rows, d) = y.dims2()?;
                let channels = g.dim(1)? / d;
                g.reshape((rows, d, channels))
            }),
            None,
        ),
        _ => return None,
    })
}

/// The equation of a problem with so many channels of noise, in the sense of a calculus, if there is one of this name.
pub(crate) fn equation(
    problem: &str,
    channels: usize,
    w: &Weights,
    calculus: Calculus,
) -> Option<Equation> {
    let problem = problem.trim_start_matches(|c: char| c.is_ascii_digit() || c == '_');
    let (drift, diffusion, term) = parts(problem, w)?;
    let plain = match calculus {
        Calculus::Ito => ito(drift, diffusion),
        Calculus::Stratonovich => stratonovich(drift, diffusion),
    };
    // Without a formula the term is not to be evaluated, and no method that is run here does.
    let missing: Part = Box::new(|_, _| candle_core::bail!("the problem has no Milstein term"));
    let sde = plain.milstein_term(term.unwrap_or(missing));
    Some(match problem {
        "ou_additive" => sde.general(channels).additive(),
        "linear_noncommutative" | "neural_general" => sde.general(channels),
        "scalar_noise" => sde.scalar(),
        _ => sde,
    })
}
