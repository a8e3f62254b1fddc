//! What a step that is replayed reads from device memory: its length, its times, and its number.

use candle_core::cuda_backend::cudarc::driver::{CudaSlice, DeviceRepr, PushKernelArg};
use candle_core::cuda_backend::WrapErr;
use candle_core::{CudaDevice, DType, Device, Tensor};

use super::launch::{load, pointer, Operand, CLOCK, ONE};
use crate::error::Result;

/// Stages whose times are kept.
const MOST_STAGES: usize = 16;

#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
struct Now {
    h: f64,
    look: u32,
    step: u32,
}

// SAFETY: plain numbers, laid out as `Clock` in kernels/clock.cuh.
unsafe impl DeviceRepr for Now {}

#[repr(C)]
#[derive(Clone, Copy)]
struct Tick {
    t: [f64; MOST_STAGES],
    now: Now,
    stages: i32,
    wide: i32,
}

// SAFETY: plain numbers, laid out as in kernels/clock.cu.
unsafe impl DeviceRepr for Tick {}

/// The length h of a step, the times of its stages, and the numbers of the step and of its first look.
#[derive(Debug)]
pub(crate) struct Clock {
    device: CudaDevice,
    now: CudaSlice<Now>,
    times: Tensor,
}

impl Clock {
    /// One that shows nothing yet, with times in `dtype`, f32 or f64.
    pub(crate) fn new(device: &Device, dtype: DType, stages: usize) -> Result<Self> {
        let Device::Cuda(on) = device else {
            return Err(super::launch::elsewhere());
        };
        // One term of a launch's is y.
        if stages >= MOST_STAGES || !matches!(dtype, DType::F32 | DType::F64) {
            let message = format!("a clock of {stages} stages in {dtype:?}");
            return Err(candle_core::Error::Msg(message).into());
        }
        Ok(Self {
            now: on.clone_htod(&[Now::default()])?,
            times: Tensor::zeros(stages, dtype, device)?,
            device: on.clone(),
        })
    }

    /// Shows a step from now on.
    pub(crate) fn tick(&self, h: f64, times: &[f64], look: u32, step: usize) -> Result<()> {
        let mut tick = Tick {
            t: [0.0; MOST_STAGES],
            now: Now {
                h,
                look,
                step: step as u32,
            },
            stages: self.times.elem_count().min(times.len()) as i32,
            wide: (self.times.dtype() == DType::F64).into(),
        };
        for (t, given) in tick.t.iter_mut().zip(times) {
            *t = *given;
        }
        let (at, times) = (self.pointer(), Operand::new(&self.times)?);
        let kernel = load(&self.device, &CLOCK, "clock_tick")?;
        let mut arguments = kernel.builder();
        arguments.arg(&tick).arg(&at).arg(&times.pointer);
        // SAFETY: there is one `Now`, and `stages` times at most of the dtype that `wide` says.
        unsafe { arguments.launch(ONE) }.w()?;
        Ok(())
    }

    /// The time of a stage, wherever the clock stands: 0-d.
    pub(crate) fn time(&self, stage: usize) -> Result<Tensor> {
        Ok(self.times.get(stage)?)
    }

    /// Where it is.
    pub(super) fn pointer(&self) -> u64 {
        pointer(&self.now)
    }

    /// Where the number of the first look is.
    pub(super) fn look(&self) -> u64 {
        self.pointer() + std::mem::offset_of!(Now, look) as u64
    }
}
