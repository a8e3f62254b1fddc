//! A continuous normalising flow: a perceptron, and the log-density along it.

mod tiles;
mod trace;

use candle_core::backprop::GradStore;
use candle_core::{Result, Shape, Tensor};
use pulp::Simd;

use super::linear::{matmul, sum_of_rows, transposed_matmul};
use super::mlp::Affine;
use super::{wrong_state, Mlp};
use crate::error::Error;
use crate::field::{Cotangents, Offer, Pullback, VectorField};
use crate::offer::Offered;
use crate::rows::RowField;
use crate::simd::Element;
use crate::state::RowLayout;
use crate::time::Time;
use tiles::CnfTiles;
use trace::Trace;

/// A continuous normalising flow: z' = g(t, z) and l' = −tr ∂g/∂z for an [`Mlp`] g, the trace
/// exact.
///
/// z: `(…, features)`, l: `(…, 1)`, with the same rows.  Along a solution, l grows by
/// log p(z(t)) − log p(z(0)), whatever the density p at the start (R. T. Q. Chen and others, "Neural ordinary differential
/// equations", NeurIPS 2018, theorem 1).
///
/// Let W_i be the weights of layer i, `(outputs, inputs)`, d_i the derivatives of the activation of hidden layer i, and D_i
/// the diagonal matrix of d_i.  With one or two hidden layers, the trace costs as much as g itself, however many features
/// there are: tr W₃ D₂ W₂ D₁ W₁ = d₂ᵀ B d₁ with B = W₂ ∘ (W₁ W₃)ᵀ.  With more hidden layers it costs as much as g for
/// each feature.
///
/// Where an `Mlp` is integrated tile by tile, such a field is too, unless it has no hidden layer, or
/// has more than two of them and features · (n₁ n₂ + n_{L−1} n_L) is above 2²², for L hidden layers of
/// widths n₁ … n_L.
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_diffeq::nn::{Activation, Cnf, Mlp};
/// use candle_diffeq::NeuralOde;
/// let (vars, device) = (candle_nn::VarMap::new(), Device::Cpu);
/// let flow = NeuralOde::from_field(&vars, "flow", DType::F32, &device, |vb| {
///     Cnf::new(Mlp::new(&[2, 64, 64, 2], Activation::Tanh, vb)?)
/// })?;
/// let z0 = Tensor::randn(0f32, 1.0, (8, 2), &device)?;
/// let l0 = Tensor::zeros((8, 1), DType::F32, &device)?;
/// let (zs, ls) = flow.solve(&(z0, l0), &[0.0, 1.0])?;
/// assert_eq!((zs.dims(), ls.dims()), ([2, 8, 2].as_slice(), [2, 8, 1].as_slice()));
/// # Ok::<(), candle_diffeq::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Cnf {
    mlp: Mlp,
}

impl Cnf {
    /// The flow of a perceptron, with time or without.
    ///
    /// # Errors
    /// If the perceptron is [`residual`](Mlp::residual).
    ///
    /// ```
    /// use candle_core::{DType, Device};
    /// use candle_diffeq::nn::{Activation, Cnf, Mlp};
    /// let vb = candle_nn::VarBuilder::zeros(DType::F32, &Device::Cpu);
    /// let mlp = Mlp::with_time(&[2, 16, 2], Activation::Softplus, vb)?;
    /// assert!(Cnf::new(mlp.clone()).is_ok());
    /// assert!(Cnf::new(mlp.residual()).is_err());
    /// # Ok::<(), candle_core::Error>(())
    /// ```
    pub fn new(mlp: Mlp) -> Result<Self> {
        if mlp.residual {
            candle_core::bail!(
                "the exact trace of a residual Mlp is not implemented: leave out Mlp::residual, or estimate the trace by nn::Hutchinson"
            )
        }
        Ok(Self { mlp })
    }

    /// Features of z.
    pub fn features(&self) -> usize {
        self.mlp.features()
    }

    /// Whether these are the shapes of a state (z, l).
    fn fits(&self, z: &[usize], l: &[usize]) -> bool {
        match (z.split_last(), l.split_last()) {
            (Some((features, rows)), Some((1, of))) => *features == self.features() && rows == of,
            _ => false,
        }
    }

    fn check(&self, (z, l): &(Tensor, Tensor)) -> Result<()> {
        if self.fits(z.dims(), l.dims()) {
            return Ok(());
        }
        let features = self.features();
        let field = format!("a Cnf of {features} features");
        let needs = format!("z (…, {features}) and l (…, 1) with the same rows");
        Err(wrong_state(field, needs, &[z, l]))
    }
}

/// One evaluation, and what its pull-back reads.
struct CnfEvaluation {
    mlp: Mlp,
    /// z'.
    velocity: Tensor,
    /// What every layer read.
    inputs: Vec<Tensor>,
    /// Of the hidden layers.
    hidden: Vec<Tensor>,
    slopes: Vec<Tensor>,
    trace: Trace,
}

impl CnfEvaluation {
    /// Of a perceptron [`at`](Mlp::at) a time.
    fn new(mlp: Mlp, z: &Tensor) -> Result<Self> {
        let (velocity, inputs, hidden) = mlp.run(z)?;
        let slope = |(z, value)| mlp.activation.slope(z, value);
        let values = hidden.iter().zip(&inputs[1..]);
        let slopes = values.map(slope).collect::<Result<Vec<_>>>()?;
        let weights = mlp.layers.iter().map(|l| l.weight.clone()).collect();
        Ok(Self {
            trace: Trace::new(weights, slopes.clone())?,
            mlp,
            velocity,
            inputs,
            hidden,
            slopes,
        })
    }

    /// The velocity of (z, l), l' in the shape and dtype of l.
    fn velocities(&self, l: &Tensor) -> Result<(Tensor, Tensor)> {
        let trace = self.trace.value(l.elem_count())?;
        let k = trace.neg()?.reshape(l.shape())?.to_dtype(l.dtype())?;
        Ok((self.velocity.clone(), k))
    }

    /// vᵀ∂f of `v` = (v_z, v_l), the gradients as those of the `layers` that were at time t: of z,
    /// `(row, feature)`, of time, and of the parameters.
    fn pull(
        &self,
        layers: &Mlp,
        t: Option<&Tensor>,
        (v, v_l): &(Tensor, Tensor),
    ) -> Result<(Tensor, Option<Tensor>, GradStore)> {
        let (mut params, mut of_time) = (GradStore::default(), None);
        let c = v_l.neg()?.reshape(((), 1))?.to_dtype(v.dtype())?;
        let bent = self.trace.pull(&c)?;
        let mut g = v.reshape(((), self.mlp.features()))?;
        for (l, layer) in self.mlp.layers.iter().enumerate().rev() {
            if let Some(z) = self.hidden.get(l) {
                let (value, slope) = (&self.inputs[l + 1], &self.slopes[l]);
                let curvature = self.mlp.activation.curvature(z, value, slope)?;
                g = ((g * slope)? + (curvature * &bent.slopes[l])?)?;
            }
            let weight_bar = || transposed_matmul(&g, &self.inputs[l])? + &bent.weights[l];
            let sums = || sum_of_rows(&g);
            of_time = layers.add_gradients(l, sums, weight_bar, t, &mut params)?;
            g = matmul(&g, &layer.weight)?;
        }
        Ok((g, of_time, params))
    }
}

impl Cnf {
    /// Whether it can be integrated tile by tile.
    pub(super) fn has_tiles(&self) -> bool {
        let outputs = self.mlp.layers.iter().map(Affine::outputs);
        let widths = std::iter::once(self.features()).chain(outputs);
        tiles::are_for(&widths.collect::<Vec<_>>())
    }
}

impl VectorField<(Tensor, Tensor)> for Cnf {
    fn velocity(&self, t: &Time, y: &(Tensor, Tensor)) -> Result<(Tensor, Tensor)> {
        self.check(y)?;
        CnfEvaluation::new(self.mlp.at(t)?.like(&y.0)?, &y.0)?.velocities(&y.1)
    }

    fn vjp<'f>(
        &'f self,
        t: &Time,
        y: &(Tensor, Tensor),
    ) -> Result<((Tensor, Tensor), Pullback<'f, (Tensor, Tensor)>)> {
        self.check(y)?;
        let mlp = self.mlp.detached().at(t)?.detached().like(&y.0)?;
        let at = CnfEvaluation::new(mlp, &y.0.detach())?;
        let t = self.mlp.time_of(t)?;
        let k = at.velocities(&y.1)?;
        let (shape, l) = (y.0.shape().clone(), y.1.detach());
        let pull = move |v: &(Tensor, Tensor)| {
            let (g, t, params) = at.pull(&self.mlp, t.as_ref(), v)?;
            Ok(Cotangents {
                y: (g.reshape(&shape)?, l.zeros_like()?),
                t,
                params,
            })
        };
        Ok((k, Box::new(pull)))
    }

    fn parameters(&self) -> Option<Vec<Tensor>> {
        let tracked = self.mlp.tensors().filter(|p| p.track_op());
        Some(tracked.cloned().collect())
    }

    fn offer(&self) -> Option<Offer> {
        Some(Offered::of::<(Tensor, Tensor), _>(self, self.has_tiles()).into())
    }
}

impl RowField for Cnf {
    type Tiles<T: Element> = CnfTiles<T>;

    fn weights(&self) -> Vec<Tensor> {
        self.mlp.tensors().cloned().collect()
    }

    fn reads_time(&self) -> bool {
        self.mlp.time
    }

    fn layout(&self, shapes: &[Shape]) -> Option<RowLayout> {
        let [z, l] = shapes else { return None };
        self.fits(z.dims(), l.dims()).then(|| RowLayout {
            rows: l.elem_count(),
            features: vec![self.features(), 1],
        })
    }

    fn tiles<T: Element, S: Simd>(
        &self,
        s: S,
        _: &[Shape],
    ) -> std::result::Result<CnfTiles<T>, Error> {
        Ok(CnfTiles::new(s, &self.mlp)?)
    }
}
