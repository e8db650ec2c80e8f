// From NHWC to NCHW and back: rows of a block of channels go by a panel, which is read in the order of one layout and
// written in that of the other.

int64_t layout_change_scratch(const LayoutChange& change) { return change.lanes * change.src.width; }

void change_layout(const LayoutChange& change, float* scratch, int64_t begin, int64_t end) {
  const Image& src = change.src;
  const int64_t blocks = ceil_div(src.channels, change.lanes);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t channel = task % blocks * change.lanes;
    const int64_t row = task / blocks % src.height;
    const int64_t n = task / blocks / src.height;
    const int64_t channels = min_of(change.lanes, src.channels - channel);
    read_row(src, {}, n, row, channel, channels, change.lanes, in_order(), scratch);
    write_row(change.dst, {}, n, row, channel, channels, change.lanes, scratch);
  }
}
