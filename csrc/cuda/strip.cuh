// Shared by the tensor-core kernels: how a pass maps outputs to source pixels, how the image is cut into strips, and
// how rows of the source travel into shared memory.
//
// A *position* is one entry of the M (forward, input gradient) or K (weight gradient) axis of the matrix products. A
// *strip* is 32 positions wide: one stretch of columns of one image, or the full width of a few narrow images side by
// side (7x7: four), so that little of a 16-row matrix tile is wasted. A block slides down its strip, or down a *band*
// of it, a few rows per step. Source rows live in a ring in shared memory, with their zero border; the rows of the
// next step are copied while the present one is computed. DRAM sees every element once, plus the overlap of bands.
#pragma once

#include "batch_norm.cuh"

namespace resnext::cuda {

constexpr int kTile = 16;                   // matrix tile edge, channels or positions
constexpr int kStripPositions = 2 * kTile;  // positions of a strip
constexpr int kMaxStripImages = 4;
constexpr int kMaxStripPixels = 80;  // (32 positions, stride 2, 4 images) + zeros: at most 2*32 + 4*1 + 3
constexpr int kMaxWarps = 4;

enum class Pass { kForward, kDgrad };

// One image axis of a pass: per step (rows) or position (columns), `outputs` results are computed from `inputs`
// source entries, of which the first is at step * advance + origin. tap(o, i) is the kernel index that joins result o
// with source entry i, or -1. The input gradient with stride 2 makes two results, one of each parity, from two
// entries.
template <Pass kPass, int kStride, int kBlock>
struct Axis {
  static constexpr bool kParity = kPass == Pass::kDgrad && kStride == 2;
  static constexpr int outputs = kParity ? 2 : kBlock;
  static constexpr int inputs = kParity ? 2 : (kBlock - 1) * kStride + 3;
  static constexpr int advance = kParity ? 1 : kBlock * kStride;
  static constexpr int origin = kParity ? 0 : -1;
  static_assert(!kParity || kBlock == 1);

  __host__ __device__ static constexpr int tap(int o, int i) {
    if (kParity) {
      return o == 0 ? (i == 0 ? 1 : -1) : (i == 0 ? 2 : 0);
    }
    const int k = i - o * kStride;
    return k < 0 || k > 2 ? -1 : (kPass == Pass::kDgrad ? 2 - k : k);
  }
};

// Two rows per step share their source rows where that saves loads.
template <Pass kPass, int kStride>
using RowAxis = Axis<kPass, kStride, kStride == 1 ? 2 : 1>;
template <Pass kPass, int kStride>
using ColAxis = Axis<kPass, kStride, 1>;

// Cuts (batch, image) into strips and bands. A row (width * channels)
// stays below 2^30 elements (launchers check).
struct StripGrid {
  int64_t batch;
  int source_height, source_width;
  int out_height, out_width;  // of the tensor at the positions
  int position_cols;
  int steps;               // per strip
  int images, cols;        // of a strip: images * cols <= kStripPositions
  int col_strips;          // per image
  int bands, band_steps;   // per strip
  int pixels_per_image;    // staged in a row, border included
  int pixels;              // of a staged row: images * pixels_per_image, then zeros for idle positions
  int64_t units;           // bands of all strips
};

// The part of the problem one block slides over.
struct Unit {
  int64_t image;          // first image
  int col;                // first position column
  int first_step, steps;  // of the band

  __device__ Unit(const StripGrid& grid, int64_t index) {
    const int band = static_cast<int>(index % grid.bands);
    const int64_t strip = index / grid.bands;
    image = strip / grid.col_strips * grid.images;
    col = static_cast<int>(strip % grid.col_strips) * grid.cols;
    first_step = band * grid.band_steps;
    const int left = grid.steps - first_step;
    steps = left < grid.band_steps ? left : grid.band_steps;
  }
};

// Lookup tables of a unit, so that no inner loop divides.
struct StripTables {
  int64_t source[kMaxStripPixels];   // element offset of a staged pixel in row 0 of the source, -1: zeros
  int64_t output[kStripPositions];   // element offset of a position's first result in row 0, -1: idle position
  int output_cols[kStripPositions];  // results of the position along its row that lie inside the image
  int pixel[kStripPositions];        // staged pixel of source entry 0; idle positions point at zeros

  template <typename Cols>
  __device__ void fill(const StripGrid& grid, const Unit& unit, int64_t source_channels, int64_t out_channels) {
    for (int p = threadIdx.x; p < grid.pixels; p += blockDim.x) {
      const int local = p / grid.pixels_per_image;
      const int col = unit.col * Cols::advance + Cols::origin + p % grid.pixels_per_image;
      const int64_t image = unit.image + local;
      const bool valid = local < grid.images && image < grid.batch && col >= 0 && col < grid.source_width;
      source[p] = valid ? (image * grid.source_height * grid.source_width + col) * source_channels : -1;
    }
    for (int p = threadIdx.x; p < kStripPositions; p += blockDim.x) {
      const int local = p / grid.cols;
      const int col = unit.col + p % grid.cols;
      const int64_t image = unit.image + local;
      const bool valid = local < grid.images && image < grid.batch && col < grid.position_cols;
      const int out_col = col * Cols::outputs;
      const int left = grid.out_width - out_col;
      output[p] = valid ? (image * grid.out_height * grid.out_width + out_col) * out_channels : -1;
      output_cols[p] = left < Cols::outputs ? left : Cols::outputs;
      pixel[p] = local < grid.images && valid ? local * grid.pixels_per_image + p % grid.cols * Cols::advance
                                              : grid.images * grid.pixels_per_image;
    }
  }
};

// Bytes between pixels in shared memory: an odd number of 16-byte units, so that the 8 rows of an ldmatrix fall into
// different banks (stride 2: two by two).
__host__ __device__ constexpr int pixel_pitch(int channels) { return channels * 2 + 16; }

// Copies rows of an NHWC tensor into shared memory: pixel p of a row from offsets[p], 16 bytes per thread and pixel.
template <typename T>
struct RowStager {
  const T* base;  // at this thread's 8 channels
  int channel;    // the first of them
  int row_stride, height, pitch, granule_bytes;
  int first_pixel, pixel_step;
  bool channels_valid;

  // Stages channels [first, first + count) of a tensor of `channels` channels; those beyond the end become zeros.
  // Where count / 8 does not divide the number of threads, those left over copy nothing.
  __device__ RowStager(const T* tensor, int rows, int width, int channels, int first, int count) {
    const int granules = count / 8;
    const int granule = threadIdx.x % granules;
    pixel_step = blockDim.x / granules;
    first_pixel = static_cast<int>(threadIdx.x) < pixel_step * granules ? threadIdx.x / granules : kMaxStripPixels;
    channel = first + granule * 8;
    base = tensor + channel;
    channels_valid = channel < channels;
    row_stride = width * channels;
    height = rows;
    pitch = pixel_pitch(count);
    granule_bytes = granule * 16;
  }

  // Stages rows row, row + 1, ... to the addresses shared_rows[0], shared_rows[1], ...
  template <int kRows>
  __device__ __forceinline__ void stage(const uint32_t (&shared_rows)[kRows], const int64_t* offsets, int pixels,
                                        int row) const {
    const T* const row_base = base + static_cast<int64_t>(row) * row_stride;
    for (int p = first_pixel; p < pixels; p += pixel_step) {
      const int64_t offset = offsets[p];
      const T* const pixel = row_base + offset;
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        const bool valid = channels_valid && offset >= 0 && row + i >= 0 && row + i < height;
        cp_async_16(shared_rows[i] + p * pitch + granule_bytes,
                    valid ? pixel + static_cast<int64_t>(i) * row_stride : base, valid);
      }
    }
  }

  // Applies a prologue (conv_fusion.cuh) to what this thread has staged of a row, once its copies have landed: each
  // piece is its own, so no barrier is needed in between. What lies outside the image stays zero.
  template <typename Prologue>
  __device__ __forceinline__ void transform(unsigned char* shared_row, const int64_t* offsets, int pixels, int row,
                                            const Prologue& prologue) const {
    if (row < 0 || row >= height) {
      return;
    }
    const int64_t row_element = static_cast<int64_t>(row) * row_stride + channel;
    for (int p = first_pixel; p < pixels; p += pixel_step) {
      if (offsets[p] >= 0) {
        auto* const granule = reinterpret_cast<Vector<T, 8>*>(shared_row + p * pitch + granule_bytes);
        *granule = prologue(*granule, row_element + offsets[p]);
      }
    }
  }
};

}  // namespace resnext::cuda
