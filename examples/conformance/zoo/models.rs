//! The fields of the zoo, made of the library's own parts over the weights of a file.

use candle_core::{Module, Result, Tensor};
use candle_diffeq::nn::energy::{
    Energy, GradientFlow, Hamiltonian, Lagrangian, PortHamiltonian, Skew,
};
use candle_diffeq::nn::{
    Activation, Basis, EnergyMlp, Galerkin, GalerkinLinear, Linear, Perceptron,
};
use candle_diffeq::Time;

use super::symplectic::Symplectic;
use super::{activation, field, Answer};
use crate::fields::Weights;
use crate::oracle::{self, Oracle};

/// Holds the model of this name against the file.
pub(super) fn answer(oracle: &Oracle, problem: &str) -> oracle::Result<Answer> {
    let energy = |name: &'static str, energy: Energy| {
        let sigma = activation(oracle)?;
        Ok::<_, oracle::Error>(move |w: &Weights<'_>| EnergyMlp::of(net(w, name, sigma)?, energy))
    };
    match problem {
        "hnn" | "hnn_squares" => {
            let made_of = match problem {
                "hnn" => Energy::Output,
                _ => Energy::SumOfSquares,
            };
            let h = energy("H", made_of)?;
            field(oracle, move |w| h(w).map(Hamiltonian::new))
        }
        "dissipative_hnn" => {
            let h = energy("H", Energy::Output)?;
            field(oracle, move |w| {
                PortHamiltonian::new(h(w)?, w.get("log_r")?)
            })
        }
        "gradient_flow" => {
            let e = energy("E", Energy::Output)?;
            field(oracle, move |w| e(w).map(GradientFlow::new))
        }
        "conservative_flow" => {
            let (e, sigma) = (energy("E", Energy::Output)?, activation(oracle)?);
            field(oracle, move |w| Skew::new(e(w)?, net(w, "M", sigma)?))
        }
        name if name.starts_with("lnn_") => {
            let l = energy("L", Energy::Output)?;
            // |v|² is ½ m |v|² with m = 2.
            field(oracle, move |w| Ok(Lagrangian::with_mass(l(w)?, 2.0)))
        }
        name if name.starts_with("galerkin_") => {
            let (name, sigma) = (name.to_owned(), activation(oracle)?);
            field(oracle, move |w| galerkin(w, &name, sigma))
        }
        "symplectic_ode_net" => {
            let sigma = activation(oracle)?;
            field(oracle, move |w| {
                let nets = ["M", "V", "g"].map(|name| net(w, name, sigma));
                let [m, v, g] = nets;
                Ok(Symplectic::new([m?, v?, g?]).field())
            })
        }
        "gru_ode" => none("the GRU-ODE cell"),
        "graph_field" => none("graph layers"),
        other => Ok(Answer::None(format!("unknown problem `{other}`"))),
    }
}

fn none(what: &str) -> oracle::Result<Answer> {
    Ok(Answer::None(format!(
        "not answered yet: the library has no {}",
        what.trim_start_matches("the ")
    )))
}

/// The layers `<name>1`, `<name>2`, … of a file.
fn net(w: &Weights<'_>, name: &str, sigma: Activation) -> Result<Perceptron> {
    let mut layers = vec![];
    for i in 1.. {
        let of = |part: &str| format!("{name}{i}.{part}");
        if !w.shapes.contains_key(&of("weight")) {
            break;
        }
        let (weight, bias) = (w.get(&of("weight"))?, w.get(&of("bias"))?);
        layers.push(Linear::from(candle_nn::Linear::new(weight, Some(bias))));
    }
    Perceptron::from_layers(layers, sigma)
}

/// y' = out(σ(y W(t)ᵀ + b(t))).
fn galerkin(
    w: &Weights<'_>,
    problem: &str,
    sigma: Activation,
) -> Result<impl Fn(&Time, &Tensor) -> Result<Tensor>> {
    let coeffs = w.get("coeffs")?;
    let terms = coeffs.dim(0)?;
    let basis = match problem {
        "galerkin_fourier" => Basis::fourier(terms / 2),
        "galerkin_polynomial" => Basis::Polynomial { terms },
        "galerkin_chebyshev" => Basis::Chebyshev { terms },
        "galerkin_gaussian" => Basis::Gaussian { terms },
        "galerkin_multiquadric" => Basis::Multiquadric { terms },
        _ => candle_core::bail!("unknown basis of `{problem}`"),
    };
    let radial = match w.shapes.contains_key("centres") {
        true => Some([w.get("centres")?, w.get("widths")?]),
        false => None,
    };
    let (weight, bias) = (w.get("out.weight")?, w.get("out.bias")?);
    let (outputs, width) = weight.dims2()?;
    let of_time = [w.get("dilation")?, w.get("shift")?];
    let weights = Galerkin::from_tensors(basis, coeffs, of_time, radial)?;
    let first = GalerkinLinear::of(weights, outputs, width)?;
    let last = Linear::from(candle_nn::Linear::new(weight, Some(bias)));
    Ok(move |t: &Time, y: &Tensor| last.forward(&sigma.forward(&first.forward(t, y)?)?))
}
