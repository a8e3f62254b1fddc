//! Precisions together with what is done about underflow.

use candle_diffeq::{
    scaling::{OnOverflow, Scaling},
    OdeOptions, Precision,
};

use super::dtype::Dtype;

/// A compute precision, and how the adjoint is scaled in it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Mode {
    pub name: &'static str,
    pub dtype: Dtype,
    scaling: Scaling,
}

impl Mode {
    /// One for each precision, f16 without scaling and with.
    pub fn of(precisions: &[Dtype]) -> Vec<Self> {
        let mode = |name, dtype, scaling| Self {
            name,
            dtype,
            scaling,
        };
        let of = |dtype: &Dtype| match dtype {
            Dtype::F16 => vec![
                mode("f16 unscaled", Dtype::F16, Scaling::Off),
                mode("f16 scaled", Dtype::F16, Scaling::Auto),
            ],
            dtype => vec![mode(dtype.name(), *dtype, Scaling::Auto)],
        };
        precisions.iter().flat_map(of).collect()
    }

    /// For a state (z, what is summed along the way): the first in this precision, the second in
    /// state precision.  Gradients that overflow are NaN.
    pub fn options(&self) -> OdeOptions {
        let precision = self.dtype.precision();
        let sums = Precision::new(precision.state, precision.state);
        OdeOptions {
            leaf_precision: vec![precision, sums],
            scaling: self.scaling,
            on_overflow: OnOverflow::SkipUpdate,
            ..Default::default()
        }
    }

    /// Whether it is f16 with scaling.
    pub fn is_scaled_f16(&self) -> bool {
        self.dtype == Dtype::F16 && self.scaling != Scaling::Off
    }
}
