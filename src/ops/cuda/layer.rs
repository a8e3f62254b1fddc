//! What a layer does beside its matrix products.

use candle_core::cuda_backend::cudarc::driver::{LaunchConfig, PushKernelArg};
use candle_core::cuda_backend::WrapErr;
use candle_core::{DType, Tensor, D};

use super::launch::{blocks, device_of, grid, load, Buffer, Operand, Sink, LAYER, THREADS};
use crate::error::Result;
use crate::precision::Rounding;

/// Columns of a block of `layer_backward`.
const COLUMNS: usize = 128;

/// Rows that a block sums at least, and parts at most.
const LEAST_ROWS: usize = 128;
const MOST_PARTS: usize = 128;

/// The activation of a layer that has none: `NONE` in `kernels/activation.cuh`.
pub(crate) const NO_ACTIVATION: i32 = 8;

fn entry(wide: bool, entries: [&'static str; 2]) -> &'static str {
    super::launch::in_f64(wide, entries)
}

/// σ(z + b) for rows z, and σ'(z + b) where it is wanted, of z's dtype, computed in f32 at least.
pub(crate) fn activate(
    z: &Tensor,
    bias: &Tensor,
    activation: i32,
    slope: bool,
) -> Result<(Tensor, Option<Tensor>)> {
    let device = device_of(z)?;
    let (z, bias) = (z.contiguous()?, bias.contiguous()?);
    let columns = bias.elem_count();
    if z.dim(D::Minus1)? != columns {
        let message = format!("a bias of {columns} added to {:?}", z.shape());
        return Err(candle_core::Error::Msg(message).into());
    }
    if z.elem_count() == 0 {
        return Ok((z.copy()?, slope.then(|| z.copy()).transpose()?));
    }
    let out = Rounding::cast(z.dtype());
    let value = Buffer::new(device, z.dtype(), z.elem_count())?;
    let slope = slope
        .then(|| Buffer::new(device, z.dtype(), z.elem_count()))
        .transpose()?;
    let value_sink = Sink::new(&value, out)?;
    let slope_sink = match &slope {
        Some(slope) => Sink::new(slope, out)?,
        None => Sink::NONE,
    };
    let (z_at, b_at, columns) = (Operand::new(&z)?, Operand::new(&bias)?, columns as u64);
    let name = entry(
        z.dtype() == DType::F64,
        ["layer_forward_f32", "layer_forward_f64"],
    );
    let kernel = load(device, &LAYER, name)?;
    let mut arguments = kernel.builder();
    arguments
        .arg(&z_at.pointer)
        .arg(&z_at.dtype)
        .arg(&b_at.pointer)
        .arg(&b_at.dtype);
    arguments
        .arg(&activation)
        .arg(&value_sink)
        .arg(&slope_sink)
        .arg(&z_at.n)
        .arg(&columns);
    // SAFETY: z and the results have n elements, the bias has `columns`, which divides n.
    unsafe { arguments.launch(grid(blocks(z_at.n as usize))) }.w()?;
    Ok((
        value.into_tensor(z.shape()),
        slope.map(|slope| slope.into_tensor(z.shape())),
    ))
}

/// What a slope is read from.
#[derive(Clone, Copy)]
pub(crate) enum SlopeFrom<'a> {
    Given(&'a Tensor),
    /// Values of an activation whose slope follows from them.
    OfValue(&'a Tensor, i32),
}

/// g · slope of g's dtype (g itself without a slope), and its sums over all rows, formed and held in
/// f32 at least.
pub(crate) fn pull(g: &Tensor, slope: Option<SlopeFrom<'_>>) -> Result<(Tensor, Tensor)> {
    let device = device_of(g)?;
    let g = g.contiguous()?;
    let columns = g.dim(D::Minus1)?;
    let wide = g.dtype() == DType::F64;
    let sum = if wide { DType::F64 } else { DType::F32 };
    if g.elem_count() == 0 {
        return Ok((g.clone(), Tensor::zeros(columns, sum, g.device())?));
    }
    let rows = g.elem_count() / columns;
    let out = Rounding::cast(g.dtype());
    let (slope, activation) = match slope {
        None => (None, NO_ACTIVATION),
        Some(SlopeFrom::Given(slope)) => (Some(slope), NO_ACTIVATION),
        Some(SlopeFrom::OfValue(value, activation)) => (Some(value), activation),
    };
    let slope = slope.map(Tensor::contiguous).transpose()?;
    if slope
        .as_ref()
        .is_some_and(|slope| slope.shape() != g.shape())
    {
        return Err(
            candle_core::Error::Msg("a slope of another shape than its cotangent".into()).into(),
        );
    }
    let buffer = slope
        .as_ref()
        .map(|_| Buffer::new(device, g.dtype(), g.elem_count()))
        .transpose()?;
    let sink = match &buffer {
        Some(buffer) => Sink::new(buffer, out)?,
        None => Sink::NONE,
    };
    let slope = slope.as_ref().map(Operand::new).transpose()?;
    let (slope_at, slope_dtype) = slope.as_ref().map_or((0, 0), |s| (s.pointer, s.dtype));
    let parts_count = rows.div_ceil(LEAST_ROWS).min(MOST_PARTS);
    let parts = Buffer::new(device, sum, parts_count * columns)?;
    let g_at = Operand::new(&g)?;
    let (rows_given, columns_given) = (rows as u64, columns as u64);
    let kernel = load(
        device,
        &LAYER,
        entry(wide, ["layer_backward_f32", "layer_backward_f64"]),
    )?;
    let mut arguments = kernel.builder();
    arguments
        .arg(&g_at.pointer)
        .arg(&g_at.dtype)
        .arg(&slope_at)
        .arg(&slope_dtype)
        .arg(&activation);
    arguments
        .arg(&sink)
        .arg(&parts.pointer)
        .arg(&rows_given)
        .arg(&columns_given);
    let config = LaunchConfig {
        grid_dim: (columns.div_ceil(COLUMNS) as u32, parts_count as u32, 1),
        block_dim: (THREADS, 1, 1),
        shared_mem_bytes: 0,
    };
    // SAFETY: g, slope (or value) and result have rows · columns elements; there is a part for each block.
    unsafe { arguments.launch(config) }.w()?;

    let total = Buffer::new(device, sum, columns)?;
    let (total_sink, count) = (Sink::new(&total, Rounding::cast(sum))?, parts_count as i32);
    let kernel = load(
        device,
        &LAYER,
        entry(wide, ["layer_total_f32", "layer_total_f64"]),
    )?;
    let mut arguments = kernel.builder();
    arguments
        .arg(&parts.pointer)
        .arg(&count)
        .arg(&total_sink)
        .arg(&columns_given);
    // SAFETY: there are `count` parts of `columns` elements, and as many in the result.
    unsafe { arguments.launch(grid((columns as u32).div_ceil(THREADS))) }.w()?;
    let pulled = buffer.map_or_else(|| g.clone(), |buffer| buffer.into_tensor(g.shape()));
    Ok((pulled, total.into_tensor(&columns.into())))
}
