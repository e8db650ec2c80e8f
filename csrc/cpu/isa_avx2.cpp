// The kernels for AVX2 and FMA.
#include "kernels.h"

#if defined(__x86_64__)
// Before the pragma: what these headers define is compiled for every x86-64 machine.
#include <immintrin.h>

#include <utility>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif

#define RESNEXT_LANES 8
#define RESNEXT_REGISTERS 16

namespace resnext::cpu {
namespace avx2 {
namespace {
#include "kernels.inl.h"
}  // namespace
}  // namespace avx2

const Kernels* avx2_kernels() {
  using namespace avx2;
  static constexpr Kernels kernels = RESNEXT_KERNELS("avx2", false, false);
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
const Kernels* avx2_kernels() { return nullptr; }
}  // namespace resnext::cpu

#endif
