// cuDNN: a handle is bound to a stream, descriptors have no content, and every computation launches one kernel on the
// stream of its handle; see build.py for those that are not written here. No computation needs a workspace.

#include "simulated_gpu.h"

#include <cudnn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

#define DESCRIPTOR_SIZE 256

typedef struct {
    cudaStream_t stream;  // first, where the generated computations find it
} Handle;

size_t cudnnGetVersion(void) { return CUDNN_VERSION; }
size_t cudnnGetCudartVersion(void) { return CUDART_VERSION; }
const char *cudnnGetErrorString(cudnnStatus_t status) { return "a status of the simulated cuDNN"; }
void cudnnGetLastErrorString(char *message, size_t size) { snprintf(message, size, "none"); }

cudnnStatus_t cudnnCreate(cudnnHandle_t *handle) {
    simulated_create_handle();
    *handle = calloc(1, sizeof(Handle));
    return CUDNN_STATUS_SUCCESS;
}

cudnnStatus_t cudnnDestroy(cudnnHandle_t handle) {
    simulated_destroy_handle();
    free(handle);
    return CUDNN_STATUS_SUCCESS;
}

cudnnStatus_t cudnnSetStream(cudnnHandle_t handle, cudaStream_t stream) {
    ((Handle *)handle)->stream = stream;
    return CUDNN_STATUS_SUCCESS;
}

cudnnStatus_t cudnnGetStream(cudnnHandle_t handle, cudaStream_t *stream) {
    *stream = ((Handle *)handle)->stream;
    return CUDNN_STATUS_SUCCESS;
}

// ---- The graph API. Every operation graph has one engine, without notes, knobs or workspace.

cudnnStatus_t cudnnBackendCreateDescriptor(cudnnBackendDescriptorType_t type, cudnnBackendDescriptor_t *descriptor) {
    *descriptor = calloc(1, DESCRIPTOR_SIZE);
    return CUDNN_STATUS_SUCCESS;
}

cudnnStatus_t cudnnBackendDestroyDescriptor(cudnnBackendDescriptor_t descriptor) {
    free(descriptor);
    return CUDNN_STATUS_SUCCESS;
}

cudnnStatus_t cudnnBackendGetAttribute(const cudnnBackendDescriptor_t descriptor, cudnnBackendAttributeName_t name,
                                       cudnnBackendAttributeType_t type, int64_t requested, int64_t *count,
                                       void *values) {
    int is_empty = name == CUDNN_ATTR_ENGINE_NUMERICAL_NOTE || name == CUDNN_ATTR_ENGINE_BEHAVIOR_NOTE ||
                   name == CUDNN_ATTR_ENGINE_KNOB_INFO || name == CUDNN_ATTR_ENGINECFG_KNOB_CHOICES;
    if (count) *count = !is_empty;
    if (!values || requested < 1 || is_empty) return CUDNN_STATUS_SUCCESS;
    if (type == CUDNN_TYPE_INT64) *(int64_t *)values = 0;
    if (type == CUDNN_TYPE_INT32) *(int32_t *)values = 0;
    return CUDNN_STATUS_SUCCESS;
}

cudnnStatus_t cudnnBackendExecute(cudnnHandle_t handle, cudnnBackendDescriptor_t plan,
                                  cudnnBackendDescriptor_t variants) {
    return simulated_launch(((Handle *)handle)->stream) ? CUDNN_STATUS_EXECUTION_FAILED : CUDNN_STATUS_SUCCESS;
}

// ---- Descriptors and sizes of the other API

#define CREATE_DESCRIPTOR(name)                                    \
    cudnnStatus_t cudnnCreate##name(cudnn##name##_t *descriptor) { \
        *descriptor = calloc(1, DESCRIPTOR_SIZE);                  \
        return CUDNN_STATUS_SUCCESS;                               \
    }
CREATE_DESCRIPTOR(ActivationDescriptor)
CREATE_DESCRIPTOR(ConvolutionDescriptor)
CREATE_DESCRIPTOR(DropoutDescriptor)
CREATE_DESCRIPTOR(FilterDescriptor)
CREATE_DESCRIPTOR(OpTensorDescriptor)
CREATE_DESCRIPTOR(PoolingDescriptor)
CREATE_DESCRIPTOR(ReduceTensorDescriptor)
CREATE_DESCRIPTOR(TensorDescriptor)

cudnnStatus_t cudnnGetBatchNormalizationForwardTrainingExWorkspaceSize(
    cudnnHandle_t handle, cudnnBatchNormMode_t mode, cudnnBatchNormOps_t operation, const cudnnTensorDescriptor_t x,
    const cudnnTensorDescriptor_t z, const cudnnTensorDescriptor_t y, const cudnnTensorDescriptor_t scale,
    const cudnnActivationDescriptor_t activation, size_t *size) {
    *size = 0;
    return CUDNN_STATUS_SUCCESS;
}

cudnnStatus_t cudnnGetBatchNormalizationBackwardExWorkspaceSize(
    cudnnHandle_t handle, cudnnBatchNormMode_t mode, cudnnBatchNormOps_t operation, const cudnnTensorDescriptor_t x,
    const cudnnTensorDescriptor_t y, const cudnnTensorDescriptor_t dy, const cudnnTensorDescriptor_t dz,
    const cudnnTensorDescriptor_t dx, const cudnnTensorDescriptor_t scale,
    const cudnnActivationDescriptor_t activation, size_t *size) {
    *size = 0;
    return CUDNN_STATUS_SUCCESS;
}

cudnnStatus_t cudnnGetBatchNormalizationTrainingExReserveSpaceSize(cudnnHandle_t handle, cudnnBatchNormMode_t mode,
                                                                   cudnnBatchNormOps_t operation,
                                                                   const cudnnActivationDescriptor_t activation,
                                                                   const cudnnTensorDescriptor_t x, size_t *size) {
    *size = 0;
    return CUDNN_STATUS_SUCCESS;
}

cudnnStatus_t cudnnGetReductionWorkspaceSize(cudnnHandle_t handle, const cudnnReduceTensorDescriptor_t reduction,
                                             const cudnnTensorDescriptor_t a, const cudnnTensorDescriptor_t c,
                                             size_t *size) {
    *size = 0;
    return CUDNN_STATUS_SUCCESS;
}

cudnnStatus_t cudnnGetReductionIndicesSize(cudnnHandle_t handle, const cudnnReduceTensorDescriptor_t reduction,
                                           const cudnnTensorDescriptor_t a, const cudnnTensorDescriptor_t c,
                                           size_t *size) {
    *size = 0;
    return CUDNN_STATUS_SUCCESS;
}

cudnnStatus_t cudnnGetConvolutionForwardWorkspaceSize(cudnnHandle_t handle, const cudnnTensorDescriptor_t x,
                                                      const cudnnFilterDescriptor_t w,
                                                      const cudnnConvolutionDescriptor_t convolution,
                                                      const cudnnTensorDescriptor_t y,
                                                      cudnnConvolutionFwdAlgo_t algorithm, size_t *size) {
    *size = 0;
    return CUDNN_STATUS_SUCCESS;
}
