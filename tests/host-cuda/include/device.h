// CUDA C++ for a host compiler: what kernels say, in terms of threads that one core takes turns with.
#pragma once

#include <cassert>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#define HOST_CUDA
#define __CUDA_ARCH__ 800
#define __CUDACC_VER_MAJOR__ 13
#define __CUDACC_VER_MINOR__ 0
#define CUDA_VERSION 13000
#ifndef __global__
#define __global__
#endif
#define __device__
#define __host__
#define __constant__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
// Blocks run one after the other, so they can share what belongs to each of them.
#define __shared__ static

struct Index {
    unsigned x, y, z;
};
extern Index threadIdx, blockIdx, blockDim, gridDim;

void __syncthreads();
int __syncthreads_or(int);
void __syncwarp(unsigned = ~0u);
// Room that a launch asked for.
void *dynamic_shared();
// What the lane of this warp gave to the same call.
uint64_t shuffled(uint64_t bits, unsigned from);

template <class T> T shuffle(T x, unsigned from) {
    uint64_t bits = 0;
    std::memcpy(&bits, &x, sizeof x);
    bits = shuffled(bits, from);
    std::memcpy(&x, &bits, sizeof x);
    return x;
}
template <class T> T __shfl_xor_sync(unsigned, T x, int mask, int = 32) { return shuffle(x, (threadIdx.x % 32) ^ mask); }
template <class T> T __shfl_down_sync(unsigned, T x, int by, int = 32) {
    const unsigned lane = threadIdx.x % 32;
    return shuffle(x, lane + by < 32 ? lane + by : lane);
}
template <class T> T __shfl_sync(unsigned, T x, int from, int = 32) { return shuffle(x, from); }

// Which lanes of this warp say yes.
unsigned balloted(bool);
inline unsigned __ballot_sync(unsigned, int flag) { return balloted(flag != 0); }
inline int __any_sync(unsigned, int flag) { return balloted(flag != 0) != 0; }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }

template <class T, class X> T atomicAdd(T *p, X given) { T old = *p, x = given; *p = old + x; return old; }
template <class T, class X> T atomicMin(T *p, X given) { T old = *p, x = given; if (x < old) *p = x; return old; }
template <class T, class X> T atomicMax(T *p, X given) { T old = *p, x = given; if (old < x) *p = x; return old; }
template <class T> T atomicOr(T *p, T x) { T old = *p; *p = old | x; return old; }
template <class T> T atomicCAS(T *p, T expected, T x) { T old = *p; if (old == expected) *p = x; return old; }

struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(16) double2 { double x, y; };
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

template <class To, class From> To bits_as(From x) {
    static_assert(sizeof(To) == sizeof(From));
    To y;
    std::memcpy(&y, &x, sizeof y);
    return y;
}
inline unsigned __float_as_uint(float x) { return bits_as<unsigned>(x); }
inline float __uint_as_float(unsigned x) { return bits_as<float>(x); }
inline int __float_as_int(float x) { return bits_as<int>(x); }
inline float __int_as_float(int x) { return bits_as<float>(x); }
inline long long __double_as_longlong(double x) { return bits_as<long long>(x); }
inline double __longlong_as_double(long long x) { return bits_as<double>(x); }
// One operation each, for the host compiler contracts none.
inline double __dadd_rn(double x, double y) { return x + y; }
inline double __dsub_rn(double x, double y) { return x - y; }
inline double __dmul_rn(double x, double y) { return x * y; }
inline float __fmul_rn(float x, float y) { return x * y; }
inline float __fadd_rn(float x, float y) { return x + y; }
inline float __fsub_rn(float x, float y) { return x - y; }
template <class T> T __ldg(const T *p) { return *p; }
inline float rsqrtf(float x) { return 1 / std::sqrt(x); }
inline float normcdff(float x) { return 0.5f * erfcf(-x * 0.70710678f); }
inline double normcdf(double x) { return 0.5 * erfc(-x * M_SQRT1_2); }
template <class A, class B> auto min(A a, B b) { return b < a ? b : a; }
template <class A, class B> auto max(A a, B b) { return a < b ? b : a; }
using std::isinf;
using std::isnan;
using std::signbit;

// A number of 16 bits, computed with as float and rounded when stored.
template <class Format> struct Narrow {
    uint16_t bits;
    Narrow() = default;
    template <class T, class = std::enable_if_t<std::is_arithmetic_v<T>>> Narrow(T x) : bits(Format::round(x)) {}
    template <class Other> explicit Narrow(Narrow<Other> x) : Narrow(static_cast<float>(x)) {}
    template <class Other> Narrow &operator=(Narrow<Other> x) { return *this = Narrow(static_cast<float>(x)); }
    template <class T, class = std::enable_if_t<std::is_arithmetic_v<T>>> Narrow &operator=(T x) { bits = Format::round(x); return *this; }
    operator float() const { return Format::widen(bits); }
    Narrow operator-() const { return -static_cast<float>(*this); }
    Narrow &operator+=(float x) { return *this = static_cast<float>(*this) + x; }
    Narrow &operator*=(float x) { return *this = static_cast<float>(*this) * x; }
    Narrow &operator/=(float x) { return *this = static_cast<float>(*this) / x; }
    friend Narrow operator+(Narrow a, Narrow b) { return static_cast<float>(a) + static_cast<float>(b); }
    friend Narrow operator-(Narrow a, Narrow b) { return static_cast<float>(a) - static_cast<float>(b); }
    friend Narrow operator*(Narrow a, Narrow b) { return static_cast<float>(a) * static_cast<float>(b); }
    friend Narrow operator/(Narrow a, Narrow b) { return static_cast<float>(a) / static_cast<float>(b); }
    friend bool operator<(Narrow a, Narrow b) { return static_cast<float>(a) < static_cast<float>(b); }
    friend bool operator>(Narrow a, Narrow b) { return static_cast<float>(a) > static_cast<float>(b); }
    friend bool operator<=(Narrow a, Narrow b) { return static_cast<float>(a) <= static_cast<float>(b); }
    friend bool operator>=(Narrow a, Narrow b) { return static_cast<float>(a) >= static_cast<float>(b); }
    friend bool operator==(Narrow a, Narrow b) { return static_cast<float>(a) == static_cast<float>(b); }
    friend bool operator!=(Narrow a, Narrow b) { return static_cast<float>(a) != static_cast<float>(b); }
};

struct Half {
    template <class T> static uint16_t round(T x) { return bits_as<uint16_t>(static_cast<_Float16>(x)); }
    static float widen(uint16_t bits) { return static_cast<float>(bits_as<_Float16>(bits)); }
};
struct Bfloat {
    template <class T> static uint16_t round(T wide) {
        const float x = static_cast<float>(wide);
        const uint32_t bits = bits_as<uint32_t>(x);
        if (std::isnan(x)) return static_cast<uint16_t>(bits >> 16 | 0x40);
        return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
    }
    static float widen(uint16_t bits) { return bits_as<float>(static_cast<uint32_t>(bits) << 16); }
};
using __half = Narrow<Half>;
using half = __half;
using __nv_bfloat16 = Narrow<Bfloat>;
struct __half2 { __half x, y; };
struct __nv_bfloat162 { __nv_bfloat16 x, y; };

inline float __half2float(__half x) { return x; }
inline __half __float2half(float x) { return x; }
inline __half __float2half_rn(float x) { return x; }
inline float __bfloat162float(__nv_bfloat16 x) { return x; }
inline __nv_bfloat16 __float2bfloat16(float x) { return x; }
inline __nv_bfloat16 __float2bfloat16_rn(float x) { return x; }
inline float2 __bfloat1622float2(__nv_bfloat162 x) { return {x.x, x.y}; }
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) { return {x, y}; }
inline __nv_bfloat162 __float22bfloat162_rn(float2 x) { return {x.x, x.y}; }
inline unsigned short __half_as_ushort(__half x) { return x.bits; }
inline __half __ushort_as_half(unsigned short x) { return bits_as<__half>(x); }
inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 x) { return x.bits; }
inline __nv_bfloat16 __ushort_as_bfloat16(unsigned short x) { return bits_as<__nv_bfloat16>(x); }
template <class F> bool __hisnan(Narrow<F> x) { return std::isnan(static_cast<float>(x)); }
template <class F> Narrow<F> __hmax_nan(Narrow<F> a, Narrow<F> b) { return __hisnan(a) ? a : __hisnan(b) || a < b ? b : a; }
template <class F> Narrow<F> __hmin_nan(Narrow<F> a, Narrow<F> b) { return __hisnan(a) ? a : __hisnan(b) || b < a ? b : a; }
template <class F> Narrow<F> __habs(Narrow<F> x) { return std::fabs(static_cast<float>(x)); }
template <class F> Narrow<F> hsqrt(Narrow<F> x) { return std::sqrt(static_cast<float>(x)); }
template <class F> Narrow<F> hexp(Narrow<F> x) { return std::exp(static_cast<float>(x)); }
template <class F> Narrow<F> hlog(Narrow<F> x) { return std::log(static_cast<float>(x)); }
template <class F> Narrow<F> hsin(Narrow<F> x) { return std::sin(static_cast<float>(x)); }
template <class F> Narrow<F> hcos(Narrow<F> x) { return std::cos(static_cast<float>(x)); }

template <class Pair> Pair __hadd2(Pair a, Pair b) { return {a.x + b.x, a.y + b.y}; }
template <class Pair> Pair __hsub2(Pair a, Pair b) { return {a.x - b.x, a.y - b.y}; }
template <class Pair> Pair __hmul2(Pair a, Pair b) { return {a.x * b.x, a.y * b.y}; }
template <class Pair> Pair __h2div(Pair a, Pair b) { return {a.x / b.x, a.y / b.y}; }
template <class Pair> Pair __hmax2(Pair a, Pair b) { return {a.x < b.x ? b.x : a.x, a.y < b.y ? b.y : a.y}; }
template <class Pair> Pair __hmin2(Pair a, Pair b) { return {b.x < a.x ? b.x : a.x, b.y < a.y ? b.y : a.y}; }

// Eight bits are named by candle's kernels, and used by nobody here.
enum { __NV_E4M3 };
struct __nv_fp8_e4m3 {
    uint8_t __x;
    __nv_fp8_e4m3() = default;
    template <class T> __nv_fp8_e4m3(T) { std::abort(); }
    operator float() const { std::abort(); }
};
inline __half __nv_cvt_fp8_to_halfraw(uint8_t, int) { std::abort(); }

namespace cuda::std {
template <class T> using numeric_limits = ::std::numeric_limits<T>;
}

// Kernels by name, with their arguments as launches give them.
struct Registered {
    Registered(const char *name, void (*call)(void **), std::vector<size_t> sizes);
};
template <class... A> std::vector<size_t> sizes_of(void (*)(A...)) { return {sizeof(std::remove_reference_t<A>)...}; }
template <class... A, size_t... I> void unpack(void (*kernel)(A...), void **arguments, std::index_sequence<I...>) {
    kernel(*static_cast<std::remove_reference_t<A> *>(arguments[I])...);
}
template <class... A> void unpack(void (*kernel)(A...), void **arguments) {
    unpack(kernel, arguments, std::index_sequence_for<A...>());
}
#define REGISTER(name) static Registered registered_##name(#name, [](void **arguments) { unpack(name, arguments); }, sizes_of(name));
