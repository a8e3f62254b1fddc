// Σ c_j x_j over tensors of one size, each of its own dtype.
#pragma once

#include "clock.cuh"
#include "common.cuh"

constexpr int MOST_TERMS = 64;

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

// Adds the terms from `first` on to the sums of `count` elements from i on, in A and in the order of the terms.
template <class A>
__device__ inline void add(const Terms &terms, int first, double inverse, uint64_t i, int count, A (&sums)[FOUR]) {
    for (int j = first; j < terms.count; ++j) {
        A x[FOUR];
        load<A>(terms.x[j], terms.type[j], i, count, x);
        // In the order in which the host multiplies, so that a replay gives the same bits.
        double exact = terms.c[j];
        if (terms.clock != nullptr && j >= terms.stepped_from) exact *= terms.clock->h;
        if (j >= terms.scaled_from) exact *= inverse;
#pragma unroll
        for (int e = 0; e < FOUR; ++e) sums[e] = add_product(exact, x[e], sums[e]);
    }
}

// The sums of `count` elements from i on.
template <class A>
__device__ inline void sum(const Terms &terms, double inverse, uint64_t i, int count, A (&sums)[FOUR]) {
#pragma unroll
    for (int e = 0; e < FOUR; ++e) sums[e] = 0;
    add<A>(terms, 0, inverse, i, count, sums);
}

// Rounded, and never contracted with what follows.
__device__ inline float minus(float a, float b) { return __fsub_rn(a, b); }
__device__ inline double minus(double a, double b) { return __dsub_rn(a, b); }

// sum ← fl(sum + lost), and lost ← what rounding has taken from it: exact, in any order of magnitude (Knuth).
template <class A> __device__ inline void two_sum(A &sum, A &lost) {
    const A a = sum, b = lost;
    sum = plus(a, b);
    const A of_b = minus(sum, a);
    lost = plus(minus(a, minus(sum, of_b)), minus(b, of_b));
}

// The first term, of type A with a factor of one, is itself a sum, and `lost` what rounding has taken from it.  The
// other terms are to be in `lost` already; afterwards `sums` and `lost` are the whole and what it has lost.
template <class A>
__device__ inline void compensate(const Terms &terms, uint64_t i, int count, A (&sums)[FOUR], A (&lost)[FOUR]) {
    load<A>(terms.x[0], terms.type[0], i, count, sums);
#pragma unroll
    for (int e = 0; e < FOUR; ++e) two_sum(sums[e], lost[e]);
}
