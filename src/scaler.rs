//! Scales against underflow and overflow of the adjoint inside a solve.
//!
//! The pull-back of a stage is fed Q(S·v) and its results are divided by S in state precision.  S is a power of two,
//! so scaling itself rounds nothing.  It is chosen so that S·max|λ| is a fixed factor below the overflow of f16.
//! After "Mixed Precision Training of Neural ODEs", arXiv 2510.23498, §4, with the growth test on S·λ instead of λ.

use crate::error::{Error, Result};

/// Whether and how cotangents are scaled before they enter compute precision.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub enum Scaling {
    /// Dynamic where compute is f16, off otherwise.
    #[default]
    Auto,
    /// Never.
    Off,
    /// By a constant, rounded to a power of two.
    Fixed(f64),
    /// By a power of two that follows the adjoint.
    Dynamic(DynamicScaling),
}

/// Options of the adjoint scaler, which chooses the power of two S by which cotangents are multiplied before they are
/// rounded to f16.
///
/// The pull-back of a stage is given S times its cotangent, and what it returns is divided by S in state precision.
/// At the start of every step of the backward pass, S is aimed at the largest power of two for which S·max|λ| is at most
/// 2¹⁵ / `headroom` (`headroom` rounded up to a power of two).  A larger S is lowered to this at once; a smaller one is
/// raised to it after `growth_interval` steps without overflow.  If a pull-back overflows, S is halved, the target with it,
/// and the pull-back is repeated.
///
/// After "Mixed Precision Training of Neural ODEs", arXiv 2510.23498, §4, which decides about growth by λ instead of S·λ.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct DynamicScaling {
    /// S·max|λ| is kept this factor below the overflow of f16: room for the growth of the
    /// cotangents inside the field.  Default 64.
    pub headroom: f64,
    /// The number of backward steps without overflow after which S may be raised.  It is then raised to its target at
    /// once.  (S may always be lowered.)  Default 2.
    pub growth_interval: usize,
    /// An overflow of λ lowers the target of S·max|λ|.  After this number of backward steps without overflow the target is
    /// doubled again, and so on up to its first value.  An overflow of a parameter gradient lowers the target for the rest
    /// of the backward pass, because parameter gradients grow with the batch and the width, not with λ.  Default 64.
    pub recovery_interval: usize,
    /// Pull-backs of one stage before the scaler gives up.  Default 48.
    pub max_attempts: usize,
}

impl Default for DynamicScaling {
    fn default() -> Self {
        Self {
            headroom: 64.0,
            growth_interval: 2,
            recovery_interval: 64,
            max_attempts: 48,
        }
    }
}

/// What to do when gradients overflow for good.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OnOverflow {
    /// Return the error.
    #[default]
    Error,
    /// Return gradients that are NaN on purpose, so that a loss scaler skips the optimiser's step.
    SkipUpdate,
}

/// What a pull-back came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    Clean,
    /// The cotangent of the state overflowed.
    StateOverflow,
    /// A parameter gradient overflowed, the state's did not.
    ParameterOverflow,
}

/// The adjoint scaler: S = 2^exponent.  It sees numbers only.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Scaler {
    rule: Option<DynamicScaling>,
    exponent: Option<i32>,
    /// ⌈log2 max|λ|⌉ of the step.
    level: i32,
    /// S·max|λ| is aimed at 2^aim.
    aim: i32,
    /// `aim` does not rise above this.
    ceiling: i32,
    clean: usize,
}

/// S stays within 2^±100, where S·λ and h/S·w are safe in f32.
pub(crate) const LIMIT: i32 = 100;

impl Scaler {
    pub(crate) fn new(scaling: Scaling, compute_is_f16: bool) -> Result<Self> {
        let fixed = |exponent| Self {
            rule: None,
            exponent,
            level: 0,
            aim: 0,
            ceiling: 0,
            clean: 0,
        };
        let rule = match scaling {
            Scaling::Off => return Ok(fixed(None)),
            Scaling::Auto if !compute_is_f16 => return Ok(fixed(None)),
            Scaling::Auto => DynamicScaling::default(),
            Scaling::Dynamic(rule) => rule,
            Scaling::Fixed(scale) => {
                let exponent = scale.log2().round();
                if !exponent.is_finite() || exponent.abs() > LIMIT.into() {
                    return Err(Error::InvalidScaling {
                        what: "scale",
                        value: scale,
                        range: "at least 2^-100 and at most 2^100",
                    });
                }
                return Ok(fixed(Some(exponent as i32)));
            }
        };
        // 65504 < 2^16; one binade more of headroom than asked is lost to rounding it up.
        let aim = 15.0 - rule.headroom.log2().ceil();
        if !(rule.headroom >= 1.0 && aim >= -24.0) {
            return Err(Error::InvalidScaling {
                what: "headroom",
                value: rule.headroom,
                range: "at least 1 and at most 2^39",
            });
        }
        if rule.max_attempts == 0 {
            return Err(Error::InvalidScaling {
                what: "max_attempts",
                value: 0.0,
                range: "at least 1",
            });
        }
        Ok(Self {
            rule: Some(rule),
            exponent: None,
            level: 0,
            aim: aim as i32,
            ceiling: aim as i32,
            clean: 0,
        })
    }

    /// Whether S follows the adjoint, and overflow is cured by lowering it.
    pub(crate) fn is_dynamic(&self) -> bool {
        self.rule.is_some()
    }

    /// Whether cotangents are scaled at all.
    pub(crate) fn is_on(&self) -> bool {
        self.rule.is_some() || self.exponent.is_some()
    }

    /// Whether S has been chosen.
    pub(crate) fn is_aimed(&self) -> bool {
        self.exponent.is_some()
    }

    /// S.
    pub(crate) fn scale(&self) -> f64 {
        2f64.powi(self.exponent.unwrap_or(0))
    }

    /// Aims S at a step whose adjoint has this max|λ|.
    pub(crate) fn aimed(mut self, magnitude: f64) -> Self {
        let Some(rule) = self.rule else { return self };
        if magnitude == 0.0 || !magnitude.is_finite() {
            return self;
        }
        self.level = magnitude.log2().ceil() as i32;
        if self.aim < self.ceiling && self.clean >= rule.recovery_interval {
            self.aim += 1;
            self.clean = 0;
        }
        let wanted = (self.aim - self.level).clamp(-LIMIT, LIMIT);
        self.exponent = Some(match self.exponent {
            // λ grew, a new cotangent came in: S would overflow.
            Some(exponent) if exponent > wanted => wanted,
            // S lags behind by a factor of two at least, and nothing overflowed for a while.
            Some(exponent) if exponent < wanted && self.clean >= rule.growth_interval => wanted,
            Some(exponent) => exponent,
            None => wanted,
        });
        self
    }

    /// The scaler after a pull-back of this outcome.
    pub(crate) fn after(mut self, outcome: Outcome) -> Self {
        if outcome == Outcome::Clean {
            return self;
        }
        let exponent = self.exponent.unwrap_or(0) - 1;
        self.exponent = Some(exponent);
        self.aim = self.aim.min(exponent + self.level);
        if outcome == Outcome::ParameterOverflow {
            // θ̄ grows with the batch and the width, not with λ: this room does not come back.
            self.ceiling = self.aim;
        }
        self.clean = 0;
        self
    }

    /// The scaler after a whole step without overflow.
    pub(crate) fn after_step(mut self) -> Self {
        self.clean += 1;
        self
    }

    /// Whether a smaller S can help: some of S·λ must be left in f16, and attempts too.
    pub(crate) fn is_exhausted(&self, attempts: usize) -> bool {
        const SMALLEST_F16: i32 = -24;
        self.rule.is_none_or(|rule| attempts >= rule.max_attempts)
            || self.exponent.unwrap_or(0) + self.level < SMALLEST_F16
            || self.exponent.unwrap_or(0) <= -LIMIT
    }
}

/// What a dynamic scaler counts with, to go on with on a device and back.
#[cfg(feature = "cuda")]
#[derive(Clone, Copy, Debug)]
pub(crate) struct Settings {
    pub(crate) exponent: Option<i32>,
    pub(crate) level: i32,
    pub(crate) aim: i32,
    pub(crate) ceiling: i32,
    pub(crate) clean: u32,
    /// Of growth and of recovery.
    pub(crate) intervals: [u32; 2],
}

#[cfg(feature = "cuda")]
impl Scaler {
    pub(crate) fn settings(&self) -> Settings {
        let count = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
        let rule = self.rule.unwrap_or_default();
        Settings {
            exponent: self.exponent,
            level: self.level,
            aim: self.aim,
            ceiling: self.ceiling,
            clean: count(self.clean),
            intervals: [rule.growth_interval, rule.recovery_interval].map(count),
        }
    }

    /// Pull-backs of one stage before it gives up.
    pub(crate) fn most_attempts(&self) -> usize {
        self.rule.map_or(1, |rule| rule.max_attempts)
    }

    /// The same rule with these counts.
    pub(crate) fn with(self, settings: Settings) -> Self {
        Self {
            rule: self.rule,
            exponent: settings.exponent,
            level: settings.level,
            aim: settings.aim,
            ceiling: settings.ceiling,
            clean: settings.clean as usize,
        }
    }
}
