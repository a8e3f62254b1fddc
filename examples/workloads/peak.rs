//! What the machine's vector units do at most.

use std::hint::black_box;
use std::time::Instant;

use pulp::{Arch, Simd, WithSimd};

/// Chains that do not wait for each other: enough for two units of four cycles, few enough for sixteen
/// registers.
const CHAINS: usize = 12;

/// Links of a chain: some milliseconds, so that waking threads does not show.
const LINKS: usize = 1 << 20;

/// x ← a x + b again and again, in every lane of every chain.
struct Chains;

impl WithSimd for Chains {
    /// Multiply-adds that were done, and what came out.
    type Output = (usize, f32);

    #[inline(always)]
    fn with_simd<S: Simd>(self, s: S) -> Self::Output {
        let (a, b) = (
            s.splat_f32s(black_box(0.999)),
            s.splat_f32s(black_box(1e-3)),
        );
        let mut x = [s.splat_f32s(black_box(0.5)); CHAINS];
        for _ in 0..LINKS {
            for x in &mut x {
                *x = s.mul_add_e_f32s(*x, a, b);
            }
        }
        let [first, rest @ ..] = x;
        let mut sum = first;
        for x in rest {
            sum = s.add_f32s(sum, x);
        }
        (LINKS * CHAINS * S::F32_LANES, s.reduce_sum_f32s(sum))
    }
}

/// The unit that solves use: the machine's, or AVX2 where CANDLE_DIFFEQ_SIMD says so.
fn unit() -> Arch {
    #[cfg(target_arch = "x86_64")]
    if std::env::var("CANDLE_DIFFEQ_SIMD").is_ok_and(|unit| unit == "avx2") {
        return pulp::x86::V3::try_new().map_or_else(Arch::new, Arch::V3);
    }
    Arch::new()
}

/// Multiply-adds of f32 that all threads together do in a second, now.
pub(crate) fn rate() -> f64 {
    let unit = unit();
    let clock = Instant::now();
    let done = rayon::broadcast(|_| {
        let (count, sum) = unit.dispatch(Chains);
        black_box(sum);
        count
    });
    done.into_iter().sum::<usize>() as f64 / clock.elapsed().as_secs_f64()
}
