// What both passes of a solve with adaptive steps of every row read and write, in device memory.
#pragma once

#include "pace.cuh"

// An accepted step.  The steps of a row form a list, from its last step to its first.
struct Recorded {
    double t, h;
    unsigned previous; // the step of the row before
    unsigned jumps; // bit 0: the field jumps at its start; bit 1: at its end
};
constexpr unsigned JUMPS_AT_START = 1, JUMPS_AT_END = 2;

// What became of a row; as in src/ops/cuda/mlp/rows.rs.
struct RowReport {
    double t; // where it is
    double h, error; // of the last attempt, if it was rejected; h of one in which time stands still
    double bad_t; // where the backward pass found a number that is not finite
    unsigned accepted, rejected, evaluations, limited;
    double factor;
    unsigned bad_step;
    unsigned last; // its last step
    int reason;
    int returned; // states
    int worst; // the element whose error was largest, or −1
    int rejected_last; // whether its last attempt was rejected
};

// What the host reads, once.  Begins as `Report`.
struct RowsReport {
    unsigned long long failure; // the first
    unsigned retries;
    int smallest, largest; // exponents of S
    unsigned unused;
    unsigned long long queue; // rows that were taken
    unsigned long long recorded; // steps
    unsigned long long failed; // the first row that stopped
    unsigned long long steps, rejected, forced, limited, evaluations; // the most of any row
    unsigned long long row_evaluations, tile_evaluations, recomputed, pulls;
    unsigned long long factor, shortest, longest; // bits of an f64
    double first; // the first step of the first row
};

// What a solve needs beside the net and the method.
struct RowsSolve {
    const Control *control;
    uint64_t rows, capacity; // steps that can be recorded
    int compute, store; // dtypes
    const float *y0;
    const float *given; // cotangents, (outputs, rows, dim)
    float *out; // returned states, (outputs, rows, dim), or λ_0
    Recorded *steps; // or nothing
    void *kept; // y_n of every recorded step in store precision, or nothing
    RowReport *reports; // by row
    RowsReport *report;
    float *parts, *totals; // sums of gradients of each block
    int keeps_all; // whether all stages of a step keep their activations
    int parts_shared; // whether `parts` is in shared memory
    int flush; // steps after which parts are added to the totals
    unsigned most_attempts;
    Scaler scaler; // at the start
};

// Whether a is later than b in the direction of the solve.
__device__ inline bool later(const Control &control, double a, double b) { return (a - b) * control.direction > 0; }

// The sum over the warps.
__device__ inline double over_warps(const double (&parts)[WARPS][ROWS], int of) {
    double sum = 0;
    for (int w = 0; w < WARPS; ++w) sum += parts[w][of];
    return sum;
}

// Copies what steps are controlled by into shared memory.  To be called by all threads, which meet before they read it.
__device__ inline void load_control(const Control &from, Control &to) {
    const auto *words = reinterpret_cast<const uint64_t *>(&from);
    for (unsigned i = threadIdx.x; i < sizeof(Control) / sizeof(uint64_t); i += THREADS) reinterpret_cast<uint64_t *>(&to)[i] = words[i];
}
