// Shared by the tensor-core kernels: how a pass maps outputs to source pixels, how the image is cut into strips, and
// how rows of the source travel into shared memory.
//
// A *position* is one entry of the M (forward, input gradient) or K (weight gradient) axis of the matrix products. A
// *strip* is 32 positions wide: one stretch of columns of one image, or the full width of a few narrow images side by
// side (7x7: four), so that little of a 16-row matrix tile is wasted. Down a strip go *steps* of one or two rows. All
// strips' steps, end to end, are dealt out to the blocks in equal shares; the part of a strip that lies in a block's
// share is a *unit*.
//
// Source rows come in groups of as many as a step goes down, into a ring in shared memory, with their zero border. A
// step works on two groups; a unit therefore begins with a group without a step, its *lead*. Copies run a few groups
// ahead, and from unit to unit without a pause. DRAM sees every element once, plus the lead of shares.
#pragma once

#include "conv_fusion.cuh"

namespace resnext::cuda {

constexpr int kTile = 16;                   // matrix tile edge, channels or positions
constexpr int kStripPositions = 2 * kTile;  // positions of a strip
constexpr int kMaxStripImages = 4;
constexpr int kMaxStripPixels = 80;  // (32 positions, stride 2, 4 images) + zeros: at most 2*32 + 4*1 + 3
constexpr int kMaxWarps = 4;
constexpr int kTapCount = 9;
constexpr int kElementBytes = 2;
constexpr int kNothing = -16;  // bytes to no pixel; aligned, as copies that only write zeros are told an address too

enum class Pass { kForward, kDgrad };

// One image axis of a pass: per step (rows) or position (columns), `outputs` results are computed from `inputs`
// source entries, of which the first is at step * advance + origin. tap(o, i) is the kernel index that joins result o
// with source entry i, or -1. The input gradient with stride 2 makes two results, one of each parity, from two
// entries. Of the two groups of `advance` entries that a step works on, the first `skipped` are not needed.
template <Pass kPass, int kStride, int kBlock>
struct Axis {
  static constexpr bool kParity = kPass == Pass::kDgrad && kStride == 2;
  static constexpr int outputs = kParity ? 2 : kBlock;
  static constexpr int inputs = kParity ? 2 : (kBlock - 1) * kStride + 3;
  static constexpr int advance = kParity ? 1 : kBlock * kStride;
  static constexpr int origin = kParity ? 0 : -1;
  static constexpr int skipped = 2 * advance - inputs;
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

// Cuts (batch, image) into strips. A row (width * channels) stays below 2^30 elements (launchers check).
struct StripGrid {
  int64_t batch;
  int source_height, source_width;
  int out_height, out_width;  // of the tensor at the positions
  int position_cols;
  int images, cols;      // of a strip: images * cols <= kStripPositions
  int col_strips;        // per image
  int steps;             // per strip
  int64_t all_steps;     // of all strips, less than 2^31
  int pixels_per_image;  // staged in a row, border included
  int pixels;            // of a staged row: images * pixels_per_image, then zeros for idle positions

  // Where the share of block `index` of `blocks` begins.
  __host__ __device__ int share(int index, int blocks) const { return static_cast<int>(all_steps * index / blocks); }
};

// Of a unit, so that no inner loop divides.
struct StripTables {
  int64_t source_base, output_base;  // elements before the first image
  int source[kMaxStripPixels];       // bytes from there to a staged pixel in row 0, kNothing: zeros
  int output[kStripPositions];       // bytes from there to a position's first result in row 0, kNothing: idle position
  int output_cols[kStripPositions];  // results of the position along its row that lie inside the image
  int pixel[kStripPositions];        // staged pixel of source entry 0; idle positions point at zeros
  int first_step, steps;             // of the strip

  // The unit that begins at step `at` of a share that ends at `end`; returns where the next one begins. All threads of
  // the block call it.
  template <typename Cols>
  __device__ int fill(const StripGrid& grid, int at, int end, int source_channels, int out_channels) {
    const int strip = at / grid.steps;
    const int first = at - strip * grid.steps;
    const int left = grid.steps - first < end - at ? grid.steps - first : end - at;
    const int64_t image = static_cast<int64_t>(strip / grid.col_strips) * grid.images;
    const int first_col = strip % grid.col_strips * grid.cols;
    const int64_t source_area = static_cast<int64_t>(grid.source_height) * grid.source_width;
    const int64_t out_area = static_cast<int64_t>(grid.out_height) * grid.out_width;
    if (threadIdx.x == 0) {
      source_base = image * source_area * source_channels;
      output_base = image * out_area * out_channels;
      first_step = first;
      steps = left;
    }
    for (int p = threadIdx.x; p < grid.pixels; p += blockDim.x) {
      const int local = p / grid.pixels_per_image;
      const int col = first_col * Cols::advance + Cols::origin + p % grid.pixels_per_image;
      const bool valid = local < grid.images && image + local < grid.batch && col >= 0 && col < grid.source_width;
      source[p] = valid ? static_cast<int>((local * source_area + col) * source_channels * kElementBytes) : kNothing;
    }
    for (int p = threadIdx.x; p < kStripPositions; p += blockDim.x) {
      const int local = p / grid.cols;
      const int col = first_col + p % grid.cols;
      const bool valid = local < grid.images && image + local < grid.batch && col < grid.position_cols;
      const int out_col = col * Cols::outputs;
      const int cols_left = grid.out_width - out_col;
      output[p] = valid ? static_cast<int>((local * out_area + out_col) * out_channels * kElementBytes) : kNothing;
      output_cols[p] = cols_left < Cols::outputs ? cols_left : Cols::outputs;
      pixel[p] =
          valid ? local * grid.pixels_per_image + p % grid.cols * Cols::advance : grid.images * grid.pixels_per_image;
    }
    return at + left;
  }
};

// The tables of the unit that is computed, of the next one, whose rows may be on their way, and of the one after that,
// which is filled while the first is computed: copies are never more than two groups ahead, and a unit has two or more.
constexpr int kTables = 3;
constexpr int kMaxPrefetch = 2;

// A block's share of all steps: fills the tables of its units, two before anything is copied, the others in time.
template <typename Cols>
struct Share {
  int next, end;  // where the first unit without tables begins; where the share ends
  int groups;     // of all units, leads included

  // All threads of the block call it, and find the tables after the next barrier.
  __device__ Share(const StripGrid& grid, int index, int blocks, int channels, StripTables (&tables)[kTables])
      : next(grid.share(index, blocks)), end(grid.share(index + 1, blocks)) {
    groups = end - next + (end - 1) / grid.steps - next / grid.steps + 1;
    for (int unit = 0; unit < 2; ++unit) {
      fill(grid, channels, tables[unit]);
    }
  }

  // In the lead of the unit of tables[here]: nobody reads those of the unit before it any more.
  __device__ void fill_later(const StripGrid& grid, int channels, StripTables (&tables)[kTables], int here) {
    fill(grid, channels, tables[here > 0 ? here - 1 : kTables - 1]);
  }

 private:
  __device__ void fill(const StripGrid& grid, int channels, StripTables& table) {
    if (next < end) {
      next = table.template fill<Cols>(grid, next, end, channels, channels);
    }
  }
};

// A place in a block's share.
template <typename Rows>
struct Cursor {
  int table;       // of the unit
  int group;       // of the unit, 0: its lead
  int last_group;  // of the unit
  int row;         // first source row of the group

  __device__ explicit Cursor(const StripTables (&tables)[kTables]) : table(0) { enter(tables); }

  // The step that the group completes, counted in the strip; not of a lead.
  __device__ int step() const { return (row - Rows::origin + Rows::skipped) / Rows::advance - 1; }

  __device__ void next(const StripTables (&tables)[kTables]) {
    if (group < last_group) {
      ++group;
      row += Rows::advance;
    } else {
      table = table + 1 < kTables ? table + 1 : 0;
      enter(tables);
    }
  }

 private:
  __device__ void enter(const StripTables (&tables)[kTables]) {
    group = 0;
    last_group = tables[table].steps;
    row = tables[table].first_step * Rows::advance + Rows::origin - Rows::skipped;
  }
};

// Where the groups are in a ring of groups: the one at hand, the one before, and the one that copies go to, which run
// `prefetch` groups ahead. A group is read in its own step and in the next one, hence two slots more than that.
struct Ring {
  int slots, here, before, ahead;

  __device__ explicit Ring(int prefetch) : slots(prefetch + 2), here(0), before(prefetch + 1), ahead(0) {}

  __device__ void next() {
    before = here;
    here = here + 1 < slots ? here + 1 : 0;
  }

  __device__ void next_ahead() { ahead = ahead + 1 < slots ? ahead + 1 : 0; }
};

// Waits for the copies of the group at hand.
__device__ __forceinline__ void wait_for_group(int prefetch) {
  if (prefetch > 1) {
    cp_async_wait_group<kMaxPrefetch - 1>();
  } else {
    cp_async_wait_group<0>();
  }
}

// A group of rows on the way through a block's share.
template <typename Rows>
struct Group {
  const StripTables& table;  // of its unit
  Cursor<Rows> at;
  int index;         // in the share
  int slot, before;  // its own of the ring, and that of the group before it
};

// Goes through a block's share: stage(group) copies a group, `prefetch` ahead of the one at hand; of that,
// prepare(group) changes what this thread has copied; then lead(group), or step(group) on it and the one before. All
// threads of the block call it.
template <typename Rows, typename Cols, typename Stage, typename Prepare, typename Lead, typename Step>
__device__ __forceinline__ void walk(const StripGrid& grid, int index, int blocks, int channels, int prefetch,
                                     StripTables (&tables)[kTables], const Stage& stage, const Prepare& prepare,
                                     const Lead& lead, const Step& step) {
  Share<Cols> share(grid, index, blocks, channels, tables);
  const int groups = share.groups;
  __syncthreads();

  Cursor<Rows> ahead(tables), here(tables);
  Ring ring(prefetch);
  const auto stage_next = [&](int group) {
    if (group < groups) {
      stage(Group<Rows>{tables[ahead.table], ahead, group, ring.ahead, 0});
      ahead.next(tables);
      ring.next_ahead();
    }
    cp_async_commit();
  };
  for (int group = 0; group < prefetch; ++group) {
    stage_next(group);
  }
  for (int group = 0; group < groups; ++group) {
    const Group<Rows> at_hand{tables[here.table], here, group, ring.here, ring.before};
    wait_for_group(prefetch);
    prepare(at_hand);
    __syncthreads();  // this group's rows are in place, and nobody reads those of the step before the last any more
    stage_next(group + prefetch);
    if (here.group == 0) {
      share.fill_later(grid, channels, tables, here.table);
      lead(at_hand);
    } else {
      step(at_hand);
    }
    here.next(tables);
    ring.next();
  }
}

// Bytes between pixels in shared memory: an odd number of 16-byte units, so that the 8 rows of an ldmatrix fall into
// different banks (stride 2: two by two).
__host__ __device__ constexpr int pixel_pitch(int channels) { return channels * 2 + 16; }

// Copies rows of an NHWC tensor into shared memory: pixel p of a row from offsets[p], 16 bytes per thread and pixel.
template <typename T>
struct RowStager {
  int channel;  // this thread's 8 channels: the first of them, in the tensor
  int local;    // and within what is staged
  int row_stride, height, pitch;
  int first_pixel, pixel_step;
  bool channels_valid;

  // Stages channels [first, first + count) of a tensor of `channels` channels; those beyond the end become zeros.
  // Where count / 8 does not divide the number of threads, those left over copy nothing.
  __device__ RowStager(int rows, int width, int channels, int first, int count) {
    const int granules = count / kGranule;
    const int thread = static_cast<int>(threadIdx.x);
    local = thread % granules * kGranule;
    pixel_step = static_cast<int>(blockDim.x) / granules;
    first_pixel = thread < pixel_step * granules ? thread / granules : kMaxStripPixels;
    channel = first + local;
    channels_valid = channel < channels;
    row_stride = width * channels;
    height = rows;
    pitch = pixel_pitch(count);
  }

  // Stages rows row + skipped, ..., row + kRows - 1 of the images at `images`, `row_bytes` apart from `shared` on; and,
  // with a companion, those of a tensor like it that lies so many bytes further, as far further from `shared`.
  template <int kRows, bool kCompanion = false>
  __device__ __forceinline__ void stage(const T* images, uint32_t shared, uint32_t row_bytes, const int* offsets,
                                        int pixels, int row, int skipped, int64_t companion = 0,
                                        uint32_t companion_shared = 0) const {
    const T* rows[kRows];
    bool valid[kRows];
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      rows[i] = images + channel + static_cast<int64_t>(row + i) * row_stride;
      valid[i] = channels_valid && i >= skipped && row + i >= 0 && row + i < height;
    }
    uint32_t place = shared + first_pixel * pitch + local * 2;
#pragma unroll 2
    for (int p = first_pixel; p < pixels; p += pixel_step) {
      const int offset = offsets[p];
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        const T* const source = from(rows[i], offset);
        cp_async_16(place + i * row_bytes, source, valid[i] && offset >= 0);
        if constexpr (kCompanion) {
          cp_async_16(place + companion_shared + i * row_bytes,
                      reinterpret_cast<const T*>(reinterpret_cast<intptr_t>(source) + companion),
                      valid[i] && offset >= 0);
        }
      }
      place += pixel_step * pitch;
    }
  }

  // Applies a prologue (conv_fusion.cuh) to what this thread has staged of a row, once its copies have landed: each
  // piece is its own, so no barrier is needed in between. What lies outside the image stays zero. `companion`: the
  // same pieces of the prologue's second tensor.
  template <typename Prologue>
  __device__ __forceinline__ void transform(unsigned char* shared, const unsigned char* companion, const int* offsets,
                                            int pixels, int row, const Prologue& prologue) const {
    if (row < 0 || row >= height) {
      return;
    }
    int place = first_pixel * pitch + local * 2;
    for (int p = first_pixel; p < pixels; p += pixel_step) {
      if (offsets[p] >= 0) {
        auto* const granule = reinterpret_cast<Granule<T>*>(shared + place);
        Granule<T> other{};
        if constexpr (Prologue::kCompanion) {
          other = *reinterpret_cast<const Granule<T>*>(companion + place);
        }
        *granule = prologue(*granule, other);
      }
      place += pixel_step * pitch;
    }
  }
};

}  // namespace resnext::cuda
