//! OT-Flow: a flow along the negative gradient of a potential, with its transport costs.

mod evaluation;
mod tiles;

use candle_core::backprop::GradStore;
use candle_core::{Result, Shape, Tensor};
use candle_nn::{Init, VarBuilder};
use pulp::Simd;

use super::linear::sum_of_rows;
use super::spread::{row_sums, spread};
use super::{coefficients, wrong_state, Activation};
use crate::error::Error;
use crate::field::{Cotangents, Offer, Pullback, VectorField};
use crate::offer::Offered;
use crate::rows::RowField;
use crate::simd::Element;
use crate::state::RowLayout;
use crate::time::Time;
use evaluation::Evaluation;
use tiles::OtFlowTiles;

/// x' = −∇Φ(t, x) for the potential
///
/// Φ(s) = wᵀN(s) + ½ sᵀAᵀA s + cᵀs,  s = (x, t),
/// N(s) = u + σ(K₁u + b₁),  u = σ(K₀s + b₀),  σ(x) = log(eˣ + e⁻ˣ),
///
/// together with these integrals along the solution:
///
/// l' = tr ∇²Φ = −div x',  L' = ½‖∇Φ‖²,  R' = |∂Φ/∂t − ½‖∇Φ‖²|.
///
/// x: `(…, features)`; costs: `(…, 3)`, columns l, L, R, with the same rows.  Along a solution, l grows by log
/// p(x(t)) − log p(x(0)), as with [`Cnf`](super::Cnf); L is the cost of transport, and R measures how much the
/// potential violates the Hamilton–Jacobi–Bellman equation.  With weights α, a density is learnt by the least mean of
/// α_C (l − log N(x(1))) + L + α_R R over data x(0), from time 0 to 1.
///
/// Gradient and trace are exact.  An evaluation needs some products (rows × m) with (m × m), one of them for every
/// feature.  Where an [`Mlp`](super::Mlp) is integrated tile by tile, such a flow is too, unless features · m² is above
/// 2²².  Costs are summed in their own dtype: give them f32 if x is narrower
/// ([`leaf_precision`](crate::OdeOptions::leaf_precision)).
///
/// "OT-Flow: Fast and Accurate Continuous Normalizing Flows via Optimal Transport" (arXiv 2006.00104),
/// with one residual layer, as in its experiments.
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_diffeq::nn::OtFlow;
/// use candle_diffeq::NeuralOde;
/// let (vars, device) = (candle_nn::VarMap::new(), Device::Cpu);
/// let flow = NeuralOde::from_field(&vars, "phi", DType::F32, &device, |vb| {
///     OtFlow::new(2, 32, 2, vb)
/// })?;
/// let x0 = Tensor::randn(0f32, 1.0, (8, 2), &device)?;
/// let costs0 = Tensor::zeros((8, 3), DType::F32, &device)?;
/// let (xs, costs) = flow.solve(&(x0, costs0), &[0.0, 0.5, 1.0])?;
/// assert_eq!((xs.dims(), costs.dims()), ([3, 8, 2].as_slice(), [3, 8, 3].as_slice()));
/// # Ok::<(), candle_diffeq::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct OtFlow {
    /// K₀, `(width, features + 1)`, and b₀.
    open: [Tensor; 2],
    /// K₁, `(width, width)`, and b₁.
    inner: [Tensor; 2],
    /// `(width)`.
    w: Tensor,
    /// `(rank, features + 1)`.
    a: Tensor,
    /// `(features + 1)`.
    c: Tensor,
}

impl OtFlow {
    /// A potential of so many features of x, hidden units m, and rows of A; variables
    /// `open.weight`, `open.bias`, `inner.weight`, `inner.bias`, `w` (ones at first), `A` and `c`
    /// (zeros).
    ///
    /// # Errors
    /// Those of the builder; if a number is 0.
    pub fn new(features: usize, width: usize, rank: usize, vb: VarBuilder<'_>) -> Result<Self> {
        if features * width * rank == 0 {
            candle_core::bail!(
                "every size of an OtFlow must be at least 1, got {features} features, width {width}, rank {rank}"
            )
        }
        let layer = |inputs, vb: VarBuilder<'_>| {
            let layer = candle_nn::linear(inputs, width, vb.clone())?;
            Ok::<_, candle_core::Error>([layer.weight().clone(), vb.get(width, "bias")?])
        };
        let inputs = features + 1;
        let bound = (6.0 / (rank + inputs) as f64).sqrt();
        let uniform = Init::Uniform {
            lo: -bound,
            up: bound,
        };
        Ok(Self {
            open: layer(inputs, vb.pp("open"))?,
            inner: layer(width, vb.pp("inner"))?,
            w: vb.get_with_hints(width, "w", Init::Const(1.0))?,
            a: vb.get_with_hints((rank, inputs), "A", uniform)?,
            c: vb.get_with_hints(inputs, "c", Init::Const(0.0))?,
        })
    }

    fn features(&self) -> usize {
        self.c.elem_count() - 1
    }

    /// (x, t).
    fn point(&self, t: &Time, x: &Tensor) -> Result<SpaceTime> {
        let features = self.features();
        if x.dims().last() != Some(&features) {
            let field = format!("an OtFlow of {features} features");
            return Err(wrong_state(field, format!("x (…, {features})"), &[x]));
        }
        Ok(SpaceTime {
            x: x.reshape(((), features))?,
            // A copy: it may be a tensor that shows another time later.
            t: t.tensor()?.copy()?,
        })
    }

    /// K₀s + b₀, σ of it, and K₁u + b₁.
    fn layers(&self, s: &SpaceTime) -> Result<[Tensor; 3]> {
        let ([k0, b0], [k1, b1]) = (&self.open, &self.inner);
        let open = s.product(k0, Some(b0))?;
        let u = log_two_cosh(&open)?;
        let inner = (u.matmul(&k1.t()?)? + spread(b1, u.dim(0)?)?)?;
        Ok([open, u, inner])
    }

    /// Φ(t, x), `(…, 1)`.
    ///
    /// # Errors
    /// If x has not the features of the flow; those of candle's operations.
    pub fn potential(&self, t: &Time, x: &Tensor) -> Result<Tensor> {
        let s = self.point(t, x)?;
        let [_, u, inner] = self.layers(&s)?;
        let n = (u + log_two_cosh(&inner)?)?;
        let column = |v: &Tensor| v.reshape(((), 1));
        let quadratic = row_sums(&s.product(&self.a, None)?.sqr()?)?;
        let linear = s.product(&self.c.unsqueeze(0)?, None)?;
        let linear = (n.matmul(&column(&self.w)?)? + linear)?;
        let mut shape = x.dims().to_vec();
        shape[x.rank() - 1] = 1;
        (linear + (quadratic * 0.5)?)?.reshape(shape)
    }

    fn tensors(&self) -> [&Tensor; 7] {
        let ([k0, b0], [k1, b1]) = (&self.open, &self.inner);
        [k0, b0, k1, b1, &self.w, &self.a, &self.c]
    }

    /// The same without history.
    fn detached(&self) -> Self {
        let plain = |[k, b]: &[Tensor; 2]| [k.detach(), b.detach()];
        Self {
            open: plain(&self.open),
            inner: plain(&self.inner),
            w: self.w.detach(),
            a: self.a.detach(),
            c: self.c.detach(),
        }
    }

    /// Whether these are the shapes of a state (x, costs).
    fn fits(&self, x: &[usize], costs: &[usize]) -> bool {
        match (x.split_last(), costs.split_last()) {
            (Some((features, rows)), Some((3, of))) => *features == self.features() && rows == of,
            _ => false,
        }
    }

    fn check(&self, (x, costs): &(Tensor, Tensor)) -> Result<()> {
        if self.fits(x.dims(), costs.dims()) {
            return Ok(());
        }
        let features = self.features();
        let field = format!("an OtFlow of {features} features");
        let needs = format!("x (…, {features}) and costs (…, 3) with the same rows");
        Err(wrong_state(field, needs, &[x, costs]))
    }
}

/// s = (x, t), x `(row, feature)`.
///
/// What time adds to a product is formed in the precision of t, and rounded once; t is not.
struct SpaceTime {
    x: Tensor,
    t: Tensor,
}

impl SpaceTime {
    fn detach(&self) -> Self {
        Self {
            x: self.x.detach(),
            t: self.t.detach(),
        }
    }

    /// s Kᵀ + b, K with a last column for time, `(row, output)`.
    fn product(&self, k: &Tensor, b: Option<&Tensor>) -> Result<Tensor> {
        let (dim, wide) = (self.x.dim(1)?, coefficients(&self.t, k.dtype()));
        let t = self.t.to_dtype(wide)?;
        let mut start = k.narrow(1, dim, 1)?.squeeze(1)?.to_dtype(wide)?;
        start = start.broadcast_mul(&t)?;
        if let Some(b) = b {
            start = (start + b.to_dtype(wide)?)?;
        }
        let start = spread(&start.to_dtype(k.dtype())?, self.x.dim(0)?)?;
        self.x.matmul(&k.narrow(1, 0, dim)?.t()?.contiguous()?)? + start
    }

    /// gᵀ s, `(output, features + 1)`.
    fn outer(&self, g: &Tensor) -> Result<Tensor> {
        let wide = coefficients(&self.t, g.dtype());
        let sums = column_sums(g)?.t()?.to_dtype(wide)?;
        let of_time = sums.broadcast_mul(&self.t.to_dtype(wide)?)?;
        Tensor::cat(
            &[&g.t()?.matmul(&self.x)?, &of_time.to_dtype(g.dtype())?],
            1,
        )
    }
}

/// Σ over the rows, `(1, columns)`, as a product.
fn column_sums(x: &Tensor) -> Result<Tensor> {
    Tensor::ones((1, x.dim(0)?), x.dtype(), x.device())?.matmul(x)
}

/// log(eˣ + e⁻ˣ), whose slope is tanh.
fn log_two_cosh(x: &Tensor) -> Result<Tensor> {
    Activation::Softplus.forward(&(x * 2.0)?)? - x
}

impl VectorField<(Tensor, Tensor)> for OtFlow {
    fn velocity(&self, t: &Time, y: &(Tensor, Tensor)) -> Result<(Tensor, Tensor)> {
        self.check(y)?;
        Evaluation::new(self.clone(), self.point(t, &y.0)?, y.1.dtype())?.velocities(y)
    }

    fn vjp<'f>(
        &'f self,
        t: &Time,
        y: &(Tensor, Tensor),
    ) -> Result<((Tensor, Tensor), Pullback<'f, (Tensor, Tensor)>)> {
        self.check(y)?;
        let point = self.point(t, &y.0)?.detach();
        let at = Evaluation::new(self.detached(), point, y.1.dtype())?;
        let k = at.velocities(y)?;
        let (shape, costs) = (y.0.shape().clone(), y.1.detach());
        let pull = move |v: &(Tensor, Tensor)| {
            let (s_bar, gradients) = at.pull(v)?;
            let mut params = GradStore::default();
            for (p, gradient) in self.tensors().into_iter().zip(gradients) {
                if p.track_op() {
                    params.insert(p, gradient.reshape(p.shape())?);
                }
            }
            let d = self.features();
            Ok(Cotangents {
                y: (
                    s_bar.narrow(1, 0, d)?.contiguous()?.reshape(&shape)?,
                    costs.zeros_like()?,
                ),
                t: Some(sum_of_rows(&s_bar.narrow(1, d, 1)?)?.squeeze(0)?),
                params,
            })
        };
        Ok((k, Box::new(pull)))
    }

    fn parameters(&self) -> Option<Vec<Tensor>> {
        let tracked = self.tensors().into_iter().filter(|p| p.track_op());
        Some(tracked.cloned().collect())
    }
    fn offer(&self) -> Option<Offer> {
        let has_tiles = tiles::are_for(self.features(), self.w.elem_count());
        Some(Offered::of::<(Tensor, Tensor), _>(self, has_tiles).into())
    }
}

impl RowField for OtFlow {
    type Tiles<T: Element> = OtFlowTiles<T>;

    fn weights(&self) -> Vec<Tensor> {
        self.tensors().into_iter().cloned().collect()
    }

    fn reads_time(&self) -> bool {
        true
    }

    fn layout(&self, shapes: &[Shape]) -> Option<RowLayout> {
        let [x, costs] = shapes else { return None };
        self.fits(x.dims(), costs.dims()).then(|| RowLayout {
            rows: costs.elem_count() / 3,
            features: vec![self.features(), 3],
        })
    }

    fn tiles<T: Element, S: Simd>(
        &self,
        s: S,
        _: &[Shape],
    ) -> std::result::Result<OtFlowTiles<T>, Error> {
        Ok(OtFlowTiles::new(s, self)?)
    }
}
