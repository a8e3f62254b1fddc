//! The few tensor operations that a solver needs, one contract and three machines: `cpu` fused
//! loops, `cuda` kernels, and `chain`, the same in candle's own operations, for every other device.
//!
//! Operands may have any float dtype and layout; results are contiguous and carry no history.
//! Sums are formed in f64 if an operand is f64, otherwise in f32, in the order of the terms.

mod chain;
mod cpu;
#[cfg(feature = "cuda")]
pub(crate) mod cuda;

pub(crate) mod ratio;

use std::cell::Cell;

use candle_core::{DType, Device, Tensor};

use crate::error::Result;
use crate::precision::Rounding;

/// `round(scale · Σ c_j x_j)`: stage sums, state updates, seeds and adjoint updates.  All x_j have
/// one shape; there is at least one.
pub(crate) fn combine(terms: &[(f64, &Tensor)], scale: f64, out: Rounding) -> Result<Tensor> {
    let x = terms[0].1;
    if x.device().is_cpu() {
        return cpu::combine(terms, scale, out);
    }
    #[cfg(feature = "cuda")]
    if x.device().is_cuda() {
        return cuda::combine(terms, scale, out);
    }
    chain::combine(terms, scale, out)
}

/// `sum + lost + Σ c_j x_j` as two tensors: the rounded sum, and what rounding has taken from it.  `sum` and `lost` are
/// f32 or f64 both, and so is the result; they and all x_j have one shape.
pub(crate) fn add_compensated(
    [sum, lost]: [&Tensor; 2],
    terms: &[(f64, &Tensor)],
) -> Result<[Tensor; 2]> {
    if sum.device().is_cpu() {
        return cpu::add_compensated([sum, lost], terms);
    }
    #[cfg(feature = "cuda")]
    if sum.device().is_cuda() {
        return cuda::add_compensated([sum, lost], terms);
    }
    chain::add_compensated([sum, lost], terms)
}

impl Rounding {
    /// Rounds x; the result carries no history.
    pub(crate) fn round(&self, x: &Tensor) -> Result<Tensor> {
        if self.to == self.held && x.dtype() == self.held {
            return Ok(x.detach());
        }
        combine(&[(1.0, x)], 1.0, *self)
    }
}

/// `acc += c · x` in place; `acc` is contiguous, f32 or f64, and nobody else's.
pub(crate) fn accumulate(acc: &mut Tensor, c: f64, x: &Tensor) -> Result<()> {
    if x.device().is_cpu() {
        return cpu::accumulate(acc, c, x);
    }
    #[cfg(feature = "cuda")]
    if x.device().is_cuda() {
        return cuda::accumulate_all(&[(acc, x)], c, None, None);
    }
    chain::accumulate(acc, c, x)
}

/// `max |x|` on the host; NaN or infinite exactly if an element is.
pub(crate) fn magnitude(x: &Tensor) -> Result<f64> {
    if x.device().is_cpu() {
        return cpu::magnitude(x);
    }
    #[cfg(feature = "cuda")]
    if x.device().is_cuda() {
        return cuda::magnitude(x);
    }
    chain::magnitude(x)
}

/// `Σ x_i y_i`, a 0-d tensor of x's dtype.
pub(crate) fn dot(x: &Tensor, y: &Tensor) -> Result<Tensor> {
    if x.device().is_cpu() {
        return cpu::dot(x, y);
    }
    #[cfg(feature = "cuda")]
    if x.device().is_cuda() {
        return cuda::dot(x, y);
    }
    chain::dot(x, y)
}

/// A 0-d f32 tensor that is zero if x is finite and NaN otherwise, left on the device.
pub(crate) fn poison(x: &Tensor) -> Result<Tensor> {
    // The product first: an f64 that is finite may be infinite in f32.
    Ok((x.detach() * 0.0)?.to_dtype(DType::F32)?.sum_all()?)
}

/// The fused operations and the chains that they replace, side by side: for the benches, no part of the
/// interface.
pub mod internals {
    use super::{chain, cpu};
    use crate::error::Result;
    use crate::precision::Rounding;
    use candle_core::{DType, Tensor};

    /// Σ c_j x_j in the dtype `to`.
    pub fn combine(fused: bool, terms: &[(f64, &Tensor)], to: DType) -> Result<Tensor> {
        match fused {
            true => cpu::combine(terms, 1.0, Rounding::cast(to)),
            false => chain::combine(terms, 1.0, Rounding::cast(to)),
        }
    }

    /// acc += c x.
    pub fn accumulate(fused: bool, acc: &mut Tensor, c: f64, x: &Tensor) -> Result<()> {
        match fused {
            true => cpu::accumulate(acc, c, x),
            false => chain::accumulate(acc, c, x),
        }
    }

    /// max |x|, with a check that it is finite.
    pub fn magnitude(fused: bool, x: &Tensor) -> Result<f64> {
        match fused {
            true => cpu::magnitude(x),
            false => chain::magnitude(x),
        }
    }
}

/// How often this thread has waited for a device and read from it.
pub(crate) fn host_reads() -> usize {
    READS.get()
}

/// Notes one more; a read from the CPU's own memory is none.
pub(crate) fn note_host_read(device: &Device) {
    if !device.is_cpu() {
        READS.set(READS.get() + 1);
    }
}

thread_local! {
    static READS: Cell<usize> = const { Cell::new(0) };
}

#[cfg(test)]
pub(crate) mod tests {
    use candle_core::Shape;
    use proptest::prelude::*;

    use super::*;

    const FLOATS: [DType; 4] = [DType::F16, DType::BF16, DType::F32, DType::F64];

    /// Unit roundoff of a dtype.
    pub(crate) fn roundoff(dtype: DType) -> f64 {
        match dtype {
            DType::F16 => 2f64.powi(-11),
            DType::BF16 => 2f64.powi(-8),
            DType::F32 => 2f64.powi(-24),
            _ => 2f64.powi(-53),
        }
    }

    pub(crate) fn values(x: &Tensor) -> Vec<f64> {
        let x = x.to_dtype(DType::F64).and_then(|x| x.flatten_all());
        x.and_then(|x| x.to_vec1()).unwrap()
    }

    prop_compose! {
        /// Terms c_j x_j of one odd length, x_j of any dtype, every other one with strides.
        fn terms()(n in 1usize..2500, count in 1usize..14)(
            data in prop::collection::vec(prop::collection::vec(-4f64..4.0, n), count),
            c in prop::collection::vec(-2f64..2.0, count),
            dtypes in prop::collection::vec(0usize..4, count),
        ) -> Vec<(f64, Tensor)> {
            let tensor = |(i, data): (usize, Vec<f64>)| {
                let n = data.len();
                let x = Tensor::from_vec(data, n, &Device::Cpu)?.to_dtype(FLOATS[dtypes[i]])?;
                if i % 2 == 0 {
                    return Ok(x);
                }
                // The same values as a strided view.
                Tensor::stack(&[&x, &x], 1)?.narrow(1, 1, 1)?.squeeze(1)
            };
            let tensors = data.into_iter().enumerate().map(tensor);
            let tensors: candle_core::Result<Vec<_>> = tensors.collect();
            c.into_iter().zip(tensors.unwrap()).collect()
        }
    }

    /// The GPU, if there is one; [`NEEDS_GPU`] makes it an error if there is none.
    pub(crate) fn gpu() -> Option<Device> {
        thread_local! {
            static GPU: Option<Device> = Device::new_cuda(0).ok();
        }
        let gpu = GPU.with(Clone::clone);
        if gpu.is_none() && cfg!(feature = "cuda") {
            assert!(
                std::env::var_os(NEEDS_GPU).is_none(),
                "{NEEDS_GPU} is set, and there is no GPU"
            );
            eprintln!("NOT RUN on CUDA: no device");
        }
        gpu
    }

    /// Set where tests must not pass without a GPU.
    const NEEDS_GPU: &str = "CANDLE_DIFFEQ_NEEDS_GPU";

    /// The same operation where there is a GPU, on its tensors, brought back.
    fn on_gpu(
        terms: &[(f64, Tensor)],
        run: impl Fn(&[(f64, &Tensor)]) -> Tensor,
    ) -> Option<Tensor> {
        let gpu = gpu()?;
        let there: Vec<_> = terms
            .iter()
            .map(|(c, x)| (*c, x.to_device(&gpu).unwrap()))
            .collect();
        Some(run(&borrowed(&there)).to_device(&Device::Cpu).unwrap())
    }

    fn borrowed(terms: &[(f64, Tensor)]) -> Vec<(f64, &Tensor)> {
        terms.iter().map(|(c, x)| (*c, x)).collect()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn combine_is_a_sum_in_f64_rounded_once(terms in terms(), scale in -4i32..4, to in 0usize..4, held in 0usize..2) {
            let to = FLOATS[to];
            let low = matches!(to, DType::F16 | DType::BF16);
            let out = Rounding { to, held: if low && held == 0 { DType::F32 } else { to } };
            let scale = 2f64.powi(scale);
            let x: Vec<_> = terms.iter().map(|(_, x)| values(x)).collect();
            let wide = terms.iter().any(|(_, x)| x.dtype() == DType::F64);
            let sum = if wide { DType::F64 } else { DType::F32 };
            let on_gpu = on_gpu(&terms, |terms| combine(terms, scale, out).unwrap());
            let terms = borrowed(&terms);
            let here = [cpu::combine(&terms, scale, out).unwrap(), chain::combine(&terms, scale, out).unwrap()];
            for result in here.into_iter().chain(on_gpu) {
                prop_assert_eq!(result.dtype(), out.held);
                prop_assert_eq!(result.shape(), &Shape::from(x[0].len()));
                for (i, got) in values(&result).into_iter().enumerate() {
                    let exact: f64 = terms.iter().zip(&x).map(|((c, _), x)| scale * c * x[i]).sum();
                    let size: f64 = terms.iter().zip(&x).map(|((c, _), x)| (scale * c * x[i]).abs()).sum();
                    // n + 1 roundings of the sum, one of the coefficient, one of the result; below
                    // the normal range of f16 half its spacing.
                    let bound = (terms.len() + 2) as f64 * roundoff(sum) * size
                        + roundoff(to) * exact.abs() * 1.01 + 2f64.powi(-25);
                    prop_assert!((got - exact).abs() <= bound, "{} for {} at {}", got, exact, i);
                }
            }
        }

        #[test]
        fn compensated_sums_are_rounded_once_and_lose_nothing_else(terms in terms(), double in any::<bool>(), tiny in any::<bool>()) {
            let dtype = if double { DType::F64 } else { DType::F32 };
            let shape = &terms[0].1.shape().clone();
            let held = |x: &Tensor| !double && x.dtype() == DType::F64;
            // Coefficients that f32 does not hold, of numbers that are the larger for it.
            let c = |c: f64, x: &Tensor| if tiny && held(x) { c * 1e-40 } else { c };
            let terms: Vec<_> = terms.into_iter().map(|(k, x)| {
                let x = if tiny && held(&x) { (x * 1e40).unwrap() } else { x };
                (c(k, &x), x)
            }).collect();
            let start = |seed: f64| Tensor::full(seed, shape, &Device::Cpu).unwrap().to_dtype(dtype).unwrap();
            let (sum, lost) = (start(1e3), start(0.3 * roundoff(dtype) * 1e3));
            let terms = borrowed(&terms);
            for result in [cpu::add_compensated([&sum, &lost], &terms), chain::add_compensated([&sum, &lost], &terms)] {
                let [after, rest] = result.unwrap();
                prop_assert_eq!((after.dtype(), rest.dtype()), (dtype, dtype));
                prop_assert_eq!((after.shape(), rest.shape()), (shape, shape));
                let x: Vec<_> = terms.iter().map(|(_, x)| values(x)).collect();
                let (after, rest, before) = (values(&after), values(&rest), [values(&sum)[0], values(&lost)[0]]);
                for i in 0..after.len().min(1500) {
                    let added: f64 = terms.iter().zip(&x).map(|((c, _), x)| c * x[i]).sum();
                    let size: f64 = terms.iter().zip(&x).map(|((c, _), x)| (c * x[i]).abs()).sum();
                    // The roundings of the small terms; none of the large sum.
                    let bound = (terms.len() + 3) as f64 * roundoff(dtype) * (size + before[1]);
                    let error = (after[i] - before[0]) + rest[i] - (before[1] + added);
                    prop_assert!(error.abs() <= bound + 1e-13 * size, "{} at {}", error, i);
                    prop_assert!(rest[i].abs() <= roundoff(dtype) * after[i].abs());
                }
            }
        }

        #[test]
        fn accumulate_adds_in_place(terms in terms(), c in -3f64..3.0, double in any::<bool>()) {
            let dtype = if double { DType::F64 } else { DType::F32 };
            for (_, x) in terms {
                let start = (Tensor::ones(x.shape(), dtype, &Device::Cpu).unwrap() * 0.5).unwrap();
                let (mut fused, mut chained) = (start.copy().unwrap(), start.copy().unwrap());
                let on_gpu = gpu().map(|gpu| {
                    let mut acc = start.to_device(&gpu).unwrap();
                    accumulate(&mut acc, c, &x.to_device(&gpu).unwrap()).unwrap();
                    values(&acc.to_device(&Device::Cpu).unwrap())
                });
                cpu::accumulate(&mut fused, c, &x).unwrap();
                chain::accumulate(&mut chained, c, &x).unwrap();
                for (i, x) in values(&x).into_iter().enumerate() {
                    let exact = 0.5 + c * x;
                    let bound = 4.0 * roundoff(dtype) * (0.5 + (c * x).abs());
                    prop_assert!((values(&fused)[i] - exact).abs() <= bound);
                    prop_assert!((values(&chained)[i] - exact).abs() <= bound);
                    if let Some(on_gpu) = &on_gpu {
                        prop_assert!((on_gpu[i] - exact).abs() <= bound);
                    }
                    if i == 3 { break; }
                }
            }
        }

        #[test]
        fn magnitude_and_dot_agree_with_f64(terms in terms()) {
            let x = &terms[0].1;
            let max = values(x).into_iter().fold(0f64, |m, x| m.max(x.abs()));
            prop_assert_eq!(cpu::magnitude(x).unwrap(), max);
            prop_assert_eq!(chain::magnitude(x).unwrap(), max);
            if let Some(gpu) = gpu() {
                prop_assert_eq!(magnitude(&x.to_device(&gpu).unwrap()).unwrap(), max);
            }
            let x = x.to_dtype(DType::F32).unwrap();
            let y = &terms[terms.len() - 1].1;
            let products: Vec<_> = values(&x).into_iter().zip(values(y)).map(|(x, y)| x * y).collect();
            let (exact, size): (f64, f64) = (products.iter().sum(), products.iter().map(|p| p.abs()).sum());
            let fused = values(&cpu::dot(&x, y).unwrap().reshape(1).unwrap())[0];
            let chained = values(&chain::dot(&x, y).unwrap().reshape(1).unwrap())[0];
            prop_assert!((fused - exact).abs() <= 2.0 * roundoff(DType::F32) * size);
            if let Some(gpu) = gpu() {
                let [x, y] = [&x, y].map(|x| x.to_device(&gpu).unwrap());
                let on_gpu = f64::from(dot(&x, &y).unwrap().to_scalar::<f32>().unwrap());
                prop_assert!((on_gpu - exact).abs() <= 2.0 * roundoff(DType::F32) * size);
            }
            prop_assert!((chained - exact).abs() <= (products.len() + 2) as f64 * roundoff(DType::F32) * size);
        }
    }

    #[test]
    fn one_bad_element_is_seen_wherever_it_is() {
        for dtype in FLOATS {
            for bad in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
                for at in [0, 1023, 1024, 1499] {
                    let mut data = vec![1f64; 1500];
                    data[at] = bad;
                    let x = Tensor::from_vec(data, 1500, &Device::Cpu)
                        .unwrap()
                        .to_dtype(dtype)
                        .unwrap();
                    assert!(!cpu::magnitude(&x).unwrap().is_finite());
                    assert!(!chain::magnitude(&x).unwrap().is_finite());
                    if let Some(gpu) = gpu() {
                        let x = x.to_device(&gpu).unwrap();
                        assert!(!magnitude(&x).unwrap().is_finite());
                    }
                    assert!(poison(&x).unwrap().to_scalar::<f32>().unwrap().is_nan());
                }
            }
        }
    }

    #[test]
    fn a_number_beyond_f32_is_not_bad_in_f64() {
        let x = Tensor::new(&[1e300f64, -1e300], &Device::Cpu).unwrap();
        assert_eq!(poison(&x).unwrap().to_scalar::<f32>().unwrap(), 0.0);
    }

    #[test]
    fn results_share_no_storage_with_their_operands() {
        let x = candle_core::Var::new(&[1f32, 2.0], &Device::Cpu).unwrap();
        for result in [
            cpu::combine(&[(1.0, x.as_tensor())], 1.0, Rounding::cast(DType::F32)).unwrap(),
            chain::combine(&[(1.0, x.as_tensor())], 1.0, Rounding::cast(DType::F32)).unwrap(),
        ] {
            x.set(&Tensor::new(&[5f32, 6.0], &Device::Cpu).unwrap())
                .unwrap();
            assert_eq!(values(&result), [1.0, 2.0]);
            assert!(!result.track_op());
            x.set(&Tensor::new(&[1f32, 2.0], &Device::Cpu).unwrap())
                .unwrap();
        }
    }
}
