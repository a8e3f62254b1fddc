//! Adaptive steps: the options of the user, and the decision about each step, computed from numbers only.
//!
//! An attempt of length h has the error estimate err = h Σ (b_i − b̂_i) k_i.  Let r be the norm of err relative to
//! the tolerance.  The attempt is accepted if r ≤ 1.  The length of the next attempt is h, multiplied by the
//! following factor within the limits of the controller:
//!
//! safety · r^{−(P+I+D)/m} · r₁^{(P+2D)/m} · r₂^{−D/m},
//!
//! where m is the order of the method, r₁ is the value of r in the last accepted step, and r₂ the value in the
//! accepted step before it (Söderlind, "Digital
//! filters in adaptive time-stepping", ACM Trans. Math. Software 29, 2003).

mod pace;
mod tolerance;

use candle_core::{DType, Device, Shape};

use crate::error::{AdaptiveDefect, Error, Result};
use crate::tableau::Tableau;
use crate::time::{coincide, TimeGrid};
pub(crate) use pace::{Attempt, Halt, Pace, Verdict};
pub(crate) use tolerance::OfLeaf;
pub use tolerance::Tolerance;

/// Steps that are as long as a tolerance permits, for [`Steps::Adaptive`](crate::Steps::Adaptive).
///
/// The method must be an embedded pair, which has an error estimate: [`DOPRI5`](crate::DOPRI5),
/// [`BOSH3`](crate::tableau::BOSH3),
/// [`TSIT5`](crate::tableau::TSIT5), [`FEHLBERG45`](crate::tableau::FEHLBERG45), [`DOPRI8`](crate::tableau::DOPRI8), or a
/// user's own [`with_embedded`](Tableau::with_embedded).
///
/// A step is accepted if the RMS of err_i / (atol + rtol max(|y_i|, |y⁺_i|) + φ) is at most one in every tensor of
/// the state.  Here y⁺ is the state at the end of the attempt, and φ is an upper bound of the part of err that
/// rounding in compute precision causes; see [`noise_floor`](Self::noise_floor).  Gradients are those of the accepted
/// steps; the step lengths are treated as constants.
///
/// Tolerances have no default.  Relative tolerances down to 1e-12 can be reached in f64, and down to about 1e-6 in
/// f32.  The relative error of one evaluation of a field is about 5e-3 in bf16 and 5e-4 in f16.  Use an rtol of 1e-2
/// to 1e-3 with [`BOSH3`](crate::tableau::BOSH3) or [`DOPRI5`](crate::DOPRI5) in bf16, and of 1e-3 to 1e-4 with
/// `DOPRI5` in f16.  Smaller tolerances do no harm, but do not reduce the error.  `TSIT5` and `DOPRI8` have large
/// weights that cancel, and lose digits in low precision.
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_diffeq::control::Adaptive;
/// use candle_diffeq::{odeint, OdeOptions, Steps, Time, DOPRI5};
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
            limited_is_error: false,
            control: None,
            on_failure: OnFailure::default(),
        }
    }

    /// The step-size controller: how the next step length is computed from the error estimates.  Default:
    /// [`Controller::I`].
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
    /// long as it is finite, exceeds the tolerance; [`Stats::forced`](crate::Stats::forced) counts such steps.  Only
    /// steps before a time at which a step must end may be shorter.  The default is 0: then the solve fails with
    /// [`StopReason::Underflow`](crate::error::StopReason::Underflow) when a step is too short to change the time.
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

    /// Whether steps end at output times too, instead of outputs being interpolated.  Default: only for
    /// [`FEHLBERG45`](crate::tableau::FEHLBERG45), whose interpolant is less accurate than its steps.
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
    /// κ its smallest normal number.  Default: yes.  Without the noise floor, the number of steps in low precision
    /// grows like 1/rtol at small tolerances, and the error does not become smaller.
    #[must_use]
    pub fn noise_floor(self, on: bool) -> Self {
        Self {
            noise_floor: on,
            ..self
        }
    }

    /// Whether each row has its own steps.  The default is [`StepControl::Rows`] if the field is integrated tile by
    /// tile, and [`StepControl::Batch`] otherwise.  If `Rows` is requested but the solve cannot be done row by row,
    /// the solve fails with [`AdaptiveDefect::NoRows`].
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
    /// [`Stats::limited`](crate::Stats::limited) counts such steps.
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
    /// tile by tile on the CPU (see [`OdeOptions::fusion`](crate::OdeOptions::fusion)).
    ///
    /// With `Rows`, an easy row takes fewer steps than with `Batch`, and is less accurate than with steps that are
    /// chosen for the most difficult row.  Therefore compare the two settings at equal error, not at equal tolerance.
    /// [`Checkpoint::States`](crate::Checkpoint::States) and
    /// [`Bytes`](crate::Checkpoint::Bytes) are budgets of every row in the same way as of the batch: so many states of
    /// each.  Nothing is kept of evaluations ([`OdeOptions::activation_cache`](crate::OdeOptions::activation_cache)).
    /// In f16 the rows of a tile share a scale of the adjoint.
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
    /// other rows are solved as usual.
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

/// The exponents and limits of a PID controller of the step length.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Controller {
    /// Proportional coefficient P.
    pub p: f64,
    /// Integral coefficient I.
    pub i: f64,
    /// Derivative coefficient D.
    pub d: f64,
    /// Safety factor: the step length that the error estimate permits is multiplied by this number.
    pub safety: f64,
    /// The smallest and the largest factor by which the step length may change from one attempt to the next.
    pub limits: [f64; 2],
}

impl Controller {
    /// Uses only the last error estimate.  This is suitable for smooth problems; most neural fields are smooth.
    pub const I: Self = Self {
        p: 0.0,
        i: 1.0,
        d: 0.0,
        safety: 0.9,
        limits: [0.2, 10.0],
    };

    /// Uses the last two error estimates.  This is suitable for mildly stiff problems: fewer attempts are rejected,
    /// and the step length grows more slowly.
    pub const PI: Self = Self {
        p: 0.4,
        i: 0.3,
        ..Self::I
    };

    /// What a length is multiplied with after an error r, in the order m of the method.
    fn factor(&self, r: f64, before: [f64; 2], m: f64, accepted: bool) -> f64 {
        let Self { p, i, d, .. } = *self;
        let [least, most] = self.limits;
        let factor = match r {
            0.0 => most,
            r if r.is_finite() => {
                let [r1, r2] = before;
                // x⁰ is 1 to the bit, and not worth its time.
                let power = |x: f64, e: f64| if e == 0.0 { 1.0 } else { x.powf(e) };
                let powers =
                    power(r, -(p + i + d) / m) * power(r1, (p + 2.0 * d) / m) * power(r2, -d / m);
                self.safety * powers
            }
            _ => least,
        };
        match accepted {
            true => factor.clamp(1.0, most.max(1.0)),
            false => factor.clamp(least, self.safety.max(least)),
        }
    }

    fn check(&self) -> Result<()> {
        let [least, most] = self.limits;
        let coefficients = [("p", self.p), ("i", self.i), ("d", self.d)];
        for (option, value) in coefficients {
            if !value.is_finite() {
                return Err(out_of_range(option, value));
            }
        }
        let within = |option, value: f64, range: std::ops::RangeInclusive<f64>| match range
            .contains(&value)
        {
            true => Ok(()),
            false => Err(out_of_range(option, value)),
        };
        within("i", self.p + self.i + self.d, f64::MIN_POSITIVE..=f64::MAX)?;
        within("safety", self.safety, 1e-3..=1.0)?;
        within("limits", least, f64::MIN_POSITIVE..=1.0 - 1e-3)?;
        within("limits", most, 1.0..=f64::MAX)
    }
}

impl Default for Controller {
    fn default() -> Self {
        Self::I
    }
}

/// A time at which a step must end.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Target {
    pub(crate) t: f64,
    /// Its number among the user's times.
    pub(crate) given: Option<usize>,
    /// Whether the field jumps there.
    pub(crate) jumps: bool,
}

/// Adaptive steps for one interval, validated.
#[derive(Clone, Debug)]
pub(crate) struct Control {
    pub(crate) options: Adaptive,
    pub(crate) start: f64,
    /// 1, or −1 where time decreases.
    pub(crate) direction: f64,
    /// In the order in which they are met; the last is the end.
    pub(crate) targets: Vec<Target>,
    /// The order of the method.
    pub(crate) order: f64,
    /// b − b̂ by stage of the tableau that ends in f(t_{n+1}, y_{n+1}).
    pub(crate) estimate: Vec<f64>,
    /// Whether that last stage was appended: then an attempt can do without it.
    pub(crate) appended: bool,
}

impl Control {
    pub(crate) fn new(
        options: &Adaptive,
        method: &Tableau,
        grid: &TimeGrid,
        jumps: &[f64],
    ) -> Result<Self> {
        options.controller.check()?;
        let positive = |option, value: f64| match value > 0.0 {
            true => Ok(()),
            false => Err(out_of_range(option, value)),
        };
        options.first_step.map_or(Ok(()), |h| {
            positive("first_step", if h.is_finite() { h } else { f64::NAN })
        })?;
        positive("max_step", options.max_step)?;
        positive("max_steps", options.max_steps as f64)?;
        let value = options.min_step;
        if !(value >= 0.0 && value <= options.max_step) {
            let option = "min_step";
            return Err(out_of_range(option, value));
        }
        let Some(embedded) = method.embedded() else {
            let method = method.name().to_owned();
            return Err(Error::Adaptive(AdaptiveDefect::NoEstimate { method }));
        };
        let difference = method.b().iter().zip(embedded).map(|(b, e)| b - e);
        let mut estimate: Vec<f64> = difference.collect();
        estimate.resize(method.dense().stages(), 0.0);
        let points = grid.points();
        let (start, end) = (points[0], points[points.len() - 1]);
        Ok(Self {
            direction: if end < start { -1.0 } else { 1.0 },
            targets: targets(options, method, points, jumps)?,
            options: options.clone(),
            start,
            order: method.order() as f64,
            estimate,
            appended: !method.is_fsal(),
        })
    }

    /// rtol and atol by tensor of a state of these shapes.
    pub(crate) fn tolerances(
        &self,
        shapes: &[Shape],
        state: DType,
        device: &Device,
    ) -> Result<[Vec<OfLeaf>; 2]> {
        let Adaptive { rtol, atol, .. } = &self.options;
        let rtol = rtol.by_leaf("rtol", shapes, state, device)?;
        let atol = atol.by_leaf("atol", shapes, state, device)?;
        for (leaf, (rtol, atol)) in rtol.iter().zip(&atol).enumerate() {
            if rtol.is_zero()? && atol.is_zero()? {
                return Err(Error::Adaptive(AdaptiveDefect::NoTolerance { leaf }));
            }
        }
        Ok([rtol, atol])
    }

    /// u ‖b − b̂‖₂ and κ of every tensor of the state, from their u and κ, where there is a noise floor.
    pub(crate) fn noise(&self, precisions: &[(f64, f64)]) -> Result<Option<Vec<(f64, f64)>>> {
        if !self.options.noise_floor {
            return Ok(None);
        }
        let size = self.estimate_size();
        // In f64 a floor of 1e-17 would change the steps in their last digits only.
        let least = self.options.rtol.least()?;
        let counts = |u: f64| u > 2f64.powi(-50) || least < 1e-12;
        let noise = precisions.iter().map(|&(u, least)| match counts(u) {
            true => (u * size, least),
            false => (0.0, 0.0),
        });
        Ok(Some(noise.collect()))
    }

    /// ‖b − b̂‖₂.
    fn estimate_size(&self) -> f64 {
        let squares = self.estimate.iter().map(|e| e * e);
        squares.sum::<f64>().sqrt()
    }

    /// Whether the field jumps at the end of an attempt.
    pub(crate) fn jumps_at(&self, attempt: &Attempt) -> bool {
        attempt
            .lands
            .is_some_and(|target| self.targets[target].jumps)
    }

    /// The longest first step.
    pub(crate) fn longest(&self) -> f64 {
        let end = self.targets.last().map_or(self.start, |target| target.t);
        (end - self.start).abs().min(self.options.max_step)
    }

    /// The length of the first attempt but for limits, from ‖y0‖, ‖f0‖ in the norm of the tolerance; the first part,
    /// which says where to evaluate once more.
    pub(crate) fn probe(d0: f64, d1: f64) -> f64 {
        match d0 < 1e-5 || d1 < 1e-5 {
            true => 1e-6,
            false => 0.01 * d0 / d1,
        }
    }

    /// The second part, from the difference d2 of the two evaluations divided by the length of the probe.
    pub(crate) fn first_length(&self, probe: f64, d1: f64, d2: f64) -> f64 {
        let d = d1.max(d2);
        let h = match d <= 1e-15 {
            true => f64::max(1e-6, probe * 1e-3),
            false => (0.01 / d).powf(1.0 / self.order),
        };
        h.min(100.0 * probe)
    }
}

fn out_of_range(option: &'static str, value: f64) -> Error {
    Error::Adaptive(AdaptiveDefect::Number { option, value })
}

/// All times at which a step must end, in order.
fn targets(
    options: &Adaptive,
    method: &Tableau,
    points: &[f64],
    jumps: &[f64],
) -> Result<Vec<Target>> {
    let (start, end) = (points[0], points[points.len() - 1]);
    let forward = end >= start;
    let is_inside = |t: f64| (t > start) == forward && (t < end) == forward;
    let mut all = vec![];
    for (times, jumps) in [(&options.step_t, false), (&options.jump_t, true)] {
        for &t in times {
            if !t.is_finite() {
                let option = if jumps { "jump_t" } else { "step_t" };
                return Err(out_of_range(option, t));
            }
            if is_inside(t) && !coincide(t, start) {
                all.push(Target {
                    t,
                    given: None,
                    jumps,
                });
            }
        }
    }
    let later = |a: &Target, b: &Target| match forward {
        true => a.t.total_cmp(&b.t),
        false => b.t.total_cmp(&a.t),
    };
    all.sort_by(later);
    if let Some(w) = all
        .windows(2)
        .find(|w| w[0].t == w[1].t && w[0].jumps != w[1].jumps)
    {
        return Err(Error::Adaptive(AdaptiveDefect::ForcedTwice { t: w[0].t }));
    }
    all.dedup_by(|a, b| a.t == b.t);
    // Those that the field says itself.
    for &t in jumps
        .iter()
        .filter(|&&t| is_inside(t) && !coincide(t, start))
    {
        match all.iter_mut().find(|target| coincide(target.t, t)) {
            Some(target) => target.jumps = true,
            None => all.push(Target {
                t,
                given: None,
                jumps: true,
            }),
        }
    }
    let on_outputs = options.on_outputs.unwrap_or(method.name() == "fehlberg45");
    for (given, &t) in points.iter().enumerate().skip(1) {
        let is_end = given + 1 == points.len();
        if let Some(target) = all.iter_mut().find(|target| coincide(target.t, t)) {
            // The user's own time, to the bit.
            (target.t, target.given) = (t, Some(given));
        } else if on_outputs || is_end {
            all.push(Target {
                t,
                given: Some(given),
                jumps: false,
            });
        }
    }
    all.sort_by(later);
    Ok(all)
}
