//! Activations of whole tensors on the CPU, on its vector unit and all its threads; candle's own are
//! scalar and, for `tanh`, an order of magnitude slower.

use candle_core::{CpuStorage, CustomOp1, CustomOp2, Layout, Result, Shape, Tensor};
use pulp::{Simd, WithSimd};

use super::activation::{Activation, Apply};
use crate::simd::pieces::{by_piece, share};
use crate::simd::{enter, scalars, scalars_mut, unit, vectors, Element};

/// Numbers that are not worth a second thread.
const ALONE: usize = 1 << 17;

/// Vectors in a block that stays in the first cache.
const BLOCK: usize = 64;

/// Whether these functions are for x.
pub(super) fn is_for(x: &Tensor) -> bool {
    use candle_core::DType::{F32, F64};
    x.device().is_cpu() && matches!(x.dtype(), F32 | F64)
}

/// σ(x), differentiable by candle.
pub(super) fn value(activation: Activation, x: &Tensor) -> Result<Tensor> {
    x.contiguous()?.apply_op1(Value(activation))
}

/// σ'(x) g.
pub(super) fn pull(activation: Activation, x: &Tensor, g: &Tensor) -> Result<Tensor> {
    let (x, g) = (x.detach().contiguous()?, g.contiguous()?);
    x.apply_op2_no_bwd(&g, &ActivationPull(activation))
}

struct Value(Activation);

impl CustomOp1 for Value {
    fn name(&self) -> &'static str {
        "activation"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let out = match x {
            CpuStorage::F32(x) => CpuStorage::F32(run(self.0, numbers(x, layout)?, None)?),
            CpuStorage::F64(x) => CpuStorage::F64(run(self.0, numbers(x, layout)?, None)?),
            _ => candle_core::bail!("an activation of numbers that are neither f32 nor f64"),
        };
        Ok((out, layout.shape().clone()))
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, g: &Tensor) -> Result<Option<Tensor>> {
        pull(self.0, x, g).map(Some)
    }
}

struct ActivationPull(Activation);

impl CustomOp2 for ActivationPull {
    fn name(&self) -> &'static str {
        "activation pull-back"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        g: &CpuStorage,
        g_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        if x_layout.shape() != g_layout.shape() {
            candle_core::bail!("a cotangent of another shape than its activation")
        }
        let out = match (x, g) {
            (CpuStorage::F32(x), CpuStorage::F32(g)) => {
                let g = Some(numbers(g, g_layout)?);
                CpuStorage::F32(run(self.0, numbers(x, x_layout)?, g)?)
            }
            (CpuStorage::F64(x), CpuStorage::F64(g)) => {
                let g = Some(numbers(g, g_layout)?);
                CpuStorage::F64(run(self.0, numbers(x, x_layout)?, g)?)
            }
            _ => candle_core::bail!("a cotangent of another dtype than its activation"),
        };
        Ok((out, x_layout.shape().clone()))
    }
}

/// The numbers of a contiguous operand.
pub(super) fn numbers<'a, T>(x: &'a [T], layout: &Layout) -> Result<&'a [T]> {
    match layout.contiguous_offsets() {
        // The offset of an empty part may lie behind the end.
        Some((start, end)) if start == end => Ok(&[]),
        Some((start, end)) => Ok(&x[start..end]),
        None => candle_core::bail!("a fused operation of a tensor that is not contiguous"),
    }
}

/// σ(x), or σ'(x) g where g is given.
fn run<T: Element>(activation: Activation, x: &[T], g: Option<&[T]>) -> Result<Vec<T>> {
    let unit = unit()?;
    let size = share(x.len(), ALONE);
    let mut out = vec![T::default(); x.len()];
    by_piece(&mut out, size, &|at, out| {
        unit.dispatch(ElementJob {
            activation,
            x: &x[at..][..out.len()],
            of: match g {
                Some(g) => Of::Cotangent(&g[at..][..out.len()]),
                None => Of::Value,
            },
            out,
        });
    });
    Ok(out)
}

/// What is computed of x.
pub(super) enum Of<'a, T> {
    /// σ(x).
    Value,
    /// σ'(x) g.
    Cotangent(&'a [T]),
    /// σ(x) in place of x, and σ'(x) beside it.
    Both(&'a mut [T]),
}

/// One chunk.
pub(super) struct ElementJob<'a, T> {
    pub(super) activation: Activation,
    pub(super) x: &'a [T],
    pub(super) of: Of<'a, T>,
    pub(super) out: &'a mut [T],
}

impl<T: Element> WithSimd for ElementJob<'_, T> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(mut self, s: S) {
        let size = BLOCK * T::lanes::<S>();
        let mut values = vectors::<T, S>(BLOCK);
        let mut slopes = vectors::<T, S>(BLOCK);
        for (b, out) in self.out.chunks_mut(size).enumerate() {
            let range = b * size..b * size + out.len();
            let x = match self.of {
                Of::Both(_) => &*out,
                Of::Value | Of::Cotangent(_) => &self.x[range.clone()],
            };
            scalars_mut::<T, S>(&mut values)[..x.len()].copy_from_slice(x);
            let used = out.len().div_ceil(T::lanes::<S>());
            let block = Apply::<T, S> {
                activation: self.activation,
                z: &mut values[..used],
                slope: &mut slopes[..used],
            };
            enter(s, block);
            if !matches!(self.of, Of::Cotangent(_)) {
                out.copy_from_slice(&scalars::<T, S>(&values)[..out.len()]);
            }
            if matches!(self.of, Of::Value) {
                continue;
            }
            if !self.activation.keeps_slope() {
                slopes[..used].fill(T::splat(s, T::of(1.0)));
                let pull = super::activation::Pull::<T, S> {
                    activation: self.activation,
                    value: &values[..used],
                    g: &mut slopes[..used],
                };
                enter(s, pull);
            }
            let slopes = scalars::<T, S>(&slopes);
            match &mut self.of {
                Of::Value => {}
                Of::Cotangent(g) => {
                    for ((out, d), g) in out.iter_mut().zip(slopes).zip(&g[range]) {
                        *out = *d * *g;
                    }
                }
                Of::Both(slope) => slope[range].copy_from_slice(&slopes[..out.len()]),
            }
        }
    }
}
