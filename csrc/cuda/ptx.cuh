// The few instructions and launch details that CUDA C++ does not spell portably.
// tests/cuda_emulation/cuda_emulation.h defines the same names for a CPU; a change here needs its twin there.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstddef>
#include <cstdint>
#include <type_traits>

#define RESNEXT_DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]

namespace resnext::cuda {

// Address in the shared-memory window, as PTX wants it: half the registers of a generic pointer.
__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// The tensor-core kernels are never launched below sm_80 (launch.h), but must compile there.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
#define RESNEXT_SM80(...) __VA_ARGS__
#else
#define RESNEXT_SM80(...) __trap()
#endif

// Copies 16 bytes from global to shared memory without passing through registers; writes zeros where !valid.
__device__ __forceinline__ void cp_async_16(uint32_t shared, const void* global, bool valid) {
  RESNEXT_SM80(asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(global),
                            "r"(valid ? 16 : 0) : "memory"));
}

// Closes a group: this thread's copies since it closed the last one.
__device__ __forceinline__ void cp_async_commit() {
  RESNEXT_SM80(asm volatile("cp.async.commit_group;" :: : "memory"));
}

// Waits until all groups of this thread but the latest kPending have landed.
template <int kPending>
__device__ __forceinline__ void cp_async_wait_group() {
  RESNEXT_SM80(asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory"));
}

// The same, held in a register: left to itself the compiler may compute it again at every use. Pointers: to global
// memory.
template <typename T>
__device__ __forceinline__ T* held(T* pointer) {
  asm volatile("" : "+l"(pointer));
  __builtin_assume(__isGlobal(pointer));
  return pointer;
}

__device__ __forceinline__ int held(int value) {
  asm volatile("" : "+r"(value));
  return value;
}

// Four 8x8 matrices of 16-bit elements. Lane l names row l % 8 of matrix l / 8 (16 bytes, 16-byte aligned); register
// m receives elements 2*(lane%4), 2*(lane%4)+1 of row lane/4 of matrix m, or of its transpose.
template <bool kTranspose>
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&matrix)[4], uint32_t shared) {
  if constexpr (kTranspose) {
    RESNEXT_SM80(
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];" : "=r"(matrix[0]),
                     "=r"(matrix[1]), "=r"(matrix[2]), "=r"(matrix[3]) : "r"(shared) : "memory"));
  } else {
    RESNEXT_SM80(asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];" : "=r"(matrix[0]),
                              "=r"(matrix[1]), "=r"(matrix[2]), "=r"(matrix[3]) : "r"(shared) : "memory"));
  }
}

// d (16x8, fp32) += a (16x16, row major) * b (16x8, column major), fragments as in the PTX manual's m16n8k16.
template <typename T>
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (std::is_same_v<T, c10::Half>) {
    RESNEXT_SM80(
        asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
            "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" : "+f"(d[0]),
            "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1)));
  } else {
    RESNEXT_SM80(
        asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
            "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" : "+f"(d[0]),
            "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1)));
  }
}

// Two 16-bit values, `low` in the lower half: relu(v) rounded once to nearest even; NaN stays.
template <typename T>
__device__ __forceinline__ uint32_t pack2_relu(float low, float high) {
  uint32_t bits = 0;
  if constexpr (std::is_same_v<T, c10::Half>) {
    RESNEXT_SM80(asm("cvt.rn.relu.f16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low)));
  } else {
    RESNEXT_SM80(asm("cvt.rn.relu.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low)));
  }
  return bits;
}

#undef RESNEXT_SM80

// Two 16-bit values, `low` in the lower half, each rounded once to nearest even.
template <typename T>
__device__ __forceinline__ uint32_t pack2(float low, float high) {
  uint32_t bits;
  if constexpr (std::is_same_v<T, c10::Half>) {
    const __half2 pair = __floats2half2_rn(low, high);
    memcpy(&bits, &pair, sizeof(bits));
  } else {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    memcpy(&bits, &pair, sizeof(bits));
  }
  return bits;
}

template <typename T>
__device__ __forceinline__ void unpack2(uint32_t bits, float& low, float& high) {
  if constexpr (std::is_same_v<T, c10::Half>) {
    __half2 pair;
    memcpy(&pair, &bits, sizeof(bits));
    low = __low2float(pair);
    high = __high2float(pair);
  } else {
    low = __uint_as_float(bits << 16);
    high = __uint_as_float(bits & 0xffff0000u);
  }
}

__device__ __forceinline__ bool any_in_warp(bool predicate) { return __any_sync(0xffffffffu, predicate); }

// The value of the lane whose number differs by the bits of `mask`.
__device__ __forceinline__ float shuffle_xor(float value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}

// A kernel's limit must be the same at every launch: it belongs to the kernel, and two threads may launch at once.
struct DynamicShared {
  int64_t bytes, limit;
};

// Launches on `stream`; the blocks go on grid axis x, the only one that passes 65,535.
template <typename... Parameters, typename... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), int64_t blocks, int threads, DynamicShared shared,
                   cudaStream_t stream, const Arguments&... arguments) {
  if (blocks > INT32_MAX) {
    return cudaErrorInvalidConfiguration;
  }
  if (shared.bytes > 0) {
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared.limit));
    if (error != cudaSuccess) {
      return error;
    }
  }
  kernel<<<static_cast<unsigned>(blocks), threads, shared.bytes, stream>>>(arguments...);
  return cudaGetLastError();
}

}  // namespace resnext::cuda
