//! CUDA graphs: work that is recorded once and launched as one.
//!
//! What a graph may hold is what can be repeated: kernels, and copies and memory within the device.
//! Copies from the host are refused, because the driver keeps the address, not the bytes; candle uploads
//! shapes and scalars once and finds them again while its cache of them is on.

use std::mem::MaybeUninit;
use std::ptr::{addr_of, null_mut};
use std::sync::Arc;

use candle_core::cuda_backend::cudarc::driver::sys::{
    self, CUgraphInstantiate_flags, CUgraphNodeType, CUmemorytype, CUstreamCaptureMode,
};
use candle_core::cuda_backend::cudarc::driver::{CudaGraph, CudaStream};
use candle_core::cuda_backend::WrapErr;
use candle_core::Device;

use super::launch::elsewhere;
use crate::error::{Error, Result};
use crate::stats::NotReplayed;

/// What was recorded.
pub(crate) enum Captured {
    Graph(Graph),
    /// Nothing, and nothing has been done.
    Refused(NotReplayed),
}

/// Work that can be done again and again, with the addresses that it was recorded with.
pub(crate) struct Graph {
    graph: CudaGraph,
    stream: Arc<CudaStream>,
}

impl Graph {
    /// Does the work.
    pub(crate) fn launch(&self) -> Result<()> {
        Ok(self.graph.launch().w()?)
    }
}

impl Drop for Graph {
    /// A graph must not go while it runs.
    fn drop(&mut self) {
        let context = self.stream.context();
        context.record_err(self.stream.synchronize());
    }
}

/// Why nothing can be captured on a device, whatever it is.
pub(crate) fn obstacle(device: &Device) -> Option<NotReplayed> {
    let Device::Cuda(device) = device else {
        return None;
    };
    let stream = device.cuda_stream();
    let context = stream.context();
    if context.is_managing_stream_synchronization() {
        return Some(NotReplayed::EventTracking);
    }
    (!context.has_async_alloc()).then(|| {
        NotReplayed::Capture("the device does not allocate memory in the order of a stream".into())
    })
}

/// While it lives, candle keeps on the device what it uploads for an operation, and finds it again.
pub(crate) fn keep_uploads(device: &Device) -> Result<impl Sized> {
    match device {
        Device::Cuda(device) => Ok(device.enable_cuda_graph_htod_cache()),
        _ => Err(elsewhere()),
    }
}

/// Ends a capture in any case.
struct Open<'a>(&'a Arc<CudaStream>);

impl Open<'_> {
    /// The graph, with what went wrong unseen: memory is freed where errors cannot be returned.
    fn end(&self) -> candle_core::Result<Option<CudaGraph>> {
        let unseen = self.0.context().check_err();
        let graph = self.0.end_capture(CUgraphInstantiate_flags(0)).w();
        unseen.w()?;
        graph
    }
}

impl Drop for Open<'_> {
    fn drop(&mut self) {
        // Already ended unless `work` unwound; the error says so.
        let _ = self.end();
    }
}

/// Records what `work` would do on the device.  What it needs must have been there before, must stay,
/// and must not be freed by it; what it makes must be gone in the end.
///
/// # Errors
/// [`Error::KeptInGraph`] if it keeps something that it made.
pub(crate) fn capture(device: &Device, work: impl FnOnce() -> Result<()>) -> Result<Captured> {
    let Device::Cuda(on) = device else {
        return Err(elsewhere());
    };
    let stream = on.cuda_stream();
    let _uploads = keep_uploads(device)?;
    let refused = |error: &dyn std::fmt::Display| {
        Ok(Captured::Refused(NotReplayed::Capture(error.to_string())))
    };
    // Other threads may do as they like, but for the legacy stream of the same context.
    let mode = CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
    if let Err(error) = stream.begin_capture(mode) {
        return refused(&error);
    }
    let open = Open(&stream);
    let outcome = work();
    let ended = open.end();
    std::mem::forget(open);
    let graph = match ended {
        Ok(Some(graph)) => Graph {
            graph,
            stream: stream.clone(),
        },
        Ok(None) => return refused(&"the driver returned no graph"),
        Err(error) => {
            // What was recorded is gone, and with it the memory: that it cannot be freed is no news.
            let _ = stream.context().check_err();
            return match outcome {
                Err(cause) => refused(&cause),
                Ok(()) => refused(&error),
            };
        }
    };
    let held = match HeldUploads::of(&graph.graph) {
        Ok(held) => held,
        Err(error) => return refused(&error),
    };
    if held.allocated != held.freed {
        return Err(Error::KeptInGraph);
    }
    if let Err(error) = outcome {
        return refused(&error);
    }
    Ok(match held.repeatable {
        true => Captured::Graph(graph),
        false => Captured::Refused(NotReplayed::HostMemory),
    })
}

/// What a graph consists of.
struct HeldUploads {
    allocated: usize,
    freed: usize,
    /// Whether everything stays on the device.
    repeatable: bool,
}

impl HeldUploads {
    fn of(graph: &CudaGraph) -> Result<Self> {
        let graph = graph.cu_graph();
        let mut count = 0;
        // SAFETY: the graph lives; without space for nodes their number is returned.
        unsafe { sys::cuGraphGetNodes(graph, null_mut(), &mut count) }
            .result()
            .w()?;
        let mut nodes = vec![null_mut(); count];
        // SAFETY: there is space for `count` nodes.
        unsafe { sys::cuGraphGetNodes(graph, nodes.as_mut_ptr(), &mut count) }
            .result()
            .w()?;
        let mut held = Self {
            allocated: 0,
            freed: 0,
            repeatable: true,
        };
        for node in nodes {
            // A number, because a driver may know more types than its bindings.
            let mut kind = u32::MAX;
            // SAFETY: a node of a graph that lives; the type is an enum of 32 bits.
            unsafe { sys::cuGraphNodeGetType(node, (&raw mut kind).cast()) }
                .result()
                .w()?;
            match kind {
                k if k == CUgraphNodeType::CU_GRAPH_NODE_TYPE_MEM_ALLOC as u32 => {
                    held.allocated += 1;
                }
                k if k == CUgraphNodeType::CU_GRAPH_NODE_TYPE_MEM_FREE as u32 => held.freed += 1,
                k if k == CUgraphNodeType::CU_GRAPH_NODE_TYPE_MEMCPY as u32 => {
                    held.repeatable &= stays_on_device(node)?;
                }
                k if k == CUgraphNodeType::CU_GRAPH_NODE_TYPE_KERNEL as u32
                    || k == CUgraphNodeType::CU_GRAPH_NODE_TYPE_MEMSET as u32
                    || k == CUgraphNodeType::CU_GRAPH_NODE_TYPE_EMPTY as u32 => {}
                _ => held.repeatable = false,
            }
        }
        Ok(held)
    }
}

/// Whether a copy goes from the device to the device.
fn stays_on_device(node: sys::CUgraphNode) -> Result<bool> {
    let mut copy = MaybeUninit::<sys::CUDA_MEMCPY3D>::zeroed();
    // SAFETY: the node is a copy, and there is space for what it copies.
    unsafe { sys::cuGraphMemcpyNodeGetParams(node, copy.as_mut_ptr()) }
        .result()
        .w()?;
    let copy = copy.as_ptr();
    // SAFETY: both fields are enums of 32 bits within the buffer, read as numbers.
    let ends = unsafe {
        [
            addr_of!((*copy).srcMemoryType).cast::<u32>().read(),
            addr_of!((*copy).dstMemoryType).cast::<u32>().read(),
        ]
    };
    Ok(ends == [CUmemorytype::CU_MEMORYTYPE_DEVICE as u32; 2])
}
