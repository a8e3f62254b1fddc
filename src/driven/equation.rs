//! What is said of a stochastic differential equation beside its parts.

/// The sense of g dW: where in a step g is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Calculus {
    /// At the start.
    Ito,
    /// In the middle; the chain rule is that of ordinary calculus.
    Stratonovich,
}

impl Calculus {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Ito => "Itô",
            Self::Stratonovich => "Stratonovich",
        }
    }
}

/// How the diffusion multiplies the noise of a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NoiseType {
    /// A Brownian motion for each component of the state, g of the state's shape; g_i reads y_i only (otherwise methods
    /// of strong order one have order ½).
    Diagonal,
    /// One Brownian motion for all components of a row, g of the state's shape.
    Scalar,
    /// A number of Brownian motions for a row, g of shape (…state, channels).
    General {
        /// Brownian motions of a row.
        channels: usize,
    },
}

impl NoiseType {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Diagonal => "diagonal",
            Self::Scalar => "scalar",
            Self::General { .. } => "general",
        }
    }
}

/// What is said of an equation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Equation {
    pub(crate) calculus: Calculus,
    pub(crate) noise: NoiseType,
    /// Whether the diffusion does not read the state.
    pub(crate) additive: bool,
    /// Whether the equation brings g ∂g/∂y.
    pub(crate) milstein_term: bool,
}
