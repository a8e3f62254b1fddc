//! The memory of a device, as its driver counts what was taken from its pool, and by graphs.

use candle_core::Device;

use common::Result;

/// Bytes of the pool and of graphs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Bytes {
    /// In tensors now.
    pub(crate) used: u64,
    /// The most that were since [`Pool::forget_peak`].
    pub(crate) peak: u64,
    /// Held for more of them.
    pub(crate) reserved: u64,
}

/// The default pool of the first GPU.
#[cfg(feature = "cuda")]
pub(crate) struct Pool {
    device: sys::CUdevice,
    pool: sys::CUmemoryPool,
}

#[cfg(feature = "cuda")]
use candle_core::cuda_backend::cudarc::driver::{result, sys};

#[cfg(feature = "cuda")]
#[allow(unsafe_code)]
impl Pool {
    /// None where the device is no GPU.
    pub(crate) fn of(device: &Device) -> Result<Option<Self>> {
        if !device.is_cuda() {
            return Ok(None);
        }
        let device = result::device::get(0)?;
        // SAFETY: the device comes from the driver.
        let pool = unsafe { result::device::get_default_mem_pool(device) }?;
        Ok(Some(Self { device, pool }))
    }

    /// What docs/cuda.md advises: the pool keeps what was freed, and candle makes no events.
    pub(crate) fn settle(&self, device: &Device) -> Result<()> {
        self.set(
            sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD,
            u64::MAX,
        )?;
        // SAFETY: this program computes on one stream.
        unsafe { device.as_cuda_device()?.disable_event_tracking() };
        Ok(())
    }

    pub(crate) fn forget_peak(&self) -> Result<()> {
        self.set(sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_USED_MEM_HIGH, 0)?;
        let high = sys::CUgraphMem_attribute::CU_GRAPH_MEM_ATTR_USED_MEM_HIGH;
        let mut zero = 0u64;
        // SAFETY: the device comes from the driver, and the attribute is 64 bits wide.
        unsafe { sys::cuDeviceSetGraphMemAttribute(self.device, high, (&raw mut zero).cast()) }
            .result()?;
        Ok(())
    }

    pub(crate) fn bytes(&self) -> Result<Bytes> {
        use sys::{CUgraphMem_attribute as Graphs, CUmemPool_attribute as Tensors};
        let of = |tensors, graphs| Ok(self.get(tensors)? + self.of_graphs(graphs)?) as Result<u64>;
        Ok(Bytes {
            used: of(
                Tensors::CU_MEMPOOL_ATTR_USED_MEM_CURRENT,
                Graphs::CU_GRAPH_MEM_ATTR_USED_MEM_CURRENT,
            )?,
            peak: of(
                Tensors::CU_MEMPOOL_ATTR_USED_MEM_HIGH,
                Graphs::CU_GRAPH_MEM_ATTR_USED_MEM_HIGH,
            )?,
            reserved: of(
                Tensors::CU_MEMPOOL_ATTR_RESERVED_MEM_CURRENT,
                Graphs::CU_GRAPH_MEM_ATTR_RESERVED_MEM_CURRENT,
            )?,
        })
    }

    fn of_graphs(&self, attribute: sys::CUgraphMem_attribute) -> Result<u64> {
        let mut value = 0u64;
        // SAFETY: the device comes from the driver, and the attributes asked for are 64 bits wide.
        unsafe {
            sys::cuDeviceGetGraphMemAttribute(self.device, attribute, (&raw mut value).cast())
        }
        .result()?;
        Ok(value)
    }

    fn get(&self, attribute: sys::CUmemPool_attribute) -> Result<u64> {
        let mut value = 0u64;
        // SAFETY: the pool is the device's own, and the attributes asked for are 64 bits wide.
        unsafe { result::mem_pool::get_attribute(self.pool, attribute, (&raw mut value).cast()) }?;
        Ok(value)
    }

    fn set(&self, attribute: sys::CUmemPool_attribute, mut value: u64) -> Result<()> {
        // SAFETY: as above.
        unsafe { result::mem_pool::set_attribute(self.pool, attribute, (&raw mut value).cast()) }?;
        Ok(())
    }
}

/// Nothing, in a build without CUDA.
#[cfg(not(feature = "cuda"))]
pub(crate) enum Pool {}

#[cfg(not(feature = "cuda"))]
impl Pool {
    pub(crate) fn of(_: &Device) -> Result<Option<Self>> {
        Ok(None)
    }

    pub(crate) fn settle(&self, _: &Device) -> Result<()> {
        match *self {}
    }

    pub(crate) fn forget_peak(&self) -> Result<()> {
        match *self {}
    }

    pub(crate) fn bytes(&self) -> Result<Bytes> {
        match *self {}
    }
}
