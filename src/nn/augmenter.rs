//! Augmentation: more features, so that a flow has more dimensions.

use candle_core::{Module, Result, Tensor};

/// Adds features to what a neural ODE starts from, before the solve: x ↦ [x, 0] or [x, g(x)].
///
/// A flow cannot change the topology of its space.  With more dimensions this is not necessary ("Augmented Neural
/// ODEs", arXiv 1904.01681; with g: "Dissecting Neural ODEs", arXiv 2002.08071).
///
/// ```
/// use candle_core::{DType, Device, Module, Tensor};
/// use candle_diffeq::nn::Augmenter;
/// let images = Tensor::ones((8, 1, 28, 28), DType::F32, &Device::Cpu)?;
/// assert_eq!(Augmenter::zeros(5).forward(&images)?.dims(), [8, 6, 28, 28]);
/// let points = Tensor::ones((8, 3), DType::F32, &Device::Cpu)?;
/// let first = Augmenter::zeros(2).before().forward(&points)?;
/// assert_eq!(first.to_vec2::<f32>()?[0], [0.0, 0.0, 1.0, 1.0, 1.0]);
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Augmenter<G = Zeros> {
    more: G,
    dim: usize,
    before: bool,
}

/// So many features, all zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Zeros(usize);

impl Augmenter<Zeros> {
    /// So many zeros, after the features, on dimension 1.
    pub fn zeros(features: usize) -> Self {
        Self::from_parts(Zeros(features))
    }
}

impl<G: Module> Augmenter<G> {
    /// g(x) after the features, on dimension 1, for a layer or any other module g.
    ///
    /// ```
    /// use candle_core::{DType, Device, Module, Tensor};
    /// use candle_diffeq::nn::{Augmenter, Linear};
    /// let vb = candle_nn::VarBuilder::zeros(DType::F32, &Device::Cpu);
    /// let augmenter = Augmenter::learned(Linear::new(3, 5, vb)?);
    /// let x = augmenter.forward(&Tensor::ones((8, 3), DType::F32, &Device::Cpu)?)?;
    /// assert_eq!(x.dims(), [8, 3 + 5]);
    /// # Ok::<(), candle_core::Error>(())
    /// ```
    pub fn learned(g: G) -> Self {
        Self::from_parts(g)
    }
}

impl<G> Augmenter<G> {
    fn from_parts(more: G) -> Self {
        Self {
            more,
            dim: 1,
            before: false,
        }
    }

    /// On another dimension.
    #[must_use]
    pub fn on(self, dim: usize) -> Self {
        Self { dim, ..self }
    }

    /// Before the features, not after.
    #[must_use]
    pub fn before(self) -> Self {
        Self {
            before: true,
            ..self
        }
    }

    fn join(&self, x: &Tensor, more: &Tensor) -> Result<Tensor> {
        match self.before {
            true => Tensor::cat(&[more, x], self.dim),
            false => Tensor::cat(&[x, more], self.dim),
        }
    }
}

impl Module for Augmenter<Zeros> {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let mut shape = x.dims().to_vec();
        let rank = shape.len();
        let Some(size) = shape.get_mut(self.dim) else {
            candle_core::bail!(
                "dimension {} cannot be augmented: the tensor has {rank} dimensions, numbered from 0",
                self.dim
            )
        };
        *size = self.more.0;
        self.join(x, &Tensor::zeros(shape, x.dtype(), x.device())?)
    }
}

impl<G: Module> Module for Augmenter<G> {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.join(x, &self.more.forward(x)?)
    }
}
