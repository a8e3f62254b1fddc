//! How a flow is solved: a precision, and fixed or adaptive steps.

use candle_diffeq::options::{Adaptive, Steps};
use candle_diffeq::tableau::{Tableau, BOSH3, DOPRI5};
use candle_diffeq::OdeOptions;

use common::mode::Mode;

/// The tolerance that adaptive flows are judged at, in f32.
const JUDGED: f64 = 1e-5;

/// A precision and its steps.
#[derive(Clone, Debug)]
pub(crate) struct Way {
    pub(crate) name: String,
    pub(crate) mode: Mode,
    /// Of adaptive steps, with their relative and absolute tolerance.
    adaptive: Option<(Tableau, f64)>,
}

impl Way {
    /// Fixed steps in every mode; or, at a tolerance, adaptive steps of DOPRI5 and of BOSH3.
    pub(crate) fn all(modes: &[Mode], tolerance: Option<f64>) -> Vec<Self> {
        let Some(tolerance) = tolerance else {
            let fixed = |mode: &Mode| Self {
                name: mode.name.to_owned(),
                mode: *mode,
                adaptive: None,
            };
            return modes.iter().map(fixed).collect();
        };
        let pairs = [DOPRI5, BOSH3];
        let of = |mode: &Mode| {
            let mode = *mode;
            pairs.clone().map(|method| Self {
                name: format!("{}, {}", mode.name, method.name()),
                mode,
                adaptive: Some((method, tolerance)),
            })
        };
        modes.iter().flat_map(of).collect()
    }

    /// Of training, in so many fixed steps where they are not adaptive.
    pub(crate) fn options(&self, steps: usize) -> OdeOptions {
        self.stepped(steps, None, self.mode.options())
    }

    /// The same in f32, by which flows are judged.
    pub(crate) fn judged(&self, steps: usize) -> OdeOptions {
        self.stepped(steps, Some(JUDGED), OdeOptions::default())
    }

    fn stepped(&self, steps: usize, tolerance: Option<f64>, options: OdeOptions) -> OdeOptions {
        match &self.adaptive {
            None => OdeOptions {
                steps: Steps::PerInterval(steps),
                ..options
            },
            Some((method, own)) => {
                let tolerance = tolerance.unwrap_or(*own);
                OdeOptions {
                    method: method.clone(),
                    steps: Steps::Adaptive(Adaptive::new(tolerance, tolerance)),
                    ..options
                }
            }
        }
    }
}
