//! The flags of every example.

use std::path::PathBuf;

use candle_core::Device;
use clap::{Args, ValueEnum};

use super::dtype::Dtype;
use super::Result;

/// To be flattened into an example's own flags.
#[derive(Args, Clone, Debug)]
pub(crate) struct Flags {
    /// Compute precisions, one after the other [default: all that the example compares].
    #[arg(long, value_delimiter = ',')]
    pub(crate) precision: Vec<Dtype>,
    /// Where to compute.
    #[arg(long, value_enum, default_value_t = Place::Cpu)]
    device: Place,
    /// The folder for pictures and figures.
    #[arg(long, value_name = "DIR", default_value = "out")]
    pub(crate) out: PathBuf,
    /// Of everything that is drawn at random.
    #[arg(long, default_value_t = 0)]
    pub(crate) seed: u64,
    /// The published size.
    #[arg(long)]
    full: bool,
    /// A few seconds, and no demands.
    #[arg(long, conflicts_with = "full")]
    smoke: bool,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Place {
    Cpu,
    Cuda,
}

/// How much is run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Size {
    Smoke,
    Default,
    Full,
}

impl Size {
    /// The value for this size.
    pub(crate) fn pick<T>(self, smoke: T, default: T, full: T) -> T {
        match self {
            Self::Smoke => smoke,
            Self::Default => default,
            Self::Full => full,
        }
    }
}

impl Flags {
    pub(crate) fn size(&self) -> Size {
        match (self.smoke, self.full) {
            (true, _) => Size::Smoke,
            (_, true) => Size::Full,
            _ => Size::Default,
        }
    }

    /// What was asked for, or these.
    pub(crate) fn precisions(&self, default: &[Dtype]) -> Vec<Dtype> {
        match self.precision.as_slice() {
            [] => default.to_vec(),
            asked => asked.to_vec(),
        }
    }

    /// The same where only some can be.
    ///
    /// # Errors
    /// Another was asked for.
    pub(crate) fn precisions_among(
        &self,
        default: &[Dtype],
        can_be: &[Dtype],
    ) -> Result<Vec<Dtype>> {
        let asked = self.precisions(default);
        match asked.iter().find(|dtype| !can_be.contains(dtype)) {
            None => Ok(asked),
            Some(other) => {
                let names: Vec<_> = can_be.iter().map(|dtype| dtype.name()).collect();
                let names = names.join(", ");
                Err(format!(
                    "--precision {}: this example computes in {names}",
                    other.name()
                )
                .into())
            }
        }
    }

    /// The device.
    ///
    /// # Errors
    /// CUDA in a build without it, or without a GPU.
    pub(crate) fn device(&self) -> Result<Device> {
        match self.device {
            Place::Cpu => Ok(Device::Cpu),
            Place::Cuda if candle_core::utils::cuda_is_available() => Device::new_cuda(0)
                .map_err(|e| format!("--device cuda: no GPU can be used: {e}").into()),
            Place::Cuda => Err("--device cuda: this build has no CUDA; add \
                --features cuda to the command"
                .into()),
        }
    }
}
