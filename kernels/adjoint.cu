// λ ← λ + h/S Σ w_i + ȳ_n in place, with a look for NaN and max|λ| for the next step's S in the same
// pass.  Where `lost` is given, it is what rounding has taken from λ, in place too.  Nothing happens once the sweep has stopped, nor in the step in which a pull-back overflowed.
#include "scaler.cuh"
#include "sum.cuh"

// The first term is λ; the w_i follow, then ȳ_n where there is one.
template <class A>
__device__ void adjoint(const Terms &terms, Scaler *scaler, A *adj, A *lost, const void *incoming, int incoming_type,
                        unsigned look, const Clock *clock, int can_overflow, uint64_t n) {
    if (scaler->stopped || scaler->overflow != NOTHING) return;
    const uint64_t i = first_element();
    const int count = elements_from(i, n);
    bool bad = false;
    unsigned long long size = 0;
    if (count > 0) {
        constexpr int own = sizeof(A) == 8 ? F64 : F32;
        A sums[FOUR], rest[FOUR] = {};
        if (lost == nullptr) {
            sum<A>(terms, scaler->inverse, i, count, sums);
        } else {
            load<A>(lost, own, i, count, rest);
            add<A>(terms, 1, scaler->inverse, i, count, rest);
        }
        if (incoming != nullptr) {
            A given[FOUR];
            load<A>(incoming, incoming_type, i, count, given);
#pragma unroll
            for (int e = 0; e < FOUR; ++e) {
                if (lost == nullptr) sums[e] += given[e];
                else rest[e] += given[e];
            }
        }
        if (lost != nullptr) {
            compensate<A>(terms, i, count, sums, rest);
            store<A>(Sink{lost, own, own}, i, count, rest);
        }
        store<A>(Sink{adj, own, own}, i, count, sums);
        // Those that are not there are zero.
#pragma unroll
        for (int e = 0; e < FOUR; ++e) {
            bad |= !is_finite(sums[e]);
            const unsigned long long bits = size_bits(static_cast<double>(sums[e]));
            size = bits > size ? bits : size;
        }
    }
    report(Look{&scaler->first, clock == nullptr ? nullptr : &clock->look, look}, bad);
    size = block_max(size);
    if (threadIdx.x == 0) {
        atomicMax(&scaler->all, size);
        if (can_overflow) atomicMax(&scaler->low, size);
    }
}

extern "C" __global__ void adjoint_f32(const __grid_constant__ Terms terms, Scaler *scaler, float *adj, float *lost,
                                       const void *incoming, int incoming_type, unsigned look, const Clock *clock,
                                       int can_overflow, uint64_t n) {
    adjoint<float>(terms, scaler, adj, lost, incoming, incoming_type, look, clock, can_overflow, n);
}
extern "C" __global__ void adjoint_f64(const __grid_constant__ Terms terms, Scaler *scaler, double *adj, double *lost,
                                       const void *incoming, int incoming_type, unsigned look, const Clock *clock,
                                       int can_overflow, uint64_t n) {
    adjoint<double>(terms, scaler, adj, lost, incoming, incoming_type, look, clock, can_overflow, n);
}
