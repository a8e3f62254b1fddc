// A sparse matrix times a dense one, and the entries of a product that a sparse matrix has.  Products and sums are rounded
// one by one, in the order of the entries: the bits are those of the host.
#include "common.cuh"

// Where the entries of one line after the other are; as `DeviceSide` in src/ops/cuda/csr.rs.
struct Side {
    const unsigned *offsets; // of the lines, and their end
    const unsigned *across; // the line of the other direction
    const unsigned *names; // the value of an entry, or nothing where they are in order
    uint64_t lines;
};

// Rounded, and never contracted with the sum.
__device__ inline float times(float a, float b) { return __fmul_rn(a, b); }
__device__ inline double times(double a, double b) { return __dmul_rn(a, b); }

__device__ inline uint64_t first() { return static_cast<uint64_t>(blockIdx.x) * blockDim.x + threadIdx.x; }
__device__ inline uint64_t stride() { return static_cast<uint64_t>(gridDim.x) * blockDim.x; }

// out_i = Σ v_e x_j over the entries e of line i, j across.  Neighbouring threads read neighbouring columns.
template <class A> __device__ void product(const Side &side, uint64_t width, const A *values, const A *x, A *out) {
    for (uint64_t at = first(); at < side.lines * width; at += stride()) {
        const uint64_t line = at / width, column = at % width;
        A sum = 0;
        for (unsigned e = side.offsets[line]; e < side.offsets[line + 1]; ++e) {
            const A value = values[side.names == nullptr ? e : side.names[e]];
            sum = plus(sum, times(value, x[side.across[e] * width + column]));
        }
        out[at] = sum;
    }
}

constexpr int SUMS = 16;

// out_e = ⟨g_i, x_j⟩ for every entry e at (i, j), in sixteen sums that are added up in order.
template <class A>
__device__ void sampled(const Side &side, const unsigned *lines, uint64_t entries, uint64_t width, const A *g, const A *x, A *out) {
    for (uint64_t e = first(); e < entries; e += stride()) {
        const A *a = g + lines[e] * width, *b = x + side.across[e] * width;
        A sums[SUMS] = {};
        for (uint64_t i = 0; i < width; i += SUMS) {
#pragma unroll
            for (int s = 0; s < SUMS; ++s)
                if (i + s < width) sums[s] = plus(sums[s], times(a[i + s], b[i + s]));
        }
        A total = 0;
#pragma unroll
        for (int s = 0; s < SUMS; ++s) total = plus(total, sums[s]);
        out[e] = total;
    }
}

extern "C" __global__ void csr_product_f32(const __grid_constant__ Side side, uint64_t width, const float *values, const float *x, float *out) {
    product<float>(side, width, values, x, out);
}
extern "C" __global__ void csr_product_f64(const __grid_constant__ Side side, uint64_t width, const double *values, const double *x, double *out) {
    product<double>(side, width, values, x, out);
}
extern "C" __global__ void csr_sampled_f32(const __grid_constant__ Side side, const unsigned *lines, uint64_t entries, uint64_t width, const float *g, const float *x, float *out) {
    sampled<float>(side, lines, entries, width, g, x, out);
}
extern "C" __global__ void csr_sampled_f64(const __grid_constant__ Side side, const unsigned *lines, uint64_t entries, uint64_t width, const double *g, const double *x, double *out) {
    sampled<double>(side, lines, entries, width, g, x, out);
}
