//! The fields of the workloads, by kind, over weights p0, p1, …: ours, and in ordinary candle
//! operations.

use candle_core::{DType, Device, Module, Result, Tensor, D};
use candle_diffeq::cde::{cdeint, ControlPath};
use candle_diffeq::nn::graph::Csr;
use candle_diffeq::nn::{
    self, Activation, CdeMlp, Cnf, ConvField, Mlp, Relaxation, RowLoss, RowSpeed,
};
use candle_diffeq::options::Steps;
use candle_diffeq::sde::{
    ito, stratonovich, Calculus, NeuralSde, Noise, OfField, SdeMethod, SdeOptions,
};
use candle_diffeq::tableau::Tableau;
use candle_diffeq::{NeuralOde, OdeOptions, State, Time, VectorField};
use candle_nn::{Conv2d, Conv2dConfig, Linear, VarBuilder, VarMap};

use crate::models;

/// A kind of field.
pub(crate) struct Kind {
    pub(crate) name: &'static str,
    /// In candle's operations.
    pub(crate) plain: Plain,
    /// In the library's own.
    pub(crate) ours: Option<Ours>,
}

/// Every kind.
pub(crate) const KINDS: [Kind; 13] = [
    Kind {
        name: "mlp",
        plain: mlp,
        ours: Some(our_mlp),
    },
    Kind {
        name: "conv",
        plain: conv,
        ours: Some(our_conv),
    },
    Kind {
        name: "cnf",
        plain: cnf,
        ours: Some(our_cnf),
    },
    Kind {
        name: "hyper",
        plain: hyper,
        ours: Some(models::hyper),
    },
    Kind {
        name: "ot_flow",
        plain: models::no_plain,
        ours: Some(models::ot_flow),
    },
    Kind {
        name: "hutchinson",
        plain: models::no_plain,
        ours: Some(models::hutchinson),
    },
    Kind {
        name: "van_der_pol",
        plain: van_der_pol,
        ours: None,
    },
    Kind {
        name: "scaled_mlp",
        plain: scaled_mlp,
        ours: Some(our_scaled_mlp),
    },
    Kind {
        name: "sde",
        plain: models::no_plain,
        ours: Some(our_sde),
    },
    Kind {
        name: "cde",
        plain: models::no_plain,
        ours: Some(our_cde),
    },
    Kind {
        name: "hnn",
        plain: models::no_plain,
        ours: Some(models::hnn),
    },
    Kind {
        name: "galerkin",
        plain: models::no_plain,
        ours: Some(models::galerkin),
    },
    Kind {
        name: "graph",
        plain: models::no_plain,
        ours: Some(models::graph),
    },
];

/// Where the variables are, of what dtype, and the features of the state.
pub(crate) struct Place<'a> {
    pub(crate) vars: &'a VarMap,
    pub(crate) dtype: DType,
    pub(crate) device: &'a Device,
    pub(crate) features: usize,
    pub(crate) activation: Activation,
    /// By what an equation is driven.
    pub(crate) drive: Drive,
}

/// What drives an equation.
#[derive(Clone)]
pub(crate) enum Drive {
    Nothing,
    /// Noise, of a seed, with a method for it.
    Noise(SdeMethod, u64),
    /// A path through observations.
    Path(ControlPath),
    /// Not driven, but over a graph.
    Graph(Csr),
}

impl Place<'_> {
    pub(crate) fn ode<S: State + 'static, F: VectorField<S> + Send + Sync + 'static>(
        &self,
        field: impl Fn(VarBuilder<'_>) -> Result<F> + Send + Sync + 'static,
        options: OdeOptions,
    ) -> candle_diffeq::Result<NeuralOde<S>> {
        let ode = NeuralOde::from_field(self.vars, "", self.dtype, self.device, field)?;
        Ok(ode.options(options))
    }

    pub(crate) fn builder(&self) -> VarBuilder<'_> {
        VarBuilder::from_varmap(self.vars, self.dtype, self.device)
    }
}

/// Asks a builder for the weights.
pub(crate) type Ask = Box<dyn Fn(VarBuilder<'_>) -> Result<Vec<Tensor>> + Send + Sync>;

/// Weights in pairs: matrix or kernel, and bias.
pub(crate) type Layers = Vec<(Tensor, Tensor)>;

pub(crate) fn layers(weights: Vec<Tensor>) -> Result<Layers> {
    let pair = |pair: &[Tensor]| match pair {
        [weight, bias] => Ok((weight.clone(), bias.clone())),
        _ => candle_core::bail!("its weights are not pairs p0, p1, …"),
    };
    weights.chunks(2).map(pair).collect()
}

/// A field over the parts of the state.
pub(crate) type Field = Box<dyn Fn(&Time, &Vec<Tensor>) -> Result<Vec<Tensor>> + Send + Sync>;

type Plain = fn(Vec<Tensor>, Parts) -> Result<Field>;

/// Whose layers and activations.
#[derive(Clone, Copy)]
pub(crate) struct Parts {
    affine: fn(&Tensor, &(Tensor, Tensor)) -> Result<Tensor>,
    act: fn(Activation, &Tensor) -> Result<Tensor>,
    pub(crate) activation: Activation,
}

impl Parts {
    fn activated(&self, x: &Tensor) -> Result<Tensor> {
        (self.act)(self.activation, x)
    }
}

/// candle's.
pub(crate) const CANDLES: Parts = Parts {
    affine: |x, (weight, bias)| x.matmul(&weight.t()?)?.broadcast_add(bias),
    act: |activation, x| match activation {
        Activation::Tanh => x.tanh(),
        Activation::Softplus => x.relu()? + (x.abs()?.neg()?.exp()? + 1.0)?.log()?,
        other => candle_core::bail!("no field of candle's layers with {other:?}"),
    },
    activation: Activation::Tanh,
};

/// The library's.
pub(crate) const DROP_IN: Parts = Parts {
    affine: |x, (weight, bias)| {
        let layer = Linear::new(weight.clone(), Some(bias.clone()));
        nn::Linear::from(layer).forward(x)
    },
    act: Activation::forward,
    activation: Activation::Tanh,
};

type Ours = fn(&Place<'_>, Ask, OdeOptions) -> candle_diffeq::Result<Ode>;

/// A neural ODE whose state has one part, or several.
pub(crate) enum Ode {
    One(NeuralOde),
    Two(NeuralOde<(Tensor, Tensor)>),
    Three(NeuralOde<(Tensor, Tensor, Tensor)>),
    Several(NeuralOde<Vec<Tensor>>),
    Sde(Box<NeuralSde>, Noise),
    Cde(CdeMlp, ControlPath, OdeOptions),
    /// The same steps on candle's own tape, for comparison.
    Tape(Field, Tableau),
}

/// Whose field is solved, and how.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Whose {
    /// The library's, where it has one of the kind.
    Ours,
    /// Of candle's layers.
    Plain,
    /// In the same operations, with the library's layers and activations.
    DropIn,
    /// Of candle's layers, unrolled on candle's tape without the library.
    Tape,
}

impl Ode {
    /// The states that the options ask for, by part.
    pub(crate) fn solve(&self, y0: &[Tensor], times: &[f64]) -> candle_diffeq::Result<Vec<Tensor>> {
        match self {
            Self::One(ode) => Ok(vec![ode.solve(&y0[0], times)?]),
            Self::Two(ode) => {
                let (z, l) = ode.solve(&(y0[0].clone(), y0[1].clone()), times)?;
                Ok(vec![z, l])
            }
            Self::Three(ode) => {
                let [z, l, probe] = [0, 1, 2].map(|leaf| y0[leaf].clone());
                let (z, l, probe) = ode.solve(&(z, l, probe), times)?;
                Ok(vec![z, l, probe])
            }
            Self::Several(ode) => ode.solve(&y0.to_vec(), times),
            Self::Sde(sde, noise) => Ok(vec![sde.solve(&y0[0], times, noise)?]),
            Self::Cde(field, path, options) => {
                Ok(vec![cdeint(field.clone(), &y0[0], path, times, options)?])
            }
            Self::Tape(field, tableau) => Ok(unrolled(field, tableau, y0, times)?),
        }
    }
}

impl Ode {
    /// The mean square of the last state's distance from `target`, formed inside the solve where it has
    /// one part.
    pub(crate) fn mean_square(
        &self,
        y0: &[Tensor],
        times: &[f64],
        target: &Tensor,
    ) -> candle_diffeq::Result<Tensor> {
        let loss = RowLoss::MeanSquaredError(target.clone());
        match self {
            Self::One(ode) => ode.loss(&y0[0], times, &loss),
            _ => loss.of(&self.solve(y0, times)?),
        }
    }
}

/// The last state, every step on the tape.
fn unrolled(field: &Field, tableau: &Tableau, y0: &[Tensor], times: &[f64]) -> Result<Vec<Tensor>> {
    let combined = |y: &[Tensor], h: f64, c: &[f64], ks: &[Vec<Tensor>]| -> Result<Vec<Tensor>> {
        let mut y = y.to_vec();
        for (c, k) in c.iter().zip(ks).filter(|(c, _)| **c != 0.0) {
            for (y, k) in y.iter_mut().zip(k) {
                *y = (&*y + (k * (h * c))?)?;
            }
        }
        Ok(y)
    };
    let mut y = y0.to_vec();
    for ends in times.windows(2) {
        let (t, h) = (ends[0], ends[1] - ends[0]);
        let mut ks = vec![];
        for i in 0..tableau.stages() {
            let stage = combined(&y, h, tableau.a(i), &ks)?;
            let time = Time::new(t + tableau.c()[i] * h, y[0].dtype(), y[0].device());
            ks.push(field(&time, &stage)?);
        }
        y = combined(&y, h, tableau.b(), &ks)?;
    }
    Ok(y)
}

/// The plain field on a tape.
pub(crate) fn tape(build: Plain, place: &Place<'_>, ask: Ask, options: &OdeOptions) -> Result<Ode> {
    if matches!(options.steps, Steps::Adaptive(_)) {
        candle_core::bail!("adaptive steps are not unrolled on a tape");
    }
    let parts = Parts {
        activation: place.activation,
        ..CANDLES
    };
    let field = build(ask(place.builder())?, parts)?;
    Ok(Ode::Tape(field, options.method.clone()))
}

/// A neural ODE of a plain field.
pub(crate) fn plain(
    build: Plain,
    parts: Parts,
    place: &Place<'_>,
    ask: Ask,
    options: OdeOptions,
) -> candle_diffeq::Result<Ode> {
    let parts = Parts {
        activation: place.activation,
        ..parts
    };
    let field = move |vb: VarBuilder<'_>| build(ask(vb)?, parts);
    Ok(Ode::Several(place.ode(field, options)?))
}

fn our_mlp(place: &Place<'_>, ask: Ask, options: OdeOptions) -> candle_diffeq::Result<Ode> {
    let activation = place.activation;
    let field = move |vb: VarBuilder<'_>| perceptron(ask(vb)?, activation);
    Ok(Ode::One(place.ode(field, options)?))
}

fn our_scaled_mlp(place: &Place<'_>, ask: Ask, options: OdeOptions) -> candle_diffeq::Result<Ode> {
    let activation = place.activation;
    let field = move |vb: VarBuilder<'_>| {
        let network = perceptron(ask(vb)?, activation)?;
        Ok(RowSpeed::new(Relaxation::new(network)))
    };
    Ok(Ode::Two(place.ode(field, options)?))
}

fn our_cnf(place: &Place<'_>, ask: Ask, options: OdeOptions) -> candle_diffeq::Result<Ode> {
    let activation = place.activation;
    let field = move |vb: VarBuilder<'_>| Cnf::new(perceptron(ask(vb)?, activation)?);
    Ok(Ode::Two(place.ode(field, options)?))
}

/// Drift and diffusion, each of half of the weights.
fn our_sde(place: &Place<'_>, ask: Ask, options: OdeOptions) -> candle_diffeq::Result<Ode> {
    let Drive::Noise(method, seed) = place.drive else {
        return Err(undriven());
    };
    let activation = place.activation;
    let equation = move |vb: VarBuilder<'_>| {
        let mut drift = ask(vb)?;
        let diffusion = perceptron(drift.split_off(drift.len() / 2), activation)?;
        let (drift, diffusion) = (perceptron(drift, activation)?, OfField(diffusion));
        Ok(match method.calculus() {
            Calculus::Ito => ito(drift, diffusion),
            Calculus::Stratonovich => stratonovich(drift, diffusion),
        })
    };
    let sde = NeuralSde::new(place.vars, "", place.dtype, place.device, equation)?;
    let sde = sde.options(SdeOptions {
        method,
        precision: options.precision,
        steps: options.steps,
        output: options.output,
        checkpoint: options.checkpoint,
        recorder: options.recorder,
        ..Default::default()
    });
    Ok(Ode::Sde(Box::new(sde), Noise::seeded(seed)))
}

fn our_cde(place: &Place<'_>, ask: Ask, options: OdeOptions) -> candle_diffeq::Result<Ode> {
    let Drive::Path(path) = &place.drive else {
        return Err(undriven());
    };
    let layers = layers(ask(place.builder())?)?.into_iter();
    let layers = layers.map(|(w, b)| Linear::new(w, Some(b)));
    let layers: Vec<_> = layers.collect();
    let field = CdeMlp::from_layers(&layers, path.channels(), place.activation)?;
    Ok(Ode::Cde(field, path.clone(), options))
}

pub(crate) fn undriven() -> candle_diffeq::Error {
    candle_core::Error::Msg("the file does not say by what the equation is driven".into()).into()
}

pub(crate) fn perceptron(weights: Vec<Tensor>, activation: Activation) -> Result<Mlp> {
    let layers = layers(weights)?.into_iter();
    let layers = layers.map(|(w, b)| Linear::new(w, Some(b)));
    Mlp::from_layers(&layers.collect::<Vec<_>>(), activation, false)
}

fn our_conv(place: &Place<'_>, ask: Ask, options: OdeOptions) -> candle_diffeq::Result<Ode> {
    let field = move |vb: VarBuilder<'_>| {
        let layer = |(w, b): (Tensor, Tensor)| {
            let config = Conv2dConfig {
                padding: w.dim(D::Minus1)? / 2,
                ..Default::default()
            };
            Ok(Conv2d::new(w, Some(b), config))
        };
        let layers = layers(ask(vb)?)?
            .into_iter()
            .map(layer)
            .collect::<Result<Vec<_>>>()?;
        ConvField::from_layers(&layers, Activation::Relu)
    };
    Ok(Ode::One(place.ode(field, options)?))
}

/// Layers with activations between them.
fn mlp(weights: Vec<Tensor>, parts: Parts) -> Result<Field> {
    let layers = layers(weights)?;
    Ok(Box::new(move |_, y| {
        let mut x = y[0].clone();
        for (i, layer) in layers.iter().enumerate() {
            x = (parts.affine)(&if i > 0 { parts.activated(&x)? } else { x }, layer)?;
        }
        Ok(vec![x])
    }))
}

/// Convolutions that keep the size of the image, with relu between them.
fn conv(weights: Vec<Tensor>, _: Parts) -> Result<Field> {
    let layers = layers(weights)?;
    Ok(Box::new(move |_, y| {
        let mut x = y[0].clone();
        for (i, (kernel, bias)) in layers.iter().enumerate() {
            let input = if i > 0 { x.relu()? } else { x };
            let padding = kernel.dim(D::Minus1)? / 2;
            let image = input.conv2d(kernel, padding, 1, 1, 1)?;
            x = image.broadcast_add(&bias.reshape(((), 1, 1))?)?;
        }
        Ok(vec![x])
    }))
}

/// z' = `mlp`(z), (log p)' = −tr ∂z'/∂z, by one forward tangent for each coordinate of z.
fn cnf(weights: Vec<Tensor>, parts: Parts) -> Result<Field> {
    let layers = layers(weights)?;
    Ok(Box::new(move |_, y| {
        let (mut x, mut slopes) = (y[0].clone(), vec![]);
        for (i, layer) in layers.iter().enumerate() {
            if i > 0 {
                let value = parts.activated(&x)?;
                slopes.push(match parts.activation {
                    Activation::Tanh => (1.0 - value.sqr()?)?,
                    Activation::Softplus => candle_nn::ops::sigmoid(&x)?,
                    other => candle_core::bail!("no trace of candle's layers with {other:?}"),
                });
                x = value;
            }
            x = (parts.affine)(&x, layer)?;
        }
        let mut trace = x.narrow(1, 0, 1)?.zeros_like()?;
        for i in 0..x.dim(1)? {
            // The i-th column of the Jacobian: e_i through every layer, row by row of the batch.
            let mut tangent = layers[0].0.narrow(1, i, 1)?.t()?;
            for (slope, (weight, _)) in slopes.iter().zip(&layers[1..]) {
                tangent = slope.broadcast_mul(&tangent)?.matmul(&weight.t()?)?;
            }
            trace = trace.broadcast_add(&tangent.narrow(1, i, 1)?)?;
        }
        Ok(vec![x, trace.neg()?])
    }))
}

/// z' = 1/m Σ_j u_j tanh(w_j·z + b_j), (log p)' = −tr ∂z'/∂z, with weights that the layers compute from
/// time, as `HyperCnf` has it.
fn hyper(weights: Vec<Tensor>, parts: Parts) -> Result<Field> {
    let layers = layers(weights)?;
    Ok(Box::new(move |t, y| {
        let (z, log) = (&y[0], &y[1]);
        let mut x = t.tensor()?.to_dtype(z.dtype())?.reshape((1, 1))?;
        for (i, layer) in layers.iter().enumerate() {
            x = (parts.affine)(&if i > 0 { parts.activated(&x)? } else { x }, layer)?;
        }
        let d = z.dim(1)?;
        let m = x.dim(1)? / (3 * d + 1);
        let block = |i: usize| x.narrow(1, i * m * d, m * d)?.reshape((m, d));
        let (w, bias) = (block(0)?, x.narrow(1, 3 * m * d, m)?);
        let u = ((block(1)? * candle_nn::ops::sigmoid(&block(2)?)?)? / m as f64)?;
        let h = parts.activated(&z.matmul(&w.t()?)?.broadcast_add(&bias)?)?;
        let trace = (h.sqr()? - 1.0)?.matmul(&(&u * w)?.sum_keepdim(1)?)?;
        Ok(vec![h.matmul(&u)?, trace.to_dtype(log.dtype())?])
    }))
}

/// (x, v)' = (v, α (1 − x²) v − x) in every row.
fn van_der_pol(weights: Vec<Tensor>, _: Parts) -> Result<Field> {
    let [alpha] = weights.as_slice() else {
        candle_core::bail!("an oscillator has one weight p0, not {}", weights.len());
    };
    let alpha = alpha.clone();
    Ok(Box::new(move |_, y| {
        let (x, v) = (y[0].narrow(1, 0, 1)?, y[0].narrow(1, 1, 1)?);
        let damping = ((1.0 - x.sqr()?)? * &v)?.broadcast_mul(&alpha)?;
        Ok(vec![Tensor::cat(&[&v, &(damping - x)?], 1)?])
    }))
}

/// x' = eˢ (`mlp`(x) − x) at a speed of its own in every row, s' = 0.
fn scaled_mlp(weights: Vec<Tensor>, parts: Parts) -> Result<Field> {
    let network = mlp(weights, parts)?;
    Ok(Box::new(move |t, y| {
        let (x, s) = (&y[0], &y[1]);
        let towards = network(t, &vec![x.clone()])?.remove(0);
        let velocity = (towards - x)?.broadcast_mul(&s.exp()?)?;
        Ok(vec![velocity, s.zeros_like()?])
    }))
}
