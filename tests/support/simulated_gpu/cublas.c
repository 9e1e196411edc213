// cuBLAS: a handle is bound to a stream, and every computation launches one kernel on it; see build.py.

#include "simulated_gpu.h"

#include <stdlib.h>

typedef struct {
    cudaStream_t stream;  // first, where the generated computations find it
    int pointer_mode, math_mode;
} Handle;

int cublasCreate_v2(Handle **handle) {
    simulated_create_handle();
    *handle = calloc(1, sizeof **handle);
    return 0;
}

int cublasDestroy_v2(Handle *handle) {
    simulated_destroy_handle();
    free(handle);
    return 0;
}

int cublasSetStream_v2(Handle *handle, cudaStream_t stream) {
    handle->stream = stream;
    return 0;
}

int cublasGetStream_v2(Handle *handle, cudaStream_t *stream) {
    *stream = handle->stream;
    return 0;
}

int cublasSetPointerMode_v2(Handle *handle, int mode) {
    handle->pointer_mode = mode;
    return 0;
}

int cublasGetPointerMode_v2(Handle *handle, int *mode) {
    *mode = handle->pointer_mode;
    return 0;
}

int cublasSetMathMode(Handle *handle, int mode) {
    handle->math_mode = mode;
    return 0;
}

int cublasGetMathMode(Handle *handle, int *mode) {
    *mode = handle->math_mode;
    return 0;
}

const char *cublasGetStatusString(int status) { return "a status of the simulated cuBLAS"; }
const char *cublasGetStatusName(int status) { return "a status of the simulated cuBLAS"; }
