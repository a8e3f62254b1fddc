//! Solves with fixed steps, a launch for each pass.

use candle_core::cuda_backend::cudarc::driver::{CudaSlice, DeviceRepr, PushKernelArg};
use candle_core::cuda_backend::WrapErr;
use candle_core::{DType, Device, Tensor};

use super::super::launch::{code, count, pointer, Buffer, Operand, MLP};
use super::super::sweep::DeviceScaler;
use super::failure::NetFailure;
use super::layout::with_shared;
use super::{SmallNet, BLOCK};
use crate::error::Result;
use crate::ops::note_host_read;
use crate::scaler::Scaler;

/// A step as kernels see it.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(crate) struct NetStep {
    pub(crate) t: f64,
    pub(crate) h: f64,
    /// The times at which stages at its ends are evaluated.
    pub(crate) limits: [f64; 2],
    /// Which output y_{n+1} is, or −1.
    pub(crate) output: i32,
    /// Which output y_n is, if its cotangent enters, or −1.
    pub(crate) given: i32,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct NetSolve {
    steps: u64,
    count: u64,
    rows: u64,
    compute: i32,
    store: i32,
    returns_first: i32,
    y0: u64,
    given: u64,
    out: u64,
    kept: u64,
    parts: u64,
    totals: u64,
    report: u64,
    keeps_all: i32,
    parts_shared: i32,
    flush: i32,
    most_attempts: u32,
    scaler: DeviceScaler,
}

/// What the host reads, once a pass.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct Report {
    failure: u64,
    retries: u32,
    smallest: i32,
    largest: i32,
}

// SAFETY: plain numbers, laid out as in kernels/mlp.cu.
unsafe impl DeviceRepr for NetStep {}
// SAFETY: as above.
unsafe impl DeviceRepr for NetSolve {}
// SAFETY: as above.
unsafe impl DeviceRepr for Report {}

impl Report {
    const EMPTY: Self = Self {
        failure: u64::MAX,
        retries: 0,
        smallest: i32::MAX,
        largest: i32::MIN,
    };
}

/// What a pass reports beside its results.
pub(crate) struct Told {
    pub(crate) failure: Option<NetFailure>,
    pub(crate) retries: usize,
    /// Exponents of the smallest and the largest S.
    pub(crate) exponents: (i32, i32),
}

impl SmallNet {
    /// Steps in device memory.
    pub(crate) fn upload(&self, steps: &[NetStep]) -> Result<CudaSlice<NetStep>> {
        let none = [NetStep {
            t: 0.0,
            h: 0.0,
            limits: [0.0; 2],
            output: -1,
            given: -1,
        }];
        Ok(self
            .device
            .clone_htod(if steps.is_empty() { &none[..] } else { steps })?)
    }

    /// Returned states, `(outputs, elements)`, and what is kept, `(steps, elements)`.
    pub(crate) fn forward(&self, pass: &NetForward<'_>) -> Result<(Tensor, Option<Tensor>, Told)> {
        let elements = pass.y0.elem_count();
        let y0 = pass.y0.contiguous()?;
        let y0_at = Operand::new(&y0)?;
        count(pass.outputs * elements)?;
        let out = Buffer::new(&self.device, DType::F32, pass.outputs * elements)?;
        let kept = pass.keeps && pass.count > 0;
        let kept = kept
            .then(|| Buffer::of_any_size(&self.device, pass.store, pass.count * elements))
            .transpose()?;
        let report = self.device.clone_htod(&[Report::EMPTY])?;
        let rows = (elements / self.net.dim as usize) as u64;
        let solve = NetSolve {
            steps: pointer(pass.steps),
            count: pass.count as u64,
            rows,
            compute: code(pass.compute)?,
            store: code(pass.store)?,
            returns_first: pass.returns_first.into(),
            y0: y0_at.pointer,
            given: 0,
            out: out.pointer,
            kept: kept.as_ref().map_or(0, |kept| kept.pointer),
            parts: 0,
            totals: 0,
            report: pointer(&report),
            keeps_all: 0,
            parts_shared: 0,
            flush: 1,
            most_attempts: 0,
            scaler: DeviceScaler::new(pass.scaler, false),
        };
        let kernel = self.load(&MLP, "mlp_forward", self.fit.forward)?;
        let mut arguments = kernel.builder();
        arguments.arg(&self.net).arg(&self.method).arg(&solve);
        // SAFETY: the tensors have the sizes that net and solve give them, the shared memory is what
        // `fit` found it to be, and `self.tensors` holds the weights.
        unsafe { arguments.launch(with_shared(self.blocks(rows, 4), self.fit.forward)) }.w()?;
        let told = self.read(&report)?;
        let shape = (pass.outputs, elements).into();
        let kept_shape = (pass.count, elements).into();
        Ok((
            out.into_tensor(&shape),
            kept.map(|kept| kept.into_tensor(&kept_shape)),
            told,
        ))
    }

    /// λ_0, and the gradients of weights and biases, in f32.
    pub(crate) fn backward(&self, pass: &NetBackward<'_>) -> Result<(Tensor, Vec<Tensor>, Told)> {
        let given = pass.cotangent.contiguous()?;
        let last = given.get(given.dim(0)? - 1)?.contiguous()?;
        let elements = last.elem_count();
        let rows = (elements / self.net.dim as usize) as u64;
        let (given_at, last_at) = (Operand::new(&given)?, Operand::new(&last)?);
        let kept = pass.kept.map(Operand::of_any_size).transpose()?;
        let out = Buffer::new(&self.device, DType::F32, elements)?;
        let blocks = self.blocks(rows, 2);
        let weights = self.net.weights as usize;
        let totals = Buffer::new(&self.device, DType::F32, blocks as usize * weights)?;
        let parts = match self.fit.parts_shared {
            true => None,
            false => Some(Buffer::new(
                &self.device,
                DType::F32,
                blocks as usize * weights,
            )?),
        };
        let report = self.device.clone_htod(&[Report::EMPTY])?;
        let solve = NetSolve {
            steps: pointer(pass.steps),
            count: pass.count as u64,
            rows,
            compute: code(pass.compute)?,
            store: kept.as_ref().map_or(0, |kept| kept.dtype),
            returns_first: 0,
            y0: last_at.pointer,
            given: given_at.pointer,
            out: out.pointer,
            kept: kept.as_ref().map_or(0, |kept| kept.pointer),
            parts: parts.as_ref().map_or(0, |parts| parts.pointer),
            totals: totals.pointer,
            report: pointer(&report),
            keeps_all: self.fit.keeps_all.into(),
            parts_shared: self.fit.parts_shared.into(),
            flush: (BLOCK / self.method.stages.max(1)).max(1),
            most_attempts: u32::try_from(pass.scaler.most_attempts()).unwrap_or(u32::MAX),
            scaler: DeviceScaler::new(pass.scaler, false),
        };
        let kernel = self.load(&MLP, "mlp_backward", self.fit.backward)?;
        let mut arguments = kernel.builder();
        arguments.arg(&self.net).arg(&self.method).arg(&solve);
        // SAFETY: as in `forward`; sums of gradients have space for every block.
        unsafe { arguments.launch(with_shared(blocks, self.fit.backward)) }.w()?;
        let gradients = self.fold(&totals, blocks, pointer(&report))?;
        let told = self.read(&report)?;
        Ok((out.into_tensor(&elements.into()), gradients, told))
    }

    /// The one look of the host.
    fn read(&self, report: &CudaSlice<Report>) -> Result<Told> {
        note_host_read(&Device::Cuda(self.device.clone()));
        let report = self.device.clone_dtoh(report)?[0];
        Ok(Told {
            failure: NetFailure::of_key(report.failure),
            retries: report.retries as usize,
            exponents: (report.smallest, report.largest),
        })
    }
}

/// A forward pass.
pub(crate) struct NetForward<'a> {
    /// In f32.
    pub(crate) y0: &'a Tensor,
    pub(crate) steps: &'a CudaSlice<NetStep>,
    pub(crate) count: usize,
    pub(crate) outputs: usize,
    pub(crate) returns_first: bool,
    /// Whether states are kept.
    pub(crate) keeps: bool,
    pub(crate) compute: DType,
    pub(crate) store: DType,
    pub(crate) scaler: &'a Scaler,
}

/// A backward pass.
pub(crate) struct NetBackward<'a> {
    /// `(outputs, elements)`, in f32.
    pub(crate) cotangent: &'a Tensor,
    pub(crate) kept: Option<&'a Tensor>,
    pub(crate) steps: &'a CudaSlice<NetStep>,
    pub(crate) count: usize,
    pub(crate) compute: DType,
    pub(crate) scaler: &'a Scaler,
}
