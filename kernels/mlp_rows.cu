// The forward pass of a small perceptron with adaptive steps of every row, in one launch.
//
// A lane is a row with its own time and step.  All lanes of a block evaluate the stages of their attempts together;
// the first warp decides about the attempt of each lane, and a lane whose row has ended takes the next row of the batch
// at once.  Accepted steps go to a list in device memory, of which every round takes as many places as it accepts
// attempts, side by side.  What a row comes to does not depend on the other rows, nor on the block that takes it.
#include "rows.cuh"

constexpr int SUMS = 5; // of every lane over its features

enum Phase : int {
    IDLE, // no row
    BEGINS, // its first velocity
    PROBES, // a velocity after an explicit Euler step
    READY, // it waits for the next attempt of the block
    TRIES, // it takes part in the attempt under way
    ENDED, // it has reached the end
};

// What all warps read of each lane, and the first one writes.
struct Lanes {
    double t[ROWS], h[ROWS], start[ROWS], end[ROWS]; // start, end: when stages at the ends are evaluated
    int phase[ROWS];
    unsigned long long row[ROWS];
    int taken[ROWS]; // whether y_0 is to be loaded
    int bad[ROWS]; // whether the first velocity is not finite
    // Of an attempt that was accepted: its place in the list, the outputs inside of it, that at its end or −1.
    int accepted[ROWS];
    unsigned long long place[ROWS];
    int from[ROWS], to[ROWS], node[ROWS];
    // Whether any lane is in such a phase, needs the last stage, or returns states inside its step.
    int begins, tries, takes, needs_last, inside;
};

// What the first warp alone holds of each lane.
struct Holder {
    Pace pace;
    Attempt attempt;
    double given; // the length of the first attempt, or 0
    double d1; // the norm of the first velocity
    double last_h, last_error; // of the last attempt, if it was rejected
    int rejected_last;
    int next; // the user's time that is met next
    int returned;
    unsigned evaluations, last; // the last step
    int jumps; // whether the field jumps where the row is
    int exhausted; // no row is left
    Reason stops;
};

// What the rows of a block did.
struct Tally {
    unsigned long long steps, rejected, forced, limited, evaluations, row_evaluations;
    unsigned long long factor, shortest, longest;
};

__device__ inline unsigned long long bits_of(double x) { return static_cast<unsigned long long>(__double_as_longlong(x)); }

// The feature whose error is largest, of the attempt of a lane whose k are there.
__device__ int worst_of(const Net &net, const Method &method, const Control &control, unsigned long long row, double h, const float *y, const float *next, const float *k) {
    int worst = -1;
    double largest = -1;
    for (int f = 0; f < net.dim; ++f) {
        const int at = f * PITCH + lane();
        const double size = fmax(fabs(static_cast<double>(y[at])), fabs(static_cast<double>(next[at])));
        const double rtol = control.rtols ? control.rtols[row * net.dim + f] : control.rtol;
        const double atol = control.atols ? control.atols[row * net.dim + f] : control.atol;
        const float error = weighted(0, h, control.estimate, method.stages, k, net.dim * PITCH, at);
        double ratio = fabs(static_cast<double>(error)) / (atol + rtol * size);
        if (isnan(ratio)) ratio = INFINITY;
        if (ratio > largest) largest = ratio, worst = f;
    }
    return worst;
}

// Gives a row's place away: what it did is noted, and what it did not return is no number.
__device__ void leave(const RowsSolve &solve, const Control &control, int dim, const Holder &my, unsigned long long row, int worst, Tally &tally) {
    const Pace &pace = my.pace;
    RowReport report{};
    report.t = pace.t;
    report.h = my.stops == TIME_STANDS_STILL ? my.attempt.h : my.rejected_last ? my.last_h : 0;
    report.error = my.rejected_last ? my.last_error : 0;
    report.accepted = pace.accepted, report.rejected = pace.rejected;
    report.evaluations = my.evaluations, report.limited = pace.limited, report.factor = pace.factor;
    report.last = my.last;
    report.reason = my.stops;
    report.returned = my.returned;
    report.worst = worst;
    report.rejected_last = my.rejected_last;
    solve.reports[row] = report;
    if (my.stops != NO_REASON) {
        atomicMin(&solve.report->failed, row);
        const int outputs = control.returns_all ? control.point_count : 1;
        // No step counts of a row that the compute precision limits.
        for (int o = my.stops == LIMITED ? control.returns_all : my.returned; o < outputs; ++o) {
            for (int f = 0; f < dim; ++f) solve.out[(o * solve.rows + row) * dim + f] = NAN;
        }
    }
    if (row == 0) solve.report->first = pace.first;
    atomicMax(&tally.steps, static_cast<unsigned long long>(pace.accepted));
    atomicMax(&tally.rejected, static_cast<unsigned long long>(pace.rejected));
    atomicMax(&tally.forced, static_cast<unsigned long long>(pace.forced));
    atomicMax(&tally.limited, static_cast<unsigned long long>(pace.limited));
    atomicMax(&tally.evaluations, static_cast<unsigned long long>(my.evaluations));
    atomicAdd(&tally.row_evaluations, static_cast<unsigned long long>(my.evaluations));
    if (pace.accepted > 0) {
        atomicMax(&tally.factor, bits_of(pace.factor));
        atomicMin(&tally.shortest, bits_of(pace.shortest));
        atomicMax(&tally.longest, bits_of(pace.longest));
    }
}

// Lets lanes without a row take the next ones.  Of the first warp.
__device__ void take_rows(const RowsSolve &solve, const Control &control, Lanes &lanes, Holder &my, int &phase) {
    const int l = lane();
    const bool wants = phase == IDLE && !my.exhausted;
    const unsigned all = __ballot_sync(~0u, wants);
    lanes.taken[l] = 0;
    if (all != 0) {
        const int first = __ffs(static_cast<int>(all)) - 1;
        unsigned long long from = 0;
        if (l == first) from = atomicAdd(&solve.report->queue, static_cast<unsigned long long>(__popc(all)));
        from = __shfl_sync(~0u, from, first);
        const unsigned long long row = from + __popc(all & ((1u << l) - 1));
        // A row behind one that has failed is not asked for, where that is an error.
        const auto failed = *static_cast<const volatile unsigned long long *>(&solve.report->failed);
        if (wants && row < solve.rows && !(control.stops_all && row > failed)) {
            my = Holder{};
            my.given = control.first_step;
            my.jumps = control.starts_at_jump;
            my.pace = pace_from(control, control.first_step);
            lanes.row[l] = row, lanes.taken[l] = 1, lanes.bad[l] = 0;
            phase = BEGINS;
            // The first of the user's times is the start.
            my.returned = control.returns_all;
            my.next = 1;
        } else if (wants) {
            my.exhausted = 1;
        }
    }
}

// What every lane does in the next round; rows that have ended leave.  Of the first warp.
__device__ void plan(const Net &net, const Method &method, const RowsSolve &solve, const Control &control, Lanes &lanes, Holder &my, Tally &tally, const float *y, const float *next, const float *k) {
    const int l = lane();
    int phase = lanes.phase[l];
    if (phase == READY && my.stops == NO_REASON) {
        my.stops = next_attempt(control, my.pace, my.attempt);
        if (my.stops == NO_REASON && net.time && stands_still(my.attempt)) my.stops = TIME_STANDS_STILL;
        if (my.stops == NO_REASON) phase = TRIES;
    }
    const unsigned long long row = lanes.row[l];
    if (phase == ENDED || (phase == READY && my.stops != NO_REASON)) {
        const int worst = my.stops != NO_REASON && my.rejected_last ? worst_of(net, method, control, row, my.last_h, y, next, k) : -1;
        leave(solve, control, net.dim, my, row, worst, tally);
        phase = IDLE;
    }
    take_rows(solve, control, lanes, my, phase);
    lanes.phase[l] = phase;
    lanes.accepted[l] = 0;
    if (phase == TRIES) {
        const Attempt &attempt = my.attempt;
        const bool forward = attempt.h > 0, jumps = attempt.lands >= 0 && control.targets[attempt.lands].jumps;
        lanes.t[l] = attempt.t, lanes.h[l] = attempt.h;
        lanes.start[l] = my.jumps ? beside(attempt.t, forward) : attempt.t;
        lanes.end[l] = jumps ? beside(attempt.end, !forward) : attempt.end;
    } else if (phase == BEGINS) {
        lanes.t[l] = my.pace.t, lanes.h[l] = 0;
        lanes.start[l] = my.jumps ? beside(my.pace.t, control.direction > 0) : my.pace.t;
    }
    const unsigned begins = __ballot_sync(~0u, phase == BEGINS || phase == PROBES);
    const unsigned tries = __ballot_sync(~0u, phase == TRIES), takes = __ballot_sync(~0u, lanes.taken[l]);
    if (l == 0) lanes.begins = begins != 0, lanes.tries = tries != 0, lanes.takes = takes != 0;
}

// The state and the time that stage i is evaluated at.  Every thread has its own features, here and in all sums.
__device__ void stage_state(const Net &net, const Method &method, const Lanes &lanes, int i, int compute, const float *y, const float *k, float *slot) {
    const int l = lane(), phase = lanes.phase[l];
    const bool moves = phase == TRIES || lanes.accepted[l];
    const double h = lanes.h[l];
    for (int f = warp(); f < net.dim; f += WARPS) {
        const int at = f * PITCH + l;
        float sum = y[at];
        if (moves) {
            sum = weighted(sum, h, method.a[i], i, k, net.dim * PITCH, at);
        } else if (phase == PROBES) {
            sum = fmaf(static_cast<float>(h), k[at], sum);
        }
        slot[at] = rounded(sum, compute);
    }
    if (net.time && warp() == 0) {
        const double t = moves             ? stage_time(lanes.t[l], h, lanes.start[l], lanes.end[l], method.c[i])
                         : phase == PROBES ? __dadd_rn(lanes.t[l], h)
                                           : lanes.start[l];
        slot[net.dim * PITCH + l] = static_cast<float>(t);
    }
}

// What the velocity k_i is to lanes that begin: the first one, or that after a probe.  All threads meet inside.
__device__ void begin(const Net &net, const RowsSolve &solve, const Control &control, Lanes &lanes, Holder *holders, double (&sums)[SUMS][WARPS][ROWS], int i, const float *y, float *k) {
    const int l = lane(), phase = lanes.phase[l];
    const unsigned long long row = lanes.row[l];
    double norms[2] = {0, 0};
    if (phase == BEGINS || phase == PROBES) {
        for (int f = warp(); f < net.dim; f += WARPS) {
            const int at = f * PITCH + l;
            const double size = fabs(static_cast<double>(y[at]));
            const double rtol = control.rtols ? control.rtols[row * net.dim + f] : control.rtol;
            const double atol = control.atols ? control.atols[row * net.dim + f] : control.atol;
            const double tolerance = atol + rtol * size;
            const float found = k[i * net.dim * PITCH + at];
            if (phase == BEGINS) {
                k[at] = found;
                if (!is_finite(found)) lanes.bad[l] = 1;
                norms[0] += squared_ratio(size, tolerance, size);
                norms[1] += squared_ratio(found, tolerance, size);
            } else {
                // The part of the difference that can be rounding is left out.
                const double a = k[at], b = found;
                const float moved = fabsf(static_cast<float>(b - a)), noise = static_cast<float>(2 * control.roundoff * fabs(a));
                const float rest = static_cast<float>(static_cast<double>(moved) - noise);
                norms[0] += squared_ratio(rest > 0 ? rest : isnan(rest) ? INFINITY : 0.0f, tolerance, size);
            }
        }
    }
    sums[0][warp()][l] = norms[0], sums[1][warp()][l] = norms[1];
    __syncthreads();
    if (warp() == 0) {
        Holder &my = holders[l];
        int now = phase;
        const double first = finite_norm(sqrt(over_warps(sums[0], l) / net.dim)), second = finite_norm(sqrt(over_warps(sums[1], l) / net.dim));
        if (phase == BEGINS) {
            my.evaluations += 1;
            now = READY;
            if (lanes.bad[l]) {
                my.stops = NOT_FINITE;
            } else if (my.given == 0) {
                now = PROBES;
                my.d1 = second;
                lanes.h[l] = control.direction * probe_length(control, first, second);
            }
        } else if (phase == PROBES) {
            my.evaluations += 1;
            now = READY;
            const double probe = fabs(lanes.h[l]);
            my.pace = pace_from(control, first_length(control, probe, my.d1, first / probe));
        }
        lanes.phase[l] = now;
        const unsigned begins = __ballot_sync(~0u, now == BEGINS || now == PROBES);
        if (l == 0) lanes.begins = begins != 0;
    }
    __syncthreads();
}

// Decides about the attempt of a lane, from the sums of its squared errors.  Of the first warp.
__device__ void decide(const Net &net, const RowsSolve &solve, const Control &control, Lanes &lanes, Holder &my, const double (&sums)[SUMS][WARPS][ROWS], unsigned evaluations) {
    const int l = lane();
    bool accepted = false, inside = false, needs_last = false;
    unsigned jumps = 0;
    if (lanes.phase[l] == TRIES) {
        const double r = finite_norm(sqrt(over_warps(sums[2], l) / net.dim)), plain = finite_norm(sqrt(over_warps(sums[3], l) / net.dim));
        const double stiffness = stiffness_of(over_warps(sums[0], l), over_warps(sums[1], l), over_warps(sums[4], l));
        const Attempt &attempt = my.attempt;
        my.evaluations += evaluations;
        accepted = judge(control, attempt, Measured{r, plain, stiffness}, my.pace, my.stops);
        my.rejected_last = !accepted;
        int phase = READY;
        if (!accepted) {
            my.last_h = attempt.h, my.last_error = r;
        } else {
            int to = my.next;
            while (to < control.point_count && later(control, attempt.end, control.points[to])) ++to;
            lanes.from[l] = control.returns_all ? my.next : to, lanes.to[l] = to;
            my.next = to;
            inside = lanes.from[l] < to;
            const bool done = is_done(control, my.pace);
            needs_last = control.appended && (inside || !done);
            my.evaluations += needs_last;
            my.returned += to - lanes.from[l];
            lanes.node[l] = -1;
            if (to < control.point_count && control.points[to] == attempt.end) {
                lanes.node[l] = control.returns_all ? to : to + 1 == control.point_count ? 0 : -1;
                my.returned += lanes.node[l] >= 0;
                my.next += 1;
            }
            const bool jumps_at_end = attempt.lands >= 0 && control.targets[attempt.lands].jumps;
            jumps = (my.jumps ? JUMPS_AT_START : 0) | (jumps_at_end ? JUMPS_AT_END : 0);
            my.jumps = jumps_at_end;
            if (done) {
                phase = ENDED;
                if (control.limited_is_error && 10ull * my.pace.limited > my.pace.accepted) my.stops = LIMITED;
            } else if (jumps_at_end) {
                phase = BEGINS;
                my.given = fabs(attempt.h);
            }
        }
        lanes.phase[l] = phase;
    }
    lanes.accepted[l] = accepted;
    const unsigned all = __ballot_sync(~0u, accepted);
    if (solve.steps != nullptr && all != 0) {
        const int first = __ffs(static_cast<int>(all)) - 1;
        unsigned long long from = 0;
        if (l == first) from = atomicAdd(&solve.report->recorded, static_cast<unsigned long long>(__popc(all)));
        from = __shfl_sync(~0u, from, first);
        const unsigned long long place = from + __popc(all & ((1u << l) - 1));
        lanes.place[l] = place;
        if (accepted && place < solve.capacity) {
            solve.steps[place] = Recorded{my.attempt.t, my.attempt.h, my.last, jumps};
            my.last = static_cast<unsigned>(place);
        }
    }
    const unsigned any_inside = __ballot_sync(~0u, inside), any_last = __ballot_sync(~0u, needs_last);
    if (l == 0) lanes.inside = any_inside != 0, lanes.needs_last = any_last != 0;
}

// The end of an attempt into `next`, and relative to the tolerance into the sums: its error, with the floor and without, and
// the differences of its stages.
// All threads meet inside and after.
__device__ void measure(const Net &net, const Method &method, const Control &control, const Lanes &lanes, double (&sums)[SUMS][WARPS][ROWS], const float *y, float *next, const float *k, float *error) {
    const int l = lane(), stride = net.dim * PITCH;
    const double h = lanes.h[l];
    const unsigned long long row = lanes.row[l];
    double alpha = 0, beta = 0;
    for (int f = warp(); f < net.dim; f += WARPS) {
        const int at = f * PITCH + l;
        next[at] = weighted(y[at], h, method.b, method.stages, k, stride, at);
        error[at] = weighted(0, h, control.estimate, method.stages, k, stride, at);
        const double size = y[at], speed = fabs(static_cast<double>(k[at]));
        alpha += size * size;
        beta += speed < control.kappa ? control.kappa * control.kappa : speed * speed;
    }
    sums[0][warp()][l] = alpha, sums[1][warp()][l] = beta;
    __syncthreads();
    alpha = sqrt(over_warps(sums[0], l) / net.dim), beta = sqrt(over_warps(sums[1], l) / net.dim);
    const double floor = alpha * control.noise + beta * control.noise * fabs(h);
    const double rounding = alpha * control.roundoff + beta * control.roundoff * fabs(h);
    double floored = 0, plain = 0, moved = 0, apart = 0, least = 0;
    if (lanes.phase[l] == TRIES) {
        for (int f = warp(); f < net.dim; f += WARPS) {
            const int at = f * PITCH + l;
            const double a = fabs(static_cast<double>(y[at])), b = fabs(static_cast<double>(next[at]));
            const double rtol = control.rtols ? control.rtols[row * net.dim + f] : control.rtol;
            const double atol = control.atols ? control.atols[row * net.dim + f] : control.atol;
            const double tolerance = atol + rtol * (a > b ? a : b);
            floored += squared_ratio(error[at], tolerance + floor, b);
            plain += squared_ratio(error[at], tolerance, b);
            // What has no tolerance is not compared.
            const double weight = tolerance + floor > 0 ? 1 / (tolerance + floor) : 0;
            const double by = weighted(0, h, control.velocities, method.stages, k, stride, at) * weight;
            const double from = weighted(0, h, control.states, method.stages, k, stride, at) * weight;
            moved += by * by, apart += from * from, least += rounding * weight * (rounding * weight);
        }
    }
    __syncthreads(); // all have read what was there before
    sums[0][warp()][l] = moved, sums[1][warp()][l] = apart, sums[4][warp()][l] = least;
    sums[2][warp()][l] = floored, sums[3][warp()][l] = plain;
    __syncthreads();
}

// Returns the states inside the accepted steps: each warp takes other outputs.
__device__ void interpolate(const Net &net, const Method &method, const RowsSolve &solve, const Control &control, const Lanes &lanes, const float *y, const float *k) {
    const int l = lane();
    if (!lanes.accepted[l]) return;
    const double t = lanes.t[l], h = lanes.h[l];
    for (int o = lanes.from[l] + warp(); o < lanes.to[l]; o += WARPS) {
        const double x = (control.points[o] - t) / h;
        double weights[MOST_STAGES];
        for (int i = 0; i < method.stages; ++i) weights[i] = weight_at(control, method, i, x);
        float *out = solve.out + (o * solve.rows + lanes.row[l]) * net.dim;
        for (int f = 0; f < net.dim; ++f) {
            const int at = f * PITCH + l;
            out[f] = weighted(y[at], h, weights, method.stages, k, net.dim * PITCH, at);
        }
    }
}

// Keeps y_n of the accepted steps, moves to their ends, and returns what is returned there.
__device__ void go_on(const Net &net, const Method &method, const RowsSolve &solve, const Lanes &lanes, float *y, const float *next, float *k) {
    const int l = lane();
    if (!lanes.accepted[l]) return;
    const Sink kept{solve.kept, solve.store, solve.store};
    const float *last = k + (method.stages - 1) * net.dim * PITCH;
    const bool keeps = solve.kept != nullptr && lanes.place[l] < solve.capacity;
    const int node = lanes.node[l];
    float *out = solve.out + (max(node, 0) * solve.rows + lanes.row[l]) * net.dim;
    for (int f = warp(); f < net.dim; f += WARPS) {
        const int at = f * PITCH + l;
        const float x[FOUR] = {y[at], 0, 0, 0};
        if (keeps) store<float>(kept, lanes.place[l] * net.dim + f, 1, x);
        y[at] = next[at];
        k[at] = last[at];
        if (node >= 0) out[f] = next[at];
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 2)
    mlp_rows_forward(const __grid_constant__ Net net, const __grid_constant__ Method method, const __grid_constant__ RowsSolve solve) {
    DYNAMIC_SHARED(room);
    __shared__ Lanes lanes;
    __shared__ Holder holders[ROWS];
    __shared__ Tally tally;
    __shared__ double sums[SUMS][WARPS][ROWS];
    __shared__ Control control;
    load_control(*solve.control, control);
    __syncthreads();
    float *weights = room;
    float *slot = weights + net.weights;
    float *y = slot + net.slot * PITCH;
    float *next = y + net.dim * PITCH;
    float *k = next + net.dim * PITCH;
    const int l = lane(), stages = method.stages - control.appended;
    if (threadIdx.x < ROWS) {
        lanes.phase[l] = IDLE, lanes.row[l] = 0, holders[l] = Holder{};
        lanes.t[l] = lanes.h[l] = lanes.start[l] = lanes.end[l] = control.start;
    }
    if (threadIdx.x == 0) tally = Tally{}, tally.shortest = ~0ull;
    for (int i = threadIdx.x; i < (2 + method.stages) * net.dim * PITCH; i += THREADS) y[i] = 0;
    unsigned long long evaluations = 0;
    bool packed = false;
    for (;;) {
        __syncthreads();
        if (warp() == 0) plan(net, method, solve, control, lanes, holders[l], tally, y, next, k);
        __syncthreads();
        if (!lanes.begins && !lanes.tries) break;
        if (!packed) pack(net, weights), packed = true;
        if (lanes.takes && lanes.taken[l]) {
            for (int f = warp(); f < net.dim; f += WARPS) {
                const uint64_t from = lanes.row[l] * net.dim + f;
                const float x = solve.y0[from];
                y[f * PITCH + l] = x;
                if (!is_finite(x)) atomicMin(&solve.report->failure, failure_key(0, 0, SOLUTION));
                if (control.returns_all) solve.out[from] = x;
            }
        }
        for (int i = 1; lanes.begins ? i < max(stages, 2) : lanes.tries && i < stages; ++i) {
            stage_state(net, method, lanes, i, solve.compute, y, k, slot);
            __syncthreads();
            velocity(net, weights, slot, solve.compute, k + i * net.dim * PITCH);
            evaluations += 1;
            if (lanes.begins) begin(net, solve, control, lanes, holders, sums, i, y, k);
        }
        if (!lanes.tries) continue;
        measure(net, method, control, lanes, sums, y, next, k, slot);
        if (warp() == 0) decide(net, solve, control, lanes, holders[l], sums, stages - 1);
        __syncthreads();
        if (lanes.needs_last) {
            const int last = method.stages - 1;
            stage_state(net, method, lanes, last, solve.compute, y, k, slot);
            __syncthreads();
            velocity(net, weights, slot, solve.compute, k + last * net.dim * PITCH);
            evaluations += 1;
        }
        if (lanes.inside) {
            interpolate(net, method, solve, control, lanes, y, k);
            __syncthreads();
        }
        go_on(net, method, solve, lanes, y, next, k);
    }
    if (threadIdx.x == 0) {
        RowsReport &report = *solve.report;
        atomicMax(&report.steps, tally.steps), atomicMax(&report.rejected, tally.rejected);
        atomicMax(&report.forced, tally.forced), atomicMax(&report.limited, tally.limited);
        atomicMax(&report.evaluations, tally.evaluations), atomicAdd(&report.row_evaluations, tally.row_evaluations);
        atomicAdd(&report.tile_evaluations, evaluations);
        atomicMax(&report.factor, tally.factor), atomicMin(&report.shortest, tally.shortest), atomicMax(&report.longest, tally.longest);
    }
}
