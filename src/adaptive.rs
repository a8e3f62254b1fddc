//! Adaptive steps: the options of the user, and the decision about each step, computed from numbers only.
//!
//! An attempt of length h has the error estimate err = h Σ (b_i − b̂_i) k_i.  Let r be the norm of err relative to
//! the tolerance.  The attempt is accepted if r ≤ 1.  The length of the next attempt is h, multiplied by the
//! following factor within the limits of the controller:
//!
//! safety · r^{−(P+I+D)/m} · r₁^{(P+2D)/m} · r₂^{−D/m},
//!
//! where P, I and D are the coefficients of the controller, m is the order of the method, r₁ is the value of r in the
//! last accepted step, and r₂ the value in the accepted step before it (Söderlind, "Digital filters in adaptive
//! time-stepping", ACM Trans. Math. Software 29, 2003).  Stability limits it besides: see `stability`.

mod control;
mod controller;
mod measured;
mod pace;
mod stability;
mod tolerance;

use crate::error::{AdaptiveDefect, Error};
#[cfg(feature = "cuda")]
pub(crate) use control::Target;
pub(crate) use control::{Control, Rounding};
pub use controller::Controller;
pub(crate) use measured::Measured;
pub(crate) use pace::{Attempt, Halt, Pace, Verdict};
#[cfg(feature = "cuda")]
pub(crate) use stability::Stability;
pub use tolerance::Tolerance;
pub(crate) use tolerance::{ratio, OfLeaf};

/// Steps that are as long as a tolerance permits, for [`Steps::Adaptive`](crate::options::Steps::Adaptive).
///
/// The method must be an embedded pair, which has an error estimate: [`DOPRI5`](crate::tableau::DOPRI5),
/// [`BOSH3`](crate::tableau::BOSH3),
/// [`TSIT5`](crate::tableau::TSIT5), [`FEHLBERG45`](crate::tableau::FEHLBERG45), [`DOPRI8`](crate::tableau::DOPRI8), or a
/// user's own [`with_embedded`](crate::tableau::Tableau::with_embedded).
///
/// A step is accepted if the RMS of err_i / (atol + rtol max(|y_i|, |y⁺_i|) + φ) is at most one in every tensor of
/// the state.  Here y⁺ is the state at the end of the attempt, and φ is an upper bound of the part of err that
/// rounding in compute precision causes; see [`noise_floor`](Self::noise_floor).  Gradients are those of the accepted
/// steps; the step lengths are treated as constants.
///
/// Steps are also limited by the stability of the method.  The rate ρ of the fastest component is estimated in every
/// accepted step, from the difference of two stages, and a step is not longer than `safety` x / ρ; here a component that
/// decays at the rate ρ is damped in all steps of up to x / ρ (x is 3.3 for [`DOPRI5`](crate::tableau::DOPRI5), 2.5 for
/// [`BOSH3`](crate::tableau::BOSH3)).  Longer steps may be accurate while such a component is at rest, but they multiply
/// its cotangents, and with them the rounding errors of the gradient, by large factors.
/// [`stability_limit`](Self::stability_limit) turns this off.
///
/// Tolerances have no default.  Relative tolerances down to 1e-12 can be reached in f64, and down to about 1e-6 in f32.
/// The relative error of one evaluation of a field is about 5e-3 in bf16 and 5e-4 in f16.  Use an rtol of 1e-2 to 1e-3
/// with [`BOSH3`](crate::tableau::BOSH3) or [`DOPRI5`](crate::tableau::DOPRI5) in bf16, and of 1e-3 to 1e-4 with
/// `DOPRI5` in f16.  Smaller tolerances do no harm, but do not reduce the error.  `TSIT5` and `DOPRI8` have large
/// weights that cancel, and lose digits in low precision.
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_diffeq::{odeint, OdeOptions, Time};
/// use candle_diffeq::options::{Adaptive, Steps};
/// use candle_diffeq::tableau::DOPRI5;
/// let options = OdeOptions {
///     method: DOPRI5,
///     steps: Steps::Adaptive(Adaptive::new(1e-8, 1e-10)),
///     ..Default::default()
/// };
/// let y0 = Tensor::new(&[1f64, 0.0], &Device::Cpu)?;
/// let rotation = |_: &Time, y: &Tensor| {
///     Tensor::cat(&[&y.narrow(0, 1, 1)?.neg()?, &y.narrow(0, 0, 1)?], 0)
/// };
/// let ys = odeint(rotation, &y0, &[0.0, 1.0, 3.0], &options)?.to_vec2::<f64>()?;
/// assert!((ys[1][0] - 1f64.cos()).abs() < 1e-7 && (ys[2][1] - 3f64.sin()).abs() < 1e-7);
/// # Ok::<(), candle_diffeq::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Adaptive {
    pub(crate) rtol: Tolerance,
    pub(crate) atol: Tolerance,
    pub(crate) controller: Controller,
    pub(crate) norm: Norm,
    pub(crate) first_step: Option<f64>,
    pub(crate) min_step: f64,
    pub(crate) max_step: f64,
    pub(crate) max_steps: usize,
    pub(crate) step_t: Vec<f64>,
    pub(crate) jump_t: Vec<f64>,
    pub(crate) on_outputs: Option<bool>,
    pub(crate) noise_floor: bool,
    pub(crate) stability_limit: bool,
    pub(crate) limited_is_error: bool,
    pub(crate) control: Option<StepControl>,
    pub(crate) on_failure: OnFailure,
}

impl Adaptive {
    /// Adaptive steps with a relative and an absolute tolerance, and defaults for all other options.
    pub fn new(rtol: impl Into<Tolerance>, atol: impl Into<Tolerance>) -> Self {
        Self {
            rtol: rtol.into(),
            atol: atol.into(),
            controller: Controller::default(),
            norm: Norm::default(),
            first_step: None,
            min_step: 0.0,
            max_step: f64::INFINITY,
            max_steps: 1 << 16,
            step_t: vec![],
            jump_t: vec![],
            on_outputs: None,
            noise_floor: true,
            stability_limit: true,
            limited_is_error: false,
            control: None,
            on_failure: OnFailure::default(),
        }
    }

    /// The step-size controller: how the next step length is computed from the error estimates.  Default:
    /// [`Controller::I`].  See [`Controller`] for the formula.
    #[must_use]
    pub fn controller(self, controller: Controller) -> Self {
        Self { controller, ..self }
    }

    /// The norm by which the error estimate of a whole batch becomes one number.  Default: [`Norm::Batch`].
    #[must_use]
    pub fn norm(self, norm: Norm) -> Self {
        Self { norm, ..self }
    }

    /// The length of the first attempt.  By default it is computed from two evaluations of the field (Hairer, Nørsett
    /// & Wanner I, §II.4).
    #[must_use]
    pub fn first_step(self, h: f64) -> Self {
        Self {
            first_step: Some(h),
            ..self
        }
    }

    /// The shortest length that the controller chooses.  An attempt of this length is accepted even if its error, as
    /// long as it is finite, exceeds the tolerance; [`Stats::forced`](crate::metrics::Stats::forced) counts such steps.
    /// Only steps that end at a given time, or just after an event, may be shorter.  The default is 0: then the solve
    /// fails with [`StopReason::Underflow`](crate::error::StopReason::Underflow) when a step is too short to change the
    /// time.
    #[must_use]
    pub fn min_step(self, h: f64) -> Self {
        Self {
            min_step: h,
            ..self
        }
    }

    /// The largest step length.  By default there is no limit.
    #[must_use]
    pub fn max_step(self, h: f64) -> Self {
        Self {
            max_step: h,
            ..self
        }
    }

    /// The largest number of attempts, accepted and rejected ones together, of a solve, or of each row if rows have
    /// their own steps.  The default is 65 536.  A solve that needs more attempts fails with
    /// [`StopReason::Attempts`](crate::error::StopReason::Attempts).
    #[must_use]
    pub fn max_steps(self, attempts: usize) -> Self {
        Self {
            max_steps: attempts,
            ..self
        }
    }

    /// Times at which a step must end, for example times at which a derivative of the field is discontinuous.  Times
    /// outside the interval of the solve are ignored.
    #[must_use]
    pub fn step_t(self, times: impl Into<Vec<f64>>) -> Self {
        Self {
            step_t: times.into(),
            ..self
        }
    }

    /// Times at which the field itself is discontinuous.  A step ends at each of these times.  The stages at the end
    /// of this step are evaluated just before the jump, and the first stage of the next step just after it.  Times
    /// outside the interval of the solve are ignored.
    #[must_use]
    pub fn jump_t(self, times: impl Into<Vec<f64>>) -> Self {
        Self {
            jump_t: times.into(),
            ..self
        }
    }

    /// Whether steps end at output times too, instead of outputs being interpolated.  Default: only if the method has
    /// an order above four and no interpolant of its own, such as [`FEHLBERG45`](crate::tableau::FEHLBERG45).  For such
    /// a method outputs would be interpolated by the cubic Hermite polynomial, which is less accurate than its steps.
    /// The interpolant of [`DOPRI8`](crate::tableau::DOPRI8) has order 5 and is less accurate than its steps, too: set this
    /// option if outputs must be as accurate as the steps.
    #[must_use]
    pub fn step_on_outputs(self, on: bool) -> Self {
        Self {
            on_outputs: Some(on),
            ..self
        }
    }

    /// Whether the tolerance is increased by an upper bound φ of the part of the error estimate that rounding in
    /// compute precision causes,
    ///
    /// φ = u ‖b − b̂‖₂ (RMS(y_n) + |h| RMS(max(|k_1|, κ))),
    ///
    /// computed for each row and each tensor of the state, where u is the unit roundoff of the compute precision and
    /// κ its smallest normal number.  Default: yes.  In f64 there is a floor only if the smallest relative tolerance is
    /// below 1e-12.  Without the noise floor, the number of steps in low precision grows like 1/rtol at small tolerances,
    /// and the error does not become smaller.
    #[must_use]
    pub fn noise_floor(self, on: bool) -> Self {
        Self {
            noise_floor: on,
            ..self
        }
    }

    /// Whether steps are within the stability of the method, so that components at rest do not spoil the gradient.  The
    /// default is true.  Without it, a state that has come to rest in its precision may take longer steps: this is of use
    /// if no gradient is needed.
    #[must_use]
    pub fn stability_limit(self, on: bool) -> Self {
        Self {
            stability_limit: on,
            ..self
        }
    }

    /// Whether each row has its own steps.  The default is [`StepControl::Rows`] if the field is integrated tile by
    /// tile, or on CUDA in one launch, and [`StepControl::Batch`] otherwise.  If `Rows` is requested but the solve cannot be done row by row,
    /// the solve fails with [`AdaptiveDefect::NoRows`], or with [`AdaptiveDefect::RowsObserved`] if it has events or a
    /// dense solution.
    #[must_use]
    pub fn control(self, control: StepControl) -> Self {
        Self {
            control: Some(control),
            ..self
        }
    }

    /// What happens when a row that has its own steps does not reach the end.  Default: [`OnFailure::Error`].
    #[must_use]
    pub fn on_failure(self, on_failure: OnFailure) -> Self {
        Self { on_failure, ..self }
    }

    /// Whether a solve fails with [`StopReason::PrecisionLimited`](crate::error::StopReason::PrecisionLimited) if
    /// more than a tenth of its steps were accepted only because of the noise floor.  Default: no;
    /// [`Stats::limited`](crate::metrics::Stats::limited) counts such steps.
    #[must_use]
    pub fn precision_limit_is_error(self, on: bool) -> Self {
        Self {
            limited_is_error: on,
            ..self
        }
    }
}

/// Whether the step length is chosen for each row or for the whole batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum StepControl {
    /// Every row of the batch has its own steps, and the error estimate of each row is kept below the tolerance.  The
    /// solution of a row is bitwise independent of the other rows.  This is possible for fields that are integrated
    /// tile by tile on the CPU (see [`OdeOptions::fusion`](crate::OdeOptions::fusion)), and on CUDA for an
    /// [`nn::Mlp`](crate::nn::Mlp) that is solved in one launch, with
    /// [`Checkpoint::All`](crate::options::Checkpoint::All) or [`Nothing`](crate::options::Checkpoint::Nothing).
    ///
    /// With `Rows`, an easy row takes fewer steps than with `Batch`, and is less accurate than with steps that are
    /// chosen for the most difficult row.  Therefore compare the two settings at equal error, not at equal tolerance.
    /// With [`Checkpoint::States`](crate::options::Checkpoint::States), each row keeps at most the given number of its
    /// states; with [`Bytes`](crate::options::Checkpoint::Bytes), it keeps as many states as fit if every row keeps the same
    /// number.  [`OdeOptions::activation_cache`](crate::OdeOptions::activation_cache) has no effect.  In f16 every row has
    /// its own adjoint scale.
    Rows,
    /// All rows of the batch have the same steps, which are chosen by one error estimate of the whole batch; see
    /// [`Norm`].
    Batch,
}

/// What happens when a row that has its own steps does not reach the end.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum OnFailure {
    /// The solve fails with the error of the first such row, [`Error::Stopped`](crate::Error::Stopped).
    #[default]
    Error,
    /// The outputs of the row at times after its failure are NaN, all cotangents of the row are ignored, and the
    /// other rows are solved as usual.  A row that fails by
    /// [`PrecisionLimited`](crate::error::StopReason::PrecisionLimited) has failed in all its steps: only the state at
    /// the first time remains.
    Nan,
}

/// How the errors of all elements become one number r.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Norm {
    /// The RMS over all elements of each tensor of the state, and the largest of these values.  The error of one
    /// difficult row can be hidden by many easy rows, as in torchdiffeq.
    #[default]
    Batch,
    /// The RMS over each row of each tensor, and the largest of these values: the error estimate of every row is
    /// below the tolerance.
    WorstRow,
}

/// The values that numbers among the options may have, in words.
const RANGES: [(&str, &str); 13] = [
    ("p", "finite"),
    ("i", "finite"),
    ("d", "finite"),
    ("p + i + d", "positive and finite"),
    ("safety", "at least 0.001 and at most 1"),
    ("limits[0]", "positive and at most 0.999"),
    ("limits[1]", "at least 1 and finite"),
    ("first_step", "positive and finite"),
    ("max_step", "positive"),
    ("max_steps", "at least 1"),
    ("min_step", "at least 0 and at most max_step"),
    ("step_t", "finite"),
    ("jump_t", "finite"),
];

fn out_of_range(option: &'static str, value: f64) -> Error {
    let range = RANGES.iter().find(|(name, _)| *name == option);
    let range = range.map_or("another number", |(_, range)| *range);
    let defect = AdaptiveDefect::Number {
        option,
        value,
        range,
    };
    Error::Adaptive(defect)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_number_that_is_out_of_range_is_refused_with_its_range() {
        let grid = crate::time::TimeGrid::new(vec![0.0, 1.0]).unwrap();
        let refused = |adaptive: Adaptive| {
            let method = crate::tableau::DOPRI5;
            match Control::new(&adaptive, &method, &grid, &[]).err().unwrap() {
                Error::Adaptive(AdaptiveDefect::Number { option, range, .. }) => (option, range),
                other => panic!("{other}"),
            }
        };
        let ok = || Adaptive::new(1e-3, 1e-3);
        let by = |change: fn(&mut Controller)| {
            let mut controller = Controller::I;
            change(&mut controller);
            refused(ok().controller(controller))
        };
        let each = [
            by(|c| c.p = f64::NAN),
            by(|c| c.i = f64::INFINITY),
            by(|c| c.d = f64::NAN),
            by(|c| c.i = 0.0),
            by(|c| c.safety = 2.0),
            by(|c| c.limits[0] = 1.0),
            by(|c| c.limits[1] = 0.5),
            refused(ok().first_step(0.0)),
            refused(ok().max_step(0.0)),
            refused(ok().max_steps(0)),
            refused(ok().min_step(-1.0)),
            refused(ok().step_t([f64::NAN])),
            refused(ok().jump_t([f64::NAN])),
        ];
        assert_eq!(each, RANGES);
    }
}
