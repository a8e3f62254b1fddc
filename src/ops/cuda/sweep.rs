//! What a backward sweep keeps on the device: S, the counts behind it, and whether a pull-back
//! overflowed, so that the host need not look until the end.

use candle_core::cuda_backend::cudarc::driver::{CudaSlice, DeviceRepr, PushKernelArg};
use candle_core::cuda_backend::WrapErr;
use candle_core::{CudaDevice, DType, Device, Tensor};

use super::clock::Clock;
use super::launch::{
    blocks, device_of, grid, in_f64, load, look, pointer, raise, Buffer, Look, Looks, Operand,
    Sink, ADJOINT, ONE, SCALER, SEED,
};
use super::sums::{split, Sum};
use crate::error::{Error, Result};
use crate::ops::note_host_read;
use crate::precision::Rounding;
use crate::scaler::{Outcome, Scaler, Settings};

/// The scaler in device memory, laid out as in kernels/scaler.cuh.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(super) struct DeviceScaler {
    scale: f64,
    inverse: f64,
    smallest: f64,
    largest: f64,
    low: u64,
    all: u64,
    dynamic: i32,
    aimed: i32,
    exponent: i32,
    level: i32,
    aim: i32,
    ceiling: i32,
    clean: u32,
    growth_interval: u32,
    recovery_interval: u32,
    overflow: u32,
    stopped: u32,
    step: u32,
    first: u32,
    watched: u32,
    set: u32,
}

// SAFETY: plain numbers, laid out as in kernels/scaler.cuh.
unsafe impl DeviceRepr for DeviceScaler {}

impl DeviceScaler {
    /// As the host has it; `resumed` with an S that is about to be used.
    pub(super) fn new(scaler: &Scaler, resumed: bool) -> Self {
        let Settings {
            exponent,
            level,
            aim,
            ceiling,
            clean,
            intervals: [growth_interval, recovery_interval],
        } = scaler.settings();
        let scale = scaler.scale();
        let used = if resumed { scale } else { 0.0 };
        Self {
            scale,
            inverse: 1.0 / scale,
            smallest: used,
            largest: used,
            low: 0,
            all: 0,
            dynamic: scaler.is_dynamic().into(),
            aimed: exponent.is_some().into(),
            exponent: exponent.unwrap_or(0),
            level,
            aim,
            ceiling,
            clean,
            growth_interval,
            recovery_interval,
            overflow: NOTHING,
            stopped: 0,
            step: 0,
            first: NOTHING,
            watched: NOTHING,
            set: resumed.into(),
        }
    }
}

/// Nothing overflowed, nothing was found.
const NOTHING: u32 = u32::MAX;

/// One sweep's state on the device.
pub(crate) struct SweepState {
    device: CudaDevice,
    /// What the host last wrote.
    start: DeviceScaler,
    scaler: CudaSlice<DeviceScaler>,
}

/// How a sweep ended.
pub(crate) struct Finding {
    /// The first look that found NaN or infinity in λ.
    pub(crate) bad: Option<usize>,
    /// The first of the looks that were gathered.
    pub(crate) watched: Option<usize>,
    /// Where it stopped because a pull-back overflowed.
    pub(crate) stop: Option<Stop>,
    /// Smallest and largest S.
    pub(crate) scales: Option<(f64, f64)>,
}

/// An overflow: nothing of this step and of those after it has been added to λ and θ̄.
pub(crate) struct Stop {
    pub(crate) step: usize,
    pub(crate) outcome: Outcome,
    /// The scaler that overflowed.
    pub(crate) scaler: Scaler,
}

impl SweepState {
    /// A sweep that starts with this scaler, from this λ.
    pub(crate) fn new(scaler: Scaler, adj: &[Tensor], can_overflow: &[bool]) -> Result<Self> {
        let Some(x) = adj.first() else {
            return Err(Error::EmptyState);
        };
        let device = device_of(x)?.clone();
        let start = DeviceScaler::new(&scaler, false);
        let state = Self {
            scaler: device.clone_htod(&[start])?,
            device,
            start,
        };
        if scaler.is_dynamic() {
            state.raise(adj.iter().enumerate(), can_overflow)?;
        }
        Ok(state)
    }

    /// Raises max|λ| to that of other tensors, each with its leaf, which enter the next step's pull-backs.
    pub(crate) fn raise<'t>(
        &self,
        tensors: impl Iterator<Item = (usize, &'t Tensor)> + Clone,
        can_overflow: &[bool],
    ) -> Result<()> {
        let low = std::mem::offset_of!(DeviceScaler, low) as u64;
        let all = std::mem::offset_of!(DeviceScaler, all) as u64;
        let looked_at = tensors.clone().filter(|(leaf, _)| can_overflow[*leaf]);
        for (tensors, at) in [
            (looked_at.map(|(_, x)| x.clone()).collect::<Vec<_>>(), low),
            (tensors.map(|(_, x)| x.clone()).collect(), all),
        ] {
            raise(&self.device, &tensors, self.pointer() + at)?;
        }
        Ok(())
    }

    /// Goes on after an overflow, where it is, at a step for which S is set.
    pub(crate) fn resume(&mut self, scaler: Scaler) -> Result<()> {
        self.start = DeviceScaler::new(&scaler, true);
        self.device.memcpy_htod(&[self.start], &mut self.scaler)?;
        Ok(())
    }

    /// Where it is.
    pub(super) fn pointer(&self) -> u64 {
        pointer(&self.scaler)
    }

    /// Aims S at max|λ| before a step, unless it is set.
    pub(crate) fn aim(&self) -> Result<()> {
        let at = self.pointer();
        let kernel = load(&self.device, &SCALER, "scaler_aim")?;
        let mut arguments = kernel.builder();
        arguments.arg(&at);
        // SAFETY: the kernel reads and writes the scaler alone.
        unsafe { arguments.launch(ONE) }.w()?;
        Ok(())
    }

    /// Counts a step, or the one that a clock shows, as clean, or stops the sweep there.
    pub(crate) fn settle(&self, step: usize, clock: Option<&Clock>) -> Result<()> {
        let (at, step, clock) = (self.pointer(), step as u32, clock.map_or(0, Clock::pointer));
        let kernel = load(&self.device, &SCALER, "scaler_settle")?;
        let mut arguments = kernel.builder();
        arguments.arg(&at).arg(&step).arg(&clock);
        // SAFETY: the kernel reads and writes the scaler, and reads the clock.
        unsafe { arguments.launch(ONE) }.w()?;
        Ok(())
    }

    /// `round(S Σ c_j x_j)`, terms from `scaled_from` on divided by S first, and multiplied by the h of a
    /// clock if there is one.
    pub(crate) fn seed(
        &self,
        terms: &[(f64, &Tensor)],
        scaled_from: usize,
        out: Rounding,
        clock: Option<&Clock>,
    ) -> Result<Tensor> {
        let (coefficients, xs) = split(terms)?;
        let first = &xs[0];
        let sum = Sum::new(&coefficients, &xs)?
            .scaled_from(scaled_from)
            .stepped_from(scaled_from, clock);
        let buffer = Buffer::new(&self.device, out.held, first.elem_count())?;
        let (sink, at) = (Sink::new(&buffer, out)?, self.pointer());
        let kernel = load(
            &self.device,
            &SEED,
            in_f64(sum.wide, ["seed_f32", "seed_f64"]),
        )?;
        let mut arguments = kernel.builder();
        arguments.arg(&sum.terms).arg(&at).arg(&sink).arg(&sum.n);
        // SAFETY: all operands and the result have n elements, of the dtypes given.
        unsafe { arguments.launch(grid(blocks(sum.n as usize))) }.w()?;
        Ok(buffer.into_tensor(first.shape()))
    }

    /// Looks whether the `pulled`th pull-back of the step overflowed, in the state or in parameters.
    pub(crate) fn look(&self, pulled: usize, outcome: Outcome, xs: &[Tensor]) -> Result<()> {
        let overflow = std::mem::offset_of!(DeviceScaler, overflow) as u64;
        let parameters = u32::from(outcome == Outcome::ParameterOverflow);
        let index = 2 * pulled as u32 + parameters;
        let first = self.pointer() + overflow;
        let from = 0;
        look(&self.device, xs, Look { first, from, index })
    }

    /// λ + Σ c_j/S w_j + ȳ in place, with what rounding has taken from λ if that is carried, unless the sweep has stopped, with look `index`.  With a clock the
    /// c_j are multiplied by its h, and looks count from the one that it shows.
    pub(crate) fn update(
        &self,
        (adj, lost): (&Tensor, Option<&Tensor>),
        ws: &[(f64, &Tensor)],
        incoming: Option<&Tensor>,
        index: usize,
        can_overflow: bool,
        clock: Option<&Clock>,
    ) -> Result<()> {
        let terms: Vec<_> = std::iter::once((1.0, adj))
            .chain(ws.iter().copied())
            .collect();
        let (coefficients, xs) = split(&terms)?;
        let sum = Sum::new(&coefficients, &xs)?
            .scaled_from(1)
            .stepped_from(1, clock);
        let incoming = incoming.map(Tensor::contiguous).transpose()?;
        let incoming = incoming.as_ref().map(Operand::new).transpose()?;
        if incoming.as_ref().is_some_and(|y| y.n != sum.n) {
            return Err(
                candle_core::Error::Msg("a cotangent of another size than λ".into()).into(),
            );
        }
        let (given, given_dtype) = incoming.as_ref().map_or((0, 0), |y| (y.pointer, y.dtype));
        let wide = adj.dtype() == DType::F64;
        let to = Operand::new(adj)?;
        let lost = lost.map(Operand::new).transpose()?;
        if lost.as_ref().is_some_and(|lost| lost.n != sum.n) {
            return Err(candle_core::Error::Msg("λ has lost another size".into()).into());
        }
        let lost_at = lost.as_ref().map_or(0, |lost| lost.pointer);
        let (at, index, can_overflow) = (self.pointer(), index as u32, i32::from(can_overflow));
        let clock = clock.map_or(0, Clock::pointer);
        let kernel = load(
            &self.device,
            &ADJOINT,
            in_f64(wide, ["adjoint_f32", "adjoint_f64"]),
        )?;
        let mut arguments = kernel.builder();
        arguments.arg(&sum.terms).arg(&at).arg(&to.pointer);
        arguments
            .arg(&lost_at)
            .arg(&given)
            .arg(&given_dtype)
            .arg(&index)
            .arg(&clock)
            .arg(&can_overflow)
            .arg(&sum.n);
        // SAFETY: all operands have n elements of the dtypes given, and λ and what it has lost are of the entry's
        // dtype; each thread reads its own elements of them before it writes them.
        unsafe { arguments.launch(grid(blocks(sum.n as usize))) }.w()?;
        Ok(())
    }

    /// Takes up what other looks found.
    pub(crate) fn gather(&self, looks: &Looks) -> Result<()> {
        let (at, first) = (self.pointer(), looks.first());
        let kernel = load(&self.device, &SCALER, "scaler_gather")?;
        let mut arguments = kernel.builder();
        arguments.arg(&at).arg(&first);
        // SAFETY: the kernel reads one u32 and writes the scaler alone.
        unsafe { arguments.launch(ONE) }.w()?;
        Ok(())
    }

    /// What became of the sweep: the one look of the host.
    pub(crate) fn read(&self, scaler: Scaler) -> Result<Finding> {
        note_host_read(&Device::Cuda(self.device.clone()));
        let now = self.device.clone_dtoh(&self.scaler)?[0];
        let found = |at: u32| (at != NOTHING).then_some(at as usize);
        let stop = (now.stopped != 0).then(|| Stop {
            step: now.step as usize,
            outcome: match now.overflow % 2 {
                0 => Outcome::StateOverflow,
                _ => Outcome::ParameterOverflow,
            },
            scaler: scaler.with(Settings {
                exponent: (now.aimed != 0).then_some(now.exponent),
                level: now.level,
                aim: now.aim,
                ceiling: now.ceiling,
                clean: now.clean,
                intervals: [self.start.growth_interval, self.start.recovery_interval],
            }),
        });
        Ok(Finding {
            bad: found(now.first),
            watched: found(now.watched),
            stop,
            scales: (now.largest > 0.0).then_some((now.smallest, now.largest)),
        })
    }
}
