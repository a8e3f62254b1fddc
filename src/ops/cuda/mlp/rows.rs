//! Solves with adaptive steps of every row, a launch for each pass.
//!
//! How many steps the rows will take is not known before the launch.  The steps go to a list whose room is estimated
//! from the last solve; where it is too small, the launch counts on, and a second one has exactly the room that is
//! needed.

mod room;

use candle_core::cuda_backend::cudarc::driver::{CudaSlice, DeviceRepr, PushKernelArg};
use candle_core::cuda_backend::WrapErr;
use candle_core::{DType, Device, Tensor};

use super::super::launch::{code, count, pointer, Buffer, Operand, MLP_ROWS, MLP_ROWS_BACK};
use super::super::sweep::DeviceScaler;
use super::control::DeviceControl;
use super::failure::NetFailure;
use super::layout::with_shared;
use super::{SmallNet, BLOCK};
use crate::error::{Error, Result};
use crate::ops::note_host_read;
use crate::scaler::Scaler;

/// An accepted step in the list of its row, laid out as `Recorded` in kernels/rows.cuh.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct NetRecorded {
    t: f64,
    h: f64,
    previous: u32,
    jumps: u32,
}

/// What became of a row, laid out as in kernels/rows.cuh.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(crate) struct RowReport {
    /// Where it is.
    pub(crate) t: f64,
    /// Length and error of the last attempt, if it was rejected; the length of one in which time would stand still.
    pub(crate) h: f64,
    pub(crate) error: f64,
    /// Where the backward pass found a number that is not finite.
    pub(crate) bad_t: f64,
    pub(crate) accepted: u32,
    pub(crate) rejected: u32,
    pub(crate) evaluations: u32,
    pub(crate) limited: u32,
    /// The largest error without a noise floor.
    pub(crate) factor: f64,
    pub(crate) bad_step: u32,
    last: u32,
    reason: i32,
    /// States that it returned.
    pub(crate) returned: i32,
    worst: i32,
    rejected_last: i32,
}

/// Why a row did not reach the end, or is not to count.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Reason {
    Attempts,
    Underflow,
    NonFinite,
    Limited,
    TimeStandsStill,
}

impl RowReport {
    /// Why it stopped, if it did.
    pub(crate) fn reason(&self) -> Option<Reason> {
        match self.reason {
            0 => None,
            1 => Some(Reason::Attempts),
            2 => Some(Reason::Underflow),
            3 => Some(Reason::NonFinite),
            4 => Some(Reason::Limited),
            _ => Some(Reason::TimeStandsStill),
        }
    }

    /// The element whose error was largest in the last attempt, if it was rejected.
    pub(crate) fn worst(&self) -> Option<usize> {
        usize::try_from(self.worst).ok()
    }

    /// Whether no attempt was made.
    pub(crate) fn has_not_begun(&self) -> bool {
        self.accepted == 0 && self.rejected_last == 0
    }
}

/// What the host reads, once a pass, laid out as in kernels/rows.cuh.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct RowsReport {
    failure: u64,
    retries: u32,
    smallest: i32,
    largest: i32,
    unused: u32,
    queue: u64,
    recorded: u64,
    failed: u64,
    steps: u64,
    rejected: u64,
    forced: u64,
    limited: u64,
    evaluations: u64,
    row_evaluations: u64,
    tile_evaluations: u64,
    recomputed: u64,
    pulls: u64,
    factor: u64,
    shortest: u64,
    longest: u64,
    first: f64,
}

impl RowsReport {
    const EMPTY: Self = Self {
        failure: u64::MAX,
        retries: 0,
        smallest: i32::MAX,
        largest: i32::MIN,
        unused: 0,
        queue: 0,
        recorded: 0,
        failed: u64::MAX,
        steps: 0,
        rejected: 0,
        forced: 0,
        limited: 0,
        evaluations: 0,
        row_evaluations: 0,
        tile_evaluations: 0,
        recomputed: 0,
        pulls: 0,
        factor: 0,
        shortest: u64::MAX,
        longest: 0,
        first: 0.0,
    };
}

#[repr(C)]
#[derive(Clone, Copy)]
struct RowsSolve {
    control: u64,
    rows: u64,
    capacity: u64,
    compute: i32,
    store: i32,
    y0: u64,
    given: u64,
    out: u64,
    steps: u64,
    kept: u64,
    reports: u64,
    report: u64,
    parts: u64,
    totals: u64,
    keeps_all: i32,
    parts_shared: i32,
    flush: i32,
    most_attempts: u32,
    scaler: DeviceScaler,
}

// SAFETY: plain numbers, laid out as in kernels/rows.cuh.
unsafe impl DeviceRepr for NetRecorded {}
// SAFETY: as above.
unsafe impl DeviceRepr for RowReport {}
// SAFETY: as above.
unsafe impl DeviceRepr for RowsReport {}
// SAFETY: as above.
unsafe impl DeviceRepr for RowsSolve {}

/// A forward pass.
pub(crate) struct RowsForward<'a> {
    /// In f32.
    pub(crate) y0: &'a Tensor,
    pub(crate) control: &'a DeviceControl,
    pub(crate) outputs: usize,
    /// The most steps of a row.
    pub(crate) most_steps: usize,
    /// Whether a row that stops is an error.
    pub(crate) fails: bool,
    /// Whether steps are recorded, and states with them.
    pub(crate) records: bool,
    pub(crate) keeps: bool,
    pub(crate) compute: DType,
    pub(crate) store: DType,
    pub(crate) scaler: &'a Scaler,
}

/// What a forward pass leaves on the device.
pub(crate) struct RowsKept {
    rows: usize,
    steps: Option<CudaSlice<NetRecorded>>,
    kept: Option<Tensor>,
    reports: CudaSlice<RowReport>,
}

/// What a forward pass reports beside its results.
pub(crate) struct RowsTold {
    pub(crate) failure: Option<NetFailure>,
    /// The first row that stopped.
    pub(crate) failed: Option<usize>,
    /// The most of any row.
    pub(crate) steps: usize,
    pub(crate) rejected: usize,
    pub(crate) forced: usize,
    pub(crate) limited: usize,
    pub(crate) evaluations: usize,
    pub(crate) row_evaluations: usize,
    pub(crate) tile_evaluations: usize,
    /// The largest error without a floor.
    pub(crate) factor: f64,
    /// The shortest and the longest step, and the first of the first row.
    pub(crate) range: Option<(f64, f64)>,
    pub(crate) first: Option<f64>,
    /// Steps of all rows.
    pub(crate) recorded: usize,
}

/// A backward pass.
pub(crate) struct RowsBackward<'a> {
    /// `(outputs, elements)`, in f32.
    pub(crate) cotangent: &'a Tensor,
    pub(crate) control: &'a DeviceControl,
    pub(crate) kept: &'a RowsKept,
    pub(crate) compute: DType,
    pub(crate) scaler: &'a Scaler,
}

/// What a backward pass reports beside its results.
pub(crate) struct RowsPulled {
    pub(crate) failure: Option<NetFailure>,
    /// Evaluations and pull-backs of the block that made the most, repeated ones not counted; and these of all.
    pub(crate) recomputed: usize,
    pub(crate) pulls: usize,
    pub(crate) retries: usize,
    /// Exponents of the smallest and the largest S.
    pub(crate) exponents: (i32, i32),
}

impl SmallNet {
    /// Returned states, `(outputs, elements)`, and the way back.
    pub(crate) fn forward_by_row(
        &self,
        pass: &RowsForward<'_>,
    ) -> Result<(Tensor, RowsKept, RowsTold)> {
        let y0 = pass.y0.contiguous()?;
        let rows = y0.elem_count() / self.net.dim as usize;
        let mut room = self.room(pass, rows)?;
        loop {
            let solved = self.launch_forward(pass, &y0, room)?;
            let told = &solved.2;
            let fits = !pass.records || told.recorded <= room;
            let fails = told.failure.is_some() || pass.fails && told.failed.is_some();
            if fits || fails {
                let mean = told.recorded.div_ceil(rows.max(1));
                if pass.records && !fails {
                    room::note(mean);
                }
                let (packed, kept, told) = solved;
                let kept = match fits {
                    true => self.without_spare_room(kept, room, told.recorded)?,
                    false => kept,
                };
                return Ok((packed, kept, told));
            }
            room = told.recorded;
            room::check(room)?;
        }
    }

    fn launch_forward(
        &self,
        pass: &RowsForward<'_>,
        y0: &Tensor,
        room: usize,
    ) -> Result<(Tensor, RowsKept, RowsTold)> {
        let (elements, dim) = (y0.elem_count(), self.net.dim as usize);
        let rows = elements / dim;
        count(pass.outputs.saturating_mul(elements))?;
        let y0 = Operand::new(y0)?;
        let out = Buffer::new(&self.device, DType::F32, pass.outputs * elements)?;
        // SAFETY: a pass back reads only what the forward pass has written.
        let steps = pass
            .records
            .then(|| unsafe { self.device.alloc::<NetRecorded>(room) })
            .transpose()?;
        let kept = (pass.keeps && pass.records)
            .then(|| Buffer::of_any_size(&self.device, pass.store, room.saturating_mul(dim)))
            .transpose()?;
        // SAFETY: every row writes its report, unless the solve fails before; then nobody reads it.
        let reports = unsafe { self.device.alloc::<RowReport>(rows.max(1)) }?;
        let report = self.device.clone_htod(&[RowsReport::EMPTY])?;
        let solve = RowsSolve {
            control: pass.control.pointer(),
            rows: rows as u64,
            capacity: room as u64,
            compute: code(pass.compute)?,
            store: code(pass.store)?,
            y0: y0.pointer,
            given: 0,
            out: out.pointer,
            steps: steps.as_ref().map_or(0, pointer),
            kept: kept.as_ref().map_or(0, |kept| kept.pointer),
            reports: pointer(&reports),
            report: pointer(&report),
            parts: 0,
            totals: 0,
            keeps_all: 0,
            parts_shared: 0,
            flush: 1,
            most_attempts: 0,
            scaler: DeviceScaler::new(pass.scaler, false),
        };
        let kernel = self.load(&MLP_ROWS, "mlp_rows_forward", self.fit.forward)?;
        let mut arguments = kernel.builder();
        arguments.arg(&self.net).arg(&self.method).arg(&solve);
        // SAFETY: the tensors have the sizes that net and solve give them, and nothing is recorded beyond `capacity`;
        // the shared memory is what `fit` found it to be, and `self.tensors` holds the weights.
        let launch = with_shared(self.blocks(rows as u64, 4), self.fit.forward);
        unsafe { arguments.launch(launch) }.w()?;
        let told = self.read_report(&report)?;
        let positive = |bits: u64| Some(f64::from_bits(bits)).filter(|h| *h > 0.0);
        let told = RowsTold {
            failure: NetFailure::of_key(told.failure),
            failed: usize::try_from(told.failed).ok().filter(|row| *row < rows),
            steps: told.steps as usize,
            rejected: told.rejected as usize,
            forced: told.forced as usize,
            limited: told.limited as usize,
            evaluations: told.evaluations as usize,
            row_evaluations: told.row_evaluations as usize,
            tile_evaluations: told.tile_evaluations as usize,
            factor: f64::from_bits(told.factor),
            range: positive(told.longest).map(|longest| (f64::from_bits(told.shortest), longest)),
            first: Some(told.first).filter(|h| *h > 0.0),
            recorded: told.recorded as usize,
        };
        let kept = RowsKept {
            rows,
            steps,
            kept: kept.map(|kept| kept.into_tensor(&(room, dim).into())),
            reports,
        };
        Ok((
            out.into_tensor(&(pass.outputs, elements).into()),
            kept,
            told,
        ))
    }

    /// λ_0, and the gradients of weights and biases, in f32.
    pub(crate) fn backward_by_row(
        &self,
        pass: &RowsBackward<'_>,
    ) -> Result<(Tensor, Vec<Tensor>, RowsPulled)> {
        let RowsKept {
            rows,
            steps: Some(steps),
            kept: Some(kept),
            reports,
        } = pass.kept
        else {
            return Err(Error::NothingKept);
        };
        let given = pass.cotangent.contiguous()?;
        let elements = rows * self.net.dim as usize;
        let (given, kept) = (Operand::new(&given)?, Operand::of_any_size(kept)?);
        let out = Buffer::new(&self.device, DType::F32, elements)?;
        let blocks = self.blocks(*rows as u64, 2);
        let sums = blocks as usize * self.net.weights as usize;
        let totals = Buffer::new(&self.device, DType::F32, sums)?;
        let parts = (!self.fit.parts_shared)
            .then(|| Buffer::new(&self.device, DType::F32, sums))
            .transpose()?;
        let report = self.device.clone_htod(&[RowsReport::EMPTY])?;
        let solve = RowsSolve {
            control: pass.control.pointer(),
            rows: *rows as u64,
            capacity: steps.len() as u64,
            compute: code(pass.compute)?,
            store: kept.dtype,
            y0: 0,
            given: given.pointer,
            out: out.pointer,
            steps: pointer(steps),
            kept: kept.pointer,
            reports: pointer(reports),
            report: pointer(&report),
            parts: parts.as_ref().map_or(0, |parts| parts.pointer),
            totals: totals.pointer,
            keeps_all: self.fit.keeps_all.into(),
            parts_shared: self.fit.parts_shared.into(),
            flush: (BLOCK / self.method.stages.max(1)).max(1),
            most_attempts: u32::try_from(pass.scaler.most_attempts()).unwrap_or(u32::MAX),
            scaler: DeviceScaler::new(pass.scaler, false),
        };
        let kernel = self.load(&MLP_ROWS_BACK, "mlp_rows_backward", self.fit.backward)?;
        let mut arguments = kernel.builder();
        arguments.arg(&self.net).arg(&self.method).arg(&solve);
        // SAFETY: as in `launch_forward`; sums of gradients have space for every block.
        unsafe { arguments.launch(with_shared(blocks, self.fit.backward)) }.w()?;
        let gradients = self.fold(&totals, blocks, pointer(&report))?;
        let told = self.read_report(&report)?;
        let pulled = RowsPulled {
            failure: NetFailure::of_key(told.failure),
            recomputed: told.recomputed as usize,
            pulls: told.pulls as usize,
            retries: told.retries as usize,
            exponents: (told.smallest, told.largest),
        };
        Ok((out.into_tensor(&elements.into()), gradients, pulled))
    }

    /// The one look of the host.
    fn read_report(&self, report: &CudaSlice<RowsReport>) -> Result<RowsReport> {
        self.note_read();
        Ok(self.device.clone_dtoh(report)?[0])
    }

    fn note_read(&self) {
        note_host_read(&Device::Cuda(self.device.clone()));
    }

    /// What became of every row, and the times of its steps where they were recorded.
    pub(crate) fn rows(&self, kept: &RowsKept) -> Result<Vec<(RowReport, Vec<f64>)>> {
        self.note_read();
        let reports = self.device.clone_dtoh(&kept.reports)?;
        let steps = match &kept.steps {
            Some(steps) => self.device.clone_dtoh(steps)?,
            None => vec![],
        };
        let times = |report: &RowReport| {
            let (mut times, mut at) = (vec![report.t], report.last as usize);
            for _ in 0..report.accepted {
                let Some(step) = steps.get(at) else { break };
                times.push(step.t);
                at = step.previous as usize;
            }
            times.reverse();
            times
        };
        let rows = reports.into_iter().take(kept.rows);
        Ok(rows.map(|report| (report, times(&report))).collect())
    }

    /// What became of one row.
    pub(crate) fn row(&self, kept: &RowsKept, row: usize) -> Result<RowReport> {
        self.note_read();
        let report = self.device.clone_dtoh(&kept.reports.slice(row..row + 1))?;
        Ok(report[0])
    }
}
