// Looks for NaN and infinity, and for the largest number, in up to MOST_TENSORS tensors at once.
#include "common.cuh"

constexpr int MOST_TENSORS = 64;

// As `Tensors` in src/ops/cuda.
struct Tensors {
    const void *x[MOST_TENSORS];
    uint64_t n[MOST_TENSORS];
    // The first block that works on a tensor.
    unsigned block[MOST_TENSORS];
    int type[MOST_TENSORS];
    int count;
};

// The tensor of this block.
__device__ inline int tensor_of_block(const Tensors &tensors) {
    int t = 0;
    while (t + 1 < tensors.count && tensors.block[t + 1] <= blockIdx.x) ++t;
    return t;
}

__device__ inline unsigned long long largest(const Tensors &tensors) {
    const int t = tensor_of_block(tensors);
    const uint64_t i = (static_cast<uint64_t>(blockIdx.x - tensors.block[t]) * blockDim.x + threadIdx.x) * FOUR;
    const int count = elements_from(i, tensors.n[t]);
    unsigned long long size = 0;
    if (count > 0) {
        double x[FOUR];
        load<double>(tensors.x[t], tensors.type[t], i, count, x);
        // Those that are not there are zero.
#pragma unroll
        for (int e = 0; e < FOUR; ++e) size = size_bits(x[e]) > size ? size_bits(x[e]) : size;
    }
    return block_max(size);
}

constexpr unsigned long long INFINITE = 0x7ff0000000000000ull;

extern "C" __global__ void look(const __grid_constant__ Tensors tensors, const __grid_constant__ Look look) {
    const unsigned long long size = largest(tensors);
    if (threadIdx.x == 0 && size >= INFINITE) found(look);
}

// max |x| as the bits of an f64.
extern "C" __global__ void magnitude(const __grid_constant__ Tensors tensors, unsigned long long *max) {
    const unsigned long long size = largest(tensors);
    if (threadIdx.x == 0) atomicMax(max, size);
}
