// The backward pass of a small perceptron with adaptive steps of every row, in one launch.
//
// A lane goes through the list of the steps of its row, from the last step to the first, and then takes the next row of
// its block.  Which rows a block has depends on the numbers of rows and blocks alone, so that the sums of gradients do
// not change from run to run.  Every warp knows where every lane is: no barrier is needed for that.
//
// With w' = h w, for descending stages: v_i = b_i λ + Σ_m b_i(x_m) ȳ_m + Σ_{j>i} a_ji w'_j, w'_i = (∂f/∂y)ᵀ (h v_i) and
// θ̄ += (∂f/∂θ)ᵀ (h v_i), where ȳ_m are the cotangents of outputs inside the step.  If the last stage of step n is the
// first of step n + 1, outputs inside step n add their part of it there, times h_n / h_{n+1} (src/rows/adaptive).
#include "rows.cuh"

constexpr unsigned long long NO_ROW = ~0ull;

// Where a lane is.
struct Walk {
    unsigned long long row;
    double t, h, end; // of the step that it is in
    unsigned at, left; // the step's place in the list, and how many are left with it
    int next; // the user's times before this one are still to be met
    int exhausted; // no row is left
    int from, to; // outputs inside the step
    int from_before, to_before; // outputs inside the step before, if that hands its last stage on
    int node; // the output at its start, or −1
    int keeps_last; // whether its last stage is its own
    double t_before, h_before;
};

__device__ inline const float *given_of(const Net &net, const RowsSolve &solve, const Control &control, unsigned long long row, int time) {
    const int output = control.returns_all ? time : 0;
    return solve.given + (output * solve.rows + row) * net.dim;
}

// Lets lanes without a row begin at the end of the next one that has steps.
__device__ void take_rows(const Net &net, const RowsSolve &solve, const Control &control, Walk &walk, uint64_t &cursor, float *adj) {
    const int l = lane();
    for (;;) {
        const bool wants = walk.row == NO_ROW && !walk.exhausted;
        const unsigned all = __ballot_sync(~0u, wants);
        if (all == 0) return;
        const uint64_t row = blockIdx.x + (cursor + __popc(all & ((1u << l) - 1))) * gridDim.x;
        cursor += __popc(all);
        if (!wants) continue;
        if (row >= solve.rows) {
            walk.exhausted = 1;
            continue;
        }
        const RowReport &report = solve.reports[row];
        // The cotangents of a row that has stopped are ignored.
        const bool stopped = report.reason != NO_REASON;
        const int last = control.point_count - 1;
        const float *given = given_of(net, solve, control, row, last);
        if (stopped || report.accepted == 0) {
            for (int f = warp(); f < net.dim; f += WARPS) solve.out[row * net.dim + f] = stopped ? 0 : given[f];
            continue;
        }
        walk.row = row;
        walk.at = report.last, walk.left = report.accepted;
        walk.end = control.points[last], walk.next = last;
        walk.keeps_last = 1;
        for (int f = warp(); f < net.dim; f += WARPS) {
            const float x = given[f];
            adj[f * PITCH + l] = x;
            if (!is_finite(x)) atomicMin(&solve.report->failure, failure_key(0, 0, GRADIENT));
        }
    }
}

// How many of the user's times before the `to`th one lie after t.
__device__ inline int first_after(const Control &control, double t, int to) {
    while (to > 0 && later(control, control.points[to - 1], t)) --to;
    return to;
}

// Puts a lane at the start of its step.
__device__ void enter_step(const Net &net, const RowsSolve &solve, const Control &control, Walk &walk, double &start, double &end, float *y) {
    const Recorded step = solve.steps[walk.at];
    const bool forward = control.direction > 0;
    walk.t = step.t, walk.h = step.h;
    start = step.jumps & JUMPS_AT_START ? beside(step.t, forward) : step.t;
    end = step.jumps & JUMPS_AT_END ? beside(walk.end, !forward) : walk.end;
    walk.keeps_last |= (step.jumps & JUMPS_AT_END) != 0;
    walk.from = walk.to = walk.from_before = walk.to_before = 0, walk.node = -1;
    if (control.returns_all) {
        walk.to = walk.next;
        walk.from = first_after(control, step.t, walk.to);
        walk.next = walk.from;
        if (walk.from > 0 && control.points[walk.from - 1] == step.t) walk.node = walk.next = walk.from - 1;
        if (walk.left > 1 && !(step.jumps & JUMPS_AT_START)) {
            const Recorded before = solve.steps[step.previous];
            walk.t_before = before.t, walk.h_before = before.h;
            walk.to_before = walk.next;
            walk.from_before = first_after(control, before.t, walk.to_before);
        }
    }
    for (int f = warp(); f < net.dim; f += WARPS) {
        float x[FOUR];
        load<float>(solve.kept, solve.store, static_cast<uint64_t>(walk.at) * net.dim + f, 1, x);
        y[f * PITCH + lane()] = x[0];
    }
}

// Σ_m b_i(x_m) ȳ_m of every stage, of the outputs inside the step of a lane and of those that the step before hands on.
__device__ void weigh(const Net &net, const Method &method, const RowsSolve &solve, const Control &control, const Walk &walk, float *sums) {
    const int l = lane(), last = method.stages - 1;
    for (int i = 0; i <= last; ++i) {
        for (int f = warp(); f < net.dim; f += WARPS) sums[(i * net.dim + f) * PITCH + l] = 0;
    }
    if (walk.row == NO_ROW) return;
    for (int m = walk.from; m < walk.to; ++m) {
        const float *given = given_of(net, solve, control, walk.row, m);
        const double x = (control.points[m] - walk.t) / walk.h;
        for (int i = 0; i <= last; ++i) {
            const double b = weight_at(control, method, i, x);
            if (b == 0 || (i == last && !walk.keeps_last)) continue;
            for (int f = warp(); f < net.dim; f += WARPS) {
                float &sum = sums[(i * net.dim + f) * PITCH + l];
                sum = fmaf(static_cast<float>(b), given[f], sum);
            }
        }
    }
    for (int m = walk.from_before; m < walk.to_before; ++m) {
        const float *given = given_of(net, solve, control, walk.row, m);
        const double x = (control.points[m] - walk.t_before) / walk.h_before;
        const double ratio = walk.h_before / walk.h;
        const float b = static_cast<float>(ratio * weight_at(control, method, last, x));
        for (int f = warp(); f < net.dim; f += WARPS) sums[f * PITCH + l] = fmaf(b, given[f], sums[f * PITCH + l]);
    }
}

// λ_n in place of λ_{n+1}.  A lane at the start of its row leaves it.
__device__ void leave_step(const Net &net, const Method &method, const RowsSolve &solve, const Control &control, Walk &walk, bool needs_last, float *adj, const float *w) {
    const int l = lane();
    const float *at_node = given_of(net, solve, control, walk.row, max(walk.node, 0));
    bool bad = false, bad_given = false;
    for (int f = warp(); f < net.dim; f += WARPS) {
        const int at = f * PITCH + l;
        float sum = adj[at];
        for (int i = 0; i < method.stages - !needs_last; ++i) {
            if (method.active[i]) sum += w[i * net.dim * PITCH + at];
        }
        for (int m = walk.from; m < walk.to; ++m) {
            const float given = given_of(net, solve, control, walk.row, m)[f];
            sum += given;
            bad_given |= !is_finite(given);
        }
        if (walk.node >= 0) sum += at_node[f], bad_given |= !is_finite(at_node[f]);
        bad |= !is_finite(sum);
        if (walk.left == 1) solve.out[walk.row * net.dim + f] = sum;
        adj[at] = walk.left == 1 ? 0 : sum;
    }
    if (bad_given) atomicMin(&solve.report->failure, failure_key(0, 0, GRADIENT));
    if (bad) {
        solve.reports[walk.row].bad_step = walk.left - 1, solve.reports[walk.row].bad_t = walk.t;
        atomicMin(&solve.report->failure, failure_key(walk.row + 1, 0, GRADIENT));
    }
    if (walk.left == 1) {
        walk.row = NO_ROW, walk.h = 0;
        walk.from = walk.to = walk.from_before = walk.to_before = 0;
        return;
    }
    const Recorded step = solve.steps[walk.at];
    walk.end = step.t, walk.at = step.previous, walk.left -= 1;
    walk.keeps_last = 0;
}

extern "C" __global__ void __launch_bounds__(THREADS, 2)
    mlp_rows_backward(const __grid_constant__ Net net, const __grid_constant__ Method method, const __grid_constant__ RowsSolve solve) {
    DYNAMIC_SHARED(room);
    __shared__ Control control;
    __shared__ unsigned largest[ROWS], overflowed, retries, gave_up;
    load_control(*solve.control, control);
    const int l = lane(), stride = net.dim * PITCH;
    float *weights = room;
    float *slots = weights + net.weights;
    float *y = slots + (solve.keeps_all ? method.stages : 1) * net.slot * PITCH;
    float *adj = y + stride;
    float *v = adj + stride;
    float *k = v + stride;
    float *w = k + method.stages * stride;
    float *carried = w + method.stages * stride;
    float *cotangents = carried + net.widest * PITCH;
    float *shared_parts = cotangents + net.cotangents * PITCH;
    float *parts = solve.parts_shared ? shared_parts : solve.parts + blockIdx.x * static_cast<uint64_t>(net.weights);
    float *totals = solve.totals + blockIdx.x * static_cast<uint64_t>(net.weights);
    pack(net, weights);
    for (int i = threadIdx.x; i < net.weights; i += THREADS) parts[i] = totals[i] = 0;
    if (threadIdx.x == 0) {
        retries = 0, gave_up = 0;
    }
    // Lanes without a row hold a state that the forward pass has met, and a cotangent of zero.
    for (int f = warp(); f < net.dim; f += WARPS) {
        float x[FOUR];
        load<float>(solve.kept, solve.store, f, 1, x);
        y[f * PITCH + l] = x[0], adj[f * PITCH + l] = 0;
    }
    __syncthreads();
    // S of the lane's row, so that a row does not depend on the rows beside it; the same in every warp.
    Scaler scaler = solve.scaler;
    int lowest = SCALE_LIMIT + 1, highest = -SCALE_LIMIT - 1;
    Walk walk{};
    walk.row = NO_ROW;
    uint64_t cursor = 0;
    unsigned long long recomputed = 0, pulls = 0;
    const int final_cotangent = net.layers[net.count - 1].cotangent, last = method.stages - 1;
    for (unsigned rounds = 1;; ++rounds) {
        const auto before = walk.row;
        take_rows(net, solve, control, walk, cursor, adj);
        if (walk.row != before) scaler = solve.scaler;
        const bool lives = walk.row != NO_ROW;
        const unsigned living = __ballot_sync(~0u, lives);
        if (living == 0) break;
        double start = control.start, end = control.start;
        if (lives) enter_step(net, solve, control, walk, start, end, y);
        const bool has_inside = walk.from < walk.to, dense = __any_sync(~0u, has_inside || walk.from_before < walk.to_before);
        const bool needs_last = __any_sync(~0u, has_inside && walk.keeps_last);
        const int stages = method.stages - !needs_last;
        const float h = static_cast<float>(walk.h);
        // A step so short adds nothing that f32 holds beside λ.
        const float inverse_h = fabsf(h) < 1e-30f ? 0 : 1 / h;
        auto evaluate = [&](int i) {
            float *slot = slots + (solve.keeps_all ? i : 0) * net.slot * PITCH;
            for (int f = warp(); f < net.dim; f += WARPS) {
                const int at = f * PITCH + l;
                slot[at] = rounded(lives ? weighted(y[at], walk.h, method.a[i], i, k, stride, at) : y[at], solve.compute);
            }
            if (net.time && warp() == 0) slot[net.dim * PITCH + l] = static_cast<float>(stage_time(walk.t, walk.h, start, end, method.c[i]));
            __syncthreads();
            velocity(net, weights, slot, solve.compute, k + i * stride);
            recomputed += 1;
            return slot;
        };
        for (int i = 0; i < stages; ++i) {
            if (method.active[i]) evaluate(i);
        }
        if (dense) weigh(net, method, solve, control, walk, w);
        if (scaler.dynamic) {
            if (threadIdx.x < ROWS) largest[threadIdx.x] = 0;
            __syncthreads();
            unsigned most = 0;
            for (int f = warp(); f < net.dim; f += WARPS) {
                most = max(most, __float_as_uint(adj[f * PITCH + l]) & 0x7fffffffu);
                for (int i = 0; dense && i <= last; ++i) most = max(most, __float_as_uint(w[i * stride + f * PITCH + l]) & 0x7fffffffu);
            }
            atomicMax(&largest[l], most);
            __syncthreads();
            aim_at(scaler, static_cast<double>(__uint_as_float(largest[l])));
        }
        for (int i = stages - 1; i >= 0; --i) {
            if (!method.active[i]) continue;
            float *slot = slots + (solve.keeps_all ? i : 0) * net.slot * PITCH;
            if (!solve.keeps_all) evaluate(i);
            float *wi = w + i * stride;
            for (int f = warp(); f < net.dim; f += WARPS) {
                const int at = f * PITCH + l;
                float sum = static_cast<float>(method.b[i]) * adj[at];
                if (dense) sum += wi[at];
                for (int j = i + 1; j < stages; ++j) {
                    if (method.active[j] && method.a[j][i] != 0) sum = fmaf(static_cast<float>(method.a[j][i]), w[j * stride + at], sum);
                }
                v[at] = sum;
            }
            for (unsigned attempts = 1;; ++attempts) {
                const float scale = static_cast<float>(scaler.scale), inverse = static_cast<float>(scaler.inverse);
                for (int f = warp(); f < net.dim; f += WARPS) {
                    const int at = f * PITCH + l;
                    cotangents[final_cotangent * PITCH + at] = h * rounded(v[at] * scale, solve.compute);
                }
                if (lives && (scaler.aimed || !scaler.dynamic)) lowest = min(lowest, scaler.exponent), highest = max(highest, scaler.exponent);
                if (threadIdx.x == 0) overflowed = 0;
                __syncthreads();
                pull(net, weights, slot, F32, cotangents, carried, wi);
                bool bad = false;
                for (int f = warp(); f < net.dim; f += WARPS) {
                    const int at = f * PITCH + l;
                    float pulled = wi[at];
                    if (solve.compute != F32) pulled = h * rounded(pulled * inverse_h, solve.compute);
                    bad |= lives && !is_finite(pulled);
                    wi[at] = pulled * inverse;
                }
                if (bad) atomicOr(&overflowed, 1u << l);
                pulls += 1;
                __syncthreads();
                const unsigned lanes = overflowed;
                // Without a dynamic scale, what overflowed shows in λ.
                if (lanes == 0 || !solve.scaler.dynamic) {
                    if (solve.scaler.dynamic) {
                        // The sums over rows have no scale of a row.
                        for (int c = warp(); c < net.cotangents; c += WARPS) cotangents[c * PITCH + l] *= inverse;
                        __syncthreads();
                    }
                    accumulate(net, slot, cotangents, solve.scaler.dynamic ? 1 : inverse, parts);
                    __syncthreads();
                    break;
                }
                if (threadIdx.x == 0) ++retries;
                if (lanes >> l & 1) {
                    const int exponent = scaler.exponent;
                    // The first of the lanes that give up is reported.
                    if (give_up(scaler, attempts, solve.most_attempts)) atomicMax(&gave_up, static_cast<unsigned>(ROWS - l) << 20 | (attempts & 0x7ff) << 9 | static_cast<unsigned>(exponent + 256));
                }
                __syncthreads();
                if (gave_up) break;
            }
            if (gave_up) break;
        }
        if (gave_up) {
            if (warp() == 0 && l == ROWS - static_cast<int>(gave_up >> 20)) {
                solve.reports[walk.row].bad_step = walk.left - 1, solve.reports[walk.row].bad_t = walk.t;
                atomicMin(&solve.report->failure, failure_key(walk.row + 1, gave_up & 0xfffff, EXHAUSTED));
            }
            break;
        }
        scaler.clean += 1;
        if (lives) leave_step(net, method, solve, control, walk, needs_last, adj, w);
        if (rounds % solve.flush == 0) {
            __syncthreads();
            for (int i = threadIdx.x; i < net.weights; i += THREADS) totals[i] += parts[i], parts[i] = 0;
            __syncthreads();
        }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < net.weights; i += THREADS) totals[i] += parts[i];
    if (warp() == 0) atomicMin(&solve.report->smallest, lowest), atomicMax(&solve.report->largest, highest);
    if (threadIdx.x == 0) {
        atomicAdd(&solve.report->retries, retries);
        atomicMax(&solve.report->recomputed, recomputed), atomicMax(&solve.report->pulls, pulls - retries);
    }
}
