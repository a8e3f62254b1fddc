// cuBLAS on the host: matrix products, summed in double, on the stream of their handle.
#include "device.h"

extern "C" int host_cuda_submit(void *stream, void (*work)(const void *), const void *data, size_t bytes);

namespace {

enum { F32 = 0, F64 = 1, F16 = 2, BF16 = 14 };

double get(const void *p, int type, int64_t i) {
    switch (type) {
    case F16: return static_cast<const __half *>(p)[i];
    case BF16: return static_cast<const __nv_bfloat16 *>(p)[i];
    case F32: return static_cast<const float *>(p)[i];
    default: return static_cast<const double *>(p)[i];
    }
}

void set(void *p, int type, int64_t i, double x) {
    switch (type) {
    case F16: static_cast<__half *>(p)[i] = static_cast<float>(x); break;
    case BF16: static_cast<__nv_bfloat16 *>(p)[i] = static_cast<float>(x); break;
    case F32: static_cast<float *>(p)[i] = static_cast<float>(x); break;
    default: static_cast<double *>(p)[i] = x;
    }
}

struct Matrices {
    const void *p;
    int type;
    int64_t ld, stride;
};

// Column-major, as ever.
struct Product {
    bool ta, tb;
    int m, n, k, batch;
    double alpha, beta;
    Matrices a, b, c;

    void run() const {
        for (int s = 0; s < batch; ++s) {
            for (int col = 0; col < n; ++col) {
                for (int row = 0; row < m; ++row) {
                    double sum = 0;
                    for (int i = 0; i < k; ++i) {
                        sum += get(a.p, a.type, s * a.stride + (ta ? i + row * a.ld : row + i * a.ld)) *
                               get(b.p, b.type, s * b.stride + (tb ? col + i * b.ld : i + col * b.ld));
                    }
                    const int64_t at = s * c.stride + row + col * c.ld;
                    set(const_cast<void *>(c.p), c.type, at, alpha * sum + (beta == 0 ? 0 : beta * get(c.p, c.type, at)));
                }
            }
        }
    }
};

struct Handle {
    void *stream;
};

int submit(void *handle, const Product &product) {
    const auto work = [](const void *data) { static_cast<const Product *>(data)->run(); };
    return host_cuda_submit(static_cast<Handle *>(handle)->stream, work, &product, sizeof product) == 0 ? 0 : 13;
}

} // namespace

#define API extern "C" __attribute__((visibility("default"))) int

API cublasCreate_v2(void **handle) { *handle = new Handle{nullptr}; return 0; }
API cublasDestroy_v2(void *handle) { delete static_cast<Handle *>(handle); return 0; }
API cublasSetStream_v2(void *handle, void *stream) { static_cast<Handle *>(handle)->stream = stream; return 0; }
API cublasGemmStridedBatchedEx(void *handle, int ta, int tb, int m, int n, int k, const void *alpha, const void *a,
                               int a_type, int lda, long long stride_a, const void *b, int b_type, int ldb,
                               long long stride_b, const void *beta, void *c, int c_type, int ldc, long long stride_c,
                               int batch, int compute, int) {
    // COMPUTE_16F, COMPUTE_64F, otherwise in f32.
    const int type = compute == 64 || compute == 65 ? F16 : compute == 70 || compute == 71 ? F64 : F32;
    return submit(handle, {ta != 0, tb != 0, m, n, k, batch, get(alpha, type, 0), get(beta, type, 0),
                           {a, a_type, lda, stride_a}, {b, b_type, ldb, stride_b}, {c, c_type, ldc, stride_c}});
}
API cublasSgemmStridedBatched(void *handle, int ta, int tb, int m, int n, int k, const float *alpha, const float *a, int lda,
                              long long stride_a, const float *b, int ldb, long long stride_b, const float *beta, float *c,
                              int ldc, long long stride_c, int batch) {
    return submit(handle, {ta != 0, tb != 0, m, n, k, batch, *alpha, *beta,
                           {a, F32, lda, stride_a}, {b, F32, ldb, stride_b}, {c, F32, ldc, stride_c}});
}
API cublasDgemmStridedBatched(void *handle, int ta, int tb, int m, int n, int k, const double *alpha, const double *a, int lda,
                              long long stride_a, const double *b, int ldb, long long stride_b, const double *beta, double *c,
                              int ldc, long long stride_c, int batch) {
    return submit(handle, {ta != 0, tb != 0, m, n, k, batch, *alpha, *beta,
                           {a, F64, lda, stride_a}, {b, F64, ldb, stride_b}, {c, F64, ldc, stride_c}});
}
