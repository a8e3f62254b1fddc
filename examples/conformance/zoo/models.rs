//! The fields of the zoo, made of the library's own parts over the weights of a file.

use candle_core::{Module, Result, Tensor};
use candle_diffeq::nn::energy::{
    Energy, GradientFlow, Hamiltonian, Lagrangian, PortHamiltonian, Skew,
};
use candle_diffeq::nn::graph::{Csr, Gcn};
use candle_diffeq::nn::{
    Activation, Basis, EnergyMlp, Galerkin, GalerkinLinear, GruField, Linear, Perceptron,
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
        "gru_ode" => field(oracle, |w| {
            GruField::of([linear(w, "r")?, linear(w, "z")?, linear(w, "g")?])
        }),
        "graph_field" => {
            let sigma = activation(oracle)?;
            field(oracle, move |w| graph(w, sigma))
        }
        other => Ok(Answer::None(format!("unknown problem `{other}`"))),
    }
}

/// The layer `<name>` of a file.
fn linear(w: &Weights<'_>, name: &str) -> Result<Linear> {
    let of = |part: &str| w.get(&format!("{name}.{part}"));
    let layer = candle_nn::Linear::new(of("weight")?, Some(of("bias")?));
    Ok(Linear::from(layer))
}

/// y' = σ(A σ(A y W₁ᵀ + b₁) W₂ᵀ + b₂), every number of A an entry.
fn graph(w: &Weights<'_>, sigma: Activation) -> Result<impl Fn(&Time, &Tensor) -> Result<Tensor>> {
    let a = Csr::from_dense(&w.get("adjacency")?)?;
    let layer = |name: &str| {
        let of = |part: &str| w.get(&format!("{name}.{part}"));
        Gcn::from_tensors(&a, of("weight")?, of("bias")?)
    };
    let layers = [layer("c1")?, layer("c2")?];
    Ok(move |_: &Time, y: &Tensor| {
        let mut y = y.clone();
        for layer in &layers {
            y = sigma.forward(&layer.forward(&y)?)?;
        }
        Ok(y)
    })
}

/// The layers `<name>1`, `<name>2`, … of a file.
fn net(w: &Weights<'_>, name: &str, sigma: Activation) -> Result<Perceptron> {
    let mut layers = vec![];
    for i in 1.. {
        let of = |part: &str| format!("{name}{i}.{part}");
        if !w.shapes.contains_key(&of("weight")) {
            break;
        }
        layers.push(linear(w, &format!("{name}{i}"))?);
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
