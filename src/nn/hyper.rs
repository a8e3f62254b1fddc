//! A continuous normalising flow whose weights are functions of time.

mod tiles;

use candle_core::backprop::GradStore;
use candle_core::{Result, Shape, Tensor};
use candle_nn::{Linear, Module, VarBuilder};
use pulp::Simd;

use super::{coefficients, wrong_state, Activation};
use crate::error::Error;
use crate::field::{Cotangents, Offer, Pullback, VectorField};
use crate::offer::Offered;
use crate::rows::RowField;
use crate::simd::Element;
use crate::state::RowLayout;
use crate::time::Time;
use tiles::HyperTiles;

/// A flow of one hidden layer whose weights a second network computes from time:
///
/// z' = 1/m Σ_j u_j tanh(w_j·z + b_j),  l' = −1/m Σ_j (1 − tanh²(w_j·z + b_j)) u_j·w_j,
///
/// with (W, U, G, b) = N(t), u_j = U_j σ(G_j), and N of two hidden tanh layers.  The trace is exact
/// and costs a product with a vector.
///
/// z: `(…, features)`, l: `(…, 1)`, with the same rows.  Along a solution, l grows by
/// log p(z(t)) − log p(z(0)), as with [`Cnf`](super::Cnf).  Sums over j that end in l are formed in
/// the dtype of l: give it f32 where z is narrower
/// ([`leaf_precision`](crate::OdeOptions::leaf_precision)).
///
/// With fixed steps, such a flow is integrated tile by tile where an [`Mlp`](super::Mlp) is, if the network N has at most
/// 128 hidden units in a layer.  All rows share the weights of a time, so rows cannot have adaptive steps of their own.
///
/// The flow of torchdiffeq's example of a continuous normalising flow, which the experiments of "Mixed
/// Precision Training of Neural ODEs" (arXiv 2510.23498) took up.
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_diffeq::nn::HyperCnf;
/// use candle_diffeq::NeuralOde;
/// let (vars, device) = (candle_nn::VarMap::new(), Device::Cpu);
/// let flow = NeuralOde::from_field(&vars, "flow", DType::F32, &device, |vb| {
///     HyperCnf::new(2, 64, 32, vb)                     // names 0, 1, 2 with weight and bias
/// })?;
/// let z1 = Tensor::randn(0f32, 1.0, (8, 2), &device)?;
/// let l1 = Tensor::zeros((8, 1), DType::F32, &device)?;
/// let (zs, ls) = flow.solve(&(z1, l1), &[1.0, 0.5, 0.0])?;
/// assert_eq!((zs.dims(), ls.dims()), ([3, 8, 2].as_slice(), [3, 8, 1].as_slice()));
/// # Ok::<(), candle_diffeq::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct HyperCnf {
    layers: Vec<Linear>,
    features: usize,
    width: usize,
}

impl HyperCnf {
    /// A flow of so many features and hidden units, and the hidden width of the network of time.
    ///
    /// # Errors
    /// Those of the builder; if a number is 0.
    pub fn new(features: usize, width: usize, hidden: usize, vb: VarBuilder<'_>) -> Result<Self> {
        if features * width * hidden == 0 {
            candle_core::bail!(
                "every size of a HyperCnf must be at least 1, got {features} features, width {width}, hidden {hidden}"
            )
        }
        let widths = [1, hidden, hidden, 3 * features * width + width];
        let layer = |(i, w): (usize, &[usize])| candle_nn::linear(w[0], w[1], vb.pp(i));
        let layers = widths.windows(2).enumerate().map(layer);
        Ok(Self {
            layers: layers.collect::<Result<_>>()?,
            features,
            width,
        })
    }

    fn tensors(&self) -> impl Iterator<Item = &Tensor> {
        self.layers
            .iter()
            .flat_map(|l| std::iter::once(l.weight()).chain(l.bias()))
    }

    /// Whether these are the shapes of a state (z, l).
    fn fits(&self, z: &[usize], l: &[usize]) -> bool {
        match (z.split_last(), l.split_last()) {
            (Some((features, rows)), Some((1, of))) => *features == self.features && rows == of,
            _ => false,
        }
    }

    fn check(&self, (z, l): &(Tensor, Tensor)) -> Result<()> {
        if self.fits(z.dims(), l.dims()) {
            return Ok(());
        }
        let field = format!("a HyperCnf of {} features", self.features);
        let needs = format!("z (…, {}) and l (…, 1) with the same rows", self.features);
        Err(wrong_state(field, needs, &[z, l]))
    }

    /// The network of time: what its layers read, and what the last one puts out, `(1, numbers)`.
    /// The first product with t is formed in the precision of t, and rounded once.
    fn weights(&self, t: &Time, like: &Tensor) -> Result<(Vec<Tensor>, Tensor)> {
        let t = t.tensor()?.reshape((1, 1))?;
        let wide = coefficients(&t, like.dtype());
        let mut x = t.to_dtype(wide)?;
        let mut inputs = vec![];
        for (l, layer) in self.layers.iter().enumerate() {
            inputs.push(x.clone());
            x = match layer.bias() {
                Some(bias) if l == 0 => {
                    let weight = layer.weight().t()?.to_dtype(wide)?;
                    let sum = (x.broadcast_mul(&weight)? + bias.to_dtype(wide)?.unsqueeze(0)?)?;
                    sum.to_dtype(like.dtype())?
                }
                _ => layer.forward(&x)?,
            };
            if l + 1 < self.layers.len() {
                x = Activation::Tanh.forward(&x)?;
            }
        }
        Ok((inputs, x))
    }

    /// One evaluation.
    fn evaluate(&self, numbers: &Tensor, (z, l): &(Tensor, Tensor)) -> Result<HyperEvaluation> {
        let (m, d) = (self.width, self.features);
        let block = |i: usize| numbers.narrow(1, i * m * d, m * d)?.reshape((m, d));
        let (w, u, gate) = (block(0)?, block(1)?, block(2)?);
        let bias = numbers.narrow(1, 3 * m * d, m)?;
        let gate = Activation::Sigmoid.forward(&gate)?;
        let v = ((&u * &gate)? * (1.0 / m as f64))?;
        let z = z.reshape(((), d))?;
        let h = z.matmul(&w.t()?)?.broadcast_add(&bias)?;
        let h = Activation::Tanh.forward(&h)?;
        // From here to l in the dtype of l.
        let wide = |x: &Tensor| x.to_dtype(l.dtype());
        let coupling = (wide(&v)? * wide(&w)?)?.sum_keepdim(1)?;
        Ok(HyperEvaluation {
            minus_slope: (wide(&h)?.sqr()? - 1.0)?,
            z,
            w,
            u,
            gate,
            v,
            h,
            coupling,
        })
    }
}

/// One evaluation, and what its pull-back reads.
struct HyperEvaluation {
    /// `(row, feature)`.
    z: Tensor,
    /// W, U, σ(G) and U σ(G) / m, `(unit, feature)`.
    w: Tensor,
    u: Tensor,
    gate: Tensor,
    v: Tensor,
    /// tanh, `(row, unit)`.
    h: Tensor,
    /// tanh² − 1, in the dtype of l.
    minus_slope: Tensor,
    /// v_j·w_j, `(unit, 1)`, in the dtype of l.
    coupling: Tensor,
}

impl HyperEvaluation {
    fn velocities(&self, (z, l): &(Tensor, Tensor)) -> Result<(Tensor, Tensor)> {
        Ok((
            self.h.matmul(&self.v)?.reshape(z.shape())?,
            self.minus_slope
                .matmul(&self.coupling)?
                .reshape(l.shape())?,
        ))
    }

    /// The cotangents of z, `(row, feature)`, and of the numbers that time's network put out.
    fn pull(&self, (g, c): &(Tensor, Tensor)) -> Result<(Tensor, Tensor)> {
        let (m, d) = self.w.dims2()?;
        let (narrow, wide) = (self.h.dtype(), self.minus_slope.dtype());
        let g = g.reshape(((), d))?;
        let c = c.reshape(((), 1))?;
        // l' = Σ (h² − 1) s: of s here, of h below.
        let s_bar = self.minus_slope.t()?.matmul(&c)?.to_dtype(narrow)?;
        let bend = (c * 2.0)?.matmul(&self.coupling.t()?)?;
        let bend = (bend * self.h.to_dtype(wide)?)?.to_dtype(narrow)?;
        let h_bar = (g.matmul(&self.v.t()?)? + bend)?;
        let x_bar = (h_bar * self.minus_slope.to_dtype(narrow)?)?.neg()?;
        let v_bar = (self.h.t()?.matmul(&g)? + self.w.broadcast_mul(&s_bar)?)?;
        let w_bar = (x_bar.t()?.matmul(&self.z)? + self.v.broadcast_mul(&s_bar)?)?;
        let v_bar = (v_bar * (1.0 / m as f64))?;
        let u_bar = (&v_bar * &self.gate)?;
        let gate_bar = ((v_bar * &self.u)? * (&self.gate * (1.0 - &self.gate)?)?)?;
        // Sums of columns as a product, which is the faster way.
        let ones = Tensor::ones((1, x_bar.dim(0)?), narrow, x_bar.device())?;
        let flat = |x: Tensor| x.reshape((1, m * d));
        let parts = [flat(w_bar)?, flat(u_bar)?, flat(gate_bar)?];
        let [w_bar, u_bar, gate_bar] = &parts;
        let numbers = Tensor::cat(&[w_bar, u_bar, gate_bar, &ones.matmul(&x_bar)?], 1)?;
        Ok((x_bar.matmul(&self.w)?, numbers))
    }
}

impl VectorField<(Tensor, Tensor)> for HyperCnf {
    fn velocity(&self, t: &Time, y: &(Tensor, Tensor)) -> Result<(Tensor, Tensor)> {
        self.check(y)?;
        let (_, numbers) = self.weights(t, &y.0)?;
        self.evaluate(&numbers, y)?.velocities(y)
    }

    fn vjp<'f>(
        &'f self,
        t: &Time,
        y: &(Tensor, Tensor),
    ) -> Result<((Tensor, Tensor), Pullback<'f, (Tensor, Tensor)>)> {
        self.check(y)?;
        let y = (y.0.detach(), y.1.detach());
        let plain = |l: &Linear| Linear::new(l.weight().detach(), l.bias().map(Tensor::detach));
        let plain = Self {
            layers: self.layers.iter().map(plain).collect(),
            ..*self
        };
        let (inputs, numbers) = plain.weights(t, &y.0)?;
        // Copies: that of time may be a tensor that shows another time later.
        let inputs = inputs.iter().map(|x| x.detach().copy());
        let inputs = inputs.collect::<Result<Vec<_>>>()?;
        let at = plain.evaluate(&numbers.detach(), &y)?;
        let k = at.velocities(&y)?;
        let pull = move |v: &(Tensor, Tensor)| {
            let (z_bar, mut g) = at.pull(v)?;
            let mut params = GradStore::default();
            for (l, layer) in self.layers.iter().enumerate().rev() {
                let (weight, x) = (layer.weight(), &inputs[l]);
                // That of time is wider.
                g = g.to_dtype(x.dtype())?;
                if weight.track_op() {
                    params.insert(weight, g.t()?.matmul(x)?);
                }
                if let Some(bias) = layer.bias().filter(|b| b.track_op()) {
                    params.insert(bias, g.squeeze(0)?);
                }
                g = g.matmul(&plain.layers[l].weight().to_dtype(g.dtype())?)?;
                if l > 0 {
                    g = (g * (1.0 - x.sqr()?)?)?;
                }
            }
            Ok(Cotangents {
                y: (z_bar.reshape(y.0.shape())?, y.1.zeros_like()?),
                t: Some(g.sum_all()?),
                params,
            })
        };
        Ok((k, Box::new(pull)))
    }

    fn parameters(&self) -> Option<Vec<Tensor>> {
        let tracked = self.tensors().filter(|p| p.track_op());
        Some(tracked.cloned().collect())
    }
    fn offer(&self) -> Option<Offer> {
        let hidden = self.layers.first().and_then(|l| l.weight().dims().first());
        let has_tiles = hidden.is_some_and(|hidden| tiles::are_for(*hidden));
        Some(Offered::of::<(Tensor, Tensor), _>(self, has_tiles).into())
    }
}

impl RowField for HyperCnf {
    type Tiles<T: Element> = HyperTiles<T>;

    fn weights(&self) -> Vec<Tensor> {
        self.tensors().cloned().collect()
    }

    fn reads_time(&self) -> bool {
        true
    }

    /// The weights of a time are those of all rows.
    fn shares_time(&self) -> bool {
        true
    }

    fn layout(&self, shapes: &[Shape]) -> Option<RowLayout> {
        let [z, l] = shapes else { return None };
        self.fits(z.dims(), l.dims()).then(|| RowLayout {
            rows: l.elem_count(),
            features: vec![self.features, 1],
        })
    }

    fn tiles<T: Element, S: Simd>(
        &self,
        s: S,
        _: &[Shape],
    ) -> std::result::Result<HyperTiles<T>, Error> {
        Ok(HyperTiles::new(s, self)?)
    }
}
