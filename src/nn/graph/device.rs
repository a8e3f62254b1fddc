//! Sparse products on NVIDIA GPUs.

use std::sync::{Arc, Mutex};

use candle_core::backend::{BackendDevice, BackendStorage};
use candle_core::{CudaDevice, CudaStorage, DType, Layout, Result};

use super::pattern::{Pattern, Side};
use crate::ops::cuda::csr::{self, DeviceSide};

/// Rows and columns of a pattern by device: a CUDA graph captures no upload, and a solve multiplies with one pattern many
/// times.  Devices that were made one by one have streams of their own, also on one GPU.
#[derive(Debug, Default)]
pub(super) struct OnDevices(Mutex<Vec<(CudaDevice, bool, Arc<DeviceSide>)>>);

/// Copies that are kept; an older one is made again.
const MOST: usize = 16;

impl OnDevices {
    /// The rows, or the columns, on this device.
    pub(super) fn get(
        &self,
        device: &CudaDevice,
        by_column: bool,
        (side, names): (&Side, Option<&[u32]>),
    ) -> Result<Arc<DeviceSide>> {
        let mut all = self.0.lock().unwrap_or_else(|e| e.into_inner());
        let is_it =
            |(at, by, _): &&(CudaDevice, bool, _)| at.same_device(device) && *by == by_column;
        if let Some((_, _, side)) = all.iter().find(is_it) {
            return Ok(Arc::clone(side));
        }
        // Entries are counted in 32 bits.
        let offsets: Vec<u32> = side.offsets.iter().map(|&n| n as u32).collect();
        let lines = side.line_of_each();
        let side = DeviceSide::new(device, &offsets, [&side.across, &lines], names)?;
        let side = Arc::new(side);
        if all.len() == MOST {
            all.remove(0);
        }
        all.push((device.clone(), by_column, Arc::clone(&side)));
        Ok(side)
    }
}

/// A x, or Aᵀ x.
pub(super) fn product(
    pattern: &Pattern,
    by_column: bool,
    values: (&CudaStorage, &Layout),
    x: (&CudaStorage, &Layout),
) -> Result<CudaStorage> {
    let (device, dtype) = of((values.0, x.0))?;
    let side = pattern.on_device(device, by_column)?;
    let width = x.1.shape().dims2()?.1;
    Ok(csr::product(device, &side, values, x, (width, dtype))?)
}

/// The entries of g xᵀ that a pattern has.
pub(super) fn sampled(
    pattern: &Pattern,
    g: (&CudaStorage, &Layout),
    x: (&CudaStorage, &Layout),
) -> Result<CudaStorage> {
    let (device, dtype) = of((g.0, x.0))?;
    let side = pattern.on_device(device, false)?;
    let width = x.1.shape().dims2()?.1;
    Ok(csr::sampled(device, &side, g, x, (width, dtype))?)
}

/// The device and the dtype of both.
fn of<'a>((a, b): (&'a CudaStorage, &CudaStorage)) -> Result<(&'a CudaDevice, DType)> {
    match (a.dtype(), b.dtype()) {
        (DType::F32, DType::F32) | (DType::F64, DType::F64) => Ok((a.device(), a.dtype())),
        _ => candle_core::bail!("a sparse product of operands that are not both f32 or both f64"),
    }
}
