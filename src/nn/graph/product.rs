//! Sparse times dense as one operation.  On the CPU rows are divided among threads, columns fill vectors, and the order of
//! every sum is that of the entries, whatever the threads and the vector unit.

use std::sync::Arc;

#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
use candle_core::{CpuStorage, CustomOp2, Layout, Result, Shape, Tensor};
use pulp::{Simd, WithSimd};

#[cfg(feature = "cuda")]
use super::device;
use super::pattern::{Pattern, Side};
use crate::nn::elementwise::numbers;
use crate::simd::pieces::for_each;
use crate::simd::{unit, Element};

/// Products that one thread takes: tens of microseconds of work.
const CHUNK: usize = 1 << 17;

/// A x of the values of A's entries and x, differentiable by candle in both.
pub(super) struct Product(pub(super) Arc<Pattern>);

impl CustomOp2 for Product {
    fn name(&self) -> &'static str {
        "sparse product"
    }

    fn cpu_fwd(
        &self,
        values: &CpuStorage,
        at_values: &Layout,
        x: &CpuStorage,
        at_x: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (side, width) = (&self.0.by_row, at_x.shape().dims2()?.1);
        let shape = Shape::from((side.lines(), width));
        let out = match (values, x) {
            (CpuStorage::F32(v), CpuStorage::F32(x)) => {
                let (v, x) = (numbers(v, at_values)?, numbers(x, at_x)?);
                CpuStorage::F32(product(side, |e| v[e], x, width)?)
            }
            (CpuStorage::F64(v), CpuStorage::F64(x)) => {
                let (v, x) = (numbers(v, at_values)?, numbers(x, at_x)?);
                CpuStorage::F64(product(side, |e| v[e], x, width)?)
            }
            _ => {
                candle_core::bail!("a sparse product of operands that are not both f32 or both f64")
            }
        };
        Ok((out, shape))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        values: &CudaStorage,
        at_values: &Layout,
        x: &CudaStorage,
        at_x: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        let out = device::product(&self.0, false, (values, at_values), (x, at_x))?;
        let shape = (self.0.by_row.lines(), at_x.shape().dims2()?.1);
        Ok((out, Shape::from(shape)))
    }

    /// Aᵀ g, and ⟨g_i, x_j⟩ for the entry at (i, j).
    fn bwd(
        &self,
        values: &Tensor,
        x: &Tensor,
        _: &Tensor,
        g: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let pattern = || Arc::clone(&self.0);
        let g = g.contiguous()?;
        let to_x = x.track_op().then(|| {
            let values = values.detach();
            values.apply_op2_no_bwd(&g, &Transposed(pattern()))
        });
        let to_values = values.track_op().then(|| match x.dim(1)? {
            0 => values.zeros_like(),
            _ => g.apply_op2_no_bwd(&x.detach(), &Sampled(pattern())),
        });
        Ok((to_values.transpose()?, to_x.transpose()?))
    }
}

/// Aᵀ g of the values of A's entries and g.
struct Transposed(Arc<Pattern>);

impl CustomOp2 for Transposed {
    fn name(&self) -> &'static str {
        "transposed sparse product"
    }

    fn cpu_fwd(
        &self,
        values: &CpuStorage,
        at_values: &Layout,
        g: &CpuStorage,
        at_g: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (side, names) = (&self.0.by_column, &self.0.numbers);
        let width = at_g.shape().dims2()?.1;
        let out = match (values, g) {
            (CpuStorage::F32(v), CpuStorage::F32(g)) => {
                let (v, g) = (numbers(v, at_values)?, numbers(g, at_g)?);
                CpuStorage::F32(product(side, |e| v[names[e] as usize], g, width)?)
            }
            (CpuStorage::F64(v), CpuStorage::F64(g)) => {
                let (v, g) = (numbers(v, at_values)?, numbers(g, at_g)?);
                CpuStorage::F64(product(side, |e| v[names[e] as usize], g, width)?)
            }
            _ => {
                candle_core::bail!("a sparse product of operands that are not both f32 or both f64")
            }
        };
        Ok((out, Shape::from((side.lines(), width))))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        values: &CudaStorage,
        at_values: &Layout,
        g: &CudaStorage,
        at_g: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        let out = device::product(&self.0, true, (values, at_values), (g, at_g))?;
        let shape = (self.0.by_column.lines(), at_g.shape().dims2()?.1);
        Ok((out, Shape::from(shape)))
    }
}

/// The entries of g xᵀ that a pattern has.
struct Sampled(Arc<Pattern>);

impl CustomOp2 for Sampled {
    fn name(&self) -> &'static str {
        "entries of a product"
    }

    fn cpu_fwd(
        &self,
        g: &CpuStorage,
        at_g: &Layout,
        x: &CpuStorage,
        at_x: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (side, width) = (&self.0.by_row, at_x.shape().dims2()?.1);
        let out = match (g, x) {
            (CpuStorage::F32(g), CpuStorage::F32(x)) => CpuStorage::F32(sampled(
                side,
                [numbers(g, at_g)?, numbers(x, at_x)?],
                width,
            )?),
            (CpuStorage::F64(g), CpuStorage::F64(x)) => CpuStorage::F64(sampled(
                side,
                [numbers(g, at_g)?, numbers(x, at_x)?],
                width,
            )?),
            _ => {
                candle_core::bail!("a sparse product of operands that are not both f32 or both f64")
            }
        };
        let entries = self.0.by_row.across.len();
        Ok((out, Shape::from(entries)))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        g: &CudaStorage,
        at_g: &Layout,
        x: &CudaStorage,
        at_x: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        let out = device::sampled(&self.0, (g, at_g), (x, at_x))?;
        Ok((out, Shape::from(self.0.by_row.across.len())))
    }
}

/// How many lines make a chunk of work.
fn lines_in_a_chunk(side: &Side, width: usize) -> usize {
    let of_a_line = (side.across.len() * width).div_ceil(side.lines().max(1));
    (CHUNK / of_a_line.max(1)).max(1)
}

/// Σ over the entries of each line of value · row of x.
fn product<T: Element>(
    side: &Side,
    value: impl Fn(usize) -> T + Sync,
    x: &[T],
    width: usize,
) -> Result<Vec<T>> {
    let unit = unit()?;
    let mut out = vec![T::default(); side.lines() * width];
    if out.is_empty() {
        return Ok(out);
    }
    let lines = lines_in_a_chunk(side, width);
    for_each(out.chunks_mut(lines * width).enumerate(), &|(c, out)| {
        unit.dispatch(Lines {
            side,
            value: &value,
            x,
            width,
            first: c * lines,
            out,
        });
    });
    Ok(out)
}

/// Lines from the `first` on.
pub(super) struct Lines<'a, T, V> {
    pub(super) side: &'a Side,
    pub(super) value: V,
    pub(super) x: &'a [T],
    pub(super) width: usize,
    pub(super) first: usize,
    pub(super) out: &'a mut [T],
}

impl<T: Element, V: Fn(usize) -> T> WithSimd for Lines<'_, T, V> {
    type Output = ();

    /// A product and a sum are two roundings on every unit, so that all of them give the same bits.
    #[inline(always)]
    fn with_simd<S: Simd>(self, s: S) {
        let Self {
            side,
            value,
            x,
            width,
            first,
            out,
        } = self;
        for (i, out) in out.chunks_exact_mut(width).enumerate() {
            let entries = side.line(first + i);
            let across = &side.across[entries.clone()];
            let line = Line {
                terms: entries.zip(across),
                value: &value,
                x,
                width,
            };
            let lanes = T::lanes::<S>();
            let (whole, rest) = out.split_at_mut(width / lanes * lanes);
            let whole: &mut [T::Vector<S>] = bytemuck::cast_slice_mut(whole);
            let (eights, few) = whole.as_chunks_mut::<8>();
            let mut from = 0;
            for out in eights {
                line.add(s, &mut from, out);
            }
            let (fours, ones) = few.as_chunks_mut::<4>();
            for out in fours {
                line.add(s, &mut from, out);
            }
            for out in ones {
                line.add(s, &mut from, std::array::from_mut(out));
            }
            line.add_rest(from, rest);
        }
    }
}

/// One line: the number of each entry and where it is, and what it is multiplied with.
struct Line<'a, T, V, I> {
    terms: I,
    value: &'a V,
    x: &'a [T],
    width: usize,
}

impl<'e, T: Element, V: Fn(usize) -> T, I: Iterator<Item = (usize, &'e u32)> + Clone>
    Line<'_, T, V, I>
{
    /// N vectors of columns, whose sums stay in registers.
    #[inline(always)]
    fn add<S: Simd, const N: usize>(&self, s: S, from: &mut usize, out: &mut [T::Vector<S>; N]) {
        let size = N * T::lanes::<S>();
        let mut sums = [T::zeros::<S>(); N];
        for (e, across) in self.terms.clone() {
            let v = T::splat(s, (self.value)(e));
            let x = &self.x[*across as usize * self.width + *from..][..size];
            let x: &[T::Vector<S>] = bytemuck::cast_slice(x);
            for n in 0..N {
                sums[n] = T::plus(s, sums[n], T::times(s, v, x[n]));
            }
        }
        *out = sums;
        *from += size;
    }

    /// The columns that fill no vector.
    #[inline(always)]
    fn add_rest(&self, from: usize, out: &mut [T]) {
        out.fill(T::default());
        if out.is_empty() {
            return;
        }
        for (e, across) in self.terms.clone() {
            let (v, at) = ((self.value)(e), *across as usize * self.width + from);
            let x = &self.x[at..at + out.len()];
            for (sum, x) in out.iter_mut().zip(x) {
                *sum += v * *x;
            }
        }
    }
}

/// ⟨g_i, x_j⟩ for every entry (i, j).
fn sampled<T: Element>(side: &Side, [g, x]: [&[T]; 2], width: usize) -> Result<Vec<T>> {
    let unit = unit()?;
    let lines = side.line_of_each();
    let mut out = vec![T::default(); lines.len()];
    let entries = (CHUNK / width).max(1);
    for_each(out.chunks_mut(entries).enumerate(), &|(c, out)| {
        let range = c * entries..c * entries + out.len();
        unit.dispatch(Dots {
            places: lines[range.clone()].iter().zip(&side.across[range]),
            rows: [g, x],
            width,
            out,
        });
    });
    Ok(out)
}

/// One product of rows after the other.
struct Dots<'a, T, P> {
    places: P,
    rows: [&'a [T]; 2],
    width: usize,
    out: &'a mut [T],
}

impl<'a, T: Element, P: Iterator<Item = (&'a u32, &'a u32)>> WithSimd for Dots<'_, T, P> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        let row = |of: &'_ [T], i: u32| -> std::ops::Range<usize> {
            debug_assert!(!of.is_empty());
            i as usize * self.width..(i as usize + 1) * self.width
        };
        for (out, (&i, &j)) in self.out.iter_mut().zip(self.places) {
            let [g, x] = self.rows;
            let (g, x) = (&g[row(g, i)], &x[row(x, j)]);
            // Sixteen sums side by side, added up in order.
            let mut sums = [T::default(); 16];
            for (g, x) in g.chunks(16).zip(x.chunks(16)) {
                for (sum, (g, x)) in sums.iter_mut().zip(g.iter().zip(x)) {
                    *sum += *g * *x;
                }
            }
            for sum in sums {
                *out += sum;
            }
        }
    }
}
