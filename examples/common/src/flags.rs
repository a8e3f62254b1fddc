//! The flags of every example.

use std::path::PathBuf;

use candle_core::Device;
use clap::{Args, ValueEnum};

use super::dtype::Dtype;
use super::Result;

/// To be flattened into an example's own flags.
#[derive(Args, Clone, Debug)]
pub struct Flags {
    /// Compute precisions, one after the other [default: all that the example compares].
    #[arg(long, value_delimiter = ',')]
    pub precision: Vec<Dtype>,
    /// Where to compute.
    #[arg(long, value_enum, default_value_t = Place::Cpu)]
    device: Place,
    /// The folder for pictures and figures.
    #[arg(long, value_name = "DIR", default_value = "out")]
    pub out: PathBuf,
    /// Of everything that is drawn at random.
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
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
pub enum Size {
    Smoke,
    Default,
    Full,
}

impl Size {
    /// The value for this size.
    pub fn pick<T>(self, smoke: T, default: T, full: T) -> T {
        match self {
            Self::Smoke => smoke,
            Self::Default => default,
            Self::Full => full,
        }
    }
}

impl Flags {
    pub fn size(&self) -> Size {
        match (self.smoke, self.full) {
            (true, _) => Size::Smoke,
            (_, true) => Size::Full,
            _ => Size::Default,
        }
    }

    /// What was asked for, or these: of an example whose data are f32.
    ///
    /// # Errors
    /// f64 was asked for.
    pub fn precisions(&self, default: &[Dtype]) -> Result<Vec<Dtype>> {
        self.precisions_among(default, &[Dtype::F32, Dtype::Bf16, Dtype::F16])
    }

    /// The same of an example that can compute in these.
    ///
    /// # Errors
    /// Another was asked for.
    pub fn precisions_among(&self, default: &[Dtype], can_be: &[Dtype]) -> Result<Vec<Dtype>> {
        let asked = match self.precision.as_slice() {
            [] => default,
            asked => asked,
        };
        match asked.iter().find(|dtype| !can_be.contains(dtype)) {
            None => Ok(asked.to_vec()),
            Some(other) => {
                let names: Vec<_> = can_be.iter().map(|dtype| dtype.name()).collect();
                let (other, names) = (other.name(), names.join(", "));
                Err(format!("--precision {other}: this example computes in {names}").into())
            }
        }
    }

    /// For an example whose precisions cannot be chosen.
    ///
    /// # Errors
    /// One was asked for.
    pub fn fixed_precisions(&self, names: &str) -> Result<()> {
        match self.precision.is_empty() {
            true => Ok(()),
            false => Err(format!(
                "--precision cannot be chosen: this example always computes in {names}"
            )
            .into()),
        }
    }

    /// For an example that draws nothing at random.
    ///
    /// # Errors
    /// A seed was given that is not the default.
    pub fn nothing_random(&self) -> Result<()> {
        match self.seed {
            0 => Ok(()),
            seed => Err(format!("--seed {seed}: nothing in this example is random").into()),
        }
    }

    /// For an example that computes on the CPU alone.
    ///
    /// # Errors
    /// CUDA was asked for.
    pub fn cpu_only(&self) -> Result<()> {
        match self.device {
            Place::Cpu => Ok(()),
            Place::Cuda => Err("--device cuda: this example computes on the CPU alone".into()),
        }
    }

    /// The device.
    ///
    /// # Errors
    /// CUDA in a build without it, or without a GPU.
    pub fn device(&self) -> Result<Device> {
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
