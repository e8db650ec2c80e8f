"""1x1 convolution in Triton as a matrix product, with batch norm and ReLU on load and on store.

    z[p, o] = sum over i of a[p, i] * weight[o, i]        a = relu(scale * (x - center) + shift), or x itself

Everything is NHWC inside: activations are matrices of pixels by channels. With strides the rows of x are gathered, and
the input gradient writes zeros between its rows. A program of the forward pass or the input gradient makes BLOCK_M
pixels x BLOCK_N channels in one walk over the channels it sums over. Programs of the same pixels are neighbours, so
that these are read from memory once; the weight stays in the L2 cache, from which it comes as often as there are blocks
of pixels. Where few channels are summed over, that and the start and end of a program cost more than the product: then
a program of the forward pass keeps its part of the weight in shared memory, walks over many blocks of pixels, and keeps
their moments in registers (`PointwiseConfig.walkers`). The weight gradient splits the pixels among programs, which
leave float32 partial sums that are added in order.

Bytes moved, each once: x and z forward (the residual too in inference); dz, z, x and dx in the input gradient; dz, z
and x in the weight gradient; partial sums of a few percent of that. Kernels: pointwise_conv_kernels.py.
"""

from __future__ import annotations

import functools
import math
from dataclasses import replace
from typing import Any

import torch
import triton
from torch import Tensor

from .config import Affine, ConvProblem, Norm, PointwiseConfig, fits_descriptors, pointwise_config, problem_of
from .launch import Launch, Prepared, architecture, empty, interpreted, nhwc, num_sms, options, precision, to_layout
from .pointwise_conv_kernels import (
    pointwise_conv_dgrad_kernel,
    pointwise_conv_fwd_kernel,
    pointwise_conv_wgrad_kernel,
)
from .statistics import PartialSums, merge_partials, sum_partials
from .tuning import lookup, tf32_allowed

GradPrologue = tuple[Tensor, Tensor, Tensor, Tensor]

merges = True  # As of batch_norm.py.
scales = True  # As of batch_norm.py.
adds = True  # Input gradients are added to others if asked to.
_KERNELS = {
    "fwd": pointwise_conv_fwd_kernel,
    "dgrad": pointwise_conv_dgrad_kernel,
    "wgrad": pointwise_conv_wgrad_kernel,
}
_X = ("x_center_ptr", "x_scale_ptr", "x_shift_ptr")
_Z = ("grad_scale_ptr", "z_ptr", "z_center_ptr", "z_scale_ptr", "z_shift_ptr")
# The kernels' pointers that may be None.
_OPTIONAL = {
    "fwd": (*_X, "y_scale_ptr", "y_shift_ptr", "residual_ptr", "partials_ptr"),
    "dgrad": (*_Z, "x_ptr", *_X, "partials_ptr"),
    "wgrad": (*_Z, *_X),
}
_MAX_COUNT = 2**31 - 2**16  # What an int32 index may reach, less the last block's overhang.


def plan(
    problem: ConvProblem,
    config: PointwiseConfig,
    *,
    allow_tf32: bool,
    fused: frozenset[str] = frozenset(),
    relu: bool = False,
    adds: bool = False,
) -> Launch:
    """The launch that computes one pass with given settings; needs no device and no tensors.

    Args:
        problem: What to compute; one group.
        config: Launch settings.
        allow_tf32: Whether float32 products may be rounded to TF32.
        fused: The kernel's optional pointers that the launch has tensors for. By default none.
        relu: Whether the forward pass ends in a ReLU.
        adds: Whether the input gradient is added to what is there.

    Raises:
        ValueError: If a count passes what the kernels index with 32 bits, or tensor descriptors do not serve.
    """
    in_channels, out_channels = problem.in_channels, problem.out_channels
    pixels = problem.batch * problem.out_height * problem.out_width
    sizes = {"pixels": pixels, "height": problem.height, "width": problem.width, "in_channels": in_channels}
    sizes |= {"out_height": problem.out_height, "out_width": problem.out_width, "out_channels": out_channels}
    constants: dict[str, Any] = {name: None for name in _OPTIONAL[problem.op] if name not in fused}
    constants |= {"STRIDE_H": problem.stride[0], "STRIDE_W": problem.stride[1]}
    constants |= {"ALIGN": math.gcd(in_channels, out_channels, 16), "PRECISION": precision(problem.dtype, allow_tf32)}
    constants |= {"BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_K": config.block_k}
    covered = pixels
    if problem.op == "wgrad":
        sizes["share"] = triton.cdiv(triton.cdiv(pixels, config.block_m), config.splits) * config.block_m
        covered = sizes["share"] * config.splits
        programs = triton.cdiv(out_channels, config.block_n) * triton.cdiv(in_channels, config.block_k) * config.splits
    else:
        result_channels = in_channels if problem.op == "dgrad" else out_channels
        rows = walkers(problem, config)
        programs = triton.cdiv(result_channels, config.block_n) * rows
    if problem.op == "dgrad":
        constants["ADDS"] = adds
    if problem.op == "fwd":
        sizes["walkers"] = rows
        constants["RESIDENT"] = 0 if config.walkers is None else triton.cdiv(in_channels, config.block_k)
        constants |= {"RELU": relu, "ASSEMBLY": not interpreted()}
    largest = max(programs, covered, problem.batch * problem.height * problem.width)
    if largest > _MAX_COUNT:
        raise ValueError(
            f"conv2d 1x1: expected at most {_MAX_COUNT} pixels and programs for the triton backend, got {largest}; "
            "split the batch, or use the torch backend"
        )
    blocks = _blocks(problem, config, fused) if config.tensor_descriptors else {}
    constants["DESCRIPTORS"] = config.tensor_descriptors
    return Launch(_KERNELS[problem.op], programs, sizes, constants, options(config), blocks)


def walkers(problem: ConvProblem, config: PointwiseConfig) -> int:
    """Programs of a forward pass or an input gradient per block of channels; each leaves a row of partials."""
    blocks = triton.cdiv(problem.batch * problem.out_height * problem.out_width, config.block_m)
    return blocks if config.walkers is None or problem.op != "fwd" else min(blocks, config.walkers)


def _blocks(problem: ConvProblem, config: PointwiseConfig, fused: frozenset[str]) -> dict[str, tuple[int, int]]:
    """What the kernel loads by tensor descriptors, as `Launch.blocks`."""
    if not fits_descriptors(problem):
        raise ValueError(f"conv2d 1x1: expected a problem that tensor descriptors serve, got {problem}")
    pixels = (config.block_m, config.block_k)
    if problem.op == "fwd":
        return {"x_ptr": pixels, "weight_ptr": (config.block_n, config.block_k)}
    gradients = ["grad_ptr", *({"z_ptr"} & fused)]
    if problem.op == "wgrad":
        return dict.fromkeys(gradients, (config.block_m, config.block_n)) | {"x_ptr": pixels}
    return dict.fromkeys(gradients, pixels) | {"weight_ptr": (config.block_k, config.block_n)}


def conv_stats_fwd(
    x: Tensor,
    prologue: Affine | None,
    weight: Tensor,
    stride: tuple[int, int],
    groups: int,
    channels_last: bool,
    stats: bool,
    *,
    config: PointwiseConfig | None = None,
    allow_tf32: bool | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """1x1 convolution of relu(prologue(x)), and the statistics of its result.

    Args:
        x: (N, C_in, H, W), dense in the layout ``channels_last`` says; float32, float16 or bfloat16.
        prologue: (center or None, scale, shift), float32 vectors (C_in,), or None: ``x`` as it is.
        weight: (C_out, C_in, 1, 1), dense, dtype of ``x``.
        stride: (stride_h, stride_w), each 1 or 2.
        groups: 1.
        channels_last: Whether ``x`` and the result are dense in ``torch.channels_last`` (else in NCHW).
        stats: Whether the statistics are wanted.
        config: Launch settings; what was measured (tuning.py) or else the heuristic's choice by default.
        allow_tf32: Whether float32 products may be rounded to TF32; PyTorch's flag for convolutions by default.

    Returns:
        z (N, C_out, Ho, Wo) with Ho = (H - 1) // stride_h + 1, Wo alike; mean and biased variance (C_out,) of z as it
        is stored, float32, the same bits for the same call, or None.
    """
    settings = (config, allow_tf32)
    z, partials = _convolve(x, prologue, weight, stride, channels_last, settings, 3 if stats else 0)
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
    z, partials = _convolve(x, prologue, weight, stride, channels_last, (None, None), 3)
    return z, *merge_partials(partials, norm)  # type: ignore[arg-type]  # there are partials of three sums


def _convolve(
    x: Tensor,
    prologue: Affine | None,
    weight: Tensor,
    stride: tuple[int, int],
    channels_last: bool,
    settings: tuple[PointwiseConfig | None, bool | None],
    sums: int,
) -> tuple[Tensor, Tensor | None]:
    tensors = {"x_ptr": nhwc(x), "weight_ptr": weight, **_vectors("x", prologue)}
    z, partials = _launch("fwd", x, weight, stride, channels_last, settings, tensors, "y_ptr", sums)
    return to_layout(z, channels_last), partials


def conv_stats_bwd(
    dz: Tensor,
    grad_prologue: GradPrologue | None,
    x: Tensor,
    prologue: Affine | None,
    weight: Tensor,
    stride: tuple[int, int],
    groups: int,
    channels_last: bool,
    wanted: tuple[bool, bool],
    *,
    dgrad_config: PointwiseConfig | None = None,
    wgrad_config: PointwiseConfig | None = None,
    allow_tf32: bool | None = None,
    deferred: bool = False,
    grad_scale: Tensor | None = None,
    onto: Tensor | None = None,
) -> tuple[Any, ...]:
    """Gradients of `conv_stats_fwd`.

    Args:
        dz: (N, C_out, Ho, Wo), the gradient of z, laid out like ``x``.
        grad_prologue: (z, mean, dmean, dvar): z, its mean, and the gradients of its mean and variance, which are added
            to ``dz`` on load; None if the statistics have no gradient.
        x: As in `conv_stats_fwd`.
        prologue: As in `conv_stats_fwd`.
        weight: As in `conv_stats_fwd`.
        stride: As in `conv_stats_fwd`.
        groups: 1.
        channels_last: As in `conv_stats_fwd`.
        wanted: Whether the gradients of (x and the prologue, weight) are wanted.
        dgrad_config: Launch settings of the input gradient; the heuristic's choice by default.
        wgrad_config: Launch settings of the weight gradient; the heuristic's choice by default.
        allow_tf32: As in `conv_stats_fwd`.
        deferred: Whether the gradients of the vectors may still be partial sums, and that of the weight unrounded.
        grad_scale: (C_out,), float32, what ``dz`` is yet to be multiplied by, with a ``grad_prologue``; or None.
        onto: What dx is added to, and then is: like ``x`` in channels_last, or None.

    Returns:
        dx like ``x``; dscale and dshift (C_in,), float32, None without a prologue; dw (C_out, C_in, 1, 1), laid out by
        ``channels_last``, dtype of ``x``. What is not wanted is None. The same bits for the same call. If ``deferred``
        `PartialSums` and None instead of dscale and dshift, and dw is float32.
    """
    x = nhwc(x)
    source = {"grad_ptr": nhwc(dz)}
    if grad_prologue is not None:
        z, mean, dmean, dvar = grad_prologue
        source |= {"z_ptr": nhwc(z), **_vectors("z", (mean, dvar, dmean))}
        if grad_scale is not None:
            source["grad_scale_ptr"] = grad_scale
    vectors = _vectors("x", prologue)
    dx = dw = None
    dvectors: tuple[Any, ...] = (None, None)
    place = (x, weight, stride, channels_last)
    if wanted[0]:
        tensors = {**source, "weight_ptr": weight}
        if prologue is not None:
            tensors |= {"x_ptr": x, **vectors}
        settings = (dgrad_config, allow_tf32)
        sums = 0 if prologue is None else 2
        dx, partials = _launch("dgrad", *place, settings, tensors, "dx_ptr", sums, onto=onto)
        if partials is not None:
            dvectors = (PartialSums.of(partials, 0, 1), None) if deferred else sum_partials(partials)
        dx = to_layout(dx, channels_last)
    if wanted[1]:
        tensors = {**source, "x_ptr": x, **vectors}
        dw, _ = _launch("wgrad", *place, (wgrad_config, allow_tf32), tensors, "partials_ptr")
        dw = dw.sum(0)
        if not deferred:
            dw = empty(x, weight.shape, channels_last).copy_(dw)
    return dx, *dvectors, dw


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
    config: PointwiseConfig | None = None,
    allow_tf32: bool | None = None,
) -> Tensor:
    """relu(scale * conv(x, weight) + shift + residual), rounded once; for inference.

    Args:
        x: As in `conv_stats_fwd`.
        weight: As in `conv_stats_fwd`.
        scale: (C_out,), float32, or None: 1.
        shift: (C_out,), float32, or None: 0.
        residual: Like the result, or None.
        relu: Whether there is a ReLU at the end.
        stride: As in `conv_stats_fwd`.
        groups: 1.
        channels_last: As in `conv_stats_fwd`, for the residual too.
        config: As in `conv_stats_fwd`.
        allow_tf32: As in `conv_stats_fwd`.

    Returns:
        (N, C_out, Ho, Wo), dtype of ``x``.
    """
    tensors = {"x_ptr": nhwc(x), "weight_ptr": weight}
    if scale is not None:
        tensors["y_scale_ptr"] = scale
    if shift is not None:
        tensors["y_shift_ptr"] = shift
    if residual is not None:
        tensors["residual_ptr"] = nhwc(residual)
    place = (x, weight, stride, channels_last, (config, allow_tf32))
    y, _ = _launch("fwd", *place, tensors, "y_ptr", affine=True, relu=relu)
    return to_layout(y, channels_last)


def _vectors(name: str, affine: Affine | None) -> dict[str, Tensor]:
    if affine is None:
        return {}
    center, scale, shift = affine
    vectors = {f"{name}_scale_ptr": scale, f"{name}_shift_ptr": shift}
    return vectors if center is None else {f"{name}_center_ptr": center, **vectors}


def _launch(
    op: str,
    x: Tensor,
    weight: Tensor,
    stride: tuple[int, int],
    channels_last: bool,
    settings: tuple[PointwiseConfig | None, bool | None],
    tensors: dict[str, Tensor],
    result: str,
    sums: int = 0,
    *,
    affine: bool = False,
    relu: bool = False,
    onto: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Launch one pass on ``tensors``, by argument name.

    Returns:
        What the argument ``result`` is given, and, if there are ``sums``, as many float32 values for each block of
        pixels and channel of the result.
    """
    config, allow_tf32 = settings
    if allow_tf32 is None:
        allow_tf32 = tf32_allowed(x.dtype)
    names = (*tensors, "partials_ptr") if sums else tuple(tensors)
    problem = (op, x.shape, weight.shape, stride, 1, x.dtype, x.device, channels_last)
    ends = (affine, relu, onto is not None)
    prepared = _prepare(names, config, allow_tf32, ends, *problem)
    if op == "wgrad":
        made = torch.empty(prepared.shape, dtype=torch.float32, device=x.device)
    else:
        made = empty(x, prepared.shape) if onto is None else onto
    tensors[result] = made
    partials = prepared.partials(sums, x)
    if partials is not None:
        tensors["partials_ptr"] = partials
    launch = prepared.launch
    if not launch.takes(**tensors):
        config = replace(prepared.config, tensor_descriptors=False)
        launch = _prepare(names, config, allow_tf32, ends, *problem).launch
    launch(**tensors)
    return made, partials


@functools.lru_cache(maxsize=4096)
def _prepare(
    names: tuple[str, ...],
    config: PointwiseConfig | None,
    allow_tf32: bool,
    ends: tuple[bool, bool, bool],
    *place: Any,
) -> Prepared:
    """``names``: the arguments that there are tensors for; ``ends``: in an affine, in a ReLU, in a sum.

    ``place``: as of `problem_of`.
    """
    problem, (affine, relu, adds) = problem_of(*place), ends
    *_, device, _ = place
    if config is None:
        config = _default_config(problem, device, allow_tf32, affine)
    fused = frozenset(names).intersection(_OPTIONAL[problem.op])
    launch = plan(problem, config, allow_tf32=allow_tf32, fused=fused, relu=relu, adds=adds)
    if problem.op == "wgrad":
        return Prepared(config, launch, (config.splits, problem.out_channels, problem.in_channels, 1, 1), 0)
    return Prepared(config, launch, problem.result_shape, walkers(problem, config))


def _default_config(problem: ConvProblem, device: torch.device, allow_tf32: bool, affine: bool) -> PointwiseConfig:
    fusion = "affine" if affine else "stats"
    entry = lookup(problem, device, fusion=fusion, kernel_size=1, allow_tf32=allow_tf32)
    if entry is not None and entry.config is not None:
        return entry.config  # type: ignore[return-value]  # of a 1x1 convolution
    machine = {"num_sms": num_sms(device), "arch": architecture(device)}
    return pointwise_config(problem, affine=affine, allow_tf32=allow_tf32, **machine)
