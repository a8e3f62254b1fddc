//! Launches of the kernels that solve a small perceptron from first step to last.

mod control;
mod failure;
mod fixed;
mod layout;
mod rows;

use candle_core::cuda_backend::cudarc::driver::sys::{CUdevice_attribute, CUfunction_attribute};
use candle_core::cuda_backend::cudarc::driver::{DeviceRepr, PushKernelArg};
use candle_core::cuda_backend::WrapErr;
use candle_core::{CudaDevice, DType, Tensor};

use super::launch::{code, device_of, grid, load, Buffer, Kernel, Module, Operand, MLP, THREADS};
use crate::error::Result;
use crate::tableau::Tableau;
pub(crate) use control::{ControlOf, DeviceControl};
pub(crate) use failure::NetFailure;
pub(crate) use fixed::{NetBackward, NetForward, NetStep};
use layout::{fit, in_numbers, outline};
pub(crate) use rows::{Reason, RowReport, RowsBackward, RowsForward, RowsKept, RowsTold};

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

// SAFETY: plain numbers, laid out as in kernels/net.cuh.
unsafe impl DeviceRepr for Net {}
// SAFETY: as above.
unsafe impl DeviceRepr for NetMethod {}

/// Which steps a solve takes: the same for all rows, known before, or steps of every row, chosen on the way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum StepsOf {
    Batch,
    Row,
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
        (method, steps): (&Tableau, StepsOf),
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
        let Some(fit) = fit(&net, method.stages(), steps, limit.max(0) as usize) else {
            return Ok(None);
        };
        Ok(Some(Self {
            method: in_numbers(method, steps),
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

    /// Blocks for so many rows, `each` to a multiprocessor at most.
    fn blocks(&self, rows: u64, each: u32) -> u32 {
        let tiles = u32::try_from(rows.div_ceil(ROWS)).unwrap_or(u32::MAX);
        tiles.min(self.multiprocessors * each)
    }

    /// A kernel that may use so much shared memory.
    fn load(&self, module: &Module, entry: &str, bytes: usize) -> Result<Kernel> {
        let kernel = load(&self.device, module, entry)?;
        kernel.allow(
            CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES,
            bytes as i32,
        )?;
        Ok(kernel)
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
}

/// Evaluations whose gradients are summed before they are added to the total, as in `accumulator`.
const BLOCK: i32 = 128;
