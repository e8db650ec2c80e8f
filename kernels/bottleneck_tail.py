"""The second half of a bottleneck block in one Triton kernel, for inference.

    m = relu(scale2 * conv3x3(x, weight2) + shift2)                      grouped, rounded to the dtype of x
    y = relu(scale3 * conv1x1(m, weight3) + shift3 + residual)

The middle tensor m stays in registers. A program owns BLOCK_M output pixels and BLOCK_N output channels. It walks over
the middle channels in tiles of merged groups: the nine taps make a tile [BLOCK_M, BLOCK_K] of m, which is multiplied at
once with its BLOCK_K rows of weight3, [BLOCK_K, BLOCK_N], into the sum over all middle channels.

Counts per output pixel, for M middle channels, N output channels and e bytes an element:

* memory: e * (M + 2 * N) bytes (x, the residual, y) at stride 1; two kernels move e * 2 * M more. For ResNeXt-50's
  first stage (M 128, N 256) in 16 bits 1280 bytes against 1792.
* operations: 2 * M * N + ceil(N / BLOCK_N) * 18 * M * BLOCK_K, as every block of output channels makes m anew and a
  tile of merged groups is multiplied whole. With blocks of 256 and 32: 66 k + 74 k in the first stage, 60% of
  what an H200 can do while the bytes move; 4.2 M + 4.7 M in the fourth (M 1024, N 2048), five times as much.
* L2 cache: every block of output channels loads x nine times (asynchronous copies pass by the L1 cache), and every
  BLOCK_M pixels both weights. That, not memory, is the likely limit: about 4 KB a pixel in the first stage.

So the first stages may gain and the last cannot. Not yet measured: nothing dispatches to this kernel until it has been.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from .config import ConvProblem, TapsConfig, bottleneck_tail_config, problem_of
from .grouped_conv_fusion import load_vector, relu
from .grouped_conv_tiles import aligned, dot, exact_tile
from .launch import Launch, empty, nhwc, options, precision, to_layout
from .tuning import tf32_allowed


@triton.jit
def bottleneck_tail_kernel(
    x_ptr,  # (batch, height, width, in_channels)
    weight2_ptr,  # (mid_channels, C_in / groups, 3, 3), or with TAPS_OUTSIDE (mid_channels, 3, 3, C_in / groups)
    mid_scale_ptr,  # (mid_channels,), as the next
    mid_shift_ptr,
    weight3_ptr,  # (out_channels, mid_channels)
    y_scale_ptr,  # (out_channels,), as the next
    y_shift_ptr,
    residual_ptr,  # like y
    y_ptr,  # (batch, out_height, out_width, out_channels)
    batch,
    height,
    width,
    in_channels,
    out_height,
    out_width,
    mid_channels,
    out_channels,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    TAPS_OUTSIDE: tl.constexpr,
    GROUP_IN: tl.constexpr,
    GROUP_MID: tl.constexpr,
    MERGED: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """BLOCK_M output pixels x BLOCK_N output channels; BLOCK_K middle channels, and input channels, at a time."""
    in_channels = aligned(in_channels, ALIGN)
    mid_channels = aligned(mid_channels, ALIGN)
    out_channels = aligned(out_channels, ALIGN)
    TILE_IN: tl.constexpr = MERGED * GROUP_IN
    TILE_MID: tl.constexpr = MERGED * GROUP_MID
    blocks_in: tl.constexpr = (TILE_IN + BLOCK_K - 1) // BLOCK_K
    blocks_mid: tl.constexpr = (TILE_MID + BLOCK_K - 1) // BLOCK_K
    stride_wt: tl.constexpr = GROUP_IN if TAPS_OUTSIDE else 1
    stride_wi: tl.constexpr = 1 if TAPS_OUTSIDE else 9
    pid = tl.program_id(0)
    blocks_n = tl.cdiv(out_channels, BLOCK_N)

    pixel = (pid // blocks_n).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = (pixel % out_width).to(tl.int32)
    row = (pixel // out_width % out_height).to(tl.int32)
    image = pixel // out_width // out_height
    mask_m = image < batch
    x_row = row * STRIDE_H - 1
    x_column = column * STRIDE_W - 1
    x_pixel = (image * height + x_row) * width + x_column
    offs_k = tl.arange(0, BLOCK_K)
    channel_n = pid % blocks_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = channel_n < out_channels
    weight3_ptrs = weight3_ptr + channel_n.to(tl.int64)[None, :] * mid_channels

    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for block in range(0, tl.cdiv(mid_channels, TILE_MID) * blocks_mid):
        tile = block // blocks_mid
        in_tile_mid = block % blocks_mid * BLOCK_K + offs_k
        channel_mid = tile * TILE_MID + in_tile_mid
        mask_mid = (in_tile_mid < TILE_MID) & (channel_mid < mid_channels)
        weight2_ptrs = weight2_ptr + channel_mid.to(tl.int64)[None, :] * (GROUP_IN * 9)
        mid = tl.zeros((BLOCK_M, BLOCK_K), dtype=tl.float32)
        for step in range(0, 9 * blocks_in):
            tap = step // blocks_in
            in_tile = step % blocks_in * BLOCK_K + offs_k
            channel_in = tile * TILE_IN + in_tile
            mask_in = (in_tile < TILE_IN) & (channel_in < in_channels)
            hit = mask_m & (x_row + tap // 3 >= 0) & (x_row + tap // 3 < height)
            hit = hit & (x_column + tap % 3 >= 0) & (x_column + tap % 3 < width)
            offs_x = (x_pixel + (tap // 3 * width + tap % 3))[:, None] * in_channels + channel_in[None, :]
            x = tl.load(x_ptr + offs_x, mask=hit[:, None] & mask_in[None, :], other=0.0)
            mask_w = mask_in[:, None] & mask_mid[None, :]
            if MERGED > 1:
                mask_w = mask_w & ((in_tile // GROUP_IN)[:, None] == (in_tile_mid // GROUP_MID)[None, :])
            offs_w = (in_tile % GROUP_IN * stride_wi + tap * stride_wt)[:, None]
            mid = dot(x, tl.load(weight2_ptrs + offs_w, mask=mask_w, other=0.0), mid, PRECISION)
        if MERGED > 1:
            total = tl.sum(mid * 0.0)
            if total != total:
                mid = exact_tile(
                    (x_ptr, None, None, None, None),
                    weight2_ptr,
                    image,
                    row,
                    column,
                    tile,
                    height,
                    width,
                    in_channels,
                    1.0,
                    stride_wt,
                    GROUP_IN * 9,
                    stride_wi,
                    mask_m[:, None] & mask_mid[None, :],
                    STRIDE_H,
                    STRIDE_W,
                    False,
                    GROUP_IN,
                    GROUP_MID,
                    MERGED,
                    BLOCK_M,
                    BLOCK_K,
                    "none",
                )
        scale = load_vector(mid_scale_ptr, channel_mid, mask_mid, 1.0)
        shift = load_vector(mid_shift_ptr, channel_mid, mask_mid, 0.0)
        mid = relu(mid * scale[None, :] + shift[None, :]).to(x_ptr.dtype.element_ty)
        mask_w = mask_mid[:, None] & mask_n[None, :]
        acc = dot(mid, tl.load(weight3_ptrs + channel_mid[:, None], mask=mask_w, other=0.0), acc, PRECISION)

    mask = mask_m[:, None] & mask_n[None, :]
    offs_y = pixel[:, None] * out_channels + channel_n[None, :]
    acc = acc * load_vector(y_scale_ptr, channel_n, mask_n, 1.0)[None, :]
    acc += load_vector(y_shift_ptr, channel_n, mask_n, 0.0)[None, :]
    acc += tl.load(residual_ptr + offs_y, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + offs_y, relu(acc).to(y_ptr.dtype.element_ty), mask=mask)


@functools.lru_cache(maxsize=4096)
def plan(
    problem: ConvProblem, out_channels: int, config: TapsConfig, *, allow_tf32: bool, taps_outside: bool
) -> Launch:
    """The launch with given settings; needs no device and no tensors.

    Args:
        problem: The grouped 3x3 convolution, ``op`` "fwd".
        out_channels: Output channels of the 1x1 convolution.
        config: Launch settings.
        allow_tf32: Whether float32 products may be rounded to TF32.
        taps_outside: Whether ``weight2`` lies in memory as channels_last leaves it.
    """
    pixels = problem.batch * problem.out_height * problem.out_width
    sizes = {"batch": problem.batch, "height": problem.height, "width": problem.width}
    sizes |= {"in_channels": problem.in_channels, "mid_channels": problem.out_channels, "out_channels": out_channels}
    sizes |= {"out_height": problem.out_height, "out_width": problem.out_width}
    constants: dict[str, Any] = {"STRIDE_H": problem.stride[0], "STRIDE_W": problem.stride[1]}
    constants["TAPS_OUTSIDE"] = taps_outside
    constants |= {"GROUP_IN": problem.group_in, "GROUP_MID": problem.group_out, "MERGED": config.merged}
    constants |= {"BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_K": config.block_k}
    constants["ALIGN"] = math.gcd(problem.in_channels, problem.out_channels, out_channels, 16)
    constants["PRECISION"] = precision(problem.dtype, allow_tf32)
    programs = triton.cdiv(out_channels, config.block_n) * triton.cdiv(pixels, config.block_m)
    return Launch(bottleneck_tail_kernel, programs, sizes, constants, options(config))


def bottleneck_tail(
    x: Tensor,
    weight2: Tensor,
    scale2: Tensor,
    shift2: Tensor,
    weight3: Tensor,
    scale3: Tensor,
    shift3: Tensor,
    residual: Tensor,
    stride: tuple[int, int],
    groups: int,
    channels_last: bool,
    *,
    config: TapsConfig | None = None,
    allow_tf32: bool | None = None,
) -> Tensor:
    """Grouped 3x3 convolution, affine, ReLU, 1x1 convolution, affine, residual, ReLU.

    A NaN or Inf of one group reaches no other group's middle channels.

    Args:
        x: (N, C_in, H, W), dense in the layout ``channels_last`` says; float32, float16 or bfloat16.
        weight2: (C_mid, C_in / groups, 3, 3), contiguous or channels_last, dtype of ``x``.
        scale2: (C_mid,), float32.
        shift2: (C_mid,), float32.
        weight3: (C_out, C_mid, 1, 1), dense, dtype of ``x``.
        scale3: (C_out,), float32.
        shift3: (C_out,), float32.
        residual: Like the result.
        stride: (stride_h, stride_w) of the 3x3 convolution, each 1 or 2.
        groups: Groups of the 3x3 convolution.
        channels_last: Whether ``x``, ``residual`` and the result are dense in ``torch.channels_last`` (else in NCHW).
        config: Launch settings; the heuristic's choice by default.
        allow_tf32: Whether float32 products may be rounded to TF32; PyTorch's flag for convolutions by default.

    Returns:
        (N, C_out, Ho, Wo) with Ho = (H - 1) // stride_h + 1, Wo alike; dtype of ``x``.
    """
    problem = problem_of("fwd", x.shape, weight2.shape, stride, groups, x.dtype, x.device, channels_last)
    if allow_tf32 is None:
        allow_tf32 = tf32_allowed(x.dtype)
    config = config or bottleneck_tail_config(problem, len(weight3), allow_tf32=allow_tf32)
    taps_outside = weight2.shape[1] > 1 and weight2.stride(1) == 1
    launch = plan(problem, len(weight3), config, allow_tf32=allow_tf32, taps_outside=taps_outside)
    y = empty(x, (problem.batch, len(weight3), problem.out_height, problem.out_width))
    launch(
        x_ptr=nhwc(x),
        weight2_ptr=weight2,
        mid_scale_ptr=scale2,
        mid_shift_ptr=shift2,
        weight3_ptr=weight3,
        y_scale_ptr=scale3,
        y_shift_ptr=shift3,
        residual_ptr=nhwc(residual),
        y_ptr=y,
    )
    return to_layout(y, channels_last)
