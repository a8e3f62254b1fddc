// y_{n+1} = y + h Σ b_i k_i, and what is stored of it, with a look for NaN, in one pass.  Where `lost` is given, it is
// what rounding has taken from y, and what it has taken from y_{n+1} goes to `left`.
#include "sum.cuh"

template <class A>
__device__ void update(const Terms &terms, const Sink &y, const Sink &stored, const A *lost, A *left, const Look &look,
                       uint64_t n) {
    const uint64_t i = first_element();
    const int count = elements_from(i, n);
    A sums[FOUR];
    bool bad = false;
    if (count > 0) {
        if (lost == nullptr) {
            sum<A>(terms, 1.0, i, count, sums);
        } else {
            constexpr int own = sizeof(A) == 8 ? F64 : F32;
            A rest[FOUR];
            load<A>(lost, own, i, count, rest);
            add<A>(terms, 1, 1.0, i, count, rest);
            compensate<A>(terms, i, count, sums, rest);
            store<A>(Sink{left, own, own}, i, count, rest);
        }
        store<A>(y, i, count, sums);
        if (stored.p != nullptr) store<A>(stored, i, count, sums);
        // Those that are not there are zero.
#pragma unroll
        for (int e = 0; e < FOUR; ++e) bad |= !is_finite(sums[e]);
    }
    report(look, bad);
}

extern "C" __global__ void update_f32(const __grid_constant__ Terms terms, const __grid_constant__ Sink y,
                                      const __grid_constant__ Sink stored, const float *lost, float *left,
                                      const __grid_constant__ Look look, uint64_t n) {
    update<float>(terms, y, stored, lost, left, look, n);
}
extern "C" __global__ void update_f64(const __grid_constant__ Terms terms, const __grid_constant__ Sink y,
                                      const __grid_constant__ Sink stored, const double *lost, double *left,
                                      const __grid_constant__ Look look, uint64_t n) {
    update<double>(terms, y, stored, lost, left, look, n);
}
