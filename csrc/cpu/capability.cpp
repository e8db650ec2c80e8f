#include "capability.h"

#include <torch/headeronly/util/Exception.h>

#include <atomic>

namespace resnext::cpu {
namespace {

// Null unless both the binary and the machine (operating system included) have the instruction set.
const Kernels* find_kernels(const std::string& name) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (name == "avx512_bf16") {
    return avx512 && __builtin_cpu_supports("avx512bf16") ? avx512_bf16_kernels() : nullptr;
  }
  if (name == "avx512") return avx512 ? avx512_kernels() : nullptr;
  if (name == "avx2") return avx2 ? avx2_kernels() : nullptr;  // every machine with AVX2 has F16C
#endif
  return name == "portable" ? portable_kernels() : nullptr;
}

const Kernels* best_kernels() {
  for (const char* name : {"avx512_bf16", "avx512", "avx2"}) {
    if (const Kernels* kernels = find_kernels(name)) return kernels;
  }
  return portable_kernels();
}

std::atomic<const Kernels*>& active() {
  static std::atomic<const Kernels*> kernels{best_kernels()};
  return kernels;
}

}  // namespace

const Kernels& active_kernels() { return *active().load(std::memory_order_relaxed); }

void force_capability(const std::string& name) {
  const Kernels* kernels = name.empty() ? best_kernels() : find_kernels(name);
  STD_TORCH_CHECK(kernels != nullptr,
                  "set_cpu_capability: expected avx512_bf16, avx512, avx2, portable or an empty name, and a machine ",
                  "that has it, got '", name, "'; leave the choice automatic with ''");
  active().store(kernels, std::memory_order_relaxed);
}

}  // namespace resnext::cpu
