// The decisions of the adjoint scaler, taken on the device: one thread.
#include "clock.cuh"
#include "scaler.cuh"

// Before a step: aims S at max|λ|, of the leaves that can overflow, or of all where these are zero.
extern "C" __global__ void scaler_aim(Scaler *s) {
    if (s->stopped) return;
    if (s->set) {
        s->set = 0;
        s->low = s->all = 0;
        return;
    }
    const unsigned long long bits = s->low != 0 ? s->low : s->all;
    aim_at(*s, __longlong_as_double(static_cast<long long>(bits)));
    use(*s);
    s->low = s->all = 0;
    s->overflow = NOTHING;
}

// After the pull-backs and updates of a step: counts it as clean, or stops the sweep there.
extern "C" __global__ void scaler_settle(Scaler *s, unsigned step, const Clock *clock) {
    if (s->stopped) return;
    if (s->overflow == NOTHING) {
        s->clean += 1;
    } else {
        s->stopped = 1;
        s->step = clock == nullptr ? step : clock->step;
    }
}

// At the end: what other looks found, so that the host has one thing to read.
extern "C" __global__ void scaler_gather(Scaler *s, const unsigned *first) { s->watched = *first; }
