"""Convolutions of images in Triton: a few input channels, one group; the first layer of a network.

Libraries multiply channels in eights: of three they make eight first, in a pass over memory, and then multiply with
zeros. Here the taps of a row of the kernel are one step of the product, which is 7 * 3 = 21 of 32 deep in a ResNet.

    z = conv(x, weight)      with mean and variance of z, or an affine, ReLU and residual behind it
    dw                       from z's gradient, whose part through the statistics is added on load

Nobody asks for the gradient of an image as a rule; that, a prologue, and NCHW are left to PyTorch's convolution
(`composed.Composed`).
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
from torch import Tensor

from . import batch_norm
from .composed import Composed
from .config import Affine, ConvProblem, Norm, problem_of
from .launch import Launch, Prepared, empty, interpreted, nhwc, num_sms, precision
from .statistics import merge_partials
from .stem_conv_kernels import stem_conv_fwd_kernel, stem_conv_wgrad_kernel
from .tuning import tf32_allowed

merges = True  # As of batch_norm.py.
_COMPOSED = Composed(batch_norm)
# Programs of four warps that one multiprocessor holds: at up to 128 registers a thread; with statistics at 143; and of
# the weight gradient at 192. All have the same work: a few more would take as long again.
_PROGRAMS_PER_SM = {"fwd": 4, "statistics": 3, "wgrad": 2}
_OPTIONAL = {
    "fwd": ("y_scale_ptr", "y_shift_ptr", "residual_ptr", "partials_ptr"),
    "wgrad": ("z_ptr", "z_center_ptr", "z_scale_ptr", "z_shift_ptr"),
}
_KERNELS = {"fwd": stem_conv_fwd_kernel, "wgrad": stem_conv_wgrad_kernel}


def plan(
    problem: ConvProblem,
    kernel: tuple[int, int],
    *,
    allow_tf32: bool,
    fused: frozenset[str] = frozenset(),
    relu: bool = False,
    num_sms: int = 132,
) -> Launch:
    """The launch that computes one pass; needs no device and no tensors.

    Args:
        problem: What to compute, ``"fwd"`` or ``"wgrad"``.
        kernel: Rows and columns of the kernel.
        allow_tf32: Whether float32 products may be rounded to TF32.
        fused: The kernel's optional pointers that the launch has tensors for. By default none.
        relu: Whether the forward pass ends in a ReLU.
        num_sms: Streaming multiprocessors.
    """
    channels, row_size = problem.in_channels, problem.width * problem.in_channels
    pixels = problem.batch * problem.out_height * problem.out_width
    block_m = 64 if problem.op == "fwd" and problem.dtype.itemsize == 2 else 32  # else registers spill
    block_n = min(64, max(16, triton.next_power_of_2(problem.out_channels)))
    # Two elements at a time where rows, and every pixel's window in them, begin at an even one.
    before = kernel[1] // 2 * channels
    pairs = problem.dtype.itemsize == 2 and row_size % 2 == 0 and problem.stride[1] * channels % 2 == 0
    skipped = before % 2 if pairs else 0
    taps = kernel[1] * channels
    blocks, blocks_n = triton.cdiv(pixels, block_m), triton.cdiv(problem.out_channels, block_n)
    held = _PROGRAMS_PER_SM["statistics" if "partials_ptr" in fused and problem.op == "fwd" else problem.op]
    shares = min(blocks, max(1, held * num_sms // blocks_n))
    sizes = {"pixels": pixels, "height": problem.height, "row_size": row_size}
    sizes |= {"out_height": problem.out_height, "out_width": problem.out_width, "out_channels": problem.out_channels}
    constants: dict[str, Any] = {name: None for name in _OPTIONAL[problem.op] if name not in fused}
    constants |= {"STRIDE_H": problem.stride[0], "STRIDE_W": problem.stride[1], "KERNEL_H": kernel[0], "TAPS": taps}
    constants |= {"CHANNELS": channels, "SKIPPED": skipped, "PAIRS": pairs}
    constants |= {"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": max(16, triton.next_power_of_2(taps + skipped))}
    constants["PRECISION"] = precision(problem.dtype, allow_tf32)
    if problem.op == "fwd":
        sizes["walkers"] = shares
        constants |= {"RELU": relu, "ASSEMBLY": not interpreted()}
    else:
        sizes["share"] = triton.cdiv(blocks, shares) * block_m
        shares = triton.cdiv(pixels, sizes["share"])
    options = {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": True}
    return Launch(_KERNELS[problem.op], blocks_n * shares, sizes, constants, options)


def conv_stats_fwd(
    x: Tensor,
    prologue: Affine | None,
    weight: Tensor,
    stride: tuple[int, int],
    groups: int,
    channels_last: bool,
    stats: bool,
    *,
    allow_tf32: bool | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Convolve an image, and take the statistics of the result.

    Args:
        x: (N, C_in, H, W) with at most 4 channels, channels_last; float32, float16 or bfloat16.
        prologue: As of `pointwise_conv.conv_stats_fwd`.
        weight: (C_out, C_in, kh, kw), kh and kw odd, dense, dtype of ``x``; see `config.fits_stem`.
        stride: (stride_h, stride_w), each 1 or 2.
        groups: 1.
        channels_last: True.
        stats: Whether the statistics are wanted.
        allow_tf32: As of `pointwise_conv.conv_stats_fwd`.

    Returns:
        z (N, C_out, Ho, Wo), channels_last, with Ho = (H - 1) // stride_h + 1, Wo alike; mean and biased variance
        (C_out,) of z as it is stored, float32, the same bits for the same call, or None.
    """
    if prologue is not None:
        return _COMPOSED.conv_stats_fwd(x, prologue, weight, stride, groups, channels_last, stats)
    z, partials = _convolve(x, weight, stride, {}, allow_tf32, sums=3 if stats else 0)
    mean, var = (None, None) if partials is None else merge_partials(partials)
    return z, mean, var


def conv_norm_fwd(
    x: Tensor,
    prologue: Affine | None,
    weight: Tensor,
    stride: tuple[int, int],
    groups: int,
    channels_last: bool,
    norm: Norm,
) -> tuple[Tensor, ...]:
    """`conv_stats_fwd`, and what a batch norm makes of the statistics: z, mean, variance, scale and shift."""
    if prologue is not None:
        return _COMPOSED.conv_norm_fwd(x, prologue, weight, stride, groups, channels_last, norm)
    z, partials = _convolve(x, weight, stride, {}, None, sums=3)
    return z, *merge_partials(partials, norm)  # type: ignore[arg-type]  # there are partials of three sums


def conv_stats_bwd(
    dz: Tensor,
    grad_prologue: tuple[Tensor, Tensor, Tensor, Tensor] | None,
    x: Tensor,
    prologue: Affine | None,
    weight: Tensor,
    stride: tuple[int, int],
    groups: int,
    channels_last: bool,
    wanted: tuple[bool, bool],
    *,
    allow_tf32: bool | None = None,
    deferred: bool = False,
) -> tuple[Any, ...]:
    """Gradients of `conv_stats_fwd`; arguments and results as of `pointwise_conv.conv_stats_bwd`."""
    place = (x, prologue, weight, stride, groups, channels_last)
    if prologue is not None:
        return _COMPOSED.conv_stats_bwd(dz, grad_prologue, *place, wanted, deferred=deferred)
    dx = dw = None
    if wanted[0]:
        dx = _COMPOSED.conv_stats_bwd(dz, grad_prologue, *place, (True, False))[0]
    if wanted[1]:
        dw = _correlate(dz, grad_prologue, x, weight, stride, allow_tf32)
        dw = dw if deferred else dw.to(x.dtype)
    return dx, None, None, dw


def conv_affine(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    relu: bool,
    stride: tuple[int, int],
    groups: int,
    channels_last: bool,
    *,
    allow_tf32: bool | None = None,
) -> Tensor:
    """relu(scale * conv(x, weight) + shift + residual), rounded once; as of `pointwise_conv.conv_affine`."""
    given = {"y_scale_ptr": scale, "y_shift_ptr": shift, "residual_ptr": None if residual is None else nhwc(residual)}
    tensors = {name: tensor for name, tensor in given.items() if tensor is not None}
    return _convolve(x, weight, stride, tensors, allow_tf32, relu=relu)[0]


def _convolve(
    x: Tensor,
    weight: Tensor,
    stride: tuple[int, int],
    tensors: dict[str, Tensor],
    allow_tf32: bool | None,
    *,
    sums: int = 0,
    relu: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """A forward pass with the optional ``tensors``, and partials (rows, sums, channels) if there are any."""
    names = (*tensors, "partials_ptr") if sums else tuple(tensors)
    prepared = _prepare(names, _allowed(x, allow_tf32), relu, *_place("fwd", x, weight, stride))
    z = empty(x, prepared.shape)
    partials = prepared.partials(sums, x)
    if partials is not None:
        tensors = {**tensors, "partials_ptr": partials}
    prepared.launch(x_ptr=_image(x), weight_ptr=nhwc(weight), y_ptr=z, **tensors)
    return z, partials


def _correlate(
    dz: Tensor,
    grad_prologue: tuple[Tensor, Tensor, Tensor, Tensor] | None,
    x: Tensor,
    weight: Tensor,
    stride: tuple[int, int],
    allow_tf32: bool | None,
) -> Tensor:
    """The weight gradient, float32, channels_last."""
    tensors = {"grad_ptr": nhwc(dz)}
    if grad_prologue is not None:
        z, mean, dmean, dvar = grad_prologue
        tensors |= {"z_ptr": nhwc(z), "z_center_ptr": mean, "z_scale_ptr": dvar, "z_shift_ptr": dmean}
    tensors["x_ptr"] = _image(x)
    prepared = _prepare(tuple(tensors), _allowed(x, allow_tf32), False, *_place("wgrad", x, weight, stride))
    partials = torch.empty(prepared.shape, dtype=torch.float32, device=x.device)
    prepared.launch(**tensors, partials_ptr=partials)
    return partials.sum(0).permute(0, 3, 1, 2)


def _image(x: Tensor) -> Tensor:
    """``x`` in channels_last, at an address from which two elements can be loaded at a time."""
    x = nhwc(x)
    return x if x.data_ptr() % 4 == 0 else x.clone()


def _allowed(x: Tensor, allow_tf32: bool | None) -> bool:
    return tf32_allowed(x.dtype) if allow_tf32 is None else allow_tf32


def _place(op: str, x: Tensor, weight: Tensor, stride: tuple[int, int]) -> tuple[Any, ...]:
    return op, x.shape, weight.shape, stride, 1, x.dtype, x.device, True


@functools.lru_cache(maxsize=4096)
def _prepare(names: tuple[str, ...], allow_tf32: bool, relu: bool, *place: Any) -> Prepared:
    """``names``: at least the optional arguments that there are tensors for; ``place``: as of `problem_of`."""
    problem = problem_of(*place)
    _, _, (out_channels, in_channels, *kernel), *_, device, _ = place
    fused = frozenset(names).intersection(_OPTIONAL[problem.op])
    sms = num_sms(device)
    launch = plan(problem, tuple(kernel), allow_tf32=allow_tf32, fused=fused, relu=relu, num_sms=sms)
    if problem.op == "wgrad":
        splits = launch.programs // triton.cdiv(out_channels, launch.constants["BLOCK_N"])
        return Prepared(None, launch, (splits, out_channels, *kernel, in_channels), 0)
    shape = (problem.batch, out_channels, problem.out_height, problem.out_width)
    return Prepared(None, launch, shape, int(launch.sizes["walkers"]))
