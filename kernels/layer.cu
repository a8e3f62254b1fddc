// What a layer does beside its matrix products: bias and activation forward, slope and the sum of
// bias gradients over the batch backward, which is formed in A whatever the dtype of the cotangents.
#include "activation.cuh"
#include "common.cuh"

constexpr int WARP = 32;
constexpr int COLUMNS = WARP * FOUR;
constexpr int LANES = THREADS / WARP;
// Rows that a thread reads before it writes one.
constexpr int AHEAD = 4;

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
    A x[FOUR], b[FOUR], d[FOUR];
    load<A>(z, z_type, i, count, x);
    // Fewer than 2³¹ elements: a division of half the width is a quarter of the work.
    const unsigned column = static_cast<unsigned>(i) % static_cast<unsigned>(columns);
    if (column + FOUR <= columns) {
        load<A>(bias, bias_type, column, FOUR, b);
    } else {
#pragma unroll
        for (int e = 0; e < FOUR; ++e) b[e] = element<A>(bias, bias_type, (column + e) % static_cast<unsigned>(columns));
    }
#pragma unroll
    for (int e = 0; e < FOUR; ++e) x[e] = activate<A>(activation, x[e] + b[e], d[e]);
    store<A>(value, i, count, x);
    if (slope.p != nullptr) store<A>(slope, i, count, d);
}

// g' = g · slope (where there is one), and the sums of g' over a block's rows.  If the activation is not NONE, its values
// are given instead of the slopes.
template <class A>
__device__ void pull_rows(const void *g, int g_type, const void *slope_or_value, int type, int activation, const Sink &out,
                          A *parts, uint64_t rows, uint64_t columns) {
    __shared__ A room[LANES][COLUMNS];
    const unsigned lane = threadIdx.x / WARP, within = threadIdx.x % WARP * FOUR;
    const uint64_t column = static_cast<uint64_t>(blockIdx.x) * COLUMNS + within;
    const int count = elements_from(column, columns);
    const uint64_t part = (rows + gridDim.y - 1) / gridDim.y, first = blockIdx.y * part;
    const uint64_t end = first + part < rows ? first + part : rows;
    A sums[FOUR] = {0, 0, 0, 0};
    for (uint64_t row = first + lane; row < end; row += LANES * AHEAD) {
        A x[AHEAD][FOUR], d[AHEAD][FOUR];
#pragma unroll
        for (int a = 0; a < AHEAD; ++a) {
            const uint64_t at = row + a * LANES, i = at * columns + column;
            const int n = at < end ? count : 0;
            load<A>(g, g_type, i, n, x[a]);
            if (slope_or_value != nullptr) load<A>(slope_or_value, type, i, n, d[a]);
        }
#pragma unroll
        for (int a = 0; a < AHEAD; ++a) {
            const uint64_t at = row + a * LANES;
            if (slope_or_value != nullptr) {
#pragma unroll
                for (int e = 0; e < FOUR; ++e) {
                    const A s = activation == NONE ? d[a][e] : slope_of_value<A>(activation, d[a][e]);
                    x[a][e] = rounded(x[a][e] * s, out.to);
                }
                if (at < end && count > 0) store<A>(out, at * columns + column, count, x[a]);
            }
#pragma unroll
            for (int e = 0; e < FOUR; ++e) sums[e] += x[a][e];
        }
    }
#pragma unroll
    for (int e = 0; e < FOUR; ++e) room[lane][within + e] = sums[e];
    __syncthreads();
    const uint64_t own = static_cast<uint64_t>(blockIdx.x) * COLUMNS + threadIdx.x;
    if (threadIdx.x < COLUMNS && own < columns) {
        A sum = 0;
        for (int l = 0; l < LANES; ++l) sum += room[l][threadIdx.x];
        parts[blockIdx.y * columns + own] = sum;
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
                                                     int activation, const __grid_constant__ Sink out, A *parts,                \
                                                     uint64_t rows, uint64_t columns) {                                         \
        pull_rows<A>(g, g_type, slope, slope_type, activation, out, parts, rows, columns);                                     \
    }                                                                                                                           \
    extern "C" __global__ void layer_total_##NAME(const A *parts, int count, const __grid_constant__ Sink out,                  \
                                                  uint64_t columns) {                                                           \
        total_rows<A>(parts, count, out, columns);                                                                             \
    }

LAYER(float, f32)
LAYER(double, f64)
