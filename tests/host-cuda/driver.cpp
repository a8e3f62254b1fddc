// libcuda on the host: enough of the driver for candle and for the kernels here, which it runs, block
// after block, as threads of one core that switch at barriers.
//
// Memory is checked rather than fast: fresh and freed memory is NaN, and a write beside an allocation
// aborts when it is freed.  HOST_CUDA_ORDER=reverse lets the last thread of a block go first: results
// that depend on the order of threads between barriers differ then.
#include "device.h"

#include <algorithm>
#include <map>
#include <mutex>
#include <string>
#include <ucontext.h>
#include <vector>

Index threadIdx, blockIdx, blockDim, gridDim;

namespace {

enum Status { SUCCESS = 0, INVALID_VALUE = 1, NOT_FOUND = 500, NOT_SUPPORTED = 801 };

[[noreturn]] void fail(const char *what) {
    std::fprintf(stderr, "host CUDA: %s\n", what);
    std::abort();
}

// --- threads of a block --------------------------------------------------------------------------

enum class At { Running, Block, Warp, End };

struct Thread {
    ucontext_t context;
    std::vector<char> stack;
    At at;
    uint64_t given;
    int flag;
};

struct Block {
    std::vector<Thread> threads;
    ucontext_t scheduler;
    unsigned current = 0;
    bool on_fibers = false;
    void (*kernel)(void **) = nullptr;
    void **arguments = nullptr;
} block;

bool reverse() {
    const char *order = std::getenv("HOST_CUDA_ORDER");
    return order != nullptr && std::strcmp(order, "reverse") == 0;
}

void wait(At at) {
    if (!block.on_fibers) fail("a barrier in a kernel whose PTX has none");
    Thread &self = block.threads[block.current];
    self.at = at;
    swapcontext(&self.context, &block.scheduler);
}

void enter() {
    block.kernel(block.arguments);
    block.threads[block.current].at = At::End;
}

Index index_of(unsigned thread) {
    return {thread % blockDim.x, thread / blockDim.x % blockDim.y, thread / (blockDim.x * blockDim.y)};
}

// All threads that have not ended wait at a barrier: those that all have reached go on.
void release(unsigned count) {
    bool block_waits = true, some = false;
    for (unsigned t = 0; t < count; ++t) block_waits &= block.threads[t].at == At::Block || block.threads[t].at == At::End;
    for (unsigned warp = 0; warp < count; warp += 32) {
        bool warp_waits = true;
        for (unsigned t = warp; t < warp + 32 && t < count; ++t) warp_waits &= block.threads[t].at == At::Warp || block.threads[t].at == At::End;
        for (unsigned t = warp; t < warp + 32 && t < count; ++t) {
            At &at = block.threads[t].at;
            if (at != At::End && (block_waits || warp_waits)) at = At::Running, some = true;
        }
    }
    if (!some) fail("threads wait for each other at different barriers");
}

void run_block(unsigned count) {
    const bool backwards = reverse();
    if (!block.on_fibers) {
        for (unsigned i = 0; i < count; ++i) {
            threadIdx = index_of(backwards ? count - 1 - i : i);
            block.kernel(block.arguments);
        }
        return;
    }
    if (block.threads.size() < count) block.threads.resize(count);
    for (unsigned t = 0; t < count; ++t) {
        Thread &thread = block.threads[t];
        thread.stack.resize(128 << 10);
        getcontext(&thread.context);
        thread.context.uc_stack.ss_sp = thread.stack.data();
        thread.context.uc_stack.ss_size = thread.stack.size();
        thread.context.uc_link = &block.scheduler;
        makecontext(&thread.context, enter, 0);
        thread.at = At::Running;
    }
    for (;;) {
        unsigned ended = 0;
        for (unsigned i = 0; i < count; ++i) {
            const unsigned t = backwards ? count - 1 - i : i;
            if (block.threads[t].at == At::Running) {
                block.current = t;
                threadIdx = index_of(t);
                swapcontext(&block.scheduler, &block.threads[t].context);
            }
            ended += block.threads[t].at == At::End;
        }
        if (ended == count) return;
        release(count);
    }
}

// --- modules -------------------------------------------------------------------------------------

std::map<std::string, void (*)(void **)> &registry() {
    static std::map<std::string, void (*)(void **)> kernels;
    return kernels;
}

struct Module {
    bool has_barriers;
};

struct Function {
    void (*call)(void **);
    bool has_barriers;
    int shared;
};

// --- memory --------------------------------------------------------------------------------------

constexpr size_t GUARD = 256;
std::map<char *, size_t> allocations;
uint64_t used = 0, most_used = 0;
std::vector<char> shared_room;
std::recursive_mutex driver;
using Lock = std::lock_guard<std::recursive_mutex>;

int allocate(uint64_t *p, size_t bytes) {
    Lock lock(driver);
    if (bytes == 0) return INVALID_VALUE;
    auto base = static_cast<char *>(std::aligned_alloc(GUARD, (bytes + 3 * GUARD - 1) / GUARD * GUARD));
    if (base == nullptr) return 2;
    std::memset(base, 0xa5, GUARD);
    std::memset(base + GUARD, 0xff, bytes);
    std::memset(base + GUARD + bytes, 0xa5, GUARD);
    allocations[base + GUARD] = bytes;
    used += bytes;
    most_used = std::max(most_used, used);
    *p = reinterpret_cast<uint64_t>(base + GUARD);
    return SUCCESS;
}

int release_memory(uint64_t p) {
    Lock lock(driver);
    auto found = allocations.find(reinterpret_cast<char *>(p));
    if (found == allocations.end()) fail("memory freed that was not allocated");
    auto [at, bytes] = *found;
    for (size_t i = 0; i < GUARD; ++i) {
        const bool before = static_cast<unsigned char>(at[-1 - static_cast<ptrdiff_t>(i)]) == 0xa5;
        const bool after = static_cast<unsigned char>(at[bytes + i]) == 0xa5;
        if (!before || !after) fail("a write beside an allocation");
    }
    allocations.erase(found);
    used -= bytes;
    std::memset(at, 0xff, bytes);
    std::free(at - GUARD);
    return SUCCESS;
}

// A range must lie in one allocation.
int copy(void *to, const void *from, size_t bytes) {
    Lock lock(driver);
    std::memmove(to, from, bytes);
    return SUCCESS;
}

} // namespace

Registered::Registered(const char *name, void (*call)(void **)) { registry()[name] = call; }

void __syncthreads() { wait(At::Block); }

int __syncthreads_or(int flag) {
    block.threads[block.current].flag = flag;
    wait(At::Block);
    int any = 0;
    for (unsigned t = 0; t < blockDim.x * blockDim.y * blockDim.z; ++t) any |= block.threads[t].flag;
    wait(At::Block);
    return any;
}

void __syncwarp(unsigned) { wait(At::Warp); }

void *dynamic_shared() { return shared_room.data(); }

uint64_t shuffled(uint64_t bits, unsigned from) {
    const unsigned self = block.current;
    block.threads[self].given = bits;
    wait(At::Warp);
    const uint64_t result = block.threads[self / 32 * 32 + from].given;
    wait(At::Warp);
    return result;
}

#define API extern "C" __attribute__((visibility("default"))) int

API cuInit(unsigned) { return SUCCESS; }
API cuDeviceGet(int *device, int ordinal) { *device = ordinal; return ordinal == 0 ? SUCCESS : 101; }
API cuDeviceGetCount(int *count) { *count = 1; return SUCCESS; }
API cuDeviceGetName(char *name, int length, int) { std::snprintf(name, length, "host"); return SUCCESS; }
API cuDevicePrimaryCtxRetain(void **context, int) { static int primary; *context = &primary; return SUCCESS; }
API cuDevicePrimaryCtxRelease_v2(int) { return SUCCESS; }
API cuCtxSetCurrent(void *) { return SUCCESS; }
API cuCtxGetCurrent(void **context) { return cuDevicePrimaryCtxRetain(context, 0); }
API cuCtxSynchronize() { return SUCCESS; }
API cuDeviceGetAttribute(int *value, int attribute, int) {
    switch (attribute) {
    case 1: *value = 1024; break;          // threads of a block
    case 8: *value = 48 << 10; break;      // shared memory of a block
    case 16: *value = 4; break;            // multiprocessors
    case 75: *value = 9; break;            // compute capability
    case 76: *value = 0; break;
    case 97: *value = 227 << 10; break;    // shared memory of a block that asks for more
    case 115: *value = 1; break;           // memory pools
    default: *value = 0;
    }
    return SUCCESS;
}
API cuDeviceGetDefaultMemPool(void **pool, int) { *pool = nullptr; return SUCCESS; }
API cuMemPoolSetAttribute(void *, int attribute, void *) {
    Lock lock(driver);
    if (attribute == 8) most_used = used; // the high-water mark
    return SUCCESS;
}
API cuMemPoolGetAttribute(void *, int attribute, void *value) {
    Lock lock(driver);
    switch (attribute) {
    case 5:                                                            // reserved
    case 7: *static_cast<uint64_t *>(value) = used; return SUCCESS;      // used
    case 6:                                                            // the most of either
    case 8: *static_cast<uint64_t *>(value) = most_used; return SUCCESS;
    default: return INVALID_VALUE;
    }
}
API cuGetErrorName(int, const char **text) { *text = "an error of the host's driver"; return SUCCESS; }
API cuGetErrorString(int, const char **text) { *text = "an error of the host's driver"; return SUCCESS; }

API cuStreamCreate(void **stream, unsigned) { static int only; *stream = &only; return SUCCESS; }
API cuStreamDestroy_v2(void *) { return SUCCESS; }
API cuStreamSynchronize(void *) { return SUCCESS; }
API cuStreamWaitEvent(void *, void *, unsigned) { return SUCCESS; }
API cuStreamIsCapturing(void *, int *status) { *status = 0; return SUCCESS; }
API cuEventCreate(void **event, unsigned) { static int any; *event = &any; return SUCCESS; }
API cuEventDestroy_v2(void *) { return SUCCESS; }
API cuEventRecord(void *, void *) { return SUCCESS; }
API cuEventQuery(void *) { return SUCCESS; }
API cuEventSynchronize(void *) { return SUCCESS; }
API cuEventElapsedTime(float *ms, void *, void *) { *ms = 0; return SUCCESS; }
API cuEventElapsedTime_v2(float *ms, void *, void *) { *ms = 0; return SUCCESS; }

API cuMemAlloc_v2(uint64_t *p, size_t bytes) { return allocate(p, bytes); }
API cuMemAllocAsync(uint64_t *p, size_t bytes, void *) { return allocate(p, bytes); }
API cuMemFree_v2(uint64_t p) { return release_memory(p); }
API cuMemFreeAsync(uint64_t p, void *) { return release_memory(p); }
API cuMemGetInfo_v2(size_t *free, size_t *total) {
    Lock lock(driver);
    *total = *free = size_t{1} << 36;
    for (auto [at, bytes] : allocations) *free -= bytes;
    return SUCCESS;
}
API cuMemcpyHtoD_v2(uint64_t to, const void *from, size_t bytes) { return copy(reinterpret_cast<void *>(to), from, bytes); }
API cuMemcpyHtoDAsync_v2(uint64_t to, const void *from, size_t bytes, void *) { return cuMemcpyHtoD_v2(to, from, bytes); }
API cuMemcpyDtoH_v2(void *to, uint64_t from, size_t bytes) { return copy(to, reinterpret_cast<void *>(from), bytes); }
API cuMemcpyDtoHAsync_v2(void *to, uint64_t from, size_t bytes, void *) { return cuMemcpyDtoH_v2(to, from, bytes); }
API cuMemcpyDtoD_v2(uint64_t to, uint64_t from, size_t bytes) { return copy(reinterpret_cast<void *>(to), reinterpret_cast<void *>(from), bytes); }
API cuMemcpyDtoDAsync_v2(uint64_t to, uint64_t from, size_t bytes, void *) { return cuMemcpyDtoD_v2(to, from, bytes); }
API cuMemsetD8_v2(uint64_t to, unsigned char value, size_t bytes) { std::memset(reinterpret_cast<void *>(to), value, bytes); return SUCCESS; }
API cuMemsetD8Async(uint64_t to, unsigned char value, size_t bytes, void *) { return cuMemsetD8_v2(to, value, bytes); }

API cuModuleLoadData(void **module, const void *image) {
    const std::string ptx(static_cast<const char *>(image));
    const auto has = [&](const char *text) { return ptx.find(text) != std::string::npos; };
    *module = new Module{has("bar.sync") || has("bar.red") || has("barrier.") || has("shfl.") || has("bar.warp")};
    return SUCCESS;
}
API cuModuleUnload(void *module) { delete static_cast<Module *>(module); return SUCCESS; }
API cuModuleGetFunction(void **function, void *module, const char *name) {
    auto found = registry().find(name);
    if (found == registry().end()) {
        std::fprintf(stderr, "host CUDA: no kernel %s\n", name);
        return NOT_FOUND;
    }
    *function = new Function{found->second, static_cast<Module *>(module)->has_barriers, 48 << 10};
    return SUCCESS;
}
API cuFuncSetAttribute(void *function, int attribute, int value) {
    if (attribute == 8) static_cast<Function *>(function)->shared = value;
    return value <= 227 << 10 ? SUCCESS : INVALID_VALUE;
}
API cuFuncGetAttribute(int *value, int, void *) { *value = 0; return SUCCESS; }
API cuOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks, void *, int, size_t) { *blocks = 1; return SUCCESS; }

API cuLaunchKernel(void *launched, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                   unsigned shared, void *, void **arguments, void **) {
    Lock lock(driver);
    auto function = static_cast<Function *>(launched);
    const unsigned count = bx * by * bz;
    if (gx * gy * gz == 0 || gy > 65535 || gz > 65535 || count == 0 || count > 1024) return INVALID_VALUE;
    if (shared > static_cast<unsigned>(function->shared)) return INVALID_VALUE;
    gridDim = {gx, gy, gz};
    blockDim = {bx, by, bz};
    block.kernel = function->call;
    block.arguments = arguments;
    block.on_fibers = function->has_barriers;
    for (unsigned b = 0; b < gx * gy * gz; ++b) {
        blockIdx = {b % gx, b / gx % gy, b / (gx * gy)};
        shared_room.assign(shared + 16, static_cast<char>(0xff));
        run_block(count);
        for (unsigned i = 0; i < 16; ++i) {
            if (static_cast<unsigned char>(shared_room[shared + i]) != 0xff) fail("a write beyond shared memory");
        }
    }
    return SUCCESS;
}
