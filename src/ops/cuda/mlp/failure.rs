//! What a solve in one launch reports of a failure: one number, whose order is that of the pass.

use super::MOST_STAGES;

/// What failed first, in the order of the pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum NetFailure {
    /// y_0, or a cotangent of the returned states.
    Given,
    /// A velocity.
    Velocity { step: usize, stage: usize },
    /// A state after a step.
    Solution { step: usize },
    /// λ, this many steps after the last.
    Gradient { steps: usize },
    /// The scale, this many steps after the last.
    Exhausted {
        steps: usize,
        exponent: i32,
        attempts: usize,
    },
    /// A parameter's gradient.
    Parameters,
}

/// Steps of a pass whose failure is that of parameters.
const AFTER_ALL: u64 = 1 << 39;

impl NetFailure {
    /// From a key of kernels/mlp.cu.
    pub(super) fn of_key(key: u64) -> Option<Self> {
        if key == u64::MAX {
            return None;
        }
        let (order, detail, kind) = (key >> 24, (key >> 2) & 0x3f_ffff, key & 3);
        if order == 0 {
            return Some(Self::Given);
        }
        let per_step = MOST_STAGES as u64 + 1;
        let step = ((order - 1) / per_step) as usize;
        Some(match kind {
            0 => Self::Velocity {
                step,
                stage: detail as usize,
            },
            1 => Self::Solution { step },
            _ if order == AFTER_ALL => Self::Parameters,
            2 => Self::Gradient {
                steps: order as usize,
            },
            _ => Self::Exhausted {
                steps: order as usize,
                exponent: (detail & 0x1ff) as i32 - 256,
                attempts: (detail >> 9) as usize,
            },
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_of_failures_are_read_as_they_were_written() {
        let key = |order: u64, detail: u64, kind: u64| order << 24 | detail << 2 | kind;
        let at = |step: u64, stage: u64| 1 + step * (MOST_STAGES as u64 + 1) + stage;
        for (key, failure) in [
            (key(0, 0, 1), NetFailure::Given),
            (
                key(at(7, 3), 3, 0),
                NetFailure::Velocity { step: 7, stage: 3 },
            ),
            (
                key(at(7, MOST_STAGES as u64), 0, 1),
                NetFailure::Solution { step: 7 },
            ),
            (key(4, 0, 2), NetFailure::Gradient { steps: 4 }),
            (
                key(4, 5 << 9 | (256 - 9), 3),
                NetFailure::Exhausted {
                    steps: 4,
                    exponent: -9,
                    attempts: 5,
                },
            ),
            (key(AFTER_ALL, 0, 2), NetFailure::Parameters),
        ] {
            assert_eq!(NetFailure::of_key(key), Some(failure));
        }
        assert_eq!(NetFailure::of_key(u64::MAX), None);
    }
}
