//! A perceptron as a potential.

use candle_core::backprop::GradStore;
use candle_core::{Result, Tensor};
use candle_nn::VarBuilder;

use super::laplacian::laplacian;
use super::tiles::Turn;
use super::{Curved, Potential};
use crate::error::{Error, PotentialDefect};
use crate::field::{Cotangents, Offer, Pullback};
use crate::nn::linear::{matmul, sum_of_rows, transposed_matmul};
use crate::nn::perceptron::{check_widths, Pass, Perceptron, Pulled};
use crate::nn::{add_gradient, coefficients, wrong_state, Activation, Linear};
use crate::time::Time;

/// How the potential, one number, is computed from the outputs z of a network.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Energy {
    /// The only output.
    #[default]
    Output,
    /// Σ z², which is bounded below.
    SumOfSquares,
}

/// A potential Φ(t, x) that is a perceptron: its only output, or the sum of the squares of its outputs.
///
/// x: `(…, features)`; every row is mapped on its own.  Its gradient, and the product of its Hessian with a vector, are
///
/// δ_L = 1, g_l = W_{l+1}ᵀδ_{l+1}, δ_l = σ'(z_l) ∘ g_l, ∇Φ = W_1ᵀδ_1,
/// δ̇_L = 0, ġ_l = W_{l+1}ᵀδ̇_{l+1}, δ̇_l = σ' ∘ ġ_l + σ'' ∘ ż_l ∘ g_l, ∇²Φ v = W_1ᵀδ̇_1,
///
/// with the tangent ż_l = W_l ȧ_{l−1}, ȧ_l = σ' ∘ ż_l, ȧ_0 = v.  With time as an input, and a tangent ṫ of it, ż_1 has
/// ṫ w in addition, w the column of W_1 that belongs to time.  The pull-back of ∇Φ with a cotangent v is x̄ = ∇²Φ
/// v, W̄_l = δ̇_lᵀ a_{l−1} + δ_lᵀ ȧ_{l−1}, b̄_l = Σ δ̇_l, so a field over this potential costs twice as much as the
/// same network as a field.
///
/// See [`energy`](crate::nn::energy) for the fields.
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_diffeq::nn::energy::{Curved, Energy, Potential};
/// use candle_diffeq::nn::{Activation, EnergyMlp};
/// use candle_diffeq::Time;
/// let vars = candle_nn::VarMap::new();
/// let vb = candle_nn::VarBuilder::from_varmap(&vars, DType::F64, &Device::Cpu);
/// let energy = EnergyMlp::new(&[3, 32, 1], Activation::Softplus, Energy::Output, vb)?;
/// let (t, x) = (Time::new(0.0, DType::F64, &Device::Cpu), Tensor::ones((8, 3), DType::F64, &Device::Cpu)?);
/// let (phi, gradient) = energy.gradient(&t, &x)?;
/// assert_eq!((phi.dims(), gradient.dims()), (&[8, 1][..], &[8, 3][..]));
/// assert_eq!(energy.hessian(&t, &x)?.dims(), [8, 3, 3]);
/// assert_eq!(energy.laplacian(&t, &x)?.dims(), [8, 1]);
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct EnergyMlp {
    pub(super) net: Perceptron,
    pub(super) energy: Energy,
    pub(super) time: bool,
}

impl EnergyMlp {
    /// Layers of these widths, from the features to 1, or to any number for [`Energy::SumOfSquares`]; named `0`, `1`,
    /// … with `weight` and `bias`, and initialised as [`candle_nn::linear()`] does.  The last layer of an
    /// [`Energy::Output`] has no bias, because it would shift Φ and change no gradient.
    ///
    /// # Errors
    /// Those of the builder; fewer than two widths, or one that is 0; [`Error::Potential`] for an activation without curvature,
    /// or for another number of outputs than 1.
    pub fn new(
        widths: &[usize],
        activation: Activation,
        energy: Energy,
        vb: VarBuilder<'_>,
    ) -> Result<Self> {
        Self::build(widths, (activation, energy, false), vb)
    }

    /// Like [`new`](Self::new), with time as one more input of the first layer, after the features.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn with_time(
        widths: &[usize],
        activation: Activation,
        energy: Energy,
        vb: VarBuilder<'_>,
    ) -> Result<Self> {
        Self::build(widths, (activation, energy, true), vb)
    }

    fn build(
        widths: &[usize],
        (activation, energy, time): (Activation, Energy, bool),
        vb: VarBuilder<'_>,
    ) -> Result<Self> {
        check_widths(widths)?;
        let layer = |(i, w): (usize, &[usize])| {
            let inputs = w[0] + usize::from(time && i == 0);
            match i + 2 == widths.len() && energy == Energy::Output {
                true => Linear::without_bias(inputs, w[1], vb.pp(i)),
                false => Linear::new(inputs, w[1], vb.pp(i)),
            }
        };
        let layers = widths.windows(2).enumerate().map(layer);
        let net = Perceptron::from_layers(layers.collect::<Result<_>>()?, activation)?;
        match time {
            true => Self::of_time(net, energy),
            false => Self::of(net, energy),
        }
    }

    /// A network that exists.
    ///
    /// # Errors
    /// [`Error::Potential`], as [`new`](Self::new).
    pub fn of(net: Perceptron, energy: Energy) -> Result<Self> {
        let outputs = net.outputs();
        if net.activation == Activation::Relu {
            let activation = "ReLU";
            return Err(Error::from(PotentialDefect::Flat { activation }).into());
        }
        if energy == Energy::Output && outputs != 1 {
            return Err(Error::from(PotentialDefect::Outputs { outputs }).into());
        }
        Ok(Self {
            net,
            energy,
            time: false,
        })
    }

    /// Like [`of`](Self::of), for a network whose last input is time.
    ///
    /// # Errors
    /// As [`of`](Self::of); if time is the only input.
    pub fn of_time(net: Perceptron, energy: Energy) -> Result<Self> {
        if net.inputs() < 2 {
            candle_core::bail!("a potential of time alone has no gradient: give the network at least one input before time")
        }
        let of = Self::of(net, energy)?;
        Ok(Self { time: true, ..of })
    }

    /// Features of x.
    pub fn features(&self) -> usize {
        self.net.inputs() - usize::from(self.time)
    }

    /// x as `(row, feature)`.
    fn rows(&self, x: &Tensor) -> Result<Tensor> {
        let features = self.features();
        if x.dims().last() == Some(&features) {
            return x.reshape(((), features));
        }
        let field = format!("an EnergyMlp of {features} features");
        Err(wrong_state(field, format!("x (…, {features})"), &[x]))
    }

    /// The network at time t, over x alone, in the dtype of x: what belongs to time is added to the first bias, in the
    /// precision of t, and rounded once.
    fn at(&self, t: &Time, x: &Tensor) -> Result<Perceptron> {
        let mut net = self.net.clone();
        if self.time {
            let (t, features, first) = (t.tensor()?, self.features(), &self.net.layers[0]);
            let wide = coefficients(&t, first.weight.dtype());
            let column = first.weight.narrow(1, features, 1)?.squeeze(1)?;
            let mut bias = column.to_dtype(wide)?.broadcast_mul(&t.to_dtype(wide)?)?;
            if let Some(own) = &first.bias {
                bias = (bias + own.to_dtype(wide)?)?;
            }
            net.layers[0] = Linear {
                weight: first.weight.narrow(1, 0, features)?.contiguous()?,
                bias: Some(bias),
            };
            // A layer that reads time is not skipped.
            net.residual = net.residual.map(|first| first.max(1));
        }
        net.like(x)
    }

    /// Whether the bias of the last layer only shifts Φ, so that no gradient reads it.
    pub(super) fn shifts(&self) -> bool {
        self.energy == Energy::Output
    }

    /// δ_L.
    fn seed(&self, output: &Tensor) -> Result<Tensor> {
        match self.energy {
            Energy::Output => output.ones_like(),
            Energy::SumOfSquares => output * 2.0,
        }
    }

    /// δ̇_L, of ż_L.
    fn seed_dot(&self, output: &Tensor) -> Result<Tensor> {
        match self.energy {
            Energy::Output => output.zeros_like(),
            Energy::SumOfSquares => output * 2.0,
        }
    }

    /// Φ of rows.
    fn value(&self, output: &Tensor) -> Result<Tensor> {
        match self.energy {
            Energy::Output => Ok(output.clone()),
            Energy::SumOfSquares => output.sqr()?.sum_keepdim(1),
        }
    }

    /// Adds the gradients of layer l, given δ̇ and its sums; returns the cotangent of time, where the layer reads it.
    fn add_gradients(
        &self,
        l: usize,
        weight_bar: impl FnOnce() -> Result<Tensor>,
        bend: &Tensor,
        t: Option<&Tensor>,
        params: &mut GradStore,
    ) -> Result<Option<Tensor>> {
        let Linear { weight, bias } = &self.net.layers[l];
        let bias = bias.as_ref().filter(|b| b.track_op());
        // A number that is added to Φ has no gradient.
        let last = l + 1 == self.net.layers.len();
        let bias = bias.filter(|_| !(last && self.shifts()));
        let Some(t) = t.filter(|_| l == 0) else {
            if weight.track_op() {
                add_gradient(params, weight, weight_bar()?)?;
            }
            if let Some(bias) = bias {
                add_gradient(params, bias, sum_of_rows(bend)?)?;
            }
            return Ok(None);
        };
        // All that belongs to time follows from the sums over the rows, for time has no tangent.
        let wide = coefficients(t, weight.dtype());
        let sums = sum_of_rows(bend)?.to_dtype(wide)?;
        if weight.track_op() {
            let column = sums.broadcast_mul(&t.to_dtype(wide)?)?.unsqueeze(1)?;
            let gradient = Tensor::cat(&[&weight_bar()?.to_dtype(wide)?, &column], 1)?;
            add_gradient(params, weight, gradient)?;
        }
        let column = weight
            .detach()
            .narrow(1, self.features(), 1)?
            .squeeze(1)?
            .to_dtype(wide)?;
        let of_time = (column * &sums)?.sum_all()?;
        if let Some(bias) = bias {
            add_gradient(params, bias, sums)?;
        }
        Ok(Some(of_time))
    }

    /// The pull-back of ∇Φ at a pass without history.
    fn pull(
        &self,
        (net, pass, pulled): (&Perceptron, &Pass, &Pulled),
        t: Option<&Tensor>,
        v: &Tensor,
    ) -> Result<Cotangents<Tensor>> {
        let (mut params, mut of_time) = (GradStore::default(), None);
        let pushed = net.push(pass, v)?;
        let mut g_dot = self.seed_dot(&pushed.output)?;
        for (l, layer) in net.layers.iter().enumerate().rev() {
            let bend = match pass.hidden.get(l) {
                None => g_dot.clone(),
                Some([z, value, slope]) => {
                    let curvature = net.activation.curvature(z, value, slope)?;
                    let bent = ((curvature * &pushed.hidden[l])? * &pulled.values[l])?;
                    ((slope * &g_dot)? + bent)?
                }
            };
            let weight_bar = || {
                let moved = transposed_matmul(&pulled.products[l], &pushed.inputs[l])?;
                transposed_matmul(&bend, &pass.inputs[l])? + moved
            };
            let time = self.add_gradients(l, weight_bar, &bend, t, &mut params)?;
            of_time = time.or(of_time);
            let next = matmul(&bend, &layer.weight)?;
            g_dot = match l + 1 < net.layers.len() && net.skips(l) {
                true => (next + g_dot)?,
                false => next,
            };
        }
        Ok(Cotangents {
            y: g_dot,
            t: of_time,
            params,
        })
    }
}

impl Potential for EnergyMlp {
    fn gradient(&self, t: &Time, x: &Tensor) -> Result<(Tensor, Tensor)> {
        let rows = self.rows(x)?;
        let net = self.at(t, x)?;
        let pass = net.pass(&rows)?;
        let pulled = net.pull_back(&pass, &self.seed(&pass.output)?)?;
        let mut shape = x.dims().to_vec();
        shape[x.rank() - 1] = 1;
        Ok((
            self.value(&pass.output)?.reshape(shape)?,
            pulled.input.reshape(x.shape())?,
        ))
    }

    fn gradient_vjp<'f>(&'f self, t: &Time, x: &Tensor) -> Result<(Tensor, Pullback<'f, Tensor>)> {
        let rows = self.rows(x)?.detach();
        let net = self.at(t, x)?.detached();
        let t = match self.time {
            // A copy: it may be a tensor that shows another time later.
            true => Some(t.tensor()?.detach().copy()?),
            false => None,
        };
        let pass = net.pass(&rows)?;
        let pulled = net.pull_back(&pass, &self.seed(&pass.output)?)?;
        let (gradient, shape) = (pulled.input.reshape(x.shape())?, x.shape().clone());
        let pull = move |v: &Tensor| {
            let v = v.reshape(((), self.features()))?;
            let cotangents = self.pull((&net, &pass, &pulled), t.as_ref(), &v)?;
            Ok(Cotangents {
                y: cotangents.y.reshape(&shape)?,
                ..cotangents
            })
        };
        Ok((gradient, Box::new(pull)))
    }

    fn parameters(&self) -> Option<Vec<Tensor>> {
        let tracked = self.read().filter(|p| p.track_op());
        Some(tracked.cloned().collect())
    }

    fn offer(&self, turn: Turn) -> Option<Offer> {
        self.offered(turn)
    }
}

impl Curved for EnergyMlp {
    fn gradient_jvp(
        &self,
        t: &Time,
        x: &Tensor,
        (rate, v): (f64, &Tensor),
    ) -> Result<(Tensor, Tensor)> {
        let (rows, v) = (self.rows(x)?, self.rows(v)?);
        let net = self.at(t, x)?;
        let pass = net.pass(&rows)?;
        let moved = match self.time && rate != 0.0 {
            true => {
                let column = self.net.layers[0].weight.narrow(1, self.features(), 1)?;
                Some((column.squeeze(1)?.to_dtype(x.dtype())? * rate)?)
            }
            false => None,
        };
        let pushed = net.push_with(&pass, &v, moved.as_ref())?;
        let pulled = net.pull_back(&pass, &self.seed(&pass.output)?)?;
        let bent = net.bend(&pass, &pushed, &pulled, &self.seed_dot(&pushed.output)?)?;
        Ok((
            pulled.input.reshape(x.shape())?,
            bent.input.reshape(x.shape())?,
        ))
    }

    fn laplacian(&self, t: &Time, x: &Tensor) -> Result<Tensor> {
        let trace = laplacian(&self.at(t, x)?, self.energy, &self.rows(x)?)?;
        trace.reshape([&x.dims()[..x.rank() - 1], &[1]].concat())
    }
}
