// Σ x_i y_i in f64, in an order that depends on the size alone: partial sums, then their sum.
#include "common.cuh"

extern "C" __global__ void dot_parts(const void *x, int x_type, const void *y, int y_type, double *parts, uint64_t n) {
    double total = 0;
    const uint64_t stride = static_cast<uint64_t>(gridDim.x) * blockDim.x * FOUR;
    for (uint64_t i = first_element(); i < n; i += stride) {
        const int count = elements_from(i, n);
        double a[FOUR], b[FOUR];
        load<double>(x, x_type, i, count, a);
        load<double>(y, y_type, i, count, b);
#pragma unroll
        for (int e = 0; e < FOUR; ++e) total = fused(a[e], b[e], total);
    }
    total = block_sum(total);
    if (threadIdx.x == 0) parts[blockIdx.x] = total;
}

extern "C" __global__ void dot_total(const double *parts, int count, const __grid_constant__ Sink out) {
    double total = 0;
    for (int i = threadIdx.x; i < count; i += THREADS) total += parts[i];
    total = block_sum(total);
    const double x[FOUR] = {total, 0, 0, 0};
    if (threadIdx.x == 0) store<double>(out, 0, 1, x);
}
