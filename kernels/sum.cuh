// Σ c_j x_j over tensors of one size, each of its own dtype.
#pragma once

#include "clock.cuh"
#include "common.cuh"

constexpr int MOST_TERMS = 16;

// As `Terms` in src/ops/cuda.
struct Terms {
    const void *x[MOST_TERMS];
    double c[MOST_TERMS];
    int type[MOST_TERMS];
    // Where h is, if terms from `stepped_from` on are still to be multiplied by it.
    const Clock *clock;
    int count;
    int stepped_from;
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
        // In the order in which the host multiplies, so that a replay gives the same bits.
        double exact = terms.c[j];
        if (terms.clock != nullptr && j >= terms.stepped_from) exact *= terms.clock->h;
        if (j >= terms.scaled_from) exact *= inverse;
        const A c = static_cast<A>(exact);
#pragma unroll
        for (int e = 0; e < FOUR; ++e) sums[e] = fused(c, x[e], sums[e]);
    }
}
