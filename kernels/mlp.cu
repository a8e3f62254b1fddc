// Whole solves of a small perceptron: a block takes tiles of ROWS rows through all steps, forward or
// backward, with the weights in shared memory, and leaves the chip for what is kept or returned.
//
// A lane is a row, and a feature of all rows lies together, `PITCH` apart from the next.  A warp works
// on GROUP outputs of a product at once: their weights come by broadcast, as vectors.  Sums are f32;
// states, velocities and cotangents are rounded to compute precision where the theory says so.
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

struct Step {
    double t, h;
    int output; // where y_{n+1} is returned, or −1
    int given; // which cotangent belongs to y_n, or −1
};

// What a solve needs beside the net and the method.
struct Solve {
    const Step *steps;
    uint64_t count, rows;
    int compute, store; // dtypes
    int returns_first; // whether y_0 is returned
    const float *y0; // or the last cotangent
    const float *given; // cotangents, (outputs, rows, dim)
    float *out; // returned states, (outputs, rows, dim), or λ_0
    void *kept; // (steps, rows, dim) in store precision, or nothing
    float *parts, *totals; // sums of gradients of each block
    struct Report *report;
    int keeps_all; // whether all stages of a step keep their activations
    int parts_shared; // whether `parts` is in shared memory
    int flush; // steps after which parts are added to the totals
    unsigned most_attempts;
    Scaler scaler; // at the start
};

// What the host reads, once.
struct Report {
    unsigned long long failure; // the first in the order of the pass
    unsigned retries;
    int smallest, largest; // exponents of S
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

// The row of this lane in a tile; rows beyond the batch repeat its last one, and are not stored.
__device__ inline uint64_t row_of(uint64_t tile, uint64_t rows, bool &stored) {
    const uint64_t row = tile * ROWS + lane();
    stored = row < rows;
    return stored ? row : rows - 1;
}

// Y_i into the slot, and time behind it.  Every thread has its own features, here and in all sums.
__device__ void stage_state(const Net &net, const Method &method, int i, const Step &step, int compute, const float *y, const float *k, float *slot) {
    for (int f = warp(); f < net.dim; f += WARPS) {
        const int at = f * PITCH + lane();
        float sum = y[at];
        for (int j = 0; j < i; ++j) {
            if (method.a[i][j] != 0) sum = fmaf(static_cast<float>(step.h * method.a[i][j]), k[j * net.dim * PITCH + at], sum);
        }
        slot[at] = rounded(sum, compute);
    }
    if (net.time && warp() == 0) slot[net.dim * PITCH + lane()] = static_cast<float>(step.t + method.c[i] * step.h);
}

extern "C" __global__ void __launch_bounds__(THREADS, 2)
    mlp_forward(const __grid_constant__ Net net, const __grid_constant__ Method method, const __grid_constant__ Solve solve) {
    DYNAMIC_SHARED(room);
    float *weights = room;
    float *slot = weights + net.weights;
    float *y = slot + net.slot * PITCH;
    float *k = y + net.dim * PITCH;
    pack(net, weights);
    const uint64_t elements = solve.rows * net.dim;
    for (uint64_t tile = blockIdx.x; tile * ROWS < solve.rows; tile += gridDim.x) {
        bool stored;
        const uint64_t row = row_of(tile, solve.rows, stored);
        for (int f = warp(); f < net.dim; f += WARPS) {
            const float x = solve.y0[row * net.dim + f];
            y[f * PITCH + lane()] = x;
            if (!is_finite(x)) atomicMin(&solve.report->failure, failure_key(0, 0, SOLUTION));
            if (stored && solve.returns_first) solve.out[row * net.dim + f] = x;
        }
        for (uint64_t n = 0; n < solve.count; ++n) {
            const Step step = solve.steps[n];
            if (solve.kept != nullptr && stored) {
                const Sink kept{solve.kept, solve.store, solve.store};
                for (int f = warp(); f < net.dim; f += WARPS) {
                    const float x[FOUR] = {y[f * PITCH + lane()], 0, 0, 0};
                    store<float>(kept, n * elements + row * net.dim + f, 1, x);
                }
            }
            bool bad = false;
            for (int i = 0; i < method.stages; ++i) {
                if (!method.active[i]) continue;
                stage_state(net, method, i, step, solve.compute, y, k, slot);
                __syncthreads();
                velocity(net, weights, slot, solve.compute, k + i * net.dim * PITCH);
                for (int f = warp(); f < net.dim; f += WARPS) {
                    if (bad || is_finite(k[(i * net.dim + f) * PITCH + lane()])) continue;
                    bad = true;
                    atomicMin(&solve.report->failure, failure_key(1 + n * (MOST_STAGES + 1) + i, i, VELOCITY));
                }
            }
            for (int f = warp(); f < net.dim; f += WARPS) {
                const int at = f * PITCH + lane();
                float sum = y[at];
                for (int i = 0; i < method.stages; ++i) {
                    if (method.b[i] != 0) sum = fmaf(static_cast<float>(step.h * method.b[i]), k[i * net.dim * PITCH + at], sum);
                }
                y[at] = sum;
                if (!is_finite(sum)) atomicMin(&solve.report->failure, failure_key(1 + n * (MOST_STAGES + 1) + MOST_STAGES, 0, SOLUTION));
                if (stored && step.output >= 0) solve.out[step.output * elements + row * net.dim + f] = sum;
            }
        }
        __syncthreads();
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

extern "C" __global__ void __launch_bounds__(THREADS, 2)
    mlp_backward(const __grid_constant__ Net net, const __grid_constant__ Method method, const __grid_constant__ Solve solve) {
    DYNAMIC_SHARED(room);
    __shared__ Scaler scaler;
    __shared__ unsigned largest, retries, attempts, gave_up;
    __shared__ int lowest, highest;
    float *weights = room;
    float *slots = weights + net.weights;
    float *y = slots + (solve.keeps_all ? method.stages : 1) * net.slot * PITCH;
    float *adj = y + net.dim * PITCH;
    float *k = adj + net.dim * PITCH;
    float *w = k + method.stages * net.dim * PITCH;
    float *carried = w + method.stages * net.dim * PITCH;
    float *cotangents = carried + net.widest * PITCH;
    float *shared_parts = cotangents + net.cotangents * PITCH;
    float *parts = solve.parts_shared ? shared_parts : solve.parts + blockIdx.x * static_cast<uint64_t>(net.weights);
    float *totals = solve.totals + blockIdx.x * static_cast<uint64_t>(net.weights);
    pack(net, weights);
    for (int i = threadIdx.x; i < net.weights; i += THREADS) parts[i] = totals[i] = 0;
    if (threadIdx.x == 0) retries = 0, lowest = SCALE_LIMIT + 1, highest = -SCALE_LIMIT - 1, gave_up = 0, attempts = 0;
    const uint64_t elements = solve.rows * net.dim;
    const int final_cotangent = net.layers[net.count - 1].cotangent;
    for (uint64_t tile = blockIdx.x; tile * ROWS < solve.rows; tile += gridDim.x) {
        bool stored;
        const uint64_t row = row_of(tile, solve.rows, stored);
        if (threadIdx.x == 0) scaler = solve.scaler;
        for (int f = warp(); f < net.dim; f += WARPS) {
            const float x = stored ? solve.y0[row * net.dim + f] : 0.0f;
            adj[f * PITCH + lane()] = x;
            if (!is_finite(x)) atomicMin(&solve.report->failure, failure_key(0, 0, GRADIENT));
        }
        for (uint64_t n = solve.count; n-- > 0;) {
            const Step step = solve.steps[n];
            for (int f = warp(); f < net.dim; f += WARPS) {
                float x[FOUR];
                load<float>(solve.kept, solve.store, n * elements + row * net.dim + f, 1, x);
                y[f * PITCH + lane()] = x[0];
            }
            for (int i = 0; i < method.stages; ++i) {
                if (!method.active[i]) continue;
                float *slot = slots + (solve.keeps_all ? i : 0) * net.slot * PITCH;
                stage_state(net, method, i, step, solve.compute, y, k, slot);
                __syncthreads();
                velocity(net, weights, slot, solve.compute, k + i * net.dim * PITCH);
            }
            if (scaler.dynamic) {
                if (threadIdx.x == 0) largest = 0;
                __syncthreads();
                for (int f = warp(); f < net.dim; f += WARPS) atomicMax(&largest, __float_as_uint(adj[f * PITCH + lane()]) & 0x7fffffffu);
                __syncthreads();
                if (threadIdx.x == 0) aim_at(scaler, static_cast<double>(__uint_as_float(largest)));
                __syncthreads();
            }
            for (int i = method.stages - 1; i >= 0; --i) {
                if (!method.active[i]) continue;
                float *slot = slots + (solve.keeps_all ? i : 0) * net.slot * PITCH;
                if (!solve.keeps_all) {
                    stage_state(net, method, i, step, solve.compute, y, k, slot);
                    __syncthreads();
                    velocity(net, weights, slot, solve.compute, k + i * net.dim * PITCH);
                }
                float *wi = w + i * net.dim * PITCH;
                if (threadIdx.x == 0) attempts = 0;
                for (;;) {
                    const float scale = static_cast<float>(scaler.scale), inverse = static_cast<float>(scaler.inverse);
                    for (int f = warp(); f < net.dim; f += WARPS) {
                        const int at = f * PITCH + lane();
                        float sum = static_cast<float>(method.b[i]) * adj[at];
                        for (int j = i + 1; j < method.stages; ++j) {
                            if (method.active[j] && method.a[j][i] != 0) sum = fmaf(static_cast<float>(step.h * method.a[j][i]), w[j * net.dim * PITCH + at], sum);
                        }
                        cotangents[(final_cotangent * PITCH) + at] = rounded(sum * scale, solve.compute);
                    }
                    if (threadIdx.x == 0 && scaler.exponent < lowest) lowest = scaler.exponent;
                    if (threadIdx.x == 0 && scaler.exponent > highest) highest = scaler.exponent;
                    __syncthreads();
                    pull(net, weights, slot, solve.compute, cotangents, carried, wi);
                    bool bad = false;
                    for (int f = warp(); f < net.dim; f += WARPS) {
                        const int at = f * PITCH + lane();
                        bad |= !is_finite(wi[at]);
                        wi[at] *= inverse;
                    }
                    // Without a dynamic scale, what overflowed shows in λ.
                    if (!__syncthreads_or(bad) || !solve.scaler.dynamic) {
                        accumulate(net, slot, cotangents, static_cast<float>(step.h * scaler.inverse), parts);
                        __syncthreads();
                        break;
                    }
                    if (threadIdx.x == 0) {
                        ++attempts, ++retries;
                        const int exponent = scaler.exponent;
                        if (give_up(scaler, attempts, solve.most_attempts)) {
                            gave_up = 1;
                            const unsigned detail = (attempts & 0x7ff) << 9 | static_cast<unsigned>(exponent + 256);
                            atomicMin(&solve.report->failure, failure_key(solve.count - n, detail, EXHAUSTED));
                        }
                    }
                    __syncthreads();
                    if (gave_up) break;
                }
                if (gave_up) break;
            }
            if (gave_up) break;
            if (threadIdx.x == 0) scaler.clean += 1;
            bool bad = false;
            for (int f = warp(); f < net.dim; f += WARPS) {
                const int at = f * PITCH + lane();
                float sum = adj[at];
                for (int i = 0; i < method.stages; ++i) {
                    if (method.active[i]) sum = fmaf(static_cast<float>(step.h), w[i * net.dim * PITCH + at], sum);
                }
                if (step.given >= 0 && stored) {
                    const float given = solve.given[step.given * elements + row * net.dim + f];
                    sum += given;
                    if (!is_finite(given)) atomicMin(&solve.report->failure, failure_key(0, 0, GRADIENT));
                }
                adj[at] = sum;
                bad |= !is_finite(sum);
            }
            if (bad) atomicMin(&solve.report->failure, failure_key(solve.count - n, 0, GRADIENT));
            if (n % solve.flush == 0) {
                __syncthreads();
                for (int i = threadIdx.x; i < net.weights; i += THREADS) totals[i] += parts[i], parts[i] = 0;
                __syncthreads();
            }
        }
        for (int f = warp(); f < net.dim; f += WARPS) {
            if (stored) solve.out[row * net.dim + f] = adj[f * PITCH + lane()];
        }
        __syncthreads();
        if (gave_up) break;
    }
    if (threadIdx.x == 0) {
        atomicMax(&solve.report->retries, retries);
        atomicMin(&solve.report->smallest, lowest);
        atomicMax(&solve.report->largest, highest);
    }
}

// The gradients of one layer from the totals of all blocks, in their order.
extern "C" __global__ void mlp_fold(const float *totals, int blocks, uint64_t stride, int weights, int biases, int in, int out,
                                    int padded, float *weight, float *bias, Report *report) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= (in + 1) * out) return;
    const int at = i < in * out ? weights + i % in * padded + i / in : biases + i - in * out;
    double sum = 0;
    for (int b = 0; b < blocks; ++b) sum += totals[b * stride + at];
    if (!is_finite(static_cast<float>(sum))) atomicMin(&report->failure, failure_key(AFTER_ALL, 0, GRADIENT));
    if (i < in * out) {
        weight[i] = static_cast<float>(sum);
    } else {
        bias[i - in * out] = static_cast<float>(sum);
    }
}
