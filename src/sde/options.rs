//! Options of a solve of a stochastic differential equation.

use crate::driven::methods::EULER_MARUYAMA;
use crate::driven::SdeMethod;
use crate::field::check::FieldCheck;
use crate::gradient::Gradient;
use crate::precision::Precision;
use crate::problem::OdeOptions;
use crate::scaler::{OnOverflow, Scaling};
use crate::schedule::{Output, Steps};
use crate::stats::Recorder;
use crate::tableau::BOSH3;
use crate::trajectory::Checkpoint;

/// Options of a solve: the method for an SDE, and what [`OdeOptions`] has that applies to its steps.
///
/// ```
/// use candle_diffeq::Precision;
/// use candle_diffeq::options::{Checkpoint, Steps};
/// use candle_diffeq::sde::{SdeOptions, HEUN};
/// let options = SdeOptions {
///     method: HEUN,
///     precision: Some(Precision::bf16()),
///     steps: Steps::Size(0.01),
///     checkpoint: Checkpoint::Every(100),
///     ..Default::default()
/// };
/// # let _ = options;
/// ```
#[derive(Clone, Debug)]
pub struct SdeOptions {
    /// The method.  Default [`EULER_MARUYAMA`].
    pub method: SdeMethod,
    /// As [`OdeOptions::precision`].
    pub precision: Option<Precision>,
    /// As [`OdeOptions::leaf_precision`].
    pub leaf_precision: Vec<Precision>,
    /// How intervals between times are cut into steps.  Default: one step each.
    ///
    /// With [`Steps::Adaptive`] they are as long as a tolerance permits.  This needs [`HEUN`](super::HEUN), a
    /// [`BrownianTree`](super::BrownianTree) as noise, and one of these: additive noise (of Itô or of Stratonovich); or, in
    /// the sense of Stratonovich, scalar noise, or diagonal noise in which the diffusion of a component reads no other
    /// component that has noise.  A perceptron as diffusion is therefore refused.  All rows have the same steps, and a step
    /// ends at every time of the solve.  The first attempt is a hundredth of the interval, or as long as
    /// [`Adaptive::max_step`](crate::options::Adaptive::max_step) permits or a jump leaves if this is shorter, but not shorter
    /// than the finest interval of the tree.  [`Adaptive::first_step`](crate::options::Adaptive::first_step) sets another.
    pub steps: Steps,
    /// How many solutions (samples) of each initial state are computed.  Every sample has its own noise.  Default: one.
    ///
    /// With n samples the state has n times the rows of y0: first the rows of the first sample, then the rows of the
    /// second sample, and so on.  Do not repeat y0 yourself.  The gradient of y0 is the sum over the samples.
    ///
    /// ```
    /// use candle_core::{DType, Device, Tensor};
    /// use candle_diffeq::Time;
    /// use candle_diffeq::options::{Output, Steps};
    /// use candle_diffeq::sde::{ito, predict, Noise, SdeOptions};
    /// let sde = ito(|_: &Time, y: &Tensor| y.neg(), |_: &Time, y: &Tensor| y.ones_like()).additive();
    /// let options = SdeOptions {
    ///     samples: 500,
    ///     steps: Steps::PerInterval(20),
    ///     output: Output::Final,
    ///     ..Default::default()
    /// };
    /// let y0 = Tensor::new(&[[0f32], [5.0]], &Device::Cpu)?;
    /// let y = predict(&sde, &y0, &[0.0, 1.0], &Noise::seeded(2), &options)?;       // (500 · 2, 1)
    /// let means = y.reshape((500, 2))?.mean(0)?.to_vec1::<f32>()?;
    /// assert!(means[0].abs() < 0.1 && (means[1] - 5.0 * (-1f32).exp()).abs() < 0.15);
    /// # Ok::<(), candle_diffeq::Error>(())
    /// ```
    pub samples: usize,
    /// Which states are returned.  Default: all.
    pub output: Output,
    /// How gradients are computed.  Default: [`Gradient::Discrete`].
    ///
    /// With [`Gradient::Backsolve`] they are those of the stochastic adjoint, for comparison and if memory is short: y, λ and
    /// the gradients are solved backward from output to output along the same increments, by the method and the steps of
    /// the forward pass (X. Li and others, AISTATS 2020).  It can be had in the sense of Stratonovich, or with additive
    /// noise, with fixed steps of [`EULER_HEUN`](super::EULER_HEUN), [`HEUN`](super::HEUN) or
    /// [`MIDPOINT`](super::MIDPOINT) ([`EULER_MARUYAMA`] for additive noise), and without gradients of given increments.
    /// Its [`AdjointSolve`](crate::options::AdjointSolve) has no options of its own.
    /// Its error falls with the strong order of the method; that of the discrete adjoint is zero with respect to the steps.
    ///
    /// ```
    /// use candle_core::{DType, Device, Tensor, Var};
    /// use candle_diffeq::Time;
    /// use candle_diffeq::options::{AdjointSolve, Gradient, Output, Steps};
    /// use candle_diffeq::sde::{sdeint, stratonovich, Noise, SdeOptions, HEUN};
    /// let sde = stratonovich(|_: &Time, y: &Tensor| y * 0.5, |_: &Time, y: &Tensor| y * 0.2);
    /// let options = SdeOptions {
    ///     method: HEUN,
    ///     steps: Steps::PerInterval(200),
    ///     output: Output::Final,
    ///     gradient: Gradient::Backsolve(AdjointSolve::new()),
    ///     ..Default::default()
    /// };
    /// let y0 = Var::ones((3, 1), DType::F64, &Device::Cpu)?;
    /// let y = sdeint(sde, y0.as_tensor(), &[0.0, 1.0], &Noise::seeded(7), &options)?;
    /// let grads = y.sum_all()?.backward()?;
    /// // Geometric Brownian motion: ∂y/∂y0 = y/y0.
    /// let error = (grads.get(&y0).unwrap() - &y)?.abs()?.max_all()?.to_scalar::<f64>()?;
    /// assert!(error < 1e-3);
    /// # Ok::<(), candle_diffeq::Error>(())
    /// ```
    pub gradient: Gradient,
    /// What is kept for the backward pass; noise never is.  Default: every state.
    pub checkpoint: Checkpoint,
    /// Whether an equation is integrated tile by tile on the CPU if this is possible; see [`sde`](crate::sde) for the
    /// conditions.  Default: yes.  With and without tiles, the noise has the same bits, and the results agree up to
    /// rounding.
    pub fusion: bool,
    /// As [`OdeOptions::scaling`].
    pub scaling: Scaling,
    /// As [`OdeOptions::on_overflow`].
    pub on_overflow: OnOverflow,
    /// As [`OdeOptions::check`], of drift and diffusion together.
    pub check: FieldCheck,
    /// Where statistics go.  An evaluation is one of the drift or of the diffusion.  Default: nowhere.
    pub recorder: Option<Recorder>,
}

impl Default for SdeOptions {
    fn default() -> Self {
        let ode = OdeOptions::default();
        Self {
            method: EULER_MARUYAMA,
            precision: ode.precision,
            leaf_precision: ode.leaf_precision,
            steps: ode.steps,
            samples: 1,
            output: ode.output,
            gradient: ode.gradient,
            checkpoint: ode.checkpoint,
            fusion: ode.fusion,
            scaling: ode.scaling,
            on_overflow: ode.on_overflow,
            check: ode.check,
            recorder: ode.recorder,
        }
    }
}

impl SdeOptions {
    /// The same for the parts of the crate that know ordinary equations; the method is not among them.
    pub(super) fn ode(&self) -> OdeOptions {
        let ode = OdeOptions::default();
        let (steps, method) = match &self.steps {
            // States are returned at ends of steps.  A pair, since the options ask for one: its estimate is replaced by
            // that of the method for SDEs.
            Steps::Adaptive(adaptive) => {
                let steps = Steps::Adaptive(adaptive.clone().step_on_outputs(true));
                (steps, BOSH3)
            }
            fixed => (fixed.clone(), ode.method.clone()),
        };
        OdeOptions {
            method,
            steps,
            precision: self.precision,
            leaf_precision: self.leaf_precision.clone(),
            output: self.output,
            gradient: self.gradient.clone(),
            checkpoint: self.checkpoint,
            fusion: self.fusion,
            scaling: self.scaling,
            on_overflow: self.on_overflow,
            check: self.check,
            recorder: self.recorder.clone(),
            ..ode
        }
    }
}
