// θ̄ += c/S Σ dθ over all parameters in one launch, and the same for a single pair without a scaler.
#include "clock.cuh"
#include "common.cuh"
#include "scaler.cuh"

constexpr int MOST_PAIRS = 64;

// As `Pairs` in src/ops/cuda.
struct Pairs {
    void *acc[MOST_PAIRS];
    const void *x[MOST_PAIRS];
    uint64_t n[MOST_PAIRS];
    // The first block that works on a pair.
    unsigned block[MOST_PAIRS];
    int type[MOST_PAIRS];
    int count;
};

// Where a clock is given, c is multiplied by its h.  Where `scaler` is given, c is divided by S, and nothing
// happens once the sweep has stopped nor in a step that overflowed.
template <class A> __device__ void accumulate(const Pairs &pairs, double c, const Scaler *scaler, const Clock *clock) {
    if (clock != nullptr) c *= clock->h;
    if (scaler != nullptr) {
        if (scaler->stopped || scaler->overflow != NOTHING) return;
        c *= scaler->inverse;
    }
    int p = 0;
    while (p + 1 < pairs.count && pairs.block[p + 1] <= blockIdx.x) ++p;
    const uint64_t i = (static_cast<uint64_t>(blockIdx.x - pairs.block[p]) * blockDim.x + threadIdx.x) * FOUR;
    const int count = elements_from(i, pairs.n[p]);
    if (count == 0) return;
    A x[FOUR], sums[FOUR];
    constexpr int own = sizeof(A) == 8 ? F64 : F32;
    load<A>(pairs.x[p], pairs.type[p], i, count, x);
    load<A>(pairs.acc[p], own, i, count, sums);
#pragma unroll
    for (int e = 0; e < FOUR; ++e) sums[e] = add_product(c, x[e], sums[e]);
    store<A>(Sink{pairs.acc[p], own, own}, i, count, sums);
}

extern "C" __global__ void accumulate_f32(const __grid_constant__ Pairs pairs, double c, const Scaler *scaler,
                                          const Clock *clock) {
    accumulate<float>(pairs, c, scaler, clock);
}
extern "C" __global__ void accumulate_f64(const __grid_constant__ Pairs pairs, double c, const Scaler *scaler,
                                          const Clock *clock) {
    accumulate<double>(pairs, c, scaler, clock);
}
