//! The networks: posterior and prior drift, the diffusion that both share, encoder and decoder.

use candle_core::{Module, Result, Tensor, D};
use candle_diffeq::sde::{ito, NeuralSde, Sde};
use candle_diffeq::Time;
use candle_nn::rnn::{gru, GRU, RNN};
use candle_nn::{linear, Linear, VarBuilder};

use crate::data::COORDINATES;

/// Coordinates of the latent state.
pub(crate) const LATENT: usize = 4;
/// Numbers of the context, which the encoder gives at every time.
pub(crate) const CONTEXT: usize = 16;
/// Of the diffusion.
const NARROW: usize = 8;

/// z, the contexts of all times, and the KL divergence of the path so far.
pub(crate) type State = (Tensor, Tensor, Tensor);

/// The law of the latent path given the observations.
pub(crate) type Posterior = NeuralSde<State>;

/// Three layers with tanh.
#[derive(Clone)]
struct Drift([Linear; 3]);

impl Drift {
    fn new(inputs: usize, hidden: usize, vb: VarBuilder<'_>) -> Result<Self> {
        Ok(Self([
            linear(inputs, hidden, vb.pp("l1"))?,
            linear(hidden, hidden, vb.pp("l2"))?,
            linear(hidden, LATENT, vb.pp("l3"))?,
        ]))
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let [first, second, third] = &self.0;
        third.forward(&second.forward(&first.forward(x)?.tanh()?)?.tanh()?)
    }
}

/// A number in (0, 1) for each coordinate, which reads that coordinate only: the noise is diagonal.
#[derive(Clone)]
struct Spread([Tensor; 4]);

impl Spread {
    fn new(vb: &VarBuilder<'_>) -> Result<Self> {
        Ok(Self([
            vb.get((LATENT, NARROW), "inner.weight")?,
            vb.get((LATENT, NARROW), "inner.offset")?,
            vb.get((LATENT, NARROW), "outer.weight")?,
            vb.get(LATENT, "outer.offset")?,
        ]))
    }

    fn forward(&self, z: &Tensor) -> Result<Tensor> {
        let [weight, offset, outer, last] = &self.0;
        let x = z.unsqueeze(D::Minus1)?.broadcast_mul(weight)?;
        let x = x.broadcast_add(offset)?.tanh()?.broadcast_mul(outer)?;
        let x = x.sum(D::Minus1)?.broadcast_add(last)?;
        ((x.neg()?.exp()? + 1.0)?).recip()
    }
}

type Field<S> = Box<dyn Fn(&Time, &S) -> Result<S>>;
type Noise<S> = Box<dyn Fn(&Time, &S) -> Result<Tensor>>;

/// dz = f(z, context) dt + g(z) dW, and the rate ½ |(f − h)/g|² of the KL divergence from the prior.  A step reads the
/// context at its end.
pub(crate) fn posterior(
    hidden: usize,
    vb: &VarBuilder<'_>,
) -> Result<Sde<Field<State>, Noise<State>>> {
    let own = Drift::new(LATENT + CONTEXT, hidden, vb.pp("posterior"))?;
    let prior = Drift::new(LATENT, hidden, vb.pp("prior"))?;
    let spread = Spread::new(&vb.pp("spread"))?;
    let noise = spread.clone();
    let drift = move |t: &Time, (z, contexts, _): &State| {
        let end = t.step().map_or(0, |n| n + 1);
        let context = contexts.narrow(1, end * CONTEXT, CONTEXT)?;
        let f = own.forward(&Tensor::cat(&[z, &context], 1)?)?;
        let u = ((&f - prior.forward(z)?)? / spread.forward(z)?)?;
        let rate = (u.sqr()?.sum_keepdim(1)? * 0.5)?;
        Ok((f, contexts.affine(0.0, 0.0)?, rate))
    };
    let diffusion = move |_: &Time, (z, ..): &State| noise.forward(z);
    Ok(ito(Box::new(drift), Box::new(diffusion)))
}

/// dz = h(z) dt + g(z) dW, of the same variables.
pub(crate) fn prior(
    hidden: usize,
    vb: &VarBuilder<'_>,
) -> Result<Sde<Field<Tensor>, Noise<Tensor>>> {
    let drift = Drift::new(LATENT, hidden, vb.pp("prior"))?;
    let spread = Spread::new(&vb.pp("spread"))?;
    Ok(ito(
        Box::new(move |_: &Time, z: &Tensor| drift.forward(z)),
        Box::new(move |_: &Time, z: &Tensor| spread.forward(z)),
    ))
}

/// Reads the observations from the last to the first.
pub(crate) struct Encoder {
    gru: GRU,
    context: Linear,
    start: Linear,
}

impl Encoder {
    pub(crate) fn new(hidden: usize, vb: &VarBuilder<'_>) -> Result<Self> {
        let config = Default::default();
        Ok(Self {
            gru: gru(COORDINATES, hidden, config, vb.pp("gru"))?,
            context: linear(hidden, CONTEXT, vb.pp("context"))?,
            start: linear(CONTEXT, 2 * LATENT, vb.pp("start"))?,
        })
    }

    /// Of observations `(times, rows, COORDINATES)`: contexts `(rows, times · CONTEXT)`, and mean and log-deviation of
    /// z(t_0).
    pub(crate) fn forward(&self, xs: &Tensor) -> Result<(Tensor, [Tensor; 2])> {
        let times = xs.dim(0)?;
        let backwards: Vec<u32> = (0..times as u32).rev().collect();
        let backwards = Tensor::new(backwards, xs.device())?;
        let input = xs.index_select(&backwards, 0)?.transpose(0, 1)?;
        let states = self.gru.seq(&input.contiguous()?)?;
        let states: Vec<_> = states.iter().rev().map(|state| state.h().clone()).collect();
        let contexts = self.context.forward(&Tensor::stack(&states, 1)?)?;
        let start = self.start.forward(&contexts.narrow(1, 0, 1)?.squeeze(1)?)?;
        let rows = contexts.dim(0)?;
        Ok((
            contexts.reshape((rows, times * CONTEXT))?,
            [
                start.narrow(1, 0, LATENT)?,
                start.narrow(1, LATENT, LATENT)?,
            ],
        ))
    }
}
