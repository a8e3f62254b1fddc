//! Sums of tensors: stages, updates, gradients, scalar products.

use candle_core::cuda_backend::cudarc::driver::{DeviceRepr, PushKernelArg};
use candle_core::cuda_backend::WrapErr;
use candle_core::{DType, Tensor};

use super::clock::Clock;
use super::launch::{
    blocks, device_of, grid, in_f64, load, pointer, Buffer, Look, Looks, Operand, Sink, ACCUMULATE,
    DOT, STAGE, UPDATE,
};
use super::sweep::SweepState;
use crate::error::Result;
use crate::ops::chain;
use crate::precision::Rounding;

/// Terms of one launch: y, the stages of any method, and cotangents of outputs.
const MOST_TERMS: usize = 64;

#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct KernelTerms {
    x: [u64; MOST_TERMS],
    c: [f64; MOST_TERMS],
    dtype: [i32; MOST_TERMS],
    clock: u64,
    count: i32,
    stepped_from: i32,
    scaled_from: i32,
}

// SAFETY: plain numbers, laid out as in kernels/sum.cuh.
unsafe impl DeviceRepr for KernelTerms {}

/// Terms in device memory, with what keeps them there.
pub(super) struct Sum<'a> {
    pub(super) terms: KernelTerms,
    /// Whether the sum is formed in f64.
    pub(super) wide: bool,
    pub(super) n: u64,
    _operands: Vec<Operand<'a>>,
}

impl<'a> Sum<'a> {
    /// All x_j contiguous and of one size.
    pub(super) fn new(coefficients: &[f64], xs: &'a [Tensor]) -> Result<Self> {
        let operands = xs.iter().map(Operand::new).collect::<Result<Vec<_>>>()?;
        let n = operands.first().map_or(0, |x| x.n);
        if operands.len() > MOST_TERMS || operands.iter().any(|x| x.n != n) {
            let sizes: Vec<_> = operands.iter().map(|x| x.n).collect();
            return Err(
                candle_core::Error::Msg(format!("a sum of tensors of sizes {sizes:?}")).into(),
            );
        }
        let mut terms = KernelTerms {
            x: [0; MOST_TERMS],
            c: [0.0; MOST_TERMS],
            dtype: [0; MOST_TERMS],
            clock: 0,
            count: operands.len() as i32,
            stepped_from: MOST_TERMS as i32,
            scaled_from: MOST_TERMS as i32,
        };
        for (j, (x, &c)) in operands.iter().zip(coefficients).enumerate() {
            (terms.x[j], terms.c[j], terms.dtype[j]) = (x.pointer, c, x.dtype);
        }
        Ok(Self {
            wide: xs.iter().any(|x| x.dtype() == DType::F64),
            terms,
            n,
            _operands: operands,
        })
    }

    /// The same with terms from this one on divided by S.
    pub(super) fn scaled_from(mut self, term: usize) -> Self {
        self.terms.scaled_from = term as i32;
        self
    }

    /// The same with terms from this one on multiplied by the h of a clock, if there is one.
    pub(super) fn stepped_from(mut self, term: usize, clock: Option<&Clock>) -> Self {
        self.terms.clock = clock.map_or(0, Clock::pointer);
        self.terms.stepped_from = term as i32;
        self
    }
}

/// Coefficients, and contiguous tensors.
pub(super) fn split(terms: &[(f64, &Tensor)]) -> Result<(Vec<f64>, Vec<Tensor>)> {
    let xs = terms.iter().map(|(_, x)| x.contiguous());
    let coefficients = terms.iter().map(|&(c, _)| c).collect();
    Ok((coefficients, xs.collect::<candle_core::Result<_>>()?))
}

/// Whether one launch can do it.
fn fits(terms: &[(f64, &Tensor)]) -> bool {
    (1..=MOST_TERMS).contains(&terms.len()) && terms[0].1.elem_count() > 0
}

/// An error where one launch cannot do what a clock is to be read for.
fn too_many(terms: &[(f64, &Tensor)]) -> crate::Error {
    let message = format!("{} terms in a sum that is replayed", terms.len());
    candle_core::Error::Msg(message).into()
}

/// `round(scale · Σ c_j x_j)`.
pub(crate) fn combine(terms: &[(f64, &Tensor)], scale: f64, out: Rounding) -> Result<Tensor> {
    match fits(terms) {
        true => sum_in_one(terms, scale, out, None),
        false => chain::combine(terms, scale, out),
    }
}

/// `round(c_0 x_0 + h Σ c_j x_j)` with the h that a clock shows.
pub(crate) fn stage(terms: &[(f64, &Tensor)], out: Rounding, clock: &Clock) -> Result<Tensor> {
    match fits(terms) {
        true => sum_in_one(terms, 1.0, out, Some(clock)),
        false => Err(too_many(terms)),
    }
}

fn sum_in_one(
    terms: &[(f64, &Tensor)],
    scale: f64,
    out: Rounding,
    clock: Option<&Clock>,
) -> Result<Tensor> {
    let (first, (coefficients, xs)) = (terms[0].1, split(terms)?);
    let device = device_of(first)?;
    let sum = Sum::new(&coefficients, &xs)?.stepped_from(1, clock);
    let buffer = Buffer::new(device, out.held, first.elem_count())?;
    let sink = Sink::new(&buffer, out)?;
    let kernel = load(device, &STAGE, in_f64(sum.wide, ["stage_f32", "stage_f64"]))?;
    let mut arguments = kernel.builder();
    arguments.arg(&sum.terms).arg(&scale).arg(&sink).arg(&sum.n);
    // SAFETY: all operands and the result have n elements, of the dtypes given.
    unsafe { arguments.launch(grid(blocks(sum.n as usize))) }.w()?;
    Ok(buffer.into_tensor(first.shape()))
}

/// A state after a step.
pub(crate) struct Updated {
    pub(crate) y: Tensor,
    /// What rounding has taken from it, if that is carried.
    pub(crate) lost: Option<Tensor>,
    /// As it is stored, if that was asked for.
    pub(crate) stored: Option<Tensor>,
}

/// `Σ c_j x_j` in state precision and, where asked for, as it is stored, looked at for NaN on the way.
/// With a clock, all c_j but the first are multiplied by the h that it shows.  The first term is a sum with a factor of
/// one, of which rounding has taken `lost`, if that is carried.
pub(crate) fn update(
    terms: &[(f64, &Tensor)],
    lost: Option<&Tensor>,
    (state, store): (Rounding, Option<Rounding>),
    looks: &mut Looks,
    clock: Option<&Clock>,
) -> Result<Updated> {
    if !fits(terms) {
        if clock.is_some() {
            return Err(too_many(terms));
        }
        let (y, lost) = match lost {
            Some(lost) => {
                let [y, lost] = chain::add_compensated([terms[0].1, lost], &terms[1..])?;
                (y, Some(lost))
            }
            None => (chain::combine(terms, 1.0, state)?, None),
        };
        looks.see(std::slice::from_ref(&y))?;
        let stored = store.map(|store| store.round(&y)).transpose()?;
        return Ok(Updated { y, lost, stored });
    }
    update_in_one(terms, lost, (state, store), looks.next(), clock)
}

/// `sum + lost + Σ c_j x_j`, rounded, and what rounding has taken from it.
pub(crate) fn add_compensated(
    [sum, lost]: [&Tensor; 2],
    terms: &[(f64, &Tensor)],
) -> Result<[Tensor; 2]> {
    let all: Vec<_> = std::iter::once((1.0, sum))
        .chain(terms.iter().copied())
        .collect();
    // In numbers of their own dtype, or by the chain.
    let alike = all.iter().all(|(_, x)| x.dtype() != DType::F64) || sum.dtype() == DType::F64;
    if !(fits(&all) && alike) {
        return chain::add_compensated([sum, lost], terms);
    }
    let to = (Rounding::cast(sum.dtype()), None);
    let Updated { y, lost: left, .. } = update_in_one(&all, Some(lost), to, Look::NONE, None)?;
    Ok([y, left.map_or_else(|| lost.zeros_like(), Ok)?])
}

/// [`update`] in one launch.
fn update_in_one(
    terms: &[(f64, &Tensor)],
    lost: Option<&Tensor>,
    (state, store): (Rounding, Option<Rounding>),
    look: Look,
    clock: Option<&Clock>,
) -> Result<Updated> {
    let (first, (coefficients, xs)) = (terms[0].1, split(terms)?);
    let device = device_of(first)?;
    let sum = Sum::new(&coefficients, &xs)?.stepped_from(1, clock);
    let buffer = |rounding: Rounding| Buffer::new(device, rounding.held, first.elem_count());
    let y = buffer(state)?;
    let stored = store
        .map(|store| Ok::<_, crate::Error>((buffer(store)?, store)))
        .transpose()?;
    let y_sink = Sink::new(&y, state)?;
    let stored_sink = match &stored {
        Some((buffer, store)) => Sink::new(buffer, *store)?,
        None => Sink::NONE,
    };
    let lost = lost.map(Tensor::contiguous).transpose()?;
    let lost = lost.as_ref().map(Operand::new).transpose()?;
    if lost.as_ref().is_some_and(|lost| lost.n != sum.n) {
        return Err(candle_core::Error::Msg("a sum that has lost another size".into()).into());
    }
    let left = lost.as_ref().map(|_| buffer(state)).transpose()?;
    let from = lost.as_ref().map_or(0, |lost| lost.pointer);
    let to = left.as_ref().map_or(0, |left| left.pointer);
    let kernel = load(
        device,
        &UPDATE,
        in_f64(sum.wide, ["update_f32", "update_f64"]),
    )?;
    let mut arguments = kernel.builder();
    arguments
        .arg(&sum.terms)
        .arg(&y_sink)
        .arg(&stored_sink)
        .arg(&from)
        .arg(&to)
        .arg(&look)
        .arg(&sum.n);
    // SAFETY: all operands and all results have n elements, of the dtypes given; what was lost and what is left are of
    // the entry's dtype, which is that of the state.
    unsafe { arguments.launch(grid(blocks(sum.n as usize))) }.w()?;
    Ok(Updated {
        y: y.into_tensor(first.shape()),
        lost: left.map(|left| left.into_tensor(first.shape())),
        stored: stored.map(|(buffer, _)| buffer.into_tensor(first.shape())),
    })
}

/// Pairs of one launch.
const MOST_PAIRS: usize = 64;

#[repr(C)]
#[derive(Clone, Copy)]
struct Pairs {
    acc: [u64; MOST_PAIRS],
    x: [u64; MOST_PAIRS],
    n: [u64; MOST_PAIRS],
    block: [u32; MOST_PAIRS],
    dtype: [i32; MOST_PAIRS],
    count: i32,
}

// SAFETY: plain numbers, laid out as in kernels/accumulate.cu.
unsafe impl DeviceRepr for Pairs {}

/// `acc_p += c · x_p`, or `c/S · x_p` while `sweep` goes on, c multiplied by the h of a clock if there is
/// one: all pairs in one launch.  The acc_p are contiguous, all f32 or all f64, and no two the same.
pub(crate) fn accumulate_all(
    pairs: &[(&Tensor, &Tensor)],
    c: f64,
    sweep: Option<&SweepState>,
    clock: Option<&Clock>,
) -> Result<()> {
    let clock = clock.map_or(0, Clock::pointer);
    let full = pairs.iter().filter(|(acc, _)| acc.elem_count() > 0);
    let xs = full.clone().map(|(_, x)| x.contiguous());
    let xs = xs.collect::<candle_core::Result<Vec<_>>>()?;
    let accs: Vec<_> = full.map(|(acc, _)| *acc).collect();
    for (accs, xs) in accs.chunks(MOST_PAIRS).zip(xs.chunks(MOST_PAIRS)) {
        let device = device_of(accs[0])?;
        let wide = accs[0].dtype() == DType::F64;
        let mut pairs = Pairs {
            acc: [0; MOST_PAIRS],
            x: [0; MOST_PAIRS],
            n: [0; MOST_PAIRS],
            block: [0; MOST_PAIRS],
            dtype: [0; MOST_PAIRS],
            count: xs.len() as i32,
        };
        let mut first = 0;
        let mut held = Vec::with_capacity(2 * xs.len());
        for (p, (&acc, x)) in accs.iter().zip(xs).enumerate() {
            let of_one_kind = matches!(acc.dtype(), DType::F32 | DType::F64)
                && (acc.dtype() == DType::F64) == wide;
            if !of_one_kind || acc.elem_count() != x.elem_count() {
                let message = format!(
                    "{:?} added to {:?} of {:?}",
                    x.shape(),
                    acc.shape(),
                    acc.dtype()
                );
                return Err(candle_core::Error::Msg(message).into());
            }
            let (acc, x) = (Operand::new(acc)?, Operand::new(x)?);
            (pairs.acc[p], pairs.x[p], pairs.n[p]) = (acc.pointer, x.pointer, x.n);
            (pairs.block[p], pairs.dtype[p]) = (first, x.dtype);
            first += blocks(x.n as usize);
            held.extend([acc, x]);
        }
        let scaler = sweep.map_or(0, SweepState::pointer);
        let kernel = load(
            device,
            &ACCUMULATE,
            in_f64(wide, ["accumulate_f32", "accumulate_f64"]),
        )?;
        let mut arguments = kernel.builder();
        arguments.arg(&pairs).arg(&c).arg(&scaler).arg(&clock);
        // SAFETY: both tensors of a pair have n elements; sums are of the entry's dtype.
        unsafe { arguments.launch(grid(first)) }.w()?;
    }
    Ok(())
}

/// `Σ x_i y_i` in f64, as a 0-d tensor of x's dtype.
pub(crate) fn dot(x: &Tensor, y: &Tensor) -> Result<Tensor> {
    const MOST_BLOCKS: u32 = 1024;
    let device = device_of(x)?;
    if x.elem_count() != y.elem_count() {
        let message = format!("a product of {:?} and {:?}", x.shape(), y.shape());
        return Err(candle_core::Error::Msg(message).into());
    }
    let out = Rounding::cast(x.dtype());
    let (x, y) = (x.contiguous()?, y.contiguous()?);
    let (x, y) = (Operand::new(&x)?, Operand::new(&y)?);
    let used = blocks(x.n as usize).clamp(1, MOST_BLOCKS);
    let parts = device.alloc_zeros::<f64>(used as usize)?;
    let (parts_at, parts_count) = (pointer(&parts), used as i32);
    let kernel = load(device, &DOT, "dot_parts")?;
    let mut arguments = kernel.builder();
    arguments
        .arg(&x.pointer)
        .arg(&x.dtype)
        .arg(&y.pointer)
        .arg(&y.dtype);
    arguments.arg(&parts_at).arg(&x.n);
    // SAFETY: x and y have n elements, and there is a part for each block.
    unsafe { arguments.launch(grid(used)) }.w()?;
    let buffer = Buffer::new(device, out.held, 1)?;
    let sink = Sink::new(&buffer, out)?;
    let kernel = load(device, &DOT, "dot_total")?;
    let mut arguments = kernel.builder();
    arguments.arg(&parts_at).arg(&parts_count).arg(&sink);
    // SAFETY: there are `used` parts, and space for one element.
    unsafe { arguments.launch(grid(1)) }.w()?;
    Ok(buffer.into_tensor(&().into()))
}
