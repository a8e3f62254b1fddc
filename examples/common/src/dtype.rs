//! Precisions by the name of their compute dtype.

use candle_core::DType;
use candle_diffeq::Precision;
use clap::ValueEnum;

/// A compute dtype; sums and master weights are f32, or f64 for f64.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Dtype {
    F64,
    F32,
    Bf16,
    F16,
}

impl Dtype {
    pub const ALL: [Self; 4] = [Self::F64, Self::F32, Self::Bf16, Self::F16];

    /// The dtype roles.
    pub fn precision(self) -> Precision {
        match self {
            Self::F64 => Precision::f64(),
            Self::F32 => Precision::f32(),
            Self::Bf16 => Precision::bf16(),
            Self::F16 => Precision::f16(),
        }
    }

    /// The dtype of states and of the user's variables.
    pub fn state(self) -> DType {
        self.precision().state
    }

    /// Unit roundoff of the compute dtype.
    pub fn roundoff(self) -> f64 {
        match self {
            Self::F64 => 2f64.powi(-53),
            Self::F32 => 2f64.powi(-24),
            Self::Bf16 => 2f64.powi(-8),
            Self::F16 => 2f64.powi(-11),
        }
    }

    /// As on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::F64 => "f64",
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
            Self::F16 => "f16",
        }
    }
}
