//! Fields of torchdyn's models: a Hamiltonian network, a perceptron whose first layer depends on time, and two convolutions
//! over a graph; and flows: of weights that depend on time, of an estimated trace, and of a potential.

use candle_core::{Module, Result, Tensor};
use candle_diffeq::nn::energy::{Energy, Hamiltonian};
use candle_diffeq::nn::graph::{Gcn, GcnField};
use candle_diffeq::nn::{
    Basis, EnergyMlp, Galerkin, GalerkinLinear, Hutchinson, HyperCnf, Linear, OtFlow, Perceptron,
};
use candle_diffeq::{OdeOptions, Time};
use candle_nn::VarBuilder;

use crate::fields::{layers, perceptron, undriven, Ask, Drive, Field, Ode, Parts, Place};
use crate::workload::variable;

/// J ∇H of a perceptron H, whose last layer has no bias.
pub(crate) fn hnn(place: &Place<'_>, ask: Ask, options: OdeOptions) -> candle_diffeq::Result<Ode> {
    let activation = place.activation;
    let field = move |vb: VarBuilder<'_>| {
        let weights = ask(vb)?;
        let layer = |l: &[Tensor]| linear(&l[0], l.get(1));
        let layers = weights.chunks(2).map(layer).collect();
        let net = Perceptron::from_layers(layers, activation)?;
        Ok(Hamiltonian::new(EnergyMlp::of(net, Energy::Output)?))
    };
    Ok(Ode::One(place.ode(field, options)?))
}

/// Weights: coefficients, dilation and shift of the first layer, weight and bias of the last one.
pub(crate) fn galerkin(
    place: &Place<'_>,
    ask: Ask,
    options: OdeOptions,
) -> candle_diffeq::Result<Ode> {
    let (activation, features) = (place.activation, place.features);
    let field = move |vb: VarBuilder<'_>| {
        let weights = ask(vb)?;
        let [coeffs, dilation, shift, weight, bias] = weights.as_slice() else {
            candle_core::bail!("two layers of five weights, not of {}", weights.len())
        };
        // torchdyn's orders, which are not whole numbers.
        let terms = coeffs.dim(0)? / 2;
        let order = |i: usize| (i * terms) as f64 / terms.saturating_sub(1).max(1) as f64;
        let basis = Basis::Fourier {
            orders: (0..terms).map(order).collect(),
        };
        let of_time = [dilation.clone(), shift.clone()];
        let numbers = Galerkin::from_tensors(basis, coeffs.clone(), of_time, None)?;
        let first = GalerkinLinear::of(numbers, features, weight.dim(1)?)?;
        let last = linear(weight, Some(bias));
        Ok(move |t: &Time, y: &Tensor| last.forward(&activation.forward(&first.forward(t, y)?)?))
    };
    Ok(Ode::One(place.ode(field, options)?))
}

/// Two convolutions with an activation between them.
pub(crate) fn graph(
    place: &Place<'_>,
    ask: Ask,
    options: OdeOptions,
) -> candle_diffeq::Result<Ode> {
    let Drive::Graph(graph) = place.drive.clone() else {
        return Err(undriven());
    };
    let activation = place.activation;
    let field = move |vb: VarBuilder<'_>| {
        let weights = ask(vb)?;
        let [w0, b0, w1, b1] = weights.as_slice() else {
            candle_core::bail!("two layers of four weights, not of {}", weights.len())
        };
        let first = Gcn::from_tensors(&graph, w0.clone(), b0.clone())?;
        let last = Gcn::from_tensors(&graph, w1.clone(), b1.clone())?;
        GcnField::from_layers(vec![first, last], activation)
    };
    Ok(Ode::One(place.ode(field, options)?))
}

/// Weights: those of the network of time.
pub(crate) fn hyper(
    place: &Place<'_>,
    ask: Ask,
    options: OdeOptions,
) -> candle_diffeq::Result<Ode> {
    let layers = layers(ask(place.builder())?)?;
    let (hidden, numbers) = (layers[0].0.dim(0)?, layers[layers.len() - 1].0.dim(0)?);
    let (features, width) = (place.features, numbers / (3 * place.features + 1));
    let field = move |vb: VarBuilder<'_>| HyperCnf::new(features, width, hidden, vb);
    Ok(Ode::Two(place.ode(field, options)?))
}

/// Weights: those of a perceptron.
pub(crate) fn hutchinson(
    place: &Place<'_>,
    ask: Ask,
    options: OdeOptions,
) -> candle_diffeq::Result<Ode> {
    let activation = place.activation;
    let field = move |vb: VarBuilder<'_>| Ok(Hutchinson::new(perceptron(ask(vb)?, activation)?));
    Ok(Ode::Three(place.ode(field, options)?))
}

/// Weights: those of two layers with their biases, w, A and c.
pub(crate) fn ot_flow(
    place: &Place<'_>,
    ask: Ask,
    options: OdeOptions,
) -> candle_diffeq::Result<Ode> {
    let weights = ask(place.builder())?;
    let [_, _, inner, _, _, a, _] = weights.as_slice() else {
        return Err(candle_core::Error::msg("a potential of other than seven weights").into());
    };
    let (features, width, rank) = (place.features, inner.dim(0)?, a.dim(0)?);
    let field = move |vb: VarBuilder<'_>| {
        // Its names, in the order of the file.
        const NAMES: [&str; 7] = [
            "open.weight",
            "open.bias",
            "inner.weight",
            "inner.bias",
            "w",
            "A",
            "c",
        ];
        let in_file = |name: &str| {
            let i = NAMES.iter().position(|known| *known == name);
            i.map_or_else(|| name.to_owned(), variable)
        };
        OtFlow::new(features, width, rank, vb.rename_f(in_file))
    };
    Ok(Ode::Two(place.ode(field, options)?))
}

/// Of kinds that have no field of time and state alone, or none without the library's layers.
pub(crate) fn no_plain(_: Vec<Tensor>, _: Parts) -> Result<Field> {
    candle_core::bail!("an equation of this kind is solved with the library's own fields only")
}

fn linear(weight: &Tensor, bias: Option<&Tensor>) -> Linear {
    candle_nn::Linear::new(weight.clone(), bias.cloned()).into()
}
