//! What can be wrong with a stochastic differential equation and its solve.

use candle_core::Shape;

/// A stochastic differential equation that cannot be solved as asked for.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum SdeDefect {
    /// The method converges to the solution of the other calculus.
    #[error("{method} converges to the {of} solution, and the equation is in the sense of {given}: take a method whose SdeMethod::calculus is {given}, or convert the drift f and state the equation in the sense of {of} (for diagonal noise, the drift of Stratonovich is that of Itô less ½ g ∂g/∂y)")]
    Calculus {
        /// The method.
        method: &'static str,
        /// The calculus whose solution the method converges to.
        of: &'static str,
        /// The calculus of the equation.
        given: &'static str,
    },
    /// General noise above strong order ½.
    #[error("{method} on general noise: unless the noise is diagonal, scalar or additive (for a method with a Milstein term: diagonal or scalar), a strong order above ½ needs the Lévy areas ∫∫ dW_i dW_j of each step, which increments do not determine; take EULER_MARUYAMA, EULER_HEUN, HEUN, MIDPOINT or REVERSIBLE_HEUN")]
    LevyAreas {
        /// The method.
        method: &'static str,
    },
    /// The method is for additive noise.
    #[error("{method} is for additive noise only: its order rests on a diffusion that does not read the state; declare it by Sde::additive if it does not, or take SRI2 for diagonal or scalar noise, EULER_MARUYAMA for general noise")]
    NeedsAdditive {
        /// The method.
        method: &'static str,
    },
    /// Noise that was declared additive is not.
    #[error("the diffusion was declared additive, but its derivative with respect to the state is not zero at step {step}, t = {t:?}: leave out Sde::additive, or let the diffusion not read the state")]
    NotAdditive {
        /// Index of the step.
        step: usize,
        /// Time at its start.
        t: f64,
    },
    /// A method with the derivative of the diffusion, of an equation that does not bring it.
    #[error("{method} evaluates g ∂g/∂y, which the equation does not give: add it by Sde::milstein_term, or take the method without derivatives")]
    NoMilsteinTerm {
        /// The method.
        method: &'static str,
    },
    /// The diffusion returned something that does not fit the state and the declared noise.
    #[error("{noise} noise: the diffusion returned tensor {leaf} of shape {got:?}, expected {expected:?}")]
    DiffusionShape {
        /// The declared noise.
        noise: &'static str,
        /// Index of the tensor.
        leaf: usize,
        /// The shape that fits.
        expected: Shape,
        /// What was returned.
        got: Shape,
    },
    /// The diffusion returned more tensors than the state has.
    #[error("the diffusion returned {got} tensors, the state has {state}: the diffusion returns one tensor for each of the first state tensors, and those that follow have no noise")]
    DiffusionCount {
        /// Tensors of the state.
        state: usize,
        /// Tensors of the diffusion.
        got: usize,
    },
    /// A tensor of the state has no row.
    #[error("state tensor {leaf} is a single number: the first dimension of every tensor is that of rows, whose noise is independent")]
    NoRows {
        /// Index of the tensor.
        leaf: usize,
    },
    /// Tensors of the state have different numbers of rows.
    #[error("state tensor {leaf} has {got} rows, the first has {expected}: the noise of a row is that of all its tensors")]
    Rows {
        /// Index of the tensor.
        leaf: usize,
        /// Rows of the first tensor.
        expected: usize,
        /// Its own rows.
        got: usize,
    },
    /// Given increments do not fit the solve.
    #[error("increments of shape {got:?} were given, the solve has {steps} steps of {rows} rows with {channels} channels of noise")]
    Increments {
        /// Steps of the solve.
        steps: usize,
        /// Rows of the state.
        rows: usize,
        /// Channels of noise of a row.
        channels: usize,
        /// Shape that was given.
        got: Shape,
    },
    /// Increments without their integrals, for a method that needs them.
    #[error("{method} needs the integrals U = ∫(W − W(t)) ds of the given increments: Increments::with_integrals")]
    NoIntegrals {
        /// The method.
        method: &'static str,
    },
    /// Integrals of another shape than their increments, or coarsening by a number that does not divide the steps.
    #[error("{what}: {got} where {expected} is needed")]
    Mismatch {
        /// What does not fit.
        what: &'static str,
        /// What would.
        expected: String,
        /// What was given.
        got: String,
    },
    /// A tree with more levels than can be counted.
    #[error("a Brownian tree cannot have depth {depth}: 52 is the most")]
    Depth {
        /// The depth.
        depth: u32,
    },
    /// A step that a tree does not resolve.
    #[error("the step of length {h:e} at t = {t:?} is shorter than the finest interval of the Brownian tree, {finest:e}: take a deeper tree")]
    TreeTooCoarse {
        /// Start of the step.
        t: f64,
        /// Its length.
        h: f64,
        /// The shortest interval of the tree.
        finest: f64,
    },
    /// A solve backward in time.
    #[error("times must increase: the noise of a step is independent of what was before it, not of what follows")]
    BackwardTime,
    /// Gradients with respect to time.
    #[error("the times of a stochastic differential equation receive no gradients: a path of W is not differentiable; give them as numbers")]
    TimeGradients,
    /// Adaptive steps of an equation in the sense of Itô.
    #[error("adaptive steps of an Itô equation: a step whose length was chosen by the noise inside of it is not independent of that noise, and Itô's sums then have another limit; convert the drift (Stratonovich = Itô − ½ g ∂g/∂y) and take HEUN, or take fixed steps")]
    AdaptiveIto,
    /// Adaptive steps under general noise.
    #[error("adaptive steps under general noise: unless the noise is diagonal, scalar or additive, the solution is no continuous function of the increments, and its limit depends on how the steps were chosen by them (the Lévy areas are missing); take fixed steps")]
    AdaptiveGeneral,
    /// Adaptive steps under noise that was declared diagonal, and whose diffusion of a component reads another
    /// component that has noise, too.
    #[error("adaptive steps under noise that is declared diagonal, but whose diffusion of a component in state tensor {leaf} reads other components that have noise: as under general noise, the limit depends on how the steps were chosen; take fixed steps, or a diffusion that acts on each component by itself")]
    AdaptiveCoupled {
        /// Index of the tensor.
        leaf: usize,
    },
    /// More rows than there are numbers of rows, from which noise is computed.
    #[error("rows of noise are numbered by 32 bits, but their numbers go up to {end}: take fewer rows or samples (each sample of an initial state is a row)")]
    TooManyRows {
        /// The number behind the last.
        end: u128,
    },
    /// Several samples for each row of a part of a batch.
    #[error("{samples} samples for each initial state, with noise from row {first_row} on: rows of different parts of a batch would have the same noise; give each part its own seed")]
    SamplesOfPart {
        /// Samples of each initial state.
        samples: usize,
        /// The first row of the part in the whole batch.
        first_row: u64,
    },
    /// Adaptive steps of a method without an error estimate.
    #[error(
        "{method} does not estimate the error of a step, which adaptive steps need: take HEUN"
    )]
    NoEstimate {
        /// The method.
        method: &'static str,
    },
    /// Adaptive steps with noise that is a function of the steps.
    #[error("adaptive steps need noise that does not depend on the steps, so that an attempt which is rejected and tried again sees the same path: take a BrownianTree")]
    NotAPath,
    /// Outputs inside steps.
    #[error(
        "{what}: the states of a stochastic differential equation are returned at ends of steps"
    )]
    Steps {
        /// What was asked for.
        what: &'static str,
    },
    /// Compensated sums of the state.
    #[error("compensated sums of the state: the errors that noise leaves at affordable steps are far above those of rounding; take Precision without compensated, or an f64 state")]
    Compensated,
    /// The number of samples is zero.
    #[error("a solve takes at least one sample of each initial state: SdeOptions::samples is 0")]
    NoSamples,
}
