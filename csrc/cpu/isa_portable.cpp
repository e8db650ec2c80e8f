// The kernels for any machine, with what the compiler may use by default (SSE2 on x86-64, NEON on 64-bit ARM).
#include "kernels.h"

#include <utility>

#define RESNEXT_LANES 4
#define RESNEXT_REGISTERS 16

namespace resnext::cpu {
namespace portable {
namespace {
#include "kernels.inl.h"
}  // namespace
}  // namespace portable

const Kernels* portable_kernels() {
  using namespace portable;
  static constexpr Kernels kernels = RESNEXT_KERNELS("portable", false, false);
  return &kernels;
}

}  // namespace resnext::cpu
