// cuBLAS on the host: matrix products, summed in double.
#include "device.h"

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

// Column-major, as ever.
int gemm(bool ta, bool tb, int m, int n, int k, double alpha, const void *a, int a_type, int64_t lda, int64_t stride_a,
         const void *b, int b_type, int64_t ldb, int64_t stride_b, double beta, void *c, int c_type, int64_t ldc,
         int64_t stride_c, int batch) {
    for (int s = 0; s < batch; ++s) {
        for (int col = 0; col < n; ++col) {
            for (int row = 0; row < m; ++row) {
                double sum = 0;
                for (int i = 0; i < k; ++i) {
                    sum += get(a, a_type, s * stride_a + (ta ? i + row * lda : row + i * lda)) *
                           get(b, b_type, s * stride_b + (tb ? col + i * ldb : i + col * ldb));
                }
                const int64_t at = s * stride_c + row + col * ldc;
                set(c, c_type, at, alpha * sum + (beta == 0 ? 0 : beta * get(c, c_type, at)));
            }
        }
    }
    return 0;
}

} // namespace

#define API extern "C" __attribute__((visibility("default"))) int

API cublasCreate_v2(void **handle) { static int only; *handle = &only; return 0; }
API cublasDestroy_v2(void *) { return 0; }
API cublasSetStream_v2(void *, void *) { return 0; }
API cublasGemmStridedBatchedEx(void *, int ta, int tb, int m, int n, int k, const void *alpha, const void *a, int a_type,
                               int lda, long long stride_a, const void *b, int b_type, int ldb, long long stride_b,
                               const void *beta, void *c, int c_type, int ldc, long long stride_c, int batch, int compute,
                               int) {
    // COMPUTE_16F, COMPUTE_64F, otherwise in f32.
    const int type = compute == 64 || compute == 65 ? F16 : compute == 70 || compute == 71 ? F64 : F32;
    return gemm(ta, tb, m, n, k, get(alpha, type, 0), a, a_type, lda, stride_a, b, b_type, ldb, stride_b,
                get(beta, type, 0), c, c_type, ldc, stride_c, batch);
}
API cublasSgemmStridedBatched(void *, int ta, int tb, int m, int n, int k, const float *alpha, const float *a, int lda,
                              long long stride_a, const float *b, int ldb, long long stride_b, const float *beta, float *c,
                              int ldc, long long stride_c, int batch) {
    return gemm(ta, tb, m, n, k, *alpha, a, F32, lda, stride_a, b, F32, ldb, stride_b, *beta, c, F32, ldc, stride_c, batch);
}
API cublasDgemmStridedBatched(void *, int ta, int tb, int m, int n, int k, const double *alpha, const double *a, int lda,
                              long long stride_a, const double *b, int ldb, long long stride_b, const double *beta, double *c,
                              int ldc, long long stride_c, int batch) {
    return gemm(ta, tb, m, n, k, *alpha, a, F64, lda, stride_a, b, F64, ldb, stride_b, *beta, c, F64, ldc, stride_c, batch);
}
