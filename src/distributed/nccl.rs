//! A group on NCCL: tensors go from GPU to GPU.
//!
//! NCCL cannot start by itself, and does not say which rank has died; both are done by another group, such as one on MPI.
#![allow(unsafe_code)]

use std::cell::Cell;
use std::ffi::{c_int, c_void};
use std::mem::MaybeUninit;
use std::time::{Duration, Instant};

use candle_core::backend::BackendDevice;
use candle_core::cuda_backend::cudarc::driver::{
    sys as driver, DevicePtr, DevicePtrMut, DeviceRepr, ValidAsZeroBits,
};
use candle_core::cuda_backend::cudarc::nccl::{result as nccl, sys};
use candle_core::cuda_backend::{CudaDType, WrapErr};
use candle_core::op::BackpropOp;
use candle_core::{CudaDevice, CudaStorage, DType, Device, Storage, Tensor};
use half::{bf16, f16};

use super::group::{exists, takes, told, COMPARED, SENT, SUMMED};
use super::Group;
use crate::error::{GroupDefect, Result};

/// Who waits looks after the others so often.
const LOOK: Duration = Duration::from_millis(10);

/// One GPU for each rank of another group.
///
/// Tensors on the GPU go through NCCL, tensors on the host, such as losses, through the other group.  An operation on the GPU
/// returns when it is done there, so that a rank that dies is noticed: the other group is asked from time to time who is
/// still there, and NCCL's operation is aborted if somebody is missing.  Sums of bf16 are rounded after each addition.
/// Sums are the same bits from run to run as long as NCCL takes the same algorithm and the same ring.  There is no limit of
/// time while NCCL itself is started, in [`new`](Self::new).
/// The other group does not know to which operation on the GPU a rank has come: if ranks wait in different ones, the error is
/// [`GroupDefect::Late`] or [`GroupDefect::Stuck`], after the patience of the other group.
/// Let all ranks come to a [`barrier`](Group::barrier) before the group is dropped.
///
/// NCCL has been compiled and linked against, but this has not run on GPUs yet.
pub struct NcclGroup<G: Group> {
    others: G,
    device: CudaDevice,
    /// `None` after a failure.
    communicator: Cell<Option<sys::ncclComm_t>>,
}

/// What NCCL does with the elements of one type.
struct Job<'a> {
    operation: &'static str,
    begin: &'a dyn Fn(*const c_void, *mut c_void, usize, sys::ncclComm_t) -> Outcome,
}

type Outcome = std::result::Result<nccl::NcclStatus, nccl::NcclError>;

impl<G: Group> NcclGroup<G> {
    /// The ranks of a group, each with the GPU that it names; no two ranks of one host may name the same.  Returns when all
    /// ranks have come.
    ///
    /// # Errors
    /// [`GroupDefect::Start`] if this is no GPU, or if NCCL fails; those of the other group.
    pub fn new(others: G, device: &Device) -> Result<Self> {
        let refused = |reason: String| GroupDefect::Start { reason };
        let Device::Cuda(device) = device else {
            let reason = format!("NCCL connects GPUs, not {:?}", device.location());
            others.give_up(&reason);
            return Err(refused(reason).into());
        };
        // Before rank 0 sends the id: a rank that has it waits in NCCL, and hears nothing.
        let bound = device.cuda_stream().context().bind_to_thread();
        told(&others, bound.w())?;
        let mut id = [0u8; 128];
        let mut failed = None;
        if others.rank() == 0 {
            match nccl::get_uniqueid() {
                Ok(made) => id = made.internal.map(|byte| byte as u8),
                Err(error) => failed = Some(named(&error)),
            }
        }
        // One byte more, which says that rank 0 has failed.
        let mut sent = id.to_vec();
        sent.push(u8::from(failed.is_some()));
        let sent = others.broadcast(&Tensor::from_vec(sent, 129, &Device::Cpu)?, 0)?;
        let sent = sent.to_vec1::<u8>()?;
        if sent[128] != 0 {
            let reason = failed.unwrap_or_else(|| "NCCL failed on rank 0".into());
            return Err(refused(reason).into());
        }
        let internal = std::array::from_fn(|i| sent[i] as std::ffi::c_char);
        let mut communicator = MaybeUninit::uninit();
        let (size, rank) = (others.size() as c_int, others.rank() as c_int);
        // SAFETY: NCCL writes the handle if it succeeds; the device's context is current.
        let started = unsafe {
            let id = sys::ncclUniqueId { internal };
            let started = nccl::comm_init_rank(communicator.as_mut_ptr(), size, id, rank);
            started.map(|_| communicator.assume_init())
        };
        match started {
            Ok(communicator) => Ok(Self {
                others,
                device: device.clone(),
                communicator: Cell::new(Some(communicator)),
            }),
            Err(error) => {
                let reason = named(&error);
                others.give_up(&reason);
                Err(refused(reason).into())
            }
        }
    }

    /// Whether a tensor is on this rank's GPU.
    fn here(&self, x: &Tensor) -> bool {
        matches!(x.device(), Device::Cuda(device) if device.same_device(&self.device))
    }

    /// Starts an operation on the elements of x, in the dtype that it has, and waits for it.
    fn run(&self, x: &Tensor, job: &Job<'_>) -> Result<Tensor> {
        match x.dtype() {
            DType::F64 => self.launch::<f64>(x, job),
            DType::F16 => self.launch::<f16>(x, job),
            DType::BF16 => self.launch::<bf16>(x, job),
            DType::U8 => self.launch::<u8>(x, job),
            DType::U32 => self.launch::<u32>(x, job),
            DType::I64 => self.launch::<i64>(x, job),
            _ => self.launch::<f32>(x, job),
        }
    }

    fn launch<T>(&self, x: &Tensor, job: &Job<'_>) -> Result<Tensor>
    where
        T: CudaDType + DeviceRepr + ValidAsZeroBits,
    {
        let Some(communicator) = self.communicator.get() else {
            // What has ended the other group is the first error.
            self.others.watch(Duration::ZERO)?;
            return Err(self.failed(job.operation, "it has been aborted"));
        };
        let x = told(self, x.detach().contiguous())?;
        let n = x.elem_count();
        if n == 0 {
            return Ok(x);
        }
        let stream = self.device.cuda_stream();
        let mut result = told(self, stream.alloc_zeros::<T>(n).w())?;
        let begun = {
            let (storage, layout) = x.storage_and_layout();
            let Storage::Cuda(on_device) = &*storage else {
                return Err(self.failed(job.operation, "the tensor is on another device"));
            };
            let start = layout.start_offset();
            let source = on_device.as_cuda_slice::<T>()?.slice(start..start + n);
            let (source, _read) = source.device_ptr(&stream);
            let (target, _written) = result.device_ptr_mut(&stream);
            (job.begin)(source as _, target as _, n, communicator)
        };
        if let Err(error) = begun {
            return Err(self.failed(job.operation, &named(&error)));
        }
        // x and the result live until the stream has done it.
        self.wait(job.operation, communicator)?;
        let storage = CudaStorage::wrap_cuda_slice(result, self.device.clone());
        let storage = Storage::Cuda(storage);
        Ok(Tensor::from_storage(
            storage,
            x.shape(),
            BackpropOp::none(),
            false,
        ))
    }

    fn wait(&self, operation: &'static str, communicator: sys::ncclComm_t) -> Result<()> {
        let stream = self.device.cuda_stream().cu_stream();
        let (started, mut looked) = (Instant::now(), Duration::ZERO);
        loop {
            // SAFETY: the stream is the device's, which lives as long as the group.
            match unsafe { driver::cuStreamQuery(stream) } {
                driver::CUresult::CUDA_SUCCESS => return Ok(()),
                driver::CUresult::CUDA_ERROR_NOT_READY => {}
                other => return Err(self.failed(operation, &format!("{other:?}"))),
            }
            let waited = started.elapsed();
            if waited <= looked + LOOK {
                std::thread::yield_now();
                continue;
            }
            looked = waited;
            let mut state = sys::ncclResult_t::ncclSuccess;
            // SAFETY: the communicator exists until it is aborted; NCCL writes one number.
            let asked = unsafe { sys::ncclCommGetAsyncError(communicator, &mut state) };
            if let Err(error) = asked.result().and_then(|_| state.result()) {
                return Err(self.failed(operation, &named(&error)));
            }
            if let Err(error) = self.others.watch(waited) {
                self.abort();
                return Err(error);
            }
        }
    }

    /// Tells the others, and lets the GPU go on.
    fn failed(&self, operation: &'static str, message: &str) -> crate::Error {
        self.abort();
        self.others.give_up(message);
        let (rank, message) = (self.others.rank(), message.to_owned());
        GroupDefect::Library {
            rank,
            operation,
            message,
        }
        .into()
    }

    fn abort(&self) {
        if let Some(communicator) = self.communicator.take() {
            // SAFETY: it exists, and is not used again.  An error leaves nothing to be done.
            drop(unsafe { nccl::comm_abort(communicator) });
        }
    }

    fn reduced(
        &self,
        x: &Tensor,
        operation: &'static str,
        how: sys::ncclRedOp_t,
    ) -> Result<Tensor> {
        let (stream, of) = (self.device.cuda_stream().cu_stream(), dtype(x.dtype()));
        let begin = |source, target, n, communicator| {
            // SAFETY: both are n elements of this type in memory of the stream's device.
            unsafe { nccl::all_reduce(source, target, n, of, how, communicator, stream as _) }
        };
        self.run(
            x,
            &Job {
                operation,
                begin: &begin,
            },
        )
    }
}

/// NCCL's name of an error.
fn named(error: &nccl::NcclError) -> String {
    format!("NCCL: {:?}", error.0)
}

/// NCCL's name of a dtype; of those that operations take.
fn dtype(dtype: DType) -> sys::ncclDataType_t {
    use sys::ncclDataType_t as T;
    match dtype {
        DType::F64 => T::ncclFloat64,
        DType::F16 => T::ncclFloat16,
        DType::BF16 => T::ncclBfloat16,
        DType::U8 => T::ncclUint8,
        DType::U32 => T::ncclUint32,
        DType::I64 => T::ncclInt64,
        _ => T::ncclFloat32,
    }
}

impl<G: Group> Group for NcclGroup<G> {
    fn rank(&self) -> usize {
        self.others.rank()
    }

    fn size(&self) -> usize {
        self.others.size()
    }

    fn sum(&self, x: &Tensor) -> Result<Tensor> {
        takes("a sum", &SUMMED, x)?;
        match self.here(x) {
            true => self.reduced(x, "a sum", sys::ncclRedOp_t::ncclSum),
            false => self.others.sum(x),
        }
    }

    fn max(&self, x: &Tensor) -> Result<Tensor> {
        takes("a maximum", &COMPARED, x)?;
        match self.here(x) {
            true => self.reduced(x, "a maximum", sys::ncclRedOp_t::ncclMax),
            false => self.others.max(x),
        }
    }

    fn broadcast(&self, x: &Tensor, root: usize) -> Result<Tensor> {
        takes("a broadcast", &SENT, x)?;
        exists(root, self.size())?;
        if !self.here(x) {
            return self.others.broadcast(x, root);
        }
        let (stream, of) = (self.device.cuda_stream().cu_stream(), dtype(x.dtype()));
        let begin = |source, target, n, communicator| {
            let root = root as c_int;
            // SAFETY: both are n elements of this type in memory of the stream's device.
            unsafe { nccl::broadcast(source, target, n, of, root, communicator, stream as _) }
        };
        let operation = "a broadcast";
        self.run(
            x,
            &Job {
                operation,
                begin: &begin,
            },
        )
    }

    fn barrier(&self) -> Result<()> {
        self.others.barrier()
    }

    fn give_up(&self, reason: &str) {
        // A group of one process goes on.
        if self.size() == 1 {
            return;
        }
        self.abort();
        self.others.give_up(reason);
    }

    fn watch(&self, waited: Duration) -> Result<()> {
        self.others.watch(waited)
    }
}

impl<G: Group> Drop for NcclGroup<G> {
    /// Without waiting for the others, of whom one may have failed: all operations of this rank are done.
    fn drop(&mut self) {
        self.abort();
    }
}
