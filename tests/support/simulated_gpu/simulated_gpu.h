// What the simulated CUDA libraries share. See runtime.c for what is simulated.
#ifndef SIMULATED_GPU_H
#define SIMULATED_GPU_H

#include <cuda_runtime_api.h>

#define GPU_NAME "Simulated GPU"
#define MAX_DEVICES 8

// A kernel of a library, such as a matrix product of cuBLAS, is launched on a stream.
cudaError_t simulated_launch(cudaStream_t stream);

// A library creates or destroys one of its handles on the current device.
void simulated_create_handle(void);
void simulated_destroy_handle(void);

int simulated_device_count(void);
size_t simulated_total_memory(void);
size_t simulated_used_memory(int device);

#endif
