#include "capability.h"

#include <torch/headeronly/util/Exception.h>

#include <atomic>

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace resnext::cpu {
namespace {

// Whether the machine has AMX with products of bfloat16, and the system lets this process use its registers, which a
// process has to ask for.
bool has_amx_bf16() {
#if defined(__x86_64__) && defined(__linux__)
  constexpr unsigned kBFloat16 = 1u << 22;
  constexpr unsigned kTiles = 1u << 24;
  constexpr int kRequestPermission = 0x1023;  // ARCH_REQ_XCOMP_PERM
  constexpr int kTileData = 18;
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  if (__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) == 0) return false;
  if ((edx & kBFloat16) == 0 || (edx & kTiles) == 0) return false;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

// Null unless both the binary and the machine (operating system included) have the instruction set.
const Kernels* find_kernels(const std::string& name) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  const bool avx512_bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
  if (name == "amx_bf16") return avx512_bf16 && has_amx_bf16() ? amx_bf16_kernels() : nullptr;
  if (name == "avx512_bf16") return avx512_bf16 ? avx512_bf16_kernels() : nullptr;
  if (name == "avx512") return avx512 ? avx512_kernels() : nullptr;
  if (name == "avx2") return avx2 ? avx2_kernels() : nullptr;  // every machine with AVX2 has F16C
#endif
  return name == "portable" ? portable_kernels() : nullptr;
}

const Kernels* best_kernels() {
  for (const char* name : {"amx_bf16", "avx512_bf16", "avx512", "avx2"}) {
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
                  "set_cpu_capability: expected amx_bf16, avx512_bf16, avx512, avx2, portable or an empty name, and a ",
                  "machine that has it, got '", name, "'; leave the choice automatic with ''");
  active().store(kernels, std::memory_order_relaxed);
}

}  // namespace resnext::cpu
