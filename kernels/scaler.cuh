// The adjoint scaler in device memory: S = 2^exponent.  The rule is that of src/scaler.rs.
#pragma once

#include <math.h>
#include <stdint.h>

// As `DeviceScaler` in src/ops/cuda.
struct Scaler {
    double scale, inverse; // S and 1/S
    double smallest, largest; // S that pull-backs have used; largest is 0 before the first
    unsigned long long low, all; // max|λ| over the leaves that can overflow, and over all, as bits
    int dynamic;
    int aimed; // whether the exponent was ever chosen
    int exponent, level, aim, ceiling;
    unsigned clean;
    unsigned growth_interval, recovery_interval;
    unsigned overflow; // the first pull-back of this step that overflowed; see `settle`
    unsigned stopped; // nothing is updated any more
    unsigned step; // where it stopped
    unsigned first; // the first look at λ that found NaN or infinity
    unsigned watched; // the first of other looks, gathered at the end
    unsigned set; // S is chosen for the first step: it goes on after an overflow
};

constexpr unsigned NOTHING = 0xffffffffu;
constexpr int SCALE_LIMIT = 100;

__host__ __device__ inline void set_exponent(Scaler &s, int exponent) {
    s.exponent = exponent;
    s.scale = ldexp(1.0, exponent);
    s.inverse = ldexp(1.0, -exponent);
}

// ⌈log2 x⌉ of a finite x > 0, exactly.
__host__ __device__ inline int binade(double x) {
    int exponent;
    return frexp(x, &exponent) == 0.5 ? exponent - 1 : exponent;
}

// Aims S at a step whose adjoint has this max|λ|.
__host__ __device__ inline void aim_at(Scaler &s, double magnitude) {
    if (!s.dynamic || magnitude == 0 || !(magnitude <= 1.7976931348623157e308)) return;
    s.level = binade(magnitude);
    if (s.aim < s.ceiling && s.clean >= s.recovery_interval) {
        s.aim += 1;
        s.clean = 0;
    }
    int wanted = s.aim - s.level;
    wanted = wanted < -SCALE_LIMIT ? -SCALE_LIMIT : wanted > SCALE_LIMIT ? SCALE_LIMIT : wanted;
    const bool falls = s.exponent > wanted, lags = s.exponent < wanted && s.clean >= s.growth_interval;
    if (!s.aimed || falls || lags) set_exponent(s, wanted);
    s.aimed = 1;
}

// Notes that S is used.
__host__ __device__ inline void use(Scaler &s) {
    if (s.largest == 0 || s.scale < s.smallest) s.smallest = s.scale;
    if (s.scale > s.largest) s.largest = s.scale;
}
