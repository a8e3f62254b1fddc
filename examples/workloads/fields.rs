//! The fields of the workloads, by kind, over weights p0, p1, …: ours, and in ordinary candle
//! operations.

use candle_core::{DType, Device, Module, Result, Tensor, D};
use candle_diffeq::nn::{self, Activation, Cnf, ConvField, Mlp};
use candle_diffeq::{NeuralOde, OdeOptions, RowLoss, Tableau, Time};
use candle_nn::{Conv2d, Conv2dConfig, Linear, VarBuilder, VarMap};

/// A kind of field.
pub(crate) struct Kind {
    pub(crate) name: &'static str,
    /// In candle's operations.
    pub(crate) plain: Plain,
    /// In the library's own.
    pub(crate) ours: Option<Ours>,
}

/// Every kind.
pub(crate) const KINDS: [Kind; 3] = [
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
];

/// Weights: matrix or kernel, bias, matrix or kernel, bias, ….
type Layers = Vec<(Tensor, Tensor)>;

/// Asks a builder for them.
pub(crate) type Ask = Box<dyn Fn(VarBuilder<'_>) -> Result<Layers> + Send + Sync>;

/// A field over the parts of the state.
type Field = Box<dyn Fn(&Time, &Vec<Tensor>) -> Result<Vec<Tensor>> + Send + Sync>;

type Plain = fn(Layers, Parts) -> Result<Field>;

/// Whose layers and activations.
#[derive(Clone, Copy)]
pub(crate) struct Parts {
    affine: fn(&Tensor, &(Tensor, Tensor)) -> Result<Tensor>,
    tanh: fn(&Tensor) -> Result<Tensor>,
}

/// candle's.
pub(crate) const CANDLES: Parts = Parts {
    affine: |x, (weight, bias)| x.matmul(&weight.t()?)?.broadcast_add(bias),
    tanh: Tensor::tanh,
};

/// The library's.
pub(crate) const DROP_IN: Parts = Parts {
    affine: |x, (weight, bias)| {
        let layer = Linear::new(weight.clone(), Some(bias.clone()));
        nn::Linear::from(layer).forward(x)
    },
    tanh: |x| Activation::Tanh.forward(x),
};

type Ours = fn(&VarMap, DType, Ask, OdeOptions) -> candle_diffeq::Result<Ode>;

/// A neural ODE whose state has one part, or several.
pub(crate) enum Ode {
    One(NeuralOde),
    Two(NeuralOde<(Tensor, Tensor)>),
    Several(NeuralOde<Vec<Tensor>>),
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
            Self::Several(ode) => ode.solve(&y0.to_vec(), times),
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
pub(crate) fn tape(
    build: Plain,
    vars: &VarMap,
    dtype: DType,
    ask: Ask,
    options: &OdeOptions,
) -> Result<Ode> {
    let layers = ask(VarBuilder::from_varmap(vars, dtype, &Device::Cpu))?;
    Ok(Ode::Tape(build(layers, CANDLES)?, options.method.clone()))
}

/// A neural ODE of a plain field.
pub(crate) fn plain(
    build: Plain,
    parts: Parts,
    vars: &VarMap,
    dtype: DType,
    ask: Ask,
    options: OdeOptions,
) -> candle_diffeq::Result<Ode> {
    let field = move |vb: VarBuilder<'_>| build(ask(vb)?, parts);
    let ode = NeuralOde::from_field(vars, "", dtype, &Device::Cpu, field)?;
    Ok(Ode::Several(ode.options(options)))
}

fn our_mlp(
    vars: &VarMap,
    dtype: DType,
    ask: Ask,
    options: OdeOptions,
) -> candle_diffeq::Result<Ode> {
    let field = move |vb: VarBuilder<'_>| perceptron(ask(vb)?);
    let ode = NeuralOde::from_field(vars, "", dtype, &Device::Cpu, field)?;
    Ok(Ode::One(ode.options(options)))
}

fn our_cnf(
    vars: &VarMap,
    dtype: DType,
    ask: Ask,
    options: OdeOptions,
) -> candle_diffeq::Result<Ode> {
    let field = move |vb: VarBuilder<'_>| Cnf::new(perceptron(ask(vb)?)?);
    let ode = NeuralOde::from_field(vars, "", dtype, &Device::Cpu, field)?;
    Ok(Ode::Two(ode.options(options)))
}

fn perceptron(layers: Layers) -> Result<Mlp> {
    let layers = layers.into_iter().map(|(w, b)| Linear::new(w, Some(b)));
    Mlp::from_layers(&layers.collect::<Vec<_>>(), Activation::Tanh, false)
}

fn our_conv(
    vars: &VarMap,
    dtype: DType,
    ask: Ask,
    options: OdeOptions,
) -> candle_diffeq::Result<Ode> {
    let field = move |vb: VarBuilder<'_>| {
        let layer = |(w, b): (Tensor, Tensor)| {
            let config = Conv2dConfig {
                padding: w.dim(D::Minus1)? / 2,
                ..Default::default()
            };
            Ok(Conv2d::new(w, Some(b), config))
        };
        let layers = ask(vb)?
            .into_iter()
            .map(layer)
            .collect::<Result<Vec<_>>>()?;
        ConvField::from_layers(&layers, Activation::Relu)
    };
    let ode = NeuralOde::from_field(vars, "", dtype, &Device::Cpu, field)?;
    Ok(Ode::One(ode.options(options)))
}

/// Layers with tanh between them.
fn mlp(layers: Layers, parts: Parts) -> Result<Field> {
    Ok(Box::new(move |_, y| {
        let mut x = y[0].clone();
        for (i, layer) in layers.iter().enumerate() {
            x = (parts.affine)(&if i > 0 { (parts.tanh)(&x)? } else { x }, layer)?;
        }
        Ok(vec![x])
    }))
}

/// Convolutions that keep the size of the image, with relu between them.
fn conv(layers: Layers, _: Parts) -> Result<Field> {
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
fn cnf(layers: Layers, parts: Parts) -> Result<Field> {
    Ok(Box::new(move |_, y| {
        let (mut x, mut slopes) = (y[0].clone(), vec![]);
        for (i, layer) in layers.iter().enumerate() {
            if i > 0 {
                x = (parts.tanh)(&x)?;
                slopes.push((1.0 - x.sqr()?)?);
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
