// C entry point of the emulated launchers, for ctypes (tests/emulation.py).
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <string>
#include <vector>

#include "../../csrc/cuda/strip_plan.h"

using resnext::GroupedConvShape;
using namespace resnext::cuda;

namespace {

class PoisonedScratch final : public Scratch {
 public:
  ~PoisonedScratch() {
    for (void* block : blocks_) {
      std::free(block);
    }
  }

  void* allocate(int64_t bytes) override {
    constexpr int64_t kAlignment = 256;
    const size_t size = (bytes + kAlignment - 1) / kAlignment * kAlignment;
    blocks_.push_back(std::aligned_alloc(kAlignment, size));
    return std::memset(blocks_.back(), 0xff, size);  // NaN in float, half and bfloat16
  }

 private:
  std::vector<void*> blocks_;
};

// A call of an operator of csrc/operators.h, past what is done around it: its tensors in the order of its arguments,
// null where one is absent, and its other arguments likewise.
struct Call {
  const int64_t *x_sizes, *out_sizes;  // of the images (N, C, H, W) before and after
  Dtype dtype;
  const Context& context;
  void* const* tensors;
  const int64_t* options;
  bool weight_channels_last;

  Weight weight(int index) const { return {tensors[index], weight_channels_last}; }
  WeightResult weight_result(int index) const { return {tensors[index], weight_channels_last}; }

  template <typename T = void>
  T* get(int index) const {
    return static_cast<T*>(tensors[index]);
  }

  Affine affine(int center, int scale, int shift) const {
    return {center < 0 ? nullptr : get<float>(center), get<float>(scale), shift < 0 ? nullptr : get<float>(shift)};
  }

  StatisticsGradients statistics(int z) const {
    const auto count = static_cast<float>(out_sizes[0] * out_sizes[2] * out_sizes[3]);
    return {get(z), get<float>(z + 1), get<float>(z + 2), get<float>(z + 3), count};
  }

  // first_option: that of stride_h, stride_w, groups, channels_last.
  GroupedConvShape conv(int first_option = 0) const {
    const int64_t* const option = options + first_option;
    return {x_sizes[0],   x_sizes[1], out_sizes[1], x_sizes[2], x_sizes[3],     out_sizes[2],
            out_sizes[3], option[2],  option[0],    option[1],  option[3] != 0, 3};
  }

  // channels_last: the number of that option.
  ImageShape image(int channels_last = 0) const {
    return {x_sizes[0], x_sizes[1], x_sizes[2], x_sizes[3], options[channels_last] != 0};
  }
};

const std::map<std::string, std::function<cudaError_t(const Call&)>> kOperators = {
    {"grouped_conv2d_fwd",
     [](const Call& c) { return launch_fwd(c.conv(), c.dtype, c.context, c.get(0), c.weight(1), c.get(2), c.get(3)); }},
    {"grouped_conv2d_dgrad",
     [](const Call& c) { return launch_dgrad(c.conv(), c.dtype, c.context, c.get(0), c.weight(1), c.get(2)); }},
    {"grouped_conv2d_wgrad",
     [](const Call& c) { return launch_wgrad(c.conv(), c.dtype, c.context, c.get(0), c.get(1), c.weight_result(2)); }},
    {"conv_stats_fwd",
     [](const Call& c) {
       return launch_conv_stats_fwd(c.conv(), c.dtype, c.context, c.get(0), c.affine(1, 2, 3), c.weight(4), c.get(5),
                                    c.get<float>(6), c.get<float>(7));
     }},
    {"conv_stats_dgrad",
     [](const Call& c) {
       return launch_conv_stats_dgrad(c.conv(), c.dtype, c.context, c.get(0), c.statistics(1), c.weight(5), c.get(6),
                                      c.affine(7, 8, 9), c.get(10), c.get<float>(11), c.get<float>(12));
     }},
    {"conv_stats_wgrad",
     [](const Call& c) {
       return launch_conv_stats_wgrad(c.conv(), c.dtype, c.context, c.get(0), c.statistics(1), c.get(5),
                                      c.affine(6, 7, 8), c.weight_result(9));
     }},
    {"conv_affine",
     [](const Call& c) {
       return launch_conv_affine(c.conv(1), c.dtype, c.context, c.get(0), c.weight(1), c.affine(-1, 3, 4), c.get(5),
                                 c.options[0] != 0, c.get(6));
     }},
    {"statistics",
     [](const Call& c) {
       return launch_statistics(c.image(), c.dtype, c.context, c.get(0), c.get<float>(1), c.get<float>(2));
     }},
    {"statistics_bwd",
     [](const Call& c) {
       return launch_statistics_bwd(c.image(), c.dtype, c.context, c.get(0), c.statistics(1), c.get(5));
     }},
    {"affine_add_relu",
     [](const Call& c) {
       return launch_affine_add_relu(c.image(), c.dtype, c.context, c.get(0), c.affine(1, 2, 3), c.get(4),
                                     c.affine(5, 6, 7), c.get(8));
     }},
    {"affine_add_relu_bwd",
     [](const Call& c) {
       const AffineAddReluGrads grads{c.get(9), c.get(10), c.get<float>(12), c.get<float>(11), c.get<float>(13)};
       return launch_affine_add_relu_bwd(c.image(), c.dtype, c.context, c.get(0), false, c.get(1), c.get(2),
                                         c.affine(3, 4, 5), c.get(6), c.affine(7, 8, -1), grads);
     }},
    {"affine_mean",
     [](const Call& c) {
       return launch_affine_mean(c.image(1), c.dtype, c.context, c.get(0), c.affine(1, 2, 3), c.options[0] != 0,
                                 c.get<float>(4));
     }},
    {"affine_gate",
     [](const Call& c) {
       return launch_affine_gate(c.image(1), c.dtype, c.context, c.get(0), c.affine(1, 2, 3), c.options[0] != 0,
                                 c.get<float>(4), c.get(5), c.affine(6, 7, 8), c.get(9));
     }},
    {"affine_gate_bwd",
     [](const Call& c) {
       const GateGrads grads{c.get<float>(9), c.get(10), c.get<float>(11), c.get<float>(12)};
       return launch_affine_gate_bwd(c.image(1), c.dtype, c.context, c.get(0), c.get(1), c.get(2), c.affine(3, 4, 5),
                                     c.options[0] != 0, c.get(6), c.affine(7, 8, -1), grads);
     }},
    {"gated_affine_bwd",
     [](const Call& c) {
       const GatedGradient gradient{c.get(4), c.get(5), c.get<float>(6), c.get<float>(7)};
       return launch_gated_affine_bwd(c.image(1), c.dtype, c.context, c.get(0), c.affine(1, 2, 3), c.options[0] != 0,
                                      gradient, c.get(8), c.get<float>(9), c.get<float>(10));
     }},
    {"affine_relu_max_pool",
     [](const Call& c) {
       return launch_affine_relu_max_pool(c.image(), c.dtype, c.context, c.get(0), c.affine(1, 2, 3), c.get(4),
                                          c.get<uint8_t>(5));
     }},
    {"affine_relu_max_pool_bwd",
     [](const Call& c) {
       return launch_affine_relu_max_pool_bwd(c.image(), c.dtype, c.context, c.get(0), c.get<uint8_t>(1), c.get(2),
                                              c.affine(3, 4, 5), c.get(6), c.get<float>(7), c.get<float>(8));
     }},
};

}  // namespace

extern "C" {

// Returns the number of kernels it launched, or a CUDA error, negative. dtype: a value of Dtype.
int run_operator(const char* name, const int64_t* x_sizes, const int64_t* out_sizes, int dtype, void* const* tensors,
                 const int64_t* options, int weight_channels_last, int multiprocessors, int shared_memory,
                 int tensor_cores, int descending) {
  emulation::set_descending_order(descending != 0);
  PoisonedScratch scratch;
  const Context context{{multiprocessors, shared_memory, tensor_cores != 0}, scratch, nullptr};
  const int64_t launches = emulation::launch_count();
  const cudaError_t error = kOperators.at(name)(
      {x_sizes, out_sizes, static_cast<Dtype>(dtype), context, tensors, options, weight_channels_last != 0});
  return error != cudaSuccess ? -error : static_cast<int>(emulation::launch_count() - launches);
}

// Whether the tensor-core kernels take a convolution with these images and options, given the shared memory.
int serves_tensor_cores(const int64_t* x_sizes, const int64_t* out_sizes, int dtype, const int64_t* options) {
  PoisonedScratch scratch;
  const Context context{{1, 0, true}, scratch, nullptr};
  const Call call{x_sizes, out_sizes, static_cast<Dtype>(dtype), context, nullptr, options, false};
  return tensor_cores_serve(call.conv(), call.dtype, context.device);
}
}
