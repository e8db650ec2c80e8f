// The kernels for AVX-512, and the same with products of pairs, or matrices, of bfloat16 where the machine has them.
#include "kernels.h"

#if defined(__x86_64__)
// Before the pragma: what these headers define is compiled for every x86-64 machine.
#include <immintrin.h>

#include <utility>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#endif

#define RESNEXT_LANES 16
#define RESNEXT_REGISTERS 32

namespace resnext::cpu {
namespace avx512 {
namespace {
#include "kernels.inl.h"
}  // namespace
}  // namespace avx512

const Kernels* avx512_kernels() {
  using namespace avx512;
  static constexpr Kernels kernels = RESNEXT_KERNELS("avx512", false, false);
  return &kernels;
}

const Kernels* avx512_bf16_kernels() {
  using namespace avx512;
  static constexpr Kernels kernels = RESNEXT_KERNELS("avx512_bf16", true, false);
  return &kernels;
}

const Kernels* amx_bf16_kernels() {
  using namespace avx512;
  static constexpr Kernels kernels = RESNEXT_KERNELS("amx_bf16", true, true);
  return &kernels;
}

}  // namespace resnext::cpu

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#else

namespace resnext::cpu {
const Kernels* avx512_kernels() { return nullptr; }
const Kernels* avx512_bf16_kernels() { return nullptr; }
const Kernels* amx_bf16_kernels() { return nullptr; }
}  // namespace resnext::cpu

#endif
