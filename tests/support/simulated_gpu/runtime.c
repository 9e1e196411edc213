// The CUDA runtime library without a GPU. Memory, streams, events, captures and graphs follow the rules of the CUDA
// Runtime API; kernels compute nothing. The content of device memory is not kept: a copy to the host writes zeros, and
// access from the host is a segmentation fault. What may not be done while a stream is captured fails here as it does
// on a GPU. The counters show what a program did.
//
// SIMULATED_GPU_DEVICES  the number of devices, by default 1
// SIMULATED_GPU_MIB      the memory of each device in MiB, by default 80 GiB
// SIMULATED_GPU_LOG      1 to log the captures to standard error, with what invalidates them

#define _GNU_SOURCE
#include "simulated_gpu.h"

#include <dlfcn.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

// The counters, per device.
#define COUNTERS(X)                                                                                                   \
    X(kernels) X(captured_kernels) X(copies_to_device) X(copies_to_host) X(copies_on_device) X(captured_copies)        \
    X(pageable_copies) X(blocking_copies) X(stream_synchronizations) X(event_synchronizations)                         \
    X(device_synchronizations) X(queries) X(allocations) X(allocated_bytes) X(host_allocations) X(streams_created)     \
    X(handles_created) X(handles_destroyed) X(captures) X(invalidated_captures) X(graph_launches)                 \
    X(reused_sources)

typedef enum {
#define COUNTER_ID(name) COUNT_##name,
    COUNTERS(COUNTER_ID)
    COUNTER_COUNT
} CounterId;

static const char *counter_names[] = {
#define COUNTER_NAME(name) #name,
    COUNTERS(COUNTER_NAME)
};
static long counters[MAX_DEVICES][COUNTER_COUNT];

static pthread_mutex_t mutex = PTHREAD_RECURSIVE_MUTEX_INITIALIZER_NP;
static __thread int current_device;
static __thread cudaError_t last_error;

#define COUNT(name) (counters[current_device][COUNT_##name]++)

int simulated_counter_count(void) { return COUNTER_COUNT; }
const char *simulated_counter_name(int counter) { return counter_names[counter]; }
long simulated_counter(int counter, int device) { return counters[device][counter]; }

static int setting(const char *name, int default_value) {
    const char *value = getenv(name);
    return value ? atoi(value) : default_value;
}

static void log_line(const char *format, ...) {
    if (!setting("SIMULATED_GPU_LOG", 0)) return;
    va_list arguments;
    va_start(arguments, format);
    fputs("simulated GPU: ", stderr);
    vfprintf(stderr, format, arguments);
    fputs("\n", stderr);
    va_end(arguments);
}

// Every public function returns through this, so that `cudaGetLastError` reports its error.
static cudaError_t done(cudaError_t error) {
    pthread_mutex_unlock(&mutex);
    if (error) last_error = error;
    return error;
}

static void begin(void) { pthread_mutex_lock(&mutex); }

// ---- Devices

int simulated_device_count(void) {
    int count = setting("SIMULATED_GPU_DEVICES", 1);
    return count < MAX_DEVICES ? count : MAX_DEVICES;
}

size_t simulated_total_memory(void) { return (size_t)setting("SIMULATED_GPU_MIB", 80 << 10) << 20; }

size_t simulated_used_memory(int device) { return counters[device][COUNT_allocated_bytes]; }

static int is_device(int device) { return device >= 0 && device < simulated_device_count(); }

cudaError_t cudaGetDeviceCount(int *count) {
    *count = simulated_device_count();
    return cudaSuccess;
}

cudaError_t cudaGetDevice(int *device) {
    *device = current_device;
    return cudaSuccess;
}

cudaError_t cudaSetDevice(int device) {
    begin();
    if (!is_device(device)) return done(cudaErrorInvalidDevice);
    current_device = device;
    return done(cudaSuccess);
}

// An attribute of a device of compute capability 9.0.
cudaError_t cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr attribute, int device) {
    switch (attribute) {
        case cudaDevAttrComputeCapabilityMajor: *value = 9; break;
        case cudaDevAttrMaxThreadsPerBlock:
        case cudaDevAttrMaxBlockDimX:
        case cudaDevAttrMaxBlockDimY: *value = 1024; break;
        case cudaDevAttrMaxBlockDimZ: *value = 64; break;
        case cudaDevAttrMaxGridDimX: *value = INT32_MAX; break;
        case cudaDevAttrMaxGridDimY:
        case cudaDevAttrMaxGridDimZ: *value = 65535; break;
        case cudaDevAttrWarpSize: *value = 32; break;
        case cudaDevAttrMultiProcessorCount: *value = 132; break;
        case cudaDevAttrMaxThreadsPerMultiProcessor: *value = 2048; break;
        case cudaDevAttrMaxSharedMemoryPerBlock: *value = 48 << 10; break;
        case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = 227 << 10; break;
        case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = 228 << 10; break;
        case cudaDevAttrL2CacheSize: *value = 50 << 20; break;
        case cudaDevAttrUnifiedAddressing:
        case cudaDevAttrConcurrentKernels:
        case cudaDevAttrCooperativeLaunch:
        case cudaDevAttrAsyncEngineCount: *value = 1; break;
        default: *value = 0;
    }
    return cudaSuccess;
}

cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *properties, int device) {
    begin();
    if (!is_device(device)) return done(cudaErrorInvalidDevice);
    *properties = (struct cudaDeviceProp){
        .name = GPU_NAME,
        .totalGlobalMem = simulated_total_memory(),
        .major = 9,
        .warpSize = 32,
        .multiProcessorCount = 132,
        .maxThreadsPerBlock = 1024,
        .maxThreadsPerMultiProcessor = 2048,
        .maxBlocksPerMultiProcessor = 32,
        .maxThreadsDim = {1024, 1024, 64},
        .maxGridSize = {INT32_MAX, 65535, 65535},
        .regsPerBlock = 65536,
        .regsPerMultiprocessor = 65536,
        .sharedMemPerBlock = 48 << 10,
        .sharedMemPerBlockOptin = 227 << 10,
        .sharedMemPerMultiprocessor = 228 << 10,
        .totalConstMem = 65536,
        .l2CacheSize = 50 << 20,
        .textureAlignment = 512,
        .unifiedAddressing = 1,
        .concurrentKernels = 1,
        .cooperativeLaunch = 1,
        .asyncEngineCount = 1,
        .streamPrioritiesSupported = 1,
        .pciBusID = device + 1,
        .uuid.bytes = {device + 1},
    };
    return done(cudaSuccess);
}

cudaError_t cudaDeviceGetPCIBusId(char *id, int length, int device) {
    snprintf(id, length, "0000:%02x:00.0", device + 1);
    return cudaSuccess;
}

cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest) {
    if (least) *least = 0;
    if (greatest) *greatest = -5;
    return cudaSuccess;
}

cudaError_t cudaDeviceCanAccessPeer(int *can_access, int device, int peer) {
    *can_access = 0;
    return cudaSuccess;
}

cudaError_t cudaDriverGetVersion(int *version) {
    *version = CUDART_VERSION;
    return cudaSuccess;
}

cudaError_t cudaRuntimeGetVersion(int *version) {
    *version = CUDART_VERSION;
    return cudaSuccess;
}

cudaError_t cudaGetDriverEntryPointByVersion(const char *symbol, void **function, unsigned version,
                                             unsigned long long flags,
                                             enum cudaDriverEntryPointQueryResult *result) {
    *function = dlsym(RTLD_DEFAULT, symbol);
    if (result) *result = *function ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
    return *function ? cudaSuccess : cudaErrorSymbolNotFound;
}

// ---- Errors

cudaError_t cudaPeekAtLastError(void) { return last_error; }

cudaError_t cudaGetLastError(void) {
    cudaError_t error = last_error;
    last_error = cudaSuccess;
    return error;
}

const char *cudaGetErrorString(cudaError_t error) {
    switch (error) {
        case cudaSuccess: return "no error";
        case cudaErrorInvalidValue: return "invalid argument";
        case cudaErrorMemoryAllocation: return "out of memory";
        case cudaErrorInvalidConfiguration: return "invalid configuration argument";
        case cudaErrorInvalidDevice: return "invalid device ordinal";
        case cudaErrorInvalidResourceHandle: return "invalid resource handle";
        case cudaErrorIllegalState: return "the operation cannot be performed in the present state";
        case cudaErrorNotSupported: return "operation not supported by the simulated GPU";
        case cudaErrorStreamCaptureUnsupported: return "operation not permitted when stream is capturing";
        case cudaErrorStreamCaptureInvalidated: return "operation failed due to a previous error during capture";
        case cudaErrorStreamCaptureMerge: return "operation would result in a merge of separate capture sequences";
        case cudaErrorStreamCaptureUnmatched: return "capture was not ended in the same stream as it began";
        case cudaErrorStreamCaptureIsolation: return "dependency created on uncaptured work in another stream";
        case cudaErrorStreamCaptureImplicit:
            return "operation would make the legacy stream depend on a capturing blocking stream";
        case cudaErrorCapturedEvent: return "operation not permitted on an event last recorded in a capturing stream";
        case cudaErrorStreamCaptureWrongThread:
            return "attempt to terminate a thread-local capture sequence from another thread";
        default: return "unknown error of the simulated GPU";
    }
}

const char *cudaGetErrorName(cudaError_t error) {
    static __thread char name[32];
    snprintf(name, sizeof name, "cudaError%d", error);
    return name;
}

// ---- Streams, and the captures that they are part of

typedef struct {
    unsigned long long capture_id;
    long nodes;
} Graph;

typedef struct Capture {
    unsigned long long id;
    enum cudaStreamCaptureMode mode;
    pthread_t thread;
    struct Stream *origin;
    Graph *graph;
    int invalidated;
    struct Capture *next;
} Capture;

typedef struct Stream {
    int device;
    int priority;
    unsigned flags;
    unsigned long long capture_id;  // of the capture that the stream is or was part of, or 0
} Stream;

static Capture *captures;  // those that have not ended
static __thread enum cudaStreamCaptureMode thread_mode = cudaStreamCaptureModeGlobal;
static Stream legacy_streams[MAX_DEVICES];

static Capture *find_capture(unsigned long long id) {
    for (Capture *capture = captures; capture; capture = capture->next)
        if (capture->id == id) return capture;
    return NULL;
}

static Stream *stream_of(cudaStream_t handle) {
    int is_legacy = handle == NULL || handle == cudaStreamLegacy || handle == cudaStreamPerThread;
    return is_legacy ? &legacy_streams[current_device] : (Stream *)handle;
}

static int is_legacy(const Stream *stream) {
    return stream >= legacy_streams && stream < legacy_streams + MAX_DEVICES;
}

static void invalidate(Capture *capture, const char *cause) {
    if (capture->invalidated) return;
    capture->invalidated = 1;
    COUNT(invalidated_captures);
    log_line("capture %llu is invalidated by %s", capture->id, cause);
}

// Calls that may block or allocate are not permitted during the captures that the thread's mode takes into account.
static cudaError_t check_unsafe_call(const char *name) {
    cudaError_t error = cudaSuccess;
    for (Capture *capture = captures; capture; capture = capture->next) {
        int own = pthread_equal(capture->thread, pthread_self());
        int other = thread_mode == cudaStreamCaptureModeGlobal && capture->mode == cudaStreamCaptureModeGlobal;
        if (thread_mode == cudaStreamCaptureModeRelaxed || capture->mode == cudaStreamCaptureModeRelaxed) continue;
        if (!own && !other) continue;
        invalidate(capture, name);
        error = cudaErrorStreamCaptureUnsupported;
    }
    return error;
}

// The host waits for a stream, which must not be captured.
static cudaError_t check_wait(Stream *stream, const char *name) {
    Capture *capture = find_capture(stream->capture_id);
    if (!capture) return check_unsafe_call(name);
    invalidate(capture, name);
    return cudaErrorStreamCaptureUnsupported;
}

// Work is put on a stream: as a node of a graph if the stream is captured.
static cudaError_t enqueue(Stream *stream, const char *name) {
    if (stream->device != current_device && !is_legacy(stream)) return cudaErrorInvalidResourceHandle;
    if (is_legacy(stream)) {
        for (Capture *capture = captures; capture; capture = capture->next) {
            if (capture->origin->flags & cudaStreamNonBlocking) continue;
            invalidate(capture, name);
            return cudaErrorStreamCaptureImplicit;
        }
    }
    Capture *capture = find_capture(stream->capture_id);
    if (!capture) return cudaSuccess;
    if (capture->invalidated) return cudaErrorStreamCaptureInvalidated;
    capture->graph->nodes++;
    return cudaSuccess;
}

cudaError_t cudaStreamCreateWithPriority(cudaStream_t *handle, unsigned flags, int priority) {
    begin();
    Stream *stream = calloc(1, sizeof *stream);
    *stream = (Stream){current_device, priority, flags, 0};
    *handle = (cudaStream_t)stream;
    COUNT(streams_created);
    return done(cudaSuccess);
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t *handle, unsigned flags) {
    return cudaStreamCreateWithPriority(handle, flags, 0);
}

cudaError_t cudaStreamCreate(cudaStream_t *handle) { return cudaStreamCreateWithPriority(handle, 0, 0); }

cudaError_t cudaStreamDestroy(cudaStream_t handle) { return cudaSuccess; }

cudaError_t cudaStreamGetPriority(cudaStream_t handle, int *priority) {
    *priority = stream_of(handle)->priority;
    return cudaSuccess;
}

cudaError_t cudaStreamSynchronize(cudaStream_t handle) {
    begin();
    COUNT(stream_synchronizations);
    return done(check_wait(stream_of(handle), "cudaStreamSynchronize"));
}

cudaError_t cudaStreamQuery(cudaStream_t handle) {
    begin();
    COUNT(queries);
    return done(check_wait(stream_of(handle), "cudaStreamQuery"));
}

cudaError_t cudaDeviceSynchronize(void) {
    begin();
    COUNT(device_synchronizations);
    if (!captures) return done(cudaSuccess);
    invalidate(captures, "cudaDeviceSynchronize");
    return done(cudaErrorStreamCaptureUnsupported);
}

cudaError_t cudaThreadExchangeStreamCaptureMode(enum cudaStreamCaptureMode *mode) {
    enum cudaStreamCaptureMode previous = thread_mode;
    thread_mode = *mode;
    *mode = previous;
    return cudaSuccess;
}

cudaError_t cudaStreamBeginCapture(cudaStream_t handle, enum cudaStreamCaptureMode mode) {
    static unsigned long long last_id;
    begin();
    Stream *stream = stream_of(handle);
    if (is_legacy(stream)) return done(cudaErrorStreamCaptureUnsupported);
    if (find_capture(stream->capture_id)) return done(cudaErrorIllegalState);
    Graph *graph = calloc(1, sizeof *graph);
    graph->capture_id = ++last_id;
    Capture *capture = calloc(1, sizeof *capture);
    *capture = (Capture){graph->capture_id, mode, pthread_self(), stream, graph, 0, captures};
    captures = capture;
    stream->capture_id = capture->id;
    COUNT(captures);
    log_line("capture %llu begins", capture->id);
    return done(cudaSuccess);
}

cudaError_t cudaStreamEndCapture(cudaStream_t handle, cudaGraph_t *graph) {
    begin();
    Capture *capture = find_capture(stream_of(handle)->capture_id);
    *graph = NULL;
    if (!capture) return done(cudaErrorIllegalState);
    cudaError_t error = cudaSuccess;
    int own = pthread_equal(capture->thread, pthread_self());
    if (capture->invalidated) error = cudaErrorStreamCaptureInvalidated;
    else if (capture->origin != stream_of(handle)) error = cudaErrorStreamCaptureUnmatched;
    else if (capture->mode != cudaStreamCaptureModeRelaxed && !own) error = cudaErrorStreamCaptureWrongThread;
    else *graph = (cudaGraph_t)capture->graph;
    log_line("capture %llu ends with %ld nodes: %s", capture->id, capture->graph->nodes, cudaGetErrorString(error));
    Capture **link = &captures;
    while (*link != capture) link = &(*link)->next;
    *link = capture->next;
    free(capture);
    return done(error);
}

static enum cudaStreamCaptureStatus status_of(const Capture *capture) {
    if (!capture) return cudaStreamCaptureStatusNone;
    return capture->invalidated ? cudaStreamCaptureStatusInvalidated : cudaStreamCaptureStatusActive;
}

cudaError_t cudaStreamIsCapturing(cudaStream_t handle, enum cudaStreamCaptureStatus *status) {
    begin();
    *status = status_of(find_capture(stream_of(handle)->capture_id));
    return done(cudaSuccess);
}

cudaError_t cudaStreamGetCaptureInfo(cudaStream_t handle, enum cudaStreamCaptureStatus *status,
                                     unsigned long long *id, cudaGraph_t *graph,
                                     const cudaGraphNode_t **dependencies, const cudaGraphEdgeData **edges,
                                     size_t *dependency_count) {
    begin();
    const Capture *capture = find_capture(stream_of(handle)->capture_id);
    *status = status_of(capture);
    if (id) *id = capture ? capture->id : 0;
    if (graph) *graph = capture ? (cudaGraph_t)capture->graph : NULL;
    if (dependencies) *dependencies = NULL;
    if (edges) *edges = NULL;
    if (dependency_count) *dependency_count = 0;
    return done(cudaSuccess);
}

cudaError_t cudaStreamUpdateCaptureDependencies(cudaStream_t handle, cudaGraphNode_t *dependencies,
                                                const cudaGraphEdgeData *edges, size_t count, unsigned flags) {
    return cudaSuccess;
}

// ---- Events

typedef struct {
    int recorded;
    unsigned long long capture_id;  // of the capture that the event was recorded in, or 0
    struct timespec time;
} Event;

cudaError_t cudaEventCreateWithFlags(cudaEvent_t *handle, unsigned flags) {
    *handle = calloc(1, sizeof(Event));
    return cudaSuccess;
}

cudaError_t cudaEventCreate(cudaEvent_t *handle) { return cudaEventCreateWithFlags(handle, 0); }

cudaError_t cudaEventDestroy(cudaEvent_t handle) {
    free(handle);
    return cudaSuccess;
}

cudaError_t cudaEventRecord(cudaEvent_t handle, cudaStream_t stream_handle) {
    begin();
    Event *event = (Event *)handle;
    Stream *stream = stream_of(stream_handle);
    cudaError_t error = enqueue(stream, "cudaEventRecord");
    if (error) return done(error);
    event->recorded = 1;
    event->capture_id = find_capture(stream->capture_id) ? stream->capture_id : 0;
    clock_gettime(CLOCK_MONOTONIC, &event->time);
    return done(cudaSuccess);
}

cudaError_t cudaEventRecordWithFlags(cudaEvent_t handle, cudaStream_t stream, unsigned flags) {
    return cudaEventRecord(handle, stream);
}

// A stream that waits for an event of a capture becomes part of that capture.
cudaError_t cudaStreamWaitEvent(cudaStream_t handle, cudaEvent_t event_handle, unsigned flags) {
    begin();
    Stream *stream = stream_of(handle);
    const Event *event = (Event *)event_handle;
    Capture *own_capture = find_capture(stream->capture_id), *capture = find_capture(event->capture_id);
    if (!capture) {
        if (!own_capture || !event->recorded) return done(cudaSuccess);
        invalidate(own_capture, "a wait for an event outside of the capture");
        return done(cudaErrorStreamCaptureIsolation);
    }
    if (capture->invalidated) return done(cudaErrorStreamCaptureInvalidated);
    if (is_legacy(stream)) {
        invalidate(capture, "the legacy stream, which waits for the capture");
        return done(cudaErrorStreamCaptureImplicit);
    }
    if (own_capture && own_capture != capture) {
        invalidate(capture, "a merge with another capture");
        return done(cudaErrorStreamCaptureMerge);
    }
    stream->capture_id = capture->id;
    return done(cudaSuccess);
}

static cudaError_t check_event(const Event *event, const char *name) {
    Capture *capture = find_capture(event->capture_id);
    if (!capture) return check_unsafe_call(name);
    invalidate(capture, name);
    return cudaErrorCapturedEvent;
}

cudaError_t cudaEventQuery(cudaEvent_t handle) {
    begin();
    COUNT(queries);
    return done(check_event((Event *)handle, "cudaEventQuery"));
}

cudaError_t cudaEventSynchronize(cudaEvent_t handle) {
    begin();
    COUNT(event_synchronizations);
    return done(check_event((Event *)handle, "cudaEventSynchronize"));
}

cudaError_t cudaEventElapsedTime(float *milliseconds, cudaEvent_t start_handle, cudaEvent_t end_handle) {
    begin();
    const Event *start = (Event *)start_handle, *end = (Event *)end_handle;
    if (!start->recorded || !end->recorded) return done(cudaErrorInvalidResourceHandle);
    *milliseconds = (end->time.tv_sec - start->time.tv_sec) * 1e3 + (end->time.tv_nsec - start->time.tv_nsec) / 1e6;
    return done(cudaSuccess);
}

// ---- Graphs

// Every replay of a graph copies again from the host memory that its captured copies name. A program that copies
// something else from there has overwritten what the graph needs.
typedef struct Source {
    const char *start;
    size_t size;
    unsigned long long capture_id;
    struct Source *next;
} Source;

static Source *captured_sources;

cudaError_t cudaGraphInstantiate(cudaGraphExec_t *executable, cudaGraph_t graph, unsigned long long flags) {
    begin();
    *executable = (cudaGraphExec_t)graph;
    return done(graph ? cudaSuccess : cudaErrorInvalidValue);
}

cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t *executable, cudaGraph_t graph, unsigned long long flags) {
    return cudaGraphInstantiate(executable, graph, flags);
}

cudaError_t cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t stream) {
    begin();
    COUNT(graph_launches);
    return done(enqueue(stream_of(stream), "cudaGraphLaunch"));
}

cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t *nodes, size_t *count) {
    *count = ((Graph *)graph)->nodes;
    return cudaSuccess;
}

// The executable graph is the graph itself, which lives until the process ends.
cudaError_t cudaGraphDestroy(cudaGraph_t graph) { return cudaSuccess; }

cudaError_t cudaGraphExecDestroy(cudaGraphExec_t executable) {
    begin();
    Source **link = &captured_sources;
    while (*link) {
        Source *source = *link;
        if (source->capture_id == ((Graph *)executable)->capture_id) {
            *link = source->next;
            free(source);
        } else {
            link = &source->next;
        }
    }
    return done(cudaSuccess);
}

cudaError_t cudaGraphRetainUserObject(cudaGraph_t graph, cudaUserObject_t object, unsigned count, unsigned flags) {
    return cudaSuccess;
}

cudaError_t cudaUserObjectCreate(cudaUserObject_t *object, void *pointer, cudaHostFn_t destroy, unsigned references,
                                 unsigned flags) {
    *object = (cudaUserObject_t)pointer;
    return cudaSuccess;
}

cudaError_t cudaUserObjectRelease(cudaUserObject_t object, unsigned count) { return cudaSuccess; }

// ---- Memory

typedef struct Block {
    char *start;
    size_t size;
    int device;
    int on_host;
    struct Block *next;
} Block;

static Block *blocks;

static const Block *block_of(const void *pointer) {
    for (const Block *block = blocks; block; block = block->next)
        if ((const char *)pointer >= block->start && (const char *)pointer < block->start + block->size) return block;
    return NULL;
}

static int on_device(const void *pointer) {
    const Block *block = block_of(pointer);
    return block && !block->on_host;
}

static cudaError_t allocate(void **pointer, size_t size, int on_host) {
    *pointer = NULL;
    if (!on_host && simulated_used_memory(current_device) + size > simulated_total_memory())
        return cudaErrorMemoryAllocation;
    int access = on_host ? PROT_READ | PROT_WRITE : PROT_NONE;
    void *start = mmap(NULL, size ? size : 1, access, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (start == MAP_FAILED) return cudaErrorMemoryAllocation;
    Block *block = malloc(sizeof *block);
    *block = (Block){start, size, current_device, on_host, blocks};
    blocks = block;
    if (!on_host) counters[current_device][COUNT_allocated_bytes] += size;
    *pointer = start;
    return cudaSuccess;
}

static void release(const void *pointer) {
    for (Block **link = &blocks; *link; link = &(*link)->next) {
        Block *block = *link;
        if (block->start != pointer) continue;
        *link = block->next;
        if (!block->on_host) counters[block->device][COUNT_allocated_bytes] -= block->size;
        munmap(block->start, block->size ? block->size : 1);
        free(block);
        return;
    }
}

cudaError_t cudaMalloc(void **pointer, size_t size) {
    begin();
    COUNT(allocations);
    cudaError_t error = check_unsafe_call("cudaMalloc");
    return done(error ? error : allocate(pointer, size, 0));
}

cudaError_t cudaFree(void *pointer) {
    begin();
    cudaError_t error = pointer ? check_unsafe_call("cudaFree") : cudaSuccess;
    if (!error) release(pointer);
    return done(error);
}

cudaError_t cudaMallocAsync(void **pointer, size_t size, cudaStream_t stream) {
    begin();
    COUNT(allocations);
    return done(allocate(pointer, size, 0));
}

cudaError_t cudaMallocFromPoolAsync(void **pointer, size_t size, cudaMemPool_t pool, cudaStream_t stream) {
    return cudaMallocAsync(pointer, size, stream);
}

cudaError_t cudaFreeAsync(void *pointer, cudaStream_t stream) {
    begin();
    release(pointer);
    return done(cudaSuccess);
}

cudaError_t cudaHostAlloc(void **pointer, size_t size, unsigned flags) {
    begin();
    COUNT(host_allocations);
    cudaError_t error = check_unsafe_call("cudaHostAlloc");
    return done(error ? error : allocate(pointer, size, 1));
}

cudaError_t cudaMallocHost(void **pointer, size_t size) { return cudaHostAlloc(pointer, size, 0); }

cudaError_t cudaFreeHost(void *pointer) {
    begin();
    cudaError_t error = check_unsafe_call("cudaFreeHost");
    if (!error) release(pointer);
    return done(error);
}

cudaError_t cudaHostRegister(void *pointer, size_t size, unsigned flags) {
    begin();
    return done(check_unsafe_call("cudaHostRegister"));
}

cudaError_t cudaHostUnregister(void *pointer) { return cudaSuccess; }

cudaError_t cudaMemGetInfo(size_t *free_bytes, size_t *total_bytes) {
    begin();
    *total_bytes = simulated_total_memory();
    *free_bytes = *total_bytes - simulated_used_memory(current_device);
    return done(cudaSuccess);
}

cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *attributes, const void *pointer) {
    begin();
    const Block *block = block_of(pointer);
    *attributes = (struct cudaPointerAttributes){.type = cudaMemoryTypeUnregistered, .device = cudaInvalidDeviceId};
    if (block) {
        attributes->type = block->on_host ? cudaMemoryTypeHost : cudaMemoryTypeDevice;
        attributes->device = block->device;
        attributes->devicePointer = (void *)pointer;
    }
    if (!block || block->on_host) attributes->hostPointer = (void *)pointer;
    return done(cudaSuccess);
}

// Only the host has content to copy: what comes from a device are zeros.
static void copy_content(void *target, const void *source, size_t size) {
    if (on_device(target)) return;
    if (on_device(source)) memset(target, 0, size);
    else memcpy(target, source, size);
}

static void count_copy(const void *target, const void *source) {
    if (on_device(target) && on_device(source)) COUNT(copies_on_device);
    else if (on_device(target)) COUNT(copies_to_device);
    else if (on_device(source)) COUNT(copies_to_host);
}

cudaError_t cudaMemcpy(void *target, const void *source, size_t size, enum cudaMemcpyKind kind) {
    begin();
    count_copy(target, source);
    COUNT(blocking_copies);
    cudaError_t error = check_unsafe_call("cudaMemcpy");
    if (!error) copy_content(target, source, size);
    return done(error);
}

static void check_source(const void *source, size_t size, unsigned long long capture_id) {
    const char *start = source;
    if (on_device(source)) return;
    for (const Source *other = captured_sources; other; other = other->next) {
        if (other->capture_id == capture_id || start + size <= other->start || other->start + other->size <= start)
            continue;
        COUNT(reused_sources);
        return;
    }
    if (!capture_id) return;
    Source *captured = malloc(sizeof *captured);
    *captured = (Source){start, size, capture_id, captured_sources};
    captured_sources = captured;
}

cudaError_t cudaMemcpyAsync(void *target, const void *source, size_t size, enum cudaMemcpyKind kind,
                            cudaStream_t handle) {
    begin();
    Stream *stream = stream_of(handle);
    cudaError_t error = enqueue(stream, "cudaMemcpyAsync");
    if (error) return done(error);
    count_copy(target, source);
    const Capture *capture = find_capture(stream->capture_id);
    check_source(source, size, capture ? capture->id : 0);
    if (capture) {
        COUNT(captured_copies);
        return done(cudaSuccess);
    }
    if (!block_of(target) || !block_of(source)) COUNT(pageable_copies);
    copy_content(target, source, size);
    return done(cudaSuccess);
}

cudaError_t cudaMemcpyPeerAsync(void *target, int target_device, const void *source, int source_device, size_t size,
                                cudaStream_t stream) {
    return cudaMemcpyAsync(target, source, size, cudaMemcpyDeviceToDevice, stream);
}

cudaError_t cudaMemcpy2DAsync(void *target, size_t target_pitch, const void *source, size_t source_pitch, size_t width,
                              size_t height, enum cudaMemcpyKind kind, cudaStream_t stream) {
    cudaError_t error = cudaSuccess;
    for (size_t row = 0; row < height && !error; row++)
        error = cudaMemcpyAsync((char *)target + row * target_pitch, (const char *)source + row * source_pitch, width,
                                kind, stream);
    return error;
}

cudaError_t cudaMemsetAsync(void *target, int value, size_t size, cudaStream_t stream) {
    begin();
    return done(enqueue(stream_of(stream), "cudaMemsetAsync"));
}

cudaError_t cudaMemset(void *target, int value, size_t size) {
    begin();
    return done(check_unsafe_call("cudaMemset"));
}

cudaError_t cudaDeviceGetDefaultMemPool(cudaMemPool_t *pool, int device) {
    *pool = (cudaMemPool_t)&counters[device];
    return cudaSuccess;
}

cudaError_t cudaMemPoolCreate(cudaMemPool_t *pool, const struct cudaMemPoolProps *properties) {
    return cudaDeviceGetDefaultMemPool(pool, properties->location.id);
}

cudaError_t cudaMemPoolDestroy(cudaMemPool_t pool) { return cudaSuccess; }
cudaError_t cudaMemPoolSetAttribute(cudaMemPool_t pool, enum cudaMemPoolAttr name, void *value) { return cudaSuccess; }
cudaError_t cudaMemPoolGetAttribute(cudaMemPool_t pool, enum cudaMemPoolAttr name, void *value) {
    *(uint64_t *)value = 0;
    return cudaSuccess;
}
cudaError_t cudaMemPoolTrimTo(cudaMemPool_t pool, size_t size) { return cudaSuccess; }

// Variables in device memory have an address that no kernel reads.
cudaError_t cudaGetSymbolAddress(void **pointer, const void *symbol) {
    *pointer = (void *)symbol;
    return cudaSuccess;
}

cudaError_t cudaMemcpyToSymbol(const void *symbol, const void *source, size_t size, size_t offset,
                               enum cudaMemcpyKind kind) {
    return cudaSuccess;
}

// ---- Kernels

static cudaError_t launch(dim3 grid, dim3 block, cudaStream_t handle) {
    begin();
    Stream *stream = stream_of(handle);
    int empty = !grid.x || !grid.y || !grid.z || !block.x || !block.y || !block.z;
    int too_large = (size_t)block.x * block.y * block.z > 1024 || grid.y > 65535 || grid.z > 65535;
    if (empty || too_large) return done(cudaErrorInvalidConfiguration);
    cudaError_t error = enqueue(stream, "a kernel");
    if (error) return done(error);
    if (find_capture(stream->capture_id)) COUNT(captured_kernels);
    else COUNT(kernels);
    return done(cudaSuccess);
}

cudaError_t simulated_launch(cudaStream_t stream) {
    dim3 one = {1, 1, 1};
    return launch(one, one, stream);
}

void simulated_create_handle(void) { COUNT(handles_created); }
void simulated_destroy_handle(void) { COUNT(handles_destroyed); }

cudaError_t cudaLaunchKernel(const void *function, dim3 grid, dim3 block, void **arguments, size_t shared_memory,
                             cudaStream_t stream) {
    return launch(grid, block, stream);
}

cudaError_t cudaLaunchCooperativeKernel(const void *function, dim3 grid, dim3 block, void **arguments,
                                        size_t shared_memory, cudaStream_t stream) {
    return launch(grid, block, stream);
}

cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t *configuration, const void *function, void **arguments) {
    return launch(configuration->gridDim, configuration->blockDim, configuration->stream);
}

cudaError_t cudaLaunchHostFunc(cudaStream_t handle, cudaHostFn_t function, void *data) {
    begin();
    Stream *stream = stream_of(handle);
    int run = !find_capture(stream->capture_id);
    cudaError_t error = done(enqueue(stream, "cudaLaunchHostFunc"));
    if (!error && run) function(data);
    return error;
}

cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes *attributes, const void *function) {
    *attributes = (struct cudaFuncAttributes){
        .maxThreadsPerBlock = 1024,
        .numRegs = 32,
        .ptxVersion = 90,
        .binaryVersion = 90,
        .maxDynamicSharedSizeBytes = 48 << 10,
    };
    return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void *function, enum cudaFuncAttribute attribute, int value) {
    return cudaSuccess;
}

cudaError_t cudaKernelSetAttributeForDevice(cudaKernel_t kernel, enum cudaFuncAttribute attribute, int value,
                                            int device) {
    return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *blocks_per_multiprocessor, const void *function,
                                                                   int block_size, size_t shared_memory,
                                                                   unsigned flags) {
    *blocks_per_multiprocessor = 2048 / (block_size > 0 ? block_size : 1);
    return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks_per_multiprocessor, const void *function,
                                                          int block_size, size_t shared_memory) {
    return cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(blocks_per_multiprocessor, function, block_size,
                                                                  shared_memory, 0);
}

// ---- What the code that nvcc generates calls: it registers kernels when a library is loaded, and launches them

typedef struct {
    dim3 grid, block;
    size_t shared_memory;
    void *stream;
} CallConfiguration;

static __thread CallConfiguration call_configurations[8];
static __thread int call_depth;

unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared_memory, void *stream) {
    call_configurations[call_depth++ % 8] = (CallConfiguration){grid, block, shared_memory, stream};
    return 0;
}

cudaError_t __cudaPopCallConfiguration(dim3 *grid, dim3 *block, size_t *shared_memory, void *stream) {
    const CallConfiguration *call = &call_configurations[--call_depth % 8];
    *grid = call->grid;
    *block = call->block;
    *shared_memory = call->shared_memory;
    *(void **)stream = call->stream;
    return cudaSuccess;
}

void **__cudaRegisterFatBinary(void *binary) { return calloc(1, sizeof(void *)); }
void __cudaRegisterFatBinaryEnd(void **handle) {}
void __cudaUnregisterFatBinary(void **handle) { free(handle); }
void __cudaRegisterFunction() {}
void __cudaRegisterVar() {}

cudaError_t __cudaGetKernel(cudaKernel_t *kernel, const void *function) {
    *kernel = (cudaKernel_t)function;
    return cudaSuccess;
}

cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void **arguments, size_t shared_memory,
                               cudaStream_t stream) {
    return launch(grid, block, stream);
}
