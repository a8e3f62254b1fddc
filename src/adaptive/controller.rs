//! The law by which the length of a step follows from error estimates.

use super::out_of_range;
use crate::error::Result;

/// The largest factor after an attempt that was rejected.
const SHORTER: f64 = 0.999;

/// A PID controller of the step length (G. Söderlind, "Digital filters in adaptive time-stepping", ACM Trans. Math.
/// Software 29, 2003).
///
/// Let r be the error estimate of an attempt relative to the tolerance, r₁ that of the last accepted step before it, r₂
/// that of the accepted step before that one (both are 1 at the start), and m the order of the method.  The attempt is
/// accepted if r ≤ 1, and the length of the next attempt is the length of this one, multiplied by
///
/// safety · r^{−(p+i+d)/m} · r₁^{(p+2d)/m} · r₂^{−d/m}.
///
/// Until a step has been accepted, p, i and d are 0, 1 and 0: the first length is only a guess.  After an accepted step
/// this factor is limited to \[1, `limits[1]`\], so the error of an accepted step does not make the next one shorter; the
/// stability of the method may ([`Adaptive`](crate::options::Adaptive)).  After a rejected attempt it is limited to
/// \[`limits[0]`, `safety`\], and is at most 0.999; it is `limits[0]` if r is not finite, or if `safety` is smaller than
/// `limits[0]`.  [`Adaptive`](crate::options::Adaptive) sets limits of the length itself.
///
/// A number that is out of its range is an error, [`AdaptiveDefect::Number`](crate::error::AdaptiveDefect::Number).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Controller {
    /// Proportional coefficient: any finite number.
    pub p: f64,
    /// Integral coefficient: any finite number, but p + i + d must be positive.
    pub i: f64,
    /// Derivative coefficient: any finite number.
    pub d: f64,
    /// Safety factor: the step length that the error estimate permits is multiplied by this number,
    /// which is from 0.001 to 1.
    pub safety: f64,
    /// The smallest and the largest factor by which the step length may change from one attempt to the next:
    /// the smallest is positive and at most 0.999, the largest at least 1 and finite.
    pub limits: [f64; 2],
}

impl Controller {
    /// Uses only the last error estimate.  This is suitable for smooth problems; most neural fields are smooth.
    ///
    /// With i = 1, the next error would be the tolerance exactly if r were proportional to hᵐ.  Since it is not, an i of less
    /// than 1 leads to fewer rejected attempts and to smaller errors; torchdiffeq, diffrax and torchode use 1.
    pub const I: Self = Self {
        p: 0.0,
        i: 0.8,
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
    pub(super) fn factor(&self, r: f64, before: Option<[f64; 2]>, m: f64, accepted: bool) -> f64 {
        let (p, i, d) = match before {
            Some(_) => (self.p, self.i, self.d),
            None => (0.0, 1.0, 0.0),
        };
        let [least, most] = self.limits;
        let factor = match r {
            0.0 => most,
            r if r.is_finite() => {
                let [r1, r2] = before.unwrap_or([1.0; 2]);
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
            // What was rejected is tried again in a shorter step, even without any safety.
            false => factor.clamp(least, self.safety.min(SHORTER).max(least)),
        }
    }

    pub(super) fn check(&self) -> Result<()> {
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
        within(
            "p + i + d",
            self.p + self.i + self.d,
            f64::MIN_POSITIVE..=f64::MAX,
        )?;
        within("safety", self.safety, 1e-3..=1.0)?;
        within("limits[0]", least, f64::MIN_POSITIVE..=SHORTER)?;
        within("limits[1]", most, 1.0..=f64::MAX)
    }
}

impl Default for Controller {
    fn default() -> Self {
        Self::I
    }
}
