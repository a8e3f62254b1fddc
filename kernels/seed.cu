// Q(S (b_i λ + h Σ_{j>i} a_ji w_j)): what a pull-back is fed, with S and the w_j's 1/S read from
// device memory.
#include "scaler.cuh"
#include "sum.cuh"

template <class A> __device__ void seed(const Terms &terms, const Scaler *scaler, const Sink &out, uint64_t n) {
    const uint64_t i = first_element();
    const int count = elements_from(i, n);
    if (count == 0) return;
    A sums[FOUR];
    sum<A>(terms, scaler->inverse, i, count, sums);
    const A scale = static_cast<A>(scaler->scale);
#pragma unroll
    for (int e = 0; e < FOUR; ++e) sums[e] *= scale;
    store<A>(out, i, count, sums);
}

extern "C" __global__ void seed_f32(const __grid_constant__ Terms terms, const Scaler *scaler, const __grid_constant__ Sink out, uint64_t n) {
    seed<float>(terms, scaler, out, n);
}
extern "C" __global__ void seed_f64(const __grid_constant__ Terms terms, const Scaler *scaler, const __grid_constant__ Sink out, uint64_t n) {
    seed<double>(terms, scaler, out, n);
}
