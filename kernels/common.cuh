// What the kernels share: dtypes chosen at run time, rounding, reductions over a block.
//
// Arithmetic is in A, float or double; operands and results may have any of the four dtypes.  A
// thread handles FOUR elements, so that a block reads and writes whole lines of memory.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

// As `Type` in src/ops/cuda.
enum Type : int { F16, BF16, F32, F64 };

constexpr int THREADS = 256;
constexpr int FOUR = 4;

struct alignas(8) Halves {
    __half x[FOUR];
};
struct alignas(8) Bfloats {
    __nv_bfloat16 x[FOUR];
};

template <class A> __device__ inline A wide(__half x) { return static_cast<A>(__half2float(x)); }
template <class A> __device__ inline A wide(__nv_bfloat16 x) { return static_cast<A>(__bfloat162float(x)); }
template <class A> __device__ inline A wide(float x) { return static_cast<A>(x); }
template <class A> __device__ inline A wide(double x) { return static_cast<A>(x); }

__device__ inline float fused(float a, float b, float c) { return fmaf(a, b, c); }
__device__ inline double fused(double a, double b, double c) { return fma(a, b, c); }

// Rounded, and never contracted with what follows.
__device__ inline float plus(float a, float b) { return __fadd_rn(a, b); }
__device__ inline double plus(double a, double b) { return __dadd_rn(a, b); }

// sum + c x, also where c is no normal number of the type of the sum.
__device__ inline float add_product(double c, float x, float sum) {
    const double size = fabs(c);
    if (size >= 1.1754943508222875e-38 && size <= 3.4028234663852886e38) return fused(static_cast<float>(c), x, sum);
    return static_cast<float>(fused(c, static_cast<double>(x), static_cast<double>(sum)));
}
__device__ inline double add_product(double c, double x, double sum) { return fused(c, x, sum); }

// Written on bits: the compiler may not assume them away, and the sign does not matter.
__device__ inline bool is_finite(float x) { return (__float_as_uint(x) & 0x7f800000u) != 0x7f800000u; }
__device__ inline bool is_finite(double x) {
    return (static_cast<uint64_t>(__double_as_longlong(x)) & 0x7ff0000000000000ull) != 0x7ff0000000000000ull;
}

// |x| as an integer that orders like |x|, infinity above all numbers and NaN above it.
__device__ inline unsigned long long size_bits(double x) {
    return static_cast<unsigned long long>(__double_as_longlong(x)) & 0x7fffffffffffffffull;
}

// x rounded to `type`, in f32; through f32 in any case.
__device__ inline float rounded(float x, int type) {
    switch (type) {
    case F16: return __half2float(__float2half_rn(x));
    case BF16: return __bfloat162float(__float2bfloat16_rn(x));
    default: return x;
    }
}
__device__ inline double rounded(double x, int type) {
    return type == F64 ? x : static_cast<double>(rounded(static_cast<float>(x), type));
}

template <class T> __device__ inline bool aligned(const void *p, int count) {
    return count == FOUR && (reinterpret_cast<uintptr_t>(p) & (sizeof(T) * FOUR > 16 ? 15 : sizeof(T) * FOUR - 1)) == 0;
}

// `count` ≤ FOUR elements from i on; the rest of x is zero.
template <class A> __device__ inline void load(const void *p, int type, uint64_t i, int count, A (&x)[FOUR]) {
#pragma unroll
    for (int e = 0; e < FOUR; ++e) x[e] = 0;
    switch (type) {
    case F16: {
        auto from = static_cast<const __half *>(p) + i;
        if (aligned<__half>(from, count)) {
            Halves v = *reinterpret_cast<const Halves *>(from);
#pragma unroll
            for (int e = 0; e < FOUR; ++e) x[e] = wide<A>(v.x[e]);
        } else {
#pragma unroll
            for (int e = 0; e < FOUR; ++e)
                if (e < count) x[e] = wide<A>(from[e]);
        }
        break;
    }
    case BF16: {
        auto from = static_cast<const __nv_bfloat16 *>(p) + i;
        if (aligned<__nv_bfloat16>(from, count)) {
            Bfloats v = *reinterpret_cast<const Bfloats *>(from);
#pragma unroll
            for (int e = 0; e < FOUR; ++e) x[e] = wide<A>(v.x[e]);
        } else {
#pragma unroll
            for (int e = 0; e < FOUR; ++e)
                if (e < count) x[e] = wide<A>(from[e]);
        }
        break;
    }
    case F32: {
        auto from = static_cast<const float *>(p) + i;
        if (aligned<float>(from, count)) {
            float4 v = *reinterpret_cast<const float4 *>(from);
            x[0] = v.x, x[1] = v.y, x[2] = v.z, x[3] = v.w;
        } else {
#pragma unroll
            for (int e = 0; e < FOUR; ++e)
                if (e < count) x[e] = wide<A>(from[e]);
        }
        break;
    }
    default: {
        auto from = static_cast<const double *>(p) + i;
        if (aligned<double>(from, count)) {
            double2 v = reinterpret_cast<const double2 *>(from)[0], w = reinterpret_cast<const double2 *>(from)[1];
            x[0] = static_cast<A>(v.x), x[1] = static_cast<A>(v.y), x[2] = static_cast<A>(w.x), x[3] = static_cast<A>(w.y);
        } else {
#pragma unroll
            for (int e = 0; e < FOUR; ++e)
                if (e < count) x[e] = wide<A>(from[e]);
        }
        break;
    }
    }
}

// Where results go: rounded to `to`, held in `held`.
struct Sink {
    void *p;
    int to;
    int held;
};

template <class A> __device__ inline void store(const Sink &out, uint64_t i, int count, const A (&x)[FOUR]) {
    switch (out.held) {
    case F16: {
        auto to = static_cast<__half *>(out.p) + i;
        Halves v;
#pragma unroll
        for (int e = 0; e < FOUR; ++e) v.x[e] = __float2half_rn(static_cast<float>(x[e]));
        if (aligned<__half>(to, count)) {
            *reinterpret_cast<Halves *>(to) = v;
        } else {
#pragma unroll
            for (int e = 0; e < FOUR; ++e)
                if (e < count) to[e] = v.x[e];
        }
        break;
    }
    case BF16: {
        auto to = static_cast<__nv_bfloat16 *>(out.p) + i;
        Bfloats v;
#pragma unroll
        for (int e = 0; e < FOUR; ++e) v.x[e] = __float2bfloat16_rn(static_cast<float>(x[e]));
        if (aligned<__nv_bfloat16>(to, count)) {
            *reinterpret_cast<Bfloats *>(to) = v;
        } else {
#pragma unroll
            for (int e = 0; e < FOUR; ++e)
                if (e < count) to[e] = v.x[e];
        }
        break;
    }
    case F32: {
        auto to = static_cast<float *>(out.p) + i;
        float v[FOUR];
#pragma unroll
        for (int e = 0; e < FOUR; ++e) v[e] = rounded(static_cast<float>(x[e]), out.to);
        if (aligned<float>(to, count)) {
            *reinterpret_cast<float4 *>(to) = make_float4(v[0], v[1], v[2], v[3]);
        } else {
#pragma unroll
            for (int e = 0; e < FOUR; ++e)
                if (e < count) to[e] = v[e];
        }
        break;
    }
    default: {
        auto to = static_cast<double *>(out.p) + i;
#pragma unroll
        for (int e = 0; e < FOUR; ++e)
            if (e < count) to[e] = rounded(static_cast<double>(x[e]), out.to);
        break;
    }
    }
}

// The first element of this thread, and how many of n it handles from there on.
__device__ inline uint64_t first_element() {
    return (static_cast<uint64_t>(blockIdx.x) * blockDim.x + threadIdx.x) * FOUR;
}
__device__ inline int elements_from(uint64_t i, uint64_t n) {
    return i >= n ? 0 : n - i < FOUR ? static_cast<int>(n - i) : FOUR;
}

// A look for NaN and infinity: the least index of a look that found one stays in `first`.
struct Look {
    unsigned *first;
    // In a step that is replayed, the index of its first look.
    const unsigned *from;
    unsigned index;
};

// To be called by one thread.
__device__ inline void found(const Look &look) {
    atomicMin(look.first, look.from == nullptr ? look.index : *look.from + look.index);
}

// To be called by all threads of a block.
__device__ inline void report(const Look &look, bool bad) {
    if (look.first == nullptr) return;
    if (__syncthreads_or(bad) && threadIdx.x == 0) found(look);
}

// The largest value in a block, in its first thread; to be called by all of THREADS threads.
__device__ inline unsigned long long block_max(unsigned long long x) {
    __shared__ unsigned long long room[THREADS];
    room[threadIdx.x] = x;
    __syncthreads();
    for (unsigned half = THREADS / 2; half > 0; half /= 2) {
        if (threadIdx.x < half && room[threadIdx.x + half] > room[threadIdx.x]) room[threadIdx.x] = room[threadIdx.x + half];
        __syncthreads();
    }
    return room[0];
}

// The sum over a block in a fixed order, in its first thread; to be called by all of THREADS threads.
__device__ inline double block_sum(double x) {
    __shared__ double room[THREADS];
    room[threadIdx.x] = x;
    __syncthreads();
    for (unsigned half = THREADS / 2; half > 0; half /= 2) {
        if (threadIdx.x < half) room[threadIdx.x] += room[threadIdx.x + half];
        __syncthreads();
    }
    return room[0];
}
