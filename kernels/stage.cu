// Q(scale · Σ c_j x_j): the state of a stage, Y_i = Q(y + h Σ a_ij k_j), in one launch.
#include "sum.cuh"

template <class A> __device__ void stage(const Terms &terms, double scale, const Sink &out, uint64_t n) {
    const uint64_t i = first_element();
    const int count = elements_from(i, n);
    if (count == 0) return;
    A sums[FOUR];
    sum<A>(terms, 1.0, i, count, sums);
#pragma unroll
    for (int e = 0; e < FOUR; ++e) sums[e] *= static_cast<A>(scale);
    store<A>(out, i, count, sums);
}

extern "C" __global__ void stage_f32(const __grid_constant__ Terms terms, double scale, const __grid_constant__ Sink out, uint64_t n) {
    stage<float>(terms, scale, out, n);
}
extern "C" __global__ void stage_f64(const __grid_constant__ Terms terms, double scale, const __grid_constant__ Sink out, uint64_t n) {
    stage<double>(terms, scale, out, n);
}
