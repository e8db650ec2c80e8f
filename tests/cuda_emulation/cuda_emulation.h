// CUDA on a CPU, as much of it as csrc/cuda uses: the twin of csrc/cuda/ptx.cuh.
//
// Blocks run one after the other; the threads of a block are fibers of one thread, switched only at barriers and warp
// collectives. Shared memory starts as NaN, and each warp runs as far ahead of the next as the barriers allow, with
// cp.async landing only at the wait; or, in descending order, as far ahead of the previous, with cp.async landing at
// once: a missing wait or barrier shows as a wrong result. Misaligned or out-of-range shared addresses abort.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static  // blocks run one at a time, and a block's fibers share the statics of its kernel
#define RESNEXT_DYNAMIC_SHARED(name) unsigned char* const name = resnext::cuda::emulation::dynamic_shared()

struct Index3 {
  unsigned x;
};
inline Index3 threadIdx, blockIdx, blockDim, gridDim;

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9 };

namespace resnext::cuda {

namespace emulation {

constexpr int kLanes = 32;

// Runs `thread` once per thread of every block.
void run_grid(int64_t blocks, int threads, size_t shared_bytes, const std::function<void()>& thread);
int64_t launch_count();  // since the start of the process
void set_descending_order(bool descending);

unsigned char* dynamic_shared();
unsigned char* shared_pointer(uint32_t address, size_t bytes);  // aborts when misaligned or out of range

void block_barrier();
// Deposits this lane's operand; the last lane to arrive runs `combine` on all 32 operands.
void warp_collective(void* operand, void (*combine)(void* const* operands));

void queue_copy(uint32_t shared, const void* source);  // source null: zeros
void close_copies();
void finish_copies(int pending);  // of all groups but the latest `pending`

struct MatrixOperand {
  uint32_t address;
  uint32_t* registers;
};

template <bool kTranspose>
void combine_ldmatrix(void* const* operands) {
  uint16_t matrices[4][8][8];
  for (int lane = 0; lane < kLanes; ++lane) {
    const auto* operand = static_cast<const MatrixOperand*>(operands[lane]);
    std::memcpy(matrices[lane / 8][lane % 8], shared_pointer(operand->address, 16), 16);
  }
  for (int lane = 0; lane < kLanes; ++lane) {
    for (int m = 0; m < 4; ++m) {
      const int row = lane / 4, col = 2 * (lane % 4);
      const uint16_t low = kTranspose ? matrices[m][col][row] : matrices[m][row][col];
      const uint16_t high = kTranspose ? matrices[m][col + 1][row] : matrices[m][row][col + 1];
      static_cast<const MatrixOperand*>(operands[lane])->registers[m] = low | static_cast<uint32_t>(high) << 16;
    }
  }
}

template <typename T>
float element(uint32_t pair, int index) {
  return static_cast<float>(T(static_cast<uint16_t>(pair >> (16 * index)), T::from_bits()));
}

struct MmaOperand {
  float* d;
  const uint32_t* a;
  uint32_t b[2];
};

template <typename T>
void combine_mma(void* const* operands) {
  float a[16][16], b[16][8];
  for (int lane = 0; lane < kLanes; ++lane) {
    const auto* operand = static_cast<const MmaOperand*>(operands[lane]);
    const int group = lane / 4, pair = 2 * (lane % 4);
    for (int r = 0; r < 4; ++r) {
      for (int e = 0; e < 2; ++e) {
        a[group + 8 * (r % 2)][pair + 8 * (r / 2) + e] = element<T>(operand->a[r], e);
      }
    }
    for (int r = 0; r < 2; ++r) {
      for (int e = 0; e < 2; ++e) {
        b[pair + 8 * r + e][group] = element<T>(operand->b[r], e);
      }
    }
  }
  for (int lane = 0; lane < kLanes; ++lane) {
    float* d = static_cast<const MmaOperand*>(operands[lane])->d;
    for (int r = 0; r < 4; ++r) {
      const int row = lane / 4 + 8 * (r / 2), col = 2 * (lane % 4) + r % 2;
      for (int k = 0; k < 16; ++k) {
        d[r] += a[row][k] * b[k][col];
      }
    }
  }
}

struct VoteOperand {
  bool predicate, result;
};

inline void combine_any(void* const* operands) {
  bool any = false;
  for (int lane = 0; lane < kLanes; ++lane) {
    any |= static_cast<const VoteOperand*>(operands[lane])->predicate;
  }
  for (int lane = 0; lane < kLanes; ++lane) {
    static_cast<VoteOperand*>(operands[lane])->result = any;
  }
}

struct ShuffleOperand {
  float value, result;
  int mask;
};

inline void combine_shuffle_xor(void* const* operands) {
  for (int lane = 0; lane < kLanes; ++lane) {
    auto* operand = static_cast<ShuffleOperand*>(operands[lane]);
    operand->result = static_cast<const ShuffleOperand*>(operands[lane ^ operand->mask])->value;
  }
}

}  // namespace emulation

inline uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(static_cast<const unsigned char*>(pointer) - emulation::dynamic_shared());
}

inline void cp_async_16(uint32_t shared, const void* global, bool valid) {
  emulation::queue_copy(shared, valid ? global : nullptr);
}

inline void cp_async_commit() { emulation::close_copies(); }

template <int kPending>
void cp_async_wait_group() {
  emulation::finish_copies(kPending);
}

template <typename T>
T held(T value) {
  return value;
}

template <bool kTranspose>
void ldmatrix_x4(uint32_t (&matrix)[4], uint32_t shared) {
  emulation::MatrixOperand operand{shared, matrix};
  emulation::warp_collective(&operand, emulation::combine_ldmatrix<kTranspose>);
}

template <typename T>
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  emulation::MmaOperand operand{d, a, {b0, b1}};
  emulation::warp_collective(&operand, emulation::combine_mma<T>);
}

template <typename T>
uint32_t pack2(float low, float high) {
  return T(low).x | static_cast<uint32_t>(T(high).x) << 16;
}

template <typename T>
uint32_t pack2_relu(float low, float high) {
  const auto relu = [](float value) { return value <= 0.0f ? 0.0f : value; };
  return pack2<T>(relu(low), relu(high));
}

template <typename T>
void unpack2(uint32_t bits, float& low, float& high) {
  low = emulation::element<T>(bits, 0);
  high = emulation::element<T>(bits, 1);
}

inline bool any_in_warp(bool predicate) {
  emulation::VoteOperand operand{predicate, false};
  emulation::warp_collective(&operand, emulation::combine_any);
  return operand.result;
}

inline float shuffle_xor(float value, int mask) {
  emulation::ShuffleOperand operand{value, 0.0f, mask};
  emulation::warp_collective(&operand, emulation::combine_shuffle_xor);
  return operand.result;
}

struct DynamicShared {
  int64_t bytes, limit;
};

template <typename... Parameters, typename... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), int64_t blocks, int threads, DynamicShared shared, cudaStream_t,
                   const Arguments&... arguments) {
  if (shared.bytes > shared.limit) {
    return cudaErrorInvalidConfiguration;
  }
  emulation::run_grid(blocks, threads, shared.bytes, [&] { kernel(arguments...); });
  return cudaSuccess;
}

}  // namespace resnext::cuda

inline void __syncthreads() { resnext::cuda::emulation::block_barrier(); }
