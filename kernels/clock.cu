// Sets the clock of the steps that are replayed: one thread, before each of them.
#include "clock.cuh"

constexpr int MOST_STAGES = 16;

// As `Tick` in src/ops/cuda.
struct Tick {
    double t[MOST_STAGES]; // times of the stages
    Clock clock;
    int stages;
    int wide; // whether fields read time in f64
};

extern "C" __global__ void clock_tick(const __grid_constant__ Tick tick, Clock *clock, void *times) {
    *clock = tick.clock;
    for (int i = 0; i < tick.stages; ++i) {
        if (tick.wide) {
            static_cast<double *>(times)[i] = tick.t[i];
        } else {
            static_cast<float *>(times)[i] = static_cast<float>(tick.t[i]);
        }
    }
}
