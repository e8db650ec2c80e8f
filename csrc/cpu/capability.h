// Which instruction set serves: the best the machine has, unless one is forced.
#pragma once

#include <string>

#include "kernels.h"

namespace resnext::cpu {

const Kernels& active_kernels();

// Whether kernels multiply values of this dtype two by two.
inline bool by_pairs(const Kernels& kernels, Dtype dtype) {
  return dtype == Dtype::kBFloat16 && kernels.multiplies_pairs;
}

// Whether they multiply so many source channels, of a pixel or of one of its groups, two by two.
inline bool channels_by_pairs(const Kernels& kernels, Dtype dtype, int64_t channels) {
  return by_pairs(kernels, dtype) && channels % 2 == 0;
}

// Forces "amx_bf16", "avx512_bf16", "avx512", "avx2" or "portable" for the whole process; "" goes back to the automatic
// choice. Throws std::runtime_error for a name that is unknown or that this machine lacks.
void force_capability(const std::string& name);

}  // namespace resnext::cpu
