//! Methods for stochastic differential equations as data.
//!
//! dY = f dt + g dW over a step of length h.  With ξ = ΔW/√h and η = U/√h³, a method is a list of **evaluations** of the parts
//! of the equation and, for each state that a step carries, a **sum** that gives its next value.  The state at which a part
//! is evaluated is a sum, too:
//!
//! Σ_r base_r y_r + h Σ c f_j + √h Σ c φ(ξ, η) g_j + h Σ c φ(ξ, η) m_j
//!
//! over earlier evaluations f_j of the drift, g_j of the diffusion, m_j of g ∂g/∂y.  The functionals φ are those of Rößler's
//! methods in units of the step: 1, ξ, (ξ² − 1)/2, η and (ξ³ − 3ξ)/6, which stand for √h, I₁, I₁₁/√h, I₁₀/h and I₁₁₁/h.

use super::equation::{Calculus, Equation, NoiseType};
use crate::error::{Error, Result, SdeDefect};

/// A part of an equation, by its place among them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Part {
    Drift = 0,
    Diffusion = 1,
    /// g ∂g/∂y.
    MilsteinTerm = 2,
}

impl Part {
    /// What its evaluations are multiplied by.
    pub(crate) fn scale(self, h: f64) -> f64 {
        match self {
            Self::Drift | Self::MilsteinTerm => h,
            Self::Diffusion => h.sqrt(),
        }
    }
}

/// A function of the increments of a step, in units of its length.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Functional {
    /// 1.
    One,
    /// ξ.
    W,
    /// (ξ² − 1)/2.
    Ww,
    /// η.
    U,
    /// (ξ³ − 3ξ)/6.
    Www,
}

/// c φ(ξ, η) times an evaluation.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Term {
    pub(crate) of: usize,
    pub(crate) on: Functional,
    pub(crate) c: f64,
}

/// A linear combination of the carried states and of evaluations.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sum {
    pub(crate) base: &'static [f64],
    /// In the order of the evaluations.
    pub(crate) terms: &'static [Term],
}

/// Where and when a part is evaluated.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Evaluation {
    pub(crate) part: Part,
    /// At t + c h.
    pub(crate) c: f64,
    pub(crate) at: Sum,
}

/// The noise that a method is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Reach {
    /// Any, with strong order ½ where it is general.
    Any,
    /// Noise whose Lévy areas do not enter: diagonal, scalar, additive.
    NoAreas,
    /// Additive noise.
    Additive,
}

/// A second solution of a step, whose distance from the method's own estimates the error of the step.
#[derive(Debug)]
pub(crate) struct Embedded {
    /// What it evaluates beside the evaluations of the method, numbered behind these.
    pub(crate) evaluations: &'static [Evaluation],
    /// The method's solution minus this one.
    pub(crate) error: Sum,
    /// The power of h with which the error falls, in the root mean square.
    pub(crate) order: f64,
}

/// Everything about a method.
#[derive(Debug)]
pub(crate) struct Table {
    pub(crate) name: &'static str,
    pub(crate) calculus: Calculus,
    pub(crate) reach: Reach,
    /// Strong order on noise that is diagonal or scalar, and on additive noise.
    pub(crate) orders: [f64; 2],
    pub(crate) evaluations: &'static [Evaluation],
    /// The next value of each carried state; the first is y.
    pub(crate) next: &'static [Sum],
    /// What adaptive steps estimate errors by.
    pub(crate) embedded: Option<&'static Embedded>,
}

/// A method for stochastic differential equations: one of the constants of [`sde`](crate::sde).
#[derive(Clone, Copy, Debug)]
pub struct SdeMethod(pub(crate) &'static Table);

impl PartialEq for SdeMethod {
    fn eq(&self, other: &Self) -> bool {
        self.0.name == other.0.name
    }
}

impl SdeMethod {
    /// The name of its constant in small letters, for example `euler_maruyama`.
    pub fn name(&self) -> &'static str {
        self.0.name
    }

    /// The calculus whose solution it converges to.  With additive noise, the solutions in both calculi are the same.
    pub fn calculus(&self) -> Calculus {
        self.0.calculus
    }

    /// Its strong order, the power of h in the root mean square of the error at a fixed time; `None` where the noise is not
    /// of the kind that it is for.
    pub fn strong_order(&self, noise: NoiseType, additive: bool) -> Option<f64> {
        let [order, of_additive] = self.0.orders;
        match (self.0.reach, noise) {
            (_, NoiseType::General { .. }) if self.has_term() => None,
            _ if additive => Some(of_additive),
            (Reach::Additive, _) => None,
            (Reach::NoAreas, NoiseType::General { .. }) => None,
            (Reach::Any, NoiseType::General { .. }) => Some(0.5),
            _ => Some(order),
        }
    }

    /// Evaluations of the drift and of the diffusion in a step of fixed length.  An adaptive step evaluates more, for the
    /// estimate of its error.
    pub fn evaluations(&self) -> [usize; 2] {
        [Part::Drift, Part::Diffusion].map(|part| {
            let all = self.0.evaluations.iter();
            all.filter(|evaluation| evaluation.part == part).count()
        })
    }

    /// Whether it estimates the error of a step, which adaptive steps need.
    pub fn estimates_errors(&self) -> bool {
        self.0.embedded.is_some()
    }

    /// Whether it reads the integrals U = ∫(W − W(t)) ds over each step, in addition to the increments of W.
    pub fn needs_integrals(&self) -> bool {
        self.sums()
            .any(|sum| sum.terms.iter().any(|term| term.on == Functional::U))
    }

    /// Every sum of a step.
    pub(crate) fn sums(&self) -> impl Iterator<Item = &'static Sum> {
        let Table {
            evaluations, next, ..
        } = self.0;
        evaluations.iter().map(|e| &e.at).chain(next.iter())
    }

    /// Whether it solves the equation.
    pub(crate) fn check(&self, equation: &Equation) -> Result<()> {
        let Table { name, calculus, .. } = *self.0;
        let defect = match self.0.reach {
            _ if calculus != equation.calculus && !equation.additive => SdeDefect::Calculus {
                method: name,
                of: calculus.name(),
                given: equation.calculus.name(),
            },
            Reach::Additive if !equation.additive => SdeDefect::NeedsAdditive { method: name },
            // A Milstein term is that of diagonal noise, also if the noise is additive.
            Reach::NoAreas
                if matches!(equation.noise, NoiseType::General { .. })
                    && (!equation.additive || self.has_term()) =>
            {
                SdeDefect::LevyAreas { method: name }
            }
            _ if self.has_term() && !equation.milstein_term => {
                SdeDefect::NoMilsteinTerm { method: name }
            }
            _ => return Ok(()),
        };
        Err(Error::Sde(defect))
    }

    /// Whether it evaluates a Milstein term.
    fn has_term(&self) -> bool {
        let mut all = self.0.evaluations.iter();
        all.any(|e| e.part == Part::MilsteinTerm)
    }
}
