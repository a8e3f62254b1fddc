// The decision about each adaptive step of a row, from numbers only.  The law is that of src/adaptive.
#pragma once

#include "net.cuh"

constexpr int DEGREE = 8; // coefficients of a weight of the interpolant
constexpr int MOST_NON_FINITE = 10;

// A time at which a step must end.
struct Target {
    double t;
    int jumps; // whether the field jumps there
    int unused;
};

// As `NetControl` in src/ops/cuda/mlp/control.rs.
struct Control {
    double start, direction, order;
    double p, i, d, safety, least, most; // of the controller
    double first_step; // 0 if it is to be found
    double min_step, max_step, longest;
    double rtol, atol;
    const float *rtols, *atols; // of every element instead, or nothing
    double noise, kappa; // u ‖b − b̂‖₂, 0 without a floor; and κ
    double roundoff; // u
    double stable; // |h| times the largest rate is not more, or 0 without such a limit
    double estimate[MOST_STAGES]; // b − b̂
    double states[MOST_STAGES], velocities[MOST_STAGES]; // Σ_i d_i a_ij, and d: of the differences of stages
    double interpolant[MOST_STAGES][DEGREE]; // coefficients of x, x², …
    const Target *targets;
    const double *points; // the user's times
    uint64_t max_steps;
    int target_count, point_count;
    int appended; // whether the last stage is not the method's own
    int returns_all; // or the last state alone
    int limited_is_error;
    int stops_all; // whether a row that stops is an error
    int starts_at_jump;
    int limits_stability; // whether steps are within the stability of the method
};
static_assert(sizeof(Control) % sizeof(uint64_t) == 0, "it is copied by words");

// Why a row does not reach the end, or is not to count; as `Reason` in src/ops/cuda/mlp/rows.rs.
enum Reason : int { NO_REASON, ATTEMPTS_USED, UNDERFLOW_OF_STEP, NOT_FINITE, LIMITED, TIME_STANDS_STILL };

// Where a row is, and what it has done.
struct Pace {
    double t;
    double h; // the length of the next attempt, positive
    double before[2]; // r of the last two accepted steps
    double refused; // the end of the last attempt, if it was rejected
    double factor; // the largest error without a floor
    double shortest, longest, first; // accepted steps
    double controlled; // the length of the last one whose error has determined the next length, or 0
    double rate; // the largest of the field, where an accepted step has last shown it, or 0
    int target; // the next one
    int non_finite, has_refused;
    unsigned accepted, rejected, forced, limited;
};

struct Attempt {
    double t, h, end;
    double wanted; // the length that would have been tried but for a target
    int lands; // the target that it ends on, or −1
    int forced; // as short as it may be, and accepted in any case
};

__device__ inline Pace pace_from(const Control &control, double h) {
    Pace pace{};
    pace.t = control.start;
    pace.h = h;
    pace.before[0] = pace.before[1] = 1;
    return pace;
}

__device__ inline double clamped(double x, double least, double most) { return x < least ? least : x > most ? most : x; }

__device__ inline bool is_done(const Control &control, const Pace &pace) { return pace.target == control.target_count; }

// The next attempt.  It never goes beyond a target, and ends exactly on one that is near.
__device__ inline Reason next_attempt(const Control &control, const Pace &pace, Attempt &attempt) {
    if (uint64_t{pace.accepted} + pace.rejected >= control.max_steps) return ATTEMPTS_USED;
    const double target = control.targets[pace.target].t, left = fabs(target - pace.t);
    attempt.t = pace.t;
    attempt.wanted = clamped(pace.h, control.min_step, control.max_step);
    attempt.forced = pace.h <= control.min_step;
    if (attempt.wanted >= left * (1.0 - 1e-10)) {
        attempt.end = target, attempt.lands = pace.target;
    } else {
        // Two equal steps rather than one and what it leaves.
        const double h = attempt.wanted > left / 2 ? left / 2 : attempt.wanted;
        attempt.end = __dadd_rn(pace.t, control.direction * h), attempt.lands = -1;
    }
    attempt.h = attempt.end - pace.t;
    const bool again = pace.has_refused && pace.refused == attempt.end && !attempt.forced;
    if (attempt.h == 0 || !is_finite(attempt.h) || again) return pace.non_finite == 0 ? UNDERFLOW_OF_STEP : NOT_FINITE;
    return NO_REASON;
}

// Whether an attempt begins and ends at one number of f32, in which the field reads time.
__device__ inline bool stands_still(const Attempt &attempt) {
    return static_cast<float>(attempt.t) == static_cast<float>(__dadd_rn(attempt.t, attempt.h));
}

// How much larger than its rounding a difference of stages must be; as in adaptive/measured.rs.
constexpr double SEEN = 16;

// What an attempt was measured to be; as in adaptive/measured.rs.
struct Measured {
    double r, plain;
    double stiffness; // negative where it is not seen
};

// |h| times the largest rate, from the squares of h Σ d_i k_i and of Σ d_i Y_i and the rounding of a stage.
__device__ inline double stiffness_of(double moved, double apart, double rounding) {
    const double ratio = sqrt(moved / apart);
    return apart > SEEN * SEEN * rounding && apart < INFINITY && is_finite(ratio) ? ratio : -1;
}

// An error from which on it determines the length of the next step; as in adaptive/pace.rs.
constexpr double CONTROLS = 0.1;

// What a length is multiplied with after an error r.
__device__ inline double factor_of(const Control &control, double r, const Pace &pace, bool accepted) {
    double factor = control.least;
    if (r == 0) {
        factor = control.most;
    } else if (is_finite(r)) {
        const bool first = pace.accepted == 0; // its length was only a guess
        const double p = first ? 0 : control.p, i = first ? 1 : control.i, d = first ? 0 : control.d, m = control.order;
        factor = control.safety * pow(r, -(p + i + d) / m);
        if (p + 2 * d != 0) factor *= pow(pace.before[0], (p + 2 * d) / m);
        if (d != 0) factor *= pow(pace.before[1], -d / m);
    }
    // What was rejected is tried again in a shorter step, even without any safety; as SHORTER in adaptive/controller.rs.
    const double shorter = fmax(fmin(control.safety, 0.999), control.least);
    return accepted ? clamped(factor, 1, fmax(control.most, 1.0)) : clamped(factor, control.least, shorter);
}

// Judges an attempt.
__device__ inline bool judge(const Control &control, const Attempt &attempt, const Measured &measured, Pace &pace, Reason &reason) {
    const double r = measured.r, plain = measured.plain;
    const bool accepted = r <= 1 || (attempt.forced && is_finite(r));
    const double length = fabs(attempt.h);
    const double next = length * factor_of(control, r, pace, accepted);
    if (!accepted) {
        pace.rejected += 1;
        pace.non_finite = is_finite(r) ? 0 : pace.non_finite + 1;
        if (pace.non_finite >= MOST_NON_FINITE || attempt.forced) {
            reason = NOT_FINITE;
            return false;
        }
        pace.h = next;
        pace.refused = attempt.end, pace.has_refused = 1;
        return false;
    }
    pace.non_finite = 0, pace.has_refused = 0;
    if (pace.accepted == 0) pace.shortest = pace.longest = pace.first = length;
    pace.accepted += 1;
    pace.forced += r > 1;
    pace.limited += r <= 1 && plain > 1;
    pace.factor = fmax(pace.factor, plain);
    pace.shortest = fmin(pace.shortest, length), pace.longest = fmax(pace.longest, length);
    // A step that a target has shortened says nothing about the length that the problem wants.
    pace.h = length < attempt.wanted ? fmax(next, attempt.wanted) : next;
    if (attempt.lands >= 0 && control.targets[attempt.lands].jumps) {
        pace.controlled = pace.rate = 0; // nothing is known of the field behind it
    } else if (control.limits_stability) {
        if (measured.stiffness >= 0) pace.rate = measured.stiffness / length;
        if (control.stable > 0 && pace.rate > 0) pace.h = fmin(pace.h, control.stable / pace.rate);
        // The state has come to rest: see adaptive/pace.rs.
        if (r == 0 && pace.controlled > 0) pace.h = fmin(pace.h, control.safety * pace.controlled);
        if (r >= CONTROLS) pace.controlled = length;
    }
    if (r > 0) pace.before[1] = pace.before[0], pace.before[0] = r;
    pace.t = attempt.end;
    pace.target += attempt.lands >= 0;
    return true;
}

// The length that is tried where the state or its velocity gives none: the time changes by it in f64.
__device__ inline double shortest_probe(const Control &control) { return fmax(1e-6, 64 * 0x1p-52 * fabs(control.start)); }

// The length of the first attempt but for limits, from ‖y0‖ and ‖f0‖ in the norm of the tolerance (Hairer, Nørsett &
// Wanner I, §II.4): the first part, which says where to evaluate once more.
__device__ inline double probe_length(const Control &control, double d0, double d1) {
    // A tolerance of zero, such as a relative one of a component that is zero, makes the norm infinite.
    const bool says_nothing = !is_finite(d0) || !is_finite(d1);
    return fmin(d0 < 1e-5 || d1 < 1e-5 || says_nothing ? shortest_probe(control) : 0.01 * d0 / d1, control.longest);
}

// The second part, from the difference d2 of the two evaluations divided by the length of the probe.
__device__ inline double first_length(const Control &control, double probe, double d1, double d2) {
    const double d = fmax(d1, d2);
    double h = d <= 1e-15 ? fmax(shortest_probe(control), probe * 1e-3) : pow(0.01 / d, 1.0 / control.order);
    h = fmin(h, 100 * probe);
    return is_finite(h) && h > 0 ? fmin(h, control.longest) : probe;
}

// b_i(x).
__device__ inline double weight_at(const Control &control, const Method &method, int i, double x) {
    if (x == 1) return method.b[i];
    double sum = 0;
    for (int p = DEGREE; p-- > 0;) sum = (sum + control.interpolant[i][p]) * x;
    return sum;
}

// The next number above or below.
__device__ inline double neighbour(double t, bool above) {
    if (t == 0) return above ? __longlong_as_double(1) : -__longlong_as_double(1);
    const long long bits = __double_as_longlong(t);
    return __longlong_as_double((t > 0) == above ? bits + 1 : bits - 1);
}

// A time above or below t, beyond every time that differs from t by rounding only; as `beside` in src/time.rs.
__device__ inline double beside(double t, bool above) {
    const double by = __dmul_rn(8 * 2.220446049250313e-16, fabs(t)), next = neighbour(t, above);
    return above ? fmax(__dadd_rn(t, by), next) : fmin(__dadd_rn(t, -by), next);
}

// The square of error / tolerance: an error of zero needs no tolerance, and a state that is not finite is seen in any
// case.
__device__ inline double squared_ratio(double error, double tolerance, double state) {
    const double ratio = error / tolerance;
    const double square = error == 0 ? 0 : ratio * ratio;
    return state < INFINITY ? square : INFINITY;
}

__device__ inline double finite_norm(double x) { return x < INFINITY ? x : INFINITY; }
