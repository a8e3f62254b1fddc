// What a step that is captured once and replayed reads from device memory, because it is another in every
// replay.  A null pointer stands for a step that is launched with its own numbers.
#pragma once

// As `Clock` in src/ops/cuda.
struct Clock {
    double h; // length of the step
    unsigned look; // index of its first look for NaN
    unsigned step;
};
