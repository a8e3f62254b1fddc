// y_{n+1} = y + h Σ b_i k_i, and what is stored of it, with a look for NaN, in one pass.
#include "sum.cuh"

template <class A>
__device__ void update(const Terms &terms, const Sink &y, const Sink &stored, const Look &look, uint64_t n) {
    const uint64_t i = first_element();
    const int count = elements_from(i, n);
    A sums[FOUR];
    bool bad = false;
    if (count > 0) {
        sum<A>(terms, 1.0, i, count, sums);
        store<A>(y, i, count, sums);
        if (stored.p != nullptr) store<A>(stored, i, count, sums);
        // Those that are not there are zero.
#pragma unroll
        for (int e = 0; e < FOUR; ++e) bad |= !is_finite(sums[e]);
    }
    report(look, bad);
}

extern "C" __global__ void update_f32(const __grid_constant__ Terms terms, const __grid_constant__ Sink y,
                                      const __grid_constant__ Sink stored, const __grid_constant__ Look look, uint64_t n) {
    update<float>(terms, y, stored, look, n);
}
extern "C" __global__ void update_f64(const __grid_constant__ Terms terms, const __grid_constant__ Sink y,
                                      const __grid_constant__ Sink stored, const __grid_constant__ Look look, uint64_t n) {
    update<double>(terms, y, stored, look, n);
}
