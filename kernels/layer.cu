// What a layer does beside its matrix products: bias and activation forward, slope and the sum of
// bias gradients over the batch backward, which is formed in A whatever the dtype of the cotangents.
#include "activation.cuh"
#include "common.cuh"

constexpr int COLUMNS = 32;
constexpr int LANES = THREADS / COLUMNS;

template <class A> __device__ inline A element(const void *p, int type, uint64_t i) {
    A x[FOUR];
    load<A>(p, type, i, 1, x);
    return x[0];
}
template <class A> __device__ inline void put(const Sink &out, uint64_t i, A x) {
    const A four[FOUR] = {x, 0, 0, 0};
    store<A>(out, i, 1, four);
}

// value = σ(z + b), rows of `columns`; the slope beside it where it is wanted.
template <class A>
__device__ void activate_rows(const void *z, int z_type, const void *bias, int bias_type, int activation, const Sink &value,
                              const Sink &slope, uint64_t n, uint64_t columns) {
    const uint64_t i = first_element();
    const int count = elements_from(i, n);
    if (count == 0) return;
    A x[FOUR], d[FOUR];
    load<A>(z, z_type, i, count, x);
#pragma unroll
    for (int e = 0; e < FOUR; ++e) {
        const A b = e < count ? element<A>(bias, bias_type, (i + e) % columns) : A(0);
        x[e] = activate<A>(activation, x[e] + b, d[e]);
    }
    store<A>(value, i, count, x);
    if (slope.p != nullptr) store<A>(slope, i, count, d);
}

// g' = g · slope (where there is one), and the sums of g' over a block's rows.
template <class A>
__device__ void pull_rows(const void *g, int g_type, const void *slope, int slope_type, const Sink &out, A *parts,
                          uint64_t rows, uint64_t columns) {
    __shared__ A room[LANES][COLUMNS];
    const uint64_t column = static_cast<uint64_t>(blockIdx.x) * COLUMNS + threadIdx.x % COLUMNS;
    const unsigned lane = threadIdx.x / COLUMNS;
    const uint64_t part = (rows + gridDim.y - 1) / gridDim.y, first = blockIdx.y * part;
    const uint64_t end = first + part < rows ? first + part : rows;
    A sum = 0;
    if (column < columns) {
        for (uint64_t row = first + lane; row < end; row += LANES) {
            const uint64_t i = row * columns + column;
            A x = element<A>(g, g_type, i);
            if (slope != nullptr) {
                x = rounded(x * element<A>(slope, slope_type, i), out.to);
                put<A>(out, i, x);
            }
            sum += x;
        }
    }
    room[lane][threadIdx.x % COLUMNS] = sum;
    __syncthreads();
    if (lane == 0 && column < columns) {
        for (int l = 1; l < LANES; ++l) sum += room[l][threadIdx.x];
        parts[blockIdx.y * columns + column] = sum;
    }
}

template <class A> __device__ void total_rows(const A *parts, int count, const Sink &out, uint64_t columns) {
    const uint64_t column = static_cast<uint64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (column >= columns) return;
    A sum = 0;
    for (int part = 0; part < count; ++part) sum += parts[part * columns + column];
    put<A>(out, column, sum);
}

#define LAYER(A, NAME)                                                                                                          \
    extern "C" __global__ void layer_forward_##NAME(const void *z, int z_type, const void *bias, int bias_type, int activation, \
                                                    const __grid_constant__ Sink value, const __grid_constant__ Sink slope,     \
                                                    uint64_t n, uint64_t columns) {                                             \
        activate_rows<A>(z, z_type, bias, bias_type, activation, value, slope, n, columns);                                    \
    }                                                                                                                           \
    extern "C" __global__ void layer_backward_##NAME(const void *g, int g_type, const void *slope, int slope_type,              \
                                                     const __grid_constant__ Sink out, A *parts, uint64_t rows,                 \
                                                     uint64_t columns) {                                                        \
        pull_rows<A>(g, g_type, slope, slope_type, out, parts, rows, columns);                                                 \
    }                                                                                                                           \
    extern "C" __global__ void layer_total_##NAME(const A *parts, int count, const __grid_constant__ Sink out,                  \
                                                  uint64_t columns) {                                                           \
        total_rows<A>(parts, count, out, columns);                                                                             \
    }

LAYER(float, f32)
LAYER(double, f64)
