"""The stem's 3x3 max pool (stride 2, padding 1) in Triton, with the batch norm and ReLU before it.

    a = relu(scale * (z - center) + shift), rounded to z's dtype
    out[n, c, ho, wo] = max over kh, kw of a[n, c, 2*ho + kh - 1, 2*wo + kw - 1]

Neither a nor its gradient reaches memory. Kept for backward is the tap 3*kh + kw of each maximum, a byte per output:
PyTorch's choice, the first of equals in row-major order, the last NaN where there are any.

Forward: a program computes BLOCK_M output pixels x BLOCK_C channels from nine shifted tiles of z; rows and columns that
windows share come from the caches. Backward gathers: an input pixel lies in at most 2 x 2 windows and adds up the
gradients of those whose tap is its own, so there are no atomics. A program walks down a share of the input pixels, and
leaves partial sums for dscale and dshift (statistics.py). Bytes: every operand read and every result written once.
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


@triton.jit
def split_pixel(block, height, width, BLOCK_M: tl.constexpr):
    """Image, row and column [BLOCK_M] of a block of pixels of (N, height, width), counted in row-major order."""
    pixel = tl.cast(block, tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    row = pixel // width
    return row // height, row % height, pixel % width


@triton.jit
def pixel_offsets(image, row, column, height, width, channels, CHANNELS_LAST: tl.constexpr, ALIGN: tl.constexpr):
    """Where channel 0 of a pixel lies in a tensor (N, channels, height, width)."""
    if CHANNELS_LAST:
        return ((image * height + row) * width + column) * aligned(channels, ALIGN)
    return (image * channels * height + row) * width + column


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
    CHANNELS_LAST: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Maxima of BLOCK_M windows, and their taps."""
    channel, mask_c, block = own_channels(channels, BLOCK_C)
    center, scale, shift = load_affine(center_ptr, scale_ptr, shift_ptr, channel, mask_c)
    image, out_row, out_column = split_pixel(block, out_height, out_width, BLOCK_M)
    mask_m = image < batch
    best = tl.full((BLOCK_M, BLOCK_C), float("-inf"), dtype=tl.float32)
    best_tap = tl.zeros((BLOCK_M, BLOCK_C), dtype=tl.int32)
    plane = channel[None, :].to(tl.int64)
    z_plane = plane if CHANNELS_LAST else plane * height * width
    out_plane = plane if CHANNELS_LAST else plane * out_height * out_width
    for tap in tl.static_range(9):
        row = out_row * 2 + (tap // 3 - 1)
        column = out_column * 2 + (tap % 3 - 1)
        mask = (mask_m & (row >= 0) & (row < height) & (column >= 0) & (column < width))[:, None] & mask_c[None, :]
        offs = pixel_offsets(image, row, column, height, width, channels, CHANNELS_LAST, ALIGN)
        z = tl.load(z_ptr + offs[:, None] + z_plane, mask=mask, other=0.0)
        a = relu(scale * (z.to(tl.float32) - center) + shift).to(z.dtype).to(tl.float32)
        take = mask & ((a > best) | (a != a))
        best = tl.where(take, a, best)
        best_tap = tl.where(take, tap, best_tap)
    mask = mask_m[:, None] & mask_c[None, :]
    offs = pixel_offsets(image, out_row, out_column, out_height, out_width, channels, CHANNELS_LAST, ALIGN)
    tl.store(out_ptr + offs[:, None] + out_plane, best.to(out_ptr.dtype.element_ty), mask=mask)
    if taps_ptr is not None:
        tl.store(taps_ptr + offs[:, None] + out_plane, best_tap.to(tl.uint8), mask=mask)


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
    share,
    CHANNELS_LAST: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Gradients of z and of the vectors, one share of the pixels of z."""
    channel, mask_c, split = own_channels(channels, BLOCK_C)
    center, scale, shift = load_affine(center_ptr, scale_ptr, shift_ptr, channel, mask_c)
    dshift = tl.zeros((BLOCK_M, BLOCK_C), dtype=tl.float32)
    dscale = tl.zeros((BLOCK_M, BLOCK_C), dtype=tl.float32)
    plane = channel[None, :].to(tl.int64)
    z_plane = plane if CHANNELS_LAST else plane * height * width
    out_plane = plane if CHANNELS_LAST else plane * out_height * out_width
    for block in range(split * share, tl.minimum(split * share + share, blocks)):
        image, row, column = split_pixel(block, height, width, BLOCK_M)
        mask_m = image < batch
        mask = mask_m[:, None] & mask_c[None, :]
        da = tl.zeros((BLOCK_M, BLOCK_C), dtype=tl.float32)
        for window in tl.static_range(4):
            # The window that begins at or right after this pixel's row (column) less 1, and the one before it.
            out_row = (row + 1) // 2 - window // 2
            out_column = (column + 1) // 2 - window % 2
            tap_row = row + 1 - out_row * 2
            tap_column = column + 1 - out_column * 2
            hit = (out_row >= 0) & (out_row < out_height) & (tap_row < 3)
            hit = hit & (out_column >= 0) & (out_column < out_width) & (tap_column < 3)
            mask_hit = (mask_m & hit)[:, None] & mask_c[None, :]
            offs = pixel_offsets(image, out_row, out_column, out_height, out_width, channels, CHANNELS_LAST, ALIGN)
            tap = tl.load(taps_ptr + offs[:, None] + out_plane, mask=mask_hit, other=255)
            dout = tl.load(dout_ptr + offs[:, None] + out_plane, mask=mask_hit, other=0.0).to(tl.float32)
            da += tl.where(tap == (tap_row * 3 + tap_column).to(tl.uint8)[:, None], dout, 0.0)
        offs = pixel_offsets(image, row, column, height, width, channels, CHANNELS_LAST, ALIGN)[:, None] + z_plane
        z = tl.load(z_ptr + offs, mask=mask, other=0.0).to(tl.float32) - center
        t = tl.where(relu(scale * z + shift).to(z_ptr.dtype.element_ty) <= 0, 0.0, da)  # NaN passes
        if dz_ptr is not None:
            tl.store(dz_ptr + offs, (scale * t).to(dz_ptr.dtype.element_ty), mask=mask)
        if partials_ptr is not None:
            dshift += t
            dscale += t * z
    if partials_ptr is not None:
        ptrs = partials_ptr + split.to(tl.int64) * 2 * channels + channel
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
    launch, _ = _plan("fwd", tuple(z.shape), channels_last, num_sms(z.device))
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
    launch, shares = _plan("bwd", tuple(z.shape), channels_last, num_sms(z.device))
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
def _plan(pass_: str, shape: tuple[int, ...], channels_last: bool, num_sms: int) -> tuple[Launch, int]:
    """The launch of one pass over ``z`` of that shape, and the number of shares its pixels are divided into."""
    batch, channels, height, width = shape
    out_height, out_width = (height - 1) // 2 + 1, (width - 1) // 2 + 1
    sizes = {"batch": batch, "channels": channels, "height": height, "width": width}
    sizes |= {"out_height": out_height, "out_width": out_width}
    pixels = batch * (out_height * out_width if pass_ == "fwd" else height * width)
    config = elementwise_config(1, pixels, channels, channels_last, num_sms=num_sms)
    blocks = triton.cdiv(pixels, config.block_m)
    share = 1
    kernel = affine_relu_max_pool_kernel
    if pass_ == "bwd":
        kernel = affine_relu_max_pool_bwd_kernel
        share = triton.cdiv(blocks, config.splits)
        sizes |= {"blocks": blocks, "share": share}
    shares = triton.cdiv(blocks, share)
    constants = {"CHANNELS_LAST": channels_last, "BLOCK_M": config.block_m, "BLOCK_C": config.block_c}
    constants["ALIGN"] = math.gcd(channels, 16)
    options = {"num_warps": config.num_warps, "enable_fp_fusion": True}
    return Launch(kernel, triton.cdiv(channels, config.block_c) * shares, sizes, constants, options), shares
