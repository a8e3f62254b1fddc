//! What an attempt of a step was measured to be.

/// How much larger than its rounding a difference of stages must be to show how stiff the field is.
const SEEN: f64 = 16.0;

/// What an attempt was measured to be.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Measured {
    /// The error relative to the tolerance; the attempt is accepted if it is at most one.
    pub(crate) r: f64,
    /// The same without a noise floor.
    pub(crate) plain: f64,
    /// |h| times the estimate of the largest rate of the field, where a difference of stages shows it.
    pub(crate) stiffness: Option<f64>,
}

impl Measured {
    /// From r with the floor and without, and from mean squares relative to the tolerance: of h Σ d_i k_i, of the
    /// difference of stages Σ d_i Y_i, and of the rounding of a stage.
    pub(crate) fn new([r, plain]: [f64; 2], [moved, apart, rounding]: [f64; 3]) -> Self {
        let is_seen = apart > SEEN * SEEN * rounding && apart < f64::INFINITY;
        let stiffness = (moved / apart).sqrt();
        Self {
            r,
            plain,
            stiffness: (is_seen && stiffness.is_finite()).then_some(stiffness),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_difference_that_can_be_rounding_shows_no_rate() {
        let of = |squares| Measured::new([0.5, 0.5], squares).stiffness;
        assert_eq!(of([36.0, 4.0, 0.0]), Some(3.0));
        assert_eq!(of([0.0, 4.0, 0.0]), Some(0.0));
        assert_eq!(of([36.0, 4.0, 4.0 / 256.0]), None);
        assert_eq!(of([36.0, 0.0, 0.0]), None);
        for bad in [f64::NAN, f64::INFINITY] {
            assert_eq!(of([bad, 4.0, 0.0]), None);
            assert_eq!(of([36.0, bad, 0.0]), None);
            assert_eq!(of([36.0, 4.0, bad]), None);
        }
    }
}
