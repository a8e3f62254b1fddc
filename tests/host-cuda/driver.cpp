// libcuda on the host: enough of the driver for candle and for the kernels here, which it runs, block
// after block, as threads of one core that switch at barriers.
//
// Memory is checked rather than fast: fresh and freed memory is NaN, and a write beside an allocation
// aborts when it is freed.  HOST_CUDA_ORDER=reverse lets the last thread of a block go first: results
// that depend on the order of threads between barriers differ then.
//
// A stream that captures records work instead of doing it, under the driver's rules: see "streams".
#include "device.h"

#include <algorithm>
#include <functional>
#include <csetjmp>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <ucontext.h>
#include <vector>

Index threadIdx, blockIdx, blockDim, gridDim;

namespace {

enum Status {
    SUCCESS = 0,
    INVALID_VALUE = 1,
    ILLEGAL_STATE = 401,
    NOT_FOUND = 500,
    NOT_SUPPORTED = 801,
    CAPTURE_UNSUPPORTED = 900,
    CAPTURE_INVALIDATED = 901,
    CAPTURE_ISOLATION = 905,
    CAPTURE_IMPLICIT = 906,
    CAPTURED_EVENT = 907,
};

[[noreturn]] void fail(const char *what) {
    std::fprintf(stderr, "host CUDA: %s\n", what);
    std::abort();
}

// --- threads of a block --------------------------------------------------------------------------

enum class At { Running, Block, Warp, End };

struct Thread {
    ucontext_t context; // where it starts
    jmp_buf stopped; // where it goes on
    bool started;
    std::vector<char> stack;
    At at;
    uint64_t given;
    int flag;
};

struct Block {
    std::vector<Thread> threads;
    jmp_buf scheduler;
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
    if (_setjmp(self.stopped) == 0) _longjmp(block.scheduler, 1);
}

void enter() {
    block.kernel(block.arguments);
    block.threads[block.current].at = At::End;
    _longjmp(block.scheduler, 1);
}

// Lets a thread run up to its next barrier.  Jumps ask nothing of the system, other than swaps of contexts.
__attribute__((noinline)) void resume(Thread &thread) {
    if (_setjmp(block.scheduler) != 0) return;
    if (thread.started) _longjmp(thread.stopped, 1);
    thread.started = true;
    setcontext(&thread.context);
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
        thread.context.uc_link = nullptr;
        makecontext(&thread.context, enter, 0);
        thread.at = At::Running;
        thread.started = false;
    }
    for (;;) {
        unsigned ended = 0;
        for (unsigned i = 0; i < count; ++i) {
            const unsigned t = backwards ? count - 1 - i : i;
            if (block.threads[t].at == At::Running) {
                block.current = t;
                threadIdx = index_of(t);
                resume(block.threads[t]);
            }
            ended += block.threads[t].at == At::End;
        }
        if (ended == count) return;
        release(count);
    }
}

// --- modules -------------------------------------------------------------------------------------

struct Kernel {
    void (*call)(void **);
    std::vector<size_t> sizes; // of the arguments
};

std::map<std::string, Kernel> &registry() {
    static std::map<std::string, Kernel> kernels;
    return kernels;
}

struct Module {
    bool has_barriers;
};

struct Function {
    Kernel kernel;
    bool has_barriers;
    int shared;
};

// --- memory --------------------------------------------------------------------------------------

constexpr size_t GUARD = 256;
std::map<char *, size_t> allocations;
uint64_t used = 0, most_used = 0;
uint64_t used_by_graphs = 0, most_used_by_graphs = 0;
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

void check_guards(const char *at, size_t bytes) {
    for (size_t i = 0; i < GUARD; ++i) {
        const bool before = static_cast<unsigned char>(at[-1 - static_cast<ptrdiff_t>(i)]) == 0xa5;
        const bool after = static_cast<unsigned char>(at[bytes + i]) == 0xa5;
        if (!before || !after) fail("a write beside an allocation");
    }
}

int release_memory(uint64_t p) {
    Lock lock(driver);
    auto found = allocations.find(reinterpret_cast<char *>(p));
    if (found == allocations.end()) fail("memory freed that was not allocated");
    auto [at, bytes] = *found;
    check_guards(at, bytes);
    allocations.erase(found);
    used -= bytes;
    std::memset(at, 0xff, bytes);
    std::free(at - GUARD);
    return SUCCESS;
}

int copy(void *to, const void *from, size_t bytes) {
    Lock lock(driver);
    std::memmove(to, from, bytes);
    return SUCCESS;
}

// --- streams -------------------------------------------------------------------------------------
//
// While a stream captures, in the mode of its thread: work is recorded; memory is allocated and freed by
// nodes, and what was there before must not be freed; waiting for the stream, for the context or for
// what was recorded before, and calls that wait implicitly, are errors, after which there is no graph.
// The legacy stream cannot capture, nor be used by a thread that does.

enum NodeType { KERNEL_NODE = 0, MEMCPY_NODE = 1, MEMSET_NODE = 2, ALLOC_NODE = 10, FREE_NODE = 11 };
enum MemoryType { NO_MEMORY = 0, HOST_MEMORY = 1, DEVICE_MEMORY = 2 };

struct Node {
    int type;
    std::function<int()> work;
    int from = NO_MEMORY, to = NO_MEMORY;
};

// Memory of a graph: there from one of its nodes to another, NaN before and after.
struct Owned {
    size_t bytes;
    bool live, freed_inside;
};
std::map<char *, Owned> owned;

struct Graph {
    std::vector<std::unique_ptr<Node>> nodes;
    std::vector<char *> memory;
    ~Graph() {
        for (char *at : memory) {
            // What the graph does not free itself stays known, so that freeing it is an error and no crash.
            if (owned[at].live || !owned[at].freed_inside) continue;
            used_by_graphs -= owned[at].bytes;
            owned.erase(at);
            std::free(at - GUARD);
        }
    }
};
using Shared = std::shared_ptr<Graph>;

struct Capture {
    uint64_t id;
    bool valid;
    Shared graph;
};

struct Stream {
    std::unique_ptr<Capture> capture;
};
Stream legacy;
thread_local Stream per_thread;
// The capture that this thread began.
thread_local Capture *capturing = nullptr;

struct Event {
    bool recorded;
    uint64_t capture;
};

Stream &stream_of(void *stream) {
    switch (reinterpret_cast<uintptr_t>(stream)) {
    case 0: case 1: return legacy;
    case 2: return per_thread;
    default: return *static_cast<Stream *>(stream);
    }
}

int spoil(Capture &capture, int status) {
    capture.valid = false;
    return status;
}

// For calls that may wait for everything.
int safe() { return capturing == nullptr ? SUCCESS : spoil(*capturing, CAPTURE_UNSUPPORTED); }

// The capture that a stream's work goes to, or none; or an error.
int capture_of(void *stream, Capture *&capture) {
    Stream &given = stream_of(stream);
    if (&given == &legacy && capturing != nullptr) return spoil(*capturing, CAPTURE_IMPLICIT);
    capture = given.capture.get();
    return capture == nullptr || capture->valid ? SUCCESS : CAPTURE_INVALIDATED;
}

// Does work, or records it.
int submit(void *stream, Node node) {
    Lock lock(driver);
    Capture *capture = nullptr;
    if (int status = capture_of(stream, capture)) return status;
    if (capture == nullptr) return node.work();
    capture->graph->nodes.push_back(std::make_unique<Node>(std::move(node)));
    return SUCCESS;
}

int submit_copy(void *stream, void *to, int to_type, const void *from, int from_type, size_t bytes) {
    return submit(stream, {MEMCPY_NODE, [=] { return copy(to, from, bytes); }, from_type, to_type});
}

int allocate_on(uint64_t *p, size_t bytes, void *stream) {
    Lock lock(driver);
    Capture *capture = nullptr;
    if (int status = capture_of(stream, capture)) return status;
    if (int status = allocate(p, bytes)) return capture == nullptr ? status : spoil(*capture, status);
    if (capture == nullptr) return SUCCESS;
    auto at = reinterpret_cast<char *>(*p);
    // Graphs have a pool of their own.
    allocations.erase(at);
    used -= bytes;
    used_by_graphs += bytes;
    most_used_by_graphs = std::max(most_used_by_graphs, used_by_graphs);
    owned[at] = {bytes, false, false};
    capture->graph->memory.push_back(at);
    return submit(stream, {ALLOC_NODE, [=] {
        owned[at].live = true;
        std::memset(at, 0xff, bytes);
        return SUCCESS;
    }});
}

int free_owned(char *at) {
    check_guards(at, owned[at].bytes);
    std::memset(at, 0xff, owned[at].bytes);
    owned[at].live = false;
    return SUCCESS;
}

int free_on(uint64_t p, void *stream) {
    Lock lock(driver);
    Capture *capture = nullptr;
    if (int status = capture_of(stream, capture)) return status;
    auto at = reinterpret_cast<char *>(p);
    auto found = owned.find(at);
    if (capture == nullptr) {
        if (found == owned.end()) return release_memory(p);
        return found->second.live ? free_owned(at) : INVALID_VALUE;
    }
    bool own = false;
    for (char *known : capture->graph->memory) own |= known == at;
    if (!own || found->second.freed_inside) return spoil(*capture, INVALID_VALUE);
    found->second.freed_inside = true;
    return submit(stream, {FREE_NODE, [=] { return free_owned(at); }});
}

// --- launches ------------------------------------------------------------------------------------

struct Grid {
    Index blocks, threads;
    unsigned shared;
};

int run(const Function &function, const Grid &grid, void **arguments) {
    gridDim = grid.blocks;
    blockDim = grid.threads;
    block.kernel = function.kernel.call;
    block.arguments = arguments;
    block.on_fibers = function.has_barriers;
    const auto [gx, gy, gz] = grid.blocks;
    for (unsigned b = 0; b < gx * gy * gz; ++b) {
        blockIdx = {b % gx, b / gx % gy, b / (gx * gy)};
        shared_room.assign(grid.shared + 16, static_cast<char>(0xff));
        run_block(blockDim.x * blockDim.y * blockDim.z);
        for (unsigned i = 0; i < 16; ++i) {
            if (static_cast<unsigned char>(shared_room[grid.shared + i]) != 0xff) fail("a write beyond shared memory");
        }
    }
    return SUCCESS;
}

// Copies of a launch's arguments, as aligned as any.
struct Arguments {
    std::vector<std::unique_ptr<char, void (*)(void *)>> values;
    Arguments(const std::vector<size_t> &sizes, void **given) {
        for (size_t i = 0; i < sizes.size(); ++i) {
            auto room = static_cast<char *>(std::aligned_alloc(64, (sizes[i] + 63) / 64 * 64));
            std::memcpy(room, given[i], sizes[i]);
            values.emplace_back(room, std::free);
        }
    }
    std::vector<void *> pointers() const {
        std::vector<void *> all;
        for (auto &value : values) all.push_back(value.get());
        return all;
    }
};

} // namespace

Registered::Registered(const char *name, void (*call)(void **), std::vector<size_t> sizes) {
    registry()[name] = {call, std::move(sizes)};
}

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

unsigned balloted(bool flag) {
    const unsigned self = block.current, first = self / 32 * 32;
    block.threads[self].given = flag;
    wait(At::Warp);
    unsigned ballot = 0;
    for (unsigned t = 0; t < 32 && first + t < block.threads.size(); ++t) ballot |= static_cast<unsigned>(block.threads[first + t].given != 0) << t;
    wait(At::Warp);
    return ballot;
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
API cuCtxSynchronize() { return safe(); }
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
// As if graphs held their memory from the capture on.
API cuDeviceGetGraphMemAttribute(int, int attribute, void *value) {
    Lock lock(driver);
    *static_cast<uint64_t *>(value) = attribute % 2 == 0 ? used_by_graphs : most_used_by_graphs;
    return SUCCESS;
}
API cuDeviceSetGraphMemAttribute(int, int, void *) {
    Lock lock(driver);
    most_used_by_graphs = used_by_graphs;
    return SUCCESS;
}
API cuGetErrorName(int, const char **text) { *text = "an error of the host's driver"; return SUCCESS; }
API cuGetErrorString(int, const char **text) { *text = "an error of the host's driver"; return SUCCESS; }

API cuStreamCreate(void **stream, unsigned) { *stream = new Stream; return SUCCESS; }
API cuStreamDestroy_v2(void *stream) { delete static_cast<Stream *>(stream); return SUCCESS; }
API cuStreamSynchronize(void *stream) {
    Lock lock(driver);
    Capture *capture = nullptr;
    if (int status = capture_of(stream, capture)) return status;
    return capture == nullptr ? SUCCESS : spoil(*capture, CAPTURE_UNSUPPORTED);
}
API cuStreamIsCapturing(void *stream, int *status) {
    const auto &capture = stream_of(stream).capture;
    *status = capture == nullptr ? 0 : capture->valid ? 1 : 2;
    return SUCCESS;
}
API cuStreamBeginCapture_v2(void *stream, int mode) {
    Lock lock(driver);
    Stream &given = stream_of(stream);
    if (&given == &legacy || mode != 1) return CAPTURE_UNSUPPORTED; // captures of a thread are all that is here
    if (given.capture != nullptr || capturing != nullptr) return ILLEGAL_STATE;
    static uint64_t captures = 0;
    given.capture = std::make_unique<Capture>(Capture{++captures, true, std::make_shared<Graph>()});
    capturing = given.capture.get();
    return SUCCESS;
}
API cuStreamEndCapture(void *stream, void **graph) {
    Lock lock(driver);
    *graph = nullptr;
    Stream &given = stream_of(stream);
    if (given.capture == nullptr || given.capture.get() != capturing) return ILLEGAL_STATE;
    auto capture = std::move(given.capture);
    capturing = nullptr;
    if (!capture->valid) return CAPTURE_INVALIDATED;
    *graph = new Shared(capture->graph);
    return SUCCESS;
}
API cuStreamWaitEvent(void *stream, void *awaited, unsigned) {
    Lock lock(driver);
    Capture *capture = nullptr;
    if (int status = capture_of(stream, capture)) return status;
    auto event = static_cast<Event *>(awaited);
    if (!event->recorded || event->capture == (capture == nullptr ? 0 : capture->id)) return SUCCESS;
    return capture == nullptr ? CAPTURED_EVENT : spoil(*capture, CAPTURE_ISOLATION);
}
API cuEventCreate(void **event, unsigned) { *event = new Event{false, 0}; return SUCCESS; }
API cuEventDestroy_v2(void *event) { delete static_cast<Event *>(event); return SUCCESS; }
API cuEventRecord(void *event, void *stream) {
    Lock lock(driver);
    Capture *capture = nullptr;
    if (int status = capture_of(stream, capture)) return status;
    *static_cast<Event *>(event) = {true, capture == nullptr ? 0 : capture->id};
    return SUCCESS;
}
API cuEventQuery(void *) { return safe(); }
API cuEventSynchronize(void *) { return safe(); }
API cuEventElapsedTime(float *ms, void *, void *) { *ms = 0; return safe(); }
API cuEventElapsedTime_v2(float *ms, void *, void *) { *ms = 0; return safe(); }

API cuGraphGetNodes(void *graph, void **nodes, size_t *count) {
    auto &all = (*static_cast<Shared *>(graph))->nodes;
    if (nodes != nullptr) {
        for (size_t i = 0; i < *count; ++i) nodes[i] = i < all.size() ? all[i].get() : nullptr;
    }
    *count = nodes == nullptr || all.size() < *count ? all.size() : *count;
    return SUCCESS;
}
API cuGraphNodeGetType(void *node, int *type) { *type = static_cast<Node *>(node)->type; return SUCCESS; }
// CUDA_MEMCPY3D, as far as it is looked at.
struct Copied {
    size_t from_at[4];
    int from_type;
    const void *from_host;
    uint64_t from_device;
    void *from_array, *reserved;
    size_t from_pitch, from_height, to_at[4];
    int to_type;
    void *to_host;
    uint64_t to_device;
    void *to_array, *reserved_too;
    size_t to_pitch, to_height, width, height, depth;
};
static_assert(sizeof(Copied) == 200);
API cuGraphMemcpyNodeGetParams(void *given, Copied *copied) {
    auto node = static_cast<Node *>(given);
    if (node->type != MEMCPY_NODE) return INVALID_VALUE;
    *copied = {};
    copied->from_type = node->from;
    copied->to_type = node->to;
    return SUCCESS;
}
API cuGraphInstantiateWithFlags(void **exec, void *graph, unsigned long long flags) {
    if (flags != 0) return NOT_SUPPORTED;
    *exec = new Shared(*static_cast<Shared *>(graph));
    return SUCCESS;
}
API cuGraphLaunch(void *exec, void *stream) {
    Lock lock(driver);
    Capture *capture = nullptr;
    if (int status = capture_of(stream, capture)) return status;
    if (capture != nullptr) return spoil(*capture, CAPTURE_UNSUPPORTED); // no graphs in graphs here
    const Graph &graph = **static_cast<Shared *>(exec);
    for (char *at : graph.memory) {
        if (owned[at].live) return INVALID_VALUE; // what an earlier launch allocated is still there
    }
    for (auto &node : graph.nodes) {
        if (node->from == HOST_MEMORY || node->to == HOST_MEMORY) fail("a graph with addresses of the host is launched");
        if (int status = node->work()) return status;
    }
    return SUCCESS;
}
API cuGraphExecDestroy(void *exec) { Lock lock(driver); delete static_cast<Shared *>(exec); return SUCCESS; }
API cuGraphDestroy(void *graph) { Lock lock(driver); delete static_cast<Shared *>(graph); return SUCCESS; }

API cuMemAlloc_v2(uint64_t *p, size_t bytes) { int status = safe(); return status ? status : allocate(p, bytes); }
API cuMemAllocAsync(uint64_t *p, size_t bytes, void *stream) { return allocate_on(p, bytes, stream); }
API cuMemFree_v2(uint64_t p) { int status = safe(); return status ? status : release_memory(p); }
API cuMemFreeAsync(uint64_t p, void *stream) { return free_on(p, stream); }
API cuMemGetInfo_v2(size_t *free, size_t *total) {
    Lock lock(driver);
    *total = *free = size_t{1} << 36;
    for (auto [at, bytes] : allocations) *free -= bytes;
    for (auto [at, memory] : owned) *free -= memory.bytes;
    return SUCCESS;
}
API cuMemcpyHtoDAsync_v2(uint64_t to, const void *from, size_t bytes, void *stream) {
    return submit_copy(stream, reinterpret_cast<void *>(to), DEVICE_MEMORY, from, HOST_MEMORY, bytes);
}
API cuMemcpyDtoHAsync_v2(void *to, uint64_t from, size_t bytes, void *stream) {
    return submit_copy(stream, to, HOST_MEMORY, reinterpret_cast<void *>(from), DEVICE_MEMORY, bytes);
}
API cuMemcpyDtoDAsync_v2(uint64_t to, uint64_t from, size_t bytes, void *stream) {
    return submit_copy(stream, reinterpret_cast<void *>(to), DEVICE_MEMORY, reinterpret_cast<void *>(from), DEVICE_MEMORY, bytes);
}
API cuMemcpyHtoD_v2(uint64_t to, const void *from, size_t bytes) {
    int status = safe();
    return status ? status : copy(reinterpret_cast<void *>(to), from, bytes);
}
API cuMemcpyDtoH_v2(void *to, uint64_t from, size_t bytes) {
    int status = safe();
    return status ? status : copy(to, reinterpret_cast<void *>(from), bytes);
}
API cuMemcpyDtoD_v2(uint64_t to, uint64_t from, size_t bytes) {
    int status = safe();
    return status ? status : copy(reinterpret_cast<void *>(to), reinterpret_cast<void *>(from), bytes);
}
API cuMemsetD8Async(uint64_t to, unsigned char value, size_t bytes, void *stream) {
    return submit(stream, {MEMSET_NODE, [=] { std::memset(reinterpret_cast<void *>(to), value, bytes); return SUCCESS; }});
}
API cuMemsetD8_v2(uint64_t to, unsigned char value, size_t bytes) {
    int status = safe();
    if (status == SUCCESS) std::memset(reinterpret_cast<void *>(to), value, bytes);
    return status;
}

API cuModuleLoadData(void **module, const void *image) {
    if (int status = safe()) return status;
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
                   unsigned shared, void *stream, void **arguments, void **) {
    Lock lock(driver);
    const Function function = *static_cast<Function *>(launched);
    const unsigned count = bx * by * bz;
    if (gx * gy * gz == 0 || gy > 65535 || gz > 65535 || count == 0 || count > 1024) return INVALID_VALUE;
    if (shared > static_cast<unsigned>(function.shared)) return INVALID_VALUE;
    const Grid grid{{gx, gy, gz}, {bx, by, bz}, shared};
    // Arguments are taken at the launch, whenever it runs.
    auto taken = std::make_shared<Arguments>(function.kernel.sizes, arguments);
    return submit(stream, {KERNEL_NODE, [=] { return run(function, grid, taken->pointers().data()); }});
}

// Work of the other libraries, which they would launch kernels for: `work` is called with a copy of `data`.
extern "C" __attribute__((visibility("default"))) int host_cuda_submit(void *stream, void (*work)(const void *), const void *data, size_t bytes) {
    auto taken = std::make_shared<std::vector<char>>(static_cast<const char *>(data), static_cast<const char *>(data) + bytes);
    return submit(stream, {KERNEL_NODE, [=] { work(taken->data()); return SUCCESS; }});
}
