// Σ c_j x_j over tensors of one size, each of its own dtype.
#pragma once

#include "common.cuh"

constexpr int MOST_TERMS = 16;

// As `Terms` in src/ops/cuda.
struct Terms {
    const void *x[MOST_TERMS];
    double c[MOST_TERMS];
    int type[MOST_TERMS];
    int count;
    // Terms from this one on are multiplied by 1/S as well.
    int scaled_from;
};

// The sums of `count` elements from i on, formed in A in the order of the terms.
template <class A>
__device__ inline void sum(const Terms &terms, double inverse, uint64_t i, int count, A (&sums)[FOUR]) {
#pragma unroll
    for (int e = 0; e < FOUR; ++e) sums[e] = 0;
    for (int j = 0; j < terms.count; ++j) {
        A x[FOUR];
        load<A>(terms.x[j], terms.type[j], i, count, x);
        const A c = static_cast<A>(j < terms.scaled_from ? terms.c[j] : terms.c[j] * inverse);
#pragma unroll
        for (int e = 0; e < FOUR; ++e) sums[e] = fused(c, x[e], sums[e]);
    }
}
