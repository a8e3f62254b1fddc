// Activations and their slopes.
#pragma once

#include <math.h>

// As `Activation` in src/nn/activation.rs, and of a last layer none.
enum Activation : int { TANH, SIGMOID, SOFTPLUS, RELU, SILU, GELU, SIN, LOG_TWO_COSH, NONE };

__device__ inline float exponential(float x) { return expf(x); }
__device__ inline double exponential(double x) { return exp(x); }
__device__ inline float hyperbolic_tangent(float x) { return tanhf(x); }
__device__ inline double hyperbolic_tangent(double x) { return tanh(x); }
__device__ inline float logarithm_of_one_and(float x) { return log1pf(x); }
__device__ inline double logarithm_of_one_and(double x) { return log1p(x); }
__device__ inline float sine(float x) { return sinf(x); }
__device__ inline double sine(double x) { return sin(x); }
__device__ inline float cosine(float x) { return cosf(x); }
__device__ inline double cosine(double x) { return cos(x); }
__device__ inline float complementary_error(float x) { return erfcf(x); }
__device__ inline double complementary_error(double x) { return erfc(x); }

// z, but not further from zero than the tails reach, so that their products with it are zeros, not ∞ · 0; a NaN stays one.
template <class A> __device__ inline A bounded(A z) { return z < A(-1000) ? A(-1000) : z > A(1000) ? A(1000) : z; }

template <class A> __device__ inline A sigmoid(A z) { return A(1) / (A(1) + exponential(-z)); }

// σ(z), and σ'(z) in `slope`.
template <class A> __device__ inline A activate(int activation, A z, A &slope) {
    switch (activation) {
    case TANH: {
        const A h = hyperbolic_tangent(z);
        slope = A(1) - h * h;
        return h;
    }
    case SIGMOID: {
        const A h = sigmoid(z);
        slope = h * (A(1) - h);
        return h;
    }
    case SOFTPLUS:
        slope = sigmoid(z);
        return (z > A(0) ? z : A(0)) + logarithm_of_one_and(exponential(z > A(0) ? -z : z));
    case RELU:
        // A NaN is to be seen.
        slope = z > A(0) ? A(1) : z <= A(0) ? A(0) : z;
        return z <= A(0) ? A(0) : z;
    case SILU: {
        const A near = bounded(z), s = sigmoid(near);
        slope = s + near * s * (A(1) - s);
        return (z > near ? z : near) * s;
    }
    case GELU: {
        const A near = bounded(z);
        const A normal = A(0.5) * complementary_error(-near * A(0.70710678118654752));
        const A density = A(0.39894228040143268) * exponential(A(-0.5) * near * near);
        slope = normal + near * density;
        return (z > near ? z : near) * normal;
    }
    case LOG_TWO_COSH: {
        const A size = z < A(0) ? -z : z;
        slope = hyperbolic_tangent(z);
        return size + logarithm_of_one_and(exponential(A(-2) * size));
    }
    case NONE:
        slope = A(1);
        return z;
    default:
        slope = cosine(z);
        return sine(z);
    }
}

// σ'(z) of h = σ(z), for activations where that is enough.
template <class A> __device__ inline A slope_of_value(int activation, A h) {
    switch (activation) {
    case TANH: return A(1) - h * h;
    case SIGMOID: return h * (A(1) - h);
    // Not positive, it is 0 or NaN.
    case RELU: return h > A(0) ? A(1) : h;
    default: return A(NAN);
    }
}
