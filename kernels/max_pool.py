"""The stem's 3x3 max pool (stride 2, padding 1) in Triton, with the batch norm and ReLU before it.

    a = relu(scale * (z - center) + shift), rounded to z's dtype
    out[n, c, ho, wo] = max over kh, kw of a[n, c, 2*ho + kh - 1, 2*wo + kw - 1]

Neither a nor its gradient reaches memory. Kept for backward is the tap 3*kh + kw of each maximum, a byte per output:
PyTorch's choice, the first of equals in row-major order, the last NaN where there are any.

BLOCK_M lanes of a program, each at a column of outputs of an image, walk down a band of rows, BLOCK_C channels wide.

Forward: a step makes a row of outputs from two new rows of z, three columns of each, and what the row above has left.
Activations become integers whose maximum is PyTorch's choice: number, then position. Backward gathers: a step takes a
row of windows, this column's and the next, and ends two rows of two columns of z. A pixel adds up the gradients of the
windows, at most 2 x 2, whose tap is its own, so there are no atomics. A program leaves partial sums for dscale and
dshift (statistics.py). Bytes: every operand read and every result written once; shared columns come from the caches.
Loops with num_stages load by asynchronous copies into shared memory: all of a step's loads are under way at once.
"""

from __future__ import annotations

import functools
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .batch_norm_kernels import load_affine, own_channels, relu
from .config import Affine, elementwise_config
from .grouped_conv_tiles import aligned
from .launch import Launch, empty, num_sms
from .statistics import sum_partials

_LONGEST_BAND = 8192  # rows of outputs: their positions are 16 bits


@triton.jit
def own_columns(block, batch, width, BLOCK_M: tl.constexpr):
    """Image and column of outputs [BLOCK_M] of a block of lanes, and which of them there are."""
    lane = tl.cast(block, tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    image = lane // width
    return image, (lane % width).to(tl.int32), image < batch


@triton.jit
def columns_of(ptr, image, column, channel, channels, height, width, CHANNELS_LAST: tl.constexpr, ALIGN: tl.constexpr):
    """Pointers [M, C] to columns of row 0 of a tensor (N, channels, height, width); steps to the next row, column."""
    if CHANNELS_LAST:
        step = aligned(channels, ALIGN)
        ptrs = ptr + ((image * height * width + column) * step)[:, None] + channel[None, :]
    else:
        step = 1
        plane = image[:, None] * channels + channel[None, :]
        ptrs = ptr + plane * height * width + column[:, None]
    return ptrs, tl.cast(width, tl.int64) * step, step


@triton.jit
def sort_keys(a, position, inside):
    """Integers, one for each activation of [M, C], of which the pool's choice in a window is the largest.

    Above are the bits of the number: it is no less than 0, so that they are in its order, and NaN is above Inf. Below
    are 16 bits of the position, which grows in row-major order: inverted, so that the first of equals is the largest;
    of NaN, the last. Rows that are not `inside` [M] have negative keys, less than all others.
    """
    half: tl.constexpr = a.dtype.primitive_bitwidth == 16
    bits: tl.constexpr = tl.int16 if half else tl.int32
    key: tl.constexpr = tl.int32 if half else tl.int64
    nan: tl.constexpr = 0x7FFF0000 if half else 0x7FFFFFFF0000
    number = a.to(bits, bitcast=True).to(key) << 16
    position, lowest = tl.cast(position, key), tl.full(inside.shape, -nan - 0x10000, key)
    inverted = tl.where(inside, 0xFFFF - position, lowest)[:, None]
    last = tl.where(inside, nan + position, lowest)[:, None]
    return tl.where(a != a, last, number + inverted)


@triton.jit
def split_keys(keys, dtype: tl.constexpr):
    """The activations and the positions of keys."""
    bits: tl.constexpr = tl.int16 if dtype.primitive_bitwidth == 16 else tl.int32
    a = (keys >> 16).to(bits).to(dtype, bitcast=True)
    position = (keys & 0xFFFF).to(tl.int32)
    return a, tl.where(a != a, position, 0xFFFF - position)


@triton.jit
def larger(first, second):
    """The larger of two keys or numbers; NaN if either is."""
    return tl.maximum(first, second, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def row_maximum(place, row, affine, position, KEYS: tl.constexpr):
    """The largest in row `row` of z of each window: of the keys, from `position` on, or else of affine(z) itself."""
    ptrs, row_step, step, column, height, width, mask_m, mask_c = place
    center, scale, shift = affine
    best = 0
    for i in tl.static_range(3):
        inside = mask_m & (row >= 0) & (row < height) & (column + (i - 1) >= 0) & (column + (i - 1) < width)
        mask = inside[:, None] & mask_c[None, :]
        z = tl.load(ptrs + (row * row_step + (i - 1) * step), mask=mask, other=0.0)
        value = scale * (z.to(tl.float32) - center) + shift
        if KEYS:
            value = sort_keys(relu(value).to(z.dtype), position + i, inside)
        else:
            value = tl.where(inside[:, None], value, float("-inf"))
        best = value if i == 0 else larger(best, value)
    return best


@triton.jit
def affine_relu_max_pool_kernel(
    z_ptr,  # (N, channels, height, width)
    center_ptr,  # float32 (channels,) like scale and shift, or None
    scale_ptr,
    shift_ptr,
    out_ptr,  # (N, channels, out_height, out_width)
    taps_ptr,  # uint8, like out; or None
    batch,
    channels,
    height,
    width,
    out_height,
    out_width,
    blocks,
    band,
    CHANNELS_LAST: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Maxima and taps of a band of rows, by BLOCK_M lanes that walk down a column each."""
    KEYS: tl.constexpr = taps_ptr is not None
    channel, mask_c, share = own_channels(channels, BLOCK_C)
    affine = load_affine(center_ptr, scale_ptr, shift_ptr, channel, mask_c)
    image, out_column, mask_m = own_columns(share % blocks, batch, out_width, BLOCK_M)
    mask = mask_m[:, None] & mask_c[None, :]
    column = out_column * 2
    ptrs, row_step, step = columns_of(z_ptr, image, column, channel, channels, height, width, CHANNELS_LAST, ALIGN)
    place = (ptrs, row_step, step, column, height, width, mask_m, mask_c)
    out_offs, out_row_step, _ = columns_of(
        0, image, out_column, channel, channels, out_height, out_width, CHANNELS_LAST, ALIGN
    )
    first = share // blocks * band
    # A position is 3 * row + column, counted from the first window's. The last row of a window is the next's first.
    above = row_maximum(place, first * 2 - 1, affine, 0, KEYS)
    for out_row in tl.range(first, tl.minimum(first + band, out_height), num_stages=2):
        position = (out_row - first) * 6
        middle = row_maximum(place, out_row * 2, affine, position + 3, KEYS)
        below = row_maximum(place, out_row * 2 + 1, affine, position + 6, KEYS)
        best = larger(larger(above, middle), below)
        above = below
        offs = out_offs + out_row * out_row_step
        if KEYS:
            best, chosen = split_keys(best, out_ptr.dtype.element_ty)
            tl.store(taps_ptr + offs, (chosen - position).to(tl.uint8), mask=mask)
        else:
            best = relu(best)
        tl.store(out_ptr + offs, best.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def load_window(dout_ptr, taps_ptr, row, behind: tl.constexpr, place):
    """Gradient and tap of the window of each lane, or of that `behind` it in a row; no tap where there is no window."""
    offs, row_step, step, column, height, width, mask_m, mask_c = place
    mask = (mask_m & (row >= 0) & (row < height) & (column + behind < width))[:, None] & mask_c[None, :]
    offs += row * row_step + behind * step
    dout = tl.load(dout_ptr + offs, mask=mask, other=0.0)
    return dout, tl.load(taps_ptr + offs, mask=mask, other=255)


@triton.jit
def load_windows(dout_ptr, taps_ptr, row, place):
    """The window of each lane and the one behind it."""
    return load_window(dout_ptr, taps_ptr, row, 0, place), load_window(dout_ptr, taps_ptr, row, 1, place)


@triton.jit
def from_windows(windows, column: tl.constexpr, tap_row: tl.constexpr):
    """What an even or odd column (0, 1) gets from two windows, in whose row `tap_row` it lies."""
    dout, tap = windows[0]
    da = tl.where(tap == 3 * tap_row + 1 + column, dout.to(tl.float32), 0.0)
    if column == 1:
        dout, tap = windows[1]
        da += tl.where(tap == 3 * tap_row, dout.to(tl.float32), 0.0)
    return da


@triton.jit
def affine_relu_max_pool_bwd_kernel(
    dout_ptr,  # (N, channels, out_height, out_width)
    taps_ptr,  # uint8, like dout
    z_ptr,  # (N, channels, height, width)
    center_ptr,  # float32 (channels,) like scale and shift, or None
    scale_ptr,
    shift_ptr,
    dz_ptr,  # like z, or None
    partials_ptr,  # (shares, 2, channels): dshift and dscale; or None
    batch,
    channels,
    height,
    width,
    out_height,
    out_width,
    blocks,
    band,
    CHANNELS_LAST: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Gradients of z and of the vectors, from a band of rows, by BLOCK_M lanes that walk down two columns each."""
    channel, mask_c, share = own_channels(channels, BLOCK_C)
    center, scale, shift = load_affine(center_ptr, scale_ptr, shift_ptr, channel, mask_c)
    image, out_column, mask_m = own_columns(share % blocks, batch, out_width, BLOCK_M)
    column = out_column * 2
    offs, row_step, step = columns_of(0, image, column, channel, channels, height, width, CHANNELS_LAST, ALIGN)
    out_offs, out_row_step, out_step = columns_of(
        0, image, out_column, channel, channels, out_height, out_width, CHANNELS_LAST, ALIGN
    )
    dshift = tl.zeros((BLOCK_M, BLOCK_C), dtype=tl.float32)
    dscale = tl.zeros((BLOCK_M, BLOCK_C), dtype=tl.float32)
    first = share // blocks * band
    place = (out_offs, out_row_step, out_step, out_column, out_height, out_width, mask_m, mask_c)
    windows = load_windows(dout_ptr, taps_ptr, first - 1, place)
    above = (from_windows(windows, 0, 2), from_windows(windows, 1, 2))
    for out_row in tl.range(first, tl.minimum(first + band, height // 2 + 1), num_stages=2):
        # These windows end in row 2 * out_row + 1 of z, in which the next begin.
        windows = load_windows(dout_ptr, taps_ptr, out_row, place)
        for i in tl.static_range(4):
            row = out_row * 2 - 1 + i // 2
            inside = (row >= 0) & (row < height) & (column + i % 2 < width)
            mask = (mask_m & inside)[:, None] & mask_c[None, :]
            z_offs = offs + row * row_step + i % 2 * step
            z = tl.load(z_ptr + z_offs, mask=mask, other=0.0).to(tl.float32) - center
            da = from_windows(windows, i % 2, i // 2)
            if i < 2:
                da += above[i % 2]
            t = tl.where((scale * z + shift).to(z_ptr.dtype.element_ty) <= 0, 0.0, da)  # NaN passes
            if dz_ptr is not None:
                tl.store(dz_ptr + z_offs, (scale * t).to(dz_ptr.dtype.element_ty), mask=mask)
            if partials_ptr is not None:
                dshift += t
                dscale += t * z
        above = (from_windows(windows, 0, 2), from_windows(windows, 1, 2))
    if partials_ptr is not None:
        ptrs = partials_ptr + share.to(tl.int64) * 2 * channels + channel
        tl.store(ptrs, tl.sum(dshift, axis=0), mask=mask_c)
        tl.store(ptrs + channels, tl.sum(dscale, axis=0), mask=mask_c)


def affine_relu_max_pool(z: Tensor, affine: Affine, channels_last: bool, taps: bool) -> tuple[Tensor, Tensor | None]:
    """3x3 max pool with stride 2 and padding 1 of relu(affine(z)).

    Args:
        z: (N, C, H, W), dense in the layout ``channels_last`` says; float32, float16 or bfloat16.
        affine: (center or None, scale, shift), each (C,), float32, contiguous.
        channels_last: The layout of ``z`` and the results.
        taps: Whether backward will want the taps.

    Returns:
        (N, C, Ho, Wo) with Ho = (H - 1) // 2 + 1, Wo alike; and the tap 3 * kh + kw of each maximum, uint8, or None.
    """
    shape = (*z.shape[:2], (z.shape[2] - 1) // 2 + 1, (z.shape[3] - 1) // 2 + 1)
    out = empty(z, shape, channels_last)
    picked = empty(z, shape, channels_last, torch.uint8) if taps else None
    center, scale, shift = affine
    launch, _ = _plan("fwd", tuple(z.shape), z.itemsize, channels_last, num_sms(z.device))
    launch(z_ptr=z, center_ptr=center, scale_ptr=scale, shift_ptr=shift, out_ptr=out, taps_ptr=picked)
    return out, picked


def affine_relu_max_pool_bwd(
    dout: Tensor, taps: Tensor, z: Tensor, affine: Affine, channels_last: bool, wanted: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of `affine_relu_max_pool`.

    Args:
        dout: Gradient of the result, laid out like ``z``.
        taps: From `affine_relu_max_pool`.
        z: As in `affine_relu_max_pool`.
        affine: As in `affine_relu_max_pool`.
        channels_last: The layout.
        wanted: Whether the gradients of z, and of the vectors are.

    Returns:
        dz, dscale and dshift; None what is not wanted.
    """
    dz = partials = None
    launch, shares = _plan("bwd", tuple(z.shape), z.itemsize, channels_last, num_sms(z.device))
    if wanted[0]:
        dz = empty(z, z.shape, channels_last)
    if wanted[1]:
        partials = torch.empty(shares, 2, z.shape[1], dtype=torch.float32, device=z.device)
    center, scale, shift = affine
    launch(
        dout_ptr=dout,
        taps_ptr=taps,
        z_ptr=z,
        center_ptr=center,
        scale_ptr=scale,
        shift_ptr=shift,
        dz_ptr=dz,
        partials_ptr=partials,
    )
    if partials is None:
        return dz, None, None
    dshift, dscale = sum_partials(partials)
    return dz, dscale, dshift


@functools.lru_cache(maxsize=256)
def _plan(pass_: str, shape: tuple[int, ...], itemsize: int, channels_last: bool, num_sms: int) -> tuple[Launch, int]:
    """The launch of one pass over ``z`` of that shape, and the number of shares its pixels are divided into."""
    batch, channels, height, width = shape
    out_height, out_width = (height - 1) // 2 + 1, (width - 1) // 2 + 1
    sizes = {"batch": batch, "channels": channels, "height": height, "width": width}
    sizes |= {"out_height": out_height, "out_width": out_width}
    rows = out_height if pass_ == "fwd" else height // 2 + 1
    lanes = batch * out_width
    config = elementwise_config(rows, lanes, channels, channels_last, num_sms=num_sms, elements=2048 // itemsize)
    blocks = triton.cdiv(lanes, config.block_m)
    band = min(triton.cdiv(rows, triton.cdiv(config.splits, blocks)), _LONGEST_BAND)
    shares = blocks * triton.cdiv(rows, band)
    sizes |= {"blocks": blocks, "band": band}
    constants = {"CHANNELS_LAST": channels_last, "BLOCK_M": config.block_m, "BLOCK_C": config.block_c}
    constants["ALIGN"] = math.gcd(channels, 16)
    options = {"num_warps": config.num_warps, "enable_fp_fusion": True}
    kernel = {"fwd": affine_relu_max_pool_kernel, "bwd": affine_relu_max_pool_bwd_kernel}[pass_]
    return Launch(kernel, triton.cdiv(channels, config.block_c) * shares, sizes, constants, options), shares
