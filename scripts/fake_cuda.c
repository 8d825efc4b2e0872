// A CUDA driver and cuBLAS without a GPU, to run the CUDA build of tinylora against: device memory is
// host memory, copies are copies, kernels and products do nothing but are counted.
//
// What it checks: every kernel that is asked for by name must be an entry of the PTX that candle was
// built with, as in a real driver, so that an operation without a kernel for its number type fails. What
// it counts is written to the file TINYLORA_FAKE_CUDA_LOG names, or to stderr, when the program ends.
//
// `scripts/build_cuda.sh` builds it; numbers that come out of a program on it mean nothing.
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { SUCCESS = 0, OUT_OF_MEMORY = 2, NOT_FOUND = 500 };
#define EXPORT __attribute__((visibility("default")))

static struct {
    uint64_t launches, products, uploads, upload_bytes, small_uploads, downloads, download_bytes;
    uint64_t copies, copy_bytes, fills, allocations, waits, product_bytes;
    double flops;
} count;

// Kernels by name, in the order of their first use.
static struct { char *name; uint64_t launches; double elements; } kernels[1024];
static int num_kernels;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static int marks;

static void report(const char *title) {
    const char *path = getenv("TINYLORA_FAKE_CUDA_LOG");
    FILE *out = path ? fopen(path, "a") : stderr;
    if (!out) return;
    fprintf(out, "%s: launches %lu products %lu flops %.6g product_bytes %lu uploads %lu (%lu bytes, %lu of at most 4096) "
        "downloads %lu (%lu bytes) copies %lu (%lu bytes) fills %lu allocations %lu waits %lu\n", title,
        count.launches, count.products, count.flops, count.product_bytes, count.uploads, count.upload_bytes,
        count.small_uploads, count.downloads, count.download_bytes, count.copies, count.copy_bytes,
        count.fills, count.allocations, count.waits);
    for (int i = 0; i < num_kernels; i++)
        if (kernels[i].launches)
            fprintf(out, "  %8lu %12.4g elements  %s\n", kernels[i].launches, kernels[i].elements, kernels[i].name);
    if (path) fclose(out);
}

__attribute__((destructor)) static void at_end(void) {
    if (count.allocations) report("in all");
}

// Devices, contexts, streams: one of each, which are all the same.
EXPORT int cuInit(unsigned flags) { (void)flags; return SUCCESS; }
EXPORT int cuDriverGetVersion(int *version) { *version = 13000; return SUCCESS; }
EXPORT int cuDeviceGetCount(int *n) { *n = 1; return SUCCESS; }
EXPORT int cuDeviceGet(int *device, int ordinal) { *device = ordinal; return ordinal ? 101 : SUCCESS; }
EXPORT int cuDeviceGetAttribute(int *value, int attribute, int device) {
    (void)device;
    // Compute capability 9.0; memory pools (115) are there.
    *value = attribute == 75 ? 9 : attribute == 76 ? 0 : attribute == 115 ? 1 : 64;
    return SUCCESS;
}
EXPORT int cuDevicePrimaryCtxRetain(void **context, int device) { (void)device; *context = &count; return SUCCESS; }
EXPORT int cuCtxGetCurrent(void **context) { *context = &count; return SUCCESS; }
EXPORT int cuStreamCreate(void **stream, unsigned flags) { (void)flags; *stream = &lock; return SUCCESS; }
EXPORT int cuEventCreate(void **event, unsigned flags) { (void)flags; *event = &lock; return SUCCESS; }
EXPORT int cuStreamIsCapturing(void *stream, int *status) { (void)stream; *status = 0; return SUCCESS; }
EXPORT int cuDeviceGetMemPool(void **pool, int device) { (void)device; *pool = &lock; return SUCCESS; }
EXPORT int cuDeviceGetDefaultMemPool(void **pool, int device) { (void)device; *pool = &lock; return SUCCESS; }
EXPORT int cuStreamSynchronize(void *stream) { (void)stream; count.waits++; return SUCCESS; }
EXPORT int cuCtxSynchronize(void) { count.waits++; return SUCCESS; }
EXPORT int cuGetErrorName(int error, const char **name) { *name = error == NOT_FOUND ? "CUDA_ERROR_NOT_FOUND" : "an error"; return SUCCESS; }
EXPORT int cuGetErrorString(int error, const char **text) { *text = error == NOT_FOUND ? "named symbol not found" : "an error"; return SUCCESS; }
EXPORT int cuMemGetInfo_v2(size_t *free, size_t *total) { *free = *total = (size_t)80 << 30; return SUCCESS; }

// Memory.
EXPORT int cuMemAllocAsync(void **memory, size_t bytes, void *stream) {
    (void)stream;
    count.allocations++;
    *memory = calloc(bytes ? bytes : 1, 1);
    return *memory ? SUCCESS : OUT_OF_MEMORY;
}
EXPORT int cuMemAlloc_v2(void **memory, size_t bytes) { return cuMemAllocAsync(memory, bytes, 0); }
EXPORT int cuMemFreeAsync(void *memory, void *stream) { (void)stream; free(memory); return SUCCESS; }
EXPORT int cuMemFree_v2(void *memory) { free(memory); return SUCCESS; }
EXPORT int cuMemcpyHtoDAsync_v2(void *to, const void *from, size_t bytes, void *stream) {
    (void)stream;
    memcpy(to, from, bytes);
    count.uploads++;
    count.upload_bytes += bytes;
    count.small_uploads += bytes <= 4096;
    return SUCCESS;
}
EXPORT int cuMemcpyHtoD_v2(void *to, const void *from, size_t bytes) { return cuMemcpyHtoDAsync_v2(to, from, bytes, 0); }
EXPORT int cuMemcpyDtoHAsync_v2(void *to, const void *from, size_t bytes, void *stream) {
    (void)stream;
    memcpy(to, from, bytes);
    count.downloads++;
    count.download_bytes += bytes;
    // A download of one token of every sequence ends a decoding step: TINYLORA_FAKE_CUDA_MARK names
    // its size, and what a step took is written for the first few.
    const char *mark = getenv("TINYLORA_FAKE_CUDA_MARK");
    if (mark && bytes == strtoull(mark, 0, 10) && marks < 8) {
        char title[64];
        snprintf(title, sizeof title, "step %d", marks++);
        report(title);
        memset(&count, 0, sizeof count);
        count.allocations = 1;
        for (int i = 0; i < num_kernels; i++) kernels[i].launches = 0, kernels[i].elements = 0;
    }
    return SUCCESS;
}
EXPORT int cuMemcpyDtoH_v2(void *to, const void *from, size_t bytes) { return cuMemcpyDtoHAsync_v2(to, from, bytes, 0); }
EXPORT int cuMemcpyDtoDAsync_v2(void *to, const void *from, size_t bytes, void *stream) {
    (void)stream;
    memcpy(to, from, bytes);
    count.copies++;
    count.copy_bytes += bytes;
    return SUCCESS;
}
EXPORT int cuMemcpyDtoD_v2(void *to, const void *from, size_t bytes) { return cuMemcpyDtoDAsync_v2(to, from, bytes, 0); }
EXPORT int cuMemsetD8Async(void *memory, unsigned char value, size_t bytes, void *stream) {
    (void)stream;
    memset(memory, value, bytes);
    count.fills++;
    return SUCCESS;
}

// Modules are PTX in text; functions are entries of it.
EXPORT int cuModuleLoadData(void **module, const void *image) {
    *module = strdup(image);
    return *module ? SUCCESS : OUT_OF_MEMORY;
}
EXPORT int cuModuleLoadDataEx(void **module, const void *image, unsigned n, void *options, void *values) {
    (void)n, (void)options, (void)values;
    return cuModuleLoadData(module, image);
}
EXPORT int cuModuleGetFunction(void **function, void *module, const char *name) {
    char entry[256];
    snprintf(entry, sizeof entry, ".entry %s(", name);
    pthread_mutex_lock(&lock);
    int found = -1;
    for (int i = 0; i < num_kernels && found < 0; i++)
        if (!strcmp(kernels[i].name, name)) found = i;
    if (found < 0 && num_kernels < 1024 && strstr(module, entry)) {
        found = num_kernels++;
        kernels[found].name = strdup(name);
    }
    pthread_mutex_unlock(&lock);
    if (found < 0) {
        fprintf(stderr, "fake CUDA: candle's kernels have no %s\n", name);
        return NOT_FOUND;
    }
    *function = &kernels[found];
    return SUCCESS;
}
EXPORT int cuLaunchKernel(void *function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                          unsigned shared, void *stream, void **arguments, void **extra) {
    (void)shared, (void)stream, (void)arguments, (void)extra;
    int at = (int)(((char *)function - (char *)kernels) / sizeof kernels[0]);
    count.launches++;
    kernels[at].launches++;
    kernels[at].elements += (double)gx * gy * gz * bx * by * bz;
    return SUCCESS;
}

// cuBLAS: products are counted by their sizes.
static void product(long m, long n, long k, long batch, int bytes) {
    count.products++;
    count.flops += 2.0 * m * n * k * batch;
    count.product_bytes += (uint64_t)(m * k + k * n + m * n) * batch * bytes;
}
EXPORT int cublasCreate_v2(void **handle) { *handle = &lock; return SUCCESS; }
EXPORT int cublasGemmStridedBatchedEx(void *handle, int ta, int tb, int m, int n, int k, const void *alpha, const void *a,
    int type, int lda, long long sa, const void *b, int tb2, int ldb, long long sb, const void *beta, void *c, int tc,
    int ldc, long long sc, int batch, int compute, int algo) {
    (void)handle, (void)ta, (void)tb, (void)alpha, (void)a, (void)lda, (void)sa, (void)b, (void)tb2, (void)ldb, (void)sb,
        (void)beta, (void)c, (void)tc, (void)ldc, (void)sc, (void)compute, (void)algo;
    product(m, n, k, batch, type == 0 ? 4 : 2);
    return SUCCESS;
}
EXPORT int cublasSgemmStridedBatched(void *handle, int ta, int tb, int m, int n, int k, const float *alpha, const float *a,
    int lda, long long sa, const float *b, int ldb, long long sb, const float *beta, float *c, int ldc, long long sc, int batch) {
    (void)handle, (void)ta, (void)tb, (void)alpha, (void)a, (void)lda, (void)sa, (void)b, (void)ldb, (void)sb, (void)beta,
        (void)c, (void)ldc, (void)sc;
    product(m, n, k, batch, 4);
    return SUCCESS;
}
