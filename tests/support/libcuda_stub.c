/* A few functions of the CUDA driver on the host's memory, with the signatures of cuda.h: what ctypes
   hands over is read here as C reads it. */
#include <stdlib.h>
#include <string.h>

typedef unsigned long long deviceptr;
typedef struct {
    size_t srcXInBytes, srcY; int srcMemoryType; const void *srcHost; deviceptr srcDevice;
    void *srcArray; size_t srcPitch;
    size_t dstXInBytes, dstY; int dstMemoryType; void *dstHost; deviceptr dstDevice;
    void *dstArray; size_t dstPitch;
    size_t WidthInBytes, Height;
} copy2d;

#define STREAM ((void *)0x7fff12345678)

int cuInit(unsigned int flags) { return flags != 0; }
int cuDriverGetVersion(int *version) { *version = 12090; return 0; }
int cuGetErrorString(int error, const char **text) { *text = error == 2 ? "out of memory" : 0; return 0; }
int cuDeviceGetCount(int *count) { *count = 1; return 0; }
int cuDeviceGet(int *device, int ordinal) { *device = ordinal; return 0; }
int cuDeviceGetName(char *name, int length, int device) { strncpy(name, "Stub \xc3\xa9 GPU", length); return device; }
int cuDeviceGetAttribute(int *value, int which, int device) { *value = which == 75 ? 8 : 7; return device; }
int cuDeviceTotalMem_v2(size_t *size, int device) { *size = (size_t)80 << 30; return device; }
int cuDevicePrimaryCtxRetain(void **context, int device) { *context = (void *)0x7fffaaaabbbb; return device; }
int cuDevicePrimaryCtxRelease_v2(int device) { return device; }
int cuCtxSetCurrent(void *context) { return context != (void *)0x7fffaaaabbbb; }
int cuStreamCreate(void **stream, unsigned int flags) { *stream = STREAM; return flags != 1; }
int cuStreamSynchronize(void *stream) { return stream != STREAM; }
int cuStreamDestroy_v2(void *stream) { return stream != STREAM; }
int cuStreamBeginCapture_v2(void *stream, int mode) { return stream != STREAM || mode != 1; }
int cuStreamEndCapture(void *stream, void **graph) { *graph = (void *)0x7fffccccdddd; return stream != STREAM; }
int cuGraphInstantiateWithFlags(void **ready, void *graph, unsigned long long flags) {
    *ready = (void *)0x7fffeeeeffff;
    return graph != (void *)0x7fffccccdddd || flags != 0;
}
int cuGraphLaunch(void *ready, void *stream) { return ready != (void *)0x7fffeeeeffff || stream != STREAM; }
int cuGraphDestroy(void *graph) { return graph != (void *)0x7fffccccdddd; }
int cuGraphExecDestroy(void *ready) { return ready != (void *)0x7fffeeeeffff; }
int cuMemAlloc_v2(deviceptr *address, size_t size) {
    *address = size > (size_t)1 << 40 ? 0 : (deviceptr)malloc(size);
    return *address ? 0 : 2;
}
int cuMemFree_v2(deviceptr address) { free((void *)address); return 0; }
int cuMemcpyHtoDAsync_v2(deviceptr to, const void *from, size_t size, void *stream) {
    memcpy((void *)to, from, size);
    return stream != STREAM;
}
int cuMemcpyDtoHAsync_v2(void *to, deviceptr from, size_t size, void *stream) {
    memcpy(to, (void *)from, size);
    return stream != STREAM;
}
int cuMemcpy2DAsync_v2(const copy2d *c, void *stream) {
    if (c->srcMemoryType != 2 || c->dstMemoryType != 2 || c->srcXInBytes || c->srcY) return 1;
    for (size_t row = 0; row < c->Height; row++)
        memcpy((char *)c->dstDevice + row * c->dstPitch, (char *)c->srcDevice + row * c->srcPitch,
               c->WidthInBytes);
    return stream != STREAM;
}
int cuMemsetD8Async(deviceptr to, unsigned char value, size_t size, void *stream) {
    memset((void *)to, value, size);
    return stream != STREAM;
}
