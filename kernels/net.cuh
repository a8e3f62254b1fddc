// What all solves of a small perceptron in one launch share: the network in shared memory, its velocity, its pull-back,
// and the sums of its gradients.
//
// A lane is a row, and a feature of all rows lies together, `PITCH` apart from the next.  A warp works on GROUP outputs
// of a product at once: their weights come by broadcast, as vectors.  Sums are f32; states, velocities and cotangents
// are rounded to compute precision where the theory says so.
#pragma once

#include "activation.cuh"
#include "common.cuh"
#include "scaler.cuh"

constexpr int ROWS = 32;
constexpr int PITCH = ROWS + 4; // rows of a gradient's operands fall on different banks
constexpr int WARPS = THREADS / 32;
constexpr int GROUP = 8;
constexpr int MOST_LAYERS = 8;
constexpr int MOST_STAGES = 16;

// A layer; places in shared memory are in floats for weights and in features otherwise.
struct Layer {
    const void *weight, *bias; // [out][in], [out]
    int in, out, padded; // padded: outputs, a multiple of GROUP
    int skips; // adds its input to its output
    int weights, biases; // where it is in the packed weights
    int input, slope; // what it reads, and its slopes, in a slot
    int cotangent; // of z
    int unused;
};

// As `Net` in src/nn/cuda.
struct Net {
    Layer layers[MOST_LAYERS];
    int count, dim, time, activation;
    int type; // of weights and biases
    int keeps_slopes;
    int weights; // floats of the packed weights
    int slot; // features that an evaluation keeps
    int cotangents; // features of all layers' cotangents
    int widest; // features of the widest layer
};

struct Method {
    double a[MOST_STAGES][MOST_STAGES], b[MOST_STAGES], c[MOST_STAGES];
    int active[MOST_STAGES];
    int stages;
};

// Kinds of failure, in the last bits of a key; before them whatever says more.
enum Failure : unsigned { VELOCITY, SOLUTION, GRADIENT, EXHAUSTED };
constexpr uint64_t AFTER_ALL = uint64_t{1} << 39;

__device__ inline unsigned long long failure_key(uint64_t order, unsigned detail, Failure kind) {
    return static_cast<unsigned long long>(order) << 24 | static_cast<unsigned long long>(detail) << 2 | kind;
}

#ifdef HOST_CUDA
#define DYNAMIC_SHARED(name) float *name = static_cast<float *>(dynamic_shared())
#else
#define DYNAMIC_SHARED(name)                     \
    extern __shared__ float4 name##_of_launch[]; \
    float *name = reinterpret_cast<float *>(name##_of_launch)
#endif

__device__ inline int lane() { return threadIdx.x % 32; }
__device__ inline int warp() { return threadIdx.x / 32; }

// The time of a stage at abscissa c of the step from t of length h, to the bit as the host computes it: at the ends of
// the step the times that the step knows, which are not t + h to the last bit.
__device__ inline double stage_time(double t, double h, double start, double end, double c) {
    return c == 0 ? start : c == 1 ? end : __dadd_rn(t, __dmul_rn(c, h));
}

// y + h Σ c_j k_j over the first `count` stages, of the element at `at`; the stages are `stride` apart.
__device__ inline float weighted(float y, double h, const double *c, int count, const float *k, int stride, int at) {
    for (int j = 0; j < count; ++j) {
        if (c[j] != 0) y = fmaf(static_cast<float>(h * c[j]), k[j * stride + at], y);
    }
    return y;
}

// W as [input][output], outputs padded with zeros, inputs to a whole group; then b.
__device__ void pack(const Net &net, float *weights) {
    for (int i = threadIdx.x; i < net.weights; i += THREADS) weights[i] = 0;
    __syncthreads();
    for (int l = 0; l < net.count; ++l) {
        const Layer &layer = net.layers[l];
        for (int i = threadIdx.x; i < layer.in * layer.out; i += THREADS) {
            float x[FOUR];
            load<float>(layer.weight, net.type, i, 1, x);
            weights[layer.weights + i % layer.in * layer.padded + i / layer.in] = x[0];
        }
        for (int o = threadIdx.x; o < layer.out; o += THREADS) {
            float x[FOUR];
            load<float>(layer.bias, net.type, o, 1, x);
            weights[layer.biases + o] = x[0];
        }
    }
    __syncthreads();
}

// k = Q(f(t, Y)), Y in the first features of the slot.  All threads meet before and after.
__device__ void velocity(const Net &net, const float *weights, float *slot, int compute, float *k) {
    for (int l = 0; l < net.count; ++l) {
        const Layer &layer = net.layers[l];
        const bool last = l + 1 == net.count;
        const float *x = slot + layer.input * PITCH;
        float *out = last ? k : slot + net.layers[last ? l : l + 1].input * PITCH;
        float *slopes = slot + layer.slope * PITCH;
        for (int group = warp() * GROUP; group < layer.out; group += WARPS * GROUP) {
            float sums[GROUP];
#pragma unroll
            for (int e = 0; e < GROUP; ++e) sums[e] = weights[layer.biases + group + e];
            const float *w = weights + layer.weights + group;
            for (int i = 0; i < layer.in; ++i, w += layer.padded) {
                const float xi = x[i * PITCH + lane()];
                const float4 p = reinterpret_cast<const float4 *>(w)[0], q = reinterpret_cast<const float4 *>(w)[1];
                sums[0] = fmaf(p.x, xi, sums[0]), sums[1] = fmaf(p.y, xi, sums[1]);
                sums[2] = fmaf(p.z, xi, sums[2]), sums[3] = fmaf(p.w, xi, sums[3]);
                sums[4] = fmaf(q.x, xi, sums[4]), sums[5] = fmaf(q.y, xi, sums[5]);
                sums[6] = fmaf(q.z, xi, sums[6]), sums[7] = fmaf(q.w, xi, sums[7]);
            }
#pragma unroll
            for (int e = 0; e < GROUP; ++e) {
                const int at = (group + e) * PITCH + lane();
                if (group + e >= layer.out) continue;
                if (last) {
                    out[at] = rounded(sums[e], compute);
                    continue;
                }
                float slope;
                float value = activate<float>(net.activation, sums[e], slope);
                if (net.keeps_slopes) slopes[at] = slope;
                if (layer.skips) value += x[at];
                out[at] = value;
            }
        }
        __syncthreads();
    }
}

// w = Q(vᵀ∂f/∂y), v = Q(S v_i) being the last layer's cotangents; those of the other layers on the
// way.  All threads meet before and after.
__device__ void pull(const Net &net, const float *weights, const float *slot, int compute, float *cotangents, float *carried, float *w) {
    for (int l = net.count - 1; l >= 0; --l) {
        const Layer &layer = net.layers[l];
        const float *g = cotangents + layer.cotangent * PITCH;
        const int inputs = l == 0 ? net.dim : layer.in;
        for (int group = warp() * GROUP; group < inputs; group += WARPS * GROUP) {
            float sums[GROUP];
#pragma unroll
            for (int e = 0; e < GROUP; ++e) sums[e] = 0;
            const float *row = weights + layer.weights + group * layer.padded;
            for (int o = 0; o < layer.padded; o += 4) {
                float go[4];
#pragma unroll
                for (int j = 0; j < 4; ++j) go[j] = o + j < layer.out ? g[(o + j) * PITCH + lane()] : 0.0f;
#pragma unroll
                for (int e = 0; e < GROUP; ++e) {
                    const float4 p = *reinterpret_cast<const float4 *>(row + e * layer.padded + o);
                    sums[e] = fmaf(p.x, go[0], fmaf(p.y, go[1], fmaf(p.z, go[2], fmaf(p.w, go[3], sums[e]))));
                }
            }
#pragma unroll
            for (int e = 0; e < GROUP; ++e) {
                const int at = (group + e) * PITCH + lane();
                if (group + e >= inputs) continue;
                if (layer.skips) sums[e] += carried[at];
                if (l == 0) {
                    w[at] = rounded(sums[e], compute);
                    continue;
                }
                const Layer &below = net.layers[l - 1];
                const float slope = net.keeps_slopes ? slot[below.slope * PITCH + at]
                                                     : slope_of_value(net.activation, slot[layer.input * PITCH + at]);
                carried[at] = sums[e];
                cotangents[below.cotangent * PITCH + at] = sums[e] * slope;
            }
        }
        __syncthreads();
    }
}

// parts += c Σ g xᵀ over the rows, of every layer.  Each thread adds to its own elements.
__device__ void accumulate(const Net &net, const float *slot, const float *cotangents, float c, float *parts) {
    for (int l = 0; l < net.count; ++l) {
        const Layer &layer = net.layers[l];
        const float *x = slot + layer.input * PITCH, *g = cotangents + layer.cotangent * PITCH;
        // Four inputs by four outputs; a tile's outputs are `across` apart, so that neighbours in a
        // warp read neighbouring rows.
        const int down = (layer.in + 3) / 4, across = (layer.out + 3) / 4;
        for (int tile = threadIdx.x; tile < down * across; tile += THREADS) {
            const int i0 = tile / across * 4, o0 = tile % across;
            float sums[4][4] = {};
            for (int r = 0; r < ROWS; r += 4) {
                float4 xs[4], gs[4];
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    const int i = i0 + e < layer.in ? i0 + e : i0, o = o0 + e * across < layer.out ? o0 + e * across : o0;
                    xs[e] = *reinterpret_cast<const float4 *>(x + i * PITCH + r);
                    gs[e] = *reinterpret_cast<const float4 *>(g + o * PITCH + r);
                }
#pragma unroll
                for (int a = 0; a < 4; ++a) {
#pragma unroll
                    for (int b = 0; b < 4; ++b) {
                        sums[a][b] = fmaf(xs[a].x, gs[b].x, fmaf(xs[a].y, gs[b].y, fmaf(xs[a].z, gs[b].z, fmaf(xs[a].w, gs[b].w, sums[a][b]))));
                    }
                }
            }
#pragma unroll
            for (int a = 0; a < 4; ++a) {
#pragma unroll
                for (int b = 0; b < 4; ++b) {
                    const int i = i0 + a, o = o0 + b * across;
                    if (i >= layer.in || o >= layer.out) continue;
                    float &part = parts[layer.weights + i * layer.padded + o];
                    part = fmaf(c, sums[a][b], part);
                }
            }
        }
        for (int o = threadIdx.x; o < layer.out; o += THREADS) {
            float sum = 0;
            for (int r = 0; r < ROWS; ++r) sum += g[o * PITCH + r];
            float &part = parts[layer.biases + o];
            part = fmaf(c, sum, part);
        }
    }
}

// After a pull-back that overflowed: a smaller S, or the end.
__device__ inline bool give_up(Scaler &s, unsigned attempts, unsigned most) {
    set_exponent(s, s.exponent - 1);
    s.aimed = 1;
    if (s.exponent + s.level < s.aim) s.aim = s.exponent + s.level;
    s.clean = 0;
    return !s.dynamic || attempts >= most || s.exponent + s.level < -24 || s.exponent <= -SCALE_LIMIT;
}
