//! Launches of the kernels that solve a small perceptron from first step to last.

mod layout;

use candle_core::cuda_backend::cudarc::driver::sys::{CUdevice_attribute, CUfunction_attribute};
use candle_core::cuda_backend::cudarc::driver::{CudaSlice, DeviceRepr, PushKernelArg};
use candle_core::cuda_backend::WrapErr;
use candle_core::{CudaDevice, DType, Device, Tensor};

use super::launch::{
    code, count, device_of, grid, load, pointer, Buffer, Kernel, Operand, MLP, THREADS,
};
use super::sweep::DeviceScaler;
use crate::error::Result;
use crate::ops::note_host_read;
use crate::scaler::Scaler;
use crate::tableau::Tableau;
use layout::{fit, in_numbers, outline, with_shared};

pub(crate) const MOST_LAYERS: usize = 8;
pub(crate) const MOST_STAGES: usize = 16;

/// Rows of a tile, and the distance of two features.
const ROWS: u64 = 32;
const PITCH: usize = 36;
/// Outputs that a warp computes at once.
const GROUP: usize = 8;

/// A layer as its owner describes it.
pub(crate) struct LayerOf<'a> {
    /// `(out, in)`.
    pub(crate) weight: &'a Tensor,
    pub(crate) bias: &'a Tensor,
    /// Whether its input is added to its output.
    pub(crate) skips: bool,
}

/// A step as kernels see it.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(crate) struct NetStep {
    pub(crate) t: f64,
    pub(crate) h: f64,
    /// Which output y_{n+1} is, or −1.
    pub(crate) output: i32,
    /// Which output y_n is, if its cotangent enters, or −1.
    pub(crate) given: i32,
}

#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
struct NetLayer {
    weight: u64,
    bias: u64,
    inputs: i32,
    outputs: i32,
    padded: i32,
    skips: i32,
    weights: i32,
    biases: i32,
    input: i32,
    slope: i32,
    cotangent: i32,
    unused: i32,
}

#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct Net {
    layers: [NetLayer; MOST_LAYERS],
    count: i32,
    dim: i32,
    time: i32,
    activation: i32,
    dtype: i32,
    keeps_slopes: i32,
    weights: i32,
    slot: i32,
    cotangents: i32,
    widest: i32,
}

#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct NetMethod {
    a: [[f64; MOST_STAGES]; MOST_STAGES],
    b: [f64; MOST_STAGES],
    c: [f64; MOST_STAGES],
    active: [i32; MOST_STAGES],
    stages: i32,
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
unsafe impl DeviceRepr for Net {}
// SAFETY: as above.
unsafe impl DeviceRepr for NetMethod {}
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
    fn of_key(key: u64) -> Option<Self> {
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

/// What a pass reports beside its results.
pub(crate) struct Told {
    pub(crate) failure: Option<NetFailure>,
    pub(crate) retries: usize,
    /// Exponents of the smallest and the largest S.
    pub(crate) exponents: (i32, i32),
}

/// How a backward pass uses the memory of a multiprocessor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Fit {
    /// Bytes of shared memory.
    forward: usize,
    backward: usize,
    /// Whether the activations of all stages of a step are kept.
    pub(crate) keeps_all: bool,
    /// Whether sums of gradients are.
    parts_shared: bool,
}

/// A perceptron that fits onto a multiprocessor, with its method.
#[derive(Debug)]
pub(crate) struct SmallNet {
    device: CudaDevice,
    net: Net,
    method: NetMethod,
    fit: Fit,
    multiprocessors: u32,
    /// Held: the kernels read them.
    tensors: Vec<Tensor>,
}

impl SmallNet {
    /// `None` if it does not fit.
    pub(crate) fn new(
        layers: &[LayerOf<'_>],
        dim: usize,
        time: bool,
        activation: i32,
        keeps_slopes: bool,
        method: &Tableau,
    ) -> Result<Option<Self>> {
        let Some(first) = layers.first() else {
            return Ok(None);
        };
        if layers.len() > MOST_LAYERS || method.stages() > MOST_STAGES {
            return Ok(None);
        }
        let device = device_of(first.weight)?.clone();
        let dtype = first.weight.dtype();
        let tensors = layers.iter().flat_map(|l| [l.weight, l.bias]);
        let tensors = tensors.map(|x| x.detach().contiguous());
        let tensors = tensors.collect::<candle_core::Result<Vec<_>>>()?;
        if tensors
            .iter()
            .any(|x| x.dtype() != dtype || x.elem_count() == 0)
        {
            return Ok(None);
        }
        let mut net = outline(layers, dim, time, keeps_slopes);
        (net.activation, net.dtype) = (activation, code(dtype)?);
        for (layer, pair) in net.layers.iter_mut().zip(tensors.chunks(2)) {
            layer.weight = Operand::new(&pair[0])?.pointer;
            layer.bias = Operand::new(&pair[1])?.pointer;
        }
        let stream = device.cuda_stream();
        let attribute = |attribute| stream.context().attribute(attribute).w();
        let limit =
            attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?;
        let multiprocessors =
            attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?;
        let Some(fit) = fit(&net, method.stages(), limit.max(0) as usize) else {
            return Ok(None);
        };
        Ok(Some(Self {
            method: in_numbers(method),
            multiprocessors: multiprocessors.max(1) as u32,
            device,
            net,
            fit,
            tensors,
        }))
    }

    /// How it uses the memory of a multiprocessor.
    pub(crate) fn fit(&self) -> Fit {
        self.fit
    }

    /// Steps in device memory.
    pub(crate) fn upload(&self, steps: &[NetStep]) -> Result<CudaSlice<NetStep>> {
        let none = [NetStep {
            t: 0.0,
            h: 0.0,
            output: -1,
            given: -1,
        }];
        Ok(self
            .device
            .clone_htod(if steps.is_empty() { &none[..] } else { steps })?)
    }

    /// Blocks for so many rows, `each` to a multiprocessor at most.
    fn blocks(&self, rows: u64, each: u32) -> u32 {
        let tiles = u32::try_from(rows.div_ceil(ROWS)).unwrap_or(u32::MAX);
        tiles.min(self.multiprocessors * each)
    }

    /// A kernel that may use so much shared memory.
    fn load(&self, entry: &str, bytes: usize) -> Result<Kernel> {
        let kernel = load(&self.device, &MLP, entry)?;
        kernel.allow(
            CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES,
            bytes as i32,
        )?;
        Ok(kernel)
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
            .then(|| Buffer::new(&self.device, pass.store, pass.count * elements))
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
        let kernel = self.load("mlp_forward", self.fit.forward)?;
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
        let kept = pass.kept.map(Operand::new).transpose()?;
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
        let kernel = self.load("mlp_backward", self.fit.backward)?;
        let mut arguments = kernel.builder();
        arguments.arg(&self.net).arg(&self.method).arg(&solve);
        // SAFETY: as in `forward`; sums of gradients have space for every block.
        unsafe { arguments.launch(with_shared(blocks, self.fit.backward)) }.w()?;
        let gradients = self.fold(&totals, blocks, pointer(&report))?;
        let told = self.read(&report)?;
        Ok((out.into_tensor(&elements.into()), gradients, told))
    }

    /// The sums of all blocks, by weight and bias.
    fn fold(&self, totals: &Buffer, blocks: u32, report: u64) -> Result<Vec<Tensor>> {
        let kernel = load(&self.device, &MLP, "mlp_fold")?;
        let (blocks, stride) = (blocks as i32, self.net.weights as u64);
        let mut gradients = vec![];
        for (layer, pair) in self.net.layers.iter().zip(self.tensors.chunks(2)) {
            let weight = Buffer::new(&self.device, DType::F32, pair[0].elem_count())?;
            let bias = Buffer::new(&self.device, DType::F32, pair[1].elem_count())?;
            let mut arguments = kernel.builder();
            arguments
                .arg(&totals.pointer)
                .arg(&blocks)
                .arg(&stride)
                .arg(&layer.weights)
                .arg(&layer.biases);
            arguments
                .arg(&layer.inputs)
                .arg(&layer.outputs)
                .arg(&layer.padded);
            arguments
                .arg(&weight.pointer)
                .arg(&bias.pointer)
                .arg(&report);
            let elements = (layer.inputs + 1) * layer.outputs;
            // SAFETY: every block left `stride` sums; weight and bias are as large as the layer's.
            unsafe { arguments.launch(grid((elements as u32).div_ceil(THREADS))) }.w()?;
            gradients.push(weight.into_tensor(pair[0].shape()));
            gradients.push(bias.into_tensor(pair[1].shape()));
        }
        Ok(gradients)
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

/// Evaluations whose gradients are summed before they are added to the total, as in `accumulator`.
const BLOCK: i32 = 128;

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
