// The scheduler behind cuda_emulation.h: one block at a time, its threads as fibers.
#include "cuda_emulation.h"

#include <setjmp.h>
#include <ucontext.h>

#include <deque>
#include <memory>
#include <vector>

namespace resnext::cuda::emulation {
namespace {

constexpr size_t kStackBytes = 64 * 1024;
constexpr size_t kSharedLimit = 227 * 1024;

struct Copy {
  uint32_t shared;
  const void* source;

  void land() const {
    unsigned char* const target = shared_pointer(shared, 16);
    if (source == nullptr) {
      std::memset(target, 0, 16);
    } else {
      std::memcpy(target, source, 16);
    }
  }
};

// Started once by ucontext, then switched by setjmp, which unlike swapcontext makes no system call; runs block after
// block.
struct Fiber {
  jmp_buf resume;
  std::unique_ptr<unsigned char[]> stack;
  std::deque<std::vector<Copy>> copies{1};  // by groups; the last is still open
  bool done;                                // with the present block
};

// Counts arrivals; the last of `size` opens the barrier by moving to the next generation.
struct Barrier {
  int arrived = 0;
  unsigned generation = 0;
};

struct Warp {
  Barrier barrier;
  void* operands[kLanes];
};

std::deque<Fiber> fibers;  // never moved
std::vector<Warp> warps;
Barrier block;
jmp_buf scheduler;
int current;
bool descending_order = false;
int64_t launches = 0;
bool progress;  // whether a fiber arrived somewhere or ended since this was last cleared
size_t shared_bytes;
alignas(16) unsigned char shared_memory[kSharedLimit];
const std::function<void()>* body;

[[noreturn]] void fail(const char* message) {
  std::fprintf(stderr, "cuda emulation: %s (block %u, thread %u)\n", message, blockIdx.x, threadIdx.x);
  std::abort();
}

void yield() {
  if (_setjmp(fibers[current].resume) == 0) {
    _longjmp(scheduler, 1);
  }
}

void resume(int fiber) {
  current = fiber;
  threadIdx.x = fiber;
  if (_setjmp(scheduler) == 0) {
    _longjmp(fibers[fiber].resume, 1);
  }
}

template <typename OnLast>
void arrive_and_wait(Barrier& barrier, int size, OnLast on_last) {
  const unsigned generation = barrier.generation;
  progress = true;
  if (++barrier.arrived == size) {
    on_last();
    barrier.arrived = 0;
    ++barrier.generation;
    return;
  }
  while (barrier.generation == generation) {
    yield();
  }
}

void fiber_main() {
  for (yield();; yield()) {
    (*body)();
    for (const auto& group : fibers[current].copies) {
      if (!group.empty()) {
        fail("a thread ended with asynchronous copies in flight");
      }
    }
    fibers[current].copies.resize(1);
    fibers[current].done = true;
    progress = true;
  }
}

void start_fibers(int count) {
  while (static_cast<int>(fibers.size()) < count) {
    current = static_cast<int>(fibers.size());
    fibers.emplace_back();
    Fiber& fiber = fibers.back();
    fiber.stack.reset(new unsigned char[kStackBytes]);
    ucontext_t context;
    getcontext(&context);
    context.uc_stack.ss_sp = fiber.stack.get();
    context.uc_stack.ss_size = kStackBytes;
    context.uc_link = nullptr;
    makecontext(&context, fiber_main, 0);
    if (_setjmp(scheduler) == 0) {
      setcontext(&context);
    }
  }
}

void run_block(int threads) {
  std::memset(shared_memory, 0xff, shared_bytes);  // NaN in float, half and bfloat16
  warps.assign((threads + kLanes - 1) / kLanes, Warp{});
  block = Barrier{};
  for (int i = 0; i < threads; ++i) {
    fibers[i].done = false;
  }
  // Each warp runs as far as it can before the next one does: the widest skew that the barriers allow.
  const int warp_count = static_cast<int>(warps.size());
  for (int remaining = threads; remaining > 0;) {
    bool any_progress = false;
    for (int i = 0; i < warp_count; ++i) {
      const int first = (descending_order ? warp_count - 1 - i : i) * kLanes;
      const int last = first + kLanes < threads ? first + kLanes : threads;
      do {
        progress = false;
        for (int fiber = first; fiber < last; ++fiber) {
          if (!fibers[fiber].done) {
            resume(fiber);
            remaining -= fibers[fiber].done;
          }
        }
        any_progress |= progress;
      } while (progress);
    }
    if (!any_progress) {
      fail("deadlock: a barrier or warp collective not reached by all threads");
    }
  }
}

}  // namespace

void run_grid(int64_t blocks, int threads, size_t bytes, const std::function<void()>& thread) {
  if (bytes > kSharedLimit) {
    fail("more shared memory than any device has");
  }
  shared_bytes = bytes;
  body = &thread;
  ++launches;
  start_fibers(threads);
  gridDim.x = static_cast<unsigned>(blocks);
  blockDim.x = threads;
  for (int64_t i = 0; i < blocks; ++i) {
    blockIdx.x = static_cast<unsigned>(i);
    run_block(threads);
  }
}

int64_t launch_count() { return launches; }

void set_descending_order(bool descending) { descending_order = descending; }

unsigned char* dynamic_shared() { return shared_memory; }

unsigned char* shared_pointer(uint32_t address, size_t bytes) {
  if (address % bytes != 0 || address + bytes > shared_bytes) {
    fail("misaligned or out-of-range shared address");
  }
  return shared_memory + address;
}

void block_barrier() {
  arrive_and_wait(block, static_cast<int>(blockDim.x), [] {});
}

void warp_collective(void* operand, void (*combine)(void* const* operands)) {
  Warp& warp = warps[current / kLanes];
  warp.operands[current % kLanes] = operand;
  arrive_and_wait(warp.barrier, kLanes, [&] { combine(warp.operands); });
}

void queue_copy(uint32_t shared, const void* source) {
  if (reinterpret_cast<uintptr_t>(source) % 16 != 0) {
    fail("misaligned global address in an asynchronous copy");
  }
  const Copy copy{shared, source};
  if (descending_order) {
    copy.land();
  } else {
    fibers[current].copies.back().push_back(copy);
  }
}

void close_copies() { fibers[current].copies.emplace_back(); }

void finish_copies(int pending) {
  auto& groups = fibers[current].copies;
  while (static_cast<int>(groups.size()) - 1 > pending) {
    for (const Copy& copy : groups.front()) {
      copy.land();
    }
    groups.pop_front();
  }
}

}  // namespace resnext::cuda::emulation
