"""3x3 grouped convolution in Triton: the launchers of forward, input gradient and weight gradient.

    y[n, ho, wo, g*O + o] = sum over kh, kw, i of
        x[n, ho*stride_h + kh - 1, wo*stride_w + kw - 1, g*I + i] * weight[g*O + o, i, kh, kw]

Everything is NHWC inside. Two forms; `config.py` says which serves a problem.

* **strips** (narrow groups, limited by memory). A program owns BLOCK_M strips of STRIP neighbouring columns, a band of
  rows, and one tile of merged groups with its nine block-diagonal weight tiles [K, N]. It walks down the source rows.
  A row is loaded as shifted tiles [BLOCK_M, K], one per source column of the strip, and feeds every destination row it
  touches: each source element is loaded (STRIP + 2) / STRIP times (stride 2: (2 * STRIP + 1) / (2 * STRIP)), not nine.
* **taps** (everything else). An implicit GEMM: [BLOCK_M destination pixels, K] @ [K, BLOCK_N], accumulated over the
  taps and over blocks of the group's channels. The input gradient of a strided convolution is one such GEMM for each
  parity of the destination pixel, over just the taps that reach it.

Kernels: grouped_conv_forward.py, grouped_conv_backward.py.
"""

from __future__ import annotations

import functools
import math

import torch
import triton
from torch import Tensor

from .config import Config, ConvProblem, StripsConfig, TapsConfig, choose_config, round_up_to_block
from .grouped_conv_backward import (
    grouped_conv_dgrad_strided_kernel,
    grouped_conv_wgrad_strips_kernel,
    grouped_conv_wgrad_taps_kernel,
)
from .grouped_conv_forward import grouped_conv_strips_kernel, grouped_conv_taps_kernel
from .grouped_conv_tiles import probe_kernel
from .launch import Launch, empty_nhwc, nhwc, num_sms, precision, tf32_allowed, to_layout

_MAX_COUNT = 2**31 - 2**16  # What an int32 index may reach, less the last block's overhang.


@functools.lru_cache(maxsize=4096)
def plan(
    problem: ConvProblem, config: Config, *, allow_tf32: bool, has_bias: bool = False, taps_outside: bool = False
) -> Launch:
    """The launch that computes one pass with given settings; needs no device and no tensors.

    Args:
        problem: What to compute.
        config: Launch settings; `StripsConfig` only where `fits_strips`.
        allow_tf32: Whether float32 products may be rounded to TF32.
        has_bias: Whether the forward pass adds a bias.
        taps_outside: Whether the weight lies in memory as (C_out, 3, 3, C_in / groups), as channels_last leaves it.

    Raises:
        ValueError: If a count passes what the kernels index with 32 bits.
    """
    if problem.op == "wgrad":
        launch, counts = _plan_wgrad(problem, config)
    else:
        launch, counts = _plan_conv(problem, config, has_bias, taps_outside)
    if max(counts) > _MAX_COUNT:
        raise ValueError(
            f"grouped_conv2d: expected at most {_MAX_COUNT} pixels per image, strips and programs for the triton "
            f"backend, got {max(counts)}; split the batch, or use the torch backend"
        )
    launch.constants["PRECISION"] = precision(problem.dtype, allow_tf32)
    launch.options.update(num_warps=config.num_warps, num_stages=config.num_stages, enable_fp_fusion=True)
    if isinstance(config, StripsConfig) and problem.dtype == torch.float32 and config.num_warps == 1:
        launch.options["maxnreg"] = 255  # the assembler else spills a few, to fit more programs on a multiprocessor
    return launch


def _alignment(problem: ConvProblem) -> int:
    """Channels that every pixel starts at a multiple of; Triton itself sees multiples of 16 only, not of 8."""
    return math.gcd(problem.in_channels, problem.out_channels, 16)


def _plan_conv(problem: ConvProblem, config: Config, has_bias: bool, taps_outside: bool) -> tuple[Launch, list[int]]:
    """The launch of a forward pass or input gradient, and the counts that must fit 32 bits."""
    transposed = problem.op == "dgrad"
    src = (problem.height, problem.width, problem.in_channels)
    dst = (problem.out_height, problem.out_width, problem.out_channels)
    if transposed:
        src, dst = dst, src
    group_k, group_n = src[2] // problem.groups, dst[2] // problem.groups
    sizes = dict(zip(("src_height", "src_width", "src_channels"), src, strict=True), batch=problem.batch)
    sizes |= zip(("dst_height", "dst_width", "dst_channels"), dst, strict=True)
    constants = {"GROUP_K": group_k, "GROUP_N": group_n, "MERGED": config.merged, "BLOCK_M": config.block_m}
    constants["ALIGN"] = _alignment(problem)
    tiles = triton.cdiv(problem.groups, config.merged)

    if isinstance(config, StripsConfig):
        strips = problem.batch * triton.cdiv(problem.out_width, config.strip)
        programs = tiles * triton.cdiv(problem.out_height, config.band) * triton.cdiv(strips, config.block_m)
        sizes["band"] = config.band
        constants |= {"STRIP": config.strip, "TAPS_OUTSIDE": taps_outside}
        constants["BLOCK_K"] = round_up_to_block(config.merged * group_k)
        constants["BLOCK_N"] = round_up_to_block(config.merged * group_n)
        if transposed and problem.stride == (2, 2):
            return Launch(grouped_conv_dgrad_strided_kernel, programs, sizes, constants, {}), [programs]
        constants |= {"STRIDE": problem.stride[0], "TRANSPOSED": transposed, "HAS_BIAS": has_bias}
        return Launch(grouped_conv_strips_kernel, programs, sizes, constants, {}), [programs]

    parities = problem.stride if transposed else (1, 1)
    pixels = problem.batch * triton.cdiv(dst[0], parities[0]) * triton.cdiv(dst[1], parities[1])
    blocks_n = triton.cdiv(config.merged * group_n, config.block_n)
    programs = blocks_n * tiles * parities[0] * parities[1] * triton.cdiv(pixels, config.block_m)
    constants |= {"BLOCK_K": config.block_k, "BLOCK_N": config.block_n}
    constants |= {"STRIDE_H": problem.stride[0], "STRIDE_W": problem.stride[1]}
    constants |= {"TRANSPOSED": transposed, "HAS_BIAS": has_bias}
    return Launch(grouped_conv_taps_kernel, programs, sizes, constants, {}), [programs]


def _plan_wgrad(problem: ConvProblem, config: Config) -> tuple[Launch, list[int]]:
    """The launch of a weight gradient, and the counts that must fit 32 bits."""
    sizes = {
        "batch": problem.batch,
        "height": problem.height,
        "width": problem.width,
        "in_channels": problem.in_channels,
        "out_height": problem.out_height,
        "out_width": problem.out_width,
        "out_channels": problem.out_channels,
    }
    constants = {
        "GROUP_IN": problem.group_in,
        "GROUP_OUT": problem.group_out,
        "MERGED": config.merged,
        "ALIGN": _alignment(problem),
        "BLOCK_M": config.block_m,
    }
    tiles = triton.cdiv(problem.groups, config.merged)
    if isinstance(config, StripsConfig):
        strips = problem.batch * triton.cdiv(problem.out_width, config.strip)
        blocks = triton.cdiv(strips, config.block_m) * triton.cdiv(problem.out_height, config.band)
        programs = tiles * config.splits
        sizes |= {"band": config.band, "splits": config.splits}
        constants |= {"STRIDE": problem.stride[0], "STRIP": config.strip}
        constants["BLOCK_K"] = round_up_to_block(config.merged * problem.group_in)
        constants["BLOCK_N"] = round_up_to_block(config.merged * problem.group_out)
        launch = Launch(grouped_conv_wgrad_strips_kernel, programs, sizes, constants, {})
        return launch, [programs, strips, blocks + config.splits]

    blocks_k = triton.cdiv(config.merged * problem.group_in, config.block_k)
    blocks_n = triton.cdiv(config.merged * problem.group_out, config.block_n)
    programs = blocks_k * blocks_n * 3 * tiles * config.splits
    image_pixels = problem.out_height * problem.out_width
    steps = triton.cdiv(problem.batch * image_pixels, config.block_m)
    sizes["share"] = triton.cdiv(steps, config.splits) * config.block_m
    constants |= {"BLOCK_K": config.block_k, "BLOCK_N": config.block_n}
    constants |= {"STRIDE_H": problem.stride[0], "STRIDE_W": problem.stride[1]}
    launch = Launch(grouped_conv_wgrad_taps_kernel, programs, sizes, constants, {})
    return launch, [programs, image_pixels + sizes["share"]]


def probe(device: torch.device) -> None:
    """Compile and run the least of kernels; raises whatever keeps Triton from working with ``device``.

    The first launch in a process needs a C compiler (for Triton's driver stub) and an assembler that knows the GPU.
    """
    out = torch.empty(1, dtype=torch.int32, device=device)
    with torch.cuda.device_of(out):
        probe_kernel[(1,)](out_ptr=out, num_warps=1)


def fwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: tuple[int, int],
    groups: int,
    channels_last: bool,
    *,
    config: Config | None = None,
    allow_tf32: bool | None = None,
) -> Tensor:
    """Grouped 3x3 convolution with padding 1.

    Args:
        x: (N, C_in, H, W), dense in the layout ``channels_last`` says; float32, float16 or bfloat16.
        weight: (C_out, C_in / groups, 3, 3), contiguous or channels_last, dtype of ``x``.
        bias: (C_out,), contiguous, dtype of ``x``, or None.
        stride: (stride_h, stride_w), each 1 or 2.
        groups: Number of groups.
        channels_last: Whether ``x`` and the result are dense in ``torch.channels_last`` (else in NCHW).
        config: Launch settings; the heuristic's choice by default.
        allow_tf32: Whether float32 products may be rounded to TF32; PyTorch's flag for convolutions by default.

    Returns:
        (N, C_out, Ho, Wo) with Ho = (H - 1) // stride_h + 1, Wo alike.
    """
    batch, in_channels, height, width = x.shape
    problem = _problem("fwd", x, in_channels, len(weight), (height, width), stride, groups, channels_last)
    launch, config = _prepare(problem, x.device, config, allow_tf32, bias is not None, _taps_outside(weight))
    y = empty_nhwc(x, batch, len(weight), problem.out_height, problem.out_width)
    with torch.cuda.device_of(x):
        launch(src_ptr=nhwc(x), weight_ptr=_arrange_weight(weight, config), bias_ptr=bias, dst_ptr=y)
    return to_layout(y, channels_last)


def dgrad(
    grad: Tensor,
    weight: Tensor,
    input_size: tuple[int, int],
    stride: tuple[int, int],
    groups: int,
    channels_last: bool,
    *,
    config: Config | None = None,
    allow_tf32: bool | None = None,
) -> Tensor:
    """Gradient of the convolution's input.

    Args:
        grad: (N, C_out, Ho, Wo), the gradient of the output, laid out like ``x`` of `fwd`.
        weight: As in `fwd`.
        input_size: (H, W) of the input.
        stride: As in `fwd`.
        groups: As in `fwd`.
        channels_last: As in `fwd`.
        config: As in `fwd`.
        allow_tf32: As in `fwd`.

    Returns:
        (N, C_in, H, W).
    """
    batch, out_channels = grad.shape[:2]
    in_channels = weight.shape[1] * groups
    problem = _problem("dgrad", grad, in_channels, out_channels, input_size, stride, groups, channels_last)
    launch, config = _prepare(problem, grad.device, config, allow_tf32, taps_outside=_taps_outside(weight))
    dx = empty_nhwc(grad, batch, in_channels, *input_size)
    no_bias = {"bias_ptr": None} if "HAS_BIAS" in launch.constants else {}
    with torch.cuda.device_of(grad):
        launch(src_ptr=nhwc(grad), weight_ptr=_arrange_weight(weight, config), dst_ptr=dx, **no_bias)
    return to_layout(dx, channels_last)


def wgrad(
    grad: Tensor,
    x: Tensor,
    stride: tuple[int, int],
    groups: int,
    channels_last: bool,
    *,
    config: Config | None = None,
    allow_tf32: bool | None = None,
) -> Tensor:
    """Gradient of the convolution's weight.

    Args:
        grad: (N, C_out, Ho, Wo), the gradient of the output, laid out like ``x``.
        x: (N, C_in, H, W), as in `fwd`.
        stride: As in `fwd`.
        groups: As in `fwd`.
        channels_last: As in `fwd`.
        config: As in `fwd`.
        allow_tf32: As in `fwd`.

    Returns:
        (C_out, C_in / groups, 3, 3), laid out and of the dtype of ``x``; the same bits for the same call.
    """
    in_channels, height, width = x.shape[1:]
    out_channels = grad.shape[1]
    problem = _problem("wgrad", x, in_channels, out_channels, (height, width), stride, groups, channels_last)
    launch, config = _prepare(problem, x.device, config, allow_tf32)
    shape = (config.splits, out_channels, problem.group_in, 3, 3)
    with torch.cuda.device_of(x):
        partials = torch.empty(shape, dtype=torch.float32, device=x.device)
        launch(grad_ptr=nhwc(grad), x_ptr=nhwc(x), partials_ptr=partials)
        layout = torch.channels_last if channels_last else torch.contiguous_format
        return partials.sum(0).to(x.dtype, memory_format=layout)


def _problem(op, activation, in_channels, out_channels, size, stride, groups, channels_last) -> ConvProblem:
    return ConvProblem(
        op=op,
        batch=len(activation),
        in_channels=in_channels,
        out_channels=out_channels,
        height=size[0],
        width=size[1],
        stride=tuple(stride),
        groups=groups,
        dtype=activation.dtype,
        device_type=activation.device.type,
        channels_last=channels_last,
    )


def _prepare(
    problem: ConvProblem,
    device: torch.device,
    config: Config | None,
    allow_tf32: bool | None,
    has_bias: bool = False,
    taps_outside: bool = False,
) -> tuple[Launch, Config]:
    """The launch and its settings, with the defaults filled in."""
    if allow_tf32 is None:
        allow_tf32 = tf32_allowed()
    config = config or _default_config(problem, device, allow_tf32)
    return plan(problem, config, allow_tf32=allow_tf32, has_bias=has_bias, taps_outside=taps_outside), config


@functools.lru_cache(maxsize=4096)
def _default_config(problem: ConvProblem, device: torch.device, allow_tf32: bool) -> Config:
    return choose_config(problem, allow_tf32=allow_tf32, num_sms=num_sms(device))


def _taps_outside(weight: Tensor) -> bool:
    return weight.shape[1] > 1 and weight.stride(1) == 1


def _arrange_weight(weight: Tensor, config: Config) -> Tensor:
    """Taps walk channel by channel through one tap at a time: (3, 3, C_out, C_in / groups) makes that contiguous."""
    return weight.permute(2, 3, 0, 1).contiguous() if isinstance(config, TapsConfig) else weight
