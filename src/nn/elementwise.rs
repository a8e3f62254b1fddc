//! Activations of whole tensors on the CPU, on its vector unit and all its threads; candle's own are
//! scalar and, for `tanh`, an order of magnitude slower.

use candle_core::{CpuStorage, CustomOp1, CustomOp2, Layout, Result, Shape, Tensor};
use pulp::{Simd, WithSimd};

use super::activation::{Activation, Apply, Expand};
use crate::simd::pieces::{by_piece, share};
use crate::simd::{enter, scalars, scalars_mut, unit, Element};

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
    /// σ(x) in place of x.
    Own,
    /// The same, and σ'(x) beside it.
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
    fn with_simd<S: Simd>(self, s: S) {
        let Self {
            activation,
            x,
            of,
            out,
        } = self;
        let whole = out.len() / T::lanes::<S>() * T::lanes::<S>();
        let (out, out_rest) = out.split_at_mut(whole);
        let (x, x_rest) = x.split_at(whole.min(x.len()));
        let blocks = T::vectors_mut::<S>(out).chunks_mut(BLOCK);
        let xs = T::vectors::<S>(x).chunks(BLOCK);
        let mut spare = [T::zeros::<S>(); BLOCK];
        // What fills no vector, in one.
        let mut last = [[T::zeros::<S>(); 1]; 2];
        let [z, d] = &mut last;
        let rest = if x_rest.is_empty() {
            &*out_rest
        } else {
            x_rest
        };
        scalars_mut::<T, S>(z)[..rest.len()].copy_from_slice(rest);
        match of {
            Of::Value => {
                for (out, x) in blocks.zip(xs) {
                    out.copy_from_slice(x);
                    apply::<T, S>(s, activation, [out, &mut spare]);
                }
                apply::<T, S>(s, activation, [z, d]);
                out_rest.copy_from_slice(&scalars::<T, S>(z)[..out_rest.len()]);
            }
            Of::Own => {
                for out in blocks {
                    apply::<T, S>(s, activation, [out, &mut spare]);
                }
                apply::<T, S>(s, activation, [z, d]);
                out_rest.copy_from_slice(&scalars::<T, S>(z)[..out_rest.len()]);
            }
            Of::Both(slope) => {
                let (slope, slope_rest) = slope.split_at_mut(whole);
                let slopes = T::vectors_mut::<S>(slope).chunks_mut(BLOCK);
                for (out, slope) in blocks.zip(slopes) {
                    expand::<T, S>(s, activation, [out, slope]);
                }
                expand::<T, S>(s, activation, [z, d]);
                out_rest.copy_from_slice(&scalars::<T, S>(z)[..out_rest.len()]);
                slope_rest.copy_from_slice(&scalars::<T, S>(d)[..slope_rest.len()]);
            }
            Of::Cotangent(g) => {
                let (g, g_rest) = g.split_at(whole);
                let gs = T::vectors::<S>(g).chunks(BLOCK);
                for (out, (x, g)) in blocks.zip(xs.zip(gs)) {
                    let z = &mut spare[..x.len()];
                    z.copy_from_slice(x);
                    expand::<T, S>(s, activation, [z, &mut *out]);
                    for (out, g) in out.iter_mut().zip(g) {
                        *out = T::times(s, *out, *g);
                    }
                }
                expand::<T, S>(s, activation, [z, d]);
                let slopes = scalars::<T, S>(d);
                for (out, (d, g)) in out_rest.iter_mut().zip(slopes.iter().zip(g_rest)) {
                    *out = *d * *g;
                }
            }
        }
    }
}

/// z becomes σ(z), and the slopes are written beside it where σ gives them at once.
#[inline(always)]
fn apply<T: Element, S: Simd>(s: S, activation: Activation, [z, slope]: [&mut [T::Vector<S>]; 2]) {
    let apply = Apply::<T, S> {
        activation,
        slope: &mut slope[..z.len()],
        z,
    };
    enter(s, apply);
}

/// z becomes σ(z), and `slope` becomes σ'(z).
#[inline(always)]
fn expand<T: Element, S: Simd>(s: S, activation: Activation, [z, slope]: [&mut [T::Vector<S>]; 2]) {
    let expand = Expand::<T, S> {
        activation,
        z,
        slope,
        curvature: &mut [],
    };
    enter(s, expand);
}
