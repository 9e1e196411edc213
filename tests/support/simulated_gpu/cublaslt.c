// cuBLASLt: descriptors without content, one algorithm for every product, and one kernel per product. Its header is not
// included, because NVIDIA's packages of some versions lack a header that it needs.

#include "simulated_gpu.h"

#include <stdlib.h>
#include <string.h>

#define DESCRIPTOR_SIZE 256
#define HEURISTIC_RESULT_SIZE 96  // of cublasLtMatmulHeuristicResult_t

static int create(void **descriptor) {
    *descriptor = calloc(1, DESCRIPTOR_SIZE);
    return 0;
}

static int destroy(void *descriptor) {
    free(descriptor);
    return 0;
}

int cublasLtCreate(void **handle) {
    simulated_create_handle();
    return create(handle);
}

int cublasLtDestroy(void *handle) {
    simulated_destroy_handle();
    return destroy(handle);
}

size_t cublasLtGetVersion(void) { return CUDART_VERSION * 10; }

int cublasLtMatmulDescCreate(void **descriptor, int compute_type, int scale_type) { return create(descriptor); }
int cublasLtMatmulDescDestroy(void *descriptor) { return destroy(descriptor); }

int cublasLtMatrixLayoutCreate(void **layout, int type, unsigned long long rows, unsigned long long columns,
                               long long leading_dimension) {
    return create(layout);
}
int cublasLtMatrixLayoutDestroy(void *layout) { return destroy(layout); }

int cublasLtMatmulPreferenceCreate(void **preference) { return create(preference); }
int cublasLtMatmulPreferenceDestroy(void *preference) { return destroy(preference); }

int cublasLtMatmulAlgoGetHeuristic(void *handle, void *operation, void *a, void *b, void *c, void *d, void *preference,
                                   int requested, void *results, int *found) {
    memset(results, 0, (size_t)requested * HEURISTIC_RESULT_SIZE);
    *found = requested > 0;
    return 0;
}

int cublasLtMatmul(void *handle, void *operation, const void *alpha, const void *a, void *a_layout, const void *b,
                   void *b_layout, const void *beta, const void *c, void *c_layout, void *d, void *d_layout,
                   const void *algorithm, void *workspace, size_t workspace_size, cudaStream_t stream) {
    return simulated_launch(stream);
}
