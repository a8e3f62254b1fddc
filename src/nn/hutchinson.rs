//! A continuous normalising flow of any field that pushes tangents forward, its trace estimated.

mod tiles;

use candle_core::{Result, Shape, Tensor, D};
use pulp::Simd;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use rand_distr::StandardNormal;

use super::spread::{row_sums, spread};
use super::{wrong_state, Mlp};
use crate::error::Error;
use crate::field::{Offer, VectorField};
use crate::offer::Offered;
use crate::rows::RowField;
use crate::simd::Element;
use crate::state::RowLayout;
use crate::time::Time;
use tiles::HutchinsonTiles;

/// A vector field g(t, z) that pushes a tangent forward beside its velocity, as `jax.jvp`.
///
/// candle has no second derivatives, so a trace of ∂g/∂z that is computed by a pull-back cannot be differentiated.  A
/// tangent in ordinary operations can be differentiated.  [`Mlp`] is such a field; so is every closure `Fn(&Time,
/// &Tensor, &Tensor) -> candle_core::Result<(Tensor, Tensor)>`:
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_diffeq::nn::{Hutchinson, Jvp};
/// use candle_diffeq::Time;
/// // g(z) = sin(z W), with ∂g·e = cos(z W) ∘ (e W).
/// let w = Tensor::new(&[[0f64, 1.0], [-1.0, 0.5]], &Device::Cpu)?;
/// let g = move |_: &Time, z: &Tensor, e: &Tensor| {
///     let x = z.matmul(&w)?;
///     Ok((x.sin()?, (x.cos()? * e.matmul(&w)?)?))
/// };
/// let (t, z) = (Time::new(0.0, DType::F64, &Device::Cpu), Tensor::zeros((4, 2), DType::F64, &Device::Cpu)?);
/// let (k, tangent) = g.jvp(&t, &z, &z.ones_like()?)?;
/// assert_eq!(tangent.to_vec2::<f64>()?[0], [-1.0, 1.5]);
/// let _flow = Hutchinson::new(g);
/// # Ok::<(), candle_core::Error>(())
/// ```
pub trait Jvp {
    /// g(t, z) and ∂g/∂z · `tangent`, of z's shape and dtype, in operations that candle can trace to
    /// z and to the parameters.
    ///
    /// # Errors
    /// Whatever the model's operations return.
    fn jvp(&self, t: &Time, z: &Tensor, tangent: &Tensor) -> Result<(Tensor, Tensor)>;

    /// The perceptron that this field is: `Some` only if [`jvp`](Self::jvp) is that of this perceptron, with the same
    /// parameters, because then a solve may evaluate the perceptron and not call `jvp`.
    #[doc(hidden)]
    fn perceptron(&self) -> Option<&Mlp> {
        None
    }
}

impl<F> Jvp for F
where
    F: Fn(&Time, &Tensor, &Tensor) -> Result<(Tensor, Tensor)>,
{
    fn jvp(&self, t: &Time, z: &Tensor, tangent: &Tensor) -> Result<(Tensor, Tensor)> {
        self(t, z, tangent)
    }
}

impl Jvp for Mlp {
    fn jvp(&self, t: &Time, z: &Tensor, tangent: &Tensor) -> Result<(Tensor, Tensor)> {
        self.check(z)?;
        self.check(tangent)?;
        let last = self.layers.len() - 1;
        let mut x = z.reshape(((), self.features()))?;
        let mut e = tangent.reshape(((), self.features()))?;
        // Time has no tangent.
        for (l, layer) in self.at(t)?.like(z)?.layers.iter().enumerate() {
            let ahead = e.matmul(&layer.weight.t()?)?;
            let bias = spread(&layer.bias, x.dim(0)?)?;
            let sum = (x.matmul(&layer.weight.t()?)? + bias)?;
            let (value, ahead) = match l == last {
                true => (sum, ahead),
                false => {
                    let value = self.activation.forward(&sum)?;
                    let slope = self.activation.slope(&sum, &value)?;
                    (value, (slope * ahead)?)
                }
            };
            (x, e) = match l < last && self.skips(l) {
                true => ((value + x)?, (ahead + e)?),
                false => (value, ahead),
            };
        }
        Ok((x.reshape(z.shape())?, e.reshape(z.shape())?))
    }

    fn perceptron(&self) -> Option<&Mlp> {
        Some(self)
    }
}

/// A continuous normalising flow of any field g that can push tangents forward: z' = g(t, z) and
/// l' = −εᵀ(∂g/∂z)ε, whose mean over probes ε of covariance 1 is −tr ∂g/∂z.
///
/// z: `(…, features)`, l: `(…, 1)`, ε as z.  The probe is the third tensor of the state and stays constant (ε' = 0).
/// So it is the same for a whole solve, forward and backward, and every solve can have another probe; its gradient is
/// zero.  An evaluation needs one tangent, however many features there are.  If there are few features, or if g is a
/// perceptron of one or two hidden layers, the exact trace of [`Cnf`](super::Cnf) costs no more.
///
/// On the CPU, the flow of an [`Mlp`] is integrated tile by tile.
///
/// Hutchinson's estimator, as in "FFJORD" (arXiv 1810.01367), with a tangent in place of the cotangent.
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_diffeq::nn::{Activation, Hutchinson, Mlp, Probe};
/// use candle_diffeq::NeuralOde;
/// let (vars, device) = (candle_nn::VarMap::new(), Device::Cpu);
/// let flow = NeuralOde::from_field(&vars, "flow", DType::F32, &device, |vb| {
///     Ok(Hutchinson::new(Mlp::with_time(&[5, 32, 32, 32, 5], Activation::Softplus, vb)?))
/// })?;
/// let z0 = Tensor::randn(0f32, 1.0, (8, 5), &device)?;
/// let l0 = Tensor::zeros((8, 1), DType::F32, &device)?;
/// let probe = Probe::Rademacher.sample(&z0, 0)?;
/// let (zs, ls, _) = flow.solve(&(z0, l0, probe), &[0.0, 1.0])?;
/// assert_eq!((zs.dims(), ls.dims()), ([2, 8, 5].as_slice(), [2, 8, 1].as_slice()));
/// # Ok::<(), candle_diffeq::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Hutchinson<G> {
    field: G,
}

impl<G: Jvp> Hutchinson<G> {
    /// The flow of a field.
    pub fn new(field: G) -> Self {
        Self { field }
    }
}

impl<G: Jvp> VectorField<(Tensor, Tensor, Tensor)> for Hutchinson<G> {
    fn velocity(
        &self,
        t: &Time,
        (z, l, probe): &(Tensor, Tensor, Tensor),
    ) -> Result<(Tensor, Tensor, Tensor)> {
        let rows = |x: &Tensor| x.dims().split_last().map(|(_, rows)| rows.to_vec());
        let thin = l.dims().last() == Some(&1);
        if z.dims() != probe.dims() || rows(z) != rows(l) || !thin {
            let needs =
                "z and its probe (…, features) and l (…, 1) with the same rows, (z, l, probe)";
            let got = [z, l, probe];
            return Err(wrong_state("a Hutchinson flow".into(), needs.into(), &got));
        }
        let probe = probe.detach();
        let (k, tangent) = self.field.jvp(t, z, &probe)?;
        let products = (tangent.to_dtype(l.dtype())? * probe.to_dtype(l.dtype())?)?;
        let products = products.reshape(((), z.dim(D::Minus1)?))?;
        let trace = row_sums(&products)?.reshape(l.shape())?;
        Ok((k, trace.neg()?, probe.zeros_like()?))
    }

    /// The probe is one draw of many, whose gradient nobody asks for.
    fn is_constant_in(&self, leaf: usize) -> bool {
        leaf == 2
    }

    /// Those of a perceptron; others are found.
    fn parameters(&self) -> Option<Vec<Tensor>> {
        self.field.perceptron()?.parameters()
    }

    fn offer(&self) -> Option<Offer> {
        let flow = Hutchinson::new(self.field.perceptron()?.clone());
        Some(Offered::of::<(Tensor, Tensor, Tensor), _>(&flow, true).into())
    }
}

impl RowField for Hutchinson<Mlp> {
    type Tiles<T: Element> = HutchinsonTiles<T>;

    fn weights(&self) -> Vec<Tensor> {
        self.field.weights()
    }

    fn reads_time(&self) -> bool {
        self.field.reads_time()
    }

    fn layout(&self, shapes: &[Shape]) -> Option<RowLayout> {
        let [z, l, probe] = shapes else { return None };
        let (features, rows) = z.dims().split_last()?;
        let (thin, of) = l.dims().split_last()?;
        let fits = *features == self.field.features() && (*thin, of) == (1, rows);
        (fits && z == probe).then(|| RowLayout {
            rows: l.elem_count(),
            features: vec![*features, 1, *features],
        })
    }

    fn tiles<T: Element, S: Simd>(
        &self,
        s: S,
        shapes: &[Shape],
    ) -> std::result::Result<HutchinsonTiles<T>, Error> {
        Ok(HutchinsonTiles::new(self.field.tiles(s, shapes)?))
    }
}

/// Distributions of probes, of mean 0 and covariance 1.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Probe {
    /// ±1, each with probability ½: of all distributions the one whose estimate varies least.
    #[default]
    Rademacher,
    /// Normal.
    Gaussian,
}

impl Probe {
    /// A probe for states like z, the same for the same seed.
    ///
    /// # Errors
    /// If the tensor cannot be made on z's device, in its dtype.
    pub fn sample(self, z: &Tensor, seed: u64) -> Result<Tensor> {
        let mut rng = StdRng::seed_from_u64(seed);
        let number = |_| match self {
            Self::Rademacher if rng.random() => 1.0,
            Self::Rademacher => -1.0,
            Self::Gaussian => rng.sample::<f32, _>(StandardNormal),
        };
        let numbers: Vec<f32> = (0..z.elem_count()).map(number).collect();
        Tensor::from_vec(numbers, z.shape(), z.device())?.to_dtype(z.dtype())
    }
}
