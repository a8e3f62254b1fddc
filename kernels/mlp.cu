// Whole solves of a small perceptron with fixed steps: a block takes tiles of ROWS rows through all steps, forward or
// backward, with the weights in shared memory (net.cuh), and leaves the chip for what is kept or returned.
#include "net.cuh"

struct Step {
    double t, h;
    double start, end; // when stages at its ends are evaluated
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
        slot[at] = rounded(weighted(y[at], step.h, method.a[i], i, k, net.dim * PITCH, at), compute);
    }
    if (net.time && warp() == 0) {
        slot[net.dim * PITCH + lane()] = static_cast<float>(stage_time(step.t, step.h, step.start, step.end, method.c[i]));
    }
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
                const float sum = weighted(y[at], step.h, method.b, method.stages, k, net.dim * PITCH, at);
                y[at] = sum;
                if (!is_finite(sum)) atomicMin(&solve.report->failure, failure_key(1 + n * (MOST_STAGES + 1) + MOST_STAGES, 0, SOLUTION));
                if (stored && step.output >= 0) solve.out[step.output * elements + row * net.dim + f] = sum;
            }
        }
        __syncthreads();
    }
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
