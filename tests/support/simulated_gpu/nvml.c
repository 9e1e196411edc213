// NVIDIA's management library: the names of the devices and their used memory. It sees this process alone.

#include "simulated_gpu.h"

#include <stdint.h>
#include <stdio.h>

typedef struct {
    unsigned long long total, free, used;
} Memory;

int nvmlInit_v2(void) { return 0; }
int nvmlShutdown(void) { return 0; }

int nvmlDeviceGetCount_v2(unsigned *count) {
    *count = simulated_device_count();
    return 0;
}

int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **handle) {
    *handle = (void *)(uintptr_t)(index + 1);
    return 0;
}

// PyTorch continues without these.
#define NOT_SUPPORTED(name) \
    int name() { return 3; }
NOT_SUPPORTED(nvmlDeviceGetGpuFabricInfoV)
NOT_SUPPORTED(nvmlDeviceGetNvLinkRemoteDeviceType)
NOT_SUPPORTED(nvmlDeviceGetNvLinkRemotePciInfo_v2)
NOT_SUPPORTED(nvmlSystemGetCudaDriverVersion_v2)

int nvmlDeviceGetHandleByPciBusId_v2(const char *id, void **handle) {
    unsigned domain, bus;
    if (sscanf(id, "%x:%x:", &domain, &bus) != 2) return 2;
    return nvmlDeviceGetHandleByIndex_v2(bus - 1, handle);
}

int nvmlDeviceGetComputeRunningProcesses(void *handle, unsigned *count, void *processes) {
    *count = 0;
    return 0;
}

int nvmlDeviceGetName(void *handle, char *name, unsigned length) {
    snprintf(name, length, GPU_NAME);
    return 0;
}

int nvmlDeviceGetMemoryInfo(void *handle, Memory *memory) {
    unsigned long long total = simulated_total_memory(), used = simulated_used_memory((int)(uintptr_t)handle - 1);
    *memory = (Memory){total, total - used, used};
    return 0;
}
