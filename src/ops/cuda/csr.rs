//! Products with sparse matrices.

use candle_core::cuda_backend::cudarc::driver::{CudaSlice, DeviceRepr, PushKernelArg};
use candle_core::cuda_backend::WrapErr;
use candle_core::{CudaDevice, CudaStorage, DType, Layout};

use super::launch::{address, grid, in_f64, load, pointer, Buffer, CSR, THREADS};
use crate::error::Result;

/// Blocks of a launch at most; their threads go on to the next elements.
const MOST_BLOCKS: usize = 1 << 16;

/// Where the entries of the lines of a sparse matrix are, in device memory.
#[derive(Debug)]
pub(crate) struct DeviceSide {
    offsets: CudaSlice<u32>,
    across: CudaSlice<u32>,
    /// The value of each entry, where they are not in order.
    names: Option<CudaSlice<u32>>,
    /// The line of each entry.
    line_of_each: CudaSlice<u32>,
    lines: usize,
    entries: usize,
}

/// The same as kernels see it.
#[repr(C)]
#[derive(Clone, Copy)]
struct KernelSide {
    offsets: u64,
    across: u64,
    names: u64,
    lines: u64,
}

// SAFETY: plain numbers, laid out as in kernels/csr.cu.
unsafe impl DeviceRepr for KernelSide {}

impl DeviceSide {
    /// Of the entries that begin at `offsets`, one more than there are lines.
    pub(crate) fn new(
        device: &CudaDevice,
        offsets: &[u32],
        [across, line_of_each]: [&[u32]; 2],
        names: Option<&[u32]>,
    ) -> Result<Self> {
        // Nothing cannot be copied.
        let copy = |x: &[u32]| device.clone_htod(if x.is_empty() { &[0][..] } else { x });
        Ok(Self {
            offsets: copy(offsets)?,
            across: copy(across)?,
            names: names.map(copy).transpose()?,
            line_of_each: copy(line_of_each)?,
            lines: offsets.len().saturating_sub(1),
            entries: across.len(),
        })
    }

    fn kernel(&self) -> KernelSide {
        KernelSide {
            offsets: pointer(&self.offsets),
            across: pointer(&self.across),
            names: self.names.as_ref().map_or(0, pointer),
            lines: self.lines as u64,
        }
    }
}

/// Numbers of f32 or f64 in device memory, contiguous.
pub(crate) type Numbers<'a> = (&'a CudaStorage, &'a Layout);

/// Where they begin.
fn place((storage, layout): Numbers<'_>, dtype: DType) -> Result<u64> {
    let Some((start, _)) = layout.contiguous_offsets() else {
        let message = "a sparse product needs contiguous operands";
        return Err(candle_core::Error::Msg(message.into()).into());
    };
    Ok(address(storage)? + (start * dtype.size_in_bytes()) as u64)
}

/// Blocks of threads for so many elements.
fn blocks(elements: usize) -> u32 {
    elements.div_ceil(THREADS as usize).min(MOST_BLOCKS) as u32
}

/// Σ v_e x_j by line, `(lines, width)`, of values and x of one dtype.
pub(crate) fn product(
    device: &CudaDevice,
    side: &DeviceSide,
    values: Numbers<'_>,
    x: Numbers<'_>,
    (width, dtype): (usize, DType),
) -> Result<CudaStorage> {
    let elements = side.lines * width;
    let out = Buffer::new(device, dtype, elements)?;
    if elements > 0 {
        let of = |x| place(x, dtype);
        let (kernel_side, columns) = (side.kernel(), width as u64);
        let (values, x) = (of(values)?, of(x)?);
        let name = in_f64(dtype == DType::F64, ["csr_product_f32", "csr_product_f64"]);
        let kernel = load(device, &CSR, name)?;
        let mut arguments = kernel.builder();
        arguments.arg(&kernel_side).arg(&columns);
        arguments.arg(&values).arg(&x).arg(&out.pointer);
        // SAFETY: the pattern was checked when it was made: offsets rise to the number of entries, and what is across has
        // a row in x; the result has `lines` rows.
        unsafe { arguments.launch(grid(blocks(elements))) }.w()?;
    }
    Ok(out.into_storage())
}

/// ⟨g_i, x_j⟩ by entry.
pub(crate) fn sampled(
    device: &CudaDevice,
    side: &DeviceSide,
    g: Numbers<'_>,
    x: Numbers<'_>,
    (width, dtype): (usize, DType),
) -> Result<CudaStorage> {
    let out = Buffer::new(device, dtype, side.entries)?;
    if side.entries > 0 {
        let of = |x| place(x, dtype);
        let (kernel_side, lines) = (side.kernel(), pointer(&side.line_of_each));
        let (entries, columns) = (side.entries as u64, width as u64);
        let (g, x) = (of(g)?, of(x)?);
        let name = in_f64(dtype == DType::F64, ["csr_sampled_f32", "csr_sampled_f64"]);
        let kernel = load(device, &CSR, name)?;
        let mut arguments = kernel.builder();
        arguments.arg(&kernel_side).arg(&lines);
        arguments.arg(&entries).arg(&columns);
        arguments.arg(&g).arg(&x).arg(&out.pointer);
        // SAFETY: as in `product`; g has a row for each line.
        unsafe { arguments.launch(grid(blocks(side.entries))) }.w()?;
    }
    Ok(out.into_storage())
}
