//! Modules, tensors in device memory as kernels see them, and launches.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::Arc;

use candle_core::cuda_backend::cudarc::driver::sys::CUfunction_attribute;
use candle_core::cuda_backend::cudarc::driver::{
    CudaFunction, CudaSlice, CudaStream, DevicePtr, DeviceRepr, LaunchArgs, LaunchConfig,
    PushKernelArg,
};
use candle_core::cuda_backend::{CudaStorageSlice, WrapErr};
use candle_core::op::BackpropOp;
use candle_core::{CudaDevice, CudaStorage, DType, Device, Shape, Storage, StorageRef, Tensor};
use half::{bf16, f16};

use super::clock::Clock;
use crate::error::{Error, Result};
use crate::ops::note_host_read;
use crate::precision::Rounding;

/// Major compute capability of the oldest GPU that kernels are compiled for: `BASELINE` in build.rs.
const OLDEST: i32 = 8;

/// Threads of a block, and elements that each handles.
pub(super) const THREADS: u32 = 256;
const FOUR: usize = 4;
pub(super) const PER_BLOCK: usize = THREADS as usize * FOUR;

/// A file of kernels.
pub(super) struct Module {
    name: &'static str,
    ptx: &'static str,
    #[cfg(test)]
    entries: &'static [&'static str],
}

macro_rules! modules {
    ($($module:ident = $file:literal: $($entry:literal)+;)+) => {
        $(
            pub(super) const $module: Module = Module {
                name: concat!("candle-diffeq/", $file),
                ptx: include_str!(concat!(env!("OUT_DIR"), "/", $file, ".ptx")),
                #[cfg(test)]
                entries: &[$($entry),+],
            };
        )+
        /// All of them.
        #[cfg(test)]
        const MODULES: &[Module] = &[$($module),+];
    };
}

modules! {
    STAGE = "stage": "stage_f32" "stage_f64";
    UPDATE = "update": "update_f32" "update_f64";
    SEED = "seed": "seed_f32" "seed_f64";
    ADJOINT = "adjoint": "adjoint_f32" "adjoint_f64";
    ACCUMULATE = "accumulate": "accumulate_f32" "accumulate_f64";
    CLOCK = "clock": "clock_tick";
    LOOK = "look": "look" "magnitude";
    DOT = "dot": "dot_parts" "dot_total";
    SCALER = "scaler": "scaler_aim" "scaler_settle" "scaler_gather";
    LAYER = "layer": "layer_forward_f32" "layer_backward_f32" "layer_total_f32"
        "layer_forward_f64" "layer_backward_f64" "layer_total_f64";
    CSR = "csr": "csr_product_f32" "csr_product_f64" "csr_sampled_f32" "csr_sampled_f64";
    MLP = "mlp": "mlp_forward" "mlp_backward" "mlp_fold";
    MLP_ROWS = "mlp_rows": "mlp_rows_forward";
    MLP_ROWS_BACK = "mlp_rows_back": "mlp_rows_backward";
}

/// The GPU that a tensor is on.
pub(super) fn device_of(x: &Tensor) -> Result<&CudaDevice> {
    match x.device() {
        Device::Cuda(device) => Ok(device),
        _ => Err(elsewhere()),
    }
}

/// A dtype as kernels know it.
pub(super) fn code(dtype: DType) -> Result<i32> {
    match dtype {
        DType::F16 => Ok(0),
        DType::BF16 => Ok(1),
        DType::F32 => Ok(2),
        DType::F64 => Ok(3),
        dtype => Err(candle_core::Error::UnsupportedDTypeForOp(dtype, "a kernel").into()),
    }
}

/// Elements as a kernel counts them; more than candle's own kernels can count are an error.
pub(super) fn count(elements: usize) -> Result<u64> {
    match u32::try_from(elements) {
        Ok(n) if n <= i32::MAX as u32 => Ok(n.into()),
        _ => Err(Error::TooLarge { elements }),
    }
}

/// Blocks for so many elements.
pub(super) fn blocks(elements: usize) -> u32 {
    elements.div_ceil(PER_BLOCK) as u32
}

/// A grid of blocks of [`THREADS`] threads.
pub(super) fn grid(blocks: u32) -> LaunchConfig {
    LaunchConfig {
        grid_dim: (blocks, 1, 1),
        block_dim: (THREADS, 1, 1),
        shared_mem_bytes: 0,
    }
}

/// One thread.
pub(super) const ONE: LaunchConfig = LaunchConfig {
    grid_dim: (1, 1, 1),
    block_dim: (1, 1, 1),
    shared_mem_bytes: 0,
};

/// A kernel, loaded, and the stream that it will run on.
pub(super) struct Kernel {
    function: CudaFunction,
    stream: Arc<CudaStream>,
}

impl Kernel {
    /// Sets an attribute, such as how much shared memory it may ask for.
    pub(super) fn allow(&self, attribute: CUfunction_attribute, value: i32) -> Result<()> {
        Ok(self.function.set_attribute(attribute, value).w()?)
    }

    /// An empty list of arguments.
    pub(super) fn builder(&self) -> LaunchArgs<'_> {
        self.stream.launch_builder(&self.function)
    }
}

/// A kernel of `module`.
pub(super) fn load(device: &CudaDevice, module: &Module, entry: &str) -> Result<Kernel> {
    check_capability(device)?;
    let function = device.get_or_load_custom_func(entry, module.name, module.ptx)?;
    Ok(Kernel {
        function: function.into_cuda_function(),
        stream: device.cuda_stream(),
    })
}

/// An error for a GPU that the kernels are not compiled for.
fn check_capability(device: &CudaDevice) -> Result<()> {
    // One bit for each device that was asked and is recent enough.
    static RECENT: AtomicU64 = AtomicU64::new(0);
    let stream = device.cuda_stream();
    let bit = 1u64.checked_shl(stream.context().ordinal() as u32);
    if bit.is_some_and(|bit| RECENT.load(Ordering::Relaxed) & bit != 0) {
        return Ok(());
    }
    let (major, minor) = stream.context().compute_capability().w()?;
    if major < OLDEST {
        let message = format!(
            "the kernels need a GPU of compute capability {OLDEST}.0 (Ampere) or later, and this one has {major}.{minor}"
        );
        return Err(candle_core::Error::Msg(message).into());
    }
    RECENT.fetch_or(bit.unwrap_or(0), Ordering::Relaxed);
    Ok(())
}

/// The entry point that computes in f64 if asked to, otherwise in f32.
pub(super) fn in_f64(wide: bool, entries: [&'static str; 2]) -> &'static str {
    entries[usize::from(wide)]
}

/// A contiguous tensor that kernels read or write, its storage locked against being replaced.
pub(super) struct Operand<'a> {
    pub(super) pointer: u64,
    pub(super) dtype: i32,
    pub(super) n: u64,
    _storage: StorageRef<'a>,
}

impl<'a> Operand<'a> {
    pub(super) fn new(x: &'a Tensor) -> Result<Self> {
        count(x.elem_count())?;
        Self::of_any_size(x)
    }

    /// The same for a kernel that counts in 64 bits.
    pub(super) fn of_any_size(x: &'a Tensor) -> Result<Self> {
        let (storage, layout) = x.storage_and_layout();
        let Some((start, _)) = layout.contiguous_offsets() else {
            return Err(
                candle_core::Error::Msg("a kernel needs contiguous operands".into()).into(),
            );
        };
        let Storage::Cuda(on_device) = &*storage else {
            return Err(elsewhere());
        };
        let offset = start * x.dtype().size_in_bytes();
        Ok(Self {
            pointer: address(on_device)? + offset as u64,
            dtype: code(x.dtype())?,
            n: x.elem_count() as u64,
            _storage: storage,
        })
    }
}

pub(super) fn elsewhere() -> Error {
    candle_core::Error::Msg("a kernel was given a tensor of another device".into()).into()
}

/// Where a storage begins in device memory.
pub(super) fn address(storage: &CudaStorage) -> Result<u64> {
    fn of<T>(slice: &CudaSlice<T>) -> u64 {
        slice.device_ptr(slice.stream()).0
    }
    match &storage.slice {
        CudaStorageSlice::F16(x) => Ok(of(x)),
        CudaStorageSlice::BF16(x) => Ok(of(x)),
        CudaStorageSlice::F32(x) => Ok(of(x)),
        CudaStorageSlice::F64(x) => Ok(of(x)),
        _ => Err(candle_core::Error::Msg("a kernel needs floating-point operands".into()).into()),
    }
}

/// A buffer for a result.
pub(super) struct Buffer {
    pub(super) pointer: u64,
    storage: CudaStorage,
}

impl Buffer {
    /// For n elements, with whatever was there before.
    pub(super) fn new(device: &CudaDevice, dtype: DType, n: usize) -> Result<Self> {
        count(n)?;
        Self::of_any_size(device, dtype, n)
    }

    /// The same for a kernel that counts in 64 bits.
    pub(super) fn of_any_size(device: &CudaDevice, dtype: DType, n: usize) -> Result<Self> {
        // SAFETY: kernels write all elements of their results before anything reads them.
        let storage = unsafe {
            match dtype {
                DType::F16 => CudaStorage::wrap_cuda_slice(device.alloc::<f16>(n)?, device.clone()),
                DType::BF16 => {
                    CudaStorage::wrap_cuda_slice(device.alloc::<bf16>(n)?, device.clone())
                }
                DType::F32 => CudaStorage::wrap_cuda_slice(device.alloc::<f32>(n)?, device.clone()),
                DType::F64 => CudaStorage::wrap_cuda_slice(device.alloc::<f64>(n)?, device.clone()),
                dtype => {
                    return Err(candle_core::Error::UnsupportedDTypeForOp(dtype, "a kernel").into())
                }
            }
        };
        Ok(Self {
            pointer: address(&storage)?,
            storage,
        })
    }

    pub(super) fn into_storage(self) -> CudaStorage {
        self.storage
    }

    pub(super) fn into_tensor(self, shape: &Shape) -> Tensor {
        Tensor::from_storage(
            Storage::Cuda(self.storage),
            shape,
            BackpropOp::none(),
            false,
        )
    }
}

/// Where a kernel writes: rounded to `to`, held in `held`.
#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct Sink {
    pointer: u64,
    to: i32,
    held: i32,
}

// SAFETY: plain numbers, laid out as in kernels/common.cuh.
unsafe impl DeviceRepr for Sink {}

impl Sink {
    pub(super) fn new(buffer: &Buffer, rounding: Rounding) -> Result<Self> {
        Ok(Self {
            pointer: buffer.pointer,
            to: code(rounding.to)?,
            held: code(rounding.held)?,
        })
    }

    /// Nowhere.
    pub(super) const NONE: Self = Self {
        pointer: 0,
        to: 0,
        held: 0,
    };
}

/// A look for NaN and infinity: the least index of one that found some stays at `first`.  It counts from
/// the number at `from`, if that is an address.
#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct Look {
    pub(super) first: u64,
    pub(super) from: u64,
    pub(super) index: u32,
}

// SAFETY: plain numbers, laid out as in kernels/common.cuh.
unsafe impl DeviceRepr for Look {}

impl Look {
    /// None.
    pub(super) const NONE: Self = Self {
        first: 0,
        from: 0,
        index: 0,
    };
}

/// Tensors that one launch looks at.
const MOST_TENSORS: usize = 64;

#[repr(C)]
#[derive(Clone, Copy)]
struct Tensors {
    x: [u64; MOST_TENSORS],
    n: [u64; MOST_TENSORS],
    block: [u32; MOST_TENSORS],
    dtype: [i32; MOST_TENSORS],
    count: i32,
}

// SAFETY: plain numbers, laid out as in kernels/look.cu.
unsafe impl DeviceRepr for Tensors {}

/// Calls `launch` with groups of tensors, and the blocks that each takes.
fn in_groups(xs: &[Tensor], mut launch: impl FnMut(Tensors, u32) -> Result<()>) -> Result<()> {
    let xs = xs.iter().filter(|x| x.elem_count() > 0);
    let xs = xs
        .map(Tensor::contiguous)
        .collect::<candle_core::Result<Vec<_>>>()?;
    for group in xs.chunks(MOST_TENSORS) {
        let mut tensors = Tensors {
            x: [0; MOST_TENSORS],
            n: [0; MOST_TENSORS],
            block: [0; MOST_TENSORS],
            dtype: [0; MOST_TENSORS],
            count: group.len() as i32,
        };
        let mut first = 0;
        let operands = group.iter().map(Operand::new).collect::<Result<Vec<_>>>()?;
        for (t, x) in operands.iter().enumerate() {
            (tensors.x[t], tensors.n[t]) = (x.pointer, x.n);
            (tensors.block[t], tensors.dtype[t]) = (first, x.dtype);
            first += blocks(x.n as usize);
        }
        launch(tensors, first)?;
    }
    Ok(())
}

/// Looks at `xs`; the index stays at `first` if one holds NaN or infinity and no lesser one is there.
pub(super) fn look(device: &CudaDevice, xs: &[Tensor], look: Look) -> Result<()> {
    in_groups(xs, |tensors, blocks| {
        let kernel = load(device, &LOOK, "look")?;
        let mut arguments = kernel.builder();
        arguments.arg(&tensors).arg(&look);
        // SAFETY: the tensors are as long as `n` says, `first` is one u32.
        unsafe { arguments.launch(grid(blocks)) }.w()?;
        Ok(())
    })
}

/// Raises the f64 bits at `max` to those of the largest |x|.
pub(super) fn raise(device: &CudaDevice, xs: &[Tensor], max: u64) -> Result<()> {
    in_groups(xs, |tensors, blocks| {
        let kernel = load(device, &LOOK, "magnitude")?;
        let mut arguments = kernel.builder();
        arguments.arg(&tensors).arg(&max);
        // SAFETY: the tensors are as long as `n` says, `max` is one u64.
        unsafe { arguments.launch(grid(blocks)) }.w()?;
        Ok(())
    })
}

/// `max |x|` on the host; NaN or infinite exactly if an element is.
pub(in crate::ops) fn magnitude(x: &Tensor) -> Result<f64> {
    let device = device_of(x)?;
    let max = device.alloc_zeros::<u64>(1)?;
    raise(device, std::slice::from_ref(x), pointer(&max))?;
    note_host_read(x.device());
    let max = device.clone_dtoh(&max)?;
    Ok(f64::from_bits(max[0]))
}

/// Where a slice begins in device memory.
pub(super) fn pointer<T>(slice: &CudaSlice<T>) -> u64 {
    slice.device_ptr(slice.stream()).0
}

/// Looks for NaN and infinity of which the first that found some is read once, at the end.
pub(crate) struct Looks {
    device: CudaDevice,
    first: CudaSlice<u32>,
    taken: u32,
    /// Within a step that is replayed: where the number of its first look is, and the next one's there.
    replayed: Option<(u64, u32)>,
}

impl Looks {
    /// On the device of x.
    pub(crate) fn new(x: &Tensor) -> Result<Self> {
        let device = device_of(x)?.clone();
        let first = device.clone_htod(&[u32::MAX])?;
        Ok(Self {
            device,
            first,
            taken: 0,
            replayed: None,
        })
    }

    /// The next look, for a kernel that looks on its way.
    pub(super) fn next(&mut self) -> Look {
        let (from, next) = match &mut self.replayed {
            Some((from, next)) => (*from, next),
            None => (0, &mut self.taken),
        };
        *next += 1;
        Look {
            first: pointer(&self.first),
            from,
            index: *next - 1,
        }
    }

    /// Looks from now on are those of a step that is replayed, and count from what the clock shows.
    pub(crate) fn begin_replayed(&mut self, clock: &Clock) {
        self.replayed = Some((clock.look(), 0));
    }

    /// Whether they do.
    pub(crate) fn is_replayed(&self) -> bool {
        self.replayed.is_some()
    }

    /// The step is at its end; how many looks it takes.
    pub(crate) fn end_replayed(&mut self) -> usize {
        self.replayed.take().map_or(0, |(_, taken)| taken as usize)
    }

    /// The number of the next look.
    pub(crate) fn taken(&self) -> u32 {
        self.taken
    }

    /// So many looks have been taken in a replay.
    pub(crate) fn skip(&mut self, looks: usize) {
        self.taken += looks as u32;
    }

    /// Looks at tensors.
    pub(crate) fn see(&mut self, xs: &[Tensor]) -> Result<()> {
        let next = self.next();
        look(&self.device, xs, next)
    }

    /// Where the first is noted.
    pub(super) fn first(&self) -> u64 {
        pointer(&self.first)
    }

    /// The index of the first look that found something.
    pub(crate) fn read(&self) -> Result<Option<usize>> {
        note_host_read(&Device::Cuda(self.device.clone()));
        let first = self.device.clone_dtoh(&self.first)?;
        Ok((first[0] != u32::MAX).then_some(first[0] as usize))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_entry_point_is_in_the_ptx() {
        for module in MODULES {
            for entry in module.entries {
                let declared = format!(".entry {entry}(");
                assert!(module.ptx.contains(&declared), "{entry} of {}", module.name);
            }
            assert_eq!(
                module.ptx.matches(".entry ").count(),
                module.entries.len(),
                "{}",
                module.name
            );
        }
    }

    #[test]
    fn more_elements_than_a_kernel_counts_are_an_error() {
        assert_eq!(count(i32::MAX as usize).unwrap(), i32::MAX as u64);
        let too_many = i32::MAX as usize + 1;
        let error = count(too_many).unwrap_err();
        assert!(matches!(error, Error::TooLarge { elements } if elements == too_many));
    }
}
